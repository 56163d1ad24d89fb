//! The process of a storage node, from its start to its exit code.

use std::future::Future;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use engine::ids::StoreBoot;
use engine::message::Report;
use engine::node::{Node, Settings};
use engine::records::{Meta, NodeRecord};
use metastore::{BootGuard, HeldKey, Lease, LeaseEvent, LeaseSettings, Metastore};
use telemetry::files::Connections;
use telemetry::{Failures, Health, Metrics, Vital};
use tokio::net::TcpListener;
use tokio::runtime::{Builder, Handle};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{oneshot, watch};
use tokio::time::timeout;
use tracing::{error, info, warn};

use crate::boot::{self, Booted, OpenDisk, Starting};
use crate::disk::{Disk, DiskSettings, MemoryPlan, Opened};
use crate::error::DiskError;
use crate::etcd::{Etcd, Followed};
use crate::exit::Exit;
use crate::files::FilePlan;
use crate::inbox::{Inbox, Told};
use crate::metrics::NodeMetrics;
use crate::names::Names;
use crate::node_loop::{Clock, Ended, NodeLoop, Parts, Pulse};
use crate::options::Options;
use crate::peers::Peers;
use crate::readiness::{CatchingUp, Readiness};
use crate::reports;
use crate::rpc::{self, Links, Services};
use crate::snapshot_transfer::Sender;

/// A process whose last fsync is older does not look alive.
const HEALTHY_WITHIN_MS: u64 = 1_000;
/// A disk without room is tried again this often.
const OPEN_AGAIN_EVERY: Duration = Duration::from_secs(1);
/// What a start waits for is said again this often.
const SAY_EVERY: Duration = Duration::from_secs(60);
/// Giving the lease back and closing the disk, each.
const STOP_STEP_TIMEOUT: Duration = Duration::from_secs(2);

/// Runs a storage node until SIGTERM or SIGINT, or until something ends it. Returns the exit code.
pub fn run(options: Options) -> u8 {
    // Sockets are busy where clients are; the loop and the disk have threads of their own.
    let threads = thread::available_parallelism().map_or(2, |cores| cores.get().clamp(2, 4));
    let runtime = Builder::new_multi_thread()
        .worker_threads(threads)
        .thread_name("dkc-net")
        .enable_all()
        .build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => {
            error!(%error, "no runtime");
            return 1;
        }
    };
    let code = match runtime.block_on(serve(options)) {
        Ok(()) => 0,
        Err(exit) => {
            error!(code = exit.code(), "{exit}");
            exit.code()
        }
    };
    // Waited for: tasks hold the state too, and RocksDB aborts a process that closes it while `exit` runs. What hangs is
    // left behind after a while.
    runtime.shutdown_timeout(STOP_STEP_TIMEOUT);
    code
}

async fn serve(options: Options) -> Result<(), Exit> {
    options.check()?;
    let files = FilePlan::of(telemetry::files::allowed(), options.memory_plan().open_files_max)?;
    let mut stop = std::pin::pin!(asked_to_stop()?);
    let health = Health::new("recovery");
    let metrics = NodeMetrics::default();
    let (vital, mut failures) = telemetry::vital();
    serve_metrics(&options, &health, &metrics, &vital).await?;
    let (inbox, told) = Inbox::new(options.memory_plan().intake_bytes);
    let starting = start(&options, files, &health, &inbox, told);
    let started = tokio::select! {
        started = starting => started?,
        why = failures.next() => return Err(Exit::Failed(why)),
        () = &mut stop => {
            info!("stopped before it had begun");
            return Ok(());
        }
    };
    let around = Around { files, health, metrics, inbox, vital, failures };
    run_node(started, options, around, stop).await
}

/// Resolves when a person or a supervisor wants the process to end.
fn asked_to_stop() -> Result<impl Future<Output = ()>, Exit> {
    let failed = |error| Exit::Failed(format!("no signals: {error}"));
    let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}

async fn serve_metrics(
    options: &Options,
    health: &Health,
    metrics: &NodeMetrics,
    vital: &Vital,
) -> Result<(), Exit> {
    let Some(address) = options.metrics else { return Ok(()) };
    let listener = TcpListener::bind(address).await.map_err(|error| {
        Exit::Usage(format!("--metrics {address}: can't listen there: {error}"))
    })?;
    let shown = Arc::new(Metrics::new(|registry| metrics.register(registry)));
    let serving = telemetry::serve(listener, health.clone(), shown);
    tokio::spawn(vital.forever("serving --metrics", serving));
    Ok(())
}

/// A node that knows who it is.
struct Started {
    disk: OpenDisk,
    opened: Opened,
    metastore: Metastore,
    meta: Meta,
    booted: Booted,
}

async fn start(
    options: &Options,
    files: FilePlan,
    health: &Health,
    inbox: &Inbox,
    told: std::sync::mpsc::Receiver<Told>,
) -> Result<Started, Exit> {
    let settings = disk_settings(options, files);
    let (disk, opened) = open_disk(settings, health, inbox).await?;
    let mut disk = OpenDisk::new(disk, opened.next_group, told);
    let metastore = boot::connect(options, health).await?;
    let meta = boot::meta(&metastore, health).await?;
    let keys = meta.idempotency;
    info!(
        window_s = keys.window_ms / 1_000,
        bytes_max = keys.bytes_max,
        requests_per_s = keys.requests_per_s(),
        "Idempotency-Keys are remembered for that long, in so many bytes, at this rate"
    );
    disk.disk.remove_expired(options.node_settings(&meta).limits());
    let identity = Starting { options, metastore: &metastore, meta: &meta, health };
    let booted = identity.identify(&mut disk, &opened).await?;
    Ok(Started { disk, opened, metastore, meta, booted })
}

/// Opens the disk, however long it takes until there is room to do it: a node that ends for want of room is started again
/// and waits here, its copies as they were.
async fn open_disk(
    settings: DiskSettings,
    health: &Health,
    inbox: &Inbox,
) -> Result<(Disk, Opened), Exit> {
    let mut said: Option<Instant> = None;
    let (disk, opened) = loop {
        let (settings, inbox) = (settings.clone(), inbox.clone());
        let opened = tokio::task::spawn_blocking(move || try_open(settings, inbox)).await;
        let error = match opened.map_err(|error| Exit::Failed(error.to_string()))? {
            Ok(opened) => break opened,
            Err(error) => error,
        };
        let Some(lack) = error.lack() else { return Err(error.into()) };
        health.not_ready(lack.reason());
        if said.is_none_or(|said| said.elapsed() >= SAY_EVERY) {
            said = Some(Instant::now());
            warn!(why = error.with_advice(), "the disk can't be opened yet: waits");
        }
        tokio::time::sleep(OPEN_AGAIN_EVERY).await;
    };
    health.not_ready("recovery");
    for damage in &opened.damage {
        error!(damage, "damage found on the disk");
    }
    Ok((disk, opened))
}

fn try_open(settings: DiskSettings, inbox: Inbox) -> Result<(Disk, Opened), DiskError> {
    let failures = inbox.clone();
    // Nobody hears it any more once the loop has ended, and then nobody needs to.
    Disk::open(
        settings,
        move |told| {
            inbox.tell(Told::Disk(told));
        },
        move |error| {
            failures.tell(Told::Exit(error.into()));
        },
    )
}

fn disk_settings(options: &Options, files: FilePlan) -> DiskSettings {
    let bytes = |bytes: u64| usize::try_from(bytes).unwrap_or(usize::MAX);
    let plan = MemoryPlan { open_files_max: files.sorted_files, ..options.memory_plan() };
    let defaults = DiskSettings::new(options.data.clone(), &plan);
    DiskSettings {
        segment_bytes: bytes(options.segment_bytes),
        block_bytes: bytes(options.log_block_bytes),
        log_keep_bytes: bytes(options.log_keep_bytes),
        log_slack_bytes: bytes(options.log_slack_bytes),
        ..defaults
    }
}

/// What a process has before it knows who it is.
struct Around {
    files: FilePlan,
    health: Health,
    metrics: NodeMetrics,
    inbox: Inbox,
    vital: Vital,
    failures: Failures,
}

/// From the moment that the identity is claimed to the end.
async fn run_node(
    started: Started,
    options: Options,
    around: Around,
    stop: impl Future<Output = ()>,
) -> Result<(), Exit> {
    let Around { files, health, metrics, inbox, vital, mut failures } = around;
    let Started { disk, opened, metastore, meta, booted } = started;
    let Booted { me, guard, listener, address, suspect } = booted;
    let clock = Clock::start();
    let pulse = Pulse::new(clock);
    let names = Names::default();
    names.note(me.store, &options.name);
    let etcd = Etcd::new(metastore.clone(), inbox.clone(), vital.clone(), meta.incarnation);
    let readiness = Readiness::new(health.clone());
    let (reports, newest_report) = watch::channel(Report::default());

    let limits = options.limits();
    let services = Services {
        inbox: inbox.clone(),
        me,
        cluster: meta.cluster,
        links: Links::default(),
        staging: disk.disk.staging(),
        limits,
        vital: vital.clone(),
    };
    let parts = Parts {
        node: node(&options, &meta, me, suspect, disk.next_group, opened.replicas, clock),
        disk: disk.disk,
        told: disk.told,
        clock,
        pulse: pulse.clone(),
        etcd: etcd.clone(),
        copies: Sender::new(meta.cluster, me, inbox.clone(), limits),
        reports,
        metrics,
        names: names.clone(),
        catching_up: CatchingUp::new(me.store, readiness.clone()),
        vital: vital.clone(),
        runtime: Handle::current(),
    };
    let mut ended = start_loop(parts, disk.early)?;

    let connections = Connections::new(files.connections);
    let server = tokio::spawn(rpc::serve(listener, connections, services, health.clone()));
    let peers = Peers::new(me.store, meta.cluster, inbox.clone(), limits, vital.clone());
    let followed = Followed { etcd, me, peers, names, readiness: readiness.clone() };
    tokio::spawn(vital.forever("following etcd", followed.run()));
    let (store, cluster) = (metastore.clone(), meta.cluster);
    let reporting = reports::send_all(store, cluster, me, newest_report, inbox.clone());
    tokio::spawn(vital.job("reporting", reporting));
    let record = NodeRecord {
        boot: me.boot,
        address,
        capacity: opened.capacity,
        versions: (proto::VERSION_OLDEST, proto::VERSION),
    };
    let lease =
        metastore.hold(vec![HeldKey::node(&record, guard)], lease_settings(&options, &pulse));
    let lease = Registration::supervise(lease, inbox.clone(), readiness.clone(), &vital);

    let order = tokio::select! {
        end = &mut ended => return finish(end, lease, &metastore, guard).await,
        () = stop => Told::Stop,
        why = failures.next() => Told::Exit(Exit::Failed(why)),
        served = server => {
            let why = match served {
                Ok(Ok(())) => "it ended".to_owned(),
                Ok(Err(error)) => error.to_string(),
                Err(error) => error.to_string(),
            };
            Told::Exit(Exit::Failed(format!("the gRPC server failed: {why}")))
        }
    };
    readiness.over("stopping");
    inbox.tell(order);
    finish(ended.await, lease, &metastore, guard).await
}

/// The machine, with what recovery found.
fn node(
    options: &Options,
    meta: &Meta,
    me: StoreBoot,
    suspect: bool,
    next_group: u64,
    mut replicas: Vec<engine::node::RecoveredReplica>,
    clock: Clock,
) -> Node {
    if suspect {
        // Nobody knows what else is wrong on this disk: none of its copies is to be promoted, all are to be filled anew.
        for content in replicas.iter_mut().filter_map(|replica| replica.content.as_mut()) {
            content.suspect = true;
        }
    }
    info!(replicas = replicas.len(), "recovered");
    let settings = Settings { suspect, ..options.node_settings(meta) };
    Node::new(settings, me, clock.now(), next_group, replicas)
}

/// How the loop ended, and its disk, which may take long to close.
type LoopEnd = Result<(Ended, Disk), oneshot::error::RecvError>;

fn start_loop(
    parts: Parts,
    early: Vec<engine::node::Event>,
) -> Result<oneshot::Receiver<(Ended, Disk)>, Exit> {
    let (end, ended) = oneshot::channel();
    let body = move || {
        // If nobody waits for it the process is ending anyway.
        let _unheard = end.send(NodeLoop::new(parts).run(early));
    };
    let thread = thread::Builder::new().name("dkc-loop".into()).spawn(body);
    thread.map_err(|error| Exit::Failed(format!("no thread for the loop: {error}")))?;
    Ok(ended)
}

fn lease_settings(options: &Options, pulse: &Pulse) -> LeaseSettings {
    let pulse = pulse.clone();
    LeaseSettings {
        ttl_s: options.lease_ttl,
        healthy: Arc::new(move || pulse.age_ms() < HEALTHY_WITHIN_MS),
        ..LeaseSettings::default()
    }
}

async fn finish(
    end: LoopEnd,
    lease: Registration,
    metastore: &Metastore,
    guard: BootGuard,
) -> Result<(), Exit> {
    // Its thread panicked; the message is in the log.
    let (end, disk) = end.map_err(|_| Exit::Failed("the loop failed".into()))?;
    match end {
        Ended::Stopped => {
            if timeout(STOP_STEP_TIMEOUT, lease.give_back()).await.is_err() {
                warn!("lease not given back: it runs out by itself");
            }
            let closing = tokio::task::spawn_blocking(move || drop(disk));
            if timeout(STOP_STEP_TIMEOUT, closing).await.is_err() {
                warn!("ended before the disk was closed; nothing is lost by that");
            }
            info!("stopped");
            Ok(())
        }
        Ended::Exit(exit) => {
            // Its threads may hang in the very call that failed: they end with the process.
            std::mem::forget(disk);
            if matches!(exit, Exit::Disk(_)) {
                boot::note_suspect(metastore, guard).await;
            }
            Err(exit)
        }
    }
}

/// This process's key in etcd, for as long as it lives.
struct Registration {
    stop: oneshot::Sender<()>,
    task: tokio::task::JoinHandle<()>,
}

impl Registration {
    fn supervise(lease: Lease, inbox: Inbox, readiness: Readiness, vital: &Vital) -> Self {
        let (stop, stopped) = oneshot::channel();
        let supervising = supervise(lease, inbox, readiness, stopped);
        Self { stop, task: tokio::spawn(vital.job("the registration", supervising)) }
    }

    /// So that others need not wait until it runs out.
    async fn give_back(self) {
        // A task that has ended has nothing to give back.
        let _ended = self.stop.send(());
        let _failed = self.task.await;
    }
}

async fn supervise(
    mut lease: Lease,
    inbox: Inbox,
    readiness: Readiness,
    mut stopped: oneshot::Receiver<()>,
) {
    loop {
        let event = tokio::select! {
            event = lease.next() => event,
            _ = &mut stopped => return lease.stop().await,
        };
        match event {
            Some(LeaseEvent::Registered { created, .. }) => {
                info!(created, "registered");
                readiness.registered();
            }
            Some(LeaseEvent::Confirmed) => {
                inbox.event(engine::node::Event::LeaseConfirmed);
            }
            Some(LeaseEvent::Granted { .. }) => {}
            Some(LeaseEvent::Lost) => warn!("registration lost, making it again"),
            Some(LeaseEvent::Superseded { boot }) => {
                inbox.tell(Told::Exit(Exit::Refused(format!(
                    "boot {} of this store has begun elsewhere",
                    boot.0
                ))));
            }
            None => return,
        }
    }
}
