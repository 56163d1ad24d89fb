//! Consecutive lines as one request, in which equal keys are merged.
//!
//! Batches are sent as lines `key TAB count`: the service splits a line at its last TAB, so a key
//! may itself end in a TAB and a number. This is also the cheapest format to write and to read.
//! Keys with a line end, which CSV allows, are sent as JSON. Lines without a key count as skipped.
//! Faulty lines are not sent, but reported.
//!
//! Merging makes requests smaller on real text. The price is that an item of a batch stands for
//! several lines, so each batch stores the item of every line: the outcome of an item can always be
//! reported per line.

use client::{KeyField, Media};
use hashbrown::HashTable;
use memchr::memchr;
use serde::Serialize;
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

/// A request's body stays below this and one key; the service's limit is 8 MiB.
const BODY_BYTES_MAX: usize = 4 << 20;
/// TAB, a u32, LF.
const COUNT_BYTES_MAX: usize = 12;

/// The contribution of one line to a batch.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum LineKind {
    /// A key, as the index of its item.
    Item(u32),
    /// Nothing: the line has no key.
    Skipped,
    /// Nothing: the line cannot be counted.
    Faulty(LineFault),
}

/// The reason why a line cannot be counted.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum LineFault {
    /// The key is longer than a key may be.
    KeyTooLong,
    /// The line is longer than a line may be.
    LineTooLong,
    /// The input ends within a quoted CSV field.
    OpenQuote,
}

impl LineFault {
    /// The reason, for users.
    pub(crate) fn why(self) -> &'static str {
        match self {
            Self::KeyTooLong => "the key is longer than 1024 bytes",
            Self::LineTooLong => {
                "the line is longer than 1 MiB (with --csv: is a quote not closed?)"
            }
            Self::OpenQuote => "the input ends within a quoted field",
        }
    }
}

/// Consecutive lines that are sent in one request.
#[derive(Debug, Default)]
pub(crate) struct LineBatch {
    first_line: u64,
    lines: Vec<LineKind>,
    /// The distinct keys, concatenated.
    text: Vec<u8>,
    /// The end of each key in `text`.
    ends: Vec<u32>,
    /// The number of lines with each key.
    pub(super) counts: Vec<u32>,
}

impl LineBatch {
    /// The number of its first line in the input.
    pub(crate) fn first_line(&self) -> u64 {
        self.first_line
    }

    /// The number of lines, counted or not.
    pub(crate) fn line_count(&self) -> u64 {
        self.lines.len() as u64
    }

    /// The checksum of its lines in their order.
    pub(crate) fn sum(&self) -> u64 {
        let mut sum = Xxh3::new();
        sum.update(&self.text);
        for end in &self.ends {
            sum.update(&end.to_le_bytes());
        }
        for line in &self.lines {
            let item = match line {
                LineKind::Item(item) => *item,
                LineKind::Skipped => u32::MAX,
                LineKind::Faulty(fault) => u32::MAX - 1 - *fault as u32,
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
    pub(crate) fn lines(&self) -> impl Iterator<Item = (u64, LineKind)> {
        (self.first_line..).zip(self.lines.iter().copied())
    }

    /// The format of the body: JSON if a key contains a line end, which would end a line of text.
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
            JsonIncrement { key, delta }
        });
        let body = JsonBatch { increments: increments.collect() };
        serde_json::to_vec(&body).expect("text and numbers can be written")
    }

    /// The key of an item.
    pub(crate) fn key(&self, item: u32) -> &[u8] {
        let item = item as usize;
        let start = if item == 0 { 0 } else { self.ends[item - 1] };
        &self.text[start as usize..self.ends[item] as usize]
    }

    /// The same lines as two batches; `None` for a single line.
    pub(crate) fn halves(&self) -> Option<[Self; 2]> {
        let middle = self.lines.len() / 2;
        let mut builder = LineBatchBuilder::default();
        let mut part = |from: usize, lines: &[LineKind]| {
            builder.begin(self.first_line + from as u64);
            for &line in lines {
                match line {
                    LineKind::Item(item) => builder.add(self.key(item)),
                    LineKind::Skipped => builder.add_skipped(),
                    LineKind::Faulty(fault) => builder.add_fault(fault),
                }
            }
            builder.take()
        };
        let (one, other) = self.lines.split_at(middle);
        (middle > 0).then(|| [part(0, one), part(middle, other)])
    }
}

/// The body of a batch in JSON.
#[derive(Serialize)]
struct JsonBatch {
    increments: Vec<JsonIncrement>,
}

/// One item of a batch in JSON.
#[derive(Serialize)]
struct JsonIncrement {
    #[serde(flatten)]
    key: KeyField,
    delta: u32,
}

/// A batch that is being filled.
#[derive(Default)]
pub(crate) struct LineBatchBuilder {
    batch: LineBatch,
    /// Finds the items of the batch by the hash of their keys. The table is empty between batches
    /// and kept to reuse its memory.
    index: HashTable<u32>,
}

impl LineBatchBuilder {
    /// Begins a batch at this line of the input.
    pub(crate) fn begin(&mut self, first_line: u64) {
        self.index.clear();
        self.batch = LineBatch { first_line, ..LineBatch::default() };
    }

    /// Returns the batch and leaves an empty one.
    pub(crate) fn take(&mut self) -> LineBatch {
        self.index.clear();
        std::mem::take(&mut self.batch)
    }

    /// The number of lines added so far.
    pub(crate) fn line_count(&self) -> u64 {
        self.batch.line_count()
    }

    /// The number of the line that is added next.
    pub(crate) fn next_line(&self) -> u64 {
        self.batch.first_line + self.line_count()
    }

    /// Returns whether the batch has `lines_max` lines, or as many bytes as a request may have.
    pub(crate) fn is_full(&self, lines_max: usize) -> bool {
        let LineBatch { lines, text, .. } = &self.batch;
        let body_bytes = text.len() + self.batch.items() * COUNT_BYTES_MAX;
        lines.len() >= lines_max || body_bytes >= BODY_BYTES_MAX
    }

    /// Adds a line without a key.
    pub(crate) fn add_skipped(&mut self) {
        self.batch.lines.push(LineKind::Skipped);
    }

    /// Adds a line that cannot be counted.
    pub(crate) fn add_fault(&mut self, fault: LineFault) {
        self.batch.lines.push(LineKind::Faulty(fault));
    }

    /// Adds a line with this key.
    pub(crate) fn add(&mut self, key: &[u8]) {
        let item = self.item(key);
        self.batch.lines.push(LineKind::Item(item));
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
    fn a_line_end_within_a_key_is_sent_as_json() {
        let mut builder = LineBatchBuilder::default();
        builder.begin(1);
        for key in [&b"a\nb"[..], b"c", b"\xff\n", b"c"] {
            builder.add(key);
        }
        let batch = builder.take();
        assert_eq!(batch.media(), Media::Json);
        let want = [
            r#"{"increments":[{"key":"a\nb","delta":1},{"key":"c","delta":2},"#,
            r#"{"key_base64":"/wo=","delta":1}]}"#,
        ]
        .concat();
        assert_eq!(String::from_utf8(batch.body()).unwrap(), want);
    }

    #[test]
    fn halves_are_the_same_lines() {
        let mut builder = LineBatchBuilder::default();
        builder.begin(7);
        builder.add(b"a");
        builder.add_skipped();
        builder.add(b"b");
        builder.add_fault(LineFault::KeyTooLong);
        builder.add(b"a");
        let batch = builder.take();
        let [one, other] = batch.halves().unwrap();
        assert_eq!((one.first_line(), one.line_count(), one.body()), (7, 2, b"a\t1\n".to_vec()));
        assert_eq!((other.first_line(), other.line_count()), (9, 3));
        assert_eq!(other.body(), b"b\t1\na\t1\n");
        let lines: Vec<_> = other.lines().collect();
        let fault = LineKind::Faulty(LineFault::KeyTooLong);
        assert_eq!(lines, [(9, LineKind::Item(0)), (10, fault), (11, LineKind::Item(1))]);
        builder.begin(1);
        builder.add(b"a");
        assert!(builder.take().halves().is_none());
    }
}
