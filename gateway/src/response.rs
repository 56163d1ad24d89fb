//! The HTTP answers: results and problems, as JSON or plain text.
//!
//! JSON is written by hand: values can have more digits than most JSON libraries support, and this
//! code runs once per increment. It only formats: the outcome is decided elsewhere.

use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use engine::key::CounterKey;
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderName, HeaderValue, RETRY_AFTER};
use hyper::{HeaderMap, StatusCode};

use crate::memory_budget::AnswerBody;
use crate::problem::{Kind, Problem, TYPE_PREFIX, outcome_name};
use crate::request::FailedItem;

/// An answer, complete before its first byte is sent.
pub type Response = hyper::Response<AnswerBody>;

const JSON: HeaderValue = HeaderValue::from_static("application/json");
pub(crate) const PROBLEM: &str = "application/problem+json";
const PLAIN: HeaderValue = HeaderValue::from_static("text/plain; charset=utf-8");
/// The number of values from which `Retry-After` is drawn at random, so that clients that were
/// refused at the same moment do not all return at the same moment.
const RETRY_SPREAD_S: u64 = 3;
static IDEMPOTENT_REPLAYED: HeaderName = HeaderName::from_static("idempotent-replayed");

/// The least time after which it is worth trying again.
fn retry_after(kind: Kind) -> Duration {
    Duration::from_secs(match kind {
        // An operator must free disk space, or a flush must.
        Kind::NoSpace => 5,
        // Idempotency records expire one by one, over minutes.
        Kind::Quota => 60,
        _ => 1,
    })
}

fn answer(status: StatusCode, content_type: HeaderValue, body: impl Into<Bytes>) -> Response {
    let mut response = Response::new(AnswerBody::new(body));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, content_type);
    response
}

/// The answer about one counter. Its beginning is written before the request goes to the batcher,
/// which takes the name of the counter.
pub struct CounterAnswer {
    body: Vec<u8>,
    form: ValueForm,
}

/// The form in which a value is written.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct ValueForm {
    /// A plain decimal number instead of JSON.
    pub plain: bool,
    /// In JSON also a string, for languages whose numbers have 53 bits.
    pub exact: bool,
}

impl CounterAnswer {
    /// Begins an answer with the namespace and the key.
    pub fn new(counter: &CounterKey, form: ValueForm) -> Self {
        let mut body = Vec::with_capacity(128);
        if !form.plain {
            body.extend_from_slice(b"{\"namespace\":\"");
            // A namespace has only characters that need no escape.
            body.extend_from_slice(counter.namespace());
            body.extend_from_slice(b"\",");
            put_key(&mut body, counter.key());
        }
        Self { body, form }
    }

    /// Begins the answer to a delete, which has the key but not the namespace.
    pub fn deleted(counter: &CounterKey, form: ValueForm) -> Self {
        let mut body = Vec::with_capacity(64);
        if !form.plain {
            body.push(b'{');
            put_key(&mut body, counter.key());
        }
        Self { body, form }
    }

    /// The answer to an increment by `applied`. `value` is the new value, if it was requested.
    pub fn incremented(mut self, applied: i64, value: Option<i128>) -> Response {
        if self.form.plain {
            return self.plain(value.unwrap_or(applied.into()));
        }
        self.member("applied", applied.into());
        if let Some(value) = value {
            put_value(&mut self.body, value, self.form.exact);
        }
        self.finish()
    }

    /// The answer to a read or a delete. `staleness_ms` is `Some` for bounded reads only.
    pub fn value(mut self, value: i128, staleness_ms: Option<u64>) -> Response {
        if self.form.plain {
            return self.plain(value);
        }
        put_value(&mut self.body, value, self.form.exact);
        if let Some(staleness_ms) = staleness_ms {
            self.member("staleness_ms", staleness_ms.into());
        }
        self.finish()
    }

    fn member(&mut self, name: &str, number: i128) {
        self.body.extend_from_slice(b",\"");
        self.body.extend_from_slice(name.as_bytes());
        self.body.extend_from_slice(b"\":");
        put_number(&mut self.body, number);
    }

    fn plain(mut self, number: i128) -> Response {
        put_number(&mut self.body, number);
        answer(StatusCode::OK, PLAIN, self.body)
    }

    fn finish(mut self) -> Response {
        self.body.push(b'}');
        answer(StatusCode::OK, JSON, self.body)
    }
}

/// The answer to a read of many counters, in the order of the keys. `staleness_ms` is `Some` for
/// bounded reads only.
pub fn values(
    keys: &[CounterKey],
    values: &[i128],
    exact: bool,
    staleness_ms: Option<u64>,
) -> Response {
    let mut body = b"{\"counters\":[".to_vec();
    for (place, (counter, &value)) in keys.iter().zip(values).enumerate() {
        body.extend_from_slice(if place == 0 { b"{" } else { b",{" });
        put_key(&mut body, counter.key());
        put_value(&mut body, value, exact);
        body.push(b'}');
    }
    body.push(b']');
    if let Some(staleness_ms) = staleness_ms {
        body.extend_from_slice(b",\"staleness_ms\":");
        put_number(&mut body, staleness_ms.into());
    }
    body.push(b'}');
    answer(StatusCode::OK, JSON, body)
}

/// The answer to a batch of `items`, of which those in `failed` were not applied. `failed` is in
/// the order of the items.
pub fn batch(items: usize, failed: &[FailedItem]) -> Response {
    if let Some(reason) = only_reason(items, failed) {
        // The mistake may differ from item to item.
        let failed = if reason.kind == Kind::BadInput { failed } else { &[] };
        let mut body = begin_problem(reason);
        body.extend_from_slice(b",\"accepted\":");
        let accepted = if reason.kind == Kind::BadInput { 0 } else { items };
        put_number(&mut body, accepted as i128);
        body.extend_from_slice(b",\"applied\":0");
        if !failed.is_empty() {
            body.push(b',');
            put_failed(&mut body, failed);
        }
        body.push(b'}');
        return finish_problem(reason, body);
    }
    let malformed = failed.iter().filter(|item| item.problem.kind == Kind::BadInput).count();
    let mut body = Vec::with_capacity(64 + 160 * failed.len());
    body.extend_from_slice(b"{\"accepted\":");
    put_number(&mut body, (items - malformed) as i128);
    body.extend_from_slice(b",\"applied\":");
    put_number(&mut body, (items - failed.len()) as i128);
    body.push(b',');
    put_failed(&mut body, failed);
    body.push(b'}');
    answer(StatusCode::OK, JSON, body)
}

/// The problem that all items failed with, if all did and it is the same kind and outcome.
pub fn only_reason(items: usize, failed: &[FailedItem]) -> Option<&Problem> {
    let first = &failed.first()?.problem;
    let same = |item: &FailedItem| {
        item.problem.kind == first.kind && item.problem.outcome == first.outcome
    };
    (failed.len() == items && failed.iter().all(same)).then_some(first)
}

fn put_failed(body: &mut Vec<u8>, failed: &[FailedItem]) {
    body.extend_from_slice(b"\"failed\":[");
    for (place, item) in failed.iter().enumerate() {
        body.extend_from_slice(if place == 0 { b"{\"index\":" } else { b",{\"index\":" });
        put_number(body, item.index.into());
        body.push(b',');
        if let Some(key) = &item.key {
            put_key(body, key);
            body.push(b',');
        }
        put_reason(body, &item.problem);
        body.push(b'}');
    }
    body.push(b']');
}

/// Marks an answer as that of an earlier request with the same idempotency key: nothing was applied
/// now.
pub fn replayed(mut response: Response) -> Response {
    response.headers_mut().insert(&IDEMPOTENT_REPLAYED, HeaderValue::from_static("true"));
    response
}

/// The answer to a request that failed (RFC 9457).
pub fn problem(problem: &Problem) -> Response {
    finish_problem(problem, problem_body(problem))
}

pub(crate) fn problem_body(problem: &Problem) -> Vec<u8> {
    let mut body = begin_problem(problem);
    body.push(b'}');
    body
}

fn begin_problem(problem: &Problem) -> Vec<u8> {
    let mut body = Vec::with_capacity(256);
    body.extend_from_slice(b"{\"title\":");
    put_text(&mut body, problem.kind.title());
    body.extend_from_slice(b",\"status\":");
    put_number(&mut body, problem.status.as_u16().into());
    body.push(b',');
    put_reason(&mut body, problem);
    body
}

fn finish_problem(problem: &Problem, body: Vec<u8>) -> Response {
    let mut response = answer(problem.status, HeaderValue::from_static(PROBLEM), body);
    add_headers(problem, response.headers_mut());
    response
}

fn add_headers(problem: &Problem, headers: &mut HeaderMap) {
    if problem.is_retryable() {
        let seconds = retry_after(problem.kind).as_secs() + fastrand::u64(..RETRY_SPREAD_S);
        headers.insert(RETRY_AFTER, seconds.into());
    }
    if let Some(allow) = problem.allow {
        headers.insert(ALLOW, HeaderValue::from_static(allow));
    }
}

/// Writes `type`, `outcome`, `detail` and, if there is one, `field`.
fn put_reason(body: &mut Vec<u8>, problem: &Problem) {
    body.extend_from_slice(b"\"type\":\"");
    body.extend_from_slice(TYPE_PREFIX.as_bytes());
    body.extend_from_slice(problem.kind.name().as_bytes());
    body.extend_from_slice(b"\",\"outcome\":\"");
    body.extend_from_slice(outcome_name(problem.outcome).as_bytes());
    body.extend_from_slice(b"\",\"detail\":");
    put_text(body, &problem.detail);
    if let Some(field) = &problem.field {
        body.extend_from_slice(b",\"field\":");
        put_text(body, field);
    }
}

/// The answer with a page: health, metrics, the cluster, the OpenAPI document.
pub fn page(status: StatusCode, content_type: &'static str, body: impl Into<Bytes>) -> Response {
    answer(status, HeaderValue::from_static(content_type), body)
}

fn put_text(body: &mut Vec<u8>, text: &str) {
    serde_json::to_writer(body, text).expect("a Vec takes every byte");
}

/// Writes `"key":"…"`, or `"key_base64":"…"` if the bytes are not UTF-8.
fn put_key(body: &mut Vec<u8>, key: &[u8]) {
    match str::from_utf8(key) {
        Ok(text) => {
            body.extend_from_slice(b"\"key\":");
            put_text(body, text);
        }
        Err(_) => {
            body.extend_from_slice(b"\"key_base64\":\"");
            body.extend_from_slice(BASE64.encode(key).as_bytes());
            body.push(b'"');
        }
    }
}

/// Writes `,"value":5` and, if `exact`, `,"value_string":"5"`.
fn put_value(body: &mut Vec<u8>, value: i128, exact: bool) {
    body.extend_from_slice(b",\"value\":");
    put_number(body, value);
    if exact {
        body.extend_from_slice(b",\"value_string\":\"");
        put_number(body, value);
        body.push(b'"');
    }
}

fn put_number(body: &mut Vec<u8>, number: i128) {
    use std::io::Write;
    // Most values fit into 64 bits, where division is several times as fast.
    let written = match i64::try_from(number) {
        Ok(small) => write!(body, "{small}"),
        Err(_) => write!(body, "{number}"),
    };
    written.expect("a Vec takes every byte");
}

#[cfg(test)]
mod tests {
    use engine::batcher::Outcome;
    use http_body_util::BodyExt;

    use super::*;

    fn counter(key: &[u8]) -> CounterKey {
        CounterKey::new(b"ns", key).unwrap()
    }

    fn text(response: Response) -> (u16, String, String) {
        let status = response.status().as_u16();
        let content_type = response.headers()[CONTENT_TYPE].to_str().unwrap().to_owned();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let body = runtime.block_on(response.into_body().collect()).unwrap().to_bytes();
        (status, content_type, String::from_utf8(body.to_vec()).unwrap())
    }

    #[track_caller]
    fn check(response: Response, want: &str) {
        let (status, content_type, body) = text(response);
        assert_eq!((status, content_type.as_str(), body.as_str()), (200, "application/json", want));
    }

    #[track_caller]
    fn check_plain(response: Response, want: &str) {
        let (status, content_type, body) = text(response);
        assert_eq!(
            (status, content_type.as_str(), body.as_str()),
            (200, "text/plain; charset=utf-8", want)
        );
    }

    #[test]
    fn one_counter() {
        let form = |plain| ValueForm { plain, exact: false };
        let answer = |plain| CounterAnswer::new(&counter(b"k"), form(plain));
        check(answer(false).incremented(5, None), r#"{"namespace":"ns","key":"k","applied":5}"#);
        check(
            answer(false).incremented(-5, Some(-7)),
            r#"{"namespace":"ns","key":"k","applied":-5,"value":-7}"#,
        );
        check(answer(false).value(105, None), r#"{"namespace":"ns","key":"k","value":105}"#);
        check(
            answer(false).value(0, Some(12)),
            r#"{"namespace":"ns","key":"k","value":0,"staleness_ms":12}"#,
        );
        check(
            CounterAnswer::deleted(&counter(b"k"), form(false)).value(9, None),
            r#"{"key":"k","value":9}"#,
        );
        check_plain(answer(true).incremented(5, None), "5");
        check_plain(answer(true).incremented(5, Some(12)), "12");
        check_plain(answer(true).value(-3, Some(1)), "-3");
        check_plain(CounterAnswer::deleted(&counter(b"k"), form(true)).value(9, None), "9");
    }

    #[test]
    fn values_have_any_size() {
        let big = i128::MAX;
        let answer = CounterAnswer::new(&counter(b"k"), ValueForm::default());
        check(answer.value(big, None), &format!(r#"{{"namespace":"ns","key":"k","value":{big}}}"#));
        let plain = ValueForm { plain: true, exact: true };
        let answer = CounterAnswer::new(&counter(b"k"), plain);
        check_plain(answer.value(i128::MIN, None), &i128::MIN.to_string());
        let exact = ValueForm { plain: false, exact: true };
        let least = i128::MIN;
        check(
            CounterAnswer::new(&counter(b"k"), exact).incremented(5, Some(least)),
            &format!(
                r#"{{"namespace":"ns","key":"k","applied":5,{}"value_string":"{least}"}}"#,
                format_args!("\"value\":{least},")
            ),
        );
        check(
            values(&[counter(b"k")], &[-7], true, Some(2)),
            r#"{"counters":[{"key":"k","value":-7,"value_string":"-7"}],"staleness_ms":2}"#,
        );
    }

    #[test]
    fn keys_are_text_or_base64() {
        let keys = [counter("é\"\n\0".as_bytes()), counter(b"\xff\x00")];
        check(
            values(&keys, &[1, i128::from(u64::MAX)], false, None),
            concat!(
                r#"{"counters":[{"key":"é\"\n\u0000","value":1},"#,
                r#"{"key_base64":"/wA=","value":18446744073709551615}]}"#
            ),
        );
        check(values(&[], &[], false, None), r#"{"counters":[]}"#);
        check(values(&[], &[], false, Some(7)), r#"{"counters":[],"staleness_ms":7}"#);
    }

    fn failed(index: u32, key: &[u8], problem: Problem) -> FailedItem {
        FailedItem { index, key: Some(key.to_vec()), problem }
    }

    #[test]
    fn batches() {
        check(batch(0, &[]), r#"{"accepted":0,"applied":0,"failed":[]}"#);
        check(batch(3, &[]), r#"{"accepted":3,"applied":3,"failed":[]}"#);
        let items = [
            failed(0, b"a", Problem::bad_input("delta", "is not a whole number")),
            failed(2, b"\xff", Problem::unknown(Kind::Deadline, "too late")),
        ];
        check(
            batch(3, &items),
            concat!(
                r#"{"accepted":2,"applied":1,"failed":[{"index":0,"key":"a","#,
                r#""type":"https://dkc.invalid/problems/bad-input","outcome":"not-applied","#,
                r#""detail":"is not a whole number","field":"delta"},"#,
                r#"{"index":2,"key_base64":"/w==","#,
                r#""type":"https://dkc.invalid/problems/deadline","outcome":"unknown","#,
                r#""detail":"too late"}]}"#
            ),
        );
        // All failed, but not for the same reason.
        assert_eq!(batch(2, &items).status(), 200);
    }

    #[test]
    fn a_batch_that_failed_for_one_reason_has_its_status() {
        let frozen = |index| failed(index, b"a", Problem::new(Kind::Frozen, "shard 3"));
        let response = batch(2, &[frozen(0), frozen(1)]);
        assert!(["1", "2", "3"].iter().any(|seconds| response.headers()[RETRY_AFTER] == seconds));
        let (status, content_type, body) = text(response);
        assert_eq!((status, content_type.as_str()), (503, "application/problem+json"));
        let want = concat!(
            r#"{"title":"Shard frozen","status":503,"#,
            r#""type":"https://dkc.invalid/problems/frozen","outcome":"not-applied","#,
            r#""detail":"shard 3","accepted":2,"applied":0}"#
        );
        assert_eq!(body, want);
        // A deadline can have either outcome, and the two may be retried differently.
        let late = |index, outcome| {
            failed(index, b"a", Problem { outcome, ..Problem::new(Kind::Deadline, "late") })
        };
        let unlike = [late(0, Outcome::Unknown), late(1, Outcome::NotApplied)];
        assert_eq!(batch(2, &unlike).status(), 200);
        let bad = [failed(0, b"a", Problem::bad_input("delta", "x"))];
        let (status, _, body) = text(batch(1, &bad));
        assert_eq!(status, 400);
        assert!(
            body.contains(r#""accepted":0,"applied":0,"failed":[{"index":0,"key":"a","#),
            "{body}"
        );
    }

    #[test]
    fn problems() {
        let bad = Problem::bad_input("delta", "is \"x\"");
        let (status, content_type, body) = text(problem(&bad));
        assert_eq!((status, content_type.as_str()), (400, "application/problem+json"));
        let want = concat!(
            r#"{"title":"Bad input","status":400,"#,
            r#""type":"https://dkc.invalid/problems/bad-input","outcome":"not-applied","#,
            r#""detail":"is \"x\"","field":"delta"}"#
        );
        assert_eq!(body, want);
        for kind in Kind::ALL {
            let example = Problem::new(kind, "");
            let has_it = problem(&example).headers().contains_key(RETRY_AFTER);
            assert_eq!(has_it, example.is_retryable(), "{kind:?}");
        }
        for (kind, least) in [(Kind::Overloaded, 1), (Kind::NoSpace, 5), (Kind::Quota, 60)] {
            let draw = |_| problem(&Problem::new(kind, "")).headers()[RETRY_AFTER].clone();
            let seconds: std::collections::BTreeSet<u64> =
                (0..200).map(draw).map(|drawn| drawn.to_str().unwrap().parse().unwrap()).collect();
            assert!(seconds.into_iter().eq(least..least + RETRY_SPREAD_S), "{kind:?}");
        }
        let allow = Problem { allow: Some("POST"), ..Problem::new(Kind::MethodNotAllowed, "") };
        assert_eq!(problem(&allow).headers()[ALLOW], "POST");
    }
}
