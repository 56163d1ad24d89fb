//! The state of a leading coordinator: which part an event goes to, and the order of the reviews.
//!
//! Each part owns its state. A part gets the turn, and what it may use of the others: most reviews
//! get a [`ReviewTurn`], in which the observed cluster can only be read.

use crate::coordinator::bootstrap::{ClusterBootstrap, agrees};
use crate::coordinator::dead_members::remove_dead;
use crate::coordinator::decision::{Decision, PlacementWait};
use crate::coordinator::lists::ListRequests;
use crate::coordinator::observed::ObservedCluster;
use crate::coordinator::planner::PlanView;
use crate::coordinator::planning::Planning;
use crate::coordinator::promotion::Promotions;
use crate::coordinator::proposals::{LeaderProposals, PendingProposal};
use crate::coordinator::review::ReviewTurn;
use crate::coordinator::store_status::StoreStatuses;
use crate::coordinator::{CoordinatorTurn, Event, Listing, MovesStatus, RecordChange, Settings};
use crate::ids::{Now, StoreId};
use crate::message::ShardEnd;
use crate::node::CasOutcome;

/// The state of one term, from the election to the loss of the `coordinator` key.
#[derive(Debug)]
pub(super) struct LeaderState {
    cluster: ObservedCluster,
    lists: ListRequests,
    proposals: LeaderProposals,
    promotions: Promotions,
    bootstrap: ClusterBootstrap,
    statuses: StoreStatuses,
    planning: Planning,
    /// The time of the next full review, 0 if something has changed since the last one.
    next_review: Now,
}

impl LeaderState {
    pub(super) fn new(term: u64, turn: &mut CoordinatorTurn<'_>) -> Self {
        let mut leader = Self {
            cluster: ObservedCluster::new(turn.settings.timing),
            lists: ListRequests::default(),
            proposals: LeaderProposals::new(term, turn.now),
            promotions: Promotions::default(),
            bootstrap: ClusterBootstrap::default(),
            statuses: StoreStatuses::default(),
            planning: Planning::default(),
            next_review: Now(0),
        };
        leader.list(turn);
        leader
    }

    pub(super) fn term(&self) -> u64 {
        self.proposals.term()
    }

    pub(super) fn is_listed(&self) -> bool {
        self.lists.is_listed()
    }

    pub(super) fn waits_for(&self) -> Option<PlacementWait> {
        self.bootstrap.waits_for()
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
                if self.cluster.health.on_probed(turn, probe, result) {
                    self.mark_dirty();
                }
            }
            Event::Gathered { gather, store, ends } => {
                self.on_gathered(turn, gather, store, ends.as_deref());
            }
            Event::SteppedDown { shard, epoch, end } => {
                if self.promotions.hand_overs.on_stepped_down(shard, epoch, end.is_some()) {
                    match end {
                        Some(_) => self.mark_dirty(),
                        None => self.planning.note_disruption(turn.now),
                    }
                }
            }
            Event::Reported { from, report } => {
                if self.cluster.on_report(turn.now, from, report) {
                    self.mark_dirty();
                }
            }
            Event::GatewayReported(suspects) => {
                self.cluster.suspect(turn.now, &suspects);
                self.mark_dirty();
            }
        }
    }

    fn on_changed(&mut self, turn: &mut CoordinatorTurn<'_>, revision: u64, change: RecordChange) {
        let came = matches!(change, RecordChange::Node(_, Some(_)));
        if self.cluster.changed(turn.now, revision, change) {
            self.mark_dirty();
            if came {
                self.node_joined(turn.now);
            }
        }
    }

    /// Requests a full review, and a plan in it.
    fn mark_dirty(&mut self) {
        self.next_review = Now(0);
        self.planning.mark_dirty();
    }

    fn node_joined(&mut self, now: Now) {
        self.bootstrap.node_joined(now);
        self.planning.note_disruption(now);
    }

    fn on_gathered(
        &mut self,
        turn: &mut CoordinatorTurn<'_>,
        gather: u64,
        store: StoreId,
        ends: Option<&[ShardEnd]>,
    ) {
        let mut review = ReviewTurn::new(turn, &self.cluster, &mut self.proposals);
        self.statuses.on_gathered(&mut review, gather, store, ends);
        self.promotions.on_gathered(turn.now, gather, store, ends);
    }

    // ---- reading and writing etcd --------------------------------------------------------------

    fn list(&mut self, turn: &mut CoordinatorTurn<'_>) {
        if self.lists.request(turn) {
            self.proposals.list_began();
        }
    }

    fn on_listed(&mut self, turn: &mut CoordinatorTurn<'_>, list: u64, listing: Option<Listing>) {
        let Some(listing) = self.lists.on_listed(turn, list, listing) else { return };
        self.cluster.records.listed(listing);
        self.mark_dirty();
        self.proposals.listed(turn, &self.cluster.records);
        if self.lists.note_loaded() {
            self.node_joined(turn.now);
            let records = &self.cluster.records;
            turn.log(Decision::BecameLeader {
                term: self.proposals.term(),
                stores: records.stores.len(),
                shards: records.shards.len(),
            });
        }
        if self.lists.is_wanted_again() {
            self.list(turn);
        }
    }

    fn on_proposed(&mut self, turn: &mut CoordinatorTurn<'_>, id: u64, outcome: CasOutcome) {
        let Some(proposal) = self.proposals.answered(id) else { return };
        let PendingProposal { writes, decisions } = proposal;
        self.mark_dirty();
        match outcome {
            CasOutcome::Done { mod_revision } => {
                self.proposals.succeeded(&writes);
                self.cluster.written(mod_revision, writes);
                decisions.into_iter().for_each(|decision| turn.log(decision));
            }
            CasOutcome::Failed | CasOutcome::Unknown => {
                let list_in_flight = self.lists.is_in_flight();
                self.proposals.failed(turn, &writes, outcome, list_in_flight);
                self.list(turn);
            }
        }
    }

    // ---- reviewing -----------------------------------------------------------------------------

    pub(super) fn review(&mut self, turn: &mut CoordinatorTurn<'_>) {
        if self.lists.is_due(turn) {
            self.list(turn);
        }
        if !self.lists.is_listed() {
            return;
        }
        if turn.now >= self.next_review {
            self.cluster.set_watched(turn.now);
        }
        if self.cluster.send_due_probes(turn) {
            self.mark_dirty();
        }
        let mut review = ReviewTurn::new(turn, &self.cluster, &mut self.proposals);
        self.promotions.review_rounds(&mut review);
        if turn.now < self.next_review {
            return;
        }
        self.next_review = turn.now.plus_ms(turn.settings.timing.review_every_ms);
        if agrees(turn, &self.cluster) && !self.proposals.is_paused(turn.now) {
            self.review_cluster(turn);
        }
    }

    fn review_cluster(&mut self, turn: &mut CoordinatorTurn<'_>) {
        let Self { cluster, proposals, promotions, bootstrap, statuses, planning, .. } = self;
        bootstrap.review(&mut ReviewTurn::new(turn, cluster, proposals), promotions);
        if !cluster.was_probed() {
            return;
        }
        if cluster.log_deaths(turn) {
            planning.note_disruption(turn.now);
        }
        let mut review = ReviewTurn::new(turn, cluster, proposals);
        promotions.review_needs(&mut review);
        remove_dead(&mut review, promotions);
        statuses.review(&mut review);
        if planning.begin(turn, cluster) {
            cluster.note_away(turn.now);
            planning.plan(&mut ReviewTurn::new(turn, cluster, proposals), promotions);
        }
    }

    /// The inputs of the planner, once all nodes have been probed.
    pub(super) fn plan_view(&mut self, turn: &mut CoordinatorTurn<'_>) -> Option<PlanView> {
        let Self { cluster, proposals, promotions, planning, lists, .. } = self;
        if !lists.is_listed() || !cluster.was_probed() {
            return None;
        }
        planning.view(&ReviewTurn::new(turn, cluster, proposals), promotions)
    }

    pub(super) fn moves(&self, now: Now, settings: &Settings) -> MovesStatus {
        self.planning.moves(now, settings)
    }

    pub(super) fn next_deadline(&self, settings: &Settings) -> Now {
        let list = self.lists.next_deadline(settings);
        if !self.lists.is_listed() {
            return list;
        }
        let health = self.cluster.health.next_deadline(settings.probe_timeout_ms);
        let others = [health, self.promotions.next_deadline()].into_iter().flatten();
        others.fold(list.min(self.next_review), Now::min)
    }
}
