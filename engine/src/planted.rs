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
    /// A record is as old as its entry, though its request says that it was issued later.
    BucketIgnoresIssueTime,
    /// A record is no younger than a day ahead of its entry, whatever its request says.
    IssueTimeClamped,
    /// Records age by a leap of shard time.
    LeapAgesRecords,
    /// Shard time follows the primary's own wall clock.
    OwnClockTrusted,
    /// One namespace may take all that there is for records.
    ShareIgnored,
    /// Operations with a token are applied however long ago they were issued.
    IssueTimeNotJudged,
    /// Whatever was done under a token answers every request with it.
    FingerprintIgnored,
    /// A batch with a token goes to all its shards at once, whether or not another one has the token.
    HomeNotAsked,
    /// A part of a request with a token is applied again, record or not.
    PartAppliedAgain,
    /// An addition whose outcome is unknown is not waited for.
    ForgetUnsettledAddition,
    /// A failed compare settles everything proposed before.
    FailureSettles,
    /// A majority of the members suffices for a commit.
    CommitAtMajority,
    /// Entries of former epochs are committed without a barrier of this one.
    CommitBelowBarrier,
    /// The primary counts itself by what it has sent, not by what it has fsynced.
    CountOwnUnsynced,
    /// A restarted process goes on as primary of an epoch that names its former boot.
    LeadAfterRestart,
    /// A primary adopts the in-sync set of a record that names another one, and goes on.
    KeepAfterDemotion,
    /// A follower takes slices of epochs below its promise.
    ObeyOldEpoch,
    /// A follower joins its log to the primary's by number, without comparing chains.
    MatchByNumber,
    /// A follower whose oldest entry in memory lies above what it is sent takes it for its own.
    JoinBelowBase,
    /// A follower cuts its log where a message ends.
    TruncateToMessageEnd,
    /// With a copy its promise goes, too.
    DropForgetsPromise,
    /// What a former copy has acknowledged still counts.
    KeepAcksOfOldCopy,
    /// A read is told as soon as it is captured.
    ReadUnproven,
    /// A read is captured while the barrier is committed, but not applied.
    ReadBelowBarrier,
    /// A read-index round does without one of the members.
    ReadIndexMajority,
    /// Whatever record etcd has shows that this node still leads.
    EtcdCheckUnread,
    /// A commit is told to a follower without proof that this node still leads.
    ProbeUnproven,
    /// A loaded value is used although an ingest has come between.
    UseStaleLoad,
    /// A flush, and with it each snapshot, forgets the session rows.
    FlushWithoutSessions,
    /// A snapshot is installed below table content of the copy that it replaces.
    InstallOverTables,
    /// A collection older than the newest is taken.
    CollectBackwards,
    /// A collection takes back a session that an earlier one has dropped.
    ReviveExpired,
    /// A primary that steps down refuses what it has ordered.
    RefuseOrdered,
    /// A closed connection answers what was sent on it.
    ClosedIsRefused,
    /// One refusal is definite although another send is open.
    OneRefusalDecides,
    /// "Expired" is definite although another send is open.
    ExpiredIsDefinite,
    /// A copy that may have lost something says that it is as good as any.
    UnfitPasses,
    /// A follower that refused for want of space is never tried again.
    FullIsForgotten,
    /// A whole copy is accepted while another one is being installed in its place.
    CopyOverCopy,
    /// A whole copy is accepted whether it has room or not.
    CopyWithoutRoom,
    /// Whether a disk has room is not looked at when a primary is chosen, nor while it leads.
    FullLeadsOn,
    /// A follower whose disk is full takes nothing, not even the barrier of a new primary.
    FullRefusesBarrier,
    /// At the floor a learner whose disk is full replaces no member, be that gone for good.
    FullReplacesNobody,
    /// A shard of which nothing was applied yet has no copy to give.
    EmptyIsNoCopy,
    /// A node whose log is too long takes no whole copy.
    FullLogTakesNoCopy,
    /// A read of the log that gives nothing is asked for again.
    EmptyReadGoesOn,
    /// What was read from the log in a former epoch is sent in this one.
    OldReadIsSent,
    /// What is needed of the log is said after a flush alone.
    TrimOnlyOnFlush,
    /// A tainted member that is trusted again counts as one that makes the in-sync set larger.
    TrustMakesRoom,
    /// Entries are applied into a table that is full, while another one is being flushed.
    ApplyWithoutRoom,
    /// A follower acknowledges what it takes however much it has to apply.
    AckWithoutRoom,
    /// A copy that may be wrong leads after a while, though a better one may still come back.
    WrongCopyLeadsInTime,
    /// A shard is frozen for a member that is silent only, not for one that can't acknowledge.
    FrozenIsSilence,
    /// A member that can go on only with a whole copy is waited for.
    NeedyIsWaitedFor,
    /// A group is closed by its fsync alone, however large it grows.
    GroupUnlimited,
    /// A follower is sent everything at once.
    WindowIgnored,
    /// One message holds everything that there is to send.
    MessageUnlimited,
    /// Any number of reads may wait.
    WaitingUnbounded,
    /// All digests that are kept are told at once.
    PointsUnlimited,
    /// A batch is closed at the limits that are shipped, whatever the settings say.
    BatchUnlimited,
    /// A frame holds every batch that there is.
    FrameUnlimited,
    /// A frozen shard shows itself as open.
    StatusSaysOpen,
    /// Any read of etcd tells that a copy is to go, also one that began before the copy was counted on again.
    AnyReadDeletes,
    /// Old records are ordered to go again and again while the first order is on its way.
    ExpiryPilesUp,
    /// An empty folder takes the name of a store that is only away.
    EmptyFolderTakesName,
    /// A store is given up, and for good, whatever its copies are needed for.
    NeededStoreGivenUp,
    /// An operator's word to accept a loss is obeyed whatever has become of the shard since.
    IntentOfAnyRecord,
    /// A primary that asks to be replaced, its copy proved wrong, is a good copy beside a store that is away.
    ResignedIsGood,
}

impl Planted {
    pub const ALL: [Self; 81] = [
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
        Self::BucketIgnoresIssueTime,
        Self::IssueTimeClamped,
        Self::LeapAgesRecords,
        Self::OwnClockTrusted,
        Self::ShareIgnored,
        Self::IssueTimeNotJudged,
        Self::FingerprintIgnored,
        Self::HomeNotAsked,
        Self::PartAppliedAgain,
        Self::ForgetUnsettledAddition,
        Self::FailureSettles,
        Self::CommitAtMajority,
        Self::CommitBelowBarrier,
        Self::CountOwnUnsynced,
        Self::LeadAfterRestart,
        Self::KeepAfterDemotion,
        Self::ObeyOldEpoch,
        Self::MatchByNumber,
        Self::JoinBelowBase,
        Self::TruncateToMessageEnd,
        Self::DropForgetsPromise,
        Self::KeepAcksOfOldCopy,
        Self::ReadUnproven,
        Self::ReadBelowBarrier,
        Self::ReadIndexMajority,
        Self::EtcdCheckUnread,
        Self::ProbeUnproven,
        Self::UseStaleLoad,
        Self::FlushWithoutSessions,
        Self::InstallOverTables,
        Self::CollectBackwards,
        Self::ReviveExpired,
        Self::RefuseOrdered,
        Self::ClosedIsRefused,
        Self::OneRefusalDecides,
        Self::ExpiredIsDefinite,
        Self::UnfitPasses,
        Self::FullIsForgotten,
        Self::CopyOverCopy,
        Self::CopyWithoutRoom,
        Self::FullLeadsOn,
        Self::FullRefusesBarrier,
        Self::FullReplacesNobody,
        Self::EmptyIsNoCopy,
        Self::FullLogTakesNoCopy,
        Self::EmptyReadGoesOn,
        Self::OldReadIsSent,
        Self::TrimOnlyOnFlush,
        Self::TrustMakesRoom,
        Self::ApplyWithoutRoom,
        Self::AckWithoutRoom,
        Self::WrongCopyLeadsInTime,
        Self::FrozenIsSilence,
        Self::NeedyIsWaitedFor,
        Self::GroupUnlimited,
        Self::WindowIgnored,
        Self::MessageUnlimited,
        Self::WaitingUnbounded,
        Self::PointsUnlimited,
        Self::BatchUnlimited,
        Self::FrameUnlimited,
        Self::StatusSaysOpen,
        Self::AnyReadDeletes,
        Self::ExpiryPilesUp,
        Self::EmptyFolderTakesName,
        Self::NeededStoreGivenUp,
        Self::IntentOfAnyRecord,
        Self::ResignedIsGood,
    ];

    /// Is this bug planted?
    pub fn is_in(self, planted: Option<Self>) -> bool {
        cfg!(feature = "planted-bugs") && planted == Some(self)
    }
}
