//! One worker: a thread with its own runtime, machine, links and connections.
//!
//! It shares nothing with its neighbours but counters and the directory. What concerns it comes in by one channel.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;
use std::time::Instant;

use engine::batcher::{Counts, Effect, Event, NotReady, Settings, Worker as Machine};
use engine::config::ShardConfig;
use engine::ids::SessionId;
use engine::message::Report;
use telemetry::files::Place;
use telemetry::{Health, Metrics, Vital};
use tokio::net::TcpStream;
use tokio::runtime::{Builder, LocalOptions};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::spawn_local;
use tracing::{error, warn};

use crate::directory::Directory;
use crate::http::Front;
use crate::lanes::{self, Lanes, World};
use crate::links::Links;
use crate::metrics::Counters;
use crate::readiness::Readiness;
use crate::status;

/// What a worker is told.
pub(crate) enum ToWorker {
    Connection(Connection),
    Shard(ShardConfig),
    Session(Option<SessionId>),
    /// A client waits for a place: close connections that are idle.
    Crowded,
    /// Take no more, finish what there is by then, end.
    Stop {
        until: Instant,
    },
}

/// A client that has come.
pub(crate) struct Connection {
    pub(crate) stream: std::net::TcpStream,
    pub(crate) counted: Counted,
    pub(crate) place: Place,
}

/// How many connections a worker has, those on their way to it included.
#[derive(Clone, Default)]
pub(crate) struct Load(Arc<AtomicUsize>);

/// One of them, until dropped.
pub(crate) struct Counted(Arc<AtomicUsize>);

impl Load {
    pub(crate) fn count(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }

    pub(crate) fn one(&self) -> Counted {
        self.0.fetch_add(1, Ordering::Relaxed);
        Counted(self.0.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Where connections for a worker are handed in.
pub(crate) struct Door {
    pub(crate) inbox: mpsc::UnboundedSender<ToWorker>,
    pub(crate) load: Load,
}

/// What a worker asks of the process.
pub(crate) enum FromWorker {
    /// A hint for the leading coordinator.
    Report(Report),
    /// This session is used for nothing new: register again.
    Abandon(SessionId),
}

/// What all workers are given.
#[derive(Clone)]
pub(crate) struct Shared {
    pub(crate) settings: Settings,
    pub(crate) directory: watch::Receiver<Directory>,
    pub(crate) readiness: Readiness,
    pub(crate) health: Health,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) counters: Arc<Counters>,
    pub(crate) board: status::Board,
    pub(crate) vital: Vital,
    /// How long a connection may say nothing, or take for the head of a request.
    pub(crate) idle: Duration,
    pub(crate) process: mpsc::UnboundedSender<FromWorker>,
}

/// A running worker. The thread ends after [`ToWorker::Stop`], or with a panic.
pub(crate) struct Handle {
    pub(crate) inbox: mpsc::UnboundedSender<ToWorker>,
    pub(crate) load: Load,
    pub(crate) thread: JoinHandle<()>,
    /// Ready when the thread ends, however it does. None once that was noticed.
    pub(crate) ended: Option<oneshot::Receiver<()>>,
}

pub(crate) fn spawn(number: usize, shared: Shared) -> std::io::Result<Handle> {
    let (inbox, news) = mpsc::unbounded_channel();
    let (alive, ended) = oneshot::channel();
    let thread = std::thread::Builder::new().name(format!("worker-{number}")).spawn(move || {
        let _alive: oneshot::Sender<()> = alive;
        let runtime =
            Builder::new_current_thread().enable_all().build_local(LocalOptions::default());
        match runtime {
            Ok(runtime) => runtime.block_on(work(number, shared, news)),
            Err(error) => error!(%error, "no runtime for a worker"),
        }
    })?;
    Ok(Handle { inbox, load: Load::default(), thread, ended: Some(ended) })
}

async fn work(number: usize, shared: Shared, mut news: mpsc::UnboundedReceiver<ToWorker>) {
    let lanes = Lanes::new();
    let links = Links::new(lanes.clone(), shared.directory.clone(), shared.vital.clone());
    spawn_local(shared.vital.job("keeping links to nodes", links.clone().keep()));
    let (idle, mut is_idle) = watch::channel(true);
    let world = Surroundings {
        number,
        links,
        readiness: shared.readiness,
        counters: shared.counters.clone(),
        process: shared.process,
        idle,
        seen: RefCell::new(Seen { counts: Counts::default(), not_ready: Some(NotReady::Map) }),
    };
    let settings = Settings { worker: number, ..shared.settings };
    let machine = Machine::new(settings.clone());
    let turns = spawn_local(lanes::turns(lanes.clone(), machine, settings, world));
    let front = Front::new(
        lanes.clone(),
        shared.health,
        shared.metrics,
        shared.counters,
        shared.board,
        shared.idle,
    );
    let obeying = async {
        while let Some(told) = news.recv().await {
            match told {
                ToWorker::Connection(connection) => take(&front, connection),
                ToWorker::Shard(config) => lanes.push(Event::Config(config)),
                ToWorker::Session(session) => lanes.push(Event::Session(session)),
                ToWorker::Crowded => front.shed(),
                ToWorker::Stop { until } => return until,
            }
        }
        Instant::now()
    };
    tokio::pin!(turns);
    let until = tokio::select! {
        until = obeying => until,
        ended = &mut turns => panic!("the turns have ended: {ended:?}"),
    };
    lanes.push(Event::Stop);
    front.stop();
    // Clients first; then what was told unknown to them, or is on its way without anybody waiting.
    let finished = async {
        front.closed().await;
        let _ended = is_idle.wait_for(|&idle| idle).await;
    };
    if tokio::time::timeout_at(until.into(), finished).await.is_err() {
        warn!(worker = number, "stopped with something unfinished");
    }
}

fn take(front: &Rc<Front>, Connection { stream, counted, place }: Connection) {
    match TcpStream::from_std(stream) {
        Ok(stream) => {
            let serving = front.clone().serve(stream);
            spawn_local(async move {
                serving.await;
                drop((counted, place));
            });
        }
        Err(error) => warn!(%error, "connection not taken"),
    }
}

/// What is around the machine: links, metrics, readiness.
struct Surroundings {
    number: usize,
    links: Rc<Links>,
    readiness: Readiness,
    counters: Arc<Counters>,
    process: mpsc::UnboundedSender<FromWorker>,
    idle: watch::Sender<bool>,
    seen: RefCell<Seen>,
}

struct Seen {
    counts: Counts,
    not_ready: Option<NotReady>,
}

impl World for Surroundings {
    fn perform(&self, effect: Effect) {
        // A process that does not listen any more is ending.
        let _ending = match effect {
            Effect::Send { conn, message } => return self.links.send(conn, message),
            Effect::Report(report) => self.process.send(FromWorker::Report(report)),
            Effect::AbandonSession(session) => {
                // Collected, because the key was gone for long; or answered out of order, which would be a bug and
                // is counted as `dkc_refusals_total{reason="order"}`.
                warn!(worker = self.number, ?session, "session given up, making another");
                self.process.send(FromWorker::Abandon(session))
            }
            Effect::Wrote { .. } | Effect::ReadDone { .. } => {
                unreachable!("answers go to those who wait for them")
            }
        };
    }

    fn look(&self, machine: &Machine, surroundings_changed: bool) {
        let mut seen = self.seen.borrow_mut();
        let counts = machine.counts();
        if counts != seen.counts {
            self.counters.worker(&seen.counts, &counts);
            seen.counts = counts;
        }
        if surroundings_changed {
            let not_ready = machine.not_ready();
            if not_ready != seen.not_ready {
                self.readiness.worker_waits_for(self.number, not_ready);
                seen.not_ready = not_ready;
            }
        }
        let idle = machine.is_idle();
        self.idle.send_if_modified(|known| std::mem::replace(known, idle) != idle);
    }
}
