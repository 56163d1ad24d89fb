//! What tests the service as a whole: the simulator, the searches, and real processes under load and faults.
#![allow(missing_docs, reason = "only its own binaries and tests use this crate")]

pub mod chaos;
pub mod cluster;
pub mod search;
pub mod sim;

/// Says something to whoever watches a test.
pub fn note(text: &str) {
    use std::io::Write;
    let _nobody_watches = writeln!(std::io::stderr().lock(), "{text}");
}
