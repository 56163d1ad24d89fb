//! `dkc`: roles, a local cluster, client commands and measurements in one binary.
//!
//! Each subcommand is a module with an `Args` and a function that ends in an [`Exit`]. The client
//! commands know the service by its HTTP contract only, so they work against any version that
//! speaks it. What they may retry is decided in [`answer`] and `bench::http`, nowhere else.

mod answer;
mod bench_command;
mod check_config;
mod client;
mod config;
mod count;
mod counters;
mod dev;
mod doctor;
mod drain;
mod etcd;
mod exit;
mod output;
mod ready;
mod scrub;
mod shards;
mod status;

use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use engine::records::Meta;

use crate::config::{Parsed, Refused, Role};
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
    Gateway(Role<gateway::Options>),
    /// Run a storage node
    StorageNode(Role<storage_node::Options>),
    /// Run a coordinator; any number may run, one leads
    Coordinator(Role<coordinator::Options>),
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
    /// Ask whether a process is ready (GET /readyz); ends with 0 if it is: for health checks
    Ready(ready::Args),
    /// Tell whether this machine, a disk and an etcd are fit for a role, and what to do if not
    Doctor(doctor::Args),
    /// Empty a node, so that its machine may be switched off
    Drain(drain::Args),
    /// Have a node read and check everything on its disk
    Scrub(scrub::Args),
    /// Give a shard that waits for lost copies a primary
    Shards(shards::Args),
    /// Measure a running cluster: rate, latency, CPU of each role
    Bench(bench_command::Args),
    /// Ends the processes of a cluster whose `dkc dev` died (started by it)
    #[command(hide = true)]
    Guard,
}

fn main() -> ExitCode {
    let line: Vec<_> = std::env::args_os().collect();
    let parsed = match config::parse(Cli::command(), &line) {
        Ok(parsed) => parsed,
        // clap ends with 2 on wrong usage and 0 on --help, as DESIGN §13 wants.
        Err(Refused::Usage(error)) => error.exit(),
        Err(Refused::File(why)) => {
            output::note(&format!("error: {why}"));
            return Exit::Usage.into();
        }
    };
    let cli = Cli::from_arg_matches(&parsed.matches).unwrap_or_else(|error| error.exit());
    let ended = match cli.command {
        Command::Gateway(role) => {
            let check = |options: &gateway::Options, _: Option<&Meta>| {
                options.check().map_err(|fatal| fatal.to_string())
            };
            return start(&parsed, role, None, check, gateway::run);
        }
        Command::StorageNode(role) => {
            let oddity = role.options.oddity();
            let check = |options: &storage_node::Options, _: Option<&Meta>| {
                options.check().map_err(|exit| exit.to_string())
            };
            return start(&parsed, role, oddity, check, storage_node::run);
        }
        Command::Coordinator(role) => {
            let oddity = role.options.oddity();
            let check = |options: &coordinator::Options, made: Option<&Meta>| {
                options.check().map_err(|exit| exit.to_string())?;
                made.and_then(|made| options.difference(made)).map_or(Ok(()), Err)
            };
            return start(&parsed, role, oddity, check, coordinator::run);
        }
        Command::Guard => dev::guard::run(),
        Command::Bench(args) => bench_command::run(args),
        Command::Dev(args) => block_on(dev::run(args)),
        Command::Count(args) => block_on(count::run(args)),
        Command::Incr(args) => block_on(counters::incr(args)),
        Command::Get(args) => block_on(counters::get(args)),
        Command::Doctor(args) => block_on(doctor::run(args)),
        Command::Drain(args) => block_on(drain::run(args)),
        Command::Scrub(args) => block_on(scrub::run(args)),
        Command::Shards(args) => block_on(shards::run(args)),
        Command::Status(args) => block_on(status::run(args)),
        Command::Ready(args) => block_on(ready::run(args)),
    };
    end(ended)
}

fn end(ended: anyhow::Result<Exit>) -> ExitCode {
    ended
        .unwrap_or_else(|error| {
            output::note(&format!("error: {error:#}"));
            Exit::Failed
        })
        .into()
}

/// A role brings a runtime of its own and ends with its own code. `oddity` is what is odd about its settings.
fn start<O: clap::Args>(
    parsed: &Parsed,
    role: Role<O>,
    oddity: Option<String>,
    check: impl Fn(&O, Option<&Meta>) -> Result<(), String>,
    run: impl FnOnce(O) -> u8,
) -> ExitCode {
    let oddities: Vec<_> = oddity.into_iter().chain(parsed.unknown_variables()).collect();
    if role.check_config {
        let check = |made: Option<&Meta>| check(&role.options, made);
        return end(block_on(check_config::run(parsed, &oddities, check)));
    }
    let name = parsed.role().get_one::<String>("name").expect("every role has one");
    let _written = telemetry::logs(parsed.role_name(), name, role.log);
    oddities.iter().for_each(|oddity| tracing::warn!("{oddity}"));
    run(role.options).into()
}

/// One thread is enough for every command: what they do is wait for answers.
fn block_on(command: impl Future<Output = anyhow::Result<Exit>>) -> anyhow::Result<Exit> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let ended = runtime.block_on(command);
    // A name may still be looked up; nobody waits for that.
    runtime.shutdown_background();
    ended
}
