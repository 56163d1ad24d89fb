//! Session rows agree: equal seq, equal rows and expiry, so that every replica treats a duplicate
//! alike.

use std::collections::BTreeMap;

use engine::ids::{Seq, ShardId};
use engine::shard::state::ShardState;

use super::super::trace::Trace;
use super::Violation;

#[derive(Default)]
pub struct SessionRows {
    at: BTreeMap<(ShardId, Seq), u64>,
}

impl SessionRows {
    pub fn applied(&mut self, shard: ShardId, state: &ShardState, violations: &mut Vec<Violation>) {
        let hash = hash(state);
        let known = *self.at.entry((shard, state.applied.seq)).or_insert(hash);
        if known != hash {
            let detail = format!("shard {shard} at {:?}: {:?}", state.applied.seq, state.sessions);
            violations.push(Violation { promise: "session-rows", detail });
        }
    }
}

fn hash(state: &ShardState) -> u64 {
    let mut hash = Trace::new(None);
    hash.mix(state.sessions.expiry.up_to.revision);
    for id in &state.sessions.expiry.survivors {
        hash.mix(id.0.revision);
    }
    for (id, row) in &state.sessions.rows {
        hash.mix(id.0.revision);
        hash.mix(row.last.0);
        hash.mix(row.answered_below.0);
        for (batch_seq, _) in &row.results {
            hash.mix(batch_seq.0);
        }
    }
    hash.hash()
}
