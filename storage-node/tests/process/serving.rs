//! One node serves, stops, dies and comes back with everything that it acknowledged.

use std::time::{Duration, Instant};

use engine::message::{BatchReply, Refusal};
use proto::wire::gateway_client::GatewayClient;
use proto::wire::{self, to_node};
use rustix::process::Signal;

use crate::exposition;
use crate::harness::{CLUSTER_ID, Cluster, metastore_of};
use crate::worker::Worker;

#[tokio::test(flavor = "multi_thread")]
async fn what_was_acknowledged_survives_a_stop_and_a_kill() {
    let cluster = Cluster::start(1).await;
    let mut node = cluster.node("a").await;
    cluster.place(&[&node]).await;
    let mut worker = Worker::connect(&node, 7).await;
    assert_eq!(worker.add("likes", 5).await, 5);
    assert_eq!(worker.add("likes", -2).await, 3);
    assert_eq!(worker.read("likes").await, 3);
    assert_eq!(worker.read("never touched").await, 0);

    assert_eq!(node.stop().await, Some(0), "{}", node.log());
    assert_eq!(worker.try_reply().await, None, "the stream ends with the process");
    assert_eq!(cluster.key(node.me.store).await, None, "the lease was given back");

    let again = cluster.node("a").await;
    assert_eq!((again.me.store, again.me.boot.0), (node.me.store, 2));
    cluster.promote(&again).await;
    worker.reconnect(&again).await;
    // The last batch is sent once more: it is known.
    assert_eq!(worker.add_again("likes", -2).await, 3);
    assert_eq!(worker.add("likes", 1).await, 4);

    let mut again = again;
    again.kill();
    let third = cluster.node("a").await;
    assert_eq!(third.me.boot.0, 3);
    cluster.promote(&third).await;
    worker.reconnect(&third).await;
    assert_eq!(worker.add_again("likes", 1).await, 4);
    assert_eq!(worker.read("likes").await, 4);
}

/// Acknowledged, flushed into the sorted files, the log trimmed: nothing is lost or counted twice.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_flushed_is_not_counted_again() {
    let cluster = Cluster::start(1).await;
    let flush = [("DKC_FLUSH_AFTER_MS", "30"), ("DKC_LOG_KEEP_BYTES", "0")];
    let mut node = cluster.node_with("a", &flush).await;
    cluster.place(&[&node]).await;
    let mut worker = Worker::connect(&node, 7).await;
    let began = Instant::now();
    let mut want = 0;
    while began.elapsed() < Duration::from_millis(500) {
        want += 1;
        assert_eq!(worker.add("likes", 1).await, want);
    }
    node.kill();
    let again = cluster.node_with("a", &flush).await;
    cluster.promote(&again).await;
    worker.reconnect(&again).await;
    assert_eq!(worker.add_again("likes", 1).await, want);
    assert_eq!(worker.read("likes").await, want);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_serves_while_etcd_is_away() {
    let cluster = Cluster::start(1).await;
    let node = cluster.node("a").await;
    cluster.place(&[&node]).await;
    let mut worker = Worker::connect(&node, 7).await;
    assert_eq!(worker.add("likes", 1).await, 1);
    let created = cluster.key(node.me.store).await.expect("registered").created;
    cluster.etcd.freeze();
    let began = Instant::now();
    // This is longer than the lease's TTL.
    for want in 2.. {
        assert_eq!(worker.add("likes", 1).await, want);
        assert_eq!(worker.read("likes").await, want);
        if began.elapsed() > Duration::from_millis(2_500) {
            break;
        }
    }
    cluster.etcd.thaw();
    // The lease may have expired meanwhile; then the key is created again.
    node.until_ready_shows(200, "ok").await;
    let began = Instant::now();
    // This is one read: the old key may still be there now and gone a moment later.
    let now = loop {
        if let Some(key) = cluster.key(node.me.store).await {
            break key.created;
        }
        assert!(began.elapsed() < Duration::from_secs(10), "not registered again");
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    assert!(now >= created);
}

/// etcd was restored from a backup, or is another one. A running node reports it, goes on with its
/// last knowledge, and writes nothing to it: a registration there would claim what others may hold.
#[tokio::test(flavor = "multi_thread")]
async fn an_etcd_whose_history_went_back_is_not_followed() {
    let mut cluster = Cluster::start(1).await;
    let node = cluster.node("a").await;
    cluster.place(&[&node]).await;
    let mut worker = Worker::connect(&node, 7).await;
    assert_eq!(worker.add("likes", 1).await, 1);
    cluster.etcd.replace_by_empty().await;
    node.until_ready_shows(503, "etcd-went-back").await;
    assert_eq!(worker.add("likes", 1).await, 2);
    assert_eq!(worker.read("likes").await, 2);
    cluster.metastore = metastore_of(&cluster.etcd).await;
    assert_eq!(cluster.key(node.me.store).await, None);
}

/// A process that was stopped for longer than its lease lives goes on as the same boot.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_stood_still_registers_again() {
    let cluster = Cluster::start(1).await;
    let node = cluster.node("a").await;
    cluster.place(&[&node]).await;
    let mut worker = Worker::connect(&node, 7).await;
    assert_eq!(worker.add("likes", 1).await, 1);
    node.signal(Signal::STOP);
    let began = Instant::now();
    while cluster.key(node.me.store).await.is_some() {
        assert!(began.elapsed() < Duration::from_secs(10), "its lease does not end");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    node.signal(Signal::CONT);
    assert_eq!(worker.add("likes", 1).await, 2);
    let mut node = node;
    cluster.registered(&mut node, 0).await;
    assert_eq!(node.me.boot.0, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn refusals_name_what_is_wrong() {
    let cluster = Cluster::start(1).await;
    let node = cluster.node("a").await;
    let mut worker = Worker::connect(&node, 7).await;
    worker.next_batch();
    assert_eq!(worker.send_add("likes", 1).await, BatchReply::Refused(Refusal::NoSuchShard));
    let (status, text) = node.page("/metrics").await.expect("metrics");
    assert_eq!(status, 200);
    assert!(text.contains(r#"dkc_refusals_total{reason="no-such-shard"} 1"#), "{text}");
    assert!(text.contains("dkc_fsync_seconds_count"), "{text}");
}

/// These 16 are the contract: names that dashboards, alerts and tests read. There are more.
#[tokio::test(flavor = "multi_thread")]
async fn metrics_have_the_names_of_the_contract() {
    let cluster = Cluster::start(1).await;
    let (leader, follower) = (cluster.node("a").await, cluster.node("b").await);
    cluster.place(&[&leader, &follower]).await;
    let mut worker = Worker::connect(&leader, 7).await;
    assert_eq!(worker.add("likes", 1).await, 1);
    let began = Instant::now();
    // The metrics are updated at intervals.
    let families = loop {
        let (_, page) = leader.page("/metrics").await.expect("metrics");
        let families = exposition::parse(&page).expect("a page that Prometheus takes");
        if families.contains_key("dkc_lag_entries") {
            break families;
        }
        assert!(began.elapsed() < Duration::from_secs(10), "{page}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    for (name, kind, labels) in [
        ("dkc_batches_total", "counter", &[][..]),
        ("dkc_commit_seconds", "histogram", &["le"]),
        ("dkc_fsync_seconds", "histogram", &["le"]),
        ("dkc_in_sync_replicas", "gauge", &["shard"]),
        ("dkc_lag_entries", "gauge", &["node", "shard"]),
        ("dkc_epoch", "gauge", &["shard"]),
        ("dkc_refusals_total", "counter", &["reason"]),
        ("dkc_frozen_shards", "gauge", &[]),
        ("dkc_digest_mismatches_total", "counter", &[]),
        ("dkc_durability_violations_total", "counter", &[]),
        ("dkc_scrubs_total", "counter", &[]),
        ("dkc_scrub_damages_total", "counter", &[]),
        ("dkc_scrub_ended_seconds", "gauge", &[]),
        ("dkc_damaged_copies", "gauge", &[]),
        ("dkc_disk_free_bytes", "gauge", &[]),
        ("dkc_disk_reserve_bytes", "gauge", &[]),
    ] {
        let family = families.get(name).unwrap_or_else(|| panic!("no {name}"));
        let got: Vec<_> = family.labels.iter().map(String::as_str).collect();
        assert_eq!((family.kind.as_str(), got.as_slice()), (kind, labels), "{name}");
        assert!(!family.samples.is_empty(), "{name} has no value");
    }
    assert_eq!(families["dkc_lag_entries"].samples.len(), 1);
    assert!(families["dkc_lag_entries"].samples.keys().all(|key| key.contains("node=\"b\"")));
}

/// A process of another cluster, or of a newer build, is refused before any of its messages counts.
#[tokio::test(flavor = "multi_thread")]
async fn strangers_are_refused() {
    let cluster = Cluster::start(1).await;
    let node = cluster.node("a").await;
    let client = GatewayClient::connect(format!("http://{}", node.address)).await;
    let mut client = client.expect("the node listens");
    let stranger = tokio_stream::once(wire::ToNode::opening(99));
    let refused = client.session(stranger).await.expect_err("another cluster");
    assert_eq!(refused.code(), tonic::Code::FailedPrecondition);
    assert!(refused.message().contains("cluster"), "{refused}");
    let newer = wire::Open { version: proto::VERSION + 1, ..wire::Open::new(CLUSTER_ID, 0) };
    let newer = tokio_stream::once(wire::ToNode { kind: Some(to_node::Kind::Open(newer)) });
    let refused = client.session(newer).await.expect_err("a newer version");
    assert_eq!(refused.code(), tonic::Code::FailedPrecondition);
    assert!(refused.message().contains("uses message version 2"), "{refused}");
    let silent = tokio_stream::once(wire::ToNode { kind: None });
    let refused = client.session(silent).await.expect_err("no opening");
    assert_eq!(refused.code(), tonic::Code::FailedPrecondition);
}
