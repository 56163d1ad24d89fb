//! The etcd of the commands that access it directly.

use anyhow::Context;
use engine::ids::TimeMs;
use engine::records::{Meta, Operator, StoreRecord};
use metastore::{Metastore, Revisioned};
use process::ClusterOptions;
use telemetry::wall_clock_ms;

use crate::exit::UsageError;

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

/// Returns the one store that `node`, a name or a uuid, denotes. No or several stores are an error
/// of usage.
pub(crate) fn store_named<'a>(
    stores: &'a [Revisioned<StoreRecord>],
    node: &str,
) -> Result<&'a Revisioned<StoreRecord>, UsageError> {
    let found: Vec<_> = stores.iter().filter(|kept| is_denoted_by(kept, node)).collect();
    match found[..] {
        [store] => Ok(store),
        [] => {
            let present = stores.iter().filter(|kept| !kept.record.status.is_gone());
            let known: Vec<&str> = present.map(|kept| kept.record.name.as_str()).collect();
            Err(UsageError(format!("no node {node:?}; known nodes: {}", known.join(" "))))
        }
        ref several => {
            let uuids: Vec<String> = several.iter().map(|kept| kept.id.to_string()).collect();
            Err(UsageError(format!(
                "{node:?} denotes several stores: use the uuid of one of them: {}",
                uuids.join(", ")
            )))
        }
    }
}

/// The user and host that run this command, and the time, for the records of what operators want.
pub(crate) fn operator() -> Operator {
    let at = TimeMs(wall_clock_ms());
    let user = ["USER", "LOGNAME"].iter().find_map(|name| std::env::var(name).ok());
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let user = user.unwrap_or_else(|| "unknown".to_owned());
    Operator { at, name: format!("{user}@{}", host.trim()) }
}
