//! How far a count has come, in one line that replaces itself, for a person at a terminal.

use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

const EVERY: Duration = Duration::from_millis(100);
const WIDTH: u64 = 30;

/// A progress bar on stderr; nothing at all when that is no terminal.
pub(crate) struct Progress {
    size: Option<u64>,
    shown_at: Option<Instant>,
    visible: bool,
}

impl Progress {
    /// `size` is that of the whole input in bytes, if it is known.
    pub(crate) fn new(size: Option<u64>, quiet: bool) -> Self {
        Self { size, shown_at: None, visible: !quiet && io::stderr().is_terminal() }
    }

    pub(crate) fn show(&mut self, lines: u64, bytes: u64, since: Duration) {
        if !self.visible || self.shown_at.is_some_and(|at| at.elapsed() < EVERY) {
            return;
        }
        self.shown_at = Some(Instant::now());
        let text = bar(self.size, lines, bytes, since);
        drop(write!(io::stderr().lock(), "\r\x1b[2K{text}"));
    }

    pub(crate) fn clear(&mut self) {
        if self.shown_at.take().is_some() {
            drop(write!(io::stderr().lock(), "\r\x1b[2K"));
        }
    }
}

fn bar(size: Option<u64>, lines: u64, bytes: u64, since: Duration) -> String {
    let rate = lines as f64 / since.as_secs_f64().max(1e-9);
    let figures = format!("{lines} lines, {rate:.0}/s");
    let Some(size) = size.filter(|&size| size > 0) else { return figures };
    // The file may have grown since.
    let filled = (bytes.min(size) * WIDTH / size) as usize;
    let empty = WIDTH as usize - filled;
    let percent = bytes.min(size) * 100 / size;
    format!("[{}{}] {percent:3} % {figures}", "#".repeat(filled), " ".repeat(empty))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars() {
        #[track_caller]
        fn check(size: Option<u64>, bytes: u64, want: &str) {
            assert_eq!(bar(size, 50, bytes, Duration::from_secs(2)), want);
        }
        check(None, 7, "50 lines, 25/s");
        check(Some(0), 7, "50 lines, 25/s");
        check(Some(100), 0, "[                              ]   0 % 50 lines, 25/s");
        check(Some(100), 50, "[###############               ]  50 % 50 lines, 25/s");
        check(Some(100), 500, "[##############################] 100 % 50 lines, 25/s");
    }
}
