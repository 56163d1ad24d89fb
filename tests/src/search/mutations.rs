//! Which planted bugs a search must find, and within which bounds.
//!
//! Each is one rule dropped from the code that is searched (`engine::planted`). The bounds are the smallest
//! that have what it takes: a rule about proposals needs one whose answer is lost, and so on.

use engine::planted::Planted;

use super::replication::Bounds;

/// Where a mutation is looked for.
#[derive(Clone, Copy, Debug)]
pub enum Within {
    Replication(Bounds),
}

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
/// A primary that does not hear of its successor, and reads.
const READS: Bounds = Bounds { reads: 1, min_in_sync: 1, ..SMALL };

pub const MUTATIONS: &[(Planted, Within)] = &[
    (Planted::SkipPromiseFsync, Within::Replication(Bounds { crashes: 2, ..SMALL })),
    (
        Planted::AckBeforeBackupFsync,
        Within::Replication(Bounds { crashes: 1, slow_fsync: true, epochs: 1, ..TWO }),
    ),
    (Planted::CountUnsettledRemoval, Within::Replication(Bounds { refusals: 1, ..SMALL })),
    (Planted::SkipBarrier, Within::Replication(SMALL)),
    (Planted::TruncateToCommitHint, Within::Replication(SMALL)),
    (Planted::CheckReadBeforeCapture, Within::Replication(Bounds { reads: 2, ..READS })),
    (Planted::LearnerAtCommitHint, Within::Replication(Bounds { in_sync: 2, ..SMALL })),
    (
        Planted::ForgetUnsettledAddition,
        Within::Replication(Bounds { in_sync: 2, lost: 1, epochs: 1, ..SMALL }),
    ),
    (
        Planted::FailureSettles,
        Within::Replication(Bounds { in_sync: 2, lost: 1, ticks: 1, epochs: 1, ..SMALL }),
    ),
    (Planted::CommitAtMajority, Within::Replication(SMALL)),
    (Planted::CommitBelowBarrier, Within::Replication(SMALL)),
    (Planted::CountOwnUnsynced, Within::Replication(Bounds { epochs: 1, ..TWO })),
    (Planted::LeadAfterRestart, Within::Replication(Bounds { crashes: 1, epochs: 1, ..TWO })),
    (Planted::KeepAfterDemotion, Within::Replication(Bounds { removals: 1, epochs: 2, ..SMALL })),
    (Planted::ObeyOldEpoch, Within::Replication(SMALL)),
    (Planted::MatchByNumber, Within::Replication(SMALL)),
    (Planted::TruncateToMessageEnd, Within::Replication(Bounds { cuts: 1, epochs: 1, ..TWO })),
    (Planted::CommitBeyondMatched, Within::Replication(Bounds { orders: 2, ops: 2, ..SMALL })),
    (Planted::ReadUnproven, Within::Replication(READS)),
    (Planted::EtcdCheckUnread, Within::Replication(Bounds { ticks: 1, ..READS })),
];
