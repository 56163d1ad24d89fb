//! A closed loop: every client sends, waits for the answer, sends again.
//!
//! All clients live on the caller's runtime. What leaves is built before the run as far as it can
//! be: the generator shares the machine with what it measures. Only whole answers with status 200
//! and nothing failed in them count towards rate and latency; everything else is an error, and a
//! run with errors says so beside its numbers.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::histogram::Histogram;
use crate::http::{Connection, Request, Url};

const DEADLINE: Duration = Duration::from_secs(5);
/// Requests made beforehand for each client. Enough that a batch's keys differ between requests,
/// few enough that they fit in memory: the clients go through them in turns.
const REQUESTS_PREPARED: usize = 4096;
const BYTES_PREPARED_MAX: usize = 64 << 20;

/// What to do to a cluster.
#[derive(Clone, Debug)]
pub struct Load {
    pub urls: Vec<Url>,
    pub namespace: String,
    pub clients: usize,
    /// Increments in a request. 1 means the single-increment endpoint.
    pub batch: usize,
    /// Increments go to keys `k0` to `k{keys-1}`, evenly, at random.
    pub keys: u64,
    /// Goes first, and is not measured.
    pub warm_up: Duration,
    pub measured: Duration,
}

/// What came of it.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Measured {
    pub seconds: f64,
    pub requests: u64,
    pub increments: u64,
    /// Requests without a whole 200 answer that applied everything.
    pub errors: u64,
    /// The first error, as an example.
    pub error: Option<String>,
    #[serde(skip)]
    pub latencies: Histogram,
}

const WARMING: u8 = 0;
const MEASURING: u8 = 1;
const OVER: u8 = 2;

/// Runs the load. `at_start` and `at_end` are called where the measured part begins and ends, to
/// read the CPU clocks.
pub async fn run(load: &Load, at_start: impl FnOnce(), at_end: impl FnOnce()) -> Measured {
    let phase = Arc::new(AtomicU8::new(WARMING));
    let prepared: Vec<_> = (0..load.clients)
        .map(|number| {
            let url = load.urls[number % load.urls.len()].clone();
            let requests = prepare(load, &url, number as u64);
            (url, requests)
        })
        .collect();
    // All begin together, none while the requests of others are still being made.
    let spawn =
        |(url, requests)| tokio::spawn(client(url, requests, load.batch as u64, phase.clone()));
    let clients: Vec<_> = prepared.into_iter().map(spawn).collect();
    tokio::time::sleep(load.warm_up).await;
    at_start();
    let begun = Instant::now();
    phase.store(MEASURING, Ordering::Relaxed);
    tokio::time::sleep(load.measured).await;
    phase.store(OVER, Ordering::Relaxed);
    let seconds = begun.elapsed().as_secs_f64();
    at_end();
    let mut all = Measured { seconds, ..Measured::default() };
    for client in clients {
        match client.await {
            Ok(one) => {
                all.requests += one.requests;
                all.increments += one.increments;
                all.errors += one.errors;
                all.error = all.error.or(one.error);
                all.latencies.merge(&one.latencies);
            }
            Err(error) => {
                all.errors += 1;
                all.error.get_or_insert(error.to_string());
            }
        }
    }
    all
}

async fn client(url: Url, requests: Vec<Request>, batch: u64, phase: Arc<AtomicU8>) -> Measured {
    let mut connection = Connection::new(url);
    let mut measured = Measured::default();
    for request in requests.iter().cycle() {
        let before = phase.load(Ordering::Relaxed);
        if before == OVER {
            break;
        }
        let sent = Instant::now();
        let answer = connection.call(request, DEADLINE + DEADLINE).await;
        let latency = sent.elapsed();
        let error = match answer {
            Ok(answer) if answer.status == 200 && all_applied(&answer.body, batch) => None,
            Ok(answer) => Some(format!("{} {}", answer.status, start_of(&answer.body))),
            Err(error) => Some(error.to_string()),
        };
        let failed = error.is_some();
        // What straddles an edge of the measured part belongs to neither side.
        if before == MEASURING && phase.load(Ordering::Relaxed) == MEASURING {
            match error {
                None => {
                    measured.requests += 1;
                    measured.increments += batch;
                    measured.latencies.record(latency);
                }
                Some(error) => {
                    measured.errors += 1;
                    measured.error.get_or_insert(error);
                }
            }
        }
        if failed {
            // A server that refuses at once would otherwise be asked in a hot loop.
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
    measured
}

fn all_applied(body: &[u8], batch: u64) -> bool {
    #[derive(serde::Deserialize)]
    struct Answer {
        applied: u64,
    }
    // A single increment answers with its delta, which is 1, and so does a batch of one.
    serde_json::from_slice::<Answer>(body).is_ok_and(|answer| answer.applied == batch)
}

fn start_of(body: &[u8]) -> String {
    String::from_utf8_lossy(&body[..body.len().min(200)]).into_owned()
}

fn prepare(load: &Load, url: &Url, seed: u64) -> Vec<Request> {
    let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let share = BYTES_PREPARED_MAX / load.clients.max(1);
    let mut requests = Vec::new();
    let mut bytes = 0;
    while requests.is_empty() || (requests.len() < REQUESTS_PREPARED && bytes < share) {
        let request = if load.batch == 1 {
            let key = random.below(load.keys);
            let path = format!("/v1/counters/{}/k{key}/increment", load.namespace);
            Request::post(url, &path, DEADLINE, b"")
        } else {
            let items: Vec<_> = (0..load.batch)
                .map(|_| format!("{{\"key\":\"k{}\",\"delta\":1}}", random.below(load.keys)))
                .collect();
            let path = format!("/v1/counters/{}/increment", load.namespace);
            let body = format!("{{\"increments\":[{}]}}", items.join(","));
            Request::post(url, &path, DEADLINE, body.as_bytes())
        };
        bytes += request.size();
        requests.push(request);
    }
    requests
}

/// xorshift64: keys need no better, and the same run asks for the same keys.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) % limit.max(1)
    }
}
