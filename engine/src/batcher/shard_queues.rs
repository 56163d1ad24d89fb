//! The queues of all shards, and the memory that their operations take.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::in_flight::{BatchSend, InFlightBatch};
use super::queue::ShardQueue;
use super::routes::Routes;
use super::seal::Sealer;
use super::{BatchSizes, Counts, Settings};
use crate::batch::Batch;
use crate::ids::{Conn, Epoch, Now, SessionId, ShardId, Slot, Slots, TimeMs};
use crate::planted::Planted;

/// The queue of every shard that has had operations. See the module.
#[derive(Clone, Debug)]
pub(super) struct ShardQueues {
    /// The queues are boxed, so that a search touches few cache lines.
    queues: BTreeMap<ShardId, Box<ShardQueue>>,
    /// The number of batches in flight.
    in_flight: usize,
    /// The memory of all operations that wait or are in flight, in bytes.
    bytes: usize,
    /// The newest time of any shard, and when the answer with it came.
    newest: Option<(TimeMs, Now)>,
    sealer: Sealer,
    /// Shards with a share of a batch in flight whose shard was split.
    divided: BTreeSet<ShardId>,
}

impl ShardQueues {
    pub(super) fn new(settings: &Settings) -> Self {
        Self {
            queues: BTreeMap::new(),
            in_flight: 0,
            bytes: 0,
            newest: None,
            divided: BTreeSet::new(),
            sealer: Sealer::new(match Planted::BatchUnlimited.is_in(settings.planted) {
                true => BatchSizes::default(),
                false => settings.sizes,
            }),
        }
    }

    pub(super) fn get(&self, shard: ShardId) -> Option<&ShardQueue> {
        self.queues.get(&shard).map(Box::as_ref)
    }

    pub(super) fn in_flight(&self, shard: ShardId) -> Option<&InFlightBatch> {
        self.get(shard)?.in_flight()
    }

    pub(super) fn shards(&self) -> impl ExactSizeIterator<Item = ShardId> {
        self.queues.keys().copied()
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// The bytes of all queues. If they are `bytes_max` or more, a queue counts for no more than
    /// one and a half times the even share of each of `shards`: a few shards that take nothing,
    /// such as those of a node that hangs, do not use up what there is for all.
    pub(super) fn spread_bytes(&self, bytes_max: usize, shards: usize) -> usize {
        if self.bytes < bytes_max {
            return self.bytes;
        }
        let share = bytes_max / 2 * 3 / shards.max(1);
        self.queues.values().map(|queue| queue.bytes().min(share)).sum()
    }

    /// Returns whether these shards have at least so many operations to send.
    pub(super) fn have_ops(&self, shards: &VecDeque<ShardId>, least: usize) -> bool {
        let mut missing = least;
        let mut ops = shards.iter().map(|shard| self.get(*shard).map_or(0, ShardQueue::next_ops));
        missing == 0
            || ops.any(|ops| {
                missing = missing.saturating_sub(ops);
                missing == 0
            })
    }

    /// Returns whether a batch of any shard is in flight.
    pub(super) fn are_in_flight(&self) -> bool {
        self.in_flight > 0
    }

    /// The time until which the primary takes no writes for the shard, as far as it has reported.
    ///
    /// While a batch of the shard is in flight on that connection the notice does not expire:
    /// nothing could be sent to ask again, and operations behind that batch would wait for their
    /// deadline instead of being refused. The batch's answer replaces the notice.
    pub(super) fn frozen_until(&self, now: Now, routes: &Routes, shard: ShardId) -> Option<Now> {
        if !routes.router.has_frozen() {
            return None;
        }
        self.frozen_by(routes.to_primary(shard)?, now, routes, shard)
    }

    /// The same, by the connection to the primary and its epoch.
    pub(super) fn frozen_by(
        &self,
        (conn, epoch): (Conn, Epoch),
        now: Now,
        routes: &Routes,
        shard: ShardId,
    ) -> Option<Now> {
        let until = routes.router.connection(conn)?.frozen_until(shard)?;
        let is_out = self.in_flight(shard).is_some_and(|out| !out.is_due(conn, epoch));
        (until > now || is_out).then_some(until)
    }

    /// The time of the shard whose clock is furthest ahead, advanced by the time that has passed
    /// since on the monotonic clock.
    pub(super) fn newest_time(&self, now: Now) -> Option<TimeMs> {
        self.newest.map(|(time, came_at)| TimeMs(time.0.saturating_add(now.ms_since(came_at))))
    }

    // ---- changes -------------------------------------------------------------------------------

    /// Changes the queue of a shard, if there is one, and counts again what is in it.
    pub(super) fn change<R>(
        &mut self,
        shard: ShardId,
        change: impl FnOnce(&mut ShardQueue) -> R,
    ) -> Option<R> {
        let queue = self.queues.get_mut(&shard)?;
        self.bytes -= queue.bytes();
        self.in_flight -= usize::from(queue.in_flight().is_some());
        let result = change(queue);
        self.bytes += queue.bytes();
        self.in_flight += usize::from(queue.in_flight().is_some());
        Some(result)
    }

    /// Adds operations to the queue of these slots, a new one if the shard has had none.
    pub(super) fn add(&mut self, slots: Slots, add: impl FnOnce(&mut ShardQueue)) {
        let queues = self.queues.entry(slots.shard());
        let queue = queues.or_insert_with(|| Box::new(ShardQueue::new(slots)));
        self.bytes -= queue.waiting_bytes();
        add(queue);
        self.bytes += queue.waiting_bytes();
    }

    /// Makes the queue of a shard that has none and was part of another, whose queue it inherits
    /// from. Returns that shard.
    pub(super) fn carve(&mut self, slots: Slots, planted: Option<Planted>) -> Option<ShardId> {
        let child = slots.shard();
        let (&parent, queue) = self.queues.range(..=child).next_back()?;
        if parent == child || !queue.slots().contains(Slot(slots.lo)) {
            return None;
        }
        let carved = self.change(parent, |queue| queue.carve(slots, planted))?;
        if carved.in_flight().is_some() {
            self.divided.extend([parent, child]);
            self.in_flight += 1;
        }
        self.bytes += carved.bytes();
        self.queues.insert(child, Box::new(carved));
        Some(parent)
    }

    /// The other shards whose batch in flight may be the one that was answered for this shard.
    pub(super) fn divided_beside(&mut self, answered: ShardId) -> impl Iterator<Item = ShardId> {
        let Self { queues, divided, .. } = self;
        divided.retain(|shard| is_divided(queues, *shard));
        divided.iter().copied().filter(move |&shard| shard != answered)
    }

    /// Returns whether the shard's batch in flight was sealed for a shard that was split since.
    pub(super) fn is_divided(&self, shard: ShardId) -> bool {
        self.divided.contains(&shard) && is_divided(&self.queues, shard)
    }

    /// Sends the batch in flight, or a new one in this session.
    pub(super) fn send(
        &mut self,
        shard: ShardId,
        session: Option<SessionId>,
        send: BatchSend,
        counts: &mut Counts,
    ) -> Option<Batch> {
        let queue = self.queues.get_mut(&shard)?;
        if queue.in_flight().is_none() {
            let sealed = queue.seal(session?, &mut self.sealer);
            self.in_flight += 1;
            counts.batches += 1;
            counts.ops += sealed.ops() as u64;
            counts.ops_sent += sealed.entries() as u64;
        }
        queue.send(send)
    }

    /// Notes that a connection is gone. Returns the shards that may send something else now.
    pub(super) fn closed(&mut self, conn: Conn) -> impl Iterator<Item = ShardId> {
        let queues = self.queues.iter_mut();
        queues.filter_map(move |(&shard, queue)| queue.closed(conn).then_some(shard))
    }

    /// Notes the shard's time from an answer of apply.
    pub(super) fn note_time(&mut self, now: Now, shard: ShardId, time: TimeMs) {
        if self.newest_time(now).is_none_or(|newest| newest <= time) {
            self.newest = Some((time, now));
        }
        self.change(shard, |queue| queue.note_time(now, time));
    }
}
fn is_divided(queues: &BTreeMap<ShardId, Box<ShardQueue>>, shard: ShardId) -> bool {
    let in_flight = queues.get(&shard).and_then(|queue| queue.in_flight());
    in_flight.is_some_and(InFlightBatch::is_divided)
}
