//! Are the copies of a shard the same, and does this disk hold what was written to it?
//!
//! ```text
//!   follower ── digests, every 1,024 entries, at barriers, at rest ──▶ primary: judge ──▶ condemn
//!   Scrub ──▶ driver reads every block ──▶ Scrubbed: rows, record ──▶ compare with what was flushed
//! ```
//!
//! **Who is believed.** The same log makes the same state, so of copies that differ at one seq the fewer are wrong. Where
//! neither side has more (two copies, mostly), the primary has its own disk scrubbed: does that not bear it out, it is the
//! one that is wrong; else it is believed, since it is what clients were told. A copy that is wrong takes nothing more,
//! tells nobody any number, and is filled anew; a primary that is wrong asks to be replaced. Nothing of that is decided
//! while others have yet to tell.
//!
//! What a newcomer gets wrong: a digest is kept up to date from the *log*, so rot in a row does not change it. That is what
//! the scrubber is for. Rot that a checksum sees never comes here: it ends the process (DESIGN §6).

use std::collections::{BTreeMap, BTreeSet};

use crate::ids::{CopyNo, Epoch, Now, Seq, ShardId, Slots, StoreId, TimeMs};
use crate::message::{DigestPoint, ScrubStatus, ToFollower};
use crate::node::{Effect, Finding, Node, turn_of};
use crate::planted::Planted;
use crate::replica::Replica;

/// What a shard's record and rows on disk amount to.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct OnDisk {
    pub copy: CopyNo,
    /// As the record says.
    pub point: DigestPoint,
    /// Summed up from the rows.
    pub counters: u128,
}

/// What followers have told of their state.
pub type Votes = BTreeMap<Seq, BTreeMap<StoreId, DigestPoint>>;

#[derive(Clone, Debug, Eq, PartialEq)]
enum Verdict {
    Equal,
    /// These differ from this node and the rest.
    Theirs(Vec<StoreId>),
    /// This node differs from the rest.
    Own,
    /// As many say the one as the other: these are the others.
    Open(Vec<StoreId>),
}

fn judge(own: DigestPoint, others: &BTreeMap<StoreId, DigestPoint>) -> Verdict {
    let say = |point: &DigestPoint| others.values().filter(|other| *other == point).count();
    let odd: Vec<StoreId> =
        others.iter().filter(|(_, point)| **point != own).map(|(&store, _)| store).collect();
    let against = others.values().filter(|point| **point != own).map(say).max().unwrap_or(0);
    match (1 + say(&own)).cmp(&against) {
        _ if against == 0 => Verdict::Equal,
        std::cmp::Ordering::Less => Verdict::Own,
        std::cmp::Ordering::Greater => Verdict::Theirs(odd),
        std::cmp::Ordering::Equal => Verdict::Open(odd),
    }
}

/// The scrub under way, and what came of the last one.
#[derive(Clone, Debug, Default)]
pub(super) struct Scrubbing {
    under_way: Option<(u64, BTreeSet<ShardId>)>,
    /// What is to be scrubbed next; none in it: everything.
    wanted: Option<Wanted>,
    next: Option<Now>,
    status: ScrubStatus,
}

#[cfg(test)]
impl Scrubbing {
    pub(super) fn under_way(&self) -> Option<u64> {
        self.under_way.as_ref().map(|(scrub, _)| *scrub)
    }
}

#[derive(Clone, Debug)]
struct Wanted {
    shards: BTreeSet<ShardId>,
    bytes_per_s: u64,
}

// ---- digests -------------------------------------------------------------------------------------

impl Node {
    /// The digests of the shards followed that this connection has not been told.
    pub(super) fn new_digests(&mut self, conn: crate::ids::Conn) -> Vec<DigestPoint> {
        let Some(link) = self.accepted.get_mut(&conn) else { return Vec::new() };
        let mut points = Vec::new();
        for (&shard, replica) in &self.replicas {
            if !replica.trust.is_working() || replica.primary().is_some() {
                continue;
            }
            let (told, seen) = link.digests_told.entry(shard).or_default();
            let told_max = match Planted::PointsUnlimited.is_in(self.settings.planted) {
                true => usize::MAX,
                false => self.settings.sizes.points_told_max,
            };
            let newest = replica.points.iter().rev().take(told_max);
            let first = points.len();
            points.extend(newest.filter(|point| point.seq > *told));
            points[first..].reverse();
            let applied = replica.state.applied.seq;
            // At rest: nothing was applied since the last heartbeat, nor is anything known to come.
            let kept = replica.points.back().map_or(Seq(0), |point| point.seq);
            if applied == *seen && applied == replica.commit && applied > kept.max(*told) {
                points.push(replica.digest());
            }
            *seen = applied;
            *told = points[first..].last().map_or(*told, |point| point.seq);
        }
        points
    }

    /// A follower has told what its state amounts to.
    pub(super) fn on_digest(
        &mut self,
        store: StoreId,
        theirs: DigestPoint,
        effects: &mut Vec<Effect>,
    ) {
        let Some(replica) = self.replicas.get_mut(&theirs.shard) else { return };
        let Some(primary) = replica.primary_mut() else { return };
        // One that is being filled anew speaks of what it had.
        if primary.followers.get(&store).is_none_or(|follower| follower.short) {
            return;
        }
        primary.votes.entry(theirs.seq).or_default().insert(store, theirs);
        if primary.votes.len() > self.settings.sizes.votes_max {
            primary.votes.pop_first();
        }
        self.judge_votes(theirs.shard, effects);
    }

    /// Something was applied: others may have been there before.
    pub(super) fn judge_if_reached(
        &mut self,
        shard: ShardId,
        before: Seq,
        effects: &mut Vec<Effect>,
    ) {
        let Some(replica) = self.replicas.get(&shard) else { return };
        let Some(primary) = replica.primary() else { return };
        let applied = replica.state.applied.seq;
        if applied > before && primary.votes.range(before.next()..=applied).next().is_some() {
            self.judge_votes(shard, effects);
        }
    }

    /// Looks at what was told of the seqs that this node has reached.
    fn judge_votes(&mut self, shard: ShardId, effects: &mut Vec<Effect>) {
        let Some(replica) = self.replicas.get_mut(&shard) else { return };
        let Some(primary) = replica.primary() else { return };
        let applied = replica.state.applied.seq;
        let reached: Vec<Seq> = primary.votes.range(..=applied).map(|(&seq, _)| seq).collect();
        // Hashing all sessions takes its time: only for a seq at which nothing is kept.
        let present = (reached.last() == Some(&applied)).then(|| replica.digest());
        let points = &replica.points;
        let crate::replica::Role::Primary(primary) = &mut replica.role else { return };
        let mut verdicts = Vec::new();
        for seq in reached {
            let own = points.iter().chain(&present).find(|point| point.seq == seq).copied();
            let Some(votes) = primary.votes.get(&seq) else { continue };
            let Some(own) = own else {
                primary.votes.remove(&seq);
                continue;
            };
            let all = primary.followers.iter().all(|(store, follower)| {
                votes.contains_key(store) || !follower.is_fed() || follower.short
            });
            let verdict = judge(own, votes);
            if !all && matches!(verdict, Verdict::Equal | Verdict::Open(_)) {
                continue; // The rest decides.
            }
            verdicts.extend(primary.votes.remove(&seq).map(|votes| (own, votes, verdict)));
        }
        for (own, votes, verdict) in verdicts {
            self.follow_verdict(own, &votes, verdict, effects);
        }
    }

    fn follow_verdict(
        &mut self,
        own: DigestPoint,
        votes: &BTreeMap<StoreId, DigestPoint>,
        verdict: Verdict,
        effects: &mut Vec<Effect>,
    ) {
        if verdict == Verdict::Equal {
            return;
        }
        let shard = own.shard;
        let believed = match &verdict {
            Verdict::Own => "the others: they are more",
            Verdict::Theirs(_) => "this node: more say the same",
            _ => "nobody yet: this node scrubs its own copy",
        };
        let differ = votes.iter().filter(|(_, theirs)| **theirs != own);
        for (&store, &theirs) in differ {
            self.digest_mismatches += 1;
            effects.push(Effect::Found(Finding::DigestsDiffer { own, store, theirs, believed }));
        }
        match verdict {
            Verdict::Own => {
                self.on_own_damage(shard, "its digest differs from those of the others", effects);
            }
            Verdict::Theirs(stores) => {
                stores.into_iter().for_each(|store| self.condemn(store, own, effects));
            }
            Verdict::Open(stores) => {
                let replica = self.replicas.get_mut(&shard);
                if let Some(primary) = replica.and_then(Replica::primary_mut) {
                    primary.disputed.extend(stores.into_iter().map(|store| (store, own)));
                }
                self.want_scrub([shard], 0);
            }
            Verdict::Equal => {}
        }
    }

    /// The follower's copy is wrong: out of the in-sync set with it (or marked there, at the floor), and filled anew. It
    /// is told, so that it neither leads nor answers any read with it.
    fn condemn(&mut self, store: StoreId, own: DigestPoint, effects: &mut Vec<Effect>) {
        let shard = own.shard;
        let conn = self.dialled_to.get(&store).copied();
        let Some(primary) = self.replicas.get_mut(&shard).and_then(Replica::primary_mut) else {
            return;
        };
        let epoch = primary.epoch;
        let Some(follower) = primary.followers.get_mut(&store) else { return };
        follower.short = true;
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

    /// The primary says that this copy is not what the others are.
    pub(super) fn on_condemned(
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
        let believed = "the primary";
        effects.push(Effect::Found(Finding::DigestsDiffer {
            own,
            store: primary,
            theirs,
            believed,
        }));
        self.on_own_damage(theirs.shard, "its digest differs from that of the primary", effects);
    }

    /// This copy is wrong. It takes and tells nothing more. Leading, it asks to be replaced; following, it is heard of by
    /// its next refusal, and the announcement brings that about also where nothing is written.
    fn on_own_damage(&mut self, shard: ShardId, why: &'static str, effects: &mut Vec<Effect>) {
        let Some(replica) = self.replicas.get_mut(&shard) else { return };
        replica.stop(&mut turn_of!(self, effects), why);
        self.dirty.insert(shard);
        self.next_report = self.now;
        self.announce_copy(shard, effects);
    }
}

// ---- scrubbing -----------------------------------------------------------------------------------

impl Node {
    /// These shards, or all that are held here if none is named, as soon as the scrub under way has ended.
    pub(super) fn want_scrub(
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
            none => *none = Some(Wanted { shards, bytes_per_s }),
        }
    }

    pub(super) fn scrub_if_due(&mut self, effects: &mut Vec<Effect>) {
        if let Some(every_ms) = self.settings.scrub_every_ms {
            // The first one sooner: a node that is started anew every day is looked after, too.
            let next = *self.scrubbing.next.get_or_insert(self.now.plus_ms(every_ms / 8));
            if self.now >= next {
                self.scrubbing.next = Some(self.now.plus_ms(every_ms));
                self.want_scrub([], 0);
            }
        }
        if self.scrubbing.under_way.is_some() {
            return;
        }
        let Some(Wanted { shards, bytes_per_s }) = self.scrubbing.wanted.take() else { return };
        let scrub = self.fresh_id();
        let held = self.replicas.values().filter(|replica| shards.contains(&replica.shard));
        let slots: Vec<Slots> = held.map(|replica| replica.slots).collect();
        self.scrubbing.under_way = Some((scrub, shards));
        self.scrubbing.status.running = true;
        effects.push(Effect::Scrub { scrub, shards: slots, bytes_per_s });
    }

    pub(super) fn on_scrubbed(
        &mut self,
        scrub: u64,
        found: Vec<OnDisk>,
        effects: &mut Vec<Effect>,
    ) {
        let Some((_, asked)) = self.scrubbing.under_way.take_if(|(number, _)| *number == scrub)
        else {
            return;
        };
        let mut damaged = Vec::new();
        for on_disk in &found {
            if let Some(why) = self.wrong_on_disk(on_disk) {
                damaged.push(on_disk.point.shard);
                self.on_own_damage(on_disk.point.shard, why, effects);
            }
        }
        let held: Vec<ShardId> = self.replicas.keys().copied().collect();
        for shard in held.into_iter().filter(|shard| asked.is_empty() || asked.contains(shard)) {
            self.settle_dispute(shard, effects);
        }
        let shards = found.len() as u64;
        effects.push(Effect::Found(Finding::Scrubbed { shards, damaged: damaged.clone() }));
        self.scrubs += 1;
        self.scrub_damages += damaged.len() as u64;
        self.scrubbing.status = ScrubStatus { running: false, ended: self.wall, shards, damaged };
    }

    /// Is on the disk what was written to it? What has been replaced since can't be said.
    fn wrong_on_disk(&self, found: &OnDisk) -> Option<&'static str> {
        let replica = self.replicas.get(&found.point.shard)?;
        if !replica.trust.exists() || replica.copy != found.copy {
            return None;
        }
        if found.counters != found.point.counters {
            return Some("the counters on its disk do not add up to its digest");
        }
        let known = replica.points.iter().chain([&replica.flushed_point]);
        let known = known.copied().find(|point| point.seq == found.point.seq)?;
        (known != found.point).then_some("its record on disk is not what was written")
    }

    /// This node's own copy was scrubbed: is it well, then those that differ from it are not.
    fn settle_dispute(&mut self, shard: ShardId, effects: &mut Vec<Effect>) {
        let Some(replica) = self.replicas.get_mut(&shard) else { return };
        let well = replica.trust.is_working();
        let Some(primary) = replica.primary_mut() else { return };
        for (store, own) in std::mem::take(&mut primary.disputed) {
            if well {
                self.condemn(store, own, effects);
            }
        }
    }

    pub(super) fn scrub_status(&self) -> ScrubStatus {
        self.scrubbing.status.clone()
    }
}

impl ScrubStatus {
    /// There has been one.
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

    /// This node says 1; the others, by number, say these.
    #[track_caller]
    fn check(others: &[u128], want: Verdict) {
        let votes = (2..).map(StoreId).zip(others.iter().map(|&counters| point(counters)));
        assert_eq!(judge(point(1), &votes.collect()), want);
    }

    fn stores<const N: usize>(ids: [u128; N]) -> Vec<StoreId> {
        ids.map(StoreId).to_vec()
    }

    #[test]
    fn the_fewer_are_wrong() {
        check(&[], Verdict::Equal);
        check(&[1, 1], Verdict::Equal);
        check(&[1, 2], Verdict::Theirs(stores([3])));
        check(&[2, 2], Verdict::Own);
        check(&[1, 2, 3, 1], Verdict::Theirs(stores([3, 4])));
    }

    #[test]
    fn as_many_on_both_sides_say_nothing() {
        check(&[2], Verdict::Open(stores([2])));
        check(&[2, 3], Verdict::Open(stores([2, 3])));
        check(&[1, 2, 2], Verdict::Open(stores([3, 4])));
    }
}
