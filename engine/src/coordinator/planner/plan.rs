//! A plan in the making: its inputs, the loads as they will be, and the changes so far.

use std::collections::{BTreeMap, BTreeSet};

use crate::coordinator::planner::placement::counts;
use crate::coordinator::planner::sharing::Sharing;
use crate::coordinator::planner::{
    Nearness, PlannedChange, PlannerLimits, Store, StoreState, Stores, by_id, known,
};
use crate::ids::{ShardId, StoreId};
use crate::shard_record::ShardRecord;

/// One shard's present state.
#[derive(Clone, Debug)]
pub struct ShardView<'a> {
    /// The shard's record.
    pub record: &'a ShardRecord,
    /// The shard has a live primary, and no change of it is in progress.
    pub free: bool,
    /// The stores that are silent to its primary, and the members and learners that will not
    /// acknowledge by themselves, as the primary reports.
    pub unable: Vec<StoreId>,
}

/// The inputs of a plan.
#[derive(Clone, Debug)]
pub struct PlannerInput<'a> {
    /// All known stores.
    pub stores: &'a [Store],
    /// All shards.
    pub shards: &'a [ShardView<'a>],
    /// The number of copies that each shard should have.
    pub replicas: usize,
    /// The number of in-sync members that a write needs.
    pub min_in_sync: usize,
    /// The limits on moves.
    pub limits: PlannerLimits,
    /// The mass-failure guard holds back new copies (see [`super::guard`]).
    pub hold: bool,
    /// There was no disruption for some time: primaries may be moved for balance alone.
    pub quiet: bool,
    /// An operator wants no moves for balance alone.
    pub paused: bool,
}

/// A plan in the making: the loads as they will be after the changes so far.
pub(super) struct PlanBuilder<'a> {
    pub(super) input: &'a PlannerInput<'a>,
    pub(super) stores: Stores<'a>,
    /// The number of replicas that belong to each store, by the targets and the changes so far.
    pub(super) loads: BTreeMap<StoreId, usize>,
    /// The number of shards that each store leads.
    pub(super) led: BTreeMap<StoreId, usize>,
    /// Moves in progress or planned: into each store, and out of it.
    pub(super) coming: BTreeMap<StoreId, usize>,
    pub(super) going: BTreeMap<StoreId, usize>,
    /// The shards that have a change in this plan.
    pub(super) changed: BTreeSet<ShardId>,
    /// The pairs of stores that share shards, before the changes.
    pub(super) sharing: Sharing,
    pub(super) changes: Vec<PlannedChange>,
}

impl<'a> PlanBuilder<'a> {
    pub(super) fn new(input: &'a PlannerInput<'a>) -> Self {
        let stores = by_id(input.stores);
        let records = || input.shards.iter().map(|shard| shard.record);
        let leaving = |record: &'a ShardRecord| {
            record.isr.iter().filter(|store| !record.target.contains(store))
        };
        let mut sharing = Sharing::of(&stores, &input.limits);
        if sharing.is_large() {
            records().for_each(|record| sharing.add(&record.target));
        }
        Self {
            sharing,
            loads: counts(&stores, records().flat_map(|record| &record.target)),
            led: counts(&stores, records().map(|record| &record.primary.store)),
            coming: counts(&stores, records().flat_map(|record| &record.learners)),
            going: counts(&stores, records().flat_map(leaving)),
            input,
            stores,
            changed: BTreeSet::new(),
            changes: Vec::new(),
        }
    }

    /// Returns whether another copy may move into the store.
    pub(super) fn may_come(&self, store: StoreId) -> bool {
        self.is_below(&self.coming, store)
    }

    /// Returns whether another copy may move out of the store.
    pub(super) fn may_go(&self, store: StoreId) -> bool {
        self.is_below(&self.going, store)
    }

    fn is_below(&self, moves: &BTreeMap<StoreId, usize>, store: StoreId) -> bool {
        moves.get(&store).is_none_or(|&count| count < self.input.limits.moves_max)
    }

    /// Adds at most one change for each shard that is free and has none in this plan yet.
    pub(super) fn each(&mut self, change: impl Fn(&Self, &ShardView<'a>) -> Option<PlannedChange>) {
        for shard in self.input.shards.iter().filter(|shard| shard.free) {
            if !self.changed.contains(&shard.record.shard()) {
                let change = change(self, shard);
                self.extend(change);
            }
        }
    }

    pub(super) fn extend(&mut self, change: Option<PlannedChange>) {
        let Some(change) = change else { return };
        let bump = |counts: &mut BTreeMap<StoreId, usize>, store| {
            *counts.entry(store).or_default() += 1;
        };
        match change {
            PlannedChange::Recruit { store, instead, .. } => {
                bump(&mut self.coming, store);
                bump(&mut self.loads, store);
                if let Some(instead) = instead {
                    bump(&mut self.going, instead);
                    self.loads.entry(instead).and_modify(|load| *load = load.saturating_sub(1));
                }
            }
            PlannedChange::HandOver { to, .. } => bump(&mut self.led, to),
            PlannedChange::Release { .. } => {}
        }
        self.changed.insert(change.shard());
        self.changes.push(change);
    }

    pub(super) fn state(&self, store: StoreId) -> StoreState {
        self.stores.get(&store).map_or(StoreState::Gone, |store| store.state)
    }

    pub(super) fn is_ready(&self, store: StoreId) -> bool {
        self.state(store) == StoreState::Ready
    }

    /// Returns whether the store answers at all.
    pub(super) fn answers(&self, store: StoreId) -> bool {
        !matches!(self.state(store), StoreState::Away | StoreState::Gone)
    }

    /// Returns whether the store can't take the shard's writes.
    pub(super) fn is_unable(&self, shard: &ShardView<'_>, store: StoreId) -> bool {
        !self.answers(store)
            || self.state(store) == StoreState::Full
            || shard.unable.contains(&store)
    }

    /// Returns whether the store's copies may stay.
    pub(super) fn belongs(&self, store: StoreId) -> bool {
        !matches!(self.state(store), StoreState::Gone | StoreState::Suspect)
    }

    /// The place in the target that needs another store: an empty one (`Some(None)`), or that of a
    /// store that will not come back.
    pub(super) fn vacancy(&self, record: &ShardRecord) -> Option<Option<StoreId>> {
        if record.target.len() < self.input.replicas {
            return Some(None);
        }
        let gone = record.target.iter().copied().find(|&store| !self.belongs(store))?;
        Some(Some(gone))
    }

    /// The members of the target that stay.
    pub(super) fn kept(&self, record: &ShardRecord) -> Vec<StoreId> {
        record.target.iter().copied().filter(|&store| self.belongs(store)).collect()
    }

    /// The members that could lead the shard as well.
    pub(super) fn successors(&self, shard: &'a ShardView<'_>) -> impl Iterator<Item = StoreId> {
        let record = shard.record;
        record.isr.iter().copied().filter(move |&store| {
            store != record.primary.store
                && self.is_ready(store)
                && record.target.contains(&store)
                && !record.tainted.contains(&store)
                && !shard.unable.contains(&store)
        })
    }

    /// The best store to add to a set, among the ready ones that `will_do`.
    pub(super) fn best(
        &self,
        set: &[StoreId],
        will_do: impl Fn(StoreId) -> bool,
    ) -> Option<StoreId> {
        let ready = self.stores.values().filter(|store| store.state == StoreState::Ready);
        let free = ready.filter(|store| !set.contains(&store.id) && will_do(store.id));
        let others = known(&self.stores, set, None);
        let cost = |store: &&&Store| {
            let near = Nearness::to(store, &others);
            let unwanted = self.sharing.unwanted(store.id, set.iter().copied());
            (near, self.loads[&store.id], unwanted, std::cmp::Reverse(store.capacity), store.id)
        };
        free.min_by_key(cost).map(|store| store.id)
    }
}

/// Returns whether the store is a member or a learner of the shard.
pub(super) fn holds(record: &ShardRecord, store: StoreId) -> bool {
    record.isr.contains(&store) || record.learners.contains(&store)
}
