//! The progress of moves, counted from the map: how many shards want one, when the map last
//! changed, and how long copies take.
//!
//! Moves have *stalled* if some are wanted and the map has not changed for long. Moves that wait on
//! purpose are not wanted: those for balance that an operator has paused, new copies while the
//! mass-failure guard holds, and copies of a node whose return is waited for.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use crate::coordinator::planner::{PlannedChange, PlannerInput, ShardView, StoreState, by_id};
use crate::ids::{Now, ShardId, StoreId};

/// The number of copies whose durations are averaged.
const COPIES_AVERAGED: usize = 32;

/// The progress of all moves in one term.
#[derive(Debug, Default)]
pub(super) struct MoveProgress {
    /// The number of shards that want a move.
    wanted: usize,
    /// The sum of the versions of all records: it rises with each change of the map.
    mark: u64,
    /// The time of the last change, or that since which moves are wanted.
    moved_at: Now,
    /// The copies in progress, since when each.
    running: BTreeMap<(ShardId, StoreId), Now>,
    /// The durations of the last copies, in ms.
    took: VecDeque<u64>,
}

/// The progress of all moves at one moment.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct MovesStatus {
    /// The number of shards that want a move.
    pub wanted: usize,
    /// The time without a change of the map, while moves are wanted.
    pub still_ms: u64,
    /// Moves are wanted, and the map has not changed for `stalled_after_ms`.
    pub stalled: bool,
    /// The average duration of the last copies; `None` if none has ended in this term.
    pub copy_ms: Option<u64>,
}

impl MoveProgress {
    /// Takes the map as a plan saw it, and the changes of that plan.
    pub(super) fn observe(
        &mut self,
        now: Now,
        input: &PlannerInput<'_>,
        planned: &[PlannedChange],
    ) {
        let records = || input.shards.iter().map(|shard| shard.record);
        let mark = records().map(|record| record.version.0).sum();
        if mark != self.mark || self.wanted == 0 {
            self.moved_at = now;
        }
        self.mark = mark;
        let stores = by_id(input.stores);
        let state = |store| stores.get(&store).map_or(StoreState::Gone, |store| store.state);
        let planned: BTreeSet<ShardId> = planned.iter().map(|change| change.shard()).collect();
        let wants = |shard: &&ShardView<'_>| {
            wants_a_move(input, shard, state) || planned.contains(&shard.record.shard())
        };
        self.wanted = input.shards.iter().filter(wants).count();
        if self.wanted == 0 {
            self.moved_at = now;
        }
        let mut running = BTreeMap::new();
        for record in records() {
            for &store in &record.learners {
                let began = self.running.remove(&(record.shard(), store)).unwrap_or(now);
                running.insert((record.shard(), store), began);
            }
        }
        for ((shard, store), began) in std::mem::replace(&mut self.running, running) {
            let ended = records().any(|it| it.shard() == shard && it.isr.contains(&store));
            if ended {
                self.took.push_back(now.ms_since(began));
            }
        }
        while self.took.len() > COPIES_AVERAGED {
            self.took.pop_front();
        }
    }

    pub(super) fn status(&self, now: Now, stalled_after_ms: u64) -> MovesStatus {
        let still_ms = if self.wanted == 0 { 0 } else { now.ms_since(self.moved_at) };
        MovesStatus {
            wanted: self.wanted,
            still_ms,
            stalled: self.wanted > 0 && still_ms >= stalled_after_ms,
            copy_ms: self.took.iter().sum::<u64>().checked_div(self.took.len() as u64),
        }
    }

    /// The copies in progress, with the age of each in ms.
    pub(super) fn ages(&self, now: Now) -> BTreeMap<(ShardId, StoreId), u64> {
        self.running.iter().map(|(&id, began)| (id, now.ms_since(*began))).collect()
    }
}

/// Returns whether the shard is not where it should be, and nothing holds its moves on purpose.
fn wants_a_move(
    input: &PlannerInput<'_>,
    shard: &ShardView<'_>,
    state: impl Fn(StoreId) -> StoreState,
) -> bool {
    let record = shard.record;
    let leaves = |store: &StoreId| match state(*store) {
        StoreState::Draining | StoreState::Suspect | StoreState::Gone => true,
        StoreState::Ready => !record.isr.contains(store),
        StoreState::Away | StoreState::Full | StoreState::Unregistered => false,
    };
    let misplaced = record.isr.iter().any(|store| !record.target.contains(store));
    let short = record.target.len() < input.replicas || record.target.iter().any(leaves);
    let fills = record.learners.iter().any(|&store| state(store) != StoreState::Away);
    fills || !input.hold && (misplaced || short)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::coordinator::planner::{PlannerLimits, Store};
    use crate::ids::Version;
    use crate::shard_record::ShardRecord;

    fn ids(stores: &[u128]) -> Vec<StoreId> {
        stores.iter().copied().map(StoreId).collect()
    }

    fn second(seconds: u64) -> Now {
        Now(seconds * 1_000_000)
    }

    struct Bench {
        progress: MoveProgress,
        stores: Vec<Store>,
        record: ShardRecord,
        hold: bool,
    }

    impl Bench {
        /// One shard on three of four stores.
        fn new() -> Self {
            let store = |id| Store {
                id: StoreId(id),
                zone: String::new(),
                host: String::new(),
                capacity: 1,
                state: StoreState::Ready,
            };
            let (isr, target, version) = (ids(&[1, 2, 3]), ids(&[1, 2, 3]), Version(1));
            let record = ShardRecord { isr, target, version, ..ShardRecord::default() };
            let stores = (1..=4).map(store).collect();
            Self { progress: MoveProgress::default(), stores, record, hold: false }
        }

        fn at(&mut self, seconds: u64) -> MovesStatus {
            let shards = [ShardView { record: &self.record, free: true, unable: vec![] }];
            let input = PlannerInput {
                stores: &self.stores,
                shards: &shards,
                replicas: 3,
                min_in_sync: 2,
                limits: PlannerLimits::default(),
                hold: self.hold,
                quiet: true,
                paused: false,
            };
            self.progress.observe(second(seconds), &input, &[]);
            self.progress.status(second(seconds), 60_000)
        }

        fn change(&mut self, isr: &[u128], learners: &[u128], target: &[u128]) {
            self.record.version.0 += 1;
            self.record.isr = ids(isr);
            self.record.learners = ids(learners);
            self.record.target = ids(target);
        }
    }

    #[test]
    fn wanted_moves_without_progress_have_stalled() {
        let mut bench = Bench::new();
        assert_eq!(bench.at(0), MovesStatus::default());
        assert_eq!(bench.at(100).still_ms, 0, "nothing is wanted");
        bench.stores[0].state = StoreState::Draining;
        assert_eq!((bench.at(101).wanted, bench.at(101).stalled), (1, false));
        assert!(!bench.at(159).stalled);
        assert!(bench.at(161).stalled);
        bench.change(&[1, 2, 3], &[4], &[2, 3, 4]);
        assert!(!bench.at(162).stalled, "a move began");
        bench.change(&[1, 2, 3, 4], &[], &[2, 3, 4]);
        assert_eq!((bench.at(172).copy_ms, bench.at(172).wanted), (Some(10_000), 1));
        bench.change(&[2, 3, 4], &[], &[2, 3, 4]);
        assert_eq!(bench.at(400).wanted, 0);
    }

    #[test]
    fn what_waits_on_purpose_is_not_wanted() {
        let mut bench = Bench::new();
        bench.stores[2].state = StoreState::Away;
        bench.change(&[1, 2], &[], &[1, 2, 3]);
        assert_eq!(bench.at(0).wanted, 0, "its return is waited for");
        bench.stores[2].state = StoreState::Gone;
        assert_eq!(bench.at(1).wanted, 1);
        bench.hold = true;
        assert_eq!(bench.at(2).wanted, 0);
    }
}
