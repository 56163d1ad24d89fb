//! The digests of copies: followers report them, and their primary compares them with its own.

use std::collections::BTreeMap;

use crate::ids::{CopyNo, Epoch, Seq, ShardId, StoreId};
use crate::message::{DigestPoint, ToFollower};
use crate::node::audit::{Audit, on_own_damage};
use crate::node::event::{AuditFinding, Effect};
use crate::node::peers::Peers;
use crate::node::shared::NodeTurn;
use crate::planted::Planted;
use crate::replica::ReplicaRole;
use crate::replica::primary::Feed;

#[derive(Clone, Debug, Eq, PartialEq)]
enum DigestVerdict {
    /// All copies are equal.
    Equal,
    /// The copies of these followers differ from the majority.
    OthersWrong(Vec<StoreId>),
    /// The copy of this node differs from the majority.
    OwnWrong,
    /// There is no majority; these followers differ from this node.
    Undecided(Vec<StoreId>),
}

fn decide(own: DigestPoint, others: &BTreeMap<StoreId, DigestPoint>) -> DigestVerdict {
    let votes_for = |point: &DigestPoint| others.values().filter(|other| *other == point).count();
    let odd: Vec<StoreId> =
        others.iter().filter(|(_, point)| **point != own).map(|(&store, _)| store).collect();
    let against = others.values().filter(|point| **point != own).map(votes_for).max().unwrap_or(0);
    match (1 + votes_for(&own)).cmp(&against) {
        _ if against == 0 => DigestVerdict::Equal,
        std::cmp::Ordering::Less => DigestVerdict::OwnWrong,
        std::cmp::Ordering::Greater => DigestVerdict::OthersWrong(odd),
        std::cmp::Ordering::Equal => DigestVerdict::Undecided(odd),
    }
}

impl Audit {
    /// Compares a digest of a follower with this node's own.
    pub(in crate::node) fn on_digest(
        &mut self,
        turn: &mut NodeTurn<'_>,
        peers: &mut Peers,
        store: StoreId,
        theirs: DigestPoint,
    ) {
        let Some(primary) = turn.shards.primary_mut(theirs.shard) else { return };
        // A follower that needs a snapshot reports what it had before.
        if primary.followers.get(&store).is_none_or(|follower| follower.lost_acked_data) {
            return;
        }
        primary.votes.entry(theirs.seq).or_default().insert(store, theirs);
        if primary.votes.len() > turn.settings.sizes.votes_max {
            primary.votes.pop_first();
        }
        self.compare_digests(turn, peers, theirs.shard);
    }

    /// Compares the digests of followers that were ahead, once entries above `before` are applied.
    pub(in crate::node) fn compare_if_reached(
        &mut self,
        turn: &mut NodeTurn<'_>,
        peers: &mut Peers,
        shard: ShardId,
        before: Seq,
    ) {
        let Some(replica) = turn.shards.get(shard) else { return };
        let Some(primary) = replica.primary() else { return };
        let applied = replica.state.applied.seq;
        if applied > before && primary.votes.range(before.next()..=applied).next().is_some() {
            self.compare_digests(turn, peers, shard);
        }
    }

    /// Compares the digests of all seqs that this node has reached.
    fn compare_digests(&mut self, turn: &mut NodeTurn<'_>, peers: &mut Peers, shard: ShardId) {
        let Some(replica) = turn.shards.get_mut(shard) else { return };
        let Some(primary) = replica.primary() else { return };
        let applied = replica.state.applied.seq;
        let reached: Vec<Seq> = primary.votes.range(..=applied).map(|(&seq, _)| seq).collect();
        // Hashing all sessions takes long: only for a seq at which no digest is kept.
        let present = (reached.last() == Some(&applied)).then(|| replica.digest());
        let points = &replica.points;
        let ReplicaRole::Primary(primary) = &mut replica.role else { return };
        let mut verdicts = Vec::new();
        for seq in reached {
            let own = points.iter().chain(&present).find(|point| point.seq == seq).copied();
            let Some(votes) = primary.votes.get(&seq) else { continue };
            let Some(own) = own else {
                primary.votes.remove(&seq);
                continue;
            };
            let all = primary.followers.iter().all(|(store, follower)| {
                votes.contains_key(store) || !follower.is_fed() || follower.lost_acked_data
            });
            let verdict = decide(own, votes);
            if !all && matches!(verdict, DigestVerdict::Equal | DigestVerdict::Undecided(_)) {
                continue; // The other followers decide.
            }
            verdicts.extend(primary.votes.remove(&seq).map(|votes| (own, votes, verdict)));
        }
        for (own, votes, verdict) in verdicts {
            self.apply_verdict(turn, peers, own, &votes, verdict);
        }
    }

    fn apply_verdict(
        &mut self,
        turn: &mut NodeTurn<'_>,
        peers: &mut Peers,
        own: DigestPoint,
        votes: &BTreeMap<StoreId, DigestPoint>,
        verdict: DigestVerdict,
    ) {
        if verdict == DigestVerdict::Equal {
            return;
        }
        let shard = own.shard;
        let decision = match &verdict {
            DigestVerdict::OwnWrong => "majority: this node is wrong",
            DigestVerdict::OthersWrong(_) => "majority: the other copy is wrong",
            _ => "undecided, scrubbing own copy",
        };
        let differ = votes.iter().filter(|(_, theirs)| **theirs != own);
        for (&store, &theirs) in differ {
            self.digest_mismatches += 1;
            turn.effects.push(Effect::Audit(AuditFinding::DigestsDiffer {
                own,
                store,
                theirs,
                decision,
            }));
        }
        match verdict {
            DigestVerdict::OwnWrong => {
                on_own_damage(turn, peers, shard, "its digest differs from those of the others");
            }
            DigestVerdict::OthersWrong(stores) => {
                stores.into_iter().for_each(|store| mark_corrupt(turn, peers, store, own));
            }
            DigestVerdict::Undecided(stores) => {
                if let Some(primary) = turn.shards.primary_mut(shard) {
                    primary.disputed.extend(stores.into_iter().map(|store| (store, own)));
                }
                self.request_scrub(turn.settings, [shard], 0);
            }
            DigestVerdict::Equal => {}
        }
    }
}

/// Marks the follower's copy as corrupt: the follower leaves the in-sync set (or is marked in
/// it, at `min_in_sync`) and needs a snapshot. It is informed, so that it neither leads nor
/// serves reads with this copy.
pub(super) fn mark_corrupt(
    turn: &mut NodeTurn<'_>,
    peers: &Peers,
    store: StoreId,
    own: DigestPoint,
) {
    let shard = own.shard;
    let conn = peers.connection_to(store);
    let Some(primary) = turn.shards.primary_mut(shard) else { return };
    let epoch = primary.epoch;
    let Some(follower) = primary.followers.get_mut(&store) else { return };
    follower.lost_acked_data = true;
    follower.acked = Seq(0);
    follower.feed = Feed::NeedsSnapshot;
    if let Some(conn) = conn {
        let copy = follower.copy;
        let message = ToFollower::Damaged { epoch, copy, point: own };
        turn.effects.push(Effect::ToFollower { conn, message });
    }
    turn.shards.to_review.insert(shard);
    turn.shards.mark_follower(store, shard);
}

/// Handles a message of the primary: this copy differs from the others.
pub(in crate::node) fn on_marked_corrupt(
    turn: &mut NodeTurn<'_>,
    peers: &mut Peers,
    primary: StoreId,
    epoch: Epoch,
    copy: CopyNo,
    theirs: DigestPoint,
) {
    let Some(replica) = turn.shards.get(theirs.shard) else { return };
    if replica.promised != epoch || replica.copy != copy || !replica.trust.exists() {
        return;
    }
    let at = replica.points.iter().find(|point| point.seq == theirs.seq);
    let own = at.copied().unwrap_or_else(|| replica.digest());
    let decision = "primary: this copy is wrong";
    turn.effects.push(Effect::Audit(AuditFinding::DigestsDiffer {
        own,
        store: primary,
        theirs,
        decision,
    }));
    on_own_damage(turn, peers, theirs.shard, "its digest differs from that of the primary");
}

/// Returns the digests of the followed shards that were not sent on this connection yet.
pub(in crate::node) fn unsent_digests(
    turn: &NodeTurn<'_>,
    on_connection: &mut BTreeMap<ShardId, (Seq, Seq)>,
) -> Vec<DigestPoint> {
    let mut points = Vec::new();
    let sent_max = match turn.planted(Planted::PointsUnlimited) {
        true => usize::MAX,
        false => turn.settings.sizes.points_sent_max,
    };
    for replica in turn.shards.iter() {
        if !replica.trust.is_working() || replica.primary().is_some() {
            continue;
        }
        let (sent, seen) = on_connection.entry(replica.shard).or_default();
        let newest = replica.points.iter().rev().take(sent_max);
        let first = points.len();
        points.extend(newest.filter(|point| point.seq > *sent));
        points[first..].reverse();
        let applied = replica.state.applied.seq;
        // At rest: nothing was applied since the last heartbeat, and nothing is known to come.
        let kept = replica.points.back().map_or(Seq(0), |point| point.seq);
        if applied == *seen && applied == replica.commit && applied > kept.max(*sent) {
            points.push(replica.digest());
        }
        *seen = applied;
        *sent = points[first..].last().map_or(*sent, |point| point.seq);
    }
    points
}

#[cfg(test)]
mod tests {
    use super::*;

    fn point(counters: u128) -> DigestPoint {
        DigestPoint { seq: Seq(1_024), counters, ..DigestPoint::default() }
    }

    /// This node has digest 1; the others, by number, have these.
    #[track_caller]
    fn check(others: &[u128], want: DigestVerdict) {
        let votes = (2..).map(StoreId).zip(others.iter().map(|&counters| point(counters)));
        assert_eq!(decide(point(1), &votes.collect()), want);
    }

    fn stores<const N: usize>(ids: [u128; N]) -> Vec<StoreId> {
        ids.map(StoreId).to_vec()
    }

    #[test]
    fn the_minority_is_wrong() {
        check(&[], DigestVerdict::Equal);
        check(&[1, 1], DigestVerdict::Equal);
        check(&[1, 2], DigestVerdict::OthersWrong(stores([3])));
        check(&[2, 2], DigestVerdict::OwnWrong);
        check(&[1, 2, 3, 1], DigestVerdict::OthersWrong(stores([3, 4])));
    }

    #[test]
    fn without_a_majority_nothing_is_decided() {
        check(&[2], DigestVerdict::Undecided(stores([2])));
        check(&[2, 3], DigestVerdict::Undecided(stores([2, 3])));
        check(&[1, 2, 2], DigestVerdict::Undecided(stores([3, 4])));
    }
}
