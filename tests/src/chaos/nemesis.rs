//! Draws faults by seed, begins and heals them in time, and keeps the processes running meanwhile.
//!
//! Every kind comes once, in an order of the seed's, before any comes again. Most begin in company:
//! up to three at once, not at the same moment. Those that cost a replica its data come alone, and
//! only into a cluster that is whole (see [`faults`](super::faults)).
//!
//! The seed gives the same faults to the same victims in the same order. What they meet depends on
//! the machine: a run is repeated, not replayed.

use std::time::{Duration, Instant};

use serde_json::json;

use super::faults::{Fault, Field, Kind};
use super::fleet::{End, REPLICAS};
use super::recorder::Recorder;
use crate::cluster;
use crate::sim::rng::Rng;

const TICK: Duration = Duration::from_millis(50);
/// Before a fault that comes alone, and after it. Beyond it is skipped; the end of a run judges.
const WHOLE_WITHIN: Duration = Duration::from_secs(60);
/// Longer than a lease lasts (TTL), a start takes after a kill (TTL + 1 s), and the news of both.
const SETTLES: Duration = Duration::from_secs(5);
const COMPANY_MAX: u64 = 3;
/// So many of the longest faults fit into a run, one after the other: then each kind comes at least
/// once within two minutes, as they come in company.
const KINDS_MIN: u32 = 24;
/// The later ones of a company begin within this many milliseconds.
const BEGIN_WITHIN: u64 = 2_000;

/// A fault that was.
#[derive(Clone, Debug)]
pub struct Span {
    pub kind: &'static str,
    pub begun: Instant,
    pub healed: Instant,
}

struct Active {
    kind: &'static Kind,
    fault: Box<dyn Fault>,
    begins: Instant,
    lasts: Duration,
    begun: Option<Instant>,
}

pub struct Nemesis<'a> {
    pub field: Field,
    recorder: &'a Recorder,
    kinds: Vec<&'static Kind>,
    bag: Vec<&'static Kind>,
    /// No fault of a short run takes much of it.
    lasts_max: Duration,
    /// Choices of when and what; those of whom are the field's.
    rng: Rng,
    pub spans: Vec<Span>,
    pub skipped: Vec<String>,
    pub ends: Vec<End>,
}

impl<'a> Nemesis<'a> {
    pub fn new(
        field: Field,
        kinds: Vec<&'static Kind>,
        length: Duration,
        recorder: &'a Recorder,
        rng: Rng,
    ) -> Self {
        Self {
            field,
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

    /// Does harm until then; everything is healed when it returns.
    pub fn run(&mut self, until: Instant) {
        while Instant::now() < until && !self.kinds.is_empty() {
            let first = self.next_kind();
            if first.alone {
                self.alone(first, until);
                continue;
            }
            let mut company = vec![first];
            for _ in 1..self.rng.between(1, COMPANY_MAX) {
                let next = self.next_kind();
                if next.alone || company.iter().any(|one| one.name == next.name) {
                    self.bag.push(next);
                    break;
                }
                company.push(next);
            }
            self.together(company);
            let rest = self.rng.below(3_000);
            self.rest(Duration::from_millis(rest));
        }
    }

    fn next_kind(&mut self) -> &'static Kind {
        if self.bag.is_empty() {
            self.bag = self.kinds.clone();
            self.rng.shuffle(&mut self.bag);
        }
        self.bag.pop().expect("it was just filled")
    }

    fn alone(&mut self, kind: &'static Kind, until: Instant) {
        let wait = WHOLE_WITHIN.min(until.saturating_duration_since(Instant::now()));
        if let Err(why) = self.wait_until_whole(wait) {
            self.skip(kind, &why);
            return;
        }
        self.together(vec![kind]);
        // Not judged here: whatever else is healed in the end, so must this.
        let _judged_in_the_end = self.wait_until_whole(WHOLE_WITHIN);
    }

    fn skip(&mut self, kind: &Kind, why: &str) {
        self.recorder.note(&json!({"skipped": kind.name, "why": why}));
        self.skipped.push(format!("{}: {why}", kind.name));
    }

    /// Begins them one after the other and heals each in its time.
    fn together(&mut self, kinds: Vec<&'static Kind>) {
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
                        one.fault.tick(&mut self.field);
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
        match one.fault.begin(&mut self.field) {
            Ok(what) => {
                let line = json!({"fault": one.kind.name, "what": what, "lasts_ms": one.lasts.as_millis() as u64});
                self.recorder.note(&line);
                crate::note(&format!(
                    "{:>15}  {what}  ({:.1} s)",
                    one.kind.name,
                    one.lasts.as_secs_f32()
                ));
                // From before: a fault may have harmed for a while until it stood.
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
        one.fault.heal(&mut self.field);
        self.recorder.note(&json!({"healed": one.kind.name}));
        self.spans.push(Span { kind: one.kind.name, begun, healed: Instant::now() });
    }

    fn rest(&mut self, lasts: Duration) {
        let until = Instant::now() + lasts;
        while Instant::now() < until {
            self.tick();
        }
    }

    /// One look at the processes.
    fn tick(&mut self) {
        self.field.fleet.watch();
        for end in self.field.fleet.ends() {
            self.recorder
                .note(&json!({"ended": end.name, "how": end.how, "explained": end.explained}));
            self.ends.push(end);
        }
        std::thread::sleep(TICK);
    }

    /// Until every shard is open with all its replicas in sync, of processes that have run for a while:
    /// a node that was killed counts as in sync until somebody has found out. It keeps them running.
    pub fn wait_until_whole(&mut self, limit: Duration) -> Result<(), String> {
        let gateways = self.field.fleet.gateways();
        let begun = Instant::now();
        loop {
            self.tick();
            let whole = || -> Result<(), String> {
                cluster::shards(&gateways)?.iter().try_for_each(|shard| shard.is_full(REPLICAS))
            };
            let down = self.field.fleet.members.iter().find(|one| !one.has_run_for(SETTLES));
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
