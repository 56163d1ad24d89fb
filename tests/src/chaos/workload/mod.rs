//! The clients: many threads on few counters, through either gateway, as impatient as real ones.
//!
//! Most counters are digit-coded: the i-th add has delta 4^i, so each read names the adds that it
//! holds. One that has had its 31 adds is retired, but still read now and then: from the sorted
//! files, by then. Others see deletes too, and few enough operations for an exhaustive search.
//!
//! A batch is many adds in one request: each is an operation of the history. A request with a token is
//! sent three times at least ([`tokens`]), and is still one: whatever befalls its sends, it counts once.

mod request;
mod tokens;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::Duration;

use serde_json::{Value, json};

use self::request::{Request, told};
use super::recorder::Recorder;
use crate::cluster::http::{self, Client};
use crate::sim::history::{Ask, DIGITS_MAX, Outcome, Use};
use crate::sim::rng::Rng;

pub const NAMESPACE: &str = "sim";
const THREADS: usize = 6;
const PAUSE: Duration = Duration::from_millis(20);
const DIGIT_COUNTERS: usize = 18;
const MIXED_COUNTERS: usize = 6;
/// Operations on a mixed counter. What is unknown stays possible for ever and doubles the search.
const MIXED_OPS: u32 = 12;
const BATCH_ITEMS_MAX: u64 = 12;
const MAX_STALENESS: &[u64] = &[50, 500, 5_000];

/// What was against the contract, whatever the numbers say.
pub type Surprises = Arc<Mutex<Vec<String>>>;

#[derive(Default)]
pub struct Counts {
    pub requests: AtomicU64,
    pub batches: AtomicU64,
    pub items: AtomicU64,
    pub sends_with_token: AtomicU64,
    pub replays: AtomicU64,
    /// Requests refused because their token had been applied for another.
    pub reused: AtomicU64,
    pub bounded: AtomicU64,
}

struct Shared {
    recorder: Arc<Recorder>,
    gateways: Vec<String>,
    stop: AtomicBool,
    surprises: Surprises,
    counts: Arc<Counts>,
    pools: Mutex<Pools>,
}

/// Which counters are in use.
struct Pools {
    digits: Vec<(usize, u32)>,
    mixed: Vec<(usize, u32)>,
    retired: Vec<usize>,
}

impl Pools {
    /// The next add of a counter in use; the counter of the last one is retired, and replaced.
    fn take_digit(&mut self, at: usize, recorder: &Recorder) -> (usize, i64) {
        let (counter, digit) = self.digits[at];
        self.digits[at].1 += 1;
        if digit + 1 == DIGITS_MAX {
            self.retired.push(counter);
            self.digits[at] = (recorder.new_counter(Use::Digits), 0);
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
            digits: counters(Use::Digits, DIGIT_COUNTERS),
            mixed: counters(Use::Mixed, MIXED_COUNTERS),
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

    /// Lets every operation that is out come to its end.
    pub fn stop(self) -> Arc<Counts> {
        self.shared.stop.store(true, Ordering::Relaxed);
        for thread in self.threads {
            if let Err(panic) = thread.join() {
                std::panic::resume_unwind(panic);
            }
        }
        self.shared.counts.clone()
    }
}

/// One thread's client.
struct Caller {
    shared: Arc<Shared>,
    /// A connection to each gateway.
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

    /// Deadlines like those of clients with and without patience.
    fn deadline(&mut self) -> Duration {
        Duration::from_millis(self.rng.pick(&[100, 1_000, 2_000, 2_000]).unwrap_or(2_000))
    }

    fn add_digit(&mut self) {
        let (counter, delta) = self.any_digit();
        let ask =
            if self.rng.percent(40) { Ask::AddReturning { delta } } else { Ask::Add { delta } };
        self.write(&Request::One { counter, ask });
    }

    fn add_batch(&mut self) {
        let items: Vec<_> =
            (0..self.rng.between(2, BATCH_ITEMS_MAX)).map(|_| self.any_digit()).collect();
        let counts = &self.shared.counts;
        counts.batches.fetch_add(1, Ordering::Relaxed);
        counts.items.fetch_add(items.len() as u64, Ordering::Relaxed);
        self.write(&Request::Many { items });
    }

    fn any_digit(&mut self) -> (usize, i64) {
        let mut pools = self.shared.pools();
        let at = self.rng.index(pools.digits.len());
        pools.take_digit(at, &self.shared.recorder)
    }

    /// With a token or without.
    fn write(&mut self, request: &Request) {
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
            self.once(&Request::One { counter, ask: Ask::Read })
        }
    }

    fn read_retired(&mut self) {
        let retired = self.shared.pools().retired.clone();
        if let Some(counter) = self.rng.pick(&retired) {
            self.once(&Request::One { counter, ask: Ask::Read });
        }
    }

    fn mixed(&mut self) {
        let counter = {
            let mut pools = self.shared.pools();
            let at = self.rng.index(pools.mixed.len());
            let (counter, ops) = pools.mixed[at];
            pools.mixed[at].1 += 1;
            if ops + 1 == MIXED_OPS {
                pools.mixed[at] = (self.shared.recorder.new_counter(Use::Mixed), 0);
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
        let request = Request::One { counter, ask };
        if ask == Ask::Read { self.once(&request) } else { self.write(&request) }
    }

    /// Sent once, whatever comes of it.
    fn once(&mut self, request: &Request) {
        let gateway = self.rng.index(self.clients.len());
        let deadline = self.deadline();
        let ids = self.ask(request);
        let sent = self.send(gateway, request, None, deadline);
        for (id, outcome) in ids.into_iter().zip(&sent.outcomes) {
            self.shared.recorder.answer(id, *outcome, &json!([sent.told]));
        }
    }

    /// The questions go into the history before the request leaves.
    fn ask(&self, request: &Request) -> Vec<usize> {
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
            (http::Outcome::Applied, Some(body)) => {
                match (number(&body["value"]), body["staleness_ms"].as_u64()) {
                    (Some(value), Some(age)) if age <= max => {
                        // Its age is that of the moment it was answered, no earlier than it was asked.
                        let as_of = asked_at.saturating_sub(1_000 * age);
                        Outcome::Stale { value, as_of }
                    }
                    _ => {
                        self.shared.surprise(format!("a read bounded by {max} ms was told {body}"));
                        Outcome::Unknown
                    }
                }
            }
            _ => Outcome::NotApplied,
        };
        self.shared.recorder.answer(id, read, &json!([told(gateway, &outcome, &[read])]));
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

/// A sum of 31 digits fits; what does not is no such sum, and any wrong number will do for it.
pub fn number(value: &Value) -> Option<i128> {
    let whole = value.as_i64().map(i128::from).or(value.as_u64().map(i128::from));
    whole.or(value.as_f64().map(|number| number as i128))
}
