//! Some numbers never go back: a record's epoch and version; of one process and copy, what it has
//! promised, committed and applied. A promise outlives the copy, and, once an fsync has followed
//! it, the process.
//!
//! Causes of false alarms: promises that were made before a disk was harmed are not
//! checked.

use std::collections::BTreeMap;

use engine::ids::{CopyNo, Epoch, Seq, ShardId, StoreBoot, StoreId, Version};
use engine::node::{Effect, Event, ReplicaView};
use engine::shard_record::ShardRecord;

use super::Violation;

const PROMISE: &str = "never-back";

#[derive(Default)]
pub struct NeverBack {
    records: BTreeMap<ShardId, (Epoch, Version)>,
    promised: BTreeMap<(StoreBoot, ShardId), Epoch>,
    /// The committed and the applied position.
    reached: BTreeMap<(StoreBoot, ShardId, CopyNo), (Seq, Seq)>,
    /// The last group that a process has asked to be made durable.
    synced: BTreeMap<StoreBoot, u64>,
    /// Promises that are not known to be durable yet: they are once a group above this one is.
    undurable: BTreeMap<(StoreBoot, ShardId), (Epoch, u64)>,
    durable: BTreeMap<(StoreId, ShardId), Epoch>,
}

impl NeverBack {
    pub fn record_written(&mut self, config: &ShardRecord, violations: &mut Vec<Violation>) {
        let now = (config.epoch, config.version);
        let before = self.records.insert(config.shard(), now);
        if before.is_some_and(|before| now.0 < before.0 || now.1 <= before.1) {
            let detail =
                format!("the record of {} went from {before:?} to {now:?}", config.shard());
            violations.push(Violation { promise: PROMISE, detail });
        }
    }

    pub fn etcd_lost(&mut self) {
        self.records.clear();
    }

    pub fn effect(&mut self, me: StoreBoot, effect: &Effect) {
        if let Effect::Sync { group } = effect {
            self.synced.insert(me, *group);
        }
    }

    pub fn event(&mut self, me: StoreBoot, event: &Event) {
        let Event::Durable { group } = event else { return };
        let is_durable = |&(of, _): &(StoreBoot, ShardId), &mut (_, above): &mut (Epoch, u64)| {
            of == me && above < *group
        };
        for ((_, shard), (epoch, _)) in self.undurable.extract_if(.., is_durable) {
            self.durable.insert((me.store, shard), epoch);
        }
    }

    /// The store's disk may have lost what was durable.
    pub fn harmed(&mut self, store: StoreId) {
        self.durable.retain(|&(of, _), _| of != store);
        self.undurable.retain(|&(of, _), _| of.store != store);
    }

    pub fn look(&mut self, me: StoreBoot, view: &ReplicaView<'_>, violations: &mut Vec<Violation>) {
        let before = self.promised.insert((me, view.shard), view.promised);
        if before != Some(view.promised) {
            let above = self.synced.get(&me).copied().unwrap_or(0);
            self.undurable.insert((me, view.shard), (view.promised, above));
        }
        let outlived = self.durable.get(&(me.store, view.shard)).copied();
        let before = before.max(outlived);
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
