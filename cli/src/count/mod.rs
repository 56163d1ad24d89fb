//! `dkc count`: counts every line of a file as a key.
//!
//! ```text
//!   reader (thread) ── Batch ──▶ journal (thread) ── Job ──▶ workers, each one request at a time ── Outcome ──▶ totals
//! ```
//!
//! Several requests are in flight, so lines are not counted in order; they need not be, since
//! addition doesn't care. A batch is sent under one token until all of it is applied, through whichever gateway
//! answers. What can't be found out is reported by line: `known ≤ count ≤ known + unknown` holds for
//! every key. Memory is bounded by the batches in flight, not by the input. With `--resume-id` a [`journal`] makes that
//! hold across runs, too.
//!
//! Counting stops early when a batch could not be counted for `--give-up`, or when the service refuses
//! a whole request for good. Then what was sent is still waited for, what was read and not sent counts
//! as never read, and the report says after which line nothing was counted.
//!
//! Ctrl-C (or SIGTERM) is the usual end of `tail -F log | dkc count hits`, so it is no failure: nothing
//! more is read, what was read is counted, and the exit code is about that alone. It is bounded: after
//! [`STOP_PATIENCE`] nothing more is sent, and what was sent is answered within its deadline.

mod batch;
mod input;
mod journal;
mod lines;
mod pending;
mod progress;
mod report;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context;
use bench::http::{Connection, Media, Request, Url};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{Mutex, mpsc, oneshot, watch};

use self::batch::{Batch, Batches, Field};
use self::journal::{Job, Journal, NoJournal, Notes};
use self::lines::Lines;
use self::pending::{Next, Outcome, Pending};
use self::progress::{Progress, Stand};
use self::report::{Report, say};
use crate::client::{self, GRACE, ServerArgs};
use crate::exit::Exit;
use crate::output;

/// The longest the service allows. Nothing is gained by hearing "unknown" sooner.
const DEADLINE: Duration = Duration::from_secs(60);
/// How long after Ctrl-C what was read may still be sent.
const STOP_PATIENCE: Duration = Duration::from_secs(10);
const SHOW_EVERY: Duration = Duration::from_millis(200);
/// Enough to see what went wrong; an outage repeats itself.
const REASONS_MAX: usize = 20;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Namespace of the counters
    #[arg(value_name = "NS", value_parser = client::namespace)]
    namespace: String,
    /// Input, one key a line; `-` is standard input
    #[arg(default_value = "-")]
    file: PathBuf,
    /// The key is this field of a line, from 1; a line without it is skipped [default: the key is the whole line]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    field: Option<u32>,
    /// What stands between two fields, one byte (`\\t` is a TAB) [default: any white space]
    #[arg(long, value_name = "C", requires = "field", value_parser = delimiter)]
    delimiter: Option<u8>,
    /// How long a line that comes by a pipe may wait for others before it is sent, such as 250ms or 2s
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = input::duration)]
    flush_interval: Duration,
    /// Lines in one request
    #[arg(long, default_value_t = 5000, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    batch: u32,
    /// Requests in flight
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=1024))]
    in_flight: u32,
    /// Seconds after which a request that is refused or not answered again and again ends the count
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    give_up: u64,
    /// A name of your own for this count: after an interruption of any kind, the same command with the same input goes on
    /// where it was, and counts nothing twice
    #[arg(long, value_name = "ID", value_parser = journal::id)]
    resume_id: Option<String>,
    /// Where is noted how far the count with --resume-id has come [default: ~/.local/state/dkc]
    #[arg(long, env = "DKC_RESUME_DIR", value_name = "DIR")]
    resume_dir: Option<PathBuf>,
    #[command(flatten)]
    server: ServerArgs,
}

/// What the tasks of one count share.
struct Shared {
    path: String,
    urls: Vec<Url>,
    give_up: Duration,
    /// Nothing more is read; what was read is still counted.
    closed: Arc<AtomicBool>,
    /// True: nothing more is taken up or sent, and nothing refused is sent again.
    stop: watch::Sender<bool>,
    bytes_read: AtomicU64,
    retries: AtomicU64,
    /// Requests that were refused and wait to be sent again …
    waiting: AtomicUsize,
    /// … and why the last of them was.
    reason: std::sync::Mutex<String>,
}

impl Shared {
    fn stop(&self) {
        self.stop.send_replace(true);
    }

    fn is_stopped(&self) -> bool {
        *self.stop.borrow()
    }

    async fn stopped(&self) {
        // An error would mean that the sender is gone, and it is right here.
        let _ = self.stop.subscribe().wait_for(|&stopped| stopped).await;
    }
}

pub(crate) async fn run(args: Args) -> anyhow::Result<Exit> {
    let usage = |why: &str| {
        output::note(&format!("error: {why}"));
        Ok(Exit::Usage)
    };
    let journal = match open_journal(&args) {
        Ok(journal) => journal,
        Err(NoJournal::Usage(why)) => return usage(&why),
        Err(NoJournal::Failed(error)) => return Err(error),
    };
    let (input, size) = match input::open(&args.file) {
        Ok(opened) => opened,
        Err(error) => return usage(&format!("{}: {error}", args.file.display())),
    };
    let shared = Arc::new(Shared {
        path: format!("/v1/counters/{}/increment", args.namespace),
        urls: args.server.urls,
        give_up: Duration::from_secs(args.give_up),
        closed: Arc::default(),
        stop: watch::Sender::new(false),
        bytes_read: AtomicU64::new(0),
        retries: AtomicU64::new(0),
        waiting: AtomicUsize::new(0),
        reason: std::sync::Mutex::default(),
    });
    // Before the first request: a signal from here on ends in a report.
    tokio::spawn(stop_at_signal(shared.clone())?);
    let begun = Instant::now();
    let workers = args.in_flight as usize;
    // Twice as many batches as workers: none waits for the reader.
    let (to_workers, jobs) = mpsc::channel(workers);
    let (to_totals, outcomes) = mpsc::channel(workers);

    let (say_read, mut read) = oneshot::channel();
    let mut remembered = None;
    let mut notes = None;
    {
        let shared = shared.clone();
        let field = args.field.map(|number| Field { number, delimiter: args.delimiter });
        let batches = Batches::new(input, args.batch as usize)
            .of_field(field)
            // A file is there as a whole.
            .flushed_after(size.is_none().then_some(args.flush_interval))
            .until(shared.closed.clone());
        // What was read is said before the workers see that no more batches come.
        match journal {
            None => {
                let id = client::fresh_id().context("/dev/urandom")?;
                std::thread::spawn(move || {
                    let hand_on = |batch| to_workers.blocking_send(Job::new(&id, batch)).is_ok();
                    drop(say_read.send(read_all(batches, &shared, hand_on)));
                });
            }
            Some(journal) => {
                notes = Some(journal.notes().context("the journal")?);
                let batches = batches.cut_as(journal.cuts());
                let (to_journal, read) = mpsc::channel(workers);
                let (say_remembered, told) = oneshot::channel();
                remembered = Some(told);
                let (to_totals, closed) = (to_totals.clone(), shared.closed.clone());
                std::thread::spawn(move || {
                    drop(say_read.send(read_all(batches, &shared, |batch| {
                        to_journal.blocking_send(batch).is_ok()
                    })));
                });
                std::thread::spawn(move || {
                    let done = remember(journal, read, &closed, &to_workers, &to_totals);
                    drop(say_remembered.send(done));
                });
            }
        }
    }
    let jobs = Arc::new(Mutex::new(jobs));
    for worker in 0..workers {
        tokio::spawn(work(worker, shared.clone(), jobs.clone(), to_totals.clone()));
    }
    drop((jobs, to_totals));

    let progress = Progress::new(size, args.server.json);
    let mut report = total(outcomes, &shared, progress, notes, begun).await;
    match read.try_recv() {
        Ok(Ok(ReadLines { lines, all })) => {
            report.settled = lines == report.lines;
            report.complete = all && report.settled;
        }
        Ok(Err(error)) => report.reasons.push(format!("{}: {error}", args.file.display())),
        // Stopped before it had ended.
        Err(oneshot::error::TryRecvError::Empty) => {}
        Err(oneshot::error::TryRecvError::Closed) => anyhow::bail!("the reader panicked"),
    }
    if let Some(Ok(Err(error))) = remembered.map(|mut remembered| remembered.try_recv()) {
        report.reasons.push(format!("{error:#}"));
        (report.settled, report.complete) = (false, false);
    }
    report.retries = shared.retries.load(Ordering::Relaxed);
    report.namespace = args.namespace;
    report.resume_id = args.resume_id;
    say(&report, args.server.json)
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

/// One byte, or how a TAB is written.
fn delimiter(text: &str) -> Result<u8, String> {
    match text.as_bytes() {
        b"\\t" => Ok(b'\t'),
        [byte] => Ok(*byte),
        _ => Err("one byte is expected, or \\t".to_owned()),
    }
}

/// How far the input was read.
struct ReadLines {
    lines: u64,
    /// To its end.
    all: bool,
}

fn read_all(
    mut batches: Batches<impl io::BufRead>,
    shared: &Shared,
    mut hand_on: impl FnMut(Batch) -> bool,
) -> io::Result<ReadLines> {
    while let Some(batch) = batches.next()? {
        shared.bytes_read.store(batches.bytes_read(), Ordering::Relaxed);
        if !hand_on(batch) {
            return Ok(ReadLines { lines: batches.lines_read(), all: false });
        }
    }
    Ok(ReadLines { lines: batches.lines_read(), all: !shared.closed.load(Ordering::Relaxed) })
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

/// Takes batches until there are no more, and sees each through before it takes the next.
async fn work(
    number: usize,
    shared: Arc<Shared>,
    jobs: Arc<Mutex<mpsc::Receiver<Job>>>,
    to_totals: mpsc::Sender<Outcome>,
) {
    let mut connections: Vec<_> = shared.urls.iter().cloned().map(Connection::new).collect();
    // Workers begin at different gateways, so that all of them get their share.
    let mut at = number % connections.len();
    loop {
        let job = tokio::select! {
            biased;
            () = shared.stopped() => return,
            job = async { jobs.lock().await.recv().await } => job,
        };
        let Some(job) = job else { return };
        let outcome = see_through(job, &shared, &mut connections, &mut at).await;
        if to_totals.send(outcome).await.is_err() {
            return;
        }
    }
}

/// Sends a batch until all of it is decided, or the count stops.
async fn see_through(
    job: Job,
    shared: &Shared,
    connections: &mut [Connection],
    at: &mut usize,
) -> Outcome {
    let begun = Instant::now();
    let Job { batch, token, in_doubt } = job;
    let mut pending = Pending::new(batch, in_doubt);
    let body = pending.body();
    while pending.is_open() && !shared.is_stopped() {
        let connection = &mut connections[*at];
        let (url, path) = (connection.url(), &shared.path);
        let request = Request::post_once(url, path, DEADLINE, Media::Text, &token, &body);
        let next = pending.on_answer(connection.call(&request, DEADLINE + GRACE).await);
        if matches!(next, Next::Again { elsewhere: true, .. }) {
            *at = (*at + 1) % connections.len();
        }
        if let Next::Again { after, .. } = next {
            if begun.elapsed() + after > shared.give_up {
                shared.stop();
                break;
            }
            pause(shared, pending.last_reason(), after).await;
        }
    }
    if pending.hopeless {
        shared.stop();
    }
    pending.outcome()
}

/// Waits before a request is sent again.
async fn pause(shared: &Shared, why: &str, after: Duration) {
    shared.retries.fetch_add(1, Ordering::Relaxed);
    why.clone_into(&mut shared.reason.lock().expect("no panic holds it"));
    shared.waiting.fetch_add(1, Ordering::Relaxed);
    tokio::select! {
        () = shared.stopped() => {}
        () = tokio::time::sleep(after) => {}
    }
    shared.waiting.fetch_sub(1, Ordering::Relaxed);
}

/// The first signal ends the reading, and lets what was read be counted.
fn stop_at_signal(shared: Arc<Shared>) -> io::Result<impl Future<Output = ()>> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    Ok(async move {
        signalled(&mut interrupt, &mut terminate).await;
        shared.closed.store(true, Ordering::Relaxed);
        output::note("\nstopping: counting what was read (Ctrl-C again: don't wait, no report)");
        let again = signalled(&mut interrupt, &mut terminate);
        tokio::pin!(again);
        if tokio::time::timeout(STOP_PATIENCE, &mut again).await.is_err() {
            shared.stop();
            again.await;
        }
        std::process::exit(Exit::Unknown as i32);
    })
}

async fn signalled(one: &mut Signal, other: &mut Signal) {
    tokio::select! {
        _ = one.recv() => {}
        _ = other.recv() => {}
    }
}

async fn total(
    mut outcomes: mpsc::Receiver<Outcome>,
    shared: &Shared,
    mut progress: Progress,
    mut notes: Option<Notes>,
    begun: Instant,
) -> Report {
    let mut report = Report::default();
    let (mut unknown, mut not_applied) = (Lines::default(), Lines::default());
    let mut failed = Lines::default();
    let mut show = tokio::time::interval(SHOW_EVERY);
    loop {
        let outcome = tokio::select! {
            outcome = outcomes.recv() => outcome,
            _ = show.tick() => {
                let reason = shared.reason.lock().expect("no panic holds it").clone();
                progress.show(&Stand {
                    lines: report.lines,
                    bytes: shared.bytes_read.load(Ordering::Relaxed),
                    elapsed: begun.elapsed(),
                    waiting: shared.waiting.load(Ordering::Relaxed),
                    reason: &reason,
                });
                continue;
            }
        };
        let Some(outcome) = outcome else { break };
        if let Some(notes) = &mut notes
            && outcome.is_final
            && !outcome.is_resumed
            && let Err(error) = notes.decided(&outcome)
        {
            // The next run asks the service again.
            report.reasons.push(format!("not noted in the journal: {error}"));
        }
        if outcome.is_resumed {
            report.resumed += outcome.lines;
        }
        report.lines += outcome.lines;
        report.skipped += outcome.skipped;
        report.applied += outcome.applied;
        unknown.append(&outcome.unknown);
        not_applied.append(&outcome.not_applied);
        failed.append(&outcome.failed);
        for reason in outcome.reasons {
            if report.reasons.len() < REASONS_MAX && !report.reasons.contains(&reason) {
                report.reasons.push(reason);
            }
        }
    }
    progress.clear();
    report.unknown = unknown.ranges();
    report.not_applied = not_applied.ranges();
    report.failed = failed.ranges();
    report.seconds = begun.elapsed().as_secs_f64();
    report.per_second = report.applied as f64 / report.seconds.max(1e-9);
    report
}
