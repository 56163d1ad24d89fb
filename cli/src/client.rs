//! Calls to a cluster that may have several gateways.
//!
//! Which gateway answers makes no difference. A request that changes nothing may go to the next one at any time
//! ([`Gateways::read`]); one that changes something has a token, and then it may, too ([`Gateways::write`]).

use std::fs::File;
use std::io::{self, Read};
use std::time::{Duration, Instant};

use bench::http::{CallError, Connection, Media, Request, Response, Token, Url};

use crate::answer::{self, Refusal};

/// What a gateway is asked to answer within, for commands of one request.
pub(crate) const DEADLINE: Duration = Duration::from_secs(5);
/// How much longer than the gateway's deadline its answer is waited for: the gateway knows the
/// outcome better than this side does, so it gets to speak first.
pub(crate) const GRACE: Duration = Duration::from_secs(5);
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
            result = connection.call(&request, deadline + GRACE).await.map_err(|error| {
                Refusal::Later { why: format!("{}: {error}", connection.url()), after: None }
            });
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
                refusal = match connection.call(&request, DEADLINE + GRACE).await {
                    Ok(response) if response.status == 200 => return Ok(response),
                    Ok(response) => answer::refusal(&response),
                    Err(error @ CallError::Unanswered(_)) => {
                        Refusal::Unknown(format!("{url}: {error}"))
                    }
                    Err(error @ CallError::NotSent(_)) => {
                        let why = format!("{url}: {error}");
                        refusal = Refusal::Later { why, after: None };
                        continue;
                    }
                };
                match &refusal {
                    Refusal::Unknown(why) => doubt = Some(why.clone()),
                    Refusal::Never(_) | Refusal::Later { .. } | Refusal::TooOld(_) => break,
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

/// A key from the command line: any bytes.
pub(crate) fn key(text: std::ffi::OsString) -> Result<Vec<u8>, String> {
    use std::os::unix::ffi::OsStringExt;
    let key = text.into_vec();
    if (1..=KEY_BYTES_MAX).contains(&key.len()) {
        Ok(key)
    } else {
        Err(format!("a key is 1 to {KEY_BYTES_MAX} bytes, this one has {}", key.len()))
    }
}
