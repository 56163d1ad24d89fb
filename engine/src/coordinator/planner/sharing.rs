//! The pairs of stores that share shards, and copysets: in large clusters a store has few peers.
//!
//! When a store dies, what it led and held falls to its peers, so in a small cluster these are to
//! be all the others alike. In a large one many peers cost more than they give. Every pair of
//! stores exchanges messages of its own, so the cost of a batch and of an idle node grows with the
//! peers; and the more different sets of stores hold a shard, the more likely is it that a few
//! that fail together hold all copies of one. So from [`PlannerLimits::copyset_nodes_min`] stores
//! on, a store that has [`PlannerLimits::copyset_peers`] peers gets another only if balance or
//! zones ask for it. (Cidon et al., "Copysets: Reducing the Frequency of Data Loss in Cloud
//! Storage", USENIX ATC 2013, where the number of peers is called the scatter width.)

use std::collections::BTreeMap;

use crate::coordinator::planner::{PlannerLimits, StoreState, Stores};
use crate::ids::StoreId;

/// The number of shards that each pair of stores shares.
#[derive(Clone, Debug)]
pub(super) struct Sharing {
    /// The place of each store in the table.
    places: BTreeMap<StoreId, usize>,
    /// One row for each store.
    shards: Vec<u32>,
    /// The number of peers of each store.
    peers: Vec<usize>,
    /// The number of peers from which on a store should get no more; `None` in a small cluster.
    peers_wanted: Option<usize>,
}

/// The cost of a store in a set, as far as its peers matter. Less is better.
#[derive(Clone, Copy, Debug, Default, Eq, Ord, PartialEq, PartialOrd)]
pub(super) struct PeerCost {
    /// The pairs that would be new although one of the two has enough peers.
    unwanted: usize,
    /// The shards that the store shares with the set already.
    shared: u32,
}

impl Sharing {
    /// The pairs of the stores that are not gone: the records of those stay for ever.
    pub(super) fn of(stores: &Stores<'_>, limits: &PlannerLimits) -> Self {
        let present = stores.values().filter(|store| store.state != StoreState::Gone);
        let places: BTreeMap<_, _> = present.map(|store| store.id).zip(0..).collect();
        let count = places.len();
        let is_large = count >= limits.copyset_nodes_min;
        Self {
            places,
            shards: vec![0; count * count],
            peers: vec![0; count],
            peers_wanted: is_large.then_some(limits.copyset_peers),
        }
    }

    /// Adds a shard on these stores.
    pub(super) fn add(&mut self, set: &[StoreId]) {
        let places: Vec<_> = set.iter().filter_map(|store| self.places.get(store)).collect();
        for &one in &places {
            for &other in places.iter().filter(|other| **other != one) {
                let shards = &mut self.shards[one * self.places.len() + other];
                self.peers[*one] += usize::from(*shards == 0);
                *shards += 1;
            }
        }
    }

    /// The cost of each store beside those of a set, in the order of the stores.
    pub(super) fn with(&self, set: &[StoreId]) -> Vec<PeerCost> {
        let mut costs = vec![PeerCost::default(); self.places.len()];
        for &at in set.iter().filter_map(|store| self.places.get(store)) {
            let row = &self.shards[at * costs.len()..][..costs.len()];
            for (other, (cost, &shards)) in costs.iter_mut().zip(row).enumerate() {
                cost.unwanted += usize::from(shards == 0 && self.is_unwanted(at, other));
                cost.shared += shards;
            }
        }
        costs
    }

    /// The pairs that would be new, although one of the two has enough peers, if the store joined
    /// this set.
    pub(super) fn unwanted(&self, store: StoreId, set: impl Iterator<Item = StoreId>) -> usize {
        let Some(&one) = self.places.get(&store).filter(|_| self.is_large()) else { return 0 };
        let others = set.filter_map(|other| self.places.get(&other)).copied();
        let row = &self.shards[one * self.places.len()..];
        others.filter(|&other| row[other] == 0 && self.is_unwanted(one, other)).count()
    }

    /// Returns whether stores should have few peers.
    pub(super) fn is_large(&self) -> bool {
        self.peers_wanted.is_some()
    }

    fn is_unwanted(&self, one: usize, other: usize) -> bool {
        self.peers_wanted.is_some_and(|wanted| self.peers[one].max(self.peers[other]) >= wanted)
    }
}
