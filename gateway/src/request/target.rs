//! Method and URL → what is asked for.
//!
//! Paths are taken apart at `/` first and each part is percent-decoded once afterwards, so `%2F` stays part of a key and
//! nothing is ever decoded twice. There is no handling of `.` and `..`: they are keys.

use std::borrow::Cow;

use engine::key::CounterKey;
use hyper::{Method, Uri};

use super::{URL_BYTES_MAX, counter, integer};
use crate::problem::{Kind, Problem};

#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Route {
    /// `POST /v1/counters/{ns}/{key}/increment`
    Increment {
        counter: CounterKey,
        query: IncrementQuery,
    },
    /// `POST /v1/counters/{ns}/increment`
    IncrementMany {
        namespace: String,
    },
    /// `GET /v1/counters/{ns}/{key}`
    Get {
        counter: CounterKey,
        query: ReadQuery,
    },
    /// `POST /v1/counters/{ns}/get`
    GetMany {
        namespace: String,
        query: ReadQuery,
    },
    /// `DELETE /v1/counters/{ns}/{key}`. `exact`: the value as a string, too.
    Delete {
        counter: CounterKey,
        exact: bool,
    },
    Page(Page),
}

/// What tells about the gateway and the cluster.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Page {
    Livez,
    Readyz,
    /// `/readyz?all`: whether every shard can be written to, too.
    ReadyzAll,
    Metrics,
    Cluster,
    OpenApi,
}

/// What the URL of a single increment says.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct IncrementQuery {
    pub delta: Option<i64>,
    pub returning: bool,
    /// The value as a string, too.
    pub exact: bool,
}

/// What the URL of a read says.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct ReadQuery {
    /// Values that are at most so old will do. None: as of now.
    pub bounded_ms: Option<u64>,
    /// Each value as a string, too.
    pub exact: bool,
}

impl Route {
    pub fn has_body(&self) -> bool {
        matches!(self, Self::Increment { .. } | Self::IncrementMany { .. } | Self::GetMany { .. })
    }

    pub fn writes(&self) -> bool {
        matches!(self, Self::Increment { .. } | Self::IncrementMany { .. } | Self::Delete { .. })
    }

    /// Whether `Accept` chooses the form of the answer.
    pub fn has_forms(&self) -> bool {
        matches!(self, Self::Increment { .. } | Self::Get { .. } | Self::Delete { .. })
    }
}

pub(super) fn route(method: &Method, uri: &Uri) -> Result<Route, Problem> {
    let (path, query) = (uri.path(), uri.query());
    if path.len() + query.map_or(0, |query| query.len() + 1) > URL_BYTES_MAX {
        return Err(Problem::new(Kind::UrlTooLong, "a URL has at most 8 KiB (8,192 bytes)"));
    }
    if let Some(rest) = path.strip_prefix("/v1/counters/") {
        return counters(method, rest, query.unwrap_or_default());
    }
    let page = match path {
        "/livez" => Page::Livez,
        "/readyz" if asks_for_all(query.unwrap_or_default()) => Page::ReadyzAll,
        "/readyz" => Page::Readyz,
        "/metrics" => Page::Metrics,
        "/v1/cluster" => Page::Cluster,
        "/openapi.json" => Page::OpenApi,
        _ => return Err(no_such_path()),
    };
    let is_health = matches!(page, Page::Livez | Page::Readyz | Page::ReadyzAll);
    match *method {
        Method::GET | Method::HEAD => Ok(Route::Page(page)),
        // What HAProxy asks with, if it is not told otherwise.
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
            // Any key will do: it is the namespace that is checked, once for all items.
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

/// Decodes `%41` and its like, once. Nothing else is special, `+` least of all.
fn decoded<'a>(field: &'static str, text: &'a str) -> Result<Cow<'a, [u8]>, Problem> {
    let bytes = text.as_bytes();
    if !bytes.contains(&b'%') {
        return Ok(Cow::Borrowed(bytes));
    }
    let mut out = Vec::with_capacity(bytes.len());
    let mut rest = bytes;
    while let Some((&first, after)) = rest.split_first() {
        if first != b'%' {
            out.push(first);
            rest = after;
            continue;
        }
        let digit = |at: usize| after.get(at).and_then(|&byte| char::from(byte).to_digit(16));
        let (Some(high), Some(low)) = (digit(0), digit(1)) else {
            let detail = "a % is followed by two hexadecimal digits; the sign itself is %25";
            return Err(Problem::bad_input(field, detail));
        };
        out.push((high * 16 + low) as u8);
        rest = &after[2..];
    }
    Ok(Cow::Owned(out))
}

/// Goes through the parameters of a query; each may be there once.
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
                let detail = "is no parameter of this request, or is there twice";
                return Err(Problem::bad_input(name.into_owned(), detail));
            }
        }
    }
    Ok(())
}

fn no_parameters(query: &str) -> Result<(), Problem> {
    parameters(query, |_, _| Ok(None))
}

/// Sets what is not set yet.
fn once<T>(slot: &mut Option<T>, value: T) -> Option<()> {
    slot.is_none().then(|| *slot = Some(value))
}

/// `value=string`: for those whose numbers have 53 bits.
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

/// How old a value may be that a client is content with, when it does not say.
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
