//! A cluster for one test: a real etcd with hand-written records, fake nodes, and a real gateway.

use std::net::SocketAddr;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use engine::batcher::shard_map::ranges;
use engine::ids::{Epoch, ShardId, Slots, StoreId, Version};
use engine::key::CounterKey;
use engine::records::{Meta, NodeRecord, StoreRecord, StoreStatus};
use engine::shard_record::ShardRecord;
use gateway::Options;
use metastore::{Metastore, Settings};
use process::{ClusterOptions, ProcessExit, ProcessOptions};
use tokio::runtime::Runtime;
use tokio::sync::oneshot;

use crate::client::Client;
use crate::etcd::{Etcd, Relay};
use crate::node::{CLUSTER, Node};

pub(crate) struct Cluster {
    pub(crate) nodes: Vec<Node>,
    pub(crate) gateway: Option<Gateway>,
    pub(crate) etcd: Etcd,
    runtime: Runtime,
}

pub(crate) struct Gateway {
    pub(crate) address: SocketAddr,
    stop: oneshot::Sender<()>,
    hurry: oneshot::Sender<()>,
    thread: JoinHandle<Result<(), ProcessExit>>,
}

pub(crate) fn options(etcd: String) -> Options {
    Options {
        name: "gateway-1".into(),
        cluster: ClusterOptions { etcd: vec![etcd], cluster: "test".into() },
        http: SocketAddr::from(([127, 0, 0, 1], 0)),
        process: ProcessOptions { metrics: None, lease_ttl: 1 },
        grpc: None,
        workers: Some(2),
        linger_us: 0,
        idle_timeout: 75,
        memory_bytes: 1 << 30,
        connections: None,
        allow_origin: Vec::new(),
        drain_seconds: 0,
    }
}

impl Gateway {
    pub(crate) fn start(options: Options) -> Self {
        let (listening, address) = mpsc::channel();
        let (stop, stopped) = oneshot::channel();
        let (hurry, hurried) = oneshot::channel();
        let thread = std::thread::spawn(move || {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let stopped = async {
                let _dropped = stopped.await;
            };
            runtime.block_on(gateway::serve(
                options,
                |address| listening.send(address).unwrap(),
                stopped,
                async {
                    if hurried.await.is_err() {
                        std::future::pending::<()>().await;
                    }
                },
            ))
        });
        let address = address.recv_timeout(Duration::from_secs(10)).expect("it listens");
        Self { address, stop, hurry, thread }
    }

    /// Stops the gateway, calls `between`, and ends the drain early.
    pub(crate) fn stop_in_a_hurry(self, between: impl FnOnce()) -> Result<(), ProcessExit> {
        let _ended = self.stop.send(());
        between();
        let _ended = self.hurry.send(());
        self.thread.join().expect("it does not panic")
    }

    /// Stops the gateway. The thread ends when it has stopped.
    pub(crate) fn stop(self) -> JoinHandle<Result<(), ProcessExit>> {
        let _ended = self.stop.send(());
        self.thread
    }
}

impl Cluster {
    /// Starts a cluster with one shard per node and a gateway that is ready.
    pub(crate) fn start(nodes: usize) -> Self {
        let mut cluster = Self::without_gateway(nodes);
        cluster.start_gateway();
        cluster.ready();
        cluster
    }

    pub(crate) fn without_gateway(count: usize) -> Self {
        let mut cluster = Self::empty();
        let shards: Vec<_> = ranges(count as u32).collect();
        let anywhere = SocketAddr::from(([127, 0, 0, 1], 0));
        cluster.nodes = (1..)
            .zip(&shards)
            .map(|(store, &slots)| Node::start(store, 1, anywhere, vec![slots]))
            .collect();
        let store = cluster.store();
        cluster.runtime.block_on(async {
            store.create(&(), &meta(count as u32)).await.unwrap();
            for (node, slots) in cluster.nodes.iter().zip(shards) {
                register(&store, node).await;
                store.create(&slots.shard(), &led_by(node, slots)).await.unwrap();
            }
        });
        cluster
    }

    /// A relay to this address.
    pub(crate) fn relay(&self, to: String) -> Relay {
        self.runtime.block_on(Relay::start(to))
    }

    /// A cluster of an empty etcd only.
    pub(crate) fn empty() -> Self {
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        let runtime = builder.worker_threads(1).enable_all().build().unwrap();
        let etcd = runtime.block_on(Etcd::start());
        Self { nodes: Vec::new(), gateway: None, etcd, runtime }
    }

    pub(crate) fn store(&self) -> Metastore {
        let settings = Settings::new(vec![self.etcd.endpoint()], "test");
        self.runtime.block_on(Metastore::connect(&settings)).unwrap()
    }

    pub(crate) fn block_on<T>(&self, future: impl Future<Output = T>) -> T {
        self.runtime.block_on(future)
    }

    pub(crate) fn etcd_runs(&mut self) {
        self.runtime.block_on(self.etcd.run());
    }

    /// Replaces etcd by an empty one at the same address.
    pub(crate) fn replace_etcd(&mut self) {
        self.runtime.block_on(self.etcd.replace_by_empty());
    }

    pub(crate) fn start_gateway(&mut self) {
        self.start_gateway_with(|_| {});
    }

    pub(crate) fn start_gateway_with(&mut self, change: impl FnOnce(&mut Options)) {
        let mut options = options(self.etcd.endpoint());
        change(&mut options);
        self.gateway = Some(Gateway::start(options));
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.gateway.as_ref().unwrap().address
    }

    pub(crate) fn client(&self) -> Client {
        Client::new(self.address())
    }

    pub(crate) fn ready(&self) {
        let mut client = self.client();
        until("the gateway reaches every shard", || client.get("/readyz?all").status == 200);
    }

    /// A key of a counter whose primary is the given node.
    pub(crate) fn key_of(&self, node: usize, tag: &str) -> String {
        let slots = ranges(self.nodes.len() as u32).nth(node).unwrap();
        let at = |number: u32| format!("{tag}{number}");
        let is_there =
            |key: &String| slots.contains(CounterKey::new(b"ns", key.as_bytes()).unwrap().slot());
        (0..).map(at).find(is_there).unwrap()
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if let Some(gateway) = self.gateway.take() {
            let stopped = gateway.stop().join();
            // A test that has failed already has its own message.
            if !std::thread::panicking() {
                stopped.expect("it does not panic").expect("it stops in order");
            }
        }
    }
}

/// Waits until `holds` returns true, for 20 s at most.
#[track_caller]
pub(crate) fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let began = Instant::now();
    while !holds() {
        assert!(began.elapsed() < Duration::from_secs(20), "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

pub(crate) fn meta(shards: u32) -> Meta {
    Meta {
        cluster: CLUSTER,
        shards,
        replicas: 1,
        min_in_sync: 1,
        hash: 1,
        incarnation: 1,
        idempotency: engine::shard::idempotency::TokenSettings::default(),
    }
}

pub(crate) async fn register(store: &Metastore, node: &Node) {
    let record = StoreRecord {
        name: format!("node-{}", node.me.store.0),
        address: node.address.to_string(),
        zone: "z".into(),
        host: "h".into(),
        boot: node.me.boot,
        nonce: 1,
        status: StoreStatus::Active,
    };
    match store.get::<StoreRecord>(&node.me.store).await.unwrap() {
        None => store.create(&node.me.store, &record).await.unwrap(),
        Some(kept) => store.replace(&node.me.store, &record, kept.modified).await.unwrap(),
    };
    let record = NodeRecord {
        boot: node.me.boot,
        address: node.address.to_string(),
        capacity: 1,
        versions: (1, 1),
    };
    store.create(&node.me.store, &record).await.unwrap();
}

pub(crate) async fn unregister(store: &Metastore, node: StoreId) {
    let kept = store.get::<NodeRecord>(&node).await.unwrap().unwrap();
    store.delete::<NodeRecord>(&node, kept.modified).await.unwrap();
}

pub(crate) fn led_by(node: &Node, slots: Slots) -> ShardRecord {
    ShardRecord {
        slots,
        epoch: Epoch(1),
        version: Version(1),
        primary: node.me,
        isr: vec![node.me.store],
        ..ShardRecord::default()
    }
}

/// Promotes a node, as a coordinator would.
pub(crate) async fn promote(store: &Metastore, shard: ShardId, node: &Node) {
    let kept = store.get::<ShardRecord>(&shard).await.unwrap().unwrap();
    let epoch = Epoch(kept.record.epoch.0 + 1);
    let version = Version(kept.record.version.0 + 1);
    let record = ShardRecord { epoch, version, ..led_by(node, kept.record.slots) };
    store.replace(&shard, &record, kept.modified).await.unwrap();
}
