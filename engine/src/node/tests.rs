//! Tests of one node: events in, exact effects out. The simulator covers what takes two nodes, time
//! or failure.

mod etcd_lost;
mod feeding;
mod memory;
mod replica_health;
mod room;

use std::collections::BTreeMap;

use bytes::Bytes;

use super::*;
use crate::batch::{Batch, Codec};
use crate::entry::{Body, Entry, Position};
use crate::ids::{BatchSeq, Boot, CopyNo, Epoch, Revision, Seq, SessionId, Slots, Version};
use crate::key::CounterKey;
use crate::message::{
    BatchReply, DigestPoint, NodeQuery, NodeQueryReply, NodeReply, Refusal, Reject,
    ShardAvailability, Slice,
};
use crate::ops::{self, Op, OpKind};
use crate::replica::primary::Primary;
use crate::shard::idempotency::{IssueTime, RecordId, Scope, Tag, TokenOutcome};
use crate::shard::state::ShardState;
use crate::shard_record::ShardRecord;
use crate::store::log::LogRecord;
use crate::store::log::catch_up::{LogPart, WantedEntries};
use crate::store::log::scan::LogLocation;

const A: StoreBoot = StoreBoot { store: StoreId(1), boot: Boot(1) };
const B: StoreBoot = StoreBoot { store: StoreId(2), boot: Boot(1) };
const GATEWAY: Conn = Conn(100);
const TO_B: Conn = Conn(2);
const FROM_A: Conn = Conn(3);
const SHARD: ShardId = ShardId(0);

fn record(epoch: u64, version: u64, primary: StoreBoot) -> ShardRecord {
    ShardRecord {
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

fn batch(batch_seq: u64, kind: OpKind) -> Batch {
    let payload = ops::encode(&[Op { counter: counter(), kind }]);
    let session = SessionId(Revision { incarnation: 1, revision: 5 });
    Batch::seal(Slots::ALL, session, BatchSeq(batch_seq), BatchSeq(batch_seq), Codec::Raw, payload)
}

fn add(batch_seq: u64) -> Batch {
    batch(batch_seq, OpKind::Add { delta: 1 })
}

impl Node {
    fn replica(&self, shard: ShardId) -> &Replica {
        self.shared.shards.get(shard).expect("the node has a replica")
    }

    fn replica_mut(&mut self, shard: ShardId) -> &mut Replica {
        self.shared.shards.get_mut(shard).expect("the node has a replica")
    }

    fn room_for_snapshots(&mut self) -> u64 {
        self.snapshots.room(&self.shared.lend(&mut Vec::new()))
    }
}

struct Bench {
    node: Node,
    now: Now,
    /// The loads that were not answered yet, and the last proof request that was sent.
    loads: std::collections::VecDeque<u64>,
    proof_request: u64,
}

impl Bench {
    fn new(me: StoreBoot) -> Self {
        let settings = Settings { disk_probe_every_ms: u64::MAX, ..Settings::default() };
        let node = Node::new(settings, me, Now(0), 1, vec![]);
        Self { node, now: Now(0), loads: Default::default(), proof_request: 0 }
    }

    /// The effects of one event, without the time-driven rest.
    fn on(&mut self, event: Event) -> Vec<Effect> {
        let mut effects = Vec::new();
        for event in [event, Event::TurnEnded] {
            self.node.handle(self.now, event, &mut effects);
            self.node.check_invariants();
        }
        effects.retain(|effect| !matches!(effect, Effect::Report(_)));
        for effect in &effects {
            match effect {
                Effect::Load { load, .. } => self.loads.push_back(*load),
                Effect::ToPrimary {
                    message: FromFollower::ProofRequest { request, .. }, ..
                } => {
                    self.proof_request = *request;
                }
                _ => {}
            }
        }
        effects
    }

    /// Delivers a record. Where nothing else is on its way to the disk, the record is durable at
    /// once; its write and its fsync are left out.
    fn deliver(&mut self, record: ShardRecord) -> Vec<Effect> {
        let was_durable = self.node.shared.storage.groups().covering().is_none();
        let mut effects = self.deliver_only(record);
        let is_record = |it: &Effect| matches!(it, Effect::Write(LogRecord::ActedOn(_)));
        let writes = effects.iter().filter(|it| matches!(it, Effect::Write(_))).count();
        if was_durable && writes == 1 && effects.iter().any(is_record) {
            effects.retain(|it| !is_record(it) && !matches!(it, Effect::Sync { .. }));
            let group = self.node.shared.storage.groups().covering().expect("just written");
            effects.extend(self.on(Event::Durable { group }));
        }
        effects
    }

    fn deliver_only(&mut self, record: ShardRecord) -> Vec<Effect> {
        self.on(Event::ShardRecord { record, mod_revision: 7, read: None })
    }

    fn frame(&mut self, message: u64, batch: Batch) -> Vec<Effect> {
        let message = GatewayMessage::Frame { message, batches: vec![batch] };
        self.on(Event::Gateway { conn: GATEWAY, message })
    }

    fn append(&mut self, n: u64, slice: Slice) -> Vec<Effect> {
        let message = ToFollower::Append { n, slices: vec![slice] };
        self.on(Event::FromPrimary { conn: FROM_A, message })
    }
}

/// A, which leads epoch 1 with B in sync, connected to B and to a gateway; nothing is fsynced yet.
fn beginning() -> Bench {
    let mut bench = Bench::new(A);
    bench.on(Event::Dialled { conn: TO_B, peer: B });
    let copies = vec![(SHARD, CopyNo(1))];
    bench
        .on(Event::FromFollower { conn: TO_B, message: FromFollower::Welcome { from: B, copies } });
    bench.on(Event::GatewayConnected { conn: GATEWAY });
    bench
}

/// The same node with its barrier committed.
fn primary() -> Bench {
    let mut bench = beginning();
    bench.deliver(record(1, 1, A));
    bench.on(Event::Durable { group: 1 });
    bench.on(Event::FromFollower { conn: TO_B, message: FromFollower::Ack { n: 1 } });
    bench
}

/// B, following A in epoch 1.
fn new_follower() -> Bench {
    let mut bench = Bench::new(B);
    bench.deliver(record(1, 1, A));
    bench.on(Event::Durable { group: 1 });
    bench.on(Event::Accepted { conn: FROM_A });
    bench.on(Event::FromPrimary { conn: FROM_A, message: ToFollower::Hello { from: A, to: B } });
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

fn read(max_staleness_ms: Option<u64>) -> GatewayMessage {
    GatewayMessage::Read { id: 9, slots: Slots::ALL, keys: vec![counter()], max_staleness_ms }
}

/// An effect, in a word or two.
fn word(effect: &Effect) -> String {
    match effect {
        Effect::Write(LogRecord::Append { entry, .. }) => format!("append {}", entry.seq.0),
        Effect::Write(LogRecord::Truncate { after, .. }) => format!("truncate {}", after.0),
        Effect::Write(LogRecord::Promise { epoch, .. }) => format!("promise {}", epoch.0),
        Effect::Write(LogRecord::ActedOn(record)) => {
            format!("act on {}.{}", record.epoch.0, record.version.0)
        }
        Effect::Write(LogRecord::Copy { copy, .. }) => format!("copy {}", copy.0),
        Effect::Write(LogRecord::Suspect { copy, .. }) => format!("suspect {}", copy.0),
        Effect::Sync { group } => format!("sync {group}"),
        Effect::ToFollower { message: ToFollower::Append { n, .. }, .. } => format!("send {n}"),
        Effect::ToFollower { message: ToFollower::ReadIndex { .. }, .. } => "ask".into(),
        Effect::ToFollower { message: ToFollower::Heartbeat { .. }, .. } => "beat".into(),
        Effect::ToPrimary { message: FromFollower::Ack { n }, .. } => format!("ack {n}"),
        Effect::ToPrimary { message: FromFollower::Reject { reason, .. }, .. } => match reason {
            Reject::StaleEpoch { promised } => format!("reject: promised {}", promised.0),
            Reject::Mismatch { applied, .. } => format!("reject: applied {}", applied.seq.0),
            other => format!("reject: {other:?}"),
        },
        Effect::Gateway { reply: NodeReply::Answer { answer, .. }, .. } => match answer {
            BatchReply::Applied { values, .. } => format!("applied {values:?}"),
            BatchReply::Refused(Refusal::NotPrimary(hint)) => {
                format!("not primary, hint: {}", hint.is_some())
            }
            other => format!("{other:?}"),
        },
        Effect::Gateway { reply: NodeReply::Read { result, .. }, .. } => match result {
            Ok(read) if read.staleness_us > 0 => {
                format!("read {:?}, {} us old", read.values, read.staleness_us)
            }
            Ok(read) => format!("read {:?}", read.values),
            Err(Refusal::Stale) => "too stale".into(),
            Err(_) => "read refused".into(),
        },
        Effect::ToPrimary { message: FromFollower::ProofRequest { .. }, .. } => {
            "proof request".into()
        }
        Effect::ToFollower { message: ToFollower::Proof { request, proven, refused }, .. } => {
            let commits: Vec<_> = proven.iter().map(|(_, epoch, seq)| (epoch.0, seq.0)).collect();
            format!("proof {request}: {commits:?}, {} refused", refused.len())
        }
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
    let effects = bench.deliver(record(1, 1, A));
    check(effects, &["copy 1", "act on 1.1", "promise 1", "append 1", "send 1", "sync 1"]);
}

#[test]
fn nothing_is_answered_before_the_barrier_is_committed() {
    let mut bench = beginning();
    bench.deliver(record(1, 1, A));
    check(bench.frame(1, add(1)), &["append 2", "send 2"]);
    // A's disk and B's disk each have both entries; neither alone commits them.
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

/// A token whose record is in the state is answered by that record. While there are records, time
/// moves by itself: after a bucket's length without one an `expire` is ordered.
#[test]
fn a_record_is_loaded_and_buckets_are_expired_in_time() {
    let mut bench = primary();
    let tag = Tag { scope: Scope::Counter, hash: 1, fingerprint: 2 };
    let mut payload = ops::begin();
    ops::put_token(&mut payload, &tag, IssueTime::Stated(TimeMs(0)), 1);
    ops::put(&mut payload, &Op { counter: counter(), kind: OpKind::Add { delta: 5 } });
    let session = SessionId(Revision { incarnation: 1, revision: 5 });
    let seal = |batch_seq: u64| {
        let payload = payload.clone().into();
        Batch::seal(
            Slots::ALL,
            session,
            BatchSeq(batch_seq),
            BatchSeq(batch_seq),
            Codec::Raw,
            payload,
        )
    };
    let expires = |effects: &[Effect]| {
        let of = |effect: &Effect| match effect {
            Effect::Write(LogRecord::Append { entry, .. }) => match entry.body {
                Body::ExpireTokens { bucket } => Some(bucket),
                _ => None,
            },
            _ => None,
        };
        effects.iter().find_map(of)
    };
    let window_ms = bench.node.shared.settings.idempotency.window_ms;
    // Without a record there is no bucket, and nothing to order.
    bench.now = bench.now.plus_ms(window_ms);
    assert_eq!(expires(&bench.on(Event::TurnEnded)), None);

    let effects = bench.frame(1, seal(1));
    let asked = effects.iter().find_map(|effect| match effect {
        Effect::Load { load, needs } => Some((*load, needs.records.clone())),
        _ => None,
    });
    let slot = counter().slot();
    let (load, records) = asked.expect("a token needs its record");
    assert_eq!(records, [RecordId { slot, hash: 1 }]);
    let seq = bench.node.replicas().next().unwrap().last.seq.0;
    let group = bench.node.shared.storage.groups().durable() + 1;
    bench.on(Event::Durable { group });
    bench.on(Event::FromFollower { conn: TO_B, message: FromFollower::Ack { n: seq } });
    let effects = bench.on(Event::Loaded { load, values: vec![], records: vec![None] });
    assert!(
        matches!(
            &effects[..],
            [Effect::Gateway {
                reply: NodeReply::Answer { answer: BatchReply::Applied { tokens, .. }, .. },
                ..
            }] if *tokens == [TokenOutcome::Applied]
        ),
        "{effects:?}"
    );

    bench.now = bench.now.plus_ms(window_ms / 16);
    let ordered = expires(&bench.on(Event::TurnEnded));
    let live = bench.node.replicas().next().unwrap().state.tokens.live().keys().next().copied();
    assert_eq!((ordered, ordered.is_some()), (live, true));
    // An `expire` is ordered once in that time, and not again before that one is applied: a shard
    // that commits slower would never finish (simulator, seed 500333).
    bench.now = bench.now.plus_ms(window_ms / 16 - 1_000);
    assert_eq!(expires(&bench.on(Event::TurnEnded)), None);
    bench.now = bench.now.plus_ms(1_000);
    assert_eq!(expires(&bench.on(Event::TurnEnded)), None);
    let seq = bench.node.replicas().next().unwrap().last.seq.0;
    let group = bench.node.shared.storage.groups().durable() + 1;
    bench.on(Event::Durable { group });
    bench.on(Event::FromFollower { conn: TO_B, message: FromFollower::Ack { n: seq } });
    bench.now = bench.now.plus_ms(window_ms / 16);
    assert_eq!(expires(&bench.on(Event::TurnEnded)), ordered);
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
    check(
        bench.on(Event::Loaded { load: 1, values: vec![Some(100)], records: vec![] }),
        &["applied [105]"],
    );
}

#[test]
fn a_batch_that_was_damaged_or_comes_to_the_wrong_node_is_refused_before_ordering() {
    let mut bench = primary();
    let damaged = Batch { payload: Bytes::from_static(b"other bytes"), ..add(1) };
    check(bench.frame(1, damaged), &["Refused(Damaged)"]);
    let elsewhere = Batch { slots: Slots { lo: 9, hi: 9 }, ..add(1) };
    check(bench.frame(2, elsewhere), &["Refused(NoSuchShard)"]);
    let mut bench = new_follower();
    bench.on(Event::GatewayConnected { conn: GATEWAY });
    check(bench.frame(1, add(1)), &["not primary, hint: true"]);
}

/// A restarted process leads nothing until a higher epoch names its own boot.
#[test]
fn a_record_that_names_a_former_boot_makes_no_primary() {
    let mut bench = Bench::new(StoreBoot { boot: Boot(2), ..A });
    check(bench.deliver(record(1, 1, A)), &["copy 1", "sync 1"]);
}

#[test]
fn a_primary_that_reads_of_another_stops_at_once() {
    let mut bench = primary();
    bench.frame(1, add(1));
    bench.deliver(record(2, 2, B));
    bench.on(Event::Durable { group: 2 });
    let late = Event::FromFollower { conn: TO_B, message: FromFollower::Ack { n: 2 } };
    check(bench.on(late), &[]);
    check(bench.frame(2, add(2)), &["not primary, hint: true"]);
}

#[test]
fn a_follower_promises_before_it_obeys_and_acknowledges_after_its_fsync() {
    let mut bench = new_follower();
    let entries = log(&[1, 1]);
    let sent = slice(1, &entries, 0, true);
    check(bench.append(1, sent), &["promise 1", "append 1", "append 2", "sync 2"]);
    check(bench.on(Event::Durable { group: 2 }), &["ack 1"]);
}

#[test]
fn a_follower_refuses_an_older_primary_and_skips_until_it_is_resumed() {
    let mut bench = new_follower();
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
    let mut bench = new_follower();
    let entries = log(&[1, 1, 1]);
    bench.append(1, slice(1, &entries[..1], 0, true));
    bench.on(Event::Durable { group: 2 });
    check(bench.append(2, slice(1, &entries, 2, false)), &["reject: applied 0", "ack 2"]);
}

/// The tail of a former primary goes in the same group as what replaces it, and only where an
/// entry contradicts it.
#[test]
fn a_contradicted_tail_is_cut_and_replaced() {
    let mut bench = new_follower();
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
    let mut bench = new_follower();
    bench.append(1, slice(1, &log(&[1, 1, 1]), 0, true));
    bench.on(Event::Durable { group: 2 });
    check(bench.append(2, slice(2, &log(&[1]), 0, true)), &["promise 2", "sync 3"]);
    assert_eq!(bench.node.replicas().next().unwrap().last.seq, Seq(3));
}

/// B was released, may have deleted its copy, and is named again, all while its acknowledgement was
/// in flight (simulator, seed 18431).
#[test]
fn what_was_sent_before_a_learner_was_named_again_does_not_make_it_caught_up() {
    let mut bench = beginning();
    bench.on(Event::LeaseConfirmed);
    bench.on(Event::PeersRegistered(vec![(A, 1), (B, 2)]));
    let named = |version, learners: &[StoreBoot]| ShardRecord {
        isr: vec![A.store],
        learners: learners.iter().map(|learner| learner.store).collect(),
        ..record(1, version, A)
    };
    bench.deliver(named(1, &[B]));
    bench.on(Event::Durable { group: 1 });
    bench.deliver(named(2, &[]));
    let effects = bench.deliver(named(3, &[B]));
    let opening = effects.iter().find_map(|effect| match effect {
        Effect::ToFollower { message: ToFollower::Append { n, .. }, .. } => Some(*n),
        _ => None,
    });
    let mut proposes = |n| {
        let effects =
            bench.on(Event::FromFollower { conn: TO_B, message: FromFollower::Ack { n } });
        effects.iter().any(|effect| matches!(effect, Effect::Propose { .. }))
    };
    let opening = opening.expect("it is fed again");
    assert!(!proposes(opening - 1));
    assert!(proposes(opening));
}

/// The log of what is flushed may be trimmed, and the entry of that very position with it: a
/// snapshot ends there, and the log continues from there. (Simulator, seed 8013782: the snapshot
/// was sent again and again, up to copy 719.)
#[test]
fn a_copy_of_the_state_is_followed_by_the_first_entry_after_it() {
    let mut bench = beginning();
    bench.node.shared.settings.log_memory_bytes = 1;
    bench.deliver(record(1, 1, A));
    bench.on(Event::Durable { group: 1 });
    bench.on(Event::FromFollower { conn: TO_B, message: FromFollower::Ack { n: 1 } });
    bench.now = Now((bench.node.shared.settings.flush_after_ms + 1) * 1_000);
    let effects = bench.on(Event::TurnEnded);
    let flush = effects.iter().find_map(|effect| match effect {
        Effect::Flush { flush, .. } => Some(*flush),
        _ => None,
    });
    bench.on(Event::Ingested { flush: flush.expect("the barrier is applied") });
    let mut entries = Vec::new();
    for n in 2..5 {
        let effects = bench.frame(n, add(n));
        entries.extend(effects.into_iter().filter_map(|effect| match effect {
            Effect::Write(LogRecord::Append { entry, .. }) => Some(entry),
            _ => None,
        }));
        bench.on(Event::Durable { group: n });
        bench.on(Event::FromFollower { conn: TO_B, message: FromFollower::Ack { n } });
    }
    assert!(bench.node.replica(SHARD).log.get(Seq(2)).is_none(), "it is on the disk only");

    let applied = bench.node.replica(SHARD).flushed;
    let reason = Reject::Mismatch { ends: vec![], applied };
    let reject = FromFollower::Reject { n: 5, shard: SHARD, reason };
    let effects = bench.on(Event::FromFollower { conn: TO_B, message: reject });
    let wanted = WantedEntries { shard: SHARD, after: applied };
    let reads = |effect: &Effect| match effect {
        Effect::ReadLog { wanted: these, .. } => *these == [wanted],
        _ => false,
    };
    assert!(effects.iter().any(reads), "{effects:?}");
    let part = LogPart { shard: SHARD, prev: applied, entries: entries.clone() };
    let effects = bench.on(Event::LogRead { at: LogLocation::default(), parts: vec![part] });
    let sent = effects.iter().find_map(|effect| match effect {
        Effect::ToFollower { message: ToFollower::Append { slices, .. }, .. } => slices.first(),
        _ => None,
    });
    let sent = sent.expect("it is fed");
    assert_eq!((sent.prev, &sent.entries[..]), (applied, &entries[..]));
}

/// The follower acknowledges after the refusal what it had taken before: that is no sign of room
/// (simulator, seed 2003905).
#[test]
fn a_follower_whose_disk_is_full_is_tried_again_whatever_it_acknowledges() {
    let mut bench = primary();
    bench.frame(1, add(1));
    bench.frame(2, add(2));
    let reason = Reject::NoSpace;
    let reject = FromFollower::Reject { n: 3, shard: SHARD, reason };
    bench.on(Event::FromFollower { conn: TO_B, message: reject });
    bench.on(Event::FromFollower { conn: TO_B, message: FromFollower::Ack { n: 3 } });
    bench.now = Now(bench.node.shared.settings.heartbeat_ms * 1_000);
    let effects = bench.on(Event::TurnEnded);
    assert_eq!(
        effects.iter().map(word).find(|word| word.starts_with("send")),
        Some("send 4".into())
    );
}

/// The follower's log is too long with entries that are not applied, and it was restarted: only the
/// commit makes the log shorter (simulator, seed 430).
#[test]
fn a_follower_whose_disk_is_full_learns_what_is_committed() {
    let mut bench = new_follower();
    let mut entries = log(&[1, 1]);
    entries.push(Entry::after(entries[1].position(), Epoch(1), TimeMs(1), Body::Ops(add(1))));
    bench.append(1, slice(1, &entries[..2], 0, true));
    bench.on(Event::Durable { group: 2 });
    bench.on(Event::DiskFull(true));
    let effects = bench.append(2, Slice { commit: Seq(3), ..slice(1, &entries, 1, false) });
    let refuses = |effect: &Effect| {
        let reason = Reject::NoSpace;
        *word(effect)
            == *word(&Effect::ToPrimary {
                conn: FROM_A,
                message: FromFollower::Reject { n: 2, shard: SHARD, reason },
            })
    };
    assert!(effects.iter().any(refuses), "{effects:?}");
    let replica = bench.node.replicas().next().expect("there is one");
    assert_eq!(
        (replica.last.seq, replica.commit, replica.state.applied.seq),
        (Seq(2), Seq(2), Seq(2))
    );
}

/// The primary counts what a copy acknowledges: a read of etcd that began before may be older than
/// the record that it counts for.
#[test]
fn a_copy_is_deleted_only_if_nothing_was_acknowledged_since_etcd_was_asked() {
    let mut bench = new_follower();
    let released = ShardRecord { isr: vec![A.store], target: vec![A.store], ..record(1, 2, A) };
    let on = |bench: &mut Bench, read| {
        bench.on(Event::ShardRecord { record: released.clone(), mod_revision: 8, read })
    };
    let asked = |effects: &[Effect]| {
        effects.iter().find_map(|effect| match effect {
            Effect::ReadRecord { read, .. } => Some(*read),
            _ => None,
        })
    };
    let drops = |effects: &[Effect]| {
        effects.iter().any(|effect| matches!(effect, Effect::Write(LogRecord::Drop { .. })))
    };
    // Two reads are in flight, in unknown order.
    let first = asked(&on(&mut bench, None)).unwrap();
    bench.now = bench.now.plus_ms(bench.node.shared.settings.timing.copy_recheck_ms);
    let second = asked(&bench.on(Event::TurnEnded)).unwrap();
    let entries = log(&[1]);
    bench.append(1, slice(1, &entries, 0, true));
    // The first of them shows that one more read is needed; the second began before that, too.
    let effects = on(&mut bench, Some(first));
    let third = asked(&effects).unwrap();
    assert!(!drops(&effects), "{effects:?}");
    let effects = on(&mut bench, Some(second));
    assert!(!drops(&effects), "{effects:?}");
    let effects = on(&mut bench, Some(third));
    assert!(drops(&effects) && asked(&effects).is_none(), "{effects:?}");
}

/// The entry is kept, since it is durable here; what follows it is not taken, and the shard's
/// status contains the reason.
#[test]
fn an_entry_of_a_newer_build_stops_the_copy_of_its_shard() {
    let mut bench = new_follower();
    let body = Body::Unknown { kind: 77, bytes: Bytes::from_static(b"later") };
    let mut entries = log(&[1]);
    entries.push(Entry::after(entries[0].position(), Epoch(1), TimeMs(1), body));
    entries.push(Entry::after(entries[1].position(), Epoch(1), TimeMs(1), Body::Barrier));
    let first = slice(1, &entries[..2], 0, true);
    let effects = bench.append(1, Slice { commit: Seq(2), ..first });
    assert!(effects.iter().map(word).any(|word| word == "append 2"), "{effects:?}");
    let effects = bench.append(2, slice(1, &entries, 2, false));
    assert!(effects.iter().map(word).any(|word| word == "reject: Stopped"), "{effects:?}");
    let view = bench.node.replicas().next().unwrap();
    let why = "an entry of a kind that only a newer build knows";
    assert_eq!((view.stopped, view.state.applied.seq <= Seq(1)), (Some(why), true));
}

/// Applied entries are committed; a log that contradicts them stops this copy, and cuts nothing.
#[test]
fn applied_entries_are_never_cut() {
    let mut bench = new_follower();
    let first = Slice { commit: Seq(2), ..slice(1, &log(&[1, 1]), 0, true) };
    bench.append(1, first);
    bench.on(Event::Durable { group: 2 });
    assert_eq!(bench.node.replicas().next().unwrap().state.applied.seq, Seq(2));
    let other = log(&[1, 3]);
    let want = ["promise 3", "suspect 1", "reject: Stopped", "sync 3"];
    check(bench.append(2, slice(3, &other, 0, true)), &want);
    assert!(bench.node.replicas().next().unwrap().unfit);
}

#[test]
fn a_read_is_captured_then_proved_then_answered() {
    let mut bench = primary();
    let message = read(None);
    check(bench.on(Event::Gateway { conn: GATEWAY, message }), &["load", "ask"]);
    check(bench.on(Event::Loaded { load: 2, values: vec![Some(42)], records: vec![] }), &[]);
    let answer = FromFollower::ReadIndex { round: 3, newer: vec![] };
    check(bench.on(Event::FromFollower { conn: TO_B, message: answer }), &["read [42]"]);
}

#[test]
fn a_read_is_refused_when_a_peer_has_promised_more() {
    let mut bench = primary();
    let message = read(None);
    bench.on(Event::Gateway { conn: GATEWAY, message });
    bench.on(Event::Loaded { load: 2, values: vec![Some(42)], records: vec![] });
    let answer = FromFollower::ReadIndex { round: 3, newer: vec![(SHARD, Epoch(2))] };
    check(bench.on(Event::FromFollower { conn: TO_B, message: answer }), &[]);
    bench.now = bench.now.plus_ms(40);
    check(bench.on(Event::TurnEnded), &["read refused"]);
}

/// The number of the etcd read that begins among these effects.
fn etcd_check(effects: &[Effect]) -> Option<u64> {
    effects.iter().find_map(|effect| match effect {
        Effect::CheckEtcd { check, .. } => Some(*check),
        _ => None,
    })
}

/// The number of the last read-index round that begins among these effects.
fn last_round(effects: &[Effect]) -> Option<u64> {
    let rounds = effects.iter().filter_map(|effect| match effect {
        Effect::ToFollower { message: ToFollower::ReadIndex { round, .. }, .. } => Some(*round),
        _ => None,
    });
    rounds.last()
}

/// Etcd names another primary, and the peer does not answer.
#[test]
fn a_read_is_refused_when_etcd_names_another_primary() {
    let mut bench = primary();
    bench.on(Event::Gateway { conn: GATEWAY, message: read(None) });
    bench.on(Event::Loaded { load: 2, values: vec![Some(42)], records: vec![] });
    bench.now = bench.now.plus_ms(40);
    let asked = etcd_check(&bench.on(Event::TurnEnded)).expect("etcd is asked, too");
    let records = Some(vec![record(2, 2, B)]);
    check(bench.on(Event::EtcdChecked { check: asked, records }), &["read refused"]);
}

/// Peers that were late once prove the reads, although etcd is away.
#[test]
fn a_late_round_is_followed_by_another_one_beside_etcd() {
    let mut bench = primary();
    let message = read(None);
    bench.on(Event::Gateway { conn: GATEWAY, message });
    bench.on(Event::Loaded { load: 2, values: vec![Some(42)], records: vec![] });
    bench.now = bench.now.plus_ms(40);
    let asked = bench.on(Event::TurnEnded);
    let round = last_round(&asked).expect("another round");
    assert!(etcd_check(&asked).is_some());
    check(bench.on(round_answered(round, &[])), &["read [42]"]);
}

#[test]
fn a_node_that_sees_a_newer_boot_of_its_store_exits() {
    let mut bench = primary();
    let newer = StoreBoot { boot: Boot(2), ..A };
    let effects = bench.on(Event::PeersRegistered(vec![(newer, 50)]));
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
    assert!(left(bench.deliver(record(2, 2, B))));
    assert!(!left(bench.on(Event::TurnEnded)), "reported once");

    let mut unreported = primary();
    unreported.on(Event::Leave);
    assert!(
        left(unreported.on(Event::LeaveNotReported)),
        "no coordinator will name another primary"
    );
    let mut alone = Bench::new(A);
    assert!(left(alone.on(Event::Leave)), "no shard needs it");
}

/// A follower counts for its primary until it is out of the set: if it ended before, it would hold
/// up what is written meanwhile.
#[test]
fn a_follower_that_is_to_end_stays_until_it_is_out_of_the_set() {
    let left = |effects: Vec<Effect>| effects.iter().any(|effect| matches!(effect, Effect::Left));
    let mut bench = new_follower();
    bench.node.shared.settings.min_in_sync = 1;
    assert!(!left(bench.on(Event::Leave)), "it is in sync");
    let without = ShardRecord { isr: vec![A.store], ..record(1, 2, A) };
    assert!(left(bench.deliver(without)));

    let mut late = new_follower();
    late.node.shared.settings.min_in_sync = 1;
    late.on(Event::Leave);
    late.now = late.now.plus_ms(late.node.shared.settings.timing.leave_within_ms);
    assert!(left(late.on(Event::TurnEnded)), "it has waited for long enough");
    let mut at_the_floor = new_follower();
    assert!(left(at_the_floor.on(Event::Leave)), "no primary may let it go");
}

// ---- bounded-stale reads: the primary ----------------------------------------------------------

fn proof_request(request: u64) -> Event {
    let message = FromFollower::ProofRequest { request, shards: vec![SHARD] };
    Event::FromFollower { conn: TO_B, message }
}

fn round_answered(round: u64, newer: &[(ShardId, Epoch)]) -> Event {
    let message = FromFollower::ReadIndex { round, newer: newer.to_vec() };
    Event::FromFollower { conn: TO_B, message }
}

#[test]
fn a_request_is_answered_with_a_commit_captured_after_it_came_and_proved_since() {
    let mut bench = primary();
    bench.frame(1, add(1));
    check(bench.on(proof_request(7)), &["ask"]);
    // An entry that is committed after the capture may be in the answer or not: it is not.
    bench.on(Event::Durable { group: 2 });
    let ack = Event::FromFollower { conn: TO_B, message: FromFollower::Ack { n: 2 } };
    check(bench.on(ack), &["applied []"]);
    check(bench.on(round_answered(2, &[])), &["proof 7: [(1, 1)], 0 refused"]);
    // The next proof contains it.
    check(bench.on(proof_request(8)), &["ask"]);
    check(bench.on(round_answered(4, &[])), &["proof 8: [(1, 2)], 0 refused"]);
}

/// A round that was in flight when the request came proves nothing for it.
#[test]
fn a_request_waits_for_a_round_that_begins_after_it() {
    let mut bench = primary();
    check(bench.on(proof_request(7)), &["ask"]);
    check(bench.on(proof_request(8)), &[]);
    check(bench.on(round_answered(2, &[])), &["ask", "proof 7: [(1, 1)], 0 refused"]);
    check(bench.on(round_answered(4, &[])), &["proof 8: [(1, 1)], 0 refused"]);
}

#[test]
fn nothing_is_proved_before_the_barrier_is_committed_nor_by_a_follower() {
    let mut bench = beginning();
    bench.deliver(record(1, 1, A));
    bench.on(Event::Durable { group: 1 });
    check(bench.on(proof_request(7)), &["proof 7: [], 1 refused"]);
    bench.on(Event::FromFollower { conn: TO_B, message: FromFollower::Ack { n: 1 } });
    check(bench.on(proof_request(8)), &["ask"]);
    bench.deliver(record(2, 2, B));
    check(bench.on(proof_request(9)), &["proof 9: [], 1 refused"]);
}

#[test]
fn a_peer_that_does_not_answer_proves_nothing_and_etcd_is_asked() {
    let mut bench = primary();
    bench.on(proof_request(7));
    bench.now = bench.now.plus_ms(40);
    let asked = etcd_check(&bench.on(Event::TurnEnded)).expect("B has not answered");
    let records = Some(vec![record(1, 1, A)]);
    let effects = bench.on(Event::EtcdChecked { check: asked, records });
    check(effects, &["proof 7: [(1, 1)], 0 refused"]);
    // Deposed meanwhile.
    bench.on(proof_request(8));
    bench.now = bench.now.plus_ms(200);
    let asked = etcd_check(&bench.on(Event::TurnEnded)).expect("the round has failed");
    let records = Some(vec![record(2, 2, B)]);
    let effects = bench.on(Event::EtcdChecked { check: asked, records });
    check(effects, &["proof 8: [], 1 refused"]);
}

#[test]
fn a_peer_that_has_promised_more_proves_nothing() {
    let mut bench = primary();
    let round = last_round(&bench.on(proof_request(7))).expect("B is asked");
    check(bench.on(round_answered(round, &[(SHARD, Epoch(2))])), &[]);
    bench.now = bench.now.plus_ms(40);
    check(bench.on(Event::TurnEnded), &["proof 7: [], 1 refused"]);
}

// ---- bounded-stale reads: the follower ---------------------------------------------------------

/// B with two entries of A's, both fsynced; as far as B knows, the first of them is committed.
fn follower() -> Bench {
    let mut bench = new_follower();
    bench.on(Event::GatewayConnected { conn: GATEWAY });
    bench.append(1, Slice { commit: Seq(1), ..slice(1, &log(&[1, 1]), 0, true) });
    bench.on(Event::Durable { group: 2 });
    assert_eq!(bench.node.replicas().next().unwrap().state.applied.seq, Seq(1));
    bench
}

impl Bench {
    fn bounded_read(&mut self, max_staleness_ms: u64) -> Vec<Effect> {
        self.on(Event::Gateway { conn: GATEWAY, message: read(Some(max_staleness_ms)) })
    }

    /// Answers the last proof request.
    fn proof(&mut self, epoch: u64, commit: u64) -> Vec<Effect> {
        let proven = vec![(SHARD, Epoch(epoch), Seq(commit))];
        let message = ToFollower::Proof { request: self.proof_request, proven, refused: vec![] };
        self.on(Event::FromPrimary { conn: FROM_A, message })
    }

    /// Answers the oldest load.
    fn loaded(&mut self) -> Vec<Effect> {
        let load = self.loads.pop_front().expect("something was asked for");
        self.on(Event::Loaded { load, values: vec![Some(42)], records: vec![] })
    }

    /// The effects of an event at this moment, without what is due then.
    fn at_ms(&mut self, ms: u64) -> &mut Self {
        self.now = Now(ms * 1_000);
        self.on(Event::TurnEnded);
        self
    }
}

/// The time of the request counts, not that of its answer.
#[test]
fn a_read_is_as_old_as_the_probe_that_proved_it() {
    let mut bench = follower();
    bench.at_ms(100);
    check(bench.bounded_read(1_000), &["proof request"]);
    bench.at_ms(107);
    check(bench.proof(1, 2), &["load"]);
    bench.at_ms(110);
    check(bench.loaded(), &["read [42], 10000 us old"]);
}

#[test]
fn what_is_applied_must_reach_the_commit() {
    let mut bench = follower();
    check(bench.bounded_read(1_000), &["proof request"]);
    // Seq 3 has not come yet: nothing is answered, and no other proof is requested.
    check(bench.proof(1, 3), &[]);
    check(bench.bounded_read(1_000), &[]);
    let entries = log(&[1, 1, 1]);
    check(
        bench.append(2, Slice { commit: Seq(3), ..slice(1, &entries, 2, false) }),
        &["append 3", "sync 3"],
    );
    check(bench.on(Event::Durable { group: 3 }), &["ack 2", "load", "load"]);
}

#[test]
fn an_answer_of_another_epoch_than_the_promised_one_is_dropped() {
    for epoch in [0, 2] {
        let mut bench = follower();
        check(bench.bounded_read(1_000), &["proof request"]);
        check(bench.proof(epoch, 1), &["too stale"]);
        check(bench.bounded_read(1_000), &["proof request"]);
    }
}

#[test]
fn an_answer_to_no_probe_of_ours_is_dropped() {
    let mut bench = follower();
    check(bench.proof(1, 1), &[]);
    check(bench.bounded_read(1_000), &["proof request"]);
    bench.proof_request += 1;
    check(bench.proof(1, 1), &[]);
    bench.proof_request -= 1;
    check(bench.proof(1, 1), &["load"]);
}

/// Reads within the bound need no message; from half of it on the next proof is requested in the
/// background.
#[test]
fn a_proof_serves_while_it_is_young_enough() {
    let mut bench = follower();
    bench.at_ms(100);
    bench.bounded_read(1_000);
    check(bench.proof(1, 1), &["load"]);
    bench.loaded();
    bench.at_ms(600);
    check(bench.bounded_read(1_000), &["load"]);
    check(bench.loaded(), &["read [42], 500000 us old"]);
    bench.at_ms(601);
    check(bench.bounded_read(1_000), &["load", "proof request"]);
    // A request is in flight: the next read shares it.
    check(bench.bounded_read(1_000), &["load"]);
    check(bench.bounded_read(400), &[]);
    bench.at_ms(1_100);
    check(bench.bounded_read(1_000), &["load"]);
    bench.now = Now(1_100_001);
    check(bench.bounded_read(1_000), &[]);
}

#[test]
fn without_a_proof_in_time_a_read_is_refused() {
    // The primary is silent.
    let mut bench = follower();
    check(bench.bounded_read(1_000), &["proof request"]);
    assert!(bench.node.next_deadline() <= Some(Now(300_000)));
    bench.now = Now(299_999);
    assert!(!bench.on(Event::TurnEnded).iter().any(|effect| word(effect) == "too stale"));
    bench.now = Now(300_000);
    assert!(bench.on(Event::TurnEnded).iter().any(|effect| word(effect) == "too stale"));
    // The read waits no longer than it could use a proof.
    bench.bounded_read(10);
    bench.now = Now(310_000);
    check(bench.on(Event::TurnEnded), &["too stale"]);
    // The primary refuses a proof.
    bench.bounded_read(1_000);
    let message =
        ToFollower::Proof { request: bench.proof_request, proven: vec![], refused: vec![SHARD] };
    check(bench.on(Event::FromPrimary { conn: FROM_A, message }), &["too stale"]);
    // The primary is not connected.
    bench.bounded_read(1_000);
    check(bench.on(Event::Closed { conn: FROM_A }), &["too stale"]);
    check(bench.bounded_read(1_000), &["too stale"]);
}

/// A gateway with an older map sends the read to the primary, which answers it like any other.
#[test]
fn a_primary_answers_a_bounded_read_like_any_other() {
    let mut bench = primary();
    check(bench.bounded_read(1_000), &["load", "ask"]);
    bench.loaded();
    check(bench.on(round_answered(3, &[])), &["read [42]"]);
}

/// The store's log may have lost that there was a copy. Created again at epoch 1 it would look like
/// one that was always empty, and be promoted like any other.
#[test]
fn a_suspect_store_makes_no_copy_that_passes_for_a_new_one() {
    #[track_caller]
    fn check(suspect: bool, unfit: bool) {
        let mut bench = Bench::new(B);
        bench.node.shared.settings.suspect = suspect;
        bench.deliver(record(1, 1, A));
        let message = NodeQuery::Gather { shards: vec![SHARD] };
        let effects = bench.on(Event::Query { query: 1, message });
        let reports = |effect: &Effect| match effect {
            Effect::QueryReply { reply: NodeQueryReply::Gather { ends, .. }, .. } => {
                ends.iter().any(|end| end.unfit == unfit)
            }
            _ => false,
        };
        assert!(effects.iter().any(reports), "{effects:?}");
    }
    check(false, false);
    check(true, true);
}

#[test]
fn a_node_without_a_copy_answers_no_read() {
    let mut bench = Bench::new(B);
    bench.on(Event::GatewayConnected { conn: GATEWAY });
    check(bench.bounded_read(1_000), &["too stale"]);
}

// ---- audit -------------------------------------------------------------------------------------

/// The digest of A's copy once its barrier is applied, and one of B's with other counters.
fn points(bench: &Bench) -> (DigestPoint, DigestPoint) {
    let own = bench.node.replica(SHARD).digest();
    (own, DigestPoint { counters: 9, ..own })
}

/// B reports its digests. Returns the effects at once, and at the next review.
fn report_digests(bench: &mut Bench, digests: Vec<DigestPoint>) -> Vec<Effect> {
    let wall = TimeMs(0);
    let message = FromFollower::Alive {
        sent: 0,
        fsync_age_ms: 0,
        full: false,
        room_bytes: u64::MAX,
        wall,
        digests,
    };
    let mut effects = bench.on(Event::FromFollower { conn: TO_B, message });
    bench.now = bench.now.plus_ms(60);
    effects.extend(bench.on(Event::TurnEnded));
    effects.retain(|effect| {
        matches!(
            effect,
            Effect::Audit(_)
                | Effect::Scrub { .. }
                | Effect::ToFollower { message: ToFollower::Damaged { .. }, .. }
        )
    });
    effects
}

fn scrubbed(bench: &mut Bench, scrub: u64, found: Vec<ScrubbedShard>) -> Vec<Effect> {
    bench.on(Event::WallClock(TimeMs(77)));
    let effects = bench.on(Event::Scrubbed { scrub, found });
    bench.now = bench.now.plus_ms(60);
    bench.on(Event::TurnEnded);
    effects
}

/// A and B differ, and there is no third copy: A's disk is scrubbed.
fn differing() -> (Bench, DigestPoint, u64) {
    let mut bench = primary();
    let (own, theirs) = points(&bench);
    assert_eq!(own.seq, Seq(1));
    let effects = report_digests(&mut bench, vec![theirs]);
    let [Effect::Audit(found), Effect::Scrub { scrub, shards, .. }] = &effects[..] else {
        panic!("{effects:?}")
    };
    let decision = "undecided, scrubbing own copy";
    assert_eq!(*found, AuditFinding::DigestsDiffer { own, store: B.store, theirs, decision });
    assert_eq!((&shards[..], bench.node.digest_mismatches()), (&[Slots::ALL][..], 1));
    let scrub = *scrub;
    (bench, own, scrub)
}

#[test]
fn equal_digests_are_no_finding() {
    let mut bench = primary();
    let (own, _) = points(&bench);
    assert!(report_digests(&mut bench, vec![own]).is_empty());
    assert_eq!(bench.node.digest_mismatches(), 0);
}

#[test]
fn a_primary_whose_disk_confirms_its_digest_is_right() {
    let (mut bench, own, scrub) = differing();
    let effects = scrubbed(&mut bench, scrub, vec![]);
    let is_marked = |effect: &Effect| {
        let Effect::ToFollower { message: ToFollower::Damaged { point, .. }, .. } = effect else {
            return false;
        };
        *point == own
    };
    assert!(effects.iter().any(is_marked), "{effects:?}");
    // At `min_in_sync` the follower stays in the set, marked: not to be promoted.
    assert!(effects.iter().any(|effect| match effect {
        Effect::Propose { record, .. } => record.tainted == [B.store],
        _ => false,
    }));
    assert_eq!(bench.node.reporter.reported().resigned, []);
    // The follower continues to report what it had.
    let (_, theirs) = points(&bench);
    assert!(report_digests(&mut bench, vec![theirs]).is_empty());
}

#[test]
fn a_primary_whose_disk_contradicts_its_digest_asks_to_be_replaced() {
    let (mut bench, own, scrub) = differing();
    let on_disk = ScrubbedShard { copy: CopyNo(1), point: own, counters: own.counters + 1 };
    let effects = scrubbed(&mut bench, scrub, vec![on_disk]);
    let damaged = AuditFinding::Scrubbed { shards: 1, damaged: vec![SHARD] };
    assert!(effects.iter().any(|effect| matches!(effect, Effect::Audit(it) if *it == damaged)));
    assert_eq!(bench.node.reporter.reported().resigned, [SHARD]);
    let read = bench.on(Event::Gateway { conn: GATEWAY, message: read(None) });
    check(read, &["read refused"]);
    let status = bench.node.last_scrub();
    assert_eq!((status.ended, status.shards, status.damaged), (TimeMs(77), 1, vec![SHARD]));
}

#[test]
fn a_record_on_disk_that_was_never_written_is_damage() {
    #[track_caller]
    fn check(on_disk: impl Fn(DigestPoint) -> ScrubbedShard, damaged: bool) {
        let mut bench = primary();
        let (own, _) = points(&bench);
        bench.on(Event::Query {
            query: 1,
            message: NodeQuery::Scrub { shards: vec![], bytes_per_s: 0 },
        });
        let scrub = bench.node.audit.scrub_in_flight().expect("begun at once");
        scrubbed(&mut bench, scrub, vec![on_disk(own)]);
        assert_eq!(bench.node.replica(SHARD).trust.stopped().is_some(), damaged);
    }
    let copy = CopyNo(1);
    check(|point| ScrubbedShard { copy, point, counters: point.counters }, false);
    check(|point| ScrubbedShard { copy, point, counters: 5 }, true);
    let other = |point| DigestPoint { sessions: 5, ..point };
    check(|point| ScrubbedShard { copy, point: other(point), counters: point.counters }, true);
    // A former copy counts for nothing, and of a seq without a kept digest nothing is known.
    check(|point| ScrubbedShard { copy: CopyNo(0), point, counters: 5 }, false);
    let elsewhere = |point| DigestPoint { seq: Seq(8), ..other(point) };
    check(|point| ScrubbedShard { copy, point: elsewhere(point), counters: point.counters }, false);
}

#[test]
fn a_follower_whose_copy_is_marked_corrupt_takes_nothing_more() {
    let mut bench = new_follower();
    let entries = log(&[1, 1]);
    bench.append(1, slice(1, &entries[..1], 0, true));
    bench.on(Event::Durable { group: 2 });
    let point = DigestPoint { counters: 9, ..bench.node.replica(SHARD).digest() };
    let say = |bench: &mut Bench, copy| {
        let message = ToFollower::Damaged { epoch: Epoch(1), copy: CopyNo(copy), point };
        bench.on(Event::FromPrimary { conn: FROM_A, message })
    };
    // A digest of a copy that is gone.
    say(&mut bench, 7);
    assert_eq!(bench.node.replica(SHARD).trust.stopped(), None);
    let effects = say(&mut bench, 1);
    let announced = |effect: &Effect| {
        matches!(effect, Effect::ToPrimary { message: FromFollower::Copy { .. }, .. })
    };
    assert!(effects.iter().any(announced), "its primary is to ask: {effects:?}");
    let noted = |effect: &Effect| matches!(effect, Effect::Write(LogRecord::Suspect { .. }));
    assert!(effects.iter().any(noted), "a restart must know: {effects:?}");
    check(bench.append(2, slice(1, &entries, 1, true)), &["reject: Stopped"]);
    check(bench.on(Event::Durable { group: 3 }), &["ack 2"]);
}

/// The last entry of a shard without writes is compared, too.
#[test]
fn at_rest_the_digest_of_the_last_entry_is_sent() {
    let mut bench = new_follower();
    let body =
        Body::ExpireSessions { up_to: Revision { incarnation: 1, revision: 9 }, survivors: vec![] };
    let entry = Entry::after(Position::default(), Epoch(1), TimeMs(1), body);
    let slice = Slice { commit: Seq(1), ..slice(1, &[entry], 0, true) };
    bench.append(1, slice);
    bench.on(Event::Durable { group: 2 });
    let mut beat = || {
        let message = ToFollower::Heartbeat { sent: 0, commits: vec![] };
        let effects = bench.on(Event::FromPrimary { conn: FROM_A, message });
        let digests = |effect: Effect| match effect {
            Effect::ToPrimary { message: FromFollower::Alive { digests, .. }, .. } => {
                Some(digests.iter().map(|point| point.seq.0).collect::<Vec<_>>())
            }
            _ => None,
        };
        effects.into_iter().find_map(digests).expect("an answer")
    };
    assert_eq!(beat(), []);
    assert_eq!(beat(), [1]);
    assert_eq!(beat(), []);
}

/// Rows may be left of a copy that was dropped just before a crash, without a record: only the
/// number of the copy is known then, and none of its slots.
#[test]
fn before_a_copy_is_made_again_the_whole_shard_is_cleared_of_a_former_one() {
    let mut bench = Bench::new(B);
    let dropped = RecoveredReplica {
        shard: SHARD,
        slots: Slots { lo: 0, hi: 0 },
        promised: Epoch(1),
        copy: CopyNo(1),
        acted_on: None,
        content: None,
    };
    bench.node = Node::new(bench.node.shared.settings.clone(), B, Now(0), 1, vec![dropped]);
    let effects = bench.deliver(record(1, 1, A));
    let cleared = effects.iter().find_map(|effect| match effect {
        Effect::DropRows { shard: SHARD, slots } => Some(*slots),
        _ => None,
    });
    assert_eq!(cleared, Some(Slots::ALL));
    check(bench.on(Event::RowsDropped { shard: SHARD }), &["copy 2", "sync 1"]);
}

/// An in-sync member that has every acknowledged entry, but does not know yet that they are
/// committed, may lead: a damaged copy is not promoted in its place.
#[test]
fn a_copy_made_empty_is_fit_once_it_holds_the_barrier_of_its_epoch() {
    #[track_caller]
    fn check(bench: &Bench, unfit: bool) {
        assert_eq!(bench.node.replicas().next().unwrap().unfit, unfit);
    }
    let mut bench = Bench::new(B);
    bench.deliver(record(2, 2, A));
    bench.on(Event::Accepted { conn: FROM_A });
    bench.on(Event::FromPrimary { conn: FROM_A, message: ToFollower::Hello { from: A, to: B } });
    bench.on(Event::Durable { group: 1 });
    let entries = log(&[1, 2]);
    bench.append(1, slice(2, &entries[..1], 0, true));
    bench.on(Event::Durable { group: 2 });
    check(&bench, true);
    bench.append(2, slice(2, &entries, 1, false));
    check(&bench, true);
    bench.on(Event::Durable { group: 3 });
    check(&bench, false);
}

/// After an accepted loss, a committed entry is cut before it is applied. Another entry takes its
/// place, which this follower must not apply before its own primary has committed it.
#[test]
fn an_entry_in_place_of_a_committed_one_waits_for_its_own_commit() {
    let mut bench = new_follower();
    let lost = Slice { commit: Seq(5), ..slice(1, &log(&[1; 5]), 0, true) };
    bench.append(1, lost);
    assert_eq!(bench.node.replica(SHARD).commit, Seq(5));
    bench.append(2, slice(2, &log(&[1, 1, 1, 2, 2]), 3, true));
    while let Some(group) = bench.node.shared.storage.groups().covering() {
        bench.on(Event::Durable { group });
    }
    let replica = bench.node.replica(SHARD);
    assert_eq!(replica.log.last().epoch, Epoch(2));
    assert_eq!(replica.state.applied.seq, Seq(3));
}

/// A primary that learns of its successor by what that one sends tells gateways, at once, that its
/// shard is not frozen any more.
#[test]
fn a_deposed_primary_takes_back_that_it_was_frozen() {
    let states = |effects: Vec<Effect>| {
        let state = |effect: &Effect| match effect {
            Effect::Gateway { reply: NodeReply::ShardState { state, .. }, .. } => Some(*state),
            _ => None,
        };
        effects.iter().filter_map(state).collect::<Vec<_>>()
    };
    let mut bench = primary();
    bench.node.replica_mut(SHARD).primary_mut().expect("it leads").frozen = true;
    bench.node.shared.shards.to_advance.insert(SHARD);
    assert_eq!(states(bench.on(Event::TurnEnded)), [ShardAvailability::Frozen]);
    let conn = Conn(30);
    bench.on(Event::Accepted { conn });
    bench.on(Event::FromPrimary { conn, message: ToFollower::Hello { from: B, to: A } });
    let own = bench.node.replica(SHARD).log.last();
    let barrier = Entry::after(own, Epoch(2), TimeMs(1), Body::Barrier);
    let slice = Slice { prev: own, ..slice(2, &[barrier], 0, true) };
    let message = ToFollower::Append { n: 1, slices: vec![slice] };
    assert_eq!(states(bench.on(Event::FromPrimary { conn, message })), [ShardAvailability::Open]);
}
