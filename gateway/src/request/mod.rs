//! Bytes from a client → a request that can't be wrong any more (DESIGN §12).
//!
//! Two steps, because refusing early is cheaper and safer: [`head`] looks at method, URL and headers before a byte of the
//! body is read; [`increment`], [`increments`] and [`keys`] then read the body. Whatever stands there that is not
//! understood is refused by name, never ignored: a misspelt `delta` that counted 1 would be a wrong count.
//!
//! What a newcomer would get wrong: `increment` and `get` are keys like any other. `POST /v1/counters/ns/get` reads
//! many counters, `GET /v1/counters/ns/get` reads the counter `get`.

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

pub use self::many::{Batch, FailedItem, increments, keys};
pub use self::target::{IncrementQuery, Page, ReadQuery, Route};
pub use self::token::Token;
pub(crate) use self::token::{TOKEN_BYTES_MAX, clock};

use self::integer::integer;
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
    /// … as a string, too.
    pub exact: bool,
}

/// Judges method, URL and headers.
pub fn head(parts: &Parts) -> Result<Head, Problem> {
    let route = target::route(&parts.method, &parts.uri)?;
    let headers = &parts.headers;
    headers::check(headers)?;
    if let Route::Page(_) = route {
        let (body, timeout) = (BodyType::Json, TIMEOUT_DEFAULT);
        return Ok(Head { route, body, timeout, token: None, plain: false });
    }
    let timeout = headers::timeout(headers)?;
    let token = if route.writes() { token::token(headers)? } else { None };
    let body = if route.has_body() { headers::body_type(headers)? } else { BodyType::Json };
    if body != BodyType::Json && matches!(route, Route::GetMany { .. }) {
        return Err(unsupported("a list of keys is JSON"));
    }
    Ok(Head { route, body, timeout, token, plain: headers::wants_plain(headers) })
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

/// A body of a request that has none.
pub fn body_not_wanted() -> Problem {
    Problem::bad_input("body", "a request with this method has no body here")
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
    let returning = query.returning || told.returning;
    if query.exact && !returning {
        return Err(Problem::bad_input("value", "belongs to return=value"));
    }
    Ok(Increment { delta, returning, exact: query.exact })
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

fn unsupported(detail: impl Into<Cow<'static, str>>) -> Problem {
    Problem::new(Kind::UnsupportedMediaType, detail)
}

#[cfg(test)]
mod fuzz;
#[cfg(test)]
mod tests;
