//! `dkc count`: counts every line of a file as a key.
//!
//! ```text
//!   reader (thread) ── Batch ──▶ workers, each one request at a time ── Outcome ──▶ totals
//! ```
//!
//! Several requests are in flight, so lines are not counted in order; they need not be, since
//! addition doesn't care. What was surely not applied is sent again until it is. What may have been
//! applied is never sent again, but reported by line: `known ≤ count ≤ known + unknown` holds for
//! every key. Memory is bounded by the batches in flight, not by the input.
//!
//! Counting stops early when a batch could not be counted for `--give-up`, when the service refuses
//! a whole request for good, or at Ctrl-C; then the lines not read are not counted, and said so.

mod batch;
mod lines;
mod pending;
mod progress;

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context;
use bench::http::{Connection, Request, Url};
use serde::Serialize;
use tokio::sync::{Mutex, mpsc};

use self::batch::{Batch, Batches};
use self::lines::{LineRange, Lines};
use self::pending::{Next, Outcome, Pending};
use self::progress::Progress;
use crate::client::{self, GRACE, ServerArgs};
use crate::exit::Exit;
use crate::output;

/// The longest the service allows. Nothing is gained by hearing "unknown" sooner.
const DEADLINE: Duration = Duration::from_secs(60);
const READ_BYTES: usize = 1 << 20;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Namespace of the counters
    #[arg(value_name = "NS", value_parser = client::namespace)]
    namespace: String,
    /// Input, one key a line; `-` is standard input
    #[arg(default_value = "-")]
    file: PathBuf,
    /// Lines in one request
    #[arg(long, default_value_t = 5000, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    batch: u32,
    /// Requests in flight
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=1024))]
    in_flight: u32,
    /// Seconds after which a request that is refused again and again ends the count
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    give_up: u64,
    #[command(flatten)]
    server: ServerArgs,
}

/// What the tasks of one count share.
struct Shared {
    namespace: String,
    urls: Vec<Url>,
    give_up: Duration,
    /// Nothing more is read or sent, and nothing refused is sent again.
    stop: AtomicBool,
    bytes_read: AtomicU64,
    retries: AtomicU64,
}

/// How it ended. The JSON that `--json` prints.
#[derive(Debug, Default, Serialize)]
struct Report {
    namespace: String,
    /// Lines read. `lines` = `applied` + lines unknown, not applied and failed + `skipped`.
    lines: u64,
    /// Empty lines, which are no keys.
    skipped: u64,
    applied: u64,
    unknown: Vec<LineRange>,
    not_applied: Vec<LineRange>,
    failed: Vec<LineRange>,
    /// Whether the whole input was read.
    complete: bool,
    reasons: Vec<String>,
    retries: u64,
    seconds: f64,
    per_second: f64,
}

pub(crate) async fn run(args: Args) -> anyhow::Result<Exit> {
    let (input, size) = match open(&args.file) {
        Ok(opened) => opened,
        Err(error) => {
            output::note(&format!("error: {}: {error}", args.file.display()));
            return Ok(Exit::Usage);
        }
    };
    let shared = Arc::new(Shared {
        namespace: args.namespace,
        urls: args.server.urls,
        give_up: Duration::from_secs(args.give_up),
        stop: AtomicBool::new(false),
        bytes_read: AtomicU64::new(0),
        retries: AtomicU64::new(0),
    });
    let begun = Instant::now();
    let workers = args.in_flight as usize;
    let (to_workers, batches) = mpsc::channel(workers);
    let (to_totals, outcomes) = mpsc::channel(workers);

    let reader = {
        let (shared, lines) = (shared.clone(), args.batch as usize);
        std::thread::spawn(move || read(input, lines, &shared, &to_workers))
    };
    let batches = Arc::new(Mutex::new(batches));
    for worker in 0..workers {
        tokio::spawn(work(worker, shared.clone(), batches.clone(), to_totals.clone()));
    }
    drop(to_totals);
    tokio::spawn(stop_at_ctrl_c(shared.clone()));

    let progress = Progress::new(size, args.server.json);
    let mut report = total(outcomes, &shared, progress, begun).await;
    let read = tokio::task::spawn_blocking(move || reader.join())
        .await?
        .map_err(|_| anyhow::anyhow!("the reader panicked"))?;
    match read {
        Ok(at_end) => report.complete = at_end,
        Err(error) => report.reasons.push(format!("{}: {error}", args.file.display())),
    }
    report.retries = shared.retries.load(Ordering::Relaxed);
    report.namespace.clone_from(&shared.namespace);
    say(&report, args.server.json)
}

fn open(path: &PathBuf) -> io::Result<(Box<dyn Read + Send>, Option<u64>)> {
    if path.as_os_str() == "-" {
        return Ok((Box::new(io::stdin()), None));
    }
    let file = File::open(path)?;
    let data = file.metadata()?;
    if data.is_dir() {
        return Err(io::ErrorKind::IsADirectory.into());
    }
    // A pipe has no size to compare with.
    Ok((Box::new(file), data.is_file().then_some(data.len())))
}

/// Whether the whole input was read.
fn read(
    input: Box<dyn Read + Send>,
    lines: usize,
    shared: &Shared,
    to_workers: &mpsc::Sender<Batch>,
) -> io::Result<bool> {
    let mut batches = Batches::new(BufReader::with_capacity(READ_BYTES, input), lines);
    while !shared.stop.load(Ordering::Relaxed) {
        let Some(batch) = batches.next()? else { return Ok(true) };
        shared.bytes_read.store(batches.bytes_read(), Ordering::Relaxed);
        if to_workers.blocking_send(batch).is_err() {
            return Ok(false);
        }
    }
    Ok(false)
}

/// Takes batches until there are no more, and sees each through before it takes the next.
async fn work(
    number: usize,
    shared: Arc<Shared>,
    batches: Arc<Mutex<mpsc::Receiver<Batch>>>,
    to_totals: mpsc::Sender<Outcome>,
) {
    let mut connections: Vec<_> = shared.urls.iter().cloned().map(Connection::new).collect();
    // Workers begin at different gateways, so that all of them get their share.
    let mut at = number % connections.len();
    loop {
        let batch = batches.lock().await.recv().await;
        let Some(batch) = batch else { return };
        let outcome = see_through(batch, &shared, &mut connections, &mut at).await;
        if to_totals.send(outcome).await.is_err() {
            return;
        }
    }
}

async fn see_through(
    batch: Batch,
    shared: &Shared,
    connections: &mut [Connection],
    at: &mut usize,
) -> Outcome {
    let path = format!("/v1/counters/{}/increment", shared.namespace);
    let begun = Instant::now();
    let mut pending = Pending::new(batch);
    while pending.is_open() && !shared.stop.load(Ordering::Relaxed) {
        let connection = &mut connections[*at];
        let request = Request::post(connection.url(), &path, DEADLINE, &pending.body());
        let answer = connection.call(&request, DEADLINE + GRACE).await;
        let lost = answer.is_err();
        let next = pending.on_answer(answer);
        if lost || matches!(next, Next::Again { elsewhere: true, .. }) {
            *at = (*at + 1) % connections.len();
        }
        if let Next::Again { after, .. } = next {
            if begun.elapsed() + after > shared.give_up {
                shared.stop.store(true, Ordering::Relaxed);
                break;
            }
            shared.retries.fetch_add(1, Ordering::Relaxed);
            tokio::time::sleep(after).await;
        }
    }
    if pending.hopeless {
        shared.stop.store(true, Ordering::Relaxed);
    }
    pending.outcome()
}

/// The first Ctrl-C lets what is in flight be answered, so that it needn't be unknown.
async fn stop_at_ctrl_c(shared: Arc<Shared>) {
    if tokio::signal::ctrl_c().await.is_ok() {
        shared.stop.store(true, Ordering::Relaxed);
        output::note(
            "\nstopping: waiting for what was sent (Ctrl-C again: give it up, unreported)",
        );
        if tokio::signal::ctrl_c().await.is_ok() {
            std::process::exit(Exit::Unknown as i32);
        }
    }
}

async fn total(
    mut outcomes: mpsc::Receiver<Outcome>,
    shared: &Shared,
    mut progress: Progress,
    begun: Instant,
) -> Report {
    let mut report = Report::default();
    let (mut unknown, mut not_applied) = (Lines::default(), Lines::default());
    let mut failed = Lines::default();
    while let Some(outcome) = outcomes.recv().await {
        report.lines += outcome.lines;
        report.skipped += outcome.skipped;
        report.applied += outcome.applied;
        unknown.append(&outcome.unknown);
        not_applied.append(&outcome.not_applied);
        failed.append(&outcome.failed);
        for reason in outcome.reasons {
            if report.reasons.len() < 20 && !report.reasons.contains(&reason) {
                report.reasons.push(reason);
            }
        }
        progress.show(report.lines, shared.bytes_read.load(Ordering::Relaxed), begun.elapsed());
    }
    progress.clear();
    report.unknown = unknown.ranges();
    report.not_applied = not_applied.ranges();
    report.failed = failed.ranges();
    report.seconds = begun.elapsed().as_secs_f64();
    report.per_second = report.applied as f64 / report.seconds.max(1e-9);
    report
}

fn exit_of(report: &Report) -> Exit {
    if !report.unknown.is_empty() {
        Exit::Unknown
    } else if !(report.complete && report.not_applied.is_empty() && report.failed.is_empty()) {
        Exit::Failed
    } else {
        Exit::Done
    }
}

fn say(report: &Report, as_json: bool) -> anyhow::Result<Exit> {
    if as_json {
        output::json(report)?;
        return Ok(exit_of(report));
    }
    let Report { applied, lines, seconds, per_second, .. } = report;
    output::result(&format!(
        "counted {applied} of {lines} lines in {seconds:.1} s, {per_second:.0} lines/s"
    ))
    .context("writing the result")?;
    if report.skipped > 0 {
        output::note(&format!("skipped {} empty lines", report.skipped));
    }
    let heaps = [
        ("unknown, may have been counted:", &report.unknown),
        ("not counted:", &report.not_applied),
        ("can't be counted:", &report.failed),
    ];
    for (title, ranges) in heaps.into_iter().filter(|(_, ranges)| !ranges.is_empty()) {
        let lines: u64 = ranges.iter().map(|range| range.last_line - range.first_line + 1).sum();
        let shown: Vec<_> = ranges.iter().take(10).map(range_text).collect();
        let more = if ranges.len() > 10 { ", … (--json lists all)" } else { "" };
        output::note(&format!("{title} {lines} lines: {}{more}", shown.join(", ")));
    }
    if !report.complete {
        output::note(&format!("stopped early: nothing after line {lines} was counted"));
    }
    for reason in &report.reasons {
        output::note(&format!("reason: {reason}"));
    }
    Ok(exit_of(report))
}

fn range_text(range: &LineRange) -> String {
    if range.first_line == range.last_line {
        range.first_line.to_string()
    } else {
        format!("{}-{}", range.first_line, range.last_line)
    }
}
