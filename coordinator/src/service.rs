//! The process: what it listens on, waiting for etcd, and its end.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use engine::coordinator::Coordinator;
use metastore::{Candidate, LeaseSettings, Metastore, Pause, Settings};
use proto::wire::reports_server::{self, ReportsServer};
use telemetry::files::{self, Connections};
use telemetry::{Health, Metrics};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tonic::transport::Server;
use tracing::{error, info, warn};

use crate::driver::{Driver, State};
use crate::etcd::Etcd;
use crate::metrics::Gauges;
use crate::nodes::Nodes;
use crate::reports::Desk;
use crate::{Exit, Options};

/// What may wait for the driver, which never waits for anybody itself.
const INBOX_MAX: usize = 1_024;

/// How long after a failure etcd is asked again at the start: first, and in the end.
const CONNECT_AGAIN_FIRST: Duration = Duration::from_millis(100);
const CONNECT_AGAIN_LONGEST: Duration = Duration::from_secs(1);
/// What a start waits for is said again this often.
const SAY_EVERY: Duration = Duration::from_secs(60);

/// Runs a coordinator until it is asked to stop (SIGTERM, SIGINT); returns the exit code.
pub fn run(options: Options) -> u8 {
    match run_here(options) {
        Ok(()) => {
            info!("stopped");
            0
        }
        Err(exit) => {
            error!("{exit}");
            exit.code()
        }
    }
}

fn run_here(options: Options) -> Result<(), Exit> {
    let failed = |error: std::io::Error| Exit::Failed(format!("can't start: {error}"));
    // Everything here is small and waits for others most of the time; two, so that a large list does not hold up a probe.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(failed)?;
    let ended = runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
        let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
        let stop = async move {
            tokio::select! {
                _ = terminate.recv() => info!("asked to stop by SIGTERM"),
                _ = interrupt.recv() => info!("asked to stop by SIGINT"),
            }
        };
        serve(options, stop).await
    });
    runtime.shutdown_timeout(Duration::from_secs(1));
    ended
}

/// Runs a coordinator within a runtime until `stop` is ready.
pub async fn serve(options: Options, stop: impl Future<Output = ()>) -> Result<(), Exit> {
    options.check()?;
    tokio::pin!(stop);
    let (vital, mut failures) = telemetry::vital();
    // What runs beside the loop; it ends with this function, and this function with any of it.
    let mut beside = JoinSet::new();
    let health = Health::new("etcd");
    let gauges = Gauges::new();
    if let Some(address) = options.metrics {
        let metrics = Metrics::new(|registry| gauges.register(registry));
        let listener = bind("--metrics", address).await?;
        let serving = telemetry::serve(listener, health.clone(), Arc::new(metrics));
        beside.spawn(vital.forever("serving --metrics", serving));
    }
    let listener = bind("--listen", options.listen).await?;
    let address = advertised(&options, &listener)?;
    let (told, inbox) = mpsc::channel(INBOX_MAX);
    let (leads, leads_now) = watch::channel(None);
    let own = [reports_server::SERVICE_NAME];
    let common = telemetry::grpc(&health, proto::DESCRIPTORS, &own).await;
    let common = common.map_err(|error| Exit::Failed(format!("reflection: {error}")))?;
    let desk = proto::limited!(ReportsServer::new(Desk::new(told.clone(), leads_now)));
    let incoming = connections()?.incoming(listener);
    beside.spawn(vital.forever("serving --listen", async move {
        let server = Server::builder().add_routes(common).add_service(desk);
        if let Err(error) = server.serve_with_incoming(incoming).await {
            error!(%error, "reports are no longer taken");
        }
    }));

    let metastore = tokio::select! {
        connected = connect(&options, &health) => connected?,
        why = failures.next() => return Err(Exit::Failed(why)),
        () = &mut stop => return Ok(()),
    };
    let etcd = Etcd::new(metastore.clone(), told.clone());
    beside.spawn(vital.forever("following etcd", etcd.clone().follow()));
    beside.spawn(vital.forever("asking etcd", etcd.clone().ask_for_ever()));
    let lease = LeaseSettings { ttl_s: options.lease_ttl, ..LeaseSettings::default() };
    let election = metastore.stand_for_election(&Candidate { address: address.clone() }, lease);
    info!(address, cluster = options.cluster, "stands for election");
    let driver = Driver {
        machine: Coordinator::new(options.settings(fastrand::u128(1..))),
        options,
        etcd,
        nodes: Nodes::new(told, vital.clone()),
        health,
        gauges,
        leads,
        vital,
        state: State::new(),
    };
    driver.run(election, inbox, failures, stop).await
}

/// Connects to etcd, however long that takes.
async fn connect(options: &Options, health: &Health) -> Result<Metastore, Exit> {
    let settings = Settings::new(options.etcd.clone(), &options.cluster);
    let mut pause = Pause::new(CONNECT_AGAIN_FIRST, CONNECT_AGAIN_LONGEST);
    let mut said: Option<Instant> = None;
    loop {
        let error = match Metastore::connect(&settings).await {
            Ok(metastore) => return Ok(metastore),
            Err(error) if error.is_transient() => error,
            Err(error) if error.is_misfit() => return Err(Exit::Usage(format!("--etcd: {error}"))),
            Err(error) => return Err(Exit::Failed(error.to_string())),
        };
        health.not_ready(error.reason());
        if said.is_none_or(|said| said.elapsed() >= SAY_EVERY) {
            said = Some(Instant::now());
            warn!(etcd = options.etcd.join(","), %error, "waiting for etcd");
        }
        pause.wait().await;
    }
}

/// Files for other things than connections that come: etcd, nodes that are asked, metrics.
const FILES_KEPT: u64 = 64 + 32;

fn connections() -> Result<Connections, Exit> {
    let allowed = files::allowed();
    files::connections(allowed, FILES_KEPT).map(Connections::new).ok_or_else(|| {
        Exit::Usage(format!(
            "{allowed} open files are allowed, too few: raise the hard limit (ulimit -Hn, LimitNOFILE=)"
        ))
    })
}

async fn bind(flag: &str, address: SocketAddr) -> Result<TcpListener, Exit> {
    let bound = TcpListener::bind(address).await;
    bound.map_err(|error| Exit::Usage(format!("{flag} {address}: can't listen there: {error}")))
}

/// What others are told to dial.
fn advertised(options: &Options, listener: &TcpListener) -> Result<String, Exit> {
    if let Some(address) = &options.advertise {
        return Ok(address.clone());
    }
    let bound = listener.local_addr();
    bound
        .map(|address| address.to_string())
        .map_err(|error| Exit::Failed(format!("--listen {}: {error}", options.listen)))
}
