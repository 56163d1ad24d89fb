//! Removes expired idempotency records from the disk when RocksDB compacts the files that hold
//! them.
//!
//! The record of its shard alone decides whether an idempotency record exists: one whose bucket is
//! not live there does not, whatever is on the disk. So nothing here changes an answer to a client;
//! the filter only reclaims the space.
//!
//! ```text
//!   flush ──▶ ingested ──▶ ExpiredBuckets, by each shard's record ──▶ held by later views
//!                            compaction ◀── the ExpiredBuckets of the oldest live view
//! ```
//!
//! RocksDB's compaction filters do not respect snapshots. A copy that is being read for another
//! node must show every row that its shard record counts, so the filter removes what has expired in
//! *the oldest view that is still held*: a row may go once no view can show a state in which it
//! exists.

use std::collections::{BTreeMap, VecDeque};
use std::ffi::CStr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use engine::ids::{Slot, Slots};
use engine::shard::idempotency::{DroppedBuckets, TokenLimits};
use engine::shard::state::ShardState;
use engine::store::layout;
use rocksdb::CompactionDecision;
use rocksdb::compaction_filter::CompactionFilter;
use rocksdb::compaction_filter_factory::{CompactionFilterContext, CompactionFilterFactory};

/// The expired buckets of the shards of one state, by their first slot. Rows of other slots are
/// kept.
type Shards = BTreeMap<u16, (Slots, DroppedBuckets)>;

/// The expired buckets of the state that a view shows. They live as long as the view.
#[derive(Debug, Default)]
pub(crate) struct ExpiredBuckets(Mutex<Shards>);

/// A compaction filter for rows whose buckets have expired in every live view.
#[derive(Clone, Debug, Default)]
pub(crate) struct ExpiryFilter(Arc<Mutex<Inner>>);

#[derive(Debug, Default)]
struct Inner {
    /// `None` until the cluster's settings are known: nothing has expired before.
    limits: Option<TokenLimits>,
    /// The expired buckets of the state as it is now.
    now: Arc<ExpiredBuckets>,
    /// The expired buckets of the views that may still be read, the oldest first.
    pinned: VecDeque<Weak<ExpiredBuckets>>,
}

impl ExpiryFilter {
    /// Sets the cluster's limits, for a state that holds these shards.
    pub(crate) fn set_limits<'a>(
        &self,
        limits: TokenLimits,
        shards: impl IntoIterator<Item = &'a ShardState>,
    ) {
        lock(&self.0).limits = Some(limits);
        self.ingested(shards);
    }

    /// Notes that the state now holds these shards, besides the ones it held before.
    pub(crate) fn ingested<'a>(&self, shards: impl IntoIterator<Item = &'a ShardState>) {
        let mut inner = lock(&self.0);
        let Some(limits) = inner.limits else { return };
        let mut buckets = lock(&inner.now.0).clone();
        for state in shards {
            let dropped = state.tokens.dropped(&limits, state.applied.time);
            buckets.insert(state.slots.lo, (state.slots, dropped));
        }
        inner.now = Arc::new(ExpiredBuckets(Mutex::new(buckets)));
    }

    /// Forgets the expired buckets of slots that are about to get other rows, perhaps of an earlier
    /// state of their shard, in which those buckets had not expired.
    pub(crate) fn forget(&self, slots: Slots) {
        let mut inner = lock(&self.0);
        inner.pinned.retain(|buckets| buckets.strong_count() > 0);
        let pinned: Vec<_> = inner.pinned.iter().filter_map(Weak::upgrade).collect();
        for buckets in pinned.iter().chain([&inner.now]) {
            lock(&buckets.0).remove(&slots.lo);
        }
    }

    /// Returns the expired buckets of the present state, to be held by a view for as long as it can
    /// be read.
    pub(crate) fn pin_view(&self) -> Arc<ExpiredBuckets> {
        let mut inner = lock(&self.0);
        inner.pinned.retain(|buckets| buckets.strong_count() > 0);
        let now = inner.now.clone();
        let newest = inner.pinned.back().and_then(Weak::upgrade);
        if newest.is_none_or(|newest| !Arc::ptr_eq(&newest, &now)) {
            inner.pinned.push_back(Arc::downgrade(&now));
        }
        now
    }

    /// Returns the buckets whose rows a compaction that begins now may remove.
    fn oldest(&self) -> Arc<ExpiredBuckets> {
        let inner = lock(&self.0);
        inner.pinned.iter().find_map(Weak::upgrade).unwrap_or_else(|| inner.now.clone())
    }
}

/// A thread that panicked while it held the lock left a whole value: each change is one insertion
/// or removal.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The filter of one compaction.
pub(crate) struct BucketFilter(Arc<ExpiredBuckets>);

impl CompactionFilter for BucketFilter {
    fn filter(&mut self, _level: u32, key: &[u8], value: &[u8]) -> CompactionDecision {
        match layout::bucket_of(key, value) {
            Some((slot, bucket)) if self.is_expired(slot, bucket) => CompactionDecision::Remove,
            _ => CompactionDecision::Keep,
        }
    }

    fn name(&self) -> &CStr {
        c"dkc expired 1"
    }
}

impl BucketFilter {
    fn is_expired(&self, slot: Slot, bucket: u64) -> bool {
        let shards = lock(&self.0.0);
        let last = shards.range(..=slot.0).next_back();
        last.is_some_and(|(_, (slots, dropped))| slots.contains(slot) && dropped.contains(bucket))
    }
}

impl CompactionFilterFactory for ExpiryFilter {
    type Filter = BucketFilter;

    fn create(&mut self, _context: CompactionFilterContext) -> BucketFilter {
        BucketFilter(self.oldest())
    }

    fn name(&self) -> &CStr {
        c"dkc expired 1"
    }
}
