//! The log: one line per event on standard error, fields after the message.

use std::io::IsTerminal;

use tracing::level_filters::LevelFilter;

/// Sets up the log of this process: `DKC_LOG` is the level (`error`, `warn`, `info`, `debug`; default `info`),
/// `DKC_LOG_FORMAT=json` makes every line a JSON object. Called again, as in tests, it changes nothing.
///
/// A plain level instead of a filter by module: filters are asked on every call site, and h2's are on the hot path.
pub fn logs(role: &str, name: &str) {
    let level = match std::env::var("DKC_LOG").as_deref() {
        Ok("error") => LevelFilter::ERROR,
        Ok("warn") => LevelFilter::WARN,
        Ok("debug") => LevelFilter::DEBUG,
        Ok("off") => LevelFilter::OFF,
        _ => LevelFilter::INFO,
    };
    let log = tracing_subscriber::fmt()
        .with_max_level(level)
        .with_target(false)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr);
    let set = match std::env::var("DKC_LOG_FORMAT").as_deref() {
        Ok("json") => log.json().try_init(),
        _ => log.try_init(),
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
