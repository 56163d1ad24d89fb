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
mod exit;
mod output;
mod status;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::exit::Exit;

/// Counts things, exactly, across many machines.
#[derive(Parser)]
#[command(name = "dkc", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
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
    /// Measure a running cluster: rate, latency, CPU of each role
    Bench(bench_command::Args),
    /// Ends the processes of a cluster whose `dkc dev` died (started by it)
    #[command(hide = true)]
    Guard,
}

fn main() -> ExitCode {
    // clap ends with 2 on wrong usage and 0 on --help, as DESIGN §13 wants.
    let cli = Cli::parse();
    // The roles belong here, before this runtime: they bring runtimes of their own.
    let ended = match cli.command {
        Command::Guard => dev::guard::run(),
        command => tokio::runtime::Builder::new_multi_thread()
            .enable_all()
            .build()
            .map_err(Into::into)
            .and_then(|runtime| runtime.block_on(run(command))),
    };
    ended
        .unwrap_or_else(|error| {
            output::note(&format!("error: {error:#}"));
            Exit::Failed
        })
        .into()
}

async fn run(command: Command) -> anyhow::Result<Exit> {
    match command {
        Command::Dev(args) => dev::run(args).await,
        Command::Count(args) => count::run(args).await,
        Command::Incr(args) => counters::incr(args).await,
        Command::Get(args) => counters::get(args).await,
        Command::Status(args) => status::run(args).await,
        Command::Bench(args) => bench_command::run(args).await,
        Command::Guard => unreachable!("handled without a runtime"),
    }
}
