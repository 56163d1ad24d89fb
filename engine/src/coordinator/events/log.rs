//! The event log of one coordinator: the records as they were last, and what changed in them.

use std::collections::{BTreeMap, BTreeSet};

use crate::coordinator::decision::{Cause, Decision, PromotionReason};
use crate::coordinator::events::differences::{
    StoreFacts, loss, registration, shard_events, split, store_events,
};
use crate::coordinator::events::{EventFacts, EventHistory, EventKind, EventReason};
use crate::coordinator::{AtRevision, RecordChange};
use crate::ids::{Boot, Epoch, ShardId, StoreBoot, StoreId, TimeMs};
use crate::records::{
    NodeRecord, PauseIntent, PromoteIntent, RemoveIntent, StoreRecord, StoreStatus,
};
use crate::shard_record::ShardRecord;

/// All records of one kind, as a watch delivers them at its start and after a failure.
#[derive(Clone, Debug)]
pub enum RecordList {
    /// All stores.
    Stores(Vec<(StoreId, AtRevision<StoreRecord>)>),
    /// All registrations.
    Nodes(Vec<(StoreId, AtRevision<NodeRecord>)>),
    /// All shards.
    Shards(Vec<AtRevision<ShardRecord>>),
    /// All intents to remove a store.
    Removes(Vec<(StoreId, AtRevision<RemoveIntent>)>),
    /// All intents to have a shard led with a loss.
    Promotes(Vec<(ShardId, AtRevision<PromoteIntent>)>),
    /// The intent to move nothing for balance.
    Pause(Option<AtRevision<PauseIntent>>),
}

/// The log of one coordinator. See the module above.
#[derive(Debug)]
pub struct EventLog {
    history: EventHistory,
    known: KnownRecords,
    /// The leader's knowledge of promotions whose record has not come by the watch yet.
    promotions: BTreeMap<(ShardId, Epoch), KnownPromotion>,
    /// The kinds of records of which a first list has come: before that, a record is no news.
    listed: BTreeSet<RecordKind>,
    /// The time of the last of these first lists: the log is complete from then on.
    since: TimeMs,
}

/// The kinds of records whose changes are events.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
enum RecordKind {
    Store,
    Node,
    Shard,
    Remove,
    Promote,
    Pause,
}

/// The facts that a decision of the leader adds to the record of a promotion.
#[derive(Clone, Debug)]
struct KnownPromotion {
    reason: Option<EventReason>,
    /// A loss was accepted, by this operator if there was one.
    loss: Option<Option<String>>,
}

/// The records as they were last.
#[derive(Debug, Default)]
struct KnownRecords {
    stores: BTreeMap<StoreId, AtRevision<StoreRecord>>,
    nodes: BTreeMap<StoreId, AtRevision<NodeRecord>>,
    /// The boot of each store that was registered last.
    last_boots: BTreeMap<StoreId, Boot>,
    shards: BTreeMap<ShardId, AtRevision<ShardRecord>>,
    removes: BTreeMap<StoreId, AtRevision<RemoveIntent>>,
    promotes: BTreeMap<ShardId, AtRevision<PromoteIntent>>,
    pause: BTreeMap<(), AtRevision<PauseIntent>>,
    /// The findings of this process's probes, while it leads.
    deaths: BTreeMap<StoreBoot, EventReason>,
}

impl EventLog {
    /// An empty log that keeps events of at most `bytes_max` bytes.
    pub fn new(now: TimeMs, bytes_max: usize) -> Self {
        Self {
            history: EventHistory::new(bytes_max),
            known: KnownRecords::default(),
            promotions: BTreeMap::new(),
            listed: BTreeSet::new(),
            since: now,
        }
    }

    /// The events that are kept.
    pub fn history(&self) -> &EventHistory {
        &self.history
    }

    /// The time since which no event is missing, but for those that were dropped for want of room.
    pub fn since(&self) -> TimeMs {
        self.since
    }

    /// Takes all records of one kind. Their differences from what is known are events, unless the
    /// list is the first one.
    pub fn on_list(&mut self, now: TimeMs, list: RecordList) {
        let kind = list.kind();
        let is_first = self.listed.insert(kind);
        if is_first {
            self.since = self.since.max(now);
        }
        for (revision, change) in self.known.changes(list) {
            self.take(now, revision, &change, is_first);
        }
    }

    /// Takes the change of one record.
    pub fn on_change(&mut self, now: TimeMs, revision: u64, change: &RecordChange) {
        self.take(now, revision, change, false);
    }

    /// Takes what the leader decided or found, if it adds anything to the records.
    pub fn on_decision(&mut self, now: TimeMs, decision: &Decision) {
        let facts = match decision {
            Decision::Died { process, why } => {
                let reason = cause_reason(*why);
                self.known.deaths.insert(*process, reason);
                let kind = match why {
                    Cause::Leaving => EventKind::NodeStopping,
                    _ => EventKind::NodeDead,
                };
                let reason = (*why != Cause::Leaving).then_some(reason);
                EventFacts::of_node(kind, process.store, reason)
            }
            Decision::Returned(process) => {
                self.known.deaths.retain(|dead, _| dead.store != process.store);
                EventFacts::of_node(EventKind::NodeAlive, process.store, None)
            }
            Decision::Leaderless { shard, .. } => {
                EventFacts { shard: Some(*shard), ..EventFacts::new(EventKind::NoPrimary) }
            }
            Decision::Guarded { away, .. } => {
                EventFacts { count: Some(*away as u64), ..EventFacts::new(EventKind::GuardHeld) }
            }
            Decision::Unguarded => EventFacts::new(EventKind::GuardEnded),
            Decision::Promoted { shard, epoch, why, .. } => {
                let reason = promotion_reason(*why);
                return self.on_promotion(*shard, *epoch, KnownPromotion { reason, loss: None });
            }
            Decision::LossAccepted(record) => {
                let by = record.accepted_by.as_ref().map(|operator| operator.name.clone());
                let known = KnownPromotion { reason: Some(EventReason::Loss), loss: Some(by) };
                return self.on_promotion(record.shard, record.epoch, known);
            }
            // The records show all others.
            _ => return,
        };
        self.history.push(now, 0, facts);
    }

    /// Takes the election of this coordinator, or its end (`None`).
    pub fn on_election(&mut self, now: TimeMs, term: Option<u64>, name: &str) {
        // Another leader probes from now on; what this one found is outdated.
        self.known.deaths.clear();
        self.promotions.clear();
        if let Some(term) = term {
            let by = Some(name.to_owned());
            self.history.push(
                now,
                term,
                EventFacts { by, ..EventFacts::new(EventKind::LeaderElected) },
            );
        }
    }

    /// Adds what is known of a promotion to its event, or keeps it until the record comes.
    fn on_promotion(&mut self, shard: ShardId, epoch: Epoch, known: KnownPromotion) {
        let is_here = self.known.shards.get(&shard).is_some_and(|kept| kept.value.epoch >= epoch);
        if !is_here {
            self.promotions.insert((shard, epoch), known);
            return;
        }
        let is_it = |kind| {
            move |what: &EventFacts| {
                (what.kind, what.shard, what.epoch) == (kind, Some(shard), Some(epoch))
            }
        };
        if let Some(what) = self.history.newest(is_it(EventKind::PrimaryChanged)) {
            explain(what, &known);
        }
        if let Some(what) = self.history.newest(is_it(EventKind::LossAccepted)) {
            explain(what, &known);
        }
    }

    fn take(&mut self, now: TimeMs, revision: u64, change: &RecordChange, is_first: bool) {
        let events = match change {
            RecordChange::Store(id, kept) => self.known.on_store(*id, kept.as_ref()),
            RecordChange::Node(id, kept) => self.known.on_node(*id, revision, kept.as_ref()),
            RecordChange::Shard(id, Some(kept)) => self.on_shard(*id, kept),
            RecordChange::Remove(id, kept) => self.known.on_remove(*id, revision, kept.as_ref()),
            RecordChange::Promote(id, kept) => self.on_promote(*id, revision, kept.as_ref()),
            RecordChange::Pause(kept) => self.known.on_pause(revision, kept.as_ref()),
            RecordChange::Shard(_, None)
            | RecordChange::Meta(_)
            | RecordChange::Name(..)
            | RecordChange::Drain(..) => vec![],
        };
        if is_first {
            return;
        }
        for (revision, what) in events {
            let is_placement = what.kind == EventKind::ShardsPlaced;
            match self.history.last_at(revision).filter(|_| is_placement) {
                // One transaction places many shards: that is one event.
                Some(last) => last.count = last.count.map(|count| count + 1),
                None => self.history.push(now, revision, what),
            }
        }
    }

    fn on_shard(&mut self, id: ShardId, kept: &AtRevision<ShardRecord>) -> Vec<(u64, EventFacts)> {
        let before = match self.known.shards.get(&id) {
            Some(known) if known.modified >= kept.modified => return vec![],
            Some(known) => known.value.clone(),
            None => {
                let is_child = self.is_child_of_split(id, kept.modified);
                self.known.shards.insert(id, kept.clone());
                if is_child {
                    return vec![(kept.modified, split(&kept.value))];
                }
                let count = Some(1);
                let placed = EventFacts { count, ..EventFacts::new(EventKind::ShardsPlaced) };
                return vec![(kept.modified, placed)];
            }
        };
        let mut events = shard_events(&before, &kept.value, &self.known);
        if let Some(known) = self.promotions.remove(&(id, kept.value.epoch)) {
            let is_shown = events.iter().any(|what| what.kind == EventKind::LossAccepted);
            if known.loss.is_some() && !is_shown {
                events.insert(0, loss(&kept.value));
            }
            events.iter_mut().for_each(|what| explain(what, &known));
        }
        self.promotions.retain(|(shard, epoch), _| *shard != id || *epoch > kept.value.epoch);
        self.known.shards.insert(id, kept.clone());
        events.into_iter().map(|what| (kept.modified, what)).collect()
    }

    /// Returns whether a shard whose first record was written at this revision is the right half of
    /// a split: the one before it ends later, as far as is known, or has ended earlier since that
    /// revision.
    fn is_child_of_split(&self, id: ShardId, revision: u64) -> bool {
        let before = self.known.shards.range(..id).next_back();
        before.is_some_and(|(_, kept)| {
            let was_split = kept.modified == revision && kept.created < revision;
            kept.value.slots.hi >= id.0 || was_split
        })
    }

    /// The transaction of an accepted loss deletes the operator's intent. For a set of one member,
    /// its shard's record alone does not show the loss.
    fn on_promote(
        &mut self,
        id: ShardId,
        revision: u64,
        kept: Option<&AtRevision<PromoteIntent>>,
    ) -> Vec<(u64, EventFacts)> {
        let Some(gone) = replace(&mut self.known.promotes, id, revision, kept) else {
            return vec![];
        };
        let Some(shard) = self.known.shards.get(&id) else { return vec![] };
        let (Some(intent), true) = (gone, shard.modified == revision && kept.is_none()) else {
            return vec![];
        };
        let epoch = shard.value.epoch;
        let known = KnownPromotion {
            reason: Some(EventReason::Loss),
            loss: Some(Some(intent.value.from.name)),
        };
        let is_it = |what: &EventFacts| {
            (what.kind, what.shard, what.epoch) == (EventKind::LossAccepted, Some(id), Some(epoch))
        };
        let is_shown = self.history.newest(is_it).is_some();
        let mut missing = loss(&shard.value);
        explain(&mut missing, &known);
        self.on_promotion(id, epoch, known);
        if is_shown { vec![] } else { vec![(revision, missing)] }
    }
}

/// Adds what is known of a promotion to an event of its record.
fn explain(what: &mut EventFacts, known: &KnownPromotion) {
    match what.kind {
        EventKind::PrimaryChanged => {
            // A hand-over is explained by the status of the former primary, if that is known.
            what.reason = known.reason.or(what.reason);
        }
        EventKind::LossAccepted => what.by = known.loss.clone().flatten().or(what.by.take()),
        _ => {}
    }
}

impl KnownRecords {
    /// The changes that lead from what is known to a list, each with its revision. A record that
    /// the list lacks was deleted: at which revision is not known, so it is 0.
    fn changes(&self, list: RecordList) -> Vec<(u64, RecordChange)> {
        match list {
            RecordList::Stores(all) => changes(&self.stores, all, RecordChange::Store),
            RecordList::Nodes(all) => changes(&self.nodes, all, RecordChange::Node),
            RecordList::Shards(all) => {
                let all = all.into_iter().map(|kept| (kept.value.shard(), kept)).collect();
                changes(&self.shards, all, RecordChange::Shard)
            }
            RecordList::Removes(all) => changes(&self.removes, all, RecordChange::Remove),
            RecordList::Promotes(all) => changes(&self.promotes, all, RecordChange::Promote),
            RecordList::Pause(one) => {
                let all = one.into_iter().map(|kept| ((), kept)).collect();
                changes(&self.pause, all, |(), kept| RecordChange::Pause(kept))
            }
        }
    }

    fn on_store(
        &mut self,
        id: StoreId,
        kept: Option<&AtRevision<StoreRecord>>,
    ) -> Vec<(u64, EventFacts)> {
        // The record of a store is never deleted.
        let Some(kept) = kept else { return vec![] };
        let before = match self.stores.get(&id) {
            Some(known) if known.modified >= kept.modified => return vec![],
            known => known.map(|known| known.value.clone()),
        };
        self.stores.insert(id, kept.clone());
        let event = before.and_then(|before| store_events(id, &before, &kept.value));
        event.map(|what| (kept.modified, what)).into_iter().collect()
    }

    fn on_node(
        &mut self,
        id: StoreId,
        revision: u64,
        kept: Option<&AtRevision<NodeRecord>>,
    ) -> Vec<(u64, EventFacts)> {
        let Some(former) = replace(&mut self.nodes, id, revision, kept) else { return vec![] };
        match (former, kept) {
            (former, Some(kept)) if former.as_ref().is_none_or(|it| it.created != kept.created) => {
                let last = self.last_boots.insert(id, kept.value.boot);
                vec![(kept.created, registration(id, last, kept.value.boot))]
            }
            // The registration that is gone identifies the event: a list does not show when.
            (Some(former), None) => {
                vec![(former.created, EventFacts::of_node(EventKind::NodeLeft, id, None))]
            }
            _ => vec![],
        }
    }

    fn on_remove(
        &mut self,
        id: StoreId,
        revision: u64,
        kept: Option<&AtRevision<RemoveIntent>>,
    ) -> Vec<(u64, EventFacts)> {
        let news = replace(&mut self.removes, id, revision, kept);
        let (Some(_), Some(kept)) = (news, kept) else { return vec![] };
        let reason = Some(EventReason::Operator);
        let by = Some(kept.value.from.name.clone());
        let what = EventFacts::of_node(EventKind::RemovalRequested, id, reason);
        vec![(kept.modified, EventFacts { by, ..what })]
    }

    fn on_pause(
        &mut self,
        revision: u64,
        kept: Option<&AtRevision<PauseIntent>>,
    ) -> Vec<(u64, EventFacts)> {
        let Some(former) = replace(&mut self.pause, (), revision, kept) else { return vec![] };
        let reason = Some(EventReason::Operator);
        match (former, kept) {
            (None, Some(kept)) => {
                let by = Some(kept.value.from.name.clone());
                let what = EventFacts { reason, by, ..EventFacts::new(EventKind::MovesPaused) };
                vec![(kept.created, what)]
            }
            (Some(former), None) => {
                let what = EventFacts { reason, ..EventFacts::new(EventKind::MovesResumed) };
                vec![(former.created, what)]
            }
            _ => vec![],
        }
    }
}

impl StoreFacts for KnownRecords {
    fn status(&self, store: StoreId) -> Option<StoreStatus> {
        self.stores.get(&store).map(|kept| kept.value.status)
    }

    fn registered(&self, store: StoreId) -> Option<Boot> {
        self.nodes.get(&store).map(|kept| kept.value.boot)
    }

    fn death(&self, store: StoreId) -> Option<EventReason> {
        self.deaths.iter().rev().find(|(dead, _)| dead.store == store).map(|(_, reason)| *reason)
    }
}

impl RecordList {
    fn kind(&self) -> RecordKind {
        match self {
            Self::Stores(_) => RecordKind::Store,
            Self::Nodes(_) => RecordKind::Node,
            Self::Shards(_) => RecordKind::Shard,
            Self::Removes(_) => RecordKind::Remove,
            Self::Promotes(_) => RecordKind::Promote,
            Self::Pause(_) => RecordKind::Pause,
        }
    }
}

/// Takes the state of one record. Returns the former one, if there was one; `None` if the new state
/// is no news.
fn replace<K: Ord, V: Clone>(
    known: &mut BTreeMap<K, AtRevision<V>>,
    id: K,
    revision: u64,
    kept: Option<&AtRevision<V>>,
) -> Option<Option<AtRevision<V>>> {
    let former = known.get(&id).map_or(0, |former| former.modified);
    match kept {
        Some(kept) if kept.modified > former => Some(known.insert(id, kept.clone())),
        None if former > 0 && (revision == 0 || revision >= former) => Some(known.remove(&id)),
        _ => None,
    }
}

/// The changes that lead from the known records of one kind to a list of them.
fn changes<K: Ord + Clone, V>(
    known: &BTreeMap<K, AtRevision<V>>,
    all: Vec<(K, AtRevision<V>)>,
    change: impl Fn(K, Option<AtRevision<V>>) -> RecordChange,
) -> Vec<(u64, RecordChange)> {
    let listed: BTreeSet<&K> = all.iter().map(|(id, _)| id).collect();
    let gone: Vec<K> = known.keys().filter(|id| !listed.contains(id)).cloned().collect();
    let deleted = gone.into_iter().map(|id| (0, id, None));
    let kept = all.into_iter().map(|(id, kept)| (kept.modified, id, Some(kept)));
    deleted.chain(kept).map(|(revision, id, kept)| (revision, change(id, kept))).collect()
}

fn cause_reason(cause: Cause) -> EventReason {
    match cause {
        Cause::Refused => EventReason::Refused,
        Cause::Replaced => EventReason::Replaced,
        Cause::Silent => EventReason::Silent,
        Cause::DiskStalled => EventReason::DiskStalled,
        Cause::Leaving => EventReason::Leaving,
    }
}

/// The reason of a promotion. A hand-over has several, which the records show better.
fn promotion_reason(why: PromotionReason) -> Option<EventReason> {
    match why {
        PromotionReason::Dead(cause) => Some(cause_reason(cause)),
        PromotionReason::Restarted => Some(EventReason::Restarted),
        PromotionReason::Gone => Some(EventReason::Gone),
        PromotionReason::Resigned => Some(EventReason::Resigned),
        PromotionReason::CutOff => Some(EventReason::CutOff),
        PromotionReason::HandedOver => None,
    }
}
