//! Audits: whether the copies of a shard are equal, and whether this disk contains what was written
//! to it.
//!
//! ```text
//!   follower ── digests, every 1,024 entries, at barriers, at rest ──▶ primary ──▶ mark_corrupt
//!   Scrub ──▶ driver reads every block ──▶ Scrubbed: rows, record ──▶ compare with the flush
//! ```
//!
//! **Which side is right.** Replicas with the same log have the same state, so of copies that
//! differ at one seq the minority is wrong. Without a majority (mostly with two copies) the primary
//! scrubs its own disk: if the scrub finds damage, the primary's copy is wrong; if not, the other
//! one is, since the answers to clients came from the primary. A wrong copy takes no more entries,
//! serves no reads, and is replaced by a snapshot; a wrong primary asks for its replacement.
//! Nothing is decided while other followers have yet to report their digest.
//!
//! A digest is kept up to date from the *log*, so corruption of a row does not change it. The scrub
//! finds that. Corruption that a checksum shows never comes here: it ends the process.

use std::collections::{BTreeMap, BTreeSet};

use crate::ids::{CopyNo, Epoch, Now, Seq, ShardId, Slots, StoreId, TimeMs};
use crate::message::{DigestPoint, ScrubStatus, ToFollower};
use crate::node::{AuditFinding, Effect, Node, turn_of};
use crate::planted::Planted;
use crate::replica::Replica;

/// The result of a scrub for one shard on the disk.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct ScrubbedShard {
    /// The number of the copy.
    pub copy: CopyNo,
    /// The digest in the shard record.
    pub point: DigestPoint,
    /// The digest of the counters, computed from the rows.
    pub counters: u128,
}

/// The digests that followers have reported, by seq.
pub type DigestVotes = BTreeMap<Seq, BTreeMap<StoreId, DigestPoint>>;

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

/// The scrub in flight, the next one, and the result of the last one.
#[derive(Clone, Debug, Default)]
pub(super) struct Scrubbing {
    in_flight: Option<(u64, BTreeSet<ShardId>)>,
    /// The next scrub; without shards in it: of everything.
    wanted: Option<ScrubRequest>,
    next: Option<Now>,
    status: ScrubStatus,
}

#[cfg(test)]
impl Scrubbing {
    pub(super) fn in_flight(&self) -> Option<u64> {
        self.in_flight.as_ref().map(|(scrub, _)| *scrub)
    }
}

#[derive(Clone, Debug)]
struct ScrubRequest {
    shards: BTreeSet<ShardId>,
    bytes_per_s: u64,
}

// ---- digests -----------------------------------------------------------------------------------

impl Node {
    /// Returns the digests of the followed shards that were not sent on this connection yet.
    pub(super) fn unsent_digests(&mut self, conn: crate::ids::Conn) -> Vec<DigestPoint> {
        let Some(connection) = self.accepted.get_mut(&conn) else { return Vec::new() };
        let mut points = Vec::new();
        for (&shard, replica) in &self.replicas {
            if !replica.trust.is_working() || replica.primary().is_some() {
                continue;
            }
            let (sent, seen) = connection.digests_sent.entry(shard).or_default();
            let sent_max = match Planted::PointsUnlimited.is_in(self.settings.planted) {
                true => usize::MAX,
                false => self.settings.sizes.points_sent_max,
            };
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

    /// Compares a digest of a follower with this node's own.
    pub(super) fn on_digest(
        &mut self,
        store: StoreId,
        theirs: DigestPoint,
        effects: &mut Vec<Effect>,
    ) {
        let Some(replica) = self.replicas.get_mut(&theirs.shard) else { return };
        let Some(primary) = replica.primary_mut() else { return };
        // A follower that needs a snapshot reports what it had before.
        if primary.followers.get(&store).is_none_or(|follower| follower.lost_acked_data) {
            return;
        }
        primary.votes.entry(theirs.seq).or_default().insert(store, theirs);
        if primary.votes.len() > self.settings.sizes.votes_max {
            primary.votes.pop_first();
        }
        self.compare_digests(theirs.shard, effects);
    }

    /// Entries were applied: compares the digests of followers that were ahead.
    pub(super) fn compare_if_reached(
        &mut self,
        shard: ShardId,
        before: Seq,
        effects: &mut Vec<Effect>,
    ) {
        let Some(replica) = self.replicas.get(&shard) else { return };
        let Some(primary) = replica.primary() else { return };
        let applied = replica.state.applied.seq;
        if applied > before && primary.votes.range(before.next()..=applied).next().is_some() {
            self.compare_digests(shard, effects);
        }
    }

    /// Compares the digests of all seqs that this node has reached.
    fn compare_digests(&mut self, shard: ShardId, effects: &mut Vec<Effect>) {
        let Some(replica) = self.replicas.get_mut(&shard) else { return };
        let Some(primary) = replica.primary() else { return };
        let applied = replica.state.applied.seq;
        let reached: Vec<Seq> = primary.votes.range(..=applied).map(|(&seq, _)| seq).collect();
        // Hashing all sessions takes long: only for a seq at which no digest is kept.
        let present = (reached.last() == Some(&applied)).then(|| replica.digest());
        let points = &replica.points;
        let crate::replica::ReplicaRole::Primary(primary) = &mut replica.role else { return };
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
            self.apply_verdict(own, &votes, verdict, effects);
        }
    }

    fn apply_verdict(
        &mut self,
        own: DigestPoint,
        votes: &BTreeMap<StoreId, DigestPoint>,
        verdict: DigestVerdict,
        effects: &mut Vec<Effect>,
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
            effects.push(Effect::Audit(AuditFinding::DigestsDiffer {
                own,
                store,
                theirs,
                decision,
            }));
        }
        match verdict {
            DigestVerdict::OwnWrong => {
                self.on_own_damage(shard, "its digest differs from those of the others", effects);
            }
            DigestVerdict::OthersWrong(stores) => {
                stores.into_iter().for_each(|store| self.mark_corrupt(store, own, effects));
            }
            DigestVerdict::Undecided(stores) => {
                let replica = self.replicas.get_mut(&shard);
                if let Some(primary) = replica.and_then(Replica::primary_mut) {
                    primary.disputed.extend(stores.into_iter().map(|store| (store, own)));
                }
                self.request_scrub([shard], 0);
            }
            DigestVerdict::Equal => {}
        }
    }

    /// Marks the follower's copy as corrupt: the follower leaves the in-sync set (or is marked in
    /// it, at `min_in_sync`) and needs a snapshot. It is informed, so that it neither leads nor
    /// serves reads with this copy.
    fn mark_corrupt(&mut self, store: StoreId, own: DigestPoint, effects: &mut Vec<Effect>) {
        let shard = own.shard;
        let conn = self.dialled_to.get(&store).copied();
        let Some(primary) = self.replicas.get_mut(&shard).and_then(Replica::primary_mut) else {
            return;
        };
        let epoch = primary.epoch;
        let Some(follower) = primary.followers.get_mut(&store) else { return };
        follower.lost_acked_data = true;
        follower.acked = Seq(0);
        follower.feed = crate::replica::primary::Feed::NeedsSnapshot;
        if let Some(conn) = conn {
            let copy = follower.copy;
            let message = ToFollower::Damaged { epoch, copy, point: own };
            effects.push(Effect::ToFollower { conn, message });
        }
        self.to_review.insert(shard);
        self.to_send.insert((store, shard));
    }

    /// Handles a message of the primary: this copy differs from the others.
    pub(super) fn on_marked_corrupt(
        &mut self,
        primary: StoreId,
        epoch: Epoch,
        copy: CopyNo,
        theirs: DigestPoint,
        effects: &mut Vec<Effect>,
    ) {
        let Some(replica) = self.replicas.get(&theirs.shard) else { return };
        if replica.promised != epoch || replica.copy != copy || !replica.trust.exists() {
            return;
        }
        let at = replica.points.iter().find(|point| point.seq == theirs.seq);
        let own = at.copied().unwrap_or_else(|| replica.digest());
        let decision = "primary: this copy is wrong";
        effects.push(Effect::Audit(AuditFinding::DigestsDiffer {
            own,
            store: primary,
            theirs,
            decision,
        }));
        self.on_own_damage(theirs.shard, "its digest differs from that of the primary", effects);
    }

    /// Stops this node's own copy, which is wrong: it takes no entries and serves no reads. A
    /// primary asks for its replacement; a follower reports the damage by its next reject, and the
    /// announcement causes one even if nothing is written.
    fn on_own_damage(&mut self, shard: ShardId, why: &'static str, effects: &mut Vec<Effect>) {
        let Some(replica) = self.replicas.get_mut(&shard) else { return };
        replica.stop(&mut turn_of!(self, effects), why);
        self.dirty.insert(shard);
        self.next_report = self.now;
        self.announce_copy(shard, effects);
    }
}

// ---- scrubbing ---------------------------------------------------------------------------------

impl Node {
    /// Requests a scrub of these shards, or of all shards on this node if none is named, to begin
    /// when the scrub in flight has ended.
    pub(super) fn request_scrub(
        &mut self,
        shards: impl IntoIterator<Item = ShardId>,
        bytes_per_s: u64,
    ) {
        let shards: BTreeSet<ShardId> = shards.into_iter().collect();
        let bytes_per_s =
            if bytes_per_s > 0 { bytes_per_s } else { self.settings.scrub_bytes_per_s };
        match &mut self.scrubbing.wanted {
            Some(wanted) if !wanted.shards.is_empty() && !shards.is_empty() => {
                wanted.shards.extend(shards);
            }
            Some(wanted) => wanted.shards.clear(),
            none => *none = Some(ScrubRequest { shards, bytes_per_s }),
        }
    }

    pub(super) fn scrub_if_due(&mut self, effects: &mut Vec<Effect>) {
        if let Some(every_ms) = self.settings.scrub_every_ms {
            // The first one comes sooner: a node that is restarted every day is scrubbed, too.
            let next = *self.scrubbing.next.get_or_insert(self.now.plus_ms(every_ms / 8));
            if self.now >= next {
                self.scrubbing.next = Some(self.now.plus_ms(every_ms));
                self.request_scrub([], 0);
            }
        }
        if self.scrubbing.in_flight.is_some() {
            return;
        }
        let Some(ScrubRequest { shards, bytes_per_s }) = self.scrubbing.wanted.take() else {
            return;
        };
        let scrub = self.fresh_id();
        let held = self.replicas.values().filter(|replica| shards.contains(&replica.shard));
        let slots: Vec<Slots> = held.map(|replica| replica.slots).collect();
        self.scrubbing.in_flight = Some((scrub, shards));
        self.scrubbing.status.running = true;
        effects.push(Effect::Scrub { scrub, shards: slots, bytes_per_s });
    }

    pub(super) fn on_scrubbed(
        &mut self,
        scrub: u64,
        found: Vec<ScrubbedShard>,
        effects: &mut Vec<Effect>,
    ) {
        let Some((_, asked)) = self.scrubbing.in_flight.take_if(|(number, _)| *number == scrub)
        else {
            return;
        };
        let mut damaged = Vec::new();
        for on_disk in &found {
            if let Some(why) = self.damage_of(on_disk) {
                damaged.push(on_disk.point.shard);
                self.on_own_damage(on_disk.point.shard, why, effects);
            }
        }
        let held: Vec<ShardId> = self.replicas.keys().copied().collect();
        for shard in held.into_iter().filter(|shard| asked.is_empty() || asked.contains(shard)) {
            self.resolve_dispute(shard, effects);
        }
        let shards = found.len() as u64;
        effects.push(Effect::Audit(AuditFinding::Scrubbed { shards, damaged: damaged.clone() }));
        self.scrubs += 1;
        self.scrub_damages += damaged.len() as u64;
        self.scrubbing.status = ScrubStatus { running: false, ended: self.wall, shards, damaged };
    }

    /// Returns how the disk differs from what was written to it. A copy that has been replaced
    /// since can't be compared.
    fn damage_of(&self, found: &ScrubbedShard) -> Option<&'static str> {
        let replica = self.replicas.get(&found.point.shard)?;
        if !replica.trust.exists() || replica.copy != found.copy {
            return None;
        }
        if found.counters != found.point.counters {
            return Some("the counters on its disk differ from its digest");
        }
        let known = replica.points.iter().chain([&replica.flushed_point]);
        let known = known.copied().find(|point| point.seq == found.point.seq)?;
        (known != found.point).then_some("its record on disk differs from what was written")
    }

    /// Resolves a dispute after a scrub of this node's own copy: if it is good, the copies that
    /// differ from it are wrong.
    fn resolve_dispute(&mut self, shard: ShardId, effects: &mut Vec<Effect>) {
        let Some(replica) = self.replicas.get_mut(&shard) else { return };
        let well = replica.trust.is_working();
        let Some(primary) = replica.primary_mut() else { return };
        for (store, own) in std::mem::take(&mut primary.disputed) {
            if well {
                self.mark_corrupt(store, own, effects);
            }
        }
    }

    pub(super) fn scrub_status(&self) -> ScrubStatus {
        self.scrubbing.status.clone()
    }
}

impl ScrubStatus {
    /// Returns whether a scrub has ended since this node started.
    pub fn has_ended(&self) -> bool {
        self.ended != TimeMs(0)
    }
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
