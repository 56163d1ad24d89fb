//! The state of a shard that is the same on all its replicas, without the counters.

use crate::entry::Position;
use crate::ids::{Seq, Slots};
use crate::message::DigestPoint;
use crate::shard::idempotency::Buckets;
use crate::shard::sessions::SessionTable;

/// The replicated state of a shard without the counters themselves, which are in the table and in
/// the state on disk. Written to disk as a whole with every flush.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct ShardState {
    /// The slots that the shard covers.
    pub slots: Slots,
    /// The last entry applied.
    pub applied: Position,
    /// The split by which the shard got these slots; 0 if it was never split. Entries up to there
    /// were applied to other slots.
    pub divided: Seq,
    /// Σ H(name) · value mod 2^128 over all counters, H odd.
    pub counter_digest: u128,
    /// The sessions of gateway workers, and which of their batches were applied.
    pub sessions: SessionTable,
    /// The idempotency records that exist: those of these buckets.
    pub tokens: Buckets,
}

impl ShardState {
    /// The digest of this state: equal on all replicas at equal seq.
    pub fn digest(&self) -> DigestPoint {
        DigestPoint {
            shard: self.slots.shard(),
            seq: self.applied.seq,
            counters: self.counter_digest,
            sessions: self.sessions.digest(),
            tokens: self.tokens.digest(),
        }
    }
}
