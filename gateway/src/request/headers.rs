//! Header lines: those with a meaning for a request, and those that are refused by name.
//!
//! An unknown line that changes the meaning of a body must not be ignored: compressed bytes would
//! count as very odd keys, and an attacker can exploit two programs that parse a request
//! differently (request smuggling). Therefore every line with such a name is checked, not only the
//! first one.

use std::time::Duration;

use hyper::header::{
    ACCEPT, CONTENT_ENCODING, CONTENT_RANGE, CONTENT_TYPE, EXPECT, HOST, HeaderMap, HeaderName,
    HeaderValue, TRANSFER_ENCODING,
};

use super::{BodyType, TIMEOUT_DEFAULT, TIMEOUT_MS_MAX, integer, unsupported};
use crate::problem::{Kind, Problem};

static REQUEST_TIMEOUT_MS: HeaderName = HeaderName::from_static("request-timeout-ms");

/// Checks the headers that are refused for every route.
pub(super) fn check(headers: &HeaderMap) -> Result<(), Problem> {
    if has_two(headers, &HOST) {
        return Err(Problem::bad_input("Host", "is present twice"));
    }
    let is_chunked = |coding: &HeaderValue| is(coding, "chunked");
    if !headers.get_all(TRANSFER_ENCODING).iter().all(is_chunked)
        || has_two(headers, &TRANSFER_ENCODING)
    {
        let detail = "can only be chunked, once: transfer codings are not supported";
        return Err(Problem::bad_input("Transfer-Encoding", detail));
    }
    if headers.contains_key(CONTENT_RANGE) {
        let detail = "belongs to answers: a request can't change a part of a resource";
        return Err(Problem::bad_input("Content-Range", detail));
    }
    if !headers.get_all(EXPECT).iter().all(|expected| is(expected, "100-continue")) {
        return Err(Problem::new(Kind::ExpectationFailed, "Expect can only be 100-continue"));
    }
    if !headers.get_all(CONTENT_ENCODING).iter().all(|coding| is(coding, "identity")) {
        return Err(unsupported("bodies must not have a Content-Encoding"));
    }
    if has_two(headers, &CONTENT_TYPE) {
        return Err(unsupported("Content-Type is present twice"));
    }
    Ok(())
}

fn has_two(headers: &HeaderMap, name: &HeaderName) -> bool {
    headers.get_all(name).iter().nth(1).is_some()
}

fn is(value: &HeaderValue, word: &str) -> bool {
    value.as_bytes().trim_ascii().eq_ignore_ascii_case(word.as_bytes())
}

/// Parses `Request-Timeout-Ms`.
pub(super) fn timeout(headers: &HeaderMap) -> Result<Duration, Problem> {
    let mut values = headers.get_all(&REQUEST_TIMEOUT_MS).into_iter();
    let Some(value) = values.next() else {
        return Ok(TIMEOUT_DEFAULT);
    };
    match (integer(value.as_bytes()), values.next()) {
        (Ok(ms @ 1..=TIMEOUT_MS_MAX), None) => Ok(Duration::from_millis(ms.unsigned_abs())),
        _ => {
            let detail = "is one whole number of milliseconds from 1 to 60000";
            Err(Problem::bad_input("Request-Timeout-Ms", detail))
        }
    }
}

/// Parses `Content-Type`.
pub(super) fn body_type(headers: &HeaderMap) -> Result<BodyType, Problem> {
    let Some(value) = headers.get(CONTENT_TYPE) else {
        return Ok(BodyType::Json);
    };
    let mut parts = value.as_bytes().split(|&byte| byte == b';').map(<[u8]>::trim_ascii);
    let media = parts.next().unwrap_or_default();
    if !parts.all(is_understood) {
        return Err(unsupported("a body is UTF-8: charset can only be utf-8 or us-ascii"));
    }
    let is = |name: &str| media.eq_ignore_ascii_case(name.as_bytes());
    if is("application/json") || is("application/x-www-form-urlencoded") || is("") {
        Ok(BodyType::Json)
    } else if is("application/x-ndjson") {
        Ok(BodyType::NdJson)
    } else if is("text/plain") {
        Ok(BodyType::Text)
    } else {
        Err(unsupported("a body is application/json, application/x-ndjson or text/plain"))
    }
}

/// Returns whether a parameter of a media type is supported. All but `charset` are ignored.
fn is_understood(parameter: &[u8]) -> bool {
    let mut parts = parameter.splitn(2, |&byte| byte == b'=').map(<[u8]>::trim_ascii);
    let is_charset = parts.next().is_some_and(|name| name.eq_ignore_ascii_case(b"charset"));
    let value = parts.next().unwrap_or_default();
    let value =
        value.strip_prefix(b"\"").and_then(|rest| rest.strip_suffix(b"\"")).unwrap_or(value);
    let known = [&b"utf-8"[..], b"utf8", b"us-ascii"];
    !is_charset || known.iter().any(|charset| value.eq_ignore_ascii_case(charset))
}

/// Returns whether the client prefers `text/plain` to JSON: `Accept` lists it, and with a higher
/// weight than JSON or, at the same weight, before it.
pub(super) fn wants_plain(headers: &HeaderMap) -> bool {
    let lines = headers.get_all(ACCEPT).iter().filter_map(|accept| accept.to_str().ok());
    let mut plain = 0;
    for range in lines.flat_map(|line| line.split(',')) {
        let mut parts = range.split(';').map(str::trim);
        let media = parts.next().unwrap_or_default();
        let weight = parts.find_map(|part| part.strip_prefix("q=")).map_or(1_000, thousandths);
        if media.eq_ignore_ascii_case("text/plain") {
            plain = plain.max(weight);
        } else if media.eq_ignore_ascii_case("application/json") && (plain == 0 || weight > plain) {
            return false;
        }
    }
    plain > 0
}

/// Parses a weight of `Accept`, 0 to 1 with at most three digits. An invalid weight counts as 1.
fn thousandths(weight: &str) -> u32 {
    match weight.parse::<f32>() {
        Ok(weight) if (0.0..=1.0).contains(&weight) => (weight * 1_000.0) as u32,
        _ => 1_000,
    }
}
