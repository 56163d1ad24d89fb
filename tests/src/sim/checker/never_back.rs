//! Some numbers never go back: a record's epoch and version; of one process and copy, what it has promised, committed
//! and applied. A promise outlives even the copy.

use std::collections::BTreeMap;

use engine::config::ShardConfig;
use engine::ids::{CopyNo, Epoch, Seq, ShardId, StoreBoot, Version};
use engine::node::ReplicaView;

use super::Violation;

const PROMISE: &str = "never-back";

#[derive(Default)]
pub struct NeverBack {
    records: BTreeMap<ShardId, (Epoch, Version)>,
    promised: BTreeMap<(StoreBoot, ShardId), Epoch>,
    /// Committed and applied.
    reached: BTreeMap<(StoreBoot, ShardId, CopyNo), (Seq, Seq)>,
}

impl NeverBack {
    pub fn record_written(&mut self, config: &ShardConfig, violations: &mut Vec<Violation>) {
        let now = (config.epoch, config.version);
        let before = self.records.insert(config.shard(), now);
        if before.is_some_and(|before| now.0 < before.0 || now.1 <= before.1) {
            let detail =
                format!("the record of {} went from {before:?} to {now:?}", config.shard());
            violations.push(Violation { promise: PROMISE, detail });
        }
    }

    pub fn look(&mut self, me: StoreBoot, view: &ReplicaView<'_>, violations: &mut Vec<Violation>) {
        let before = self.promised.insert((me, view.shard), view.promised);
        if before.is_some_and(|before| view.promised < before) {
            let shard = view.shard;
            let detail = format!("{me:?}: {shard} promised {before:?}, now {:?}", view.promised);
            violations.push(Violation { promise: PROMISE, detail });
        }
        if !view.exists {
            return;
        }
        let now = (view.commit, view.state.applied.seq);
        let before = self.reached.insert((me, view.shard, view.copy), now);
        if before.is_some_and(|before| now.0 < before.0 || now.1 < before.1) {
            let shard = view.shard;
            let detail = format!("{me:?}: {shard} committed and applied {before:?}, now {now:?}");
            violations.push(Violation { promise: PROMISE, detail });
        }
    }
}
