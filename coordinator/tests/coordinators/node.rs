//! A storage node as the coordinator sees it: a server that answers questions, and keys in etcd.
//!
//! It has a runtime of its own, so that it can be killed: its sockets close, its lease is renewed no more.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use engine::ids::{Boot, Epoch, Seq, ShardId, StoreBoot, StoreId};
use engine::message::{NodeQuery, NodeQueryReply, Report, ShardEnd};
use engine::records::{NodeRecord, StoreRecord, StoreStatus};
use metastore::{BootGuard, HeldKey, LeaseEvent, LeaseSettings, Metastore, Outcome, Settings};
use proto::wire;
use proto::wire::control_server::{Control, ControlServer};
use proto::wire::reports_client::ReportsClient;
use tokio::runtime::Runtime;
use tokio::sync::oneshot;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status};

use crate::CLUSTER;

/// What a node says of itself. Shared with the test, which changes it.
#[derive(Default)]
struct Says {
    /// Where its logs end; those not named are empty.
    ends: BTreeMap<ShardId, (Epoch, Seq)>,
    fsync_age_ms: u64,
    silent: bool,
    /// Questions that reached it.
    asked: u64,
    stepped_down: Vec<(ShardId, Epoch)>,
}

pub(crate) struct Node {
    pub(crate) me: StoreBoot,
    says: Arc<Mutex<Says>>,
    runtime: Option<Runtime>,
    /// Ends the lease's renewal, not the server.
    unlease: Option<oneshot::Sender<()>>,
}

impl Node {
    /// Starts and registers.
    pub(crate) async fn start(etcd: String, store: u128, ttl_s: u32) -> Self {
        let me = StoreBoot { store: StoreId(store), boot: Boot(1) };
        Self::run(etcd, me, ttl_s, Says::default()).await
    }

    /// Killed and started again: the next boot, with the same logs, at another port.
    pub(crate) async fn restart_elsewhere(&mut self, etcd: String, ttl_s: u32) {
        self.kill();
        let me = StoreBoot { boot: Boot(self.me.boot.0 + 1), ..self.me };
        let ends = self.says().ends.clone();
        *self = Self::run(etcd, me, ttl_s, Says { ends, ..Says::default() }).await;
    }

    async fn run(etcd: String, me: StoreBoot, ttl_s: u32, says: Says) -> Self {
        let says = Arc::new(Mutex::new(says));
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        let runtime = builder.worker_threads(1).enable_all().build().expect("a runtime");
        let (unlease, unleased) = oneshot::channel();
        let (registered, done) = oneshot::channel();
        let server = Answers { me, says: Arc::clone(&says) };
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
        Self { me, says, runtime: Some(runtime), unlease: Some(unlease) }
    }

    /// kill -9: nobody listens any more, nothing is given back.
    pub(crate) fn kill(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }

    /// Its lease is renewed no more, though it goes on.
    pub(crate) fn lose_lease(&mut self) {
        self.unlease = None;
    }

    /// It takes what is asked and answers nothing, as if stopped.
    pub(crate) fn fall_silent(&self) {
        self.says().silent = true;
    }

    pub(crate) fn stall_disk(&self) {
        self.says().fsync_age_ms = 5_000;
    }

    pub(crate) fn log_ends(&self, shard: ShardId, epoch: u64, seq: u64) {
        self.says().ends.insert(shard, (Epoch(epoch), Seq(seq)));
    }

    /// How many questions have reached it.
    pub(crate) fn asked(&self) -> u64 {
        self.says().asked
    }

    pub(crate) fn stepped_down(&self) -> Vec<(ShardId, Epoch)> {
        self.says().stepped_down.clone()
    }

    /// Tells a coordinator that this peer is silent.
    pub(crate) async fn reports_silent(
        &self,
        coordinator: &str,
        cluster: u128,
        silent: StoreId,
    ) -> Result<(), Status> {
        let url = format!("http://{coordinator}");
        let mut client = ReportsClient::connect(url).await.expect("it listens");
        let report = Report { silent: vec![silent], ..Report::default() };
        client.report(wire::NodeReport::new(cluster, Some(self.me), report)).await.map(|_| ())
    }

    fn says(&self) -> std::sync::MutexGuard<'_, Says> {
        self.says.lock().expect("nobody panics holding it")
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
    assert!(matches!(made.expect("an answer"), Outcome::Done { .. }));
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

struct Answers {
    me: StoreBoot,
    says: Arc<Mutex<Says>>,
}

#[tonic::async_trait]
impl Control for Answers {
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

impl Answers {
    /// None: it says nothing.
    fn reply(&self, query: NodeQuery) -> Option<NodeQueryReply> {
        let mut says = self.says.lock().expect("nobody panics holding it");
        says.asked += 1;
        if says.silent {
            return None;
        }
        let from = self.me;
        Some(match query {
            NodeQuery::Probe { .. } => {
                NodeQueryReply::Probe { from, fsync_age_ms: says.fsync_age_ms }
            }
            NodeQuery::Gather { shards } => {
                let end = |shard| {
                    let last = says.ends.get(&shard).copied().unwrap_or_default();
                    let (promised, applied) = (last.0, last.1);
                    ShardEnd { shard, promised, last, applied, unfit: false }
                };
                NodeQueryReply::Gather { from, ends: shards.into_iter().map(end).collect() }
            }
            NodeQuery::StepDown { shard, epoch } => {
                says.stepped_down.push((shard, epoch));
                let (_, seq) = says.ends.get(&shard).copied().unwrap_or_default();
                NodeQueryReply::StepDown { shard, end: Some((epoch, seq)) }
            }
            NodeQuery::Status => NodeQueryReply::Status {
                from,
                replicas: Vec::new(),
                scrub: Default::default(),
                full: false,
            },
            NodeQuery::Scrub { .. } => NodeQueryReply::Scrub { from },
        })
    }
}
