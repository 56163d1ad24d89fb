//! What a command says: results to stdout, everything else to stderr.
//!
//! A reader that went away (`dkc status | head -1`) is no error worth a word, but any other failure
//! to write a result is: a script would take half of it for the whole.

use std::io::{self, Write};

use serde::Serialize;

/// Writes a result and a line end.
pub(crate) fn result(text: &str) -> anyhow::Result<()> {
    let mut stdout = io::stdout().lock();
    match writeln!(stdout, "{text}").and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(()),
    }
}

/// Writes a result as one line of JSON.
pub(crate) fn json<T: Serialize>(value: &T) -> anyhow::Result<()> {
    result(&serde_json::to_string(value)?)
}

/// Says something to whoever watches. Nothing depends on it being read.
pub(crate) fn note(text: &str) {
    drop(writeln!(io::stderr().lock(), "{text}"));
}
