//! The messages to the loop: one queue, fed by sockets, disk and etcd.
//!
//! The queue is tokio's unbounded `mpsc`: sending never blocks, so a disk thread is never held up
//! by a full queue, and a reader of a socket that runs on the loop's own thread wakes it without a
//! system call.
//!
//! Backpressure applies to sockets instead: before a message is queued, its reader takes as many
//! permits from an [`Intake`] as the message has kilobytes, and the loop returns them at the end of
//! the turn. A reader that waits stops reading, HTTP/2's window fills, and the sender
//! waits: memory stays bounded from end to end. Gateways and peers have an intake each, so that no
//! flood from gateways delays replication.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use engine::ids::Conn;
use engine::message::{NodeQuery, NodeQueryReply};
use engine::node::Event;
use process::ProcessExit;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};

use crate::disk_event::DiskEvent;
use crate::outbox::Outbox;

/// One message to the loop.
#[derive(Debug)]
pub enum LoopMessage {
    /// An event from etcd, or about a peer: no backpressure applies.
    Event(Event),
    /// Every shard record that etcd holds has been sent.
    ShardsListed,
    /// An event from a disk thread.
    Disk(DiskEvent),
    /// An event from a socket. Dropping the permit returns its kilobytes to the intake.
    Received(Event, OwnedSemaphorePermit),
    /// A connection was opened, with the queue of its outgoing messages. This precedes every other
    /// message about it.
    Opened {
        /// The connection.
        conn: Conn,
        /// The queue of its outgoing messages.
        outbox: Outbox,
    },
    /// A query that awaits a reply.
    Query {
        /// The query.
        message: NodeQuery,
        /// The channel of the reply.
        reply: oneshot::Sender<NodeQueryReply>,
    },
    /// Requests a graceful stop: hand over leadership, accept no more work, make groups in flight
    /// durable.
    Stop,
    /// Ends the loop at once.
    Exit(ProcessExit),
}

/// The sending end of the queue. Clones are cheap.
#[derive(Clone, Debug)]
pub struct Inbox {
    messages: mpsc::UnboundedSender<LoopMessage>,
    conns: Arc<AtomicU64>,
    /// The intake of gateways.
    pub gateways: Intake,
    /// The intake of peers.
    pub peers: Intake,
}

impl Inbox {
    /// Creates a queue. Each of the two intakes admits `intake_bytes`.
    pub fn new(intake_bytes: usize) -> (Self, mpsc::UnboundedReceiver<LoopMessage>) {
        let (messages, receiver) = mpsc::unbounded_channel();
        let intake = || Intake::new(intake_bytes);
        let inbox = Self { messages, conns: Arc::default(), gateways: intake(), peers: intake() };
        (inbox, receiver)
    }

    /// Returns a connection number that this process has not used before.
    pub fn fresh_conn(&self) -> Conn {
        Conn(self.conns.fetch_add(1, Ordering::Relaxed) + 1)
    }

    /// Sends a message to the loop. Returns `false` if the loop has ended, and the process soon
    /// will.
    pub fn send(&self, message: LoopMessage) -> bool {
        self.messages.send(message).is_ok()
    }

    /// Sends an event to the loop. Returns `false` if the loop has ended.
    pub fn send_event(&self, event: Event) -> bool {
        self.send(LoopMessage::Event(event))
    }
}

/// A limit of the bytes that were received and not handled yet.
#[derive(Clone, Debug)]
pub struct Intake {
    kilobytes: Arc<Semaphore>,
    all: u32,
}

impl Intake {
    fn new(bytes: usize) -> Self {
        let all = u32::try_from(bytes >> 10).unwrap_or(u32::MAX).min(1 << 28);
        Self { kilobytes: Arc::new(Semaphore::new(all as usize)), all }
    }

    /// Waits until there is room for a message of this size.
    pub async fn room(&self, bytes: usize) -> OwnedSemaphorePermit {
        let units = u32::try_from(bytes >> 10).unwrap_or(u32::MAX).saturating_add(1).min(self.all);
        let permit = self.kilobytes.clone().acquire_many_owned(units).await;
        permit.expect("the semaphore is never closed")
    }
}
