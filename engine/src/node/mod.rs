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
//! else whenever you like, with two exceptions. Begin a `Load` before the next event is handled: it
//! reads the state as it is now. And the four that change the state (`Flush`, `InstallSnapshot`,
//! `DropRows`, and the reading of `SendSnapshot`) happen in the order given. An acknowledgement
//! waits inside the machine until the fsync that it speaks of has come back as an event.
//!
//! The rooms: [`writes`] takes batches; [`peers`] feeds followers and follows primaries, [`catch_up`] feeds from the log on
//! disk those that lag; [`disk`]
//! moves commits into the table and the table into the state; [`records`] takes what etcd says;
//! [`standing`] judges who can acknowledge, [`review`] decides about the in-sync set; [`reads`] takes values and tells them, [`proving`] proves
//! them current, [`bounded`] lets followers tell how old theirs are; [`snapshots`] moves whole copies;
//! [`collect`] drops dead sessions, [`expire`] old idempotency records; [`queries`] answers the coordinator; [`audit`]
//! compares copies with each other and with the disk.
pub mod audit;
pub mod health;
mod leave;
pub mod links;
mod memory;
pub mod turn;

mod bounded;
mod catch_up;
mod collect;
mod disk;
mod expire;
mod peers;
mod proving;
mod queries;
mod reads;
mod records;
mod review;
mod settings;
mod snapshots;
pub mod standing;
mod writes;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::apply::{Needs, ShardState};
use crate::config::ShardConfig;
use crate::entry::{Entry, Position};
use crate::idempotency::{self, Limits, TokenOutcome};
use crate::ids::{
    Boot, Conn, CopyNo, Epoch, Now, Revision, Seq, SessionId, ShardId, Slots, StoreBoot, StoreId,
    TimeMs,
};
use crate::message::{
    DigestPoint, FromFollower, GatewayMessage, NodeQuery, NodeQueryReply, NodeReply, Report,
    ToFollower,
};
use crate::node::audit::OnDisk;
use crate::replica::Replica;
use crate::replica::log::ReplicaLog;
use crate::replica::primary::Primary;
use crate::store::log::Record;
use crate::store::log::catch_up::{LogPart, Wanted};
use crate::store::log::index::Needed;
use crate::store::log::scan::Place;
use crate::store::table::{Frozen, Tables};

pub use settings::{Settings, Sizes, Timing, pending_beside_log};

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
    /// Answers `Load`: what the state holds, in the order of what was asked for; none where there is no
    /// row. All of it is of one moment.
    Loaded {
        load: u64,
        values: Vec<Option<i128>>,
        records: Vec<Option<idempotency::Record>>,
    },
    /// Answers `ReadLog`: the block at `at` was read, and this is what it, and the log, hold for those named here. Who is
    /// not named wants what lies in another block, or had no room in this answer.
    LogRead {
        at: Place,
        parts: Vec<LogPart>,
    },
    /// The flush is in the state, in one step: loads begun from now on see it.
    Ingested {
        flush: u64,
    },
    /// The disk is nearly full, or the log is too long; or neither any longer.
    DiskFull(bool),
    /// Bytes that may be written to the state before the disk is nearly full, however long the log is. Told when that
    /// changes; without it there is no limit.
    Room {
        bytes: u64,
    },

    // -- snapshots
    /// All of a copy has been staged here, checksums good. `state` is as of its `applied`.
    SnapshotStaged {
        conn: Conn,
        transfer: u64,
        state: Box<ShardState>,
    },
    /// The staged copy was ingested, in one step with its shard record.
    SnapshotInstalled {
        conn: Conn,
        transfer: u64,
    },
    /// Answers `DropRows`: loads begun from now on see none of them.
    RowsDropped {
        shard: ShardId,
    },
    /// Answers `MeasureSnapshot`.
    SnapshotMeasured {
        transfer: u64,
        bytes: u64,
    },
    /// The outgoing transfer can't go on.
    SnapshotFailed {
        transfer: u64,
    },

    /// Answers `Scrub`: every block was read, its checksum is good, and this is what the shards in the state amount to.
    Scrubbed {
        scrub: u64,
        found: Vec<OnDisk>,
    },

    // -- etcd
    /// A shard's record, as a watch has seen it, or this `ReadConfig`: a linearizable read begun after that effect.
    Config {
        config: ShardConfig,
        mod_revision: u64,
        read: Option<u64>,
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

    // -- the end
    /// The process is to end: see that nobody misses it. `Left` follows.
    Leave,
    /// The report that says so was taken by no coordinator.
    LeaveUnheard,
}

impl Event {
    /// Etcd has answered what this node asked of it. (What a watch brings may be on its way for long.)
    fn shows_etcd(&self) -> bool {
        match self {
            Self::LeaseConfirmed | Self::SessionsListed { .. } => true,
            Self::Config { read, .. } => read.is_some(),
            Self::Proposed { outcome, .. } => *outcome != CasOutcome::Unknown,
            Self::EtcdChecked { configs, .. } => configs.is_some(),
            _ => false,
        }
    }
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
    /// Counters and idempotency records, in one read.
    Load {
        load: u64,
        needs: Needs,
    },
    /// One block of the log, for all who want something of it: see `Index::next_read`. Never two at a time.
    ReadLog {
        wanted: Vec<Wanted>,
        from: Place,
        bytes_max: usize,
    },
    /// Write the table (counters and idempotency records) and the shard records as sorted files
    /// (`layout::rows`) and ingest them in one call.
    Flush {
        flush: u64,
        table: Arc<Frozen>,
        shards: Vec<(CopyNo, ShardState)>,
    },
    /// Segments may go as far as this allows.
    Trim {
        shards: Vec<Needed>,
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
    /// How many bytes do the shard's rows take on the disk, about?
    MeasureSnapshot {
        transfer: u64,
        slots: Slots,
    },
    /// Send the copy, as it stands in the state, to the follower on this connection.
    SendSnapshot {
        conn: Conn,
        transfer: u64,
        shard: ShardId,
        slots: Slots,
    },
    /// Ingest the staged copy under this number, in one step: range delete, rows, shard record.
    InstallSnapshot {
        conn: Conn,
        transfer: u64,
        copy: CopyNo,
        state: Box<ShardState>,
    },
    /// Forget what was staged.
    DiscardSnapshot {
        conn: Conn,
        transfer: u64,
    },
    /// Remove the rows of a deleted copy.
    DropRows {
        shard: ShardId,
        slots: Slots,
    },

    // -- etcd
    /// Read the shard's record linearizably. Of two reads the later one has the higher number.
    ReadConfig {
        read: u64,
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

    // -- the disk, looked after
    /// Read all of the state and the log, as they stand after the changes asked for before, at no more than this rate.
    /// With shards: of the state these alone. Damage that a checksum sees is a failure of the disk like any other.
    Scrub {
        scrub: u64,
        shards: Vec<Slots>,
        bytes_per_s: u64,
    },
    /// Somebody should know.
    Found(Finding),

    /// Answers `Leave`: the process may end, once what is written is durable.
    Left,
    /// The process must end: a newer boot of this store runs, or what is on disk can't be trusted.
    Exit(ExitReason),
}

/// What an audit has found: for the log, and nothing is done about it by the driver.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Finding {
    /// Two copies of a shard differ at one seq.
    DigestsDiffer { own: DigestPoint, store: StoreId, theirs: DigestPoint, believed: &'static str },
    /// A scrub has ended.
    Scrubbed { shards: u64, damaged: Vec<ShardId> },
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

/// Requests with a token, in shards that this node led, since it started.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct TokensTold {
    /// A record was made.
    pub recorded: u64,
    /// There was no room for one.
    pub refused: u64,
}

impl TokensTold {
    fn count(&mut self, tokens: &[TokenOutcome]) {
        let of = |wanted| tokens.iter().filter(|&&token| token == wanted).count() as u64;
        self.recorded += of(TokenOutcome::Applied);
        self.refused += of(TokenOutcome::Quota);
    }
}

/// What is to be seen of a replica: for status, and for the simulator's oracles.
#[derive(Clone, Debug)]
pub struct ReplicaView<'a> {
    pub shard: ShardId,
    pub copy: CopyNo,
    pub exists: bool,
    pub promised: Epoch,
    pub last: Position,
    pub durable: Seq,
    pub commit: Seq,
    pub log: &'a ReplicaLog,
    pub state: &'a ShardState,
    pub unfit: bool,
    pub stopped: Option<&'static str>,
    pub primary: Option<&'a Primary>,
}

/// All replicas of one storage node.
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
    next_ask: Now,
    reported: Report,

    replicas: BTreeMap<ShardId, Replica>,
    /// The newest record of each shard that was seen, and its mod_revision.
    records: BTreeMap<ShardId, (ShardConfig, u64)>,
    /// The `node/` keys: boot and create_revision.
    peers: BTreeMap<StoreId, (Boot, u64)>,

    groups: turn::Groups,
    memory: memory::Memory,
    tables: Tables,
    /// How many ingests there have been: a value loaded before one is not added to the tables of
    /// after it.
    snapshot: u64,
    flushing: disk::Flushing,
    disk_full: bool,
    room_bytes: u64,
    loads: BTreeMap<u64, disk::LoadFor>,

    dialled: BTreeMap<Conn, links::Dialled>,
    dialled_to: BTreeMap<StoreId, Conn>,
    accepted: BTreeMap<Conn, links::Accepted>,
    health: health::Health,
    backoff: review::Backoff,

    gateways: BTreeMap<Conn, u64>,
    leaving: leave::Leaving,
    reads: reads::Reads,
    proving: proving::Proving,
    bounded: bounded::Bounded,
    transfers: snapshots::Transfers,
    catch_up: catch_up::CatchUp,
    collecting: collect::Collecting,

    /// Shards whose commit may have moved.
    dirty: BTreeSet<ShardId>,
    /// Shards whose in-sync set may have to change.
    to_review: BTreeSet<ShardId>,
    /// Followers with something to send.
    to_send: BTreeSet<(StoreId, ShardId)>,
    /// Shards of which gateways were told that they are frozen.
    frozen_told: BTreeSet<ShardId>,
    /// Proposals under way.
    proposals: BTreeMap<u64, ShardId>,
    next_id: u64,
    durability_violations: u64,
    digest_mismatches: u64,
    tokens_told: TokensTold,
    scrubbing: audit::Scrubbing,
    scrubs: u64,
    scrub_damages: u64,
}

/// The fields a replica may touch, borrowed apart from the replicas themselves.
macro_rules! turn_of {
    ($node:expr, $effects:expr) => {
        $crate::node::turn::Turn {
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
    /// A node as it starts, with what recovery found and the number of its first group. It leads
    /// nothing, whatever etcd says: a process is primary only of epochs that name its own boot.
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
            next_ask: now.plus_ms(settings.timing.ask_again_ms),
            reported: Report::default(),
            memory: memory::Memory::of(replicas.values()),
            replicas,
            records: BTreeMap::new(),
            peers: BTreeMap::new(),
            groups: turn::Groups::new(next_group, now),
            tables: Tables::default(),
            snapshot: 0,
            flushing: disk::Flushing::default(),
            disk_full: false,
            room_bytes: u64::MAX,
            loads: BTreeMap::new(),
            dialled: BTreeMap::new(),
            dialled_to: BTreeMap::new(),
            accepted: BTreeMap::new(),
            health: health::Health::default(),
            backoff: review::Backoff::default(),
            gateways: BTreeMap::new(),
            leaving: leave::Leaving::default(),
            reads: reads::Reads::default(),
            proving: proving::Proving::default(),
            bounded: bounded::Bounded::default(),
            transfers: snapshots::Transfers::default(),
            catch_up: catch_up::CatchUp::default(),
            collecting: collect::Collecting::new(now, settings.collect_every_ms),
            dirty: BTreeSet::new(),
            to_review: BTreeSet::new(),
            to_send: BTreeSet::new(),
            frozen_told: BTreeSet::new(),
            proposals: BTreeMap::new(),
            next_id: 1,
            durability_violations: 0,
            digest_mismatches: 0,
            tokens_told: TokensTold::default(),
            scrubbing: audit::Scrubbing::default(),
            scrubs: 0,
            scrub_damages: 0,
            settings,
        }
    }

    /// Handles one event; what is to be done about it is added to `effects`.
    pub fn handle(&mut self, now: Now, event: Event, effects: &mut Vec<Effect>) {
        if now.ms_since(self.now) > self.settings.timing.gap_ms {
            self.health.forgive(now);
            let led = self.replicas.values_mut().filter_map(Replica::primary_mut);
            led.for_each(|primary| primary.progress.forgive(now));
        }
        self.now = self.now.max(now);
        if event.shows_etcd() {
            self.health.etcd_heard(self.now);
        }
        self.dispatch(event, effects);
        if self.now >= self.next_review {
            self.next_review = self.now.plus_ms(self.settings.timing.review_every_ms);
            self.on_time(effects);
        }
        self.settle(effects);
    }

    /// When to call `handle` with `Event::Tick`, if nothing else happens before.
    pub fn next_deadline(&self) -> Option<Now> {
        let deadlines = [Some(self.next_review), self.proving.deadline(), self.bounded.deadline()];
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
                self.accepted.insert(conn, links::Accepted::default());
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

            Event::Config { config, mod_revision, read } => {
                self.on_record(config, mod_revision, read, effects);
            }
            Event::Peers(peers) => self.on_peers(peers, effects),
            Event::Proposed { proposal, outcome } => self.on_proposed(proposal, outcome, effects),
            Event::EtcdChecked { check, configs } => {
                self.on_etcd_checked(check, configs, effects);
            }
            Event::LeaseConfirmed => {}
            Event::SessionsListed { at, alive } => self.on_sessions_listed(at, alive, effects),

            Event::Leave => self.leave(effects),
            Event::LeaveUnheard => self.on_leave_unheard(),
        }
    }

    /// What is due by the clock.
    fn on_time(&mut self, effects: &mut Vec<Effect>) {
        if self.now >= self.next_heartbeat {
            self.next_heartbeat = self.now.plus_ms(self.settings.heartbeat_ms);
            self.send_heartbeats(effects);
        }
        if self.groups.fsync_age_ms(self.now) >= self.settings.disk_probe_every_ms {
            self.groups.probe(self.now, effects);
        }
        self.note_debts();
        self.retry_snapshots();
        let led = self.replicas.iter().filter(|(_, replica)| replica.primary().is_some());
        self.to_review.extend(led.map(|(&shard, _)| shard));
        self.flush_if_due(effects);
        self.trim_if_due(effects);
        self.ask_of_leftovers(effects);
        self.collect_if_due(effects);
        self.expire_if_due(effects);
        self.scrub_if_due(effects);
        self.report(effects);
    }

    /// Follows up on what the event has changed, until nothing more follows.
    fn settle(&mut self, effects: &mut Vec<Effect>) {
        loop {
            while let Some(shard) = self.dirty.pop_first() {
                self.advance(shard, effects);
                self.tell_gateways(shard, effects);
                self.tell_waiting(shard, effects);
                self.count_log(shard);
            }
            let Some(shard) = self.to_review.pop_first() else { break };
            self.review(shard, effects);
            self.tell_gateways(shard, effects);
        }
        self.shrink_logs();
        self.advance_claims(effects);
        self.advance_bounded(effects);
        self.send_slices(effects);
        self.read_log_if_due(effects);
        self.groups.sync_if_idle(self.now, effects);
        self.pay_acks(effects);
        self.leave_if_free(effects);
    }

    /// A number that this process has not used before.
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

    // ---- for status, and for the simulator's oracles ------------------------------------------

    pub fn me(&self) -> StoreBoot {
        self.me
    }

    /// Every replica there is.
    pub fn replicas(&self) -> impl Iterator<Item = ReplicaView<'_>> {
        self.replicas.values().map(Replica::view)
    }

    /// The disk has no room: writes are refused, reads are served.
    pub fn is_disk_full(&self) -> bool {
        self.disk_full
    }

    /// The tables, as reads see them now.
    pub fn tables(&self) -> &Tables {
        &self.tables
    }

    /// By what idempotency records are limited.
    pub fn limits(&self) -> Limits {
        self.settings.limits()
    }

    /// What became of requests with a token.
    pub fn tokens_told(&self) -> TokensTold {
        self.tokens_told
    }

    /// In-sync members that had lost what they had acknowledged.
    pub fn durability_violations(&self) -> u64 {
        self.durability_violations
    }

    /// Digests of followers that differed from this node's own at the same seq.
    pub fn digest_mismatches(&self) -> u64 {
        self.digest_mismatches
    }

    /// Scrubs that have ended, and copies that they found to be wrong.
    pub fn scrubs(&self) -> (u64, u64) {
        (self.scrubs, self.scrub_damages)
    }

    /// Reads that wait for a value or for a proof.
    pub fn waiting_reads(&self) -> usize {
        self.reads.len() + self.bounded.len()
    }

    /// What the last scrub found.
    pub fn last_scrub(&self) -> crate::message::ScrubStatus {
        self.scrub_status()
    }

    /// Panics if something that must hold does not. The simulator asks after every event.
    pub fn check_invariants(&self) {
        self.replicas.values().for_each(Replica::check_invariants);
        self.check_memory();
    }
}
