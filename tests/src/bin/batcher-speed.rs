//! Measures the batcher of a gateway: nanoseconds per operation, from request to answer.
//!
//! `cargo run --profile ci -p tests --bin batcher-speed`
//!
//! Requests are built before the measurement as the HTTP layer builds them: names are slices of one
//! body. A stub answers "applied" to every batch, so the cost of a node is not included. The result
//! is the median of all turns, since other processes may use the machine.

use std::io::Write;
use std::time::{Duration, Instant};

use bytes::Bytes;
use engine::batcher::shard_map::ranges;
use engine::batcher::{Batcher, Effect, Event, Settings};
use engine::ids::{
    Boot, Conn, Epoch, Now, Revision, SessionId, StoreBoot, StoreId, TimeMs, Version,
};
use engine::key::CounterKey;
use engine::message::{BatchReply, GatewayMessage, NodeReply};
use engine::ops::{Op, OpKind};
use engine::shard_record::ShardRecord;
use tests::sim::rng::Rng;

const OPS: usize = 2_000_000;
const TURNS_MAX: usize = 10_000;
const NODES: u64 = 3;

fn main() -> std::io::Result<()> {
    let mut out = std::io::stdout();
    for (requests, ops, counters, shards, returning) in [
        (1, 1_000, 1_000_000, 24, false),
        (1, 1_000, 1_000_000, 24, true),
        (1, 1_000, 1, 24, false),
        (1, 1_000, 1_000_000, 4096, false),
        (64, 1, 1_000_000, 24, false),
        (1, 1, 1_000_000, 24, false),
    ] {
        let turn = measure(requests, ops, counters, shards, returning);
        let ns = turn.as_nanos() / (requests * ops) as u128;
        writeln!(
            out,
            "turns of {requests} requests of {ops} ops on {counters} counters, {shards} shards, \
             values {returning}: {ns} ns per op"
        )?;
    }
    Ok(())
}

/// Returns the median time of a turn, including all work until its requests are answered.
fn measure(requests: usize, ops: usize, counters: u64, shards: u32, returning: bool) -> Duration {
    let mut batcher = ready(shards);
    let mut random = Rng::new(1);
    let mut effects = Vec::new();
    let mut replies = Vec::new();
    let mut all_spent = Vec::new();
    let mut request = 0;
    let turns = (OPS / (requests * ops)).min(TURNS_MAX);
    for turn in 0..turns as u64 {
        let now = Now(turn * 1_000);
        let asked: Vec<_> =
            (0..requests).map(|_| body(&mut random, ops, counters, returning)).collect();
        let mut spent = Duration::ZERO;
        let begun = Instant::now();
        for ops in asked {
            request += 1;
            let deadline = now.plus_ms(5_000);
            batcher.handle(now, Event::Write { request, ops, token: None, deadline }, &mut effects);
        }
        batcher.handle(now, Event::TurnEnded, &mut effects);
        spent += begun.elapsed();
        let mut wrote = 0;
        while wrote < requests {
            for effect in effects.drain(..) {
                match effect {
                    Effect::Send { conn, message } => answer(conn, message, &mut replies),
                    Effect::Wrote { .. } => wrote += 1,
                    other => unreachable!("{other:?}"),
                }
            }
            let begun = Instant::now();
            for event in replies.drain(..) {
                batcher.handle(now, event, &mut effects);
            }
            batcher.handle(now, Event::TurnEnded, &mut effects);
            spent += begun.elapsed();
        }
        all_spent.push(spent);
    }
    all_spent.sort();
    all_spent[turns / 2]
}

/// Returns one request, whose names are slices of one buffer.
fn body(random: &mut Rng, ops: usize, counters: u64, returning: bool) -> Vec<Op> {
    let text: String = (0..ops).map(|_| format!("ns\0{:08}", random.below(counters))).collect();
    let text = Bytes::from(text);
    let op = |at: usize| {
        let name = text.slice(at * 11..(at + 1) * 11);
        let counter = CounterKey::from_name(name).expect("a short plain name");
        let kind = match returning {
            true => OpKind::AddReturning { delta: 1 },
            false => OpKind::Add { delta: 1 },
        };
        Op { counter, kind }
    };
    (0..ops).map(op).collect()
}

fn answer(conn: Conn, message: GatewayMessage, replies: &mut Vec<Event>) {
    let GatewayMessage::Frame { message, batches } = message else { return };
    for batch in batches {
        let ops = engine::ops::decode_batch(&batch).expect("it was just encoded");
        let values = ops.iter().filter(|op| op.kind.returns_value()).map(|_| 7).collect();
        let answer = BatchReply::Applied { values, tokens: Vec::new(), time: TimeMs(0) };
        let (slots, session, batch_seq) = (batch.slots, batch.session, batch.batch_seq);
        let reply = NodeReply::Answer { message, slots, session, batch_seq, answer };
        replies.push(Event::Reply { conn, reply });
    }
}

/// Returns a batcher with a session, a shard map and a connection to each node.
fn ready(shards: u32) -> Batcher {
    let mut batcher = Batcher::new(Settings::default());
    let node = |number: u64| StoreBoot { store: StoreId(number.into()), boot: Boot(1) };
    let session = SessionId(Revision { incarnation: 1, revision: 7 });
    let mut events = vec![Event::Session(Some(session))];
    events.extend((0..NODES).map(|at| Event::Connected { conn: Conn(at), node: node(at) }));
    for (slots, number) in ranges(shards).zip(0u64..) {
        events.push(Event::ShardRecord(ShardRecord {
            slots,
            epoch: Epoch(1),
            version: Version(1),
            primary: node(number % NODES),
            ..ShardRecord::default()
        }));
    }
    for event in events {
        batcher.handle(Now(0), event, &mut Vec::new());
    }
    assert_eq!(batcher.not_ready(), None);
    batcher
}
