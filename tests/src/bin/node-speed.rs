//! Measures the state machine of a storage node: nanoseconds per batch of a shard, summed over
//! three nodes that replicate to each other.
//!
//! `cargo run --profile ci -p tests --bin node-speed`
//!
//! In each round a gateway sends one frame to each node. Messages and fsyncs arrive at once, so
//! only the state machines and the encoding of the log are measured, not sockets or disks. The
//! result is the median of all rounds, since other processes may use the machine.

use std::io::Write;
use std::time::{Duration, Instant};

use engine::batch::{Batch, Codec};
use engine::batcher::shard_map::ranges;
use engine::ids::{
    BatchSeq, Boot, Conn, Epoch, Now, Revision, SessionId, Slots, StoreBoot, StoreId, TimeMs,
    Version,
};
use engine::key::CounterKey;
use engine::message::{BatchReply, GatewayMessage, NodeReply, ToFollower};
use engine::node::{Effect, Event, Node, Settings};
use engine::ops::{self, Op, OpKind};
use engine::shard_record::ShardRecord;
use engine::store::log::LogRecord;
use engine::store::log::writer::{LogEncoder, Resume};
use tests::sim::rng::Rng;

const NODES: usize = 3;
const KEYS: u64 = 1_000_000;
const BATCHES: usize = 600_000;
const GATEWAY: Conn = Conn(1);
const SESSION: SessionId = SessionId(Revision { incarnation: 1, revision: 7 });

fn main() -> std::io::Result<()> {
    let mut out = std::io::stdout();
    for (shards, per_frame, ops) in [(24, 8, 5), (24, 8, 100), (1_024, 340, 5), (1_024, 340, 1)] {
        let spent = ThreeNodes::new(shards).measure(per_frame, ops);
        let ns = |part: Duration| part.as_nanos() / (NODES * per_frame) as u128;
        writeln!(
            out,
            "{shards} shards, frames of {per_frame} batches of {ops} ops: {} ns of state machine \
             and {} ns of log encoding per batch, on all three nodes together",
            ns(spent.0),
            ns(spent.1)
        )?;
    }
    Ok(())
}

fn node(at: usize) -> StoreBoot {
    StoreBoot { store: StoreId(at as u128 + 1), boot: Boot(1) }
}

/// The connection that a node dialled to the node `to`.
fn dialled(to: usize) -> Conn {
    Conn(10 + to as u64)
}

/// The connection that a node accepted from the node `from`.
fn accepted(from: usize) -> Conn {
    Conn(20 + from as u64)
}

struct ThreeNodes {
    nodes: Vec<Node>,
    logs: Vec<LogEncoder>,
    /// The records of the group that each node gathers.
    written: Vec<Vec<LogRecord>>,
    inboxes: Vec<Vec<Event>>,
    /// The shards that each node leads.
    led: Vec<Vec<Slots>>,
    keys: Vec<Vec<CounterKey>>,
    batch_seqs: Vec<u64>,
    now: Now,
    message: u64,
    answered: usize,
    machine: Duration,
    encoding: Duration,
}

impl ThreeNodes {
    fn new(shards: u32) -> Self {
        let settings = Settings {
            disk_probe_every_ms: u64::MAX,
            flush_after_ms: u64::MAX,
            table_bytes_max: 1 << 30,
            ..Settings::default()
        };
        let new = |at| Node::new(settings.clone(), node(at), Now(0), 1, vec![]);
        let log = |_| LogEncoder::new(Resume::empty(1 << 20), 64 << 20);
        let slots: Vec<_> = ranges(shards).collect();
        let mut keys = vec![Vec::new(); 1 << 16];
        let mut starts = vec![0; 1 << 16];
        for range in &slots {
            (range.lo..=range.hi).for_each(|slot| starts[usize::from(slot)] = range.lo);
        }
        for number in 0..KEYS {
            let key = CounterKey::new(b"ns", format!("{number:08}").as_bytes()).expect("short");
            keys[usize::from(starts[usize::from(key.slot().0)])].push(key);
        }
        let mut cluster = Self {
            nodes: (0..NODES).map(new).collect(),
            logs: (0..NODES).map(log).collect(),
            written: vec![Vec::new(); NODES],
            inboxes: vec![Vec::new(); NODES],
            led: (0..NODES)
                .map(|at| slots.iter().skip(at).step_by(NODES).copied().collect())
                .collect(),
            keys,
            batch_seqs: vec![0; 1 << 16],
            now: Now(0),
            message: 0,
            answered: 0,
            machine: Duration::ZERO,
            encoding: Duration::ZERO,
        };
        cluster.connect(&slots);
        cluster
    }

    fn connect(&mut self, slots: &[Slots]) {
        for at in 0..NODES {
            let others = (0..NODES).filter(|&other| other != at);
            for other in others {
                let dialled = Event::Dialled { conn: dialled(other), peer: node(other) };
                self.inboxes[at].push(dialled);
                self.inboxes[at].push(Event::Accepted { conn: accepted(other) });
            }
            self.inboxes[at].push(Event::WallClock(TimeMs(1_700_000_000_000)));
            self.inboxes[at].push(Event::GatewayConnected { conn: GATEWAY });
        }
        let stores: Vec<_> = (0..NODES).map(|at| node(at).store).collect();
        for (number, &slots) in slots.iter().enumerate() {
            let record = ShardRecord {
                slots,
                epoch: Epoch(1),
                version: Version(1),
                primary: node(number % NODES),
                isr: stores.clone(),
                target: stores.clone(),
                ..ShardRecord::default()
            };
            for inbox in &mut self.inboxes {
                let record = record.clone();
                inbox.push(Event::ShardRecord { record, mod_revision: 7, read: None });
            }
        }
        self.settle();
        self.now = self.now.plus_ms(100);
        self.inboxes.iter_mut().for_each(|inbox| inbox.push(Event::TurnEnded));
        self.settle();
    }

    /// Returns the median time of a round, of the state machines and of the logs' encoders.
    fn measure(&mut self, per_frame: usize, ops: usize) -> (Duration, Duration) {
        let mut random = Rng::new(1);
        let (mut machine, mut encoding) = (Vec::new(), Vec::new());
        for _ in 0..(BATCHES / (NODES * per_frame)).min(5_000) {
            self.message += 1;
            for at in 0..NODES {
                let led = self.led[at].clone();
                let from = random.below(led.len() as u64) as usize;
                let shards = (0..per_frame.min(led.len())).map(|by| led[(from + by) % led.len()]);
                let batches = shards.map(|slots| self.batch(&mut random, slots, ops)).collect();
                let message = GatewayMessage::Frame { message: self.message, batches };
                self.inboxes[at].push(Event::Gateway { conn: GATEWAY, message });
            }
            (self.machine, self.encoding, self.answered) = Default::default();
            self.now = Now(self.now.0 + 5_000);
            self.settle();
            assert_eq!(self.answered, NODES * per_frame);
            machine.push(self.machine);
            encoding.push(self.encoding);
        }
        let median = |mut all: Vec<Duration>| {
            all.sort();
            all[all.len() / 2]
        };
        (median(machine), median(encoding))
    }

    fn batch(&mut self, random: &mut Rng, slots: Slots, ops: usize) -> Batch {
        let keys = &self.keys[usize::from(slots.lo)];
        let key = |random: &mut Rng| keys[random.below(keys.len() as u64) as usize].clone();
        let op = |random: &mut Rng| Op { counter: key(random), kind: OpKind::Add { delta: 1 } };
        let ops: Vec<_> = (0..ops).map(|_| op(random)).collect();
        let last = &mut self.batch_seqs[usize::from(slots.lo)];
        *last += 1;
        let batch_seq = BatchSeq(*last);
        Batch::seal(slots, SESSION, batch_seq, batch_seq, Codec::Raw, ops::encode(&ops))
    }

    /// Lets the nodes take turns until none has anything to do.
    fn settle(&mut self) {
        let mut effects = Vec::new();
        while self.inboxes.iter().any(|inbox| !inbox.is_empty()) {
            for at in 0..NODES {
                let events = std::mem::take(&mut self.inboxes[at]);
                let begun = Instant::now();
                for event in events {
                    self.nodes[at].handle(self.now, event, &mut effects);
                }
                self.nodes[at].handle(self.now, Event::TurnEnded, &mut effects);
                self.machine += begun.elapsed();
                for effect in effects.drain(..) {
                    self.perform(at, effect);
                }
            }
        }
    }

    fn perform(&mut self, at: usize, effect: Effect) {
        match effect {
            Effect::Write(record) => self.written[at].push(record),
            Effect::Sync { group } => {
                let begun = Instant::now();
                let records = self.written[at].drain(..);
                records.for_each(|record| self.logs[at].write(record));
                drop(self.logs[at].sync(group));
                self.logs[at].durable(group);
                self.encoding += begun.elapsed();
                self.inboxes[at].push(Event::Durable { group });
            }
            Effect::ToFollower { conn, message } => {
                let to = (conn.0 - 10) as usize;
                let conn = accepted(at);
                // Heartbeats would make the loop endless.
                if !matches!(message, ToFollower::Heartbeat { .. }) || self.message == 0 {
                    self.inboxes[to].push(Event::FromPrimary { conn, message });
                }
            }
            Effect::ToPrimary { conn, message } => {
                let to = (conn.0 - 20) as usize;
                self.inboxes[to].push(Event::FromFollower { conn: dialled(at), message });
            }
            Effect::Gateway { reply: NodeReply::Answer { answer, .. }, .. } => {
                assert!(matches!(answer, BatchReply::Applied { .. }), "{answer:?}");
                self.answered += 1;
            }
            Effect::Load { load, needs } => {
                let values = vec![None; needs.counters.len()];
                let records = vec![None; needs.records.len()];
                self.inboxes[at].push(Event::Loaded { load, values, records });
            }
            _ => {}
        }
    }
}
