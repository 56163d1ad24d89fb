//! Records of comma-separated values (RFC 4180), parsed as Python's `csv` and spreadsheets do.
//!
//! A field that begins with a quote ends at the next single quote, and may contain delimiters and
//! line ends; two quotes in it stand for one. Anywhere else a quote is an ordinary character, so a
//! stray quote in a log line affects that line only.
//!
//! The crate `csv-core` is not used: it drops empty lines and ends a record at a lone CR, but
//! records must be numbered, split and left incomplete exactly as lines are.

use memchr::{memchr, memchr2};

/// The dialect of CSV, which is defined by its delimiter.
#[derive(Clone, Copy, Debug)]
pub(super) struct Csv {
    pub(super) delimiter: u8,
}

/// The state of the parser before the next byte.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(super) enum CsvState {
    /// At the beginning of a field.
    #[default]
    FieldStart,
    /// In a field without quotes.
    Plain,
    /// Within quotes.
    Quoted,
    /// After a quote that ends the quoted part, or is the first of two.
    AfterQuote,
}

/// The meaning of a byte in its state.
#[derive(Eq, PartialEq)]
enum Byte {
    Content,
    Quote,
    FieldEnd,
    RecordEnd,
}

impl Csv {
    /// Returns the state after a byte, and the meaning of the byte.
    fn step(self, state: CsvState, byte: u8) -> (CsvState, Byte) {
        match (state, byte) {
            (CsvState::Quoted, b'"') => (CsvState::AfterQuote, Byte::Quote),
            (CsvState::Quoted, _) | (CsvState::AfterQuote, b'"') => {
                (CsvState::Quoted, Byte::Content)
            }
            (CsvState::FieldStart, b'"') => (CsvState::Quoted, Byte::Quote),
            (_, b'\n') => (CsvState::FieldStart, Byte::RecordEnd),
            (_, byte) if byte == self.delimiter => (CsvState::FieldStart, Byte::FieldEnd),
            _ => (CsvState::Plain, Byte::Content),
        }
    }

    /// Returns the position of the record's end in its next bytes. If the record continues, `state`
    /// becomes the state after these bytes.
    pub(super) fn record_end(self, state: &mut CsvState, bytes: &[u8]) -> Option<usize> {
        let mut at = 0;
        while at < bytes.len() {
            // Bytes that do not change the state are skipped.
            let jump = match state {
                CsvState::Quoted => memchr(b'"', &bytes[at..]),
                CsvState::Plain => memchr2(self.delimiter, b'\n', &bytes[at..]),
                CsvState::FieldStart | CsvState::AfterQuote => Some(0),
            };
            at += jump?;
            let (next, what) = self.step(*state, bytes[at]);
            *state = next;
            if what == Byte::RecordEnd {
                return Some(at);
            }
            at += 1;
        }
        None
    }

    /// Returns the content of a field, numbered from 1; empty if there is no such field.
    pub(super) fn field<'a>(
        self,
        record: &[u8],
        number: usize,
        content: &'a mut Vec<u8>,
    ) -> &'a [u8] {
        content.clear();
        let (mut state, mut at) = (CsvState::default(), 1);
        for &byte in record {
            let (next, what) = self.step(state, byte);
            state = next;
            match what {
                Byte::FieldEnd if at == number => break,
                Byte::FieldEnd => at += 1,
                Byte::Content if at == number => content.push(byte),
                Byte::Content | Byte::Quote | Byte::RecordEnd => {}
            }
        }
        content
    }

    /// Returns the contents of all fields of a record.
    pub(super) fn fields(self, record: &[u8]) -> Vec<Vec<u8>> {
        let (mut state, mut fields) = (CsvState::default(), vec![Vec::new()]);
        for &byte in record {
            let (next, what) = self.step(state, byte);
            state = next;
            match what {
                Byte::FieldEnd => fields.push(Vec::new()),
                Byte::Content => fields.last_mut().expect("it begins with one").push(byte),
                Byte::Quote | Byte::RecordEnd => {}
            }
        }
        fields
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const COMMAS: Csv = Csv { delimiter: b',' };

    /// The fields of a record, each between bars.
    #[track_caller]
    fn check(csv: Csv, record: &str, want: &str) {
        let fields = csv.fields(record.as_bytes());
        let text = |field: &[u8]| String::from_utf8(field.to_vec()).unwrap();
        let got: Vec<_> = fields.iter().map(|field| text(field)).collect();
        assert_eq!(got.join("|"), want, "{record:?}");
        let mut content = Vec::new();
        for (number, field) in (1..).zip(&fields) {
            assert_eq!(csv.field(record.as_bytes(), number, &mut content), field);
        }
        assert!(csv.field(record.as_bytes(), fields.len() + 1, &mut content).is_empty());
    }

    #[test]
    fn fields() {
        check(COMMAS, "", "");
        check(COMMAS, "a,b c,", "a|b c|");
        check(COMMAS, r#""a,b","c""d","""""#, r#"a,b|c"d|""#);
        check(COMMAS, "\"a\nb\",c", "a\nb|c");
        // A quote within a plain field is a character; text after a closing quote belongs to the
        // field, as in Python.
        check(COMMAS, r#"a"b,"c"d,"e"f"g"#, r#"a"b|cd|ef"g"#);
        check(COMMAS, r#"a, "b""#, r#"a| "b""#);
        let blanks = Csv { delimiter: b' ' };
        check(blanks, r#"::1 - [x] "GET / HTTP/1.1" 200"#, "::1|-|[x]|GET / HTTP/1.1|200");
    }

    #[test]
    fn records_end_outside_quotes() {
        // In parts of every length, since a buffer may end anywhere.
        let text = b"a,b\n\"c\nd\",e\r\n\n\"f\"\"\n\",g\nh\"i\n\"open\n";
        let want = ["a,b", "\"c\nd\",e\r", "", "\"f\"\"\n\",g", "h\"i"];
        for length in 1..=text.len() {
            let (mut got, mut record, mut state) = (Vec::new(), Vec::new(), CsvState::default());
            for mut part in text.chunks(length) {
                while let Some(end) = COMMAS.record_end(&mut state, part) {
                    record.extend_from_slice(&part[..end]);
                    got.push(String::from_utf8(std::mem::take(&mut record)).unwrap());
                    part = &part[end + 1..];
                }
                record.extend_from_slice(part);
            }
            assert_eq!(got, want, "in parts of {length}");
            assert_eq!((state, &record[..]), (CsvState::Quoted, &b"\"open\n"[..]));
        }
    }
}
