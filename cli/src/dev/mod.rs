//! `dkc dev`: runs a local cluster with one process per role.
//!
//! The module depends on the command lines of the roles only, and starts its own executable for
//! each. Its folder contains everything: data, logs, `dev.json` (settings and ports, so that the
//! same cluster is started again) and `cluster.json` (the running processes). A lock allows one
//! `dkc dev` per folder. `dkc dev add-node` and `remove-node` ask it by a socket (`control`).

pub(crate) mod cluster_file;
mod control;
pub(crate) mod etcd;
pub(crate) mod guard;
mod node_commands;
mod nodes;
mod plan;
pub(crate) mod process;
pub(crate) mod ready;
mod supervisor;

use std::fs::{self, File};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use client::Url;
use tokio::task::JoinHandle;

use self::cluster_file::ProcessRole;
use self::control::ControlSocket;
use self::nodes::LocalNodes;
use self::plan::{DevOptions, DevSettings};
use self::supervisor::{ExitedProcess, Supervisor};
use crate::exit::{CommandExit, UsageError};
use crate::output::{self, note};
use crate::signals::Signals;

/// The interval of checks of the processes; `cluster.json` is promised to be correct within 1 s.
const POLL_INTERVAL: Duration = Duration::from_millis(100);
/// The exit code of a role with wrong flags or settings.
const BAD_CONFIG: i32 = 2;

/// Options of `dkc dev`.
#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Option<DevCommand>,
    #[command(flatten)]
    options: DevOptions,
    /// Directory for data, logs and cluster.json
    #[arg(long, value_name = "DIR", default_value = "dkc-data")]
    data: PathBuf,
    /// Use this etcd instead of a private one
    #[arg(
        long,
        value_name = "HOST:PORT[,…]",
        value_delimiter = ',',
        value_parser = metastore::endpoint
    )]
    etcd: Vec<String>,
    /// Restart processes that died, after 2 s
    #[arg(long)]
    respawn: bool,
    /// Names of nodes whose data is lost for good: they start with empty stores
    #[arg(long, value_name = "NAME[,…]")]
    replace: Option<String>,
    /// Executable to start for each role instead of this one
    #[arg(long, hide = true)]
    program: Option<PathBuf>,
    /// Flags for the roles, for example --log-keep-bytes (nodes) or --rebuild-delay (coordinators)
    #[arg(last = true, value_name = "FLAGS")]
    extra: Vec<String>,
}

/// Commands for a local cluster that runs.
#[derive(Debug, clap::Subcommand)]
enum DevCommand {
    /// Start more storage nodes under the running `dkc dev`
    AddNode(node_commands::AddArgs),
    /// Drain and stop a storage node of the running `dkc dev`, and take it out of the cluster
    RemoveNode(node_commands::DevRemoveArgs),
}

/// Starts the cluster and supervises it until Ctrl-C or SIGTERM, or runs one of the commands.
pub(crate) async fn run(mut args: Args) -> anyhow::Result<CommandExit> {
    match args.command.take() {
        None => start(args).await,
        Some(DevCommand::AddNode(args)) => node_commands::add(args).await,
        Some(DevCommand::RemoveNode(args)) => node_commands::remove(args).await,
    }
}

async fn start(args: Args) -> anyhow::Result<CommandExit> {
    // Signals are caught before the first process is started: each signal stops all of them.
    let mut signals = Signals::catch()?;

    make_private(&args.data).with_context(|| args.data.display().to_string())?;
    let folder = args.data.canonicalize().with_context(|| args.data.display().to_string())?;
    let Some(_lock) = lock_of(&folder)? else {
        let why = format!("another dkc dev is running on {}", folder.display());
        return CommandExit::usage(why);
    };
    let settings = settle(&args, &folder)?;
    let program = match &args.program {
        Some(program) => program.clone(),
        None => std::env::current_exe().context("path of this executable")?,
    };
    note!("data and logs in {}", folder.display());

    let mut supervisor = Supervisor::new(&folder, args.respawn, args.replace.clone())?;
    let supervised = tokio::select! {
        ended = supervise(&args, settings, &folder, &program, &mut supervisor) => ended,
        () = signals.next() => Ok(CommandExit::Done),
    };
    // Processes are stopped after an error, too.
    note!("stopping");
    tokio::task::spawn_blocking(move || supervisor.stop()).await?.context("stopping")?;
    supervised
}

/// Creates the folder for this user only: the data contains keys, which other users must not read.
fn make_private(folder: &Path) -> std::io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)
}

/// Locks the folder for this process; `None` if another one has locked it.
fn lock_of(folder: &Path) -> anyhow::Result<Option<File>> {
    let file = File::options().create(true).append(true).open(folder.join("dev.lock"))?;
    match file.try_lock() {
        Ok(()) => Ok(Some(file)),
        Err(fs::TryLockError::WouldBlock) => Ok(None),
        Err(fs::TryLockError::Error(error)) => Err(error).context("locking the folder"),
    }
}

/// Chooses the settings and stores them for the next start.
fn settle(args: &Args, folder: &Path) -> anyhow::Result<DevSettings> {
    let path = folder.join("dev.json");
    let kept: Option<DevSettings> = match fs::read(&path) {
        Ok(text) => Some(serde_json::from_slice(&text).context("dev.json")?),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
        Err(error) => return Err(error).context("dev.json"),
    };
    let mut settings = DevSettings::new(&args.options, kept.as_ref()).map_err(UsageError)?;
    settings.choose_ports(args.etcd.is_empty()).map_err(UsageError)?;
    keep(folder, &settings)?;
    Ok(settings)
}

/// Stores the settings for the next start.
fn keep(folder: &Path, settings: &DevSettings) -> anyhow::Result<()> {
    cluster_file::replace(&folder.join("dev.json"), settings).context("dev.json")
}

/// Starts all processes in order, prints `ready`, and supervises them. Returns only on a failure.
async fn supervise(
    args: &Args,
    settings: DevSettings,
    folder: &Path,
    program: &Path,
    supervisor: &mut Supervisor,
) -> anyhow::Result<CommandExit> {
    let etcd = match args.etcd.as_slice() {
        endpoints @ [_, ..] => endpoints.join(","),
        [] => {
            let found = match etcd::find() {
                Ok(found) => found,
                Err(why) => return CommandExit::usage(why),
            };
            let spec = settings.etcd(&found, folder);
            let address = spec.addresses["grpc"].clone();
            supervisor.start(spec).context("starting etcd")?;
            let healthy = tokio::spawn(ready::etcd(url_of(&address)?));
            if let Some(exit) = watch_until(supervisor, healthy).await? {
                return Ok(exit);
            }
            address
        }
    };
    let program = program.display().to_string();
    for spec in settings.roles(&program, folder, &etcd, &args.extra) {
        let name = spec.name.clone();
        supervisor.start(spec).with_context(|| format!("starting {name}"))?;
    }
    let gateways = settings.gateway_addresses();
    let urls = gateways.iter().map(|address| url_of(address)).collect::<Result<_, _>>()?;
    let open = tokio::spawn(ready::gateways(urls));
    if let Some(exit) = watch_until(supervisor, open).await? {
        return Ok(exit);
    }
    let mut control = ControlSocket::open(folder).context("dev.sock")?;
    output::result(&format!("ready http://{}", settings.http))?;
    let mut nodes = LocalNodes { settings, folder, program, etcd, extra: &args.extra };
    loop {
        tokio::select! {
            () = tokio::time::sleep(POLL_INTERVAL) => {}
            (request, reply) = control.next() => {
                // The command may have gone.
                drop(reply.send(nodes.answer(request, supervisor)));
            }
        }
        for ended in supervisor.poll()? {
            report_exit(&ended, supervisor);
        }
    }
}

fn url_of(address: &str) -> anyhow::Result<Url> {
    Url::parse(&format!("http://{address}")).map_err(anyhow::Error::msg)
}

/// Supervises the processes until `milestone` is reached, or until a process ended without which it
/// cannot be reached.
async fn watch_until(
    supervisor: &mut Supervisor,
    mut milestone: JoinHandle<()>,
) -> anyhow::Result<Option<CommandExit>> {
    loop {
        tokio::select! {
            reached = &mut milestone => return reached.map(|()| None).context("waiting"),
            () = tokio::time::sleep(POLL_INTERVAL) => {}
        }
        for ended in supervisor.poll()? {
            report_exit(&ended, supervisor);
            let fatal = match (ended.role, ended.status.code()) {
                (ProcessRole::Etcd, _) => Some(CommandExit::Failed),
                (_, Some(BAD_CONFIG)) => Some(CommandExit::Usage),
                _ => None,
            };
            if fatal.is_some() {
                milestone.abort();
                return Ok(fatal);
            }
        }
    }
}

/// Prints how a process ended, with the last lines of its log.
fn report_exit(ended: &ExitedProcess, supervisor: &Supervisor) {
    let ExitedProcess { name, status, .. } = ended;
    if ended.is_stopped {
        note!("{name} ended, as a command has asked: {status}");
        return;
    }
    let log = supervisor.log_file(name);
    note!("{name} ended: {status}; {}:", log.display());
    let lines = ready::last_lines(&log);
    if !lines.is_empty() {
        note!("{lines}");
    }
}
