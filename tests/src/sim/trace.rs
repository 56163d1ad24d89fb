//! The trace of a run (its journal): always hashed, printed only when a seed is replayed.
//!
//! Printing is lazy (a closure makes the line), because a run has a hundred thousand of them. The
//! hash covers the time and the number of every step and every group written to a log. Each
//! message, timer and draw moves the numbers and times of the later steps, so two runs with one
//! hash have taken the same way. Two runs of one seed must end with the same hash, and
//! `tests/journal_hashes.sh` compares it with the recorded one.

use std::io::Write;

/// The hash of the run so far, and the output for its lines.
pub struct Trace {
    hash: u64,
    out: Option<Box<dyn Write + Send>>,
}

impl Trace {
    pub fn new(out: Option<Box<dyn Write + Send>>) -> Self {
        Self { hash: 0x6A09_E667_F3BC_C908, out }
    }

    pub fn mix(&mut self, word: u64) {
        self.hash = (self.hash ^ word).wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(27);
    }

    pub fn hash(&self) -> u64 {
        self.hash
    }

    pub fn prints(&self) -> bool {
        self.out.is_some()
    }

    /// Prints a line, if the run has an output.
    pub fn note(&mut self, now: u64, line: impl FnOnce() -> String) {
        if let Some(out) = &mut self.out {
            let _closed_pipe = writeln!(out, "{:>10} {}", now, line());
        }
    }
}
