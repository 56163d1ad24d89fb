//! Calls to a cluster that may have several gateways.
//!
//! Which gateway answers makes no difference. A request that changes nothing may go to the next one at any time
//! ([`Gateways::read`]); one that changes something has a token, and then it may, too ([`Gateways::write`]).

use std::fs::File;
use std::io::{self, Read};
use std::time::{Duration, Instant};

use bench::http::{CallError, Connection, Media, Request, Response, Token, Url};

use crate::answer::{self, Refusal};
use crate::output;

/// What a gateway is asked to answer within, for commands of one request.
pub(crate) const DEADLINE: Duration = Duration::from_secs(5);
/// How much longer than the gateway's deadline its answer is waited for: the gateway knows the
/// outcome better than this side does, so it gets to speak first.
pub(crate) const GRACE: Duration = Duration::from_secs(5);
/// How long a command is silent while nothing answers.
pub(crate) const TOLD_AFTER: Duration = Duration::from_secs(1);
/// Between two rounds through all gateways.
const AGAIN_AFTER: Duration = Duration::from_millis(200);

/// Which cluster, and how to say the result.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct ServerArgs {
    /// Gateways of the cluster, separated by commas
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
    connections: Vec<Connection>,
}

impl Gateways {
    pub(crate) fn new(urls: &[Url]) -> Self {
        Self { connections: urls.iter().cloned().map(Connection::new).collect() }
    }

    /// Asks each in turn until one answers 200. Else the last one's answer or error.
    pub(crate) async fn read(
        &mut self,
        path: &str,
        json: Option<&[u8]>,
        deadline: Duration,
    ) -> Result<Response, Refusal> {
        let mut result = Err(Refusal::Never("no URL given".to_owned()));
        for connection in &mut self.connections {
            let request = match json {
                Some(json) => Request::post(connection.url(), path, deadline, Media::Json, json),
                None => Request::get(connection.url(), path, deadline),
            };
            let answer = connection.call(&request, deadline + GRACE).await;
            result = answer.map_err(|error| unanswered(connection.url(), &error));
            if matches!(&result, Ok(response) if response.status == 200) {
                break;
            }
        }
        result
    }

    /// Sends it under one token until it is known what became of it, for as long as `give_up` at most. What is refused
    /// while nothing is in doubt ends it at once, but for want of room for the token, which comes with time.
    pub(crate) async fn write(
        &mut self,
        path: &str,
        token: &Token,
        json: &[u8],
        give_up: Duration,
    ) -> Result<Response, Refusal> {
        let begun = Instant::now();
        // Why an earlier send may have been applied.
        let mut doubt = None;
        loop {
            let mut refusal = Refusal::Never("no URL given".to_owned());
            for connection in &mut self.connections {
                let url = connection.url().clone();
                let request = Request::post_once(&url, path, DEADLINE, Media::Json, token, json);
                let answer = connection.call(&request, DEADLINE + GRACE).await;
                let was_answered = answer.is_ok();
                refusal = match answer {
                    Ok(response) if response.status == 200 => return Ok(response),
                    Ok(response) => answer::refusal(&response),
                    Err(error) => unanswered(&url, &error),
                };
                match &refusal {
                    Refusal::Unknown(why) => doubt = Some(why.clone()),
                    // Another one may be a gateway.
                    Refusal::NoGateway(_) => {}
                    _ if was_answered => break,
                    _ => {}
                }
            }
            let goes_on = doubt.is_some() || refusal.is_quota();
            if !goes_on || begun.elapsed() >= give_up || matches!(refusal, Refusal::TooOld(_)) {
                return Err(doubt.map_or(refusal, Refusal::Unknown));
            }
            tokio::time::sleep(AGAIN_AFTER).await;
        }
    }
}

/// What a call without an answer means.
pub(crate) fn unanswered(url: &Url, error: &CallError) -> Refusal {
    match error {
        CallError::NotSent(_) => Refusal::Later { why: format!("{url}: {error}"), after: None },
        CallError::Unanswered(_) => Refusal::Unknown(format!("{url}: {error}")),
        CallError::NoHttp => {
            Refusal::NoGateway(format!("{} is no dkc gateway: {error}", url.authority()))
        }
    }
}

/// Waits for `work`. When that takes long, a line on stderr names the gateway that is waited for.
pub(crate) async fn told<T>(urls: &[Url], until: &str, work: impl Future<Output = T>) -> T {
    tokio::pin!(work);
    if let Ok(done) = tokio::time::timeout(TOLD_AFTER, &mut work).await {
        return done;
    }
    output::note(&format!("no answer yet from {}: waiting {until}", names(urls)));
    work.await
}

/// Gateways, as a user gave them.
pub(crate) fn names(urls: &[Url]) -> String {
    urls.iter().map(Url::to_string).collect::<Vec<_>>().join(", ")
}

/// What a token is made of that nobody else uses.
pub(crate) fn fresh_id() -> io::Result<String> {
    let mut bytes = [0; 16];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(format!("{:032x}", u128::from_le_bytes(bytes)))
}

/// A namespace, checked here so that a typing mistake costs no request.
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

/// A key from the command line: any bytes, or in percent form.
pub(crate) fn key(text: std::ffi::OsString, is_percent: bool) -> Result<Vec<u8>, String> {
    use std::os::unix::ffi::OsStringExt;
    let mut key = text.into_vec();
    if is_percent {
        key = percent_decode(&key).ok_or_else(|| {
            let text = String::from_utf8_lossy(&key);
            format!("{text:?} is not in percent form: after each % stand two digits of 0-9 A-F")
        })?;
    }
    if (1..=KEY_BYTES_MAX).contains(&key.len()) {
        Ok(key)
    } else {
        Err(format!("a key is 1 to {KEY_BYTES_MAX} bytes, this one has {}", key.len()))
    }
}

/// A key in percent form, on one line of text: `%` itself, control characters and bytes that are no UTF-8 are escaped, and
/// the rest is as it is. [`key`] reads it back.
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
    fn what_is_no_percent_form_is_refused() {
        for text in ["%", "a%4", "%zz", "100%", "%-1", "%+1"] {
            assert!(key(text.into(), true).unwrap_err().contains("percent form"), "{text}");
        }
        assert_eq!(key("%e9".into(), true), Ok(b"\xe9".to_vec()));
        assert!(key("".into(), true).is_err());
    }
}
