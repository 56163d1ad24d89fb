//! Rounds of `Gather`: the members of some shards are asked where their logs end.

use std::collections::{BTreeMap, BTreeSet};

use crate::coordinator::{CoordinatorTurn, Effect};
use crate::ids::{Epoch, Now, Seq, ShardId, StoreBoot, StoreId};
use crate::message::ShardEnd;

/// One round of `Gather`: the log ends of the members of some shards.
#[derive(Debug)]
pub(super) struct GatherRound {
    shards: BTreeSet<ShardId>,
    /// The processes that were asked.
    asked: BTreeMap<StoreId, StoreBoot>,
    /// Stores that have not answered yet.
    waiting: BTreeSet<StoreId>,
    /// Stores that have answered, whether they hold copies or not.
    answered: BTreeSet<StoreId>,
    ends: BTreeMap<(ShardId, StoreId), ShardEnd>,
    until: Now,
}

impl GatherRound {
    /// Begins a round. `asked`: the process of each store, and the shards to ask it for. Returns
    /// its number, too.
    pub(super) fn begin(
        turn: &mut CoordinatorTurn<'_>,
        shards: BTreeSet<ShardId>,
        asked: BTreeMap<StoreId, (StoreBoot, Vec<ShardId>)>,
    ) -> (u64, Self) {
        let gather = turn.fresh_id();
        let round = Self {
            shards,
            asked: asked.iter().map(|(&store, (process, _))| (store, *process)).collect(),
            waiting: asked.keys().copied().collect(),
            answered: BTreeSet::new(),
            ends: BTreeMap::new(),
            until: turn.now.plus_ms(turn.settings.gather_ms),
        };
        for (_, (to, shards)) in asked {
            turn.effects.push(Effect::Gather { gather, to, shards });
        }
        (gather, round)
    }

    /// Takes a store's answer. Returns the process that answered, if the round waited for it.
    /// `ends`: the log ends of its copies; `None` if that process did not answer.
    pub(super) fn on_answer(
        &mut self,
        store: StoreId,
        ends: Option<&[ShardEnd]>,
    ) -> Option<StoreBoot> {
        if !self.waiting.remove(&store) {
            return None;
        }
        self.ends.extend(ends?.iter().map(|end| ((end.shard, store), *end)));
        self.answered.insert(store);
        Some(self.asked[&store])
    }

    /// The time at which the round ends although answers are missing.
    pub(super) fn until(&self) -> Now {
        self.until
    }

    pub(super) fn is_over(&self, now: Now) -> bool {
        self.waiting.is_empty() || now >= self.until
    }

    pub(super) fn contains(&self, shard: ShardId) -> bool {
        self.shards.contains(&shard)
    }

    pub(super) fn shards(&self) -> impl Iterator<Item = ShardId> {
        self.shards.iter().copied()
    }

    /// Returns whether this process was asked.
    pub(super) fn has_asked(&self, process: StoreBoot) -> bool {
        self.asked.get(&process.store) == Some(&process)
    }

    /// Returns whether this process has answered, whether it holds a copy or not.
    pub(super) fn has_answered(&self, process: StoreBoot) -> bool {
        self.has_asked(process) && self.answered.contains(&process.store)
    }

    /// The end of a store's log, if it has answered and holds a copy.
    pub(super) fn end_of(&self, shard: ShardId, store: StoreId) -> Option<&ShardEnd> {
        self.ends.get(&(shard, store))
    }

    /// The last entry in the log of a store, if it has answered and holds a copy.
    pub(super) fn last_of(&self, shard: ShardId, store: StoreId) -> Option<(Epoch, Seq)> {
        self.end_of(shard, store).map(|end| end.last)
    }

    /// The highest position of a shard that is known to be committed: some copy has applied it.
    pub(super) fn committed(&self, shard: ShardId) -> Option<Seq> {
        let of_shard = self.ends.values().filter(|end| end.shard == shard);
        of_shard.map(|end| end.applied).max()
    }
}
