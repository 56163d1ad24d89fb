//! The meaning of a gateway's answer for the requested increments (docs/http.md).
//!
//! The `outcome` in the body decides, not the status code: only an answer with the outcome
//! `not-applied` may be retried without a token. An answer without an outcome does not come from a
//! gateway but from a proxy or another server. If its status means that the request was rejected
//! (3xx, 4xx, 501, 505), nothing was applied. Every other answer that cannot be interpreted, from a
//! proxy's 502 to numbers that do not add up, is unknown: guessing could count twice.

use std::fmt;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::{Deserialize, Serialize};

use crate::http::HttpResponse;

/// The reason why a request failed, which implies whether it may have been applied nevertheless.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum CallFailure {
    /// The request was not applied, and a retry would be rejected, too.
    Permanent(String),
    /// The request was not applied, and a retry may succeed.
    Retryable {
        /// The reason, for users.
        why: String,
        /// The `Retry-After` of the answer: a retry before it is of no use.
        after: Option<Duration>,
    },
    /// The outcome is unknown. The request may be sent again under the same token.
    Unknown(String),
    /// The token is too old: this send was not applied, and the outcome of earlier sends is no
    /// longer known.
    TokenTooOld(String),
    /// The request was not applied: the gateway, or a proxy before it, accepts fewer bytes.
    TooLarge(String),
    /// The request was not applied: no gateway received it.
    NotAGateway(String),
}

impl CallFailure {
    /// Returns whether the shard had no room for the token's record. There is room again when older
    /// records expire.
    pub fn is_quota(&self) -> bool {
        matches!(self, Self::Retryable { why, .. } if why.starts_with("quota"))
    }

    /// The reason, for users.
    pub fn why(&self) -> &str {
        match self {
            Self::Permanent(why) | Self::Retryable { why, .. } | Self::Unknown(why) => why,
            Self::TokenTooOld(why) | Self::TooLarge(why) | Self::NotAGateway(why) => why,
        }
    }
}

impl fmt::Display for CallFailure {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.why())
    }
}

impl std::error::Error for CallFailure {}

/// The body of an error answer, or one failed item of a batch.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct ProblemBody {
    #[serde(rename = "type")]
    kind: String,
    outcome: String,
    detail: Option<String>,
    title: Option<String>,
}

impl ProblemBody {
    /// Returns whether a gateway sent it: each problem of a gateway has an outcome.
    fn is_from_gateway(&self) -> bool {
        matches!(self.outcome.as_str(), "not-applied" | "unknown")
    }

    /// The last part of the problem's URI.
    fn kind(&self) -> &str {
        self.kind.rsplit('/').next().unwrap_or_default()
    }

    fn why(&self) -> String {
        let text = self.detail.as_deref().or(self.title.as_deref()).unwrap_or_default();
        match (self.kind(), text) {
            ("", "") => "no reason given".to_owned(),
            (kind, "") => kind.to_owned(),
            ("", text) => text.to_owned(),
            (kind, text) => format!("{kind}: {text}"),
        }
    }

    fn failure(&self, is_temporary: bool, after: Option<Duration>) -> CallFailure {
        match self.outcome.as_str() {
            "not-applied" if is_temporary => CallFailure::Retryable { why: self.why(), after },
            "not-applied" => CallFailure::Permanent(self.why()),
            _ if self.kind() == "token-too-old" => CallFailure::TokenTooOld(self.why()),
            _ => CallFailure::Unknown(self.why()),
        }
    }
}

/// Interprets an answer other than 200, which concerns the whole request.
pub fn failure(response: &HttpResponse) -> CallFailure {
    match serde_json::from_slice::<ProblemBody>(&response.body) {
        Ok(problem) if problem.is_from_gateway() => {
            match problem.failure(matches!(response.status, 429 | 503), response.retry_after) {
                CallFailure::Permanent(why) if response.status == 413 => CallFailure::TooLarge(why),
                failure => failure,
            }
        }
        _ => foreign_answer(response),
    }
}

/// Interprets an answer that does not come from a gateway.
fn foreign_answer(response: &HttpResponse) -> CallFailure {
    let why = not_a_gateway(response);
    match response.status {
        413 => CallFailure::TooLarge(why),
        // A proxy's own limits of time and rate: it did not forward the request.
        408 | 425 | 429 => CallFailure::Retryable { why, after: response.retry_after },
        300..=499 | 501 | 505 => CallFailure::NotAGateway(why),
        _ => CallFailure::Unknown(why),
    }
}

fn not_a_gateway(response: &HttpResponse) -> String {
    let HttpResponse { from, status, content_type, location, .. } = response;
    let content_type = content_type.as_deref().unwrap_or("without a Content-Type");
    let location = location.as_ref().map(|to| format!(", Location: {to}")).unwrap_or_default();
    format!("{from} is not a dkc gateway: {status}, {content_type}{location}")
}

/// Parses the body of a 200.
fn read<'a, T: Deserialize<'a>>(response: &'a HttpResponse) -> Result<T, CallFailure> {
    serde_json::from_slice(&response.body)
        .map_err(|error| CallFailure::Unknown(format!("{}: {error}", not_a_gateway(response))))
}

/// The body of the answer to a batch.
#[derive(Debug, Deserialize)]
struct BatchAnswer {
    applied: u64,
    failed: Vec<RejectedItem>,
}

/// An item that was not applied, with the reason.
#[derive(Debug, Deserialize)]
struct RejectedItem {
    index: usize,
    #[serde(flatten)]
    problem: ProblemBody,
}

/// Interprets the answer to a batch of `items`: returns the items that were not applied, each with
/// its reason. Every other item was applied.
pub fn failed_items(
    response: &HttpResponse,
    items: usize,
) -> Result<Vec<(usize, CallFailure)>, CallFailure> {
    if response.status != 200 {
        return Err(failure(response));
    }
    let answer: BatchAnswer = read(response)?;
    let mut seen = vec![false; items];
    let mut failed = Vec::with_capacity(answer.failed.len());
    for item in &answer.failed {
        match seen.get_mut(item.index) {
            Some(seen) if !*seen => *seen = true,
            _ => {
                return Err(CallFailure::Unknown(format!(
                    "invalid item index {} in the answer",
                    item.index
                )));
            }
        }
        let is_temporary =
            !matches!(item.problem.kind(), "bad-input" | "too-large" | "token-reused");
        failed.push((item.index, item.problem.failure(is_temporary, None)));
    }
    if answer.applied != (items - failed.len()) as u64 {
        let (applied, failed) = (answer.applied, failed.len());
        let why = format!("{applied} applied and {failed} failed of {items} do not add up");
        return Err(CallFailure::Unknown(why));
    }
    Ok(failed)
}

/// A key in JSON: text if its bytes are UTF-8, otherwise base64.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub enum KeyField {
    /// A key that is UTF-8.
    #[serde(rename = "key")]
    Text(String),
    /// The base64 of a key that is not UTF-8.
    #[serde(rename = "key_base64")]
    Base64(String),
}

impl KeyField {
    /// Encodes a key.
    pub fn new(key: &[u8]) -> Self {
        match std::str::from_utf8(key) {
            Ok(text) => Self::Text(text.to_owned()),
            Err(_) => Self::Base64(BASE64.encode(key)),
        }
    }
}

/// One counter in a gateway's answer.
#[derive(Debug, Deserialize, Serialize)]
pub struct Counter {
    /// The key, if it is UTF-8.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// The base64 of the key, if it is not UTF-8.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key_base64: Option<String>,
    /// The value.
    pub value: i128,
}

/// Parses the body of an answer, which is a failure if its status is not 200.
pub fn parse<'a, T: Deserialize<'a>>(response: &'a HttpResponse) -> Result<T, CallFailure> {
    if response.status != 200 {
        return Err(failure(response));
    }
    read(response)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn response(status: u16, body: &str) -> HttpResponse {
        let from = "gw:80".to_owned();
        HttpResponse { status, from, body: body.as_bytes().to_vec(), ..HttpResponse::default() }
    }

    #[track_caller]
    fn check(status: u16, body: &str, want: Result<Vec<(usize, CallFailure)>, CallFailure>) {
        assert_eq!(failed_items(&response(status, body), 3), want);
    }

    fn unknown(why: &str) -> CallFailure {
        CallFailure::Unknown(why.to_owned())
    }

    fn later(why: &str) -> CallFailure {
        CallFailure::Retryable { why: why.to_owned(), after: None }
    }

    #[test]
    fn batches() {
        check(200, r#"{"accepted":3,"applied":3,"failed":[]}"#, Ok(vec![]));
        check(
            200,
            r#"{"accepted":2,"applied":1,"failed":[
                {"index":2,"key":"c","type":"https://dkc/problems/frozen","outcome":"not-applied",
                 "detail":"shard 3"},
                {"index":0,"key":"a","type":"deadline","outcome":"unknown"}]}"#,
            Ok(vec![(2, later("frozen: shard 3")), (0, unknown("deadline"))]),
        );
        check(
            200,
            r#"{"accepted":2,"applied":2,"failed":[
                {"index":1,"type":"x/bad-input","outcome":"not-applied"}]}"#,
            Ok(vec![(1, CallFailure::Permanent("bad-input".to_owned()))]),
        );
    }

    #[test]
    fn whole_answers() {
        let body = r#"{"type":"x/no-primary","title":"No primary","outcome":"not-applied"}"#;
        check(503, body, Err(later("no-primary: No primary")));
        check(429, body, Err(later("no-primary: No primary")));
        check(400, body, Err(CallFailure::Permanent("no-primary: No primary".to_owned())));
        check(504, r#"{"type":"x/deadline","outcome":"unknown"}"#, Err(unknown("deadline")));
        let body = r#"{"type":"x/token-too-old","outcome":"unknown"}"#;
        check(410, body, Err(CallFailure::TokenTooOld("token-too-old".to_owned())));
        check(
            422,
            r#"{"type":"x/token-reused","outcome":"not-applied"}"#,
            Err(CallFailure::Permanent("token-reused".to_owned())),
        );
    }

    #[test]
    fn answers_that_cannot_be_interpreted_are_unknown() {
        check(503, r#"{"type":"x/y","outcome":"unknown"}"#, Err(unknown("y")));
        check(
            200,
            r#"{"applied":2,"failed":[]}"#,
            Err(unknown("2 applied and 0 failed of 3 do not add up")),
        );
        let item = r#"{"index":1,"outcome":"not-applied"}"#;
        check(
            200,
            &format!(r#"{{"applied":1,"failed":[{item},{item}]}}"#),
            Err(unknown("invalid item index 1 in the answer")),
        );
        check(
            200,
            r#"{"applied":2,"failed":[{"index":3,"outcome":"not-applied"}]}"#,
            Err(unknown("invalid item index 3 in the answer")),
        );
        assert!(matches!(failed_items(&response(200, "{"), 3), Err(CallFailure::Unknown(_))));
    }

    /// Web servers, proxies and other services: the status decides, and the reason names the
    /// server.
    #[test]
    fn answers_of_other_servers() {
        #[track_caller]
        fn check(status: u16, body: &str, want: impl Fn(String) -> CallFailure) {
            let why = format!("gw:80 is not a dkc gateway: {status}, text/html");
            let content_type = Some("text/html".to_owned());
            let response = HttpResponse { content_type, ..response(status, body) };
            assert_eq!(failed_items(&response, 3), Err(want(why)), "{status} {body}");
        }
        for body in ["<html>", "", "{}", r#"{"type":"x/frozen"}"#, r#"{"outcome":"fine"}"#] {
            for status in
                [300, 301, 302, 307, 308, 400, 401, 403, 404, 405, 410, 451, 499, 501, 505]
            {
                check(status, body, CallFailure::NotAGateway);
            }
            for status in [201, 500, 502, 503, 504, 520, 599] {
                check(status, body, CallFailure::Unknown);
            }
            for status in [408, 425, 429] {
                check(status, body, |why| CallFailure::Retryable { why, after: None });
            }
            check(413, body, CallFailure::TooLarge);
        }
        for body in ["<html>", "", "{}", r#"{"status":"ok"}"#] {
            let Err(CallFailure::Unknown(why)) = failed_items(&response(200, body), 3) else {
                panic!("{body} is taken for an answer")
            };
            assert!(why.starts_with("gw:80 is not a dkc gateway: 200, "), "{why}");
        }
        let moved =
            HttpResponse { location: Some("https://gw/".to_owned()), ..response(301, "<html>") };
        let why = "gw:80 is not a dkc gateway: 301, without a Content-Type, Location: https://gw/";
        assert_eq!(failure(&moved), CallFailure::NotAGateway(why.to_owned()));
    }

    #[test]
    fn a_gateway_s_own_limit_of_bytes() {
        let body = r#"{"type":"x/too-large","outcome":"not-applied"}"#;
        check(413, body, Err(CallFailure::TooLarge("too-large".to_owned())));
    }

    #[test]
    fn an_error_answer_has_no_value() {
        let body = r#"{"type":"x/no-primary","title":"No primary","outcome":"not-applied"}"#;
        let refused = parse::<Counter>(&response(503, body)).unwrap_err();
        assert_eq!(refused, later("no-primary: No primary"));
        let unread = parse::<Counter>(&response(200, "<html>")).unwrap_err();
        assert!(unread.why().contains("is not a dkc gateway: 200"), "{unread:?}");
    }

    #[test]
    fn keys() {
        #[track_caller]
        fn check(key: &[u8], want: &str) {
            assert_eq!(serde_json::to_string(&KeyField::new(key)).unwrap(), want);
        }
        check(b"word", r#"{"key":"word"}"#);
        check(b"a\t5", r#"{"key":"a\t5"}"#);
        check(b"\xff\x00", r#"{"key_base64":"/wA="}"#);
    }

    #[test]
    fn values_beyond_64_bits() {
        let big = i128::MAX;
        let response = response(200, &format!(r#"{{"key":"a","value":{big}}}"#));
        assert_eq!(parse::<Counter>(&response).unwrap().value, big);
    }
}
