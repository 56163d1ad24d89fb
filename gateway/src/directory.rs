//! What etcd says of the cluster, as this process knows it, and where that comes from.
//!
//! One task per process follows etcd; the workers, the links and the pages look at the same [`Directory`]. When etcd is
//! away it stays as it was: the last map is served. It only ever *hints*: whether a node leads a shard is for the node
//! to say.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use engine::config::ShardConfig;
use engine::ids::{Boot, ShardId, StoreId};
use engine::records::{LossRecord, Meta, NodeRecord, StoreRecord};
use metastore::{Candidate, DrainIntent, Metastore, Record, Watch, WatchEvent, WatchSettings};
use tokio::sync::watch;
use tracing::{error, info, warn};

use crate::readiness::Readiness;

/// Everything known. Records of stores are kept although their node is gone: people know them by name.
#[derive(Clone, Debug, Default)]
pub(crate) struct Directory {
    pub(crate) meta: Option<Meta>,
    pub(crate) stores: BTreeMap<StoreId, StoreRecord>,
    pub(crate) nodes: BTreeMap<StoreId, NodeRecord>,
    pub(crate) shards: BTreeMap<ShardId, ShardConfig>,
    /// Where the leading coordinator listens.
    pub(crate) coordinator: Option<String>,
    /// Stores that an operator wants emptied.
    pub(crate) draining: BTreeSet<StoreId>,
    /// What was given up to have a shard led, by an operator or since all its copies were damaged.
    pub(crate) losses: Vec<LossRecord>,
}

/// Where to find a store now.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Target {
    pub(crate) cluster: u128,
    pub(crate) address: String,
    /// Which run of the store listens there, as far as etcd knows.
    pub(crate) boot: Boot,
}

impl Directory {
    /// Stores worth a connection: those that run, and those that lead something, whose key may just be gone.
    pub(crate) fn reachable(&self) -> BTreeSet<StoreId> {
        let leading = self.shards.values().map(|shard| shard.primary.store);
        self.nodes.keys().copied().chain(leading).collect()
    }

    /// Where a store of [`Directory::reachable`] listens. None: it is none of them, or nobody knows.
    pub(crate) fn target(&self, store: StoreId) -> Option<Target> {
        let cluster = self.meta.as_ref()?.cluster;
        if let Some(node) = self.nodes.get(&store) {
            return Some(Target { cluster, address: node.address.clone(), boot: node.boot });
        }
        let leads = self.shards.values().any(|shard| shard.primary.store == store);
        let kept = self.stores.get(&store).filter(|_| leads)?;
        Some(Target { cluster, address: kept.address.clone(), boot: kept.boot })
    }

    /// What people call a store. Of several with one name, the one that runs has it alone: the others bear their uuid,
    /// lest one that is away seem to be up.
    pub(crate) fn name(&self, store: StoreId) -> String {
        let Some(kept) = self.stores.get(&store) else { return store.to_string() };
        let mut others = self.stores.iter().filter(|&(&other, record)| {
            let may_be_meant = !record.status.is_gone() || self.nodes.contains_key(&other);
            other != store && record.name == kept.name && may_be_meant
        });
        match others.next() {
            Some(_) if !self.nodes.contains_key(&store) => {
                format!("{}@{}", kept.name, &store.to_string()[..8])
            }
            _ => kept.name.clone(),
        }
    }

    /// Stores that belong to the cluster: neither lost nor retired.
    pub(crate) fn members(&self) -> impl Iterator<Item = (StoreId, &StoreRecord)> {
        let stands = |(_, kept): &(&StoreId, &StoreRecord)| !kept.status.is_gone();
        self.stores.iter().filter(stands).map(|(&id, kept)| (id, kept))
    }

    /// Why no shard is placed yet, if that is so: "2 of 3 nodes".
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

/// Connects, however long etcd is away. An etcd that is too old, or not asked for rightly, is no use waiting for.
pub(crate) async fn connect(
    settings: &metastore::Settings,
    readiness: &Readiness,
) -> Result<Metastore, metastore::Error> {
    let mut told = false;
    loop {
        match Metastore::connect(settings).await {
            Ok(store) => return Ok(store),
            Err(error) if error.is_transient() => {
                readiness.waits_for(Some("etcd"));
                if !std::mem::replace(&mut told, true) {
                    warn!(%error, "etcd can't be reached, waiting for it");
                }
            }
            Err(error) => return Err(error),
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// Waits until a coordinator has made the cluster.
pub(crate) async fn meta(
    store: &Metastore,
    readiness: &Readiness,
) -> Result<Meta, metastore::Error> {
    let mut told = false;
    loop {
        match store.get::<Meta>(&()).await {
            Ok(Some(kept)) => return Ok(kept.record),
            Ok(None) => {
                readiness.waits_for(Some("meta"));
                if !std::mem::replace(&mut told, true) {
                    info!("no cluster yet, waiting for a coordinator to make it");
                }
            }
            // Of a newer build: waiting does not help.
            Err(error) if !error.is_transient() => return Err(error),
            Err(error) => {
                readiness.waits_for(Some("etcd"));
                warn!(%error, "meta can't be read");
            }
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Follows etcd until dropped. `learn` is told of each shard record, in any order and more than once.
pub(crate) async fn follow(
    store: &Metastore,
    directory: &watch::Sender<Directory>,
    readiness: &Readiness,
    learn: impl Fn(&ShardConfig),
) {
    let settings = WatchSettings::default;
    let mut meta = Followed::new(store.watch::<Meta>(settings()));
    let mut stores = Followed::new(store.watch::<StoreRecord>(settings()));
    let mut nodes = Followed::new(store.watch::<NodeRecord>(settings()));
    let mut shards = Followed::new(store.watch::<ShardConfig>(settings()));
    let mut coordinator = Followed::new(store.watch::<Candidate>(settings()));
    let mut draining = Followed::new(store.watch::<DrainIntent>(settings()));
    let mut losses = Followed::new(store.watch::<LossRecord>(settings()));
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
                // One by one: a large cluster's failover changes thousands of them, each in an event of its own.
                let changed = std::mem::take(&mut shards.changed);
                let changed: Vec<_> = changed.iter().filter_map(|id| shards.all.get(id)).collect();
                changed.iter().for_each(|shard| learn(shard));
                directory.send_modify(|all| {
                    all.shards.extend(changed.into_iter().map(|shard| (shard.shard(), shard.clone())));
                });
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
            error!("serving the last map, following etcd no more: start this gateway again");
            readiness.waits_for(Some("etcd-went-back"));
            return std::future::pending().await;
        }
    }
}

/// Everything of one kind, kept up to date by its watch.
struct Followed<R: Record> {
    watch: Watch<R>,
    all: BTreeMap<R::Id, R>,
    /// What has been heard of since last taken.
    changed: BTreeSet<R::Id>,
}

impl<R: Record> Followed<R> {
    fn new(watch: Watch<R>) -> Self {
        Self { watch, all: BTreeMap::new(), changed: BTreeSet::new() }
    }

    /// Takes in the next change. False: etcd's history went back, and nobody may follow it.
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

    /// The one record of a kind that has only one.
    fn only(&self) -> Option<R> {
        self.all.values().next().cloned()
    }
}
