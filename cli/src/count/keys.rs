//! Which part of a line is its key: all of it, a field, a column of CSV, or what a regular expression finds.
//!
//! Bytes are never taken for text: a log has lines of any encoding, and a line that is no UTF-8 must not be passed over.
//! So regular expressions match bytes, too (`(?u)` in one makes it Unicode).

use std::io;

use regex::bytes::{CaptureLocations, Regex, RegexBuilder};

use super::batch::{Builder, Fault};
use super::content::refused;
use super::csv::Csv;
use crate::client::KEY_BYTES_MAX;

/// A line of which a part is wanted may be this long.
pub(super) const LINE_BYTES_MAX: usize = 1 << 20;

/// Which part of a line is its key.
#[derive(Debug)]
pub(super) enum Part {
    Whole,
    /// From 1. Between two fields stands one delimiter; without one any white space, and before the first too.
    Field {
        number: usize,
        delimiter: Option<u8>,
    },
    Column(Csv, Column),
    Found(Pattern),
}

/// A column of CSV.
#[derive(Clone, Debug)]
pub(super) enum Column {
    /// From 1.
    Number(usize),
    /// As the first record calls it.
    Name(String),
}

/// A regular expression with the group that is the key.
#[derive(Debug)]
pub(super) struct Pattern {
    regex: Regex,
    group: usize,
    /// Kept for its memory.
    found: CaptureLocations,
}

impl Pattern {
    /// The key is the group named `key`, or else the first.
    pub(super) fn new(text: &str) -> Result<Self, String> {
        let built = RegexBuilder::new(text).unicode(false).build();
        let regex = built.map_err(|error| format!("--regex: {error}"))?;
        if regex.captures_len() < 2 {
            return Err("--regex has no group: put what is the key in parentheses".to_owned());
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

/// Puts lines into batches, each under its key.
pub(super) struct Keys {
    part: Part,
    skip_header: bool,
    /// The content of a field in quotes; kept for its memory.
    unquoted: Vec<u8>,
}

impl Keys {
    /// `skip_header`: the first line is none to count.
    pub(super) fn new(part: Part, skip_header: bool) -> Self {
        let named = matches!(part, Part::Column(_, Column::Name(_)));
        Self { part, skip_header: skip_header || named, unquoted: Vec::new() }
    }

    /// How the lines are quoted, if they are.
    pub(super) fn csv(&self) -> Option<Csv> {
        match &self.part {
            Part::Column(csv, _) => Some(*csv),
            _ => None,
        }
    }

    /// The longest line that can have a key.
    pub(super) fn line_bytes_max(&self) -> usize {
        match self.part {
            Part::Whole => KEY_BYTES_MAX,
            _ => LINE_BYTES_MAX,
        }
    }

    /// Adds the line to the batch, without its line end. Fails when it should name the columns and does not.
    pub(super) fn add(&mut self, line: &[u8], batch: &mut Builder) -> io::Result<()> {
        if self.skip_header && batch.next_line() == 1 {
            batch.add_skipped();
            return self.read_header(line);
        }
        if line.len() > self.line_bytes_max() {
            let is_key = matches!(self.part, Part::Whole);
            batch.add_fault(if is_key { Fault::KeyTooLong } else { Fault::LineTooLong });
            return Ok(());
        }
        let key = match &mut self.part {
            Part::Whole => line,
            Part::Field { number, delimiter } => field(line, *number, *delimiter),
            Part::Column(csv, Column::Number(number)) => {
                csv.field(line, *number, &mut self.unquoted)
            }
            // Its number is known since the header was read.
            Part::Column(_, Column::Name(_)) => &[],
            Part::Found(pattern) => pattern.of(line),
        };
        match key.len() {
            0 => batch.add_skipped(),
            length if length > KEY_BYTES_MAX => batch.add_fault(Fault::KeyTooLong),
            _ => batch.add(key),
        }
        Ok(())
    }

    /// Finds the number of the column that is asked for by name.
    fn read_header(&mut self, line: &[u8]) -> io::Result<()> {
        let Part::Column(csv, column) = &mut self.part else { return Ok(()) };
        let Column::Name(name) = column else { return Ok(()) };
        let names = csv.fields(line);
        let mut those = (1..).zip(&names).filter(|(_, other)| **other == name.as_bytes());
        match (those.next(), those.next()) {
            (Some((number, _)), None) => *column = Column::Number(number),
            (found, _) => {
                let what = if found.is_some() { "more than one column is" } else { "no column is" };
                let all: Vec<_> = names.iter().map(|name| String::from_utf8_lossy(name)).collect();
                let all = all.join(", ").chars().take(500).collect::<String>();
                return Err(refused(format!(
                    "{what} named {name:?}; the first line names: {all} (a number works, too: --field 1)"
                )));
            }
        }
        Ok(())
    }
}

/// Empty if the line has no such field.
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
    fn patterns_without_use_are_refused() {
        assert!(Pattern::new("a+").unwrap_err().contains("no group"));
        assert!(Pattern::new("(a").unwrap_err().starts_with("--regex: "));
    }
}
