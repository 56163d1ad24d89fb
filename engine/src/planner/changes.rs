//! The next steps of a map that is alive: what is missing, what is too much, what is uneven.
//!
//! In order of urgency; one change per shard and plan. Two kinds are never held back, neither by the
//! mass-failure guard nor by the limits on moves: members that come back to their own copies, and the
//! learner that a shard needs which waits at the floor for a member that can't acknowledge. Everything else makes
//! *new* copies, or moves them, and is rationed.

use std::collections::{BTreeMap, BTreeSet};

use crate::config::ShardConfig;
use crate::ids::{ShardId, StoreId};
use crate::planner::placement::{counts, may_swap};
use crate::planner::vacancies::wants;
use crate::planner::{
    Change, Limits, Nearness, Store, StoreState, Stores, balance, by_id, near_to, nearness, with,
};

/// One shard as it stands.
#[derive(Clone, Debug)]
pub struct Shard<'a> {
    pub config: &'a ShardConfig,
    /// It has a live primary, and no change of it is under way.
    pub free: bool,
    /// Stores that its primary does not hear; and members and learners that will not acknowledge by
    /// themselves, as it says.
    pub unable: Vec<StoreId>,
}

/// All there is to plan with.
#[derive(Clone, Debug)]
pub struct Cluster<'a> {
    pub stores: &'a [Store],
    pub shards: &'a [Shard<'a>],
    pub replicas: usize,
    pub min_in_sync: usize,
    pub limits: Limits,
    /// No new copies for now (see [`super::guard`]).
    pub hold: bool,
    /// All has been quiet: primaries may be moved for no reason but balance.
    pub quiet: bool,
}

/// What to do next.
pub fn changes(cluster: &Cluster<'_>) -> Vec<Change> {
    let mut plan = Plan::new(cluster);
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

pub(super) struct Plan<'a> {
    pub(super) cluster: &'a Cluster<'a>,
    pub(super) stores: Stores<'a>,
    /// Replicas that belong to each store, by the targets and the changes so far.
    pub(super) loads: BTreeMap<StoreId, usize>,
    led: BTreeMap<StoreId, usize>,
    /// Moves that are under way or planned: into each store, and out of it.
    pub(super) coming: BTreeMap<StoreId, usize>,
    going: BTreeMap<StoreId, usize>,
    pub(super) changed: BTreeSet<ShardId>,
    changes: Vec<Change>,
}

impl<'a> Plan<'a> {
    fn new(cluster: &'a Cluster<'a>) -> Self {
        let stores = by_id(cluster.stores);
        let configs = || cluster.shards.iter().map(|shard| shard.config);
        let leaving = |config: &'a ShardConfig| {
            config.isr.iter().filter(|store| !config.target.contains(store))
        };
        Self {
            loads: counts(&stores, configs().flat_map(|config| &config.target)),
            led: counts(&stores, configs().map(|config| &config.primary.store)),
            coming: counts(&stores, configs().flat_map(|config| &config.learners)),
            going: counts(&stores, configs().flat_map(leaving)),
            cluster,
            stores,
            changed: BTreeSet::new(),
            changes: Vec::new(),
        }
    }

    /// Another copy may move into the store.
    pub(super) fn may_come(&self, store: StoreId) -> bool {
        self.is_below(&self.coming, store)
    }

    /// Another copy may move out of it.
    fn may_go(&self, store: StoreId) -> bool {
        self.is_below(&self.going, store)
    }

    fn is_below(&self, moves: &BTreeMap<StoreId, usize>, store: StoreId) -> bool {
        moves.get(&store).is_none_or(|&count| count < self.cluster.limits.moves_max)
    }

    /// One change at most for each shard that is free and not in the plan yet.
    fn each(&mut self, change: impl Fn(&Self, &Shard<'a>) -> Option<Change>) {
        for shard in self.cluster.shards.iter().filter(|shard| shard.free) {
            if !self.changed.contains(&shard.config.shard()) {
                let change = change(self, shard);
                self.extend(change);
            }
        }
    }

    pub(super) fn extend(&mut self, change: Option<Change>) {
        let Some(change) = change else { return };
        let bump = |counts: &mut BTreeMap<StoreId, usize>, store| {
            *counts.entry(store).or_default() += 1;
        };
        match change {
            Change::Recruit { store, instead, .. } => {
                bump(&mut self.coming, store);
                bump(&mut self.loads, store);
                if let Some(instead) = instead {
                    bump(&mut self.going, instead);
                    self.loads.entry(instead).and_modify(|load| *load = load.saturating_sub(1));
                }
            }
            Change::HandOver { to, .. } => bump(&mut self.led, to),
            Change::Release { .. } => {}
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

    /// It answers, whatever else is to be said of it.
    fn answers(&self, store: StoreId) -> bool {
        !matches!(self.state(store), StoreState::Away | StoreState::Gone)
    }

    /// It can't take what is written to the shard.
    fn is_unable(&self, shard: &Shard<'_>, store: StoreId) -> bool {
        !self.answers(store)
            || self.state(store) == StoreState::Full
            || shard.unable.contains(&store)
    }

    /// A store whose copies may stay.
    pub(super) fn belongs(&self, store: StoreId) -> bool {
        !matches!(self.state(store), StoreState::Gone | StoreState::Suspect)
    }

    // ---- shard by shard ------------------------------------------------------------------------

    /// A replica that was ejected and is back: its copy is filled again.
    fn returns(&self, shard: &Shard<'_>) -> Option<Change> {
        let config = shard.config;
        let returns = |&&store: &&StoreId| {
            let there = config.isr.contains(&store) || config.learners.contains(&store);
            !there && matches!(self.state(store), StoreState::Ready | StoreState::Draining)
        };
        let store = *config.target.iter().find(returns)?;
        Some(Change::Recruit { shard: config.shard(), store, instead: None })
    }

    /// At the floor with a member that can't acknowledge nothing commits: a learner that will take
    /// that member's place is needed at once. Below the floor, too.
    fn swap_at_floor(&self, shard: &Shard<'_>) -> Option<Change> {
        let config = shard.config;
        let unable = |store: StoreId| self.is_unable(shard, store);
        let at_floor = config.room(self.cluster.min_in_sync) == 0;
        let below = config.isr.len() < self.cluster.min_in_sync;
        let stuck = at_floor && config.isr.iter().any(|&store| unable(store)) || below;
        let helped = config.learners.iter().any(|&store| !unable(store));
        if !stuck || helped {
            return None;
        }
        let kept: Vec<StoreId> =
            config.isr.iter().copied().filter(|&store| !unable(store)).collect();
        let store = self.best(&kept, |store| !holds(config, store) && !unable(store))?;
        // One of those gives the place up, rather one that is not even in sync.
        let instead = || {
            let gone = config.target.iter().copied().filter(|&store| unable(store));
            gone.min_by_key(|store| (config.isr.contains(store), *store))
        };
        let full = config.target.len() >= self.cluster.replicas;
        let instead = if full { Some(instead()?) } else { None };
        Some(Change::Recruit { shard: config.shard(), store, instead })
    }

    /// Nothing is copied where a copy is: a member that is not in the target is taken into it.
    fn adopt(&self, shard: &Shard<'_>) -> Option<Change> {
        let config = shard.config;
        let instead = self.vacancy(config)?;
        let held = |store| holds(config, store) && !config.target.contains(&store);
        let store = self.best(&self.kept(config), held)?;
        Some(Change::Recruit { shard: config.shard(), store, instead })
    }

    /// A copy that is wanted no more: once all that are wanted are in sync, or there are too many.
    fn release(&self, shard: &Shard<'_>) -> Option<Change> {
        let config = shard.config;
        let release = |store| Some(Change::Release { shard: config.shard(), store });
        let unwanted =
            |&&store: &&StoreId| !config.isr.contains(&store) && !config.target.contains(&store);
        if let Some(&store) = config.learners.iter().find(unwanted) {
            return release(store);
        }
        let idle = |&&store: &&StoreId| {
            self.state(store) == StoreState::Suspect && !config.isr.contains(&store)
        };
        if let Some(&store) = config.target.iter().chain(&config.learners).find(idle) {
            return release(store);
        }
        // No store can be recruited in its place, and it would never be in sync. (Under the guard it may be back soon.)
        let lost = |&&store: &&StoreId| self.state(store) == StoreState::Gone;
        if let Some(&store) = config.learners.iter().find(lost)
            && !self.cluster.hold
        {
            return release(store);
        }
        let room = config.room(self.cluster.min_in_sync) > 0;
        let others = || config.isr.iter().copied().filter(|&store| store != config.primary.store);
        if let Some(store) = others().find(|&store| self.state(store) == StoreState::Suspect)
            && room
        {
            return release(store);
        }
        let whole = config.target.len() >= self.cluster.replicas
            && config.target.iter().all(|store| config.isr.contains(store));
        let many = config.isr.len() > self.cluster.replicas;
        let extra = others().filter(|store| !config.target.contains(store));
        let extra = extra.min_by_key(|&store| (self.answers(store), store))?;
        if (whole || many) && room { release(extra) } else { None }
    }

    /// The primary is on a store that is to lead no more, or that takes no writes, or whose copy is to go.
    fn leave(&self, shard: &Shard<'_>) -> Option<Change> {
        let config = shard.config;
        let primary = config.primary.store;
        let unwanted = !config.target.contains(&primary)
            && config.target.iter().all(|store| config.isr.contains(store));
        let leaves = match self.state(primary) {
            StoreState::Draining | StoreState::Suspect | StoreState::Gone => true,
            // Too few that can write would refuse writes under any primary.
            StoreState::Full => {
                let able = config.isr.iter().filter(|&&store| !self.is_unable(shard, store));
                able.count() >= self.cluster.min_in_sync
            }
            StoreState::Ready | StoreState::Away | StoreState::Unregistered => false,
        };
        if !leaves && !unwanted {
            return None;
        }
        let to = self.successors(shard).min_by_key(|store| (self.led.get(store), *store))?;
        Some(Change::HandOver { shard: config.shard(), to })
    }

    /// A copy on a store that drains goes elsewhere, if there is an elsewhere. It stays until the new one is in sync.
    fn empty(&self, shard: &Shard<'_>) -> Option<Change> {
        let config = shard.config;
        if self.cluster.hold || !config.learners.is_empty() {
            return None;
        }
        let drains =
            |&store: &StoreId| self.state(store) == StoreState::Draining && self.may_go(store);
        let instead = config.target.iter().copied().find(drains)?;
        let kept: Vec<StoreId> =
            config.target.iter().copied().filter(|&store| store != instead).collect();
        let store = self.best(&kept, |store| !wants(config, store))?;
        let change = Change::Recruit { shard: config.shard(), store, instead: Some(instead) };
        // The best may have to take others first. A fuller one would only have to give it away again.
        self.may_come(store).then_some(change)
    }

    /// Who could lead the shard as well.
    fn successors(&self, shard: &'a Shard<'_>) -> impl Iterator<Item = StoreId> {
        let config = shard.config;
        config.isr.iter().copied().filter(move |&store| {
            store != config.primary.store
                && self.is_ready(store)
                && config.target.contains(&store)
                && !config.tainted.contains(&store)
                && !shard.unable.contains(&store)
        })
    }

    /// The store that a set is best made larger by, among those ready that will do.
    fn best(&self, set: &[StoreId], will_do: impl Fn(StoreId) -> bool) -> Option<StoreId> {
        let ready = self.stores.values().filter(|store| store.state == StoreState::Ready);
        let free = ready.filter(|store| !set.contains(&store.id) && will_do(store.id));
        let cost = |store: &&&Store| {
            let near = near_to(&self.stores, store.id, set, None);
            (near, self.loads[&store.id], std::cmp::Reverse(store.capacity), store.id)
        };
        free.min_by_key(cost).map(|store| store.id)
    }

    // ---- the whole -----------------------------------------------------------------------------

    /// Moves replicas apart, and from full stores to empty ones. Only when no shard lacks a copy that
    /// it could have: repair goes before comfort.
    fn level_replicas(&mut self) {
        let ready = self.stores.values().filter(|store| store.state == StoreState::Ready).count();
        let wanted = self.cluster.replicas.min(ready);
        let short = |shard: &Shard<'_>| shard.config.isr.len() < wanted;
        if self.cluster.hold || self.cluster.shards.iter().any(short) {
            return;
        }
        let ideal = self.ideal(self.cluster.replicas);
        let shards = self.cluster.shards;
        let at_rest = |shard: &&Shard<'_>| {
            let config = shard.config;
            shard.free && config.learners.is_empty() && config.isr == config.target
        };
        for shard in shards.iter().filter(at_rest) {
            let near = nearness(&self.stores, &shard.config.target);
            if near > ideal && !self.changed.contains(&shard.config.shard()) {
                let change = self.apart(shard.config, near);
                self.extend(change);
            }
        }
        let mut movable: Vec<&ShardConfig> =
            shards.iter().filter(at_rest).map(|shard| shard.config).collect();
        loop {
            movable.retain(|config| !self.changed.contains(&config.shard()));
            let mut held: BTreeMap<StoreId, Vec<&ShardConfig>> = BTreeMap::new();
            for config in &movable {
                for &store in &config.target {
                    held.entry(store).or_default().push(config);
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
                    |config: &&&ShardConfig| may_swap(&self.stores, &config.target, from, to);
                held.get(&from)?.iter().find(fits).map(|config| config.shard())
            });
            let Some(steps) = path else { return };
            let shards: BTreeSet<ShardId> = steps.iter().map(|step| step.unit).collect();
            if shards.len() < steps.len() {
                return; // One change per shard: the next plan finds another way.
            }
            for step in steps {
                let change =
                    Change::Recruit { shard: step.unit, store: step.to, instead: Some(step.from) };
                self.extend(Some(change));
            }
        }
    }

    /// How far apart the replicas of a shard can be at best.
    fn ideal(&self, replicas: usize) -> Nearness {
        let mut set = Vec::new();
        while set.len() < replicas
            && let Some(store) = self.best(&set, |_| true)
        {
            set.push(store);
        }
        nearness(&self.stores, &set)
    }

    /// Replicas of one shard that are nearer to each other than they need be.
    fn apart(&self, config: &ShardConfig, now: Nearness) -> Option<Change> {
        let swaps = config.target.iter().filter(|&&from| self.may_go(from));
        let swaps = swaps.flat_map(|&from| {
            let ready = self.stores.values().filter(|store| {
                store.state == StoreState::Ready
                    && !config.target.contains(&store.id)
                    && self.may_come(store.id)
            });
            ready.map(move |store| {
                let near = nearness(&self.stores, &with(&config.target, store.id, Some(from)));
                (near, self.loads[&store.id], store.id, from)
            })
        });
        let (near, _, store, from) = swaps.min()?;
        let shard = config.shard();
        (near < now).then_some(Change::Recruit { shard, store, instead: Some(from) })
    }

    /// One hand-over at a time: each costs its shard a few milliseconds.
    fn level_primaries(&mut self) {
        if !self.cluster.quiet || !self.changes.is_empty() {
            return;
        }
        let at_rest = |shard: &&Shard<'_>| shard.free && shard.config.isr == shard.config.target;
        let movable: Vec<&Shard<'_>> = self.cluster.shards.iter().filter(at_rest).collect();
        let led: BTreeMap<StoreId, usize> = self
            .led
            .iter()
            .map(|(&id, &led)| (id, led))
            .filter(|&(id, _)| self.is_ready(id))
            .collect();
        let path = balance::path(&led, |from, to| {
            let fits = |shard: &&&Shard<'_>| {
                shard.config.primary.store == from
                    && self.successors(shard).any(|successor| successor == to)
            };
            movable.iter().find(fits).map(|shard| shard.config.shard())
        });
        // The last step alone already makes room for the one before it.
        let step = path.and_then(|steps| steps.first().copied());
        self.extend(step.map(|step| Change::HandOver { shard: step.unit, to: step.to }));
    }
}

pub(super) fn holds(config: &ShardConfig, store: StoreId) -> bool {
    config.isr.contains(&store) || config.learners.contains(&store)
}
