//! `dkc count`: counts every line of a file as a key.
//!
//! ```text
//!   reader (thread) ── Batch ──▶ journal (thread) ── Job ──▶ workers, each one request at a time ── Outcome ──▶ totals
//!
//!   reader: bytes (input, follow) → text (content) → lines (batches, csv) → keys (keys) → Batch (batch)
//! ```
//!
//! Several requests are in flight, so lines are not counted in order; they need not be, since
//! addition doesn't care. A batch is sent under one token until all of it is applied, through whichever gateway
//! answers. What can't be found out is reported by line: `known ≤ count ≤ known + unknown` holds for
//! every key. Memory is bounded by the batches in flight, not by the input. With `--resume-id` a [`journal`] makes that
//! hold across runs, too.
//!
//! Counting stops early when a batch could not be counted for `--give-up`, when the service refuses
//! a whole request for good, or when what answers is no gateway. Then what was sent is still waited for, what was
//! read and not sent counts as never read, and the report says after which line nothing was counted.
//!
//! Ctrl-C (or SIGTERM) is the usual end of `tail -F log | dkc count hits`, so it is no failure: nothing
//! more is read, what was read is counted, and the exit code is about that alone. It is bounded ([`signals`]): what is
//! not answered within three seconds is reported as unknown.

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
use self::batch::Batch;
use self::batches::Batches;
use self::input::Input;
use self::journal::{Job, Journal, NoJournal};
use self::pending::Outcome;
use self::progress::Progress;
use self::report::{Report, say};
use self::shared::{Busy, Shared, Stop};
use crate::client;
use crate::exit::Exit;
use crate::output;

type Reader = Batches<Box<dyn io::BufRead + Send>>;

pub(crate) async fn run(args: Args) -> anyhow::Result<Exit> {
    let usage = |why: &str| {
        output::note(&format!("error: {why}"));
        Ok(Exit::Usage)
    };
    let of_input = |error: &io::Error| match args.file.to_str() {
        Some("-") => format!("standard input: {error}"),
        _ => format!("{}: {error}", args.file.display()),
    };
    let keys = match args.check_input().and_then(|()| args.keys()) {
        Ok(keys) => keys,
        Err(why) => return usage(&why),
    };
    let input = match open_input(&args) {
        Ok(input) => input,
        Err(error) => return usage(&of_input(&error)),
    };
    let journal = match open_journal(&args) {
        Ok(journal) => journal,
        Err(NoJournal::Usage(why)) => return usage(&why),
        Err(NoJournal::Failed(error)) => return Err(error),
    };
    let notes = |journal: &Journal| journal.notes().context("the journal");
    let splits = journal.as_ref().map(notes).transpose()?.map(std::sync::Mutex::new);
    let to_notes = journal.as_ref().map(notes).transpose()?;
    let series = match &journal {
        Some(journal) => journal.series().to_owned(),
        None => client::fresh_id().context("/dev/urandom")?,
    };
    let shared = Arc::new(Shared {
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
        busy: std::sync::Mutex::new(Busy::new()),
    });
    // Before the first request: a signal from here on ends in a report.
    tokio::spawn(signals::stop_at_signal(shared.clone())?);
    let begun = Instant::now();
    let size = input.size;
    let flush_after = input.is_live.then_some(args.flush_interval);
    let batches = Batches::new(input.lines, args.batch as usize)
        .under(keys)
        .limited_by(shared.lines_max.clone())
        // Such an input is read again, when it may hold more.
        .whole_lines_only(args.resume_id.is_some() || args.follow)
        .flushed_after(flush_after)
        .until(shared.closed.clone());
    let workers = args.in_flight as usize;
    // Twice as many batches as workers: none waits for the reader.
    let (to_workers, jobs) = mpsc::channel(workers);
    let (to_totals, outcomes) = mpsc::channel(workers);
    let mut source = start_reading(batches, journal, &shared, to_workers, &to_totals, workers);
    let jobs = Arc::new(Mutex::new(jobs));
    for worker in 0..workers {
        tokio::spawn(workers::work(worker, shared.clone(), jobs.clone(), to_totals.clone()));
    }
    drop((jobs, to_totals));

    let progress = Progress::new(size, args.server.json);
    let mut report = totals::total(outcomes, &shared, progress, to_notes, begun).await;
    match source.read.try_recv() {
        Ok(Ok(ReadLines { lines, bytes_left, all })) => {
            report.bytes_left = bytes_left;
            report.settled = lines == report.lines;
            report.complete = all && report.settled;
        }
        Ok(Err(error)) if content::is_refused(&error) => return usage(&of_input(&error)),
        Ok(Err(error)) => report.reasons.note(&of_input(&error)),
        // Stopped before it had ended.
        Err(oneshot::error::TryRecvError::Empty) => {}
        Err(oneshot::error::TryRecvError::Closed) => anyhow::bail!("the reader panicked"),
    }
    if let Some(Ok(Err(error))) = source.remembered.map(|mut remembered| remembered.try_recv()) {
        report.reasons.note(&format!("{error:#}"));
        (report.settled, report.complete) = (false, false);
    }
    finish(report, &shared, args)
}

fn open_input(args: &Args) -> io::Result<Input> {
    if args.follow {
        return Ok(input::follow(&args.file, args.taking()));
    }
    input::open(&args.file, args.taking())
}

fn open_journal(args: &Args) -> Result<Option<Journal>, NoJournal> {
    let Some(id) = &args.resume_id else { return Ok(None) };
    let folder = args.resume_dir.clone().or_else(journal::default_folder);
    let folder = folder.ok_or_else(|| {
        let why = "--resume-id needs a folder to note things in: name one with --resume-dir";
        NoJournal::Usage(why.to_owned())
    })?;
    Journal::open(&folder, id, &args.namespace).map(Some)
}

/// What the threads that read have to say when they end.
struct Source {
    read: oneshot::Receiver<io::Result<ReadLines>>,
    remembered: Option<oneshot::Receiver<anyhow::Result<()>>>,
}

/// How far the input was read.
struct ReadLines {
    lines: u64,
    bytes_left: u64,
    /// To its end.
    all: bool,
}

/// Starts the threads that hand batches to the workers: one, or with a journal two.
fn start_reading(
    batches: Reader,
    journal: Option<Journal>,
    shared: &Arc<Shared>,
    to_workers: mpsc::Sender<Job>,
    to_totals: &mpsc::Sender<Outcome>,
    queue: usize,
) -> Source {
    // What was read is said before the workers see that no more batches come.
    let (say_read, read) = oneshot::channel();
    let Some(journal) = journal else {
        let shared = shared.clone();
        std::thread::spawn(move || {
            let hand_on = |batch| to_workers.blocking_send(Job::new(&shared.series, batch)).is_ok();
            drop(say_read.send(read_all(batches, &shared, hand_on)));
        });
        return Source { read, remembered: None };
    };
    let batches = batches.cut_as(journal.cuts());
    let (to_journal, admitted) = mpsc::channel(queue);
    let (say_remembered, remembered) = oneshot::channel();
    let (to_totals, closed) = (to_totals.clone(), shared.closed.clone());
    let shared = shared.clone();
    std::thread::spawn(move || {
        let hand_on = |batch| to_journal.blocking_send(batch).is_ok();
        drop(say_read.send(read_all(batches, &shared, hand_on)));
    });
    std::thread::spawn(move || {
        let done = remember(journal, admitted, &closed, &to_workers, &to_totals);
        drop(say_remembered.send(done));
    });
    Source { read, remembered: Some(remembered) }
}

fn read_all(
    mut batches: Reader,
    shared: &Shared,
    mut hand_on: impl FnMut(Batch) -> bool,
) -> io::Result<ReadLines> {
    let stand = |batches: &Reader, all| ReadLines {
        lines: batches.lines_read(),
        bytes_left: batches.bytes_left(),
        all,
    };
    while let Some(batch) = batches.next()? {
        shared.bytes_read.store(batches.bytes_read(), Ordering::Relaxed);
        if !hand_on(batch) {
            return Ok(stand(&batches, false));
        }
    }
    Ok(stand(&batches, !shared.closed.load(Ordering::Relaxed)))
}

/// Notes batches in the journal before they can be sent: all that were read by then with one write.
fn remember(
    mut journal: Journal,
    mut read: mpsc::Receiver<Batch>,
    closed: &AtomicBool,
    to_workers: &mpsc::Sender<Job>,
    to_totals: &mpsc::Sender<Outcome>,
) -> anyhow::Result<()> {
    while let Some(batch) = read.blocking_recv() {
        let more = std::iter::from_fn(|| read.try_recv().ok());
        let group = std::iter::once(batch).chain(more).collect();
        for next in journal.admit(group)? {
            let taken = match next {
                journal::Next::Send(job) => to_workers.blocking_send(job).is_ok(),
                journal::Next::Known(outcome) => to_totals.blocking_send(outcome).is_ok(),
            };
            if !taken {
                return Ok(());
            }
        }
    }
    if closed.load(Ordering::Relaxed) { Ok(()) } else { journal.input_ended() }
}

fn finish(mut report: Report, shared: &Shared, args: Args) -> anyhow::Result<Exit> {
    report.retries = shared.retries.load(Ordering::Relaxed);
    report.namespace = args.namespace;
    report.follows = args.follow;
    report.resume_id = args.resume_id;
    say(&report, args.server.json)
}
