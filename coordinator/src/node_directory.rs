//! The names and addresses of nodes, and the settings of the cluster, from etcd's records.
//!
//! No decision depends on this directory. An outdated address leads to a probe without an answer.

use std::collections::BTreeMap;

use engine::coordinator::{AtRevision, Event, Listing, RecordChange};
use engine::ids::StoreId;
use engine::records::{Meta, NodeRecord, StoreRecord};

/// The records of stores and nodes that were seen last.
#[derive(Debug, Default)]
pub(crate) struct NodeDirectory {
    /// The settings of the cluster, once they are known.
    pub(crate) meta: Option<Meta>,
    stores: BTreeMap<StoreId, AtRevision<StoreRecord>>,
    nodes: BTreeMap<StoreId, AtRevision<NodeRecord>>,
}

impl NodeDirectory {
    /// Updates the directory by an event, before the state machine handles it.
    pub(crate) fn update(&mut self, event: &Event) {
        match event {
            Event::Listed { listing: Some(listing), .. } => self.replace(listing),
            Event::Changed { change, .. } => self.change(change),
            _ => {}
        }
    }

    fn replace(&mut self, listing: &Listing) {
        self.meta = listing.meta.as_ref().map(|record| record.value.clone());
        self.stores = listing.stores.iter().cloned().collect();
        self.nodes = listing.nodes.iter().cloned().collect();
    }

    fn change(&mut self, change: &RecordChange) {
        match change {
            RecordChange::Meta(record) => self.meta = Some(record.value.clone()),
            RecordChange::Store(store, Some(record)) => {
                self.stores.insert(*store, record.clone());
            }
            // A node whose lease expired is still probed at its last address.
            RecordChange::Node(store, Some(record)) => {
                self.nodes.insert(*store, record.clone());
            }
            RecordChange::Store(_, None)
            | RecordChange::Name(..)
            | RecordChange::Node(_, None)
            | RecordChange::Shard(..)
            | RecordChange::Drain(..)
            | RecordChange::Promote(..)
            | RecordChange::Remove(..)
            | RecordChange::Pause(..) => {}
        }
    }

    /// Returns the address of the process that registered last for this store.
    pub(crate) fn address(&self, store: StoreId) -> Option<&str> {
        let node =
            self.nodes.get(&store).map(|record| (record.value.boot, record.value.address.as_str()));
        let stored = self.stores.get(&store);
        let stored = stored.map(|record| (record.value.boot, record.value.address.as_str()));
        // Both records of one boot have the same address; of two boots, the newer one is used.
        node.max(stored).map(|(_, address)| address).filter(|address| !address.is_empty())
    }

    /// Returns the name of a store, or its id if its record is not known.
    pub(crate) fn name(&self, store: StoreId) -> String {
        self.stores
            .get(&store)
            .map_or_else(|| store.to_string(), |record| record.value.name.clone())
    }
}

#[cfg(test)]
mod tests {
    use engine::ids::Boot;
    use engine::records::StoreStatus;

    use super::*;

    const STORE: StoreId = StoreId(1);

    fn at_revision<V>(value: V) -> AtRevision<V> {
        AtRevision { value, created: 1, modified: 1 }
    }

    fn store(boot: u64, address: &str) -> AtRevision<StoreRecord> {
        at_revision(StoreRecord {
            name: "node-1".into(),
            address: address.into(),
            zone: String::new(),
            host: String::new(),
            boot: Boot(boot),
            nonce: 0,
            status: StoreStatus::Active,
        })
    }

    fn node(boot: u64, address: &str) -> AtRevision<NodeRecord> {
        at_revision(NodeRecord {
            boot: Boot(boot),
            address: address.into(),
            capacity: 0,
            versions: (1, 1),
        })
    }

    fn changed(change: RecordChange) -> Event {
        Event::Changed { revision: 1, change }
    }

    #[test]
    fn the_process_registered_last_is_dialled_also_when_its_lease_is_gone() {
        let mut directory = NodeDirectory::default();
        assert_eq!((directory.address(STORE), directory.name(STORE)), (None, STORE.to_string()));
        directory.update(&changed(RecordChange::Store(STORE, Some(store(1, "a:1")))));
        directory.update(&changed(RecordChange::Node(STORE, Some(node(1, "a:1")))));
        directory.update(&changed(RecordChange::Node(STORE, None)));
        assert_eq!(
            (directory.address(STORE), directory.name(STORE)),
            (Some("a:1"), "node-1".to_owned())
        );
        directory.update(&changed(RecordChange::Store(STORE, Some(store(2, "b:2")))));
        assert_eq!(directory.address(STORE), Some("b:2"));
        let listing = Listing { nodes: vec![(STORE, node(3, "c:3"))], ..Listing::default() };
        directory.update(&Event::Listed { list: 1, listing: Some(listing) });
        assert_eq!(
            (directory.address(STORE), directory.name(STORE)),
            (Some("c:3"), STORE.to_string())
        );
    }
}
