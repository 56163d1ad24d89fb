//! Reading segments back, and telling a torn tail from damage.
//!
//! A write that was under way when the machine died may be there in part, or in any order of its
//! sectors, or not at all. That is a torn tail: nobody was told of it, so it is cut. The same bad
//! bytes further up are damage: something acknowledged is gone. The rule that tells them apart:
//!
//! > A bad or missing group *n* is a torn tail unless a later header, itself good, says
//! > `synced_through` ≥ *n*.
//!
//! It holds across segments, so after a bad group the scanner goes on looking, at every byte, through
//! all segments that follow; what it finds meanwhile is in *doubt*, and is handed out or dropped
//! once the question is settled. After damage it goes on with the next good group, so that promises
//! (which only rise) are not forgotten; the gap shows in each shard's chain.
//!
//! The bytes are given one segment after the other, oldest first, so a gigabyte of log needs the
//! memory of one segment. No input makes it panic.

use bytes::Bytes;

use crate::codec::Reader;
use crate::store::log::group::{
    GROUP_HEADER_BYTES, GroupHeader, Owner, SEGMENT_HEADER_BYTES, SegmentHeader, body_at,
    header_at, next_magic,
};
use crate::store::log::{Record, Unreadable};

/// A good group and where it lies.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Group {
    pub segment: u64,
    pub offset: usize,
    /// Header included.
    pub len: usize,
    pub number: u64,
    pub records: Vec<Record>,
    pub unreadable: Vec<Unreadable>,
}

/// Something that was durable can't be read any more.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Damage {
    pub segment: u64,
    pub offset: usize,
    pub why: &'static str,
}

/// A place in the log.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Place {
    pub segment: u64,
    pub offset: usize,
}

/// What was found, once all segments were given.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Scanned {
    /// Whose log it is; none if no segment has a good header.
    pub owner: Option<Owner>,
    /// The number of the next group to be written.
    pub next_group: u64,
    /// The number of the next segment to be made.
    pub next_segment: u64,
    /// Where the good part ends.
    pub end: Option<Place>,
    /// A torn tail was cut.
    pub torn: bool,
    pub damage: Vec<Damage>,
}

/// What is to become of a segment's file before anything new is acknowledged.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Clean {
    Keep,
    /// Written anew with exactly these bytes and fsynced: the page cache may show what the disk
    /// does not hold.
    Rewrite(Bytes),
    Delete,
}

impl Scanned {
    /// The clean form of a segment after an unclean exit. To be done in this order: note a damaged
    /// store as suspect in etcd (cutting may remove what proves it), rewrite, then delete, *newest
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

/// Takes the segments of a log, oldest first.
#[derive(Debug, Default)]
pub struct Scanner {
    owner: Option<Owner>,
    last_segment: Option<u64>,
    /// The number of the group that must come next, once known.
    expected: Option<u64>,
    end: Option<Place>,
    doubt: Option<Doubt>,
    damage: Vec<Damage>,
}

/// Group `number` is bad or missing, and it is not yet known what that means.
#[derive(Debug)]
struct Doubt {
    place: Place,
    number: u64,
    /// Good groups after it, and where the last of them ends.
    held: Vec<Group>,
}

impl Scanner {
    /// `owner`, where the caller knows it, lets even a log without one good segment header be read.
    pub fn new(owner: Option<Owner>) -> Self {
        Self { owner, ..Self::default() }
    }

    /// Takes the next segment and hands out the groups that are certain by now, in order.
    pub fn segment(&mut self, segment: u64, bytes: &Bytes) -> Vec<Group> {
        let mut out = Vec::new();
        if let Some(last) = self.last_segment
            && last.checked_add(1) != Some(segment)
        {
            self.hurt(Place { segment, offset: 0 }, "segments before it are missing");
        }
        self.last_segment = Some(segment);
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

    /// All segments were given.
    pub fn finish(self) -> Scanned {
        Scanned {
            owner: self.owner,
            next_group: self.expected.unwrap_or(1),
            next_segment: self.end.map_or(1, |end| end.segment.saturating_add(1)),
            end: self.end,
            torn: self.doubt.is_some(),
            damage: self.damage,
        }
    }

    /// Looks at the segment's header.
    fn begin(&mut self, segment: u64, bytes: &Bytes) {
        let place = Place { segment, offset: 0 };
        let header = SegmentHeader::decode(bytes)
            .ok()
            .filter(|header| header.segment == segment)
            .filter(|header| self.owner.is_none_or(|owner| owner == header.owner));
        if let Some(header) = header {
            self.owner = Some(header.owner);
            let expected = *self.expected.get_or_insert(header.first_group);
            if header.first_group != expected {
                self.suspect(place, expected);
            }
            if self.doubt.is_none() {
                self.end = Some(Place { segment, offset: SEGMENT_HEADER_BYTES });
            }
            return;
        }
        // The header is durable before the first group is written, so bytes after it prove damage.
        let used =
            bytes.get(SEGMENT_HEADER_BYTES..).is_some_and(|rest| rest.iter().any(|&b| b != 0));
        if !used {
            // Made, never used: torn, unless something later proves the opposite.
            self.suspect(place, self.expected.unwrap_or(1));
        } else {
            self.hurt(place, "segment header");
            if self.doubt.is_some() {
                return;
            }
            self.end = Some(Place { segment, offset: SEGMENT_HEADER_BYTES });
        }
    }

    /// Reads what is at `at`; says where to go on.
    fn step(
        &mut self,
        owner: Owner,
        segment: u64,
        bytes: &Bytes,
        at: usize,
        out: &mut Vec<Group>,
    ) -> usize {
        let place = Place { segment, offset: at };
        let beyond = |from: usize| next_magic(bytes, from).unwrap_or(bytes.len());
        let Some(header) = header_at(owner, segment, bytes, at) else {
            self.suspect(place, self.expected.unwrap_or(0));
            return beyond(at + 1);
        };
        let expected = *self.expected.get_or_insert(header.number);
        if header.number < expected {
            self.suspect(place, expected);
            return beyond(at + 1);
        }
        if header.number > expected {
            self.suspect(place, expected);
        }
        self.settle(header, out);
        let Some(body) = body_at(owner, segment, bytes, at, header) else {
            self.suspect(place, header.number);
            return beyond(at + 1);
        };
        let group = read_group(place, header, body);
        let next = at + group.len;
        // The very group that seemed to be missing: something lies before it that is no group.
        let found = |doubt: &mut Doubt| doubt.number == group.number && doubt.held.is_empty();
        if let Some(doubt) = self.doubt.take_if(found) {
            self.hurt(doubt.place, "bytes between groups");
        }
        match &mut self.doubt {
            None => self.accept(group, out),
            Some(doubt) if doubt.held.last().is_none_or(|last| last.number < group.number) => {
                doubt.held.push(group);
            }
            Some(_) => {}
        }
        next
    }

    /// A good header may prove that the group in doubt was durable.
    fn settle(&mut self, header: GroupHeader, out: &mut Vec<Group>) {
        let proves = |doubt: &mut Doubt| {
            header.number > doubt.number && header.synced_through >= doubt.number
        };
        if let Some(doubt) = self.doubt.take_if(proves) {
            self.hurt(doubt.place, "a durable group is bad");
            for group in doubt.held {
                self.accept(group, out);
            }
            // Whatever else is missing up to here belongs to the same damage.
            self.expected = Some(header.number);
        }
    }

    fn accept(&mut self, group: Group, out: &mut Vec<Group>) {
        self.expected = Some(group.number.saturating_add(1));
        self.end = Some(Place { segment: group.segment, offset: group.offset + group.len });
        out.push(group);
    }

    /// Group `number` is bad or missing at `place`, for a reason yet to be found.
    fn suspect(&mut self, place: Place, number: u64) {
        self.doubt.get_or_insert(Doubt { place, number, held: Vec::new() });
    }

    fn hurt(&mut self, place: Place, why: &'static str) {
        self.damage.push(Damage { segment: place.segment, offset: place.offset, why });
    }
}

/// The records of a good group. They share a copy of its body, so that an entry kept for long does
/// not keep its whole segment in memory.
fn read_group(place: Place, header: GroupHeader, body: &[u8]) -> Group {
    let mut group = Group {
        segment: place.segment,
        offset: place.offset,
        len: GROUP_HEADER_BYTES + body.len(),
        number: header.number,
        records: Vec::new(),
        unreadable: Vec::new(),
    };
    let mut from = Reader::new(Bytes::copy_from_slice(body));
    while !from.is_empty() {
        match Record::decode(&mut from) {
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

/// The groups of a piece of one segment, as [`crate::store::log::index`] names pieces. Stops at the
/// first that is not good.
pub fn groups(owner: Owner, segment: u64, offset: usize, bytes: &[u8]) -> Vec<Group> {
    let mut out = Vec::new();
    let mut at = 0;
    while let Some(header) = header_at(owner, segment, bytes, at)
        && let Some(body) = body_at(owner, segment, bytes, at, header)
    {
        let mut group = read_group(Place { segment, offset: at }, header, body);
        at += group.len;
        group.offset += offset;
        out.push(group);
    }
    out
}
