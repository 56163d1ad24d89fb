//! Tests that kill real processes: the binary `dkc dev`, with etcd, RocksDB and sockets.
//!
//! The simulator covers all that it can, with thousands of runs. These tests cover the wiring: the
//! drivers do on a real machine what the engine decides. Each test is a scenario with a cluster of
//! its own; they run one after the other (`tests::cluster`). The long versions are ignored here and
//! run by `./test --full`.
//!
//! `tests/count_words*.sh` count the words of a real text under kills.

mod accepted;
mod catch_up;
mod damage;
mod etcd_lost;
mod failover;
mod folders;
mod grow;
mod leaving;
mod metastore_away;
mod replicas;
mod split;
mod stale_reads;
mod two_dead;

use std::time::Duration;

use tests::cluster::Cluster;
use tests::cluster::http::{Client, HttpOutcome};
use tests::cluster::load::Load;

/// The limit of an action that takes a second or two on an idle machine.
const SOON: Duration = Duration::from_secs(60);

/// Adds 1 to each of `keys` keys, `rounds` times, in batches, so that there are data on disk.
#[track_caller]
fn fill(cluster: &Cluster, namespace: &str, keys: u64, rounds: u64) {
    let mut client = Client::new(&cluster.gateway);
    let lines: String = (0..keys).map(|key| format!("fill-{key}\n")).collect();
    let path = format!("/v1/counters/{namespace}/increment");
    for _ in 0..rounds {
        let headers = [("Content-Type", "text/plain")];
        let answer = client.call("POST", &path, &headers, lines.as_bytes(), SOON);
        let answer = answer.expect("a gateway that lives");
        assert_eq!((answer.status, &answer.body["applied"]), (200, &keys.into()), "{answer:?}");
    }
}

/// Checks that every key that [`fill`] wrote has this value.
#[track_caller]
fn check_filled(cluster: &Cluster, namespace: &str, keys: u64, want: u64) {
    let names: Vec<_> = (0..keys).map(|key| format!("fill-{key}")).collect();
    let body = serde_json::json!({ "keys": names }).to_string();
    let path = format!("/v1/counters/{namespace}/get");
    let headers = [("Content-Type", "application/json")];
    let mut client = Client::new(&cluster.gateway);
    let answer = client.call("POST", &path, &headers, body.as_bytes(), SOON);
    let answer = answer.expect("a gateway that lives");
    let counters = answer.body["counters"].as_array().unwrap_or_else(|| panic!("{answer:?}"));
    assert_eq!(counters.len(), names.len());
    let wrong: Vec<_> = counters.iter().filter(|counter| counter["value"] != want).collect();
    assert!(wrong.is_empty(), "{} of {keys} are not {want}: {:?}", wrong.len(), wrong[0]);
}

/// The first commands of a new user work, also over a restart.
#[test]
fn one_node_counts_dies_and_resumes() {
    let mut cluster = Cluster::start(&["--nodes", "1"]);
    let mut client = Client::new(&cluster.gateway);
    let answer = client.increment("likes", "video-1", 5).expect("an answer");
    assert_eq!((answer.outcome(), &answer.body["applied"]), (HttpOutcome::Applied, &5.into()));
    fill(&cluster, "likes", 1000, 3);
    let run = |args: &[&str]| {
        let output = cluster.dkc(args).output().expect("dkc runs");
        (output.status.code(), String::from_utf8(output.stdout).expect("text"))
    };
    assert_eq!(run(&["incr", "likes", "video-1", "37"]), (Some(0), "42\n".to_owned()));
    assert_eq!(run(&["get", "likes", "video-1"]), (Some(0), "42\n".to_owned()));

    let node = cluster.kill("node-1");
    cluster.start_again(&node);
    cluster.wait_until_full(1);
    check_filled(&cluster, "likes", 1000, 3);

    cluster.stop_and_resume();
    check_filled(&cluster, "likes", 1000, 3);
    fill(&cluster, "likes", 1000, 1);
    check_filled(&cluster, "likes", 1000, 4);
    cluster.stop();
}

/// All processes are killed at once: no acknowledged increment is missing.
#[test]
fn everything_dies_at_once_and_nothing_is_lost() {
    let cluster = Cluster::start(&["--coordinators", "2"]);
    cluster.wait_until_full(3);
    let keys = cluster.key_per_shard("power");
    let load = Load::start(&cluster.gateways(), "power", &keys);
    load.wait_for_all(50, SOON);
    let processes = cluster.processes();
    for process in &processes {
        cluster.signal(&process.name, tests::cluster::Signal::KILL);
    }
    let probes = load.stop();
    for process in &processes {
        cluster.wait_until_gone(&process.name);
    }
    for process in &processes {
        cluster.start_again(process);
    }
    cluster.wait_until_full(3);
    probes.check(&cluster.gateway);
    cluster.wait_until_copies_agree(3);
}
