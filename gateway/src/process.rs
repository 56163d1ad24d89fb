//! The process around the workers: ports, etcd, sessions, and shutdown.

use std::convert::Infallible;
use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

use engine::shard_record::ShardRecord;
use telemetry::files::{self, ConnectionLimit, ConnectionPermit};
use telemetry::{CriticalTasks, Health, Metrics};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, oneshot, watch};
use tonic::transport::Server;
use tracing::{error, info, warn};

use crate::Options;
use crate::browser::Origins;
use crate::directory::{self, Directory};
use crate::http::{ClientPolicy, Pages};
use crate::memory::{self, Shares};
use crate::metrics::GatewayMetrics;
use crate::readiness::GatewayReadiness;
use crate::reports::Reporter;
use crate::session::WorkerSessions;
use crate::status::StatusPage;
use crate::worker::{
    self, ClientConnection, FromWorker, ToWorker, WorkerContext, WorkerHandle, WorkerThread,
};

/// The time for which a stopping gateway, once it has drained, waits for requests in flight.
/// Together with the revocation of the lease, a stop takes less than 10 s.
const STOP_WITHIN: Duration = Duration::from_secs(8);
/// The time for which a stopping gateway still accepts the connections that are in the kernel's
/// backlog.
const ACCEPT_LAST_FOR: Duration = Duration::from_millis(20);
/// Connections that the kernel queues until they are accepted.
const BACKLOG: u32 = 4096;
const WORKERS_MAX_DEFAULT: usize = 4;

/// The reason why a gateway ended, or did not start.
#[derive(Debug)]
pub enum Fatal {
    /// A setting is wrong. The text names it.
    Settings(String),
    /// The environment failed (a port, etcd), or a part of this process did (a bug).
    Failed(String),
}

impl Fatal {
    /// The exit code of the process: 2 for wrong settings, else 1.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Settings(_) => 2,
            Self::Failed(_) => 1,
        }
    }
}

impl std::fmt::Display for Fatal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Settings(why) | Self::Failed(why) => f.write_str(why),
        }
    }
}

impl std::error::Error for Fatal {}

impl From<io::Error> for Fatal {
    fn from(error: io::Error) -> Self {
        Self::Failed(error.to_string())
    }
}

/// Returns two futures. The first resolves at SIGTERM or SIGINT: stop. The second resolves at
/// SIGINT or a second SIGTERM: end the drain early.
pub(crate) fn signalled() -> Result<(impl Future<Output = ()>, impl Future<Output = ()>), Fatal> {
    let receiver = |kind| signal(kind).map_err(Fatal::from);
    let (terminate, interrupt) = (SignalKind::terminate(), SignalKind::interrupt());
    let (mut sigterm, mut sigint) = (receiver(terminate)?, receiver(interrupt)?);
    let (mut drain_sigterm, mut drain_sigint) = (receiver(terminate)?, receiver(interrupt)?);
    let stop = async move {
        tokio::select! {
            _ = sigterm.recv() => {}
            _ = sigint.recv() => {}
        }
    };
    let hurry = async move {
        let twice = async {
            drain_sigterm.recv().await;
            drain_sigterm.recv().await;
        };
        tokio::select! {
            () = twice => {}
            _ = drain_sigint.recv() => {}
        }
    };
    Ok((stop, hurry))
}

/// Runs a gateway until `stop` resolves, and then until it has drained or `hurry` resolves.
/// `listening` is called with the address on which clients are served, which the kernel chooses if
/// `--http` has port 0. An error is either a wrong setting or a failure that ended the gateway.
pub async fn serve(
    options: Options,
    listening: impl FnOnce(SocketAddr),
    stop: impl Future<Output = ()>,
    hurry: impl Future<Output = ()>,
) -> Result<(), Fatal> {
    let workers = workers(&options);
    let shares = shares(&options)?;
    let connections = ConnectionLimit::new(shares.connections);
    let listener = listen("--http", options.http)?;
    let address = listener.local_addr()?;
    let (directory, seen) = watch::channel(Directory::default());
    let (health, all) = (Health::new("etcd"), Health::new("etcd"));
    let (tasks, mut failures) = telemetry::critical_tasks();
    let mut counters = None;
    let metrics = Arc::new(Metrics::new(|registry| counters = Some(GatewayMetrics::new(registry))));
    let counters = Arc::new(counters.expect("it was just filled"));
    let without = counters.without_primary.clone();
    let readiness =
        GatewayReadiness::new(health.clone(), all.clone(), seen.clone(), without, workers);
    if let Some(at) = options.metrics {
        let serving = telemetry::serve(listen("--metrics", at)?, health.clone(), metrics.clone());
        tokio::spawn(tasks.forever("serving --metrics", serving));
    }
    if let Some(at) = options.grpc {
        serve_grpc(listen("--grpc", at)?, &health, &tasks).await?;
    }
    let (status_page, page_task) = StatusPage::new(options.cluster.clone(), seen.clone());
    tokio::spawn(tasks.job("making /v1/cluster", page_task));
    let (process, from_workers) = mpsc::unbounded_channel();
    let context = WorkerContext {
        settings: shares.settings(options.linger_us),
        directory: seen.clone(),
        readiness: readiness.clone(),
        pages: Pages { health, all, metrics, status_page },
        counters,
        policy: ClientPolicy {
            idle: Duration::from_secs(options.idle_timeout.into()),
            body_bytes_max: shares.body_bytes_max,
            origins: Origins::new(options.allow_origin.clone()),
        },
        tasks,
        process,
    };
    let threads = (0..workers).map(|number| worker::spawn(number, context.clone()));
    let mut workers = WorkerPool(threads.collect::<Result<_, _>>()?);
    drop(context);
    info!(%address, workers = workers.0.len(), "listening");
    listening(address);

    let inboxes = workers.inboxes();
    let handles = workers.handles();
    let (end, ending) = oneshot::channel();
    let drain = Duration::from_secs(options.drain_seconds.into());
    let stopping = async {
        stop.await;
        info!(?drain, "stop requested, draining: not ready, still serving");
        readiness.set_stopping();
        inboxes.iter().for_each(|inbox| notify(inbox, ToWorker::CloseAfterAnswers));
        let _cut_short = tokio::time::timeout(drain, hurry).await;
    };
    let member = ClusterMember {
        options,
        address,
        directory,
        readiness: readiness.clone(),
        inboxes: inboxes.clone(),
        from_workers,
    };
    let mut cluster = tokio::spawn(member.run(ending));
    let outcome = tokio::select! {
        () = stopping => Ok(()),
        why = failures.next() => Err(Fatal::Failed(why)),
        number = workers.any_ended() => Err(Fatal::Failed(format!("worker {number} has failed"))),
        ended = &mut cluster => Err(match ended {
            Ok(Err(fatal)) => fatal,
            other => Fatal::Failed(format!("the task that follows etcd has ended: {other:?}")),
        }),
        never = accept(&listener, &connections, &handles) => match never {},
    };
    readiness.set_stopping();
    // Connections in the kernel's backlog came in time: the end of the listener would reset them.
    let accepting = accept(&listener, &connections, &handles);
    let _accepted = tokio::time::timeout(ACCEPT_LAST_FOR, accepting).await;
    // New connections are refused from here on: clients see at once that they must go elsewhere.
    drop(listener);
    info!("listener closed, finishing requests in flight");
    workers.stop(Instant::now() + STOP_WITHIN).await;
    if end.send(()).is_ok() && tokio::time::timeout(Duration::from_secs(1), cluster).await.is_err()
    {
        warn!("the lease was not revoked in time, it will expire by itself");
    }
    outcome
}

/// Few connections are expected: programs that monitor the process.
const GRPC_CONNECTIONS_MAX: usize = 64;

/// Serves gRPC health and reflection, for programs that monitor every role in the same way.
/// Counting is not possible over gRPC.
async fn serve_grpc(
    listener: TcpListener,
    health: &Health,
    tasks: &CriticalTasks,
) -> Result<(), Fatal> {
    let routes = telemetry::grpc(health, proto::DESCRIPTORS, &[]).await;
    let routes = routes.map_err(|error| Fatal::Failed(format!("reflection: {error}")))?;
    let serving = Server::builder().add_routes(routes);
    tokio::spawn(tasks.forever("serving --grpc", async move {
        let incoming = ConnectionLimit::new(GRPC_CONNECTIONS_MAX).incoming(listener);
        if let Err(error) = serving.serve_with_incoming(incoming).await {
            warn!(%error, "gRPC health server ended");
        }
    }));
    Ok(())
}

fn listen(flag: &str, address: SocketAddr) -> Result<TcpListener, Fatal> {
    let listening = || {
        let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
        // Without it, a restarted gateway would have to wait until the old process's connections
        // have left TIME_WAIT.
        socket.set_reuseaddr(true)?;
        socket.bind(address)?;
        socket.listen(BACKLOG)
    };
    listening().map_err(|error: io::Error| {
        Fatal::Settings(format!("{flag} {address}: can't listen there: {error}"))
    })
}

fn workers(options: &Options) -> usize {
    let cpus = || std::thread::available_parallelism().map_or(1, usize::from);
    options.workers.map_or_else(|| cpus().min(WORKERS_MAX_DEFAULT), usize::from)
}

/// Open files that are reserved for connections to nodes and etcd, and for metrics.
const FILES_KEPT: u64 = 64 + 64;
/// With fewer open files, a gateway can serve only few clients, and logs a warning.
const FILES_GOOD: u64 = 10_240;

/// Divides the memory, with at most as many clients as the limit of open files leaves room for. A
/// low limit is logged.
pub(crate) fn shares(options: &Options) -> Result<Shares, Fatal> {
    let allowed = files::allowed();
    let connections =
        files::connections(allowed, FILES_KEPT).map_err(|few| Fatal::Settings(few.to_string()))?;
    if allowed < FILES_GOOD {
        warn!(
            allowed,
            wanted = FILES_GOOD,
            connections,
            "low limit of open files: raise the hard limit (ulimit -Hn, LimitNOFILE=)"
        );
    }
    memory::divide(options.memory_bytes, options.connections, connections, workers(options))
        .map_err(Fatal::Settings)
}

/// Accepts connections and gives each to the worker that has the fewest. With a listener per
/// worker, the kernel would choose by a hash, and with few connections some workers would get none.
///
/// A connection beyond the limit does not have to wait for the idle timeout of another one: the
/// workers close some of their idle connections.
async fn accept(
    listener: &TcpListener,
    connections: &ConnectionLimit,
    workers: &[WorkerHandle],
) -> Infallible {
    let shed = || workers.iter().for_each(|worker| notify(&worker.inbox, ToWorker::ShedIdle));
    loop {
        let (stream, permit) = connections.accept_or(listener, shed).await;
        if let Err(error) = hand_over(stream, permit, workers) {
            warn!(%error, "connection not handed to a worker");
        }
    }
}

fn hand_over(
    stream: TcpStream,
    permit: ConnectionPermit,
    workers: &[WorkerHandle],
) -> io::Result<()> {
    // Answers are small and written whole: Nagle's algorithm would only delay them.
    stream.set_nodelay(true)?;
    let stream = stream.into_std()?;
    let worker = workers.iter().min_by_key(|worker| worker.load.count());
    let worker = worker.expect("there is at least one worker");
    let connection = ClientConnection { stream, load: worker.load.add_one(), permit };
    // `WorkerPool::any_ended` notices a worker that has ended.
    let _ended = worker.inbox.send(ToWorker::Connection(connection));
    Ok(())
}

/// The threads of all workers, by number.
struct WorkerPool(Vec<WorkerThread>);

impl WorkerPool {
    fn inboxes(&self) -> Vec<mpsc::UnboundedSender<ToWorker>> {
        self.0.iter().map(|worker| worker.handle.inbox.clone()).collect()
    }

    fn handles(&self) -> Vec<WorkerHandle> {
        self.0.iter().map(|worker| worker.handle.clone()).collect()
    }

    /// Waits until a worker has ended, which before [`WorkerPool::stop`] means that it failed.
    async fn any_ended(&mut self) -> usize {
        poll_fn(|cx| {
            for (number, worker) in self.0.iter_mut().enumerate() {
                let ended =
                    worker.ended.as_mut().is_some_and(|ended| Pin::new(ended).poll(cx).is_ready());
                if ended {
                    worker.ended = None;
                    return Poll::Ready(number);
                }
            }
            Poll::Pending
        })
        .await
    }

    async fn stop(self, until: Instant) {
        for worker in &self.0 {
            notify(&worker.handle.inbox, ToWorker::Stop { until });
        }
        for (number, worker) in self.0.into_iter().enumerate() {
            if let Some(ended) = worker.ended {
                // The sender is only dropped, at the end of the thread.
                let _dropped = ended.await;
            }
            if worker.thread.join().is_err() {
                error!(worker = number, "worker panicked");
            }
        }
    }
}

/// This gateway as a member of the cluster: its sessions, reports and copy of the records in etcd.
struct ClusterMember {
    options: Options,
    address: SocketAddr,
    directory: watch::Sender<Directory>,
    readiness: GatewayReadiness,
    inboxes: Vec<mpsc::UnboundedSender<ToWorker>>,
    from_workers: mpsc::UnboundedReceiver<FromWorker>,
}

impl ClusterMember {
    /// Follows etcd until `ending` resolves; then revokes the lease.
    async fn run(mut self, mut ending: oneshot::Receiver<()>) -> Result<(), Fatal> {
        let etcd = metastore::Settings::new(self.options.etcd.clone(), &self.options.cluster);
        let joining = async {
            let store = directory::connect(&etcd, &self.readiness).await?;
            let meta = directory::meta(&store, &self.readiness).await?;
            Ok::<_, metastore::Error>((store, meta))
        };
        let (store, meta) = tokio::select! {
            joined = joining => joined.map_err(|error| Fatal::Settings(error.to_string()))?,
            _ = &mut ending => return Ok(()),
        };
        let (address, ttl_s) = (self.address.to_string(), self.options.lease_ttl);
        let workers = self.inboxes.len();
        let mut sessions =
            WorkerSessions::new(store.clone(), address, meta.incarnation, ttl_s, workers);
        let mut reporter = Reporter::new(self.directory.subscribe());
        self.directory.send_modify(|all| all.meta = Some(meta));
        self.readiness.waits_for(None);
        let on_shard = |shard: &ShardRecord| {
            self.inboxes.iter().for_each(|inbox| notify(inbox, ToWorker::Shard(shard.clone())));
        };
        let mut following =
            pin!(directory::follow(&store, &self.directory, &self.readiness, on_shard));
        loop {
            let changed = tokio::select! {
                changed = sessions.next() => changed,
                message = self.from_workers.recv() => match message {
                    Some(FromWorker::Report(report)) => {
                        reporter.report(report, Instant::now());
                        continue;
                    }
                    Some(FromWorker::Abandon(session)) => sessions.abandon(session).await,
                    // All workers have ended, so this process ends, too.
                    None => {
                        let _ended = (&mut ending).await;
                        break;
                    }
                },
                () = &mut following => continue,
                _ = &mut ending => break,
            };
            for (worker, session) in changed {
                notify(&self.inboxes[worker], ToWorker::Session(session));
            }
        }
        sessions.stop().await;
        Ok(())
    }
}

/// Sends a message to a worker. [`WorkerPool::any_ended`] notices a worker that has ended.
fn notify(inbox: &mpsc::UnboundedSender<ToWorker>, message: ToWorker) {
    let _ended = inbox.send(message);
}
