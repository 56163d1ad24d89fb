//! Lagging followers are fed from the log on disk: a primary and its followers as real state
//! machines, each with the log's own writer, index and reader, in memory.

use std::collections::VecDeque;

use super::*;
use crate::store::log::group::Owner;
use crate::store::log::writer::{LogEncoder, Resume};
use crate::store::testing::{Segments, SplitMix64, put};

const C: StoreBoot = StoreBoot { store: StoreId(3), boot: Boot(1) };
/// A former primary.
const D: StoreBoot = StoreBoot { store: StoreId(4), boot: Boot(1) };
/// More events than any of these runs needs: beyond it the run is in a loop.
const EVENTS_MAX: u64 = 20_000;

#[derive(Clone, Debug)]
struct Lengths {
    shards: u16,
    segment: usize,
    block: usize,
    read: usize,
    window: usize,
    message: usize,
    /// Bytes of the log in memory.
    memory: usize,
    keep: usize,
}

/// The production values for a memory budget of 512 MiB.
const SHIPPED: Lengths = Lengths {
    shards: 1,
    segment: 64 << 20,
    block: 1 << 20,
    read: 3 << 20,
    window: 16 << 20,
    message: 3 << 20,
    memory: 2 << 20,
    keep: 1 << 30,
};

/// One process and its disk.
struct TestNode {
    node: Node,
    writer: LogEncoder,
    segments: Segments,
    state: BTreeMap<ShardId, ShardState>,
}

/// A, which leads every shard; B, in sync; C, a learner.
struct FeedWorld {
    sizes: Lengths,
    now: Now,
    nodes: Vec<TestNode>,
    /// The connection on which A feeds each of the others.
    conns: BTreeMap<Conn, usize>,
    next_conn: u64,
    todo: VecDeque<(usize, Event)>,
    written: u64,
    events: u64,
    /// Reads of A's log, and bytes of blocks that they took.
    reads: usize,
    read_bytes: usize,
    copies_sent: usize,
    /// The answers of A's disk, while they are delayed.
    holds_reads: bool,
    held: Option<(LogLocation, Vec<LogPart>)>,
    /// While C acknowledges nothing: the bytes of entries sent to it.
    mute: bool,
    unacked: usize,
}

impl FeedWorld {
    fn new(sizes: Lengths) -> Self {
        let mut world = Self::unconfigured(sizes);
        let config = ShardRecord { learners: vec![C.store], ..record(1, 1, A) };
        world.configure(&config);
        world.connect(1);
        world.connect(2);
        world.settle();
        world
    }

    /// Delivers this record of each shard to every node.
    fn configure(&mut self, config: &ShardRecord) {
        for shard in 0..self.sizes.shards {
            let (slots, target) = (self.slots(shard), vec![A.store, B.store, C.store]);
            let config = ShardRecord { slots, target, ..config.clone() };
            for number in 0..3 {
                let config = config.clone();
                self.on(number, Event::ShardRecord { record: config, mod_revision: 7, read: None });
            }
        }
    }

    fn unconfigured(sizes: Lengths) -> Self {
        let owner = Owner { cluster: 1, store: StoreId(1) };
        let number = |me: StoreBoot| TestNode {
            node: Node::new(settings(&sizes), me, Now(0), 1, vec![]),
            writer: LogEncoder::new(Resume { owner, ..Resume::empty(sizes.block) }, sizes.segment),
            segments: Segments::new(),
            state: BTreeMap::new(),
        };
        let nodes = [A, B, C].map(number).into_iter().collect();
        let mut world = Self {
            sizes,
            now: Now(0),
            nodes,
            conns: BTreeMap::new(),
            next_conn: 1,
            todo: VecDeque::new(),
            written: 0,
            events: 0,
            reads: 0,
            read_bytes: 0,
            copies_sent: 0,
            holds_reads: false,
            held: None,
            mute: false,
            unacked: 0,
        };
        world.on(0, Event::GatewayConnected { conn: GATEWAY });
        world
    }

    fn slots(&self, shard: u16) -> Slots {
        let width = (65_536 / u32::from(self.sizes.shards)) as u16;
        let lo = shard.wrapping_mul(width);
        let last = shard + 1 == self.sizes.shards;
        Slots { lo, hi: if last { u16::MAX } else { lo.wrapping_add(width).wrapping_sub(1) } }
    }

    fn is_connected(&self, number: usize) -> bool {
        self.conns.values().any(|&to| to == number)
    }

    fn connect(&mut self, number: usize) {
        if self.is_connected(number) {
            return;
        }
        let conn = Conn(self.next_conn);
        self.next_conn += 1;
        self.conns.insert(conn, number);
        let peer = [A, B, C][number];
        self.on(number, Event::Accepted { conn });
        self.on(0, Event::Dialled { conn, peer });
    }

    fn cut(&mut self, number: usize) {
        let cut: Vec<_> = self.conns.extract_if(.., |_, to| *to == number).collect();
        for (conn, _) in cut {
            self.on(0, Event::Closed { conn });
            self.on(number, Event::Closed { conn });
        }
    }

    /// Orders an entry of about this many bytes on A.
    fn write(&mut self, shard: u16, bytes: usize) {
        self.written += 1;
        let n = self.written;
        let session = SessionId(Revision { incarnation: 1, revision: 5 });
        let add = |op| Op {
            counter: CounterKey::new(b"ns", format!("{op:0>90}").as_bytes()).unwrap(),
            kind: OpKind::Add { delta: 1 },
        };
        let payload = ops::encode(&(0..bytes.div_ceil(100)).map(add).collect::<Vec<_>>());
        let slots = self.slots(shard);
        let batch = Batch::seal(slots, session, BatchSeq(n), BatchSeq(n), Codec::Raw, payload);
        let message = GatewayMessage::Frame { message: n, batches: vec![batch] };
        self.on(0, Event::Gateway { conn: GATEWAY, message });
    }

    /// D, the primary of epoch 1, sent this node so many entries of the first shard, and announced
    /// that so many are committed.
    fn feed_from_d(&mut self, number: usize, entries: usize, commit: u64) {
        let (conn, to) = (Conn(1_000), [A, B, C][number]);
        self.on(number, Event::Accepted { conn });
        let hello = ToFollower::Hello { from: D, to };
        self.on(number, Event::FromPrimary { conn, message: hello });
        let slice = Slice {
            shard: SHARD,
            slots: self.slots(0),
            epoch: Epoch(1),
            copy: CopyNo(1),
            prev: Position::default(),
            commit: Seq(commit),
            resume: true,
            entries: log(&vec![1; entries]),
        };
        let append = ToFollower::Append { n: 1, slices: vec![slice] };
        self.on(number, Event::FromPrimary { conn, message: append });
        self.settle();
        self.on(number, Event::Closed { conn });
    }

    /// Handles everything that follows, while time stands still.
    fn settle(&mut self) {
        while let Some((number, event)) = self.todo.pop_front() {
            self.events += 1;
            assert!(self.events < EVENTS_MAX, "{self}: it goes round in circles");
            self.on(number, event);
        }
    }

    fn pass(&mut self, ms: u64) {
        let end = self.now.plus_ms(ms);
        while self.now < end {
            self.now = self.now.plus_ms(50);
            (0..3).for_each(|number| self.on(number, Event::TurnEnded));
            self.settle();
        }
    }

    fn on(&mut self, number: usize, event: Event) {
        let mut effects = Vec::new();
        for event in [event, Event::TurnEnded] {
            self.nodes[number].node.handle(self.now, event, &mut effects);
            self.nodes[number].node.check_invariants();
        }
        effects.into_iter().for_each(|effect| self.perform(number, effect));
    }

    fn perform(&mut self, number: usize, effect: Effect) {
        let here = &mut self.nodes[number];
        let mut then = |event| self.todo.push_back((number, event));
        match effect {
            Effect::Write(record) => here.writer.write(record),
            Effect::Sync { group } => {
                put(&mut here.segments, here.writer.sync(group));
                here.writer.durable(group);
                then(Event::Durable { group });
            }
            Effect::Load { load, needs } => {
                let values = vec![None; needs.counters.len()];
                let records = vec![None; needs.records.len()];
                then(Event::Loaded { load, values, records });
            }
            Effect::Flush { flush, shards, .. } => {
                here.state
                    .extend(shards.into_iter().map(|(_, state)| (state.slots.shard(), state)));
                then(Event::Ingested { flush });
            }
            Effect::Trim { shards } => {
                let durable = here.writer.synced_through();
                for segment in here.writer.index().trimmable(&shards, self.sizes.keep, durable) {
                    here.writer.index_mut().deleted(segment);
                    here.segments.remove(&segment);
                }
            }
            Effect::ToFollower { conn, message } => {
                if let Some(&to) = self.conns.get(&conn) {
                    if let ToFollower::Append { slices, .. } = &message
                        && (self.mute && to == 2)
                    {
                        self.unacked += slices.iter().map(Slice::size).sum::<usize>();
                    }
                    self.todo.push_back((to, Event::FromPrimary { conn, message }));
                }
            }
            Effect::ToPrimary { conn, message } => {
                let is_ack = matches!(message, FromFollower::Ack { .. });
                if is_ack && self.mute && number == 2 {
                    return;
                }
                if self.conns.contains_key(&conn) {
                    self.todo.push_back((0, Event::FromFollower { conn, message }));
                }
            }
            Effect::Close { conn } => {
                if let Some(to) = self.conns.remove(&conn) {
                    let other = if number == 0 { to } else { 0 };
                    self.todo.push_back((other, Event::Closed { conn }));
                }
            }
            Effect::MeasureSnapshot { transfer, .. } => {
                then(Event::SnapshotMeasured { transfer, bytes: 0 });
            }
            Effect::SendSnapshot { conn, transfer, shard, .. } => {
                self.copies_sent += 1;
                let (Some(&to), Some(state)) = (self.conns.get(&conn), here.state.get(&shard))
                else {
                    return then(Event::SnapshotFailed { transfer });
                };
                let state = Box::new(state.clone());
                self.todo.push_back((to, Event::SnapshotStaged { conn, transfer, state }));
            }
            Effect::InstallSnapshot { conn, transfer, state, .. } => {
                here.state.insert(state.slots.shard(), *state);
                then(Event::SnapshotInstalled { conn, transfer });
            }
            Effect::ReadLog { wanted, from, bytes_max } => {
                self.reads += 1;
                let read = here.writer.index().next_read(wanted, from).expect("it is wanted");
                let (at, block) = (read.at(), read.block);
                let bytes = block.map(|block| {
                    self.read_bytes += block.len;
                    &here.segments[&block.segment][block.offset..block.offset + block.len]
                });
                let parts = read.parts(here.writer.owner(), bytes, bytes_max);
                let parts = parts.expect("it is all there");
                match self.holds_reads {
                    true => self.held = Some((at, parts)),
                    false => then(Event::LogRead { at, parts }),
                }
            }
            _ => {}
        }
    }

    fn last(&self, number: usize) -> Vec<Position> {
        self.nodes[number].node.replicas().map(|replica| replica.last).collect()
    }

    fn applied(&self, number: usize) -> Vec<Position> {
        self.nodes[number].node.replicas().map(|replica| replica.state.applied).collect()
    }

    #[track_caller]
    fn check_filled(&self) {
        for (number, name) in [(1, "B"), (2, "C")] {
            assert_eq!(self.last(number), self.last(0), "{self}: {name}");
            assert_eq!(self.applied(number), self.applied(0), "{self}: {name}");
        }
    }
}

impl std::fmt::Display for FeedWorld {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (sizes, now) = (&self.sizes, self.now);
        let seqs = |number| self.last(number).into_iter().map(|last| last.seq.0).max();
        write!(f, "{sizes:?} at {now:?}, {} entries, {} reads", self.written, self.reads)?;
        write!(f, ", ends: {:?} {:?} {:?}", seqs(0), seqs(1), seqs(2))
    }
}

fn settings(sizes: &Lengths) -> Settings {
    let limits = NodeSizes {
        window_bytes: sizes.window,
        message_bytes: sizes.message,
        read_log_bytes: sizes.read,
        ..NodeSizes::default()
    };
    let log_memory_bytes = sizes.memory;
    Settings {
        log_memory_bytes,
        min_in_sync: 1,
        flush_after_ms: 500,
        sizes: limits,
        ..Settings::default()
    }
}

/// C is away while this many entries of this many bytes come in, one after the other to every
/// shard.
#[track_caller]
fn check_lag(sizes: Lengths, entries: u64, bytes: usize) -> FeedWorld {
    let mut world = FeedWorld::new(sizes);
    world.cut(2);
    for n in 0..entries {
        world.write((n % u64::from(world.sizes.shards)) as u16, bytes);
        world.settle();
    }
    world.connect(2);
    world.settle();
    world.pass(1_000);
    world.check_filled();
    world
}

/// The proof of a review's finding: 10 MB of log with the production values, 2 MiB of it in memory.
/// The blocks of a megabyte are larger than any log that the simulator ever wrote.
#[test]
fn a_learner_is_fed_from_a_log_of_many_blocks() {
    let world = check_lag(SHIPPED, 1_000, 10_000);
    assert_eq!(world.copies_sent, 0, "it was fed by the log");
}

/// A request with a token may have 12 MiB.
#[test]
fn entries_larger_than_a_read_are_sent() {
    check_lag(SHIPPED, 5, 11 << 20);
    check_lag(Lengths { read: 1 << 20, message: 1 << 20, ..SHIPPED }, 4, 2 << 20);
}

fn drawn(random: &mut SplitMix64) -> Lengths {
    let mut one_of = |lengths: [usize; 4]| lengths[random.below(4) as usize];
    Lengths {
        segment: one_of([0, 2_000, 20_000, 64 << 20]),
        block: one_of([0, 300, 4_000, 1 << 20]),
        read: one_of([0, 200, 2_000, 3 << 20]),
        window: one_of([1, 100, 5_000, 16 << 20]),
        message: one_of([1, 100, 2_000, 3 << 20]),
        memory: one_of([0, 500, 5_000, 1 << 20]),
        keep: one_of([0, 3_000, 50_000, 1 << 30]),
        shards: 1 + random.below(6) as u16,
    }
}

/// With all sizes and all lags, in the end both followers have the whole log.
#[test]
fn whoever_lags_by_whatever_is_filled() {
    for seed in 0..200 {
        let mut random = SplitMix64::new(seed);
        let mut world = FeedWorld::new(drawn(&mut random));
        for _ in 0..40 {
            let number = 1 + random.below(2) as usize;
            match random.below(10) {
                0 => world.cut(number),
                1 | 2 => world.connect(number),
                3 => world.pass(random.below(1_500)),
                _ => {
                    let shard = random.below(world.sizes.shards.into()) as u16;
                    let bytes = random.below(800) as usize;
                    (0..random.below(20)).for_each(|_| world.write(shard, bytes));
                }
            }
            if random.below(2) == 0 {
                world.settle();
            }
        }
        world.connect(1);
        world.connect(2);
        world.pass(6_000);
        world.check_filled();
    }
}

/// A thousand shards that lag make the primary read its log once, not a thousand times.
#[test]
fn each_block_is_read_once_for_all_shards() {
    let sizes = Lengths { shards: 100, block: 20_000, read: 60_000, memory: 0, ..SHIPPED };
    let world = check_lag(sizes, 3_000, 300);
    let log: usize = world.nodes[0].writer.index().blocks().iter().map(|(_, len)| len).sum();
    assert!(world.read_bytes < 2 * log, "{world}: {} read, {log} are there", world.read_bytes);
}

/// A reads from its disk what C lacks; before the answer its log is cut and continues otherwise,
/// and A leads again, with C at the same place. What was read in the former epoch would leave C
/// with entries that no log contains any more.
#[test]
fn what_was_read_in_a_former_epoch_is_not_sent() {
    let mut world = FeedWorld::new(Lengths { memory: 0, keep: 1 << 30, ..SHIPPED });
    world.cut(2);
    for _ in 0..20 {
        world.write(0, 300);
        world.settle();
    }
    world.pass(1_000);
    world.holds_reads = true;
    world.connect(2);
    world.settle();
    let (at, mut parts) = world.held.take().expect("C lags");
    world.configure(&ShardRecord { learners: vec![C.store], ..record(2, 2, A) });
    world.settle();
    world.holds_reads = false;
    // The entries of A's log at that time.
    let LogPart { prev, entries, .. } = &mut parts[0];
    *entries = vec![Entry::after(*prev, Epoch(1), prev.time, Body::ExpireTokens { bucket: 7 })];
    world.on(0, Event::LogRead { at, parts });
    world.settle();
    world.pass(1_000);
    world.check_filled();
    assert_eq!(world.copies_sent, 0, "the log has all that C lacks");
}

/// A leads after a loss was accepted, and the others return with some of the lost entries applied:
/// in the end each has A's log, and the state that follows from it.
#[test]
fn whoever_returns_after_an_accepted_loss_is_filled() {
    for seed in 0..400 {
        let mut random = SplitMix64::new(seed);
        let mut world = FeedWorld::unconfigured(Lengths { shards: 1, ..drawn(&mut random) });
        world.configure(&ShardRecord { isr: vec![A.store, B.store, C.store], ..record(1, 1, D) });
        for number in 0..3 {
            let entries = random.below(8);
            world.feed_from_d(number, entries as usize, random.below(entries + 1));
        }
        world.pass(random.below(2) * 2_000);
        let learners = vec![B.store, C.store];
        world.configure(&ShardRecord { isr: vec![A.store], learners, ..record(2, 2, A) });
        for _ in 0..8 {
            match random.below(5) {
                0 => world.connect(1),
                1 => world.connect(2),
                2 => world.pass(random.below(1_500)),
                _ => (0..random.below(4)).for_each(|_| world.write(0, 100)),
            }
        }
        world.connect(1);
        world.connect(2);
        world.pass(6_000);
        world.check_filled();
    }
}

/// The bytes in flight to a follower that does not acknowledge stay within the window, however much
/// it lacks.
#[test]
fn reading_waits_for_room_in_the_window() {
    let sizes = Lengths { shards: 50, block: 2_000, read: 4_000, memory: 0, ..SHIPPED };
    let mut world = FeedWorld::new(Lengths { window: 20_000, ..sizes });
    world.cut(2);
    for n in 0..2_000 {
        world.write(n % 50, 300);
        world.settle();
    }
    world.mute = true;
    world.connect(2);
    world.settle();
    assert!(world.unacked <= 20_000 + 4_000, "{world}: {} under way", world.unacked);
    assert!(world.unacked >= 10_000, "{world}: {} under way", world.unacked);
}

/// The acknowledgements of a former copy or process prove nothing about the present one. No seed
/// shows it: a learner would have to be ready, to wait before it is added, and to get a snapshot
/// meanwhile.
#[test]
fn what_a_former_copy_has_acknowledged_does_not_count() {
    let again = StoreBoot { boot: Boot(2), ..B };
    for (peer, copy, want) in [(B, CopyNo(1), 2), (B, CopyNo(2), 0), (again, CopyNo(1), 0)] {
        let mut bench = primary();
        bench.frame(1, add(1));
        bench.on(Event::FromFollower { conn: TO_B, message: FromFollower::Ack { n: 2 } });
        let acked = |bench: &mut Bench| {
            bench.node.shared.shards.follower_mut(B.store, SHARD).unwrap().acked
        };
        assert_eq!(acked(&mut bench), Seq(2));
        bench.on(Event::Closed { conn: TO_B });
        bench.on(Event::Dialled { conn: TO_B, peer });
        let message = FromFollower::Welcome { from: peer, copies: vec![(SHARD, copy)] };
        bench.on(Event::FromFollower { conn: TO_B, message });
        assert_eq!(acked(&mut bench), Seq(want), "{peer:?} with {copy:?}");
    }
}
