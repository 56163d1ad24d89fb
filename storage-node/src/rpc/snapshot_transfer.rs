//! The transfer of a shard's snapshot: on a connection of its own, so that it never delays
//! replication.
//!
//! The sender reads the snapshot as of the moment when the state machine requested it, packs and
//! sends it; slowly enough to leave disk and network for client requests. The receiver stages it
//! and informs its state machine once all of it has arrived and been verified; the state machine
//! then decides what becomes of it. Both ends give up when the connection that the snapshot belongs
//! to is gone.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use engine::ids::{Conn, Slots, StoreBoot};
use engine::node::Event;
use proto::wire::peer_client::PeerClient;
use proto::wire::{self, snapshot_part};
use proto::{SnapshotDecoder, SnapshotEvent};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::task::{block_in_place, spawn_blocking};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};
use tracing::{info, warn};

use crate::inbox::Inbox;
use crate::peers::{self, PeerLimits};
use crate::rpc::{Services, first};
use crate::snapshot_files::{NotStaged, SnapshotReader};

/// The number of snapshots that one node sends at once: a second one, so that a slow receiver does
/// not delay all others.
const AT_ONCE: usize = 2;
/// The number of parts packed and not sent yet, a mebibyte each before packing.
const PARTS_AHEAD: usize = 2;

// ---- the sending end ----------------------------------------------------------------------------

/// Sends snapshots. Clones are cheap and share the limit of transfers at once.
#[derive(Clone, Debug)]
pub struct SnapshotSender {
    cluster: u128,
    me: StoreBoot,
    inbox: Inbox,
    limits: PeerLimits,
    turns: Arc<Semaphore>,
}

/// One snapshot to be sent.
pub struct SnapshotTransfer {
    /// The connection that the snapshot belongs to.
    pub conn: Conn,
    /// The number of the transfer.
    pub transfer: u64,
    /// The slots of the shard.
    pub slots: Slots,
    /// The receiver.
    pub to: StoreBoot,
    /// The address of the receiver.
    pub address: String,
    /// The content of the snapshot, as of the moment when the state machine requested it.
    pub reader: oneshot::Receiver<Option<SnapshotReader>>,
}

impl SnapshotSender {
    /// Creates a sender.
    pub fn new(cluster: u128, me: StoreBoot, inbox: Inbox, limits: PeerLimits) -> Self {
        Self { cluster, me, inbox, limits, turns: Arc::new(Semaphore::new(AT_ONCE)) }
    }

    /// Sends the snapshot, and informs the state machine if it fails.
    pub async fn send(self, snapshot: SnapshotTransfer) {
        let (transfer, shard) = (snapshot.transfer, snapshot.slots.shard());
        let (to, began) = (snapshot.to, Instant::now());
        match self.try_send(snapshot).await {
            Ok(()) => {
                let ms = began.elapsed().as_millis() as u64;
                info!(%shard, transfer, to = %to.store, ms, "snapshot sent");
            }
            Err(why) => {
                warn!(%shard, transfer, to = %to.store, why, "snapshot not sent");
                self.inbox.send_event(Event::SnapshotFailed { transfer });
            }
        }
    }

    async fn try_send(&self, snapshot: SnapshotTransfer) -> Result<(), String> {
        let _turn = self.turns.acquire().await.map_err(|_| "ending")?;
        let reader = snapshot.reader.await.map_err(|_| "the disk has failed")?;
        let reader = reader.ok_or("the state has no record of the shard")?;
        let header = wire::SnapshotHeader {
            open: Some(wire::Open::new(self.cluster, snapshot.conn.0)),
            from: Some(self.me.into()),
            to: Some(snapshot.to.into()),
            transfer: snapshot.transfer,
            slots: Some(snapshot.slots.into()),
            shard_record: reader.shard_record(),
        };
        let header = wire::SnapshotPart { kind: Some(snapshot_part::Kind::Header(header)) };
        let endpoint = peers::endpoint(&snapshot.address, self.limits);
        let endpoint = endpoint.map_err(|error| error.to_string())?;
        let channel = endpoint.connect().await.map_err(|error| error.to_string())?;
        let mut client = proto::limited!(PeerClient::new(channel));
        let (parts, sending) = mpsc::channel(PARTS_AHEAD);
        let bytes_per_second = self.limits.snapshot_bytes_per_second;
        let reading = spawn_blocking(move || {
            let mut pacer = SendPacer::new(bytes_per_second);
            reader.send(|part| {
                pacer.wait(size_of(&part));
                parts.blocking_send(part).is_ok()
            })
        });
        let stream = tokio_stream::once(header).chain(ReceiverStream::new(sending));
        // When the stream is refused half way, the queue is dropped with it and the reading ends.
        let sent = client.snapshot(stream).await;
        let read = reading.await.map_err(|error| error.to_string())?;
        sent.map(|_| ()).map_err(|status| format!("{} ({read:?})", status.message()))
    }
}

fn size_of(part: &wire::SnapshotPart) -> usize {
    match &part.kind {
        Some(snapshot_part::Kind::Chunk(chunk)) => chunk.rows.len(),
        _ => 0,
    }
}

/// Limits the rate of bytes. Unused time is not saved up.
struct SendPacer {
    bytes_per_second: f64,
    next: Instant,
}

impl SendPacer {
    fn new(bytes_per_second: u64) -> Self {
        Self { bytes_per_second: bytes_per_second.max(1) as f64, next: Instant::now() }
    }

    fn wait(&mut self, bytes: usize) {
        let now = Instant::now();
        thread::sleep(self.next.saturating_duration_since(now));
        let took = Duration::from_secs_f64(bytes as f64 / self.bytes_per_second);
        self.next = self.next.max(now) + took;
    }
}

// ---- the receiving end --------------------------------------------------------------------------

/// Receives a snapshot. Its stream is answered once all of it is staged. A peer only sends a
/// snapshot that this node's state machine has accepted, so the state machine knows of it when it
/// is staged.
pub(crate) async fn receive(
    services: &Services,
    mut stream: Streaming<wire::SnapshotPart>,
) -> Result<(), Status> {
    let mut rows = SnapshotDecoder::default();
    let header = rows.take(first(&mut stream).await?)?;
    let SnapshotEvent::Header { open, from, to, transfer, slots, shard_record } = header else {
        return Err(Status::invalid_argument("the header comes first"));
    };
    let greeting = open.accept(services.cluster)?;
    if to != services.me {
        return Err(Status::failed_precondition("meant for another boot of this store"));
    }
    let no_feed =
        || Status::failed_precondition("the connection that the snapshot belongs to is gone");
    let mut feed = services.feeds.find(from, greeting.connection).ok_or_else(no_feed)?;
    let begun = services.staging.begin(feed.conn, transfer, slots, &shard_record);
    let mut stager = begun.map_err(refused)?;
    loop {
        let part = tokio::select! {
            part = stream.message() => part?,
            _ = feed.ended.changed() => return Err(no_feed()),
        };
        let part = part.ok_or_else(|| Status::invalid_argument("the snapshot was cut short"))?;
        match rows.take(part)? {
            SnapshotEvent::Rows(rows) => {
                block_in_place(|| stager.rows(&rows)).map_err(refused)?;
            }
            SnapshotEvent::End => break,
            SnapshotEvent::Header { .. } => return Err(Status::invalid_argument("two headers")),
        }
    }
    let state = block_in_place(|| stager.finish()).map_err(refused)?;
    let shard = slots.shard();
    info!(%shard, transfer, from = %from.store, "snapshot received");
    services.inbox.send_event(Event::SnapshotStaged { conn: feed.conn, transfer, state });
    Ok(())
}

fn refused(why: NotStaged) -> Status {
    match why {
        NotStaged::Refused(_) => Status::data_loss(why.to_string()),
        NotStaged::NoRoom(_) => Status::resource_exhausted(why.to_string()),
        NotStaged::DiskFailed => Status::internal(why.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pace_is_kept() {
        let mut pacer = SendPacer::new(1_000_000);
        let began = Instant::now();
        for _ in 0..4 {
            pacer.wait(10_000);
        }
        // The first write is sent at once; the other three wait 10 ms each.
        assert!(began.elapsed() >= Duration::from_millis(30), "{:?}", began.elapsed());
    }
}
