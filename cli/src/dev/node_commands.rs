//! `dkc dev add-node` and `dkc dev remove-node`: they change the number of storage nodes of a local
//! cluster while it runs.
//!
//! The running `dkc dev` starts and stops the processes ([`control`](super::control)). What else
//! has to happen is what an operator would do with `dkc node`: wait for the registration, or drain
//! the node, and remove it from the cluster once it has stopped.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context;
use engine::records::{NodeRecord, StoreRecord};
use metastore::{Metastore, Settings};
use serde::Serialize;

use super::control::{DevCluster, DevNode, DevRequest, ask};
use crate::etcd::{is_denoted_by, store_named};
use crate::exit::{CommandExit, UsageError};
use crate::node::{NodeRecords, drain, remove};
use crate::output::{self, note};

/// The pause between two looks at etcd or at the process.
const POLL_INTERVAL: Duration = Duration::from_millis(200);
/// The time in which a new node registers: its start waits for etcd and for its disk.
const REGISTERS_WITHIN: Duration = Duration::from_secs(60);
/// The time in which an empty node stops.
const STOPS_WITHIN: Duration = Duration::from_secs(20);
/// The time in which the coordinator removes a node that has stopped.
const REMOVED_WITHIN: Duration = Duration::from_secs(30);

/// Options of `dkc dev add-node`.
#[derive(Debug, clap::Args)]
pub(super) struct AddArgs {
    /// Number of storage nodes to add
    #[arg(
        long,
        value_name = "N",
        default_value_t = 1,
        value_parser = clap::value_parser!(u32).range(1..=99)
    )]
    count: u32,
    /// Directory of the running `dkc dev`
    #[arg(long, value_name = "DIR", default_value = "dkc-data")]
    data: PathBuf,
    /// Print the result as one line of JSON
    #[arg(long)]
    json: bool,
}

/// Options of `dkc dev remove-node`.
#[derive(Debug, clap::Args)]
pub(super) struct DevRemoveArgs {
    /// Name of the storage node, for example node-4
    name: String,
    /// Directory of the running `dkc dev`
    #[arg(long, value_name = "DIR", default_value = "dkc-data")]
    data: PathBuf,
    /// Print the result as one line of JSON
    #[arg(long)]
    json: bool,
}

/// The result of `dkc dev add-node`.
#[derive(Debug, Serialize)]
struct AddedNodes {
    nodes: Vec<AddedNode>,
    /// The number of storage nodes now.
    of: u32,
}

/// A node that was added.
#[derive(Debug, Serialize)]
struct AddedNode {
    node: String,
    uuid: String,
    address: String,
    pid: Option<u32>,
}

/// The result of `dkc dev remove-node`.
#[derive(Debug, Serialize)]
struct RemovedNode {
    node: String,
    /// The folder of its data, which is left.
    data: String,
    /// The number of storage nodes now.
    of: u32,
}

/// Starts nodes, and waits until they are registered.
pub(super) async fn add(args: AddArgs) -> anyhow::Result<CommandExit> {
    let folder = folder_of(&args.data)?;
    let (nodes, cluster) = ask(&folder, &DevRequest::Add { count: args.count }).await?;
    let metastore = connect(&cluster).await?;
    let deadline = Instant::now() + REGISTERS_WITHIN;
    let mut added = AddedNodes { nodes: Vec::new(), of: cluster.nodes };
    for DevNode { name, address, pid } in nodes {
        match registered(&metastore, &folder, &name, deadline).await? {
            Ok(uuid) => added.nodes.push(AddedNode { node: name, uuid, address, pid }),
            Err(why) => {
                let shown = folder.display();
                note!(
                    "error: {name} {why}; see {shown}/logs/{name}.log. It is started again with \
                     the cluster, unless `dkc dev remove-node {name} --data {shown}` removes it"
                );
                return Ok(CommandExit::Failed);
            }
        }
    }
    output::report(args.json, &added, |added| added.text(&cluster.etcd))?;
    Ok(CommandExit::Done)
}

/// Waits until a node is registered. Returns the uuid of its store, or else what went wrong.
async fn registered(
    metastore: &Metastore,
    folder: &Path,
    name: &str,
    deadline: Instant,
) -> anyhow::Result<Result<String, String>> {
    loop {
        let stores = metastore.list::<StoreRecord>().await?.all;
        if let Some(store) = stores.iter().find(|kept| is_denoted_by(kept, name))
            && metastore.get::<NodeRecord>(&store.id).await?.is_some()
        {
            return Ok(Ok(store.id.to_string()));
        }
        let (nodes, _) = ask(folder, &DevRequest::Find { name: name.to_owned() }).await?;
        if nodes.iter().all(|node| node.pid.is_none()) {
            return Ok(Err("has ended".to_owned()));
        }
        if Instant::now() >= deadline {
            return Ok(Err(format!("has not registered in {} s", REGISTERS_WITHIN.as_secs())));
        }
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}

/// Drains a node, stops it, and removes it from the cluster. Each step that is done already, by a
/// command that was interrupted, is skipped.
pub(super) async fn remove(args: DevRemoveArgs) -> anyhow::Result<CommandExit> {
    let folder = folder_of(&args.data)?;
    let name = args.name;
    let (nodes, cluster) = ask(&folder, &DevRequest::Find { name: name.clone() }).await?;
    let metastore = connect(&cluster).await?;
    let records = NodeRecords::read(&metastore).await?;
    // A node that never registered, or was removed from the cluster before, holds nothing.
    let stands = records.stores.iter().any(|kept| is_denoted_by(kept, &name));
    if stands && cluster.nodes <= cluster.replicas {
        note!(
            "error: {name} cannot be removed: {} nodes run, and each shard has {} copies on as \
             many nodes: add one first with `dkc dev add-node`. Nothing was changed",
            cluster.nodes,
            cluster.replicas
        );
        return Ok(CommandExit::Failed);
    }
    if stands {
        let store = store_named(&records.stores, &name)?;
        let runs = nodes.iter().any(|node| node.pid.is_some());
        if !runs && records.holds(store.id).copies > 0 {
            note!(
                "error: {name} does not run, and holds copies: start it again first (its command \
                 line is under `dead` in {}/cluster.json). Nothing was changed",
                folder.display()
            );
            return Ok(CommandExit::Failed);
        }
        if let Err((exit, why)) = drain::empty(metastore.clone(), &records, store).await? {
            note!("error: {name}: {why}");
            return Ok(exit);
        }
    }
    if let Some(pid) = stop(&folder, &name).await? {
        note!(
            "error: {name} (pid {pid}) does not stop in {} s: end it with `kill -9 {pid}`, and run \
             this again",
            STOPS_WITHIN.as_secs()
        );
        return Ok(CommandExit::Failed);
    }
    if stands {
        let end = retire(metastore, &name).await?;
        if end != remove::RemovalEnd::Retired {
            note!("{name} is stopped; run this again to remove it, or start the cluster again");
            return Ok(end.print(&name));
        }
    }
    let (_, cluster) = ask(&folder, &DevRequest::Forget { name: name.clone() }).await?;
    let data = folder.join(&name).display().to_string();
    let removed = RemovedNode { node: name, data, of: cluster.nodes };
    output::report(args.json, &removed, RemovedNode::sentence)?;
    Ok(CommandExit::Done)
}

/// Stops a node. Returns its pid if it still runs.
async fn stop(folder: &Path, name: &str) -> anyhow::Result<Option<u32>> {
    let began = Instant::now();
    let mut request = DevRequest::Stop { name: name.to_owned() };
    loop {
        let (nodes, _) = ask(folder, &request).await?;
        let pid = nodes.iter().find_map(|node| node.pid);
        if pid.is_none() || began.elapsed() >= STOPS_WITHIN {
            return Ok(pid);
        }
        // A second signal would cut the graceful stop short.
        request = DevRequest::Find { name: name.to_owned() };
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}

/// Removes the node from the cluster once its registration is gone: that of a process that was
/// killed ends with its lease.
async fn retire(metastore: Metastore, name: &str) -> anyhow::Result<remove::RemovalEnd> {
    let began = Instant::now();
    loop {
        let records = NodeRecords::read(&metastore).await?;
        let store = store_named(&records.stores, name)?;
        if !records.runs(store.id) || began.elapsed() >= STOPS_WITHIN {
            return remove::retire(metastore.clone(), &records, store, REMOVED_WITHIN).await;
        }
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}

fn folder_of(data: &Path) -> anyhow::Result<PathBuf> {
    let shown = data.display();
    data.canonicalize().map_err(|error| {
        let why = format!(
            "--data {shown}: {error}; name the folder of a running dkc dev, or start one with \
             `dkc dev --data {shown}`"
        );
        UsageError(why).into()
    })
}

async fn connect(cluster: &DevCluster) -> anyhow::Result<Metastore> {
    let endpoints = cluster.etcd.split(',').map(str::to_owned).collect();
    let connected = Metastore::connect(&Settings::new(endpoints, &cluster.name)).await;
    connected.with_context(|| format!("etcd {}", cluster.etcd))
}

impl AddedNodes {
    fn text(&self, etcd: &str) -> String {
        let mut lines = Vec::new();
        for AddedNode { node, address, pid, .. } in &self.nodes {
            let pid = pid.map_or_else(String::new, |pid| format!(", pid {pid}"));
            lines.push(format!("{node} is added: {address}{pid}"));
        }
        lines.push(format!(
            "{} nodes; shards move to the new ones: `dkc plan --etcd {etcd}`",
            self.of
        ));
        lines.join("\n")
    }
}

impl RemovedNode {
    fn sentence(&self) -> String {
        let Self { node, data, of } = self;
        format!("{node} is removed: its copies are on the other {of} nodes; {data} can be deleted")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_done_is_printed() {
        let node = |name: &str, pid| AddedNode {
            node: name.to_owned(),
            uuid: "0".repeat(32),
            address: "127.0.0.1:20001".to_owned(),
            pid,
        };
        let added =
            AddedNodes { nodes: vec![node("node-4", Some(7)), node("node-5", None)], of: 5 };
        assert_eq!(
            added.text("127.0.0.1:20000"),
            "node-4 is added: 127.0.0.1:20001, pid 7\nnode-5 is added: 127.0.0.1:20001\n5 nodes; \
             shards move to the new ones: `dkc plan --etcd 127.0.0.1:20000`"
        );
        let removed = RemovedNode { node: "node-4".into(), data: "/d/node-4".into(), of: 4 };
        assert_eq!(
            removed.sentence(),
            "node-4 is removed: its copies are on the other 4 nodes; /d/node-4 can be deleted"
        );
    }
}
