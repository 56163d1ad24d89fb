//! The division of a shard's state at a split: one state becomes two, on every replica alike.
//!
//! The digests of the children can't be computed from the digest of the parent: they need the rows.
//! So a shard is divided on top of a state on disk that has all that was applied, and all its rows
//! are counted once ([`RowCounts`]). The counts must add up to the digest of the parent, so a row
//! that was lost or changed is found here, too.
//!
//! | part of the state | left child | right child |
//! |---|---|---|
//! | counters, records of single operations | those of its slots | those of its slots |
//! | records of requests of many, at the first slot | stay | copied under its first slot |
//! | sessions and their expiry, leaps of shard time | as they were | as they were |
//!
//! A row does not name its namespace, so what a namespace has used of the quota is divided like the
//! bytes of its bucket.

use std::collections::BTreeMap;

use crate::codec::Malformed;
use crate::entry::Position;
use crate::ids::{Slot, Slots};
use crate::planted::Planted;
use crate::shard::digest;
use crate::shard::idempotency::{Bucket, Buckets, RecordId, TokenRecord};
use crate::shard::state::ShardState;
use crate::store::layout::{self, RowKey};

/// The counts over the rows of a shard that is divided at a slot.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct RowCounts {
    slots: Slots,
    at: u16,
    /// The digests of the counters left and right.
    counters: [u128; 2],
    /// The records left and right, by bucket.
    records: [BTreeMap<u64, RecordSums>; 2],
    /// The records at the shard's first slot: among them those of requests of many.
    first: Vec<(RecordId, TokenRecord)>,
}

/// The sums over records of one bucket.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
struct RecordSums {
    records: u64,
    bytes: u64,
    digest: u128,
}

/// The states of the two children.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct DividedState {
    /// The state of the left child, which keeps the name of the shard.
    pub left: ShardState,
    /// The state of the right child.
    pub right: ShardState,
    /// Records that are new rows of the right child.
    pub copied: Vec<(RecordId, TokenRecord)>,
}

/// The rows of the shard do not add up to its digest: the copy is damaged.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct RowsDiffer;

/// The slots of the two children.
pub fn slots_of(parent: Slots, at: u16) -> Option<(Slots, Slots)> {
    let inside = parent.lo < at && at <= parent.hi;
    inside.then(|| (Slots { hi: at - 1, ..parent }, Slots { lo: at, ..parent }))
}

impl RecordSums {
    fn add(&mut self, (digest, bytes): (u128, u64)) {
        self.records += 1;
        self.bytes += bytes;
        self.digest = self.digest.wrapping_add(digest);
    }
}

impl RowCounts {
    /// Counts of no rows yet, of a shard of these slots that is divided at `at`.
    pub fn new(slots: Slots, at: u16) -> Self {
        Self { slots, at, ..Self::default() }
    }

    /// Counts a row of the state that lies in the slots. The error names what can't be read.
    pub fn row(&mut self, key: &[u8], value: &[u8]) -> Result<(), Malformed> {
        match RowKey::decode(key)? {
            RowKey::Counter { slot, counter } => {
                self.counter(slot, counter.name(), layout::decode_counter(value)?);
            }
            RowKey::Idempotency { slot, hash } => {
                self.record(RecordId { slot, hash }, layout::decode_record(value)?);
            }
            RowKey::Shard(_) => {}
        }
        Ok(())
    }

    /// Counts a counter.
    pub fn counter(&mut self, slot: Slot, name: &[u8], value: i128) {
        let side = &mut self.counters[usize::from(slot.0 >= self.at)];
        *side = side.wrapping_add(digest::share(digest::weight(name), value));
    }

    /// Counts a record.
    pub fn record(&mut self, id: RecordId, record: TokenRecord) {
        let sums = self.records[usize::from(id.slot.0 >= self.at)].entry(record.bucket);
        sums.or_default().add(layout::record_share(id, &record));
        if id.slot.0 == self.slots.lo {
            self.first.push((id, record));
        }
    }

    /// The bytes of memory of the records, about.
    pub fn bytes(&self) -> usize {
        self.first.len() * size_of::<(RecordId, TokenRecord)>()
    }
}

/// Divides a state, which is as of the entry before the split: what its rows are was counted. `at`
/// is the position of the split.
pub fn divide(
    state: &ShardState,
    position: Position,
    counts: &RowCounts,
    planted: Option<Planted>,
) -> Result<DividedState, RowsDiffer> {
    let (left_slots, right_slots) = slots_of(state.slots, counts.at).ok_or(RowsDiffer)?;
    let [left, right] = counts.counters;
    if left.wrapping_add(right) != state.counter_digest || counts.slots != state.slots {
        return Err(RowsDiffer);
    }
    let mut copied = Vec::new();
    let mut records = counts.records.clone();
    for (id, record) in &counts.first {
        if state.tokens.is_live(record.bucket) && !Planted::RecordsNotCopied.is_in(planted) {
            let id = RecordId { slot: Slot(right_slots.lo), ..*id };
            let sums = records[1].entry(record.bucket).or_default();
            sums.add(layout::record_share(id, record));
            copied.push((id, record.clone()));
        }
    }
    let buckets = |side: usize| {
        let live = state.tokens.live().iter();
        // A bucket without records does not exist.
        let of = |(number, bucket): (&u64, &Bucket)| {
            let sums = records[side].get(number)?;
            Some((*number, part_of(bucket, *sums)))
        };
        Buckets::new(live.filter_map(of).collect(), state.tokens.leaps().to_vec())
    };
    for (number, bucket) in state.tokens.live() {
        let of = |side: usize| counts.records[side].get(number).copied().unwrap_or_default();
        if of(0).digest.wrapping_add(of(1).digest) != bucket.digest {
            return Err(RowsDiffer);
        }
    }
    let child = |slots, counter_digest, tokens| ShardState {
        slots,
        counter_digest,
        tokens,
        divided: position.seq,
        applied: position,
        sessions: state.sessions.clone(),
    };
    let mut right = child(right_slots, right, buckets(1));
    if Planted::ChildWithoutSessions.is_in(planted) {
        right.sessions.rows.clear();
    }
    Ok(DividedState { left: child(left_slots, left, buckets(0)), right, copied })
}

/// The part of a bucket with these records.
fn part_of(bucket: &Bucket, sums: RecordSums) -> Bucket {
    let share = |bytes: u64| {
        let part = u128::from(bytes) * u128::from(sums.bytes) / u128::from(bucket.bytes.max(1));
        u64::try_from(part).unwrap_or(u64::MAX)
    };
    let mut namespaces: BTreeMap<u64, u64> =
        bucket.namespaces.iter().map(|(&namespace, &bytes)| (namespace, share(bytes))).collect();
    // What rounding has left belongs to some namespace.
    let rest = sums.bytes.saturating_sub(namespaces.values().sum());
    if let Some((_, bytes)) = namespaces.iter_mut().next_back() {
        *bytes += rest;
    }
    Bucket {
        records: sums.records,
        bytes: sums.bytes,
        digest: sums.digest,
        prolonged_ms: bucket.prolonged_ms,
        namespaces,
    }
}
