//! A relay between the gateway and etcd or a node: lost, delayed and silent messages.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use engine::ids::{Boot, Epoch, Slots, StoreId, Version};
use engine::records::{GatewayRecord, NodeRecord};
use engine::shard_record::ShardRecord;
use metastore::DrainIntent;

use crate::calls::{Calls, Fate};
use crate::cluster::{Cluster, led_by, meta, register, unregister, until};
use crate::node::{Mood, Node};

const INCREMENT: &str = "POST /v1/counters/ns/k/increment";

fn anywhere() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 0))
}

/// A watch does not report records that were deleted while it was closed: the list that follows
/// lacks them, and must replace the known records.
#[test]
fn records_that_were_deleted_while_etcd_was_unreachable_are_removed() {
    let mut cluster = Cluster::without_gateway(1);
    // The second node leads nothing. Its key has another address than the record of its store, and
    // nothing listens there: the node is queried at that address, and so is down, for as long as
    // the gateway has the key.
    cluster.nodes.push(Node::start(2, 1, anywhere(), vec![]));
    let (store, idle) = (cluster.store(), StoreId(2));
    let drains = cluster.block_on(async {
        register(&store, &cluster.nodes[1]).await;
        unregister(&store, idle).await;
        let address = "127.0.0.1:1".to_owned();
        let key = NodeRecord { boot: Boot(1), address, capacity: 1, versions: (1, 1) };
        store.create(&idle, &key).await.unwrap();
        store.create(&StoreId(1), &DrainIntent).await.unwrap();
        store.get::<DrainIntent>(&StoreId(1)).await.unwrap().unwrap()
    });
    let relay = cluster.relay(cluster.etcd.endpoint());
    cluster.start_gateway_with(|options| {
        options.cluster.etcd = vec![relay.endpoint()];
        // The gateway keeps its session.
        options.process.lease_ttl = 60;
    });
    cluster.ready();
    let mut client = cluster.client();
    let mut states = || {
        let nodes = client.get("/v1/cluster").json()["nodes"].clone();
        let state = |node: &serde_json::Value| node["state"].as_str().unwrap().to_owned();
        nodes.as_array().unwrap().iter().map(state).collect::<Vec<_>>().join(" ")
    };
    until("both nodes are known", || states() == "draining down");
    relay.close();
    cluster.block_on(async {
        unregister(&store, idle).await;
        store.delete::<DrainIntent>(&StoreId(1), drains.modified).await.unwrap();
    });
    relay.mend();
    until("the lists that lack them are applied", || states() == "up up");
}

/// A gateway starts with a lease, a key for each worker, lists and watches. It must start, with one
/// session per worker, even if one of these calls or its answer is lost.
#[test]
fn a_gateway_starts_although_any_call_of_etcd_is_lost() {
    for method in ["LeaseGrant", "LeaseKeepAlive", "Txn", "Range", "Watch"] {
        for fate in [Fate::LoseCall, Fate::LoseAnswer] {
            let mut cluster = Cluster::without_gateway(1);
            let store = cluster.store();
            let calls = cluster.block_on(Calls::start(cluster.etcd.endpoint()));
            calls.next(method, fate);
            cluster.start_gateway_with(|options| options.cluster.etcd = vec![calls.endpoint()]);
            cluster.ready();
            for mut client in [cluster.client(), cluster.client()] {
                until("it writes", || client.call(INCREMENT, &[], b"").status == 200);
            }
            cluster.block_on(calls.happened());
            until("each worker has one session", || {
                let keys = cluster.block_on(store.list::<GatewayRecord>()).unwrap().all;
                let mut workers: Vec<_> = keys.iter().map(|kept| kept.record.worker).collect();
                workers.sort_unstable();
                workers == [0, 1]
            });
        }
    }
}

/// A watch opens long after its list was answered: a change between the two is not missed.
#[test]
fn a_watch_that_opens_late_misses_nothing() {
    const KINDS: usize = 6;
    let mut cluster = Cluster::without_gateway(2);
    let (store, shard) = (cluster.store(), Slots::ALL.shard());
    let calls = cluster.block_on(Calls::start(cluster.etcd.endpoint()));
    (0..KINDS).for_each(|_| calls.next("Watch", Fate::HoldCall));
    cluster.start_gateway_with(|options| options.cluster.etcd = vec![calls.endpoint()]);
    cluster.block_on(calls.holds(KINDS));
    cluster.block_on(async {
        let kept = store.get::<ShardRecord>(&shard).await.unwrap().unwrap();
        let (mut moved, to) = (kept.record, cluster.nodes[1].me);
        (moved.epoch, moved.version) = (Epoch(2), Version(2));
        (moved.primary, moved.isr) = (to, vec![to.store]);
        store.replace(&shard, &moved, kept.modified).await.unwrap();
    });
    calls.release();
    let mut client = cluster.client();
    until("it has the new primary", || {
        let page = client.get("/v1/cluster").json();
        page["shards"][0]["epoch"] == 2 && page["shards"][0]["primary"] == "node-2"
    });
}

/// The records in etcd do not change, and no packet arrives: only the missing answer to a ping
/// shows that the connection is dead.
#[test]
fn a_silent_connection_is_closed() {
    let mut cluster = Cluster::empty();
    let mut node = Node::start(1, 1, anywhere(), vec![Slots::ALL]);
    let relay = cluster.relay(node.address.to_string());
    node.is_behind(relay.endpoint().parse().unwrap());
    let store = cluster.store();
    cluster.block_on(async {
        store.create(&(), &meta(1)).await.unwrap();
        register(&store, &node).await;
        store.create(&engine::ids::ShardId(0), &led_by(&node, Slots::ALL)).await.unwrap();
    });
    cluster.nodes.push(node);
    cluster.start_gateway();
    cluster.ready();
    let mut client = cluster.client();
    assert_eq!(client.call(INCREMENT, &[], b"").status, 200);
    relay.silence();
    let began = Instant::now();
    let answer = client.call(INCREMENT, &["Request-Timeout-Ms: 15000"], b"");
    let took = began.elapsed();
    assert_eq!(answer.status, 200, "after {took:?}: {answer:?}");
    assert!(took < Duration::from_secs(10), "a ping each 2 s, 2 s for its answer: {took:?}");
    assert_eq!(cluster.nodes[0].value("ns", b"k"), 2);
}

/// A worker whose session a shard has dropped gets another one, and writes there again.
#[test]
fn a_session_that_a_node_has_dropped_is_replaced() {
    let cluster = Cluster::start(1);
    // The clients are on different workers.
    let mut clients = [cluster.client(), cluster.client()];
    for client in &mut clients {
        assert_eq!(client.call(INCREMENT, &[], b"").status, 200);
        cluster.nodes[0].set_mood(Mood::DropsASession);
        let _any_answer = client.call(INCREMENT, &[], b"");
        until("it writes under another session", || {
            client.call(INCREMENT, &["Request-Timeout-Ms: 500"], b"").status == 200
        });
    }
}

/// Some items were applied before and some are applied now: the answer is not marked as a replay.
#[test]
fn a_batch_that_was_applied_in_part_is_not_a_replay() {
    let cluster = Cluster::start(2);
    let mut client = cluster.client();
    let (here, there) = (cluster.key_of(0, "a"), cluster.key_of(1, "b"));
    let items = serde_json::json!({"increments": [{"key": here}, {"key": there}]}).to_string();
    let mut send = || {
        let key = ["Idempotency-Key: \"mixed\""];
        let answer = client.call("POST /v1/counters/ns/increment", &key, items.as_bytes());
        assert_eq!(answer.status, 200, "{answer:?}");
        let applied = answer.json()["applied"].as_u64().unwrap();
        (applied, answer.headers.contains_key("idempotent-replayed"))
    };
    cluster.nodes[1].set_mood(Mood::Refuses(engine::message::Refusal::NoSpace));
    assert_eq!(send(), (1, false));
    // All applied items are replays, although the rest fails again.
    assert_eq!(send(), (1, true));
    cluster.nodes[1].set_mood(Mood::Serves);
    assert_eq!(send(), (2, false));
    assert_eq!(send(), (2, true));
    assert_eq!(cluster.nodes[0].value("ns", here.as_bytes()), 1);
    assert_eq!(cluster.nodes[1].value("ns", there.as_bytes()), 1);
}
