//! Everything that is not urgent: making the cluster, removing the dead, and following the planner.

use std::collections::{BTreeMap, BTreeSet};

use crate::boot;
use crate::config::ShardConfig;
use crate::coordinator::health::Verdict;
use crate::coordinator::office::{Office, Write};
use crate::coordinator::story::{Story, Waits};
use crate::coordinator::{Effect, Kept, Turn, Writes};
use crate::ids::{Epoch, Now, ShardId, Slots, StoreBoot, StoreId, Version};
use crate::message::ShardEnd;
use crate::planner::{self, Change, Cluster, Guard, Placement, Shard, Store, StoreState};
use crate::planted::Planted;
use crate::records::{Meta, StoreRecord, StoreStatus};
use crate::shard_map::ranges;

#[derive(Debug, Default)]
pub(super) struct Upkeep {
    /// What the first placing waits for.
    pub(super) waits: Option<Waits>,
    /// A node was registered last.
    newcomer: Now,
    /// Something died, came or moved last.
    trouble: Now,
    planned: Now,
    /// Something has changed since.
    news: bool,
    away_since: BTreeMap<StoreId, Now>,
    guard: Guard,
    guarded: bool,
    /// Suspect stores that were asked what they hold.
    asked: BTreeMap<u64, StoreId>,
    ask_after: Now,
}

impl Upkeep {
    pub(super) fn newcomer(&mut self, now: Now) {
        self.newcomer = now;
        self.trouble = now;
    }

    pub(super) fn trouble(&mut self, now: Now) {
        self.trouble = now;
    }

    /// There may be something to plan.
    pub(super) fn news(&mut self) {
        self.news = true;
    }
}

impl Office {
    // ---- making the cluster --------------------------------------------------------------------

    /// Whether the cluster is what this process was told it is.
    pub(super) fn agrees(&self, turn: &mut Turn<'_>) -> bool {
        let difference = self.meta().and_then(|meta| turn.settings.flags.difference(meta));
        let Some(difference) = difference else { return true };
        turn.effects.push(Effect::Exit { difference });
        false
    }

    pub(super) fn bootstrap(&mut self, turn: &mut Turn<'_>) {
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

    fn place(&mut self, turn: &mut Turn<'_>, meta: &Meta, missing: &[Slots]) {
        let stores = self.stores(turn.now, turn.settings.rebuild_delay_ms);
        let nodes = stores.iter().filter(|store| store.state == StoreState::Ready).count();
        let replicas = usize::from(meta.replicas);
        let expected = turn.settings.expect_nodes.map_or(replicas, |nodes| nodes as usize);
        let all_here = turn.settings.expect_nodes.is_some() && nodes >= expected;
        let quiet = turn.now >= self.upkeep.newcomer.plus_ms(turn.settings.newcomer_wait_ms);
        if nodes < replicas || !(all_here || quiet) {
            let waits = Waits { nodes, of: expected.max(replicas) };
            if self.upkeep.waits != Some(waits) {
                self.upkeep.waits = Some(waits);
                turn.tell(Story::Waits(waits));
            }
            return;
        }
        let existing: Vec<&ShardConfig> =
            self.records.shards.iter().map(|(_, kept)| &kept.value).collect();
        let Some(placed) = planner::place(&stores, &existing, missing.len(), replicas) else {
            return;
        };
        let configs = missing.iter().zip(placed);
        let config = |(&slots, placement)| self.first_config(slots, placement);
        let configs: Option<Vec<ShardConfig>> = configs.map(config).collect();
        let Some(configs) = configs else { return };
        let write = |config| Write { config, story: None };
        let mut writes: Vec<Write> = configs.into_iter().map(write).collect();
        if let Some(first) = writes.first_mut() {
            first.story = Some(Story::Placed { shards: missing.len() });
        }
        self.upkeep.waits = None;
        self.propose_shards(turn, writes);
    }

    fn first_config(&self, slots: Slots, placement: Placement) -> Option<ShardConfig> {
        Some(ShardConfig {
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

    // ---- the dead ------------------------------------------------------------------------------

    /// Dead members leave every in-sync set that is above the floor. (Those of shards that need a
    /// primary leave with the promotion.)
    pub(super) fn remove_dead(&mut self, turn: &mut Turn<'_>) {
        let mut writes = Vec::new();
        let mut removed: BTreeMap<StoreId, usize> = BTreeMap::new();
        for (shard, kept) in self.records.shards.iter() {
            let config = &kept.value;
            let dead = |store: &StoreId| self.is_dead(turn.now, *store);
            let out: Vec<StoreId> = config.isr.iter().copied().filter(dead).collect();
            if out.is_empty() || !self.is_free(config) || self.is_busy(shard) {
                continue;
            }
            let next = config.changed(&[], &out, &[], self.min_in_sync());
            if next.isr == config.isr {
                continue;
            }
            for store in out.iter().filter(|store| !next.isr.contains(store)) {
                *removed.entry(*store).or_default() += 1;
            }
            writes.push(Write { config: next, story: None });
        }
        if let Some(write) = writes.first_mut()
            && let Some((&store, &shards)) = removed.iter().next()
        {
            write.story = Some(Story::Removed { store, shards });
        }
        self.propose_shards(turn, writes);
    }

    /// The shard's primary leads it, as far as can be seen.
    fn is_free(&self, config: &ShardConfig) -> bool {
        let shard = config.shard();
        self.health.alive(config.primary.store) == Some(config.primary)
            && !self.promotions.is_needed(shard)
            && !self.promotions.is_handing_over(shard)
    }

    // ---- stores --------------------------------------------------------------------------------

    pub(super) fn review_stores(&mut self, turn: &mut Turn<'_>) {
        self.review_names(turn);
        self.review_drains(turn);
        self.review_suspects(turn);
    }

    /// A store whose name another one has taken is given up: once it is dead, the other runs, and no shard has nothing better
    /// than its copy.
    fn review_names(&mut self, turn: &mut Turn<'_>) {
        let mut lost = Vec::new();
        for (store, kept) in self.records.stores.iter() {
            // One that is only recorded holds nothing, and may never have run: claims can come late.
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
            self.write_store(turn, store, expect, record, Story::Lost { store, to });
        }
    }

    /// A shard counts on its copy, and no other one that is known to be good leads it.
    fn is_needed(&self, turn: &Turn<'_>, store: StoreId) -> bool {
        let planted = turn.settings.planted;
        let led_by_another = |config: &ShardConfig| {
            let primary = config.primary;
            let record = self.records.stores.get(primary.store);
            primary.store != store
                && self.health.alive(primary.store) == Some(primary)
                && record.is_some_and(|kept| kept.value.status != StoreStatus::Suspect)
                // One whose copy proved wrong asks to be replaced.
                && (!self.reports.resigns(turn.now, primary, config.shard())
                    || Planted::ResignedIsGood.is_in(planted))
        };
        let mut shards = self.records.shards.iter().map(|(_, kept)| &kept.value);
        shards.any(|config| {
            boot::is_counted_on(store, std::iter::once(config), planted) && !led_by_another(config)
        })
    }

    /// The status follows the operator's intent. One that is suspect is emptied for that reason, and drains once its
    /// disk is as good as new.
    fn review_drains(&mut self, turn: &mut Turn<'_>) {
        let changed = |(store, kept): (StoreId, &Kept<StoreRecord>)| {
            let wanted = self.records.drains.get(store).is_some();
            let (status, story) = match (kept.value.status, wanted) {
                (StoreStatus::Active, true) => (StoreStatus::Draining, Story::Draining { store }),
                (StoreStatus::Draining, false) => (StoreStatus::Active, Story::Undrained { store }),
                _ => return None,
            };
            Some((store, kept.modified, StoreRecord { status, ..kept.value.clone() }, story))
        };
        let changed: Vec<_> = self.records.stores.iter().filter_map(changed).collect();
        for (store, expect, record, story) in changed {
            self.write_store(turn, store, expect, record, story);
        }
    }

    fn write_store(
        &mut self,
        turn: &mut Turn<'_>,
        store: StoreId,
        expect: u64,
        record: StoreRecord,
        story: Story,
    ) {
        let same =
            |writes: &Writes| matches!(writes, Writes::Store { store: it, .. } if *it == store);
        if !self.is_proposing(same) {
            self.propose(turn, Writes::Store { store, expect, record }, vec![story]);
        }
    }

    /// A suspect store is as good as new once every copy that it holds is one that was filled anew. Mostly it holds
    /// none by then, since the planner takes them all away; at the floor they stay, and are filled in their place.
    /// It is asked itself: all copies of a store that starts as suspect are unfit until they are others.
    fn review_suspects(&mut self, turn: &mut Turn<'_>) {
        if turn.now < self.upkeep.ask_after {
            return;
        }
        self.upkeep.ask_after = turn.now.plus_ms(turn.settings.timing.ask_suspect_every_ms);
        self.upkeep.asked.clear();
        let suspect = |(store, _): (StoreId, _)| self.clearable(store);
        let suspects: Vec<StoreBoot> = self.records.stores.iter().filter_map(suspect).collect();
        for to in suspects {
            let gather = turn.fresh_id();
            self.upkeep.asked.insert(gather, to.store);
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
        turn: &mut Turn<'_>,
        gather: u64,
        store: StoreId,
        ends: Option<&[ShardEnd]>,
    ) {
        let asked = self.upkeep.asked.remove(&gather) == Some(store);
        let filled = |end: &ShardEnd| {
            let config = self.records.shards.get(end.shard).map(|kept| &kept.value);
            !end.unfit && config.is_some_and(|config| config.isr.contains(&store))
        };
        let clean = ends.is_some_and(|ends| ends.iter().all(filled));
        if !asked || !clean || self.clearable(store).is_none() {
            return;
        }
        let Some(kept) = self.records.stores.get(store) else { return };
        let record = StoreRecord { status: StoreStatus::Active, ..kept.value.clone() };
        let expect = kept.modified;
        self.write_store(turn, store, expect, record, Story::Cleared { store });
    }

    // ---- the plan ------------------------------------------------------------------------------

    pub(super) fn plan(&mut self, turn: &mut Turn<'_>) {
        let now = turn.now;
        let timing = turn.settings.timing;
        let every_ms = if self.upkeep.news { timing.plan_every_ms } else { timing.plan_idle_ms };
        if now < self.upkeep.planned.plus_ms(every_ms) || !self.health.is_settled() {
            return;
        }
        self.upkeep.planned = now;
        self.upkeep.news = false;
        let Some(replicas) = self.meta().map(|meta| usize::from(meta.replicas)) else { return };
        self.review_away(turn);
        let stores = self.stores(now, turn.settings.rebuild_delay_ms);
        self.review_guard(turn, &stores);
        let configs = self.records.shards.iter().map(|(_, kept)| &kept.value);
        let shards: Vec<Shard<'_>> = configs.map(|config| self.shard_view(now, config)).collect();
        let quiet = now.ms_since(self.upkeep.trouble) >= turn.settings.balance_after_ms;
        let changes = planner::changes(&Cluster {
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

    fn follow(&mut self, turn: &mut Turn<'_>, changes: Vec<Change>) {
        let mut writes = Vec::new();
        for change in changes {
            let story = match change {
                Change::HandOver { shard, to } => {
                    if self.is_planted_to_stay(turn, shard) {
                        continue;
                    }
                    self.hand_over(turn, shard, to);
                    continue;
                }
                Change::Recruit { shard, store, instead } => {
                    Story::Recruited { shard, store, instead }
                }
                Change::Release { shard, store } => Story::Released { shard, store },
            };
            self.upkeep.trouble(turn.now);
            let Some(kept) = self.records.shards.get(change.shard()) else { continue };
            let config = change.apply(&kept.value, self.min_in_sync());
            writes.push(Write { config, story: Some(story) });
        }
        self.propose_shards(turn, writes);
    }

    /// A planted bug: the primary is on a full store.
    fn is_planted_to_stay(&self, turn: &Turn<'_>, shard: ShardId) -> bool {
        let primary = self.records.shards.get(shard).map(|kept| kept.value.primary.store);
        Planted::FullLeadsOn.is_in(turn.settings.planted)
            && primary.is_some_and(|store| self.is_full(turn.now, store))
    }

    fn shard_view<'a>(&self, now: Now, config: &'a ShardConfig) -> Shard<'a> {
        let primary = config.primary;
        let mut unable = self.reports.silent_to(now, primary).unwrap_or_default().to_vec();
        unable.extend(self.reports.unable(now, primary, config.shard()));
        let free = self.is_free(config) && !self.is_busy(config.shard());
        Shard { config, free, unable }
    }

    fn stores(&self, now: Now, rebuild_delay_ms: u64) -> Vec<Store> {
        let store = |(id, kept): (StoreId, &Kept<StoreRecord>)| Store {
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
            _ if !registered || self.health.verdict(store) != Verdict::Alive => {
                StoreState::Unregistered
            }
            StoreStatus::Draining => StoreState::Draining,
            StoreStatus::Suspect => StoreState::Suspect,
            _ if self.is_full(now, store) => StoreState::Full,
            _ => StoreState::Ready,
        }
    }

    /// Not for a moment only, as when a log is too long until the next flush.
    fn is_full(&self, now: Now, store: StoreId) -> bool {
        let full_ms = self.health.alive(store).and_then(|it| self.reports.full_ms(now, it));
        full_ms.is_some_and(|ms| ms >= self.timing.full_after_ms)
    }

    fn review_away(&mut self, turn: &Turn<'_>) {
        let stands = |(store, _): (StoreId, _)| self.records.newest_boot(store).map(|_| store);
        let standing = self.records.stores.iter().filter_map(stands);
        let away: BTreeSet<StoreId> =
            standing.filter(|store| self.is_dead(turn.now, *store)).collect();
        self.upkeep.away_since.retain(|store, _| away.contains(store));
        for store in away {
            self.upkeep.away_since.entry(store).or_insert(turn.now);
        }
    }

    /// Stores without a place are nobody's loss.
    fn review_guard(&mut self, turn: &mut Turn<'_>, stores: &[Store]) {
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
            turn.tell(match holds {
                true => Story::Guarded { away: away.len(), of: expected },
                false => Story::Unguarded,
            });
        }
    }
}
