//! `search replication` visits everything that can happen to one shard within bounds;
//! `search sessions` everything that can happen between gateways and the successive primaries of a
//! shard.
//!
//! A search prints the number of states, the depth up to which it is complete, the size of the
//! frontier, the rare situations that it reached, and a verdict. A broken promise is printed with
//! the steps that lead to it. `--mutation NAME` (or `all`) drops a rule from the engine, and the
//! search must then find a broken promise.
//!
//! Exit code 0: nothing broken, or every mutation found; 1: otherwise; 2: usage.

use std::fmt::Debug;
use std::io::Write;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use engine::planted::Planted;
use engine::shard::idempotency::Scope;
use tests::search::frontier::{SearchLimits, SearchResult, SearchWorld, search};
use tests::search::mutations::{MUTATIONS, SESSION_MUTATIONS, SESSIONS, SMALL};
use tests::search::replication::{Replication, ReplicationBounds};
use tests::search::sessions::{SessionBounds, Sessions};

const USAGE: &str = "search replication|sessions [--bounds KEY=N,…] [--minutes N] [--states N] \
                     [--mutation NAME|all]\n\
                     keys of replication: stores in_sync min_in_sync epochs ops orders crashes \
                     cuts refusals removals lost reads ticks slow_fsync late_watch\n\
                     keys of sessions: gateways keys losses epochs ops tokens (0 none, 1 per op, \
                     2 per batch) retries cuts repeats lists ticks tick_s late waits full";

/// A world that can be named on the command line.
trait Searched: SearchWorld + Sized {
    type Bounds: Copy + Debug + 'static;
    const NAME: &'static str;
    const SMALL: Self::Bounds;
    const MUTATIONS: &'static [(Planted, Self::Bounds)];

    fn new(bounds: Self::Bounds, planted: Option<Planted>) -> Self;

    /// Sets one bound. Returns whether a bound has this name.
    fn set(bounds: &mut Self::Bounds, key: &str, number: u8) -> bool;

    /// Checks the bounds. The error states the rules.
    fn check(bounds: &Self::Bounds) -> Result<(), &'static str>;

    /// Returns the number of different states of its machines.
    fn machines(&self) -> usize;
}

struct Args<B> {
    bounds: Option<B>,
    limits: SearchLimits,
    mutations: Vec<Planted>,
}

fn main() -> ExitCode {
    // The failed assertion of a machine is reported as a counterexample, so only panics of the
    // search itself are printed.
    std::panic::set_hook(Box::new(|panic| {
        if panic.location().is_some_and(|at| at.file().contains("search")) {
            let _closed = writeln!(std::io::stderr(), "{panic}");
        }
    }));
    let mut args = std::env::args().skip(1);
    let done = match args.next().as_deref() {
        Some(Replication::NAME) => go::<Replication>(args),
        Some(Sessions::NAME) => go::<Sessions>(args),
        _ => Err("name the world to search".into()),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(wrong) => {
            let _closed = writeln!(std::io::stderr(), "{wrong}\n{USAGE}");
            ExitCode::from(2)
        }
    }
}

/// Runs the searches. Returns whether nothing was broken, or every mutation was found.
fn go<W: Searched>(args: impl Iterator<Item = String>) -> Result<bool, String> {
    let args = parse::<W>(args)?;
    if args.mutations.is_empty() {
        let found = run::<W>(args.bounds.unwrap_or(W::SMALL), None, args.limits);
        return Ok(found.broken.is_none());
    }
    let mut all = true;
    for &bug in &args.mutations {
        let within = W::MUTATIONS.iter().find(|(known, _)| *known == bug);
        let Some(&(_, bounds)) = within else {
            print_line(&format!("{bug:?}: the search of {} does not cover it", W::NAME));
            continue;
        };
        let found = run::<W>(args.bounds.unwrap_or(bounds), Some(bug), args.limits);
        all &= found.broken.is_some();
    }
    Ok(all)
}

fn run<W: Searched>(
    bounds: W::Bounds,
    planted: Option<Planted>,
    limits: SearchLimits,
) -> SearchResult {
    let began = Instant::now();
    let mut world = W::new(bounds, planted);
    let found = search(&mut world, limits);
    let title = planted.map_or(W::NAME.into(), |bug| format!("{bug:?}"));
    print_line(&format!("{title}: {bounds:?}"));
    let verdict = match (&found.broken, found.frontier) {
        (Some(_), _) => "BROKEN",
        (None, 0) => "all visited, nothing broken",
        (None, _) => "cut off, nothing broken so far",
    };
    print_line(&format!(
        "{verdict}: {} states, {} steps, depth {} complete, frontier {}, {} states of a machine, \
         {:.0} s",
        found.states,
        found.steps,
        found.depth,
        found.frontier,
        world.machines(),
        began.elapsed().as_secs_f32()
    ));
    for (what, count) in &found.sometimes {
        print_line(&format!("  {count:>9} × {what}"));
    }
    if let Some(broken) = &found.broken {
        print_line(&format!("  {}, in {} steps:", broken.promise, broken.trace.len()));
        for (number, (what, state)) in (1..).zip(&broken.trace) {
            print_line(&format!("  {number:>3}. {what}\n       {state}"));
        }
    }
    found
}

fn parse<W: Searched>(args: impl Iterator<Item = String>) -> Result<Args<W::Bounds>, String> {
    let mut args = args;
    let limits = SearchLimits { time: Duration::from_secs(600), states: 40_000_000 };
    let mut parsed = Args { bounds: None, limits, mutations: Vec::new() };
    while let Some(name) = args.next() {
        let value = args.next().ok_or_else(|| format!("{name} needs a value"))?;
        match name.as_str() {
            "--bounds" => parsed.bounds = Some(bounds::<W>(&value)?),
            "--minutes" => {
                let minutes: f64 = value.parse().map_err(|_| format!("{name}: {value}"))?;
                parsed.limits.time = Duration::from_secs_f64(minutes * 60.0);
            }
            "--states" => {
                parsed.limits.states = value.parse().map_err(|_| format!("{name}: {value}"))?;
            }
            "--mutation" if value == "all" => {
                parsed.mutations = W::MUTATIONS.iter().map(|(bug, _)| *bug).collect();
            }
            "--mutation" => {
                let bug = Planted::ALL.into_iter().find(|bug| format!("{bug:?}") == value);
                parsed.mutations = vec![bug.ok_or_else(|| format!("one of {:?}", Planted::ALL))?];
            }
            _ => return Err(format!("unknown option {name}")),
        }
    }
    if !parsed.mutations.is_empty() && !cfg!(feature = "planted-bugs") {
        return Err("mutations need a build with the feature planted-bugs".into());
    }
    Ok(parsed)
}

fn bounds<W: Searched>(text: &str) -> Result<W::Bounds, String> {
    let mut bounds = W::SMALL;
    for pair in text.split(',') {
        let wrong = || format!("--bounds: KEY=N, not {pair}");
        let (key, value) = pair.split_once('=').ok_or_else(wrong)?;
        let number = value.parse().map_err(|_| wrong())?;
        if !W::set(&mut bounds, key, number) {
            return Err(format!("--bounds: no key {key}"));
        }
    }
    W::check(&bounds).map_err(|wrong| format!("--bounds: {wrong}"))?;
    Ok(bounds)
}

impl Searched for Replication {
    type Bounds = ReplicationBounds;
    const NAME: &'static str = "replication";
    const SMALL: Self::Bounds = SMALL;
    const MUTATIONS: &'static [(Planted, Self::Bounds)] = MUTATIONS;

    fn new(bounds: Self::Bounds, planted: Option<Planted>) -> Self {
        Self::new(bounds, planted)
    }

    fn set(bounds: &mut Self::Bounds, key: &str, number: u8) -> bool {
        match key {
            "stores" => bounds.stores = number,
            "in_sync" => bounds.in_sync = number,
            "min_in_sync" => bounds.min_in_sync = number,
            "epochs" => bounds.epochs = number,
            "ops" => bounds.ops = number,
            "orders" => bounds.orders = number,
            "crashes" => bounds.crashes = number,
            "cuts" => bounds.cuts = number,
            "refusals" => bounds.refusals = number,
            "removals" => bounds.removals = number,
            "lost" => bounds.lost = number,
            "reads" => bounds.reads = number,
            "ticks" => bounds.ticks = number,
            "slow_fsync" => bounds.slow_fsync = number > 0,
            "late_watch" => bounds.late_watch = number > 0,
            _ => return false,
        }
        true
    }

    fn check(bounds: &Self::Bounds) -> Result<(), &'static str> {
        let sound = (1..=4).contains(&bounds.stores)
            && (1..=bounds.in_sync).contains(&bounds.min_in_sync)
            && bounds.in_sync <= bounds.stores;
        if sound { Ok(()) } else { Err("1 ≤ min_in_sync ≤ in_sync ≤ stores ≤ 4") }
    }

    fn machines(&self) -> usize {
        self.machines.len()
    }
}

impl Searched for Sessions {
    type Bounds = SessionBounds;
    const NAME: &'static str = "sessions";
    const SMALL: Self::Bounds = SESSIONS;
    const MUTATIONS: &'static [(Planted, Self::Bounds)] = SESSION_MUTATIONS;

    fn new(bounds: Self::Bounds, planted: Option<Planted>) -> Self {
        Self::new(bounds, planted)
    }

    fn set(bounds: &mut Self::Bounds, key: &str, number: u8) -> bool {
        match key {
            "gateways" => bounds.gateways = number,
            "keys" => bounds.keys = number,
            "losses" => bounds.losses = number,
            "epochs" => bounds.epochs = number,
            "ops" => bounds.ops = number,
            "tokens" => {
                bounds.tokens = match number {
                    0 => None,
                    1 => Some(Scope::Counter),
                    _ => Some(Scope::Batch),
                }
            }
            "retries" => bounds.retries = number,
            "cuts" => bounds.cuts = number,
            "repeats" => bounds.repeats = number,
            "lists" => bounds.lists = number,
            "ticks" => bounds.ticks = number,
            "tick_s" => bounds.tick_s = number.into(),
            "late" => bounds.late = number,
            "waits" => bounds.waits = number,
            "full" => bounds.full = number,
            _ => return false,
        }
        true
    }

    fn check(bounds: &Self::Bounds) -> Result<(), &'static str> {
        let sound = (1..=4).contains(&bounds.gateways)
            && (bounds.gateways..=8).contains(&bounds.keys)
            && (1..=7).contains(&bounds.epochs)
            && bounds.ops <= 8
            && (bounds.retries == 0 || bounds.tokens.is_some());
        let wrong =
            "1 ≤ gateways ≤ 4, gateways ≤ keys ≤ 8, 1 ≤ epochs ≤ 7, ops ≤ 8, retries need tokens";
        if sound { Ok(()) } else { Err(wrong) }
    }

    fn machines(&self) -> usize {
        self.primaries.len() + self.gateways.len()
    }
}

fn print_line(line: &str) {
    // A closed pipe is ignored: the exit code still reports the result.
    let _closed = writeln!(std::io::stdout(), "{line}");
}
