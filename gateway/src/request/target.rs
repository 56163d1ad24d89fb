//! The route of a request, from method and URL.
//!
//! A path is split at `/` first, and each part is percent-decoded once afterwards, so `%2F` stays
//! part of a key and nothing is decoded twice. `.` and `..` are not special: they are keys.

use std::borrow::Cow;

use engine::key::CounterKey;
use hyper::{Method, Uri};

use super::{URL_BYTES_MAX, counter, integer};
use crate::problem::{Kind, Problem};

/// The operation of a request, with its parameters in the URL.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Route {
    /// `POST /v1/counters/{ns}/{key}/increment`
    Increment {
        /// The counter in the path.
        counter: CounterKey,
        /// The parameters.
        query: IncrementQuery,
    },
    /// `POST /v1/counters/{ns}/increment`
    IncrementMany {
        /// The namespace of all keys in the body.
        namespace: String,
    },
    /// `GET /v1/counters/{ns}/{key}`
    Get {
        /// The counter in the path.
        counter: CounterKey,
        /// The parameters.
        query: ReadQuery,
    },
    /// `POST /v1/counters/{ns}/get`
    GetMany {
        /// The namespace of all keys in the body.
        namespace: String,
        /// The parameters.
        query: ReadQuery,
    },
    /// `DELETE /v1/counters/{ns}/{key}`
    Delete {
        /// The counter in the path.
        counter: CounterKey,
        /// The answer contains the last value also as a string.
        exact: bool,
    },
    /// A page about the gateway or the cluster.
    Page(InfoPage),
}

/// A page about the gateway or the cluster.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum InfoPage {
    /// `/livez`
    Livez,
    /// `/readyz`
    Readyz,
    /// `/readyz?all`: also whether every shard can be written to.
    ReadyzAll,
    /// `/metrics`
    Metrics,
    /// `/v1/cluster`
    Cluster,
    /// `/openapi.json`
    OpenApi,
}

/// The parameters in the URL of a single increment.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct IncrementQuery {
    /// The amount to add.
    pub delta: Option<i64>,
    /// The answer contains the new value.
    pub returning: bool,
    /// The answer contains the new value also as a string.
    pub exact: bool,
}

/// The parameters in the URL of a read.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct ReadQuery {
    /// The staleness that the client accepts, in ms. `None` for a linearizable read.
    pub bounded_ms: Option<u64>,
    /// The answer contains each value also as a string.
    pub exact: bool,
}

impl Route {
    /// Returns whether the request may have a body.
    pub fn has_body(&self) -> bool {
        matches!(self, Self::Increment { .. } | Self::IncrementMany { .. } | Self::GetMany { .. })
    }

    /// Returns whether the request changes counters.
    pub fn writes(&self) -> bool {
        matches!(self, Self::Increment { .. } | Self::IncrementMany { .. } | Self::Delete { .. })
    }

    /// Returns whether `Accept` chooses the form of the answer.
    pub fn has_forms(&self) -> bool {
        matches!(self, Self::Increment { .. } | Self::Get { .. } | Self::Delete { .. })
    }
}

/// Parses method and URL.
pub(super) fn route(method: &Method, uri: &Uri) -> Result<Route, Problem> {
    let (path, query) = (uri.path(), uri.query());
    if path.len() + query.map_or(0, |query| query.len() + 1) > URL_BYTES_MAX {
        return Err(Problem::new(Kind::UrlTooLong, "a URL has at most 8 KiB (8,192 bytes)"));
    }
    if let Some(rest) = path.strip_prefix("/v1/counters/") {
        return counters(method, rest, query.unwrap_or_default());
    }
    let page = match path {
        "/livez" => InfoPage::Livez,
        "/readyz" if asks_for_all(query.unwrap_or_default()) => InfoPage::ReadyzAll,
        "/readyz" => InfoPage::Readyz,
        "/metrics" => InfoPage::Metrics,
        "/v1/cluster" => InfoPage::Cluster,
        "/openapi.json" => InfoPage::OpenApi,
        _ => return Err(no_such_path()),
    };
    let is_health = matches!(page, InfoPage::Livez | InfoPage::Readyz | InfoPage::ReadyzAll);
    match *method {
        Method::GET | Method::HEAD => Ok(Route::Page(page)),
        // The default method of HAProxy's health checks.
        Method::OPTIONS if is_health => Ok(Route::Page(page)),
        _ if is_health => Err(not_allowed("GET, HEAD, OPTIONS")),
        _ => Err(not_allowed("GET, HEAD")),
    }
}

fn asks_for_all(query: &str) -> bool {
    query.split('&').any(|parameter| parameter == "all" || parameter.starts_with("all="))
}

/// `rest` is what follows `/v1/counters/`.
fn counters(method: &Method, rest: &str, query: &str) -> Result<Route, Problem> {
    let mut parts = rest.split('/');
    let (namespace, second) = (parts.next().unwrap_or_default(), parts.next());
    let (third, fourth) = (parts.next(), parts.next());
    let Some(key) = second else {
        return Err(no_such_path());
    };
    match (third, fourth, method) {
        (Some("increment"), None, &Method::POST) => {
            let counter = named(namespace, key)?;
            Ok(Route::Increment { counter, query: increment_query(query)? })
        }
        (Some("increment"), None, _) => Err(not_allowed("POST")),
        (Some(_), ..) => Err(no_such_path()),
        (None, _, &Method::GET | &Method::HEAD) => {
            let counter = named(namespace, key)?;
            Ok(Route::Get { counter, query: read_query(query)? })
        }
        (None, _, &Method::DELETE) => {
            let counter = named(namespace, key)?;
            Ok(Route::Delete { counter, exact: only_exact(query)? })
        }
        (None, _, &Method::POST) if key == "increment" || key == "get" => {
            // This checks the namespace alone, once for all items, so any key will do.
            let namespace = named(namespace, "k")?.namespace().to_owned();
            let namespace = String::from_utf8(namespace).expect("a checked namespace is ASCII");
            if key == "get" {
                return Ok(Route::GetMany { namespace, query: read_query(query)? });
            }
            no_parameters(query)?;
            Ok(Route::IncrementMany { namespace })
        }
        (None, ..) if key == "increment" || key == "get" => {
            Err(not_allowed("DELETE, GET, HEAD, POST"))
        }
        (None, ..) => Err(not_allowed("DELETE, GET, HEAD")),
    }
}

fn no_such_path() -> Problem {
    let detail = "see /v1/counters/{namespace}/{key}, /v1/counters/{namespace}/{key}/increment, \
                  /v1/counters/{namespace}/increment, /v1/counters/{namespace}/get, /v1/cluster, \
                  /livez, /readyz, /metrics and /openapi.json";
    Problem::new(Kind::NotFound, detail)
}

fn not_allowed(allow: &'static str) -> Problem {
    let detail = format!("this path has {allow}");
    Problem { allow: Some(allow), ..Problem::new(Kind::MethodNotAllowed, detail) }
}

fn named(namespace: &str, key: &str) -> Result<CounterKey, Problem> {
    counter(&decoded("namespace", namespace)?, &decoded("key", key)?)
}

/// Percent-decodes a text, once. No other character is special, not even `+`.
fn decoded<'a>(field: &'static str, text: &'a str) -> Result<Cow<'a, [u8]>, Problem> {
    let bytes = text.as_bytes();
    if !bytes.contains(&b'%') {
        return Ok(Cow::Borrowed(bytes));
    }
    let detail = "a % is followed by two hexadecimal digits; the sign itself is %25";
    let bytes = percent_decode(bytes).ok_or_else(|| Problem::bad_input(field, detail))?;
    Ok(Cow::Owned(bytes))
}

/// Percent-decodes a text; `None` if a `%` is not followed by two hexadecimal digits.
pub fn percent_decode(text: &[u8]) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&first, after)) = rest.split_first() {
        if first != b'%' {
            bytes.push(first);
            rest = after;
            continue;
        }
        let (digits, after) = after.split_at_checked(2)?;
        let digit = |byte: u8| char::from(byte).to_digit(16);
        bytes.push((digit(digits[0])? * 16 + digit(digits[1])?) as u8);
        rest = after;
    }
    Some(bytes)
}

/// Passes each parameter of a query to `take`, which returns `None` for one that is unknown or
/// repeated.
fn parameters(
    query: &str,
    mut take: impl FnMut(&str, &[u8]) -> Result<Option<()>, Problem>,
) -> Result<(), Problem> {
    for parameter in query.split('&').filter(|parameter| !parameter.is_empty()) {
        let (name, value) = parameter.split_once('=').unwrap_or((parameter, ""));
        let name = decoded("query", name)?;
        let name = String::from_utf8_lossy(&name);
        let value = decoded("query", value)?;
        match take(&name, &value)? {
            Some(()) => {}
            None => {
                let detail = "is not a parameter of this request, or is present twice";
                return Err(Problem::bad_input(name.into_owned(), detail));
            }
        }
    }
    Ok(())
}

fn no_parameters(query: &str) -> Result<(), Problem> {
    parameters(query, |_, _| Ok(None))
}

/// Sets `slot`. Returns `None` if it was set already.
fn once<T>(slot: &mut Option<T>, value: T) -> Option<()> {
    slot.is_none().then(|| *slot = Some(value))
}

/// Parses `value=string`, for languages whose numbers have 53 bits.
fn exact(slot: &mut Option<()>, value: &[u8]) -> Result<Option<()>, Problem> {
    match value {
        b"string" => Ok(once(slot, ())),
        _ => Err(Problem::bad_input("value", "can only be \"string\"")),
    }
}

fn only_exact(query: &str) -> Result<bool, Problem> {
    let mut asked = None;
    parameters(query, |name, value| match name {
        "value" => exact(&mut asked, value),
        _ => Ok(None),
    })?;
    Ok(asked.is_some())
}

fn increment_query(query: &str) -> Result<IncrementQuery, Problem> {
    let (mut delta, mut returning, mut asked) = (None, None, None);
    parameters(query, |name, value| match name {
        "delta" => {
            let value = integer(value).map_err(|why| Problem::bad_input("delta", why.detail()))?;
            Ok(once(&mut delta, value))
        }
        "return" if value == b"value" => Ok(once(&mut returning, true)),
        "return" => Err(Problem::bad_input("return", "can only be \"value\"")),
        "value" => exact(&mut asked, value),
        _ => Ok(None),
    })?;
    Ok(IncrementQuery { delta, returning: returning.is_some(), exact: asked.is_some() })
}

/// The staleness that a bounded read without `max_staleness_ms` accepts.
const STALENESS_MS_DEFAULT: u64 = 1_000;

fn read_query(query: &str) -> Result<ReadQuery, Problem> {
    let (mut bounded, mut max_ms, mut asked) = (None, None, None);
    parameters(query, |name, value| match name {
        "consistency" => match value {
            b"linearizable" => Ok(once(&mut bounded, false)),
            b"bounded" => Ok(once(&mut bounded, true)),
            _ => Err(Problem::bad_input("consistency", "is \"linearizable\" or \"bounded\"")),
        },
        "max_staleness_ms" => match integer(value) {
            Ok(ms @ 0..) => Ok(once(&mut max_ms, ms.unsigned_abs())),
            _ => Err(Problem::bad_input("max_staleness_ms", "is a whole number of milliseconds")),
        },
        "value" => exact(&mut asked, value),
        _ => Ok(None),
    })?;
    let bounded_ms = match (bounded, max_ms) {
        (Some(true), max_ms) => Some(max_ms.unwrap_or(STALENESS_MS_DEFAULT)),
        (_, None) => None,
        (_, Some(_)) => {
            let detail = "belongs to consistency=bounded";
            return Err(Problem::bad_input("max_staleness_ms", detail));
        }
    };
    Ok(ReadQuery { bounded_ms, exact: asked.is_some() })
}
