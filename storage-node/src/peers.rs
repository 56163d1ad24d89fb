//! Dials every other store, and keeps the connection open.
//!
//! The stores are known from etcd, from `node/` and `store/` alike: a lease that vanished is no
//! reason to stop feeding a node, and a node that starts while all leases are gone must find the
//! others too. Each store has one task; it dials the newest known boot, at the address that came
//! with it.
//!
//! ```text
//!   dial ──▶ Follow ──▶ open: messages both ways ──▶ closed ──▶ dial …
//!     │ refused               a killed process is noticed here, by two refusals 50 ms apart:
//!     └─ wait ──▶ dial …      about 100 ms after it died, not a second
//! ```

use std::collections::BTreeMap;
use std::time::Duration;

use engine::ids::{Conn, StoreBoot, StoreId};
use engine::message::FromFollower;
use engine::node::Event;
use process::{CONNECT_TIMEOUT, Pings, is_refused};
use proto::wire;
use proto::wire::peer_client::PeerClient;
use telemetry::CriticalTasks;
use tokio::sync::watch;
use tokio::time::{Instant, timeout};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tonic::transport::{Channel, Endpoint};
use tracing::{debug, info, warn};

use crate::inbox::{Inbox, LoopMessage};
use crate::outbox::{Closed, Outbox};

/// The pause between the two refusals that distinguish a dead process from one that is just opening
/// its port.
const REFUSED_AGAIN_AFTER: Duration = Duration::from_millis(50);
/// The longest pause between two dials: a peer should be fed soon after it is back.
const DIAL_EVERY_MAX: Duration = Duration::from_millis(500);
/// The duration of a connection after which the backoff is reset.
const GOOD_AFTER: Duration = Duration::from_secs(1);

/// The pings on every connection between nodes.
pub const PINGS: Pings = Pings { every: Duration::from_secs(5), timeout: Duration::from_secs(10) };

/// The limits of traffic between nodes.
#[derive(Clone, Copy, Debug)]
pub struct PeerLimits {
    /// The HTTP/2 window of each stream, in bytes: less than 2³⁰, since a connection's window is
    /// twice that and HTTP/2 allows 2³¹ - 1. The default is larger than what a stream has in flight
    /// by the engine's window, so that HTTP/2 does not delay it.
    pub stream_window: u32,
    /// The rate of packed rows of each snapshot in transfer, in bytes per second.
    pub snapshot_bytes_per_second: u64,
}

impl Default for PeerLimits {
    /// The defaults of `--stream-window-bytes` and `--copy-rate`. The rate is a fifth of what a
    /// plain SSD reads, and half of a gigabit.
    fn default() -> Self {
        Self { stream_window: 8 << 20, snapshot_bytes_per_second: 64_000_000 }
    }
}

impl PeerLimits {
    pub(crate) fn connection_window(self) -> u32 {
        self.stream_window.saturating_mul(2)
    }
}

/// A boot of a store, and the address where it listens.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct PeerAddress {
    /// The store and its boot.
    pub peer: StoreBoot,
    /// The address, `host:port`.
    pub address: String,
}

/// All known peers.
#[derive(Debug)]
pub struct Peers {
    me: StoreId,
    dialler: Dialler,
    known: BTreeMap<StoreId, watch::Sender<PeerAddress>>,
}

#[derive(Clone, Debug)]
struct Dialler {
    cluster: u128,
    inbox: Inbox,
    limits: PeerLimits,
    tasks: CriticalTasks,
}

impl Peers {
    /// Creates an empty set of peers of store `me`.
    pub fn new(
        me: StoreId,
        cluster: u128,
        inbox: Inbox,
        limits: PeerLimits,
        tasks: CriticalTasks,
    ) -> Self {
        Self { me, dialler: Dialler { cluster, inbox, limits, tasks }, known: BTreeMap::new() }
    }

    /// Notes a boot of a store. A boot older than the known one is ignored.
    pub fn note(&mut self, target: PeerAddress) {
        let store = target.peer.store;
        if store == self.me {
            return;
        }
        match self.known.get(&store) {
            Some(known) => {
                known.send_if_modified(|known| {
                    let is_news = target.peer.boot >= known.peer.boot && *known != target;
                    if is_news {
                        *known = target;
                    }
                    is_news
                });
            }
            None => {
                let (sender, receiver) = watch::channel(target);
                let dialler = self.dialler.clone();
                tokio::spawn(
                    self.dialler
                        .tasks
                        .job("a connection to a node", dialler.keep_dialled(receiver)),
                );
                self.known.insert(store, sender);
            }
        }
    }

    /// Stops dialling a store that is gone for good.
    pub fn forget(&mut self, store: StoreId) {
        self.known.remove(&store);
    }
}

/// The reason why a dial failed.
#[derive(Debug)]
enum NotDialled {
    /// The machine answers, and the port is closed.
    Refused,
    Other(String),
}

impl Dialler {
    /// Dials the store until it is forgotten.
    async fn keep_dialled(self, mut target: watch::Receiver<PeerAddress>) {
        let mut refusals = 0u32;
        let mut backoff = DialBackoff::default();
        loop {
            let goal = target.borrow_and_update().clone();
            match self.dial(&goal).await {
                Ok(connection) => {
                    refusals = 0;
                    let since = Instant::now();
                    self.serve(&goal, connection, &mut target).await;
                    if since.elapsed() >= GOOD_AFTER {
                        backoff = DialBackoff::default();
                    }
                }
                Err(NotDialled::Refused) => {
                    refusals = refusals.saturating_add(1);
                    if refusals == 1 {
                        backoff.next = REFUSED_AGAIN_AFTER;
                    }
                    if refusals == 2 {
                        self.inbox.send_event(Event::DialRefused { store: goal.peer.store });
                    }
                }
                Err(NotDialled::Other(why)) => {
                    refusals = 0;
                    debug!(peer = %goal.peer.store, address = goal.address, why, "dial failed");
                }
            }
            tokio::select! {
                biased;
                changed = target.changed() => match changed {
                    Ok(()) => (refusals, backoff) = (0, DialBackoff::default()),
                    Err(_) => return,
                },
                () = backoff.wait() => {}
            }
        }
    }

    /// Opens a stream to the peer.
    async fn dial(&self, goal: &PeerAddress) -> Result<DialledPeer, NotDialled> {
        let channel = connect(&goal.address, self.limits, CONNECT_TIMEOUT).await?;
        let conn = self.inbox.fresh_conn();
        let (outbox, messages, closed) = Outbox::dialled(goal.peer, goal.address.clone());
        let first = tokio_stream::once(wire::ToFollower::opening(self.cluster, conn.0));
        let rest = ReceiverStream::new(messages).map(wire::ToFollower::from);
        let mut client = proto::limited!(PeerClient::new(channel));
        let stream = match timeout(CONNECT_TIMEOUT, client.follow(first.chain(rest))).await {
            Ok(Ok(stream)) => stream.into_inner(),
            Ok(Err(status)) => {
                if status.code() == tonic::Code::FailedPrecondition {
                    warn!(address = goal.address, why = status.message(), "peer refused this node");
                }
                return Err(NotDialled::Other(status.message().to_owned()));
            }
            Err(_) => return Err(NotDialled::Other("no answer".into())),
        };
        Ok(DialledPeer { conn, outbox, closed, stream, _client: client })
    }

    /// Forwards the peer's messages to the loop, until the connection ends or another boot of the
    /// store is to be dialled.
    async fn serve(
        &self,
        goal: &PeerAddress,
        connection: DialledPeer,
        target: &mut watch::Receiver<PeerAddress>,
    ) {
        let DialledPeer { conn, outbox, mut closed, mut stream, _client } = connection;
        info!(
            peer = %goal.peer.store,
            boot = goal.peer.boot.0,
            address = goal.address,
            "connected to peer"
        );
        self.inbox.send(LoopMessage::Opened { conn, outbox });
        let why = loop {
            let message = tokio::select! {
                message = stream.message() => message,
                _ = &mut closed => break "closed by this node".to_owned(),
                _ = target.changed() => break "its boot or address changed".to_owned(),
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
                    if !self.inbox.send(LoopMessage::Received(event, room)) {
                        return;
                    }
                }
                Err(invalid) => break invalid.to_string(),
            }
        };
        info!(peer = %goal.peer.store, boot = goal.peer.boot.0, why, "peer connection ended");
        self.inbox.send_event(Event::Closed { conn });
    }
}

/// A connection that was dialled and is not announced to the loop yet.
struct DialledPeer {
    conn: Conn,
    outbox: Outbox,
    closed: Closed,
    stream: Streaming<wire::FromFollower>,
    /// The stream ends when its channel is dropped.
    _client: PeerClient<Channel>,
}

/// A pause that grows each time, up to a limit.
struct DialBackoff {
    next: Duration,
}

impl Default for DialBackoff {
    fn default() -> Self {
        Self { next: Duration::from_millis(1) }
    }
}

impl DialBackoff {
    async fn wait(&mut self) {
        tokio::time::sleep(self.next).await;
        self.next = (self.next * 2).max(REFUSED_AGAIN_AFTER).min(DIAL_EVERY_MAX);
    }
}

/// Connects to a node, with the settings that all our connections have.
async fn connect(
    address: &str,
    limits: PeerLimits,
    limit: Duration,
) -> Result<Channel, NotDialled> {
    let endpoint =
        endpoint(address, limits).map_err(|error| NotDialled::Other(error.to_string()))?;
    match timeout(limit, endpoint.connect()).await {
        Ok(Ok(channel)) => Ok(channel),
        Ok(Err(error)) if is_refused(&error) => Err(NotDialled::Refused),
        Ok(Err(error)) => Err(NotDialled::Other(error.to_string())),
        Err(_) => Err(NotDialled::Other("no connection in time".into())),
    }
}

/// Returns the endpoint of a node, with the settings that all our connections have.
pub fn endpoint(address: &str, limits: PeerLimits) -> Result<Endpoint, tonic::transport::Error> {
    Ok(process::endpoint(address, PINGS)?
        .initial_stream_window_size(limits.stream_window)
        .initial_connection_window_size(limits.connection_window()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `DialRefused` depends on how tonic and hyper wrap an error: this test fails if an update
    /// changes it.
    #[tokio::test]
    async fn a_refused_connection_is_recognized() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        drop(listener);
        let refused = connect(&address, PeerLimits::default(), CONNECT_TIMEOUT).await.unwrap_err();
        assert!(matches!(refused, NotDialled::Refused), "{refused:?}");
        let other = connect("no such host.invalid:1", PeerLimits::default(), CONNECT_TIMEOUT)
            .await
            .unwrap_err();
        assert!(matches!(other, NotDialled::Other(_)), "{other:?}");
    }
}
