//! What nodes say unasked: who is silent to them, and how the shards they lead fare.
//!
//! Hints. The newest report of each node stands until it is too old to mean anything.

use std::collections::BTreeMap;

use crate::ids::{Now, ShardId, StoreBoot, StoreId};
use crate::message::{Report, Standing};

#[derive(Debug)]
struct Heard {
    from: StoreBoot,
    at: Now,
    report: Report,
    /// Its disk has been reported to be full without a break since then.
    full_since: Option<Now>,
    frozen: BTreeMap<ShardId, Frozen>,
}

#[derive(Debug)]
struct Frozen {
    /// It has been reported so without a break.
    since: Now,
    hindered_by: Vec<(StoreId, Standing)>,
}

#[derive(Debug)]
pub(super) struct Reports {
    /// A report counts for so long.
    fresh_ms: u64,
    heard: BTreeMap<StoreId, Heard>,
}

impl Reports {
    pub(super) fn new(fresh_ms: u64) -> Self {
        Self { fresh_ms, heard: BTreeMap::new() }
    }

    /// True if it says anything new.
    pub(super) fn heard(&mut self, now: Now, from: StoreBoot, report: Report) -> bool {
        let known = self.heard.get(&from.store);
        if known.is_some_and(|known| known.from.boot > from.boot) {
            return false;
        }
        let same_process = known.filter(|known| known.from == from);
        let since = |shard: &ShardId| {
            let before = same_process.and_then(|known| known.frozen.get(shard));
            before.map_or(now, |frozen| frozen.since)
        };
        let frozen = report.frozen.iter().map(|(shard, hindered_by)| {
            (*shard, Frozen { since: since(shard), hindered_by: hindered_by.clone() })
        });
        let frozen = frozen.collect();
        let full_before = same_process.and_then(|known| known.full_since);
        let full_since = report.full.then(|| full_before.unwrap_or(now));
        let news = same_process.is_none_or(|known| known.report != report);
        self.heard.insert(from.store, Heard { from, at: now, report, full_since, frozen });
        news
    }

    fn of(&self, now: Now, process: StoreBoot) -> Option<&Heard> {
        let heard = self.heard.get(&process.store)?;
        (heard.from == process && now.ms_since(heard.at) < self.fresh_ms).then_some(heard)
    }

    /// Peers that this process does not hear; none if it has not reported lately.
    pub(super) fn silent_to(&self, now: Now, process: StoreBoot) -> Option<&[StoreId]> {
        Some(&self.of(now, process)?.report.silent)
    }

    /// Members and learners that this primary waits for in vain: another store is to take their place.
    pub(super) fn unable(
        &self,
        now: Now,
        primary: StoreBoot,
        shard: ShardId,
    ) -> impl Iterator<Item = StoreId> {
        let frozen = self.of(now, primary).and_then(|heard| heard.frozen.get(&shard));
        let hinder = frozen.into_iter().flat_map(|frozen| &frozen.hindered_by);
        hinder.filter(|(_, standing)| standing.needs_spare()).map(|&(store, _)| store)
    }

    /// For how long this process has said that its disk has no room; none if it has some.
    pub(super) fn full_ms(&self, now: Now, process: StoreBoot) -> Option<u64> {
        Some(now.ms_since(self.of(now, process)?.full_since?))
    }

    /// The primary asks to be replaced.
    pub(super) fn resigns(&self, now: Now, primary: StoreBoot, shard: ShardId) -> bool {
        self.of(now, primary).is_some_and(|heard| heard.report.resigned.contains(&shard))
    }

    /// For how long this primary has called the shard frozen.
    pub(super) fn frozen_ms(&self, now: Now, primary: StoreBoot, shard: ShardId) -> Option<u64> {
        Some(now.ms_since(self.of(now, primary)?.frozen.get(&shard)?.since))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::Boot;

    const A: StoreBoot = StoreBoot { store: StoreId(1), boot: Boot(2) };
    const SHARD: ShardId = ShardId(7);

    fn frozen() -> Report {
        Report { frozen: vec![(SHARD, vec![])], ..Report::default() }
    }

    fn second(s: u64) -> Now {
        Now(s * 1_000_000)
    }

    #[test]
    fn frozen_counts_from_the_first_of_an_unbroken_row() {
        let mut reports = Reports::new(3_000);
        assert!(reports.heard(second(1), A, frozen()));
        assert!(!reports.heard(second(2), A, frozen()), "nothing new");
        assert_eq!(reports.frozen_ms(second(3), A, SHARD), Some(2_000));
        reports.heard(second(4), A, Report::default());
        assert_eq!(reports.frozen_ms(second(4), A, SHARD), None);
    }

    #[test]
    fn a_disk_is_full_since_the_first_of_an_unbroken_row() {
        let mut reports = Reports::new(3_000);
        let full = || Report { full: true, ..Report::default() };
        reports.heard(second(1), A, full());
        reports.heard(second(2), A, full());
        assert_eq!(reports.full_ms(second(3), A), Some(2_000));
        reports.heard(second(4), A, Report::default());
        assert_eq!(reports.full_ms(second(4), A), None);
    }

    #[test]
    fn an_old_report_or_an_older_process_says_nothing() {
        let mut reports = Reports::new(3_000);
        reports.heard(second(1), A, frozen());
        assert_eq!(reports.frozen_ms(second(4), A, SHARD), None);
        assert!(!reports.heard(second(2), StoreBoot { boot: Boot(1), ..A }, Report::default()));
        assert_eq!(reports.frozen_ms(second(2), A, SHARD), Some(1_000));
        let newer = StoreBoot { boot: Boot(3), ..A };
        reports.heard(second(2), newer, frozen());
        assert_eq!(reports.frozen_ms(second(3), newer, SHARD), Some(1_000));
        assert_eq!(reports.frozen_ms(second(3), A, SHARD), None);
    }
}
