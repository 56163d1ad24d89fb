//! A gateway worker: batches of digit-coded adds, several under way, and the reading of everything.

use std::collections::BTreeMap;

use engine::batch::{Batch, Codec};
use engine::ids::{Bseq, Revision, SessionId};
use engine::message::{Answer, GatewayMessage, NodeReply};
use engine::ops::{self, Op, OpKind};

use crate::ledger::{counter_key, delta};
use crate::pair::{Pair, SHARDS};

/// Batches of one shard under way at once.
const UNDER_WAY_MAX: usize = 4;
const OPS: usize = 24;
/// Counters of one shard that are added to at one time.
const WINDOW: usize = 70;

pub(crate) struct Client {
    session: SessionId,
    random: u64,
    /// The first counter that may take more adds.
    first: u32,
    message: [u64; 2],
    lanes: [Lane; 2],
    /// Batches answered.
    pub(crate) answered: u64,
}

#[derive(Default)]
struct Lane {
    next: u64,
    under_way: BTreeMap<u64, Vec<(u32, u32)>>,
}

impl Client {
    /// `session`: never used before on these stores.
    pub(crate) fn new(session: u64) -> Self {
        Self {
            session: SessionId(Revision { incarnation: 1, revision: session }),
            random: session.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1,
            first: 0,
            message: [0; 2],
            lanes: Default::default(),
            answered: 0,
        }
    }

    /// xorshift64.
    fn below(&mut self, end: u32) -> u32 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random >> 33) as u32 % end
    }

    pub(crate) fn under_way(&self) -> usize {
        self.lanes.iter().map(|lane| lane.under_way.len()).sum()
    }

    /// Sends what may be sent, and takes the answers that came.
    pub(crate) fn pump(&mut self, pair: &mut Pair) {
        self.take_answers(pair);
        for shard in 0..2 {
            if pair.is_active(shard) && self.lanes[shard].under_way.len() < UNDER_WAY_MAX {
                self.send(pair, shard);
            }
        }
    }

    fn send(&mut self, pair: &mut Pair, shard: usize) {
        let next_add = |counter: u32| {
            let known = pair.ledger.counters.get(&counter).copied().unwrap_or_default();
            known.next_add()
        };
        while next_add(self.first).is_none() {
            self.first += 1;
        }
        let here = |&counter: &u32| SHARDS[shard].contains(counter_key(counter).slot());
        let open =
            (self.first..).filter(here).filter_map(|counter| Some((counter, next_add(counter)?)));
        let mut open: Vec<(u32, u32)> = open.take(WINDOW).collect();
        let mut adds = Vec::new();
        let mut ops = Vec::new();
        while ops.len() < OPS {
            let (counter, add) = open.swap_remove(self.below(open.len() as u32) as usize);
            let delta = delta(add);
            // Some ask for the value, so that loads go on beside flushes.
            let kind = match self.below(8) {
                0 => OpKind::AddReturning { delta },
                _ => OpKind::Add { delta },
            };
            adds.push((counter, add));
            ops.push(Op { counter: counter_key(counter), kind });
        }
        pair.ledger.say("sent", &adds);
        let lane = &mut self.lanes[shard];
        lane.next += 1;
        let bseq = Bseq(lane.next);
        let oldest = lane.under_way.keys().next().map_or(bseq, |&oldest| Bseq(oldest));
        lane.under_way.insert(bseq.0, adds);
        let payload = ops::encode(&ops);
        let batch = Batch::seal(SHARDS[shard], self.session, bseq, oldest, Codec::Raw, payload);
        let message = &mut self.message[pair.primary(shard)];
        *message += 1;
        pair.ask(shard, GatewayMessage::Frame { message: *message, batches: vec![batch] });
    }

    fn take_answers(&mut self, pair: &mut Pair) {
        for reply in std::mem::take(&mut pair.replies) {
            match reply {
                NodeReply::Answer { slots, bseq, answer: Answer::Applied { .. }, .. } => {
                    let shard = SHARDS.iter().position(|one| *one == slots).unwrap();
                    let adds = self.lanes[shard].under_way.remove(&bseq.0).unwrap();
                    pair.ledger.say("there", &adds);
                    self.answered += 1;
                }
                NodeReply::ShardState { .. } => {}
                other => panic!("{other:?}"),
            }
        }
    }

    /// Reads every counter there is, and compares.
    pub(crate) fn read_all(&mut self, pair: &mut Pair) {
        assert_eq!(self.under_way(), 0, "nothing is under way");
        let counters: Vec<u32> = pair.ledger.counters.keys().copied().collect();
        for (shard, slots) in SHARDS.into_iter().enumerate() {
            let here = |counter: &&u32| slots.contains(counter_key(**counter).slot());
            let here: Vec<u32> = counters.iter().filter(here).copied().collect();
            for (id, some) in here.chunks(500).enumerate() {
                let keys = some.iter().map(|&counter| counter_key(counter)).collect();
                let (id, max_staleness_ms) = (id as u64, None);
                pair.ask(shard, GatewayMessage::Read { id, slots, keys, max_staleness_ms });
                let mut values = None;
                pair.until("a read", |pair| {
                    let answer = |reply: &NodeReply| match reply {
                        NodeReply::Read { result, .. } => Some(result.clone()),
                        _ => None,
                    };
                    values = pair.replies.iter().find_map(answer);
                    values.is_some()
                });
                pair.replies.clear();
                let values = values.expect("waited for").unwrap().values;
                for (&counter, value) in some.iter().zip(values) {
                    pair.ledger.check(counter, value);
                }
            }
        }
    }
}
