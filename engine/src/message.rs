//! The messages between processes. The `proto` crate carries them over gRPC; the simulator carries
//! them as they are.
//!
//! A connection between nodes has a direction: the dialling node sends as primary, the accepting
//! node answers as follower. Two nodes that lead shards for each other hold two connections.

use crate::batch::Batch;
use crate::entry::{Entry, Position};
use crate::etcd_memory::EtcdMemory;
use crate::ids::{
    BatchSeq, CopyNo, Epoch, Seq, SessionId, ShardId, Slots, StoreBoot, StoreId, TimeMs,
};
use crate::key::CounterKey;
use crate::shard::idempotency::TokenOutcome;
use crate::shard_record::ShardRecord;

// ---- gateway worker → storage node -------------------------------------------------------------

/// Gateway worker → storage node.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum GatewayMessage {
    /// The batches that one worker sends to one node in one turn.
    Frame {
        /// Counts up from 1 per connection.
        message: u64,
        /// The batches, of any number of shards.
        batches: Vec<Batch>,
    },
    /// A batch that was sealed for a shard that has been split since: once more, to this child.
    Resend {
        /// Counts up from 1 per connection, together with those of frames.
        message: u64,
        /// The child that is to apply its part.
        shard: ShardId,
        /// The batch, as it was sealed.
        batch: Batch,
    },
    /// A read of counters of one shard.
    Read {
        /// Chosen by the gateway, unique per connection.
        id: u64,
        /// The shard, by its range: all keys lie in it.
        slots: Slots,
        /// The counters to read.
        keys: Vec<CounterKey>,
        /// `None`: the read is linearizable, and only the primary may answer. Otherwise values
        /// that are at most this old suffice, and a follower may answer too.
        max_staleness_ms: Option<u64>,
    },
}

/// Storage node → gateway worker. Every answer names its send in full, so it settles that send and
/// no other.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum NodeReply {
    /// The answer to one send of one batch.
    Answer {
        /// The number of the frame.
        message: u64,
        /// The shard, as it was when the batch was applied. Without an effect: as in the batch.
        slots: Slots,
        /// The session of the batch.
        session: SessionId,
        /// The number of the batch.
        batch_seq: BatchSeq,
        /// The outcome of this send.
        answer: BatchReply,
    },
    /// The answer to a read.
    Read {
        /// The read's id.
        id: u64,
        /// The values, or the reason why the read was refused.
        result: Result<ReadResult, Refusal>,
    },
    /// Sent to every connected gateway when it changes, and on connecting.
    ShardState {
        /// The shard.
        slots: Slots,
        /// The availability of the shard.
        state: ShardAvailability,
    },
}

/// The result of a read.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ReadResult {
    /// The values, in the order of the keys asked for.
    pub values: Vec<i128>,
    /// The shard's own time.
    pub time: TimeMs,
    /// The values contain all that was acknowledged this long before the answer left. 0: they are
    /// linearizable.
    pub staleness_us: u64,
}

/// The availability of a shard for writes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum ShardAvailability {
    /// The shard takes writes.
    Open,
    /// The commit can't move: a member can't acknowledge and can't leave the in-sync set.
    Frozen,
}

/// The outcome of one send of one batch.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum BatchReply {
    /// Applied, now or when it was sent before.
    Applied {
        /// `values[i]` is the result of the i-th operation that asks for a value. The values of
        /// operations without effect are 0.
        values: Vec<i128>,
        /// `tokens[i]` is the outcome of the i-th group of operations with a token.
        tokens: Vec<TokenOutcome>,
        /// The time of the entry, which is about the shard's own time now.
        time: TimeMs,
    },
    /// Applied before, and the worker has stated since that it knows the result.
    AnsweredBefore,
    /// Intact, but it can't be decoded: decided, without effect.
    Malformed,
    /// This send has no effect: its number does not follow the last one, or the session has no
    /// row.
    NoEffect,
    /// This send has no effect: the session has expired.
    Expired,
    /// This send was not ordered by this node.
    Refused(Refusal),
}

impl BatchReply {
    /// The label under which a batch that was not taken is counted; `None` for one that was.
    pub const fn refusal_label(&self) -> Option<&'static str> {
        match self {
            Self::Refused(refusal) => Some(refusal.label()),
            Self::NoEffect => Some("order"),
            Self::Expired => Some("expired"),
            Self::Applied { .. } | Self::AnsweredBefore | Self::Malformed => None,
        }
    }
}

/// The labels of `dkc_refusals_total`: of each [`Refusal`], and of the two other replies to a batch
/// that was not taken.
pub const REFUSAL_LABELS: [&str; 10] = [
    "not-primary",
    "no-such-shard",
    "frozen",
    "overloaded",
    "no-space",
    "too-large",
    "damaged",
    "stale",
    "order",
    "expired",
];

/// The reason why a node refused a batch or a read. Definite for this send, and for no other.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Refusal {
    /// This node does not lead the shard. The record of the shard, as far as the node knows it.
    NotPrimary(Option<Box<ShardRecord>>),
    /// This node has no such shard.
    NoSuchShard,
    /// The shard's commit can't move.
    Frozen,
    /// The node has as much waiting as it may hold.
    Overloaded,
    /// The disk has no room.
    NoSpace,
    /// The batch or its answer is larger than the node takes.
    TooLarge,
    /// The sum does not match: the batch was damaged on the way.
    Damaged,
    /// For a bounded-stale read: this node can't prove that its values are recent enough.
    Stale,
}

impl Refusal {
    /// The label of this reason in metrics: one of [`REFUSAL_LABELS`].
    pub const fn label(&self) -> &'static str {
        match self {
            Self::NotPrimary(_) => "not-primary",
            Self::NoSuchShard => "no-such-shard",
            Self::Frozen => "frozen",
            Self::Overloaded => "overloaded",
            Self::NoSpace => "no-space",
            Self::TooLarge => "too-large",
            Self::Damaged => "damaged",
            Self::Stale => "stale",
        }
    }
}

// ---- node → node --------------------------------------------------------------------------------

/// Dialling node → accepting node.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum ToFollower {
    /// First on every connection. The accepting end closes it unless `to` is itself.
    Hello {
        /// The dialling process.
        from: StoreBoot,
        /// The process that it wants to reach.
        to: StoreBoot,
    },
    /// Entries for any number of shards.
    Append {
        /// Counts up from 1 per connection.
        n: u64,
        /// The entries, shard by shard.
        slices: Vec<Slice>,
    },
    /// Every 100 ms: liveness of the pair, and the commits that moved since.
    Heartbeat {
        /// A time stamp that the answer echoes.
        sent: u64,
        /// The new commit of each shard, with the epoch that the sender leads.
        commits: Vec<(ShardId, Epoch, Seq)>,
    },
    /// Asks whether any of these shards has promised a higher epoch.
    ReadIndex {
        /// The number of the round, for the answer.
        round: u64,
        /// The shards, with the epoch that the sender leads.
        shards: Vec<(ShardId, Epoch)>,
    },
    /// Answers a [`FromFollower::ProofRequest`], in full or in part.
    Proof {
        /// The number of the request.
        request: u64,
        /// For each shard, the epoch in which it is led, and a commit that was captured after the
        /// request had arrived and proved current since.
        proven: Vec<(ShardId, Epoch, Seq)>,
        /// The shards for which there is no such commit.
        refused: Vec<ShardId>,
    },
    /// Announces a snapshot that is to replace the follower's copy of a shard. No part of it is
    /// sent before it is accepted; then it comes as a stream of its own.
    Snapshot {
        /// The number of the transfer, for the answers.
        transfer: u64,
        /// The shard.
        shard: ShardId,
        /// The epoch that the sender leads.
        epoch: Epoch,
        /// The copy that is to be replaced.
        copy: CopyNo,
        /// The size, about.
        bytes: u64,
    },
    /// The follower's copy differs from the others, whose digest is `point`: it is to be replaced.
    Damaged {
        /// The epoch that the sender leads.
        epoch: Epoch,
        /// The copy that differs.
        copy: CopyNo,
        /// The digest of the other copies.
        point: DigestPoint,
    },
}

/// The state of a replica as its primary sees it: whether it acknowledges what it is sent, or the
/// reason why not.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum ReplicaHealth {
    /// The replica acknowledges, as far as is known.
    Good,
    /// For a second the replica has not answered, was not reachable, or its disk has not answered.
    Silent,
    /// The replica's disk has no room.
    Full,
    /// The replica is connected and has no copy, or none yet.
    NoCopy,
    /// The replica lacks entries that it has acknowledged, or its copy is wrong.
    Lost,
    /// A snapshot is being sent to the replica.
    Filling,
    /// The replica answers, but a commit has waited for its acknowledgement for long.
    Behind,
}

impl ReplicaHealth {
    /// Every value.
    pub const ALL: [Self; 7] = [
        Self::Good,
        Self::Silent,
        Self::Full,
        Self::NoCopy,
        Self::Lost,
        Self::Filling,
        Self::Behind,
    ];

    /// The name on the status page.
    pub fn name(self) -> &'static str {
        match self {
            Self::Good => "in-sync",
            Self::Silent => "silent",
            Self::Full => "disk-full",
            Self::NoCopy => "no-copy",
            Self::Lost => "lost-data",
            Self::Filling => "copying",
            Self::Behind => "behind",
        }
    }

    /// Returns whether the replica will not acknowledge by itself, so that another store is to take
    /// its place. (One that is being sent a snapshot is as far as another one would be.)
    pub fn needs_spare(self) -> bool {
        matches!(self, Self::Silent | Self::Full | Self::Behind)
    }
}

/// The part of one message for one shard.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Slice {
    /// The shard.
    pub shard: ShardId,
    /// The shard's slots.
    pub slots: Slots,
    /// The epoch that the sender leads.
    pub epoch: Epoch,
    /// The copy of the follower that the slice is for.
    pub copy: CopyNo,
    /// The position that the entries follow.
    pub prev: Position,
    /// The primary's commit.
    pub commit: Seq,
    /// Ends the skipping that a reject began.
    pub resume: bool,
    /// The entries, without a gap.
    pub entries: Vec<Entry>,
}

impl Slice {
    /// The size in bytes, near enough for limits and budgets.
    pub fn size(&self) -> usize {
        const HEAD: usize = 32;
        HEAD + self.entries.iter().map(Entry::size).sum::<usize>()
    }
}

/// Accepting node → dialling node.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum FromFollower {
    /// First on every connection.
    Welcome {
        /// The accepting process.
        from: StoreBoot,
        /// The number of each copy that it holds.
        copies: Vec<(ShardId, CopyNo)>,
    },
    /// A copy was deleted, created or installed; sent before any other message about the shard. Or
    /// a replica that has refused slices accepts them now, and its feed is to be opened again.
    Copy {
        /// The shard.
        shard: ShardId,
        /// The number of the present copy.
        copy: CopyNo,
    },
    /// Every slice of messages ≤ `n` that was neither rejected nor skipped is durable.
    Ack {
        /// The number of the message.
        n: u64,
    },
    /// A slice was rejected; sent before the ack of message `n`. Later slices of the shard are
    /// skipped until one with [`Slice::resume`].
    Reject {
        /// The number of the message.
        n: u64,
        /// The shard of the slice.
        shard: ShardId,
        /// The reason.
        reason: Reject,
    },
    /// Answers a heartbeat.
    Alive {
        /// The echo of the heartbeat's `sent`.
        sent: u64,
        /// The age of the last successful fsync.
        fsync_age_ms: u64,
        /// The disk has no room for entries.
        full: bool,
        /// The bytes that snapshots may take here.
        room_bytes: u64,
        /// The wall clock of this node.
        wall: TimeMs,
        /// The newest digests of the shards that the primary leads, where they are new.
        digests: Vec<DigestPoint>,
    },
    /// Answers a [`ToFollower::ReadIndex`].
    ReadIndex {
        /// The number of the round.
        round: u64,
        /// The shards that have promised a higher epoch.
        newer: Vec<(ShardId, Epoch)>,
    },
    /// Asks for the position to which each shard must be applied to contain everything that has
    /// been acknowledged by now. Answered by [`ToFollower::Proof`].
    ProofRequest {
        /// The number of the request, for the answer.
        request: u64,
        /// The shards.
        shards: Vec<ShardId>,
    },
    /// The state of a snapshot transfer: first whether it is to be sent, then how that ended.
    Snapshot {
        /// The number of the transfer.
        transfer: u64,
        /// The shard.
        shard: ShardId,
        /// The outcome so far.
        outcome: SnapshotOutcome,
    },
}

/// The receiver's answer to the announcement of a snapshot, then to the snapshot.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum SnapshotOutcome {
    /// There is room for the snapshot: it is to be sent.
    Accepted,
    /// There is no room for the snapshot; nothing was begun.
    NoSpace,
    /// The snapshot has replaced the old copy, under a new copy number.
    Installed,
    /// The old copy can't be replaced now, or the snapshot is not wanted any more: the copy stays.
    NotInstalled,
}

/// The digest of a replica's state at one seq: equal on all replicas at equal seq.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct DigestPoint {
    /// The shard.
    pub shard: ShardId,
    /// The seq up to which the log is applied.
    pub seq: Seq,
    /// The digest of all counters ([`crate::shard::digest`]).
    pub counters: u128,
    /// The digest of sessions and their expiry.
    pub sessions: u128,
    /// The digest of the live buckets of idempotency records.
    pub tokens: u128,
}

/// The result of a node's last scrub, for the status page.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct ScrubStatus {
    /// A scrub is running.
    pub running: bool,
    /// The end of the last one, by the node's wall clock. 0: none has ended since the start.
    pub ended: TimeMs,
    /// The number of copies that it has read.
    pub shards: u64,
    /// Copies whose content differs from what was written. Damage that a checksum detects is not
    /// among them, since it ends the process.
    pub damaged: Vec<ShardId>,
}

/// The reason why a follower rejected a slice.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Reject {
    /// The follower obeys a newer primary.
    StaleEpoch {
        /// The epoch that the follower has promised.
        promised: Epoch,
    },
    /// `prev` is not in the follower's log.
    Mismatch {
        /// The positions at which the log can be joined: the end of each epoch above what is
        /// applied, newest first.
        ends: Vec<Position>,
        /// The last position that can be joined: what the follower has applied.
        applied: Position,
    },
    /// The slice is for another copy.
    WrongCopy {
        /// The number of the present copy; 0 without a copy.
        copy: CopyNo,
    },
    /// The follower is stopped for this shard (damage, unknown entry) and needs a new copy.
    Stopped,
    /// The follower's disk has no room.
    NoSpace,
}

// ---- coordinator ⇄ node -------------------------------------------------------------------------

/// Coordinator, gateway or CLI → node.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum NodeQuery {
    /// Asks whether the node is this process, and whether its disk answers.
    Probe {
        /// The process that is meant.
        to: StoreBoot,
    },
    /// Asks where the logs of these shards end.
    Gather {
        /// The shards.
        shards: Vec<ShardId>,
    },
    /// Asks the node to hand this shard over: to stop ordering, so that promoting another store
    /// loses nothing.
    StepDown {
        /// The shard.
        shard: ShardId,
        /// The epoch that the node leads.
        epoch: Epoch,
    },
    /// Asks for the state of the node's replicas.
    Status,
    /// Asks for the store's knowledge of etcd, to rebuild a lost etcd. See
    /// [`recovery_plan`](crate::recovery_plan).
    Recover {
        /// The incarnation of the new etcd, which the store promises to follow, and none below it.
        /// 0: the store promises nothing.
        promise: u32,
    },
    /// Asks the primary of this shard to split it.
    Split {
        /// The shard.
        shard: ShardId,
        /// The epoch that the node leads.
        epoch: Epoch,
        /// The first slot of the right child.
        at: u16,
    },
    /// Asks the node to read everything on its disk, or these shards.
    Scrub {
        /// The shards; empty for everything.
        shards: Vec<ShardId>,
        /// The rate at which to read at most; 0 for the node's own setting.
        bytes_per_s: u64,
    },
}

/// Node → the process that sent a [`NodeQuery`].
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum NodeQueryReply {
    /// Answers [`NodeQuery::Probe`].
    Probe {
        /// The process that answers.
        from: StoreBoot,
        /// The age of the last successful fsync.
        fsync_age_ms: u64,
    },
    /// Answers [`NodeQuery::Gather`].
    Gather {
        /// The process that answers.
        from: StoreBoot,
        /// The end of each log; shards without a copy are left out.
        ends: Vec<ShardEnd>,
    },
    /// Answers [`NodeQuery::StepDown`].
    StepDown {
        /// The shard.
        shard: ShardId,
        /// The shard has stopped ordering and its log ends here. `None`: the node does not lead
        /// it.
        end: Option<(Epoch, Seq)>,
    },
    /// Answers [`NodeQuery::Status`].
    Status {
        /// The process that answers.
        from: StoreBoot,
        /// Every replica with a copy.
        replicas: Vec<ReplicaStatus>,
        /// The scrub.
        scrub: ScrubStatus,
        /// The disk has no room: writes are refused, reads are served.
        full: bool,
    },
    /// Answers [`NodeQuery::Split`].
    Split {
        /// The shard.
        shard: ShardId,
        /// The split is ordered, or one is under way; or the reason why not, in words.
        outcome: Result<(), String>,
    },
    /// Answers [`NodeQuery::Recover`].
    Recover(Box<StoreKnowledge>),
    /// Answers [`NodeQuery::Scrub`]: the scrub is accepted; `Status` shows its progress.
    Scrub {
        /// The process that answers.
        from: StoreBoot,
    },
}

/// The knowledge of a store about etcd.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct StoreKnowledge {
    /// The store, and its last boot.
    pub from: StoreBoot,
    /// The part about the store as a whole. `None`: the store never ran, so it knows nothing.
    pub etcd: Option<Box<EtcdMemory>>,
    /// The promise of [`EtcdMemory::promised`] is durable.
    pub durable: bool,
    /// The store waits for etcd with damage on its disk: it may have forgotten what it promised.
    /// Always false of a node that runs, whose copies are judged one by one ([`CopyEnd`]).
    pub damaged: bool,
    /// The shards that it knows.
    pub shards: Vec<ShardKnowledge>,
}

/// The knowledge of a store about one shard.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ShardKnowledge {
    /// The shard.
    pub shard: ShardId,
    /// The epoch that the store has promised.
    pub promised: Epoch,
    /// The newest record of etcd that it has seen; of a store that waits, that it has acted on.
    pub record: Option<ShardRecord>,
    /// The durable end of its copy; `None`: it holds none.
    pub copy: Option<CopyEnd>,
}

/// The durable end of a copy.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct CopyEnd {
    /// Epoch and seq of the last entry.
    pub last: (Epoch, Seq),
    /// The copy is not good, as in [`ShardEnd::unfit`]. Of a store that waits: it was found
    /// damaged.
    pub unfit: bool,
    /// The copy is stopped: it may have lost what it once held. One that is being filled is not.
    pub damaged: bool,
}

/// The state of one replica, for the status page.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ReplicaStatus {
    /// The shard.
    pub shard: ShardId,
    /// The epoch that the replica has promised.
    pub promised: Epoch,
    /// The last seq in the log.
    pub last: Seq,
    /// The last seq that is applied.
    pub applied: Seq,
    /// The newest digest.
    pub digest: DigestPoint,
    /// The role.
    pub role: RoleStatus,
    /// The reason why the replica takes nothing more, if so.
    pub stopped: Option<String>,
}

/// The role of a replica, for the status page.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum RoleStatus {
    /// The replica does not lead.
    Follower,
    /// The replica leads.
    Primary {
        /// The epoch that it leads.
        epoch: Epoch,
        /// The barrier is committed and writes are taken.
        open: bool,
        /// Members and learners that do not acknowledge, with the reason.
        hindered_by: Vec<(StoreId, ReplicaHealth)>,
        /// The idempotency records of the shard.
        records: RecordsKept,
    },
}

/// The idempotency records that one shard keeps.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct RecordsKept {
    /// The number of records.
    pub count: u64,
    /// The bytes of their rows, which the cluster's settings limit.
    pub bytes: u64,
}

/// The end of a shard's log on one node.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct ShardEnd {
    /// The shard.
    pub shard: ShardId,
    /// The epoch that the replica has promised.
    pub promised: Epoch,
    /// Epoch and seq of the last entry in the log.
    pub last: (Epoch, Seq),
    /// The last seq that is applied.
    pub applied: Seq,
    /// The copy is not good: damaged, being filled, or stopped at an entry of a newer build. It is
    /// promoted only if no other copy is available.
    pub unfit: bool,
}

/// The report that a process sends to the coordinator without being asked: hints, on change and
/// every second.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct HealthReport {
    /// Peers that do not answer this process.
    pub silent: Vec<StoreId>,
    /// This node's disk has no room for entries.
    pub full: bool,
    /// Shards led here that are frozen, with the members and learners that do not acknowledge. An
    /// empty list: the in-sync set is below `min_in_sync`, or a commit is late for a reason that is
    /// not known here.
    pub frozen: Vec<(ShardId, Vec<(StoreId, ReplicaHealth)>)>,
    /// Shards led here whose primary asks to be replaced: it reaches neither peers nor etcd, or its
    /// copy is wrong.
    pub resigned: Vec<ShardId>,
    /// This process is about to end: other nodes are to lead, and to be in sync without it.
    pub leaving: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_refusal_has_one_of_the_labels() {
        let refusals = [
            Refusal::NotPrimary(None),
            Refusal::NoSuchShard,
            Refusal::Frozen,
            Refusal::Overloaded,
            Refusal::NoSpace,
            Refusal::TooLarge,
            Refusal::Damaged,
            Refusal::Stale,
        ];
        let refused = refusals.into_iter().map(BatchReply::Refused);
        let replies = refused.chain([BatchReply::NoEffect, BatchReply::Expired]);
        let labels: Vec<_> = replies.filter_map(|reply| reply.refusal_label()).collect();
        assert_eq!(labels, REFUSAL_LABELS);
        assert_eq!(BatchReply::AnsweredBefore.refusal_label(), None);
    }
}
