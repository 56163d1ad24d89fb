//! `sim --seed N` replays one seed with its event log; `sim --minutes M` explores fresh ones;
//! `sim --hunt` looks for a seed that shows each planted bug, among fresh ones; `sim --record FILE` among the first
//! ones, and writes them down.
//!
//! Exit code 0: every promise held, or every bug was found; 1: lines `FAILED seed=N promise=…` name what did not, or
//! lines `bug=NAME` end with `NOT FOUND`; 2: usage. The last line of a run or an exploration is JSON.

use std::collections::BTreeMap;
use std::io::Write;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant, SystemTime};

use engine::planted::Planted;
use tests::sim::{Report, run};

const USAGE: &str = "sim [--seed N | --minutes M | --seeds N] [--from N] [--planted NAME] [--quiet]
sim --hunt | --record FILE [--seeds N] [--planted NAME]   (at most N seeds for each bug, or for one; with --features planted-bugs)";

/// How long one bug is looked for. The rarest shows in about one seed of 10,000 (LearnerAtCommitHint).
const HUNT_SEEDS: u64 = 100_000;

struct Args {
    seed: Option<u64>,
    /// Explore for so long …
    time: Option<Duration>,
    /// … or so many counted seeds.
    seeds: u64,
    from: u64,
    planted: Option<Planted>,
    quiet: bool,
    /// Look for every planted bug …
    hunt: bool,
    /// … from seed 1 on, for the record.
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
    let mut total = Total::default();
    match args.seed {
        Some(seed) => {
            let out: Option<Box<dyn Write + Send>> = if args.quiet {
                None
            } else {
                Some(Box::new(std::io::BufWriter::new(std::io::stdout())))
            };
            total.add(&run(seed, args.planted, out));
        }
        None => explore(&args, &mut total),
    }
    say(&total.json());
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
        return Err("say what to run".into());
    }
    Ok(parsed)
}

/// Says for each planted bug which seed shows it and how many were looked at; the record gets both names and seeds.
fn hunt_all(args: &Args) -> ExitCode {
    let (mut lines, mut all_found) = (String::new(), true);
    for bug in Planted::ALL.into_iter().filter(|&bug| args.planted.is_none_or(|one| one == bug)) {
        let began = Instant::now();
        let found = hunt(bug, args.from, args.seeds.min(HUNT_SEEDS));
        let took = began.elapsed().as_secs();
        if let Some(seed) = found {
            let looked_at = seed - args.from + 1;
            say(&format!("bug={bug:?} seed={seed} after {looked_at} seeds, {took} s"));
            lines += &format!("{bug:?} {seed}\n");
        } else {
            say(&format!("bug={bug:?} {took} s: NOT FOUND"));
        }
        all_found &= found.is_some();
    }
    if let Some(file) = &args.record
        && let Err(error) = std::fs::write(file, lines)
    {
        say(&format!("{file}: {error}"));
        return ExitCode::FAILURE;
    }
    if all_found { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// The first seed that shows the bug: the same one however many cores look.
fn hunt(bug: Planted, from: u64, seeds: u64) -> Option<u64> {
    let (next, first) = (AtomicU64::new(from), AtomicU64::new(u64::MAX));
    let look = || {
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed - from >= seeds || seed > first.load(Ordering::Relaxed) {
                return;
            }
            if !run(seed, Some(bug), None).violations.is_empty() {
                first.fetch_min(seed, Ordering::Relaxed);
            }
        }
    };
    let threads = std::thread::available_parallelism().map_or(2, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(look);
        }
    });
    Some(first.into_inner()).filter(|&seed| seed < u64::MAX)
}

/// Fresh seeds on every core. Seeds are independent, so threads change nothing in any of them.
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
                say(&line(&report));
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

#[derive(Default)]
struct Total {
    seeds: u64,
    counted: u64,
    steps: u64,
    ops: u64,
    faults: BTreeMap<String, u64>,
    failed: Vec<u64>,
}

impl Total {
    fn add(&mut self, report: &Report) {
        self.seeds += 1;
        self.counted += u64::from(report.counts());
        self.steps += report.steps;
        self.ops += report.acknowledged;
        for (kind, n) in &report.faults {
            *self.faults.entry(kind.clone()).or_default() += n;
        }
        for violation in &report.violations {
            say(&format!(
                "FAILED seed={} promise={} {}",
                report.seed, violation.promise, violation.detail
            ));
        }
        if !report.violations.is_empty() {
            self.failed.push(report.seed);
        }
    }

    fn json(&self) -> String {
        let faults: Vec<String> =
            self.faults.iter().map(|(kind, n)| format!("\"{kind}\":{n}")).collect();
        format!(
            "{{\"seeds\":{},\"counted\":{},\"steps\":{},\"ops\":{},\"faults\":{{{}}},\"failed\":{:?}}}",
            self.seeds,
            self.counted,
            self.steps,
            self.ops,
            faults.join(","),
            self.failed,
        )
    }
}

fn say(line: &str) {
    // A closed pipe is the reader's business; the exit code still tells.
    let _closed = writeln!(std::io::stdout(), "{line}");
}
