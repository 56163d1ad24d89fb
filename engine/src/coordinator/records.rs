//! The state of etcd, assembled from lists and changes that may come in any order.
//!
//! A revision decides which of two states of a key is newer. A deletion is remembered with its
//! revision until a list at least as new has confirmed it, so that an older list does not bring the
//! key back.

use std::collections::BTreeMap;

use crate::coordinator::{AtRevision, Listing, RecordChange};
use crate::ids::{Boot, ShardId, StoreId};
use crate::records::{
    Meta, NameRecord, NodeRecord, PauseIntent, PromoteIntent, RemoveIntent, StoreRecord,
};
use crate::shard_record::ShardRecord;

/// All records of one kind.
#[derive(Debug)]
pub(super) struct RecordTable<K, V> {
    /// The values that exist.
    kept: BTreeMap<K, AtRevision<V>>,
    /// The revisions of deletions that no list has confirmed yet.
    gone: BTreeMap<K, u64>,
}

impl<K, V> Default for RecordTable<K, V> {
    fn default() -> Self {
        Self { kept: BTreeMap::new(), gone: BTreeMap::new() }
    }
}

impl<K: Ord + Copy, V> RecordTable<K, V> {
    pub(super) fn get(&self, key: K) -> Option<&AtRevision<V>> {
        self.kept.get(&key)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (K, &AtRevision<V>)> {
        self.kept.iter().map(|(&key, kept)| (key, kept))
    }

    /// The mod_revision of the key, 0 if it does not exist.
    pub(super) fn modified(&self, key: K) -> u64 {
        self.get(key).map_or(0, |kept| kept.modified)
    }
}

impl<V> RecordTable<String, V> {
    pub(super) fn named(&self, name: &str) -> Option<&AtRevision<V>> {
        self.kept.get(name)
    }
}

impl<K: Ord + Clone, V> RecordTable<K, V> {
    pub(super) fn len(&self) -> usize {
        self.kept.len()
    }

    /// Takes a key's state. Returns whether it is newer than the known one.
    pub(super) fn set(&mut self, key: K, kept: AtRevision<V>) -> bool {
        let known = self.kept.get(&key).map_or(0, |known| known.modified);
        let gone = self.gone.get(&key).copied().unwrap_or(0);
        if kept.modified <= known.max(gone) {
            return false;
        }
        self.gone.remove(&key);
        self.kept.insert(key, kept);
        true
    }

    /// Takes a deletion. Returns whether it removed a value.
    pub(super) fn delete(&mut self, key: K, revision: u64) -> bool {
        let stands = self.kept.get(&key).is_some_and(|known| known.modified > revision);
        if stands {
            return false;
        }
        let was_here = self.kept.remove(&key).is_some();
        let gone = self.gone.entry(key).or_default();
        *gone = revision.max(*gone);
        was_here
    }

    fn changed(&mut self, revision: u64, key: K, kept: Option<AtRevision<V>>) -> bool {
        match kept {
            Some(kept) => self.set(key, kept),
            None => self.delete(key, revision),
        }
    }

    /// Takes a list: all values that existed at this revision.
    fn listed(&mut self, revision: u64, all: Vec<(K, AtRevision<V>)>) {
        let listed: Vec<K> = all.iter().map(|(key, _)| key.clone()).collect();
        for (key, kept) in all {
            self.set(key, kept);
        }
        self.kept.retain(|key, kept| kept.modified > revision || listed.contains(key));
        self.gone.retain(|_, gone| *gone > revision);
    }
}

/// All records of the cluster, as far as they are known.
#[derive(Debug, Default)]
pub(super) struct ClusterRecords {
    pub(super) meta: Option<AtRevision<Meta>>,
    pub(super) stores: RecordTable<StoreId, StoreRecord>,
    /// The store that owns each name.
    pub(super) names: RecordTable<String, NameRecord>,
    pub(super) nodes: RecordTable<StoreId, NodeRecord>,
    pub(super) shards: RecordTable<ShardId, ShardRecord>,
    /// Stores that operators want emptied.
    pub(super) drains: RecordTable<StoreId, ()>,
    /// Shards that operators want led, whatever is lost.
    pub(super) promotes: RecordTable<ShardId, PromoteIntent>,
    /// Stores that operators want out of the cluster.
    pub(super) removes: RecordTable<StoreId, RemoveIntent>,
    /// The intent of an operator who wants no moves for balance alone.
    pub(super) pause: RecordTable<(), PauseIntent>,
}

impl ClusterRecords {
    pub(super) fn listed(&mut self, listing: Listing) {
        let shards = listing.shards.into_iter().map(|kept| (kept.value.shard(), kept)).collect();
        if let Some(meta) = listing.meta {
            self.set_meta(meta);
        }
        self.stores.listed(listing.revision, listing.stores);
        self.names.listed(listing.revision, listing.names);
        self.nodes.listed(listing.revision, listing.nodes);
        self.shards.listed(listing.revision, shards);
        self.drains.listed(listing.revision, listing.drains);
        self.promotes.listed(listing.revision, listing.promotes);
        self.removes.listed(listing.revision, listing.removes);
        let pause = listing.pause.into_iter().map(|kept| ((), kept));
        self.pause.listed(listing.revision, pause.collect());
    }

    /// Takes one change. Returns whether it is new.
    pub(super) fn changed(&mut self, revision: u64, change: RecordChange) -> bool {
        match change {
            RecordChange::Meta(kept) => self.set_meta(kept),
            RecordChange::Store(id, kept) => self.stores.changed(revision, id, kept),
            RecordChange::Name(name, kept) => self.names.changed(revision, name, kept),
            RecordChange::Node(id, kept) => self.nodes.changed(revision, id, kept),
            RecordChange::Shard(id, kept) => self.shards.changed(revision, id, kept),
            RecordChange::Drain(id, kept) => self.drains.changed(revision, id, kept),
            RecordChange::Promote(id, kept) => self.promotes.changed(revision, id, kept),
            RecordChange::Remove(id, kept) => self.removes.changed(revision, id, kept),
            RecordChange::Pause(kept) => self.pause.changed(revision, (), kept),
        }
    }

    fn set_meta(&mut self, kept: AtRevision<Meta>) -> bool {
        let is_new = self.meta.as_ref().is_none_or(|known| known.modified < kept.modified);
        if is_new {
            self.meta = Some(kept);
        }
        is_new
    }

    /// The newest known process of a store, unless the store is gone for good.
    pub(super) fn newest_boot(&self, store: StoreId) -> Option<Boot> {
        let record = self.stores.get(store)?;
        let running = self.nodes.get(store).map_or(Boot(0), |node| node.value.boot);
        let is_gone = record.value.status.is_gone();
        (!is_gone).then_some(record.value.boot.max(running))
    }

    /// The other store that owns this one's name, if there is one.
    pub(super) fn namesake(&self, store: StoreId) -> Option<StoreId> {
        let name = &self.stores.get(store)?.value.name;
        let holder = self.names.named(name)?.value.store;
        let goes_by_it = self.stores.get(holder).is_some_and(|kept| kept.value.name == *name);
        (holder != store && goes_by_it).then_some(holder)
    }

    /// Returns whether the lease of the store's newest process lives.
    pub(super) fn is_registered(&self, store: StoreId) -> bool {
        let node = self.nodes.get(store).map(|node| node.value.boot);
        node.is_some() && node == self.newest_boot(store)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept(modified: u64) -> AtRevision<u64> {
        AtRevision { value: modified, created: 1, modified }
    }

    #[track_caller]
    fn check(act: impl Fn(&mut RecordTable<u8, u64>), want: Option<u64>) {
        let mut table = RecordTable::default();
        act(&mut table);
        assert_eq!(table.get(1).map(|kept| kept.value), want);
    }

    #[test]
    fn the_newest_stands_in_whatever_order_it_came() {
        check(|table| assert!(table.set(1, kept(5)) && !table.set(1, kept(4))), Some(5));
        check(|table| assert!(table.set(1, kept(5)) && table.set(1, kept(6))), Some(6));
        check(|table| assert!(table.set(1, kept(5)) && !table.delete(1, 4)), Some(5));
        check(|table| assert!(table.set(1, kept(5)) && table.delete(1, 6)), None);
    }

    #[test]
    fn an_older_list_brings_nothing_back_and_takes_nothing_away() {
        let deleted_first = |table: &mut RecordTable<u8, u64>| {
            table.delete(1, 6);
            table.listed(5, vec![(1, kept(5))]);
        };
        check(deleted_first, None);
        let made_first = |table: &mut RecordTable<u8, u64>| {
            table.set(1, kept(6));
            table.listed(5, vec![]);
        };
        check(made_first, Some(6));
    }

    #[test]
    fn a_list_takes_away_what_it_does_not_name() {
        let gone = |table: &mut RecordTable<u8, u64>| {
            table.set(1, kept(5));
            table.listed(7, vec![]);
        };
        check(gone, None);
        let back = |table: &mut RecordTable<u8, u64>| {
            table.delete(1, 6);
            table.listed(9, vec![(1, kept(8))]);
        };
        check(back, Some(8));
    }
}
