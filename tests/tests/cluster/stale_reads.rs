//! A primary is stopped and cannot be replaced: a follower continues to serve bounded-stale reads
//! until its lease check is too old. Then the service refuses them, until the primary is resumed.

use std::thread::sleep;
use std::time::{Duration, Instant};

use tests::cluster::http::{Client, HttpOutcome};
use tests::cluster::{Cluster, Signal, until};

use crate::SOON;

const BOUND_MS: u64 = 3_000;
/// The limit of one read.
const PATIENCE: Duration = Duration::from_millis(500);

struct Read {
    sent: Instant,
    outcome: HttpOutcome,
    value: Option<u64>,
    staleness_ms: Option<u64>,
}

fn read(client: &mut Client, key: &str, patience: Duration) -> Read {
    let path = format!("/v1/counters/stale/{key}?consistency=bounded&max_staleness_ms={BOUND_MS}");
    let sent = Instant::now();
    let answer = client.call("GET", &path, &[], b"", patience).expect("a gateway that lives");
    let number = |name: &str| answer.body[name].as_u64();
    let (value, staleness_ms) = (number("value"), number("staleness_ms"));
    Read { sent, outcome: answer.outcome(), value, staleness_ms }
}

#[test]
fn a_follower_answers_for_a_stopped_primary_up_to_the_bound() {
    let cluster = Cluster::start(&["--coordinators", "1"]);
    cluster.wait_until_full(3);
    let shard = cluster.shards().expect("a full cluster").swap_remove(0);
    let key = cluster.key_per_shard("stale").swap_remove(0);
    let primary = shard.primary.expect("an open shard has one");
    let mut client = Client::new(&cluster.gateway);
    let added = client.increment("stale", &key, 5).expect("an answer");
    assert_eq!(added.outcome(), HttpOutcome::Applied);
    let fresh = read(&mut client, &key, SOON);
    assert_eq!((fresh.outcome, fresh.value), (HttpOutcome::Applied, Some(5)));

    for coordinator in cluster.names("coordinator") {
        cluster.signal(&coordinator, Signal::STOP);
    }
    cluster.signal(&primary, Signal::STOP);
    let stopped = Instant::now();
    let mut reads = Vec::new();
    while stopped.elapsed() < Duration::from_millis(2 * BOUND_MS) {
        reads.push(read(&mut client, &key, PATIENCE));
        sleep(Duration::from_millis(50));
    }
    let refused = reads.iter().position(|read| read.outcome != HttpOutcome::Applied);
    let (served, refused) = reads.split_at(refused.expect("the bound was passed"));
    for read in served {
        let stated_age = read.staleness_ms.expect("a bounded read states its age");
        // The primary confirms nothing after the stop. The signal itself takes a while.
        let true_age = read.sent.saturating_duration_since(stopped).as_millis() as u64;
        assert!(stated_age + 100 >= true_age, "stated age {stated_age} ms after {true_age} ms");
        assert!(stated_age <= BOUND_MS, "{stated_age} ms is beyond the bound");
        assert_eq!(read.value, Some(5));
    }
    let oldest = served.iter().filter_map(|read| read.staleness_ms).max().unwrap_or(0);
    assert!(oldest > BOUND_MS / 2, "reads continued to an age of {oldest} ms only");
    for read in refused {
        assert_eq!(read.outcome, HttpOutcome::NotApplied("no-primary".to_owned()));
    }

    cluster.signal(&primary, Signal::CONT);
    for coordinator in cluster.names("coordinator") {
        cluster.signal(&coordinator, Signal::CONT);
    }
    until(SOON, || match read(&mut client, &key, PATIENCE) {
        Read { outcome: HttpOutcome::Applied, value: Some(5), .. } => Ok(()),
        read => Err(format!("{:?} {:?}", read.outcome, read.value)),
    });
    let added = client.increment("stale", &key, 2).expect("an answer");
    assert_eq!(added.outcome(), HttpOutcome::Applied);
    cluster.wait_until_full(3);
    let value = client.value("stale", &key).expect("an answer");
    assert_eq!(value.ok(), Some(7));
}
