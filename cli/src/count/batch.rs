//! Consecutive lines → one request, equal keys merged.
//!
//! Batches travel as lines `key TAB count`: the service splits a line at
//! its last TAB, so a key may itself end in a TAB and a number. It is also the cheapest form to
//! write and to read. Keys with a line end, which CSV may have, travel as JSON. Lines without a key are counted as
//! skipped. Lines that can't be counted are never sent, and reported.
//!
//! Merging makes requests smaller on real text. The price is that an item of a batch stands for
//! several lines, so each batch remembers the item of every line: an outcome told per item can
//! always be told per line.

use bench::http::Media;
use hashbrown::HashTable;
use memchr::memchr;
use serde::Serialize;
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use crate::answer::KeyField;

/// A request's body stays below this and one key; the service's limit is 8 MiB.
const BODY_BYTES_MAX: usize = 4 << 20;
/// TAB, a u32, LF.
const COUNT_BYTES_MAX: usize = 12;

/// What one line of a batch is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Line {
    Item(u32),
    Skipped,
    Faulty(Fault),
}

/// Why a line can't be counted.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Fault {
    KeyTooLong,
    LineTooLong,
    OpenQuote,
}

impl Fault {
    pub(crate) fn why(self) -> &'static str {
        match self {
            Self::KeyTooLong => "its key is longer than 1024 bytes",
            Self::LineTooLong => "it is longer than 1 MiB (with --csv: is a quote not closed?)",
            Self::OpenQuote => "the input ends within its quotes",
        }
    }
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
    pub(super) counts: Vec<u32>,
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
                Line::Faulty(fault) => u32::MAX - 1 - *fault as u32,
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

    /// How the body is written: a line end within a key, as CSV may have, would end a line of text.
    pub(crate) fn media(&self) -> Media {
        if memchr(b'\n', &self.text).is_some() { Media::Json } else { Media::Text }
    }

    /// The body of a request for all items.
    pub(crate) fn body(&self) -> Vec<u8> {
        match self.media() {
            Media::Json => self.json(),
            Media::Text => self.lines_of_text(),
        }
    }

    fn lines_of_text(&self) -> Vec<u8> {
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

    fn json(&self) -> Vec<u8> {
        let increments = (0..self.items() as u32).map(|item| {
            let (key, delta) = (KeyField::new(self.key(item)), self.counts[item as usize]);
            Increment { key, delta }
        });
        let body = Increments { increments: increments.collect() };
        serde_json::to_vec(&body).expect("text and numbers can be written")
    }

    pub(crate) fn key(&self, item: u32) -> &[u8] {
        let item = item as usize;
        let start = if item == 0 { 0 } else { self.ends[item - 1] };
        &self.text[start as usize..self.ends[item] as usize]
    }

    /// The same lines as two requests, or none for a single line.
    pub(crate) fn halves(&self) -> Option<[Self; 2]> {
        let middle = self.lines.len() / 2;
        let mut builder = Builder::default();
        let mut part = |from: usize, lines: &[Line]| {
            builder.begin(self.first_line + from as u64);
            for &line in lines {
                match line {
                    Line::Item(item) => builder.add(self.key(item)),
                    Line::Skipped => builder.add_skipped(),
                    Line::Faulty(fault) => builder.add_fault(fault),
                }
            }
            builder.take()
        };
        let (one, other) = self.lines.split_at(middle);
        (middle > 0).then(|| [part(0, one), part(middle, other)])
    }
}

#[derive(Serialize)]
struct Increments {
    increments: Vec<Increment>,
}

#[derive(Serialize)]
struct Increment {
    #[serde(flatten)]
    key: KeyField,
    delta: u32,
}

/// A batch that is being filled.
#[derive(Default)]
pub(crate) struct Builder {
    batch: Batch,
    /// Finds the items of the batch by the hash of their keys. Empty between batches; kept for its memory.
    index: HashTable<u32>,
}

impl Builder {
    pub(crate) fn begin(&mut self, first_line: u64) {
        self.index.clear();
        self.batch = Batch { first_line, ..Batch::default() };
    }

    pub(crate) fn take(&mut self) -> Batch {
        self.index.clear();
        std::mem::take(&mut self.batch)
    }

    pub(crate) fn line_count(&self) -> u64 {
        self.batch.line_count()
    }

    /// The number of the line that is added next.
    pub(crate) fn next_line(&self) -> u64 {
        self.batch.first_line + self.line_count()
    }

    pub(crate) fn is_full(&self, lines_max: usize) -> bool {
        let Batch { lines, text, .. } = &self.batch;
        let body_bytes = text.len() + self.batch.items() * COUNT_BYTES_MAX;
        lines.len() >= lines_max || body_bytes >= BODY_BYTES_MAX
    }

    pub(crate) fn add_skipped(&mut self) {
        self.batch.lines.push(Line::Skipped);
    }

    pub(crate) fn add_fault(&mut self, fault: Fault) {
        self.batch.lines.push(Line::Faulty(fault));
    }

    pub(crate) fn add(&mut self, key: &[u8]) {
        let item = self.item(key);
        self.batch.lines.push(Line::Item(item));
    }

    fn item(&mut self, key: &[u8]) -> u32 {
        let Self { batch, index } = self;
        let hash = xxh3_64(key);
        if let Some(&item) = index.find(hash, |&item| batch.key(item) == key) {
            batch.counts[item as usize] += 1;
            return item;
        }
        let item = batch.items() as u32;
        batch.text.extend_from_slice(key);
        batch.ends.push(batch.text.len() as u32);
        batch.counts.push(1);
        index.insert_unique(hash, item, |&item| xxh3_64(batch.key(item)));
        item
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_end_within_a_key_travels_as_json() {
        let mut builder = Builder::default();
        builder.begin(1);
        for key in [&b"a\nb"[..], b"c", b"\xff\n", b"c"] {
            builder.add(key);
        }
        let batch = builder.take();
        assert_eq!(batch.media(), Media::Json);
        let want = r#"{"increments":[{"key":"a\nb","delta":1},{"key":"c","delta":2},{"key_base64":"/wo=","delta":1}]}"#;
        assert_eq!(String::from_utf8(batch.body()).unwrap(), want);
    }

    #[test]
    fn halves_are_the_same_lines() {
        let mut builder = Builder::default();
        builder.begin(7);
        builder.add(b"a");
        builder.add_skipped();
        builder.add(b"b");
        builder.add_fault(Fault::KeyTooLong);
        builder.add(b"a");
        let batch = builder.take();
        let [one, other] = batch.halves().unwrap();
        assert_eq!((one.first_line(), one.line_count(), one.body()), (7, 2, b"a\t1\n".to_vec()));
        assert_eq!((other.first_line(), other.line_count()), (9, 3));
        assert_eq!(other.body(), b"b\t1\na\t1\n");
        let lines: Vec<_> = other.lines().collect();
        let fault = Line::Faulty(Fault::KeyTooLong);
        assert_eq!(lines, [(9, Line::Item(0)), (10, fault), (11, Line::Item(1))]);
        builder.begin(1);
        builder.add(b"a");
        assert!(builder.take().halves().is_none());
    }
}
