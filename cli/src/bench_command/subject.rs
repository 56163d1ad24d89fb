//! The subject of a measurement: a system, and the load on it.

use std::path::PathBuf;
use std::time::Duration;

use bench::cpu::MeasuredProcess;
use bench::keys::KeyDistribution;
use client::Media;

/// The load that clients generate, whatever the system is.
#[derive(Clone, Debug)]
pub(crate) struct LoadShape {
    /// The number of clients, each with one connection and one request at a time.
    pub(crate) clients: usize,
    /// The number of threads that run the clients.
    pub(crate) threads: usize,
    /// Requests per second of an open loop; `None` for a closed loop.
    pub(crate) rate: Option<f64>,
    /// Increments per request.
    pub(crate) batch: usize,
    /// The format of a batch.
    pub(crate) media: Media,
    /// True if each write has an `Idempotency-Key` of its own.
    pub(crate) keyed: bool,
    /// The number of counters.
    pub(crate) keys: u64,
    /// The distribution of increments over the counters.
    pub(crate) distribution: KeyDistribution,
    /// The share of reads in percent.
    pub(crate) reads_percent: u32,
    /// The largest permitted age of a read in milliseconds; `None` if reads are linearizable.
    pub(crate) staleness_ms: Option<u64>,
    /// The time before the measured part.
    pub(crate) warm_up: Duration,
    /// The time of the measured part.
    pub(crate) measured: Duration,
}

impl Default for LoadShape {
    fn default() -> Self {
        Self {
            clients: 64,
            threads: 1,
            rate: None,
            batch: 1,
            media: Media::Text,
            keyed: false,
            keys: 1_000_000,
            distribution: KeyDistribution::Uniform,
            reads_percent: 0,
            staleness_ms: None,
            warm_up: Duration::from_secs(2),
            measured: Duration::from_secs(10),
        }
    }
}

/// A system under load.
#[derive(Clone, Debug)]
pub(crate) struct Subject {
    /// The name of the system.
    pub(crate) system: String,
    /// The processes of the system. The generator is added to them.
    pub(crate) processes: Vec<MeasuredProcess>,
    /// The folder with all of its data, if it is private.
    pub(crate) folder: Option<PathBuf>,
    /// The number of its nodes.
    pub(crate) nodes: usize,
    /// The number of its shards.
    pub(crate) shards: usize,
    /// The fewest and the most replicas of a shard.
    pub(crate) replicas: [usize; 2],
    /// When data is on disk.
    pub(crate) fsync: String,
    /// The replicas that an answer waits for.
    pub(crate) acknowledgement: String,
}
