//! `dkc dev add-node` and `remove-node`, and what `dkc events` shows of such changes and of a death.

use std::time::Duration;

use serde_json::Value;
use tests::cluster::load::Load;
use tests::cluster::{Cluster, dkc_binary, until};

use crate::{SOON, check_filled, fill};

/// Runs `dkc dev add-node` or `remove-node`. Returns the exit code and what it prints.
fn dev(cluster: &Cluster, words: &[&str]) -> (Option<i32>, String) {
    let mut command = std::process::Command::new(dkc_binary());
    command.arg("dev").args(words).arg("--data").arg(cluster.folder());
    let output = command.output().expect("dkc runs");
    let text = [output.stderr, output.stdout].concat();
    (output.status.code(), String::from_utf8_lossy(&text).into_owned())
}

/// The events of this node, each as its words. An error is the text of the command.
fn events(cluster: &Cluster, node: &str) -> Result<Vec<String>, String> {
    let etcd = cluster.process("etcd");
    let mut command = std::process::Command::new(dkc_binary());
    command.args(["events", "--json", "--node", node, "--etcd", etcd.address("grpc")]);
    let output = command.output().expect("dkc runs");
    if output.status.code() != Some(0) {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned());
    }
    let all: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let word = |event: &Value, field: &str| event[field].as_str().unwrap_or("-").to_owned();
    let events = all["events"].as_array().expect("a list").iter();
    let line =
        |it: &Value| format!("{} {} {}", word(it, "event"), word(it, "node"), word(it, "reason"));
    Ok(events.map(line).collect())
}

/// Waits until the events of a node are these, among others, in this order.
#[track_caller]
fn until_events(cluster: &Cluster, node: &str, want: &[&str]) {
    until(SOON, || {
        let all = events(cluster, node)?;
        let mut rest = all.iter();
        match want.iter().all(|one| rest.any(|event| event == one)) {
            true => Ok(()),
            false => Err(format!("{want:?} are not in {all:#?}")),
        }
    });
}

#[test]
fn nodes_are_added_to_a_running_cluster_and_removed_from_it() {
    let mut cluster = Cluster::start(&["--shards", "8"]);
    cluster.wait_until_full(3);
    fill(&cluster, "grow", 500, 2);
    let (code, printed) = dev(&cluster, &["remove-node", "node-3"]);
    assert_eq!(code, Some(1), "{printed}");
    assert!(printed.contains("dkc dev add-node"), "{printed}");
    let (code, printed) = dev(&cluster, &["remove-node", "node-7"]);
    assert_eq!(code, Some(2), "{printed}");
    assert!(printed.contains("it has node-1 node-2 node-3"), "{printed}");

    let (code, printed) = dev(&cluster, &["add-node"]);
    assert_eq!(code, Some(0), "{printed}");
    assert!(printed.contains("node-4 is added: 127.0.0.1:"), "{printed}");
    let moved = [
        "node-came node-4 new",
        "copy-planned node-4 balance",
        "learner-added node-4 -",
        "in-sync node-4 -",
    ];
    until_events(&cluster, "node-4", &moved);

    let (code, printed) = dev(&cluster, &["remove-node", "node-2"]);
    assert_eq!(code, Some(0), "{printed}");
    assert!(printed.contains("node-2 is removed"), "{printed}");
    let left = [
        "node-draining node-2 operator",
        "copy-removed node-2 draining",
        "node-left node-2 -",
        "node-removed node-2 operator",
    ];
    until_events(&cluster, "node-2", &left);
    assert_eq!(cluster.names("storage-node"), ["node-1", "node-3", "node-4"]);
    cluster.wait_until_full(3);
    cluster.wait_until_copies_agree(3);

    cluster.stop_and_resume();
    assert_eq!(cluster.names("storage-node"), ["node-1", "node-3", "node-4"]);
    cluster.wait_until_full(3);
    check_filled(&cluster, "grow", 500, 2);
    // A name is not used again: its data are still there.
    let (code, printed) = dev(&cluster, &["add-node", "--count", "2"]);
    assert_eq!(code, Some(0), "{printed}");
    assert!(printed.contains("node-5 is added") && printed.contains("node-6 is"), "{printed}");
    cluster.stop();
}

#[test]
fn the_events_of_a_death_have_its_cause() {
    let cluster = Cluster::start(&["--shards", "8"]);
    cluster.wait_until_full(3);
    let node = cluster.kill("node-2");
    until_events(&cluster, "node-2", &["node-dead node-2 refused", "node-left node-2 -"]);
    let promoted = |event: &String| event.starts_with("primary ") && event.ends_with(" refused");
    until(SOON, || {
        let all = events(&cluster, "node-2")?;
        let left = all.contains(&"out-of-sync node-2 refused".to_owned());
        if left && all.iter().any(promoted) { Ok(()) } else { Err(format!("{all:#?}")) }
    });
    cluster.start_again(&node);
    cluster.wait_until_full(3);
    let back = ["node-came node-2 restarted", "learner-added node-2 returned", "in-sync node-2 -"];
    until_events(&cluster, "node-2", &back);
}

/// The time after the last change of the nodes in which the copies are spread evenly.
const EVEN_WITHIN: Duration = Duration::from_secs(30);

/// Waits until all copies are in sync and no node has two copies or two primaries more than
/// another one.
#[track_caller]
fn until_even(cluster: &Cluster, nodes: usize) {
    until(EVEN_WITHIN, || {
        let shards = cluster.shards()?;
        shards.iter().try_for_each(|shard| shard.is_full(3))?;
        let members = shards.iter().flat_map(|shard| shard.isr.clone()).collect::<Vec<_>>();
        let primaries = shards.iter().filter_map(|shard| shard.primary.clone()).collect::<Vec<_>>();
        let names = cluster.names("storage-node");
        assert_eq!(names.len(), nodes);
        for held in [&members, &primaries] {
            let counts: Vec<usize> =
                names.iter().map(|name| held.iter().filter(|of| *of == name).count()).collect();
            if counts.iter().max() > counts.iter().min().map(|least| least + 1).as_ref() {
                return Err(format!("{counts:?} of {names:?}"));
            }
        }
        Ok(())
    });
}

/// Six nodes join, two shards are split, and six nodes leave again under load, while nodes and the
/// coordinator are killed: nothing is lost or counted twice, and every request is answered with
/// 200.
#[test]
#[ignore = "long: ./test --full"]
fn three_nodes_become_nine_and_three_again_under_kills() {
    let cluster = Cluster::start(&["--gateways", "2", "--shards", "12"]);
    cluster.wait_until_full(3);
    fill(&cluster, "filled", 5_000, 2);
    let keys = cluster.key_per_shard("nine");
    let load = Load::start(&cluster.gateways(), "nine", &keys);
    load.wait_for_all(20, SOON);

    let (code, printed) = dev(&cluster, &["add-node", "--count", "6"]);
    assert_eq!(code, Some(0), "{printed}");
    kill_and_start(&cluster, &load, "node-2");
    kill_and_start(&cluster, &load, "node-5");
    kill_and_start(&cluster, &load, "coordinator-1");
    cluster.wait_until_full(3);
    until_even(&cluster, 9);
    for shard in ["0", "5461"] {
        let etcd = cluster.process("etcd");
        let mut command = std::process::Command::new(dkc_binary());
        command.args(["shards", "split", shard, "--etcd", etcd.address("grpc")]);
        let output = command.output().expect("dkc runs");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        load.wait_for_all(10, SOON);
    }
    until_even(&cluster, 9);

    for (leaves, killed) in (4..=9).zip([1, 9, 3, 2, 9, 1]) {
        let leaves = format!("node-{leaves}");
        std::thread::scope(|scope| {
            let removal = scope.spawn(|| dev(&cluster, &["remove-node", &leaves]));
            let killed = format!("node-{killed}");
            if killed != leaves {
                kill_and_start(&cluster, &load, &killed);
            }
            let (code, printed) = removal.join().expect("it does not panic");
            assert_eq!(code, Some(0), "{leaves}: {printed}");
        });
        cluster.wait_until_full(3);
    }
    until_even(&cluster, 3);
    load.wait_for_all(20, SOON);
    let probes = load.stop();
    probes.all_applied();
    probes.check(&cluster.gateway);
    check_filled(&cluster, "filled", 5_000, 2);
    cluster.wait_until_copies_agree(3);
}

#[track_caller]
fn kill_and_start(cluster: &Cluster, load: &Load, name: &str) {
    load.wait_for_all(10, SOON);
    let killed = cluster.kill(name);
    load.wait_for_all(10, SOON);
    cluster.start_again(&killed);
}
