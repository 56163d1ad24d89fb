//! Takes idempotency records that are over from the disk, when RocksDB compacts the files they lie in (DESIGN §7).
//!
//! Whether a record exists is decided by its shard's record alone: one whose bucket is not live there does not, whatever
//! is on the disk. So nothing here changes what anybody is answered; it only gives back the room.
//!
//! ```text
//!   flush ──▶ ingested ──▶ Known: what is over in each shard's record ──▶ held by the views made after it
//!                              compaction ◀── the Known of the oldest view that is left
//! ```
//!
//! What a newcomer would get wrong: RocksDB's compaction filters do not respect snapshots. A copy that is being read for
//! another node must show every row that its shard record counts, so what is over is taken from *the oldest view that
//! somebody still has*: a row may go once nobody can see a state in which it exists.

use std::collections::{BTreeMap, VecDeque};
use std::ffi::CStr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use engine::apply::ShardState;
use engine::idempotency::{Limits, Over};
use engine::ids::{Slot, Slots};
use engine::store::layout;
use rocksdb::CompactionDecision;
use rocksdb::compaction_filter::CompactionFilter;
use rocksdb::compaction_filter_factory::{CompactionFilterContext, CompactionFilterFactory};

/// What is over in the shards of one state, by their first slot. What it says nothing of is kept.
type Shards = BTreeMap<u16, (Slots, Over)>;

/// What is over in the state that a view shows. Lives as long as the view.
#[derive(Debug, Default)]
pub(crate) struct Known(Mutex<Shards>);

/// What is over in every state that somebody can still see.
#[derive(Clone, Debug, Default)]
pub(crate) struct Expired(Arc<Mutex<Inner>>);

#[derive(Debug, Default)]
struct Inner {
    /// None until the cluster's settings are known: nothing is over before.
    limits: Option<Limits>,
    /// Of the state as it is now.
    now: Arc<Known>,
    /// Of the states that may still be seen, the oldest first.
    seen: VecDeque<Weak<Known>>,
}

impl Expired {
    /// The cluster's settings are known, and the state holds these shards.
    pub(crate) fn begin<'a>(
        &self,
        limits: Limits,
        shards: impl IntoIterator<Item = &'a ShardState>,
    ) {
        lock(&self.0).limits = Some(limits);
        self.ingested(shards);
    }

    /// The state holds these shards now, besides what else it held.
    pub(crate) fn ingested<'a>(&self, shards: impl IntoIterator<Item = &'a ShardState>) {
        let mut inner = lock(&self.0);
        let Some(limits) = inner.limits else { return };
        let mut known = lock(&inner.now.0).clone();
        for state in shards {
            let over = state.tokens.over(&limits, state.applied.time);
            known.insert(state.slots.lo, (state.slots, over));
        }
        inner.now = Arc::new(Known(Mutex::new(known)));
    }

    /// These slots are about to get other rows, perhaps of an earlier state of their shard: what was over may not be.
    pub(crate) fn forget(&self, slots: Slots) {
        let mut inner = lock(&self.0);
        inner.seen.retain(|known| known.strong_count() > 0);
        let seen: Vec<_> = inner.seen.iter().filter_map(Weak::upgrade).collect();
        for known in seen.iter().chain([&inner.now]) {
            lock(&known.0).remove(&slots.lo);
        }
    }

    /// A view is being made of the state as it is now: to be held as long as it can be read.
    pub(crate) fn seen(&self) -> Arc<Known> {
        let mut inner = lock(&self.0);
        inner.seen.retain(|known| known.strong_count() > 0);
        let now = inner.now.clone();
        let newest = inner.seen.back().and_then(Weak::upgrade);
        if newest.is_none_or(|newest| !Arc::ptr_eq(&newest, &now)) {
            inner.seen.push_back(Arc::downgrade(&now));
        }
        now
    }

    /// What a compaction that begins now may remove.
    fn oldest(&self) -> Arc<Known> {
        let inner = lock(&self.0);
        inner.seen.iter().find_map(Weak::upgrade).unwrap_or_else(|| inner.now.clone())
    }
}

/// Whoever panicked while it held the lock left a whole value: each change is one insertion or removal.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Of one compaction.
pub(crate) struct Filter(Arc<Known>);

impl CompactionFilter for Filter {
    fn filter(&mut self, _level: u32, key: &[u8], value: &[u8]) -> CompactionDecision {
        match layout::bucket_of(key, value) {
            Some((slot, bucket)) if self.is_over(slot, bucket) => CompactionDecision::Remove,
            _ => CompactionDecision::Keep,
        }
    }

    fn name(&self) -> &CStr {
        c"dkc expired 1"
    }
}

impl Filter {
    fn is_over(&self, slot: Slot, bucket: u64) -> bool {
        let shards = lock(&self.0.0);
        let last = shards.range(..=slot.0).next_back();
        last.is_some_and(|(_, (slots, over))| slots.contains(slot) && over.has(bucket))
    }
}

impl CompactionFilterFactory for Expired {
    type Filter = Filter;

    fn create(&mut self, _context: CompactionFilterContext) -> Filter {
        Filter(self.oldest())
    }

    fn name(&self) -> &CStr {
        c"dkc expired 1"
    }
}
