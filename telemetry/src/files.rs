//! Open files: how many a process may have, and connections that leave enough of them for everything else.
//!
//! Every connection is a file. A process that has taken so many that it can open no other can't write the next segment of
//! its log, nor reach etcd; so it takes fewer than it could, leaves the others waiting in the kernel's queue, and goes on
//! taking them when some have gone. A connection that says nothing at all is not kept for ever.

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
const FIRST_BYTE_WITHIN: Duration = Duration::from_secs(10);
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

/// Connections that may be open at once if `kept` of the allowed files are for other things, and an eighth of all beside:
/// the more there may be of everything, the more peers there are. None if too few are left to be of any use.
pub fn connections(allowed: u64, kept: u64) -> Option<usize> {
    const LEAST: u64 = 8;
    let left = allowed.checked_sub(kept.saturating_add(allowed / 8))?;
    (left >= LEAST).then_some(left.min(CONNECTIONS_MAX) as usize)
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
    /// When it is given up, while it has said nothing.
    silent: Option<Pin<Box<Sleep>>>,
    _place: Place,
}

impl Counted {
    fn new(stream: TcpStream, place: Place) -> io::Result<Self> {
        // Messages are small and whole: waiting for more to send would only delay them.
        stream.set_nodelay(true)?;
        Ok(Self { stream, silent: Some(Box::pin(sleep(FIRST_BYTE_WITHIN))), _place: place })
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
        let read = Pin::new(&mut self.stream).poll_read(cx, buf);
        if read.is_ready() {
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
    use tokio::io::AsyncReadExt;

    use super::*;

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
    }

    #[test]
    fn something_is_kept_for_everything_else() {
        assert_eq!(connections(1_024, 64), Some(832));
        assert_eq!(connections(80, 64), None);
        assert_eq!(connections(90, 64), Some(15));
        assert_eq!(connections(u64::MAX, 64), Some(1 << 20));
        assert_eq!(connections(0, 64), None);
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
    fn a_connection_that_says_nothing_is_given_up() {
        runtime().block_on(async {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let _client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
            let (stream, place) = Connections::new(1).accept(&listener).await;
            let mut counted = Counted::new(stream, place).unwrap();
            counted.silent = Some(Box::pin(sleep(Duration::ZERO)));
            let read = counted.read_u8().await;
            assert_eq!(read.unwrap_err().kind(), io::ErrorKind::TimedOut);
        });
    }
}
