//! The next steps of a map in use: missing copies, superfluous copies, uneven loads.
//!
//! The steps are found in order of urgency, one change per shard and plan. Two kinds are never held
//! back, neither by the mass-failure guard nor by the limits on moves: members that come back to
//! their own copies, and a learner for a shard that has only `min_in_sync` members and waits for
//! one that can't acknowledge. Everything else makes *new* copies, or moves them, and is limited.

use std::collections::{BTreeMap, BTreeSet};

use crate::ids::{ShardId, StoreId};
use crate::planner::placement::{counts, may_swap};
use crate::planner::vacancies::wants;
use crate::planner::{
    Nearness, PlannedChange, PlannerLimits, Store, StoreState, Stores, balance, by_id, near_to,
    nearness, with,
};
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
}

/// The next changes, at most one for each shard.
pub fn changes(input: &PlannerInput<'_>) -> Vec<PlannedChange> {
    let mut plan = PlanBuilder::new(input);
    plan.each(|plan, shard| {
        plan.returns(shard).or_else(|| plan.swap_at_floor(shard)).or_else(|| plan.adopt(shard))
    });
    plan.rebuild();
    plan.each(|plan, shard| {
        plan.release(shard).or_else(|| plan.leave(shard)).or_else(|| plan.empty(shard))
    });
    plan.level_replicas();
    plan.level_primaries();
    plan.changes
}

/// A plan in the making: the loads as they will be after the changes so far.
pub(super) struct PlanBuilder<'a> {
    pub(super) input: &'a PlannerInput<'a>,
    pub(super) stores: Stores<'a>,
    /// The number of replicas that belong to each store, by the targets and the changes so far.
    pub(super) loads: BTreeMap<StoreId, usize>,
    /// The number of shards that each store leads.
    led: BTreeMap<StoreId, usize>,
    /// Moves in progress or planned: into each store, and out of it.
    pub(super) coming: BTreeMap<StoreId, usize>,
    going: BTreeMap<StoreId, usize>,
    /// The shards that have a change in this plan.
    pub(super) changed: BTreeSet<ShardId>,
    changes: Vec<PlannedChange>,
}

impl<'a> PlanBuilder<'a> {
    fn new(input: &'a PlannerInput<'a>) -> Self {
        let stores = by_id(input.stores);
        let records = || input.shards.iter().map(|shard| shard.record);
        let leaving = |record: &'a ShardRecord| {
            record.isr.iter().filter(|store| !record.target.contains(store))
        };
        Self {
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
    fn may_go(&self, store: StoreId) -> bool {
        self.is_below(&self.going, store)
    }

    fn is_below(&self, moves: &BTreeMap<StoreId, usize>, store: StoreId) -> bool {
        moves.get(&store).is_none_or(|&count| count < self.input.limits.moves_max)
    }

    /// Adds at most one change for each shard that is free and has none in this plan yet.
    fn each(&mut self, change: impl Fn(&Self, &ShardView<'a>) -> Option<PlannedChange>) {
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

    fn state(&self, store: StoreId) -> StoreState {
        self.stores.get(&store).map_or(StoreState::Gone, |store| store.state)
    }

    pub(super) fn is_ready(&self, store: StoreId) -> bool {
        self.state(store) == StoreState::Ready
    }

    /// Returns whether the store answers at all.
    fn answers(&self, store: StoreId) -> bool {
        !matches!(self.state(store), StoreState::Away | StoreState::Gone)
    }

    /// Returns whether the store can't take the shard's writes.
    fn is_unable(&self, shard: &ShardView<'_>, store: StoreId) -> bool {
        !self.answers(store)
            || self.state(store) == StoreState::Full
            || shard.unable.contains(&store)
    }

    /// Returns whether the store's copies may stay.
    pub(super) fn belongs(&self, store: StoreId) -> bool {
        !matches!(self.state(store), StoreState::Gone | StoreState::Suspect)
    }

    // ---- shard by shard ------------------------------------------------------------------------

    /// A replica that was removed from the in-sync set and is back: its copy is brought up to date.
    fn returns(&self, shard: &ShardView<'_>) -> Option<PlannedChange> {
        let record = shard.record;
        let returns = |&&store: &&StoreId| {
            let there = record.isr.contains(&store) || record.learners.contains(&store);
            !there && matches!(self.state(store), StoreState::Ready | StoreState::Draining)
        };
        let store = *record.target.iter().find(returns)?;
        Some(PlannedChange::Recruit { shard: record.shard(), store, instead: None })
    }

    /// A learner in place of a member that can't acknowledge. With only `min_in_sync` members, such
    /// a member blocks every commit, so the learner is needed at once; with fewer members, too.
    fn swap_at_floor(&self, shard: &ShardView<'_>) -> Option<PlannedChange> {
        let record = shard.record;
        let unable = |store: StoreId| self.is_unable(shard, store);
        let at_floor = record.room(self.input.min_in_sync) == 0;
        let below = record.isr.len() < self.input.min_in_sync;
        let stuck = at_floor && record.isr.iter().any(|&store| unable(store)) || below;
        let helped = record.learners.iter().any(|&store| !unable(store));
        if !stuck || helped {
            return None;
        }
        let kept: Vec<StoreId> =
            record.isr.iter().copied().filter(|&store| !unable(store)).collect();
        let store = self.best(&kept, |store| !holds(record, store) && !unable(store))?;
        // One of the unable stores gives its place up, preferably one that is not in sync.
        let instead = || {
            let gone = record.target.iter().copied().filter(|&store| unable(store));
            gone.min_by_key(|store| (record.isr.contains(store), *store))
        };
        let full = record.target.len() >= self.input.replicas;
        let instead = if full { Some(instead()?) } else { None };
        Some(PlannedChange::Recruit { shard: record.shard(), store, instead })
    }

    /// A member that is not in the target is taken into it: nothing needs to be copied where a copy
    /// exists.
    fn adopt(&self, shard: &ShardView<'_>) -> Option<PlannedChange> {
        let record = shard.record;
        let instead = self.vacancy(record)?;
        let held = |store| holds(record, store) && !record.target.contains(&store);
        let store = self.best(&self.kept(record), held)?;
        Some(PlannedChange::Recruit { shard: record.shard(), store, instead })
    }

    /// The release of a copy that is no longer wanted: once all that are wanted are in sync, or
    /// there are too many.
    fn release(&self, shard: &ShardView<'_>) -> Option<PlannedChange> {
        let record = shard.record;
        let release = |store| Some(PlannedChange::Release { shard: record.shard(), store });
        let unwanted =
            |&&store: &&StoreId| !record.isr.contains(&store) && !record.target.contains(&store);
        if let Some(&store) = record.learners.iter().find(unwanted) {
            return release(store);
        }
        let idle = |&&store: &&StoreId| {
            self.state(store) == StoreState::Suspect && !record.isr.contains(&store)
        };
        if let Some(&store) = record.target.iter().chain(&record.learners).find(idle) {
            return release(store);
        }
        // No store can be recruited in its place, and it would never be in sync. (While the guard
        // holds, it may be back soon.)
        let lost = |&&store: &&StoreId| self.state(store) == StoreState::Gone;
        if let Some(&store) = record.learners.iter().find(lost)
            && !self.input.hold
        {
            return release(store);
        }
        let room = record.room(self.input.min_in_sync) > 0;
        let others = || record.isr.iter().copied().filter(|&store| store != record.primary.store);
        if let Some(store) = others().find(|&store| self.state(store) == StoreState::Suspect)
            && room
        {
            return release(store);
        }
        let whole = record.target.len() >= self.input.replicas
            && record.target.iter().all(|store| record.isr.contains(store));
        let many = record.isr.len() > self.input.replicas;
        let extra = others().filter(|store| !record.target.contains(store));
        let extra = extra.min_by_key(|&store| (self.answers(store), store))?;
        if (whole || many) && room { release(extra) } else { None }
    }

    /// A hand-over, if the primary is on a store that should lead no more, that takes no writes, or
    /// whose copy is to be released.
    fn leave(&self, shard: &ShardView<'_>) -> Option<PlannedChange> {
        let record = shard.record;
        let primary = record.primary.store;
        let unwanted = !record.target.contains(&primary)
            && record.target.iter().all(|store| record.isr.contains(store));
        let leaves = match self.state(primary) {
            StoreState::Draining | StoreState::Suspect | StoreState::Gone => true,
            // With too few members that can write, any other primary would refuse writes, too.
            StoreState::Full => {
                let able = record.isr.iter().filter(|&&store| !self.is_unable(shard, store));
                able.count() >= self.input.min_in_sync
            }
            StoreState::Ready | StoreState::Away | StoreState::Unregistered => false,
        };
        if !leaves && !unwanted {
            return None;
        }
        let to = self.successors(shard).min_by_key(|store| (self.led.get(store), *store))?;
        Some(PlannedChange::HandOver { shard: record.shard(), to })
    }

    /// The move of a copy off a store that drains, if there is another store for it. The copy stays
    /// until the new one is in sync.
    fn empty(&self, shard: &ShardView<'_>) -> Option<PlannedChange> {
        let record = shard.record;
        if self.input.hold || !record.learners.is_empty() {
            return None;
        }
        let drains =
            |&store: &StoreId| self.state(store) == StoreState::Draining && self.may_go(store);
        let instead = record.target.iter().copied().find(drains)?;
        let kept: Vec<StoreId> =
            record.target.iter().copied().filter(|&store| store != instead).collect();
        let store = self.best(&kept, |store| !wants(record, store))?;
        let change =
            PlannedChange::Recruit { shard: record.shard(), store, instead: Some(instead) };
        // The best store may have to take other copies first. A fuller one would only have to give
        // this one away again.
        self.may_come(store).then_some(change)
    }

    /// The members that could lead the shard as well.
    fn successors(&self, shard: &'a ShardView<'_>) -> impl Iterator<Item = StoreId> {
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
    fn best(&self, set: &[StoreId], will_do: impl Fn(StoreId) -> bool) -> Option<StoreId> {
        let ready = self.stores.values().filter(|store| store.state == StoreState::Ready);
        let free = ready.filter(|store| !set.contains(&store.id) && will_do(store.id));
        let cost = |store: &&&Store| {
            let near = near_to(&self.stores, store.id, set, None);
            (near, self.loads[&store.id], std::cmp::Reverse(store.capacity), store.id)
        };
        free.min_by_key(cost).map(|store| store.id)
    }

    // ---- balance -------------------------------------------------------------------------------

    /// Moves replicas apart, and from full stores to empty ones, only while no shard lacks a copy
    /// that it could have: repair goes before balance.
    fn level_replicas(&mut self) {
        let ready = self.stores.values().filter(|store| store.state == StoreState::Ready).count();
        let wanted = self.input.replicas.min(ready);
        let short = |shard: &ShardView<'_>| shard.record.isr.len() < wanted;
        if self.input.hold || self.input.shards.iter().any(short) {
            return;
        }
        let ideal = self.ideal(self.input.replicas);
        let shards = self.input.shards;
        let at_rest = |shard: &&ShardView<'_>| {
            let record = shard.record;
            shard.free && record.learners.is_empty() && record.isr == record.target
        };
        for shard in shards.iter().filter(at_rest) {
            let near = nearness(&self.stores, &shard.record.target);
            if near > ideal && !self.changed.contains(&shard.record.shard()) {
                let change = self.apart(shard.record, near);
                self.extend(change);
            }
        }
        let mut movable: Vec<&ShardRecord> =
            shards.iter().filter(at_rest).map(|shard| shard.record).collect();
        loop {
            movable.retain(|record| !self.changed.contains(&record.shard()));
            let mut held: BTreeMap<StoreId, Vec<&ShardRecord>> = BTreeMap::new();
            for record in &movable {
                for &store in &record.target {
                    held.entry(store).or_default().push(record);
                }
            }
            let loads: BTreeMap<StoreId, usize> = self
                .loads
                .iter()
                .map(|(&id, &load)| (id, load))
                .filter(|&(id, _)| self.is_ready(id))
                .collect();
            let path = balance::path(&loads, |from, to| {
                if !self.may_come(to) || !self.may_go(from) {
                    return None;
                }
                let fits =
                    |record: &&&ShardRecord| may_swap(&self.stores, &record.target, from, to);
                held.get(&from)?.iter().find(fits).map(|record| record.shard())
            });
            let Some(steps) = path else { return };
            let shards: BTreeSet<ShardId> = steps.iter().map(|step| step.unit).collect();
            if shards.len() < steps.len() {
                return; // There is one change per shard; the next plan finds another path.
            }
            for step in steps {
                let change = PlannedChange::Recruit {
                    shard: step.unit,
                    store: step.to,
                    instead: Some(step.from),
                };
                self.extend(Some(change));
            }
        }
    }

    /// The least nearness that the replicas of a shard can have.
    fn ideal(&self, replicas: usize) -> Nearness {
        let mut set = Vec::new();
        while set.len() < replicas
            && let Some(store) = self.best(&set, |_| true)
        {
            set.push(store);
        }
        nearness(&self.stores, &set)
    }

    /// A move that brings the replicas of a shard further apart, if they are nearer than they need
    /// be.
    fn apart(&self, record: &ShardRecord, now: Nearness) -> Option<PlannedChange> {
        let swaps = record.target.iter().filter(|&&from| self.may_go(from));
        let swaps = swaps.flat_map(|&from| {
            let ready = self.stores.values().filter(|store| {
                store.state == StoreState::Ready
                    && !record.target.contains(&store.id)
                    && self.may_come(store.id)
            });
            ready.map(move |store| {
                let near = nearness(&self.stores, &with(&record.target, store.id, Some(from)));
                (near, self.loads[&store.id], store.id, from)
            })
        });
        let (near, _, store, from) = swaps.min()?;
        let shard = record.shard();
        (near < now).then_some(PlannedChange::Recruit { shard, store, instead: Some(from) })
    }

    /// Balances primaries, one hand-over at a time: each costs its shard a few milliseconds.
    fn level_primaries(&mut self) {
        if !self.input.quiet || !self.changes.is_empty() {
            return;
        }
        let at_rest =
            |shard: &&ShardView<'_>| shard.free && shard.record.isr == shard.record.target;
        let movable: Vec<&ShardView<'_>> = self.input.shards.iter().filter(at_rest).collect();
        let led: BTreeMap<StoreId, usize> = self
            .led
            .iter()
            .map(|(&id, &led)| (id, led))
            .filter(|&(id, _)| self.is_ready(id))
            .collect();
        let path = balance::path(&led, |from, to| {
            let fits = |shard: &&&ShardView<'_>| {
                shard.record.primary.store == from
                    && self.successors(shard).any(|successor| successor == to)
            };
            movable.iter().find(fits).map(|shard| shard.record.shard())
        });
        // The last step of the path comes first, since it makes room for the one before it.
        let step = path.and_then(|steps| steps.first().copied());
        self.extend(step.map(|step| PlannedChange::HandOver { shard: step.unit, to: step.to }));
    }
}

/// Returns whether the store is a member or a learner of the shard.
pub(super) fn holds(record: &ShardRecord, store: StoreId) -> bool {
    record.isr.contains(&store) || record.learners.contains(&store)
}
