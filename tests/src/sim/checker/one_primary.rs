//! At most one process leads a shard in an epoch, and it is the one that etcd's record names.

use std::collections::BTreeMap;

use engine::ids::{Boot, Epoch, ShardId, StoreBoot};
use engine::shard_record::ShardRecord;

use super::Violation;

const PROMISE: &str = "one-primary";

#[derive(Default)]
pub struct OnePrimary {
    assigned: BTreeMap<(ShardId, Epoch), StoreBoot>,
}

impl OnePrimary {
    /// A record was written. A rebuilt etcd may name a boot that no process has: then none leads.
    pub fn assigned(&mut self, config: &ShardRecord, violations: &mut Vec<Violation>) {
        if config.primary.boot == Boot(0) {
            return;
        }
        let claim = (config.shard(), config.epoch);
        let named = *self.assigned.entry(claim).or_insert(config.primary);
        if named != config.primary {
            let detail = format!("{claim:?} was given to {named:?} and to {:?}", config.primary);
            violations.push(Violation { promise: PROMISE, detail });
        }
    }

    /// A process acts as primary.
    pub fn leads(
        &mut self,
        claim: (ShardId, Epoch),
        me: StoreBoot,
        violations: &mut Vec<Violation>,
    ) {
        let named = self.assigned.get(&claim);
        if named != Some(&me) {
            let detail = format!("{me:?} leads {claim:?}, which was given to {named:?}");
            violations.push(Violation { promise: PROMISE, detail });
        }
    }
}
