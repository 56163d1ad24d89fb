//! Two nodes: nothing acknowledged is lost with one of them, and a dead one is noticed at once.

use std::time::{Duration, Instant};

use engine::message::{BatchReply, Refusal, RoleStatus};
use engine::shard_record;
use rustix::process::Signal;

use crate::harness::{Cluster, Node};
use crate::worker::Worker;

/// Waits until the node's replica has applied all that the other one has.
pub(crate) async fn caught_up(node: &Node, with: &Node) {
    let began = Instant::now();
    loop {
        let (own, other) = (node.replica().await, with.replica().await);
        let applied = |replica: &Option<engine::message::ReplicaStatus>| {
            replica.as_ref().map(|replica| replica.applied)
        };
        if own.is_some() && applied(&own) == applied(&other) {
            return;
        }
        assert!(began.elapsed() < Duration::from_secs(20), "{own:?} {other:?}\n{}", node.log());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_promoted_follower_has_everything_and_counts_nothing_twice() {
    let cluster = Cluster::start(2).await;
    let (mut a, b) = (cluster.node("a").await, cluster.node("b").await);
    cluster.place(&[&a, &b]).await;
    let mut worker = Worker::connect(&a, 7).await;
    for want in 1..=100 {
        assert_eq!(worker.add("likes", 1).await, want);
    }
    a.kill();
    cluster.promote(&b).await;
    worker.reconnect(&b).await;
    // Two must be in sync and one is there: its barrier can't be committed. A batch may arrive
    // before the node reports that it is frozen: then it is ordered and not answered. The same
    // bytes sent again show nothing of that.
    worker.next_batch();
    worker.post_add("likes", 1);
    worker.until_frozen().await;
    assert_eq!(worker.try_read("likes").await, Err(Refusal::Frozen));
    assert_eq!(worker.send_add("likes", 1).await, BatchReply::Refused(Refusal::Frozen));

    let a = cluster.node("a").await;
    assert_eq!(worker.add_again("likes", 1).await, 101);
    assert_eq!(worker.add("likes", 1).await, 102);
    assert_eq!(worker.read("likes").await, 102);
    caught_up(&a, &b).await;
}

/// A rolling restart waits until the last node is ready.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_was_away_is_ready_once_its_copies_are_in_sync() {
    let cluster = Cluster::start(1).await;
    let (a, mut b) = (cluster.node("a").await, cluster.node("b").await);
    b.until_ready_shows(200, "ok").await;
    cluster.place(&[&a, &b]).await;
    let mut worker = Worker::connect(&a, 7).await;
    assert_eq!(worker.add("likes", 1).await, 1);

    // The primary is paused. So the copy may be behind, whether it is still in the in-sync set or
    // not.
    for has_left in [false, true] {
        b.kill();
        if has_left {
            assert_eq!(worker.add("likes", 1).await, 2);
            cluster.until_shard("without b", |shard| shard.isr == [a.me.store]).await;
        }
        a.signal(Signal::STOP);
        b = cluster.node("b").await;
        b.until_ready_shows(503, "catching up: 1 of 1 copies").await;
        a.signal(Signal::CONT);
        until_ready(&cluster, &b).await;
        assert!(cluster.shard().await.record.isr.contains(&b.me.store), "left: {has_left}");
    }
}

/// Waits until a node is ready. Meanwhile it is recruited whenever it is not in sync, as a
/// coordinator does.
async fn until_ready(cluster: &Cluster, node: &Node) {
    let (store, began) = (node.me.store, Instant::now());
    while node.page("/readyz").await != Some((200, "ok\n".to_owned())) {
        assert!(began.elapsed() < Duration::from_secs(20), "not ready:\n{}", node.log());
        let shard = cluster.shard().await.record;
        if !shard.isr.contains(&store) && !shard.learners.contains(&store) {
            cluster.change(|shard| shard_record::insert(&mut shard.learners, store)).await;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// A killed follower leaves the in-sync set long before the second after which a silent one is
/// removed, and comes back as a learner that has caught up.
#[tokio::test(flavor = "multi_thread")]
async fn a_killed_follower_is_noticed_at_once_and_comes_back() {
    let cluster = Cluster::start(1).await;
    let (a, mut b) = (cluster.node("a").await, cluster.node("b").await);
    cluster.place(&[&a, &b]).await;
    let mut worker = Worker::connect(&a, 7).await;
    assert_eq!(worker.add("likes", 1).await, 1);
    let stopped = Instant::now();
    b.kill();
    assert_eq!(worker.add("likes", 1).await, 2);
    let waited = stopped.elapsed();
    assert!(waited < Duration::from_millis(700), "{waited:?}\n{}", a.log());
    cluster.until_shard("without b", |shard| shard.isr == [a.me.store]).await;

    let b = cluster.node("b").await;
    cluster.change(|record| shard_record::insert(&mut record.learners, b.me.store)).await;
    cluster.until_shard("in sync", |shard| shard.isr.len() == 2).await;
    assert_eq!(worker.add("likes", 1).await, 3);
    caught_up(&b, &a).await;
}

/// A paused follower is removed after a second; when it resumes it is added again.
#[tokio::test(flavor = "multi_thread")]
async fn a_paused_follower_is_removed_and_added_again() {
    let cluster = Cluster::start(1).await;
    let (a, b) = (cluster.node("a").await, cluster.node("b").await);
    cluster.place(&[&a, &b]).await;
    let mut worker = Worker::connect(&a, 7).await;
    assert_eq!(worker.add("likes", 1).await, 1);
    b.signal(Signal::STOP);
    assert_eq!(worker.add("likes", 1).await, 2);
    cluster.until_shard("without b", |shard| shard.isr == [a.me.store]).await;
    b.signal(Signal::CONT);
    cluster.change(|record| shard_record::insert(&mut record.learners, b.me.store)).await;
    cluster.until_shard("in sync", |shard| shard.isr.len() == 2).await;
    caught_up(&b, &a).await;
}

/// A node without the data, when the log no longer reaches back: a snapshot is sent, installed, and
/// promoted.
#[tokio::test(flavor = "multi_thread")]
async fn a_learner_is_filled_by_a_snapshot() {
    fills_by_snapshot(&[]).await;
}

/// The same with snapshot parts that are larger than HTTP/2's windows.
#[tokio::test(flavor = "multi_thread")]
async fn a_copy_passes_through_windows_smaller_than_its_parts() {
    fills_by_snapshot(&[("DKC_STREAM_WINDOW_BYTES", "65535"), ("DKC_COPY_RATE", "1")]).await;
}

/// The same with the largest windows and rate.
#[tokio::test(flavor = "multi_thread")]
async fn a_copy_passes_through_the_largest_windows() {
    let most = ((1 << 30) - 1).to_string();
    fills_by_snapshot(&[("DKC_STREAM_WINDOW_BYTES", &most), ("DKC_COPY_RATE", "100000")]).await;
}

/// Returns a long name for each number, which hardly compresses.
fn name(number: i64) -> String {
    let mut random = number.unsigned_abs() + 1;
    let mut word = |_| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        format!("{:08x}", random >> 32)
    };
    (0..112).map(&mut word).collect()
}

async fn fills_by_snapshot(limits: &[(&str, &str)]) {
    let cluster = Cluster::start(1).await;
    let flush = [("DKC_FLUSH_AFTER_MS", "30"), ("DKC_LOG_KEEP_BYTES", "0")];
    let flush = [&flush[..], limits].concat();
    let mut a = cluster.node_with("a", &flush).await;
    cluster.place(&[&a]).await;
    let mut worker = Worker::connect(&a, 7).await;
    for number in 0..300 {
        assert_eq!(worker.add(&name(number), number).await, number.into());
    }
    // The log must no longer reach back to the beginning, however busy the machine is.
    let first = cluster.folder("a").join("log").join(format!("{:020}.log", 1));
    let began = Instant::now();
    while first.exists() {
        assert!(began.elapsed() < Duration::from_secs(20), "the log is not trimmed:\n{}", a.log());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    // The node is restarted, so that only the log above the flush is in memory.
    assert_eq!(a.stop().await, Some(0));
    let a = cluster.node_with("a", &flush).await;
    cluster.promote(&a).await;
    worker.reconnect(&a).await;
    assert_eq!(worker.add("likes", 1).await, 1);

    let b = cluster.node_with("b", limits).await;
    cluster.change(|record| shard_record::insert(&mut record.learners, b.me.store)).await;
    cluster.until_shard("in sync", |shard| shard.isr.len() == 2).await;
    assert!(b.log().contains("snapshot received"), "it was filled from the log:\n{}", b.log());
    caught_up(&b, &a).await;

    let mut a = a;
    a.kill();
    cluster
        .change(|record| {
            record.epoch.0 += 1;
            record.primary = b.me;
            record.isr = vec![b.me.store];
        })
        .await;
    worker.reconnect(&b).await;
    assert_eq!(worker.add_again("likes", 1).await, 1);
    for number in [0, 1, 150, 299] {
        assert_eq!(worker.read(&name(number)).await, i128::from(number));
    }
    let replica = b.replica().await.expect("a replica");
    assert!(matches!(replica.role, RoleStatus::Primary { open: true, .. }), "{replica:?}");
}
