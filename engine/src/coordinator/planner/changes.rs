//! The next steps of a map in use: missing copies, superfluous copies, uneven loads.
//!
//! The steps are found in order of urgency, one change per shard and plan. Two kinds are never held
//! back, neither by the mass-failure guard nor by the limits on moves: members that come back to
//! their own copies, and a learner for a shard that has only `min_in_sync` members and waits for
//! one that can't acknowledge. Everything else makes *new* copies, or moves them, and is limited.

use crate::coordinator::planner::levelling::{level_primaries, level_replicas};
use crate::coordinator::planner::plan::{PlanBuilder, holds};
use crate::coordinator::planner::vacancies::rebuild;
use crate::coordinator::planner::{PlannedChange, PlannerInput, ShardView, StoreState};
use crate::ids::StoreId;

/// The next changes, at most one for each shard.
pub fn changes(input: &PlannerInput<'_>) -> Vec<PlannedChange> {
    let mut plan = PlanBuilder::new(input);
    plan.each(|plan, shard| {
        returns(plan, shard).or_else(|| swap_at_floor(plan, shard)).or_else(|| adopt(plan, shard))
    });
    rebuild(&mut plan);
    plan.each(|plan, shard| {
        release(plan, shard).or_else(|| leave(plan, shard)).or_else(|| empty(plan, shard))
    });
    // A move that has begun is carried on, also while these are paused.
    if !input.paused {
        level_replicas(&mut plan);
        level_primaries(&mut plan);
    }
    plan.changes
}

/// A replica that was removed from the in-sync set and is back: its copy is brought up to date.
fn returns(plan: &PlanBuilder<'_>, shard: &ShardView<'_>) -> Option<PlannedChange> {
    let record = shard.record;
    let returns = |&&store: &&StoreId| {
        let there = record.isr.contains(&store) || record.learners.contains(&store);
        !there && matches!(plan.state(store), StoreState::Ready | StoreState::Draining)
    };
    let store = *record.target.iter().find(returns)?;
    Some(PlannedChange::Recruit { shard: record.shard(), store, instead: None })
}

/// A learner in place of a member that can't acknowledge. With only `min_in_sync` members, such
/// a member blocks every commit, so the learner is needed at once; with fewer members, too.
fn swap_at_floor(plan: &PlanBuilder<'_>, shard: &ShardView<'_>) -> Option<PlannedChange> {
    let record = shard.record;
    let unable = |store: StoreId| plan.is_unable(shard, store);
    let at_floor = record.room(plan.input.min_in_sync) == 0;
    let below = record.isr.len() < plan.input.min_in_sync;
    let stuck = at_floor && record.isr.iter().any(|&store| unable(store)) || below;
    let helped = record.learners.iter().any(|&store| !unable(store));
    if !stuck || helped {
        return None;
    }
    let kept: Vec<StoreId> = record.isr.iter().copied().filter(|&store| !unable(store)).collect();
    let store = plan.best(&kept, |store| !holds(record, store) && !unable(store))?;
    // One of the unable stores gives its place up, preferably one that is not in sync.
    let instead = || {
        let gone = record.target.iter().copied().filter(|&store| unable(store));
        gone.min_by_key(|store| (record.isr.contains(store), *store))
    };
    let full = record.target.len() >= plan.input.replicas;
    let instead = if full { Some(instead()?) } else { None };
    Some(PlannedChange::Recruit { shard: record.shard(), store, instead })
}

/// A member that is not in the target is taken into it: nothing needs to be copied where a copy
/// exists.
fn adopt(plan: &PlanBuilder<'_>, shard: &ShardView<'_>) -> Option<PlannedChange> {
    let record = shard.record;
    let instead = plan.vacancy(record)?;
    let held = |store| holds(record, store) && !record.target.contains(&store);
    let store = plan.best(&plan.kept(record), held)?;
    Some(PlannedChange::Recruit { shard: record.shard(), store, instead })
}

/// The release of a copy that is no longer wanted: once all that are wanted are in sync, or
/// there are too many.
fn release(plan: &PlanBuilder<'_>, shard: &ShardView<'_>) -> Option<PlannedChange> {
    let record = shard.record;
    let release = |store| Some(PlannedChange::Release { shard: record.shard(), store });
    let unwanted =
        |&&store: &&StoreId| !record.isr.contains(&store) && !record.target.contains(&store);
    if let Some(&store) = record.learners.iter().find(unwanted) {
        return release(store);
    }
    let idle = |&&store: &&StoreId| {
        plan.state(store) == StoreState::Suspect && !record.isr.contains(&store)
    };
    if let Some(&store) = record.target.iter().chain(&record.learners).find(idle) {
        return release(store);
    }
    // No store can be recruited in its place, and it would never be in sync. (While the guard
    // holds, it may be back soon.)
    let lost = |&&store: &&StoreId| plan.state(store) == StoreState::Gone;
    if let Some(&store) = record.learners.iter().find(lost)
        && !plan.input.hold
    {
        return release(store);
    }
    let room = record.room(plan.input.min_in_sync) > 0;
    let others = || record.isr.iter().copied().filter(|&store| store != record.primary.store);
    if let Some(store) = others().find(|&store| plan.state(store) == StoreState::Suspect)
        && room
    {
        return release(store);
    }
    let whole = record.target.len() >= plan.input.replicas
        && record.target.iter().all(|store| record.isr.contains(store));
    let many = record.isr.len() > plan.input.replicas;
    let extra = others().filter(|store| !record.target.contains(store));
    let extra = extra.min_by_key(|&store| (plan.answers(store), store))?;
    if (whole || many) && room { release(extra) } else { None }
}

/// A hand-over, if the primary is on a store that should lead no more, that takes no writes, or
/// whose copy is to be released.
fn leave(plan: &PlanBuilder<'_>, shard: &ShardView<'_>) -> Option<PlannedChange> {
    let record = shard.record;
    let primary = record.primary.store;
    let unwanted = !record.target.contains(&primary)
        && record.target.iter().all(|store| record.isr.contains(store));
    let leaves = match plan.state(primary) {
        StoreState::Draining | StoreState::Suspect | StoreState::Gone => true,
        // With too few members that can write, any other primary would refuse writes, too.
        StoreState::Full => {
            let able = record.isr.iter().filter(|&&store| !plan.is_unable(shard, store));
            able.count() >= plan.input.min_in_sync
        }
        StoreState::Ready | StoreState::Away | StoreState::Unregistered => false,
    };
    if !leaves && !unwanted {
        return None;
    }
    let to = plan.successors(shard).min_by_key(|store| (plan.led.get(store), *store))?;
    Some(PlannedChange::HandOver { shard: record.shard(), to })
}

/// The move of a copy off a store that drains, if there is another store for it. The copy stays
/// until the new one is in sync.
fn empty(plan: &PlanBuilder<'_>, shard: &ShardView<'_>) -> Option<PlannedChange> {
    let record = shard.record;
    if plan.input.hold || !record.learners.is_empty() {
        return None;
    }
    let drains = |&store: &StoreId| plan.state(store) == StoreState::Draining && plan.may_go(store);
    let instead = record.target.iter().copied().find(drains)?;
    let kept: Vec<StoreId> =
        record.target.iter().copied().filter(|&store| store != instead).collect();
    let store = plan.best(&kept, |store| !record.mentions(store))?;
    let change = PlannedChange::Recruit { shard: record.shard(), store, instead: Some(instead) };
    // The best store may have to take other copies first. A fuller one would only have to give
    // this one away again.
    plan.may_come(store).then_some(change)
}
