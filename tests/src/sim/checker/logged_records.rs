//! Committed entries are durable on every member of the in-sync set that the newest record in any
//! log names, at every moment: if etcd and all processes were lost now, etcd would be rebuilt with
//! these members (`engine::recovery_plan`).
//!
//! The checker compares durable records with durable copies: a store deletes its copy in one group
//! with the record that permits it, so before that group is durable neither has happened. Causes of
//! false alarms: a disk that has lied or is known to be damaged is excluded, as in
//! [`in_sync_set`](super::in_sync_set); and after a loss was accepted less is held than was
//! committed, so a shard with tainted members is left out.

use std::collections::{BTreeMap, BTreeSet};

use engine::ids::{CopyNo, Epoch, Seq, ShardId, StoreId, Version};
use engine::node::ReplicaView;
use engine::shard_record::ShardRecord;

use super::Violation;

const PROMISE: &str = "logged-records";

/// The durable content of a disk about one shard.
#[derive(Clone, Debug)]
pub struct DurableShard {
    pub shard: ShardId,
    /// The newest record of etcd that the store has acted on.
    pub acted_on: Option<Box<ShardRecord>>,
    pub copy: CopyNo,
    /// The end of the copy; `None`: the disk holds no copy.
    pub end: Option<Seq>,
    /// The copy was found damaged.
    pub suspect: bool,
}

#[derive(Default)]
pub struct LoggedRecords {
    /// The newest record of each shard that ever was durable in a log.
    newest: BTreeMap<ShardId, ShardRecord>,
    /// The shards with tainted members, by the record in etcd.
    tainted: BTreeSet<ShardId>,
    committed: BTreeMap<ShardId, Seq>,
    held: BTreeMap<(StoreId, ShardId), DurableShard>,
    /// The copies that the store's disk held when it was harmed.
    harmed: BTreeMap<(StoreId, ShardId), CopyNo>,
}

impl LoggedRecords {
    pub fn record_written(&mut self, record: &ShardRecord) {
        match record.tainted.is_empty() {
            true => self.tainted.remove(&record.shard()),
            false => self.tainted.insert(record.shard()),
        };
    }

    /// Returns whether the newest records in all logs, or in those of other stores than this one,
    /// cover all slots. Where a child's record is known its parent ends.
    pub fn cover_all(&self, without: Option<StoreId>) -> bool {
        let mut ends: BTreeMap<ShardId, ((Epoch, Version), u16)> = BTreeMap::new();
        let others = self.held.iter().filter(|((of, _), _)| Some(*of) != without);
        for record in others.filter_map(|(_, held)| held.acted_on.as_deref()) {
            let newest = ends.entry(record.shard()).or_default();
            *newest = (*newest).max((record.order(), record.slots.hi));
        }
        let begins: Vec<u32> = ends.keys().map(|shard| shard.0.into()).collect();
        let next = begins.iter().copied().skip(1).chain([1 << 16]);
        begins.first() == Some(&0)
            && ends.values().zip(next).all(|(&(_, end), next)| u32::from(end) + 1 >= next)
    }

    pub fn etcd_lost(&mut self) {
        self.tainted.clear();
    }

    /// The store's disk may have lost what was durable: its copies are excluded until they are
    /// replaced.
    pub fn harmed(&mut self, store: StoreId) {
        for ((of, shard), held) in &self.held {
            if *of == store {
                self.harmed.insert((store, *shard), held.copy);
            }
        }
    }

    /// This is durable on the store from now on.
    pub fn durable(
        &mut self,
        store: StoreId,
        found: DurableShard,
        violations: &mut Vec<Violation>,
    ) {
        let (shard, key) = (found.shard, (store, found.shard));
        let is_made_anew = |copy: &CopyNo| found.end.is_some() && found.copy > *copy;
        if self.harmed.get(&key).is_some_and(is_made_anew) {
            self.harmed.remove(&key);
        }
        if let Some(record) = found.acted_on.as_deref() {
            let newest = self.newest.entry(shard).or_insert_with(|| record.clone());
            if newest.order() < record.order() {
                *newest = record.clone();
            }
        }
        self.held.insert(key, found);
        self.check(shard, violations);
    }

    /// A primary may have committed more.
    pub fn look(&mut self, view: &ReplicaView<'_>, violations: &mut Vec<Violation>) {
        let Some(primary) = view.primary.filter(|primary| primary.active) else { return };
        let known = self.committed.entry(view.shard).or_default();
        if view.commit > *known && view.commit >= primary.barrier {
            *known = view.commit;
            self.check(view.shard, violations);
        }
    }

    fn check(&self, shard: ShardId, violations: &mut Vec<Violation>) {
        let Some(record) = self.newest.get(&shard).filter(|_| !self.tainted.contains(&shard))
        else {
            return;
        };
        let committed = self.committed.get(&shard).copied().unwrap_or_default();
        for &store in record.isr.iter().filter(|store| !record.tainted.contains(store)) {
            let Some(held) = self.held.get(&(store, shard)) else { continue };
            let is_sound = !held.suspect && !self.harmed.contains_key(&(store, shard));
            let end = held.end.unwrap_or_default();
            if is_sound && end < committed {
                let detail = format!(
                    "shard {shard}: {committed:?} is committed, {store:?} in {record:?}, the \
                     newest record in a log, has {end:?}"
                );
                violations.push(Violation { promise: PROMISE, detail });
            }
        }
    }
}
