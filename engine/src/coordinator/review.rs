//! The reviews of a leader: what a part may touch in them besides itself.

use crate::coordinator::decision::Decision;
use crate::coordinator::observed::ObservedCluster;
use crate::coordinator::proposals::{LeaderProposals, ShardWrite};
use crate::coordinator::{CoordinatorTurn, Writes};
use crate::ids::{Now, StoreId};

/// The context of a review: the turn, the observed cluster, which is only read, and the proposals.
pub(super) struct ReviewTurn<'a> {
    pub(super) turn: CoordinatorTurn<'a>,
    pub(super) cluster: &'a ObservedCluster,
    pub(super) proposals: &'a mut LeaderProposals,
}

impl<'a> ReviewTurn<'a> {
    pub(super) fn new(
        turn: &'a mut CoordinatorTurn<'_>,
        cluster: &'a ObservedCluster,
        proposals: &'a mut LeaderProposals,
    ) -> Self {
        Self { turn: turn.reborrow(), cluster, proposals }
    }

    pub(super) fn now(&self) -> Now {
        self.turn.now
    }

    /// Returns whether the store counts as dead now.
    pub(super) fn is_dead(&self, store: StoreId) -> bool {
        self.cluster.is_dead(self.turn.now, store)
    }

    pub(super) fn propose(&mut self, writes: Writes, decisions: Vec<Decision>) {
        self.proposals.propose(&mut self.turn, writes, decisions);
    }

    /// Proposes shard records in as few transactions as possible.
    pub(super) fn propose_shards(&mut self, writes: Vec<ShardWrite>) {
        self.proposals.propose_shards(&mut self.turn, &self.cluster.records, writes);
    }
}
