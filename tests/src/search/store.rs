//! A store in the search: the node machine that production runs, with its disk and its clock.
//!
//! Time advances only by [`StoreInput::Tick`]. A peer that would be detected by silence is reported
//! by a refused connection instead, which has the same effect at once. Nothing is flushed, so a log
//! is complete from its first entry, and recovery reads that log.
//!
//! A follower writes and fsyncs in one step unless the world is set otherwise: the difference is
//! not visible to others before its acknowledgement. The messages of a primary leave before its own
//! fsync, so that fsync is a separate step.

use std::collections::VecDeque;

use bytes::Bytes;
use engine::batch::{Batch, Codec};
use engine::entry::{Entry, Position};
use engine::ids::{
    BatchSeq, Boot, Conn, CopyNo, Epoch, Now, Revision, Seq, SessionId, ShardId, Slots, StoreBoot,
    StoreId,
};
use engine::key::CounterKey;
use engine::message::{BatchReply, FromFollower, GatewayMessage, NodeReply, ToFollower};
use engine::node::{CasOutcome, Effect, Event, Node, RecoveredContent, RecoveredReplica, Settings};
use engine::ops::{self, Op, OpKind};
use engine::shard::state::ShardState;
use engine::shard_record::ShardRecord;
use engine::store::log::LogRecord;

use super::machines::Machine;

pub const STORES_MAX: usize = 4;
pub const SHARD: ShardId = ShardId(0);
/// A tick that is long enough for a silence to count as a pause, for a proposal to be repeated, and
/// for an ejected store to return.
const TICK_US: u64 = 1_100_000;

/// A message between two nodes.
#[derive(Clone, Debug)]
pub enum PeerWireMessage {
    To(ToFollower),
    From(FromFollower),
    /// The other end is closed. This is the last message of a connection.
    Closed,
}

/// The settings, and the values that inputs refer to by number.
pub struct StoreContext {
    pub settings: Settings,
    pub stores: usize,
    /// True if the fsync of a follower is a separate step.
    pub slow_fsync: bool,
    pub wires: Interned<PeerWireMessage>,
    pub records: Interned<ShardRecord>,
}

/// Interned values. Values with equal `Debug` texts are equal.
pub struct Interned<T> {
    values: Vec<T>,
    numbers: std::collections::HashMap<u128, u32>,
}

impl<T> Default for Interned<T> {
    fn default() -> Self {
        Self { values: Vec::new(), numbers: Default::default() }
    }
}

impl<T: std::fmt::Debug> Interned<T> {
    pub fn number(&mut self, value: T) -> u32 {
        let next = self.values.len() as u32;
        let print = super::frontier::fingerprint(&format!("{value:?}"));
        let number = *self.numbers.entry(print).or_insert(next);
        if number == next {
            self.values.push(value);
        }
        number
    }

    pub fn get(&self, number: u32) -> &T {
        &self.values[number as usize]
    }
}

#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum StoreInput {
    /// Power is lost and the next boot begins. The first `kept` of the groups that were not fsynced
    /// survive.
    Crash {
        kept: u8,
        boots: [u8; STORES_MAX],
    },
    Peers {
        boots: [u8; STORES_MAX],
    },
    Dialled {
        conn: u64,
        peer: u8,
        boot: u8,
    },
    Accepted {
        conn: u64,
    },
    Received {
        conn: u64,
        wire: u32,
    },
    /// The oldest fsync in flight completes.
    Fsynced,
    Record {
        record: u32,
    },
    Proposed {
        proposal: u64,
        outcome: ProposalOutcome,
    },
    Refused {
        store: u8,
    },
    Order {
        op: u8,
        message: u64,
    },
    Read {
        id: u8,
    },
    EtcdChecked {
        check: u64,
        record: u32,
    },
    Tick,
}

#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum ProposalOutcome {
    Done { version: u64 },
    Failed,
    Unknown,
}

#[derive(Clone, Debug)]
pub enum StoreOutput {
    Send {
        conn: u64,
        wire: u32,
    },
    Close {
        conn: u64,
    },
    Propose {
        proposal: u64,
        expect: u64,
        record: u32,
        candidate: Option<(u8, u64)>,
    },
    Check {
        check: u64,
    },
    /// An op is acknowledged.
    Applied {
        op: u8,
    },
    /// A read is answered, or refused (`None`).
    ReadAnswered {
        id: u8,
        value: Option<i128>,
    },
}

/// The visible state of a store.
#[derive(Debug, Default)]
pub struct StoreSummary {
    pub promised: u64,
    /// The epoch in which it leads, and whether its barrier is committed.
    pub primary: Option<(u64, bool)>,
    pub commit: usize,
    /// The epoch and chain of each entry.
    pub log: Vec<(u64, u64)>,
    /// The epoch and chain of each entry that survives any crash.
    pub durable: Vec<(u64, u64)>,
    /// The number of groups that are written and not fsynced.
    pub unsynced: usize,
    pub stopped: Option<&'static str>,
    /// True if it found a member that lost entries which it had acknowledged.
    pub short: bool,
}

#[derive(Clone, Debug)]
pub struct StoreMachine {
    node: Node,
    disk: StoreDisk,
    now: Now,
}

#[derive(Clone, Debug, Default)]
struct StoreDisk {
    durable: DurableLog,
    /// The groups whose fsync was requested.
    synced: VecDeque<(u64, Vec<LogRecord>)>,
    open: Vec<LogRecord>,
}

/// The content of a log after recovery.
#[derive(Clone, Debug, Default)]
struct DurableLog {
    acted_on: Option<Box<ShardRecord>>,
    promised: Epoch,
    copy: CopyNo,
    held: bool,
    entries: Vec<Entry>,
}

impl DurableLog {
    fn take(&mut self, record: &LogRecord) {
        match record {
            LogRecord::Append { entry, .. } => {
                self.entries.truncate(entry.seq.0 as usize - 1);
                self.entries.push(entry.clone());
            }
            LogRecord::Truncate { after, .. } => self.entries.truncate(after.0 as usize),
            LogRecord::Promise { epoch, .. } => self.promised = *epoch,
            LogRecord::Copy { copy, .. } => (self.copy, self.held) = (*copy, true),
            LogRecord::Drop { copy, .. } => {
                (self.copy, self.held) = (*copy, false);
                self.entries.clear();
            }
            LogRecord::ActedOn(record) => self.acted_on = Some(record.clone()),
            LogRecord::Suspect { .. }
            | LogRecord::Identity(_)
            | LogRecord::Etcd(_)
            | LogRecord::Checkpoint { .. } => {}
        }
    }

    fn recovered(&self) -> RecoveredReplica {
        let last = self.entries.last().map_or(Epoch(0), |entry| entry.epoch);
        let state = ShardState { slots: Slots::ALL, ..ShardState::default() };
        let content = RecoveredContent { state, entries: self.entries.clone(), suspect: false };
        RecoveredReplica {
            shard: SHARD,
            slots: Slots::ALL,
            promised: self.promised.max(last),
            copy: self.copy,
            acted_on: self.acted_on.clone(),
            content: self.held.then_some(content),
        }
    }
}

pub fn store_boot(store: u8, boot: u8) -> StoreBoot {
    StoreBoot { store: StoreId(u128::from(store) + 1), boot: Boot(boot.into()) }
}

pub fn index_of(store: StoreId) -> u8 {
    (store.0 - 1) as u8
}

/// The name of a store in descriptions of steps.
pub fn name(store: usize) -> &'static str {
    ["A", "B", "C", "D"][store]
}

/// Returns the revision at which the `node/` key of a store was created; it differs for every boot.
pub fn key_revision(store: u8, boot: u8) -> u64 {
    u64::from(boot) * 10 + u64::from(store)
}

fn counter() -> CounterKey {
    CounterKey::new(b"n", b"c").expect("a short plain name")
}

/// Returns the digit of an op in a value: the number of times that the op is counted.
pub fn digit(value: i128, op: u8) -> i128 {
    value >> (4 * op) & 15
}

fn batch(op: u8) -> Batch {
    let delta = 1i128 << (4 * op);
    let payload: Bytes = ops::encode(&[Op { counter: counter(), kind: OpKind::Add { delta } }]);
    let session = SessionId(Revision { incarnation: 1, revision: u64::from(op) + 1 });
    Batch::seal(Slots::ALL, session, BatchSeq(1), BatchSeq(1), Codec::Raw, payload)
}

impl StoreMachine {
    /// Creates a store at its first boot, with an empty disk.
    pub fn new(context: &StoreContext, me: u8, boots: [u8; STORES_MAX]) -> Self {
        let mut store = Self {
            node: Node::new(context.settings.clone(), store_boot(me, 1), Now(0), 1, vec![]),
            disk: StoreDisk::default(),
            now: Now(0),
        };
        store.start(context, boots);
        store
    }

    fn start(&mut self, context: &StoreContext, boots: [u8; STORES_MAX]) {
        let gateway = Event::GatewayConnected { conn: self.gateway() };
        for event in [Event::LeaseConfirmed, gateway, peers(context, boots)] {
            self.node.handle(self.now, event, &mut Vec::new());
        }
        self.node.handle(self.now, Event::TurnEnded, &mut Vec::new());
    }

    /// Returns the connection of the gateway, one per boot.
    fn gateway(&self) -> Conn {
        Conn(1_000_000 + self.node.me().boot.0)
    }

    fn crash(&mut self, context: &StoreContext, kept: u8, boots: [u8; STORES_MAX]) {
        let groups = std::mem::take(&mut self.disk.synced);
        for (_, records) in groups.iter().take(kept.into()) {
            records.iter().for_each(|record| self.disk.durable.take(record));
        }
        self.disk.open.clear();
        let me = self.node.me();
        let me = StoreBoot { boot: Boot(me.boot.0 + 1), ..me };
        let found = vec![self.disk.durable.recovered()];
        self.now = Now(0);
        self.node = Node::new(context.settings.clone(), me, self.now, 1, found);
        self.start(context, boots);
    }

    fn event(&mut self, input: StoreInput, context: &StoreContext) -> Option<Event> {
        Some(match input {
            StoreInput::Crash { kept, boots } => {
                self.crash(context, kept, boots);
                return None;
            }
            StoreInput::Peers { boots } => peers(context, boots),
            StoreInput::Dialled { conn, peer, boot } => {
                Event::Dialled { conn: Conn(conn), peer: store_boot(peer, boot) }
            }
            StoreInput::Accepted { conn } => Event::Accepted { conn: Conn(conn) },
            StoreInput::Received { conn, wire } => match context.wires.get(wire).clone() {
                PeerWireMessage::To(message) => Event::FromPrimary { conn: Conn(conn), message },
                PeerWireMessage::From(message) => Event::FromFollower { conn: Conn(conn), message },
                PeerWireMessage::Closed => Event::Closed { conn: Conn(conn) },
            },
            StoreInput::Fsynced => self.fsynced()?,
            StoreInput::Record { record } => {
                let record = context.records.get(record).clone();
                let mod_revision = record.version.0;
                Event::ShardRecord { record, mod_revision, read: None }
            }
            StoreInput::Proposed { proposal, outcome } => {
                let outcome = match outcome {
                    ProposalOutcome::Done { version } => CasOutcome::Done { mod_revision: version },
                    ProposalOutcome::Failed => CasOutcome::Failed,
                    ProposalOutcome::Unknown => CasOutcome::Unknown,
                };
                Event::Proposed { proposal, outcome }
            }
            StoreInput::Refused { store } => {
                Event::DialRefused { store: store_boot(store, 0).store }
            }
            StoreInput::Order { op, message } => {
                let message = GatewayMessage::Frame { message, batches: vec![batch(op)] };
                Event::Gateway { conn: self.gateway(), message }
            }
            StoreInput::Read { id } => {
                let keys = vec![counter()];
                let message = GatewayMessage::Read {
                    id: id.into(),
                    slots: Slots::ALL,
                    keys,
                    max_staleness_ms: None,
                };
                Event::Gateway { conn: self.gateway(), message }
            }
            StoreInput::EtcdChecked { check, record } => {
                let records = Some(vec![context.records.get(record).clone()]);
                Event::EtcdChecked { check, records }
            }
            StoreInput::Tick => {
                self.now = Now(self.now.0 + TICK_US);
                Event::TurnEnded
            }
        })
    }

    fn fsynced(&mut self) -> Option<Event> {
        let (group, records) = self.disk.synced.pop_front()?;
        records.iter().for_each(|record| self.disk.durable.take(record));
        Some(Event::Durable { group })
    }

    fn leads(&self) -> bool {
        self.node.replicas().any(|replica| replica.primary.is_some())
    }

    fn perform(
        &mut self,
        effect: Effect,
        context: &mut StoreContext,
        out: &mut Vec<StoreOutput>,
    ) -> Option<Event> {
        match effect {
            Effect::Write(record) => self.disk.open.push(record),
            Effect::Sync { group } => {
                self.disk.synced.push_back((group, std::mem::take(&mut self.disk.open)));
            }
            Effect::Load { load, needs } => {
                return Some(Event::Loaded {
                    load,
                    values: vec![None; needs.counters.len()],
                    records: vec![None; needs.records.len()],
                });
            }
            Effect::ToFollower { conn, message } => {
                // The rest of a heartbeat is ignored, since no time-out occurs here.
                let message = match message {
                    ToFollower::Heartbeat { commits, .. } if commits.is_empty() => return None,
                    ToFollower::Heartbeat { commits, .. } => {
                        ToFollower::Heartbeat { sent: 0, commits }
                    }
                    other => other,
                };
                let wire = context.wires.number(PeerWireMessage::To(message));
                out.push(StoreOutput::Send { conn: conn.0, wire });
            }
            Effect::ToPrimary { message: FromFollower::Alive { .. }, .. } => {}
            Effect::ToPrimary { conn, message } => {
                let wire = context.wires.number(PeerWireMessage::From(message));
                out.push(StoreOutput::Send { conn: conn.0, wire });
            }
            Effect::Close { conn } => out.push(StoreOutput::Close { conn: conn.0 }),
            Effect::Gateway { reply, .. } => match reply {
                NodeReply::Answer { session, answer: BatchReply::Applied { .. }, .. } => {
                    out.push(StoreOutput::Applied { op: (session.0.revision - 1) as u8 });
                }
                NodeReply::Read { id, result } => {
                    out.push(StoreOutput::ReadAnswered {
                        id: id as u8,
                        value: result.ok().map(|read| read.values[0]),
                    });
                }
                NodeReply::Answer { .. } | NodeReply::ShardState { .. } => {}
            },
            Effect::Propose { proposal, expect, record, candidate } => {
                let record = context.records.number(record);
                let candidate = candidate.map(|(store, key)| (index_of(store), key));
                out.push(StoreOutput::Propose { proposal, expect, record, candidate });
            }
            Effect::CheckEtcd { check, .. } => out.push(StoreOutput::Check { check }),
            // The world delivers records by itself, and nothing here flushes, lags or shuts down.
            Effect::ReadRecord { .. } | Effect::Report(_) | Effect::Trim { .. } => {}
            other => panic!("unexpected effect {other:?}"),
        }
        None
    }
}

fn peers(context: &StoreContext, boots: [u8; STORES_MAX]) -> Event {
    let key = |store: u8| {
        let boot = boots[usize::from(store)];
        (store_boot(store, boot), key_revision(store, boot))
    };
    Event::PeersRegistered((0..context.stores as u8).map(key).collect())
}

impl Machine for StoreMachine {
    type Input = StoreInput;
    type Output = StoreOutput;
    type Summary = StoreSummary;
    type Context = StoreContext;

    fn on(&mut self, input: StoreInput, context: &mut StoreContext, out: &mut Vec<StoreOutput>) {
        let mut events: VecDeque<Event> = self.event(input, context).into_iter().collect();
        while let Some(event) = events.pop_front() {
            let mut effects = Vec::new();
            for event in [event, Event::TurnEnded] {
                self.node.handle(self.now, event, &mut effects);
                self.node.check_invariants();
            }
            for effect in effects {
                events.extend(self.perform(effect, context, out));
            }
            if events.is_empty() && !context.slow_fsync && !self.leads() {
                events.extend(self.fsynced());
            }
        }
    }

    fn now(&self) -> Now {
        self.now
    }

    fn summary(&self) -> StoreSummary {
        let of = |entries: &[Entry]| entries.iter().map(|e| (e.epoch.0, e.chain.0)).collect();
        let mut summary = StoreSummary {
            durable: of(&self.disk.durable.entries),
            unsynced: self.disk.synced.len(),
            short: self.node.durability_violations() > 0,
            ..StoreSummary::default()
        };
        let Some(view) = self.node.replicas().next() else { return summary };
        summary.promised = view.promised.0;
        summary.primary = view.primary.map(|primary| (primary.epoch.0, primary.active));
        summary.commit = view.commit.0 as usize;
        let position = |seq| view.log.position(Seq(seq)).unwrap_or_else(Position::default);
        let all = (1..=view.last.seq.0).map(position);
        summary.log = all.map(|position| (position.epoch.0, position.chain.0)).collect();
        summary.stopped = view.stopped;
        summary
    }
}
