//! The rows of the state: keys, values, merges and the shard record. The formats are final, since
//! they are on disk.
//!
//! ```text
//!   1 | slot(2) | namespace 0 key   a counter
//!   2 | slot(2) | H128              an idempotency record
//!   3 | slot_lo(2)                  a shard record
//! ```
//!
//! Integers in keys are big-endian, so a shard is three contiguous ranges. A counter's row is a
//! *value* or an *operand* (a delta to be merged); they carry different tags, so neither is ever
//! taken for the other. Merging is total: it never panics, and bytes that it can't read are
//! reported as [`Malformed`], never folded into a number. The driver turns that into a failed
//! merge, which RocksDB reports as corruption to the reader of the row, which ends the process.
//!
//! A counter of 0 needs no row: an absent one reads as 0. But only an *absolute* 0 may become a
//! delete; a *delta* of 0 changes nothing and is left out.

use std::collections::BTreeMap;

use bytes::Bytes;
use xxhash_rust::xxh3::xxh3_128;

use crate::batch::{put_revision, put_session, revision, session};
use crate::codec::{
    Malformed, Reader, put_bytes, put_varint, put_varint_i128, split_varint_i128, varint_i128_len,
};
use crate::entry::Position;
use crate::ids::{BatchSeq, Chain, CopyNo, Epoch, Seq, ShardId, Slot, Slots, TimeMs};
use crate::key::CounterKey;
use crate::shard::digest;
use crate::shard::idempotency::{Bucket, Buckets, Leap, RecordId, TokenOutcome, TokenRecord};
use crate::shard::sessions::{BatchResult, SessionExpiry, SessionRow, SessionTable};
use crate::shard::state::ShardState;
use crate::store::table::{Cell, SealedTable};

const KIND_COUNTER: u8 = 1;
const KIND_IDEMPOTENCY: u8 = 2;
const KIND_SHARD: u8 = 3;

const TAG_VALUE: u8 = 1;
const TAG_OPERAND: u8 = 2;
/// An expiry (unix milliseconds, varint) follows the number. Nothing sets it yet.
const FLAG_EXPIRY: u8 = 0x10;

const SHARD_FORMAT: u8 = 1;
/// The format of a shard that was split: the seq of the split follows its position.
const SPLIT_SHARD_FORMAT: u8 = 2;
const IDEMPOTENCY_FORMAT: u8 = 1;

// ---- keys

/// The key of a counter's row. `name` is `namespace ‖ 0 ‖ key`.
pub fn counter_key(slot: Slot, name: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(3 + name.len());
    put_counter_key(&mut out, slot, name);
    out
}

fn put_counter_key(out: &mut Vec<u8>, slot: Slot, name: &[u8]) {
    let [high, low] = slot.0.to_be_bytes();
    out.extend_from_slice(&[KIND_COUNTER, high, low]);
    out.extend_from_slice(name);
}

/// The key of an idempotency record: the slot of the counter, or for a part of a batch the first
/// slot of its shard.
pub fn idempotency_key(slot: Slot, hash: u128) -> Vec<u8> {
    let mut out = vec![KIND_IDEMPOTENCY];
    out.extend_from_slice(&slot.0.to_be_bytes());
    out.extend_from_slice(&hash.to_be_bytes());
    out
}

/// The key of a shard's record.
pub fn shard_key(shard: ShardId) -> Vec<u8> {
    let mut out = vec![KIND_SHARD];
    out.extend_from_slice(&shard.0.to_be_bytes());
    out
}

/// A decoded key of the state.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum RowKey {
    /// A counter.
    Counter {
        /// The counter's slot.
        slot: Slot,
        /// The counter's name.
        counter: CounterKey,
    },
    /// An idempotency record.
    Idempotency {
        /// The slot in [`RecordId`].
        slot: Slot,
        /// The hash in [`RecordId`].
        hash: u128,
    },
    /// A shard's record.
    Shard(ShardId),
}

impl RowKey {
    /// Decodes a key, checked to the last byte; a counter must lie at its own slot.
    pub fn decode(key: &[u8]) -> Result<Self, Malformed> {
        let mut from = Reader::new(Bytes::copy_from_slice(key));
        let kind = from.u8("row kind")?;
        let number = from.u16_be("row slot")?;
        match kind {
            KIND_COUNTER => {
                let name = from.take(from.remaining(), "row name")?;
                let counter = CounterKey::from_name(name).map_err(|_| Malformed("row name"))?;
                let slot = Slot(number);
                if counter.slot() != slot {
                    return Err(Malformed("row slot"));
                }
                Ok(Self::Counter { slot, counter })
            }
            KIND_IDEMPOTENCY => {
                let hash = from.take(16, "row hash")?;
                from.finish("row key")?;
                let hash = hash.as_ref().try_into().map_err(|_| Malformed("row hash"))?;
                Ok(Self::Idempotency { slot: Slot(number), hash: u128::from_be_bytes(hash) })
            }
            KIND_SHARD => {
                from.finish("row key")?;
                Ok(Self::Shard(ShardId(number)))
            }
            _ => Err(Malformed("row kind")),
        }
    }
}

/// A range of keys: the first key, and the first key after the range.
pub type KeyRange = (Vec<u8>, Vec<u8>);

/// The ranges of a shard's rows: its counters, its idempotency records, its record. Used to iterate
/// for a snapshot and to delete by range.
pub fn ranges(slots: Slots) -> [KeyRange; 3] {
    [KIND_COUNTER, KIND_IDEMPOTENCY, KIND_SHARD].map(|kind| {
        let [lo, lo_low] = slots.lo.to_be_bytes();
        let end = match slots.hi.checked_add(1) {
            Some(end) => {
                let [high, low] = end.to_be_bytes();
                vec![kind, high, low]
            }
            // No slot follows the last: the next kind does.
            None => vec![kind + 1],
        };
        (vec![kind, lo, lo_low], end)
    })
}

// ---- counters

/// A counter's row that is a value.
pub fn counter_value(value: i128) -> Vec<u8> {
    number(TAG_VALUE, value)
}

/// A counter's row that is to be added to the rows below it.
pub fn counter_operand(delta: i128) -> Vec<u8> {
    number(TAG_OPERAND, delta)
}

fn number(tag: u8, number: i128) -> Vec<u8> {
    let mut out = Vec::with_capacity(1 + varint_i128_len(number));
    put_number(&mut out, tag, number);
    out
}

fn put_number(out: &mut Vec<u8>, tag: u8, number: i128) {
    out.push(tag);
    put_varint_i128(out, number);
}

/// Decodes a counter's value.
pub fn decode_counter(bytes: &[u8]) -> Result<i128, Malformed> {
    decode_number(bytes, TAG_VALUE, "counter value")
}

/// Runs for each row that a compaction merges, so it copies nothing.
fn decode_number(bytes: &[u8], tag: u8, what: &'static str) -> Result<i128, Malformed> {
    let (&head, rest) = bytes.split_first().ok_or(Malformed(what))?;
    if head & !FLAG_EXPIRY != tag {
        return Err(Malformed(what));
    }
    let (number, rest) = split_varint_i128(rest).ok_or(Malformed(what))?;
    if head & FLAG_EXPIRY != 0 {
        // A build that knows expiry wrote it. To fold it away would make a counter live for ever.
        return Err(Malformed("counter expiry: a newer build wrote it"));
    }
    if rest.is_empty() { Ok(number) } else { Err(Malformed(what)) }
}

/// RocksDB's *full* merge: the value of `existing` (0 if absent) plus all operands.
pub fn merge<'a>(
    existing: Option<&[u8]>,
    operands: impl IntoIterator<Item = &'a [u8]>,
) -> Result<Vec<u8>, Malformed> {
    let base = existing.map_or(Ok(0), decode_counter)?;
    Ok(counter_value(fold(base, operands)?))
}

/// RocksDB's *partial* merge: one operand in place of several, with nothing known below.
pub fn merge_operands<'a>(
    operands: impl IntoIterator<Item = &'a [u8]>,
) -> Result<Vec<u8>, Malformed> {
    Ok(counter_operand(fold(0, operands)?))
}

fn fold<'a>(base: i128, operands: impl IntoIterator<Item = &'a [u8]>) -> Result<i128, Malformed> {
    operands.into_iter().try_fold(base, |sum, operand| {
        Ok(sum.wrapping_add(decode_number(operand, TAG_OPERAND, "counter operand")?))
    })
}

// ---- idempotency records

/// Encodes a row of kind 2: format · bucket · fingerprint · values as a byte string.
pub fn encode_record(record: &TokenRecord) -> Vec<u8> {
    let mut out = vec![IDEMPOTENCY_FORMAT];
    put_varint(&mut out, record.bucket);
    out.extend_from_slice(&record.fingerprint.to_le_bytes());
    let mut values = Vec::new();
    record.values.iter().for_each(|&value| put_varint_i128(&mut values, value));
    put_bytes(&mut out, &values);
    out
}

/// Decodes a row of kind 2. The error names the field that can't be read.
pub fn decode_record(bytes: &[u8]) -> Result<TokenRecord, Malformed> {
    let mut from = Reader::new(Bytes::copy_from_slice(bytes));
    if from.u8("idempotency format")? != IDEMPOTENCY_FORMAT {
        return Err(Malformed("idempotency format"));
    }
    let bucket = from.varint("idempotency bucket")?;
    let fingerprint = from.u64_le("idempotency fingerprint")?;
    let mut rest = Reader::new(from.bytes("idempotency values")?);
    from.finish("idempotency record")?;
    let mut values = Vec::new();
    while !rest.is_empty() {
        values.push(rest.varint_i128("idempotency value")?);
    }
    Ok(TokenRecord { bucket, fingerprint, values })
}

/// The slot and the bucket of an idempotency record, from its row alone. `None` if the row is of
/// another kind, or can't be read.
pub fn bucket_of(key: &[u8], value: &[u8]) -> Option<(Slot, u64)> {
    let &[KIND_IDEMPOTENCY, high, low, ..] = key else { return None };
    // The bytes that are needed are copied, and no others, since this runs for each row that a
    // compaction meets.
    let mut from = Reader::new(Bytes::copy_from_slice(value.get(..11).unwrap_or(value)));
    let format = from.u8("idempotency format").ok()?;
    let bucket = from.varint("idempotency bucket").ok()?;
    (format == IDEMPOTENCY_FORMAT).then_some((Slot(u16::from_be_bytes([high, low])), bucket))
}

/// The share of a record in the digest of its bucket, and its bytes. A recount from disk must leave
/// out the rows whose bucket the shard record does not list, since those records do not exist.
pub fn record_share(id: RecordId, record: &TokenRecord) -> (u128, u64) {
    let mut row = idempotency_key(id.slot, id.hash);
    row.extend(encode_record(record));
    (xxh3_128(&row), row.len() as u64)
}

// ---- shard records

/// Encodes a shard's record, for the copy of this number.
pub fn encode_shard(copy: CopyNo, state: &ShardState) -> Vec<u8> {
    let was_split = state.divided != Seq(0);
    let mut out = vec![if was_split { SPLIT_SHARD_FORMAT } else { SHARD_FORMAT }];
    put_varint(&mut out, copy.0);
    put_slots(&mut out, state.slots);
    put_position(&mut out, state.applied);
    if was_split {
        put_varint(&mut out, state.divided.0);
    }
    out.extend_from_slice(&state.counter_digest.to_le_bytes());
    put_sessions(&mut out, &state.sessions);
    put_buckets(&mut out, &state.tokens);
    out
}

/// Decodes a shard's record and the number of its copy. The error names the field that can't be
/// read.
pub fn decode_shard(bytes: &[u8]) -> Result<(CopyNo, ShardState), Malformed> {
    let mut from = Reader::new(Bytes::copy_from_slice(bytes));
    let was_split = match from.u8("shard format")? {
        SHARD_FORMAT => false,
        SPLIT_SHARD_FORMAT => true,
        _ => return Err(Malformed("shard format")),
    };
    let copy = CopyNo(from.varint("copy number")?);
    let state = ShardState {
        slots: slots(&mut from)?,
        applied: position(&mut from)?,
        divided: Seq(if was_split { from.varint("shard split")? } else { 0 }),
        counter_digest: from.u128_le("counter digest")?,
        sessions: sessions(&mut from)?,
        tokens: buckets(&mut from)?,
    };
    from.finish("shard record")?;
    Ok((copy, state))
}

pub(super) fn put_slots(out: &mut Vec<u8>, slots: Slots) {
    out.extend_from_slice(&slots.lo.to_be_bytes());
    out.extend_from_slice(&slots.hi.to_be_bytes());
}

pub(super) fn slots(from: &mut Reader) -> Result<Slots, Malformed> {
    let slots = Slots { lo: from.u16_be("slots")?, hi: from.u16_be("slots")? };
    if slots.lo <= slots.hi { Ok(slots) } else { Err(Malformed("slots")) }
}

pub(super) fn put_position(out: &mut Vec<u8>, position: Position) {
    put_varint(out, position.epoch.0);
    put_varint(out, position.seq.0);
    out.extend_from_slice(&position.chain.0.to_le_bytes());
    put_varint(out, position.time.0);
}

pub(super) fn position(from: &mut Reader) -> Result<Position, Malformed> {
    let position = Position {
        epoch: Epoch(from.varint("position epoch")?),
        seq: Seq(from.varint("position seq")?),
        chain: Chain(from.u64_le("position chain")?),
        time: TimeMs(from.varint("position time")?),
    };
    // The next position of any position must not overflow.
    if position.seq.0 == u64::MAX { Err(Malformed("position seq")) } else { Ok(position) }
}

fn put_sessions(out: &mut Vec<u8>, sessions: &SessionTable) {
    put_revision(out, sessions.expiry.up_to);
    put_varint(out, sessions.expiry.survivors.len() as u64);
    for &id in &sessions.expiry.survivors {
        put_session(out, id);
    }
    put_varint(out, sessions.rows.len() as u64);
    for (&id, row) in &sessions.rows {
        put_session(out, id);
        put_varint(out, row.last.0);
        put_varint(out, row.answered_below.0);
        put_varint(out, row.results.len() as u64);
        for (batch_seq, result) in &row.results {
            put_varint(out, batch_seq.0);
            put_result(out, result);
        }
    }
}

fn sessions(from: &mut Reader) -> Result<SessionTable, Malformed> {
    let up_to = revision(from)?;
    let count = from.count("collected sessions")?;
    let survivors = (0..count).map(|_| session(from)).collect::<Result<_, _>>()?;
    let count = from.count("session rows")?;
    let rows = (0..count)
        .map(|_| Ok((session(from)?, row(from)?)))
        .collect::<Result<BTreeMap<_, _>, Malformed>>()?;
    if rows.len() != count {
        return Err(Malformed("session rows"));
    }
    Ok(SessionTable { expiry: SessionExpiry { up_to, survivors }, rows })
}

fn row(from: &mut Reader) -> Result<SessionRow, Malformed> {
    let last = BatchSeq(from.varint("row last")?);
    let answered_below = BatchSeq(from.varint("row answered below")?);
    let count = from.count("row results")?;
    let results = (0..count)
        .map(|_| Ok((BatchSeq(from.varint("result number")?), result(from)?)))
        .collect::<Result<_, Malformed>>()?;
    Ok(SessionRow { last, answered_below, results })
}

fn put_buckets(out: &mut Vec<u8>, buckets: &Buckets) {
    put_varint(out, buckets.leaps().len() as u64);
    for leap in buckets.leaps() {
        put_varint(out, leap.from.0);
        put_varint(out, leap.step_ms);
    }
    put_varint(out, buckets.live().len() as u64);
    for (&number, bucket) in buckets.live() {
        put_varint(out, number);
        put_varint(out, bucket.records);
        put_varint(out, bucket.bytes);
        put_varint(out, bucket.prolonged_ms);
        out.extend_from_slice(&bucket.digest.to_le_bytes());
        put_varint(out, bucket.namespaces.len() as u64);
        for (&namespace, &bytes) in &bucket.namespaces {
            out.extend_from_slice(&namespace.to_le_bytes());
            put_varint(out, bytes);
        }
    }
}

fn buckets(from: &mut Reader) -> Result<Buckets, Malformed> {
    let count = from.count("idempotency leaps")?;
    let leaps = (0..count).map(|_| leap(from)).collect::<Result<_, Malformed>>()?;
    let count = from.count("idempotency buckets")?;
    let mut live = BTreeMap::new();
    for _ in 0..count {
        let number = from.varint("idempotency bucket")?;
        live.insert(number, bucket(from)?);
    }
    let whole = live.len() == count;
    if whole { Ok(Buckets::new(live, leaps)) } else { Err(Malformed("idempotency buckets")) }
}

fn leap(from: &mut Reader) -> Result<Leap, Malformed> {
    let begin = TimeMs(from.varint("idempotency leap")?);
    Ok(Leap { from: begin, step_ms: from.varint("idempotency leap's step")? })
}

fn bucket(from: &mut Reader) -> Result<Bucket, Malformed> {
    let mut bucket = Bucket {
        records: from.varint("idempotency records")?,
        bytes: from.varint("idempotency bytes")?,
        prolonged_ms: from.varint("idempotency prolonged")?,
        digest: from.u128_le("idempotency digest")?,
        namespaces: BTreeMap::new(),
    };
    let count = from.count("idempotency namespaces")?;
    for _ in 0..count {
        let namespace = from.u64_le("idempotency namespace")?;
        bucket.namespaces.insert(namespace, from.varint("idempotency namespace bytes")?);
    }
    let sum = bucket.namespaces.values().try_fold(0u64, |sum, &bytes| sum.checked_add(bytes));
    let whole = bucket.namespaces.len() == count && sum == Some(bucket.bytes);
    if whole { Ok(bucket) } else { Err(Malformed("idempotency namespaces")) }
}

/// A result without tokens and one with them are of different kinds.
fn put_result(out: &mut Vec<u8>, result: &BatchResult) {
    match result {
        BatchResult::Applied { values, tokens } => {
            out.push(if tokens.is_empty() { 0 } else { 2 });
            put_varint(out, values.len() as u64);
            for &value in values {
                put_varint_i128(out, value);
            }
            if !tokens.is_empty() {
                put_varint(out, tokens.len() as u64);
                out.extend(tokens.iter().map(|&outcome| outcome as u8));
            }
        }
        BatchResult::Malformed => out.push(1),
    }
}

fn result(from: &mut Reader) -> Result<BatchResult, Malformed> {
    match from.u8("result kind")? {
        kind @ (0 | 2) => {
            let count = from.count("result values")?;
            let values = (0..count).map(|_| from.varint_i128("result value"));
            let values = values.collect::<Result<_, _>>()?;
            let tokens = if kind == 2 { outcomes(from)? } else { Vec::new() };
            Ok(BatchResult::Applied { values, tokens })
        }
        1 => Ok(BatchResult::Malformed),
        _ => Err(Malformed("result kind")),
    }
}

fn outcomes(from: &mut Reader) -> Result<Vec<TokenOutcome>, Malformed> {
    let count = from.count("result tokens")?;
    let outcome =
        |_| TokenOutcome::from_byte(from.u8("result token")?).ok_or(Malformed("result token"));
    (0..count).map(outcome).collect()
}

// ---- a flush

/// One row of a flush's file: how it changes the state.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum RowChange<'a> {
    /// Replaces the row.
    Put(&'a [u8]),
    /// Adds an operand to the row.
    Merge(&'a [u8]),
    /// Removes the row.
    Delete,
}

/// Calls `each` for the rows of one flush, in key order: the content of one sorted file. Counters
/// and records of no given shard are left out, since their copy was dropped while they were in the
/// table. Returns the first error of `each`.
pub fn rows<E>(
    sealed: &SealedTable,
    shards: &[(CopyNo, ShardState)],
    mut each: impl FnMut(&[u8], RowChange<'_>) -> Result<(), E>,
) -> Result<(), E> {
    let mut states: Vec<_> = shards.iter().collect();
    states.sort_by_key(|(_, state)| state.slots.lo);
    counter_rows(sealed, &states, &mut each)?;
    for (id, record) in sealed.records() {
        // A record whose bucket has been dropped since does not exist any more.
        if owner(&states, id.slot).is_some_and(|state| state.tokens.is_live(record.bucket)) {
            let row = encode_record(record);
            each(&idempotency_key(id.slot, id.hash), RowChange::Put(&row))?;
        }
    }
    states.iter().try_for_each(|(copy, state)| {
        each(&shard_key(state.slots.shard()), RowChange::Put(&encode_shard(*copy, state)))
    })
}

/// The shard of this slot, out of shards in ascending order.
fn owner<'a>(states: &[&'a (CopyNo, ShardState)], slot: Slot) -> Option<&'a ShardState> {
    let after = states.partition_point(|(_, state)| state.slots.lo <= slot.0);
    let (_, state) = states[after.checked_sub(1)?];
    state.slots.contains(slot).then_some(state)
}

/// The rows of counters. Nothing is allocated for a row: there are millions.
fn counter_rows<E>(
    sealed: &SealedTable,
    states: &[&(CopyNo, ShardState)],
    each: &mut impl FnMut(&[u8], RowChange<'_>) -> Result<(), E>,
) -> Result<(), E> {
    let (mut key, mut value) = (Vec::new(), Vec::new());
    let mut known = None;
    for (slot, name, cell) in sealed.sorted() {
        // The answer for the previous slot is often the one that is needed.
        let is_owned = match known {
            Some((of, answer)) if of == slot => answer,
            _ => owner(states, slot).is_some(),
        };
        known = Some((slot, is_owned));
        if !is_owned {
            continue;
        }
        value.clear();
        if let Some(change) = change(cell, &mut value) {
            key.clear();
            put_counter_key(&mut key, slot, name);
            each(&key, change)?;
        }
    }
    Ok(())
}

fn change(cell: Cell, value: &mut Vec<u8>) -> Option<RowChange<'_>> {
    match cell {
        Cell::Delta(0) => None,
        Cell::Delta(delta) => {
            put_number(value, TAG_OPERAND, delta);
            Some(RowChange::Merge(value))
        }
        Cell::Absolute(0) => Some(RowChange::Delete),
        Cell::Absolute(sum) => {
            put_number(value, TAG_VALUE, sum);
            Some(RowChange::Put(value))
        }
    }
}

/// The digest of these counter rows (key, merged value), as the scrubber recomputes it from disk.
/// [`Malformed`] if a row is not a counter's, or can't be read.
pub fn scrub<'a>(rows: impl IntoIterator<Item = (&'a [u8], &'a [u8])>) -> Result<u128, Malformed> {
    rows.into_iter().try_fold(0u128, |sum, (key, value)| {
        let RowKey::Counter { counter, .. } = RowKey::decode(key)? else {
            return Err(Malformed("counter row"));
        };
        let share = digest::share(digest::weight(counter.name()), decode_counter(value)?);
        Ok(sum.wrapping_add(share))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{Revision, SessionId};
    use crate::key;
    use crate::store::table::Table;
    use crate::store::testing::SplitMix64;

    #[track_caller]
    fn check_merge(existing: Option<i128>, operands: &[i128], want: i128) {
        let existing = existing.map(counter_value);
        let operands: Vec<_> = operands.iter().copied().map(counter_operand).collect();
        let got = merge(existing.as_deref(), operands.iter().map(Vec::as_slice));
        assert_eq!(got, Ok(counter_value(want)));
    }

    #[test]
    fn merging_adds() {
        check_merge(None, &[], 0);
        check_merge(None, &[5, -7], -2);
        check_merge(Some(10), &[5], 15);
        check_merge(Some(i128::MAX), &[1], i128::MIN);
    }

    /// The value is the same, however a compaction groups the operands.
    #[test]
    fn merging_is_associative() {
        let mut random = SplitMix64::new(5);
        for _ in 0..500 {
            let number =
                |random: &mut SplitMix64| i128::from(random.next() as i64) << random.below(64);
            let base = counter_value(number(&mut random));
            let operands: Vec<_> = (0..5).map(|_| counter_operand(number(&mut random))).collect();
            let slices: Vec<_> = operands.iter().map(Vec::as_slice).collect();
            let all = merge(Some(&base), slices.iter().copied()).unwrap();
            let (early, late) = slices.split_at(random.below(6) as usize);
            let early = merge_operands(early.iter().copied()).unwrap();
            let late = merge_operands(late.iter().copied()).unwrap();
            assert_eq!(merge(Some(&base), [&early[..], &late[..]]), Ok(all));
        }
    }

    #[track_caller]
    fn check_corrupt(existing: Option<&[u8]>, operands: &[&[u8]]) {
        assert!(merge(existing, operands.iter().copied()).is_err());
    }

    #[test]
    fn what_is_not_understood_is_never_folded() {
        check_corrupt(Some(&[]), &[]);
        check_corrupt(None, &[&[]]);
        check_corrupt(None, &[&[TAG_OPERAND]]);
        check_corrupt(None, &[&[TAG_OPERAND, 2, 0]]);
        check_corrupt(None, &[&counter_value(1)]);
        check_corrupt(Some(&counter_operand(1)), &[]);
        check_corrupt(Some(&[TAG_VALUE | FLAG_EXPIRY, 2, 9]), &[]);
        check_corrupt(Some(&[0x21, 2]), &[]);
    }

    /// Golden test: these bytes are in databases on disk.
    #[test]
    fn keys_and_counters_never_change() {
        assert_eq!(counter_key(Slot(0x0102), b"ns\0k"), *b"\x01\x01\x02ns\0k");
        let hash = idempotency_key(Slot(3), 7);
        assert_eq!(hash, [&[2, 0, 3][..], &[0; 15], &[7]].concat());
        assert_eq!(shard_key(ShardId(0xfffe)), [3, 0xff, 0xfe]);
        assert_eq!(counter_value(300), [1, 0xd8, 0x04]);
        assert_eq!(counter_operand(-1), [2, 1]);
        let record = TokenRecord { bucket: 1, fingerprint: 2, values: vec![-1, 300] };
        let want = [&[1, 1, 2][..], &[0; 7], &[3, 1, 0xd8, 0x04]].concat();
        assert_eq!(encode_record(&record), want);
        assert_eq!(decode_record(&want), Ok(record));
    }

    /// A row's key, the name of its change, and the bytes of it.
    type Row = (Vec<u8>, (&'static str, Vec<u8>));

    fn put(row: Vec<u8>) -> (&'static str, Vec<u8>) {
        ("put", row)
    }

    fn collected(sealed: &SealedTable, shards: &[(CopyNo, ShardState)]) -> Vec<Row> {
        let mut collected = Vec::new();
        let all = rows(sealed, shards, |key, change| {
            let change = match change {
                RowChange::Put(row) => put(row.to_vec()),
                RowChange::Merge(operand) => ("merge", operand.to_vec()),
                RowChange::Delete => ("delete", vec![]),
            };
            collected.push((key.to_vec(), change));
            Ok::<(), ()>(())
        });
        all.map(|()| collected).expect("nothing fails")
    }

    fn full_state() -> ShardState {
        let session = |revision| SessionId(Revision { incarnation: 1, revision });
        let row = |result| SessionRow {
            last: BatchSeq(4),
            answered_below: BatchSeq(4),
            results: [(BatchSeq(4), result)].into(),
        };
        let applied =
            Position { epoch: Epoch(2), seq: Seq(9), chain: Chain(0x0807), time: TimeMs(77) };
        let up_to = Revision { incarnation: 1, revision: 8 };
        let expiry = SessionExpiry { up_to, survivors: [session(5)].into() };
        let rows = [
            (session(5), row(BatchResult::Applied { values: vec![-1, 300], tokens: vec![] })),
            (session(9), row(BatchResult::Malformed)),
        ];
        ShardState {
            slots: Slots { lo: 16, hi: 31 },
            applied,
            divided: Seq(0),
            counter_digest: 3,
            sessions: SessionTable { expiry, rows: rows.into() },
            tokens: Buckets::default(),
        }
    }

    /// Golden test, field by field.
    #[test]
    fn the_shard_record_never_changes() {
        let want = [
            &[1, 6][..],                         // format, copy
            &[0, 16, 0, 31],                     // slots
            &[2, 9, 7, 8, 0, 0, 0, 0, 0, 0, 77], // applied
            &[3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            &[1, 8, 1, 1, 5],                      // expiry
            &[2],                                  // rows
            &[1, 5, 4, 4, 1, 4, 0, 2, 1, 0xd8, 4], // a row, its values
            &[1, 9, 4, 4, 1, 4, 1],                // a row, malformed
            &[0, 0],                               // leaps, buckets
        ]
        .concat();
        assert_eq!(encode_shard(CopyNo(6), &full_state()), want);
        assert_eq!(decode_shard(&want), Ok((CopyNo(6), full_state())));
    }

    /// Golden test: a shard that was split has the seq of the split behind its position. One that
    /// never was can be read by a build that knows no splits.
    #[test]
    fn the_record_of_a_shard_that_was_split_never_changes() {
        let state = ShardState { divided: Seq(300), ..full_state() };
        let plain = encode_shard(CopyNo(6), &full_state());
        let encoded = encode_shard(CopyNo(6), &state);
        assert_eq!((plain[0], encoded[0]), (1, 2));
        assert_eq!(encoded[1..17], plain[1..17]);
        assert_eq!(encoded[17..19], [0xac, 2]);
        assert_eq!(encoded[19..], plain[17..]);
        assert_eq!(decode_shard(&encoded), Ok((CopyNo(6), state)));
    }

    /// Golden test: tokens add fields, and the fields before them stay as they were.
    #[test]
    fn buckets_and_outcomes_never_change() {
        let mut state = full_state();
        let namespaces = [(0x0102, 60), (0x03, 5)].into();
        let bucket = Bucket { records: 300, bytes: 65, digest: 7, prolonged_ms: 4, namespaces };
        let leap = Leap { from: TimeMs(8), step_ms: 3 };
        state.tokens = Buckets::new([(9, bucket)].into(), vec![leap]);
        let row = state.sessions.rows.values_mut().next().expect("there are two");
        let tokens = vec![TokenOutcome::Replayed, TokenOutcome::Quota];
        row.results = [(BatchSeq(4), BatchResult::Applied { values: vec![1], tokens })].into();
        let encoded = encode_shard(CopyNo(6), &state);
        let tail = [
            &[1, 8, 3, 1, 9, 0xac, 2, 65, 4, 7][..],
            &[0; 15],
            &[2, 3, 0, 0, 0, 0, 0, 0, 0, 5],
            &[2, 1, 0, 0, 0, 0, 0, 0, 60],
        ]
        .concat();
        assert!(encoded.ends_with(&tail), "one bucket: {encoded:?}");
        let result = [1, 5, 4, 4, 1, 4, 2, 1, 2, 2, 1, 4];
        assert!(encoded.windows(12).any(|bytes| bytes == result), "{encoded:?}");
        assert_eq!(decode_shard(&encoded), Ok((CopyNo(6), state)));
    }

    /// Records of a dropped bucket, or of a shard that is not here, are not written.
    #[test]
    fn a_flush_writes_the_records_that_exist() {
        let mut table = Table::new();
        let record = |bucket| TokenRecord { bucket, fingerprint: 0, values: vec![] };
        let id = |slot, hash| RecordId { slot: Slot(slot), hash };
        table.put_record(id(5, 2), record(1));
        table.put_record(id(5, 1), record(1));
        table.put_record(id(6, 3), record(0));
        table.put_record(id(900, 4), record(1));
        table.add(b"ns\0k", key::hash(b"ns\0k"), 1);
        let mut state = ShardState { slots: Slots { lo: 0, hi: 99 }, ..ShardState::default() };
        let settings = crate::shard::idempotency::TokenSettings::default();
        let limits = crate::shard::idempotency::TokenLimits { settings, planted: None };
        state.tokens.add(&limits, b"ns", 1, (0, 40));
        let shards = [(CopyNo(1), state)];
        let sealed = table.seal();
        let rows = collected(&sealed, &shards);
        assert!(rows.windows(2).all(|two| two[0].0 < two[1].0));
        let tokens: Vec<_> = rows.iter().filter(|(key, _)| key[0] == KIND_IDEMPOTENCY).collect();
        let want = |hash| (idempotency_key(Slot(5), hash), put(encode_record(&record(1))));
        assert_eq!(tokens, [&want(1), &want(2)]);
    }

    #[test]
    fn a_cut_or_altered_shard_record_never_panics() {
        let whole = encode_shard(CopyNo(6), &full_state());
        for at in 0..whole.len() {
            assert!(decode_shard(&whole[..at]).is_err(), "cut at {at}");
            for bit in 0..8 {
                let mut altered = whole.clone();
                altered[at] ^= 1 << bit;
                let _ = decode_shard(&altered);
            }
        }
    }

    #[test]
    fn the_ranges_hold_the_shard_and_nothing_else() {
        for slots in
            [Slots { lo: 0, hi: 7 }, Slots { lo: 256, hi: 511 }, Slots { lo: 9, hi: u16::MAX }]
        {
            for slot in [0, 7, 8, 9, 255, 256, 511, 512, u16::MAX] {
                let keys = [
                    counter_key(Slot(slot), b"zz\0\xff"),
                    idempotency_key(Slot(slot), u128::MAX),
                    shard_key(ShardId(slot)),
                ];
                for (key, (begin, end)) in keys.iter().zip(ranges(slots)) {
                    let inside = begin <= *key && *key < end;
                    assert_eq!(inside, slots.contains(Slot(slot)), "{slots:?} {slot} {key:?}");
                }
            }
        }
    }

    #[test]
    fn keys_read_back_and_a_misplaced_counter_is_refused() {
        let counter = CounterKey::new(b"ns", b"k").unwrap();
        let slot = counter.slot();
        let row = counter_key(slot, counter.name());
        assert_eq!(RowKey::decode(&row), Ok(RowKey::Counter { slot, counter: counter.clone() }));
        let misplaced = counter_key(Slot(slot.0 ^ 1), counter.name());
        assert_eq!(RowKey::decode(&misplaced), Err(Malformed("row slot")));
        assert_eq!(
            RowKey::decode(&idempotency_key(Slot(1), 5)),
            Ok(RowKey::Idempotency { slot: Slot(1), hash: 5 })
        );
        assert_eq!(RowKey::decode(&shard_key(ShardId(4))), Ok(RowKey::Shard(ShardId(4))));
        assert_eq!(RowKey::decode(&[9, 0, 0]), Err(Malformed("row kind")));
    }

    #[test]
    fn a_flush_is_sorted_and_leaves_out_what_no_shard_owns() {
        let mut table = Table::new();
        let names: Vec<_> = (0..200).map(|n| format!("ns\0{n}").into_bytes()).collect();
        for (n, name) in names.iter().enumerate() {
            match n % 4 {
                0 => table.add(name, key::hash(name), 5),
                1 => table.add(name, key::hash(name), 0),
                2 => table.set(name, key::hash(name), 0),
                _ => table.set(name, key::hash(name), 9),
            }
        }
        let slots = Slots { lo: 0, hi: 0x7fff };
        let shards = [(CopyNo(1), ShardState { slots, ..ShardState::default() })];
        let sealed = table.seal();
        let rows = collected(&sealed, &shards);
        assert!(rows.windows(2).all(|two| two[0].0 < two[1].0));
        let mut want = BTreeMap::new();
        for (n, name) in names.iter().enumerate() {
            let slot = key::slot_of(key::hash(name));
            let change = match n % 4 {
                0 => ("merge", counter_operand(5)),
                1 => continue,
                2 => ("delete", vec![]),
                _ => put(counter_value(9)),
            };
            if slots.contains(slot) {
                want.insert(counter_key(slot, name), change);
            }
        }
        want.insert(shard_key(ShardId(0)), put(encode_shard(CopyNo(1), &shards[0].1)));
        assert_eq!(rows, want.into_iter().collect::<Vec<_>>());
    }

    #[test]
    fn the_scrubber_finds_the_digest() {
        let row = |key: &str, value| {
            let counter = CounterKey::new(b"ns", key.as_bytes()).unwrap();
            (counter_key(counter.slot(), counter.name()), counter_value(value))
        };
        let rows = [row("a", 5), row("b", -3), row("c", 0)];
        let got = scrub(rows.iter().map(|(key, value)| (&key[..], &value[..])));
        let weigh = |name: &[u8], value| digest::share(digest::weight(name), value);
        assert_eq!(got, Ok(weigh(b"ns\0a", 5).wrapping_add(weigh(b"ns\0b", -3))));
        let bad = [(&rows[0].0[..], &[9u8, 9][..])];
        assert!(scrub(bad).is_err());
    }
}
