//! `failover --runs 20 [--signal KILL|STOP] [-- FLAGS of dkc dev]`: prints the worst gap of each
//! run.
//!
//! Exit code 0: every bound held (KILL: worst ≤ 1 s; STOP: median < TTL + 0.5 s, worst < TTL + 1
//! s); 1: a bound was exceeded; 2: usage; 101: a count was wrong or the cluster did not recover.

use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

use tests::cluster::failover::{Gap, LEASE_TTL, Steps, run};
use tests::cluster::{Cluster, Signal};

const USAGE: &str = "failover [--runs N] [--signal KILL|STOP] [-- FLAGS of dkc dev]";

fn main() -> ExitCode {
    let Some(args) = parse(std::env::args().skip(1)) else {
        tests::note(USAGE);
        return ExitCode::from(2);
    };
    let flags: Vec<&str> = args.flags.iter().map(String::as_str).collect();
    let cluster = Cluster::start(&flags);
    let nodes = cluster.names("storage-node");
    let replicas = cluster.shards().expect("a ready cluster")[0].isr.len();
    let mut worst = Vec::new();
    for number in 0..args.runs {
        let victim = &nodes[number % nodes.len()];
        let run = run(&cluster, &format!("run-{number}"), victim, args.signal, replicas);
        let Gap { shard, led, gap } = run.worst();
        let role = if *led { "led" } else { "followed" };
        print_line(&format!(
            "run {:>2}: {victim}, worst {gap:>7.1?} (shard {shard}, which it {role}), \
             median shard {:>7.1?}, {} requests failed{}",
            number + 1,
            run.median(),
            run.failed,
            run.steps.as_ref().map(steps).unwrap_or_default()
        ));
        worst.push(*gap);
    }
    worst.sort();
    let (median, worst) = (worst[worst.len() / 2], worst[worst.len() - 1]);
    print_line(&format!(
        "{} runs: median of the worst {median:.1?}, worst of all {worst:.1?}",
        args.runs
    ));
    let held = match args.signal {
        Signal::STOP => {
            median < LEASE_TTL + Duration::from_millis(500)
                && worst < LEASE_TTL + Duration::from_secs(1)
        }
        _ => worst <= Duration::from_secs(1),
    };
    if held { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// The steps of a failover that the coordinator takes. What is left of the longest gap is the time
/// until a request reaches the new primary and is answered.
fn steps(steps: &Steps) -> String {
    let Steps { dead, promoted } = steps;
    format!("; found dead after {dead:.1?}, all promoted after {promoted:.1?}")
}

struct Args {
    runs: usize,
    signal: Signal,
    flags: Vec<String>,
}

fn parse(mut words: impl Iterator<Item = String>) -> Option<Args> {
    let mut args = Args { runs: 20, signal: Signal::KILL, flags: Vec::new() };
    while let Some(word) = words.next() {
        match word.as_str() {
            "--runs" => args.runs = words.next()?.parse().ok().filter(|&runs| runs > 0)?,
            "--signal" => {
                args.signal = match words.next()?.as_str() {
                    "KILL" => Signal::KILL,
                    "STOP" => Signal::STOP,
                    _ => return None,
                }
            }
            "--" => {
                args.flags = words.collect();
                break;
            }
            _ => return None,
        }
    }
    Some(args)
}

fn print_line(text: &str) {
    let _closed_pipe = writeln!(std::io::stdout().lock(), "{text}");
}
