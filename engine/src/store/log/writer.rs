//! From the node's `Write` and `Sync` effects to the bytes of groups and segments.
//!
//! The driver hands every record to [`Writer::write`] and, on `Sync`, gets the bytes to write and
//! where. It keeps three promises:
//! - A new segment's file exists at its full size, with its header, then zeros, and is fsynced (its
//!   folder too), before a group is written into it. (A damaged header is thereby never a torn one.)
//! - Groups are written and fsynced in order; the next group is written after the fsync of the one
//!   before it.
//! - Each finished fsync is told ([`Writer::durable`]), so that later headers bear witness to it.
//!
//! The writer follows each shard's small state by looking at the records that pass, and begins each
//! segment with a restatement of it, in the same group as what the node wrote. The restatement says
//! how things stood *before* that group, so the group reads in order.

use std::collections::BTreeMap;

use crate::ids::ShardId;
use crate::store::log::group::{
    GROUP_HEADER_BYTES, Owner, SEGMENT_HEADER_BYTES, SegmentHeader, encode_group,
};
use crate::store::log::index::Index;
use crate::store::log::{Identity, Record, SmallState};

/// What the log writer begins with: all of it comes from recovery.
#[derive(Clone, Debug, Default)]
pub struct Resume {
    pub owner: Owner,
    pub identity: Option<Identity>,
    pub next_group: u64,
    pub next_segment: u64,
    pub shards: BTreeMap<ShardId, SmallState>,
    pub index: Index,
}

/// What to write for one group.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Output {
    /// Make this segment first: its header; zeros follow up to [`Output::segment_bytes`].
    pub new_segment: Option<[u8; SEGMENT_HEADER_BYTES]>,
    pub segment: u64,
    /// The size to preallocate: never less than header and group.
    pub segment_bytes: usize,
    pub offset: usize,
    pub bytes: Vec<u8>,
}

#[derive(Debug)]
pub struct Writer {
    owner: Owner,
    segment_bytes: usize,
    /// None until the first group of this run: each run begins a segment of its own.
    open: Option<Open>,
    next_segment: u64,
    next_group: u64,
    synced_through: u64,
    pending: Vec<Record>,
    pending_bytes: Vec<u8>,
    shards: BTreeMap<ShardId, SmallState>,
    identity: Option<Identity>,
    /// How things stood before the group that is being gathered, where it changed them.
    shards_before: BTreeMap<ShardId, Option<SmallState>>,
    identity_before: Option<Option<Identity>>,
    index: Index,
}

#[derive(Clone, Copy, Debug)]
struct Open {
    segment: u64,
    offset: usize,
    size: usize,
}

impl Writer {
    /// A writer that begins a new segment with its first group.
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
            shards_before: BTreeMap::new(),
            identity_before: None,
            index: resume.index,
        }
    }

    /// Adds a record to the group that is being gathered.
    pub fn write(&mut self, record: Record) {
        record.encode(&mut self.pending_bytes);
        match (&record, record.shard()) {
            (Record::Identity(identity), _) => {
                let before = self.identity.replace(identity.clone());
                self.identity_before.get_or_insert(before);
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

    /// Bytes gathered since the last group.
    pub fn pending_bytes(&self) -> usize {
        self.pending_bytes.len()
    }

    /// Closes the group. `number` is the node's, and must be the next: anything else is a bug.
    pub fn sync(&mut self, number: u64) -> Output {
        assert_eq!(number, self.next_group, "groups are numbered without a gap");
        self.next_group += 1;
        let body = std::mem::take(&mut self.pending_bytes);
        let fits = |open: &Open| open.offset + GROUP_HEADER_BYTES + body.len() <= open.size;
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
        self.open = Some(Open { offset: open.offset + bytes.len(), ..open });
        Output {
            new_segment,
            segment: open.segment,
            segment_bytes: open.size,
            offset: open.offset,
            bytes,
        }
    }

    /// Group `group` and all before it are fsynced.
    pub fn durable(&mut self, group: u64) {
        self.synced_through = self.synced_through.max(group);
    }

    pub fn synced_through(&self) -> u64 {
        self.synced_through
    }

    pub fn index(&self) -> &Index {
        &self.index
    }

    pub fn index_mut(&mut self) -> &mut Index {
        &mut self.index
    }

    pub fn owner(&self) -> Owner {
        self.owner
    }

    fn roll(&mut self, first_group: u64, body: usize) -> (Open, [u8; SEGMENT_HEADER_BYTES]) {
        let segment = self.next_segment;
        self.next_segment += 1;
        let size = self.segment_bytes.max(SEGMENT_HEADER_BYTES + GROUP_HEADER_BYTES + body);
        let header = SegmentHeader { owner: self.owner, segment, first_group };
        (Open { segment, offset: SEGMENT_HEADER_BYTES, size }, header.encode())
    }

    /// Identity and small states as before the group that is being closed.
    fn restatement(&self) -> Vec<u8> {
        let mut out = Vec::new();
        let identity = self.identity_before.as_ref().unwrap_or(&self.identity);
        if let Some(identity) = identity {
            Record::Identity(identity.clone()).encode(&mut out);
        }
        for (&shard, &now) in &self.shards {
            let before = self.shards_before.get(&shard).copied().unwrap_or(Some(now));
            if let Some(small) = before {
                Record::Shard { shard, small }.encode(&mut out);
            }
        }
        out
    }
}
