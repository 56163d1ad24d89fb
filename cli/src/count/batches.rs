//! Input → lines → batches.
//!
//! A line is the bytes up to LF, one CR before it dropped (as in the service's `text/plain`). With `--csv` it is a record,
//! whose quoted fields may hold line ends.
//!
//! The last line may have no end. Of an input that is there for good it is a line like others; of one that is to be read
//! again, because it is still being written, it is half a line, and not counted ([`Batches::whole_lines_only`]).

use std::collections::VecDeque;
use std::io::{self, BufRead};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use memchr::memchr;

use super::batch::{Batch, Builder, Fault};
use super::csv::Place;
use super::keys::{Keys, Part};

/// Makes batches of at most `lines_max` lines from an input.
pub(super) struct Batches<R> {
    input: R,
    /// Made smaller from outside when requests turn out to be too large.
    lines_max: Arc<AtomicUsize>,
    keys: Keys,
    whole_lines_only: bool,
    /// A smaller batch is handed out when its first line is this old: lines from a slow pipe are
    /// counted soon after they came.
    flush_after: Option<Duration>,
    /// How many lines the first batches are to have: as an earlier run has cut them.
    cuts: VecDeque<u64>,
    /// Set from outside: nothing more is read. What was read by then is handed out.
    closed: Arc<AtomicBool>,
    ended: bool,
    /// Why the input ended, until the reason is taken.
    failed: Option<io::Error>,
    next_line: u64,
    bytes_read: u64,
    open: Builder,
    /// The begin of a line that goes on beyond what was read. Of one too long only enough
    /// is kept to see that it is: a file without line ends must not end up in memory.
    begun: Vec<u8>,
    /// How long that line is so far.
    begun_bytes: u64,
    /// Where in its record that line stands.
    place: Place,
}

impl<R: BufRead> Batches<R> {
    pub(super) fn new(input: R, lines_max: usize) -> Self {
        Self {
            input,
            lines_max: Arc::new(lines_max.into()),
            keys: Keys::new(Part::Whole, false),
            whole_lines_only: false,
            flush_after: None,
            cuts: VecDeque::new(),
            closed: Arc::default(),
            ended: false,
            failed: None,
            next_line: 1,
            bytes_read: 0,
            open: Builder::default(),
            begun: Vec::new(),
            begun_bytes: 0,
            place: Place::default(),
        }
    }

    pub(super) fn under(self, keys: Keys) -> Self {
        Self { keys, ..self }
    }

    pub(super) fn limited_by(self, lines_max: Arc<AtomicUsize>) -> Self {
        Self { lines_max, ..self }
    }

    pub(super) fn whole_lines_only(self, whole_lines_only: bool) -> Self {
        Self { whole_lines_only, ..self }
    }

    pub(super) fn flushed_after(self, flush_after: Option<Duration>) -> Self {
        Self { flush_after, ..self }
    }

    pub(super) fn cut_as(self, cuts: VecDeque<u64>) -> Self {
        Self { cuts, ..self }
    }

    pub(super) fn until(self, closed: Arc<AtomicBool>) -> Self {
        Self { closed, ..self }
    }

    /// How many bytes of the input were read by now.
    pub(super) fn bytes_read(&self) -> u64 {
        self.bytes_read
    }

    /// How many lines are in the batches handed out by now.
    pub(super) fn lines_read(&self) -> u64 {
        self.next_line - 1
    }

    /// How many bytes of a line without an end were read and not counted.
    pub(super) fn bytes_left(&self) -> u64 {
        self.begun_bytes
    }

    /// The next batch, `None` after the last line. An error comes after all whole lines before it were handed out; after it
    /// there is nothing more.
    pub(super) fn next(&mut self) -> io::Result<Option<Batch>> {
        self.open.begin(self.next_line);
        let mut first_came = None;
        let cut = self.cuts.pop_front();
        let lines_max =
            cut.map_or_else(|| self.lines_max.load(Ordering::Relaxed), |lines| lines as usize);
        let flush_after = self.flush_after.filter(|_| cut.is_none());
        while !self.ended && !self.open.is_full(lines_max) {
            let is_due = |since: Instant| flush_after.is_some_and(|after| since.elapsed() >= after);
            if first_came.is_some_and(is_due) {
                break;
            }
            // Looked at before reading: what was there when the end was called is still taken.
            let closed = self.closed.load(Ordering::Relaxed);
            match self.read_once(lines_max) {
                Ok(Read::End) => break,
                Ok(Read::Nothing) => self.ended = closed,
                // Not in the middle of what was read: those lines have left the pipe.
                Ok(Read::Some { is_all }) => self.ended = is_all && closed,
                Err(error) => (self.failed, self.ended) = (Some(error), true),
            }
            if first_came.is_none() && self.open.line_count() > 0 {
                first_came = Some(Instant::now());
            }
        }
        let batch = self.open.take();
        // Sent once with all its lines; a part of it would be another request.
        let is_part = self.ended && cut.is_some_and(|lines| batch.line_count() < lines);
        if batch.line_count() == 0 || is_part {
            return self.failed.take().map_or(Ok(None), Err);
        }
        self.next_line += batch.line_count();
        Ok(Some(batch))
    }

    /// Takes lines from what the input has ready, as many as the batch has room for.
    fn read_once(&mut self, lines_max: usize) -> io::Result<Read> {
        let buffer = match self.input.fill_buf() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(Read::Nothing),
            // Nothing has come for a moment.
            Err(error) if error.kind() == io::ErrorKind::TimedOut => return Ok(Read::Nothing),
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
                Some(csv) => csv.record_end(&mut self.place, rest),
            };
            let part = &rest[..end.unwrap_or(rest.len())];
            used += part.len() + usize::from(end.is_some());
            if end.is_some() && self.begun.is_empty() {
                failed = self.keys.add(without_cr(part), &mut self.open).err();
                continue;
            }
            // One more for the CR, one more to be too long.
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
        failed.map_or(Ok(Read::Some { is_all }), Err)
    }

    /// What becomes of a line without an end.
    fn end_of_input(&mut self) -> io::Result<Read> {
        if self.whole_lines_only || self.begun.is_empty() {
            return Ok(Read::End);
        }
        if self.place == Place::Quoted {
            self.open.add_fault(Fault::OpenQuote);
        } else {
            // It keeps its CR: only one before an LF is part of its end.
            self.keys.add(&self.begun, &mut self.open)?;
        }
        self.begun.clear();
        self.begun_bytes = 0;
        Ok(Read::End)
    }
}

/// What a look at the input gave.
enum Read {
    /// Bytes, and whether there is room for all of them.
    Some {
        is_all: bool,
    },
    Nothing,
    End,
}

fn without_cr(line: &[u8]) -> &[u8] {
    line.strip_suffix(b"\r").unwrap_or(line)
}

#[cfg(test)]
mod tests {
    use super::super::batch::Line;
    use super::super::csv::Csv;
    use super::super::keys::{Column, LINE_BYTES_MAX, Pattern};
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
            let too_long = Line::Faulty(Fault::KeyTooLong);
            for (kind, what) in [(Line::Skipped, "skipped"), (too_long, "too long")] {
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
        // The input is shorter than it was: the comparison of sums finds that.
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

    /// The keys of an input in pieces of five bytes.
    #[track_caller]
    fn check_part(part: Part, skip_header: bool, input: &[u8], want: &str) {
        let input = BufReader::with_capacity(5, input);
        let batches = Batches::new(input, 10).under(Keys::new(part, skip_header));
        assert_eq!(keys(batches).join("|"), want);
    }

    #[test]
    fn a_field_of_a_line_is_the_key() {
        #[track_caller]
        fn check(input: &[u8], number: usize, delimiter: Option<u8>, want: &str) {
            check_part(Part::Field { number, delimiter }, false, input, want);
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
            check_part(Part::Column(Csv { delimiter: b',' }, column), skip_header, input, want);
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
        let said = |input: &'static [u8]| {
            let part = Part::Column(Csv { delimiter: b',' }, Column::Name("b".to_owned()));
            let mut batches = Batches::new(input, 10).under(Keys::new(part, false));
            // The header was read, and is a line.
            assert_eq!(batches.next().unwrap().unwrap().line_count(), 1);
            let error = batches.next().unwrap_err();
            assert!(batches.next().unwrap().is_none());
            error.to_string()
        };
        assert!(said(b"a,\"c\nd\"\n1,2\n").contains("names: a, c\nd"));
        assert!(said(b"b,b\n1,2\n").contains("more than one column"));
    }

    #[test]
    fn what_a_pattern_finds_is_the_key() {
        let part = || Part::Found(Pattern::new(r#""GET ([^ ]+)"#).unwrap());
        check_part(part(), false, b"x \"GET /a HTTP\"\r\nnothing\n\"GET /b", "/a,/b");
        check_part(part(), true, b"\"GET /a \n\"GET /b \n", "/b");
    }

    #[test]
    fn faulty_lines_have_a_reason() {
        #[track_caller]
        fn check(part: Part, input: &[u8], want: &[Line]) {
            let mut batches = Batches::new(input, 10).under(Keys::new(part, false));
            let batch = batches.next().unwrap().unwrap();
            assert_eq!(batch.lines().map(|(_, line)| line).collect::<Vec<_>>(), want);
        }
        let long_key = [b"x".repeat(1025), b"\n".to_vec()].concat();
        let long_line = [b"x ".repeat(LINE_BYTES_MAX), b"\n".to_vec()].concat();
        let column = || Part::Column(Csv { delimiter: b',' }, Column::Number(1));
        let field = || Part::Field { number: 1, delimiter: None };
        for part in [field(), column()] {
            check(part, &long_key, &[Line::Faulty(Fault::KeyTooLong)]);
        }
        for part in [field(), column()] {
            check(part, &long_line, &[Line::Faulty(Fault::LineTooLong)]);
        }
        check(Part::Whole, &long_line, &[Line::Faulty(Fault::KeyTooLong)]);
        check(column(), b"\"a\nb\n", &[Line::Faulty(Fault::OpenQuote)]);
    }

    #[test]
    fn half_a_line_may_be_left() {
        #[track_caller]
        fn check(part: Part, input: &[u8], want: &str, left: u64) {
            let input = BufReader::with_capacity(3, input);
            let mut batches =
                Batches::new(input, 10).under(Keys::new(part, false)).whole_lines_only(true);
            let mut got = Vec::new();
            while let Some(batch) = batches.next().unwrap() {
                got.extend((0..batch.items() as u32).map(|item| batch.key(item).to_vec()));
            }
            assert_eq!(
                (String::from_utf8(got.join(&b","[..])).unwrap(), batches.bytes_left()),
                (want.to_owned(), left)
            );
        }
        check(Part::Whole, b"a\nb\nfo", "a,b", 2);
        check(Part::Whole, b"a\nb\r", "a", 2);
        check(Part::Whole, b"a\nb\n", "a,b", 0);
        check(Part::Whole, b"fo", "", 2);
        check(Part::Whole, &b"x".repeat(5_000), "", 5_000);
        let column = || Part::Column(Csv { delimiter: b',' }, Column::Number(1));
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
        // Those that an earlier run has sent with others are not sent without them.
        let mut batches = Batches::new(input(), 10).cut_as([3].into());
        assert_eq!(batches.next().unwrap_err().to_string(), "broken");
    }
}
