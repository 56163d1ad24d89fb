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
use metastore::Metastore;
use process::{ProcessExit, bind};
use telemetry::files::{self, ConnectionLimit, ConnectionPermit};
use telemetry::{CriticalTasks, Health, Metrics};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, oneshot, watch};
use tonic::transport::Server;
use tracing::{error, info, warn};

use crate::Options;
use crate::browser::Origins;
use crate::directory::Directory;
use crate::etcd;
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
const WORKERS_MAX_DEFAULT: usize = 4;

/// Runs a gateway until `stop` resolves, and then until it has drained or `hurry` resolves.
/// `listening` is called with the address on which clients are served, which the kernel chooses if
/// `--http` has port 0. An error is either a wrong setting or a failure that ended the gateway.
pub async fn serve(
    options: Options,
    listening: impl FnOnce(SocketAddr),
    stop: impl Future<Output = ()>,
    hurry: impl Future<Output = ()>,
) -> Result<(), ProcessExit> {
    let workers = workers(&options);
    let shares = shares(&options)?;
    let connections = ConnectionLimit::new(shares.connections);
    let listener = bind("--http", options.http).await?;
    let address = listener.local_addr()?;
    let (directory, seen) = watch::channel(Directory::default());
    let (health, all) = (Health::new("etcd"), Health::new("etcd"));
    let (tasks, mut failures) = telemetry::critical_tasks();
    let (metrics, counters) = Metrics::new(GatewayMetrics::register);
    let (metrics, counters) = (Arc::new(metrics), Arc::new(counters));
    let without = counters.without_primary.clone();
    let readiness =
        GatewayReadiness::new(health.clone(), all.clone(), seen.clone(), without, workers);
    let monitoring =
        process::monitoring(options.process.metrics, health.clone(), metrics.clone()).await?;
    tokio::spawn(tasks.forever("serving --metrics", monitoring));
    if let Some(at) = options.grpc {
        serve_grpc(bind("--grpc", at).await?, &health, &tasks).await?;
    }
    let (status_page, page_task) = StatusPage::new(options.cluster.cluster.clone(), seen.clone());
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
    let failed = ProcessExit::Failed;
    let outcome = tokio::select! {
        () = stopping => Ok(()),
        why = failures.next() => Err(failed(why)),
        number = workers.any_ended() => Err(failed(format!("worker {number} has failed"))),
        ended = &mut cluster => Err(match ended {
            Ok(Err(exit)) => exit,
            other => failed(format!("the task that follows etcd has ended: {other:?}")),
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
) -> Result<(), ProcessExit> {
    let routes = telemetry::grpc(health, proto::DESCRIPTORS, &[]).await;
    let routes = routes.map_err(|error| ProcessExit::Failed(format!("reflection: {error}")))?;
    let serving = Server::builder().add_routes(routes);
    tokio::spawn(tasks.forever("serving --grpc", async move {
        let incoming = ConnectionLimit::new(GRPC_CONNECTIONS_MAX).incoming(listener);
        if let Err(error) = serving.serve_with_incoming(incoming).await {
            warn!(%error, "gRPC health server ended");
        }
    }));
    Ok(())
}

/// The number of workers. By default half of the CPUs have one: each worker makes batches, frames
/// and connections of its own, so more of them than the clients need make all of these smaller.
fn workers(options: &Options) -> usize {
    let cpus = || std::thread::available_parallelism().map_or(1, usize::from);
    options.workers.map_or_else(|| (cpus() / 2).clamp(1, WORKERS_MAX_DEFAULT), usize::from)
}

/// Open files that are reserved for connections to nodes and etcd, and for metrics.
const FILES_KEPT: u64 = 64 + 64;
/// With fewer open files, a gateway can serve only few clients, and logs a warning.
const FILES_GOOD: u64 = 10_240;

/// Divides the memory, with at most as many clients as the limit of open files leaves room for. A
/// low limit is logged.
pub(crate) fn shares(options: &Options) -> Result<Shares, ProcessExit> {
    let allowed = files::allowed();
    let connections = files::connections(allowed, FILES_KEPT)?;
    if allowed < FILES_GOOD {
        warn!(
            allowed,
            wanted = FILES_GOOD,
            connections,
            "low limit of open files: raise the hard limit (ulimit -Hn, LimitNOFILE=)"
        );
    }
    memory::divide(options.memory_bytes, options.connections, connections, workers(options))
        .map_err(ProcessExit::Usage)
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
    async fn run(mut self, mut ending: oneshot::Receiver<()>) -> Result<(), ProcessExit> {
        let etcd = self.options.cluster.settings();
        let joining = async {
            let waits = |reason| self.readiness.waits_for(Some(reason));
            let store = Metastore::join(&etcd, waits).await?;
            let meta = store.cluster(waits).await?;
            store.stay_with(&meta);
            Ok::<_, metastore::Error>((store, meta))
        };
        let (store, meta) = tokio::select! {
            joined = joining => joined.map_err(|error| ProcessExit::Usage(error.to_string()))?,
            _ = &mut ending => return Ok(()),
        };
        let (address, ttl_s) = (self.address.to_string(), self.options.process.lease_ttl);
        let workers = self.inboxes.len();
        let mut sessions =
            WorkerSessions::new(store.clone(), address, meta.incarnation, ttl_s, workers);
        let mut reporter = Reporter::new(self.directory.subscribe());
        self.directory.send_modify(|all| all.meta = Some(meta));
        self.readiness.waits_for(None);
        let on_shard = |shard: &ShardRecord| {
            self.inboxes.iter().for_each(|inbox| notify(inbox, ToWorker::Shard(shard.clone())));
        };
        let mut following = pin!(etcd::follow(&store, &self.directory, &self.readiness, on_shard));
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
