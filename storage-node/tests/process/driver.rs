//! Parts of the driver by themselves: real sockets and a real etcd before them, and in the loop's place the test, which can
//! be as slow as no loop is.

use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use engine::apply::ShardState;
use engine::batch::{Batch, Codec};
use engine::config::ShardConfig;
use engine::ids::{
    Boot, Bseq, CopyNo, Epoch, Revision, SessionId, ShardId, Slots, StoreBoot, StoreId, Version,
};
use engine::message::{GatewayMessage, ToFollower};
use engine::node::{CasOutcome, Event};
use engine::records::NodeRecord;
use engine::store::layout;
use metastore::{Metastore, Outcome, Settings};
use proto::wire::gateway_client::GatewayClient;
use proto::wire::peer_client::PeerClient;
use proto::wire::{self, snapshot_part};
use storage_node::disk::{Disk, DiskSettings, MemoryPlan};
use storage_node::etcd::{Etcd, Followed, Wish};
use storage_node::inbox::{Inbox, Told};
use storage_node::names::Names;
use storage_node::peers::{Limits, Peers};
use storage_node::readiness::Readiness;
use storage_node::rpc::{self, Links, Services};
use telemetry::Health;
use tokio::net::TcpListener;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tokio_stream::{Stream, StreamExt};
use tonic::{Code, Status};

use crate::calls::{Calls, Fate};
use crate::etcd::Relay;
use crate::harness::{CLUSTER_ID, Cluster};
use crate::worker::Worker;

const ME: StoreBoot = StoreBoot { store: StoreId(1), boot: Boot(1) };
const PEER: StoreBoot = StoreBoot { store: StoreId(2), boot: Boot(1) };
/// Nothing comes any more after it.
const QUIET: Duration = Duration::from_millis(500);

// ---- etcd ----------------------------------------------------------------------------------------

/// Said to have failed, the machine would believe that the record is as it was, whatever etcd holds.
#[tokio::test(flavor = "multi_thread")]
async fn a_proposal_whose_answer_was_lost_is_told_as_unknown() {
    let cluster = Cluster::start(1).await;
    let calls = Calls::start(cluster.etcd.endpoint()).await;
    let settings = Settings::new(vec![calls.endpoint()], "test");
    let store = Metastore::connect(&settings).await.expect("etcd answers");
    let first = ShardConfig {
        slots: Slots::ALL,
        epoch: Epoch(1),
        version: Version(1),
        primary: ME,
        isr: vec![ME.store],
        target: vec![ME.store],
        ..ShardConfig::default()
    };
    let made = cluster.metastore.create(&first.shard(), &first).await;
    let Ok(Outcome::Done { revision: expect }) = made else { panic!("{made:?}") };
    let (inbox, told) = Inbox::new(1 << 20);
    let etcd = Etcd::new(store, inbox, telemetry::vital().0, 1);
    let propose = |proposal| {
        let config = ShardConfig { version: Version(2), ..first.clone() };
        etcd.perform(Wish::Propose { proposal, expect, config, candidate: None });
        proposed(&told, proposal)
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

/// Of a read that was not answered the machine is told nothing, or that nothing is known: never that there is nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_read_whose_answer_was_lost_is_no_empty_list() {
    let cluster = Cluster::start(1).await;
    let shard = ShardConfig { slots: Slots::ALL, ..ShardConfig::default() };
    let made = cluster.metastore.create(&shard.shard(), &shard).await;
    assert!(matches!(made, Ok(Outcome::Done { .. })), "{made:?}");
    let calls = Calls::start(cluster.etcd.endpoint()).await;
    let settings = Settings::new(vec![calls.endpoint()], "test");
    let store = Metastore::connect(&settings).await.expect("etcd answers");
    let (inbox, told) = Inbox::new(1 << 20);
    let etcd = Etcd::new(store, inbox, telemetry::vital().0, 1);
    let ask = |wish| {
        etcd.perform(wish);
        tokio::task::block_in_place(|| told.recv_timeout(QUIET).ok())
    };
    let check = || Wish::CheckEtcd { check: 4, shards: vec![shard.shard()] };
    let read = || Wish::ReadConfig { read: 9, shard: shard.shard() };
    for _ in 0..3 {
        calls.next("Range", Fate::LoseAnswer);
    }
    let checked = ask(check());
    let Some(Told::Event(Event::EtcdChecked { check: 4, configs: None })) = checked else {
        panic!("{checked:?}")
    };
    let listed = ask(Wish::ListSessions);
    assert!(listed.is_none(), "{listed:?}");
    let seen = ask(read());
    assert!(seen.is_none(), "{seen:?}");
    // And when it is answered:
    let checked = ask(check());
    let Some(Told::Event(Event::EtcdChecked { check: 4, configs: Some(configs) })) = checked else {
        panic!("{checked:?}")
    };
    assert_eq!(configs, std::slice::from_ref(&shard));
    let listed = ask(Wish::ListSessions);
    assert!(matches!(listed, Some(Told::Event(Event::SessionsListed { .. }))), "{listed:?}");
    let seen = ask(read());
    assert!(matches!(seen, Some(Told::Event(Event::Config { read: Some(9), .. }))), "{seen:?}");
}

/// Waits for what came of it.
fn proposed(told: &Receiver<Told>, proposal: u64) -> CasOutcome {
    tokio::task::block_in_place(|| match told.recv_timeout(Duration::from_secs(20)) {
        Ok(Told::Event(Event::Proposed { proposal: of, outcome })) if of == proposal => outcome,
        other => panic!("{other:?}"),
    })
}

/// What went while no watch was open comes by no watch: the list that follows lacks it, and replaces what was known.
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
    let (inbox, told) = Inbox::new(1 << 20);
    let vital = telemetry::vital().0;
    let followed = Followed {
        etcd: Etcd::new(store, inbox.clone(), vital.clone(), 1),
        me: ME,
        peers: Peers::new(ME.store, CLUSTER_ID, inbox, Limits::default(), vital),
        names: Names::default(),
        readiness: Readiness::new(Health::new("test")),
    };
    tokio::spawn(followed.run());
    peers_are(&told, &[PEER, other]);
    relay.close();
    let key = cluster.metastore.get::<NodeRecord>(&other.store).await.expect("etcd answers");
    let modified = key.expect("it was made above").modified;
    cluster.metastore.delete::<NodeRecord>(&other.store, modified).await.expect("etcd answers");
    relay.mend();
    peers_are(&told, &[PEER]);
}

/// Waits until the machine is told that these are there, and no others.
fn peers_are(told: &Receiver<Told>, want: &[StoreBoot]) {
    tokio::task::block_in_place(|| {
        loop {
            let told = told.recv_timeout(Duration::from_secs(20)).expect("it is told in time");
            if let Told::Event(Event::Peers(peers)) = told
                && peers.iter().map(|(peer, _)| peer).eq(want)
            {
                return;
            }
        }
    });
}

/// The whole node: a primary whose change of the in-sync set is lost on the way there, or on the way back, settles it and
/// goes on.
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

// ---- sockets -------------------------------------------------------------------------------------

/// A node's services, with `told` in the place of its loop.
struct Bench {
    _folder: tempfile::TempDir,
    _disk: Disk,
    told: Receiver<Told>,
    url: String,
}

impl Bench {
    /// `intake_bytes`: of what was received and is not handled yet.
    async fn start(intake_bytes: usize) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let settings = DiskSettings::new(folder.path().join("a"), &MemoryPlan::of(32 << 20));
        let (disk, _) = Disk::open(settings, |_| {}, |error| panic!("{error}")).expect("a disk");
        let (inbox, told) = Inbox::new(intake_bytes);
        let (links, staging) = (Links::default(), disk.staging());
        let (limits, vital) = (Limits::default(), telemetry::vital().0);
        let cluster = CLUSTER_ID;
        let services = Services { inbox, me: ME, cluster, links, staging, limits, vital };
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let url = format!("http://{}", listener.local_addr().expect("it is bound"));
        let connections = telemetry::files::Connections::new(16);
        tokio::spawn(rpc::serve(listener, connections, services, Health::new("test")));
        Self { _folder: folder, _disk: disk, told, url }
    }

    /// Everything that comes until nothing comes any more.
    fn until_quiet(&self) -> Vec<Told> {
        let mut all = Vec::new();
        tokio::task::block_in_place(|| {
            while let Ok(told) = self.told.recv_timeout(QUIET) {
                all.push(told);
            }
        });
        all
    }
}

/// A gateway may send faster than the loop takes: what waits is bounded by its bytes, and the sender is held back.
#[tokio::test(flavor = "multi_thread")]
async fn frames_wait_at_the_sender_while_the_loop_is_busy() {
    const FRAMES: usize = 32;
    const FRAME_BYTES: usize = 256 << 10;
    const INTAKE_BYTES: usize = 1 << 20;
    let bench = Bench::start(INTAKE_BYTES).await;
    let (send, messages) = tokio::sync::mpsc::unbounded_channel();
    let client = GatewayClient::connect(bench.url.clone()).await.expect("it listens");
    let stream = tokio_stream::once(wire::ToNode::opening(CLUSTER_ID))
        .chain(UnboundedReceiverStream::new(messages));
    let mut client = proto::limited!(client);
    let _replies = client.session(stream).await.expect("it takes the stream");
    for message in 0..FRAMES as u64 {
        let session = SessionId(Revision { incarnation: 1, revision: 7 });
        let payload = vec![7; FRAME_BYTES].into();
        let bseq = Bseq(message + 1);
        let batch = Batch::seal(Slots::ALL, session, bseq, bseq, Codec::Raw, payload);
        let frame = GatewayMessage::Frame { message, batches: vec![batch] };
        send.send(frame.into()).expect("the stream stands");
    }
    let (mut taken, began) = (0, Instant::now());
    // The loop's end of the connection: dropped, it would end it.
    let mut opened = Vec::new();
    while taken < FRAMES {
        // Held, as by a loop that does not come to them.
        let (of_streams, held): (Vec<_>, Vec<_>) =
            bench.until_quiet().into_iter().partition(|told| matches!(told, Told::Opened { .. }));
        opened.extend(of_streams);
        let frames = held.iter().filter(|told| matches!(told, Told::Received(..))).count();
        assert!(frames * FRAME_BYTES <= INTAKE_BYTES, "{frames} frames at once");
        taken += frames;
        assert!(began.elapsed() < Duration::from_secs(60), "{taken} of {FRAMES} came");
    }
}

/// Copies are announced when their sizes are known, the smaller ones first, and sent when they were accepted. One waited
/// for ever, and its sender with it, when the last announcement was that of a transfer with a lower number.
#[tokio::test(flavor = "multi_thread")]
async fn copies_may_be_announced_in_any_order() {
    const LINK: u64 = 5;
    const FIRST: u64 = 9;
    const LAST: u64 = 8;
    let bench = Bench::start(1 << 20).await;
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
    let told = bench.until_quiet();
    let received = told.iter().filter(|told| matches!(told, Told::Received(..))).count();
    assert_eq!(received, 3, "the greeting and two announcements: {told:?}");

    // An empty shard: all there is of its copy is its record.
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
    let end = proto::RowsWriter::default().finish();
    let parts: Vec<_> = std::iter::once(header).chain(end).collect();
    let mut copies = PeerClient::connect(bench.url.clone()).await.expect("it listens");
    let copy = copies.snapshot(tokio_stream::iter(parts));
    let copy = tokio::time::timeout(Duration::from_secs(20), copy).await;
    copy.expect("a copy that is whole is answered").expect("it was taken");
    let told = bench.until_quiet();
    let [Told::Event(Event::SnapshotStaged { transfer: FIRST, .. })] = &told[..] else {
        panic!("{told:?}")
    };
}

/// It is told to whoever opened the stream, who may be of a newer build.
#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_makes_no_sense_ends_with_the_reason() {
    let bench = Bench::start(1 << 20).await;
    let open = || wire::ToNode::opening(CLUSTER_ID);
    let ended = session(&bench.url, tokio_stream::iter(vec![open(), open()]));
    bench.until_quiet();
    ends_with(ended, Code::InvalidArgument, "open").await;
    let ended = session(&bench.url, tokio_stream::empty());
    ends_with(ended, Code::FailedPrecondition, "open").await;
    let silent = session(&bench.url, tokio_stream::pending());
    ends_with(silent, Code::DeadlineExceeded, "said nothing").await;
    let open = || wire::ToFollower::opening(CLUSTER_ID, 1);
    let mut peer = PeerClient::connect(bench.url.clone()).await.expect("it listens");
    let ended = tokio::spawn(async move {
        let follow = peer.follow(tokio_stream::iter(vec![open(), open()])).await;
        end_of(follow?.into_inner()).await
    });
    bench.until_quiet();
    ends_with(ended, Code::InvalidArgument, "open").await;
}

/// Nobody is left to hear what comes: whoever comes is sent elsewhere.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_is_about_to_end_takes_no_stream() {
    let Bench { told, url, _folder, _disk } = Bench::start(1 << 20).await;
    drop(told);
    let ended = session(&url, tokio_stream::iter(vec![wire::ToNode::opening(CLUSTER_ID)]));
    ends_with(ended, Code::Unavailable, "about to end").await;
    let mut peer = PeerClient::connect(url).await.expect("it listens");
    let opening = tokio_stream::once(wire::ToFollower::opening(CLUSTER_ID, 1));
    let refused = peer.follow(opening).await.expect_err("it is about to end");
    assert_eq!(refused.code(), Code::Unavailable, "{refused}");
}

/// A copy for somebody else, for a connection that is gone, or less than a whole one: nothing is told to the machine.
#[tokio::test(flavor = "multi_thread")]
async fn a_copy_that_is_not_whole_or_not_meant_is_refused() {
    const LINK: u64 = 5;
    let bench = Bench::start(1 << 20).await;
    let (send, messages) = tokio::sync::mpsc::unbounded_channel();
    let opening = tokio_stream::once(wire::ToFollower::opening(CLUSTER_ID, LINK));
    let mut peer = PeerClient::connect(bench.url.clone()).await.expect("it listens");
    let follow = opening.chain(UnboundedReceiverStream::new(messages));
    let replies = peer.follow(follow).await.expect("it takes the stream");
    send.send(ToFollower::Hello { from: PEER, to: ME }.into()).expect("the stream stands");
    // Held: else the connection would be over.
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
        (header(before, LINK, &record), Code::FailedPrecondition, "another run"),
        (header(ME, LINK + 1, &record), Code::FailedPrecondition, "is gone"),
        (header(ME, LINK, b"no record"), Code::DataLoss, ""),
        (header(ME, LINK, &record), Code::InvalidArgument, "cut short"),
    ] {
        let refused = copies.snapshot(tokio_stream::once(header)).await.expect_err(why);
        assert_eq!(refused.code(), code, "{refused}");
        assert!(refused.message().contains(why), "{refused}");
    }
    // The connection goes while the copy comes.
    let waits = tokio_stream::once(header(ME, LINK, &record)).chain(tokio_stream::pending());
    let coming = tokio::spawn(async move { copies.snapshot(waits).await });
    drop((send, replies));
    let refused = tokio::time::timeout(Duration::from_secs(20), coming).await.expect("in time");
    let refused = refused.expect("no panic").expect_err("its connection is gone");
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
    let staged = |told: &Told| matches!(told, Told::Event(Event::SnapshotStaged { .. }));
    assert!(!bench.until_quiet().iter().any(staged));
}

type Ended = tokio::task::JoinHandle<Result<(), Status>>;

/// Opens a gateway's stream, says this on it, and gives how it ended.
fn session(url: &str, said: impl Stream<Item = wire::ToNode> + Send + 'static) -> Ended {
    let url = url.to_owned();
    tokio::spawn(async move {
        let mut client = GatewayClient::connect(url).await.expect("it listens");
        end_of(client.session(said).await?.into_inner()).await
    })
}

async fn end_of<T>(mut replies: tonic::Streaming<T>) -> Result<(), Status> {
    while replies.message().await?.is_some() {}
    Ok(())
}

async fn ends_with(ended: Ended, code: Code, why: &str) {
    let ended = tokio::time::timeout(Duration::from_secs(20), ended).await.expect("it ends");
    let status = ended.expect("no panic").expect_err("it is refused");
    assert_eq!(status.code(), code, "{status}");
    assert!(status.message().contains(why), "{status}");
}
