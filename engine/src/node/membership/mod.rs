//! The membership of shards: which replicas there are, which of them are in sync, and whether this
//! node leads.
//!
//! [`records`] follows what etcd has decided; [`in_sync_set`] decides, as the primary, about the
//! in-sync set; [`replica_health`] judges which replicas can acknowledge.

mod backoff;
mod in_sync_set;
mod records;
mod replica_health;
mod splits;

use std::collections::BTreeMap;

use crate::ids::{Now, ShardId};
use crate::node::event::CasOutcome;
use crate::node::peers::Peers;
use crate::node::shared::NodeTurn;
use crate::node::snapshots::Snapshots;
use crate::planted::Planted;
use crate::shard_record::ShardRecord;

pub(super) use in_sync_set::review_by_clock;
pub(super) use records::{follow_known_record, follow_records_in, on_record};
pub(super) use replica_health::HealthView;
pub(super) use splits::order_split;

#[derive(Clone, Debug)]
pub(super) struct Membership {
    /// Proposals in flight.
    proposals: BTreeMap<u64, ShardId>,
    /// The first records of right children that are proposed with their parents.
    children: BTreeMap<u64, ShardRecord>,
    backoff: backoff::Backoff,
    next_copy_recheck: Now,
}

impl Membership {
    /// Creates the membership of a node at its start.
    pub(in crate::node) fn new(now: Now, copy_recheck_ms: u64) -> Self {
        Self {
            proposals: BTreeMap::new(),
            children: BTreeMap::new(),
            backoff: backoff::Backoff::default(),
            next_copy_recheck: now.plus_ms(copy_recheck_ms),
        }
    }

    /// Handles the outcome of a proposal. Only a record with a higher version settles anything: a
    /// failed compare does not, since an earlier proposal of this very primary may be what moved
    /// the version.
    pub(in crate::node) fn on_proposed(
        &mut self,
        turn: &mut NodeTurn<'_>,
        peers: &mut Peers,
        snapshots: &mut Snapshots,
        id: u64,
        outcome: CasOutcome,
    ) {
        let Some(shard) = self.proposals.remove(&id) else { return };
        let child = self.children.remove(&id);
        if turn.shards.fence.is_some() {
            return; // The additions of the proposal count for as long as this process leads.
        }
        let failure_settles = turn.planted(Planted::FailureSettles);
        let retry_at = turn.now.plus_ms(turn.settings.timing.propose_again_ms);
        let Some(primary) = turn.shards.primary_mut(shard) else { return };
        let Some(proposal) = primary.proposals.iter_mut().find(|proposal| proposal.id == id) else {
            return;
        };
        proposal.pending = false;
        primary.propose_after = retry_at;
        match outcome {
            CasOutcome::Done { mod_revision } => {
                let record = proposal.record.clone();
                // A store that knows the record of the left child knows that of the right one.
                if let Some(child) = child {
                    on_record(turn, peers, snapshots, child, mod_revision, None);
                }
                on_record(turn, peers, snapshots, record, mod_revision, None);
            }
            CasOutcome::Failed | CasOutcome::Unknown => {
                if outcome == CasOutcome::Failed && failure_settles {
                    primary.proposals.clear();
                }
                turn.read_record(shard);
                if let Some(child) = child {
                    turn.read_record(child.shard());
                }
            }
        }
    }

    /// Reads the records of copies that etcd does not assign to this store. Such a copy is deleted
    /// once a read of etcd confirms it. That read may be lost, or be answered while the copy is
    /// being replaced, and a record that does not change causes no other event: so the read is
    /// repeated until the copy is gone.
    pub(in crate::node) fn recheck_unassigned_copies(&mut self, turn: &mut NodeTurn<'_>) {
        if turn.now < self.next_copy_recheck {
            return;
        }
        self.next_copy_recheck = turn.now.plus_ms(turn.settings.timing.copy_recheck_ms);
        let store = turn.me.store;
        let is_left = |shard: &ShardId| {
            let record = turn.shards.records.get(shard);
            record.is_some_and(|record| !record.0.mentions(store))
        };
        let held = turn.shards.iter().filter(|replica| replica.trust.exists());
        let left: Vec<ShardId> = held.map(|replica| replica.shard).filter(is_left).collect();
        for shard in left {
            turn.read_record(shard);
        }
    }
}
