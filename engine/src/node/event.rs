//! The events that a node handles and the effects that its driver performs.

use std::sync::Arc;

use crate::ids::{Conn, CopyNo, Revision, SessionId, ShardId, Slots, StoreBoot, StoreId, TimeMs};
use crate::message::{
    DigestPoint, FromFollower, GatewayMessage, HealthReport, NodeQuery, NodeQueryReply, NodeReply,
    ToFollower,
};
use crate::shard::apply::Needs;
use crate::shard::division::RowCounts;
use crate::shard::idempotency;
use crate::shard::state::ShardState;
use crate::shard_record::ShardRecord;
use crate::store::log::LogRecord;
use crate::store::log::catch_up::{LogPart, WantedEntries};
use crate::store::log::index::Needed;
use crate::store::log::scan::LogLocation;
use crate::store::table::SealedTable;

/// The events of a node.
#[derive(Clone, Debug)]
pub enum Event {
    /// The wall clock, reported at least every 100 ms. It moves shard time and decides nothing
    /// else.
    WallClock(TimeMs),
    /// All events that were ready have been handled, or the time given by [`Node::next_deadline`]
    /// has come.
    TurnEnded,

    // -- gateways
    /// A gateway has connected.
    GatewayConnected {
        /// The connection.
        conn: Conn,
    },
    /// A message of a gateway has arrived.
    Gateway {
        /// The connection.
        conn: Conn,
        /// The message.
        message: GatewayMessage,
    },
    /// The connection to a gateway is closed.
    GatewayGone {
        /// The connection.
        conn: Conn,
    },

    // -- peers
    /// This node has connected to a peer.
    Dialled {
        /// The connection.
        conn: Conn,
        /// The process that was dialled.
        peer: StoreBoot,
    },
    /// A peer has connected to this node.
    Accepted {
        /// The connection.
        conn: Conn,
    },
    /// A message has arrived on a connection that this node dialled.
    FromFollower {
        /// The connection.
        conn: Conn,
        /// The message.
        message: FromFollower,
    },
    /// A message has arrived on a connection that a peer dialled.
    FromPrimary {
        /// The connection.
        conn: Conn,
        /// The message.
        message: ToFollower,
    },
    /// A connection to a peer is closed.
    Closed {
        /// The connection.
        conn: Conn,
    },
    /// After a reset the peer's address refused two connections 50 ms apart: the process is gone.
    DialRefused {
        /// The peer.
        store: StoreId,
    },

    // -- coordinator
    /// A query of a coordinator or of another client has arrived.
    Query {
        /// The number by which [`Effect::QueryReply`] answers.
        query: u64,
        /// The query.
        message: NodeQuery,
    },

    // -- disk
    /// Group `group` and all before it are fsynced.
    Durable {
        /// The number of the group, from [`Effect::Sync`].
        group: u64,
    },
    /// Answers [`Effect::Load`]: what the state contains, in the order of the keys in the request;
    /// `None` where there is no row. All of it is of one moment.
    Loaded {
        /// The number of the load.
        load: u64,
        /// One value for each counter.
        values: Vec<Option<i128>>,
        /// One record for each record id.
        records: Vec<Option<idempotency::TokenRecord>>,
    },
    /// Answers [`Effect::ReadLog`]: the block at `at` was read, and `parts` is what it, and the
    /// log, contain for the followers named here. A follower that is not named wants what lies in
    /// another block, or had no room in this answer.
    LogRead {
        /// The block that was read.
        at: LogLocation,
        /// The entries that were read, by shard and position.
        parts: Vec<LogPart>,
    },
    /// Answers [`Effect::CountRows`].
    RowsCounted {
        /// The number of the count.
        count: u64,
        /// The counts over all rows of the slots, at one moment.
        counts: Box<RowCounts>,
    },
    /// A flush goes on. A driver that reports no progress makes a node wait for the ends of flushes
    /// where it would only be slowed down.
    FlushAdvanced {
        /// The number of the flush.
        flush: u64,
        /// The number of counters that it has written so far.
        counters: usize,
    },
    /// The flush was ingested into the state in one step: loads begun from now on see it.
    Ingested {
        /// The number of the flush.
        flush: u64,
    },
    /// True if the disk is nearly full or the log too long.
    DiskFull(bool),
    /// The number of bytes that may be written to the state before the disk is nearly full, however
    /// long the log is. Reported when it changes; without a report there is no limit.
    Room {
        /// The free bytes.
        bytes: u64,
    },

    // -- snapshots
    /// All of a snapshot has been staged here, with good checksums. `state` is as of its `applied`.
    SnapshotStaged {
        /// The connection.
        conn: Conn,
        /// The number of the snapshot on this connection.
        transfer: u64,
        /// The shard record of the snapshot.
        state: Box<ShardState>,
    },
    /// The staged snapshot was ingested, in one step with its shard record.
    SnapshotInstalled {
        /// The connection.
        conn: Conn,
        /// The number of the snapshot on this connection.
        transfer: u64,
    },
    /// Answers [`Effect::DropRows`]: loads begun from now on see none of the rows.
    RowsDropped {
        /// The shard.
        shard: ShardId,
    },
    /// Answers [`Effect::MeasureSnapshot`].
    SnapshotMeasured {
        /// The number of the snapshot.
        transfer: u64,
        /// The estimated size.
        bytes: u64,
    },
    /// The outgoing snapshot failed.
    SnapshotFailed {
        /// The number of the snapshot.
        transfer: u64,
    },

    /// Answers [`Effect::Scrub`]: every block was read with a good checksum, and `found` is what
    /// the state contains of each shard.
    Scrubbed {
        /// The number of the scrub.
        scrub: u64,
        /// One item for each shard that was read.
        found: Vec<ScrubbedShard>,
    },

    // -- etcd
    /// A shard's record, as a watch has delivered it, or as the answer to the
    /// [`Effect::ReadRecord`] with the number `read`: a linearizable read begun after that effect.
    ShardRecord {
        /// The record.
        record: ShardRecord,
        /// The revision of its last write.
        mod_revision: u64,
        /// The number of the read; `None` for an event of a watch.
        read: Option<u64>,
    },
    /// All `node/` keys: process, and the key's create_revision.
    PeersRegistered(Vec<(StoreBoot, u64)>),
    /// The outcome of a proposal.
    Proposed {
        /// The number of the proposal.
        proposal: u64,
        /// The outcome.
        outcome: CasOutcome,
    },
    /// Answers [`Effect::CheckEtcd`]: the records as a linearizable read begun after it returned
    /// them; `None` if etcd did not answer.
    EtcdChecked {
        /// The number of the check.
        check: u64,
        /// The records of the shards of the check.
        records: Option<Vec<ShardRecord>>,
    },
    /// Etcd has confirmed this node's lease.
    LeaseConfirmed,
    /// Answers [`Effect::ListSessions`]: the ids of the live sessions, and the header revision of
    /// the same read.
    SessionsListed {
        /// The revision of the read.
        at: Revision,
        /// The live sessions.
        alive: Vec<SessionId>,
    },

    // -- the end
    /// The process is to end: hand over what this node leads. [`Effect::Left`] follows.
    Leave,
    /// No coordinator has accepted the report that announces the leave.
    LeaveNotReported,
}

impl Event {
    /// Returns whether the event proves that etcd answered a request of this node. (An event of a
    /// watch may have been in flight for long.)
    pub(super) fn shows_etcd(&self) -> bool {
        match self {
            Self::LeaseConfirmed | Self::SessionsListed { .. } => true,
            Self::ShardRecord { read, .. } => read.is_some(),
            Self::Proposed { outcome, .. } => *outcome != CasOutcome::Unknown,
            Self::EtcdChecked { records, .. } => records.is_some(),
            _ => false,
        }
    }
}

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

/// The outcome of a compare-and-set.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum CasOutcome {
    /// The write took effect; `mod_revision` is the record's new one.
    Done {
        /// The revision of this write.
        mod_revision: u64,
    },
    /// The compare failed: the write has no effect and never will.
    Failed,
    /// The answer was lost: the write may have taken effect, or may yet.
    Unknown,
}

/// The effects of a node: what its driver has to perform.
#[derive(Clone, Debug)]
pub enum Effect {
    // -- disk: the log, in the order given (docs/design.md#order-of-effects)
    /// Append a record to the log.
    Write(LogRecord),
    /// Fsync: the records since the last `Sync` are group `group`, one write and one fsync.
    Sync {
        /// The number of the group: one more than that of the group before.
        group: u64,
    },

    // -- disk: reading, then two more that write in an order (the same table)
    /// Read counters and idempotency records, all at one moment.
    Load {
        /// The number by which [`Event::Loaded`] answers.
        load: u64,
        /// The counters and records to read.
        needs: Needs,
    },
    /// Count all rows of these slots (counters and idempotency records), as of one moment, like a
    /// load: it begins before the next event is handled.
    CountRows {
        /// The number by which [`Event::RowsCounted`] answers.
        count: u64,
        /// The slots of the shard.
        slots: Slots,
        /// The first slot of the right part.
        at: u16,
    },
    /// Read one block of the log, for all followers that want something of it: see
    /// `Index::next_read`. At most one such read is in flight.
    ReadLog {
        /// The positions after which entries are wanted.
        wanted: Vec<WantedEntries>,
        /// The block after which the search begins.
        from: LogLocation,
        /// The most bytes of entries in the answer.
        bytes_max: usize,
    },
    /// Write the table (counters and idempotency records) and the shard records as sorted files
    /// (`layout::rows`) and ingest them in one call.
    Flush {
        /// The number by which [`Event::Ingested`] answers.
        flush: u64,
        /// The table.
        table: Arc<SealedTable>,
        /// The shard records, each with the number of its copy.
        shards: Vec<(CopyNo, ShardState)>,
    },
    /// Delete the log segments that none of these shards needs.
    Trim {
        /// The part of the log that each shard still needs.
        shards: Vec<Needed>,
    },

    // -- sockets
    /// Send a message on a connection that this node dialled.
    ToFollower {
        /// The connection.
        conn: Conn,
        /// The message.
        message: ToFollower,
    },
    /// Send a message on a connection that a peer dialled.
    ToPrimary {
        /// The connection.
        conn: Conn,
        /// The message.
        message: FromFollower,
    },
    /// Send a reply to a gateway.
    Gateway {
        /// The connection.
        conn: Conn,
        /// The reply.
        reply: NodeReply,
    },
    /// Close a connection.
    Close {
        /// The connection.
        conn: Conn,
    },
    /// Answer a query.
    QueryReply {
        /// The number of the query.
        query: u64,
        /// The answer.
        reply: NodeQueryReply,
    },
    /// Report the health of this node and of its shards to the coordinator.
    Report(HealthReport),

    // -- snapshots
    /// Estimate how many bytes the shard's rows take on the disk.
    MeasureSnapshot {
        /// The number of the snapshot.
        transfer: u64,
        /// The slots of the shard.
        slots: Slots,
    },
    /// Send a snapshot of the shard, as it is in the state, to the follower on this connection.
    SendSnapshot {
        /// The connection.
        conn: Conn,
        /// The number of the snapshot.
        transfer: u64,
        /// The shard.
        shard: ShardId,
        /// The slots of the shard.
        slots: Slots,
    },
    /// Ingest the staged snapshot under this copy number, in one step: range delete, rows, shard
    /// record.
    InstallSnapshot {
        /// The connection.
        conn: Conn,
        /// The number of the snapshot on this connection.
        transfer: u64,
        /// The number of the new copy.
        copy: CopyNo,
        /// The slots of the copy that it replaces: those of the new copy, or more of them, if the
        /// shard was split since. All rows there are removed.
        replaces: Slots,
        /// The shard record.
        state: Box<ShardState>,
    },
    /// Delete what was staged.
    DiscardSnapshot {
        /// The connection.
        conn: Conn,
        /// The number of the snapshot on this connection.
        transfer: u64,
    },
    /// Remove the rows of a deleted copy.
    DropRows {
        /// The shard.
        shard: ShardId,
        /// The slots of the shard.
        slots: Slots,
    },

    // -- etcd
    /// Read the shard's record linearizably. Of two reads the later one has the higher number.
    ReadRecord {
        /// The number by which [`Event::ShardRecord`] answers.
        read: u64,
        /// The shard.
        shard: ShardId,
    },
    /// Write `record` if the record in etcd is still at `expect`, and, where a candidate is named,
    /// if its `node/` key still has this create_revision. The driver never retries.
    Propose {
        /// The number by which [`Event::Proposed`] answers.
        proposal: u64,
        /// The mod_revision that the record must have.
        expect: u64,
        /// The new record.
        record: ShardRecord,
        /// A store that is added, and the create_revision of its `node/` key.
        candidate: Option<(StoreId, u64)>,
    },
    /// Write the records of both children of a split, if the record of the parent is still at
    /// `expect` and the right child has none. The driver never retries.
    ProposeSplit {
        /// The number by which [`Event::Proposed`] answers.
        proposal: u64,
        /// The mod_revision that the record of the parent must have.
        expect: u64,
        /// The new record of the parent, which is the left child.
        left: ShardRecord,
        /// The first record of the right child.
        right: ShardRecord,
    },
    /// Read the records of these shards in one linearizable read.
    CheckEtcd {
        /// The number by which [`Event::EtcdChecked`] answers.
        check: u64,
        /// The shards.
        shards: Vec<ShardId>,
    },
    /// List the sessions of all gateways.
    ListSessions,

    // -- the disk, looked after
    /// Read all of the state and the log, as they are after the changes requested before, at no
    /// more than this rate. If `shards` is not empty: of the state these shards only. Damage that a
    /// checksum shows is a disk failure like any other.
    Scrub {
        /// The number by which [`Event::Scrubbed`] answers.
        scrub: u64,
        /// The slots of the shards to read; empty: everything.
        shards: Vec<Slots>,
        /// The highest rate of reading.
        bytes_per_s: u64,
    },
    /// Log what an audit has found.
    Audit(AuditFinding),

    /// Answers [`Event::Leave`]: the process may end, once what is written is durable.
    Left,
    /// The process must end: a newer boot of this store runs, or the disk can't be trusted.
    Exit(ExitReason),
}

/// A finding of an audit. The driver logs it and does nothing else about it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum AuditFinding {
    /// The digests of two copies of a shard differ at one seq.
    DigestsDiffer {
        /// The digest of this node.
        own: DigestPoint,
        /// The other store.
        store: StoreId,
        /// The digest of the other store.
        theirs: DigestPoint,
        /// The side that is right, in words for the log.
        decision: &'static str,
    },
    /// A scrub has ended.
    Scrubbed {
        /// The number of shards that were read.
        shards: u64,
        /// The shards whose copy is damaged.
        damaged: Vec<ShardId>,
    },
}

/// The reason why the process must end.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum ExitReason {
    /// A newer boot of this store is registered: exit code 4.
    NewerBoot(StoreBoot),
    /// The disk can't be trusted: exit code 5.
    Disk(String),
}
