//! One replica of one shard: its copy, its promise and its role.
//!
//! ```text
//!            Config names this process            a higher epoch, or another primary
//!   follower ────────────────────────▶ primary ────────────────────────────────────▶ follower
//! ```
//!
//! A follower (member of the in-sync set or learner alike) obeys the primary of the highest epoch
//! it has heard of: [`backup`]. A primary orders entries, counts acknowledgements and changes the
//! in-sync set: [`primary`]. Where two logs part, [`reconcile`] finds it.
//!
//! Invariants:
//!   - `promised` never goes down, not even when the copy goes;
//!   - `applied ≤ commit`, and applied entries are fsynced here;
//!   - nothing at or below `applied` is ever truncated;
//!   - a process begins as primary at most once per epoch.

pub mod backup;
pub mod clock;
pub mod log;
pub mod primary;
pub mod reconcile;
pub mod trust;

use std::collections::VecDeque;

use crate::apply::{self, ShardState};
use crate::entry::{Body, Entry, Position};
use crate::ids::{CopyNo, Epoch, Seq, ShardId, Slots};
use crate::message::DigestPoint;
use crate::node::turn::Turn;
use crate::node::{RecoveredReplica, ReplicaView, Sizes};
use crate::planted::Planted;
use crate::store::log::Record;
use log::{LogBytes, ReplicaLog};
use primary::Primary;
use trust::Trust;

/// One store's part in one shard. It exists, with its promise, for as long as the store does; the
/// copy may come and go.
#[derive(Clone, Debug)]
pub struct Replica {
    pub shard: ShardId,
    pub slots: Slots,
    /// The number of the present copy, or of the last one.
    pub copy: CopyNo,
    /// Whether there is a copy, and how good it is.
    pub trust: Trust,
    pub promised: Epoch,
    /// The highest epoch that this process has begun as primary.
    pub begun: Epoch,
    pub log: ReplicaLog,
    pub state: ShardState,
    /// The highest seq known to be committed.
    pub commit: Seq,
    /// The last seq that messages of the promised epoch have shown to be in the primary's log.
    pub matched: Seq,
    /// Applied and in the state on disk.
    pub flushed: Position,
    /// The state on disk has a record of this copy, so that there is something to send.
    pub recorded: bool,
    /// What `flushed` amounts to.
    pub flushed_point: DigestPoint,
    /// Digests at every [`Sizes::digest_every`]th seq and at barriers, newest last.
    pub points: VecDeque<DigestPoint>,
    /// The first read of etcd that asks whether this copy is to go, and began after all that was taken from a primary.
    pub leaving: Option<u64>,
    pub role: Role,
}

#[derive(Clone, Debug)]
pub enum Role {
    Follower,
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
            log: ReplicaLog::from(Position::default()),
            state: ShardState { slots, ..ShardState::default() },
            commit: Seq(0),
            matched: Seq(0),
            flushed: Position::default(),
            recorded: false,
            flushed_point: DigestPoint { shard, ..DigestPoint::default() },
            points: VecDeque::new(),
            leaving: None,
            role: Role::Follower,
        }
    }

    /// What recovery found. All of it was rewritten and fsynced by then.
    pub fn recover(found: RecoveredReplica, planted: Option<Planted>) -> Self {
        let mut replica = Self::empty(found.shard, found.slots);
        replica.copy = found.copy;
        // Recovery makes up for a promise that was not written by the epoch of the last entry. The bug is to
        // keep promises in memory only, so it takes that away too.
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

    /// Takes an entry into memory. One that a newer build wrote stops the shard.
    fn hold(&mut self, entry: Entry) {
        let decoded = match apply::decode(&entry) {
            Ok(decoded) => decoded,
            Err(unknown) => {
                self.trust.not_understood(unknown.0);
                apply::Decoded::NoOps
            }
        };
        self.log.append(entry, decoded);
    }

    /// Writes an entry to the log.
    pub fn append(&mut self, turn: &mut Turn<'_>, entry: Entry) {
        turn.write(Record::Append { shard: self.shard, entry: entry.clone() });
        self.hold(entry);
    }

    fn truncate(&mut self, turn: &mut Turn<'_>, after: Seq) {
        assert!(after >= self.state.applied.seq, "applied entries are never truncated");
        turn.write(Record::Truncate { shard: self.shard, after });
        self.log.truncate(after);
        self.matched = self.matched.min(after);
    }

    /// Obeys no epoch below this one from now on. What follows waits for the fsync that holds it:
    /// acknowledgements speak of a group, and this record comes before them in it.
    pub fn promise(&mut self, turn: &mut Turn<'_>, epoch: Epoch) {
        assert!(epoch > self.promised, "promises only rise");
        self.promised = epoch;
        self.matched = Seq(0);
        self.role = Role::Follower;
        if !turn.planted(Planted::SkipPromiseFsync) {
            turn.write(Record::Promise { shard: self.shard, epoch });
        }
        if turn.planted(Planted::TruncateToCommitHint) && self.log.last().seq > self.commit {
            self.truncate(turn, self.commit.max(self.state.applied.seq));
        }
    }

    /// Makes an empty copy. `fit`: the shard is new, so empty is all there is to hold.
    pub fn create(&mut self, turn: &mut Turn<'_>, slots: Slots, fit: bool) {
        let clean = self.trust == Trust::Absent { clean: true };
        assert!(clean, "a copy is made where there is none, and nothing of a former one");
        self.slots = slots;
        self.begin_copy(turn, ShardState { slots, ..ShardState::default() });
        self.trust = if fit { Trust::Good } else { Trust::Filling };
    }

    /// Goes on with an installed snapshot in place of what was here.
    pub fn install(&mut self, turn: &mut Turn<'_>, state: ShardState) {
        self.begin_copy(turn, state);
    }

    fn begin_copy(&mut self, turn: &mut Turn<'_>, state: ShardState) {
        self.copy = CopyNo(self.copy.0 + 1);
        self.trust = Trust::Good;
        self.leaving = None;
        turn.write(Record::Copy {
            shard: self.shard,
            slots: self.slots,
            copy: self.copy,
            base: state.applied,
        });
        self.begin_content(state);
    }

    /// The copy is wrong: it takes and tells nothing more, also not after a restart, until it is made anew.
    pub fn stop(&mut self, turn: &mut Turn<'_>, why: &'static str) {
        turn.write(Record::Suspect { shard: self.shard, copy: self.copy });
        self.trust.stop(why);
    }

    /// Deletes the copy. Its number and the promise stay.
    pub fn drop_copy(&mut self, turn: &mut Turn<'_>) {
        turn.write(Record::Drop { shard: self.shard, copy: self.copy });
        self.trust = Trust::Absent { clean: false };
        if turn.planted(Planted::DropForgetsPromise) {
            self.promised = Epoch(0);
        }
        self.begin_content(ShardState { slots: self.slots, ..ShardState::default() });
        self.role = Role::Follower;
    }

    pub fn primary(&self) -> Option<&Primary> {
        match &self.role {
            Role::Primary(primary) => Some(primary),
            Role::Follower => None,
        }
    }

    pub fn primary_mut(&mut self) -> Option<&mut Primary> {
        match &mut self.role {
            Role::Primary(primary) => Some(primary),
            Role::Follower => None,
        }
    }

    /// The next entry to apply, if it is committed and fsynced here.
    pub fn next_to_apply(&self) -> Option<Seq> {
        let next = self.state.applied.seq.next();
        let ready = next <= self.commit && next <= self.log.durable();
        (self.trust.is_working() && ready).then_some(next)
    }

    /// The log is fsynced up to `seq`.
    pub fn on_durable(&mut self, seq: Seq) {
        self.log.on_durable(seq);
        // All that earlier epochs committed is below the barrier of this one, which is its first entry; what this one
        // commits waits for every member. That the barrier is committed may not be heard before the primary dies.
        let holds_barrier = self.log.epoch_at(self.log.durable()) == Some(self.promised);
        if holds_barrier && self.primary().is_none() {
            self.trust.fill();
        }
    }

    /// The entry at `seq` has been applied.
    pub fn on_applied(&mut self, seq: Seq, sizes: &Sizes) {
        self.log.on_applied(seq);
        let is_barrier = |body: &Body| matches!(body, Body::Barrier);
        let barrier = self.log.get(seq).is_some_and(|held| is_barrier(&held.entry.body));
        if barrier {
            self.trust.fill();
        }
        if barrier || seq.0.is_multiple_of(sizes.digest_every) {
            if self.points.len() >= sizes.points_max {
                self.points.pop_front();
            }
            self.points.push_back(self.digest());
        }
    }

    /// What its log takes of memory.
    pub fn log_bytes(&self) -> LogBytes {
        let applies = self.trust.is_working();
        self.log.bytes(applies.then_some(self.commit))
    }

    /// What the state amounts to now.
    pub fn digest(&self) -> DigestPoint {
        self.state.digest()
    }

    /// For status and for the simulator's oracles.
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

    /// What holds at the end of every event.
    pub fn check_invariants(&self) {
        let applied = self.state.applied.seq;
        assert!(applied <= self.commit, "applied is committed");
        assert!(applied <= self.log.durable(), "applied is fsynced here");
        assert!(self.log.base().seq <= applied, "what is not applied is in memory");
        assert!(self.log.durable() <= self.log.last().seq, "durable is written");
        if let Some(primary) = self.primary() {
            assert!(primary.epoch == self.promised, "a primary leads in the epoch it promised");
        }
    }
}
