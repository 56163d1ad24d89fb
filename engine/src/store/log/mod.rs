//! The log: one append-only sequence of groups, in segment files, for all shards of a node.
//!
//! ```text
//!   segment  =  header · group · group · … · zeros
//!   group    =  header (number, length, synced_through, sums) · record · record · …
//! ```
//!
//! [`group`] frames bytes, [`writer`] turns the node's `Write` and `Sync` effects into the bytes to
//! write, [`scan`] reads segments back and distinguishes a torn tail from damage, [`index`] maps
//! entries to bytes, [`catch_up`] reads entries for followers that lag. This file defines the
//! records.
//!
//! *The same position may be in the log more than once*: written again after a `Truncate`, for a
//! newer copy, or carried unchanged out of an old segment. The last group that contains a position
//! wins.

pub mod block;
pub mod catch_up;
pub mod group;
pub mod index;
pub mod scan;
pub mod writer;

use crate::codec::{Malformed, Reader, put_bytes, put_varint};
use crate::entry::{Entry, Position};
use crate::etcd_memory::EtcdMemory;
use crate::ids::{Boot, CopyNo, Epoch, Seq, ShardId, Slots, StoreId};
use crate::shard_record::ShardRecord;
use crate::store::layout::{position, put_position, put_slots, slots};

const KIND_APPEND: u8 = 1;
const KIND_TRUNCATE: u8 = 2;
const KIND_PROMISE: u8 = 3;
const KIND_COPY: u8 = 4;
const KIND_DROP: u8 = 5;
const KIND_IDENTITY: u8 = 6;
const KIND_CHECKPOINT: u8 = 7;
const KIND_SUSPECT: u8 = 8;
const KIND_ACTED_ON: u8 = 9;
const KIND_ETCD: u8 = 10;

/// One record of a group. Records are written in the order in which the node emits them.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum LogRecord {
    /// An entry of a shard.
    Append {
        /// The shard.
        shard: ShardId,
        /// The entry.
        entry: Entry,
    },
    /// Entries above `after` are void. Always in the same group as what replaces them.
    Truncate {
        /// The shard.
        shard: ShardId,
        /// The last seq that stays.
        after: Seq,
    },
    /// The shard obeys no epoch below this one, for as long as the store lives.
    Promise {
        /// The shard.
        shard: ShardId,
        /// The epoch.
        epoch: Epoch,
    },
    /// A copy begins at `base`; entries of former copies are void.
    Copy {
        /// The shard.
        shard: ShardId,
        /// The shard's slots.
        slots: Slots,
        /// The number of the copy.
        copy: CopyNo,
        /// The position at which the copy begins.
        base: Position,
    },
    /// The copy is deleted; its number and the promise stay.
    Drop {
        /// The shard.
        shard: ShardId,
        /// The number of the copy.
        copy: CopyNo,
    },
    /// The copy was found to be wrong while it was in use: it is to be replaced, and a start before
    /// that must know.
    Suspect {
        /// The shard.
        shard: ShardId,
        /// The number of the copy.
        copy: CopyNo,
    },
    /// The store acts on this record of etcd from now on: as the primary, or by deleting its copy.
    /// See [`recovery_plan`](crate::recovery_plan).
    ActedOn(Box<ShardRecord>),
    /// The store's identity: written at its first start and at each boot.
    Identity(Identity),
    /// The store's memory of etcd, in case etcd is lost.
    Etcd(Box<EtcdMemory>),
    /// A checkpoint of a shard, written at the start of each segment so that older segments can be
    /// deleted. The node never writes one: the [`writer`] does.
    Checkpoint {
        /// The shard.
        shard: ShardId,
        /// The checkpoint.
        checkpoint: ShardCheckpoint,
    },
}

/// The information about a shard that the log must keep when its older segments are deleted.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct ShardCheckpoint {
    /// The epoch that the store has promised.
    pub promised: Epoch,
    /// The number of the present copy, or of the last one.
    pub copy: CopyNo,
    /// The present copy was found to be damaged, by recovery or since. Kept until a new copy, since
    /// the proof may have been truncated or deleted in the meantime.
    pub suspect: bool,
    /// The extent of the present copy; `None` without a copy.
    pub extent: Option<CopyExtent>,
}

/// The extent of the present copy, as the log knows it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct CopyExtent {
    /// The shard's slots.
    pub slots: Slots,
    /// The position at which the copy began.
    pub base: Position,
    /// The seq that its log has reached. A recovery that ends below it has lost something.
    pub last: Seq,
}

impl ShardCheckpoint {
    /// Updates the checkpoint by a record. The caller has matched the shard.
    pub fn observe(&mut self, record: &LogRecord) {
        match record {
            LogRecord::Append { entry, .. } => {
                if let Some(extent) = &mut self.extent {
                    // A carried entry is below the last: it does not shorten the log.
                    extent.last = extent.last.max(entry.seq);
                }
            }
            LogRecord::Truncate { after, .. } => {
                if let Some(extent) = &mut self.extent {
                    extent.last = extent.last.min(*after);
                }
            }
            // Promises only rise, even if damage has changed the order of the records.
            LogRecord::Promise { epoch, .. } => self.promised = self.promised.max(*epoch),
            LogRecord::Copy { slots, copy, base, .. } => {
                self.copy = *copy;
                self.suspect = false;
                self.extent = Some(CopyExtent { slots: *slots, base: *base, last: base.seq });
            }
            LogRecord::Drop { copy, .. } => {
                self.copy = self.copy.max(*copy);
                self.suspect = false;
                self.extent = None;
            }
            LogRecord::Checkpoint { checkpoint, .. } => {
                let promised = self.promised.max(checkpoint.promised);
                *self = Self { promised, ..*checkpoint };
            }
            LogRecord::Suspect { copy, .. } => self.suspect |= *copy == self.copy,
            LogRecord::ActedOn(_) | LogRecord::Identity(_) | LogRecord::Etcd(_) => {}
        }
    }
}

/// The number of claims of an identity that are kept. More are only made if as many starts in a row
/// end before etcd takes their claim.
pub const CLAIMS_MAX: usize = 64;

/// A store's identity, as its own disk has it. See [`boot`](crate::node::boot).
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Identity {
    /// The cluster's uuid.
    pub cluster: u128,
    /// The store.
    pub store: StoreId,
    /// The number of the last start.
    pub boot: Boot,
    /// The nonce in etcd when it was last read; `None` while etcd had no record of the store.
    pub read_nonce: Option<u128>,
    /// The nonces that were claimed over that one, the last of them by the last start: etcd may
    /// have any of them, or get one later. 1 to [`CLAIMS_MAX`].
    pub claims: Vec<u128>,
}

impl LogRecord {
    /// The shard that the record is about; `None` for what concerns the store as a whole.
    pub fn shard(&self) -> Option<ShardId> {
        match self {
            Self::Append { shard, .. }
            | Self::Truncate { shard, .. }
            | Self::Promise { shard, .. }
            | Self::Copy { shard, .. }
            | Self::Drop { shard, .. }
            | Self::Suspect { shard, .. }
            | Self::Checkpoint { shard, .. } => Some(*shard),
            Self::ActedOn(record) => Some(record.shard()),
            Self::Identity(_) | Self::Etcd(_) => None,
        }
    }

    /// Appends the record to a group's body: a length, the kind, the shard, the rest. The length
    /// lets a build that does not know a kind skip it and report it.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let mut body = Vec::new();
        body.push(self.kind());
        if let Some(shard) = self.shard() {
            body.extend_from_slice(&shard.0.to_be_bytes());
        }
        match self {
            Self::Append { entry, .. } => entry.encode(&mut body),
            Self::Truncate { after, .. } => put_varint(&mut body, after.0),
            Self::Promise { epoch, .. } => put_varint(&mut body, epoch.0),
            Self::Copy { slots, copy, base, .. } => {
                put_slots(&mut body, *slots);
                put_varint(&mut body, copy.0);
                put_position(&mut body, *base);
            }
            Self::Drop { copy, .. } | Self::Suspect { copy, .. } => put_varint(&mut body, copy.0),
            Self::ActedOn(record) => put_bytes(&mut body, &record.encode()),
            Self::Identity(identity) => identity.encode(&mut body),
            Self::Etcd(memory) => memory.encode(&mut body),
            Self::Checkpoint { checkpoint, .. } => checkpoint.encode(&mut body),
        }
        put_bytes(out, &body);
    }

    fn kind(&self) -> u8 {
        match self {
            Self::Append { .. } => KIND_APPEND,
            Self::Truncate { .. } => KIND_TRUNCATE,
            Self::Promise { .. } => KIND_PROMISE,
            Self::Copy { .. } => KIND_COPY,
            Self::Drop { .. } => KIND_DROP,
            Self::Suspect { .. } => KIND_SUSPECT,
            Self::ActedOn(_) => KIND_ACTED_ON,
            Self::Identity(_) => KIND_IDENTITY,
            Self::Etcd(_) => KIND_ETCD,
            Self::Checkpoint { .. } => KIND_CHECKPOINT,
        }
    }

    /// Reads the next record of a group's body. `Err(Malformed)`: the body can't be read any
    /// further. `Ok(Err(_))`: this record can't be read, those after it can.
    pub fn decode(from: &mut Reader) -> Result<Result<Self, Unreadable>, Malformed> {
        let mut body = Reader::new(from.bytes("record")?);
        let kind = body.u8("record kind")?;
        let of_store = match kind {
            KIND_IDENTITY => Some(Identity::decode(&mut body).map(Self::Identity)),
            KIND_ETCD => Some(EtcdMemory::decode(&mut body).map(|it| Self::Etcd(Box::new(it)))),
            _ => None,
        };
        if let Some(decoded) = of_store {
            return Ok(decoded
                .and_then(|record| body.finish("record").map(|()| record))
                .map_err(|malformed| Unreadable { shard: None, why: malformed.0 }));
        }
        let shard = match body.u16_be("record shard") {
            Ok(shard) => ShardId(shard),
            Err(malformed) => return Ok(Err(Unreadable { shard: None, why: malformed.0 })),
        };
        let record = Self::decode_body(kind, shard, &mut body)
            .and_then(|record| body.finish("record").map(|()| record));
        Ok(record.map_err(|malformed| Unreadable { shard: Some(shard), why: malformed.0 }))
    }

    fn decode_body(kind: u8, shard: ShardId, body: &mut Reader) -> Result<Self, Malformed> {
        Ok(match kind {
            KIND_APPEND => Self::Append { shard, entry: Entry::decode(body)? },
            KIND_TRUNCATE => Self::Truncate { shard, after: Seq(body.varint("truncate")?) },
            KIND_PROMISE => Self::Promise { shard, epoch: Epoch(body.varint("promise")?) },
            KIND_COPY => Self::Copy {
                shard,
                slots: slots(body)?,
                copy: CopyNo(body.varint("copy")?),
                base: position(body)?,
            },
            KIND_DROP => Self::Drop { shard, copy: CopyNo(body.varint("drop")?) },
            KIND_SUSPECT => Self::Suspect { shard, copy: CopyNo(body.varint("suspect")?) },
            KIND_ACTED_ON => {
                let record = ShardRecord::decode(&body.bytes("shard record")?)?;
                if record.shard() != shard {
                    return Err(Malformed("shard record of another shard"));
                }
                Self::ActedOn(Box::new(record))
            }
            KIND_CHECKPOINT => {
                Self::Checkpoint { shard, checkpoint: ShardCheckpoint::decode(body)? }
            }
            _ => return Err(Malformed("record kind: a newer build wrote it")),
        })
    }
}

/// A record that this build can't read, in a group whose sums are correct: a newer build wrote it,
/// or a bug did. The shard (all of them, if none is named) must not continue with what is left.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Unreadable {
    /// The shard, if it can be read.
    pub shard: Option<ShardId>,
    /// The reason.
    pub why: &'static str,
}

impl ShardCheckpoint {
    fn encode(&self, out: &mut Vec<u8>) {
        put_varint(out, self.promised.0);
        put_varint(out, self.copy.0);
        out.push(u8::from(self.extent.is_some()) | u8::from(self.suspect) << 1);
        if let Some(extent) = &self.extent {
            put_slots(out, extent.slots);
            put_position(out, extent.base);
            put_varint(out, extent.last.0);
        }
    }

    fn decode(from: &mut Reader) -> Result<Self, Malformed> {
        let promised = Epoch(from.varint("checkpoint promise")?);
        let copy = CopyNo(from.varint("checkpoint copy")?);
        let flags = from.u8("checkpoint flags")?;
        let suspect = flags & 2 != 0;
        let extent = match flags & !2 {
            0 => None,
            1 => Some(CopyExtent {
                slots: slots(from)?,
                base: position(from)?,
                last: Seq(from.varint("checkpoint last")?),
            }),
            _ => return Err(Malformed("checkpoint flags")),
        };
        Ok(Self { promised, copy, suspect, extent })
    }
}

impl Identity {
    /// The nonce of the last start.
    pub fn nonce(&self) -> u128 {
        self.claims.last().copied().unwrap_or_default()
    }

    /// Returns whether etcd may have this nonce if the disk is the store's.
    pub fn knows(&self, nonce: u128) -> bool {
        self.read_nonce == Some(nonce) || self.claims.contains(&nonce)
    }

    fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.cluster.to_le_bytes());
        out.extend_from_slice(&self.store.0.to_le_bytes());
        put_varint(out, self.boot.0);
        out.push(u8::from(self.read_nonce.is_some()));
        put_varint(out, self.claims.len() as u64);
        for nonce in self.read_nonce.iter().chain(&self.claims) {
            out.extend_from_slice(&nonce.to_le_bytes());
        }
    }

    fn decode(from: &mut Reader) -> Result<Self, Malformed> {
        let cluster = from.u128_le("identity cluster")?;
        let store = StoreId(from.u128_le("identity store")?);
        let boot = Boot(from.varint("identity boot")?);
        let has_read_nonce = match from.u8("identity flags")? {
            flags @ 0..=1 => flags == 1,
            _ => return Err(Malformed("identity flags")),
        };
        let count = from.count("identity claims")?;
        if !(1..=CLAIMS_MAX).contains(&count) {
            return Err(Malformed("identity claims"));
        }
        let mut nonce = || from.u128_le("identity nonce");
        let read_nonce = has_read_nonce.then(&mut nonce).transpose()?;
        let claims = (0..count).map(|_| nonce()).collect::<Result<_, _>>()?;
        Ok(Self { cluster, store, boot, read_nonce, claims })
    }
}
