//! Splits the input into lines and the lines into batches.
//!
//! A line consists of the bytes up to LF, without one CR before the LF (as in the service's
//! `text/plain`). With `--csv` it is a record, whose quoted fields may contain line ends.
//!
//! The last line may have no line end. In a complete input it is a line like the others; in an
//! input that is still being written and will be read again, it is incomplete and not counted
//! ([`Batches::whole_lines_only`]).

use std::collections::VecDeque;
use std::io::{self, BufRead};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use memchr::memchr;

use super::batch::{LineBatch, LineBatchBuilder, LineFault};
use super::csv::CsvState;
use super::keys::{KeyExtractor, KeySource};

/// Makes batches of at most `lines_max` lines from an input.
pub(super) struct Batches<R> {
    input: R,
    /// The maximum number of lines, which workers reduce when requests are too large.
    pub(super) lines_max: Arc<AtomicUsize>,
    pub(super) keys: KeyExtractor,
    /// True if an incomplete last line is left uncounted.
    pub(super) whole_lines_only: bool,
    /// A smaller batch is returned when its first line is this old, so that lines from a slow pipe
    /// are counted soon after they arrive.
    pub(super) flush_after: Option<Duration>,
    /// The numbers of lines of the first batches, which an earlier run has sent.
    pub(super) cuts: VecDeque<u64>,
    /// Set by a signal: nothing more is read, and the lines read so far are returned.
    pub(super) closed: Arc<AtomicBool>,
    ended: bool,
    /// The error that ended the input, until it is returned.
    failed: Option<io::Error>,
    next_line: u64,
    bytes_read: u64,
    open: LineBatchBuilder,
    /// The beginning of a line whose end was not read yet. Of a line that is too long, only enough
    /// is kept to detect that: a file without line ends must not fill the memory.
    begun: Vec<u8>,
    /// The length of that line so far.
    begun_bytes: u64,
    /// The state of the CSV parser within that line.
    csv_state: CsvState,
}

impl<R: BufRead> Batches<R> {
    /// Reads `input` with the whole line as key and without time limits.
    pub(super) fn new(input: R, lines_max: usize) -> Self {
        Self {
            input,
            lines_max: Arc::new(lines_max.into()),
            keys: KeyExtractor::new(KeySource::Whole, false),
            whole_lines_only: false,
            flush_after: None,
            cuts: VecDeque::new(),
            closed: Arc::default(),
            ended: false,
            failed: None,
            next_line: 1,
            bytes_read: 0,
            open: LineBatchBuilder::default(),
            begun: Vec::new(),
            begun_bytes: 0,
            csv_state: CsvState::default(),
        }
    }

    /// The number of bytes read so far.
    pub(super) fn bytes_read(&self) -> u64 {
        self.bytes_read
    }

    /// The number of lines in the batches returned so far.
    pub(super) fn lines_read(&self) -> u64 {
        self.next_line - 1
    }

    /// The number of bytes of an incomplete last line, which is not counted.
    pub(super) fn bytes_left(&self) -> u64 {
        self.begun_bytes
    }

    /// Returns the next batch, or `None` after the last line. An error is returned after all whole
    /// lines before it, and ends the input.
    pub(super) fn next(&mut self) -> io::Result<Option<LineBatch>> {
        self.open.begin(self.next_line);
        let mut first_read_at = None;
        let cut = self.cuts.pop_front();
        let lines_max =
            cut.map_or_else(|| self.lines_max.load(Ordering::Relaxed), |lines| lines as usize);
        let flush_after = self.flush_after.filter(|_| cut.is_none());
        while !self.ended && !self.open.is_full(lines_max) {
            let is_due = |since: Instant| flush_after.is_some_and(|after| since.elapsed() >= after);
            if first_read_at.is_some_and(is_due) {
                break;
            }
            // The flag is read before the input: lines that arrived before the signal are counted.
            let closed = self.closed.load(Ordering::Relaxed);
            match self.read_once(lines_max) {
                Ok(ReadStep::End) => break,
                Ok(ReadStep::Nothing) => self.ended = closed,
                // The reading does not end within a buffer: its lines have already left the pipe.
                Ok(ReadStep::Some { is_all }) => self.ended = is_all && closed,
                Err(error) => (self.failed, self.ended) = (Some(error), true),
            }
            if first_read_at.is_none() && self.open.line_count() > 0 {
                first_read_at = Some(Instant::now());
            }
        }
        let batch = self.open.take();
        // An earlier run sent it with all its lines; a part of it would be another request.
        let is_part = self.ended && cut.is_some_and(|lines| batch.line_count() < lines);
        if batch.line_count() == 0 || is_part {
            return self.failed.take().map_or(Ok(None), Err);
        }
        self.next_line += batch.line_count();
        Ok(Some(batch))
    }

    /// Adds the lines that the input has ready, as many as fit into the batch.
    fn read_once(&mut self, lines_max: usize) -> io::Result<ReadStep> {
        let buffer = match self.input.fill_buf() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {
                return Ok(ReadStep::Nothing);
            }
            // No data arrived within the poll interval.
            Err(error) if error.kind() == io::ErrorKind::TimedOut => return Ok(ReadStep::Nothing),
            filled => filled?,
        };
        if buffer.is_empty() {
            return self.end_of_input();
        }
        let line_bytes_max = self.keys.line_bytes_max();
        let csv = self.keys.csv();
        let (mut used, mut failed) = (0, None);
        while used < buffer.len() && failed.is_none() && !self.open.is_full(lines_max) {
            let rest = &buffer[used..];
            let end = match csv {
                None => memchr(b'\n', rest),
                Some(csv) => csv.record_end(&mut self.csv_state, rest),
            };
            let part = &rest[..end.unwrap_or(rest.len())];
            used += part.len() + usize::from(end.is_some());
            if end.is_some() && self.begun.is_empty() {
                failed = self.keys.add(without_cr(part), &mut self.open).err();
                continue;
            }
            // One byte more for the CR, and one more to detect that the line is too long.
            let room = (line_bytes_max + 2).saturating_sub(self.begun.len());
            self.begun.extend_from_slice(&part[..part.len().min(room)]);
            self.begun_bytes += part.len() as u64;
            if end.is_some() {
                failed = self.keys.add(without_cr(&self.begun), &mut self.open).err();
                self.begun.clear();
                self.begun_bytes = 0;
            }
        }
        let is_all = used == buffer.len();
        self.input.consume(used);
        self.bytes_read += used as u64;
        failed.map_or(Ok(ReadStep::Some { is_all }), Err)
    }

    /// Handles a last line without a line end.
    fn end_of_input(&mut self) -> io::Result<ReadStep> {
        if self.whole_lines_only || self.begun.is_empty() {
            return Ok(ReadStep::End);
        }
        if self.csv_state == CsvState::Quoted {
            self.open.add_fault(LineFault::OpenQuote);
        } else {
            // The line keeps its CR: only a CR before an LF belongs to the line end.
            self.keys.add(&self.begun, &mut self.open)?;
        }
        self.begun.clear();
        self.begun_bytes = 0;
        Ok(ReadStep::End)
    }
}

/// The result of one read of the input.
enum ReadStep {
    /// Some bytes; `is_all`: all of them fitted into the batch.
    Some { is_all: bool },
    /// No bytes for now.
    Nothing,
    /// The end of the input.
    End,
}

fn without_cr(line: &[u8]) -> &[u8] {
    line.strip_suffix(b"\r").unwrap_or(line)
}

#[cfg(test)]
mod tests {
    use super::super::batch::LineKind;
    use super::super::csv::Csv;
    use super::super::keys::{Column, LINE_BYTES_MAX, Pattern};
    use super::super::lines::{LineRange, LineSet};
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
            let select = |wanted: LineKind| {
                let mut lines = LineSet::default();
                let those = batch.lines().filter(|&(_, line)| line == wanted);
                those.for_each(|(number, _)| lines.add(number));
                lines
            };
            for item in 0..batch.items() as u32 {
                let lines: Vec<_> = select(LineKind::Item(item))
                    .ranges()
                    .iter()
                    .map(|range| format!("{}-{}", range.first_line, range.last_line))
                    .collect();
                let key = batch.key(item).escape_ascii().to_string();
                let key = if key.len() > 20 { format!("[{}]", key.len()) } else { key };
                let count = batch.counts[item as usize];
                text.push(format!("{key}*{count} at {}", lines.join(",")));
            }
            let too_long = LineKind::Faulty(LineFault::KeyTooLong);
            for (kind, what) in [(LineKind::Skipped, "skipped"), (too_long, "too long")] {
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
    fn lines_of_a_pipe_are_not_held_back() {
        let input = || BufReader::with_capacity(4, &b"a\nb\nc\ndddddd\n"[..]);
        // Every line is old enough as soon as it is read.
        let flushed = Batches { flush_after: Some(Duration::ZERO), ..Batches::new(input(), 10) };
        assert_eq!(keys(flushed), ["a,b", "c", "dddddd"]);
        let patient =
            Batches { flush_after: Some(Duration::from_secs(3_600)), ..Batches::new(input(), 10) };
        assert_eq!(keys(patient), ["a,b,c,dddddd"]);
    }

    #[test]
    fn lines_read_before_the_signal_are_returned() {
        let input = BufReader::with_capacity(6, &b"a\nb\nc\nd\ne\n"[..]);
        let closed = Arc::new(AtomicBool::new(true));
        let batches = Batches { closed, ..Batches::new(input, 2) };
        assert_eq!(keys(batches), ["a,b", "c"]);
    }

    #[test]
    fn batches_are_cut_as_they_were() {
        let input = || BufReader::with_capacity(4, &b"a\nb\nc\nd\ne\nf\n"[..]);
        let again = |cuts: &[u64]| {
            let cuts = cuts.iter().copied().collect();
            Batches { flush_after: Some(Duration::ZERO), cuts, ..Batches::new(input(), 2) }
        };
        assert_eq!(keys(again(&[3, 1])), ["a,b,c", "d", "e,f"]);
        // The input is shorter than it was: the comparison of sums finds that.
        assert_eq!(keys(again(&[3, 9])), ["a,b,c", "d,e,f"]);
        let closed = Arc::new(AtomicBool::new(true));
        assert_eq!(keys(Batches { closed, ..again(&[9]) }), [""; 0]);
    }

    #[test]
    fn checksums_differ_between_lines() {
        let sum = |text: &'static [u8]| Batches::new(text, 10).next().unwrap().unwrap().sum();
        assert_eq!(sum(b"a\nb\na\n"), sum(b"a\r\nb\na"));
        let texts: [&[u8]; 7] =
            [b"a\nb\n", b"b\na\n", b"ab\n", b"a\nb\na\n", b"a\nb\nb\n", b"a\n\nb\n", b"\na\nb\n"];
        let sums: std::collections::BTreeSet<_> = texts.iter().map(|text| sum(text)).collect();
        assert_eq!(sums.len(), texts.len());
    }

    /// The keys of an input in pieces of five bytes.
    #[track_caller]
    fn check_part(part: KeySource, skip_header: bool, input: &[u8], want: &str) {
        let input = BufReader::with_capacity(5, input);
        let batches =
            Batches { keys: KeyExtractor::new(part, skip_header), ..Batches::new(input, 10) };
        assert_eq!(keys(batches).join("|"), want);
    }

    #[test]
    fn a_field_of_a_line_is_the_key() {
        #[track_caller]
        fn check(input: &[u8], number: usize, delimiter: Option<u8>, want: &str) {
            check_part(KeySource::Field { number, delimiter }, false, input, want);
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
        let too_long = [b"x ".repeat(LINE_BYTES_MAX), b"key\nk 2\n".to_vec()].concat();
        check(&too_long, 1, None, "k");
    }

    #[test]
    fn a_column_is_the_key() {
        #[track_caller]
        fn check(column: Column, skip_header: bool, input: &[u8], want: &str) {
            check_part(
                KeySource::Column(Csv { delimiter: b',' }, column),
                skip_header,
                input,
                want,
            );
        }
        let table = b"id,status\r\n1,\"a\nb\"\r\n\r\n2,\"c,\"\"d\"\"\"\r\n3\r\n4,e";
        let named = |name: &str| Column::Name(name.to_owned());
        check(named("status"), false, table, r#"a\nb,c,\"d\",e"#);
        check(named("status"), true, table, r#"a\nb,c,\"d\",e"#);
        check(Column::Number(1), true, table, "1,2,3,4");
        check(Column::Number(1), false, table, "id,1,2,3,4");
        check(Column::Number(3), false, table, "");
        // A quote that is not closed takes the rest with it.
        check(Column::Number(1), false, b"a\n\"b\nc\n", "a");
    }

    #[test]
    fn a_column_that_is_not_there_is_named() {
        let error = |input: &'static [u8]| {
            let part = KeySource::Column(Csv { delimiter: b',' }, Column::Name("b".to_owned()));
            let mut batches =
                Batches { keys: KeyExtractor::new(part, false), ..Batches::new(input, 10) };
            // The header was read, and is a line.
            assert_eq!(batches.next().unwrap().unwrap().line_count(), 1);
            let error = batches.next().unwrap_err();
            assert!(batches.next().unwrap().is_none());
            error.to_string()
        };
        assert!(error(b"a,\"c\nd\"\n1,2\n").contains("first line: a, c\nd"));
        assert!(error(b"b,b\n1,2\n").contains("more than one column"));
    }

    #[test]
    fn the_match_of_a_pattern_is_the_key() {
        let part = || KeySource::Match(Pattern::new(r#""GET ([^ ]+)"#).unwrap());
        check_part(part(), false, b"x \"GET /a HTTP\"\r\nnothing\n\"GET /b", "/a,/b");
        check_part(part(), true, b"\"GET /a \n\"GET /b \n", "/b");
    }

    #[test]
    fn faulty_lines_have_a_reason() {
        #[track_caller]
        fn check(part: KeySource, input: &[u8], want: &[LineKind]) {
            let mut batches =
                Batches { keys: KeyExtractor::new(part, false), ..Batches::new(input, 10) };
            let batch = batches.next().unwrap().unwrap();
            assert_eq!(batch.lines().map(|(_, line)| line).collect::<Vec<_>>(), want);
        }
        let long_key = [b"x".repeat(1025), b"\n".to_vec()].concat();
        let long_line = [b"x ".repeat(LINE_BYTES_MAX), b"\n".to_vec()].concat();
        let column = || KeySource::Column(Csv { delimiter: b',' }, Column::Number(1));
        let field = || KeySource::Field { number: 1, delimiter: None };
        for part in [field(), column()] {
            check(part, &long_key, &[LineKind::Faulty(LineFault::KeyTooLong)]);
        }
        for part in [field(), column()] {
            check(part, &long_line, &[LineKind::Faulty(LineFault::LineTooLong)]);
        }
        check(KeySource::Whole, &long_line, &[LineKind::Faulty(LineFault::KeyTooLong)]);
        check(column(), b"\"a\nb\n", &[LineKind::Faulty(LineFault::OpenQuote)]);
    }

    #[test]
    fn an_incomplete_line_may_be_left() {
        #[track_caller]
        fn check(part: KeySource, input: &[u8], want: &str, left: u64) {
            let input = BufReader::with_capacity(3, input);
            let mut batches = Batches {
                keys: KeyExtractor::new(part, false),
                whole_lines_only: true,
                ..Batches::new(input, 10)
            };
            let mut got = Vec::new();
            while let Some(batch) = batches.next().unwrap() {
                got.extend((0..batch.items() as u32).map(|item| batch.key(item).to_vec()));
            }
            assert_eq!(
                (String::from_utf8(got.join(&b","[..])).unwrap(), batches.bytes_left()),
                (want.to_owned(), left)
            );
        }
        check(KeySource::Whole, b"a\nb\nfo", "a,b", 2);
        check(KeySource::Whole, b"a\nb\r", "a", 2);
        check(KeySource::Whole, b"a\nb\n", "a,b", 0);
        check(KeySource::Whole, b"fo", "", 2);
        check(KeySource::Whole, &b"x".repeat(5_000), "", 5_000);
        let column = || KeySource::Column(Csv { delimiter: b',' }, Column::Number(1));
        check(column(), b"a\n\"b\nc\n", "a", 5);
        check(column(), b"a\nb,c", "a", 3);
    }

    /// Damage in the middle of a file: the lines before it count.
    #[test]
    fn an_error_comes_after_the_lines_before_it() {
        struct Broken;
        impl io::Read for Broken {
            fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
                Err(io::Error::other("broken"))
            }
        }
        let input = || BufReader::new(io::Read::chain(&b"a\nb\nhal"[..], Broken));
        let mut batches = Batches::new(input(), 10);
        assert_eq!(batches.next().unwrap().unwrap().line_count(), 2);
        assert_eq!(batches.next().unwrap_err().to_string(), "broken");
        assert!(batches.next().unwrap().is_none());
        // Lines that an earlier run has sent with others are not sent without them.
        let mut batches = Batches { cuts: [3].into(), ..Batches::new(input(), 10) };
        assert_eq!(batches.next().unwrap_err().to_string(), "broken");
    }
}
