//! The cluster as the leader observes it: the records in etcd, the results of probes, the reports
//! of nodes.
//!
//! Events change it, by `leader_state` alone; reviews read it.

use std::collections::{BTreeMap, BTreeSet};

use crate::coordinator::health::{FailureDetector, Liveness};
use crate::coordinator::planner::{Store, StoreState};
use crate::coordinator::records::ClusterRecords;
use crate::coordinator::reports::Reports;
use crate::coordinator::{
    AcceptedLoss, AtRevision, CoordinatorTiming, CoordinatorTurn, RecordChange, StoreRemoval,
    Writes,
};
use crate::ids::{Now, ShardId, StoreBoot, StoreId};
use crate::message::HealthReport;
use crate::records::{Meta, StoreRecord, StoreStatus};
use crate::shard_record::ShardRecord;

/// All observations of one term. See the module.
#[derive(Debug)]
pub(super) struct ObservedCluster {
    pub(super) records: ClusterRecords,
    pub(super) health: FailureDetector,
    pub(super) reports: Reports,
    /// The time since which each dead store has been away.
    away_since: BTreeMap<StoreId, Now>,
    /// Every process has had time to answer a probe; before that none counts as dead.
    all_probed: bool,
}

impl ObservedCluster {
    pub(super) fn new(timing: CoordinatorTiming) -> Self {
        Self {
            records: ClusterRecords::default(),
            health: FailureDetector::new(timing),
            reports: Reports::new(timing.report_ms),
            away_since: BTreeMap::new(),
            all_probed: false,
        }
    }

    pub(super) fn meta(&self) -> Option<&Meta> {
        Some(&self.records.meta.as_ref()?.value)
    }

    pub(super) fn min_in_sync(&self) -> usize {
        self.meta().map_or(usize::MAX, |meta| usize::from(meta.min_in_sync))
    }

    pub(super) fn shard(&self, shard: ShardId) -> Option<&ShardRecord> {
        self.records.shards.get(shard).map(|kept| &kept.value)
    }

    pub(super) fn shards(&self) -> impl Iterator<Item = &ShardRecord> {
        self.records.shards.iter().map(|(_, kept)| &kept.value)
    }

    // ---- what the observations amount to -------------------------------------------------------

    /// Returns whether every process has had time to answer a probe in this term.
    pub(super) fn was_probed(&self) -> bool {
        self.all_probed
    }

    /// Returns whether the store counts as dead by its probes, or is gone for good by its status.
    pub(super) fn is_dead(&self, now: Now, store: StoreId) -> bool {
        let registered = self.records.is_registered(store);
        self.records.newest_boot(store).is_none()
            || self.health.death(now, store, registered).is_some()
    }

    /// Returns whether the shard's primary answers, and is the process that the record names.
    pub(super) fn is_led(&self, record: &ShardRecord) -> bool {
        self.health.alive(record.primary.store) == Some(record.primary)
    }

    /// Returns whether the store's disk has been full for some time, and not for a moment only, as
    /// when a log is too long until the next flush.
    pub(super) fn is_full(&self, turn: &CoordinatorTurn<'_>, store: StoreId) -> bool {
        let full_ms = self.health.alive(store).and_then(|it| self.reports.full_ms(turn.now, it));
        full_ms.is_some_and(|ms| ms >= turn.settings.timing.full_after_ms)
    }

    /// Stores that are dead, but not gone for good, as they were last noted.
    pub(super) fn away(&self) -> impl Iterator<Item = StoreId> {
        self.away_since.keys().copied()
    }

    /// All stores, as the planner sees them.
    pub(super) fn stores(&self, turn: &CoordinatorTurn<'_>) -> Vec<Store> {
        let store = |(id, kept): (StoreId, &AtRevision<StoreRecord>)| Store {
            id,
            zone: kept.value.zone.clone(),
            host: kept.value.host.clone(),
            capacity: self.records.nodes.get(id).map_or(0, |node| node.value.capacity),
            state: self.state(turn, id, kept.value.status),
        };
        self.records.stores.iter().map(store).collect()
    }

    fn state(&self, turn: &CoordinatorTurn<'_>, store: StoreId, status: StoreStatus) -> StoreState {
        let now = turn.now;
        let registered = self.records.is_registered(store);
        if status.is_gone() {
            return StoreState::Gone;
        }
        if self.health.death(now, store, registered).is_some() {
            let since = self.away_since.get(&store).copied().unwrap_or(now);
            let late = now.ms_since(since) >= turn.settings.rebuild_delay_ms;
            return if late { StoreState::Gone } else { StoreState::Away };
        }
        match status {
            _ if !registered || self.health.liveness(store) != Liveness::Alive => {
                StoreState::Unregistered
            }
            StoreStatus::Draining => StoreState::Draining,
            StoreStatus::Suspect => StoreState::Suspect,
            _ if self.is_full(turn, store) => StoreState::Full,
            _ => StoreState::Ready,
        }
    }

    // ---- events --------------------------------------------------------------------------------

    /// Takes one change. Returns whether it is new.
    pub(super) fn changed(&mut self, now: Now, revision: u64, change: RecordChange) -> bool {
        let left = match change {
            RecordChange::Node(store, None) => Some(store),
            _ => None,
        };
        let is_new = self.records.changed(revision, change);
        if is_new && let Some(store) = left {
            self.health.probe_now(now, store);
        }
        is_new
    }

    /// Applies a successful proposal to the known records, ahead of the watch.
    pub(super) fn written(&mut self, revision: u64, writes: Writes) {
        match writes {
            Writes::Meta(value) => {
                let kept = AtRevision { value, created: revision, modified: revision };
                self.records.changed(revision, RecordChange::Meta(kept));
            }
            Writes::Store { store, record: value, .. } => {
                let created = self.records.stores.get(store).map_or(revision, |kept| kept.created);
                let kept = AtRevision { value, created, modified: revision };
                self.records.changed(revision, RecordChange::Store(store, Some(kept)));
            }
            Writes::Removal(removal) => {
                let StoreRemoval { store, record: value, drain, .. } = *removal;
                let created = self.records.stores.get(store).map_or(revision, |kept| kept.created);
                let kept = AtRevision { value, created, modified: revision };
                self.records.changed(revision, RecordChange::Store(store, Some(kept)));
                self.records.changed(revision, RecordChange::Remove(store, None));
                if drain.is_some() {
                    self.records.changed(revision, RecordChange::Drain(store, None));
                }
            }
            Writes::Shards(shards) => {
                shards.into_iter().for_each(|(_, value)| self.shard_written(revision, value));
            }
            Writes::AcceptedLoss(accepted) => {
                let AcceptedLoss { record, intent, .. } = *accepted;
                if intent.is_some() {
                    self.records.changed(revision, RecordChange::Promote(record.shard(), None));
                }
                self.shard_written(revision, record);
            }
        }
    }

    fn shard_written(&mut self, revision: u64, value: ShardRecord) {
        let shard = value.shard();
        let created = self.records.shards.get(shard).map_or(revision, |kept| kept.created);
        let kept = AtRevision { value, created, modified: revision };
        self.records.changed(revision, RecordChange::Shard(shard, Some(kept)));
    }

    /// Takes a node's report. Returns whether it contains anything new.
    pub(super) fn on_report(&mut self, now: Now, from: StoreBoot, report: HealthReport) -> bool {
        self.suspect(now, &report.silent);
        let leaves = report.leaving && self.health.note_leaving(from);
        self.reports.on_report(now, from, report) || leaves
    }

    /// Notes complaints that these stores do not answer.
    pub(super) fn suspect(&mut self, now: Now, stores: &[StoreId]) {
        stores.iter().for_each(|&store| self.health.suspect(now, store));
    }

    // ---- reviews -------------------------------------------------------------------------------

    /// Probes the newest process of every store that is not gone for good, and no others.
    pub(super) fn set_watched(&mut self, now: Now) {
        let newest = |(store, _): (StoreId, _)| {
            Some(StoreBoot { store, boot: self.records.newest_boot(store)? })
        };
        let processes: Vec<StoreBoot> = self.records.stores.iter().filter_map(newest).collect();
        self.health.set_watched(now, &processes);
    }

    /// Sends the probes that are due. Returns whether a liveness changed.
    pub(super) fn send_due_probes(&mut self, turn: &mut CoordinatorTurn<'_>) -> bool {
        let changed = self.health.send_due_probes(turn);
        self.all_probed |= self.health.all_probed();
        changed
    }

    /// Logs which processes died and returned. Returns whether there were any.
    pub(super) fn log_deaths(&mut self, turn: &mut CoordinatorTurn<'_>) -> bool {
        let records = &self.records;
        self.health.log_changes(turn, |store| records.is_registered(store))
    }

    /// Notes which stores are away, and since when.
    pub(super) fn note_away(&mut self, now: Now) {
        let stands = |(store, _): (StoreId, _)| self.records.newest_boot(store).map(|_| store);
        let standing = self.records.stores.iter().filter_map(stands);
        let away: BTreeSet<StoreId> = standing.filter(|store| self.is_dead(now, *store)).collect();
        self.away_since.retain(|store, _| away.contains(store));
        for store in away {
            self.away_since.entry(store).or_insert(now);
        }
    }
}
