//! The messages that the loop sends: one bounded queue per connection, drained by the connection's
//! own task.
//!
//! The loop never waits for a socket. A full queue means that the other end does not read: the
//! connection is closed, and the other end catches up after it reconnects. Messages are queued as
//! engine values and encoded by the connection's task, not by the loop.
//!
//! Dropping an [`Outbox`] closes its connection; the task that reads from it learns this by its
//! [`Closed`].

use std::collections::HashMap;

use engine::ids::{Conn, StoreBoot};
use engine::message::{FromFollower, NodeReply, ToFollower};
use engine::node::Event;
use tokio::sync::{mpsc, oneshot};

/// The most messages waiting to be sent to a gateway: a reply per batch or read, each small. That
/// is far more than its window of frames can produce; reads it may have thousands of.
const GATEWAY_MESSAGES_MAX: usize = 32_768;
/// The most messages waiting to be sent to a peer. Their bytes are bounded by the engine's window
/// per connection; besides these there are some thirty small ones a second.
const PEER_MESSAGES_MAX: usize = 4_096;

/// The loop's end of one connection.
#[derive(Debug)]
pub enum Outbox {
    /// A connection that a gateway has dialled.
    Gateway(OutboxQueue<NodeReply>),
    /// A connection that a peer has dialled, to feed this node.
    Accepted(OutboxQueue<FromFollower>),
    /// A connection that this node has dialled, to feed a peer.
    Dialled {
        /// The queue of messages to the peer.
        queue: OutboxQueue<ToFollower>,
        /// The boot that was dialled.
        peer: StoreBoot,
        /// The address that was dialled.
        address: String,
    },
}

/// The loop's end of a queue of outgoing messages.
#[derive(Debug)]
pub struct OutboxQueue<T> {
    messages: mpsc::Sender<T>,
    /// Closes the connection when it is dropped.
    _open: oneshot::Sender<()>,
}

/// Resolves when the loop has closed the connection.
pub type Closed = oneshot::Receiver<()>;

fn queue<T>(messages_max: usize) -> (OutboxQueue<T>, mpsc::Receiver<T>, Closed) {
    let (messages, receiver) = mpsc::channel(messages_max);
    let (open, closed) = oneshot::channel();
    (OutboxQueue { messages, _open: open }, receiver, closed)
}

impl Outbox {
    /// Returns both ends of the queue, and the signal of its closing, for a gateway.
    pub fn gateway() -> (Self, mpsc::Receiver<NodeReply>, Closed) {
        let (queue, receiver, closed) = queue(GATEWAY_MESSAGES_MAX);
        (Self::Gateway(queue), receiver, closed)
    }

    /// Returns both ends of the queue, and the signal of its closing, for a peer that has dialled
    /// this node.
    pub fn accepted() -> (Self, mpsc::Receiver<FromFollower>, Closed) {
        let (queue, receiver, closed) = queue(PEER_MESSAGES_MAX);
        (Self::Accepted(queue), receiver, closed)
    }

    /// Returns both ends of the queue, and the signal of its closing, for a peer that this node has
    /// dialled.
    pub fn dialled(peer: StoreBoot, address: String) -> (Self, mpsc::Receiver<ToFollower>, Closed) {
        let (queue, receiver, closed) = queue(PEER_MESSAGES_MAX);
        (Self::Dialled { queue, peer, address }, receiver, closed)
    }

    /// Returns the event that a connection was opened.
    pub fn opening(&self, conn: Conn) -> Event {
        match self {
            Self::Gateway(_) => Event::GatewayConnected { conn },
            Self::Accepted(_) => Event::Accepted { conn },
            Self::Dialled { peer, .. } => Event::Dialled { conn, peer: *peer },
        }
    }

    /// Returns the event that the connection is gone.
    pub fn closing(&self, conn: Conn) -> Event {
        match self {
            Self::Gateway(_) => Event::GatewayGone { conn },
            Self::Accepted(_) | Self::Dialled { .. } => Event::Closed { conn },
        }
    }
}

/// The open connections. Messages of other connections are ignored.
#[derive(Debug, Default)]
pub struct Outboxes {
    open: HashMap<Conn, Outbox>,
}

/// The reason why a message can't be sent; the connection must be closed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum NotSent {
    /// The queue is full: the other end does not read.
    Full,
    /// The connection is gone.
    Gone,
}

impl Outboxes {
    /// Adds an open connection.
    pub fn insert(&mut self, conn: Conn, outbox: Outbox) {
        self.open.insert(conn, outbox);
    }

    /// Closes the connection; `None` if it is closed already.
    pub fn remove(&mut self, conn: Conn) -> Option<Outbox> {
        self.open.remove(&conn)
    }

    /// Returns whether the connection is open.
    pub fn is_open(&self, conn: Conn) -> bool {
        self.open.contains_key(&conn)
    }

    /// Returns the connections of gateways.
    pub fn gateways(&self) -> Vec<Conn> {
        let is_gateway = |outbox: &Outbox| matches!(outbox, Outbox::Gateway(_));
        self.open.iter().filter(|(_, outbox)| is_gateway(outbox)).map(|(&conn, _)| conn).collect()
    }

    /// Returns the peer and the address of a connection that this node has dialled.
    pub fn dialled(&self, conn: Conn) -> Option<(StoreBoot, &str)> {
        match self.open.get(&conn) {
            Some(Outbox::Dialled { peer, address, .. }) => Some((*peer, address)),
            _ => None,
        }
    }

    // A message for a connection that was closed meanwhile is dropped, as it would have been lost
    // anyway.

    /// Queues a reply to a gateway.
    pub fn to_gateway(&self, conn: Conn, reply: NodeReply) -> Result<(), NotSent> {
        match self.open.get(&conn) {
            Some(Outbox::Gateway(queue)) => queue.send(reply),
            _ => Ok(()),
        }
    }

    /// Queues a message to the peer that feeds this node.
    pub fn from_follower(&self, conn: Conn, message: FromFollower) -> Result<(), NotSent> {
        match self.open.get(&conn) {
            Some(Outbox::Accepted(queue)) => queue.send(message),
            _ => Ok(()),
        }
    }

    /// Queues a message to a peer that this node feeds.
    pub fn to_follower(&self, conn: Conn, message: ToFollower) -> Result<(), NotSent> {
        match self.open.get(&conn) {
            Some(Outbox::Dialled { queue, .. }) => queue.send(message),
            _ => Ok(()),
        }
    }
}

impl<T> OutboxQueue<T> {
    fn send(&self, message: T) -> Result<(), NotSent> {
        self.messages.try_send(message).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => NotSent::Full,
            mpsc::error::TrySendError::Closed(_) => NotSent::Gone,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gateway_that_does_not_read_is_noticed_and_never_waited_for() {
        let (outbox, mut unread, mut closed) = Outbox::gateway();
        let mut outboxes = Outboxes::default();
        outboxes.insert(Conn(1), outbox);
        let reply = || NodeReply::Read { id: 1, result: Err(engine::message::Refusal::Frozen) };
        for _ in 0..GATEWAY_MESSAGES_MAX {
            assert_eq!(outboxes.to_gateway(Conn(1), reply()), Ok(()));
        }
        assert_eq!(outboxes.to_gateway(Conn(1), reply()), Err(NotSent::Full));
        assert!(closed.try_recv() == Err(oneshot::error::TryRecvError::Empty));
        outboxes.remove(Conn(1));
        assert!(closed.try_recv() == Err(oneshot::error::TryRecvError::Closed));
        // Messages sent before are still delivered.
        assert!(unread.try_recv().is_ok());
        assert_eq!(outboxes.to_gateway(Conn(1), reply()), Ok(()));
    }
}
