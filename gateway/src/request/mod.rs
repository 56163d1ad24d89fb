//! Parsing: from the bytes of a client to a valid request.
//!
//! There are two steps, because it is cheaper and safer to refuse early: [`head`] checks method,
//! URL and headers before a byte of the body is read; [`increment`], [`increments`] and [`keys`]
//! then parse the body. Unknown input is refused by name, never ignored: a misspelt `delta` that
//! counted 1 would be a wrong count.
//!
//! `increment` and `get` are keys like any other. `POST /v1/counters/ns/get` reads many counters,
//! `GET /v1/counters/ns/get` reads the counter `get`.

mod headers;
mod integer;
mod json;
mod many;
mod mark;
mod target;
mod token;

use std::borrow::Cow;
use std::time::Duration;

use engine::ids::TimeMs;
use engine::key::{CounterKey, KeyError};
use hyper::http::request::Parts;

pub use self::many::{FailedItem, IncrementBatch, increments, keys};
pub use self::target::{IncrementQuery, InfoPage, ReadQuery, Route, percent_decode};
pub use self::token::RequestToken;
pub(crate) use self::token::{TOKEN_BYTES_MAX, clock};

use self::integer::integer;
use crate::problem::{Kind, Problem};

/// The longest URL, in bytes.
pub const URL_BYTES_MAX: usize = 8 * 1024;
/// The largest body, in bytes.
pub const BODY_BYTES_MAX: usize = 8 * 1024 * 1024;
/// The most items in one body.
pub const ITEMS_MAX: usize = 100_000;
/// The timeout of a request without `Request-Timeout-Ms`.
pub(crate) const TIMEOUT_DEFAULT: Duration = Duration::from_millis(5_000);
/// The longest timeout that a client may request.
pub(crate) const TIMEOUT_MS_MAX: i64 = 60_000;

/// The format of a body.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum BodyType {
    /// JSON. Also the format of a body without a type, or with the type that `curl -d` sends.
    Json,
    /// Newline-delimited JSON: one object per line.
    NdJson,
    /// One key per line, with an optional delta after a TAB.
    Text,
}

/// A request without its body.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct RequestHead {
    /// The operation and its parameters in the URL.
    pub route: Route,
    /// The format of the body.
    pub body: BodyType,
    /// The time for which the client waits.
    pub timeout: Duration,
    /// The idempotency key of a write. `None` for a read, which changes nothing: its headers are
    /// not checked.
    pub token: Option<RequestToken>,
    /// The answer is a plain decimal number.
    pub plain: bool,
}

/// A single increment, from URL and body.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct IncrementRequest {
    /// The amount to add.
    pub delta: i64,
    /// The answer contains the new value.
    pub returning: bool,
    /// The answer contains the new value also as a string.
    pub exact: bool,
}

/// Checks method, URL and headers.
pub fn head(parts: &Parts) -> Result<RequestHead, Problem> {
    let route = target::route(&parts.method, &parts.uri)?;
    let headers = &parts.headers;
    headers::check(headers)?;
    if let Route::Page(_) = route {
        let (body, timeout) = (BodyType::Json, TIMEOUT_DEFAULT);
        return Ok(RequestHead { route, body, timeout, token: None, plain: false });
    }
    let timeout = headers::timeout(headers)?;
    let token = if route.writes() { token::token(headers)? } else { None };
    let body = if route.has_body() { headers::body_type(headers)? } else { BodyType::Json };
    if body != BodyType::Json && matches!(route, Route::GetMany { .. }) {
        return Err(unsupported("a list of keys is JSON"));
    }
    Ok(RequestHead { route, body, timeout, token, plain: headers::wants_plain(headers) })
}

impl RequestHead {
    /// Checks the issue time of the idempotency key, if there is one, against the time of day.
    pub fn check_issue_time(self, clock: impl FnOnce() -> TimeMs) -> Result<Self, Problem> {
        self.token.as_ref().map_or(Ok(()), |token| token.check_issued(clock()))?;
        Ok(self)
    }
}

/// The problem of a body beyond [`BODY_BYTES_MAX`].
pub fn body_too_large() -> Problem {
    Problem::new(Kind::TooLarge, "the body is larger than 8 MiB (8,388,608 bytes)")
}

/// The problem of a body where the request must have none.
pub fn body_not_wanted() -> Problem {
    Problem::bad_input("body", "a request with this method has no body here")
}

/// Parses the body of a single increment and merges it with the parameters of its URL.
pub fn increment(
    body_type: BodyType,
    body: &[u8],
    query: IncrementQuery,
) -> Result<IncrementRequest, Problem> {
    let in_body = match (body.is_empty(), body_type) {
        (true, _) => json::IncrementBody::default(),
        (false, BodyType::Json) => json::increment_body(body)?,
        (false, BodyType::NdJson | BodyType::Text) => {
            return Err(unsupported("the body of a single increment is JSON, or empty"));
        }
    };
    let twice = |field| Problem::bad_input(field, "is in the URL and in the body");
    let delta = match (query.delta, in_body.delta) {
        (Some(_), Some(_)) => return Err(twice("delta")),
        (in_url, from_body) => in_url.or(from_body).unwrap_or(1),
    };
    if query.returning && in_body.returning {
        return Err(twice("return"));
    }
    let returning = query.returning || in_body.returning;
    if query.exact && !returning {
        return Err(Problem::bad_input("value", "belongs to return=value"));
    }
    Ok(IncrementRequest { delta, returning, exact: query.exact })
}

/// Checks the name of a counter.
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

fn unsupported(detail: impl Into<Cow<'static, str>>) -> Problem {
    Problem::new(Kind::UnsupportedMediaType, detail)
}

#[cfg(test)]
mod fuzz;
#[cfg(test)]
mod tests;
