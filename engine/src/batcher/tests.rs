//! One worker at a time: events in, exact effects out.
//!
//! The cluster here is one shard (or two) and two nodes. Node 1 leads at first, over connection 1;
//! node 2 stands by on connection 2. A turn is some events and then `TurnEnded`.

mod tokens;

use super::*;
use crate::batch::{BATCH_OPS_MAX, Batch, Codec};
use crate::ids::{Boot, Bseq, Epoch, Revision, Slots, TimeMs, Version};
use crate::message::{Answer, ReadResult, Refusal, ShardAvailability};
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

fn config(slots: Slots, epoch: u64, primary: u128) -> ShardConfig {
    let (epoch, version) = (Epoch(epoch), Version(epoch));
    ShardConfig { slots, epoch, version, primary: node(primary), ..ShardConfig::default() }
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

fn batch_of(slots: Slots, of: u64, bseq: u64, ops: &[Op]) -> Batch {
    let (session, bseq) = (session(of), Bseq(bseq));
    Batch::seal(slots, session, bseq, bseq, Codec::Raw, ops::encode(ops))
}

/// Of session 7 and the one shard.
fn batch(bseq: u64, ops: &[Op]) -> Batch {
    batch_of(ALL, 7, bseq, ops)
}

fn frame<'a>(conn: u64, message: u64, batches: impl IntoIterator<Item = &'a Batch>) -> Effect {
    let batches = batches.into_iter().cloned().collect();
    Effect::Send { conn: Conn(conn), message: GatewayMessage::Frame { message, batches } }
}

fn write(request: u64, ops: &[Op]) -> Event {
    Event::Write { request, ops: ops.to_vec(), token: None, deadline: DEADLINE }
}

fn answer(conn: u64, message: u64, batch: &Batch, answer: Answer) -> Event {
    let (slots, session, bseq) = (batch.slots, batch.session, batch.bseq);
    let reply = NodeReply::Answer { message, slots, session, bseq, answer };
    Event::Reply { conn: Conn(conn), reply }
}

fn applied(values: &[i128]) -> Answer {
    Answer::Applied { values: values.to_vec(), tokens: Vec::new(), time: TimeMs(0) }
}

fn refused(refusal: Refusal) -> Answer {
    Answer::Refused(refusal)
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

/// A worker at a time of our choosing.
struct Story {
    worker: Worker,
    now: Now,
}

impl Story {
    fn with(settings: Settings, configs: &[ShardConfig]) -> Self {
        let mut story = Self { worker: Worker::new(settings), now: Now(0) };
        let mut events = vec![Event::Session(Some(session(7))), connected(1, 1), connected(2, 2)];
        events.extend(configs.iter().cloned().map(Event::Config));
        story.turn(events, &[]);
        assert_eq!(story.worker.not_ready(), None);
        story
    }

    /// One shard, led by node 1.
    fn new() -> Self {
        Self::with(Settings::default(), &[config(ALL, 1, 1)])
    }

    /// A batch of one operation is out: batch 1, request 1, message 1 on connection 1.
    fn with_batch_out() -> (Self, Batch) {
        let mut story = Self::new();
        let sent = batch(1, &[add("a", 1)]);
        let out = std::slice::from_ref(&sent);
        story.turn([write(1, &[add("a", 1)])], &[frame(1, 1, out)]);
        (story, sent)
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
            self.worker.handle(self.now, event, &mut effects);
        }
        self.worker.handle(self.now, Event::TurnEnded, &mut effects);
        assert_eq!(effects, want);
        self
    }

    /// Nothing happens until then, and then this.
    #[track_caller]
    fn wakes_at_ms(&mut self, ms: u64, want: &[Effect]) -> &mut Self {
        assert_eq!(self.worker.next_deadline(), Some(Now(ms * 1_000)));
        self.at_ms(ms).turn([], want)
    }
}

// ---- the way of a write ------------------------------------------------------------------------

#[test]
fn what_is_ready_together_travels_together() {
    let mut story = Story::new();
    let sent = batch(1, &[add("a", 1), add("b", 2)]);
    story.turn([write(1, &[add("a", 1)]), write(2, &[add("b", 2)])], &[frame(1, 1, [&sent])]);
    // While it is out, others gather.
    story.turn([write(3, &[add("a", 4)])], &[]);
    story.turn([write(4, &[add("a", 8)])], &[]);
    let next = batch(2, &[add("a", 12)]);
    story.turn([answer(1, 1, &sent, applied(&[]))], &[wrote(1), wrote(2), frame(1, 2, [&next])]);
    story.turn([answer(1, 2, &next, applied(&[]))], &[wrote(3), wrote(4)]);
    assert!(story.worker.is_idle());
    assert_eq!((story.worker.bytes(), story.worker.next_deadline()), (0, None));
}

#[test]
fn a_request_is_answered_when_all_its_shards_are() {
    let mut story = Story::with(Settings::default(), &[config(LEFT, 1, 1), config(RIGHT, 1, 2)]);
    let (left, right) = (key_in(LEFT), key_in(RIGHT));
    let to_left = batch_of(LEFT, 7, 1, &[returning(&left, 1)]);
    let to_right = batch_of(RIGHT, 7, 1, &[add(&right, 2)]);
    story.turn(
        [write(1, &[add(&right, 2), returning(&left, 1)])],
        &[frame(1, 1, [&to_left]), frame(2, 1, [&to_right])],
    );
    story.turn([answer(1, 1, &to_left, applied(&[5]))], &[]);
    story.turn([answer(2, 1, &to_right, applied(&[]))], &[values(1, &[(1, 5)])]);
}

/// One message carries all that goes to a node, and a third waits for a place in the window.
#[test]
fn a_lane_packs_all_shards_of_its_node() {
    let mut story = Story::with(Settings::default(), &[config(LEFT, 1, 1), config(RIGHT, 1, 1)]);
    let (left, right) = (key_in(LEFT), key_in(RIGHT));
    let to_left = batch_of(LEFT, 7, 1, &[add(&left, 1)]);
    let to_right = batch_of(RIGHT, 7, 1, &[add(&right, 1)]);
    story.turn([write(1, &[add(&right, 1), add(&left, 1)])], &[frame(1, 1, [&to_left, &to_right])]);
    // The left shard is answered and goes on, while the right one keeps only itself waiting.
    let next = batch_of(LEFT, 7, 2, &[add(&left, 2)]);
    story.turn(
        [write(2, &[add(&left, 2)]), answer(1, 1, &to_left, applied(&[]))],
        &[frame(1, 2, [&next])],
    );
    // Two messages are not answered in full: the window is full, until the older one is 5 ms old.
    let third = batch_of(LEFT, 7, 3, &[add(&left, 3)]);
    story.at_ms(1).turn([answer(1, 2, &next, applied(&[]))], &[wrote(2)]);
    story.turn([write(3, &[add(&left, 3)])], &[frame(1, 3, [&third])]);
    story.turn(
        [write(4, &[add(&left, 4)]), answer(1, 3, &third, applied(&[]))],
        &[wrote(3), frame(1, 4, [&batch_of(LEFT, 7, 4, &[add(&left, 4)])])],
    );
}

#[test]
fn the_window_is_two_messages_for_five_ms() {
    let configs = crate::shard_map::ranges(4).map(|slots| config(slots, 1, 1));
    let configs: Vec<_> = configs.collect();
    let mut story = Story::with(Settings::default(), &configs);
    let batches: Vec<Batch> = configs
        .iter()
        .map(|config| batch_of(config.slots, 7, 1, &[add(&key_in(config.slots), 1)]))
        .collect();
    let ask = |request: u64| {
        let slots = configs[request as usize - 1].slots;
        [write(request, &[add(&key_in(slots), 1)])]
    };
    let sends = |message: u64, at: usize| frame(1, message, &batches[at..=at]);
    story.turn(ask(1), &[sends(1, 0)]);
    story.at_ms(1).turn(ask(2), &[sends(2, 1)]);
    story.at_ms(2).turn(ask(3), &[]);
    story.wakes_at_ms(5, &[sends(3, 2)]);
    story.turn(ask(4), &[]);
    // An answer makes room sooner.
    story.turn([answer(1, 2, &batches[1], applied(&[]))], &[wrote(2), sends(4, 3)]);
}

#[test]
fn the_bytes_on_the_way_to_a_node_are_bounded() {
    let settings = Settings { lane_bytes_max: 1, ..Settings::default() };
    let mut story = Story::with(settings, &[config(LEFT, 1, 1), config(RIGHT, 1, 1)]);
    let (left, right) = (key_in(LEFT), key_in(RIGHT));
    let to_left = batch_of(LEFT, 7, 1, &[add(&left, 1)]);
    let to_right = batch_of(RIGHT, 7, 1, &[add(&right, 1)]);
    story.turn([write(1, &[add(&right, 1), add(&left, 1)])], &[frame(1, 1, [&to_left])]);
    story.turn([answer(1, 1, &to_left, applied(&[]))], &[frame(1, 2, [&to_right])]);
}

#[test]
fn a_queue_lingers_if_it_is_told_to() {
    let settings = Settings { linger_us: 3_000, ..Settings::default() };
    let mut story = Story::with(settings, &[config(ALL, 1, 1)]);
    story.at_ms(10).turn([write(1, &[add("a", 1)])], &[]);
    story.at_ms(11).turn([write(2, &[add("a", 1)])], &[]);
    story.wakes_at_ms(13, &[frame(1, 1, [&batch(1, &[add("a", 2)])])]);
    // A full batch waits for nobody.
    let names: Vec<String> = (0..BATCH_OPS_MAX).map(|number| number.to_string()).collect();
    let ops: Vec<Op> = names.iter().map(|name| add(name, 1)).collect();
    let mut story =
        Story::with(Settings { linger_us: 3_000, ..Settings::default() }, &[config(ALL, 1, 1)]);
    story.turn([write(1, &ops)], &[frame(1, 1, [&batch(1, &ops)])]);
}

#[test]
fn more_than_one_batch_goes_one_after_the_other() {
    let mut story = Story::new();
    let names: Vec<String> = (0..BATCH_OPS_MAX + 1).map(|number| number.to_string()).collect();
    let ops: Vec<Op> = names.iter().map(|name| add(name, 1)).collect();
    let first = batch(1, &ops[..BATCH_OPS_MAX]);
    let second = batch(2, &ops[BATCH_OPS_MAX..]);
    story.turn([write(1, &ops)], &[frame(1, 1, [&first])]);
    story.turn([answer(1, 1, &first, applied(&[]))], &[frame(1, 2, [&second])]);
    story.turn([answer(1, 2, &second, applied(&[]))], &[wrote(1)]);
}

// ---- coalescing --------------------------------------------------------------------------------

/// The counter stood at 100. Each is told the value right after its own add.
#[test]
fn waiters_of_one_merged_add_get_their_own_values() {
    let mut story = Story::new();
    let ops = [returning("a", 1), add("a", 10), returning("b", 7)];
    let sent = batch(1, &[returning("a", 1111), returning("b", 7)]);
    story.turn(
        [write(1, &ops), write(2, &[returning("a", 100), add("a", 1000)])],
        &[frame(1, 1, [&sent])],
    );
    story.turn(
        [answer(1, 1, &sent, applied(&[1211, 7]))],
        &[values(1, &[(0, 101), (2, 7)]), values(2, &[(0, 211)])],
    );
}

#[test]
fn values_are_told_apart_across_a_delete() {
    let mut story = Story::new();
    let ops = [returning("a", 1), delete("a"), returning("a", 2), returning("a", 3)];
    let sent = batch(1, &[returning("a", 1), delete("a"), returning("a", 5)]);
    story.turn([write(1, &ops)], &[frame(1, 1, [&sent])]);
    story.turn(
        [answer(1, 1, &sent, applied(&[41, 41, 5]))],
        &[values(1, &[(0, 41), (1, 41), (2, 2), (3, 5)])],
    );
}

/// A client that was told "unknown" still counts in what the others are told.
#[test]
fn the_value_holds_what_others_added_whose_time_is_up() {
    let mut story = Story::new();
    let early =
        Event::Write { request: 2, ops: vec![add("a", 10)], token: None, deadline: Now(1_000) };
    let sent = batch(1, &[returning("a", 11)]);
    story.turn([write(1, &[returning("a", 1)]), early], &[frame(1, 1, [&sent])]);
    story.wakes_at_ms(1, &[failed(2, &[(0, Failure::Deadline)])]);
    story.turn([answer(1, 1, &sent, applied(&[11]))], &[values(1, &[(0, 1)])]);
}

/// Fewer values than were asked for: nobody is told a wrong number.
#[test]
fn an_answer_with_too_few_values_is_no_answer_to_anybody() {
    let mut story = Story::new();
    let sent = batch(1, &[returning("a", 1), returning("b", 1)]);
    let ops = [returning("a", 1), returning("b", 1)];
    story.turn([write(1, &ops)], &[frame(1, 1, [&sent])]);
    story.turn(
        [answer(1, 1, &sent, applied(&[1]))],
        &[failed(1, &[(0, Failure::ResultGone), (1, Failure::ResultGone)])],
    );
}

// ---- the answer table, row by row --------------------------------------------------------------

#[test]
fn not_primary_is_sent_to_the_primary_of_the_newer_config() {
    let (mut story, sent) = Story::with_batch_out();
    let newer = Box::new(config(ALL, 2, 2));
    story.turn(
        [answer(1, 1, &sent, refused(Refusal::NotPrimary(Some(newer))))],
        &[frame(2, 1, [&sent])],
    );
    story.turn([answer(2, 1, &sent, applied(&[]))], &[wrote(1)]);
}

#[test]
fn while_the_config_is_the_same_tries_are_spaced() {
    let (mut story, sent) = Story::with_batch_out();
    let mut at = 0;
    for (message, wait) in (1..).zip([10, 20, 40, 80, 160, 200, 200]) {
        let refusal = match message % 3 {
            0 => Refusal::NotPrimary(None),
            1 => Refusal::NoSuchShard,
            _ => Refusal::Damaged,
        };
        story.turn([answer(1, message, &sent, refused(refusal))], &[]);
        at += wait;
        story.wakes_at_ms(at, &[frame(1, message + 1, [&sent])]);
    }
    // A newer config ends the waiting, and the next refusal begins anew.
    story.turn([answer(1, 8, &sent, refused(Refusal::NotPrimary(None)))], &[]);
    story.turn([Event::Config(config(ALL, 2, 1))], &[frame(1, 9, [&sent])]);
    story.turn([answer(1, 9, &sent, refused(Refusal::NotPrimary(None)))], &[]);
    story.wakes_at_ms(at + 10, &[frame(1, 10, [&sent])]);
}

#[test]
fn frozen_and_definite_is_refused_at_once() {
    let (mut story, sent) = Story::with_batch_out();
    let events = [write(2, &[add("b", 1)]), answer(1, 1, &sent, refused(Refusal::Frozen))];
    let frozen = [(0, Failure::Frozen)];
    story.turn(events, &[failed(1, &frozen), failed(2, &frozen)]);
    // Others are refused before they are batched …
    story.turn([write(3, &[add("a", 1)])], &[failed(3, &frozen)]);
    // … until the node says otherwise. The number is free.
    let next = batch(1, &[add("a", 1)]);
    story.turn(
        [state(1, ShardAvailability::Open), write(4, &[add("a", 1)])],
        &[frame(1, 2, [&next])],
    );
}

/// The first send is cut, so whatever is refused later, the batch may yet be applied.
#[test]
fn frozen_and_not_definite_is_sent_again_when_open_or_after_a_second() {
    let (mut story, sent) = Story::with_batch_out();
    let again = |conn: u64, message: u64| frame(conn, message, std::slice::from_ref(&sent));
    story.turn([closed(1)], &[]);
    story.turn([connected(3, 1)], &[again(3, 1)]);
    story.turn([answer(3, 1, &sent, refused(Refusal::Frozen))], &[]);
    story.wakes_at_ms(1_000, &[again(3, 2)]);
    story.turn([answer(3, 2, &sent, refused(Refusal::Frozen))], &[]);
    story.at_ms(1_500).turn([state(3, ShardAvailability::Open)], &[again(3, 3)]);
    story.turn([answer(3, 3, &sent, applied(&[]))], &[wrote(1)]);
}

/// Story: 16 clients with batches of 1,000 over 10 M keys saw hundreds of refusals while tables were flushed.
#[test]
fn what_an_overloaded_primary_refuses_waits_until_the_deadline() {
    let (mut story, sent) = Story::with_batch_out();
    let refuse = |message| answer(1, message, &sent, refused(Refusal::Overloaded));
    story.turn([refuse(1)], &[]);
    story.wakes_at_ms(50, &[frame(1, 2, [&sent])]);
    story.turn([refuse(2)], &[]);
    story.wakes_at_ms(100, &[frame(1, 3, [&sent])]);
    story.turn([answer(1, 3, &sent, applied(&[]))], &[wrote(1)]);

    let (mut story, sent) = Story::with_batch_out();
    story.at_ms(4_960).turn([answer(1, 1, &sent, refused(Refusal::Overloaded))], &[]);
    story.wakes_at_ms(5_000, &[failed(1, &[(0, Failure::Overloaded)])]);
}

#[test]
fn a_primary_without_space_is_told_at_once_if_definite_and_tried_again_after_50_ms() {
    for (refusal, failure) in
        [(Refusal::NoSpace, Failure::NoSpace), (Refusal::TooLarge, Failure::TooLarge)]
    {
        let (mut story, sent) = Story::with_batch_out();
        let events = [write(2, &[add("b", 1)]), answer(1, 1, &sent, refused(refusal.clone()))];
        story.turn(events, &[failed(1, &[(0, failure)])]);
        story.wakes_at_ms(50, &[frame(1, 2, [&batch(1, &[add("b", 1)])])]);

        // Not definite: the same bytes again.
        let (mut story, sent) = Story::with_batch_out();
        story.turn([closed(1)], &[]);
        story.turn([connected(3, 1)], &[frame(3, 1, [&sent])]);
        story.turn([answer(3, 1, &sent, refused(refusal))], &[]);
        story.wakes_at_ms(50, &[frame(3, 2, [&sent])]);
    }
}

#[test]
fn expired_and_definite_is_batched_again_in_the_present_session() {
    let (mut story, sent) = Story::with_batch_out();
    // Nothing more is sent in the expired one, however long the new one takes.
    story.turn(
        [answer(1, 1, &sent, Answer::Expired), write(2, &[add("b", 1)])],
        &[Effect::AbandonSession(session(7))],
    );
    let anew = batch_of(ALL, 9, 1, &[add("a", 1), add("b", 1)]);
    story.turn([Event::Session(Some(session(9)))], &[frame(1, 2, [&anew])]);
    story.turn([answer(1, 2, &anew, applied(&[]))], &[wrote(1), wrote(2)]);
}

#[test]
fn expired_and_not_definite_is_unknown_at_once() {
    let (mut story, sent) = Story::with_batch_out();
    story.turn([closed(1), Event::Session(Some(session(9)))], &[]);
    story.turn([connected(3, 1), write(2, &[add("b", 1)])], &[frame(3, 1, [&sent])]);
    let next = batch_of(ALL, 9, 1, &[add("b", 1)]);
    story.turn(
        [answer(3, 1, &sent, Answer::Expired)],
        &[failed(1, &[(0, Failure::SessionExpired)]), frame(3, 2, [&next])],
    );
}

#[test]
fn out_of_order_gives_the_session_up() {
    let (mut story, sent) = Story::with_batch_out();
    story.turn(
        [answer(1, 1, &sent, Answer::NoEffect)],
        &[Effect::AbandonSession(session(7)), failed(1, &[(0, Failure::SessionAbandoned)])],
    );
    story.turn([write(2, &[add("a", 1)])], &[failed(2, &[(0, Failure::NoSession)])]);
    let anew = batch_of(ALL, 9, 1, &[add("a", 1)]);
    story.turn(
        [Event::Session(Some(session(9))), write(3, &[add("a", 1)])],
        &[frame(1, 2, [&anew])],
    );
    assert_eq!(story.worker.counts().refusals[8], 1);
}

#[test]
fn malformed_is_decided() {
    let (mut story, sent) = Story::with_batch_out();
    story.turn(
        [answer(1, 1, &sent, Answer::Malformed), write(2, &[add("a", 1)])],
        &[failed(1, &[(0, Failure::Malformed)]), frame(1, 2, [&batch(2, &[add("a", 1)])])],
    );
}

#[test]
fn a_result_that_is_gone_is_unknown_and_its_number_used() {
    let (mut story, sent) = Story::with_batch_out();
    story.turn(
        [answer(1, 1, &sent, Answer::AnsweredBefore), write(2, &[add("a", 1)])],
        &[failed(1, &[(0, Failure::ResultGone)]), frame(1, 2, [&batch(2, &[add("a", 1)])])],
    );
}

#[test]
fn a_lost_connection_means_the_same_bytes_again() {
    let (mut story, sent) = Story::with_batch_out();
    story.turn([closed(1), write(2, &[add("b", 1)])], &[]);
    // A connection to another process of that store does not lead to the primary.
    let other = StoreBoot { boot: Boot(2), ..node(1) };
    story.turn([Event::Connected { conn: Conn(3), node: other }], &[]);
    story.turn([connected(4, 1)], &[frame(4, 1, [&sent])]);
    story.turn(
        [answer(4, 1, &sent, applied(&[]))],
        &[wrote(1), frame(4, 2, [&batch(2, &[add("b", 1)])])],
    );
}

// ---- definite ----------------------------------------------------------------------------------

/// It was sent to node 1, which is silent, and to node 2. What node 2 refuses, node 1 may apply.
#[test]
fn a_refusal_is_definite_only_when_every_send_is_answered() {
    let moved = |story: &mut Story, sent: &Batch| {
        let again = [frame(2, 1, std::slice::from_ref(sent))];
        story.turn([Event::Config(config(ALL, 2, 2))], &again);
    };
    // Node 2 first, then node 1: both have refused.
    let (mut story, sent) = Story::with_batch_out();
    moved(&mut story, &sent);
    story.turn([answer(2, 1, &sent, refused(Refusal::Overloaded))], &[]);
    story.turn(
        [answer(1, 1, &sent, refused(Refusal::NotPrimary(None))), write(2, &[add("b", 1)])],
        &[],
    );
    // Definite by a row that says "wait": it is batched anew, with what came meanwhile.
    let anew = batch(1, &[add("a", 1), add("b", 1)]);
    story.wakes_at_ms(50, &[frame(2, 2, [&anew])]);

    // Node 1's connection is cut instead: never definite, so the bytes stay.
    let (mut story, sent) = Story::with_batch_out();
    moved(&mut story, &sent);
    story.turn([answer(2, 1, &sent, refused(Refusal::Overloaded))], &[]);
    story.turn([closed(1), write(2, &[add("b", 1)])], &[]);
    story.wakes_at_ms(50, &[frame(2, 2, [&sent])]);
    story.turn([answer(2, 2, &sent, Answer::Refused(Refusal::NoSpace))], &[]);
    // Applied after all, by the first send.
    story.wakes_at_ms(100, &[frame(2, 3, [&sent])]);
    story.turn(
        [answer(2, 3, &sent, applied(&[]))],
        &[wrote(1), frame(2, 4, [&batch(2, &[add("b", 1)])])],
    );
}

/// The answer to the first send decides the batch, wherever it was sent since.
#[test]
fn any_send_that_was_applied_decides_the_batch() {
    let (mut story, sent) = Story::with_batch_out();
    story.turn([Event::Config(config(ALL, 2, 2))], &[frame(2, 1, [&sent])]);
    story.turn([answer(1, 1, &sent, applied(&[]))], &[wrote(1)]);
    // The other answer is nobody's any more, and frees its place all the same.
    story.turn([answer(2, 1, &sent, refused(Refusal::Overloaded))], &[]);
    story.turn([write(2, &[add("b", 1)])], &[frame(2, 2, [&batch(2, &[add("b", 1)])])]);
}

/// The same process leads again, in a later epoch. It knows nothing of what it was sent before, so
/// it would never answer that.
#[test]
fn a_new_epoch_of_the_same_primary_is_sent_the_batch_again() {
    let (mut story, sent) = Story::with_batch_out();
    story.turn([Event::Config(config(ALL, 2, 1))], &[frame(1, 2, [&sent])]);
    story.turn([answer(1, 2, &sent, refused(Refusal::Overloaded))], &[]);
    story.turn([answer(1, 1, &sent, applied(&[]))], &[wrote(1)]);
}

/// Answers that name another message, session or number settle nothing.
#[test]
fn an_answer_settles_the_send_that_it_names_and_no_other() {
    let (mut story, sent) = Story::with_batch_out();
    let other = batch_of(ALL, 8, 1, &[]);
    story.turn([answer(1, 2, &sent, applied(&[]))], &[]);
    story.turn([answer(2, 1, &sent, applied(&[]))], &[]);
    story.turn([answer(1, 1, &batch(2, &[]), applied(&[]))], &[]);
    story.turn([answer(1, 1, &other, applied(&[]))], &[]);
    story.turn([answer(1, 1, &batch_of(LEFT, 7, 1, &[]), applied(&[]))], &[]);
    // Nothing from a closed connection is heard.
    story.turn([closed(1), answer(1, 1, &sent, applied(&[]))], &[]);
}

// ---- deadlines ---------------------------------------------------------------------------------

#[test]
fn what_was_never_sent_is_not_applied_at_its_deadline() {
    // Behind a batch that is out.
    let (mut story, sent) = Story::with_batch_out();
    let late =
        Event::Write { request: 2, ops: vec![add("b", 1)], token: None, deadline: Now(9_000) };
    story.turn([late], &[]);
    story.wakes_at_ms(9, &[failed(2, &[(0, Failure::Slow)])]);
    story.turn([answer(1, 1, &sent, applied(&[]))], &[wrote(1)]);
    // Without a primary.
    let mut story = Story::new();
    story.turn([closed(1)], &[]);
    story.turn([write(1, &[add("b", 1)])], &[]);
    story.wakes_at_ms(5_000, &[failed(1, &[(0, Failure::NoPrimary)])]);
    assert_eq!(story.worker.bytes(), 0);
    // Without a session that the shard still takes.
    let (mut story, sent) = Story::with_batch_out();
    let abandon = Effect::AbandonSession(session(7));
    story.turn([answer(1, 1, &sent, Answer::Expired)], &[abandon]);
    story.wakes_at_ms(5_000, &[failed(1, &[(0, Failure::NoSession)])]);
    // After refusals all of which were definite.
    let (mut story, sent) = Story::with_batch_out();
    story.turn([answer(1, 1, &sent, refused(Refusal::NotPrimary(None)))], &[]);
    story.at_ms(5_000).turn([], &[failed(1, &[(0, Failure::NoPrimary)])]);
    assert!(story.worker.is_idle());
}

/// The client is told "unknown"; the batch goes on until it is decided, and blocks its shard.
#[test]
fn what_was_sent_is_unknown_at_its_deadline_and_sent_on() {
    let (mut story, sent) = Story::with_batch_out();
    story.turn([closed(1)], &[]);
    story.wakes_at_ms(5_000, &[failed(1, &[(0, Failure::Deadline)])]);
    let late =
        Event::Write { request: 2, ops: vec![add("b", 1)], token: None, deadline: Now(9_000_000) };
    story.turn([late, connected(3, 1)], &[frame(3, 1, [&sent])]);
    assert!(!story.worker.is_idle());
    let next = batch(2, &[add("b", 1)]);
    story.turn([answer(3, 1, &sent, applied(&[]))], &[frame(3, 2, [&next])]);
}

/// Some of a dissolved batch was given up by its client: only the rest is sent again.
#[test]
fn a_dissolved_batch_leaves_behind_what_nobody_waits_for() {
    let mut story = Story::new();
    let early =
        Event::Write { request: 1, ops: vec![add("a", 1)], token: None, deadline: Now(1_000) };
    let sent = batch(1, &[add("a", 1), add("b", 2)]);
    story.turn([early, write(2, &[add("b", 2)])], &[frame(1, 1, [&sent])]);
    story.wakes_at_ms(1, &[failed(1, &[(0, Failure::Deadline)])]);
    story.turn([answer(1, 1, &sent, refused(Refusal::NotPrimary(None)))], &[]);
    story.wakes_at_ms(11, &[frame(1, 2, [&batch(1, &[add("b", 2)])])]);
}

/// A request over two shards, of which one is decided.
#[test]
fn each_operation_of_a_late_request_has_its_own_outcome() {
    let mut story = Story::with(Settings::default(), &[config(LEFT, 1, 1), config(RIGHT, 1, 2)]);
    let (left, right) = (key_in(LEFT), key_in(RIGHT));
    story.turn([closed(2)], &[]);
    let sent = batch_of(LEFT, 7, 1, &[returning(&left, 1)]);
    story.turn([write(1, &[add(&right, 2), returning(&left, 1)])], &[frame(1, 1, [&sent])]);
    story.turn([answer(1, 1, &sent, applied(&[3]))], &[]);
    let result = WriteResult {
        values: vec![(1, 3)],
        failed: vec![(0, Failure::NoPrimary)],
        ..WriteResult::default()
    };
    story.wakes_at_ms(5_000, &[Effect::Wrote { request: 1, result }]);
}

// ---- sessions ----------------------------------------------------------------------------------

#[test]
fn without_a_session_or_a_map_writes_are_refused_at_once() {
    let mut story = Story { worker: Worker::new(Settings::default()), now: Now(0) };
    story.turn([write(1, &[add("a", 1)])], &[failed(1, &[(0, Failure::NoSession)])]);
    assert_eq!(story.worker.not_ready(), Some(NotReady::Map));
    story.turn(
        [Event::Session(Some(session(7))), write(2, &[add("a", 1)])],
        &[failed(2, &[(0, Failure::NoShard)])],
    );
    story.turn([Event::Config(config(ALL, 1, 1))], &[]);
    assert_eq!(story.worker.not_ready(), Some(NotReady::Primary(node(1))));
    assert_eq!(story.worker.unconnected(), [node(1)]);
}

/// Losing the key ends nothing; a new session is used as soon as no batch is out.
#[test]
fn a_batch_stays_in_its_session_and_the_next_one_changes() {
    let (mut story, sent) = Story::with_batch_out();
    story.turn([Event::Session(None), write(2, &[add("b", 1)])], &[]);
    assert_eq!(story.worker.not_ready(), Some(NotReady::Session));
    let second = batch(2, &[add("b", 1)]);
    story.turn([answer(1, 1, &sent, applied(&[]))], &[wrote(1), frame(1, 2, [&second])]);
    story.turn([Event::Session(Some(session(9))), write(3, &[add("c", 1)])], &[]);
    let third = batch_of(ALL, 9, 1, &[add("c", 1)]);
    story.turn([answer(1, 2, &second, applied(&[]))], &[wrote(2), frame(1, 3, [&third])]);
}

// ---- frozen, full, stopping --------------------------------------------------------------------

#[test]
fn queued_operations_are_refused_when_the_shard_freezes() {
    let (mut story, sent) = Story::with_batch_out();
    story.turn([write(2, &[add("b", 1)])], &[]);
    let frozen = [(0, Failure::Frozen)];
    story.turn([state(1, ShardAvailability::Frozen)], &[failed(2, &frozen)]);
    story.turn([write(3, &[add("b", 1)])], &[failed(3, &frozen)]);
    // What is out waits for its answer.
    story.turn([answer(1, 1, &sent, applied(&[]))], &[wrote(1)]);
    // The word of another node does not count.
    story.turn([state(2, ShardAvailability::Open), write(4, &[])], &[wrote(4)]);
    story.turn([write(5, &[add("b", 1)])], &[failed(5, &frozen)]);
    // A word that was lost shuts nothing for ever.
    let next = batch(2, &[add("b", 1)]);
    story.at_ms(1_000).turn([write(6, &[add("b", 1)])], &[frame(1, 2, [&next])]);
}

/// Found with two of three real nodes dead: a second after they froze, their shards let operations in
/// again, to wait for their deadline behind a batch that nobody could answer.
#[test]
fn a_frozen_shard_refuses_for_as_long_as_a_batch_is_out_there() {
    let (mut story, sent) = Story::with_batch_out();
    story.turn([state(1, ShardAvailability::Frozen)], &[]);
    let frozen = [(0, Failure::Frozen)];
    story.at_ms(1_500).turn([write(2, &[add("b", 1)])], &[failed(2, &frozen)]);
    story.at_ms(4_000).turn([write(3, &[add("b", 1)])], &[failed(3, &frozen)]);
    // The word that it is open was lost, but here is an answer.
    story.turn([answer(1, 1, &sent, applied(&[]))], &[wrote(1)]);
    let next = batch(2, &[add("b", 1)]);
    story.turn([write(4, &[add("b", 1)])], &[frame(1, 2, &[next])]);
    story.turn([write(5, &[add("b", 1)])], &[]);
}

#[test]
fn a_full_queue_refuses_and_an_empty_one_never_does() {
    let settings = Settings { queue_bytes_max: 1, ..Settings::default() };
    let mut story = Story::with(settings, &[config(ALL, 1, 1)]);
    let sent = batch(1, &[add("a", 1)]);
    story.turn([write(1, &[add("a", 1)])], &[frame(1, 1, [&sent])]);
    story.turn([write(2, &[add("a", 1), add("b", 1)])], &[]);
    story.turn([write(3, &[add("a", 1)])], &[failed(3, &[(0, Failure::QueueFull)])]);
}

#[test]
fn a_queue_that_is_full_for_want_of_a_primary_says_so() {
    let settings = Settings { queue_bytes_max: 1, ..Settings::default() };
    let mut story = Story::with(settings, &[config(ALL, 1, 1)]);
    story.turn([closed(1)], &[]);
    story.turn([write(1, &[add("a", 1)])], &[]);
    story.turn([write(2, &[add("a", 1)])], &[failed(2, &[(0, Failure::NoPrimary)])]);
}

/// The left shard has no primary, and reads of it are all that the worker may hold.
#[test]
fn a_read_that_finds_no_room_says_what_it_would_wait_for() {
    let settings = Settings { read_keys_max: 1, ..Settings::default() };
    let mut story = Story::with(settings, &[config(LEFT, 1, 1), config(RIGHT, 1, 2)]);
    let (left, right) = (key_in(LEFT), key_in(RIGHT));
    story.turn([closed(1)], &[]);
    story.turn([read(1, &[&left])], &[]);
    story.turn([read(2, &[&right, &left])], &[read_done(2, Err(Failure::NoPrimary))]);
    story.turn([read(3, &[&right])], &[read_done(3, Err(Failure::QueueFull))]);
}

/// The left shard has no primary and holds all that the worker may: the right one still goes.
#[test]
fn a_shard_that_holds_more_than_its_share_gives_way() {
    let settings = Settings { worker_bytes_max: 1_000, ..Settings::default() };
    let mut story = Story::with(settings, &[config(LEFT, 1, 1), config(RIGHT, 1, 2)]);
    let (left, right) = (key_in(LEFT), key_in(RIGHT));
    story.turn([closed(1)], &[]);
    let many: Vec<Op> = (0..20).map(|_| add(&left, 1)).collect();
    story.turn([write(1, &many)], &[]);
    story.turn([write(2, &[add(&left, 1)])], &[failed(2, &[(0, Failure::NoPrimary)])]);
    let sent = batch_of(RIGHT, 7, 1, &[add(&right, 1)]);
    story.turn([write(3, &[add(&right, 1)])], &[frame(2, 1, [&sent])]);
}

#[test]
fn a_stopping_worker_finishes_what_it_has() {
    let (mut story, sent) = Story::with_batch_out();
    story.turn([write(2, &[add("b", 1)])], &[]);
    let stopping = [(0, Failure::Stopping)];
    story.turn([Event::Stop, write(3, &[add("c", 1)])], &[failed(3, &stopping)]);
    assert_eq!(story.worker.not_ready(), Some(NotReady::Stopping));
    let next = batch(2, &[add("b", 1)]);
    story.turn([answer(1, 1, &sent, applied(&[]))], &[wrote(1), frame(1, 2, [&next])]);
    assert!(!story.worker.is_idle());
    story.turn([answer(1, 2, &next, applied(&[]))], &[wrote(2)]);
    assert!(story.worker.is_idle());
}

#[test]
fn a_refused_dial_of_a_primary_is_reported() {
    let mut story = Story::new();
    let report = Report { silent: vec![StoreId(1)], ..Report::default() };
    story.turn([Event::DialRefused { store: StoreId(1) }], &[Effect::Report(report)]);
    story.turn([Event::DialRefused { store: StoreId(2) }], &[]);
}

/// A shard was split while its operations waited.
#[test]
fn what_waits_is_sorted_anew_when_a_shard_is_split() {
    let mut story = Story::new();
    let (left, right) = (key_in(LEFT), key_in(RIGHT));
    story.turn([closed(1)], &[]);
    story.turn([write(1, &[add(&left, 1), add(&right, 2)])], &[]);
    story.turn(
        [Event::Config(config(RIGHT, 1, 2)), Event::Config(config(LEFT, 2, 2))],
        &[frame(
            2,
            1,
            [&batch_of(LEFT, 7, 1, &[add(&left, 1)]), &batch_of(RIGHT, 7, 1, &[add(&right, 2)])],
        )],
    );
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
    let mut story = Story::new();
    story.turn([read(1, &["a", "b"]), read(2, &["c"])], &[asks(1, 1, ALL, &["a", "b", "c"])]);
    story.turn([found(1, 1, &[1, 2, 3])], &[read_done(1, Ok(&[1, 2])), read_done(2, Ok(&[3]))]);
    assert_eq!((story.worker.requests(), story.worker.next_deadline()), (0, None));
}

#[test]
fn a_read_over_two_shards_is_in_the_order_of_its_keys() {
    let mut story = Story::with(Settings::default(), &[config(LEFT, 1, 1), config(RIGHT, 1, 2)]);
    let (left, right) = (key_in(LEFT), key_in(RIGHT));
    story.turn(
        [read(1, &[&right, &left, &right])],
        &[asks(1, 1, LEFT, &[&left]), asks(2, 2, RIGHT, &[&right, &right])],
    );
    story.turn([found(2, 2, &[5, 6])], &[]);
    story.turn([found(1, 1, &[7])], &[read_done(1, Ok(&[5, 7, 6]))]);
}

#[test]
fn a_read_is_asked_again_elsewhere() {
    // Not primary, and who is.
    let mut story = Story::new();
    story.turn([read(1, &["a"])], &[asks(1, 1, ALL, &["a"])]);
    let newer = Box::new(config(ALL, 2, 2));
    story.turn([not_found(1, 1, Refusal::NotPrimary(Some(newer)))], &[asks(2, 2, ALL, &["a"])]);
    // Not primary, and nobody knows: spaced.
    story.turn([not_found(2, 2, Refusal::NotPrimary(None))], &[]);
    story.wakes_at_ms(10, &[asks(2, 3, ALL, &["a"])]);
    // The connection is gone.
    story.turn([closed(2)], &[]);
    story.turn([connected(3, 2)], &[asks(3, 4, ALL, &["a"])]);
    // Another leads: whoever was asked before may be deposed, and silent.
    story.turn([Event::Config(config(ALL, 3, 1))], &[asks(1, 5, ALL, &["a"])]);
    // What comes late from there is nobody's.
    story.turn([found(3, 4, &[1])], &[]);
    story.turn([found(1, 5, &[2])], &[read_done(1, Ok(&[2]))]);
}

#[test]
fn a_read_that_is_refused_fails_at_once() {
    for (refusal, failure) in [
        (Refusal::Frozen, Failure::Frozen),
        (Refusal::Overloaded, Failure::Overloaded),
        (Refusal::NoSpace, Failure::NoSpace),
        (Refusal::TooLarge, Failure::TooLarge),
    ] {
        let mut story = Story::new();
        story.turn([read(1, &["a"])], &[asks(1, 1, ALL, &["a"])]);
        story.turn([not_found(1, 1, refusal)], &[read_done(1, Err(failure))]);
        assert_eq!(story.worker.requests(), 0);
    }
}

#[test]
fn a_read_fails_at_its_deadline() {
    let mut story = Story::new();
    story.turn([read(1, &["a"])], &[asks(1, 1, ALL, &["a"])]);
    story.wakes_at_ms(5_000, &[read_done(1, Err(Failure::Deadline))]);
    story.turn([found(1, 1, &[1])], &[]);
    let mut story = Story::new();
    story.turn([closed(1)], &[]);
    story.turn([read(1, &["a"])], &[]);
    story.wakes_at_ms(5_000, &[read_done(1, Err(Failure::NoPrimary))]);
    let mut story = Story { worker: Worker::new(Settings::default()), now: Now(0) };
    story.turn([read(1, &["a"])], &[read_done(1, Err(Failure::NoShard))]);
    story.turn([read(2, &[])], &[read_done(2, Ok(&[]))]);
}

/// One of the values is missing: an answer that nobody can use.
#[test]
fn a_read_with_too_few_values_is_asked_again() {
    let mut story = Story::new();
    story.turn([read(1, &["a", "b"])], &[asks(1, 1, ALL, &["a", "b"])]);
    story.turn([found(1, 1, &[1])], &[]);
    story.wakes_at_ms(10, &[asks(1, 2, ALL, &["a", "b"])]);
}

#[test]
fn two_messages_of_reads_per_shard_are_on_the_way() {
    let mut story = Story::new();
    story.turn([read(1, &["a"])], &[asks(1, 1, ALL, &["a"])]);
    story.turn([read(2, &["b"])], &[asks(1, 2, ALL, &["b"])]);
    story.turn([read(3, &["c"]), read(4, &["d"])], &[]);
    story.turn([found(1, 2, &[2])], &[read_done(2, Ok(&[2])), asks(1, 3, ALL, &["c", "d"])]);
    story.turn([read(5, &["e"])], &[]);
    story.wakes_at_ms(5, &[asks(1, 4, ALL, &["e"])]);
}

// ---- bounded-stale reads -----------------------------------------------------------------------

const BACKUPS: [u128; 2] = [2, 3];

/// Node 1 leads; 2 and 3 are in sync, each on the connection of its number.
fn with_backups(worker: usize) -> Story {
    let isr = vec![node(1).store, node(2).store, node(3).store];
    let config = ShardConfig { isr, ..config(ALL, 1, 1) };
    let mut story = Story::with(Settings { worker, ..Settings::default() }, &[config]);
    story.turn([connected(3, 3)], &[]);
    story
}

fn bounded(request: u64, max_ms: u64, keys: &[&str]) -> Event {
    let keys = keys.iter().map(|key| add(key, 0).counter).collect();
    Event::Read { request, keys, max_staleness_ms: Some(max_ms), deadline: DEADLINE }
}

fn asks_backup(conn: u64, id: u64, max_ms: u64, keys: &[&str]) -> Effect {
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

/// A backup said how old it was when its answer left; what has passed since the question is added,
/// and all of it rounded up.
#[test]
fn an_age_counts_from_the_question_and_is_rounded_up() {
    let mut story = with_backups(0);
    story.turn([bounded(1, 1_000, &["a"])], &[asks_backup(2, 1, 1_000, &["a"])]);
    story.at_ms(7).turn([found_stale(2, 1, 500_001, &[5])], &[stale_read_done(1, 508, &[5])]);
    assert_eq!((story.worker.requests(), story.worker.next_deadline()), (0, None));
}

/// The client is told when the turn ends, so that is when its age is taken.
#[test]
fn an_age_is_of_the_end_of_the_turn() {
    let mut story = with_backups(0);
    story.turn([bounded(1, 1_000, &["a"])], &[asks_backup(2, 1, 1_000, &["a"])]);
    let mut effects = Vec::new();
    let now = story.at_ms(7).now;
    story.worker.handle(now, found_stale(2, 1, 500_001, &[5]), &mut effects);
    assert_eq!(effects, []);
    story.at_ms(9).turn([], &[stale_read_done(1, 510, &[5])]);
}

#[test]
fn each_worker_begins_with_another_backup() {
    for (worker, conn) in [(0, 2), (1, 3), (2, 2)] {
        let mut story = with_backups(worker);
        story.turn([bounded(1, 1_000, &["a"])], &[asks_backup(conn, 1, 1_000, &["a"])]);
    }
}

#[test]
fn a_backup_that_can_not_tell_makes_room_for_the_next_and_lastly_for_the_primary() {
    let mut story = with_backups(0);
    story.turn([bounded(1, 50, &["a"])], &[asks_backup(2, 1, 50, &["a"])]);
    story.turn([not_found(2, 1, Refusal::Stale)], &[asks_backup(3, 2, 50, &["a"])]);
    story.turn([not_found(3, 2, Refusal::Stale)], &[asks(1, 3, ALL, &["a"])]);
    // The primary's answer is linearizable, and so is whatever it refuses.
    story.turn([found(1, 3, &[5])], &[read_done(1, Ok(&[5]))]);
    // Both have refused lately: they are asked all the same, since others may be content with more.
    story.turn([bounded(2, 900, &["a"])], &[asks_backup(2, 4, 900, &["a"])]);
}

#[test]
fn a_backup_that_refused_comes_last_for_a_second() {
    let mut story = with_backups(0);
    story.turn([bounded(1, 50, &["a"])], &[asks_backup(2, 1, 50, &["a"])]);
    story.turn([not_found(2, 1, Refusal::Stale)], &[asks_backup(3, 2, 50, &["a"])]);
    story.turn([found_stale(3, 2, 9_000, &[5])], &[stale_read_done(1, 9, &[5])]);
    story.turn([bounded(2, 50, &["a"])], &[asks_backup(3, 3, 50, &["a"])]);
    story.turn([found_stale(3, 3, 9_000, &[5])], &[stale_read_done(2, 9, &[5])]);
    story.at_ms(1_000).turn([bounded(3, 50, &["a"])], &[asks_backup(2, 4, 50, &["a"])]);
}

#[test]
fn a_silent_backup_is_done_without() {
    let mut story = with_backups(0);
    story.turn([bounded(1, 50, &["a"])], &[asks_backup(2, 1, 50, &["a"])]);
    story.wakes_at_ms(400, &[asks_backup(3, 2, 50, &["a"])]);
    // What it says now is nobody's.
    story.turn([found_stale(2, 1, 0, &[4])], &[]);
    story.turn([closed(3)], &[asks(1, 3, ALL, &["a"])]);
    story.turn([found(1, 3, &[5])], &[read_done(1, Ok(&[5]))]);
    // Nobody is connected but the primary.
    story.turn([closed(2)], &[]);
    story.turn([bounded(2, 50, &["a"])], &[asks(1, 4, ALL, &["a"])]);
}

/// An answer that took so long that it is too old by now: the primary is asked.
#[test]
fn an_answer_that_is_too_old_when_it_comes_is_not_given() {
    let mut story = with_backups(0);
    story.turn([bounded(1, 50, &["a"])], &[asks_backup(2, 1, 50, &["a"])]);
    story.at_ms(11).turn([found_stale(2, 1, 39_001, &[5])], &[asks(1, 2, ALL, &["a"])]);
    story.turn([found(1, 2, &[6])], &[read_done(1, Ok(&[6]))]);
}

/// One shard answers at once and another after a while: the age of both counts when the request is
/// answered, and what has become too old by then is asked anew.
#[test]
fn a_read_over_two_shards_is_as_old_as_its_oldest_part() {
    let isr: Vec<_> = BACKUPS.iter().map(|&store| node(store).store).collect();
    let led = |slots| ShardConfig { isr: isr.clone(), ..config(slots, 1, 1) };
    for (max_ms, then) in
        [(100, stale_read_done(1, 72, &[1, 2])), (71, asks(1, 3, LEFT, &[&key_in(LEFT)]))]
    {
        let mut story = Story::with(Settings::default(), &[led(LEFT), led(RIGHT)]);
        let (left, right) = (key_in(LEFT), key_in(RIGHT));
        let ask = |id, slots, key: &str| {
            let keys = vec![add(key, 0).counter];
            let max_staleness_ms = Some(max_ms);
            let message = GatewayMessage::Read { id, slots, keys, max_staleness_ms };
            Effect::Send { conn: Conn(2), message }
        };
        story.turn(
            [bounded(1, max_ms, &[&left, &right])],
            &[ask(1, LEFT, &left), ask(2, RIGHT, &right)],
        );
        story.turn([found_stale(2, 1, 42_000, &[1])], &[]);
        story.at_ms(30).turn([found_stale(2, 2, 1_000, &[2])], &[then]);
    }
}

/// What a primary has said ages, too, while a backup takes its time (seed 21584: the read was said to
/// be as old as the backup's part alone).
#[test]
fn a_primarys_part_ages_beside_a_backups() {
    let isr: Vec<_> = BACKUPS.iter().map(|&store| node(store).store).collect();
    for (max_ms, then) in
        [(100, stale_read_done(1, 30, &[1, 2])), (29, asks(1, 4, RIGHT, &[&key_in(RIGHT)]))]
    {
        let alone = ShardConfig { isr: vec![node(1).store], ..config(LEFT, 1, 1) };
        let right = ShardConfig { isr: isr.clone(), ..config(RIGHT, 1, 1) };
        let mut story = Story::with(Settings::default(), &[alone, right]);
        let (left, right) = (key_in(LEFT), key_in(RIGHT));
        let mut effects = Vec::new();
        let now = story.now;
        story.worker.handle(now, bounded(1, max_ms, &[&left, &right]), &mut effects);
        story.worker.handle(now, Event::TurnEnded, &mut effects);
        assert_eq!(effects.len(), 2, "{effects:?}");
        let of_the_primary = |effect: &Effect| *effect == asks(1, 1, LEFT, &[&left]);
        let (to_left, to_right) = if effects.iter().any(of_the_primary) { (1, 2) } else { (2, 1) };
        story.turn([connected(3, 3), found(1, to_left, &[1])], &[]);
        // One backup can't tell, so the other one is asked later than the primary was.
        let keys = vec![add(&right, 0).counter];
        let again =
            GatewayMessage::Read { id: 3, slots: RIGHT, keys, max_staleness_ms: Some(max_ms) };
        let again = Effect::Send { conn: Conn(3), message: again };
        story.at_ms(20).turn([not_found(2, to_right, Refusal::Stale)], &[again]);
        story.at_ms(30).turn([found_stale(3, 3, 1_000, &[2])], &[then]);
    }
}

/// Parts that are content with different ages travel apart, since a node is told one.
#[test]
fn one_message_has_one_bound() {
    let mut story = with_backups(0);
    story.turn(
        [bounded(1, 50, &["a"]), bounded(2, 900, &["b"]), bounded(3, 50, &["c"])],
        &[asks_backup(2, 1, 50, &["a", "c"]), asks_backup(2, 2, 900, &["b"])],
    );
}

#[test]
fn a_bounded_read_fails_with_its_primary() {
    let mut story = with_backups(0);
    story.turn([closed(2), closed(3)], &[]);
    story.turn([bounded(1, 50, &["a"])], &[asks(1, 1, ALL, &["a"])]);
    story.turn([not_found(1, 1, Refusal::Frozen)], &[read_done(1, Err(Failure::Frozen))]);
    // Its time is up while a backup is asked.
    story.turn([connected(3, 3)], &[]);
    story.at_ms(4_900).turn([bounded(2, 50, &["a"])], &[asks_backup(3, 2, 50, &["a"])]);
    story.wakes_at_ms(5_000, &[read_done(2, Err(Failure::Deadline))]);
}
