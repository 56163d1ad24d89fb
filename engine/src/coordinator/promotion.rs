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

use crate::coordinator::CoordinatorTiming;
use crate::coordinator::accepted::{Grounds, accept_loss, wanted};
use crate::coordinator::candidates::PromotionCase;
use crate::coordinator::choice::{PromotionCandidate, Rank, choose, promoted};
use crate::coordinator::decision::{Decision, PromotionReason};
use crate::coordinator::gather::GatherRound;
use crate::coordinator::hand_over::HandOvers;
use crate::coordinator::observed::ObservedCluster;
use crate::coordinator::proposals::{LeaderProposals, ShardWrite};
use crate::coordinator::review::ReviewTurn;
use crate::ids::{Now, ShardId, StoreBoot, StoreId};
use crate::message::ShardEnd;
use crate::shard_record::ShardRecord;

/// All promotions that are needed, in progress, or held back.
#[derive(Debug, Default)]
pub(super) struct Promotions {
    needs: BTreeMap<ShardId, PromotionNeed>,
    /// The rounds that wait for answers, by their number.
    rounds: BTreeMap<u64, GatherRound>,
    pub(super) hand_overs: HandOvers,
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

impl Promotions {
    /// Returns whether nothing may be proposed for the shard now: something is in flight or
    /// unsettled.
    pub(super) fn is_busy(&self, proposals: &LeaderProposals, shard: ShardId) -> bool {
        proposals.is_unsettled(shard) || self.rounds.values().any(|round| round.contains(shard))
    }

    /// Returns whether the shard's primary leads it, as far as is known, no promotion is due, and a
    /// change may be proposed.
    pub(super) fn is_free(&self, review: &ReviewTurn<'_>, record: &ShardRecord) -> bool {
        let shard = record.shard();
        review.cluster.is_led(record)
            && !self.needs.contains_key(&shard)
            && !self.hand_overs.contain(shard)
            && !self.is_busy(review.proposals, shard)
    }

    pub(super) fn is_idle(&self) -> bool {
        self.needs.is_empty() && self.hand_overs.is_empty()
    }

    pub(super) fn next_deadline(&self) -> Option<Now> {
        self.rounds.values().map(GatherRound::until).min()
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

    // ---- which shards need one -----------------------------------------------------------------

    pub(super) fn review_needs(&mut self, review: &mut ReviewTurn<'_>) {
        let (now, cluster) = (review.now(), review.cluster);
        self.hand_overs.drop_ended(now, cluster);
        let mut due = Vec::new();
        for record in cluster.shards() {
            let shard = record.shard();
            let Some(need) = self.need(review, record) else {
                self.needs.remove(&shard);
                continue;
            };
            let waiting = self.needs.entry(shard);
            let waiting = waiting.or_insert_with(|| PromotionNeed::new(need, now));
            waiting.need = need;
            if now >= waiting.after {
                due.push(shard);
            }
        }
        due.retain(|&shard| !self.is_busy(review.proposals, shard));
        if !due.is_empty() {
            self.gather(review, due);
        }
    }

    fn need(&self, review: &ReviewTurn<'_>, record: &ShardRecord) -> Option<PromotionReason> {
        let (now, cluster) = (review.now(), review.cluster);
        let (shard, primary) = (record.shard(), record.primary);
        let Some(newest) = cluster.records.newest_boot(primary.store) else {
            return Some(PromotionReason::Gone);
        };
        if newest > primary.boot {
            return Some(PromotionReason::Restarted);
        }
        let registered = cluster.records.is_registered(primary.store);
        if let Some(cause) = cluster.health.death(now, primary.store, registered) {
            return Some(PromotionReason::Dead(cause));
        }
        if self.hand_overs.has_stepped_down(shard) {
            return Some(PromotionReason::HandedOver);
        }
        if !self.may_move(now, shard) {
            return None;
        }
        let others = || record.isr.iter().filter(|&&store| store != primary.store);
        let resigns = cluster.reports.resigns(now, primary, shard);
        if resigns && others().any(|&store| is_candidate(cluster, record, store)) {
            return Some(PromotionReason::Resigned);
        }
        others()
            .any(|&store| is_better_connected(review, record, store))
            .then_some(PromotionReason::CutOff)
    }

    // ---- where the logs end --------------------------------------------------------------------

    fn gather(&mut self, review: &mut ReviewTurn<'_>, due: Vec<ShardId>) {
        let (cluster, planted) = (review.cluster, review.turn.settings.planted);
        let mut asked: BTreeMap<StoreId, (StoreBoot, Vec<ShardId>)> = BTreeMap::new();
        let mut shards = BTreeSet::new();
        for shard in due {
            let Some(record) = cluster.shard(shard) else { continue };
            let members = record.isr.iter().filter_map(|&store| cluster.health.alive(store));
            let mut members: Vec<StoreBoot> = members.collect();
            let wanted = wanted(cluster, record, planted).map(|(_, process)| process);
            members.extend(wanted.filter(|process| !members.contains(process)));
            if members.is_empty() {
                self.postpone(review, shard, "no in-sync member answers");
                continue;
            }
            shards.insert(shard);
            for process in members {
                asked.entry(process.store).or_insert((process, Vec::new())).1.push(shard);
            }
        }
        if !shards.is_empty() {
            self.rounds.extend([GatherRound::begin(&mut review.turn, shards, asked)]);
        }
    }

    pub(super) fn on_gathered(
        &mut self,
        now: Now,
        gather: u64,
        store: StoreId,
        ends: Option<&[ShardEnd]>,
    ) {
        let round = self.rounds.get_mut(&gather);
        let Some(process) = round.and_then(|round| round.on_answer(store, ends)) else { return };
        for end in ends.unwrap_or_default() {
            if let Some(waiting) = self.needs.get_mut(&end.shard) {
                waiting.answered.entry(process).or_insert(now);
            }
        }
    }

    pub(super) fn review_rounds(&mut self, review: &mut ReviewTurn<'_>) {
        let now = review.now();
        let over: Vec<_> = self.rounds.extract_if(.., |_, round| round.is_over(now)).collect();
        for (_, round) in over {
            self.conclude(review, &round);
        }
    }

    // ---- which member is named -----------------------------------------------------------------

    fn conclude(&mut self, review: &mut ReviewTurn<'_>, round: &GatherRound) {
        let (now, settings, cluster) = (review.now(), review.turn.settings, review.cluster);
        let mut led: BTreeMap<StoreId, usize> = BTreeMap::new();
        for record in cluster.shards() {
            *led.entry(record.primary.store).or_default() += 1;
        }
        let mut writes = Vec::new();
        for shard in round.shards() {
            let Some(record) = cluster.shard(shard) else { continue };
            // The record may have moved, and the need with it.
            let Some(need) = self.need(review, record) else { continue };
            let case = PromotionCase { now, settings, cluster, record, need, round };
            let chosen = match self.decide(&case, &led) {
                PromotionChoice::Promote(chosen) => chosen,
                PromotionChoice::Wait(why) => {
                    self.postpone(review, shard, why);
                    continue;
                }
                PromotionChoice::AcceptLoss(to, grounds) => {
                    *led.entry(to.store).or_default() += 1;
                    accept_loss(review, &case, to, grounds);
                    continue;
                }
            };
            *led.entry(chosen.process.store).or_default() += 1;
            writes.push(self.promotion(&case, chosen));
            if case.is_replaced() {
                self.moved(now, shard, &settings.timing);
            }
        }
        review.propose_shards(writes);
    }

    /// The action for one shard, by what is known when the round ends.
    fn decide(&self, case: &PromotionCase<'_>, led: &BTreeMap<StoreId, usize>) -> PromotionChoice {
        let shard = case.record.shard();
        let why = match choose(&case.candidates(led), self.hand_overs.to(shard)) {
            None => "no in-sync member that may lead has answered",
            Some(chosen) => {
                match case.waits_with(chosen, self.answered_since(shard, chosen.process)) {
                    Some(why) => why,
                    None if chosen.rank == Rank::Unfit => {
                        return PromotionChoice::AcceptLoss(chosen.process, Grounds::AllDamaged);
                    }
                    None => return PromotionChoice::Promote(chosen),
                }
            }
        };
        let wanted = wanted(case.cluster, case.record, case.settings.planted);
        match wanted.filter(|(_, process)| case.round.has_answered(*process)) {
            Some((intent, process)) => {
                PromotionChoice::AcceptLoss(process, Grounds::Intent(intent.clone()))
            }
            None => PromotionChoice::Wait(why),
        }
    }

    /// The time since which the process is known to answer, and to hold a copy of the shard.
    fn answered_since(&self, shard: ShardId, process: StoreBoot) -> Option<Now> {
        self.needs.get(&shard)?.answered.get(&process).copied()
    }

    fn promotion(&self, case: &PromotionCase<'_>, chosen: PromotionCandidate) -> ShardWrite {
        let (shard, to) = (case.record.shard(), chosen.process);
        let next = promoted(case.record, to, &case.leaving(), case.cluster.min_in_sync());
        let since = self.needs.get(&shard).map_or(case.now, |waiting| waiting.since);
        let decision = Decision::Promoted {
            shard,
            epoch: next.epoch,
            from: case.record.primary,
            to,
            why: case.need,
            last: chosen.last,
            took_ms: case.now.ms_since(since),
        };
        ShardWrite { record: next, decision: Some(decision) }
    }

    fn postpone(&mut self, review: &mut ReviewTurn<'_>, shard: ShardId, why: &'static str) {
        let (now, timing) = (review.now(), &review.turn.settings.timing);
        let Some(waiting) = self.needs.get_mut(&shard) else { return };
        waiting.after = now.plus_ms(timing.retry_ms);
        let lasts = now.ms_since(waiting.since) >= timing.leaderless_ms;
        if lasts && waiting.logged != Some(why) {
            waiting.logged = Some(why);
            review.turn.log(Decision::Leaderless { shard, why });
        }
    }

    // ---- handing over --------------------------------------------------------------------------

    /// Asks the primary to step down for another member.
    pub(super) fn hand_over(&mut self, review: &mut ReviewTurn<'_>, shard: ShardId, to: StoreId) {
        if let Some(record) = review.cluster.shard(shard) {
            self.hand_overs.begin(&mut review.turn, record, to);
        }
    }
}

fn is_candidate(cluster: &ObservedCluster, record: &ShardRecord, store: StoreId) -> bool {
    cluster.health.alive(store).is_some() && !record.tainted.contains(&store)
}

/// Returns whether the shard has been frozen for long, its primary reaches none of the stores it
/// needs, and this member reaches more of the cluster than the primary does.
fn is_better_connected(review: &ReviewTurn<'_>, record: &ShardRecord, store: StoreId) -> bool {
    let (now, cluster, primary) = (review.now(), review.cluster, record.primary);
    let reports = &cluster.reports;
    let frozen_ms = reports.frozen_ms(now, primary, record.shard());
    let silent_to_primary = reports.silent_to(now, primary);
    let Some((frozen_ms, silent_to_primary)) = frozen_ms.zip(silent_to_primary) else {
        return false;
    };
    let mut others = record.isr.iter().chain(&record.learners);
    let alone = others.all(|other| *other == primary.store || silent_to_primary.contains(other));
    let candidate = is_candidate(cluster, record, store);
    let alive = cluster.health.alive(store).filter(|_| candidate);
    let silent = alive.and_then(|process| reports.silent_to(now, process));
    frozen_ms >= review.turn.settings.timing.cut_off_after_ms
        && alone
        && silent.is_some_and(|silent| silent.len() < silent_to_primary.len())
}
