//! All moves until the map is level: those in progress, those that follow, those that can't be
//! made, each with the reason why it waits.
//!
//! The planner itself names only the next steps. The forecast repeats it on a copy of the map in
//! which every move succeeds at once and nothing is held back, so it lists what the planner *will*
//! do unless something happens, in its order. Then each of these moves is held against the present:
//! the first reason for which it does not begin now is the one that is reported.
//!
//! One move may be two steps of the planner: the copy that a new one replaces is released without a
//! line of its own.

use std::collections::{BTreeMap, BTreeSet};

use crate::coordinator::planner::{
    DrainObstacle, Nearness, PlannedChange, PlannerInput, PlannerLimits, ShardView, Store,
    StoreState, Stores, by_id, changes, drain_obstacle, known,
};
use crate::coordinator::words::words;
use crate::ids::{ShardId, StoreId};
use crate::shard_record::{self, ShardRecord};

/// One move, present or future.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct PlannedMove {
    /// The shard.
    pub shard: ShardId,
    /// The kind of the move.
    pub kind: MoveKind,
    /// The store that gives the copy or the lead; `None` if a copy is missing.
    pub from: Option<StoreId>,
    /// The store that takes it; `None` if no store can, or a copy is only given up.
    pub to: Option<StoreId>,
    /// The state of the move.
    pub state: MoveState,
    /// The reason why the move waits, is slow or can't be made; `None` if nothing hinders it.
    pub reason: Option<MoveReason>,
    /// The number of rounds of moves before this one; those of one round go side by side.
    pub round: usize,
    /// The time since the copy began, in ms; `None` if the move has not begun.
    pub age_ms: Option<u64>,
}

words! {
    /// The kind of a move.
    MoveKind {
        /// A copy is made on another store.
        Copy = "copy",
        /// Another store leads the shard.
        Lead = "lead",
        /// A copy is given up, and no other is made for it.
        Release = "release",
    }
}

words! {
    /// The state of a move.
    MoveState {
        /// The move is in progress.
        Running = "running",
        /// The move begins once its reason is gone.
        Waiting = "waiting",
        /// The move can't be made with the nodes that there are.
        Impossible = "impossible",
    }
}

words! {
    /// The reason why a move waits, or can't be made.
    MoveReason {
        /// The shard has no primary, or a change of it is in flight.
        NoPrimary = "no-primary",
        /// An operator has paused the moves for balance.
        Paused = "paused",
        /// Many nodes vanished at once: no new copies are made for now.
        Guard = "guard",
        /// Shards lack copies, which are made before copies are moved for balance.
        RepairFirst = "repair-first",
        /// Nodes or shards have changed a moment ago: primaries are moved for balance later.
        NotQuiet = "not-quiet",
        /// A store gives or takes as many copies as it may at a time.
        Limit = "limit",
        /// Moves that come before it are not done yet.
        Queued = "queued",
        /// The store that takes the copy does not acknowledge what it is sent.
        TargetBehind = "target-behind",
        /// The store that takes the copy does not answer.
        TargetAway = "target-away",
        /// The store of the missing copy is away, and its return is waited for.
        Away = "away",
        /// No store can take the copy: each has one already, or takes none.
        NoTarget = "no-target",
        /// A store could take the copy, but its disk is full.
        DiskFull = "disk-full",
        /// Two copies share a zone, and no store in another zone can take one of them.
        NoTargetInZone = "no-target-in-zone",
    }
}

/// The inputs of a forecast, which can be computed in another thread: a large one takes seconds.
#[derive(Clone, Debug)]
pub struct PlanView {
    /// All known stores.
    pub stores: Vec<Store>,
    /// All shards; `free` if the shard has a primary and no change of it is in flight.
    pub shards: Vec<OwnedShardView>,
    /// The number of copies that each shard should have.
    pub replicas: usize,
    /// The number of in-sync members that a write needs.
    pub min_in_sync: usize,
    /// The limits on moves.
    pub limits: PlannerLimits,
    /// The mass-failure guard holds back new copies.
    pub hold: bool,
    /// There was no disruption for some time.
    pub quiet: bool,
    /// An operator has paused the moves for balance.
    pub paused: bool,
    /// The copies in progress, with the age of each in ms.
    pub ages: BTreeMap<(ShardId, StoreId), u64>,
}

/// One shard of a [`PlanView`]: a [`ShardView`] with a record of its own.
#[derive(Clone, Debug)]
pub struct OwnedShardView {
    /// The shard's record.
    pub record: ShardRecord,
    /// The shard has a live primary, and no change of it is in progress.
    pub free: bool,
    /// The stores that will not acknowledge what the primary sends.
    pub unable: Vec<StoreId>,
}

/// All moves of a forecast, in the order in which they begin.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct PlanForecast {
    /// The moves.
    pub moves: Vec<PlannedMove>,
    /// The forecast ended before the map was level: more moves follow.
    pub truncated: bool,
}

/// The copy of the map in which all moves succeed.
struct ForecastMap<'a> {
    view: &'a PlanView,
    stores: Stores<'a>,
    shards: Vec<ShardRecord>,
    moves: Vec<PlannedMove>,
}

impl PlanView {
    /// The moves that follow if this store were drained, too. One that does not answer stays as it
    /// is.
    pub fn drained(mut self, store: StoreId) -> Self {
        let answers = |state| {
            matches!(state, StoreState::Ready | StoreState::Full | StoreState::Unregistered)
        };
        let drained = self.stores.iter_mut().filter(|it| it.id == store && answers(it.state));
        drained.for_each(|it| it.state = StoreState::Draining);
        self
    }

    /// Returns why this store can't be drained now, or only at the cost of a zone.
    pub fn drain_obstacle(&self, store: StoreId) -> Option<DrainObstacle> {
        let shards = self.shards.iter().map(|shard| &shard.record);
        drain_obstacle(&self.stores, shards, store, self.replicas)
    }

    /// Lists the moves until the map is level, of `rounds_max` rounds at most.
    pub fn forecast(&self, rounds_max: usize) -> PlanForecast {
        let mut map = ForecastMap {
            view: self,
            stores: by_id(&self.stores),
            shards: self.shards.iter().map(|shard| shard.record.clone()).collect(),
            moves: Vec::new(),
        };
        map.add_running();
        map.end_running();
        let mut truncated = true;
        for round in 0..rounds_max {
            let planned = map.plan();
            if planned.is_empty() {
                truncated = false;
                break;
            }
            for change in planned {
                map.take(change, round);
            }
            map.end_running();
        }
        if !truncated {
            map.add_impossible();
        }
        PlanForecast { moves: map.moves, truncated }
    }
}

impl PlannedMove {
    /// The time until the move is done, if copies take `copy_ms`.
    /// `None` if that is unknown, or depends on more than the moves before it.
    pub fn eta_ms(&self, copy_ms: Option<u64>) -> Option<u64> {
        use MoveReason::{Limit, Queued, RepairFirst};
        match (self.state, self.reason) {
            (MoveState::Running, None) => Some(copy_ms?.saturating_sub(self.age_ms.unwrap_or(0))),
            (MoveState::Waiting, Some(Limit | Queued | RepairFirst)) => {
                Some(copy_ms? * (self.round as u64 + 1))
            }
            _ => None,
        }
    }
}

impl ForecastMap<'_> {
    /// The next changes, if nothing is held back.
    fn plan(&self) -> Vec<PlannedChange> {
        let view = |record| ShardView { record, free: true, unable: vec![] };
        let shards: Vec<ShardView<'_>> = self.shards.iter().map(view).collect();
        changes(&PlannerInput {
            stores: &self.view.stores,
            shards: &shards,
            replicas: self.view.replicas,
            min_in_sync: self.view.min_in_sync,
            limits: self.view.limits,
            hold: false,
            quiet: true,
            paused: false,
        })
    }

    fn state(&self, store: StoreId) -> StoreState {
        self.stores.get(&store).map_or(StoreState::Gone, |store| store.state)
    }

    // ---- present moves -------------------------------------------------------------------------

    /// Adds the moves in progress: each learner is one.
    fn add_running(&mut self) {
        for shard in &self.view.shards {
            let record = &shard.record;
            // Each learner replaces one of the copies that have no place in the target.
            let mut leaving = record.isr.iter().filter(|store| !record.target.contains(store));
            for &to in &record.learners {
                let reason = match self.state(to) {
                    StoreState::Away | StoreState::Gone => Some(MoveReason::TargetAway),
                    _ if !shard.free => Some(MoveReason::NoPrimary),
                    StoreState::Full => Some(MoveReason::DiskFull),
                    _ if shard.unable.contains(&to) => Some(MoveReason::TargetBehind),
                    _ => None,
                };
                self.moves.push(PlannedMove {
                    shard: record.shard(),
                    kind: MoveKind::Copy,
                    from: leaving.next().copied(),
                    to: Some(to),
                    state: MoveState::Running,
                    reason,
                    round: 0,
                    age_ms: self.view.ages.get(&(record.shard(), to)).copied(),
                });
            }
        }
    }

    /// Lets every learner join that answers.
    fn end_running(&mut self) {
        let joins: BTreeSet<StoreId> = self
            .view
            .stores
            .iter()
            .filter(|store| !matches!(store.state, StoreState::Away | StoreState::Gone))
            .map(|store| store.id)
            .collect();
        for record in &mut self.shards {
            for store in record.learners.clone() {
                if joins.contains(&store) {
                    shard_record::remove(&mut record.learners, store);
                    shard_record::insert(&mut record.isr, store);
                    shard_record::remove(&mut record.tainted, store);
                }
            }
        }
    }

    // ---- future moves --------------------------------------------------------------------------

    /// Applies a change, and adds its move.
    fn take(&mut self, change: PlannedChange, round: usize) {
        let Some(at) = self.shards.iter().position(|it| it.shard() == change.shard()) else {
            return;
        };
        let record = &self.shards[at];
        let (kind, from, to) = match change {
            // A copy that is there needs no move to get a place.
            PlannedChange::Recruit { store, .. } if record.isr.contains(&store) => {
                (None, None, None)
            }
            PlannedChange::Recruit { store, instead, .. } => {
                (Some(MoveKind::Copy), instead, Some(store))
            }
            PlannedChange::HandOver { to, .. } => {
                (Some(MoveKind::Lead), Some(record.primary.store), Some(to))
            }
            PlannedChange::Release { store, .. } => {
                let replaced = self.moves.iter().any(|it| {
                    it.shard == change.shard()
                        && it.from == Some(store)
                        && it.kind == MoveKind::Copy
                });
                ((!replaced).then_some(MoveKind::Release), Some(store), None)
            }
        };
        if let Some(kind) = kind {
            let reason = Some(self.reason(kind, at, from, to));
            let (shard, state) = (change.shard(), MoveState::Waiting);
            let age_ms = None;
            self.moves.push(PlannedMove { shard, kind, from, to, state, reason, round, age_ms });
        }
        let next = change.apply(&self.shards[at], self.view.min_in_sync);
        self.shards[at] = next;
        if let PlannedChange::HandOver { to, .. } = change {
            self.shards[at].primary.store = to;
        }
    }

    /// The first reason why a future move does not begin now.
    fn reason(
        &self,
        kind: MoveKind,
        at: usize,
        from: Option<StoreId>,
        to: Option<StoreId>,
    ) -> MoveReason {
        let view = self.view;
        let shard = &view.shards[at];
        let gives = from.map(|store| self.state(store));
        let stays = matches!(gives, Some(StoreState::Ready | StoreState::Full));
        let balances = stays
            && match kind {
                MoveKind::Lead => from.is_some_and(|store| shard.record.target.contains(&store)),
                MoveKind::Copy => true,
                MoveKind::Release => false,
            };
        let ready = view.stores.iter().filter(|store| store.state == StoreState::Ready).count();
        let wanted = view.replicas.min(ready);
        let short = || view.shards.iter().any(|shard| shard.record.isr.len() < wanted);
        match kind {
            _ if !shard.free => MoveReason::NoPrimary,
            _ if balances && view.paused => MoveReason::Paused,
            // A copy that comes back to its own place is not new.
            MoveKind::Copy if view.hold && from.is_some() => MoveReason::Guard,
            MoveKind::Copy if balances && short() => MoveReason::RepairFirst,
            MoveKind::Lead if balances && !view.quiet => MoveReason::NotQuiet,
            MoveKind::Copy if self.is_at_limit(from, to) => MoveReason::Limit,
            _ => MoveReason::Queued,
        }
    }

    /// Returns whether one of the stores gives or takes as many copies now as it may.
    fn is_at_limit(&self, from: Option<StoreId>, to: Option<StoreId>) -> bool {
        let records = || self.view.shards.iter().map(|shard| &shard.record);
        let coming = |store| records().filter(|it| it.learners.contains(&store)).count();
        let leaves =
            |it: &ShardRecord, store| it.isr.contains(&store) && !it.target.contains(&store);
        let going = |store| records().filter(|it| leaves(it, store)).count();
        to.is_some_and(|store| coming(store) >= self.view.limits.moves_max)
            || from.is_some_and(|store| going(store) >= self.view.limits.moves_max)
    }

    // ---- what remains --------------------------------------------------------------------------

    /// Adds what the planner can't do: copies without a place, and copies that are waited for.
    fn add_impossible(&mut self) {
        let zones = |states: &dyn Fn(StoreState) -> bool| {
            let stores = self.view.stores.iter().filter(|store| states(store.state));
            stores.map(|store| store.zone.as_str()).collect::<BTreeSet<_>>().len()
        };
        // A zone that has been lost, or is drained, keeps the copies of a shard apart no more.
        let known_zones = zones(&|state| state != StoreState::Gone);
        let mut left = Vec::new();
        for record in &self.shards {
            let missing = |from, state, reason| PlannedMove {
                shard: record.shard(),
                kind: MoveKind::Copy,
                from,
                to: None,
                state,
                reason: Some(reason),
                round: 0,
                age_ms: None,
            };
            let count = left.len();
            for &store in &record.target {
                match self.state(store) {
                    StoreState::Away => {
                        left.push(missing(Some(store), MoveState::Waiting, MoveReason::Away));
                    }
                    StoreState::Draining | StoreState::Suspect | StoreState::Gone => {
                        let why = self.lack(record);
                        left.push(missing(Some(store), MoveState::Impossible, why));
                    }
                    _ => {}
                }
            }
            for _ in record.target.len()..self.view.replicas {
                left.push(missing(None, MoveState::Impossible, self.lack(record)));
            }
            let near = Nearness::of(&known(&self.stores, &record.target, None));
            if left.len() == count && near.shares_zone() && known_zones >= self.view.replicas {
                let shared = known(&self.stores, &record.target, None).into_iter().find(|one| {
                    record.target.iter().any(|other| {
                        *other != one.id
                            && self.stores.get(other).is_some_and(|it| it.zone == one.zone)
                    })
                });
                let from = shared.map(|store| store.id);
                left.push(missing(from, MoveState::Impossible, MoveReason::NoTargetInZone));
            }
        }
        self.moves.extend(left);
    }

    /// The reason why no store can take a copy of the shard.
    fn lack(&self, record: &ShardRecord) -> MoveReason {
        let full = |store: &Store| {
            store.state == StoreState::Full
                && !record.isr.contains(&store.id)
                && !record.target.contains(&store.id)
        };
        match self.view.stores.iter().any(full) {
            true => MoveReason::DiskFull,
            false => MoveReason::NoTarget,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{Slots, StoreBoot};

    fn ids(stores: &[u128]) -> Vec<StoreId> {
        stores.iter().copied().map(StoreId).collect()
    }

    /// A map of shards on these stores, each led by the first.
    fn view(zones: &[&str], sets: &[&[u128]]) -> PlanView {
        let store = |(zone, id): (&&str, u128)| Store {
            id: StoreId(id),
            zone: (*zone).into(),
            host: format!("host-{id}"),
            capacity: 1,
            state: StoreState::Ready,
        };
        let shard = |(set, lo): (&&[u128], u16)| OwnedShardView {
            record: ShardRecord {
                slots: Slots { lo, hi: lo },
                primary: StoreBoot { store: StoreId(set[0]), ..StoreBoot::default() },
                isr: ids(set).into_iter().collect::<BTreeSet<_>>().into_iter().collect(),
                target: ids(set).into_iter().collect::<BTreeSet<_>>().into_iter().collect(),
                ..ShardRecord::default()
            },
            free: true,
            unable: vec![],
        };
        PlanView {
            stores: zones.iter().zip(1..).map(store).collect(),
            shards: sets.iter().zip(0..).map(shard).collect(),
            replicas: 3,
            min_in_sync: 2,
            limits: PlannerLimits::default(),
            hold: false,
            quiet: true,
            paused: false,
            ages: BTreeMap::new(),
        }
    }

    /// Prints moves as `kind shard from>to state reason`, with `-` for no store.
    fn lines(view: &PlanView) -> Vec<String> {
        let forecast = view.forecast(100);
        assert!(!forecast.truncated);
        let name = |store: Option<StoreId>| store.map_or("-".into(), |it| it.0.to_string());
        let line = |it: &PlannedMove| {
            let (kind, state) = (it.kind.word(), it.state.word());
            let reason = it.reason.map_or("-", MoveReason::word);
            format!("{kind} {} {}>{} {state} {reason}", it.shard, name(it.from), name(it.to))
        };
        forecast.moves.iter().map(line).collect()
    }

    #[test]
    fn a_level_map_needs_no_move() {
        assert_eq!(lines(&view(&[""; 3], &[&[1, 2, 3], &[2, 1, 3], &[3, 1, 2]])), [""; 0]);
    }

    #[test]
    fn a_drain_is_listed_to_its_end() {
        let drained = view(&[""; 4], &[&[1, 2, 3], &[2, 3, 4]]).drained(StoreId(1));
        let want = ["lead 0 1>3 waiting queued", "copy 0 1>4 waiting queued"];
        assert_eq!(lines(&drained), want);
    }

    #[test]
    fn a_drain_without_a_place_is_impossible() {
        let drained = view(&[""; 3], &[&[1, 2, 3], &[2, 1, 3]]).drained(StoreId(1));
        let want = [
            "lead 0 1>3 waiting queued",
            "copy 0 1>- impossible no-target",
            "copy 1 1>- impossible no-target",
        ];
        assert_eq!(lines(&drained), want);
        let mut full = view(&[""; 4], &[&[1, 2, 3]]).drained(StoreId(1));
        full.stores[3].state = StoreState::Full;
        assert_eq!(lines(&full)[1], "copy 0 1>- impossible disk-full");
    }

    #[test]
    fn a_drain_that_costs_a_zone_says_so() {
        let drained = view(&["a", "b", "c", "a"], &[&[2, 1, 3]]).drained(StoreId(3));
        let want = ["copy 0 3>4 waiting queued", "copy 0 1>- impossible no-target-in-zone"];
        assert_eq!(lines(&drained), want);
    }

    #[test]
    fn a_copy_in_progress_is_running_and_has_its_reason() {
        let mut running = view(&[""; 4], &[&[1, 2, 3]]);
        running.shards[0].record.target = ids(&[2, 3, 4]);
        running.shards[0].record.learners = ids(&[4]);
        assert_eq!(lines(&running)[0], "copy 0 1>4 running -");
        running.shards[0].unable = ids(&[4]);
        assert_eq!(lines(&running)[0], "copy 0 1>4 running target-behind");
        running.shards[0].free = false;
        assert_eq!(lines(&running)[0], "copy 0 1>4 running no-primary");
        running.stores[3].state = StoreState::Away;
        assert_eq!(lines(&running)[0], "copy 0 1>4 running target-away");
    }

    #[test]
    fn a_lost_copy_is_waited_for_and_then_replaced() {
        let mut away = view(&[""; 4], &[&[1, 2, 3]]);
        away.stores[2].state = StoreState::Away;
        away.shards[0].record.isr = ids(&[1, 2]);
        assert_eq!(lines(&away), ["copy 0 3>- waiting away"]);
        away.stores[2].state = StoreState::Gone;
        assert_eq!(lines(&away), ["copy 0 3>4 waiting queued"]);
        away.hold = true;
        assert_eq!(lines(&away), ["copy 0 3>4 waiting guard"]);
        away.stores.pop();
        assert_eq!(lines(&away), ["copy 0 3>- impossible no-target"]);
    }

    #[test]
    fn moves_for_balance_wait_for_what_comes_first() {
        // Store 4 is new: it takes one copy of these, and a lead.
        let sets: &[&[u128]] = &[&[1, 2, 3], &[2, 1, 3], &[3, 1, 2]];
        let reasons = |view: &PlanView| -> BTreeSet<MoveReason> {
            let moves = view.forecast(100).moves;
            moves.iter().filter(|it| it.kind == MoveKind::Copy).filter_map(|it| it.reason).collect()
        };
        let mut level = view(&[""; 4], sets);
        assert_eq!(reasons(&level), [MoveReason::Queued].into());
        level.paused = true;
        assert_eq!(reasons(&level), [MoveReason::Paused].into());
        level.paused = false;
        level.shards[0].record.isr = ids(&[1, 2]);
        assert!(reasons(&level).contains(&MoveReason::RepairFirst));
        // Two copies are on their way to store 4 already.
        let mut busy = view(&[""; 4], &[sets[0], sets[1], sets[2], sets[0], sets[1], sets[2]]);
        for shard in &mut busy.shards[..2] {
            shard.record.target = ids(&[1, 2, 4]);
            shard.record.learners = ids(&[4]);
        }
        assert!(reasons(&busy).contains(&MoveReason::Limit));
    }

    #[test]
    fn a_move_has_an_eta_if_it_waits_for_others_only() {
        let check = |state, reason, round, want| {
            let (shard, kind, from, to) = (ShardId(0), MoveKind::Copy, None, Some(StoreId(1)));
            let age_ms = Some(300);
            let one = PlannedMove { shard, kind, from, to, state, reason, round, age_ms };
            assert_eq!(one.eta_ms(Some(1_000)), want);
            assert_eq!(one.eta_ms(None), None);
        };
        check(MoveState::Running, None, 0, Some(700));
        check(MoveState::Running, Some(MoveReason::TargetAway), 0, None);
        check(MoveState::Waiting, Some(MoveReason::Queued), 2, Some(3_000));
        check(MoveState::Waiting, Some(MoveReason::Paused), 2, None);
        check(MoveState::Impossible, Some(MoveReason::NoTarget), 0, None);
    }

    #[test]
    fn a_forecast_is_cut_and_says_so() {
        let drained = view(&[""; 4], &[&[1, 2, 3], &[2, 3, 4]]).drained(StoreId(1));
        assert!(drained.forecast(1).truncated);
    }
}
