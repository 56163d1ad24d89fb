//! Replica counts other than three: the failures that each survives, as in the table of
//! docs/guarantees.md.

use std::time::{Duration, Instant};

use tests::cluster::http::HttpOutcome;
use tests::cluster::load::Load;
use tests::cluster::{Cluster, Signal, until};

use crate::SOON;

/// With one copy, the shards of a dead node are unavailable until it returns. Nothing that was
/// acknowledged is lost, and other shards are not affected.
#[test]
fn one_replica_waits_for_its_node() {
    let cluster = Cluster::start(&["--replicas", "1"]);
    cluster.wait_until_full(1);
    let before = cluster.shards().expect("a full cluster");
    let keys = cluster.key_per_shard("one");
    let load = Load::start(&cluster.gateways(), "one", &keys);
    load.wait_for_all(50, SOON);
    let dead = Instant::now();
    let node = cluster.kill("node-2");
    until(SOON, || {
        let shards = cluster.shards()?;
        let closed = shards.iter().filter(|shard| shard.state != "open").count();
        if closed > 0 { Ok(()) } else { Err("every shard is still open".to_owned()) }
    });
    cluster.start_again(&node);
    cluster.wait_until_full(1);
    load.wait_for_all(50, SOON);
    let probes = load.stop();
    for (shard, probe) in before.iter().zip(&probes.all) {
        let lost_its_node = shard.primary.as_deref() == Some("node-2");
        let after = probe.ops.iter().filter(|op| op.sent > dead);
        let failed = after.filter(|op| op.outcome != HttpOutcome::Applied).count();
        assert!(lost_its_node || failed == 0, "shard {} was not on node-2", shard.id);
    }
    probes.check(&cluster.gateway);
}

/// With two copies, both are needed: a shard that lost one is frozen until the third node has a
/// copy, which is made at once without waiting for the dead node.
#[test]
fn two_replicas_recruit_a_third_node() {
    let cluster = Cluster::start(&["--replicas", "2"]);
    cluster.wait_until_full(2);
    let keys = cluster.key_per_shard("two");
    let load = Load::start(&cluster.gateways(), "two", &keys);
    load.wait_for_all(50, SOON);
    let node = cluster.kill("node-2");
    load.wait_for_all(50, SOON);
    until(SOON, || {
        let shards = cluster.shards()?;
        let on_it = shards.iter().filter(|shard| shard.isr.contains(&node.name)).count();
        if on_it == 0 { Ok(()) } else { Err(format!("{on_it} shards still count on node-2")) }
    });
    cluster.start_again(&node);
    load.wait_for_all(50, SOON);
    let probes = load.stop();
    probes.check(&cluster.gateway);
    cluster.wait_until_full(2);
    cluster.wait_until_copies_agree(2);
}

/// With five copies, two nodes die at once and no request fails.
#[test]
fn five_replicas_lose_two_at_once() {
    let cluster = Cluster::start(&["--nodes", "5", "--replicas", "5", "--shards", "8"]);
    cluster.wait_until_full(5);
    let keys = cluster.key_per_shard("five");
    let load = Load::start(&cluster.gateways(), "five", &keys);
    load.wait_for_all(50, SOON);
    let at = Instant::now();
    let killed = ["node-1", "node-4"].map(|name| cluster.signal(name, Signal::KILL));
    killed.iter().for_each(|process| cluster.wait_until_gone(&process.name));
    load.wait_for_all(50, SOON);
    killed.iter().for_each(|process| cluster.start_again(process));
    load.wait_for_all(50, SOON);
    let probes = load.stop();
    probes.all_applied();
    let worst = probes.all.iter().filter_map(|probe| probe.gap(at)).max();
    tests::note(&format!("two of five killed: worst gap {worst:?}"));
    assert!(worst < Some(Duration::from_secs(2)), "{worst:?}");
    probes.check(&cluster.gateway);
    cluster.wait_until_full(5);
    cluster.wait_until_copies_agree(5);
}
