//! `dkc`: roles, a local cluster, client commands and measurements in one binary.
//!
//! Each subcommand is a module with an `Args` and a function that ends in an [`Exit`]. The client
//! commands know the service by its HTTP contract only, so they work against any version that
//! speaks it. What they may retry is decided in [`answer`] and `bench::http`, nowhere else.

mod answer;
mod bench_command;
mod client;
mod count;
mod counters;
mod dev;
mod drain;
mod exit;
mod output;
mod status;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::exit::Exit;

// Many small values that live as long as a batch does; glibc's allocator keeps their memory.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// Counts things, exactly, across many machines.
#[derive(Parser)]
#[command(name = "dkc", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run a gateway: HTTP in, batches to storage nodes out
    Gateway(gateway::Options),
    /// Run a storage node
    StorageNode(storage_node::Options),
    /// Run a coordinator; any number may run, one leads
    Coordinator(coordinator::Options),
    /// Run a whole local cluster, every role a process of its own
    Dev(dev::Args),
    /// Count every line of a file as a key
    Count(count::Args),
    /// Add to a counter and print its new value
    Incr(counters::IncrArgs),
    /// Print the values of counters
    Get(counters::GetArgs),
    /// Show nodes, shards and which shards are not open
    Status(status::Args),
    /// Empty a node, so that its machine may be switched off
    Drain(drain::Args),
    /// Measure a running cluster: rate, latency, CPU of each role
    Bench(bench_command::Args),
    /// Ends the processes of a cluster whose `dkc dev` died (started by it)
    #[command(hide = true)]
    Guard,
}

fn main() -> ExitCode {
    // clap ends with 2 on wrong usage and 0 on --help, as DESIGN §13 wants.
    let cli = Cli::parse();
    let ended = match cli.command {
        // The roles bring runtimes of their own and end with their own code.
        Command::Gateway(options) => return gateway::run(options).into(),
        Command::StorageNode(options) => return storage_node::run(options).into(),
        Command::Coordinator(options) => return coordinator::run(options).into(),
        Command::Guard => dev::guard::run(),
        Command::Bench(args) => bench_command::run(args),
        Command::Dev(args) => block_on(dev::run(args)),
        Command::Count(args) => block_on(count::run(args)),
        Command::Incr(args) => block_on(counters::incr(args)),
        Command::Get(args) => block_on(counters::get(args)),
        Command::Drain(args) => block_on(drain::run(args)),
        Command::Status(args) => block_on(status::run(args)),
    };
    ended
        .unwrap_or_else(|error| {
            output::note(&format!("error: {error:#}"));
            Exit::Failed
        })
        .into()
}

/// One thread is enough for every command: what they do is wait for answers.
fn block_on(command: impl Future<Output = anyhow::Result<Exit>>) -> anyhow::Result<Exit> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(command)
}
