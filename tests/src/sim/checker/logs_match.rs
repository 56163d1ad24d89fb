//! Logs match: one (epoch, seq) is one entry everywhere, and all replicas apply the same entry at a
//! seq.

use std::collections::BTreeMap;

use engine::entry::{Entry, Position};
use engine::ids::{Chain, Epoch, Seq, ShardId};

use super::Violation;

const PROMISE: &str = "logs-match";

#[derive(Default)]
pub struct LogsMatch {
    written: BTreeMap<(ShardId, Epoch, Seq), Chain>,
    applied: BTreeMap<(ShardId, Seq), (Epoch, Chain)>,
}

impl LogsMatch {
    pub fn written(&mut self, shard: ShardId, entry: &Entry, violations: &mut Vec<Violation>) {
        let known = *self.written.entry((shard, entry.epoch, entry.seq)).or_insert(entry.chain);
        if known != entry.chain {
            let detail = format!("shard {shard}: two entries at {:?}", entry.position());
            violations.push(Violation { promise: PROMISE, detail });
        }
    }

    pub fn applied(&mut self, shard: ShardId, at: Position, violations: &mut Vec<Violation>) {
        let this = (at.epoch, at.chain);
        let known = *self.applied.entry((shard, at.seq)).or_insert(this);
        if known != this {
            let detail =
                format!("shard {shard}: {:?} applied as {known:?} and as {this:?}", at.seq);
            violations.push(Violation { promise: PROMISE, detail });
        }
    }
}
