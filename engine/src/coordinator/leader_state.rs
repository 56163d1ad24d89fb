//! The state of a leading coordinator, and the order of its reviews.
//!
//! Proposals live here. A shard takes part in at most one proposal at a time. After one that
//! failed, or whose outcome is unknown, its shards *rest* until a list that began afterwards has
//! come back. Shards whose record had moved are proposed *singly* from then on, so that one busy
//! record does not hold up a whole transaction.

use std::collections::{BTreeMap, BTreeSet};

use crate::coordinator::decision::{Decision, PlacementWait};
use crate::coordinator::health::FailureDetector;
use crate::coordinator::promotion::Promotions;
use crate::coordinator::records::ClusterRecords;
use crate::coordinator::reports::Reports;
use crate::coordinator::upkeep::Upkeep;
use crate::coordinator::{
    AcceptedLoss, AtRevision, CoordinatorTiming, CoordinatorTurn, Effect, Event, Listing,
    RecordChange, Settings, Writes,
};
use crate::ids::{Now, ShardId, StoreBoot, StoreId};
use crate::node::CasOutcome;
use crate::records::Meta;
use crate::shard_record::ShardRecord;

/// The state of one term, from the election to the loss of the `coordinator` key.
#[derive(Debug)]
pub(super) struct LeaderState {
    term: u64,
    pub(super) timing: CoordinatorTiming,
    pub(super) records: ClusterRecords,
    pub(super) health: FailureDetector,
    pub(super) reports: Reports,
    pub(super) promotions: Promotions,
    pub(super) upkeep: Upkeep,

    lists: ListState,
    proposals: BTreeMap<u64, PendingProposal>,
    /// The shards of the pending proposals.
    proposed: BTreeSet<ShardId>,
    resting: Resting,
    /// Shards that are proposed in transactions of their own.
    singly: BTreeSet<ShardId>,
    /// There are no proposals before this time.
    paused_until: Now,

    /// Every process has had time to answer a probe; before that none counts as dead.
    all_probed: bool,
    /// Something has changed since the last review.
    dirty: bool,
    next_review: Now,
}

/// The list that is in flight, and the time of the next one.
#[derive(Debug, Default)]
struct ListState {
    /// A list has come back, so all records are loaded.
    listed: bool,
    in_flight: Option<(u64, Now)>,
    /// Another list must begin when the present one is back.
    again: bool,
    next: Now,
}

/// Shards whose last proposal failed, or has an unknown outcome.
#[derive(Debug, Default)]
struct Resting {
    /// Shards that rest until the list in flight is back, or the next one if none is in flight.
    now: BTreeSet<ShardId>,
    /// Shards that rest until the list after that one is back.
    next: BTreeSet<ShardId>,
    /// The shards of failed proposals, each with the mod_revision that was compared.
    failed: Vec<(ShardId, u64)>,
}

/// A proposal without an answer.
#[derive(Debug)]
struct PendingProposal {
    writes: Writes,
    decisions: Vec<Decision>,
}

/// One shard's part of a proposal: the record to write, and the decision to log once it is written.
#[derive(Debug)]
pub(super) struct ShardWrite {
    pub(super) record: ShardRecord,
    pub(super) decision: Option<Decision>,
}

impl LeaderState {
    pub(super) fn new(term: u64, turn: &mut CoordinatorTurn<'_>) -> Self {
        let timing = turn.settings.timing;
        let mut leader = Self {
            term,
            timing,
            records: ClusterRecords::default(),
            health: FailureDetector::new(timing),
            reports: Reports::new(timing.report_ms),
            promotions: Promotions::default(),
            upkeep: Upkeep::default(),
            lists: ListState::default(),
            proposals: BTreeMap::new(),
            proposed: BTreeSet::new(),
            resting: Resting::default(),
            singly: BTreeSet::new(),
            paused_until: turn.now,
            all_probed: false,
            dirty: true,
            next_review: turn.now,
        };
        leader.list(turn);
        leader
    }

    pub(super) fn term(&self) -> u64 {
        self.term
    }

    pub(super) fn is_listed(&self) -> bool {
        self.lists.listed
    }

    pub(super) fn waits_for(&self) -> Option<PlacementWait> {
        self.upkeep.waits
    }

    pub(super) fn meta(&self) -> Option<&Meta> {
        Some(&self.records.meta.as_ref()?.value)
    }

    pub(super) fn min_in_sync(&self) -> usize {
        self.meta().map_or(usize::MAX, |meta| usize::from(meta.min_in_sync))
    }

    // ---- events --------------------------------------------------------------------------------

    pub(super) fn on(&mut self, turn: &mut CoordinatorTurn<'_>, event: Event) {
        match event {
            Event::Tick | Event::Elected { .. } | Event::Deposed => {}
            Event::Listed { list, listing } => self.on_listed(turn, list, listing),
            Event::Changed { revision, change } => self.on_changed(turn, revision, change),
            Event::WatchBroke => self.list(turn),
            Event::Proposed { proposal, outcome } => self.on_proposed(turn, proposal, outcome),
            Event::Probed { probe, result } => {
                self.dirty |= self.health.on_probed(turn, probe, result);
            }
            Event::Gathered { gather, store, ends } => self.on_gathered(turn, gather, store, ends),
            Event::SteppedDown { shard, epoch, end } => {
                self.on_stepped_down(turn, shard, epoch, end)
            }
            Event::Reported { from, report } => {
                for &store in &report.silent {
                    self.health.suspect(turn.now, store);
                }
                self.dirty |= report.leaving && self.health.note_leaving(from);
                self.dirty |= self.reports.on_report(turn.now, from, report);
            }
            Event::GatewayReported { suspects } => {
                for store in suspects {
                    self.health.suspect(turn.now, store);
                }
                self.dirty = true;
            }
        }
    }

    fn on_changed(&mut self, turn: &mut CoordinatorTurn<'_>, revision: u64, change: RecordChange) {
        let left = match change {
            RecordChange::Node(store, None) => Some(store),
            _ => None,
        };
        let came = matches!(change, RecordChange::Node(_, Some(_)));
        if self.records.changed(revision, change) {
            self.dirty = true;
            if came {
                self.upkeep.node_joined(turn.now);
            }
            if let Some(store) = left {
                self.health.probe_now(turn.now, store);
            }
        }
    }

    // ---- reading -------------------------------------------------------------------------------

    /// Requests a list that begins now, or as soon as the one in flight is back.
    fn list(&mut self, turn: &mut CoordinatorTurn<'_>) {
        if self.lists.in_flight.is_some() {
            self.lists.again = true;
            return;
        }
        let list = turn.fresh_id();
        self.lists.in_flight = Some((list, turn.now));
        self.lists.again = false;
        self.lists.next = turn.now.plus_ms(turn.settings.relist_every_ms);
        // The list begins after every proposal whose shards rest so far.
        self.resting.now.append(&mut self.resting.next);
        turn.effects.push(Effect::List { list });
    }

    fn on_listed(&mut self, turn: &mut CoordinatorTurn<'_>, list: u64, listing: Option<Listing>) {
        if self.lists.in_flight.is_none_or(|(in_flight, _)| in_flight != list) {
            return;
        }
        self.lists.in_flight = None;
        let Some(listing) = listing else {
            self.lists.next = turn.now.plus_ms(self.timing.list_retry_ms);
            return;
        };
        self.records.listed(listing);
        self.dirty = true;
        self.resting.now.clear();
        self.compare_failed(turn);
        if !std::mem::replace(&mut self.lists.listed, true) {
            self.upkeep.node_joined(turn.now);
            turn.log(Decision::BecameLeader {
                term: self.term,
                stores: self.records.stores.len(),
                shards: self.records.shards.len(),
            });
        }
        if self.lists.again {
            self.list(turn);
        }
    }

    /// Finds which records of failed proposals had moved. They are proposed singly; if none had
    /// moved, the reason for the failure is unknown and proposals pause.
    fn compare_failed(&mut self, turn: &mut CoordinatorTurn<'_>) {
        let resting = &self.resting.next;
        let (later, failed): (Vec<_>, Vec<_>) =
            self.resting.failed.drain(..).partition(|(shard, _)| resting.contains(shard));
        self.resting.failed = later;
        let moved = |(shard, expect): &(ShardId, u64)| {
            self.records.shards.get(*shard).map_or(0, |kept| kept.modified) != *expect
        };
        let any = !failed.is_empty();
        let moved: Vec<ShardId> =
            failed.into_iter().filter(moved).map(|(shard, _)| shard).collect();
        if any && moved.is_empty() {
            self.paused_until = turn.now.plus_ms(self.timing.pause_ms);
        }
        self.singly.extend(moved);
    }

    fn review_lists(&mut self, turn: &mut CoordinatorTurn<'_>) {
        match self.lists.in_flight {
            Some((_, since)) if turn.now >= since.plus_ms(self.timing.list_timeout_ms) => {
                self.lists.in_flight = None;
                self.list(turn);
            }
            None if turn.now >= self.lists.next => self.list(turn),
            _ => {}
        }
    }

    // ---- writing -------------------------------------------------------------------------------

    /// Returns whether nothing may be proposed for the shard now: something is in flight or
    /// unsettled.
    pub(super) fn is_busy(&self, shard: ShardId) -> bool {
        self.resting.now.contains(&shard)
            || self.resting.next.contains(&shard)
            || self.promotions.is_in_round(shard)
            || self.proposed.contains(&shard)
    }

    pub(super) fn is_paused(&self, now: Now) -> bool {
        now < self.paused_until
    }

    /// Proposes shard records in as few transactions as possible.
    pub(super) fn propose_shards(
        &mut self,
        turn: &mut CoordinatorTurn<'_>,
        writes: Vec<ShardWrite>,
    ) {
        let single = |write: &ShardWrite| self.singly.contains(&write.record.shard());
        let (single, mut together): (Vec<ShardWrite>, Vec<ShardWrite>) =
            writes.into_iter().partition(single);
        let mut transactions: Vec<Vec<ShardWrite>> =
            single.into_iter().map(|one| vec![one]).collect();
        while !together.is_empty() {
            let rest = together.split_off(together.len().min(turn.settings.shards_per_txn));
            transactions.push(std::mem::replace(&mut together, rest));
        }
        for transaction in transactions {
            let mut decisions = Vec::new();
            let mut shards = Vec::new();
            for ShardWrite { record, decision } in transaction {
                let known = self.records.shards.get(record.shard());
                shards.push((known.map_or(0, |kept| kept.modified), record));
                decisions.extend(decision);
            }
            self.propose(turn, Writes::Shards(shards), decisions);
        }
    }

    pub(super) fn propose(
        &mut self,
        turn: &mut CoordinatorTurn<'_>,
        writes: Writes,
        decisions: Vec<Decision>,
    ) {
        let proposal = turn.fresh_id();
        self.proposed.extend(writes.shards().iter().map(|(_, record)| record.shard()));
        self.proposals.insert(proposal, PendingProposal { writes: writes.clone(), decisions });
        turn.effects.push(Effect::Propose { proposal, term: self.term, writes });
    }

    /// Returns whether a proposal with such a write is in flight.
    pub(super) fn is_proposing(&self, is_such: impl Fn(&Writes) -> bool) -> bool {
        self.proposals.values().any(|proposal| is_such(&proposal.writes))
    }

    fn on_proposed(&mut self, turn: &mut CoordinatorTurn<'_>, id: u64, outcome: CasOutcome) {
        let Some(proposal) = self.proposals.remove(&id) else { return };
        self.dirty = true;
        let shards = proposal.writes.shards();
        shards.iter().for_each(|(_, record)| _ = self.proposed.remove(&record.shard()));
        match outcome {
            CasOutcome::Done { mod_revision } => {
                self.written(mod_revision, proposal.writes);
                proposal.decisions.into_iter().for_each(|decision| turn.log(decision));
            }
            CasOutcome::Failed | CasOutcome::Unknown => {
                if shards.is_empty() {
                    self.paused_until = turn.now.plus_ms(self.timing.pause_ms);
                }
                let resting = match self.lists.in_flight {
                    Some(_) => &mut self.resting.next,
                    None => &mut self.resting.now,
                };
                resting.extend(shards.iter().map(|(_, record)| record.shard()));
                if outcome == CasOutcome::Failed {
                    let failed = shards.iter().map(|(at, record)| (record.shard(), *at));
                    self.resting.failed.extend(failed);
                }
                self.list(turn);
            }
        }
    }

    /// Applies a successful proposal to the known records, ahead of the watch.
    fn written(&mut self, revision: u64, writes: Writes) {
        match writes {
            Writes::Meta(value) => {
                let kept = AtRevision { value, created: revision, modified: revision };
                self.records.changed(revision, RecordChange::Meta(kept));
            }
            Writes::Store { store, record: value, .. } => {
                let created = self.records.stores.get(store).map_or(revision, |kept| kept.created);
                let kept = AtRevision { value, created, modified: revision };
                self.records.changed(revision, RecordChange::Store(store, Some(kept)));
            }
            Writes::Shards(shards) => {
                shards.into_iter().for_each(|(_, value)| self.shard_written(revision, value));
            }
            Writes::AcceptedLoss(accepted) => {
                let AcceptedLoss { record, intent, .. } = *accepted;
                if intent.is_some() {
                    self.records.changed(revision, RecordChange::Promote(record.shard(), None));
                }
                self.shard_written(revision, record);
            }
        }
    }

    fn shard_written(&mut self, revision: u64, value: ShardRecord) {
        let shard = value.shard();
        let created = self.records.shards.get(shard).map_or(revision, |kept| kept.created);
        let kept = AtRevision { value, created, modified: revision };
        self.records.changed(revision, RecordChange::Shard(shard, Some(kept)));
        self.singly.remove(&shard);
    }

    // ---- reviewing -----------------------------------------------------------------------------

    pub(super) fn review(&mut self, turn: &mut CoordinatorTurn<'_>) {
        self.review_lists(turn);
        if !self.lists.listed {
            return;
        }
        if self.dirty || turn.now >= self.next_review {
            self.health.set_watched(turn.now, &self.processes());
        }
        self.dirty |= self.health.send_due_probes(turn);
        self.all_probed |= self.health.all_probed();
        self.review_rounds(turn);
        let due = turn.now >= self.next_review;
        if !self.dirty && !due {
            return;
        }
        if std::mem::take(&mut self.dirty) {
            self.upkeep.mark_dirty();
        }
        self.next_review = turn.now.plus_ms(self.timing.review_every_ms);
        if !self.agrees(turn) || self.is_paused(turn.now) {
            return;
        }
        self.bootstrap(turn);
        if self.all_probed {
            self.log_deaths(turn);
            self.review_needs(turn);
            self.remove_dead(turn);
            self.review_stores(turn);
            self.plan(turn);
        }
    }

    /// Requests a full review.
    pub(super) fn mark_dirty(&mut self) {
        self.dirty = true;
    }

    /// The newest process of every store that is not gone for good.
    fn processes(&self) -> Vec<StoreBoot> {
        let newest = |(store, _): (StoreId, _)| {
            Some(StoreBoot { store, boot: self.records.newest_boot(store)? })
        };
        self.records.stores.iter().filter_map(newest).collect()
    }

    fn log_deaths(&mut self, turn: &mut CoordinatorTurn<'_>) {
        let records = &self.records;
        if self.health.log_changes(turn, |store| records.is_registered(store)) {
            self.upkeep.note_disruption(turn.now);
        }
    }

    pub(super) fn next_deadline(&self, settings: &Settings) -> Now {
        let list = match self.lists.in_flight {
            Some((_, since)) => since.plus_ms(self.timing.list_timeout_ms),
            None => self.lists.next,
        };
        if !self.lists.listed {
            return list;
        }
        let health = self.health.next_deadline(settings.probe_timeout_ms);
        let rounds = self.promotions.next_deadline();
        [Some(list), Some(self.next_review), health, rounds]
            .into_iter()
            .flatten()
            .min()
            .unwrap_or(list)
    }
}
