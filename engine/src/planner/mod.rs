//! Where replicas and primaries should be, and the next steps towards it. Pure functions.
//!
//! DESIGN §4 and §9: an explicit map, balanced to within one replica and one primary per node, with
//! the replicas of a shard kept apart in zones (and, within them, hosts), in few moves. Where zones
//! are so uneven that both can't be had, apart comes before balanced: balance is comfort, a zone that
//! takes two replicas with it is not.
//!
//! A shard's `target` is where its replicas belong. A change of the target *is* a move: the newcomer
//! becomes a learner in the same write, joins the in-sync set, and only then is the store that it
//! stands in for let go. So redundancy never dips, and a plan that was half done when the coordinator
//! died is simply seen again by the next one.
//!
//! [`placement`] makes the first map; [`changes`] finds the next steps of a map that is alive, `vacancies` among
//! them those that make lost copies anew;
//! [`balance`] is the search that both level loads with; [`guard`] holds new copies back after a mass
//! failure.

pub mod balance;
pub mod changes;
pub mod guard;
pub mod placement;
mod vacancies;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use crate::config::{self, ShardConfig};
use crate::ids::{ShardId, StoreId};

pub use changes::{Cluster, Shard, changes};
pub use guard::Guard;
pub use placement::{Placement, place};

/// A store, as far as planning goes.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Store {
    pub id: StoreId,
    pub zone: String,
    /// Stores on one host fall together: the innermost zone.
    pub host: String,
    /// Bytes its disk holds. Decides only who takes the odd replica.
    pub capacity: u64,
    pub state: StoreState,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum StoreState {
    /// Answers, and may be given copies.
    Ready,
    /// Answers, but its key is gone from etcd: it is given nothing until it has made it again.
    Unregistered,
    /// Does not answer, and is waited for.
    Away,
    /// Answers, and its disk has no room: it is given nothing.
    Full,
    /// To lead nothing and to be given nothing, but its copies are good.
    Draining,
    /// Its copies are not to be trusted: they go as soon as the floor allows it.
    Suspect,
    /// Lost, retired, or away for too long: its places are free.
    Gone,
}

/// What rations the planner's moves.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Moves into a store, and out of one, at a time.
    pub moves_max: usize,
    /// In a cluster of fewer nodes that hold anything the guard never holds.
    pub guard_nodes_min: usize,
    /// The guard holds once more of the nodes than this are away, in percent.
    pub guard_percent_max: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { moves_max: 2, guard_nodes_min: 3, guard_percent_max: 30 }
    }
}

/// One step for one shard.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Change {
    /// The store gets a copy, or comes back to its own; in the target it takes the place of `instead`.
    Recruit { shard: ShardId, store: StoreId, instead: Option<StoreId> },
    /// The store gives its copy up.
    Release { shard: ShardId, store: StoreId },
    /// Another in-sync member is to lead. Not a change of the record: it takes a step-down and a
    /// promotion.
    HandOver { shard: ShardId, to: StoreId },
}

impl Change {
    pub fn shard(self) -> ShardId {
        match self {
            Self::Recruit { shard, .. }
            | Self::Release { shard, .. }
            | Self::HandOver { shard, .. } => shard,
        }
    }

    /// What the record becomes. Who is in sync changes only as far as the floor allows.
    pub fn apply(self, config: &ShardConfig, min_in_sync: usize) -> ShardConfig {
        match self {
            Self::Recruit { store, instead, .. } => {
                let mut next = config.changed(&[], &[], &[], min_in_sync);
                if let Some(instead) = instead {
                    config::remove(&mut next.target, instead);
                    config::remove(&mut next.learners, instead);
                }
                config::insert(&mut next.target, store);
                if !next.isr.contains(&store) {
                    config::insert(&mut next.learners, store);
                }
                next
            }
            Self::Release { store, .. } => {
                let mut next = config.changed(&[], &[store], &[], min_in_sync);
                config::remove(&mut next.learners, store);
                config::remove(&mut next.target, store);
                next
            }
            Self::HandOver { .. } => config.changed(&[], &[], &[], min_in_sync),
        }
    }
}

/// How near to each other the members of a set are: pairs in one zone, pairs on one host. Less is
/// better.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Nearness {
    zone_pairs: usize,
    host_pairs: usize,
}

/// The stores by name, for looking them up.
pub(crate) type Stores<'a> = BTreeMap<StoreId, &'a Store>;

pub(crate) fn by_id(stores: &[Store]) -> Stores<'_> {
    stores.iter().map(|store| (store.id, store)).collect()
}

/// How near one store is to the others of a set, `without` left out: the pairs that a set gains or
/// loses by it.
pub(crate) fn near_to(
    stores: &Stores<'_>,
    store: StoreId,
    set: &[StoreId],
    without: Option<StoreId>,
) -> Nearness {
    let mut near = Nearness { zone_pairs: 0, host_pairs: 0 };
    let Some(one) = stores.get(&store) else { return near };
    let others = set.iter().filter(|&&other| other != store && Some(other) != without);
    for other in others.filter_map(|id| stores.get(id)) {
        if other.zone == one.zone {
            near.zone_pairs += 1;
            near.host_pairs += usize::from(other.host == one.host);
        }
    }
    near
}

/// Stores that are not known (their record is gone) are near to nobody.
pub(crate) fn nearness(stores: &Stores<'_>, set: &[StoreId]) -> Nearness {
    let known: Vec<&Store> = set.iter().filter_map(|id| stores.get(id).copied()).collect();
    let pairs = known.iter().enumerate().flat_map(|(at, one)| {
        known[at + 1..].iter().filter(|other| other.zone == one.zone).map(|other| (*one, *other))
    });
    let mut near = Nearness { zone_pairs: 0, host_pairs: 0 };
    for (one, other) in pairs {
        near.zone_pairs += 1;
        near.host_pairs += usize::from(one.host == other.host);
    }
    near
}

/// The set with `store` in place of `instead`.
pub(crate) fn with(set: &[StoreId], store: StoreId, instead: Option<StoreId>) -> Vec<StoreId> {
    let kept = set.iter().copied().filter(|&member| Some(member) != instead && member != store);
    kept.chain([store]).collect()
}
