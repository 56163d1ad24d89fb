//! The answers of a gateway whose cluster can't serve a request, and the effects of such requests.

use std::time::{Duration, Instant};

use engine::ids::{ShardId, Slots};
use engine::message::{Refusal, ShardAvailability};
use serde_json::json;

use crate::client::{Answer, Client};
use crate::cluster::{Cluster, promote, register, unregister, until};
use crate::node::Mood;

const SHORT: &str = "Request-Timeout-Ms: 200";

#[track_caller]
fn check_problem(answer: &Answer, want: (u16, &str, &str)) {
    let (status, kind, outcome) = want;
    assert_eq!((answer.status, answer.kind().as_str()), (status, kind), "{answer:?}");
    assert_eq!(answer.outcome(), outcome);
    let retry = answer.headers.get("retry-after").map(|seconds| seconds.parse().unwrap());
    let least = if kind == "no-space" { 5 } else { 1 };
    let later = retry.is_some_and(|seconds: u64| (least..least + 3).contains(&seconds));
    assert_eq!(later, matches!(status, 429 | 503), "{answer:?}");
}

fn increment(client: &mut Client, headers: &[&str]) -> Answer {
    client.call("POST /v1/counters/ns/k/increment", headers, b"")
}

fn read(client: &mut Client, headers: &[&str]) -> Answer {
    client.call("GET /v1/counters/ns/k", headers, b"")
}

/// A refused request is not applied, and requests succeed again when the node stops refusing.
#[test]
fn a_node_that_refuses() {
    let cluster = Cluster::start(1);
    let mut client = cluster.client();
    let node = &cluster.nodes[0];
    let mut check = |refusal: Refusal, write: (u16, &str), reading: (u16, &str)| {
        node.set_mood(Mood::Refuses(refusal));
        check_problem(&increment(&mut client, &[SHORT]), (write.0, write.1, "not-applied"));
        check_problem(&read(&mut client, &[SHORT]), (reading.0, reading.1, "not-applied"));
        let batch = r#"{"increments":[{"key":"k"},{"key":"k"}]}"#;
        let answer = client.call("POST /v1/counters/ns/increment", &[SHORT], batch.as_bytes());
        check_problem(&answer, (write.0, write.1, "not-applied"));
        let get = client.call("POST /v1/counters/ns/get", &[SHORT], br#"{"keys":["k"]}"#);
        check_problem(&get, (reading.0, reading.1, "not-applied"));
    };
    check(Refusal::Overloaded, (429, "overloaded"), (503, "overloaded"));
    check(Refusal::NoSpace, (503, "no-space"), (503, "no-space"));
    check(Refusal::Frozen, (503, "frozen"), (503, "frozen"));
    node.set_mood(Mood::Serves);
    node.announce(Slots::ALL, ShardAvailability::Open);
    until("the shard is open again", || increment(&mut client, &[]).status == 200);
    let value = node.value("ns", b"k");
    assert_eq!(value, 1, "something that was refused was applied");
}

/// Only the primary is in sync, so the bounded read goes to it; a bounded read that fails is always
/// a 503.
#[test]
fn a_bounded_read_of_a_silent_primary_is_not_applied() {
    let cluster = Cluster::start(1);
    let mut client = cluster.client();
    cluster.nodes[0].set_mood(Mood::Swallows);
    let no_primary = (503, "no-primary", "not-applied");
    let get = "GET /v1/counters/ns/k?consistency=bounded";
    check_problem(&client.call(get, &[SHORT], b""), no_primary);
    let get = "POST /v1/counters/ns/get?consistency=bounded&max_staleness_ms=5000";
    check_problem(&client.call(get, &[SHORT], br#"{"keys":["k"]}"#), no_primary);
}

#[test]
fn a_frozen_shard_refuses_at_once_and_reads_on() {
    let cluster = Cluster::start(1);
    let mut client = cluster.client();
    let node = &cluster.nodes[0];
    node.announce(Slots::ALL, ShardAvailability::Frozen);
    until("the gateway has received it", || increment(&mut client, &[SHORT]).status == 503);
    let sent = node.state().batches;
    let applied = node.value("ns", b"k");
    let began = Instant::now();
    check_problem(&increment(&mut client, &[]), (503, "frozen", "not-applied"));
    assert!(began.elapsed() < Duration::from_secs(2), "it waited for its deadline");
    assert_eq!(node.state().batches, sent, "it was sent all the same");
    // The node decides about reads.
    assert_eq!(read(&mut client, &[]).json()["value"], json!(i64::try_from(applied).unwrap()));
    node.announce(Slots::ALL, ShardAvailability::Open);
    until("the gateway has received it", || increment(&mut client, &[SHORT]).status == 200);
}

/// The failure of one item never hides the success of another.
#[test]
fn a_batch_may_fail_in_part() {
    let cluster = Cluster::start(2);
    let mut client = cluster.client();
    let (here, there) = (cluster.key_of(0, "a"), cluster.key_of(1, "b"));
    cluster.nodes[1].set_mood(Mood::Refuses(Refusal::NoSpace));
    let items = json!({"increments": [{"key": there}, {"key": here, "delta": 4}, {"key": 5}, {"key": there}]});
    let path = "/v1/counters/ns/increment";
    let answer = client.post(path, &items.to_string());
    assert_eq!(answer.status, 200);
    let result = answer.json();
    assert_eq!((&result["accepted"], &result["applied"]), (&json!(3), &json!(1)));
    let failed: Vec<_> = result["failed"]
        .as_array()
        .unwrap()
        .iter()
        .map(|item| {
            let kind = item["type"].as_str().unwrap().rsplit('/').next().unwrap().to_owned();
            (item["index"].as_u64().unwrap(), item["key"].as_str().map(str::to_owned), kind)
        })
        .collect();
    let space = |index| (index, Some(there.clone()), "no-space".to_owned());
    assert_eq!(failed, [space(0), (2, None, "bad-input".to_owned()), space(3)]);
    assert_eq!(cluster.nodes[0].value("ns", here.as_bytes()), 4);
    assert_eq!(cluster.nodes[1].value("ns", there.as_bytes()), 0);
    // All items fail, for the same reason.
    let items = json!({"increments": [{"key": there}, {"key": there}]});
    check_problem(&client.post(path, &items.to_string()), (503, "no-space", "not-applied"));
}

#[test]
fn a_node_that_does_not_answer() {
    let cluster = Cluster::start(1);
    let mut client = cluster.client();
    cluster.nodes[0].set_mood(Mood::Swallows);
    let began = Instant::now();
    check_problem(&increment(&mut client, &[SHORT]), (504, "deadline", "unknown"));
    assert!(began.elapsed() >= Duration::from_millis(200));
    check_problem(&read(&mut client, &[SHORT]), (504, "deadline", "not-applied"));
    let items = br#"{"increments":[{"key":"a"},{"key":"b"}]}"#;
    let answer = client.call("POST /v1/counters/ns/increment", &[SHORT], items);
    // The items are queued behind the batch in flight: never sent, so not applied.
    assert_eq!(answer.outcome(), "not-applied", "{answer:?}");
    cluster.nodes[0].set_mood(Mood::Serves);
    cluster.nodes[0].cut();
    until("the batch is sent again", || cluster.nodes[0].value("ns", b"k") == 1);
    assert_eq!(increment(&mut client, &[]).status, 200);
    assert_eq!(cluster.nodes[0].value("ns", b"k"), 2);
}

/// A batch is applied, its answer is lost, and it is sent again: the client does not notice.
#[test]
fn a_lost_answer_counts_once() {
    let cluster = Cluster::start(1);
    let node = &cluster.nodes[0];
    let mut client = cluster.client();
    node.set_mood(Mood::Holds);
    client.request("POST /v1/counters/ns/k/increment", &[], br#"{"delta":5,"return":"value"}"#);
    until("it is applied", || node.value("ns", b"k") == 5);
    node.state().mood = Mood::Serves;
    node.cut();
    assert_eq!(client.answer(false).json()["value"], 5);
    assert_eq!(node.value("ns", b"k"), 5);
    assert_eq!(node.state().batches, 2);
}

/// The node may be of a newer build. The connection is ended and opened again until the node is
/// understood, and an increment that it applied meanwhile counts once.
#[test]
fn a_node_that_can_not_be_understood() {
    let cluster = Cluster::start(1);
    let node = &cluster.nodes[0];
    let mut client = cluster.client();
    node.set_mood(Mood::Babbles);
    client.request("POST /v1/counters/ns/k/increment", &[], br#"{"delta":5,"return":"value"}"#);
    until("it is sent again", || node.state().batches >= 2);
    node.set_mood(Mood::TurnsAway);
    until("it is refused", || node.state().turned_away >= 2);
    node.set_mood(Mood::Serves);
    assert_eq!(client.answer(false).json()["value"], 5);
    assert_eq!(node.value("ns", b"k"), 5);
}

#[test]
fn a_shard_without_a_primary() {
    let mut cluster = Cluster::start(2);
    let (here, there) = (cluster.key_of(0, "a"), cluster.key_of(1, "b"));
    cluster.nodes[1].kill();
    let mut client = cluster.client();
    // Each worker notices by itself; the reason has the number of workers until all have.
    until("the gateway has noticed", || client.get("/readyz?all").body == "connection to node-2\n");
    assert_eq!(client.get("/readyz?all").status, 503);
    assert_eq!(
        client.get("/readyz").status,
        200,
        "one shard without a primary does not make the gateway unready"
    );
    let metrics = client.get("/metrics").body;
    assert!(metrics.contains("dkc_gateway_shards_without_primary 1\n"), "{metrics}");
    let path = format!("/v1/counters/ns/{there}");
    let answer = client.call(&format!("POST {path}/increment"), &[SHORT], b"");
    check_problem(&answer, (503, "no-primary", "not-applied"));
    let answer = client.call(&format!("GET {path}"), &[SHORT], b"");
    assert!(matches!(answer.status, 503 | 504), "{answer:?}");
    assert_eq!(answer.outcome(), "not-applied");
    // The other shard is not affected.
    assert_eq!(client.post(&format!("/v1/counters/ns/{here}/increment"), "").status, 200);
    let page = client.get("/v1/cluster").json();
    assert_eq!(page["nodes"][1]["state"], "down");
    assert_eq!(page["shards"][1]["state"], "no-primary");
    // A coordinator promotes the other node: the waiting increment is sent there.
    client.request(&format!("POST {path}/increment"), &[], b"");
    let store = cluster.store();
    cluster.block_on(promote(&store, ShardId(32_768), &cluster.nodes[0]));
    assert_eq!(client.answer(false).status, 200);
    assert_eq!(cluster.nodes[0].value("ns", there.as_bytes()), 1);
    until("all primaries can be reached", || client.get("/readyz?all").status == 200);
    assert!(client.get("/metrics").body.contains("dkc_gateway_shards_without_primary 0\n"));
}

/// A request that waits for a primary fails with that reason, whether the queue is full or the
/// deadline passes.
#[test]
fn a_request_that_waits_for_a_primary_fails_with_no_primary() {
    let mut cluster = Cluster::without_gateway(2);
    cluster.start_gateway_with(|options| options.workers = Some(1));
    cluster.ready();
    let there = cluster.key_of(1, "b");
    cluster.nodes[1].kill();
    let mut client = cluster.client();
    until("the gateway has noticed", || client.get("/readyz?all").status == 503);
    let batch = "POST /v1/counters/ns/increment";
    let lines = format!("{there}\n").repeat(100_000);
    let text = "Content-Type: text/plain";
    let mut waiting: Vec<_> = (0..4).map(|_| cluster.client()).collect();
    for client in &mut waiting {
        client.request(batch, &[text, "Request-Timeout-Ms: 4000"], lines.as_bytes());
    }
    let no_primary = (503, "no-primary", "not-applied");
    // Until the queue is full, the request waits until its deadline; then it is refused at once.
    let one = format!("POST /v1/counters/ns/{there}/increment");
    until("the queue is full", || {
        let began = Instant::now();
        check_problem(&client.call(&one, &[SHORT], b""), no_primary);
        began.elapsed() < Duration::from_millis(100)
    });
    let item = format!("{{\"increments\":[{{\"key\":\"{there}\"}}]}}");
    check_problem(&client.call(batch, &[SHORT], item.as_bytes()), no_primary);
    for client in &mut waiting {
        check_problem(&client.answer(false), no_primary);
    }
}

/// Another boot of the same store on the same port is another process, with another connection.
#[test]
fn a_node_starts_again() {
    let mut cluster = Cluster::start(1);
    let mut client = cluster.client();
    assert_eq!(increment(&mut client, &[]).status, 200);
    let store = cluster.store();
    let id = cluster.nodes[0].me.store;
    cluster.nodes[0].kill();
    cluster.block_on(unregister(&store, id));
    until("the gateway has noticed", || client.get("/readyz?all").status == 503);
    let again = cluster.nodes[0].again(2);
    cluster.nodes[0] = again;
    cluster.block_on(async {
        register(&store, &cluster.nodes[0]).await;
        promote(&store, ShardId(0), &cluster.nodes[0]).await;
    });
    assert_eq!(increment(&mut client, &[]).status, 200);
    assert_eq!(cluster.nodes[0].value("ns", b"k"), 2);
}
