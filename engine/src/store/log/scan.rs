//! Reading segments back, and distinguishing a torn tail from damage.
//!
//! A write that was in flight when the machine died may be on disk in part, or in any order of its
//! sectors, or not at all. That is a torn tail: it was never acknowledged, so it is cut. The same
//! bad bytes further up are damage: something acknowledged is gone. The rule that separates the
//! two:
//!
//! > A bad or missing group *n* is a torn tail unless a later header, itself intact, has
//! > `synced_through` ≥ *n*.
//!
//! The rule holds across segments, so after a bad group the scanner continues to search, at every
//! byte, through all segments that follow; the groups that it finds meanwhile are in *doubt*, and
//! are returned or dropped once the question is settled. After damage it continues with the next
//! intact group, so that promises (which only rise) are not lost; the gap shows in each shard's
//! chain.
//!
//! The bytes are given one segment after the other, oldest first, so a gigabyte of log needs the
//! memory of one segment. No input makes the scanner panic.

use bytes::Bytes;

use crate::codec::Reader;
use crate::store::log::group::{
    GROUP_HEADER_BYTES, GroupHeader, Owner, SEGMENT_HEADER_BYTES, SegmentHeader, body_at,
    header_at, next_magic,
};
use crate::store::log::{LogRecord, Unreadable};

/// An intact group and its location.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Group {
    /// The segment's number.
    pub segment: u64,
    /// The offset of the group's header in the segment.
    pub offset: usize,
    /// The length in bytes, header included.
    pub len: usize,
    /// The number of the group.
    pub number: u64,
    /// The records.
    pub records: Vec<LogRecord>,
    /// The records that this build can't read.
    pub unreadable: Vec<Unreadable>,
}

/// Damage: something that was durable can't be read any more.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Damage {
    /// The segment's number.
    pub segment: u64,
    /// The offset in the segment.
    pub offset: usize,
    /// The kind of damage.
    pub why: &'static str,
}

/// A location in the log's files.
#[derive(Clone, Copy, Debug, Default, Eq, Ord, PartialEq, PartialOrd)]
pub struct LogLocation {
    /// The segment's number.
    pub segment: u64,
    /// The offset in the segment.
    pub offset: usize,
}

/// The result of a scan, once all segments were given.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Scanned {
    /// The owner of the log; `None` if no segment has an intact header.
    pub owner: Option<Owner>,
    /// The number of the next group to be written.
    pub next_group: u64,
    /// The number of the next segment to be made.
    pub next_segment: u64,
    /// The end of the intact part.
    pub end: Option<LogLocation>,
    /// A torn tail was cut.
    pub torn: bool,
    /// The damage that was found.
    pub damage: Vec<Damage>,
    /// The segments that stay, oldest first, with an intact group in them or without.
    pub segments: Vec<u64>,
}

/// The treatment of a segment's file before anything new is acknowledged.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Clean {
    /// The file stays as it is.
    Keep,
    /// The file is rewritten with exactly these bytes and fsynced: the page cache may show bytes
    /// that the disk does not hold.
    Rewrite(Bytes),
    /// The file is deleted.
    Delete,
}

impl Scanned {
    /// The treatment of a segment after an unclean exit. To be done in this order: mark a damaged
    /// store as suspect in etcd (truncation may remove the proof), rewrite, then delete, *newest
    /// first*, so that a crash in between leaves no gap.
    pub fn clean(&self, segment: u64, bytes: &Bytes) -> Clean {
        match self.end {
            Some(end) if segment < end.segment => Clean::Keep,
            Some(end) if segment == end.segment => {
                Clean::Rewrite(bytes.slice(..end.offset.min(bytes.len())))
            }
            _ => Clean::Delete,
        }
    }
}

/// Scans the segments of a log, oldest first.
#[derive(Debug, Default)]
pub struct Scanner {
    owner: Option<Owner>,
    segments: Vec<u64>,
    /// The number of the group that must come next, once it is known.
    expected: Option<u64>,
    end: Option<LogLocation>,
    doubt: Option<Doubt>,
    damage: Vec<Damage>,
}

/// Group `number` is bad or missing, and it is not known yet whether that is a torn tail or damage.
#[derive(Debug)]
struct Doubt {
    location: LogLocation,
    number: u64,
    /// Intact groups after it.
    later_groups: Vec<Group>,
}

impl Scanner {
    /// A scanner of a log. `owner`: that of any segment whose header is intact
    /// ([`SegmentHeader::decode`]). Without it the segments before the first intact header can't be
    /// read, since the sums depend on it.
    pub fn new(owner: Option<Owner>) -> Self {
        Self { owner, ..Self::default() }
    }

    /// Takes the next segment and returns the groups that are certain by now, in order.
    pub fn segment(&mut self, segment: u64, bytes: &Bytes) -> Vec<Group> {
        let mut out = Vec::new();
        if let Some(last) = self.segments.last()
            && last.checked_add(1) != Some(segment)
        {
            self.note_damage(LogLocation { segment, offset: 0 }, "segments before it are missing");
        }
        self.segments.push(segment);
        self.begin(segment, bytes);
        let Some(owner) = self.owner else {
            return out;
        };
        let mut at = SEGMENT_HEADER_BYTES;
        while bytes.get(at..).is_some_and(|rest| rest.iter().any(|&byte| byte != 0)) {
            at = self.step(owner, segment, bytes, at, &mut out);
        }
        out
    }

    /// Returns the result. All segments were given.
    pub fn finish(mut self) -> Scanned {
        self.segments.retain(|&segment| self.end.is_some_and(|end| segment <= end.segment));
        Scanned {
            segments: self.segments,
            owner: self.owner,
            next_group: self.expected.unwrap_or(1),
            next_segment: self.end.map_or(1, |end| end.segment.saturating_add(1)),
            end: self.end,
            torn: self.doubt.is_some(),
            damage: self.damage,
        }
    }

    /// Checks the segment's header.
    fn begin(&mut self, segment: u64, bytes: &Bytes) {
        let location = LogLocation { segment, offset: 0 };
        let header = SegmentHeader::decode(bytes)
            .ok()
            .filter(|header| header.segment == segment)
            .filter(|header| self.owner.is_none_or(|owner| owner == header.owner));
        if let Some(header) = header {
            self.owner = Some(header.owner);
            let expected = *self.expected.get_or_insert(header.first_group);
            if header.first_group != expected {
                self.suspect(location, expected);
            }
            if self.doubt.is_none() {
                self.end = Some(LogLocation { segment, offset: SEGMENT_HEADER_BYTES });
            }
            return;
        }
        // The header is durable before the first group is written, so bytes after it prove damage.
        let used =
            bytes.get(SEGMENT_HEADER_BYTES..).is_some_and(|rest| rest.iter().any(|&b| b != 0));
        if !used {
            // The segment was made and never used: torn, unless something later proves the
            // opposite.
            self.suspect(location, self.expected.unwrap_or(1));
        } else {
            self.note_damage(location, "segment header");
            if self.doubt.is_some() {
                return;
            }
            self.end = Some(LogLocation { segment, offset: SEGMENT_HEADER_BYTES });
        }
    }

    /// Reads the bytes at `at`; returns the offset at which to continue.
    fn step(
        &mut self,
        owner: Owner,
        segment: u64,
        bytes: &Bytes,
        at: usize,
        out: &mut Vec<Group>,
    ) -> usize {
        let location = LogLocation { segment, offset: at };
        let beyond = |from: usize| next_magic(bytes, from).unwrap_or(bytes.len());
        let Some(header) = header_at(owner, segment, bytes, at) else {
            self.suspect(location, self.expected.unwrap_or(0));
            return beyond(at + 1);
        };
        let expected = *self.expected.get_or_insert(header.number);
        if header.number < expected {
            self.suspect(location, expected);
            return beyond(at + 1);
        }
        if header.number > expected {
            self.suspect(location, expected);
        }
        self.settle(header, out);
        let Some(body) = body_at(owner, segment, bytes, at, header) else {
            self.suspect(location, header.number);
            return beyond(at + 1);
        };
        let group = read_group(location, header, body);
        let next = at + group.len;
        // The group that seemed to be missing: the bytes before it are not a group.
        let found =
            |doubt: &mut Doubt| doubt.number == group.number && doubt.later_groups.is_empty();
        if let Some(doubt) = self.doubt.take_if(found) {
            self.note_damage(doubt.location, "bytes between groups");
        }
        match &mut self.doubt {
            None => self.accept(group, out),
            Some(doubt)
                if doubt.later_groups.last().is_none_or(|last| last.number < group.number) =>
            {
                doubt.later_groups.push(group);
            }
            Some(_) => {}
        }
        next
    }

    /// An intact header may prove that the group in doubt was durable.
    fn settle(&mut self, header: GroupHeader, out: &mut Vec<Group>) {
        let proves = |doubt: &mut Doubt| {
            header.number > doubt.number && header.synced_through >= doubt.number
        };
        if let Some(doubt) = self.doubt.take_if(proves) {
            self.note_damage(doubt.location, "a durable group is bad");
            for group in doubt.later_groups {
                self.accept(group, out);
            }
            // Other groups that are missing up to here belong to the same damage.
            self.expected = Some(header.number);
        }
    }

    fn accept(&mut self, group: Group, out: &mut Vec<Group>) {
        self.expected = Some(group.number.saturating_add(1));
        self.end = Some(LogLocation { segment: group.segment, offset: group.offset + group.len });
        out.push(group);
    }

    /// Notes that group `number` is bad or missing at `location`, for a reason that is not known
    /// yet.
    fn suspect(&mut self, location: LogLocation, number: u64) {
        self.doubt.get_or_insert(Doubt { location, number, later_groups: Vec::new() });
    }

    fn note_damage(&mut self, location: LogLocation, why: &'static str) {
        self.damage.push(Damage { segment: location.segment, offset: location.offset, why });
    }
}

/// The records of an intact group. They own their bytes: an entry that is kept for long does not
/// keep its segment in memory ([`crate::batch::Batch::decode`]).
fn read_group(location: LogLocation, header: GroupHeader, body: &[u8]) -> Group {
    let mut group = Group {
        segment: location.segment,
        offset: location.offset,
        len: GROUP_HEADER_BYTES + body.len(),
        number: header.number,
        records: Vec::new(),
        unreadable: Vec::new(),
    };
    let mut from = Reader::new(Bytes::copy_from_slice(body));
    while !from.is_empty() {
        match LogRecord::decode(&mut from) {
            Ok(Ok(record)) => group.records.push(record),
            Ok(Err(unreadable)) => group.unreadable.push(unreadable),
            Err(malformed) => {
                group.unreadable.push(Unreadable { shard: None, why: malformed.0 });
                break;
            }
        }
    }
    group
}

/// The groups of a block of one segment, as [`crate::store::log::index`] defines blocks. Ends at
/// the first that is not intact.
pub fn groups(owner: Owner, segment: u64, offset: usize, bytes: &[u8]) -> Vec<Group> {
    let mut out = Vec::new();
    let mut at = 0;
    while let Some(header) = header_at(owner, segment, bytes, at)
        && let Some(body) = body_at(owner, segment, bytes, at, header)
    {
        let mut group = read_group(LogLocation { segment, offset: at }, header, body);
        at += group.len;
        group.offset += offset;
        out.push(group);
    }
    out
}

/// The location at which a block of groups that was written, `len` bytes from `location` on, is
/// damaged; `None` if it is intact.
pub fn first_bad(
    owner: Owner,
    location: LogLocation,
    len: usize,
    bytes: &[u8],
) -> Option<LogLocation> {
    let mut at = location.offset;
    for group in groups(owner, location.segment, location.offset, bytes) {
        if !group.unreadable.is_empty() {
            break;
        }
        at = group.offset + group.len;
    }
    (at != location.offset + len).then_some(LogLocation { segment: location.segment, offset: at })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::testing::{Segments, random_log};

    fn scan(segments: &Segments) -> (Vec<Group>, Scanned) {
        let header = |bytes: &Vec<u8>| SegmentHeader::decode(&Bytes::copy_from_slice(bytes)).ok();
        let owner = segments.values().find_map(header).map(|header| header.owner);
        let mut scanner = Scanner::new(owner);
        let mut out = Vec::new();
        for (&segment, bytes) in segments {
            out.extend(scanner.segment(segment, &Bytes::copy_from_slice(bytes)));
        }
        (out, scanner.finish())
    }

    /// The segment and the end of each group of the intact log.
    fn ends(groups: &[Group]) -> Vec<(u64, usize)> {
        groups.iter().map(|group| (group.segment, group.offset + group.len)).collect()
    }

    #[test]
    fn an_intact_log_reads_back() {
        for seed in 0..20 {
            let log = random_log(seed, 12, 500);
            let (groups, scanned) = scan(&log.segments);
            let records: Vec<_> = groups.iter().map(|group| group.records.clone()).collect();
            assert_eq!(without_restatements(&records), log.groups, "seed {seed}");
            assert!(scanned.damage.is_empty());
            assert!(!scanned.torn);
            assert_eq!(scanned.next_group, 13);
        }
    }

    fn without_restatements(groups: &[Vec<LogRecord>]) -> Vec<Vec<LogRecord>> {
        let written = |record: &&LogRecord| {
            !matches!(
                record,
                LogRecord::Checkpoint { .. }
                    | LogRecord::ActedOn(_)
                    | LogRecord::Identity(_)
                    | LogRecord::Etcd(_)
            )
        };
        groups.iter().map(|group| group.iter().filter(written).cloned().collect()).collect()
    }

    /// The result of a power cut: everything up to a point, nothing after it. The groups that are
    /// whole are read back, and nothing is reported as damage.
    #[test]
    fn a_cut_anywhere_gives_the_longest_prefix() {
        for seed in 0..6 {
            let log = random_log(seed, 8, 500);
            let (intact, _) = scan(&log.segments);
            for (&segment, bytes) in &log.segments {
                for at in SEGMENT_HEADER_BYTES..bytes.len() {
                    let mut cut = log.segments.clone();
                    cut.retain(|&number, _| number <= segment);
                    cut.get_mut(&segment).unwrap()[at..].fill(0);
                    let (groups, scanned) = scan(&cut);
                    let whole = ends(&intact).iter().filter(|end| **end <= (segment, at)).count();
                    // The bytes after the last one of a group may be zeros in any case.
                    assert!(groups.len() >= whole, "seed {seed} segment {segment} at {at}");
                    assert_eq!(groups[..], intact[..groups.len()]);
                    assert_eq!(scanned.damage, []);
                    assert_eq!(scanned.next_group, groups.len() as u64 + 1);
                    check_clean(&cut, &scanned, &groups);
                }
            }
        }
    }

    /// The cleaned segments read the same, with nothing left to cut.
    #[track_caller]
    fn check_clean(segments: &Segments, scanned: &Scanned, groups: &[Group]) {
        let mut clean = Segments::new();
        for (&segment, bytes) in segments {
            let bytes = Bytes::copy_from_slice(bytes);
            match scanned.clean(segment, &bytes) {
                Clean::Keep => clean.insert(segment, bytes.to_vec()),
                Clean::Rewrite(bytes) => clean.insert(segment, bytes.to_vec()),
                Clean::Delete => None,
            };
        }
        let (again, rescanned) = scan(&clean);
        assert_eq!(again, groups);
        assert!(!rescanned.torn);
        assert_eq!(rescanned.next_segment, scanned.next_segment);
        assert_eq!(rescanned.next_group, scanned.next_group);
    }

    /// One wrong bit anywhere in a group that a later header proves durable is reported. In the
    /// last group it looks like a torn tail. It never changes the content of a group.
    #[test]
    fn a_flip_in_a_durable_group_is_damage() {
        for seed in 0..6 {
            let log = random_log(seed, 8, 500);
            let (intact, _) = scan(&log.segments);
            let last = intact.last().unwrap();
            for (&segment, bytes) in &log.segments {
                for at in 0..bytes.len() {
                    let mut flipped = log.segments.clone();
                    flipped.get_mut(&segment).unwrap()[at] ^= 1 << (at % 8);
                    let (groups, scanned) = scan(&flipped);
                    let context = format!("seed {seed} segment {segment} at {at}");
                    assert!(groups.iter().all(|group| intact.contains(group)), "{context}");
                    let in_last_or_after = (segment, at) >= (last.segment, last.offset);
                    if in_last_or_after {
                        assert!(scanned.torn && scanned.damage.is_empty(), "{context}");
                        assert!(groups.len() + 1 >= intact.len(), "{context}");
                    } else {
                        assert!(!scanned.damage.is_empty(), "{context}");
                        assert!(groups.len() + 2 > intact.len(), "{context}: more than it is gone");
                    }
                }
            }
        }
    }

    /// A segment in the middle, or the tail of one, is missing.
    #[test]
    fn a_missing_piece_is_damage() {
        let log = random_log(3, 12, 500);
        let middle = *log.segments.keys().nth(1).unwrap();
        let mut lost = log.segments.clone();
        lost.remove(&middle);
        assert!(!scan(&lost).1.damage.is_empty());
        let mut zeroed = log.segments.clone();
        zeroed.get_mut(&middle).unwrap()[SEGMENT_HEADER_BYTES..].fill(0);
        assert!(!scan(&zeroed).1.damage.is_empty());
    }

    /// Sectors of two unsynced groups reached the disk in the wrong order.
    #[test]
    fn a_good_group_after_a_torn_one_is_cut_with_it() {
        let log = random_log(4, 8, 1 << 20);
        let mut segments = log.segments.clone();
        let (intact, _) = scan(&segments);
        let owner = scan(&segments).1.owner.unwrap();
        let (seventh, eighth) = (&intact[6], &intact[7]);
        let bytes = segments.get_mut(&seventh.segment).unwrap();
        // The eighth group was written while the seventh's fsync had not returned.
        let header = header_at(owner, eighth.segment, bytes, eighth.offset).unwrap();
        let body = body_at(owner, eighth.segment, bytes, eighth.offset, header).unwrap().to_vec();
        let again = crate::store::log::group::encode_group(owner, eighth.segment, 8, 6, &body);
        bytes[eighth.offset..eighth.offset + again.len()].copy_from_slice(&again);
        bytes[seventh.offset + 20] ^= 1;
        let (groups, scanned) = scan(&segments);
        assert_eq!(groups, intact[..6]);
        assert_eq!(scanned.damage, []);
        assert!(scanned.torn);
    }

    #[test]
    fn no_bytes_make_it_panic() {
        let mut random = crate::store::testing::SplitMix64::new(9);
        for round in 0..300 {
            let mut log = random_log(round, 6, 400).segments;
            for bytes in log.values_mut() {
                for _ in 0..1 + random.below(20) {
                    let at = random.below(bytes.len() as u64) as usize;
                    match random.below(3) {
                        0 => bytes[at] = random.next() as u8,
                        1 => bytes.truncate(at + 1),
                        _ => bytes.insert(at, random.next() as u8),
                    }
                }
            }
            let _ = scan(&log);
        }
    }
}
