//! The shards of a cluster whose etcd is lost, where some of them may have been split.
//!
//! The two records of a split are written in one transaction. So if the record of the right child
//! is known, the parent ends before it, also where only an older record of the parent is known. If
//! no record of the right child is known, no primary has acted on one, as in the proof of
//! [`recovery_plan`](super): every member of the parent's record has answered, and the first
//! in-sync set of the child is that of the parent. Then the parent continues with all its slots,
//! and its primary writes both records again.
//!
//! The proof does not hold for a parent some of whose members are given up: one may have led
//! the child. If it did, and something was acknowledged, then a store that has answered has a copy
//! of the child. So where there is one, the record of the child is made of that of the parent, and
//! [`given_up`](super::given_up) decides about the child as about any shard. A promise above the
//! epoch of the parent's record counts for the child as well: the store that led the parent in that
//! epoch may have made the split, and have led the child in its first epoch.

use std::collections::BTreeMap;

use crate::batcher::shard_map::ranges;
use crate::ids::{Epoch, ShardId, Slots, Version};
use crate::recovery_plan::{NewestKnown, ShardPlanner};
use crate::shard_record::ShardRecord;

/// The newest known record of a shard, with the slots that are its own; and what else is known.
type Covered<'a> = (ShardRecord, NewestKnown<'a>);

/// Returns the shards by their newest known records, and the shards that no store knows.
pub(super) fn cover<'a>(
    planner: &ShardPlanner<'_>,
    known: BTreeMap<ShardId, NewestKnown<'a>>,
) -> (Vec<Covered<'a>>, Vec<ShardId>) {
    let mut covered: Vec<Covered<'a>> = Vec::new();
    for (shard, known) in known {
        let parent = covered.last_mut().filter(|(parent, _)| shard.0 <= parent.slots.hi);
        let child = match (known.record, &parent) {
            (Some(record), _) => (record.clone(), known),
            (None, Some(parent)) if may_have_been_led(planner, parent, &known) => {
                child_of(parent, shard, known)
            }
            (None, _) => {
                // The parent's primary will write the record of the child, in the parent's epoch.
                if let Some((_, parent)) = parent {
                    parent.promised = parent.promised.max(known.promised);
                }
                continue;
            }
        };
        if let Some((parent, _)) = parent {
            parent.slots.hi = shard.0 - 1;
        }
        covered.push(child);
    }
    let gaps = gaps(planner.meta.shards, &covered);
    (covered, gaps)
}

/// Returns whether a store that is given up may have led a child of which no record is known.
fn may_have_been_led(
    planner: &ShardPlanner<'_>,
    (parent, _): &Covered<'_>,
    known: &NewestKnown<'_>,
) -> bool {
    let mut named = parent.isr.iter().chain(&parent.learners);
    !known.copies.is_empty() && named.any(|store| planner.terms.without.contains(store))
}

/// The first record of a child, made of the newest known record of its parent.
fn child_of<'a>(
    (parent, parent_known): &Covered<'a>,
    child: ShardId,
    mut known: NewestKnown<'a>,
) -> Covered<'a> {
    let record = ShardRecord {
        slots: Slots { lo: child.0, ..parent.slots },
        epoch: parent.epoch.max(Epoch(2)),
        version: Version(0),
        ..parent.clone()
    };
    if parent_known.promised > parent.epoch {
        let above = Epoch(record.epoch.0 + 1);
        known.promised = known.promised.max(parent_known.promised).max(above);
    }
    (record, known)
}

/// Returns the shards between these, as they were before any split.
fn gaps(shards: u32, covered: &[Covered<'_>]) -> Vec<ShardId> {
    let mut gaps = Vec::new();
    let mut next = 0u32;
    let ends = covered.iter().map(|(record, _)| (record.slots.lo.into(), record.slots.hi.into()));
    for (lo, hi) in ends.chain([(1 << 16, 1 << 16)]) {
        let inside = |shard: &ShardId| (next..lo).contains(&u32::from(shard.0));
        let before = gaps.len();
        gaps.extend(ranges(shards).map(Slots::shard).filter(inside));
        if let (true, Ok(first)) = (next < lo && gaps.len() == before, u16::try_from(next)) {
            gaps.push(ShardId(first));
        }
        next = hi + 1;
    }
    gaps
}
