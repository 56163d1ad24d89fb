//! The removal of dead members from in-sync sets.

use std::collections::BTreeMap;

use crate::coordinator::decision::Decision;
use crate::coordinator::promotion::Promotions;
use crate::coordinator::proposals::ShardWrite;
use crate::coordinator::review::ReviewTurn;
use crate::ids::StoreId;

/// Removes dead members from every in-sync set that has more than `min_in_sync` members. (Those of
/// shards that need a primary leave with the promotion.)
pub(super) fn remove_dead(review: &mut ReviewTurn<'_>, promotions: &Promotions) {
    let min_in_sync = review.cluster.min_in_sync();
    let mut writes = Vec::new();
    let mut removed: BTreeMap<StoreId, usize> = BTreeMap::new();
    for record in review.cluster.shards() {
        let dead = |store: &StoreId| review.is_dead(*store);
        let out: Vec<StoreId> = record.isr.iter().copied().filter(dead).collect();
        if out.is_empty() || !promotions.is_free(review, record) {
            continue;
        }
        let next = record.changed(&[], &out, &[], min_in_sync);
        if next.isr == record.isr {
            continue;
        }
        for store in out.iter().filter(|store| !next.isr.contains(store)) {
            *removed.entry(*store).or_default() += 1;
        }
        writes.push(ShardWrite { record: next, decision: None });
    }
    if let Some(write) = writes.first_mut()
        && let Some((&store, &shards)) = removed.iter().next()
    {
        write.decision = Some(Decision::Removed { store, shards });
    }
    review.propose_shards(writes);
}
