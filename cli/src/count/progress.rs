//! The progress of a count, as one line on a terminal that is redrawn.

use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use crate::output::grouped;

/// The width of the bar in columns.
const WIDTH: u64 = 30;

/// The numbers that are shown.
pub(crate) struct ProgressState {
    /// Lines whose outcome is known.
    pub(crate) lines: u64,
    /// Bytes of the input that were read.
    pub(crate) bytes: u64,
    pub(crate) elapsed: Duration,
    /// Requests that were rejected and wait to be sent again.
    pub(crate) waiting: usize,
    /// The reason of the last rejection.
    pub(crate) reason: String,
}

/// A progress bar on stderr, which shows nothing if stderr is not a terminal.
pub(crate) struct ProgressBar {
    size: Option<u64>,
    visible: bool,
    shown: bool,
}

impl ProgressBar {
    /// `size` is the size of the whole input in bytes, if it is known.
    pub(crate) fn new(size: Option<u64>, quiet: bool) -> Self {
        Self { size, visible: !quiet && io::stderr().is_terminal(), shown: false }
    }

    /// Redraws the line.
    pub(crate) fn show(&mut self, state: &ProgressState) {
        if self.visible {
            self.shown = true;
            drop(write!(io::stderr().lock(), "\r\x1b[2K{}", bar(self.size, state)));
        }
    }

    /// Removes the line, so that other text can be printed.
    pub(crate) fn clear(&mut self) {
        if self.shown {
            drop(write!(io::stderr().lock(), "\r\x1b[2K"));
        }
    }
}

fn bar(size: Option<u64>, state: &ProgressState) -> String {
    let seconds = state.elapsed.as_secs_f64().max(1e-9);
    let rate = (state.lines as f64 / seconds) as u64;
    let mut text = format!("{} lines, {}/s", grouped(state.lines), grouped(rate));
    if let Some(size) = size.filter(|&size| size > 0) {
        // The file may have grown since its size was read.
        let bytes = state.bytes.min(size);
        let filled = (bytes * WIDTH / size) as usize;
        let (full, empty) = ("#".repeat(filled), " ".repeat(WIDTH as usize - filled));
        text = format!("[{full}{empty}] {:3} % {text}", bytes * 100 / size);
        if bytes > 0 {
            let left = (size - bytes) as f64 * seconds / bytes as f64;
            text += &format!(", {} left", time(left.round() as u64));
        }
    }
    if state.waiting > 0 {
        // The reason is truncated: a line longer than the terminal would scroll.
        let reason: String = state.reason.chars().take(60).collect();
        text += &format!(", {} waiting to retry ({reason})", state.waiting);
    }
    text
}

fn time(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3_600 => format!("{} min {} s", seconds / 60, seconds % 60),
        _ => format!("{} h {} min", seconds / 3_600, seconds / 60 % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times() {
        assert_eq!([59, 61, 3_725].map(time), ["59 s", "1 min 1 s", "1 h 2 min"]);
    }

    #[test]
    fn bars() {
        #[track_caller]
        fn check(size: Option<u64>, bytes: u64, waiting: usize, want: &str) {
            let elapsed = Duration::from_secs(2);
            let state =
                ProgressState { lines: 5000, bytes, elapsed, waiting, reason: "frozen".to_owned() };
            assert_eq!(bar(size, &state), want);
        }
        check(None, 7, 0, "5,000 lines, 2,500/s");
        check(None, 7, 2, "5,000 lines, 2,500/s, 2 waiting to retry (frozen)");
        check(Some(0), 7, 0, "5,000 lines, 2,500/s");
        let empty = " ".repeat(30);
        check(Some(100), 0, 0, &format!("[{empty}]   0 % 5,000 lines, 2,500/s"));
        let (half, full) = ("#".repeat(15) + &" ".repeat(15), "#".repeat(30));
        check(Some(100), 50, 0, &format!("[{half}]  50 % 5,000 lines, 2,500/s, 2 s left"));
        check(Some(100), 500, 0, &format!("[{full}] 100 % 5,000 lines, 2,500/s, 0 s left"));
    }
}
