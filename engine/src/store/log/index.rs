//! Which bytes of the log hold which entries: what may be deleted, and where to read.
//!
//! Each segment is cut into blocks of about a megabyte; a block knows, per shard, the ranges of seqs
//! whose *latest* writing of the *present* copy it holds at most. A truncation, a new copy or a drop
//! takes ranges away, and so does carrying an entry into a newer segment: a range that is left is what
//! a reader wants, and what keeps its segment.
//!
//! What a newcomer gets wrong: only the *oldest* segments may go, without a gap, and only once the
//! first group of the next one is durable: it restates what the deleted ones said of promises,
//! copies and identity.

use std::collections::BTreeMap;

use crate::entry::Entry;
use crate::ids::{Seq, ShardId};
use crate::store::log::Record;
use crate::store::log::group::{Owner, SEGMENT_HEADER_BYTES};
use crate::store::log::scan::{Group, Place, groups};

/// A block is closed at this size, as shipped: what a reader reads at least.
pub const BLOCK_BYTES: usize = 1024 * 1024;

/// Where entries of one shard are: `len` bytes of a segment's file from `offset` on.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Piece {
    pub segment: u64,
    pub offset: usize,
    pub len: usize,
    /// Only entries from here …
    pub from: Seq,
    /// … to here are meant; others in it are outdated.
    pub to: Seq,
}

/// How much of a shard's log is still needed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Needed {
    pub shard: ShardId,
    /// Up to here the shard's changes are flushed.
    pub flushed: Seq,
    /// Up to here they are durable on every member and learner.
    pub members: Seq,
}

#[derive(Clone, Debug)]
pub struct Index {
    block_bytes: usize,
    segments: BTreeMap<u64, Vec<Block>>,
    /// First group of each segment.
    first_group: BTreeMap<u64, u64>,
    /// The highest seq of each shard: what comes at or below it was written again.
    last: BTreeMap<ShardId, Seq>,
}

#[derive(Clone, Debug)]
struct Block {
    offset: usize,
    len: usize,
    ranges: BTreeMap<ShardId, Vec<(Seq, Seq)>>,
}

impl Block {
    fn end(&self) -> usize {
        self.offset + self.len
    }
}

impl Default for Index {
    fn default() -> Self {
        Self::new(BLOCK_BYTES)
    }
}

impl Index {
    /// Of no segment yet; its blocks are closed at this size.
    pub fn new(block_bytes: usize) -> Self {
        Self {
            block_bytes,
            segments: BTreeMap::new(),
            first_group: BTreeMap::new(),
            last: BTreeMap::new(),
        }
    }

    /// Notes a group found by recovery.
    pub fn group(&mut self, group: &Group) {
        self.begin(group.segment, group.offset, group.len, group.number);
        for record in &group.records {
            self.record(group.segment, record);
        }
    }

    /// The segment is there, with groups in it or without. One that a crash left empty must go in
    /// its turn like any other: left behind, it would look as if those after it had been lost.
    pub fn segment(&mut self, segment: u64) {
        self.segments.entry(segment).or_default();
    }

    /// A group begins here; its records follow.
    pub fn begin(&mut self, segment: u64, offset: usize, len: usize, group: u64) {
        self.first_group.entry(segment).or_insert(group);
        let blocks = self.segments.entry(segment).or_default();
        match blocks.last_mut() {
            Some(block) if block.len < self.block_bytes && block.end() == offset => {
                block.len += len;
            }
            _ => blocks.push(Block { offset, len, ranges: BTreeMap::new() }),
        }
    }

    /// A record of the group last begun.
    pub fn record(&mut self, segment: u64, record: &Record) {
        match record {
            Record::Append { shard, entry } => self.append(segment, *shard, entry.seq),
            Record::Truncate { shard, after } => self.forget(*shard, *after),
            Record::Copy { shard, .. } | Record::Drop { shard, .. } => self.forget(*shard, Seq(0)),
            Record::Promise { .. }
            | Record::Suspect { .. }
            | Record::Identity(_)
            | Record::Shard { .. } => {}
        }
    }

    fn append(&mut self, segment: u64, shard: ShardId, seq: Seq) {
        if self.last.get(&shard).is_some_and(|&last| seq <= last) {
            self.carried(segment, shard, seq);
        }
        let last = self.last.entry(shard).or_default();
        *last = seq.max(*last);
        let Some(block) = self.segments.get_mut(&segment).and_then(|blocks| blocks.last_mut())
        else {
            return;
        };
        let ranges = block.ranges.entry(shard).or_default();
        if ranges.iter().any(|&(min, max)| min <= seq && seq <= max) {
            return;
        }
        match ranges.last_mut() {
            Some((_, max)) if max.0.checked_add(1) == Some(seq.0) => *max = seq,
            _ => ranges.push((seq, seq)),
        }
    }

    /// The entry was written again: older blocks no longer hold it.
    fn carried(&mut self, segment: u64, shard: ShardId, seq: Seq) {
        for (_, blocks) in self.segments.range_mut(..segment) {
            for block in blocks {
                let Some(ranges) = block.ranges.get_mut(&shard) else { continue };
                let without = ranges.iter().flat_map(|&(min, max)| {
                    if seq < min || max < seq {
                        return [(min, max), (Seq(1), Seq(0))];
                    }
                    [(min, seq.prev()), (Seq(seq.0.saturating_add(1)), max)]
                });
                *ranges = without.filter(|(min, max)| min <= max).collect();
                if ranges.is_empty() {
                    block.ranges.remove(&shard);
                }
            }
        }
    }

    /// Entries of the shard above `after` are void.
    fn forget(&mut self, shard: ShardId, after: Seq) {
        if let Some(last) = self.last.get_mut(&shard) {
            *last = after.min(*last);
        }
        for block in self.segments.values_mut().flatten() {
            let Some(ranges) = block.ranges.get_mut(&shard) else { continue };
            ranges.retain_mut(|(min, max)| {
                *max = (*max).min(after);
                *min <= after
            });
            if ranges.is_empty() {
                block.ranges.remove(&shard);
            }
        }
    }

    /// Every block of groups, oldest first: where it is, and how long.
    pub fn blocks(&self) -> Vec<(Place, usize)> {
        let of_segment = |(&segment, blocks): (&u64, &Vec<Block>)| -> Vec<(Place, usize)> {
            blocks
                .iter()
                .map(|block| (Place { segment, offset: block.offset }, block.len))
                .collect()
        };
        self.segments.iter().flat_map(of_segment).collect()
    }

    /// Bytes in use, by all segments.
    pub fn bytes(&self) -> usize {
        self.segments.values().map(|blocks| end(blocks)).sum()
    }

    /// The segments that may be deleted, oldest first. Within `log_keep_bytes` entries are kept for
    /// members that lack them; beyond, only for this store's own recovery. A shard that `needed`
    /// does not name is needed whole. `durable`: the last group known durable.
    pub fn trimmable(&self, needed: &[Needed], log_keep_bytes: usize, durable: u64) -> Vec<u64> {
        let mut bytes = self.bytes();
        let mut out = Vec::new();
        let mut segments = self.segments.iter().peekable();
        while let Some((&segment, blocks)) = segments.next() {
            let Some((next, _)) = segments.peek() else { break };
            // Without a group in it the next one restates nothing: then the one after it does.
            let mut restating = self.first_group.range(*next..);
            let restated = restating.next().is_some_and(|(_, &first)| first <= durable);
            let for_members = bytes <= log_keep_bytes;
            if !restated || !needless(blocks, needed, for_members) {
                break;
            }
            bytes -= end(blocks);
            out.push(segment);
        }
        out
    }

    /// Shards whose unflushed entries in the oldest segment alone keep it: what is to be carried.
    pub fn keeps_oldest(&self, needed: &[Needed]) -> Vec<(ShardId, Seq, Seq)> {
        let Some(blocks) = self.segments.values().next().filter(|_| self.segments.len() > 1) else {
            return Vec::new();
        };
        let mut out = Vec::new();
        for (&shard, ranges) in blocks.iter().flat_map(|block| &block.ranges) {
            let flushed =
                needed.iter().find(|one| one.shard == shard).map_or(Seq(0), |one| one.flushed);
            for &(min, max) in ranges.iter().filter(|(_, max)| *max > flushed) {
                out.push((shard, min.max(flushed.next()), max));
            }
        }
        out
    }

    /// The segment's file is gone.
    pub fn deleted(&mut self, segment: u64) {
        self.segments.remove(&segment);
        self.first_group.remove(&segment);
    }

    /// Where the shard's entries from `from` on are, in order and without a gap: at least one piece
    /// if the log holds `from`, and no more once they take `bytes_max`.
    pub fn read(&self, shard: ShardId, from: Seq, bytes_max: usize) -> Vec<Piece> {
        let mut out: Vec<Piece> = Vec::new();
        let mut bytes = 0;
        let mut next = from;
        while out.is_empty() || bytes < bytes_max {
            let Some(piece) = self.piece(shard, next) else { break };
            bytes += piece.len;
            next = Seq(piece.to.0.saturating_add(1));
            out.push(piece);
        }
        out
    }

    /// The latest block that holds `seq`, and how far it goes.
    fn piece(&self, shard: ShardId, seq: Seq) -> Option<Piece> {
        let blocks =
            self.segments.iter().rev().flat_map(|(&segment, blocks)| {
                blocks.iter().rev().map(move |block| (segment, block))
            });
        blocks.into_iter().find_map(|(segment, block)| {
            let ranges = block.ranges.get(&shard)?;
            let &(_, to) = ranges.iter().find(|(min, max)| *min <= seq && seq <= *max)?;
            Some(Piece { segment, offset: block.offset, len: block.len, from: seq, to })
        })
    }
}

/// Where what a segment holds ends: an empty one has its header.
fn end(blocks: &[Block]) -> usize {
    blocks.last().map_or(SEGMENT_HEADER_BYTES, Block::end)
}

fn needless(blocks: &[Block], needed: &[Needed], for_members: bool) -> bool {
    blocks.iter().flat_map(|block| &block.ranges).all(|(&shard, ranges)| {
        needed.iter().find(|one| one.shard == shard).is_some_and(|one| {
            let keep = if for_members { one.flushed.min(one.members) } else { one.flushed };
            ranges.iter().all(|&(_, max)| max <= keep)
        })
    })
}

/// The index has seen an entry written there, and it is not there any more: the disk has changed it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Gone {
    pub segment: u64,
    pub offset: usize,
}

/// The entries that these pieces hold, in order, until they take `bytes_max` (but at least one). `read`
/// gives a piece's bytes; none if its segment has been deleted meanwhile: what comes before it is all
/// then.
pub fn read_pieces<B: AsRef<[u8]>, E: From<Gone>>(
    owner: Owner,
    pieces: &[Piece],
    shard: ShardId,
    bytes_max: usize,
    mut read: impl FnMut(Piece) -> Result<Option<B>, E>,
) -> Result<Vec<Entry>, E> {
    let mut entries: Vec<Entry> = Vec::new();
    let mut left = bytes_max;
    for &piece in pieces {
        let Some(bytes) = read(piece)? else { break };
        let found = scan_entries(owner, piece, bytes.as_ref(), shard, left);
        let Some(last) = found.last().map(|entry| entry.seq) else {
            return Err(Gone { segment: piece.segment, offset: piece.offset }.into());
        };
        let taken: usize = found.iter().map(Entry::size).sum();
        entries.extend(found);
        if last < piece.to || taken >= left {
            break;
        }
        left -= taken;
    }
    Ok(entries)
}

/// The entries of the shard in the bytes of one piece, in order, until they take `bytes_max` (but at
/// least one). Within the piece the last group that holds a position wins.
fn scan_entries(
    owner: Owner,
    piece: Piece,
    bytes: &[u8],
    shard: ShardId,
    bytes_max: usize,
) -> Vec<Entry> {
    let mut latest = BTreeMap::new();
    for group in groups(owner, piece.segment, piece.offset, bytes) {
        for record in group.records {
            match record {
                Record::Append { shard: of, entry } if of == shard => {
                    latest.insert(entry.seq, entry);
                }
                Record::Truncate { shard: of, after } if of == shard => {
                    latest.split_off(&Seq(after.0.saturating_add(1)));
                }
                Record::Copy { shard: of, .. } | Record::Drop { shard: of, .. } if of == shard => {
                    latest.clear();
                }
                _ => {}
            }
        }
    }
    let mut taken = 0;
    let mut next = piece.from;
    let mut out = Vec::new();
    for (seq, entry) in latest.into_iter().skip_while(|(seq, _)| *seq < piece.from) {
        let full = !out.is_empty() && taken + entry.size() > bytes_max;
        if full || seq > piece.to || seq != next {
            break;
        }
        taken += entry.size();
        next = Seq(seq.0.saturating_add(1));
        out.push(entry);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::log::writer::{Resume, Writer};
    use crate::store::testing::{Segments, put, random_log};

    fn index_of(seed: u64) -> (Index, Segments, BTreeMap<ShardId, BTreeMap<Seq, Entry>>) {
        let log = random_log(seed, 40, 700);
        let mut index = Index::default();
        let mut scanner = crate::store::log::scan::Scanner::new(None);
        for (&segment, bytes) in &log.segments {
            for group in scanner.segment(segment, &bytes.clone().into()) {
                index.group(&group);
            }
        }
        let mut want: BTreeMap<ShardId, BTreeMap<Seq, Entry>> = BTreeMap::new();
        for record in log.groups.into_iter().flatten() {
            match record {
                Record::Append { shard, entry } => {
                    want.entry(shard).or_default().insert(entry.seq, entry);
                }
                Record::Truncate { shard, after } => {
                    want.entry(shard).or_default().split_off(&after.next());
                }
                _ => {}
            }
        }
        (index, log.segments, want)
    }

    /// From every seq on, a reader gets the latest entries, in order, without a gap.
    #[test]
    fn reads_give_the_latest_entries() {
        for seed in 0..30 {
            let (index, segments, want) = index_of(seed);
            let owner = Owner { cluster: 1, store: crate::ids::StoreId(2) };
            for (&shard, entries) in &want {
                for &from in entries.keys() {
                    let mut got = Vec::new();
                    for piece in index.read(shard, from, usize::MAX) {
                        let bytes = &segments[&piece.segment];
                        let bytes = &bytes[piece.offset..piece.offset + piece.len];
                        got.extend(scan_entries(owner, piece, bytes, shard, usize::MAX));
                    }
                    let want: Vec<_> = entries.range(from..).map(|(_, one)| one.clone()).collect();
                    assert_eq!(got, want, "seed {seed} {shard} from {from:?}");
                }
                let beyond = Seq(entries.len() as u64 + 1);
                assert_eq!(index.read(shard, beyond, 1), []);
            }
        }
    }

    fn needed(shard: u16, flushed: u64, members: u64) -> Needed {
        Needed { shard: ShardId(shard), flushed: Seq(flushed), members: Seq(members) }
    }

    /// Shard 1 has entries 1..=3 in segments 1..=3, one each; shard 2 has entry 1 in segment 2.
    fn three_segments() -> Index {
        let mut index = Index::default();
        for segment in 1..=3 {
            index.begin(segment, SEGMENT_HEADER_BYTES, 100, segment * 10);
            index.append(segment, ShardId(1), Seq(segment));
        }
        index.append(2, ShardId(2), Seq(1));
        index
    }

    #[track_caller]
    fn check(keep: &[Needed], log_keep_bytes: usize, durable: u64, want: &[u64]) {
        assert_eq!(three_segments().trimmable(keep, log_keep_bytes, durable), want);
    }

    #[test]
    fn only_what_nobody_needs_goes() {
        let all = usize::MAX;
        check(&[needed(1, 9, 9), needed(2, 9, 9)], all, 99, &[1, 2]);
        check(&[needed(1, 9, 1), needed(2, 9, 9)], all, 99, &[1]);
        check(&[needed(1, 1, 9), needed(2, 9, 9)], all, 99, &[1]);
        check(&[needed(1, 9, 9), needed(2, 0, 9)], all, 99, &[1]);
        check(&[needed(1, 9, 9)], all, 99, &[1]);
        check(&[needed(1, 0, 9), needed(2, 9, 9)], all, 99, &[]);
    }

    #[test]
    fn what_a_segment_says_must_be_restated_durably_first() {
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
            index.append(segment, ShardId(1), Seq(segment));
        }
        index.segment(2);
        assert_eq!(index.trimmable(&[needed(1, 3, 3)], usize::MAX, 99), [1, 2, 3]);
        assert_eq!(index.trimmable(&[needed(1, 3, 3)], usize::MAX, 30), [1, 2]);
        assert_eq!(index.trimmable(&[needed(1, 3, 3)], usize::MAX, 29), []);
        assert_eq!(index.trimmable(&[needed(1, 0, 0)], usize::MAX, 99), []);
    }

    /// Their headers were taken off a sum that they were not in (simulator, seed 15452).
    #[test]
    fn segments_without_a_group_may_all_go() {
        let mut index = Index::default();
        (1..=3).for_each(|segment| index.segment(segment));
        index.begin(4, SEGMENT_HEADER_BYTES, 100, 10);
        assert_eq!(index.bytes(), 4 * SEGMENT_HEADER_BYTES + 100);
        assert_eq!(index.trimmable(&[], usize::MAX, 99), [1, 2, 3]);
    }

    /// Three segments of 164 bytes: beyond 400 the members' needs give way, one segment's worth.
    #[test]
    fn beyond_the_limit_only_the_store_itself_counts() {
        check(&[needed(1, 9, 0), needed(2, 9, 0)], 400, 99, &[1]);
        check(&[needed(1, 0, 0), needed(2, 9, 0)], 0, 99, &[]);
    }

    #[test]
    fn what_keeps_the_oldest_segment_is_named() {
        let index = three_segments();
        assert_eq!(index.keeps_oldest(&[needed(1, 0, 0)]), [(ShardId(1), Seq(1), Seq(1))]);
        assert_eq!(index.keeps_oldest(&[needed(1, 1, 0)]), []);
    }

    /// A carried entry no longer keeps the segment that it came from.
    #[test]
    fn a_carried_entry_lets_its_segment_go() {
        let mut index = three_segments();
        index.append(3, ShardId(1), Seq(1));
        assert_eq!(index.trimmable(&[needed(1, 0, 0), needed(2, 9, 9)], 0, 99), [1]);
    }

    #[test]
    fn the_writer_keeps_the_index() {
        let mut writer = Writer::new(Resume::default(), 1 << 16);
        let mut segments = Segments::new();
        let entry = Entry::after(
            crate::entry::Position::default(),
            crate::ids::Epoch(1),
            crate::ids::TimeMs(1),
            crate::entry::Body::Barrier,
        );
        writer.write(Record::Append { shard: ShardId(1), entry: entry.clone() });
        put(&mut segments, writer.sync(1));
        let piece = writer.index().read(ShardId(1), Seq(1), 1)[0];
        let bytes = &segments[&piece.segment][piece.offset..piece.offset + piece.len];
        let got = scan_entries(writer.owner(), piece, bytes, ShardId(1), 1);
        assert_eq!(got, [entry]);
    }
}
