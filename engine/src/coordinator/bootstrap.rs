//! The creation of the cluster: its settings, and the first placement of its shards.

use crate::batcher::shard_map::ranges;
use crate::coordinator::decision::{Decision, PlacementWait};
use crate::coordinator::observed::ObservedCluster;
use crate::coordinator::planner::{self, Placement, StoreState};
use crate::coordinator::promotion::Promotions;
use crate::coordinator::proposals::ShardWrite;
use crate::coordinator::review::ReviewTurn;
use crate::coordinator::{CoordinatorTurn, Effect, Writes};
use crate::ids::{Epoch, Now, Slots, Version};
use crate::records::Meta;
use crate::shard_record::ShardRecord;

/// The wait for nodes before shards are placed.
#[derive(Debug, Default)]
pub(super) struct ClusterBootstrap {
    /// The nodes that the first placement waits for.
    waits: Option<PlacementWait>,
    /// The time at which a node was last registered.
    last_join: Now,
}

/// Returns whether the cluster agrees with this process's flags; if not, the process exits.
pub(super) fn agrees(turn: &mut CoordinatorTurn<'_>, cluster: &ObservedCluster) -> bool {
    let difference = cluster.meta().and_then(|meta| turn.settings.flags.difference(meta));
    let Some(difference) = difference else { return true };
    turn.effects.push(Effect::Exit(difference));
    false
}

impl ClusterBootstrap {
    pub(super) fn waits_for(&self) -> Option<PlacementWait> {
        self.waits
    }

    pub(super) fn node_joined(&mut self, now: Now) {
        self.last_join = now;
    }

    /// Proposes the cluster's settings, and then places the shards that are missing.
    pub(super) fn review(&mut self, review: &mut ReviewTurn<'_>, promotions: &Promotions) {
        let Some(meta) = review.cluster.meta() else {
            if !review.proposals.is_proposing(|writes| matches!(writes, Writes::Meta(_))) {
                review.propose(Writes::Meta(review.turn.settings.meta()), vec![]);
            }
            return;
        };
        let missing: Vec<Slots> = ranges(meta.shards)
            .filter(|slots| review.cluster.shard(slots.shard()).is_none())
            .filter(|slots| !promotions.is_busy(review.proposals, slots.shard()))
            .collect();
        if missing.is_empty() {
            self.waits = None;
        } else {
            self.place(review, meta, &missing);
        }
    }

    fn place(&mut self, review: &mut ReviewTurn<'_>, meta: &Meta, missing: &[Slots]) {
        let (cluster, settings) = (review.cluster, review.turn.settings);
        let stores = cluster.stores(&review.turn);
        let nodes = stores.iter().filter(|store| store.state == StoreState::Ready).count();
        let replicas = usize::from(meta.replicas);
        let expected = settings.expect_nodes.map_or(replicas, |nodes| nodes as usize);
        let all_here = settings.expect_nodes.is_some() && nodes >= expected;
        let quiet = review.now() >= self.last_join.plus_ms(settings.join_wait_ms);
        if nodes < replicas || !(all_here || quiet) {
            let waits = PlacementWait { nodes, of: expected.max(replicas) };
            if self.waits.replace(waits) != Some(waits) {
                review.turn.log(Decision::PlacementWaits(waits));
            }
            return;
        }
        let existing: Vec<&ShardRecord> = cluster.shards().collect();
        let limits = &settings.planner;
        let placed = planner::place(&stores, &existing, missing.len(), replicas, limits);
        let Some(placed) = placed else { return };
        let records = missing.iter().zip(placed);
        let record = |(&slots, placement)| first_record(cluster, slots, placement);
        let records: Option<Vec<ShardRecord>> = records.map(record).collect();
        let Some(records) = records else { return };
        let write = |record| ShardWrite { record, decision: None };
        let mut writes: Vec<ShardWrite> = records.into_iter().map(write).collect();
        if let Some(first) = writes.first_mut() {
            first.decision = Some(Decision::Placed { shards: missing.len() });
        }
        self.waits = None;
        review.propose_shards(writes);
    }
}

fn first_record(
    cluster: &ObservedCluster,
    slots: Slots,
    placement: Placement,
) -> Option<ShardRecord> {
    Some(ShardRecord {
        slots,
        epoch: Epoch(1),
        version: Version(1),
        primary: cluster.health.alive(placement.primary)?,
        isr: placement.replicas.clone(),
        learners: vec![],
        target: placement.replicas,
        tainted: vec![],
    })
}
