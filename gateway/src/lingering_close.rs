//! A socket with a lingering close and a write timeout.
//!
//! The kernel resets a socket that is closed with bytes unread, and a reset discards what the
//! client has not read yet: a client that sent too much would find its connection broken instead of
//! the answer with the reason. Therefore the sending side is closed first, after the last answer,
//! and input is read and dropped for a moment.
//!
//! A client that does not read makes the gateway hold the answer, and hyper has no timeout for it:
//! the connection is broken once no byte was written for a while.
//!
//! When the gateway ends a connection that its client keeps open, requests that are already in the
//! socket are still served. To that end the stream reports end of input to hyper once there is
//! nothing more to read.

use std::cell::Cell;
use std::io;
use std::os::fd::AsFd;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Sleep, sleep};

/// The time that the client has to read the last answer and to close its side.
const LINGER: Duration = Duration::from_millis(500);
/// The most input that is dropped meanwhile.
const LINGER_BYTES_MAX: usize = 1 << 20;

/// A socket that is closed only after its client has had time to read.
pub(crate) struct LingeringStream {
    stream: TcpStream,
    /// The time for which a write may wait for the client to read.
    write_timeout: Duration,
    /// Runs while a write waits.
    stalled: Option<Pin<Box<Sleep>>>,
    /// Since our side was closed: the end of the wait, and the number of bytes dropped so far.
    closing: Option<(Pin<Box<Sleep>>, usize)>,
    /// The client has closed its side: no more input will come.
    ended: bool,
    /// The connection is to end as soon as there is nothing to read.
    ends: Rc<Cell<bool>>,
}

impl LingeringStream {
    pub(crate) fn new(stream: TcpStream, write_timeout: Duration, ends: Rc<Cell<bool>>) -> Self {
        Self { stream, write_timeout, stalled: None, closing: None, ended: false, ends }
    }

    /// Returns whether the kernel has unread input. The runtime may not know of it yet.
    fn has_more(&self) -> bool {
        let Ok(socket) = self.stream.as_fd().try_clone_to_owned() else { return false };
        std::net::TcpStream::from(socket).peek(&mut [0]).is_ok_and(|bytes| bytes > 0)
    }
}

impl AsyncRead for LingeringStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(cx, buffer);
        if let Poll::Ready(Ok(())) = read {
            self.ended = buffer.filled().len() == before;
        }
        if read.is_pending() && self.ends.get() && !self.has_more() {
            return Poll::Ready(Ok(()));
        }
        read
    }
}

impl AsyncWrite for LingeringStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, bytes);
        if written.is_ready() {
            self.stalled = None;
            return written;
        }
        let timeout = self.write_timeout;
        let timer = self.stalled.get_or_insert_with(|| Box::pin(sleep(timeout)));
        timer.as_mut().poll(cx).map(|()| Err(io::ErrorKind::TimedOut.into()))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Self { stream, closing, ended, .. } = self.get_mut();
        if closing.is_none() {
            std::task::ready!(Pin::new(&mut *stream).poll_shutdown(cx))?;
        }
        let (timer, dropped) = closing.get_or_insert_with(|| (Box::pin(sleep(LINGER)), 0));
        let mut bytes = [0; 16 << 10];
        while !*ended && *dropped < LINGER_BYTES_MAX {
            let mut buffer = ReadBuf::new(&mut bytes);
            match Pin::new(&mut *stream).poll_read(cx, &mut buffer) {
                Poll::Ready(Ok(())) => {
                    *ended = buffer.filled().is_empty();
                    *dropped += buffer.filled().len();
                }
                // Reset by the client: nothing more will come.
                Poll::Ready(Err(_)) => break,
                Poll::Pending => return timer.as_mut().poll(cx).map(Ok),
            }
        }
        Poll::Ready(Ok(()))
    }
}
