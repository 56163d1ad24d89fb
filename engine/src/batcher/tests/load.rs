//! A batcher under load, against a model of a node: frames are served one after the other, and each
//! takes a fixed time and a little for each operation. What comes out is the number of operations
//! per frame and the rate, for so many clients and shards.

use std::collections::BTreeMap;

use super::*;
use crate::ids::ShardId;

/// The time that a node takes for a frame, and for each operation in it.
const FRAME_US: u64 = 2_000;
const OP_US: u64 = 2;
/// The time that a run takes, in the model.
const RUN_MS: u64 = 150;
/// The time between an answer and the next request of a client is up to this.
const THINK_US: u64 = 300;

/// Something that happens at a moment.
enum Happening {
    /// A client asks: adds 1 to some counter.
    Ask,
    /// The node has served a frame.
    Served { message: u64, batches: Vec<Batch> },
}

/// A closed loop of clients, one batcher and one node.
struct LoadModel {
    batcher: Batcher,
    happenings: BTreeMap<(Now, u64), Happening>,
    /// The number of happenings so far.
    count: u64,
    random: u64,
    node_free: Now,
    /// Frames that carry one of these shards take this much longer to be answered.
    slow: Option<(ShardId, u64)>,
    requests: u64,
    answered: u64,
    frames: u64,
    ops: u64,
}

impl LoadModel {
    /// Runs `clients` against a node that leads `shards`, for so many milliseconds.
    fn run(clients: u64, shards: u32, slow: Option<(ShardId, u64)>, ms: u64) -> Self {
        let records: Vec<_> = shard_map::ranges(shards).map(|slots| record(slots, 1, 1)).collect();
        let batcher = Bench::with(Settings::default(), &records).batcher;
        let happenings = BTreeMap::new();
        let mut model = Self {
            batcher,
            happenings,
            count: 0,
            random: 1,
            node_free: Now(0),
            slow,
            requests: 0,
            answered: 0,
            frames: 0,
            ops: 0,
        };
        for _ in 0..clients {
            model.ask_soon(Now(0));
        }
        model.run_until(Now(0).plus_ms(ms));
        model
    }

    fn ops_per_frame(&self) -> u64 {
        self.ops / self.frames
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.random = self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (self.random >> 33) % limit
    }

    fn plan(&mut self, at: Now, happening: Happening) {
        self.count += 1;
        self.happenings.insert((at, self.count), happening);
    }

    fn ask_soon(&mut self, now: Now) {
        let at = Now(now.0 + 1 + self.below(THINK_US));
        self.plan(at, Happening::Ask);
    }

    fn run_until(&mut self, end: Now) {
        loop {
            let next = self.happenings.first_key_value().map(|(&(at, _), _)| at);
            let deadline = self.batcher.next_deadline();
            let Some(now) = next.into_iter().chain(deadline).min().filter(|&now| now < end) else {
                return;
            };
            let mut effects = Vec::new();
            while let Some(entry) = self.happenings.first_entry()
                && entry.key().0 <= now
            {
                let happening = entry.remove();
                for event in self.events(happening) {
                    self.batcher.handle(now, event, &mut effects);
                }
            }
            self.batcher.handle(now, Event::TurnEnded, &mut effects);
            effects.into_iter().for_each(|effect| self.perform(now, effect));
        }
    }

    fn events(&mut self, happening: Happening) -> Vec<Event> {
        match happening {
            Happening::Ask => {
                self.requests += 1;
                let ops = vec![add(&self.below(1_000_000).to_string(), 1)];
                let (request, deadline) = (self.requests, Now(u64::MAX));
                vec![Event::Write { request, ops, token: None, deadline }]
            }
            Happening::Served { message, batches } => {
                batches.iter().map(|batch| answer(1, message, batch, applied(&[]))).collect()
            }
        }
    }

    fn perform(&mut self, now: Now, effect: Effect) {
        match effect {
            Effect::Send { message: GatewayMessage::Frame { message, batches }, .. } => {
                let ops =
                    |batch| ops::decode_batch(batch).expect("just encoded").iter().count() as u64;
                let ops: u64 = batches.iter().map(ops).sum();
                (self.frames, self.ops) = (self.frames + 1, self.ops + ops);
                self.node_free = Now(self.node_free.max(now).0 + FRAME_US + OP_US * ops);
                let is_slow =
                    |batch: &Batch| self.slow.is_some_and(|(it, _)| batch.slots.lo == it.0);
                let (late, in_time) = batches.into_iter().partition(is_slow);
                self.plan(self.node_free, Happening::Served { message, batches: in_time });
                let after_us = self.slow.map_or(0, |(_, us)| us);
                let at = Now(self.node_free.0 + after_us);
                self.plan(at, Happening::Served { message, batches: late });
            }
            Effect::Wrote { result, .. } => {
                assert_eq!(result, WriteResult::default());
                self.answered += 1;
                self.ask_soon(now);
            }
            other => unreachable!("{other:?}"),
        }
    }
}

#[test]
fn frames_grow_with_the_load_however_many_shards_there_are() {
    for shards in [8, 24, 1_024] {
        for clients in [16, 64, 256] {
            let model = LoadModel::run(clients, shards, None, RUN_MS);
            let ops = model.ops_per_frame();
            assert!(ops >= clients * 2 / 5, "{ops} per frame: {clients} clients, {shards} shards");
        }
    }
}

#[test]
fn the_rate_does_not_depend_on_the_number_of_shards() {
    for clients in [16, 64, 256] {
        let [few, many] =
            [24, 1_024].map(|shards| LoadModel::run(clients, shards, None, RUN_MS).answered);
        assert!(many >= few * 4 / 5, "{clients} clients: {few} with 24 shards, {many} with 1,024");
    }
}

/// One shard of 24 is answered 100 ms late, always. Its own clients wait, and the others hardly do:
/// clients choose a shard at random, so they meet the slow one every 24th time.
#[test]
fn a_slow_shard_does_not_hold_up_the_others() {
    let model = LoadModel::run(240, 24, Some((ShardId(0), 100_000)), 1_000);
    // With 100 ms for a 24th of all requests and 5 ms for others, a client makes 108 a second.
    let fair = 240 * 108;
    assert!(model.answered >= fair / 2, "{} of {fair}", model.answered);
}
