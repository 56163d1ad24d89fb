//! Bounded-stale reads: which backup is asked, and how old its answer is (DESIGN §8).
//!
//! A part of such a read goes to one backup after another, and lastly to the primary, whose answer
//! is linearizable. Each worker begins with another backup, so that they share the work; one that
//! could not answer comes last for a while.
//!
//! **The age.** A backup says how old its values were when its answer left. The question was sent
//! before that: so on this worker's clock the values hold all that was acknowledged by the sending
//! less that age, and what has passed since the sending makes them older. No two clocks are
//! compared, and a pause anywhere is counted.

use std::collections::BTreeMap;

use super::read_queue::{Part, Queue, Way};
use crate::config::ShardConfig;
use crate::ids::{Now, ShardId, StoreId};
use crate::router::Router;

/// What a part is content with, and who could not give it.
#[derive(Clone, Debug)]
pub(super) struct Bound {
    pub max_staleness_ms: u64,
    pub tried: Vec<StoreId>,
}

/// A part that a backup has answered.
#[derive(Clone, Debug)]
pub(super) struct Dated {
    pub shard: ShardId,
    pub part: Part,
    /// When it was asked for …
    pub sent: Now,
    /// … and how old it was when the answer left.
    pub staleness_us: u64,
}

impl Dated {
    /// It is older than its client allows.
    pub(super) fn is_too_old(&self, now: Now) -> bool {
        !self.allows(self.staleness_ms(now))
    }

    /// Its client is content with values of this age.
    pub(super) fn allows(&self, staleness_ms: u64) -> bool {
        self.part.bound.as_ref().is_some_and(|bound| staleness_ms <= bound.max_staleness_ms)
    }

    /// How old it is at most, rounded up.
    pub(super) fn staleness_ms(&self, now: Now) -> u64 {
        (now.0 - self.sent.0).saturating_add(self.staleness_us).div_ceil(1_000)
    }
}

/// The backup to ask next: in sync, connected and not tried yet. None: the primary is asked.
pub(super) fn choose(
    bound: &Bound,
    config: &ShardConfig,
    router: &Router,
    queues: &BTreeMap<Way, Queue>,
    worker: usize,
    now: Now,
) -> Option<StoreId> {
    let shard = config.shard();
    let backup = |store: &&StoreId| **store != config.primary.store;
    let mut backups: Vec<StoreId> = config.isr.iter().filter(backup).copied().collect();
    let first = worker % backups.len().max(1);
    backups.rotate_left(first);
    backups.retain(|store| !bound.tried.contains(store) && router.to_store(*store).is_some());
    let shunned = |store: &StoreId| {
        let queue = queues.get(&Way { shard, backup: Some(*store) });
        queue.is_some_and(|queue| queue.shunned_until > now)
    };
    backups.into_iter().min_by_key(shunned)
}
