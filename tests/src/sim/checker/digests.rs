//! Digests agree: equal seq, equal counters and equal records of tokens.

use std::collections::BTreeMap;

use engine::ids::{Seq, ShardId};
use engine::shard::state::ShardState;

use super::Violation;

#[derive(Default)]
pub struct Digests {
    at: BTreeMap<(ShardId, Seq), (u128, u128)>,
}

impl Digests {
    pub fn applied(&mut self, shard: ShardId, state: &ShardState, violations: &mut Vec<Violation>) {
        let seq = state.applied.seq;
        let digests = (state.counter_digest, state.tokens.digest());
        let known = *self.at.entry((shard, seq)).or_insert(digests);
        if known != digests {
            let detail = format!("shard {shard} at {seq:?}: two digests");
            violations.push(Violation { promise: "digests", detail });
        }
    }
}
