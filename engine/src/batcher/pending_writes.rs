//! Write requests that wait for their answer.
//!
//! A request is answered once, when all its operations are decided or its deadline has passed.
//! After that the outcome of its batch is ignored, since its number is no longer found here.

use std::collections::{BTreeMap, BTreeSet};

use super::Effect;
use super::outcome::{Failure, WriteResult};
use super::part::{HOME, RequestPart};
use crate::ids::{Now, ShardId, Slots};

/// One request that has not been answered.
#[derive(Clone, Debug)]
pub(super) struct PendingWrite {
    pub deadline: Now,
    /// The number of operations that are neither applied nor failed.
    pub pending: usize,
    /// The shards of the operations that were queued.
    pub shards: Vec<ShardId>,
    /// The parts that wait until the home of their token has recorded the request, each with the
    /// range for which it was made.
    pub held: Vec<(Slots, RequestPart)>,
    /// The home of the token has not recorded it yet, so it is asked first.
    pub asks_home: bool,
    /// The outcome so far.
    pub result: WriteResult,
}

/// All write requests that have not been answered.
#[derive(Clone, Debug, Default)]
pub(super) struct PendingWrites {
    open: BTreeMap<u64, PendingWrite>,
    deadlines: BTreeSet<(Now, u64)>,
    /// The bytes of held parts, by the home that they wait for.
    held_bytes: BTreeMap<ShardId, usize>,
}

impl PendingWrites {
    /// Adds a request, or answers it at once if nothing of it is pending.
    pub(super) fn begin(&mut self, id: u64, request: PendingWrite, effects: &mut Vec<Effect>) {
        if request.pending == 0 {
            return answer(id, request.result, effects);
        }
        self.deadlines.insert((request.deadline, id));
        if let Some(&home) = request.shards.first().filter(|_| !request.held.is_empty()) {
            *self.held_bytes.entry(home).or_default() += bytes_of(&request.held);
        }
        self.open.insert(id, request);
    }

    /// The bytes of all held parts.
    pub(super) fn held_bytes(&self) -> usize {
        self.held_bytes.values().sum()
    }

    /// The bytes of parts that wait until this shard has recorded a token.
    pub(super) fn held_for(&self, home: ShardId) -> usize {
        self.held_bytes.get(&home).copied().unwrap_or(0)
    }

    /// Takes the held parts of a request: the home of its token has recorded it, or never will.
    pub(super) fn release(&mut self, id: u64) -> Vec<(Slots, RequestPart)> {
        let Some(request) = self.open.get_mut(&id) else { return Vec::new() };
        if request.held.is_empty() {
            return Vec::new();
        }
        let held = std::mem::take(&mut request.held);
        // The part at the token's home is the only one that was sent before, so that shard is the
        // first.
        if let Some(&home) = request.shards.first()
            && let Some(bytes) = self.held_bytes.get_mut(&home)
        {
            *bytes -= bytes_of(&held);
            if *bytes == 0 {
                self.held_bytes.remove(&home);
            }
        }
        held
    }

    pub(super) fn len(&self) -> usize {
        self.open.len()
    }

    pub(super) fn is_open(&self, id: u64) -> bool {
        self.open.contains_key(&id)
    }

    pub(super) fn deadline(&self) -> Option<Now> {
        self.deadlines.first().map(|&(at, _)| at)
    }

    /// Notes that the home of the request's token has recorded it.
    pub(super) fn recorded_at_home(&mut self, id: u64) {
        if let Some(request) = self.open.get_mut(&id) {
            request.asks_home = false;
        }
    }

    /// Returns whether the home of the request's token has not recorded it yet.
    pub(super) fn asks_home(&self, id: u64) -> bool {
        self.open.get(&id).is_some_and(|request| request.asks_home)
    }

    /// A request whose deadline has passed.
    pub(super) fn late(&self, now: Now) -> Option<u64> {
        self.deadlines.first().filter(|&&(at, _)| at <= now).map(|&(_, id)| id)
    }

    pub(super) fn shards(&self, id: u64) -> Vec<ShardId> {
        self.open.get(&id).map(|request| request.shards.clone()).unwrap_or_default()
    }

    /// Notes that operations of the request went to this shard, too.
    pub(super) fn went_to(&mut self, id: u64, shard: ShardId) {
        let Some(request) = self.open.get_mut(&id) else { return };
        if !request.shards.contains(&shard) {
            request.shards.push(shard);
        }
    }

    /// Notes the value of one operation, which `applied` will count.
    pub(super) fn value(&mut self, id: u64, index: u32, value: i128) {
        if let Some(request) = self.open.get_mut(&id) {
            request.result.values.push((index, value));
        }
    }

    /// Notes that all operations of the part had been applied before, under the same token.
    pub(super) fn replayed(&mut self, part: &RequestPart, effects: &mut Vec<Effect>) {
        if let Some(request) = self.open.get_mut(&part.request) {
            request.result.replayed += part.asked();
        }
        self.applied(part, effects);
    }

    /// Notes that all operations of the part were applied.
    pub(super) fn applied(&mut self, part: &RequestPart, effects: &mut Vec<Effect>) {
        self.decided(part.request, part.ops.len(), effects);
    }

    /// Notes that these operations of a request have failed. Parts that were held for it fail with
    /// them, since its token was not recorded.
    pub(super) fn failed(
        &mut self,
        id: u64,
        indexes: impl Iterator<Item = u32>,
        failure: Failure,
        effects: &mut Vec<Effect>,
    ) {
        let held = self.release(id);
        let Some(request) = self.open.get_mut(&id) else { return };
        let mut count = 0;
        let mut fail = |index, failure| {
            count += 1;
            if index != HOME {
                request.result.failed.push((index, failure));
            }
        };
        indexes.for_each(|index| fail(index, failure));
        let held = held.iter().flat_map(|(_, part)| &part.ops);
        held.for_each(|queued| fail(queued.index, never_sent(failure)));
        self.decided(id, count, effects);
    }

    /// Notes that all operations of the part have failed.
    pub(super) fn part_failed(
        &mut self,
        part: &RequestPart,
        failure: Failure,
        effects: &mut Vec<Effect>,
    ) {
        let indexes = part.ops.iter().map(|queued| queued.index);
        self.failed(part.request, indexes, failure, effects);
    }

    fn decided(&mut self, id: u64, count: usize, effects: &mut Vec<Effect>) {
        let Some(request) = self.open.get_mut(&id) else { return };
        request.pending -= count;
        if request.pending > 0 {
            return;
        }
        let Some(request) = self.open.remove(&id) else { return };
        self.deadlines.remove(&(request.deadline, id));
        answer(id, request.result, effects);
    }
}

fn bytes_of(held: &[(Slots, RequestPart)]) -> usize {
    held.iter().map(|(_, part)| part.bytes).sum()
}

/// The failure of the parts that were held when the part at the token's home fails like this. They
/// were not sent, so nothing about them is unknown but the effect of an earlier attempt under the
/// token.
fn never_sent(failure: Failure) -> Failure {
    match failure {
        Failure::SessionExpired | Failure::SessionAbandoned => Failure::NoSession,
        Failure::Deadline | Failure::ResultGone => Failure::Slow,
        failure => failure,
    }
}

fn answer(request: u64, mut result: WriteResult, effects: &mut Vec<Effect>) {
    result.values.sort_unstable_by_key(|&(index, _)| index);
    result.failed.sort_unstable();
    effects.push(Effect::Wrote { request, result });
}
