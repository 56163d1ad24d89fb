//! The knowledge of this store about etcd, for a recovery of a lost etcd, and the promise to it.
//!
//! The promise is a fence: from the moment of the answer this process takes no record of any etcd
//! any more, so the answer stays complete. It goes on with what it knows until it is restarted;
//! then the promise, which is in the log, keeps it from an etcd of a lower incarnation.

use std::collections::BTreeMap;

use crate::ids::{Epoch, ShardId};
use crate::message::{CopyEnd, ShardKnowledge, StoreKnowledge};
use crate::node::shared::NodeTurn;
use crate::planted::Planted;
use crate::replica::Replica;
use crate::replica::trust::Trust;
use crate::shard_record::ShardRecord;
use crate::store::log::LogRecord;

impl NodeTurn<'_> {
    /// Promises to follow no etcd of an incarnation below `promise`, if that is above all earlier
    /// promises.
    pub(super) fn promise_incarnation(&mut self, promise: u32) {
        let Some(memory) = &mut self.shards.etcd else { return };
        if promise <= memory.promised {
            return;
        }
        memory.promised = promise;
        let record = LogRecord::Etcd(memory.clone());
        self.storage.turn(self.now, self.me, self.settings, self.effects).write(record);
        if !self.planted(Planted::FenceIgnored) {
            self.shards.fence = self.storage.groups().covering();
        }
    }

    /// Returns the knowledge of this store about etcd.
    pub(super) fn knowledge(&self) -> StoreKnowledge {
        let durable_group = self.storage.groups().durable();
        let mut shards: BTreeMap<ShardId, ShardKnowledge> = BTreeMap::new();
        for known in self.shards.records.values() {
            let record = known.0.clone();
            let shard = record.shard();
            shards.insert(shard, ShardKnowledge { record: Some(record), ..unknown(shard) });
        }
        for replica in self.shards.iter() {
            let known = shards.entry(replica.shard).or_insert_with(|| unknown(replica.shard));
            known.promised = replica.promised;
            known.copy = copy_end(replica);
            let newest = newest_acted_on(replica, known.record.take());
            known.record = newest;
        }
        StoreKnowledge {
            from: self.me,
            etcd: self.shards.etcd.clone(),
            durable: self.shards.fence.is_none_or(|group| group <= durable_group),
            damaged: false,
            shards: shards.into_values().collect(),
        }
    }
}

fn unknown(shard: ShardId) -> ShardKnowledge {
    ShardKnowledge { shard, promised: Epoch(0), record: None, copy: None }
}

/// Entries that are not durable do not count: a loss of power would take them.
fn copy_end(replica: &Replica) -> Option<CopyEnd> {
    let durable = replica.log.durable();
    let epoch = replica.log.epoch_at(durable).unwrap_or_default();
    let (unfit, damaged) = (replica.trust != Trust::Good, replica.trust.stopped().is_some());
    replica.trust.exists().then_some(CopyEnd { last: (epoch, durable), unfit, damaged })
}

fn newest_acted_on(replica: &Replica, seen: Option<ShardRecord>) -> Option<ShardRecord> {
    let acted_on = replica.acted_on.as_deref().cloned();
    seen.into_iter().chain(acted_on).max_by_key(ShardRecord::order)
}
