//! A disk that fails or corrupts data ends the process, or its copies; never the numbers.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use engine::records::StoreStatus;
use engine::shard_record;

use crate::harness::{Cluster, Node};
use crate::power;
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

/// One acknowledged byte has changed: this disk can't be trusted any more, and a copy of another
/// node replaces its own.
#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_store_is_suspect_and_filled_again() {
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
    cluster.change(|record| shard_record::insert(&mut record.learners, b.me.store)).await;
    cluster.until_shard("in sync", |shard| shard.isr.len() == 2).await;
    caught_up(&b, &a).await;
    assert!(b.log().contains("snapshot received"), "{}", b.log());

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
    assert_eq!(worker.add_again("likes", 1).await, 50);
    assert_eq!(worker.read("likes").await, 50);
}

/// The log can't be written any more: the exit code is 5, the store is recorded as suspect, and the
/// others have what was acknowledged before.
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

/// A disk whose syncs the test delays and fails.
struct IllDisk {
    faults: PathBuf,
    shim: PathBuf,
    remembered: power::ShadowedDisk,
}

impl IllDisk {
    fn of(cluster: &Cluster, name: &str) -> Self {
        let folder = cluster.folder("ill");
        fs::create_dir_all(&folder).expect("a temporary folder");
        let shim = power::build_shim(&folder).expect("a C compiler");
        let root = cluster.folder(name).display().to_string();
        let remembered =
            power::ShadowedDisk { root, shadow: folder.join("shadow"), kept: folder.join("kept") };
        let disk = Self { faults: folder.join("faults"), shim, remembered };
        disk.is(0, 0);
        disk
    }

    /// From now on each sync takes this long, and so many of the next ones fail with EIO.
    fn is(&self, sync_ms: u32, fails: u32) {
        let words = [sync_ms, sync_ms, fails];
        let bytes: Vec<u8> = words.into_iter().flat_map(u32::to_le_bytes).collect();
        // The file is written in place: the process has it mapped.
        let file = fs::File::options().write(true).create(true).truncate(false).open(&self.faults);
        file.and_then(|file| file.write_all_at(&bytes, 0)).expect("a temporary file");
    }

    fn environment(&self) -> Vec<(&str, &str)> {
        let Self { faults, shim, remembered } = self;
        let paths = [
            ("LD_PRELOAD", shim.as_path()),
            ("DKC_DISK_FAULTS", faults),
            ("DKC_DISK_ROOT", Path::new(&remembered.root)),
            ("DKC_DISK_SHADOW", &remembered.shadow),
            ("DKC_DISK_KEPT", &remembered.kept),
        ];
        paths.map(|(name, path)| (name, path.to_str().expect("a plain path"))).to_vec()
    }
}

/// The process answers and its network works, but it can't acknowledge anything. No peer reports
/// it: the lease that is no longer renewed is the coordinator's only sign.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_whose_disk_has_stalled_lets_its_lease_run_out() {
    let cluster = Cluster::start(1).await;
    let disk = IllDisk::of(&cluster, "a");
    let node = cluster.node_with("a", &disk.environment()).await;
    cluster.place(&[&node]).await;
    let mut worker = Worker::connect(&node, 7).await;
    assert_eq!(worker.add("likes", 1).await, 1);
    disk.is(60_000, 0);
    worker.next_batch();
    worker.post_add("likes", 1);
    let began = Instant::now();
    while cluster.key(node.me.store).await.is_some() {
        assert!(began.elapsed() < Duration::from_secs(10), "it is renewed:\n{}", node.log());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// After a failed fsync the content of the disk is unknown: nothing more is acknowledged, and no
/// copy of this disk is trusted until it was compared or filled.
#[tokio::test(flavor = "multi_thread")]
async fn one_sync_that_fails_ends_the_process_and_its_copies_trust() {
    let cluster = Cluster::start(1).await;
    let disk = IllDisk::of(&cluster, "a");
    let mut node = cluster.node_with("a", &disk.environment()).await;
    cluster.place(&[&node]).await;
    let mut worker = Worker::connect(&node, 7).await;
    assert_eq!(worker.add("likes", 1).await, 1);
    disk.is(0, 1);
    worker.next_batch();
    worker.post_add("likes", 1);
    node.refuses(5, "append to").await;
    assert_eq!(status_of(&cluster, &node).await, StoreStatus::Suspect, "{}", node.log());
}

/// A gateway that sends requests and does not read is cut off; others don't notice. The messages to
/// it are bounded, so it reaches the end of the stream once it reads again.
#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_that_does_not_read_is_cut_off() {
    let cluster = Cluster::start(1).await;
    let node = cluster.node("a").await;
    cluster.place(&[&node]).await;
    let mut worker = Worker::connect(&node, 7).await;
    assert_eq!(worker.add("likes", 1).await, 1);
    let mut deaf = Worker::connect(&node, 8).await;
    let (mut asked, began) = (0, Instant::now());
    loop {
        // This is more than a queue and all windows hold. The requests may wait here for as long as
        // the node needs.
        if asked < 500_000 {
            for _ in 0..5_000 {
                deaf.post_read("likes");
            }
            asked += 5_000;
        }
        assert_eq!(worker.read("likes").await, 1, "others are served meanwhile");
        let (_, metrics) = node.page("/metrics").await.expect("metrics");
        // On a busy machine its missed pings may be noticed before its queue is full.
        if metrics.contains("dkc_connections_closed_full_total 1") || deaf.is_cut_off() {
            break;
        }
        assert!(began.elapsed() < Duration::from_secs(60), "it was never cut off: {metrics}");
    }
    let mut heard = 0;
    while deaf.try_reply().await.is_some() {
        heard += 1;
    }
    assert!(heard < asked, "{heard} of {asked}");
    assert_eq!(worker.add("likes", 1).await, 2);
}
