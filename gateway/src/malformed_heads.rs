//! Adds a problem body to the answers that hyper itself gives to malformed request heads.
//!
//! A head that is not HTTP, or too large, never becomes a request: hyper answers it with a bare
//! 400, 414 or 431 and closes the connection. A client that reads the outcome of every answer would
//! find none. Therefore this stream inspects what hyper writes to the socket, and replaces such an
//! answer by one with the headers and the body of a problem.
//!
//! To hyper, a URL that does not fit its buffer is a head that is too large (431). Therefore the
//! stream looks for a line end in the input: as long as there was none since the last request, the
//! first line is too long, and the answer is 414.
//!
//! No other answer is replaced by mistake: no answer of the gateway has a status from 400 to 499
//! and no content, and no body of the gateway ends like a head (JSON has no raw line ends, other
//! pages have no `\r`).

use std::cell::Cell;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use hyper::StatusCode;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::metrics::{GatewayMetrics, Operation};
use crate::problem::{Kind, Problem};
use crate::response;

const NO_CONTENT: &[u8] = b"\r\ncontent-length: 0\r\n";

/// The stream between hyper and the socket.
pub(crate) struct MalformedHeadStream<T> {
    stream: T,
    /// A line has ended since the last request was answered.
    line_ended: Rc<Cell<bool>>,
    counters: Arc<GatewayMetrics>,
    /// The answer that is being written instead of hyper's.
    replacement: Option<Replacement>,
}

struct Replacement {
    bytes: Vec<u8>,
    written: usize,
    /// The length of the answer that hyper wrote.
    replaced_bytes: usize,
}

impl<T> MalformedHeadStream<T> {
    pub(crate) fn new(
        stream: T,
        line_ended: Rc<Cell<bool>>,
        counters: Arc<GatewayMetrics>,
    ) -> Self {
        Self { stream, line_ended, counters, replacement: None }
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for MalformedHeadStream<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(cx, buffer);
        if !self.line_ended.get() {
            let new = buffer.filled().get(before..).unwrap_or_default();
            self.line_ended.set(new.contains(&b'\n'));
        }
        read
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for MalformedHeadStream<T> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let Self { stream, line_ended, counters, replacement } = self.get_mut();
        if replacement.is_none() {
            match bare_error(bytes) {
                None => return Pin::new(stream).poll_write(cx, bytes),
                // The answers to earlier requests, which stand before it, are written first.
                Some((at, _)) if at > 0 => return Pin::new(stream).poll_write(cx, &bytes[..at]),
                Some((_, status)) => {
                    let status = match status {
                        StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE if !line_ended.get() => {
                            StatusCode::URI_TOO_LONG
                        }
                        status => status,
                    };
                    counters.count_request(Operation::None, status.as_u16());
                    let replaced_bytes = bytes.len();
                    let bytes = with_problem_body(bytes, status);
                    *replacement = Some(Replacement { bytes, written: 0, replaced_bytes });
                }
            }
        }
        while let Some(Replacement { bytes, written, replaced_bytes }) = replacement {
            if *written == bytes.len() {
                let done = *replaced_bytes;
                *replacement = None;
                return Poll::Ready(Ok(done));
            }
            match ready!(Pin::new(&mut *stream).poll_write(cx, &bytes[*written..]))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                n => *written += n,
            }
        }
        unreachable!("it was set above, and is only removed once it has been written")
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// The offset and the status of an error answer without content, if `bytes` end with one.
fn bare_error(bytes: &[u8]) -> Option<(usize, StatusCode)> {
    if !bytes.ends_with(b"\r\n\r\n") {
        return None;
    }
    let at = bytes.windows(7).rposition(|window| window == b"HTTP/1.")?;
    let head = &bytes[at..];
    let status = StatusCode::from_bytes(head.get(9..12)?).ok()?;
    let bare = status.is_client_error() && find(head, NO_CONTENT).is_some();
    bare.then_some((at, status))
}

/// The bare answer `head` with the status, headers and body of a problem.
fn with_problem_body(head: &[u8], status: StatusCode) -> Vec<u8> {
    let body = response::problem_body(&problem(status));
    let line = find(head, b"\r\n").unwrap_or(head.len());
    let content = find(head, NO_CONTENT).unwrap_or(head.len());
    let mut out = format!("HTTP/1.1 {status}").into_bytes();
    out.extend_from_slice(head.get(line..content).unwrap_or_default());
    let kind = response::PROBLEM;
    let length = body.len();
    let headers = format!(
        "\r\ncontent-type: {kind}\r\ncache-control: no-store\r\ncontent-length: {length}\r\n"
    );
    out.extend(headers.bytes());
    out.extend_from_slice(head.get(content + NO_CONTENT.len()..).unwrap_or_default());
    out.extend(body);
    out
}

fn problem(status: StatusCode) -> Problem {
    match status {
        StatusCode::URI_TOO_LONG => Problem::new(Kind::UrlTooLong, "a URL may have 8 KiB"),
        StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE => {
            let detail = "the headers are too many (64 lines) or too large (32 KiB, URL and all)";
            Problem { status, ..Problem::new(Kind::TooLarge, detail) }
        }
        _ => {
            let detail = "this is not an HTTP/1 request, or its headers contradict each other";
            Problem { status, ..Problem::new(Kind::BadInput, detail) }
        }
    }
}

fn find(bytes: &[u8], what: &[u8]) -> Option<usize> {
    bytes.windows(what.len()).position(|window| window == what)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(bytes: &str, want: Option<(usize, u16)>) {
        let found = bare_error(bytes.as_bytes()).map(|(at, status)| (at, status.as_u16()));
        assert_eq!(found, want);
    }

    const BARE: &str =
        "HTTP/1.1 431 X\r\nconnection: close\r\ncontent-length: 0\r\ndate: d\r\n\r\n";

    #[test]
    fn only_a_refusal_without_content_is_hypers_own() {
        check(BARE, Some((0, 431)));
        check(&format!("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{{}}{BARE}"), Some((40, 431)));
        check("HTTP/1.1 100 Continue\r\n\r\n", None);
        check("HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", None);
        // An answer of ours to HEAD.
        check("HTTP/1.1 404 X\r\ncontent-length: 99\r\n\r\n", None);
        check("HTTP/1.1 404 X\r\ncontent-length: 2\r\n\r\n{}", None);
        // Cut short, as it may come after a write of its first half.
        check("content-length: 0\r\n\r\n", None);
    }

    #[test]
    fn a_refusal_keeps_its_head_and_gets_a_body() {
        let text = String::from_utf8(with_problem_body(BARE.as_bytes(), StatusCode::URI_TOO_LONG))
            .unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        let length = format!("content-length: {}", body.len());
        let lines: Vec<_> = head.split("\r\n").collect();
        let content_type = "content-type: application/problem+json";
        let stored = "cache-control: no-store";
        let want = [
            "HTTP/1.1 414 URI Too Long",
            "connection: close",
            content_type,
            stored,
            &length,
            "date: d",
        ];
        assert_eq!(lines, want);
        assert!(body.contains(r#""outcome":"not-applied""#), "{body}");
    }

    fn counters() -> Arc<GatewayMetrics> {
        Arc::new(GatewayMetrics::register(
            &mut telemetry::prometheus_client::registry::Registry::default(),
        ))
    }

    /// A socket that takes three bytes at a time.
    struct Narrow(Vec<u8>);

    impl AsyncWrite for Narrow {
        fn poll_write(
            mut self: Pin<&mut Self>,
            _cx: &mut Context<'_>,
            bytes: &[u8],
        ) -> Poll<io::Result<usize>> {
            let taken = bytes.len().min(3);
            self.0.extend_from_slice(&bytes[..taken]);
            Poll::Ready(Ok(taken))
        }

        fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    #[test]
    fn it_is_whole_however_little_the_socket_takes() {
        let before = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}";
        let all = format!("{before}{BARE}");
        let mut stream =
            MalformedHeadStream::new(Narrow(Vec::new()), Rc::new(Cell::new(true)), counters());
        let mut cx = Context::from_waker(std::task::Waker::noop());
        let mut left = all.as_bytes();
        while !left.is_empty() {
            let Poll::Ready(Ok(taken)) = Pin::new(&mut stream).poll_write(&mut cx, left) else {
                panic!("it always takes some");
            };
            left = &left[taken..];
        }
        let with_problem_body =
            with_problem_body(BARE.as_bytes(), StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE);
        assert_eq!(stream.stream.0, [before.as_bytes(), &with_problem_body].concat());
    }
}
