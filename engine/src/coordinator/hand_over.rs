//! Hand-overs: a primary is asked to step down for another member, which is promoted then.

use std::collections::BTreeMap;

use crate::coordinator::observed::ObservedCluster;
use crate::coordinator::{CoordinatorTurn, Effect};
use crate::ids::{Epoch, Now, ShardId, StoreId};
use crate::shard_record::ShardRecord;

/// The hand-overs in progress.
#[derive(Debug, Default)]
pub(super) struct HandOvers(BTreeMap<ShardId, PendingHandOver>);

/// A primary that was asked to step down.
#[derive(Debug)]
struct PendingHandOver {
    to: StoreId,
    epoch: Epoch,
    until: Now,
    stepped_down: bool,
}

impl HandOvers {
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn contain(&self, shard: ShardId) -> bool {
        self.0.contains_key(&shard)
    }

    /// The store that the shard is handed over to.
    pub(super) fn to(&self, shard: ShardId) -> Option<StoreId> {
        self.0.get(&shard).map(|handing| handing.to)
    }

    pub(super) fn has_stepped_down(&self, shard: ShardId) -> bool {
        self.0.get(&shard).is_some_and(|handing| handing.stepped_down)
    }

    /// Asks the primary to step down for another member.
    pub(super) fn begin(
        &mut self,
        turn: &mut CoordinatorTurn<'_>,
        record: &ShardRecord,
        to: StoreId,
    ) {
        let (shard, epoch) = (record.shard(), record.epoch);
        let until = turn.now.plus_ms(turn.settings.timing.hand_over_ms);
        self.0.insert(shard, PendingHandOver { to, epoch, until, stepped_down: false });
        turn.effects.push(Effect::StepDown { to: record.primary, shard, epoch });
    }

    /// Takes a primary's answer. Returns whether it is about a hand-over in progress, which has
    /// ended if the primary has not stepped down.
    pub(super) fn on_stepped_down(
        &mut self,
        shard: ShardId,
        epoch: Epoch,
        stepped_down: bool,
    ) -> bool {
        let Some(handing) = self.0.get_mut(&shard).filter(|handing| handing.epoch == epoch) else {
            return false;
        };
        match stepped_down {
            true => handing.stepped_down = true,
            false => _ = self.0.remove(&shard),
        }
        true
    }

    /// Ends those that have taken too long, or whose epoch is over.
    pub(super) fn drop_ended(&mut self, now: Now, cluster: &ObservedCluster) {
        self.0.retain(|&shard, handing| {
            let epoch = cluster.shard(shard).map(|record| record.epoch);
            now < handing.until && epoch == Some(handing.epoch)
        });
    }
}
