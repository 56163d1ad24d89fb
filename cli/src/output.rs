//! Output of commands: results to stdout, everything else to stderr.
//!
//! A closed pipe (`dkc status | head -1`) is not an error, but every other failure to write a
//! result is: a script would take half of the result for the whole.

use std::io::{self, Write};

use serde::Serialize;

/// Writes a result and a line end to stdout.
pub(crate) fn result(text: &str) -> anyhow::Result<()> {
    still_read(text).map(|_| ())
}

/// Writes a result as [`result`] does, and returns whether the pipe still has a reader.
pub(crate) fn still_read(text: &str) -> anyhow::Result<bool> {
    let mut stdout = io::stdout().lock();
    match writeln!(stdout, "{text}").and_then(|()| stdout.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Writes a result as one line of JSON.
pub(crate) fn json<T: Serialize>(value: &T) -> anyhow::Result<()> {
    result(&serde_json::to_string(value)?)
}

/// Writes a result as one line of JSON, or else as `text` formats it.
pub(crate) fn report<T: Serialize>(
    as_json: bool,
    value: &T,
    text: impl FnOnce(&T) -> String,
) -> anyhow::Result<()> {
    if as_json { json(value) } else { result(&text(value)) }
}

/// Formats a message and writes it to stderr.
macro_rules! note {
    ($($text:tt)*) => {
        $crate::output::write_note(&format!($($text)*))
    };
}
pub(crate) use note;

/// Writes a message to stderr. An error is ignored: nothing depends on the message.
pub(crate) fn write_note(text: &str) {
    drop(writeln!(io::stderr().lock(), "{text}"));
}

/// Formats a number with thousands separators: `1,234,567`.
pub(crate) fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() * 4 / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Formats a table with minimal column widths; `<` or `>` before a name sets the alignment.
pub(crate) fn table(columns: &[&str], rows: Vec<Vec<String>>) -> String {
    let header = columns.iter().map(|column| column[1..].to_owned()).collect();
    let rows: Vec<Vec<String>> = std::iter::once(header).chain(rows).collect();
    let width = |at: usize| rows.iter().map(|row| row[at].chars().count()).max().unwrap_or(0);
    let widths: Vec<_> = (0..columns.len()).map(width).collect();
    let mut text = String::new();
    for row in &rows {
        let cells = row.iter().zip(columns).zip(&widths).map(|((cell, column), &width)| {
            if column.starts_with('>') {
                format!("{cell:>width$}")
            } else {
                format!("{cell:<width$}")
            }
        });
        text += cells.collect::<Vec<_>>().join("  ").trim_end();
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_grouped() {
        let got = [0, 12, 999, 1000, 123_456, 1_234_567].map(grouped);
        assert_eq!(got, ["0", "12", "999", "1,000", "123,456", "1,234,567"]);
    }
}
