//! The log: one append-only sequence of groups, in segment files, for all shards of a node.
//!
//! ```text
//!   segment  =  header · group · group · … · zeros
//!   group    =  header (number, length, synced_through, sums) · record · record · …
//! ```
//!
//! [`group`] frames bytes, [`writer`] turns the node's `Write` and `Sync` effects into the bytes to
//! write, [`scan`] reads segments back and tells a torn tail from damage, [`index`] knows which
//! bytes hold which entries, [`catch_up`] reads them for followers that lag. This file says what a record is.
//!
//! What a newcomer gets wrong: *the same position may be in the log more than once*: written again
//! after a `Truncate`, for a newer copy, or carried unchanged out of an old segment. The last group
//! that holds a position wins.

pub mod catch_up;
pub mod group;
pub mod index;
pub mod scan;
pub mod writer;

use crate::codec::{Malformed, Reader, put_bytes, put_varint};
use crate::entry::{Entry, Position};
use crate::ids::{Boot, CopyNo, Epoch, Seq, ShardId, Slots, StoreId};
use crate::store::layout::{position, put_position, put_slots, slots};

const KIND_APPEND: u8 = 1;
const KIND_TRUNCATE: u8 = 2;
const KIND_PROMISE: u8 = 3;
const KIND_COPY: u8 = 4;
const KIND_DROP: u8 = 5;
const KIND_IDENTITY: u8 = 6;
const KIND_SHARD: u8 = 7;
const KIND_SUSPECT: u8 = 8;

/// One thing a group makes durable. Written in the order in which the node machine emits them.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Record {
    Append {
        shard: ShardId,
        entry: Entry,
    },
    /// Entries above `after` are void. Always in the same group as what replaces them.
    Truncate {
        shard: ShardId,
        after: Seq,
    },
    /// The shard obeys no epoch below this one, for as long as the store lives.
    Promise {
        shard: ShardId,
        epoch: Epoch,
    },
    /// A copy begins at `base`; entries of former copies are void.
    Copy {
        shard: ShardId,
        slots: Slots,
        copy: CopyNo,
        base: Position,
    },
    /// The copy is gone; its number and the promise stay.
    Drop {
        shard: ShardId,
        copy: CopyNo,
    },
    /// The copy was found wrong while it was held: it is to be made anew, and a start before that must know.
    Suspect {
        shard: ShardId,
        copy: CopyNo,
    },
    /// Who this store is: written at its first start and at each boot.
    Identity(Identity),
    /// A shard's small state so far, restated at the start of each segment so that older segments
    /// can go. The node never writes one: the [`writer`] does.
    Shard {
        shard: ShardId,
        small: SmallState,
    },
}

/// What the log must keep of a shard when its older segments go.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct SmallState {
    pub promised: Epoch,
    /// The number of the present copy, or of the last one if there is none.
    pub copy: CopyNo,
    /// The present copy was found wanting, by recovery or since. Kept until a new copy, for what proved it may have
    /// been cut or deleted since.
    pub suspect: bool,
    pub held: Option<Held>,
}

/// The present copy, as the log knows it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Held {
    pub slots: Slots,
    /// Where the copy began.
    pub base: Position,
    /// Its log reached here. Recovery that falls short of it has lost something.
    pub last: Seq,
}

impl SmallState {
    /// What the record makes of it. The caller has matched the shard.
    pub fn observe(&mut self, record: &Record) {
        match record {
            Record::Append { entry, .. } => {
                if let Some(held) = &mut self.held {
                    // A carried entry is below the last: it does not shorten the log.
                    held.last = held.last.max(entry.seq);
                }
            }
            Record::Truncate { after, .. } => {
                if let Some(held) = &mut self.held {
                    held.last = held.last.min(*after);
                }
            }
            // Promises only rise, whatever order damage left them in.
            Record::Promise { epoch, .. } => self.promised = self.promised.max(*epoch),
            Record::Copy { slots, copy, base, .. } => {
                self.copy = *copy;
                self.suspect = false;
                self.held = Some(Held { slots: *slots, base: *base, last: base.seq });
            }
            Record::Drop { copy, .. } => {
                self.copy = self.copy.max(*copy);
                self.suspect = false;
                self.held = None;
            }
            Record::Shard { small, .. } => {
                let promised = self.promised.max(small.promised);
                *self = Self { promised, ..*small };
            }
            Record::Suspect { copy, .. } => self.suspect |= *copy == self.copy,
            Record::Identity(_) => {}
        }
    }
}

/// How many claims of an identity are kept. More are only made if as many starts in a row end before etcd takes theirs.
pub const CLAIMS_MAX: usize = 64;

/// A store's identity, as its own disk knows it. See [`boot`](crate::boot).
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Identity {
    pub cluster: u128,
    pub store: StoreId,
    pub boot: Boot,
    /// The nonce that etcd held when it was last read; none while it had no record of the store.
    pub over: Option<u128>,
    /// The nonces claimed over that one, the last of them by the last start: etcd may hold any of them, or come to.
    /// 1 to [`CLAIMS_MAX`].
    pub claims: Vec<u128>,
}

impl Record {
    /// The shard it speaks of; none for an identity.
    pub fn shard(&self) -> Option<ShardId> {
        match self {
            Self::Append { shard, .. }
            | Self::Truncate { shard, .. }
            | Self::Promise { shard, .. }
            | Self::Copy { shard, .. }
            | Self::Drop { shard, .. }
            | Self::Suspect { shard, .. }
            | Self::Shard { shard, .. } => Some(*shard),
            Self::Identity(_) => None,
        }
    }

    /// Adds the record to a group's body: a length, the kind, the shard, the rest. The length lets
    /// a build that does not know a kind step over it and say so.
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
            Self::Identity(identity) => identity.encode(&mut body),
            Self::Shard { small, .. } => small.encode(&mut body),
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
            Self::Identity(_) => KIND_IDENTITY,
            Self::Shard { .. } => KIND_SHARD,
        }
    }

    /// Reads one record off a group's body. `Err(Malformed)`: the body can't be read any further.
    /// `Ok(Err(_))`: this record can't, those after it can.
    pub fn decode(from: &mut Reader) -> Result<Result<Self, Unreadable>, Malformed> {
        let mut body = Reader::new(from.bytes("record")?);
        let kind = body.u8("record kind")?;
        if kind == KIND_IDENTITY {
            return Ok(Identity::decode(&mut body)
                .and_then(|identity| body.finish("record").map(|()| Self::Identity(identity)))
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
            KIND_SHARD => Self::Shard { shard, small: SmallState::decode(body)? },
            _ => return Err(Malformed("record kind: a newer build wrote it")),
        })
    }
}

/// A record that this build can't read, in a group whose sums are right: a newer build wrote it,
/// or a bug did. The shard (all of them, if none is named) must not go on with what is left.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Unreadable {
    pub shard: Option<ShardId>,
    pub why: &'static str,
}

impl SmallState {
    fn encode(&self, out: &mut Vec<u8>) {
        put_varint(out, self.promised.0);
        put_varint(out, self.copy.0);
        out.push(u8::from(self.held.is_some()) | u8::from(self.suspect) << 1);
        if let Some(held) = &self.held {
            put_slots(out, held.slots);
            put_position(out, held.base);
            put_varint(out, held.last.0);
        }
    }

    fn decode(from: &mut Reader) -> Result<Self, Malformed> {
        let promised = Epoch(from.varint("small promise")?);
        let copy = CopyNo(from.varint("small copy")?);
        let flags = from.u8("small flags")?;
        let suspect = flags & 2 != 0;
        let held = match flags & !2 {
            0 => None,
            1 => Some(Held {
                slots: slots(from)?,
                base: position(from)?,
                last: Seq(from.varint("small last")?),
            }),
            _ => return Err(Malformed("small flags")),
        };
        Ok(Self { promised, copy, suspect, held })
    }
}

impl Identity {
    /// The nonce of the last start.
    pub fn nonce(&self) -> u128 {
        self.claims.last().copied().unwrap_or_default()
    }

    /// Etcd may hold this nonce if the disk is the store's.
    pub fn knows(&self, nonce: u128) -> bool {
        self.over == Some(nonce) || self.claims.contains(&nonce)
    }

    fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.cluster.to_le_bytes());
        out.extend_from_slice(&self.store.0.to_le_bytes());
        put_varint(out, self.boot.0);
        out.push(u8::from(self.over.is_some()));
        put_varint(out, self.claims.len() as u64);
        for nonce in self.over.iter().chain(&self.claims) {
            out.extend_from_slice(&nonce.to_le_bytes());
        }
    }

    fn decode(from: &mut Reader) -> Result<Self, Malformed> {
        let cluster = from.u128_le("identity cluster")?;
        let store = StoreId(from.u128_le("identity store")?);
        let boot = Boot(from.varint("identity boot")?);
        let is_over = match from.u8("identity flags")? {
            flags @ 0..=1 => flags == 1,
            _ => return Err(Malformed("identity flags")),
        };
        let count = from.count("identity claims")?;
        if !(1..=CLAIMS_MAX).contains(&count) {
            return Err(Malformed("identity claims"));
        }
        let mut nonce = || from.u128_le("identity nonce");
        let over = is_over.then(&mut nonce).transpose()?;
        let claims = (0..count).map(|_| nonce()).collect::<Result<_, _>>()?;
        Ok(Self { cluster, store, boot, over, claims })
    }
}
