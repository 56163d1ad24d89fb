//! All replicas of one storage node: frames in, groups out, peer health, reads.
//!
//! ```text
//!   driver                                     node machine
//!   ──────                                     ────────────
//!   sockets   ── Frame, Read, Peer ─────────▶  orders, checks, counts acks
//!   log file  ◀── Write … Write, Sync{g} ────  everything since the last Sync is group g
//!             ── Durable{g} ────────────────▶  commit moves, entries apply to the table
//!   state     ◀── Load, Flush ───────────────
//!             ── Loaded, Ingested ──────────▶
//!   etcd      ◀── Propose, ReadConfig, … ────
//!             ── Config, Proposed, … ───────▶
//! ```
//!
//! **The promise to drivers:** perform `Write` and `Sync` in the order given; perform everything
//! else whenever you like, but begin a `Load` before the next event is handled (it reads the state
//! as it is now). An acknowledgement waits inside the machine until the fsync that it speaks of has
//! come back as an event.

use std::sync::Arc;

use crate::apply::ShardState;
use crate::config::ShardConfig;
use crate::entry::{Entry, Position};
use crate::ids::{
    Conn, CopyNo, Epoch, Revision, Seq, SessionId, ShardId, Slots, StoreBoot, StoreId, TimeMs,
};
use crate::key::CounterKey;
use crate::message::{
    FromFollower, GatewayMessage, NodeQuery, NodeQueryReply, NodeReply, Report, ToFollower,
};
use crate::store::log::Record;

/// Everything that can happen to a node.
#[derive(Clone, Debug)]
pub enum Event {
    /// The wall clock, told at least every 100 ms. It moves shard time and decides nothing else.
    WallClock(TimeMs),
    /// The time given by `next_deadline` has come.
    Tick,

    // -- gateways
    GatewayConnected {
        conn: Conn,
    },
    Gateway {
        conn: Conn,
        message: GatewayMessage,
    },
    GatewayGone {
        conn: Conn,
    },

    // -- peers
    /// This node dialled a peer and the connection stands.
    Dialled {
        conn: Conn,
        peer: StoreBoot,
    },
    /// A peer dialled this node.
    Accepted {
        conn: Conn,
    },
    FromFollower {
        conn: Conn,
        message: FromFollower,
    },
    ToFollower {
        conn: Conn,
        message: ToFollower,
    },
    Closed {
        conn: Conn,
    },
    /// After a reset the peer's address refused two connections 50 ms apart: the process is gone.
    PeerRefused {
        store: StoreId,
    },

    // -- coordinator
    Query {
        query: u64,
        message: NodeQuery,
    },

    // -- disk
    /// Group `group` and all before it are fsynced.
    Durable {
        group: u64,
    },
    /// Answers `Load`: the values in the state, in the order of the keys.
    Loaded {
        load: u64,
        values: Vec<Option<i128>>,
    },
    /// Answers `ReadLog`: entries from `from` on, contiguous; empty if the log no longer holds them.
    LogRead {
        shard: ShardId,
        from: Seq,
        entries: Vec<Entry>,
    },
    /// The flush is in the state, in one step: loads begun from now on see it.
    Ingested {
        flush: u64,
    },
    /// The disk is nearly full, or no longer.
    DiskFull(bool),

    // -- snapshots
    /// All of a copy has been staged here, checksums good. `state` is as of its `applied`.
    SnapshotStaged {
        conn: Conn,
        transfer: u64,
        state: Box<ShardState>,
    },
    /// The staged copy was ingested, in one step with its shard record.
    SnapshotInstalled {
        transfer: u64,
    },
    /// The outgoing transfer can't go on.
    SnapshotFailed {
        transfer: u64,
    },

    // -- etcd
    /// A shard's record, as a watch or a read has seen it. `linearizable`: by a linearizable read
    /// begun after it was asked for by `ReadConfig`.
    Config {
        config: ShardConfig,
        mod_revision: u64,
        linearizable: bool,
    },
    /// The `node/` keys there are: process, and the key's create_revision.
    Peers(Vec<(StoreBoot, u64)>),
    /// What became of a proposal.
    Proposed {
        proposal: u64,
        outcome: CasOutcome,
    },
    /// Answers `CheckEtcd`: the records as a linearizable read begun after it saw them; none if
    /// etcd did not answer.
    EtcdChecked {
        check: u64,
        configs: Option<Vec<ShardConfig>>,
    },
    /// Etcd has confirmed this node's lease.
    LeaseConfirmed,
    /// Answers `ListSessions`: the ids alive, and the header revision of the same read.
    SessionsListed {
        at: Revision,
        alive: Vec<SessionId>,
    },
}

/// How a compare-and-set ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum CasOutcome {
    /// It took effect, and this is the record's new mod_revision.
    Done { mod_revision: u64 },
    /// It did not, and never will.
    Failed,
    /// The answer was lost: it may have taken effect, or may yet.
    Unknown,
}

/// Everything a node can ask of its driver.
#[derive(Clone, Debug)]
pub enum Effect {
    // -- disk: writing effects, in the order given
    Write(Record),
    /// What was written since the last `Sync` is group `group`: one log record, one fsync.
    Sync {
        group: u64,
    },

    // -- disk: reading
    Load {
        load: u64,
        keys: Vec<CounterKey>,
    },
    ReadLog {
        shard: ShardId,
        from: Seq,
        bytes_max: usize,
    },
    /// Write table and shard records as sorted files and ingest them in one call.
    Flush {
        flush: u64,
        table: Arc<crate::store::table::Frozen>,
        shards: Vec<(CopyNo, ShardState)>,
    },
    /// Of each shard, entries above the seq are still needed; other segments may go.
    Trim {
        keep_above: Vec<(ShardId, Seq)>,
    },

    // -- sockets
    ToFollower {
        conn: Conn,
        message: ToFollower,
    },
    FromFollower {
        conn: Conn,
        message: FromFollower,
    },
    Gateway {
        conn: Conn,
        reply: NodeReply,
    },
    Close {
        conn: Conn,
    },
    QueryReply {
        query: u64,
        reply: NodeQueryReply,
    },
    Report(Report),

    // -- snapshots
    /// Send the copy, as it stands in the state, to the follower on this connection.
    SendSnapshot {
        conn: Conn,
        transfer: u64,
        shard: ShardId,
        slots: Slots,
    },
    /// Ingest the staged copy under this number, in one step: range delete, rows, shard record.
    InstallSnapshot {
        transfer: u64,
        copy: CopyNo,
        state: Box<ShardState>,
    },
    /// Forget what was staged.
    DiscardSnapshot {
        transfer: u64,
    },
    /// Remove the rows of a deleted copy.
    DropRows {
        shard: ShardId,
        slots: Slots,
    },

    // -- etcd
    /// Read the shard's record linearizably.
    ReadConfig {
        shard: ShardId,
    },
    /// Write `config` if the record is still at `expect`, and, where a candidate is named, if its
    /// `node/` key still has this create_revision. Never retried by the driver.
    Propose {
        proposal: u64,
        expect: u64,
        config: ShardConfig,
        candidate: Option<(StoreId, u64)>,
    },
    CheckEtcd {
        check: u64,
        shards: Vec<ShardId>,
    },
    ListSessions,

    /// The process must end: a newer boot of this store runs, or what is on disk can't be trusted.
    Exit(ExitReason),
}

#[derive(Clone, Debug, Eq, PartialEq)]
pub enum ExitReason {
    /// Exit code 4.
    NewerBoot(StoreBoot),
    /// Exit code 5.
    Disk(String),
}

/// What recovery found of one shard.
#[derive(Clone, Debug)]
pub struct RecoveredReplica {
    pub shard: ShardId,
    pub slots: Slots,
    pub promised: Epoch,
    /// The number of the present copy, or of the last one if there is none.
    pub copy: CopyNo,
    /// None: no copy, only a promise.
    pub content: Option<RecoveredContent>,
}

#[derive(Clone, Debug)]
pub struct RecoveredContent {
    pub state: ShardState,
    /// Entries above `state.applied`, contiguous.
    pub entries: Vec<Entry>,
    /// Something about the copy is wrong: not promotable, to be re-seeded.
    pub suspect: bool,
}

#[allow(dead_code)] // the skeleton; the machine follows
fn skeleton(_: Position) {}
