//! hyper HTTP in, answers out: the driver of the engine's gateway machine (`engine::batcher`).
//!
//! ```text
//!   http.rs ─ request/ ──▶ lanes.rs ──▶ machine ──▶ links.rs ──▶ storage nodes
//!   clients ◀─ response.rs ◀──┘  one thread per worker  │
//!   etcd ──▶ directory.rs ──▶ every worker, the pages, the links
//! ```
//!
//! Stateless but for its sessions. A gateway that dies loses nothing that was acknowledged, and nothing that was not is
//! applied twice. What a newcomer would get wrong: nothing here decides what an answer of a node means; that is the
//! machine's business. This crate decides what the outcome is called in HTTP ([`problem`], [`request`], [`response`]).

mod directory;
mod failure;
mod held;
mod http;
mod lanes;
mod linger;
mod links;
mod metrics;
mod openapi;
mod process;
mod readiness;
mod refusals;
mod reports;
mod session;
mod status;
mod worker;

pub mod problem;
pub mod request;
pub mod response;

use std::net::SocketAddr;

pub use process::{Fatal, serve};

/// A gateway's settings.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// What people call this gateway, in logs
    #[arg(long, env = "DKC_NAME", default_value = "gateway")]
    pub name: String,
    /// etcd's members
    #[arg(
        long,
        env = "DKC_ETCD",
        value_name = "HOST:PORT[,…]",
        value_delimiter = ',',
        default_value = "127.0.0.1:2379",
        value_parser = metastore::endpoint
    )]
    pub etcd: Vec<String>,
    /// Name of the cluster: several can share an etcd
    #[arg(long, env = "DKC_CLUSTER", default_value = "dkc", value_parser = metastore::cluster_name)]
    pub cluster: String,
    /// Where clients are served
    #[arg(
        long,
        env = "DKC_HTTP",
        value_name = "ADDR",
        default_value = "127.0.0.1:8080",
        value_parser = metastore::listened
    )]
    pub http: SocketAddr,
    /// Where /livez, /readyz and /metrics are served too, apart from the clients
    #[arg(long, env = "DKC_METRICS", value_name = "ADDR", value_parser = metastore::listened)]
    pub metrics: Option<SocketAddr>,
    /// Where grpc.health.v1 and reflection are served, nothing else [default: nowhere]
    #[arg(long, env = "DKC_GRPC", value_name = "ADDR", value_parser = metastore::listened)]
    pub grpc: Option<SocketAddr>,
    /// Threads that serve clients [default: the number of CPUs, at most 4]
    #[arg(long, env = "DKC_WORKERS", value_parser = clap::value_parser!(u16).range(1..=256))]
    pub workers: Option<u16>,
    /// Seconds without a sign of life after which etcd takes this gateway for dead
    #[arg(
        long,
        env = "DKC_LEASE_TTL",
        value_name = "SECONDS",
        default_value_t = 2,
        value_parser = clap::value_parser!(u32).range(1..=3600)
    )]
    pub lease_ttl: u32,
    /// Microseconds that increments wait for company before they are sent
    #[arg(
        long,
        env = "DKC_LINGER_US",
        value_name = "MICROSECONDS",
        default_value_t = 0,
        value_parser = clap::value_parser!(u64).range(..=1_000_000)
    )]
    pub linger_us: u64,
    /// Seconds that a connection may say nothing, take for the head of a request, or take nothing of an answer
    #[arg(
        long,
        env = "DKC_IDLE_TIMEOUT",
        value_name = "SECONDS",
        default_value_t = 75,
        value_parser = clap::value_parser!(u32).range(1..=3600)
    )]
    pub idle_timeout: u32,
}

/// Runs a gateway until SIGTERM or SIGINT. Returns the process's exit code (DESIGN §13).
pub fn run(options: Options) -> u8 {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => {
            tracing::error!(%error, "no runtime");
            return 1;
        }
    };
    let served = runtime.block_on(async {
        let stop = process::signalled()?;
        serve(options, |_| {}, stop).await
    });
    match served {
        Ok(()) => 0,
        Err(fatal) => {
            tracing::error!("{fatal}");
            fatal.exit_code()
        }
    }
}
