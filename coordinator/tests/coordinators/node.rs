//! A fake storage node: a server that replies to the coordinator's queries, and keys in etcd.
//!
//! The node has a runtime of its own, so that it can be killed: its sockets close, and its lease is
//! no longer renewed.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use engine::ids::{Boot, Epoch, Seq, ShardId, StoreBoot, StoreId};
use engine::message::{HealthReport, NodeQuery, NodeQueryReply, ShardEnd};
use engine::records::{NodeRecord, StoreRecord, StoreStatus};
use metastore::{BootGuard, CasOutcome, HeldKey, LeaseEvent, LeaseSettings, Metastore, Settings};
use proto::wire;
use proto::wire::control_server::{Control, ControlServer};
use proto::wire::reports_client::ReportsClient;
use tokio::runtime::Runtime;
use tokio::sync::oneshot;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status};

use crate::CLUSTER;

/// The replies of a node. They are shared with the test, which changes them.
#[derive(Default)]
struct NodeAnswers {
    /// The ends of its logs; logs that are not named are empty.
    ends: BTreeMap<ShardId, (Epoch, Seq)>,
    fsync_age_ms: u64,
    silent: bool,
    /// The number of queries that it has received.
    asked: u64,
    stepped_down: Vec<(ShardId, Epoch)>,
}

pub(crate) struct Node {
    pub(crate) me: StoreBoot,
    answers: Arc<Mutex<NodeAnswers>>,
    runtime: Option<Runtime>,
    /// Ends the renewal of the lease, but not the server.
    unlease: Option<oneshot::Sender<()>>,
}

impl Node {
    /// Starts a node and registers it.
    pub(crate) async fn start(etcd: String, store: u128, ttl_s: u32) -> Self {
        let me = StoreBoot { store: StoreId(store), boot: Boot(1) };
        Self::run(etcd, me, ttl_s, NodeAnswers::default()).await
    }

    /// Kills the node and starts it again: the next boot, with the same logs, at another port.
    pub(crate) async fn restart_elsewhere(&mut self, etcd: String, ttl_s: u32) {
        self.kill();
        let me = StoreBoot { boot: Boot(self.me.boot.0 + 1), ..self.me };
        let ends = self.answers().ends.clone();
        *self = Self::run(etcd, me, ttl_s, NodeAnswers { ends, ..NodeAnswers::default() }).await;
    }

    async fn run(etcd: String, me: StoreBoot, ttl_s: u32, answers: NodeAnswers) -> Self {
        let answers = Arc::new(Mutex::new(answers));
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        let runtime = builder.worker_threads(1).enable_all().build().expect("a runtime");
        let (unlease, unleased) = oneshot::channel();
        let (registered, done) = oneshot::channel();
        let server = ControlService { me, answers: Arc::clone(&answers) };
        runtime.spawn(async move {
            let anywhere = SocketAddr::from(([127, 0, 0, 1], 0));
            let listener = tokio::net::TcpListener::bind(anywhere).await.expect("a port");
            let address = listener.local_addr().expect("it is bound").to_string();
            let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
            let service = ControlServer::new(server);
            tokio::spawn(Server::builder().add_service(service).serve_with_incoming(incoming));
            register(etcd, me, address, ttl_s, registered, unleased).await;
        });
        crate::within(10, done).await.expect("it registers");
        Self { me, answers, runtime: Some(runtime), unlease: Some(unlease) }
    }

    /// kill -9: the port is closed, and the lease is not revoked.
    pub(crate) fn kill(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }

    /// Stops renewing the lease, while the node continues.
    pub(crate) fn lose_lease(&mut self) {
        self.unlease = None;
    }

    /// Receives queries without replying, like a stopped process.
    pub(crate) fn fall_silent(&self) {
        self.answers().silent = true;
    }

    pub(crate) fn stall_disk(&self) {
        self.answers().fsync_age_ms = 5_000;
    }

    pub(crate) fn log_ends(&self, shard: ShardId, epoch: u64, seq: u64) {
        self.answers().ends.insert(shard, (Epoch(epoch), Seq(seq)));
    }

    /// Returns the number of queries that the node has received.
    pub(crate) fn asked(&self) -> u64 {
        self.answers().asked
    }

    pub(crate) fn stepped_down(&self) -> Vec<(ShardId, Epoch)> {
        self.answers().stepped_down.clone()
    }

    /// Reports to a coordinator that a peer is silent.
    pub(crate) async fn reports_silent(
        &self,
        coordinator: &str,
        cluster: u128,
        silent: StoreId,
    ) -> Result<(), Status> {
        let url = format!("http://{coordinator}");
        let mut client = ReportsClient::connect(url).await.expect("it listens");
        let report = HealthReport { silent: vec![silent], ..HealthReport::default() };
        client.report(wire::NodeReport::new(cluster, Some(self.me), report)).await.map(|_| ())
    }

    fn answers(&self) -> std::sync::MutexGuard<'_, NodeAnswers> {
        self.answers.lock().expect("no panic while it is held")
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Writes the store's record and holds the node's key.
async fn register(
    etcd: String,
    me: StoreBoot,
    address: String,
    ttl_s: u32,
    registered: oneshot::Sender<()>,
    unleased: oneshot::Receiver<()>,
) {
    let settings = Settings::new(vec![etcd], CLUSTER);
    let metastore = Metastore::connect(&settings).await.expect("etcd answers");
    let record = StoreRecord {
        name: format!("node-{}", me.store.0),
        address: address.clone(),
        zone: String::new(),
        host: format!("host-{}", me.store.0),
        boot: me.boot,
        nonce: 1,
        status: StoreStatus::Active,
    };
    let before = metastore.get::<StoreRecord>(&me.store).await.expect("a read");
    let made = match before {
        None => metastore.create(&me.store, &record).await,
        Some(kept) => metastore.replace(&me.store, &record, kept.modified).await,
    };
    assert!(matches!(made.expect("an answer"), CasOutcome::Done { .. }));
    let node = NodeRecord { boot: me.boot, address, capacity: 1 << 40, versions: (1, 1) };
    let guard = BootGuard { store: me.store, boot: me.boot, nonce: 1 };
    let lease = LeaseSettings { ttl_s, ..LeaseSettings::default() };
    let mut lease = metastore.hold(vec![HeldKey::node(&node, guard)], lease);
    while !matches!(lease.next().await, Some(LeaseEvent::Registered { .. })) {}
    let _the_test_has_ended = registered.send(());
    let hearing = async { while lease.next().await.is_some() {} };
    tokio::select! {
        () = hearing => {}
        _ = unleased => {}
    }
}

struct ControlService {
    me: StoreBoot,
    answers: Arc<Mutex<NodeAnswers>>,
}

#[tonic::async_trait]
impl Control for ControlService {
    async fn query(
        &self,
        request: Request<wire::NodeQuery>,
    ) -> Result<Response<wire::NodeQueryReply>, Status> {
        let query = proto::query_of(request.into_inner())?;
        let reply = self.reply(query);
        match reply {
            Some(reply) => Ok(Response::new(reply.into())),
            None => std::future::pending().await,
        }
    }
}

impl ControlService {
    /// Returns the reply to a query, or `None` if the node is silent.
    fn reply(&self, query: NodeQuery) -> Option<NodeQueryReply> {
        let mut answers = self.answers.lock().expect("no panic while it is held");
        answers.asked += 1;
        if answers.silent {
            return None;
        }
        let from = self.me;
        Some(match query {
            NodeQuery::Probe { .. } => {
                NodeQueryReply::Probe { from, fsync_age_ms: answers.fsync_age_ms }
            }
            NodeQuery::Gather { shards } => {
                let end = |shard| {
                    let last = answers.ends.get(&shard).copied().unwrap_or_default();
                    let (promised, applied) = (last.0, last.1);
                    ShardEnd { shard, promised, last, applied, unfit: false }
                };
                NodeQueryReply::Gather { from, ends: shards.into_iter().map(end).collect() }
            }
            NodeQuery::StepDown { shard, epoch } => {
                answers.stepped_down.push((shard, epoch));
                let (_, seq) = answers.ends.get(&shard).copied().unwrap_or_default();
                NodeQueryReply::StepDown { shard, end: Some((epoch, seq)) }
            }
            NodeQuery::Status => NodeQueryReply::Status {
                from,
                replicas: Vec::new(),
                scrub: Default::default(),
                full: false,
            },
            NodeQuery::Scrub { .. } => NodeQueryReply::Scrub { from },
            NodeQuery::Recover { .. } | NodeQuery::Split { .. } => return None,
        })
    }
}
