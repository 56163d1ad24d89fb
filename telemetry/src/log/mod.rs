//! The log: one line per event on standard error, fields after the message.
//!
//! ```text
//!   event ──▶ formatted ──▶ [`repeats`]: said too often? ──▶ [`queue`]: room? ──▶ [`writer`]: a thread of its own
//!                            └─ counted, told later           └─ lost, counted, told later
//! ```
//!
//! What a newcomer would get wrong: standard error is a file on a full disk, a pipe whose reader has gone, or one that
//! nobody drains. So whoever logs neither writes nor waits: only the writer's thread touches standard error, and a line that
//! can't be written is lost, counted (`dkc_log_lines_dropped_total`) and told of when lines can be written again.

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

use self::queue::{Limits, Queue};
use self::writer::Writer;

/// Lines that were never written, whatever the reason.
pub(crate) static DROPPED: LazyLock<Counter> = LazyLock::new(Counter::default);

/// How long the end of a process waits for its last lines to be written.
const FLUSH_WITHIN: Duration = Duration::from_secs(1);

/// How much is logged, and in what form.
#[derive(Clone, Copy, Debug, Default, clap::Args)]
pub struct LogOptions {
    /// What is logged: this, and what is worse
    #[arg(long, env = "DKC_LOG", value_name = "LEVEL", value_enum, default_value_t)]
    pub log: Level,
    /// How a line of the log looks
    #[arg(long, env = "DKC_LOG_FORMAT", value_name = "FORMAT", value_enum, default_value_t)]
    pub log_format: Format,
}

#[derive(Clone, Copy, Debug, Default, ValueEnum)]
pub enum Level {
    Off,
    Error,
    Warn,
    #[default]
    Info,
    Debug,
}

#[derive(Clone, Copy, Debug, Default, ValueEnum)]
pub enum Format {
    #[default]
    Text,
    /// Every line is a JSON object
    Json,
}

/// Dropped, it waits until all lines so far are written, but not for ever.
#[must_use = "what is logged last is lost if nobody waits for it"]
#[derive(Debug)]
pub struct Log(Option<Queue>);

impl Drop for Log {
    fn drop(&mut self) {
        if let Some(queue) = &self.0 {
            queue.flush(FLUSH_WITHIN);
        }
    }
}

/// Sets up the log of this process, and that a panic is a line of it. Called again, it changes nothing.
pub fn logs(role: &str, name: &str, options: LogOptions) -> Log {
    // Not by `std::io::Stderr`, whose lock a blocked write would hold while others panic.
    let Ok(stderr) = io::stderr().as_fd().try_clone_to_owned() else { return Log(None) };
    let queue = Queue::new(Limits::default(), DROPPED.clone());
    let ansi = io::stderr().is_terminal();
    let dispatch = dispatch(options, ansi, queue.clone());
    if tracing::dispatcher::set_global_default(dispatch.clone()).is_err() {
        return Log(None);
    }
    let writer = Writer::new(queue.clone(), File::from(stderr), dispatch);
    if std::thread::Builder::new().name("dkc-log".into()).spawn(|| writer.run()).is_err() {
        // Lines gather up to the limit and are lost then: the process is of more use than its log.
        return Log(None);
    }
    std::panic::set_hook(Box::new(panicked));
    info!(role, name, pid = std::process::id(), version = env!("CARGO_PKG_VERSION"), "starting");
    Log(Some(queue))
}

/// A plain level instead of a filter by module: filters are asked on every call site, and h2's are on the hot path.
fn dispatch(
    options: LogOptions,
    ansi: bool,
    writer: impl for<'a> MakeWriter<'a> + Send + Sync + 'static,
) -> Dispatch {
    let level = match options.log {
        Level::Off => LevelFilter::OFF,
        Level::Error => LevelFilter::ERROR,
        Level::Warn => LevelFilter::WARN,
        Level::Info => LevelFilter::INFO,
        Level::Debug => LevelFilter::DEBUG,
    };
    let log = tracing_subscriber::fmt()
        .with_max_level(level)
        .with_target(false)
        .with_ansi(ansi)
        // Its own answer to a line that can't be written is `eprintln!`, which panics where that fails too.
        .log_internal_errors(false)
        .with_writer(writer);
    match options.log_format {
        Format::Json => Dispatch::new(log.json().finish()),
        Format::Text => Dispatch::new(log.finish()),
    }
}

/// As a line of the log: the standard hook writes to standard error itself, and would wait for a pipe that nobody drains.
fn panicked(panic: &std::panic::PanicHookInfo<'_>) {
    let thread = std::thread::current();
    let thread = thread.name().unwrap_or("without a name");
    let why = panic.payload_as_str().unwrap_or("no text");
    let at = panic.location().map(ToString::to_string).unwrap_or_default();
    let backtrace = Backtrace::capture();
    match backtrace.status() {
        BacktraceStatus::Captured => error!(thread, at, %backtrace, "panicked: {why}"),
        _ => error!(thread, at, "panicked: {why}"),
    }
}
