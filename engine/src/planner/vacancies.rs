//! What is missing is made anew: new copies for the places in targets that are empty, or whose store will not come
//! back.

use std::collections::BTreeMap;

use crate::config::ShardConfig;
use crate::ids::StoreId;
use crate::planner::changes::{Plan, holds};
use crate::planner::{Change, Stores, balance, near_to};

/// A place in a target, and who is thought of for it.
struct Vacancy<'a> {
    config: &'a ShardConfig,
    kept: Vec<StoreId>,
    instead: Option<StoreId>,
    store: StoreId,
}

impl Vacancy<'_> {
    /// The second of the two stores would do as well as the first, which has it.
    fn may_go(&self, stores: &Stores<'_>, from: StoreId, to: StoreId) -> bool {
        let near = |store| near_to(stores, store, &self.kept, None);
        self.store == from && !wants(self.config, to) && near(to) <= near(from)
    }
}

impl Plan<'_> {
    /// The place in the target that is to be given to somebody else: an empty one (none), or that of a
    /// store that will not come back.
    pub(super) fn vacancy(&self, config: &ShardConfig) -> Option<Option<StoreId>> {
        if config.target.len() < self.cluster.replicas {
            return Some(None);
        }
        let gone = config.target.iter().copied().find(|&store| !self.belongs(store))?;
        Some(Some(gone))
    }

    /// The members of the target that stay.
    pub(super) fn kept(&self, config: &ShardConfig) -> Vec<StoreId> {
        config.target.iter().copied().filter(|&store| self.belongs(store)).collect()
    }

    /// New copies for all vacancies, thought of together: first each goes to the emptiest store, then
    /// they are shifted until the loads are level, and of that as many begin as may. What has to wait
    /// is seen again by the next plan. (One by one, the last would find the empty stores holding the
    /// shard already, and copies would have to move on later.)
    pub(super) fn rebuild(&mut self) {
        if self.cluster.hold {
            return;
        }
        let mut loads = self.loads.clone();
        loads.retain(|&store, _| self.is_ready(store));
        let mut vacancies = Vec::new();
        for shard in self.cluster.shards.iter().filter(|shard| shard.free) {
            let config = shard.config;
            if let Some(instead) = self.vacancy(config)
                && !self.changed.contains(&config.shard())
                && let kept = self.kept(config)
                && let Some(store) = self.emptiest(&loads, config, &kept)
            {
                *loads.entry(store).or_default() += 1;
                vacancies.push(Vacancy { config, kept, instead, store });
            }
        }
        while let Some(steps) = balance::path(&loads, |from, to| {
            vacancies.iter().position(|vacancy| vacancy.may_go(&self.stores, from, to))
        }) {
            for step in steps {
                vacancies[step.unit].store = step.to;
                *loads.entry(step.from).or_default() -= 1;
                *loads.entry(step.to).or_default() += 1;
            }
        }
        for Vacancy { config, instead, store, .. } in vacancies {
            if self.may_come(store) {
                let shard = config.shard();
                self.extend(Some(Change::Recruit { shard, store, instead }));
            }
        }
    }

    /// The best store for a new copy, by these loads.
    fn emptiest(
        &self,
        loads: &BTreeMap<StoreId, usize>,
        config: &ShardConfig,
        kept: &[StoreId],
    ) -> Option<StoreId> {
        let free = loads.iter().filter(|(store, _)| !wants(config, **store));
        let cost = |(store, load): &(&StoreId, &usize)| {
            let capacity = self.stores.get(store).map_or(0, |store| store.capacity);
            let near = near_to(&self.stores, **store, kept, None);
            (near, **load, std::cmp::Reverse(capacity), **store)
        };
        free.min_by_key(cost).map(|(&store, _)| store)
    }
}

/// The store has a copy, or a place.
pub(super) fn wants(config: &ShardConfig, store: StoreId) -> bool {
    holds(config, store) || config.target.contains(&store)
}
