//! A gateway: the engine's batcher, driven as production drives it, one worker to a process.
//!
//! Like every driver it decides nothing: it keeps the worker's key in etcd alive, dials every node
//! that it knows of, and passes inputs to the batcher. The inputs of one turn of the driver are
//! handled together: some operations become one request, and all are sent when the turn ends.

use std::collections::BTreeMap;

use engine::batcher::{Batcher, Effect, Event, Failure, Outcome, ReadValues};
use engine::ids::{Conn, SessionId, StoreBoot, StoreId};
use engine::message::{BatchReply, NodeReply};
use engine::ops::{Op, OpKind};

use super::checker::{Violation, answers};
use super::core::{Core, since};
use super::coverage::Path;
use super::etcd::{Call, Compare, EtcdKey, EtcdValue, EtcdWatchEvent, Reply, Versioned, Write};
use super::event::{ProcessInput, SimEvent};
use super::history::{Ask, OpOutcome};
use super::late::{Late, LateItems, Stream};
use super::place::{Place, ProcessId, place_of};
use super::request::{ClientReply, ClientRequest, TokenReply, TokenSend};
use super::token_history::outcomes_of;
use super::wire::WireMessage;

const TOCK: u64 = 20_000;
/// The period of keep-alives: a part of the lease's time to live, which is at least 500 ms.
const KEEP_ALIVE: u64 = 150_000;

pub struct GatewayHost {
    pub place: Place,
    pub incarnation: u32,
    running: Option<RunningGateway>,
}

struct RunningGateway {
    batcher: Batcher,
    started: u64,
    effects: Vec<Effect>,
    /// The effects that it was about to perform when it was paused, with the times of their
    /// decision.
    held_back: Vec<(u64, Effect)>,
    /// Effects with the times of their decision, and answers.
    late: LateItems<Late<(u64, Effect), Event>>,
    wake_at: Option<u64>,
    peers: BTreeMap<StoreId, KnownNode>,

    // -- etcd
    nonce: u64,
    lease: Option<u64>,
    session: Option<SessionId>,
    call: Option<u64>,
    next_call: u64,

    // -- clients
    /// The requests that have arrived since the last turn ended.
    gathered: Vec<ClientRequest>,
    /// The client requests in each request to the batcher.
    asked: BTreeMap<u64, Vec<ClientRequest>>,
    /// Requests with a token.
    tokens: BTreeMap<u64, Box<TokenSend>>,
    last_request: u64,
}

/// A node that this gateway knows of.
#[derive(Default)]
struct KnownNode {
    dial: Option<u64>,
    conn: Option<(Conn, StoreBoot)>,
    next_dial: u64,
}

impl GatewayHost {
    pub fn new(index: u8) -> Self {
        Self { place: Place::Gateway(index), incarnation: 0, running: None }
    }

    pub fn process(&self) -> ProcessId {
        ProcessId { place: self.place, incarnation: self.incarnation }
    }

    /// The lease of its key.
    pub fn lease(&self) -> Option<u64> {
        self.running.as_ref()?.lease
    }

    pub fn is_down(&self) -> bool {
        self.running.is_none()
    }

    pub fn start(&mut self, core: &mut Core) {
        if !self.is_down() {
            return;
        }
        self.incarnation += 1;
        self.running = Some(RunningGateway {
            batcher: Batcher::new(core.plan.gateway.clone()),
            started: core.clock(),
            effects: Vec::new(),
            held_back: Vec::new(),
            late: LateItems::default(),
            wake_at: None,
            peers: BTreeMap::new(),
            nonce: core.rng.word(),
            lease: None,
            session: None,
            call: None,
            next_call: 0,
            gathered: Vec::new(),
            asked: BTreeMap::new(),
            tokens: BTreeMap::new(),
            last_request: 0,
        });
        core.etcd_watch(self.process());
        core.input_after(1, self.process(), ProcessInput::Tock);
    }

    pub fn crash(&mut self, core: &mut Core) {
        let Some(running) = self.running.take() else { return };
        core.process_died(self.process(), true);
        core.etcd_unwatch(self.process());
        let asked = running.asked.into_values().flatten();
        for request in running.gathered.into_iter().chain(asked) {
            let answered = ClientReply { id: request.id, outcome: OpOutcome::Unknown };
            core.after(1_000, SimEvent::Answered(answered));
        }
        for send in running.tokens.into_values() {
            let answered = TokenReply::of(&send, None);
            core.after(1_000, SimEvent::TokenAnswered(answered));
        }
    }

    pub fn on(&mut self, core: &mut Core, input: ProcessInput) {
        let process = self.process();
        if let Some(running) = &mut self.running {
            GatewayDriver { process, running }.on_input(core, input);
        }
    }
}

struct GatewayDriver<'a> {
    process: ProcessId,
    running: &'a mut RunningGateway,
}

impl GatewayDriver<'_> {
    fn on_input(&mut self, core: &mut Core, input: ProcessInput) {
        match input {
            // An earlier deadline has replaced this one.
            ProcessInput::Wake if self.running.wake_at != Some(core.now) => {}
            ProcessInput::Wake => self.end_turn(core),
            ProcessInput::Resumed => {
                for (decided_at, effect) in std::mem::take(&mut self.running.held_back) {
                    self.perform(core, decided_at, effect);
                }
                self.end_turn(core);
            }
            ProcessInput::Tock => self.tock(core),
            ProcessInput::Late { number } => self.late(core, number),
            ProcessInput::Dialled { dial, conn, peer } => self.dialled(core, dial, conn, peer),
            ProcessInput::DialFailed { dial, refused } => self.dial_failed(core, dial, refused),
            ProcessInput::Closed { conn } => self.closed(core, conn),
            ProcessInput::Received { conn, wire: WireMessage::ToGateway(reply) } => {
                self.watch_over(core, &reply);
                self.handle(core, Event::Reply { conn, reply });
            }
            ProcessInput::Etcd { call, reply } if self.running.call == Some(call) => {
                self.running.call = None;
                self.etcd(core, reply);
            }
            ProcessInput::EtcdTimeout { call } if self.running.call == Some(call) => {
                self.running.call = None;
            }
            ProcessInput::Watched(events) => self.watched(core, events),
            ProcessInput::TokenRequest(send) => self.begin_token(core, send),
            ProcessInput::Request(request) => {
                self.running.gathered.push(request);
                self.turn_ends_soon(core);
            }
            _ => {}
        }
    }

    // ---- turns ---------------------------------------------------------------------------------

    fn handle(&mut self, core: &mut Core, event: Event) {
        self.run_batcher(core, event);
        self.turn_ends_soon(core);
    }

    fn run_batcher(&mut self, core: &mut Core, event: Event) {
        let me = self.process;
        core.trace.note(core.now, || format!("{me:?} <- {event:?}"));
        let now = since(self.running.started, core.clock());
        self.running.late.handled += 1;
        self.running.batcher.handle(now, event, &mut self.running.effects);
    }

    /// Schedules the end of the turn: the driver takes a random time to handle its inputs.
    fn turn_ends_soon(&mut self, core: &mut Core) {
        let turn = core.plan.turn;
        let after = core.rng.between(1, turn + 1);
        self.wake_at(core, core.now + after);
    }

    fn wake_at(&mut self, core: &mut Core, at: u64) {
        let at = at.max(core.now + 1);
        if self.running.wake_at.is_none_or(|wake| at < wake) {
            self.running.wake_at = Some(at);
            core.input_after(at - core.now, self.process, ProcessInput::Wake);
        }
    }

    fn end_turn(&mut self, core: &mut Core) {
        self.running.wake_at = None;
        self.ask(core);
        self.run_batcher(core, Event::TurnEnded);
        for effect in std::mem::take(&mut self.running.effects) {
            let me = self.process;
            core.trace.note(core.now, || format!("{me:?} -> {effect:?}"));
            let stream = Some(Stream::Batcher);
            match core.lateness(&self.running.late, stream) {
                Some(lag) => {
                    let item = Late::Effect((core.now, effect));
                    core.keep(&mut self.running.late, me, stream, (lag, item));
                }
                None => self.perform_or_hold(core, core.now, effect),
            }
        }
        if let Some(deadline) = self.running.batcher.next_deadline() {
            let now = since(self.running.started, core.clock());
            assert!(deadline > now, "a turn at {now:?} leaves a deadline at {deadline:?}");
            let at = core.when(self.running.started + deadline.0);
            let late = core.plan.reorder.lateness(false).unwrap_or(0);
            self.wake_at(core, at + late);
        }
    }

    fn perform_or_hold(&mut self, core: &mut Core, decided_at: u64, effect: Effect) {
        if core.holds_back(self.process) {
            self.running.held_back.push((decided_at, effect));
        } else {
            self.perform(core, decided_at, effect);
        }
    }

    /// The gateway performs or reports something that is late: docs/design.md#order-of-effects.
    fn late(&mut self, core: &mut Core, number: u64) {
        let Some((item, overtaken)) = self.running.late.take(number) else { return };
        let path = match item {
            Late::Effect(_) => Path::BatcherLate,
            Late::Answer(_) => Path::BatcherRecordLate,
        };
        if overtaken {
            core.oracle.coverage.reached(path);
        }
        match item {
            // The gateway has another session by now.
            Late::Effect((_, Effect::AbandonSession(session)))
                if self.running.session != Some(session) => {}
            Late::Effect((decided_at, effect)) => {
                self.perform_or_hold(core, decided_at, effect);
            }
            Late::Answer(event) => self.handle(core, event),
        }
    }

    fn perform(&mut self, core: &mut Core, decided_at: u64, effect: Effect) {
        match effect {
            Effect::Send { conn, message } => {
                core.oracle.asked(&message);
                core.send(conn, WireMessage::ToNode(message));
            }
            Effect::Wrote { request, result } if self.running.tokens.contains_key(&request) => {
                let Some(send) = self.running.tokens.remove(&request) else { return };
                answers::outcomes(&send.ops, &result, &mut core.oracle.violations);
                let outcomes = outcomes_of(&send.ops, &result);
                let answered = TokenReply {
                    replayed: result.replayed,
                    ..TokenReply::of(&send, Some(outcomes))
                };
                let delay = core.delay();
                core.after(delay, SimEvent::TokenAnswered(answered));
            }
            Effect::Wrote { request, result } => {
                let asked = self.asked(core, request);
                let ops: Vec<Op> = asked.iter().filter_map(op).collect();
                let violations = &mut core.oracle.violations;
                let outcomes = answers::outcomes(&ops, &result, violations).unwrap_or_default();
                for (request, outcome) in asked.iter().zip(outcomes) {
                    answer(core, request, outcome.map_or_else(known, OpOutcome::Applied));
                }
            }
            Effect::ReadDone { request, result } => {
                let asked = self.asked(core, request);
                for (at, request) in asked.iter().enumerate() {
                    let outcome = match &result {
                        Err(_) => OpOutcome::NotApplied,
                        Ok(found) => self.found(core, decided_at, request, found, at),
                    };
                    answer(core, request, outcome);
                }
            }
            Effect::Report(report) => core.report(self.process, None, &report),
            // The next session has another key: the old key ends with its lease.
            Effect::AbandonSession(_) => {
                self.running.lease = None;
                self.running.session = None;
                self.running.nonce = core.rng.word();
                self.running.next_call = core.now;
            }
        }
    }

    /// The outcome of a read. A value that is not stale at all has to be linearizable. The age is
    /// that at the moment of the gateway's answer; if the gateway is paused then, or the network is
    /// slow, its client can add that itself.
    fn found(
        &self,
        core: &mut Core,
        decided_at: u64,
        asked: &ClientRequest,
        found: &ReadValues,
        at: usize,
    ) -> OpOutcome {
        let (value, staleness_ms) = (found.values[at], found.staleness_ms);
        if staleness_ms > asked.max_staleness_ms.unwrap_or(0) {
            let detail = format!("{asked:?} received a value of {staleness_ms} ms ago");
            core.oracle.violations.push(Violation { promise: "bounded", detail });
        }
        match staleness_ms {
            0 => OpOutcome::Applied(Some(value)),
            ms => OpOutcome::Stale { value, as_of: decided_at.saturating_sub(ms * 1_000) },
        }
    }

    /// Checks for replies that no correct cluster sends.
    fn watch_over(&mut self, core: &mut Core, reply: &NodeReply) {
        let NodeReply::Answer { session, answer, .. } = reply else { return };
        let wrong = match answer {
            BatchReply::NoEffect => "is out of order",
            BatchReply::Expired if core.etcd.has_session(*session) => {
                "expired while its key exists"
            }
            _ => return,
        };
        let detail = format!("{:?}: {session:?} {wrong}", self.process);
        core.oracle.violations.push(Violation { promise: "answers", detail });
    }

    // ---- clients -------------------------------------------------------------------------------

    /// Asks the batcher for the gathered requests, some of them in one request.
    fn ask(&mut self, core: &mut Core) {
        let gathered = std::mem::take(&mut self.running.gathered);
        let (reads, writes): (Vec<_>, Vec<_>) =
            gathered.into_iter().partition(|request| request.ask == Ask::Read);
        let (bounded, reads): (Vec<_>, Vec<_>) =
            reads.into_iter().partition(|request| request.max_staleness_ms.is_some());
        for kind in [reads, bounded, writes] {
            let mut request: Vec<ClientRequest> = Vec::new();
            for asked in kind {
                if !request.is_empty() && !core.rng.percent(core.plan.joined_percent) {
                    self.begin(core, std::mem::take(&mut request));
                }
                request.push(asked);
            }
            if !request.is_empty() {
                self.begin(core, request);
            }
        }
    }

    fn begin(&mut self, core: &mut Core, asked: Vec<ClientRequest>) {
        let deadline = asked.iter().map(|asked| asked.deadline).min().unwrap_or(core.now);
        let deadline = since(self.running.started, core.leapt + deadline.max(core.now));
        self.running.last_request += 1;
        let request = self.running.last_request;
        let ops: Vec<Op> = asked.iter().filter_map(op).collect();
        let event = if ops.is_empty() {
            let keys = asked.iter().map(|asked| asked.counter.clone()).collect();
            // The bound that satisfies all of them.
            let max_staleness_ms = asked.iter().filter_map(|asked| asked.max_staleness_ms).min();
            Event::Read { request, keys, max_staleness_ms, deadline }
        } else {
            Event::Write { request, ops, token: None, deadline }
        };
        self.running.asked.insert(request, asked);
        self.run_batcher(core, event);
    }

    /// A request with a token is a request of its own.
    fn begin_token(&mut self, core: &mut Core, send: Box<TokenSend>) {
        self.running.last_request += 1;
        let request = self.running.last_request;
        let deadline = since(self.running.started, core.leapt + send.deadline.max(core.now));
        let (ops, token) = (send.ops.clone(), Some(send.with.clone()));
        self.running.tokens.insert(request, send);
        self.handle(core, Event::Write { request, ops, token, deadline });
    }

    /// The client requests in an answered request, which is answered once.
    fn asked(&mut self, core: &mut Core, request: u64) -> Vec<ClientRequest> {
        self.running.asked.remove(&request).unwrap_or_else(|| {
            let detail = format!("request {request} was answered twice");
            core.oracle.violations.push(Violation { promise: "answers", detail });
            Vec::new()
        })
    }

    // ---- etcd ----------------------------------------------------------------------------------

    fn tock(&mut self, core: &mut Core) {
        core.input_after(TOCK, self.process, ProcessInput::Tock);
        self.register(core);
        self.dial_all(core);
    }

    /// Performs the next step of three: a lease, the key under it, and keeping it alive.
    fn register(&mut self, core: &mut Core) {
        if self.running.call.is_some() || core.now < self.running.next_call {
            return;
        }
        let call = match (self.running.lease, self.running.session) {
            (None, _) => Call::Grant { ttl: core.plan.lease_ttl },
            (Some(lease), Some(_)) => Call::KeepAlive { lease },
            (Some(lease), None) => {
                let key = EtcdKey::Gateway(self.running.nonce);
                let writes = vec![Write::Put(key, EtcdValue::Gateway, Some(lease))];
                Call::Txn { compares: vec![Compare::Created(key, 0)], writes }
            }
        };
        self.running.call = Some(core.etcd(self.process, call));
    }

    fn etcd(&mut self, core: &mut Core, reply: Reply) {
        match reply {
            Reply::Granted { lease } => self.running.lease = Some(lease),
            Reply::Txn { done: true, revision } => {
                self.running.session = Some(core.etcd.session_id(revision));
                self.running.next_call = core.now + KEEP_ALIVE;
                self.handle(core, Event::Session(self.running.session));
            }
            // The key exists already, made by a call whose answer was lost: its revision is not
            // known, so the session can't be used. Or the lease has ended.
            Reply::Txn { .. } => {
                self.running.nonce = core.rng.word();
                self.running.lease = None;
            }
            Reply::Kept(true) => self.running.next_call = core.now + KEEP_ALIVE,
            Reply::Kept(false) => {
                self.running.lease = None;
                self.running.nonce = core.rng.word();
                if self.running.session.take().is_some() {
                    self.handle(core, Event::Session(None));
                }
            }
            Reply::Read { .. } | Reply::List { .. } => {}
        }
    }

    fn watched(&mut self, core: &mut Core, events: Vec<EtcdWatchEvent>) {
        for EtcdWatchEvent { value, .. } in events {
            match value {
                Some(Versioned { value: EtcdValue::Shard(config), .. }) => {
                    self.report(core, Event::ShardRecord(config));
                }
                Some(Versioned { value: EtcdValue::Node(me), .. }) => {
                    self.running.peers.entry(me.store).or_default();
                }
                _ => {}
            }
        }
    }

    /// Records may come in any order.
    fn report(&mut self, core: &mut Core, event: Event) {
        match core.lateness(&self.running.late, None) {
            Some(lag) => {
                let item = Late::Answer(event);
                core.keep(&mut self.running.late, self.process, None, (lag, item));
            }
            None => self.handle(core, event),
        }
    }

    // ---- connections ---------------------------------------------------------------------------

    fn dial_all(&mut self, core: &mut Core) {
        let wanted = self.running.batcher.unconnected();
        for (&store, peer) in &mut self.running.peers {
            // A later process of that store leads: the connection is to a process that is gone,
            // although it is not closed yet.
            let newer = |&(_, boot): &(Conn, StoreBoot)| {
                wanted.iter().any(|wanted| wanted.store == store && wanted.boot > boot.boot)
            };
            let lacks = peer.conn.as_ref().is_none_or(newer);
            if lacks && peer.dial.is_none() && peer.next_dial <= core.now {
                peer.dial = Some(core.dial(self.process, place_of(store)));
            }
        }
    }

    fn dialled(&mut self, core: &mut Core, dial: u64, conn: Conn, node: Option<StoreBoot>) {
        let mut peers = self.running.peers.values_mut();
        let peer = peers.find(|peer| peer.dial == Some(dial));
        let Some((peer, node)) = peer.zip(node) else { return core.close(conn) };
        peer.dial = None;
        let old = peer.conn.replace((conn, node));
        self.handle(core, Event::Connected { conn, node });
        if let Some((old, _)) = old {
            core.close(old);
            self.handle(core, Event::Closed { conn: old });
        }
    }

    fn dial_failed(&mut self, core: &mut Core, dial: u64, refused: bool) {
        let next_dial = core.now + core.rng.between(1, 100_000);
        let mut peers = self.running.peers.iter_mut();
        let Some((&store, peer)) = peers.find(|(_, peer)| peer.dial == Some(dial)) else { return };
        peer.dial = None;
        peer.next_dial = next_dial;
        if refused {
            self.handle(core, Event::DialRefused { store });
        }
    }

    fn closed(&mut self, core: &mut Core, conn: Conn) {
        for peer in self.running.peers.values_mut() {
            peer.conn.take_if(|(standing, _)| *standing == conn);
        }
        self.handle(core, Event::Closed { conn });
    }
}

fn answer(core: &mut Core, request: &ClientRequest, outcome: OpOutcome) {
    let delay = core.delay();
    core.after(delay, SimEvent::Answered(ClientReply { id: request.id, outcome }));
}

fn known(failure: Failure) -> OpOutcome {
    match failure.outcome() {
        Outcome::NotApplied => OpOutcome::NotApplied,
        Outcome::Unknown => OpOutcome::Unknown,
    }
}

/// Returns `None` for a read.
fn op(request: &ClientRequest) -> Option<Op> {
    let kind = match request.ask {
        Ask::Add { delta } => OpKind::Add { delta: delta.into() },
        Ask::AddReturning { delta } => OpKind::AddReturning { delta: delta.into() },
        Ask::Delete => OpKind::Delete,
        Ask::Read => return None,
    };
    Some(Op { counter: request.counter.clone(), kind })
}
