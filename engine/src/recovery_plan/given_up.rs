//! A recovery without stores that an operator gives up, because their disks are lost for good.
//!
//! A store that is given up may have led after the newest known record R of a shard that names it,
//! so the proof of [`recovery_plan`](super) holds for the other shards alone. For these, as long as
//! fewer stores are given up than `min_in_sync`, every commit is on a store that has answered:
//! at least `min_in_sync` members have it. So nothing is lost either.
//!
//! 1. If the primary of R has answered, and no answer has a promise above the epoch of R, nothing
//!    was committed in a later epoch, since a store that has answered would have promised it. In
//!    the epoch of R the primary has waited for all members of R, as in the proof. So R continues.
//! 2. Otherwise no store knows which copies are complete, but the longest log is, by the epoch and
//!    the seq of its last entry. A commit is on some store that has answered. A log with a later
//!    last epoch has it, because the primary of that epoch had it; and so has a log of the same
//!    epoch that is as long. So the longest good copy continues alone, and all other members are
//!    tainted.
//!
//! A tainted member is no such store: its log may be as long, and its copy lacks something. It
//! continues only if there is no other good copy.
//!
//! If `min_in_sync` stores are given up, if a member is tainted, or if the copy of a member that
//! has answered is not good, what was acknowledged may be lost. Then the longest good copy
//! continues as well, and the shard gets a record of the loss, for good.

use std::collections::BTreeSet;

use crate::ids::{Boot, StoreBoot, StoreId};
use crate::message::CopyEnd;
use crate::planted::Planted;
use crate::records::{LossRecord, StoreRecord, StoreStatus};
use crate::recovery_plan::{NewestKnown, ShardPlanner};
use crate::shard_record::{self, ShardRecord};

/// The record of a store that was given up: nothing waits for it, and its disk may not start again,
/// since its log has no such nonce.
pub(super) fn record_of(store: StoreId) -> StoreRecord {
    StoreRecord {
        name: format!("lost-{store}"),
        address: String::new(),
        zone: String::new(),
        host: String::new(),
        boot: Boot(0),
        nonce: 0,
        status: StoreStatus::Lost,
    }
}

/// Returns the record by which the shard continues without the stores that are given up, and its
/// loss, if there may be one. `next`: the record if none of them mattered. `None`: there is no good
/// copy.
pub(super) fn without(
    planner: &ShardPlanner<'_>,
    record: &ShardRecord,
    next: ShardRecord,
    known: &NewestKnown<'_>,
) -> Option<(ShardRecord, Option<LossRecord>)> {
    let (terms, min) = (planner.terms, usize::from(planner.meta.min_in_sync));
    let named = record.isr.iter().chain(&record.learners).copied();
    let gone: BTreeSet<StoreId> = named.filter(|it| terms.without.contains(it)).collect();
    if gone.is_empty() {
        return Some((next, None));
    }
    let few = terms.without.len() < min;
    let led_by_another = known.promised > record.epoch || gone.contains(&record.primary.store);
    if few && (!led_by_another || Planted::GivenUpNeverLed.is_in(terms.planted)) {
        return Some((leave(next, &gone, min), None));
    }
    let fit = known.copies.iter().filter(|(_, copy)| !copy.unfit);
    let trusted = |store| !record.tainted.contains(&store);
    let &(store, copy) = fit.max_by_key(|&&(store, copy)| (trusted(store), copy.last))?;
    let mut next = next;
    next.primary = StoreBoot { store, boot: Boot(0) };
    shard_record::insert(&mut next.isr, store);
    shard_record::remove(&mut next.learners, store);
    next = leave(next, &gone, min);
    next.tainted = next.isr.clone();
    shard_record::remove(&mut next.tainted, store);
    let is_bad = |(store, copy): &(StoreId, CopyEnd)| {
        copy.damaged || copy.unfit && record.isr.contains(store)
    };
    let is_whole = few && record.tainted.is_empty() && !known.copies.iter().any(is_bad);
    let loss = || LossRecord {
        shard: next.shard(),
        epoch: next.epoch,
        primary: next.primary,
        last: copy.last,
        given_up: gone.iter().map(|&store| (store, None)).collect(),
        accepted_by: Some(terms.from.clone()),
    };
    let loss = (!is_whole).then(loss);
    Some((next, loss))
}

/// Takes the stores out, but for members that `min_in_sync` keeps in: the coordinator replaces
/// those.
fn leave(mut next: ShardRecord, gone: &BTreeSet<StoreId>, min_in_sync: usize) -> ShardRecord {
    for &store in gone {
        shard_record::remove(&mut next.learners, store);
        if next.room(min_in_sync) > 0 {
            shard_record::remove(&mut next.isr, store);
            shard_record::remove(&mut next.tainted, store);
        }
    }
    next
}
