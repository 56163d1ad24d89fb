//! The sending of batches, packed by node.
//!
//! A turn reviews the shards on its agenda and no others, so it costs what it changes, however many
//! shards there are. A shard that has something to send joins the send queue of the connection to
//! its primary; a connection with room in its window takes shards from its queue until the message
//! is full.

use super::in_flight::BatchSend;
use super::queue::ShardQueue;
use super::routes::Routes;
use super::session::BatchSessions;
use super::shard_queues::ShardQueues;
use super::{BatcherTurn, Effect};
use crate::batch::Batch;
use crate::ids::{Conn, Epoch, Now, ShardId};
use crate::message::GatewayMessage;
use crate::planted::Planted;

/// The readiness of a shard to send.
enum SendReadiness {
    /// The shard has nothing to send.
    Nothing,
    /// The shard can send at this time.
    At(Now),
    /// The shard can send to this primary, in this epoch, now.
    Ready(Conn, Epoch),
}

/// The parts of a worker that send batches.
pub(super) struct Sending<'a> {
    pub(super) turn: BatcherTurn<'a>,
    pub(super) sessions: &'a BatchSessions,
    pub(super) routes: &'a mut Routes,
    pub(super) queues: &'a mut ShardQueues,
}

impl Sending<'_> {
    /// Puts a shard into a send queue if it has something to send, or sets a timer for when it will
    /// have.
    pub(super) fn queue_shard(&mut self, shard: ShardId) {
        match self.readiness(shard) {
            SendReadiness::Nothing => {}
            SendReadiness::At(at) => {
                self.turn.agenda.timers.insert((at, shard));
            }
            SendReadiness::Ready(conn, _) => {
                let Some(connection) = self.routes.router.connection_mut(conn) else { return };
                if self.queues.change(shard, |queue| queue.queue_on(conn)) == Some(true) {
                    connection.send_queue.push_back(shard);
                }
                self.turn.agenda.connections.add(conn);
            }
        }
    }

    /// Returns whether, when and to which primary the shard can send.
    fn readiness(&self, shard: ShardId) -> SendReadiness {
        let (now, settings) = (self.turn.now, self.turn.settings);
        let Some(queue) = self.queues.get(shard) else { return SendReadiness::Nothing };
        let Some(primary) = self.routes.to_primary(shard) else { return SendReadiness::Nothing };
        // The shard was split, and what waits is not sorted yet.
        let is_split = || self.routes.map.get(shard).is_some_and(|it| it.slots != queue.slots());
        if queue.in_flight().is_none() && is_split() {
            return SendReadiness::Nothing;
        }
        let session = self.sessions.for_shard(queue.ended());
        let Some(at) = queue.sends_at(primary, session, settings) else {
            return SendReadiness::Nothing;
        };
        let frozen_until =
            self.queues.frozen_by(primary, now, self.routes, shard).unwrap_or_default();
        match at.max(frozen_until) {
            not_before if not_before > now => SendReadiness::At(not_before),
            _ => SendReadiness::Ready(primary.0, primary.1),
        }
    }

    /// Sends the shards of the connection's send queue, as far as its window and bytes allow.
    pub(super) fn pack(&mut self, conn: Conn) {
        let (now, settings) = (self.turn.now, self.turn.settings);
        self.turn.agenda.windows.remove(&conn);
        loop {
            let Some(connection) = self.routes.router.connection_mut(conn) else { return };
            if connection.send_queue.is_empty() {
                return;
            }
            let least = connection.frames.least_load(now, settings.window);
            if !least.is_some_and(|least| self.queues.have_ops(&connection.send_queue, least)) {
                let opens_at = connection.frames.opens_at(now, settings.window);
                self.turn.agenda.windows.extend(opens_at.map(|at| (conn, at)));
                return;
            }
            let message = connection.frames.next_message();
            let (batches, ops, again) = self.fill(conn, message);
            if batches.is_empty() {
                return;
            }
            let Some(connection) = self.routes.router.connection_mut(conn) else { return };
            connection.frames.sent(now, batches.len(), ops, settings.window);
            self.turn.counts.sends += batches.len() as u64;
            let message = match again {
                Some(shard) => {
                    let batch = batches.into_iter().next().expect("it is alone in its message");
                    GatewayMessage::Resend { message, shard, batch }
                }
                None => GatewayMessage::Frame { message, batches },
            };
            self.turn.effects.push(Effect::Send { conn, message });
        }
    }

    /// The batches of one message, and the number of their operations; and the shard, if it is a
    /// batch that was sealed for a shard that was split since, which travels alone. The list is
    /// empty if no shard in the queue has anything to send after all, or if too many bytes are in
    /// flight already; an answer will then bring the connection here again.
    fn fill(&mut self, conn: Conn, message: u64) -> (Vec<Batch>, usize, Option<ShardId>) {
        let settings = self.turn.settings;
        let mut batches = Vec::new();
        let (mut bytes, mut ops) = (0, 0);
        let unlimited = Planted::FrameUnlimited.is_in(settings.planted);
        while bytes < settings.sizes.message_bytes || unlimited {
            let Some(connection) = self.routes.router.connection(conn) else { break };
            if connection.bytes >= settings.connection_bytes_max {
                break;
            }
            let Some(&shard) = connection.send_queue.front() else { break };
            let is_alone = self.queues.is_divided(shard);
            if is_alone && !batches.is_empty() {
                break;
            }
            let Some(connection) = self.routes.router.connection_mut(conn) else { break };
            connection.send_queue.pop_front();
            let Some(batch) = self.next_batch(shard, conn, message) else { continue };
            bytes += batch.payload.len();
            ops += self.queues.get(shard).map_or(0, ShardQueue::next_ops);
            batches.push(batch);
            if is_alone {
                return (batches, ops, Some(shard));
            }
        }
        (batches, ops, None)
    }

    /// The batch that the shard sends now: the one in flight, or a new one.
    fn next_batch(&mut self, shard: ShardId, conn: Conn, message: u64) -> Option<Batch> {
        // Since the shard was queued it may have moved to another connection, or have nothing to
        // send any more.
        if self.queues.change(shard, |queue| queue.unqueue(conn)) != Some(true) {
            return None;
        }
        let SendReadiness::Ready(now_to, epoch) = self.readiness(shard) else { return None };
        if now_to != conn {
            return None;
        }
        let send = BatchSend { conn, message, epoch };
        let batch = self.queues.send(shard, self.sessions.present(), send, self.turn.counts)?;
        self.routes.router.connection_mut(conn)?.bytes += batch.payload.len();
        Some(batch)
    }
}
