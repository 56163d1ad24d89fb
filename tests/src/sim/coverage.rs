//! The rare paths that a run has taken: a promise that was never put to the test is not proven.
//!
//! Everything here is observed from outside, as drivers see it: events, effects, records, and the
//! view that a node gives of its replicas. Nothing in the engine exists for these counts. The
//! thousand seeds of `tests/tests/sim.rs` must take each of them; a change that makes a path
//! unreachable fails there, and so does one that makes it invisible.

use std::collections::{BTreeMap, BTreeSet};

use engine::entry::{Body, Entry};
use engine::ids::{
    BatchSeq, Conn, Epoch, Seq, SessionId, ShardId, StoreBoot, StoreId, TimeMs, Version,
};
use engine::message::{
    BatchReply, FromFollower, GatewayMessage, HealthReport, NodeQueryReply, NodeReply, Refusal,
    Reject, ReplicaHealth, ShardAvailability, SnapshotOutcome, ToFollower,
};
use engine::node::{CasOutcome, Effect, Event, ReplicaView};
use engine::shard_record::ShardRecord;
use engine::store::log::LogRecord;

/// A path that a quiet run does not take.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Path {
    // -- logs and failover
    /// A new primary committed entries of an earlier epoch that were not known to be committed.
    TailSurvived,
    /// A replica truncated its log.
    TailTruncated,
    /// Two barriers are adjacent.
    FailoverWithoutData,
    /// A follower refused a deposed primary.
    DeposedRefused,
    /// A follower's log did not contain the entry before the one that its primary sent.
    LogsApart,
    /// A message arrived for a copy that no longer exists.
    WrongCopy,

    // -- the in-sync set
    Frozen,
    /// At `min_in_sync` a dead member's place went to a learner, in one change.
    SwappedAtFloor,
    /// A primary removed a silent member from the in-sync set.
    Ejected,
    /// A former member came back into the in-sync set.
    Readded,
    /// A primary that received nothing from the others asked to be replaced.
    Resigned,
    /// A primary stopped ordering, to hand over to another one.
    SteppedDown,
    /// A process that was asked to stop handed its shards over, and ended.
    Left,
    /// A primary reported a frozen shard that is held up by a silent member.
    HinderedBySilence,
    /// A frozen shard is held up by a member with a full disk.
    HinderedByFullDisk,
    /// A frozen shard is held up by a member without a copy.
    HinderedByNoCopy,
    /// A frozen shard is held up by a member that lacks what it has acknowledged.
    HinderedByLoss,
    /// A frozen shard is held up by a member that is being sent a snapshot.
    HinderedByCopying,
    /// A frozen shard is held up by a member that answers and is behind.
    HinderedByLag,
    /// A copy that may be damaged was the only one in reach, and was not promoted.
    WrongCopyWaits,
    /// A lone survivor that was restarted was not promoted at once.
    LoneSurvivorWaits,

    // -- catching up
    /// A follower was fed with entries that the primary no longer had in memory.
    FedFromLog,
    /// The log no longer held the entries that a follower lacked, and it was sent a snapshot.
    NotInLog,
    FilledBySnapshot,
    SnapshotInterrupted,
    CopyDropped,
    /// A follower refused a snapshot for which it had no room.
    CopyWithoutRoom,
    /// A flush waited for room on the disk.
    FlushWithoutRoom,
    /// Entries that alone kept an old segment of the log were written again.
    EntriesCarried,
    /// The log became too long because of what its own store needed, or no longer was.
    LogTooLong,

    // -- exactly once
    /// A batch was committed again in a later epoch, and only its first place counted.
    DuplicateAfterFailover,
    SessionCollected,
    /// A batch of a collected session arrived, and was answered so.
    SessionExpired,
    BucketExpired,
    /// A request with a token was refused for want of room for its record.
    ShareTaken,
    /// While one namespace was refused, another one still found room.
    ShareLeft,
    /// A refusal before ordering, for want of room.
    Overloaded,

    // -- reads
    /// A round of read-index found a newer primary.
    ReadIndexDenied,
    /// Etcd proved a read that the peers could not.
    ReadProvenByEtcd,
    /// Etcd knew a newer primary than the one that asked.
    ReadDeniedByEtcd,
    /// A follower answered with a stale value, and stated how stale.
    StaleRead,
    /// A follower that could not prove the bound refused the read.
    TooStale,

    // -- etcd
    /// A primary does not know the outcome of its proposal.
    ProposalUnknown,
    /// A transaction took effect after its client had given up.
    LateTxn,
    /// A process noticed that etcd was restored from an old snapshot.
    EtcdWentBack,
    /// All of etcd was lost, and rebuilt from what the stores know.
    EtcdRebuilt,

    // -- splits
    /// A shard was split, and the digests of its children add up to its own.
    ShardSplit,
    /// The split was written to etcd by a later primary than the one that had ordered it.
    SplitCarriedOn,
    /// A gateway sent a batch of the parent to a child.
    BatchOfParent,
    /// Etcd was rebuilt with shards that had been split.
    SplitRebuilt,

    // -- time
    /// Hours or days passed while nothing was in flight.
    Leapt,
    /// The time of a shard leapt to what the clocks of its members show.
    ShardTimeLeapt,

    // -- disks
    /// Power was lost in the middle of a group's write.
    GroupTorn,
    /// A start cut the end of its log, which was never durable.
    TornGroupCut,
    /// Recovery distinguished damage from a torn write.
    DamageTold,
    /// A store started with copies that are not to be trusted.
    StartedSuspect,
    /// A disk that was rolled back, or can't be identified, was refused.
    StartRefused,
    /// An older copy of a folder, started on another machine, was refused.
    TwinRefused,
    /// An empty folder under the name of a store that is away was refused, or a store that was
    /// given up.
    EmptyRefused,
    /// A disk was mounted again.
    DiskPutBack,
    /// A shard is led with a loss on record.
    LossAccepted,

    // -- the freedom of drivers; *late*: after another event was handled
    /// Effects of one event of a node were performed in another order.
    EffectsSwapped,
    /// A record or the fsync of a group was late.
    WriteLate,
    /// A change of the state, or its copying, was late.
    ChangeLate,
    /// A message of a node was late, or the end of a connection.
    MessageLate,
    /// A read of the log was late.
    LogReadLate,
    /// A trim of the log was late.
    TrimLate,
    /// A call of etcd was late.
    CallLate,
    /// Another effect of a node was late.
    RestLate,
    /// The report that a group is durable was late.
    DurableLate,
    /// The answer to a load was late.
    LoadedLate,
    /// The answer to a change of the state was late: loads saw the rows of before.
    ChangedLate,
    /// The answer to a read of the log was late.
    LogAnswerLate,
    /// The answer to a call of etcd was late.
    CallAnswerLate,
    /// A record of a watch was late.
    RecordLate,
    /// A timer of a node was late.
    TickLate,
    /// An effect of a batcher was late.
    BatcherLate,
    /// A record of a watch was late at a batcher.
    BatcherRecordLate,
    /// Effects of one event of a coordinator were performed in another order.
    CoordinatorSwapped,
    /// An effect of a coordinator was late.
    CoordinatorLate,
    /// An answer to a coordinator, or a change, was late.
    CoordinatorAnswerLate,
    /// A query of a coordinator stayed unanswered.
    QueryUnanswered,
}

impl Path {
    pub const ALL: [Self; 82] = [
        Self::TailSurvived,
        Self::TailTruncated,
        Self::FailoverWithoutData,
        Self::DeposedRefused,
        Self::LogsApart,
        Self::WrongCopy,
        Self::Frozen,
        Self::SwappedAtFloor,
        Self::Ejected,
        Self::Readded,
        Self::Resigned,
        Self::SteppedDown,
        Self::Left,
        Self::HinderedBySilence,
        Self::HinderedByFullDisk,
        Self::HinderedByNoCopy,
        Self::HinderedByLoss,
        Self::HinderedByCopying,
        Self::HinderedByLag,
        Self::WrongCopyWaits,
        Self::LoneSurvivorWaits,
        Self::FedFromLog,
        Self::NotInLog,
        Self::FilledBySnapshot,
        Self::SnapshotInterrupted,
        Self::CopyDropped,
        Self::CopyWithoutRoom,
        Self::FlushWithoutRoom,
        Self::EntriesCarried,
        Self::LogTooLong,
        Self::DuplicateAfterFailover,
        Self::SessionCollected,
        Self::SessionExpired,
        Self::BucketExpired,
        Self::ShareTaken,
        Self::ShareLeft,
        Self::Overloaded,
        Self::ReadIndexDenied,
        Self::ReadProvenByEtcd,
        Self::ReadDeniedByEtcd,
        Self::StaleRead,
        Self::TooStale,
        Self::ProposalUnknown,
        Self::LateTxn,
        Self::EtcdWentBack,
        Self::EtcdRebuilt,
        Self::ShardSplit,
        Self::SplitCarriedOn,
        Self::BatchOfParent,
        Self::SplitRebuilt,
        Self::Leapt,
        Self::ShardTimeLeapt,
        Self::GroupTorn,
        Self::TornGroupCut,
        Self::DamageTold,
        Self::StartedSuspect,
        Self::StartRefused,
        Self::TwinRefused,
        Self::EmptyRefused,
        Self::DiskPutBack,
        Self::LossAccepted,
        Self::EffectsSwapped,
        Self::WriteLate,
        Self::ChangeLate,
        Self::MessageLate,
        Self::LogReadLate,
        Self::TrimLate,
        Self::CallLate,
        Self::RestLate,
        Self::DurableLate,
        Self::LoadedLate,
        Self::ChangedLate,
        Self::LogAnswerLate,
        Self::CallAnswerLate,
        Self::RecordLate,
        Self::TickLate,
        Self::BatcherLate,
        Self::BatcherRecordLate,
        Self::CoordinatorSwapped,
        Self::CoordinatorLate,
        Self::CoordinatorAnswerLate,
        Self::QueryUnanswered,
    ];
}

/// The number of times that each path was taken, and the state that is needed to know.
#[derive(Default)]
pub struct Coverage {
    pub counts: BTreeMap<Path, u64>,
    records: BTreeMap<ShardId, ShardRecord>,
    /// Stores that were in sync once and are not now.
    outside: BTreeSet<(ShardId, StoreId)>,
    /// The records that primaries have proposed to etcd: they show whose change a record is.
    proposed: BTreeSet<(ShardId, Version, Vec<StoreId>)>,
    /// The last position that any replica has applied.
    applied: BTreeMap<ShardId, Seq>,
    /// The position of each epoch's barrier when it was first written.
    barriers: BTreeMap<(ShardId, Epoch), Seq>,
    /// New primaries whose logs end with entries that are not known to be committed.
    tails: BTreeMap<(ShardId, Epoch), Seq>,
    /// The position at which each batch was first committed.
    batches: BTreeMap<(ShardId, SessionId, BatchSeq), (Epoch, Seq)>,
    /// The epochs in which splits were ordered, by the right child.
    splits: BTreeMap<ShardId, Epoch>,
    /// Snapshots on their way.
    transfers: BTreeSet<(StoreBoot, Conn, u64)>,
    /// The time of each shard, and the step from which on it is a leap.
    times: BTreeMap<ShardId, TimeMs>,
    leap_ms: u64,
}

impl Coverage {
    pub fn new(leap_ms: u64) -> Self {
        Self { leap_ms, ..Self::default() }
    }

    pub fn reached(&mut self, path: Path) {
        *self.counts.entry(path).or_default() += 1;
    }

    pub fn event(&mut self, me: StoreBoot, event: &Event) {
        match event {
            Event::FromFollower { conn, message } => match message {
                FromFollower::ReadIndex { newer, .. } if !newer.is_empty() => {
                    self.reached(Path::ReadIndexDenied);
                }
                FromFollower::Snapshot { transfer, outcome, .. }
                    if *outcome != SnapshotOutcome::Accepted =>
                {
                    self.transfers.remove(&(me, *conn, *transfer));
                }
                _ => {}
            },
            Event::Gateway { message: GatewayMessage::Resend { .. }, .. } => {
                self.reached(Path::BatchOfParent);
            }
            Event::Closed { conn } => {
                let gone = |&(of, on, _): &(StoreBoot, Conn, u64)| (of, on) == (me, *conn);
                let cut = self.transfers.extract_if(.., gone).count();
                (0..cut).for_each(|_| self.reached(Path::SnapshotInterrupted));
            }
            Event::LogRead { parts, .. } => {
                for part in parts {
                    let found = !part.entries.is_empty();
                    self.reached(if found { Path::FedFromLog } else { Path::NotInLog });
                }
            }
            Event::SnapshotInstalled { .. } => self.reached(Path::FilledBySnapshot),
            Event::Proposed { outcome: CasOutcome::Unknown, .. } => {
                self.reached(Path::ProposalUnknown);
            }
            Event::EtcdChecked { records: Some(configs), .. } => {
                for config in configs {
                    let leads = config.primary == me;
                    self.reached(match leads {
                        true => Path::ReadProvenByEtcd,
                        false => Path::ReadDeniedByEtcd,
                    });
                }
            }
            _ => {}
        }
    }

    pub fn effect(&mut self, me: StoreBoot, effect: &Effect) {
        match effect {
            Effect::Write(LogRecord::Append { shard, entry }) => self.appended(*shard, entry),
            Effect::Write(LogRecord::Truncate { .. }) => self.reached(Path::TailTruncated),
            Effect::Write(LogRecord::Drop { .. }) => self.reached(Path::CopyDropped),
            Effect::ToPrimary { message: FromFollower::Reject { reason, .. }, .. } => {
                match reason {
                    Reject::StaleEpoch { .. } => self.reached(Path::DeposedRefused),
                    Reject::Mismatch { .. } => self.reached(Path::LogsApart),
                    Reject::WrongCopy { .. } => self.reached(Path::WrongCopy),
                    Reject::Stopped | Reject::NoSpace => {}
                }
            }
            Effect::ToFollower { conn, message: ToFollower::Snapshot { transfer, .. } } => {
                self.transfers.insert((me, *conn, *transfer));
            }
            Effect::Gateway { reply, .. } => self.replied_to_gateway(reply),
            Effect::Report(report) => self.reported(report),
            Effect::QueryReply { reply: NodeQueryReply::StepDown { end: Some(_), .. }, .. } => {
                self.reached(Path::SteppedDown);
            }
            Effect::Left => self.reached(Path::Left),
            Effect::Propose { record: config, .. } => {
                self.proposed.insert((config.shard(), config.version, config.isr.clone()));
            }
            _ => {}
        }
    }

    fn reported(&mut self, report: &HealthReport) {
        if !report.resigned.is_empty() {
            self.reached(Path::Resigned);
        }
        for (_, standing) in report.frozen.iter().flat_map(|(_, hindered_by)| hindered_by) {
            match standing {
                ReplicaHealth::Good => {}
                ReplicaHealth::Silent => self.reached(Path::HinderedBySilence),
                ReplicaHealth::Full => self.reached(Path::HinderedByFullDisk),
                ReplicaHealth::NoCopy => self.reached(Path::HinderedByNoCopy),
                ReplicaHealth::Lost => self.reached(Path::HinderedByLoss),
                ReplicaHealth::Filling => self.reached(Path::HinderedByCopying),
                ReplicaHealth::Behind => self.reached(Path::HinderedByLag),
            }
        }
    }

    /// A coordinator left a shard without a primary for now.
    pub fn leaderless(&mut self, why: &str) {
        if why.contains("may be damaged") {
            self.reached(Path::WrongCopyWaits);
        } else if why.contains("was restarted") {
            self.reached(Path::LoneSurvivorWaits);
        }
    }

    /// Records the time of an entry, and whether shard time leapt.
    fn time(&mut self, shard: ShardId, entry: &Entry) {
        let before = self.times.entry(shard).or_default();
        let step_ms = entry.time.0.saturating_sub(before.0);
        let begins = before.0 == 0;
        *before = (*before).max(entry.time);
        if step_ms > self.leap_ms && !begins {
            self.reached(Path::ShardTimeLeapt);
        }
    }

    fn appended(&mut self, shard: ShardId, entry: &Entry) {
        self.time(shard, entry);
        match entry.body {
            Body::Barrier => {
                // The primary writes the barrier before any follower receives it.
                if self.barriers.contains_key(&(shard, entry.epoch)) {
                    return;
                }
                let before = Seq(entry.seq.0 - 1);
                let mut earlier = self.barriers.range((shard, Epoch(0))..);
                if earlier.any(|(&(of, _), &at)| of == shard && at == before) {
                    self.reached(Path::FailoverWithoutData);
                }
                self.barriers.insert((shard, entry.epoch), entry.seq);
                if self.applied.get(&shard).is_some_and(|&applied| applied < before) {
                    self.tails.insert((shard, entry.epoch), before);
                }
            }
            Body::ExpireSessions { .. } => self.reached(Path::SessionCollected),
            Body::ExpireTokens { .. } => self.reached(Path::BucketExpired),
            Body::Split { at } => {
                self.splits.entry(ShardId(at)).or_insert(entry.epoch);
            }
            Body::Ops(_) | Body::Unknown { .. } => {}
        }
    }

    fn replied_to_gateway(&mut self, reply: &NodeReply) {
        let path = match reply {
            NodeReply::Answer { answer: BatchReply::Expired, .. } => Path::SessionExpired,
            NodeReply::Answer { answer: BatchReply::Refused(Refusal::Overloaded), .. } => {
                Path::Overloaded
            }
            NodeReply::Read { result: Err(Refusal::Stale), .. } => Path::TooStale,
            NodeReply::Read { result: Ok(found), .. } if found.staleness_us > 0 => Path::StaleRead,
            NodeReply::ShardState { state: ShardAvailability::Frozen, .. } => Path::Frozen,
            _ => return,
        };
        self.reached(path);
    }

    /// A replica has applied more entries than at the last check.
    pub fn applied(&mut self, view: &ReplicaView<'_>, from: Seq) {
        let (shard, at) = (view.shard, view.state.applied);
        let newest = self.applied.entry(shard).or_default();
        let first_new = from.max(*newest).0 + 1;
        *newest = at.seq.max(*newest);
        for seq in (first_new..=at.seq.0).map(Seq) {
            let Some(held) = view.log.get(seq) else { continue };
            let Body::Ops(batch) = &held.entry.body else { continue };
            let place = (held.entry.epoch, seq);
            let first =
                *self.batches.entry((shard, batch.session, batch.batch_seq)).or_insert(place);
            if first.0 < place.0 {
                self.reached(Path::DuplicateAfterFailover);
            }
        }
        // In this epoch only an entry after its barrier can be applied.
        if self.tails.remove(&(shard, at.epoch)).is_some() {
            self.reached(Path::TailSurvived);
        }
    }

    pub fn record_written(&mut self, config: &ShardRecord) {
        let shard = config.shard();
        let Some(old) = self.records.insert(shard, config.clone()) else {
            // The first record of a child has the epoch of the primary that writes it.
            if self
                .splits
                .get(&shard)
                .is_some_and(|ordered| config.epoch > (*ordered).max(Epoch(2)))
            {
                self.reached(Path::SplitCarriedOn);
            }
            return;
        };
        let came = config.isr.iter().filter(|store| !old.isr.contains(store)).count();
        let went: Vec<_> = old.isr.iter().filter(|store| !config.isr.contains(store)).collect();
        let by_primary = self.proposed.contains(&(shard, config.version, config.isr.clone()));
        if by_primary && came == 0 && !went.is_empty() {
            self.reached(Path::Ejected);
        }
        if came == 1 && went.len() == 1 && config.epoch == old.epoch {
            self.reached(Path::SwappedAtFloor);
        }
        if config.isr.iter().any(|&store| self.outside.contains(&(shard, store))) {
            self.reached(Path::Readded);
        }
        self.outside.extend(went.into_iter().map(|&store| (shard, store)));
        config.isr.iter().for_each(|&store| {
            self.outside.remove(&(shard, store));
        });
    }
}
