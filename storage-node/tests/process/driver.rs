//! Single parts of the driver: with real sockets and a real etcd, and the test in the loop's place,
//! which can be slower than any loop.

use std::cell::RefCell;
use std::time::{Duration, Instant};

use engine::batch::{Batch, Codec};
use engine::ids::{
    BatchSeq, Boot, CopyNo, Epoch, Revision, SessionId, ShardId, Slots, StoreBoot, StoreId, Version,
};
use engine::message::{GatewayMessage, ToFollower};
use engine::node::{CasOutcome, Event};
use engine::records::NodeRecord;
use engine::shard::state::ShardState;
use engine::shard_record::ShardRecord;
use engine::store::layout;
use metastore::{Metastore, Settings};
use proto::wire::gateway_client::GatewayClient;
use proto::wire::peer_client::PeerClient;
use proto::wire::{self, snapshot_part};
use storage_node::disk::Disk;
use storage_node::disk_settings::{DiskSettings, MemoryPlan};
use storage_node::etcd::{EtcdClient, EtcdFollower};
use storage_node::inbox::{Inbox, LoopMessage};
use storage_node::names::StoreNames;
use storage_node::peers::{PeerLimits, Peers};
use storage_node::readiness::NodeReadiness;
use storage_node::rpc::{self, FeedConnections, Services};
use telemetry::Health;
use tokio::net::TcpListener;
use tokio::runtime::Handle;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::time::timeout;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tokio_stream::{Stream, StreamExt};
use tonic::{Code, Status};

use crate::calls::{Calls, Fate};
use crate::etcd::Relay;
use crate::harness::{CLUSTER_ID, Cluster};
use crate::worker::Worker;

const ME: StoreBoot = StoreBoot { store: StoreId(1), boot: Boot(1) };
const PEER: StoreBoot = StoreBoot { store: StoreId(2), boot: Boot(1) };
/// The silence after which nothing more is expected.
const QUIET: Duration = Duration::from_millis(500);

// ---- etcd ---------------------------------------------------------------------------------------

/// If it were reported as failed, the state machine would rely on the old record, whatever etcd
/// holds.
#[tokio::test(flavor = "multi_thread")]
async fn a_proposal_whose_answer_was_lost_is_reported_as_unknown() {
    let cluster = Cluster::start(1).await;
    let calls = Calls::start(cluster.etcd.endpoint()).await;
    let settings = Settings::new(vec![calls.endpoint()], "test");
    let store = Metastore::connect(&settings).await.expect("etcd answers");
    let first = ShardRecord {
        slots: Slots::ALL,
        epoch: Epoch(1),
        version: Version(1),
        primary: ME,
        isr: vec![ME.store],
        target: vec![ME.store],
        ..ShardRecord::default()
    };
    let made = cluster.metastore.create(&first.shard(), &first).await;
    let Ok(CasOutcome::Done { mod_revision: expect }) = made else { panic!("{made:?}") };
    let (inbox, mut messages) = Inbox::new(1 << 20);
    let etcd = EtcdClient::new(store, inbox, telemetry::critical_tasks().0, 1);
    let mut propose = |proposal| {
        let record = ShardRecord { version: Version(2), ..first.clone() };
        etcd.perform(|etcd| etcd.propose(proposal, expect, record, None));
        proposed(&mut messages, proposal)
    };
    calls.next("Txn", Fate::Refuse);
    assert_eq!(propose(0), CasOutcome::Failed, "etcd refused it");
    calls.next("Txn", Fate::LoseCall);
    assert_eq!(propose(1), CasOutcome::Unknown);
    calls.next("Txn", Fate::LoseAnswer);
    assert_eq!(propose(2), CasOutcome::Unknown);
    assert_eq!(propose(3), CasOutcome::Failed, "the one before took effect");
    assert_eq!(cluster.shard().await.modified, expect + 1, "once");
}

/// After a read without an answer the state machine gets no event, or one without a result: never
/// an empty result.
#[tokio::test(flavor = "multi_thread")]
async fn a_read_whose_answer_was_lost_is_no_empty_list() {
    let cluster = Cluster::start(1).await;
    let shard = ShardRecord { slots: Slots::ALL, ..ShardRecord::default() };
    let made = cluster.metastore.create(&shard.shard(), &shard).await;
    assert!(matches!(made, Ok(CasOutcome::Done { .. })), "{made:?}");
    let calls = Calls::start(cluster.etcd.endpoint()).await;
    let settings = Settings::new(vec![calls.endpoint()], "test");
    let store = Metastore::connect(&settings).await.expect("etcd answers");
    let (inbox, messages) = Inbox::new(1 << 20);
    let etcd = EtcdClient::new(store, inbox, telemetry::critical_tasks().0, 1);
    let messages = RefCell::new(messages);
    let next = || next_within(QUIET, &mut messages.borrow_mut());
    let check = || {
        etcd.perform(|etcd| etcd.check(4, vec![shard.shard()]));
        next()
    };
    let list = || {
        etcd.perform(EtcdClient::list_sessions);
        next()
    };
    let read = || {
        etcd.perform(|etcd| etcd.read_record(9, shard.shard()));
        next()
    };
    for _ in 0..3 {
        calls.next("Range", Fate::LoseAnswer);
    }
    let checked = check();
    let Some(LoopMessage::Event(Event::EtcdChecked { check: 4, records: None })) = checked else {
        panic!("{checked:?}")
    };
    let listed = list();
    assert!(listed.is_none(), "{listed:?}");
    let seen = read();
    assert!(seen.is_none(), "{seen:?}");
    // The same requests with an answer:
    let checked = check();
    let Some(LoopMessage::Event(Event::EtcdChecked { check: 4, records: Some(records) })) = checked
    else {
        panic!("{checked:?}")
    };
    assert_eq!(records, std::slice::from_ref(&shard));
    let listed = list();
    assert!(matches!(listed, Some(LoopMessage::Event(Event::SessionsListed { .. }))), "{listed:?}");
    let seen = read();
    assert!(
        matches!(seen, Some(LoopMessage::Event(Event::ShardRecord { read: Some(9), .. }))),
        "{seen:?}"
    );
}

/// Waits for the next message to the loop.
fn next_within(
    limit: Duration,
    messages: &mut UnboundedReceiver<LoopMessage>,
) -> Option<LoopMessage> {
    let next = || Handle::current().block_on(timeout(limit, messages.recv()));
    tokio::task::block_in_place(next).ok().flatten()
}

/// Waits for what came of it.
fn proposed(messages: &mut UnboundedReceiver<LoopMessage>, proposal: u64) -> CasOutcome {
    match next_within(Duration::from_secs(20), messages) {
        Some(LoopMessage::Event(Event::Proposed { proposal: of, outcome })) if of == proposal => {
            outcome
        }
        other => panic!("{other:?}"),
    }
}

/// A deletion while no watch was open is in no watch: the list that follows lacks the key, and
/// replaces the former knowledge.
#[tokio::test(flavor = "multi_thread")]
async fn a_peer_whose_key_went_while_etcd_was_out_of_reach_is_missed() {
    let cluster = Cluster::start(1).await;
    let relay = Relay::start(cluster.etcd.endpoint()).await;
    let settings = Settings::new(vec![relay.endpoint()], "test");
    let store = Metastore::connect(&settings).await.expect("etcd answers");
    let other = StoreBoot { store: StoreId(3), ..PEER };
    for peer in [PEER, other] {
        let address = "127.0.0.1:1".to_owned();
        let key = NodeRecord { boot: peer.boot, address, capacity: 1, versions: (1, 1) };
        cluster.metastore.create(&peer.store, &key).await.expect("etcd answers");
    }
    let (inbox, mut messages) = Inbox::new(1 << 20);
    let tasks = telemetry::critical_tasks().0;
    let follower = EtcdFollower {
        etcd: EtcdClient::new(store, inbox.clone(), tasks.clone(), 1),
        me: ME,
        peers: Peers::new(ME.store, CLUSTER_ID, inbox, PeerLimits::default(), tasks),
        names: StoreNames::default(),
        readiness: NodeReadiness::new(Health::new("test")),
    };
    tokio::spawn(follower.run());
    peers_are(&mut messages, &[PEER, other]);
    relay.close();
    let key = cluster.metastore.get::<NodeRecord>(&other.store).await.expect("etcd answers");
    let modified = key.expect("it was made above").modified;
    cluster.metastore.delete::<NodeRecord>(&other.store, modified).await.expect("etcd answers");
    relay.mend();
    peers_are(&mut messages, &[PEER]);
}

/// Waits for an event that names exactly these peers.
fn peers_are(messages: &mut UnboundedReceiver<LoopMessage>, want: &[StoreBoot]) {
    loop {
        let message = next_within(Duration::from_secs(20), messages).expect("a message in time");
        if let LoopMessage::Event(Event::PeersRegistered(peers)) = message
            && peers.iter().map(|(peer, _)| peer).eq(want)
        {
            return;
        }
    }
}

/// On a whole node: a primary whose change of the in-sync set is lost on the way to etcd, or on the
/// way back, settles it and goes on.
#[tokio::test(flavor = "multi_thread")]
async fn a_primary_settles_a_change_that_was_lost() {
    for fate in [Fate::LoseAnswer, Fate::LoseCall] {
        let cluster = Cluster::start(1).await;
        let calls = Calls::start(cluster.etcd.endpoint()).await;
        let behind = [("DKC_ETCD", &*calls.endpoint())];
        let (a, mut b) = (cluster.node_with("a", &behind).await, cluster.node("b").await);
        cluster.place(&[&a, &b]).await;
        let mut worker = Worker::connect(&a, 7).await;
        assert_eq!(worker.add("likes", 1).await, 1);
        calls.next("Txn", fate);
        b.kill();
        assert_eq!(worker.add("likes", 1).await, 2, "{fate:?}");
        calls.happened().await;
        cluster.until_shard("without b", |shard| shard.isr == [a.me.store]).await;
        assert_eq!(worker.add("likes", 1).await, 3, "{fate:?}");
    }
}

// ---- sockets ------------------------------------------------------------------------------------

/// A node's services, with `messages` in the place of its loop.
struct Bench {
    _folder: tempfile::TempDir,
    _disk: Disk,
    messages: UnboundedReceiver<LoopMessage>,
    url: String,
}

impl Bench {
    /// Starts the services; `intake_bytes` limits what was received and not handled yet.
    async fn start(intake_bytes: usize) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let settings = DiskSettings::new(folder.path().join("a"), &MemoryPlan::of(32 << 20));
        let (disk, _) = Disk::open(settings, |_| {}, |error| panic!("{error}")).expect("a disk");
        let (inbox, messages) = Inbox::new(intake_bytes);
        let (feeds, staging) = (FeedConnections::default(), disk.staging());
        let (limits, tasks) = (PeerLimits::default(), telemetry::critical_tasks().0);
        let cluster = CLUSTER_ID;
        let services = Services { inbox, me: ME, cluster, feeds, staging, limits, tasks };
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let url = format!("http://{}", listener.local_addr().expect("it is bound"));
        let connections = telemetry::files::ConnectionLimit::new(16);
        tokio::spawn(rpc::serve(listener, connections, services, Health::new("test")));
        Self { _folder: folder, _disk: disk, messages, url }
    }

    /// Returns all messages until there is silence.
    fn until_quiet(&mut self) -> Vec<LoopMessage> {
        std::iter::from_fn(|| next_within(QUIET, &mut self.messages)).collect()
    }
}

/// A gateway may send faster than the loop handles: waiting messages are bounded in bytes, and the
/// sender is held back.
#[tokio::test(flavor = "multi_thread")]
async fn frames_wait_at_the_sender_while_the_loop_is_busy() {
    const FRAMES: usize = 32;
    const FRAME_BYTES: usize = 256 << 10;
    const INTAKE_BYTES: usize = 1 << 20;
    let mut bench = Bench::start(INTAKE_BYTES).await;
    let (send, messages) = tokio::sync::mpsc::unbounded_channel();
    let client = GatewayClient::connect(bench.url.clone()).await.expect("it listens");
    let stream = tokio_stream::once(wire::ToNode::opening(CLUSTER_ID))
        .chain(UnboundedReceiverStream::new(messages));
    let mut client = proto::limited!(client);
    let _replies = client.session(stream).await.expect("it takes the stream");
    for message in 0..FRAMES as u64 {
        let session = SessionId(Revision { incarnation: 1, revision: 7 });
        let payload = vec![7; FRAME_BYTES].into();
        let batch_seq = BatchSeq(message + 1);
        let batch = Batch::seal(Slots::ALL, session, batch_seq, batch_seq, Codec::Raw, payload);
        let frame = GatewayMessage::Frame { message, batches: vec![batch] };
        send.send(frame.into()).expect("the stream stands");
    }
    let (mut taken, began) = (0, Instant::now());
    // These are the loop's ends of the connections: dropping one would end it.
    let mut opened = Vec::new();
    while taken < FRAMES {
        // The messages are held, as by a loop that is busy.
        let (of_streams, held): (Vec<_>, Vec<_>) = bench
            .until_quiet()
            .into_iter()
            .partition(|message| matches!(message, LoopMessage::Opened { .. }));
        opened.extend(of_streams);
        let frames =
            held.iter().filter(|message| matches!(message, LoopMessage::Received(..))).count();
        assert!(frames * FRAME_BYTES <= INTAKE_BYTES, "{frames} frames at once");
        taken += frames;
        assert!(began.elapsed() < Duration::from_secs(60), "{taken} of {FRAMES} came");
    }
}

/// Snapshots are announced when their sizes are known, the smaller ones first, and sent when they
/// were accepted. One used to wait for ever, and its sender with it, when the last announcement was
/// that of a transfer with a lower number.
#[tokio::test(flavor = "multi_thread")]
async fn copies_may_be_announced_in_any_order() {
    const LINK: u64 = 5;
    const FIRST: u64 = 9;
    const LAST: u64 = 8;
    let mut bench = Bench::start(1 << 20).await;
    let (send, messages) = tokio::sync::mpsc::unbounded_channel();
    let opening = tokio_stream::once(wire::ToFollower::opening(CLUSTER_ID, LINK));
    let mut peer = PeerClient::connect(bench.url.clone()).await.expect("it listens");
    let follow = opening.chain(UnboundedReceiverStream::new(messages));
    let _replies = peer.follow(follow).await.expect("it takes the stream");
    send.send(ToFollower::Hello { from: PEER, to: ME }.into()).expect("the stream stands");
    for transfer in [FIRST, LAST] {
        let (shard, epoch, copy) = (ShardId(0), Epoch(1), CopyNo(0));
        let notice = ToFollower::Snapshot { transfer, shard, epoch, copy, bytes: 1 };
        send.send(notice.into()).expect("the stream stands");
    }
    let messages = bench.until_quiet();
    let received =
        messages.iter().filter(|message| matches!(message, LoopMessage::Received(..))).count();
    assert_eq!(received, 3, "the greeting and two announcements: {messages:?}");

    // The shard is empty: its snapshot consists of its record only.
    let state = ShardState { slots: Slots::ALL, ..ShardState::default() };
    let header = wire::SnapshotHeader {
        open: Some(wire::Open::new(CLUSTER_ID, LINK)),
        from: Some(PEER.into()),
        to: Some(ME.into()),
        transfer: FIRST,
        slots: Some(Slots::ALL.into()),
        shard_record: layout::encode_shard(CopyNo(1), &state).into(),
    };
    let header = wire::SnapshotPart { kind: Some(snapshot_part::Kind::Header(header)) };
    let end = proto::SnapshotEncoder::default().finish();
    let parts: Vec<_> = std::iter::once(header).chain(end).collect();
    let mut copies = PeerClient::connect(bench.url.clone()).await.expect("it listens");
    let copy = copies.snapshot(tokio_stream::iter(parts));
    let copy = timeout(Duration::from_secs(20), copy).await;
    copy.expect("a copy that is whole is answered").expect("it was taken");
    let messages = bench.until_quiet();
    let [LoopMessage::Event(Event::SnapshotStaged { transfer: FIRST, .. })] = &messages[..] else {
        panic!("{messages:?}")
    };
}

/// The reason is sent to the other end, which may be of a newer build.
#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_makes_no_sense_ends_with_the_reason() {
    let mut bench = Bench::start(1 << 20).await;
    let open = || wire::ToNode::opening(CLUSTER_ID);
    let ended = session(&bench.url, tokio_stream::iter(vec![open(), open()]));
    bench.until_quiet();
    ends_with(ended, Code::InvalidArgument, "open").await;
    let ended = session(&bench.url, tokio_stream::empty());
    ends_with(ended, Code::FailedPrecondition, "open").await;
    let silent = session(&bench.url, tokio_stream::pending());
    ends_with(silent, Code::DeadlineExceeded, "sent nothing").await;
    let open = || wire::ToFollower::opening(CLUSTER_ID, 1);
    let mut peer = PeerClient::connect(bench.url.clone()).await.expect("it listens");
    let ended = tokio::spawn(async move {
        let follow = peer.follow(tokio_stream::iter(vec![open(), open()])).await;
        end_of(follow?.into_inner()).await
    });
    bench.until_quiet();
    ends_with(ended, Code::InvalidArgument, "open").await;
}

/// The loop has ended: new streams are refused as unavailable.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_is_about_to_end_takes_no_stream() {
    let Bench { messages, url, _folder, _disk } = Bench::start(1 << 20).await;
    drop(messages);
    let ended = session(&url, tokio_stream::iter(vec![wire::ToNode::opening(CLUSTER_ID)]));
    ends_with(ended, Code::Unavailable, "shutting down").await;
    let mut peer = PeerClient::connect(url).await.expect("it listens");
    let opening = tokio_stream::once(wire::ToFollower::opening(CLUSTER_ID, 1));
    let refused = peer.follow(opening).await.expect_err("it is about to end");
    assert_eq!(refused.code(), Code::Unavailable, "{refused}");
}

/// A snapshot for another boot, for a connection that is gone, or cut short: the state machine gets
/// no event.
#[tokio::test(flavor = "multi_thread")]
async fn a_copy_that_is_not_whole_or_not_meant_is_refused() {
    const LINK: u64 = 5;
    let mut bench = Bench::start(1 << 20).await;
    let (send, messages) = tokio::sync::mpsc::unbounded_channel();
    let opening = tokio_stream::once(wire::ToFollower::opening(CLUSTER_ID, LINK));
    let mut peer = PeerClient::connect(bench.url.clone()).await.expect("it listens");
    let follow = opening.chain(UnboundedReceiverStream::new(messages));
    let replies = peer.follow(follow).await.expect("it takes the stream");
    send.send(ToFollower::Hello { from: PEER, to: ME }.into()).expect("the stream stands");
    // The message is held: otherwise the connection would end.
    let _greeted = bench.until_quiet();

    let state = ShardState { slots: Slots::ALL, ..ShardState::default() };
    let record = layout::encode_shard(CopyNo(1), &state);
    let header = |to: StoreBoot, link, record: &[u8]| {
        let header = wire::SnapshotHeader {
            open: Some(wire::Open::new(CLUSTER_ID, link)),
            from: Some(PEER.into()),
            to: Some(to.into()),
            transfer: 1,
            slots: Some(Slots::ALL.into()),
            shard_record: record.to_vec().into(),
        };
        wire::SnapshotPart { kind: Some(snapshot_part::Kind::Header(header)) }
    };
    let before = StoreBoot { boot: Boot(ME.boot.0 - 1), ..ME };
    let mut copies = PeerClient::connect(bench.url.clone()).await.expect("it listens");
    for (header, code, why) in [
        (header(before, LINK, &record), Code::FailedPrecondition, "another boot"),
        (header(ME, LINK + 1, &record), Code::FailedPrecondition, "is gone"),
        (header(ME, LINK, b"no record"), Code::DataLoss, ""),
        (header(ME, LINK, &record), Code::InvalidArgument, "cut short"),
    ] {
        let refused = copies.snapshot(tokio_stream::once(header)).await.expect_err(why);
        assert_eq!(refused.code(), code, "{refused}");
        assert!(refused.message().contains(why), "{refused}");
    }
    // The connection ends while the snapshot arrives.
    let waits = tokio_stream::once(header(ME, LINK, &record)).chain(tokio_stream::pending());
    let coming = tokio::spawn(async move { copies.snapshot(waits).await });
    drop((send, replies));
    let refused = timeout(Duration::from_secs(20), coming).await.expect("in time");
    let refused = refused.expect("no panic").expect_err("its connection is gone");
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
    let staged =
        |message: &LoopMessage| matches!(message, LoopMessage::Event(Event::SnapshotStaged { .. }));
    assert!(!bench.until_quiet().iter().any(staged));
}

type Ended = tokio::task::JoinHandle<Result<(), Status>>;

/// Opens a gateway's stream, sends these messages, and returns how it ended.
fn session(url: &str, sent: impl Stream<Item = wire::ToNode> + Send + 'static) -> Ended {
    let url = url.to_owned();
    tokio::spawn(async move {
        let mut client = GatewayClient::connect(url).await.expect("it listens");
        end_of(client.session(sent).await?.into_inner()).await
    })
}

async fn end_of<T>(mut replies: tonic::Streaming<T>) -> Result<(), Status> {
    while replies.message().await?.is_some() {}
    Ok(())
}

async fn ends_with(ended: Ended, code: Code, why: &str) {
    let ended = timeout(Duration::from_secs(20), ended).await.expect("it ends");
    let status = ended.expect("no panic").expect_err("it is refused");
    assert_eq!(status.code(), code, "{status}");
    assert!(status.message().contains(why), "{status}");
}
