//! A whole copy of a shard on its way: a connection of its own, so that it never delays replication.
//!
//! The sender reads the copy as it stood when the machine asked for it, packs and sends; slowly enough to leave room on
//! disk and network for what clients wait for. The receiver stages it and tells its machine once all of it is there and
//! good, which then decides what becomes of it. Both ends give up when the connection that the copy belongs to is gone.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use engine::ids::{Conn, Slots, StoreBoot};
use engine::node::Event;
use proto::wire::peer_client::PeerClient;
use proto::wire::{self, snapshot_part};
use proto::{Rows, SnapshotEvent};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::task::{block_in_place, spawn_blocking};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};
use tracing::{info, warn};

use crate::inbox::Inbox;
use crate::peers::{self, Limits};
use crate::rpc::{Services, first};
use crate::snapshot_files::{NotStaged, SnapshotReader};

/// Copies sent at once by one node: a second one, so that a slow receiver does not hold up all others.
const AT_ONCE: usize = 2;
/// Parts packed and not sent yet, of a mebibyte each before packing.
const PARTS_AHEAD: usize = 2;

// ---- the sending end -----------------------------------------------------------------------------

/// Sends copies. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Sender {
    cluster: u128,
    me: StoreBoot,
    inbox: Inbox,
    limits: Limits,
    turns: Arc<Semaphore>,
}

/// One copy to be sent.
#[derive(Debug)]
pub struct Transfer {
    pub conn: Conn,
    pub transfer: u64,
    pub slots: Slots,
    pub to: StoreBoot,
    pub address: String,
    /// What is in the copy: it was asked for when the machine wanted it.
    pub reader: oneshot::Receiver<Option<SnapshotReader>>,
}

impl Sender {
    pub fn new(cluster: u128, me: StoreBoot, inbox: Inbox, limits: Limits) -> Self {
        Self { cluster, me, inbox, limits, turns: Arc::new(Semaphore::new(AT_ONCE)) }
    }

    /// Sends the copy; the machine is told if it can't be.
    pub async fn send(self, copy: Transfer) {
        let (transfer, shard) = (copy.transfer, copy.slots.shard());
        let (to, began) = (copy.to, Instant::now());
        match self.try_send(copy).await {
            Ok(()) => {
                let ms = began.elapsed().as_millis() as u64;
                info!(%shard, transfer, to = %to.store, ms, "copy sent");
            }
            Err(why) => {
                warn!(%shard, transfer, to = %to.store, why, "copy not sent");
                self.inbox.event(Event::SnapshotFailed { transfer });
            }
        }
    }

    async fn try_send(&self, copy: Transfer) -> Result<(), String> {
        let _turn = self.turns.acquire().await.map_err(|_| "ending")?;
        let reader = copy.reader.await.map_err(|_| "the disk has failed")?;
        let reader = reader.ok_or("the state has no record of the shard")?;
        let header = wire::SnapshotHeader {
            open: Some(wire::Open::new(self.cluster, copy.conn.0)),
            from: Some(self.me.into()),
            to: Some(copy.to.into()),
            transfer: copy.transfer,
            slots: Some(copy.slots.into()),
            shard_record: reader.shard_record(),
        };
        let header = wire::SnapshotPart { kind: Some(snapshot_part::Kind::Header(header)) };
        let endpoint = peers::endpoint(&copy.address, self.limits);
        let endpoint = endpoint.map_err(|error| error.to_string())?;
        let channel = endpoint.connect().await.map_err(|error| error.to_string())?;
        let mut client = proto::limited!(PeerClient::new(channel));
        let (parts, sending) = mpsc::channel(PARTS_AHEAD);
        let bytes_per_second = self.limits.copy_bytes_per_second;
        let reading = spawn_blocking(move || {
            let mut pace = Pace::new(bytes_per_second);
            reader.send(|part| {
                pace.wait(size_of(&part));
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

/// Spreads bytes over time. What was not used is not saved up.
struct Pace {
    bytes_per_second: f64,
    next: Instant,
}

impl Pace {
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

// ---- the receiving end ---------------------------------------------------------------------------

/// Takes a copy. Its stream is answered once all of it is staged. Only a copy that this node's machine has accepted is sent,
/// so the machine knows of it when it is staged.
pub(crate) async fn receive(
    services: &Services,
    mut stream: Streaming<wire::SnapshotPart>,
) -> Result<(), Status> {
    let mut rows = Rows::default();
    let header = rows.take(first(&mut stream).await?)?;
    let SnapshotEvent::Header { open, from, to, transfer, slots, shard_record } = header else {
        return Err(Status::invalid_argument("the header comes first"));
    };
    let greeting = open.accept(services.cluster)?;
    if to != services.me {
        return Err(Status::failed_precondition("meant for another run of this store"));
    }
    let no_link = || Status::failed_precondition("the connection that the copy belongs to is gone");
    let mut link = services.links.find(from, greeting.link).ok_or_else(no_link)?;
    let begun = services.staging.begin(link.conn, transfer, slots, &shard_record);
    let mut stager = begun.map_err(refused)?;
    loop {
        let part = tokio::select! {
            part = stream.message() => part?,
            _ = link.ended.changed() => return Err(no_link()),
        };
        let part = part.ok_or_else(|| Status::invalid_argument("the copy was cut short"))?;
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
    info!(%shard, transfer, from = %from.store, "copy received");
    services.inbox.event(Event::SnapshotStaged { conn: link.conn, transfer, state });
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
        let mut pace = Pace::new(1_000_000);
        let began = Instant::now();
        for _ in 0..4 {
            pace.wait(10_000);
        }
        // The first goes at once; the other three wait 10 ms each.
        assert!(began.elapsed() >= Duration::from_millis(30), "{:?}", began.elapsed());
    }
}
