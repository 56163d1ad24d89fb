//! Open files: how many a process may have, and connections that leave enough of them for everything else.
//!
//! Every connection is a file. A process that has taken so many that it can open no other can't write the next segment of
//! its log, nor reach etcd; so it takes fewer than it could, leaves the others waiting in the kernel's queue, and goes on
//! taking them when some have gone. A connection that does not say which protocol it speaks is not kept.

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

/// Said no more often than this.
const SAY_EVERY: Duration = Duration::from_secs(60);
/// After a connection that could not be taken.
const AGAIN_AFTER: Duration = Duration::from_millis(50);
/// While a connection waits for a place.
const CROWDED_EVERY: Duration = Duration::from_millis(100);
/// A peer speaks first, and at once.
const PREFACE_WITHIN: Duration = Duration::from_secs(10);
/// What an HTTP/2 client's first bytes are, all of them (RFC 9113, 3.4). The server pings whoever has sent them.
const PREFACE_BYTES: usize = 24;
/// More are never counted, whatever the limit says.
const CONNECTIONS_MAX: u64 = 1 << 20;

/// Raises the soft limit to the hard one and returns how many files this process may have open.
///
/// The soft limit is often 1,024, for programs that use `select`, which can't count further. The hard one is what the
/// administrator allows.
pub fn allowed() -> u64 {
    let mut limit = getrlimit(Resource::Nofile);
    if limit.current != limit.maximum {
        limit.current = limit.maximum;
        if let Err(error) = setrlimit(Resource::Nofile, limit) {
            warn!(%error, "the limit of open files could not be raised");
        }
    }
    // None: no limit at all.
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}

/// The process may have too few files open to be of any use.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct TooFew {
    pub allowed: u64,
    /// As many are enough.
    pub least: u64,
}

impl Display for TooFew {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Self { allowed, least } = self;
        write!(
            f,
            "{allowed} open files are allowed, too few: raise the hard limit (ulimit -Hn, LimitNOFILE=) to {least} or more"
        )
    }
}

/// Connections that may be open at once if `kept` of the allowed files are for other things, and an eighth of all beside:
/// the more there may be of everything, the more peers there are.
pub fn connections(allowed: u64, kept: u64) -> Result<usize, TooFew> {
    const LEAST: u64 = 8;
    let left = allowed - allowed / 8;
    match left.checked_sub(kept).filter(|&left| left >= LEAST) {
        Some(left) => Ok(left.min(CONNECTIONS_MAX) as usize),
        None => Err(TooFew { allowed, least: with_an_eighth(kept.saturating_add(LEAST)) }),
    }
}

/// The smallest number of which so many are left without its eighth.
fn with_an_eighth(left: u64) -> u64 {
    left.saturating_add(left.saturating_sub(1) / 7)
}

/// The places that connections of one process share. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Connections {
    free: Arc<Semaphore>,
    max: usize,
    said: Arc<Mutex<Option<Instant>>>,
}

/// A connection's place, until dropped.
#[derive(Debug)]
pub struct Place(#[allow(dead_code)] OwnedSemaphorePermit);

impl Connections {
    pub fn new(max: usize) -> Self {
        Self { free: Arc::new(Semaphore::new(max)), max, said: Arc::default() }
    }

    /// The next connection that comes, once there is a place for it.
    pub async fn accept(&self, listener: &TcpListener) -> (TcpStream, Place) {
        self.accept_or(listener, || {}).await
    }

    /// The same. While the connection waits for a place, `crowded` is called now and then, so that others can be closed.
    pub async fn accept_or(
        &self,
        listener: &TcpListener,
        crowded: impl FnMut(),
    ) -> (TcpStream, Place) {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => return (stream, self.place(crowded).await),
                Err(error) => {
                    self.say(&error.to_string());
                    sleep(AGAIN_AFTER).await;
                }
            }
        }
    }

    /// Connections for a gRPC server, until it is dropped.
    pub fn incoming(&self, listener: TcpListener) -> ReceiverStream<io::Result<Counted>> {
        let connections = self.clone();
        let (tell, told) = mpsc::channel(1);
        tokio::spawn(async move {
            loop {
                let (stream, place) = tokio::select! {
                    accepted = connections.accept(&listener) => accepted,
                    () = tell.closed() => return,
                };
                if tell.send(Counted::new(stream, place)).await.is_err() {
                    return;
                }
            }
        });
        ReceiverStream::new(told)
    }

    async fn place(&self, mut crowded: impl FnMut()) -> Place {
        if let Ok(place) = self.free.clone().try_acquire_owned() {
            return Place(place);
        }
        self.say("as many are open as may be");
        loop {
            crowded();
            if let Ok(place) = timeout(CROWDED_EVERY, self.free.clone().acquire_owned()).await {
                return Place(place.expect("it is never closed"));
            }
        }
    }

    fn say(&self, why: &str) {
        let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        if said.is_none_or(|said| said.elapsed() >= SAY_EVERY) {
            *said = Some(Instant::now());
            let open = self.max - self.free.available_permits().min(self.max);
            warn!(
                why,
                open,
                max = self.max,
                "connections wait to be taken: raise the hard limit of open files (ulimit -Hn, LimitNOFILE=)"
            );
        }
    }
}

/// A connection that has a place.
#[derive(Debug)]
pub struct Counted {
    stream: TcpStream,
    /// When it is given up, while it has not sent its preface.
    silent: Option<Pin<Box<Sleep>>>,
    /// Bytes of the preface that have not come yet.
    preface_left: usize,
    _place: Place,
}

impl Counted {
    fn new(stream: TcpStream, place: Place) -> io::Result<Self> {
        // Messages are small and whole: waiting for more to send would only delay them.
        stream.set_nodelay(true)?;
        let silent = Some(Box::pin(sleep(PREFACE_WITHIN)));
        Ok(Self { stream, silent, preface_left: PREFACE_BYTES, _place: place })
    }
}

impl Connected for Counted {
    type ConnectInfo = TcpConnectInfo;

    fn connect_info(&self) -> TcpConnectInfo {
        self.stream.connect_info()
    }
}

impl AsyncRead for Counted {
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

impl AsyncWrite for Counted {
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
        let too_few = |allowed| Err(TooFew { allowed, least: 82 });
        assert_eq!(connections(1_024, 64), Ok(832));
        assert_eq!(connections(80, 64), too_few(80));
        assert_eq!(connections(90, 64), Ok(15));
        assert_eq!(connections(u64::MAX, 64), Ok(1 << 20));
        assert_eq!(connections(0, 64), too_few(0));
        assert!(connections(0, u64::MAX).is_err());
    }

    #[test]
    fn the_number_that_is_said_to_be_enough_is_the_smallest_that_is() {
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
            let connections = Connections::new(1);
            let mut clients = Vec::new();
            for _ in 0..2 {
                clients.push(TcpStream::connect(at).await.unwrap());
            }
            let mut first = Some(connections.accept(&listener).await);
            // The connection that has one gives it up when others wait.
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
                let (stream, place) = Connections::new(1).accept(&listener).await;
                let mut counted = Counted::new(stream, place).unwrap();
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
