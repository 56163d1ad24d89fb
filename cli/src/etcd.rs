//! Commands that speak with etcd themselves: which one, and which cluster in it.

use anyhow::Context;
use engine::records::StoreRecord;
use metastore::{Kept, Metastore, Settings};

#[derive(Debug, clap::Args)]
pub(crate) struct EtcdArgs {
    /// etcd's members
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
    pub(crate) async fn connect(&self) -> anyhow::Result<Metastore> {
        let settings = Settings::new(self.etcd.clone(), &self.cluster);
        let connected = Metastore::connect(&settings).await;
        connected.with_context(|| format!("--etcd {}", self.etcd.join(",")))
    }
}

/// An operator's word for a node means this store: it stands, and that is its name or its uuid. A name may mean more than
/// one while shards still need a store that was replaced.
pub(crate) fn is_meant(kept: &Kept<StoreRecord>, node: &str) -> bool {
    let is_named = kept.record.name == node || kept.id.to_string() == node;
    is_named && !kept.record.status.is_gone()
}
