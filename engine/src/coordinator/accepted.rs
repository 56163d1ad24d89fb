//! Promotions with a loss: a copy leads although acknowledged entries may be missing in it.
//!
//! There are two grounds for that, and both leave a record for good, in the transaction that begins
//! the epoch:
//!
//! * An operator asks for it. The intent names the version of the shard's record that it was
//!   decided on, so an intent that comes late, or after a better copy came back, has no effect. It
//!   is carried out only where no copy may lead by itself, and once its store has answered; the
//!   transaction deletes it.
//! * Every member of the in-sync set that is trusted and not given up has answered, and all their
//!   copies are damaged: there is nothing to wait for.
//!
//! Every other member becomes tainted: when it returns it is filled from the new primary, whatever
//! it holds, and it can't lead before.

use crate::coordinator::candidates::PromotionCase;
use crate::coordinator::choice::promoted;
use crate::coordinator::decision::Decision;
use crate::coordinator::observed::ObservedCluster;
use crate::coordinator::review::ReviewTurn;
use crate::coordinator::{AcceptedLoss, AtRevision, Writes};
use crate::ids::{Epoch, Seq, StoreBoot, StoreId};
use crate::planted::Planted;
use crate::records::{LossRecord, PromoteIntent};
use crate::shard_record::{self, ShardRecord};

/// The grounds for a promotion with a loss.
#[derive(Debug)]
pub(super) enum Grounds {
    /// An operator's intent.
    Intent(AtRevision<PromoteIntent>),
    /// The copies of all trusted members are damaged.
    AllDamaged,
}

/// The process that an operator wants to lead, if the intent was decided on this very record.
pub(super) fn wanted<'a>(
    cluster: &'a ObservedCluster,
    record: &ShardRecord,
    planted: Option<Planted>,
) -> Option<(&'a AtRevision<PromoteIntent>, StoreBoot)> {
    let kept = cluster.records.promotes.get(record.shard())?;
    let blind = Planted::IntentOfAnyRecord.is_in(planted);
    let meant = kept.value.version == record.version || blind;
    meant.then_some(kept).zip(cluster.health.alive(kept.value.store))
}

/// Proposes that this process leads, and records the entries that are given up with that.
pub(super) fn accept_loss(
    review: &mut ReviewTurn<'_>,
    case: &PromotionCase<'_>,
    to: StoreBoot,
    grounds: Grounds,
) {
    let (shard, record, round) = (case.record.shard(), case.record, case.round);
    let expect = case.cluster.records.shards.modified(shard);
    let next = accepted(record, to, &case.leaving(), case.cluster.min_in_sync());
    let committed = round.committed(shard);
    let known = |store: StoreId| {
        let last = round.last_of(shard, store).map(|(_, seq)| seq);
        // A trusted member holds everything that is committed.
        let least = committed.filter(|_| !record.tainted.contains(&store));
        last.max(least)
    };
    let others = record.isr.iter().filter(|&&store| store != to.store);
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
    let decision = Decision::LossAccepted(Box::new(loss.clone()));
    let accepted = AcceptedLoss { expect, record: next, loss, intent };
    review.propose(Writes::AcceptedLoss(Box::new(accepted)), vec![decision]);
}

/// The record in which this process leads and no other member's copy is trusted.
fn accepted(
    record: &ShardRecord,
    to: StoreBoot,
    out: &[StoreId],
    min_in_sync: usize,
) -> ShardRecord {
    let mut named = record.clone();
    shard_record::insert(&mut named.isr, to.store);
    shard_record::remove(&mut named.learners, to.store);
    named.tainted = named.isr.clone();
    shard_record::remove(&mut named.tainted, to.store);
    promoted(&named, to, out, min_in_sync)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::Boot;

    #[track_caller]
    fn check(to: u128, out: &[u128], min_in_sync: usize, isr: &[u128], tainted: &[u128]) {
        let ids = |stores: &[u128]| stores.iter().copied().map(StoreId).collect::<Vec<_>>();
        let record = ShardRecord {
            isr: ids(&[1, 2]),
            learners: ids(&[3]),
            tainted: ids(&[2]),
            ..ShardRecord::default()
        };
        let to = StoreBoot { store: StoreId(to), boot: Boot(1) };
        let next = accepted(&record, to, &ids(out), min_in_sync);
        assert_eq!((next.isr, next.tainted), (ids(isr), ids(tainted)));
        assert_eq!((next.primary, next.epoch), (to, Epoch(1)));
    }

    #[test]
    fn all_others_are_tainted_and_the_dead_leave_down_to_the_floor() {
        check(2, &[1], 2, &[1, 2], &[1]);
        check(2, &[1], 1, &[2], &[]);
        // The named store is a learner, or holds no copy.
        check(3, &[1, 2], 2, &[2, 3], &[2]);
        check(9, &[1, 2], 1, &[9], &[]);
    }
}
