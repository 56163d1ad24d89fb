//! The end of a turn: deadlines expire, then batches are sent, packed by node.
//!
//! A turn reviews the shards that something has happened to and no others (`due`), so it costs what
//! it changes, however many shards there are. A shard that has something to send joins the send
//! queue of the connection to its primary; a connection with room in its window takes shards from
//! its queue until the message is full.

use super::in_flight::BatchSend;
use super::outcome::Failure;
use super::{Batcher, BatcherTimer, Effect};
use crate::batch::Batch;
use crate::ids::{Conn, Now, ShardId};
use crate::message::GatewayMessage;
use crate::planted::Planted;
use crate::router::Window;

/// The readiness of a shard to send.
enum SendReadiness {
    /// The shard has nothing to send.
    Nothing,
    /// The shard can send at this time.
    At(Now),
    /// The shard can send to this primary now.
    Ready(Conn),
}

impl Batcher {
    pub(super) fn on_turn_ended(&mut self, effects: &mut Vec<Effect>) {
        while let Some(request) = self.requests.late(self.now) {
            self.expire(request, effects);
        }
        while let Some(&(at, timer)) = self.timers.first()
            && at <= self.now
        {
            self.timers.pop_first();
            match timer {
                BatcherTimer::Shard(shard) => self.due.insert(shard),
                BatcherTimer::Connection(conn) => self.touched.insert(conn),
            };
        }
        for shard in std::mem::take(&mut self.due) {
            self.review_shard(shard, effects);
        }
        // Operations that were rerouted are due again, in another shard.
        for shard in std::mem::take(&mut self.due) {
            self.review_shard(shard, effects);
        }
        for conn in std::mem::take(&mut self.touched) {
            self.pack(conn, effects);
        }
        self.reads.turn_ended(self.now, &self.map, &self.router, effects);
    }

    /// Expires a request: each operation that is not decided is answered by what is known of it
    /// now.
    fn expire(&mut self, request: u64, effects: &mut Vec<Effect>) {
        for shard in self.requests.shards(request) {
            let reason = self.unsent_reason(shard);
            let Some(queue) = self.queues.get_mut(&shard) else { continue };
            for part in queue.take_request(request) {
                self.bytes -= part.bytes;
                self.requests.part_failed(&part, reason, effects);
            }
            let planted = Planted::NotAppliedAfterSend.is_in(self.settings.planted);
            let reason = if planted { Failure::Slow } else { Failure::Deadline };
            for part in queue.in_flight.iter().flat_map(|out| out.parts_of(request)) {
                self.requests.part_failed(part, reason, effects);
            }
        }
        assert!(!self.requests.is_open(request), "all its parts are in a queue or a batch");
    }

    /// The reason why an operation of the shard was never sent.
    pub(super) fn unsent_reason(&self, shard: ShardId) -> Failure {
        let Some(queue) = self.queues.get(&shard) else { return Failure::Slow };
        if self.present.is_none() || queue.ended == self.present {
            return Failure::NoSession;
        }
        let primary = self.map.get(shard).and_then(|record| self.router.to(record.primary));
        let refused = queue.refusals > 0;
        match primary.is_none() || refused {
            true => Failure::NoPrimary,
            false if queue.overloaded => Failure::Overloaded,
            false => Failure::Slow,
        }
    }

    /// Puts a shard into a send queue if it has something to send, or sets a timer for when it will
    /// have.
    fn review_shard(&mut self, shard: ShardId, effects: &mut Vec<Effect>) {
        self.reroute(shard, effects);
        if self.frozen_until(shard).is_some() {
            self.fail_waiting(shard, Failure::Frozen, effects);
        }
        match self.readiness(shard) {
            SendReadiness::Nothing => {}
            SendReadiness::At(at) => {
                self.timers.insert((at, BatcherTimer::Shard(shard)));
            }
            SendReadiness::Ready(conn) => {
                let Some(queue) = self.queues.get_mut(&shard) else { return };
                let Some(connection) = self.router.connection_mut(conn) else { return };
                if queue.queued_on.replace(conn) != Some(conn) {
                    connection.send_queue.push_back(shard);
                }
                self.touched.insert(conn);
            }
        }
    }

    pub(super) fn fail_waiting(
        &mut self,
        shard: ShardId,
        failure: Failure,
        effects: &mut Vec<Effect>,
    ) {
        let Some(queue) = self.queues.get_mut(&shard) else { return };
        for part in queue.take_waiting() {
            self.bytes -= part.bytes;
            self.requests.part_failed(&part, failure, effects);
        }
    }

    /// The time until which the primary takes no writes for the shard, as far as it has reported.
    ///
    /// While a batch of the shard is in flight on that connection the notice does not expire:
    /// nothing could be sent to ask again, and operations behind that batch would wait for their
    /// deadline instead of being refused. The batch's answer replaces the notice.
    pub(super) fn frozen_until(&self, shard: ShardId) -> Option<Now> {
        let record = self.map.get(shard)?;
        let conn = self.router.to(record.primary)?;
        let until = self.router.connection(conn)?.frozen_until(shard)?;
        let in_flight = self.queues.get(&shard).and_then(|queue| queue.in_flight.as_ref());
        let is_out = in_flight.is_some_and(|in_flight| !in_flight.is_due(conn, record.epoch));
        (until > self.now || is_out).then_some(until)
    }

    /// Returns whether, when and to which primary the shard can send.
    fn readiness(&self, shard: ShardId) -> SendReadiness {
        let Some(queue) = self.queues.get(&shard) else { return SendReadiness::Nothing };
        let Some(record) = self.map.get(shard) else { return SendReadiness::Nothing };
        let Some(conn) = self.router.to(record.primary) else { return SendReadiness::Nothing };
        let mut not_before = queue.retry_at;
        match &queue.in_flight {
            Some(in_flight) => {
                if !in_flight.is_due(conn, record.epoch) {
                    return SendReadiness::Nothing;
                }
            }
            None => {
                let no_session = self.present.is_none() || queue.ended == self.present;
                if queue.waiting.is_empty() || no_session {
                    return SendReadiness::Nothing;
                }
                if !queue.fills_a_batch(&self.settings.sizes) {
                    let lingers = Now(queue.since.0.saturating_add(self.settings.linger_us));
                    not_before = not_before.max(lingers);
                }
            }
        }
        not_before = not_before.max(self.frozen_until(shard).unwrap_or_default());
        if not_before > self.now {
            SendReadiness::At(not_before)
        } else {
            SendReadiness::Ready(conn)
        }
    }

    /// Sends the shards of the connection's send queue, as far as its window and bytes allow.
    fn pack(&mut self, conn: Conn, effects: &mut Vec<Effect>) {
        let window = Window { messages: self.settings.window, us: self.settings.window_us };
        loop {
            let Some(connection) = self.router.connection_mut(conn) else { return };
            if connection.send_queue.is_empty() {
                return;
            }
            if let Some(at) = connection.blocked_until(self.now, window) {
                self.timers.insert((at, BatcherTimer::Connection(conn)));
                return;
            }
            let message = connection.next_message();
            let batches = self.fill(conn, message);
            if batches.is_empty() {
                return;
            }
            let Some(connection) = self.router.connection_mut(conn) else { return };
            connection.sent(self.now, batches.len());
            self.counts.sends += batches.len() as u64;
            effects
                .push(Effect::Send { conn, message: GatewayMessage::Frame { message, batches } });
        }
    }

    /// The batches of one message. The list is empty if no shard in the queue has anything to send
    /// after all, or if too many bytes are in flight already; an answer will then bring the
    /// connection here again.
    fn fill(&mut self, conn: Conn, message: u64) -> Vec<Batch> {
        let mut batches = Vec::new();
        let mut bytes = 0;
        let unlimited = Planted::FrameUnlimited.is_in(self.settings.planted);
        while bytes < self.settings.sizes.message_bytes || unlimited {
            let Some(connection) = self.router.connection_mut(conn) else { break };
            if connection.bytes >= self.settings.connection_bytes_max {
                break;
            }
            let Some(shard) = connection.send_queue.pop_front() else { break };
            if let Some(batch) = self.next_batch(shard, conn, message) {
                bytes += batch.payload.len();
                batches.push(batch);
            }
        }
        batches
    }

    /// The batch that the shard sends now: the one in flight, or a new one.
    fn next_batch(&mut self, shard: ShardId, conn: Conn, message: u64) -> Option<Batch> {
        let queue = self.queues.get_mut(&shard)?;
        // Since the shard was queued it may have moved to another connection, or have nothing to
        // send any more.
        if queue.queued_on != Some(conn) {
            return None;
        }
        queue.queued_on = None;
        let SendReadiness::Ready(now_to) = self.readiness(shard) else { return None };
        if now_to != conn {
            return None;
        }
        let epoch = self.map.get(shard)?.epoch;
        let queue = self.queues.get_mut(&shard)?;
        if queue.in_flight.is_none() {
            let sealed = queue.seal(self.present?, &mut self.sealer);
            self.in_flight += 1;
            self.counts.batches += 1;
            self.counts.ops += sealed.parts.iter().map(|part| part.ops.len() as u64).sum::<u64>();
            self.counts.ops_sent += sealed.entries() as u64;
        }
        if !queue.waiting.is_empty() {
            // The rest is sent when this batch is decided.
            queue.since = Now(0);
        }
        let in_flight = queue.in_flight.as_mut()?;
        in_flight.sent(BatchSend { conn, message, epoch });
        let batch = in_flight.batch.clone();
        self.router.connection_mut(conn)?.bytes += batch.payload.len();
        Some(batch)
    }
}
