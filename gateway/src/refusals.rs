//! Gives the refusals that hyper writes by itself the body that all others have.
//!
//! A head that is no HTTP, or too large, never becomes a request: hyper answers it with a bare 400, 414 or 431 and closes
//! the connection. A client that reads the outcome of every answer would find none there. So what hyper writes is looked
//! at on its way to the socket, and such a head gets a problem's headers and its body.
//!
//! To hyper a URL that does not fit its buffer is a head too large. So the first line end is looked for on its way in: as
//! long as there was none since the last request, it is the first line that is too long, and the answer 414.
//!
//! It can't be taken for anything else: no answer of ours has a status from 400 to 499 and no content, and no body of ours
//! ends like a head (JSON has no raw line ends, other pages have no `\r`).

use std::cell::Cell;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use hyper::StatusCode;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::metrics::{Counters, Operation};
use crate::problem::{Kind, Problem};
use crate::response;

const NO_CONTENT: &[u8] = b"\r\ncontent-length: 0\r\n";

/// A stream under hyper.
pub(crate) struct Refusals<T> {
    stream: T,
    /// A line has ended since the last request was answered.
    line_ended: Rc<Cell<bool>>,
    counters: Arc<Counters>,
    /// What is written in the place of hyper's refusal.
    ours: Option<Ours>,
}

struct Ours {
    bytes: Vec<u8>,
    written: usize,
    /// The length of what hyper wrote.
    instead_of: usize,
}

impl<T> Refusals<T> {
    pub(crate) fn new(stream: T, line_ended: Rc<Cell<bool>>, counters: Arc<Counters>) -> Self {
        Self { stream, line_ended, counters, ours: None }
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Refusals<T> {
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

impl<T: AsyncWrite + Unpin> AsyncWrite for Refusals<T> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let Self { stream, line_ended, counters, ours } = self.get_mut();
        if ours.is_none() {
            match bare_refusal(bytes) {
                None => return Pin::new(stream).poll_write(cx, bytes),
                // First what stands before it: answers to requests that came before.
                Some((at, _)) if at > 0 => return Pin::new(stream).poll_write(cx, &bytes[..at]),
                Some((_, status)) => {
                    let status = match status {
                        StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE if !line_ended.get() => {
                            StatusCode::URI_TOO_LONG
                        }
                        status => status,
                    };
                    counters.request(Operation::None, status.as_u16());
                    let instead = explained(bytes, status);
                    *ours = Some(Ours { bytes: instead, written: 0, instead_of: bytes.len() });
                }
            }
        }
        while let Some(Ours { bytes, written, instead_of }) = ours {
            if *written == bytes.len() {
                let done = *instead_of;
                *ours = None;
                return Poll::Ready(Ok(done));
            }
            match ready!(Pin::new(&mut *stream).poll_write(cx, &bytes[*written..]))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                n => *written += n,
            }
        }
        unreachable!("it was set above, and is only taken when it has been written")
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// Where in these bytes a refusal without content begins, if they end with one, and its status.
fn bare_refusal(bytes: &[u8]) -> Option<(usize, StatusCode)> {
    if !bytes.ends_with(b"\r\n\r\n") {
        return None;
    }
    let at = bytes.windows(7).rposition(|window| window == b"HTTP/1.")?;
    let head = &bytes[at..];
    let status = StatusCode::from_bytes(head.get(9..12)?).ok()?;
    let bare = status.is_client_error() && find(head, NO_CONTENT).is_some();
    bare.then_some((at, status))
}

/// The refusal of this head, with all that a problem has.
fn explained(head: &[u8], status: StatusCode) -> Vec<u8> {
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
            let detail = "this is no HTTP/1 request, or its headers contradict each other";
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
        let found = bare_refusal(bytes.as_bytes()).map(|(at, status)| (at, status.as_u16()));
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
        let text = String::from_utf8(explained(BARE.as_bytes(), StatusCode::URI_TOO_LONG)).unwrap();
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

    fn counters() -> Arc<Counters> {
        Arc::new(Counters::new(&mut telemetry::prometheus_client::registry::Registry::default()))
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
        let mut stream = Refusals::new(Narrow(Vec::new()), Rc::new(Cell::new(true)), counters());
        let mut cx = Context::from_waker(std::task::Waker::noop());
        let mut left = all.as_bytes();
        while !left.is_empty() {
            let Poll::Ready(Ok(taken)) = Pin::new(&mut stream).poll_write(&mut cx, left) else {
                panic!("it always takes some");
            };
            left = &left[taken..];
        }
        let explained = explained(BARE.as_bytes(), StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE);
        assert_eq!(stream.stream.0, [before.as_bytes(), &explained].concat());
    }
}
