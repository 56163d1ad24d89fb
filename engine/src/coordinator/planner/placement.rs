//! The first placement: every shard's replicas and primary, when the cluster is created.
//!
//! The placement is greedy, then levelled. The greedy part alone keeps replicas apart and balances
//! them nearly; the levelling makes the balance exact wherever the zones allow it.

use std::collections::BTreeMap;

use crate::coordinator::planner::sharing::{PeerCost, Sharing};
use crate::coordinator::planner::{
    Nearness, PlannerLimits, Store, StoreState, Stores, balance, by_id, known, with,
};
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
    limits: &PlannerLimits,
) -> Option<Vec<Placement>> {
    let ready: Vec<Store> =
        stores.iter().filter(|store| store.state == StoreState::Ready).cloned().collect();
    if ready.len() < replicas || replicas == 0 {
        return None;
    }
    let ids = by_id(&ready);
    let mut loads = counts(&ids, existing.iter().flat_map(|record| &record.target));
    let mut sharing = Sharing::of(&ids, limits);
    existing.iter().for_each(|record| sharing.add(&record.target));
    let mut sets: Vec<Vec<StoreId>> = Vec::with_capacity(count);
    for _ in 0..count {
        let mut set = Vec::with_capacity(replicas);
        for _ in 0..replicas {
            let chosen = emptiest(&ids, &loads, &sharing, &set)?;
            *loads.entry(chosen).or_default() += 1;
            set.push(chosen);
        }
        sharing.add(&set);
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

/// The best store to add to a set: apart first, then the emptiest, then the one whose peers those
/// chosen should be, then the largest.
///
/// The third criterion serves the day a store dies (see [`Sharing`]): in a small cluster, what it
/// led and held then falls to many others, not to the same two that happened to be placed beside it
/// each time.
fn emptiest(
    stores: &Stores<'_>,
    loads: &BTreeMap<StoreId, usize>,
    sharing: &Sharing,
    set: &[StoreId],
) -> Option<StoreId> {
    let chosen = known(stores, set, None);
    let each = stores.values().zip(loads.values()).zip(sharing.with(set));
    let free = each.filter(|((store, _), _)| !set.contains(&store.id));
    let cost = |((store, load), peers): &((&&Store, &usize), PeerCost)| {
        let near = Nearness::to(store, &chosen);
        (near, **load, *peers, std::cmp::Reverse(store.capacity), store.id)
    };
    free.min_by_key(cost).map(|((store, _), _)| store.id)
}

fn level_replicas(
    stores: &Stores<'_>,
    loads: &mut BTreeMap<StoreId, usize>,
    sets: &mut [Vec<StoreId>],
) {
    // Each path lowers the sum of the squares of the loads, so this ends.
    loop {
        let held = held_by(stores, sets.iter().map(Vec::as_slice).enumerate());
        let steps = balance::path(loads, |from, to| {
            let to = stores.get(&to)?;
            held.get(&from)?.iter().find(|replica| replica.may_go(to)).map(|replica| replica.unit)
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

/// A replica, as far as its move matters.
pub(super) struct HeldReplica<'a, T> {
    /// The set of replicas that it is in.
    pub(super) unit: T,
    /// The other stores of the set.
    others: Vec<&'a Store>,
    /// The nearness of its store to them.
    near: Nearness,
}

impl<T> HeldReplica<'_, T> {
    /// The new pairs of peers, of those that are not wanted, if it goes to this store.
    pub(super) fn unwanted(&self, to: &Store, sharing: &Sharing) -> usize {
        sharing.unwanted(to.id, self.others.iter().map(|store| store.id))
    }

    /// Returns whether it may go to this store: the set does not contain that, and stays at least
    /// as far apart.
    pub(super) fn may_go(&self, to: &Store) -> bool {
        self.others.iter().all(|other| other.id != to.id)
            && Nearness::to(to, &self.others) <= self.near
    }
}

/// The replicas that each store holds, in the order of the sets.
pub(super) fn held_by<'a, 's, T: Copy>(
    stores: &Stores<'a>,
    sets: impl Iterator<Item = (T, &'s [StoreId])>,
) -> BTreeMap<StoreId, Vec<HeldReplica<'a, T>>> {
    let mut held: BTreeMap<StoreId, Vec<_>> = BTreeMap::new();
    for (unit, set) in sets {
        for &id in set {
            let others = known(stores, set, Some(id));
            let near = stores.get(&id).map_or(Nearness::NONE, |one| Nearness::to(one, &others));
            held.entry(id).or_default().push(HeldReplica { unit, others, near });
        }
    }
    held
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
