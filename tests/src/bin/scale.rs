//! Simulates large clusters: nodes join, are drained and die, a zone dies, all at once and under
//! traffic.
//!
//! `scale [--nodes N] [--shards N] [--seeds N] [--from N]`
//!
//! Each seed is a run of its own, and prints one line; by default 50 runs of 100 nodes with 4,096
//! shards, on every core. Exit code 0: every map became level and every promise held.

use std::io::Write;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use tests::sim::plan::large::ClusterSize;
use tests::sim::scale::{ScaleReport, run_scale};

const USAGE: &str = "scale [--nodes N] [--shards N] [--seeds N] [--from N]";

fn main() -> ExitCode {
    let Some((size, seeds, from)) = parse(std::env::args().skip(1)) else {
        let _closed = writeln!(std::io::stderr(), "{USAGE}");
        return ExitCode::from(2);
    };
    let (next, failed) = (AtomicU64::new(from), AtomicBool::new(false));
    let work = || {
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= from + seeds {
                return;
            }
            let begun = Instant::now();
            let report = run_scale(seed, size);
            print(seed, begun.elapsed().as_secs_f64(), &report);
            if !report.violations.is_empty() {
                failed.store(true, Ordering::Relaxed);
            }
        }
    };
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..cores.min(seeds as usize) {
            scope.spawn(work);
        }
    });
    if failed.into_inner() { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

fn parse(mut args: impl Iterator<Item = String>) -> Option<(ClusterSize, u64, u64)> {
    let mut size = ClusterSize {
        nodes: 100,
        shards: 4_096,
        gateways: 20,
        coordinators: 3,
        zones: 3,
        clients: 64,
        joining: 10,
        drained: 5,
    };
    let (mut seeds, mut from) = (50, 1);
    while let Some(name) = args.next() {
        let number: u64 = args.next()?.parse().ok()?;
        match name.as_str() {
            "--nodes" => size.nodes = number.try_into().ok()?,
            "--shards" => size.shards = number.try_into().ok()?,
            "--seeds" => seeds = number,
            "--from" => from = number,
            _ => return None,
        }
    }
    Some((size, seeds, from))
}

fn print(seed: u64, seconds: f64, report: &ScaleReport) {
    let ScaleReport { moves, moves_min, copies, leads, peers_max, .. } = report;
    let level = report.level_ms.map_or("never".into(), |ms| format!("{:.1} s", ms as f64 / 1e3));
    let _closed = writeln!(
        std::io::stdout(),
        "seed {seed}: placed after {:.1} s, level {level} after the first change; {moves} copies \
         made, {moves_min} at least; copies {} to {}, leads {} to {}, at most {peers_max} peers; \
         etcd: {} changes, at most {} a second; {} acknowledged, {} unknown; {} steps in \
         {seconds:.0} s",
        report.placed_ms as f64 / 1e3,
        copies.0,
        copies.1,
        leads.0,
        leads.1,
        report.etcd_writes,
        report.etcd_writes_per_second_max,
        report.acknowledged,
        report.unknown,
        report.steps
    );
    for violation in &report.violations {
        let _closed =
            writeln!(std::io::stdout(), "  FAILED {}: {}", violation.promise, violation.detail);
    }
}
