//! Without etcd and the coordinators, running gateways and nodes keep serving (promise 5 of
//! docs/guarantees.md).

use std::thread::sleep;
use std::time::Duration;

use tests::cluster::load::Load;
use tests::cluster::{Cluster, Signal};

use crate::SOON;

#[test]
fn etcd_and_coordinators_may_go() {
    // This is several times the lease TTL: all leases have expired when etcd is resumed.
    serves_without_a_metastore(Duration::from_secs(8));
}

#[test]
#[ignore = "long: ./test --full"]
fn etcd_and_coordinators_may_go_for_half_a_minute() {
    serves_without_a_metastore(Duration::from_secs(30));
}

/// Checks that every read and every increment is answered with 200, since nothing else is killed.
#[track_caller]
fn serves_without_a_metastore(away: Duration) {
    let cluster = Cluster::start(&["--coordinators", "2", "--gateways", "2"]);
    cluster.wait_until_full(3);
    let keys = cluster.key_per_shard("away");
    let load = Load::start(&cluster.gateways(), "away", &keys);
    load.wait_for_all(50, SOON);

    cluster.signal("etcd", Signal::STOP);
    sleep(away);
    cluster.signal("etcd", Signal::CONT);
    // No node is declared dead because its lease expired; a few TTLs show it.
    sleep(Duration::from_secs(6));

    let etcd = cluster.kill("etcd");
    sleep(away);
    cluster.start_again(&etcd);
    sleep(Duration::from_secs(6));

    let coordinators = cluster.names("coordinator");
    assert_eq!(coordinators.len(), 2);
    let killed: Vec<_> = coordinators.iter().map(|name| cluster.kill(name)).collect();
    sleep(away);
    killed.iter().for_each(|process| cluster.start_again(process));
    load.wait_for_all(50, SOON);

    let probes = load.stop();
    probes.all_applied();
    probes.check(&cluster.gateway);
    // Membership changes work again.
    let node = cluster.kill("node-1");
    cluster.start_again(&node);
    cluster.wait_until_full(3);
    cluster.wait_until_copies_agree(3);
}
