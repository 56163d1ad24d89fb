//! Draws faults by seed, begins and heals them on time, and keeps the processes running meanwhile.
//!
//! Every kind occurs once, in an order drawn from the seed, before any occurs again. Most faults
//! overlap: up to three at once, with different beginnings. A fault that costs a replica its data
//! occurs alone, and only in a cluster whose replicas are all in sync (see
//! [`faults`](super::faults)).
//!
//! The same seed gives the same faults to the same victims in the same order. The state of the
//! cluster at that moment depends on the machine: a run is repeated, not replayed.

use std::time::{Duration, Instant};

use serde_json::json;

use super::faults::{Environment, Fault, FaultSpec};
use super::fleet::{ProcessEnd, REPLICAS};
use super::recorder::Recorder;
use crate::cluster;
use crate::sim::rng::Rng;

const TICK: Duration = Duration::from_millis(50);
/// The longest wait for all replicas in sync, before a fault that occurs alone (which is skipped
/// after that time) and after it (which is not an error: the end of the run checks the same).
const WHOLE_WITHIN: Duration = Duration::from_secs(60);
/// A time longer than a lease lasts (TTL), a start takes after a kill (TTL + 1 s), and the
/// notifications of both take.
const SETTLES: Duration = Duration::from_secs(5);
const OVERLAPPING_MAX: u64 = 3;
/// The number of faults of maximum length that fit into a run one after the other. Since faults
/// overlap, each kind occurs at least once within two minutes.
const KINDS_MIN: u32 = 24;
/// The maximum time in milliseconds between the beginnings of two overlapping faults.
const BEGIN_WITHIN: u64 = 2_000;

/// A fault that is over, with its beginning and end.
#[derive(Clone, Debug)]
pub struct FaultSpan {
    pub kind: &'static str,
    pub begun: Instant,
    pub healed: Instant,
}

struct Active {
    kind: &'static FaultSpec,
    fault: Box<dyn Fault>,
    begins: Instant,
    lasts: Duration,
    begun: Option<Instant>,
}

pub struct Nemesis<'a> {
    pub env: Environment,
    recorder: &'a Recorder,
    kinds: Vec<&'static FaultSpec>,
    bag: Vec<&'static FaultSpec>,
    /// The maximum length of a fault, so that none takes much of a short run.
    lasts_max: Duration,
    /// Random numbers for kinds and times; victims are drawn with those of the environment.
    rng: Rng,
    pub spans: Vec<FaultSpan>,
    pub skipped: Vec<String>,
    pub ends: Vec<ProcessEnd>,
}

impl<'a> Nemesis<'a> {
    pub fn new(
        env: Environment,
        kinds: Vec<&'static FaultSpec>,
        length: Duration,
        recorder: &'a Recorder,
        rng: Rng,
    ) -> Self {
        Self {
            env,
            recorder,
            kinds,
            bag: Vec::new(),
            lasts_max: length / KINDS_MIN,
            rng,
            spans: Vec::new(),
            skipped: Vec::new(),
            ends: Vec::new(),
        }
    }

    /// Injects faults until that moment. All of them are healed when this returns.
    pub fn run(&mut self, until: Instant) {
        while Instant::now() < until && !self.kinds.is_empty() {
            let first = self.next_kind();
            if first.alone {
                self.alone(first, until);
                continue;
            }
            let mut overlapping = vec![first];
            for _ in 1..self.rng.between(1, OVERLAPPING_MAX) {
                let next = self.next_kind();
                if next.alone || overlapping.iter().any(|one| one.name == next.name) {
                    self.bag.push(next);
                    break;
                }
                overlapping.push(next);
            }
            self.together(overlapping);
            let rest = self.rng.below(3_000);
            self.rest(Duration::from_millis(rest));
        }
    }

    fn next_kind(&mut self) -> &'static FaultSpec {
        if self.bag.is_empty() {
            self.bag = self.kinds.clone();
            self.rng.shuffle(&mut self.bag);
        }
        self.bag.pop().expect("it was just filled")
    }

    fn alone(&mut self, kind: &'static FaultSpec, until: Instant) {
        let wait = WHOLE_WITHIN.min(until.saturating_duration_since(Instant::now()));
        if let Err(why) = self.wait_until_whole(wait) {
            self.skip(kind, &why);
            return;
        }
        self.together(vec![kind]);
        // A failure is ignored here, because the end of the run checks the same condition.
        let _judged_in_the_end = self.wait_until_whole(WHOLE_WITHIN);
    }

    fn skip(&mut self, kind: &FaultSpec, why: &str) {
        self.recorder.note(&json!({"skipped": kind.name, "why": why}));
        self.skipped.push(format!("{}: {why}", kind.name));
    }

    /// Begins the faults one after the other and heals each after its duration.
    fn together(&mut self, kinds: Vec<&'static FaultSpec>) {
        let mut begins = Instant::now();
        let mut active: Vec<_> = kinds
            .into_iter()
            .map(|kind| {
                let (least, most) = kind.lasts;
                let most = most.min(self.lasts_max.as_millis() as u64).max(least);
                let lasts = Duration::from_millis(self.rng.between(least, most));
                let one = Active { kind, fault: (kind.make)(), begins, lasts, begun: None };
                begins += Duration::from_millis(self.rng.below(BEGIN_WITHIN));
                one
            })
            .collect();
        while !active.is_empty() {
            let mut left = Vec::new();
            for mut one in active {
                let goes_on = match one.begun {
                    None if one.begins > Instant::now() => true,
                    None => self.begin(&mut one),
                    Some(begun) if begun.elapsed() < one.lasts => {
                        one.fault.tick(&mut self.env);
                        true
                    }
                    Some(begun) => {
                        self.heal(&mut one, begun);
                        false
                    }
                };
                if goes_on {
                    left.push(one);
                }
            }
            active = left;
            self.tick();
        }
    }

    fn begin(&mut self, one: &mut Active) -> bool {
        let begun = Instant::now();
        match one.fault.begin(&mut self.env) {
            Ok(what) => {
                let lasts_ms = one.lasts.as_millis() as u64;
                let line = json!({"fault": one.kind.name, "what": what, "lasts_ms": lasts_ms});
                self.recorder.note(&line);
                crate::note(&format!(
                    "{:>15}  {what}  ({:.1} s)",
                    one.kind.name,
                    one.lasts.as_secs_f32()
                ));
                // The time before the call counts, since a fault may take effect before `begin`
                // returns.
                one.begun = Some(begun);
                true
            }
            Err(why) => {
                self.skip(one.kind, &why);
                false
            }
        }
    }

    fn heal(&mut self, one: &mut Active, begun: Instant) {
        one.fault.heal(&mut self.env);
        self.recorder.note(&json!({"healed": one.kind.name}));
        self.spans.push(FaultSpan { kind: one.kind.name, begun, healed: Instant::now() });
    }

    fn rest(&mut self, lasts: Duration) {
        let until = Instant::now() + lasts;
        while Instant::now() < until {
            self.tick();
        }
    }

    /// Checks the processes once and restarts those that ended.
    fn tick(&mut self) {
        self.env.fleet.watch();
        for end in self.env.fleet.ends() {
            self.recorder
                .note(&json!({"ended": end.name, "how": end.how, "explained": end.explained}));
            self.ends.push(end);
        }
        std::thread::sleep(TICK);
    }

    /// Waits until every shard is open with all its replicas in sync, and keeps the processes
    /// running.
    ///
    /// Every process must have run for a while, since a killed node counts as in sync until its
    /// death is detected.
    pub fn wait_until_whole(&mut self, limit: Duration) -> Result<(), String> {
        let gateways = self.env.fleet.gateways();
        let begun = Instant::now();
        loop {
            self.tick();
            let whole = || -> Result<(), String> {
                cluster::shards(&gateways)?.iter().try_for_each(|shard| shard.is_full(REPLICAS))
            };
            let down = self.env.fleet.members.iter().find(|one| !one.has_run_for(SETTLES));
            let why = match (whole(), down) {
                (Err(why), _) => why,
                (Ok(()), Some(down)) => format!("{} has not run for {SETTLES:?}", down.name),
                (Ok(()), None) => return Ok(()),
            };
            if begun.elapsed() > limit {
                return Err(why);
            }
        }
    }
}
