//! The clients: many threads on few counters, through either gateway, as impatient as real ones.
//!
//! Most counters are digit-coded: the i-th add has delta 4^i, so each read names the adds that it
//! holds. One that has had its 31 adds is retired, but still read now and then: from the sorted
//! files, by then. Others see deletes too, and few enough operations for an exhaustive search.
//!
//! An operation with a token is sent three times at least, through both gateways in turn, and again
//! until one answer is definite. It is one operation: whatever befalls its sends, it counts once.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::recorder::Recorder;
use crate::cluster::http::{self, Answer, Client, Error};
use crate::sim::history::{Ask, DIGITS_MAX, Outcome, Use};
use crate::sim::rng::Rng;

pub const NAMESPACE: &str = "sim";
const THREADS: usize = 6;
const PAUSE: Duration = Duration::from_millis(20);
const DIGIT_COUNTERS: usize = 18;
const MIXED_COUNTERS: usize = 6;
/// Operations on a mixed counter. What is unknown stays possible for ever and doubles the search.
const MIXED_OPS: u32 = 12;
const TOKEN_SENDS_MIN: u32 = 3;
/// A token whose outcome is not known by then is given up: unknown.
const TOKEN_PATIENCE: Duration = Duration::from_secs(90);
const MAX_STALENESS: &[u64] = &[50, 500, 5_000];

/// What was against the contract, whatever the numbers say.
pub type Surprises = Arc<Mutex<Vec<String>>>;

#[derive(Default)]
pub struct Counts {
    pub requests: AtomicU64,
    pub sends_with_token: AtomicU64,
    pub replays: AtomicU64,
    pub bounded: AtomicU64,
}

struct Shared {
    recorder: Arc<Recorder>,
    gateways: Vec<String>,
    tokens: bool,
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

pub struct Workload {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Workload {
    pub fn start(
        recorder: Arc<Recorder>,
        gateways: Vec<String>,
        tokens: bool,
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
            tokens,
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

/// Whether the service knows `Idempotency-Key`; before it did, it refused the header by name.
pub fn knows_tokens(gateway: &str) -> Result<bool, String> {
    let path = format!("/v1/counters/{NAMESPACE}-probe/token/increment");
    let headers = [("Idempotency-Key", "\"chaos-probe\"")];
    let answer = Client::new(gateway).call("POST", &path, &headers, b"", http::DEADLINE);
    match answer {
        Ok(answer) if answer.status == 200 => Ok(true),
        Ok(answer) if answer.status == 400 => Ok(false),
        other => Err(format!("asked for a token: {other:?}")),
    }
}

/// One thread's client.
struct Caller {
    shared: Arc<Shared>,
    /// A connection to each gateway.
    clients: Vec<Client>,
    rng: Rng,
}

/// What one request came to.
struct Sent {
    outcome: http::Outcome,
    answer: Option<Answer>,
}

impl Caller {
    fn run(mut self) {
        while !self.shared.stop.load(Ordering::Relaxed) {
            match self.rng.below(100) {
                0..40 => self.add_digit(),
                40..70 => self.read_digits(),
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
        let counter = {
            let mut pools = self.shared.pools();
            let at = self.rng.index(pools.digits.len());
            let (counter, digit) = pools.digits[at];
            pools.digits[at].1 += 1;
            if digit + 1 == DIGITS_MAX {
                pools.retired.push(counter);
                pools.digits[at] = (self.shared.recorder.new_counter(Use::Digits), 0);
            }
            (counter, 1_i64 << (2 * digit))
        };
        let (counter, delta) = counter;
        let ask =
            if self.rng.percent(40) { Ask::AddReturning { delta } } else { Ask::Add { delta } };
        if self.shared.tokens && self.rng.percent(45) {
            self.with_token(counter, ask)
        } else {
            self.once(counter, ask)
        }
    }

    fn read_digits(&mut self) {
        let counter = {
            let pools = self.shared.pools();
            pools.digits[self.rng.index(pools.digits.len())].0
        };
        if self.rng.percent(35) {
            self.read_bounded(counter)
        } else {
            self.once(counter, Ask::Read)
        }
    }

    fn read_retired(&mut self) {
        let retired = self.shared.pools().retired.clone();
        if let Some(counter) = self.rng.pick(&retired) {
            self.once(counter, Ask::Read);
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
        let with_token = self.shared.tokens && ask != Ask::Read && self.rng.percent(40);
        if with_token { self.with_token(counter, ask) } else { self.once(counter, ask) }
    }

    /// Sent once, whatever comes of it.
    fn once(&mut self, counter: usize, ask: Ask) {
        let gateway = self.rng.index(self.clients.len());
        let deadline = self.deadline();
        let id = self.shared.recorder.ask(counter, ask);
        let sent = self.send(gateway, counter, ask, &[], deadline);
        let outcome = self.outcome_of(ask, &sent);
        self.shared.recorder.answer(id, outcome, &json!([told(gateway, &sent)]));
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
        let sent = self.call(gateway, "GET", &path, &[], b"", deadline);
        self.shared.counts.bounded.fetch_add(1, Ordering::Relaxed);
        let outcome = match (&sent.outcome, sent.answer.as_ref().map(|answer| &answer.body)) {
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
        self.shared.recorder.answer(id, outcome, &json!([told(gateway, &sent)]));
    }

    /// Sent again and again with one token, through the gateways in turn, until it is definite and
    /// was sent often enough.
    fn with_token(&mut self, counter: usize, ask: Ask) {
        let id = self.shared.recorder.ask(counter, ask);
        let token = format!("\"op-{id}\"");
        let begun = Instant::now();
        let mut gateway = self.rng.index(self.clients.len());
        let mut first: Option<Outcome> = None;
        let mut any_unknown = false;
        let mut sends = Vec::new();
        for number in 1.. {
            let deadline = if number == 1 { self.deadline() } else { Duration::from_secs(2) };
            let headers = [("Idempotency-Key", token.as_str())];
            let sent = self.send(gateway, counter, ask, &headers, deadline);
            self.shared.counts.sends_with_token.fetch_add(1, Ordering::Relaxed);
            sends.push(told(gateway, &sent));
            let outcome = self.outcome_of(ask, &sent);
            match (&first, outcome) {
                (None, Outcome::Applied(_)) => {
                    first = Some(outcome);
                    self.shared.recorder.answer(id, outcome, &json!(sends));
                }
                (Some(first), Outcome::Applied(_)) => {
                    self.same_again(*first, outcome, &sent, &token)
                }
                (_, Outcome::Unknown) => any_unknown = true,
                _ => {}
            }
            let definite = first.is_some() || !any_unknown;
            if definite && number >= TOKEN_SENDS_MIN || begun.elapsed() > TOKEN_PATIENCE {
                break;
            }
            if !matches!(outcome, Outcome::Applied(_)) {
                std::thread::sleep(Duration::from_millis(100));
            }
            gateway = (gateway + 1) % self.clients.len();
        }
        if first.is_none() {
            // "Not applied" speaks of one request, not of those before it with the same token.
            let outcome = if any_unknown { Outcome::Unknown } else { Outcome::NotApplied };
            self.shared.recorder.answer(id, outcome, &json!(sends));
        }
    }

    /// A token's later answers are the first one's, and say that they are.
    fn same_again(&self, first: Outcome, again: Outcome, sent: &Sent, token: &str) {
        self.shared.counts.replays.fetch_add(1, Ordering::Relaxed);
        let head = sent.answer.as_ref().map(|answer| answer.head.as_str()).unwrap_or_default();
        if first != again {
            self.shared.surprise(format!("token {token} was told {first:?}, then {again:?}"));
        } else if !head.contains("\r\nidempotent-replayed: true") {
            self.shared.surprise(format!("token {token}: a replay that does not say so: {head}"));
        }
    }

    fn send(
        &mut self,
        gateway: usize,
        counter: usize,
        ask: Ask,
        headers: &[(&str, &str)],
        deadline: Duration,
    ) -> Sent {
        let path = format!("/v1/counters/{NAMESPACE}/c{counter}");
        match ask {
            Ask::Add { delta } => {
                let path = format!("{path}/increment?delta={delta}");
                self.call(gateway, "POST", &path, headers, b"", deadline)
            }
            Ask::AddReturning { delta } => {
                let body = json!({"delta": delta, "return": "value"}).to_string();
                self.call(
                    gateway,
                    "POST",
                    &format!("{path}/increment"),
                    headers,
                    body.as_bytes(),
                    deadline,
                )
            }
            Ask::Delete => self.call(gateway, "DELETE", &path, headers, b"", deadline),
            Ask::Read => self.call(gateway, "GET", &path, headers, b"", deadline),
        }
    }

    fn call(
        &mut self,
        gateway: usize,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &[u8],
        deadline: Duration,
    ) -> Sent {
        self.shared.counts.requests.fetch_add(1, Ordering::Relaxed);
        match self.clients[gateway].call(method, path, headers, body, deadline) {
            Ok(answer) => {
                let outcome = answer.outcome_or_surprise().unwrap_or_else(|surprise| {
                    self.shared.surprise(format!("{method} {path} {headers:?}: {surprise}"));
                    http::Outcome::Unknown(surprise)
                });
                Sent { outcome, answer: Some(answer) }
            }
            Err(Error::NotSent(why)) => {
                Sent { outcome: http::Outcome::NotApplied(why.to_string()), answer: None }
            }
            Err(Error::Unanswered(why)) => {
                Sent { outcome: http::Outcome::Unknown(why.to_string()), answer: None }
            }
        }
    }

    /// As the history has it.
    fn outcome_of(&self, ask: Ask, sent: &Sent) -> Outcome {
        match &sent.outcome {
            http::Outcome::NotApplied(_) => Outcome::NotApplied,
            // A read changes nothing.
            http::Outcome::Unknown(_) if ask == Ask::Read => Outcome::NotApplied,
            http::Outcome::Unknown(_) => Outcome::Unknown,
            http::Outcome::Applied => {
                let body = sent.answer.as_ref().map(|answer| &answer.body["value"]);
                let value = body.and_then(number);
                let wants_value = !matches!(ask, Ask::Add { .. });
                if wants_value != value.is_some() {
                    self.shared.surprise(format!("{ask:?} was answered {:?}", sent.answer));
                }
                Outcome::Applied(value.filter(|_| wants_value))
            }
        }
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

fn told(gateway: usize, sent: &Sent) -> Value {
    let outcome = match &sent.outcome {
        http::Outcome::Applied => "applied".to_owned(),
        http::Outcome::NotApplied(why) => format!("not-applied: {why}"),
        http::Outcome::Unknown(why) => format!("unknown: {why}"),
    };
    json!({"gateway": gateway + 1, "outcome": outcome})
}
