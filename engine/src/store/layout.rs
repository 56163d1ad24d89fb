//! Rows of the state: keys, values, merges and the shard record. Final: they are on disk.
//!
//! ```text
//!   1 | slot(2) | namespace 0 key   a counter
//!   2 | slot(2) | H128              an idempotency record
//!   3 | slot_lo(2)                  a shard record
//! ```
//!
//! Integers in keys are big-endian, so a shard is three contiguous ranges. A counter's row is a
//! *value* or an *operand* (a delta to be merged); they carry different tags, so neither is ever
//! taken for the other. Merging is total: it never panics, and bytes that it does not understand
//! are told as [`Malformed`], never folded into a number. The driver turns that into a failed merge,
//! which RocksDB reports as corruption to whoever reads the row, which ends the process.
//!
//! A counter of 0 needs no row: an absent one reads as 0. But only an *absolute* 0 may become a
//! delete; a *delta* of 0 changes nothing and is left out.

use std::collections::BTreeMap;

use bytes::Bytes;

use crate::apply::ShardState;
use crate::batch::{put_revision, put_session, revision, session};
use crate::codec::{Malformed, Reader, put_bytes, put_varint, put_varint_i128};
use crate::digest;
use crate::entry::Position;
use crate::ids::{Bseq, Chain, CopyNo, Epoch, Seq, ShardId, Slot, Slots, TimeMs};
use crate::key::CounterKey;
use crate::sessions::{BatchResult, Collection, Row, Sessions};
use crate::store::table::{Cell, Frozen};

const KIND_COUNTER: u8 = 1;
const KIND_IDEMPOTENCY: u8 = 2;
const KIND_SHARD: u8 = 3;

const TAG_VALUE: u8 = 1;
const TAG_OPERAND: u8 = 2;
/// An expiry (unix milliseconds, varint) follows the number. Nothing sets it yet.
const FLAG_EXPIRY: u8 = 0x10;

const SHARD_FORMAT: u8 = 1;
const IDEMPOTENCY_FORMAT: u8 = 1;

// ---- keys

/// Key of a counter's row. `name` is `namespace ‖ 0 ‖ key`.
pub fn counter_key(slot: Slot, name: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(3 + name.len());
    out.push(KIND_COUNTER);
    out.extend_from_slice(&slot.0.to_be_bytes());
    out.extend_from_slice(name);
    out
}

/// Key of an idempotency record: the slot of the counter, or of a batch part its shard's first.
pub fn idempotency_key(slot: Slot, hash: u128) -> Vec<u8> {
    let mut out = vec![KIND_IDEMPOTENCY];
    out.extend_from_slice(&slot.0.to_be_bytes());
    out.extend_from_slice(&hash.to_be_bytes());
    out
}

/// Key of a shard's record.
pub fn shard_key(shard: ShardId) -> Vec<u8> {
    let mut out = vec![KIND_SHARD];
    out.extend_from_slice(&shard.0.to_be_bytes());
    out
}

/// What a key of the state names.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum RowKey {
    Counter { slot: Slot, counter: CounterKey },
    Idempotency { slot: Slot, hash: u128 },
    Shard(ShardId),
}

impl RowKey {
    /// Reads a key, checked to the last byte: also that a counter lies at its own slot.
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

/// First key, and the first key that is no longer of it.
pub type KeyRange = (Vec<u8>, Vec<u8>);

/// Everything a shard owns: its counters, its idempotency records, its record. To iterate for a
/// snapshot, or to delete by range.
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

/// A counter's row that stands for itself.
pub fn counter_value(value: i128) -> Vec<u8> {
    number(TAG_VALUE, value)
}

/// A counter's row that is to be added to what lies below.
pub fn counter_operand(delta: i128) -> Vec<u8> {
    number(TAG_OPERAND, delta)
}

fn number(tag: u8, number: i128) -> Vec<u8> {
    let mut out = Vec::with_capacity(6);
    out.push(tag);
    put_varint_i128(&mut out, number);
    out
}

/// Reads a counter's value.
pub fn decode_counter(bytes: &[u8]) -> Result<i128, Malformed> {
    decode_number(bytes, TAG_VALUE, "counter value")
}

fn decode_number(bytes: &[u8], tag: u8, what: &'static str) -> Result<i128, Malformed> {
    let mut from = Reader::new(Bytes::copy_from_slice(bytes));
    let head = from.u8(what)?;
    if head & !FLAG_EXPIRY != tag {
        return Err(Malformed(what));
    }
    let number = from.varint_i128(what)?;
    if head & FLAG_EXPIRY != 0 {
        // A build that knows expiry wrote it. To fold it away would make a counter live for ever.
        return Err(Malformed("counter expiry: a newer build wrote it"));
    }
    from.finish(what)?;
    Ok(number)
}

/// What RocksDB's *full* merge gives: the value of `existing` (none is 0) and all operands on it.
pub fn merge<'a>(
    existing: Option<&[u8]>,
    operands: impl IntoIterator<Item = &'a [u8]>,
) -> Result<Vec<u8>, Malformed> {
    let base = existing.map_or(Ok(0), decode_counter)?;
    Ok(counter_value(fold(base, operands)?))
}

/// What RocksDB's *partial* merge gives: one operand in place of several, nothing known below.
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

/// What was done under a client's token. `result` is for whoever applies it to read.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct IdempotencyRecord {
    pub bucket: u64,
    pub fingerprint: u128,
    pub result: Bytes,
}

impl IdempotencyRecord {
    pub fn encode(&self) -> Vec<u8> {
        let mut out = vec![IDEMPOTENCY_FORMAT];
        put_varint(&mut out, self.bucket);
        out.extend_from_slice(&self.fingerprint.to_le_bytes());
        put_bytes(&mut out, &self.result);
        out
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut from = Reader::new(Bytes::copy_from_slice(bytes));
        if from.u8("idempotency format")? != IDEMPOTENCY_FORMAT {
            return Err(Malformed("idempotency format"));
        }
        let record = Self {
            bucket: from.varint("idempotency bucket")?,
            fingerprint: from.u128_le("idempotency fingerprint")?,
            result: from.bytes("idempotency result")?,
        };
        from.finish("idempotency record")?;
        Ok(record)
    }
}

// ---- shard records

/// A shard's record, for the copy of this number.
pub fn encode_shard(copy: CopyNo, state: &ShardState) -> Vec<u8> {
    let mut out = vec![SHARD_FORMAT];
    put_varint(&mut out, copy.0);
    put_slots(&mut out, state.slots);
    put_position(&mut out, state.applied);
    out.extend_from_slice(&state.counter_digest.to_le_bytes());
    put_sessions(&mut out, &state.sessions);
    // Live idempotency buckets: none yet.
    put_varint(&mut out, 0);
    out
}

pub fn decode_shard(bytes: &[u8]) -> Result<(CopyNo, ShardState), Malformed> {
    let mut from = Reader::new(Bytes::copy_from_slice(bytes));
    if from.u8("shard format")? != SHARD_FORMAT {
        return Err(Malformed("shard format"));
    }
    let copy = CopyNo(from.varint("copy number")?);
    let state = ShardState {
        slots: slots(&mut from)?,
        applied: position(&mut from)?,
        counter_digest: from.u128_le("counter digest")?,
        sessions: sessions(&mut from)?,
    };
    if from.varint("idempotency buckets")? != 0 {
        return Err(Malformed("idempotency buckets"));
    }
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
    Ok(Position {
        epoch: Epoch(from.varint("position epoch")?),
        seq: Seq(from.varint("position seq")?),
        chain: Chain(from.u64_le("position chain")?),
        time: TimeMs(from.varint("position time")?),
    })
}

fn put_sessions(out: &mut Vec<u8>, sessions: &Sessions) {
    put_revision(out, sessions.collection.r);
    put_varint(out, sessions.collection.l.len() as u64);
    for &id in &sessions.collection.l {
        put_session(out, id);
    }
    put_varint(out, sessions.rows.len() as u64);
    for (&id, row) in &sessions.rows {
        put_session(out, id);
        put_varint(out, row.last.0);
        put_varint(out, row.answered_below.0);
        put_varint(out, row.results.len() as u64);
        for (&bseq, result) in &row.results {
            put_varint(out, bseq.0);
            put_result(out, result);
        }
    }
}

fn sessions(from: &mut Reader) -> Result<Sessions, Malformed> {
    let r = revision(from)?;
    let count = from.count("collected sessions")?;
    let l = (0..count).map(|_| session(from)).collect::<Result<_, _>>()?;
    let count = from.count("session rows")?;
    let rows = (0..count)
        .map(|_| Ok((session(from)?, row(from)?)))
        .collect::<Result<BTreeMap<_, _>, Malformed>>()?;
    if rows.len() != count {
        return Err(Malformed("session rows"));
    }
    Ok(Sessions { collection: Collection { r, l }, rows })
}

fn row(from: &mut Reader) -> Result<Row, Malformed> {
    let last = Bseq(from.varint("row last")?);
    let answered_below = Bseq(from.varint("row answered below")?);
    let count = from.count("row results")?;
    let results = (0..count)
        .map(|_| Ok((Bseq(from.varint("result number")?), result(from)?)))
        .collect::<Result<_, Malformed>>()?;
    Ok(Row { last, answered_below, results })
}

fn put_result(out: &mut Vec<u8>, result: &BatchResult) {
    match result {
        BatchResult::Applied { values } => {
            out.push(0);
            put_varint(out, values.len() as u64);
            for &value in values {
                put_varint_i128(out, value);
            }
        }
        BatchResult::Malformed => out.push(1),
    }
}

fn result(from: &mut Reader) -> Result<BatchResult, Malformed> {
    match from.u8("result kind")? {
        0 => {
            let count = from.count("result values")?;
            let values = (0..count).map(|_| from.varint_i128("result value"));
            Ok(BatchResult::Applied { values: values.collect::<Result<_, _>>()? })
        }
        1 => Ok(BatchResult::Malformed),
        _ => Err(Malformed("result kind")),
    }
}

// ---- a flush

/// One row of a flush's file.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Change {
    Put(Vec<u8>),
    Merge(Vec<u8>),
    Delete,
}

/// The rows of one flush, in key order: what one sorted file holds. Counters of no given shard are
/// left out: their copy was dropped while they lay in the table.
pub fn rows<'a>(
    frozen: &'a Frozen,
    shards: &'a [(CopyNo, ShardState)],
) -> impl Iterator<Item = (Vec<u8>, Change)> + 'a {
    let owned = |slot: Slot| shards.iter().any(|(_, state)| state.slots.contains(slot));
    let mut known = None;
    let counters = frozen
        .sorted()
        .filter(move |&(slot, _, _)| {
            // Sorted by slot, so the answer for the slot before is nearly always the one asked for.
            match known {
                Some((asked, answer)) if asked == slot => answer,
                _ => {
                    let answer = owned(slot);
                    known = Some((slot, answer));
                    answer
                }
            }
        })
        .filter_map(|(slot, name, cell)| Some((counter_key(slot, name), change(cell)?)));
    let mut records: Vec<_> = shards.iter().collect();
    records.sort_by_key(|(_, state)| state.slots.lo);
    let records = records.into_iter().map(|(copy, state)| {
        (shard_key(state.slots.shard()), Change::Put(encode_shard(*copy, state)))
    });
    counters.chain(records)
}

fn change(cell: Cell) -> Option<Change> {
    match cell {
        Cell::Delta(0) => None,
        Cell::Delta(delta) => Some(Change::Merge(counter_operand(delta))),
        Cell::Absolute(0) => Some(Change::Delete),
        Cell::Absolute(value) => Some(Change::Put(counter_value(value))),
    }
}

/// The digest of these counter rows (key, merged value), as the scrubber recomputes it from disk.
pub fn scrub<'a>(rows: impl IntoIterator<Item = (&'a [u8], &'a [u8])>) -> Result<u128, Malformed> {
    rows.into_iter().try_fold(0u128, |sum, (key, value)| {
        let RowKey::Counter { counter, .. } = RowKey::decode(key)? else {
            return Err(Malformed("counter row"));
        };
        let share = digest::share(digest::weight(counter.name()), decode_counter(value)?);
        Ok(sum.wrapping_add(share))
    })
}
