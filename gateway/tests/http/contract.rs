//! What is answered when all is well, and what is refused whoever is asked.

use serde_json::json;

use crate::client::{Answer, Client};
use crate::cluster::Cluster;

#[track_caller]
fn ok(answer: &Answer, want: &str) {
    assert_eq!((answer.status, answer.body.as_str()), (200, want));
    assert_eq!(answer.headers["content-type"], "application/json");
}

#[test]
fn one_counter() {
    let cluster = Cluster::start(2);
    let mut client = cluster.client();
    let path = "/v1/counters/ns/k";
    ok(&client.get(path), r#"{"namespace":"ns","key":"k","value":0}"#);
    ok(
        &client.post(&format!("{path}/increment"), ""),
        r#"{"namespace":"ns","key":"k","applied":1}"#,
    );
    ok(
        &client.post(&format!("{path}/increment"), r#"{"delta":5,"return":"value"}"#),
        r#"{"namespace":"ns","key":"k","applied":5,"value":6}"#,
    );
    ok(
        &client.post(&format!("{path}/increment?delta=-2"), ""),
        r#"{"namespace":"ns","key":"k","applied":-2}"#,
    );
    ok(&client.get(path), r#"{"namespace":"ns","key":"k","value":4}"#);
    ok(
        &client.get(&format!("{path}?consistency=bounded&max_staleness_ms=10")),
        r#"{"namespace":"ns","key":"k","value":4,"staleness_ms":0}"#,
    );
    ok(
        &client.post("/v1/counters/ns/get?consistency=bounded", r#"{"keys":["k"]}"#),
        r#"{"counters":[{"key":"k","value":4}],"staleness_ms":0}"#,
    );
    ok(&client.call(&format!("DELETE {path}"), &[], b""), r#"{"key":"k","value":4}"#);
    ok(&client.get(path), r#"{"namespace":"ns","key":"k","value":0}"#);
    let head = client.call(&format!("HEAD {path}"), &[], b"");
    assert_eq!((head.status, head.body.as_str()), (200, ""));
    ok(&client.get(path), r#"{"namespace":"ns","key":"k","value":0}"#);
}

#[test]
fn keys_of_any_bytes() {
    let cluster = Cluster::start(2);
    let mut client = cluster.client();
    for (path, key) in [
        ("a%2Fb", json!({"key": "a/b"})),
        ("%00", json!({"key": "\0"})),
        ("%ff%fe", json!({"key_base64": "//4="})),
        ("..", json!({"key": ".."})),
        ("%22", json!({"key": "\""})),
        ("increment", json!({"key": "increment"})),
        ("get", json!({"key": "get"})),
    ] {
        let told = client.post(&format!("/v1/counters/ns/{path}/increment?delta=7"), "").json();
        for (name, value) in key.as_object().unwrap() {
            assert_eq!(&told[name], value, "{path}");
        }
        assert_eq!(client.get(&format!("/v1/counters/ns/{path}")).json()["value"], 7, "{path}");
        let body = json!({"keys": [key]}).to_string();
        let told = client.post("/v1/counters/ns/get", &body).json();
        assert_eq!(told["counters"][0]["value"], 7, "{path}");
    }
    assert_eq!(client.get("/v1/counters/other/get").json()["value"], 0);
}

#[test]
fn values_grow_beyond_64_bits() {
    let cluster = Cluster::start(1);
    let mut client = cluster.client();
    let most = format!("/v1/counters/ns/k/increment?delta={}", i64::MAX);
    for _ in 0..3 {
        assert_eq!(client.post(&most, "").status, 200);
    }
    let want = 3 * i128::from(i64::MAX);
    let answer = client.get("/v1/counters/ns/k");
    assert_eq!(answer.body, format!(r#"{{"namespace":"ns","key":"k","value":{want}}}"#));
    let plain = client.call("GET /v1/counters/ns/k", &["Accept: text/plain"], b"");
    assert_eq!(plain.body, want.to_string());
    assert_eq!(plain.headers["content-type"], "text/plain; charset=utf-8");
}

#[test]
fn batches_in_three_forms() {
    let cluster = Cluster::start(2);
    let mut client = cluster.client();
    let path = "/v1/counters/ns/increment";
    let body =
        r#"{"increments":[{"key":"a","delta":5},{"key":"b","delta":-1},{"key":"a","delta":2}]}"#;
    ok(&client.post(path, body), r#"{"accepted":3,"applied":3,"failed":[]}"#);
    let line = format!("POST {path}");
    let ndjson = b"{\"key\":\"a\",\"delta\":1}\n\n{\"key\":\"c\"}\n";
    ok(
        &client.call(&line, &["Content-Type: application/x-ndjson"], ndjson),
        r#"{"accepted":2,"applied":2,"failed":[]}"#,
    );
    ok(
        &client.call(&line, &["Content-Type: text/plain"], b"a\r\nb\t10\nc d\n\nx\ty\n"),
        r#"{"accepted":4,"applied":4,"failed":[]}"#,
    );
    // As `curl -d` sends it.
    let form = ["Content-Type: application/x-www-form-urlencoded"];
    ok(&client.call(&line, &form, body.as_bytes()), r#"{"accepted":3,"applied":3,"failed":[]}"#);
    ok(
        &client.post("/v1/counters/ns/get", r#"{"keys":["a","b","c","c d","x\ty","never","a"]}"#),
        r#"{"counters":[{"key":"a","value":16},{"key":"b","value":8},{"key":"c","value":1},{"key":"c d","value":1},{"key":"x\ty","value":1},{"key":"never","value":0},{"key":"a","value":16}]}"#,
    );
    ok(&client.post(path, r#"{"increments":[]}"#), r#"{"accepted":0,"applied":0,"failed":[]}"#);
    ok(&client.post("/v1/counters/ns/get", r#"{"keys":[]}"#), r#"{"counters":[]}"#);
}

#[test]
fn bad_items_fail_alone() {
    let cluster = Cluster::start(2);
    let mut client = cluster.client();
    let path = "/v1/counters/ns/increment";
    let body =
        r#"{"increments":[{"key":"a"},{"key":"b","delta":"x"},{"key":""},{"key":"c","delta":3}]}"#;
    let told = client.post(path, body);
    assert_eq!(told.status, 200);
    let told = told.json();
    assert_eq!((&told["accepted"], &told["applied"]), (&json!(2), &json!(2)));
    let failed = told["failed"].as_array().unwrap();
    let seen: Vec<_> =
        failed.iter().map(|item| (&item["index"], &item["key"], &item["field"])).collect();
    let (one, two) = (json!(1), json!(2));
    let (b, none, delta, key) = (json!("b"), json!(null), json!("delta"), json!("key"));
    assert_eq!(seen, [(&one, &b, &delta), (&two, &none, &key)]);
    assert!(failed.iter().all(|item| item["outcome"] == "not-applied"));
    assert!(failed.iter().all(|item| item["type"].as_str().unwrap().ends_with("/bad-input")));
    // All of them, for one reason.
    let told = client.post(path, r#"{"increments":[{"key":""},{"delta":1}]}"#);
    assert_eq!((told.status, told.kind().as_str()), (400, "bad-input"));
    assert_eq!(told.json()["failed"].as_array().unwrap().len(), 2);
    assert_eq!(client.get("/v1/counters/ns/c").json()["value"], 3);
}

/// Status, kind and field of what is refused; the connection serves on.
#[test]
fn refusals() {
    let cluster = Cluster::start(1);
    let mut client = cluster.client();
    #[track_caller]
    fn check(
        client: &mut Client,
        line: &str,
        headers: &[&str],
        body: &[u8],
        want: (u16, &str, &str),
    ) {
        let answer = client.call(line, headers, body);
        let (status, kind, field) = want;
        assert_eq!((answer.status, answer.kind().as_str()), (status, kind), "{line} {answer:?}");
        assert_eq!(answer.headers["content-type"], "application/problem+json");
        assert_eq!(answer.outcome(), "not-applied");
        let json = answer.json();
        assert_eq!(json["field"].as_str().unwrap_or(""), field, "{line}");
        assert_eq!(json["status"], status);
        for member in ["title", "detail"] {
            assert!(!json[member].as_str().unwrap().is_empty(), "{line}");
        }
    }
    let one = "POST /v1/counters/ns/k/increment";
    let many = "POST /v1/counters/ns/increment";
    let mut refused = |line: &str, headers: &[&str], body: &[u8], want: (u16, &str, &str)| {
        check(&mut client, line, headers, body, want);
    };
    refused(one, &[], b"{\"delta\":1.5}", (400, "bad-input", "delta"));
    refused(&format!("{one}?delta=1"), &[], b"{\"delta\":1}", (400, "bad-input", "delta"));
    refused(one, &[], b"{", (400, "bad-input", "body"));
    refused(one, &["Request-Timeout-Ms: 60001"], b"", (400, "bad-input", "Request-Timeout-Ms"));
    refused(one, &["Idempotency-Key: \"t\""], b"", (400, "bad-input", "Idempotency-Key"));
    refused("GET /v1/counters/NS/k", &[], b"", (400, "bad-input", "namespace"));
    refused("GET /v1/counters/ns/%zz", &[], b"", (400, "bad-input", "key"));
    refused(many, &[], b"", (400, "bad-input", "body"));
    refused("GET /v1/nothing", &[], b"", (404, "not-found", ""));
    refused("PUT /v1/counters/ns/k", &[], b"xyz", (405, "method-not-allowed", ""));
    refused(one, &["Content-Type: application/xml"], b"<a/>", (415, "unsupported-media-type", ""));
    refused(many, &["Content-Encoding: gzip"], b"xyz", (415, "unsupported-media-type", ""));
    let long = format!("GET /v1/counters/ns/{}", "k".repeat(9_000));
    refused(&long, &[], b"", (414, "url-too-long", ""));
    let lines = "k\n".repeat(100_001);
    refused(many, &["Content-Type: text/plain"], lines.as_bytes(), (413, "too-large", ""));
    let huge = vec![b'x'; (8 << 20) + 1];
    refused(many, &["Content-Type: text/plain"], &huge, (413, "too-large", ""));
    let answer = client.call("PATCH /v1/counters/ns/k", &[], b"");
    assert_eq!(answer.headers["allow"], "DELETE, GET, HEAD");
    assert_eq!(client.get("/v1/counters/ns/k").json()["value"], 0);
    assert_eq!(cluster.nodes[0].state().batches, 0, "something was sent to a node");
}

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
        "address": address, "state": "up"});
    assert_eq!(told["nodes"][1], want);
    let digest = format!("{:032x}", 0xab);
    let want = json!({"id": 32768, "slots": [32768, 65535], "epoch": 1, "version": 1, "state": "open",
        "primary": "node-2", "isr": ["node-2"], "learners": [], "digests_agree": true,
        "replicas": [{"node": "node-2", "last": 7, "applied": 6, "digest": digest, "digest_at": 6}]});
    assert_eq!(told["shards"][1], want);
}
