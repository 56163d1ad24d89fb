//! The process of a storage node, from its start to its exit code.

use std::future::Future;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use engine::ids::StoreBoot;
use engine::message::HealthReport;
use engine::node::{Node, RecoveredReplica, Settings};
use engine::records::NodeRecord;
use metastore::{BootGuard, HeldKey, Lease, LeaseEvent, LeaseSettings, Metastore};
use process::{ProcessExit, ProcessOptions, StopSignals};
use telemetry::files::ConnectionLimit;
use telemetry::{CriticalTasks, Health, Metrics, TaskFailures};
use tokio::runtime::Builder;
use tokio::sync::{oneshot, watch};
use tokio::time::timeout;
use tracing::{info, warn};

use crate::disk::Disk;
use crate::etcd::{EtcdClient, EtcdFollower};
use crate::inbox::{Inbox, LoopMessage};
use crate::metrics::NodeMetrics;
use crate::names::StoreNames;
use crate::node_loop::{LastFsync, LoopClock, LoopEnd, NodeLoop, Parts};
use crate::options::{NodeSettings, Options};
use crate::peers::Peers;
use crate::readiness::{CatchUpTracker, NodeReadiness};
use crate::reports;
use crate::rpc::snapshot_transfer::SnapshotSender;
use crate::rpc::{self, FeedConnections, Services};
use crate::start::{Booted, OpenDisk, Started, note_suspect, start};

/// The age of the last fsync above which the lease is no longer renewed.
const HEALTHY_WITHIN_MS: u64 = 1_000;
/// The time-out of revoking the lease, and of closing the disk.
const STOP_STEP_TIMEOUT: Duration = Duration::from_secs(2);

/// Runs a storage node until SIGTERM or SIGINT, or until an error ends it. Returns the exit code.
pub fn run(options: Options) -> u8 {
    // The loop takes one thread at most, and the disk has its own. More threads than that only
    // pay where cores are idle: each message that changes threads wakes one.
    let threads = thread::available_parallelism().map_or(1, |cores| (cores.get() / 4).clamp(1, 4));
    let mut runtime = Builder::new_multi_thread();
    process::run(runtime.worker_threads(threads).thread_name("dkc-node"), serve(options))
}

async fn serve(options: Options) -> Result<(), ProcessExit> {
    let settings = options.resolve()?;
    let mut signals = StopSignals::new()?;
    let mut stop = std::pin::pin!(signals.next());
    let health = Health::new("recovery");
    let (shown, metrics) = Metrics::new(NodeMetrics::new);
    let (tasks, mut failures) = telemetry::critical_tasks();
    let monitoring =
        process::monitoring(settings.options.process.metrics, health.clone(), shown.into()).await?;
    tokio::spawn(tasks.forever("serving --metrics", monitoring));
    let (inbox, messages) = Inbox::new(settings.memory.intake_bytes);
    let starting = start(&settings, &health, &inbox, messages);
    let started = tokio::select! {
        started = starting => started?,
        why = failures.next() => return Err(ProcessExit::Failed(why)),
        _ = &mut stop => {
            info!("stopped during the start");
            return Ok(());
        }
    };
    let context = ProcessContext { settings, health, metrics, inbox, tasks, failures };
    run_node(started, context, stop).await
}

/// The parts of a process that exist before its identity is settled.
struct ProcessContext {
    settings: NodeSettings,
    health: Health,
    metrics: NodeMetrics,
    inbox: Inbox,
    tasks: CriticalTasks,
    failures: TaskFailures,
}

/// Runs the node from the claim of its identity to the end.
async fn run_node(
    started: Started,
    context: ProcessContext,
    stop: impl Future<Output = &'static str>,
) -> Result<(), ProcessExit> {
    let ProcessContext { settings, health, metrics, inbox, tasks, mut failures } = context;
    let Started { disk, metastore, meta, engine, booted } = started;
    let OpenDisk { disk, contents, messages, early } = disk;
    let Booted { me, guard, listener, address, .. } = booted;
    let clock = LoopClock::start();
    let last_fsync = LastFsync::new(clock);
    let names = StoreNames::default();
    names.note(me.store, &settings.options.name);
    let etcd = EtcdClient::new(metastore.clone(), inbox.clone(), tasks.clone(), meta.incarnation);
    let readiness = NodeReadiness::new(health.clone());
    let (reports, newest_report) = watch::channel(HealthReport::default());

    let limits = settings.limits;
    let services = Services {
        inbox: inbox.clone(),
        me,
        cluster: meta.cluster,
        feeds: FeedConnections::default(),
        staging: disk.staging(),
        limits,
        tasks: tasks.clone(),
    };
    let parts = Parts {
        node: node(engine, me, contents.next_group, contents.replicas, clock),
        disk,
        messages,
        clock,
        last_fsync: last_fsync.clone(),
        etcd: etcd.clone(),
        snapshots: SnapshotSender::new(meta.cluster, me, inbox.clone(), limits),
        reports,
        metrics,
        names: names.clone(),
        catch_up: CatchUpTracker::new(me.store, readiness.clone()),
        tasks: tasks.clone(),
    };
    let mut ended = start_loop(parts, early);

    let connections = ConnectionLimit::new(settings.connections);
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
        capacity: contents.capacity,
        versions: (proto::VERSION_OLDEST, proto::VERSION),
    };
    let lease = metastore.hold(
        vec![HeldKey::node(&record, guard)],
        lease_settings(&settings.options.process, &last_fsync),
    );
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
    settings: Settings,
    me: StoreBoot,
    next_group: u64,
    mut replicas: Vec<RecoveredReplica>,
    clock: LoopClock,
) -> Node {
    if settings.suspect {
        // The extent of the damage is unknown: no copy of this disk may be promoted, and all are
        // filled again.
        for content in replicas.iter_mut().filter_map(|replica| replica.content.as_mut()) {
            content.suspect = true;
        }
    }
    info!(replicas = replicas.len(), "recovered");
    Node::new(settings, me, clock.now(), next_group, replicas)
}

/// The end of the loop, and its disk, which may take long to close.
type LoopResult = Result<(LoopEnd, Disk), oneshot::error::RecvError>;

fn start_loop(parts: Parts, early: Vec<engine::node::Event>) -> oneshot::Receiver<(LoopEnd, Disk)> {
    let (end, ended) = oneshot::channel();
    tokio::spawn(async move {
        // Without a receiver the process is ending anyway.
        let _unheard = end.send(NodeLoop::new(parts).run(early).await);
    });
    ended
}

fn lease_settings(process: &ProcessOptions, last_fsync: &LastFsync) -> LeaseSettings {
    let last_fsync = last_fsync.clone();
    LeaseSettings {
        ttl_s: process.lease_ttl,
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
    // The loop panicked; the message is in the log.
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
                note_suspect(metastore, guard).await;
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
            Some(LeaseEvent::Superseded(boot)) => {
                inbox.send(LoopMessage::Exit(ProcessExit::Refused(format!(
                    "boot {} of this store has begun elsewhere",
                    boot.0
                ))));
            }
            Some(LeaseEvent::NameLost(store)) => {
                inbox.send(LoopMessage::Exit(ProcessExit::Refused(format!(
                    "store {store} has taken this node's name: it was started with --replace"
                ))));
            }
            Some(LeaseEvent::GivenUp) => {
                inbox.send(LoopMessage::Exit(ProcessExit::Refused(
                    "this store was removed from the cluster (dkc node remove) while this process \
                     hung or was cut off: to add a node, start it on an empty folder"
                        .to_owned(),
                )));
            }
            None => return,
        }
    }
}
