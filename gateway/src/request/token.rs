//! `Idempotency-Key` and `Idempotency-Issued-At`: the headers that make a repeated write count
//! once.
//!
//! The key is a structured field of the type String (RFC 8941 §3.3.3, as required by
//! draft-ietf-httpapi-idempotency-key-header): printable ASCII between double quotes, with the
//! escapes `\"` and `\\`, and without parameters. The unescaped text between the quotes is the
//! token; two ways to write the same text are the same token.
//!
//! A malformed key, such as one without quotes, is refused and never ignored: the client relies on
//! it.

use std::ops::Range;

use bytes::Bytes;
use engine::ids::TimeMs;
use hyper::header::{HeaderMap, HeaderName, HeaderValue};

use super::integer;
use crate::problem::Problem;

/// The longest token, in bytes and unescaped.
pub(crate) const TOKEN_BYTES_MAX: usize = 255;

/// The time by which a client's clock may be ahead of the gateway's.
const AHEAD_MS_MAX: u64 = 300_000;
/// Issue times that are obviously in seconds, from 2001 to 5138: as milliseconds they would lie
/// between the 12th day of 1970 and 1973.
const SECONDS: Range<u64> = 1_000_000_000..100_000_000_000;
/// A gateway's own clock that is further behind the time of the shards is wrong.
const BEHIND_MS_MAX: u64 = 86_400_000;

static IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
static IDEMPOTENCY_ISSUED_AT: HeaderName = HeaderName::from_static("idempotency-issued-at");

/// The idempotency headers of a write.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct RequestToken {
    /// The unescaped text between the quotes, 1 to 255 bytes.
    pub key: Bytes,
    /// The time at which the client made the request first.
    pub issued: Option<TimeMs>,
}

impl RequestToken {
    /// Refuses an issue time in the future: its record would stay until the shard's time has
    /// reached it. Also refuses one in seconds: it would be a time in 1970, and every request too
    /// old.
    pub(super) fn check_issued(&self, clock: TimeMs) -> Result<(), Problem> {
        let Some(issued) = self.issued else { return Ok(()) };
        if SECONDS.contains(&issued.0) && !SECONDS.contains(&clock.0) {
            let detail = format!(
                "is in milliseconds since 1970, and {} can only be seconds: {} would be the same \
                 in milliseconds",
                issued.0,
                1_000 * issued.0
            );
            return Err(Problem::bad_input("Idempotency-Issued-At", detail));
        }
        let ahead = issued.0.saturating_sub(clock.0);
        if ahead <= AHEAD_MS_MAX {
            return Ok(());
        }
        let detail = format!(
            "is {ahead} ms ahead of this gateway's clock, which is at {}: 300000 are allowed, so \
             one of the two is wrong",
            clock.0
        );
        Err(Problem::bad_input("Idempotency-Issued-At", detail))
    }
}

/// The time of day, in ms since 1970: that of the computer's clock, unless it is far behind the
/// newest time of any shard, which follows the clocks of all members of the shard. So a gateway
/// whose clock is in 1970 does not refuse every request. A shard's time that is far behind is
/// ignored: a new shard begins at 0, and one that was off for days has an old time until its next
/// entry.
pub(crate) fn clock(wall: TimeMs, shards: Option<TimeMs>) -> TimeMs {
    shards.filter(|shards| shards.0.saturating_sub(wall.0) > BEHIND_MS_MAX).unwrap_or(wall)
}

/// Parses the idempotency headers. Returns `None` without any.
pub(super) fn token(headers: &HeaderMap) -> Result<Option<RequestToken>, Problem> {
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
        return Err(wrong("is present twice"));
    }
    let key = string(value).ok_or_else(|| {
        wrong(
            "is a string of printable ASCII in double quotes, such as \"8e03978e-40d5\", and \
             nothing else",
        )
    })?;
    match key.len() {
        1..=TOKEN_BYTES_MAX => Ok(Some(RequestToken { key: key.into(), issued })),
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
            let detail = "is one whole number, the milliseconds since 1970 at which the request \
                          was made first";
            Err(Problem::bad_input("Idempotency-Issued-At", detail))
        }
    }
}

/// Unescapes a String of RFC 8941. Returns `None` if the value is not one.
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
    fn an_issue_time_may_be_five_minutes_ahead_of_a_clock_that_is_not_far_off() {
        const NOW: u64 = 1_700_000_000_000;
        #[track_caller]
        fn check(wall: u64, shards: Option<u64>, issued: u64, want: bool) {
            let token = RequestToken { key: "k".into(), issued: Some(TimeMs(issued)) };
            let clock = clock(TimeMs(wall), shards.map(TimeMs));
            assert_eq!(token.check_issued(clock).is_ok(), want, "{clock:?}");
        }
        check(NOW, None, 0, true);
        check(NOW, None, NOW + 300_000, true);
        check(NOW, None, NOW + 300_001, false);
        check(NOW, Some(NOW - 80_000_000), NOW + 300_000, true);
        check(NOW, Some(NOW + 80_000_000), NOW + 300_001, false);
        // The only shard is new; the cluster was off for a weekend.
        check(NOW, Some(12), NOW, true);
        check(NOW, Some(12), NOW + 300_001, false);
        check(NOW, Some(NOW - 200_000_000), NOW, true);
        // The gateway's clock is in 1970.
        check(0, None, NOW, false);
        check(0, Some(NOW), NOW, true);
        check(0, Some(NOW), NOW + 300_001, false);
        let problem =
            RequestToken { key: "k".into(), issued: Some(TimeMs(NOW)) }.check_issued(TimeMs(1));
        let problem = problem.expect_err("53 years ahead");
        assert_eq!(problem.field.as_deref(), Some("Idempotency-Issued-At"));
    }

    #[test]
    fn an_issue_time_in_seconds_is_bad_input_that_names_the_unit() {
        const NOW: u64 = 1_764_380_000;
        let check = |clock, issued| {
            let token = RequestToken { key: "k".into(), issued: Some(TimeMs(issued)) };
            token.check_issued(TimeMs(clock)).err().map(|problem| problem.detail)
        };
        let detail = check(1_000 * NOW, NOW).expect("it is in seconds");
        assert!(detail.contains("milliseconds") && detail.contains("1764380000000"), "{detail}");
        for old in [0, 999_999_999, 100_000_000_000, 1_000 * (NOW - 86_400)] {
            assert_eq!(check(1_000 * NOW, old), None, "{old}: it is only old");
        }
        assert_eq!(check(NOW, NOW), None, "if the clock is in 1970, such a time is valid");
    }

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
