//! A client of dkc: increments, batches and reads over HTTP.
//!
//! Requests are written directly from random numbers. They are not prepared in advance: a set that
//! fits into memory would contain fewer keys than the run claims.

use std::fmt::Write;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use client::{HttpConnection, HttpRequest, HttpResponse, IdempotencyHeaders, Media, Url};
use serde::Deserialize;

use crate::keys::{KeyChooser, KeySpace};
use crate::load::{LoadClient, LoadOutcome};

const DEADLINE: Duration = Duration::from_secs(5);
/// The most of an answer that an example shows.
const EXAMPLE_BYTES: usize = 200;

/// The requests that clients send to a cluster.
#[derive(Clone, Debug)]
pub struct RequestPlan {
    /// The gateways, among which the clients are spread evenly.
    pub urls: Vec<Url>,
    /// The namespace of the counters.
    pub namespace: String,
    /// The number of increments in a write. 1 means the single-increment endpoint.
    pub batch: usize,
    /// The format of a batch.
    pub media: Media,
    /// True if each write has an `Idempotency-Key` of its own.
    pub keyed: bool,
    /// The share of requests that read one counter, in percent.
    pub reads_percent: u32,
    /// The largest permitted age of a read; `None` if reads are linearizable.
    pub staleness: Option<Duration>,
    /// The counters: `k0`, `k1` and so on.
    pub keys: KeySpace,
}

impl RequestPlan {
    /// Returns the client of this number.
    pub fn client(&self, number: usize) -> CounterClient {
        CounterClient {
            connection: HttpConnection::new(self.urls[number % self.urls.len()].clone()),
            requests: RequestGenerator::new(self.clone(), number as u64),
        }
    }
}

/// A client with one connection to a gateway.
#[derive(Debug)]
pub struct CounterClient {
    connection: HttpConnection,
    requests: RequestGenerator,
}

impl LoadClient for CounterClient {
    async fn call(&mut self) -> Option<LoadOutcome> {
        let (request, kind) = self.requests.next(self.connection.url())?;
        Some(match self.connection.call(&request, DEADLINE + DEADLINE).await {
            Ok(answer) => outcome(&answer, kind),
            Err(error) => LoadOutcome::Failed(error.to_string()),
        })
    }
}

/// The kind of a request.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum RequestKind {
    Read,
    /// A write of this many increments.
    Write(u64),
}

fn outcome(answer: &HttpResponse, kind: RequestKind) -> LoadOutcome {
    // The answer to a single increment contains its delta, which is 1, like that of a batch of one.
    #[derive(Deserialize)]
    struct AppliedBody {
        applied: u64,
    }
    #[derive(Deserialize)]
    struct ValueBody {
        #[serde(rename = "value")]
        _value: i128,
    }
    let bytes = &answer.body[..answer.body.len().min(EXAMPLE_BYTES)];
    let example = || format!("{} {}", answer.status, String::from_utf8_lossy(bytes));
    match (answer.status, kind) {
        (429 | 503, _) => LoadOutcome::Refused { applied: 0, answer: example() },
        (200, RequestKind::Read) => match serde_json::from_slice::<ValueBody>(&answer.body) {
            Ok(_) => LoadOutcome::Read,
            Err(_) => LoadOutcome::Failed(example()),
        },
        (200, RequestKind::Write(increments)) => {
            match serde_json::from_slice::<AppliedBody>(&answer.body) {
                Ok(AppliedBody { applied }) if applied == increments => {
                    LoadOutcome::Applied(applied)
                }
                Ok(AppliedBody { applied }) if all_definite(&answer.body) => {
                    LoadOutcome::Refused { applied, answer: example() }
                }
                _ => LoadOutcome::Failed(example()),
            }
        }
        _ => LoadOutcome::Failed(example()),
    }
}

/// Returns whether each item of a batch that was not applied is known not to be.
fn all_definite(body: &[u8]) -> bool {
    #[derive(Deserialize)]
    struct ItemOutcome<'a> {
        outcome: &'a str,
    }
    #[derive(Deserialize)]
    struct FailedBody<'a> {
        #[serde(borrow)]
        failed: Vec<ItemOutcome<'a>>,
    }
    serde_json::from_slice::<FailedBody<'_>>(body)
        .is_ok_and(|body| body.failed.iter().all(|item| item.outcome == "not-applied"))
}

/// Generates the requests of one client.
#[derive(Debug)]
struct RequestGenerator {
    plan: RequestPlan,
    chooser: KeyChooser,
    /// The prefix of this client's idempotency keys, and the number of keys so far, if requests
    /// have keys.
    tokens: Option<(String, u64)>,
    /// The keys of a request. The buffer is reused, and so is the next one.
    keys: Vec<u64>,
    /// The path of a single counter, or the body of a batch.
    text: String,
}

impl RequestGenerator {
    fn new(plan: RequestPlan, seed: u64) -> Self {
        let chooser = plan.keys.chooser(seed);
        let tokens = plan.keyed.then(|| (token_prefix(seed), 0));
        Self { plan, chooser, tokens, keys: Vec::new(), text: String::new() }
    }

    fn next(&mut self, url: &Url) -> Option<(HttpRequest, RequestKind)> {
        let is_read = self.chooser.one_in_hundred(self.plan.reads_percent);
        self.text.clear();
        self.chooser.choose(if is_read { 1 } else { self.plan.batch }, &mut self.keys);
        let first = *self.keys.first()?;
        let namespace = &self.plan.namespace;
        if is_read {
            append(&mut self.text, format_args!("/v1/counters/{namespace}/k{first}"));
            if let Some(staleness) = self.plan.staleness {
                let query = "?consistency=bounded&max_staleness_ms=";
                append(&mut self.text, format_args!("{query}{}", staleness.as_millis()));
            }
            return Some((HttpRequest::get(url, &self.text, DEADLINE), RequestKind::Read));
        }
        let request = if self.plan.batch == 1 {
            append(&mut self.text, format_args!("/v1/counters/{namespace}/k{first}/increment"));
            let token = self.token();
            HttpRequest::post(url, &self.text, DEADLINE, token.as_ref(), Media::Json, b"")
        } else {
            let path = format!("/v1/counters/{namespace}/increment");
            self.write_body();
            let (token, media, body) = (self.token(), self.plan.media, self.text.as_bytes());
            HttpRequest::post(url, &path, DEADLINE, token.as_ref(), media, body)
        };
        Some((request, RequestKind::Write(self.keys.len() as u64)))
    }

    fn write_body(&mut self) {
        let Self { keys, text, .. } = self;
        match self.plan.media {
            Media::Text => keys.iter().for_each(|key| append(text, format_args!("k{key}\n"))),
            Media::Json => {
                text.push_str("{\"increments\":[");
                for (index, key) in keys.iter().enumerate() {
                    let comma = if index == 0 { "" } else { "," };
                    append(text, format_args!("{comma}{{\"key\":\"k{key}\",\"delta\":1}}"));
                }
                text.push_str("]}");
            }
        }
    }

    fn token(&mut self) -> Option<IdempotencyHeaders> {
        self.tokens.as_mut().map(|(prefix, count)| {
            *count += 1;
            IdempotencyHeaders { key: format!("{prefix}-{count}"), issued_at_ms: None }
        })
    }
}

/// Returns a prefix that differs between runs and between clients.
fn token_prefix(client: u64) -> String {
    let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    format!("bench-{:x}-{client}", since_1970.as_nanos())
}

fn append(text: &mut String, what: std::fmt::Arguments<'_>) {
    text.write_fmt(what).expect("a String takes every character");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::KeyDistribution;

    #[track_caller]
    fn check(status: u16, body: &str, kind: RequestKind, want: &str) {
        let answer = HttpResponse { status, body: body.into(), ..HttpResponse::default() };
        let got = match outcome(&answer, kind) {
            LoadOutcome::Applied(count) => format!("applied {count}"),
            LoadOutcome::Read => "read".to_owned(),
            LoadOutcome::Refused { applied, .. } => format!("refused, {applied} applied"),
            LoadOutcome::Failed(_) => "failed".to_owned(),
        };
        assert_eq!(got, want, "{status} {body}");
    }

    #[test]
    fn answers_have_outcomes() {
        let (one, ten) = (RequestKind::Write(1), RequestKind::Write(10));
        check(200, r#"{"key":"k1","applied":1}"#, one, "applied 1");
        check(200, r#"{"accepted":10,"applied":10,"failed":[]}"#, ten, "applied 10");
        let part = |outcome| format!(r#"{{"applied":9,"failed":[{{"outcome":"{outcome}"}}]}}"#);
        check(200, &part("not-applied"), ten, "refused, 9 applied");
        check(200, &part("unknown"), ten, "failed");
        check(200, r#"{"applied":9}"#, ten, "failed");
        check(429, "{}", ten, "refused, 0 applied");
        check(503, "{}", RequestKind::Read, "refused, 0 applied");
        check(504, "{}", one, "failed");
        check(
            200,
            r#"{"key":"k1","value":170141183460469231731687303715884105727}"#,
            RequestKind::Read,
            "read",
        );
        check(200, r#"{"applied":1}"#, RequestKind::Read, "failed");
    }

    fn generator(batch: usize, media: Media, reads_percent: u32) -> RequestGenerator {
        let plan = RequestPlan {
            urls: vec![url()],
            namespace: "n".to_owned(),
            batch,
            media,
            keyed: false,
            reads_percent,
            staleness: Some(Duration::from_millis(250)),
            keys: KeySpace::new(3, KeyDistribution::Each),
        };
        RequestGenerator::new(plan, 0)
    }

    fn url() -> Url {
        Url::parse("http://127.0.0.1:80").unwrap()
    }

    #[track_caller]
    fn check_request(mut requests: RequestGenerator, want: &[&str], kind: RequestKind) {
        let (request, got) = requests.next(&url()).unwrap();
        let request = format!("{request:?}");
        assert_eq!(got, kind);
        let text = requests.text.clone();
        want.iter().for_each(|part| assert!(text.contains(part), "{text} of {request}"));
    }

    #[test]
    fn requests_are_written() {
        let write = RequestKind::Write;
        check_request(generator(1, Media::Text, 0), &["/v1/counters/n/k0/increment"], write(1));
        check_request(generator(2, Media::Text, 0), &["k0\nk1\n"], write(2));
        let json = r#"{"increments":[{"key":"k0","delta":1},{"key":"k1","delta":1}]}"#;
        check_request(generator(2, Media::Json, 0), &[json], write(2));
        let query = "/v1/counters/n/k0?consistency=bounded&max_staleness_ms=250";
        check_request(generator(2, Media::Json, 100), &[query], RequestKind::Read);
    }

    #[test]
    fn the_last_batch_may_be_smaller_and_nothing_follows_it() {
        let mut requests = generator(2, Media::Text, 0);
        let kinds: Vec<_> =
            std::iter::from_fn(|| requests.next(&url())).map(|(_, kind)| kind).collect();
        assert_eq!(kinds, [RequestKind::Write(2), RequestKind::Write(1)]);
    }
}
