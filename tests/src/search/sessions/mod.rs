//! The world of sessions: gateway workers, one shard and its successive primaries, the `gateway/` keys in
//! etcd, and what may go wrong between them. Workers and primaries are the engine's own machines.
//!
//! * **Commits.** How entries become committed is the [replication](super::replication) world's to search.
//!   Here a primary's oldest group is committed in one step, whenever the world likes. A failover takes one
//!   step, too: the new primary begins with any log that an earlier one has, cut anywhere above what is
//!   committed. The old one goes on until it reads the record, and may still commit what all later logs hold.
//! * **Connections** are first in, first out. One that is cut answers nothing any more, but what was sent on it
//!   may still arrive, at any later moment or never. The worker has a new one at once. A message may come twice.
//! * **Keys** may vanish, unnoticed by their worker, for as long as the world likes. A worker that has noticed,
//!   or given a session up, makes a new one.
//! * **A list of sessions** is as of any revision that there has been: etcd's answer may be slow. How long one
//!   was seen absent depends on how often time passes at the primary, which is the world's to choose.
//! * **Clients** ask once, or again under their token, through any gateway and at any time, whatever they were
//!   told. A gateway that has died is one that takes no step any more.

pub mod gateway;
pub mod leader;
mod promises;

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::rc::Rc;

use engine::batcher;
use engine::idempotency::{Scope, TokenSettings};
use engine::key::CounterKey;
use engine::message::{GatewayMessage, NodeReply};
use engine::node;
use engine::planted::Planted;

use self::gateway::{Gateway, Told, Waits};
use self::leader::Leader;
use super::frontier::{Step, World};
use super::machines::Machines;
use super::store::Interned;

/// What travels between a gateway and a node.
#[derive(Clone, Debug)]
pub enum Wire {
    To(GatewayMessage),
    From(NodeReply),
}

/// All that has ever travelled, each once.
pub type Wires = Rc<RefCell<Interned<Wire>>>;

/// The one counter of this world.
pub fn counter() -> CounterKey {
    CounterKey::new(b"n", b"c").expect("a short plain name")
}

/// Each op adds to a digit of its own, so a value shows which are in it, and how often.
pub fn digit(value: i128, op: u8) -> i128 {
    value >> (4 * op) & 15
}

/// How much of everything may happen.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    pub gateways: u8,
    /// Sessions of all gateways together.
    pub keys: u8,
    /// Keys that vanish.
    pub losses: u8,
    pub epochs: u8,
    pub ops: u8,
    /// Ops carry a token: none, one of their own, or one of a batch.
    pub tokens: Option<Scope>,
    /// Requests that repeat one, under its token.
    pub retries: u8,
    /// Connections cut; messages that come twice.
    pub cuts: u8,
    pub repeats: u8,
    /// Lists of sessions handed to a primary; times that time passes at one, and how much.
    pub lists: u8,
    pub ticks: u8,
    pub tick_s: u16,
    /// Deadlines of requests that pass; times that a worker waits before it sends again.
    pub late: u8,
    pub waits: u8,
    /// Disks that are full for a while: what comes then is refused.
    pub full: u8,
}

#[derive(Clone, Debug, Default, Eq, Hash, PartialEq)]
struct Used {
    losses: u8,
    cuts: u8,
    repeats: u8,
    lists: u8,
    ticks: u8,
    late: u8,
    waits: u8,
    full: u8,
}

/// A worker's key in etcd.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
struct Key {
    gateway: u8,
    born: u8,
    /// The revision at which it vanished; 0: it stands.
    died: u8,
}

/// Something under way, on a connection of a gateway.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
struct Flying {
    conn: u64,
    to_node: bool,
    wire: u32,
}

impl Flying {
    fn stream(&self) -> (u64, bool) {
        (self.conn, self.to_node)
    }
}

/// A request of a client, and what it was told.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub(super) struct Request {
    pub op: u8,
    gateway: u8,
    issued: u8,
    pub told: Option<Told>,
}

/// A state of the world: numbers only.
#[derive(Clone, Debug, Default, Eq, Hash, PartialEq)]
pub struct State {
    /// The primary of epoch e is at e − 1.
    primaries: Vec<u32>,
    /// How far its log may be committed.
    caps: Vec<usize>,
    /// The epoch of the newest record that each primary has read, and each gateway.
    seen: Vec<u8>,
    known: Vec<u8>,
    gateways: Vec<u32>,
    /// Told to make a new key, or without one.
    wants: Vec<bool>,
    conns: Vec<u64>,
    generations: Vec<Vec<u8>>,
    flying: Vec<Flying>,
    keys: Vec<Key>,
    revision: u8,
    used: Used,
    // -- what only the promises need
    pub(super) requests: Vec<Request>,
    committed: Vec<u64>,
}

const GENERATIONS: u64 = 16;
const EPOCHS_MAX: u64 = 8;

fn conn_of(gateway: usize, epoch: u8, generation: u8) -> u64 {
    (gateway as u64 * EPOCHS_MAX + u64::from(epoch)) * GENERATIONS + u64::from(generation)
}

/// The gateway and the epoch of the primary.
fn ends(conn: u64) -> (usize, u8) {
    let pair = conn / GENERATIONS;
    ((pair / EPOCHS_MAX) as usize, (pair % EPOCHS_MAX) as u8)
}

pub struct Sessions {
    bounds: Bounds,
    pub primaries: Machines<Leader>,
    pub gateways: Machines<Gateway>,
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

/// How long a client's token counts.
const WINDOW_MS: u64 = 100_000;
/// How long a session must be seen absent: less than time ever passes at once.
const ABSENT_MS: u64 = 1_000;

impl Sessions {
    pub fn new(bounds: Bounds, planted: Option<Planted>) -> Self {
        let never = u64::MAX / 4_000;
        let settings = node::Settings {
            min_in_sync: 1,
            frozen_after_ms: never,
            read_give_up_ms: never,
            flush_after_ms: never,
            collect_every_ms: ABSENT_MS,
            disk_probe_every_ms: never,
            idempotency: TokenSettings {
                window_ms: WINDOW_MS,
                buckets: 1,
                ..TokenSettings::default()
            },
            planted,
            ..node::Settings::default()
        };
        let wires = Wires::default();
        let tick_ms = u64::from(bounds.tick_s) * 1_000;
        let primaries = leader::Table { settings, tick_ms, wires: wires.clone() };
        // How many messages are without an answer is no question of what they do.
        let settings = batcher::Settings { window: 1_000, planted, ..Default::default() };
        let gateways = gateway::Table { settings, tokens: bounds.tokens, tick_ms, wires };
        Self {
            bounds,
            primaries: Machines::new(primaries),
            gateways: Machines::new(gateways),
            start: None,
        }
    }

    fn face(&self, state: &State, epoch: u8) -> &leader::Face {
        self.primaries.face(state.primaries[usize::from(epoch) - 1])
    }

    /// The state that most entries were applied to.
    fn newest(&self, state: &State) -> &leader::Face {
        let faces = state.primaries.iter().map(|&number| self.primaries.face(number));
        faces.max_by_key(|face| face.applied).expect("there is a primary from the start")
    }

    // ---- the beginning -------------------------------------------------------------------------

    /// The first primary has committed its barrier, and each gateway is connected and has a session.
    fn begin(&mut self) -> State {
        let mut state = State::default();
        let mut taking = Taking::default();
        self.promote(&mut state, Vec::new(), &mut taking);
        self.tell_primary(&mut state, 1, leader::Cause::Committed, &mut taking);
        for at in 0..usize::from(self.bounds.gateways) {
            let gateway = Gateway::new(&self.gateways.table);
            state.gateways.push(self.gateways.number(gateway));
            state.known.push(0);
            state.wants.push(false);
            state.generations.push(vec![0; usize::from(self.bounds.epochs) + 1]);
            self.make_key(&mut state, at, &mut taking);
            self.read_record(&mut state, at, &mut taking);
        }
        assert_eq!(taking.broken, None, "the beginning is sound");
        state
    }

    // ---- what a machine is told ----------------------------------------------------------------

    fn tell_primary(
        &mut self,
        state: &mut State,
        epoch: u8,
        cause: leader::Cause,
        taking: &mut Taking,
    ) {
        let at = usize::from(epoch) - 1;
        let before = state.primaries[at];
        let did = self.primaries.on(before, cause);
        if let Some(why) = &did.panicked {
            return taking.broken(format!("an assertion of the primary of {epoch}: {why}"));
        }
        state.primaries[at] = did.to;
        self.note_primary(state, epoch, before, taking);
        for out in &did.out {
            match *out {
                leader::Out::Reply { conn, wire } => {
                    if state.conns.contains(&conn) {
                        state.flying.push(Flying { conn, to_node: false, wire });
                    } else {
                        taking.sometimes.push("an answer is lost");
                    }
                }
                leader::Out::Told(what) => taking.sometimes.push(what),
            }
        }
    }

    fn note_primary(&self, state: &mut State, epoch: u8, before: u32, taking: &mut Taking) {
        let old = self.primaries.face(before);
        let new = self.face(state, epoch);
        let deposed = usize::from(epoch) < state.primaries.len();
        if deposed && new.commit > old.commit {
            taking.sometimes.push("a deposed primary still commits");
        }
        if new.expired != old.expired {
            taking.sometimes.push("sessions expire");
        }
        if let Err(why) = promises::commits_one_log(&mut state.committed, new)
            .and_then(|()| promises::stays_expired(old, new))
            .and_then(|()| self.only_the_dead_expire(state, new))
        {
            taking.broken(why);
        }
    }

    /// A session whose key stood at the revision of the collection is not collected.
    fn only_the_dead_expire(&self, state: &State, face: &leader::Face) -> Result<(), String> {
        let stood = |key: &&Key| key.died == 0 || u64::from(key.died) > face.collected;
        match state.keys.iter().filter(stood).find(|key| face.expired >> key.born & 1 == 1) {
            Some(key) => Err(format!("session {} is collected although its key stood", key.born)),
            None => Ok(()),
        }
    }

    fn tell_gateway(
        &mut self,
        state: &mut State,
        at: usize,
        cause: gateway::Cause,
        taking: &mut Taking,
    ) {
        let did = self.gateways.on(state.gateways[at], cause);
        if let Some(why) = &did.panicked {
            return taking.broken(format!("an assertion of {}: {why}", name(at)));
        }
        state.gateways[at] = did.to;
        for out in &did.out {
            match *out {
                gateway::Out::Send { conn, wire } => {
                    state.flying.push(Flying { conn, to_node: true, wire });
                }
                gateway::Out::Wrote { request, told } => {
                    state.requests[usize::from(request) - 1].told = Some(told);
                    taking.sometimes.push(promises::said(told));
                    if let Err(why) = promises::told(&state.requests, request) {
                        taking.broken(why);
                    }
                }
                gateway::Out::Abandoned => {
                    taking.sometimes.push("a session is given up");
                    state.wants[at] = true;
                }
            }
        }
        self.connect(state, at, taking);
    }

    /// A gateway dials whoever leads what it knows of.
    fn connect(&mut self, state: &mut State, at: usize, taking: &mut Taking) {
        let Some(&epoch) = self.gateways.face(state.gateways[at]).unconnected.first() else {
            return;
        };
        let generation = &mut state.generations[at][usize::from(epoch)];
        *generation += 1;
        let conn = conn_of(at, epoch, *generation);
        state.conns.push(conn);
        self.tell_primary(state, epoch, leader::Cause::Accepted { conn }, taking);
        self.tell_gateway(state, at, gateway::Cause::Connected { conn, epoch }, taking);
    }

    fn make_key(&mut self, state: &mut State, at: usize, taking: &mut Taking) {
        state.revision += 1;
        let born = state.revision;
        state.keys.push(Key { gateway: at as u8, born, died: 0 });
        state.wants[at] = false;
        self.tell_gateway(state, at, gateway::Cause::Session { born }, taking);
    }

    fn read_record(&mut self, state: &mut State, at: usize, taking: &mut Taking) {
        let epoch = state.primaries.len() as u8;
        state.known[at] = epoch;
        self.tell_gateway(state, at, gateway::Cause::Record { epoch }, taking);
    }

    /// The next epoch begins, with this log.
    fn promote(
        &mut self,
        state: &mut State,
        entries: Vec<engine::entry::Entry>,
        taking: &mut Taking,
    ) {
        let epoch = state.primaries.len() as u8 + 1;
        for (&primary, cap) in state.primaries.iter().zip(&mut state.caps) {
            let log = &self.primaries.face(primary).log;
            let both = log.iter().zip(&entries).take_while(|(own, new)| **own == new.chain.0);
            *cap = (*cap).min(both.count());
        }
        let leader = Leader::new(&self.primaries.table, epoch, entries);
        state.primaries.push(self.primaries.number(leader));
        state.caps.push(usize::MAX);
        state.seen.push(epoch);
        self.tell_primary(state, epoch, leader::Cause::Record { epoch }, taking);
    }

    // ---- steps ---------------------------------------------------------------------------------

    fn step(
        &mut self,
        from: &State,
        out: &mut Vec<Step<State>>,
        what: String,
        take: impl FnOnce(&mut Self, &mut State, &mut Taking),
    ) {
        let mut to = from.clone();
        let mut taking = Taking::default();
        take(self, &mut to, &mut taking);
        to.conns.sort();
        to.flying.sort_by_key(Flying::stream);
        let broken = taking
            .broken
            .or_else(|| promises::broken(self.bounds.ops, &to.requests, self.newest(&to).value));
        out.push(Step { what, to, sometimes: taking.sometimes, broken });
    }

    fn messages(&mut self, from: &State, out: &mut Vec<Step<State>>) {
        let mut streams = BTreeSet::new();
        for (place, &flying) in from.flying.iter().enumerate() {
            if !streams.insert(flying.stream()) {
                continue;
            }
            let (gateway, epoch) = ends(flying.conn);
            let wire = flying.wire;
            let said = self.said(wire);
            let conn = flying.conn;
            let (g, p) = (name(gateway), format!("p{epoch}"));
            if !flying.to_node {
                self.step(from, out, format!("{g} ← {p}: {said}"), |world, to, taking| {
                    to.flying.remove(place);
                    let cause = gateway::Cause::Received { conn, wire };
                    world.tell_gateway(to, gateway, cause, taking);
                });
                continue;
            }
            let stale = !from.conns.contains(&conn);
            for again in [false, true] {
                if again && from.used.repeats >= self.bounds.repeats {
                    continue;
                }
                let twice = if again { ", and will come again" } else { "" };
                let what = format!("{g} → {p}: {said}{twice}");
                self.step(from, out, what, |world, to, taking| {
                    if again {
                        to.used.repeats += 1;
                    } else {
                        to.flying.remove(place);
                    }
                    if stale {
                        taking.sometimes.push("a message arrives after its connection was cut");
                    }
                    let cause = leader::Cause::Received { conn, wire };
                    world.tell_primary(to, epoch, cause, taking);
                });
            }
        }
    }

    fn shard(&mut self, from: &State, out: &mut Vec<Step<State>>) {
        let newest = from.primaries.len() as u8;
        for epoch in 1..=newest {
            let at = usize::from(epoch) - 1;
            let face = self.face(from, epoch).clone();
            if face.next.is_some_and(|end| end <= from.caps[at]) {
                self.step(from, out, format!("p{epoch} commits"), |world, to, taking| {
                    world.tell_primary(to, epoch, leader::Cause::Committed, taking);
                });
            }
            if from.seen[at] < newest {
                self.step(from, out, format!("p{epoch} reads the record"), |world, to, taking| {
                    to.seen[at] = newest;
                    let cause = leader::Cause::Record { epoch: newest };
                    world.tell_primary(to, epoch, cause, taking);
                });
            }
            if face.active && from.used.ticks < self.bounds.ticks {
                self.step(from, out, format!("time passes at p{epoch}"), |world, to, taking| {
                    to.used.ticks += 1;
                    world.tell_primary(to, epoch, leader::Cause::Tick, taking);
                });
            }
            if face.full || face.leads && from.used.full < self.bounds.full {
                let what = if face.full { "has room again" } else { "has no room" };
                self.step(from, out, format!("p{epoch}'s disk {what}"), |world, to, taking| {
                    to.used.full += u8::from(!face.full);
                    world.tell_primary(to, epoch, leader::Cause::Full(!face.full), taking);
                });
            }
            if face.active && face.rows > 0 && from.used.lists < self.bounds.lists {
                self.lists(from, epoch, out);
            }
        }
        if newest < self.bounds.epochs {
            self.failovers(from, out);
        }
    }

    fn lists(&mut self, from: &State, epoch: u8, out: &mut Vec<Step<State>>) {
        for at in 1..=from.revision {
            let stood = |key: &&Key| key.born <= at && (key.died == 0 || key.died > at);
            let alive = from.keys.iter().filter(stood).fold(0, |mask, key| mask | 1 << key.born);
            let what = format!("p{epoch} hears of the keys at revision {at}: {alive:b}");
            self.step(from, out, what, |world, to, taking| {
                to.used.lists += 1;
                world.tell_primary(to, epoch, leader::Cause::Listed { at, alive }, taking);
            });
        }
    }

    fn failovers(&mut self, from: &State, out: &mut Vec<Step<State>>) {
        let mut logs = BTreeSet::new();
        let committed = from.committed.len();
        for (at, &number) in from.primaries.iter().enumerate() {
            let log = self.primaries.face(number).log.clone();
            if !log.starts_with(&from.committed) {
                continue;
            }
            for len in committed..=log.len() {
                if !logs.insert(log[..len].to_vec()) {
                    continue;
                }
                let what = format!("failover: the log of p{} up to {len}", at + 1);
                self.step(from, out, what, |world, to, taking| {
                    if len > committed {
                        taking.sometimes.push("an uncommitted tail survives a failover");
                    }
                    if len < log.len() {
                        taking.sometimes.push("an uncommitted tail is lost in a failover");
                    }
                    let entries = world.primaries.machine(number).entries()[..len].to_vec();
                    world.promote(to, entries, taking);
                });
            }
        }
    }

    fn workers(&mut self, from: &State, out: &mut Vec<Step<State>>) {
        for at in 0..from.gateways.len() {
            let face = self.gateways.face(from.gateways[at]).clone();
            if usize::from(from.known[at]) < from.primaries.len() {
                self.step(
                    from,
                    out,
                    format!("{} reads the record", name(at)),
                    |world, to, taking| {
                        world.read_record(to, at, taking);
                    },
                );
            }
            let (used, late) = match face.waits {
                Some(Waits::ForDeadline) => (from.used.late < self.bounds.late, true),
                Some(Waits::ToSend) => (from.used.waits < self.bounds.waits, false),
                None => (false, false),
            };
            if used {
                let what = if late { "a deadline passes" } else { "waits" };
                self.step(from, out, format!("{}: {what}", name(at)), |world, to, taking| {
                    to.used.late += u8::from(late);
                    to.used.waits += u8::from(!late);
                    world.tell_gateway(to, at, gateway::Cause::Wait, taking);
                });
            }
            if from.wants[at] && from.keys.len() < self.bounds.keys.into() {
                self.step(
                    from,
                    out,
                    format!("{} makes a new key", name(at)),
                    |world, to, taking| {
                        world.make_key(to, at, taking);
                    },
                );
            }
            let lost = from.keys.iter().any(|key| key.born == face.session && key.died > 0);
            if lost {
                let what = format!("{} notices that its key is gone", name(at));
                self.step(from, out, what, |world, to, taking| {
                    to.wants[at] = true;
                    world.tell_gateway(to, at, gateway::Cause::Session { born: 0 }, taking);
                });
            }
        }
        for (place, key) in from.keys.iter().enumerate() {
            if key.died == 0 && from.used.losses < self.bounds.losses {
                let what = format!("the key of session {} vanishes", key.born);
                self.step(from, out, what, |_, to, _| {
                    to.used.losses += 1;
                    to.revision += 1;
                    to.keys[place].died = to.revision;
                });
            }
        }
        let cuts = if from.used.cuts < self.bounds.cuts { from.conns.as_slice() } else { &[] };
        for &conn in cuts {
            let (at, epoch) = ends(conn);
            let what = format!("{}'s connection to p{epoch} is cut", name(at));
            self.step(from, out, what, |world, to, taking| {
                to.used.cuts += 1;
                to.conns.retain(|&other| other != conn);
                to.flying.retain(|flying| flying.conn != conn || flying.to_node);
                world.tell_gateway(to, at, gateway::Cause::Closed { conn }, taking);
            });
        }
    }

    fn clients(&mut self, from: &State, out: &mut Vec<Step<State>>) {
        let asked = from.requests.iter().map(|request| request.op + 1).max().unwrap_or(0);
        let retries = from.requests.len() as u8 - asked;
        let again = if retries < self.bounds.retries { 0..asked } else { 0..0 };
        let anew = (asked < self.bounds.ops).then_some(asked);
        for op in again.chain(anew) {
            for at in 0..from.gateways.len() {
                let what = format!("op {op} is sent to {}", name(at));
                self.step(from, out, what, |world, to, taking| {
                    world.ask(to, op, at, taking);
                });
            }
        }
    }

    fn ask(&mut self, state: &mut State, op: u8, at: usize, taking: &mut Taking) {
        let first = state.requests.iter().find(|request| request.op == op);
        if first.is_some_and(|first| usize::from(first.gateway) != at) {
            taking.sometimes.push("a client retries through another gateway");
        }
        let issued = first.map_or(state.used.ticks, |first| first.issued);
        state.requests.push(Request { op, gateway: at as u8, issued, told: None });
        let request = state.requests.len() as u8;
        self.tell_gateway(state, at, gateway::Cause::Write { op, request, issued }, taking);
    }

    fn said(&self, wire: u32) -> String {
        match self.primaries.table.wires.borrow().get(wire) {
            Wire::To(GatewayMessage::Frame { message, batches }) => {
                let numbers = batches.iter().map(|b| (b.session.0.revision, b.batch_seq.0));
                format!("message {message}, (session, batch_seq) {:?}", numbers.collect::<Vec<_>>())
            }
            Wire::From(NodeReply::Answer { message, session, batch_seq, answer, .. }) => {
                let session = session.0.revision;
                format!("to message {message}, ({session}, {}): {answer:?}", batch_seq.0)
            }
            other => format!("{other:?}"),
        }
    }
}

fn name(gateway: usize) -> String {
    format!("g{gateway}")
}

impl World for Sessions {
    type State = State;

    fn initial(&mut self) -> State {
        if self.start.is_none() {
            self.start = Some(self.begin());
        }
        self.start.clone().expect("just made")
    }

    fn steps(&mut self, from: &State, out: &mut Vec<Step<State>>) {
        self.messages(from, out);
        self.shard(from, out);
        self.workers(from, out);
        self.clients(from, out);
    }

    fn show(&self, state: &State) -> String {
        let primaries = (1..=state.primaries.len() as u8).map(|epoch| {
            let face = self.face(state, epoch);
            let leads = if face.leads { "" } else { " (follows)" };
            let expired: Vec<u32> = (0..32).filter(|id| face.expired >> id & 1 == 1).collect();
            format!(
                "p{epoch}{leads}: {} entries, {} committed, value {:x}, {} rows, R {}, expired {expired:?}",
                face.log.len(),
                face.commit,
                face.value,
                face.rows,
                face.collected
            )
        });
        let keys = state.keys.iter().map(|key| match key.died {
            0 => format!("{} of g{}", key.born, key.gateway),
            died => format!("{} of g{}, gone at {died}", key.born, key.gateway),
        });
        let told =
            state.requests.iter().map(|request| format!("op {}: {:?}", request.op, request.told));
        let all = primaries.chain([format!("keys [{}]", keys.collect::<Vec<_>>().join("; "))]);
        all.chain(told).collect::<Vec<_>>().join(" | ")
    }
}
