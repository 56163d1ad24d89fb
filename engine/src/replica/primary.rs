//! What a primary knows: its epoch, the in-sync set as far as it is settled, and each follower.
//!
//! The in-sync set stands in etcd, and a compare-and-set whose answer was lost may still take
//! effect. So a primary counts *M*, the maximal set: the `isr` of the newest record of its epoch
//! that it has read, plus every addition it has proposed against that version. A member leaves M
//! only by reading a record with a higher version (DESIGN §6, rules 1 to 6).
//!
//! ```text
//!   propose +C ──▶ M = {A,B,C} ──▶ answer lost ──▶ M = {A,B,C} ──▶ read version 8 ──▶ M = isr of 8
//! ```
//!
//! Acknowledging with {A,B} after the lost answer would be wrong: the addition may have happened,
//! C may be promoted, and C lacks what only A and B hold.

use std::collections::{BTreeMap, BTreeSet};

use crate::config::ShardConfig;
use crate::entry::Position;
use crate::ids::{Boot, Conn, CopyNo, Epoch, Now, Seq, StoreId, Version};
use crate::message::DigestPoint;
use crate::node::audit::Votes;
use crate::node::standing::Progress;
use crate::planted::Planted;
use crate::replica::clock::ShardClock;

#[derive(Clone, Debug)]
pub struct Primary {
    pub epoch: Epoch,
    /// The first entry of this epoch. Once it is committed the primary serves.
    pub barrier: Seq,
    pub active: bool,
    /// The newest record of this epoch that was read, and its mod_revision.
    pub record: ShardConfig,
    pub mod_revision: u64,
    /// Everything proposed against `record` so far.
    pub proposals: Vec<Proposal>,
    /// No other proposal before this moment: one is under way, or one has just failed.
    pub propose_after: Now,
    pub followers: BTreeMap<StoreId, Follower>,
    /// Who is to be answered once the entry at this seq is applied: connection and message.
    pub waiting: BTreeMap<Seq, (Conn, u64)>,
    pub began: Now,
    /// Writes are refused and gateways told so.
    pub frozen: bool,
    pub progress: Progress,
    /// A learner that the commit waits for although nothing is proposed, and since when: one that is
    /// always a moment late would never be seen with all that is committed.
    pub joining: Option<(StoreId, Now)>,
    /// No learner is waited for before.
    pub join_after: Now,
    /// Ordering stopped at the coordinator's wish, until this moment.
    pub stepping_down: Option<Now>,
    /// What followers have told of their state, until it is judged.
    pub votes: Votes,
    /// Followers that differ from this node, and from what: its own copy is being scrubbed to know who is wrong.
    pub disputed: Vec<(StoreId, DigestPoint)>,
    /// What moves the shard's time.
    pub clock: ShardClock,
    /// The last entry that drops old idempotency records.
    pub expiry: Seq,
}

/// A change of the in-sync set, asked of etcd.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Proposal {
    pub id: u64,
    pub base: Version,
    pub config: ShardConfig,
    /// The answer has not come yet. Afterwards the record is read until its version has moved.
    pub pending: bool,
}

/// What the primary knows of one follower.
#[derive(Clone, Debug)]
pub struct Follower {
    /// Whose acknowledgements count: the process and the copy it shook hands with.
    pub boot: Boot,
    pub copy: CopyNo,
    /// The highest seq that this copy has acknowledged in this epoch.
    pub acked: Seq,
    /// It has acknowledged the slice that opened its feed: the copy is what this node believes.
    pub proven: bool,
    /// What is sent next follows this position. Up to where this primary's log reaches back in memory it is one of that
    /// log; below, it may be what the follower has told, to be compared with what is read from the disk.
    pub sent: Position,
    pub feed: Feed,
    /// It lacked what it had acknowledged: out of the in-sync set, and filled anew.
    pub short: bool,
    /// Where its log was last tried to be joined to this one.
    pub tried: Option<Seq>,
    /// Of the whole copy for which it had no room, while its feed is full.
    pub copy_bytes: u64,
}

#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Feed {
    /// No connection, or it has no copy yet.
    Cut,
    /// It refused for want of space, and is tried again with each heartbeat, or once there is room for the whole copy that
    /// it refused. What it acknowledges meanwhile was on its way.
    Full,
    /// Entries are sent as they come. `opening`: the next slice is sent even without entries, and
    /// ends the skipping.
    Streaming {
        opening: bool,
    },
    /// Older entries are read from the log on disk. `opening`: as above.
    FromLog {
        opening: bool,
    },
    /// It needs a whole copy.
    NeedsSnapshot,
    Snapshot {
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
            short: false,
            tried: None,
            copy_bytes: 0,
        }
    }

    /// It is connected and gets entries.
    pub fn is_fed(&self) -> bool {
        matches!(self.feed, Feed::Streaming { .. } | Feed::FromLog { .. })
    }
}

impl Primary {
    pub fn new(record: ShardConfig, mod_revision: u64, barrier: Seq, now: Now) -> Self {
        let mut primary = Self {
            epoch: record.epoch,
            barrier,
            active: false,
            record,
            mod_revision,
            proposals: Vec::new(),
            propose_after: now,
            followers: BTreeMap::new(),
            waiting: BTreeMap::new(),
            began: now,
            frozen: false,
            progress: Progress::new(now),
            joining: None,
            join_after: now,
            stepping_down: None,
            votes: Votes::new(),
            disputed: Vec::new(),
            clock: ShardClock::new(now),
            expiry: Seq(0),
        };
        primary.match_followers();
        primary
    }

    /// *M*: whose fsync every commit waits for.
    pub fn members(&self, planted: Option<Planted>) -> BTreeSet<StoreId> {
        let mut members: BTreeSet<_> = self.record.isr.iter().copied().collect();
        if Planted::ForgetUnsettledAddition.is_in(planted) {
            return members;
        }
        for proposal in &self.proposals {
            members.extend(&proposal.config.isr);
        }
        members.extend(self.joining.map(|(store, _)| store));
        if Planted::CountUnsettledRemoval.is_in(planted)
            && let Some(newest) = self.proposals.last()
        {
            members.retain(|member| newest.config.isr.contains(member));
        }
        members
    }

    /// Too few members are settled for a commit. An addition that is unsettled, or that the commit waits for only for a
    /// moment, makes no difference: until etcd has it, it can't be promoted, so what it holds protects nothing.
    pub fn is_below_floor(&self, min_in_sync: usize) -> bool {
        self.record.isr.len() < min_in_sync
    }

    /// The highest seq that is durable on all of M, if the record names enough members to commit at all. Below
    /// the barrier nothing is committed by this primary, whoever has acknowledged it.
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
        let mut seqs: Vec<_> = members.iter().map(acked).collect();
        seqs.sort();
        let needed =
            if Planted::CommitAtMajority.is_in(planted) { (seqs.len() - 1) / 2 } else { 0 };
        let seq = *seqs.get(needed)?;
        (seq >= self.barrier || Planted::CommitBelowBarrier.is_in(planted)).then_some(seq)
    }

    /// Reads a record of this epoch with a higher version: it settles all that was proposed
    /// against the older one, since their compare can no longer succeed.
    ///
    /// Returns the followers of whom nothing is known: those that are new, and all learners if a record
    /// was passed over. While a store is neither member nor learner it may delete its copy, and make
    /// another when it is named again, with its acknowledgements of the old one standing here or
    /// on their way. Only what is sent from now on proves what it has (simulator, seeds 1610 and 6715).
    pub fn read_record(
        &mut self,
        record: ShardConfig,
        mod_revision: u64,
        now: Now,
    ) -> Vec<StoreId> {
        assert!(record.epoch == self.epoch, "a record of another epoch is never adopted");
        assert!(record.version > self.record.version, "M shrinks only by a higher version");
        let passed_over = record.version.0 > self.record.version.0 + 1;
        let before: BTreeSet<_> = self.followers.keys().copied().collect();
        self.record = record;
        self.mod_revision = mod_revision;
        self.proposals.clear();
        self.joining = None;
        self.propose_after = now;
        self.match_followers();
        let mut unproven = Vec::new();
        for (&store, follower) in &mut self.followers {
            let may_have_changed = passed_over && !self.record.isr.contains(&store);
            if may_have_changed && follower.is_fed() {
                follower.feed = Feed::Cut;
            }
            if may_have_changed || !before.contains(&store) {
                follower.acked = Seq(0);
                unproven.push(store);
            }
        }
        unproven
    }

    /// Feeds exactly the members of M and the learners.
    pub fn match_followers(&mut self) {
        let mut wanted = self.members(None);
        wanted.extend(&self.record.learners);
        wanted.remove(&self.record.primary.store);
        self.followers.retain(|store, _| wanted.contains(store));
        for store in wanted {
            self.followers.entry(store).or_insert_with(Follower::new);
        }
    }

    /// A learner that may be added: its feed is proven, and its copy has acknowledged, in this epoch, all that is
    /// committed and the barrier. The commit alone would not do: below the barrier the primary
    /// does not know yet what its predecessors have committed.
    pub fn is_caught_up(&self, store: StoreId, commit: Seq, planted: Option<Planted>) -> bool {
        let mut needed = commit.max(self.barrier);
        if Planted::LearnerAtCommitHint.is_in(planted) {
            needed = commit;
        }
        let feeds = |feed: &Feed| matches!(feed, Feed::Streaming { opening: false });
        self.followers.get(&store).is_some_and(|follower| {
            let proven = follower.proven && feeds(&follower.feed);
            follower.acked >= needed && proven && !follower.short
        })
    }

    /// What followers may be told of this commit: until its barrier is committed a primary announces none.
    pub fn announced(&self, commit: Seq) -> Seq {
        if self.active { commit } else { Seq(0) }
    }

    /// A proposal is under way or its outcome unknown.
    pub fn is_unsettled(&self) -> bool {
        !self.proposals.is_empty()
    }

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
        let record = ShardConfig {
            epoch: Epoch(5),
            version: Version(7),
            primary: StoreBoot { store: A, boot: Boot(1) },
            isr: vec![A, B],
            learners: vec![C],
            ..ShardConfig::default()
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
        let config = primary.record.changed(add, remove, &[], 1);
        let base = primary.record.version;
        primary.proposals.push(Proposal { id: 1, base, config, pending: false });
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

    /// Between versions 7 and 9 the learner may have been none, and its copy deleted; between 7 and 8 there was no time.
    #[test]
    fn of_learners_nothing_is_known_once_a_record_was_passed_over() {
        let mut primary = primary();
        ack(&mut primary, B, 12);
        ack(&mut primary, C, 12);
        let next = |primary: &Primary, by| ShardConfig {
            version: Version(primary.record.version.0 + by),
            ..primary.record.clone()
        };
        let record = next(&primary, 1);
        assert_eq!(primary.read_record(record, 80, Now(1)), []);
        assert!(primary.is_caught_up(C, Seq(12), None));
        let record = next(&primary, 2);
        assert_eq!(primary.read_record(record, 90, Now(2)), [C]);
        assert!(!primary.is_caught_up(C, Seq(12), None));
        assert_eq!(primary.followers[&C].feed, Feed::Cut);
        check(&primary, 12, Some(12));
        // Gone and named again, with nothing passed over.
        let record = ShardConfig { learners: vec![], ..next(&primary, 1) };
        assert_eq!(primary.read_record(record, 91, Now(3)), []);
        let record = ShardConfig { learners: vec![C], ..next(&primary, 1) };
        assert_eq!(primary.read_record(record, 92, Now(4)), [C]);
    }

    /// Floor of two: A alone, or with one that is no member yet, commits nothing.
    #[test]
    fn an_addition_counts_for_the_floor_once_it_is_settled() {
        let mut primary = primary();
        let record = ShardConfig {
            version: Version(8),
            isr: vec![A],
            learners: vec![B, C],
            ..primary.record.clone()
        };
        primary.read_record(record, 80, Now(0));
        ack(&mut primary, B, 12);
        primary.joining = Some((B, Now(0)));
        check(&primary, 12, None);
        propose(&mut primary, &[B], &[]);
        check(&primary, 12, None);
        let next = primary.record.changed(&[B], &[], &[], 2);
        primary.read_record(next, 90, Now(0));
        check(&primary, 12, Some(12));
    }

    #[test]
    fn two_proposals_of_unknown_outcome_keep_all_their_additions() {
        let mut primary = primary();
        ack(&mut primary, B, 12);
        propose(&mut primary, &[C], &[]);
        propose(&mut primary, &[], &[]);
        check(&primary, 12, None);
        assert_eq!(primary.members(None), BTreeSet::from([A, B, C]));
    }

    #[test]
    fn a_higher_version_settles() {
        let mut primary = primary();
        propose(&mut primary, &[C], &[]);
        let read = primary.record.changed(&[], &[], &[], 2);
        primary.read_record(read, 80, Now(5));
        assert_eq!(primary.members(None), BTreeSet::from([A, B]));
        assert!(!primary.is_unsettled());
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
