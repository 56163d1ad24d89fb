//! Calls to a cluster that may have several gateways.
//!
//! All gateways are equivalent. A read may be sent to the next gateway at any time
//! ([`Gateways::read`]); so may a write, because it has an idempotency token ([`Gateways::write`]).

use std::fs::File;
use std::io::{self, Read};
use std::time::{Duration, Instant};

use crate::answer::{CallFailure, failure};
use crate::http::{
    CallError, HttpConnection, HttpRequest, HttpResponse, IdempotencyHeaders, Media, Url,
};

/// The deadline that [`Gateways::write`] gives the gateway, and the usual one of a read.
pub const DEADLINE: Duration = Duration::from_secs(5);
/// The client waits this much longer than the gateway's deadline: the gateway knows the outcome and
/// the client does not, so the gateway's answer should come before the client's time-out.
pub const GRACE: Duration = Duration::from_secs(5);
/// The pause between two rounds through all gateways.
const AGAIN_AFTER: Duration = Duration::from_millis(200);

/// The gateways of one cluster.
#[derive(Debug)]
pub struct Gateways {
    connections: Vec<HttpConnection>,
}

impl Gateways {
    /// Creates clients for these gateways; no connection is opened yet.
    pub fn new(urls: &[Url]) -> Self {
        Self { connections: urls.iter().cloned().map(HttpConnection::new).collect() }
    }

    /// Sends a read to each gateway in turn until one answers 200. If none does, returns the answer
    /// or the error of the last one.
    pub async fn read(
        &mut self,
        path: &str,
        json: Option<&[u8]>,
        deadline: Duration,
    ) -> Result<HttpResponse, CallFailure> {
        let mut result = Err(CallFailure::Permanent("no URL given".to_owned()));
        for connection in &mut self.connections {
            let request = match json {
                Some(json) => {
                    HttpRequest::post(connection.url(), path, deadline, None, Media::Json, json)
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
    pub async fn write(
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
            let mut last = CallFailure::Permanent("no URL given".to_owned());
            for connection in &mut self.connections {
                let url = connection.url().clone();
                let request =
                    HttpRequest::post(&url, path, DEADLINE, Some(token), Media::Json, json);
                let answer = connection.call(&request, DEADLINE + GRACE).await;
                let was_answered = answer.is_ok();
                last = match answer {
                    Ok(response) if response.status == 200 => return Ok(response),
                    Ok(response) => failure(&response),
                    Err(error) => unanswered(&url, &error),
                };
                match &last {
                    CallFailure::Unknown(why) => doubt = Some(why.clone()),
                    // The next URL may be a gateway.
                    CallFailure::NotAGateway(_) => {}
                    _ if was_answered => break,
                    _ => {}
                }
            }
            let goes_on = doubt.is_some() || last.is_quota();
            if !goes_on || begun.elapsed() >= give_up || matches!(last, CallFailure::TokenTooOld(_))
            {
                return Err(doubt.map_or(last, CallFailure::Unknown));
            }
            tokio::time::sleep(AGAIN_AFTER).await;
        }
    }
}

/// Classifies a call without an answer.
pub fn unanswered(url: &Url, error: &CallError) -> CallFailure {
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

/// Returns 128 random bits in hex, which make a token unique.
pub fn fresh_id() -> io::Result<String> {
    let mut bytes = [0; 16];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(format!("{:032x}", u128::from_le_bytes(bytes)))
}
