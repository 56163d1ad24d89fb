//! What a gateway's answer means for the increments that were asked for (DESIGN §12).
//!
//! A newcomer would go by the status code. The `outcome` in the body decides: only an answer that
//! says `not-applied` in so many words may be retried without a token. An answer without an outcome is not a
//! gateway's but that of a proxy, or of whatever else listens there. Where its status says that the request was turned
//! away (3xx, 4xx, 501, 505) nothing was applied. Anything else that can't be understood, from a proxy's 502 to counts
//! that don't add up, is unknown: guessing could count twice.

use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use bench::http::Response;
use serde::{Deserialize, Serialize};

/// Why something was not done, and whether it may have been.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Refusal {
    /// Nothing happened, and nothing would if it were asked again.
    Never(String),
    /// Nothing happened; it may work later, not before `after`.
    Later { why: String, after: Option<Duration> },
    /// It may or may not have happened. With the same token it may be asked again.
    Unknown(String),
    /// Its token is too old: nothing happened now, and whether it did earlier is no longer known.
    TooOld(String),
    /// Nothing happened: the request has more bytes than a gateway, or a proxy before it, takes.
    TooLarge(String),
    /// Nothing happened: no gateway got the request.
    NoGateway(String),
}

impl Refusal {
    /// There is no room for the token's record: there will be, as others are forgotten.
    pub(crate) fn is_quota(&self) -> bool {
        matches!(self, Self::Later { why, .. } if why.starts_with("quota"))
    }

    pub(crate) fn why(&self) -> &str {
        match self {
            Self::Never(why) | Self::Later { why, .. } | Self::Unknown(why) => why,
            Self::TooOld(why) | Self::TooLarge(why) | Self::NoGateway(why) => why,
        }
    }
}

/// An error answer, or one failed item of a batch.
#[derive(Debug, Default, Deserialize)]
struct Problem {
    #[serde(default, rename = "type")]
    kind: String,
    #[serde(default)]
    outcome: String,
    #[serde(default)]
    detail: Option<String>,
    #[serde(default)]
    title: Option<String>,
}

impl Problem {
    /// Whether a gateway said it: each of its problems has an outcome.
    fn is_ours(&self) -> bool {
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

    fn refusal(&self, mends: bool, after: Option<Duration>) -> Refusal {
        match self.outcome.as_str() {
            "not-applied" if mends => Refusal::Later { why: self.why(), after },
            "not-applied" => Refusal::Never(self.why()),
            _ if self.kind() == "token-too-old" => Refusal::TooOld(self.why()),
            _ => Refusal::Unknown(self.why()),
        }
    }
}

/// What an answer other than 200 says about everything that was asked.
pub(crate) fn refusal(response: &Response) -> Refusal {
    match serde_json::from_slice::<Problem>(&response.body) {
        Ok(problem) if problem.is_ours() => {
            match problem.refusal(matches!(response.status, 429 | 503), response.retry_after) {
                Refusal::Never(why) if response.status == 413 => Refusal::TooLarge(why),
                refusal => refusal,
            }
        }
        _ => stranger(response),
    }
}

/// What the answer of something that is no gateway says.
fn stranger(response: &Response) -> Refusal {
    let why = no_gateway(response);
    match response.status {
        413 => Refusal::TooLarge(why),
        // A proxy's own limits of time and rate: it passed nothing on.
        408 | 425 | 429 => Refusal::Later { why, after: response.retry_after },
        300..=499 | 501 | 505 => Refusal::NoGateway(why),
        _ => Refusal::Unknown(why),
    }
}

fn no_gateway(response: &Response) -> String {
    let Response { from, status, content_type, location, .. } = response;
    let content_type = content_type.as_deref().unwrap_or("without a Content-Type");
    let location = location.as_ref().map(|to| format!(", Location: {to}")).unwrap_or_default();
    format!("{from} is no dkc gateway: {status}, {content_type}{location}")
}

/// The body of a 200.
fn read<'a, T: Deserialize<'a>>(response: &'a Response) -> Result<T, Refusal> {
    serde_json::from_slice(&response.body)
        .map_err(|error| Refusal::Unknown(format!("{}: {error}", no_gateway(response))))
}

#[derive(Debug, Deserialize)]
struct BatchAnswer {
    applied: u64,
    failed: Vec<FailedItem>,
}

#[derive(Debug, Deserialize)]
struct FailedItem {
    index: usize,
    #[serde(flatten)]
    problem: Problem,
}

/// What a batch of `items` came to: the items that were not applied, each with its reason.
/// Every other item was.
pub(crate) fn failed_items(
    response: &Response,
    items: usize,
) -> Result<Vec<(usize, Refusal)>, Refusal> {
    if response.status != 200 {
        return Err(refusal(response));
    }
    let answer: BatchAnswer = read(response)?;
    let mut seen = vec![false; items];
    let mut failed = Vec::with_capacity(answer.failed.len());
    for item in &answer.failed {
        match seen.get_mut(item.index) {
            Some(seen) if !*seen => *seen = true,
            _ => return Err(Refusal::Unknown(format!("item {} makes no sense", item.index))),
        }
        let mends = !matches!(item.problem.kind(), "bad-input" | "too-large" | "token-reused");
        failed.push((item.index, item.problem.refusal(mends, None)));
    }
    if answer.applied != (items - failed.len()) as u64 {
        let (applied, failed) = (answer.applied, failed.len());
        let why = format!("{applied} applied and {failed} failed of {items} do not add up");
        return Err(Refusal::Unknown(why));
    }
    Ok(failed)
}

/// A key in JSON: text when its bytes are UTF-8, else base64.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub(crate) enum KeyField {
    #[serde(rename = "key")]
    Text(String),
    #[serde(rename = "key_base64")]
    Base64(String),
}

impl KeyField {
    pub(crate) fn new(key: &[u8]) -> Self {
        match std::str::from_utf8(key) {
            Ok(text) => Self::Text(text.to_owned()),
            Err(_) => Self::Base64(BASE64.encode(key)),
        }
    }
}

/// One counter as a gateway tells it.
#[derive(Debug, Deserialize, Serialize)]
pub(crate) struct Counter {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) key: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) key_base64: Option<String>,
    pub(crate) value: i128,
}

/// The body of an answer that carries a value.
pub(crate) fn parse<'a, T: Deserialize<'a>>(response: &'a Response) -> Result<T, Refusal> {
    if response.status != 200 {
        return Err(refusal(response));
    }
    read(response)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn response(status: u16, body: &str) -> Response {
        let from = "gw:80".to_owned();
        Response { status, from, body: body.as_bytes().to_vec(), ..Response::default() }
    }

    #[track_caller]
    fn check(status: u16, body: &str, want: Result<Vec<(usize, Refusal)>, Refusal>) {
        assert_eq!(failed_items(&response(status, body), 3), want);
    }

    fn unknown(why: &str) -> Refusal {
        Refusal::Unknown(why.to_owned())
    }

    fn later(why: &str) -> Refusal {
        Refusal::Later { why: why.to_owned(), after: None }
    }

    #[test]
    fn batches() {
        check(200, r#"{"accepted":3,"applied":3,"failed":[]}"#, Ok(vec![]));
        check(
            200,
            r#"{"accepted":2,"applied":1,"failed":[
                {"index":2,"key":"c","type":"https://dkc/problems/frozen","outcome":"not-applied","detail":"shard 3"},
                {"index":0,"key":"a","type":"deadline","outcome":"unknown"}]}"#,
            Ok(vec![(2, later("frozen: shard 3")), (0, unknown("deadline"))]),
        );
        check(
            200,
            r#"{"accepted":2,"applied":2,"failed":[{"index":1,"type":"x/bad-input","outcome":"not-applied"}]}"#,
            Ok(vec![(1, Refusal::Never("bad-input".to_owned()))]),
        );
    }

    #[test]
    fn whole_answers() {
        let body = r#"{"type":"x/no-primary","title":"No primary","outcome":"not-applied"}"#;
        check(503, body, Err(later("no-primary: No primary")));
        check(429, body, Err(later("no-primary: No primary")));
        check(400, body, Err(Refusal::Never("no-primary: No primary".to_owned())));
        check(504, r#"{"type":"x/deadline","outcome":"unknown"}"#, Err(unknown("deadline")));
        let body = r#"{"type":"x/token-too-old","outcome":"unknown"}"#;
        check(410, body, Err(Refusal::TooOld("token-too-old".to_owned())));
        check(
            422,
            r#"{"type":"x/token-reused","outcome":"not-applied"}"#,
            Err(Refusal::Never("token-reused".to_owned())),
        );
    }

    #[test]
    fn what_is_not_understood_is_unknown() {
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
            Err(unknown("item 1 makes no sense")),
        );
        check(
            200,
            r#"{"applied":2,"failed":[{"index":3,"outcome":"not-applied"}]}"#,
            Err(unknown("item 3 makes no sense")),
        );
        assert!(matches!(failed_items(&response(200, "{"), 3), Err(Refusal::Unknown(_))));
    }

    /// Web servers, proxies and other services on the port: what their status says, and their name.
    #[test]
    fn answers_of_strangers() {
        #[track_caller]
        fn check(status: u16, body: &str, want: impl Fn(String) -> Refusal) {
            let why = format!("gw:80 is no dkc gateway: {status}, text/html");
            let content_type = Some("text/html".to_owned());
            let response = Response { content_type, ..response(status, body) };
            assert_eq!(failed_items(&response, 3), Err(want(why)), "{status} {body}");
        }
        for body in ["<html>", "", "{}", r#"{"type":"x/frozen"}"#, r#"{"outcome":"fine"}"#] {
            for status in
                [300, 301, 302, 307, 308, 400, 401, 403, 404, 405, 410, 451, 499, 501, 505]
            {
                check(status, body, Refusal::NoGateway);
            }
            for status in [201, 500, 502, 503, 504, 520, 599] {
                check(status, body, Refusal::Unknown);
            }
            for status in [408, 425, 429] {
                check(status, body, |why| Refusal::Later { why, after: None });
            }
            check(413, body, Refusal::TooLarge);
        }
        for body in ["<html>", "", "{}", r#"{"status":"ok"}"#] {
            let Err(Refusal::Unknown(why)) = failed_items(&response(200, body), 3) else {
                panic!("{body} is taken for an answer")
            };
            assert!(why.starts_with("gw:80 is no dkc gateway: 200, "), "{why}");
        }
        let moved =
            Response { location: Some("https://gw/".to_owned()), ..response(301, "<html>") };
        let why = "gw:80 is no dkc gateway: 301, without a Content-Type, Location: https://gw/";
        assert_eq!(refusal(&moved), Refusal::NoGateway(why.to_owned()));
    }

    #[test]
    fn a_gateway_s_own_limit_of_bytes() {
        let body = r#"{"type":"x/too-large","outcome":"not-applied"}"#;
        check(413, body, Err(Refusal::TooLarge("too-large".to_owned())));
    }

    #[test]
    fn an_answer_without_a_value_is_none() {
        let body = r#"{"type":"x/no-primary","title":"No primary","outcome":"not-applied"}"#;
        let refused = parse::<Counter>(&response(503, body)).unwrap_err();
        assert_eq!(refused, later("no-primary: No primary"));
        let unread = parse::<Counter>(&response(200, "<html>")).unwrap_err();
        assert!(unread.why().contains("is no dkc gateway: 200"), "{unread:?}");
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
