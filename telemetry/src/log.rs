//! The log: one line per event on standard error, fields after the message.

use std::io::IsTerminal;

use clap::ValueEnum;
use tracing::level_filters::LevelFilter;

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

/// Sets up the log of this process. Called again, as in tests, it changes nothing.
///
/// A plain level instead of a filter by module: filters are asked on every call site, and h2's are on the hot path.
pub fn logs(role: &str, name: &str, options: LogOptions) {
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
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr);
    let set = match options.log_format {
        Format::Json => log.json().try_init(),
        Format::Text => log.try_init(),
    };
    if set.is_ok() {
        tracing::info!(
            role,
            name,
            pid = std::process::id(),
            version = env!("CARGO_PKG_VERSION"),
            "starting"
        );
    }
}
