//! Lines of input → batches of keys, equal keys of one batch merged.
//!
//! A line is the bytes up to LF, one CR before it dropped (as in the service's `text/plain`), and
//! the whole line is the key. Batches travel as lines `key TAB count`: the service splits a line at
//! its last TAB, so a key may itself end in a TAB and a number. It is also the cheapest form to
//! write and to read. Empty lines are no keys; they are counted as skipped. Lines longer than a key
//! may be are never sent, and reported.
//!
//! Merging makes requests smaller on real text. The price is that an item of a batch stands for
//! several lines, so each batch remembers the item of every line: an outcome told per item can
//! always be told per line.

use std::io::{self, BufRead};

use hashbrown::HashTable;
use xxhash_rust::xxh3::xxh3_64;

use crate::client::KEY_BYTES_MAX;

/// A request's body stays below this and one key; the service's limit is 8 MiB.
const BODY_BYTES_MAX: usize = 4 << 20;
/// TAB, a u32, LF.
const COUNT_BYTES_MAX: usize = 12;

/// What one line of a batch is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Line {
    Item(u32),
    Skipped,
    TooLong,
}

/// Consecutive lines that travel in one request.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    first_line: u64,
    lines: Vec<Line>,
    /// The distinct keys, one after the other …
    text: Vec<u8>,
    /// … and where each ends.
    ends: Vec<u32>,
    /// How often each occurs.
    counts: Vec<u32>,
}

impl Batch {
    /// The number of items, which are the distinct keys.
    pub(crate) fn items(&self) -> usize {
        self.ends.len()
    }

    /// Every line with its number.
    pub(crate) fn lines(&self) -> impl Iterator<Item = (u64, Line)> {
        (self.first_line..).zip(self.lines.iter().copied())
    }

    /// The body of a request for these items.
    pub(crate) fn body(&self, items: &[u32]) -> Vec<u8> {
        let mut body = Vec::with_capacity(self.text.len() + items.len() * COUNT_BYTES_MAX);
        let mut digits = itoa::Buffer::new();
        for &item in items {
            body.extend_from_slice(self.key(item));
            body.push(b'\t');
            body.extend_from_slice(digits.format(self.counts[item as usize]).as_bytes());
            body.push(b'\n');
        }
        body
    }

    fn key(&self, item: u32) -> &[u8] {
        let item = item as usize;
        let start = if item == 0 { 0 } else { self.ends[item - 1] };
        &self.text[start as usize..self.ends[item] as usize]
    }

    fn is_full(&self, lines_max: usize) -> bool {
        let body_bytes = self.text.len() + self.items() * COUNT_BYTES_MAX;
        self.lines.len() == lines_max || body_bytes >= BODY_BYTES_MAX
    }

    /// `index` finds the items of this batch by the hash of their keys.
    fn add(&mut self, line: &[u8], index: &mut HashTable<u32>) {
        let line = match line.len() {
            0 => Line::Skipped,
            length if length > KEY_BYTES_MAX => Line::TooLong,
            _ => Line::Item(self.add_key(line, index)),
        };
        self.lines.push(line);
    }

    fn add_key(&mut self, key: &[u8], index: &mut HashTable<u32>) -> u32 {
        let hash = xxh3_64(key);
        if let Some(&item) = index.find(hash, |&item| self.key(item) == key) {
            self.counts[item as usize] += 1;
            return item;
        }
        let item = self.items() as u32;
        self.text.extend_from_slice(key);
        self.ends.push(self.text.len() as u32);
        self.counts.push(1);
        index.insert_unique(hash, item, |&item| xxh3_64(self.key(item)));
        item
    }
}

/// Makes batches of at most `lines_max` lines from an input.
pub(crate) struct Batches<R> {
    input: R,
    lines_max: usize,
    /// Whether to hand out a smaller batch when nothing more can be read at once: somebody may
    /// wait for the lines that a pipe gave so far to be counted.
    hurries: bool,
    next_line: u64,
    bytes_read: u64,
    /// The begin of a line that goes on beyond what was read. Of one too long for a key only enough
    /// is kept to see that it is: a file without line ends must not end up in memory.
    begun: Vec<u8>,
    /// Empty between batches; kept for its memory.
    index: HashTable<u32>,
}

impl<R: BufRead> Batches<R> {
    pub(crate) fn new(input: R, lines_max: usize, hurries: bool) -> Self {
        let (begun, index) = (Vec::new(), HashTable::new());
        Self { input, lines_max, hurries, next_line: 1, bytes_read: 0, begun, index }
    }

    /// How many bytes of the input were read by now.
    pub(crate) fn bytes_read(&self) -> u64 {
        self.bytes_read
    }

    /// How many lines are in the batches handed out by now.
    pub(crate) fn lines_read(&self) -> u64 {
        self.next_line - 1
    }

    /// The next batch, `None` after the last line. After an error there is nothing more, and the
    /// lines read since the last batch were not counted.
    pub(crate) fn next(&mut self) -> io::Result<Option<Batch>> {
        let mut batch = Batch { first_line: self.next_line, ..Batch::default() };
        batch.lines.reserve(self.lines_max);
        while !batch.is_full(self.lines_max) {
            let buffer = match self.input.fill_buf() {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                filled => filled?,
            };
            if buffer.is_empty() {
                // A last line without LF keeps its CR: only one before an LF is part of its end.
                if !self.begun.is_empty() {
                    batch.add(&self.begun, &mut self.index);
                    self.begun.clear();
                }
                break;
            }
            let mut used = 0;
            while used < buffer.len() && !batch.is_full(self.lines_max) {
                let rest = &buffer[used..];
                let end = rest.iter().position(|&byte| byte == b'\n');
                let part = &rest[..end.unwrap_or(rest.len())];
                used += part.len() + usize::from(end.is_some());
                if end.is_some() && self.begun.is_empty() {
                    batch.add(without_cr(part), &mut self.index);
                    continue;
                }
                // One more for the CR, one more to be too long.
                let room = (KEY_BYTES_MAX + 2).saturating_sub(self.begun.len());
                self.begun.extend_from_slice(&part[..part.len().min(room)]);
                if end.is_some() {
                    batch.add(without_cr(&self.begun), &mut self.index);
                    self.begun.clear();
                }
            }
            let is_all = used == buffer.len();
            self.input.consume(used);
            self.bytes_read += used as u64;
            if self.hurries && is_all && !batch.lines.is_empty() {
                break;
            }
        }
        self.index.clear();
        self.next_line += batch.lines.len() as u64;
        Ok(if batch.lines.is_empty() { None } else { Some(batch) })
    }
}

fn without_cr(line: &[u8]) -> &[u8] {
    line.strip_suffix(b"\r").unwrap_or(line)
}

#[cfg(test)]
mod tests {
    use super::super::lines::{LineRange, Lines};
    use super::*;
    use std::io::BufReader;

    /// Batches as text: keys with their counts, then the lines of each key, skipped, too long.
    #[track_caller]
    fn check(input: &[u8], lines_max: usize, want: &[&str]) {
        // A tiny buffer, so that lines span several reads.
        let mut batches = Batches::new(BufReader::with_capacity(3, input), lines_max, false);
        let mut got = Vec::new();
        while let Some(batch) = batches.next().unwrap() {
            let mut text = Vec::new();
            let select = |wanted: Line| {
                let mut lines = Lines::default();
                let those = batch.lines().filter(|&(_, line)| line == wanted);
                those.for_each(|(number, _)| lines.add(number));
                lines
            };
            for item in 0..batch.items() as u32 {
                let lines: Vec<_> = select(Line::Item(item))
                    .ranges()
                    .iter()
                    .map(|range| format!("{}-{}", range.first_line, range.last_line))
                    .collect();
                let key = batch.key(item).escape_ascii().to_string();
                let key = if key.len() > 20 { format!("[{}]", key.len()) } else { key };
                let count = batch.counts[item as usize];
                text.push(format!("{key}*{count} at {}", lines.join(",")));
            }
            for (kind, what) in [(Line::Skipped, "skipped"), (Line::TooLong, "too long")] {
                let count: u64 = select(kind).ranges().iter().map(LineRange::count).sum();
                if count > 0 {
                    text.push(format!("{count} {what}"));
                }
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
        for number in 0..10_000 {
            input.extend_from_slice(format!("{number:0>1024}\n").as_bytes());
        }
        let mut batches = Batches::new(&input[..], 100_000, false);
        let mut items = 0;
        while let Some(batch) = batches.next().unwrap() {
            let all: Vec<_> = (0..batch.items() as u32).collect();
            assert!(batch.body(&all).len() < 8 << 20);
            items += batch.items();
        }
        assert_eq!(items, 10_000);
    }

    #[test]
    fn bodies() {
        let mut batches = Batches::new(&b"a\nb\t5\n\xff\na\nb\r\r\n"[..], 10, false);
        let batch = batches.next().unwrap().unwrap();
        assert_eq!(batch.body(&[0, 1, 2, 3]), b"a\t2\nb\t5\t1\n\xff\t1\nb\r\t1\n");
        assert_eq!(batch.body(&[2]), b"\xff\t1\n");
    }

    #[test]
    fn what_a_pipe_gave_is_not_held_back() {
        let input = BufReader::with_capacity(4, &b"a\nb\nc\ndddddd\n"[..]);
        let mut batches = Batches::new(input, 10, true);
        let mut got = Vec::new();
        while let Some(batch) = batches.next().unwrap() {
            let all: Vec<_> = (0..batch.items() as u32).collect();
            got.push(String::from_utf8(batch.body(&all)).unwrap());
        }
        assert_eq!(got, ["a\t1\nb\t1\n", "c\t1\n", "dddddd\t1\n"]);
        assert_eq!(batches.lines_read(), 4);
    }
}
