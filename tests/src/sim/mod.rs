//! The deterministic simulator: a whole cluster in one thread, under one seed, in virtual time.
//!
//! The simulator drives the same state machines as production, by the same events and effects, over
//! models of the network, the disks and etcd that do the worst those are allowed to. Everything in
//! a run follows from its seed; the hash of its [`trace`] proves it.
//!
//! ```text
//!   plan ── the faults that this seed may suffer     world ── the loop that delivers inputs
//!   core ── time, chance, the queue of events        nodes, gateways, coordinators ── drivers
//!   network, disk, log, etcd ── models               faults, disk_faults, pauses ── the faults
//!   draws ── the size of every limit                 leaps ── days without any operation
//!   clients, token_clients ── the workload           history ── requests and answers
//!   checker ── one file per promise                  oracle ── the checks during a run
//!   coverage ── the rare paths that were taken       trace ── the log of a run and its hash
//! ```
//!
//! A run without violation proves little unless it was busy. A seed counts only with enough
//! acknowledged operations, and if some were in flight at every fault; and the planted bugs show
//! that the checkers would notice.

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
pub mod trace;
pub mod world;

use std::collections::BTreeMap;
use std::io::Write;
use std::panic::AssertUnwindSafe;

use engine::planted::Planted;

use checker::Violation;
use coverage::Path;
use draws::Drawings;
use history::OpOutcome;
use plan::Plan;
use rng::Rng;
use trace::Trace;
use world::SimWorld;

/// The least number of acknowledged operations of a run that counts.
pub const ACKNOWLEDGED_MIN: u64 = 200;

/// The result of one seed.
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
    /// The number of decisions of coordinators, by kind.
    pub decisions: BTreeMap<&'static str, u64>,
    /// The number of times that each rare path was taken.
    pub coverage: BTreeMap<Path, u64>,
    /// The number of outcomes of requests with a token, by kind.
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

/// Runs one seed. `out` gets the trace, a line per event and effect. A panic, be it the engine's
/// own assertion or the simulator's, is a broken promise like any other: the seed is known, and the
/// other seeds go on.
pub fn run(seed: u64, planted: Option<Planted>, out: Option<Box<dyn Write + Send>>) -> Report {
    let whole = || run_world(seed, planted, out);
    std::panic::catch_unwind(AssertUnwindSafe(whole)).unwrap_or_else(|panic| {
        let message = panic.downcast_ref::<String>().cloned();
        let message =
            message.or_else(|| panic.downcast_ref::<&str>().map(|&message| message.into()));
        let detail = format!("panicked: {}", message.unwrap_or_default());
        let violations = vec![Violation { promise: "no-panic", detail }];
        Report { seed, violations, ..Report::default() }
    })
}

fn run_world(seed: u64, planted: Option<Planted>, out: Option<Box<dyn Write + Send>>) -> Report {
    let mut rng = Rng::new(seed);
    let plan = Plan::from_seed(seed, planted, &mut rng);
    let mut trace = Trace::new(out);
    trace.note(0, || format!("{plan:#?}"));
    let mut world = SimWorld::new(plan, rng, trace);
    let violations = world.run();
    let count = |want: fn(&OpOutcome) -> bool| {
        let answers = world.clients.history.ops.iter().filter_map(|op| op.answer);
        answers.filter(|(_, outcome)| want(outcome)).count() as u64
    };
    let faults = world.faults.counts.iter().map(|(kind, &n)| (format!("{kind:?}"), n));
    let faults = faults.chain(world.faults.disks.clone()).collect();
    Report {
        seed,
        violations,
        hash: world.core.trace.hash(),
        steps: world.core.step,
        acknowledged: count(|outcome| {
            matches!(outcome, OpOutcome::Applied(_) | OpOutcome::Stale { .. })
        }),
        refused: count(|outcome| matches!(outcome, OpOutcome::NotApplied)),
        unknown: count(|outcome| matches!(outcome, OpOutcome::Unknown)),
        faults,
        decisions: world.core.decisions.clone(),
        coverage: world.core.oracle.coverage.counts.clone(),
        tokens: world.tokens.counts(),
        idle_faults: world.faults.idle,
        drawings: std::mem::take(&mut world.core.plan.drawings),
    }
}
