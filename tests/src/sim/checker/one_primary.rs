//! At most one process leads a shard in an epoch, and it is the one that etcd's record names.

use std::collections::{BTreeMap, BTreeSet};

use engine::ids::{Epoch, ShardId, StoreBoot, StoreId};
use engine::shard_record::ShardRecord;

use super::Violation;

const PROMISE: &str = "one-primary";

#[derive(Default)]
pub struct OnePrimary {
    assigned: BTreeMap<(ShardId, Epoch), StoreBoot>,
    /// The epochs in which a process has acted as primary.
    led: BTreeSet<(ShardId, Epoch)>,
    /// The epochs that only a lost etcd has given to a process.
    lost: BTreeSet<(ShardId, Epoch)>,
}

impl OnePrimary {
    /// A record was written.
    pub fn assigned(&mut self, config: &ShardRecord, violations: &mut Vec<Violation>) {
        let claim = (config.shard(), config.epoch);
        // A later boot of the same store knows all that the earlier one has made durable.
        let same = |named: &StoreBoot| {
            named.store == config.primary.store && named.boot < config.primary.boot
        };
        let forgotten =
            !self.led.contains(&claim) || self.assigned.get(&claim).is_some_and(same);
        if self.lost.remove(&claim) && forgotten {
            self.assigned.remove(&claim);
        }
        let named = *self.assigned.entry(claim).or_insert(config.primary);
        if named != config.primary {
            let detail = format!("{claim:?} was given to {named:?} and to {:?}", config.primary);
            violations.push(Violation { promise: PROMISE, detail });
        }
    }

    /// All records are lost. An epoch in which a process has led must not be given again.
    pub fn etcd_lost(&mut self) {
        self.lost.extend(self.assigned.keys());
    }

    /// The store's disk is lost, and with it every epoch that no other store knows of.
    pub fn disk_lost(&mut self, store: StoreId) {
        self.led.retain(|claim| self.assigned.get(claim).is_none_or(|it| it.store != store));
    }

    /// A process acts as primary.
    pub fn leads(
        &mut self,
        claim: (ShardId, Epoch),
        me: StoreBoot,
        violations: &mut Vec<Violation>,
    ) {
        self.led.insert(claim);
        let named = self.assigned.get(&claim);
        if named != Some(&me) {
            let detail = format!("{me:?} leads {claim:?}, which was given to {named:?}");
            violations.push(Violation { promise: PROMISE, detail });
        }
    }
}
