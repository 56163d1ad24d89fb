//! A node that dies or hangs is replaced while its clients wait.
//! `cargo run -p tests --bin failover` does 20 runs; these few detect a regression of the bound.

use std::time::Duration;

use tests::cluster::failover::{LEASE_TTL, run};
use tests::cluster::{Cluster, Signal};

#[test]
fn a_killed_node_costs_less_than_a_second() {
    let cluster = Cluster::start(&[]);
    for victim in cluster.names("storage-node") {
        let run = run(&cluster, &format!("kill-{victim}"), &victim, Signal::KILL, 3);
        tests::note(&format!("{victim} killed: worst {:?}", run.worst()));
        assert!(run.worst().gap <= Duration::from_secs(1), "{victim}: {:#?}", run.gaps);
        assert_eq!(run.failed, 0, "{victim}: requests failed within their deadline of 5 s");
    }
}

#[test]
fn a_stopped_node_costs_little_more_than_its_lease_and_changes_nothing_later() {
    let cluster = Cluster::start(&[]);
    let run = run(&cluster, "stop", "node-2", Signal::STOP, 3);
    tests::note(&format!("node-2 stopped: worst {:?}", run.worst()));
    assert!(run.worst().gap < LEASE_TTL + Duration::from_secs(1), "{:#?}", run.gaps);
    assert_eq!(run.failed, 0, "requests failed within their deadline of 5 s");
}
