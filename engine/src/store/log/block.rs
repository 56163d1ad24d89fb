//! Blocks of the log: what one read takes from a segment, and which entries of a shard it contains.

use crate::ids::{Seq, ShardId};
use crate::store::log::scan::LogLocation;

/// `len` bytes of a segment's file from `offset` on: whole groups.
#[derive(Clone, Copy, Debug, Default, Eq, Ord, PartialEq, PartialOrd)]
pub struct Block {
    /// The segment's number.
    pub segment: u64,
    /// The offset in the segment's file.
    pub offset: usize,
    /// The length in bytes.
    pub len: usize,
}

impl Block {
    /// The block's beginning.
    pub fn location(&self) -> LogLocation {
        LogLocation { segment: self.segment, offset: self.offset }
    }
}

/// A range of entries of a shard.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Range {
    /// The shard.
    pub shard: ShardId,
    /// The first seq.
    pub from: Seq,
    /// The last seq.
    pub to: Seq,
}
