//! Extracts the key of a line: the whole line, a field, a column of CSV, or the match of a regular
//! expression.
//!
//! Lines are bytes, not text: a log has lines of any encoding, and a line that is not UTF-8 must
//! not be skipped. So regular expressions match bytes, too (`(?u)` in one makes it Unicode).

use std::io;

use engine::key::KEY_BYTES_MAX;
use regex::bytes::{CaptureLocations, Regex, RegexBuilder};

use super::batch::{LineBatchBuilder, LineFault};
use super::content::unsupported;
use super::csv::Csv;

/// The maximum length of a line of which only a part is the key.
pub(super) const LINE_BYTES_MAX: usize = 1 << 20;

/// The part of a line that is its key.
#[derive(Debug)]
pub(super) enum KeySource {
    /// The whole line.
    Whole,
    /// A field, numbered from 1. Fields are separated by one delimiter, or, without a delimiter, by
    /// white space, which may also precede the first field.
    Field { number: usize, delimiter: Option<u8> },
    /// A column of CSV.
    Column(Csv, Column),
    /// The match of a regular expression.
    Match(Pattern),
}

/// A column of CSV.
#[derive(Clone, Debug)]
pub(super) enum Column {
    /// The number of the column, from 1.
    Number(usize),
    /// The name of the column in the first record.
    Name(String),
}

/// A regular expression with the group that is the key.
#[derive(Debug)]
pub(super) struct Pattern {
    regex: Regex,
    group: usize,
    /// The positions of the last match, kept to reuse its memory.
    found: CaptureLocations,
}

impl Pattern {
    /// Compiles an expression, whose key is the group named `key`, or else the first group.
    pub(super) fn new(text: &str) -> Result<Self, String> {
        let built = RegexBuilder::new(text).unicode(false).build();
        let regex = built.map_err(|error| format!("--regex: {error}"))?;
        if regex.captures_len() < 2 {
            return Err("--regex has no group: put the key in parentheses".to_owned());
        }
        let group = regex.capture_names().position(|name| name == Some("key")).unwrap_or(1);
        let found = regex.capture_locations();
        Ok(Self { regex, group, found })
    }

    fn of<'a>(&mut self, line: &'a [u8]) -> &'a [u8] {
        let matched = self.regex.captures_read(&mut self.found, line).is_some();
        let span = self.found.get(self.group).filter(|_| matched);
        span.map_or(&[], |(start, end)| &line[start..end])
    }
}

/// Adds lines to batches under their keys.
pub(super) struct KeyExtractor {
    part: KeySource,
    skip_header: bool,
    /// The content of a quoted field, kept to reuse its memory.
    unquoted: Vec<u8>,
}

impl KeyExtractor {
    /// `skip_header`: the first line is not counted. A column with a name implies that.
    pub(super) fn new(part: KeySource, skip_header: bool) -> Self {
        let named = matches!(part, KeySource::Column(_, Column::Name(_)));
        Self { part, skip_header: skip_header || named, unquoted: Vec::new() }
    }

    /// The CSV dialect, if lines are CSV records.
    pub(super) fn csv(&self) -> Option<Csv> {
        match &self.part {
            KeySource::Column(csv, _) => Some(*csv),
            _ => None,
        }
    }

    /// The maximum length of a line that can have a key.
    pub(super) fn line_bytes_max(&self) -> usize {
        match self.part {
            KeySource::Whole => KEY_BYTES_MAX,
            _ => LINE_BYTES_MAX,
        }
    }

    /// Adds a line, given without its line end, to the batch. Returns an error if the line is the
    /// header and lacks the required column.
    pub(super) fn add(&mut self, line: &[u8], batch: &mut LineBatchBuilder) -> io::Result<()> {
        if self.skip_header && batch.next_line() == 1 {
            batch.add_skipped();
            return self.read_header(line);
        }
        if line.len() > self.line_bytes_max() {
            let is_key = matches!(self.part, KeySource::Whole);
            batch.add_fault(if is_key { LineFault::KeyTooLong } else { LineFault::LineTooLong });
            return Ok(());
        }
        let key = match &mut self.part {
            KeySource::Whole => line,
            KeySource::Field { number, delimiter } => field(line, *number, *delimiter),
            KeySource::Column(csv, Column::Number(number)) => {
                csv.field(line, *number, &mut self.unquoted)
            }
            // This arm is not reached: the header has replaced the name by a number.
            KeySource::Column(_, Column::Name(_)) => &[],
            KeySource::Match(pattern) => pattern.of(line),
        };
        match key.len() {
            0 => batch.add_skipped(),
            length if length > KEY_BYTES_MAX => batch.add_fault(LineFault::KeyTooLong),
            _ => batch.add(key),
        }
        Ok(())
    }

    /// Replaces the column's name by its number in the header.
    fn read_header(&mut self, line: &[u8]) -> io::Result<()> {
        let KeySource::Column(csv, column) = &mut self.part else { return Ok(()) };
        let Column::Name(name) = column else { return Ok(()) };
        let names = csv.fields(line);
        let mut those = (1..).zip(&names).filter(|(_, other)| **other == name.as_bytes());
        match (those.next(), those.next()) {
            (Some((number, _)), None) => *column = Column::Number(number),
            (found, _) => {
                let what = if found.is_some() { "more than one column is" } else { "no column is" };
                let all: Vec<_> = names.iter().map(|name| String::from_utf8_lossy(name)).collect();
                let all = all.join(", ").chars().take(500).collect::<String>();
                return Err(unsupported(format!(
                    "{what} named {name:?}; columns of the first line: {all} (a number is also \
                     possible: --field 1)"
                )));
            }
        }
        Ok(())
    }
}

/// Returns a field, which is empty if the line has no such field.
fn field(line: &[u8], number: usize, delimiter: Option<u8>) -> &[u8] {
    let found = match delimiter {
        Some(delimiter) => line.split(|&byte| byte == delimiter).nth(number - 1),
        None => {
            let words = line.split(u8::is_ascii_whitespace);
            words.filter(|word| !word.is_empty()).nth(number - 1)
        }
    };
    found.unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(pattern: &str, line: &[u8], want: &[u8]) {
        assert_eq!(Pattern::new(pattern).unwrap().of(line), want, "{pattern}");
    }

    #[test]
    fn a_pattern_s_group_is_the_key() {
        let log = b"1.2.3.4 - - [x] \"GET /a\xe9?q HTTP/1.1\" 200 5";
        check(r#""(?:GET|POST) ([^ ?]+)"#, log, b"/a\xe9");
        // Any byte is a character.
        check(r#""(.+?) HTTP"#, log, b"GET /a\xe9?q");
        check(r"(\d+)\.(?P<key>\d+)", log, b"2");
        check(r"(?<key>\d+)\.(\d+)", log, b"1");
        check("(z)", log, b"");
        check("(z)?GET", log, b"");
        check("(z*)", log, b"");
        check("(?u:(k.se))", "käse".as_bytes(), "käse".as_bytes());
        check("(k.se)", "käse".as_bytes(), b"");
    }

    #[test]
    fn invalid_patterns_are_rejected() {
        assert!(Pattern::new("a+").unwrap_err().contains("no group"));
        assert!(Pattern::new("(a").unwrap_err().starts_with("--regex: "));
    }
}
