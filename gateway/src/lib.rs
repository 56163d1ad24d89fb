//! The gateway process: serves HTTP and drives the engine's batcher (`engine::batcher`).
//!
//! ```text
//!   http.rs ─ request/ ──▶ mailbox.rs ──▶ batcher ──▶ node_connections.rs ──▶ storage nodes
//!   clients ◀─ response.rs ◀──┘  one thread per worker  │
//!   etcd ──▶ directory.rs ──▶ every worker, the pages, the node connections
//! ```
//!
//! The sessions are the only state of a gateway. When a gateway dies, no acknowledged operation is
//! lost, and no other operation is applied twice. Nothing here decides what an answer of a node
//! means: the batcher does. This crate decides how an outcome is expressed in HTTP ([`problem`],
//! [`request`], [`response`]).

mod admission;
mod browser;
mod directory;
mod etcd;
mod failure;
mod http;
mod lingering_close;
mod mailbox;
mod malformed_heads;
mod memory;
mod memory_budget;
mod metrics;
mod node_connections;
mod openapi;
mod readiness;
mod reports;
mod service;
mod session;
mod status;
mod worker;

pub mod problem;
pub mod request;
pub mod response;

use std::net::SocketAddr;

use process::{ClusterOptions, ProcessExit, ProcessOptions, StopSignals};
pub use service::serve;
use tokio::runtime::Builder;

/// A gateway's settings.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// Name of this gateway, for logs
    #[arg(long, env = "DKC_NAME", default_value = "gateway")]
    pub name: String,
    /// The cluster and its etcd.
    #[command(flatten)]
    pub cluster: ClusterOptions<true>,
    /// Address on which clients are served
    #[arg(
        long,
        env = "DKC_HTTP",
        value_name = "ADDR",
        default_value = "127.0.0.1:8080",
        value_parser = metastore::listened
    )]
    pub http: SocketAddr,
    /// The options of every role.
    #[command(flatten)]
    pub process: ProcessOptions,
    /// Address on which grpc.health.v1 and reflection are served, and nothing else [default: off]
    #[arg(long, env = "DKC_GRPC", value_name = "ADDR", value_parser = metastore::listened)]
    pub grpc: Option<SocketAddr>,
    /// Threads that serve clients [default: half the number of CPUs, 1 to 4]
    #[arg(long, env = "DKC_WORKERS", value_parser = clap::value_parser!(u16).range(1..=256))]
    pub workers: Option<u16>,
    /// Batching delay in µs: how long an increment waits for others before it is sent
    #[arg(
        long,
        env = "DKC_LINGER_US",
        value_name = "MICROSECONDS",
        default_value_t = 0,
        value_parser = clap::value_parser!(u64).range(..=1_000_000)
    )]
    pub linger_us: u64,
    /// Idle, request-head and write timeout of a client connection, in seconds
    #[arg(
        long,
        env = "DKC_IDLE_TIMEOUT",
        value_name = "SECONDS",
        default_value_t = 75,
        value_parser = clap::value_parser!(u32).range(1..=3600)
    )]
    pub idle_timeout: u32,
    /// Memory limit of this gateway, in bytes
    #[arg(long, env = "DKC_MEMORY_BYTES", value_name = "BYTES", default_value_t = 1 << 30)]
    pub memory_bytes: u64,
    /// Maximum number of client connections [default: as many as the limit of open files and a
    /// quarter of --memory-bytes allow]
    #[arg(
        long,
        env = "DKC_CONNECTIONS",
        value_name = "COUNT",
        value_parser = clap::value_parser!(u32).range(1..)
    )]
    pub connections: Option<u32>,
    /// Origins whose pages may use this gateway from a browser, such as https://shop.example; * for
    /// all [default: none]
    #[arg(
        long,
        env = "DKC_ALLOW_ORIGIN",
        value_name = "ORIGIN[,…]",
        value_delimiter = ',',
        value_parser = browser::origin
    )]
    pub allow_origin: Vec<String>,
    /// Seconds for which the gateway still serves after SIGTERM, while /readyz reports "stopping"
    /// and load balancers turn elsewhere; a second SIGTERM or Ctrl-C ends them early
    #[arg(
        long,
        env = "DKC_DRAIN_SECONDS",
        value_name = "SECONDS",
        default_value_t = 5,
        value_parser = clap::value_parser!(u32).range(..=3600)
    )]
    pub drain_seconds: u32,
}

impl Options {
    /// Checks the settings against each other and against the limit of open files. The error names
    /// the setting that is wrong.
    pub fn check(&self) -> Result<(), ProcessExit> {
        service::shares(self).map(drop)
    }
}

/// Runs a gateway until SIGTERM or SIGINT. Returns the exit code of the process.
pub fn run(options: Options) -> u8 {
    process::run(&mut Builder::new_current_thread(), async {
        let (mut stop, hurry) = (StopSignals::new()?, StopSignals::new()?);
        let stop = async {
            stop.next().await;
        };
        serve(options, |_| {}, stop, hurry.hurry()).await
    })
}
