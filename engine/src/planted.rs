//! Bugs to plant: each breaks one rule, so that the simulator can show that it would notice.
//!
//! Without the feature `planted-bugs` the question is `false` at compile time, so production code
//! holds nothing of them.

/// One rule dropped.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Planted {
    /// A promise is kept in memory only.
    SkipPromiseFsync,
    /// A backup acknowledges what it has not fsynced.
    AckBeforeBackupFsync,
    /// A member whose removal is only proposed no longer counts.
    CountUnsettledRemoval,
    /// A new primary serves at once.
    SkipBarrier,
    /// A follower cuts its log back to its commit when a new primary comes.
    TruncateToCommitHint,
    /// A collection names no survivors.
    CollectWithoutL,
    /// An operation is "not applied" at its deadline although its batch was sent.
    NotAppliedAfterSend,
    /// A read joins a round that began before the value was captured.
    CheckReadBeforeCapture,
    /// A read takes the table now and the state later.
    TableThenDatabase,
    /// A learner counts as caught up at the commit, also below the barrier.
    LearnerAtCommitHint,
    /// A backup dates a proof by its coming, not by the probe that asked for it.
    AgeFromAnswer,
    /// A record that lies in the frozen table is not looked up.
    RecordNotInFrozen,
    /// A bucket of records is dropped as soon as it ends.
    ExpireTooEarly,
    /// Operations with a token are applied however long ago they were issued.
    IssueTimeNotJudged,
    /// Whatever was done under a token answers every request with it.
    FingerprintIgnored,
    /// A part of a request with a token is applied again, record or not.
    PartAppliedAgain,
}

impl Planted {
    pub const ALL: [Self; 16] = [
        Self::SkipPromiseFsync,
        Self::AckBeforeBackupFsync,
        Self::CountUnsettledRemoval,
        Self::SkipBarrier,
        Self::TruncateToCommitHint,
        Self::CollectWithoutL,
        Self::NotAppliedAfterSend,
        Self::CheckReadBeforeCapture,
        Self::TableThenDatabase,
        Self::LearnerAtCommitHint,
        Self::AgeFromAnswer,
        Self::RecordNotInFrozen,
        Self::ExpireTooEarly,
        Self::IssueTimeNotJudged,
        Self::FingerprintIgnored,
        Self::PartAppliedAgain,
    ];

    /// Is this bug planted?
    pub fn is_in(self, planted: Option<Self>) -> bool {
        cfg!(feature = "planted-bugs") && planted == Some(self)
    }
}
