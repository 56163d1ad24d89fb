//! One worker: a thread with its own runtime, batcher, client connections and node connections.
//!
//! Workers share only metrics, readiness and the directory. Everything else reaches a worker by one
//! channel.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;
use std::time::Instant;

use engine::batcher::{Batcher, Counts, Effect, Event, Settings};
use engine::ids::SessionId;
use engine::message::HealthReport;
use engine::shard_record::ShardRecord;
use telemetry::CriticalTasks;
use telemetry::files::ConnectionPermit;
use tokio::net::TcpStream;
use tokio::runtime::{Builder, LocalOptions};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::spawn_local;
use tracing::{error, warn};

use crate::directory::Directory;
use crate::http::{ClientPolicy, HttpServer, Pages};
use crate::mailbox::{self, Mailbox, TurnDriver};
use crate::metrics::GatewayMetrics;
use crate::node_connections::NodeConnections;
use crate::readiness::{GatewayReadiness, WorkerReadiness};

/// A message to a worker.
pub(crate) enum ToWorker {
    Connection(ClientConnection),
    Shard(ShardRecord),
    Session(Option<SessionId>),
    /// A client could not be accepted for want of a free connection: close idle ones.
    ShedIdle,
    /// Every answer from now on closes its connection.
    CloseAfterAnswers,
    /// Accept nothing more, finish the requests in flight by `until`, and end.
    Stop {
        until: Instant,
    },
}

/// The open requests of a stopping worker are answered this long before its end, by what is known
/// of them.
const ANSWERED_BEFORE: Duration = Duration::from_millis(500);

/// An accepted connection of a client.
pub(crate) struct ClientConnection {
    pub(crate) stream: std::net::TcpStream,
    pub(crate) load: LoadGuard,
    pub(crate) permit: ConnectionPermit,
}

/// The number of connections of a worker, including those that are on their way to it.
#[derive(Clone, Default)]
pub(crate) struct WorkerLoad(Arc<AtomicUsize>);

/// One connection of a [`WorkerLoad`], counted until dropped.
pub(crate) struct LoadGuard(Arc<AtomicUsize>);

impl WorkerLoad {
    pub(crate) fn count(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }

    pub(crate) fn add_one(&self) -> LoadGuard {
        self.0.fetch_add(1, Ordering::Relaxed);
        LoadGuard(self.0.clone())
    }
}

impl Drop for LoadGuard {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The sending end of a worker's channel, with the number of its connections.
#[derive(Clone)]
pub(crate) struct WorkerHandle {
    pub(crate) inbox: mpsc::UnboundedSender<ToWorker>,
    pub(crate) load: WorkerLoad,
}

/// A message from a worker to the process.
pub(crate) enum FromWorker {
    /// A hint for the leading coordinator.
    Report(HealthReport),
    /// The session must not be used for new batches: register again.
    Abandon(SessionId),
}

/// The settings and shared parts that every worker starts with.
#[derive(Clone)]
pub(crate) struct WorkerContext {
    pub(crate) settings: Settings,
    pub(crate) directory: watch::Receiver<Directory>,
    pub(crate) readiness: GatewayReadiness,
    pub(crate) pages: Pages,
    pub(crate) counters: Arc<GatewayMetrics>,
    pub(crate) policy: ClientPolicy,
    pub(crate) tasks: CriticalTasks,
    pub(crate) process: mpsc::UnboundedSender<FromWorker>,
}

/// A running worker. The thread ends after [`ToWorker::Stop`], or with a panic.
pub(crate) struct WorkerThread {
    pub(crate) handle: WorkerHandle,
    pub(crate) thread: JoinHandle<()>,
    /// Ready when the thread ends, with or without a panic. `None` once that was noticed.
    pub(crate) ended: Option<oneshot::Receiver<()>>,
}

/// Starts the thread of a worker.
pub(crate) fn spawn(number: usize, context: WorkerContext) -> std::io::Result<WorkerThread> {
    let (inbox, messages) = mpsc::unbounded_channel();
    let (alive, ended) = oneshot::channel();
    let thread = std::thread::Builder::new().name(format!("worker-{number}")).spawn(move || {
        let _alive: oneshot::Sender<()> = alive;
        let runtime =
            Builder::new_current_thread().enable_all().build_local(LocalOptions::default());
        match runtime {
            Ok(runtime) => runtime.block_on(work(number, context, messages)),
            Err(error) => error!(%error, "could not start the runtime of a worker"),
        }
    })?;
    let handle = WorkerHandle { inbox, load: WorkerLoad::default() };
    Ok(WorkerThread { handle, thread, ended: Some(ended) })
}

async fn work(
    number: usize,
    context: WorkerContext,
    mut messages: mpsc::UnboundedReceiver<ToWorker>,
) {
    let mailbox = Mailbox::new();
    let nodes =
        NodeConnections::new(mailbox.clone(), context.directory.clone(), context.tasks.clone());
    spawn_local(context.tasks.job("keeping connections to nodes", nodes.clone().maintain_all()));
    let (idle, mut is_idle) = watch::channel(true);
    let driver = WorkerDriver {
        number,
        nodes,
        readiness: context.readiness,
        counters: context.counters.clone(),
        process: context.process,
        idle,
        published: RefCell::default(),
    };
    let settings = Settings { number, ..context.settings };
    let batcher = Batcher::new(settings.clone());
    let turns = spawn_local(mailbox::run_turns(mailbox.clone(), batcher, settings, driver));
    let server = HttpServer::new(mailbox.clone(), context.pages, context.counters, context.policy);
    spawn_local(context.tasks.job("ending idle connections", server.clone().end_idle()));
    let receiving = async {
        while let Some(message) = messages.recv().await {
            match message {
                ToWorker::Connection(connection) => serve(&server, connection),
                ToWorker::Shard(record) => mailbox.push(Event::ShardRecord(record)),
                ToWorker::Session(session) => mailbox.push(Event::Session(session)),
                ToWorker::ShedIdle => server.shed_idle(),
                ToWorker::CloseAfterAnswers => server.close_after_answers(),
                ToWorker::Stop { until } => return until,
            }
        }
        Instant::now()
    };
    tokio::pin!(turns);
    let until = tokio::select! {
        until = receiving => until,
        ended = &mut turns => panic!("the turns have ended: {ended:?}"),
    };
    mailbox.push(Event::Stop);
    server.stop();
    // Clients first; then the batches in flight whose clients got `unknown` or have gone.
    let finished = async {
        server.all_closed().await;
        let _ended = is_idle.wait_for(|&idle| idle).await;
    };
    tokio::pin!(finished);
    let last = until.checked_sub(ANSWERED_BEFORE).unwrap_or(until);
    if tokio::time::timeout_at(last.into(), &mut finished).await.is_ok() {
        return;
    }
    mailbox.expire_all();
    server.stop_waiting();
    if tokio::time::timeout_at(until.into(), finished).await.is_err() {
        warn!(worker = number, "worker stopped with requests or batches in flight");
    }
}

fn serve(server: &Rc<HttpServer>, ClientConnection { stream, load, permit }: ClientConnection) {
    match TcpStream::from_std(stream) {
        Ok(stream) => {
            let serving = server.clone().serve(stream);
            spawn_local(async move {
                serving.await;
                drop((load, permit));
            });
        }
        Err(error) => warn!(%error, "connection not registered with the runtime"),
    }
}

/// Performs the batcher's effects and publishes its counts and readiness.
struct WorkerDriver {
    number: usize,
    nodes: Rc<NodeConnections>,
    readiness: GatewayReadiness,
    counters: Arc<GatewayMetrics>,
    process: mpsc::UnboundedSender<FromWorker>,
    idle: watch::Sender<bool>,
    published: RefCell<Published>,
}

/// The counts and the readiness that were published last.
#[derive(Default)]
struct Published {
    counts: Counts,
    readiness: WorkerReadiness,
}

impl TurnDriver for WorkerDriver {
    fn perform(&self, effect: Effect) {
        // A send fails only when the process is ending.
        let _ending = match effect {
            Effect::Send { conn, message } => return self.nodes.send(conn, message),
            Effect::Report(report) => self.process.send(FromWorker::Report(report)),
            Effect::AbandonSession(session) => {
                // Either the shard expired the session, because its key in etcd was gone for long;
                // or a batch came out of order, which would be a bug and is counted as
                // `dkc_refusals_total{reason="order"}`.
                warn!(worker = self.number, ?session, "session abandoned, registering another");
                self.process.send(FromWorker::Abandon(session))
            }
            Effect::Wrote { .. } | Effect::ReadDone { .. } => {
                unreachable!("the mailbox completes requests")
            }
        };
    }

    fn turn_ended(&self, batcher: &Batcher, cluster_changed: bool) {
        let mut published = self.published.borrow_mut();
        let counts = batcher.counts();
        if counts != published.counts {
            self.counters.add_worker_counts(&published.counts, &counts);
            published.counts = counts;
        }
        if cluster_changed {
            let readiness = WorkerReadiness::of(batcher);
            if readiness != published.readiness {
                self.readiness.set_worker(self.number, readiness);
                published.readiness = readiness;
            }
        }
        let idle = batcher.is_idle();
        self.idle.send_if_modified(|known| std::mem::replace(known, idle) != idle);
    }
}
