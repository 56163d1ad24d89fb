//! Nodes as processes, and the part of the coordinator.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use clap::Parser;
use engine::ids::{Epoch, ShardId, Slots, StoreBoot, StoreId, Version};
use engine::message::{NodeQuery, NodeQueryReply, ReplicaStatus};
use engine::records::{Meta, NodeRecord, StoreRecord};
use engine::shard_record::ShardRecord;
use metastore::{CasOutcome, Metastore, Revisioned};
use proto::wire;
use proto::wire::control_client::ControlClient;
use rustix::process::{Pid, Signal, kill_process};
use storage_node::Options;
use tonic::transport::{Channel, Endpoint};

use crate::etcd::{self, Etcd};

/// Set in the environment of a test binary that is to be a node.
pub(crate) const IS_NODE: &str = "DKC_TEST_NODE";
/// The name below which its records stand in etcd.
const CLUSTER: &str = "test";
/// The uuid in `meta`.
pub(crate) const CLUSTER_ID: u128 = 0xC1;
/// The time-out of every step.
const TIMEOUT: Duration = Duration::from_secs(20);

#[derive(Parser)]
struct Arguments {
    #[command(flatten)]
    options: Options,
    #[command(flatten)]
    log: telemetry::LogOptions,
}

/// Options come from the environment, which `dkc storage-node` supports too.
pub(crate) fn node_main() -> u8 {
    let Arguments { options, log } = Arguments::parse_from(["node"]);
    let _written = telemetry::logs("storage-node", &options.name, log);
    storage_node::run(options)
}

pub(crate) async fn metastore_of(etcd: &Etcd) -> Metastore {
    let settings = metastore::Settings::new(vec![etcd.endpoint()], CLUSTER);
    Metastore::connect(&settings).await.expect("etcd answers")
}

/// Kills a process by SIGKILL, and waits.
fn end(child: &mut Child) {
    // The process may have ended by itself.
    let _ended = child.kill();
    let _ended = child.wait();
}

fn send(child: &Child, signal: Signal) {
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).expect("a process id");
    kill_process(pid, signal).expect("our own child");
}

/// An etcd with the settings of a cluster.
pub(crate) struct Cluster {
    pub(crate) etcd: Etcd,
    pub(crate) metastore: Metastore,
    folders: tempfile::TempDir,
}

impl Cluster {
    pub(crate) async fn start(min_in_sync: u8) -> Self {
        let etcd = Etcd::start().await;
        let metastore = metastore_of(&etcd).await;
        let made = metastore.create(&(), &meta(min_in_sync)).await;
        assert!(matches!(made, Ok(CasOutcome::Done { .. })), "{made:?}");
        Self { etcd, metastore, folders: tempfile::tempdir().expect("a temporary folder") }
    }

    /// A folder for a node's data.
    pub(crate) fn folder(&self, name: &str) -> PathBuf {
        self.folders.path().join(name)
    }

    /// A node with the folder of its name. It may not be ready yet.
    pub(crate) fn spawn(&self, name: &str) -> Node {
        self.spawn_with(name, &self.folder(name), &[])
    }

    pub(crate) fn spawn_with(&self, name: &str, folder: &Path, more: &[(&str, &str)]) -> Node {
        Node::spawn(&self.etcd.endpoint(), name, folder, more)
    }

    /// A node that has registered.
    pub(crate) async fn node(&self, name: &str) -> Node {
        self.node_with(name, &[]).await
    }

    pub(crate) async fn node_with(&self, name: &str, more: &[(&str, &str)]) -> Node {
        let before = self.store(name).await.map_or(0, |kept| kept.record.boot.0);
        let mut node = self.spawn_with(name, &self.folder(name), more);
        self.registered(&mut node, before).await;
        node
    }

    /// Waits until the node has registered, with a boot above this one.
    pub(crate) async fn registered(&self, node: &mut Node, above: u64) {
        let began = Instant::now();
        loop {
            if let Some(status) = node.child.try_wait().expect("our own child") {
                panic!("{} ended with {status}:\n{}", node.name, node.log());
            }
            if let Some(store) = self.store(&node.name).await
                && store.record.boot.0 > above
                && let Some(key) = self.key(store.id).await
                && key.record.boot == store.record.boot
            {
                node.me = StoreBoot { store: store.id, boot: store.record.boot };
                node.address = key.record.address;
                return;
            }
            assert!(began.elapsed() < TIMEOUT, "{} did not register:\n{}", node.name, node.log());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    pub(crate) async fn store(&self, name: &str) -> Option<Revisioned<StoreRecord>> {
        let listed = self.metastore.list::<StoreRecord>().await.expect("etcd answers");
        listed.all.into_iter().find(|kept| kept.record.name == name)
    }

    pub(crate) async fn key(&self, store: StoreId) -> Option<Revisioned<NodeRecord>> {
        self.metastore.get::<NodeRecord>(&store).await.expect("etcd answers")
    }

    /// Places the only shard there is: all slots, on these nodes, the first one leading.
    pub(crate) async fn place(&self, nodes: &[&Node]) {
        let mut isr: Vec<_> = nodes.iter().map(|node| node.me.store).collect();
        isr.sort();
        let record = ShardRecord {
            slots: Slots::ALL,
            epoch: Epoch(1),
            version: Version(1),
            primary: nodes[0].me,
            target: isr.clone(),
            isr,
            ..ShardRecord::default()
        };
        let placed = self.metastore.create(&record.shard(), &record).await;
        assert!(matches!(placed, Ok(CasOutcome::Done { .. })), "{placed:?}");
    }

    pub(crate) async fn shard(&self) -> Revisioned<ShardRecord> {
        let kept = self.metastore.get::<ShardRecord>(&ShardId(0)).await.expect("etcd answers");
        kept.expect("the shard was placed")
    }

    /// Changes the shard's record, as a coordinator does.
    pub(crate) async fn change(&self, change: impl Fn(&mut ShardRecord)) {
        let began = Instant::now();
        loop {
            let kept = self.shard().await;
            let mut record = kept.record;
            change(&mut record);
            record.version = Version(record.version.0 + 1);
            let changed = self.metastore.replace(&kept.id, &record, kept.modified).await;
            if matches!(changed, Ok(CasOutcome::Done { .. })) {
                return;
            }
            assert!(began.elapsed() < TIMEOUT, "{changed:?}");
        }
    }

    /// Makes this node the primary of the next epoch.
    pub(crate) async fn promote(&self, node: &Node) {
        self.change(|record| {
            record.epoch = Epoch(record.epoch.0 + 1);
            record.primary = node.me;
        })
        .await;
    }

    /// Waits until the shard's record is so.
    #[track_caller]
    pub(crate) fn until_shard<'a>(
        &'a self,
        what: &'static str,
        so: impl Fn(&ShardRecord) -> bool + 'a,
    ) -> impl Future<Output = ()> + 'a {
        let asker = std::panic::Location::caller();
        async move {
            let began = Instant::now();
            loop {
                let shard = self.shard().await.record;
                if so(&shard) {
                    return;
                }
                assert!(began.elapsed() < TIMEOUT, "{asker}: not {what}: {shard:?}");
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
    }
}

pub(crate) fn meta(min_in_sync: u8) -> Meta {
    Meta {
        cluster: CLUSTER_ID,
        shards: 1,
        replicas: 2,
        min_in_sync,
        hash: 1,
        incarnation: 1,
        idempotency: engine::shard::idempotency::TokenSettings::default(),
    }
}

/// One process.
pub(crate) struct Node {
    pub(crate) name: String,
    pub(crate) me: StoreBoot,
    pub(crate) address: String,
    pub(crate) metrics: String,
    log: PathBuf,
    child: Child,
}

impl Node {
    pub(crate) fn spawn(etcd: &str, name: &str, folder: &Path, more: &[(&str, &str)]) -> Self {
        fs::create_dir_all(folder).expect("a temporary folder");
        let log = folder.with_extension("log");
        let stderr = File::options().create(true).append(true).open(&log).expect("a log");
        let metrics = format!("127.0.0.1:{}", etcd::free_port());
        let child = Command::new(std::env::current_exe().expect("this binary"))
            .args(["--exact", "node_process", "--nocapture", "--test-threads", "1"])
            .env(IS_NODE, "1")
            .env("DKC_NAME", name)
            .env("DKC_DATA", folder)
            .env("DKC_LISTEN", "127.0.0.1:0")
            .env("DKC_METRICS", &metrics)
            .env("DKC_ETCD", etcd)
            .env("DKC_CLUSTER", CLUSTER)
            .env("DKC_LEASE_TTL", "1")
            .env("DKC_SEGMENT_BYTES", "65536")
            .envs(more.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(stderr)
            .spawn()
            .expect("this binary starts again");
        let (me, address) = (StoreBoot::default(), String::new());
        Self { name: name.into(), me, address, metrics, log, child }
    }

    /// Returns the node's log, including that of earlier processes on the same folder.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    pub(crate) fn kill(&mut self) {
        end(&mut self.child);
    }

    pub(crate) fn signal(&self, signal: Signal) {
        send(&self.child, signal);
    }

    /// Sends SIGTERM, and waits for the exit code.
    pub(crate) async fn stop(&mut self) -> Option<i32> {
        self.signal(Signal::TERM);
        self.ended().await.code()
    }

    /// Waits until it has ended by itself.
    pub(crate) async fn ended(&mut self) -> ExitStatus {
        let began = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().expect("our own child") {
                return status;
            }
            assert!(began.elapsed() < TIMEOUT, "{} goes on:\n{}", self.name, self.log());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Waits until the node has ended, and checks its exit code and its log.
    #[track_caller]
    pub(crate) fn refuses<'a>(
        &'a mut self,
        code: i32,
        why: &'a str,
    ) -> impl Future<Output = ()> + 'a {
        let asker = std::panic::Location::caller();
        async move {
            let status = self.ended().await;
            let log = self.log();
            assert_eq!(status.code(), Some(code), "{asker}: {log}");
            assert!(log.contains(why), "{asker}: {why:?} is not in {log}");
        }
    }

    /// A connection to its gRPC port.
    pub(crate) async fn channel(&self) -> Channel {
        let endpoint = Endpoint::new(format!("http://{}", self.address)).expect("an address");
        endpoint.connect().await.expect("the node listens")
    }

    /// Returns the node's status of its replica of the shard.
    pub(crate) async fn replica(&self) -> Option<ReplicaStatus> {
        let client = ControlClient::new(self.channel().await);
        let query = wire::NodeQuery::new(CLUSTER_ID, NodeQuery::Status);
        let reply = proto::limited!(client).query(query).await.expect("the node answers");
        match reply.into_inner().try_into().expect("a valid reply") {
            NodeQueryReply::Status { replicas, .. } => replicas.into_iter().next(),
            other => panic!("{other:?}"),
        }
    }

    /// Returns the status and the body of a page on the metrics port, or `None` if it is closed.
    pub(crate) async fn page(&self, path: &str) -> Option<(u16, String)> {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let mut stream = tokio::net::TcpStream::connect(&self.metrics).await.ok()?;
        let ask = format!("GET {path} HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n");
        stream.write_all(ask.as_bytes()).await.ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.ok()?;
        let status = answer.split(' ').nth(1)?.parse().ok()?;
        Some((status, answer.split_once("\r\n\r\n")?.1.to_owned()))
    }

    /// Waits until `/readyz` has this status and text.
    pub(crate) async fn until_ready_shows(&self, status: u16, body: &str) {
        let began = Instant::now();
        loop {
            let page = self.page("/readyz").await;
            if page.as_ref().is_some_and(|page| page.0 == status && page.1.contains(body)) {
                return;
            }
            let log = self.log();
            assert!(began.elapsed() < TIMEOUT, "{page:?} instead of {status} {body}: {log}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

impl Drop for Node {
    #[expect(clippy::print_stderr, reason = "whoever reads why a test failed wants the log too")]
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("log of {}:\n{}", self.name, self.log());
        }
        self.kill();
    }
}

/// Copies a folder like `cp -r`; files deleted meanwhile are left out.
pub(crate) fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("a temporary folder");
    for entry in fs::read_dir(from).expect("a folder").map(|entry| entry.expect("an entry")) {
        let target = to.join(entry.file_name());
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            copy_folder(&entry.path(), &target);
        } else {
            let _gone_meanwhile = fs::copy(entry.path(), target);
        }
    }
}
