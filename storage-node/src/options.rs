//! The options of a storage node, and the settings derived from them.

use std::path::PathBuf;

use engine::node::{NodeSizes, Settings, pending_beside_log};
use engine::records::Meta;
use process::{ClusterOptions, ListenOptions, ProcessExit, ProcessOptions};

use crate::disk_settings::{DiskSettings, MemoryPlan};
use crate::files::FilePlan;
use crate::peers::PeerLimits;

/// The least memory that is of use: two tables, a cache and a message of the largest size.
const MEMORY_BYTES_MIN: u64 = 128 << 20;

/// The value of `--replace` without a name.
const REPLACE_ANY: &str = "*";

/// The flags of `dkc storage-node`.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// Unique name of this node, for people; the store's UUID is its identity
    #[arg(long, env = "DKC_NAME")]
    pub name: String,
    /// Data folder, locked while the node runs
    #[arg(long, env = "DKC_DATA")]
    pub data: PathBuf,
    /// Take over the name and the replicas of the store that had this name and is lost for good.
    /// With names (`--replace=NAME[,…]`): only if this node's name is among them. No effect if
    /// there is nothing to replace
    #[arg(
        long,
        env = "DKC_REPLACE",
        value_name = "NAME[,…]",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = REPLACE_ANY
    )]
    pub replace: Option<String>,
    /// The address for gateways, other nodes and the coordinator.
    #[command(flatten)]
    pub listen: ListenOptions,
    /// The cluster and its etcd.
    #[command(flatten)]
    pub cluster: ClusterOptions<false>,
    /// The options of every role.
    #[command(flatten)]
    pub process: ProcessOptions,
    /// Failure zone; the replicas of a shard are spread over zones
    #[arg(long, env = "DKC_ZONE", default_value = "")]
    pub zone: String,
    /// Machine, the innermost failure zone (default: host name)
    #[arg(long, env = "DKC_HOST")]
    pub host: Option<String>,
    /// Bytes of log kept for lagging replicas; beyond that they need a snapshot
    #[arg(long, env = "DKC_LOG_KEEP_BYTES", default_value_t = 1 << 30)]
    pub log_keep_bytes: u64,
    /// Size of a log segment in bytes
    #[arg(long, env = "DKC_SEGMENT_BYTES", default_value_t = 64 << 20)]
    pub segment_bytes: u64,
    /// Size in bytes of the blocks in which the log is read
    #[arg(long, env = "DKC_LOG_BLOCK_BYTES", default_value_t = 1 << 20, hide = true)]
    pub log_block_bytes: u64,
    /// Bytes by which entries that only this node needs may exceed --log-keep-bytes; beyond that it
    /// refuses writes
    #[arg(long, env = "DKC_LOG_SLACK_BYTES", default_value_t = 1 << 30, hide = true)]
    pub log_slack_bytes: u64,
    /// Time in ms after which committed changes are written to sorted files
    #[arg(long, env = "DKC_FLUSH_AFTER_MS", default_value_t = 30_000)]
    pub flush_after_ms: u64,
    /// Memory budget in bytes
    #[arg(long, env = "DKC_MEMORY_BYTES", default_value_t = 512 << 20)]
    pub memory_bytes: u64,
    /// Rate limit of each snapshot sent to another node, in MB/s
    #[arg(
        long,
        env = "DKC_COPY_RATE",
        default_value_t = PeerLimits::default().snapshot_bytes_per_second / 1_000_000,
        value_parser = clap::value_parser!(u64).range(1..=100_000)
    )]
    pub copy_rate: u64,
    /// HTTP/2 window of each stream between nodes, in bytes
    #[arg(
        long,
        env = "DKC_STREAM_WINDOW_BYTES",
        default_value_t = PeerLimits::default().stream_window,
        hide = true,
        value_parser = clap::value_parser!(u32).range(65_535..=(1 << 30) - 1)
    )]
    pub stream_window_bytes: u32,
    /// Interval of scrubs, which read and verify the whole disk, in seconds; 0: only by `dkc scrub`
    #[arg(long, env = "DKC_SCRUB_EVERY", default_value_t = 86_400)]
    pub scrub_every: u64,
    /// Rate limit of a scrub, in MB/s
    #[arg(
        long,
        env = "DKC_SCRUB_RATE",
        default_value_t = 20,
        value_parser = clap::value_parser!(u64).range(1..=10_000)
    )]
    pub scrub_rate: u64,
}

impl Options {
    /// Checks the options. The error explains what is expected.
    pub fn check(&self) -> Result<(), ProcessExit> {
        self.clone().resolve().map(drop)
    }

    /// Checks the options, and resolves them once for the whole process.
    pub(crate) fn resolve(self) -> Result<NodeSettings, ProcessExit> {
        let usage = |why: String| Err(ProcessExit::Usage(why));
        if self.name.is_empty() || self.name.len() > 64 {
            return usage("--name: 1 to 64 bytes are expected".into());
        }
        self.listen.check()?;
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
        let memory = self.memory_plan();
        let files = FilePlan::of(telemetry::files::allowed(), memory.open_files_max)?;
        let memory = MemoryPlan { open_files_max: files.sorted_files, ..memory };
        Ok(NodeSettings {
            disk: DiskSettings {
                segment_bytes: bytes(self.segment_bytes),
                block_bytes: bytes(self.log_block_bytes),
                log_keep_bytes: bytes(self.log_keep_bytes),
                log_slack_bytes: bytes(self.log_slack_bytes),
                ..DiskSettings::new(self.data.clone(), &memory)
            },
            memory,
            connections: files.connections,
            limits: PeerLimits {
                stream_window: self.stream_window_bytes,
                snapshot_bytes_per_second: self.copy_rate * 1_000_000,
            },
            options: self,
        })
    }

    /// Returns whether this store may take the name of another that is away.
    pub(crate) fn replaces(&self) -> bool {
        let names = self.replace.iter().flat_map(|names| names.split(','));
        names.map(str::trim).any(|name| name == REPLACE_ANY || name == self.name)
    }

    /// Returns the machine's name for the planner.
    pub(crate) fn host_label(&self) -> String {
        // The name is not read from /proc, which a hardened unit may hide: without a name all
        // machines would look like one.
        let own = || rustix::system::uname().nodename().to_string_lossy().into_owned();
        self.host.clone().unwrap_or_else(own)
    }

    /// Divides `--memory-bytes`.
    fn memory_plan(&self) -> MemoryPlan {
        let log = bytes(self.log_keep_bytes.saturating_add(self.log_slack_bytes));
        let plan = MemoryPlan::of(bytes(self.memory_bytes));
        MemoryPlan { pending_bytes_max: pending_beside_log(plan.pending_bytes_max, log), ..plan }
    }
}

fn bytes(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}

/// The settings of one process: its options, and what follows from them, the machine and each
/// other.
#[derive(Clone, Debug)]
pub(crate) struct NodeSettings {
    pub(crate) options: Options,
    pub(crate) memory: MemoryPlan,
    pub(crate) disk: DiskSettings,
    /// Connections that others may make to this node.
    pub(crate) connections: usize,
    /// The limits of what this node sends to other nodes.
    pub(crate) limits: PeerLimits,
}

impl NodeSettings {
    /// Returns the settings of the state machine in this cluster.
    pub(crate) fn engine(&self, meta: &Meta) -> Settings {
        let Self { options, memory, .. } = self;
        Settings {
            min_in_sync: usize::from(meta.min_in_sync),
            idempotency: meta.idempotency,
            flush_after_ms: options.flush_after_ms,
            table_bytes_max: memory.table_bytes_max,
            pending_bytes_max: memory.pending_bytes_max,
            log_memory_bytes: memory.log_memory_bytes,
            sizes: NodeSizes {
                waiting_read_bytes_max: memory.waiting_read_bytes_max,
                ..NodeSizes::default()
            },
            scrub_every_ms: (options.scrub_every > 0)
                .then_some(options.scrub_every.saturating_mul(1_000)),
            scrub_bytes_per_s: options.scrub_rate * 1_000_000,
            ..Settings::default()
        }
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

    /// A log full of entries that were not applied had no room for the barrier that could commit
    /// them.
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
