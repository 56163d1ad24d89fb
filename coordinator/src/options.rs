//! The flags of a coordinator.
//!
//! `--shards`, `--replicas`, `--min-in-sync`, `--idempotency-window` and `--idempotency-bytes`
//! describe the cluster, which the first leading coordinator creates once. Later they must match
//! the cluster, or be absent.

use engine::coordinator::{Flags, Settings};
use engine::records::Meta;
use process::{ClusterOptions, ListenOptions, ProcessExit, ProcessOptions};

use crate::service::connections;

/// A cluster can't have more shards than slots.
const SHARDS_MAX: i64 = 65_536;
/// More copies cost more than they protect.
const REPLICAS_MAX: i64 = 15;
/// A window that is shorter than a failover and a few retries would protect no client.
const WINDOW_S_MIN: i64 = 10;
/// A thousandth of the default: with less, hardly any request gets a record.
const BYTES_MIN: u64 = 8 << 20;
/// A dozen events at least; all of them fit into one gRPC message.
const EVENT_BYTES: std::ops::RangeInclusive<u64> = 4 << 10..=8 << 20;
/// A week; each record occupies space for three windows.
const WINDOW_S_MAX: i64 = 604_800;

/// Flags of `dkc coordinator`.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// Name of this process, for operators
    #[arg(long, env = "DKC_NAME")]
    pub name: String,
    /// The cluster and its etcd.
    #[command(flatten)]
    pub cluster: ClusterOptions<false>,
    /// The address for nodes and gateways.
    #[command(flatten)]
    pub listen: ListenOptions,
    /// The options of every role.
    #[command(flatten)]
    pub process: ProcessOptions,
    /// Number of shards of a new cluster [default: 24]. An existing cluster must have the same
    /// number
    #[arg(long, env = "DKC_SHARDS", value_parser = clap::value_parser!(u32).range(1..=SHARDS_MAX))]
    pub shards: Option<u32>,
    /// Copies of each shard in a new cluster [default: 3]. An existing cluster must have the same
    /// number
    #[arg(
        long,
        env = "DKC_REPLICAS",
        value_parser = clap::value_parser!(u8).range(1..=REPLICAS_MAX)
    )]
    pub replicas: Option<u8>,
    /// Copies that must have a write before it is acknowledged, in a new cluster [default: 2, if
    /// there are as many copies]. An existing cluster must have the same number
    #[arg(
        long,
        env = "DKC_MIN_IN_SYNC",
        value_parser = clap::value_parser!(u8).range(1..=REPLICAS_MAX)
    )]
    pub min_in_sync: Option<u8>,
    /// Minimum time for which an Idempotency-Key is remembered, in a new cluster [default: 3600].
    /// An existing cluster must have the same value
    #[arg(
        long,
        env = "DKC_IDEMPOTENCY_WINDOW",
        value_name = "SECONDS",
        value_parser = clap::value_parser!(u32).range(WINDOW_S_MIN..=WINDOW_S_MAX)
    )]
    pub idempotency_window: Option<u32>,
    /// Space for the records of Idempotency-Keys in each copy of a new cluster, so its --replicas
    /// times that in total [default: 8589934592, 8 GiB]. An existing cluster must have the same
    /// value
    #[arg(
        long,
        env = "DKC_IDEMPOTENCY_BYTES",
        value_name = "BYTES",
        value_parser = clap::value_parser!(u64).range(BYTES_MIN..)
    )]
    pub idempotency_bytes: Option<u64>,
    /// Number of nodes that are awaited before shards are placed [default: enough for --replicas,
    /// and until no node has joined for 3 s]
    #[arg(long, env = "DKC_EXPECT_NODES", value_parser = clap::value_parser!(u32).range(1..))]
    pub expect_nodes: Option<u32>,
    /// Seconds after which the copies of a dead node are created on other nodes
    #[arg(long, env = "DKC_REBUILD_DELAY", default_value_t = 600)]
    pub rebuild_delay: u64,
    /// Seconds without a change of the map after which moves that are wanted count as stalled
    #[arg(
        long,
        env = "DKC_STALLED_AFTER",
        value_name = "SECONDS",
        default_value_t = 60,
        value_parser = clap::value_parser!(u32).range(1..)
    )]
    pub stalled_after: u32,
    /// Bytes of memory for the latest events, which `dkc events` shows
    #[arg(
        long,
        env = "DKC_EVENT_BYTES",
        value_name = "BYTES",
        default_value_t = 1 << 20,
        value_parser = clap::value_parser!(u64).range(EVENT_BYTES)
    )]
    pub event_bytes: u64,
}

impl Options {
    /// Refuses invalid flags, with an error that states what is valid.
    pub fn check(&self) -> Result<(), ProcessExit> {
        let usage = |why: String| Err(ProcessExit::Usage(why));
        self.listen.check()?;
        if let (Some(replicas), Some(expected)) = (self.replicas, self.expect_nodes)
            && expected < u32::from(replicas)
        {
            return usage(format!(
                "--expect-nodes {expected}: --replicas {replicas} need at least as many nodes"
            ));
        }
        connections()?;
        self.flags().check().map_err(ProcessExit::Usage)
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

    /// Returns the first difference between the flags and the settings of the cluster in etcd.
    pub fn difference(&self, meta: &Meta) -> Option<String> {
        let difference = self.flags().difference(meta)?;
        let cluster = &self.cluster.cluster;
        Some(format!("cluster {cluster:?}: {difference}; omit the flag to accept its setting"))
    }

    /// Returns the settings of the state machine.
    pub(crate) fn settings(&self, new_cluster: u128) -> Settings {
        Settings {
            flags: self.flags(),
            new_cluster,
            expect_nodes: self.expect_nodes,
            rebuild_delay_ms: self.rebuild_delay.saturating_mul(1_000),
            stalled_after_ms: u64::from(self.stalled_after) * 1_000,
            lease_ttl_ms: u64::from(self.process.lease_ttl) * 1_000,
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

    /// Checks that the parser or the check refuses these flags with this text.
    #[track_caller]
    fn refused(flags: &str, want: &str) {
        let why = match parse(flags) {
            Err(error) => error.to_string(),
            Ok(options) => options.check().expect_err("invalid flags").to_string(),
        };
        assert!(why.contains(want), "{flags}: {why}");
    }

    #[test]
    fn invalid_flags_are_refused() {
        refused("--shards 0", "--shards");
        refused("--shards 65537", "--shards");
        refused("--replicas 0", "--replicas");
        refused("--replicas 2 --min-in-sync 3", "--min-in-sync 3");
        refused("--replicas 3 --expect-nodes 2", "--expect-nodes 2");
        refused("--min-in-sync 0", "--min-in-sync");
        refused("--lease-ttl 0", "--lease-ttl");
        refused("--event-bytes 4095", "--event-bytes");
        refused("--event-bytes 8388609", "--event-bytes");
        refused("--idempotency-window 9", "--idempotency-window");
        refused("--idempotency-window 604801", "--idempotency-window");
        refused("--etcd ,", "--etcd");
    }

    #[test]
    fn an_address_that_others_cannot_dial_needs_another_one() {
        let mut options = parse("").expect("good flags");
        options.listen.listen = "0.0.0.0:7".parse().expect("an address");
        assert!(options.check().is_err());
        options.listen.advertise = Some("host:7".into());
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
            idempotency: engine::shard::idempotency::TokenSettings::default(),
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
