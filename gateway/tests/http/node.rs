//! A fake storage node: it counts in a map, and answers according to its mood.
//!
//! The node keeps the two promises that the exactness of a gateway depends on: a batch is applied
//! once per (session, shard, number), and a group of ops with a token once per token, however often
//! it is sent.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};

use engine::batch::Batch;
use engine::ids::{BatchSeq, Boot, Epoch, SessionId, ShardId, Slots, StoreBoot, StoreId, TimeMs};
use engine::message::{
    BatchReply, DigestPoint, GatewayMessage, NodeQueryReply, NodeReply, ReadResult, Refusal,
    ReplicaStatus, RoleStatus, ShardAvailability,
};
use engine::ops::{self, Op, OpKind, TokenedOps};
use engine::shard::idempotency::{Scope, TokenOutcome};
use proto::wire;
use proto::wire::control_server::{Control, ControlServer};
use proto::wire::gateway_server::{Gateway, GatewayServer};
use tokio::runtime::Runtime;
use tokio::sync::mpsc;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status, Streaming};

pub(crate) const CLUSTER: u128 = 0xc0ffee;

/// The behaviour of a node.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Mood {
    Serves,
    Refuses(Refusal),
    /// Ignores everything.
    Swallows,
    /// Applies everything, and answers only when the mood changes.
    Holds,
    /// Applies everything, and answers with invalid messages.
    Babbles,
    /// The same, and refuses every new stream.
    TurnsAway,
    /// Refuses new tokens.
    FullOfTokens,
    /// Expires the session of the next batch, and serves all others.
    DropsASession,
}

/// The time of the node, which never changes.
pub(crate) const NOW: TimeMs = TimeMs(1_700_000_000_000);
/// A token that was issued longer ago is too old.
pub(crate) const WINDOW_MS: u64 = 3_600_000;

type Answers = mpsc::UnboundedSender<Result<wire::ToGateway, Status>>;

pub(crate) struct State {
    pub(crate) counters: BTreeMap<Vec<u8>, i128>,
    pub(crate) mood: Mood,
    /// Moods of single shards, by the first slot; they override the node's.
    pub(crate) moods: BTreeMap<u16, Mood>,
    /// The number of batches that were received, repetitions included.
    pub(crate) batches: u64,
    /// The number of refused streams.
    pub(crate) turned_away: u64,
    /// The number of status queries.
    pub(crate) queries: u64,
    /// The addresses that sent them.
    pub(crate) askers: BTreeSet<SocketAddr>,
    rows: BTreeMap<(SessionId, u16), (BatchSeq, BatchReply)>,
    /// Expired sessions: none of their batches is applied any more.
    expired: BTreeSet<SessionId>,
    /// By hash and counter: the fingerprint, and the values that were returned.
    tokens: BTreeMap<(u128, Vec<u8>), (u128, Vec<i128>)>,
    held: Vec<(Answers, NodeReply)>,
    /// The streams of gateways.
    streams: Vec<Answers>,
}

#[derive(Clone)]
pub(crate) struct Shared {
    me: StoreBoot,
    shards: Vec<Slots>,
    state: Arc<Mutex<State>>,
}

pub(crate) struct Node {
    pub(crate) me: StoreBoot,
    pub(crate) address: SocketAddr,
    shared: Shared,
    runtime: Option<Runtime>,
}

impl Node {
    /// Starts a node that reports to lead `shards`.
    pub(crate) fn start(store: u128, boot: u64, at: SocketAddr, shards: Vec<Slots>) -> Self {
        let me = StoreBoot { store: StoreId(store), boot: Boot(boot) };
        let state = State {
            counters: BTreeMap::new(),
            mood: Mood::Serves,
            moods: BTreeMap::new(),
            batches: 0,
            turned_away: 0,
            queries: 0,
            askers: BTreeSet::new(),
            rows: BTreeMap::new(),
            expired: BTreeSet::new(),
            tokens: BTreeMap::new(),
            held: Vec::new(),
            streams: Vec::new(),
        };
        Self::run(at, Shared { me, shards, state: Arc::new(Mutex::new(state)) })
    }

    /// The next boot of the same store, on the same address, with the same data.
    pub(crate) fn again(&self, boot: u64) -> Self {
        let me = StoreBoot { boot: Boot(boot), ..self.me };
        Self::run(self.address, Shared { me, ..self.shared.clone() })
    }

    fn run(at: SocketAddr, shared: Shared) -> Self {
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        let runtime = builder.worker_threads(1).enable_all().build().unwrap();
        let listener = runtime.block_on(async {
            let socket = tokio::net::TcpSocket::new_v4().unwrap();
            socket.set_reuseaddr(true).unwrap();
            socket.bind(at).unwrap();
            socket.listen(64).unwrap()
        });
        let address = listener.local_addr().unwrap();
        let entered = runtime.enter();
        let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
        let server = Server::builder()
            .add_service(proto::limited!(GatewayServer::new(shared.clone())))
            .add_service(ControlServer::new(shared.clone()));
        runtime.spawn(server.serve_with_incoming(incoming));
        drop(entered);
        Self { me: shared.me, address, shared, runtime: Some(runtime) }
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock().unwrap()
    }

    /// Sends the held answers, and changes the mood.
    pub(crate) fn set_mood(&self, mood: Mood) {
        let mut state = self.state();
        for (to, reply) in std::mem::take(&mut state.held) {
            let _gone = to.send(Ok(reply.into()));
        }
        state.mood = mood;
    }

    /// Sends the state of a shard to every gateway.
    pub(crate) fn announce(&self, slots: Slots, availability: ShardAvailability) {
        let state = self.state();
        for to in &state.streams {
            let reply = NodeReply::ShardState { slots, state: availability };
            let _gone = to.send(Ok(reply.into()));
        }
    }

    /// Ends every gateway's stream; gateways may connect again.
    pub(crate) fn cut(&self) {
        let mut state = self.state();
        state.held.clear();
        for to in state.streams.drain(..) {
            let _gone = to.send(Err(Status::unavailable("cut")));
        }
    }

    /// Sets the address that is registered in etcd.
    pub(crate) fn is_behind(&mut self, address: SocketAddr) {
        self.address = address;
    }

    pub(crate) fn value(&self, namespace: &str, key: &[u8]) -> i128 {
        let name = [namespace.as_bytes(), b"\0", key].concat();
        self.state().counters.get(&name).copied().unwrap_or(0)
    }

    /// Ends the node at once, like `kill -9`.
    pub(crate) fn kill(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.kill();
    }
}

impl State {
    fn mood_of(&self, slots: Slots) -> Mood {
        self.moods.get(&slots.lo).unwrap_or(&self.mood).clone()
    }

    fn handle(&mut self, message: GatewayMessage, to: &Answers) {
        match message {
            GatewayMessage::Frame { message, batches } => {
                for batch in batches {
                    self.batches += 1;
                    assert!(batch.is_intact());
                    let mood = self.mood_of(batch.slots);
                    let answer = match &mood {
                        Mood::Swallows => continue,
                        Mood::Refuses(refusal) => BatchReply::Refused(refusal.clone()),
                        Mood::DropsASession => {
                            self.expired.insert(batch.session);
                            self.mood = Mood::Serves;
                            BatchReply::Expired
                        }
                        Mood::Babbles | Mood::TurnsAway => {
                            self.apply(&batch);
                            let _gone = to
                                .send(Ok(wire::ToGateway::from(vec![wire::Reply { kind: None }])));
                            continue;
                        }
                        Mood::Serves | Mood::Holds | Mood::FullOfTokens => self.apply(&batch),
                    };
                    let Batch { slots, session, batch_seq, .. } = batch;
                    let reply = NodeReply::Answer { message, slots, session, batch_seq, answer };
                    self.reply(to, reply, mood == Mood::Holds);
                }
            }
            GatewayMessage::Resend { .. } => panic!("no shard is split here"),
            GatewayMessage::Read { id, slots, keys, .. } => {
                let mood = self.mood_of(slots);
                let value = |name: &[u8]| self.counters.get(name).copied().unwrap_or(0);
                let result = match &mood {
                    Mood::Swallows => return,
                    Mood::Refuses(refusal) => Err(refusal.clone()),
                    _ => Ok(ReadResult {
                        values: keys.iter().map(|key| value(key.name())).collect(),
                        time: NOW,
                        staleness_us: 0,
                    }),
                };
                self.reply(to, NodeReply::Read { id, result }, mood == Mood::Holds);
            }
        }
    }

    fn reply(&mut self, to: &Answers, reply: NodeReply, hold: bool) {
        if hold {
            self.held.push((to.clone(), reply));
        } else {
            let _gone = to.send(Ok(reply.into()));
        }
    }

    fn apply(&mut self, batch: &Batch) -> BatchReply {
        if self.expired.contains(&batch.session) {
            return BatchReply::Expired;
        }
        let row = (batch.session, batch.slots.lo);
        let last = self.rows.get(&row).map_or(BatchSeq(0), |(last, _)| *last);
        if batch.batch_seq == last {
            return self.rows[&row].1.clone();
        }
        if batch.batch_seq != last.next() {
            return BatchReply::NoEffect;
        }
        let decoded = ops::decode_batch(batch).unwrap();
        let ops: Vec<_> = decoded.iter().map(|op| decoded.to_op(op)).collect();
        let (mut values, mut tokens, mut next) = (Vec::new(), Vec::new(), 0);
        for group in decoded.tokened {
            values.extend(self.run(&ops[next..group.first]));
            next = group.first + group.count;
            let (outcome, of_group) = self.run_once(&group, group.of(&ops));
            tokens.push(outcome);
            values.extend(of_group);
        }
        values.extend(self.run(&ops[next..]));
        let answer = BatchReply::Applied { values, tokens, time: NOW };
        self.rows.insert(row, (batch.batch_seq, answer.clone()));
        answer
    }

    fn run_once(&mut self, group: &TokenedOps, ops: &[Op]) -> (TokenOutcome, Vec<i128>) {
        let asked = ops.iter().filter(|op| op.kind.returns_value()).count();
        let whose = match group.tag.scope {
            Scope::Counter => ops[0].counter.name().to_vec(),
            Scope::Batch => Vec::new(),
        };
        let id = (group.tag.hash, whose);
        let refused = match self.tokens.get(&id) {
            Some((fingerprint, values)) if *fingerprint == group.tag.fingerprint => {
                return (TokenOutcome::Replayed, values.clone());
            }
            Some(_) => TokenOutcome::Reused,
            None if group.issued.time().0 + WINDOW_MS < NOW.0 => TokenOutcome::TooOld,
            None if self.mood == Mood::FullOfTokens => TokenOutcome::Quota,
            None => {
                let values = self.run(ops);
                self.tokens.insert(id, (group.tag.fingerprint, values.clone()));
                return (TokenOutcome::Applied, values);
            }
        };
        (refused, vec![0; asked])
    }

    /// Applies ops and returns the values of those that request one.
    fn run(&mut self, ops: &[Op]) -> Vec<i128> {
        let mut values = Vec::new();
        for op in ops {
            let value = self.counters.entry(op.counter.name().to_vec()).or_default();
            match op.kind {
                OpKind::Add { delta } => *value += delta,
                OpKind::AddReturning { delta } => {
                    *value += delta;
                    values.push(*value);
                }
                OpKind::Delete => values.push(std::mem::take(value)),
            }
        }
        values
    }
}

type Replies = Pin<Box<UnboundedReceiverStream<Result<wire::ToGateway, Status>>>>;

#[tonic::async_trait]
impl Gateway for Shared {
    type SessionStream = Replies;

    async fn session(
        &self,
        request: Request<Streaming<wire::ToNode>>,
    ) -> Result<Response<Replies>, Status> {
        let mut from = request.into_inner();
        let (to, replies) = mpsc::unbounded_channel();
        let shared = self.clone();
        {
            let mut state = self.state.lock().unwrap();
            if state.mood == Mood::TurnsAway {
                state.turned_away += 1;
                return Err(Status::failed_precondition("in no mood"));
            }
        }
        tokio::spawn(async move {
            let first = from.message().await.unwrap().expect("it opens");
            if let Err(refused) = first.accept(CLUSTER) {
                let _gone = to.send(Err(refused.into()));
                return;
            }
            shared.state.lock().unwrap().streams.push(to.clone());
            while let Ok(Some(message)) = from.message().await {
                let message = GatewayMessage::try_from(message).unwrap();
                shared.state.lock().unwrap().handle(message, &to);
            }
        });
        Ok(Response::new(Box::pin(UnboundedReceiverStream::new(replies))))
    }
}

#[tonic::async_trait]
impl Control for Shared {
    async fn query(
        &self,
        request: Request<wire::NodeQuery>,
    ) -> Result<Response<wire::NodeQueryReply>, Status> {
        {
            let mut state = self.state.lock().unwrap();
            state.queries += 1;
            state.askers.extend(request.remote_addr());
        }
        let status = |slots: &Slots| ReplicaStatus {
            shard: slots.shard(),
            promised: Epoch(1),
            last: engine::ids::Seq(7),
            applied: engine::ids::Seq(6),
            digest: DigestPoint {
                shard: ShardId(slots.lo),
                seq: engine::ids::Seq(6),
                counters: 0xab,
                sessions: 0,
                tokens: 0,
            },
            role: RoleStatus::Primary {
                epoch: Epoch(1),
                open: true,
                hindered_by: vec![],
                records: Default::default(),
            },
            stopped: None,
        };
        let replicas = self.shards.iter().map(status).collect();
        Ok(Response::new(
            NodeQueryReply::Status {
                from: self.me,
                replicas,
                scrub: Default::default(),
                full: false,
            }
            .into(),
        ))
    }
}
