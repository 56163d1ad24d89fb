//! The intake of write requests: split by shard, admitted or refused, queued.

use super::BatchSizes;
use super::outcome::{Failure, WriteResult};
use super::part::{HOME, Issued, PartToken, QueuedOp, RequestPart};
use super::queue::ShardQueue;
use super::requests::PendingWrite;
use super::seal::HEAD_BYTES_MAX;
use super::{Batcher, Effect};
use crate::idempotency::{ClientToken, IssueTime, Scope, Tag};
use crate::ids::{Now, ShardId, Slot, Slots, TimeMs};
use crate::key;
use crate::ops::{self, Op, OpKind};
use crate::planted::Planted;
use crate::shard_map::ShardMap;

/// Buffers that are reused for every request, and empty in between.
#[derive(Clone, Debug, Default)]
pub(super) struct Splitter {
    /// Per operation: the upper half of its hash, and the index of its shard in the map.
    placed: Vec<(u64, u32)>,
    /// Per shard of the map: the number of its operations.
    counts: Vec<u32>,
    /// Per shard of the map: its operations.
    parts: Vec<Vec<QueuedOp>>,
    /// The shards with operations, in the order of their first one.
    touched: Vec<u32>,
}

/// The index of no shard.
const NOWHERE: u32 = u32::MAX;

impl Splitter {
    /// The operations of each shard, in the order of the request, and the indexes of those that
    /// belong to no known shard. Every name is hashed once: the hash is kept with the operation.
    fn split(&mut self, map: &ShardMap, ops: Vec<Op>) -> (Vec<(u32, Vec<QueuedOp>)>, Vec<u32>) {
        self.counts.resize(map.iter().len(), 0);
        self.parts.resize_with(map.iter().len(), Vec::new);
        for op in &ops {
            let hash = (key::hash(op.counter.name()) >> 64) as u64;
            let place = map.index_of(slot_of(hash)).map_or(NOWHERE, |at| at as u32);
            self.placed.push((hash, place));
            let Some(count) = self.counts.get_mut(place as usize) else { continue };
            if *count == 0 {
                self.touched.push(place);
            }
            *count += 1;
        }
        for &place in &self.touched {
            let place = place as usize;
            self.parts[place].reserve_exact(self.counts[place] as usize);
            self.counts[place] = 0;
        }
        let mut nowhere = Vec::new();
        for (index, (op, (hash, place))) in (0u32..).zip(ops.into_iter().zip(self.placed.drain(..)))
        {
            match self.parts.get_mut(place as usize) {
                Some(part) => part.push(QueuedOp { op, hash, index, entry: 0 }),
                None => nowhere.push(index),
            }
        }
        let parts = &mut self.parts;
        let taken = |place: u32| (place, std::mem::take(&mut parts[place as usize]));
        (self.touched.drain(..).map(taken).collect(), nowhere)
    }
}

/// The slot, from the upper half of the hash.
fn slot_of(hash: u64) -> Slot {
    Slot((hash >> 48) as u16)
}

impl Batcher {
    pub(super) fn on_write(
        &mut self,
        request: u64,
        ops: Vec<Op>,
        token: Option<ClientToken>,
        deadline: Now,
        effects: &mut Vec<Effect>,
    ) {
        self.counts_up(request);
        let (shards, held) = (Vec::new(), Vec::new());
        let mut open =
            PendingWrite { deadline, pending: 0, shards, held, result: WriteResult::default() };
        let token = token.and_then(|token| Some((token.tag(&ops)?, token.issued)));
        let home = token.and_then(|(tag, _)| self.home(&tag, &ops));
        let refused = if self.stopping {
            Some(Failure::Stopping)
        } else if self.present.is_none() {
            Some(Failure::NoSession)
        } else {
            home.as_ref().and_then(|home| home.as_ref().err().copied())
        };
        if let Some(failure) = refused {
            open.result.failed = (0..ops.len() as u32).map(|index| (index, failure)).collect();
            return self.requests.begin(request, open, effects);
        }
        let home = home.and_then(Result::ok);
        let (mut parts, nowhere) = self.splitter.split(&self.map, ops);
        open.result.failed.extend(nowhere.into_iter().map(|index| (index, Failure::NoShard)));
        let has_home = home.is_some();
        if let Some(home) = home {
            at_home_first(&mut parts, home);
        }
        let (mut at_home, mut not_at_home) = (None, None);
        for (at, (place, ops)) in parts.into_iter().enumerate() {
            let slots = self.map.at(place as usize).slots;
            let is_home = has_home && at == 0;
            let token = token.map(|(tag, issued)| self.issue(slots.shard(), tag, issued));
            let part = RequestPart::new(request, ops, token);
            let refused = not_at_home.or_else(|| self.admits(&part, slots.shard()).err());
            if let Some(failure) = refused {
                let asked = part.ops.iter().filter(|queued| queued.index != HOME);
                open.result.failed.extend(asked.map(|queued| (queued.index, failure)));
                not_at_home = not_at_home.or(refused.filter(|_| is_home));
                continue;
            }
            open.pending += part.ops.len();
            if is_home {
                at_home = Some((slots, part));
            } else if has_home {
                open.held.push((slots, part));
            } else {
                open.shards.push(slots.shard());
                self.enqueue(slots, part);
            }
        }
        if let Some((slots, part)) = at_home {
            // A token is not recorded if nothing of the request was admitted elsewhere.
            if part.asked() == 0 && open.held.is_empty() {
                open.pending = 0;
            } else {
                open.shards.push(slots.shard());
                self.enqueue(slots, part);
            }
        }
        self.requests.begin(request, open, effects);
    }

    /// Puts a part into its shard's queue.
    fn enqueue(&mut self, slots: Slots, part: RequestPart) {
        self.bytes += part.bytes;
        let queue = self.queues.entry(slots.shard()).or_insert_with(|| ShardQueue::new(slots));
        queue.push(self.now, part);
        self.due.insert(slots.shard());
    }

    /// The operation that carries the token of a batch to its home, and that shard's index in the
    /// map. Returns `None` if there is no such token.
    fn home(&self, tag: &Tag, ops: &[Op]) -> Option<Result<(u32, QueuedOp), Failure>> {
        if tag.scope != Scope::Batch || Planted::HomeNotAsked.is_in(self.settings.planted) {
            return None;
        }
        let counter = tag.home(ops.first()?.counter.namespace())?;
        let hash = (key::hash(counter.name()) >> 64) as u64;
        let op = Op { counter, kind: OpKind::Add { delta: 0 } };
        let place = self.map.index_of(slot_of(hash)).ok_or(Failure::NoShard);
        Some(place.map(|place| (place as u32, QueuedOp { op, hash, index: HOME, entry: 0 })))
    }

    /// Sends the other parts of a request whose token its home has recorded, if they may still
    /// wait.
    pub(super) fn send_held(&mut self, request: u64, effects: &mut Vec<Effect>) {
        for (slots, part) in self.requests.release(request) {
            let shard = slots.shard();
            if let Err(failure) = self.admits(&part, shard) {
                self.requests.part_failed(&part, failure, effects);
            } else if self.map.get(shard).is_some_and(|record| record.slots == slots) {
                self.requests.went_to(request, shard);
                self.enqueue(slots, part);
            } else {
                for queued in part.ops {
                    self.route_again(request, queued, part.token, effects);
                }
            }
        }
    }

    /// The issue time of an operation: the client's own statement, or else a recent time of the
    /// shard.
    fn issue(&self, shard: ShardId, tag: Tag, issued: Option<TimeMs>) -> PartToken {
        let queue = self.queues.get(&shard);
        let known = || {
            queue.and_then(|queue| queue.fresh_time(self.now, self.settings.shard_time_valid_ms))
        };
        let stated = issued.map(IssueTime::Stated);
        let issued = stated.or_else(|| known().map(IssueTime::Arrived));
        let issued = issued.map_or(Issued::Arrived(self.now), Issued::At);
        PartToken { tag, issued }
    }

    /// Checks whether a new part may wait in the shard's queue.
    fn admits(&self, part: &RequestPart, shard: ShardId) -> Result<(), Failure> {
        if part.token.is_some() && !fits_a_batch(part, &self.settings.sizes) {
            return Err(Failure::TooLarge);
        }
        if self.frozen_until(shard).is_some() {
            return Err(Failure::Frozen);
        }
        let queued = self.queues.get(&shard).map_or(0, |queue| queue.waiting_bytes);
        let waiting = queued + self.requests.held_for(shard);
        // When all queues together hold too much, those with more than their share are refused: one
        // shard without a primary must not shut out the others.
        let share = self.settings.total_bytes_max / self.queues.len().max(1);
        let full = waiting >= self.settings.queue_bytes_max
            || waiting >= share && self.bytes() >= self.settings.total_bytes_max;
        if !full {
            return Ok(());
        }
        // A queue that is full because nothing can be sent is refused for that reason.
        Err(match self.unsent_reason(shard) {
            Failure::Slow | Failure::Overloaded => Failure::QueueFull,
            why => why,
        })
    }

    /// Sorts the waiting operations of a shard again if the map has other slots for it than its
    /// queue was made for. The batch in flight stays as it is, and is settled under its old slots.
    pub(super) fn reroute(&mut self, shard: ShardId, effects: &mut Vec<Effect>) {
        let Some(known) = self.map.get(shard).map(|record| record.slots) else { return };
        let Some(queue) = self.queues.get_mut(&shard) else { return };
        if queue.slots == known || queue.in_flight.is_some() {
            return;
        }
        let waiting = queue.take_waiting();
        queue.slots = known;
        for part in waiting {
            self.bytes -= part.bytes;
            for queued in part.ops {
                self.route_again(part.request, queued, part.token, effects);
            }
        }
    }

    /// Puts one operation into the queue of the shard that owns its slot now.
    fn route_again(
        &mut self,
        request: u64,
        queued: QueuedOp,
        token: Option<PartToken>,
        effects: &mut Vec<Effect>,
    ) {
        let slots = self.map.of_slot(slot_of(queued.hash)).map(|record| record.slots);
        let Some(slots) = slots else {
            let index = std::iter::once(queued.index);
            return self.requests.failed(request, index, Failure::NoShard, effects);
        };
        let shard = slots.shard();
        self.requests.went_to(request, shard);
        let queue = self.queues.entry(shard).or_insert_with(|| ShardQueue::new(slots));
        self.bytes += queued.bytes();
        queue.insert(self.now, request, queued, token);
        self.due.insert(shard);
    }
}

/// Moves the part at the token's home to the front: it is sent alone, and the others once it is
/// recorded. If the home has no operations of the request, that part is only `op`, which carries
/// the token.
fn at_home_first(parts: &mut Vec<(u32, Vec<QueuedOp>)>, (home, op): (u32, QueuedOp)) {
    match parts.iter().position(|&(place, _)| place == home) {
        Some(at) => parts.swap(0, at),
        None if parts.is_empty() => {}
        None => parts.insert(0, (home, vec![op])),
    }
}

/// Returns whether a part with a token is small enough for one batch.
fn fits_a_batch(part: &RequestPart, sizes: &BatchSizes) -> bool {
    let bytes: usize = part.ops.iter().map(|queued| ops::size(&queued.op)).sum();
    let values = part.ops.iter().filter(|queued| queued.op.kind.needs_value()).count();
    bytes + HEAD_BYTES_MAX <= sizes.batch_bytes_limit && values < sizes.batch_values_max
}
