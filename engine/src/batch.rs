//! A batch: the operations of one gateway worker for one shard, sealed once and then immutable.
//!
//! The worker makes the bytes and their sum; the primary (before ordering), each follower and
//! recovery check the sum; the same bytes go over the wire into every log. No process on the way
//! re-encodes them, so a batch that is sent again is the same batch to the last bit.
//!
//! `sum` = xxh3-64 of the payload as sent, seeded with xxh3-64 of the table fields, so a payload
//! can't be taken for another shard's, session's or number's.

use bytes::Bytes;
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

use crate::codec::{Malformed, Reader, put_bytes, put_varint};
use crate::ids::{BatchSeq, Revision, SessionId, Slots};

/// A batch is closed at this many operations, or at [`BATCH_BYTES_MAX`].
pub const BATCH_OPS_MAX: usize = 4096;
/// A batch is closed at this many bytes of encoded operations, or at [`BATCH_OPS_MAX`].
pub const BATCH_BYTES_MAX: usize = 256 * 1024;
/// The largest batch, in bytes: a request with a token may need so much for its part of one shard.
pub const BATCH_BYTES_LIMIT: usize = 12 * 1024 * 1024;

/// The packing of a payload.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Codec {
    /// The payload as it is.
    Raw = 0,
    /// LZ4 block with its length in front.
    Lz4 = 1,
}

/// A sealed batch: one row of a frame's table, and its slice.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Batch {
    /// The shard, by its range, so that after a split the children know their part.
    pub slots: Slots,
    /// The session of the worker that sealed the batch.
    pub session: SessionId,
    /// The batch's number within its session and shard.
    pub batch_seq: BatchSeq,
    /// The lowest number of this session and shard without an answer from apply: results below it
    /// may be dropped.
    pub answered_below: BatchSeq,
    /// A [`Codec`] as a byte. A newer build may know others.
    pub codec: u8,
    /// The checksum of payload and fields, see the module.
    pub sum: u64,
    /// The operations, packed according to `codec`.
    pub payload: Bytes,
}

impl Batch {
    /// Seals `payload` under the given number.
    pub fn seal(
        slots: Slots,
        session: SessionId,
        batch_seq: BatchSeq,
        answered_below: BatchSeq,
        codec: Codec,
        payload: Bytes,
    ) -> Self {
        let codec = codec as u8;
        let mut batch = Self { slots, session, batch_seq, answered_below, codec, sum: 0, payload };
        batch.sum = batch.computed_sum();
        batch
    }

    /// Returns whether the bytes are the ones that the worker sealed.
    pub fn is_intact(&self) -> bool {
        self.sum == self.computed_sum()
    }

    fn computed_sum(&self) -> u64 {
        let mut fields = [0u8; 41];
        fields[0..2].copy_from_slice(&self.slots.lo.to_le_bytes());
        fields[2..4].copy_from_slice(&self.slots.hi.to_le_bytes());
        fields[4..8].copy_from_slice(&self.session.0.incarnation.to_le_bytes());
        fields[8..16].copy_from_slice(&self.session.0.revision.to_le_bytes());
        fields[16..24].copy_from_slice(&self.batch_seq.0.to_le_bytes());
        fields[24..32].copy_from_slice(&self.answered_below.0.to_le_bytes());
        fields[32] = self.codec;
        fields[33..41].copy_from_slice(&(self.payload.len() as u64).to_le_bytes());
        xxh3_64_with_seed(&self.payload, xxh3_64(&fields))
    }

    /// Appends the encoded batch to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.slots.lo.to_be_bytes());
        out.extend_from_slice(&self.slots.hi.to_be_bytes());
        put_session(out, self.session);
        put_varint(out, self.batch_seq.0);
        put_varint(out, self.answered_below.0);
        out.push(self.codec);
        out.extend_from_slice(&self.sum.to_le_bytes());
        put_bytes(out, &self.payload);
    }

    /// Reads the fields. The error names the field that can't be read. [`Batch::is_intact`] checks
    /// whether the bytes are the ones that were sealed.
    ///
    /// The payload is a copy of its own, never a slice of the input. A batch may stay in its
    /// shard's log for hours, and a slice keeps everything alive that came in with it: a cold
    /// shard's batch of 30 bytes would hold a message of 3 MiB, and the receive buffer behind that
    /// message may be larger still, so no ratio of sizes makes a slice safe. Measured: the copy
    /// takes 6 µs of a batch of 256 KiB, whose operations take 2 ms to decode, and 0.2 µs of one of
    /// 94 bytes.
    pub fn decode(from: &mut Reader) -> Result<Self, Malformed> {
        Ok(Self {
            slots: Slots { lo: from.u16_be("batch slots")?, hi: from.u16_be("batch slots")? },
            session: session(from)?,
            batch_seq: BatchSeq(from.varint("batch number")?),
            answered_below: BatchSeq(from.varint("answered below")?),
            codec: from.u8("batch codec")?,
            sum: from.u64_le("batch sum")?,
            payload: Bytes::copy_from_slice(&from.bytes("batch payload")?),
        })
    }
}

/// Appends a session id to `out`.
pub fn put_session(out: &mut Vec<u8>, session: SessionId) {
    put_revision(out, session.0);
}

/// Reads a session id.
pub fn session(from: &mut Reader) -> Result<SessionId, Malformed> {
    Ok(SessionId(revision(from)?))
}

/// Appends a revision to `out`.
pub fn put_revision(out: &mut Vec<u8>, revision: Revision) {
    put_varint(out, u64::from(revision.incarnation));
    put_varint(out, revision.revision);
}

/// Reads a revision.
pub fn revision(from: &mut Reader) -> Result<Revision, Malformed> {
    Ok(Revision {
        incarnation: from.varint_u32("incarnation")?,
        revision: from.varint("revision")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn batch() -> Batch {
        Batch::seal(
            Slots { lo: 16, hi: 31 },
            SessionId(Revision { incarnation: 1, revision: 7 }),
            BatchSeq(3),
            BatchSeq(3),
            Codec::Raw,
            Bytes::from_static(b"ops"),
        )
    }

    #[test]
    fn round_trips() {
        let mut out = Vec::new();
        batch().encode(&mut out);
        let mut reader = Reader::new(out.into());
        assert_eq!(Batch::decode(&mut reader), Ok(batch()));
        assert!(reader.is_empty());
    }

    /// Each field that names where the operations belong is under the sum.
    #[test]
    fn a_batch_changed_anywhere_is_not_intact() {
        assert!(batch().is_intact());
        assert!(!Batch { slots: Slots { lo: 17, hi: 31 }, ..batch() }.is_intact());
        assert!(!Batch { session: SessionId::default(), ..batch() }.is_intact());
        assert!(!Batch { batch_seq: BatchSeq(4), ..batch() }.is_intact());
        assert!(!Batch { answered_below: BatchSeq(2), ..batch() }.is_intact());
        assert!(!Batch { codec: 1, ..batch() }.is_intact());
        assert!(!Batch { payload: Bytes::from_static(b"opt"), ..batch() }.is_intact());
    }
}
