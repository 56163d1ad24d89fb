//! The planted bugs that a search must find, each with its bounds.
//!
//! `MUTATIONS` are for the replication world, `SESSION_MUTATIONS` for the world of sessions.
//!
//! Each bug drops one rule from the code (`engine::planted`). The bounds are the smallest that can
//! show it: a rule about proposals needs a proposal whose answer is lost, for example.

use engine::planted::Planted;
use engine::shard::idempotency::Scope;

use super::replication::ReplicationBounds;
use super::sessions::SessionBounds;

/// Bounds that a short run can exhaust: one failover and one op.
pub const SMALL: ReplicationBounds = ReplicationBounds {
    stores: 3,
    in_sync: 3,
    min_in_sync: 2,
    epochs: 2,
    ops: 1,
    orders: 1,
    crashes: 0,
    cuts: 0,
    refusals: 0,
    removals: 0,
    lost: 0,
    reads: 0,
    ticks: 0,
    slow_fsync: false,
    late_watch: false,
};

const TWO: ReplicationBounds = ReplicationBounds { stores: 2, in_sync: 2, min_in_sync: 2, ..SMALL };
/// Failover with two stores, either of which may serve alone.
pub const ALONE: ReplicationBounds = ReplicationBounds { min_in_sync: 1, epochs: 2, ..TWO };

pub const MUTATIONS: &[(Planted, ReplicationBounds)] = &[
    (Planted::SkipPromiseFsync, ReplicationBounds { crashes: 1, ..ALONE }),
    (
        Planted::AckBeforeBackupFsync,
        ReplicationBounds { crashes: 1, slow_fsync: true, epochs: 1, ..TWO },
    ),
    (Planted::CountUnsettledRemoval, ReplicationBounds { refusals: 1, ..SMALL }),
    (Planted::SkipBarrier, ReplicationBounds { reads: 1, ..ALONE }),
    (Planted::TruncateToCommitHint, SMALL),
    (Planted::CheckReadBeforeCapture, ReplicationBounds { reads: 2, ..ALONE }),
    (Planted::ForgetUnsettledAddition, ReplicationBounds { removals: 1, epochs: 1, ..SMALL }),
    (
        Planted::FailureSettles,
        ReplicationBounds { removals: 1, lost: 1, ticks: 1, epochs: 1, ..SMALL },
    ),
    (Planted::CommitAtMajority, SMALL),
    (Planted::CountOwnUnsynced, ReplicationBounds { epochs: 1, ..TWO }),
    (Planted::LeadAfterRestart, ReplicationBounds { crashes: 1, epochs: 1, ..TWO }),
    (Planted::KeepAfterDemotion, ReplicationBounds { removals: 1, ..SMALL }),
    (Planted::ObeyOldEpoch, SMALL),
    (Planted::MatchByNumber, SMALL),
    (
        Planted::TruncateToMessageEnd,
        ReplicationBounds { cuts: 1, epochs: 1, ops: 2, orders: 2, ..TWO },
    ),
    (Planted::ReadUnproven, ReplicationBounds { reads: 1, ..ALONE }),
    (Planted::EtcdCheckUnread, ReplicationBounds { reads: 1, ticks: 1, ..ALONE }),
];

/// Bounds that a short run can exhaust: one gateway that loses its key and whose session is
/// collected, one op, one failover, one cut, one deadline.
pub const SESSIONS: SessionBounds = SessionBounds {
    gateways: 1,
    keys: 2,
    losses: 1,
    epochs: 2,
    ops: 1,
    tokens: None,
    retries: 0,
    cuts: 1,
    repeats: 0,
    lists: 2,
    ticks: 1,
    tick_s: 60,
    late: 1,
    waits: 1,
    full: 0,
};

/// One gateway, two ops, one failover, one cut, and a disk that is full for a while.
pub const REFUSED: SessionBounds = SessionBounds { ops: 2, epochs: 2, cuts: 1, full: 1, ..QUIET };

/// Two gateways with a session each, both lost, and two collections.
pub const COLLECTIONS: SessionBounds =
    SessionBounds { gateways: 2, ops: 2, losses: 2, lists: 4, ..COLLECTED };

/// A client retries with its token, through either gateway, before and after the token expires; one
/// failover.
pub const TOKENS: SessionBounds =
    SessionBounds { gateways: 2, keys: 2, epochs: 2, ticks: 3, tick_s: 140, ..RETRIED };

/// Ops are sent and answered, and nothing else happens.
const QUIET: SessionBounds = SessionBounds {
    keys: 1,
    losses: 0,
    epochs: 1,
    cuts: 0,
    lists: 0,
    ticks: 0,
    late: 0,
    waits: 0,
    ..SESSIONS
};

/// A session is lost and collected.
const COLLECTED: SessionBounds = SessionBounds { keys: 2, losses: 1, lists: 2, ticks: 1, ..QUIET };

/// A client sends the same request twice with one token.
const RETRIED: SessionBounds = SessionBounds { tokens: Some(Scope::Counter), retries: 1, ..QUIET };

pub const SESSION_MUTATIONS: &[(Planted, SessionBounds)] = &[
    (Planted::NotAppliedAfterSend, SessionBounds { late: 1, ..QUIET }),
    (Planted::CollectWithoutL, SessionBounds { lists: 1, ..QUIET }),
    (Planted::CollectBackwards, SessionBounds { ops: 2, losses: 2, lists: 3, ..COLLECTED }),
    (Planted::ReviveExpired, COLLECTIONS),
    (Planted::RefuseOrdered, SessionBounds { epochs: 2, ops: 2, waits: 1, ..QUIET }),
    (Planted::ClosedIsRefused, SessionBounds { cuts: 1, full: 1, ..QUIET }),
    (Planted::OneRefusalDecides, SessionBounds { epochs: 2, ops: 2, late: 1, ..QUIET }),
    (Planted::ExpiredIsDefinite, SessionBounds { cuts: 1, late: 1, ..COLLECTED }),
    (Planted::IssueTimeNotJudged, SessionBounds { ticks: 3, tick_s: 140, ..RETRIED }),
    (Planted::ExpireTooEarly, SessionBounds { ticks: 1, tick_s: 100, ..RETRIED }),
    (Planted::PartAppliedAgain, SessionBounds { tokens: Some(Scope::Batch), ..RETRIED }),
];
