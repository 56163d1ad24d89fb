//! Tests of the service as a whole: the simulator, the searches, and real processes under load and
//! faults.
#![allow(missing_docs, reason = "only its own binaries and tests use this crate")]

pub mod chaos;
pub mod cluster;
pub mod search;
pub mod sim;

/// Prints a line to stderr for people who watch a test.
pub fn note(text: &str) {
    use std::io::Write;
    let _closed_pipe = writeln!(std::io::stderr().lock(), "{text}");
}
