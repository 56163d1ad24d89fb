//! A gateway worker: batches of digit-coded adds, several in flight, and reads of all counters.
//! Some adds have a token, by which each can be repeated at any later time.

use std::collections::BTreeMap;

use engine::batch::{Batch, Codec};
use engine::ids::{BatchSeq, Revision, SessionId, TimeMs};
use engine::message::{BatchReply, GatewayMessage, NodeReply, Refusal, ShardAvailability};
use engine::ops::{self, Op, OpKind};
use engine::shard::idempotency::{ClientToken, IssueTime, Scope, TokenOutcome};

use crate::ledger::{counter_key, delta};
use crate::pair::{Pair, SHARDS};

/// The most batches of one shard in flight.
const IN_FLIGHT_MAX: usize = 4;
const OPS: usize = 24;
/// The number of counters of one shard that get adds at one time.
const WINDOW: usize = 70;

pub(crate) struct Client {
    session: SessionId,
    random: u64,
    /// The first counter that may take more adds.
    first: u32,
    message: [u64; 2],
    queues: [ShardQueue; 2],
    /// The number of batches answered.
    pub(crate) answered: u64,
}

#[derive(Default)]
struct ShardQueue {
    next: u64,
    in_flight: BTreeMap<u64, Vec<(u32, u32)>>,
}

impl Client {
    /// Creates a client. `session` must never have been used on these stores.
    pub(crate) fn new(session: u64) -> Self {
        Self {
            session: SessionId(Revision { incarnation: 1, revision: session }),
            random: session.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1,
            first: 0,
            message: [0; 2],
            queues: Default::default(),
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

    /// Repeats, under its token, every add that is known to be applied: all must be answered as
    /// replayed. Returns their number.
    pub(crate) fn repeat_all(&mut self, pair: &mut Pair) -> usize {
        let mut repeated = 0;
        for (shard, slots) in SHARDS.into_iter().enumerate() {
            let known = pair.ledger.counters.iter();
            let here = known.filter(|(counter, _)| slots.contains(counter_key(**counter).slot()));
            let adds = here.flat_map(|(&counter, known)| {
                let there = known.there;
                let is_there = move |add: &u32| there >> add & 1 == 1 && has_token(counter, *add);
                (0..64).filter(is_there).map(move |add| (counter, add))
            });
            let adds: Vec<_> = adds.collect();
            repeated += adds.len();
            for some in adds.chunks(200) {
                let outcomes = self.repeat(pair, shard, some);
                assert_eq!(outcomes.len(), some.len());
                for (add, outcome) in some.iter().zip(outcomes) {
                    assert_eq!(
                        outcome,
                        TokenOutcome::Replayed,
                        "{add:?} is there, its record is not"
                    );
                }
            }
        }
        repeated
    }

    /// Sends these adds until they are accepted: on a busy machine the other store may seem silent
    /// for a moment.
    fn repeat(&mut self, pair: &mut Pair, shard: usize, adds: &[(u32, u32)]) -> Vec<TokenOutcome> {
        loop {
            let mut payload = ops::begin();
            for &(counter, add) in adds {
                put_add(&mut payload, counter, add, OpKind::Add { delta: delta(add) });
            }
            self.seal(pair, shard, payload, Vec::new());
            let answer = |pair: &Pair| {
                pair.replies.iter().find_map(|reply| match reply {
                    NodeReply::Answer { answer, .. } => Some(answer.clone()),
                    _ => None,
                })
            };
            pair.until("an answer to what was repeated", |pair| answer(pair).is_some());
            let answer = answer(pair).expect("waited for");
            self.queues[shard].in_flight.clear();
            let opens = |reply: &NodeReply| {
                matches!(reply, NodeReply::ShardState { state: ShardAvailability::Open, .. })
            };
            match answer {
                BatchReply::Applied { tokens, .. } => {
                    pair.replies.clear();
                    return tokens;
                }
                BatchReply::Refused(Refusal::Frozen) => {
                    pair.until("an open shard", |pair| pair.replies.iter().any(opens));
                    pair.replies.clear();
                }
                other => panic!("{other:?}"),
            }
        }
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.queues.iter().map(|queue| queue.in_flight.len()).sum()
    }

    /// Sends what may be sent, and takes the answers that arrived.
    pub(crate) fn pump(&mut self, pair: &mut Pair) {
        self.take_answers(pair);
        for shard in 0..2 {
            if pair.is_active(shard) && self.queues[shard].in_flight.len() < IN_FLIGHT_MAX {
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
        let mut payload = ops::begin();
        while adds.len() < OPS {
            let (counter, add) = open.swap_remove(self.below(open.len() as u32) as usize);
            let delta = delta(add);
            // Some ask for the value, so that there are loads beside flushes.
            let kind = match self.below(8) {
                0 => OpKind::AddReturning { delta },
                _ => OpKind::Add { delta },
            };
            adds.push((counter, add));
            put_add(&mut payload, counter, add, kind);
        }
        pair.ledger.note_adds("sent", &adds);
        self.seal(pair, shard, payload, adds);
    }

    /// Sends the shard's next batch.
    fn seal(&mut self, pair: &mut Pair, shard: usize, payload: Vec<u8>, adds: Vec<(u32, u32)>) {
        let queue = &mut self.queues[shard];
        queue.next += 1;
        let batch_seq = BatchSeq(queue.next);
        let oldest = queue.in_flight.keys().next().map_or(batch_seq, |&oldest| BatchSeq(oldest));
        queue.in_flight.insert(batch_seq.0, adds);
        let (slots, session) = (SHARDS[shard], self.session);
        let batch = Batch::seal(slots, session, batch_seq, oldest, Codec::Raw, payload.into());
        let message = &mut self.message[pair.primary(shard)];
        *message += 1;
        pair.ask(shard, GatewayMessage::Frame { message: *message, batches: vec![batch] });
    }

    fn take_answers(&mut self, pair: &mut Pair) {
        for reply in std::mem::take(&mut pair.replies) {
            match reply {
                NodeReply::Answer {
                    slots, batch_seq, answer: BatchReply::Applied { .. }, ..
                } => {
                    let shard = SHARDS.iter().position(|one| *one == slots).unwrap();
                    let adds = self.queues[shard].in_flight.remove(&batch_seq.0).unwrap();
                    pair.ledger.note_adds("there", &adds);
                    self.answered += 1;
                }
                NodeReply::ShardState { .. } => {}
                other => panic!("{other:?}"),
            }
        }
    }

    /// Reads every counter there is, and compares.
    pub(crate) fn read_all(&mut self, pair: &mut Pair) {
        assert_eq!(self.in_flight(), 0, "nothing is in flight");
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

fn has_token(counter: u32, add: u32) -> bool {
    (counter + add).is_multiple_of(5)
}

/// Adds with a token are blind adds, so that a repetition is the same request.
fn put_add(payload: &mut Vec<u8>, counter: u32, add: u32, kind: OpKind) {
    let mut op = Op { counter: counter_key(counter), kind };
    if has_token(counter, add) {
        op.kind = OpKind::Add { delta: delta(add) };
        let token = vec![add as u8].into();
        let token = ClientToken { scope: Scope::Counter, token, issued: None, extra: 0 };
        let tag = token.tag(std::slice::from_ref(&op)).expect("there is an op");
        ops::put_token(payload, &tag, IssueTime::Stated(TimeMs(0)), 1);
    }
    ops::put(payload, &op);
}
