//! Calls to a cluster that may have several gateways.
//!
//! All gateways are equivalent. A read may be sent to the next gateway at any time
//! ([`Gateways::read`]); so may a write, because it has an idempotency token ([`Gateways::write`]).

use std::fs::File;
use std::io::{self, Read};
use std::time::{Duration, Instant};

use bench::http::{
    CallError, HttpConnection, HttpRequest, HttpResponse, IdempotencyHeaders, Media, Url,
};

use crate::answer::{self, CallFailure};
use crate::output;

/// The deadline that a command with one request gives the gateway.
pub(crate) const DEADLINE: Duration = Duration::from_secs(5);
/// The client waits this much longer than the gateway's deadline: the gateway knows the outcome and
/// the client does not, so the gateway's answer should come before the client's time-out.
pub(crate) const GRACE: Duration = Duration::from_secs(5);
/// A command that has waited this long for an answer prints what it waits for.
pub(crate) const NOTICE_AFTER: Duration = Duration::from_secs(1);
/// The pause between two rounds through all gateways.
const AGAIN_AFTER: Duration = Duration::from_millis(200);

/// Options of the client commands: the gateways and the output format.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct ServerArgs {
    /// URLs of the cluster's gateways
    #[arg(
        long = "url",
        env = "DKC_URL",
        value_name = "URL[,URL…]",
        value_delimiter = ',',
        default_value = "http://127.0.0.1:8080",
        value_parser = Url::parse
    )]
    pub(crate) urls: Vec<Url>,
    /// Print the result as one line of JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// The gateways of one cluster.
pub(crate) struct Gateways {
    connections: Vec<HttpConnection>,
}

impl Gateways {
    /// Creates clients for these gateways; no connection is opened yet.
    pub(crate) fn new(urls: &[Url]) -> Self {
        Self { connections: urls.iter().cloned().map(HttpConnection::new).collect() }
    }

    /// Sends a read to each gateway in turn until one answers 200. If none does, returns the answer
    /// or the error of the last one.
    pub(crate) async fn read(
        &mut self,
        path: &str,
        json: Option<&[u8]>,
        deadline: Duration,
    ) -> Result<HttpResponse, CallFailure> {
        let mut result = Err(CallFailure::Permanent("no URL given".to_owned()));
        for connection in &mut self.connections {
            let request = match json {
                Some(json) => {
                    HttpRequest::post(connection.url(), path, deadline, Media::Json, json)
                }
                None => HttpRequest::get(connection.url(), path, deadline),
            };
            let answer = connection.call(&request, deadline + GRACE).await;
            result = answer.map_err(|error| unanswered(connection.url(), &error));
            if matches!(&result, Ok(response) if response.status == 200) {
                break;
            }
        }
        result
    }

    /// Sends a write under one token until its outcome is known, for at most `give_up`. A rejection
    /// while no earlier send is in doubt is final, except that of a full token quota: there is room
    /// again when older tokens expire.
    pub(crate) async fn write(
        &mut self,
        path: &str,
        token: &IdempotencyHeaders,
        json: &[u8],
        give_up: Duration,
    ) -> Result<HttpResponse, CallFailure> {
        let begun = Instant::now();
        // The reason why an earlier send may have been applied.
        let mut doubt = None;
        loop {
            let mut failure = CallFailure::Permanent("no URL given".to_owned());
            for connection in &mut self.connections {
                let url = connection.url().clone();
                let request =
                    HttpRequest::post_once(&url, path, DEADLINE, Media::Json, token, json);
                let answer = connection.call(&request, DEADLINE + GRACE).await;
                let was_answered = answer.is_ok();
                failure = match answer {
                    Ok(response) if response.status == 200 => return Ok(response),
                    Ok(response) => answer::failure(&response),
                    Err(error) => unanswered(&url, &error),
                };
                match &failure {
                    CallFailure::Unknown(why) => doubt = Some(why.clone()),
                    // The next URL may be a gateway.
                    CallFailure::NotAGateway(_) => {}
                    _ if was_answered => break,
                    _ => {}
                }
            }
            let goes_on = doubt.is_some() || failure.is_quota();
            if !goes_on
                || begun.elapsed() >= give_up
                || matches!(failure, CallFailure::TokenTooOld(_))
            {
                return Err(doubt.map_or(failure, CallFailure::Unknown));
            }
            tokio::time::sleep(AGAIN_AFTER).await;
        }
    }
}

/// Classifies a call without an answer.
pub(crate) fn unanswered(url: &Url, error: &CallError) -> CallFailure {
    match error {
        CallError::NotSent(_) => {
            CallFailure::Retryable { why: format!("{url}: {error}"), after: None }
        }
        CallError::Unanswered(_) => CallFailure::Unknown(format!("{url}: {error}")),
        CallError::NoHttp => {
            CallFailure::NotAGateway(format!("{} is not a dkc gateway: {error}", url.authority()))
        }
    }
}

/// Waits for `work`. If that takes long, a line on stderr names the gateways that have not
/// answered.
pub(crate) async fn with_notice<T>(urls: &[Url], until: &str, work: impl Future<Output = T>) -> T {
    tokio::pin!(work);
    if let Ok(done) = tokio::time::timeout(NOTICE_AFTER, &mut work).await {
        return done;
    }
    output::note(&format!("no answer yet from {}: waiting {until}", names(urls)));
    work.await
}

/// The gateways' URLs as the user gave them.
pub(crate) fn names(urls: &[Url]) -> String {
    urls.iter().map(Url::to_string).collect::<Vec<_>>().join(", ")
}

/// Returns 128 random bits in hex, which make a token unique.
pub(crate) fn fresh_id() -> io::Result<String> {
    let mut bytes = [0; 16];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(format!("{:032x}", u128::from_le_bytes(bytes)))
}

/// Checks a namespace before any request is sent.
pub(crate) fn namespace(text: &str) -> Result<String, String> {
    let allowed = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'_' | b'.' | b'-');
    if (1..=64).contains(&text.len()) && text.bytes().all(allowed) {
        Ok(text.to_owned())
    } else {
        Err("a namespace is 1 to 64 of a-z 0-9 _ . -".to_owned())
    }
}

/// The longest key, in bytes.
pub(crate) const KEY_BYTES_MAX: usize = 1024;

/// Parses a key from the command line: any bytes, or percent-encoded.
pub(crate) fn key(text: std::ffi::OsString, is_percent: bool) -> Result<Vec<u8>, String> {
    use std::os::unix::ffi::OsStringExt;
    let mut key = text.into_vec();
    if is_percent {
        key = percent_decode(&key).ok_or_else(|| {
            let text = String::from_utf8_lossy(&key);
            format!("{text:?} is not percent-encoded: each % must be followed by two hex digits")
        })?;
    }
    if (1..=KEY_BYTES_MAX).contains(&key.len()) {
        Ok(key)
    } else {
        Err(format!("a key is 1 to {KEY_BYTES_MAX} bytes, this one has {}", key.len()))
    }
}

/// Percent-encodes a key for one line of text: `%` itself, control characters and bytes that are
/// not UTF-8 are escaped. [`key`] decodes the result.
pub(crate) fn shown(key: &[u8]) -> String {
    let mut text = String::with_capacity(key.len());
    let escape = |text: &mut String, bytes: &[u8]| {
        bytes.iter().for_each(|byte| text.push_str(&format!("%{byte:02X}")));
    };
    for chunk in key.utf8_chunks() {
        for letter in chunk.valid().chars() {
            if letter == '%' || letter.is_control() {
                escape(&mut text, letter.encode_utf8(&mut [0; 4]).as_bytes());
            } else {
                text.push(letter);
            }
        }
        escape(&mut text, chunk.invalid());
    }
    text
}

fn percent_decode(text: &[u8]) -> Option<Vec<u8>> {
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

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStringExt;

    use super::*;

    #[test]
    fn a_shown_key_can_be_given_back() {
        #[track_caller]
        fn check(bytes: &[u8], want: &str) {
            assert_eq!(shown(bytes), want);
            assert_eq!(key(want.into(), true).as_deref(), Ok(bytes), "{want}");
            let raw = std::ffi::OsString::from_vec(bytes.to_vec());
            assert_eq!(key(raw, false).as_deref(), Ok(bytes));
        }
        check(b"plain", "plain");
        check("käse 🧀".as_bytes(), "käse 🧀");
        check(b"100%", "100%25");
        check(b"/a%20b", "/a%2520b");
        check(b"caf\xe9", "caf%E9");
        check(b"a\tb\nc\x1b[31m", "a%09b%0Ac%1B[31m");
        check(b"\xff\xfe\x00", "%FF%FE%00");
        check("\u{85}".as_bytes(), "%C2%85");
        check(b"\xe2\x82", "%E2%82");
    }

    #[test]
    fn invalid_percent_encoding_is_refused() {
        for text in ["%", "a%4", "%zz", "100%", "%-1", "%+1"] {
            assert!(key(text.into(), true).unwrap_err().contains("percent-encoded"), "{text}");
        }
        assert_eq!(key("%e9".into(), true), Ok(b"\xe9".to_vec()));
        assert!(key("".into(), true).is_err());
    }
}
