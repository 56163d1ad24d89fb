//! Every message is equal after it has crossed the wire; a damaged message is refused and never
//! causes a panic; the message limit holds in both directions on a real connection.

use std::fmt::Debug;
use std::sync::{Arc, Weak};

use bytes::Bytes;
use engine::batch::{Batch, Codec};
use engine::entry::{Body, Entry, Position};
use engine::ids::{
    BatchSeq, Boot, Chain, CopyNo, Epoch, Revision, Seq, SessionId, ShardId, Slots, StoreBoot,
    StoreId, TimeMs, Version,
};
use engine::key::CounterKey;
use engine::message::{
    BatchReply, CopyEnd, DigestPoint, FromFollower, GatewayMessage, HealthReport, NodeQuery,
    NodeQueryReply, NodeReply, ReadResult, RecordsKept, Refusal, Reject, ReplicaHealth,
    ReplicaStatus, RoleStatus, ScrubStatus, ShardAvailability, ShardEnd, ShardKnowledge, Slice,
    SnapshotOutcome, StoreKnowledge, ToFollower,
};
use engine::shard::idempotency::TokenOutcome;
use engine::shard_record::ShardRecord;
use prost::Message;
use proto::wire;

/// Splitmix64, which is small and has the same numbers on every platform.
struct Random(u64);

impl Random {
    fn u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, end: u64) -> u64 {
        self.u64() % end
    }

    /// A number of any size: all bit lengths are equally likely.
    fn number(&mut self) -> u64 {
        self.u64() >> self.below(65).min(63)
    }

    fn u16(&mut self) -> u16 {
        self.number() as u16
    }

    fn flag(&mut self) -> bool {
        self.below(2) == 1
    }

    fn i128(&mut self) -> i128 {
        let raw = u128::from(self.u64()) << 64 | u128::from(self.u64());
        (raw as i128) >> self.below(128)
    }

    fn list<T>(&mut self, make: impl Fn(&mut Self) -> T) -> Vec<T> {
        (0..self.below(5)).map(|_| make(self)).collect()
    }

    fn bytes(&mut self) -> Bytes {
        self.list(|r| r.u64() as u8).into()
    }

    fn shard(&mut self) -> ShardId {
        ShardId(self.u16())
    }

    fn slots(&mut self) -> Slots {
        let (a, b) = (self.u16(), self.u16());
        Slots { lo: a.min(b), hi: a.max(b) }
    }

    fn store(&mut self) -> StoreId {
        StoreId(u128::from(self.number()) << 64 | u128::from(self.number()))
    }

    fn boot(&mut self) -> StoreBoot {
        StoreBoot { store: self.store(), boot: Boot(self.number()) }
    }

    fn session(&mut self) -> SessionId {
        SessionId(Revision { incarnation: self.number() as u32, revision: self.number() })
    }

    fn position(&mut self) -> Position {
        Position {
            epoch: Epoch(self.number()),
            seq: Seq(self.number() >> 1),
            chain: Chain(self.u64()),
            time: TimeMs(self.number()),
        }
    }

    fn batch(&mut self) -> Batch {
        let codec = if self.flag() { Codec::Raw } else { Codec::Lz4 };
        let (batch_seq, below) = (BatchSeq(self.number()), BatchSeq(self.number()));
        Batch::seal(self.slots(), self.session(), batch_seq, below, codec, self.bytes())
    }

    fn entry(&mut self) -> Entry {
        let body = match self.below(6) {
            0 => Body::Ops(self.batch()),
            1 => Body::Barrier,
            2 => Body::ExpireSessions {
                up_to: self.session().0,
                survivors: self.list(Self::session),
            },
            3 => Body::ExpireTokens { bucket: self.number() },
            4 => Body::Split { at: self.u16() },
            _ => Body::Unknown { kind: 77, bytes: self.bytes() },
        };
        Entry::after(self.position(), Epoch(self.number()), TimeMs(self.number()), body)
    }

    fn shard_record(&mut self) -> ShardRecord {
        ShardRecord {
            slots: self.slots(),
            epoch: Epoch(self.number()),
            version: Version(self.number()),
            primary: self.boot(),
            isr: self.list(Self::store),
            learners: self.list(Self::store),
            target: self.list(Self::store),
            tainted: self.list(Self::store),
        }
    }

    fn refusal(&mut self) -> Refusal {
        match self.below(8) {
            0 => Refusal::NotPrimary(None),
            1 => Refusal::NotPrimary(Some(Box::new(self.shard_record()))),
            2 => Refusal::NoSuchShard,
            3 => Refusal::Frozen,
            4 => Refusal::Overloaded,
            5 => Refusal::NoSpace,
            6 => Refusal::TooLarge,
            7 => Refusal::Stale,
            _ => Refusal::Damaged,
        }
    }

    fn gateway_message(&mut self) -> GatewayMessage {
        if self.flag() {
            return match self.flag() {
                true => GatewayMessage::Frame {
                    message: self.number(),
                    batches: self.list(Self::batch),
                },
                false => GatewayMessage::Resend {
                    message: self.number(),
                    shard: self.shard(),
                    batch: self.batch(),
                },
            };
        }
        let key = |r: &mut Self| CounterKey::new(b"likes", &r.u64().to_le_bytes()).unwrap();
        GatewayMessage::Read {
            id: self.number(),
            slots: self.slots(),
            keys: self.list(key),
            max_staleness_ms: self.flag().then(|| self.number()),
        }
    }

    fn node_reply(&mut self) -> NodeReply {
        match self.below(4) {
            0 => {
                let result = ReadResult {
                    values: self.list(Self::i128),
                    time: TimeMs(self.u64()),
                    staleness_us: self.number(),
                };
                NodeReply::Read { id: self.number(), result: Ok(result) }
            }
            1 => NodeReply::Read { id: self.number(), result: Err(self.refusal()) },
            2 => NodeReply::ShardState {
                slots: self.slots(),
                state: match self.flag() {
                    true => ShardAvailability::Frozen,
                    false => ShardAvailability::Open,
                },
            },
            _ => NodeReply::Answer {
                message: self.number(),
                slots: self.slots(),
                session: self.session(),
                batch_seq: BatchSeq(self.number()),
                answer: match self.below(6) {
                    0 => BatchReply::Applied {
                        values: self.list(Self::i128),
                        tokens: self.list(Self::token_outcome),
                        time: TimeMs(self.number()),
                    },
                    1 => BatchReply::AnsweredBefore,
                    2 => BatchReply::Malformed,
                    3 => BatchReply::NoEffect,
                    4 => BatchReply::Expired,
                    _ => BatchReply::Refused(self.refusal()),
                },
            },
        }
    }

    fn slice(&mut self) -> Slice {
        Slice {
            shard: self.shard(),
            slots: self.slots(),
            epoch: Epoch(self.number()),
            copy: CopyNo(self.number()),
            prev: self.position(),
            commit: Seq(self.number()),
            resume: self.flag(),
            entries: self.list(Self::entry),
        }
    }

    fn dialler_message(&mut self) -> ToFollower {
        match self.below(7) {
            6 => ToFollower::Damaged {
                epoch: Epoch(self.number()),
                copy: CopyNo(self.number()),
                point: self.digest(),
            },
            0 => ToFollower::Hello { from: self.boot(), to: self.boot() },
            1 => ToFollower::Append { n: self.number(), slices: self.list(Self::slice) },
            2 => ToFollower::Heartbeat {
                sent: self.number(),
                commits: self.list(|r| (r.shard(), Epoch(r.number()), Seq(r.number()))),
            },
            3 => ToFollower::ReadIndex {
                round: self.number(),
                shards: self.list(|r| (r.shard(), Epoch(r.number()))),
            },
            4 => ToFollower::Proof {
                request: self.number(),
                proven: self.list(|r| (r.shard(), Epoch(r.number()), Seq(r.number()))),
                refused: self.list(Self::shard),
            },
            _ => ToFollower::Snapshot {
                transfer: self.number(),
                shard: self.shard(),
                epoch: Epoch(self.number()),
                copy: CopyNo(self.number()),
                bytes: self.number(),
            },
        }
    }

    fn acceptor_message(&mut self) -> FromFollower {
        match self.below(8) {
            0 => FromFollower::Welcome {
                from: self.boot(),
                copies: self.list(|r| (r.shard(), CopyNo(r.number()))),
            },
            1 => FromFollower::Copy { shard: self.shard(), copy: CopyNo(self.number()) },
            2 => FromFollower::Ack { n: self.number() },
            3 => FromFollower::Reject {
                n: self.number(),
                shard: self.shard(),
                reason: match self.below(5) {
                    0 => Reject::StaleEpoch { promised: Epoch(self.number()) },
                    1 => Reject::Mismatch {
                        ends: self.list(Self::position),
                        applied: self.position(),
                    },
                    2 => Reject::WrongCopy { copy: CopyNo(self.number()) },
                    3 => Reject::Stopped,
                    _ => Reject::NoSpace,
                },
            },
            4 => FromFollower::Alive {
                sent: self.number(),
                fsync_age_ms: self.number(),
                full: self.flag(),
                wall: TimeMs(self.number()),
                room_bytes: self.number(),
                digests: self.list(Self::digest),
            },
            5 => FromFollower::ReadIndex {
                round: self.number(),
                newer: self.list(|r| (r.shard(), Epoch(r.number()))),
            },
            6 => FromFollower::ProofRequest {
                request: self.number(),
                shards: self.list(Self::shard),
            },
            _ => FromFollower::Snapshot {
                transfer: self.number(),
                shard: self.shard(),
                outcome: match self.below(4) {
                    0 => SnapshotOutcome::Accepted,
                    1 => SnapshotOutcome::NoSpace,
                    2 => SnapshotOutcome::Installed,
                    _ => SnapshotOutcome::NotInstalled,
                },
            },
        }
    }

    fn query(&mut self) -> NodeQuery {
        match self.below(7) {
            6 => NodeQuery::Split {
                shard: self.shard(),
                epoch: Epoch(self.number()),
                at: self.u16(),
            },
            4 => NodeQuery::Scrub { shards: self.list(Self::shard), bytes_per_s: self.number() },
            5 => NodeQuery::Recover { promise: self.number() as u32 },
            0 => NodeQuery::Status,
            3 => NodeQuery::Probe { to: self.boot() },
            1 => NodeQuery::Gather { shards: self.list(Self::shard) },
            _ => NodeQuery::StepDown { shard: self.shard(), epoch: Epoch(self.number()) },
        }
    }

    fn digest(&mut self) -> DigestPoint {
        DigestPoint {
            shard: self.shard(),
            seq: Seq(self.number()),
            counters: self.i128() as u128,
            sessions: self.i128() as u128,
            tokens: self.i128() as u128,
        }
    }

    fn token_outcome(&mut self) -> TokenOutcome {
        TokenOutcome::from_byte(self.below(5) as u8).expect("there are five")
    }

    fn replica_status(&mut self) -> ReplicaStatus {
        ReplicaStatus {
            shard: self.shard(),
            promised: Epoch(self.number()),
            last: Seq(self.number()),
            applied: Seq(self.number()),
            digest: self.digest(),
            role: match self.flag() {
                true => RoleStatus::Follower,
                false => RoleStatus::Primary {
                    epoch: Epoch(self.number()),
                    open: self.flag(),
                    hindered_by: self.list(|r| (r.store(), r.standing())),
                    records: RecordsKept { count: self.number(), bytes: self.number() },
                },
            },
            stopped: self.flag().then(|| self.number().to_string()),
        }
    }

    fn query_reply(&mut self) -> NodeQueryReply {
        match self.below(8) {
            7 => NodeQueryReply::Split {
                shard: self.shard(),
                outcome: if self.flag() { Ok(()) } else { Err("why".into()) },
            },
            5 => NodeQueryReply::Scrub { from: self.boot() },
            6 => NodeQueryReply::Recover(Box::new(StoreKnowledge {
                from: self.boot(),
                etcd: None,
                durable: self.flag(),
                damaged: self.flag(),
                shards: self.list(|random| ShardKnowledge {
                    shard: random.shard(),
                    promised: Epoch(random.number()),
                    record: None,
                    copy: random.flag().then(|| CopyEnd {
                        last: (Epoch(random.number()), Seq(random.number())),
                        unfit: random.flag(),
                        damaged: random.flag(),
                    }),
                }),
            })),
            4 => NodeQueryReply::Status {
                from: self.boot(),
                replicas: self.list(Self::replica_status),
                scrub: ScrubStatus {
                    running: self.flag(),
                    ended: TimeMs(self.number()),
                    shards: self.number(),
                    damaged: self.list(Self::shard),
                },
                full: self.flag(),
            },
            0 => NodeQueryReply::Probe { from: self.boot(), fsync_age_ms: self.number() },
            1 => NodeQueryReply::Gather {
                from: self.boot(),
                ends: self.list(|r| ShardEnd {
                    shard: r.shard(),
                    promised: Epoch(r.number()),
                    last: (Epoch(r.number()), Seq(r.number())),
                    applied: Seq(r.number()),
                    unfit: r.flag(),
                }),
            },
            2 => NodeQueryReply::StepDown { shard: self.shard(), end: None },
            _ => {
                let end = Some((Epoch(self.number()), Seq(self.number())));
                NodeQueryReply::StepDown { shard: self.shard(), end }
            }
        }
    }

    fn standing(&mut self) -> ReplicaHealth {
        ReplicaHealth::ALL[self.below(ReplicaHealth::ALL.len() as u64) as usize]
    }

    fn report(&mut self) -> HealthReport {
        HealthReport {
            silent: self.list(Self::store),
            frozen: self.list(|r| (r.shard(), r.list(|r| (r.store(), r.standing())))),
            resigned: self.list(Self::shard),
            leaving: self.flag(),
            full: self.flag(),
        }
    }
}

const ROUNDS: u64 = 3_000;

/// The buffer of a received message. The value that the message is converted to may be kept for
/// hours, and is accounted by its own size: it must not keep the buffer alive.
struct Received(Vec<u8>, #[expect(dead_code, reason = "the other reference counts it")] Arc<()>);

/// Observes whether the buffer still exists.
struct BufferWatch(Weak<()>);

impl Received {
    fn watched(bytes: Vec<u8>) -> (BufferWatch, Bytes) {
        let alive = Arc::new(());
        (BufferWatch(Arc::downgrade(&alive)), Bytes::from_owner(Self(bytes, alive)))
    }
}

impl AsRef<[u8]> for Received {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl BufferWatch {
    fn is_gone(&self) -> bool {
        self.0.strong_count() == 0
    }
}

/// Sends random values: each must arrive equal. With a byte damaged or the end cut off, it must be
/// refused or arrive as another value, without a panic.
#[track_caller]
fn check<T, W>(
    make: impl Fn(&mut Random) -> T,
    out: impl Fn(T) -> W,
    back: impl Fn(W) -> Result<T, proto::Invalid>,
) where
    T: Clone + Debug + PartialEq,
    W: Message + Default,
{
    let mut random = Random(1);
    for round in 0..ROUNDS {
        let value = make(&mut random);
        let bytes = out(value.clone()).encode_to_vec();
        let (message, received) = Received::watched(bytes.clone());
        let arrived = W::decode(received).expect("what was encoded decodes");
        let arrived = back(arrived);
        assert_eq!(arrived, Ok(value), "round {round}");
        assert!(message.is_gone(), "round {round}: {arrived:?} keeps its message in memory");

        let mut damaged = bytes;
        if !damaged.is_empty() {
            let at = random.below(damaged.len() as u64) as usize;
            damaged[at] ^= 1 << random.below(8);
            damaged.truncate(damaged.len() - random.below(3).min(damaged.len() as u64) as usize);
        }
        if let Ok(arrived) = W::decode(Bytes::from(damaged)) {
            // Both outcomes are correct: prost may have decoded another, valid message.
            let _ = back(arrived);
        }
    }
}

#[test]
fn gateway_messages_cross() {
    check(Random::gateway_message, wire::ToNode::from, GatewayMessage::try_from);
}

#[test]
fn node_replies_cross() {
    check(Random::node_reply, wire::Reply::from, NodeReply::try_from);
}

#[test]
fn messages_to_followers_cross() {
    check(Random::dialler_message, wire::ToFollower::from, ToFollower::try_from);
}

#[test]
fn messages_from_followers_cross() {
    check(Random::acceptor_message, wire::FromFollower::from, FromFollower::try_from);
}

#[test]
fn queries_cross() {
    check(Random::query, |query| wire::NodeQuery::new(7, query), proto::query_of);
}

#[test]
fn query_replies_cross() {
    check(Random::query_reply, wire::NodeQueryReply::from, NodeQueryReply::try_from);
}

#[test]
fn reports_cross() {
    check(Random::report, |report| wire::NodeReport::new(7, None, report), HealthReport::try_from);
}

/// The engine would refuse such batches, too, since it compares their slots with those of the
/// shard; but invalid input must be refused at the boundary.
#[test]
fn slots_in_the_wrong_order_are_refused_by_name() {
    let slots = Slots { lo: 9, hi: 8 };
    let session = SessionId::default();
    let batch = Batch::seal(slots, session, BatchSeq(1), BatchSeq(1), Codec::Raw, Bytes::new());
    let frame = GatewayMessage::Frame { message: 1, batches: vec![batch] };
    let refused = GatewayMessage::try_from(wire::ToNode::from(frame)).unwrap_err();
    assert_eq!(refused, proto::Invalid::Range("batch.slots"));
    let keys = vec![CounterKey::new(b"ns", b"a").unwrap()];
    let read = GatewayMessage::Read { id: 1, slots, keys, max_staleness_ms: None };
    let refused = GatewayMessage::try_from(wire::ToNode::from(read)).unwrap_err();
    assert_eq!(refused, proto::Invalid::Range("slots"));
}

#[test]
fn a_stream_that_opens_twice_is_refused() {
    let refused = GatewayMessage::try_from(wire::ToNode::opening(7)).unwrap_err();
    assert_eq!(refused, proto::Invalid::Open);
    let refused = ToFollower::try_from(wire::ToFollower::opening(7, 1)).unwrap_err();
    assert_eq!(refused, proto::Invalid::Open);
}

/// Without a digest, an operator would see a copy that differs from all others.
#[test]
fn a_status_without_its_digest_is_refused() {
    let status = NodeQueryReply::Status {
        from: StoreBoot::default(),
        replicas: vec![Random(1).replica_status()],
        scrub: ScrubStatus::default(),
        full: false,
    };
    let mut sent = wire::NodeQueryReply::from(status);
    match &mut sent.kind {
        Some(wire::node_query_reply::Kind::Status(status)) => status.replicas[0].digest = None,
        other => panic!("no status: {other:?}"),
    }
    let refused = NodeQueryReply::try_from(sent).unwrap_err();
    assert_eq!(refused, proto::Invalid::Missing("status.digest"));
}

#[test]
fn a_kind_of_a_newer_build_is_named() {
    // Field 99, a varint: this build does not have such a kind.
    let newer: &[u8] = &[0x98, 0x06, 0x01];
    let arrived = wire::ToFollower::decode(newer).unwrap();
    let refused = ToFollower::try_from(arrived).unwrap_err();
    assert_eq!(refused, proto::Invalid::Missing("to_follower.kind"));
    assert!(refused.to_string().contains("unknown to this build"));
}

/// Such an entry stops only the copy of its shard. If it could not be decoded, it would end the
/// stream of two nodes, and so stop all their shards.
#[test]
fn an_entry_kind_of_a_newer_build_comes_across() {
    let body = Body::Unknown { kind: 77, bytes: Bytes::from_static(b"later") };
    let entry = Entry::after(Position::default(), Epoch(1), TimeMs(2), body);
    let slice = Slice {
        shard: ShardId(0),
        slots: Slots::ALL,
        epoch: Epoch(1),
        copy: CopyNo(1),
        prev: Position::default(),
        commit: Seq(0),
        resume: false,
        entries: vec![entry],
    };
    let append = ToFollower::Append { n: 1, slices: vec![slice] };
    assert_eq!(ToFollower::try_from(wire::ToFollower::from(append.clone())), Ok(append));
}

mod limits {
    use super::*;
    use proto::{MESSAGE_BYTES_MAX, limited};
    use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
    use tonic::{Code, Request, Response, Status, Streaming};
    use wire::gateway_client::GatewayClient;
    use wire::gateway_server::{Gateway, GatewayServer};

    /// Answers a frame with its own bytes, and any other message with an answer beyond the limit.
    struct Echo;

    #[tonic::async_trait]
    impl Gateway for Echo {
        type SessionStream = ReceiverStream<Result<wire::ToGateway, Status>>;

        async fn session(
            &self,
            request: Request<Streaming<wire::ToNode>>,
        ) -> Result<Response<Self::SessionStream>, Status> {
            let mut messages = request.into_inner();
            let (send, receive) = tokio::sync::mpsc::channel(1);
            tokio::spawn(async move {
                while let Some(message) = messages.message().await.transpose() {
                    let reply = message.map(|message| {
                        let values = match message.kind {
                            Some(wire::to_node::Kind::Frame(frame)) => frame.batches,
                            _ => Bytes::from(vec![0; MESSAGE_BYTES_MAX]),
                        };
                        let applied = wire::Applied { values, time_ms: 0, tokens: Bytes::new() };
                        let kind = wire::read_reply::Kind::Values(applied);
                        let read = wire::ReadReply { id: 1, kind: Some(kind), staleness_us: 0 };
                        vec![wire::Reply { kind: Some(wire::reply::Kind::Read(read)) }].into()
                    });
                    let failed = reply.is_err();
                    if send.send(reply).await.is_err() || failed {
                        return;
                    }
                }
            });
            Ok(Response::new(ReceiverStream::new(receive)))
        }
    }

    /// Sends one message and returns the reply.
    async fn exchange(message: wire::ToNode) -> Result<wire::ToGateway, Status> {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = tonic::transport::Server::builder()
            .add_service(limited!(GatewayServer::new(Echo)))
            .serve_with_incoming(TcpListenerStream::new(listener));
        let server = tokio::spawn(server);
        let client = GatewayClient::connect(format!("http://{address}")).await.unwrap();
        let mut client = limited!(client);
        let mut replies = client.session(tokio_stream::once(message)).await?.into_inner();
        let reply = replies.message().await?;
        server.abort();
        reply.ok_or(Status::cancelled("the stream ended without a reply"))
    }

    fn frame(bytes: usize) -> wire::ToNode {
        let frame = wire::Frame { message: 1, batches: vec![0; bytes].into() };
        wire::ToNode { kind: Some(wire::to_node::Kind::Frame(frame)) }
    }

    #[tokio::test]
    async fn the_largest_batch_crosses_both_ways() {
        let bytes = engine::batch::BATCH_BYTES_LIMIT + 100;
        let reply = exchange(frame(bytes)).await.expect("it fits");
        assert!(reply.encoded_len() > bytes);
    }

    #[tokio::test]
    async fn a_larger_message_does_not_leave_the_server() {
        let refused = exchange(wire::ToNode { kind: None }).await.unwrap_err();
        assert_eq!(refused.code(), Code::OutOfRange);
    }

    #[tokio::test]
    async fn a_larger_message_does_not_leave_the_client() {
        // The stream is reset. The error that the caller sees differs, but nothing crosses.
        assert!(exchange(frame(MESSAGE_BYTES_MAX)).await.is_err());
    }
}
