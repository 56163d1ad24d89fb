//! The levelling of loads: replicas are moved apart and to emptier stores, and primaries are handed
//! over.

use std::collections::{BTreeMap, BTreeSet};

use crate::coordinator::planner::placement::held_by;
use crate::coordinator::planner::plan::PlanBuilder;
use crate::coordinator::planner::{
    Nearness, PlannedChange, ShardView, Store, StoreState, balance, known,
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
        let near = Nearness::of(&known(&plan.stores, &shard.record.target, None));
        if near > ideal && !plan.changed.contains(&shard.record.shard()) {
            let change = apart(plan, shard.record, near);
            plan.extend(change);
        }
    }
    let movable = shards.iter().filter(at_rest);
    let sets = movable.map(|shard| (shard.record.shard(), shard.record.target.as_slice()));
    let held = held_by(&plan.stores, sets);
    let mut dead_ends = BTreeSet::new();
    loop {
        let loads = plan.loads.iter().map(|(&id, &load)| (id, load));
        let loads = loads.filter(|&(id, _)| plan.is_ready(id)).collect();
        let path = balance::path_past(&mut dead_ends, &loads, |from, to| {
            if !plan.may_come(to) || !plan.may_go(from) {
                return None;
            }
            let (held, to) = (held.get(&from)?, plan.stores.get(&to)?);
            let is_free = |shard| !plan.changed.contains(&shard);
            let mut movable = held.iter().filter(|it| it.may_go(to) && is_free(it.unit)).peekable();
            let first = movable.peek().map(|replica| replica.unit);
            let mut peers = movable.filter(|it| it.unwanted(to, &plan.sharing) == 0);
            peers.next().map(|replica| replica.unit).or(first)
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
    Nearness::of(&known(&plan.stores, &set, None))
}

/// A move that brings the replicas of a shard further apart, if they are nearer than they need
/// be.
fn apart(plan: &PlanBuilder<'_>, record: &ShardRecord, now: Nearness) -> Option<PlannedChange> {
    let takes = |store: &&&Store| {
        store.state == StoreState::Ready
            && !record.target.contains(&store.id)
            && plan.may_come(store.id)
    };
    let ready: Vec<&Store> = plan.stores.values().filter(takes).copied().collect();
    let swaps = record.target.iter().filter(|&&from| plan.may_go(from)).flat_map(|&from| {
        let others = known(&plan.stores, &record.target, Some(from));
        let near_without = Nearness::of(&others);
        ready.iter().map(move |store| {
            let near = near_without.and(Nearness::to(store, &others));
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
    // The shards that each store leads, with the stores that could lead them as well.
    let mut shards_of: BTreeMap<StoreId, Vec<(ShardId, Vec<StoreId>)>> = BTreeMap::new();
    for shard in plan.input.shards.iter().filter(at_rest) {
        let successors = plan.successors(shard).collect();
        let led = shards_of.entry(shard.record.primary.store).or_default();
        led.push((shard.record.shard(), successors));
    }
    let led: BTreeMap<StoreId, usize> =
        plan.led.iter().map(|(&id, &led)| (id, led)).filter(|&(id, _)| plan.is_ready(id)).collect();
    let path = balance::path(&led, |from, to| {
        let mut shards = shards_of.get(&from)?.iter();
        shards.find(|(_, successors)| successors.contains(&to)).map(|&(shard, _)| shard)
    });
    // The last step of the path comes first, since it makes room for the one before it.
    let step = path.and_then(|steps| steps.first().copied());
    plan.extend(step.map(|step| PlannedChange::HandOver { shard: step.unit, to: step.to }));
}
