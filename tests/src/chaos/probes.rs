//! A prober for each shard: how long it goes without an answer, and Jepsen's bounds for a counter.
//!
//! Each has one key, which nobody else writes, and asks one thing at a time; so it knows at every
//! moment that `known applied ≤ value ≤ applied + unknown` ([`Probe::check`]). After a failure it
//! turns to the other gateway: what is measured is the service, not one gateway's death.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::cluster::http::{Client, Error, Outcome};
use crate::cluster::load::{Op, Probe};

pub const NAMESPACE: &str = "probe";
const PAUSE: Duration = Duration::from_millis(30);
const DEADLINE: Duration = Duration::from_millis(500);
const WRITES_PER_READ: u64 = 4;

pub struct Probers {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Probe>>,
}

impl Probers {
    pub fn start(gateways: &[String], keys: &[String]) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let spawn = |key: &String| {
            let (stop, gateways) = (stop.clone(), gateways.to_vec());
            let probe = Probe { key: key.clone(), ..Probe::default() };
            std::thread::spawn(move || run(probe, &gateways, &stop))
        };
        let threads = keys.iter().map(spawn).collect();
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

fn run(mut probe: Probe, gateways: &[String], stop: &AtomicBool) -> Probe {
    let mut clients: Vec<_> = gateways.iter().map(|gateway| Client::new(gateway)).collect();
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
                Outcome::Unknown(surprise)
            }),
            Err(Error::NotSent(why)) => Outcome::NotApplied(why.to_string()),
            Err(Error::Unanswered(why)) => Outcome::Unknown(why.to_string()),
        };
        match (&outcome, &answer) {
            (Outcome::Applied, Ok(answer)) if is_read => match answer.body["value"].as_u64() {
                Some(value) => probe.check(value),
                None => probe.wrong.push(format!("{}: {:?}", probe.key, answer.body)),
            },
            (Outcome::Applied, _) => probe.applied += 1,
            (Outcome::Unknown(_), _) if !is_read => probe.unknown += 1,
            _ => {}
        }
        if outcome != Outcome::Applied {
            gateway = (gateway + 1) % clients.len();
        }
        probe.ops.push(Op { sent, done: Instant::now(), is_read, outcome });
        std::thread::sleep(PAUSE);
    }
    probe
}

/// The longest time without an answer in each shard that overlaps one of these spans.
pub fn longest_gap(probes: &[Probe], spans: &[(Instant, Instant)]) -> Duration {
    let mut longest = Duration::ZERO;
    for probe in probes {
        let answered = probe.ops.iter().filter(|op| op.outcome == Outcome::Applied);
        let times: Vec<_> = answered.map(|op| op.done).collect();
        for pair in times.windows(2) {
            let during = spans.iter().any(|&(begun, healed)| pair[0] < healed && pair[1] > begun);
            if during {
                longest = longest.max(pair[1] - pair[0]);
            }
        }
    }
    longest
}
