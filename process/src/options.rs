//! The options that several roles have, each declared once.

use std::net::SocketAddr;

use crate::ProcessExit;

/// The cluster, and the etcd that it is in. Commands and roles for a first try, with `LOCAL`, find
/// an etcd on their own machine without the flag.
#[derive(Clone, Debug, clap::Args)]
pub struct ClusterOptions<const LOCAL: bool> {
    /// Addresses of the members of etcd, separated by commas
    #[arg(
        long,
        env = "DKC_ETCD",
        value_name = "HOST:PORT[,…]",
        value_delimiter = ',',
        required = !LOCAL,
        default_value = LOCAL.then_some("127.0.0.1:2379"),
        value_parser = metastore::endpoint
    )]
    pub etcd: Vec<String>,
    /// Name of the cluster in etcd, which several clusters can share
    #[arg(long, env = "DKC_CLUSTER", default_value = "dkc", value_parser = metastore::cluster_name)]
    pub cluster: String,
}

impl<const LOCAL: bool> ClusterOptions<LOCAL> {
    /// Returns the settings of the connection to etcd.
    pub fn settings(&self) -> metastore::Settings {
        metastore::Settings::new(self.etcd.clone(), &self.cluster)
    }
}

/// The options of every role.
#[derive(Clone, Debug, clap::Args)]
pub struct ProcessOptions {
    /// Address on which /livez, /readyz and /metrics are served, and nothing else [default: off]
    #[arg(long, env = "DKC_METRICS", value_name = "IP:PORT", value_parser = metastore::listened)]
    pub metrics: Option<SocketAddr>,
    /// Time to live of this process's lease in etcd, in seconds: when it dies, others notice within
    /// this time. Use the same value for all processes
    #[arg(
        long,
        env = "DKC_LEASE_TTL",
        value_name = "SECONDS",
        default_value_t = 2,
        value_parser = clap::value_parser!(u32).range(1..=3600)
    )]
    pub lease_ttl: u32,
}

/// The address of a process for the other processes of the cluster.
#[derive(Clone, Debug, clap::Args)]
pub struct ListenOptions {
    /// Address to listen on for the other processes of the cluster
    #[arg(long, env = "DKC_LISTEN", value_name = "IP:PORT", value_parser = metastore::listened)]
    pub listen: SocketAddr,
    /// Address that they dial [default: that of --listen]
    #[arg(
        long,
        env = "DKC_ADVERTISE",
        value_name = "HOST:PORT",
        value_parser = metastore::advertised
    )]
    pub advertise: Option<String>,
}

impl ListenOptions {
    /// Returns a warning about an address that is valid but probably a mistake in this cluster.
    pub fn oddity(&self, cluster: &ClusterOptions<false>) -> Option<String> {
        let listen = self.listen.to_string();
        metastore::loopback_beside(self.advertise.as_deref().unwrap_or(&listen), &cluster.etcd)
    }

    /// Refuses an address that others can't dial.
    pub fn check(&self) -> Result<(), ProcessExit> {
        if self.listen.ip().is_unspecified() && self.advertise.is_none() {
            return Err(ProcessExit::Usage(format!(
                "--listen {}: others can't dial that; set --advertise to a host:port that they can",
                self.listen
            )));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line<const LOCAL: bool> {
        #[command(flatten)]
        cluster: ClusterOptions<LOCAL>,
    }

    #[test]
    fn only_commands_and_roles_for_a_first_try_find_a_local_etcd() {
        assert!(Line::<false>::try_parse_from(["role"]).is_err());
        let line = Line::<true>::try_parse_from(["role"]).expect("nothing is required");
        assert_eq!(line.cluster.settings().endpoints, ["127.0.0.1:2379"]);
        let flags = ["role", "--etcd", "a:1,b:2", "--cluster", "c"];
        let line = Line::<true>::try_parse_from(flags).expect("valid flags");
        assert_eq!(line.cluster.settings().endpoints, ["a:1", "b:2"]);
        assert_eq!(line.cluster.settings().cluster, "c");
    }
}
