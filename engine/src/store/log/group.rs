//! Framing: the header of a segment, the header of a group, and the checks of both.
//!
//! Every sum is seeded with (cluster, store, segment number), so a group of another store, of
//! another segment, or made up by a client inside a key is never taken for one of this segment. A
//! group's header has a sum of its own: if the body of a group was torn, its header still proves
//! what was durable when it was written.

use bytes::Bytes;
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

use crate::codec::{Malformed, Reader};
use crate::ids::StoreId;

/// A segment is full at this size (or after one group).
pub const SEGMENT_BYTES: usize = 64 * 1024 * 1024;

/// The bytes of a segment's header.
pub const SEGMENT_HEADER_BYTES: usize = 64;
/// The bytes of a group's header.
pub const GROUP_HEADER_BYTES: usize = 40;

/// The last byte is the format.
const SEGMENT_MAGIC: [u8; 8] = *b"dkc-log\x01";
const GROUP_MAGIC: [u8; 4] = *b"dkg\x01";

/// The owner of a log: in every segment's header and under every sum.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Owner {
    /// The cluster's uuid.
    pub cluster: u128,
    /// The store.
    pub store: StoreId,
}

impl Owner {
    /// The seed of all sums in a segment.
    fn seed(self, segment: u64) -> u64 {
        let mut bytes = [0u8; 40];
        bytes[..16].copy_from_slice(&self.cluster.to_le_bytes());
        bytes[16..32].copy_from_slice(&self.store.0.to_le_bytes());
        bytes[32..].copy_from_slice(&segment.to_le_bytes());
        xxh3_64(&bytes)
    }
}

/// The header of a segment.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct SegmentHeader {
    /// The owner of the log.
    pub owner: Owner,
    /// The number of the segment.
    pub segment: u64,
    /// The number of the segment's first group.
    pub first_group: u64,
}

impl SegmentHeader {
    /// magic, format (8) · cluster (16) · store (16) · segment (8) · first group (8) · sum (8)
    pub fn encode(&self) -> [u8; SEGMENT_HEADER_BYTES] {
        let mut out = [0u8; SEGMENT_HEADER_BYTES];
        out[..8].copy_from_slice(&SEGMENT_MAGIC);
        out[8..24].copy_from_slice(&self.owner.cluster.to_le_bytes());
        out[24..40].copy_from_slice(&self.owner.store.0.to_le_bytes());
        out[40..48].copy_from_slice(&self.segment.to_le_bytes());
        out[48..56].copy_from_slice(&self.first_group.to_le_bytes());
        let sum = xxh3_64(&out[..56]);
        out[56..].copy_from_slice(&sum.to_le_bytes());
        out
    }

    /// Decodes a header. [`Malformed`] if the bytes are not an intact one.
    pub fn decode(bytes: &Bytes) -> Result<Self, Malformed> {
        let head = bytes.get(..SEGMENT_HEADER_BYTES).ok_or(Malformed("segment header"))?;
        let mut from = Reader::new(Bytes::copy_from_slice(head));
        if from.take(8, "segment magic")? != SEGMENT_MAGIC[..] {
            return Err(Malformed("segment magic"));
        }
        let header = Self {
            owner: Owner {
                cluster: from.u128_le("segment cluster")?,
                store: StoreId(from.u128_le("segment store")?),
            },
            segment: from.u64_le("segment number")?,
            first_group: from.u64_le("segment first group")?,
        };
        if from.u64_le("segment sum")? != xxh3_64(&head[..56]) {
            return Err(Malformed("segment sum"));
        }
        Ok(header)
    }
}

/// A group's header whose sum is correct.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct GroupHeader {
    /// The number of the group.
    pub number: u64,
    /// The last group that was known to be durable when this one was written.
    pub synced_through: u64,
    /// The bytes of the body.
    pub len: u32,
    body_sum: u64,
}

/// The bytes of one group: magic, format (4) · length (4) · number (8) · synced_through (8) · sum
/// of the body (8) · sum of the header (8) · body.
pub fn encode_group(
    owner: Owner,
    segment: u64,
    number: u64,
    synced_through: u64,
    body: &[u8],
) -> Vec<u8> {
    let len = u32::try_from(body.len()).expect("a message, and so a group, is far below 4 GiB");
    let seed = owner.seed(segment);
    let mut out = Vec::with_capacity(GROUP_HEADER_BYTES + body.len());
    out.extend_from_slice(&GROUP_MAGIC);
    out.extend_from_slice(&len.to_le_bytes());
    out.extend_from_slice(&number.to_le_bytes());
    out.extend_from_slice(&synced_through.to_le_bytes());
    out.extend_from_slice(&xxh3_64_with_seed(body, seed).to_le_bytes());
    out.extend_from_slice(&xxh3_64_with_seed(&out, seed).to_le_bytes());
    out.extend_from_slice(body);
    out
}

/// The header at `at`, if there is an intact one. Its body may still be damaged.
pub fn header_at(owner: Owner, segment: u64, bytes: &[u8], at: usize) -> Option<GroupHeader> {
    let head = bytes.get(at..at.checked_add(GROUP_HEADER_BYTES)?)?;
    if head[..4] != GROUP_MAGIC {
        return None;
    }
    let mut from = Reader::new(Bytes::copy_from_slice(&head[4..]));
    let header = (|| {
        Ok::<_, Malformed>((
            GroupHeader {
                len: from.u32_le("group length")?,
                number: from.u64_le("group number")?,
                synced_through: from.u64_le("group synced through")?,
                body_sum: from.u64_le("group body sum")?,
            },
            from.u64_le("group header sum")?,
        ))
    })();
    let (header, sum) = header.ok()?;
    (sum == xxh3_64_with_seed(&head[..32], owner.seed(segment))).then_some(header)
}

/// The body of the group whose header is at `at`, if it is intact.
pub fn body_at(
    owner: Owner,
    segment: u64,
    bytes: &[u8],
    at: usize,
    header: GroupHeader,
) -> Option<&[u8]> {
    let begin = at.checked_add(GROUP_HEADER_BYTES)?;
    let body = bytes.get(begin..begin.checked_add(usize::try_from(header.len).ok()?)?)?;
    (xxh3_64_with_seed(body, owner.seed(segment)) == header.body_sum).then_some(body)
}

/// The next offset from `at` on where a group may begin.
pub fn next_magic(bytes: &[u8], at: usize) -> Option<usize> {
    let rest = bytes.get(at..)?;
    rest.windows(GROUP_MAGIC.len()).position(|four| four == GROUP_MAGIC).map(|found| at + found)
}
