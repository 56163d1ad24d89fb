//! Records of comma-separated values (RFC 4180), read as Python's `csv` and spreadsheets do.
//!
//! A field that begins with a quote goes on to the next single quote, over delimiters and line ends; two quotes in it are
//! one. Anywhere else a quote is a character like others, so a log line with a stray one spoils itself alone.
//!
//! `csv-core` is not used: it drops empty lines and ends a record at a lone CR, and records are to be numbered, cut and
//! left half read exactly as lines are.

use memchr::{memchr, memchr2};

/// The delimiter, which is all that differs.
#[derive(Clone, Copy, Debug)]
pub(super) struct Csv {
    pub(super) delimiter: u8,
}

/// Where in a record the next byte stands.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(super) enum Place {
    #[default]
    FieldStart,
    Plain,
    Quoted,
    /// Behind a quote that ends the field, or is the first of two.
    BehindQuote,
}

/// What a byte is.
#[derive(Eq, PartialEq)]
enum Byte {
    Content,
    Quote,
    FieldEnd,
    RecordEnd,
}

impl Csv {
    /// The place of the byte that follows, and what this one is.
    fn step(self, place: Place, byte: u8) -> (Place, Byte) {
        match (place, byte) {
            (Place::Quoted, b'"') => (Place::BehindQuote, Byte::Quote),
            (Place::Quoted, _) | (Place::BehindQuote, b'"') => (Place::Quoted, Byte::Content),
            (Place::FieldStart, b'"') => (Place::Quoted, Byte::Quote),
            (_, b'\n') => (Place::FieldStart, Byte::RecordEnd),
            (_, byte) if byte == self.delimiter => (Place::FieldStart, Byte::FieldEnd),
            _ => (Place::Plain, Byte::Content),
        }
    }

    /// Where the record ends whose next bytes these are, or the place after them if it goes on.
    pub(super) fn record_end(self, place: &mut Place, bytes: &[u8]) -> Option<usize> {
        let mut at = 0;
        while at < bytes.len() {
            // What changes nothing is jumped over.
            let jump = match place {
                Place::Quoted => memchr(b'"', &bytes[at..]),
                Place::Plain => memchr2(self.delimiter, b'\n', &bytes[at..]),
                Place::FieldStart | Place::BehindQuote => Some(0),
            };
            at += jump?;
            let (next, what) = self.step(*place, bytes[at]);
            *place = next;
            if what == Byte::RecordEnd {
                return Some(at);
            }
            at += 1;
        }
        None
    }

    /// The content of a field of a record, from 1. Empty if there is no such field.
    pub(super) fn field<'a>(
        self,
        record: &[u8],
        number: usize,
        content: &'a mut Vec<u8>,
    ) -> &'a [u8] {
        content.clear();
        let (mut place, mut at) = (Place::default(), 1);
        for &byte in record {
            let (next, what) = self.step(place, byte);
            place = next;
            match what {
                Byte::FieldEnd if at == number => break,
                Byte::FieldEnd => at += 1,
                Byte::Content if at == number => content.push(byte),
                Byte::Content | Byte::Quote | Byte::RecordEnd => {}
            }
        }
        content
    }

    /// The contents of all fields of a record.
    pub(super) fn fields(self, record: &[u8]) -> Vec<Vec<u8>> {
        let (mut place, mut fields) = (Place::default(), vec![Vec::new()]);
        for &byte in record {
            let (next, what) = self.step(place, byte);
            place = next;
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
        // A quote within is one; what stands behind a closing one belongs to the field, as in Python.
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
            let (mut got, mut record, mut place) = (Vec::new(), Vec::new(), Place::default());
            for mut part in text.chunks(length) {
                while let Some(end) = COMMAS.record_end(&mut place, part) {
                    record.extend_from_slice(&part[..end]);
                    got.push(String::from_utf8(std::mem::take(&mut record)).unwrap());
                    part = &part[end + 1..];
                }
                record.extend_from_slice(part);
            }
            assert_eq!(got, want, "in parts of {length}");
            assert_eq!((place, &record[..]), (Place::Quoted, &b"\"open\n"[..]));
        }
    }
}
