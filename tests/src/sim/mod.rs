//! The deterministic simulator: a whole cluster in one thread, under one seed, in virtual time.
//!
//! It drives the very machines that production drives, through the same events and effects, over
//! models of the network, the disks and etcd that do the worst those are allowed to. Everything a
//! run does follows from its seed; the [`journal`]'s hash proves it.
//!
//! ```text
//!   plan ── what this seed may suffer        world ── the loop, and who is told what
//!   core ── time, chance, the queue          nodes, gateways, coordinators ── drivers
//!   network, disk, log, etcd ── models       faults, disk_faults ── what goes wrong; pauses ── who stands still
//!   draws ── how large every limit is; leaps ── days without anything
//!   clients, token_clients, history ── who asks what
//!   checker ── one file per promise; oracle ── online; coverage ── which rare paths were taken
//! ```
//!
//! What a newcomer would get wrong: a run without violation proves little unless it was busy. A seed
//! counts only with enough acknowledged operations, and if some were in flight at every fault; and
//! the planted bugs show that the checkers would notice.

pub mod chaos;
pub mod checker;
pub mod clients;
pub mod codec;
pub mod coordinators;
pub mod core;
pub mod coverage;
pub mod disk;
pub mod disk_faults;
pub mod draws;
pub mod etcd;
pub mod failover;
pub mod faults;
pub mod gateways;
pub mod history;
pub mod hunt;
pub mod journal;
pub mod leaps;
pub mod log;
pub mod network;
pub mod nodes;
pub mod operator;
pub mod oracle;
pub mod pauses;
pub mod plan;
pub mod rng;
pub mod token_clients;
pub mod token_rows;
pub mod world;

use std::collections::BTreeMap;
use std::io::Write;
use std::panic::AssertUnwindSafe;

use engine::planted::Planted;

use checker::Violation;
use coverage::Path;
use draws::Drawings;
use history::Outcome;
use journal::Journal;
use plan::Plan;
use rng::Rng;
use world::World;

/// A run with fewer acknowledged operations says too little.
pub const ACKNOWLEDGED_MIN: u64 = 200;

/// What became of one seed.
#[derive(Debug, Default)]
pub struct Report {
    pub seed: u64,
    pub violations: Vec<Violation>,
    pub hash: u64,
    pub steps: u64,
    pub acknowledged: u64,
    pub refused: u64,
    pub unknown: u64,
    pub faults: BTreeMap<String, u64>,
    /// What coordinators did, by kind.
    pub stories: BTreeMap<&'static str, u64>,
    /// How often each rare path was taken.
    pub coverage: BTreeMap<Path, u64>,
    /// What requests with a token were told, by kind.
    pub tokens: BTreeMap<&'static str, u64>,
    /// Faults that struck while nothing was in flight.
    pub idle_faults: u64,
    pub drawings: Drawings,
}

impl Report {
    pub fn counts(&self) -> bool {
        self.acknowledged >= ACKNOWLEDGED_MIN && self.idle_faults == 0
    }
}

/// Runs one seed. `out` gets the event log, a line per event and effect. A panic, be it the engine's own assertion
/// or the simulator's, is a broken promise like any other: the seed is known, and the other seeds go on.
pub fn run(seed: u64, planted: Option<Planted>, out: Option<Box<dyn Write + Send>>) -> Report {
    let whole = || run_world(seed, planted, out);
    std::panic::catch_unwind(AssertUnwindSafe(whole)).unwrap_or_else(|panic| {
        let said = panic.downcast_ref::<String>().cloned();
        let said = said.or_else(|| panic.downcast_ref::<&str>().map(|&said| said.into()));
        let detail = format!("panicked: {}", said.unwrap_or_default());
        let violations = vec![Violation { promise: "no-panic", detail }];
        Report { seed, violations, ..Report::default() }
    })
}

fn run_world(seed: u64, planted: Option<Planted>, out: Option<Box<dyn Write + Send>>) -> Report {
    let mut rng = Rng::new(seed);
    let plan = Plan::from_seed(seed, planted, &mut rng);
    let mut journal = Journal::new(out);
    journal.note(0, || format!("{plan:#?}"));
    let mut world = World::new(plan, rng, journal);
    let violations = world.run();
    let count = |want: fn(&Outcome) -> bool| {
        let answers = world.clients.history.ops.iter().filter_map(|op| op.answer);
        answers.filter(|(_, outcome)| want(outcome)).count() as u64
    };
    let faults = world.faults.counts.iter().map(|(kind, &n)| (format!("{kind:?}"), n));
    let faults = faults.chain(world.faults.disks.clone()).collect();
    Report {
        seed,
        violations,
        hash: world.core.journal.hash(),
        steps: world.core.step,
        acknowledged: count(|outcome| {
            matches!(outcome, Outcome::Applied(_) | Outcome::Stale { .. })
        }),
        refused: count(|outcome| matches!(outcome, Outcome::NotApplied)),
        unknown: count(|outcome| matches!(outcome, Outcome::Unknown)),
        faults,
        stories: world.core.stories.clone(),
        coverage: world.core.oracle.coverage.counts.clone(),
        tokens: world.tokens.counts(),
        idle_faults: world.faults.idle,
        drawings: std::mem::take(&mut world.core.plan.drawings),
    }
}
