//! One worker's connections to storage nodes: one stream per node, made again when it breaks.
//!
//! A link carries messages and understands none. What was sent on a stream that broke is neither repeated nor given up
//! here: the machine is told that the connection is closed, and knows what that means.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::rc::Rc;
use std::time::Duration;

use engine::batcher::Event;
use engine::ids::{Conn, StoreBoot, StoreId};
use engine::message::{GatewayMessage, NodeReply};
use proto::wire::gateway_client::GatewayClient;
use proto::wire::{ToGateway, ToNode};
use telemetry::Vital;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::Streaming;
use tonic::transport::Endpoint;
use tracing::{debug, info, warn};

use crate::directory::{Directory, Target};
use crate::lanes::Lanes;

/// How long after a failed dial the next one comes, at first …
const REDIAL_FIRST: Duration = Duration::from_millis(10);
/// … and in the end.
const REDIAL_LONGEST: Duration = Duration::from_millis(200);
const DIAL_WITHIN: Duration = Duration::from_secs(1);
/// A node that does not answer a ping for so long is taken for gone; what was sent to it is sent to the next primary.
const PING_EVERY: Duration = Duration::from_secs(2);
const PONG_WITHIN: Duration = Duration::from_secs(2);

pub(crate) struct Links {
    lanes: Rc<Lanes>,
    directory: watch::Receiver<Directory>,
    /// Where messages to each connection go. Bounded by the machine, which has a window per node.
    senders: RefCell<BTreeMap<Conn, mpsc::UnboundedSender<ToNode>>>,
    /// Stores that have a task of their own.
    kept: RefCell<BTreeSet<StoreId>>,
    conns: Cell<u64>,
    vital: Vital,
}

/// A stream that stands.
struct Stream {
    to: mpsc::UnboundedSender<ToNode>,
    from: Streaming<ToGateway>,
}

enum DialError {
    /// Nobody listens there.
    Refused,
    Other(String),
}

impl Links {
    pub(crate) fn new(
        lanes: Rc<Lanes>,
        directory: watch::Receiver<Directory>,
        vital: Vital,
    ) -> Rc<Self> {
        let (senders, kept) = Default::default();
        Rc::new(Self { lanes, directory, senders, kept, conns: Cell::new(0), vital })
    }

    /// Puts a message on its way. A connection that has just broken says so by itself.
    pub(crate) fn send(&self, conn: Conn, message: GatewayMessage) {
        if let Some(to) = self.senders.borrow().get(&conn) {
            let _broken = to.send(message.into());
        }
    }

    /// Sees to it that every store worth it has a link. Until dropped.
    pub(crate) async fn keep(self: Rc<Self>) {
        let mut directory = self.directory.clone();
        loop {
            for store in directory.borrow_and_update().reachable() {
                if self.kept.borrow_mut().insert(store) {
                    let linking = self.vital.job("a link to a node", self.clone().link(store));
                    tokio::task::spawn_local(linking);
                }
            }
            if directory.changed().await.is_err() {
                return;
            }
        }
    }

    /// Keeps one store's link for as long as the directory knows where it is.
    async fn link(self: Rc<Self>, store: StoreId) {
        let mut pause = REDIAL_FIRST;
        loop {
            let target = self.directory.borrow().target(store);
            let Some(target) = target else {
                break;
            };
            match dial(&target).await {
                Ok(stream) => {
                    pause = REDIAL_FIRST;
                    self.converse(store, &target, stream).await;
                }
                Err(DialError::Refused) => {
                    debug!(%store, address = target.address, "connection refused");
                    self.lanes.push(Event::DialRefused { store });
                }
                Err(DialError::Other(why)) => {
                    debug!(%store, address = target.address, why, "no connection");
                }
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(REDIAL_LONGEST);
        }
        self.kept.borrow_mut().remove(&store);
    }

    /// Hands on what comes from a stream until it ends, or until it leads to a process that is no more.
    async fn converse(&self, store: StoreId, target: &Target, stream: Stream) {
        let Stream { to, mut from } = stream;
        self.conns.set(self.conns.get() + 1);
        let conn = Conn(self.conns.get());
        self.senders.borrow_mut().insert(conn, to);
        let node = StoreBoot { store, boot: target.boot };
        let name = self.directory.borrow().name(store);
        info!(node = name, address = target.address, boot = target.boot.0, "connected");
        self.lanes.push(Event::Connected { conn, node });
        let mut directory = self.directory.clone();
        let why = loop {
            let message = tokio::select! {
                message = from.message() => message,
                changed = directory.changed() => {
                    // Another run of the store: this connection leads to the one before, or to it under a wrong name.
                    let now = directory.borrow_and_update().target(store);
                    if changed.is_err() || now.is_some_and(|now| now != *target) {
                        break "the store has moved or started again".to_owned();
                    }
                    continue;
                }
            };
            match message {
                Ok(Some(message)) => match NodeReply::try_from(message) {
                    Ok(reply) => self.lanes.push(Event::Reply { conn, reply }),
                    Err(invalid) => break invalid.to_string(),
                },
                Ok(None) => break "the node ended the stream".to_owned(),
                Err(status) => break status.message().to_owned(),
            }
        };
        warn!(node = name, address = target.address, why, "connection lost");
        self.senders.borrow_mut().remove(&conn);
        self.lanes.push(Event::Closed { conn });
    }
}

async fn dial(target: &Target) -> Result<Stream, DialError> {
    let other = |error: &dyn std::error::Error| DialError::Other(chain(error));
    let endpoint = endpoint(&target.address).map_err(|error| other(&error))?;
    let channel = endpoint.connect().await.map_err(|error| match is_refused(&error) {
        true => DialError::Refused,
        false => other(&error),
    })?;
    let (to, messages) = mpsc::unbounded_channel();
    to.send(ToNode::opening(target.cluster)).expect("its receiver is here");
    let mut client = proto::limited!(GatewayClient::new(channel));
    let opening = client.session(UnboundedReceiverStream::new(messages));
    match tokio::time::timeout(DIAL_WITHIN, opening).await {
        Ok(Ok(response)) => Ok(Stream { to, from: response.into_inner() }),
        Ok(Err(status)) => {
            if status.code() == tonic::Code::FailedPrecondition {
                warn!(
                    address = target.address,
                    why = status.message(),
                    "a node refuses this gateway"
                );
            }
            Err(other(&status))
        }
        Err(elapsed) => Err(other(&elapsed)),
    }
}

/// How a process of this cluster is reached.
pub(crate) fn endpoint(address: &str) -> Result<Endpoint, tonic::transport::Error> {
    let endpoint = Endpoint::from_shared(format!("http://{address}"))?;
    Ok(endpoint
        .connect_timeout(DIAL_WITHIN)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(PING_EVERY)
        .keep_alive_timeout(PONG_WITHIN)
        .keep_alive_while_idle(true))
}

/// Somewhere below what gRPC reports, the kernel said that nobody listens.
fn is_refused(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut next = Some(error);
    while let Some(error) = next {
        let io = error.downcast_ref::<io::Error>();
        if io.is_some_and(|io| io.kind() == io::ErrorKind::ConnectionRefused) {
            return true;
        }
        next = error.source();
    }
    false
}

/// An error with its causes, since gRPC's own words are "transport error".
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(error) = next {
        text = format!("{text}: {error}");
        next = error.source();
    }
    text
}
