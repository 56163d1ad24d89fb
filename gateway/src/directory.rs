//! The gateway's copy of the records in etcd, and the task that keeps it up to date.
//!
//! One task per process follows etcd; the workers, the node connections and the pages read the same
//! [`Directory`]. When etcd is unavailable, the directory stays as it is, and the gateway goes on
//! with the last shard map. The map is only a *hint*: each node itself decides whether it leads a
//! shard.

use std::collections::{BTreeMap, BTreeSet};

use engine::ids::{Boot, ShardId, StoreId};
use engine::records::{LossRecord, Meta, NodeRecord, StoreRecord};
use engine::shard_record::ShardRecord;
use metastore::{CoordinatorRecord, DrainIntent, Metastore};
use tokio::sync::watch;
use tracing::error;

use crate::readiness::GatewayReadiness;

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

/// Follows etcd until dropped. `on_shard` is called with each new shard record, in any order and
/// possibly more than once.
pub(crate) async fn follow(
    store: &Metastore,
    directory: &watch::Sender<Directory>,
    readiness: &GatewayReadiness,
    on_shard: impl Fn(&ShardRecord),
) {
    let mut meta = store.follow::<Meta>();
    let mut stores = store.follow::<StoreRecord>();
    let mut nodes = store.follow::<NodeRecord>();
    let mut shards = store.follow::<ShardRecord>();
    let mut coordinator = store.follow::<CoordinatorRecord>();
    let mut draining = store.follow::<DrainIntent>();
    let mut losses = store.follow::<LossRecord>();
    loop {
        let goes_on = tokio::select! {
            goes_on = meta.next() => {
                directory.send_modify(|all| all.meta = meta.only().cloned().or(all.meta.take()));
                goes_on
            }
            goes_on = stores.next() => {
                directory.send_modify(|all| all.stores = stores.records());
                goes_on
            }
            goes_on = nodes.next() => {
                directory.send_modify(|all| all.nodes = nodes.records());
                readiness.refresh();
                goes_on
            }
            goes_on = shards.next() => {
                // The changed records only: a failover in a large cluster changes thousands of
                // them, each in an event of its own.
                let changed = shards.take_changed().filter_map(|(_, kept)| kept);
                let changed: Vec<_> = changed.map(|kept| (kept.id, kept.record.clone())).collect();
                changed.iter().for_each(|(_, shard)| on_shard(shard));
                directory.send_modify(|all| all.shards.extend(changed));
                goes_on
            }
            goes_on = coordinator.next() => {
                let address = coordinator.only().map(|candidate| candidate.address.clone());
                directory.send_modify(|all| all.coordinator = address);
                goes_on
            }
            goes_on = draining.next() => {
                let stores = draining.all().map(|kept| kept.id).collect();
                directory.send_modify(|all| all.draining = stores);
                goes_on
            }
            goes_on = losses.next() => {
                let all_losses = losses.all().map(|kept| kept.record.clone()).collect();
                directory.send_modify(|all| all.losses = all_losses);
                goes_on
            }
        };
        if !goes_on {
            error!(
                "etcd is no longer followed, serving with the last shard map: restart this gateway"
            );
            readiness.waits_for(Some("etcd-went-back"));
            return std::future::pending().await;
        }
    }
}
