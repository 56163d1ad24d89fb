//! The gRPC services of this node: for gateways, peers, the coordinator.
//!
//! Each stream has one task that reads: it checks, converts, waits for room in the intake, and
//! sends to the loop. The loop's replies come out of the connection's outbox and are encoded as the
//! response stream is polled. Nothing is decided here; an invalid message ends its stream with the
//! reason. Other streams on the same connection go on.

pub mod snapshot_transfer;

use std::collections::HashMap;
use std::error::Error;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use engine::ids::{Conn, StoreBoot};
use engine::message::{GatewayMessage, NodeQuery, ToFollower};
use engine::node::Event;
use proto::wire::control_server::{self, Control, ControlServer};
use proto::wire::gateway_server::{self, Gateway, GatewayServer};
use proto::wire::peer_server::{self, Peer, PeerServer};
use proto::wire::{self, to_follower, to_node};
use proto::{AcceptedOpen, Invalid, Merged, OpenError};
use telemetry::files::ConnectionLimit;
use telemetry::{CriticalTasks, Health};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt};
use tonic::transport::Server;
use tonic::{Request, Response, Status, Streaming};
use tracing::{debug, info};

use crate::inbox::{Inbox, Intake, LoopMessage};
use crate::outbox::{Closed, Outbox};
use crate::peers::{PINGS, PeerLimits};
use crate::snapshot_files::Staging;

/// The time-out of the first message, by which the other end identifies itself.
const FIRST_MESSAGE_TIMEOUT: Duration = Duration::from_secs(5);
/// The time-out of a query. The loop answers within microseconds.
const QUERY_TIMEOUT: Duration = Duration::from_secs(5);

/// The size up to which a message arrives in one HTTP/2 frame, and so in one read. The default of
/// 16 KiB splits the frames of a busy gateway.
const HTTP2_FRAME_BYTES: u32 = 1 << 20;

type Replies<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// The services of one node.
#[derive(Clone)]
pub struct Services {
    /// The sending end of the loop's inbox.
    pub inbox: Inbox,
    /// The store and the boot of this process.
    pub me: StoreBoot,
    /// The cluster, which every stream must name.
    pub cluster: u128,
    /// The connections by which peers feed this node.
    pub feeds: FeedConnections,
    /// The place where incoming snapshots are staged.
    pub staging: Staging,
    /// The limits of traffic between nodes.
    pub limits: PeerLimits,
    /// The wrapper of the tasks that read streams.
    pub tasks: CriticalTasks,
}

/// Serves until the future is dropped.
pub async fn serve(
    listener: TcpListener,
    connections: ConnectionLimit,
    services: Services,
    health: Health,
) -> Result<(), Box<dyn Error + Send + Sync>> {
    let own =
        [gateway_server::SERVICE_NAME, peer_server::SERVICE_NAME, control_server::SERVICE_NAME];
    let common = telemetry::grpc(&health, proto::DESCRIPTORS, &own).await?;
    Server::builder()
        .initial_stream_window_size(services.limits.stream_window)
        .initial_connection_window_size(services.limits.connection_window())
        .max_frame_size(HTTP2_FRAME_BYTES)
        .http2_keepalive_interval(Some(PINGS.every))
        .http2_keepalive_timeout(Some(PINGS.timeout))
        .add_routes(common)
        .add_service(proto::limited!(GatewayServer::new(services.clone())))
        .add_service(proto::limited!(PeerServer::new(services.clone())))
        .add_service(proto::limited!(ControlServer::new(services)))
        .serve_with_incoming(connections.incoming(listener))
        .await?;
    Ok(())
}

fn ending() -> Status {
    Status::unavailable("this node is shutting down")
}

/// Receives the first message of a stream.
pub(crate) async fn first<T>(stream: &mut Streaming<T>) -> Result<T, Status> {
    let first = timeout(FIRST_MESSAGE_TIMEOUT, stream.message()).await;
    let first = first.map_err(|_| Status::deadline_exceeded("the stream sent nothing"))??;
    first.ok_or_else(|| OpenError::Invalid(Invalid::Missing("open")).into())
}

// ---- gateways -----------------------------------------------------------------------------------

#[tonic::async_trait]
impl Gateway for Services {
    type SessionStream = Replies<wire::ToGateway>;

    async fn session(
        &self,
        request: Request<Streaming<wire::ToNode>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let from = request.remote_addr();
        let mut stream = request.into_inner();
        first(&mut stream).await?.accept(self.cluster)?;
        let conn = self.inbox.fresh_conn();
        let (outbox, replies, closed) = Outbox::gateway();
        if !self.inbox.send(LoopMessage::Opened { conn, outbox }) {
            return Err(ending());
        }
        let services = self.clone();
        let (refused, refusal) = mpsc::channel(1);
        tokio::spawn(self.tasks.job("reading from a gateway", async move {
            let (intake, over) = (&services.inbox.gateways, "closed by the gateway");
            let read = |message| gateway_event(conn, message);
            let end = services.forward(intake, stream, closed, over, read).await;
            debug!(?from, end = %why(&end), "gateway connection ended");
            report(end, &refused);
            services.inbox.send_event(Event::GatewayGone { conn });
        }));
        let replies = ReceiverStream::new(replies).map(wire::Reply::from);
        let replies = Merged::new(replies, proto::REPLIES_BYTES).map(|replies| Ok(replies.into()));
        Ok(Response::new(Box::pin(replies.chain(ReceiverStream::new(refusal).map(Err)))))
    }
}

/// The reason why reading a stream has ended: in the normal way; or the stream broke or a message
/// on it was invalid, and the other end gets the status if it is still there.
type StreamEnd = Result<&'static str, Status>;

fn why(end: &StreamEnd) -> &str {
    match end {
        Ok(why) => why,
        Err(status) => status.message(),
    }
}

fn report(end: StreamEnd, refused: &mpsc::Sender<Status>) {
    if let Err(status) = end {
        // A failed send means that the other end is gone.
        let _unheard = refused.try_send(status);
    }
}

/// Returns the size of a gateway's message, and its event.
fn gateway_event(conn: Conn, message: wire::ToNode) -> Result<(usize, Event), Invalid> {
    let bytes = match &message.kind {
        Some(to_node::Kind::Frame(frame)) => frame.batches.len(),
        Some(to_node::Kind::Read(read)) => read.names.iter().map(|name| name.len() + 32).sum(),
        _ => 0,
    };
    Ok((bytes, Event::Gateway { conn, message: GatewayMessage::try_from(message)? }))
}

// ---- peers --------------------------------------------------------------------------------------

#[tonic::async_trait]
impl Peer for Services {
    type FollowStream = Replies<wire::FromFollower>;

    async fn follow(
        &self,
        request: Request<Streaming<wire::ToFollower>>,
    ) -> Result<Response<Self::FollowStream>, Status> {
        let mut stream = request.into_inner();
        let greeting = first(&mut stream).await?.accept(self.cluster)?;
        let conn = self.inbox.fresh_conn();
        let (outbox, messages, closed) = Outbox::accepted();
        if !self.inbox.send(LoopMessage::Opened { conn, outbox }) {
            return Err(ending());
        }
        let services = self.clone();
        let (refused, refusal) = mpsc::channel(1);
        tokio::spawn(self.tasks.job("reading from a node", async move {
            let (_open, ended) = watch::channel(());
            let feed = FeedConnection { conn, ended };
            let (intake, over) = (&services.inbox.peers, "closed by the peer");
            let read = |message| services.peer_event(&greeting, &feed, message);
            let end = services.forward(intake, stream, closed, over, read).await;
            debug!(conn = conn.0, end = %why(&end), "peer connection ended");
            report(end, &refused);
            services.feeds.forget(conn);
            services.inbox.send_event(Event::Closed { conn });
        }));
        let messages = ReceiverStream::new(messages).map(|message| Ok(message.into()));
        Ok(Response::new(Box::pin(messages.chain(ReceiverStream::new(refusal).map(Err)))))
    }

    async fn snapshot(
        &self,
        request: Request<Streaming<wire::SnapshotPart>>,
    ) -> Result<Response<wire::Empty>, Status> {
        snapshot_transfer::receive(self, request.into_inner()).await?;
        Ok(Response::new(wire::Empty {}))
    }
}

impl Services {
    /// Sends the messages of a stream to the loop until the stream ends. `event` returns the size
    /// of a message, for which there must be room in `intake`, and its event; `over` is the reason
    /// if the other end closes the stream.
    async fn forward<M>(
        &self,
        intake: &Intake,
        mut stream: Streaming<M>,
        mut closed: Closed,
        over: &'static str,
        event: impl Fn(M) -> Result<(usize, Event), Invalid>,
    ) -> StreamEnd {
        loop {
            let message = tokio::select! {
                message = stream.message() => message?,
                _ = &mut closed => return Ok("closed by this node"),
            };
            let Some(message) = message else { return Ok(over) };
            let (bytes, event) = event(message)?;
            let room = intake.room(bytes).await;
            if !self.inbox.send(LoopMessage::Received(event, room)) {
                return Err(ending());
            }
        }
    }

    /// Returns the size of a message of a peer that feeds this node, and its event.
    fn peer_event(
        &self,
        greeting: &AcceptedOpen,
        feed: &FeedConnection,
        message: wire::ToFollower,
    ) -> Result<(usize, Event), Invalid> {
        let bytes = match &message.kind {
            Some(to_follower::Kind::Append(append)) => {
                append.slices.iter().map(|slice| slice.entries.len() + 64).sum()
            }
            _ => 0,
        };
        let message = ToFollower::try_from(message)?;
        if let ToFollower::Hello { from, .. } = &message {
            info!(peer = %from.store, boot = from.boot.0, "peer connected");
            self.feeds.note(*from, greeting.connection, feed.clone());
        }
        Ok((bytes, Event::FromPrimary { conn: feed.conn, message }))
    }
}

/// The connections by which peers feed this node, by the dialler's own number: a snapshot arrives
/// on a connection of its own and names the one that it belongs to.
#[derive(Clone, Debug, Default)]
pub struct FeedConnections {
    open: Arc<Mutex<HashMap<(StoreBoot, u64), FeedConnection>>>,
}

#[derive(Clone, Debug)]
pub(crate) struct FeedConnection {
    pub(crate) conn: Conn,
    /// The sender of this channel is dropped with the connection.
    pub(crate) ended: watch::Receiver<()>,
}

impl FeedConnections {
    fn note(&self, from: StoreBoot, number: u64, connection: FeedConnection) {
        self.lock().insert((from, number), connection);
    }

    fn forget(&self, conn: Conn) {
        self.lock().retain(|_, connection| connection.conn != conn);
    }

    pub(crate) fn find(&self, from: StoreBoot, number: u64) -> Option<FeedConnection> {
        self.lock().get(&(from, number)).cloned()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<(StoreBoot, u64), FeedConnection>> {
        // Nothing panics while the lock is held: the map is only looked up and changed.
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// ---- the coordinator ----------------------------------------------------------------------------

#[tonic::async_trait]
impl Control for Services {
    async fn query(
        &self,
        request: Request<wire::NodeQuery>,
    ) -> Result<Response<wire::NodeQueryReply>, Status> {
        let request = request.into_inner();
        let open = request.open;
        let message = proto::query_of(request)?;
        // The sender of a recovery learns the cluster from the answer.
        if !matches!(message, NodeQuery::Recover { .. }) {
            wire::Open::accept_required(open.as_ref(), self.cluster)?;
        }
        let (reply, answer) = oneshot::channel();
        if !self.inbox.send(LoopMessage::Query { message, reply }) {
            return Err(ending());
        }
        // The loop itself answers, also to a probe: a loop that is stuck must not look alive.
        match timeout(QUERY_TIMEOUT, answer).await {
            Ok(Ok(reply)) => Ok(Response::new(reply.into())),
            Ok(Err(_)) => Err(ending()),
            Err(_) => Err(Status::deadline_exceeded("the loop did not answer")),
        }
    }
}
