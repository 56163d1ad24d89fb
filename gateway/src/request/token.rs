//! `Idempotency-Key` and `Idempotency-Issued-At`: what makes a write that is repeated count once.
//!
//! The key is a structured field of the kind String (RFC 8941 §3.3.3, as draft-ietf-httpapi-idempotency-key-header wants
//! it): printable ASCII between double quotes, in which `\"` and `\\` stand for themselves; no parameters. What stands
//! between the quotes, unescaped, is the token; how it was written makes no difference.
//!
//! A newcomer would let pass what is nearly one, such as a key without quotes. Whoever sends it relies on it, so it is
//! either understood or refused by name.

use bytes::Bytes;
use engine::ids::TimeMs;
use hyper::header::{HeaderMap, HeaderName, HeaderValue};

use super::integer;
use crate::problem::Problem;

/// The longest token, in bytes and unescaped.
pub(crate) const TOKEN_BYTES_MAX: usize = 255;

static IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
static IDEMPOTENCY_ISSUED_AT: HeaderName = HeaderName::from_static("idempotency-issued-at");

/// What the headers of a write say.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Token {
    /// What stands between the quotes.
    pub key: Bytes,
    /// When the client made the request first.
    pub issued: Option<TimeMs>,
}

pub(super) fn token(headers: &HeaderMap) -> Result<Option<Token>, Problem> {
    let wrong = |detail| Problem::bad_input("Idempotency-Key", detail);
    let issued = issued(headers)?;
    let mut values = headers.get_all(&IDEMPOTENCY_KEY).into_iter();
    let Some(value) = values.next() else {
        return match issued {
            None => Ok(None),
            Some(_) => {
                let detail = "belongs to a request with an Idempotency-Key";
                Err(Problem::bad_input("Idempotency-Issued-At", detail))
            }
        };
    };
    if values.next().is_some() {
        return Err(wrong("is there twice"));
    }
    let key = string(value).ok_or_else(|| {
        wrong("is a string of printable ASCII in double quotes, such as \"8e03978e-40d5\", and nothing else")
    })?;
    match key.len() {
        1..=TOKEN_BYTES_MAX => Ok(Some(Token { key: key.into(), issued })),
        0 => Err(wrong("is empty")),
        _ => Err(wrong("has more than 255 bytes")),
    }
}

fn issued(headers: &HeaderMap) -> Result<Option<TimeMs>, Problem> {
    let mut values = headers.get_all(&IDEMPOTENCY_ISSUED_AT).into_iter();
    let Some(value) = values.next() else { return Ok(None) };
    match (integer(value.as_bytes()), values.next()) {
        (Ok(ms @ 0..), None) => Ok(Some(TimeMs(ms.unsigned_abs()))),
        _ => {
            let detail = "is one whole number, the milliseconds since 1970 at which the request was made first";
            Err(Problem::bad_input("Idempotency-Issued-At", detail))
        }
    }
}

/// A String of RFC 8941, unescaped.
fn string(value: &HeaderValue) -> Option<Vec<u8>> {
    let inner = value.as_bytes().trim_ascii().strip_prefix(b"\"")?.strip_suffix(b"\"")?;
    let mut string = Vec::with_capacity(inner.len());
    let mut bytes = inner.iter();
    while let Some(&byte) = bytes.next() {
        string.push(match byte {
            b'\\' => *bytes.next().filter(|escaped| matches!(escaped, b'"' | b'\\'))?,
            b'"' => return None,
            b' '..=b'~' => byte,
            _ => return None,
        });
    }
    Some(string)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strings() {
        #[track_caller]
        fn check(value: &[u8], want: Option<&str>) {
            let value = HeaderValue::from_bytes(value).expect("a value");
            assert_eq!(string(&value).as_deref(), want.map(str::as_bytes), "{value:?}");
        }
        check(br#""a""#, Some("a"));
        check(br#"  "a b"  "#, Some("a b"));
        check(br#""""#, Some(""));
        check(br#""\"\\""#, Some(r#""\"#));
        check(br#""~ !""#, Some("~ !"));
        for not in [
            &b""[..],
            b"a",
            b"\"",
            b"\"a",
            b"a\"",
            b"'a'",
            b"\"a\"b\"",
            b"\"a\", \"b\"",
            b"\"a\";p=1",
            b"\"\\a\"",
            b"\"a\\\"",
            b"\"\xc3\xa9\"",
            b"\"a\tb\"",
            b"?1",
            b":YQ==:",
            b"12",
        ] {
            check(not, None);
        }
    }
}
