//! One store as the search sees it: the node machine that production runs, its disk, and its clock.
//!
//! Time stands still but for [`Cause::Tick`], and what needs a silence is told by a refused connection,
//! which is silence at once. The state on disk never takes a flush, so a log is whole from its first
//! entry, and recovery is that log read again.
//!
//! A follower writes and fsyncs in one step unless the world says otherwise: until it acknowledges, nobody
//! can tell whether it has. A primary's messages leave before its own fsync, so that is a step of its own.

use std::collections::VecDeque;

use bytes::Bytes;
use engine::apply::ShardState;
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
use engine::shard_record::ShardRecord;
use engine::store::log::LogRecord;

use super::machines::Machine;

pub const STORES_MAX: usize = 4;
pub const SHARD: ShardId = ShardId(0);
/// Enough for any silence to be forgiven, for a proposal to be made again, for an ejected store to return.
const TICK_US: u64 = 1_100_000;

/// What travels between two nodes.
#[derive(Clone, Debug)]
pub enum Wire {
    To(ToFollower),
    From(FromFollower),
    /// The other end is gone: the last thing on a connection.
    Closed,
}

/// What causes refer to by number.
pub struct Table {
    pub settings: Settings,
    pub stores: usize,
    /// A follower's fsync is a step of its own.
    pub slow_fsync: bool,
    pub wires: Interned<Wire>,
    pub configs: Interned<ShardRecord>,
}

/// Values, each kept once: equal is what prints alike.
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
pub enum Cause {
    /// Power is lost, so many of the groups that were not fsynced are there all the same, and the next
    /// boot begins.
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
    /// The oldest fsync under way comes back.
    Fsynced,
    Config {
        config: u32,
    },
    Proposed {
        proposal: u64,
        outcome: Settled,
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
        config: u32,
    },
    Tick,
}

#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Settled {
    Done { version: u64 },
    Failed,
    Unknown,
}

#[derive(Clone, Debug)]
pub enum Out {
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
        config: u32,
        candidate: Option<(u8, u64)>,
    },
    Check {
        check: u64,
    },
    /// The op is acknowledged.
    Applied {
        op: u8,
    },
    /// A read was answered, or refused.
    Told {
        id: u8,
        value: Option<i128>,
    },
}

/// What is to be seen of a store.
#[derive(Debug, Default)]
pub struct Face {
    pub promised: u64,
    /// Leads in this epoch; its barrier is committed.
    pub primary: Option<(u64, bool)>,
    pub commit: usize,
    /// Epoch and chain of each entry.
    pub log: Vec<(u64, u64)>,
    /// The same, of what no crash takes.
    pub durable: Vec<(u64, u64)>,
    /// Groups written and not fsynced.
    pub unsynced: usize,
    pub stopped: Option<&'static str>,
    /// It found a member that had lost what it acknowledged.
    pub short: bool,
}

#[derive(Clone, Debug)]
pub struct Store {
    node: Node,
    disk: Disk,
    now: Now,
}

#[derive(Clone, Debug, Default)]
struct Disk {
    durable: Kept,
    /// Groups whose fsync has been asked for.
    synced: VecDeque<(u64, Vec<LogRecord>)>,
    open: Vec<LogRecord>,
}

/// What a log amounts to.
#[derive(Clone, Debug, Default)]
struct Kept {
    promised: Epoch,
    copy: CopyNo,
    held: bool,
    entries: Vec<Entry>,
}

impl Kept {
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
            LogRecord::Suspect { .. } | LogRecord::Identity(_) | LogRecord::Checkpoint { .. } => {}
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

/// Where a store's `node/` key was made: it moves with every boot.
pub fn key_revision(store: u8, boot: u8) -> u64 {
    u64::from(boot) * 10 + u64::from(store)
}

fn counter() -> CounterKey {
    CounterKey::new(b"n", b"c").expect("a short plain name")
}

/// Each op adds to a digit of its own, so a value shows which are in it, and how often.
pub fn digit(value: i128, op: u8) -> i128 {
    value >> (4 * op) & 15
}

fn batch(op: u8) -> Batch {
    let delta = 1i128 << (4 * op);
    let payload: Bytes = ops::encode(&[Op { counter: counter(), kind: OpKind::Add { delta } }]);
    let session = SessionId(Revision { incarnation: 1, revision: u64::from(op) + 1 });
    Batch::seal(Slots::ALL, session, BatchSeq(1), BatchSeq(1), Codec::Raw, payload)
}

impl Store {
    /// A store at its first boot, with nothing on its disk.
    pub fn new(table: &Table, me: u8, boots: [u8; STORES_MAX]) -> Self {
        let mut store = Self {
            node: Node::new(table.settings.clone(), store_boot(me, 1), Now(0), 1, vec![]),
            disk: Disk::default(),
            now: Now(0),
        };
        store.start(table, boots);
        store
    }

    fn start(&mut self, table: &Table, boots: [u8; STORES_MAX]) {
        let gateway = Event::GatewayConnected { conn: self.gateway() };
        for event in [Event::LeaseConfirmed, gateway, peers(table, boots)] {
            self.node.handle(self.now, event, &mut Vec::new());
        }
    }

    /// One connection per boot.
    fn gateway(&self) -> Conn {
        Conn(1_000_000 + self.node.me().boot.0)
    }

    fn crash(&mut self, table: &Table, kept: u8, boots: [u8; STORES_MAX]) {
        let groups = std::mem::take(&mut self.disk.synced);
        for (_, records) in groups.iter().take(kept.into()) {
            records.iter().for_each(|record| self.disk.durable.take(record));
        }
        self.disk.open.clear();
        let me = self.node.me();
        let me = StoreBoot { boot: Boot(me.boot.0 + 1), ..me };
        let found = vec![self.disk.durable.recovered()];
        self.now = Now(0);
        self.node = Node::new(table.settings.clone(), me, self.now, 1, found);
        self.start(table, boots);
    }

    fn event(&mut self, cause: Cause, table: &Table) -> Option<Event> {
        Some(match cause {
            Cause::Crash { kept, boots } => {
                self.crash(table, kept, boots);
                return None;
            }
            Cause::Peers { boots } => peers(table, boots),
            Cause::Dialled { conn, peer, boot } => {
                Event::Dialled { conn: Conn(conn), peer: store_boot(peer, boot) }
            }
            Cause::Accepted { conn } => Event::Accepted { conn: Conn(conn) },
            Cause::Received { conn, wire } => match table.wires.get(wire).clone() {
                Wire::To(message) => Event::ToFollower { conn: Conn(conn), message },
                Wire::From(message) => Event::FromFollower { conn: Conn(conn), message },
                Wire::Closed => Event::Closed { conn: Conn(conn) },
            },
            Cause::Fsynced => self.fsynced()?,
            Cause::Config { config } => {
                let config = table.configs.get(config).clone();
                let mod_revision = config.version.0;
                Event::ShardRecord { record: config, mod_revision, read: None }
            }
            Cause::Proposed { proposal, outcome } => {
                let outcome = match outcome {
                    Settled::Done { version } => CasOutcome::Done { mod_revision: version },
                    Settled::Failed => CasOutcome::Failed,
                    Settled::Unknown => CasOutcome::Unknown,
                };
                Event::Proposed { proposal, outcome }
            }
            Cause::Refused { store } => Event::PeerRefused { store: store_boot(store, 0).store },
            Cause::Order { op, message } => {
                let message = GatewayMessage::Frame { message, batches: vec![batch(op)] };
                Event::Gateway { conn: self.gateway(), message }
            }
            Cause::Read { id } => {
                let keys = vec![counter()];
                let message = GatewayMessage::Read {
                    id: id.into(),
                    slots: Slots::ALL,
                    keys,
                    max_staleness_ms: None,
                };
                Event::Gateway { conn: self.gateway(), message }
            }
            Cause::EtcdChecked { check, config } => {
                let configs = Some(vec![table.configs.get(config).clone()]);
                Event::EtcdChecked { check, records: configs }
            }
            Cause::Tick => {
                self.now = Now(self.now.0 + TICK_US);
                Event::Tick
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

    fn perform(&mut self, effect: Effect, table: &mut Table, out: &mut Vec<Out>) -> Option<Event> {
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
                // A heartbeat says that its sender lives, which no time here doubts, and commits.
                let message = match message {
                    ToFollower::Heartbeat { commits, .. } if commits.is_empty() => return None,
                    ToFollower::Heartbeat { commits, .. } => {
                        ToFollower::Heartbeat { sent: 0, commits }
                    }
                    other => other,
                };
                let wire = table.wires.number(Wire::To(message));
                out.push(Out::Send { conn: conn.0, wire });
            }
            Effect::FromFollower { message: FromFollower::Alive { .. }, .. } => {}
            Effect::FromFollower { conn, message } => {
                let wire = table.wires.number(Wire::From(message));
                out.push(Out::Send { conn: conn.0, wire });
            }
            Effect::Close { conn } => out.push(Out::Close { conn: conn.0 }),
            Effect::Gateway { reply, .. } => match reply {
                NodeReply::Answer { session, answer: BatchReply::Applied { .. }, .. } => {
                    out.push(Out::Applied { op: (session.0.revision - 1) as u8 });
                }
                NodeReply::Read { id, result } => {
                    out.push(Out::Told {
                        id: id as u8,
                        value: result.ok().map(|read| read.values[0]),
                    });
                }
                NodeReply::Answer { .. } | NodeReply::ShardState { .. } => {}
            },
            Effect::Propose { proposal, expect, record: config, candidate } => {
                let config = table.configs.number(config);
                let candidate = candidate.map(|(store, key)| (index_of(store), key));
                out.push(Out::Propose { proposal, expect, config, candidate });
            }
            Effect::CheckEtcd { check, .. } => out.push(Out::Check { check }),
            // Records are read all the time, and nothing here flushes, lags or ends.
            Effect::ReadRecord { .. } | Effect::Report(_) | Effect::Trim { .. } => {}
            other => panic!("nothing asks for {other:?} here"),
        }
        None
    }
}

fn peers(table: &Table, boots: [u8; STORES_MAX]) -> Event {
    let key = |store: u8| {
        let boot = boots[usize::from(store)];
        (store_boot(store, boot), key_revision(store, boot))
    };
    Event::Peers((0..table.stores as u8).map(key).collect())
}

impl Machine for Store {
    type Cause = Cause;
    type Out = Out;
    type Face = Face;
    type Table = Table;

    fn on(&mut self, cause: Cause, table: &mut Table, out: &mut Vec<Out>) {
        let mut events: VecDeque<Event> = self.event(cause, table).into_iter().collect();
        while let Some(event) = events.pop_front() {
            let mut effects = Vec::new();
            self.node.handle(self.now, event, &mut effects);
            self.node.check_invariants();
            for effect in effects {
                events.extend(self.perform(effect, table, out));
            }
            if events.is_empty() && !table.slow_fsync && !self.leads() {
                events.extend(self.fsynced());
            }
        }
    }

    fn now(&self) -> Now {
        self.now
    }

    fn face(&self) -> Face {
        let of = |entries: &[Entry]| entries.iter().map(|e| (e.epoch.0, e.chain.0)).collect();
        let mut face = Face {
            durable: of(&self.disk.durable.entries),
            unsynced: self.disk.synced.len(),
            short: self.node.durability_violations() > 0,
            ..Face::default()
        };
        let Some(view) = self.node.replicas().next() else { return face };
        face.promised = view.promised.0;
        face.primary = view.primary.map(|primary| (primary.epoch.0, primary.active));
        face.commit = view.commit.0 as usize;
        let position = |seq| view.log.position(Seq(seq)).unwrap_or_else(Position::default);
        let all = (1..=view.last.seq.0).map(position);
        face.log = all.map(|position| (position.epoch.0, position.chain.0)).collect();
        face.stopped = view.stopped;
        face
    }
}
