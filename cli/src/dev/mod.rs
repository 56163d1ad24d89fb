//! `dkc dev`: a whole local cluster, every role a process of its own.
//!
//! It knows the roles by their command lines only, and starts its own executable for each. Its
//! folder holds everything: data, logs, `dev.json` (settings and ports, so that it resumes as the
//! same cluster) and `cluster.json` (what runs now). One `dkc dev` per folder, by a lock.

pub(crate) mod cluster_file;
mod etcd;
pub(crate) mod guard;
mod plan;
mod process;
mod ready;
mod supervisor;

use std::fs::{self, File};
use std::net::SocketAddr;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use bench::http::Url;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinHandle;

use self::cluster_file::Role;
use self::plan::{Settings, Wish};
use self::supervisor::{Ended, Supervisor};
use crate::exit::Exit;
use crate::output;

/// How often the processes are looked at; `cluster.json` promises to be true within 1 s.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// The exit code of a role whose flags or settings are wrong (DESIGN §13).
const BAD_CONFIG: i32 = 2;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Storage nodes [default: 3, or as the folder remembers]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=100))]
    nodes: Option<u32>,
    /// Gateways [default: 1]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=100))]
    gateways: Option<u32>,
    /// Coordinators [default: 1]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=100))]
    coordinators: Option<u32>,
    /// Copies of each shard [default: 3, or as many as nodes]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=100))]
    replicas: Option<u32>,
    /// In-sync copies below which writes are refused [default: 2, or as many as replicas]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=100))]
    min_in_sync: Option<u32>,
    /// Shards, fixed for good when the cluster is made [default: 24]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    shards: Option<u32>,
    /// Folder for data, logs and cluster.json
    #[arg(long, value_name = "DIR", default_value = "dkc-data")]
    data: PathBuf,
    /// Where the first gateway listens [default: 127.0.0.1:8080]
    #[arg(long, value_name = "ADDRESS", value_parser = metastore::listened)]
    http: Option<SocketAddr>,
    /// Use this etcd, not a private one
    #[arg(
        long,
        value_name = "HOST:PORT[,…]",
        value_delimiter = ',',
        value_parser = metastore::endpoint
    )]
    etcd: Vec<String>,
    /// Start a process that died again, after 2 s
    #[arg(long)]
    respawn: bool,
    /// Nodes whose data is gone for good, by name: their folders are taken as empty ones
    #[arg(long, value_name = "NAME[,…]")]
    replace: Option<String>,
    /// The executable to start for each role, instead of this one
    #[arg(long, hide = true)]
    program: Option<PathBuf>,
    /// Flags for the roles, such as --log-keep-bytes (nodes) or --rebuild-delay (coordinators)
    #[arg(last = true, value_name = "FLAGS")]
    extra: Vec<String>,
}

/// Starts the cluster and keeps it until Ctrl-C or SIGTERM.
pub(crate) async fn run(args: Args) -> anyhow::Result<Exit> {
    // From here on a signal stops what was started, however early it comes.
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hangup = signal(SignalKind::hangup())?;

    make_private(&args.data).with_context(|| args.data.display().to_string())?;
    let folder = args.data.canonicalize().with_context(|| args.data.display().to_string())?;
    let Some(_lock) = lock(&folder)? else {
        output::note(&format!("error: another dkc dev runs on {}", folder.display()));
        return Ok(Exit::Usage);
    };
    let settings = match settle(&args, &folder)? {
        Ok(settings) => settings,
        Err(why) => {
            output::note(&format!("error: {why}"));
            return Ok(Exit::Usage);
        }
    };
    let program = match &args.program {
        Some(program) => program.clone(),
        None => std::env::current_exe().context("where this program is")?,
    };
    output::note(&format!("data and logs in {}", folder.display()));

    let mut supervisor = Supervisor::new(&folder, args.respawn, args.replace.clone())?;
    let supervised = tokio::select! {
        ended = supervise(&args, &settings, &folder, &program, &mut supervisor) => ended,
        _ = interrupt.recv() => Ok(Exit::Done),
        _ = terminate.recv() => Ok(Exit::Done),
        // The terminal was closed.
        _ = hangup.recv() => Ok(Exit::Done),
    };
    // Also after an error: nothing that was started may stay.
    output::note("stopping");
    tokio::task::spawn_blocking(move || supervisor.stop()).await?.context("stopping")?;
    supervised
}

/// Keys that were counted are in the data: other users of this machine have no business there.
fn make_private(folder: &Path) -> std::io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)
}

fn lock(folder: &Path) -> anyhow::Result<Option<File>> {
    let file = File::options().create(true).append(true).open(folder.join("dev.lock"))?;
    match file.try_lock() {
        Ok(()) => Ok(Some(file)),
        Err(fs::TryLockError::WouldBlock) => Ok(None),
        Err(fs::TryLockError::Error(error)) => Err(error).context("locking the folder"),
    }
}

/// The settings to run with, kept for the next time; or why there are none.
fn settle(args: &Args, folder: &Path) -> anyhow::Result<Result<Settings, String>> {
    let path = folder.join("dev.json");
    let kept: Option<Settings> = match fs::read(&path) {
        Ok(text) => Some(serde_json::from_slice(&text).context("dev.json")?),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
        Err(error) => return Err(error).context("dev.json"),
    };
    let wish = Wish {
        nodes: args.nodes,
        gateways: args.gateways,
        coordinators: args.coordinators,
        replicas: args.replicas,
        min_in_sync: args.min_in_sync,
        shards: args.shards,
        http: args.http,
    };
    let chosen = Settings::new(&wish, kept.as_ref())
        .and_then(|mut settings| settings.choose_ports(args.etcd.is_empty()).map(|()| settings));
    if let Ok(settings) = &chosen {
        cluster_file::replace(&path, settings).context("dev.json")?;
    }
    Ok(chosen)
}

/// Starts everything in order, says `ready`, and watches. Ends only when something is wrong.
async fn supervise(
    args: &Args,
    settings: &Settings,
    folder: &Path,
    program: &Path,
    supervisor: &mut Supervisor,
) -> anyhow::Result<Exit> {
    let etcd = match args.etcd.as_slice() {
        endpoints @ [_, ..] => endpoints.join(","),
        [] => {
            let found = match etcd::find() {
                Ok(found) => found,
                Err(why) => {
                    output::note(&format!("error: {why}"));
                    return Ok(Exit::Usage);
                }
            };
            let spec = settings.etcd(&found, folder);
            let address = spec.addresses["grpc"].clone();
            supervisor.start(spec).context("starting etcd")?;
            let url = parse_url(&format!("http://{address}"))?;
            let healthy = tokio::spawn(ready::etcd(url));
            if let Some(exit) = watch_until(supervisor, healthy).await? {
                return Ok(exit);
            }
            address
        }
    };
    for spec in settings.roles(&program.display().to_string(), folder, &etcd, &args.extra) {
        let name = spec.name.clone();
        supervisor.start(spec).with_context(|| format!("starting {name}"))?;
    }
    let urls: anyhow::Result<Vec<Url>> = settings
        .gateway_addresses()
        .iter()
        .map(|address| parse_url(&format!("http://{address}")))
        .collect();
    let open = tokio::spawn(ready::gateways(urls?));
    if let Some(exit) = watch_until(supervisor, open).await? {
        return Ok(exit);
    }
    output::result(&format!("ready http://{}", settings.http))?;
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        for ended in supervisor.look()? {
            tell(&ended, supervisor);
        }
    }
}

fn parse_url(text: &str) -> anyhow::Result<Url> {
    Url::parse(text).map_err(anyhow::Error::msg)
}

/// Watches until `milestone` is reached, or something ended that it can't be reached without.
async fn watch_until(
    supervisor: &mut Supervisor,
    mut milestone: JoinHandle<()>,
) -> anyhow::Result<Option<Exit>> {
    loop {
        tokio::select! {
            reached = &mut milestone => return reached.map(|()| None).context("waiting"),
            () = tokio::time::sleep(LOOK_EVERY) => {}
        }
        for ended in supervisor.look()? {
            tell(&ended, supervisor);
            let fatal = match (ended.role, ended.status.code()) {
                (Role::Etcd, _) => Some(Exit::Failed),
                (_, Some(BAD_CONFIG)) => Some(Exit::Usage),
                _ => None,
            };
            if fatal.is_some() {
                milestone.abort();
                return Ok(fatal);
            }
        }
    }
}

fn tell(ended: &Ended, supervisor: &Supervisor) {
    let Ended { name, status, .. } = ended;
    let log = supervisor.log_file(name);
    output::note(&format!("{name} ended: {status}; {}:", log.display()));
    let lines = ready::last_lines(&log);
    if !lines.is_empty() {
        output::note(&lines);
    }
}
