//! The world of one shard: its stores, the connections between them, its record in etcd, and what may go
//! wrong. The stores run the engine's own node machine; everything else here is as free as it can be.
//!
//! * **Connections** are first in, first out, as the engine is promised. The end that dialled hears of a cut
//!   at once, the other one after all that was under way: so a new connection can overtake an old one.
//! * **etcd** is one register. A proposal may be carried out at any later moment, or never; its answer may be
//!   lost. A store reads the present record, or, with `late_watch`, any that it has not seen yet.
//! * **The coordinator** may at any time name any untainted member with any set that the rules allow: which
//!   log is longest, and who is alive, is not asked, since safety must not need it. Who is dropped is fed as
//!   a learner.
//! * **A crash** loses power: any number of groups that were not fsynced are gone. A store that is down or
//!   cut off for long is one that takes no step.

use std::collections::BTreeSet;

use engine::ids::{Epoch, Slots, Version};
use engine::node::Settings;
use engine::planted::Planted;
use engine::shard_record::{self, ShardRecord};

use super::frontier::{Step, World};
use super::machines::Machines;
use super::properties;
use super::store::{
    Cause, Face, Interned, Out, STORES_MAX, Settled, Store, Table, Wire, digit, index_of,
    key_revision, store_boot,
};

/// How much of everything may happen.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    pub stores: u8,
    /// The first so many are in sync to begin with, the others learn.
    pub in_sync: u8,
    pub min_in_sync: u8,
    pub epochs: u8,
    /// Different ops, and how often one is ordered in all.
    pub ops: u8,
    pub orders: u8,
    pub crashes: u8,
    pub cuts: u8,
    /// Peers found silent; members removed by the coordinator.
    pub refusals: u8,
    pub removals: u8,
    /// Answers of etcd to a proposal that are lost.
    pub lost: u8,
    pub reads: u8,
    /// Seconds that pass at some store.
    pub ticks: u8,
    pub slow_fsync: bool,
    pub late_watch: bool,
}

#[derive(Clone, Debug, Default, Eq, Hash, PartialEq)]
struct Used {
    orders: u8,
    crashes: u8,
    cuts: u8,
    refusals: u8,
    removals: u8,
    lost: u8,
    reads: u8,
    ticks: u8,
}

/// A connection: who has dialled whom, and which ends stand.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
struct Link {
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

/// Something under way: to the end that accepted, or to the one that dialled.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
struct Flying {
    conn: u64,
    to_accepted: bool,
    wire: u32,
}

impl Flying {
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
    config: u32,
    candidate: Option<(u8, u64)>,
    /// Its sender was told that nothing is known of it.
    given_up: bool,
}

/// A read without an answer: by whom it is handled, and what was acknowledged when it began.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
struct Reading {
    id: u8,
    at: u8,
    boot: u8,
    acknowledged: u8,
}

/// A state of the world: numbers only.
#[derive(Clone, Debug, Default, Eq, Hash, PartialEq)]
pub struct State {
    stores: Vec<u32>,
    boots: [u8; STORES_MAX],
    /// The version of the record that each store has read.
    seen: [u8; STORES_MAX],
    links: Vec<Link>,
    generations: [[u8; STORES_MAX]; STORES_MAX],
    flying: Vec<Flying>,
    /// Every record there has been: version v is at v − 1.
    records: Vec<u32>,
    proposals: Vec<Proposal>,
    checks: Vec<(u8, u8, u64)>,
    used: Used,
    // -- what only the promises need
    /// The longest log that anybody has known committed, by epoch and chain.
    pub(super) committed: Vec<(u64, u64)>,
    /// Who has led each epoch.
    begun: Vec<(u64, u8, u8)>,
    acknowledged: u8,
    reading: Vec<Reading>,
}

impl State {
    fn version(&self) -> u64 {
        self.records.len() as u64
    }
}

pub struct Replication {
    bounds: Bounds,
    pub machines: Machines<Store>,
    start: Option<State>,
}

/// A step being taken.
#[derive(Default)]
struct Taking {
    sometimes: Vec<&'static str>,
    broken: Option<String>,
}

impl Taking {
    fn broken(&mut self, why: impl Into<String>) {
        self.broken.get_or_insert(why.into());
    }
}

impl Replication {
    pub fn new(bounds: Bounds, planted: Option<Planted>) -> Self {
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
        let table = Table {
            settings,
            stores: bounds.stores.into(),
            slow_fsync: bounds.slow_fsync,
            wires: Interned::default(),
            configs: Interned::default(),
        };
        Self { bounds, machines: Machines::new(table), start: None }
    }

    pub(super) fn face(&self, state: &State, store: usize) -> &Face {
        self.machines.face(state.stores[store])
    }

    pub(super) fn stores(&self) -> std::ops::Range<usize> {
        0..usize::from(self.bounds.stores)
    }

    pub(super) fn config(&self, state: &State) -> &ShardRecord {
        let newest = state.records.last().expect("there is a record from the start");
        self.machines.table.configs.get(*newest)
    }

    pub(super) fn min_in_sync(&self) -> usize {
        self.bounds.min_in_sync.into()
    }

    // ---- the beginning -------------------------------------------------------------------------

    /// Everybody is connected, and the first primary has committed its barrier.
    fn begin(&mut self) -> State {
        let mut state = State { boots: [1; STORES_MAX], ..State::default() };
        let mut taking = Taking::default();
        for at in self.stores() {
            let store = Store::new(&self.machines.table, at as u8, state.boots);
            state.stores.push(self.machines.number(store));
        }
        for from in self.stores() {
            for to in self.stores().filter(|&to| to != from) {
                self.dial(&mut state, from, to, &mut taking);
            }
        }
        self.settle(&mut state, &mut taking);
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
        state.records.push(self.machines.table.configs.number(first));
        for at in self.stores().rev() {
            self.read_record(&mut state, at, 1, &mut taking);
        }
        self.settle(&mut state, &mut taking);
        assert_eq!(taking.broken, None, "the beginning is sound");
        state
    }

    /// Until nothing is under way.
    fn settle(&mut self, state: &mut State, taking: &mut Taking) {
        loop {
            let waiting = self.stores().find(|&at| self.face(state, at).unsynced > 0);
            if let Some(&first) = state.flying.first() {
                self.deliver(state, first, taking);
            } else if let Some(at) = waiting {
                self.tell(state, at, Cause::Fsynced, taking);
            } else if let Some(proposal) = state.proposals.first().cloned() {
                self.carry_out(state, &proposal, taking);
            } else {
                return;
            }
        }
    }

    // ---- what one store is told ----------------------------------------------------------------

    fn tell(&mut self, state: &mut State, at: usize, cause: Cause, taking: &mut Taking) {
        let before = state.stores[at];
        let did = self.machines.on(before, cause);
        if let Some(why) = &did.panicked {
            taking.broken(format!("an assertion of {}: {why}", name(at)));
            return;
        }
        state.stores[at] = did.to;
        if !matches!(cause, Cause::Crash { .. }) {
            self.compare(state, at, before, taking);
        }
        for out in &did.out {
            self.perform(state, at, out, taking);
        }
    }

    fn perform(&mut self, state: &mut State, at: usize, out: &Out, taking: &mut Taking) {
        let (by, boot) = (at as u8, state.boots[at]);
        match *out {
            Out::Send { conn, wire } => {
                let dialler = ends(conn).0 == at;
                let stands = |link: &&Link| {
                    link.conn == conn && if dialler { link.dialled } else { link.accepted }
                };
                if let Some(link) = state.links.iter().find(stands) {
                    // Nobody hears what is said to an end that is closed.
                    if if dialler { link.accepted } else { link.dialled } {
                        state.flying.push(Flying { conn, to_accepted: dialler, wire });
                    }
                }
            }
            Out::Close { conn } => self.shut(state, at, conn),
            Out::Propose { proposal, expect, config, candidate } => {
                let given_up = false;
                state.proposals.push(Proposal {
                    by,
                    boot,
                    proposal,
                    expect,
                    config,
                    candidate,
                    given_up,
                });
            }
            Out::Check { check } => state.checks.push((by, boot, check)),
            Out::Applied { op } => {
                state.acknowledged |= 1 << op;
                taking.sometimes.push("an op is acknowledged");
            }
            Out::Told { id, value } => self.read_told(state, id, value, taking),
        }
    }

    fn read_told(&self, state: &mut State, id: u8, value: Option<i128>, taking: &mut Taking) {
        let Some(place) = state.reading.iter().position(|read| read.id == id) else { return };
        let acknowledged = state.reading.remove(place).acknowledged;
        let Some(value) = value else {
            taking.sometimes.push("a read is refused");
            return;
        };
        taking.sometimes.push("a read is answered");
        for op in 0..self.bounds.ops {
            if digit(value, op) > 1 {
                taking.broken(format!("a read shows op {op} twice"));
            }
            if acknowledged >> op & 1 == 1 && digit(value, op) == 0 {
                taking.broken(format!("a read misses op {op}, acknowledged before it began"));
            }
        }
    }

    /// What has changed at a store that is worth knowing, or must not be.
    fn compare(&self, state: &mut State, at: usize, before: u32, taking: &mut Taking) {
        let (old, new) = (self.machines.face(before), self.machines.face(state.stores[at]));
        if !new.log.starts_with(&old.log) {
            taking.sometimes.push("a divergent tail is cut");
        }
        let Some((epoch, active)) = new.primary else { return };
        if old.primary.is_none_or(|(led, _)| led != epoch) {
            let tail = new.log.len().saturating_sub(1);
            if tail > state.committed.len() {
                taking.sometimes.push("a tail that nobody knew committed survives");
            }
            let last = new.log[..tail].last().map_or(0, |&(epoch, _)| epoch);
            if epoch > 2 && last + 1 < epoch {
                taking.sometimes.push("a primary follows one that left nothing in its log");
            }
            if let Err(why) =
                properties::begins(&mut state.begun, (epoch, at as u8, state.boots[at]))
            {
                taking.broken(why);
            }
        }
        let moved_on = self.config(state).epoch.0 > epoch;
        if moved_on && new.commit > old.commit {
            taking.sometimes.push("a deposed primary still commits");
        }
        if active && old.primary == Some((epoch, false)) && epoch > 1 {
            taking.sometimes.push("a later primary commits its barrier");
        }
    }

    // ---- connections ---------------------------------------------------------------------------

    fn dial(&mut self, state: &mut State, from: usize, to: usize, taking: &mut Taking) {
        state.generations[from][to] += 1;
        let conn = conn_of(from, to, state.generations[from][to]);
        state.links.push(Link { conn, dialled: true, accepted: true });
        let (peer, boot) = (to as u8, state.boots[to]);
        self.tell(state, to, Cause::Accepted { conn }, taking);
        self.tell(state, from, Cause::Dialled { conn, peer, boot }, taking);
    }

    /// One end is closed: the other hears it after all that was under way.
    fn shut(&mut self, state: &mut State, at: usize, conn: u64) {
        let dialler = ends(conn).0 == at;
        let Some(link) = state.links.iter_mut().find(|link| link.conn == conn) else { return };
        let other = if dialler {
            link.dialled = false;
            link.accepted
        } else {
            link.accepted = false;
            link.dialled
        };
        state.flying.retain(|flying| flying.conn != conn || flying.to_accepted == dialler);
        if other {
            let wire = self.machines.table.wires.number(Wire::Closed);
            state.flying.push(Flying { conn, to_accepted: dialler, wire });
        }
        state.links.retain(|link| link.dialled || link.accepted);
    }

    fn deliver(&mut self, state: &mut State, flying: Flying, taking: &mut Taking) {
        let first = state.flying.iter().position(|other| other.stream() == flying.stream());
        state.flying.remove(first.expect("it is under way"));
        let at = flying.receiver();
        if matches!(self.machines.table.wires.get(flying.wire), Wire::Closed) {
            self.end(state, at, flying.conn);
        }
        self.tell(state, at, Cause::Received { conn: flying.conn, wire: flying.wire }, taking);
    }

    /// An end that has heard that the other is closed.
    fn end(&self, state: &mut State, at: usize, conn: u64) {
        let dialler = ends(conn).0 == at;
        for link in state.links.iter_mut().filter(|link| link.conn == conn) {
            if dialler {
                link.dialled = false;
            } else {
                link.accepted = false;
            }
        }
        state.links.retain(|link| link.dialled || link.accepted);
    }

    // ---- etcd ----------------------------------------------------------------------------------

    fn read_record(&mut self, state: &mut State, at: usize, version: u64, taking: &mut Taking) {
        state.seen[at] = version as u8;
        let config = state.records[version as usize - 1];
        self.tell(state, at, Cause::Config { config }, taking);
    }

    /// A proposal reaches etcd.
    fn carry_out(&mut self, state: &mut State, proposal: &Proposal, taking: &mut Taking) {
        state.proposals.retain(|other| other != proposal);
        let key = |store: u8| key_revision(store, state.boots[usize::from(store)]);
        let compares = proposal.expect == state.version()
            && proposal.candidate.is_none_or(|(store, revision)| key(store) == revision);
        let by = usize::from(proposal.by);
        let alive = state.boots[by] == proposal.boot;
        if compares {
            self.note_change(state, proposal, alive, taking);
            state.records.push(proposal.config);
        }
        if alive && !proposal.given_up {
            let outcome = match compares {
                true => Settled::Done { version: state.version() },
                false => Settled::Failed,
            };
            if compares {
                state.seen[by] = state.version() as u8;
            }
            self.tell(state, by, Cause::Proposed { proposal: proposal.proposal, outcome }, taking);
        }
    }

    fn note_change(&self, state: &State, proposal: &Proposal, alive: bool, taking: &mut Taking) {
        let before = self.config(state);
        let after = self.machines.table.configs.get(proposal.config);
        let added = after.isr.iter().any(|store| !before.isr.contains(store));
        let removed = before.isr.iter().any(|store| !after.isr.contains(store));
        if added && removed {
            taking.sometimes.push("a member is swapped for a learner");
            if before.isr.len() == self.min_in_sync() {
                taking.sometimes.push("a member is swapped at the floor");
            }
        }
        if added && !removed {
            taking.sometimes.push("a learner is added");
        }
        if removed && !added {
            taking.sometimes.push("a member is ejected by the primary");
        }
        if proposal.given_up {
            taking.sometimes.push("a proposal takes effect after its answer was lost");
        }
        if !alive {
            taking.sometimes.push("a proposal takes effect after its sender has died");
        }
        let by = self.face(state, proposal.by.into());
        if alive && by.primary.is_some_and(|(epoch, active)| epoch > 1 && !active) {
            taking.sometimes.push("a new primary changes the set before its barrier is committed");
        }
    }

    // ---- the coordinator -----------------------------------------------------------------------

    fn write_record(&mut self, state: &mut State, mut next: ShardRecord) {
        next.version = Version(next.version.0 + 1);
        for at in self.stores() {
            let store = store_boot(at as u8, 0).store;
            if !next.isr.contains(&store) {
                shard_record::insert(&mut next.learners, store);
            }
        }
        let number = self.machines.table.configs.number(next);
        state.records.push(number);
    }

    /// Every way in which the coordinator may change the record now.
    fn coordinator(&self, state: &State) -> Vec<(String, ShardRecord, bool)> {
        let now = self.config(state);
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

pub(super) fn name(store: usize) -> &'static str {
    ["A", "B", "C", "D"][store]
}

fn set_of(config: &ShardRecord) -> String {
    config.isr.iter().map(|&store| name(index_of(store).into())).collect()
}

impl World for Replication {
    type State = State;

    fn initial(&mut self) -> State {
        if self.start.is_none() {
            self.start = Some(self.begin());
        }
        self.start.clone().expect("made above")
    }

    fn steps(&mut self, from: &State, out: &mut Vec<Step<State>>) {
        self.messages(from, out);
        self.disks(from, out);
        self.register(from, out);
        self.clients(from, out);
        self.faults(from, out);
    }

    fn show(&self, state: &State) -> String {
        let now = self.config(state);
        let primary = name(index_of(now.primary.store).into());
        let mut text =
            format!("record v{} e{} {primary} isr {}", now.version.0, now.epoch.0, set_of(now));
        for at in self.stores() {
            let face = self.face(state, at);
            let log: String = face
                .log
                .iter()
                .map(|(epoch, chain)| format!(" {epoch}:{:02x}", chain & 255))
                .collect();
            text += &format!(
                " | {}#{} promised {} log [{}] durable {} commit {}",
                name(at),
                state.boots[at],
                face.promised,
                log.trim(),
                face.durable.len(),
                face.commit
            );
            if let Some((epoch, active)) = face.primary {
                text += &format!(" leads e{epoch}{}", if active { "" } else { " (barrier open)" });
            }
        }
        text + &format!(" | acknowledged {:b}", state.acknowledged)
    }
}

// ---- what can happen next ----------------------------------------------------------------------

impl Replication {
    fn step(
        &mut self,
        from: &State,
        out: &mut Vec<Step<State>>,
        what: impl Into<String>,
        take: impl FnOnce(&mut Self, &mut State, &mut Taking),
    ) {
        let mut to = from.clone();
        let mut taking = Taking::default();
        take(self, &mut to, &mut taking);
        self.tidy(&mut to);
        if taking.broken.is_none() {
            taking.broken = properties::broken(self, &mut to);
        }
        let Taking { sometimes, broken } = taking;
        out.push(Step { what: what.into(), to, sometimes, broken });
    }

    /// Forgets what can't matter any more, and puts in order what has none.
    fn tidy(&self, state: &mut State) {
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
        state.links.sort();
        state.flying.sort_by_key(Flying::stream);
    }

    fn messages(&mut self, from: &State, out: &mut Vec<Step<State>>) {
        let mut streams = BTreeSet::new();
        for &flying in &from.flying {
            if !streams.insert(flying.stream()) {
                continue;
            }
            let (dialler, acceptor) = ends(flying.conn);
            let arrow = if flying.to_accepted { "→" } else { "←" };
            let wire = self.machines.table.wires.get(flying.wire);
            let what = format!("{} {arrow} {}: {}", name(dialler), name(acceptor), said(wire));
            self.step(from, out, what, |world, to, taking| world.deliver(to, flying, taking));
        }
    }

    fn disks(&mut self, from: &State, out: &mut Vec<Step<State>>) {
        for at in self.stores() {
            if self.face(from, at).unsynced > 0 {
                let what = format!("{}'s fsync is done", name(at));
                self.step(from, out, what, |world, to, taking| {
                    world.tell(to, at, Cause::Fsynced, taking);
                });
            }
        }
    }

    fn register(&mut self, from: &State, out: &mut Vec<Step<State>>) {
        for at in self.stores() {
            let first =
                if self.bounds.late_watch { from.seen[at].into() } else { from.version() - 1 };
            for version in (first + 1).max(u64::from(from.seen[at]) + 1)..=from.version() {
                let what = format!("{} reads version {version}", name(at));
                self.step(from, out, what, |world, to, taking| {
                    world.read_record(to, at, version, taking);
                });
            }
        }
        for proposal in &from.proposals {
            let sender = usize::from(proposal.by);
            let by = name(sender);
            let set = set_of(self.machines.table.configs.get(proposal.config));
            let what = format!("etcd carries out {by}'s proposal of {set}");
            self.step(from, out, what, |world, to, taking| world.carry_out(to, proposal, taking));
            if !proposal.given_up && from.used.lost < self.bounds.lost {
                let what = format!("the answer to {by}'s proposal of {set} is lost");
                self.step(from, out, what, |world, to, taking| {
                    to.used.lost += 1;
                    let sent = to.proposals.iter_mut().find(|other| *other == proposal);
                    sent.expect("it is under way").given_up = true;
                    let (proposal, outcome) = (proposal.proposal, Settled::Unknown);
                    world.tell(to, sender, Cause::Proposed { proposal, outcome }, taking);
                });
            }
        }
        for &(by, boot, check) in &from.checks {
            let what = format!("etcd answers {}'s check", name(by.into()));
            self.step(from, out, what, |world, to, taking| {
                to.checks.retain(|&other| other != (by, boot, check));
                taking.sometimes.push("etcd is asked for want of a peer's answer");
                let config = *to.records.last().expect("there is a record from the start");
                world.tell(to, by.into(), Cause::EtcdChecked { check, config }, taking);
            });
        }
        for (what, next, removes) in self.coordinator(from) {
            self.step(from, out, what, |world, to, taking| {
                to.used.removals += u8::from(removes);
                let led = index_of(next.primary.store) >= world.bounds.in_sync;
                if led {
                    taking.sometimes.push("a store that was a learner is named primary");
                }
                world.write_record(to, next);
            });
        }
    }

    fn clients(&mut self, from: &State, out: &mut Vec<Step<State>>) {
        for at in
            self.stores().filter(|&at| self.face(from, at).primary.is_some()).collect::<Vec<_>>()
        {
            for op in 0..self.bounds.ops {
                if from.used.orders >= self.bounds.orders {
                    break;
                }
                let what = format!("op {op} is sent to {}", name(at));
                self.step(from, out, what, |world, to, taking| {
                    to.used.orders += 1;
                    let message = to.used.orders.into();
                    world.tell(to, at, Cause::Order { op, message }, taking);
                });
            }
            if from.used.reads < self.bounds.reads {
                let what = format!("a read is sent to {}", name(at));
                self.step(from, out, what, |world, to, taking| {
                    to.used.reads += 1;
                    let (id, boot) = (to.used.reads, to.boots[at]);
                    let acknowledged = to.acknowledged;
                    to.reading.push(Reading { id, at: at as u8, boot, acknowledged });
                    world.tell(to, at, Cause::Read { id }, taking);
                });
            }
        }
    }

    fn faults(&mut self, from: &State, out: &mut Vec<Step<State>>) {
        for at in self.stores() {
            if from.used.crashes < self.bounds.crashes {
                for kept in 0..=self.face(from, at).unsynced as u8 {
                    let what = format!("{} loses power and {kept} groups are kept", name(at));
                    self.step(from, out, what, |world, to, taking| {
                        world.crash(to, at, kept, taking);
                    });
                }
            }
            if from.used.ticks < self.bounds.ticks {
                let what = format!("a second passes at {}", name(at));
                self.step(from, out, what, |world, to, taking| {
                    to.used.ticks += 1;
                    world.tell(to, at, Cause::Tick, taking);
                });
            }
        }
        for from_at in self.stores() {
            for to_at in self.stores().filter(|&to| to != from_at) {
                self.line(from, from_at, to_at, out);
            }
        }
    }

    fn line(&mut self, from: &State, dialler: usize, acceptor: usize, out: &mut Vec<Step<State>>) {
        let conn = conn_of(dialler, acceptor, from.generations[dialler][acceptor]);
        let stands = from.links.iter().any(|link| link.conn == conn && link.dialled);
        let (one, other) = (name(dialler), name(acceptor));
        let leads = self.face(from, dialler).primary.is_some();
        if !stands {
            let what = format!("{one} dials {other}");
            self.step(from, out, what, |world, to, taking| {
                world.dial(to, dialler, acceptor, taking);
            });
        } else if from.used.cuts < self.bounds.cuts && leads {
            let what = format!("{one}'s connection to {other} is cut");
            self.step(from, out, what, |world, to, taking| {
                to.used.cuts += 1;
                world.shut(to, dialler, conn);
                let wire = world.machines.table.wires.number(Wire::Closed);
                world.tell(to, dialler, Cause::Received { conn, wire }, taking);
            });
        }
        if leads && from.used.refusals < self.bounds.refusals {
            let what = format!("{one} finds {other} silent");
            self.step(from, out, what, |world, to, taking| {
                to.used.refusals += 1;
                let store = acceptor as u8;
                world.tell(to, dialler, Cause::Refused { store }, taking);
            });
        }
    }

    fn crash(&mut self, state: &mut State, at: usize, kept: u8, taking: &mut Taking) {
        state.used.crashes += 1;
        state.boots[at] += 1;
        state.seen[at] = 0;
        let boots = state.boots;
        let conns: Vec<u64> = state.links.iter().map(|link| link.conn).collect();
        for conn in conns {
            let (from, to) = ends(conn);
            if from == at || to == at {
                self.shut(state, at, conn);
            }
        }
        self.tell(state, at, Cause::Crash { kept, boots }, taking);
        for other in self.stores().filter(|&other| other != at) {
            self.tell(state, other, Cause::Peers { boots }, taking);
        }
    }
}

fn said(wire: &Wire) -> String {
    use engine::message::{FromFollower, ToFollower};
    match wire {
        Wire::Closed => "closed".into(),
        Wire::To(ToFollower::Append { n, slices }) => {
            let slice = &slices[0];
            let entries: Vec<u64> = slice.entries.iter().map(|entry| entry.seq.0).collect();
            format!(
                "append {n} of epoch {}: {entries:?} after {}, commit {}",
                slice.epoch.0, slice.prev.seq.0, slice.commit.0
            )
        }
        Wire::To(ToFollower::Hello { .. }) => "hello".into(),
        Wire::From(FromFollower::Welcome { .. }) => "welcome".into(),
        Wire::From(FromFollower::Ack { n }) => format!("ack {n}"),
        Wire::To(other) => format!("{other:?}"),
        Wire::From(other) => format!("{other:?}"),
    }
}
