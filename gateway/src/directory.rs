//! The gateway's copy of the records in etcd, and the task that keeps it up to date.
//!
//! One task per process follows etcd; the workers, the node connections and the pages read the same
//! [`Directory`]. When etcd is unavailable, the directory stays as it is, and the gateway goes on
//! with the last shard map. The map is only a *hint*: each node itself decides whether it leads a
//! shard.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use engine::ids::{Boot, ShardId, StoreId};
use engine::records::{LossRecord, Meta, NodeRecord, StoreRecord};
use engine::shard_record::ShardRecord;
use metastore::{
    CoordinatorRecord, DrainIntent, EtcdRecord, Metastore, Watch, WatchEvent, WatchSettings,
};
use tokio::sync::watch;
use tracing::{error, info, warn};

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

/// Connects to etcd, and waits for it as long as necessary. Errors that waiting can't resolve are
/// returned: an etcd that is too old, or wrong settings.
pub(crate) async fn connect(
    settings: &metastore::Settings,
    readiness: &GatewayReadiness,
) -> Result<Metastore, metastore::Error> {
    let mut logged = false;
    loop {
        match Metastore::connect(settings).await {
            Ok(store) => return Ok(store),
            Err(error) if error.is_transient() => {
                readiness.waits_for(Some("etcd"));
                if !std::mem::replace(&mut logged, true) {
                    warn!(%error, "waiting for etcd, which can't be reached");
                }
            }
            Err(error) => return Err(error),
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// Waits until a coordinator has created the cluster.
pub(crate) async fn meta(
    store: &Metastore,
    readiness: &GatewayReadiness,
) -> Result<Meta, metastore::Error> {
    let mut logged = false;
    loop {
        match store.get::<Meta>(&()).await {
            Ok(Some(kept)) => return Ok(kept.record),
            Ok(None) => {
                readiness.waits_for(Some("meta"));
                if !std::mem::replace(&mut logged, true) {
                    info!("waiting for a coordinator to create the cluster");
                }
            }
            // The record is from a newer build: waiting does not help.
            Err(error) if !error.is_transient() => return Err(error),
            Err(error) => {
                readiness.waits_for(Some("etcd"));
                warn!(%error, "could not read the cluster's meta record");
            }
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
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
    let settings = WatchSettings::default;
    let mut meta = WatchedRecords::new(store.watch::<Meta>(settings()));
    let mut stores = WatchedRecords::new(store.watch::<StoreRecord>(settings()));
    let mut nodes = WatchedRecords::new(store.watch::<NodeRecord>(settings()));
    let mut shards = WatchedRecords::new(store.watch::<ShardRecord>(settings()));
    let mut coordinator = WatchedRecords::new(store.watch::<CoordinatorRecord>(settings()));
    let mut draining = WatchedRecords::new(store.watch::<DrainIntent>(settings()));
    let mut losses = WatchedRecords::new(store.watch::<LossRecord>(settings()));
    loop {
        let goes_on = tokio::select! {
            goes_on = meta.next() => {
                directory.send_modify(|all| all.meta = meta.only().or(all.meta.take()));
                goes_on
            }
            goes_on = stores.next() => {
                directory.send_modify(|all| all.stores.clone_from(&stores.all));
                goes_on
            }
            goes_on = nodes.next() => {
                directory.send_modify(|all| all.nodes.clone_from(&nodes.all));
                readiness.refresh();
                goes_on
            }
            goes_on = shards.next() => {
                // The changed records only: a failover in a large cluster changes thousands of
                // them, each in an event of its own.
                let changed = std::mem::take(&mut shards.changed);
                let changed: Vec<_> = changed.iter().filter_map(|id| shards.all.get(id)).collect();
                changed.iter().for_each(|shard| on_shard(shard));
                let changed = changed.into_iter().map(|shard| (shard.shard(), shard.clone()));
                directory.send_modify(|all| all.shards.extend(changed));
                goes_on
            }
            goes_on = coordinator.next() => {
                let address = coordinator.only().map(|candidate| candidate.address);
                directory.send_modify(|all| all.coordinator = address);
                goes_on
            }
            goes_on = draining.next() => {
                let stores = draining.all.keys().copied().collect();
                directory.send_modify(|all| all.draining = stores);
                goes_on
            }
            goes_on = losses.next() => {
                let all_losses = losses.all.values().cloned().collect();
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

/// All records of one kind, kept up to date by a watch.
struct WatchedRecords<R: EtcdRecord> {
    watch: Watch<R>,
    all: BTreeMap<R::Id, R>,
    /// The ids of the records that changed since they were last taken.
    changed: BTreeSet<R::Id>,
}

impl<R: EtcdRecord> WatchedRecords<R> {
    fn new(watch: Watch<R>) -> Self {
        Self { watch, all: BTreeMap::new(), changed: BTreeSet::new() }
    }

    /// Applies the next change. Returns false if etcd's history went back: such an etcd must not be
    /// followed.
    async fn next(&mut self) -> bool {
        match self.watch.next().await {
            Some(WatchEvent::All(listed)) => {
                self.all = listed.all.into_iter().map(|kept| (kept.id, kept.record)).collect();
                self.changed.extend(self.all.keys().cloned());
            }
            Some(WatchEvent::Changed(kept)) => {
                self.changed.insert(kept.id.clone());
                self.all.insert(kept.id, kept.record);
            }
            Some(WatchEvent::Deleted { id, .. }) => {
                self.all.remove(&id);
            }
            Some(WatchEvent::WentBack { was, now }) => {
                error!(folder = R::FOLDER, was, now, "etcd's history went back");
                return false;
            }
            None => return false,
        }
        true
    }

    /// The record of a kind that has only one.
    fn only(&self) -> Option<R> {
        self.all.values().next().cloned()
    }
}
