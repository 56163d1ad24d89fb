//! Clients in a closed or an open loop, for a fixed time.
//!
//! In a closed loop every client sends a request, waits for the answer, and sends the next one. It
//! finds the most that a system does, but its latencies are those of *these* clients. In an open
//! loop requests are due at a fixed rate ([`schedule`](crate::schedule)), and a free client sends
//! the next one.
//!
//! The generator shares the machine with what it measures, so it is kept lean: one thread unless
//! more are requested, and a task per client. Rate and latency count complete answers that applied
//! everything. A definite refusal and an error are counted apart from them and from each other.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde::Serialize;
use tokio::sync::Semaphore;

use crate::histogram::Histogram;
use crate::schedule::Schedule;

/// A client of the system under test, with one request in flight at a time.
pub trait LoadClient: Send + 'static {
    /// Sends the next request and waits for its outcome; `None` if there is nothing more to send.
    fn call(&mut self) -> impl Future<Output = Option<LoadOutcome>> + Send;
}

/// The outcome of a request.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum LoadOutcome {
    /// All of its increments were applied and acknowledged.
    Applied(u64),
    /// A read was answered.
    Read,
    /// The request, or a part of it, was refused, which is safe to send again.
    Refused {
        /// The number of increments that were applied all the same.
        applied: u64,
        /// The answer.
        answer: String,
    },
    /// The answer is wrong, missing, or leaves open what became of the request.
    Failed(String),
}

/// The amount of load, and its duration.
#[derive(Clone, Debug)]
pub struct LoadPlan {
    /// The number of clients, each with one connection.
    pub clients: usize,
    /// The number of threads that run the clients.
    pub threads: usize,
    /// Requests per second of an open loop; `None` for a closed loop.
    pub rate: Option<f64>,
    /// The time before the measured part.
    pub warm_up: Duration,
    /// The time of the measured part.
    pub measured: Duration,
    /// Limits that only tests change.
    pub limits: LoadLimits,
}

/// Limits of a load that are the same in all runs.
#[derive(Clone, Copy, Debug)]
pub struct LoadLimits {
    /// A request of an open loop is late if it was sent this long after it was due.
    pub late_after: Duration,
    /// The shortest pause of an open loop between two looks for due requests.
    pub look_pause: Duration,
    /// The pause of a client of a closed loop after a refusal or an error: a server that refuses at
    /// once would be called in a hot loop.
    pub failure_pause: Duration,
    /// The time that one interval of the timeline covers.
    pub interval: Duration,
}

impl Default for LoadLimits {
    fn default() -> Self {
        Self {
            late_after: Duration::from_millis(1),
            look_pause: Duration::from_micros(100),
            failure_pause: Duration::from_millis(10),
            interval: Duration::from_millis(100),
        }
    }
}

/// The result of a run.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Measured {
    /// The actual duration of the measured part.
    pub seconds: f64,
    /// The number of requests that applied or read everything.
    pub requests: u64,
    /// The number of increments in those requests.
    pub increments: u64,
    /// The number of reads among those requests.
    pub reads: u64,
    /// The number of requests that were refused, at least in part.
    pub refused: u64,
    /// The first refusal, as an example.
    pub refusal: Option<String>,
    /// The number of requests that failed in any other way.
    pub errors: u64,
    /// The first error, as an example.
    pub error: Option<String>,
    /// The number of requests of an open loop that were sent late.
    pub late: u64,
    /// The number of requests of an open loop that were due and never sent.
    pub unsent: u64,
    /// The number of increments that were acknowledged in the whole run, warm-up included.
    pub acknowledged: u64,
    /// The latencies of writes that applied everything.
    #[serde(skip)]
    pub writes: Histogram,
    /// The latencies of reads.
    #[serde(skip)]
    pub gets: Histogram,
    /// The latencies of refusals, from the time at which the request was sent.
    #[serde(skip)]
    pub refusals: Histogram,
    /// The answers in each interval since the measured part began.
    #[serde(skip)]
    pub timeline: Vec<Interval>,
}

/// The answers in one interval of a run.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Serialize)]
pub struct Interval {
    /// Increments and reads.
    pub done: u64,
    /// Requests that were refused.
    pub refused: u64,
    /// Requests that failed.
    pub errors: u64,
    /// The longest latency of what was done.
    pub slowest_micros: u64,
}

impl Measured {
    fn add(&mut self, other: Self) {
        self.requests += other.requests;
        self.increments += other.increments;
        self.reads += other.reads;
        self.refused += other.refused;
        self.refusal = self.refusal.take().or(other.refusal);
        self.errors += other.errors;
        self.error = self.error.take().or(other.error);
        self.late += other.late;
        self.unsent += other.unsent;
        self.acknowledged += other.acknowledged;
        self.writes.merge(&other.writes);
        self.gets.merge(&other.gets);
        self.refusals.merge(&other.refusals);
        let intervals = self.timeline.len().max(other.timeline.len());
        self.timeline.resize(intervals, Interval::default());
        for (mine, theirs) in self.timeline.iter_mut().zip(other.timeline) {
            mine.done += theirs.done;
            mine.refused += theirs.refused;
            mine.errors += theirs.errors;
            mine.slowest_micros = mine.slowest_micros.max(theirs.slowest_micros);
        }
    }

    /// Counts an outcome of the measured part, which came in `interval`.
    fn count(&mut self, outcome: LoadOutcome, latency: Duration, interval: usize) {
        if interval >= self.timeline.len() {
            self.timeline.resize(interval + 1, Interval::default());
        }
        let slot = &mut self.timeline[interval];
        match outcome {
            LoadOutcome::Applied(increments) => {
                self.increments += increments;
                self.writes.record(latency);
            }
            LoadOutcome::Read => {
                self.reads += 1;
                self.gets.record(latency);
            }
            LoadOutcome::Refused { answer, .. } => {
                slot.refused += 1;
                self.refused += 1;
                self.refusal.get_or_insert(answer);
                self.refusals.record(latency);
                return;
            }
            LoadOutcome::Failed(error) => {
                slot.errors += 1;
                self.errors += 1;
                self.error.get_or_insert(error);
                return;
            }
        }
        self.requests += 1;
        slot.done += if let LoadOutcome::Applied(increments) = outcome { increments } else { 1 };
        let micros = u64::try_from(latency.as_micros()).unwrap_or(u64::MAX);
        slot.slowest_micros = slot.slowest_micros.max(micros);
    }
}

/// Runs the load on threads of its own. `client` makes the client of a number. `at_start` and
/// `at_end` are called when the measured part begins and ends, to read what the processes have
/// used. Fails if a thread can't start or panics.
pub fn run<C: LoadClient>(
    plan: &LoadPlan,
    client: impl Fn(usize) -> C,
    at_start: impl FnOnce(),
    at_end: impl FnOnce(),
) -> io::Result<Measured> {
    let started = Instant::now();
    let window = RunTimes {
        started,
        begin: started + plan.warm_up,
        end: started + plan.warm_up + plan.measured,
    };
    let (running, all_ended) = mpsc::channel::<()>();
    let mut threads = Vec::new();
    for thread in 0..plan.threads {
        let numbers = (thread..plan.clients).step_by(plan.threads);
        let clients: Vec<C> = numbers.map(&client).collect();
        threads.push(start_thread(thread, plan, window, clients, running.clone())?);
    }
    drop(running);
    std::thread::sleep(plan.warm_up.saturating_sub(started.elapsed()));
    at_start();
    // The channel is closed once all threads have ended, which they do early if nothing is left.
    let rest = window.end.saturating_duration_since(Instant::now());
    let ended = all_ended.recv_timeout(rest);
    let end = match ended {
        Err(RecvTimeoutError::Disconnected) => Instant::now().min(window.end),
        _ => window.end,
    };
    at_end();
    let seconds = end.saturating_duration_since(window.begin).as_secs_f64();
    let mut all = Measured { seconds, ..Measured::default() };
    for thread in threads {
        all.add(thread.join().map_err(|_| io::Error::other("a load thread panicked"))?);
    }
    Ok(all)
}

/// The times of a run.
#[derive(Clone, Copy, Debug)]
struct RunTimes {
    started: Instant,
    /// The begin of the measured part.
    begin: Instant,
    /// The end of the measured part: nothing is sent after it.
    end: Instant,
}

fn start_thread<C: LoadClient>(
    number: usize,
    plan: &LoadPlan,
    window: RunTimes,
    clients: Vec<C>,
    running: mpsc::Sender<()>,
) -> io::Result<JoinHandle<Measured>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let limits = plan.limits;
    let pacer = plan.rate.map(|rate| Arc::new(Pacer::new(rate / plan.threads as f64)));
    if let Some(pacer) = pacer.clone() {
        // tokio's timer is exact to a millisecond only, which is longer than most answers take.
        std::thread::Builder::new()
            .name(format!("pace-{number}"))
            .spawn(move || pacer.pace(window, limits.look_pause))?;
    }
    std::thread::Builder::new().name(format!("load-{number}")).spawn(move || {
        let _running = running;
        let Some(pacer) = pacer else {
            let each = |client, result| closed(client, window, limits, result);
            return runtime.block_on(together(clients, each));
        };
        let each = |client, result| open(client, pacer.clone(), window, limits, result);
        let mut all = runtime.block_on(together(clients, each));
        all.unsent = pacer.unsent(window);
        all
    })
}

/// Runs all clients of a thread until the last one ends. They share one result: histograms of each
/// client would not fit into a cache.
async fn together<C, F: Future<Output = ()> + Send + 'static>(
    clients: Vec<C>,
    each: impl Fn(C, SharedResult) -> F,
) -> Measured {
    let result = SharedResult::default();
    let start = |client| tokio::spawn(each(client, result.clone()));
    let tasks: Vec<_> = clients.into_iter().map(start).collect();
    for task in tasks {
        if let Err(error) = task.await {
            result.change(|measured| {
                measured.errors += 1;
                measured.error.get_or_insert(error.to_string());
            });
        }
    }
    result.change(std::mem::take)
}

/// The result of the clients of one thread. The lock is never waited for.
#[derive(Clone, Default)]
struct SharedResult(Arc<Mutex<Measured>>);

impl SharedResult {
    fn change<R>(&self, how: impl FnOnce(&mut Measured) -> R) -> R {
        how(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

async fn closed<C: LoadClient>(
    mut client: C,
    window: RunTimes,
    limits: LoadLimits,
    result: SharedResult,
) {
    loop {
        let sent = Instant::now();
        if sent >= window.end {
            return;
        }
        let Some(outcome) = client.call().await else { return };
        let now = Instant::now();
        let is_done = matches!(outcome, LoadOutcome::Applied(_) | LoadOutcome::Read);
        result.change(|measured| {
            measured.acknowledged += acknowledged(&outcome);
            // A request that is in flight when the measured part begins or ends is not counted.
            if sent >= window.begin && now <= window.end {
                measured.count(outcome, now - sent, interval_of(now, window, limits));
            }
        });
        if !is_done {
            tokio::time::sleep(limits.failure_pause).await;
        }
    }
}

async fn open<C: LoadClient>(
    mut client: C,
    pacer: Arc<Pacer>,
    window: RunTimes,
    limits: LoadLimits,
    result: SharedResult,
) {
    while let Some(due) = pacer.next(window).await {
        let (is_measured, sent) = (due >= window.begin, Instant::now());
        let Some(outcome) = client.call().await else { return };
        let now = Instant::now();
        // A refusal is fast or slow from the time at which the server could have known of it.
        let is_refused = matches!(outcome, LoadOutcome::Refused { .. });
        let since = if is_refused { sent } else { due };
        result.change(|measured| {
            measured.acknowledged += acknowledged(&outcome);
            // An answer that comes after the end is counted: to leave out the slowest is to lie.
            if is_measured {
                measured.late += u64::from(sent - due > limits.late_after);
                measured.count(outcome, now - since, interval_of(now, window, limits));
            }
        });
    }
}

fn acknowledged(outcome: &LoadOutcome) -> u64 {
    match outcome {
        LoadOutcome::Applied(increments) | LoadOutcome::Refused { applied: increments, .. } => {
            *increments
        }
        LoadOutcome::Read | LoadOutcome::Failed(_) => 0,
    }
}

fn interval_of(now: Instant, window: RunTimes, limits: LoadLimits) -> usize {
    let since = now.saturating_duration_since(window.begin);
    (since.as_nanos() / limits.interval.as_nanos().max(1)) as usize
}

/// Gives the due requests of one thread to its free clients, in order.
struct Pacer {
    schedule: Schedule,
    /// One permit for each request that is due and not taken by a client.
    due: Semaphore,
    taken: AtomicU64,
}

impl Pacer {
    fn new(rate: f64) -> Self {
        Self { schedule: Schedule::new(rate), due: Semaphore::new(0), taken: AtomicU64::new(0) }
    }

    /// Waits for a request and returns when it was due; `None` after the end.
    async fn next(&self, window: RunTimes) -> Option<Instant> {
        self.due.acquire().await.ok()?.forget();
        let number = self.taken.fetch_add(1, Ordering::Relaxed);
        let due = window.started + self.schedule.due_at(number);
        (due < window.end && Instant::now() < window.end).then_some(due)
    }

    /// Releases requests when they are due, until the end.
    fn pace(&self, window: RunTimes, pause: Duration) {
        let mut released = 0;
        loop {
            let now = Instant::now();
            if now >= window.end {
                return self.due.close();
            }
            let elapsed = now - window.started;
            let due = self.schedule.due_by(elapsed);
            self.due.add_permits((due - released) as usize);
            released = due;
            let next = self.schedule.next_look(released, elapsed, pause);
            let until_end = window.end - window.started;
            std::thread::sleep(next.min(until_end).saturating_sub(window.started.elapsed()));
        }
    }

    /// The number of requests that were due before the end and that no client took.
    fn unsent(&self, window: RunTimes) -> u64 {
        let due = self.schedule.due_by(window.end - window.started);
        due.saturating_sub(self.taken.load(Ordering::Relaxed).max(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Answers after a fixed time, with the outcomes in turn.
    struct FakeClient {
        takes: Duration,
        outcomes: Vec<Option<LoadOutcome>>,
        calls: usize,
    }

    impl LoadClient for FakeClient {
        async fn call(&mut self) -> Option<LoadOutcome> {
            tokio::time::sleep(self.takes).await;
            self.calls += 1;
            self.outcomes[(self.calls - 1) % self.outcomes.len()].clone()
        }
    }

    fn plan(clients: usize, rate: Option<f64>, millis: u64) -> LoadPlan {
        LoadPlan {
            clients,
            threads: 2,
            rate,
            warm_up: Duration::ZERO,
            measured: Duration::from_millis(millis),
            limits: LoadLimits { failure_pause: Duration::ZERO, ..LoadLimits::default() },
        }
    }

    fn measure(plan: &LoadPlan, millis: u64, outcomes: &[Option<LoadOutcome>]) -> Measured {
        let takes = Duration::from_millis(millis);
        let client = |_| FakeClient { takes, outcomes: outcomes.to_vec(), calls: 0 };
        run(plan, client, || (), || ()).unwrap()
    }

    #[test]
    fn outcomes_are_counted_apart() {
        let refused = LoadOutcome::Refused { applied: 2, answer: "429".into() };
        let failed = LoadOutcome::Failed("broken".into());
        let outcomes = [
            Some(LoadOutcome::Applied(5)),
            Some(LoadOutcome::Read),
            Some(refused),
            Some(failed),
            None,
        ];
        let measured = measure(&plan(3, None, 60_000), 1, &outcomes);
        assert_eq!((measured.requests, measured.increments, measured.reads), (6, 15, 3));
        assert_eq!((measured.refused, measured.errors), (3, 3));
        assert_eq!(measured.acknowledged, 21);
        assert_eq!((measured.writes.count(), measured.gets.count()), (3, 3));
        assert_eq!(measured.refusal.as_deref(), Some("429"));
        assert_eq!(measured.error.as_deref(), Some("broken"));
        let done: u64 = measured.timeline.iter().map(|interval| interval.done).sum();
        assert_eq!(done, 18);
        assert!(measured.seconds < 60.0, "a run without clients ends");
    }

    #[test]
    fn a_closed_loop_ends_with_its_time() {
        let measured = measure(&plan(4, None, 100), 1, &[Some(LoadOutcome::Applied(1))]);
        assert!(measured.requests > 0);
        assert_eq!((measured.late, measured.unsent, measured.errors), (0, 0, 0));
        assert_eq!(measured.seconds, 0.1);
    }

    /// One client whose answers take 50 ms, where a request is due every 2 ms: a closed loop would
    /// report 50 ms, but the users waited for much longer.
    #[test]
    fn an_open_loop_measures_from_the_time_at_which_requests_were_due() {
        let plan = LoadPlan { threads: 1, ..plan(1, Some(500.0), 1000) };
        let measured = measure(&plan, 50, &[Some(LoadOutcome::Applied(1))]);
        let slowest = measured.writes.quantile(1.0).unwrap();
        assert!(slowest > Duration::from_millis(500), "{slowest:?}");
        assert!(measured.late >= measured.requests - 1, "{measured:?}");
        let all = measured.requests + measured.unsent;
        assert!((499..=501).contains(&all), "{all} requests were due");
    }

    #[test]
    fn an_open_loop_keeps_its_rate() {
        let measured = measure(&plan(50, Some(200.0), 500), 1, &[Some(LoadOutcome::Applied(1))]);
        let all = measured.requests + measured.unsent;
        assert!((98..=102).contains(&all), "{all} requests were due");
    }
}
