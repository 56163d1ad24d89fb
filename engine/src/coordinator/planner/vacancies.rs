//! Replacement of missing copies: new copies for places in targets that are empty, or whose store
//! will not come back.

use std::collections::BTreeMap;

use crate::coordinator::planner::plan::{PlanBuilder, wants};
use crate::coordinator::planner::{PlannedChange, Stores, balance, near_to};
use crate::ids::StoreId;
use crate::shard_record::ShardRecord;

/// A place in a target, and the store that it is planned for.
struct Vacancy<'a> {
    record: &'a ShardRecord,
    kept: Vec<StoreId>,
    instead: Option<StoreId>,
    store: StoreId,
}

impl Vacancy<'_> {
    /// Returns whether the place may go from `from`, for which it is planned, to `to`, which would
    /// do as well.
    fn may_go(&self, stores: &Stores<'_>, from: StoreId, to: StoreId) -> bool {
        let near = |store| near_to(stores, store, &self.kept, None);
        self.store == from && !wants(self.record, to) && near(to) <= near(from)
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
            && let kept = plan.kept(record)
            && let Some(store) = emptiest(plan, &loads, record, &kept)
        {
            *loads.entry(store).or_default() += 1;
            vacancies.push(Vacancy { record, kept, instead, store });
        }
    }
    while let Some(steps) = balance::path(&loads, |from, to| {
        vacancies.iter().position(|vacancy| vacancy.may_go(&plan.stores, from, to))
    }) {
        for step in steps {
            vacancies[step.unit].store = step.to;
            *loads.entry(step.from).or_default() -= 1;
            *loads.entry(step.to).or_default() += 1;
        }
    }
    for Vacancy { record, instead, store, .. } in vacancies {
        if plan.may_come(store) {
            let shard = record.shard();
            plan.extend(Some(PlannedChange::Recruit { shard, store, instead }));
        }
    }
}

/// The best store for a new copy, by these loads.
fn emptiest(
    plan: &PlanBuilder<'_>,
    loads: &BTreeMap<StoreId, usize>,
    record: &ShardRecord,
    kept: &[StoreId],
) -> Option<StoreId> {
    let free = loads.iter().filter(|(store, _)| !wants(record, **store));
    let cost = |(store, load): &(&StoreId, &usize)| {
        let capacity = plan.stores.get(store).map_or(0, |store| store.capacity);
        let near = near_to(&plan.stores, **store, kept, None);
        (near, **load, std::cmp::Reverse(capacity), **store)
    };
    free.min_by_key(cost).map(|(&store, _)| store)
}
