//! Options of the commands that access etcd directly: its endpoints and the cluster's name.

use anyhow::Context;
use engine::records::StoreRecord;
use metastore::{Metastore, Revisioned, Settings};

/// The etcd and the cluster that a command works on.
#[derive(Debug, clap::Args)]
pub(crate) struct EtcdArgs {
    /// Endpoints of etcd
    #[arg(
        long,
        env = "DKC_ETCD",
        value_name = "HOST:PORT[,…]",
        value_delimiter = ',',
        default_value = "127.0.0.1:2379",
        value_parser = metastore::endpoint
    )]
    etcd: Vec<String>,
    /// Name of the cluster in etcd
    #[arg(long, env = "DKC_CLUSTER", default_value = "dkc", value_parser = metastore::cluster_name)]
    pub(crate) cluster: String,
}

impl EtcdArgs {
    /// Connects to etcd; an error names the endpoints.
    pub(crate) async fn connect(&self) -> anyhow::Result<Metastore> {
        let settings = Settings::new(self.etcd.clone(), &self.cluster);
        let connected = Metastore::connect(&settings).await;
        connected.with_context(|| format!("--etcd {}", self.etcd.join(",")))
    }
}

/// Returns whether `node`, as an operator gave it, denotes this store: the store is not gone, and
/// `node` is its name or its uuid. A name may denote several stores while shards still need a store
/// that was replaced.
pub(crate) fn is_denoted_by(kept: &Revisioned<StoreRecord>, node: &str) -> bool {
    let is_named = kept.record.name == node || kept.id.to_string() == node;
    is_named && !kept.record.status.is_gone()
}
