//! What the driver itself remembers of etcd's records: how to reach a node, what people call it, which cluster this is.
//!
//! Nothing is decided by it. An address that is out of date leads to a probe that nobody answers.

use std::collections::BTreeMap;

use engine::coordinator::{Change, Event, Kept, Listing};
use engine::ids::StoreId;
use engine::records::{Meta, NodeRecord, StoreRecord};

#[derive(Debug, Default)]
pub(crate) struct Book {
    pub(crate) meta: Option<Meta>,
    stores: BTreeMap<StoreId, Kept<StoreRecord>>,
    nodes: BTreeMap<StoreId, Kept<NodeRecord>>,
}

impl Book {
    /// Takes down what an event says, before the machine hears of it.
    pub(crate) fn note(&mut self, event: &Event) {
        match event {
            Event::Listed { listing: Some(listing), .. } => self.replace(listing),
            Event::Changed { change, .. } => self.change(change),
            _ => {}
        }
    }

    fn replace(&mut self, listing: &Listing) {
        self.meta = listing.meta.as_ref().map(|kept| kept.value.clone());
        self.stores = listing.stores.iter().cloned().collect();
        self.nodes = listing.nodes.iter().cloned().collect();
    }

    fn change(&mut self, change: &Change) {
        match change {
            Change::Meta(kept) => self.meta = Some(kept.value.clone()),
            Change::Store(store, Some(kept)) => {
                self.stores.insert(*store, kept.clone());
            }
            // A node whose lease ran out is still asked where it was last.
            Change::Node(store, Some(kept)) => {
                self.nodes.insert(*store, kept.clone());
            }
            Change::Store(_, None)
            | Change::Name(..)
            | Change::Node(_, None)
            | Change::Shard(..)
            | Change::Drain(..)
            | Change::Promote(..) => {}
        }
    }

    /// Where the process listens that was registered last for this store.
    pub(crate) fn address(&self, store: StoreId) -> Option<&str> {
        let node =
            self.nodes.get(&store).map(|kept| (kept.value.boot, kept.value.address.as_str()));
        let stored = self.stores.get(&store);
        let stored = stored.map(|kept| (kept.value.boot, kept.value.address.as_str()));
        // Of the same boot the node's own key is as good; of two the newer process is asked.
        node.max(stored).map(|(_, address)| address).filter(|address| !address.is_empty())
    }

    /// What people call a store.
    pub(crate) fn name(&self, store: StoreId) -> String {
        self.stores.get(&store).map_or_else(|| store.to_string(), |kept| kept.value.name.clone())
    }
}

#[cfg(test)]
mod tests {
    use engine::ids::Boot;
    use engine::records::StoreStatus;

    use super::*;

    const STORE: StoreId = StoreId(1);

    fn kept<V>(value: V) -> Kept<V> {
        Kept { value, created: 1, modified: 1 }
    }

    fn store(boot: u64, address: &str) -> Kept<StoreRecord> {
        kept(StoreRecord {
            name: "node-1".into(),
            address: address.into(),
            zone: String::new(),
            host: String::new(),
            boot: Boot(boot),
            nonce: 0,
            status: StoreStatus::Active,
        })
    }

    fn node(boot: u64, address: &str) -> Kept<NodeRecord> {
        kept(NodeRecord {
            boot: Boot(boot),
            address: address.into(),
            capacity: 0,
            versions: (1, 1),
        })
    }

    fn changed(change: Change) -> Event {
        Event::Changed { revision: 1, change }
    }

    #[test]
    fn the_process_registered_last_is_dialled_also_when_its_lease_is_gone() {
        let mut book = Book::default();
        assert_eq!((book.address(STORE), book.name(STORE)), (None, STORE.to_string()));
        book.note(&changed(Change::Store(STORE, Some(store(1, "a:1")))));
        book.note(&changed(Change::Node(STORE, Some(node(1, "a:1")))));
        book.note(&changed(Change::Node(STORE, None)));
        assert_eq!((book.address(STORE), book.name(STORE)), (Some("a:1"), "node-1".to_owned()));
        book.note(&changed(Change::Store(STORE, Some(store(2, "b:2")))));
        assert_eq!(book.address(STORE), Some("b:2"));
        let listing = Listing { nodes: vec![(STORE, node(3, "c:3"))], ..Listing::default() };
        book.note(&Event::Listed { list: 1, listing: Some(listing) });
        assert_eq!((book.address(STORE), book.name(STORE)), (Some("c:3"), STORE.to_string()));
    }
}
