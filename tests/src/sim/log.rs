//! The log of one store as it lies on its disk: the engine's own bytes, written by its own writer
//! and read by its own scanner and recovery, in files that a crash tears.
//!
//! The model obeys the same rules towards the engine's writer as production's log thread: a group
//! is written once the fsync of the one before has returned, and a new segment is durable, header
//! and zeros, before its first group. So there is never more than one group that a crash can tear.
//! The crash tears it in every way a disk may: at any byte, in pieces of any order, or not at all.

use std::cmp::Ordering;
use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;
use engine::entry::Entry;
use engine::ids::{CopyNo, ShardId};
use engine::shard::state::ShardState;
use engine::store::log::LogRecord;
use engine::store::log::block::Block;
use engine::store::log::catch_up::{Gone, LogPart, WantedEntries};
use engine::store::log::group::{GROUP_HEADER_BYTES, SegmentHeader};
use engine::store::log::index::Needed;
use engine::store::log::scan::{Clean, LogLocation, Scanned, Scanner};
use engine::store::log::writer::{LogEncoder, Resume};
use engine::store::recovery::{Recovery, RecoveryPlan};

use super::plan::log::LogSizes;
use super::rng::Rng;

/// The written bytes can't be read any more.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct DamagedLog;

impl From<Gone> for DamagedLog {
    fn from(_: Gone) -> Self {
        Self
    }
}

#[derive(Clone, Debug, Default)]
pub struct Log {
    /// The files, as a reader finds them. Zeros follow each.
    segments: BTreeMap<u64, Vec<u8>>,
    /// The group that was written last and is not fsynced.
    unsynced: Option<Unsynced>,
    /// The position of the last durable group: its header proves that all before it was durable.
    witness: Option<(u64, usize)>,
}

/// The bytes of one group, from here to the end of its segment's file.
#[derive(Clone, Copy, Debug)]
struct Unsynced {
    segment: u64,
    from: usize,
}

/// The part of the group being written that a crash has left.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum GroupAfterCrash {
    /// No group was being written, or none of it or all of it is there.
    Whole,
    Torn,
}

impl Log {
    /// Writes every byte of the group to the file; the fsync is still to come.
    fn write(&mut self, segment: u64, header: Option<&[u8]>, offset: usize, bytes: &[u8]) {
        assert!(self.unsynced.is_none(), "one group at a time");
        if let Some(header) = header {
            self.segments.insert(segment, header.to_vec());
        }
        let file = self.segments.get_mut(&segment).expect("made before it is written");
        file.truncate(offset);
        file.resize(offset, 0);
        file.extend_from_slice(bytes);
        self.unsynced = Some(Unsynced { segment, from: offset });
    }

    /// The process is gone, perhaps in the middle of a write.
    pub fn process_died(&mut self, rng: &mut Rng) {
        if let Some(Unsynced { segment, from }) = self.unsynced
            && rng.percent(30)
        {
            let file = self.segments.get_mut(&segment).expect("it was written");
            let kept = from + rng.index(file.len() - from + 1);
            file.truncate(kept);
        }
    }

    /// The machine is gone: any part of what was not fsynced may be there.
    pub fn power_lost(&mut self, rng: &mut Rng) -> GroupAfterCrash {
        let Some(Unsynced { segment, from }) = self.unsynced.take() else {
            return GroupAfterCrash::Whole;
        };
        let file = self.segments.get_mut(&segment).expect("it was written");
        let whole = file[from..].to_vec();
        match rng.below(6) {
            0 => file[from..].fill(0),
            1 => {}
            2 | 3 => {
                let kept = from + rng.index(whole.len() + 1);
                file[kept..].fill(0);
            }
            // Sectors in any order. Groups are small here, and so are some of the pieces.
            _ => {
                let piece = [32, 128, 512, 4096][rng.index(4)];
                let first = from / piece;
                for number in first..=file.len() / piece {
                    let (begin, end) = (number * piece, (number + 1) * piece);
                    if rng.percent(50) {
                        let end = end.min(file.len());
                        file[begin.max(from).min(end)..end].fill(0);
                    }
                }
            }
        }
        let left = &file[from..];
        let is_whole = left == whole || left.iter().all(|&byte| byte == 0);
        if is_whole { GroupAfterCrash::Whole } else { GroupAfterCrash::Torn }
    }

    /// Reads everything, and keeps exactly what is valid, durably: production's way of opening a
    /// folder.
    pub fn open(
        &mut self,
        state: &BTreeMap<ShardId, (CopyNo, ShardState)>,
        sizes: LogSizes,
    ) -> (RecoveryPlan, Scanned) {
        let header = |bytes: &Vec<u8>| SegmentHeader::decode(&Bytes::copy_from_slice(bytes)).ok();
        let owner = self.segments.values().find_map(header).map(|header| header.owner);
        let mut recovery =
            Recovery::new(state.values().cloned().collect()).with_block_bytes(sizes.block_bytes);
        let mut scanner = Scanner::new(owner);
        for (&segment, bytes) in &self.segments {
            for group in scanner.segment(segment, &Bytes::copy_from_slice(bytes)) {
                self.witness = Some((group.segment, group.offset));
                recovery.group(group);
            }
        }
        let scanned = scanner.finish();
        let plan = recovery.finish(scanned.clone());
        let found = std::mem::take(&mut self.segments);
        for (segment, bytes) in found {
            match scanned.clean(segment, &Bytes::copy_from_slice(&bytes)) {
                Clean::Keep => drop(self.segments.insert(segment, bytes)),
                Clean::Rewrite(bytes) => drop(self.segments.insert(segment, bytes.to_vec())),
                Clean::Delete => {}
            }
        }
        self.unsynced = None;
        (plan, scanned)
    }

    /// Changes one durable bit. Returns `false` if recovery could detect no change.
    pub fn rot(&mut self, rng: &mut Rng) -> bool {
        let Some(witness) = self.witness else { return false };
        let before = |(&segment, bytes): (&u64, &Vec<u8>)| match segment.cmp(&witness.0) {
            Ordering::Less => bytes.len(),
            Ordering::Equal => witness.1.min(bytes.len()),
            Ordering::Greater => 0,
        };
        let total: usize = self.segments.iter().map(before).sum();
        if total == 0 {
            return false;
        }
        let mut at = rng.index(total);
        for (&segment, bytes) in &mut self.segments {
            let len = before((&segment, bytes));
            if at < len {
                bytes[at] ^= 1 << rng.index(8);
                return true;
            }
            at -= len;
        }
        unreachable!("the place is among those that were counted")
    }
}

/// The log while a process has it open: production's log thread.
pub struct OpenLog {
    sizes: LogSizes,
    /// The writer, made with the first group, which on a new disk names its store.
    writer: Option<LogEncoder>,
    resume: Option<Resume>,
    /// The entries that are written again, a block with each group.
    carrying: VecDeque<(Block, Vec<(ShardId, Entry)>)>,
}

impl OpenLog {
    pub fn new(resume: Resume, sizes: LogSizes) -> Self {
        Self { sizes, writer: None, resume: Some(resume), carrying: VecDeque::new() }
    }

    /// Writes a group. Returns the sum in its header, which covers all its bytes.
    pub fn write(&mut self, log: &mut Log, number: u64, records: Vec<LogRecord>) -> u64 {
        let writer = match &mut self.writer {
            Some(writer) => writer,
            None => {
                let resume = self.resume.take().expect("taken only here");
                self.writer
                    .insert(LogEncoder::new(resume.owned(&records), self.sizes.segment_bytes))
            }
        };
        if let Some((block, entries)) = self.carrying.pop_front() {
            writer.carry(block, entries);
        }
        for record in records {
            writer.write(record);
        }
        let output = writer.sync(number);
        let header = output.new_segment.as_ref().map(|header| &header[..]);
        log.write(output.segment, header, output.offset, &output.bytes);
        let sum = output.bytes[..GROUP_HEADER_BYTES].last_chunk().expect("a header is longer");
        u64::from_le_bytes(*sum)
    }

    pub fn synced(&mut self, log: &mut Log, number: u64) {
        let written = log.unsynced.take();
        log.witness = written.map(|written| (written.segment, written.from));
        self.writer.as_mut().expect("it wrote the group").durable(number);
    }

    pub fn read(
        &self,
        log: &Log,
        wanted: Vec<WantedEntries>,
        from: LogLocation,
        bytes_max: usize,
    ) -> Result<(LogLocation, Vec<LogPart>), DamagedLog> {
        let (owner, index) = match (&self.writer, &self.resume) {
            (Some(writer), _) => (writer.owner(), writer.index()),
            (None, Some(resume)) => (resume.owner, &resume.index),
            (None, None) => unreachable!("the one becomes the other"),
        };
        let read = index.next_read(wanted, from).expect("a read wants at least one entry");
        let bytes = match read.block {
            None => None,
            Some(block) => {
                let file = &log.segments[&block.segment];
                Some(file.get(block.offset..block.offset + block.len).ok_or(DamagedLog)?)
            }
        };
        Ok((read.at(), read.parts(owner, bytes, bytes_max)?))
    }

    pub fn trim(&mut self, log: &mut Log, needed: &[Needed]) -> Result<(), DamagedLog> {
        let Some(writer) = &mut self.writer else { return Ok(()) };
        let durable = writer.synced_through();
        for segment in writer.index().trimmable(needed, self.sizes.keep_bytes, durable) {
            writer.index_mut().deleted(segment);
            log.segments.remove(&segment);
        }
        if self.carrying.is_empty() {
            for carry in writer.index().to_carry(needed, self.sizes.keep_bytes) {
                let block = carry.block;
                let file = &log.segments[&block.segment];
                let bytes = file.get(block.offset..block.offset + block.len).ok_or(DamagedLog)?;
                self.carrying.push_back((block, carry.entries(writer.owner(), bytes)?));
            }
        }
        Ok(())
    }

    /// Returns whether the parts that must be kept for this store itself have made the log too
    /// long.
    pub fn is_full(&self) -> bool {
        let bytes_max = self.sizes.keep_bytes.saturating_add(self.sizes.spare_bytes());
        self.writer.as_ref().is_some_and(|writer| writer.index().exceeds(bytes_max))
    }

    /// Returns whether entries are being written again.
    pub fn is_carrying(&self) -> bool {
        !self.carrying.is_empty()
    }
}
