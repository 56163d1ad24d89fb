//! The unsolicited reports of nodes: peers that are silent to them, and the state of the shards
//! they lead.
//!
//! Reports are hints. The newest report of each node counts until it is too old.

use std::collections::BTreeMap;

use crate::ids::{Now, ShardId, StoreBoot, StoreId};
use crate::message::{HealthReport, ReplicaHealth};

/// The newest report of one node.
#[derive(Debug)]
struct ReceivedReport {
    from: StoreBoot,
    at: Now,
    report: HealthReport,
    /// The time since which every report called the disk full.
    full_since: Option<Now>,
    frozen: BTreeMap<ShardId, FrozenSince>,
}

/// A frozen shard, as its primary reports it.
#[derive(Debug)]
struct FrozenSince {
    /// The time of the first of an unbroken series of such reports.
    since: Now,
    /// The members that do not acknowledge, and why.
    hindered_by: Vec<(StoreId, ReplicaHealth)>,
}

/// The newest report of every node.
#[derive(Debug)]
pub(super) struct Reports {
    /// The time for which a report counts.
    fresh_ms: u64,
    newest: BTreeMap<StoreId, ReceivedReport>,
}

impl Reports {
    pub(super) fn new(fresh_ms: u64) -> Self {
        Self { fresh_ms, newest: BTreeMap::new() }
    }

    /// Takes a report. Returns whether it contains anything new.
    pub(super) fn on_report(&mut self, now: Now, from: StoreBoot, report: HealthReport) -> bool {
        let known = self.newest.get(&from.store);
        if known.is_some_and(|known| known.from.boot > from.boot) {
            return false;
        }
        let same_process = known.filter(|known| known.from == from);
        let since = |shard: &ShardId| {
            let before = same_process.and_then(|known| known.frozen.get(shard));
            before.map_or(now, |frozen| frozen.since)
        };
        let frozen = report.frozen.iter().map(|(shard, hindered_by)| {
            (*shard, FrozenSince { since: since(shard), hindered_by: hindered_by.clone() })
        });
        let frozen = frozen.collect();
        let full_before = same_process.and_then(|known| known.full_since);
        let full_since = report.full.then(|| full_before.unwrap_or(now));
        let news = same_process.is_none_or(|known| known.report != report);
        self.newest
            .insert(from.store, ReceivedReport { from, at: now, report, full_since, frozen });
        news
    }

    /// The newest report of this very process, if it still counts.
    fn fresh(&self, now: Now, process: StoreBoot) -> Option<&ReceivedReport> {
        let received = self.newest.get(&process.store)?;
        (received.from == process && now.ms_since(received.at) < self.fresh_ms).then_some(received)
    }

    /// Peers that are silent to this process; `None` without a fresh report.
    pub(super) fn silent_to(&self, now: Now, process: StoreBoot) -> Option<&[StoreId]> {
        Some(&self.fresh(now, process)?.report.silent)
    }

    /// Members and learners that this primary waits for in vain: another store is to take their
    /// place.
    pub(super) fn unable(
        &self,
        now: Now,
        primary: StoreBoot,
        shard: ShardId,
    ) -> impl Iterator<Item = StoreId> {
        let frozen = self.fresh(now, primary).and_then(|received| received.frozen.get(&shard));
        let hinder = frozen.into_iter().flat_map(|frozen| &frozen.hindered_by);
        hinder.filter(|(_, standing)| standing.needs_spare()).map(|&(store, _)| store)
    }

    /// The time for which this process has reported its disk as full; `None` if it has room.
    pub(super) fn full_ms(&self, now: Now, process: StoreBoot) -> Option<u64> {
        Some(now.ms_since(self.fresh(now, process)?.full_since?))
    }

    /// Returns whether the primary asks to be replaced.
    pub(super) fn resigns(&self, now: Now, primary: StoreBoot, shard: ShardId) -> bool {
        self.fresh(now, primary).is_some_and(|received| received.report.resigned.contains(&shard))
    }

    /// The time for which this primary has reported the shard as frozen.
    pub(super) fn frozen_ms(&self, now: Now, primary: StoreBoot, shard: ShardId) -> Option<u64> {
        Some(now.ms_since(self.fresh(now, primary)?.frozen.get(&shard)?.since))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::Boot;

    const A: StoreBoot = StoreBoot { store: StoreId(1), boot: Boot(2) };
    const SHARD: ShardId = ShardId(7);

    fn frozen() -> HealthReport {
        HealthReport { frozen: vec![(SHARD, vec![])], ..HealthReport::default() }
    }

    fn second(s: u64) -> Now {
        Now(s * 1_000_000)
    }

    #[test]
    fn frozen_counts_from_the_first_of_an_unbroken_row() {
        let mut reports = Reports::new(3_000);
        assert!(reports.on_report(second(1), A, frozen()));
        assert!(!reports.on_report(second(2), A, frozen()), "nothing new");
        assert_eq!(reports.frozen_ms(second(3), A, SHARD), Some(2_000));
        reports.on_report(second(4), A, HealthReport::default());
        assert_eq!(reports.frozen_ms(second(4), A, SHARD), None);
    }

    #[test]
    fn a_disk_is_full_since_the_first_of_an_unbroken_row() {
        let mut reports = Reports::new(3_000);
        let full = || HealthReport { full: true, ..HealthReport::default() };
        reports.on_report(second(1), A, full());
        reports.on_report(second(2), A, full());
        assert_eq!(reports.full_ms(second(3), A), Some(2_000));
        reports.on_report(second(4), A, HealthReport::default());
        assert_eq!(reports.full_ms(second(4), A), None);
    }

    #[test]
    fn an_old_report_or_an_older_process_says_nothing() {
        let mut reports = Reports::new(3_000);
        reports.on_report(second(1), A, frozen());
        assert_eq!(reports.frozen_ms(second(4), A, SHARD), None);
        assert!(!reports.on_report(
            second(2),
            StoreBoot { boot: Boot(1), ..A },
            HealthReport::default()
        ));
        assert_eq!(reports.frozen_ms(second(2), A, SHARD), Some(1_000));
        let newer = StoreBoot { boot: Boot(3), ..A };
        reports.on_report(second(2), newer, frozen());
        assert_eq!(reports.frozen_ms(second(3), newer, SHARD), Some(1_000));
        assert_eq!(reports.frozen_ms(second(3), A, SHARD), None);
    }
}
