//! All of etcd is lost, or an old snapshot of it is restored, while the cluster counts, or etcd and
//! a disk are lost: `dkc recover-etcd` rebuilds it, and all counts are exact.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use tests::cluster::load::Load;
use tests::cluster::{Cluster, ClusterProcess, dkc_binary, until};

use crate::SOON;

/// The limit of one run of the command.
const RECOVERED_WITHIN: Duration = Duration::from_secs(120);

/// Two nodes run all the time and are asked what they follow. The third one is killed while there
/// is no etcd, and answers from its log.
#[test]
fn all_of_etcd_is_lost_under_load() {
    let (cluster, load) = loaded("lost");
    begin_new_epochs(&cluster, &load);
    let (lost, coordinator, etcd) = lose_etcd(&cluster);
    cluster.start_again(&etcd);
    load.wait_for_all(20, SOON);
    restart(&cluster, "node-3");
    recover(&cluster, lost);
    restart_all(&cluster, &coordinator);
    check(cluster, load, lost);
}

/// The snapshot knows nothing of the epochs that began after it. A node that starts on it waits.
#[test]
fn an_old_snapshot_of_etcd_is_restored() {
    let (cluster, load) = loaded("restored");
    let (folder, old) = (cluster.folder().join("etcd"), cluster.folder().join("etcd-old"));
    let etcd = cluster.kill("etcd");
    copy(&folder, &old);
    cluster.start_again(&etcd);
    begin_new_epochs(&cluster, &load);
    let (lost, coordinator, etcd) = lose_etcd(&cluster);
    copy(&old, &folder);
    cluster.start_again(&etcd);
    load.wait_for_all(20, SOON);
    restart(&cluster, "node-1");
    recover(&cluster, lost);
    restart_all(&cluster, &coordinator);
    check(cluster, load, lost);
}

/// The disk of a node is lost with etcd. What that node did last is not known, but the others have
/// every increment that it acknowledged.
#[test]
fn a_disk_is_lost_with_etcd() {
    let (cluster, load) = loaded("disk");
    let (lost, coordinator, etcd) = lose_etcd(&cluster);
    let dead = cluster.kill("node-3");
    fs::remove_dir_all(dead.data()).expect("the folder of a node that is dead");
    cluster.start_again(&etcd);

    let left = ["node-1", "node-2"].map(|name| cluster.process(name));
    let refused = run_recovery(&cluster, &left, &[]).expect_err("a store is missing");
    let missing = |line: &str| Some(line.strip_prefix("- store ")?.split_once(' ')?.0.to_owned());
    let store = refused.lines().find_map(missing).expect("the store is named");
    let said = run_recovery(&cluster, &left, &["--without", &store]).expect("it is given up");
    tests::note(&format!("{:?} after the loss: {}", lost.elapsed(), said.trim()));
    assert!(!said.contains("may lack"), "{said}");
    cluster.start_again(&dead);
    restart_all(&cluster, &coordinator);
    check(cluster, load, lost);
}

/// A cluster with all copies in sync, and load on every shard.
#[track_caller]
fn loaded(namespace: &str) -> (Cluster, Load) {
    let cluster = Cluster::start(&["--gateways", "2"]);
    cluster.wait_until_full(3);
    let keys = cluster.key_per_shard(namespace);
    let load = Load::start(&cluster.gateways(), namespace, &keys);
    load.wait_for_all(20, SOON);
    (cluster, load)
}

/// Kills a node and starts it again: its shards have new primaries in between.
#[track_caller]
fn begin_new_epochs(cluster: &Cluster, load: &Load) {
    let node = cluster.kill("node-2");
    load.wait_for_all(20, SOON);
    cluster.start_again(&node);
    cluster.wait_until_full(3);
}

/// Kills the coordinator and etcd, and deletes etcd's data. Returns the time and both processes.
#[track_caller]
fn lose_etcd(cluster: &Cluster) -> (Instant, ClusterProcess, ClusterProcess) {
    let lost = Instant::now();
    let (coordinator, etcd) = (cluster.kill("coordinator-1"), cluster.kill("etcd"));
    fs::remove_dir_all(cluster.folder().join("etcd")).expect("a folder");
    (lost, coordinator, etcd)
}

#[track_caller]
fn restart(cluster: &Cluster, name: &str) {
    let killed = cluster.kill(name);
    cluster.start_again(&killed);
}

/// Runs the command until all nodes have answered: one that was just started does so after a
/// second.
#[track_caller]
fn recover(cluster: &Cluster, lost: Instant) {
    let nodes: Vec<_> = cluster.processes().into_iter().filter(is_node).collect();
    until(RECOVERED_WITHIN, || {
        let said = run_recovery(cluster, &nodes, &[])?;
        tests::note(&format!("{:?} after the loss: {}", lost.elapsed(), said.trim()));
        Ok(())
    });
}

/// Runs the command once. Returns what it printed.
fn run_recovery(
    cluster: &Cluster,
    nodes: &[ClusterProcess],
    flags: &[&str],
) -> Result<String, String> {
    let etcd = cluster.process("etcd");
    let mut command = Command::new(dkc_binary());
    command.args(["recover-etcd", "--etcd", etcd.address("grpc")]);
    command.args(nodes.iter().map(|node| node.address("grpc"))).args(flags);
    let ended = command.output().map_err(|error| error.to_string())?;
    let printed =
        [ended.stdout, ended.stderr].map(|out| String::from_utf8_lossy(&out).into_owned());
    match ended.status.success() {
        true => Ok(printed[0].clone()),
        false => Err(printed.concat()),
    }
}

fn is_node(process: &ClusterProcess) -> bool {
    process.role == "storage-node"
}

/// Restarts what follows no etcd any more.
#[track_caller]
fn restart_all(cluster: &Cluster, coordinator: &ClusterProcess) {
    cluster.start_again(coordinator);
    let processes = cluster.processes();
    for role in ["storage-node", "gateway"] {
        let of_role = processes.iter().filter(|process| process.role == role);
        let killed: Vec<_> = of_role.map(|process| cluster.kill(&process.name)).collect();
        killed.iter().for_each(|process| cluster.start_again(process));
    }
}

#[track_caller]
fn check(cluster: Cluster, load: Load, lost: Instant) {
    cluster.wait_until_full(3);
    load.wait_for_all(50, SOON);
    tests::note(&format!("{:?} after the loss: all copies are in sync", lost.elapsed()));
    let probes = load.stop();
    probes.check(&cluster.gateway);
    // Membership changes work again.
    restart(&cluster, "node-2");
    cluster.wait_until_full(3);
    cluster.wait_until_copies_agree(3);
}

/// Copies a folder with all that is in it.
fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("a folder");
    for entry in fs::read_dir(from).expect("a folder") {
        let path = entry.expect("an entry").path();
        let copied = to.join(path.file_name().expect("it has a name"));
        match path.is_dir() {
            true => copy(&path, &copied),
            false => drop(fs::copy(&path, &copied).expect("a file")),
        }
    }
}
