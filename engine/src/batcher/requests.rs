//! Write requests that wait for their answer.
//!
//! A request is answered once, when all its operations are decided or its deadline has passed; what
//! becomes of its batch afterwards reaches nobody, since its number is not found here any more.

use std::collections::{BTreeMap, BTreeSet};

use super::Effect;
use super::outcome::{Failure, WriteResult};
use super::queue::{HOME, Part};
use crate::ids::{Now, ShardId, Slots};

#[derive(Clone, Debug)]
pub(super) struct Request {
    pub deadline: Now,
    /// Operations that are neither applied nor failed.
    pub undecided: usize,
    /// Where they went.
    pub shards: Vec<ShardId>,
    /// What waits until the home of its token has recorded the request, and for which range.
    pub held: Vec<(Slots, Part)>,
    pub result: WriteResult,
}

#[derive(Clone, Debug, Default)]
pub(super) struct Requests {
    open: BTreeMap<u64, Request>,
    deadlines: BTreeSet<(Now, u64)>,
    /// Of all that is held, by the home that it waits for.
    held_bytes: BTreeMap<ShardId, usize>,
}

impl Requests {
    pub(super) fn begin(&mut self, id: u64, request: Request, effects: &mut Vec<Effect>) {
        if request.undecided == 0 {
            return answer(id, request.result, effects);
        }
        self.deadlines.insert((request.deadline, id));
        if let Some(&home) = request.shards.first().filter(|_| !request.held.is_empty()) {
            *self.held_bytes.entry(home).or_default() += bytes_of(&request.held);
        }
        self.open.insert(id, request);
    }

    /// Bytes of all that is held.
    pub(super) fn held_bytes(&self) -> usize {
        self.held_bytes.values().sum()
    }

    /// Bytes of what waits until this shard has recorded a token.
    pub(super) fn held_for(&self, home: ShardId) -> usize {
        self.held_bytes.get(&home).copied().unwrap_or(0)
    }

    /// Takes what was held for the request: the home of its token has recorded it, or never will.
    pub(super) fn release(&mut self, id: u64) -> Vec<(Slots, Part)> {
        let request = self.open.get_mut(&id).filter(|request| !request.held.is_empty());
        let Some(request) = request else { return Vec::new() };
        let held = std::mem::take(&mut request.held);
        // Nothing but the part at its home was sent before, so that shard is the first.
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

    /// A request whose deadline has passed.
    pub(super) fn late(&self, now: Now) -> Option<u64> {
        self.deadlines.first().filter(|&&(at, _)| at <= now).map(|&(_, id)| id)
    }

    pub(super) fn shards(&self, id: u64) -> Vec<ShardId> {
        self.open.get(&id).map(|request| request.shards.clone()).unwrap_or_default()
    }

    /// Part of it went to yet another shard.
    pub(super) fn went_to(&mut self, id: u64, shard: ShardId) {
        let Some(request) = self.open.get_mut(&id) else { return };
        if !request.shards.contains(&shard) {
            request.shards.push(shard);
        }
    }

    /// The value of one operation, which `applied` will count.
    pub(super) fn value(&mut self, id: u64, index: u32, value: i128) {
        if let Some(request) = self.open.get_mut(&id) {
            request.result.values.push((index, value));
        }
    }

    /// All operations of the part were applied before, under the same token.
    pub(super) fn replayed(&mut self, part: &Part, effects: &mut Vec<Effect>) {
        if let Some(request) = self.open.get_mut(&part.request) {
            request.result.replayed += part.asked();
        }
        self.applied(part, effects);
    }

    /// All operations of the part were applied.
    pub(super) fn applied(&mut self, part: &Part, effects: &mut Vec<Effect>) {
        self.decided(part.request, part.ops.len(), effects);
    }

    /// These operations of a request have failed. What was held for it fails with them: its token was not
    /// recorded.
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

    /// All operations of the part have failed.
    pub(super) fn part_failed(&mut self, part: &Part, failure: Failure, effects: &mut Vec<Effect>) {
        let indexes = part.ops.iter().map(|queued| queued.index);
        self.failed(part.request, indexes, failure, effects);
    }

    fn decided(&mut self, id: u64, count: usize, effects: &mut Vec<Effect>) {
        let Some(request) = self.open.get_mut(&id) else { return };
        request.undecided -= count;
        if request.undecided > 0 {
            return;
        }
        let Some(request) = self.open.remove(&id) else { return };
        self.deadlines.remove(&(request.deadline, id));
        answer(id, request.result, effects);
    }
}

fn bytes_of(held: &[(Slots, Part)]) -> usize {
    held.iter().map(|(_, part)| part.bytes).sum()
}

/// What becomes of the parts that were held when the one at the token's home fails so. They were not sent, so nothing is
/// unknown of them but what an earlier attempt under the token has done.
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
