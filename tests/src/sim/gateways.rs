//! A gateway: the engine's worker machine, driven as production drives it, one worker to a process.
//!
//! Like every driver it decides nothing: it keeps the worker's key in etcd alive, dials every node
//! it has heard of, and tells the machine. What comes during one turn of the driver is handled
//! together: some operations become one request, and all travel when the turn ends.

use std::collections::BTreeMap;

use engine::batcher::{Batcher, Effect, Event, Failure, Outcome as Known, ReadValues};
use engine::ids::{Conn, SessionId, StoreBoot, StoreId};
use engine::message::{BatchReply, NodeReply};
use engine::ops::{Op, OpKind};

use super::checker::{Violation, answers};
use super::clients::{Answered, Request};
use super::core::{Core, Happening, Place, Process, Told, since};
use super::etcd::{Call, Compare, Key, Reply, Value, Versioned, WatchEvent, Write};
use super::history::{Ask, Outcome};
use super::network::Wire;
use super::nodes::{place_of, session_id};
use super::token_clients;

const TOCK: u64 = 20_000;
/// Of the lease's time to live, which is at least 500 ms.
const KEEP_ALIVE: u64 = 150_000;

pub struct GatewayHost {
    pub place: Place,
    pub life: u32,
    running: Option<Running>,
}

struct Running {
    worker: Batcher,
    started: u64,
    effects: Vec<Effect>,
    /// What it was about to do when it was stopped, and when it had decided to.
    held_back: Vec<(u64, Effect)>,
    wake_at: Option<u64>,
    peers: BTreeMap<StoreId, Peer>,

    // -- etcd
    nonce: u64,
    lease: Option<u64>,
    session: Option<SessionId>,
    call: Option<u64>,
    next_call: u64,

    // -- clients
    /// What has come since the last turn ended.
    gathered: Vec<Request>,
    /// What each request to the machine is made of.
    asked: BTreeMap<u64, Vec<Request>>,
    /// Requests with a token.
    tokens: BTreeMap<u64, Box<token_clients::Send>>,
    last_request: u64,
}

/// A node that this gateway has heard of.
#[derive(Default)]
struct Peer {
    dial: Option<u64>,
    conn: Option<(Conn, StoreBoot)>,
    next_dial: u64,
}

impl GatewayHost {
    pub fn new(index: u8) -> Self {
        Self { place: Place::Gateway(index), life: 0, running: None }
    }

    pub fn process(&self) -> Process {
        Process { place: self.place, life: self.life }
    }

    /// The lease that its key hangs on.
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
        self.life += 1;
        self.running = Some(Running {
            worker: Batcher::new(core.plan.gateway.clone()),
            started: core.clock(),
            effects: Vec::new(),
            held_back: Vec::new(),
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
        core.tell_after(1, self.process(), Told::Tock);
    }

    pub fn crash(&mut self, core: &mut Core) {
        let Some(running) = self.running.take() else { return };
        core.process_died(self.process(), true);
        core.etcd_unwatch(self.process());
        let asked = running.asked.into_values().flatten();
        for request in running.gathered.into_iter().chain(asked) {
            let answered = Answered { id: request.id, outcome: Outcome::Unknown };
            core.after(1_000, Happening::Answered(answered));
        }
        for send in running.tokens.into_values() {
            let answered = token_clients::Answered::of(&send, None);
            core.after(1_000, Happening::TokenAnswered(answered));
        }
    }

    pub fn on(&mut self, core: &mut Core, told: Told) {
        let process = self.process();
        if let Some(running) = &mut self.running {
            Driver { process, running }.told(core, told);
        }
    }
}

struct Driver<'a> {
    process: Process,
    running: &'a mut Running,
}

impl Driver<'_> {
    fn told(&mut self, core: &mut Core, told: Told) {
        match told {
            // A nearer one has taken its place.
            Told::Wake if self.running.wake_at != Some(core.now) => {}
            Told::Wake => self.end_turn(core),
            Told::Resumed => {
                for (decided_at, effect) in std::mem::take(&mut self.running.held_back) {
                    self.perform(core, decided_at, effect);
                }
                self.end_turn(core);
            }
            Told::Tock => self.tock(core),
            Told::Dialled { dial, conn, peer } => self.dialled(core, dial, conn, peer),
            Told::DialFailed { dial, refused } => self.dial_failed(core, dial, refused),
            Told::Closed { conn } => self.closed(core, conn),
            Told::Received { conn, wire: Wire::ToGateway(reply) } => {
                self.watch_over(core, &reply);
                self.handle(core, Event::Reply { conn, reply });
            }
            Told::Etcd { call, reply } if self.running.call == Some(call) => {
                self.running.call = None;
                self.etcd(core, reply);
            }
            Told::EtcdTimeout { call } if self.running.call == Some(call) => {
                self.running.call = None;
            }
            Told::Watched(events) => self.watched(core, events),
            Told::TokenRequest(send) => self.begin_token(core, send),
            Told::Request(request) => {
                self.running.gathered.push(request);
                self.turn_ends_soon(core);
            }
            _ => {}
        }
    }

    // ---- turns ---------------------------------------------------------------------------------

    fn handle(&mut self, core: &mut Core, event: Event) {
        self.machine(core, event);
        self.turn_ends_soon(core);
    }

    fn machine(&mut self, core: &mut Core, event: Event) {
        let me = self.process;
        core.journal.note(core.now, || format!("{me:?} <- {event:?}"));
        let now = since(self.running.started, core.clock());
        self.running.worker.handle(now, event, &mut self.running.effects);
    }

    /// The turn ends when the driver has handled what came: at a time of its own.
    fn turn_ends_soon(&mut self, core: &mut Core) {
        let turn = core.plan.turn;
        let after = core.rng.between(1, turn + 1);
        self.wake_at(core, core.now + after);
    }

    fn wake_at(&mut self, core: &mut Core, at: u64) {
        let at = at.max(core.now + 1);
        if self.running.wake_at.is_none_or(|wake| at < wake) {
            self.running.wake_at = Some(at);
            core.tell_after(at - core.now, self.process, Told::Wake);
        }
    }

    fn end_turn(&mut self, core: &mut Core) {
        self.running.wake_at = None;
        self.ask(core);
        self.machine(core, Event::TurnEnded);
        for effect in std::mem::take(&mut self.running.effects) {
            let me = self.process;
            core.journal.note(core.now, || format!("{me:?} -> {effect:?}"));
            if core.holds_back(me) {
                self.running.held_back.push((core.now, effect));
            } else {
                self.perform(core, core.now, effect);
            }
        }
        if let Some(deadline) = self.running.worker.next_deadline() {
            let at = core.when(self.running.started + deadline.0);
            self.wake_at(core, at);
        }
    }

    fn perform(&mut self, core: &mut Core, decided_at: u64, effect: Effect) {
        match effect {
            Effect::Send { conn, message } => {
                core.oracle.asked(&message);
                core.send(conn, Wire::ToNode(message));
            }
            Effect::Wrote { request, result } if self.running.tokens.contains_key(&request) => {
                let Some(send) = self.running.tokens.remove(&request) else { return };
                answers::outcomes(&send.ops, &result, &mut core.oracle.violations);
                let told = token_clients::told(&send.ops, &result);
                let answered = token_clients::Answered {
                    replayed: result.replayed,
                    ..token_clients::Answered::of(&send, Some(told))
                };
                let delay = core.delay();
                core.after(delay, Happening::TokenAnswered(answered));
            }
            Effect::Wrote { request, result } => {
                let asked = self.asked(core, request);
                let ops: Vec<Op> = asked.iter().filter_map(op).collect();
                let violations = &mut core.oracle.violations;
                let outcomes = answers::outcomes(&ops, &result, violations).unwrap_or_default();
                for (request, outcome) in asked.iter().zip(outcomes) {
                    answer(core, request, outcome.map_or_else(known, Outcome::Applied));
                }
            }
            Effect::ReadDone { request, result } => {
                let asked = self.asked(core, request);
                for (at, request) in asked.iter().enumerate() {
                    let outcome = match &result {
                        Err(_) => Outcome::NotApplied,
                        Ok(found) => self.found(core, decided_at, request, found, at),
                    };
                    answer(core, request, outcome);
                }
            }
            Effect::Report(report) => core.report(self.process, None, &report),
            // Another key: the old one ends with its lease.
            Effect::AbandonSession(_) => {
                self.running.lease = None;
                self.running.session = None;
                self.running.nonce = core.rng.word();
                self.running.next_call = core.now;
            }
        }
    }

    /// What a read is told. One that is not stale at all has to be linearizable. The age is of the moment at which the
    /// gateway answers; if it is stopped then, or the network is slow, its client can add that itself.
    fn found(
        &self,
        core: &mut Core,
        decided_at: u64,
        asked: &Request,
        found: &ReadValues,
        at: usize,
    ) -> Outcome {
        let (value, staleness_ms) = (found.values[at], found.staleness_ms);
        if staleness_ms > asked.max_staleness_ms.unwrap_or(0) {
            let detail = format!("{asked:?} was told a value of {staleness_ms} ms ago");
            core.oracle.violations.push(Violation { promise: "bounded", detail });
        }
        match staleness_ms {
            0 => Outcome::Applied(Some(value)),
            ms => Outcome::Stale { value, as_of: decided_at.saturating_sub(ms * 1_000) },
        }
    }

    /// What no correct cluster says.
    fn watch_over(&mut self, core: &mut Core, reply: &NodeReply) {
        let NodeReply::Answer { session, answer, .. } = reply else { return };
        let wrong = match answer {
            BatchReply::NoEffect => "is out of order",
            BatchReply::Expired if core.etcd.has_session(*session) => {
                "expired while its key stands"
            }
            _ => return,
        };
        let detail = format!("{:?}: {session:?} {wrong}", self.process);
        core.oracle.violations.push(Violation { promise: "answers", detail });
    }

    // ---- clients -------------------------------------------------------------------------------

    /// Asks the machine for what has come, some of it in one request.
    fn ask(&mut self, core: &mut Core) {
        let gathered = std::mem::take(&mut self.running.gathered);
        let (reads, writes): (Vec<_>, Vec<_>) =
            gathered.into_iter().partition(|request| request.ask == Ask::Read);
        let (bounded, reads): (Vec<_>, Vec<_>) =
            reads.into_iter().partition(|request| request.max_staleness_ms.is_some());
        for kind in [reads, bounded, writes] {
            let mut request: Vec<Request> = Vec::new();
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

    fn begin(&mut self, core: &mut Core, asked: Vec<Request>) {
        let deadline = asked.iter().map(|asked| asked.deadline).min().unwrap_or(core.now);
        let deadline = since(self.running.started, core.leapt + deadline.max(core.now));
        self.running.last_request += 1;
        let request = self.running.last_request;
        let ops: Vec<Op> = asked.iter().filter_map(op).collect();
        let event = if ops.is_empty() {
            let keys = asked.iter().map(|asked| asked.counter.clone()).collect();
            // What all of them are content with.
            let max_staleness_ms = asked.iter().filter_map(|asked| asked.max_staleness_ms).min();
            Event::Read { request, keys, max_staleness_ms, deadline }
        } else {
            Event::Write { request, ops, token: None, deadline }
        };
        self.running.asked.insert(request, asked);
        self.machine(core, event);
    }

    /// A request with a token stands for itself.
    fn begin_token(&mut self, core: &mut Core, send: Box<token_clients::Send>) {
        self.running.last_request += 1;
        let request = self.running.last_request;
        let deadline = since(self.running.started, core.leapt + send.deadline.max(core.now));
        let (ops, token) = (send.ops.clone(), Some(send.with.clone()));
        self.running.tokens.insert(request, send);
        self.handle(core, Event::Write { request, ops, token, deadline });
    }

    /// What the answered request is made of. It is answered once.
    fn asked(&mut self, core: &mut Core, request: u64) -> Vec<Request> {
        self.running.asked.remove(&request).unwrap_or_else(|| {
            let detail = format!("request {request} was answered twice");
            core.oracle.violations.push(Violation { promise: "answers", detail });
            Vec::new()
        })
    }

    // ---- etcd ----------------------------------------------------------------------------------

    fn tock(&mut self, core: &mut Core) {
        core.tell_after(TOCK, self.process, Told::Tock);
        self.register(core);
        self.dial_all(core);
    }

    /// A lease, the key under it, and keeping it alive: the one of these that comes next.
    fn register(&mut self, core: &mut Core) {
        if self.running.call.is_some() || core.now < self.running.next_call {
            return;
        }
        let call = match (self.running.lease, self.running.session) {
            (None, _) => Call::Grant { ttl: core.plan.lease_ttl },
            (Some(lease), Some(_)) => Call::KeepAlive { lease },
            (Some(lease), None) => {
                let key = Key::Gateway(self.running.nonce);
                let writes = vec![Write::Put(key, Value::Gateway, Some(lease))];
                Call::Txn { compares: vec![Compare::Created(key, 0)], writes }
            }
        };
        self.running.call = Some(core.etcd(self.process, call));
    }

    fn etcd(&mut self, core: &mut Core, reply: Reply) {
        match reply {
            Reply::Granted { lease } => self.running.lease = Some(lease),
            Reply::Txn { done: true, revision } => {
                self.running.session = Some(session_id(revision));
                self.running.next_call = core.now + KEEP_ALIVE;
                self.handle(core, Event::Session(self.running.session));
            }
            // The key is there already, made by a call whose answer was lost: its revision is not
            // known, so it is nobody's. Or the lease has ended.
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

    fn watched(&mut self, core: &mut Core, events: Vec<WatchEvent>) {
        for WatchEvent { value, .. } in events {
            match value {
                Some(Versioned { value: Value::Shard(config), .. }) => {
                    self.handle(core, Event::ShardRecord(config));
                }
                Some(Versioned { value: Value::Node(me), .. }) => {
                    self.running.peers.entry(me.store).or_default();
                }
                _ => {}
            }
        }
    }

    // ---- connections ---------------------------------------------------------------------------

    fn dial_all(&mut self, core: &mut Core) {
        let wanted = self.running.worker.unconnected();
        for (&store, peer) in &mut self.running.peers {
            // A later process of that store leads: the connection is to one that is gone, although
            // nobody has said so.
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

fn answer(core: &mut Core, request: &Request, outcome: Outcome) {
    let delay = core.delay();
    core.after(delay, Happening::Answered(Answered { id: request.id, outcome }));
}

fn known(failure: Failure) -> Outcome {
    match failure.outcome() {
        Known::NotApplied => Outcome::NotApplied,
        Known::Unknown => Outcome::Unknown,
    }
}

/// None: it is a read.
fn op(request: &Request) -> Option<Op> {
    let kind = match request.ask {
        Ask::Add { delta } => OpKind::Add { delta: delta.into() },
        Ask::AddReturning { delta } => OpKind::AddReturning { delta: delta.into() },
        Ask::Delete => OpKind::Delete,
        Ask::Read => return None,
    };
    Some(Op { counter: request.counter.clone(), kind })
}
