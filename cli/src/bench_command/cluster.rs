//! Clusters of dkc as the system under load: the user's own, or a private one that `dkc dev` runs.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::Context;
use bench::cpu::MeasuredProcess;
use bench::dkc::RequestPlan;
use bench::keys::KeySpace;
use client::{DEADLINE, Gateways, Url, parse};

use super::children::Children;
use super::subject::{LoadShape, Subject};
use crate::dev::cluster_file::{self, ProcessRole};
use crate::status::ClusterInfo;

/// The size of a private cluster.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct ClusterShape {
    /// The number of storage nodes.
    pub(crate) nodes: u32,
    /// The number of shards.
    pub(crate) shards: u32,
    /// The memory of each node; `None` for the default.
    pub(crate) memory_bytes: Option<u64>,
    /// True if processes that died are started again.
    pub(crate) respawn: bool,
}

/// The shape of most rows.
pub(crate) const USUAL: ClusterShape =
    ClusterShape { nodes: 3, shards: 24, memory_bytes: None, respawn: false };

/// A private cluster that is ready.
pub(crate) struct PrivateCluster {
    /// The gateway.
    pub(crate) url: Url,
    /// The cluster as the system under load.
    pub(crate) subject: Subject,
    /// The pid of its `dkc dev`.
    pub(crate) supervisor: u32,
    /// The time from the start of the first process until every shard was open.
    pub(crate) ready_after: Duration,
}

impl PrivateCluster {
    /// Starts a cluster with its data in `folder`, or the one whose data is there already.
    pub(crate) fn start(
        shape: ClusterShape,
        program: &Path,
        folder: &Path,
        children: &mut Children,
    ) -> anyhow::Result<Self> {
        let mut command = Command::new(program);
        command.arg("dev").arg("--data").arg(folder).args(["--http", "127.0.0.1:0"]);
        command.args(["--nodes", &shape.nodes.to_string()]);
        command.args(["--shards", &shape.shards.to_string()]);
        command.stderr(std::fs::File::create(folder.with_extension("log"))?);
        if shape.respawn {
            command.arg("--respawn");
        }
        if let Some(bytes) = shape.memory_bytes {
            command.args(["--", "--memory-bytes", &bytes.to_string()]);
        }
        let begun = Instant::now();
        let (supervisor, line) = children.start_until_line(&mut command)?;
        let ready_after = begun.elapsed();
        let url = line.strip_prefix("ready ").context("dkc dev is not ready")?;
        let url = Url::parse(url).map_err(anyhow::Error::msg)?;
        let processes = processes(&folder.join("cluster.json"))?;
        let subject = Subject { folder: Some(folder.to_owned()), ..subject(&url, processes)? };
        Ok(Self { url, subject, supervisor, ready_after })
    }

    /// Kills the first storage node, as `kill -9` does.
    pub(crate) fn kill_node(&self) -> anyhow::Result<()> {
        let node = self.subject.processes.iter().find(|process| process.role == "storage-node");
        let pid = node.context("a storage node")?.pid;
        crate::dev::process::Process::find(pid).context("it has ended")?.kill();
        Ok(())
    }
}

/// Returns the processes that a `cluster.json` lists.
pub(crate) fn processes(path: &Path) -> anyhow::Result<Vec<MeasuredProcess>> {
    let cluster = cluster_file::read(path).with_context(|| path.display().to_string())?;
    let measured = |process: &cluster_file::ListedProcess| MeasuredProcess {
        role: process.spec.role.name().to_owned(),
        pid: process.pid,
        metrics: process.spec.addresses.get("metrics").cloned(),
    };
    // etcd's own metrics are not of interest, and have another format of names.
    let without = |mut process: MeasuredProcess| {
        if process.role == ProcessRole::Etcd.name() {
            process.metrics = None;
        }
        process
    };
    Ok(cluster.processes.iter().map(measured).map(without).collect())
}

/// Returns the cluster of a gateway as the system under load. Fails if the gateway does not answer.
pub(crate) fn subject(url: &Url, processes: Vec<MeasuredProcess>) -> anyhow::Result<Subject> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let mut gateways = Gateways::new(std::slice::from_ref(url));
    let answer = runtime.block_on(gateways.read("/v1/cluster", None, DEADLINE));
    let cluster: ClusterInfo = answer
        .and_then(|response| parse(&response))
        .map_err(|failure| anyhow::anyhow!("no gateway answers: {}", failure.why()))?;
    let sizes = || cluster.shards.iter().map(|shard| shard.isr.len());
    Ok(Subject {
        system: "dkc".to_owned(),
        processes,
        folder: None,
        nodes: cluster.nodes.len(),
        shards: cluster.shards.len(),
        replicas: [sizes().min().unwrap_or(0), sizes().max().unwrap_or(0)],
        fsync: "on every in-sync replica, before the answer".to_owned(),
        acknowledgement: "all in-sync replicas".to_owned(),
    })
}

/// Returns the requests of a load. Clients that are made from one plan share its keys.
pub(crate) fn requests(urls: &[Url], namespace: &str, shape: &LoadShape) -> RequestPlan {
    RequestPlan {
        urls: urls.to_vec(),
        namespace: namespace.to_owned(),
        batch: shape.batch,
        media: shape.media,
        keyed: shape.keyed,
        reads_percent: shape.reads_percent,
        staleness: shape.staleness_ms.map(Duration::from_millis),
        keys: KeySpace::new(shape.keys, shape.distribution),
    }
}
