//! The planner: where replicas and primaries should be, and the next steps towards that. Pure
//! functions.
//!
//! The placement is an explicit map, balanced to within one replica and one primary per node, with
//! the replicas of a shard kept apart in zones (and, within them, hosts), in few moves. Where zones
//! are so uneven that both can't be had, apart comes before balanced: imbalance costs some
//! throughput, a zone that takes two replicas with it costs availability.
//!
//! A shard's `target` is where its replicas belong. A change of the target *is* a move: the new
//! store becomes a learner in the same write, joins the in-sync set, and only then is the store
//! that it replaces released. So redundancy never drops, and a plan that was half done when the
//! coordinator died is simply found again by the next one.
//!
//! [`placement`] makes the first map; [`changes`] finds the next steps of a map in use, `vacancies`
//! among them those that replace lost copies, and `levelling` those that level loads; they add them
//! to one `plan`. [`balance`] is the search by which all of them level loads; [`guard`] holds new
//! copies back after a mass failure, [`drains`] names what no plan can do, and [`forecast`] lists
//! all moves to come.

pub mod balance;
pub mod changes;
pub mod drains;
pub mod forecast;
pub mod guard;
mod levelling;
pub mod placement;
mod plan;
mod sharing;
mod vacancies;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use crate::ids::{ShardId, StoreId};
use crate::shard_record::{self, ShardRecord};

pub use changes::changes;
pub use drains::{DrainObstacle, drain_obstacle};
pub use forecast::{
    MoveKind, MoveReason, MoveState, OwnedShardView, PlanForecast, PlanView, PlannedMove,
};
pub use guard::MassFailureGuard;
pub use placement::{Placement, place};
pub use plan::{PlannerInput, ShardView};

/// A store, as far as the planner is concerned.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Store {
    /// The store's id.
    pub id: StoreId,
    /// The zone of the store; stores of one zone may fail together.
    pub zone: String,
    /// The host of the store, the innermost zone: stores on one host fail together.
    pub host: String,
    /// The size of its disk in bytes, which only decides which store takes the odd replica.
    pub capacity: u64,
    /// The store's state.
    pub state: StoreState,
}

/// The state of a store, which decides what it may be used for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum StoreState {
    /// The store answers, and may get copies.
    Ready,
    /// The store answers, but its key is gone from etcd: it gets nothing until the key is back.
    Unregistered,
    /// The store does not answer, and its return is waited for.
    Away,
    /// The store answers, but its disk is full: it gets nothing.
    Full,
    /// The store is to be emptied: it gets nothing and leads nothing, but its copies are good.
    Draining,
    /// The store's copies are not trusted: they are released as soon as `min_in_sync` allows it.
    Suspect,
    /// The store is lost, retired, or away for too long: its places are free.
    Gone,
}

/// The limits of the planner's moves.
#[derive(Clone, Copy, Debug)]
pub struct PlannerLimits {
    /// The number of concurrent moves into a store, and out of one.
    pub moves_max: usize,
    /// In a cluster of fewer nodes that hold anything the guard never holds.
    pub guard_nodes_min: usize,
    /// The guard holds when more than this percentage of the nodes is away.
    pub guard_percent_max: usize,
    /// From this number of stores on, a store has few peers (see [`sharing`]).
    pub copyset_nodes_min: usize,
    /// A store that has this number of peers gets another only if balance or zones ask for it.
    pub copyset_peers: usize,
}

impl Default for PlannerLimits {
    fn default() -> Self {
        Self {
            moves_max: 2,
            guard_nodes_min: 3,
            guard_percent_max: 30,
            copyset_nodes_min: 50,
            copyset_peers: 12,
        }
    }
}

/// One step for one shard.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum PlannedChange {
    /// The store gets a copy, or comes back to its own.
    Recruit {
        /// The shard.
        shard: ShardId,
        /// The store that becomes a learner.
        store: StoreId,
        /// The store whose place in the target it takes.
        instead: Option<StoreId>,
    },
    /// The store gives up its copy.
    Release {
        /// The shard.
        shard: ShardId,
        /// The store that leaves it.
        store: StoreId,
    },
    /// Another in-sync member becomes primary. The record does not change by this alone: it takes a
    /// step-down and a promotion.
    HandOver {
        /// The shard.
        shard: ShardId,
        /// The next primary.
        to: StoreId,
    },
}

impl PlannedChange {
    /// The shard that changes.
    pub fn shard(self) -> ShardId {
        match self {
            Self::Recruit { shard, .. }
            | Self::Release { shard, .. }
            | Self::HandOver { shard, .. } => shard,
        }
    }

    /// The record after the change. The in-sync set changes only as far as `min_in_sync` allows.
    pub fn apply(self, record: &ShardRecord, min_in_sync: usize) -> ShardRecord {
        match self {
            Self::Recruit { store, instead, .. } => {
                let mut next = record.changed(&[], &[], &[], min_in_sync);
                if let Some(instead) = instead {
                    shard_record::remove(&mut next.target, instead);
                    shard_record::remove(&mut next.learners, instead);
                }
                shard_record::insert(&mut next.target, store);
                if !next.isr.contains(&store) {
                    shard_record::insert(&mut next.learners, store);
                }
                next
            }
            Self::Release { store, .. } => {
                let mut next = record.changed(&[], &[store], &[], min_in_sync);
                shard_record::remove(&mut next.learners, store);
                shard_record::remove(&mut next.target, store);
                next
            }
            Self::HandOver { .. } => record.changed(&[], &[], &[], min_in_sync),
        }
    }
}

/// The nearness of the members of a set: pairs in one zone, then pairs on one host. Less is better.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Nearness {
    zone_pairs: usize,
    host_pairs: usize,
}

/// The stores by id.
pub(crate) type Stores<'a> = BTreeMap<StoreId, &'a Store>;

pub(crate) fn by_id(stores: &[Store]) -> Stores<'_> {
    stores.iter().map(|store| (store.id, store)).collect()
}

/// The stores of a set, `without` left out. A store without a record is near to no other.
pub(crate) fn known<'a>(
    stores: &Stores<'a>,
    set: &[StoreId],
    without: Option<StoreId>,
) -> Vec<&'a Store> {
    let kept = set.iter().filter(|&&store| Some(store) != without);
    kept.filter_map(|store| stores.get(store).copied()).collect()
}

impl Nearness {
    const NONE: Self = Self { zone_pairs: 0, host_pairs: 0 };

    /// Returns whether two members share a zone.
    pub(crate) fn shares_zone(self) -> bool {
        self.zone_pairs > 0
    }

    /// The nearness of one store to others: the pairs that a set gains or loses by it.
    pub(crate) fn to(one: &Store, others: &[&Store]) -> Self {
        let mut near = Self::NONE;
        for other in others.iter().filter(|other| other.id != one.id && other.zone == one.zone) {
            near.zone_pairs += 1;
            near.host_pairs += usize::from(other.host == one.host);
        }
        near
    }

    /// The nearness of the members of a set.
    pub(crate) fn of(set: &[&Store]) -> Self {
        let mut near = Self::NONE;
        for (at, one) in set.iter().enumerate() {
            near = near.and(Self::to(one, &set[at + 1..]));
        }
        near
    }

    /// The sum of both.
    pub(crate) fn and(self, other: Self) -> Self {
        Self {
            zone_pairs: self.zone_pairs + other.zone_pairs,
            host_pairs: self.host_pairs + other.host_pairs,
        }
    }
}

/// The set with `store` in place of `instead`.
pub(crate) fn with(set: &[StoreId], store: StoreId, instead: Option<StoreId>) -> Vec<StoreId> {
    let kept = set.iter().copied().filter(|&member| Some(member) != instead && member != store);
    kept.chain([store]).collect()
}
