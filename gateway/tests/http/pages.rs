//! The pages about the gateway and the cluster.

use std::time::{Duration, Instant};

use engine::ids::{Boot, StoreId};
use engine::records::NodeRecord;
use serde_json::json;

use crate::cluster::{Cluster, register, unregister, until};
use crate::exposition;
use crate::node::Node;

#[test]
fn pages() {
    let cluster = Cluster::start(2);
    let mut client = cluster.client();
    assert_eq!(client.get("/livez").status, 200);
    assert_eq!(client.get("/readyz").status, 200);
    client.post("/v1/counters/ns/k/increment", "");
    client.post("/v1/counters/ns/k/increment", "{");
    let metrics = client.get("/metrics").body;
    for line in [
        "dkc_requests_total{op=\"increment\",code=\"200\"} 1",
        "dkc_requests_total{op=\"increment\",code=\"400\"} 1",
        "dkc_batches_total 1",
        "dkc_refusals_total{reason=\"frozen\"} 0",
        "dkc_connections 1",
    ] {
        assert!(metrics.contains(line), "{line} is not in {metrics}");
    }
    let families = exposition::parse(&metrics).expect("a page that Prometheus takes");
    for (name, labels) in [
        ("dkc_requests_total", &["code", "op"][..]),
        ("dkc_batches_total", &[]),
        ("dkc_refusals_total", &["reason"]),
    ] {
        let got: Vec<_> = families[name].labels.iter().map(String::as_str).collect();
        assert_eq!((families[name].kind.as_str(), got.as_slice()), ("counter", labels), "{name}");
    }
    let answer = client.get("/v1/cluster");
    assert_eq!((answer.status, answer.headers["content-type"].as_str()), (200, "application/json"));
    let page = answer.json();
    assert_eq!((&page["cluster"], &page["incarnation"]), (&json!("test"), &json!(1)));
    let address = cluster.nodes[1].address.to_string();
    let want = json!({"name": "node-2", "uuid": "00000000000000000000000000000002", "boot": 1, "zone": "z",
        "address": address, "state": "up", "disk_full": false});
    assert_eq!(page["nodes"][1], want);
    let digest = format!("{:032x}", 0xab);
    let want = json!({"id": 32768, "slots": [32768, 65535], "epoch": 1, "version": 1, "state": "open",
        "primary": "node-2", "isr": ["node-2"], "learners": [], "hindered_by": [], "digests_agree": true,
        "records": {"count": 0, "bytes": 0, "bytes_max": page["idempotency"]["bytes_max"].as_u64().unwrap() / 2},
        "replicas": [{"node": "node-2", "last": 7, "applied": 6, "digest": digest, "sessions_digest": format!("{:032x}", 0),
        "digest_at": 6}]});
    assert_eq!(page["shards"][1], want);
}

/// Any number of clients that poll in a loop cost a node five queries a second over one connection.
#[test]
fn nodes_are_queried_at_most_every_200_ms_for_all_clients() {
    let cluster = Cluster::start(1);
    let began = Instant::now();
    let address = cluster.address();
    let ask = || {
        let mut client = crate::client::Client::new(address);
        while began.elapsed() < Duration::from_millis(1_500) {
            assert_eq!(client.get("/v1/cluster").status, 200);
        }
    };
    std::thread::scope(|scope| (0..8).for_each(|_| drop(scope.spawn(ask))));
    let most = began.elapsed().as_millis() as u64 / 200 + 1;
    let state = cluster.nodes[0].state();
    assert!((2..=most).contains(&state.queries), "{} queries, {most} at most", state.queries);
    assert_eq!(state.askers.len(), 1, "{:?}", state.askers);
}

/// A node that the gateway can't query, for a reason of its own, is not down.
#[test]
fn a_node_that_can_not_be_queried_is_unknown() {
    let mut cluster = Cluster::without_gateway(1);
    cluster.nodes.push(Node::start(2, 1, ([127, 0, 0, 1], 0).into(), vec![]));
    let store = cluster.store();
    cluster.block_on(async {
        register(&store, &cluster.nodes[1]).await;
        unregister(&store, StoreId(2)).await;
        let address = "no address".to_owned();
        let key = NodeRecord { boot: Boot(1), address, capacity: 1, versions: (1, 1) };
        store.create(&StoreId(2), &key).await.unwrap();
    });
    cluster.start_gateway();
    cluster.ready();
    let mut client = cluster.client();
    let mut state = || client.get("/v1/cluster").json()["nodes"][1]["state"].clone();
    until("it is known", || state() == "unknown");
    cluster.nodes[0].kill();
    let mut client = cluster.client();
    until("the other is gone", || client.get("/v1/cluster").json()["nodes"][0]["state"] == "down");
}

/// A cache may keep only the OpenAPI document, and `Vary` lists the headers that answers depend on.
#[test]
fn answers_are_not_cached() {
    let cluster = Cluster::start(1);
    let mut client = cluster.client();
    let forms = [
        "GET /v1/counters/ns/k",
        "POST /v1/counters/ns/k/increment",
        "DELETE /v1/counters/ns/k",
        "HEAD /v1/counters/ns/k",
    ];
    let others = ["GET /livez", "GET /readyz", "GET /metrics", "GET /v1/cluster", "GET /nowhere"];
    for (lines, vary) in [(&forms[..], Some("Accept")), (&others[..], None)] {
        for line in lines {
            let answer = client.call(line, &[], b"");
            assert_eq!(answer.headers["cache-control"], "no-store", "{line}");
            assert_eq!(answer.headers.get("vary").map(String::as_str), vary, "{line}");
            assert_eq!(answer.headers["keep-alive"], "timeout=75", "{line}");
        }
    }
    assert!(!client.get("/openapi.json").headers.contains_key("cache-control"));
    let last = client.call("GET /livez", &["Connection: close"], b"");
    assert!(!last.headers.contains_key("keep-alive"));
    assert_eq!(last.headers["connection"], "close");
    let mut client = cluster.client();
    client.send(b"rubbish\r\n\r\n");
    assert_eq!(client.answer(false).headers["cache-control"], "no-store");
}

/// The requests that a browser sends for a page, and their preflights.
#[test]
fn pages_of_named_origins_may_count() {
    let mut cluster = Cluster::without_gateway(1);
    const SHOP: &str = "https://shop.example";
    cluster.start_gateway_with(|options| options.allow_origin = vec![SHOP.to_owned()]);
    cluster.ready();
    let mut client = cluster.client();
    let (own, evil) = (format!("Origin: {SHOP}"), "Origin: https://evil.example");
    let line = "/v1/counters/ns/k/increment";
    let method = "Access-Control-Request-Method: POST";
    let names = "Access-Control-Request-Headers: content-type,idempotency-key";
    let preflight = client.call(&format!("OPTIONS {line}"), &[&own, method, names], b"");
    assert_eq!((preflight.status, preflight.body.as_str()), (204, ""));
    let header = |name: &str| preflight.headers[name].clone();
    assert_eq!(header("access-control-allow-origin"), SHOP);
    assert!(header("access-control-allow-methods").contains("POST"));
    let sent = header("access-control-allow-headers");
    assert!(
        ["Content-Type", "Idempotency-Key", "Request-Timeout-Ms"]
            .iter()
            .all(|name| sent.contains(name))
    );
    assert_eq!((header("vary").as_str(), header("cache-control").as_str()), ("Origin", "no-store"));
    let counted = client.call(&format!("POST {line}"), &[&own], b"");
    assert_eq!((counted.status, counted.headers["vary"].as_str()), (200, "Accept, Origin"));
    assert_eq!(counted.headers["access-control-allow-origin"], SHOP);
    assert!(counted.headers["access-control-expose-headers"].contains("Retry-After"));
    // A problem can be read, too.
    let wrong = client.call(&format!("POST {line}?delta=x"), &[&own], b"");
    assert_eq!(wrong.status, 400);
    assert_eq!(wrong.headers["access-control-allow-origin"], SHOP);
    for (line, headers) in [
        (format!("OPTIONS {line}"), [evil, method]),
        (format!("POST {line}"), [evil, "Content-Type: text/plain;charset=UTF-8"]),
        ("DELETE /v1/counters/ns/k".to_owned(), [evil, "Sec-Fetch-Site: cross-site"]),
        ("GET /v1/counters/ns/k".to_owned(), ["X: y", "Sec-Fetch-Site: cross-site"]),
    ] {
        let answer = client.call(&line, &headers, b"");
        assert_eq!((answer.status, answer.kind().as_str()), (403, "forbidden-origin"), "{line}");
        assert!(!answer.headers.contains_key("access-control-allow-origin"));
    }
    assert_eq!(cluster.nodes[0].value("ns", b"k"), 1);
    // Requests of programs have no origin, and OPTIONS is then a method like any other.
    assert_eq!(client.call(&format!("OPTIONS {line}"), &[], b"").status, 405);
}
