//! The gRPC port as seen by a client that knows only the `.proto` files: health, a deposed primary,
//! the size of a message; and records of a newer build.

use engine::batch::{BATCH_BYTES_LIMIT, Batch, Codec};
use engine::codec::Malformed;
use engine::ids::{
    BatchSeq, Boot, CopyNo, Epoch, Revision, SessionId, ShardId, Slots, StoreBoot, StoreId,
};
use engine::message::{FromFollower, GatewayMessage, NodeReply, Reject, Slice, ToFollower};
use engine::records::Meta;
use metastore::{CasOutcome, EtcdRecord};
use prost::Message;
use proto::MESSAGE_BYTES_MAX;
use proto::wire;
use proto::wire::gateway_client::GatewayClient;
use proto::wire::peer_client::PeerClient;
use rustix::process::Signal;
use tokio_stream::StreamExt;
use tonic::Code;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

use crate::harness::{CLUSTER_ID, Cluster};
use crate::worker::Worker;

#[tokio::test(flavor = "multi_thread")]
async fn health_follows_readyz() {
    let cluster = Cluster::start(1).await;
    let mut node = cluster.node("a").await;
    node.until_ready_shows(200, "ok").await;
    let mut client = HealthClient::new(node.channel().await);
    let asked = |service: &str| HealthCheckRequest { service: service.into() };
    for service in ["", "dkc.v1.Gateway", "dkc.v1.Peer", "dkc.v1.Control"] {
        let answer = client.check(asked(service)).await.expect("served").into_inner();
        assert_eq!(answer.status(), ServingStatus::Serving, "{service}");
    }
    let unknown = client.check(asked("dkc.v1.Reports")).await.expect_err("a coordinator's");
    assert_eq!(unknown.code(), Code::NotFound);

    let mut changes = client.watch(asked("")).await.expect("served").into_inner();
    let mut next = async || changes.message().await.ok().flatten().map(|change| change.status());
    assert_eq!(next().await, Some(ServingStatus::Serving));
    node.signal(Signal::TERM);
    assert_eq!(next().await, Some(ServingStatus::NotServing));
    assert_eq!(next().await, None, "the stream ends with the process");
    assert_eq!(node.ended().await.code(), Some(0), "{}", node.log());
}

/// A primary that was replaced and does not know it: its messages are rejected with the reason, and
/// change nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_primary_of_an_older_epoch_is_refused() {
    let cluster = Cluster::start(1).await;
    let node = cluster.node("a").await;
    cluster.place(&[&node]).await;
    cluster.promote(&node).await;
    let mut worker = Worker::connect(&node, 7).await;
    assert_eq!(worker.add("likes", 1).await, 1);
    let before = node.replica().await.expect("a replica");
    assert_eq!(before.promised, Epoch(2));

    let from = StoreBoot { store: StoreId(99), boot: Boot(1) };
    let (send, messages) = tokio::sync::mpsc::unbounded_channel();
    let opening = tokio_stream::once(wire::ToFollower::opening(CLUSTER_ID, 1));
    let messages = tokio_stream::wrappers::UnboundedReceiverStream::new(messages);
    let mut client = PeerClient::new(node.channel().await);
    let replies = client.follow(opening.chain(messages)).await.expect("the node takes the stream");
    let mut replies = replies.into_inner();
    let mut next = async || {
        let reply = replies.message().await.expect("the stream stands").expect("a message");
        FromFollower::try_from(reply).expect("a valid message")
    };
    send.send(ToFollower::Hello { from, to: node.me }.into()).expect("the stream stands");
    let FromFollower::Welcome { from: met, copies } = next().await else { panic!("no welcome") };
    assert_eq!(met, node.me);
    let copy = copies.iter().find(|(shard, _)| *shard == ShardId(0)).map_or(CopyNo(0), |it| it.1);
    let slice = Slice {
        shard: ShardId(0),
        slots: Slots::ALL,
        epoch: Epoch(1),
        copy,
        prev: Default::default(),
        commit: Default::default(),
        resume: false,
        entries: vec![],
    };
    send.send(ToFollower::Append { n: 1, slices: vec![slice] }.into()).expect("the stream stands");
    let reason = Reject::StaleEpoch { promised: Epoch(2) };
    assert_eq!(next().await, FromFollower::Reject { n: 1, shard: ShardId(0), reason });
    assert_eq!(next().await, FromFollower::Ack { n: 1 });
    assert_eq!(node.replica().await, Some(before));
    assert_eq!(worker.add("likes", 1).await, 2);
}

/// The largest message is accepted. One byte more ends its own stream, with the reason, and affects
/// nothing else: neither another stream on the same connection nor the process.
#[tokio::test(flavor = "multi_thread")]
async fn the_largest_message_is_taken_and_one_byte_more_is_refused() {
    let cluster = Cluster::start(1).await;
    let node = cluster.node("a").await;
    cluster.place(&[&node]).await;
    let channel = node.channel().await;
    let mut worker = Worker::on(&channel, 7).await;
    assert_eq!(worker.add("likes", 1).await, 1);

    let mut large = GatewayClient::new(channel.clone());
    let opening = || tokio_stream::once(wire::ToNode::opening(CLUSTER_ID));
    let sent = opening().chain(tokio_stream::once(message_of(MESSAGE_BYTES_MAX)));
    // The stream is kept open: otherwise the node could not answer.
    let sent = sent.chain(tokio_stream::pending());
    let mut replies = large.session(sent).await.expect("the node takes the stream").into_inner();
    let mut decided = 0;
    while decided < 2 {
        let message = replies.message().await.expect("the stream stands").expect("an answer");
        for reply in message.into_replies() {
            if let NodeReply::Answer { answer, .. } = reply.expect("a valid reply") {
                // The operations are malformed, but every byte was received, checked and written
                // to the log.
                assert_eq!(answer, engine::message::BatchReply::Malformed);
                decided += 1;
            }
        }
    }

    let sent = opening().chain(tokio_stream::once(message_of(MESSAGE_BYTES_MAX + 1)));
    let sent = sent.chain(tokio_stream::pending());
    let mut refused = large.session(sent).await.expect("the node takes the stream").into_inner();
    let refusal = loop {
        match refused.message().await {
            Ok(Some(_)) => {}
            Ok(None) => panic!("ended without a reason"),
            Err(status) => break status,
        }
    };
    assert_eq!(refusal.code(), Code::OutOfRange, "{refusal}");
    assert!(refusal.message().contains(&MESSAGE_BYTES_MAX.to_string()), "{refusal}");

    // The first stream and a new one work over the same connection.
    assert_eq!(worker.add("likes", 1).await, 2);
    assert_eq!(Worker::on(&channel, 8).await.read("likes").await, 2);
}

/// `meta` as a later build may write it.
#[derive(Clone, Debug, PartialEq)]
struct NewerMeta;

impl EtcdRecord for NewerMeta {
    type Id = ();
    const FOLDER: &'static str = <Meta as EtcdRecord>::FOLDER;

    fn name((): &()) -> String {
        String::new()
    }

    fn id(_: &str) -> Option<()> {
        Some(())
    }

    fn encode(&self) -> Vec<u8> {
        vec![2]
    }

    fn decode(_: &[u8]) -> Result<Self, Malformed> {
        Err(Malformed("never read"))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_record_of_a_newer_build_is_refused_and_named() {
    let cluster = Cluster::start(1).await;
    let meta = cluster.metastore.get::<Meta>(&()).await.expect("etcd answers").expect("a cluster");
    let changed = cluster.metastore.replace(&(), &NewerMeta, meta.modified).await;
    assert!(matches!(changed, Ok(CasOutcome::Done { .. })), "{changed:?}");
    let mut node = cluster.spawn("a");
    node.refuses(1, "/meta: malformed meta record format: written by a newer dkc").await;
}

/// A message of exactly so many bytes: two batches of a session, the first of the largest size.
fn message_of(bytes: usize) -> wire::ToNode {
    let batch = |batch_seq, len| {
        let session = SessionId(Revision { incarnation: 1, revision: 99 });
        // The payload is a format, an add, and a name with an invalid length.
        let mut payload = [engine::ops::begin(), vec![0]].concat();
        payload.resize(len, 0xff);
        Batch::seal(
            Slots::ALL,
            session,
            BatchSeq(batch_seq),
            BatchSeq(1),
            Codec::Raw,
            payload.into(),
        )
    };
    let message = |second| -> wire::ToNode {
        let batches = vec![batch(1, BATCH_BYTES_LIMIT), batch(2, second)];
        GatewayMessage::Frame { message: 1, batches }.into()
    };
    let rest = bytes - BATCH_BYTES_LIMIT;
    // Headers and lengths take the same few bytes for both sizes.
    let too_many = message(rest).encoded_len() - bytes;
    let message = message(rest - too_many);
    assert_eq!(message.encoded_len(), bytes);
    message
}
