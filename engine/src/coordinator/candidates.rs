//! The candidates of one promotion: how good their copies are, whether the best of them is named at
//! once, and which members leave the in-sync set.

use std::collections::BTreeMap;

use crate::coordinator::Settings;
use crate::coordinator::choice::{PromotionCandidate, Rank};
use crate::coordinator::decision::PromotionReason;
use crate::coordinator::gather::GatherRound;
use crate::coordinator::observed::ObservedCluster;
use crate::ids::{Now, Seq, StoreId};
use crate::message::ShardEnd;
use crate::planted::Planted;
use crate::records::StoreStatus;
use crate::shard_record::ShardRecord;

/// A shard that needs a primary, and all that is known when its round ends.
pub(super) struct PromotionCase<'a> {
    pub(super) now: Now,
    pub(super) settings: &'a Settings,
    pub(super) cluster: &'a ObservedCluster,
    pub(super) record: &'a ShardRecord,
    pub(super) need: PromotionReason,
    pub(super) round: &'a GatherRound,
}

impl PromotionCase<'_> {
    /// The members that answered and may lead. `led`: the number of shards that each store leads.
    pub(super) fn candidates(&self, led: &BTreeMap<StoreId, usize>) -> Vec<PromotionCandidate> {
        let candidate = |&store: &StoreId| {
            let end = self.round.end_of(self.record.shard(), store)?;
            let status = self.cluster.records.stores.get(store)?.value.status;
            // Lost and retired stores are not probed, so they are not alive here.
            let alive = self.cluster.health.alive(store);
            let process = alive.filter(|&process| self.round.has_asked(process))?;
            let full = self.cluster.reports.full_ms(self.now, process).is_some()
                && !Planted::FullLeadsOn.is_in(self.settings.planted);
            // A damaged copy is the last resort. One that lost all it had is no candidate at all:
            // it would count from 0.
            if end.unfit && end.last.1 == Seq(0) {
                return None;
            }
            let rank = self.rank(store, end, status, full);
            let led = led.get(&store).copied().unwrap_or(0);
            Some(PromotionCandidate { process, last: end.last, rank, led })
        };
        let tainted = &self.record.tainted;
        let promotable = self.record.isr.iter().filter(|store| !tainted.contains(store));
        promotable.filter_map(candidate).collect()
    }

    fn rank(&self, store: StoreId, end: &ShardEnd, status: StoreStatus, full: bool) -> Rank {
        let is_old = store == self.record.primary.store;
        let handed_over = is_old && matches!(self.need, PromotionReason::HandedOver);
        match status {
            _ if end.unfit => Rank::Unfit,
            StoreStatus::Suspect => Rank::Suspect,
            _ if is_old && self.is_replaced() => Rank::Replaced,
            _ if full => Rank::Full,
            _ if handed_over || status == StoreStatus::Draining => Rank::Leaving,
            _ => Rank::Good,
        }
    }

    /// Returns whether the primary is taken from a process that lives.
    pub(super) fn is_replaced(&self) -> bool {
        matches!(self.need, PromotionReason::Resigned | PromotionReason::CutOff)
    }

    /// The reason why the best candidate should not be named yet, if there is one. `answered`: the
    /// time since which it is known to answer and to hold a copy.
    pub(super) fn waits_with(
        &self,
        chosen: PromotionCandidate,
        answered: Option<Now>,
    ) -> Option<&'static str> {
        let waited_ms = answered.map_or(0, |since| self.now.ms_since(since));
        let waited = waited_ms >= self.settings.lone_wait_ms;
        let is_wrong = matches!(chosen.rank, Rank::Suspect | Rank::Unfit);
        let impatient = Planted::WrongCopyLeadsInTime.is_in(self.settings.planted) && waited;
        if is_wrong && !impatient && self.better_may_come(chosen) {
            return Some("the only reachable copy may be damaged: waiting for a better one");
        }
        (!waited && self.is_restarted_and_alone(chosen))
            .then_some("the only reachable member was restarted: waiting for another")
    }

    /// Returns whether a member that is neither tainted nor gone for good has not answered. (One
    /// that lives, and was slow to answer, holds as much as one that is about to return.)
    fn better_may_come(&self, chosen: PromotionCandidate) -> bool {
        let has_answered = |store: StoreId| {
            let alive = self.cluster.health.alive(store);
            alive.is_some_and(|process| self.round.has_asked(process))
                && self.round.end_of(self.record.shard(), store).is_some()
        };
        let mut members = self.record.isr.iter();
        members.any(|&store| self.may_return(store, chosen) && !has_answered(store))
    }

    fn may_return(&self, store: StoreId, chosen: PromotionCandidate) -> bool {
        store != chosen.process.store
            && self.cluster.records.newest_boot(store).is_some()
            && !self.record.tainted.contains(&store)
    }

    /// Returns whether the candidate was restarted since the record was written, and too few
    /// members live to commit while another may return.
    fn is_restarted_and_alone(&self, chosen: PromotionCandidate) -> bool {
        let records = &self.cluster.records;
        let is_dead = |store: StoreId| self.cluster.health.alive(store).is_none();
        let missing = |&store: &StoreId| self.may_return(store, chosen) && is_dead(store);
        let alive = self.record.isr.iter().filter(|&&store| !is_dead(store)).count();
        let boot_at = records.stores.modified(chosen.process.store);
        let written_at = records.shards.modified(self.record.shard());
        let lone = self.record.isr.iter().any(missing) && alive < self.cluster.min_in_sync();
        lone && boot_at > written_at
    }

    /// Members that leave with a promotion, those most surely gone first.
    pub(super) fn leaving(&self) -> Vec<StoreId> {
        let record = self.record;
        let leaves = |&store: &StoreId| {
            self.cluster.is_dead(self.now, store)
                || (self.is_replaced() && store == record.primary.store)
        };
        let mut out: Vec<StoreId> = record.isr.iter().copied().filter(leaves).collect();
        out.sort_by_key(|store| {
            let gone = self.cluster.records.newest_boot(*store).is_none();
            let (tainted, wanted) = (record.tainted.contains(store), record.target.contains(store));
            (!gone, !tainted, wanted, *store)
        });
        out
    }
}
