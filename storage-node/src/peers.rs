//! Dials every other store there is, and keeps it dialled.
//!
//! Which stores there are is heard from etcd, from `node/` and `store/` alike: a lease that vanished is no reason to
//! stop feeding a node, and a node that starts while all leases are gone must find the others too. Each store has one
//! task; it dials the newest boot that was heard of, at the address that came with it.
//!
//! ```text
//!   dial ──▶ Follow ──▶ stands: messages both ways ──▶ closed ──▶ dial …
//!     │ refused               a killed process is noticed here, by two refusals 50 ms apart:
//!     └─ wait ──▶ dial …      about 100 ms after it died, not a second
//! ```

use std::collections::BTreeMap;
use std::error::Error;
use std::io;
use std::time::Duration;

use engine::ids::{Conn, StoreBoot, StoreId};
use engine::message::FromFollower;
use engine::node::Event;
use proto::wire;
use proto::wire::peer_client::PeerClient;
use telemetry::Vital;
use tokio::sync::watch;
use tokio::time::{Instant, timeout};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tonic::transport::{Channel, Endpoint};
use tracing::{debug, info, warn};

use crate::inbox::{Inbox, Told};
use crate::outbox::{Closed, Outbox};

/// On a local network a connection takes a millisecond; a peer that needs this long is not there.
const DIAL_TIMEOUT: Duration = Duration::from_secs(1);
/// Between the two refusals that tell a dead process from one that is just opening its port.
const REFUSED_AGAIN_AFTER: Duration = Duration::from_millis(50);
/// A peer that is away is tried this often at least: it should be fed soon when it is back.
const DIAL_EVERY_MAX: Duration = Duration::from_millis(500);
/// A connection that lasted this long was a good one.
const GOOD_AFTER: Duration = Duration::from_secs(1);

/// A machine that vanished without a word is found out by a ping. (A process that is stopped is, too; that harms nobody.)
pub const PING_EVERY: Duration = Duration::from_secs(5);
pub const PING_TIMEOUT: Duration = Duration::from_secs(10);

/// How much nodes send each other.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Of HTTP/2, for each stream, in bytes: less than 2³⁰, since for a connection it is twice that
    /// and HTTP/2 allows 2³¹ - 1. Shipped it is larger than what a stream has under way by the
    /// engine's window, so that HTTP/2 does not hold it up.
    pub stream_window: u32,
    /// Of packed rows, for each whole copy on its way.
    pub copy_bytes_per_second: u64,
}

impl Default for Limits {
    /// What `--stream-window-bytes` and `--copy-rate` are if not set. A copy: a fifth of what a plain
    /// SSD reads, half of a gigabit.
    fn default() -> Self {
        Self { stream_window: 8 << 20, copy_bytes_per_second: 64_000_000 }
    }
}

impl Limits {
    pub(crate) fn connection_window(self) -> u32 {
        self.stream_window.saturating_mul(2)
    }
}

/// A run of a store, and where it listens.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Target {
    pub peer: StoreBoot,
    pub address: String,
}

/// All peers that were heard of.
#[derive(Debug)]
pub struct Peers {
    me: StoreId,
    dialler: Dialler,
    known: BTreeMap<StoreId, watch::Sender<Target>>,
}

#[derive(Clone, Debug)]
struct Dialler {
    cluster: u128,
    inbox: Inbox,
    limits: Limits,
    vital: Vital,
}

impl Peers {
    pub fn new(me: StoreId, cluster: u128, inbox: Inbox, limits: Limits, vital: Vital) -> Self {
        Self { me, dialler: Dialler { cluster, inbox, limits, vital }, known: BTreeMap::new() }
    }

    /// A store was heard of. An older boot than the one known is no news.
    pub fn meet(&mut self, target: Target) {
        let store = target.peer.store;
        if store == self.me {
            return;
        }
        match self.known.get(&store) {
            Some(known) => {
                known.send_if_modified(|known| {
                    let news = target.peer.boot >= known.peer.boot && *known != target;
                    if news {
                        *known = target;
                    }
                    news
                });
            }
            None => {
                let (sender, receiver) = watch::channel(target);
                let dialler = self.dialler.clone();
                tokio::spawn(
                    self.dialler.vital.job("a link to a node", dialler.keep_dialled(receiver)),
                );
                self.known.insert(store, sender);
            }
        }
    }

    /// The store is gone for good: it is not dialled any more.
    pub fn forget(&mut self, store: StoreId) {
        self.known.remove(&store);
    }
}

/// How a dial failed.
#[derive(Debug)]
enum NotDialled {
    /// The machine answers and nobody listens there.
    Refused,
    Other(String),
}

impl Dialler {
    /// Until the store is forgotten.
    async fn keep_dialled(self, mut target: watch::Receiver<Target>) {
        let mut refusals = 0u32;
        let mut pause = Pause::default();
        loop {
            let goal = target.borrow_and_update().clone();
            match self.dial(&goal).await {
                Ok(link) => {
                    refusals = 0;
                    let since = Instant::now();
                    self.serve(&goal, link, &mut target).await;
                    if since.elapsed() >= GOOD_AFTER {
                        pause = Pause::default();
                    }
                }
                Err(NotDialled::Refused) => {
                    refusals = refusals.saturating_add(1);
                    if refusals == 1 {
                        pause.next = REFUSED_AGAIN_AFTER;
                    }
                    if refusals == 2 {
                        self.inbox.event(Event::PeerRefused { store: goal.peer.store });
                    }
                }
                Err(NotDialled::Other(why)) => {
                    refusals = 0;
                    debug!(peer = %goal.peer.store, address = goal.address, why, "not dialled");
                }
            }
            tokio::select! {
                biased;
                changed = target.changed() => match changed {
                    Ok(()) => (refusals, pause) = (0, Pause::default()),
                    Err(_) => return,
                },
                () = pause.wait() => {}
            }
        }
    }

    /// A stream to the peer.
    async fn dial(&self, goal: &Target) -> Result<Link, NotDialled> {
        let channel = connect(&goal.address, self.limits, DIAL_TIMEOUT).await?;
        let conn = self.inbox.fresh_conn();
        let (outbox, messages, closed) = Outbox::dialled(goal.peer, goal.address.clone());
        let first = tokio_stream::once(wire::ToFollower::opening(self.cluster, conn.0));
        let rest = ReceiverStream::new(messages).map(wire::ToFollower::from);
        let mut client = proto::limited!(PeerClient::new(channel));
        let stream = match timeout(DIAL_TIMEOUT, client.follow(first.chain(rest))).await {
            Ok(Ok(stream)) => stream.into_inner(),
            Ok(Err(status)) => {
                if status.code() == tonic::Code::FailedPrecondition {
                    warn!(address = goal.address, why = status.message(), "peer refuses this node");
                }
                return Err(NotDialled::Other(status.message().to_owned()));
            }
            Err(_) => return Err(NotDialled::Other("no answer".into())),
        };
        Ok(Link { conn, outbox, closed, stream, _client: client })
    }

    /// Passes on what the peer says, until the connection ends or another run of the store is to be dialled.
    async fn serve(&self, goal: &Target, link: Link, target: &mut watch::Receiver<Target>) {
        let Link { conn, outbox, mut closed, mut stream, _client } = link;
        info!(peer = %goal.peer.store, boot = goal.peer.boot.0, address = goal.address, "peer dialled");
        self.inbox.tell(Told::Opened { conn, outbox });
        let why = loop {
            let message = tokio::select! {
                message = stream.message() => message,
                _ = &mut closed => break "closed here".to_owned(),
                _ = target.changed() => break "another run of it is known".to_owned(),
            };
            let message = match message {
                Ok(Some(message)) => message,
                Ok(None) => break "closed by the peer".to_owned(),
                Err(status) => break status.message().to_owned(),
            };
            let room = self.inbox.peers.room(0).await;
            match FromFollower::try_from(message) {
                Ok(message) => {
                    let event = Event::FromFollower { conn, message };
                    if !self.inbox.tell(Told::Received(event, room)) {
                        return;
                    }
                }
                Err(invalid) => break invalid.to_string(),
            }
        };
        info!(peer = %goal.peer.store, boot = goal.peer.boot.0, why, "peer connection ended");
        self.inbox.event(Event::Closed { conn });
    }
}

/// A connection that is about to stand.
struct Link {
    conn: Conn,
    outbox: Outbox,
    closed: Closed,
    stream: Streaming<wire::FromFollower>,
    /// The stream ends when its channel goes.
    _client: PeerClient<Channel>,
}

/// Longer each time, up to a limit.
struct Pause {
    next: Duration,
}

impl Default for Pause {
    fn default() -> Self {
        Self { next: Duration::from_millis(1) }
    }
}

impl Pause {
    async fn wait(&mut self) {
        tokio::time::sleep(self.next).await;
        self.next = (self.next * 2).max(REFUSED_AGAIN_AFTER).min(DIAL_EVERY_MAX);
    }
}

/// A connection to a node, with the settings that all of ours have.
async fn connect(address: &str, limits: Limits, limit: Duration) -> Result<Channel, NotDialled> {
    let endpoint =
        endpoint(address, limits).map_err(|error| NotDialled::Other(error.to_string()))?;
    match timeout(limit, endpoint.connect()).await {
        Ok(Ok(channel)) => Ok(channel),
        Ok(Err(error)) if is_refused(&error) => Err(NotDialled::Refused),
        Ok(Err(error)) => Err(NotDialled::Other(error.to_string())),
        Err(_) => Err(NotDialled::Other("no connection in time".into())),
    }
}

/// How a node is dialled.
pub fn endpoint(address: &str, limits: Limits) -> Result<Endpoint, tonic::transport::Error> {
    let endpoint = Endpoint::from_shared(format!("http://{address}"))?
        .connect_timeout(DIAL_TIMEOUT)
        .tcp_nodelay(true)
        .initial_stream_window_size(limits.stream_window)
        .initial_connection_window_size(limits.connection_window())
        .http2_keep_alive_interval(PING_EVERY)
        .keep_alive_timeout(PING_TIMEOUT)
        .keep_alive_while_idle(true);
    Ok(endpoint)
}

/// The machine answered that nobody listens. tonic says so only somewhere among the causes.
fn is_refused(error: &(dyn Error + 'static)) -> bool {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(io) = error.downcast_ref::<io::Error>()
            && io.kind() == io::ErrorKind::ConnectionRefused
        {
            return true;
        }
        cause = error.source();
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `PeerRefused` hangs on how tonic and hyper wrap an error: this fails when an update changes it.
    #[tokio::test]
    async fn a_refused_connection_is_told_from_others() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        drop(listener);
        let refused = connect(&address, Limits::default(), DIAL_TIMEOUT).await.unwrap_err();
        assert!(matches!(refused, NotDialled::Refused), "{refused:?}");
        let other =
            connect("no such host.invalid:1", Limits::default(), DIAL_TIMEOUT).await.unwrap_err();
        assert!(matches!(other, NotDialled::Other(_)), "{other:?}");
    }
}
