//! Commands that speak with etcd themselves: which one, and which cluster in it.

use anyhow::Context;
use metastore::{Metastore, Settings};

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
