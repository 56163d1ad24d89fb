//! The world of one shard: its stores, the connections between them, its record in etcd, and the
//! faults. The stores run the node machine of the engine; everything else is as nondeterministic as
//! possible.
//!
//! * **Connections** are first in, first out, which the engine may rely on. The dialling end
//!   notices a cut at once, the other end after all messages in flight, so a new connection can
//!   overtake an old one.
//! * **etcd** is one register. A proposal may take effect at any later moment, or never; its answer
//!   may be lost. A store reads the current record, or, with `late_watch`, any that it has not read
//!   yet.
//! * **The coordinator** may at any time name any untainted member as primary, with any in-sync set
//!   that the rules allow. It considers neither the lengths of logs nor which stores are alive,
//!   since safety must not depend on that. A removed member becomes a learner.
//! * **A crash** is a power loss: any number of groups that were not fsynced are lost. A store that
//!   is down or cut off for long is one that takes no step.

use std::collections::BTreeSet;

use engine::ids::{Epoch, Slots, Version};
use engine::node::Settings;
use engine::planted::Planted;
use engine::shard_record::{self, ShardRecord};

use super::frontier::{SearchWorld, Step, StepNotes};
use super::machines::Machines;
use super::properties::{self, ObservedState};
use super::store::{
    Interned, PeerWireMessage, ProposalOutcome, STORES_MAX, StoreContext, StoreInput, StoreMachine,
    StoreOutput, StoreSummary, digit, index_of, key_revision, name, store_boot,
};

/// The bounds of the world: how often each event may happen.
#[derive(Clone, Copy, Debug)]
pub struct ReplicationBounds {
    pub stores: u8,
    /// The number of stores that are in sync at the start; the others are learners.
    pub in_sync: u8,
    pub min_in_sync: u8,
    pub epochs: u8,
    /// The number of different ops, and the number of times that ops are sent in total.
    pub ops: u8,
    pub orders: u8,
    pub crashes: u8,
    pub cuts: u8,
    /// The number of peers found silent, and of members removed by the coordinator.
    pub refusals: u8,
    pub removals: u8,
    /// The number of lost answers of etcd to a proposal.
    pub lost: u8,
    pub reads: u8,
    /// The number of seconds that pass at some store.
    pub ticks: u8,
    pub slow_fsync: bool,
    pub late_watch: bool,
}

#[derive(Clone, Debug, Default, Eq, Hash, PartialEq)]
struct ReplicationUsage {
    orders: u8,
    crashes: u8,
    cuts: u8,
    refusals: u8,
    removals: u8,
    lost: u8,
    reads: u8,
    ticks: u8,
}

/// A connection between two stores, with the ends that are open.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
struct ReplicaConnection {
    conn: u64,
    dialled: bool,
    accepted: bool,
}

const GENERATIONS: u64 = 64;

fn conn_of(from: usize, to: usize, generation: u8) -> u64 {
    (from * STORES_MAX + to) as u64 * GENERATIONS + u64::from(generation)
}

fn ends(conn: u64) -> (usize, usize) {
    let pair = (conn / GENERATIONS) as usize;
    (pair / STORES_MAX, pair % STORES_MAX)
}

/// A message in flight, to the end that accepted or to the one that dialled.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
struct InFlightPeerMessage {
    conn: u64,
    to_accepted: bool,
    wire: u32,
}

impl InFlightPeerMessage {
    fn stream(&self) -> (u64, bool) {
        (self.conn, self.to_accepted)
    }

    fn receiver(&self) -> usize {
        let (from, to) = ends(self.conn);
        if self.to_accepted { to } else { from }
    }
}

#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
struct Proposal {
    by: u8,
    boot: u8,
    proposal: u64,
    expect: u64,
    record: u32,
    candidate: Option<(u8, u64)>,
    /// True if the sender received the outcome "unknown".
    given_up: bool,
}

/// A read without an answer: the boot that handles it, and the ops acknowledged when it began.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
struct OutstandingRead {
    id: u8,
    at: u8,
    boot: u8,
    acknowledged: u8,
}

/// A state of the world, which consists of numbers only.
#[derive(Clone, Debug, Default, Eq, Hash, PartialEq)]
pub struct ReplicationState {
    stores: Vec<u32>,
    boots: [u8; STORES_MAX],
    /// The version of the record that each store has read.
    seen: [u8; STORES_MAX],
    connections: Vec<ReplicaConnection>,
    generations: [[u8; STORES_MAX]; STORES_MAX],
    in_flight: Vec<InFlightPeerMessage>,
    /// All records so far: version v is at index v − 1.
    records: Vec<u32>,
    proposals: Vec<Proposal>,
    checks: Vec<(u8, u8, u64)>,
    used: ReplicationUsage,
    // -- state that only the promises need
    /// The longest log known to be committed at any store, by epoch and chain.
    committed: Vec<(u64, u64)>,
    /// The epochs so far: each as (epoch, store, boot of its primary).
    begun: Vec<(u64, u8, u8)>,
    acknowledged: u8,
    reading: Vec<OutstandingRead>,
}

impl ReplicationState {
    fn version(&self) -> u64 {
        self.records.len() as u64
    }
}

pub struct Replication {
    bounds: ReplicationBounds,
    pub machines: Machines<StoreMachine>,
    start: Option<ReplicationState>,
}

impl Replication {
    pub fn new(bounds: ReplicationBounds, planted: Option<Planted>) -> Self {
        let never = u64::MAX / 4_000;
        let settings = Settings {
            min_in_sync: bounds.min_in_sync.into(),
            frozen_after_ms: never,
            read_give_up_ms: never,
            flush_after_ms: never,
            collect_every_ms: never,
            disk_probe_every_ms: never,
            planted,
            ..Settings::default()
        };
        let context = StoreContext {
            settings,
            stores: bounds.stores.into(),
            slow_fsync: bounds.slow_fsync,
            wires: Interned::default(),
            records: Interned::default(),
        };
        Self { bounds, machines: Machines::new(context), start: None }
    }

    fn summary(&self, state: &ReplicationState, store: usize) -> &StoreSummary {
        self.machines.summary(state.stores[store])
    }

    fn stores(&self) -> std::ops::Range<usize> {
        0..usize::from(self.bounds.stores)
    }

    fn record(&self, state: &ReplicationState) -> &ShardRecord {
        let newest = state.records.last().expect("there is a record from the start");
        self.machines.context.records.get(*newest)
    }

    fn min_in_sync(&self) -> usize {
        self.bounds.min_in_sync.into()
    }

    // ---- start ---------------------------------------------------------------------------------

    /// Returns the initial state: all stores are connected, and the first primary has committed its
    /// barrier.
    fn begin(&mut self) -> ReplicationState {
        let mut state = ReplicationState { boots: [1; STORES_MAX], ..ReplicationState::default() };
        let mut notes = StepNotes::default();
        for at in self.stores() {
            let store = StoreMachine::new(&self.machines.context, at as u8, state.boots);
            state.stores.push(self.machines.number(store));
        }
        for from in self.stores() {
            for to in self.stores().filter(|&to| to != from) {
                self.dial(&mut state, from, to, &mut notes);
            }
        }
        self.settle(&mut state, &mut notes);
        let all = |range: std::ops::Range<u8>| range.map(|at| store_boot(at, 1).store).collect();
        let first = ShardRecord {
            slots: Slots::ALL,
            epoch: Epoch(1),
            version: Version(1),
            primary: store_boot(0, 1),
            isr: all(0..self.bounds.in_sync),
            learners: all(self.bounds.in_sync..self.bounds.stores),
            target: all(0..self.bounds.stores),
            tainted: vec![],
        };
        state.records.push(self.machines.context.records.number(first));
        for at in self.stores().rev() {
            self.read_record(&mut state, at, 1, &mut notes);
        }
        self.settle(&mut state, &mut notes);
        assert_eq!(notes.broken, None, "the initial state is sound");
        state
    }

    /// Takes steps until no message, fsync or proposal is in flight.
    fn settle(&mut self, state: &mut ReplicationState, notes: &mut StepNotes) {
        loop {
            let waiting = self.stores().find(|&at| self.summary(state, at).unsynced > 0);
            if let Some(&first) = state.in_flight.first() {
                self.deliver(state, first, notes);
            } else if let Some(at) = waiting {
                self.step_store(state, at, StoreInput::Fsynced, notes);
            } else if let Some(proposal) = state.proposals.first().cloned() {
                self.carry_out(state, &proposal, notes);
            } else {
                return;
            }
        }
    }

    // ---- steps of one store --------------------------------------------------------------------

    fn step_store(
        &mut self,
        state: &mut ReplicationState,
        at: usize,
        input: StoreInput,
        notes: &mut StepNotes,
    ) {
        let before = state.stores[at];
        let did = self.machines.on(before, input);
        if let Some(why) = &did.panicked {
            notes.broken(format!("an assertion of {}: {why}", name(at)));
            return;
        }
        state.stores[at] = did.to;
        if !matches!(input, StoreInput::Crash { .. }) {
            self.compare(state, at, before, notes);
        }
        for out in &did.out {
            self.perform(state, at, out, notes);
        }
    }

    fn perform(
        &mut self,
        state: &mut ReplicationState,
        at: usize,
        out: &StoreOutput,
        notes: &mut StepNotes,
    ) {
        let (by, boot) = (at as u8, state.boots[at]);
        match *out {
            StoreOutput::Send { conn, wire } => {
                let dialler = ends(conn).0 == at;
                let stands = |connection: &&ReplicaConnection| {
                    connection.conn == conn
                        && if dialler { connection.dialled } else { connection.accepted }
                };
                if let Some(connection) = state.connections.iter().find(stands) {
                    // A message to a closed end is dropped.
                    if if dialler { connection.accepted } else { connection.dialled } {
                        state.in_flight.push(InFlightPeerMessage {
                            conn,
                            to_accepted: dialler,
                            wire,
                        });
                    }
                }
            }
            StoreOutput::Close { conn } => self.shut(state, at, conn),
            StoreOutput::Propose { proposal, expect, record, candidate } => {
                let given_up = false;
                state.proposals.push(Proposal {
                    by,
                    boot,
                    proposal,
                    expect,
                    record,
                    candidate,
                    given_up,
                });
            }
            StoreOutput::Check { check } => state.checks.push((by, boot, check)),
            StoreOutput::Applied { op } => {
                state.acknowledged |= 1 << op;
                notes.sometimes.push("an op is acknowledged");
            }
            StoreOutput::ReadAnswered { id, value } => self.read_done(state, id, value, notes),
        }
    }

    fn read_done(
        &self,
        state: &mut ReplicationState,
        id: u8,
        value: Option<i128>,
        notes: &mut StepNotes,
    ) {
        let Some(place) = state.reading.iter().position(|read| read.id == id) else { return };
        let acknowledged = state.reading.remove(place).acknowledged;
        let Some(value) = value else {
            notes.sometimes.push("a read is refused");
            return;
        };
        notes.sometimes.push("a read is answered");
        for op in 0..self.bounds.ops {
            if digit(value, op) > 1 {
                notes.broken(format!("a read shows op {op} twice"));
            }
            if acknowledged >> op & 1 == 1 && digit(value, op) == 0 {
                notes.broken(format!("a read misses op {op}, acknowledged before it began"));
            }
        }
    }

    /// Records the rare situations and violations in a change of a store.
    fn compare(&self, state: &mut ReplicationState, at: usize, before: u32, notes: &mut StepNotes) {
        let (old, new) = (self.machines.summary(before), self.machines.summary(state.stores[at]));
        if !new.log.starts_with(&old.log) {
            notes.sometimes.push("a divergent tail is cut");
        }
        let Some((epoch, active)) = new.primary else { return };
        if old.primary.is_none_or(|(led, _)| led != epoch) {
            let tail = new.log.len().saturating_sub(1);
            if tail > state.committed.len() {
                notes.sometimes.push("a tail not known to be committed survives");
            }
            let last = new.log[..tail].last().map_or(0, |&(epoch, _)| epoch);
            if epoch > 2 && last + 1 < epoch {
                notes.sometimes.push("a primary follows one that left nothing in its log");
            }
            if let Err(why) =
                properties::begins(&mut state.begun, (epoch, at as u8, state.boots[at]))
            {
                notes.broken(why);
            }
        }
        let moved_on = self.record(state).epoch.0 > epoch;
        if moved_on && new.commit > old.commit {
            notes.sometimes.push("a deposed primary still commits");
        }
        if active && old.primary == Some((epoch, false)) && epoch > 1 {
            notes.sometimes.push("a later primary commits its barrier");
        }
    }

    // ---- connections ---------------------------------------------------------------------------

    fn dial(
        &mut self,
        state: &mut ReplicationState,
        from: usize,
        to: usize,
        notes: &mut StepNotes,
    ) {
        state.generations[from][to] += 1;
        let conn = conn_of(from, to, state.generations[from][to]);
        state.connections.push(ReplicaConnection { conn, dialled: true, accepted: true });
        let (peer, boot) = (to as u8, state.boots[to]);
        self.step_store(state, to, StoreInput::Accepted { conn }, notes);
        self.step_store(state, from, StoreInput::Dialled { conn, peer, boot }, notes);
    }

    /// Closes one end. The other end notices it after all messages in flight.
    fn shut(&mut self, state: &mut ReplicationState, at: usize, conn: u64) {
        let dialler = ends(conn).0 == at;
        let Some(connection) =
            state.connections.iter_mut().find(|connection| connection.conn == conn)
        else {
            return;
        };
        let other = if dialler {
            connection.dialled = false;
            connection.accepted
        } else {
            connection.accepted = false;
            connection.dialled
        };
        state
            .in_flight
            .retain(|in_flight| in_flight.conn != conn || in_flight.to_accepted == dialler);
        if other {
            let wire = self.machines.context.wires.number(PeerWireMessage::Closed);
            state.in_flight.push(InFlightPeerMessage { conn, to_accepted: dialler, wire });
        }
        state.connections.retain(|connection| connection.dialled || connection.accepted);
    }

    fn deliver(
        &mut self,
        state: &mut ReplicationState,
        in_flight: InFlightPeerMessage,
        notes: &mut StepNotes,
    ) {
        let first = state.in_flight.iter().position(|other| other.stream() == in_flight.stream());
        state.in_flight.remove(first.expect("it is in flight"));
        let at = in_flight.receiver();
        if matches!(self.machines.context.wires.get(in_flight.wire), PeerWireMessage::Closed) {
            self.end(state, at, in_flight.conn);
        }
        self.step_store(
            state,
            at,
            StoreInput::Received { conn: in_flight.conn, wire: in_flight.wire },
            notes,
        );
    }

    /// Closes an end that has noticed that the other is closed.
    fn end(&self, state: &mut ReplicationState, at: usize, conn: u64) {
        let dialler = ends(conn).0 == at;
        for connection in state.connections.iter_mut().filter(|connection| connection.conn == conn)
        {
            if dialler {
                connection.dialled = false;
            } else {
                connection.accepted = false;
            }
        }
        state.connections.retain(|connection| connection.dialled || connection.accepted);
    }

    // ---- etcd ----------------------------------------------------------------------------------

    fn read_record(
        &mut self,
        state: &mut ReplicationState,
        at: usize,
        version: u64,
        notes: &mut StepNotes,
    ) {
        state.seen[at] = version as u8;
        let record = state.records[version as usize - 1];
        self.step_store(state, at, StoreInput::Record { record }, notes);
    }

    /// Applies a proposal in etcd.
    fn carry_out(
        &mut self,
        state: &mut ReplicationState,
        proposal: &Proposal,
        notes: &mut StepNotes,
    ) {
        state.proposals.retain(|other| other != proposal);
        let key = |store: u8| key_revision(store, state.boots[usize::from(store)]);
        let compares = proposal.expect == state.version()
            && proposal.candidate.is_none_or(|(store, revision)| key(store) == revision);
        let by = usize::from(proposal.by);
        let alive = state.boots[by] == proposal.boot;
        if compares {
            self.note_change(state, proposal, alive, notes);
            state.records.push(proposal.record);
        }
        if alive && !proposal.given_up {
            let outcome = match compares {
                true => ProposalOutcome::Done { version: state.version() },
                false => ProposalOutcome::Failed,
            };
            if compares {
                state.seen[by] = state.version() as u8;
            }
            self.step_store(
                state,
                by,
                StoreInput::Proposed { proposal: proposal.proposal, outcome },
                notes,
            );
        }
    }

    fn note_change(
        &self,
        state: &ReplicationState,
        proposal: &Proposal,
        alive: bool,
        notes: &mut StepNotes,
    ) {
        let before = self.record(state);
        let after = self.machines.context.records.get(proposal.record);
        let added = after.isr.iter().any(|store| !before.isr.contains(store));
        let removed = before.isr.iter().any(|store| !after.isr.contains(store));
        if added && removed {
            notes.sometimes.push("a member is swapped for a learner");
            if before.isr.len() == self.min_in_sync() {
                notes.sometimes.push("a member is swapped at min_in_sync");
            }
        }
        if added && !removed {
            notes.sometimes.push("a learner is added");
        }
        if removed && !added {
            notes.sometimes.push("a member is ejected by the primary");
        }
        if proposal.given_up {
            notes.sometimes.push("a proposal takes effect after its answer was lost");
        }
        if !alive {
            notes.sometimes.push("a proposal takes effect after its sender has died");
        }
        let by = self.summary(state, proposal.by.into());
        if alive && by.primary.is_some_and(|(epoch, active)| epoch > 1 && !active) {
            notes.sometimes.push("a new primary changes the set before its barrier is committed");
        }
    }

    // ---- the coordinator -----------------------------------------------------------------------

    fn write_record(&mut self, state: &mut ReplicationState, mut next: ShardRecord) {
        next.version = Version(next.version.0 + 1);
        for at in self.stores() {
            let store = store_boot(at as u8, 0).store;
            if !next.isr.contains(&store) {
                shard_record::insert(&mut next.learners, store);
            }
        }
        let number = self.machines.context.records.number(next);
        state.records.push(number);
    }

    /// Returns every change that the coordinator may make to the record now, and whether it removes
    /// a member.
    fn coordinator(&self, state: &ReplicationState) -> Vec<(String, ShardRecord, bool)> {
        let now = self.record(state);
        let mut all = Vec::new();
        let members: Vec<_> = now.isr.clone();
        if now.epoch.0 < self.bounds.epochs.into() {
            for &to in members.iter().filter(|to| !now.tainted.contains(to)) {
                for set in 0..1u8 << members.len() {
                    let kept = |at: &usize| set >> at & 1 == 1;
                    let isr: Vec<_> =
                        (0..members.len()).filter(kept).map(|at| members[at]).collect();
                    if isr.len() < self.min_in_sync() || !isr.contains(&to) {
                        continue;
                    }
                    let at = index_of(to);
                    let mut next = ShardRecord { isr, ..now.clone() };
                    next.epoch = Epoch(now.epoch.0 + 1);
                    next.primary = store_boot(at, state.boots[usize::from(at)]);
                    next.tainted.retain(|store| next.isr.contains(store));
                    let what =
                        format!("the coordinator names {} with {}", name(at.into()), set_of(&next));
                    all.push((what, next, false));
                }
            }
        }
        let above = members.len() > self.min_in_sync();
        for &out in members.iter().filter(|&&out| out != now.primary.store && above) {
            if state.used.removals >= self.bounds.removals {
                break;
            }
            let mut next = now.clone();
            shard_record::remove(&mut next.isr, out);
            shard_record::remove(&mut next.tainted, out);
            let what = format!("the coordinator removes {}", name(index_of(out).into()));
            all.push((what, next, true));
        }
        let fed = |store| now.isr.contains(&store) || now.learners.contains(&store);
        if self.stores().any(|at| !fed(store_boot(at as u8, 0).store)) {
            all.push(("the coordinator lets a store learn again".into(), now.clone(), false));
        }
        all
    }
}

fn set_of(record: &ShardRecord) -> String {
    record.isr.iter().map(|&store| name(index_of(store).into())).collect()
}

impl SearchWorld for Replication {
    type State = ReplicationState;

    fn initial(&mut self) -> ReplicationState {
        if self.start.is_none() {
            self.start = Some(self.begin());
        }
        self.start.clone().expect("made above")
    }

    fn steps(&mut self, from: &ReplicationState, out: &mut Vec<Step<ReplicationState>>) {
        self.messages(from, out);
        self.disks(from, out);
        self.register(from, out);
        self.clients(from, out);
        self.faults(from, out);
    }

    fn show(&self, state: &ReplicationState) -> String {
        let now = self.record(state);
        let primary = name(index_of(now.primary.store).into());
        let mut text =
            format!("record v{} e{} {primary} isr {}", now.version.0, now.epoch.0, set_of(now));
        for at in self.stores() {
            let summary = self.summary(state, at);
            let log: String = summary
                .log
                .iter()
                .map(|(epoch, chain)| format!(" {epoch}:{:02x}", chain & 255))
                .collect();
            text += &format!(
                " | {}#{} promised {} log [{}] durable {} commit {}",
                name(at),
                state.boots[at],
                summary.promised,
                log.trim(),
                summary.durable.len(),
                summary.commit
            );
            if let Some((epoch, active)) = summary.primary {
                text += &format!(" leads e{epoch}{}", if active { "" } else { " (barrier open)" });
            }
        }
        text + &format!(" | acknowledged {:b}", state.acknowledged)
    }
}

// ---- possible steps ----------------------------------------------------------------------------

impl Replication {
    fn step(
        &mut self,
        from: &ReplicationState,
        out: &mut Vec<Step<ReplicationState>>,
        what: impl Into<String>,
        take: impl FnOnce(&mut Self, &mut ReplicationState, &mut StepNotes),
    ) {
        let mut to = from.clone();
        let mut notes = StepNotes::default();
        take(self, &mut to, &mut notes);
        self.tidy(&mut to);
        if notes.broken.is_none() {
            notes.broken = self.broken(&mut to);
        }
        let StepNotes { sometimes, broken } = notes;
        out.push(Step { what: what.into(), to, sometimes, broken });
    }

    /// Returns the first broken promise.
    fn broken(&self, state: &mut ReplicationState) -> Option<String> {
        let observed = ObservedState {
            stores: self.stores().map(|store| self.summary(state, store)).collect(),
            record: self.record(state),
            min_in_sync: self.min_in_sync(),
        };
        properties::broken(&observed, &mut state.committed)
    }

    /// Removes what has no effect any more, and sorts what has no order.
    fn tidy(&self, state: &mut ReplicationState) {
        let version = state.version();
        let boots = state.boots;
        let alive = |by: u8, boot: u8| boots[usize::from(by)] == boot;
        state.proposals.retain(|proposal| {
            let answered = alive(proposal.by, proposal.boot) && !proposal.given_up;
            answered || proposal.expect >= version
        });
        state.checks.retain(|&(by, boot, _)| alive(by, boot));
        state.reading.retain(|read| alive(read.at, read.boot));
        state.proposals.sort();
        state.connections.sort();
        state.in_flight.sort_by_key(InFlightPeerMessage::stream);
    }

    fn messages(&mut self, from: &ReplicationState, out: &mut Vec<Step<ReplicationState>>) {
        let mut streams = BTreeSet::new();
        for &in_flight in &from.in_flight {
            if !streams.insert(in_flight.stream()) {
                continue;
            }
            let (dialler, acceptor) = ends(in_flight.conn);
            let arrow = if in_flight.to_accepted { "→" } else { "←" };
            let wire = self.machines.context.wires.get(in_flight.wire);
            let what = format!("{} {arrow} {}: {}", name(dialler), name(acceptor), describe(wire));
            self.step(from, out, what, |world, to, notes| world.deliver(to, in_flight, notes));
        }
    }

    fn disks(&mut self, from: &ReplicationState, out: &mut Vec<Step<ReplicationState>>) {
        for at in self.stores() {
            if self.summary(from, at).unsynced > 0 {
                let what = format!("{}'s fsync is done", name(at));
                self.step(from, out, what, |world, to, notes| {
                    world.step_store(to, at, StoreInput::Fsynced, notes);
                });
            }
        }
    }

    fn register(&mut self, from: &ReplicationState, out: &mut Vec<Step<ReplicationState>>) {
        for at in self.stores() {
            let first =
                if self.bounds.late_watch { from.seen[at].into() } else { from.version() - 1 };
            for version in (first + 1).max(u64::from(from.seen[at]) + 1)..=from.version() {
                let what = format!("{} reads version {version}", name(at));
                self.step(from, out, what, |world, to, notes| {
                    world.read_record(to, at, version, notes);
                });
            }
        }
        for proposal in &from.proposals {
            let sender = usize::from(proposal.by);
            let by = name(sender);
            let set = set_of(self.machines.context.records.get(proposal.record));
            let what = format!("etcd carries out {by}'s proposal of {set}");
            self.step(from, out, what, |world, to, notes| world.carry_out(to, proposal, notes));
            if !proposal.given_up && from.used.lost < self.bounds.lost {
                let what = format!("the answer to {by}'s proposal of {set} is lost");
                self.step(from, out, what, |world, to, notes| {
                    to.used.lost += 1;
                    let sent = to.proposals.iter_mut().find(|other| *other == proposal);
                    sent.expect("it is in flight").given_up = true;
                    let (proposal, outcome) = (proposal.proposal, ProposalOutcome::Unknown);
                    world.step_store(to, sender, StoreInput::Proposed { proposal, outcome }, notes);
                });
            }
        }
        for &(by, boot, check) in &from.checks {
            let what = format!("etcd answers {}'s check", name(by.into()));
            self.step(from, out, what, |world, to, notes| {
                to.checks.retain(|&other| other != (by, boot, check));
                notes.sometimes.push("etcd is asked because no peer answers");
                let record = *to.records.last().expect("there is a record from the start");
                world.step_store(to, by.into(), StoreInput::EtcdChecked { check, record }, notes);
            });
        }
        for (what, next, removes) in self.coordinator(from) {
            self.step(from, out, what, |world, to, notes| {
                to.used.removals += u8::from(removes);
                let led = index_of(next.primary.store) >= world.bounds.in_sync;
                if led {
                    notes.sometimes.push("a store that was a learner is named primary");
                }
                world.write_record(to, next);
            });
        }
    }

    fn clients(&mut self, from: &ReplicationState, out: &mut Vec<Step<ReplicationState>>) {
        for at in
            self.stores().filter(|&at| self.summary(from, at).primary.is_some()).collect::<Vec<_>>()
        {
            for op in 0..self.bounds.ops {
                if from.used.orders >= self.bounds.orders {
                    break;
                }
                let what = format!("op {op} is sent to {}", name(at));
                self.step(from, out, what, |world, to, notes| {
                    to.used.orders += 1;
                    let message = to.used.orders.into();
                    world.step_store(to, at, StoreInput::Order { op, message }, notes);
                });
            }
            if from.used.reads < self.bounds.reads {
                let what = format!("a read is sent to {}", name(at));
                self.step(from, out, what, |world, to, notes| {
                    to.used.reads += 1;
                    let (id, boot) = (to.used.reads, to.boots[at]);
                    let acknowledged = to.acknowledged;
                    to.reading.push(OutstandingRead { id, at: at as u8, boot, acknowledged });
                    world.step_store(to, at, StoreInput::Read { id }, notes);
                });
            }
        }
    }

    fn faults(&mut self, from: &ReplicationState, out: &mut Vec<Step<ReplicationState>>) {
        for at in self.stores() {
            if from.used.crashes < self.bounds.crashes {
                for kept in 0..=self.summary(from, at).unsynced as u8 {
                    let what = format!("{} loses power and {kept} groups are kept", name(at));
                    self.step(from, out, what, |world, to, notes| {
                        world.crash(to, at, kept, notes);
                    });
                }
            }
            if from.used.ticks < self.bounds.ticks {
                let what = format!("a second passes at {}", name(at));
                self.step(from, out, what, |world, to, notes| {
                    to.used.ticks += 1;
                    world.step_store(to, at, StoreInput::Tick, notes);
                });
            }
        }
        for from_at in self.stores() {
            for to_at in self.stores().filter(|&to| to != from_at) {
                self.connection_steps(from, from_at, to_at, out);
            }
        }
    }

    fn connection_steps(
        &mut self,
        from: &ReplicationState,
        dialler: usize,
        acceptor: usize,
        out: &mut Vec<Step<ReplicationState>>,
    ) {
        let conn = conn_of(dialler, acceptor, from.generations[dialler][acceptor]);
        let stands =
            from.connections.iter().any(|connection| connection.conn == conn && connection.dialled);
        let (one, other) = (name(dialler), name(acceptor));
        let leads = self.summary(from, dialler).primary.is_some();
        if !stands {
            let what = format!("{one} dials {other}");
            self.step(from, out, what, |world, to, notes| {
                world.dial(to, dialler, acceptor, notes);
            });
        } else if from.used.cuts < self.bounds.cuts && leads {
            let what = format!("{one}'s connection to {other} is cut");
            self.step(from, out, what, |world, to, notes| {
                to.used.cuts += 1;
                world.shut(to, dialler, conn);
                let wire = world.machines.context.wires.number(PeerWireMessage::Closed);
                world.step_store(to, dialler, StoreInput::Received { conn, wire }, notes);
            });
        }
        if leads && from.used.refusals < self.bounds.refusals {
            let what = format!("{one} finds {other} silent");
            self.step(from, out, what, |world, to, notes| {
                to.used.refusals += 1;
                let store = acceptor as u8;
                world.step_store(to, dialler, StoreInput::Refused { store }, notes);
            });
        }
    }

    fn crash(&mut self, state: &mut ReplicationState, at: usize, kept: u8, notes: &mut StepNotes) {
        state.used.crashes += 1;
        state.boots[at] += 1;
        state.seen[at] = 0;
        let boots = state.boots;
        let conns: Vec<u64> = state.connections.iter().map(|connection| connection.conn).collect();
        for conn in conns {
            let (from, to) = ends(conn);
            if from == at || to == at {
                self.shut(state, at, conn);
            }
        }
        self.step_store(state, at, StoreInput::Crash { kept, boots }, notes);
        for other in self.stores().filter(|&other| other != at) {
            self.step_store(state, other, StoreInput::Peers { boots }, notes);
        }
    }
}

fn describe(wire: &PeerWireMessage) -> String {
    use engine::message::{FromFollower, ToFollower};
    match wire {
        PeerWireMessage::Closed => "closed".into(),
        PeerWireMessage::To(ToFollower::Append { n, slices }) => {
            let slice = &slices[0];
            let entries: Vec<u64> = slice.entries.iter().map(|entry| entry.seq.0).collect();
            format!(
                "append {n} of epoch {}: {entries:?} after {}, commit {}",
                slice.epoch.0, slice.prev.seq.0, slice.commit.0
            )
        }
        PeerWireMessage::To(ToFollower::Hello { .. }) => "hello".into(),
        PeerWireMessage::From(FromFollower::Welcome { .. }) => "welcome".into(),
        PeerWireMessage::From(FromFollower::Ack { n }) => format!("ack {n}"),
        PeerWireMessage::To(other) => format!("{other:?}"),
        PeerWireMessage::From(other) => format!("{other:?}"),
    }
}
