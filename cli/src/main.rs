//! `dkc`: roles, a local cluster, client commands and measurements in one binary.
//!
//! Each subcommand is a module with an `Args` and a function that returns a [`CommandExit`]. The
//! client commands depend on the HTTP API of the service only, so they work with every version
//! that implements it. The crate `client` alone decides which requests may be retried.

mod args;
mod backup_etcd;
mod bench_command;
mod check_config;
mod clock;
mod config;
mod coordinators;
mod count;
mod counters;
mod dev;
mod doctor;
mod etcd;
mod events;
mod exit;
mod node;
mod output;
mod plan;
mod ready;
mod rebalance;
mod recover_etcd;
mod scrub;
mod shards;
mod signals;
mod split;
mod status;

use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use engine::records::Meta;

use crate::config::{ConfigError, ParsedConfig, RoleArgs};
use crate::exit::CommandExit;
use crate::output::note;

// A role allocates many small values that live as long as a batch; glibc's allocator would not
// return their memory.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// Distributed counter service
#[derive(Parser)]
#[command(name = "dkc", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run a gateway, which serves the HTTP API
    Gateway(RoleArgs<gateway::Options>),
    /// Run a storage node, which holds copies of shards
    StorageNode(RoleArgs<storage_node::Options>),
    /// Run a coordinator; of several, one leads
    Coordinator(RoleArgs<coordinator::Options>),
    /// Run a local cluster with one process per role
    Dev(dev::Args),
    /// Count the lines of a file or stream, each line as a key
    Count(count::Args),
    /// Increment a counter and print its new value
    Incr(counters::IncrArgs),
    /// Print the values of counters
    Get(counters::GetArgs),
    /// Show nodes and shards, and why shards are not open
    Status(status::Args),
    /// Check whether a process is ready (GET /readyz); exits with 0 if it is
    Ready(ready::Args),
    /// Check this machine, its disk and etcd before a role runs here
    Doctor(doctor::Args),
    /// List, drain and remove storage nodes
    Node(node::Args),
    /// Show which copies and primaries move or wait, and why; or what a drain would move
    Plan(plan::Args),
    /// Show what happened in the cluster: nodes, primaries, copies, and the reasons
    Events(events::Args),
    /// Pause and resume the moves that only balance the load of nodes
    Rebalance(rebalance::Args),
    /// Verify all data on the disk of a node
    Scrub(scrub::Args),
    /// Split a shard, or recover one whose copies are lost
    Shards(shards::Args),
    /// Rebuild a lost etcd from the storage nodes
    RecoverEtcd(recover_etcd::Args),
    /// Save a snapshot of etcd, or check how old the last one is
    BackupEtcd(backup_etcd::Args),
    /// Measure throughput, latency and CPU of a running cluster
    Bench(bench_command::Args),
    /// Stop the processes of a `dkc dev` that died (started by `dkc dev`)
    #[command(hide = true)]
    Guard,
    /// Serve the same answer to every request (started by `dkc bench`)
    #[command(hide = true)]
    Hello,
}

fn main() -> ExitCode {
    let line: Vec<_> = std::env::args_os().collect();
    let parsed = match config::parse(Cli::command(), &line) {
        Ok(parsed) => parsed,
        // clap exits with 2 on wrong usage and with 0 on --help, as `CommandExit` does.
        Err(ConfigError::Usage(error)) => error.exit(),
        Err(ConfigError::File(why)) => {
            note!("error: {why}");
            return CommandExit::Usage.into();
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
            let warning = role.options.listen.oddity(&role.options.cluster);
            let check = |options: &storage_node::Options, _: Option<&Meta>| {
                options.check().map_err(|exit| exit.to_string())
            };
            return start(&parsed, role, warning, check, storage_node::run);
        }
        Command::Coordinator(role) => {
            let warning = role.options.listen.oddity(&role.options.cluster);
            let check = |options: &coordinator::Options, made: Option<&Meta>| {
                options.check().map_err(|exit| exit.to_string())?;
                made.and_then(|made| options.difference(made)).map_or(Ok(()), Err)
            };
            return start(&parsed, role, warning, check, coordinator::run);
        }
        Command::Guard => dev::guard::run(),
        Command::Bench(args) => bench_command::run(args),
        Command::Hello => bench_command::serve_hello(),
        Command::Dev(args) => block_on(dev::run(args)),
        Command::Count(args) => block_on(count::run(args)),
        Command::Incr(args) => block_on(counters::incr(args)),
        Command::Get(args) => block_on(counters::get(args)),
        Command::Doctor(args) => block_on(doctor::run(args)),
        Command::Node(args) => block_on(node::run(args)),
        Command::Plan(args) => block_on(plan::run(args)),
        Command::Events(args) => block_on(events::run(args)),
        Command::Rebalance(args) => block_on(rebalance::run(args)),
        Command::Scrub(args) => block_on(scrub::run(args)),
        Command::Shards(args) => block_on(shards::run(args)),
        Command::RecoverEtcd(args) => block_on(recover_etcd::run(args)),
        Command::BackupEtcd(args) => block_on(backup_etcd::run(args)),
        Command::Status(args) => block_on(status::run(args)),
        Command::Ready(args) => block_on(ready::run(args)),
    };
    end(ended)
}

fn end(ended: anyhow::Result<CommandExit>) -> ExitCode {
    let exit = ended.unwrap_or_else(|error| {
        note!("error: {error:#}");
        CommandExit::of_error(&error)
    });
    exit.into()
}

/// Runs a role, which has its own runtime and its own exit codes. `warning` concerns its
/// settings.
fn start<O: clap::Args>(
    parsed: &ParsedConfig,
    role: RoleArgs<O>,
    warning: Option<String>,
    check: impl Fn(&O, Option<&Meta>) -> Result<(), String>,
    run: impl FnOnce(O) -> u8,
) -> ExitCode {
    let warnings: Vec<_> = warning.into_iter().chain(parsed.unknown_variables()).collect();
    if role.check_config {
        let check = |made: Option<&Meta>| check(&role.options, made);
        return end(block_on(check_config::run(parsed, &warnings, check)));
    }
    let name = parsed.role().get_one::<String>("name").expect("every role has one");
    let _written = telemetry::logs(parsed.role_name(), name, role.log);
    warnings.iter().for_each(|warning| tracing::warn!("{warning}"));
    // Without a thread of its own the allocator returns memory only while it is used: an idle
    // process would keep what it freed after its peak.
    if let Err(error) = tikv_jemalloc_ctl::background_thread::write(true) {
        tracing::warn!(%error, "the allocator has no background thread, memory is returned late");
    }
    run(role.options).into()
}

/// Runs a command on one thread, which is enough: commands mostly wait for answers.
fn block_on(
    command: impl Future<Output = anyhow::Result<CommandExit>>,
) -> anyhow::Result<CommandExit> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let ended = runtime.block_on(command);
    // A DNS lookup may still run on a blocking thread: its result is not needed.
    runtime.shutdown_background();
    ended
}
