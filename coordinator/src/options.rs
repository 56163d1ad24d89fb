//! What a coordinator can be told when it is started.
//!
//! `--shards`, `--replicas`, `--min-in-sync` and `--idempotency-window` describe the cluster, which is made once, by the first
//! coordinator that leads. Later they must agree with what was made, or be absent.

use std::net::SocketAddr;

use engine::coordinator::{Flags, Settings};
use engine::records::Meta;

use crate::Exit;

/// More shards than slots there can't be.
const SHARDS_MAX: i64 = 65_536;
/// More copies cost more than they protect.
const REPLICAS_MAX: i64 = 15;
/// Shorter than a failover and a few retries it would protect nobody.
const WINDOW_S_MIN: i64 = 10;
/// A thousandth of the default: below, hardly a client gets a record.
const BYTES_MIN: u64 = 8 << 20;
/// A week; each record takes its place for three windows.
const WINDOW_S_MAX: i64 = 604_800;

/// Flags of `dkc coordinator`.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// This process's name, for people.
    #[arg(long, env = "DKC_NAME")]
    pub name: String,
    /// Where etcd is: `host:port`, several with commas between them.
    #[arg(
        long,
        env = "DKC_ETCD",
        value_name = "HOST:PORT[,…]",
        value_delimiter = ',',
        required = true,
        value_parser = metastore::endpoint
    )]
    pub etcd: Vec<String>,
    /// The cluster's name in etcd.
    #[arg(long, env = "DKC_CLUSTER", default_value = "dkc", value_parser = metastore::cluster_name)]
    pub cluster: String,
    /// Where nodes and gateways report to, `ip:port`.
    #[arg(long, env = "DKC_LISTEN", value_name = "IP:PORT", value_parser = metastore::listened)]
    pub listen: SocketAddr,
    /// What they are told to dial, `host:port`, if it is not the address of `--listen`.
    #[arg(long, env = "DKC_ADVERTISE", value_name = "HOST:PORT", value_parser = metastore::advertised)]
    pub advertise: Option<String>,
    /// Where `/livez`, `/readyz` and `/metrics` are served. None: nowhere.
    #[arg(long, env = "DKC_METRICS", value_name = "IP:PORT", value_parser = metastore::listened)]
    pub metrics: Option<SocketAddr>,
    /// How many shards the cluster is made with. Absent: as it is (24 for a new one).
    #[arg(long, env = "DKC_SHARDS", value_parser = clap::value_parser!(u32).range(1..=SHARDS_MAX))]
    pub shards: Option<u32>,
    /// Copies of each shard. Absent: as it is (3 for a new one).
    #[arg(long, env = "DKC_REPLICAS", value_parser = clap::value_parser!(u8).range(1..=REPLICAS_MAX))]
    pub replicas: Option<u8>,
    /// Copies that must hold a change before it is acknowledged. Absent: as it is (2 for a new one, if there are
    /// as many copies).
    #[arg(long, env = "DKC_MIN_IN_SYNC", value_parser = clap::value_parser!(u8).range(1..=REPLICAS_MAX))]
    pub min_in_sync: Option<u8>,
    /// Seconds for which an Idempotency-Key is remembered at least. Absent: as it is (3600 for a new cluster).
    #[arg(
        long,
        env = "DKC_IDEMPOTENCY_WINDOW",
        value_name = "SECONDS",
        value_parser = clap::value_parser!(u32).range(WINDOW_S_MIN..=WINDOW_S_MAX)
    )]
    pub idempotency_window: Option<u32>,
    /// Bytes that the records of Idempotency-Keys may take in each copy of the cluster, so replicas times that in
    /// all. Absent: as it is (8589934592, 8 GiB, for a new cluster).
    #[arg(
        long,
        env = "DKC_IDEMPOTENCY_BYTES",
        value_name = "BYTES",
        value_parser = clap::value_parser!(u64).range(BYTES_MIN..)
    )]
    pub idempotency_bytes: Option<u64>,
    /// Shards are placed as soon as this many nodes are there. Absent: once enough are and none has come for 3 s.
    #[arg(long, env = "DKC_EXPECT_NODES", value_parser = clap::value_parser!(u32).range(1..))]
    pub expect_nodes: Option<u32>,
    /// Seconds after which the copies of a node that does not return are made on others.
    #[arg(long, env = "DKC_REBUILD_DELAY", default_value_t = 600)]
    pub rebuild_delay: u64,
    /// Seconds after which a dead coordinator is noticed; the same as the nodes have.
    #[arg(long, env = "DKC_LEASE_TTL", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=3600))]
    pub lease_ttl: u32,
}

impl Options {
    /// What is odd, though it would run.
    pub fn oddity(&self) -> Option<String> {
        let listen = self.listen.to_string();
        let dialled = self.advertise.as_deref().unwrap_or(&listen);
        metastore::loopback_beside(dialled, &self.etcd)
    }

    /// Refuses what makes no sense, and says what would.
    pub fn check(&self) -> Result<(), Exit> {
        let usage = |why: String| Err(Exit::Usage(why));
        if self.listen.ip().is_unspecified() && self.advertise.is_none() {
            return usage(format!(
                "--listen {}: others can't dial that; say with --advertise host:port what they can",
                self.listen
            ));
        }
        if let (Some(replicas), Some(expected)) = (self.replicas, self.expect_nodes)
            && expected < u32::from(replicas)
        {
            return usage(format!(
                "--expect-nodes {expected}: --replicas {replicas} need at least as many nodes"
            ));
        }
        self.flags().check().map_err(Exit::Usage)
    }

    fn flags(&self) -> Flags {
        Flags {
            shards: self.shards,
            replicas: self.replicas,
            min_in_sync: self.min_in_sync,
            idempotency_window_ms: self
                .idempotency_window
                .map(|seconds| u64::from(seconds) * 1_000),
            idempotency_bytes: self.idempotency_bytes,
        }
    }

    /// How the cluster that stands in etcd differs from what was asked for, if it does.
    pub fn difference(&self, meta: &Meta) -> Option<String> {
        let difference = self.flags().difference(meta)?;
        let cluster = &self.cluster;
        Some(format!("cluster {cluster:?}: {difference}; leave the flag out to accept what it has"))
    }

    /// The machine's settings.
    pub(crate) fn settings(&self, new_cluster: u128) -> Settings {
        Settings {
            flags: self.flags(),
            new_cluster,
            expect_nodes: self.expect_nodes,
            rebuild_delay_ms: self.rebuild_delay.saturating_mul(1_000),
            lease_ttl_ms: u64::from(self.lease_ttl) * 1_000,
            ..Settings::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        options: Options,
    }

    fn parse(flags: &str) -> Result<Options, clap::Error> {
        let always = "coordinator --name c --etcd 127.0.0.1:1,127.0.0.1:2 --listen 127.0.0.1:3";
        let line = format!("{always} {flags}");
        Line::try_parse_from(line.split_whitespace()).map(|line| line.options)
    }

    /// Refused, by the parser or by the check, with these words.
    #[track_caller]
    fn refused(flags: &str, want: &str) {
        let why = match parse(flags) {
            Err(error) => error.to_string(),
            Ok(options) => options.check().expect_err("nonsense").to_string(),
        };
        assert!(why.contains(want), "{flags}: {why}");
    }

    #[test]
    fn nonsense_is_refused() {
        refused("--shards 0", "--shards");
        refused("--shards 65537", "--shards");
        refused("--replicas 0", "--replicas");
        refused("--replicas 2 --min-in-sync 3", "--min-in-sync 3");
        refused("--replicas 3 --expect-nodes 2", "--expect-nodes 2");
        refused("--min-in-sync 0", "--min-in-sync");
        refused("--lease-ttl 0", "--lease-ttl");
        refused("--idempotency-window 9", "--idempotency-window");
        refused("--idempotency-window 604801", "--idempotency-window");
        refused("--etcd ,", "--etcd");
    }

    #[test]
    fn what_others_cannot_dial_needs_another_address() {
        let mut options = parse("").expect("good flags");
        options.listen = "0.0.0.0:7".parse().expect("an address");
        assert!(options.check().is_err());
        options.advertise = Some("host:7".into());
        assert!(options.check().is_ok());
    }

    #[track_caller]
    fn differs(flags: &str, want: Option<&str>) {
        let meta = Meta {
            cluster: 1,
            shards: 24,
            replicas: 3,
            min_in_sync: 2,
            hash: 1,
            incarnation: 1,
            idempotency: engine::idempotency::Settings::default(),
        };
        let difference = parse(flags).expect("good flags").difference(&meta);
        match want {
            None => assert_eq!(difference, None),
            Some(want) => {
                assert!(difference.as_ref().is_some_and(|it| it.contains(want)), "{difference:?}")
            }
        }
    }

    #[test]
    fn a_cluster_made_otherwise_is_named() {
        differs("", None);
        differs("--shards 24 --replicas 3 --min-in-sync 2 --idempotency-window 3600", None);
        differs(
            "--idempotency-window 10",
            Some("--idempotency-window is 10, but this cluster was made with 3600"),
        );
        differs("--shards 12", Some("--shards is 12, but this cluster was made with 24"));
        differs("--replicas 5", Some("--replicas is 5"));
        differs("--min-in-sync 1", Some("--min-in-sync is 1"));
    }
}
