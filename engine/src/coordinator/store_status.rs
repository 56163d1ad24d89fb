//! The statuses of stores: given up, removed, draining, and trusted again.

use std::collections::BTreeMap;

use crate::coordinator::decision::Decision;
use crate::coordinator::observed::ObservedCluster;
use crate::coordinator::removal;
use crate::coordinator::review::ReviewTurn;
use crate::coordinator::{AtRevision, Effect, StoreRemoval, Writes};
use crate::ids::{Now, StoreBoot, StoreId};
use crate::message::ShardEnd;
use crate::node::boot;
use crate::planted::Planted;
use crate::records::{StoreRecord, StoreStatus};
use crate::shard_record::ShardRecord;

/// The suspect stores that were asked for their copies.
#[derive(Debug, Default)]
pub(super) struct StoreStatuses {
    /// The stores without an answer, by the number of the gather.
    gathers: BTreeMap<u64, StoreId>,
    /// Suspect stores are not asked again before this time.
    ask_after: Now,
}

impl StoreStatuses {
    pub(super) fn review(&mut self, review: &mut ReviewTurn<'_>) {
        review_names(review);
        review_removals(review);
        review_drains(review);
        self.review_suspects(review);
    }

    /// Asks suspect stores for their copies.
    ///
    /// A suspect store is trusted again once every copy that it holds was filled from a primary
    /// since. Mostly it holds no copy by then, since the planner takes all of them away; where the
    /// in-sync set has only `min_in_sync` members they stay, and are refilled in place. The store
    /// itself is asked: all copies of a store that starts as suspect are unfit until they have been
    /// replaced.
    fn review_suspects(&mut self, review: &mut ReviewTurn<'_>) {
        if review.now() < self.ask_after {
            return;
        }
        let cluster = review.cluster;
        self.ask_after = review.now().plus_ms(review.turn.settings.timing.ask_suspect_every_ms);
        self.gathers.clear();
        let suspect = |(store, _): (StoreId, _)| clearable(cluster, store);
        let suspects = cluster.records.stores.iter().filter_map(suspect);
        for to in suspects {
            let gather = review.turn.fresh_id();
            self.gathers.insert(gather, to.store);
            let shards = cluster.records.shards.iter().map(|(shard, _)| shard).collect();
            review.turn.effects.push(Effect::Gather { gather, to, shards });
        }
    }

    pub(super) fn on_gathered(
        &mut self,
        review: &mut ReviewTurn<'_>,
        gather: u64,
        store: StoreId,
        ends: Option<&[ShardEnd]>,
    ) {
        let cluster = review.cluster;
        let asked = self.gathers.remove(&gather) == Some(store);
        let filled = |end: &ShardEnd| {
            let record = cluster.shard(end.shard);
            !end.unfit && record.is_some_and(|record| record.isr.contains(&store))
        };
        let clean = ends.is_some_and(|ends| ends.iter().all(filled));
        if !asked || !clean || clearable(cluster, store).is_none() {
            return;
        }
        let Some(kept) = cluster.records.stores.get(store) else { return };
        write_status(review, store, kept, StoreStatus::Active, Decision::Cleared(store));
    }
}

/// The process of a suspect store, if it answers.
fn clearable(cluster: &ObservedCluster, store: StoreId) -> Option<StoreBoot> {
    let is_suspect = cluster.records.stores.get(store)?.value.status == StoreStatus::Suspect;
    cluster.health.alive(store).filter(|_| is_suspect)
}

/// Gives up a store whose name another one has taken, once it is dead, the other one runs, and no
/// shard depends on its copy.
fn review_names(review: &mut ReviewTurn<'_>) {
    let records = &review.cluster.records;
    let mut lost = Vec::new();
    for (store, kept) in records.stores.iter() {
        // A store that is only recorded holds nothing, and may never have run: claims can come
        // late.
        let runs = |it: &StoreId| records.is_registered(*it) && !review.is_dead(*it);
        let Some(to) = records.namesake(store).filter(runs) else { continue };
        let stands = records.newest_boot(store).is_some();
        if stands && review.is_dead(store) && !is_needed(review, store) {
            lost.push((store, to, kept));
        }
    }
    for (store, to, kept) in lost {
        let status = kept.value.status.given_up();
        write_status(review, store, kept, status, Decision::Lost { store, to });
    }
}

/// Returns whether a shard counts on the store's copy, and is not led by another one that is known
/// to be good.
fn is_needed(review: &ReviewTurn<'_>, store: StoreId) -> bool {
    let planted = review.turn.settings.planted;
    review.cluster.shards().any(|record| {
        boot::is_trusted_member(store, std::iter::once(record), planted)
            && !is_led_by_another(review, store, record)
    })
}

/// Returns whether another store's copy that is known to be good leads the shard.
fn is_led_by_another(review: &ReviewTurn<'_>, store: StoreId, record: &ShardRecord) -> bool {
    let (cluster, primary) = (review.cluster, record.primary);
    let holder = cluster.records.stores.get(primary.store);
    primary.store != store
        && cluster.is_led(record)
        && holder.is_some_and(|kept| kept.value.status != StoreStatus::Suspect)
        // A primary whose copy proved wrong asks to be replaced.
        && (!cluster.reports.resigns(review.now(), primary, record.shard())
            || Planted::ResignedIsGood.is_in(review.turn.settings.planted))
}

/// Carries out the intents of operators who want a store out of the cluster, where that is safe. An
/// intent that is not is kept: the command withdraws it.
fn review_removals(review: &mut ReviewTurn<'_>) {
    let (records, planted) = (&review.cluster.records, review.turn.settings.planted);
    let mut removals = Vec::new();
    for (store, intent) in records.removes.iter() {
        let Some(kept) = records.stores.get(store) else { continue };
        if kept.value.status.is_gone() || kept.value.boot != intent.value.boot {
            continue;
        }
        let runs = records.is_registered(store) || !review.is_dead(store);
        let removal = removal::Removal { store, runs };
        if removal.check(review.cluster.shards(), planted).is_err() {
            continue;
        }
        let record = StoreRecord { status: StoreStatus::Retired, ..kept.value.clone() };
        let drain = records.drains.get(store).map(|drain| drain.modified);
        let (expect, intent) = (kept.modified, intent.modified);
        removals.push(StoreRemoval { store, expect, record, intent, drain });
    }
    for removal in removals {
        let store = removal.store;
        if !is_proposing(review, store) {
            let decision = Decision::Retired { store };
            review.propose(Writes::Removal(Box::new(removal)), vec![decision]);
        }
    }
}

/// Makes each store's status follow the operator's intent. A suspect store is emptied anyway, and
/// drains once it is trusted again.
fn review_drains(review: &mut ReviewTurn<'_>) {
    let records = &review.cluster.records;
    for (store, kept) in records.stores.iter() {
        let wanted = records.drains.get(store).is_some();
        let (status, decision) = match (kept.value.status, wanted) {
            (StoreStatus::Active, true) => (StoreStatus::Draining, Decision::Draining(store)),
            (StoreStatus::Draining, false) => (StoreStatus::Active, Decision::Undrained(store)),
            _ => continue,
        };
        write_status(review, store, kept, status, decision);
    }
}

/// Proposes a store's status, unless a proposal of its record is in flight.
fn write_status(
    review: &mut ReviewTurn<'_>,
    store: StoreId,
    kept: &AtRevision<StoreRecord>,
    status: StoreStatus,
    decision: Decision,
) {
    if !is_proposing(review, store) {
        let record = StoreRecord { status, ..kept.value.clone() };
        review.propose(Writes::Store { store, expect: kept.modified, record }, vec![decision]);
    }
}

/// Returns whether a proposal of the store's record is in flight.
fn is_proposing(review: &ReviewTurn<'_>, store: StoreId) -> bool {
    review.proposals.is_proposing(|writes| match writes {
        Writes::Store { store: it, .. } => *it == store,
        Writes::Removal(removal) => removal.store == store,
        _ => false,
    })
}
