//! A plain blocking HTTP/1.1 client, one connection, one request at a time.
//!
//! It reads an answer as a test wants it: what became of the operation, and everything else kept
//! for the message when that is a surprise. An error after the request began to leave is *unknown*;
//! only a connection that could not be made is known to have had no effect.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use serde_json::Value;

/// How much longer than a request's deadline its answer is waited for, unless told otherwise.
const GRACE: Duration = Duration::from_secs(5);
/// The service's own, when a request names none.
pub const DEADLINE: Duration = Duration::from_secs(5);

/// No answer.
#[derive(Debug)]
pub enum Error {
    /// Nothing was sent.
    NotSent(io::Error),
    /// Something was sent.
    Unanswered(io::Error),
}

/// A whole answer.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    /// Status line and headers, in lower case.
    pub head: String,
    /// Its JSON, or null.
    pub body: Value,
}

/// What became of an operation, as its client may take it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Outcome {
    Applied,
    /// With the problem's type.
    NotApplied(String),
    Unknown(String),
}

impl Answer {
    /// What a single operation came to. Status and `outcome` must fit each other
    /// (docs/problems.md): what does not is a bug, and no test should take it for one or the other.
    #[track_caller]
    pub fn outcome(&self) -> Outcome {
        self.outcome_or_surprise().unwrap_or_else(|surprise| panic!("{surprise}"))
    }

    /// The same, for whoever has to go on after a surprise.
    pub fn outcome_or_surprise(&self) -> Result<Outcome, String> {
        let kind = self.body["type"].as_str().unwrap_or_default();
        let kind = kind.rsplit('/').next().unwrap_or_default().to_owned();
        match (self.status, self.body["outcome"].as_str()) {
            (200, None) => Ok(Outcome::Applied),
            // A read that is not answered is 504 not-applied.
            (429 | 503 | 504, Some("not-applied")) => Ok(Outcome::NotApplied(kind)),
            // Its token was applied for another request.
            (422, Some("not-applied")) if kind == "token-reused" => Ok(Outcome::NotApplied(kind)),
            (504, Some("unknown")) => Ok(Outcome::Unknown(kind)),
            _ => Err(format!("an answer against the contract: {self:?}")),
        }
    }
}

/// One connection to a gateway, made again when it broke.
pub struct Client {
    address: String,
    stream: Option<TcpStream>,
    input: Vec<u8>,
    grace: Duration,
}

impl Client {
    /// `host:port`; connects when first used.
    pub fn new(address: &str) -> Self {
        Self { address: address.to_owned(), stream: None, input: Vec::new(), grace: GRACE }
    }

    pub fn get(&mut self, path: &str) -> Result<Answer, Error> {
        self.call("GET", path, &[], b"", DEADLINE)
    }

    /// Adds `delta` to one counter, with the service's default deadline.
    pub fn increment(&mut self, namespace: &str, key: &str, delta: i64) -> Result<Answer, Error> {
        let path = format!("/v1/counters/{namespace}/{key}/increment?delta={delta}");
        self.call("POST", &path, &[], b"", DEADLINE)
    }

    /// One counter's value, or the answer that has none.
    pub fn value(&mut self, namespace: &str, key: &str) -> Result<Result<u64, Answer>, Error> {
        let answer = self.get(&format!("/v1/counters/{namespace}/{key}"))?;
        Ok(answer.body["value"].as_u64().filter(|_| answer.status == 200).ok_or(answer))
    }

    /// Waits no longer than this after a request's deadline, for a service that may have been stopped.
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
    ) -> Result<Answer, Error> {
        // Taken out, and put back only after a whole answer.
        let mut stream = match self.stream.take().filter(is_open) {
            Some(stream) => stream,
            None => self.connect().map_err(Error::NotSent)?,
        };
        self.input.clear();
        let mut request = format!(
            "{method} {path} HTTP/1.1\r\nHost: {}\r\nContent-Length: {}\r\nRequest-Timeout-Ms: {}\r\n",
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
        let answer = converse().map_err(Error::Unanswered)?;
        self.stream = Some(stream);
        Ok(answer)
    }

    fn connect(&self) -> io::Result<TcpStream> {
        let address: SocketAddr = self.address.parse().map_err(io::Error::other)?;
        let stream = TcpStream::connect_timeout(&address, Duration::from_secs(2))?;
        stream.set_nodelay(true)?;
        Ok(stream)
    }

    /// The service's answers have a `Content-Length`.
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

/// Whether the other side has closed a connection that lay idle.
fn is_open(stream: &TcpStream) -> bool {
    let peek = || -> io::Result<usize> {
        stream.set_nonblocking(true)?;
        let peeked = stream.peek(&mut [0]);
        stream.set_nonblocking(false)?;
        peeked
    };
    matches!(peek(), Err(error) if error.kind() == io::ErrorKind::WouldBlock)
}
