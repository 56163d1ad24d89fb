//! The first placement: every shard's replicas and primary, when the cluster is created.
//!
//! The placement is greedy, then levelled. The greedy part alone keeps replicas apart and balances
//! them nearly; the levelling makes the balance exact wherever the zones allow it.

use std::collections::BTreeMap;

use crate::coordinator::planner::{Store, StoreState, Stores, balance, by_id, near_to, with};
use crate::ids::StoreId;
use crate::shard_record::ShardRecord;

/// The places of one new shard.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Placement {
    /// The store that leads the shard.
    pub primary: StoreId,
    /// The stores of its replicas, sorted; the primary is one of them.
    pub replicas: Vec<StoreId>,
}

/// Places `count` new shards beside the existing ones. Returns `None` if fewer than `replicas`
/// stores are ready.
pub fn place(
    stores: &[Store],
    existing: &[&ShardRecord],
    count: usize,
    replicas: usize,
) -> Option<Vec<Placement>> {
    let ready: Vec<Store> =
        stores.iter().filter(|store| store.state == StoreState::Ready).cloned().collect();
    if ready.len() < replicas || replicas == 0 {
        return None;
    }
    let ids = by_id(&ready);
    let mut loads = counts(&ids, existing.iter().flat_map(|record| &record.target));
    let mut co_placements = CoPlacements::default();
    existing.iter().for_each(|record| co_placements.add(&record.target));
    let mut sets: Vec<Vec<StoreId>> = Vec::with_capacity(count);
    for _ in 0..count {
        let mut set = Vec::with_capacity(replicas);
        for _ in 0..replicas {
            let chosen = emptiest(&ids, &loads, &co_placements, &set)?;
            *loads.entry(chosen).or_default() += 1;
            set.push(chosen);
        }
        co_placements.add(&set);
        sets.push(set);
    }
    level_replicas(&ids, &mut loads, &mut sets);
    let led = counts(&ids, existing.iter().map(|record| &record.primary.store));
    let primaries = primaries(led, &sets)?;
    let placement = |(mut replicas, primary): (Vec<StoreId>, StoreId)| {
        replicas.sort();
        Placement { primary, replicas }
    };
    Some(sets.into_iter().zip(primaries).map(placement).collect())
}

/// The number of times that each of the stores is named.
pub(super) fn counts<'a>(
    stores: &Stores<'_>,
    named: impl Iterator<Item = &'a StoreId>,
) -> BTreeMap<StoreId, usize> {
    let mut counts: BTreeMap<StoreId, usize> = stores.keys().map(|&id| (id, 0)).collect();
    for store in named {
        if let Some(count) = counts.get_mut(store) {
            *count += 1;
        }
    }
    counts
}

/// The number of shards that each pair of stores shares.
#[derive(Debug, Default)]
struct CoPlacements(BTreeMap<(StoreId, StoreId), usize>);

impl CoPlacements {
    fn add(&mut self, set: &[StoreId]) {
        for &one in set {
            for &other in set.iter().filter(|&&other| other != one) {
                *self.0.entry((one, other)).or_default() += 1;
            }
        }
    }

    fn with(&self, store: StoreId, set: &[StoreId]) -> usize {
        set.iter().filter_map(|&other| self.0.get(&(store, other))).sum()
    }
}

/// The best store to add to a set: apart first, then the emptiest, then the one that shares the
/// fewest shards with those chosen, then the largest.
///
/// The third criterion serves the day a store dies: what it led and held then falls to many others,
/// not to the same two that happened to be placed beside it each time.
fn emptiest(
    stores: &Stores<'_>,
    loads: &BTreeMap<StoreId, usize>,
    co_placements: &CoPlacements,
    set: &[StoreId],
) -> Option<StoreId> {
    let free = stores.values().filter(|store| !set.contains(&store.id));
    let cost = |store: &&&Store| {
        let near = near_to(stores, store.id, set, None);
        let load = loads.get(&store.id).copied().unwrap_or(0);
        let shared = co_placements.with(store.id, set);
        (near, load, shared, std::cmp::Reverse(store.capacity), store.id)
    };
    free.min_by_key(cost).map(|store| store.id)
}

fn level_replicas(
    stores: &Stores<'_>,
    loads: &mut BTreeMap<StoreId, usize>,
    sets: &mut [Vec<StoreId>],
) {
    // Each path lowers the sum of the squares of the loads, so this ends.
    loop {
        let held = held_by(sets);
        let steps = balance::path(loads, |from, to| {
            held.get(&from)?.iter().copied().find(|&at| may_swap(stores, &sets[at], from, to))
        });
        let Some(steps) = steps else { return };
        if let Some(count) = loads.get_mut(&steps[steps.len() - 1].from) {
            *count -= 1;
        }
        if let Some(count) = loads.get_mut(&steps[0].to) {
            *count += 1;
        }
        for step in steps {
            sets[step.unit] = with(&sets[step.unit], step.to, Some(step.from));
        }
    }
}

/// The sets that each store is in.
fn held_by(sets: &[Vec<StoreId>]) -> BTreeMap<StoreId, Vec<usize>> {
    let mut held: BTreeMap<StoreId, Vec<usize>> = BTreeMap::new();
    for (at, set) in sets.iter().enumerate() {
        for &store in set {
            held.entry(store).or_default().push(at);
        }
    }
    held
}

/// Returns whether `to` may take the place of `from` in the set: the set contains `from` and not
/// `to`, and stays at least as far apart.
pub(super) fn may_swap(stores: &Stores<'_>, set: &[StoreId], from: StoreId, to: StoreId) -> bool {
    if !set.contains(&from) || set.contains(&to) {
        return false;
    }
    near_to(stores, to, set, Some(from)) <= near_to(stores, from, set, None)
}

/// Chooses one primary for each set, so that no store leads more than one shard more than another,
/// as far as the sets allow it.
fn primaries(mut led: BTreeMap<StoreId, usize>, sets: &[Vec<StoreId>]) -> Option<Vec<StoreId>> {
    let mut chosen = Vec::with_capacity(sets.len());
    for set in sets {
        let primary = set.iter().copied().min_by_key(|id| (led.get(id).copied(), *id))?;
        *led.entry(primary).or_default() += 1;
        chosen.push(primary);
    }
    loop {
        let mut leads: BTreeMap<StoreId, Vec<usize>> = BTreeMap::new();
        for (at, &primary) in chosen.iter().enumerate() {
            leads.entry(primary).or_default().push(at);
        }
        let steps = balance::path(&led, |from, to| {
            leads.get(&from)?.iter().copied().find(|&at| sets[at].contains(&to))
        });
        let Some(steps) = steps else { return Some(chosen) };
        for step in steps {
            chosen[step.unit] = step.to;
            *led.entry(step.from).or_default() -= 1;
            *led.entry(step.to).or_default() += 1;
        }
    }
}
