//! The gateway's copy of the records in etcd, which [`crate::etcd`] keeps up to date.
//!
//! The workers, the node connections and the pages read the same [`Directory`]. The map of shards
//! in it is only a *hint*: each node itself decides whether it leads a shard.

use std::collections::{BTreeMap, BTreeSet};

use engine::ids::{Boot, ShardId, StoreId};
use engine::records::{LossRecord, Meta, NodeRecord, StoreRecord};
use engine::shard_record::ShardRecord;

/// The newest known records of the cluster. The record of a store is kept when its node is gone,
/// for its name.
#[derive(Clone, Debug, Default)]
pub(crate) struct Directory {
    pub(crate) meta: Option<Meta>,
    pub(crate) stores: BTreeMap<StoreId, StoreRecord>,
    pub(crate) nodes: BTreeMap<StoreId, NodeRecord>,
    pub(crate) shards: BTreeMap<ShardId, ShardRecord>,
    /// The address of the leading coordinator.
    pub(crate) coordinator: Option<String>,
    /// The stores that an operator drains.
    pub(crate) draining: BTreeSet<StoreId>,
    /// The losses of data that were accepted so that a shard has a primary, by an operator or
    /// because all its copies were damaged.
    pub(crate) losses: Vec<LossRecord>,
}

/// The current process of a store, and its address.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct NodeEndpoint {
    pub(crate) cluster: u128,
    pub(crate) address: String,
    /// The boot of the process that listens there, as far as etcd knows.
    pub(crate) boot: Boot,
}

impl Directory {
    /// The stores to connect to: those that run, and those that lead a shard, whose key in etcd may
    /// have expired just now.
    pub(crate) fn reachable(&self) -> BTreeSet<StoreId> {
        let leading = self.shards.values().map(|shard| shard.primary.store);
        self.nodes.keys().copied().chain(leading).collect()
    }

    /// The endpoint of a store of [`Directory::reachable`]. `None` for any other store, or if no
    /// address is known.
    pub(crate) fn endpoint(&self, store: StoreId) -> Option<NodeEndpoint> {
        let cluster = self.meta.as_ref()?.cluster;
        if let Some(node) = self.nodes.get(&store) {
            return Some(NodeEndpoint { cluster, address: node.address.clone(), boot: node.boot });
        }
        let leads = self.shards.values().any(|shard| shard.primary.store == store);
        let record = self.stores.get(&store).filter(|_| leads)?;
        Some(NodeEndpoint { cluster, address: record.address.clone(), boot: record.boot })
    }

    /// The name of a store, for logs and pages. If several stores have one name, only the one that
    /// runs gets the plain name. The others get a part of their uuid, too: otherwise a store that
    /// is down would seem to be up.
    pub(crate) fn name(&self, store: StoreId) -> String {
        let Some(record) = self.stores.get(&store) else { return store.to_string() };
        let mut others = self.stores.iter().filter(|&(&other, candidate)| {
            let may_be_meant = !candidate.status.is_gone() || self.nodes.contains_key(&other);
            other != store && candidate.name == record.name && may_be_meant
        });
        match others.next() {
            Some(_) if !self.nodes.contains_key(&store) => {
                format!("{}@{}", record.name, &store.to_string()[..8])
            }
            _ => record.name.clone(),
        }
    }

    /// The stores that belong to the cluster: neither lost nor retired.
    pub(crate) fn members(&self) -> impl Iterator<Item = (StoreId, &StoreRecord)> {
        let is_member = |(_, record): &(&StoreId, &StoreRecord)| !record.status.is_gone();
        self.stores.iter().filter(is_member).map(|(&id, record)| (id, record))
    }

    /// The reason why no shard is placed yet, such as "2 of 3 nodes". `None` once shards are
    /// placed.
    pub(crate) fn waiting_for(&self) -> Option<String> {
        if !self.shards.is_empty() {
            return None;
        }
        let Some(meta) = &self.meta else {
            return Some("etcd, and a coordinator that makes the cluster".to_owned());
        };
        let (nodes, needed) = (self.nodes.len(), usize::from(meta.replicas));
        Some(match nodes < needed {
            true => format!("{nodes} of {needed} nodes"),
            false => "shards to be placed".to_owned(),
        })
    }
}
