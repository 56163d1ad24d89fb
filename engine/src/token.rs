//! The token of a client in the log: which request it was, when that was issued, and where its
//! record is.

use crate::ids::{Slot, TimeMs};
use crate::key::{self, CounterKey};

/// The kind of request that a record belongs to.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Scope {
    /// One operation: recorded under (namespace, counter, token).
    Counter = 0,
    /// A request of many: recorded under (namespace, token) in its *home*, the shard of
    /// [`Tag::home`], before it is sent to any other, and then in each that it touches. Each
    /// shard's part is applied or replayed as a whole.
    Batch = 1,
}

/// The form of a token in the log: where its record is, and which request it was.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Tag {
    /// As in [`ClientToken::scope`](crate::shard::idempotency::ClientToken::scope).
    pub scope: Scope,
    /// The hash of scope, counter or namespace, and token: the record's key.
    pub hash: u128,
    /// A hash of the whole request, the same in the part of every shard.
    pub fingerprint: u128,
}

impl Tag {
    /// The counter whose shard decides which request has the token: of two requests of many under
    /// one token, the second one finds the first one's record there, whichever shards the two
    /// touch. Nothing is ever added to the counter. `None` if the namespace is invalid.
    pub fn home(&self, namespace: &[u8]) -> Option<CounterKey> {
        CounterKey::new(namespace, &self.hash.to_le_bytes()).ok()
    }

    /// The key of the record. `name`: that of a counter that the operations are on. `first`: the
    /// shard's first slot.
    pub fn record(&self, name: &[u8], first: Slot) -> RecordId {
        let slot = match self.scope {
            Scope::Counter => key::slot_of(key::hash(name)),
            Scope::Batch => first,
        };
        RecordId { slot, hash: self.hash }
    }
}

/// When a request was issued.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum IssueTime {
    /// The time that the client states in each of its attempts, by its own clock.
    Stated(TimeMs),
    /// The time at which this attempt came to its gateway: the shard's time then, or an earlier
    /// one.
    Arrived(TimeMs),
}

impl IssueTime {
    /// The time, of either kind.
    pub fn time(self) -> TimeMs {
        match self {
            Self::Stated(time) | Self::Arrived(time) => time,
        }
    }
}

/// The key of a record's row.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct RecordId {
    /// The slot of the counter; for a batch's part, the first slot of its shard.
    pub slot: Slot,
    /// As in [`Tag::hash`].
    pub hash: u128,
}
