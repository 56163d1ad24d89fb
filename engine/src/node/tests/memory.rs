//! The memory of a node stays within its limits, whatever the shards, the disk and the clients do.

use super::*;

/// The number of shards, all of equal size.
const SHARDS: u16 = 40;

fn slots(number: u16) -> Slots {
    let width = u16::MAX / SHARDS;
    Slots { lo: number * width, hi: number * width + width - 1 }
}

/// A counter in these slots.
fn counter_in(slots: Slots) -> CounterKey {
    let keys = (0..).map(|number: u64| CounterKey::new(b"ns", number.to_string().as_bytes()));
    let mut keys = keys.map(|key| key.expect("a good name"));
    keys.find(|key| slots.contains(key.slot())).expect("there is one")
}

/// A, which leads all shards alone.
fn alone(log_memory_bytes: usize) -> Bench {
    let mut bench = Bench::new(A);
    bench.node.shared.settings.min_in_sync = 1;
    bench.node.shared.settings.log_memory_bytes = log_memory_bytes;
    bench.on(Event::GatewayConnected { conn: GATEWAY });
    for number in 0..SHARDS {
        let only = vec![A.store];
        let record = ShardRecord {
            slots: slots(number),
            isr: only.clone(),
            target: only,
            ..record(1, 1, A)
        };
        bench.deliver(record);
    }
    sync(&mut bench);
    bench
}

/// Makes all that was written durable, also the group that was gathered while another one was
/// written.
fn sync(bench: &mut Bench) {
    while let Some(group) = bench.node.shared.storage.groups().covering() {
        bench.on(Event::Durable { group });
    }
}

/// Orders this many bytes of entries of one shard, in one batch.
fn write(bench: &mut Bench, number: u16, batch_seq: u64, bytes: usize) {
    let op = Op { counter: counter_in(slots(number)), kind: OpKind::Add { delta: 1 } };
    order(bench, number, batch_seq, &vec![op.clone(); bytes / ops::size(&op)]);
}

fn order(bench: &mut Bench, number: u16, batch_seq: u64, ops: &[Op]) {
    let payload = ops::encode(ops);
    let session = SessionId(Revision { incarnation: 1, revision: 5 });
    let batch = Batch::seal(
        slots(number),
        session,
        BatchSeq(batch_seq),
        BatchSeq(batch_seq),
        Codec::Raw,
        payload,
    );
    let message = bench.now.0;
    bench.now = bench.now.plus_ms(1);
    bench.frame(message + 1, batch);
    sync(bench);
}

/// There is one limit for the node. With one for each copy, 800 copies could take 1.6 GiB of log
/// where the whole process was to stay within 512 MiB.
#[test]
fn the_log_in_memory_has_one_limit_for_all_shards() {
    let limit = 256 << 10;
    let mut bench = alone(limit);
    for batch_seq in 1..20 {
        for number in 0..SHARDS {
            write(&mut bench, number, batch_seq, 4_000);
        }
        let logs = bench.node.shared.shards.iter().map(|replica| replica.log.walked_bytes());
        assert!(logs.sum::<usize>() <= limit + (8 << 10));
    }
    // The newest entries of each shard remain.
    for replica in bench.node.shared.shards.iter() {
        let (base, last) = (replica.log.base().seq, replica.log.last().seq);
        assert!(base.0 > 10 && base < last, "{base:?} {last:?}");
    }
}

/// A quiet shard keeps what it has applied in the same stretch of the node's log as a busy one.
#[test]
fn what_was_applied_first_goes_first() {
    let mut bench = alone(64 << 10);
    write(&mut bench, 1, 1, 100);
    for batch_seq in 1..10 {
        write(&mut bench, 0, batch_seq, 4_000);
    }
    let quiet = |bench: &Bench| bench.node.replica(slots(1).shard()).log.get(Seq(2)).is_some();
    assert!(quiet(&bench), "it is younger than what fits");
    for batch_seq in 10..40 {
        write(&mut bench, 0, batch_seq, 4_000);
    }
    assert!(!quiet(&bench));
    write(&mut bench, 1, 2, 100);
    let kept = &bench.node.replica(slots(1).shard()).log;
    assert!(kept.get(Seq(3)).is_some(), "it is the newest of all");
}

/// An entry that is applied takes what its bytes take, and not the values that were loaded, too.
#[test]
fn what_applying_needed_goes_when_it_is_done() {
    let mut bench = alone(1 << 20);
    let before = bench.node.held_bytes();
    let counters = (0u64..).map(|number| CounterKey::new(b"ns", number.to_string().as_bytes()));
    let counters = counters.map(|key| key.expect("a good name"));
    let kind = OpKind::AddReturning { delta: 0 };
    let ops = counters.filter(|counter| slots(0).contains(counter.slot()));
    let ops: Vec<_> = ops.map(|counter| Op { counter, kind }).take(1_000).collect();
    order(&mut bench, 0, 1, &ops);
    let load = bench.loads.pop_front().expect("the values are loaded");
    let waiting = bench.node.held_bytes() - before;
    bench.on(Event::Loaded { load, values: vec![None; ops.len()], records: vec![] });
    sync(&mut bench);
    let held = bench.node.held_bytes() - before;
    assert!(held < 30_000 && waiting > 40_000, "{waiting}, then {held} bytes");
    assert_eq!(bench.node.shared.storage.pending_bytes(), 0);
}

// ---- a follower whose state disk is slow -------------------------------------------------------

/// B takes entries with new counters from A, while its flush does not end. Returns B after this
/// many entries, with the numbers it has acknowledged.
struct SlowState {
    bench: Bench,
    at: Position,
    n: u64,
    acked: u64,
    flush: u64,
}

impl SlowState {
    fn new() -> Self {
        let mut bench = new_follower();
        bench.node.shared.settings.table_bytes_max = 16 << 10;
        bench.node.shared.settings.pending_bytes_max = 120 << 10;
        Self { bench, at: Position::default(), n: 0, acked: 0, flush: 0 }
    }

    fn on(&mut self, event: Event) {
        for effect in self.bench.on(event) {
            match effect {
                Effect::ToPrimary { message: FromFollower::Ack { n }, .. } => self.acked = n,
                Effect::Flush { flush, .. } => self.flush = flush,
                _ => {}
            }
        }
    }

    /// A message with an entry of a hundred new counters, of which the entry before is committed.
    fn append(&mut self) {
        self.n += 1;
        let op = |number| {
            let key = format!("{}-{number}", self.n);
            let counter = CounterKey::new(b"ns", key.as_bytes()).expect("a good name");
            Op { counter, kind: OpKind::Add { delta: 1 } }
        };
        let payload = ops::encode(&(0..100).map(op).collect::<Vec<_>>());
        let session = SessionId(Revision { incarnation: 1, revision: 5 });
        let batch_seq = BatchSeq(self.n);
        let batch = Batch::seal(Slots::ALL, session, batch_seq, batch_seq, Codec::Raw, payload);
        let entry = Entry::after(self.at, Epoch(1), TimeMs(1), Body::Ops(batch));
        let prev = std::mem::replace(&mut self.at, entry.position());
        let slice = Slice {
            shard: SHARD,
            slots: Slots::ALL,
            epoch: Epoch(1),
            copy: CopyNo(1),
            prev,
            commit: prev.seq,
            resume: self.n == 1,
            entries: vec![entry],
        };
        let message = ToFollower::Append { n: self.n, slices: vec![slice] };
        self.on(Event::FromPrimary { conn: FROM_A, message });
        while let Some(group) = self.bench.node.shared.storage.groups().covering() {
            self.on(Event::Durable { group });
        }
    }
}

/// The follower's tables stay within their limit, its log within the other, and it does not
/// acknowledge what it can't apply: the primary's window fills.
#[test]
fn a_follower_with_a_slow_state_disk_takes_no_more_than_it_may_hold() {
    let mut slow = SlowState::new();
    for _ in 0..200 {
        slow.append();
        let table = slow.bench.node.tables().active.bytes();
        assert!(table <= 2 * slow.bench.node.shared.settings.table_bytes_max, "{table}");
    }
    assert!(slow.acked < 100, "{}", slow.acked);
    // The flushes end one after the other: everything is applied, and acknowledged.
    for _ in 0..200 {
        let flush = slow.flush;
        slow.on(Event::Ingested { flush });
    }
    assert_eq!(slow.acked, slow.n);
    assert_eq!(slow.bench.node.replica(SHARD).state.applied.seq, Seq(slow.n - 1));
}

/// A sender is slowed down while a flush lags, not stopped when the tables are full.
#[test]
fn entries_are_applied_no_faster_than_a_flush_advances() {
    let mut slow = SlowState::new();
    slow.bench.node.shared.settings.table_bytes_max = 256 << 10;
    slow.bench.node.shared.settings.pending_bytes_max = usize::MAX;
    let applied = |slow: &SlowState| slow.bench.node.replica(SHARD).state.applied.seq.0;
    while slow.flush == 0 {
        slow.append();
    }
    let sealed = slow.bench.node.tables().sealed.as_ref().expect("it is being flushed").len();
    let begun = applied(&slow);
    (0..200).for_each(|_| slow.append());
    let waiting = applied(&slow);
    slow.on(Event::FlushAdvanced { flush: slow.flush - 1, counters: usize::MAX });
    assert_eq!(applied(&slow), waiting, "another flush says nothing");
    let mut parts = vec![applied(&slow) - begun];
    for part in 1..=4 {
        slow.on(Event::FlushAdvanced { flush: slow.flush, counters: sealed * part / 4 });
        parts.push(applied(&slow) - begun);
    }
    assert!(parts[..3].is_sorted_by(|a, b| a < b), "{parts:?}");
    assert!((parts[4] / 3..=parts[4] / 4 * 3).contains(&parts[0]), "{parts:?}");
    assert!(parts[4] < 200, "a full table holds entries up: {parts:?}");
}

/// The shards take turns with what room there is, however much waits in one of them.
#[test]
fn no_shard_waits_while_others_use_the_room() {
    let applied = applied_beside_full_tables(1);
    let (min, max) = (applied.iter().min().unwrap(), applied.iter().max().unwrap());
    assert!(*min > 2 && min + 2 >= *max, "{applied:?}");
    let applied = applied_beside_full_tables(8);
    assert!(applied.iter().all(|&entries| entries > 2), "{applied:?}");
}

/// Returns how many entries of each shard are applied while tables are full all the time and so
/// many entries, each with counters of its own, wait in each shard.
fn applied_beside_full_tables(backlog: usize) -> Vec<usize> {
    let mut bench = alone(1 << 20);
    bench.node.shared.settings.table_bytes_max = 16 << 10;
    let mut by_shard: Vec<Vec<Op>> = vec![Vec::new(); SHARDS.into()];
    for number in 0.. {
        let counter = CounterKey::new(b"ns", number.to_string().as_bytes()).expect("a good name");
        let shard = usize::from(counter.slot().0 / (u16::MAX / SHARDS));
        if let Some(ops) = by_shard.get_mut(shard).filter(|ops| ops.len() < 100 * backlog) {
            ops.push(Op { counter, kind: OpKind::Add { delta: 1 } });
        } else if by_shard.iter().all(|ops| ops.len() == 100 * backlog) {
            break;
        }
    }
    let applied = |bench: &Bench, number| {
        bench.node.replica(slots(number).shard()).state.applied.seq.0 as usize - 1
    };
    let mut ordered = vec![0; SHARDS.into()];
    for flush in 1..100 {
        // Every shard always has something to apply, and the tables have room for a few of them.
        for number in 0..SHARDS {
            let ordered = &mut ordered[usize::from(number)];
            let mut entries = by_shard[usize::from(number)].chunks(100).cycle().skip(*ordered);
            for _ in 0..(applied(&bench, number) + backlog).saturating_sub(*ordered) {
                *ordered += 1;
                let ops = entries.next().expect("a cycle has no end");
                order(&mut bench, number, *ordered as u64, ops);
            }
        }
        bench.on(Event::Ingested { flush });
    }
    (0..SHARDS).map(|number| applied(&bench, number)).collect()
}

/// Entries whose commit waits for others do not keep it from acknowledging: others may wait for
/// that.
#[test]
fn what_is_not_committed_is_acknowledged_however_much_it_is() {
    let mut slow = SlowState::new();
    slow.bench.node.shared.settings.pending_bytes_max = 1;
    slow.append();
    assert_eq!(slow.acked, 1);
}

/// Reads that wait are refused beyond a limit in bytes, however few they are.
#[test]
fn waiting_reads_are_limited_by_their_bytes() {
    let mut bench = primary();
    bench.node.shared.settings.sizes.waiting_read_bytes_max = 100_000;
    let read = |bench: &mut Bench, id| {
        let keys = vec![counter(); 100];
        let message = GatewayMessage::Read { id, slots: Slots::ALL, keys, max_staleness_ms: None };
        let effects = bench.on(Event::Gateway { conn: GATEWAY, message });
        let refused = Err(Refusal::Overloaded);
        effects.iter().any(|effect| {
            matches!(effect, Effect::Gateway { reply: NodeReply::Read { result, .. }, .. }
                if *result == refused)
        })
    };
    let taken = (1..50).take_while(|&id| !read(&mut bench, id)).count();
    assert!((3..20).contains(&taken), "{taken}");
    assert!(bench.node.held_bytes() <= bench.node.counted_bytes());
    bench.on(Event::GatewayGone { conn: GATEWAY });
    assert_eq!(bench.node.reads.counted_bytes(), 0);
}

/// Ten thousand sessions are alive, and one that has written to every shard is gone. Each shard's
/// entry contains all live ones: in one turn they would be megabytes for each hundred shards.
#[test]
fn the_rows_of_a_session_that_is_gone_are_dropped_a_few_shards_at_a_time() {
    let mut bench = alone(usize::MAX);
    (0..SHARDS).for_each(|number| write(&mut bench, number, 1, 100));
    let id = |revision| SessionId(Revision { incarnation: 1, revision });
    let alive: Vec<_> = (100..10_100).map(id).collect();
    let mut list = || {
        bench.now = bench.now.plus_ms(bench.node.shared.settings.collect_every_ms);
        let (at, alive) = (Revision { incarnation: 1, revision: 20_000 }, alive.clone());
        let effects = bench.on(Event::SessionsListed { at, alive });
        sync(&mut bench);
        let is_collection = |effect: &&Effect| match effect {
            Effect::Write(LogRecord::Append { entry, .. }) => {
                matches!(entry.body, Body::ExpireSessions { .. })
            }
            _ => false,
        };
        effects.iter().filter(is_collection).count()
    };
    assert_eq!(list(), 0, "it was absent for no time yet");
    let entry_bytes = 12 * 10_000;
    let most = NodeSizes::default().message_bytes.div_ceil(entry_bytes);
    assert!(most < usize::from(SHARDS));
    assert_eq!(list(), most);
    assert_eq!(list(), usize::from(SHARDS) - most);
    assert_eq!(list(), 0, "all rows of it are gone");
}
