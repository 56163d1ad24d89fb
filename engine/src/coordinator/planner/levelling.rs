//! The levelling of loads: replicas are moved apart and to emptier stores, and primaries are handed
//! over.

use std::collections::{BTreeMap, BTreeSet};

use crate::coordinator::planner::placement::may_swap;
use crate::coordinator::planner::plan::PlanBuilder;
use crate::coordinator::planner::{
    Nearness, PlannedChange, ShardView, StoreState, balance, nearness, with,
};
use crate::ids::{ShardId, StoreId};
use crate::shard_record::ShardRecord;

/// Moves replicas apart, and from full stores to empty ones, only while no shard lacks a copy
/// that it could have: repair goes before balance.
pub(super) fn level_replicas(plan: &mut PlanBuilder<'_>) {
    let ready = plan.stores.values().filter(|store| store.state == StoreState::Ready).count();
    let wanted = plan.input.replicas.min(ready);
    let short = |shard: &ShardView<'_>| shard.record.isr.len() < wanted;
    if plan.input.hold || plan.input.shards.iter().any(short) {
        return;
    }
    let ideal = ideal(plan, plan.input.replicas);
    let shards = plan.input.shards;
    let at_rest = |shard: &&ShardView<'_>| {
        let record = shard.record;
        shard.free && record.learners.is_empty() && record.isr == record.target
    };
    for shard in shards.iter().filter(at_rest) {
        let near = nearness(&plan.stores, &shard.record.target);
        if near > ideal && !plan.changed.contains(&shard.record.shard()) {
            let change = apart(plan, shard.record, near);
            plan.extend(change);
        }
    }
    let mut movable: Vec<&ShardRecord> =
        shards.iter().filter(at_rest).map(|shard| shard.record).collect();
    loop {
        movable.retain(|record| !plan.changed.contains(&record.shard()));
        let mut held: BTreeMap<StoreId, Vec<&ShardRecord>> = BTreeMap::new();
        for record in &movable {
            for &store in &record.target {
                held.entry(store).or_default().push(record);
            }
        }
        let loads: BTreeMap<StoreId, usize> = plan
            .loads
            .iter()
            .map(|(&id, &load)| (id, load))
            .filter(|&(id, _)| plan.is_ready(id))
            .collect();
        let path = balance::path(&loads, |from, to| {
            if !plan.may_come(to) || !plan.may_go(from) {
                return None;
            }
            let fits = |record: &&&ShardRecord| may_swap(&plan.stores, &record.target, from, to);
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
            plan.extend(Some(change));
        }
    }
}

/// The least nearness that the replicas of a shard can have.
fn ideal(plan: &PlanBuilder<'_>, replicas: usize) -> Nearness {
    let mut set = Vec::new();
    while set.len() < replicas
        && let Some(store) = plan.best(&set, |_| true)
    {
        set.push(store);
    }
    nearness(&plan.stores, &set)
}

/// A move that brings the replicas of a shard further apart, if they are nearer than they need
/// be.
fn apart(plan: &PlanBuilder<'_>, record: &ShardRecord, now: Nearness) -> Option<PlannedChange> {
    let swaps = record.target.iter().filter(|&&from| plan.may_go(from));
    let swaps = swaps.flat_map(|&from| {
        let ready = plan.stores.values().filter(|store| {
            store.state == StoreState::Ready
                && !record.target.contains(&store.id)
                && plan.may_come(store.id)
        });
        ready.map(move |store| {
            let near = nearness(&plan.stores, &with(&record.target, store.id, Some(from)));
            (near, plan.loads[&store.id], store.id, from)
        })
    });
    let (near, _, store, from) = swaps.min()?;
    let shard = record.shard();
    (near < now).then_some(PlannedChange::Recruit { shard, store, instead: Some(from) })
}

/// Balances primaries, one hand-over at a time: each costs its shard a few milliseconds.
pub(super) fn level_primaries(plan: &mut PlanBuilder<'_>) {
    if !plan.input.quiet || !plan.changes.is_empty() {
        return;
    }
    let at_rest = |shard: &&ShardView<'_>| shard.free && shard.record.isr == shard.record.target;
    let movable: Vec<&ShardView<'_>> = plan.input.shards.iter().filter(at_rest).collect();
    let led: BTreeMap<StoreId, usize> =
        plan.led.iter().map(|(&id, &led)| (id, led)).filter(|&(id, _)| plan.is_ready(id)).collect();
    let path = balance::path(&led, |from, to| {
        let fits = |shard: &&&ShardView<'_>| {
            shard.record.primary.store == from
                && plan.successors(shard).any(|successor| successor == to)
        };
        movable.iter().find(fits).map(|shard| shard.record.shard())
    });
    // The last step of the path comes first, since it makes room for the one before it.
    let step = path.and_then(|steps| steps.first().copied());
    plan.extend(step.map(|step| PlannedChange::HandOver { shard: step.unit, to: step.to }));
}
