//! The moves of replicas and primaries: what [`crate::coordinator::planner`] finds is proposed.

use std::collections::BTreeSet;

use crate::coordinator::decision::Decision;
use crate::coordinator::observed::ObservedCluster;
use crate::coordinator::planner::{
    self, MassFailureGuard, OwnedShardView, PlanView, PlannedChange, PlannerInput, ShardView, Store,
};
use crate::coordinator::progress::MoveProgress;
use crate::coordinator::promotion::Promotions;
use crate::coordinator::proposals::ShardWrite;
use crate::coordinator::review::ReviewTurn;
use crate::coordinator::{CoordinatorTurn, MovesStatus, Settings};
use crate::ids::{Now, ShardId, StoreId};
use crate::planted::Planted;
use crate::shard_record::ShardRecord;

/// The time of the next plan, and the holds on it.
#[derive(Debug, Default)]
pub(super) struct Planning {
    /// The time at which something last died, joined or moved.
    last_disruption: Now,
    /// The time of the last plan.
    last_plan: Now,
    /// Something has changed since the last plan.
    dirty: bool,
    guard: MassFailureGuard,
    progress: MoveProgress,
    /// An operator has paused moves for balance alone, as last logged.
    paused: bool,
}

impl Planning {
    pub(super) fn note_disruption(&mut self, now: Now) {
        self.last_disruption = now;
    }

    /// Requests a plan soon.
    pub(super) fn mark_dirty(&mut self) {
        self.dirty = true;
    }

    /// Returns whether a plan is due, and notes that it begins.
    pub(super) fn begin(&mut self, turn: &CoordinatorTurn<'_>, cluster: &ObservedCluster) -> bool {
        let timing = turn.settings.timing;
        let every_ms = if self.dirty { timing.plan_every_ms } else { timing.plan_idle_ms };
        if turn.now < self.last_plan.plus_ms(every_ms) || !cluster.health.all_probed() {
            return false;
        }
        self.last_plan = turn.now;
        self.dirty = false;
        cluster.meta().is_some()
    }

    /// Makes a plan, and proposes its changes.
    pub(super) fn plan(&mut self, review: &mut ReviewTurn<'_>, promotions: &mut Promotions) {
        let (cluster, settings) = (review.cluster, review.turn.settings);
        let Some(replicas) = cluster.meta().map(|meta| usize::from(meta.replicas)) else { return };
        let stores = cluster.stores(&review.turn);
        self.review_guard(review, &stores);
        self.review_pause(review);
        let view = |record| shard_view(review, promotions, record);
        let shards: Vec<ShardView<'_>> = cluster.shards().map(view).collect();
        let input = PlannerInput {
            stores: &stores,
            shards: &shards,
            replicas,
            min_in_sync: cluster.min_in_sync(),
            limits: settings.planner,
            hold: self.guard.holds(),
            quiet: self.is_quiet(review, promotions),
            paused: self.paused && !Planted::PauseIgnored.is_in(settings.planted),
        };
        let changes = planner::changes(&input);
        self.progress.observe(review.now(), &input, &changes);
        self.follow(review, promotions, changes);
    }

    fn is_quiet(&self, review: &ReviewTurn<'_>, promotions: &Promotions) -> bool {
        let quiet_ms = review.now().ms_since(self.last_disruption);
        quiet_ms >= review.turn.settings.balance_after_ms && promotions.is_idle()
    }

    /// The inputs of the planner as they are now, for a forecast.
    pub(super) fn view(
        &self,
        review: &ReviewTurn<'_>,
        promotions: &Promotions,
    ) -> Option<PlanView> {
        let cluster = review.cluster;
        let shard = |record| {
            let ShardView { record, free, unable } = shard_view(review, promotions, record);
            OwnedShardView { record: record.clone(), free, unable }
        };
        Some(PlanView {
            stores: cluster.stores(&review.turn),
            shards: cluster.shards().map(shard).collect(),
            replicas: usize::from(cluster.meta()?.replicas),
            min_in_sync: cluster.min_in_sync(),
            limits: review.turn.settings.planner,
            hold: self.guard.holds(),
            quiet: self.is_quiet(review, promotions),
            paused: self.paused,
            ages: self.progress.ages(review.now()),
        })
    }

    pub(super) fn moves(&self, now: Now, settings: &Settings) -> MovesStatus {
        self.progress.status(now, settings.stalled_after_ms)
    }

    fn review_pause(&mut self, review: &mut ReviewTurn<'_>) {
        let paused = review.cluster.records.pause.get(()).is_some();
        if paused != self.paused {
            self.paused = paused;
            review.turn.log(Decision::Paused(paused));
        }
    }

    fn follow(
        &mut self,
        review: &mut ReviewTurn<'_>,
        promotions: &mut Promotions,
        changes: Vec<PlannedChange>,
    ) {
        let cluster = review.cluster;
        let mut writes = Vec::new();
        for change in changes {
            let decision = match change {
                PlannedChange::HandOver { shard, to } => {
                    if !is_planted_to_stay(review, shard) {
                        promotions.hand_over(review, shard, to);
                    }
                    continue;
                }
                PlannedChange::Recruit { shard, store, instead } => {
                    Decision::Recruited { shard, store, instead }
                }
                PlannedChange::Release { shard, store } => Decision::Released { shard, store },
            };
            self.note_disruption(review.now());
            let Some(record) = cluster.shard(change.shard()) else { continue };
            let record = change.apply(record, cluster.min_in_sync());
            writes.push(ShardWrite { record, decision: Some(decision) });
        }
        review.propose_shards(writes);
    }

    /// Updates the mass-failure guard. Stores that hold no shard do not count.
    fn review_guard(&mut self, review: &mut ReviewTurn<'_>, stores: &[Store]) {
        let targets = review.cluster.shards().flat_map(|record| &record.target);
        let placed: BTreeSet<StoreId> = targets.copied().collect();
        let away: BTreeSet<StoreId> =
            review.cluster.away().filter(|store| placed.contains(store)).collect();
        let expected = stores.iter().filter(|store| placed.contains(&store.id)).count();
        let settings = review.turn.settings;
        let (window, hold) = (settings.lease_ttl_ms, settings.guard_ms);
        let held = self.guard.holds();
        self.guard.observe(review.now(), &away, expected, window, hold, settings.planner);
        if self.guard.holds() != held {
            review.turn.log(match held {
                false => Decision::Guarded { away: away.len(), of: expected },
                true => Decision::Unguarded,
            });
        }
    }
}

/// A planted bug: the primary is on a full store.
fn is_planted_to_stay(review: &ReviewTurn<'_>, shard: ShardId) -> bool {
    let primary = review.cluster.shard(shard).map(|record| record.primary.store);
    Planted::FullLeadsOn.is_in(review.turn.settings.planted)
        && primary.is_some_and(|store| review.cluster.is_full(&review.turn, store))
}

fn shard_view<'a>(
    review: &ReviewTurn<'_>,
    promotions: &Promotions,
    record: &'a ShardRecord,
) -> ShardView<'a> {
    let (now, primary, reports) = (review.now(), record.primary, &review.cluster.reports);
    let mut unable = reports.silent_to(now, primary).unwrap_or_default().to_vec();
    unable.extend(reports.unable(now, primary, record.shard()));
    ShardView { record, free: promotions.is_free(review, record), unable }
}
