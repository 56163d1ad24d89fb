//! What others ask of this node over gRPC: gateways, peers, the coordinator.
//!
//! Each stream has one task that reads: it checks, converts, waits for room in the intake, and tells the loop. What the
//! loop sends comes out of the connection's outbox and is encoded as the response stream is polled. Nothing is
//! decided here; a message that is none ends its stream with the reason. Other streams on the same connection go on.

use std::collections::HashMap;
use std::error::Error;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use engine::ids::{Conn, StoreBoot};
use engine::message::{GatewayMessage, ToFollower};
use engine::node::Event;
use proto::wire::control_server::{self, Control, ControlServer};
use proto::wire::gateway_server::{self, Gateway, GatewayServer};
use proto::wire::peer_server::{self, Peer, PeerServer};
use proto::wire::{self, to_follower, to_node};
use proto::{Greeting, Invalid, Refused};
use telemetry::files::Connections;
use telemetry::{Health, Vital};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt};
use tonic::transport::Server;
use tonic::{Request, Response, Status, Streaming};
use tracing::{debug, info};

use crate::inbox::{Inbox, Told};
use crate::outbox::{Closed, Outbox};
use crate::peers::{Limits, PING_EVERY, PING_TIMEOUT};
use crate::snapshot_files::Staging;

/// Whoever opens a stream says first who it is, and says so at once.
const FIRST_MESSAGE_TIMEOUT: Duration = Duration::from_secs(5);
/// The loop answers within microseconds. If it takes this long nobody waits for the answer any more.
const QUERY_TIMEOUT: Duration = Duration::from_secs(5);

type Replies<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// The services of one node.
#[derive(Clone, Debug)]
pub struct Services {
    pub inbox: Inbox,
    pub me: StoreBoot,
    pub cluster: u128,
    pub links: Links,
    /// Where copies that come in are kept.
    pub staging: Staging,
    pub limits: Limits,
    pub vital: Vital,
}

/// Serves until dropped.
pub async fn serve(
    listener: TcpListener,
    connections: Connections,
    services: Services,
    health: Health,
) -> Result<(), Box<dyn Error + Send + Sync>> {
    let own =
        [gateway_server::SERVICE_NAME, peer_server::SERVICE_NAME, control_server::SERVICE_NAME];
    let common = telemetry::grpc(&health, proto::DESCRIPTORS, &own).await?;
    Server::builder()
        .initial_stream_window_size(services.limits.stream_window)
        .initial_connection_window_size(services.limits.connection_window())
        .http2_keepalive_interval(Some(PING_EVERY))
        .http2_keepalive_timeout(Some(PING_TIMEOUT))
        .add_routes(common)
        .add_service(proto::limited!(GatewayServer::new(services.clone())))
        .add_service(proto::limited!(PeerServer::new(services.clone())))
        .add_service(proto::limited!(ControlServer::new(services)))
        .serve_with_incoming(connections.incoming(listener))
        .await?;
    Ok(())
}

fn ending() -> Status {
    Status::unavailable("this node is about to end")
}

/// The first message of a stream.
pub(crate) async fn first<T>(stream: &mut Streaming<T>) -> Result<T, Status> {
    let first = timeout(FIRST_MESSAGE_TIMEOUT, stream.message()).await;
    let first = first.map_err(|_| Status::deadline_exceeded("the stream said nothing"))??;
    first.ok_or_else(|| Refused::Invalid(Invalid::Missing("open")).into())
}

// ---- gateways ------------------------------------------------------------------------------------

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
        if !self.inbox.tell(Told::Opened { conn, outbox }) {
            return Err(ending());
        }
        let inbox = self.inbox.clone();
        let (refused, refusal) = mpsc::channel(1);
        tokio::spawn(self.vital.job("hearing a gateway", async move {
            let end = hear_gateway(&inbox, conn, stream, closed).await;
            debug!(?from, %end, "gateway connection ended");
            end.tell(&refused);
            inbox.event(Event::GatewayGone { conn });
        }));
        let replies = ReceiverStream::new(replies).map(|reply| Ok(reply.into()));
        Ok(Response::new(Box::pin(replies.chain(ReceiverStream::new(refusal).map(Err)))))
    }
}

/// Why a stream is heard no longer.
enum End {
    /// It broke, or a message on it is none: whoever is still there is told.
    Refused(Status),
    /// As it should.
    Over(&'static str),
}

impl End {
    fn tell(self, refused: &mpsc::Sender<Status>) {
        if let Self::Refused(status) = self {
            // Else nobody is there any more.
            let _unheard = refused.try_send(status);
        }
    }
}

impl std::fmt::Display for End {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Refused(status) => f.write_str(status.message()),
            Self::Over(why) => f.write_str(why),
        }
    }
}

/// Passes on what a gateway says. Returns why that ended.
async fn hear_gateway(
    inbox: &Inbox,
    conn: Conn,
    mut stream: Streaming<wire::ToNode>,
    mut closed: Closed,
) -> End {
    loop {
        let message = tokio::select! {
            message = stream.message() => message,
            _ = &mut closed => return End::Over("closed here"),
        };
        let message = match message {
            Ok(Some(message)) => message,
            Ok(None) => return End::Over("closed by the gateway"),
            Err(status) => return End::Refused(status),
        };
        let bytes = match &message.kind {
            Some(to_node::Kind::Frame(frame)) => frame.batches.len(),
            Some(to_node::Kind::Read(read)) => read.names.iter().map(|name| name.len() + 32).sum(),
            _ => 0,
        };
        let message = match GatewayMessage::try_from(message) {
            Ok(message) => message,
            Err(invalid) => return End::Refused(invalid.into()),
        };
        let room = inbox.gateways.room(bytes).await;
        if !inbox.tell(Told::Received(Event::Gateway { conn, message }, room)) {
            return End::Refused(ending());
        }
    }
}

// ---- peers ---------------------------------------------------------------------------------------

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
        if !self.inbox.tell(Told::Opened { conn, outbox }) {
            return Err(ending());
        }
        let services = self.clone();
        let (refused, refusal) = mpsc::channel(1);
        tokio::spawn(self.vital.job("hearing a node", async move {
            let end = services.hear_peer(conn, greeting, stream, closed).await;
            debug!(conn = conn.0, %end, "peer's connection ended");
            end.tell(&refused);
            services.links.forget(conn);
            services.inbox.event(Event::Closed { conn });
        }));
        let messages = ReceiverStream::new(messages).map(|message| Ok(message.into()));
        Ok(Response::new(Box::pin(messages.chain(ReceiverStream::new(refusal).map(Err)))))
    }

    async fn snapshot(
        &self,
        request: Request<Streaming<wire::SnapshotPart>>,
    ) -> Result<Response<wire::Empty>, Status> {
        crate::snapshot_transfer::receive(self, request.into_inner()).await?;
        Ok(Response::new(wire::Empty {}))
    }
}

impl Services {
    /// Passes on what a peer says that feeds this node. Returns why that ended.
    async fn hear_peer(
        &self,
        conn: Conn,
        greeting: Greeting,
        mut stream: Streaming<wire::ToFollower>,
        mut closed: Closed,
    ) -> End {
        let (_open, ended) = watch::channel(());
        loop {
            let message = tokio::select! {
                message = stream.message() => message,
                _ = &mut closed => return End::Over("closed here"),
            };
            let message = match message {
                Ok(Some(message)) => message,
                Ok(None) => return End::Over("closed by the peer"),
                Err(status) => return End::Refused(status),
            };
            let bytes = match &message.kind {
                Some(to_follower::Kind::Append(append)) => {
                    append.slices.iter().map(|slice| slice.entries.len() + 64).sum()
                }
                _ => 0,
            };
            let message = match ToFollower::try_from(message) {
                Ok(message) => message,
                Err(invalid) => return End::Refused(invalid.into()),
            };
            if let ToFollower::Hello { from, .. } = &message {
                info!(peer = %from.store, boot = from.boot.0, "dialled by a peer");
                let link = Link { conn, ended: ended.clone() };
                self.links.note(*from, greeting.link, link);
            }
            let room = self.inbox.peers.room(bytes).await;
            if !self.inbox.tell(Told::Received(Event::ToFollower { conn, message }, room)) {
                return End::Refused(ending());
            }
        }
    }
}

/// The connections by which peers feed this node, by the dialler's own number: a copy comes on a connection of its
/// own and names the one that it belongs to.
#[derive(Clone, Debug, Default)]
pub struct Links {
    open: Arc<Mutex<HashMap<(StoreBoot, u64), Link>>>,
}

#[derive(Clone, Debug)]
pub(crate) struct Link {
    pub(crate) conn: Conn,
    /// Its sender is dropped with the connection.
    pub(crate) ended: watch::Receiver<()>,
}

impl Links {
    fn note(&self, from: StoreBoot, number: u64, link: Link) {
        self.lock().insert((from, number), link);
    }

    fn forget(&self, conn: Conn) {
        self.lock().retain(|_, link| link.conn != conn);
    }

    pub(crate) fn find(&self, from: StoreBoot, number: u64) -> Option<Link> {
        self.lock().get(&(from, number)).cloned()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<(StoreBoot, u64), Link>> {
        // Nobody panics while holding it: it is only looked up and changed.
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// ---- the coordinator -----------------------------------------------------------------------------

#[tonic::async_trait]
impl Control for Services {
    async fn query(
        &self,
        request: Request<wire::NodeQuery>,
    ) -> Result<Response<wire::NodeQueryReply>, Status> {
        let request = request.into_inner();
        wire::Open::accept_required(request.open.as_ref(), self.cluster)?;
        let message = proto::query_of(request)?;
        let (reply, answer) = oneshot::channel();
        if !self.inbox.tell(Told::Query { message, reply }) {
            return Err(ending());
        }
        // Answered by the loop itself, also a probe: a loop that stands still must not look alive.
        match timeout(QUERY_TIMEOUT, answer).await {
            Ok(Ok(reply)) => Ok(Response::new(reply.into())),
            Ok(Err(_)) => Err(ending()),
            Err(_) => Err(Status::deadline_exceeded("the loop did not answer")),
        }
    }
}
