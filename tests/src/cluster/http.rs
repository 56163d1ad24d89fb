//! A plain blocking HTTP/1.1 client with one connection and one request at a time.
//!
//! The client returns the outcome of the operation, and keeps the whole answer for the error text
//! if the answer is unexpected. An error after the first byte was sent is *unknown*; only a
//! connection that could not be established certainly had no effect.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use serde_json::Value;

/// The default time after the deadline of a request during which the client waits for its answer.
const GRACE: Duration = Duration::from_secs(5);
/// The default deadline of the service, for requests without one.
pub const DEADLINE: Duration = Duration::from_secs(5);

/// The reason why there is no answer.
#[derive(Debug)]
pub enum HttpError {
    /// No byte was sent.
    NotSent(io::Error),
    /// At least a part of the request may have been sent.
    Unanswered(io::Error),
}

/// A complete answer.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    /// Status line and headers, in lower case.
    pub head: String,
    /// The body as JSON, or null.
    pub body: Value,
}

/// The outcome of an operation as its client knows it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum HttpOutcome {
    Applied,
    /// The operation had no effect; contains the type of the problem.
    NotApplied(String),
    Unknown(String),
}

impl Answer {
    /// Returns the outcome of a single operation. Panics if status and `outcome` do not match
    /// (docs/problems.md): such an answer is a bug, and no test should accept it as either.
    #[track_caller]
    pub fn outcome(&self) -> HttpOutcome {
        self.outcome_or_surprise().unwrap_or_else(|surprise| panic!("{surprise}"))
    }

    /// Returns the outcome of a single operation, or a description of an answer that violates the
    /// contract.
    pub fn outcome_or_surprise(&self) -> Result<HttpOutcome, String> {
        let kind = self.body["type"].as_str().unwrap_or_default();
        let kind = kind.rsplit('/').next().unwrap_or_default().to_owned();
        match (self.status, self.body["outcome"].as_str()) {
            (200, None) => Ok(HttpOutcome::Applied),
            // A read without an answer is 504 not-applied.
            (429 | 503 | 504, Some("not-applied")) => Ok(HttpOutcome::NotApplied(kind)),
            // The token was applied for another request.
            (422, Some("not-applied")) if kind == "token-reused" => {
                Ok(HttpOutcome::NotApplied(kind))
            }
            (504, Some("unknown")) => Ok(HttpOutcome::Unknown(kind)),
            _ => Err(format!("an answer that violates the contract: {self:?}")),
        }
    }
}

/// A client with one connection to a gateway, which is re-established after an error.
pub struct Client {
    address: String,
    stream: Option<TcpStream>,
    input: Vec<u8>,
    grace: Duration,
}

impl Client {
    /// Creates a client for `host:port`, which connects at the first request.
    pub fn new(address: &str) -> Self {
        Self { address: address.to_owned(), stream: None, input: Vec::new(), grace: GRACE }
    }

    pub fn get(&mut self, path: &str) -> Result<Answer, HttpError> {
        self.call("GET", path, &[], b"", DEADLINE)
    }

    /// Adds `delta` to one counter, with the service's default deadline.
    pub fn increment(
        &mut self,
        namespace: &str,
        key: &str,
        delta: i64,
    ) -> Result<Answer, HttpError> {
        let path = format!("/v1/counters/{namespace}/{key}/increment?delta={delta}");
        self.call("POST", &path, &[], b"", DEADLINE)
    }

    /// Returns the value of a counter, or the answer if it has none.
    pub fn value(&mut self, namespace: &str, key: &str) -> Result<Result<u64, Answer>, HttpError> {
        let answer = self.get(&format!("/v1/counters/{namespace}/{key}"))?;
        Ok(answer.body["value"].as_u64().filter(|_| answer.status == 200).ok_or(answer))
    }

    /// Sets the time to wait after the deadline of a request, for a service that may have been
    /// stopped.
    pub fn with_grace(self, grace: Duration) -> Self {
        Self { grace, ..self }
    }

    pub fn call(
        &mut self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &[u8],
        deadline: Duration,
    ) -> Result<Answer, HttpError> {
        // The connection is put back only after a complete answer.
        let mut stream = match self.stream.take().filter(is_open) {
            Some(stream) => stream,
            None => self.connect().map_err(HttpError::NotSent)?,
        };
        self.input.clear();
        let mut request = format!(
            "{method} {path} HTTP/1.1\r\nHost: {}\r\nContent-Length: {}\r\n\
             Request-Timeout-Ms: {}\r\n",
            self.address,
            body.len(),
            deadline.as_millis()
        );
        for (name, value) in headers {
            request.push_str(&format!("{name}: {value}\r\n"));
        }
        request.push_str("\r\n");
        let mut bytes = request.into_bytes();
        bytes.extend_from_slice(body);
        let mut converse = || -> io::Result<Answer> {
            stream.set_read_timeout(Some(deadline + self.grace))?;
            stream.write_all(&bytes)?;
            self.receive(&mut stream)
        };
        let answer = converse().map_err(HttpError::Unanswered)?;
        self.stream = Some(stream);
        Ok(answer)
    }

    fn connect(&self) -> io::Result<TcpStream> {
        let address: SocketAddr = self.address.parse().map_err(io::Error::other)?;
        let stream = TcpStream::connect_timeout(&address, Duration::from_secs(2))?;
        stream.set_nodelay(true)?;
        Ok(stream)
    }

    /// Reads an answer. All answers of the service have a `Content-Length`.
    fn receive(&mut self, stream: &mut TcpStream) -> io::Result<Answer> {
        let invalid = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_owned());
        let head_bytes = loop {
            if let Some(at) = self.input.windows(4).position(|four| four == b"\r\n\r\n") {
                break at + 4;
            }
            self.read_more(stream)?;
        };
        let head = String::from_utf8_lossy(&self.input[..head_bytes]).to_ascii_lowercase();
        let status = head.get(9..12).and_then(|status| status.parse().ok());
        let status = status.ok_or_else(|| invalid("no status"))?;
        let length = head.lines().find_map(|line| line.strip_prefix("content-length:"));
        let length: usize = length
            .and_then(|length| length.trim().parse().ok())
            .ok_or_else(|| invalid("an answer without Content-Length"))?;
        while self.input.len() < head_bytes + length {
            self.read_more(stream)?;
        }
        let body = &self.input[head_bytes..head_bytes + length];
        Ok(Answer { status, head, body: serde_json::from_slice(body).unwrap_or_default() })
    }

    fn read_more(&mut self, stream: &mut TcpStream) -> io::Result<()> {
        let mut bytes = [0; 8192];
        match stream.read(&mut bytes)? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            count => {
                self.input.extend_from_slice(&bytes[..count]);
                Ok(())
            }
        }
    }
}

/// Returns whether an idle connection is still open at the other side.
fn is_open(stream: &TcpStream) -> bool {
    let peek = || -> io::Result<usize> {
        stream.set_nonblocking(true)?;
        let peeked = stream.peek(&mut [0]);
        stream.set_nonblocking(false)?;
        peeked
    };
    matches!(peek(), Err(error) if error.kind() == io::ErrorKind::WouldBlock)
}
