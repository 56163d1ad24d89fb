//! A socket that is closed gently, unless its other side takes nothing.
//!
//! A socket closed with bytes unread is reset by the kernel, and a reset throws away what the other side has not read
//! yet: a client that sent too much would find its connection broken instead of the answer that says so. So after the
//! last answer the sending side is closed first, and what still comes is dropped for a moment.
//!
//! Who does not read makes us hold what is to be written, and hyper would wait for ever: after a while without a byte
//! taken the connection is broken.
//!
//! A connection that is to end although its client keeps it open ends only when nothing of it is in the socket: what was
//! sent before is still served. So it seems to hyper that the client has closed its side once there is nothing to read.

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

/// How long the other side has, to read and to close.
const LINGER: Duration = Duration::from_millis(500);
const LINGER_BYTES_MAX: usize = 1 << 20;

pub(crate) struct Gentle {
    stream: TcpStream,
    /// How long the other side may take nothing of what is to be written.
    patience: Duration,
    /// Since it does: until when.
    stalled: Option<Pin<Box<Sleep>>>,
    /// Since our side was closed: until when, and how much has been dropped.
    closing: Option<(Pin<Box<Sleep>>, usize)>,
    /// The other side has closed its own: nothing is on its way.
    ended: bool,
    /// It ends as soon as nothing can be read.
    ends: Rc<Cell<bool>>,
}

impl Gentle {
    pub(crate) fn new(stream: TcpStream, patience: Duration, ends: Rc<Cell<bool>>) -> Self {
        Self { stream, patience, stalled: None, closing: None, ended: false, ends }
    }

    /// Whether the kernel has something that nobody has read. The runtime may not know of it yet.
    fn has_more(&self) -> bool {
        let Ok(socket) = self.stream.as_fd().try_clone_to_owned() else { return false };
        std::net::TcpStream::from(socket).peek(&mut [0]).is_ok_and(|bytes| bytes > 0)
    }
}

impl AsyncRead for Gentle {
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

impl AsyncWrite for Gentle {
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
        let patience = self.patience;
        let timer = self.stalled.get_or_insert_with(|| Box::pin(sleep(patience)));
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
                // Reset by the other side: nothing to wait for either.
                Poll::Ready(Err(_)) => break,
                Poll::Pending => return timer.as_mut().poll(cx).map(Ok),
            }
        }
        Poll::Ready(Ok(()))
    }
}
