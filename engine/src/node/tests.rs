//! One node at a time: events in, exact effects out. What takes two nodes, time or failure is
//! shown by the simulator.

use bytes::Bytes;

use super::*;
use crate::batch::{Batch, Codec};
use crate::entry::Body;
use crate::ids::{Bseq, Version};
use crate::message::{Answer, Refusal, Reject, Slice};
use crate::ops::{self, Op, OpKind};

const A: StoreBoot = StoreBoot { store: StoreId(1), boot: Boot(1) };
const B: StoreBoot = StoreBoot { store: StoreId(2), boot: Boot(1) };
const GATEWAY: Conn = Conn(100);
const TO_B: Conn = Conn(2);
const FROM_A: Conn = Conn(3);
const SHARD: ShardId = ShardId(0);

fn record(epoch: u64, version: u64, primary: StoreBoot) -> ShardConfig {
    ShardConfig {
        slots: Slots::ALL,
        epoch: Epoch(epoch),
        version: Version(version),
        primary,
        isr: vec![A.store, B.store],
        learners: vec![],
        target: vec![A.store, B.store],
        tainted: vec![],
    }
}

fn counter() -> CounterKey {
    CounterKey::new(b"ns", b"key").unwrap()
}

fn batch(bseq: u64, kind: OpKind) -> Batch {
    let payload = ops::encode(&[Op { counter: counter(), kind }]);
    let session = SessionId(Revision { incarnation: 1, revision: 5 });
    Batch::seal(Slots::ALL, session, Bseq(bseq), Bseq(bseq), Codec::Raw, payload)
}

fn add(bseq: u64) -> Batch {
    batch(bseq, OpKind::Add { delta: 1 })
}

struct Bench {
    node: Node,
    now: Now,
}

impl Bench {
    fn new(me: StoreBoot) -> Self {
        let settings = Settings { disk_probe_every_ms: u64::MAX, ..Settings::default() };
        Self { node: Node::new(settings, me, Now(0), 1, vec![]), now: Now(0) }
    }

    /// The effects of one event, without the time-driven rest.
    fn on(&mut self, event: Event) -> Vec<Effect> {
        let mut effects = Vec::new();
        self.node.handle(self.now, event, &mut effects);
        self.node.check_invariants();
        effects.retain(|effect| !matches!(effect, Effect::Report(_)));
        effects
    }

    fn config(&mut self, record: ShardConfig) -> Vec<Effect> {
        self.on(Event::Config { config: record, mod_revision: 7, linearizable: false })
    }

    fn frame(&mut self, message: u64, batch: Batch) -> Vec<Effect> {
        let message = GatewayMessage::Frame { message, batches: vec![batch] };
        self.on(Event::Gateway { conn: GATEWAY, message })
    }

    fn append(&mut self, n: u64, slice: Slice) -> Vec<Effect> {
        let message = ToFollower::Append { n, slices: vec![slice] };
        self.on(Event::ToFollower { conn: FROM_A, message })
    }
}

/// A, leading epoch 1 with B, connected to B and to a gateway; nothing is fsynced yet.
fn beginning() -> Bench {
    let mut bench = Bench::new(A);
    bench.on(Event::Dialled { conn: TO_B, peer: B });
    let copies = vec![(SHARD, CopyNo(1))];
    bench
        .on(Event::FromFollower { conn: TO_B, message: FromFollower::Welcome { from: B, copies } });
    bench.on(Event::GatewayConnected { conn: GATEWAY });
    bench
}

/// The same with its barrier committed.
fn primary() -> Bench {
    let mut bench = beginning();
    bench.config(record(1, 1, A));
    bench.on(Event::Durable { group: 1 });
    bench.on(Event::FromFollower { conn: TO_B, message: FromFollower::Ack { n: 1 } });
    bench
}

/// B, following A in epoch 1.
fn backup() -> Bench {
    let mut bench = Bench::new(B);
    bench.config(record(1, 1, A));
    bench.on(Event::Durable { group: 1 });
    bench.on(Event::Accepted { conn: FROM_A });
    bench.on(Event::ToFollower { conn: FROM_A, message: ToFollower::Hello { from: A, to: B } });
    bench
}

/// Entries of these epochs, from the beginning of the log.
fn log(epochs: &[u64]) -> Vec<Entry> {
    let mut at = Position::default();
    let mut entries = Vec::new();
    for &epoch in epochs {
        let entry = Entry::after(at, Epoch(epoch), TimeMs(1), Body::Barrier);
        at = entry.position();
        entries.push(entry);
    }
    entries
}

/// The slice of epoch `epoch` that holds `entries[from..]`.
fn slice(epoch: u64, entries: &[Entry], from: usize, resume: bool) -> Slice {
    Slice {
        shard: SHARD,
        slots: Slots::ALL,
        epoch: Epoch(epoch),
        copy: CopyNo(1),
        prev: from.checked_sub(1).map_or(Position::default(), |at| entries[at].position()),
        commit: Seq(0),
        resume,
        entries: entries[from..].to_vec(),
    }
}

/// What an effect is, in a word or two.
fn word(effect: &Effect) -> String {
    match effect {
        Effect::Write(Record::Append { entry, .. }) => format!("append {}", entry.seq.0),
        Effect::Write(Record::Truncate { after, .. }) => format!("truncate {}", after.0),
        Effect::Write(Record::Promise { epoch, .. }) => format!("promise {}", epoch.0),
        Effect::Write(Record::Copy { copy, .. }) => format!("copy {}", copy.0),
        Effect::Sync { group } => format!("sync {group}"),
        Effect::ToFollower { message: ToFollower::Append { n, .. }, .. } => format!("send {n}"),
        Effect::ToFollower { message: ToFollower::ReadIndex { .. }, .. } => "ask".into(),
        Effect::ToFollower { message: ToFollower::Heartbeat { .. }, .. } => "beat".into(),
        Effect::FromFollower { message: FromFollower::Ack { n }, .. } => format!("ack {n}"),
        Effect::FromFollower { message: FromFollower::Reject { reason, .. }, .. } => match reason {
            Reject::StaleEpoch { promised } => format!("reject: promised {}", promised.0),
            Reject::Mismatch { applied, .. } => format!("reject: applied {}", applied.seq.0),
            other => format!("reject: {other:?}"),
        },
        Effect::Gateway { reply: NodeReply::Answer { answer, .. }, .. } => match answer {
            Answer::Applied { values, .. } => format!("applied {values:?}"),
            Answer::Refused(Refusal::NotPrimary(hint)) => {
                format!("not primary, hint: {}", hint.is_some())
            }
            other => format!("{other:?}"),
        },
        Effect::Gateway { reply: NodeReply::Read { result, .. }, .. } => match result {
            Ok(read) => format!("read {:?}", read.values),
            Err(_) => "read refused".into(),
        },
        Effect::Load { .. } => "load".into(),
        other => format!("{other:?}"),
    }
}

#[track_caller]
fn check(effects: Vec<Effect>, want: &[&str]) {
    assert_eq!(effects.iter().map(word).collect::<Vec<_>>(), want);
}

#[test]
fn a_new_primary_promises_and_orders_its_barrier_before_anything_else() {
    let mut bench = beginning();
    check(bench.config(record(1, 1, A)), &["copy 1", "promise 1", "append 1", "send 1", "sync 1"]);
}

#[test]
fn nothing_is_answered_before_the_barrier_is_committed() {
    let mut bench = beginning();
    bench.config(record(1, 1, A));
    check(bench.frame(1, add(1)), &["append 2", "send 2"]);
    // Its own disk and B's: both entries, but neither alone.
    check(bench.on(Event::Durable { group: 1 }), &["sync 2"]);
    check(bench.on(Event::Durable { group: 2 }), &[]);
    let ack = |n| Event::FromFollower { conn: TO_B, message: FromFollower::Ack { n } };
    check(bench.on(ack(1)), &[]);
    check(bench.on(ack(2)), &["applied []"]);
}

#[test]
fn an_answer_waits_for_every_member_whatever_comes_first() {
    let mut bench = primary();
    check(bench.frame(1, add(1)), &["append 2", "send 2", "sync 2"]);
    let ack = Event::FromFollower { conn: TO_B, message: FromFollower::Ack { n: 2 } };
    check(bench.on(ack), &[]);
    check(bench.on(Event::Durable { group: 2 }), &["applied []"]);
}

/// The transport may repeat a frame, on the same connection under the same number.
#[test]
fn a_frame_is_handled_once() {
    let mut bench = primary();
    check(bench.frame(1, add(1)), &["append 2", "send 2", "sync 2"]);
    check(bench.frame(1, add(1)), &[]);
}

#[test]
fn an_op_that_asks_for_a_value_is_answered_after_its_load() {
    let mut bench = primary();
    let returning = batch(1, OpKind::AddReturning { delta: 5 });
    check(bench.frame(1, returning), &["append 2", "load", "send 2", "sync 2"]);
    bench.on(Event::Durable { group: 2 });
    check(bench.on(Event::FromFollower { conn: TO_B, message: FromFollower::Ack { n: 2 } }), &[]);
    check(bench.on(Event::Loaded { load: 1, values: vec![Some(100)] }), &["applied [105]"]);
}

#[test]
fn a_batch_that_was_damaged_or_comes_to_the_wrong_node_is_refused_before_ordering() {
    let mut bench = primary();
    let damaged = Batch { payload: Bytes::from_static(b"other bytes"), ..add(1) };
    check(bench.frame(1, damaged), &["Refused(Damaged)"]);
    let elsewhere = Batch { slots: Slots { lo: 9, hi: 9 }, ..add(1) };
    check(bench.frame(2, elsewhere), &["Refused(NoSuchShard)"]);
    let mut bench = backup();
    bench.on(Event::GatewayConnected { conn: GATEWAY });
    check(bench.frame(1, add(1)), &["not primary, hint: true"]);
}

/// A restarted process leads nothing until a higher epoch names its own boot.
#[test]
fn a_record_that_names_a_former_boot_makes_no_primary() {
    let mut bench = Bench::new(StoreBoot { boot: Boot(2), ..A });
    check(bench.config(record(1, 1, A)), &["copy 1", "sync 1"]);
}

#[test]
fn a_primary_that_reads_of_another_stops_at_once() {
    let mut bench = primary();
    bench.frame(1, add(1));
    bench.config(record(2, 2, B));
    bench.on(Event::Durable { group: 2 });
    let late = Event::FromFollower { conn: TO_B, message: FromFollower::Ack { n: 2 } };
    check(bench.on(late), &[]);
    check(bench.frame(2, add(2)), &["not primary, hint: true"]);
}

#[test]
fn a_backup_promises_before_it_obeys_and_acknowledges_after_its_fsync() {
    let mut bench = backup();
    let entries = log(&[1, 1]);
    let sent = slice(1, &entries, 0, true);
    check(bench.append(1, sent), &["promise 1", "append 1", "append 2", "sync 2"]);
    check(bench.on(Event::Durable { group: 2 }), &["ack 1"]);
}

#[test]
fn a_backup_refuses_an_older_primary_and_skips_until_it_is_resumed() {
    let mut bench = backup();
    let entries = log(&[3, 3, 3]);
    bench.append(1, slice(3, &entries[..1], 0, true));
    bench.on(Event::Durable { group: 2 });
    let old = log(&[2]);
    check(bench.append(2, slice(2, &old, 0, false)), &["reject: promised 3", "ack 2"]);
    check(bench.append(3, slice(3, &entries, 1, false)), &["ack 3"]);
    check(bench.append(4, slice(3, &entries, 1, true)), &["append 2", "append 3", "sync 3"]);
}

#[test]
fn a_gap_is_a_mismatch() {
    let mut bench = backup();
    let entries = log(&[1, 1, 1]);
    bench.append(1, slice(1, &entries[..1], 0, true));
    bench.on(Event::Durable { group: 2 });
    check(bench.append(2, slice(1, &entries, 2, false)), &["reject: applied 0", "ack 2"]);
}

/// The tail of a former primary goes in the same group as what replaces it, and only where an
/// entry contradicts it.
#[test]
fn a_contradicted_tail_is_cut_and_replaced() {
    let mut bench = backup();
    bench.append(1, slice(1, &log(&[1, 1, 1]), 0, true));
    bench.on(Event::Durable { group: 2 });
    let newer = log(&[1, 1, 2]);
    check(
        bench.append(2, slice(2, &newer, 2, true)),
        &["promise 2", "truncate 2", "append 3", "sync 3"],
    );
    check(bench.on(Event::Durable { group: 3 }), &["ack 2"]);
}

/// A bare prefix cuts nothing: the longer tail may be what was committed.
#[test]
fn a_shorter_log_alone_cuts_nothing() {
    let mut bench = backup();
    bench.append(1, slice(1, &log(&[1, 1, 1]), 0, true));
    bench.on(Event::Durable { group: 2 });
    check(bench.append(2, slice(2, &log(&[1]), 0, true)), &["promise 2", "sync 3"]);
    assert_eq!(bench.node.replicas().next().unwrap().last.seq, Seq(3));
}

/// What is applied here is committed; a log that contradicts it stops this copy, and cuts nothing.
#[test]
fn applied_entries_are_never_cut() {
    let mut bench = backup();
    let first = Slice { commit: Seq(2), ..slice(1, &log(&[1, 1]), 0, true) };
    bench.append(1, first);
    bench.on(Event::Durable { group: 2 });
    assert_eq!(bench.node.replicas().next().unwrap().state.applied.seq, Seq(2));
    let other = log(&[1, 3]);
    check(bench.append(2, slice(3, &other, 0, true)), &["promise 3", "reject: Stopped", "sync 3"]);
    assert!(bench.node.replicas().next().unwrap().unfit);
}

#[test]
fn a_read_is_captured_then_proved_then_answered() {
    let mut bench = primary();
    let message = GatewayMessage::Read { id: 9, slots: Slots::ALL, keys: vec![counter()] };
    check(bench.on(Event::Gateway { conn: GATEWAY, message }), &["load", "ask"]);
    check(bench.on(Event::Loaded { load: 2, values: vec![Some(42)] }), &[]);
    let answer = FromFollower::ReadIndex { round: 3, newer: vec![] };
    check(bench.on(Event::FromFollower { conn: TO_B, message: answer }), &["read [42]"]);
}

#[test]
fn a_read_is_refused_when_a_peer_has_promised_more() {
    let mut bench = primary();
    let message = GatewayMessage::Read { id: 9, slots: Slots::ALL, keys: vec![counter()] };
    bench.on(Event::Gateway { conn: GATEWAY, message });
    bench.on(Event::Loaded { load: 2, values: vec![Some(42)] });
    let answer = FromFollower::ReadIndex { round: 3, newer: vec![(SHARD, Epoch(2))] };
    check(bench.on(Event::FromFollower { conn: TO_B, message: answer }), &[]);
    bench.now = bench.now.plus_ms(40);
    let asked = bench.on(Event::Tick);
    let check_etcd = |effect: &Effect| match effect {
        Effect::CheckEtcd { check, .. } => Some(*check),
        _ => None,
    };
    let asked = asked.iter().find_map(check_etcd).expect("etcd is asked instead");
    let configs = Some(vec![record(2, 2, B)]);
    check(bench.on(Event::EtcdChecked { check: asked, configs }), &["read refused"]);
}

#[test]
fn a_node_that_sees_a_newer_boot_of_its_store_exits() {
    let mut bench = primary();
    let newer = StoreBoot { boot: Boot(2), ..A };
    let effects = bench.on(Event::Peers(vec![(newer, 50)]));
    let exits = |effect: &Effect| matches!(effect, Effect::Exit(ExitReason::NewerBoot(_)));
    assert!(effects.iter().any(exits));
}

// ---- leaving -----------------------------------------------------------------------------------

#[test]
fn a_primary_that_is_to_end_stays_until_another_leads() {
    let left = |effects: Vec<Effect>| effects.iter().any(|effect| matches!(effect, Effect::Left));
    let mut bench = primary();
    assert!(!left(bench.on(Event::Leave)), "B could lead and does not yet");
    assert!(!left(bench.frame(1, add(1))), "meanwhile it takes writes");
    assert!(left(bench.config(record(2, 2, B))));
    assert!(!left(bench.on(Event::Tick)), "said once");

    let mut unheard = primary();
    unheard.on(Event::Leave);
    assert!(left(unheard.on(Event::LeaveUnheard)), "nobody will name another");
    let mut alone = Bench::new(A);
    assert!(left(alone.on(Event::Leave)), "nobody misses it");
}
