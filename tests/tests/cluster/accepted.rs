//! `dkc shards promote SHARD NODE --accept-loss`: the machines with the good copies are gone for good, and an operator has a
//! shard led by what is left. What that costs is said before, and stays on record.

use std::process::{Command, Output, Stdio};

use serde_json::Value;
use tests::cluster::http::Client;
use tests::cluster::{Cluster, Process, Shard, dkc_binary, status, until};

use crate::{SOON, check_filled, fill};

/// One worker has one session, which is the one that ends.
const FLAGS: [&str; 7] = ["--shards", "2", "--", "--flush-after-ms", "200", "--workers", "1"];
const KEYS: u64 = 300;
/// What the copy that is left holds of each key, and what was acknowledged beyond it.
const KEPT: u64 = 3;
const LOST: u64 = 4;

fn promote(node: &Process, shard: u64, more: &[&str]) -> (Option<i32>, String) {
    let (etcd, own) = (node.value_of("--etcd"), node.value_of("--cluster"));
    let mut command = Command::new(dkc_binary());
    command.args(["shards", "promote", &shard.to_string(), &node.name, "--accept-loss"]);
    command.args(["--etcd", etcd, "--cluster", own]).args(more).stdin(Stdio::null());
    let Output { status, stdout, stderr } = command.output().expect("dkc runs");
    let said = [stderr, stdout].concat();
    (status.code(), String::from_utf8_lossy(&said).into_owned())
}

/// What was lost has acknowledgements of the gateway's session too: with the first batch the session ends, and what became
/// of that batch is unknown.
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

/// Node-3 was away for the last increments, and then the other two machines burned.
#[test]
fn an_operator_accepts_that_something_is_lost() {
    let cluster = Cluster::start(&FLAGS);
    cluster.wait_until_full(3);
    fill(&cluster, "loss", KEYS, KEPT);
    cluster.wait_until_copies_agree(3);
    wait_until_flushed(&cluster.process("node-3"));
    let third = cluster.kill("node-3");
    fill(&cluster, "loss", KEYS, LOST);
    // It counts no more: alone it may not lead.
    until(SOON, || {
        let out = |shard: &Shard| !shard.isr.contains(&third.name);
        if cluster.shards()?.iter().all(out) { Ok(()) } else { Err("it is in sync".to_owned()) }
    });
    let shards: Vec<u64> = cluster.shards().expect("a gateway").iter().map(|it| it.id).collect();
    let first = cluster.process("node-1");
    let (code, said) = promote(&first, shards[0], &["--yes"]);
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("no promotion is needed"), "{said}");

    let first = cluster.kill("node-1");
    let second = cluster.kill("node-2");
    cluster.start_again(&third);
    wait_until_unled(&cluster);
    let (code, said) = promote(&third, shards[0], &[]);
    assert_eq!(code, Some(2), "{said}");
    assert!(said.contains("--yes"), "{said}");
    for &shard in &shards {
        let (code, said) = promote(&third, shard, &["--yes"]);
        assert_eq!(code, Some(0), "{said}");
        // Each store by name and number, and what it was known to hold.
        for name in ["node-1 (store ", "node-2 (store "] {
            assert!(said.contains(name), "{said}");
        }
        // Right after a start a copy knows of the others what its last flush did.
        let known =
            ["does not answer, known to hold entries up to ", "does not answer, position unknown"];
        assert!(known.iter().any(|text| said.contains(text)), "{said}");
        assert!(said.contains(&format!("node-3 is primary of shard {shard}")), "{said}");
    }
    // What the machines that burned held is given up, also if one was only singed.
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

/// What it has flushed it has applied, also when it starts again, and that is committed.
#[track_caller]
fn wait_until_flushed(node: &Process) {
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

#[track_caller]
fn wait_until_unled(cluster: &Cluster) {
    until(SOON, || {
        let page = status(&cluster.gateways())?;
        let up = |node: &Value| node["name"] == "node-3" && node["state"] == "up";
        let unled = |shard: &Value| shard["state"] == "no-primary";
        let list = |name: &str| page[name].as_array().cloned().unwrap_or_default();
        match list("nodes").iter().any(up) && list("shards").iter().all(unled) {
            true => Ok(()),
            false => Err(page.to_string()),
        }
    });
}

/// On the status page, in the log and, for people, in `dkc status`.
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
    let told = log.matches("a shard is led with a loss").count();
    assert_eq!(told, shards.len(), "{log}");
    let output = cluster.dkc(&["status"]).output().expect("dkc runs");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(said.contains("promoted with data loss (permanent):"), "{said}");
}
