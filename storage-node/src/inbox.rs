//! What the loop is told: one queue, fed by sockets, disk and etcd.
//!
//! The queue itself is std's `mpsc`, without a bound: sending never blocks, so a disk thread is never held up by a
//! full queue, and it wakes the loop only if the loop sleeps: under load a message costs no system call. (std's is
//! crossbeam's queue; crossbeam or flume would add a dependency and nothing that is needed here.)
//!
//! Sockets are held back instead: before a message is queued, its reader takes as many units from an [`Intake`] as the
//! message has kilobytes, and the loop gives them back once it has handled it. A reader that waits stops
//! reading, HTTP/2's window fills, and the sender waits: memory stays bounded from end to end. Gateways and peers have an
//! intake each, so that no flood of gateways holds up replication.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;

use engine::ids::Conn;
use engine::message::{NodeQuery, NodeQueryReply};
use engine::node::Event;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use crate::disk::DiskEvent;
use crate::exit::Exit;
use crate::outbox::Outbox;

/// One thing that the loop is told.
#[derive(Debug)]
pub enum Told {
    /// From etcd, or about a peer: never held back.
    Event(Event),
    /// etcd has told of every shard that there is.
    ShardsListed,
    /// From a disk thread.
    Disk(DiskEvent),
    /// From a socket. What it takes of the intake is given back when this is dropped.
    Received(Event, OwnedSemaphorePermit),
    /// A connection stands; what is to be sent on it goes here. Said before anything else about it.
    Opened { conn: Conn, outbox: Outbox },
    /// Somebody asks.
    Query { message: NodeQuery, reply: oneshot::Sender<NodeQueryReply> },
    /// Hand over what is led here, take no more work, make durable what is under way, and end.
    Stop,
    /// End at once.
    Exit(Exit),
}

/// The sending end. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Inbox {
    told: mpsc::Sender<Told>,
    conns: Arc<AtomicU64>,
    pub gateways: Intake,
    pub peers: Intake,
}

impl Inbox {
    /// `intake_bytes`: for each of the two intakes.
    pub fn new(intake_bytes: usize) -> (Self, mpsc::Receiver<Told>) {
        let (told, receiver) = mpsc::channel();
        let intake = || Intake::new(intake_bytes);
        let inbox = Self { told, conns: Arc::default(), gateways: intake(), peers: intake() };
        (inbox, receiver)
    }

    /// A number that no connection of this process has had.
    pub fn fresh_conn(&self) -> Conn {
        Conn(self.conns.fetch_add(1, Ordering::Relaxed) + 1)
    }

    /// Tells the loop. False: it has ended, and so will the process.
    pub fn tell(&self, told: Told) -> bool {
        self.told.send(told).is_ok()
    }

    pub fn event(&self, event: Event) -> bool {
        self.tell(Told::Event(event))
    }
}

/// How much may have been received and not been handled yet.
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
