//! New primaries: which shards need one, where the logs end, and which member is named.
//!
//! ```text
//!   need detected ──▶ Gather, all live in-sync members at once ──▶ the best is named: Propose
//!                     (all have answered, or 50 ms)                (≤ 127 shards per transaction)
//! ```
//!
//! A process leads only the epochs that name its own boot, so a restarted primary needs a promotion
//! like a dead one, even if it is the best candidate.
//!
//! Two kinds of candidates are not named at once:
//!
//! * A copy that may be *wrong* (damaged, or on a suspect store), while another member of the
//!   in-sync set that is not tainted may still come back. No time-out ends that wait: the other one
//!   may hold what this copy has lost. The wait ends with the other's answer, with its store given
//!   up, or with an operator's intent; a damaged copy that leads then does so with a loss on record
//!   (`accepted.rs`).
//! * A lone survivor of its in-sync set that was itself restarted since the record was written.
//!   Alone it could not commit anyway, and its next in-sync member might be a learner filled from a
//!   disk that lost its tail in the same power failure. The record shows a restart, not a reboot,
//!   so this wait is bounded, counted from the survivor's own answer.

use std::collections::{BTreeMap, BTreeSet};

use crate::coordinator::accepted::Grounds;
use crate::coordinator::choice::{PromotionCandidate, Rank, choose, promoted};
use crate::coordinator::decision::{Decision, PromotionReason};
use crate::coordinator::leader_state::{LeaderState, ShardWrite};
use crate::coordinator::{CoordinatorTiming, CoordinatorTurn, Effect};
use crate::ids::{Epoch, Now, Seq, ShardId, StoreBoot, StoreId};
use crate::message::ShardEnd;
use crate::planted::Planted;
use crate::records::StoreStatus;
use crate::shard_record::ShardRecord;

/// All promotions that are needed, in progress, or held back.
#[derive(Debug, Default)]
pub(super) struct Promotions {
    needs: BTreeMap<ShardId, PromotionNeed>,
    rounds: BTreeMap<u64, GatherRound>,
    handing: BTreeMap<ShardId, PendingHandOver>,
    paces: BTreeMap<ShardId, TakeoverPace>,
}

/// A shard in need of a primary.
#[derive(Debug)]
struct PromotionNeed {
    /// The reason that was found last.
    need: PromotionReason,
    /// The time at which the need was detected.
    since: Now,
    /// The shard is not reviewed before this time.
    after: Now,
    /// The reason for which the shard was last logged as leaderless.
    logged: Option<&'static str>,
    /// The time since which each process is known to answer and to hold a copy.
    answered: BTreeMap<StoreBoot, Now>,
}

/// The action for a shard without a primary.
enum PromotionChoice {
    /// This candidate becomes primary.
    Promote(PromotionCandidate),
    /// This process becomes primary, with a loss.
    AcceptLoss(StoreBoot, Grounds),
    /// There is no primary for now, for this reason.
    Wait(&'static str),
}

/// One round of `Gather`: the log ends of the members of some shards.
#[derive(Debug)]
pub(super) struct GatherRound {
    shards: BTreeSet<ShardId>,
    /// The processes that were asked.
    asked: BTreeMap<StoreId, StoreBoot>,
    /// Stores that have not answered yet.
    waiting: BTreeSet<StoreId>,
    /// Stores that have answered, whether they hold copies or not.
    answered: BTreeSet<StoreId>,
    ends: BTreeMap<(ShardId, StoreId), ShardEnd>,
    until: Now,
}

/// A primary that was asked to step down.
#[derive(Debug)]
struct PendingHandOver {
    to: StoreId,
    epoch: Epoch,
    until: Now,
    stepped_down: bool,
}

/// Backoff of promotions past a live primary, so that two members that are both cut off don't take
/// turns.
#[derive(Debug)]
struct TakeoverPace {
    at: Now,
    wait_ms: u64,
}

impl PromotionNeed {
    fn new(need: PromotionReason, now: Now) -> Self {
        Self { need, since: now, after: now, logged: None, answered: BTreeMap::new() }
    }
}

impl GatherRound {
    /// Returns whether this process has answered, whether it holds a copy or not.
    fn has_answered(&self, process: StoreBoot) -> bool {
        let asked = self.asked.get(&process.store) == Some(&process);
        asked && self.answered.contains(&process.store)
    }

    /// The last entry in the log of a store, if it has answered and holds a copy.
    pub(super) fn last_of(&self, shard: ShardId, store: StoreId) -> Option<(Epoch, Seq)> {
        self.ends.get(&(shard, store)).map(|end| end.last)
    }

    /// The highest position of a shard that is known to be committed: some copy has applied it.
    pub(super) fn committed(&self, shard: ShardId) -> Option<Seq> {
        let of_shard = self.ends.values().filter(|end| end.shard == shard);
        of_shard.map(|end| end.applied).max()
    }
}

impl Promotions {
    pub(super) fn is_in_round(&self, shard: ShardId) -> bool {
        self.rounds.values().any(|round| round.shards.contains(&shard))
    }

    pub(super) fn is_needed(&self, shard: ShardId) -> bool {
        self.needs.contains_key(&shard)
    }

    pub(super) fn is_handing_over(&self, shard: ShardId) -> bool {
        self.handing.contains_key(&shard)
    }

    pub(super) fn is_idle(&self) -> bool {
        self.needs.is_empty() && self.handing.is_empty()
    }

    pub(super) fn next_deadline(&self) -> Option<Now> {
        self.rounds.values().map(|round| round.until).min()
    }

    fn may_move(&self, now: Now, shard: ShardId) -> bool {
        self.paces.get(&shard).is_none_or(|pace| now >= pace.at.plus_ms(pace.wait_ms))
    }

    fn moved(&mut self, now: Now, shard: ShardId, timing: &CoordinatorTiming) {
        let (first, max) = (timing.pace_ms, timing.pace_ms_max);
        let before = self.paces.get(&shard).filter(|pace| now.ms_since(pace.at) < 2 * max);
        let wait_ms = before.map_or(first, |pace| (2 * pace.wait_ms).min(max));
        self.paces.insert(shard, TakeoverPace { at: now, wait_ms });
    }
}

impl LeaderState {
    // ---- which shards need one -----------------------------------------------------------------

    pub(super) fn review_needs(&mut self, turn: &mut CoordinatorTurn<'_>) {
        let now = turn.now;
        let records = &self.records;
        self.promotions.handing.retain(|&shard, handing| {
            let epoch = records.shards.get(shard).map(|kept| kept.value.epoch);
            now < handing.until && epoch == Some(handing.epoch)
        });
        let mut due = Vec::new();
        for (shard, kept) in self.records.shards.iter() {
            let Some(need) = self.need(now, &kept.value) else {
                self.promotions.needs.remove(&shard);
                continue;
            };
            let waiting = self.promotions.needs.entry(shard);
            let waiting = waiting.or_insert_with(|| PromotionNeed::new(need, now));
            waiting.need = need;
            if now >= waiting.after {
                due.push(shard);
            }
        }
        due.retain(|&shard| !self.is_busy(shard));
        if !due.is_empty() {
            self.gather(turn, due);
        }
    }

    fn need(&self, now: Now, record: &ShardRecord) -> Option<PromotionReason> {
        let (shard, primary) = (record.shard(), record.primary);
        let Some(newest) = self.records.newest_boot(primary.store) else {
            return Some(PromotionReason::Gone);
        };
        if newest > primary.boot {
            return Some(PromotionReason::Restarted);
        }
        let registered = self.records.is_registered(primary.store);
        if let Some(cause) = self.health.death(now, primary.store, registered) {
            return Some(PromotionReason::Dead(cause));
        }
        if self.promotions.handing.get(&shard).is_some_and(|handing| handing.stepped_down) {
            return Some(PromotionReason::HandedOver);
        }
        if !self.promotions.may_move(now, shard) {
            return None;
        }
        let others = || record.isr.iter().filter(|&&store| store != primary.store);
        let resigns = self.reports.resigns(now, primary, shard);
        if resigns && others().any(|&store| self.is_candidate(record, store)) {
            return Some(PromotionReason::Resigned);
        }
        others()
            .any(|&store| self.is_better_connected(now, record, store))
            .then_some(PromotionReason::CutOff)
    }

    fn is_candidate(&self, record: &ShardRecord, store: StoreId) -> bool {
        self.health.alive(store).is_some() && !record.tainted.contains(&store)
    }

    /// Returns whether the shard has been frozen for long, its primary reaches none of the stores
    /// it needs, and this member reaches more of the cluster than the primary does.
    fn is_better_connected(&self, now: Now, record: &ShardRecord, store: StoreId) -> bool {
        let primary = record.primary;
        let frozen_ms = self.reports.frozen_ms(now, primary, record.shard());
        let silent_to_primary = self.reports.silent_to(now, primary);
        let Some((frozen_ms, silent_to_primary)) = frozen_ms.zip(silent_to_primary) else {
            return false;
        };
        let mut others = record.isr.iter().chain(&record.learners);
        let alone =
            others.all(|other| *other == primary.store || silent_to_primary.contains(other));
        let alive = self.health.alive(store).filter(|_| self.is_candidate(record, store));
        let silent = alive.and_then(|process| self.reports.silent_to(now, process));
        frozen_ms >= self.timing.cut_off_after_ms
            && alone
            && silent.is_some_and(|silent| silent.len() < silent_to_primary.len())
    }

    // ---- where the logs end --------------------------------------------------------------------

    fn gather(&mut self, turn: &mut CoordinatorTurn<'_>, due: Vec<ShardId>) {
        let mut asked: BTreeMap<StoreId, (StoreBoot, Vec<ShardId>)> = BTreeMap::new();
        let mut shards = BTreeSet::new();
        for shard in due {
            let Some(kept) = self.records.shards.get(shard) else { continue };
            let members = kept.value.isr.iter().filter_map(|&store| self.health.alive(store));
            let mut members: Vec<StoreBoot> = members.collect();
            let wanted = self.wanted(turn, &kept.value).map(|(_, process)| process);
            members.extend(wanted.filter(|process| !members.contains(process)));
            if members.is_empty() {
                self.postpone(turn, shard, "no in-sync member answers");
                continue;
            }
            shards.insert(shard);
            for process in members {
                asked.entry(process.store).or_insert((process, Vec::new())).1.push(shard);
            }
        }
        if shards.is_empty() {
            return;
        }
        let gather = turn.fresh_id();
        let round = GatherRound {
            shards,
            asked: asked.iter().map(|(&store, (process, _))| (store, *process)).collect(),
            waiting: asked.keys().copied().collect(),
            answered: BTreeSet::new(),
            ends: BTreeMap::new(),
            until: turn.now.plus_ms(turn.settings.gather_ms),
        };
        self.promotions.rounds.insert(gather, round);
        for (_, (to, shards)) in asked {
            turn.effects.push(Effect::Gather { gather, to, shards });
        }
    }

    pub(super) fn on_gathered(
        &mut self,
        turn: &mut CoordinatorTurn<'_>,
        gather: u64,
        store: StoreId,
        ends: Option<Vec<ShardEnd>>,
    ) {
        self.on_suspect_gathered(turn, gather, store, ends.as_deref());
        let Promotions { rounds, needs, .. } = &mut self.promotions;
        let Some(round) = rounds.get_mut(&gather) else { return };
        if !round.waiting.remove(&store) {
            return;
        }
        let process = round.asked[&store];
        let Some(ends) = ends else { return };
        round.answered.insert(store);
        for end in ends {
            round.ends.insert((end.shard, store), end);
            if let Some(waiting) = needs.get_mut(&end.shard) {
                waiting.answered.entry(process).or_insert(turn.now);
            }
        }
    }

    pub(super) fn review_rounds(&mut self, turn: &mut CoordinatorTurn<'_>) {
        let over = |round: &GatherRound| round.waiting.is_empty() || turn.now >= round.until;
        let rounds = &self.promotions.rounds;
        let over: Vec<u64> =
            rounds.iter().filter(|(_, round)| over(round)).map(|(&gather, _)| gather).collect();
        for gather in over {
            if let Some(round) = self.promotions.rounds.remove(&gather) {
                self.conclude(turn, &round);
            }
        }
    }

    // ---- which member is named -----------------------------------------------------------------

    fn conclude(&mut self, turn: &mut CoordinatorTurn<'_>, round: &GatherRound) {
        let mut led: BTreeMap<StoreId, usize> = BTreeMap::new();
        for (_, kept) in self.records.shards.iter() {
            *led.entry(kept.value.primary.store).or_default() += 1;
        }
        let mut writes = Vec::new();
        for &shard in &round.shards {
            let Some(kept) = self.records.shards.get(shard) else { continue };
            let record = &kept.value;
            // The record may have moved, and the need with it.
            let Some(need) = self.need(turn.now, record) else { continue };
            let chosen = match self.decide(turn, record, need, round, &led) {
                PromotionChoice::Promote(chosen) => chosen,
                PromotionChoice::Wait(why) => {
                    self.postpone(turn, shard, why);
                    continue;
                }
                PromotionChoice::AcceptLoss(to, grounds) => {
                    *led.entry(to.store).or_default() += 1;
                    let out = self.leaving(turn.now, record, need);
                    self.accept_loss(turn, shard, round, to, &out, grounds);
                    continue;
                }
            };
            *led.entry(chosen.process.store).or_default() += 1;
            writes.push(self.promotion(turn, record, need, chosen));
            if matches!(need, PromotionReason::Resigned | PromotionReason::CutOff) {
                self.promotions.moved(turn.now, shard, &self.timing);
            }
        }
        self.propose_shards(turn, writes);
    }

    /// The action for one shard, by what is known when the round ends.
    fn decide(
        &self,
        turn: &CoordinatorTurn<'_>,
        record: &ShardRecord,
        need: PromotionReason,
        round: &GatherRound,
        led: &BTreeMap<StoreId, usize>,
    ) -> PromotionChoice {
        let candidates = self.candidates(turn, record, need, round, led);
        let handing = self.promotions.handing.get(&record.shard());
        let why = match choose(&candidates, handing.map(|handing| handing.to)) {
            None => "no in-sync member that may lead has answered",
            Some(chosen) => match self.waits_with(turn, record, round, chosen) {
                Some(why) => why,
                None if chosen.rank == Rank::Unfit => {
                    return PromotionChoice::AcceptLoss(chosen.process, Grounds::AllDamaged);
                }
                None => return PromotionChoice::Promote(chosen),
            },
        };
        match self.wanted(turn, record).filter(|(_, process)| round.has_answered(*process)) {
            Some((intent, process)) => {
                PromotionChoice::AcceptLoss(process, Grounds::Intent(intent.clone()))
            }
            None => PromotionChoice::Wait(why),
        }
    }

    fn candidates(
        &self,
        turn: &CoordinatorTurn<'_>,
        record: &ShardRecord,
        need: PromotionReason,
        round: &GatherRound,
        led: &BTreeMap<StoreId, usize>,
    ) -> Vec<PromotionCandidate> {
        let shard = record.shard();
        let old = record.primary.store;
        let candidate = |&store: &StoreId| {
            let end = round.ends.get(&(shard, store))?;
            let status = self.records.stores.get(store)?.value.status;
            // Lost and retired stores are not probed, so they are not alive here.
            let process = self.health.alive(store).filter(|it| round.asked[&store] == *it)?;
            let full = self.reports.full_ms(turn.now, process).is_some()
                && !Planted::FullLeadsOn.is_in(turn.settings.planted);
            let replaced =
                store == old && matches!(need, PromotionReason::Resigned | PromotionReason::CutOff);
            let handed_over = store == old && matches!(need, PromotionReason::HandedOver);
            // A damaged copy is the last resort. One that lost all it had is no candidate at all:
            // it would count from 0.
            if end.unfit && end.last.1 == Seq(0) {
                return None;
            }
            let rank = match status {
                _ if end.unfit => Rank::Unfit,
                StoreStatus::Suspect => Rank::Suspect,
                _ if replaced => Rank::Replaced,
                _ if full => Rank::Full,
                _ if handed_over || status == StoreStatus::Draining => Rank::Leaving,
                _ => Rank::Good,
            };
            let led = led.get(&store).copied().unwrap_or(0);
            Some(PromotionCandidate { process, last: end.last, rank, led })
        };
        let promotable = record.isr.iter().filter(|store| !record.tainted.contains(store));
        promotable.filter_map(candidate).collect()
    }

    /// The reason why the best candidate should not be named yet, if there is one.
    fn waits_with(
        &self,
        turn: &CoordinatorTurn<'_>,
        record: &ShardRecord,
        round: &GatherRound,
        chosen: PromotionCandidate,
    ) -> Option<&'static str> {
        let shard = record.shard();
        let waiting = self.promotions.needs.get(&shard);
        let answered = waiting.and_then(|waiting| waiting.answered.get(&chosen.process));
        let waited_ms = answered.map_or(0, |&since| turn.now.ms_since(since));
        let waited = waited_ms >= turn.settings.lone_wait_ms;
        let is_wrong = matches!(chosen.rank, Rank::Suspect | Rank::Unfit);
        let impatient = Planted::WrongCopyLeadsInTime.is_in(turn.settings.planted) && waited;
        if is_wrong && !impatient && self.better_may_come(record, round, chosen) {
            return Some("the only reachable copy may be damaged: waiting for a better one");
        }
        (!waited && self.is_restarted_and_alone(record, chosen))
            .then_some("the only reachable member was restarted: waiting for another")
    }

    /// Returns whether a member that is neither tainted nor gone for good has not answered. (One
    /// that lives, and was slow to answer, holds as much as one that is about to return.)
    fn better_may_come(
        &self,
        record: &ShardRecord,
        round: &GatherRound,
        chosen: PromotionCandidate,
    ) -> bool {
        let has_answered = |store: StoreId| {
            let alive = self.health.alive(store);
            alive.is_some()
                && round.ends.contains_key(&(record.shard(), store))
                && round.asked.get(&store).copied() == alive
        };
        record
            .isr
            .iter()
            .any(|&store| self.may_return(record, store, chosen) && !has_answered(store))
    }

    fn may_return(&self, record: &ShardRecord, store: StoreId, chosen: PromotionCandidate) -> bool {
        store != chosen.process.store
            && self.records.newest_boot(store).is_some()
            && !record.tainted.contains(&store)
    }

    /// Returns whether the candidate was restarted since the record was written, and too few
    /// members live to commit while another may return.
    fn is_restarted_and_alone(&self, record: &ShardRecord, chosen: PromotionCandidate) -> bool {
        let is_dead = |store: StoreId| self.health.alive(store).is_none();
        let missing = |&store: &StoreId| self.may_return(record, store, chosen) && is_dead(store);
        let alive = record.isr.iter().filter(|&&store| !is_dead(store)).count();
        let boot_at = self.records.stores.get(chosen.process.store).map_or(0, |kept| kept.modified);
        let written_at = self.records.shards.get(record.shard()).map_or(0, |kept| kept.modified);
        let lone = record.isr.iter().any(missing) && alive < self.min_in_sync();
        lone && boot_at > written_at
    }

    fn promotion(
        &self,
        turn: &CoordinatorTurn<'_>,
        record: &ShardRecord,
        need: PromotionReason,
        chosen: PromotionCandidate,
    ) -> ShardWrite {
        let (shard, to) = (record.shard(), chosen.process);
        let out = self.leaving(turn.now, record, need);
        let next = promoted(record, to, &out, self.min_in_sync());
        let since = self.promotions.needs.get(&shard).map_or(turn.now, |waiting| waiting.since);
        let decision = Decision::Promoted {
            shard,
            epoch: next.epoch,
            from: record.primary,
            to,
            why: need,
            last: chosen.last,
            took_ms: turn.now.ms_since(since),
        };
        ShardWrite { record: next, decision: Some(decision) }
    }

    /// Members that leave with a promotion, those most surely gone first.
    fn leaving(&self, now: Now, record: &ShardRecord, need: PromotionReason) -> Vec<StoreId> {
        let replaced = matches!(need, PromotionReason::Resigned | PromotionReason::CutOff);
        let leaves = |&store: &StoreId| {
            self.is_dead(now, store) || (replaced && store == record.primary.store)
        };
        let mut out: Vec<StoreId> = record.isr.iter().copied().filter(leaves).collect();
        out.sort_by_key(|store| {
            let gone = self.records.newest_boot(*store).is_none();
            let (tainted, wanted) = (record.tainted.contains(store), record.target.contains(store));
            (!gone, !tainted, wanted, *store)
        });
        out
    }

    /// Returns whether the store counts as dead by its probes, or is gone for good by its status.
    pub(super) fn is_dead(&self, now: Now, store: StoreId) -> bool {
        let registered = self.records.is_registered(store);
        self.records.newest_boot(store).is_none()
            || self.health.death(now, store, registered).is_some()
    }

    fn postpone(&mut self, turn: &mut CoordinatorTurn<'_>, shard: ShardId, why: &'static str) {
        let Some(waiting) = self.promotions.needs.get_mut(&shard) else { return };
        waiting.after = turn.now.plus_ms(self.timing.retry_ms);
        let lasts = turn.now.ms_since(waiting.since) >= self.timing.leaderless_ms;
        if lasts && waiting.logged != Some(why) {
            waiting.logged = Some(why);
            turn.log(Decision::Leaderless { shard, why });
        }
    }

    // ---- handing over --------------------------------------------------------------------------

    /// Asks the primary to step down for another member.
    pub(super) fn hand_over(
        &mut self,
        turn: &mut CoordinatorTurn<'_>,
        shard: ShardId,
        to: StoreId,
    ) {
        let Some(kept) = self.records.shards.get(shard) else { return };
        let (primary, epoch) = (kept.value.primary, kept.value.epoch);
        let until = turn.now.plus_ms(self.timing.hand_over_ms);
        let handing = PendingHandOver { to, epoch, until, stepped_down: false };
        self.promotions.handing.insert(shard, handing);
        turn.effects.push(Effect::StepDown { to: primary, shard, epoch });
    }

    pub(super) fn on_stepped_down(
        &mut self,
        turn: &mut CoordinatorTurn<'_>,
        shard: ShardId,
        epoch: Epoch,
        end: Option<(Epoch, Seq)>,
    ) {
        let Some(handing) = self.promotions.handing.get_mut(&shard) else { return };
        if handing.epoch != epoch {
            return;
        }
        match end {
            Some(_) => {
                handing.stepped_down = true;
                self.mark_dirty();
            }
            None => {
                self.promotions.handing.remove(&shard);
                self.upkeep.note_disruption(turn.now);
            }
        }
    }
}
