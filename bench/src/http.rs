//! One HTTP/1.1 connection that knows whether a request may have had an effect.
//!
//! A newcomer would retry after any error. That counts twice: an error after the first byte of a
//! request left this process says nothing about what the server did with it. So the errors are
//! kept apart, and only the first is safe to retry:
//!
//! - [`CallError::NotSent`]: the connection could not be made, or was found closed before a byte
//!   was written. Nothing happened.
//! - [`CallError::Unanswered`]: a byte was written and no complete answer came back. Unknown.
//! - [`CallError::NoHttp`]: a fresh connection answered in another protocol. No gateway is there, and none behind it.
//!
//! An answer counts only when it is complete by its own framing (`Content-Length` or chunked); a
//! body that ends with the connection can't be told from one cut off, and is taken for cut off. Of an
//! answer that reports a failure the status alone says something, so there the body may end anywhere.
//! One request is out at a time; after any error, or `Connection: close`, the connection is dropped.

use std::fmt;
use std::io::{self, Write};
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::net::{TcpStream, lookup_host};
use tokio::time::{Instant, timeout, timeout_at};

/// How long each address of a name may take to connect. Nothing was sent by then, so the next one is tried safely.
const CONNECT_WITHIN: Duration = Duration::from_secs(2);
/// The longest head of an answer. A gateway's are below 1 KiB; more is not a gateway.
const HEAD_BYTES_MAX: usize = 64 << 10;
/// The longest body. The largest, 100,000 failed items with keys of 1 KiB in base64, is 170 MiB.
const BODY_BYTES_MAX: usize = 256 << 20;
const READ_BYTES: usize = 16 << 10;

/// Where a server listens: `http://host:port`, and nothing else.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Url {
    /// `host:port`, as `TcpStream::connect` and the `Host` header want it.
    authority: String,
}

impl Url {
    /// From `http://host[:port][/]`. The reason why not is for the user.
    pub fn parse(text: &str) -> Result<Self, String> {
        let Some(rest) = text.strip_prefix("http://") else {
            return Err(format!("{text:?} does not begin with http://"));
        };
        let host = rest.strip_suffix('/').unwrap_or(rest);
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b".-_:[]".contains(&byte);
        if host.is_empty() || !host.bytes().all(plain) {
            return Err(format!("{text:?} is not http://HOST:PORT"));
        }
        let after_host = &host[host.rfind(']').map_or(0, |at| at + 1)..];
        match after_host.rsplit_once(':') {
            None => Ok(Self { authority: format!("{host}:80") }),
            Some((_, port)) if port.parse::<u16>().is_ok_and(|port| port > 0) => {
                Ok(Self { authority: host.to_owned() })
            }
            Some(_) => Err(format!("{text:?} has no port from 1 to 65535")),
        }
    }

    /// `host:port`
    pub fn authority(&self) -> &str {
        &self.authority
    }
}

impl fmt::Display for Url {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "http://{}", self.authority)
    }
}

/// How a body is written.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Media {
    Json,
    /// Lines.
    Text,
}

impl Media {
    fn name(self) -> &'static str {
        match self {
            Self::Json => "application/json",
            Self::Text => "text/plain",
        }
    }
}

/// What makes it safe to send a request again that may have been applied: the service applies it once per token.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Token {
    /// Printable ASCII without `"` and `\\`, which would have to be escaped.
    pub key: String,
    /// When the request was made, in ms since 1970: the same at every send. None: the service goes by when each comes in.
    pub issued_at_ms: Option<u64>,
}

/// A request, as bytes ready to leave.
#[derive(Clone, Debug)]
pub struct Request {
    bytes: Vec<u8>,
}

impl Request {
    /// `path` must already be percent-encoded. `deadline` becomes `Request-Timeout-Ms`.
    pub fn get(url: &Url, path: &str, deadline: Duration) -> Self {
        let mut bytes = head("GET", url, path, deadline, 0);
        bytes.extend_from_slice(b"\r\n");
        Self { bytes }
    }

    pub fn post(url: &Url, path: &str, deadline: Duration, media: Media, body: &[u8]) -> Self {
        let bytes = head("POST", url, path, deadline, body.len());
        Self::with_body(bytes, media, body)
    }

    /// One that may be sent again, as it is and to whomever, until it is answered.
    pub fn post_once(
        url: &Url,
        path: &str,
        deadline: Duration,
        media: Media,
        token: &Token,
        body: &[u8],
    ) -> Self {
        let mut bytes = head("POST", url, path, deadline, body.len());
        write!(bytes, "Idempotency-Key: \"{}\"\r\n", token.key).expect("a Vec takes every byte");
        if let Some(at) = token.issued_at_ms {
            write!(bytes, "Idempotency-Issued-At: {at}\r\n").expect("a Vec takes every byte");
        }
        Self::with_body(bytes, media, body)
    }

    fn with_body(mut bytes: Vec<u8>, media: Media, body: &[u8]) -> Self {
        let (media, length) = (media.name(), body.len());
        write!(bytes, "Content-Type: {media}\r\nContent-Length: {length}\r\n\r\n")
            .expect("a Vec takes every byte");
        bytes.extend_from_slice(body);
        Self { bytes }
    }
}

fn head(method: &str, url: &Url, path: &str, deadline: Duration, body_bytes: usize) -> Vec<u8> {
    // Room for the rest of the head, so that one allocation is enough.
    let mut bytes = Vec::with_capacity(path.len() + body_bytes + 256);
    let (authority, deadline) = (url.authority(), deadline.as_millis());
    write!(
        bytes,
        "{method} {path} HTTP/1.1\r\nHost: {authority}\r\nRequest-Timeout-Ms: {deadline}\r\n"
    )
    .expect("a Vec takes every byte");
    bytes
}

/// A complete answer.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Response {
    pub status: u16,
    /// `host:port` of the server that answered.
    pub from: String,
    /// `Retry-After`, when it was whole seconds.
    pub retry_after: Option<Duration>,
    /// `Content-Type`
    pub content_type: Option<String>,
    /// `Location`
    pub location: Option<String>,
    /// `Idempotent-Replayed: true`: the service had applied a request with this token before, and applied nothing now.
    pub replayed: bool,
    pub body: Vec<u8>,
}

/// Why there is no answer, and so what may be done next.
#[derive(Debug)]
pub enum CallError {
    /// No byte of the request left this process: nothing happened, send it again anywhere.
    NotSent(io::Error),
    /// At least one byte left and no complete answer came: it may or may not have had its effect.
    Unanswered(io::Error),
    /// The first bytes that came back are no HTTP, so nothing there understood the request.
    NoHttp,
}

impl fmt::Display for CallError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotSent(error) => write!(formatter, "not sent: {error}"),
            Self::Unanswered(error) => write!(formatter, "sent, but no answer: {error}"),
            Self::NoHttp => formatter.write_str("what listens there speaks no HTTP/1.1"),
        }
    }
}

impl std::error::Error for CallError {}

/// A connection to one server, made when first needed and again after it broke.
#[derive(Debug)]
pub struct Connection {
    url: Url,
    stream: Option<TcpStream>,
    /// What was read and not yet understood. Empty between calls.
    input: Vec<u8>,
    /// Whether a byte of the last request may have left.
    sent: bool,
}

impl Connection {
    pub fn new(url: Url) -> Self {
        Self { url, stream: None, input: Vec::new(), sent: false }
    }

    pub fn url(&self) -> &Url {
        &self.url
    }

    /// Whether a byte of the last request may have left: for a call whose future was dropped.
    pub fn was_sent(&self) -> bool {
        self.sent
    }

    /// Sends `request` and waits for its answer, no longer than `within`.
    pub async fn call(
        &mut self,
        request: &Request,
        within: Duration,
    ) -> Result<Response, CallError> {
        let deadline = Instant::now() + within;
        self.sent = false;
        // Taken out, and put back only after a whole answer: whatever ends this call early,
        // a dropped future included, a half-used connection is never used again.
        let (mut stream, is_fresh) = match self.stream.take() {
            Some(stream) if is_quiet(&stream) => (stream, false),
            _ => (connect(&self.url).await.map_err(CallError::NotSent)?, true),
        };
        self.input.clear();
        self.sent = true;
        send(&stream, &request.bytes, deadline).await?;
        let answer = timeout_at(deadline, self.receive(&mut stream, is_fresh)).await;
        let timed_out = || CallError::Unanswered(io::ErrorKind::TimedOut.into());
        let (response, stays) = answer.unwrap_or_else(|_| Err(timed_out()))?;
        if stays && self.input.is_empty() {
            self.stream = Some(stream);
        }
        Ok(response)
    }

    async fn receive(
        &mut self,
        stream: &mut TcpStream,
        is_fresh: bool,
    ) -> Result<(Response, bool), CallError> {
        loop {
            let head = self.receive_head(stream, is_fresh).await?;
            // 100 Continue and its like come before the answer and are none.
            if head.status < 200 {
                continue;
            }
            let mut body = Vec::new();
            let received = match head.body {
                BodyLength::Bytes(bytes) => self.receive_sized(stream, bytes, &mut body).await,
                BodyLength::Chunked => self.receive_chunked(stream, &mut body).await,
                BodyLength::ToClose => self.receive_to_close(stream, &mut body).await,
            };
            received.map_err(CallError::Unanswered)?;
            let Head { status, retry_after, content_type, location, replayed, stays, .. } = head;
            let from = self.url.authority.clone();
            let response =
                Response { status, from, retry_after, content_type, location, replayed, body };
            return Ok((response, stays));
        }
    }

    async fn receive_head(
        &mut self,
        stream: &mut TcpStream,
        is_fresh: bool,
    ) -> Result<Head, CallError> {
        loop {
            // On a kept connection it may be the end of an earlier answer.
            if is_fresh && !may_be_http(&self.input) {
                return Err(CallError::NoHttp);
            }
            if let Some((head, bytes)) = parse_head(&self.input).map_err(CallError::Unanswered)? {
                self.input.drain(..bytes);
                return Ok(head);
            }
            if self.input.len() > HEAD_BYTES_MAX {
                let error = invalid("the head of the answer does not end");
                return Err(CallError::Unanswered(error));
            }
            read_more(stream, &mut self.input).await.map_err(CallError::Unanswered)?;
        }
    }

    async fn receive_sized(
        &mut self,
        stream: &mut TcpStream,
        bytes: usize,
        body: &mut Vec<u8>,
    ) -> io::Result<()> {
        if bytes > BODY_BYTES_MAX - body.len() {
            return Err(invalid("the answer is too long"));
        }
        while self.input.len() < bytes {
            read_more(stream, &mut self.input).await?;
        }
        body.extend_from_slice(&self.input[..bytes]);
        self.input.drain(..bytes);
        Ok(())
    }

    async fn receive_to_close(
        &mut self,
        stream: &mut TcpStream,
        body: &mut Vec<u8>,
    ) -> io::Result<()> {
        while self.input.len() < HEAD_BYTES_MAX {
            match read_more(stream, &mut self.input).await {
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => break,
                read => read?,
            }
        }
        body.append(&mut self.input);
        Ok(())
    }

    async fn receive_chunked(
        &mut self,
        stream: &mut TcpStream,
        body: &mut Vec<u8>,
    ) -> io::Result<()> {
        loop {
            let line = self.receive_line(stream).await?;
            let digits = line.split(|&byte| byte == b';').next().unwrap_or_default();
            let length = std::str::from_utf8(digits)
                .ok()
                .and_then(|text| usize::from_str_radix(text.trim(), 16).ok())
                .ok_or_else(|| invalid("a chunk without a length"))?;
            if length == 0 {
                // Trailers, then an empty line.
                while !self.receive_line(stream).await?.is_empty() {}
                return Ok(());
            }
            self.receive_sized(stream, length, body).await?;
            if !self.receive_line(stream).await?.is_empty() {
                return Err(invalid("a chunk longer than it said"));
            }
        }
    }

    async fn receive_line(&mut self, stream: &mut TcpStream) -> io::Result<Vec<u8>> {
        loop {
            if let Some(end) = self.input.windows(2).position(|pair| pair == b"\r\n") {
                let line = self.input[..end].to_vec();
                self.input.drain(..end + 2);
                return Ok(line);
            }
            if self.input.len() > HEAD_BYTES_MAX {
                return Err(invalid("a line of the answer does not end"));
            }
            read_more(stream, &mut self.input).await?;
        }
    }
}

/// To the first address of the name that takes it: one that does not answer leaves the others their time.
async fn connect(url: &Url) -> io::Result<TcpStream> {
    let addresses: Vec<_> = within(lookup_host(url.authority())).await?.collect();
    let mut failures = Vec::new();
    for address in addresses {
        match within(TcpStream::connect(address)).await {
            Ok(stream) => {
                stream.set_nodelay(true)?;
                return Ok(stream);
            }
            Err(error) => failures.push((address, error)),
        }
    }
    match failures.pop() {
        None => Err(io::Error::new(io::ErrorKind::NotFound, "the name has no address")),
        Some((_, error)) if failures.is_empty() => Err(error),
        Some(last) => {
            let kind = last.1.kind();
            failures.push(last);
            let told = failures.iter().map(|(address, error)| format!("{address}: {error}"));
            Err(io::Error::new(kind, told.collect::<Vec<_>>().join(", ")))
        }
    }
}

async fn within<T>(work: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    let late = || io::Error::new(io::ErrorKind::TimedOut, "no connection within 2 s");
    timeout(CONNECT_WITHIN, work).await.unwrap_or_else(|_| Err(late()))
}

/// Whether an answer may begin with these bytes.
fn may_be_http(input: &[u8]) -> bool {
    let begin = b"HTTP/1.";
    input.iter().zip(begin).all(|(got, want)| got == want)
}

/// Whether a connection kept from the last call can still carry one. A server that closed it while
/// it was idle is seen here, while nothing was sent; later it would be an unknown outcome.
fn is_quiet(stream: &TcpStream) -> bool {
    let mut byte = [0];
    matches!(stream.try_read(&mut byte), Err(error) if error.kind() == io::ErrorKind::WouldBlock)
}

async fn send(stream: &TcpStream, bytes: &[u8], deadline: Instant) -> Result<(), CallError> {
    let mut sent = 0;
    while sent < bytes.len() {
        match stream.try_write(&bytes[sent..]) {
            Ok(0) => return Err(broken(sent, io::ErrorKind::WriteZero.into())),
            Ok(count) => sent += count,
            // Only here a timer is needed: most requests fit the socket's buffer.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                timeout_at(deadline, stream.writable())
                    .await
                    .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
                    .map_err(|error| broken(sent, error))?;
            }
            Err(error) => return Err(broken(sent, error)),
        }
    }
    Ok(())
}

fn broken(sent: usize, error: io::Error) -> CallError {
    if sent == 0 { CallError::NotSent(error) } else { CallError::Unanswered(error) }
}

async fn read_more(stream: &mut TcpStream, input: &mut Vec<u8>) -> io::Result<()> {
    input.reserve(READ_BYTES);
    match stream.read_buf(input).await? {
        0 => Err(io::ErrorKind::UnexpectedEof.into()),
        _ => Ok(()),
    }
}

struct Head {
    status: u16,
    retry_after: Option<Duration>,
    content_type: Option<String>,
    location: Option<String>,
    replayed: bool,
    body: BodyLength,
    stays: bool,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum BodyLength {
    Bytes(usize),
    Chunked,
    /// All that comes until the connection is closed.
    ToClose,
}

/// The head at the front of `input` and its length, or `None` while it is not all there.
fn parse_head(input: &[u8]) -> io::Result<Option<(Head, usize)>> {
    let Some(end) = input.windows(4).position(|four| four == b"\r\n\r\n") else {
        return Ok(None);
    };
    // A proxy may say anything in its headers, and its status counts all the same.
    let text = String::from_utf8_lossy(&input[..end]);
    let mut lines = text.split("\r\n");
    let first = lines.next().unwrap_or_default();
    let status = parse_status(first).ok_or_else(|| invalid("no status line"))?;
    let stays = first.starts_with("HTTP/1.1");
    let mut head = Head {
        status,
        retry_after: None,
        content_type: None,
        location: None,
        replayed: false,
        body: BodyLength::Bytes(0),
        stays,
    };
    // These have no body, whatever their headers say (RFC 9112 §6.3).
    let bodiless = status < 200 || status == 204 || status == 304;
    let mut framed = bodiless;
    for line in lines {
        let (name, value) = line.split_once(':').ok_or_else(|| invalid("a header without ':'"))?;
        let (is, value) = (|other: &str| name.eq_ignore_ascii_case(other), value.trim());
        if is("content-length") && !bodiless && head.body != BodyLength::Chunked {
            let length = value.parse().map_err(|_| invalid("a Content-Length of no number"))?;
            head.body = BodyLength::Bytes(length);
            framed = true;
        } else if is("transfer-encoding") && !bodiless {
            if !value.eq_ignore_ascii_case("chunked") {
                return Err(invalid("a Transfer-Encoding other than chunked"));
            }
            head.body = BodyLength::Chunked;
            framed = true;
        } else if is("connection") {
            let closes = |word: &str| word.trim().eq_ignore_ascii_case("close");
            head.stays &= !value.split(',').any(closes);
        } else if is("retry-after") {
            head.retry_after = value.parse().ok().map(Duration::from_secs);
        } else if is("content-type") {
            head.content_type = Some(value.to_owned());
        } else if is("location") {
            head.location = Some(value.to_owned());
        } else if is("idempotent-replayed") {
            head.replayed = value == "true";
        }
    }
    if !framed && status < 300 {
        return Err(invalid("an answer whose end can't be told from a broken connection"));
    }
    if !framed {
        (head.body, head.stays) = (BodyLength::ToClose, false);
    }
    Ok(Some((head, end + 4)))
}

fn parse_status(line: &str) -> Option<u16> {
    let rest = line.strip_prefix("HTTP/1.1 ").or_else(|| line.strip_prefix("HTTP/1.0 "))?;
    rest.get(..3)?.parse().ok()
}

fn invalid(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// A path segment: every byte that is not unreserved, percent-encoded, `/` included.
pub fn percent_encode(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    for &byte in bytes {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            text.push(char::from(byte));
        } else {
            text.push_str(&format!("%{byte:02X}"));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncWriteExt;
    use tokio::net::TcpListener;

    const WITHIN: Duration = Duration::from_secs(5);

    /// Plays `turns` to whoever connects: each is said after one read, then the connection closes.
    async fn serve(turns: Vec<&'static str>) -> Url {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = Url::parse(&format!("http://{}", listener.local_addr().unwrap())).unwrap();
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            for turn in turns {
                let mut bytes = [0; 4096];
                assert!(stream.read(&mut bytes).await.unwrap() > 0);
                stream.write_all(turn.as_bytes()).await.unwrap();
            }
        });
        url
    }

    #[track_caller]
    fn check(turn: &'static str, want: &str) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let got = runtime.block_on(async {
            let url = serve(vec![turn]).await;
            let request = Request::get(&url, "/", WITHIN);
            match Connection::new(url).call(&request, WITHIN).await {
                Ok(response) => format!(
                    "{} {} {:?}",
                    response.status,
                    String::from_utf8(response.body).unwrap(),
                    response.retry_after.map(|wait| wait.as_secs())
                ),
                Err(CallError::NotSent(_)) => "not sent".to_owned(),
                Err(CallError::Unanswered(error)) => format!("unanswered {:?}", error.kind()),
                Err(CallError::NoHttp) => "no HTTP".to_owned(),
            }
        });
        assert_eq!(got, want);
    }

    #[test]
    fn only_a_whole_answer_is_one() {
        check("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", "200 hi None");
        check("HTTP/1.1 503 X\r\nretry-after: 7\r\ncontent-length: 0\r\n\r\n", "503  Some(7)");
        check("HTTP/1.1 204 No\r\n\r\n", "204  None");
        check(
            "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\na",
            "200 a None",
        );
        check(
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2;x=y\r\nhi\r\nA\r\n0123456789\r\n0\r\nT: u\r\n\r\n",
            "200 hi0123456789 None",
        );
        check("", "unanswered UnexpectedEof");
        check("HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nhi", "unanswered UnexpectedEof");
        check("HTTP/1.1 200 OK\r\nContent-Le", "unanswered UnexpectedEof");
        check(
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n",
            "unanswered UnexpectedEof",
        );
        check(
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi!\r\n0\r\n\r\n",
            "unanswered InvalidData",
        );
        // What came of the body is no other protocol.
        check("HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}", "unanswered UnexpectedEof");
        // Ends with the connection: whole, or cut off? Nobody knows.
        check("HTTP/1.1 200 OK\r\n\r\nhi", "unanswered InvalidData");
        check("HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", "unanswered InvalidData");
        // The status is whole.
        check("HTTP/1.0 501 X\r\n\r\nhi", "501 hi None");
        check("HTTP/1.1 404 X\r\nServer: ä\r\nContent-Length: 0\r\n\r\n", "404  None");
    }

    #[test]
    fn another_protocol_is_named() {
        check("SSH-2.0-OpenSSH\r\n\r\n", "no HTTP");
        check("-ERR unknown command 'GET'\r\n", "no HTTP");
        check("\x15\x03\x01\0\x02\x02\x46", "no HTTP");
        // Cut off, it may have been anything.
        check("HT", "unanswered UnexpectedEof");
    }

    #[test]
    fn what_an_answer_says_of_itself() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let response = runtime.block_on(async {
            let head = "HTTP/1.1 301 Moved\r\nContent-Type: text/html\r\nlocation: https://a/\r\n";
            let rest = "Idempotent-Replayed: true\r\nContent-Length: 0\r\n\r\n";
            let url = serve(vec![[head, rest].concat().leak()]).await;
            let request = Request::get(&url, "/", WITHIN);
            Connection::new(url).call(&request, WITHIN).await.unwrap()
        });
        assert!(response.from.starts_with("127.0.0.1:"), "{response:?}");
        assert_eq!(response.content_type.as_deref(), Some("text/html"));
        assert_eq!(response.location.as_deref(), Some("https://a/"));
        assert!(response.replayed);
    }

    /// `localhost` is 127.0.0.1 and, on most machines, ::1 before it, where nothing listens.
    #[tokio::test]
    async fn every_address_of_a_name_is_tried() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let url = Url::parse(&format!("http://localhost:{port}")).unwrap();
        connect(&url).await.unwrap();
        drop(listener);
        let refused = connect(&url).await.unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused, "{refused}");
    }

    #[tokio::test]
    async fn a_refused_connection_sent_nothing() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = Url::parse(&format!("http://{}", listener.local_addr().unwrap())).unwrap();
        drop(listener);
        let request = Request::get(&url, "/", WITHIN);
        let got = Connection::new(url).call(&request, WITHIN).await;
        assert!(matches!(got, Err(CallError::NotSent(_))), "{got:?}");
    }

    #[tokio::test]
    async fn a_connection_serves_many_calls() {
        let answer = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi";
        let url = serve(vec![answer, answer]).await;
        let request = Request::post(&url, "/", WITHIN, Media::Json, b"{}");
        let mut connection = Connection::new(url);
        for _ in 0..2 {
            assert_eq!(connection.call(&request, WITHIN).await.unwrap().body, b"hi");
        }
        // The server closed it, and listens no more.
        let third = connection.call(&request, WITHIN).await;
        assert!(third.is_err(), "{third:?}");
    }

    #[tokio::test]
    async fn silence_ends_at_the_deadline() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = Url::parse(&format!("http://{}", listener.local_addr().unwrap())).unwrap();
        let request = Request::get(&url, "/", WITHIN);
        let got = Connection::new(url).call(&request, Duration::from_millis(50)).await;
        assert!(
            matches!(&got, Err(CallError::Unanswered(error)) if error.kind() == io::ErrorKind::TimedOut),
            "{got:?}"
        );
    }

    #[test]
    fn urls() {
        #[track_caller]
        fn check(text: &str, want: Option<&str>) {
            assert_eq!(Url::parse(text).ok().as_ref().map(Url::authority), want, "{text}");
        }
        check("http://127.0.0.1:8080", Some("127.0.0.1:8080"));
        check("http://127.0.0.1:8080/", Some("127.0.0.1:8080"));
        check("http://counter", Some("counter:80"));
        check("http://[::1]:8080", Some("[::1]:8080"));
        check("http://[::1]", Some("[::1]:80"));
        check("https://counter", None);
        check("http://", None);
        check("http://a/b", None);
        check("http://a\r\nX: y", None);
        check("http://a:0", None);
        check("http://a:70000", None);
        check("localhost:8080", None);
    }

    #[test]
    fn a_token_is_two_headers() {
        let url = Url::parse("http://a").unwrap();
        let said = |issued_at_ms| {
            let token = Token { key: "k-1".to_owned(), issued_at_ms };
            let request = Request::post_once(&url, "/", WITHIN, Media::Text, &token, b"a");
            String::from_utf8(request.bytes).unwrap()
        };
        let begin = "POST / HTTP/1.1\r\nHost: a:80\r\nRequest-Timeout-Ms: 5000\r\nIdempotency-Key: \"k-1\"\r\n";
        let end = "Content-Type: text/plain\r\nContent-Length: 1\r\n\r\na";
        assert_eq!(said(None), format!("{begin}{end}"));
        assert_eq!(said(Some(7)), format!("{begin}Idempotency-Issued-At: 7\r\n{end}"));
    }

    #[test]
    fn path_segments() {
        assert_eq!(percent_encode(b"a/b c.%\xff~"), "a%2Fb%20c.%25%FF~");
    }
}
