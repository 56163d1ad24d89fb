//! One prober per shard: measures the time without an answer and checks Jepsen's bounds for a
//! counter.
//!
//! Each prober is the only writer of its key and sends one request at a time. Therefore
//! `applied ≤ value ≤ applied + unknown` holds at every moment ([`Probe::check`]). After a failure
//! the prober switches to the other gateway: the measurement is about the service, not about the
//! death of one gateway.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::json;

use super::recorder::Recorder;
use super::stalls::Stalls;
use crate::cluster::http::{Client, HttpError, HttpOutcome};
use crate::cluster::load::{Probe, ProbeOp};

pub const NAMESPACE: &str = "probe";
const PAUSE: Duration = Duration::from_millis(30);
const DEADLINE: Duration = Duration::from_millis(500);
/// A prober does not wait for a stopped gateway: otherwise its silence would be measured.
const GRACE: Duration = Duration::from_millis(500);
const WRITES_PER_READ: u64 = 4;
/// A longer silence is reported at once, with the failures that the prober received meanwhile,
/// since the logs should be read then. A lease lasts 2 s, and its loss is noticed within about
/// another.
const REPORTED_FROM: Duration = Duration::from_secs(5);

pub struct Probers {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Probe>>,
}

impl Probers {
    /// Starts a prober for each pair of shard and key.
    pub fn start(
        gateways: &[String],
        keys: impl Iterator<Item = (String, String)>,
        recorder: &Arc<Recorder>,
        stalls: &Stalls,
    ) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let spawn = |(shard, key)| {
            let (stop, gateways) = (stop.clone(), gateways.to_vec());
            let probe = Probe { key, ..Probe::default() };
            let silence = Silence {
                shard,
                recorder: recorder.clone(),
                stalls: stalls.clone(),
                since: Instant::now(),
                failures: BTreeMap::new(),
            };
            std::thread::spawn(move || run(probe, silence, &gateways, &stop))
        };
        let threads = keys.map(spawn).collect();
        Self { stop, threads }
    }

    pub fn stop(self) -> Vec<Probe> {
        self.stop.store(true, Ordering::Relaxed);
        let ended = |thread: JoinHandle<Probe>| match thread.join() {
            Ok(probe) => probe,
            Err(panic) => std::panic::resume_unwind(panic),
        };
        self.threads.into_iter().map(ended).collect()
    }
}

/// The failures that a prober received since its last successful answer.
struct Silence {
    shard: String,
    recorder: Arc<Recorder>,
    stalls: Stalls,
    since: Instant,
    /// The number of failures by gateway and outcome.
    failures: BTreeMap<(usize, String), u64>,
}

impl Silence {
    fn refused(&mut self, gateway: usize, outcome: &HttpOutcome) {
        *self.failures.entry((gateway + 1, format!("{outcome:?}"))).or_default() += 1;
    }

    /// Records a successful answer, which ends the silence.
    fn ends(&mut self) {
        let since = std::mem::replace(&mut self.since, Instant::now());
        let failures = std::mem::take(&mut self.failures);
        let length = since.elapsed();
        if length < REPORTED_FROM {
            return;
        }
        let failures: Vec<_> = failures
            .into_iter()
            .map(|((gateway, what), times)| format!("{times} × gateway-{gateway}: {what}"))
            .collect();
        let Self { shard, recorder, stalls, .. } = self;
        let stalled = stalls.since(since);
        crate::note(&format!(
            "{:>15}  shard {shard} for {:.1} s, of which this machine was stalled for {:.1} s",
            "silence",
            length.as_secs_f32(),
            stalled.as_secs_f32()
        ));
        recorder.note(&json!({
            "silence": shard,
            "ms": length.as_millis() as u64,
            "stalled_ms": stalled.as_millis() as u64,
            "told": failures,
        }));
    }
}

fn run(mut probe: Probe, mut silence: Silence, gateways: &[String], stop: &AtomicBool) -> Probe {
    let client = |gateway: &String| Client::new(gateway).with_grace(GRACE);
    let mut clients: Vec<_> = gateways.iter().map(client).collect();
    let mut gateway = probe.key.len() % clients.len();
    for number in 1_u64.. {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let is_read = number.is_multiple_of(WRITES_PER_READ);
        let path = format!("/v1/counters/{NAMESPACE}/{}", probe.key);
        let sent = Instant::now();
        let answer = if is_read {
            clients[gateway].call("GET", &path, &[], b"", DEADLINE)
        } else {
            clients[gateway].call("POST", &format!("{path}/increment"), &[], b"", DEADLINE)
        };
        let outcome = match &answer {
            Ok(answer) => answer.outcome_or_surprise().unwrap_or_else(|surprise| {
                probe.wrong.push(format!("{}: {surprise}", probe.key));
                HttpOutcome::Unknown(surprise)
            }),
            Err(HttpError::NotSent(why)) => HttpOutcome::NotApplied(why.to_string()),
            Err(HttpError::Unanswered(why)) => HttpOutcome::Unknown(why.to_string()),
        };
        match (&outcome, &answer) {
            (HttpOutcome::Applied, Ok(answer)) if is_read => match answer.body["value"].as_u64() {
                Some(value) => probe.check(value),
                None => probe.wrong.push(format!("{}: {:?}", probe.key, answer.body)),
            },
            (HttpOutcome::Applied, _) => probe.applied += 1,
            (HttpOutcome::Unknown(_), _) if !is_read => probe.unknown += 1,
            _ => {}
        }
        if outcome == HttpOutcome::Applied {
            silence.ends();
        } else {
            silence.refused(gateway, &outcome);
            gateway = (gateway + 1) % clients.len();
        }
        probe.ops.push(ProbeOp { sent, done: Instant::now(), is_read, outcome });
        std::thread::sleep(PAUSE);
    }
    probe
}

/// Returns the times without an answer in a shard that overlap none of these spans.
pub fn silences(probe: &Probe, others: &[(Instant, Instant)]) -> Vec<(Instant, Instant)> {
    let answered = probe.ops.iter().filter(|op| op.outcome == HttpOutcome::Applied);
    let times: Vec<_> = answered.map(|op| op.done).collect();
    let pairs = times.windows(2).map(|pair| (pair[0], pair[1]));
    let is_clear = |&(begun, ended): &(Instant, Instant)| {
        others.iter().all(|&(from, to)| ended <= from || begun >= to)
    };
    pairs.filter(is_clear).collect()
}

/// Returns the longest time without an answer in any shard that overlaps one of these spans, and
/// none of the others. The silence itself must not overlap them, because it may last much longer
/// than the fault that caused it.
pub fn longest_gap(
    probes: &[Probe],
    spans: &[(Instant, Instant)],
    others: &[(Instant, Instant)],
) -> Duration {
    let mut longest = Duration::ZERO;
    for probe in probes {
        let answered = probe.ops.iter().filter(|op| op.outcome == HttpOutcome::Applied);
        let times: Vec<_> = answered.map(|op| op.done).collect();
        for pair in times.windows(2) {
            let overlaps =
                |&(begun, healed): &(Instant, Instant)| pair[0] < healed && pair[1] > begun;
            if spans.iter().any(overlaps) && !others.iter().any(overlaps) {
                longest = longest.max(pair[1] - pair[0]);
            }
        }
    }
    longest
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The prober gets answers at 0 s and at 10 s; one fault lasts from 2 s to 3 s, the other as
    /// given.
    #[track_caller]
    fn check(other: (u64, u64), want: u64) {
        let zero = Instant::now();
        let at = |second| zero + Duration::from_secs(second);
        let op = |second| ProbeOp {
            sent: at(second),
            done: at(second),
            is_read: false,
            outcome: HttpOutcome::Applied,
        };
        let probe = Probe { ops: vec![op(0), op(10), op(11)], ..Probe::default() };
        let gap = longest_gap(&[probe], &[(at(2), at(3))], &[(at(other.0), at(other.1))]);
        assert_eq!(gap, Duration::from_secs(want));
    }

    #[test]
    fn a_silence_that_meets_another_fault_is_not_of_one_alone() {
        check((10, 20), 10);
        check((9, 20), 0);
        check((2, 3), 0);
    }
}
