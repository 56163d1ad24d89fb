//! The state machine of a storage node: all its replicas, peer health, reads, flushes, scrubs.
//!
//! ```text
//!   driver                                     node
//!   ──────                                     ────
//!   sockets   ── Frame, Read, Peer ─────────▶  orders, checks, counts acks
//!   log file  ◀── Write … Write, Sync{g} ────  everything since the last Sync is group g
//!             ── Durable{g} ────────────────▶  commit moves, entries apply to the table
//!   state     ◀── Load, Flush ───────────────
//!             ── Loaded, Ingested ──────────▶
//!   etcd      ◀── Propose, ReadRecord, … ────
//!             ── ShardRecord, Proposed, … ──▶
//! ```
//!
//! **The contract for drivers:** perform `Write` and `Sync` in the order given; perform everything
//! else in any order, with the exceptions that docs/design.md#order-of-effects lists. A `Load`
//! begins before the next event is handled: it reads the state as it is now. And the four effects
//! that change or copy the state (`Flush`, `InstallSnapshot`, `DropRows`, and the reading of
//! `SendSnapshot`) happen in the order given. Messages of one connection keep their order, too: a
//! reject comes before the ack of its message. An acknowledgement waits inside the state machine
//! until the fsync that it depends on has come back as an event.
//!
//! The modules: [`writes`] takes batches; [`replication`] feeds followers and follows primaries,
//! [`catch_up`] feeds lagging followers from the log on disk; [`apply_and_flush`] moves commits
//! into the table and the table into the state; [`records`] follows the records in etcd;
//! [`replica_health`] judges which replicas can acknowledge, [`in_sync_set`] decides about the
//! in-sync set; [`reads`] captures values and answers with them, [`read_index`] proves that they
//! are current, [`bounded`] serves reads of bounded staleness on followers; [`snapshots`] sends and
//! installs snapshots of shards; [`collect`] drops the rows of dead sessions, [`expire`] old
//! idempotency records; [`queries`] answers the coordinator; [`audit`] compares copies with each
//! other and with the disk.

pub mod audit;
pub mod connections;
pub mod group_commit;
pub mod health;
pub mod replica_health;

mod apply_and_flush;
mod bounded;
mod catch_up;
mod collect;
mod expire;
mod in_sync_set;
mod leave;
mod memory;
mod queries;
mod read_index;
mod reads;
mod records;
mod replication;
mod settings;
mod snapshots;
mod writes;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::apply::{Needs, ShardState};
use crate::entry::{Entry, Position};
use crate::idempotency::{self, TokenLimits, TokenOutcome};
use crate::ids::{
    Boot, Conn, CopyNo, Epoch, Now, Revision, Seq, SessionId, ShardId, Slots, StoreBoot, StoreId,
    TimeMs,
};
use crate::message::{
    DigestPoint, FromFollower, GatewayMessage, HealthReport, NodeQuery, NodeQueryReply, NodeReply,
    ToFollower,
};
use crate::node::audit::ScrubbedShard;
use crate::replica::Replica;
use crate::replica::log::ReplicaLog;
use crate::replica::primary::Primary;
use crate::shard_record::ShardRecord;
use crate::store::log::LogRecord;
use crate::store::log::catch_up::{LogPart, WantedEntries};
use crate::store::log::index::Needed;
use crate::store::log::scan::LogLocation;
use crate::store::table::{SealedTable, Tables};

pub use settings::{NodeSizes, NodeTiming, Settings, pending_beside_log};

/// The events of a node.
#[derive(Clone, Debug)]
pub enum Event {
    /// The wall clock, reported at least every 100 ms. It moves shard time and decides nothing
    /// else.
    WallClock(TimeMs),
    /// The time given by [`Node::next_deadline`] has come.
    Tick,

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
    ToFollower {
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
    PeerRefused {
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
    Peers(Vec<(StoreBoot, u64)>),
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
    fn shows_etcd(&self) -> bool {
        match self {
            Self::LeaseConfirmed | Self::SessionsListed { .. } => true,
            Self::ShardRecord { read, .. } => read.is_some(),
            Self::Proposed { outcome, .. } => *outcome != CasOutcome::Unknown,
            Self::EtcdChecked { records, .. } => records.is_some(),
            _ => false,
        }
    }
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
    // -- disk: writing effects, in the order given
    /// Append a record to the log.
    Write(LogRecord),
    /// Fsync: what was written since the last `Sync` is group `group`, one log record.
    Sync {
        /// The number of the group: one more than that of the group before.
        group: u64,
    },

    // -- disk: reading
    /// Read counters and idempotency records, all at one moment.
    Load {
        /// The number by which [`Event::Loaded`] answers.
        load: u64,
        /// The counters and records to read.
        needs: Needs,
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
    FromFollower {
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

/// The state of one shard, as recovery found it.
#[derive(Clone, Debug)]
pub struct RecoveredReplica {
    /// The shard.
    pub shard: ShardId,
    /// The slots of the shard.
    pub slots: Slots,
    /// The highest epoch that was promised.
    pub promised: Epoch,
    /// The number of the present copy, or of the last one if the shard has no copy here.
    pub copy: CopyNo,
    /// The content of the copy. `None`: there is no copy, only a promise.
    pub content: Option<RecoveredContent>,
}

/// The content of a copy, as recovery found it.
#[derive(Clone, Debug)]
pub struct RecoveredContent {
    /// The shard record as of the last flush.
    pub state: ShardState,
    /// Entries above `state.applied`, contiguous.
    pub entries: Vec<Entry>,
    /// The copy may be wrong: it is not promotable and is to be replaced by a snapshot.
    pub suspect: bool,
}

/// Counts of requests with a token in the shards that this node led, since it started.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct TokenCounts {
    /// Requests for which a record was made.
    pub recorded: u64,
    /// Requests refused since there was no room for a record.
    pub refused: u64,
}

impl TokenCounts {
    fn count(&mut self, tokens: &[TokenOutcome]) {
        let of = |wanted| tokens.iter().filter(|&&token| token == wanted).count() as u64;
        self.recorded += of(TokenOutcome::Applied);
        self.refused += of(TokenOutcome::Quota);
    }
}

/// A view of a replica, for status and for the checkers of the simulator.
#[derive(Clone, Debug)]
pub struct ReplicaView<'a> {
    /// The shard.
    pub shard: ShardId,
    /// The number of the copy.
    pub copy: CopyNo,
    /// True if there is a copy.
    pub exists: bool,
    /// The highest epoch that was promised.
    pub promised: Epoch,
    /// The end of the log.
    pub last: Position,
    /// The last seq that is fsynced here.
    pub durable: Seq,
    /// The last seq that is known to be committed.
    pub commit: Seq,
    /// The log in memory.
    pub log: &'a ReplicaLog,
    /// The applied state.
    pub state: &'a ShardState,
    /// True if the copy ranks last for promotion: it is wrong, or being filled.
    pub unfit: bool,
    /// The reason why the copy takes no more entries, if it takes none.
    pub stopped: Option<&'static str>,
    /// The state of the primary, if this node leads the shard.
    pub primary: Option<&'a Primary>,
}

/// The state machine of one storage node: all its replicas.
#[derive(Clone, Debug)]
pub struct Node {
    settings: Settings,
    me: StoreBoot,
    now: Now,
    wall: TimeMs,
    next_review: Now,
    next_heartbeat: Now,
    next_report: Now,
    next_expire: Now,
    next_trim: Now,
    next_copy_recheck: Now,
    reported: HealthReport,

    replicas: BTreeMap<ShardId, Replica>,
    /// The newest record of each shard that was seen, and its mod_revision.
    records: BTreeMap<ShardId, (ShardRecord, u64)>,
    /// The `node/` keys: boot and create_revision.
    peers: BTreeMap<StoreId, (Boot, u64)>,

    groups: group_commit::GroupCommit,
    memory: memory::Memory,
    tables: Tables,
    /// The number of ingests so far: a value loaded before an ingest is not added to the tables of
    /// after it.
    ingests: u64,
    flushing: apply_and_flush::Flushing,
    disk_full: bool,
    room_bytes: u64,
    loads: BTreeMap<u64, apply_and_flush::PendingLoad>,

    dialled: BTreeMap<Conn, connections::DialledConnection>,
    dialled_to: BTreeMap<StoreId, Conn>,
    accepted: BTreeMap<Conn, connections::AcceptedConnection>,
    health: health::PeerHealth,
    backoff: in_sync_set::Backoff,

    gateways: BTreeMap<Conn, u64>,
    leaving: leave::Leaving,
    reads: reads::CapturedReads,
    read_index: read_index::ReadIndex,
    bounded: bounded::Bounded,
    transfers: snapshots::SnapshotTransfers,
    catch_up: catch_up::CatchUp,
    collecting: collect::SessionCollection,

    /// Shards whose commit may have moved.
    dirty: BTreeSet<ShardId>,
    /// Shards whose in-sync set may have to change.
    to_review: BTreeSet<ShardId>,
    /// Followers for which there is something to send.
    to_send: BTreeSet<(StoreId, ShardId)>,
    /// Shards that were announced to the gateways as frozen.
    frozen_announced: BTreeSet<ShardId>,
    /// Proposals in flight.
    proposals: BTreeMap<u64, ShardId>,
    next_id: u64,
    durability_violations: u64,
    digest_mismatches: u64,
    token_counts: TokenCounts,
    scrubbing: audit::Scrubbing,
    scrubs: u64,
    scrub_damages: u64,
}

/// The fields a replica may touch, borrowed apart from the replicas themselves.
macro_rules! turn_of {
    ($node:expr, $effects:expr) => {
        $crate::node::group_commit::TurnContext {
            now: $node.now,
            me: $node.me,
            settings: &$node.settings,
            disk_full: $node.disk_full,
            groups: &mut $node.groups,
            effects: $effects,
        }
    };
}
use turn_of;

impl Node {
    /// Creates a node at its start, with what recovery found and the number of its first group. It
    /// leads nothing, whatever the records in etcd are: a process is primary only of epochs that
    /// name its own boot.
    pub fn new(
        settings: Settings,
        me: StoreBoot,
        now: Now,
        next_group: u64,
        recovered: Vec<RecoveredReplica>,
    ) -> Self {
        let recover =
            |found: RecoveredReplica| (found.shard, Replica::recover(found, settings.planted));
        let replicas: BTreeMap<_, _> = recovered.into_iter().map(recover).collect();
        Self {
            me,
            now,
            wall: TimeMs(0),
            next_review: now,
            next_heartbeat: now,
            next_report: now,
            next_expire: now.plus_ms(settings.limits().bucket_ms()),
            next_trim: now.plus_ms(settings.timing.trim_every_ms),
            next_copy_recheck: now.plus_ms(settings.timing.copy_recheck_ms),
            reported: HealthReport::default(),
            memory: memory::Memory::of(replicas.values()),
            replicas,
            records: BTreeMap::new(),
            peers: BTreeMap::new(),
            groups: group_commit::GroupCommit::new(next_group, now),
            tables: Tables::default(),
            ingests: 0,
            flushing: apply_and_flush::Flushing::default(),
            disk_full: false,
            room_bytes: u64::MAX,
            loads: BTreeMap::new(),
            dialled: BTreeMap::new(),
            dialled_to: BTreeMap::new(),
            accepted: BTreeMap::new(),
            health: health::PeerHealth::default(),
            backoff: in_sync_set::Backoff::default(),
            gateways: BTreeMap::new(),
            leaving: leave::Leaving::default(),
            reads: reads::CapturedReads::default(),
            read_index: read_index::ReadIndex::default(),
            bounded: bounded::Bounded::default(),
            transfers: snapshots::SnapshotTransfers::default(),
            catch_up: catch_up::CatchUp::default(),
            collecting: collect::SessionCollection::new(now, settings.collect_every_ms),
            dirty: BTreeSet::new(),
            to_review: BTreeSet::new(),
            to_send: BTreeSet::new(),
            frozen_announced: BTreeSet::new(),
            proposals: BTreeMap::new(),
            next_id: 1,
            durability_violations: 0,
            digest_mismatches: 0,
            token_counts: TokenCounts::default(),
            scrubbing: audit::Scrubbing::default(),
            scrubs: 0,
            scrub_damages: 0,
            settings,
        }
    }

    /// Handles one event and appends the effects that the driver has to perform to `effects`.
    pub fn handle(&mut self, now: Now, event: Event, effects: &mut Vec<Effect>) {
        if now.ms_since(self.now) > self.settings.timing.gap_ms {
            self.health.reset_after_pause(now);
            let led = self.replicas.values_mut().filter_map(Replica::primary_mut);
            led.for_each(|primary| primary.progress.reset_after_pause(now));
        }
        self.now = self.now.max(now);
        if event.shows_etcd() {
            self.health.note_etcd_answer(self.now);
        }
        self.dispatch(event, effects);
        if self.now >= self.next_review {
            self.next_review = self.now.plus_ms(self.settings.timing.review_every_ms);
            self.on_time(effects);
        }
        self.settle(effects);
    }

    /// Returns the time at which to call `handle` with [`Event::Tick`] if no event comes before.
    pub fn next_deadline(&self) -> Option<Now> {
        let deadlines =
            [Some(self.next_review), self.read_index.deadline(), self.bounded.deadline()];
        deadlines.into_iter().flatten().min()
    }

    fn dispatch(&mut self, event: Event, effects: &mut Vec<Effect>) {
        match event {
            Event::WallClock(time) => self.wall = time,
            Event::Tick => {}

            Event::GatewayConnected { conn } => self.on_gateway_connected(conn, effects),
            Event::Gateway { conn, message } => self.on_gateway(conn, message, effects),
            Event::GatewayGone { conn } => self.on_gateway_gone(conn),

            Event::Dialled { conn, peer } => self.on_dialled(conn, peer, effects),
            Event::Accepted { conn } => {
                self.accepted.insert(conn, connections::AcceptedConnection::default());
            }
            Event::FromFollower { conn, message } => self.on_from_follower(conn, message, effects),
            Event::ToFollower { conn, message } => self.on_to_follower(conn, message, effects),
            Event::Closed { conn } => self.on_closed(conn),
            Event::PeerRefused { store } => self.on_peer_refused(store),

            Event::Query { query, message } => self.on_query(query, message, effects),

            Event::Durable { group } => self.on_durable(group, effects),
            Event::Loaded { load, values, records } => {
                self.on_loaded(load, values, records, effects);
            }
            Event::LogRead { at, parts } => self.on_log_read(at, parts, effects),
            Event::Ingested { flush } => self.on_ingested(flush, effects),
            Event::DiskFull(full) => self.on_disk_full(full, effects),
            Event::Room { bytes } => self.room_bytes = bytes,

            Event::SnapshotStaged { conn, transfer, state } => {
                self.on_snapshot_staged(conn, transfer, *state, effects);
            }
            Event::SnapshotInstalled { conn, transfer } => {
                self.on_snapshot_installed(conn, transfer, effects);
            }
            Event::RowsDropped { shard } => self.on_rows_dropped(shard, effects),
            Event::SnapshotMeasured { transfer, bytes } => {
                self.on_snapshot_measured(transfer, bytes, effects);
            }
            Event::SnapshotFailed { transfer } => self.on_snapshot_failed(transfer),
            Event::Scrubbed { scrub, found } => self.on_scrubbed(scrub, found, effects),

            Event::ShardRecord { record, mod_revision, read } => {
                self.on_record(record, mod_revision, read, effects);
            }
            Event::Peers(peers) => self.on_peers(peers, effects),
            Event::Proposed { proposal, outcome } => self.on_proposed(proposal, outcome, effects),
            Event::EtcdChecked { check, records } => {
                self.on_etcd_checked(check, records, effects);
            }
            Event::LeaseConfirmed => {}
            Event::SessionsListed { at, alive } => self.on_sessions_listed(at, alive, effects),

            Event::Leave => self.leave(effects),
            Event::LeaveNotReported => self.on_leave_not_reported(),
        }
    }

    /// Does what is due by the clock.
    fn on_time(&mut self, effects: &mut Vec<Effect>) {
        if self.now >= self.next_heartbeat {
            self.next_heartbeat = self.now.plus_ms(self.settings.heartbeat_ms);
            self.send_heartbeats(effects);
        }
        if self.groups.fsync_age_ms(self.now) >= self.settings.disk_probe_every_ms {
            self.groups.probe(self.now, effects);
        }
        self.note_unacked();
        self.retry_snapshots();
        let led = self.replicas.iter().filter(|(_, replica)| replica.primary().is_some());
        self.to_review.extend(led.map(|(&shard, _)| shard));
        self.flush_if_due(effects);
        self.trim_if_due(effects);
        self.recheck_unassigned_copies(effects);
        self.collect_if_due(effects);
        self.expire_if_due(effects);
        self.scrub_if_due(effects);
        self.report(effects);
    }

    /// Processes the consequences of an event until nothing is left to do.
    fn settle(&mut self, effects: &mut Vec<Effect>) {
        loop {
            while let Some(shard) = self.dirty.pop_first() {
                self.advance(shard, effects);
                self.announce_availability(shard, effects);
                self.answer_waiting(shard, effects);
                self.count_log(shard);
            }
            let Some(shard) = self.to_review.pop_first() else { break };
            self.review(shard, effects);
            self.announce_availability(shard, effects);
        }
        self.shrink_logs();
        self.advance_claims(effects);
        self.advance_bounded(effects);
        self.send_slices(effects);
        self.read_log_if_due(effects);
        self.groups.sync_if_idle(self.now, effects);
        self.send_due_acks(effects);
        self.finish_leaving(effects);
    }

    /// Returns a number that this process has not used before.
    fn fresh_id(&mut self) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        id
    }

    fn min_in_sync(&self) -> usize {
        self.settings.min_in_sync
    }

    fn is_silent(&self, store: StoreId) -> bool {
        self.health.is_silent(store, self.now, self.settings.silent_after_ms)
    }

    // ---- for status, and for the checkers of the simulator -------------------------------------

    /// Returns the store and the boot that this node is.
    pub fn me(&self) -> StoreBoot {
        self.me
    }

    /// Returns a view of every replica.
    pub fn replicas(&self) -> impl Iterator<Item = ReplicaView<'_>> {
        self.replicas.values().map(Replica::view)
    }

    /// Returns whether the disk is full: writes are refused, reads are served.
    pub fn is_disk_full(&self) -> bool {
        self.disk_full
    }

    /// Returns the tables, as reads see them now.
    pub fn tables(&self) -> &Tables {
        &self.tables
    }

    /// Returns the limits of idempotency records.
    pub fn limits(&self) -> TokenLimits {
        self.settings.limits()
    }

    /// Returns the counts of requests with a token.
    pub fn token_counts(&self) -> TokenCounts {
        self.token_counts
    }

    /// Returns the number of in-sync members that were found to have lost acknowledged entries.
    pub fn durability_violations(&self) -> u64 {
        self.durability_violations
    }

    /// Returns the number of follower digests that differed from this node's own at the same seq.
    pub fn digest_mismatches(&self) -> u64 {
        self.digest_mismatches
    }

    /// Returns the number of scrubs that have ended, and of copies that they found damaged.
    pub fn scrubs(&self) -> (u64, u64) {
        (self.scrubs, self.scrub_damages)
    }

    /// Returns the number of reads that wait for a value or for a proof.
    pub fn waiting_reads(&self) -> usize {
        self.reads.len() + self.bounded.len()
    }

    /// Returns the status of the last scrub.
    pub fn last_scrub(&self) -> crate::message::ScrubStatus {
        self.scrub_status()
    }

    /// Panics if an invariant is broken. The simulator calls it after every event.
    pub fn check_invariants(&self) {
        self.replicas.values().for_each(Replica::check_invariants);
        self.check_memory();
    }
}
