//! The hunt: every planted bug at once, on every core, until each is found or the time is over.
//!
//! Whoever is free takes the bug that was looked at least, so the common ones are done within seconds and the rest
//! of the time goes to the rare ones. `tests/tests/planted-seeds` says what was found when it was last recorded; a
//! bug that is not found yet is a *hole* there, with what it would take. Holes are looked for like the others, but
//! nobody waits for them. Of a bug that needs what few seeds draw only these seeds are run.

use std::panic;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::available_parallelism;
use std::time::Instant;

use engine::planted::Planted;

use super::disk_faults::DiskFault;
use super::faults::Kind;
use super::plan::Plan;
use super::rng::Rng;
use super::run;

/// The reason of a bug that is recorded without one.
const NOT_FOUND: &str = "not found among";
const RECORDED: &str = include_str!("../../tests/planted-seeds");

/// What the record says of a bug.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Recorded {
    /// This seed shows it.
    Seed(u64),
    /// Not found yet, and why.
    Hole(String),
}

impl Recorded {
    /// None: the record has no line for it, or one that is not understood.
    pub fn of(bug: Planted) -> Option<Self> {
        let name = format!("{bug:?} ");
        let rest = RECORDED.lines().find_map(|line| line.strip_prefix(&name))?;
        match rest.strip_prefix("hole: ") {
            Some(reason) => Some(Self::Hole(reason.into())),
            None => rest.parse().ok().map(Self::Seed),
        }
    }
}

/// What became of the hunt for one bug.
#[derive(Clone, Debug)]
pub struct Quarry {
    pub bug: Planted,
    /// The first seed that shows it: the same one however many cores look.
    pub found: Option<u64>,
    pub looked_at: u64,
    /// Seeds that fail without it, too, and show nothing of it.
    pub fail_anyway: Vec<u64>,
    pub recorded: Option<Recorded>,
    next: u64,
    running: u64,
}

impl Quarry {
    /// What was only not found when it was recorded is looked for like any other.
    fn is_hole(&self) -> bool {
        matches!(&self.recorded, Some(Recorded::Hole(why)) if !why.starts_with(NOT_FOUND))
    }

    /// Not found, though the record says that it can be.
    pub fn is_missed(&self) -> bool {
        self.found.is_none() && !self.is_hole()
    }

    /// A line for people, and for whoever looks for `NOT FOUND`.
    pub fn line(&self) -> String {
        let Self { bug, looked_at, .. } = self;
        match (self.found, &self.recorded) {
            (Some(seed), Some(Recorded::Hole(_))) => {
                format!("bug={bug:?} seed={seed} after {looked_at} seeds: A HOLE NO MORE")
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

/// How long to look.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub from: u64,
    /// Per bug.
    pub seeds: u64,
    /// Per hole: less, so that the others get the time.
    pub hole_seeds: u64,
    pub until: Instant,
}

/// Looks for these bugs; `tell` hears of each as it is settled.
pub fn hunt(bugs: &[Planted], limits: Limits, tell: impl Fn(&Quarry) + Sync) -> Vec<Quarry> {
    // What a broken engine has to say when it notices that it is broken is of no interest here.
    let hook = panic::take_hook();
    panic::set_hook(Box::new(|_| {}));
    let quarry = |&bug| {
        let recorded = Recorded::of(bug);
        Quarry {
            bug,
            found: None,
            looked_at: 0,
            fail_anyway: vec![],
            recorded,
            next: limits.from,
            running: 0,
        }
    };
    let all: Mutex<Vec<Quarry>> = Mutex::new(bugs.iter().map(quarry).collect());
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
                    let quarry = &mut all[at];
                    quarry.running -= 1;
                    quarry.fail_anyway.extend(fails_anyway.then_some(seed));
                    if shows {
                        quarry.found = Some(quarry.found.map_or(seed, |first| first.min(seed)));
                    }
                    if quarry.found.is_some() && quarry.running == 0 {
                        tell(quarry);
                    }
                }
            });
        }
    });
    panic::set_hook(hook);
    all.into_inner().unwrap_or_else(PoisonError::into_inner)
}

/// The next seed of the bug that was looked at least, if anything is left to look for.
fn take(all: &mut [Quarry], limits: Limits) -> Option<(usize, Planted, u64)> {
    if Instant::now() >= limits.until {
        return None;
    }
    let open = |quarry: &Quarry| {
        let seeds = if quarry.is_hole() { limits.hole_seeds } else { limits.seeds };
        quarry.found.is_none() && quarry.looked_at < seeds
    };
    let open = all.iter_mut().enumerate().filter(|(_, quarry)| open(quarry));
    let (at, quarry) = open.min_by_key(|(_, quarry)| quarry.looked_at)?;
    let may_show = |seed: &u64| {
        let plan = Plan::from_seed(*seed, None, &mut Rng::new(*seed));
        has_what_it_takes(quarry.bug, &plan)
    };
    let seed = (quarry.next..).find(may_show)?;
    quarry.next = seed + 1;
    quarry.looked_at += 1;
    quarry.running += 1;
    Some((at, quarry.bug, seed))
}

/// The rare bugs need a fault, or a setting, that few seeds draw: the others are not worth a run.
fn has_what_it_takes(bug: Planted, plan: &Plan) -> bool {
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
        Planted::IntentOfAnyRecord => plan.operator.every.is_some(),
        Planted::CheckReadBeforeCapture
        | Planted::ReadUnproven
        | Planted::ReadIndexMajority
        | Planted::EtcdCheckUnread
        | Planted::ProbeUnproven
        | Planted::CommitBelowBarrier => {
            plan.faults.iter().any(|fault| Kind::DEPOSE.contains(fault))
        }
        _ => true,
    }
}

/// A run of some seconds meets the end of such a log.
const SHORT_LOG_BYTES: usize = 64 << 10;

fn lock(all: &Mutex<Vec<Quarry>>) -> MutexGuard<'_, Vec<Quarry>> {
    all.lock().unwrap_or_else(PoisonError::into_inner)
}
