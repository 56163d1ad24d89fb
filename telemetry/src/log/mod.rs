//! The log: one line per event on standard error, fields after the message.
//!
//! ```text
//!   event ──▶ formatted ──▶ [`repeats`]: repeated? ──▶ [`queue`]: room? ──▶ [`writer`]: own thread
//!                            └─ counted, reported later  └─ lost, counted, reported later
//! ```
//!
//! Standard error may be a file on a full disk, a pipe whose reader has gone, or a pipe that is not
//! drained. So a thread that logs neither writes nor waits: only the writer's thread touches
//! standard error, and a line that can't be written is lost, counted
//! (`dkc_log_lines_dropped_total`) and reported once lines can be written again.

mod queue;
mod repeats;
mod writer;

use std::backtrace::{Backtrace, BacktraceStatus};
use std::fs::File;
use std::io::{self, IsTerminal};
use std::os::fd::AsFd;
use std::sync::LazyLock;
use std::time::Duration;

use clap::ValueEnum;
use prometheus_client::metrics::counter::Counter;
use tracing::level_filters::LevelFilter;
use tracing::{Dispatch, error, info};
use tracing_subscriber::fmt::MakeWriter;

use self::queue::{LineQueue, QueueLimits};
use self::writer::LineWriter;

/// The number of lines that were never written, for any reason.
pub(crate) static DROPPED: LazyLock<Counter> = LazyLock::new(Counter::default);

/// The longest time that a process waits at its end for its last lines to be written.
const FLUSH_WITHIN: Duration = Duration::from_secs(1);

/// The log options of a process: level and format.
#[derive(Clone, Copy, Debug, Default, clap::Args)]
pub struct LogOptions {
    /// Log lines of this level and worse
    #[arg(long, env = "DKC_LOG", value_name = "LEVEL", value_enum, default_value_t)]
    pub log: LogLevel,
    /// Format of the log lines
    #[arg(long, env = "DKC_LOG_FORMAT", value_name = "FORMAT", value_enum, default_value_t)]
    pub log_format: LogFormat,
}

/// The least severe lines that are logged.
#[derive(Clone, Copy, Debug, Default, ValueEnum)]
pub enum LogLevel {
    /// Nothing
    Off,
    /// Faults that need a person
    Error,
    /// Faults that the process coped with
    Warn,
    /// Starts, stops and changes of role
    #[default]
    Info,
    /// Single requests and connections
    Debug,
}

/// The format of the log lines.
#[derive(Clone, Copy, Debug, Default, ValueEnum)]
pub enum LogFormat {
    /// Text for people, with fields after the message
    #[default]
    Text,
    /// One JSON object per line
    Json,
}

/// Keeps the log alive. Dropping it waits until all lines so far are written, but at most a second.
#[must_use = "the last lines are lost unless the guard is dropped at the end"]
#[derive(Debug)]
pub struct LogGuard(Option<LineQueue>);

impl Drop for LogGuard {
    fn drop(&mut self) {
        if let Some(queue) = &self.0 {
            queue.flush(FLUSH_WITHIN);
        }
    }
}

/// Sets up the log of this process, with panics as log lines. A second call changes nothing.
pub fn logs(role: &str, name: &str, options: LogOptions) -> LogGuard {
    // A blocked write would hold the lock of `std::io::Stderr` while other threads panic.
    let Ok(stderr) = io::stderr().as_fd().try_clone_to_owned() else { return LogGuard(None) };
    let queue = LineQueue::new(QueueLimits::default(), DROPPED.clone());
    let ansi = io::stderr().is_terminal();
    let dispatch = dispatch(options, ansi, queue.clone());
    if tracing::dispatcher::set_global_default(dispatch.clone()).is_err() {
        return LogGuard(None);
    }
    let writer = LineWriter::new(queue.clone(), File::from(stderr), dispatch);
    if std::thread::Builder::new().name("dkc-log".into()).spawn(|| writer.run()).is_err() {
        // Lines gather up to the limit and are then lost: the process is worth more than its log.
        return LogGuard(None);
    }
    std::panic::set_hook(Box::new(panicked));
    info!(role, name, pid = std::process::id(), version = env!("CARGO_PKG_VERSION"), "starting");
    LogGuard(Some(queue))
}

/// Builds the subscriber, with a plain level instead of a filter by module: filters are asked at
/// every call site, and h2's are on the hot path.
fn dispatch(
    options: LogOptions,
    ansi: bool,
    writer: impl for<'a> MakeWriter<'a> + Send + Sync + 'static,
) -> Dispatch {
    let level = match options.log {
        LogLevel::Off => LevelFilter::OFF,
        LogLevel::Error => LevelFilter::ERROR,
        LogLevel::Warn => LevelFilter::WARN,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Debug => LevelFilter::DEBUG,
    };
    let log = tracing_subscriber::fmt()
        .with_max_level(level)
        .with_target(false)
        .with_ansi(ansi)
        // The subscriber reports a line that can't be written by `eprintln!`, which panics where
        // that fails too.
        .log_internal_errors(false)
        .with_writer(writer);
    match options.log_format {
        LogFormat::Json => Dispatch::new(log.json().finish()),
        LogFormat::Text => Dispatch::new(log.finish()),
    }
}

/// Logs a panic as a line of the log: the standard hook writes to standard error itself and would
/// wait for a pipe that is not drained.
fn panicked(panic: &std::panic::PanicHookInfo<'_>) {
    let thread = std::thread::current();
    let thread = thread.name().unwrap_or("unnamed");
    let why = panic.payload_as_str().unwrap_or("no message");
    let at = panic.location().map(ToString::to_string).unwrap_or_default();
    let backtrace = Backtrace::capture();
    match backtrace.status() {
        BacktraceStatus::Captured => error!(thread, at, %backtrace, "panicked: {why}"),
        _ => error!(thread, at, "panicked: {why}"),
    }
}
