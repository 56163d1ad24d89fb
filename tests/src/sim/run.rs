//! The run of one seed, and its report.

use std::collections::BTreeMap;
use std::io::Write;
use std::panic::AssertUnwindSafe;

use engine::planted::Planted;

use super::checker::Violation;
use super::coverage::Path;
use super::draws::Drawings;
use super::history::OpOutcome;
use super::plan::Plan;
use super::rng::Rng;
use super::trace::Trace;
use super::world::SimWorld;

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
        let answers = world.cluster.clients.history.ops.iter().filter_map(|op| op.answer);
        answers.filter(|(_, outcome)| want(outcome)).count() as u64
    };
    let faults = world.cluster.faults.counts.iter().map(|(kind, &n)| (format!("{kind:?}"), n));
    let faults = faults.chain(world.cluster.faults.disks.clone()).collect();
    Report {
        seed,
        violations,
        hash: world.cluster.core.trace.hash(),
        steps: world.cluster.core.step,
        acknowledged: count(|outcome| {
            matches!(outcome, OpOutcome::Applied(_) | OpOutcome::Stale { .. })
        }),
        refused: count(|outcome| matches!(outcome, OpOutcome::NotApplied)),
        unknown: count(|outcome| matches!(outcome, OpOutcome::Unknown)),
        faults,
        decisions: world.cluster.core.decisions.clone(),
        coverage: world.cluster.core.oracle.coverage.counts.clone(),
        tokens: world.cluster.tokens.counts(),
        idle_faults: world.cluster.faults.idle,
        drawings: std::mem::take(&mut world.cluster.core.plan.drawings),
    }
}
