//! Everything that is not urgent: creating the cluster, removing dead members, and carrying out the
//! planner's changes.

use std::collections::{BTreeMap, BTreeSet};

use crate::boot;
use crate::coordinator::decision::{Decision, PlacementWait};
use crate::coordinator::health::Liveness;
use crate::coordinator::leader_state::{LeaderState, ShardWrite};
use crate::coordinator::{AtRevision, CoordinatorTurn, Effect, Writes};
use crate::ids::{Epoch, Now, ShardId, Slots, StoreBoot, StoreId, Version};
use crate::message::ShardEnd;
use crate::planner::{
    self, MassFailureGuard, Placement, PlannedChange, PlannerInput, ShardView, Store, StoreState,
};
use crate::planted::Planted;
use crate::records::{Meta, StoreRecord, StoreStatus};
use crate::shard_map::ranges;
use crate::shard_record::ShardRecord;

/// The state of the leader's periodic work.
#[derive(Debug, Default)]
pub(super) struct Upkeep {
    /// The nodes that the first placement waits for.
    pub(super) waits: Option<PlacementWait>,
    /// The time at which a node was last registered.
    last_join: Now,
    /// The time at which something last died, joined or moved.
    last_disruption: Now,
    /// The time of the last plan.
    last_plan: Now,
    /// Something has changed since the last plan.
    dirty: bool,
    /// The time since which each dead store has been away.
    away_since: BTreeMap<StoreId, Now>,
    guard: MassFailureGuard,
    /// The hold on new copies as it was last logged.
    guarded: bool,
    /// Suspect stores that were asked for their copies, by the number of the gather.
    gathers: BTreeMap<u64, StoreId>,
    /// Suspect stores are not asked again before this time.
    ask_after: Now,
}

impl Upkeep {
    pub(super) fn node_joined(&mut self, now: Now) {
        self.last_join = now;
        self.last_disruption = now;
    }

    pub(super) fn note_disruption(&mut self, now: Now) {
        self.last_disruption = now;
    }

    /// Requests a plan soon.
    pub(super) fn mark_dirty(&mut self) {
        self.dirty = true;
    }
}

impl LeaderState {
    // ---- creating the cluster ------------------------------------------------------------------

    /// Returns whether the cluster agrees with this process's flags; if not, the process exits.
    pub(super) fn agrees(&self, turn: &mut CoordinatorTurn<'_>) -> bool {
        let difference = self.meta().and_then(|meta| turn.settings.flags.difference(meta));
        let Some(difference) = difference else { return true };
        turn.effects.push(Effect::Exit { difference });
        false
    }

    pub(super) fn bootstrap(&mut self, turn: &mut CoordinatorTurn<'_>) {
        let Some(meta) = self.meta().cloned() else {
            if !self.is_proposing(|writes| matches!(writes, Writes::Meta(_))) {
                let meta = turn.settings.meta();
                self.propose(turn, Writes::Meta(meta), vec![]);
            }
            return;
        };
        let missing: Vec<Slots> = ranges(meta.shards)
            .filter(|slots| self.records.shards.get(slots.shard()).is_none())
            .filter(|slots| !self.is_busy(slots.shard()))
            .collect();
        if missing.is_empty() {
            self.upkeep.waits = None;
        } else {
            self.place(turn, &meta, &missing);
        }
    }

    fn place(&mut self, turn: &mut CoordinatorTurn<'_>, meta: &Meta, missing: &[Slots]) {
        let stores = self.stores(turn.now, turn.settings.rebuild_delay_ms);
        let nodes = stores.iter().filter(|store| store.state == StoreState::Ready).count();
        let replicas = usize::from(meta.replicas);
        let expected = turn.settings.expect_nodes.map_or(replicas, |nodes| nodes as usize);
        let all_here = turn.settings.expect_nodes.is_some() && nodes >= expected;
        let quiet = turn.now >= self.upkeep.last_join.plus_ms(turn.settings.join_wait_ms);
        if nodes < replicas || !(all_here || quiet) {
            let waits = PlacementWait { nodes, of: expected.max(replicas) };
            if self.upkeep.waits != Some(waits) {
                self.upkeep.waits = Some(waits);
                turn.log(Decision::PlacementWaits(waits));
            }
            return;
        }
        let existing: Vec<&ShardRecord> =
            self.records.shards.iter().map(|(_, kept)| &kept.value).collect();
        let Some(placed) = planner::place(&stores, &existing, missing.len(), replicas) else {
            return;
        };
        let records = missing.iter().zip(placed);
        let record = |(&slots, placement)| self.first_record(slots, placement);
        let records: Option<Vec<ShardRecord>> = records.map(record).collect();
        let Some(records) = records else { return };
        let write = |record| ShardWrite { record, decision: None };
        let mut writes: Vec<ShardWrite> = records.into_iter().map(write).collect();
        if let Some(first) = writes.first_mut() {
            first.decision = Some(Decision::Placed { shards: missing.len() });
        }
        self.upkeep.waits = None;
        self.propose_shards(turn, writes);
    }

    fn first_record(&self, slots: Slots, placement: Placement) -> Option<ShardRecord> {
        Some(ShardRecord {
            slots,
            epoch: Epoch(1),
            version: Version(1),
            primary: self.health.alive(placement.primary)?,
            isr: placement.replicas.clone(),
            learners: vec![],
            target: placement.replicas,
            tainted: vec![],
        })
    }

    // ---- dead members --------------------------------------------------------------------------

    /// Removes dead members from every in-sync set that has more than `min_in_sync` members. (Those
    /// of shards that need a primary leave with the promotion.)
    pub(super) fn remove_dead(&mut self, turn: &mut CoordinatorTurn<'_>) {
        let mut writes = Vec::new();
        let mut removed: BTreeMap<StoreId, usize> = BTreeMap::new();
        for (shard, kept) in self.records.shards.iter() {
            let record = &kept.value;
            let dead = |store: &StoreId| self.is_dead(turn.now, *store);
            let out: Vec<StoreId> = record.isr.iter().copied().filter(dead).collect();
            if out.is_empty() || !self.is_free(record) || self.is_busy(shard) {
                continue;
            }
            let next = record.changed(&[], &out, &[], self.min_in_sync());
            if next.isr == record.isr {
                continue;
            }
            for store in out.iter().filter(|store| !next.isr.contains(store)) {
                *removed.entry(*store).or_default() += 1;
            }
            writes.push(ShardWrite { record: next, decision: None });
        }
        if let Some(write) = writes.first_mut()
            && let Some((&store, &shards)) = removed.iter().next()
        {
            write.decision = Some(Decision::Removed { store, shards });
        }
        self.propose_shards(turn, writes);
    }

    /// Returns whether the shard's primary leads it, as far as is known, and no promotion is due.
    fn is_free(&self, record: &ShardRecord) -> bool {
        let shard = record.shard();
        self.health.alive(record.primary.store) == Some(record.primary)
            && !self.promotions.is_needed(shard)
            && !self.promotions.is_handing_over(shard)
    }

    // ---- stores --------------------------------------------------------------------------------

    pub(super) fn review_stores(&mut self, turn: &mut CoordinatorTurn<'_>) {
        self.review_names(turn);
        self.review_drains(turn);
        self.review_suspects(turn);
    }

    /// Gives up a store whose name another one has taken, once it is dead, the other one runs, and
    /// no shard depends on its copy.
    fn review_names(&mut self, turn: &mut CoordinatorTurn<'_>) {
        let mut lost = Vec::new();
        for (store, kept) in self.records.stores.iter() {
            // A store that is only recorded holds nothing, and may never have run: claims can come
            // late.
            let runs =
                |it: &StoreId| self.records.is_registered(*it) && !self.is_dead(turn.now, *it);
            let Some(to) = self.records.namesake(store).filter(runs) else { continue };
            let stands = self.records.newest_boot(store).is_some();
            if stands && self.is_dead(turn.now, store) && !self.is_needed(turn, store) {
                lost.push((store, to, kept.modified, kept.value.clone()));
            }
        }
        for (store, to, expect, record) in lost {
            let record = StoreRecord { status: record.status.given_up(), ..record };
            self.write_store(turn, store, expect, record, Decision::Lost { store, to });
        }
    }

    /// Returns whether a shard counts on the store's copy, and is not led by another one that is
    /// known to be good.
    fn is_needed(&self, turn: &CoordinatorTurn<'_>, store: StoreId) -> bool {
        let planted = turn.settings.planted;
        let led_by_another = |record: &ShardRecord| {
            let primary = record.primary;
            let holder = self.records.stores.get(primary.store);
            primary.store != store
                && self.health.alive(primary.store) == Some(primary)
                && holder.is_some_and(|kept| kept.value.status != StoreStatus::Suspect)
                // A primary whose copy proved wrong asks to be replaced.
                && (!self.reports.resigns(turn.now, primary, record.shard())
                    || Planted::ResignedIsGood.is_in(planted))
        };
        let mut shards = self.records.shards.iter().map(|(_, kept)| &kept.value);
        shards.any(|record| {
            boot::is_trusted_member(store, std::iter::once(record), planted)
                && !led_by_another(record)
        })
    }

    /// Makes each store's status follow the operator's intent. A suspect store is emptied anyway,
    /// and drains once it is trusted again.
    fn review_drains(&mut self, turn: &mut CoordinatorTurn<'_>) {
        let changed = |(store, kept): (StoreId, &AtRevision<StoreRecord>)| {
            let wanted = self.records.drains.get(store).is_some();
            let (status, decision) = match (kept.value.status, wanted) {
                (StoreStatus::Active, true) => {
                    (StoreStatus::Draining, Decision::Draining { store })
                }
                (StoreStatus::Draining, false) => {
                    (StoreStatus::Active, Decision::Undrained { store })
                }
                _ => return None,
            };
            Some((store, kept.modified, StoreRecord { status, ..kept.value.clone() }, decision))
        };
        let changed: Vec<_> = self.records.stores.iter().filter_map(changed).collect();
        for (store, expect, record, decision) in changed {
            self.write_store(turn, store, expect, record, decision);
        }
    }

    fn write_store(
        &mut self,
        turn: &mut CoordinatorTurn<'_>,
        store: StoreId,
        expect: u64,
        record: StoreRecord,
        decision: Decision,
    ) {
        let same =
            |writes: &Writes| matches!(writes, Writes::Store { store: it, .. } if *it == store);
        if !self.is_proposing(same) {
            self.propose(turn, Writes::Store { store, expect, record }, vec![decision]);
        }
    }

    /// A suspect store is trusted again once every copy that it holds was filled from a primary
    /// since. Mostly it holds no copy by then, since the planner takes all of them away; where the
    /// in-sync set has only `min_in_sync` members they stay, and are refilled in place. The store
    /// itself is asked: all copies of a store that starts as suspect are unfit until they have been
    /// replaced.
    fn review_suspects(&mut self, turn: &mut CoordinatorTurn<'_>) {
        if turn.now < self.upkeep.ask_after {
            return;
        }
        self.upkeep.ask_after = turn.now.plus_ms(turn.settings.timing.ask_suspect_every_ms);
        self.upkeep.gathers.clear();
        let suspect = |(store, _): (StoreId, _)| self.clearable(store);
        let suspects: Vec<StoreBoot> = self.records.stores.iter().filter_map(suspect).collect();
        for to in suspects {
            let gather = turn.fresh_id();
            self.upkeep.gathers.insert(gather, to.store);
            let shards = self.records.shards.iter().map(|(shard, _)| shard).collect();
            turn.effects.push(Effect::Gather { gather, to, shards });
        }
    }

    fn clearable(&self, store: StoreId) -> Option<StoreBoot> {
        let is_suspect = self.records.stores.get(store)?.value.status == StoreStatus::Suspect;
        self.health.alive(store).filter(|_| is_suspect)
    }

    pub(super) fn on_suspect_gathered(
        &mut self,
        turn: &mut CoordinatorTurn<'_>,
        gather: u64,
        store: StoreId,
        ends: Option<&[ShardEnd]>,
    ) {
        let asked = self.upkeep.gathers.remove(&gather) == Some(store);
        let filled = |end: &ShardEnd| {
            let record = self.records.shards.get(end.shard).map(|kept| &kept.value);
            !end.unfit && record.is_some_and(|record| record.isr.contains(&store))
        };
        let clean = ends.is_some_and(|ends| ends.iter().all(filled));
        if !asked || !clean || self.clearable(store).is_none() {
            return;
        }
        let Some(kept) = self.records.stores.get(store) else { return };
        let record = StoreRecord { status: StoreStatus::Active, ..kept.value.clone() };
        let expect = kept.modified;
        self.write_store(turn, store, expect, record, Decision::Cleared { store });
    }

    // ---- the plan ------------------------------------------------------------------------------

    pub(super) fn plan(&mut self, turn: &mut CoordinatorTurn<'_>) {
        let now = turn.now;
        let timing = turn.settings.timing;
        let every_ms = if self.upkeep.dirty { timing.plan_every_ms } else { timing.plan_idle_ms };
        if now < self.upkeep.last_plan.plus_ms(every_ms) || !self.health.all_probed() {
            return;
        }
        self.upkeep.last_plan = now;
        self.upkeep.dirty = false;
        let Some(replicas) = self.meta().map(|meta| usize::from(meta.replicas)) else { return };
        self.review_away(turn);
        let stores = self.stores(now, turn.settings.rebuild_delay_ms);
        self.review_guard(turn, &stores);
        let records = self.records.shards.iter().map(|(_, kept)| &kept.value);
        let shards: Vec<ShardView<'_>> =
            records.map(|record| self.shard_view(now, record)).collect();
        let quiet = now.ms_since(self.upkeep.last_disruption) >= turn.settings.balance_after_ms;
        let changes = planner::changes(&PlannerInput {
            stores: &stores,
            shards: &shards,
            replicas,
            min_in_sync: self.min_in_sync(),
            limits: turn.settings.planner,
            hold: self.upkeep.guard.holds(),
            quiet: quiet && self.promotions.is_idle(),
        });
        self.follow(turn, changes);
    }

    fn follow(&mut self, turn: &mut CoordinatorTurn<'_>, changes: Vec<PlannedChange>) {
        let mut writes = Vec::new();
        for change in changes {
            let decision = match change {
                PlannedChange::HandOver { shard, to } => {
                    if self.is_planted_to_stay(turn, shard) {
                        continue;
                    }
                    self.hand_over(turn, shard, to);
                    continue;
                }
                PlannedChange::Recruit { shard, store, instead } => {
                    Decision::Recruited { shard, store, instead }
                }
                PlannedChange::Release { shard, store } => Decision::Released { shard, store },
            };
            self.upkeep.note_disruption(turn.now);
            let Some(kept) = self.records.shards.get(change.shard()) else { continue };
            let record = change.apply(&kept.value, self.min_in_sync());
            writes.push(ShardWrite { record, decision: Some(decision) });
        }
        self.propose_shards(turn, writes);
    }

    /// A planted bug: the primary is on a full store.
    fn is_planted_to_stay(&self, turn: &CoordinatorTurn<'_>, shard: ShardId) -> bool {
        let primary = self.records.shards.get(shard).map(|kept| kept.value.primary.store);
        Planted::FullLeadsOn.is_in(turn.settings.planted)
            && primary.is_some_and(|store| self.is_full(turn.now, store))
    }

    fn shard_view<'a>(&self, now: Now, record: &'a ShardRecord) -> ShardView<'a> {
        let primary = record.primary;
        let mut unable = self.reports.silent_to(now, primary).unwrap_or_default().to_vec();
        unable.extend(self.reports.unable(now, primary, record.shard()));
        let free = self.is_free(record) && !self.is_busy(record.shard());
        ShardView { record, free, unable }
    }

    fn stores(&self, now: Now, rebuild_delay_ms: u64) -> Vec<Store> {
        let store = |(id, kept): (StoreId, &AtRevision<StoreRecord>)| Store {
            id,
            zone: kept.value.zone.clone(),
            host: kept.value.host.clone(),
            capacity: self.records.nodes.get(id).map_or(0, |node| node.value.capacity),
            state: self.state(now, id, kept.value.status, rebuild_delay_ms),
        };
        self.records.stores.iter().map(store).collect()
    }

    fn state(
        &self,
        now: Now,
        store: StoreId,
        status: StoreStatus,
        rebuild_delay_ms: u64,
    ) -> StoreState {
        let registered = self.records.is_registered(store);
        if status.is_gone() {
            return StoreState::Gone;
        }
        if self.health.death(now, store, registered).is_some() {
            let since = self.upkeep.away_since.get(&store).copied().unwrap_or(now);
            let late = now.ms_since(since) >= rebuild_delay_ms;
            return if late { StoreState::Gone } else { StoreState::Away };
        }
        match status {
            _ if !registered || self.health.liveness(store) != Liveness::Alive => {
                StoreState::Unregistered
            }
            StoreStatus::Draining => StoreState::Draining,
            StoreStatus::Suspect => StoreState::Suspect,
            _ if self.is_full(now, store) => StoreState::Full,
            _ => StoreState::Ready,
        }
    }

    /// Returns whether the store's disk has been full for some time, and not for a moment only, as
    /// when a log is too long until the next flush.
    fn is_full(&self, now: Now, store: StoreId) -> bool {
        let full_ms = self.health.alive(store).and_then(|it| self.reports.full_ms(now, it));
        full_ms.is_some_and(|ms| ms >= self.timing.full_after_ms)
    }

    fn review_away(&mut self, turn: &CoordinatorTurn<'_>) {
        let stands = |(store, _): (StoreId, _)| self.records.newest_boot(store).map(|_| store);
        let standing = self.records.stores.iter().filter_map(stands);
        let away: BTreeSet<StoreId> =
            standing.filter(|store| self.is_dead(turn.now, *store)).collect();
        self.upkeep.away_since.retain(|store, _| away.contains(store));
        for store in away {
            self.upkeep.away_since.entry(store).or_insert(turn.now);
        }
    }

    /// Updates the mass-failure guard. Stores that hold no shard do not count.
    fn review_guard(&mut self, turn: &mut CoordinatorTurn<'_>, stores: &[Store]) {
        let targets = self.records.shards.iter().flat_map(|(_, kept)| &kept.value.target);
        let placed: BTreeSet<StoreId> = targets.copied().collect();
        let away: BTreeSet<StoreId> =
            self.upkeep.away_since.keys().copied().filter(|store| placed.contains(store)).collect();
        let expected = stores.iter().filter(|store| placed.contains(&store.id)).count();
        let settings = turn.settings;
        let (window, hold) = (settings.lease_ttl_ms, settings.guard_ms);
        self.upkeep.guard.observe(turn.now, &away, expected, window, hold, settings.planner);
        let holds = self.upkeep.guard.holds();
        if std::mem::replace(&mut self.upkeep.guarded, holds) != holds {
            turn.log(match holds {
                true => Decision::Guarded { away: away.len(), of: expected },
                false => Decision::Unguarded,
            });
        }
    }
}
