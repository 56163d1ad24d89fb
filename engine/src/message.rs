//! What processes say to each other. The `proto` crate carries these over gRPC; the simulator
//! carries them as they are.
//!
//! A connection between nodes has a direction: the dialling node speaks as primary and asks, the
//! accepting node answers. Two nodes that lead shards for each other hold two connections.

use crate::batch::Batch;
use crate::config::ShardConfig;
use crate::entry::{Entry, Position};
use crate::idempotency::TokenOutcome;
use crate::ids::{Bseq, CopyNo, Epoch, Seq, SessionId, ShardId, Slots, StoreBoot, StoreId, TimeMs};
use crate::key::CounterKey;

// ---- gateway worker → storage node -------------------------------------------------------------

#[derive(Clone, Debug, Eq, PartialEq)]
pub enum GatewayMessage {
    /// What one worker sends one node in one turn. `message` counts up from 1 per connection.
    Frame { message: u64, batches: Vec<Batch> },
    /// Reads. `id` is the gateway's own, unique per connection. All keys of one read lie in
    /// `slots`. Linearizable, unless `max_staleness_ms` says that a value of that age will do: then
    /// a follower may answer, too.
    Read { id: u64, slots: Slots, keys: Vec<CounterKey>, max_staleness_ms: Option<u64> },
}

/// Storage node → gateway worker. Every answer names its send in full, so that it settles that
/// send and no other.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum NodeReply {
    Answer {
        message: u64,
        slots: Slots,
        session: SessionId,
        bseq: Bseq,
        answer: Answer,
    },
    Read {
        id: u64,
        result: Result<ReadResult, Refusal>,
    },
    /// Told to every connected gateway when it changes, and on connecting.
    ShardState {
        slots: Slots,
        state: ShardAvailability,
    },
}

#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ReadResult {
    /// In the order of the keys asked for.
    pub values: Vec<i128>,
    /// The shard's own time.
    pub time: TimeMs,
    /// All that was acknowledged so long before this answer left is in the values. 0: they are
    /// linearizable.
    pub staleness_us: u64,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum ShardAvailability {
    Open,
    /// The commit can't move: a member can't acknowledge and can't leave the in-sync set.
    Frozen,
}

/// What became of one send of one batch.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Answer {
    /// Applied, now or when it was sent before. `values[i]` answers the i-th op that asks for one;
    /// `tokens[i]` tells what became of the i-th group of ops with a token (the values of one
    /// without effect are 0). `time`: of the entry, so the shard's own time just now.
    Applied { values: Vec<i128>, tokens: Vec<TokenOutcome>, time: TimeMs },
    /// Applied before, and the worker has said that it knows the result.
    AnsweredBefore,
    /// Intact, but not to be read: decided, no effect.
    Malformed,
    /// This send had no effect: its number does not follow the last one, or there is no row.
    NoEffect,
    /// This send had no effect: the session was collected.
    Expired,
    /// Not ordered by this node.
    Refused(Refusal),
}

/// Why a node did not take something. Definite for this send, and for no other.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Refusal {
    /// This node does not lead the shard. What it knows of who does.
    NotPrimary(Option<Box<ShardConfig>>),
    /// No such shard on this node.
    NoSuchShard,
    Frozen,
    Overloaded,
    NoSpace,
    TooLarge,
    /// The sum does not match: damaged on the way.
    Damaged,
    /// Of a bounded-stale read: this node can't prove that what it holds is young enough.
    Stale,
}

// ---- node → node --------------------------------------------------------------------------------

/// Dialling node → accepting node.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum ToFollower {
    /// First on every connection. The accepting end closes it unless `to` is itself.
    Hello { from: StoreBoot, to: StoreBoot },
    /// Entries for any number of shards. `n` counts up from 1 per connection.
    Append { n: u64, slices: Vec<Slice> },
    /// Every 100 ms: liveness of the pair, and the commits that moved since.
    Heartbeat { sent: u64, commits: Vec<(ShardId, Epoch, Seq)> },
    /// Has any of these shards promised a higher epoch?
    ReadIndex { round: u64, shards: Vec<(ShardId, Epoch)> },
    /// Answers a probe, in full or in part: of each shard the epoch in which it is led, and a commit
    /// captured after the probe had come and proved current since; or that there is none to tell.
    Proof { probe: u64, proven: Vec<(ShardId, Epoch, Seq)>, refused: Vec<ShardId> },
    /// A whole copy of a shard, of about so many bytes, is to replace this one. Nothing of it is sent before it is accepted;
    /// then it comes as a stream of its own.
    Snapshot { transfer: u64, shard: ShardId, epoch: Epoch, copy: CopyNo, bytes: u64 },
    /// This copy is not what the others are (the point says what they are): it is to be filled anew.
    Damaged { epoch: Epoch, copy: CopyNo, point: DigestPoint },
}

/// What a primary knows of a replica of its shard: whether it acknowledges what it is sent, or why not.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Standing {
    /// It acknowledges, as far as is known.
    Good,
    /// It does not answer, can't be reached, or its disk does not answer: for a second.
    Silent,
    /// Its disk has no room.
    Full,
    /// It is connected and has no copy, or none yet.
    NoCopy,
    /// It lacks what it has acknowledged, or its copy is wrong.
    Lost,
    /// It is being sent a whole copy.
    Filling,
    /// It answers, and what waits for its acknowledgement has waited for long.
    Behind,
}

impl Standing {
    pub const ALL: [Self; 7] = [
        Self::Good,
        Self::Silent,
        Self::Full,
        Self::NoCopy,
        Self::Lost,
        Self::Filling,
        Self::Behind,
    ];

    /// As the status page has it.
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

    /// It will not acknowledge by itself: another store is to take its place. (One that is being
    /// copied to is as far as another one would be.)
    pub fn needs_spare(self) -> bool {
        matches!(self, Self::Silent | Self::Full | Self::Behind)
    }
}

/// Part of one message for one shard.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Slice {
    pub shard: ShardId,
    pub slots: Slots,
    pub epoch: Epoch,
    /// The follower's copy that this speaks to.
    pub copy: CopyNo,
    /// The entries follow this position.
    pub prev: Position,
    pub commit: Seq,
    /// Ends the skipping that a reject began.
    pub resume: bool,
    pub entries: Vec<Entry>,
}

impl Slice {
    /// Bytes the slice takes, near enough for limits and budgets.
    pub fn size(&self) -> usize {
        const HEAD: usize = 32;
        HEAD + self.entries.iter().map(Entry::size).sum::<usize>()
    }
}

/// Accepting node → dialling node.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum FromFollower {
    /// First on every connection: who this is, and the number of each copy it holds.
    Welcome { from: StoreBoot, copies: Vec<(ShardId, CopyNo)> },
    /// A copy was deleted, created or installed: said before anything else about the shard. Or a replica that has refused
    /// slices accepts them now, and its feed is to be opened again.
    Copy { shard: ShardId, copy: CopyNo },
    /// Every slice of messages ≤ `n` that was neither rejected nor skipped is durable.
    Ack { n: u64 },
    /// Said before the ack of message `n`. Later slices of the shard are skipped until a resume.
    Reject { n: u64, shard: ShardId, reason: Reject },
    /// Answers a heartbeat: echoes `sent`; age of the last successful fsync; whether the disk has no
    /// room for entries; bytes that whole copies may take here; what this node's wall clock says;
    /// newest digests of the shards that the asker leads, where they are new.
    Alive {
        sent: u64,
        fsync_age_ms: u64,
        full: bool,
        room_bytes: u64,
        wall: TimeMs,
        digests: Vec<DigestPoint>,
    },
    /// Those of the asked shards that have promised more.
    ReadIndex { round: u64, newer: Vec<(ShardId, Epoch)> },
    /// How far must these shards be applied to hold all that is acknowledged by now?
    Probe { probe: u64, shards: Vec<ShardId> },
    /// What becomes of a snapshot: first whether it is to be sent, then how that ended.
    Snapshot { transfer: u64, shard: ShardId, outcome: SnapshotOutcome },
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum SnapshotOutcome {
    /// It has room: send it.
    Accepted,
    /// It has no room, and was not begun.
    NoSpace,
    /// It stands in place of the old copy, under a new copy number.
    Installed,
    /// It came and was not wanted any more: the old copy stands.
    NotInstalled,
}

/// What a replica's state amounts to at one seq: equal on all replicas at equal seq.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct DigestPoint {
    pub shard: ShardId,
    pub seq: Seq,
    pub counters: u128,
    pub sessions: u128,
    /// Over the live buckets of idempotency records.
    pub tokens: u128,
}

/// What a node's last scrub found, for people.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct ScrubStatus {
    /// One is under way.
    pub running: bool,
    /// By the node's wall clock. 0: there was none since it started.
    pub ended: TimeMs,
    /// How many copies it has read.
    pub shards: u64,
    /// Those that are not what was written. What a checksum sees is not among them: it ends the process.
    pub damaged: Vec<ShardId>,
}

#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Reject {
    /// The follower obeys a newer primary.
    StaleEpoch {
        promised: Epoch,
    },
    /// `prev` is not in the follower's log. Where its log can be joined: the end of each epoch
    /// above what it has applied, newest first, and lastly what it has applied.
    Mismatch {
        ends: Vec<Position>,
        applied: Position,
    },
    /// The slice speaks to another copy.
    WrongCopy {
        copy: CopyNo,
    },
    /// The follower is stopped for this shard (damage, unknown entry) and needs a new copy.
    Stopped,
    NoSpace,
}

// ---- coordinator ⇄ node -------------------------------------------------------------------------

/// Asked of a node by the coordinator.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum NodeQuery {
    /// Are you this process, and does your disk answer?
    Probe { to: StoreBoot },
    /// Where do the logs of these shards end?
    Gather { shards: Vec<ShardId> },
    /// Hand this shard over: stop ordering, so that `to` loses nothing by being promoted.
    StepDown { shard: ShardId, epoch: Epoch },
    /// What is there to be seen of this node's replicas?
    Status,
    /// Read everything that is on your disk, or these shards, at no more than this rate (0: the node's own).
    Scrub { shards: Vec<ShardId>, bytes_per_s: u64 },
}

#[derive(Clone, Debug, Eq, PartialEq)]
pub enum NodeQueryReply {
    Probe {
        from: StoreBoot,
        fsync_age_ms: u64,
    },
    Gather {
        from: StoreBoot,
        ends: Vec<ShardEnd>,
    },
    /// The shard has stopped ordering and its log ends here, or the node does not lead it.
    StepDown {
        shard: ShardId,
        end: Option<(Epoch, Seq)>,
    },
    Status {
        from: StoreBoot,
        replicas: Vec<ReplicaStatus>,
        scrub: ScrubStatus,
        /// The disk has no room: writes are refused, reads are served.
        full: bool,
    },
    /// It will be done; `Status` tells what comes of it.
    Scrub {
        from: StoreBoot,
    },
}

/// One replica, for people to look at.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ReplicaStatus {
    pub shard: ShardId,
    pub promised: Epoch,
    pub last: Seq,
    pub applied: Seq,
    /// The newest digest there is.
    pub digest: DigestPoint,
    pub role: RoleStatus,
    /// Why nothing more is taken, if so.
    pub stopped: Option<String>,
}

#[derive(Clone, Debug, Eq, PartialEq)]
pub enum RoleStatus {
    Follower,
    /// Leads in this epoch. `open`: its barrier is committed and it takes writes. `hindered_by`:
    /// members and learners that do not acknowledge, and why. `records`: of requests with a key.
    Primary {
        epoch: Epoch,
        open: bool,
        hindered_by: Vec<(StoreId, Standing)>,
        records: RecordsKept,
    },
}

/// Records of requests with an idempotency key, as one shard keeps them.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct RecordsKept {
    pub count: u64,
    /// Of their rows: limited by the cluster's settings.
    pub bytes: u64,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct ShardEnd {
    pub shard: ShardId,
    pub promised: Epoch,
    /// Epoch and seq of the last entry in the log.
    pub last: (Epoch, Seq),
    pub applied: Seq,
    /// The copy was damaged, or made empty at an epoch above 1 and has acknowledged no barrier
    /// since: promote it only if nobody else is there.
    pub unfit: bool,
}

/// What a node, unasked, tells the coordinator: hints, on change and every second.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Report {
    /// Peers that are silent, seen from here.
    pub silent: Vec<StoreId>,
    /// This node's disk has no room for entries.
    pub full: bool,
    /// Shards led here that are frozen, and the members and learners that do not acknowledge. None
    /// of them: the in-sync set is below the floor, or a commit is late for no reason known here.
    pub frozen: Vec<(ShardId, Vec<(StoreId, Standing)>)>,
    /// Shards led here whose primary asks to be replaced: it hears neither peers nor etcd.
    pub resigned: Vec<ShardId>,
    /// This process is about to end: others are to lead, and to be in sync without it.
    pub leaving: bool,
}
