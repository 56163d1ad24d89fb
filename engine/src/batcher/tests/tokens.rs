//! Operations with a client's token: their issue time, their place in a batch, and the answers to
//! their clients.

use super::*;
use crate::shard::idempotency::{ClientToken, IssueTime, Scope, Tag, TokenOutcome};

fn token(scope: Scope, issued: Option<u64>) -> ClientToken {
    ClientToken { scope, token: "t".into(), issued: issued.map(TimeMs), extra: 0 }
}

fn tokened(request: u64, ops: &[Op], token: ClientToken) -> Event {
    Event::Write { request, ops: ops.to_vec(), token: Some(token), deadline: DEADLINE }
}

fn one(request: u64, ops: &[Op], issued: Option<u64>) -> Event {
    tokened(request, ops, token(Scope::Counter, issued))
}

/// Groups of operations in one batch; a tag makes a group with a token, issued then.
type Group<'a> = (Option<(Tag, IssueTime)>, &'a [Op]);

fn groups(slots: Slots, batch_seq: u64, groups: &[Group<'_>]) -> Batch {
    let mut payload = ops::begin();
    for (token, group) in groups {
        if let Some((tag, issued)) = token {
            ops::put_token(&mut payload, tag, *issued, group.len());
        }
        group.iter().for_each(|op| ops::put(&mut payload, op));
    }
    Batch::seal(
        slots,
        session(7),
        BatchSeq(batch_seq),
        BatchSeq(batch_seq),
        Codec::Raw,
        payload.into(),
    )
}

fn tag(scope: Scope, ops: &[Op]) -> Tag {
    token(scope, None).tag(ops).expect("it has operations")
}

fn stated(time: u64) -> IssueTime {
    IssueTime::Stated(TimeMs(time))
}

fn heard(time: u64) -> IssueTime {
    IssueTime::Arrived(TimeMs(time))
}

fn told(values: &[i128], tokens: &[TokenOutcome], time: u64) -> BatchReply {
    let (values, tokens) = (values.to_vec(), tokens.to_vec());
    BatchReply::Applied { values, tokens, time: TimeMs(time) }
}

fn ms(ms: u64) -> Now {
    Now(ms * 1_000)
}

#[test]
fn with_the_clients_issue_time_it_goes_at_once() {
    let mut bench = Bench::new();
    let ops = [returning("a", 5)];
    let sent = groups(ALL, 1, &[(Some((tag(Scope::Counter, &ops), stated(777))), &ops)]);
    bench.turn([one(1, &ops, Some(777))], &[frame(1, 1, [&sent])]);
    let answered = told(&[5], &[TokenOutcome::Applied], 1_000);
    bench.turn([answer(1, 1, &sent, answered)], &[values(1, &[(0, 5)])]);
}

/// No time of the shard is known: an empty batch asks for it. The answer's time, less the time
/// since the request came, is the issue time; and the answer is valid for a while.
#[test]
fn without_one_the_shard_is_asked_for_its_time() {
    let mut bench = Bench::new();
    let ops = [add("a", 5)];
    let counter = tag(Scope::Counter, &ops);
    let asks = groups(ALL, 1, &[]);
    bench.turn([one(1, &ops, None)], &[frame(1, 1, [&asks])]);
    bench.now = ms(40);
    let sent = groups(ALL, 2, &[(Some((counter, heard(9_960))), &ops)]);
    bench.turn([answer(1, 1, &asks, told(&[], &[], 10_000))], &[frame(1, 2, [&sent])]);
    let done = told(&[], &[TokenOutcome::Applied], 10_020);
    bench.turn([answer(1, 2, &sent, done.clone())], &[wrote(1)]);
    // The time is known from just now: the next operation is sent at once, issued then.
    bench.now = ms(1_040);
    let sent = groups(ALL, 3, &[(Some((counter, heard(10_020))), &ops)]);
    bench.turn([one(2, &ops, None)], &[frame(1, 3, [&sent])]);
    bench.turn([answer(1, 3, &sent, done)], &[wrote(2)]);
    // The time is more than a second old: the shard is asked again.
    bench.now = ms(2_041);
    let asks = groups(ALL, 4, &[]);
    bench.turn([one(3, &ops, None)], &[frame(1, 4, [&asks])]);
}

/// Other operations are sent anyway: their answer contains the time.
#[test]
fn any_batch_asks() {
    let mut bench = Bench::new();
    let ops = [add("a", 5)];
    let plain = batch(1, &[add("b", 1)]);
    bench.turn([write(1, &[add("b", 1)]), one(2, &ops, None)], &[frame(1, 1, [&plain])]);
    let sent = groups(ALL, 2, &[(Some((tag(Scope::Counter, &ops), heard(50))), &ops)]);
    bench.turn([answer(1, 1, &plain, told(&[], &[], 50))], &[wrote(1), frame(1, 2, [&sent])]);
}

/// The issue time is that of the request's arrival, not that of its first send.
#[test]
fn what_waits_behind_a_batch_was_issued_when_it_came() {
    let mut bench = Bench::new();
    let first = batch(1, &[add("b", 1)]);
    bench.turn([write(1, &[add("b", 1)])], &[frame(1, 1, [&first])]);
    bench.turn([answer(1, 1, &first, told(&[], &[], 1_000))], &[wrote(1)]);
    let second = batch(2, &[add("b", 1)]);
    bench.turn([write(2, &[add("b", 1)])], &[frame(1, 2, [&second])]);
    let ops = [add("a", 5)];
    bench.turn([one(3, &ops, None)], &[]);
    bench.now = ms(3_000);
    let sent = groups(ALL, 3, &[(Some((tag(Scope::Counter, &ops), heard(1_000))), &ops)]);
    let answered = answer(1, 2, &second, told(&[], &[], 4_000));
    bench.turn([answered], &[wrote(2), frame(1, 3, [&sent])]);
}

#[test]
fn a_shard_that_refuses_to_be_asked_refuses_those_that_wait() {
    let mut bench = Bench::new();
    let asks = groups(ALL, 1, &[]);
    bench.turn([one(1, &[add("a", 5)], None)], &[frame(1, 1, [&asks])]);
    let full = answer(1, 1, &asks, refused(Refusal::NoSpace));
    bench.turn([full], &[failed(1, &[(0, Failure::NoSpace)])]);
}

#[test]
fn a_shard_that_is_too_busy_to_be_asked_is_asked_again() {
    let mut bench = Bench::new();
    let asks = groups(ALL, 1, &[]);
    bench.turn([one(1, &[add("a", 5)], None)], &[frame(1, 1, [&asks])]);
    bench.turn([answer(1, 1, &asks, refused(Refusal::Overloaded))], &[]);
    bench.wakes_at_ms(50, &[frame(1, 2, [&asks])]);
}

#[test]
fn an_unanswered_question_leaves_the_operation_unsent() {
    let mut bench = Bench::new();
    let asks = groups(ALL, 1, &[]);
    bench.turn([one(1, &[add("a", 5)], None)], &[frame(1, 1, [&asks])]);
    bench.now = DEADLINE;
    bench.turn([], &[failed(1, &[(0, Failure::Slow)])]);
}

/// Adds of the same counter, with a token and without: none of them is merged.
#[test]
fn an_operation_with_a_token_is_merged_with_no_other() {
    let mut bench = Bench::new();
    let (a, b) = ([add("a", 1)], [add("a", 2)]);
    let with = |ops: &[Op]| Some((tag(Scope::Counter, ops), stated(9)));
    let plain = [add("a", 10)];
    let all: [Group<'_>; 4] = [(None, &plain), (with(&a), &a), (with(&b), &b), (None, &plain)];
    let sent = groups(ALL, 1, &all);
    let asked = [write(1, &plain), one(2, &a, Some(9)), one(3, &b, Some(9)), write(4, &plain)];
    bench.turn(asked, &[frame(1, 1, [&sent])]);
    let outcomes = [TokenOutcome::Applied, TokenOutcome::Reused];
    bench.turn(
        [answer(1, 1, &sent, told(&[], &outcomes, 9))],
        &[wrote(1), wrote(2), failed(3, &[(0, Failure::TokenReused)]), wrote(4)],
    );
}

/// A request over two shards: one counter's items are summed, each shard has its part as a whole,
/// and the fingerprint is the whole request's in both.
#[test]
fn a_requests_parts_are_whole_and_their_items_summed() {
    let mut bench = Bench::with(Settings::default(), &[record(LEFT, 1, 1), record(RIGHT, 1, 1)]);
    let (left, right) = (key_in(LEFT), key_in(RIGHT));
    let ops = [add(&left, 1), add(&right, 2), add(&left, 4)];
    let whole = Some((tag(Scope::Batch, &ops), stated(9)));
    let one = groups(LEFT, 1, &[(whole, &[add(&left, 5)])]);
    let two = groups(RIGHT, 1, &[(whole, &[add(&right, 2)])]);
    let asked = tokened(1, &ops, token(Scope::Batch, Some(9)));
    bench.turn([asked], &[frame(1, 1, [&one])]);
    let replayed = told(&[], &[TokenOutcome::Replayed], 9);
    bench.turn([answer(1, 1, &one, replayed)], &[frame(1, 2, [&two])]);
    let result = WriteResult {
        replayed: 2,
        failed: vec![(1, Failure::TokenTooOld)],
        ..WriteResult::default()
    };
    let too_old = told(&[], &[TokenOutcome::TooOld], 9);
    bench.turn([answer(1, 2, &two, too_old)], &[Effect::Wrote { request: 1, result }]);
}

/// Two shards, and a request for the right one whose token has its home in the left one: the batch
/// that carries the token there is in flight.
fn at_home() -> (Bench, [Op; 1], Batch) {
    let mut bench = Bench::with(Settings::default(), &[record(LEFT, 1, 1), record(RIGHT, 1, 1)]);
    let ops = [returning(&key_in(RIGHT), 2)];
    let tag = tag(Scope::Batch, &ops);
    let home = tag.home(b"n").expect("the namespace is one");
    assert!(LEFT.contains(home.slot()), "the tests are about a token that is at home elsewhere");
    let takes = Op { counter: home, kind: OpKind::Add { delta: 0 } };
    let sent = groups(LEFT, 1, &[(Some((tag, stated(9))), &[takes])]);
    bench.turn([tokened(1, &ops, token(Scope::Batch, Some(9)))], &[frame(1, 1, [&sent])]);
    (bench, ops, sent)
}

fn at_right(batch_seq: u64, ops: &[Op]) -> Batch {
    groups(RIGHT, batch_seq, &[(Some((tag(Scope::Batch, ops), stated(9))), ops)])
}

/// The operations of a token are sent once its home has recorded it, and no others are in the
/// result.
#[test]
fn a_token_is_taken_at_its_home_first() {
    let (mut bench, ops, sent) = at_home();
    let right = at_right(1, &ops);
    let replayed = told(&[], &[TokenOutcome::Replayed], 9);
    bench.turn([answer(1, 1, &sent, replayed)], &[frame(1, 2, [&right])]);
    let applied = told(&[7], &[TokenOutcome::Applied], 9);
    bench.turn([answer(1, 2, &right, applied)], &[values(1, &[(0, 7)])]);
    assert!(bench.batcher.is_idle());
    assert_eq!((bench.batcher.bytes(), bench.batcher.next_deadline()), (0, None));
}

/// Another request has the token, or there is no room for it: nothing is sent anywhere else.
#[test]
fn what_its_home_refuses_is_sent_to_no_other_shard() {
    for (said, failure) in [
        (told(&[], &[TokenOutcome::Reused], 9), Failure::TokenReused),
        (told(&[], &[TokenOutcome::TooOld], 9), Failure::TokenTooOld),
        (told(&[], &[TokenOutcome::Quota], 9), Failure::TokenQuota),
        (refused(Refusal::Frozen), Failure::Frozen),
        (BatchReply::Malformed, Failure::Malformed),
        // The effect at the home is unknown, but the client asked for nothing there.
        (BatchReply::AnsweredBefore, Failure::Slow),
    ] {
        let (mut bench, _, sent) = at_home();
        bench.turn([answer(1, 1, &sent, said)], &[failed(1, &[(0, failure)])]);
        assert_eq!((bench.batcher.requests(), bench.batcher.bytes()), (0, 0));
    }
}

#[test]
fn a_home_that_does_not_answer_leaves_the_rest_unsent() {
    let (mut bench, ..) = at_home();
    bench.now = DEADLINE;
    bench.turn([], &[failed(1, &[(0, Failure::Slow)])]);
}

/// A home that accepts nothing is known before anything is sent.
#[test]
fn a_frozen_home_refuses_at_once() {
    let mut bench = Bench::with(Settings::default(), &[record(LEFT, 1, 1), record(RIGHT, 1, 1)]);
    let reply = NodeReply::ShardState { slots: LEFT, state: ShardAvailability::Frozen };
    bench.turn([Event::Reply { conn: Conn(1), reply }], &[]);
    let (left, right) = (add(&key_in(LEFT), 1), add(&key_in(RIGHT), 1));
    let asked = |request, ops: &[Op]| [tokened(request, ops, token(Scope::Batch, Some(9)))];
    bench.turn(asked(1, std::slice::from_ref(&right)), &[failed(1, &[(0, Failure::Frozen)])]);
    let both = [(0, Failure::Frozen), (1, Failure::Frozen)];
    bench.turn(asked(2, &[right, left]), &[failed(2, &both)]);
}

/// The home of the token is not in the map yet: no part may be sent without it.
#[test]
fn a_home_that_is_not_known_refuses_at_once() {
    let mut bench = Bench::with(Settings::default(), &[record(LEFT, 1, 1), record(RIGHT, 1, 1)]);
    bench.batcher = Batcher::new(Settings::default());
    let known = Event::ShardRecord(record(RIGHT, 1, 1));
    bench.turn([Event::Session(Some(session(7))), connected(1, 1), known], &[]);
    let asked = tokened(1, &[add(&key_in(RIGHT), 1)], token(Scope::Batch, Some(9)));
    bench.turn([asked], &[failed(1, &[(0, Failure::NoShard)])]);
}

/// All operations of the client are refused at once: the token stays free for another batch.
#[test]
fn a_token_is_not_brought_home_for_nothing() {
    let mut bench = Bench::with(Settings::default(), &[record(LEFT, 1, 1), record(RIGHT, 1, 1)]);
    let reply = NodeReply::ShardState { slots: RIGHT, state: ShardAvailability::Frozen };
    bench.turn([Event::Reply { conn: Conn(1), reply }], &[]);
    let asked = tokened(1, &[add(&key_in(RIGHT), 1)], token(Scope::Batch, Some(9)));
    bench.turn([asked], &[failed(1, &[(0, Failure::Frozen)])]);
    assert!(bench.batcher.is_idle());
}

/// One home without a primary must not shut out the others: operations that are held for it count
/// as operations that wait for it.
#[test]
fn what_is_held_for_a_home_counts_as_its_own() {
    let settings = Settings { total_bytes_max: 10_000, ..Settings::default() };
    let mut bench = Bench::with(settings, &[record(LEFT, 1, 1), record(RIGHT, 1, 2)]);
    bench.turn([closed(1)], &[]);
    let long = (0..).map(|number: u32| format!("{number}{}", "k".repeat(1_000)));
    let long: Vec<Op> = long.map(|key| add(&key, 1)).take(20).collect();
    let long = long.iter().find(|op| RIGHT.contains(op.counter.slot())).expect("one of twenty");
    let batch =
        |request| tokened(request, std::slice::from_ref(long), token(Scope::Batch, Some(9)));
    let mut asked = 0;
    let refused = loop {
        asked += 1;
        assert!(asked < 12, "{} bytes are held", bench.batcher.bytes());
        let mut effects = Vec::new();
        bench.batcher.handle(bench.now, batch(asked), &mut effects);
        if !effects.is_empty() {
            break effects;
        }
    };
    assert_eq!(refused, [failed(asked, &[(0, Failure::NoPrimary)])]);
    // The other shard takes its own operations.
    let plain = [add(&key_in(RIGHT), 5)];
    let sent = batch_of(RIGHT, 7, 1, &plain);
    bench.turn([write(asked + 1, &plain)], &[frame(2, 1, [&sent])]);
}

/// The shard that operations were held for has become full in the meantime.
#[test]
fn held_operations_are_admitted_again() {
    let settings = Settings { queue_bytes_max: 1, ..Settings::default() };
    let mut bench = Bench::with(settings, &[record(LEFT, 1, 1), record(RIGHT, 1, 1)]);
    let ops = [add(&key_in(RIGHT), 2)];
    let tag = tag(Scope::Batch, &ops);
    let takes = [Op { counter: tag.home(b"n").unwrap(), kind: OpKind::Add { delta: 0 } }];
    let taken = groups(LEFT, 1, &[(Some((tag, stated(9))), &takes)]);
    let asked = tokened(1, &ops, token(Scope::Batch, Some(9)));
    bench.turn([asked], &[frame(1, 1, [&taken])]);
    let plain = [add(&key_in(RIGHT), 1)];
    let out = batch_of(RIGHT, 7, 1, &plain);
    bench.turn([write(2, &plain)], &[frame(1, 2, [&out])]);
    bench.turn([write(3, &plain)], &[]);
    let done = told(&[], &[TokenOutcome::Applied], 9);
    bench.turn([answer(1, 1, &taken, done)], &[failed(1, &[(0, Failure::QueueFull)])]);
}

/// Held operations come behind a batch of later requests, and stand before them when that batch is
/// rejected.
#[test]
fn held_operations_keep_their_place() {
    let (mut bench, ops, sent) = at_home();
    let later = [add(&key_in(RIGHT), 5)];
    let out = batch_of(RIGHT, 7, 1, &later);
    bench.turn([write(2, &later)], &[frame(1, 2, [&out])]);
    bench.turn([answer(1, 1, &sent, told(&[], &[TokenOutcome::Applied], 9))], &[]);
    bench.turn([answer(1, 2, &out, refused(Refusal::NotPrimary(None)))], &[]);
    let whole = Some((tag(Scope::Batch, &ops), stated(9)));
    let both = groups(RIGHT, 1, &[(whole, &ops), (None, &later)]);
    bench.wakes_at_ms(10, &[frame(1, 3, [&both])]);
}

/// Without an issue time of the client's, the issue time is the arrival of the request, in the time
/// of each shard.
#[test]
fn held_operations_were_issued_when_they_came() {
    let mut bench = Bench::with(Settings::default(), &[record(LEFT, 1, 1), record(RIGHT, 1, 1)]);
    let ops = [add(&key_in(RIGHT), 2)];
    let tag = tag(Scope::Batch, &ops);
    let takes = [Op { counter: tag.home(b"n").unwrap(), kind: OpKind::Add { delta: 0 } }];
    let asks = groups(LEFT, 1, &[]);
    let asked = tokened(1, &ops, token(Scope::Batch, None));
    bench.turn([asked], &[frame(1, 1, [&asks])]);
    let taken = groups(LEFT, 2, &[(Some((tag, heard(100))), &takes)]);
    bench.turn([answer(1, 1, &asks, told(&[], &[], 100))], &[frame(1, 2, [&taken])]);
    // Other requests have got the right shard's time in the meantime.
    bench.now = ms(30);
    let plain = [add(&key_in(RIGHT), 1)];
    let out = batch_of(RIGHT, 7, 1, &plain);
    bench.turn([write(2, &plain)], &[frame(1, 3, [&out])]);
    bench.turn([answer(1, 3, &out, told(&[], &[], 5_000))], &[wrote(2)]);
    let right = groups(RIGHT, 2, &[(Some((tag, heard(4_970))), &ops)]);
    let done = told(&[], &[TokenOutcome::Applied], 120);
    bench.turn([answer(1, 2, &taken, done)], &[frame(1, 4, [&right])]);
}

#[test]
fn every_outcome_has_its_reason_and_a_refused_one_no_value() {
    for (outcome, failure) in [
        (TokenOutcome::Reused, Failure::TokenReused),
        (TokenOutcome::TooOld, Failure::TokenTooOld),
        (TokenOutcome::Quota, Failure::TokenQuota),
    ] {
        let mut bench = Bench::new();
        let ops = [returning("a", 5)];
        let sent = groups(ALL, 1, &[(Some((tag(Scope::Counter, &ops), stated(7))), &ops)]);
        bench.turn([one(1, &ops, Some(7))], &[frame(1, 1, [&sent])]);
        let answered = answer(1, 1, &sent, told(&[0], &[outcome], 9));
        bench.turn([answered], &[failed(1, &[(0, failure)])]);
    }
    use super::super::outcome::Outcome::{NotApplied, Unknown};
    let outcome = Failure::outcome;
    assert_eq!(outcome(Failure::TokenReused), NotApplied);
    assert_eq!(outcome(Failure::TokenQuota), NotApplied);
    assert_eq!(outcome(Failure::TokenTooOld), Unknown);
}

/// An answer without an outcome for every token decides nothing.
#[test]
fn too_few_outcomes_decide_nothing() {
    let mut bench = Bench::new();
    let ops = [add("a", 5)];
    let sent = groups(ALL, 1, &[(Some((tag(Scope::Counter, &ops), stated(7))), &ops)]);
    bench.turn([one(1, &ops, Some(7))], &[frame(1, 1, [&sent])]);
    let answered = answer(1, 1, &sent, told(&[], &[], 9));
    bench.turn([answered], &[failed(1, &[(0, Failure::ResultGone)])]);
}

/// A part larger than a batch is sent as a whole and alone; one that does not fit behind others
/// waits for the next batch.
#[test]
fn a_large_part_is_never_split() {
    let mut bench = Bench::new();
    let names: Vec<String> = (0..BATCH_OPS_MAX + 10).map(|n| n.to_string()).collect();
    let ops: Vec<Op> = names.iter().map(|name| add(name, 1)).collect();
    let plain = batch(1, &[add("first", 1)]);
    let asked = tokened(2, &ops, token(Scope::Batch, Some(9)));
    bench.turn(
        [write(1, &[add("first", 1)]), asked, write(3, &[add("last", 1)])],
        &[frame(1, 1, [&plain])],
    );
    let sent = groups(ALL, 2, &[(Some((tag(Scope::Batch, &ops), stated(9))), &ops)]);
    bench.turn([answer(1, 1, &plain, applied(&[]))], &[wrote(1), frame(1, 2, [&sent])]);
    let done = told(&[], &[TokenOutcome::Applied], 9);
    let last = batch(3, &[add("last", 1)]);
    bench.turn([answer(1, 2, &sent, done)], &[wrote(2), frame(1, 3, [&last])]);
}

#[test]
fn more_than_a_node_takes_is_refused() {
    let mut bench = Bench::new();
    let long = "k".repeat(1_000);
    let ops: Vec<Op> = (0..12_600).map(|n| add(&format!("{long}{n}"), 1)).collect();
    let all: Vec<_> = (0..12_600).map(|n| (n, Failure::TooLarge)).collect();
    bench.turn([tokened(1, &ops, token(Scope::Batch, Some(9)))], &[failed(1, &all)]);
}

/// A rejected batch is sealed again as it was: same token, same issue time.
#[test]
fn a_rejected_batch_keeps_its_issue_time() {
    let mut bench = Bench::new();
    let ops = [add("a", 5)];
    let token = (Some((tag(Scope::Counter, &ops), stated(7))), &ops[..]);
    let sent = groups(ALL, 1, &[token]);
    bench.turn([one(1, &ops, Some(7))], &[frame(1, 1, [&sent])]);
    bench.turn([answer(1, 1, &sent, refused(Refusal::NotPrimary(None)))], &[]);
    bench.now = ms(10);
    bench.turn([], &[frame(1, 2, [&sent])]);
}

/// A shard is split while a request waits for it, and the home of its token is the child that has
/// no operations of it: they must not be done without a record there. Seed 4433 let another request
/// take the token.
#[test]
fn what_a_split_takes_away_from_its_home_is_not_sent() {
    let mut bench = Bench::new();
    let ops = [returning(&key_in(RIGHT), 2)];
    bench.turn([closed(1)], &[]);
    bench.turn([tokened(1, &ops, token(Scope::Batch, Some(9)))], &[]);
    let split = [record(RIGHT, 1, 2), record(LEFT, 2, 2)].map(Event::ShardRecord);
    bench.turn(split, &[failed(1, &[(0, Failure::Frozen)])]);
    assert_eq!((bench.batcher.requests(), bench.batcher.bytes()), (0, 0));
}
