//! Bugs that tests plant: each breaks one rule, and the simulator, the search or a test finds it.
//!
//! Without the feature `planted-bugs`, [`Planted::is_in`] is `false` at compile time, so production
//! code contains none of them.

/// Defines [`Planted`], with the list of its variants.
macro_rules! bugs {
    ($($(#[$doc:meta])* $bug:ident,)*) => {
        /// One rule that is broken.
        #[derive(Clone, Copy, Debug, Eq, PartialEq)]
        pub enum Planted {
            $($(#[$doc])* $bug,)*
        }

        impl Planted {
            /// Every planted bug.
            pub const ALL: [Self; [$(stringify!($bug)),*].len()] = [$(Self::$bug),*];
        }
    };
}

bugs! {
    /// A promise is kept in memory only.
    SkipPromiseFsync,
    /// A follower acknowledges entries that it has not fsynced.
    AckBeforeBackupFsync,
    /// A member whose removal is only proposed no longer counts.
    CountUnsettledRemoval,
    /// A new primary serves before its barrier is committed.
    SkipBarrier,
    /// A follower truncates its log to its commit when a new primary comes.
    TruncateToCommitHint,
    /// An expiry of sessions names no survivors.
    CollectWithoutL,
    /// An operation is "not applied" at its deadline although its batch was sent.
    NotAppliedAfterSend,
    /// A read joins a read-index round that began before the value was captured.
    CheckReadBeforeCapture,
    /// A read takes the table at once and the state later.
    TableThenDatabase,
    /// A learner counts as caught up at the commit, also while that is below the barrier.
    LearnerAtCommitHint,
    /// A follower dates a proof by the time it arrives, not by the request that asked for it.
    AgeFromAnswer,
    /// A record in the sealed table is not looked up.
    RecordNotInFrozen,
    /// A bucket of records is dropped as soon as it ends.
    ExpireTooEarly,
    /// A record gets the bucket of its entry, although its request was issued later.
    BucketIgnoresIssueTime,
    /// A record's issue time is limited to a day ahead of its entry, whatever its request states.
    IssueTimeClamped,
    /// Records age by leaps of shard time.
    LeapAgesRecords,
    /// Shard time follows the primary's own wall clock.
    OwnClockTrusted,
    /// One namespace may use all the space for records.
    ShareIgnored,
    /// Operations with a token are applied however long ago they were issued.
    IssueTimeNotJudged,
    /// The record of a token answers every request with that token, also a different one.
    FingerprintIgnored,
    /// A batch with a token goes to all its shards at once, whether or not another request has the
    /// token.
    HomeNotAsked,
    /// A part of a request with a token is applied again although it has a record.
    PartAppliedAgain,
    /// A commit does not wait for an added member while the outcome of the addition is unknown.
    ForgetUnsettledAddition,
    /// A failed compare-and-set settles everything that was proposed before.
    FailureSettles,
    /// A majority of the members suffices for a commit.
    CommitAtMajority,
    /// Entries of former epochs are committed without a barrier of this one.
    CommitBelowBarrier,
    /// The primary counts itself by the end of its log, not by what it has fsynced.
    CountOwnUnsynced,
    /// A restarted process continues as primary of an epoch that names its former boot.
    LeadAfterRestart,
    /// A primary adopts the in-sync set of a record that names another primary, and continues.
    KeepAfterDemotion,
    /// A follower accepts slices of epochs below its promise.
    ObeyOldEpoch,
    /// A follower joins its log to the primary's by seq, without comparing chains.
    MatchByNumber,
    /// A follower whose oldest entry in memory lies above what it is sent accepts it without a
    /// check.
    JoinBelowBase,
    /// A follower truncates its log where a message ends.
    TruncateToMessageEnd,
    /// Dropping a copy also drops the promise.
    DropForgetsPromise,
    /// Acknowledgements of a former copy still count.
    KeepAcksOfOldCopy,
    /// A read is answered as soon as its value is captured.
    ReadUnproven,
    /// A read is captured while the barrier is committed but not applied.
    ReadBelowBarrier,
    /// A read-index round needs no answer from one of the members.
    ReadIndexMajority,
    /// Any record in etcd counts as proof that this node still leads.
    EtcdCheckUnread,
    /// A commit is sent to a follower without proof that this node still leads.
    ProbeUnproven,
    /// A loaded value is used although an ingest took place in between.
    UseStaleLoad,
    /// A flush, and with it each snapshot, contains no session rows.
    FlushWithoutSessions,
    /// A snapshot is installed below table content of the copy that it replaces.
    InstallOverTables,
    /// An expiry of sessions that is older than the newest is applied.
    CollectBackwards,
    /// An expiry of sessions revives a session that an earlier one has dropped.
    ReviveExpired,
    /// A primary that steps down refuses batches that it has ordered.
    RefuseOrdered,
    /// A closed connection counts as a refusal of the batches sent on it.
    ClosedIsRefused,
    /// One refusal counts as "not applied" although another send is open.
    OneRefusalDecides,
    /// "Expired" counts as "not applied" although another send is open.
    ExpiredIsDefinite,
    /// A copy that may have lost something is reported as fit for promotion.
    UnfitPasses,
    /// A follower that refused for lack of space is never tried again.
    FullIsForgotten,
    /// A snapshot is accepted while another one is being installed in its place.
    CopyOverCopy,
    /// A snapshot is accepted whether there is room for it or not.
    CopyWithoutRoom,
    /// The coordinator ignores full disks when it chooses a primary, and while one leads.
    FullLeadsOn,
    /// A follower whose disk is full rejects everything, even the barrier of a new primary.
    FullRefusesBarrier,
    /// While the in-sync set has `min_in_sync` members, a learner whose disk is full replaces no
    /// member, even one that is gone for good.
    FullReplacesNobody,
    /// A shard of which nothing was applied yet has no snapshot to send.
    EmptyIsNoCopy,
    /// A node whose log is too long accepts no snapshot.
    FullLogTakesNoCopy,
    /// A read of the log that returned nothing is repeated.
    EmptyReadGoesOn,
    /// Entries that were read from the log in a former epoch are sent in this one.
    OldReadIsSent,
    /// The log is trimmed only after a flush.
    TrimOnlyOnFlush,
    /// A follower keeps the log for itself only, although a store of the shard is not in sync.
    FollowerTrimsForItself,
    /// A tainted member that is trusted again counts as one that makes the in-sync set larger.
    TrustMakesRoom,
    /// Entries are applied into a table that is full, while another one is being flushed.
    ApplyWithoutRoom,
    /// A follower acknowledges entries however much it has to apply.
    AckWithoutRoom,
    /// A copy that may be wrong is promoted after a while, although a better one may still come
    /// back.
    WrongCopyLeadsInTime,
    /// A shard is frozen only for a silent member, not for one that can't acknowledge for another
    /// reason.
    FrozenIsSilence,
    /// A commit waits for a member that needs a snapshot.
    NeedyIsWaitedFor,
    /// A group is closed only by its fsync, however large it grows.
    GroupUnlimited,
    /// A follower is sent everything at once, without a window.
    WindowIgnored,
    /// One message holds all entries to be sent.
    MessageUnlimited,
    /// The number of waiting reads has no limit.
    WaitingUnbounded,
    /// All digests that are kept are sent in one message.
    PointsUnlimited,
    /// A batch is closed at the default limits instead of those of the settings.
    BatchUnlimited,
    /// A frame has no limit on its batches.
    FrameUnlimited,
    /// The status shows a frozen shard as open.
    StatusSaysOpen,
    /// Any read of etcd may lead to the deletion of a copy, also one that began before the copy was
    /// counted on again.
    AnyReadDeletes,
    /// The expiry of old records is ordered again and again while the first entry is in flight.
    ExpiryPilesUp,
    /// An empty folder takes the name of a store that is only offline.
    EmptyFolderTakesName,
    /// A store is given up for good although its copies are needed.
    NeededStoreGivenUp,
    /// An operator's acceptance of a loss is obeyed although the shard's record has changed since.
    IntentOfAnyRecord,
    /// A primary that asks to be replaced because its copy is wrong counts as a good copy beside a
    /// store that is offline.
    ResignedIsGood,
    /// A store leaves the cluster although it holds copies, or is to hold some.
    RemovesWhatHolds,
    /// Moves for balance alone begin although an operator has paused them.
    PauseIgnored,
    /// A store acts on records of etcd that its log does not keep.
    RecordNotKept,
    /// A member that left the in-sync set no longer counts although the own log may still forget
    /// that it left.
    LeavingForgotten,
    /// A recovery of etcd takes the newest known record although a member has not answered.
    RecoveredWithoutMember,
    /// A process goes on following etcd after its store has promised a higher incarnation.
    FenceIgnored,
    /// The right child of a split begins without the session rows of its parent.
    ChildWithoutSessions,
    /// The right child of a split lacks the records of requests of many.
    RecordsNotCopied,
    /// A shard is divided although its table has changes that the counted rows lack.
    SplitIgnoresTables,
    /// A split is written to etcd without a comparison of the parent's record.
    SplitUncompared,
    /// The right child exists before its state is on the disk.
    ChildBeforeFlush,
    /// A store makes a copy of a child although its copy of the parent still has those slots.
    CopyOverParent,
    /// A gateway takes a child's answer for that of the whole batch.
    PartAnswersForAll,
    /// A gateway numbers its batches for the right child from 1.
    ChildNumberedAnew,
    /// A gateway forgets, for the right child, the sends of a batch to the parent.
    SendsToParentForgotten,
    /// A recovered record has the epoch of the newest known record, whatever was promised since.
    PromisesNotRecovered,
    /// A recovery of etcd without a lost store takes the newest known record although that store
    /// may have led after it.
    GivenUpNeverLed,
    /// A driver lets a load begin after later events: it reads a later state.
    LoadBeginsLate,
    /// A driver lets messages of one connection overtake each other.
    MessagesInAnyOrder,
    /// A driver lets a record of the log be written after the fsync of its group.
    WriteAfterSync,
}

impl Planted {
    /// Returns whether this bug is planted.
    pub fn is_in(self, planted: Option<Self>) -> bool {
        cfg!(feature = "planted-bugs") && planted == Some(self)
    }
}
