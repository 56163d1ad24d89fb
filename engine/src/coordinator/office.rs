//! What a leading coordinator keeps, and the order in which it looks at things.
//!
//! Proposals live here. A shard takes part in at most one at a time; when one failed, or nobody knows
//! whether it did, its shards *rest* until a list begun afterwards has come back. Those whose record
//! had moved go *singly* from then on, so that one busy record does not hold up a whole transaction.

use std::collections::{BTreeMap, BTreeSet};

use crate::config::ShardConfig;
use crate::coordinator::health::Health;
use crate::coordinator::promotion::Promotions;
use crate::coordinator::records::Records;
use crate::coordinator::reports::Reports;
use crate::coordinator::story::{Story, Waits};
use crate::coordinator::upkeep::Upkeep;
use crate::coordinator::{
    Accepted, Change, Effect, Event, Kept, Listing, Settings, Timing, Turn, Writes,
};
use crate::ids::{Now, ShardId, StoreBoot, StoreId};
use crate::node::CasOutcome;
use crate::records::Meta;

#[derive(Debug)]
pub(super) struct Office {
    term: u64,
    pub(super) timing: Timing,
    pub(super) records: Records,
    pub(super) health: Health,
    pub(super) reports: Reports,
    pub(super) promotions: Promotions,
    pub(super) upkeep: Upkeep,

    lists: Lists,
    proposals: BTreeMap<u64, Proposal>,
    /// The shards of those.
    proposed: BTreeSet<ShardId>,
    resting: Resting,
    singly: BTreeSet<ShardId>,
    /// No proposals before this.
    paused_until: Now,

    /// Every process has had its time to answer once: until then nobody is missed.
    settled: bool,
    dirty: bool,
    next_look: Now,
}

#[derive(Debug, Default)]
struct Lists {
    /// One has come back: the records are all there.
    listed: bool,
    under_way: Option<(u64, Now)>,
    /// Another must begin when that one is back.
    again: bool,
    next: Now,
}

/// Shards whose last proposal did not simply succeed.
#[derive(Debug, Default)]
struct Resting {
    /// Until the list that is under way is back, or the next one if none is.
    now: BTreeSet<ShardId>,
    /// Until the one after it is.
    next: BTreeSet<ShardId>,
    /// What failed proposals had compared.
    failed: Vec<(ShardId, u64)>,
}

#[derive(Debug)]
struct Proposal {
    writes: Writes,
    stories: Vec<Story>,
}

/// One shard's part of a proposal: what to write, and what to tell once it is written.
#[derive(Debug)]
pub(super) struct Write {
    pub(super) config: ShardConfig,
    pub(super) story: Option<Story>,
}

impl Office {
    pub(super) fn new(term: u64, turn: &mut Turn<'_>) -> Self {
        let timing = turn.settings.timing;
        let mut office = Self {
            term,
            timing,
            records: Records::default(),
            health: Health::new(timing),
            reports: Reports::new(timing.report_ms),
            promotions: Promotions::default(),
            upkeep: Upkeep::default(),
            lists: Lists::default(),
            proposals: BTreeMap::new(),
            proposed: BTreeSet::new(),
            resting: Resting::default(),
            singly: BTreeSet::new(),
            paused_until: turn.now,
            settled: false,
            dirty: true,
            next_look: turn.now,
        };
        office.list(turn);
        office
    }

    pub(super) fn term(&self) -> u64 {
        self.term
    }

    pub(super) fn is_listed(&self) -> bool {
        self.lists.listed
    }

    pub(super) fn waits_for(&self) -> Option<Waits> {
        self.upkeep.waits
    }

    pub(super) fn meta(&self) -> Option<&Meta> {
        Some(&self.records.meta.as_ref()?.value)
    }

    pub(super) fn min_in_sync(&self) -> usize {
        self.meta().map_or(usize::MAX, |meta| usize::from(meta.min_in_sync))
    }

    // ---- events --------------------------------------------------------------------------------

    pub(super) fn on(&mut self, turn: &mut Turn<'_>, event: Event) {
        match event {
            Event::Tick | Event::Elected { .. } | Event::Deposed => {}
            Event::Listed { list, listing } => self.on_listed(turn, list, listing),
            Event::Changed { revision, change } => self.on_changed(turn, revision, change),
            Event::WatchBroke => self.list(turn),
            Event::Proposed { proposal, outcome } => self.on_proposed(turn, proposal, outcome),
            Event::Probed { probe, result } => {
                self.dirty |= self.health.probed(turn, probe, result);
            }
            Event::Gathered { gather, store, ends } => self.on_gathered(turn, gather, store, ends),
            Event::SteppedDown { shard, epoch, end } => {
                self.on_stepped_down(turn, shard, epoch, end)
            }
            Event::Reported { from, report } => {
                for &store in &report.silent {
                    self.health.blame(turn.now, store);
                }
                self.dirty |= report.leaving && self.health.leaves(from);
                self.dirty |= self.reports.heard(turn.now, from, report);
            }
            Event::GatewayReported { suspects } => {
                for store in suspects {
                    self.health.blame(turn.now, store);
                }
                self.dirty = true;
            }
        }
    }

    fn on_changed(&mut self, turn: &mut Turn<'_>, revision: u64, change: Change) {
        let left = match change {
            Change::Node(store, None) => Some(store),
            _ => None,
        };
        let came = matches!(change, Change::Node(_, Some(_)));
        if self.records.changed(revision, change) {
            self.dirty = true;
            if came {
                self.upkeep.newcomer(turn.now);
            }
            if let Some(store) = left {
                self.health.ask(turn.now, store);
            }
        }
    }

    // ---- reading -------------------------------------------------------------------------------

    /// Asks for a list that begins now, or as soon as the one under way is back.
    fn list(&mut self, turn: &mut Turn<'_>) {
        if self.lists.under_way.is_some() {
            self.lists.again = true;
            return;
        }
        let list = turn.fresh_id();
        self.lists.under_way = Some((list, turn.now));
        self.lists.again = false;
        self.lists.next = turn.now.plus_ms(turn.settings.relist_every_ms);
        // It begins later than anything that rests so far.
        self.resting.now.append(&mut self.resting.next);
        turn.effects.push(Effect::List { list });
    }

    fn on_listed(&mut self, turn: &mut Turn<'_>, list: u64, listing: Option<Listing>) {
        if self.lists.under_way.is_none_or(|(under_way, _)| under_way != list) {
            return;
        }
        self.lists.under_way = None;
        let Some(listing) = listing else {
            self.lists.next = turn.now.plus_ms(self.timing.list_retry_ms);
            return;
        };
        self.records.listed(listing);
        self.dirty = true;
        self.resting.now.clear();
        self.compare_failed(turn);
        if !std::mem::replace(&mut self.lists.listed, true) {
            self.upkeep.newcomer(turn.now);
            turn.tell(Story::TookOffice {
                term: self.term,
                stores: self.records.stores.len(),
                shards: self.records.shards.len(),
            });
        }
        if self.lists.again {
            self.list(turn);
        }
    }

    /// Which records had moved, of those whose proposal failed?
    fn compare_failed(&mut self, turn: &mut Turn<'_>) {
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

    fn review_lists(&mut self, turn: &mut Turn<'_>) {
        match self.lists.under_way {
            Some((_, since)) if turn.now >= since.plus_ms(self.timing.list_timeout_ms) => {
                self.lists.under_way = None;
                self.list(turn);
            }
            None if turn.now >= self.lists.next => self.list(turn),
            _ => {}
        }
    }

    // ---- writing -------------------------------------------------------------------------------

    /// Nothing is to be proposed for the shard now: something is under way, or not settled.
    pub(super) fn is_busy(&self, shard: ShardId) -> bool {
        self.resting.now.contains(&shard)
            || self.resting.next.contains(&shard)
            || self.promotions.is_in_round(shard)
            || self.proposed.contains(&shard)
    }

    pub(super) fn is_paused(&self, now: Now) -> bool {
        now < self.paused_until
    }

    /// Writes shard records in as few transactions as may be.
    pub(super) fn propose_shards(&mut self, turn: &mut Turn<'_>, writes: Vec<Write>) {
        let single = |write: &Write| self.singly.contains(&write.config.shard());
        let (single, mut together): (Vec<Write>, Vec<Write>) = writes.into_iter().partition(single);
        let mut transactions: Vec<Vec<Write>> = single.into_iter().map(|one| vec![one]).collect();
        while !together.is_empty() {
            let rest = together.split_off(together.len().min(turn.settings.shards_per_txn));
            transactions.push(std::mem::replace(&mut together, rest));
        }
        for transaction in transactions {
            let mut stories = Vec::new();
            let mut shards = Vec::new();
            for Write { config, story } in transaction {
                let known = self.records.shards.get(config.shard());
                shards.push((known.map_or(0, |kept| kept.modified), config));
                stories.extend(story);
            }
            self.propose(turn, Writes::Shards(shards), stories);
        }
    }

    pub(super) fn propose(&mut self, turn: &mut Turn<'_>, writes: Writes, stories: Vec<Story>) {
        let proposal = turn.fresh_id();
        self.proposed.extend(writes.shards().iter().map(|(_, config)| config.shard()));
        self.proposals.insert(proposal, Proposal { writes: writes.clone(), stories });
        turn.effects.push(Effect::Propose { proposal, term: self.term, writes });
    }

    /// A write of this record is under way.
    pub(super) fn is_proposing(&self, record: impl Fn(&Writes) -> bool) -> bool {
        self.proposals.values().any(|proposal| record(&proposal.writes))
    }

    fn on_proposed(&mut self, turn: &mut Turn<'_>, id: u64, outcome: CasOutcome) {
        let Some(proposal) = self.proposals.remove(&id) else { return };
        self.dirty = true;
        let shards = proposal.writes.shards();
        shards.iter().for_each(|(_, config)| _ = self.proposed.remove(&config.shard()));
        match outcome {
            CasOutcome::Done { mod_revision } => {
                self.written(mod_revision, proposal.writes);
                proposal.stories.into_iter().for_each(|story| turn.tell(story));
            }
            CasOutcome::Failed | CasOutcome::Unknown => {
                if shards.is_empty() {
                    self.paused_until = turn.now.plus_ms(self.timing.pause_ms);
                }
                let resting = match self.lists.under_way {
                    Some(_) => &mut self.resting.next,
                    None => &mut self.resting.now,
                };
                resting.extend(shards.iter().map(|(_, config)| config.shard()));
                if outcome == CasOutcome::Failed {
                    let failed = shards.iter().map(|(at, config)| (config.shard(), *at));
                    self.resting.failed.extend(failed);
                }
                self.list(turn);
            }
        }
    }

    /// What was proposed stands.
    fn written(&mut self, revision: u64, writes: Writes) {
        match writes {
            Writes::Meta(value) => {
                let kept = Kept { value, created: revision, modified: revision };
                self.records.changed(revision, Change::Meta(kept));
            }
            Writes::Store { store, record: value, .. } => {
                let created = self.records.stores.get(store).map_or(revision, |kept| kept.created);
                let kept = Kept { value, created, modified: revision };
                self.records.changed(revision, Change::Store(store, Some(kept)));
            }
            Writes::Shards(shards) => {
                shards.into_iter().for_each(|(_, value)| self.shard_written(revision, value));
            }
            Writes::Accepted(accepted) => {
                let Accepted { config, intent, .. } = *accepted;
                if intent.is_some() {
                    self.records.changed(revision, Change::Promote(config.shard(), None));
                }
                self.shard_written(revision, config);
            }
        }
    }

    fn shard_written(&mut self, revision: u64, value: ShardConfig) {
        let shard = value.shard();
        let created = self.records.shards.get(shard).map_or(revision, |kept| kept.created);
        let kept = Kept { value, created, modified: revision };
        self.records.changed(revision, Change::Shard(shard, Some(kept)));
        self.singly.remove(&shard);
    }

    // ---- looking -------------------------------------------------------------------------------

    pub(super) fn review(&mut self, turn: &mut Turn<'_>) {
        self.review_lists(turn);
        if !self.lists.listed {
            return;
        }
        if self.dirty || turn.now >= self.next_look {
            self.health.expect(turn.now, &self.processes());
        }
        self.dirty |= self.health.look(turn);
        self.settled |= self.health.is_settled();
        self.review_rounds(turn);
        let due = turn.now >= self.next_look;
        if !self.dirty && !due {
            return;
        }
        if std::mem::take(&mut self.dirty) {
            self.upkeep.news();
        }
        self.next_look = turn.now.plus_ms(self.timing.look_every_ms);
        if !self.agrees(turn) || self.is_paused(turn.now) {
            return;
        }
        self.bootstrap(turn);
        if self.settled {
            self.tell_health(turn);
            self.review_needs(turn);
            self.remove_dead(turn);
            self.review_stores(turn);
            self.plan(turn);
        }
    }

    /// Something changed that only a look at everything can judge.
    pub(super) fn look_now(&mut self) {
        self.dirty = true;
    }

    /// The newest process of every store that may come back.
    fn processes(&self) -> Vec<StoreBoot> {
        let newest = |(store, _): (StoreId, _)| {
            Some(StoreBoot { store, boot: self.records.newest_boot(store)? })
        };
        self.records.stores.iter().filter_map(newest).collect()
    }

    fn tell_health(&mut self, turn: &mut Turn<'_>) {
        let records = &self.records;
        if self.health.tell(turn, |store| records.is_registered(store)) {
            self.upkeep.trouble(turn.now);
        }
    }

    pub(super) fn next_deadline(&self, settings: &Settings) -> Now {
        let list = match self.lists.under_way {
            Some((_, since)) => since.plus_ms(self.timing.list_timeout_ms),
            None => self.lists.next,
        };
        if !self.lists.listed {
            return list;
        }
        let health = self.health.next_deadline(settings.probe_timeout_ms);
        let rounds = self.promotions.next_deadline();
        [Some(list), Some(self.next_look), health, rounds]
            .into_iter()
            .flatten()
            .min()
            .unwrap_or(list)
    }
}
