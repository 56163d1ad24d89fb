//! Drains that can never end: there are too few nodes for the copies, or too few zones.
//!
//! The limits on moves, a full disk or a lost copy only delay a drain. These two obstacles last
//! until a node joins, so a command asks for them before it begins.

use std::collections::BTreeSet;
use std::fmt;

use crate::coordinator::planner::{Store, StoreState};
use crate::ids::StoreId;
use crate::shard_record::ShardRecord;

/// The reason why a store can't be emptied, or only at the cost of a zone.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum DrainObstacle {
    /// Fewer other stores can take copies than each shard has.
    TooFewNodes {
        /// The number of copies of each shard.
        replicas: usize,
        /// The number of other stores that can take copies.
        others: usize,
    },
    /// Without the store, two copies of each shard would be in one zone, where none are now.
    ZoneLost {
        /// The zone of the store.
        zone: String,
    },
}

/// Returns why `drained` can't be emptied into the other stores as they are now. A store that
/// drains already, or holds nothing, is not in question.
pub fn drain_obstacle<'a>(
    stores: &[Store],
    mut shards: impl Iterator<Item = &'a ShardRecord>,
    drained: StoreId,
    replicas: usize,
) -> Option<DrainObstacle> {
    let drains = |it: &Store| it.id == drained && it.state == StoreState::Draining;
    if stores.iter().any(drains) || !shards.any(|record| record.mentions(drained)) {
        return None;
    }
    let takes = |store: &&Store| store.id != drained && store.state == StoreState::Ready;
    let others: Vec<&Store> = stores.iter().filter(takes).collect();
    if others.len() < replicas {
        return Some(DrainObstacle::TooFewNodes { replicas, others: others.len() });
    }
    let own = stores.iter().find(|store| store.id == drained);
    let zone = own.map_or("", |store| store.zone.as_str());
    let zones: BTreeSet<&str> = others.iter().map(|store| store.zone.as_str()).collect();
    let lost = zones.len() + 1 == replicas && !zones.contains(zone);
    lost.then(|| DrainObstacle::ZoneLost { zone: zone.to_owned() })
}

impl fmt::Display for DrainObstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooFewNodes { replicas, others } => write!(
                f,
                "it cannot be emptied: --replicas is {replicas}, and the number of other nodes \
                 that can hold copies is {others}: start another node first"
            ),
            Self::ZoneLost { zone } => write!(
                f,
                "no other running node is in zone {zone:?}: without it two copies of each shard \
                 would be in one zone; start a node there, or in a new zone, first"
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Checks the drain of a store in the zone `own`, beside ready stores in the zones `others`.
    #[track_caller]
    fn check(own: &str, others: &[&str], want: Option<DrainObstacle>) {
        let all = [own].into_iter().chain(others.iter().copied());
        let store = |(zone, id): (&str, u128)| Store {
            id: StoreId(id),
            zone: zone.into(),
            host: String::new(),
            capacity: 1,
            state: StoreState::Ready,
        };
        let mut stores: Vec<Store> = all.zip(1..).map(store).collect();
        let record = ShardRecord { target: vec![StoreId(1)], ..ShardRecord::default() };
        let obstacle = |stores: &[Store], shards: &[ShardRecord]| {
            drain_obstacle(stores, shards.iter(), StoreId(1), 3)
        };
        let shards = [record];
        assert_eq!(obstacle(&stores, &shards), want);
        stores.push(Store { state: StoreState::Away, ..store(("new", 99)) });
        assert_eq!(obstacle(&stores, &shards), want, "a store that is away is none");
        assert_eq!(obstacle(&stores, &[]), None, "it holds nothing");
        stores[0].state = StoreState::Draining;
        assert_eq!(obstacle(&stores, &shards), None, "it drains already");
    }

    #[test]
    fn a_drain_needs_a_node_for_each_copy_and_a_zone_if_there_are_enough() {
        let few = |others| Some(DrainObstacle::TooFewNodes { replicas: 3, others });
        check("", &["", ""], few(2));
        check("a", &["b"], few(1));
        check("", &["", "", ""], None);
        check("c", &["a", "a", "b"], Some(DrainObstacle::ZoneLost { zone: "c".into() }));
        check("c", &["a", "b", "c"], None);
        // Copies share a zone already, or there are zones to spare.
        check("b", &["a", "a", "a"], None);
        check("d", &["a", "b", "c"], None);
    }
}
