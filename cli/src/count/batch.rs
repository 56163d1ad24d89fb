//! Lines of input → batches of keys, equal keys of one batch merged.
//!
//! A line is the bytes up to LF, one CR before it dropped (as in the service's `text/plain`), and
//! the whole line is the key: a TAB and a number at its end are part of it. That is why batches go
//! out as JSON. Empty lines are no keys; they are counted as skipped. Lines longer than a key may
//! be are never sent, and reported.
//!
//! Merging makes requests smaller on real text. The price is that an item of a batch stands for
//! several lines, so each batch remembers the item of every line: an outcome told per item can
//! always be told per line.

use std::collections::HashMap;
use std::io::{self, BufRead};

use super::lines::Lines;
use crate::answer::write_key_field;
use crate::client::KEY_BYTES_MAX;

/// A request's body stays below this; the service's limit is 8 MiB.
const BODY_BYTES_MAX: usize = 4 << 20;
/// What JSON can make of a key and its delta at worst: six bytes for one (`\u0000`), and the frame.
const ITEM_BYTES: fn(usize) -> usize = |key| key * 6 + 64;

/// What one line of a batch is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Line {
    Item(u32),
    Skipped,
    TooLong,
}

/// Consecutive lines that travel in one request.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    first_line: u64,
    lines: Vec<Line>,
    keys: Vec<Vec<u8>>,
    deltas: Vec<u32>,
}

impl Batch {
    /// The number of items, which are the distinct keys.
    pub(crate) fn items(&self) -> usize {
        self.keys.len()
    }

    /// How often an item's key occurs.
    pub(crate) fn occurrences(&self, item: usize) -> u64 {
        u64::from(self.deltas[item])
    }

    pub(crate) fn skipped(&self) -> u64 {
        self.lines.iter().filter(|&&line| line == Line::Skipped).count() as u64
    }

    pub(crate) fn line_count(&self) -> u64 {
        self.lines.len() as u64
    }

    pub(crate) fn too_long(&self) -> Lines {
        self.select(|line| line == Line::TooLong)
    }

    /// The lines of those items that `wanted` holds for.
    pub(crate) fn lines_of(&self, wanted: impl Fn(usize) -> bool) -> Lines {
        self.select(|line| matches!(line, Line::Item(item) if wanted(item as usize)))
    }

    fn select(&self, wanted: impl Fn(Line) -> bool) -> Lines {
        let mut lines = Lines::default();
        for (number, &line) in (self.first_line..).zip(&self.lines) {
            if wanted(line) {
                lines.add(number);
            }
        }
        lines
    }

    /// The body of a request for these items.
    pub(crate) fn json(&self, items: &[usize]) -> Vec<u8> {
        let mut json = b"{\"increments\":[".to_vec();
        for (index, &item) in items.iter().enumerate() {
            json.extend_from_slice(if index == 0 { b"{" } else { b",{" });
            write_key_field(&self.keys[item], &mut json);
            json.extend_from_slice(format!(",\"delta\":{}}}", self.deltas[item]).as_bytes());
        }
        json.extend_from_slice(b"]}");
        json
    }
}

/// Makes batches of at most `lines_max` lines from an input.
pub(crate) struct Batches<R> {
    input: R,
    lines_max: usize,
    next_line: u64,
    bytes_read: u64,
    at_end: bool,
}

impl<R: BufRead> Batches<R> {
    pub(crate) fn new(input: R, lines_max: usize) -> Self {
        Self { input, lines_max, next_line: 1, bytes_read: 0, at_end: false }
    }

    /// How much of the input is in batches by now.
    pub(crate) fn bytes_read(&self) -> u64 {
        self.bytes_read
    }

    /// The next batch, `None` after the last line. After an error there is nothing more, and the
    /// lines read since the last batch were not counted.
    pub(crate) fn next(&mut self) -> io::Result<Option<Batch>> {
        let mut batch = Batch { first_line: self.next_line, ..Batch::default() };
        let mut index: HashMap<Vec<u8>, u32> = HashMap::new();
        let mut line = Vec::new();
        let mut body_bytes = 0;
        while !self.at_end && batch.lines.len() < self.lines_max && body_bytes < BODY_BYTES_MAX {
            line.clear();
            let Some(bytes) = read_line(&mut self.input, &mut line)? else {
                self.at_end = true;
                break;
            };
            self.bytes_read += bytes;
            batch.lines.push(match line.len() {
                0 => Line::Skipped,
                length if length > KEY_BYTES_MAX => Line::TooLong,
                length => match index.get(&line) {
                    Some(&item) => {
                        batch.deltas[item as usize] += 1;
                        Line::Item(item)
                    }
                    None => {
                        let item = batch.keys.len() as u32;
                        body_bytes += ITEM_BYTES(length);
                        index.insert(line.clone(), item);
                        batch.keys.push(line.clone());
                        batch.deltas.push(1);
                        Line::Item(item)
                    }
                },
            });
        }
        self.next_line += batch.lines.len() as u64;
        Ok(if batch.lines.is_empty() { None } else { Some(batch) })
    }
}

/// Reads a line without its end into `line` and returns how many bytes it took, or `None` at the
/// end of the input. Of a line too long for a key only enough is kept to see that it is: a file
/// without line ends must not end up in memory.
fn read_line(input: &mut impl BufRead, line: &mut Vec<u8>) -> io::Result<Option<u64>> {
    let mut bytes = 0;
    loop {
        let buffer = match input.fill_buf() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            filled => filled?,
        };
        if buffer.is_empty() {
            if bytes == 0 {
                return Ok(None);
            }
            // A last line without LF keeps its CR: only one before an LF is part of the line end.
            return Ok(Some(bytes));
        }
        let end = buffer.iter().position(|&byte| byte == b'\n');
        let taken = &buffer[..end.unwrap_or(buffer.len())];
        // One more for the CR, one more to be too long.
        let room = (KEY_BYTES_MAX + 2).saturating_sub(line.len());
        line.extend_from_slice(&taken[..taken.len().min(room)]);
        let used = taken.len() + usize::from(end.is_some());
        bytes += used as u64;
        input.consume(used);
        if end.is_some() {
            // A kept part that ends in CR may be the cut of a longer line; then it is too long
            // with and without it.
            if line.last() == Some(&b'\r') && line.len() < KEY_BYTES_MAX + 2 {
                line.pop();
            }
            return Ok(Some(bytes));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::BufReader;

    /// Batches as text: keys with their counts, then the lines of each key, skipped, too long.
    #[track_caller]
    fn check(input: &[u8], lines_max: usize, want: &[&str]) {
        // A tiny buffer, so that lines span several reads.
        let mut batches = Batches::new(BufReader::with_capacity(3, input), lines_max);
        let mut got = Vec::new();
        while let Some(batch) = batches.next().unwrap() {
            let mut text = Vec::new();
            for (item, key) in batch.keys.iter().enumerate() {
                let lines: Vec<_> = batch
                    .lines_of(|one| one == item)
                    .ranges()
                    .iter()
                    .map(|range| format!("{}-{}", range.first_line, range.last_line))
                    .collect();
                let key = key.escape_ascii().to_string();
                let key = if key.len() > 20 { format!("[{}]", key.len()) } else { key };
                text.push(format!("{key}*{} at {}", batch.occurrences(item), lines.join(",")));
            }
            if batch.skipped() > 0 {
                text.push(format!("{} skipped", batch.skipped()));
            }
            if batch.too_long().count() > 0 {
                text.push(format!("{} too long", batch.too_long().count()));
            }
            got.push(text.join("; "));
        }
        assert_eq!(got, want);
        assert_eq!(batches.bytes_read(), input.len() as u64);
    }

    #[test]
    fn lines_become_items() {
        check(b"", 10, &[]);
        check(b"a\nb\na\n", 10, &["a*2 at 1-1,3-3; b*1 at 2-2"]);
        check(b"a\na\nb", 10, &["a*2 at 1-2; b*1 at 3-3"]);
        check(b"a\nb\nc\n", 2, &["a*1 at 1-1; b*1 at 2-2", "c*1 at 3-3"]);
        check(b"\n\na\n", 10, &["a*1 at 3-3; 2 skipped"]);
        check(b"\n", 1, &["1 skipped"]);
        check(b"a\t5\n a \n", 10, &[r"a\t5*1 at 1-1;  a *1 at 2-2"]);
        check(b"\xff\0\n", 10, &[r"\xff\x00*1 at 1-1"]);
    }

    #[test]
    fn one_carriage_return_belongs_to_the_line_end() {
        check(b"a\r\nb\r\r\n\r\n", 10, &[r"a*1 at 1-1; b\r*1 at 2-2; 1 skipped"]);
        check(b"a\r", 10, &[r"a\r*1 at 1-1"]);
    }

    #[test]
    fn long_lines_are_kept_out() {
        let line = |length: usize, end: &str| ["x".repeat(length), end.to_owned()].concat();
        check(line(1024, "\n").as_bytes(), 10, &["[1024]*1 at 1-1"]);
        check(line(1024, "\r\n").as_bytes(), 10, &["[1024]*1 at 1-1"]);
        check(line(1025, "\n").as_bytes(), 10, &["1 too long"]);
        check(line(1025, "\r\n").as_bytes(), 10, &["1 too long"]);
        check(line(1024, "\r\r\n").as_bytes(), 10, &["1 too long"]);
        check(line(1026, "").as_bytes(), 10, &["1 too long"]);
        check(line(9000, "\na\n").as_bytes(), 10, &["a*1 at 2-2; 1 too long"]);
    }

    #[test]
    fn a_batch_of_long_keys_fits_a_request() {
        let mut input = Vec::new();
        for number in 0..3000 {
            input.extend_from_slice(format!("{number:0>4}").as_bytes());
            input.extend_from_slice(&[0; 1020]);
            input.push(b'\n');
        }
        let mut batches = Batches::new(&input[..], 100_000);
        let mut items = 0;
        while let Some(batch) = batches.next().unwrap() {
            let all: Vec<_> = (0..batch.items()).collect();
            assert!(batch.json(&all).len() < 8 << 20);
            items += batch.items();
        }
        assert_eq!(items, 3000);
    }

    #[test]
    fn bodies() {
        let mut batches = Batches::new(&b"a\n\"\n\xff\na\n"[..], 10);
        let batch = batches.next().unwrap().unwrap();
        let json = |items: &[usize]| String::from_utf8(batch.json(items)).unwrap();
        assert_eq!(
            json(&[0, 1, 2]),
            r#"{"increments":[{"key":"a","delta":2},{"key":"\"","delta":1},{"key_base64":"/w==","delta":1}]}"#
        );
        assert_eq!(json(&[1]), r#"{"increments":[{"key":"\"","delta":1}]}"#);
    }
}
