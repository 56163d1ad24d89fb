//! The event log of a run: always hashed, printed only when somebody replays a seed.
//!
//! Printing is lazy (a closure makes the line), because a run has a hundred thousand of them. The
//! hash covers the order, time and kind of every step and all bytes written to every disk; two runs
//! of one seed must end with the same hash.

use std::io::Write;

/// The hash of what has happened, and where to print it.
pub struct Journal {
    hash: u64,
    out: Option<Box<dyn Write + Send>>,
}

impl Journal {
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

    /// Prints a line, if anybody listens.
    pub fn note(&mut self, now: u64, line: impl FnOnce() -> String) {
        if let Some(out) = &mut self.out {
            let _closed_pipe = writeln!(out, "{:>10} {}", now, line());
        }
    }
}
