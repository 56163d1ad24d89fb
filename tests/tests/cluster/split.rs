//! Shards are split under load, while a node is killed.

use std::process::Command;

use tests::cluster::load::Load;
use tests::cluster::{Cluster, dkc_binary, until};

use crate::SOON;

/// Splits the shard into so many parts. Returns whether it is done.
fn split(cluster: &Cluster, shard: u16, into: u16) -> bool {
    let node = cluster.process("node-1");
    let (etcd, own) = (node.value_of("--etcd"), node.value_of("--cluster"));
    let (shard, into) = (shard.to_string(), into.to_string());
    let mut command = Command::new(dkc_binary());
    command.args(["shards", "split", &shard, "--into", &into, "--wait", "30"]);
    command.args(["--etcd", etcd, "--cluster", own]);
    let output = command.output().expect("dkc runs");
    output.status.success()
}

/// Every request is answered with 200, no increment is lost and none is counted twice.
#[test]
fn a_shard_is_split_under_load_while_a_node_is_killed() {
    let cluster = Cluster::start(&["--shards", "2"]);
    cluster.wait_until_full(3);
    let keys: Vec<String> = (0..16).map(|at| format!("key-{at}")).collect();
    let gateways = cluster.gateways();
    let load = Load::start(&gateways, "split", &keys);
    load.wait_for_all(5, SOON);
    assert!(split(&cluster, 0, 2), "at rest");
    load.wait_for_all(5, SOON);
    let killed = std::thread::scope(|scope| {
        let splits = scope.spawn(|| split(&cluster, 0, 4));
        let killed = cluster.kill("node-2");
        let _done_or_not = splits.join().expect("it ends");
        killed
    });
    load.wait_for_all(5, SOON);
    cluster.start_again(&killed);
    cluster.wait_until_full(3);
    until(SOON, || match split(&cluster, 32_768, 2) {
        true => Ok(()),
        false => Err("the other shard is not split".to_owned()),
    });
    load.wait_for_all(5, SOON);
    let probes = load.stop();
    probes.all_applied();
    probes.check(&gateways[0]);
    let shards = cluster.shards().expect("a gateway that lives");
    assert!(shards.len() >= 4, "{} shards", shards.len());
    cluster.wait_until_full(3);
    cluster.wait_until_copies_agree(3);
}
