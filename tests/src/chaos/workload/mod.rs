//! The clients: many threads on few counters, through either gateway, with realistic deadlines.
//!
//! Most counters are digit-coded: the i-th add has delta 4^i, so each read shows which adds it
//! contains. A counter with 31 adds is retired and still read now and then, by then from the sorted
//! files. Mixed counters also see deletes, and few enough operations for an exhaustive search.
//!
//! A batch has many adds in one request, each of which is an operation of the history. A request
//! with a token is sent at least three times ([`tokens`]) and must count once, whatever happens to
//! its sends.

mod request;
mod tokens;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::Duration;

use serde_json::{Value, json};

use self::request::{WorkloadRequest, send_record};
use super::recorder::Recorder;
use crate::cluster::http::{Client, HttpOutcome};
use crate::sim::history::{Ask, CounterUse, DIGITS_MAX, OpOutcome};
use crate::sim::rng::Rng;

pub const NAMESPACE: &str = "sim";
const THREADS: usize = 6;
const PAUSE: Duration = Duration::from_millis(20);
const DIGIT_COUNTERS: usize = 18;
const MIXED_COUNTERS: usize = 6;
/// The number of operations on a mixed counter. Each unknown outcome doubles the search.
const MIXED_OPS: u32 = 12;
const BATCH_ITEMS_MAX: u64 = 12;
const MAX_STALENESS: &[u64] = &[50, 500, 5_000];

/// Answers that violate the contract, even if the values are right.
pub type Surprises = Arc<Mutex<Vec<String>>>;

#[derive(Default)]
pub struct RequestCounts {
    pub requests: AtomicU64,
    pub batches: AtomicU64,
    pub items: AtomicU64,
    pub sends_with_token: AtomicU64,
    pub replays: AtomicU64,
    /// The number of requests refused because their token had been applied for another request.
    pub reused: AtomicU64,
    pub bounded: AtomicU64,
}

struct Shared {
    recorder: Arc<Recorder>,
    gateways: Vec<String>,
    stop: AtomicBool,
    surprises: Surprises,
    counts: Arc<RequestCounts>,
    pools: Mutex<Pools>,
}

/// The counters in use: each with the number of its operations so far.
struct Pools {
    digits: Vec<(usize, u32)>,
    mixed: Vec<(usize, u32)>,
    retired: Vec<usize>,
}

impl Pools {
    /// Returns the next add of a counter in use. After its last add the counter is retired and
    /// replaced.
    fn take_digit(&mut self, at: usize, recorder: &Recorder) -> (usize, i64) {
        let (counter, digit) = self.digits[at];
        self.digits[at].1 += 1;
        if digit + 1 == DIGITS_MAX {
            self.retired.push(counter);
            self.digits[at] = (recorder.new_counter(CounterUse::Digits), 0);
        }
        (counter, 1 << (2 * digit))
    }
}

pub struct Workload {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Workload {
    pub fn start(
        recorder: Arc<Recorder>,
        gateways: Vec<String>,
        surprises: Surprises,
        rng: &mut Rng,
    ) -> Self {
        let counters = |used, count| (0..count).map(|_| (recorder.new_counter(used), 0)).collect();
        let pools = Pools {
            digits: counters(CounterUse::Digits, DIGIT_COUNTERS),
            mixed: counters(CounterUse::Mixed, MIXED_COUNTERS),
            retired: Vec::new(),
        };
        let shared = Arc::new(Shared {
            recorder,
            gateways,
            stop: AtomicBool::new(false),
            surprises,
            counts: Arc::default(),
            pools: Mutex::new(pools),
        });
        let spawn = |_| {
            let clients = shared.gateways.iter().map(|gateway| Client::new(gateway)).collect();
            let caller = Caller { shared: shared.clone(), clients, rng: rng.fork() };
            std::thread::spawn(move || caller.run())
        };
        let threads = (0..THREADS).map(spawn).collect();
        Self { shared, threads }
    }

    /// Stops the clients after their operations in flight.
    pub fn stop(self) -> Arc<RequestCounts> {
        self.shared.stop.store(true, Ordering::Relaxed);
        for thread in self.threads {
            if let Err(panic) = thread.join() {
                std::panic::resume_unwind(panic);
            }
        }
        self.shared.counts.clone()
    }
}

/// The client of one thread.
struct Caller {
    shared: Arc<Shared>,
    /// One connection per gateway.
    clients: Vec<Client>,
    rng: Rng,
}

impl Caller {
    fn run(mut self) {
        while !self.shared.stop.load(Ordering::Relaxed) {
            match self.rng.below(100) {
                0..30 => self.add_digit(),
                30..42 => self.add_batch(),
                42..70 => self.read_digits(),
                70..78 => self.read_retired(),
                _ => self.mixed(),
            }
            std::thread::sleep(PAUSE);
        }
    }

    /// Draws a deadline, short or usual.
    fn deadline(&mut self) -> Duration {
        Duration::from_millis(self.rng.pick(&[100, 1_000, 2_000, 2_000]).unwrap_or(2_000))
    }

    fn add_digit(&mut self) {
        let (counter, delta) = self.any_digit();
        let ask =
            if self.rng.percent(40) { Ask::AddReturning { delta } } else { Ask::Add { delta } };
        self.write(&WorkloadRequest::One { counter, ask });
    }

    fn add_batch(&mut self) {
        let items: Vec<_> =
            (0..self.rng.between(2, BATCH_ITEMS_MAX)).map(|_| self.any_digit()).collect();
        let counts = &self.shared.counts;
        counts.batches.fetch_add(1, Ordering::Relaxed);
        counts.items.fetch_add(items.len() as u64, Ordering::Relaxed);
        self.write(&WorkloadRequest::Many { items });
    }

    fn any_digit(&mut self) -> (usize, i64) {
        let mut pools = self.shared.pools();
        let at = self.rng.index(pools.digits.len());
        pools.take_digit(at, &self.shared.recorder)
    }

    /// Sends a write with a token or without one.
    fn write(&mut self, request: &WorkloadRequest) {
        if self.rng.percent(45) { self.with_token(request) } else { self.once(request) }
    }

    fn read_digits(&mut self) {
        let counter = {
            let pools = self.shared.pools();
            pools.digits[self.rng.index(pools.digits.len())].0
        };
        if self.rng.percent(35) {
            self.read_bounded(counter)
        } else {
            self.once(&WorkloadRequest::One { counter, ask: Ask::Read })
        }
    }

    fn read_retired(&mut self) {
        let retired = self.shared.pools().retired.clone();
        if let Some(counter) = self.rng.pick(&retired) {
            self.once(&WorkloadRequest::One { counter, ask: Ask::Read });
        }
    }

    fn mixed(&mut self) {
        let counter = {
            let mut pools = self.shared.pools();
            let at = self.rng.index(pools.mixed.len());
            let (counter, ops) = pools.mixed[at];
            pools.mixed[at].1 += 1;
            if ops + 1 == MIXED_OPS {
                pools.mixed[at] = (self.shared.recorder.new_counter(CounterUse::Mixed), 0);
            }
            counter
        };
        let delta = self.rng.between(1, 9) as i64 - 3;
        let ask = match self.rng.below(10) {
            0..3 => Ask::Add { delta },
            3..6 => Ask::AddReturning { delta },
            6..8 => Ask::Delete,
            _ => Ask::Read,
        };
        let request = WorkloadRequest::One { counter, ask };
        if ask == Ask::Read { self.once(&request) } else { self.write(&request) }
    }

    /// Sends a request once, whatever its outcome.
    fn once(&mut self, request: &WorkloadRequest) {
        let gateway = self.rng.index(self.clients.len());
        let deadline = self.deadline();
        let ids = self.ask(request);
        let sent = self.send(gateway, request, None, deadline);
        for (id, outcome) in ids.into_iter().zip(&sent.outcomes) {
            self.shared.recorder.answer(id, *outcome, &json!([sent.record]));
        }
    }

    /// Records the operations in the history before the request is sent.
    fn ask(&self, request: &WorkloadRequest) -> Vec<usize> {
        let asks = request.asks().into_iter();
        asks.map(|(counter, ask)| self.shared.recorder.ask(counter, ask)).collect()
    }

    fn read_bounded(&mut self, counter: usize) {
        let gateway = self.rng.index(self.clients.len());
        let max = self.rng.pick(MAX_STALENESS).unwrap_or(500);
        let id = self.shared.recorder.ask(counter, Ask::Read);
        let asked_at = self.shared.recorder.now();
        let path = format!(
            "/v1/counters/{NAMESPACE}/c{counter}?consistency=bounded&max_staleness_ms={max}"
        );
        let deadline = self.deadline();
        let (outcome, answer) = self.call(gateway, "GET", &path, &[], b"", deadline);
        self.shared.counts.bounded.fetch_add(1, Ordering::Relaxed);
        let read = match (&outcome, answer.as_ref().map(|answer| &answer.body)) {
            (HttpOutcome::Applied, Some(body)) => {
                match (number(&body["value"]), body["staleness_ms"].as_u64()) {
                    (Some(value), Some(age)) if age <= max => {
                        // The age is measured at the answer, which is not before the request.
                        let as_of = asked_at.saturating_sub(1_000 * age);
                        OpOutcome::Stale { value, as_of }
                    }
                    _ => {
                        self.shared
                            .surprise(format!("a read bounded by {max} ms was answered {body}"));
                        OpOutcome::Unknown
                    }
                }
            }
            _ => OpOutcome::NotApplied,
        };
        self.shared.recorder.answer(id, read, &json!([send_record(gateway, &outcome, &[read])]));
    }
}

impl Shared {
    fn pools(&self) -> MutexGuard<'_, Pools> {
        self.pools.lock().unwrap_or_else(|failed| failed.into_inner())
    }

    fn surprise(&self, what: String) {
        self.recorder.note(&json!({"surprise": what}));
        self.surprises.lock().unwrap_or_else(|failed| failed.into_inner()).push(what);
    }
}

/// Parses a value. A sum of 31 digits fits; for any other value an inexact number is good enough,
/// since it is wrong in any case.
pub fn number(value: &Value) -> Option<i128> {
    let whole = value.as_i64().map(i128::from).or(value.as_u64().map(i128::from));
    whole.or(value.as_f64().map(|number| number as i128))
}
