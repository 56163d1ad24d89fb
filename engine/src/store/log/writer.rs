//! The encoding of the node's `Write` and `Sync` effects as the bytes of groups and segments.
//!
//! The driver passes every record to [`LogEncoder::write`] and, on `Sync`, gets the bytes to write
//! and their location. It must keep three rules:
//! - A new segment's file exists at its full size, with its header, then zeros, and is fsynced
//!   (its folder too), before a group is written into it. (A damaged header is thereby never a torn
//!   one.)
//! - Groups are written and fsynced in order; the next group is written after the fsync of the
//!   one before it.
//! - Each finished fsync is reported ([`LogEncoder::durable`]), so that later headers prove it.
//!
//! The encoder keeps a checkpoint of each shard, updated by the records that pass, and begins each
//! segment with these checkpoints, in the same group as what the node wrote. They contain the state
//! *before* that group, so the group reads in order.

use std::collections::BTreeMap;

use crate::entry::Entry;
use crate::etcd_memory::EtcdMemory;
use crate::ids::ShardId;
use crate::shard_record::ShardRecord;
use crate::store::log::block::Block;
use crate::store::log::group::{
    GROUP_HEADER_BYTES, Owner, SEGMENT_HEADER_BYTES, SegmentHeader, encode_group,
};
use crate::store::log::index::Index;
use crate::store::log::{Identity, LogRecord, ShardCheckpoint};

/// The state that the encoder begins with: all of it comes from recovery.
#[derive(Clone, Debug, Default)]
pub struct Resume {
    /// The owner of the log.
    pub owner: Owner,
    /// The store's identity, once it has one.
    pub identity: Option<Identity>,
    /// The store's memory of etcd.
    pub etcd: Option<Box<EtcdMemory>>,
    /// The newest record of each shard that the store has acted on.
    pub acted_on: BTreeMap<ShardId, Box<ShardRecord>>,
    /// The number of the next group.
    pub next_group: u64,
    /// The number of the next segment.
    pub next_segment: u64,
    /// The checkpoint of each shard.
    pub shards: BTreeMap<ShardId, ShardCheckpoint>,
    /// The index of the log.
    pub index: Index,
}

impl Resume {
    /// The state of a disk without a log, whose index is made in blocks of this size.
    pub fn empty(block_bytes: usize) -> Self {
        Self { index: Index::new(block_bytes), ..Self::default() }
    }

    /// The state with the owner set from the first group. A new log belongs to the store that the
    /// group names; an old one keeps its owner.
    pub fn owned(mut self, records: &[LogRecord]) -> Self {
        let named = records.iter().find_map(|record| match record {
            LogRecord::Identity(identity) => {
                Some(Owner { cluster: identity.cluster, store: identity.store })
            }
            _ => None,
        });
        match &self.identity {
            None => self.owner = named.expect("the first group of a new store has its identity"),
            Some(_) => {
                assert!(
                    named.is_none_or(|named| named == self.owner),
                    "a store keeps its identity"
                );
            }
        }
        self
    }
}

/// The bytes to write for one group.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Output {
    /// The header of a new segment, which must be made first; zeros follow up to
    /// [`Output::segment_bytes`].
    pub new_segment: Option<[u8; SEGMENT_HEADER_BYTES]>,
    /// The segment's number.
    pub segment: u64,
    /// The size to preallocate: never less than header and group.
    pub segment_bytes: usize,
    /// The offset of the group in the segment.
    pub offset: usize,
    /// The group.
    pub bytes: Vec<u8>,
}

/// Encodes the log of one store.
#[derive(Debug)]
pub struct LogEncoder {
    owner: Owner,
    segment_bytes: usize,
    /// The segment being written. `None` until the first group of this boot: each boot begins a
    /// segment of its own.
    open: Option<OpenSegment>,
    next_segment: u64,
    next_group: u64,
    synced_through: u64,
    pending: Vec<LogRecord>,
    pending_bytes: Vec<u8>,
    shards: BTreeMap<ShardId, ShardCheckpoint>,
    identity: Option<Identity>,
    etcd: Option<Box<EtcdMemory>>,
    acted_on: BTreeMap<ShardId, Box<ShardRecord>>,
    /// The checkpoints and the identity before the group that is being gathered, where it changed
    /// them.
    shards_before: BTreeMap<ShardId, Option<ShardCheckpoint>>,
    identity_before: Option<Option<Identity>>,
    index: Index,
}

#[derive(Clone, Copy, Debug)]
struct OpenSegment {
    segment: u64,
    offset: usize,
    size: usize,
}

impl LogEncoder {
    /// An encoder that begins a new segment with its first group.
    pub fn new(resume: Resume, segment_bytes: usize) -> Self {
        Self {
            owner: resume.owner,
            segment_bytes,
            open: None,
            next_segment: resume.next_segment.max(1),
            next_group: resume.next_group.max(1),
            synced_through: resume.next_group.saturating_sub(1),
            pending: Vec::new(),
            pending_bytes: Vec::new(),
            shards: resume.shards,
            identity: resume.identity,
            etcd: resume.etcd,
            acted_on: resume.acted_on,
            shards_before: BTreeMap::new(),
            identity_before: None,
            index: resume.index,
        }
    }

    /// Adds a record to the group that is being gathered.
    pub fn write(&mut self, record: LogRecord) {
        record.encode(&mut self.pending_bytes);
        match (&record, record.shard()) {
            (LogRecord::Identity(identity), _) => {
                let before = self.identity.replace(identity.clone());
                self.identity_before.get_or_insert(before);
            }
            (LogRecord::Etcd(memory), _) => self.etcd = Some(memory.clone()),
            (LogRecord::ActedOn(record), Some(shard)) => {
                self.acted_on.insert(shard, record.clone());
            }
            (_, Some(shard)) => {
                let before = self.shards.get(&shard).copied();
                self.shards_before.entry(shard).or_insert(before);
                self.shards.entry(shard).or_default().observe(&record);
            }
            (_, None) => {}
        }
        self.pending.push(record);
    }

    /// Writes entries of an old block again, unchanged, so that its segment can be deleted. To be
    /// called before any record of the next group is written, since the records of that group refer
    /// to the carried entries. Entries that have been written again since, or are void, are left
    /// out.
    pub fn carry(&mut self, block: Block, entries: Vec<(ShardId, Entry)>) {
        assert!(self.pending.is_empty(), "carried entries come first in their group");
        for (shard, entry) in entries {
            if self.index.is_in(block, shard, entry.seq) {
                self.write(LogRecord::Append { shard, entry });
            }
        }
    }

    /// The bytes gathered since the last group.
    pub fn pending_bytes(&self) -> usize {
        self.pending_bytes.len()
    }

    /// Closes the group. `number` is the node's, and must be the next one: anything else is a bug.
    pub fn sync(&mut self, number: u64) -> Output {
        assert_eq!(number, self.next_group, "groups are numbered without a gap");
        self.next_group += 1;
        let body = std::mem::take(&mut self.pending_bytes);
        let fits = |open: &OpenSegment| open.offset + GROUP_HEADER_BYTES + body.len() <= open.size;
        let (open, new_segment, body) = match self.open.filter(fits) {
            Some(open) => (open, None, body),
            None => {
                let mut restated = self.restatement();
                restated.extend_from_slice(&body);
                let (open, header) = self.roll(number, restated.len());
                (open, Some(header), restated)
            }
        };
        let bytes = encode_group(self.owner, open.segment, number, self.synced_through, &body);
        self.index.begin(open.segment, open.offset, bytes.len(), number);
        for record in std::mem::take(&mut self.pending) {
            self.index.record(open.segment, &record);
        }
        self.shards_before.clear();
        self.identity_before = None;
        self.open = Some(OpenSegment { offset: open.offset + bytes.len(), ..open });
        Output {
            new_segment,
            segment: open.segment,
            segment_bytes: open.size,
            offset: open.offset,
            bytes,
        }
    }

    /// Notes that group `group` and all before it are fsynced.
    pub fn durable(&mut self, group: u64) {
        self.synced_through = self.synced_through.max(group);
    }

    /// The last group that is known to be durable.
    pub fn synced_through(&self) -> u64 {
        self.synced_through
    }

    /// The index of the log.
    pub fn index(&self) -> &Index {
        &self.index
    }

    /// The index of the log, to be changed.
    pub fn index_mut(&mut self) -> &mut Index {
        &mut self.index
    }

    /// The number of the next segment: its file may be filled with zeros ahead of time.
    pub fn next_segment(&self) -> u64 {
        self.next_segment
    }

    /// The owner of the log.
    pub fn owner(&self) -> Owner {
        self.owner
    }

    fn roll(&mut self, first_group: u64, body: usize) -> (OpenSegment, [u8; SEGMENT_HEADER_BYTES]) {
        let segment = self.next_segment;
        self.next_segment += 1;
        let size = self.segment_bytes.max(SEGMENT_HEADER_BYTES + GROUP_HEADER_BYTES + body);
        let header = SegmentHeader { owner: self.owner, segment, first_group };
        (OpenSegment { segment, offset: SEGMENT_HEADER_BYTES, size }, header.encode())
    }

    /// The identity and the checkpoints before the group that is being closed, and what is known of
    /// etcd. The latter may be as of this group: the newest of it counts, wherever it stands.
    fn restatement(&self) -> Vec<u8> {
        let mut out = Vec::new();
        let identity = self.identity_before.as_ref().unwrap_or(&self.identity);
        if let Some(identity) = identity {
            LogRecord::Identity(identity.clone()).encode(&mut out);
        }
        if let Some(memory) = &self.etcd {
            LogRecord::Etcd(memory.clone()).encode(&mut out);
        }
        for record in self.acted_on.values() {
            LogRecord::ActedOn(record.clone()).encode(&mut out);
        }
        for (&shard, &now) in &self.shards {
            let before = self.shards_before.get(&shard).copied().unwrap_or(Some(now));
            if let Some(checkpoint) = before {
                LogRecord::Checkpoint { shard, checkpoint }.encode(&mut out);
            }
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::entry::Position;
    use crate::ids::{CopyNo, Epoch, Seq, Slots};
    use crate::store::log::CopyExtent;
    use crate::store::log::scan::Scanner;

    const SHARD: ShardId = ShardId(16);

    fn promise(epoch: u64) -> LogRecord {
        LogRecord::Promise { shard: SHARD, epoch: Epoch(epoch) }
    }

    fn copy(number: u64) -> LogRecord {
        let base = Position { seq: Seq(4), ..Position::default() };
        LogRecord::Copy {
            shard: SHARD,
            slots: Slots { lo: 16, hi: 31 },
            copy: CopyNo(number),
            base,
        }
    }

    fn checkpoint(promised: u64, copy: u64, extent: bool) -> LogRecord {
        let base = Position { seq: Seq(4), ..Position::default() };
        let extent =
            extent.then_some(CopyExtent { slots: Slots { lo: 16, hi: 31 }, base, last: Seq(4) });
        let checkpoint = ShardCheckpoint {
            promised: Epoch(promised),
            copy: CopyNo(copy),
            suspect: false,
            extent,
        };
        LogRecord::Checkpoint { shard: SHARD, checkpoint }
    }

    /// Checks the content of the groups when each begins a segment of its own.
    #[track_caller]
    fn check(groups: Vec<Vec<LogRecord>>, want: Vec<Vec<LogRecord>>) {
        let mut writer = LogEncoder::new(Resume::default(), 0);
        let mut scanner = Scanner::new(None);
        let mut got = Vec::new();
        for (number, group) in (1..).zip(groups) {
            for record in group {
                writer.write(record);
            }
            let output = writer.sync(number);
            let mut bytes = output.new_segment.expect("too small for two").to_vec();
            bytes.extend_from_slice(&output.bytes);
            let found = scanner.segment(output.segment, &bytes.into());
            got.extend(found.into_iter().map(|group| group.records));
        }
        assert_eq!(got, want);
    }

    /// Each segment begins with the checkpoints before its first group, not after.
    #[test]
    fn a_segment_restates_what_was_before_it() {
        check(
            vec![vec![promise(3)], vec![copy(1), promise(5)], vec![]],
            vec![
                vec![promise(3)],
                vec![checkpoint(3, 0, false), copy(1), promise(5)],
                vec![checkpoint(5, 1, true)],
            ],
        );
    }

    #[test]
    fn a_group_larger_than_a_segment_gets_one_of_its_own() {
        let mut writer = LogEncoder::new(Resume::default(), 100);
        writer.write(copy(1));
        writer.write(copy(2));
        writer.write(copy(3));
        let output = writer.sync(1);
        assert_eq!(output.segment_bytes, output.offset + output.bytes.len());
    }

    #[test]
    #[should_panic(expected = "without a gap")]
    fn a_group_out_of_turn_is_a_bug() {
        LogEncoder::new(Resume::default(), 100).sync(2);
    }

    /// Golden test: a whole segment, byte by byte. These bytes are on disks.
    #[test]
    fn the_bytes_never_change() {
        let owner = Owner { cluster: 0x0102, store: crate::ids::StoreId(0x0304) };
        let mut writer = LogEncoder::new(Resume { owner, ..Resume::default() }, 1 << 10);
        let entry = Entry::after(
            Position { seq: Seq(4), ..Position::default() },
            Epoch(1),
            crate::ids::TimeMs(300),
            crate::entry::Body::Barrier,
        );
        let identity = Identity {
            cluster: 0x0102,
            store: crate::ids::StoreId(0x0304),
            boot: crate::ids::Boot(1),
            read_nonce: Some(6),
            claims: vec![5, 8],
        };
        writer.write(LogRecord::Identity(identity));
        writer.write(promise(3));
        writer.write(copy(1));
        let first = writer.sync(1);
        writer.durable(1);
        writer.write(LogRecord::Append { shard: SHARD, entry });
        writer.write(LogRecord::Truncate { shard: SHARD, after: Seq(4) });
        writer.write(LogRecord::Drop { shard: SHARD, copy: CopyNo(2) });
        writer.write(checkpoint(3, 1, true));
        let second = writer.sync(2);
        let mut bytes = first.new_segment.unwrap().to_vec();
        bytes.extend_from_slice(&first.bytes);
        bytes.extend_from_slice(&second.bytes);
        let hex = |line: &[u8]| line.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        let lines: Vec<_> = bytes.chunks(32).map(hex).collect();
        let golden: Vec<_> = include_str!("../golden/segment.hex").lines().collect();
        assert_eq!(lines, golden);
        let mut scanner = Scanner::new(None);
        let groups = scanner.segment(1, &bytes.into());
        assert_eq!(groups.iter().map(|group| group.records.len()).collect::<Vec<_>>(), [3, 4]);
        assert_eq!(scanner.finish().damage, []);
    }
}
