//! Bounded-stale reads: the choice of a follower, and the age of its answer.
//!
//! A part of such a read goes to one follower after another, and lastly to the primary, whose
//! answer is linearizable. Each batcher begins with another follower, so that they share the work;
//! a follower that could not answer comes last for a while.
//!
//! **The age.** A follower's answer contains the age that its values had when the answer left. The
//! request was sent before that. So on this batcher's clock the values include everything that was
//! acknowledged by the time of sending less that age, and the time since the sending makes them
//! older. No two clocks are compared, and a pause anywhere is counted.

use std::collections::BTreeMap;

use super::read_queue::{ReadPart, ReadQueue, ReadTarget, StalenessBound};
use super::routes::Routes;
use crate::ids::{Now, ShardId, StoreId};
use crate::shard_record::ShardRecord;

/// A part that a follower has answered.
#[derive(Clone, Debug)]
pub(super) struct DatedPart {
    pub shard: ShardId,
    pub part: ReadPart,
    /// The time at which the request was sent.
    pub sent: Now,
    /// The age of the values when the answer left.
    pub staleness_us: u64,
}

impl DatedPart {
    /// Returns whether the part is older than its client accepts.
    pub(super) fn is_too_old(&self, now: Now) -> bool {
        !self.allows(self.staleness_ms(now))
    }

    /// Returns whether its client accepts values of this age.
    pub(super) fn allows(&self, staleness_ms: u64) -> bool {
        self.part.bound.as_ref().is_some_and(|bound| staleness_ms <= bound.max_staleness_ms)
    }

    /// The greatest age that the values can have, rounded up.
    pub(super) fn staleness_ms(&self, now: Now) -> u64 {
        (now.0 - self.sent.0).saturating_add(self.staleness_us).div_ceil(1_000)
    }
}

/// The follower to ask next, which is in sync, connected and not tried yet; `None` if only the
/// primary is left.
pub(super) fn choose(
    bound: &StalenessBound,
    record: &ShardRecord,
    routes: &Routes,
    queues: &BTreeMap<ReadTarget, ReadQueue>,
    number: usize,
    now: Now,
) -> Option<StoreId> {
    let shard = record.shard();
    let follower = |store: &&StoreId| **store != record.primary.store;
    let mut followers: Vec<StoreId> = record.isr.iter().filter(follower).copied().collect();
    let first = number % followers.len().max(1);
    followers.rotate_left(first);
    followers
        .retain(|store| !bound.tried.contains(store) && routes.router.to_store(*store).is_some());
    let avoided = |store: &StoreId| {
        let queue = queues.get(&ReadTarget { shard, follower: Some(*store) });
        queue.is_some_and(|queue| queue.avoided_until > now)
    };
    followers.into_iter().min_by_key(avoided)
}
