//! A gateway with one worker. For now a worker of the simulator's own, as plain as the session rules
//! allow: one undecided batch per shard, sent again, same bytes, until it is decided.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use engine::batch::{Batch, Codec};
use engine::config::ShardConfig;
use engine::ids::{Bseq, Conn, SessionId, ShardId, StoreBoot, StoreId};
use engine::message::{Answer, GatewayMessage, NodeReply, Refusal};
use engine::ops::{Op, OpKind, encode};

use super::clients::{Answered, Request};
use super::core::{Core, Happening, Place, Process, Told};
use super::etcd::{Call, Compare, Key, Reply, Value, Versioned, WatchEvent, Write};
use super::history::{Ask, Outcome};
use super::network::Wire;
use super::nodes::{place_of, session_id};

const TOCK: u64 = 20_000;
const OPS_MAX: usize = 64;

pub struct GatewayHost {
    pub place: Place,
    pub life: u32,
    running: Option<Running>,
}

#[derive(Default)]
struct Running {
    nonce: u64,
    lease: Option<u64>,
    session: Option<SessionId>,
    call: Option<u64>,
    last_alive: u64,
    nodes: BTreeMap<StoreId, Node>,
    map: BTreeMap<ShardId, ShardConfig>,
    lanes: BTreeMap<ShardId, Lane>,
    reads: BTreeMap<u64, (Request, Option<Conn>)>,
    next_read: u64,
}

#[derive(Default)]
struct Node {
    me: StoreBoot,
    dial: Option<u64>,
    conn: Option<Conn>,
    messages: u64,
}

#[derive(Default)]
struct Lane {
    queue: VecDeque<Request>,
    last: Bseq,
    answered_below: Bseq,
    out: Option<Out>,
}

/// The undecided batch.
struct Out {
    batch: Batch,
    requests: Vec<Option<Request>>,
    /// Sends without an answer on a connection that stands.
    open: BTreeSet<(Conn, u64)>,
    sends: u64,
    refused: u64,
    next_send: u64,
}

impl GatewayHost {
    pub fn new(index: u8) -> Self {
        Self { place: Place::Gateway(index), life: 0, running: None }
    }

    pub fn process(&self) -> Process {
        Process { place: self.place, life: self.life }
    }

    pub fn is_down(&self) -> bool {
        self.running.is_none()
    }

    pub fn start(&mut self, core: &mut Core) {
        if self.is_down() {
            self.life += 1;
            self.running = Some(Running { nonce: core.rng.next(), ..Running::default() });
            core.etcd_watch(self.process());
            core.tell_after(1, self.process(), Told::Tock);
        }
    }

    pub fn crash(&mut self, core: &mut Core) {
        let Some(running) = self.running.take() else { return };
        core.process_died(self.process(), true);
        core.etcd_unwatch(self.process());
        let queued = running.lanes.into_values().flat_map(|lane| {
            let out = lane.out.into_iter().flat_map(|out| out.requests.into_iter().flatten());
            lane.queue.into_iter().chain(out.collect::<Vec<_>>())
        });
        let reads = running.reads.into_values().map(|(request, _)| request);
        for request in queued.chain(reads).collect::<Vec<_>>() {
            let answered = Answered { id: request.id, outcome: Outcome::Unknown };
            core.after(1_000, Happening::Answered(answered));
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
            Told::Tock => self.tock(core),
            Told::Dialled { dial, conn } => {
                let mut nodes = self.running.nodes.values_mut();
                match nodes.find(|node| node.dial == Some(dial)) {
                    Some(node) => {
                        node.dial = None;
                        node.conn = Some(conn);
                        node.messages = 0;
                    }
                    None => core.close(conn),
                }
            }
            Told::DialFailed { dial, .. } => {
                let mut nodes = self.running.nodes.values_mut();
                if let Some(node) = nodes.find(|node| node.dial == Some(dial)) {
                    node.dial = None;
                }
            }
            Told::Closed { conn } => self.closed(conn),
            Told::Received { conn, wire: Wire::ToGateway(reply) } => self.reply(core, conn, reply),
            Told::Etcd { call, reply } if self.running.call == Some(call) => {
                self.running.call = None;
                self.etcd(core, reply);
            }
            Told::EtcdTimeout { call } if self.running.call == Some(call) => {
                self.running.call = None;
            }
            Told::Watched(events) => self.watched(events),
            Told::Request(request) => self.request(core, request),
            _ => {}
        }
    }

    fn tock(&mut self, core: &mut Core) {
        core.tell_after(TOCK, self.process, Told::Tock);
        self.session(core);
        for (&store, node) in &mut self.running.nodes {
            if node.conn.is_none() && node.dial.is_none() {
                node.dial = Some(core.dial(self.process, place_of(store)));
            }
        }
        self.deadlines(core);
        let shards: Vec<ShardId> = self.running.lanes.keys().copied().collect();
        for shard in shards {
            self.pump(core, shard);
        }
        let idle = |(_, (_, conn)): &(&u64, &(Request, Option<Conn>))| conn.is_none();
        let ids: Vec<u64> = self.running.reads.iter().filter(idle).map(|(&id, _)| id).collect();
        for id in ids {
            self.send_read(core, id);
        }
    }

    fn session(&mut self, core: &mut Core) {
        if self.running.call.is_some() || core.now < self.running.last_alive + 300_000 {
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
                self.running.last_alive = core.now;
            }
            Reply::Txn { .. } => self.running.nonce = core.rng.next(),
            Reply::Kept(alive) => {
                self.running.last_alive = core.now;
                if !alive {
                    self.running.lease = None;
                }
            }
            _ => {}
        }
    }

    fn watched(&mut self, events: Vec<WatchEvent>) {
        for WatchEvent { value, .. } in events {
            match value {
                Some(Versioned { value: Value::Shard(config), .. }) => self.learn(config),
                Some(Versioned { value: Value::Node(me), .. }) => {
                    self.running.nodes.entry(me.store).or_default().me = me;
                }
                _ => {}
            }
        }
    }

    fn learn(&mut self, config: ShardConfig) {
        let known = self.running.map.get(&config.shard());
        if known.is_none_or(|known| known.version < config.version) {
            self.running.map.insert(config.shard(), config);
        }
    }

    // ---- requests ------------------------------------------------------------------------------

    fn request(&mut self, core: &mut Core, request: Request) {
        if request.ask == Ask::Read {
            self.running.next_read += 1;
            let id = self.running.next_read;
            self.running.reads.insert(id, (request, None));
            return self.send_read(core, id);
        }
        let shard = core.plan.shard_of(request.counter.slot()).shard();
        self.running.lanes.entry(shard).or_default().queue.push_back(request);
        self.pump(core, shard);
    }

    fn answer(core: &mut Core, request: &Request, outcome: Outcome) {
        let delay = core.delay();
        core.after(delay, Happening::Answered(Answered { id: request.id, outcome }));
    }

    fn deadlines(&mut self, core: &mut Core) {
        let late = |request: &Request| request.deadline <= core.now;
        let mut ended = Vec::new();
        for lane in self.running.lanes.values_mut() {
            let (over, left) = lane.queue.drain(..).partition::<Vec<_>, _>(late);
            lane.queue = left.into();
            ended.extend(over.into_iter().map(|request| (request, Outcome::NotApplied)));
            for slot in lane.out.iter_mut().flat_map(|out| &mut out.requests) {
                if slot.as_ref().is_some_and(late) {
                    ended.extend(slot.take().map(|request| (request, Outcome::Unknown)));
                }
            }
        }
        let over = self.running.reads.iter().filter(|(_, (request, _))| late(request));
        for id in over.map(|(&id, _)| id).collect::<Vec<_>>() {
            let (request, _) = self.running.reads.remove(&id).expect("listed above");
            ended.push((request, Outcome::NotApplied));
        }
        for (request, outcome) in ended {
            Self::answer(core, &request, outcome);
        }
    }

    fn primary(&self, shard: ShardId) -> Option<(StoreId, Conn)> {
        let primary = self.running.map.get(&shard)?.primary;
        let node = self.running.nodes.get(&primary.store)?;
        Some((primary.store, node.conn?))
    }

    fn pump(&mut self, core: &mut Core, shard: ShardId) {
        let Some(session) = self.running.session else { return };
        let Some((store, conn)) = self.primary(shard) else { return };
        let slots = self.running.map[&shard].slots;
        let lane = self.running.lanes.entry(shard).or_default();
        if lane.out.is_none() {
            if lane.queue.is_empty() {
                return;
            }
            let take = lane.queue.len().min(OPS_MAX);
            let requests: Vec<Request> = lane.queue.drain(..take).collect();
            let ops: Vec<Op> = requests.iter().map(op).collect();
            let bseq = lane.last.next();
            lane.last = bseq;
            let below = if lane.answered_below.0 == 0 { Bseq(1) } else { lane.answered_below };
            let batch = Batch::seal(slots, session, bseq, below, Codec::Raw, encode(&ops));
            lane.out = Some(Out {
                batch,
                requests: requests.into_iter().map(Some).collect(),
                open: BTreeSet::new(),
                sends: 0,
                refused: 0,
                next_send: 0,
            });
        }
        let Some(out) = lane.out.as_mut() else { return };
        if out.open.iter().any(|&(open, _)| open == conn) || core.now < out.next_send {
            return;
        }
        let node = self.running.nodes.get_mut(&store).expect("it is the primary's");
        node.messages += 1;
        let message = node.messages;
        out.open.insert((conn, message));
        out.sends += 1;
        let frame = GatewayMessage::Frame { message, batches: vec![out.batch.clone()] };
        core.send(conn, Wire::ToNode(frame));
    }

    fn reply(&mut self, core: &mut Core, conn: Conn, reply: NodeReply) {
        match reply {
            NodeReply::Answer { message, slots, session, bseq, answer } => {
                let shard = slots.shard();
                let Some(lane) = self.running.lanes.get_mut(&shard) else { return };
                let Some(out) = lane.out.as_mut() else { return };
                let this = (out.batch.session, out.batch.bseq) == (session, bseq);
                if !this || !out.open.remove(&(conn, message)) {
                    return;
                }
                self.answered(core, shard, answer);
                self.pump(core, shard);
            }
            NodeReply::Read { id, result } => {
                let Some((request, _)) = self.running.reads.get_mut(&id) else { return };
                match result {
                    Ok(found) => {
                        let value = found.values.first().copied();
                        let request = request.clone();
                        self.running.reads.remove(&id);
                        Self::answer(core, &request, Outcome::Applied(value));
                    }
                    Err(refusal) => {
                        self.running.reads.get_mut(&id).expect("looked up above").1 = None;
                        if let Refusal::NotPrimary(Some(config)) = refusal {
                            self.learn(*config);
                        }
                    }
                }
            }
            NodeReply::ShardState { .. } => {}
        }
    }

    fn answered(&mut self, core: &mut Core, shard: ShardId, answer: Answer) {
        let lane = self.running.lanes.get_mut(&shard).expect("its batch was answered");
        let out = lane.out.as_mut().expect("its batch was answered");
        match answer {
            Answer::Applied { values, .. } => {
                let out = lane.out.take().expect("looked up above");
                lane.answered_below = out.batch.bseq.next();
                let mut values = values.into_iter();
                let ops = engine::ops::decode_batch(&out.batch).expect("we made it");
                for (slot, op) in out.requests.iter().zip(ops) {
                    let value = if op.kind.needs_value() { values.next() } else { None };
                    if let Some(request) = slot {
                        Self::answer(core, request, Outcome::Applied(value));
                    }
                }
            }
            Answer::AnsweredBefore | Answer::Malformed | Answer::Expired => {
                let out = lane.out.take().expect("looked up above");
                for request in out.requests.iter().flatten() {
                    Self::answer(core, request, Outcome::Unknown);
                }
            }
            Answer::NoEffect | Answer::Refused(_) => {
                out.refused += 1;
                let definite = out.refused == out.sends;
                out.next_send = core.now + core.rng.between(5_000, 40_000);
                if definite && core.rng.percent(40) {
                    let out = lane.out.take().expect("looked up above");
                    lane.last = Bseq(out.batch.bseq.0 - 1);
                    for request in out.requests.iter().flatten() {
                        Self::answer(core, request, Outcome::NotApplied);
                    }
                }
                if let Answer::Refused(Refusal::NotPrimary(Some(config))) = answer {
                    self.learn(*config);
                }
            }
        }
    }

    fn send_read(&mut self, core: &mut Core, id: u64) {
        let request = &self.running.reads[&id].0;
        let slots = core.plan.shard_of(request.counter.slot());
        let keys = vec![request.counter.clone()];
        if let Some((_, conn)) = self.primary(slots.shard()) {
            core.send(conn, Wire::ToNode(GatewayMessage::Read { id, slots, keys }));
            self.running.reads.get_mut(&id).expect("looked up above").1 = Some(conn);
        }
    }

    fn closed(&mut self, conn: Conn) {
        for node in self.running.nodes.values_mut() {
            if node.conn == Some(conn) {
                node.conn = None;
            }
        }
        for out in self.running.lanes.values_mut().filter_map(|lane| lane.out.as_mut()) {
            out.open.retain(|&(open, _)| open != conn);
        }
        for (_, sent) in self.running.reads.values_mut() {
            if *sent == Some(conn) {
                *sent = None;
            }
        }
    }
}

fn op(request: &Request) -> Op {
    let kind = match request.ask {
        Ask::Add { delta } => OpKind::Add { delta: delta.into() },
        Ask::AddReturning { delta } => OpKind::AddReturning { delta: delta.into() },
        Ask::Delete => OpKind::Delete,
        Ask::Read => unreachable!("reads are not batched"),
    };
    Op { counter: request.counter.clone(), kind }
}
