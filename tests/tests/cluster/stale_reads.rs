//! A primary stands still and nobody may replace it: bounded-stale reads go on, from a backup, until
//! what that can prove is too old; then the service says so, and all is well when the primary wakes.

use std::thread::sleep;
use std::time::{Duration, Instant};

use tests::cluster::http::{Client, Outcome};
use tests::cluster::{Cluster, Signal, until};

use crate::SOON;

const BOUND_MS: u64 = 3_000;
/// How long one read may take.
const PATIENCE: Duration = Duration::from_millis(500);

struct Read {
    sent: Instant,
    outcome: Outcome,
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
fn a_backup_answers_for_a_stopped_primary_up_to_the_bound() {
    let cluster = Cluster::start(&["--coordinators", "1"]);
    cluster.wait_until_full(3);
    let shard = cluster.shards().expect("a full cluster").swap_remove(0);
    let key = cluster.key_per_shard("stale").swap_remove(0);
    let primary = shard.primary.expect("an open shard has one");
    let mut client = Client::new(&cluster.gateway);
    let added = client.increment("stale", &key, 5).expect("an answer");
    assert_eq!(added.outcome(), Outcome::Applied);
    let fresh = read(&mut client, &key, SOON);
    assert_eq!((fresh.outcome, fresh.value), (Outcome::Applied, Some(5)));

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
    let refused = reads.iter().position(|read| read.outcome != Outcome::Applied);
    let (served, refused) = reads.split_at(refused.expect("the bound was passed"));
    for read in served {
        let told = read.staleness_ms.expect("a bounded read says how old it is");
        // Nothing can be proved of a moment after the stop. The signal itself takes a while.
        let true_age = read.sent.saturating_duration_since(stopped).as_millis() as u64;
        assert!(told + 100 >= true_age, "{told} ms old, it says, after {true_age}");
        assert!(told <= BOUND_MS, "{told} ms is beyond the bound");
        assert_eq!(read.value, Some(5));
    }
    let oldest = served.iter().filter_map(|read| read.staleness_ms).max().unwrap_or(0);
    assert!(oldest > BOUND_MS / 2, "reads went on to an age of {oldest} ms only");
    for read in refused {
        assert_eq!(read.outcome, Outcome::NotApplied("no-primary".to_owned()));
    }

    cluster.signal(&primary, Signal::CONT);
    for coordinator in cluster.names("coordinator") {
        cluster.signal(&coordinator, Signal::CONT);
    }
    until(SOON, || match read(&mut client, &key, PATIENCE) {
        Read { outcome: Outcome::Applied, value: Some(5), .. } => Ok(()),
        read => Err(format!("{:?} {:?}", read.outcome, read.value)),
    });
    let added = client.increment("stale", &key, 2).expect("an answer");
    assert_eq!(added.outcome(), Outcome::Applied);
    cluster.wait_until_full(3);
    let value = client.value("stale", &key).expect("an answer");
    assert_eq!(value.ok(), Some(7));
}
