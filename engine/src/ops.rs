//! The codec of operations: the content of a batch's payload.
//!
//! `version 1` · then per operation: `kind` · name (length, bytes) · for adds the delta (zigzag
//! varint). Operations with a token follow a head of their own kind: scope · hash · fingerprint ·
//! issue time · the number of operations.
//!
//! Reading a payload is total. There are two ways to fail, and they must not be confused: bytes
//! that no version of this format could mean are [`OpsError::Malformed`] (every replica skips the
//! batch alike), while a version or kind that a *newer* build may know is [`OpsError::Unknown`]:
//! skipping it would make this replica differ from the newer ones, so the shard must stop.

use bytes::Bytes;

use crate::batch::{Batch, Codec};
use crate::codec::{Malformed, Reader, put_bytes, put_varint, put_varint_i128, varint_i128_len};
use crate::ids::TimeMs;
use crate::key::{CounterKey, NameChecker};
use crate::memory;
use crate::token::{IssueTime, Scope, Tag};

const FORMAT: u8 = 1;
const KIND_ADD: u8 = 0;
const KIND_ADD_RETURNING: u8 = 1;
const KIND_DELETE: u8 = 2;
/// The head of the operations of one token; not an operation.
const KIND_TOKEN: u8 = 3;
/// A flag beside a token's scope: the issue time is the shard's time of arrival.
const ARRIVED: u8 = 2;

/// An unpacked payload is never larger than this, whatever length the packed one states.
pub const UNPACKED_BYTES_MAX: usize = 64 * 1024 * 1024;

/// One change of one counter.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Op {
    /// The counter.
    pub counter: CounterKey,
    /// The change.
    pub kind: OpKind,
}

/// The kinds of change.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum OpKind {
    /// Adds, and returns only that it was applied.
    Add {
        /// A sum of merged i64 deltas, hence i128.
        delta: i128,
    },
    /// Adds, and returns the value after it.
    AddReturning {
        /// As in [`OpKind::Add`].
        delta: i128,
    },
    /// Makes the counter 0 again and returns the value it had.
    Delete,
}

impl OpKind {
    /// Returns whether applying the operation needs the value that it finds, so that this value
    /// must be loaded.
    pub fn loads_value(self) -> bool {
        match self {
            Self::Add { .. } => false,
            Self::AddReturning { .. } | Self::Delete => true,
        }
    }

    /// Returns whether the answer to the operation has a value.
    pub fn returns_value(self) -> bool {
        match self {
            Self::Add { .. } => false,
            Self::AddReturning { .. } | Self::Delete => true,
        }
    }
}

/// A decoded payload: the bytes, which were checked, and what is known of them as a whole. Its
/// operations are read out of the bytes whenever they are needed: a list of them would be many
/// times as large.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Ops {
    payload: Bytes,
    /// An operation needs the value that it finds.
    loads_values: bool,
    /// The operations that have a token: groups in ascending order, apart from each other, none
    /// empty.
    pub tokened: Vec<TokenedOps>,
}

/// One operation of a payload.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct OpRef<'a> {
    /// The counter's name, which was checked.
    pub name: &'a [u8],
    /// The change.
    pub kind: OpKind,
}

/// Operations under one token, applied as a whole or not at all.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct TokenedOps {
    /// The token and the request.
    pub tag: Tag,
    /// When the request was issued.
    pub issued: IssueTime,
    /// The index of the first operation among all of the payload.
    pub first: usize,
    /// The number of operations, at least 1.
    pub count: usize,
}

impl Ops {
    /// Bytes of memory in use, without the payload.
    pub fn bytes(&self) -> usize {
        memory::allocated(self.tokened.capacity() * size_of::<TokenedOps>())
    }

    /// Returns whether applying needs a value or a record of the state.
    pub fn loads(&self) -> bool {
        self.loads_values || !self.tokened.is_empty()
    }

    /// All operations, in order, with a token or without.
    pub fn iter(&self) -> OpsIter<'_> {
        let mut from = Reader::new(&self.payload[..]);
        from.u8("ops format").expect("the payload was checked");
        OpsIter { from }
    }

    /// Returns one of these operations by itself. Its name shares memory with the payload.
    pub fn to_op(&self, op: OpRef<'_>) -> Op {
        let name = self.payload.slice_ref(op.name);
        let counter = CounterKey::from_name(name).expect("the payload was checked");
        Op { counter, kind: op.kind }
    }
}

impl TokenedOps {
    /// Returns the items of these operations, of a list with one item for each operation.
    pub fn of<'a, T>(&self, all: &'a [T]) -> &'a [T] {
        &all[self.first..self.first + self.count]
    }
}

/// The operations of a payload.
#[derive(Clone, Debug)]
pub struct OpsIter<'a> {
    from: Reader<&'a [u8]>,
}

impl<'a> Iterator for OpsIter<'a> {
    type Item = OpRef<'a>;

    fn next(&mut self) -> Option<OpRef<'a>> {
        if self.from.is_empty() {
            return None;
        }
        let op = decode_op(&mut self.from, |from| decode_token(from, 0).map(drop));
        Some(op.expect("the payload was checked when it was decoded"))
    }
}

/// The reason why a payload can't be read. The text names the field.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum OpsError {
    /// No version of the format could mean these bytes: the batch is skipped on every replica.
    Malformed(&'static str),
    /// A newer build may know this version or kind: the shard must stop.
    Unknown(&'static str),
}

impl From<Malformed> for OpsError {
    fn from(malformed: Malformed) -> Self {
        Self::Malformed(malformed.0)
    }
}

/// Starts a payload.
pub fn begin() -> Vec<u8> {
    vec![FORMAT]
}

/// Appends one operation to a payload.
pub fn put(out: &mut Vec<u8>, op: &Op) {
    put_named(out, &op.counter, op.kind);
}

/// Appends operations that were merged into one: the counter of one, the kind of all.
pub fn put_named(out: &mut Vec<u8>, counter: &CounterKey, kind: OpKind) {
    let (kind, delta) = match kind {
        OpKind::Add { delta } => (KIND_ADD, Some(delta)),
        OpKind::AddReturning { delta } => (KIND_ADD_RETURNING, Some(delta)),
        OpKind::Delete => (KIND_DELETE, None),
    };
    out.push(kind);
    put_bytes(out, counter.name());
    if let Some(delta) = delta {
        put_varint_i128(out, delta);
    }
}

/// The number of bytes that [`put`] appends.
pub fn size(op: &Op) -> usize {
    let name = op.counter.name().len();
    let delta = match op.kind {
        OpKind::Add { delta } | OpKind::AddReturning { delta } => varint_i128_len(delta),
        OpKind::Delete => 0,
    };
    1 + varint_i128_len(name as i128) + name + delta
}

/// Appends the head of a token for the next `count` operations.
pub fn put_token(out: &mut Vec<u8>, tag: &Tag, issued: IssueTime, count: usize) {
    let arrived = if matches!(issued, IssueTime::Arrived(_)) { ARRIVED } else { 0 };
    out.extend_from_slice(&[KIND_TOKEN, tag.scope as u8 | arrived]);
    out.extend_from_slice(&tag.hash.to_le_bytes());
    out.extend_from_slice(&tag.fingerprint.to_le_bytes());
    put_varint(out, issued.time().0);
    put_varint(out, count as u64);
}

/// A payload of these operations, all without a token.
pub fn encode(ops: &[Op]) -> Bytes {
    let mut out = begin();
    for op in ops {
        put(&mut out, op);
    }
    out.into()
}

/// Decodes the operations of a batch.
pub fn decode_batch(batch: &Batch) -> Result<Ops, OpsError> {
    decode(unpack(batch)?)
}

/// The bytes that a decoded batch holds beside its payload.
pub fn unpacked_bytes(batch: &Batch) -> usize {
    let packed = batch.codec == Codec::Lz4 as u8;
    let size = packed.then(|| lz4_flex::block::uncompressed_size(&batch.payload));
    size.map_or(0, |size| size.map_or(0, |(len, _)| len))
}

fn unpack(batch: &Batch) -> Result<Bytes, OpsError> {
    if batch.codec == Codec::Raw as u8 {
        return Ok(batch.payload.clone());
    }
    if batch.codec != Codec::Lz4 as u8 {
        return Err(OpsError::Unknown("codec"));
    }
    let (len, packed) = lz4_flex::block::uncompressed_size(&batch.payload)
        .map_err(|_| OpsError::Malformed("lz4 length"))?;
    if len > UNPACKED_BYTES_MAX {
        return Err(OpsError::Malformed("lz4 length"));
    }
    let unpacked =
        lz4_flex::block::decompress(packed, len).map_err(|_| OpsError::Malformed("lz4"))?;
    Ok(unpacked.into())
}

/// Decodes the operations of an unpacked payload.
pub fn decode(payload: Bytes) -> Result<Ops, OpsError> {
    let mut from = Reader::new(&payload[..]);
    if from.u8("ops format")? != FORMAT {
        return Err(OpsError::Unknown("ops format"));
    }
    let mut names = NameChecker::default();
    let (mut count, mut rest_of_group, mut loads_values) = (0, 0, false);
    let mut tokened = Vec::new();
    while !from.is_empty() || rest_of_group > 0 {
        let op = decode_op(&mut from, |from| {
            if rest_of_group > 0 {
                return Err(OpsError::Malformed("token among the ops of another"));
            }
            let token = decode_token(from, count)?;
            rest_of_group = token.count;
            tokened.push(token);
            Ok(())
        })?;
        names.check(op.name).map_err(|_| OpsError::Malformed("op name"))?;
        loads_values |= op.kind.loads_value();
        rest_of_group = rest_of_group.saturating_sub(1);
        count += 1;
    }
    Ok(Ops { payload, loads_values, tokened })
}

fn decode_token(from: &mut Reader<&[u8]>, first: usize) -> Result<TokenedOps, OpsError> {
    let head = from.u8("token scope")?;
    let scope = match head & !ARRIVED {
        0 => Scope::Counter,
        1 => Scope::Batch,
        _ => return Err(OpsError::Unknown("token scope")),
    };
    let hash = from.u128_le("token hash")?;
    let fingerprint = from.u128_le("token fingerprint")?;
    let issued = TimeMs(from.varint("token issue time")?);
    let issued = match head & ARRIVED {
        0 => IssueTime::Stated(issued),
        _ => IssueTime::Arrived(issued),
    };
    let count = from.count("token ops")?;
    if count == 0 || scope == Scope::Counter && count != 1 {
        return Err(OpsError::Malformed("token ops"));
    }
    Ok(TokenedOps { tag: Tag { scope, hash, fingerprint }, issued, first, count })
}

/// Reads one operation. `read_token` reads the head of the token that may stand before it.
fn decode_op<'a>(
    from: &mut Reader<&'a [u8]>,
    read_token: impl FnOnce(&mut Reader<&'a [u8]>) -> Result<(), OpsError>,
) -> Result<OpRef<'a>, OpsError> {
    let mut kind = from.u8("op kind")?;
    if kind == KIND_TOKEN {
        read_token(from)?;
        kind = from.u8("op kind")?;
    }
    match kind {
        KIND_ADD => {
            let name = from.bytes("op name")?;
            Ok(OpRef { name, kind: OpKind::Add { delta: from.varint_i128("delta")? } })
        }
        KIND_ADD_RETURNING => {
            let name = from.bytes("op name")?;
            Ok(OpRef { name, kind: OpKind::AddReturning { delta: from.varint_i128("delta")? } })
        }
        KIND_DELETE => Ok(OpRef { name: from.bytes("op name")?, kind: OpKind::Delete }),
        KIND_TOKEN => Err(OpsError::Malformed("token among the ops of another")),
        _ => Err(OpsError::Unknown("op kind")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{BatchSeq, SessionId, Slots};

    fn ops() -> Vec<Op> {
        let counter = |key: &str| CounterKey::new(b"likes", key.as_bytes()).unwrap();
        vec![
            Op { counter: counter("a"), kind: OpKind::Add { delta: 5 } },
            Op { counter: counter("b"), kind: OpKind::AddReturning { delta: -(1 << 100) } },
            Op { counter: counter("a"), kind: OpKind::Delete },
        ]
    }

    fn read(decoded: Result<Ops, OpsError>) -> (Vec<Op>, Vec<TokenedOps>) {
        let ops = decoded.expect("it can be read");
        (ops.iter().map(|op| ops.to_op(op)).collect(), ops.tokened)
    }

    #[test]
    fn round_trips() {
        assert_eq!(read(decode(encode(&ops()))), (ops(), vec![]));
    }

    /// Golden test: these bytes are in logs on disk.
    #[test]
    fn the_bytes_never_change() {
        let want: &[u8] = &[
            1, 0, 7, b'l', b'i', b'k', b'e', b's', 0, b'a', 10, //
            2, 7, b'l', b'i', b'k', b'e', b's', 0, b'a',
        ];
        assert_eq!(encode(&[ops()[0].clone(), ops()[2].clone()]), want);
    }

    #[test]
    fn a_compressed_payload_reads_the_same() {
        let packed = lz4_flex::block::compress_prepend_size(&encode(&ops()));
        let batch = Batch::seal(
            Slots::ALL,
            SessionId::default(),
            BatchSeq(1),
            BatchSeq(1),
            Codec::Lz4,
            packed.into(),
        );
        assert_eq!(read(decode_batch(&batch)), (ops(), vec![]));
    }

    fn tag(scope: Scope) -> Tag {
        Tag { scope, hash: 0x0102, fingerprint: 3 }
    }

    /// Golden test, and the way back: a batch's part of two operations, and one without a token
    /// behind it.
    #[test]
    fn a_token_stands_before_its_ops() {
        let mut out = begin();
        let issued = IssueTime::Arrived(TimeMs(300));
        put_token(&mut out, &tag(Scope::Batch), issued, 2);
        ops().iter().for_each(|op| put(&mut out, op));
        let head = [
            &[1, 3, 1 | 2, 2, 1][..],
            &[0; 14], // the hash
            &[3],
            &[0; 15],         // the fingerprint
            &[0xac, 2, 2, 0], // issue time, count, the first op's kind
        ];
        assert_eq!(out[..head.concat().len()], head.concat());
        let (first, count) = (0, 2);
        let tokened = vec![TokenedOps { tag: tag(Scope::Batch), issued, first, count }];
        assert_eq!(read(decode(out.into())), (ops(), tokened));
    }

    #[test]
    fn a_token_without_its_ops_or_among_those_of_another_is_malformed() {
        let check = |scope, count, rest: &[&Op], then: bool, want| {
            let mut out = begin();
            put_token(&mut out, &tag(scope), IssueTime::Stated(TimeMs(0)), count);
            rest.iter().for_each(|op| put(&mut out, op));
            if then {
                put_token(&mut out, &tag(scope), IssueTime::Stated(TimeMs(0)), 1);
                put(&mut out, &ops()[0]);
            }
            assert_eq!(decode(out.into()), Err(OpsError::Malformed(want)));
        };
        let op = &ops()[0];
        check(Scope::Batch, 0, &[op], false, "token ops");
        check(Scope::Batch, 2, &[op], false, "op kind");
        check(Scope::Counter, 2, &[op, op], false, "token ops");
        check(Scope::Batch, 2, &[op], true, "token among the ops of another");
    }

    #[test]
    fn the_size_is_what_it_takes() {
        let deltas = [0, -1, 63, 64, -64, -65, i128::from(i64::MIN), i128::MAX, i128::MIN];
        let add = |&delta| Op { kind: OpKind::Add { delta }, ..ops()[0].clone() };
        for op in deltas.iter().map(add).chain(ops()) {
            let mut out = Vec::new();
            put(&mut out, &op);
            assert_eq!(size(&op), out.len(), "{op:?}");
        }
    }

    #[track_caller]
    fn check(bytes: &'static [u8], want: OpsError) {
        assert_eq!(decode(Bytes::from_static(bytes)), Err(want));
    }

    #[test]
    fn what_a_newer_build_may_know_is_not_malformed() {
        check(&[2], OpsError::Unknown("ops format"));
        check(&[1, 9], OpsError::Unknown("op kind"));
    }

    #[test]
    fn nonsense_is_malformed() {
        check(&[], OpsError::Malformed("ops format"));
        check(&[1, 0, 200], OpsError::Malformed("op name"));
        check(&[1, 0, 2, b'a', b'b', 1], OpsError::Malformed("op name"));
    }
}
