//! Log entries, and the chain that ties each to all before it.
//!
//! Two logs that agree on the chain at one seq agree on everything up to it: the chain is a hash
//! over the previous chain and all of the entry. It is what a follower compares before it accepts
//! or truncates anything, and what tells a diverged or altered history at the point of contact.

use bytes::Bytes;
use xxhash_rust::xxh3::xxh3_64;

use crate::batch::{Batch, put_revision, put_session, revision, session};
use crate::codec::{Malformed, Reader, put_bytes, put_varint};
use crate::ids::{Chain, Epoch, Revision, Seq, SessionId, TimeMs};

const KIND_OPS: u8 = 1;
const KIND_BARRIER: u8 = 2;
const KIND_COLLECT: u8 = 3;
const KIND_EXPIRE: u8 = 4;
const KIND_SPLIT: u8 = 5;

/// One log position.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Entry {
    pub epoch: Epoch,
    pub seq: Seq,
    /// The shard's own time: moves towards the primary's wall clock, never backwards.
    pub time: TimeMs,
    pub chain: Chain,
    pub body: Body,
}

#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Body {
    Ops(Batch),
    /// The first entry of an epoch: once it is committed, so is everything before it.
    Barrier,
    /// Drop the rows of sessions that are gone: those ≤ `r` and not in `l`.
    Collect {
        r: Revision,
        l: Vec<SessionId>,
    },
    /// Drop the idempotency records of this bucket.
    Expire {
        bucket: u64,
    },
    /// The shard ends here; two children begin, the second one at this slot.
    Split {
        at: u16,
    },
    /// A newer build wrote it, and this one does not know what it says. It is kept and passed on as it is; the copy stops
    /// where it would be applied. All kinds that come after [`Body::Ops`] have their length before them, so that the
    /// entries behind this one can be read.
    Unknown {
        kind: u8,
        bytes: Bytes,
    },
}

/// Where a log ends, or where two logs are compared.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Position {
    pub epoch: Epoch,
    pub seq: Seq,
    pub chain: Chain,
    pub time: TimeMs,
}

impl Entry {
    /// The entry that follows `previous`.
    pub fn after(previous: Position, epoch: Epoch, time: TimeMs, body: Body) -> Self {
        let seq = previous.seq.next();
        let chain = chain(previous.chain, epoch, seq, time, &body);
        Self { epoch, seq, time, chain, body }
    }

    pub fn position(&self) -> Position {
        Position { epoch: self.epoch, seq: self.seq, chain: self.chain, time: self.time }
    }

    /// The entry follows `previous`: next seq, no lower epoch, no earlier time, and its chain is
    /// what its content gives. The payload's own sum is asked of [`Batch::is_intact`].
    pub fn follows(&self, previous: Position) -> bool {
        self.seq == previous.seq.next()
            && self.epoch >= previous.epoch
            && self.time >= previous.time
            && self.chain == chain(previous.chain, self.epoch, self.seq, self.time, &self.body)
    }

    pub fn encode(&self, out: &mut Vec<u8>) {
        out.push(self.body.kind());
        put_varint(out, self.epoch.0);
        put_varint(out, self.seq.0);
        put_varint(out, self.time.0);
        out.extend_from_slice(&self.chain.0.to_le_bytes());
        match &self.body {
            Body::Ops(batch) => batch.encode(out),
            body => put_bytes(out, &body.plain_bytes()),
        }
    }

    /// Reads the fields; whether it is the right entry here is asked of [`Entry::follows`].
    pub fn decode(from: &mut Reader) -> Result<Self, Malformed> {
        let kind = from.u8("entry kind")?;
        // What was never written reads as zeros.
        if kind == 0 {
            return Err(Malformed("entry kind"));
        }
        Ok(Self {
            epoch: Epoch(from.varint("entry epoch")?),
            seq: Seq(from.varint("entry seq")?),
            time: TimeMs(from.varint("entry time")?),
            chain: Chain(from.u64_le("entry chain")?),
            body: Body::decode(kind, from)?,
        })
    }

    /// Bytes the entry takes, near enough for limits and budgets.
    pub fn size(&self) -> usize {
        const HEAD: usize = 64;
        match &self.body {
            Body::Ops(batch) => HEAD + batch.payload.len(),
            Body::Collect { l, .. } => HEAD + 12 * l.len(),
            Body::Unknown { bytes, .. } => HEAD + bytes.len(),
            _ => HEAD,
        }
    }
}

impl Body {
    fn kind(&self) -> u8 {
        match self {
            Self::Ops(_) => KIND_OPS,
            Self::Barrier => KIND_BARRIER,
            Self::Collect { .. } => KIND_COLLECT,
            Self::Expire { .. } => KIND_EXPIRE,
            Self::Split { .. } => KIND_SPLIT,
            Self::Unknown { kind, .. } => *kind,
        }
    }

    /// The sum the chain is made of. A batch brings its own.
    fn sum(&self) -> u64 {
        match self {
            Self::Ops(batch) => batch.sum,
            other => xxh3_64(&other.plain_bytes()),
        }
    }

    fn plain_bytes(&self) -> Vec<u8> {
        let mut out = Vec::new();
        match self {
            Self::Ops(batch) => batch.encode(&mut out),
            Self::Barrier => {}
            Self::Collect { r, l } => {
                put_revision(&mut out, *r);
                put_varint(&mut out, l.len() as u64);
                for &id in l {
                    put_session(&mut out, id);
                }
            }
            Self::Expire { bucket } => put_varint(&mut out, *bucket),
            Self::Split { at } => out.extend_from_slice(&at.to_be_bytes()),
            Self::Unknown { bytes, .. } => out.extend_from_slice(bytes),
        }
        out
    }

    fn decode(kind: u8, from: &mut Reader) -> Result<Self, Malformed> {
        if kind == KIND_OPS {
            return Ok(Self::Ops(Batch::decode(from)?));
        }
        let bytes = from.bytes("entry body")?;
        if kind > KIND_SPLIT {
            // A copy: a slice would keep the whole message that it came in.
            return Ok(Self::Unknown { kind, bytes: Bytes::copy_from_slice(&bytes) });
        }
        let mut from = Reader::new(bytes);
        let body = match kind {
            KIND_BARRIER => Self::Barrier,
            KIND_COLLECT => {
                let r = revision(&mut from)?;
                let count = from.count("collected sessions")?;
                let l = (0..count).map(|_| session(&mut from)).collect::<Result<_, _>>()?;
                Self::Collect { r, l }
            }
            KIND_EXPIRE => Self::Expire { bucket: from.varint("bucket")? },
            _ => Self::Split { at: from.u16_be("split slot")? },
        };
        from.finish("entry body")?;
        Ok(body)
    }
}

fn chain(previous: Chain, epoch: Epoch, seq: Seq, time: TimeMs, body: &Body) -> Chain {
    let mut bytes = [0u8; 41];
    bytes[0..8].copy_from_slice(&previous.0.to_le_bytes());
    bytes[8] = body.kind();
    bytes[9..17].copy_from_slice(&epoch.0.to_le_bytes());
    bytes[17..25].copy_from_slice(&seq.0.to_le_bytes());
    bytes[25..33].copy_from_slice(&time.0.to_le_bytes());
    bytes[33..41].copy_from_slice(&body.sum().to_le_bytes());
    Chain(xxh3_64(&bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bodies() -> Vec<Body> {
        vec![
            Body::Barrier,
            Body::Collect {
                r: Revision { incarnation: 1, revision: 900 },
                l: vec![SessionId(Revision { incarnation: 1, revision: 17 })],
            },
            Body::Expire { bucket: 300 },
            Body::Split { at: 4096 },
        ]
    }

    #[test]
    fn entries_round_trip_and_chain() {
        let mut at = Position::default();
        for body in bodies() {
            let entry = Entry::after(at, Epoch(2), TimeMs(5), body);
            let mut out = Vec::new();
            entry.encode(&mut out);
            let mut from = Reader::new(out.into());
            assert_eq!(Entry::decode(&mut from), Ok(entry.clone()));
            assert!(from.is_empty());
            assert!(entry.follows(at));
            at = entry.position();
        }
    }

    #[test]
    fn an_entry_that_differs_anywhere_does_not_follow() {
        let at = Position::default();
        let entry = Entry::after(at, Epoch(2), TimeMs(5), Body::Barrier);
        assert!(!Entry { epoch: Epoch(3), ..entry.clone() }.follows(at));
        assert!(!Entry { time: TimeMs(6), ..entry.clone() }.follows(at));
        assert!(!Entry { body: Body::Expire { bucket: 0 }, ..entry.clone() }.follows(at));
        assert!(!entry.follows(entry.position()));
    }

    /// Else one entry of a newer build would end what two builds have to say to each other about all shards.
    #[test]
    fn an_unknown_kind_is_kept_and_what_follows_it_is_read() {
        let unknown = Body::Unknown { kind: 77, bytes: Bytes::from_static(b"later") };
        let entry = Entry::after(Position::default(), Epoch(2), TimeMs(5), unknown);
        let next = Entry::after(entry.position(), Epoch(2), TimeMs(5), Body::Barrier);
        let mut out = Vec::new();
        entry.encode(&mut out);
        next.encode(&mut out);
        let mut from = Reader::new(out.into());
        assert_eq!(Entry::decode(&mut from), Ok(entry));
        assert_eq!(Entry::decode(&mut from), Ok(next));
        assert_eq!(
            Entry::decode(&mut Reader::new(vec![0; 40].into())),
            Err(Malformed("entry kind"))
        );
    }
}
