//! What a storage node can be told when it is started, and what follows from it.

use std::net::SocketAddr;
use std::path::PathBuf;

use engine::node::{Settings, Sizes, pending_beside_log};
use engine::records::Meta;

use crate::disk::MemoryPlan;
use crate::exit::Exit;
use crate::peers::Limits;

/// Below this nothing useful fits: two tables, a cache and a message of the largest size.
const MEMORY_BYTES_MIN: u64 = 128 << 20;

/// What `--replace` without a name stands for.
const REPLACE_ANY: &str = "*";

/// Flags of `dkc storage-node`.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// This node's name: one node of the cluster at a time has it. For people; the store's uuid is what counts.
    #[arg(long, env = "DKC_NAME")]
    pub name: String,
    /// The folder of its data. It is locked while the node runs.
    #[arg(long, env = "DKC_DATA")]
    pub data: PathBuf,
    /// The store that has this name so far is gone for good, and this folder is to take its name and its places. With
    /// names (`--replace=NAME[,…]`): only if this node's is among them. Without effect where nothing is to be replaced.
    #[arg(
        long,
        env = "DKC_REPLACE",
        value_name = "NAME[,…]",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = REPLACE_ANY
    )]
    pub replace: Option<String>,
    /// Where gateways, other nodes and the coordinator reach it, `ip:port`.
    #[arg(long, env = "DKC_LISTEN", value_name = "IP:PORT", value_parser = metastore::listened)]
    pub listen: SocketAddr,
    /// What others are told to dial, `host:port`, if it is not the address of `--listen`.
    #[arg(long, env = "DKC_ADVERTISE", value_name = "HOST:PORT", value_parser = metastore::advertised)]
    pub advertise: Option<String>,
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
    /// Where `/livez`, `/readyz` and `/metrics` are served. None: nowhere.
    #[arg(long, env = "DKC_METRICS", value_name = "IP:PORT", value_parser = metastore::listened)]
    pub metrics: Option<SocketAddr>,
    /// The failure zone: replicas of a shard are kept in different ones.
    #[arg(long, env = "DKC_ZONE", default_value = "")]
    pub zone: String,
    /// The machine: the innermost failure zone. Default: the machine's own name.
    #[arg(long, env = "DKC_HOST")]
    pub host: Option<String>,
    /// Seconds after which a dead node is noticed by its lease.
    #[arg(long, env = "DKC_LEASE_TTL", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=3600))]
    pub lease_ttl: u32,
    /// Bytes of log kept for replicas that lag; beyond it they are filled by a whole copy.
    #[arg(long, env = "DKC_LOG_KEEP_BYTES", default_value_t = 1 << 30)]
    pub log_keep_bytes: u64,
    /// Size of a log segment.
    #[arg(long, env = "DKC_SEGMENT_BYTES", default_value_t = 64 << 20)]
    pub segment_bytes: u64,
    /// The log is read in blocks of this size.
    #[arg(long, env = "DKC_LOG_BLOCK_BYTES", default_value_t = 1 << 20, hide = true)]
    pub log_block_bytes: u64,
    /// What only this node still needs may make the log longer than --log-keep-bytes by this; then it refuses writes.
    #[arg(long, env = "DKC_LOG_SLACK_BYTES", default_value_t = 1 << 30, hide = true)]
    pub log_slack_bytes: u64,
    /// Committed changes are in the sorted files after this long.
    #[arg(long, env = "DKC_FLUSH_AFTER_MS", default_value_t = 30_000)]
    pub flush_after_ms: u64,
    /// Memory that the node may use.
    #[arg(long, env = "DKC_MEMORY_BYTES", default_value_t = 512 << 20)]
    pub memory_bytes: u64,
    /// A whole copy of a shard is sent to another node with no more than so many megabytes per second.
    #[arg(
        long,
        env = "DKC_COPY_RATE",
        default_value_t = Limits::default().copy_bytes_per_second / 1_000_000,
        value_parser = clap::value_parser!(u64).range(1..=100_000)
    )]
    pub copy_rate: u64,
    /// HTTP/2's window for each stream between nodes.
    #[arg(
        long,
        env = "DKC_STREAM_WINDOW_BYTES",
        default_value_t = Limits::default().stream_window,
        hide = true,
        value_parser = clap::value_parser!(u32).range(65_535..=(1 << 30) - 1)
    )]
    pub stream_window_bytes: u32,
    /// Everything on the disk is read and checked this often, in seconds; 0: only by `dkc scrub`.
    #[arg(long, env = "DKC_SCRUB_EVERY", default_value_t = 86_400)]
    pub scrub_every: u64,
    /// No more than so many megabytes of it per second.
    #[arg(long, env = "DKC_SCRUB_RATE", default_value_t = 20, value_parser = clap::value_parser!(u64).range(1..=10_000))]
    pub scrub_rate: u64,
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
        if self.name.is_empty() || self.name.len() > 64 {
            return usage("--name: 1 to 64 bytes are expected".into());
        }
        if self.listen.ip().is_unspecified() && self.advertise.is_none() {
            return usage(format!(
                "--listen {}: others can't dial that; say with --advertise host:port what they can",
                self.listen
            ));
        }
        if self.memory_bytes < MEMORY_BYTES_MIN {
            return usage(format!(
                "--memory-bytes {}: at least {MEMORY_BYTES_MIN} are needed",
                self.memory_bytes
            ));
        }
        if !(64 << 10..=1 << 30).contains(&self.segment_bytes) {
            return usage(format!(
                "--segment-bytes {}: from 65536 to 1073741824 is expected",
                self.segment_bytes
            ));
        }
        Ok(())
    }

    /// This store may take the name of one that is away.
    pub fn replaces(&self) -> bool {
        let names = self.replace.iter().flat_map(|names| names.split(','));
        names.map(str::trim).any(|name| name == REPLACE_ANY || name == self.name)
    }

    /// The machine's name, as the planner is to know it.
    pub fn host_label(&self) -> String {
        // Not from /proc, which a hardened unit may hide: without a name all machines would be one.
        let own = || rustix::system::uname().nodename().to_string_lossy().into_owned();
        self.host.clone().unwrap_or_else(own)
    }

    /// How `--memory-bytes` is shared out.
    pub fn memory_plan(&self) -> MemoryPlan {
        let log = self.log_keep_bytes.saturating_add(self.log_slack_bytes);
        let log = usize::try_from(log).unwrap_or(usize::MAX);
        let plan = MemoryPlan::of(self.memory());
        MemoryPlan { pending_bytes_max: pending_beside_log(plan.pending_bytes_max, log), ..plan }
    }

    /// The machine's settings.
    pub fn node_settings(&self, meta: &Meta) -> Settings {
        let plan = self.memory_plan();
        Settings {
            min_in_sync: usize::from(meta.min_in_sync),
            idempotency: meta.idempotency,
            flush_after_ms: self.flush_after_ms,
            table_bytes_max: plan.table_bytes_max,
            pending_bytes_max: plan.pending_bytes_max,
            log_memory_bytes: plan.log_memory_bytes,
            sizes: Sizes {
                waiting_read_bytes_max: plan.waiting_read_bytes_max,
                ..Sizes::default()
            },
            scrub_every_ms: (self.scrub_every > 0)
                .then_some(self.scrub_every.saturating_mul(1_000)),
            scrub_bytes_per_s: self.scrub_rate * 1_000_000,
            ..Settings::default()
        }
    }

    /// What it sends other nodes, and how fast.
    pub fn limits(&self) -> Limits {
        Limits {
            stream_window: self.stream_window_bytes,
            copy_bytes_per_second: self.copy_rate * 1_000_000,
        }
    }

    fn memory(&self) -> usize {
        usize::try_from(self.memory_bytes).unwrap_or(usize::MAX)
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        options: Options,
    }

    /// Story: a log full of entries that were not applied took no barrier that could commit them.
    #[test]
    fn a_log_holds_eight_times_what_may_be_pending() {
        #[track_caller]
        fn check(flags: &[&str], want: usize) {
            let needed = "node --name a --data d --cluster c --etcd e:1 --listen 127.0.0.1:0";
            let line = Line::try_parse_from(needed.split(' ').chain(flags.iter().copied()));
            let options = line.unwrap_or_else(|error| panic!("{error}")).options;
            assert_eq!(options.memory_plan().pending_bytes_max, want);
        }
        check(&[], MemoryPlan::of(512 << 20).pending_bytes_max);
        check(&["--memory-bytes", "68719476736"], 256 << 20);
        check(&["--log-keep-bytes", "0", "--log-slack-bytes", "8000000"], 1_000_000);
    }
}
