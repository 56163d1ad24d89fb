//! What the loop sends: one bounded queue per connection, drained by the connection's own task.
//!
//! The loop never waits for a socket. A queue that is full belongs to somebody who does not read: the connection is
//! closed, and whoever dials again is brought up to date. Messages cross as engine values and are encoded by the
//! connection's task, not by the loop.
//!
//! An [`Outbox`] that is dropped closes its connection; the task that reads from it learns so by its [`Closed`].

use std::collections::HashMap;

use engine::ids::{Conn, StoreBoot};
use engine::message::{FromFollower, NodeReply, ToFollower};
use engine::node::Event;
use tokio::sync::{mpsc, oneshot};

/// Messages waiting to be sent to a gateway: a reply per batch or read, each small. Far more than its window of
/// frames can ask for; reads it may have thousands of.
const GATEWAY_MESSAGES_MAX: usize = 32_768;
/// Messages waiting to be sent to a peer. Their bytes are bounded by the engine's window per connection; besides
/// there are some thirty small ones a second.
const PEER_MESSAGES_MAX: usize = 4_096;

/// Where what is to be sent on one connection goes.
#[derive(Debug)]
pub enum Outbox {
    /// A gateway has dialled this node.
    Gateway(Queue<NodeReply>),
    /// A peer has dialled this node, to feed it.
    Accepted(Queue<FromFollower>),
    /// This node has dialled a peer, to feed it.
    Dialled { queue: Queue<ToFollower>, peer: StoreBoot, address: String },
}

/// The loop's end of a queue.
#[derive(Debug)]
pub struct Queue<T> {
    messages: mpsc::Sender<T>,
    /// Dropped with it.
    _open: oneshot::Sender<()>,
}

/// Resolves when the loop has closed the connection.
pub type Closed = oneshot::Receiver<()>;

fn queue<T>(messages_max: usize) -> (Queue<T>, mpsc::Receiver<T>, Closed) {
    let (messages, receiver) = mpsc::channel(messages_max);
    let (open, closed) = oneshot::channel();
    (Queue { messages, _open: open }, receiver, closed)
}

impl Outbox {
    pub fn gateway() -> (Self, mpsc::Receiver<NodeReply>, Closed) {
        let (queue, receiver, closed) = queue(GATEWAY_MESSAGES_MAX);
        (Self::Gateway(queue), receiver, closed)
    }

    pub fn accepted() -> (Self, mpsc::Receiver<FromFollower>, Closed) {
        let (queue, receiver, closed) = queue(PEER_MESSAGES_MAX);
        (Self::Accepted(queue), receiver, closed)
    }

    pub fn dialled(peer: StoreBoot, address: String) -> (Self, mpsc::Receiver<ToFollower>, Closed) {
        let (queue, receiver, closed) = queue(PEER_MESSAGES_MAX);
        (Self::Dialled { queue, peer, address }, receiver, closed)
    }

    /// What the machine is told when the connection stands.
    pub fn opening(&self, conn: Conn) -> Event {
        match self {
            Self::Gateway(_) => Event::GatewayConnected { conn },
            Self::Accepted(_) => Event::Accepted { conn },
            Self::Dialled { peer, .. } => Event::Dialled { conn, peer: *peer },
        }
    }

    /// What the machine is told when it is gone.
    pub fn closing(&self, conn: Conn) -> Event {
        match self {
            Self::Gateway(_) => Event::GatewayGone { conn },
            Self::Accepted(_) | Self::Dialled { .. } => Event::Closed { conn },
        }
    }
}

/// The connections that stand. What is not in here is not heard any more.
#[derive(Debug, Default)]
pub struct Outboxes {
    open: HashMap<Conn, Outbox>,
}

/// The message can't be sent: the connection is to be closed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum NotSent {
    /// Whoever is there does not read.
    Full,
    /// Nobody is there.
    Gone,
}

impl Outboxes {
    pub fn insert(&mut self, conn: Conn, outbox: Outbox) {
        self.open.insert(conn, outbox);
    }

    /// Closes the connection; none if it is closed already.
    pub fn remove(&mut self, conn: Conn) -> Option<Outbox> {
        self.open.remove(&conn)
    }

    pub fn is_open(&self, conn: Conn) -> bool {
        self.open.contains_key(&conn)
    }

    /// The gateways' connections.
    pub fn gateways(&self) -> Vec<Conn> {
        let is_gateway = |outbox: &Outbox| matches!(outbox, Outbox::Gateway(_));
        self.open.iter().filter(|(_, outbox)| is_gateway(outbox)).map(|(&conn, _)| conn).collect()
    }

    /// Whom this node has dialled, and where.
    pub fn dialled(&self, conn: Conn) -> Option<(StoreBoot, &str)> {
        match self.open.get(&conn) {
            Some(Outbox::Dialled { peer, address, .. }) => Some((*peer, address)),
            _ => None,
        }
    }

    // What is sent on a connection that was closed meanwhile goes nowhere, as it would have anyway.

    pub fn to_gateway(&self, conn: Conn, reply: NodeReply) -> Result<(), NotSent> {
        match self.open.get(&conn) {
            Some(Outbox::Gateway(queue)) => queue.send(reply),
            _ => Ok(()),
        }
    }

    pub fn from_follower(&self, conn: Conn, message: FromFollower) -> Result<(), NotSent> {
        match self.open.get(&conn) {
            Some(Outbox::Accepted(queue)) => queue.send(message),
            _ => Ok(()),
        }
    }

    pub fn to_follower(&self, conn: Conn, message: ToFollower) -> Result<(), NotSent> {
        match self.open.get(&conn) {
            Some(Outbox::Dialled { queue, .. }) => queue.send(message),
            _ => Ok(()),
        }
    }
}

impl<T> Queue<T> {
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
        // What was sent before is still delivered.
        assert!(unread.try_recv().is_ok());
        assert_eq!(outboxes.to_gateway(Conn(1), reply()), Ok(()));
    }
}
