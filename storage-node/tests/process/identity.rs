//! A store is one process at a time, on the disk that it last ran on.

use std::time::{Duration, Instant};

use engine::ids::{Epoch, Slots, Version};
use engine::records::{NodeRecord, StoreRecord, StoreStatus};
use engine::shard_record::ShardRecord;
use metastore::{BootGuard, CasOutcome, HeldKey, LeaseEvent, LeaseSettings, Revisioned};
use rustix::process::Signal;

use crate::calls::{Calls, Fate};
use crate::etcd::Etcd;
use crate::harness::{Cluster, Node, copy_folder, meta, metastore_of};

#[tokio::test(flavor = "multi_thread")]
async fn one_process_per_folder() {
    let cluster = Cluster::start(1).await;
    let _first = cluster.node("a").await;
    let mut second = cluster.spawn("a");
    second.refuses(4, "in use by another process").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_of_a_running_node_is_refused() {
    let cluster = Cluster::start(1).await;
    let mut node = cluster.node("a").await;
    let folder = cluster.folder("copy");
    copy_folder(&cluster.folder("a"), &folder);
    let mut copy = cluster.spawn_with("a", &folder, &[]);
    copy.refuses(4, "it answers a probe").await;
    // The original is not affected.
    cluster.registered(&mut node, 0).await;
    assert_eq!(node.me.boot.0, 1);
}

/// All keys may vanish from etcd though every process is well: a missing key proves nothing, an
/// answer does.
#[tokio::test(flavor = "multi_thread")]
async fn a_copy_of_a_running_node_is_refused_though_its_key_is_gone() {
    let cluster = Cluster::start(1).await;
    let node = cluster.node("a").await;
    let folder = cluster.folder("copy");
    copy_folder(&cluster.folder("a"), &folder);
    let key = cluster.key(node.me.store).await.expect("it is registered");
    let gone = cluster.metastore.delete::<NodeRecord>(&node.me.store, key.modified).await;
    assert!(matches!(gone, Ok(CasOutcome::Done { .. })), "{gone:?}");
    let mut copy = cluster.spawn_with("a", &folder, &[]);
    copy.refuses(4, "it answers a probe").await;
    let kept = cluster.store("a").await.expect("its record");
    assert_eq!(kept.record.boot.0, 1, "the copy has claimed nothing");
}

/// The copy starts first, while the original is down; then the original's nonce is outdated.
#[tokio::test(flavor = "multi_thread")]
async fn of_a_folder_and_its_copy_the_first_to_start_goes_on() {
    let cluster = Cluster::start(1).await;
    let mut node = cluster.node("a").await;
    assert_eq!(node.stop().await, Some(0));
    let folder = cluster.folder("copy");
    copy_folder(&cluster.folder("a"), &folder);
    let mut copy = cluster.spawn_with("a", &folder, &[]);
    cluster.registered(&mut copy, 1).await;
    assert_eq!(copy.stop().await, Some(0));
    let mut original = cluster.spawn("a");
    original.refuses(4, "rolled back").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_was_rolled_back_is_refused() {
    let cluster = Cluster::start(1).await;
    let mut node = cluster.node("a").await;
    assert_eq!(node.stop().await, Some(0));
    let backup = cluster.folder("backup");
    copy_folder(&cluster.folder("a"), &backup);
    let mut node = cluster.node("a").await;
    assert_eq!(node.stop().await, Some(0));
    std::fs::remove_dir_all(cluster.folder("a")).expect("its own folder");
    copy_folder(&backup, &cluster.folder("a"));
    let mut rolled_back = cluster.spawn("a");
    rolled_back.refuses(4, "rolled back").await;
}

/// The start waits until the lease of the previous boot has expired, not listening meanwhile, and
/// shows the reason.
#[tokio::test(flavor = "multi_thread")]
async fn a_killed_node_comes_back_when_its_lease_has_ended() {
    let cluster = Cluster::start(1).await;
    let long = [("DKC_LEASE_TTL", "3")];
    let mut node = cluster.node_with("a", &long).await;
    node.kill();
    let killed = Instant::now();
    let mut again = cluster.spawn_with("a", &cluster.folder("a"), &long);
    again.until_ready_shows(503, "identity").await;
    cluster.registered(&mut again, 1).await;
    let back = killed.elapsed();
    assert!(
        back < Duration::from_secs(3 + 2),
        "TTL + 1 s and a recovery of next to nothing: {back:?}"
    );
    again.until_ready_shows(200, "ok").await;
}

/// The process is paused, so it answers no probe, and its lease expires: another process may take
/// its place on a copy of the disk. When the old one resumes it must end.
#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_was_replaced_while_it_slept_ends() {
    let cluster = Cluster::start(1).await;
    let mut node = cluster.node("a").await;
    node.signal(Signal::STOP);
    let folder = cluster.folder("copy");
    copy_folder(&cluster.folder("a"), &folder);
    let mut copy = cluster.spawn_with("a", &folder, &[]);
    cluster.registered(&mut copy, 1).await;
    node.signal(Signal::CONT);
    node.refuses(4, "has begun elsewhere").await;
    cluster.registered(&mut copy, 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_is_one_store() {
    let cluster = Cluster::start(1).await;
    let mut node = cluster.node("a").await;
    let folder = cluster.folder("new");
    let mut other = cluster.spawn_with("a", &folder, &[]);
    other.refuses(4, "choose another --name").await;
    node.kill();
    // The store is only away, and perhaps its disk is not mounted: taking its name needs
    // `--replace` with this name.
    for more in [&[][..], &[("DKC_REPLACE", "b")]] {
        let mut stranger = cluster.spawn_with("a", &cluster.folder("newer"), more);
        stranger.refuses(4, "start with --replace").await;
    }
    let replaces = [("DKC_REPLACE", "b,a")];
    let new_node = cluster.spawn_with("a", &cluster.folder("newer"), &replaces);
    new_node.until_ready_shows(200, "ok").await;
}

/// Two machines have one name, and both wait for the cluster to be created: then they start at the
/// same moment.
#[tokio::test(flavor = "multi_thread")]
async fn of_two_nodes_that_start_at_once_one_gets_the_name() {
    let etcd = Etcd::start().await;
    let folders = tempfile::tempdir().expect("a temporary folder");
    // `--replace` applies to a store that is away, not to one that starts too.
    let replaces = [("DKC_REPLACE", "*")];
    let spawn =
        |folder: &str| Node::spawn(&etcd.endpoint(), "a", &folders.path().join(folder), &replaces);
    let (mut one, mut other) = (spawn("one"), spawn("other"));
    for node in [&one, &other] {
        node.until_ready_shows(503, "meta").await;
    }
    let metastore = metastore_of(&etcd).await;
    let made = metastore.create(&(), &meta(1)).await;
    assert!(matches!(made, Ok(CasOutcome::Done { .. })), "{made:?}");
    let (refused, serves) = tokio::select! {
        _ = one.ended() => (&mut one, &mut other),
        _ = other.ended() => (&mut other, &mut one),
    };
    refused.refuses(4, "the name \"a\" belongs to store").await;
    serves.until_ready_shows(200, "ok").await;
    let stores = metastore.list::<StoreRecord>().await.expect("etcd answers").all;
    assert_eq!(stores.len(), 1, "the other one has claimed nothing: {stores:?}");
}

/// Two data volumes were swapped: each holds the store of another name.
#[tokio::test(flavor = "multi_thread")]
async fn a_store_does_not_take_the_name_of_another_that_is_away() {
    let cluster = Cluster::start(1).await;
    let mut a = cluster.node("a").await;
    let mut b = cluster.node("b").await;
    assert_eq!((a.stop().await, b.stop().await), (Some(0), Some(0)));
    let mut swapped = cluster.spawn_with("a", &cluster.folder("b"), &[]);
    swapped.refuses(4, "holds the store of \"b\"").await;
    cluster.node("a").await;
}

/// With its disk back a store runs again if a shard still relies on its content.
#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_was_given_up_is_taken_back_while_a_shard_counts_on_it() {
    let cluster = Cluster::start(1).await;
    let mut node = cluster.node("a").await;
    assert_eq!(node.stop().await, Some(0));
    let kept = cluster.store("a").await.expect("its record");
    let shard = ShardRecord {
        slots: Slots { lo: 0, hi: 65_535 },
        epoch: Epoch(1),
        version: Version(1),
        isr: vec![kept.id],
        ..ShardRecord::default()
    };
    let made = cluster.metastore.create(&shard.shard(), &shard).await;
    assert!(matches!(made, Ok(CasOutcome::Done { .. })), "{made:?}");
    let lost = StoreRecord { status: StoreStatus::Lost, ..kept.record };
    let noted = cluster.metastore.replace(&kept.id, &lost, kept.modified).await;
    assert!(matches!(noted, Ok(CasOutcome::Done { .. })), "{noted:?}");
    cluster.node("a").await;
    let status = cluster.store("a").await.expect("its record").record.status;
    assert_eq!(status, StoreStatus::Active);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_was_given_up_is_refused() {
    let cluster = Cluster::start(1).await;
    let mut node = cluster.node("a").await;
    assert_eq!(node.stop().await, Some(0));
    let kept = cluster.store("a").await.expect("its record");
    let lost = StoreRecord { status: StoreStatus::Lost, ..kept.record };
    let noted = cluster.metastore.replace(&kept.id, &lost, kept.modified).await;
    assert!(matches!(noted, Ok(CasOutcome::Done { .. })), "{noted:?}");
    cluster.spawn("a").refuses(4, "given up").await;
}

/// The reason why a start waits is in `/readyz`, and the start goes on by itself.
#[tokio::test(flavor = "multi_thread")]
async fn a_start_waits_for_etcd_and_for_the_cluster() {
    let mut etcd = Etcd::not_running();
    let folders = tempfile::tempdir().expect("a temporary folder");
    let node = Node::spawn(&etcd.endpoint(), "a", &folders.path().join("a"), &[]);
    node.until_ready_shows(503, "etcd").await;
    etcd.run().await;
    node.until_ready_shows(503, "meta").await;
    let made = metastore_of(&etcd).await.create(&(), &meta(1)).await;
    assert!(matches!(made, Ok(CasOutcome::Done { .. })), "{made:?}");
    node.until_ready_shows(200, "ok").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_of_another_cluster_is_refused() {
    let (one, other) = (Cluster::start(1).await, Etcd::start().await);
    let mut node = one.node("a").await;
    assert_eq!(node.stop().await, Some(0));
    let another = engine::records::Meta { cluster: 0xC2, ..meta(1) };
    let made = metastore_of(&other).await.create(&(), &another).await;
    assert!(matches!(made, Ok(CasOutcome::Done { .. })), "{made:?}");
    // `--check-config` sees this, and starts nothing.
    let owner = storage_node::inspect::owner(&one.folder("a")).expect("it can be read");
    assert_eq!(owner.map(|owner| owner.cluster), Some(meta(1).cluster));
    let mut stray = Node::spawn(&other.endpoint(), "a", &one.folder("a"), &[]);
    stray.refuses(4, "belongs to cluster").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn senseless_options_are_a_usage_error() {
    let folders = tempfile::tempdir().expect("a temporary folder");
    let folder = folders.path().join("a");
    for (flag, value, why) in [
        ("DKC_MEMORY_BYTES", "1000", "--memory-bytes"),
        ("DKC_LISTEN", "0.0.0.0:0", "--advertise"),
        ("DKC_CLUSTER", "a/b", "--cluster"),
    ] {
        Node::spawn("127.0.0.1:1", "a", &folder, &[(flag, value)]).refuses(2, why).await;
    }
}

/// Waiting does not help, so a supervisor is to see an exit code.
#[tokio::test(flavor = "multi_thread")]
async fn an_etcd_that_is_too_old_is_refused() {
    let cluster = Cluster::start(1).await;
    let calls = Calls::start(cluster.etcd.endpoint()).await;
    calls.next("Status", Fate::ReplyVersion("3.4.27"));
    let etcd = [("DKC_ETCD", &*calls.endpoint())];
    let mut node = cluster.spawn_with("a", &cluster.folder("a"), &etcd);
    node.refuses(2, "3.4.27 is too old").await;
}

/// Any call of a start may be lost, on the way to etcd or on the way back: the node becomes one
/// store and serves.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_starts_whichever_call_of_etcd_is_lost() {
    for fate in [Fate::LoseCall, Fate::LoseAnswer] {
        let cluster = Cluster::start(1).await;
        let calls = Calls::start(cluster.etcd.endpoint()).await;
        for method in ["Status", "Txn", "LeaseGrant", "LeaseKeepAlive", "Watch"] {
            calls.next(method, fate);
        }
        // Every second read is lost, so that each of several consecutive reads is lost once.
        for _ in 0..8 {
            calls.next("Range", Fate::Pass);
            calls.next("Range", fate);
        }
        let etcd = [("DKC_ETCD", &*calls.endpoint())];
        let node = cluster.node_with("a", &etcd).await;
        node.until_ready_shows(200, "ok").await;
        calls.happened().await;
        let stores = cluster.metastore.list::<StoreRecord>().await.expect("etcd answers").all;
        let known: Vec<_> = stores.iter().map(|kept| (kept.id, kept.record.boot)).collect();
        assert_eq!(known, [(node.me.store, node.me.boot)], "{fate:?}");
    }
}

/// A start that etcd refuses ends too, since waiting does not help.
#[tokio::test(flavor = "multi_thread")]
async fn a_start_that_etcd_refuses_ends() {
    for (method, before, code, why) in [
        ("Range", 0, 2, "--etcd: etcd refused"),
        ("Range", 1, 2, "--etcd: etcd refused"),
        ("Range", 2, 1, "etcd: etcd refused"),
        ("Txn", 0, 1, "etcd refuses this store's record"),
    ] {
        let cluster = Cluster::start(1).await;
        let calls = Calls::start(cluster.etcd.endpoint()).await;
        (0..before).for_each(|_| calls.next(method, Fate::Pass));
        calls.next(method, Fate::Refuse);
        let etcd = [("DKC_ETCD", &*calls.endpoint())];
        cluster.spawn_with("a", &cluster.folder("a"), &etcd).refuses(code, why).await;
    }
}

/// The holder of the key answers no probe: it may hang, or the network may be cut. The renewed
/// lease proves that it lives.
#[tokio::test(flavor = "multi_thread")]
async fn a_store_whose_lease_is_renewed_is_refused() {
    let cluster = Cluster::start(1).await;
    let mut node = cluster.node("a").await;
    assert_eq!(node.stop().await, Some(0));
    let Revisioned { id: store, record, .. } = cluster.store("a").await.expect("its record");
    let guard = BootGuard { store, boot: record.boot, nonce: record.nonce };
    let address = "127.0.0.1:1".to_owned();
    let key = NodeRecord { boot: record.boot, address, capacity: 1, versions: (1, 1) };
    let settings = LeaseSettings { ttl_s: 2, ..LeaseSettings::default() };
    let mut lease = cluster.metastore.hold(vec![HeldKey::node(&key, guard)], settings);
    while !matches!(lease.next().await, Some(LeaseEvent::Registered { .. })) {}
    tokio::spawn(async move { while lease.next().await.is_some() {} });
    cluster.spawn("a").refuses(4, "its lease is renewed").await;
    let kept = cluster.store("a").await.expect("its record");
    assert_eq!(kept.record.boot, record.boot, "the other one has claimed nothing");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_that_is_taken_is_a_setting_to_be_changed() {
    let cluster = Cluster::start(1).await;
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = taken.local_addr().expect("it is bound").to_string();
    for flag in ["DKC_LISTEN", "DKC_METRICS"] {
        let mut node = cluster.spawn_with("a", &cluster.folder(flag), &[(flag, &address)]);
        node.refuses(2, &address).await;
    }
}
