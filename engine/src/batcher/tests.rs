//! One batcher at a time: events in, exact effects out.
//!
//! The cluster here is one shard (or two) and two nodes. Node 1 leads at first, over connection 1;
//! node 2 is a follower, on connection 2. A turn is some events and then `TurnEnded`.

mod load;
mod tokens;

use super::*;
use crate::batch::{BATCH_OPS_MAX, Batch, Codec};
use crate::ids::{BatchSeq, Boot, Epoch, Revision, Slots, TimeMs, Version};
use crate::message::{BatchReply, ReadResult, Refusal, ShardAvailability};
use crate::ops::{self, OpKind};

const ALL: Slots = Slots::ALL;
const LEFT: Slots = Slots { lo: 0, hi: 32_767 };
const RIGHT: Slots = Slots { lo: 32_768, hi: 65_535 };
const DEADLINE: Now = Now(5_000_000);

fn node(store: u128) -> StoreBoot {
    StoreBoot { store: StoreId(store), boot: Boot(1) }
}

fn session(revision: u64) -> SessionId {
    SessionId(Revision { incarnation: 1, revision })
}

fn record(slots: Slots, epoch: u64, primary: u128) -> ShardRecord {
    let (epoch, version) = (Epoch(epoch), Version(epoch));
    ShardRecord { slots, epoch, version, primary: node(primary), ..ShardRecord::default() }
}

fn op(key: &str, kind: OpKind) -> Op {
    Op { counter: CounterKey::new(b"n", key.as_bytes()).expect("a short plain name"), kind }
}

fn add(key: &str, delta: i128) -> Op {
    op(key, OpKind::Add { delta })
}

fn returning(key: &str, delta: i128) -> Op {
    op(key, OpKind::AddReturning { delta })
}

fn delete(key: &str) -> Op {
    op(key, OpKind::Delete)
}

/// A key of the shard.
fn key_in(slots: Slots) -> String {
    let all = (0..).map(|number: u32| number.to_string());
    let mut fits = all.filter(|key| slots.contains(add(key, 0).counter.slot()));
    fits.next().expect("there is no end of keys")
}

fn batch_of(slots: Slots, of: u64, batch_seq: u64, ops: &[Op]) -> Batch {
    let (session, batch_seq) = (session(of), BatchSeq(batch_seq));
    Batch::seal(slots, session, batch_seq, batch_seq, Codec::Raw, ops::encode(ops))
}

/// A batch of session 7 and the one shard.
fn batch(batch_seq: u64, ops: &[Op]) -> Batch {
    batch_of(ALL, 7, batch_seq, ops)
}

fn frame<'a>(conn: u64, message: u64, batches: impl IntoIterator<Item = &'a Batch>) -> Effect {
    let batches = batches.into_iter().cloned().collect();
    Effect::Send { conn: Conn(conn), message: GatewayMessage::Frame { message, batches } }
}

fn write(request: u64, ops: &[Op]) -> Event {
    Event::Write { request, ops: ops.to_vec(), token: None, deadline: DEADLINE }
}

fn answer(conn: u64, message: u64, batch: &Batch, answer: BatchReply) -> Event {
    let (slots, session, batch_seq) = (batch.slots, batch.session, batch.batch_seq);
    let reply = NodeReply::Answer { message, slots, session, batch_seq, answer };
    Event::Reply { conn: Conn(conn), reply }
}

fn applied(values: &[i128]) -> BatchReply {
    BatchReply::Applied { values: values.to_vec(), tokens: Vec::new(), time: TimeMs(0) }
}

fn refused(refusal: Refusal) -> BatchReply {
    BatchReply::Refused(refusal)
}

fn wrote(request: u64) -> Effect {
    Effect::Wrote { request, result: WriteResult::default() }
}

fn values(request: u64, values: &[(u32, i128)]) -> Effect {
    let result = WriteResult { values: values.to_vec(), ..WriteResult::default() };
    Effect::Wrote { request, result }
}

fn failed(request: u64, failed: &[(u32, Failure)]) -> Effect {
    let result = WriteResult { failed: failed.to_vec(), ..WriteResult::default() };
    Effect::Wrote { request, result }
}

fn connected(conn: u64, to: u128) -> Event {
    Event::Connected { conn: Conn(conn), node: node(to) }
}

fn closed(conn: u64) -> Event {
    Event::Closed { conn: Conn(conn) }
}

fn state(conn: u64, state: ShardAvailability) -> Event {
    let reply = NodeReply::ShardState { slots: ALL, state };
    Event::Reply { conn: Conn(conn), reply }
}

/// A batcher and a clock that the test sets.
struct Bench {
    batcher: Batcher,
    now: Now,
}

impl Bench {
    fn with(settings: Settings, records: &[ShardRecord]) -> Self {
        let mut bench = Self { batcher: Batcher::new(settings), now: Now(0) };
        let mut events = vec![Event::Session(Some(session(7))), connected(1, 1), connected(2, 2)];
        events.extend(records.iter().cloned().map(Event::ShardRecord));
        bench.turn(events, &[]);
        assert_eq!(bench.batcher.not_ready(), None);
        bench
    }

    /// One shard, led by node 1.
    fn new() -> Self {
        Self::with(Settings::default(), &[record(ALL, 1, 1)])
    }

    /// A batch of one operation is in flight: batch 1, request 1, message 1 on connection 1.
    fn with_batch_in_flight() -> (Self, Batch) {
        let mut bench = Self::new();
        let sent = batch(1, &[add("a", 1)]);
        let out = std::slice::from_ref(&sent);
        bench.turn([write(1, &[add("a", 1)])], &[frame(1, 1, out)]);
        (bench, sent)
    }

    fn at_ms(&mut self, ms: u64) -> &mut Self {
        self.now = Now(ms * 1_000);
        self
    }

    /// These events in one turn have exactly these effects.
    #[track_caller]
    fn turn(&mut self, events: impl IntoIterator<Item = Event>, want: &[Effect]) -> &mut Self {
        let mut effects = Vec::new();
        for event in events {
            self.batcher.handle(self.now, event, &mut effects);
        }
        self.batcher.handle(self.now, Event::TurnEnded, &mut effects);
        assert_eq!(effects, want);
        let deadline = self.batcher.next_deadline();
        assert!(deadline.is_none_or(|at| at > self.now), "turns without end: {deadline:?}");
        self
    }

    /// Nothing happens until then, and then these effects.
    #[track_caller]
    fn wakes_at_ms(&mut self, ms: u64, want: &[Effect]) -> &mut Self {
        assert_eq!(self.batcher.next_deadline(), Some(Now(ms * 1_000)));
        self.at_ms(ms).turn([], want)
    }
}

// ---- writes ------------------------------------------------------------------------------------

#[test]
fn what_is_ready_together_travels_together() {
    let mut bench = Bench::new();
    let sent = batch(1, &[add("a", 1), add("b", 2)]);
    bench.turn([write(1, &[add("a", 1)]), write(2, &[add("b", 2)])], &[frame(1, 1, [&sent])]);
    // While it is in flight, other operations gather.
    bench.turn([write(3, &[add("a", 4)])], &[]);
    bench.turn([write(4, &[add("a", 8)])], &[]);
    let next = batch(2, &[add("a", 12)]);
    bench.turn([answer(1, 1, &sent, applied(&[]))], &[wrote(1), wrote(2), frame(1, 2, [&next])]);
    bench.turn([answer(1, 2, &next, applied(&[]))], &[wrote(3), wrote(4)]);
    assert!(bench.batcher.is_idle());
    assert_eq!((bench.batcher.bytes(), bench.batcher.next_deadline()), (0, None));
}

#[test]
fn a_request_is_answered_when_all_its_shards_are() {
    let mut bench = Bench::with(Settings::default(), &[record(LEFT, 1, 1), record(RIGHT, 1, 2)]);
    let (left, right) = (key_in(LEFT), key_in(RIGHT));
    let to_left = batch_of(LEFT, 7, 1, &[returning(&left, 1)]);
    let to_right = batch_of(RIGHT, 7, 1, &[add(&right, 2)]);
    bench.turn(
        [write(1, &[add(&right, 2), returning(&left, 1)])],
        &[frame(1, 1, [&to_left]), frame(2, 1, [&to_right])],
    );
    bench.turn([answer(1, 1, &to_left, applied(&[5]))], &[]);
    bench.turn([answer(2, 1, &to_right, applied(&[]))], &[values(1, &[(1, 5)])]);
}

/// One message carries everything for a node, and a third message waits for room in the window.
#[test]
fn a_connection_packs_all_shards_of_its_node() {
    let mut bench = Bench::with(Settings::default(), &[record(LEFT, 1, 1), record(RIGHT, 1, 1)]);
    let (left, right) = (key_in(LEFT), key_in(RIGHT));
    let to_left = batch_of(LEFT, 7, 1, &[add(&left, 1)]);
    let to_right = batch_of(RIGHT, 7, 1, &[add(&right, 1)]);
    bench.turn([write(1, &[add(&right, 1), add(&left, 1)])], &[frame(1, 1, [&to_left, &to_right])]);
    // The left shard is answered and goes on, while the right one delays only itself.
    let next = batch_of(LEFT, 7, 2, &[add(&left, 2)]);
    bench.turn(
        [write(2, &[add(&left, 2)]), answer(1, 1, &to_left, applied(&[]))],
        &[frame(1, 2, [&next])],
    );
    // Two messages are not answered in full: the window is full, until the older one is 5 ms old.
    let third = batch_of(LEFT, 7, 3, &[add(&left, 3)]);
    bench.at_ms(1).turn([answer(1, 2, &next, applied(&[]))], &[wrote(2)]);
    bench.turn([write(3, &[add(&left, 3)])], &[frame(1, 3, [&third])]);
    bench.turn(
        [write(4, &[add(&left, 4)]), answer(1, 3, &third, applied(&[]))],
        &[wrote(3), frame(1, 4, [&batch_of(LEFT, 7, 4, &[add(&left, 4)])])],
    );
}

/// The shards of a request are those of 4, all of node 1.
fn bench_of_four() -> (Bench, Vec<String>, impl Fn(usize, u64, i128) -> Batch) {
    let records: Vec<_> = shard_map::ranges(4).map(|slots| record(slots, 1, 1)).collect();
    let bench = Bench::with(Settings::default(), &records);
    let slots: Vec<Slots> = records.iter().map(|record| record.slots).collect();
    let keys: Vec<String> = slots.iter().map(|&slots| key_in(slots)).collect();
    let names = keys.clone();
    let batch = move |at: usize, batch_seq: u64, delta: i128| {
        batch_of(slots[at], 7, batch_seq, &[add(&names[at], delta)])
    };
    (bench, keys, batch)
}

#[test]
fn the_window_is_two_messages_until_the_older_one_lapses() {
    let (mut bench, keys, batch) = bench_of_four();
    let ask = |request: u64| [write(request, &[add(&keys[request as usize - 1], 1)])];
    let sends = |message: u64, at: usize| frame(1, message, [&batch(at, 1, 1)]);
    bench.turn(ask(1), &[sends(1, 0)]);
    bench.at_ms(1).turn(ask(2), &[sends(2, 1)]);
    bench.at_ms(2).turn(ask(3), &[]);
    bench.wakes_at_ms(5, &[sends(3, 2)]);
    bench.turn(ask(4), &[]);
    // An answer makes room sooner.
    bench.turn([answer(1, 2, &batch(1, 1, 1), applied(&[]))], &[wrote(2), sends(4, 3)]);
}

#[test]
fn a_message_that_is_smaller_than_the_one_that_is_out_waits_until_that_is_late() {
    let (mut bench, keys, batch) = bench_of_four();
    // An answer takes 10 ms.
    let (first, next) = (batch(0, 1, 1), [batch(0, 2, 1), batch(1, 1, 1)]);
    bench.turn([write(1, &[add(&keys[0], 1)])], &[frame(1, 1, [&first])]);
    bench.at_ms(10).turn([answer(1, 1, &first, applied(&[]))], &[wrote(1)]);
    bench.turn([write(2, &[add(&keys[0], 1), add(&keys[1], 1)])], &[frame(1, 2, &next)]);
    bench.at_ms(11).turn([write(3, &[add(&keys[2], 1)])], &[]);
    bench.wakes_at_ms(25, &[frame(1, 3, [&batch(2, 1, 1)])]);
    // Twice as much as is out goes at once, but not in a third message.
    bench.turn([write(4, &[add(&keys[3], 1), add(&keys[3], 1)])], &[]);
    bench.at_ms(26).turn([answer(1, 2, &next[0], applied(&[]))], &[]);
    bench.turn([answer(1, 2, &next[1], applied(&[]))], &[wrote(2), frame(1, 4, [&batch(3, 1, 2)])]);
}

#[test]
fn the_bytes_in_flight_to_a_node_are_bounded() {
    let settings = Settings { connection_bytes_max: 1, ..Settings::default() };
    let mut bench = Bench::with(settings, &[record(LEFT, 1, 1), record(RIGHT, 1, 1)]);
    let (left, right) = (key_in(LEFT), key_in(RIGHT));
    let to_left = batch_of(LEFT, 7, 1, &[add(&left, 1)]);
    let to_right = batch_of(RIGHT, 7, 1, &[add(&right, 1)]);
    bench.turn([write(1, &[add(&right, 1), add(&left, 1)])], &[frame(1, 1, [&to_left])]);
    bench.turn([answer(1, 1, &to_left, applied(&[]))], &[frame(1, 2, [&to_right])]);
}

#[test]
fn a_queue_lingers_if_linger_is_set() {
    let settings = Settings { linger_us: 3_000, ..Settings::default() };
    let mut bench = Bench::with(settings, &[record(ALL, 1, 1)]);
    bench.at_ms(10).turn([write(1, &[add("a", 1)])], &[]);
    bench.at_ms(11).turn([write(2, &[add("a", 1)])], &[]);
    bench.wakes_at_ms(13, &[frame(1, 1, [&batch(1, &[add("a", 2)])])]);
    // A full batch does not wait.
    let names: Vec<String> = (0..BATCH_OPS_MAX).map(|number| number.to_string()).collect();
    let ops: Vec<Op> = names.iter().map(|name| add(name, 1)).collect();
    let mut bench =
        Bench::with(Settings { linger_us: 3_000, ..Settings::default() }, &[record(ALL, 1, 1)]);
    bench.turn([write(1, &ops)], &[frame(1, 1, [&batch(1, &ops)])]);
}

#[test]
fn more_than_one_batch_goes_one_after_the_other() {
    let mut bench = Bench::new();
    let names: Vec<String> = (0..BATCH_OPS_MAX + 1).map(|number| number.to_string()).collect();
    let ops: Vec<Op> = names.iter().map(|name| add(name, 1)).collect();
    let first = batch(1, &ops[..BATCH_OPS_MAX]);
    let second = batch(2, &ops[BATCH_OPS_MAX..]);
    bench.turn([write(1, &ops)], &[frame(1, 1, [&first])]);
    bench.turn([answer(1, 1, &first, applied(&[]))], &[frame(1, 2, [&second])]);
    bench.turn([answer(1, 2, &second, applied(&[]))], &[wrote(1)]);
}

// ---- coalescing --------------------------------------------------------------------------------

/// The counter was at 100. Each client gets the value right after its own add.
#[test]
fn waiters_of_one_merged_add_get_their_own_values() {
    let mut bench = Bench::new();
    let ops = [returning("a", 1), add("a", 10), returning("b", 7)];
    let sent = batch(1, &[returning("a", 1111), returning("b", 7)]);
    bench.turn(
        [write(1, &ops), write(2, &[returning("a", 100), add("a", 1000)])],
        &[frame(1, 1, [&sent])],
    );
    bench.turn(
        [answer(1, 1, &sent, applied(&[1211, 7]))],
        &[values(1, &[(0, 101), (2, 7)]), values(2, &[(0, 211)])],
    );
}

#[test]
fn values_are_distinct_across_a_delete() {
    let mut bench = Bench::new();
    let ops = [returning("a", 1), delete("a"), returning("a", 2), returning("a", 3)];
    let sent = batch(1, &[returning("a", 1), delete("a"), returning("a", 5)]);
    bench.turn([write(1, &ops)], &[frame(1, 1, [&sent])]);
    bench.turn(
        [answer(1, 1, &sent, applied(&[41, 41, 5]))],
        &[values(1, &[(0, 41), (1, 41), (2, 2), (3, 5)])],
    );
}

/// An operation whose client got "unknown" still counts in the values of others.
#[test]
fn the_value_holds_what_others_added_whose_time_is_up() {
    let mut bench = Bench::new();
    let early =
        Event::Write { request: 2, ops: vec![add("a", 10)], token: None, deadline: Now(1_000) };
    let sent = batch(1, &[returning("a", 11)]);
    bench.turn([write(1, &[returning("a", 1)]), early], &[frame(1, 1, [&sent])]);
    bench.wakes_at_ms(1, &[failed(2, &[(0, Failure::Deadline)])]);
    bench.turn([answer(1, 1, &sent, applied(&[11]))], &[values(1, &[(0, 1)])]);
}

/// The answer has fewer values than were asked for: no client gets a wrong number.
#[test]
fn an_answer_with_too_few_values_is_given_to_no_client() {
    let mut bench = Bench::new();
    let sent = batch(1, &[returning("a", 1), returning("b", 1)]);
    let ops = [returning("a", 1), returning("b", 1)];
    bench.turn([write(1, &ops)], &[frame(1, 1, [&sent])]);
    bench.turn(
        [answer(1, 1, &sent, applied(&[1]))],
        &[failed(1, &[(0, Failure::ResultGone), (1, Failure::ResultGone)])],
    );
}

// ---- the answer table, row by row --------------------------------------------------------------

#[test]
fn not_primary_is_sent_to_the_primary_of_the_newer_record() {
    let (mut bench, sent) = Bench::with_batch_in_flight();
    let newer = Box::new(record(ALL, 2, 2));
    bench.turn(
        [answer(1, 1, &sent, refused(Refusal::NotPrimary(Some(newer))))],
        &[frame(2, 1, [&sent])],
    );
    bench.turn([answer(2, 1, &sent, applied(&[]))], &[wrote(1)]);
}

#[test]
fn while_the_record_is_the_same_tries_are_spaced() {
    let (mut bench, sent) = Bench::with_batch_in_flight();
    let mut at = 0;
    for (message, wait) in (1..).zip([10, 20, 40, 80, 160, 200, 200]) {
        let refusal = match message % 3 {
            0 => Refusal::NotPrimary(None),
            1 => Refusal::NoSuchShard,
            _ => Refusal::Damaged,
        };
        bench.turn([answer(1, message, &sent, refused(refusal))], &[]);
        at += wait;
        bench.wakes_at_ms(at, &[frame(1, message + 1, [&sent])]);
    }
    // A newer record ends the wait, and the next refusal begins with the shortest pause.
    bench.turn([answer(1, 8, &sent, refused(Refusal::NotPrimary(None)))], &[]);
    bench.turn([Event::ShardRecord(record(ALL, 2, 1))], &[frame(1, 9, [&sent])]);
    bench.turn([answer(1, 9, &sent, refused(Refusal::NotPrimary(None)))], &[]);
    bench.wakes_at_ms(at + 10, &[frame(1, 10, [&sent])]);
}

#[test]
fn frozen_is_refused_at_once_if_all_sends_are_rejected() {
    let (mut bench, sent) = Bench::with_batch_in_flight();
    let events = [write(2, &[add("b", 1)]), answer(1, 1, &sent, refused(Refusal::Frozen))];
    let frozen = [(0, Failure::Frozen)];
    bench.turn(events, &[failed(1, &frozen), failed(2, &frozen)]);
    // Other operations are refused before they are batched …
    bench.turn([write(3, &[add("a", 1)])], &[failed(3, &frozen)]);
    // … until the node reports the shard as open. The number is free.
    let next = batch(1, &[add("a", 1)]);
    bench.turn(
        [state(1, ShardAvailability::Open), write(4, &[add("a", 1)])],
        &[frame(1, 2, [&next])],
    );
}

/// The first send was lost with its connection, so whatever is refused later, the batch may yet be
/// applied.
#[test]
fn frozen_with_a_lost_send_is_sent_again_when_open_or_after_a_second() {
    let (mut bench, sent) = Bench::with_batch_in_flight();
    let again = |conn: u64, message: u64| frame(conn, message, std::slice::from_ref(&sent));
    bench.turn([closed(1)], &[]);
    bench.turn([connected(3, 1)], &[again(3, 1)]);
    bench.turn([answer(3, 1, &sent, refused(Refusal::Frozen))], &[]);
    bench.wakes_at_ms(1_000, &[again(3, 2)]);
    bench.turn([answer(3, 2, &sent, refused(Refusal::Frozen))], &[]);
    bench.at_ms(1_500).turn([state(3, ShardAvailability::Open)], &[again(3, 3)]);
    bench.turn([answer(3, 3, &sent, applied(&[]))], &[wrote(1)]);
}

/// 16 clients with batches of 1,000 over 10 M keys saw hundreds of refusals while tables were
/// flushed, before operations waited here.
#[test]
fn what_an_overloaded_primary_refuses_waits_until_the_deadline() {
    let (mut bench, sent) = Bench::with_batch_in_flight();
    let refuse = |message| answer(1, message, &sent, refused(Refusal::Overloaded));
    bench.turn([refuse(1)], &[]);
    bench.wakes_at_ms(50, &[frame(1, 2, [&sent])]);
    bench.turn([refuse(2)], &[]);
    bench.wakes_at_ms(100, &[frame(1, 3, [&sent])]);
    bench.turn([answer(1, 3, &sent, applied(&[]))], &[wrote(1)]);

    let (mut bench, sent) = Bench::with_batch_in_flight();
    bench.at_ms(4_960).turn([answer(1, 1, &sent, refused(Refusal::Overloaded))], &[]);
    bench.wakes_at_ms(5_000, &[failed(1, &[(0, Failure::Overloaded)])]);
}

#[test]
fn no_space_is_answered_at_once_if_all_sends_are_rejected_and_tried_again_after_50_ms() {
    for (refusal, failure) in
        [(Refusal::NoSpace, Failure::NoSpace), (Refusal::TooLarge, Failure::TooLarge)]
    {
        let (mut bench, sent) = Bench::with_batch_in_flight();
        let events = [write(2, &[add("b", 1)]), answer(1, 1, &sent, refused(refusal.clone()))];
        bench.turn(events, &[failed(1, &[(0, failure)])]);
        bench.wakes_at_ms(50, &[frame(1, 2, [&batch(1, &[add("b", 1)])])]);

        // A send was lost: the same bytes are sent again.
        let (mut bench, sent) = Bench::with_batch_in_flight();
        bench.turn([closed(1)], &[]);
        bench.turn([connected(3, 1)], &[frame(3, 1, [&sent])]);
        bench.turn([answer(3, 1, &sent, refused(refusal))], &[]);
        bench.wakes_at_ms(50, &[frame(3, 2, [&sent])]);
    }
}

#[test]
fn expired_is_batched_again_in_the_present_session_if_all_sends_are_rejected() {
    let (mut bench, sent) = Bench::with_batch_in_flight();
    // Nothing more is sent in the expired session, however long the new one takes.
    bench.turn(
        [answer(1, 1, &sent, BatchReply::Expired), write(2, &[add("b", 1)])],
        &[Effect::AbandonSession(session(7))],
    );
    let anew = batch_of(ALL, 9, 1, &[add("a", 1), add("b", 1)]);
    bench.turn([Event::Session(Some(session(9)))], &[frame(1, 2, [&anew])]);
    bench.turn([answer(1, 2, &anew, applied(&[]))], &[wrote(1), wrote(2)]);
}

#[test]
fn expired_with_a_lost_send_is_unknown_at_once() {
    let (mut bench, sent) = Bench::with_batch_in_flight();
    bench.turn([closed(1), Event::Session(Some(session(9)))], &[]);
    bench.turn([connected(3, 1), write(2, &[add("b", 1)])], &[frame(3, 1, [&sent])]);
    let next = batch_of(ALL, 9, 1, &[add("b", 1)]);
    bench.turn(
        [answer(3, 1, &sent, BatchReply::Expired)],
        &[failed(1, &[(0, Failure::SessionExpired)]), frame(3, 2, [&next])],
    );
}

#[test]
fn out_of_order_gives_the_session_up() {
    let (mut bench, sent) = Bench::with_batch_in_flight();
    bench.turn(
        [answer(1, 1, &sent, BatchReply::NoEffect)],
        &[Effect::AbandonSession(session(7)), failed(1, &[(0, Failure::SessionAbandoned)])],
    );
    bench.turn([write(2, &[add("a", 1)])], &[failed(2, &[(0, Failure::NoSession)])]);
    let anew = batch_of(ALL, 9, 1, &[add("a", 1)]);
    bench.turn(
        [Event::Session(Some(session(9))), write(3, &[add("a", 1)])],
        &[frame(1, 2, [&anew])],
    );
    assert_eq!(bench.batcher.counts().refusals[8], 1);
}

#[test]
fn malformed_is_decided() {
    let (mut bench, sent) = Bench::with_batch_in_flight();
    bench.turn(
        [answer(1, 1, &sent, BatchReply::Malformed), write(2, &[add("a", 1)])],
        &[failed(1, &[(0, Failure::Malformed)]), frame(1, 2, [&batch(2, &[add("a", 1)])])],
    );
}

#[test]
fn a_result_that_is_gone_is_unknown_and_its_number_used() {
    let (mut bench, sent) = Bench::with_batch_in_flight();
    bench.turn(
        [answer(1, 1, &sent, BatchReply::AnsweredBefore), write(2, &[add("a", 1)])],
        &[failed(1, &[(0, Failure::ResultGone)]), frame(1, 2, [&batch(2, &[add("a", 1)])])],
    );
}

#[test]
fn a_lost_connection_means_the_same_bytes_again() {
    let (mut bench, sent) = Bench::with_batch_in_flight();
    bench.turn([closed(1), write(2, &[add("b", 1)])], &[]);
    // A connection to another process of that store does not lead to the primary.
    let other = StoreBoot { boot: Boot(2), ..node(1) };
    bench.turn([Event::Connected { conn: Conn(3), node: other }], &[]);
    bench.turn([connected(4, 1)], &[frame(4, 1, [&sent])]);
    bench.turn(
        [answer(4, 1, &sent, applied(&[]))],
        &[wrote(1), frame(4, 2, [&batch(2, &[add("b", 1)])])],
    );
}

// ---- all sends rejected ------------------------------------------------------------------------

/// The batch was sent to node 1, which is silent, and to node 2. If node 2 refuses it, node 1 may
/// still apply it.
#[test]
fn a_batch_is_rejected_only_when_every_send_is_answered() {
    let moved = |bench: &mut Bench, sent: &Batch| {
        let again = [frame(2, 1, std::slice::from_ref(sent))];
        bench.turn([Event::ShardRecord(record(ALL, 2, 2))], &again);
    };
    // Node 2 answers first, then node 1: both have refused.
    let (mut bench, sent) = Bench::with_batch_in_flight();
    moved(&mut bench, &sent);
    bench.turn([answer(2, 1, &sent, refused(Refusal::Overloaded))], &[]);
    bench.turn(
        [answer(1, 1, &sent, refused(Refusal::NotPrimary(None))), write(2, &[add("b", 1)])],
        &[],
    );
    // All sends are rejected, by a refusal that requeues: the operations are batched again,
    // together with later ones.
    let anew = batch(1, &[add("a", 1), add("b", 1)]);
    bench.wakes_at_ms(50, &[frame(2, 2, [&anew])]);

    // Node 1's connection is closed instead: one send stays unanswered for ever, so the bytes stay.
    let (mut bench, sent) = Bench::with_batch_in_flight();
    moved(&mut bench, &sent);
    bench.turn([answer(2, 1, &sent, refused(Refusal::Overloaded))], &[]);
    bench.turn([closed(1), write(2, &[add("b", 1)])], &[]);
    bench.wakes_at_ms(50, &[frame(2, 2, [&sent])]);
    bench.turn([answer(2, 2, &sent, BatchReply::Refused(Refusal::NoSpace))], &[]);
    // The batch is applied after all, by the first send.
    bench.wakes_at_ms(100, &[frame(2, 3, [&sent])]);
    bench.turn(
        [answer(2, 3, &sent, applied(&[]))],
        &[wrote(1), frame(2, 4, [&batch(2, &[add("b", 1)])])],
    );
}

/// The answer to the first send decides the batch, wherever it was sent since.
#[test]
fn any_send_that_was_applied_decides_the_batch() {
    let (mut bench, sent) = Bench::with_batch_in_flight();
    bench.turn([Event::ShardRecord(record(ALL, 2, 2))], &[frame(2, 1, [&sent])]);
    bench.turn([answer(1, 1, &sent, applied(&[]))], &[wrote(1)]);
    // The other answer matches nothing any more, and frees its place in the window all the same.
    bench.turn([answer(2, 1, &sent, refused(Refusal::Overloaded))], &[]);
    bench.turn([write(2, &[add("b", 1)])], &[frame(2, 2, [&batch(2, &[add("b", 1)])])]);
}

/// The same process leads again, in a later epoch. It has forgotten what it received before, so it
/// would never answer that.
#[test]
fn a_new_epoch_of_the_same_primary_is_sent_the_batch_again() {
    let (mut bench, sent) = Bench::with_batch_in_flight();
    bench.turn([Event::ShardRecord(record(ALL, 2, 1))], &[frame(1, 2, [&sent])]);
    bench.turn([answer(1, 2, &sent, refused(Refusal::Overloaded))], &[]);
    bench.turn([answer(1, 1, &sent, applied(&[]))], &[wrote(1)]);
}

/// Answers that name another message, session or number settle nothing.
#[test]
fn an_answer_settles_the_send_that_it_names_and_no_other() {
    let (mut bench, sent) = Bench::with_batch_in_flight();
    let other = batch_of(ALL, 8, 1, &[]);
    bench.turn([answer(1, 2, &sent, applied(&[]))], &[]);
    bench.turn([answer(2, 1, &sent, applied(&[]))], &[]);
    bench.turn([answer(1, 1, &batch(2, &[]), applied(&[]))], &[]);
    bench.turn([answer(1, 1, &other, applied(&[]))], &[]);
    bench.turn([answer(1, 1, &batch_of(LEFT, 7, 1, &[]), applied(&[]))], &[]);
    // Messages of a closed connection are ignored.
    bench.turn([closed(1), answer(1, 1, &sent, applied(&[]))], &[]);
}

// ---- deadlines ---------------------------------------------------------------------------------

#[test]
fn what_was_never_sent_is_not_applied_at_its_deadline() {
    // The operation waits behind a batch in flight.
    let (mut bench, sent) = Bench::with_batch_in_flight();
    let late =
        Event::Write { request: 2, ops: vec![add("b", 1)], token: None, deadline: Now(9_000) };
    bench.turn([late], &[]);
    bench.wakes_at_ms(9, &[failed(2, &[(0, Failure::Slow)])]);
    bench.turn([answer(1, 1, &sent, applied(&[]))], &[wrote(1)]);
    // There is no connection to a primary.
    let mut bench = Bench::new();
    bench.turn([closed(1)], &[]);
    bench.turn([write(1, &[add("b", 1)])], &[]);
    bench.wakes_at_ms(5_000, &[failed(1, &[(0, Failure::NoPrimary)])]);
    assert_eq!(bench.batcher.bytes(), 0);
    // There is no session that the shard still accepts.
    let (mut bench, sent) = Bench::with_batch_in_flight();
    let abandon = Effect::AbandonSession(session(7));
    bench.turn([answer(1, 1, &sent, BatchReply::Expired)], &[abandon]);
    bench.wakes_at_ms(5_000, &[failed(1, &[(0, Failure::NoSession)])]);
    // All sends of the batch were rejected.
    let (mut bench, sent) = Bench::with_batch_in_flight();
    bench.turn([answer(1, 1, &sent, refused(Refusal::NotPrimary(None)))], &[]);
    bench.at_ms(5_000).turn([], &[failed(1, &[(0, Failure::NoPrimary)])]);
    assert!(bench.batcher.is_idle());
}

/// The client gets "unknown"; the batch goes on until it is decided, and blocks its shard.
#[test]
fn what_was_sent_is_unknown_at_its_deadline_and_sent_on() {
    let (mut bench, sent) = Bench::with_batch_in_flight();
    bench.turn([closed(1)], &[]);
    bench.wakes_at_ms(5_000, &[failed(1, &[(0, Failure::Deadline)])]);
    let late =
        Event::Write { request: 2, ops: vec![add("b", 1)], token: None, deadline: Now(9_000_000) };
    bench.turn([late, connected(3, 1)], &[frame(3, 1, [&sent])]);
    assert!(!bench.batcher.is_idle());
    let next = batch(2, &[add("b", 1)]);
    bench.turn([answer(3, 1, &sent, applied(&[]))], &[frame(3, 2, [&next])]);
}

/// The client of one part of a rejected batch has got its answer already: only the rest is sent
/// again.
#[test]
fn a_rejected_batch_requeues_only_what_a_client_waits_for() {
    let mut bench = Bench::new();
    let early =
        Event::Write { request: 1, ops: vec![add("a", 1)], token: None, deadline: Now(1_000) };
    let sent = batch(1, &[add("a", 1), add("b", 2)]);
    bench.turn([early, write(2, &[add("b", 2)])], &[frame(1, 1, [&sent])]);
    bench.wakes_at_ms(1, &[failed(1, &[(0, Failure::Deadline)])]);
    bench.turn([answer(1, 1, &sent, refused(Refusal::NotPrimary(None)))], &[]);
    bench.wakes_at_ms(11, &[frame(1, 2, [&batch(1, &[add("b", 2)])])]);
}

/// A request over two shards, of which one is decided.
#[test]
fn each_operation_of_a_late_request_has_its_own_outcome() {
    let mut bench = Bench::with(Settings::default(), &[record(LEFT, 1, 1), record(RIGHT, 1, 2)]);
    let (left, right) = (key_in(LEFT), key_in(RIGHT));
    bench.turn([closed(2)], &[]);
    let sent = batch_of(LEFT, 7, 1, &[returning(&left, 1)]);
    bench.turn([write(1, &[add(&right, 2), returning(&left, 1)])], &[frame(1, 1, [&sent])]);
    bench.turn([answer(1, 1, &sent, applied(&[3]))], &[]);
    let result = WriteResult {
        values: vec![(1, 3)],
        failed: vec![(0, Failure::NoPrimary)],
        ..WriteResult::default()
    };
    bench.wakes_at_ms(5_000, &[Effect::Wrote { request: 1, result }]);
}

// ---- sessions ----------------------------------------------------------------------------------

#[test]
fn without_a_session_or_a_map_writes_are_refused_at_once() {
    let mut bench = Bench { batcher: Batcher::new(Settings::default()), now: Now(0) };
    bench.turn([write(1, &[add("a", 1)])], &[failed(1, &[(0, Failure::NoSession)])]);
    assert_eq!(bench.batcher.not_ready(), Some(NotReady::Map));
    bench.turn(
        [Event::Session(Some(session(7))), write(2, &[add("a", 1)])],
        &[failed(2, &[(0, Failure::NoShard)])],
    );
    bench.turn([Event::ShardRecord(record(ALL, 1, 1))], &[]);
    assert_eq!(bench.batcher.not_ready(), Some(NotReady::Primary(node(1))));
    assert_eq!(bench.batcher.unconnected(), [node(1)]);
}

/// The loss of the key ends nothing; a new session is used as soon as no batch is in flight.
#[test]
fn a_batch_stays_in_its_session_and_the_next_one_changes() {
    let (mut bench, sent) = Bench::with_batch_in_flight();
    bench.turn([Event::Session(None), write(2, &[add("b", 1)])], &[]);
    assert_eq!(bench.batcher.not_ready(), Some(NotReady::Session));
    let second = batch(2, &[add("b", 1)]);
    bench.turn([answer(1, 1, &sent, applied(&[]))], &[wrote(1), frame(1, 2, [&second])]);
    bench.turn([Event::Session(Some(session(9))), write(3, &[add("c", 1)])], &[]);
    let third = batch_of(ALL, 9, 1, &[add("c", 1)]);
    bench.turn([answer(1, 2, &second, applied(&[]))], &[wrote(2), frame(1, 3, [&third])]);
}

// ---- frozen, full, stopping --------------------------------------------------------------------

#[test]
fn queued_operations_are_refused_when_the_shard_freezes() {
    let (mut bench, sent) = Bench::with_batch_in_flight();
    bench.turn([write(2, &[add("b", 1)])], &[]);
    let frozen = [(0, Failure::Frozen)];
    bench.turn([state(1, ShardAvailability::Frozen)], &[failed(2, &frozen)]);
    bench.turn([write(3, &[add("b", 1)])], &[failed(3, &frozen)]);
    // The batch in flight waits for its answer.
    bench.turn([answer(1, 1, &sent, applied(&[]))], &[wrote(1)]);
    // The notice of another node does not count.
    bench.turn([state(2, ShardAvailability::Open), write(4, &[])], &[wrote(4)]);
    bench.turn([write(5, &[add("b", 1)])], &[failed(5, &frozen)]);
    // The notice expires, so that a lost message closes nothing for ever.
    let next = batch(2, &[add("b", 1)]);
    bench.at_ms(1_000).turn([write(6, &[add("b", 1)])], &[frame(1, 2, [&next])]);
}

/// Found with two of three real nodes dead: a second after they froze, their shards admitted
/// operations again, to wait for their deadline behind a batch that no node could answer.
#[test]
fn a_frozen_shard_refuses_for_as_long_as_a_batch_is_out_there() {
    let (mut bench, sent) = Bench::with_batch_in_flight();
    bench.turn([state(1, ShardAvailability::Frozen)], &[]);
    let frozen = [(0, Failure::Frozen)];
    bench.at_ms(1_500).turn([write(2, &[add("b", 1)])], &[failed(2, &frozen)]);
    bench.at_ms(4_000).turn([write(3, &[add("b", 1)])], &[failed(3, &frozen)]);
    // The notice that the shard is open was lost, but an answer replaces it.
    bench.turn([answer(1, 1, &sent, applied(&[]))], &[wrote(1)]);
    let next = batch(2, &[add("b", 1)]);
    bench.turn([write(4, &[add("b", 1)])], &[frame(1, 2, &[next])]);
    bench.turn([write(5, &[add("b", 1)])], &[]);
}

#[test]
fn a_full_queue_refuses_and_an_empty_one_never_does() {
    let settings = Settings { queue_bytes_max: 1, ..Settings::default() };
    let mut bench = Bench::with(settings, &[record(ALL, 1, 1)]);
    let sent = batch(1, &[add("a", 1)]);
    bench.turn([write(1, &[add("a", 1)])], &[frame(1, 1, [&sent])]);
    bench.turn([write(2, &[add("a", 1), add("b", 1)])], &[]);
    bench.turn([write(3, &[add("a", 1)])], &[failed(3, &[(0, Failure::QueueFull)])]);
}

#[test]
fn a_queue_that_is_full_for_want_of_a_primary_is_refused_for_that() {
    let settings = Settings { queue_bytes_max: 1, ..Settings::default() };
    let mut bench = Bench::with(settings, &[record(ALL, 1, 1)]);
    bench.turn([closed(1)], &[]);
    bench.turn([write(1, &[add("a", 1)])], &[]);
    bench.turn([write(2, &[add("a", 1)])], &[failed(2, &[(0, Failure::NoPrimary)])]);
}

/// The left shard has no primary, and reads of it are all that the batcher may hold.
#[test]
fn a_read_that_finds_no_room_names_what_it_would_wait_for() {
    let settings = Settings { read_keys_max: 1, ..Settings::default() };
    let mut bench = Bench::with(settings, &[record(LEFT, 1, 1), record(RIGHT, 1, 2)]);
    let (left, right) = (key_in(LEFT), key_in(RIGHT));
    bench.turn([closed(1)], &[]);
    bench.turn([read(1, &[&left])], &[]);
    bench.turn([read(2, &[&right, &left])], &[read_done(2, Err(Failure::NoPrimary))]);
    bench.turn([read(3, &[&right])], &[read_done(3, Err(Failure::QueueFull))]);
}

/// The left shard has no primary and holds all that the batcher may: the right one still goes.
#[test]
fn a_shard_that_holds_more_than_its_share_gives_way() {
    let settings = Settings { total_bytes_max: 1_000, ..Settings::default() };
    let mut bench = Bench::with(settings, &[record(LEFT, 1, 1), record(RIGHT, 1, 2)]);
    let (left, right) = (key_in(LEFT), key_in(RIGHT));
    bench.turn([closed(1)], &[]);
    let many: Vec<Op> = (0..20).map(|_| add(&left, 1)).collect();
    bench.turn([write(1, &many)], &[]);
    bench.turn([write(2, &[add(&left, 1)])], &[failed(2, &[(0, Failure::NoPrimary)])]);
    let sent = batch_of(RIGHT, 7, 1, &[add(&right, 1)]);
    bench.turn([write(3, &[add(&right, 1)])], &[frame(2, 1, [&sent])]);
}

/// The left shard has no primary. However much waits for it, there is room for the right one, whose
/// node answers, also while nothing of the right one waits; and none once that one is full, too.
#[test]
fn a_shard_that_takes_nothing_leaves_room_for_the_others() {
    let room_bytes = 10_000;
    let settings = Settings { room_bytes, ..Settings::default() };
    let mut bench = Bench::with(settings, &[record(LEFT, 1, 1), record(RIGHT, 1, 2)]);
    assert_eq!(bench.batcher.room(), room_bytes);
    let sent = batch_of(RIGHT, 7, 1, &[add(&key_in(RIGHT), 1)]);
    bench.turn([write(1, &[add(&key_in(RIGHT), 1)])], &[frame(2, 1, [&sent])]);
    bench.turn([answer(2, 1, &sent, applied(&[])), closed(1)], &[wrote(1)]);
    let adds = |slots| vec![add(&key_in(slots), 1); 1_000];
    bench.turn([write(2, &adds(LEFT))], &[]);
    assert!(bench.batcher.bytes() > 10 * room_bytes);
    assert_eq!(bench.batcher.room(), room_bytes / 4);
    bench.batcher.handle(Now(0), write(3, &adds(RIGHT)), &mut Vec::new());
    assert_eq!(bench.batcher.room(), 0);
}

/// One of two shards never takes all the room, however much waits for it; the only one does.
#[test]
fn the_only_shard_takes_all_the_room() {
    for (records, least) in
        [(vec![record(ALL, 1, 1)], 0), (vec![record(LEFT, 1, 1), record(RIGHT, 1, 2)], 250)]
    {
        let settings = Settings { room_bytes: 1_000, ..Settings::default() };
        let mut bench = Bench::with(settings, &records);
        bench.turn([closed(1)], &[]);
        let key = key_in(LEFT);
        for request in 1..=100 {
            let (bytes, room) = (bench.batcher.bytes(), bench.batcher.room());
            let want = if bytes < 1_000 { 1_000 - bytes } else { least };
            assert_eq!(room, want);
            bench.turn([write(request, &[add(&key, 1)])], &[]);
        }
        assert_eq!(bench.batcher.room(), least);
    }
}

#[test]
fn a_stopping_batcher_finishes_what_it_has() {
    let (mut bench, sent) = Bench::with_batch_in_flight();
    bench.turn([write(2, &[add("b", 1)])], &[]);
    let stopping = [(0, Failure::Stopping)];
    bench.turn([Event::Stop, write(3, &[add("c", 1)])], &[failed(3, &stopping)]);
    assert_eq!(bench.batcher.not_ready(), Some(NotReady::Stopping));
    let next = batch(2, &[add("b", 1)]);
    bench.turn([answer(1, 1, &sent, applied(&[]))], &[wrote(1), frame(1, 2, [&next])]);
    assert!(!bench.batcher.is_idle());
    bench.turn([answer(1, 2, &next, applied(&[]))], &[wrote(2)]);
    assert!(bench.batcher.is_idle());
}

#[test]
fn a_refused_dial_of_a_primary_is_reported() {
    let mut bench = Bench::new();
    let report = HealthReport { silent: vec![StoreId(1)], ..HealthReport::default() };
    bench.turn([Event::DialRefused { store: StoreId(1) }], &[Effect::Report(report)]);
    bench.turn([Event::DialRefused { store: StoreId(2) }], &[]);
}

/// A shard was split while its operations waited.
#[test]
fn what_waits_is_sorted_again_when_a_shard_is_split() {
    let mut bench = Bench::new();
    let (left, right) = (key_in(LEFT), key_in(RIGHT));
    bench.turn([closed(1)], &[]);
    bench.turn([write(1, &[add(&left, 1), add(&right, 2)])], &[]);
    bench.turn(
        [Event::ShardRecord(record(RIGHT, 1, 2)), Event::ShardRecord(record(LEFT, 2, 2))],
        &[frame(
            2,
            1,
            [&batch_of(LEFT, 7, 1, &[add(&left, 1)]), &batch_of(RIGHT, 7, 1, &[add(&right, 2)])],
        )],
    );
}

// ---- splits -------------------------------------------------------------------------------------

fn resend(conn: u64, message: u64, child: Slots, batch: &Batch) -> Effect {
    let (shard, batch) = (child.shard(), batch.clone());
    Effect::Send { conn: Conn(conn), message: GatewayMessage::Resend { message, shard, batch } }
}

/// The answer of a child of the shard that the batch was sealed for.
fn part(conn: u64, message: u64, child: Slots, batch: &Batch, reply: BatchReply) -> Event {
    answer(conn, message, &Batch { slots: child, ..batch.clone() }, reply)
}

/// A batch with one operation of each half is in flight, and its shard is split.
fn split_with_batch_in_flight() -> (Bench, Batch) {
    let mut bench = Bench::new();
    let ops = [returning(&key_in(LEFT), 1), returning(&key_in(RIGHT), 2)];
    let sent = batch_of(ALL, 7, 1, &ops);
    bench.turn([write(1, &ops)], &[frame(1, 1, [&sent])]);
    bench.turn([Event::ShardRecord(record(RIGHT, 1, 2))], &[resend(2, 1, RIGHT, &sent)]);
    bench.turn([Event::ShardRecord(record(LEFT, 2, 1))], &[resend(1, 2, LEFT, &sent)]);
    (bench, sent)
}

#[test]
fn each_child_decides_its_part_of_a_batch_of_the_parent() {
    let (mut bench, sent) = split_with_batch_in_flight();
    bench.turn([part(1, 1, LEFT, &sent, applied(&[5, 0]))], &[]);
    bench.turn([part(2, 1, RIGHT, &sent, applied(&[0, 9]))], &[values(1, &[(0, 5), (1, 9)])]);
    bench.turn([part(1, 2, LEFT, &sent, BatchReply::AnsweredBefore)], &[]);
    // The numbers of both go on from those of the parent.
    let (left, right) = (add(&key_in(LEFT), 1), add(&key_in(RIGHT), 2));
    bench.turn(
        [write(2, &[left.clone(), right.clone()])],
        &[
            frame(1, 3, [&batch_of(LEFT, 7, 2, &[left])]),
            frame(2, 2, [&batch_of(RIGHT, 7, 2, &[right])]),
        ],
    );
}

#[test]
fn an_answer_of_the_parent_decides_both_parts() {
    let (mut bench, sent) = split_with_batch_in_flight();
    bench.turn([answer(1, 1, &sent, applied(&[5, 9]))], &[values(1, &[(0, 5), (1, 9)])]);
}

/// The send to the parent is without an answer: what the right child refuses may be applied.
#[test]
fn a_send_to_the_parent_counts_for_both_children() {
    let (mut bench, sent) = split_with_batch_in_flight();
    bench.turn([part(1, 2, LEFT, &sent, applied(&[5, 0]))], &[]);
    bench.turn([answer(2, 1, &sent, refused(Refusal::NoSpace))], &[]);
    bench.wakes_at_ms(50, &[resend(2, 2, RIGHT, &sent)]);
}

/// A gateway has missed the record of one of three children: the queue of the parent is divided
/// into three all the same. In seed 65 the numbers of the third one began at 1 again.
#[test]
fn a_child_whose_record_was_missed_inherits_too() {
    let mut bench = Bench::new();
    let ops = [add(&key_in(LEFT), 1), add(&key_in(RIGHT), 2)];
    let sent = batch_of(ALL, 7, 1, &ops);
    bench.turn([write(1, &ops)], &[frame(1, 1, [&sent])]);
    bench.turn([answer(1, 1, &sent, applied(&[]))], &[wrote(1)]);
    let middle = Slots { lo: LEFT.hi, hi: LEFT.hi };
    bench.turn([Event::ShardRecord(record(middle, 1, 1))], &[]);
    let right = add(&key_in(RIGHT), 3);
    let batch = batch_of(RIGHT, 7, 2, std::slice::from_ref(&right));
    bench.turn([write(2, &[right])], &[frame(1, 2, [&batch])]);
}

/// The child that answers is not in the map yet.
#[test]
fn the_answer_of_an_unknown_child_decides_nothing() {
    let (mut bench, sent) = Bench::with_batch_in_flight();
    bench.turn([part(1, 1, LEFT, &sent, applied(&[]))], &[]);
    bench.wakes_at_ms(10, &[frame(1, 2, [&sent])]);
}

// ---- reads -------------------------------------------------------------------------------------

fn read(request: u64, keys: &[&str]) -> Event {
    let keys = keys.iter().map(|key| add(key, 0).counter).collect();
    Event::Read { request, keys, max_staleness_ms: None, deadline: DEADLINE }
}

fn asks(conn: u64, id: u64, slots: Slots, keys: &[&str]) -> Effect {
    let keys = keys.iter().map(|key| add(key, 0).counter).collect();
    let message = GatewayMessage::Read { id, slots, keys, max_staleness_ms: None };
    Effect::Send { conn: Conn(conn), message }
}

fn found(conn: u64, id: u64, values: &[i128]) -> Event {
    let result = Ok(ReadResult { values: values.to_vec(), time: TimeMs(0), staleness_us: 0 });
    Event::Reply { conn: Conn(conn), reply: NodeReply::Read { id, result } }
}

fn not_found(conn: u64, id: u64, refusal: Refusal) -> Event {
    Event::Reply { conn: Conn(conn), reply: NodeReply::Read { id, result: Err(refusal) } }
}

fn read_done(request: u64, result: Result<&[i128], Failure>) -> Effect {
    let found = |values: &[i128]| ReadValues { values: values.to_vec(), staleness_ms: 0 };
    Effect::ReadDone { request, result: result.map(found) }
}

#[test]
fn reads_of_one_turn_travel_together() {
    let mut bench = Bench::new();
    bench.turn([read(1, &["a", "b"]), read(2, &["c"])], &[asks(1, 1, ALL, &["a", "b", "c"])]);
    bench.turn([found(1, 1, &[1, 2, 3])], &[read_done(1, Ok(&[1, 2])), read_done(2, Ok(&[3]))]);
    assert_eq!((bench.batcher.requests(), bench.batcher.next_deadline()), (0, None));
}

#[test]
fn a_read_over_two_shards_is_in_the_order_of_its_keys() {
    let mut bench = Bench::with(Settings::default(), &[record(LEFT, 1, 1), record(RIGHT, 1, 2)]);
    let (left, right) = (key_in(LEFT), key_in(RIGHT));
    bench.turn(
        [read(1, &[&right, &left, &right])],
        &[asks(1, 1, LEFT, &[&left]), asks(2, 2, RIGHT, &[&right, &right])],
    );
    bench.turn([found(2, 2, &[5, 6])], &[]);
    bench.turn([found(1, 1, &[7])], &[read_done(1, Ok(&[5, 7, 6]))]);
}

#[test]
fn a_read_is_asked_again_elsewhere() {
    // The node is not primary, and names the primary.
    let mut bench = Bench::new();
    bench.turn([read(1, &["a"])], &[asks(1, 1, ALL, &["a"])]);
    let newer = Box::new(record(ALL, 2, 2));
    bench.turn([not_found(1, 1, Refusal::NotPrimary(Some(newer)))], &[asks(2, 2, ALL, &["a"])]);
    // The node is not primary, and knows none: the retries are spaced.
    bench.turn([not_found(2, 2, Refusal::NotPrimary(None))], &[]);
    bench.wakes_at_ms(10, &[asks(2, 3, ALL, &["a"])]);
    // The connection is gone.
    bench.turn([closed(2)], &[]);
    bench.turn([connected(3, 2)], &[asks(3, 4, ALL, &["a"])]);
    // Another node leads: the one that was asked before may be deposed, and silent.
    bench.turn([Event::ShardRecord(record(ALL, 3, 1))], &[asks(1, 5, ALL, &["a"])]);
    // A late answer of it matches nothing.
    bench.turn([found(3, 4, &[1])], &[]);
    bench.turn([found(1, 5, &[2])], &[read_done(1, Ok(&[2]))]);
}

/// While the shard backs off, its reads are not sent with those of another shard.
#[test]
fn a_refused_read_waits_although_another_shard_is_due() {
    let mut bench = Bench::with(Settings::default(), &[record(LEFT, 1, 1), record(RIGHT, 1, 1)]);
    let (left, right) = (key_in(LEFT), key_in(RIGHT));
    bench.turn([read(1, &[&left])], &[asks(1, 1, LEFT, &[&left])]);
    bench.turn([read(2, &[&right])], &[asks(1, 2, RIGHT, &[&right])]);
    // The window is full: these wait for an answer.
    bench.turn([read(3, &[&left]), read(4, &[&right])], &[]);
    let elsewhere = not_found(1, 1, Refusal::NotPrimary(None));
    bench.turn([elsewhere], &[asks(1, 3, RIGHT, &[&right])]);
    bench.turn([found(1, 3, &[1])], &[read_done(4, Ok(&[1]))]);
    bench.wakes_at_ms(10, &[asks(1, 4, LEFT, &[&left, &left])]);
}

/// A window opens for nothing if what waited for it backs off or has moved.
#[test]
fn a_refused_read_leaves_no_deadline_behind() {
    for newer in [None, Some(Box::new(record(ALL, 2, 2)))] {
        let mut bench = Bench::new();
        bench.turn([read(1, &["a"])], &[asks(1, 1, ALL, &["a"])]);
        bench.turn([read(2, &["b"])], &[asks(1, 2, ALL, &["b"])]);
        bench.turn([read(3, &["c"])], &[]);
        let moved = newer.is_some();
        let asked = [asks(2, 3, ALL, &["a", "b", "c"])];
        let want = if moved { &asked[..] } else { &[] };
        bench.turn([not_found(1, 1, Refusal::NotPrimary(newer))], want);
        if moved {
            bench.at_ms(6).turn([], &[]);
        } else {
            bench.wakes_at_ms(10, &[asks(1, 3, ALL, &["a", "c"])]);
        }
    }
}

#[test]
fn a_read_that_is_refused_fails_at_once() {
    for (refusal, failure) in [
        (Refusal::Frozen, Failure::Frozen),
        (Refusal::Overloaded, Failure::Overloaded),
        (Refusal::NoSpace, Failure::NoSpace),
        (Refusal::TooLarge, Failure::TooLarge),
    ] {
        let mut bench = Bench::new();
        bench.turn([read(1, &["a"])], &[asks(1, 1, ALL, &["a"])]);
        bench.turn([not_found(1, 1, refusal)], &[read_done(1, Err(failure))]);
        assert_eq!(bench.batcher.requests(), 0);
    }
}

#[test]
fn a_read_fails_at_its_deadline() {
    let mut bench = Bench::new();
    bench.turn([read(1, &["a"])], &[asks(1, 1, ALL, &["a"])]);
    bench.wakes_at_ms(5_000, &[read_done(1, Err(Failure::Deadline))]);
    bench.turn([found(1, 1, &[1])], &[]);
    let mut bench = Bench::new();
    bench.turn([closed(1)], &[]);
    bench.turn([read(1, &["a"])], &[]);
    bench.wakes_at_ms(5_000, &[read_done(1, Err(Failure::NoPrimary))]);
    let mut bench = Bench { batcher: Batcher::new(Settings::default()), now: Now(0) };
    bench.turn([read(1, &["a"])], &[read_done(1, Err(Failure::NoShard))]);
    bench.turn([read(2, &[])], &[read_done(2, Ok(&[]))]);
}

/// One of the values is missing: the answer can't be assigned to keys.
#[test]
fn a_read_with_too_few_values_is_asked_again() {
    let mut bench = Bench::new();
    bench.turn([read(1, &["a", "b"])], &[asks(1, 1, ALL, &["a", "b"])]);
    bench.turn([found(1, 1, &[1])], &[]);
    bench.wakes_at_ms(10, &[asks(1, 2, ALL, &["a", "b"])]);
}

#[test]
fn two_messages_of_reads_per_shard_are_in_flight() {
    let mut bench = Bench::new();
    bench.turn([read(1, &["a"])], &[asks(1, 1, ALL, &["a"])]);
    bench.turn([read(2, &["b"])], &[asks(1, 2, ALL, &["b"])]);
    bench.turn([read(3, &["c"]), read(4, &["d"])], &[]);
    bench.turn([found(1, 2, &[2])], &[read_done(2, Ok(&[2])), asks(1, 3, ALL, &["c", "d"])]);
    bench.turn([read(5, &["e"])], &[]);
    bench.wakes_at_ms(5, &[asks(1, 4, ALL, &["e"])]);
}

// ---- bounded-stale reads -----------------------------------------------------------------------

const FOLLOWERS: [u128; 2] = [2, 3];

/// Node 1 leads; 2 and 3 are in sync, each on the connection of its number.
fn with_followers(number: usize) -> Bench {
    let isr = vec![node(1).store, node(2).store, node(3).store];
    let record = ShardRecord { isr, ..record(ALL, 1, 1) };
    let mut bench = Bench::with(Settings { number, ..Settings::default() }, &[record]);
    bench.turn([connected(3, 3)], &[]);
    bench
}

fn bounded(request: u64, max_ms: u64, keys: &[&str]) -> Event {
    let keys = keys.iter().map(|key| add(key, 0).counter).collect();
    Event::Read { request, keys, max_staleness_ms: Some(max_ms), deadline: DEADLINE }
}

fn asks_follower(conn: u64, id: u64, max_ms: u64, keys: &[&str]) -> Effect {
    let keys = keys.iter().map(|key| add(key, 0).counter).collect();
    let message = GatewayMessage::Read { id, slots: ALL, keys, max_staleness_ms: Some(max_ms) };
    Effect::Send { conn: Conn(conn), message }
}

fn found_stale(conn: u64, id: u64, staleness_us: u64, values: &[i128]) -> Event {
    let result = Ok(ReadResult { values: values.to_vec(), time: TimeMs(0), staleness_us });
    Event::Reply { conn: Conn(conn), reply: NodeReply::Read { id, result } }
}

fn stale_read_done(request: u64, staleness_ms: u64, values: &[i128]) -> Effect {
    let result = Ok(ReadValues { values: values.to_vec(), staleness_ms });
    Effect::ReadDone { request, result }
}

/// A follower's answer contains its age when it left; the time since the request is added, and all
/// of it rounded up.
#[test]
fn an_age_counts_from_the_question_and_is_rounded_up() {
    let mut bench = with_followers(0);
    bench.turn([bounded(1, 1_000, &["a"])], &[asks_follower(2, 1, 1_000, &["a"])]);
    bench.at_ms(7).turn([found_stale(2, 1, 500_001, &[5])], &[stale_read_done(1, 508, &[5])]);
    assert_eq!((bench.batcher.requests(), bench.batcher.next_deadline()), (0, None));
}

/// The client is answered when the turn ends, so the age is computed for that moment.
#[test]
fn an_age_is_of_the_end_of_the_turn() {
    let mut bench = with_followers(0);
    bench.turn([bounded(1, 1_000, &["a"])], &[asks_follower(2, 1, 1_000, &["a"])]);
    let mut effects = Vec::new();
    let now = bench.at_ms(7).now;
    bench.batcher.handle(now, found_stale(2, 1, 500_001, &[5]), &mut effects);
    assert_eq!(effects, []);
    bench.at_ms(9).turn([], &[stale_read_done(1, 510, &[5])]);
}

#[test]
fn each_batcher_begins_with_another_follower() {
    for (number, conn) in [(0, 2), (1, 3), (2, 2)] {
        let mut bench = with_followers(number);
        bench.turn([bounded(1, 1_000, &["a"])], &[asks_follower(conn, 1, 1_000, &["a"])]);
    }
}

#[test]
fn a_follower_without_a_proof_is_followed_by_the_next_and_lastly_by_the_primary() {
    let mut bench = with_followers(0);
    bench.turn([bounded(1, 50, &["a"])], &[asks_follower(2, 1, 50, &["a"])]);
    bench.turn([not_found(2, 1, Refusal::Stale)], &[asks_follower(3, 2, 50, &["a"])]);
    bench.turn([not_found(3, 2, Refusal::Stale)], &[asks(1, 3, ALL, &["a"])]);
    // The primary's answer is linearizable, and its refusal is final.
    bench.turn([found(1, 3, &[5])], &[read_done(1, Ok(&[5]))]);
    // Both have refused a moment ago: they are asked all the same, since other requests may accept
    // an older value.
    bench.turn([bounded(2, 900, &["a"])], &[asks_follower(2, 4, 900, &["a"])]);
}

#[test]
fn a_follower_that_refused_comes_last_for_a_second() {
    let mut bench = with_followers(0);
    bench.turn([bounded(1, 50, &["a"])], &[asks_follower(2, 1, 50, &["a"])]);
    bench.turn([not_found(2, 1, Refusal::Stale)], &[asks_follower(3, 2, 50, &["a"])]);
    bench.turn([found_stale(3, 2, 9_000, &[5])], &[stale_read_done(1, 9, &[5])]);
    bench.turn([bounded(2, 50, &["a"])], &[asks_follower(3, 3, 50, &["a"])]);
    bench.turn([found_stale(3, 3, 9_000, &[5])], &[stale_read_done(2, 9, &[5])]);
    bench.at_ms(1_000).turn([bounded(3, 50, &["a"])], &[asks_follower(2, 4, 50, &["a"])]);
}

#[test]
fn a_silent_follower_is_given_up() {
    let mut bench = with_followers(0);
    bench.turn([bounded(1, 50, &["a"])], &[asks_follower(2, 1, 50, &["a"])]);
    bench.wakes_at_ms(400, &[asks_follower(3, 2, 50, &["a"])]);
    // A late answer of it matches nothing.
    bench.turn([found_stale(2, 1, 0, &[4])], &[]);
    bench.turn([closed(3)], &[asks(1, 3, ALL, &["a"])]);
    bench.turn([found(1, 3, &[5])], &[read_done(1, Ok(&[5]))]);
    // The primary is the only one that is connected.
    bench.turn([closed(2)], &[]);
    bench.turn([bounded(2, 50, &["a"])], &[asks(1, 4, ALL, &["a"])]);
}

/// The answer took so long that it is too old by now: the primary is asked.
#[test]
fn an_answer_that_is_too_old_when_it_comes_is_not_given() {
    let mut bench = with_followers(0);
    bench.turn([bounded(1, 50, &["a"])], &[asks_follower(2, 1, 50, &["a"])]);
    bench.at_ms(11).turn([found_stale(2, 1, 39_001, &[5])], &[asks(1, 2, ALL, &["a"])]);
    bench.turn([found(1, 2, &[6])], &[read_done(1, Ok(&[6]))]);
}

/// One shard answers at once and another after a while: the age of both counts when the request is
/// answered, and the part that has become too old by then is read again.
#[test]
fn a_read_over_two_shards_is_as_old_as_its_oldest_part() {
    let isr: Vec<_> = FOLLOWERS.iter().map(|&store| node(store).store).collect();
    let led = |slots| ShardRecord { isr: isr.clone(), ..record(slots, 1, 1) };
    for (max_ms, then) in
        [(100, stale_read_done(1, 72, &[1, 2])), (71, asks(1, 3, LEFT, &[&key_in(LEFT)]))]
    {
        let mut bench = Bench::with(Settings::default(), &[led(LEFT), led(RIGHT)]);
        let (left, right) = (key_in(LEFT), key_in(RIGHT));
        let ask = |id, slots, key: &str| {
            let keys = vec![add(key, 0).counter];
            let max_staleness_ms = Some(max_ms);
            let message = GatewayMessage::Read { id, slots, keys, max_staleness_ms };
            Effect::Send { conn: Conn(2), message }
        };
        bench.turn(
            [bounded(1, max_ms, &[&left, &right])],
            &[ask(1, LEFT, &left), ask(2, RIGHT, &right)],
        );
        bench.turn([found_stale(2, 1, 42_000, &[1])], &[]);
        bench.at_ms(30).turn([found_stale(2, 2, 1_000, &[2])], &[then]);
    }
}

/// A primary's answer ages, too, while a follower takes its time. (A read was given the age of the
/// follower's part alone once.)
#[test]
fn a_primarys_part_ages_beside_a_followers() {
    let isr: Vec<_> = FOLLOWERS.iter().map(|&store| node(store).store).collect();
    for (max_ms, then) in
        [(100, stale_read_done(1, 30, &[1, 2])), (29, asks(1, 4, RIGHT, &[&key_in(RIGHT)]))]
    {
        let alone = ShardRecord { isr: vec![node(1).store], ..record(LEFT, 1, 1) };
        let right = ShardRecord { isr: isr.clone(), ..record(RIGHT, 1, 1) };
        let mut bench = Bench::with(Settings::default(), &[alone, right]);
        let (left, right) = (key_in(LEFT), key_in(RIGHT));
        let mut effects = Vec::new();
        let now = bench.now;
        bench.batcher.handle(now, bounded(1, max_ms, &[&left, &right]), &mut effects);
        bench.batcher.handle(now, Event::TurnEnded, &mut effects);
        assert_eq!(effects.len(), 2, "{effects:?}");
        let of_the_primary = |effect: &Effect| *effect == asks(1, 1, LEFT, &[&left]);
        let (to_left, to_right) = if effects.iter().any(of_the_primary) { (1, 2) } else { (2, 1) };
        bench.turn([connected(3, 3), found(1, to_left, &[1])], &[]);
        // One follower has no proof, so the other one is asked later than the primary was.
        let keys = vec![add(&right, 0).counter];
        let again =
            GatewayMessage::Read { id: 3, slots: RIGHT, keys, max_staleness_ms: Some(max_ms) };
        let again = Effect::Send { conn: Conn(3), message: again };
        bench.at_ms(20).turn([not_found(2, to_right, Refusal::Stale)], &[again]);
        bench.at_ms(30).turn([found_stale(3, 3, 1_000, &[2])], &[then]);
    }
}

/// Parts that accept different ages travel in different messages, since a message has one bound.
#[test]
fn one_message_has_one_bound() {
    let mut bench = with_followers(0);
    bench.turn(
        [bounded(1, 50, &["a"]), bounded(2, 900, &["b"]), bounded(3, 50, &["c"])],
        &[asks_follower(2, 1, 50, &["a", "c"]), asks_follower(2, 2, 900, &["b"])],
    );
}

#[test]
fn a_bounded_read_fails_with_its_primary() {
    let mut bench = with_followers(0);
    bench.turn([closed(2), closed(3)], &[]);
    bench.turn([bounded(1, 50, &["a"])], &[asks(1, 1, ALL, &["a"])]);
    bench.turn([not_found(1, 1, Refusal::Frozen)], &[read_done(1, Err(Failure::Frozen))]);
    // The deadline passes while a follower is asked.
    bench.turn([connected(3, 3)], &[]);
    bench.at_ms(4_900).turn([bounded(2, 50, &["a"])], &[asks_follower(3, 2, 50, &["a"])]);
    bench.wakes_at_ms(5_000, &[read_done(2, Err(Failure::Deadline))]);
}
