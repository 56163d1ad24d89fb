//! The process around the workers: its ports, etcd, sessions, and its end.

use std::convert::Infallible;
use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

use engine::batcher::Settings;
use engine::config::ShardConfig;
use telemetry::files::{self, Connections, Place};
use telemetry::{Health, Metrics, Vital};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, oneshot, watch};
use tonic::transport::Server;
use tracing::{error, info, warn};

use crate::Options;
use crate::directory::{self, Directory};
use crate::metrics::Counters;
use crate::readiness::Readiness;
use crate::reports::Reporter;
use crate::session::Sessions;
use crate::status::Board;
use crate::worker::{self, Connection, Door, FromWorker, Handle, Shared, ToWorker};

/// How long a stopping gateway waits for what is under way. With the lease's return it stays below 10 s.
const PATIENCE: Duration = Duration::from_secs(8);
/// Connections that the kernel holds until they are taken.
const BACKLOG: u32 = 4096;
const WORKERS_MAX_DEFAULT: usize = 4;

/// Why a gateway could not go on.
#[derive(Debug)]
pub enum Fatal {
    /// A setting is wrong.
    Settings(String),
    /// The world, or we, failed.
    Failed(String),
}

impl Fatal {
    /// DESIGN §13.
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

/// Waits for SIGTERM or SIGINT.
pub(crate) fn signalled() -> Result<impl Future<Output = ()>, Fatal> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}

/// Runs a gateway until `stop`. `listening` is told where clients are served, which `--http` with port 0 leaves open.
pub async fn serve(
    options: Options,
    listening: impl FnOnce(SocketAddr),
    stop: impl Future<Output = ()>,
) -> Result<(), Fatal> {
    let connections = connections()?;
    let listener = listen("--http", options.http)?;
    let address = listener.local_addr()?;
    let (directory, seen) = watch::channel(Directory::default());
    let workers = options.workers.map_or_else(default_workers, usize::from);
    let health = Health::new("etcd");
    let readiness = Readiness::new(health.clone(), seen.clone(), workers);
    let (vital, mut failures) = telemetry::vital();
    let mut counters = None;
    let metrics = Arc::new(Metrics::new(|registry| counters = Some(Counters::new(registry))));
    let counters = Arc::new(counters.expect("it was just filled"));
    if let Some(at) = options.metrics {
        let serving = telemetry::serve(listen("--metrics", at)?, health.clone(), metrics.clone());
        tokio::spawn(vital.forever("serving --metrics", serving));
    }
    if let Some(at) = options.grpc {
        serve_grpc(listen("--grpc", at)?, &health, &vital).await?;
    }
    let (board, filling) = Board::new(options.cluster.clone(), seen.clone());
    tokio::spawn(vital.job("making /v1/cluster", filling));
    let (process, asked) = mpsc::unbounded_channel();
    let settings = Settings { linger_us: options.linger_us, ..Settings::default() };
    let shared = Shared {
        settings,
        directory: seen.clone(),
        readiness: readiness.clone(),
        health,
        metrics,
        counters,
        board,
        vital,
        idle: Duration::from_secs(options.idle_timeout.into()),
        process,
    };
    let handles = (0..workers).map(|number| worker::spawn(number, shared.clone()));
    let mut workers = Workers(handles.collect::<Result<_, _>>()?);
    drop(shared);
    info!(%address, workers = workers.0.len(), "listening");
    listening(address);

    let inboxes = workers.inboxes();
    let doors = workers.doors();
    let (end, ending) = oneshot::channel();
    let member = Member { options, address, directory, readiness, inboxes, asked };
    let mut cluster = tokio::spawn(member.run(ending));
    let outcome = tokio::select! {
        () = stop => Ok(()),
        why = failures.next() => Err(Fatal::Failed(why)),
        number = workers.any_ended() => Err(Fatal::Failed(format!("worker {number} has failed"))),
        ended = &mut cluster => Err(match ended {
            Ok(Err(fatal)) => fatal,
            other => Fatal::Failed(format!("the task that follows etcd has ended: {other:?}")),
        }),
        never = accept(&listener, &connections, &doors) => match never {},
    };
    // From here on new connections are refused: clients see at once that they have to go elsewhere.
    drop(listener);
    info!("stopping");
    workers.stop(Instant::now() + PATIENCE).await;
    if end.send(()).is_ok() && tokio::time::timeout(Duration::from_secs(1), cluster).await.is_err()
    {
        warn!("the lease was not given back in time, it runs out by itself");
    }
    outcome
}

/// Those that look after a process are few.
const GRPC_CONNECTIONS_MAX: usize = 64;

/// For those who look after every role in the same way. Nothing is counted there.
async fn serve_grpc(listener: TcpListener, health: &Health, vital: &Vital) -> Result<(), Fatal> {
    let routes = telemetry::grpc(health, proto::DESCRIPTORS, &[]).await;
    let routes = routes.map_err(|error| Fatal::Failed(format!("reflection: {error}")))?;
    let serving = Server::builder().add_routes(routes);
    tokio::spawn(vital.forever("serving --grpc", async move {
        let incoming = Connections::new(GRPC_CONNECTIONS_MAX).incoming(listener);
        if let Err(error) = serving.serve_with_incoming(incoming).await {
            warn!(%error, "health is no longer served over gRPC");
        }
    }));
    Ok(())
}

fn listen(flag: &str, address: SocketAddr) -> Result<TcpListener, Fatal> {
    let listening = || {
        let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
        // Else a gateway that is started again would wait for the connections of the one before.
        socket.set_reuseaddr(true)?;
        socket.bind(address)?;
        socket.listen(BACKLOG)
    };
    listening().map_err(|error: io::Error| {
        Fatal::Settings(format!("{flag} {address}: can't listen there: {error}"))
    })
}

fn default_workers() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from).min(WORKERS_MAX_DEFAULT)
}

/// Files for other things than clients: links to nodes, etcd, metrics.
const FILES_KEPT: u64 = 64 + 64;
/// Below it a gateway serves fewer clients than a test of it has.
const FILES_GOOD: u64 = 10_240;

/// As many clients as the limit of open files leaves room for; said if they are few.
fn connections() -> Result<Connections, Fatal> {
    let allowed = files::allowed();
    let connections = files::connections(allowed, FILES_KEPT).ok_or_else(|| {
        Fatal::Settings(format!(
            "{allowed} open files are allowed, too few: raise the hard limit (ulimit -Hn, LimitNOFILE=)"
        ))
    })?;
    if allowed < FILES_GOOD {
        warn!(
            allowed,
            wanted = FILES_GOOD,
            connections,
            "few connections are possible: raise the hard limit of open files (ulimit -Hn, LimitNOFILE=)"
        );
    }
    Ok(Connections::new(connections))
}

/// Takes connections and gives each to the worker that has the fewest. A listener per worker would let the kernel
/// choose by a hash, and with few connections some workers would stay without any.
///
/// One that finds no place does not wait for as long as another may be idle: the workers close some that are.
async fn accept(listener: &TcpListener, connections: &Connections, doors: &[Door]) -> Infallible {
    let crowded = || doors.iter().for_each(|door| tell(&door.inbox, ToWorker::Crowded));
    loop {
        let (stream, place) = connections.accept_or(listener, crowded).await;
        if let Err(error) = hand_over(stream, place, doors) {
            warn!(%error, "connection not handed over");
        }
    }
}

fn hand_over(stream: TcpStream, place: Place, doors: &[Door]) -> io::Result<()> {
    // Answers are small and whole: waiting for more to send would only delay them.
    stream.set_nodelay(true)?;
    let stream = stream.into_std()?;
    let door = doors.iter().min_by_key(|door| door.load.count());
    let door = door.expect("there is at least one worker");
    let connection = Connection { stream, counted: door.load.one(), place };
    // A worker that has ended is noticed by whoever watches them.
    let _ended = door.inbox.send(ToWorker::Connection(connection));
    Ok(())
}

struct Workers(Vec<Handle>);

impl Workers {
    fn inboxes(&self) -> Vec<mpsc::UnboundedSender<ToWorker>> {
        self.0.iter().map(|handle| handle.inbox.clone()).collect()
    }

    fn doors(&self) -> Vec<Door> {
        let door =
            |handle: &Handle| Door { inbox: handle.inbox.clone(), load: handle.load.clone() };
        self.0.iter().map(door).collect()
    }

    /// Waits until one has ended, which only a failure makes it do.
    async fn any_ended(&mut self) -> usize {
        poll_fn(|cx| {
            for (number, handle) in self.0.iter_mut().enumerate() {
                let ended =
                    handle.ended.as_mut().is_some_and(|ended| Pin::new(ended).poll(cx).is_ready());
                if ended {
                    handle.ended = None;
                    return Poll::Ready(number);
                }
            }
            Poll::Pending
        })
        .await
    }

    async fn stop(self, until: Instant) {
        for handle in &self.0 {
            tell(&handle.inbox, ToWorker::Stop { until });
        }
        for (number, handle) in self.0.into_iter().enumerate() {
            if let Some(ended) = handle.ended {
                // Never sent, only dropped.
                let _dropped = ended.await;
            }
            if handle.thread.join().is_err() {
                error!(worker = number, "ended with a panic");
            }
        }
    }
}

/// This gateway as a member of the cluster: what it does about etcd.
struct Member {
    options: Options,
    address: SocketAddr,
    directory: watch::Sender<Directory>,
    readiness: Readiness,
    inboxes: Vec<mpsc::UnboundedSender<ToWorker>>,
    asked: mpsc::UnboundedReceiver<FromWorker>,
}

impl Member {
    /// Until `ending`; then the lease is given back.
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
        let mut sessions = Sessions::new(store.clone(), address, meta.incarnation, ttl_s, workers);
        let mut reporter = Reporter::new(self.directory.subscribe());
        self.directory.send_modify(|all| all.meta = Some(meta));
        self.readiness.waits_for(None);
        let learn = |shard: &ShardConfig| {
            self.inboxes.iter().for_each(|inbox| tell(inbox, ToWorker::Shard(shard.clone())));
        };
        let mut following =
            pin!(directory::follow(&store, &self.directory, &self.readiness, learn));
        loop {
            let changed = tokio::select! {
                changed = sessions.next() => changed,
                asked = self.asked.recv() => match asked {
                    Some(FromWorker::Report(report)) => {
                        reporter.report(report, Instant::now());
                        continue;
                    }
                    Some(FromWorker::Abandon(session)) => sessions.abandon(session).await,
                    // All workers have ended: so does this process.
                    None => {
                        let _ended = (&mut ending).await;
                        break;
                    }
                },
                () = &mut following => continue,
                _ = &mut ending => break,
            };
            for (worker, session) in changed {
                tell(&self.inboxes[worker], ToWorker::Session(session));
            }
        }
        sessions.stop().await;
        Ok(())
    }
}

/// A worker that has ended is noticed by whoever watches them.
fn tell(inbox: &mpsc::UnboundedSender<ToWorker>, news: ToWorker) {
    let _ended = inbox.send(news);
}
