//! The shards of a node: a replica of each, the newest record of each, and what is still to do for
//! them in this turn.

use std::collections::BTreeMap;

use crate::etcd_memory::EtcdMemory;
use crate::ids::{Epoch, ShardId, Slots, StoreBoot, StoreId};
use crate::message::Refusal;
use crate::node::shared::ShardSet;
use crate::replica::primary::{Follower, Primary};
use crate::replica::{Replica, ReplicaRole};
use crate::shard_record::ShardRecord;

#[derive(Clone, Debug, Default)]
pub(in crate::node) struct Shards {
    /// Replicas and records are boxed, so that a search touches few cache lines.
    replicas: BTreeMap<ShardId, Box<Replica>>,
    /// The newest record of each shard that was seen, and its mod_revision.
    pub records: BTreeMap<ShardId, Box<(ShardRecord, u64)>>,
    /// The store's memory of etcd; `None` only in tests without a recovery of etcd.
    pub etcd: Option<Box<EtcdMemory>>,
    /// Once the store has promised an incarnation above the one that this process follows: the
    /// group of the log that makes the promise durable. From then on this process follows no etcd.
    pub fence: Option<u64>,
    /// Shards that this node leads by a record that is not durable in its log yet.
    pub recording: ShardSet,
    /// Shards whose commit may have moved.
    pub to_advance: ShardSet,
    /// Shards whose in-sync set may have to change.
    pub to_review: ShardSet,
    /// Followers for which there is something to send.
    pub to_send: BTreeMap<StoreId, ShardSet>,
    /// The coordinator is to get a report in this turn, however short ago the last one was.
    pub to_report: bool,
}

impl Shards {
    /// Creates the shards of a node at its start.
    pub(in crate::node) fn new(replicas: impl Iterator<Item = Replica>) -> Self {
        let replicas = replicas.map(|replica| (replica.shard, Box::new(replica))).collect();
        Self { replicas, ..Self::default() }
    }

    pub(in crate::node) fn get(&self, shard: ShardId) -> Option<&Replica> {
        self.replicas.get(&shard).map(Box::as_ref)
    }

    pub(in crate::node) fn get_mut(&mut self, shard: ShardId) -> Option<&mut Replica> {
        self.replicas.get_mut(&shard).map(Box::as_mut)
    }

    /// Returns the replica of the shard; without one, `empty` makes it.
    pub(in crate::node) fn get_or_insert(
        &mut self,
        shard: ShardId,
        empty: impl FnOnce() -> Replica,
    ) -> &mut Replica {
        self.replicas.entry(shard).or_insert_with(|| Box::new(empty()))
    }

    /// Returns all replicas, by shard.
    pub(in crate::node) fn iter(&self) -> impl Iterator<Item = &Replica> {
        self.replicas.values().map(Box::as_ref)
    }

    pub(in crate::node) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Replica> {
        self.replicas.values_mut().map(Box::as_mut)
    }

    /// Returns the state of the shard's primary, if this node leads it.
    pub(in crate::node) fn primary(&self, shard: ShardId) -> Option<&Primary> {
        self.get(shard)?.primary()
    }

    pub(in crate::node) fn primary_mut(&mut self, shard: ShardId) -> Option<&mut Primary> {
        self.get_mut(shard)?.primary_mut()
    }

    /// Returns the shards that this node leads, each with its state as the primary.
    pub(in crate::node) fn led(&self) -> impl Iterator<Item = (&Replica, &Primary)> {
        self.iter().filter_map(|replica| Some((replica, replica.primary()?)))
    }

    /// Returns the state of a follower of a shard that this node leads.
    pub(in crate::node) fn follower_mut(
        &mut self,
        store: StoreId,
        shard: ShardId,
    ) -> Option<&mut Follower> {
        self.primary_mut(shard)?.followers.get_mut(&store)
    }

    /// Returns the epoch in which this node leads the shard.
    pub(in crate::node) fn epoch_led(&self, shard: ShardId) -> Option<Epoch> {
        Some(self.primary(shard)?.epoch)
    }

    /// Returns whether this node leads the shard, in this very epoch.
    pub(in crate::node) fn leads(&self, shard: ShardId, epoch: Epoch) -> bool {
        self.epoch_led(shard) == Some(epoch)
    }

    /// Returns whether the store is in the in-sync set, in the newest record that was seen.
    pub(in crate::node) fn is_in_sync(&self, shard: ShardId, store: StoreId) -> bool {
        let record = self.records.get(&shard);
        record.is_some_and(|record| record.0.isr.contains(&store))
    }

    /// Returns whether rows of these slots on this store belong to another shard.
    pub(in crate::node) fn is_occupied(&self, shard: ShardId, slots: Slots) -> bool {
        self.iter().any(|replica| replica.shard != shard && replica.occupies(slots))
    }

    /// Returns the process that leads the shard, in the newest record that was seen.
    pub(in crate::node) fn recorded_primary(&self, shard: ShardId) -> Option<StoreBoot> {
        Some(self.records.get(&shard)?.0.primary)
    }

    /// Returns a refusal with the shard's record, so that the gateway finds the primary; `None` if
    /// this node has no record.
    pub(in crate::node) fn redirect(&self, shard: ShardId) -> Option<Refusal> {
        let record = self.records.get(&shard)?.0.clone();
        Some(Refusal::NotPrimary(Some(Box::new(record))))
    }

    /// Marks every follower of a shard that this node leads: there is something to send.
    pub(in crate::node) fn mark_followers(&mut self, shard: ShardId) {
        let Some(primary) = self.replicas.get(&shard).and_then(|replica| replica.primary()) else {
            return;
        };
        for &store in primary.followers.keys() {
            self.to_send.entry(store).or_default().insert(shard);
        }
    }

    /// Marks the shard: there is something to send to this follower.
    pub(in crate::node) fn mark_follower(&mut self, store: StoreId, shard: ShardId) {
        self.to_send.entry(store).or_default().insert(shard);
    }

    /// Marks the shards that this node leads for a review of their in-sync sets.
    pub(in crate::node) fn review_led(&mut self) {
        let led = self.replicas.values().filter(|replica| replica.primary().is_some());
        self.to_review.extend(led.map(|replica| replica.shard));
    }

    /// Steps down if this node leads the shard in an epoch below `epoch`. Returns whether it did.
    pub(in crate::node) fn step_down_below(&mut self, shard: ShardId, epoch: Epoch) -> bool {
        let Some(replica) = self.replicas.get_mut(&shard) else { return false };
        let deposed = replica.primary().is_some_and(|primary| primary.epoch < epoch);
        if deposed {
            replica.role = ReplicaRole::Follower;
            self.to_advance.insert(shard);
        }
        deposed
    }
}
