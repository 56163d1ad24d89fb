//! Digests agree: equal seq, equal counters and equal records of tokens; and the digests of the
//! children of a split add up to the parent's.

use std::collections::BTreeMap;

use engine::ids::{Chain, Seq, ShardId};
use engine::shard::state::ShardState;

use super::Violation;

#[derive(Default)]
pub struct Digests {
    at: BTreeMap<(ShardId, Seq), (u128, u128)>,
    /// By the chain of a split: the counters of the children, and the shard of the left one.
    children: BTreeMap<Chain, [Option<(ShardId, u128)>; 2]>,
    /// The number of splits of which both children and the parent were seen.
    pub added_up: u64,
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
        if state.divided == seq && seq > Seq(0) {
            self.divided(shard, state, violations);
        }
    }

    fn divided(&mut self, shard: ShardId, state: &ShardState, violations: &mut Vec<Violation>) {
        let seq = state.applied.seq;
        let children = self.children.entry(state.applied.chain).or_default();
        let is_left = self.at.contains_key(&(shard, seq.prev())) || children[1].is_some();
        let side = usize::from(!is_left);
        if children[side].is_some() {
            return;
        }
        children[side] = Some((shard, state.counter_digest));
        let &mut [Some((parent, left)), Some((_, right))] = children else { return };
        let Some(&(whole, _)) = self.at.get(&(parent, seq.prev())) else { return };
        self.added_up += 1;
        if left.wrapping_add(right) != whole {
            let detail = format!("shard {parent}: its children at {seq:?} are not all of it");
            violations.push(Violation { promise: "digests", detail });
        }
    }
}
