//! The process of a storage node, from its start to its exit code.

use std::future::Future;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use engine::ids::StoreBoot;
use engine::message::HealthReport;
use engine::node::{Node, Settings};
use engine::records::{Meta, NodeRecord};
use metastore::{BootGuard, HeldKey, Lease, LeaseEvent, LeaseSettings, Metastore};
use process::{ProcessExit, StopSignals};
use telemetry::files::ConnectionLimit;
use telemetry::{CriticalTasks, Health, Metrics, TaskFailures};
use tokio::runtime::{Builder, Handle};
use tokio::sync::{oneshot, watch};
use tokio::time::timeout;
use tracing::{error, info, warn};

use crate::boot::{self, Booted, OpenDisk, StartUp};
use crate::disk::{Disk, DiskContents, DiskSettings, MemoryPlan};
use crate::error::DiskError;
use crate::etcd::{EtcdClient, EtcdFollower};
use crate::files::FilePlan;
use crate::inbox::{Inbox, LoopMessage};
use crate::metrics::NodeMetrics;
use crate::names::StoreNames;
use crate::node_loop::{LastFsync, LoopClock, LoopEnd, NodeLoop, Parts};
use crate::options::Options;
use crate::peers::Peers;
use crate::readiness::{CatchUpTracker, NodeReadiness};
use crate::reports;
use crate::rpc::{self, FeedConnections, Services};
use crate::snapshot_transfer::SnapshotSender;

/// The age of the last fsync above which the lease is no longer renewed.
const HEALTHY_WITHIN_MS: u64 = 1_000;
/// The interval in which a disk without room is opened again.
const OPEN_AGAIN_EVERY: Duration = Duration::from_secs(1);
/// The interval of log lines about what a start waits for.
const LOG_EVERY: Duration = Duration::from_secs(60);
/// The time-out of revoking the lease, and of closing the disk.
const STOP_STEP_TIMEOUT: Duration = Duration::from_secs(2);

/// Runs a storage node until SIGTERM or SIGINT, or until an error ends it. Returns the exit code.
pub fn run(options: Options) -> u8 {
    // Client connections keep the sockets busy; the loop and the disk have threads of their own.
    let threads = thread::available_parallelism().map_or(2, |cores| cores.get().clamp(2, 4));
    let mut runtime = Builder::new_multi_thread();
    process::run(runtime.worker_threads(threads).thread_name("dkc-net"), serve(options))
}

async fn serve(options: Options) -> Result<(), ProcessExit> {
    options.check()?;
    let files = options.files()?;
    let mut signals = StopSignals::new()?;
    let mut stop = std::pin::pin!(signals.next());
    let health = Health::new("recovery");
    let metrics = NodeMetrics::default();
    let (tasks, mut failures) = telemetry::critical_tasks();
    let shown = Arc::new(Metrics::new(|registry| metrics.register(registry)));
    let monitoring = process::monitoring(options.process.metrics, health.clone(), shown).await?;
    tokio::spawn(tasks.forever("serving --metrics", monitoring));
    let (inbox, messages) = Inbox::new(options.memory_plan().intake_bytes);
    let starting = start(&options, files, &health, &inbox, messages);
    let started = tokio::select! {
        started = starting => started?,
        why = failures.next() => return Err(ProcessExit::Failed(why)),
        _ = &mut stop => {
            info!("stopped during the start");
            return Ok(());
        }
    };
    let context = ProcessContext { files, health, metrics, inbox, tasks, failures };
    run_node(started, options, context, stop).await
}

/// A node whose identity is settled.
struct Started {
    disk: OpenDisk,
    opened: DiskContents,
    metastore: Metastore,
    meta: Meta,
    booted: Booted,
}

async fn start(
    options: &Options,
    files: FilePlan,
    health: &Health,
    inbox: &Inbox,
    messages: std::sync::mpsc::Receiver<LoopMessage>,
) -> Result<Started, ProcessExit> {
    let settings = disk_settings(options, files);
    let (disk, opened) = open_disk(settings, health, inbox).await?;
    let mut disk = OpenDisk::new(disk, opened.next_group, messages);
    let waits = |reason| health.not_ready(reason);
    let metastore = Metastore::join(&options.cluster.settings(), waits).await?;
    let meta = metastore.cluster(waits).await?;
    let keys = meta.idempotency;
    info!(
        window_s = keys.window_ms / 1_000,
        bytes_max = keys.bytes_max,
        requests_per_s = keys.requests_per_s(),
        "limits of Idempotency-Keys"
    );
    disk.disk.remove_expired(options.node_settings(&meta).limits());
    let identity = StartUp { options, metastore: &metastore, meta: &meta, health };
    let booted = identity.identify(&mut disk, &opened).await?;
    Ok(Started { disk, opened, metastore, meta, booted })
}

/// Opens the disk, retrying until there is room: a node that ended for want of room is started
/// again and waits here, its copies as they were.
async fn open_disk(
    settings: DiskSettings,
    health: &Health,
    inbox: &Inbox,
) -> Result<(Disk, DiskContents), ProcessExit> {
    let mut last_logged: Option<Instant> = None;
    let (disk, opened) = loop {
        let (settings, inbox) = (settings.clone(), inbox.clone());
        let opened = tokio::task::spawn_blocking(move || try_open(settings, inbox)).await;
        let error = match opened.map_err(|error| ProcessExit::Failed(error.to_string()))? {
            Ok(opened) => break opened,
            Err(error) => error,
        };
        let Some(shortage) = error.shortage() else { return Err(error.into()) };
        health.not_ready(shortage.reason());
        if last_logged.is_none_or(|at| at.elapsed() >= LOG_EVERY) {
            last_logged = Some(Instant::now());
            warn!(why = error.with_advice(), "disk can't be opened yet, retrying");
        }
        tokio::time::sleep(OPEN_AGAIN_EVERY).await;
    };
    health.not_ready("recovery");
    for damage in &opened.damage {
        error!(damage, "damage found on the disk");
    }
    Ok((disk, opened))
}

fn try_open(settings: DiskSettings, inbox: Inbox) -> Result<(Disk, DiskContents), DiskError> {
    let failures = inbox.clone();
    // Once the loop has ended, events have no receiver and need none.
    Disk::open(
        settings,
        move |event| {
            inbox.send(LoopMessage::Disk(event));
        },
        move |error| {
            failures.send(LoopMessage::Exit(error.into()));
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

/// The parts of a process that exist before its identity is settled.
struct ProcessContext {
    files: FilePlan,
    health: Health,
    metrics: NodeMetrics,
    inbox: Inbox,
    tasks: CriticalTasks,
    failures: TaskFailures,
}

/// Runs the node from the claim of its identity to the end.
async fn run_node(
    started: Started,
    options: Options,
    context: ProcessContext,
    stop: impl Future<Output = &'static str>,
) -> Result<(), ProcessExit> {
    let ProcessContext { files, health, metrics, inbox, tasks, mut failures } = context;
    let Started { disk, opened, metastore, meta, booted } = started;
    let Booted { me, guard, listener, address, suspect } = booted;
    let clock = LoopClock::start();
    let last_fsync = LastFsync::new(clock);
    let names = StoreNames::default();
    names.note(me.store, &options.name);
    let etcd = EtcdClient::new(metastore.clone(), inbox.clone(), tasks.clone(), meta.incarnation);
    let readiness = NodeReadiness::new(health.clone());
    let (reports, newest_report) = watch::channel(HealthReport::default());

    let limits = options.limits();
    let services = Services {
        inbox: inbox.clone(),
        me,
        cluster: meta.cluster,
        feeds: FeedConnections::default(),
        staging: disk.disk.staging(),
        limits,
        tasks: tasks.clone(),
    };
    let parts = Parts {
        node: node(&options, &meta, me, suspect, disk.next_group, opened.replicas, clock),
        disk: disk.disk,
        messages: disk.messages,
        clock,
        last_fsync: last_fsync.clone(),
        etcd: etcd.clone(),
        snapshots: SnapshotSender::new(meta.cluster, me, inbox.clone(), limits),
        reports,
        metrics,
        names: names.clone(),
        catch_up: CatchUpTracker::new(me.store, readiness.clone()),
        tasks: tasks.clone(),
        runtime: Handle::current(),
    };
    let mut ended = start_loop(parts, disk.early)?;

    let connections = ConnectionLimit::new(files.connections);
    let server = tokio::spawn(rpc::serve(listener, connections, services, health.clone()));
    let peers = Peers::new(me.store, meta.cluster, inbox.clone(), limits, tasks.clone());
    let follower = EtcdFollower { etcd, me, peers, names, readiness: readiness.clone() };
    tokio::spawn(tasks.forever("following etcd", follower.run()));
    let (store, cluster) = (metastore.clone(), meta.cluster);
    let reporting = reports::send_all(store, cluster, me, newest_report, inbox.clone());
    tokio::spawn(tasks.job("reporting", reporting));
    let record = NodeRecord {
        boot: me.boot,
        address,
        capacity: opened.capacity,
        versions: (proto::VERSION_OLDEST, proto::VERSION),
    };
    let lease =
        metastore.hold(vec![HeldKey::node(&record, guard)], lease_settings(&options, &last_fsync));
    let lease = Registration::supervise(lease, inbox.clone(), readiness.clone(), &tasks);

    let order = tokio::select! {
        end = &mut ended => return finish(end, lease, &metastore, guard).await,
        _ = stop => LoopMessage::Stop,
        why = failures.next() => LoopMessage::Exit(ProcessExit::Failed(why)),
        served = server => {
            let why = match served {
                Ok(Ok(())) => "it ended".to_owned(),
                Ok(Err(error)) => error.to_string(),
                Err(error) => error.to_string(),
            };
            LoopMessage::Exit(ProcessExit::Failed(format!("the gRPC server failed: {why}")))
        }
    };
    readiness.not_ready_again("stopping");
    inbox.send(order);
    finish(ended.await, lease, &metastore, guard).await
}

/// Creates the state machine, with the recovered replicas.
fn node(
    options: &Options,
    meta: &Meta,
    me: StoreBoot,
    suspect: bool,
    next_group: u64,
    mut replicas: Vec<engine::node::RecoveredReplica>,
    clock: LoopClock,
) -> Node {
    if suspect {
        // The extent of the damage is unknown: no copy of this disk may be promoted, and all are
        // filled again.
        for content in replicas.iter_mut().filter_map(|replica| replica.content.as_mut()) {
            content.suspect = true;
        }
    }
    info!(replicas = replicas.len(), "recovered");
    let settings = Settings { suspect, ..options.node_settings(meta) };
    Node::new(settings, me, clock.now(), next_group, replicas)
}

/// The end of the loop, and its disk, which may take long to close.
type LoopResult = Result<(LoopEnd, Disk), oneshot::error::RecvError>;

fn start_loop(
    parts: Parts,
    early: Vec<engine::node::Event>,
) -> Result<oneshot::Receiver<(LoopEnd, Disk)>, ProcessExit> {
    let (end, ended) = oneshot::channel();
    let body = move || {
        // Without a receiver the process is ending anyway.
        let _unheard = end.send(NodeLoop::new(parts).run(early));
    };
    let thread = thread::Builder::new().name("dkc-loop".into()).spawn(body);
    thread.map_err(|error| ProcessExit::Failed(format!("no thread for the loop: {error}")))?;
    Ok(ended)
}

fn lease_settings(options: &Options, last_fsync: &LastFsync) -> LeaseSettings {
    let last_fsync = last_fsync.clone();
    LeaseSettings {
        ttl_s: options.process.lease_ttl,
        healthy: Arc::new(move || last_fsync.age_ms() < HEALTHY_WITHIN_MS),
        ..LeaseSettings::default()
    }
}

async fn finish(
    end: LoopResult,
    lease: Registration,
    metastore: &Metastore,
    guard: BootGuard,
) -> Result<(), ProcessExit> {
    // The loop's thread panicked; the message is in the log.
    let (end, disk) = end.map_err(|_| ProcessExit::Failed("the node loop panicked".into()))?;
    match end {
        LoopEnd::Stopped => {
            if timeout(STOP_STEP_TIMEOUT, lease.give_back()).await.is_err() {
                warn!("could not revoke the lease, it will expire");
            }
            let closing = tokio::task::spawn_blocking(move || drop(disk));
            if timeout(STOP_STEP_TIMEOUT, closing).await.is_err() {
                warn!("disk not closed in time, nothing is lost");
            }
            info!("stopped");
            Ok(())
        }
        LoopEnd::Exit(exit) => {
            // The disk's threads may hang in the very call that failed: they end with the process.
            std::mem::forget(disk);
            if matches!(exit, ProcessExit::Disk(_)) {
                boot::note_suspect(metastore, guard).await;
            }
            Err(exit)
        }
    }
}

/// This process's key in etcd, for as long as the process lives.
struct Registration {
    stop: oneshot::Sender<()>,
    task: tokio::task::JoinHandle<()>,
}

impl Registration {
    fn supervise(
        lease: Lease,
        inbox: Inbox,
        readiness: NodeReadiness,
        tasks: &CriticalTasks,
    ) -> Self {
        let (stop, stopped) = oneshot::channel();
        let supervising = supervise(lease, inbox, readiness, stopped);
        Self { stop, task: tokio::spawn(tasks.job("the registration", supervising)) }
    }

    /// Revokes the lease, so that others need not wait until it expires.
    async fn give_back(self) {
        // A task that has ended has no lease to revoke.
        let _ended = self.stop.send(());
        let _failed = self.task.await;
    }
}

async fn supervise(
    mut lease: Lease,
    inbox: Inbox,
    readiness: NodeReadiness,
    mut stopped: oneshot::Receiver<()>,
) {
    loop {
        let event = tokio::select! {
            event = lease.next() => event,
            _ = &mut stopped => return lease.stop().await,
        };
        match event {
            Some(LeaseEvent::Registered { created, .. }) => {
                info!(create_revision = created, "registered with etcd");
                readiness.registered();
            }
            Some(LeaseEvent::Confirmed) => {
                inbox.send_event(engine::node::Event::LeaseConfirmed);
            }
            Some(LeaseEvent::Granted { .. }) => {}
            Some(LeaseEvent::Lost) => warn!("registration lost, registering again"),
            Some(LeaseEvent::Superseded { boot }) => {
                inbox.send(LoopMessage::Exit(ProcessExit::Refused(format!(
                    "boot {} of this store has begun elsewhere",
                    boot.0
                ))));
            }
            Some(LeaseEvent::NameLost { store }) => {
                inbox.send(LoopMessage::Exit(ProcessExit::Refused(format!(
                    "store {store} has taken this node's name: it was started with --replace"
                ))));
            }
            None => return,
        }
    }
}
