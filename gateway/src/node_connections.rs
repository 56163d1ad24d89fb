//! One worker's connections to storage nodes: one stream per node, opened again when it breaks.
//!
//! This module carries messages and interprets none. It neither repeats nor gives up what was sent
//! on a broken stream: the batcher gets [`Event::Closed`] and decides.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::pin::pin;
use std::rc::Rc;
use std::time::Duration;

use engine::batcher::Event;
use engine::ids::{Conn, StoreBoot, StoreId};
use engine::message::GatewayMessage;
use process::{CONNECT_TIMEOUT, Pings, causes, is_refused};
use proto::Invalid;
use proto::wire::gateway_client::GatewayClient;
use proto::wire::{ToGateway, ToNode};
use telemetry::CriticalTasks;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::Streaming;
use tracing::{debug, info, warn};

use crate::directory::{Directory, NodeEndpoint};
use crate::mailbox::Mailbox;

/// The first delay after a failed dial. Each further delay is twice as long.
const REDIAL_FIRST: Duration = Duration::from_millis(10);
/// The longest delay between two dials.
const REDIAL_LONGEST: Duration = Duration::from_millis(200);
/// A node that does not answer a ping in time counts as gone, and the batches in flight to it are
/// sent to the next primary.
pub(crate) const PINGS: Pings =
    Pings { every: Duration::from_secs(2), timeout: Duration::from_secs(2) };

/// The connections of one worker.
pub(crate) struct NodeConnections {
    mailbox: Rc<Mailbox>,
    directory: watch::Receiver<Directory>,
    /// The sending ends of the streams. Their queues are bounded by the batcher's window per node.
    senders: RefCell<BTreeMap<Conn, mpsc::UnboundedSender<ToNode>>>,
    /// Stores whose connection is maintained by a task.
    maintained: RefCell<BTreeSet<StoreId>>,
    conns: Cell<u64>,
    tasks: CriticalTasks,
}

/// An open stream to a node.
struct NodeStream {
    to: mpsc::UnboundedSender<ToNode>,
    from: Streaming<ToGateway>,
}

enum DialError {
    /// The connection was refused: no process listens there.
    Refused,
    Other(String),
}

impl NodeConnections {
    pub(crate) fn new(
        mailbox: Rc<Mailbox>,
        directory: watch::Receiver<Directory>,
        tasks: CriticalTasks,
    ) -> Rc<Self> {
        let (senders, maintained) = Default::default();
        Rc::new(Self { mailbox, directory, senders, maintained, conns: Cell::new(0), tasks })
    }

    /// Sends a message. A broken connection is reported by [`Event::Closed`], not here.
    pub(crate) fn send(&self, conn: Conn, message: GatewayMessage) {
        if let Some(to) = self.senders.borrow().get(&conn) {
            let _broken = to.send(message.into());
        }
    }

    /// Maintains a connection to every reachable store, until dropped.
    pub(crate) async fn maintain_all(self: Rc<Self>) {
        let mut directory = self.directory.clone();
        loop {
            for store in directory.borrow_and_update().reachable() {
                if self.maintained.borrow_mut().insert(store) {
                    let job =
                        self.tasks.job("a connection to a node", self.clone().maintain(store));
                    tokio::task::spawn_local(job);
                }
            }
            if directory.changed().await.is_err() {
                return;
            }
        }
    }

    /// Maintains the connection to one store for as long as the directory has its address.
    async fn maintain(self: Rc<Self>, store: StoreId) {
        let mut pause = REDIAL_FIRST;
        loop {
            let endpoint = self.directory.borrow().endpoint(store);
            let Some(endpoint) = endpoint else {
                break;
            };
            match dial(&endpoint).await {
                Ok(stream) => {
                    pause = REDIAL_FIRST;
                    self.run_stream(store, &endpoint, stream).await;
                }
                Err(DialError::Refused) => {
                    debug!(%store, address = endpoint.address, "connection refused");
                    self.mailbox.push(Event::DialRefused { store });
                }
                Err(DialError::Other(why)) => {
                    debug!(%store, address = endpoint.address, why, "connection failed");
                }
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(REDIAL_LONGEST);
        }
        self.maintained.borrow_mut().remove(&store);
    }

    /// Passes the messages of a stream to the batcher until the stream ends, or the directory has a
    /// newer boot or address of the store.
    async fn run_stream(&self, store: StoreId, endpoint: &NodeEndpoint, stream: NodeStream) {
        let NodeStream { to, mut from } = stream;
        self.conns.set(self.conns.get() + 1);
        let conn = Conn(self.conns.get());
        self.senders.borrow_mut().insert(conn, to);
        let node = StoreBoot { store, boot: endpoint.boot };
        let name = self.directory.borrow().name(store);
        info!(node = name, address = endpoint.address, boot = endpoint.boot.0, "connected to node");
        self.mailbox.push(Event::Connected { conn, node });
        // The store has another boot or address: this connection leads to the process before it, or
        // to the new one under a wrong boot.
        let mut directory = self.directory.clone();
        let is_other = |now: &Directory| now.endpoint(store).is_some_and(|now| now != *endpoint);
        let mut moved = pin!(directory.wait_for(is_other));
        let why = loop {
            let message = tokio::select! {
                biased;
                _ = &mut moved => break "the store has moved or restarted".to_owned(),
                message = from.message() => message,
            };
            match message {
                Ok(Some(message)) => {
                    let mut replies = message.into_replies();
                    let pushed = replies.try_for_each(|reply| {
                        self.mailbox.push(Event::Reply { conn, reply: reply? });
                        Ok::<_, Invalid>(())
                    });
                    if let Err(invalid) = pushed {
                        break invalid.to_string();
                    }
                }
                Ok(None) => break "the node ended the stream".to_owned(),
                Err(status) => break status.message().to_owned(),
            }
        };
        warn!(node = name, address = endpoint.address, why, "connection to node lost");
        self.senders.borrow_mut().remove(&conn);
        self.mailbox.push(Event::Closed { conn });
    }
}

async fn dial(target: &NodeEndpoint) -> Result<NodeStream, DialError> {
    let other = |error: &(dyn std::error::Error + 'static)| {
        DialError::Other(causes(error).map(ToString::to_string).collect::<Vec<_>>().join(": "))
    };
    let endpoint = process::endpoint(&target.address, PINGS).map_err(|error| other(&error))?;
    let channel = endpoint.connect().await.map_err(|error| match is_refused(&error) {
        true => DialError::Refused,
        false => other(&error),
    })?;
    let (to, messages) = mpsc::unbounded_channel();
    to.send(ToNode::opening(target.cluster)).expect("its receiver is here");
    let mut client = proto::limited!(GatewayClient::new(channel));
    let opening = client.session(UnboundedReceiverStream::new(messages));
    match tokio::time::timeout(CONNECT_TIMEOUT, opening).await {
        Ok(Ok(response)) => Ok(NodeStream { to, from: response.into_inner() }),
        Ok(Err(status)) => {
            if status.code() == tonic::Code::FailedPrecondition {
                warn!(
                    address = target.address,
                    why = status.message(),
                    "node refused this gateway"
                );
            }
            Err(other(&status))
        }
        Err(elapsed) => Err(other(&elapsed)),
    }
}
