//! Bytes from a client → a request that can't be wrong any more (DESIGN §12).
//!
//! Two steps, because refusing early is cheaper and safer: [`head`] looks at method, URL and headers before a byte of the
//! body is read; [`increment`], [`increments`] and [`keys`] then read the body. Whatever stands there that is not
//! understood is refused by name, never ignored: a misspelt `delta` that counted 1 would be a wrong count.
//!
//! What a newcomer would get wrong: `increment` and `get` are keys like any other. `POST /v1/counters/ns/get` reads
//! many counters, `GET /v1/counters/ns/get` reads the counter `get`.

mod integer;
mod json;
mod many;
mod target;
mod token;

use std::borrow::Cow;
use std::time::Duration;

use engine::ids::TimeMs;
use engine::key::{CounterKey, KeyError};
use hyper::header::{ACCEPT, CONTENT_ENCODING, CONTENT_TYPE, HeaderMap, HeaderName};
use hyper::http::request::Parts;

pub use self::many::{Batch, FailedItem, increments, keys};
pub use self::target::{IncrementQuery, Page, Route};
pub use self::token::Token;
pub(crate) use self::token::{TOKEN_BYTES_MAX, clock};

use self::integer::{NotInteger, integer};
use crate::problem::{Kind, Problem};

/// The longest URL, in bytes.
pub const URL_BYTES_MAX: usize = 8 * 1024;
/// The largest body, in bytes.
pub const BODY_BYTES_MAX: usize = 8 * 1024 * 1024;
/// The most items in one body.
pub const ITEMS_MAX: usize = 100_000;
/// How long a client waits that does not say.
pub(crate) const TIMEOUT_DEFAULT: Duration = Duration::from_millis(5_000);
/// How long a client may ask to wait.
pub(crate) const TIMEOUT_MS_MAX: i64 = 60_000;

static REQUEST_TIMEOUT_MS: HeaderName = HeaderName::from_static("request-timeout-ms");

/// How a body is to be read.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum BodyType {
    /// Also what is not named, or named as `curl -d` does.
    Json,
    NdJson,
    Text,
}

/// Everything there is to know before the body.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Head {
    pub route: Route,
    pub body: BodyType,
    pub timeout: Duration,
    /// Of a write. A read changes nothing, so there it means nothing and is not looked at.
    pub token: Option<Token>,
    /// Answer with the bare decimal.
    pub plain: bool,
}

/// One increment, read whole.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Increment {
    pub delta: i64,
    /// Answer the value after it.
    pub returning: bool,
}

/// Judges method, URL and headers.
pub fn head(parts: &Parts) -> Result<Head, Problem> {
    let route = target::route(&parts.method, &parts.uri)?;
    if let Route::Page(_) = route {
        let (body, timeout) = (BodyType::Json, TIMEOUT_DEFAULT);
        return Ok(Head { route, body, timeout, token: None, plain: false });
    }
    let headers = &parts.headers;
    let timeout = timeout(headers)?;
    let token = if route.writes() { token::token(headers)? } else { None };
    let body = if route.has_body() { body_type(headers)? } else { BodyType::Json };
    if body != BodyType::Json && matches!(route, Route::GetMany { .. }) {
        return Err(unsupported("a list of keys is JSON"));
    }
    Ok(Head { route, body, timeout, token, plain: wants_plain(headers) })
}

impl Head {
    /// What can be judged only by one who knows the time.
    pub fn at(self, clock: TimeMs) -> Result<Self, Problem> {
        self.token.as_ref().map_or(Ok(()), |token| token.check_issued(clock))?;
        Ok(self)
    }
}

/// A body beyond [`BODY_BYTES_MAX`].
pub fn body_too_large() -> Problem {
    Problem::new(Kind::TooLarge, "the body is larger than 8 MiB (8,388,608 bytes)")
}

/// The rest of a single increment: its body, and what its URL said.
pub fn increment(
    body_type: BodyType,
    body: &[u8],
    query: IncrementQuery,
) -> Result<Increment, Problem> {
    let told = match (body.is_empty(), body_type) {
        (true, _) => json::IncrementBody::default(),
        (false, BodyType::Json) => json::increment_body(body)?,
        (false, BodyType::NdJson | BodyType::Text) => {
            return Err(unsupported("the body of a single increment is JSON, or empty"));
        }
    };
    let twice = |field| Problem::bad_input(field, "is in the URL and in the body");
    let delta = match (query.delta, told.delta) {
        (Some(_), Some(_)) => return Err(twice("delta")),
        (in_url, in_body) => in_url.or(in_body).unwrap_or(1),
    };
    if query.returning && told.returning {
        return Err(twice("return"));
    }
    Ok(Increment { delta, returning: query.returning || told.returning })
}

/// A counter's name from its parts, as bytes.
fn counter(namespace: &[u8], key: &[u8]) -> Result<CounterKey, Problem> {
    CounterKey::new(namespace, key).map_err(|error| name_problem(error, key.len()))
}

fn name_problem(error: KeyError, key_bytes: usize) -> Problem {
    match error {
        KeyError::Namespace => {
            Problem::bad_input("namespace", "a namespace is 1 to 64 of a-z 0-9 _ . -")
        }
        KeyError::Key => {
            let detail = format!("a key is 1 to 1,024 bytes, this one has {key_bytes}");
            Problem::bad_input("key", detail)
        }
    }
}

fn timeout(headers: &HeaderMap) -> Result<Duration, Problem> {
    let mut told = headers.get_all(&REQUEST_TIMEOUT_MS).into_iter();
    let Some(value) = told.next() else {
        return Ok(TIMEOUT_DEFAULT);
    };
    match (integer(value.as_bytes()), told.next()) {
        (Ok(ms @ 1..=TIMEOUT_MS_MAX), None) => Ok(Duration::from_millis(ms.unsigned_abs())),
        _ => {
            let detail = "is one whole number of milliseconds from 1 to 60000";
            Err(Problem::bad_input("Request-Timeout-Ms", detail))
        }
    }
}

fn unsupported(detail: impl Into<Cow<'static, str>>) -> Problem {
    Problem::new(Kind::UnsupportedMediaType, detail)
}

fn body_type(headers: &HeaderMap) -> Result<BodyType, Problem> {
    // Packed bytes would pass for a text/plain list of very odd keys.
    if let Some(coding) = headers.get(CONTENT_ENCODING)
        && !coding.as_bytes().eq_ignore_ascii_case(b"identity")
    {
        return Err(unsupported("bodies are taken as they are, without a Content-Encoding"));
    }
    let Some(value) = headers.get(CONTENT_TYPE) else {
        return Ok(BodyType::Json);
    };
    // What follows, a charset most often, changes nothing: JSON is UTF-8, text is bytes.
    let media = value.as_bytes().split(|&byte| byte == b';').next().unwrap_or_default();
    let is = |name: &str| media.trim_ascii().eq_ignore_ascii_case(name.as_bytes());
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

/// `text/plain` is preferred to JSON: named, and with no smaller weight than JSON has or, at the same weight, before it.
fn wants_plain(headers: &HeaderMap) -> bool {
    let Some(accept) = headers.get(ACCEPT).and_then(|accept| accept.to_str().ok()) else {
        return false;
    };
    let mut plain = 0;
    for range in accept.split(',') {
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

/// A weight of `Accept`, 0 to 1 with three digits at most. What is none counts as 1.
fn thousandths(weight: &str) -> u32 {
    match weight.parse::<f32>() {
        Ok(weight) if (0.0..=1.0).contains(&weight) => (weight * 1_000.0) as u32,
        _ => 1_000,
    }
}

#[cfg(test)]
mod fuzz;
#[cfg(test)]
mod tests;
