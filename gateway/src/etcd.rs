//! The task that follows the records in etcd, one per process.
//!
//! When etcd is unavailable, the directory stays as it is, and the gateway goes on with the last
//! shard map.

use engine::records::{LossRecord, Meta, NodeRecord, StoreRecord};
use engine::shard_record::ShardRecord;
use metastore::{CoordinatorRecord, DrainIntent, Metastore};
use tokio::sync::watch;
use tracing::error;

use crate::directory::Directory;
use crate::readiness::GatewayReadiness;

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
