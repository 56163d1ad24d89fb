//! The world of sessions: gateway workers, one shard with its successive primaries, the `gateway/`
//! keys in etcd, and the faults between them. Workers and primaries run the machines of the engine.
//!
//! * **Commits.** The [replication](super::replication) world covers how entries become committed.
//!   Here the oldest group of a primary is committed in one step at any time. A failover takes one
//!   step, too: the new primary starts with the log of any earlier one, cut anywhere above the
//!   committed entries. The old primary continues until it reads the record, and may still commit
//!   entries that all later logs hold.
//! * **Connections** are first in, first out. A cut connection carries no more answers, but
//!   messages already sent on it may arrive at any later moment or never. The worker has a new
//!   connection at once. A message may arrive twice.
//! * **Keys** may vanish at any time, and their worker may notice it at any later time. A worker
//!   that has noticed it, or has given up a session, creates a new key.
//! * **A list of sessions** may be of any earlier revision, since an answer of etcd may be slow.
//!   The time for which a session was seen absent depends on the ticks at the primary.
//! * **Clients** send a request once, or again under their token, through any gateway and at any
//!   time, whatever answers they received. A gateway that has died is one that takes no step any
//!   more.

pub mod gateway;
pub mod leader;
mod promises;

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::rc::Rc;

use engine::batcher;
use engine::batcher::window::WindowSettings;
use engine::key::CounterKey;
use engine::message::{GatewayMessage, NodeReply};
use engine::node;
use engine::planted::Planted;
use engine::shard::idempotency::{Scope, TokenSettings};

use self::gateway::{ClientAnswer, Gateway, GatewayContext, GatewayInput, GatewayOutput, Waits};
use self::leader::{Leader, LeaderContext, LeaderInput, LeaderOutput, LeaderSummary};
use super::frontier::{SearchWorld, Step, StepNotes};
use super::machines::Machines;
use super::store::Interned;

/// A message between a gateway and a node.
#[derive(Clone, Debug)]
pub enum GatewayWireMessage {
    To(GatewayMessage),
    From(NodeReply),
}

/// All messages so far, interned.
pub type Wires = Rc<RefCell<Interned<GatewayWireMessage>>>;

/// Returns the only counter of this world.
pub fn counter() -> CounterKey {
    CounterKey::new(b"n", b"c").expect("a short plain name")
}

/// Returns the digit of an op in a value: the number of times that the op is counted.
pub fn digit(value: i128, op: u8) -> i128 {
    value >> (4 * op) & 15
}

/// The bounds of the world: how often each event may happen.
#[derive(Clone, Copy, Debug)]
pub struct SessionBounds {
    pub gateways: u8,
    /// The number of sessions of all gateways together.
    pub keys: u8,
    /// The number of keys that vanish.
    pub losses: u8,
    pub epochs: u8,
    pub ops: u8,
    /// The token of each op: none, one of the op itself, or one of a batch.
    pub tokens: Option<Scope>,
    /// The number of requests that repeat an earlier one under its token.
    pub retries: u8,
    /// The number of cut connections, and of messages that arrive twice.
    pub cuts: u8,
    pub repeats: u8,
    /// The number of lists of sessions that reach a primary, of ticks at a primary, and the seconds
    /// of a tick.
    pub lists: u8,
    pub ticks: u8,
    pub tick_s: u16,
    /// The number of deadlines that pass, and of waits of a worker before it sends again.
    pub late: u8,
    pub waits: u8,
    /// The number of times that a disk is full for a while, during which batches are refused.
    pub full: u8,
}

#[derive(Clone, Debug, Default, Eq, Hash, PartialEq)]
struct SessionsUsage {
    losses: u8,
    cuts: u8,
    repeats: u8,
    lists: u8,
    ticks: u8,
    late: u8,
    waits: u8,
    full: u8,
}

/// The key of a worker in etcd.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
struct GatewayKey {
    gateway: u8,
    born: u8,
    /// The revision at which it vanished; 0 while it exists.
    died: u8,
}

/// A message in flight on a connection of a gateway.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
struct InFlightGatewayMessage {
    conn: u64,
    to_node: bool,
    wire: u32,
}

impl InFlightGatewayMessage {
    fn stream(&self) -> (u64, bool) {
        (self.conn, self.to_node)
    }
}

/// A request of a client, and its answer.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub(super) struct SessionRequest {
    pub op: u8,
    gateway: u8,
    issued: u8,
    pub answer: Option<ClientAnswer>,
}

/// A state of the world, which consists of numbers only.
#[derive(Clone, Debug, Default, Eq, Hash, PartialEq)]
pub struct SessionsState {
    /// The primary of epoch e is at index e − 1.
    primaries: Vec<u32>,
    /// The maximum commit position of each primary.
    caps: Vec<usize>,
    /// The epoch of the newest record that each primary has read, and each gateway.
    seen: Vec<u8>,
    known: Vec<u8>,
    gateways: Vec<u32>,
    /// For each gateway, true if it has to create a new key.
    wants: Vec<bool>,
    conns: Vec<u64>,
    generations: Vec<Vec<u8>>,
    in_flight: Vec<InFlightGatewayMessage>,
    keys: Vec<GatewayKey>,
    revision: u8,
    used: SessionsUsage,
    // -- state that only the promises need
    pub(super) requests: Vec<SessionRequest>,
    committed: Vec<u64>,
}

const GENERATIONS: u64 = 16;
const EPOCHS_MAX: u64 = 8;

fn conn_of(gateway: usize, epoch: u8, generation: u8) -> u64 {
    (gateway as u64 * EPOCHS_MAX + u64::from(epoch)) * GENERATIONS + u64::from(generation)
}

/// Returns the gateway and the epoch of the primary.
fn ends(conn: u64) -> (usize, u8) {
    let pair = conn / GENERATIONS;
    ((pair / EPOCHS_MAX) as usize, (pair % EPOCHS_MAX) as u8)
}

pub struct Sessions {
    bounds: SessionBounds,
    pub primaries: Machines<Leader>,
    pub gateways: Machines<Gateway>,
    start: Option<SessionsState>,
}

/// The time for which a client token is valid.
const WINDOW_MS: u64 = 100_000;
/// The time for which a session must be seen absent, which is less than a tick.
const ABSENT_MS: u64 = 1_000;

impl Sessions {
    pub fn new(bounds: SessionBounds, planted: Option<Planted>) -> Self {
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
        let primaries = LeaderContext { settings, tick_ms, wires: wires.clone() };
        // The window is large, since the number of unanswered messages does not affect their
        // handling.
        let window = WindowSettings { messages: 1_000, late_percent: 0, ..Default::default() };
        let settings = batcher::Settings { window, planted, ..Default::default() };
        let gateways = GatewayContext { settings, tokens: bounds.tokens, tick_ms, wires };
        Self {
            bounds,
            primaries: Machines::new(primaries),
            gateways: Machines::new(gateways),
            start: None,
        }
    }

    fn summary(&self, state: &SessionsState, epoch: u8) -> &LeaderSummary {
        self.primaries.summary(state.primaries[usize::from(epoch) - 1])
    }

    /// Returns the summary of the primary with the most applied entries.
    fn newest(&self, state: &SessionsState) -> &LeaderSummary {
        let summaries = state.primaries.iter().map(|&number| self.primaries.summary(number));
        summaries.max_by_key(|summary| summary.applied).expect("there is a primary from the start")
    }

    // ---- start ---------------------------------------------------------------------------------

    /// Returns the initial state: the first primary has committed its barrier, and each gateway is
    /// connected and has a session.
    fn begin(&mut self) -> SessionsState {
        let mut state = SessionsState::default();
        let mut notes = StepNotes::default();
        self.promote(&mut state, Vec::new(), &mut notes);
        self.step_primary(&mut state, 1, LeaderInput::Committed, &mut notes);
        for at in 0..usize::from(self.bounds.gateways) {
            let gateway = Gateway::new(&self.gateways.context);
            state.gateways.push(self.gateways.number(gateway));
            state.known.push(0);
            state.wants.push(false);
            state.generations.push(vec![0; usize::from(self.bounds.epochs) + 1]);
            self.make_key(&mut state, at, &mut notes);
            self.read_record(&mut state, at, &mut notes);
        }
        assert_eq!(notes.broken, None, "the initial state is sound");
        state
    }

    // ---- steps of one machine ------------------------------------------------------------------

    fn step_primary(
        &mut self,
        state: &mut SessionsState,
        epoch: u8,
        input: LeaderInput,
        notes: &mut StepNotes,
    ) {
        let at = usize::from(epoch) - 1;
        let before = state.primaries[at];
        let did = self.primaries.on(before, input);
        if let Some(why) = &did.panicked {
            return notes.broken(format!("an assertion of the primary of {epoch}: {why}"));
        }
        state.primaries[at] = did.to;
        self.note_primary(state, epoch, before, notes);
        for out in &did.out {
            match *out {
                LeaderOutput::Reply { conn, wire } => {
                    if state.conns.contains(&conn) {
                        state.in_flight.push(InFlightGatewayMessage { conn, to_node: false, wire });
                    } else {
                        notes.sometimes.push("an answer is lost");
                    }
                }
                LeaderOutput::Noted(what) => notes.sometimes.push(what),
            }
        }
    }

    fn note_primary(
        &self,
        state: &mut SessionsState,
        epoch: u8,
        before: u32,
        notes: &mut StepNotes,
    ) {
        let old = self.primaries.summary(before);
        let new = self.summary(state, epoch);
        let deposed = usize::from(epoch) < state.primaries.len();
        if deposed && new.commit > old.commit {
            notes.sometimes.push("a deposed primary still commits");
        }
        if new.expired != old.expired {
            notes.sometimes.push("sessions expire");
        }
        if let Err(why) = promises::commits_one_log(&mut state.committed, new)
            .and_then(|()| promises::stays_expired(old, new))
            .and_then(|()| self.no_live_session_expires(state, new))
        {
            notes.broken(why);
        }
    }

    /// Checks that no session is collected whose key existed at the revision of the collection.
    fn no_live_session_expires(
        &self,
        state: &SessionsState,
        summary: &LeaderSummary,
    ) -> Result<(), String> {
        let stood = |key: &&GatewayKey| key.died == 0 || u64::from(key.died) > summary.collected;
        match state.keys.iter().filter(stood).find(|key| summary.expired >> key.born & 1 == 1) {
            Some(key) => Err(format!("session {} is collected although its key existed", key.born)),
            None => Ok(()),
        }
    }

    fn step_gateway(
        &mut self,
        state: &mut SessionsState,
        at: usize,
        input: GatewayInput,
        notes: &mut StepNotes,
    ) {
        let did = self.gateways.on(state.gateways[at], input);
        if let Some(why) = &did.panicked {
            return notes.broken(format!("an assertion of {}: {why}", name(at)));
        }
        state.gateways[at] = did.to;
        for out in &did.out {
            match *out {
                GatewayOutput::Send { conn, wire } => {
                    state.in_flight.push(InFlightGatewayMessage { conn, to_node: true, wire });
                }
                GatewayOutput::Wrote { request, answer } => {
                    state.requests[usize::from(request) - 1].answer = Some(answer);
                    notes.sometimes.push(promises::label(answer));
                    if let Err(why) = promises::check_answer(&state.requests, request) {
                        notes.broken(why);
                    }
                }
                GatewayOutput::Abandoned => {
                    notes.sometimes.push("a session is given up");
                    state.wants[at] = true;
                }
            }
        }
        self.connect(state, at, notes);
    }

    /// Connects a gateway to the primary in the newest record that it has read.
    fn connect(&mut self, state: &mut SessionsState, at: usize, notes: &mut StepNotes) {
        let Some(&epoch) = self.gateways.summary(state.gateways[at]).unconnected.first() else {
            return;
        };
        let generation = &mut state.generations[at][usize::from(epoch)];
        *generation += 1;
        let conn = conn_of(at, epoch, *generation);
        state.conns.push(conn);
        self.step_primary(state, epoch, LeaderInput::Accepted { conn }, notes);
        self.step_gateway(state, at, GatewayInput::Connected { conn, epoch }, notes);
    }

    fn make_key(&mut self, state: &mut SessionsState, at: usize, notes: &mut StepNotes) {
        state.revision += 1;
        let born = state.revision;
        state.keys.push(GatewayKey { gateway: at as u8, born, died: 0 });
        state.wants[at] = false;
        self.step_gateway(state, at, GatewayInput::Session { born }, notes);
    }

    fn read_record(&mut self, state: &mut SessionsState, at: usize, notes: &mut StepNotes) {
        let epoch = state.primaries.len() as u8;
        state.known[at] = epoch;
        self.step_gateway(state, at, GatewayInput::Record { epoch }, notes);
    }

    /// Begins the next epoch with a primary that has this log.
    fn promote(
        &mut self,
        state: &mut SessionsState,
        entries: Vec<engine::entry::Entry>,
        notes: &mut StepNotes,
    ) {
        let epoch = state.primaries.len() as u8 + 1;
        for (&primary, cap) in state.primaries.iter().zip(&mut state.caps) {
            let log = &self.primaries.summary(primary).log;
            let both = log.iter().zip(&entries).take_while(|(own, new)| **own == new.chain.0);
            *cap = (*cap).min(both.count());
        }
        let leader = Leader::new(&self.primaries.context, epoch, entries);
        state.primaries.push(self.primaries.number(leader));
        state.caps.push(usize::MAX);
        state.seen.push(epoch);
        self.step_primary(state, epoch, LeaderInput::Record { epoch }, notes);
    }

    // ---- possible steps ------------------------------------------------------------------------

    fn step(
        &mut self,
        from: &SessionsState,
        out: &mut Vec<Step<SessionsState>>,
        what: String,
        take: impl FnOnce(&mut Self, &mut SessionsState, &mut StepNotes),
    ) {
        let mut to = from.clone();
        let mut notes = StepNotes::default();
        take(self, &mut to, &mut notes);
        to.conns.sort();
        to.in_flight.sort_by_key(InFlightGatewayMessage::stream);
        let broken = notes
            .broken
            .or_else(|| promises::broken(self.bounds.ops, &to.requests, self.newest(&to).value));
        out.push(Step { what, to, sometimes: notes.sometimes, broken });
    }

    fn messages(&mut self, from: &SessionsState, out: &mut Vec<Step<SessionsState>>) {
        let mut streams = BTreeSet::new();
        for (place, &in_flight) in from.in_flight.iter().enumerate() {
            if !streams.insert(in_flight.stream()) {
                continue;
            }
            let (gateway, epoch) = ends(in_flight.conn);
            let wire = in_flight.wire;
            let content = self.describe(wire);
            let conn = in_flight.conn;
            let (g, p) = (name(gateway), format!("p{epoch}"));
            if !in_flight.to_node {
                self.step(from, out, format!("{g} ← {p}: {content}"), |world, to, notes| {
                    to.in_flight.remove(place);
                    let input = GatewayInput::Received { conn, wire };
                    world.step_gateway(to, gateway, input, notes);
                });
                continue;
            }
            let stale = !from.conns.contains(&conn);
            for again in [false, true] {
                if again && from.used.repeats >= self.bounds.repeats {
                    continue;
                }
                let twice = if again { ", and will come again" } else { "" };
                let what = format!("{g} → {p}: {content}{twice}");
                self.step(from, out, what, |world, to, notes| {
                    if again {
                        to.used.repeats += 1;
                    } else {
                        to.in_flight.remove(place);
                    }
                    if stale {
                        notes.sometimes.push("a message arrives after its connection was cut");
                    }
                    let input = LeaderInput::Received { conn, wire };
                    world.step_primary(to, epoch, input, notes);
                });
            }
        }
    }

    fn shard(&mut self, from: &SessionsState, out: &mut Vec<Step<SessionsState>>) {
        let newest = from.primaries.len() as u8;
        for epoch in 1..=newest {
            let at = usize::from(epoch) - 1;
            let summary = self.summary(from, epoch).clone();
            if summary.next.is_some_and(|end| end <= from.caps[at]) {
                self.step(from, out, format!("p{epoch} commits"), |world, to, notes| {
                    world.step_primary(to, epoch, LeaderInput::Committed, notes);
                });
            }
            if from.seen[at] < newest {
                self.step(from, out, format!("p{epoch} reads the record"), |world, to, notes| {
                    to.seen[at] = newest;
                    let input = LeaderInput::Record { epoch: newest };
                    world.step_primary(to, epoch, input, notes);
                });
            }
            if summary.active && from.used.ticks < self.bounds.ticks {
                self.step(from, out, format!("time passes at p{epoch}"), |world, to, notes| {
                    to.used.ticks += 1;
                    world.step_primary(to, epoch, LeaderInput::Tick, notes);
                });
            }
            if summary.full || summary.leads && from.used.full < self.bounds.full {
                let what = if summary.full { "has room again" } else { "has no room" };
                self.step(from, out, format!("p{epoch}'s disk {what}"), |world, to, notes| {
                    to.used.full += u8::from(!summary.full);
                    world.step_primary(to, epoch, LeaderInput::Full(!summary.full), notes);
                });
            }
            if summary.active && summary.rows > 0 && from.used.lists < self.bounds.lists {
                self.lists(from, epoch, out);
            }
        }
        if newest < self.bounds.epochs {
            self.failovers(from, out);
        }
    }

    fn lists(&mut self, from: &SessionsState, epoch: u8, out: &mut Vec<Step<SessionsState>>) {
        for at in 1..=from.revision {
            let stood = |key: &&GatewayKey| key.born <= at && (key.died == 0 || key.died > at);
            let alive = from.keys.iter().filter(stood).fold(0, |mask, key| mask | 1 << key.born);
            let what = format!("p{epoch} receives the keys at revision {at}: {alive:b}");
            self.step(from, out, what, |world, to, notes| {
                to.used.lists += 1;
                world.step_primary(to, epoch, LeaderInput::Listed { at, alive }, notes);
            });
        }
    }

    fn failovers(&mut self, from: &SessionsState, out: &mut Vec<Step<SessionsState>>) {
        let mut logs = BTreeSet::new();
        let committed = from.committed.len();
        for (at, &number) in from.primaries.iter().enumerate() {
            let log = self.primaries.summary(number).log.clone();
            if !log.starts_with(&from.committed) {
                continue;
            }
            for len in committed..=log.len() {
                if !logs.insert(log[..len].to_vec()) {
                    continue;
                }
                let what = format!("failover: the log of p{} up to {len}", at + 1);
                self.step(from, out, what, |world, to, notes| {
                    if len > committed {
                        notes.sometimes.push("an uncommitted tail survives a failover");
                    }
                    if len < log.len() {
                        notes.sometimes.push("an uncommitted tail is lost in a failover");
                    }
                    let entries = world.primaries.machine(number).entries()[..len].to_vec();
                    world.promote(to, entries, notes);
                });
            }
        }
    }

    fn workers(&mut self, from: &SessionsState, out: &mut Vec<Step<SessionsState>>) {
        for at in 0..from.gateways.len() {
            let summary = self.gateways.summary(from.gateways[at]).clone();
            if usize::from(from.known[at]) < from.primaries.len() {
                self.step(
                    from,
                    out,
                    format!("{} reads the record", name(at)),
                    |world, to, notes| {
                        world.read_record(to, at, notes);
                    },
                );
            }
            let (used, late) = match summary.waits {
                Some(Waits::ForDeadline) => (from.used.late < self.bounds.late, true),
                Some(Waits::ToSend) => (from.used.waits < self.bounds.waits, false),
                None => (false, false),
            };
            if used {
                let what = if late { "a deadline passes" } else { "waits" };
                self.step(from, out, format!("{}: {what}", name(at)), |world, to, notes| {
                    to.used.late += u8::from(late);
                    to.used.waits += u8::from(!late);
                    world.step_gateway(to, at, GatewayInput::Wait, notes);
                });
            }
            if from.wants[at] && from.keys.len() < self.bounds.keys.into() {
                self.step(
                    from,
                    out,
                    format!("{} makes a new key", name(at)),
                    |world, to, notes| {
                        world.make_key(to, at, notes);
                    },
                );
            }
            let lost = from.keys.iter().any(|key| key.born == summary.session && key.died > 0);
            if lost {
                let what = format!("{} notices that its key is gone", name(at));
                self.step(from, out, what, |world, to, notes| {
                    to.wants[at] = true;
                    world.step_gateway(to, at, GatewayInput::Session { born: 0 }, notes);
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
            self.step(from, out, what, |world, to, notes| {
                to.used.cuts += 1;
                to.conns.retain(|&other| other != conn);
                to.in_flight.retain(|in_flight| in_flight.conn != conn || in_flight.to_node);
                world.step_gateway(to, at, GatewayInput::Closed { conn }, notes);
            });
        }
    }

    fn clients(&mut self, from: &SessionsState, out: &mut Vec<Step<SessionsState>>) {
        let asked = from.requests.iter().map(|request| request.op + 1).max().unwrap_or(0);
        let retries = from.requests.len() as u8 - asked;
        let again = if retries < self.bounds.retries { 0..asked } else { 0..0 };
        let first_send = (asked < self.bounds.ops).then_some(asked);
        for op in again.chain(first_send) {
            for at in 0..from.gateways.len() {
                let what = format!("op {op} is sent to {}", name(at));
                self.step(from, out, what, |world, to, notes| {
                    world.ask(to, op, at, notes);
                });
            }
        }
    }

    fn ask(&mut self, state: &mut SessionsState, op: u8, at: usize, notes: &mut StepNotes) {
        let first = state.requests.iter().find(|request| request.op == op);
        if first.is_some_and(|first| usize::from(first.gateway) != at) {
            notes.sometimes.push("a client retries through another gateway");
        }
        let issued = first.map_or(state.used.ticks, |first| first.issued);
        state.requests.push(SessionRequest { op, gateway: at as u8, issued, answer: None });
        let request = state.requests.len() as u8;
        self.step_gateway(state, at, GatewayInput::Write { op, request, issued }, notes);
    }

    fn describe(&self, wire: u32) -> String {
        match self.primaries.context.wires.borrow().get(wire) {
            GatewayWireMessage::To(GatewayMessage::Frame { message, batches }) => {
                let numbers = batches.iter().map(|b| (b.session.0.revision, b.batch_seq.0));
                format!("message {message}, (session, batch_seq) {:?}", numbers.collect::<Vec<_>>())
            }
            GatewayWireMessage::From(NodeReply::Answer {
                message,
                session,
                batch_seq,
                answer,
                ..
            }) => {
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

impl SearchWorld for Sessions {
    type State = SessionsState;

    fn initial(&mut self) -> SessionsState {
        if self.start.is_none() {
            self.start = Some(self.begin());
        }
        self.start.clone().expect("just made")
    }

    fn steps(&mut self, from: &SessionsState, out: &mut Vec<Step<SessionsState>>) {
        self.messages(from, out);
        self.shard(from, out);
        self.workers(from, out);
        self.clients(from, out);
    }

    fn show(&self, state: &SessionsState) -> String {
        let primaries = (1..=state.primaries.len() as u8).map(|epoch| {
            let summary = self.summary(state, epoch);
            let leads = if summary.leads { "" } else { " (follows)" };
            let expired: Vec<u32> = (0..32).filter(|id| summary.expired >> id & 1 == 1).collect();
            format!(
                "p{epoch}{leads}: {} entries, {} committed, value {:x}, {} rows, collected to {}, \
                 expired {expired:?}",
                summary.log.len(),
                summary.commit,
                summary.value,
                summary.rows,
                summary.collected
            )
        });
        let keys = state.keys.iter().map(|key| match key.died {
            0 => format!("{} of g{}", key.born, key.gateway),
            died => format!("{} of g{}, gone at {died}", key.born, key.gateway),
        });
        let answers = state.requests.iter();
        let answers = answers.map(|request| format!("op {}: {:?}", request.op, request.answer));
        let all = primaries.chain([format!("keys [{}]", keys.collect::<Vec<_>>().join("; "))]);
        all.chain(answers).collect::<Vec<_>>().join(" | ")
    }
}
