//! The process: its listeners, its start while etcd is away, and its shutdown.

use engine::coordinator::Coordinator;
use metastore::{CoordinatorRecord, LeaseSettings, Metastore};
use process::{ProcessExit, StopSignals};
use proto::wire::operator_server::{self, OperatorServer};
use proto::wire::reports_server::{self, ReportsServer};
use telemetry::files::{self, ConnectionLimit};
use telemetry::{Health, Metrics};
use tokio::runtime::Builder;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tonic::transport::Server;
use tracing::{error, info};

use crate::Options;
use crate::driver::{Driver, DriverState};
use crate::etcd::EtcdHandle;
use crate::events::EventPublisher;
use crate::metrics::Gauges;
use crate::nodes::Nodes;
use crate::operators::OperatorService;
use crate::reports::ReportService;

/// The capacity of the queue of messages to the driver.
const INBOX_MAX: usize = 1_024;

/// Runs a coordinator until a signal stops it (SIGTERM, SIGINT), and returns the exit code.
pub fn run(options: Options) -> u8 {
    // The tasks are small and mostly wait for I/O. A second thread keeps a large list from delaying
    // a probe.
    process::run(Builder::new_multi_thread().worker_threads(2), async {
        let mut signals = StopSignals::new()?;
        let stop = async {
            let signal = signals.next().await;
            info!("received {signal}, stopping");
        };
        serve(options, stop).await?;
        info!("stopped");
        Ok(())
    })
}

/// Runs a coordinator within a runtime until `stop` is ready. An error is the reason why it ended
/// by itself.
pub async fn serve(options: Options, stop: impl Future<Output = ()>) -> Result<(), ProcessExit> {
    options.check()?;
    let connections = connections()?;
    tokio::pin!(stop);
    let (tasks, mut failures) = telemetry::critical_tasks();
    // The tasks beside the loop. They are aborted when this function returns, and the end of any of
    // them ends this function.
    let mut beside = JoinSet::new();
    let health = Health::new("etcd");
    let (metrics, gauges) = Metrics::new(Gauges::new);
    let monitoring =
        process::monitoring(options.process.metrics, health.clone(), metrics.into()).await?;
    beside.spawn(tasks.forever("serving --metrics", monitoring));
    let (listener, address) = options.listen.bind().await?;
    let (messages, inbox) = mpsc::channel(INBOX_MAX);
    let (led_cluster, led_cluster_now) = watch::channel(None);
    let own = [operator_server::SERVICE_NAME, reports_server::SERVICE_NAME];
    let common = telemetry::grpc(&health, proto::DESCRIPTORS, &own).await;
    let common = common.map_err(|error| ProcessExit::Failed(format!("reflection: {error}")))?;
    let operators = OperatorService::new(messages.clone(), led_cluster_now.clone());
    let operators = proto::limited!(OperatorServer::new(operators));
    let reports = ReportService::new(messages.clone(), led_cluster_now);
    let reports = proto::limited!(ReportsServer::new(reports));
    let incoming = connections.incoming(listener);
    beside.spawn(tasks.forever("serving --listen", async move {
        let server =
            Server::builder().add_routes(common).add_service(reports).add_service(operators);
        if let Err(error) = server.serve_with_incoming(incoming).await {
            error!(%error, "gRPC server failed, reports are no longer received");
        }
    }));

    let settings = options.cluster.settings();
    let metastore = tokio::select! {
        connected = Metastore::join(&settings, |reason| health.not_ready(reason)) => connected?,
        why = failures.next() => return Err(ProcessExit::Failed(why)),
        () = &mut stop => return Ok(()),
    };
    let etcd = EtcdHandle::new(metastore.clone(), messages.clone());
    beside.spawn(tasks.forever("following etcd", etcd.clone().follow()));
    beside.spawn(tasks.forever("checking etcd", etcd.clone().watch_health()));
    let lease = LeaseSettings { ttl_s: options.process.lease_ttl, ..LeaseSettings::default() };
    let election =
        metastore.stand_for_election(&CoordinatorRecord { address: address.clone() }, lease);
    info!(address, cluster = options.cluster.cluster, "entered the election");
    let driver = Driver {
        coordinator: Coordinator::new(options.settings(fastrand::u128(1..))),
        events: EventPublisher::new(&options),
        options,
        etcd,
        nodes: Nodes::new(messages, tasks.clone()),
        health,
        gauges,
        led_cluster,
        tasks,
        state: DriverState::new(),
    };
    driver.run(election, inbox, failures, stop).await
}

/// The number of file descriptors that are reserved for other uses than incoming connections: etcd,
/// connections to nodes, metrics.
const FILES_RESERVED: u64 = 64 + 32;

/// Returns the limit of incoming connections, by the limit of open files.
pub(crate) fn connections() -> Result<ConnectionLimit, ProcessExit> {
    Ok(ConnectionLimit::new(files::connections(files::allowed(), FILES_RESERVED)?))
}
