//! The state of a primary: its epoch, the in-sync set as far as it is settled, and each follower.
//!
//! The in-sync set is in etcd, and a compare-and-set whose answer was lost may still take effect.
//! So a primary counts *M*, the maximal set: the `isr` of the newest record of its epoch that it
//! has read, plus every addition that it has proposed against that version. A member leaves M only
//! when the primary reads a record with a higher version.
//!
//! ```text
//!   propose +C ──▶ M = {A,B,C} ──▶ answer lost ──▶ M = {A,B,C} ──▶ read version 8 ──▶ M = isr of 8
//! ```
//!
//! A record that makes M smaller counts once it is in the own log, durably: until then M contains
//! those that left, too ([`Primary::leaving`]).
//!
//! Acknowledging with {A,B} after the lost answer would be wrong: the addition may have happened, C
//! may be promoted, and C lacks what only A and B hold.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

use crate::entry::Position;
use crate::ids::{Boot, Conn, CopyNo, Epoch, Now, Seq, StoreId, Version};
use crate::message::DigestPoint;
use crate::planted::Planted;
use crate::replica::clock::ShardClock;
use crate::replica::progress::CommitProgress;
use crate::shard_record::ShardRecord;

/// The digests that followers have reported, by seq.
pub type DigestVotes = BTreeMap<Seq, BTreeMap<StoreId, DigestPoint>>;

/// The state of a shard's primary.
#[derive(Clone, Debug)]
pub struct Primary {
    /// The epoch that it leads.
    pub epoch: Epoch,
    /// The first entry of this epoch. Once it is committed the primary serves.
    pub barrier: Seq,
    /// The barrier is committed: the primary serves.
    pub active: bool,
    /// The newest record of this epoch that was read.
    pub record: ShardRecord,
    /// The mod_revision of `record` in etcd.
    pub mod_revision: u64,
    /// Everything proposed against `record` so far.
    pub proposals: Vec<InSyncProposal>,
    /// The members that left M by a record that is not durable in the own log yet: they still
    /// count. After a crash a recovery of etcd may find an older record only, and name them as
    /// complete.
    pub leaving: BTreeSet<StoreId>,
    /// The group of the log that makes the last record durable; `None` once it is.
    pub recording: Option<u64>,
    /// No other proposal before this moment: one is under way, or one has just failed.
    pub propose_after: Now,
    /// The members of M other than this store, and the learners.
    pub followers: BTreeMap<StoreId, Follower>,
    /// The batches to answer once the entry at their seq is applied, in this order: connection and
    /// message.
    pub waiting: VecDeque<(Seq, (Conn, u64))>,
    /// The moment at which the epoch began here.
    pub began: Now,
    /// Writes are refused, and gateways are notified of that.
    pub frozen: bool,
    /// The progress of the commit.
    pub progress: CommitProgress,
    /// A learner that the commit waits for although nothing is proposed, and since when: a learner
    /// that is always a moment behind would never be seen with everything that is committed.
    pub joining: Option<(StoreId, Now)>,
    /// No learner is waited for before this moment.
    pub join_after: Now,
    /// Ordering stopped at the coordinator's request, until this moment.
    pub stepping_down: Option<Now>,
    /// The digests that followers have reported, until they are compared.
    pub votes: DigestVotes,
    /// Followers whose digest differs, and the digest of this node: it scrubs its own copy to
    /// determine which of the two is wrong.
    pub disputed: Vec<(StoreId, DigestPoint)>,
    /// The clock that moves the shard's time.
    pub clock: ShardClock,
    /// The last entry that drops old idempotency records.
    pub expiry: Seq,
}

/// A change of the in-sync set that was proposed to etcd.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct InSyncProposal {
    /// The number of the proposal, for its answer.
    pub id: u64,
    /// The version that the change was made from.
    pub base: Version,
    /// The record to be written.
    pub record: ShardRecord,
    /// The answer has not come yet. Afterwards the record is read until its version has changed.
    pub pending: bool,
}

/// The state of one follower, as its primary knows it.
#[derive(Clone, Debug)]
pub struct Follower {
    /// The boot whose acknowledgements count: the process that the connection was made to.
    pub boot: Boot,
    /// The copy whose acknowledgements count.
    pub copy: CopyNo,
    /// The highest seq that this copy has acknowledged in this epoch.
    pub acked: Seq,
    /// The follower has acknowledged the slice that opened its feed: its copy is the one that this
    /// node assumes.
    pub proven: bool,
    /// The position that the next entries follow. As far as this primary's log in memory reaches it
    /// is a position of that log; below, it may be one that the follower reported, to be compared
    /// with what is read from the disk.
    pub sent: Position,
    /// The state of its feed.
    pub feed: Feed,
    /// The follower lacked entries that it had acknowledged: it is out of the in-sync set and gets
    /// a snapshot.
    pub lost_acked_data: bool,
    /// The seq at which this node last tried to join the follower's log to its own.
    pub tried: Option<Seq>,
    /// The bytes of the snapshot for which it had no room, while its feed is full.
    pub copy_bytes: u64,
}

/// The state of a follower's feed: what the primary sends to it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Feed {
    /// No connection, or it has no copy yet.
    Cut,
    /// The follower refused for lack of space. It is tried again with each heartbeat, or once there
    /// is room for the snapshot that it refused. Acknowledgements that arrive meanwhile were in
    /// flight.
    Full,
    /// Entries are sent as they are ordered.
    Streaming {
        /// The next slice is sent even without entries, and ends the skipping.
        opening: bool,
    },
    /// Older entries are read from the log on disk.
    FromLog {
        /// As in [`Feed::Streaming`].
        opening: bool,
    },
    /// The follower needs a snapshot.
    NeedsSnapshot,
    /// A snapshot is being sent.
    Snapshot {
        /// The number of the transfer.
        transfer: u64,
    },
}

impl Follower {
    fn new() -> Self {
        Self {
            boot: Boot(0),
            copy: CopyNo(0),
            acked: Seq(0),
            proven: false,
            sent: Position::default(),
            feed: Feed::Cut,
            lost_acked_data: false,
            tried: None,
            copy_bytes: 0,
        }
    }

    /// Returns whether the follower is connected and gets entries.
    pub fn is_fed(&self) -> bool {
        matches!(self.feed, Feed::Streaming { .. } | Feed::FromLog { .. })
    }
}

impl Primary {
    /// Takes the batch that waits for this seq: its connection and message.
    pub fn take_waiting(&mut self, seq: Seq) -> Option<(Conn, u64)> {
        let at = self.waiting.binary_search_by_key(&seq, |&(waiting, _)| waiting).ok()?;
        self.waiting.remove(at).map(|(_, from)| from)
    }

    /// A primary that begins the epoch of `record`, with its barrier at this seq.
    pub fn new(record: ShardRecord, mod_revision: u64, barrier: Seq, now: Now) -> Self {
        let mut primary = Self {
            epoch: record.epoch,
            barrier,
            active: false,
            record,
            mod_revision,
            proposals: Vec::new(),
            leaving: BTreeSet::new(),
            recording: None,
            propose_after: now,
            followers: BTreeMap::new(),
            waiting: VecDeque::new(),
            began: now,
            frozen: false,
            progress: CommitProgress::new(now),
            joining: None,
            join_after: now,
            stepping_down: None,
            votes: DigestVotes::new(),
            disputed: Vec::new(),
            clock: ShardClock::new(now),
            expiry: Seq(0),
        };
        primary.match_followers();
        primary
    }

    /// *M*: the stores whose fsync every commit waits for, each once.
    pub fn members(&self, planted: Option<Planted>) -> Cow<'_, [StoreId]> {
        let settled =
            self.proposals.is_empty() && self.joining.is_none() && self.leaving.is_empty();
        if settled || Planted::ForgetUnsettledAddition.is_in(planted) {
            return Cow::Borrowed(&self.record.isr);
        }
        let mut members: BTreeSet<_> = self.record.isr.iter().copied().collect();
        for proposal in &self.proposals {
            members.extend(&proposal.record.isr);
        }
        members.extend(self.joining.map(|(store, _)| store));
        members.extend(&self.leaving);
        if Planted::CountUnsettledRemoval.is_in(planted)
            && let Some(newest) = self.proposals.last()
        {
            members.retain(|member| newest.record.isr.contains(member));
        }
        members.into_iter().collect()
    }

    /// Returns whether too few members are settled for a commit. An addition that is unsettled, or
    /// that the commit waits for only for a moment, does not count: until etcd has it, it can't be
    /// promoted, so its copy protects nothing.
    pub fn is_below_floor(&self, min_in_sync: usize) -> bool {
        self.record.isr.len() < min_in_sync
    }

    /// The highest seq that is durable on all of M, if the record names enough members to commit at
    /// all. Below the barrier nothing is committed by this primary, whichever members have
    /// acknowledged it.
    pub fn committable(
        &self,
        me: StoreId,
        durable: Seq,
        min_in_sync: usize,
        planted: Option<Planted>,
    ) -> Option<Seq> {
        if self.is_below_floor(min_in_sync) {
            return None;
        }
        let members = self.members(planted);
        let acked = |store: &StoreId| match self.followers.get(store) {
            _ if *store == me => durable,
            Some(follower) => follower.acked,
            None => Seq(0),
        };
        let mut seq = members.iter().map(acked).min()?;
        if Planted::CommitAtMajority.is_in(planted) {
            let mut seqs: Vec<_> = members.iter().map(acked).collect();
            seqs.sort();
            seq = seqs[(seqs.len() - 1) / 2];
        }
        (seq >= self.barrier || Planted::CommitBelowBarrier.is_in(planted)).then_some(seq)
    }

    /// Adopts a record of this epoch with a higher version: it settles everything that was proposed
    /// against the older one, since the compare of those proposals can no longer succeed.
    ///
    /// Returns the followers of which nothing is known: new ones, and all learners if a record was
    /// passed over. While a store is neither member nor learner it may delete its copy, and make
    /// another one when it is named again, while acknowledgements of the old copy are still counted
    /// here or in flight. Only acknowledgements of what is sent from now on prove what it has.
    pub fn adopt_record(
        &mut self,
        record: ShardRecord,
        mod_revision: u64,
        now: Now,
    ) -> Vec<StoreId> {
        assert!(record.epoch == self.epoch, "a record of another epoch is never adopted");
        assert!(record.version > self.record.version, "M shrinks only by a higher version");
        let passed_over = record.version.0 > self.record.version.0 + 1;
        // A store that has left and still counts may have deleted its copy, like one that was not
        // named at all.
        let before: BTreeSet<_> =
            self.followers.keys().copied().filter(|&store| self.is_named(store)).collect();
        self.leaving = self.members(None).iter().copied().collect();
        self.leaving.retain(|member| !record.isr.contains(member));
        self.record = record;
        self.mod_revision = mod_revision;
        self.proposals.clear();
        self.joining = None;
        self.propose_after = now;
        self.match_followers();
        let mut unproven = Vec::new();
        for (&store, follower) in &mut self.followers {
            let returns = !before.contains(&store);
            let may_have_changed = passed_over && !self.record.isr.contains(&store);
            if (may_have_changed || returns) && follower.is_fed() {
                follower.feed = Feed::Cut;
            }
            if may_have_changed || returns {
                follower.acked = Seq(0);
                unproven.push(store);
            }
        }
        unproven
    }

    /// Returns whether the record or a proposal names the store as a member or a learner.
    fn is_named(&self, store: StoreId) -> bool {
        let proposed = self.proposals.iter().map(|proposal| &proposal.record);
        let mut records = proposed.chain([&self.record]);
        records.any(|record| record.isr.contains(&store) || record.learners.contains(&store))
            || self.joining.is_some_and(|(joining, _)| joining == store)
    }

    /// Notes that the newest record is durable in the own log: what left the in-sync set by it no
    /// longer counts.
    pub fn on_recorded(&mut self) {
        self.recording = None;
        self.leaving.clear();
        self.match_followers();
    }

    /// Feeds exactly the members of M and the learners.
    pub fn match_followers(&mut self) {
        let mut wanted: BTreeSet<_> = self.members(None).iter().copied().collect();
        wanted.extend(&self.record.learners);
        wanted.remove(&self.record.primary.store);
        self.followers.retain(|store, _| wanted.contains(store));
        for store in wanted {
            self.followers.entry(store).or_insert_with(Follower::new);
        }
    }

    /// Returns whether a learner may be added: its feed is proven, and its copy has acknowledged,
    /// in this epoch, everything that is committed and the barrier. The commit alone would not be
    /// enough: below the barrier the primary does not know yet what its predecessors have
    /// committed.
    pub fn is_caught_up(&self, store: StoreId, commit: Seq, planted: Option<Planted>) -> bool {
        let mut needed = commit.max(self.barrier);
        if Planted::LearnerAtCommitHint.is_in(planted) {
            needed = commit;
        }
        let feeds = |feed: &Feed| matches!(feed, Feed::Streaming { opening: false });
        self.followers.get(&store).is_some_and(|follower| {
            let proven = follower.proven && feeds(&follower.feed);
            follower.acked >= needed && proven && !follower.lost_acked_data
        })
    }

    /// The commit to announce to followers: none until the barrier is committed.
    pub fn announced(&self, commit: Seq) -> Seq {
        if self.active { commit } else { Seq(0) }
    }

    /// Returns whether a proposal is in flight or its outcome is unknown.
    pub fn is_unsettled(&self) -> bool {
        !self.proposals.is_empty()
    }

    /// Returns whether a review has nothing to decide, as long as all members are well and nothing
    /// waits for its commit.
    pub fn is_at_rest(&self) -> bool {
        let streams = |follower: &Follower| {
            matches!(follower.feed, Feed::Streaming { .. }) && !follower.lost_acked_data
        };
        self.active
            && !self.frozen
            && self.stepping_down.is_none()
            && self.joining.is_none()
            && self.progress.blocked.is_none()
            && !self.is_unsettled()
            && self.leaving.is_empty()
            && self.record.learners.is_empty()
            && self.record.tainted.is_empty()
            && self.followers.values().all(streams)
    }

    /// Returns whether a proposal is in flight.
    pub fn is_pending(&self) -> bool {
        self.proposals.iter().any(|proposal| proposal.pending)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::StoreBoot;

    const A: StoreId = StoreId(1);
    const B: StoreId = StoreId(2);
    const C: StoreId = StoreId(3);

    /// A leads epoch 5 with {A, B} in sync and C learning; its barrier is at 10.
    fn primary() -> Primary {
        let record = ShardRecord {
            epoch: Epoch(5),
            version: Version(7),
            primary: StoreBoot { store: A, boot: Boot(1) },
            isr: vec![A, B],
            learners: vec![C],
            ..ShardRecord::default()
        };
        Primary::new(record, 70, Seq(10), Now(0))
    }

    fn ack(primary: &mut Primary, store: StoreId, seq: u64) {
        let follower = primary.followers.get_mut(&store).unwrap();
        follower.acked = Seq(seq);
        follower.proven = true;
        follower.feed = Feed::Streaming { opening: false };
    }

    #[track_caller]
    fn check(primary: &Primary, durable: u64, want: Option<u64>) {
        assert_eq!(primary.committable(A, Seq(durable), 2, None), want.map(Seq));
    }

    #[test]
    fn commits_what_every_member_has() {
        let mut primary = primary();
        check(&primary, 12, None);
        ack(&mut primary, B, 11);
        check(&primary, 12, Some(11));
        check(&primary, 10, Some(10));
        check(&primary, 9, None);
    }

    #[test]
    fn nothing_is_committed_below_the_barrier() {
        let mut primary = primary();
        ack(&mut primary, B, 9);
        check(&primary, 12, None);
    }

    fn propose(primary: &mut Primary, add: &[StoreId], remove: &[StoreId]) {
        let record = primary.record.changed(add, remove, &[], 1);
        let base = primary.record.version;
        primary.proposals.push(InSyncProposal { id: 1, base, record, pending: false });
        primary.match_followers();
    }

    #[test]
    fn an_unsettled_addition_counts_and_an_unsettled_removal_still_does() {
        let mut primary = primary();
        ack(&mut primary, B, 12);
        ack(&mut primary, C, 11);
        propose(&mut primary, &[C], &[B]);
        check(&primary, 12, Some(11));
        ack(&mut primary, B, 10);
        check(&primary, 12, Some(10));
    }

    /// Between versions 7 and 9 the learner may have been removed, and its copy deleted; between 7
    /// and 8 there was no time for that.
    #[test]
    fn of_learners_nothing_is_known_once_a_record_was_passed_over() {
        let mut primary = primary();
        ack(&mut primary, B, 12);
        ack(&mut primary, C, 12);
        let next = |primary: &Primary, by| ShardRecord {
            version: Version(primary.record.version.0 + by),
            ..primary.record.clone()
        };
        let record = next(&primary, 1);
        assert_eq!(primary.adopt_record(record, 80, Now(1)), []);
        assert!(primary.is_caught_up(C, Seq(12), None));
        let record = next(&primary, 2);
        assert_eq!(primary.adopt_record(record, 90, Now(2)), [C]);
        assert!(!primary.is_caught_up(C, Seq(12), None));
        assert_eq!(primary.followers[&C].feed, Feed::Cut);
        check(&primary, 12, Some(12));
        // The learner is removed and named again, with nothing passed over.
        let record = ShardRecord { learners: vec![], ..next(&primary, 1) };
        assert_eq!(primary.adopt_record(record, 91, Now(3)), []);
        let record = ShardRecord { learners: vec![C], ..next(&primary, 1) };
        assert_eq!(primary.adopt_record(record, 92, Now(4)), [C]);
    }

    /// With `min_in_sync` of two, A alone, or with a store that is not yet a member, commits
    /// nothing.
    #[test]
    fn an_addition_counts_for_the_floor_once_it_is_settled() {
        let mut primary = primary();
        let record = ShardRecord {
            version: Version(8),
            isr: vec![A],
            learners: vec![B, C],
            ..primary.record.clone()
        };
        primary.adopt_record(record, 80, Now(0));
        ack(&mut primary, B, 12);
        primary.joining = Some((B, Now(0)));
        check(&primary, 12, None);
        propose(&mut primary, &[B], &[]);
        check(&primary, 12, None);
        let next = primary.record.changed(&[B], &[], &[], 2);
        primary.adopt_record(next, 90, Now(0));
        check(&primary, 12, Some(12));
    }

    #[test]
    fn two_proposals_of_unknown_outcome_keep_all_their_additions() {
        let mut primary = primary();
        ack(&mut primary, B, 12);
        propose(&mut primary, &[C], &[]);
        propose(&mut primary, &[], &[]);
        check(&primary, 12, None);
        assert_eq!(primary.members(None)[..], [A, B, C]);
    }

    #[test]
    fn a_higher_version_settles() {
        let mut primary = primary();
        propose(&mut primary, &[C], &[]);
        let read = primary.record.changed(&[], &[], &[], 2);
        primary.adopt_record(read, 80, Now(5));
        assert!(!primary.is_unsettled());
        // The own log has to have it, too.
        assert_eq!(primary.members(None)[..], [A, B, C]);
        primary.on_recorded();
        assert_eq!(primary.members(None)[..], [A, B]);
    }

    #[test]
    fn a_learner_is_caught_up_at_the_barrier_not_at_an_older_commit() {
        let mut primary = primary();
        ack(&mut primary, C, 9);
        assert!(!primary.is_caught_up(C, Seq(3), None));
        ack(&mut primary, C, 10);
        assert!(primary.is_caught_up(C, Seq(3), None));
        assert!(!primary.is_caught_up(C, Seq(11), None));
    }
}
