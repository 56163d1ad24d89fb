//! The index of the log: which bytes contain which entries, and so which segments may be deleted,
//! which entries are to be carried, and where to read.
//!
//! Each segment is cut into blocks of about a megabyte. For each shard the index has the ranges of
//! seqs whose *latest* version of the *present* copy is in a block. A truncation, a new copy or a
//! drop removes ranges, and so does carrying an entry into a newer segment: a range that is left is
//! what a reader wants, and what keeps its segment.
//!
//! Segments are deleted *oldest first*, without a gap, and only once the first group of the next
//! one is durable, since that group repeats the promises, copies and identity of the deleted ones.

use std::collections::BTreeMap;

use crate::ids::{Seq, ShardId};
use crate::store::log::LogRecord;
use crate::store::log::block::{Block, Range};
use crate::store::log::catch_up::{BlockRead, Carry, WantedEntries};
use crate::store::log::group::SEGMENT_HEADER_BYTES;
use crate::store::log::scan::{Group, LogLocation};

/// A block is closed at this size by default: the least that a reader reads.
pub const BLOCK_BYTES: usize = 1024 * 1024;

/// The part of a shard's log that is still needed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Needed {
    /// The shard.
    pub shard: ShardId,
    /// The seq up to which the shard's changes are flushed.
    pub flushed: Seq,
    /// The seq up to which they are applied: the next flush contains them.
    pub applied: Seq,
    /// The seq up to which they are durable on every member and learner.
    pub members: Seq,
}

/// The index of one log.
#[derive(Clone, Debug)]
pub struct Index {
    block_bytes: usize,
    segments: BTreeMap<u64, Segment>,
    shards: BTreeMap<ShardId, Ranges>,
}

#[derive(Clone, Debug, Default)]
struct Segment {
    /// The number of its first group. `None`: no group of it is known.
    first_group: Option<u64>,
    /// The blocks in order: offset and length.
    blocks: Vec<(usize, usize)>,
}

/// The ranges of one shard, by the first seq of each. They do not overlap.
#[derive(Clone, Debug, Default)]
struct Ranges {
    /// The highest seq: an entry at or below it was written again.
    last: Seq,
    by_first: BTreeMap<Seq, IndexedRange>,
}

/// A range of seqs in one block.
#[derive(Clone, Copy, Debug)]
struct IndexedRange {
    to: Seq,
    segment: u64,
    block: usize,
    /// The bytes of its entries, about: a range that was cut keeps its share.
    bytes: usize,
}

impl Segment {
    /// The end of its content: an empty segment has its header.
    fn end(&self) -> usize {
        self.blocks.last().map_or(SEGMENT_HEADER_BYTES, |(offset, len)| offset + len)
    }
}

impl Ranges {
    fn at(&self, seq: Seq) -> Option<(Seq, IndexedRange)> {
        let (&first, &held) = self.by_first.range(..=seq).next_back()?;
        (seq <= held.to).then_some((first, held))
    }

    /// The ranges above `seq`, oldest first.
    fn above(&self, seq: Seq) -> impl Iterator<Item = (Seq, IndexedRange)> {
        let next = Seq(seq.0.saturating_add(1));
        let cut = self.at(seq).filter(|(_, held)| held.to > seq).map(|(_, held)| (next, held));
        let rest = self.by_first.range(next..).map(|(&first, &held)| (first, held));
        cut.into_iter().chain(rest)
    }

    fn append(&mut self, seq: Seq, bytes: usize, segment: u64, block: usize) {
        if seq <= self.last {
            self.cut_out(seq);
        }
        self.last = self.last.max(seq);
        if let Some((_, held)) = self.by_first.range_mut(..seq).next_back()
            && held.to.0.checked_add(1) == Some(seq.0)
            && (held.segment, held.block) == (segment, block)
        {
            held.to = seq;
            held.bytes += bytes;
            return;
        }
        self.by_first.insert(seq, IndexedRange { to: seq, segment, block, bytes });
    }

    /// Notes that the entry was written again: an older block no longer holds it.
    fn cut_out(&mut self, seq: Seq) {
        let Some((first, held)) = self.at(seq) else { return };
        self.by_first.remove(&first);
        let share = |from: Seq, to: Seq| {
            let (part, whole) = (to.0 - from.0 + 1, held.to.0 - first.0 + 1);
            (held.bytes as u128 * u128::from(part) / u128::from(whole)) as usize
        };
        if first < seq {
            let to = seq.prev();
            self.by_first.insert(first, IndexedRange { to, bytes: share(first, to), ..held });
        }
        if seq < held.to {
            let next = seq.next();
            self.by_first.insert(next, IndexedRange { bytes: share(next, held.to), ..held });
        }
    }

    /// Entries above `after` are void.
    fn forget(&mut self, after: Seq) {
        self.last = self.last.min(after);
        self.by_first.split_off(&Seq(after.0.saturating_add(1)));
        if let Some((_, held)) = self.by_first.iter_mut().next_back() {
            held.to = held.to.min(after);
        }
    }
}

impl Default for Index {
    fn default() -> Self {
        Self::new(BLOCK_BYTES)
    }
}

impl Index {
    /// An empty index, whose blocks are closed at this size.
    pub fn new(block_bytes: usize) -> Self {
        Self { block_bytes, segments: BTreeMap::new(), shards: BTreeMap::new() }
    }

    /// Notes a group found by recovery.
    pub fn group(&mut self, group: &Group) {
        self.begin(group.segment, group.offset, group.len, group.number);
        for record in &group.records {
            self.record(group.segment, record);
        }
    }

    /// Notes that a segment exists, with groups in it or without. One that a crash left empty must
    /// be deleted in its turn like any other: left behind, it would look as if those after it had
    /// been lost.
    pub fn segment(&mut self, segment: u64) {
        self.segments.entry(segment).or_default();
    }

    /// Notes that a group begins here; its records follow.
    pub fn begin(&mut self, segment: u64, offset: usize, len: usize, group: u64) {
        let block_bytes = self.block_bytes;
        let segment = self.segments.entry(segment).or_default();
        segment.first_group.get_or_insert(group);
        match segment.blocks.last_mut() {
            Some((begin, held)) if *held < block_bytes && *begin + *held == offset => *held += len,
            _ => segment.blocks.push((offset, len)),
        }
    }

    /// Notes a record of the group that was begun last.
    pub fn record(&mut self, segment: u64, record: &LogRecord) {
        match record {
            LogRecord::Append { shard, entry } => {
                self.append(segment, *shard, entry.seq, entry.size());
            }
            LogRecord::Truncate { shard, after } => self.forget(*shard, *after),
            LogRecord::Copy { shard, .. } | LogRecord::Drop { shard, .. } => {
                self.forget(*shard, Seq(0))
            }
            LogRecord::Promise { .. }
            | LogRecord::Suspect { .. }
            | LogRecord::ActedOn(_)
            | LogRecord::Identity(_)
            | LogRecord::Etcd(_)
            | LogRecord::Checkpoint { .. } => {}
        }
    }

    fn append(&mut self, segment: u64, shard: ShardId, seq: Seq, bytes: usize) {
        let blocks = self.segments.get(&segment).map_or(0, |segment| segment.blocks.len());
        let Some(block) = blocks.checked_sub(1) else { return };
        self.shards.entry(shard).or_default().append(seq, bytes, segment, block);
    }

    /// Notes that entries of the shard above `after` are void.
    pub fn forget(&mut self, shard: ShardId, after: Seq) {
        if let Some(ranges) = self.shards.get_mut(&shard) {
            ranges.forget(after);
            if ranges.by_first.is_empty() && after == Seq(0) {
                self.shards.remove(&shard);
            }
        }
    }

    /// All blocks of groups, oldest first: location and length.
    pub fn blocks(&self) -> Vec<(LogLocation, usize)> {
        let of_segment = |(&segment, held): (&u64, &Segment)| -> Vec<(LogLocation, usize)> {
            held.blocks
                .iter()
                .map(|&(offset, len)| (LogLocation { segment, offset }, len))
                .collect()
        };
        self.segments.iter().flat_map(of_segment).collect()
    }

    /// The bytes in use, by all segments.
    pub fn bytes(&self) -> usize {
        self.segments.values().map(Segment::end).sum()
    }

    /// Returns whether the log is longer than `bytes_max`, without the segment that is being
    /// written: that one can't be deleted, however small the limit is beside it.
    pub fn exceeds(&self, bytes_max: usize) -> bool {
        let open = self.segments.values().next_back().map_or(0, Segment::end);
        self.bytes() - open > bytes_max
    }

    /// The segments that may be deleted, oldest first. Within `log_keep_bytes` entries are kept for
    /// members that lack them; beyond, only for this store's own recovery. A shard that `needed`
    /// does not name is needed whole. `durable`: the last group known durable.
    pub fn trimmable(&self, needed: &[Needed], log_keep_bytes: usize, durable: u64) -> Vec<u64> {
        let needed = by_shard(needed);
        let mut bytes = self.bytes();
        let mut out = Vec::new();
        let mut segments = self.segments.iter().peekable();
        while let Some((&segment, held)) = segments.next() {
            let Some((next, _)) = segments.peek() else { break };
            let for_members = bytes <= log_keep_bytes;
            if !self.is_restated(**next, durable) || self.keeps(segment, &needed, for_members) {
                break;
            }
            bytes -= held.end();
            out.push(segment);
        }
        out
    }

    /// Returns whether the content of earlier segments is repeated, durably, from this one on. A
    /// segment without a group repeats nothing: the one after it does.
    fn is_restated(&self, segment: u64, durable: u64) -> bool {
        let mut groups = self.segments.range(segment..).filter_map(|(_, held)| held.first_group);
        groups.next().is_some_and(|first| first <= durable)
    }

    /// Returns whether something in this segment is needed.
    fn keeps(&self, segment: u64, needed: &BTreeMap<ShardId, Needed>, for_members: bool) -> bool {
        self.shards.iter().any(|(shard, ranges)| {
            let flushed = needed.get(shard).map_or(Seq(0), |one| match for_members {
                true => one.flushed.min(one.members),
                false => one.flushed,
            });
            ranges.above(flushed).any(|(_, held)| held.segment == segment)
        })
    }

    /// The entries to write again so that the oldest segment may be deleted, block by block: those
    /// that no flush covers, of copies that apply nothing (the tail of a frozen shard, a copy that
    /// waits to be replaced). Empty while the log is within `log_keep_bytes`, while a flush
    /// suffices, or if most of the log is of that kind: carrying would never end.
    pub fn to_carry(&self, needed: &[Needed], log_keep_bytes: usize) -> Vec<Carry> {
        let mut out = Vec::new();
        let Some((&oldest, segment)) = self.segments.first_key_value() else { return out };
        if self.segments.len() == 1 || self.bytes() <= log_keep_bytes {
            return out;
        }
        let needed = by_shard(needed);
        let mut by_block: BTreeMap<usize, Vec<Range>> = BTreeMap::new();
        let mut stuck_bytes = 0;
        for (&shard, ranges) in &self.shards {
            let Some(one) = needed.get(&shard) else { return out };
            stuck_bytes += ranges.above(one.applied).map(|(_, held)| held.bytes).sum::<usize>();
            for (from, held) in ranges.above(one.flushed).filter(|held| held.1.segment == oldest) {
                if from <= one.applied {
                    return out; // The next flush takes it over.
                }
                let range = Range { shard, from, to: held.to };
                by_block.entry(held.block).or_default().push(range);
            }
        }
        if stuck_bytes <= self.bytes() / 2 {
            let block = |at: usize| {
                let (offset, len) = segment.blocks[at];
                Block { segment: oldest, offset, len }
            };
            let carry = |(at, ranges)| Carry { block: block(at), ranges };
            out.extend(by_block.into_iter().map(carry));
        }
        out
    }

    /// Returns whether the latest version of this entry is in that block.
    pub fn is_in(&self, block: Block, shard: ShardId, seq: Seq) -> bool {
        let held = self.shards.get(&shard).and_then(|ranges| ranges.at(seq));
        held.and_then(|(_, held)| self.block(held)) == Some(block)
    }

    /// Notes that the segment's file is deleted.
    pub fn deleted(&mut self, segment: u64) {
        self.segments.remove(&segment);
        for ranges in self.shards.values_mut() {
            ranges.by_first.retain(|_, held| held.segment != segment);
        }
    }

    /// The block to read for those who want entries: the first from `from` on that contains the
    /// next entry of one of them, or else the first of all. So each block is read once for all
    /// requests that progress through the log side by side. `None` without requests.
    pub fn next_read(&self, wanted: Vec<WantedEntries>, from: LogLocation) -> Option<BlockRead> {
        let mut missing = Vec::new();
        let mut found: Vec<(Block, Range, WantedEntries)> = Vec::new();
        for one in wanted {
            match self.find(one.shard, Seq(one.after.seq.0.saturating_add(1))) {
                Some((block, range)) => found.push((block, range, one)),
                None => missing.push(one),
            }
        }
        let blocks = || found.iter().map(|(block, ..)| *block);
        let next =
            blocks().filter(|block| block.location() >= from).min().or_else(|| blocks().min());
        let read = found.into_iter().filter(|(block, ..)| Some(*block) == next);
        let wanted: Vec<_> = read.map(|(_, range, one)| (range, one)).collect();
        let none = wanted.is_empty() && missing.is_empty();
        (!none).then_some(BlockRead { block: next, wanted, missing })
    }

    /// The block that contains the entry, and the range of the shard's entries in it from there.
    fn find(&self, shard: ShardId, from: Seq) -> Option<(Block, Range)> {
        let (_, held) = self.shards.get(&shard)?.at(from)?;
        Some((self.block(held)?, Range { shard, from, to: held.to }))
    }

    fn block(&self, held: IndexedRange) -> Option<Block> {
        let &(offset, len) = self.segments.get(&held.segment)?.blocks.get(held.block)?;
        Some(Block { segment: held.segment, offset, len })
    }
}

fn by_shard(needed: &[Needed]) -> BTreeMap<ShardId, Needed> {
    needed.iter().map(|one| (one.shard, *one)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::entry::{Entry, Position};
    use crate::store::log::catch_up::LogPart;
    use crate::store::log::group::Owner;
    use crate::store::log::writer::{LogEncoder, Resume};
    use crate::store::testing::{Segments, SplitMix64, put, random_log};

    const OWNER: Owner = Owner { cluster: 1, store: crate::ids::StoreId(2) };

    type Logs = BTreeMap<ShardId, BTreeMap<Seq, Entry>>;

    fn index_of(seed: u64, block_bytes: usize) -> (Index, Segments, Logs) {
        let log = random_log(seed, 40, 700);
        let mut index = Index::new(block_bytes);
        let mut scanner = crate::store::log::scan::Scanner::new(None);
        for (&segment, bytes) in &log.segments {
            for group in scanner.segment(segment, &bytes.clone().into()) {
                index.group(&group);
            }
        }
        let mut want = Logs::new();
        for record in log.groups.into_iter().flatten() {
            match record {
                LogRecord::Append { shard, entry } => {
                    want.entry(shard).or_default().insert(entry.seq, entry);
                }
                LogRecord::Truncate { shard, after } => {
                    want.entry(shard).or_default().split_off(&after.next());
                }
                _ => {}
            }
        }
        (index, log.segments, want)
    }

    /// Reads a block; returns the location from which the next read continues.
    fn read(
        index: &Index,
        segments: &Segments,
        wanted: Vec<WantedEntries>,
        from: LogLocation,
        bytes_max: usize,
    ) -> (Vec<LogPart>, LogLocation) {
        let read = index.next_read(wanted, from).expect("something is wanted");
        let (at, block) = (read.at(), read.block);
        let bytes =
            block.map(|block| &segments[&block.segment][block.offset..block.offset + block.len]);
        (read.parts(OWNER, bytes, bytes_max).unwrap(), at)
    }

    fn wanted(shard: ShardId, after: u64) -> WantedEntries {
        WantedEntries { shard, after: Position { seq: Seq(after), ..Position::default() } }
    }

    /// Readers of all shards, each from a location of its own, get the latest entries, in order,
    /// without a gap, whatever the sizes; and a part without entries at the end.
    #[test]
    fn reads_give_the_latest_entries() {
        for seed in 0..60 {
            let mut random = SplitMix64::new(seed);
            let block_bytes = [0, 200, 600, usize::MAX][random.below(4) as usize];
            let bytes_max = [0, 100, 1_000, usize::MAX][random.below(4) as usize];
            let (index, segments, want) = index_of(seed, block_bytes);
            let begin = |entries: &BTreeMap<Seq, Entry>, random: &mut SplitMix64| {
                random.below(entries.len() as u64 + 1)
            };
            let mut next: BTreeMap<_, _> =
                want.iter().map(|(&shard, entries)| (shard, begin(entries, &mut random))).collect();
            let mut at = LogLocation::default();
            while !next.is_empty() {
                let wanted = next.iter().map(|(&shard, &after)| wanted(shard, after)).collect();
                let (parts, read) = read(&index, &segments, wanted, at, bytes_max);
                at = read;
                assert!(!parts.is_empty(), "seed {seed}: no progress");
                for part in parts {
                    let after = next[&part.shard];
                    let rest = want[&part.shard].range(Seq(after + 1)..).map(|(_, one)| one);
                    let is_all = rest.clone().next().is_none();
                    let same = rest.zip(&part.entries).all(|(want, got)| want == got);
                    assert!(same, "seed {seed} {} after {after}", part.shard);
                    assert_eq!(part.entries.is_empty(), is_all, "seed {seed}");
                    match part.entries.last() {
                        Some(last) => drop(next.insert(part.shard, last.seq.0)),
                        None => drop(next.remove(&part.shard)),
                    }
                }
            }
        }
    }

    /// Shards that read through the log side by side share every read, wherever each began.
    #[test]
    fn a_block_is_read_once_for_all() {
        let (index, segments, want) = index_of(3, 300);
        let mut next: BTreeMap<_, _> = want.keys().map(|&shard| (shard, 0)).collect();
        let (mut at, mut blocks) = (LogLocation::default(), Vec::new());
        loop {
            let ends = |(shard, after): &(&ShardId, &u64)| **after < want[*shard].len() as u64;
            let lag: Vec<_> = next.iter().filter(ends).map(|(s, a)| wanted(*s, *a)).collect();
            if lag.is_empty() {
                break;
            }
            let (parts, read) = read(&index, &segments, lag, at, usize::MAX);
            at = read;
            blocks.push(read);
            for part in parts {
                next.insert(part.shard, part.entries.last().unwrap().seq.0);
            }
        }
        assert!(blocks.is_sorted_by(|one, next| one < next), "{blocks:?}");
    }

    fn needed(shard: u16, flushed: u64, members: u64) -> Needed {
        let (shard, flushed) = (ShardId(shard), Seq(flushed));
        Needed { shard, flushed, applied: flushed, members: Seq(members) }
    }

    /// Shard 1 has entries 1..=3 in segments 1..=3, one each; shard 2 has entry 1 in segment 2.
    fn three_segments() -> Index {
        let mut index = Index::default();
        for segment in 1..=3 {
            index.begin(segment, SEGMENT_HEADER_BYTES, 100, segment * 10);
            index.append(segment, ShardId(1), Seq(segment), 30);
        }
        index.append(2, ShardId(2), Seq(1), 30);
        index
    }

    #[track_caller]
    fn check(keep: &[Needed], log_keep_bytes: usize, durable: u64, want: &[u64]) {
        assert_eq!(three_segments().trimmable(keep, log_keep_bytes, durable), want);
    }

    #[test]
    fn segments_that_are_not_needed_are_deleted() {
        let all = usize::MAX;
        check(&[needed(1, 9, 9), needed(2, 9, 9)], all, 99, &[1, 2]);
        check(&[needed(1, 9, 1), needed(2, 9, 9)], all, 99, &[1]);
        check(&[needed(1, 1, 9), needed(2, 9, 9)], all, 99, &[1]);
        check(&[needed(1, 9, 9), needed(2, 0, 9)], all, 99, &[1]);
        check(&[needed(1, 9, 9)], all, 99, &[1]);
        check(&[needed(1, 0, 9), needed(2, 9, 9)], all, 99, &[]);
    }

    #[test]
    fn the_content_of_a_segment_must_be_restated_durably_first() {
        let keep = [needed(1, 9, 9), needed(2, 9, 9)];
        check(&keep, usize::MAX, 29, &[1]);
        check(&keep, usize::MAX, 19, &[]);
    }

    /// Segment 2 was made right before a crash.
    #[test]
    fn an_empty_segment_goes_in_its_turn() {
        let mut index = Index::default();
        for segment in [1, 3, 4] {
            index.begin(segment, SEGMENT_HEADER_BYTES, 100, segment * 10);
            index.append(segment, ShardId(1), Seq(segment), 30);
        }
        index.segment(2);
        assert_eq!(index.trimmable(&[needed(1, 3, 3)], usize::MAX, 99), [1, 2, 3]);
        assert_eq!(index.trimmable(&[needed(1, 3, 3)], usize::MAX, 30), [1, 2]);
        assert_eq!(index.trimmable(&[needed(1, 3, 3)], usize::MAX, 29), []);
        assert_eq!(index.trimmable(&[needed(1, 0, 0)], usize::MAX, 99), []);
    }

    /// Their headers were subtracted from a sum that did not contain them (simulator, seed 15452).
    #[test]
    fn segments_without_a_group_may_all_go() {
        let mut index = Index::default();
        (1..=3).for_each(|segment| index.segment(segment));
        index.begin(4, SEGMENT_HEADER_BYTES, 100, 10);
        assert_eq!(index.bytes(), 4 * SEGMENT_HEADER_BYTES + 100);
        assert_eq!(index.trimmable(&[], usize::MAX, 99), [1, 2, 3]);
    }

    /// Three segments of 164 bytes: beyond 400 the needs of members no longer count, by one
    /// segment's worth.
    #[test]
    fn beyond_the_limit_only_the_store_itself_counts() {
        check(&[needed(1, 9, 0), needed(2, 9, 0)], 400, 99, &[1]);
        check(&[needed(1, 0, 0), needed(2, 9, 0)], 0, 99, &[]);
    }

    #[track_caller]
    fn check_carried(needed: &[Needed], log_keep_bytes: usize, want: &[(u16, u64, u64)]) {
        let carried = three_segments().to_carry(needed, log_keep_bytes);
        let ranges = carried.into_iter().flat_map(|carry| carry.ranges);
        let got: Vec<_> = ranges.map(|range| (range.shard.0, range.from.0, range.to.0)).collect();
        assert_eq!(got, want);
    }

    #[test]
    fn what_no_flush_takes_over_is_carried_out_of_the_oldest_segment() {
        let flushed = |shard| needed(shard, 9, 0);
        check_carried(&[needed(1, 0, 0), flushed(2)], 0, &[(1, 1, 1)]);
        check_carried(&[needed(1, 1, 0), flushed(2)], 0, &[]);
        // Nothing is carried within the limit, while a flush suffices, or of a shard of which
        // nothing is known.
        check_carried(&[needed(1, 0, 0), flushed(2)], 1 << 20, &[]);
        check_carried(&[Needed { applied: Seq(1), ..needed(1, 0, 0) }, flushed(2)], 0, &[]);
        check_carried(&[needed(1, 0, 0)], 0, &[]);
    }

    /// Written again, it would only have to be carried again.
    #[test]
    fn nothing_is_carried_if_most_of_the_log_is_of_that_kind() {
        let mut index = three_segments();
        index.append(3, ShardId(1), Seq(4), 400);
        assert_eq!(index.to_carry(&[needed(1, 0, 0), needed(2, 9, 0)], 0), []);
    }

    /// A carried entry no longer keeps the segment that it came from.
    #[test]
    fn a_carried_entry_lets_its_segment_go() {
        let mut index = three_segments();
        index.append(3, ShardId(1), Seq(1), 30);
        assert_eq!(index.trimmable(&[needed(1, 0, 0), needed(2, 9, 9)], 0, 99), [1]);
    }

    #[test]
    fn the_writer_keeps_the_index() {
        let resume = Resume { owner: OWNER, ..Resume::default() };
        let mut writer = LogEncoder::new(resume, 1 << 16);
        let mut segments = Segments::new();
        let entry = Entry::after(
            Position::default(),
            crate::ids::Epoch(1),
            crate::ids::TimeMs(1),
            crate::entry::Body::Barrier,
        );
        writer.write(LogRecord::Append { shard: ShardId(1), entry: entry.clone() });
        put(&mut segments, writer.sync(1));
        let wanted = vec![wanted(ShardId(1), 0)];
        let (parts, _) = read(writer.index(), &segments, wanted, LogLocation::default(), 1);
        let got = &parts[0].entries;
        assert_eq!(got[..], [entry]);
    }
}
