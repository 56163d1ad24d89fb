//! A write request comes in: split by shard, admitted or refused, queued.

use super::Sizes;
use super::outcome::{Failure, WriteResult};
use super::queue::{Issued, Part, PartToken, Queue, QueuedOp};
use super::requests::Request;
use super::seal::HEAD_BYTES_MAX;
use super::{Effect, Worker};
use crate::idempotency::{IssueTime, Tag, Token};
use crate::ids::{Now, ShardId, Slot, TimeMs};
use crate::key;
use crate::ops::{self, Op};
use crate::shard_map::ShardMap;

/// Memory that is used anew for every request. All empty in between.
#[derive(Clone, Debug, Default)]
pub(super) struct Splitter {
    /// Per operation: the upper half of its hash, and the place of its shard in the map.
    placed: Vec<(u64, u32)>,
    /// Per shard of the map: how many of the operations are its own.
    counts: Vec<u32>,
    parts: Vec<Vec<QueuedOp>>,
    /// Shards that have any, in the order in which they came up.
    touched: Vec<u32>,
}

const NOWHERE: u32 = u32::MAX;

impl Splitter {
    /// The operations of each shard, in the order of the request, and the indexes of those that
    /// belong to no known shard. Hashes every name once: the hash is kept with the operation.
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

impl Worker {
    pub(super) fn on_write(
        &mut self,
        request: u64,
        ops: Vec<Op>,
        token: Option<Token>,
        deadline: Now,
        effects: &mut Vec<Effect>,
    ) {
        self.counts_up(request);
        let mut open =
            Request { deadline, undecided: 0, shards: Vec::new(), result: WriteResult::default() };
        let refused = if self.stopping {
            Some(Failure::Stopping)
        } else {
            self.present.is_none().then_some(Failure::NoSession)
        };
        if let Some(failure) = refused {
            open.result.failed = (0..ops.len() as u32).map(|index| (index, failure)).collect();
            return self.requests.begin(request, open, effects);
        }
        let token = token.and_then(|token| Some((token.tag(&ops)?, token.issued)));
        let (parts, nowhere) = self.splitter.split(&self.map, ops);
        open.result.failed.extend(nowhere.into_iter().map(|index| (index, Failure::NoShard)));
        for (place, ops) in parts {
            let slots = self.map.at(place as usize).slots;
            let token = token.map(|(tag, issued)| self.issue(slots.shard(), tag, issued));
            let part = Part::new(request, ops, token);
            match self.admits(&part, slots.shard()) {
                Ok(()) => {
                    open.undecided += part.ops.len();
                    open.shards.push(slots.shard());
                    self.bytes += part.bytes;
                    let queue =
                        self.queues.entry(slots.shard()).or_insert_with(|| Queue::new(slots));
                    queue.push(self.now, part);
                    self.due.insert(slots.shard());
                }
                Err(failure) => {
                    let indexes = part.ops.iter().map(|queued| queued.index);
                    open.result.failed.extend(indexes.map(|index| (index, failure)));
                }
            }
        }
        self.requests.begin(request, open, effects);
    }

    /// When was it issued? As the client says, else as was heard lately of the shard's time.
    fn issue(&self, shard: ShardId, tag: Tag, issued: Option<TimeMs>) -> PartToken {
        let queue = self.queues.get(&shard);
        let heard = || queue.and_then(|queue| queue.heard(self.now, self.settings.heard_for_ms));
        let stated = issued.map(IssueTime::Stated);
        let issued = stated.or_else(|| heard().map(IssueTime::Heard));
        let issued = issued.map_or(Issued::Came(self.now), Issued::At);
        PartToken { tag, issued }
    }

    /// Whether new operations of the shard may wait at all.
    fn admits(&self, part: &Part, shard: ShardId) -> Result<(), Failure> {
        if part.token.is_some() && !fits_a_batch(part, &self.settings.sizes) {
            return Err(Failure::TooLarge);
        }
        if self.frozen_until(shard).is_some() {
            return Err(Failure::Frozen);
        }
        let waiting = self.queues.get(&shard).map_or(0, |queue| queue.waiting_bytes);
        // When all together are too much, those that hold more than their share give way: one
        // shard without a primary must not shut out the others.
        let share = self.settings.worker_bytes_max / self.queues.len().max(1);
        let full = waiting >= self.settings.queue_bytes_max
            || self.bytes >= self.settings.worker_bytes_max && waiting >= share;
        if !full {
            return Ok(());
        }
        // A queue that is full since nothing can be sent is refused for that.
        Err(match self.why_waiting(shard) {
            Failure::Slow | Failure::Overloaded => Failure::QueueFull,
            why => why,
        })
    }

    /// The map has another range for the shard than its queue was made for: what waits is sorted
    /// anew. What is out stays as it is, and is settled under its old range.
    pub(super) fn reroute(&mut self, shard: ShardId, effects: &mut Vec<Effect>) {
        let Some(known) = self.map.get(shard).map(|config| config.slots) else { return };
        let Some(queue) = self.queues.get_mut(&shard) else { return };
        if queue.slots == known || queue.undecided.is_some() {
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

    fn route_again(
        &mut self,
        request: u64,
        queued: QueuedOp,
        token: Option<PartToken>,
        effects: &mut Vec<Effect>,
    ) {
        let slots = self.map.of_slot(slot_of(queued.hash)).map(|config| config.slots);
        let Some(slots) = slots else {
            let index = std::iter::once(queued.index);
            return self.requests.failed(request, index, Failure::NoShard, effects);
        };
        let shard = slots.shard();
        self.requests.went_to(request, shard);
        let queue = self.queues.entry(shard).or_insert_with(|| Queue::new(slots));
        self.bytes += queued.bytes();
        queue.insert(self.now, request, queued, token);
        self.due.insert(shard);
    }
}

/// What a node takes in one piece, all of it.
fn fits_a_batch(part: &Part, sizes: &Sizes) -> bool {
    let bytes: usize = part.ops.iter().map(|queued| ops::size(&queued.op)).sum();
    let values = part.ops.iter().filter(|queued| queued.op.kind.needs_value()).count();
    bytes + HEAD_BYTES_MAX <= sizes.batch_bytes_limit && values < sizes.batch_values_max
}
