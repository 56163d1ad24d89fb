//! Lines of input → batches of keys, equal keys of one batch merged.
//!
//! A line is the bytes up to LF, one CR before it dropped (as in the service's `text/plain`), and
//! the whole line is the key, or one field of it. Batches travel as lines `key TAB count`: the service splits a line at
//! its last TAB, so a key may itself end in a TAB and a number. It is also the cheapest form to
//! write and to read. Lines without a key (empty, or without the field) are counted as skipped. Keys
//! longer than the service takes are never sent, and reported.
//!
//! Merging makes requests smaller on real text. The price is that an item of a batch stands for
//! several lines, so each batch remembers the item of every line: an outcome told per item can
//! always be told per line.

use std::collections::VecDeque;
use std::io::{self, BufRead};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use hashbrown::HashTable;
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use crate::client::KEY_BYTES_MAX;

/// A request's body stays below this and one key; the service's limit is 8 MiB.
const BODY_BYTES_MAX: usize = 4 << 20;
/// TAB, a u32, LF.
const COUNT_BYTES_MAX: usize = 12;

/// A line of which a field is wanted may be this long.
const FIELD_LINE_BYTES_MAX: usize = 1 << 20;

/// Which part of a line is the key.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Field {
    /// From 1.
    pub(crate) number: u32,
    /// Between two fields stands one of these; none: any amount of white space, and before the first too.
    pub(crate) delimiter: Option<u8>,
}

impl Field {
    /// Empty if the line has no such field.
    fn of<'a>(&self, line: &'a [u8]) -> &'a [u8] {
        let before = self.number as usize - 1;
        let found = match self.delimiter {
            Some(delimiter) => line.split(|&byte| byte == delimiter).nth(before),
            None => {
                let words = line.split(u8::is_ascii_whitespace);
                words.filter(|word| !word.is_empty()).nth(before)
            }
        };
        found.unwrap_or_default()
    }
}

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
    pub(crate) fn first_line(&self) -> u64 {
        self.first_line
    }

    pub(crate) fn line_count(&self) -> u64 {
        self.lines.len() as u64
    }

    /// Of what its lines say, one by one.
    pub(crate) fn sum(&self) -> u64 {
        let mut sum = Xxh3::new();
        sum.update(&self.text);
        for end in &self.ends {
            sum.update(&end.to_le_bytes());
        }
        for line in &self.lines {
            let item = match line {
                Line::Item(item) => *item,
                Line::Skipped => u32::MAX,
                Line::TooLong => u32::MAX - 1,
            };
            sum.update(&item.to_le_bytes());
        }
        sum.digest()
    }

    /// The number of items, which are the distinct keys.
    pub(crate) fn items(&self) -> usize {
        self.ends.len()
    }

    /// Every line with its number.
    pub(crate) fn lines(&self) -> impl Iterator<Item = (u64, Line)> {
        (self.first_line..).zip(self.lines.iter().copied())
    }

    /// The body of a request for all items.
    pub(crate) fn body(&self) -> Vec<u8> {
        let mut body = Vec::with_capacity(self.text.len() + self.items() * COUNT_BYTES_MAX);
        let mut digits = itoa::Buffer::new();
        for item in 0..self.items() as u32 {
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
    fn add(&mut self, line: &[u8], field: Option<Field>, index: &mut HashTable<u32>) {
        let key = match field {
            // Cut off, so who knows what the field was.
            Some(_) if line.len() > FIELD_LINE_BYTES_MAX => line,
            Some(field) => field.of(line),
            None => line,
        };
        let line = match key.len() {
            0 => Line::Skipped,
            length if length > KEY_BYTES_MAX => Line::TooLong,
            _ => Line::Item(self.add_key(key, index)),
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
    field: Option<Field>,
    /// A smaller batch is handed out when its first line is this old: somebody may wait for the lines
    /// that a pipe gave so far to be counted.
    flush_after: Option<Duration>,
    /// How many lines the first batches are to have: as an earlier run has cut them.
    cuts: VecDeque<u64>,
    /// Set from outside: nothing more is read. What was read by then is handed out.
    closed: Arc<AtomicBool>,
    ended: bool,
    next_line: u64,
    bytes_read: u64,
    /// The begin of a line that goes on beyond what was read. Of one too long for a key only enough
    /// is kept to see that it is: a file without line ends must not end up in memory.
    begun: Vec<u8>,
    /// Empty between batches; kept for its memory.
    index: HashTable<u32>,
}

impl<R: BufRead> Batches<R> {
    pub(crate) fn new(input: R, lines_max: usize) -> Self {
        Self {
            input,
            lines_max,
            field: None,
            flush_after: None,
            cuts: VecDeque::new(),
            closed: Arc::default(),
            ended: false,
            next_line: 1,
            bytes_read: 0,
            begun: Vec::new(),
            index: HashTable::new(),
        }
    }

    pub(crate) fn of_field(self, field: Option<Field>) -> Self {
        Self { field, ..self }
    }

    pub(crate) fn flushed_after(self, flush_after: Option<Duration>) -> Self {
        Self { flush_after, ..self }
    }

    pub(crate) fn cut_as(self, cuts: VecDeque<u64>) -> Self {
        Self { cuts, ..self }
    }

    pub(crate) fn until(self, closed: Arc<AtomicBool>) -> Self {
        Self { closed, ..self }
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
        let mut first_came = None;
        let line_bytes_max = self.field.map_or(KEY_BYTES_MAX, |_| FIELD_LINE_BYTES_MAX);
        let cut = self.cuts.pop_front();
        let lines_max = cut.map_or(self.lines_max, |lines| lines as usize);
        let flush_after = self.flush_after.filter(|_| cut.is_none());
        while !self.ended && !batch.is_full(lines_max) {
            let is_due = |since: Instant| flush_after.is_some_and(|after| since.elapsed() >= after);
            if first_came.is_some_and(is_due) {
                break;
            }
            let buffer = match self.input.fill_buf() {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                // Nothing has come for a moment.
                Err(error) if error.kind() == io::ErrorKind::TimedOut => {
                    self.ended = self.closed.load(Ordering::Relaxed);
                    continue;
                }
                filled => filled?,
            };
            if buffer.is_empty() {
                // A last line without LF keeps its CR: only one before an LF is part of its end.
                if !self.begun.is_empty() {
                    batch.add(&self.begun, self.field, &mut self.index);
                    self.begun.clear();
                }
                break;
            }
            let mut used = 0;
            while used < buffer.len() && !batch.is_full(lines_max) {
                let rest = &buffer[used..];
                let end = rest.iter().position(|&byte| byte == b'\n');
                let part = &rest[..end.unwrap_or(rest.len())];
                used += part.len() + usize::from(end.is_some());
                if end.is_some() && self.begun.is_empty() {
                    batch.add(without_cr(part), self.field, &mut self.index);
                    continue;
                }
                // One more for the CR, one more to be too long.
                let room = (line_bytes_max + 2).saturating_sub(self.begun.len());
                self.begun.extend_from_slice(&part[..part.len().min(room)]);
                if end.is_some() {
                    batch.add(without_cr(&self.begun), self.field, &mut self.index);
                    self.begun.clear();
                }
            }
            let is_all = used == buffer.len();
            self.input.consume(used);
            self.bytes_read += used as u64;
            if first_came.is_none() && !batch.lines.is_empty() {
                first_came = Some(Instant::now());
            }
            // Not in the middle of what was read: those lines have left the pipe.
            self.ended = is_all && self.closed.load(Ordering::Relaxed);
        }
        self.index.clear();
        if self.ended && cut.is_some_and(|lines| batch.line_count() < lines) {
            // Sent once with all its lines; a part of it would be another request.
            return Ok(None);
        }
        self.next_line += batch.line_count();
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
        let mut batches = Batches::new(BufReader::with_capacity(3, input), lines_max);
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
        let mut batches = Batches::new(&input[..], 100_000);
        let mut items = 0;
        while let Some(batch) = batches.next().unwrap() {
            assert!(batch.body().len() < 8 << 20);
            items += batch.items();
        }
        assert_eq!(items, 10_000);
    }

    #[test]
    fn bodies() {
        let mut batches = Batches::new(&b"a\nb\t5\n\xff\na\nb\r\r\n"[..], 10);
        let batch = batches.next().unwrap().unwrap();
        assert_eq!(batch.body(), b"a\t2\nb\t5\t1\n\xff\t1\nb\r\t1\n");
    }

    /// The keys of each batch.
    fn keys<R: BufRead>(mut batches: Batches<R>) -> Vec<String> {
        let mut got = Vec::new();
        while let Some(batch) = batches.next().unwrap() {
            let keys =
                (0..batch.items() as u32).map(|item| batch.key(item).escape_ascii().to_string());
            got.push(keys.collect::<Vec<_>>().join(","));
        }
        got
    }

    #[test]
    fn what_a_pipe_gave_is_not_held_back() {
        let input = || BufReader::with_capacity(4, &b"a\nb\nc\ndddddd\n"[..]);
        // Every line is old enough as soon as it is looked at.
        let flushed = Batches::new(input(), 10).flushed_after(Some(Duration::ZERO));
        assert_eq!(keys(flushed), ["a,b", "c", "dddddd"]);
        let patient = Batches::new(input(), 10).flushed_after(Some(Duration::from_secs(3_600)));
        assert_eq!(keys(patient), ["a,b,c,dddddd"]);
    }

    #[test]
    fn what_was_read_before_the_end_was_called_is_handed_out() {
        let input = BufReader::with_capacity(6, &b"a\nb\nc\nd\ne\n"[..]);
        let closed = Arc::new(AtomicBool::new(true));
        let batches = Batches::new(input, 2).until(closed);
        assert_eq!(keys(batches), ["a,b", "c"]);
    }

    #[test]
    fn batches_are_cut_as_they_were() {
        let input = || BufReader::with_capacity(4, &b"a\nb\nc\nd\ne\nf\n"[..]);
        let again = |cuts: &[u64]| {
            let flushed = Batches::new(input(), 2).flushed_after(Some(Duration::ZERO));
            flushed.cut_as(cuts.iter().copied().collect())
        };
        assert_eq!(keys(again(&[3, 1])), ["a,b,c", "d", "e,f"]);
        // The input is shorter than it was: whoever compares sums sees that.
        assert_eq!(keys(again(&[3, 9])), ["a,b,c", "d,e,f"]);
        let closed = Arc::new(AtomicBool::new(true));
        assert_eq!(keys(again(&[9]).until(closed)), [""; 0]);
    }

    #[test]
    fn sums_tell_lines_apart() {
        let sum = |text: &'static [u8]| Batches::new(text, 10).next().unwrap().unwrap().sum();
        assert_eq!(sum(b"a\nb\na\n"), sum(b"a\r\nb\na"));
        let texts: [&[u8]; 7] =
            [b"a\nb\n", b"b\na\n", b"ab\n", b"a\nb\na\n", b"a\nb\nb\n", b"a\n\nb\n", b"\na\nb\n"];
        let sums: std::collections::BTreeSet<_> = texts.iter().map(|text| sum(text)).collect();
        assert_eq!(sums.len(), texts.len());
    }

    #[test]
    fn a_field_of_a_line_is_the_key() {
        #[track_caller]
        fn check(input: &[u8], number: u32, delimiter: Option<u8>, want: &str) {
            let input = BufReader::with_capacity(5, input);
            let batches = Batches::new(input, 10).of_field(Some(Field { number, delimiter }));
            assert_eq!(keys(batches).join("|"), want);
        }
        check(b"GET /a 200\n  GET\t /b\n", 2, None, "/a,/b");
        check(b"GET /a 200\r\n", 3, None, "200");
        check(b"one\n\n", 2, None, "");
        check(b"a,,c\nd,e,f\n", 2, Some(b','), "e");
        check(b"a,,c\nd,e,f\n", 3, Some(b','), "c,f");
        check(b"a b,c\n", 1, Some(b','), "a b");
        // The line may be longer than a key.
        let long = [b"x ".repeat(4_000), b"key\n".to_vec()].concat();
        check(&long, 4_001, None, "key");
        let too_long = [b"x ".repeat(FIELD_LINE_BYTES_MAX), b"key\nk 2\n".to_vec()].concat();
        check(&too_long, 1, None, "k");
    }
}
