//! A closed loop: every client sends a request, waits for the response, and sends the next one.
//!
//! The generator shares the machine with the servers that it measures, so it is kept lean: one
//! thread unless more are requested, and requests are written directly from a random number. They
//! are not prepared in advance: a set that fits into memory would contain fewer keys than the run
//! claims.
//!
//! Rate and latency count complete responses with status 200 that applied everything; any other
//! result is an error, and the report of a run with errors contains their number.

use std::fmt::Write;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use client::{HttpConnection, HttpRequest, IdempotencyHeaders, Media, Url};
use serde::Serialize;

use crate::histogram::Histogram;

const DEADLINE: Duration = Duration::from_secs(5);

/// The load to generate on a cluster.
#[derive(Clone, Debug)]
pub struct LoadPlan {
    /// The gateways, among which the clients are spread evenly.
    pub urls: Vec<Url>,
    /// The namespace of the counters.
    pub namespace: String,
    /// The number of clients, each with one connection.
    pub clients: usize,
    /// The number of threads that run the clients.
    pub threads: usize,
    /// The number of increments in a request. 1 means the single-increment endpoint.
    pub batch: usize,
    /// The format of a batch.
    pub media: Media,
    /// True if each request has an `Idempotency-Key` of its own.
    pub keyed: bool,
    /// The number of keys: increments go to `k0` to `k{keys-1}`, uniformly at random.
    pub keys: u64,
    /// The time before the measured part.
    pub warm_up: Duration,
    /// The time of the measured part.
    pub measured: Duration,
}

/// The result of a run.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Measured {
    /// The actual duration of the measured part.
    pub seconds: f64,
    /// The number of requests that applied everything.
    pub requests: u64,
    /// The number of increments in those requests.
    pub increments: u64,
    /// The number of requests without a complete 200 response that applied everything.
    pub errors: u64,
    /// The first error, as an example.
    pub error: Option<String>,
    /// The latencies of the requests that applied everything.
    #[serde(skip)]
    pub latencies: Histogram,
}

impl Measured {
    fn add(&mut self, other: Self) {
        self.requests += other.requests;
        self.increments += other.increments;
        self.errors += other.errors;
        self.error = self.error.take().or(other.error);
        self.latencies.merge(&other.latencies);
    }
}

const WARMING: u8 = 0;
const MEASURING: u8 = 1;
const OVER: u8 = 2;

/// Runs the load on threads of its own. `at_start` and `at_end` are called when the measured part
/// begins and ends, to read the CPU times. Fails if a thread can't start or panics.
pub fn run(
    load: &LoadPlan,
    at_start: impl FnOnce(),
    at_end: impl FnOnce(),
) -> io::Result<Measured> {
    let phase = Arc::new(AtomicU8::new(WARMING));
    let mut threads = Vec::new();
    for thread in 0..load.threads {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (load, phase) = (load.clone(), phase.clone());
        threads.push(std::thread::spawn(move || {
            let numbers = (thread..load.clients).step_by(load.threads);
            runtime.block_on(clients(&load, numbers, &phase))
        }));
    }
    std::thread::sleep(load.warm_up);
    at_start();
    let begun = Instant::now();
    phase.store(MEASURING, Ordering::Relaxed);
    std::thread::sleep(load.measured);
    phase.store(OVER, Ordering::Relaxed);
    let seconds = begun.elapsed().as_secs_f64();
    at_end();
    let mut all = Measured { seconds, ..Measured::default() };
    for thread in threads {
        all.add(thread.join().map_err(|_| io::Error::other("a load thread panicked"))?);
    }
    Ok(all)
}

async fn clients(
    load: &LoadPlan,
    numbers: impl Iterator<Item = usize>,
    phase: &Arc<AtomicU8>,
) -> Measured {
    let tasks: Vec<_> = numbers
        .map(|number| {
            let url = load.urls[number % load.urls.len()].clone();
            tokio::spawn(client(url, RequestGenerator::new(load, number as u64), phase.clone()))
        })
        .collect();
    let mut all = Measured::default();
    for task in tasks {
        match task.await {
            Ok(one) => all.add(one),
            Err(error) => {
                all.errors += 1;
                all.error.get_or_insert(error.to_string());
            }
        }
    }
    all
}

async fn client(url: Url, mut requests: RequestGenerator, phase: Arc<AtomicU8>) -> Measured {
    let mut connection = HttpConnection::new(url);
    let batch = requests.batch as u64;
    let mut measured = Measured::default();
    loop {
        let request = requests.next(connection.url());
        let before = phase.load(Ordering::Relaxed);
        if before == OVER {
            return measured;
        }
        let sent = Instant::now();
        let answer = connection.call(&request, DEADLINE + DEADLINE).await;
        let latency = sent.elapsed();
        let error = match answer {
            Ok(answer) if answer.status == 200 && all_applied(&answer.body, batch) => None,
            Ok(answer) => Some(format!("{} {}", answer.status, start_of(&answer.body))),
            Err(error) => Some(error.to_string()),
        };
        let failed = error.is_some();
        // A request that is in flight when the measured part begins or ends is not counted.
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
            // Without a pause, a server that refuses at once would be called in a hot loop.
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

fn all_applied(body: &[u8], batch: u64) -> bool {
    #[derive(serde::Deserialize)]
    struct AppliedBody {
        applied: u64,
    }
    // The response to a single increment contains its delta, which is 1, like that of a batch of
    // one.
    serde_json::from_slice::<AppliedBody>(body).is_ok_and(|answer| answer.applied == batch)
}

fn start_of(body: &[u8]) -> String {
    String::from_utf8_lossy(&body[..body.len().min(200)]).into_owned()
}

/// Generates the requests of one client, without end.
struct RequestGenerator {
    namespace: String,
    batch: usize,
    media: Media,
    keys: u64,
    random: XorShift64,
    /// The prefix of this client's idempotency keys, and the number of keys so far, if requests
    /// have keys.
    tokens: Option<(String, u64)>,
    /// The path of a single increment, or the body of a batch. The buffer is reused.
    text: String,
}

impl RequestGenerator {
    fn new(load: &LoadPlan, seed: u64) -> Self {
        Self {
            namespace: load.namespace.clone(),
            batch: load.batch,
            media: load.media,
            keys: load.keys,
            random: XorShift64::new(seed),
            tokens: load.keyed.then(|| (token_prefix(seed), 0)),
            text: String::new(),
        }
    }

    fn next(&mut self, url: &Url) -> HttpRequest {
        let Self { namespace, batch, media, keys, random, tokens, text } = self;
        text.clear();
        let token = tokens.as_mut().map(|(prefix, count)| {
            *count += 1;
            IdempotencyHeaders { key: format!("{prefix}-{count}"), issued_at_ms: None }
        });
        let post = |path: &str, media, body: &[u8]| match &token {
            Some(token) => HttpRequest::post_once(url, path, DEADLINE, media, token, body),
            None => HttpRequest::post(url, path, DEADLINE, media, body),
        };
        if *batch == 1 {
            let key = random.below(*keys);
            append(text, format_args!("/v1/counters/{namespace}/k{key}/increment"));
            return post(text, Media::Json, b"");
        }
        match media {
            Media::Text => {
                (0..*batch).for_each(|_| append(text, format_args!("k{}\n", random.below(*keys))));
            }
            Media::Json => {
                text.push_str("{\"increments\":[");
                for index in 0..*batch {
                    let comma = if index == 0 { "" } else { "," };
                    let key = random.below(*keys);
                    append(text, format_args!("{comma}{{\"key\":\"k{key}\",\"delta\":1}}"));
                }
                text.push_str("]}");
            }
        }
        let path = format!("/v1/counters/{namespace}/increment");
        post(&path, *media, text.as_bytes())
    }
}

/// Returns a prefix that differs between runs and between clients.
fn token_prefix(client: u64) -> String {
    let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    format!("bench-{:x}-{client}", since_1970.as_nanos())
}

fn append(text: &mut String, what: std::fmt::Arguments<'_>) {
    text.write_fmt(what).expect("a String takes every character");
}

/// The generator xorshift64*, which is good enough for keys. The seed is fixed, so that each run
/// uses the same keys.
struct XorShift64(u64);

impl XorShift64 {
    fn new(seed: u64) -> Self {
        Self((seed + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        // The high bits are of better quality; a remainder would use the low ones.
        let number = self.0.wrapping_mul(0x2545_f491_4f6c_dd1d);
        ((u128::from(number) * u128::from(limit)) >> 64) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_spread_evenly() {
        let mut seen = [0_u32; 10];
        for client in 0..10 {
            let mut random = XorShift64::new(client);
            (0..1000).for_each(|_| seen[random.below(10) as usize] += 1);
        }
        assert!(seen.iter().all(|&count| (850..1150).contains(&count)), "{seen:?}");
    }
}
