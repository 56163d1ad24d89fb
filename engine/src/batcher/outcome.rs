//! What becomes of a request, and why an operation was not applied.
//!
//! Three outcomes, never a fourth: applied, not applied (it had no effect and never will), unknown.
//! The outcome follows from the reason, so nobody can pair the two wrongly.

/// What became of the operations of one write request. All that are not in `failed` were applied.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct WriteResult {
    /// The value after each applied operation that asks for one (for a delete: the value before
    /// it), with the operation's index in the request. In the order of the indexes.
    pub values: Vec<(u32, i128)>,
    /// How many of the applied operations were applied before, under the same token, and are answered
    /// as they were then.
    pub replayed: usize,
    /// In the order of the indexes.
    pub failed: Vec<(u32, Failure)>,
}

/// What a read has found.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct ReadValues {
    /// In the order of the keys.
    pub values: Vec<i128>,
    /// All that was acknowledged so long ago is in them. 0: they are linearizable.
    pub staleness_ms: u64,
}

/// What is known of the effect of an operation that was not confirmed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Outcome {
    /// It had no effect and never will: it may be asked for again.
    NotApplied,
    /// It may have been applied, or may be yet.
    Unknown,
}

/// Why an operation or a read was not answered with success.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Failure {
    // -- not applied
    /// The shard map has no entry for the counter: the cluster is starting.
    NoShard,
    /// This worker has no session yet: etcd has not answered since it started.
    NoSession,
    /// No connection to a primary that takes it, until the deadline.
    NoPrimary,
    /// The shard is at the floor with a silent member, or its new primary can't commit.
    Frozen,
    /// The primary has too much to do, for writes until the deadline.
    Overloaded,
    /// The primary's disk is full.
    NoSpace,
    /// More bytes than a node takes in one piece.
    TooLarge,
    /// The gateway's own queue for the shard is full.
    QueueFull,
    /// The deadline passed in the gateway's queue although the primary could be reached.
    Slow,
    /// The gateway is stopping.
    Stopping,
    /// A replica could not read the batch: a bug, and loud on the node's side.
    Malformed,
    /// Another request has this token: this one was not applied, and with the token never will be.
    TokenReused,
    /// The shard keeps as many records of tokens as it may.
    TokenQuota,

    // -- unknown
    /// The deadline passed after the operation was sent.
    Deadline,
    /// The session was collected while a send of the batch was without an answer.
    SessionExpired,
    /// The node answered "out of order": a bug. The session is given up.
    SessionAbandoned,
    /// The batch was applied before, and its result is no longer kept.
    ResultGone,
    /// The request was issued longer ago than tokens are remembered. This time it had no effect; of
    /// an earlier one with the token nothing is known any more.
    TokenTooOld,
}

impl Failure {
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

    /// When asking again is worth it; none where it would not help, or where only the same
    /// idempotency key makes it safe.
    pub fn retry_after_ms(self) -> Option<u64> {
        match self {
            Self::Overloaded | Self::QueueFull | Self::Slow => Some(50),
            Self::NoShard | Self::NoSession | Self::NoPrimary | Self::Frozen => Some(1_000),
            Self::NoSpace | Self::Stopping => Some(1_000),
            // Room comes when the oldest records go, a few minutes apart.
            Self::TokenQuota => Some(60_000),
            Self::TooLarge | Self::Malformed | Self::TokenReused => None,
            Self::Deadline
            | Self::SessionExpired
            | Self::SessionAbandoned
            | Self::ResultGone
            | Self::TokenTooOld => None,
        }
    }
}
