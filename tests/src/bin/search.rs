//! `search replication` goes through everything that can happen to one shard within bounds.
//!
//! It prints the states it has seen, how deep it is complete, what waits at the frontier, which interesting things it
//! came by and how often, and a verdict; a broken promise comes with the way that leads there, step by step.
//! `--mutation NAME` (or `all`) drops a rule from the engine first, which must then be noticed.
//!
//! Exit code 0: nothing broken, or every mutation noticed; 1 otherwise; 2: usage.

use std::io::Write;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use engine::planted::Planted;
use tests::search::frontier::{Found, Limits, search};
use tests::search::mutations::{MUTATIONS, SMALL};
use tests::search::replication::{Bounds, Replication};

const USAGE: &str = "search replication [--bounds KEY=N,…] [--minutes N] [--states N] [--mutation NAME|all]
keys: stores in_sync min_in_sync epochs ops orders crashes cuts refusals removals lost reads ticks slow_fsync late_watch";

struct Args {
    bounds: Option<Bounds>,
    limits: Limits,
    mutations: Vec<Planted>,
}

fn main() -> ExitCode {
    // A machine that breaks an assertion of its own is a counterexample, told as one: only ours are shown here.
    std::panic::set_hook(Box::new(|panic| {
        if panic.location().is_some_and(|at| at.file().contains("search")) {
            let _closed = writeln!(std::io::stderr(), "{panic}");
        }
    }));
    let args = match parse(std::env::args().skip(1)) {
        Ok(args) => args,
        Err(wrong) => {
            let _closed = writeln!(std::io::stderr(), "{wrong}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    if args.mutations.is_empty() {
        let bounds = args.bounds.unwrap_or(SMALL);
        let found = run(bounds, None, args.limits);
        return if found.broken.is_none() { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    }
    let mut all = true;
    for &bug in &args.mutations {
        let within = MUTATIONS.iter().find(|(known, _)| *known == bug);
        let Some(&(_, bounds)) = within else {
            say(&format!("{bug:?}: no search expresses it"));
            continue;
        };
        let found = run(args.bounds.unwrap_or(bounds), Some(bug), args.limits);
        all &= found.broken.is_some();
    }
    if all { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn run(bounds: Bounds, planted: Option<Planted>, limits: Limits) -> Found {
    let began = Instant::now();
    let mut world = Replication::new(bounds, planted);
    let found = search(&mut world, limits);
    let title = planted.map_or("replication".into(), |bug| format!("{bug:?}"));
    say(&format!("{title}: {bounds:?}"));
    let verdict = match (&found.broken, found.frontier) {
        (Some(_), _) => "BROKEN",
        (None, 0) => "all visited, nothing broken",
        (None, _) => "cut off, nothing broken so far",
    };
    say(&format!(
        "{verdict}: {} states, {} steps, depth {} complete, frontier {}, {} states of a store, {:.0} s",
        found.states,
        found.steps,
        found.depth,
        found.frontier,
        world.machines.len(),
        began.elapsed().as_secs_f32()
    ));
    for (what, count) in &found.sometimes {
        say(&format!("  {count:>9} × {what}"));
    }
    if let Some(broken) = &found.broken {
        say(&format!("  {}, in {} steps:", broken.promise, broken.trace.len()));
        for (number, (what, state)) in (1..).zip(&broken.trace) {
            say(&format!("  {number:>3}. {what}\n       {state}"));
        }
    }
    found
}

fn parse(args: impl Iterator<Item = String>) -> Result<Args, String> {
    let mut args = args;
    if args.next().as_deref() != Some("replication") {
        return Err("say what to search".into());
    }
    let limits = Limits { time: Duration::from_secs(600), states: 40_000_000 };
    let mut parsed = Args { bounds: None, limits, mutations: Vec::new() };
    while let Some(name) = args.next() {
        let value = args.next().ok_or_else(|| format!("{name} needs a value"))?;
        match name.as_str() {
            "--bounds" => parsed.bounds = Some(bounds(&value)?),
            "--minutes" => {
                let minutes: f64 = value.parse().map_err(|_| format!("{name}: {value}"))?;
                parsed.limits.time = Duration::from_secs_f64(minutes * 60.0);
            }
            "--states" => {
                parsed.limits.states = value.parse().map_err(|_| format!("{name}: {value}"))?;
            }
            "--mutation" if value == "all" => {
                parsed.mutations = MUTATIONS.iter().map(|(bug, _)| *bug).collect();
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

fn bounds(text: &str) -> Result<Bounds, String> {
    let mut bounds = SMALL;
    for pair in text.split(',') {
        let wrong = || format!("--bounds: KEY=N, not {pair}");
        let (key, value) = pair.split_once('=').ok_or_else(wrong)?;
        let number: u8 = value.parse().map_err(|_| wrong())?;
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
            _ => return Err(format!("--bounds: no key {key}")),
        }
    }
    let sound = (1..=4).contains(&bounds.stores)
        && (1..=bounds.in_sync).contains(&bounds.min_in_sync)
        && bounds.in_sync <= bounds.stores;
    if sound {
        Ok(bounds)
    } else {
        Err("--bounds: 1 ≤ min_in_sync ≤ in_sync ≤ stores ≤ 4".into())
    }
}

fn say(line: &str) {
    // A closed pipe is the reader's business; the exit code still tells.
    let _closed = writeln!(std::io::stdout(), "{line}");
}
