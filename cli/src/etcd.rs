//! The etcd of the commands that access it directly.

use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Context;
use engine::ids::TimeMs;
use engine::records::{Meta, Operator, StoreRecord};
use metastore::{Metastore, Revisioned};
use process::ClusterOptions;

/// Connects to the etcd that a command works on; an error names its members.
pub(crate) async fn connect(options: &ClusterOptions<true>) -> anyhow::Result<Metastore> {
    let connected = Metastore::connect(&options.settings()).await;
    connected.with_context(|| format!("--etcd {}", options.etcd.join(",")))
}

/// Returns the settings of the cluster that a command works on.
pub(crate) async fn cluster(
    metastore: &Metastore,
    options: &ClusterOptions<true>,
) -> anyhow::Result<Meta> {
    let meta = metastore.get::<Meta>(&()).await?;
    meta.map(|kept| kept.record).with_context(|| format!("no cluster {:?}", options.cluster))
}

/// Returns whether `node`, as an operator gave it, denotes this store: the store is not gone, and
/// `node` is its name or its uuid. A name may denote several stores while shards still need a store
/// that was replaced.
pub(crate) fn is_denoted_by(kept: &Revisioned<StoreRecord>, node: &str) -> bool {
    let is_named = kept.record.name == node || kept.id.to_string() == node;
    is_named && !kept.record.status.is_gone()
}

/// The user and host that run this command, and the time, for the records of what operators want.
pub(crate) fn operator() -> Operator {
    let at = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let at = TimeMs(u64::try_from(at.as_millis()).unwrap_or(u64::MAX));
    let user = ["USER", "LOGNAME"].iter().find_map(|name| std::env::var(name).ok());
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let user = user.unwrap_or_else(|| "unknown".to_owned());
    Operator { at, name: format!("{user}@{}", host.trim()) }
}
