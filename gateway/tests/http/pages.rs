//! What is told about the gateway and the cluster.

use serde_json::json;

use crate::cluster::Cluster;

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
    let families = telemetry::exposition::parse(&metrics).expect("a page that Prometheus takes");
    for (name, labels) in [
        ("dkc_requests_total", &["code", "op"][..]),
        ("dkc_batches_total", &[]),
        ("dkc_refusals_total", &["reason"]),
    ] {
        let got: Vec<_> = families[name].labels.iter().map(String::as_str).collect();
        assert_eq!((families[name].kind.as_str(), got.as_slice()), ("counter", labels), "{name}");
    }
    let told = client.get("/v1/cluster");
    assert_eq!((told.status, told.headers["content-type"].as_str()), (200, "application/json"));
    let told = told.json();
    assert_eq!((&told["cluster"], &told["incarnation"]), (&json!("test"), &json!(1)));
    let address = cluster.nodes[1].address.to_string();
    let want = json!({"name": "node-2", "uuid": "00000000000000000000000000000002", "boot": 1, "zone": "z",
        "address": address, "state": "up", "disk_full": false});
    assert_eq!(told["nodes"][1], want);
    let digest = format!("{:032x}", 0xab);
    let want = json!({"id": 32768, "slots": [32768, 65535], "epoch": 1, "version": 1, "state": "open",
        "primary": "node-2", "isr": ["node-2"], "learners": [], "hindered_by": [], "digests_agree": true,
        "records": {"count": 0, "bytes": 0, "bytes_max": told["idempotency"]["bytes_max"].as_u64().unwrap() / 2},
        "replicas": [{"node": "node-2", "last": 7, "applied": 6, "digest": digest, "sessions_digest": format!("{:032x}", 0),
        "digest_at": 6}]});
    assert_eq!(told["shards"][1], want);
}
