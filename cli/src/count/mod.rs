//! `dkc count`: counts every line of a file as a key.
//!
//! ```text
//!   reader (thread) ─ LineBatch ▶ journal (thread) ─ SendJob ▶ workers ─ BatchOutcome ▶ totals
//!
//!   reader: bytes (input, follow) → text (content) → lines (batches, csv) → keys (keys)
//!           → LineBatch (batch)
//! ```
//!
//! Several requests are in flight, one per worker, so lines are not counted in order; addition is
//! commutative. A batch is sent under one token until all of it is applied, through any gateway.
//! Lines with an unknown outcome are reported: `known ≤ count ≤ known + unknown` holds for every
//! key. Memory is bounded by the batches in flight, not by the input. With `--resume-id`, a
//! [`journal`] extends this guarantee over several runs.
//!
//! The count stops early when a batch could not be counted for `--give-up`, when the service
//! rejects a whole request for good, or when no server that answers is a gateway. Then answers to
//! requests in flight are still awaited, lines that were read but not sent count as not read, and
//! the report states after which line nothing was counted.
//!
//! Ctrl-C (or SIGTERM) is the usual end of `tail -F log | dkc count hits`, so it is not a failure:
//! reading stops, the lines read so far are counted, and the exit code depends on them alone. The
//! time for this is limited ([`signals`]): requests that are not answered within three seconds are
//! reported as unknown.

mod args;
mod batch;
mod batches;
mod content;
mod csv;
mod follow;
mod input;
mod journal;
mod keys;
mod lines;
mod pending;
mod progress;
mod reasons;
mod report;
mod shared;
mod signals;
mod totals;
mod workers;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context;
use tokio::sync::{Mutex, mpsc, oneshot, watch};

pub(crate) use self::args::Args;
use self::batch::LineBatch;
use self::batches::Batches;
use self::input::Input;
use self::journal::{Journal, SendJob};
use self::pending::BatchOutcome;
use self::progress::ProgressBar;
use self::report::{CountReport, print_report};
use self::shared::{CountContext, StallTimer, Stop};
use crate::exit::{CommandExit, UsageError};

/// Reads batches from any input.
type BatchReader = Batches<Box<dyn io::BufRead + Send>>;

/// Counts the input and prints the report.
pub(crate) async fn run(args: Args) -> anyhow::Result<CommandExit> {
    let of_input = |error: &io::Error| match args.file.to_str() {
        Some("-") => format!("standard input: {error}"),
        _ => format!("{}: {error}", args.file.display()),
    };
    let keys = args.check_input().and_then(|()| args.keys()).map_err(UsageError)?;
    let input = open_input(&args).map_err(|error| UsageError(of_input(&error)))?;
    let journal = open_journal(&args)?;
    let writer = |journal: &Journal| journal.writer().context("the journal");
    let splits = journal.as_ref().map(writer).transpose()?.map(std::sync::Mutex::new);
    let outcome_journal = journal.as_ref().map(writer).transpose()?;
    let series = match &journal {
        Some(journal) => journal.series().to_owned(),
        None => client::fresh_id().context("/dev/urandom")?,
    };
    let shared = Arc::new(CountContext {
        path: format!("/v1/counters/{}/increment", args.namespace),
        urls: args.server.urls.clone(),
        give_up: Duration::from_secs(args.give_up),
        series,
        splits,
        lines_max: Arc::new(AtomicUsize::new(args.batch as usize)),
        closed: Arc::default(),
        stop: watch::Sender::new(Stop::Not),
        bytes_read: AtomicU64::new(0),
        retries: AtomicU64::new(0),
        waiting: AtomicUsize::new(0),
        reason: std::sync::Mutex::default(),
        stall: std::sync::Mutex::new(StallTimer::new()),
    });
    // Signals are caught before the first request: from here on each one leads to a report.
    tokio::spawn(signals::stop_at_signal(shared.clone())?);
    let begun = Instant::now();
    let size = input.size;
    let mut batches = Batches::new(input.lines, args.batch as usize);
    (batches.keys, batches.flush_after) = (keys, input.is_live.then_some(args.flush_interval));
    (batches.lines_max, batches.closed) = (shared.lines_max.clone(), shared.closed.clone());
    // Such an input may have been extended when it is read again.
    batches.whole_lines_only = args.resume_id.is_some() || args.follow;
    let workers = args.in_flight as usize;
    // Twice as many batches as workers, so that no worker waits for the reader.
    let (to_workers, jobs) = mpsc::channel(workers);
    let (to_totals, outcomes) = mpsc::channel(workers);
    let mut threads = start_reading(batches, journal, &shared, to_workers, &to_totals, workers);
    let jobs = Arc::new(Mutex::new(jobs));
    for worker in 0..workers {
        tokio::spawn(workers::work(worker, shared.clone(), jobs.clone(), to_totals.clone()));
    }
    drop((jobs, to_totals));

    let progress = ProgressBar::new(size, args.server.json);
    let mut report = totals::total(outcomes, &shared, progress, outcome_journal, begun).await;
    match threads.read.try_recv() {
        Ok(Ok(ReadLines { lines, bytes_left, all })) => {
            report.bytes_left = bytes_left;
            report.settled = lines == report.lines;
            report.complete = all && report.settled;
        }
        Ok(Err(error)) if content::is_unsupported(&error) => {
            return CommandExit::usage(of_input(&error));
        }
        Ok(Err(error)) => report.reasons.note(&of_input(&error)),
        // The count stopped before the reader ended.
        Err(oneshot::error::TryRecvError::Empty) => {}
        Err(oneshot::error::TryRecvError::Closed) => anyhow::bail!("the reader panicked"),
    }
    if let Some(Ok(Err(error))) = threads.journaled.map(|mut journaled| journaled.try_recv()) {
        report.reasons.note(&format!("{error:#}"));
        (report.settled, report.complete) = (false, false);
    }
    finish(report, &shared, args)
}

fn open_input(args: &Args) -> io::Result<Input> {
    if args.follow {
        return Ok(input::follow(&args.file, args.input_options()));
    }
    input::open(&args.file, args.input_options())
}

fn open_journal(args: &Args) -> anyhow::Result<Option<Journal>> {
    let Some(id) = &args.resume_id else { return Ok(None) };
    let folder = args.resume_dir.clone().or_else(journal::default_folder);
    let folder = folder.ok_or_else(|| {
        let why = "--resume-id needs a directory for its journal: set --resume-dir";
        UsageError(why.to_owned())
    })?;
    Journal::open(&folder, id, &args.namespace).map(Some)
}

/// The results of the reading threads, which are available when the threads end.
struct ReaderThreads {
    read: oneshot::Receiver<io::Result<ReadLines>>,
    /// The result of the journal, if there is one.
    journaled: Option<oneshot::Receiver<anyhow::Result<()>>>,
}

/// The position up to which the input was read.
struct ReadLines {
    lines: u64,
    bytes_left: u64,
    /// True if the input was read to its end.
    all: bool,
}

/// Starts the threads that hand batches to the workers: one, or with a journal two.
fn start_reading(
    mut batches: BatchReader,
    journal: Option<Journal>,
    shared: &Arc<CountContext>,
    to_workers: mpsc::Sender<SendJob>,
    to_totals: &mpsc::Sender<BatchOutcome>,
    queue: usize,
) -> ReaderThreads {
    // The result is sent before the channel to the workers is closed.
    let (send_read, read) = oneshot::channel();
    let Some(journal) = journal else {
        let shared = shared.clone();
        std::thread::spawn(move || {
            let pass_on =
                |batch| to_workers.blocking_send(SendJob::new(&shared.series, batch)).is_ok();
            drop(send_read.send(read_all(batches, &shared, pass_on)));
        });
        return ReaderThreads { read, journaled: None };
    };
    batches.cuts = journal.cuts();
    let (to_journal, admitted) = mpsc::channel(queue);
    let (send_journaled, journaled) = oneshot::channel();
    let (to_totals, closed) = (to_totals.clone(), shared.closed.clone());
    let shared = shared.clone();
    std::thread::spawn(move || {
        let pass_on = |batch| to_journal.blocking_send(batch).is_ok();
        drop(send_read.send(read_all(batches, &shared, pass_on)));
    });
    std::thread::spawn(move || {
        let done = record(journal, admitted, &closed, &to_workers, &to_totals);
        drop(send_journaled.send(done));
    });
    ReaderThreads { read, journaled: Some(journaled) }
}

/// Reads batches and passes them on until the input or the count ends.
fn read_all(
    mut batches: BatchReader,
    shared: &CountContext,
    mut pass_on: impl FnMut(LineBatch) -> bool,
) -> io::Result<ReadLines> {
    let position = |batches: &BatchReader, all| ReadLines {
        lines: batches.lines_read(),
        bytes_left: batches.bytes_left(),
        all,
    };
    while let Some(batch) = batches.next()? {
        shared.bytes_read.store(batches.bytes_read(), Ordering::Relaxed);
        if !pass_on(batch) {
            return Ok(position(&batches, false));
        }
    }
    Ok(position(&batches, !shared.closed.load(Ordering::Relaxed)))
}

/// Records batches in the journal before they are sent: all batches that are waiting with one
/// write.
fn record(
    mut journal: Journal,
    mut read: mpsc::Receiver<LineBatch>,
    closed: &AtomicBool,
    to_workers: &mpsc::Sender<SendJob>,
    to_totals: &mpsc::Sender<BatchOutcome>,
) -> anyhow::Result<()> {
    while let Some(batch) = read.blocking_recv() {
        let more = std::iter::from_fn(|| read.try_recv().ok());
        let group = std::iter::once(batch).chain(more).collect();
        for next in journal.admit(group)? {
            let taken = match next {
                journal::Admitted::Send(job) => to_workers.blocking_send(job).is_ok(),
                journal::Admitted::Known(outcome) => to_totals.blocking_send(outcome).is_ok(),
            };
            if !taken {
                return Ok(());
            }
        }
    }
    if closed.load(Ordering::Relaxed) { Ok(()) } else { journal.input_ended() }
}

fn finish(
    mut report: CountReport,
    shared: &CountContext,
    args: Args,
) -> anyhow::Result<CommandExit> {
    report.retries = shared.retries.load(Ordering::Relaxed);
    report.namespace = args.namespace;
    report.follows = args.follow;
    report.resume_id = args.resume_id;
    print_report(&report, args.server.json)
}
