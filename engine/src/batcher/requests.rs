//! Write requests that wait for their answer.
//!
//! A request is answered once, when all its operations are decided or its deadline has passed; what
//! becomes of its batch afterwards reaches nobody, since its number is not found here any more.

use std::collections::{BTreeMap, BTreeSet};

use super::Effect;
use super::outcome::{Failure, WriteResult};
use super::queue::Part;
use crate::ids::{Now, ShardId};

#[derive(Clone, Debug)]
pub(super) struct Request {
    pub deadline: Now,
    /// Operations that are neither applied nor failed.
    pub undecided: usize,
    /// Where they went.
    pub shards: Vec<ShardId>,
    pub result: WriteResult,
}

#[derive(Clone, Debug, Default)]
pub(super) struct Requests {
    open: BTreeMap<u64, Request>,
    deadlines: BTreeSet<(Now, u64)>,
}

impl Requests {
    pub(super) fn begin(&mut self, id: u64, request: Request, effects: &mut Vec<Effect>) {
        if request.undecided == 0 {
            return answer(id, request.result, effects);
        }
        self.deadlines.insert((request.deadline, id));
        self.open.insert(id, request);
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
            request.result.replayed += part.ops.len();
        }
        self.applied(part, effects);
    }

    /// All operations of the part were applied.
    pub(super) fn applied(&mut self, part: &Part, effects: &mut Vec<Effect>) {
        self.decided(part.request, part.ops.len(), effects);
    }

    /// These operations of a request have failed.
    pub(super) fn failed(
        &mut self,
        id: u64,
        indexes: impl Iterator<Item = u32>,
        failure: Failure,
        effects: &mut Vec<Effect>,
    ) {
        let Some(request) = self.open.get_mut(&id) else { return };
        let before = request.result.failed.len();
        request.result.failed.extend(indexes.map(|index| (index, failure)));
        let count = request.result.failed.len() - before;
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

fn answer(request: u64, mut result: WriteResult, effects: &mut Vec<Effect>) {
    result.values.sort_unstable_by_key(|&(index, _)| index);
    result.failed.sort_unstable();
    effects.push(Effect::Wrote { request, result });
}
