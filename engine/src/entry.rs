//! Log entries, and the chain that ties each to all before it.
//!
//! The chain is a hash over the previous chain and all of the entry, so two logs that agree on the
//! chain at one seq agree on everything up to it. A follower compares chains before it accepts or
//! truncates anything, which detects a diverged or altered history at the first common position.

use bytes::Bytes;
use xxhash_rust::xxh3::xxh3_64;

use crate::batch::{Batch, put_revision, put_session, revision, session};
use crate::codec::{Malformed, Reader, put_bytes, put_varint};
use crate::ids::{Chain, Epoch, Revision, Seq, SessionId, TimeMs};

const KIND_OPS: u8 = 1;
const KIND_BARRIER: u8 = 2;
const KIND_EXPIRE_SESSIONS: u8 = 3;
const KIND_EXPIRE_TOKENS: u8 = 4;
const KIND_SPLIT: u8 = 5;

/// One entry of a shard's log.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Entry {
    /// The epoch of the primary that ordered the entry.
    pub epoch: Epoch,
    /// The entry's position.
    pub seq: Seq,
    /// The shard's own time: moves towards the primary's wall clock, never backwards.
    pub time: TimeMs,
    /// The hash over the previous chain and this entry.
    pub chain: Chain,
    /// The content.
    pub body: Body,
}

/// The content of an entry.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Body {
    /// A batch of operations.
    Ops(Batch),
    /// The first entry of an epoch (a no-op): once it is committed, so is everything before it.
    Barrier,
    /// Drops the rows of sessions that are gone: those with an id ≤ `up_to` that are not in
    /// `survivors`.
    ExpireSessions {
        /// The highest session id that this entry is about.
        up_to: Revision,
        /// Sessions at or below `up_to` that stay.
        survivors: Vec<SessionId>,
    },
    /// Drops the idempotency records of one bucket.
    ExpireTokens {
        /// The bucket's number.
        bucket: u64,
    },
    /// The shard ends here; two children begin.
    Split {
        /// The first slot of the second child.
        at: u16,
    },
    /// An entry of a kind that only a newer build knows. It is kept and passed on unchanged; the
    /// copy stops where it would be applied. All kinds after [`Body::Ops`] have their length before
    /// them, so that the entries behind this one can be read.
    Unknown {
        /// The unknown kind.
        kind: u8,
        /// The body, without its length.
        bytes: Bytes,
    },
}

/// The identity of a log position: where a log ends, or where two logs are compared.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Position {
    /// The epoch of the entry here.
    pub epoch: Epoch,
    /// The entry's seq; 0 is before the first entry.
    pub seq: Seq,
    /// The entry's chain: equal chains at one seq mean equal logs up to it.
    pub chain: Chain,
    /// The entry's time.
    pub time: TimeMs,
}

impl Entry {
    /// The entry that follows `previous`.
    pub fn after(previous: Position, epoch: Epoch, time: TimeMs, body: Body) -> Self {
        let seq = previous.seq.next();
        let chain = chain(previous.chain, epoch, seq, time, &body);
        Self { epoch, seq, time, chain, body }
    }

    /// The position of this entry.
    pub fn position(&self) -> Position {
        Position { epoch: self.epoch, seq: self.seq, chain: self.chain, time: self.time }
    }

    /// Returns whether the entry follows `previous`: next seq, no lower epoch, no earlier time, and
    /// a chain that its content gives. [`Batch::is_intact`] checks the payload's own sum.
    pub fn follows(&self, previous: Position) -> bool {
        self.seq == previous.seq.next()
            && self.epoch >= previous.epoch
            && self.time >= previous.time
            && self.chain == chain(previous.chain, self.epoch, self.seq, self.time, &self.body)
    }

    /// Appends the encoded entry to `out`.
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

    /// Reads the fields. The error names the field that can't be read. [`Entry::follows`] checks
    /// whether the entry belongs here.
    pub fn decode(from: &mut Reader) -> Result<Self, Malformed> {
        let kind = from.u8("entry kind")?;
        // Unwritten bytes of a segment read as zeros.
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

    /// The size in bytes, near enough for limits and budgets.
    pub fn size(&self) -> usize {
        const HEAD: usize = 64;
        match &self.body {
            Body::Ops(batch) => HEAD + batch.payload.len(),
            Body::ExpireSessions { survivors, .. } => HEAD + 12 * survivors.len(),
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
            Self::ExpireSessions { .. } => KIND_EXPIRE_SESSIONS,
            Self::ExpireTokens { .. } => KIND_EXPIRE_TOKENS,
            Self::Split { .. } => KIND_SPLIT,
            Self::Unknown { kind, .. } => *kind,
        }
    }

    /// The sum that the chain is made of. A batch brings its own.
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
            Self::ExpireSessions { up_to, survivors } => {
                put_revision(&mut out, *up_to);
                put_varint(&mut out, survivors.len() as u64);
                for &id in survivors {
                    put_session(&mut out, id);
                }
            }
            Self::ExpireTokens { bucket } => put_varint(&mut out, *bucket),
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
            KIND_EXPIRE_SESSIONS => {
                let up_to = revision(&mut from)?;
                let count = from.count("collected sessions")?;
                let survivors = (0..count).map(|_| session(&mut from)).collect::<Result<_, _>>()?;
                Self::ExpireSessions { up_to, survivors }
            }
            KIND_EXPIRE_TOKENS => Self::ExpireTokens { bucket: from.varint("bucket")? },
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
            Body::ExpireSessions {
                up_to: Revision { incarnation: 1, revision: 900 },
                survivors: vec![SessionId(Revision { incarnation: 1, revision: 17 })],
            },
            Body::ExpireTokens { bucket: 300 },
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
        assert!(!Entry { body: Body::ExpireTokens { bucket: 0 }, ..entry.clone() }.follows(at));
        assert!(!entry.follows(entry.position()));
    }

    /// Otherwise one entry of a newer build would end the communication of two builds about all
    /// shards.
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
