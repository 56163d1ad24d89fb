//! The way of write operations into the queues, from one queue to another, and out of them unsent.

use super::outcome::Failure;
use super::part::{PartToken, QueuedOp, RequestPart, slot_of};
use super::pending_writes::PendingWrites;
use super::queue::ShardQueue;
use super::routes::Routes;
use super::seal::HEAD_BYTES_MAX;
use super::session::BatchSessions;
use super::shard_queues::ShardQueues;
use super::{BatchSizes, BatcherTurn};
use crate::ids::{ShardId, Slots};
use crate::ops;
use crate::planted::Planted;
use crate::shard::idempotency::Scope;

/// The parts of a worker that queue operations, and those that decide where and whether.
pub(super) struct Queueing<'a> {
    pub(super) turn: BatcherTurn<'a>,
    pub(super) sessions: &'a BatchSessions,
    pub(super) routes: &'a Routes,
    pub(super) queues: &'a mut ShardQueues,
    pub(super) writes: &'a mut PendingWrites,
}

impl Queueing<'_> {
    // ---- in ------------------------------------------------------------------------------------

    /// Checks whether a new part may wait in the shard's queue.
    pub(super) fn admits(&self, part: &RequestPart, shard: ShardId) -> Result<(), Failure> {
        let settings = self.turn.settings;
        if part.token.is_some() && !fits_a_batch(part, &settings.sizes) {
            return Err(Failure::TooLarge);
        }
        if self.queues.frozen_until(self.turn.now, self.routes, shard).is_some() {
            return Err(Failure::Frozen);
        }
        let queued = self.queues.get(shard).map_or(0, |queue| queue.waiting_bytes());
        let waiting = queued + self.writes.held_for(shard);
        // When all queues together hold too much, those with more than their share are refused: one
        // shard without a primary must not shut out the others.
        let share = settings.total_bytes_max / self.queues.shards().len().max(1);
        let bytes = self.queues.bytes() + self.writes.held_bytes();
        let full = waiting >= settings.queue_bytes_max
            || waiting >= share && bytes >= settings.total_bytes_max;
        if !full {
            return Ok(());
        }
        // A queue that is full because nothing can be sent is refused for that reason.
        Err(match self.unsent_reason(shard) {
            Failure::Slow | Failure::Overloaded => Failure::QueueFull,
            why => why,
        })
    }

    /// Puts a part into its shard's queue.
    pub(super) fn enqueue(&mut self, slots: Slots, part: RequestPart) {
        let now = self.turn.now;
        self.queues.add(slots, |queue| queue.push(now, part));
        self.turn.agenda.shards.add(slots.shard());
    }

    /// Sends the other parts of a request whose token its home has recorded, if they may still
    /// wait.
    pub(super) fn send_held(&mut self, request: u64) {
        self.writes.recorded_at_home(request);
        for (slots, part) in self.writes.release(request) {
            let shard = slots.shard();
            if let Err(failure) = self.admits(&part, shard) {
                self.writes.part_failed(&part, failure, self.turn.effects);
            } else if self.routes.map.get(shard).is_some_and(|record| record.slots == slots) {
                self.writes.went_to(request, shard);
                self.enqueue(slots, part);
            } else {
                self.route_again(part);
            }
        }
    }

    // ---- from one queue to another -------------------------------------------------------------

    /// Prepares a shard for sending: sorts its operations again if the map has other slots for it
    /// than its queue was made for, and fails them if it is frozen.
    pub(super) fn review(&mut self, shard: ShardId) {
        if let Some(known) = self.routes.map.get(shard).map(|record| record.slots) {
            let parts = self.queues.change(shard, |queue| queue.take_misplaced(known));
            for part in parts.into_iter().flatten() {
                self.route_again(part);
            }
        }
        if self.queues.frozen_until(self.turn.now, self.routes, shard).is_some() {
            self.fail_waiting(shard, Failure::Frozen);
        }
    }

    /// Puts each operation of a part into the queue of the shard that owns its slot now.
    ///
    /// The part at the home of a token fails if a split has left operations of it to another shard
    /// than the home: they must not be done before the home has recorded the token.
    pub(super) fn route_again(&mut self, part: RequestPart) {
        if self.has_left_home(&part) {
            return self.writes.part_failed(&part, Failure::Frozen, self.turn.effects);
        }
        for queued in part.ops {
            self.route_op_again(part.request, queued, part.token);
        }
    }

    fn has_left_home(&self, part: &RequestPart) -> bool {
        let (Some(token), Some(first)) = (&part.token, part.ops.first()) else { return false };
        if token.tag.scope != Scope::Batch || !self.writes.asks_home(part.request) {
            return false;
        }
        let home = token.tag.home(first.op.counter.namespace());
        let Some(home) = home.and_then(|home| self.routes.map.of_slot(home.slot())) else {
            return false;
        };
        part.ops.iter().any(|queued| !home.slots.contains(slot_of(queued.hash)))
    }

    fn route_op_again(&mut self, request: u64, queued: QueuedOp, token: Option<PartToken>) {
        let record = self.routes.map.of_slot(slot_of(queued.hash));
        let Some(slots) = record.map(|record| record.slots) else {
            let index = std::iter::once(queued.index);
            return self.writes.failed(request, index, Failure::NoShard, self.turn.effects);
        };
        self.writes.went_to(request, slots.shard());
        let now = self.turn.now;
        self.queues.add(slots, |queue| queue.insert(now, request, queued, token));
        self.turn.agenda.shards.add(slots.shard());
    }

    // ---- out, unsent ---------------------------------------------------------------------------

    /// Expires the requests whose deadline has passed.
    pub(super) fn expire_late(&mut self) {
        while let Some(request) = self.writes.late(self.turn.now) {
            self.expire(request);
        }
    }

    /// Expires a request: each operation that is not decided is answered by what is known of it
    /// now.
    fn expire(&mut self, request: u64) {
        for shard in self.writes.shards(request) {
            let reason = self.unsent_reason(shard);
            let waiting = self.queues.change(shard, |queue| queue.take_request(request));
            for part in waiting.into_iter().flatten() {
                self.writes.part_failed(&part, reason, self.turn.effects);
            }
            let planted = Planted::NotAppliedAfterSend.is_in(self.turn.settings.planted);
            let reason = if planted { Failure::Slow } else { Failure::Deadline };
            let in_flight = self.queues.in_flight(shard).into_iter();
            for part in in_flight.flat_map(|out| out.parts_of(request)) {
                self.writes.part_failed(part, reason, self.turn.effects);
            }
        }
        assert!(!self.writes.is_open(request), "all its parts are in a queue or a batch");
    }

    pub(super) fn fail_waiting(&mut self, shard: ShardId, failure: Failure) {
        let waiting = self.queues.change(shard, ShardQueue::take_waiting);
        for part in waiting.into_iter().flatten() {
            self.writes.part_failed(&part, failure, self.turn.effects);
        }
    }

    /// The reason why an operation of the shard was never sent.
    fn unsent_reason(&self, shard: ShardId) -> Failure {
        let Some(queue) = self.queues.get(shard) else { return Failure::Slow };
        if self.sessions.for_shard(queue.ended()).is_none() {
            return Failure::NoSession;
        }
        match self.routes.to_primary(shard).is_none() || queue.is_refused() {
            true => Failure::NoPrimary,
            false if queue.is_overloaded() => Failure::Overloaded,
            false => Failure::Slow,
        }
    }
}

/// Returns whether a part with a token is small enough for one batch.
fn fits_a_batch(part: &RequestPart, sizes: &BatchSizes) -> bool {
    let bytes: usize = part.ops.iter().map(|queued| ops::size(&queued.op)).sum();
    let values = part.ops.iter().filter(|queued| queued.op.kind.returns_value()).count();
    bytes + HEAD_BYTES_MAX <= sizes.batch_bytes_limit && values < sizes.batch_values_max
}
