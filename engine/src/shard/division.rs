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
    // The bytes that rounding has left belong to some namespace.
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::entry::{Body, Entry};
    use crate::ids::{BatchSeq, Chain, Epoch, Revision, Seq, SessionId, TimeMs};
    use crate::key::CounterKey;
    use crate::shard::idempotency::{TokenLimits, TokenSettings};
    use crate::shard::sessions::BatchResult;

    const LIMITS: TokenLimits = TokenLimits {
        settings: TokenSettings {
            window_ms: 6_000,
            buckets: 6,
            bytes_max: 1 << 20,
            namespaces_max: 4,
        },
        planted: None,
    };

    fn counters() -> Vec<(CounterKey, i128)> {
        let key = |at: i128| CounterKey::new(b"n", at.to_string().as_bytes()).unwrap();
        (0..40).map(|at| (key(at), at * at - 100)).collect()
    }

    fn record(bucket: u64) -> TokenRecord {
        TokenRecord { bucket, fingerprint: 7, values: vec![] }
    }

    /// A shard of all slots, with counters, a session, a record of a request of many, and one of a
    /// single operation in the upper half; and the counts of its rows.
    fn parent(at: u16) -> (ShardState, RowCounts) {
        let mut state = ShardState {
            slots: Slots::ALL,
            applied: Position { seq: Seq(8), ..Position::default() },
            ..ShardState::default()
        };
        let mut counts = RowCounts::new(Slots::ALL, at);
        for (key, value) in counters() {
            let share = digest::share(digest::weight(key.name()), value);
            state.counter_digest = state.counter_digest.wrapping_add(share);
            counts.counter(key.slot(), key.name(), value);
        }
        let result = BatchResult::Applied { values: vec![], tokens: vec![] };
        let session = SessionId(Revision { incarnation: 1, revision: 5 });
        state.sessions.record(session, BatchSeq(1), result);
        for (slot, hash) in [(0, 1), (0xFFFF, 2)] {
            let (id, record) = (RecordId { slot: Slot(slot), hash }, record(3));
            state.tokens.add(&LIMITS, b"n", 3, layout::record_share(id, &record));
            counts.record(id, record);
        }
        // A row whose bucket was dropped does not count.
        counts.record(RecordId { slot: Slot(0), hash: 9 }, record(1));
        (state, counts)
    }

    fn position() -> Position {
        let before = Position { seq: Seq(8), ..Position::default() };
        Entry::after(before, Epoch(2), TimeMs(5), Body::Split { at: 0x8000 }).position()
    }

    #[test]
    fn the_children_are_the_parent() {
        for at in [1, 0x8000, 0xFFFF] {
            let (state, counts) = parent(at);
            let divided = divide(&state, position(), &counts, None).unwrap();
            let (left, right) = (divided.left, divided.right);
            assert_eq!((left.slots.lo, left.slots.hi), (0, at - 1));
            assert_eq!((right.slots.lo, right.slots.hi), (at, 0xFFFF));
            let sum = left.counter_digest.wrapping_add(right.counter_digest);
            assert_eq!(sum, state.counter_digest);
            assert_eq!((&left.sessions, &right.sessions), (&state.sessions, &state.sessions));
            assert_eq!((left.applied, right.applied), (position(), position()));
            assert_eq!((left.divided, right.divided), (Seq(9), Seq(9)));
        }
    }

    #[test]
    fn a_request_of_many_has_its_record_in_both() {
        let (state, counts) = parent(0x8000);
        let divided = divide(&state, position(), &counts, None).unwrap();
        assert_eq!(divided.copied, [(RecordId { slot: Slot(0x8000), hash: 1 }, record(3))]);
        assert_eq!((divided.left.tokens.records(), divided.right.tokens.records()), (1, 2));
        for child in [divided.left, divided.right] {
            let bucket = &child.tokens.live()[&3];
            assert_eq!(bucket.namespaces.values().sum::<u64>(), bucket.bytes);
        }
    }

    #[test]
    fn rows_that_do_not_add_up_are_damage() {
        let (mut state, counts) = parent(0x8000);
        state.counter_digest = state.counter_digest.wrapping_add(1);
        assert_eq!(divide(&state, position(), &counts, None), Err(RowsDiffer));
        let (state, mut counts) = parent(0x8000);
        counts.record(RecordId { slot: Slot(9), hash: 1 }, record(3));
        assert_eq!(divide(&state, position(), &counts, None), Err(RowsDiffer));
    }

    #[test]
    fn a_slot_outside_or_the_first_one_divides_nothing() {
        let slots = Slots { lo: 4, hi: 8 };
        let check = |at, want: Option<(u16, u16)>| {
            let divided = slots_of(slots, at);
            assert_eq!(divided.map(|(left, right)| (left.hi, right.lo)), want);
        };
        check(4, None);
        check(5, Some((4, 5)));
        check(8, Some((7, 8)));
        check(9, None);
        assert_ne!(position().chain, Chain(0));
    }
}
