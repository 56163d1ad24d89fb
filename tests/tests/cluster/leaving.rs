//! Planned departures of nodes: a graceful stop, or a drain. Unlike failures (`failover`) they have
//! no effect on clients.

use std::process::Command;
use std::time::Duration;

use tests::cluster::failover::run;
use tests::cluster::load::Load;
use tests::cluster::{Cluster, Signal, dkc_binary, until};

use crate::{SOON, check_filled, fill};

/// The limit of a gap, far below that of a failover; most of it is for a machine with a dozen
/// processes.
const HARDLY_NOTICED: Duration = Duration::from_millis(300);
/// The limit of a graceful stop.
const STOPS_WITHIN: Duration = Duration::from_secs(10);

#[track_caller]
fn until_gone(cluster: &Cluster, name: &str, limit: Duration) {
    until(limit, || match cluster.processes().iter().any(|process| process.name == name) {
        true => Err(format!("{name} still runs:\n{}", cluster.log(name))),
        false => Ok(()),
    });
}

#[test]
fn a_node_that_is_asked_to_stop_hands_over_first() {
    let cluster = Cluster::start(&[]);
    for victim in ["node-1", "node-2"] {
        let run = run(&cluster, &format!("term-{victim}"), victim, Signal::TERM, 3);
        tests::note(&format!("{victim} asked to stop: worst {:?}", run.worst()));
        assert_eq!(run.failed, 0, "{victim}: requests failed");
        assert!(run.worst().gap < HARDLY_NOTICED, "{victim}: {:#?}", run.gaps);
        assert!(cluster.log(victim).contains("stopped"), "{}", cluster.log(victim));
    }
}

#[test]
fn a_node_stops_all_the_same_while_no_coordinator_leads() {
    let cluster = Cluster::start(&[]);
    cluster.wait_until_full(3);
    cluster.kill("coordinator-1");
    cluster.signal("node-1", Signal::TERM);
    until_gone(&cluster, "node-1", STOPS_WITHIN);
    assert!(cluster.log("node-1").contains("stopped"), "{}", cluster.log("node-1"));
}

/// Runs `dkc node` and returns what it prints.
fn node(cluster: &Cluster, words: &[&str]) -> String {
    let etcd = cluster.process("etcd");
    let mut command = Command::new(dkc_binary());
    command.arg("node").args(words).args(["--etcd", etcd.address("grpc")]);
    let output = command.output().expect("dkc runs");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    text(&output.stdout)
}

#[test]
fn a_drained_node_is_emptied_under_load_and_may_be_switched_off() {
    let cluster = Cluster::start(&["--nodes", "4", "--shards", "8"]);
    cluster.wait_until_full(3);
    fill(&cluster, "drain", 2_000, 2);
    let load = Load::start(&cluster.gateways(), "load", &cluster.key_per_shard("load"));
    load.wait_for_all(20, SOON);
    assert_eq!(node(&cluster, &["drain", "node-2"]), "node-2 is empty: it can be shut down\n");
    let holds = |cluster: &Cluster| {
        let shards = cluster.shards().expect("a gateway that lives");
        shards.iter().filter(|shard| shard.isr.contains(&"node-2".to_owned())).count()
    };
    until(
        SOON,
        || if holds(&cluster) == 0 { Ok(()) } else { Err("node-2 is still in sync".into()) },
    );
    cluster.wait_until_full(3);
    let output = cluster.dkc(&["status"]).output().expect("dkc runs");
    let table = String::from_utf8_lossy(&output.stdout).into_owned();
    let line = table.lines().find(|line| line.contains("node-2") && line.contains("draining"));
    assert!(line.is_some(), "{table}");

    // The node can be stopped without any effect on clients.
    let stopped = cluster.signal("node-2", Signal::TERM);
    until_gone(&cluster, "node-2", STOPS_WITHIN);
    load.wait_for_all(20, SOON);
    let probes = load.stop();
    probes.all_applied();
    probes.check(&cluster.gateway);
    check_filled(&cluster, "drain", 2_000, 2);

    // The node comes back empty, and gets its share of shards after the drain is undone.
    cluster.start_again(&stopped);
    assert!(node(&cluster, &["undrain", "node-2"]).contains("no longer draining"));
    until(SOON, || if holds(&cluster) > 0 { Ok(()) } else { Err("node-2 gets no shard".into()) });
    cluster.wait_until_full(3);
    cluster.wait_until_copies_agree(3);
    check_filled(&cluster, "drain", 2_000, 2);
}

#[test]
fn a_drained_node_that_is_stopped_is_removed_and_its_disk_is_refused() {
    let cluster = Cluster::start(&["--nodes", "4", "--shards", "8"]);
    cluster.wait_until_full(3);
    node(&cluster, &["drain", "node-4"]);
    let stopped = cluster.signal("node-4", Signal::TERM);
    until_gone(&cluster, "node-4", STOPS_WITHIN);
    let printed = node(&cluster, &["remove", "node-4"]);
    assert!(printed.starts_with("node-4 is removed"), "{printed}");
    assert!(!node(&cluster, &["list"]).contains("node-4"));
    assert!(node(&cluster, &["list", "--all"]).contains("retired"));
    cluster.wait_until_full(3);
    // The store has left for good: its disk is refused. Its name is free for another one.
    let code = cluster.exit_code_of("removed", &stopped.argv, SOON);
    let log = cluster.log("removed");
    assert_eq!(code, 4, "{log}");
    assert!(log.contains("given up"), "{log}");
}
