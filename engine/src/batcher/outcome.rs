//! The outcome of a request, and the reason why an operation was not applied.
//!
//! There are three outcomes: applied, not applied (the operation had no effect and never will),
//! unknown. The outcome follows from the reason, so the two can't be paired wrongly.

/// The outcome of one write request. All operations that are not in `failed` were applied.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct WriteResult {
    /// The value after each applied operation that asks for one (for a delete: the value before
    /// it), with the operation's index in the request. In the order of the indexes.
    pub values: Vec<(u32, i128)>,
    /// The number of applied operations that had been applied before, under the same token, and are
    /// answered as they were then.
    pub replayed: usize,
    /// The operations that failed, by their index in the request, in the order of the indexes.
    pub failed: Vec<(u32, Failure)>,
}

/// The result of a read.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct ReadValues {
    /// The values, in the order of the keys.
    pub values: Vec<i128>,
    /// The age of the values: they include everything acknowledged at least this long ago. 0 means
    /// that they are linearizable.
    pub staleness_ms: u64,
}

/// The effect of an operation that was not confirmed, as far as it is known.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Outcome {
    /// The operation had no effect and never will: it may be requested again.
    NotApplied,
    /// The operation may have been applied, or may still be.
    Unknown,
}

/// The reason why an operation or a read was not answered with success.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Failure {
    // -- not applied
    /// The shard map has no entry for the counter: the cluster is starting.
    NoShard,
    /// The gateway worker has no session yet: etcd has not answered since it started.
    NoSession,
    /// There was no connection to a primary that accepts it, until the deadline.
    NoPrimary,
    /// The shard is frozen: its commit can't move (docs/design.md#frozen-shards).
    Frozen,
    /// The primary was overloaded, for writes until the deadline.
    Overloaded,
    /// The primary's disk is full.
    NoSpace,
    /// The part of one shard has more bytes than a node accepts at once.
    TooLarge,
    /// The gateway's own queue for the shard is full.
    QueueFull,
    /// The deadline passed in the gateway's queue although the primary could be reached.
    Slow,
    /// The gateway is stopping.
    Stopping,
    /// A replica could not decode the batch. This is a bug, and the node logs it as an error.
    Malformed,
    /// Another request has this token: this one was not applied, and never will be under the token.
    TokenReused,
    /// The shard keeps as many idempotency records as it may.
    TokenQuota,

    // -- unknown
    /// The deadline passed after the operation was sent.
    Deadline,
    /// The session expired while a send of the batch was without an answer.
    SessionExpired,
    /// The node answered "out of order", which is a bug. The session is given up.
    SessionAbandoned,
    /// The batch was applied before, and its result is no longer kept.
    ResultGone,
    /// The request was issued longer ago than tokens are remembered. This attempt had no effect;
    /// the outcome of an earlier one with the token is no longer known.
    TokenTooOld,
}

impl Failure {
    /// The effect of an operation that failed for this reason.
    pub fn outcome(self) -> Outcome {
        match self {
            Self::NoShard
            | Self::NoSession
            | Self::NoPrimary
            | Self::Frozen
            | Self::Overloaded
            | Self::NoSpace
            | Self::TooLarge
            | Self::QueueFull
            | Self::Slow
            | Self::Stopping
            | Self::Malformed
            | Self::TokenReused
            | Self::TokenQuota => Outcome::NotApplied,
            Self::Deadline
            | Self::SessionExpired
            | Self::SessionAbandoned
            | Self::ResultGone
            | Self::TokenTooOld => Outcome::Unknown,
        }
    }
}
