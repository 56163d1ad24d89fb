//! The end of a turn: deadlines, then what can be sent, packed by node.
//!
//! Only shards that something has happened to are looked at (`due`), so a turn costs what it
//! changes, however many shards there are. A shard that has something to send lines up at the lane
//! to its primary; a lane with a free place in its window takes from its line until the message is
//! full.

use super::outcome::Failure;
use super::undecided::Send;
use super::{Effect, Timer, Worker};
use crate::batch::Batch;
use crate::ids::{Conn, Now, ShardId};
use crate::message::GatewayMessage;
use crate::planted::Planted;
use crate::router::Window;

/// Whether a shard has something to send.
enum Readiness {
    Nothing,
    /// Not before.
    At(Now),
    /// To this primary.
    Ready(Conn),
}

impl Worker {
    pub(super) fn on_turn_ended(&mut self, effects: &mut Vec<Effect>) {
        while let Some(request) = self.requests.late(self.now) {
            self.expire(request, effects);
        }
        while let Some(&(at, timer)) = self.timers.first()
            && at <= self.now
        {
            self.timers.pop_first();
            match timer {
                Timer::Shard(shard) => self.due.insert(shard),
                Timer::Lane(conn) => self.touched.insert(conn),
            };
        }
        for shard in std::mem::take(&mut self.due) {
            self.look(shard, effects);
        }
        // What `look` has rerouted is due again, at another shard.
        for shard in std::mem::take(&mut self.due) {
            self.look(shard, effects);
        }
        for conn in std::mem::take(&mut self.touched) {
            self.pack(conn, effects);
        }
        self.reads.turn_ended(self.now, &self.map, &self.router, effects);
    }

    /// The time is up for a request: each of its operations that is not decided is answered by
    /// what is known of it now.
    fn expire(&mut self, request: u64, effects: &mut Vec<Effect>) {
        for shard in self.requests.shards(request) {
            let reason = self.why_waiting(shard);
            let Some(queue) = self.queues.get_mut(&shard) else { continue };
            for part in queue.take_request(request) {
                self.bytes -= part.bytes;
                self.requests.part_failed(&part, reason, effects);
            }
            let planted = Planted::NotAppliedAfterSend.is_in(self.settings.planted);
            let reason = if planted { Failure::Slow } else { Failure::Deadline };
            for part in queue.undecided.iter().flat_map(|out| out.parts_of(request)) {
                self.requests.part_failed(part, reason, effects);
            }
        }
        assert!(!self.requests.is_open(request), "all its parts are in a queue or a batch");
    }

    /// Why an operation of the shard was never sent.
    pub(super) fn why_waiting(&self, shard: ShardId) -> Failure {
        let Some(queue) = self.queues.get(&shard) else { return Failure::Slow };
        if self.present.is_none() || queue.ended == self.present {
            return Failure::NoSession;
        }
        let primary = self.map.get(shard).and_then(|config| self.router.to(config.primary));
        let refused = queue.refusals > 0;
        match primary.is_none() || refused {
            true => Failure::NoPrimary,
            false if queue.overloaded => Failure::Overloaded,
            false => Failure::Slow,
        }
    }

    /// Lines a shard up if it has something to send, or notes when it will have.
    fn look(&mut self, shard: ShardId, effects: &mut Vec<Effect>) {
        self.reroute(shard, effects);
        if self.frozen_until(shard).is_some() {
            self.fail_waiting(shard, Failure::Frozen, effects);
        }
        match self.readiness(shard) {
            Readiness::Nothing => {}
            Readiness::At(at) => {
                self.timers.insert((at, Timer::Shard(shard)));
            }
            Readiness::Ready(conn) => {
                let Some(queue) = self.queues.get_mut(&shard) else { return };
                let Some(lane) = self.router.lane_mut(conn) else { return };
                if queue.in_line.replace(conn) != Some(conn) {
                    lane.line.push_back(shard);
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

    /// Until when the primary takes no writes for the shard, as far as it has said so.
    ///
    /// While a batch of the shard is out there the word does not lapse: nothing could be sent to ask
    /// again, and operations behind that batch would wait for their deadline instead of being
    /// refused. The batch's answer is a newer word.
    pub(super) fn frozen_until(&self, shard: ShardId) -> Option<Now> {
        let config = self.map.get(shard)?;
        let conn = self.router.to(config.primary)?;
        let until = self.router.lane(conn)?.frozen_until(shard)?;
        let undecided = self.queues.get(&shard).and_then(|queue| queue.undecided.as_ref());
        let is_out = undecided.is_some_and(|undecided| !undecided.is_due(conn, config.epoch));
        (until > self.now || is_out).then_some(until)
    }

    fn readiness(&self, shard: ShardId) -> Readiness {
        let Some(queue) = self.queues.get(&shard) else { return Readiness::Nothing };
        let Some(config) = self.map.get(shard) else { return Readiness::Nothing };
        let Some(conn) = self.router.to(config.primary) else { return Readiness::Nothing };
        let mut not_before = queue.retry_at;
        match &queue.undecided {
            Some(undecided) => {
                if !undecided.is_due(conn, config.epoch) {
                    return Readiness::Nothing;
                }
            }
            None => {
                let no_session = self.present.is_none() || queue.ended == self.present;
                if queue.waiting.is_empty() || no_session {
                    return Readiness::Nothing;
                }
                if !queue.fills_a_batch(&self.settings.sizes) {
                    let lingers = Now(queue.since.0.saturating_add(self.settings.linger_us));
                    not_before = not_before.max(lingers);
                }
            }
        }
        not_before = not_before.max(self.frozen_until(shard).unwrap_or_default());
        if not_before > self.now { Readiness::At(not_before) } else { Readiness::Ready(conn) }
    }

    /// Sends what stands in the lane's line, as far as its window and bytes allow.
    fn pack(&mut self, conn: Conn, effects: &mut Vec<Effect>) {
        let window = Window { messages: self.settings.window, us: self.settings.window_us };
        loop {
            let Some(lane) = self.router.lane_mut(conn) else { return };
            if lane.line.is_empty() {
                return;
            }
            if let Some(at) = lane.blocked_until(self.now, window) {
                self.timers.insert((at, Timer::Lane(conn)));
                return;
            }
            let message = lane.next_message();
            let batches = self.fill(conn, message);
            if batches.is_empty() {
                return;
            }
            let Some(lane) = self.router.lane_mut(conn) else { return };
            lane.sent(self.now, batches.len());
            self.counts.sends += batches.len() as u64;
            effects
                .push(Effect::Send { conn, message: GatewayMessage::Frame { message, batches } });
        }
    }

    /// The batches of one message. Empty: nobody in the line has anything to send after all, or
    /// too much is on the way already; then an answer will bring the lane here again.
    fn fill(&mut self, conn: Conn, message: u64) -> Vec<Batch> {
        let mut batches = Vec::new();
        let mut bytes = 0;
        let unlimited = Planted::FrameUnlimited.is_in(self.settings.planted);
        while bytes < self.settings.sizes.message_bytes || unlimited {
            let Some(lane) = self.router.lane_mut(conn) else { break };
            if lane.bytes >= self.settings.lane_bytes_max {
                break;
            }
            let Some(shard) = lane.line.pop_front() else { break };
            if let Some(batch) = self.next_batch(shard, conn, message) {
                bytes += batch.payload.len();
                batches.push(batch);
            }
        }
        batches
    }

    /// The batch that the shard sends now: the one that is out, or a new one.
    fn next_batch(&mut self, shard: ShardId, conn: Conn, message: u64) -> Option<Batch> {
        let queue = self.queues.get_mut(&shard)?;
        // Since it lined up it may have moved to another lane, or lost what it had to send.
        if queue.in_line != Some(conn) {
            return None;
        }
        queue.in_line = None;
        let Readiness::Ready(now_to) = self.readiness(shard) else { return None };
        if now_to != conn {
            return None;
        }
        let epoch = self.map.get(shard)?.epoch;
        let queue = self.queues.get_mut(&shard)?;
        if queue.undecided.is_none() {
            let sealed = queue.seal(self.present?, &mut self.sealer);
            self.undecided += 1;
            self.counts.batches += 1;
            self.counts.ops += sealed.parts.iter().map(|part| part.ops.len() as u64).sum::<u64>();
            self.counts.ops_sent += sealed.entries() as u64;
        }
        if !queue.waiting.is_empty() {
            // The rest goes when this one is decided.
            queue.since = Now(0);
        }
        let undecided = queue.undecided.as_mut()?;
        undecided.sent(Send { conn, message, epoch });
        let batch = undecided.batch.clone();
        self.router.lane_mut(conn)?.bytes += batch.payload.len();
        Some(batch)
    }
}
