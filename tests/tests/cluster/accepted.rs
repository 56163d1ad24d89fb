//! `dkc shards promote SHARD NODE --accept-loss`: the machines with the good copies are lost, and
//! an operator promotes the copy that is left. The consequences are printed before and stay on
//! record.

use std::process::{Command, Output, Stdio};

use serde_json::Value;
use tests::cluster::http::Client;
use tests::cluster::{Cluster, ClusterProcess, ClusterShard, dkc_binary, status, until};

use crate::{SOON, check_filled, fill};

/// One worker has one session, which the promotion ends.
const FLAGS: [&str; 7] = ["--shards", "2", "--", "--flush-after-ms", "200", "--workers", "1"];
const KEYS: u64 = 300;
/// The count of each key in the copy that is left, and the acknowledged count beyond it.
const KEPT: u64 = 3;
const LOST: u64 = 4;

fn promote(node: &ClusterProcess, shard: u64, more: &[&str]) -> (Option<i32>, String) {
    let (etcd, own) = (node.value_of("--etcd"), node.value_of("--cluster"));
    let mut command = Command::new(dkc_binary());
    command.args(["shards", "promote", &shard.to_string(), &node.name, "--accept-loss"]);
    command.args(["--etcd", etcd, "--cluster", own]).args(more).stdin(Stdio::null());
    let Output { status, stdout, stderr } = command.output().expect("dkc runs");
    let printed = [stderr, stdout].concat();
    (status.code(), String::from_utf8_lossy(&printed).into_owned())
}

/// Waits until writes are applied. The lost entries include acknowledged batches of the session of
/// the gateway, so the session ends at the next batch, and the outcome of that batch is unknown.
fn wait_until_writes_are_applied(cluster: &Cluster) {
    let lines: String = (0..KEYS).map(|key| format!("after-{key}\n")).collect();
    let mut client = Client::new(&cluster.gateway);
    until(SOON, || {
        let headers = [("Content-Type", "text/plain")];
        let path = "/v1/counters/after/increment";
        let answer = client.call("POST", path, &headers, lines.as_bytes(), SOON);
        match answer.map_err(|error| format!("{error:?}"))? {
            answer if answer.status == 200 && answer.body["applied"] == KEYS => Ok(()),
            answer => Err(format!("{answer:?}")),
        }
    });
}

/// Node-3 was down during the last increments, and then the other two machines are destroyed.
#[test]
fn an_operator_accepts_that_something_is_lost() {
    let cluster = Cluster::start(&FLAGS);
    cluster.wait_until_full(3);
    fill(&cluster, "loss", KEYS, KEPT);
    cluster.wait_until_copies_agree(3);
    wait_until_flushed(&cluster.process("node-3"));
    let third = cluster.kill("node-3");
    fill(&cluster, "loss", KEYS, LOST);
    // The copy on node-3 is out of sync: alone it may not lead.
    until(SOON, || {
        let out = |shard: &ClusterShard| !shard.isr.contains(&third.name);
        if cluster.shards()?.iter().all(out) {
            Ok(())
        } else {
            Err("node-3 is still in sync".to_owned())
        }
    });
    let shards: Vec<u64> = cluster.shards().expect("a gateway").iter().map(|it| it.id).collect();
    let first = cluster.process("node-1");
    let (code, printed) = promote(&first, shards[0], &["--yes"]);
    assert_eq!(code, Some(1), "{printed}");
    assert!(printed.contains("no promotion is needed"), "{printed}");

    let first = cluster.kill("node-1");
    let second = cluster.kill("node-2");
    cluster.start_again(&third);
    wait_until_registered_twice(&cluster, &third.name);
    wait_until_without_primary(&cluster);
    let (code, printed) = promote(&third, shards[0], &[]);
    assert_eq!(code, Some(2), "{printed}");
    assert!(printed.contains("--yes"), "{printed}");
    for &shard in &shards {
        let (code, printed) = promote(&third, shard, &["--yes"]);
        assert_eq!(code, Some(0), "{printed}");
        // The report names each store by name and number, with its known position.
        for name in ["node-1 (store ", "node-2 (store "] {
            assert!(printed.contains(name), "{printed}");
        }
        // Right after a start a copy knows the positions of the others as of its last flush.
        let known =
            ["does not answer, known to hold entries up to ", "does not answer, position unknown"];
        assert!(known.iter().any(|text| printed.contains(text)), "{printed}");
        assert!(printed.contains(&format!("node-3 is primary of shard {shard}")), "{printed}");
    }
    // The copies on the other machines are given up, even on one that comes back with its data.
    cluster.start_again(&first);
    std::fs::remove_dir_all(second.data()).expect("the folder of a node that is dead");
    cluster.start_replacing(&second);
    cluster.wait_until_full(3);
    check_filled(&cluster, "loss", KEYS, KEPT);
    wait_until_writes_are_applied(&cluster);
    fill(&cluster, "loss", KEYS, 1);
    check_filled(&cluster, "loss", KEYS, KEPT + 1);
    cluster.wait_until_copies_agree(3);
    stays_on_record(&cluster, &shards);
}

/// Waits until a node has flushed. Flushed entries are applied and committed, also after a restart.
#[track_caller]
fn wait_until_flushed(node: &ClusterProcess) {
    until(SOON, || {
        let mut files =
            std::fs::read_dir(node.data().join("state")).map_err(|error| error.to_string())?;
        let flushed =
            |file: std::fs::DirEntry| file.path().extension().is_some_and(|it| it == "sst");
        match files.any(|file| file.is_ok_and(flushed)) {
            true => Ok(()),
            false => Err("nothing is flushed".to_owned()),
        }
    });
}

/// Waits until the process that was started last is the one that etcd names. Until the lease of the
/// one before ends, the status page shows that one as up.
#[track_caller]
fn wait_until_registered_twice(cluster: &Cluster, node: &str) {
    until(SOON, || match cluster.log(node).matches(" registered with etcd ").count() {
        2.. => Ok(()),
        times => Err(format!("{node} has registered {times} times")),
    });
}

#[track_caller]
fn wait_until_without_primary(cluster: &Cluster) {
    until(SOON, || {
        let page = status(&cluster.gateways())?;
        let up = |node: &Value| node["name"] == "node-3" && node["state"] == "up";
        let no_primary = |shard: &Value| shard["state"] == "no-primary";
        let list = |name: &str| page[name].as_array().cloned().unwrap_or_default();
        match list("nodes").iter().any(up) && list("shards").iter().all(no_primary) {
            true => Ok(()),
            false => Err(page.to_string()),
        }
    });
}

/// Checks that the loss is on the status page, in the log and in `dkc status`.
#[track_caller]
fn stays_on_record(cluster: &Cluster, shards: &[u64]) {
    let page = status(&cluster.gateways()).expect("a gateway that lives");
    let losses = page["losses"].as_array().expect("a list");
    let lost: Vec<_> = losses.iter().map(|loss| loss["shard"].as_u64().unwrap_or(9)).collect();
    assert_eq!(lost, shards, "{page}");
    for loss in losses {
        let known = |at: usize| loss["given_up"][at]["last"].as_u64();
        assert_eq!(loss["primary"], "node-3", "{loss}");
        assert!(known(0) > Some(0) && known(0) <= loss["last"].as_u64(), "{loss}");
        assert!(loss["by"].as_str().is_some_and(|by| by.contains('@')), "{loss}");
    }
    let log: String = cluster.names("coordinator").iter().map(|name| cluster.log(name)).collect();
    let logged = log.matches("a shard is led with a loss").count();
    assert_eq!(logged, shards.len(), "{log}");
    let output = cluster.dkc(&["status"]).output().expect("dkc runs");
    let printed = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(printed.contains("promoted with data loss (permanent):"), "{printed}");
}
