//! Which planted bugs a search must find, and within which bounds.
//!
//! `MUTATIONS` are of the replication world, `SESSION_MUTATIONS` of the world of sessions.
//!
//! Each is one rule dropped from the code that is searched (`engine::planted`). The bounds are the smallest
//! that have what it takes: a rule about proposals needs one whose answer is lost, and so on.

use engine::idempotency::Scope;
use engine::planted::Planted;

use super::replication::Bounds;
use super::sessions;

/// What a short run can exhaust: one failover, one crash, one op.
pub const SMALL: Bounds = Bounds {
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

const TWO: Bounds = Bounds { stores: 2, in_sync: 2, min_in_sync: 2, ..SMALL };
/// Failover within two stores, of which one may serve alone.
pub const ALONE: Bounds = Bounds { min_in_sync: 1, epochs: 2, ..TWO };

pub const MUTATIONS: &[(Planted, Bounds)] = &[
    (Planted::SkipPromiseFsync, Bounds { crashes: 1, ..ALONE }),
    (Planted::AckBeforeBackupFsync, Bounds { crashes: 1, slow_fsync: true, epochs: 1, ..TWO }),
    (Planted::CountUnsettledRemoval, Bounds { refusals: 1, ..SMALL }),
    (Planted::SkipBarrier, Bounds { reads: 1, ..ALONE }),
    (Planted::TruncateToCommitHint, SMALL),
    (Planted::CheckReadBeforeCapture, Bounds { reads: 2, ..ALONE }),
    (Planted::ForgetUnsettledAddition, Bounds { removals: 1, epochs: 1, ..SMALL }),
    (Planted::FailureSettles, Bounds { removals: 1, lost: 1, ticks: 1, epochs: 1, ..SMALL }),
    (Planted::CommitAtMajority, SMALL),
    (Planted::CountOwnUnsynced, Bounds { epochs: 1, ..TWO }),
    (Planted::LeadAfterRestart, Bounds { crashes: 1, epochs: 1, ..TWO }),
    (Planted::KeepAfterDemotion, Bounds { removals: 1, ..SMALL }),
    (Planted::ObeyOldEpoch, SMALL),
    (Planted::MatchByNumber, SMALL),
    (Planted::TruncateToMessageEnd, Bounds { cuts: 1, epochs: 1, ops: 2, orders: 2, ..TWO }),
    (Planted::ReadUnproven, Bounds { reads: 1, ..ALONE }),
    (Planted::EtcdCheckUnread, Bounds { reads: 1, ticks: 1, ..ALONE }),
];

/// What a short run can exhaust: one gateway that loses its key and is collected, one op, one failover, one cut,
/// one deadline.
pub const SESSIONS: sessions::Bounds = sessions::Bounds {
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
pub const REFUSED: sessions::Bounds =
    sessions::Bounds { ops: 2, epochs: 2, cuts: 1, full: 1, ..QUIET };

/// Two gateways with a session each, both lost, and two collections.
pub const COLLECTIONS: sessions::Bounds =
    sessions::Bounds { gateways: 2, ops: 2, losses: 2, lists: 4, ..COLLECTED };

/// A client asks again with its token, through either gateway, before and after the token's time; one failover.
pub const TOKENS: sessions::Bounds =
    sessions::Bounds { gateways: 2, keys: 2, epochs: 2, ticks: 3, tick_s: 140, ..RETRIED };

/// Nothing happens but that ops are sent, and answered.
const QUIET: sessions::Bounds = sessions::Bounds {
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

/// A session is lost, and collected.
const COLLECTED: sessions::Bounds =
    sessions::Bounds { keys: 2, losses: 1, lists: 2, ticks: 1, ..QUIET };

/// A client asks twice with one token.
const RETRIED: sessions::Bounds =
    sessions::Bounds { tokens: Some(Scope::Counter), retries: 1, ..QUIET };

pub const SESSION_MUTATIONS: &[(Planted, sessions::Bounds)] = &[
    (Planted::NotAppliedAfterSend, sessions::Bounds { late: 1, ..QUIET }),
    (Planted::CollectWithoutL, sessions::Bounds { lists: 1, ..QUIET }),
    (Planted::CollectBackwards, sessions::Bounds { ops: 2, losses: 2, lists: 3, ..COLLECTED }),
    (Planted::ReviveExpired, COLLECTIONS),
    (Planted::RefuseOrdered, sessions::Bounds { epochs: 2, ops: 2, waits: 1, ..QUIET }),
    (Planted::ClosedIsRefused, sessions::Bounds { cuts: 1, full: 1, ..QUIET }),
    (Planted::OneRefusalDecides, sessions::Bounds { epochs: 2, ops: 2, late: 1, ..QUIET }),
    (Planted::ExpiredIsDefinite, sessions::Bounds { cuts: 1, late: 1, ..COLLECTED }),
    (Planted::IssueTimeNotJudged, sessions::Bounds { ticks: 3, tick_s: 140, ..RETRIED }),
    (Planted::ExpireTooEarly, sessions::Bounds { ticks: 1, tick_s: 100, ..RETRIED }),
    (Planted::PartAppliedAgain, sessions::Bounds { tokens: Some(Scope::Batch), ..RETRIED }),
];
