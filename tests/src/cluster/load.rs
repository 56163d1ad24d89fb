//! Steady load with one prober per shard, and the results of the probers.
//!
//! Every prober is the only writer of one key and sends one request at a time. Therefore
//! `applied ≤ value ≤ applied + unknown` holds for its counter at every moment. The prober checks
//! this by linearizable reads during the load and once at the end. A lost increment breaks the
//! lower bound; one that is counted twice, or refused and counted nevertheless, breaks the upper
//! bound.
//!
//! The pauses between requests keep a small machine idle enough for measurements. They limit the
//! precision of the longest time without an answer.

use std::fmt::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::http::{Client, HttpError, HttpOutcome};
use super::until;

const PAUSE: Duration = Duration::from_millis(3);
/// The pause after a refusal, since a frozen shard would otherwise get requests in a busy loop.
const PAUSE_REFUSED: Duration = Duration::from_millis(20);
/// One of so many requests is a read.
const WRITES_PER_READ: u64 = 4;

/// One request of a prober.
#[derive(Clone, Debug)]
pub struct ProbeOp {
    pub sent: Instant,
    pub done: Instant,
    pub is_read: bool,
    pub outcome: HttpOutcome,
}

/// The requests and observations of a prober.
#[derive(Clone, Debug, Default)]
pub struct Probe {
    pub key: String,
    pub ops: Vec<ProbeOp>,
    /// The number of increments that were applied.
    pub applied: u64,
    /// The number of increments with an unknown outcome.
    pub unknown: u64,
    /// Descriptions of the reads outside the bounds.
    pub wrong: Vec<String>,
}

/// Running probers.
pub struct Load {
    namespace: String,
    stop: Arc<AtomicBool>,
    /// The number of applied increments so far, for each prober.
    applied: Vec<Arc<AtomicU64>>,
    threads: Vec<JoinHandle<Probe>>,
}

/// The results of a load.
pub struct Probes {
    namespace: String,
    /// The results of all probers, in the order of the keys.
    pub all: Vec<Probe>,
}

impl Load {
    /// Starts a prober for each key; the probers are spread over the gateways (`host:port`).
    pub fn start(gateways: &[String], namespace: &str, keys: &[String]) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let mut load = Self {
            namespace: namespace.to_owned(),
            stop: stop.clone(),
            applied: Vec::new(),
            threads: Vec::new(),
        };
        for (number, key) in keys.iter().enumerate() {
            let applied = Arc::new(AtomicU64::new(0));
            load.applied.push(applied.clone());
            let client = Client::new(&gateways[number % gateways.len()]);
            let prober = Prober {
                client,
                namespace: namespace.to_owned(),
                probe: Probe { key: key.clone(), ..Probe::default() },
            };
            let stop = stop.clone();
            load.threads.push(std::thread::spawn(move || prober.run(&stop, &applied)));
        }
        load
    }

    /// Waits until every prober has had `count` more increments applied than now.
    #[track_caller]
    pub fn wait_for_all(&self, count: u64, limit: Duration) {
        let read = |one: &Arc<AtomicU64>| one.load(Ordering::Relaxed);
        let before: Vec<_> = self.applied.iter().map(read).collect();
        until(limit, || {
            let now = self.applied.iter().map(read).zip(&before);
            let waiting = now.filter(|&(now, &before)| now < before + count).count();
            if waiting == 0 { Ok(()) } else { Err(format!("{waiting} shards make no progress")) }
        });
    }

    /// Stops the probers after their requests in flight.
    pub fn stop(self) -> Probes {
        self.stop.store(true, Ordering::Relaxed);
        let ended = |thread: JoinHandle<Probe>| match thread.join() {
            Ok(probe) => probe,
            Err(panic) => std::panic::resume_unwind(panic),
        };
        Probes { namespace: self.namespace, all: self.threads.into_iter().map(ended).collect() }
    }
}

struct Prober {
    client: Client,
    namespace: String,
    probe: Probe,
}

impl Prober {
    fn run(mut self, stop: &AtomicBool, applied: &AtomicU64) -> Probe {
        for number in 1_u64.. {
            if stop.load(Ordering::Relaxed) {
                break;
            }
            let is_read = number.is_multiple_of(WRITES_PER_READ);
            let sent = Instant::now();
            let outcome = if is_read { self.read() } else { self.increment() };
            let pause = if outcome == HttpOutcome::Applied { PAUSE } else { PAUSE_REFUSED };
            self.probe.ops.push(ProbeOp { sent, done: Instant::now(), is_read, outcome });
            applied.store(self.probe.applied, Ordering::Relaxed);
            std::thread::sleep(pause);
        }
        self.probe
    }

    fn increment(&mut self) -> HttpOutcome {
        let outcome = match self.client.increment(&self.namespace, &self.probe.key, 1) {
            Ok(answer) => answer.outcome(),
            Err(HttpError::NotSent(error)) => HttpOutcome::NotApplied(error.to_string()),
            Err(HttpError::Unanswered(error)) => HttpOutcome::Unknown(error.to_string()),
        };
        match outcome {
            HttpOutcome::Applied => self.probe.applied += 1,
            HttpOutcome::NotApplied(_) => {}
            HttpOutcome::Unknown(_) => self.probe.unknown += 1,
        }
        outcome
    }

    fn read(&mut self) -> HttpOutcome {
        match self.client.value(&self.namespace, &self.probe.key) {
            Ok(Ok(value)) => {
                self.probe.check(value);
                HttpOutcome::Applied
            }
            Ok(Err(answer)) => answer.outcome(),
            Err(HttpError::NotSent(error) | HttpError::Unanswered(error)) => {
                HttpOutcome::NotApplied(error.to_string())
            }
        }
    }
}

impl Probe {
    /// Records a value that is outside the bounds.
    pub fn check(&mut self, value: u64) {
        let Self { key, applied, unknown, wrong, .. } = self;
        if !(*applied..=*applied + *unknown).contains(&value) {
            wrong.push(format!("{key}: {value}, but {applied} applied and {unknown} unknown"));
        }
    }

    /// Returns the longest time without a 200, from the last one before `from` to the end of the
    /// run.
    ///
    /// The time from the last 200 before `from` to the first one after it is not enough: an answer
    /// that was in flight at `from` may arrive right after it, and hide the gap that follows.
    pub fn gap(&self, from: Instant) -> Option<Duration> {
        let answered = self.ops.iter().filter(|op| op.outcome == HttpOutcome::Applied);
        let times: Vec<_> = answered.map(|op| op.done).collect();
        let first = times.iter().rposition(|&done| done <= from)?;
        // The end of the run counts as an answer: otherwise a final silence would be no gap.
        let end = self.ops.last()?.done;
        let after = times[first + 1..].iter().copied().chain([end]);
        let pairs = times[first..].iter().zip(after);
        pairs.map(|(&one, next)| next.duration_since(one)).max()
    }
}

impl Probes {
    /// Checks that every read was within its bounds, and that the final value of each counter is.
    #[track_caller]
    pub fn check(mut self, gateway: &str) {
        let mut client = Client::new(gateway);
        for probe in &mut self.all {
            let mut value = None;
            // A shard that was just promoted may refuse a read for a moment.
            until(Duration::from_secs(30), || match client.value(&self.namespace, &probe.key) {
                Ok(Ok(read)) => {
                    value = Some(read);
                    Ok(())
                }
                other => Err(format!("{} can't be read: {other:?}", probe.key)),
            });
            probe.check(value.expect("it was read"));
            assert!(probe.applied > 0, "{}: no increment was applied", probe.key);
        }
        let wrong: Vec<_> = self.all.iter().flat_map(|probe| &probe.wrong).collect();
        assert!(wrong.is_empty(), "{wrong:#?}");
    }

    /// Checks that every request was answered with 200.
    #[track_caller]
    pub fn all_applied(&self) {
        let mut failed = String::new();
        for (probe, op) in self.ops().filter(|(_, op)| op.outcome != HttpOutcome::Applied) {
            let took = op.done.duration_since(op.sent);
            let what = if op.is_read { "read" } else { "increment" };
            writeln!(failed, "{}: {what}, {took:?}, {:?}", probe.key, op.outcome).expect("memory");
        }
        assert!(failed.is_empty(), "requests failed:\n{failed}");
    }

    /// Returns every request with its prober.
    pub fn ops(&self) -> impl Iterator<Item = (&Probe, &ProbeOp)> {
        self.all.iter().flat_map(|probe| probe.ops.iter().map(move |op| (probe, op)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A prober with answers at these times in ms; negative times are refusals.
    fn probe(times: &[i64], begun: Instant) -> Probe {
        let op = |&at: &i64| {
            let done = begun + Duration::from_millis(at.unsigned_abs());
            let refused = HttpOutcome::NotApplied(String::new());
            let outcome = if at < 0 { refused } else { HttpOutcome::Applied };
            ProbeOp { sent: done, done, is_read: false, outcome }
        };
        Probe { ops: times.iter().map(op).collect(), ..Probe::default() }
    }

    #[test]
    fn gaps() {
        #[track_caller]
        fn check(times: &[i64], from: u64, want: Option<u64>) {
            let begun = Instant::now();
            let gap = probe(times, begun).gap(begun + Duration::from_millis(from));
            assert_eq!(gap, want.map(Duration::from_millis));
        }
        check(&[10, 20, 30], 25, Some(10));
        check(&[10, 20, 130, 140], 25, Some(110));
        // An answer just after the kill, then a long silence.
        check(&[10, 20, 26, 326, 330], 25, Some(300));
        // Refusals do not end a gap.
        check(&[10, 20, -50, -90, 120], 25, Some(100));
        // No more answers.
        check(&[10, 20, -50, -990], 25, Some(970));
        check(&[30], 25, None);
    }

    #[test]
    fn bounds() {
        #[track_caller]
        fn check(value: u64, is_right: bool) {
            let mut probe = Probe { applied: 5, unknown: 2, ..Probe::default() };
            probe.check(value);
            assert_eq!(probe.wrong.is_empty(), is_right);
        }
        check(4, false);
        check(5, true);
        check(7, true);
        check(8, false);
    }
}
