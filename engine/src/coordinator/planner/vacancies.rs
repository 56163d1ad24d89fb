//! Replacement of missing copies: new copies for places in targets that are empty, or whose store
//! will not come back.

use std::collections::{BTreeMap, BTreeSet};

use crate::coordinator::planner::plan::PlanBuilder;
use crate::coordinator::planner::{Nearness, PlannedChange, Store, StoreState, balance, known};
use crate::ids::StoreId;
use crate::shard_record::ShardRecord;

/// A place in a target, and the store that it is planned for.
struct Vacancy<'a> {
    record: &'a ShardRecord,
    kept: Vec<&'a Store>,
    instead: Option<StoreId>,
    store: &'a Store,
}

impl Vacancy<'_> {
    /// Returns whether the place may go to a store that would do as well as the planned one.
    fn may_go(&self, to: &Store) -> bool {
        let near = |store| Nearness::to(store, &self.kept);
        !self.record.mentions(to.id) && near(to) <= near(self.store)
    }
}

/// Plans new copies for all vacancies together: first each goes to the emptiest store, then
/// they are shifted until the loads are level, and as many of them begin as the limits allow.
/// The next plan finds the others again. (If they were planned one by one, the last would find
/// the empty stores holding the shard already, and copies would have to move on later.)
pub(super) fn rebuild(plan: &mut PlanBuilder<'_>) {
    if plan.input.hold {
        return;
    }
    let mut loads = plan.loads.clone();
    loads.retain(|&store, _| plan.is_ready(store));
    let mut vacancies = Vec::new();
    for shard in plan.input.shards.iter().filter(|shard| shard.free) {
        let record = shard.record;
        if let Some(instead) = plan.vacancy(record)
            && !plan.changed.contains(&record.shard())
            && let kept = known(&plan.stores, &plan.kept(record), None)
            && let Some(store) = emptiest(plan, &loads, record, &kept)
        {
            *loads.entry(store.id).or_default() += 1;
            vacancies.push(Vacancy { record, kept, instead, store });
        }
    }
    // The vacancies that are planned for each store, by their index.
    let mut planned: BTreeMap<StoreId, BTreeSet<usize>> = BTreeMap::new();
    for (at, vacancy) in vacancies.iter().enumerate() {
        planned.entry(vacancy.store.id).or_default().insert(at);
    }
    while let Some(steps) = balance::path(&loads, |from, to| {
        let to = plan.stores.get(&to)?;
        planned.get(&from)?.iter().copied().find(|&at| vacancies[at].may_go(to))
    }) {
        for step in steps {
            if let Some(store) = plan.stores.get(&step.to) {
                vacancies[step.unit].store = store;
            }
            planned.entry(step.from).or_default().remove(&step.unit);
            planned.entry(step.to).or_default().insert(step.unit);
            *loads.entry(step.from).or_default() -= 1;
            *loads.entry(step.to).or_default() += 1;
        }
    }
    for Vacancy { record, instead, store, .. } in vacancies {
        if plan.may_come(store.id) {
            let (shard, store) = (record.shard(), store.id);
            plan.extend(Some(PlannedChange::Recruit { shard, store, instead }));
        }
    }
}

/// The best store for a new copy, by these loads.
fn emptiest<'a>(
    plan: &PlanBuilder<'a>,
    loads: &BTreeMap<StoreId, usize>,
    record: &ShardRecord,
    kept: &[&Store],
) -> Option<&'a Store> {
    let ready = plan.stores.values().filter(|store| store.state == StoreState::Ready);
    let free = ready.zip(loads.values()).filter(|(store, _)| !record.mentions(store.id));
    let cost = |(store, load): &(&&Store, &usize)| {
        let unwanted = plan.sharing.unwanted(store.id, kept.iter().map(|store| store.id));
        (Nearness::to(store, kept), **load, unwanted, std::cmp::Reverse(store.capacity), store.id)
    };
    free.min_by_key(cost).map(|(store, _)| *store)
}
