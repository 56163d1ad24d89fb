//! Open files: how many a process may have, and a limit of connections that leaves enough of them
//! for everything else.
//!
//! Every connection is a file. A process that has taken so many that it can open no other can
//! neither write the next segment of its log nor reach etcd. So it takes fewer than it could,
//! leaves the others in the kernel's backlog, and takes them when some have gone. A gRPC connection
//! that does not send its HTTP/2 preface is closed.

use std::fmt::{self, Display, Formatter};
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use rustix::process::{Resource, getrlimit, setrlimit};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::{Sleep, sleep, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::{Connected, TcpConnectInfo};
use tracing::warn;

/// The least interval between two log lines about connections that wait.
const LOG_EVERY: Duration = Duration::from_secs(60);
/// The pause after a connection that could not be accepted.
const AGAIN_AFTER: Duration = Duration::from_millis(50);
/// The interval in which idle connections may be closed while another one waits for a permit.
const CROWDED_EVERY: Duration = Duration::from_millis(100);
/// The longest time between a connection and its HTTP/2 preface: the client sends first, and at
/// once.
const PREFACE_WITHIN: Duration = Duration::from_secs(10);
/// The length of the HTTP/2 client preface (RFC 9113, 3.4). The server pings a client that has sent
/// it.
const PREFACE_BYTES: usize = 24;
/// The most connections that are ever allowed, however high the limit of open files is.
const CONNECTIONS_MAX: u64 = 1 << 20;

/// Raises the soft limit to the hard one and returns how many files this process may have open.
///
/// The soft limit is often 1,024, for programs that use `select`, which can't count further. The
/// hard one is what the administrator allows.
pub fn allowed() -> u64 {
    let mut limit = getrlimit(Resource::Nofile);
    if limit.current != limit.maximum {
        limit.current = limit.maximum;
        if let Err(error) = setrlimit(Resource::Nofile, limit) {
            warn!(%error, "could not raise the limit of open files");
        }
    }
    // `None` means that there is no limit.
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}

/// The process may have too few files open to be of any use.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct TooFewFiles {
    /// The number of open files that the process is allowed.
    pub allowed: u64,
    /// The smallest number of open files that is enough.
    pub least: u64,
}

impl Display for TooFewFiles {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Self { allowed, least } = self;
        write!(
            f,
            "{allowed} open files are allowed, too few: raise the hard limit (ulimit -Hn, \
             LimitNOFILE=) to {least} or more"
        )
    }
}

/// Returns how many connections may be open at once if `kept` of the allowed files are for other
/// things. An eighth of all files is left over as well: the more there may be of everything, the
/// more peers there are.
pub fn connections(allowed: u64, kept: u64) -> Result<usize, TooFewFiles> {
    const LEAST: u64 = 8;
    let left = allowed - allowed / 8;
    match left.checked_sub(kept).filter(|&left| left >= LEAST) {
        Some(left) => Ok(left.min(CONNECTIONS_MAX) as usize),
        None => Err(TooFewFiles { allowed, least: with_an_eighth(kept.saturating_add(LEAST)) }),
    }
}

/// Returns the smallest number of which `left` remain after an eighth of it is taken away.
fn with_an_eighth(left: u64) -> u64 {
    left.saturating_add(left.saturating_sub(1) / 7)
}

/// The connection permits of one process. Clones share them and are cheap.
#[derive(Clone, Debug)]
pub struct ConnectionLimit {
    free: Arc<Semaphore>,
    max: usize,
    last_logged: Arc<Mutex<Option<Instant>>>,
}

/// The permit of one connection. Dropping it lets another connection in.
#[derive(Debug)]
pub struct ConnectionPermit(#[allow(dead_code)] OwnedSemaphorePermit);

impl ConnectionLimit {
    /// Creates a limit of `max` open connections.
    pub fn new(max: usize) -> Self {
        Self { free: Arc::new(Semaphore::new(max)), max, last_logged: Arc::default() }
    }

    /// Accepts the next connection, once there is a permit for it.
    pub async fn accept(&self, listener: &TcpListener) -> (TcpStream, ConnectionPermit) {
        self.accept_or(listener, || {}).await
    }

    /// Accepts like [`accept`](Self::accept). While the connection waits for a permit, `crowded` is
    /// called now and then, so that the caller can close others.
    pub async fn accept_or(
        &self,
        listener: &TcpListener,
        crowded: impl FnMut(),
    ) -> (TcpStream, ConnectionPermit) {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => return (stream, self.place(crowded).await),
                Err(error) => {
                    self.log(&error.to_string());
                    sleep(AGAIN_AFTER).await;
                }
            }
        }
    }

    /// Returns the accepted connections as a stream for a gRPC server. Dropping it stops accepting.
    pub fn incoming(&self, listener: TcpListener) -> ReceiverStream<io::Result<LimitedStream>> {
        let connections = self.clone();
        let (sender, accepted) = mpsc::channel(1);
        tokio::spawn(async move {
            loop {
                let (stream, place) = tokio::select! {
                    accepted = connections.accept(&listener) => accepted,
                    () = sender.closed() => return,
                };
                if sender.send(LimitedStream::new(stream, place)).await.is_err() {
                    return;
                }
            }
        });
        ReceiverStream::new(accepted)
    }

    async fn place(&self, mut crowded: impl FnMut()) -> ConnectionPermit {
        if let Ok(place) = self.free.clone().try_acquire_owned() {
            return ConnectionPermit(place);
        }
        self.log("the limit of open connections is reached");
        loop {
            crowded();
            if let Ok(place) = timeout(CROWDED_EVERY, self.free.clone().acquire_owned()).await {
                return ConnectionPermit(place.expect("the semaphore is never closed"));
            }
        }
    }

    fn log(&self, why: &str) {
        let mut last_logged = self.last_logged.lock().unwrap_or_else(PoisonError::into_inner);
        if last_logged.is_none_or(|at| at.elapsed() >= LOG_EVERY) {
            *last_logged = Some(Instant::now());
            let open = self.max - self.free.available_permits().min(self.max);
            warn!(
                why,
                open,
                max = self.max,
                "connections wait to be accepted: raise the hard limit of open files (ulimit -Hn, \
                 LimitNOFILE=)"
            );
        }
    }
}

/// A TCP connection with a permit.
#[derive(Debug)]
pub struct LimitedStream {
    stream: TcpStream,
    /// Ends the connection if its preface has not come by then; `None` once the preface has come.
    silent: Option<Pin<Box<Sleep>>>,
    /// The number of bytes of the preface that have not come yet.
    preface_left: usize,
    _place: ConnectionPermit,
}

impl LimitedStream {
    fn new(stream: TcpStream, place: ConnectionPermit) -> io::Result<Self> {
        // Messages are small and written as a whole: Nagle's algorithm would only delay them.
        stream.set_nodelay(true)?;
        let silent = Some(Box::pin(sleep(PREFACE_WITHIN)));
        Ok(Self { stream, silent, preface_left: PREFACE_BYTES, _place: place })
    }
}

impl Connected for LimitedStream {
    type ConnectInfo = TcpConnectInfo;

    fn connect_info(&self) -> TcpConnectInfo {
        self.stream.connect_info()
    }
}

impl AsyncRead for LimitedStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(cx, buf);
        self.preface_left = self.preface_left.saturating_sub(buf.filled().len() - before);
        if self.preface_left == 0 {
            self.silent = None;
        } else if let Some(silent) = &mut self.silent
            && silent.as_mut().poll(cx).is_ready()
        {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        read
    }
}

impl AsyncWrite for LimitedStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, pieces)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
    }

    #[test]
    fn something_is_kept_for_everything_else() {
        let too_few = |allowed| Err(TooFewFiles { allowed, least: 82 });
        assert_eq!(connections(1_024, 64), Ok(832));
        assert_eq!(connections(80, 64), too_few(80));
        assert_eq!(connections(90, 64), Ok(15));
        assert_eq!(connections(u64::MAX, 64), Ok(1 << 20));
        assert_eq!(connections(0, 64), too_few(0));
        assert!(connections(0, u64::MAX).is_err());
    }

    #[test]
    fn the_number_that_is_reported_as_enough_is_the_smallest_that_is() {
        for kept in 0..2_000 {
            let least = connections(0, kept).unwrap_err().least;
            assert_eq!(connections(least, kept), Ok(8), "{kept}");
            assert!(connections(least - 1, kept).is_err(), "{kept}");
        }
    }

    #[test]
    fn a_connection_beyond_the_last_place_waits_until_one_goes() {
        runtime().block_on(async {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let at = listener.local_addr().unwrap();
            let connections = ConnectionLimit::new(1);
            let mut clients = Vec::new();
            for _ in 0..2 {
                clients.push(TcpStream::connect(at).await.unwrap());
            }
            let mut first = Some(connections.accept(&listener).await);
            // The connection with the permit releases it when others wait.
            let mut waits = 0;
            let make_room = || {
                waits += 1;
                first.take_if(|_| waits == 2);
            };
            connections.accept_or(&listener, make_room).await;
            assert_eq!(waits, 2);
        });
    }

    #[test]
    fn a_connection_that_does_not_send_its_preface_is_given_up() {
        runtime().block_on(async {
            for sent in [0, 1, PREFACE_BYTES - 1, PREFACE_BYTES, PREFACE_BYTES + 1] {
                let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
                let mut client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
                let (stream, place) = ConnectionLimit::new(1).accept(&listener).await;
                let mut counted = LimitedStream::new(stream, place).unwrap();
                client.write_all(&vec![b'P'; sent]).await.unwrap();
                counted.read_exact(&mut vec![0; sent]).await.unwrap();
                let kept = counted.silent.take().is_none();
                assert_eq!(kept, sent >= PREFACE_BYTES, "{sent} bytes");
                if !kept {
                    counted.silent = Some(Box::pin(sleep(Duration::ZERO)));
                    let read = counted.read_u8().await;
                    assert_eq!(read.unwrap_err().kind(), io::ErrorKind::TimedOut, "{sent} bytes");
                }
            }
        });
    }
}
