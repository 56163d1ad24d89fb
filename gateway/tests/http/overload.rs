//! More operations than there is room for.

use std::time::{Duration, Instant};

use crate::client::{Answer, Client};
use crate::cluster::Cluster;
use crate::node::Mood;

const TEXT: &str = "Content-Type: text/plain";
const INCREMENT: &str = "POST /v1/counters/ns/increment";

/// The node holds its answers, so that nothing leaves the gateway: the first requests take all the
/// room, one that comes later waits for half a second and is refused as a whole. Once the node
/// answers, the gateway takes requests as before.
#[test]
fn a_large_request_waits_for_room_and_is_refused_as_a_whole() {
    let mut cluster = Cluster::without_gateway(1);
    cluster.start_gateway_with(|options| {
        // 16 MiB are for operations that are queued, 4 of them before large requests wait.
        (options.workers, options.memory_bytes) = (Some(1), 256 << 20);
    });
    cluster.ready();
    cluster.nodes[0].set_mood(Mood::Holds);
    let lines: String = (0..10_000).map(|key| format!("key-{key}\n")).collect();
    let send = || {
        let mut client = cluster.client();
        client.request(INCREMENT, &[TEXT], lines.as_bytes());
        client
    };
    let mut first: Vec<Client> = (0..8).map(|_| send()).collect();

    let began = Instant::now();
    let refused = send().answer(false);
    let waited = began.elapsed();
    assert_eq!((refused.status, refused.outcome().as_str()), (429, "not-applied"), "{refused:?}");
    assert!(refused.body.contains("the queues of this gateway are full"), "{refused:?}");
    assert!(waited >= Duration::from_millis(400), "it was refused after {waited:?}");

    let mut single = cluster.client();
    single.request("POST /v1/counters/ns/single/increment", &[], b"");
    let mut last = send();
    cluster.nodes[0].set_mood(Mood::Serves);
    assert_eq!(single.answer(false).status, 200, "a single increment is not refused");
    assert_eq!(last.answer(false).status, 200, "there is room again");

    let answers: Vec<Answer> = first.iter_mut().map(|client| client.answer(false)).collect();
    let count = |status| answers.iter().filter(|answer| answer.status == status).count();
    let (applied, refused) = (count(200), count(429));
    assert!(applied >= 2 && refused >= 1 && applied + refused == 8, "{answers:?}");
    for key in ["key-0", "key-9999"] {
        assert_eq!(cluster.nodes[0].value("ns", key.as_bytes()), 1 + applied as i128);
    }
}

/// A body that is refused after it was admitted leaves nothing behind: the next one does not wait.
#[test]
fn a_malformed_body_takes_no_room() {
    let mut cluster = Cluster::without_gateway(1);
    cluster.start_gateway_with(|options| {
        (options.workers, options.memory_bytes) = (Some(1), 256 << 20);
    });
    cluster.ready();
    let mut client = cluster.client();
    let lines = "key\n".repeat(100_001);
    for body in [lines.as_bytes(), &vec![b'?'; 4 << 20], b""] {
        assert_ne!(client.call(INCREMENT, &[TEXT], body).status, 429);
        assert_eq!(client.call(INCREMENT, &[TEXT], b"key\n").status, 200);
    }
}
