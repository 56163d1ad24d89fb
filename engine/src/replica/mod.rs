//! One replica of one shard: its copy, its promise and its role.
//!
//! ```text
//!   a record names this process as primary      a higher epoch, or another primary
//!   follower ────────────────────────▶ primary ────────────────────────▶ follower
//! ```
//!
//! A follower (member of the in-sync set or learner alike) obeys the primary of the highest epoch
//! that it knows: [`follower`]. A primary orders entries, counts acknowledgements and changes the
//! in-sync set: [`primary`]. [`reconcile`] finds the position at which two logs diverge.
//!
//! Invariants:
//!   - `promised` never goes down, not even when the copy is deleted;
//!   - `applied ≤ commit`, and applied entries are fsynced here;
//!   - nothing at or below `applied` is ever truncated;
//!   - a process begins as primary at most once per epoch.

pub mod clock;
pub mod follower;
pub mod group_commit;
pub mod log;
pub mod primary;
pub mod progress;
pub mod reconcile;
pub mod recovered;
pub mod trust;
pub mod view;

use std::collections::VecDeque;

use crate::entry::{Body, Entry, Position};
use crate::ids::{CopyNo, Epoch, Seq, ShardId, Slots, StoreId};
use crate::message::DigestPoint;
use crate::node::settings::{NodeSizes, Settings};
use crate::planted::Planted;
use crate::shard::apply;
use crate::shard::state::ShardState;
use crate::shard_record::ShardRecord;
use crate::store::log::LogRecord;
use group_commit::ReplicaTurn;
use log::{LogBytes, ReplicaLog};
use primary::Primary;
use recovered::RecoveredReplica;
use trust::Trust;
use view::ReplicaView;

/// One store's part in one shard. It exists, with its promise, for as long as the store does; the
/// copy may be deleted and made again.
#[derive(Clone, Debug)]
pub struct Replica {
    /// The shard.
    pub shard: ShardId,
    /// The shard's slots.
    pub slots: Slots,
    /// The number of the present copy, or of the last one.
    pub copy: CopyNo,
    /// The quality of the copy, and whether there is one.
    pub trust: Trust,
    /// The highest epoch that the store has promised: lower ones are refused.
    pub promised: Epoch,
    /// The highest epoch that this process has begun as primary.
    pub begun: Epoch,
    /// The newest record of the shard that the store has acted on, as its log has it.
    pub acted_on: Option<Box<ShardRecord>>,
    /// The part of the log that is in memory.
    pub log: ReplicaLog,
    /// The size of the log in the sum of all logs of the node.
    pub counted: LogBytes,
    /// The applied state.
    pub state: ShardState,
    /// The highest seq known to be committed.
    pub commit: Seq,
    /// The last seq that messages of the promised epoch have shown to be in the primary's log.
    pub matched: Seq,
    /// The last position that is applied and in the state on disk.
    pub flushed: Position,
    /// The state on disk has a record of this copy, so that there is a snapshot to send.
    pub recorded: bool,
    /// The digest at `flushed`.
    pub flushed_point: DigestPoint,
    /// Digests at every [`NodeSizes::digest_every`]th seq and at barriers, newest last.
    pub points: VecDeque<DigestPoint>,
    /// The first read of etcd that may decide about deleting this copy: it began after everything
    /// that was accepted from a primary.
    pub removal_read: Option<u64>,
    /// The right child of a split that is applied here, until it is in the state on disk.
    pub child: Option<Box<PendingChild>>,
    /// The role: follower, or primary of the shard.
    pub role: ReplicaRole,
}

/// The right child of a split, of which there is no copy yet.
#[derive(Clone, Debug)]
pub struct PendingChild {
    /// The number of its copy.
    pub copy: CopyNo,
    /// The state that it begins with.
    pub state: ShardState,
    /// The flush that writes its record, once it has begun.
    pub flush: Option<u64>,
    /// The copy of the parent was good when it was divided.
    pub is_good: bool,
}

/// The role of a replica.
#[derive(Clone, Debug)]
pub enum ReplicaRole {
    /// The replica obeys the primary of the epoch that it has promised.
    Follower,
    /// The replica leads the shard.
    Primary(Box<Primary>),
}

impl Replica {
    /// A replica without a copy.
    pub fn empty(shard: ShardId, slots: Slots) -> Self {
        Self {
            shard,
            slots,
            copy: CopyNo(0),
            trust: Trust::Absent { clean: true },
            promised: Epoch(0),
            begun: Epoch(0),
            acted_on: None,
            log: ReplicaLog::from(Position::default()),
            counted: LogBytes::default(),
            state: ShardState { slots, ..ShardState::default() },
            commit: Seq(0),
            matched: Seq(0),
            flushed: Position::default(),
            recorded: false,
            flushed_point: DigestPoint { shard, ..DigestPoint::default() },
            points: VecDeque::new(),
            removal_read: None,
            child: None,
            role: ReplicaRole::Follower,
        }
    }

    /// A replica as recovery found it. All of it was rewritten and fsynced by then.
    pub fn recover(found: RecoveredReplica, planted: Option<Planted>) -> Self {
        let mut replica = Self::empty(found.shard, found.slots);
        replica.copy = found.copy;
        replica.acted_on = found.acted_on;
        // Recovery derives a promise that was not written from the epoch of the last entry. The bug
        // is to keep promises in memory only, so it removes that too.
        if !Planted::SkipPromiseFsync.is_in(planted) {
            replica.promised = found.promised;
        }
        replica.trust = Trust::Absent { clean: found.copy == CopyNo(0) };
        let Some(content) = found.content else { return replica };
        replica.trust = match content.suspect {
            true => Trust::Wrong("damage found at start"),
            false => Trust::Good,
        };
        replica.begin_content(content.state);
        for entry in content.entries {
            replica.hold(entry);
        }
        replica.log.on_durable(replica.log.last().seq);
        replica
    }

    fn begin_content(&mut self, state: ShardState) {
        self.log = ReplicaLog::from(state.applied);
        self.commit = state.applied.seq;
        self.flushed = state.applied;
        self.recorded = state.applied.seq > Seq(0);
        self.matched = Seq(0);
        self.points.clear();
        self.state = state;
        self.flushed_point = self.digest();
    }

    /// Adds an entry to the log in memory. One that a newer build wrote stops the shard.
    fn hold(&mut self, entry: Entry) {
        let decoded = match apply::decode(&entry) {
            Ok(decoded) => decoded,
            Err(unknown) => {
                self.trust.mark_unreadable(unknown.0);
                apply::Decoded::NoOps
            }
        };
        self.log.append(entry, decoded);
    }

    /// Writes an entry to the log.
    pub fn append(&mut self, turn: &mut ReplicaTurn<'_>, entry: Entry) {
        turn.write(LogRecord::Append { shard: self.shard, entry: entry.clone() });
        self.hold(entry);
    }

    fn truncate(&mut self, turn: &mut ReplicaTurn<'_>, after: Seq) {
        assert!(after >= self.state.applied.seq, "applied entries are never truncated");
        turn.write(LogRecord::Truncate { shard: self.shard, after });
        self.log.truncate(after);
        self.matched = self.matched.min(after);
        // After an accepted loss, committed entries are cut. What comes in their place is committed
        // by its own primary.
        self.commit = self.commit.min(after);
    }

    /// Promises to obey no epoch below this one from now on. Messages that depend on it wait for
    /// its fsync: acknowledgements are sent per group, and this record comes before them in it.
    pub fn promise(&mut self, turn: &mut ReplicaTurn<'_>, epoch: Epoch) {
        assert!(epoch > self.promised, "promises only rise");
        self.promised = epoch;
        self.matched = Seq(0);
        self.role = ReplicaRole::Follower;
        if !turn.planted(Planted::SkipPromiseFsync) {
            turn.write(LogRecord::Promise { shard: self.shard, epoch });
        }
        if turn.planted(Planted::TruncateToCommitHint) && self.log.last().seq > self.commit {
            self.truncate(turn, self.commit.max(self.state.applied.seq));
        }
    }

    /// Makes an empty copy. `fit`: the shard is new, so an empty copy is complete.
    pub fn create(&mut self, turn: &mut ReplicaTurn<'_>, slots: Slots, fit: bool) {
        let clean = self.trust == Trust::Absent { clean: true };
        assert!(clean, "a copy is made only where there is no copy and no row of a former one");
        self.slots = slots;
        self.begin_copy(turn, ShardState { slots, ..ShardState::default() });
        self.trust = if fit { Trust::Good } else { Trust::Filling };
    }

    /// Continues with an installed snapshot in place of the old copy.
    pub fn install(&mut self, turn: &mut ReplicaTurn<'_>, state: ShardState) {
        self.slots = state.slots;
        self.begin_copy(turn, state);
    }

    /// Begins as the right child of a split. Its state, as of the split, is on the disk.
    pub fn begin_child(&mut self, turn: &mut ReplicaTurn<'_>, state: ShardState, is_good: bool) {
        self.begin_copy(turn, state);
        if !is_good {
            self.trust = Trust::Filling;
        }
    }

    /// The first entry that is not applied and splits the shard at this slot.
    pub fn unapplied_split(&self, at: u16) -> Option<Seq> {
        let mut seq = self.state.applied.seq.next();
        while let Some(held) = self.log.get(seq) {
            if held.entry.body == (Body::Split { at }) {
                return Some(seq);
            }
            seq = seq.next();
        }
        None
    }

    /// Returns whether the store has rows of these slots that belong to this replica: of a copy, of
    /// one that is being removed, or of a child that has no copy yet.
    pub fn occupies(&self, slots: Slots) -> bool {
        let overlaps = |own: Slots| own.lo <= slots.hi && slots.lo <= own.hi;
        let has_rows = self.trust != Trust::Absent { clean: true };
        has_rows && overlaps(self.slots)
            || self.child.as_ref().is_some_and(|child| overlaps(child.state.slots))
    }

    /// Notes in the log that the store acts on this record of etcd. A store that acts on a record
    /// that its log may forget lets a recovery of etcd take an older one for the newest.
    pub fn act_on(&mut self, turn: &mut ReplicaTurn<'_>, record: &ShardRecord) {
        let known = self.acted_on.as_ref().map(|known| known.order());
        if known.is_some_and(|known| known >= record.order()) {
            return;
        }
        let record = Box::new(record.clone());
        if !turn.planted(Planted::RecordNotKept) {
            turn.write(LogRecord::ActedOn(record.clone()));
        }
        self.acted_on = Some(record);
    }

    fn begin_copy(&mut self, turn: &mut ReplicaTurn<'_>, state: ShardState) {
        self.copy = CopyNo(self.copy.0 + 1);
        self.trust = Trust::Good;
        self.removal_read = None;
        turn.write(LogRecord::Copy {
            shard: self.shard,
            slots: self.slots,
            copy: self.copy,
            base: state.applied,
        });
        self.begin_content(state);
    }

    /// Marks the copy as wrong: until it is replaced it accepts and sends nothing more, also after
    /// a restart.
    pub fn stop(&mut self, turn: &mut ReplicaTurn<'_>, why: &'static str) {
        turn.write(LogRecord::Suspect { shard: self.shard, copy: self.copy });
        self.trust.stop(why);
    }

    /// Deletes the copy. Its number and the promise stay.
    pub fn drop_copy(&mut self, turn: &mut ReplicaTurn<'_>) {
        turn.write(LogRecord::Drop { shard: self.shard, copy: self.copy });
        self.trust = Trust::Absent { clean: false };
        if turn.planted(Planted::DropForgetsPromise) {
            self.promised = Epoch(0);
        }
        self.begin_content(ShardState { slots: self.slots, ..ShardState::default() });
        self.role = ReplicaRole::Follower;
    }

    /// The state of the primary, if this replica leads.
    pub fn primary(&self) -> Option<&Primary> {
        match &self.role {
            ReplicaRole::Primary(primary) => Some(primary),
            ReplicaRole::Follower => None,
        }
    }

    /// The state of the primary, to be changed, if this replica leads.
    pub fn primary_mut(&mut self) -> Option<&mut Primary> {
        match &mut self.role {
            ReplicaRole::Primary(primary) => Some(primary),
            ReplicaRole::Follower => None,
        }
    }

    /// The seq up to which this primary may commit, if there is one.
    pub fn committable(&self, me: StoreId, settings: &Settings) -> Option<Seq> {
        let planted = settings.planted;
        let durable = match Planted::CountOwnUnsynced.is_in(planted) {
            true => self.log.last().seq,
            false => self.log.durable(),
        };
        self.primary()?.committable(me, durable, settings.min_in_sync, planted)
    }

    /// Returns whether the commit would move or the epoch become active now, or an entry can be
    /// applied.
    pub fn advances(&self, me: StoreId, settings: &Settings) -> bool {
        let begins = || self.primary().is_some_and(|primary| !primary.active);
        let committable = self.committable(me, settings);
        committable.is_some_and(|seq| seq > self.commit || begins())
            || self.next_to_apply().is_some()
    }

    /// The next entry to apply, if it is committed and fsynced here.
    pub fn next_to_apply(&self) -> Option<Seq> {
        let next = self.state.applied.seq.next();
        let ready = next <= self.commit && next <= self.log.durable();
        (self.trust.is_working() && ready).then_some(next)
    }

    /// Notes that the log is fsynced up to `seq`.
    pub fn on_durable(&mut self, seq: Seq) {
        self.log.on_durable(seq);
        // Everything that earlier epochs committed is below the barrier of this one, which is its
        // first entry; commits of this epoch wait for every member. The commit of the barrier may
        // never arrive here, if the primary dies before it is announced.
        let holds_barrier = self.log.epoch_at(self.log.durable()) == Some(self.promised);
        if holds_barrier && self.primary().is_none() {
            self.trust.mark_filled();
        }
    }

    /// Notes that the entry at `seq` has been applied.
    pub fn on_applied(&mut self, seq: Seq, sizes: &NodeSizes) {
        self.log.on_applied(seq);
        let is_barrier = |body: &Body| matches!(body, Body::Barrier);
        let barrier = self.log.get(seq).is_some_and(|held| is_barrier(&held.entry.body));
        if barrier {
            self.trust.mark_filled();
        }
        if barrier || seq.0.is_multiple_of(sizes.digest_every) {
            if self.points.len() >= sizes.points_max {
                self.points.pop_front();
            }
            self.points.push_back(self.digest());
        }
    }

    /// The bytes of memory that the log takes.
    pub fn log_bytes(&self) -> LogBytes {
        let applies = self.trust.is_working();
        self.log.bytes(applies.then_some(self.commit))
    }

    /// The digest of the state now.
    pub fn digest(&self) -> DigestPoint {
        self.state.digest()
    }

    /// A view of the replica, for the status page and the simulator's checkers.
    pub fn view(&self) -> ReplicaView<'_> {
        ReplicaView {
            shard: self.shard,
            copy: self.copy,
            exists: self.trust.exists(),
            promised: self.promised,
            last: self.log.last(),
            durable: self.log.durable(),
            commit: self.commit,
            log: &self.log,
            state: &self.state,
            unfit: self.trust.is_unfit(),
            stopped: self.trust.stopped(),
            primary: self.primary(),
        }
    }

    /// Asserts what must be true at the end of every event.
    pub fn check_invariants(&self) {
        let applied = self.state.applied.seq;
        assert!(applied <= self.commit, "applied is committed");
        assert!(self.commit <= self.log.last().seq, "committed entries are in the log");
        assert!(applied <= self.log.durable(), "applied is fsynced here");
        assert!(self.log.base().seq <= applied, "entries that are not applied are in memory");
        assert!(self.log.durable() <= self.log.last().seq, "durable entries are written");
        if let Some(primary) = self.primary() {
            assert!(primary.epoch == self.promised, "a primary leads in the epoch it promised");
        }
    }
}
