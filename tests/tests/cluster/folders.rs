//! Unexpected data folders: outdated, wiped, rolled back, copied (docs/design.md#identity).
//!
//! The identity of a store is in its folder. A folder that was copied or put back could make a node
//! claim data that it no longer has. Each case is detected, and no acknowledged data are lost.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use tests::cluster::load::Load;
use tests::cluster::{Cluster, ClusterProcess, Signal, until};

use crate::{SOON, check_filled, fill};

/// Flags for minimum sizes, so that seconds of writing have the effect of days. There are few
/// shards, since each may keep a part of its log in memory, from which a copy could catch up
/// without the file.
const SMALL: [&str; 11] = [
    "--shards",
    "2",
    "--",
    "--log-keep-bytes",
    "65536",
    "--segment-bytes",
    "65536",
    "--flush-after-ms",
    "200",
    "--memory-bytes",
    "134217728",
];
/// The exit code of a node that refuses its folder.
const REFUSED: i32 = 4;
/// The limit of a refusal: a node may first wait for the lease of its previous process to expire.
const REFUSED_WITHIN: Duration = Duration::from_secs(20);

fn copy(from: &Path, to: &Path) {
    // The node may be running, so files may disappear while they are copied.
    let copied = Command::new("cp").arg("-a").arg(from).arg(to).output().expect("cp runs");
    assert!(to.join("log").exists(), "{copied:?}");
}

fn replace(folder: &Path, by: &Path) {
    std::fs::remove_dir_all(folder).expect("the folder of a node that is dead");
    std::fs::rename(by, folder).expect("in the same file system");
}

/// Returns the command line of this process with another folder and other ports.
fn elsewhere(process: &ClusterProcess, folder: &Path) -> Vec<String> {
    let mut argv = process.argv.clone();
    let mut set = |flag: &str, value: &str| {
        let at = argv.iter().position(|word| word == flag).expect("a flag of dkc dev");
        value.clone_into(&mut argv[at + 1]);
    };
    set("--data", folder.to_str().expect("a path of our own"));
    set("--listen", "127.0.0.1:0");
    set("--metrics", "127.0.0.1:0");
    argv
}

/// Returns the uuid that `/v1/cluster` shows for the node of that name.
fn uuid(cluster: &Cluster, name: &str) -> String {
    let status = tests::cluster::status(&cluster.gateways()).expect("a gateway that lives");
    let nodes = status["nodes"].as_array().expect("a list");
    // A lost store may be listed beside the one that has taken over its name.
    let node = nodes.iter().find(|node| node["name"] == name && node["state"] == "up");
    node.unwrap_or_else(|| panic!("{name} is not up: {status}"))["uuid"].to_string()
}

/// Everything is flushed and the log is trimmed while the node is down.
#[test]
fn a_node_that_missed_a_trimmed_log_gets_a_copy() {
    let cluster = Cluster::start(&SMALL);
    fill(&cluster, "trim", 10_000, 1);
    let node = cluster.kill("node-3");
    let log = cluster.log("node-3").len();
    // This writes about 10 MB of log on each of the other nodes.
    fill(&cluster, "trim", 10_000, 50);
    let survivor = cluster.process("node-1").data().join("log");
    until(SOON, || {
        let files = std::fs::read_dir(&survivor).map_err(|error| error.to_string())?;
        let sizes = files.filter_map(|file| file.ok()?.metadata().ok()).map(|data| data.len());
        let bytes: u64 = sizes.sum();
        if bytes < 2 << 20 { Ok(()) } else { Err(format!("{bytes} bytes of log are left")) }
    });
    cluster.start_again(&node);
    cluster.wait_until_full(3);
    let log = cluster.log("node-3")[log..].to_owned();
    assert!(log.contains("snapshot received"), "node-3 caught up without a copy:\n{log}");
    check_filled(&cluster, "trim", 10_000, 51);
    cluster.wait_until_copies_agree(3);
}

#[test]
fn a_wiped_folder_is_a_new_store() {
    let cluster = Cluster::start(&[]);
    fill(&cluster, "wipe", 5000, 2);
    let old = uuid(&cluster, "node-2");
    let node = cluster.kill("node-2");
    std::fs::remove_dir_all(node.data()).expect("the folder of a node that is dead");
    // The node refuses an empty folder, since its disk may not be mounted.
    let code = cluster.exit_code_of("unasked", &node.argv, REFUSED_WITHIN);
    assert_eq!(code, REFUSED, "{}", cluster.log("unasked"));
    cluster.start_replacing(&node);
    // The new store gets the copies of the old one at once, without the rebuild delay of 10 min.
    cluster.wait_until_full(3);
    assert_ne!(uuid(&cluster, "node-2"), old);
    check_filled(&cluster, "wipe", 5000, 2);
    cluster.wait_until_copies_agree(3);
}

/// Scenario: all machines reboot, and no data disk is mounted. First the nodes refuse to start on
/// the empty mount points. Then an operator starts all three with `--replace`, which must not lose
/// the data either.
#[test]
fn disks_that_are_not_mounted_at_a_boot_lose_nothing() {
    let cluster = Cluster::start(&[]);
    fill(&cluster, "boot", 1000, 7);
    let names = ["node-1", "node-2", "node-3"];
    // All are killed at once: no shard would need a node that died before the others, and its store
    // would be given up.
    let nodes = names.map(|name| cluster.process(name));
    for node in &nodes {
        cluster.signal(&node.name, Signal::KILL);
    }
    nodes.iter().for_each(|node| cluster.wait_until_gone(&node.name));
    let disk = |node: &ClusterProcess| node.data().with_extension("disk");
    for node in &nodes {
        std::fs::rename(node.data(), disk(node)).expect("a folder of our own");
        let code = cluster.exit_code_of("unmounted", &node.argv, REFUSED_WITHIN);
        assert_eq!(code, REFUSED, "{}", cluster.log("unmounted"));
    }
    let log = cluster.log("unmounted");
    assert!(log.contains("Is its disk not mounted here?"), "{log}");
    nodes.iter().for_each(|node| cluster.start_replacing(node));
    until(SOON, || {
        match names.iter().all(|name| cluster.log(name).contains("taking over the name")) {
            true => Ok(()),
            false => Err("not all stores have taken over a name".to_owned()),
        }
    });
    // The shards wait for the old stores, and the empty stores do not replace them.
    until(SOON, || {
        let page =
            tests::cluster::status(&cluster.gateways()).map_err(|error| error.to_string())?;
        let shards = page["shards"].as_array().expect("a list");
        let waits = |shard: &serde_json::Value| {
            shard["state"] == "no-primary"
                && shard["isr"][0].as_str().is_some_and(|name| name.contains('@'))
        };
        if shards.iter().all(waits) { Ok(()) } else { Err(page.to_string()) }
    });
    for node in names.map(|name| cluster.kill(name)) {
        let data = node.data();
        std::fs::remove_dir_all(&data).expect("the folder of a node that is dead");
        std::fs::rename(disk(&node), &data).expect("a folder of our own");
        cluster.start_again(&node);
    }
    cluster.wait_until_full(3);
    check_filled(&cluster, "boot", 1000, 7);
    cluster.wait_until_copies_agree(3);
}

#[test]
fn a_folder_that_was_rolled_back_is_refused() {
    let cluster = Cluster::start(&[]);
    fill(&cluster, "back", 1000, 1);
    let node = cluster.kill("node-3");
    let (old, new) = (cluster.folder().join("old"), cluster.folder().join("new"));
    copy(&node.data(), &old);
    cluster.start_again(&node);
    cluster.wait_until_full(3);
    fill(&cluster, "back", 1000, 1);
    cluster.kill("node-3");

    copy(&node.data(), &new);
    replace(&node.data(), &old);
    let code = cluster.exit_code_of("rolled-back", &node.argv, REFUSED_WITHIN);
    assert_eq!(code, REFUSED, "{}", cluster.log("rolled-back"));

    // The right folder is accepted.
    replace(&node.data(), &new);
    cluster.start_again(&node);
    cluster.wait_until_full(3);
    check_filled(&cluster, "back", 1000, 2);
    cluster.wait_until_copies_agree(3);
}

#[test]
fn a_copy_started_while_the_original_runs_is_refused() {
    let cluster = Cluster::start(&[]);
    cluster.wait_until_full(3);
    let keys = cluster.key_per_shard("twin");
    let load = Load::start(&cluster.gateways(), "twin", &keys);
    load.wait_for_all(20, SOON);
    let original = cluster.process("node-2");
    let twin = cluster.folder().join("twin");
    copy(&original.data(), &twin);
    let argv = elsewhere(&original, &twin);
    let code = cluster.exit_code_of("twin", &argv, REFUSED_WITHIN);
    assert_eq!(code, REFUSED, "{}", cluster.log("twin"));
    // The original is not disturbed.
    load.wait_for_all(20, SOON);
    let probes = load.stop();
    probes.all_applied();
    probes.check(&cluster.gateway);
    assert_eq!(cluster.process("node-2").pid, original.pid);
    cluster.wait_until_full(3);
}

/// The nonce of the copy is right, since the node did not restart after the copy, but the log lacks
/// the entries acknowledged since. Only its peers can detect that.
#[test]
fn a_copy_of_a_running_node_put_back_later_is_detected() {
    let cluster = Cluster::start(&[]);
    fill(&cluster, "short", 5000, 1);
    cluster.wait_until_full(3);
    let running = cluster.process("node-3");
    let copied = cluster.folder().join("copied");
    copy(&running.data(), &copied);
    // Node-3 acknowledges all of this.
    fill(&cluster, "short", 5000, 5);
    cluster.kill("node-3");
    replace(&running.data(), &copied);
    cluster.start_again(&running);
    cluster.wait_until_full(3);
    // Now node-3 must have everything, since it may become primary.
    cluster.kill("node-1");
    check_filled(&cluster, "short", 5000, 6);
    fill(&cluster, "short", 5000, 1);
    check_filled(&cluster, "short", 5000, 7);
}
