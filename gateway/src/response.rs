//! Outcomes → HTTP answers (DESIGN §12).
//!
//! JSON is written by hand: values can have more digits than most JSON libraries carry, and this runs once per
//! increment. What becomes of an answer is decided before; here it is only said.

use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use engine::key::CounterKey;
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderName, HeaderValue, RETRY_AFTER};
use hyper::{HeaderMap, StatusCode};

use crate::held::Answer;
use crate::problem::{Kind, Problem, TYPE_PREFIX};
use crate::request::FailedItem;

/// Every answer is whole before its first byte leaves.
pub type Response = hyper::Response<Answer>;

const JSON: HeaderValue = HeaderValue::from_static("application/json");
pub(crate) const PROBLEM: &str = "application/problem+json";
const PLAIN: HeaderValue = HeaderValue::from_static("text/plain; charset=utf-8");
/// All who were refused at once must not come back at once: they are told one of so many seconds, by chance.
const RETRY_SPREAD_S: u64 = 3;
static IDEMPOTENT_REPLAYED: HeaderName = HeaderName::from_static("idempotent-replayed");

/// After how many seconds trying again is worth it, at least.
fn retry_after(kind: Kind) -> Duration {
    Duration::from_secs(match kind {
        // Somebody has to make room.
        Kind::NoSpace => 5,
        // Tokens are forgotten by and by, for minutes.
        Kind::Quota => 60,
        _ => 1,
    })
}

fn answer(status: StatusCode, content_type: HeaderValue, body: impl Into<Bytes>) -> Response {
    let mut response = Response::new(Answer::new(body));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, content_type);
    response
}

/// The beginning of an answer about one counter, written while its name is still at hand: the machine takes it.
pub struct About {
    body: Vec<u8>,
    form: Form,
}

/// How a value is written.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Form {
    /// As a bare decimal, without a name.
    pub plain: bool,
    /// In JSON as a string too, for those whose numbers have 53 bits.
    pub exact: bool,
}

impl About {
    pub fn new(counter: &CounterKey, form: Form) -> Self {
        let mut body = Vec::with_capacity(128);
        if !form.plain {
            body.extend_from_slice(b"{\"namespace\":\"");
            // Letters that need no escape, as every namespace has.
            body.extend_from_slice(counter.namespace());
            body.extend_from_slice(b"\",");
            put_key(&mut body, counter.key());
        }
        Self { body, form }
    }

    /// About a counter that is 0 again: its answer does not repeat the namespace.
    pub fn deleted(counter: &CounterKey, form: Form) -> Self {
        let mut body = Vec::with_capacity(64);
        if !form.plain {
            body.push(b'{');
            put_key(&mut body, counter.key());
        }
        Self { body, form }
    }

    pub fn incremented(mut self, applied: i64, value: Option<i128>) -> Response {
        if self.form.plain {
            return self.bare(value.unwrap_or(applied.into()));
        }
        self.member("applied", applied.into());
        if let Some(value) = value {
            put_value(&mut self.body, value, self.form.exact);
        }
        self.finish()
    }

    /// `staleness_ms`: only where a bounded one was asked for.
    pub fn value(mut self, value: i128, staleness_ms: Option<u64>) -> Response {
        if self.form.plain {
            return self.bare(value);
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

    fn bare(mut self, number: i128) -> Response {
        put_number(&mut self.body, number);
        answer(StatusCode::OK, PLAIN, self.body)
    }

    fn finish(mut self) -> Response {
        self.body.push(b'}');
        answer(StatusCode::OK, JSON, self.body)
    }
}

/// Many values, in the order of the keys. `staleness_ms`: only where a bounded one was asked for.
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

/// A batch of `items`, all applied but those in `failed`, which is in the order of the items.
pub fn batch(items: usize, failed: &[FailedItem]) -> Response {
    if let Some(reason) = only_reason(items, failed) {
        // What is wrong differs from item to item.
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
    let not_understood = failed.iter().filter(|item| item.problem.kind == Kind::BadInput).count();
    let mut body = Vec::with_capacity(64 + 160 * failed.len());
    body.extend_from_slice(b"{\"accepted\":");
    put_number(&mut body, (items - not_understood) as i128);
    body.extend_from_slice(b",\"applied\":");
    put_number(&mut body, (items - failed.len()) as i128);
    body.push(b',');
    put_failed(&mut body, failed);
    body.push(b'}');
    answer(StatusCode::OK, JSON, body)
}

/// Why all of them failed, if there is one reason.
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

/// It tells of an earlier request with the same token: now nothing was done.
pub fn replayed(mut response: Response) -> Response {
    response.headers_mut().insert(&IDEMPOTENT_REPLAYED, HeaderValue::from_static("true"));
    response
}

/// RFC 9457.
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
    if problem.mends() {
        let seconds = retry_after(problem.kind).as_secs() + fastrand::u64(..RETRY_SPREAD_S);
        headers.insert(RETRY_AFTER, seconds.into());
    }
    if let Some(allow) = problem.allow {
        headers.insert(ALLOW, HeaderValue::from_static(allow));
    }
}

/// `type`, `outcome`, `detail` and, if there is one, `field`.
fn put_reason(body: &mut Vec<u8>, problem: &Problem) {
    body.extend_from_slice(b"\"type\":\"");
    body.extend_from_slice(TYPE_PREFIX.as_bytes());
    body.extend_from_slice(problem.kind.name().as_bytes());
    body.extend_from_slice(b"\",\"outcome\":\"");
    body.extend_from_slice(problem.outcome.name().as_bytes());
    body.extend_from_slice(b"\",\"detail\":");
    put_text(body, &problem.detail);
    if let Some(field) = &problem.field {
        body.extend_from_slice(b",\"field\":");
        put_text(body, field);
    }
}

/// Something else than a counter: health, metrics, the cluster.
pub fn page(status: StatusCode, content_type: &'static str, body: impl Into<Bytes>) -> Response {
    answer(status, HeaderValue::from_static(content_type), body)
}

fn put_text(body: &mut Vec<u8>, text: &str) {
    serde_json::to_writer(body, text).expect("a Vec takes every byte");
}

/// `"key":"…"`, or `"key_base64":"…"` when the bytes are not UTF-8.
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

/// `,"value":5` and, if it is wanted exact in every language, `,"value_string":"5"`.
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
    // Most values fit into a word, where division is several times as fast.
    let written = match i64::try_from(number) {
        Ok(small) => write!(body, "{small}"),
        Err(_) => write!(body, "{number}"),
    };
    written.expect("a Vec takes every byte");
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt;

    use super::*;
    use crate::problem::Outcome;

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
        let form = |plain| Form { plain, exact: false };
        let about = |plain| About::new(&counter(b"k"), form(plain));
        check(about(false).incremented(5, None), r#"{"namespace":"ns","key":"k","applied":5}"#);
        check(
            about(false).incremented(-5, Some(-7)),
            r#"{"namespace":"ns","key":"k","applied":-5,"value":-7}"#,
        );
        check(about(false).value(105, None), r#"{"namespace":"ns","key":"k","value":105}"#);
        check(
            about(false).value(0, Some(12)),
            r#"{"namespace":"ns","key":"k","value":0,"staleness_ms":12}"#,
        );
        check(
            About::deleted(&counter(b"k"), form(false)).value(9, None),
            r#"{"key":"k","value":9}"#,
        );
        check_plain(about(true).incremented(5, None), "5");
        check_plain(about(true).incremented(5, Some(12)), "12");
        check_plain(about(true).value(-3, Some(1)), "-3");
        check_plain(About::deleted(&counter(b"k"), form(true)).value(9, None), "9");
    }

    #[test]
    fn values_have_any_size() {
        let big = i128::MAX;
        let about = About::new(&counter(b"k"), Form::default());
        check(about.value(big, None), &format!(r#"{{"namespace":"ns","key":"k","value":{big}}}"#));
        let plain = Form { plain: true, exact: true };
        let about = About::new(&counter(b"k"), plain);
        check_plain(about.value(i128::MIN, None), &i128::MIN.to_string());
        let exact = Form { plain: false, exact: true };
        let least = i128::MIN;
        check(
            About::new(&counter(b"k"), exact).incremented(5, Some(least)),
            &format!(
                r#"{{"namespace":"ns","key":"k","applied":5,"value":{least},"value_string":"{least}"}}"#
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
            r#"{"counters":[{"key":"é\"\n\u0000","value":1},{"key_base64":"/wA=","value":18446744073709551615}]}"#,
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
            failed(0, b"a", Problem::bad_input("delta", "is no whole number")),
            failed(2, b"\xff", Problem::unknown(Kind::Deadline, "too late")),
        ];
        check(
            batch(3, &items),
            r#"{"accepted":2,"applied":1,"failed":[{"index":0,"key":"a","type":"https://dkc.invalid/problems/bad-input","outcome":"not-applied","detail":"is no whole number","field":"delta"},{"index":2,"key_base64":"/w==","type":"https://dkc.invalid/problems/deadline","outcome":"unknown","detail":"too late"}]}"#,
        );
        // All failed, but not for one reason.
        assert_eq!(batch(2, &items).status(), 200);
    }

    #[test]
    fn a_batch_that_failed_for_one_reason_has_its_status() {
        let frozen = |index| failed(index, b"a", Problem::new(Kind::Frozen, "shard 3"));
        let response = batch(2, &[frozen(0), frozen(1)]);
        assert!(["1", "2", "3"].iter().any(|seconds| response.headers()[RETRY_AFTER] == seconds));
        let (status, content_type, body) = text(response);
        assert_eq!((status, content_type.as_str()), (503, "application/problem+json"));
        let want = r#"{"title":"Shard frozen","status":503,"type":"https://dkc.invalid/problems/frozen","outcome":"not-applied","detail":"shard 3","accepted":2,"applied":0}"#;
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
        let told = Problem::bad_input("delta", "is \"x\"");
        let (status, content_type, body) = text(problem(&told));
        assert_eq!((status, content_type.as_str()), (400, "application/problem+json"));
        let want = r#"{"title":"Bad input","status":400,"type":"https://dkc.invalid/problems/bad-input","outcome":"not-applied","detail":"is \"x\"","field":"delta"}"#;
        assert_eq!(body, want);
        for kind in Kind::ALL {
            let told = Problem::new(kind, "");
            let response = problem(&told);
            assert_eq!(response.headers().contains_key(RETRY_AFTER), told.mends(), "{kind:?}");
        }
        for (kind, least) in [(Kind::Overloaded, 1), (Kind::NoSpace, 5), (Kind::Quota, 60)] {
            let told = |_| problem(&Problem::new(kind, "")).headers()[RETRY_AFTER].clone();
            let seconds: std::collections::BTreeSet<u64> =
                (0..200).map(told).map(|told| told.to_str().unwrap().parse().unwrap()).collect();
            assert!(seconds.into_iter().eq(least..least + RETRY_SPREAD_S), "{kind:?}");
        }
        let allow = Problem { allow: Some("POST"), ..Problem::new(Kind::MethodNotAllowed, "") };
        assert_eq!(problem(&allow).headers()[ALLOW], "POST");
    }
}
