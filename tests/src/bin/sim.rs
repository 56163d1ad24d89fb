//! The simulator's command line.
//!
//! `sim --seed N` replays one seed with its trace; `sim --minutes M` explores fresh ones, on every
//! core; `sim --hunt` searches for a seed that shows each planted bug, among fresh ones; `sim
//! --record FILE` among the first ones, and records them in the file.
//!
//! Exit code 0: every promise held, or every bug was found that the record does not call a hole; 1:
//! lines `FAILED seed=N promise=…` name the broken ones, or lines `bug=NAME` end with `NOT FOUND`;
//! 2: usage. The last line of a run or an exploration is JSON.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;
use std::io::Write;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant, SystemTime};

use engine::planted::Planted;
use tests::sim::coverage::Path;
use tests::sim::draws::Distribution;
use tests::sim::hunt::{HuntLimits, HuntedBug, hunt};
use tests::sim::{Report, run};

const USAGE: &str = "\
sim [--seed N | --minutes M | --seeds N] [--from N] [--planted NAME] [--quiet]
sim --hunt | --record FILE [--minutes M] [--seeds N] [--planted NAME]
    at most M minutes for all bugs (default 14) and N seeds for each bug, or for the named one;
    needs --features planted-bugs";

/// The rarest bug shows in about one seed of 10,000.
const HUNT_SEEDS: u64 = 100_000;
/// The seeds for a hole: few, since ten thousands of seeds have not shown it.
const HOLE_SEEDS: u64 = 500;
/// The time for all bugs: `./test --full` promises a quarter of an hour.
const HUNT_TIME: Duration = Duration::from_secs(14 * 60);

struct Args {
    seed: Option<u64>,
    /// Explore for this long.
    time: Option<Duration>,
    /// Explore this many counted seeds.
    seeds: u64,
    from: u64,
    planted: Option<Planted>,
    /// No line for each seed.
    quiet: bool,
    /// Search for every planted bug.
    hunt: bool,
    /// Search from seed 1 on, and record the result in this file.
    record: Option<String>,
}

fn main() -> ExitCode {
    let args = match parse(std::env::args().skip(1)) {
        Ok(args) => args,
        Err(wrong) => {
            let _closed = writeln!(std::io::stderr(), "{wrong}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    if args.hunt {
        return hunt_all(&args);
    }
    let mut total = Total::new();
    match args.seed {
        Some(seed) => {
            let out: Option<Box<dyn Write + Send>> = if args.quiet {
                None
            } else {
                Some(Box::new(std::io::BufWriter::new(std::io::stdout())))
            };
            total.add(&run(seed, args.planted, out));
        }
        None => {
            explore(&args, &mut total);
            print_line(&total.text());
        }
    }
    print_line(&total.json());
    if total.failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn parse(args: impl Iterator<Item = String>) -> Result<Args, String> {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let mut parsed = Args {
        seed: None,
        time: None,
        seeds: u64::MAX,
        from: now.as_secs() << 20,
        planted: None,
        quiet: false,
        hunt: false,
        record: None,
    };
    let mut args = args;
    while let Some(name) = args.next() {
        match name.as_str() {
            "--quiet" => {
                parsed.quiet = true;
                continue;
            }
            "--hunt" => {
                parsed.hunt = true;
                continue;
            }
            _ => {}
        }
        let value = args.next().ok_or_else(|| format!("{name} needs a value"))?;
        let number = || value.parse::<u64>().map_err(|_| format!("{name}: not a number: {value}"));
        match name.as_str() {
            "--seed" => parsed.seed = Some(number()?),
            "--record" => {
                (parsed.hunt, parsed.from) = (true, 1);
                parsed.record = Some(value);
            }
            "--seeds" => parsed.seeds = number()?,
            "--from" => parsed.from = number()?,
            "--minutes" => {
                let minutes = value.parse::<f64>().map_err(|_| format!("{name}: {value}"))?;
                parsed.time = Some(Duration::from_secs_f64(minutes * 60.0));
            }
            "--planted" => {
                let all = Planted::ALL;
                let found = all.into_iter().find(|bug| format!("{bug:?}") == value);
                parsed.planted = Some(found.ok_or_else(|| format!("one of {all:?}"))?);
            }
            _ => return Err(format!("unknown option {name}")),
        }
    }
    let planted = parsed.planted.is_some() || parsed.hunt;
    if planted && !cfg!(feature = "planted-bugs") {
        return Err("planted bugs need a build with the feature planted-bugs".into());
    }
    if parsed.hunt {
        return Ok(parsed);
    }
    if parsed.seed.is_none() && parsed.time.is_none() && parsed.seeds == u64::MAX {
        return Err("nothing to run: give --seed, --minutes or --seeds".into());
    }
    Ok(parsed)
}

/// Prints for each planted bug which seed shows it and how many were run; the record gets both
/// names and seeds.
fn hunt_all(args: &Args) -> ExitCode {
    let began = Instant::now();
    let wanted = |bug: &Planted| args.planted.is_none_or(|one| one == *bug);
    let bugs: Vec<_> = Planted::ALL.into_iter().filter(wanted).collect();
    let seeds = args.seeds.min(HUNT_SEEDS);
    // A hole that is requested by name gets the full number of seeds.
    let hole_seeds = if args.planted.is_some() { seeds } else { seeds.min(HOLE_SEEDS) };
    let until = began + args.time.unwrap_or(HUNT_TIME);
    let limits = HuntLimits { from: args.from, seeds, hole_seeds, until };
    let report = |hunted: &HuntedBug| {
        print_line(&format!("{} ({} s)", hunted.line(), began.elapsed().as_secs()));
    };
    let all = hunt(&bugs, limits, report);
    all.iter().filter(|hunted| hunted.found.is_none()).for_each(report);
    let fail_anyway: BTreeSet<u64> =
        all.iter().flat_map(|hunted| hunted.fail_anyway.iter().copied()).collect();
    fail_anyway
        .iter()
        .for_each(|seed| print_line(&format!("FAILED seed={seed} without any planted bug")));
    let missed = all.iter().filter(|hunted| hunted.is_missed()).count();
    let found = all.iter().filter(|hunted| hunted.found.is_some()).count();
    let runs: u64 = all.iter().map(|hunted| hunted.looked_at).sum();
    let took = began.elapsed().as_secs();
    print_line(&format!(
        "{found} of {} planted bugs found, {missed} missed, {} known holes, {runs} runs, {took} s",
        all.len(),
        all.len() - found - missed,
    ));
    if let Some(file) = &args.record
        && let Err(error) =
            std::fs::write(file, all.iter().map(HuntedBug::record).collect::<String>())
    {
        print_line(&format!("{file}: {error}"));
        return ExitCode::FAILURE;
    }
    if missed == 0 && fail_anyway.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Runs fresh seeds on every core. Seeds are independent, so threads change nothing in any of them.
fn explore(args: &Args, total: &mut Total) {
    let next = AtomicU64::new(args.from);
    let counted = AtomicU64::new(0);
    let ends = args.time.map(|time| Instant::now() + time);
    let threads = std::thread::available_parallelism().map_or(2, usize::from);
    let (reports, received) = mpsc::channel();
    std::thread::scope(|scope| {
        for _ in 0..threads {
            let (reports, next, counted) = (reports.clone(), &next, &counted);
            scope.spawn(move || {
                while counted.load(Ordering::Relaxed) < args.seeds
                    && ends.is_none_or(|ends| Instant::now() < ends)
                {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    let report = run(seed, args.planted, None);
                    counted.fetch_add(u64::from(report.counts()), Ordering::Relaxed);
                    if reports.send(report).is_err() {
                        return;
                    }
                }
            });
        }
        drop(reports);
        for report in received {
            if !args.quiet {
                print_line(&line(&report));
            }
            total.add(&report);
        }
    });
}

fn line(report: &Report) -> String {
    let Report { seed, steps, acknowledged, unknown, refused, hash, faults, .. } = report;
    let counts = if report.counts() { "" } else { " (does not count)" };
    format!(
        "seed={seed} acknowledged={acknowledged} unknown={unknown} refused={refused} \
         steps={steps} hash={hash:016x} faults={faults:?}{counts}"
    )
}

/// The sums over all seeds of an exploration.
struct Total {
    began: Instant,
    seeds: u64,
    counted: u64,
    steps: u64,
    ops: u64,
    faults: BTreeMap<String, u64>,
    coverage: BTreeMap<Path, u64>,
    drawn: Distribution,
    failed: Vec<u64>,
}

impl Total {
    fn new() -> Self {
        Self {
            began: Instant::now(),
            seeds: 0,
            counted: 0,
            steps: 0,
            ops: 0,
            faults: BTreeMap::new(),
            coverage: Path::ALL.into_iter().map(|path| (path, 0)).collect(),
            drawn: Distribution::default(),
            failed: Vec::new(),
        }
    }

    fn add(&mut self, report: &Report) {
        self.seeds += 1;
        self.counted += u64::from(report.counts());
        self.steps += report.steps;
        self.ops += report.acknowledged;
        for (kind, n) in &report.faults {
            *self.faults.entry(kind.clone()).or_default() += n;
        }
        for (&path, n) in &report.coverage {
            *self.coverage.entry(path).or_default() += n;
        }
        self.drawn.add(&report.drawings);
        for violation in &report.violations {
            print_line(&format!(
                "FAILED seed={} promise={} {}",
                report.seed, violation.promise, violation.detail
            ));
        }
        if !report.violations.is_empty() {
            self.failed.push(report.seed);
        }
    }

    /// The summary for readers: the counts, the faults, and which rare paths were taken.
    fn text(&self) -> String {
        let seconds = self.began.elapsed().as_secs_f64();
        let per_second = self.seeds as f64 / seconds.max(0.001);
        let list = |counts: Vec<String>| counts.join(", ");
        format!(
            "{} seeds in {seconds:.0} s ({per_second:.1} a second), {} of them count; {} steps, \
             {} operations acknowledged\n\
             faults: {}\npaths: {}\nnever taken: {}\n\
             limits and waits: the number of seeds with the shipped value; otherwise the least, \
             the quartiles and the most\n  {}",
            self.seeds,
            self.counted,
            self.steps,
            self.ops,
            list(self.faults.iter().map(|(kind, n)| format!("{kind} {n}")).collect()),
            list(self.coverage.iter().map(|(path, n)| format!("{path:?} {n}")).collect()),
            list(
                self.coverage
                    .iter()
                    .filter(|(_, n)| **n == 0)
                    .map(|(p, _)| format!("{p:?}"))
                    .collect()
            ),
            self.drawn.lines().join("\n  "),
        )
    }

    fn json(&self) -> String {
        let coverage = self.coverage.iter().map(|(path, &n)| (format!("{path:?}"), n));
        format!(
            "{{\"seeds\":{},\"counted\":{},\"seconds\":{:.1},\"steps\":{},\"ops\":{},\"faults\":{},\
             \"coverage\":{},\"failed\":{:?}}}",
            self.seeds,
            self.counted,
            self.began.elapsed().as_secs_f64(),
            self.steps,
            self.ops,
            object(self.faults.iter().map(|(kind, &n)| (kind, n))),
            object(coverage),
            self.failed,
        )
    }
}

fn object(counts: impl Iterator<Item = (impl Display, u64)>) -> String {
    let members: Vec<String> = counts.map(|(name, n)| format!("\"{name}\":{n}")).collect();
    format!("{{{}}}", members.join(","))
}

fn print_line(line: &str) {
    // A closed pipe is not an error here; the exit code still reports the result.
    let _closed = writeln!(std::io::stdout(), "{line}");
}
