//! The hunt: every planted bug at once, on every core, until each is found or the time is over.
//!
//! A free core takes the bug with the fewest runs so far, so the common ones are done within
//! seconds and the rest of the time goes to the rare ones. `tests/tests/planted-seeds` records what
//! was found last time; a bug that is not found yet is a *hole* there, with what would be needed to
//! find it. Holes are searched like the others, but the hunt does not wait for them. For a bug that
//! needs a rare draw only the seeds with that draw are run.

use std::panic;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::available_parallelism;
use std::time::Instant;

use engine::planted::Planted;

use super::plan::Plan;
use super::plan::disks::DiskFault;
use super::plan::faults::FaultKind;
use super::rng::Rng;
use super::run::run;

/// The reason of a bug that is recorded without one.
const NOT_FOUND: &str = "not found among";
const RECORDED: &str = include_str!("../../tests/planted-seeds");

/// The record of a bug in `planted-seeds`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Recorded {
    /// This seed shows the bug.
    Seed(u64),
    /// The bug is not found yet, for this reason.
    Hole(String),
}

impl Recorded {
    /// Returns `None` if the record has no line for the bug, or one that is not understood.
    pub fn of(bug: Planted) -> Option<Self> {
        let name = format!("{bug:?} ");
        let rest = RECORDED.lines().find_map(|line| line.strip_prefix(&name))?;
        match rest.strip_prefix("hole: ") {
            Some(reason) => Some(Self::Hole(reason.into())),
            None => rest.parse().ok().map(Self::Seed),
        }
    }
}

/// The result of the hunt for one bug.
#[derive(Clone, Debug)]
pub struct HuntedBug {
    pub bug: Planted,
    /// The first seed that shows the bug: the same one however many cores search.
    pub found: Option<u64>,
    pub looked_at: u64,
    /// Seeds that fail without the bug, too, and so show nothing of it.
    pub fail_anyway: Vec<u64>,
    pub recorded: Option<Recorded>,
    next: u64,
    running: u64,
}

impl HuntedBug {
    /// A bug that was only not found when it was recorded is searched like any other.
    fn is_hole(&self) -> bool {
        matches!(&self.recorded, Some(Recorded::Hole(why)) if !why.starts_with(NOT_FOUND))
    }

    /// Returns whether the bug was not found, though the record claims that it can be.
    pub fn is_missed(&self) -> bool {
        self.found.is_none() && !self.is_hole()
    }

    /// A line for readers, and for scripts that search `NOT FOUND`.
    pub fn line(&self) -> String {
        let Self { bug, looked_at, .. } = self;
        match (self.found, &self.recorded) {
            (Some(seed), Some(Recorded::Hole(_))) => {
                format!("bug={bug:?} seed={seed} after {looked_at} seeds: NO LONGER A HOLE")
            }
            (Some(seed), _) => format!("bug={bug:?} seed={seed} after {looked_at} seeds"),
            (None, Some(Recorded::Hole(why))) if self.is_hole() => {
                format!("bug={bug:?} after {looked_at} seeds: a known hole: {why}")
            }
            (None, _) => format!("bug={bug:?} after {looked_at} seeds: NOT FOUND"),
        }
    }

    /// The line of the record: a hole stays one until it is found.
    pub fn record(&self) -> String {
        let bug = self.bug;
        match (self.found, &self.recorded) {
            (Some(seed), _) => format!("{bug:?} {seed}\n"),
            (None, Some(Recorded::Hole(why))) if self.is_hole() => format!("{bug:?} hole: {why}\n"),
            (None, _) => format!("{bug:?} hole: {NOT_FOUND} {} seeds\n", self.looked_at),
        }
    }
}

/// The limits of the search.
#[derive(Clone, Copy, Debug)]
pub struct HuntLimits {
    pub from: u64,
    /// Seeds per bug.
    pub seeds: u64,
    /// Seeds per hole: less, so that the others get the time.
    pub hole_seeds: u64,
    pub until: Instant,
}

/// Searches for these bugs; `report` is called for each as it is settled.
pub fn hunt(
    bugs: &[Planted],
    limits: HuntLimits,
    report: impl Fn(&HuntedBug) + Sync,
) -> Vec<HuntedBug> {
    // The messages of a broken engine that notices its own fault are of no interest here.
    let hook = panic::take_hook();
    panic::set_hook(Box::new(|_| {}));
    let hunted = |&bug| {
        let recorded = Recorded::of(bug);
        HuntedBug {
            bug,
            found: None,
            looked_at: 0,
            fail_anyway: vec![],
            recorded,
            next: limits.from,
            running: 0,
        }
    };
    let all: Mutex<Vec<HuntedBug>> = Mutex::new(bugs.iter().map(hunted).collect());
    let threads = available_parallelism().map_or(2, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let next = take(&mut lock(&all), limits);
                    let Some((at, bug, seed)) = next else { return };
                    let fails = |bug| !run(seed, bug, None).violations.is_empty();
                    let fails_with_it = fails(Some(bug));
                    let fails_anyway = fails_with_it && fails(None);
                    let shows = fails_with_it && !fails_anyway;
                    let mut all = lock(&all);
                    let hunted = &mut all[at];
                    hunted.running -= 1;
                    hunted.fail_anyway.extend(fails_anyway.then_some(seed));
                    if shows {
                        hunted.found = Some(hunted.found.map_or(seed, |first| first.min(seed)));
                    }
                    if hunted.found.is_some() && hunted.running == 0 {
                        report(hunted);
                    }
                }
            });
        }
    });
    panic::set_hook(hook);
    all.into_inner().unwrap_or_else(PoisonError::into_inner)
}

/// The next seed of the bug with the fewest runs, if anything is left to search for.
fn take(all: &mut [HuntedBug], limits: HuntLimits) -> Option<(usize, Planted, u64)> {
    if Instant::now() >= limits.until {
        return None;
    }
    let open = |hunted: &HuntedBug| {
        let seeds = if hunted.is_hole() { limits.hole_seeds } else { limits.seeds };
        hunted.found.is_none() && hunted.looked_at < seeds
    };
    let open = all.iter_mut().enumerate().filter(|(_, hunted)| open(hunted));
    let (at, hunted) = open.min_by_key(|(_, hunted)| hunted.looked_at)?;
    let may_show = |seed: &u64| {
        let plan = Plan::from_seed(*seed, None, &mut Rng::new(*seed));
        has_rare_draw(hunted.bug, &plan)
    };
    let seed = (hunted.next..).find(may_show)?;
    hunted.next = seed + 1;
    hunted.looked_at += 1;
    hunted.running += 1;
    Some((at, hunted.bug, seed))
}

/// Returns whether the plan has the fault or the setting that a rare bug needs: other seeds are not
/// worth a run.
fn has_rare_draw(bug: Planted, plan: &Plan) -> bool {
    let disk = |fault| plan.disks.faults.contains(&fault);
    match bug {
        Planted::FullLeadsOn => disk(DiskFault::StaysFull),
        Planted::FullIsForgotten | Planted::FullRefusesBarrier => {
            disk(DiskFault::StaysFull) || disk(DiskFault::Full)
        }
        Planted::EmptyFolderTakesName | Planted::NeededStoreGivenUp => disk(DiskFault::Unmounted),
        Planted::TrimOnlyOnFlush | Planted::FullLogTakesNoCopy => {
            plan.log.keep_bytes <= SHORT_LOG_BYTES
        }
        Planted::InstallOverTables => plan.lazy_flushes,
        Planted::LoadBeginsLate | Planted::MessagesInAnyOrder | Planted::WriteAfterSync => {
            plan.reorder.on
        }
        Planted::ChildWithoutSessions
        | Planted::RecordsNotCopied
        | Planted::SplitIgnoresTables
        | Planted::SplitUncompared
        | Planted::ChildBeforeFlush
        | Planted::CopyOverParent
        | Planted::PartAnswersForAll
        | Planted::ChildNumberedAnew
        | Planted::SendsToParentForgotten => plan.splits.every.is_some(),
        Planted::IntentOfAnyRecord => plan.operator.every.is_some(),
        Planted::CheckReadBeforeCapture
        | Planted::ReadUnproven
        | Planted::ReadIndexMajority
        | Planted::EtcdCheckUnread
        | Planted::ProbeUnproven
        | Planted::CommitBelowBarrier => {
            plan.faults.iter().any(|fault| FaultKind::DEPOSE.contains(fault))
        }
        _ => true,
    }
}

/// A run of some seconds reaches the end of such a log.
const SHORT_LOG_BYTES: usize = 64 << 10;

fn lock(all: &Mutex<Vec<HuntedBug>>) -> MutexGuard<'_, Vec<HuntedBug>> {
    all.lock().unwrap_or_else(PoisonError::into_inner)
}
