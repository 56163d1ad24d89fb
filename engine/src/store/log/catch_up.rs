//! Reading the log for followers that lag, and for entries that are to be carried.
//!
//! ```text
//!   wanted: shard 1 after 40, shard 2 after 7, …  ──▶  Index::next_read  ──▶  BlockRead
//!   the block's bytes  ──▶  BlockRead::parts  ──▶  shard 1: 41 42 43, shard 2: 8
//! ```
//!
//! One block is read at a time, for every shard that wants entries of it. A request names the
//! position that its entries follow, so nothing before them is read, and the answer names it again.
//! An answer without entries means that the log does not contain the next one: there is nothing to
//! wait for.

use std::collections::BTreeMap;

use crate::entry::{Entry, Position};
use crate::ids::{Seq, ShardId};
use crate::store::log::LogRecord;
use crate::store::log::block::{Block, Range};
use crate::store::log::group::Owner;
use crate::store::log::scan::{LogLocation, groups};

/// A request for the entries of a shard that follow a position.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct WantedEntries {
    /// The shard.
    pub shard: ShardId,
    /// The position.
    pub after: Position,
}

/// The log's entries for one request.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct LogPart {
    /// The shard.
    pub shard: ShardId,
    /// The position after which they were wanted.
    pub prev: Position,
    /// The entries from the seq after `prev` on, without a gap. Empty: the log does not contain
    /// that one.
    pub entries: Vec<Entry>,
}

/// The index has an entry there, and the log does not contain it any more: the disk has changed it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Gone {
    /// The segment's number.
    pub segment: u64,
    /// The offset of the block in the segment.
    pub offset: usize,
}

/// One block to be read, and the requests that it serves: made by
/// [`Index::next_read`](super::index::Index::next_read).
#[derive(Clone, Debug)]
pub struct BlockRead {
    /// The block. `None`: the log contains nothing that is wanted.
    pub block: Option<Block>,
    pub(super) wanted: Vec<(Range, WantedEntries)>,
    pub(super) missing: Vec<WantedEntries>,
}

impl BlockRead {
    /// The location from which the next read is to continue: this block, for those whose entries
    /// did not fit into this answer.
    pub fn at(&self) -> LogLocation {
        self.block.map(|block| block.location()).unwrap_or_default()
    }

    /// The entries of each request, until all of them take `bytes_max`, but at least one entry in
    /// total. A request that would get nothing for lack of room gets no answer, and is to be made
    /// again. `bytes`: the block's; `None` if its segment was deleted. [`Gone`] if the block lacks
    /// an entry that the index has.
    pub fn parts(
        self,
        owner: Owner,
        bytes: Option<&[u8]>,
        bytes_max: usize,
    ) -> Result<Vec<LogPart>, Gone> {
        let none =
            |one: WantedEntries| LogPart { shard: one.shard, prev: one.after, entries: Vec::new() };
        let mut out: Vec<LogPart> = self.missing.into_iter().map(none).collect();
        let Some((block, bytes)) = self.block.zip(bytes) else {
            out.extend(self.wanted.into_iter().map(|(_, one)| none(one)));
            return Ok(out);
        };
        let ranges: Vec<_> = self.wanted.iter().map(|(range, _)| *range).collect();
        let held = entries_of(owner, block, bytes, &ranges);
        let mut taken = 0;
        for (range, one) in self.wanted {
            let entries = held.get(&range.shard);
            let mut got = Vec::new();
            let mut next = range.from;
            while next <= range.to
                && let Some(entry) = entries.and_then(|entries| entries.get(&next))
            {
                if taken > 0 && taken + entry.size() > bytes_max {
                    break;
                }
                taken += entry.size();
                next = Seq(next.0.saturating_add(1));
                got.push(entry.clone());
            }
            if got.is_empty() && entries.is_none_or(|entries| !entries.contains_key(&range.from)) {
                return Err(Gone { segment: block.segment, offset: block.offset });
            }
            if !got.is_empty() {
                out.push(LogPart { shard: one.shard, prev: one.after, entries: got });
            }
        }
        Ok(out)
    }
}

/// Entries of one block that are to be written again: selected by
/// [`Index::to_carry`](super::index::Index::to_carry), written by
/// [`LogEncoder::carry`](super::writer::LogEncoder::carry).
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Carry {
    /// The block.
    pub block: Block,
    /// The entries.
    pub ranges: Vec<Range>,
}

impl Carry {
    /// The entries, decoded from the block's bytes. [`Gone`] if the block lacks one of them.
    pub fn entries(&self, owner: Owner, bytes: &[u8]) -> Result<Vec<(ShardId, Entry)>, Gone> {
        let held = entries_of(owner, self.block, bytes, &self.ranges);
        let mut out = Vec::new();
        for range in &self.ranges {
            for seq in range.from.0..=range.to.0 {
                let entry = held.get(&range.shard).and_then(|entries| entries.get(&Seq(seq)));
                let gone = Gone { segment: self.block.segment, offset: self.block.offset };
                out.push((range.shard, entry.ok_or(gone)?.clone()));
            }
        }
        Ok(out)
    }
}

/// The entries of these ranges in a block's bytes. Within the block the last group that contains a
/// position wins.
fn entries_of(
    owner: Owner,
    block: Block,
    bytes: &[u8],
    ranges: &[Range],
) -> BTreeMap<ShardId, BTreeMap<Seq, Entry>> {
    let mut held: BTreeMap<ShardId, BTreeMap<Seq, Entry>> =
        ranges.iter().map(|range| (range.shard, BTreeMap::new())).collect();
    for group in groups(owner, block.segment, block.offset, bytes) {
        for record in group.records {
            let Some(entries) = record.shard().and_then(|shard| held.get_mut(&shard)) else {
                continue;
            };
            match record {
                LogRecord::Append { entry, .. } => drop(entries.insert(entry.seq, entry)),
                LogRecord::Truncate { after, .. } => {
                    entries.split_off(&Seq(after.0.saturating_add(1)));
                }
                LogRecord::Copy { .. } | LogRecord::Drop { .. } => entries.clear(),
                _ => {}
            }
        }
    }
    held
}
