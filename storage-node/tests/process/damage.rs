//! A disk that fails or lies ends the process, or its copies; never the numbers.

use std::fs;
use std::path::{Path, PathBuf};

use engine::config;
use engine::records::StoreStatus;

use crate::harness::{Cluster, Node};
use crate::replication::caught_up;
use crate::worker::Worker;

/// The log's segments, oldest first.
fn segments(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder.join("log")).expect("the log's folder");
    let paths = entries.map(|entry| entry.expect("an entry").path());
    let mut segments: Vec<_> =
        paths.filter(|path| path.extension() == Some("log".as_ref())).collect();
    segments.sort();
    segments
}

async fn status_of(cluster: &Cluster, node: &Node) -> StoreStatus {
    cluster.store(&node.name).await.expect("its record").record.status
}

/// One byte of what was acknowledged has changed: nobody may trust this disk, and another's copy takes its place.
#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_store_is_suspect_and_filled_anew() {
    let cluster = Cluster::start(1).await;
    let (a, mut b) = (cluster.node("a").await, cluster.node("b").await);
    cluster.place(&[&a, &b]).await;
    let mut worker = Worker::connect(&a, 7).await;
    for want in 1..=50 {
        assert_eq!(worker.add("likes", 1).await, want);
    }
    assert_eq!(b.stop().await, Some(0));
    let first = segments(&cluster.folder("b")).remove(0);
    let mut bytes = fs::read(&first).expect("a segment");
    let used = bytes.iter().rposition(|&byte| byte != 0).expect("it was written to");
    bytes[used / 2] ^= 1;
    fs::write(&first, bytes).expect("a segment");

    let b = cluster.node("b").await;
    assert_eq!(status_of(&cluster, &b).await, StoreStatus::Suspect, "{}", b.log());
    assert!(b.log().contains("damage found on the disk"), "{}", b.log());
    cluster.until_shard("without b", |shard| shard.isr == [a.me.store]).await;
    cluster.change(|config| config::insert(&mut config.learners, b.me.store)).await;
    cluster.until_shard("in sync", |shard| shard.isr.len() == 2).await;
    caught_up(&b, &a).await;
    assert!(b.log().contains("copy received"), "{}", b.log());

    let mut a = a;
    a.kill();
    cluster
        .change(|config| {
            config.epoch.0 += 1;
            config.primary = b.me;
            config.isr = vec![b.me.store];
        })
        .await;
    worker.reconnect(&b).await;
    assert_eq!(worker.add_again("likes", 1).await, 50);
    assert_eq!(worker.read("likes").await, 50);
}

/// The log can't be written any more: exit code 5, the store is noted as suspect, and what was acknowledged before is
/// with the others.
#[tokio::test(flavor = "multi_thread")]
async fn a_failed_disk_ends_the_process() {
    let cluster = Cluster::start(1).await;
    let mut node = cluster.node("a").await;
    cluster.place(&[&node]).await;
    let mut worker = Worker::connect(&node, 7).await;
    assert_eq!(worker.add("likes", 1).await, 1);
    // The next segment can't be made.
    fs::remove_dir_all(cluster.folder("a").join("log")).expect("its own folder");
    for number in 0..200 {
        worker.next_batch();
        worker.post_add(&format!("{}{number}", "x".repeat(1_000)), 1);
    }
    node.refuses(5, "disk:").await;
    assert_eq!(status_of(&cluster, &node).await, StoreStatus::Suspect, "{}", node.log());
}

/// A gateway that asks and does not read is cut off; others don't notice. What it is sent until then is bounded, so it
/// comes to the end of the stream once it reads again.
#[tokio::test(flavor = "multi_thread")]
async fn who_does_not_read_is_cut_off() {
    let cluster = Cluster::start(1).await;
    let node = cluster.node("a").await;
    cluster.place(&[&node]).await;
    let mut worker = Worker::connect(&node, 7).await;
    assert_eq!(worker.add("likes", 1).await, 1);
    let mut deaf = Worker::connect(&node, 8).await;
    let mut asked = 0;
    loop {
        for _ in 0..5_000 {
            deaf.post_read("likes");
        }
        asked += 5_000;
        assert_eq!(worker.read("likes").await, 1, "others are served meanwhile");
        let (_, metrics) = node.page("/metrics").await.expect("metrics");
        if metrics.contains("dkc_connections_closed_full_total 1") {
            break;
        }
        assert!(asked < 1_000_000, "it was never cut off: {metrics}");
    }
    let mut heard = 0;
    while deaf.try_reply().await.is_some() {
        heard += 1;
    }
    assert!(heard < asked, "{heard} of {asked}");
    assert_eq!(worker.add("likes", 1).await, 2);
}
