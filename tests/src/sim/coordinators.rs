//! A coordinator: the engine's state machine, driven as production drives it.
//!
//! The driver stands for election by a create-only key under its lease, passes the events of its
//! watch to the state machine, and sends its queries to the nodes. The driver makes no decisions.

use std::collections::{BTreeMap, BTreeSet};

use engine::coordinator::{
    AcceptedLoss, AtRevision, Coordinator, Decision, Effect, Event, Listing, ProbeResult,
    RecordChange, Writes,
};
use engine::ids::{Epoch, ShardId, StoreBoot, Version};
use engine::message::{NodeQuery, NodeQueryReply};
use engine::node::CasOutcome;
use engine::records::{NameRecord, NodeRecord, PromoteIntent};

use super::checker::Violation;
use super::core::{Core, since};
use super::coverage::Path;
use super::etcd::{
    Call, Compare, EtcdKey, EtcdValue, EtcdWatchEvent, Reply, Versioned, Write, store_of,
};
use super::event::ProcessInput;
use super::late::{Late, LateItems, shuffle};
use super::place::{Place, ProcessId, name_of, place_of};

/// The period of the driver's own clock: elections and keep-alives.
const TOCK: u64 = 50_000;

pub struct CoordinatorHost {
    pub place: Place,
    pub incarnation: u32,
    running: Option<Box<RunningCoordinator>>,
}

struct RunningCoordinator {
    coordinator: Coordinator,
    started: u64,
    wake_at: Option<u64>,
    /// The effects that it was about to perform when it was paused.
    held_back: Vec<Effect>,
    late: LateItems<Late<Effect, Event>>,
    lease: Option<u64>,
    /// The term if this process leads, and when etcd last confirmed the lease.
    leads: Option<u64>,
    confirmed: u64,
    calls: BTreeMap<u64, CoordinatorCallPurpose>,
    queries: BTreeMap<u64, PendingQuery>,
    next_query: u64,
    watches: bool,
    /// The newest revision that the watch has shown: a deletion is at least as new.
    watched: u64,
}

/// The purpose of a call of etcd.
enum CoordinatorCallPurpose {
    Grant,
    Stand,
    KeepAlive,
    List(u64),
    Propose(u64),
}

/// A query to a node that is not answered yet.
enum PendingQuery {
    Probe(u64),
    Gather(u64, StoreBoot),
    StepDown(ShardId, Epoch),
}

impl CoordinatorHost {
    pub fn new(index: u8) -> Self {
        Self { place: Place::Coordinator(index), incarnation: 0, running: None }
    }

    pub fn process(&self) -> ProcessId {
        ProcessId { place: self.place, incarnation: self.incarnation }
    }

    pub fn is_down(&self) -> bool {
        self.running.is_none()
    }

    pub fn is_leading(&self) -> bool {
        self.running.as_ref().is_some_and(|running| running.coordinator.is_leading())
    }

    pub fn start(&mut self, core: &mut Core) {
        if !self.is_down() {
            return;
        }
        self.incarnation += 1;
        let mut settings = core.plan.coordinator.clone();
        settings.new_cluster = u128::from(core.rng.word());
        self.running = Some(Box::new(RunningCoordinator {
            coordinator: Coordinator::new(settings),
            started: core.clock(),
            wake_at: None,
            held_back: Vec::new(),
            late: LateItems::default(),
            lease: None,
            leads: None,
            confirmed: 0,
            calls: BTreeMap::new(),
            queries: BTreeMap::new(),
            next_query: 0,
            watches: false,
            watched: 0,
        }));
        core.input_after(1_000, self.process(), ProcessInput::Tock);
    }

    pub fn crash(&mut self, core: &mut Core) {
        self.running = None;
        core.process_died(self.process(), true);
        core.etcd_unwatch(self.process());
    }

    pub fn on(&mut self, core: &mut Core, input: ProcessInput) {
        let process = self.process();
        if let Some(running) = &mut self.running {
            CoordinatorDriver { process, running }.on_input(core, input);
        }
    }
}

struct CoordinatorDriver<'a> {
    process: ProcessId,
    running: &'a mut RunningCoordinator,
}

impl CoordinatorDriver<'_> {
    fn on_input(&mut self, core: &mut Core, input: ProcessInput) {
        match input {
            ProcessInput::Wake if self.running.wake_at != Some(core.now) => {}
            ProcessInput::Wake => {
                self.running.wake_at = None;
                self.handle(core, Event::Tick);
            }
            ProcessInput::Resumed => {
                for effect in std::mem::take(&mut self.running.held_back) {
                    self.perform(core, effect);
                }
                self.running.wake_at = None;
                self.schedule(core);
            }
            ProcessInput::Tock => self.tock(core),
            ProcessInput::Late { number } => self.late(core, number),
            ProcessInput::Watched(events) => self.watched_all(core, events),
            ProcessInput::Etcd { call, reply } => {
                if let Some(asked) = self.running.calls.remove(&call) {
                    self.etcd_reply(core, asked, reply);
                }
            }
            ProcessInput::EtcdTimeout { call } => {
                if let Some(asked) = self.running.calls.remove(&call) {
                    self.etcd_timeout(core, asked);
                }
            }
            ProcessInput::QueryReply { query, reply } => self.answered(core, query, reply),
            ProcessInput::QueryFailed { query, refused } => self.failed(core, query, refused),
            ProcessInput::Report { from: Some(from), report } => {
                self.handle(core, Event::Reported { from, report });
            }
            ProcessInput::Report { from: None, report } => {
                self.handle(core, Event::GatewayReported(report.silent));
            }
            other => unreachable!("a coordinator does not receive {other:?}"),
        }
    }

    fn handle(&mut self, core: &mut Core, event: Event) {
        let now = since(self.running.started, core.clock());
        let me = self.process.place;
        core.trace.note(core.now, || format!("{me:?} <- {event:?}"));
        let mut effects = Vec::new();
        self.running.late.handled += 1;
        self.running.coordinator.handle(now, event, &mut effects);
        for effect in &effects {
            core.trace.note(core.now, || format!("{me:?} -> {effect:?}"));
        }
        if core.plan.reorder.on {
            effects = self.reorder(core, effects);
        }
        for effect in effects {
            self.perform_or_hold(core, effect);
        }
        self.schedule(core);
    }

    fn perform_or_hold(&mut self, core: &mut Core, effect: Effect) {
        if core.holds_back(self.process) {
            self.running.held_back.push(effect);
        } else {
            self.perform(core, effect);
        }
    }

    // ---- the freedom of drivers: docs/design.md#order-of-effects -------------------------------

    /// Returns the effects that are performed at once, in any order. The others are performed
    /// later, whatever happens meanwhile.
    fn reorder(&mut self, core: &mut Core, effects: Vec<Effect>) -> Vec<Effect> {
        let mut at_once = Vec::new();
        for effect in effects {
            match core.lateness(&self.running.late, None) {
                Some(lag) => {
                    let item = Late::Effect(effect);
                    core.keep(&mut self.running.late, self.process, None, (lag, item));
                }
                None => at_once.push((None, effect)),
            }
        }
        if shuffle(&mut at_once, &mut core.plan.reorder.rng) {
            core.oracle.coverage.reached(Path::CoordinatorSwapped);
        }
        at_once.into_iter().map(|(_, effect)| effect).collect()
    }

    /// Something answers or has changed: the state machine gets the event now, or any time later.
    fn report(&mut self, core: &mut Core, event: Event) {
        match core.lateness(&self.running.late, None) {
            Some(lag) => {
                let item = Late::Answer(event);
                core.keep(&mut self.running.late, self.process, None, (lag, item));
            }
            None => self.handle(core, event),
        }
    }

    fn late(&mut self, core: &mut Core, number: u64) {
        let Some((item, overtaken)) = self.running.late.take(number) else { return };
        let path = match item {
            Late::Effect(_) => Path::CoordinatorLate,
            Late::Answer(_) => Path::CoordinatorAnswerLate,
        };
        if overtaken {
            core.oracle.coverage.reached(path);
        }
        match item {
            Late::Effect(effect) => self.perform_or_hold(core, effect),
            Late::Answer(event) => self.handle(core, event),
        }
    }

    fn schedule(&mut self, core: &mut Core) {
        let Some(deadline) = self.running.coordinator.next_deadline() else { return };
        let at = core.when(deadline.0.saturating_add(self.running.started)).max(core.now + 1);
        if self.running.wake_at.is_none_or(|wake| at < wake) {
            self.running.wake_at = Some(at);
            core.input_after(at - core.now, self.process, ProcessInput::Wake);
        }
    }

    fn perform(&mut self, core: &mut Core, effect: Effect) {
        match effect {
            Effect::List { list } => {
                self.call(core, Call::List, CoordinatorCallPurpose::List(list))
            }
            Effect::Propose { proposal, term, writes } => {
                check_intent(core, &writes);
                let call = transaction(core, term, writes);
                self.call(core, call, CoordinatorCallPurpose::Propose(proposal));
            }
            Effect::Probe { probe, to } => {
                self.ask(core, to, NodeQuery::Probe { to }, PendingQuery::Probe(probe));
            }
            Effect::Gather { gather, to, shards } => {
                self.ask(core, to, NodeQuery::Gather { shards }, PendingQuery::Gather(gather, to));
            }
            Effect::StepDown { to, shard, epoch } => {
                let question = PendingQuery::StepDown(shard, epoch);
                self.ask(core, to, NodeQuery::StepDown { shard, epoch }, question);
            }
            Effect::Decision(decision) => {
                let kind = kind_of(&decision);
                if let Decision::Leaderless { why, .. } = decision {
                    core.oracle.coverage.leaderless(why);
                }
                *core.decisions.entry(kind).or_default() += 1;
            }
            Effect::Exit(difference) => {
                let violation = Violation { promise: "heals", detail: difference };
                core.oracle.violations.push(violation);
            }
        }
    }

    // ---- nodes ---------------------------------------------------------------------------------

    fn ask(&mut self, core: &mut Core, to: StoreBoot, message: NodeQuery, question: PendingQuery) {
        self.running.next_query += 1;
        let query = self.running.next_query;
        if core.plan.reorder.is_unanswered() {
            return core.oracle.coverage.reached(Path::QueryUnanswered);
        }
        self.running.queries.insert(query, question);
        core.query(self.process, place_of(to.store), query, message);
    }

    fn answered(&mut self, core: &mut Core, query: u64, reply: NodeQueryReply) {
        let Some(question) = self.running.queries.remove(&query) else { return };
        let event = match (question, reply) {
            (PendingQuery::Probe(probe), NodeQueryReply::Probe { from, fsync_age_ms }) => {
                Event::Probed { probe, result: ProbeResult::Alive { from, fsync_age_ms } }
            }
            (PendingQuery::Gather(gather, to), NodeQueryReply::Gather { from, ends }) => {
                let ends = (from == to).then_some(ends);
                Event::Gathered { gather, store: to.store, ends }
            }
            (PendingQuery::StepDown(shard, epoch), NodeQueryReply::StepDown { end, .. }) => {
                Event::SteppedDown { shard, epoch, end }
            }
            (_, other) => unreachable!("an answer without its query: {other:?}"),
        };
        self.report(core, event);
    }

    fn failed(&mut self, core: &mut Core, query: u64, refused: bool) {
        let Some(question) = self.running.queries.remove(&query) else { return };
        let event = match question {
            PendingQuery::Probe(probe) => {
                let result = if refused { ProbeResult::Refused } else { ProbeResult::Silent };
                Event::Probed { probe, result }
            }
            PendingQuery::Gather(gather, to) => {
                Event::Gathered { gather, store: to.store, ends: None }
            }
            PendingQuery::StepDown(shard, epoch) => Event::SteppedDown { shard, epoch, end: None },
        };
        self.report(core, event);
    }

    // ---- election ------------------------------------------------------------------------------

    fn tock(&mut self, core: &mut Core) {
        core.input_after(TOCK, self.process, ProcessInput::Tock);
        if !std::mem::replace(&mut self.running.watches, true) {
            core.etcd_watch(self.process);
        }
        let late = core.now - self.running.confirmed > core.plan.lease_ttl;
        if late && self.running.leads.take().is_some() {
            // The key may not exist any more.
            self.running.lease = None;
            self.handle(core, Event::Deposed);
        }
        let asked = |asked: &CoordinatorCallPurpose| {
            matches!(
                asked,
                CoordinatorCallPurpose::Grant
                    | CoordinatorCallPurpose::Stand
                    | CoordinatorCallPurpose::KeepAlive
            )
        };
        if self.running.calls.values().any(asked) {
            return;
        }
        match self.running.lease {
            None => self.call(
                core,
                Call::Grant { ttl: core.plan.lease_ttl },
                CoordinatorCallPurpose::Grant,
            ),
            Some(lease) => {
                self.call(core, Call::KeepAlive { lease }, CoordinatorCallPurpose::KeepAlive);
                if self.running.leads.is_none() {
                    self.stand(core, lease);
                }
            }
        }
    }

    fn stand(&mut self, core: &mut Core, lease: u64) {
        let Place::Coordinator(place) = self.process.place else { return };
        let compares = vec![Compare::Created(EtcdKey::Coordinator, 0)];
        let value = EtcdValue::Coordinator { place };
        let writes = vec![Write::Put(EtcdKey::Coordinator, value, Some(lease))];
        self.call(core, Call::Txn { compares, writes }, CoordinatorCallPurpose::Stand);
    }

    fn lease_lost(&mut self, core: &mut Core) {
        self.running.lease = None;
        if self.running.leads.take().is_some() {
            self.handle(core, Event::Deposed);
        }
    }

    // ---- etcd ----------------------------------------------------------------------------------

    fn call(&mut self, core: &mut Core, call: Call, asked: CoordinatorCallPurpose) {
        let call = core.etcd(self.process, call);
        self.running.calls.insert(call, asked);
    }

    fn etcd_reply(&mut self, core: &mut Core, asked: CoordinatorCallPurpose, reply: Reply) {
        match (asked, reply) {
            (CoordinatorCallPurpose::Grant, Reply::Granted { lease }) => {
                self.running.lease = Some(lease);
                self.running.confirmed = core.now;
            }
            (CoordinatorCallPurpose::Stand, Reply::Txn { done: true, revision })
                if self.running.lease.is_some() =>
            {
                self.running.leads = Some(revision);
                self.handle(core, Event::Elected { term: revision });
            }
            (CoordinatorCallPurpose::KeepAlive, Reply::Kept(true)) => {
                self.running.confirmed = core.now
            }
            (CoordinatorCallPurpose::KeepAlive, Reply::Kept(false)) => self.lease_lost(core),
            (CoordinatorCallPurpose::List(list), Reply::List { revision, all }) => {
                let listing = Some(listing(revision, all));
                self.report(core, Event::Listed { list, listing });
            }
            (CoordinatorCallPurpose::Propose(proposal), Reply::Txn { done, revision }) => {
                let outcome = match done {
                    true => CasOutcome::Done { mod_revision: revision },
                    false => CasOutcome::Failed,
                };
                self.report(core, Event::Proposed { proposal, outcome });
            }
            (_, _) => {}
        }
    }

    fn etcd_timeout(&mut self, core: &mut Core, asked: CoordinatorCallPurpose) {
        match asked {
            CoordinatorCallPurpose::KeepAlive => {}
            // The lease may have been granted all the same, and then expires by itself.
            CoordinatorCallPurpose::Grant => {}
            // The key may exist under this lease: only a new lease gives a clear answer.
            CoordinatorCallPurpose::Stand => self.lease_lost(core),
            CoordinatorCallPurpose::List(list) => {
                self.report(core, Event::Listed { list, listing: None })
            }
            CoordinatorCallPurpose::Propose(proposal) => {
                self.report(core, Event::Proposed { proposal, outcome: CasOutcome::Unknown });
            }
        }
    }

    fn watched_all(&mut self, core: &mut Core, events: Vec<EtcdWatchEvent>) {
        for EtcdWatchEvent { key, value } in events {
            let modified = value.as_ref().map_or(0, |versioned| versioned.modified);
            self.running.watched = self.running.watched.max(modified);
            let revision = self.running.watched;
            if let Some(change) = change_of(key, value) {
                self.report(core, Event::Changed { revision, change });
            }
        }
    }
}

fn transaction(core: &Core, term: u64, writes: Writes) -> Call {
    let mut compares = vec![Compare::Created(EtcdKey::Coordinator, term)];
    let mut puts = Vec::new();
    match writes {
        Writes::Meta(meta) => {
            compares.push(Compare::Created(EtcdKey::Meta, 0));
            puts.push(Write::Put(EtcdKey::Meta, EtcdValue::Meta(meta), None));
        }
        Writes::Store { store, expect, record } => {
            let key = EtcdKey::Store(store);
            compares.push(Compare::Modified(key, expect));
            let me = StoreBoot { store, boot: record.boot };
            let (nonce, status) = (record.nonce as u64, record.status);
            let value = EtcdValue::Store { me, nonce, status, zone: record.zone };
            puts.push(Write::Put(key, value, None));
        }
        // No operator of the simulator removes a store: the intents are not in its etcd.
        Writes::Removal(removal) => unreachable!("{removal:?} without an intent"),
        Writes::AcceptedLoss(accepted) => {
            let AcceptedLoss { expect, record, loss, intent } = *accepted;
            let shard = record.shard();
            compares.push(Compare::Modified(EtcdKey::Shard(shard), expect));
            compares.push(Compare::Created(EtcdKey::Loss(shard, record.epoch), 0));
            puts.push(Write::Put(EtcdKey::Loss(shard, record.epoch), EtcdValue::Loss(loss), None));
            puts.push(Write::Put(EtcdKey::Shard(shard), EtcdValue::Shard(record), None));
            if let Some(intent) = intent {
                compares.push(Compare::Modified(EtcdKey::Promote(shard), intent));
                puts.push(Write::Delete(EtcdKey::Promote(shard)));
            }
        }
        Writes::Shards(shards) => {
            check(core, &shards.iter().map(|(_, record)| record.shard()).collect::<Vec<_>>());
            for (expect, record) in shards {
                let key = EtcdKey::Shard(record.shard());
                compares.push(Compare::Modified(key, expect));
                puts.push(Write::Put(key, EtcdValue::Shard(record), None));
            }
        }
    }
    Call::Txn { compares, writes: puts }
}

/// An operator's intent is about the record that the operator has seen, and no other.
fn check_intent(core: &mut Core, writes: &Writes) {
    let Writes::AcceptedLoss(accepted) = writes else { return };
    let AcceptedLoss { record, intent: Some(at), .. } = &**accepted else { return };
    let known =
        core.etcd.get(EtcdKey::Promote(record.shard())).filter(|known| known.modified == *at);
    let Some(intent) = known.and_then(intent_of) else { return };
    if record.version != Version(intent.version.0 + 1) {
        let detail = format!("{intent:?} is obeyed by {record:?} at {}", core.now);
        core.oracle.violations.push(Violation { promise: "losses", detail });
    }
}

/// etcd refuses a transaction that writes a key twice, or has too many operations.
fn check(core: &Core, shards: &[ShardId]) {
    let distinct: BTreeSet<_> = shards.iter().collect();
    assert_eq!(distinct.len(), shards.len(), "a key is written twice at {}", core.now);
    assert!(shards.len() <= core.plan.coordinator.shards_per_txn, "too large a transaction");
}

fn listing(revision: u64, all: Vec<(EtcdKey, Versioned)>) -> Listing {
    let mut listing = Listing { revision, ..Listing::default() };
    for (key, versioned) in all {
        match change_of(key, Some(versioned)) {
            Some(RecordChange::Meta(kept)) => listing.meta = Some(kept),
            Some(RecordChange::Store(store, Some(kept))) => listing.stores.push((store, kept)),
            Some(RecordChange::Name(name, Some(kept))) => listing.names.push((name, kept)),
            Some(RecordChange::Node(store, Some(kept))) => listing.nodes.push((store, kept)),
            Some(RecordChange::Shard(_, Some(kept))) => listing.shards.push(kept),
            Some(RecordChange::Drain(store, Some(kept))) => listing.drains.push((store, kept)),
            Some(RecordChange::Promote(shard, Some(kept))) => listing.promotes.push((shard, kept)),
            _ => {}
        }
    }
    listing
}

fn change_of(key: EtcdKey, value: Option<Versioned>) -> Option<RecordChange> {
    Some(match (key, value) {
        (EtcdKey::Meta, Some(v)) => RecordChange::Meta(kept(&v, meta_of(&v)?)),
        (EtcdKey::Store(store), v) => {
            RecordChange::Store(store, v.and_then(|v| Some(kept(&v, store_of(&v)?))))
        }
        // Names are never deleted, and the value names the place of the store.
        (EtcdKey::Name(_), v) => {
            let v = v?;
            let EtcdValue::Name(store) = v.value else { return None };
            RecordChange::Name(name_of(store), Some(kept(&v, NameRecord { store })))
        }
        (EtcdKey::Node(store), v) => {
            RecordChange::Node(store, v.and_then(|v| Some(kept(&v, node_of(&v)?))))
        }
        (EtcdKey::Shard(shard), v) => {
            RecordChange::Shard(shard, v.and_then(|v| Some(kept(&v, shard_of(&v)?))))
        }
        (EtcdKey::Drain(store), v) => RecordChange::Drain(store, v.map(|v| kept(&v, ()))),
        (EtcdKey::Promote(shard), v) => {
            RecordChange::Promote(shard, v.and_then(|v| Some(kept(&v, intent_of(&v)?))))
        }
        _ => return None,
    })
}

fn kept<V>(versioned: &Versioned, value: V) -> AtRevision<V> {
    AtRevision { value, created: versioned.created, modified: versioned.modified }
}

fn meta_of(versioned: &Versioned) -> Option<engine::records::Meta> {
    match &versioned.value {
        EtcdValue::Meta(meta) => Some(meta.clone()),
        _ => None,
    }
}

fn intent_of(versioned: &Versioned) -> Option<PromoteIntent> {
    match &versioned.value {
        EtcdValue::Promote(intent) => Some(intent.clone()),
        _ => None,
    }
}

fn shard_of(versioned: &Versioned) -> Option<engine::shard_record::ShardRecord> {
    match &versioned.value {
        EtcdValue::Shard(record) => Some(record.clone()),
        _ => None,
    }
}

fn node_of(versioned: &Versioned) -> Option<NodeRecord> {
    let EtcdValue::Node(me) = &versioned.value else { return None };
    let address = String::new();
    Some(NodeRecord { boot: me.boot, address, capacity: 1 << 30, versions: (1, 1) })
}

/// The name under which a decision is counted.
fn kind_of(decision: &Decision) -> &'static str {
    match decision {
        Decision::BecameLeader { .. } => "took office",
        Decision::PlacementWaits(_) => "waits",
        Decision::Placed { .. } => "placed",
        Decision::Died { .. } => "died",
        Decision::Returned(_) => "returned",
        Decision::Promoted { .. } => "promoted",
        Decision::LossAccepted(_) => "loss accepted",
        Decision::Leaderless { .. } => "leaderless",
        Decision::Removed { .. } => "removed",
        Decision::Recruited { .. } => "recruited",
        Decision::Released { .. } => "released",
        Decision::Lost { .. } => "lost",
        Decision::Retired { .. } => "retired",
        Decision::Draining(_) | Decision::Undrained(_) => "drained",
        Decision::Cleared(_) => "cleared",
        Decision::Paused(_) => "paused",
        Decision::Guarded { .. } => "guarded",
        Decision::Unguarded => "unguarded",
    }
}
