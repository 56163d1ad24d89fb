//! An HTTP/1.1 connection that knows whether a request may have had an effect.
//!
//! A retry after any error would count twice: an error after the first byte of a request left this
//! process leaves open whether the server has applied it. So the errors are distinguished, and the
//! outcome is known for two of them:
//!
//! - [`CallError::NotSent`]: the connection could not be made, or was found closed before a byte
//!   was written. The request had no effect.
//! - [`CallError::Unanswered`]: a byte was written and no complete response came back. The outcome
//!   is unknown.
//! - [`CallError::NoHttp`]: a new connection replied in another protocol. Neither a gateway nor a
//!   proxy for one listens there.
//!
//! A response counts only if it is complete by its own framing (`Content-Length` or chunked): a
//! body that ends with the connection is indistinguishable from a truncated one, and is treated as
//! truncated. In a response that reports a failure, only the status matters, so there the body may
//! end anywhere. One request is in flight at a time; after any error, or `Connection: close`, the
//! connection is dropped.

use std::fmt;
use std::io::{self, Write};
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::net::{TcpStream, lookup_host};
use tokio::time::{Instant, timeout, timeout_at};

/// The time limit of connecting to each address of a host name. Nothing was sent by then, so it is
/// safe to try the next address.
const CONNECT_WITHIN: Duration = Duration::from_secs(2);
/// The size limit of the head of a response. The heads of a gateway are below 1 KiB; a longer one
/// is not from a gateway.
const HEAD_BYTES_MAX: usize = 64 << 10;
/// The size limit of a body. The largest one that a gateway sends, 100,000 failed items with keys
/// of 1 KiB in base64, is 170 MiB.
const BODY_BYTES_MAX: usize = 256 << 20;
const READ_BYTES: usize = 16 << 10;

/// The address of a server: `http://host:port`, without a path.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Url {
    /// `host:port`, as `TcpStream::connect` and the `Host` header want it.
    authority: String,
}

impl Url {
    /// Parses `http://host[:port][/]`. The error is a text for the user.
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

    /// Returns `host:port`.
    pub fn authority(&self) -> &str {
        &self.authority
    }
}

impl fmt::Display for Url {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "http://{}", self.authority)
    }
}

/// The format of a request body.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Media {
    /// `application/json`
    Json,
    /// `text/plain`: one key per line.
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

/// The headers that make it safe to send a request again that may have been applied: the service
/// applies it once per key.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct IdempotencyHeaders {
    /// `Idempotency-Key`: printable ASCII without `"` and `\\`, which would have to be escaped.
    pub key: String,
    /// `Idempotency-Issued-At`: the time at which the request was created, in ms since 1970, the
    /// same in every send. If it is `None`, the service uses the time at which each send arrives.
    pub issued_at_ms: Option<u64>,
}

/// A request, encoded and ready to be sent.
#[derive(Clone, Debug)]
pub struct HttpRequest {
    bytes: Vec<u8>,
}

impl HttpRequest {
    /// Returns a GET request. `path` must be percent-encoded. `deadline` is sent as
    /// `Request-Timeout-Ms`.
    pub fn get(url: &Url, path: &str, deadline: Duration) -> Self {
        let mut bytes = head("GET", url, path, deadline, 0);
        bytes.extend_from_slice(b"\r\n");
        Self { bytes }
    }

    /// Returns a POST request. `path` and `deadline` are as in [`get`](Self::get). A request with a
    /// token may be sent again unchanged, to any gateway, until a response comes.
    pub fn post(
        url: &Url,
        path: &str,
        deadline: Duration,
        token: Option<&IdempotencyHeaders>,
        media: Media,
        body: &[u8],
    ) -> Self {
        let mut bytes = head("POST", url, path, deadline, body.len());
        if let Some(IdempotencyHeaders { key, issued_at_ms }) = token {
            write!(bytes, "Idempotency-Key: \"{key}\"\r\n").expect("a Vec takes every byte");
            if let Some(at) = issued_at_ms {
                write!(bytes, "Idempotency-Issued-At: {at}\r\n").expect("a Vec takes every byte");
            }
        }
        let (media, length) = (media.name(), body.len());
        write!(bytes, "Content-Type: {media}\r\nContent-Length: {length}\r\n\r\n")
            .expect("a Vec takes every byte");
        bytes.extend_from_slice(body);
        Self { bytes }
    }
}

fn head(method: &str, url: &Url, path: &str, deadline: Duration, body_bytes: usize) -> Vec<u8> {
    // The capacity includes the rest of the head, so that one allocation is enough.
    let mut bytes = Vec::with_capacity(path.len() + body_bytes + 256);
    let (authority, deadline) = (url.authority(), deadline.as_millis());
    write!(
        bytes,
        "{method} {path} HTTP/1.1\r\nHost: {authority}\r\nRequest-Timeout-Ms: {deadline}\r\n"
    )
    .expect("a Vec takes every byte");
    bytes
}

/// A complete response.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct HttpResponse {
    /// The status code.
    pub status: u16,
    /// The `host:port` of the server.
    pub from: String,
    /// `Retry-After`, if it is a number of seconds.
    pub retry_after: Option<Duration>,
    /// `Content-Type`
    pub content_type: Option<String>,
    /// `Location`
    pub location: Option<String>,
    /// `Idempotent-Replayed: true`: the service had applied a request with this key before, and
    /// applied nothing now.
    pub replayed: bool,
    /// The decoded body.
    pub body: Vec<u8>,
}

/// The reason why there is no response, which decides what may be done next.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// No byte of the request left this process: it had no effect, and may be sent again anywhere.
    #[error("not sent: {0}")]
    NotSent(io::Error),
    /// At least one byte was sent and no complete response came: the request may or may not have
    /// had its effect.
    #[error("sent, but no answer: {0}")]
    Unanswered(io::Error),
    /// The first bytes that came back are not HTTP, so the server did not understand the request.
    #[error("the server there does not use HTTP/1.1")]
    NoHttp,
}

/// A connection to one server, which is opened by the first call and again after a failure.
#[derive(Debug)]
pub struct HttpConnection {
    url: Url,
    stream: Option<TcpStream>,
    /// Bytes that were read and not parsed yet. The buffer is empty between calls.
    input: Vec<u8>,
    /// True once a byte of the last request may have left this process.
    sent: bool,
}

impl HttpConnection {
    /// Returns a connection that the first call opens.
    pub fn new(url: Url) -> Self {
        Self { url, stream: None, input: Vec::new(), sent: false }
    }

    /// Returns the address of the server.
    pub fn url(&self) -> &Url {
        &self.url
    }

    /// Returns whether a byte of the last request may have left this process, for a call whose
    /// future was dropped.
    pub fn was_sent(&self) -> bool {
        self.sent
    }

    /// Sends `request` and waits for its response, no longer than `within`.
    ///
    /// If the future is dropped, the connection is closed, and [`was_sent`](Self::was_sent) returns
    /// whether the request may have had an effect.
    pub async fn call(
        &mut self,
        request: &HttpRequest,
        within: Duration,
    ) -> Result<HttpResponse, CallError> {
        let deadline = Instant::now() + within;
        self.sent = false;
        // The stream is taken out, and put back only after a complete response: a call that ends
        // early, by an error or because its future is dropped, leaves no half-used connection.
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
    ) -> Result<(HttpResponse, bool), CallError> {
        loop {
            let ResponseHead { mut response, length, stays } =
                self.receive_head(stream, is_fresh).await?;
            // 100 Continue and other 1xx responses precede the final response.
            if response.status < 200 {
                continue;
            }
            let body = &mut response.body;
            let received = match length {
                BodyLength::Bytes(bytes) => self.receive_sized(stream, bytes, body).await,
                BodyLength::Chunked => self.receive_chunked(stream, body).await,
                BodyLength::ToClose => self.receive_to_close(stream, body).await,
            };
            received.map_err(CallError::Unanswered)?;
            response.from = self.url.authority.clone();
            return Ok((response, stays));
        }
    }

    async fn receive_head(
        &mut self,
        stream: &mut TcpStream,
        is_fresh: bool,
    ) -> Result<ResponseHead, CallError> {
        loop {
            // On a reused connection, these bytes may be the end of an earlier response.
            if is_fresh && !may_be_http(&self.input) {
                return Err(CallError::NoHttp);
            }
            if let Some((head, bytes)) = parse_head(&self.input).map_err(CallError::Unanswered)? {
                self.input.drain(..bytes);
                return Ok(head);
            }
            if self.input.len() > HEAD_BYTES_MAX {
                let error = invalid("the head of the response does not end");
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
            return Err(invalid("the response is too long"));
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
                // Trailers follow, then an empty line.
                while !self.receive_line(stream).await?.is_empty() {}
                return Ok(());
            }
            self.receive_sized(stream, length, body).await?;
            if !self.receive_line(stream).await?.is_empty() {
                return Err(invalid("a chunk longer than its length"));
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
                return Err(invalid("a line of the response does not end"));
            }
            read_more(stream, &mut self.input).await?;
        }
    }
}

/// Connects to the first address of the host name that accepts. Each address has a time limit of
/// its own, so one that does not reply leaves the others their time.
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
            let texts = failures.iter().map(|(address, error)| format!("{address}: {error}"));
            Err(io::Error::new(kind, texts.collect::<Vec<_>>().join(", ")))
        }
    }
}

async fn within<T>(work: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    let late = || io::Error::new(io::ErrorKind::TimedOut, "no connection within 2 s");
    timeout(CONNECT_WITHIN, work).await.unwrap_or_else(|_| Err(late()))
}

/// Returns whether a response may begin with these bytes.
fn may_be_http(input: &[u8]) -> bool {
    let begin = b"HTTP/1.";
    input.iter().zip(begin).all(|(got, want)| got == want)
}

/// Returns whether a connection from an earlier call can still be used. A close by the server while
/// the connection was idle is noticed here, before anything is sent; later it would make the
/// outcome unknown.
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
            // A timer is needed in this case alone: most requests fit into the socket's buffer.
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

struct ResponseHead {
    /// The response without its sender and body.
    response: HttpResponse,
    length: BodyLength,
    stays: bool,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum BodyLength {
    Bytes(usize),
    Chunked,
    /// The body ends with the connection.
    ToClose,
}

/// Parses the head at the front of `input`. Returns it with its length, or `None` while it is
/// incomplete.
fn parse_head(input: &[u8]) -> io::Result<Option<(ResponseHead, usize)>> {
    let Some(end) = input.windows(4).position(|four| four == b"\r\n\r\n") else {
        return Ok(None);
    };
    // The headers of a proxy may contain any bytes, and its status counts all the same.
    let text = String::from_utf8_lossy(&input[..end]);
    let mut lines = text.split("\r\n");
    let first = lines.next().unwrap_or_default();
    let status = parse_status(first).ok_or_else(|| invalid("no status line"))?;
    let stays = first.starts_with("HTTP/1.1");
    let response = HttpResponse { status, ..HttpResponse::default() };
    let mut head = ResponseHead { response, length: BodyLength::Bytes(0), stays };
    // These responses have no body, regardless of their headers (RFC 9112 §6.3).
    let bodiless = status < 200 || status == 204 || status == 304;
    let mut framed = bodiless;
    for line in lines {
        let (name, value) = line.split_once(':').ok_or_else(|| invalid("a header without ':'"))?;
        let (is, value) = (|other: &str| name.eq_ignore_ascii_case(other), value.trim());
        if is("content-length") && !bodiless && head.length != BodyLength::Chunked {
            let length = value.parse().map_err(|_| invalid("a Content-Length without a number"))?;
            head.length = BodyLength::Bytes(length);
            framed = true;
        } else if is("transfer-encoding") && !bodiless {
            if !value.eq_ignore_ascii_case("chunked") {
                return Err(invalid("a Transfer-Encoding other than chunked"));
            }
            head.length = BodyLength::Chunked;
            framed = true;
        } else if is("connection") {
            let closes = |word: &str| word.trim().eq_ignore_ascii_case("close");
            head.stays &= !value.split(',').any(closes);
        } else if is("retry-after") {
            head.response.retry_after = value.parse().ok().map(Duration::from_secs);
        } else if is("content-type") {
            head.response.content_type = Some(value.to_owned());
        } else if is("location") {
            head.response.location = Some(value.to_owned());
        } else if is("idempotent-replayed") {
            head.response.replayed = value == "true";
        }
    }
    if !framed && status < 300 {
        return Err(invalid("a response without a length, whose end may be a broken connection"));
    }
    if !framed {
        (head.length, head.stays) = (BodyLength::ToClose, false);
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

/// Returns a path segment: every byte that is not unreserved is percent-encoded, `/` included.
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

    /// Accepts one connection and sends each of `turns` after one read, then closes it.
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
            let request = HttpRequest::get(&url, "/", WITHIN);
            match HttpConnection::new(url).call(&request, WITHIN).await {
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
    fn only_a_complete_response_counts() {
        check("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", "200 hi None");
        check("HTTP/1.1 503 X\r\nretry-after: 7\r\ncontent-length: 0\r\n\r\n", "503  Some(7)");
        check("HTTP/1.1 204 No\r\n\r\n", "204  None");
        check(
            "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\na",
            "200 a None",
        );
        check(
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n\
             2;x=y\r\nhi\r\nA\r\n0123456789\r\n0\r\nT: u\r\n\r\n",
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
        // A truncated body is not another protocol.
        check("HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}", "unanswered UnexpectedEof");
        // A body that ends with the connection may be complete or truncated.
        check("HTTP/1.1 200 OK\r\n\r\nhi", "unanswered InvalidData");
        check("HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", "unanswered InvalidData");
        check("HTTP/1.1 fine\r\n\r\n", "unanswered InvalidData");
        check("HTTP/1.1 200 OK\r\nno colon\r\n\r\n", "unanswered InvalidData");
        check("HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n", "unanswered InvalidData");
        check(
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nx\r\n",
            "unanswered InvalidData",
        );
        // For a failure, a complete status is enough.
        check("HTTP/1.0 501 X\r\n\r\nhi", "501 hi None");
        check("HTTP/1.1 404 X\r\nServer: ä\r\nContent-Length: 0\r\n\r\n", "404  None");
    }

    #[test]
    fn a_response_has_limits() {
        let long = "x".repeat(HEAD_BYTES_MAX + 1);
        let head = format!("HTTP/1.1 200 OK\r\nA: {long}");
        check(head.leak(), "unanswered InvalidData");
        let line = format!("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n{long}");
        check(line.leak(), "unanswered InvalidData");
        let body = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", BODY_BYTES_MAX + 1);
        check(body.leak(), "unanswered InvalidData");
    }

    #[test]
    fn another_protocol_is_named() {
        check("SSH-2.0-OpenSSH\r\n\r\n", "no HTTP");
        check("-ERR unknown command 'GET'\r\n", "no HTTP");
        check("\x15\x03\x01\0\x02\x02\x46", "no HTTP");
        // A truncated beginning may have been any protocol.
        check("HT", "unanswered UnexpectedEof");
    }

    #[test]
    fn headers_of_a_response_are_parsed() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let response = runtime.block_on(async {
            let head = "HTTP/1.1 301 Moved\r\nContent-Type: text/html\r\nlocation: https://a/\r\n";
            let rest = "Idempotent-Replayed: true\r\nContent-Length: 0\r\n\r\n";
            let url = serve(vec![[head, rest].concat().leak()]).await;
            let request = HttpRequest::get(&url, "/", WITHIN);
            HttpConnection::new(url).call(&request, WITHIN).await.unwrap()
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
        let request = HttpRequest::get(&url, "/", WITHIN);
        let got = HttpConnection::new(url).call(&request, WITHIN).await;
        assert!(matches!(got, Err(CallError::NotSent(_))), "{got:?}");
    }

    #[tokio::test]
    async fn a_connection_serves_many_calls() {
        let answer = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi";
        let url = serve(vec![answer, answer]).await;
        let request = HttpRequest::post(&url, "/", WITHIN, None, Media::Json, b"{}");
        let mut connection = HttpConnection::new(url);
        for _ in 0..2 {
            assert_eq!(connection.call(&request, WITHIN).await.unwrap().body, b"hi");
        }
        // The server has closed the connection and its listener.
        let third = connection.call(&request, WITHIN).await;
        assert!(third.is_err(), "{third:?}");
    }

    #[tokio::test]
    async fn silence_ends_at_the_deadline() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = Url::parse(&format!("http://{}", listener.local_addr().unwrap())).unwrap();
        let request = HttpRequest::get(&url, "/", WITHIN);
        let got = HttpConnection::new(url).call(&request, Duration::from_millis(50)).await;
        let Err(CallError::Unanswered(error)) = got else { panic!("{got:?}") };
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }

    #[tokio::test]
    async fn a_server_that_does_not_read_leaves_the_outcome_open() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = Url::parse(&format!("http://{}", listener.local_addr().unwrap())).unwrap();
        let body = vec![b'a'; 32 << 20];
        let request = HttpRequest::post(&url, "/", WITHIN, None, Media::Text, &body);
        let got = HttpConnection::new(url).call(&request, Duration::from_millis(50)).await;
        let Err(CallError::Unanswered(error)) = got else { panic!("{got:?}") };
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
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
        let bytes_of = |issued_at_ms| {
            let token = IdempotencyHeaders { key: "k-1".to_owned(), issued_at_ms };
            let request = HttpRequest::post(&url, "/", WITHIN, Some(&token), Media::Text, b"a");
            String::from_utf8(request.bytes).unwrap()
        };
        let begin = "POST / HTTP/1.1\r\nHost: a:80\r\nRequest-Timeout-Ms: 5000\r\n\
                     Idempotency-Key: \"k-1\"\r\n";
        let end = "Content-Type: text/plain\r\nContent-Length: 1\r\n\r\na";
        assert_eq!(bytes_of(None), format!("{begin}{end}"));
        assert_eq!(bytes_of(Some(7)), format!("{begin}Idempotency-Issued-At: 7\r\n{end}"));
    }

    #[test]
    fn path_segments() {
        assert_eq!(percent_encode(b"a/b c.%\xff~"), "a%2Fb%20c.%25%FF~");
    }
}
