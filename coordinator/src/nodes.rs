//! Queries to storage nodes: probes, gathering of log ends, and requests to step down.
//!
//! One connection per node is kept open, so that a probe costs one message. **A refused connection
//! and silence are different results**: the first means that the process is gone, and is known at
//! once; the second may be a slow network.

use std::collections::BTreeMap;
use std::error::Error;
use std::time::Duration;

use engine::coordinator::{Event, ProbeResult};
use engine::ids::{Epoch, ShardId, StoreBoot, StoreId};
use engine::message::{NodeQuery, NodeQueryReply};
use process::{Pings, is_refused};
use proto::wire;
use proto::wire::control_client::ControlClient;
use telemetry::CriticalTasks;
use tokio::sync::mpsc;
use tonic::Status;
use tonic::transport::Channel;
use tracing::{debug, warn};

use crate::etcd::DriverMessage;

/// The time limit of a probe. A node that has not replied by then is silent.
const PROBE_LIMIT: Duration = Duration::from_millis(150);
/// The time limit of gathering. The state machine waits for less; a later reply may still help its
/// next decision.
const GATHER_LIMIT: Duration = Duration::from_millis(150);
/// The time limit of stepping down. A primary replies once all entries in its log are on its disk.
const STEP_DOWN_LIMIT: Duration = Duration::from_secs(1);

/// A silent connection is closed, so that a node that can be reached again is not queried over the
/// old one, whose TCP retransmissions have become rare.
const PINGS: Pings = Pings { every: Duration::from_secs(1), timeout: Duration::from_secs(1) };

/// The connections to the storage nodes.
pub(crate) struct Nodes {
    messages: mpsc::Sender<DriverMessage>,
    connections: BTreeMap<StoreId, QueryConnection>,
    /// The last address of each node that can't be dialled; each was logged once.
    undialable: BTreeMap<StoreId, String>,
    tasks: CriticalTasks,
}

struct QueryConnection {
    address: String,
    client: ControlClient<Channel>,
}

/// The reason why there is no reply.
enum QueryFailure {
    /// The connection was refused: no process listens there.
    Refused,
    /// There was no valid reply in time.
    Silent,
}

impl Nodes {
    pub(crate) fn new(messages: mpsc::Sender<DriverMessage>, tasks: CriticalTasks) -> Self {
        Self { messages, connections: BTreeMap::new(), undialable: BTreeMap::new(), tasks }
    }

    pub(crate) fn probe(&mut self, target: QueryTarget<'_>, probe: u64) {
        let query = NodeQuery::Probe { to: target.to };
        self.ask(target, query, PROBE_LIMIT, move |reply| {
            let result = match reply {
                Ok(NodeQueryReply::Probe { from, fsync_age_ms }) => {
                    ProbeResult::Alive { from, fsync_age_ms }
                }
                Ok(_) | Err(QueryFailure::Silent) => ProbeResult::Silent,
                Err(QueryFailure::Refused) => ProbeResult::Refused,
            };
            Event::Probed { probe, result }
        });
    }

    pub(crate) fn gather(&mut self, target: QueryTarget<'_>, gather: u64, shards: Vec<ShardId>) {
        let to = target.to;
        self.ask(target, NodeQuery::Gather { shards }, GATHER_LIMIT, move |reply| {
            let ends = match reply {
                // Another process of that store may have another log.
                Ok(NodeQueryReply::Gather { from, ends }) if from == to => Some(ends),
                _ => None,
            };
            Event::Gathered { gather, store: to.store, ends }
        });
    }

    pub(crate) fn step_down(&mut self, target: QueryTarget<'_>, shard: ShardId, epoch: Epoch) {
        self.ask(target, NodeQuery::StepDown { shard, epoch }, STEP_DOWN_LIMIT, move |reply| {
            let end = match reply {
                Ok(NodeQueryReply::StepDown { shard: of, end }) if of == shard => end,
                _ => None,
            };
            Event::SteppedDown { shard, epoch, end }
        });
    }

    /// Queries a node in a critical task, since the state machine waits for the result of each
    /// query. A node that can't be dialled is silent.
    fn ask(
        &mut self,
        target: QueryTarget<'_>,
        asked: NodeQuery,
        limit: Duration,
        event: impl FnOnce(Result<NodeQueryReply, QueryFailure>) -> Event + Send + 'static,
    ) {
        let client = self.client(&target);
        let message = wire::NodeQuery::new(target.cluster, asked);
        let messages = self.messages.clone();
        tokio::spawn(self.tasks.job("a query to a node", async move {
            let reply = match client {
                Some(client) => query(client, message, limit).await,
                None => Err(QueryFailure::Silent),
            };
            let _driver_gone = messages.send(DriverMessage::Event(event(reply))).await;
        }));
    }

    /// Returns the connection to a node, or `None` if its address is not known or can't be dialled.
    fn client(&mut self, target: &QueryTarget<'_>) -> Option<ControlClient<Channel>> {
        let address = target.address?;
        let store = target.to.store;
        if self.connections.get(&store).is_none_or(|connection| connection.address != address) {
            let client = match dial(address) {
                Ok(client) => client,
                Err(why) => {
                    self.log_undialable(target, address, &why);
                    return None;
                }
            };
            self.undialable.remove(&store);
            self.connections.insert(store, QueryConnection { address: address.to_owned(), client });
        }
        self.connections.get(&store).map(|connection| connection.client.clone())
    }

    /// Logs an address that can't be dialled, once, since its node is queried several times a
    /// second.
    fn log_undialable(&mut self, target: &QueryTarget<'_>, address: &str, why: &str) {
        let store = target.to.store;
        if self.undialable.get(&store).is_none_or(|logged| logged != address) {
            self.undialable.insert(store, address.to_owned());
            warn!(node = target.name, %store, address, why,
                "node can't be dialled and gets no shards: restart it with another --advertise");
        }
    }
}

/// The node that a query is for.
pub(crate) struct QueryTarget<'a> {
    pub(crate) to: StoreBoot,
    /// The name of the node, for the log.
    pub(crate) name: String,
    pub(crate) address: Option<&'a str>,
    pub(crate) cluster: u128,
}

/// Returns a client that connects at the first query, and again whenever the connection is gone.
fn dial(address: &str) -> Result<ControlClient<Channel>, String> {
    let address = metastore::advertised(address)?;
    let endpoint = process::endpoint(&address, PINGS).map_err(|error| error.to_string())?;
    Ok(proto::limited!(ControlClient::new(endpoint.connect_lazy())))
}

/// Sends a query, and sends it again if the connection was cut. Every query may be sent twice: a
/// reply changes nothing, and a request to step down names its epoch.
async fn query(
    mut client: ControlClient<Channel>,
    message: wire::NodeQuery,
    limit: Duration,
) -> Result<NodeQueryReply, QueryFailure> {
    let querying = async {
        match client.query(message.clone()).await {
            // The connection had ended meanwhile. A new one shows whether a process listens.
            Err(status) if was_cut(&status) => client.query(message).await,
            answer => answer,
        }
    };
    match tokio::time::timeout(limit, querying).await {
        Ok(Ok(reply)) => NodeQueryReply::try_from(reply.into_inner()).map_err(|error| {
            warn!(%error, "reply of a node can't be read");
            QueryFailure::Silent
        }),
        Ok(Err(status)) if is_refused(&status) => Err(QueryFailure::Refused),
        Ok(Err(status)) => {
            debug!(%status, "query failed");
            Err(QueryFailure::Silent)
        }
        Err(_) => Err(QueryFailure::Silent),
    }
}

/// Returns whether the connection has failed after it was made, and no process has refused the
/// query.
fn was_cut(status: &Status) -> bool {
    status.source().is_some() && !is_refused(status)
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use engine::ids::{Boot, Seq};
    use engine::message::ShardEnd;
    use proto::wire::control_server::{Control, ControlServer};
    use tokio::net::TcpListener;
    use tokio::runtime::Runtime;
    use tokio::time::Instant;
    use tonic::transport::Server;
    use tonic::transport::server::TcpIncoming;
    use tonic::{Request, Response};

    use super::*;

    const CLUSTER: u128 = 7;
    const NODE: StoreBoot = StoreBoot { store: StoreId(1), boot: Boot(1) };

    /// A node that replies, or does not reply at all.
    struct Node {
        cluster: u128,
        me: StoreBoot,
        answers: bool,
    }

    #[tonic::async_trait]
    impl Control for Node {
        async fn query(
            &self,
            request: Request<wire::NodeQuery>,
        ) -> Result<Response<wire::NodeQueryReply>, Status> {
            let request = request.into_inner();
            wire::Open::accept_required(request.open.as_ref(), self.cluster)?;
            if !self.answers {
                std::future::pending::<()>().await;
            }
            let from = self.me;
            let reply = match proto::query_of(request)? {
                NodeQuery::Probe { .. } => NodeQueryReply::Probe { from, fsync_age_ms: 3 },
                NodeQuery::Gather { shards } => {
                    let ends = shards.into_iter().map(|shard| ShardEnd {
                        shard,
                        promised: Epoch(1),
                        last: (Epoch(1), Seq(5)),
                        applied: Seq(5),
                        unfit: false,
                    });
                    NodeQueryReply::Gather { from, ends: ends.collect() }
                }
                NodeQuery::StepDown { shard, epoch } => {
                    NodeQueryReply::StepDown { shard, end: Some((epoch, Seq(5))) }
                }
                NodeQuery::Status => NodeQueryReply::Status {
                    from,
                    replicas: Vec::new(),
                    scrub: Default::default(),
                    full: false,
                },
                NodeQuery::Scrub { .. } => NodeQueryReply::Scrub { from },
                NodeQuery::Recover { .. } | NodeQuery::Split { .. } => {
                    return Err(Status::unimplemented("a fake"));
                }
            };
            Ok(Response::new(reply.into()))
        }
    }

    /// Runs a node in a runtime of its own: when that is shut down, its sockets close as those of a
    /// killed process do.
    fn run(node: Node, at: SocketAddr) -> (Runtime, SocketAddr) {
        let runtime = tokio::runtime::Builder::new_multi_thread();
        let runtime = { runtime }.worker_threads(1).enable_all().build().expect("a runtime");
        let listener = std::net::TcpListener::bind(at).expect("a free port");
        listener.set_nonblocking(true).expect("a socket");
        let at = listener.local_addr().expect("it is bound");
        runtime.spawn(async move {
            let listener = TcpListener::from_std(listener).expect("a socket");
            let service = ControlServer::new(node);
            Server::builder()
                .add_service(service)
                .serve_with_incoming(TcpIncoming::from(listener))
                .await
        });
        (runtime, at)
    }

    fn anywhere() -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], 0))
    }

    fn healthy() -> Node {
        Node { cluster: CLUSTER, me: NODE, answers: true }
    }

    fn target(to: StoreBoot, address: Option<&str>) -> QueryTarget<'_> {
        QueryTarget { to, name: "node-1".to_owned(), address, cluster: CLUSTER }
    }

    struct Prober {
        nodes: Nodes,
        inbox: mpsc::Receiver<DriverMessage>,
        at: String,
    }

    impl Prober {
        fn new(at: SocketAddr) -> Self {
            let (messages, inbox) = mpsc::channel(8);
            let (tasks, _) = telemetry::critical_tasks();
            Self { nodes: Nodes::new(messages, tasks), inbox, at: at.to_string() }
        }

        async fn answer(&mut self) -> Event {
            let limit = Duration::from_secs(5);
            let message = tokio::time::timeout(limit, self.inbox.recv()).await;
            match message.expect("an answer").expect("a sender lives") {
                DriverMessage::Event(event) => event,
                other => panic!("{other:?}"),
            }
        }

        async fn probe(&mut self) -> ProbeResult {
            let target = target(NODE, Some(&self.at));
            self.nodes.probe(target, 9);
            match self.answer().await {
                Event::Probed { probe: 9, result } => result,
                other => panic!("{other:?}"),
            }
        }
    }

    #[tokio::test]
    async fn a_process_that_went_is_refused_and_its_successor_is_seen() {
        let (runtime, at) = run(healthy(), anywhere());
        let mut prober = Prober::new(at);
        assert_eq!(prober.probe().await, ProbeResult::Alive { from: NODE, fsync_age_ms: 3 });
        runtime.shutdown_background();
        // A refusal is known before the time limit, also after a connection was open. (Shutting
        // down takes a moment.)
        let began = Instant::now();
        while prober.probe().await != ProbeResult::Refused {
            assert!(began.elapsed() < Duration::from_secs(5), "never refused");
        }
        let began = Instant::now();
        assert_eq!(prober.probe().await, ProbeResult::Refused);
        assert!(began.elapsed() < PROBE_LIMIT, "{:?}", began.elapsed());

        let newer = StoreBoot { boot: Boot(2), ..NODE };
        let (runtime, _) = run(Node { me: newer, ..healthy() }, at);
        assert_eq!(prober.probe().await, ProbeResult::Alive { from: newer, fsync_age_ms: 3 });
        runtime.shutdown_background();
    }

    /// A node that is restarted may have another address, and another process may have its former
    /// one.
    #[tokio::test]
    async fn a_node_is_asked_where_it_is_now() {
        let (before, at) = run(healthy(), anywhere());
        let mut prober = Prober::new(at);
        assert_eq!(prober.probe().await, ProbeResult::Alive { from: NODE, fsync_age_ms: 3 });
        let newer = StoreBoot { boot: Boot(2), ..NODE };
        let (after, at) = run(Node { me: newer, ..healthy() }, anywhere());
        prober.at = at.to_string();
        assert_eq!(prober.probe().await, ProbeResult::Alive { from: newer, fsync_age_ms: 3 });
        before.shutdown_background();
        assert_eq!(prober.probe().await, ProbeResult::Alive { from: newer, fsync_age_ms: 3 });
        after.shutdown_background();
    }

    #[tokio::test]
    async fn silence_is_reported_in_time_and_is_not_refusal() {
        let (silent, at) = run(Node { answers: false, ..healthy() }, anywhere());
        let began = Instant::now();
        assert_eq!(Prober::new(at).probe().await, ProbeResult::Silent);
        assert!(began.elapsed() >= PROBE_LIMIT, "{:?}", began.elapsed());
        silent.shutdown_background();
        // A node of another cluster counts as silent.
        let (other, at) = run(Node { cluster: CLUSTER + 1, ..healthy() }, anywhere());
        assert_eq!(Prober::new(at).probe().await, ProbeResult::Silent);
        other.shutdown_background();
    }

    /// The record may contain any address. An invalid one is logged once, not at each query.
    #[tokio::test]
    async fn a_node_that_can_not_be_dialled_is_silent() {
        let (runtime, at) = run(healthy(), anywhere());
        for address in ["not an address", "node-9", "0.0.0.0:7001", "", "http://127.0.0.1:1"] {
            let mut prober = Prober::new(at);
            prober.at = address.to_owned();
            for _ in 0..3 {
                assert_eq!(prober.probe().await, ProbeResult::Silent, "{address}");
                assert_eq!(prober.nodes.undialable[&NODE.store], address);
            }
            // The node is restarted with a valid address.
            prober.at = at.to_string();
            assert!(matches!(prober.probe().await, ProbeResult::Alive { .. }));
            assert!(prober.nodes.undialable.is_empty());
        }
        runtime.shutdown_background();
    }

    #[tokio::test]
    async fn every_query_has_a_result_also_without_an_address() {
        let (runtime, at) = run(healthy(), anywhere());
        let (to, shard) = (NODE, ShardId(4));
        let mut prober = Prober::new(at);
        for (address, known) in [(Some(at.to_string()), true), (None, false)] {
            let target = || target(to, address.as_deref());
            prober.nodes.gather(target(), 1, vec![shard]);
            let event = prober.answer().await;
            let Event::Gathered { gather: 1, store, ends } = event else { panic!("{event:?}") };
            assert_eq!(store, to.store);
            assert_eq!(ends.map(|ends| ends[0].last), known.then_some((Epoch(1), Seq(5))));
            prober.nodes.step_down(target(), shard, Epoch(1));
            let event = prober.answer().await;
            let Event::SteppedDown { end, .. } = event else { panic!("{event:?}") };
            assert_eq!(end, known.then_some((Epoch(1), Seq(5))));
        }
        // The log end of another process of that store does not count.
        let to = StoreBoot { boot: Boot(2), ..NODE };
        let address = at.to_string();
        prober.nodes.gather(target(to, Some(&address)), 2, vec![shard]);
        let event = prober.answer().await;
        assert!(matches!(event, Event::Gathered { gather: 2, ends: None, .. }), "{event:?}");
        runtime.shutdown_background();
    }
}
