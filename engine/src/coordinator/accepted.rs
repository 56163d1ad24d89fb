//! Promotions with a loss: a copy leads although something acknowledged may be missing in it.
//!
//! There are two ways there, and both leave a record for good, in the transaction that begins the epoch:
//!
//! * An operator asks for it. The intent names the version of the shard's record that it was decided on, so an intent that
//!   comes late, or after a better copy came back, means nothing. It is obeyed only where no copy may lead by itself, and
//!   once its store has answered; the transaction ends it.
//! * Every member of the in-sync set that is trusted and not given up has answered, and the copies of all are damaged:
//!   there is nothing to wait for.
//!
//! Every other member becomes tainted: when it returns it is filled from the new primary, whatever it holds, and it leads
//! nothing before.

use crate::config::{self, ShardConfig};
use crate::coordinator::choice::promoted;
use crate::coordinator::office::Office;
use crate::coordinator::promotion::Round;
use crate::coordinator::story::Story;
use crate::coordinator::{Accepted, Kept, Turn, Writes};
use crate::ids::{Epoch, Seq, ShardId, StoreBoot, StoreId};
use crate::planted::Planted;
use crate::records::{LossRecord, PromoteIntent};

/// What stands behind a promotion with a loss.
#[derive(Debug)]
pub(super) enum Grounds {
    Intent(Kept<PromoteIntent>),
    AllDamaged,
}

impl Office {
    /// The process that an operator wants to lead, having seen this very record.
    pub(super) fn wanted(
        &self,
        turn: &Turn<'_>,
        config: &ShardConfig,
    ) -> Option<(&Kept<PromoteIntent>, StoreBoot)> {
        let kept = self.records.promotes.get(config.shard())?;
        let blind = Planted::IntentOfAnyRecord.is_in(turn.settings.planted);
        let meant = kept.value.version == config.version || blind;
        meant.then_some(kept).zip(self.health.alive(kept.value.store))
    }

    /// Proposes that this process leads, and records what is given up with that.
    pub(super) fn accept_loss(
        &mut self,
        turn: &mut Turn<'_>,
        shard: ShardId,
        round: &Round,
        to: StoreBoot,
        out: &[StoreId],
        grounds: Grounds,
    ) {
        let Some(kept) = self.records.shards.get(shard) else { return };
        let (config, expect) = (&kept.value, kept.modified);
        let next = accepted(config, to, out, self.min_in_sync());
        let committed = round.committed(shard);
        let known = |store: StoreId| {
            let last = round.last_of(shard, store).map(|(_, seq)| seq);
            // A trusted member holds everything that is committed.
            let least = committed.filter(|_| !config.tainted.contains(&store));
            last.max(least)
        };
        let others = config.isr.iter().filter(|&&store| store != to.store);
        let (intent, accepted_by) = match grounds {
            Grounds::Intent(kept) => (Some(kept.modified), Some(kept.value.from)),
            Grounds::AllDamaged => (None, None),
        };
        let loss = LossRecord {
            shard,
            epoch: next.epoch,
            primary: to,
            last: round.last_of(shard, to.store).unwrap_or((Epoch(0), Seq(0))),
            given_up: others.map(|&store| (store, known(store))).collect(),
            accepted_by,
        };
        let story = Story::LossAccepted(Box::new(loss.clone()));
        let accepted = Accepted { expect, config: next, loss, intent };
        self.propose(turn, Writes::Accepted(Box::new(accepted)), vec![story]);
    }
}

/// The record in which this process leads, and in which no other member's copy is trusted.
fn accepted(
    config: &ShardConfig,
    to: StoreBoot,
    out: &[StoreId],
    min_in_sync: usize,
) -> ShardConfig {
    let mut named = config.clone();
    config::insert(&mut named.isr, to.store);
    config::remove(&mut named.learners, to.store);
    named.tainted = named.isr.clone();
    config::remove(&mut named.tainted, to.store);
    promoted(&named, to, out, min_in_sync)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::Boot;

    #[track_caller]
    fn check(to: u128, out: &[u128], min_in_sync: usize, isr: &[u128], tainted: &[u128]) {
        let ids = |stores: &[u128]| stores.iter().copied().map(StoreId).collect::<Vec<_>>();
        let config = ShardConfig {
            isr: ids(&[1, 2]),
            learners: ids(&[3]),
            tainted: ids(&[2]),
            ..ShardConfig::default()
        };
        let to = StoreBoot { store: StoreId(to), boot: Boot(1) };
        let next = accepted(&config, to, &ids(out), min_in_sync);
        assert_eq!((next.isr, next.tainted), (ids(isr), ids(tainted)));
        assert_eq!((next.primary, next.epoch), (to, Epoch(1)));
    }

    #[test]
    fn all_others_are_tainted_and_the_dead_leave_down_to_the_floor() {
        check(2, &[1], 2, &[1, 2], &[1]);
        check(2, &[1], 1, &[2], &[]);
        // A learner, and a store that has held nothing.
        check(3, &[1, 2], 2, &[2, 3], &[2]);
        check(9, &[1, 2], 1, &[9], &[]);
    }
}
