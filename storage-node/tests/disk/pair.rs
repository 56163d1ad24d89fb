//! Two stores on real disks, each led by a real state machine, in one thread; etcd is a file.
//!
//! The network is a queue that loses nothing: the process is killed, both stores at one moment, and
//! afterwards the content of their disks must be right. Time runs ten times as fast as the clock,
//! so that flushes come often.

use std::collections::VecDeque;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use engine::ids::{Boot, Conn, Epoch, Now, ShardId, Slots, StoreBoot, StoreId, TimeMs, Version};
use engine::message::{GatewayMessage, NodeReply};
use engine::node::{CasOutcome, Effect, Event, Node, RecoveredReplica, ReplicaView, Settings};
use engine::replica::primary::Primary;
use engine::shard::state::ShardState;
use engine::shard_record::ShardRecord;
use engine::store::log::{Identity, LogRecord};
use proto::wire;
use storage_node::disk::{Disk, DiskContents};
use storage_node::disk_event::DiskEvent;
use storage_node::disk_settings::{DiskSettings, MemoryPlan};
use storage_node::error::DiskError;
use storage_node::snapshot_files::{NotStaged, SnapshotReadEnd, SnapshotReader, Staging};

use crate::ledger::Ledger;

pub(crate) const CLUSTER: u128 = 77;
pub(crate) const GATEWAY: Conn = Conn(20);
/// Two shards, so that tables, groups and ingests hold changes of both.
pub(crate) const SHARDS: [Slots; 2] =
    [Slots { lo: 0, hi: 0x7fff }, Slots { lo: 0x8000, hi: u16::MAX }];

const FASTER: u64 = 10;
const TIMEOUT: Duration = Duration::from_secs(30);

pub(crate) fn settings(folder: &Path) -> DiskSettings {
    let plan = MemoryPlan::of(32 << 20);
    DiskSettings {
        segment_bytes: 16 << 10,
        block_bytes: 4 << 10,
        log_keep_bytes: 64 << 10,
        free_bytes_min: 0,
        readers: 2,
        ..DiskSettings::new(folder.to_owned(), &plan)
    }
}

pub(crate) fn store_id(index: usize) -> StoreId {
    StoreId(index as u128 + 1)
}

/// The identity of the next boot.
pub(crate) fn next_identity(opened: &DiskContents, store: StoreId) -> Identity {
    let before = opened.identity.as_ref();
    let boot = Boot(before.map_or(0, |identity| identity.boot.0) + 1);
    let nonce = u128::from(boot.0) << 8 | store.0;
    Identity {
        cluster: CLUSTER,
        store,
        boot,
        read_nonce: before.map(Identity::nonce),
        claims: vec![nonce],
    }
}

enum Message {
    Disk(usize, DiskEvent),
    Failed(usize, DiskError),
    Staged { store: usize, conn: Conn, transfer: u64, state: Box<ShardState> },
    SnapshotFailed { store: usize, transfer: u64 },
}

struct Store {
    me: StoreBoot,
    node: Node,
    disk: Disk,
}

pub(crate) struct Pair {
    folder: PathBuf,
    pub(crate) ledger: Ledger,
    stores: Vec<Store>,
    etcd: Etcd,
    started: Instant,
    messages: Receiver<Message>,
    sender: Sender<Message>,
    wires: VecDeque<(usize, Event)>,
    pub(crate) replies: Vec<NodeReply>,
    transfers: Vec<JoinHandle<()>>,
    /// Snapshots installed and copies dropped.
    pub(crate) installed: u64,
    pub(crate) dropped: u64,
}

/// The shards' records, in a file that survives the process.
struct Etcd {
    path: PathBuf,
    shards: Vec<(ShardRecord, u64)>,
}

impl Etcd {
    fn open(path: PathBuf) -> Self {
        let shards = match fs::read_to_string(&path) {
            Err(_) => Vec::new(),
            Ok(text) => text.lines().map(read_record).collect(),
        };
        Self { path, shards }
    }

    fn write(&mut self, index: usize, record: ShardRecord) -> u64 {
        let revision = self.shards[index].1 + 1;
        self.shards[index] = (record, revision);
        let line = |(record, revision): &(ShardRecord, u64)| {
            let hex: String = record.encode().iter().map(|byte| format!("{byte:02x}")).collect();
            format!("{revision} {hex}\n")
        };
        let text: String = self.shards.iter().map(line).collect();
        let new = self.path.with_extension("new");
        fs::write(&new, text).unwrap();
        fs::rename(&new, &self.path).unwrap();
        revision
    }
}

fn read_record(line: &str) -> (ShardRecord, u64) {
    let (revision, hex) = line.split_once(' ').unwrap();
    let byte = |at: usize| u8::from_str_radix(&hex[at..at + 2], 16).unwrap();
    let bytes: Vec<u8> = (0..hex.len()).step_by(2).map(byte).collect();
    (ShardRecord::decode(&bytes).unwrap(), revision.parse().unwrap())
}

/// Returns the index of the shard in [`SHARDS`].
fn index_of(shard: ShardId) -> usize {
    SHARDS.iter().position(|slots| slots.shard() == shard).unwrap()
}

impl Pair {
    /// Starts both stores, makes one primary per shard as the coordinator would, and connects them.
    pub(crate) fn start(folder: &Path) -> Self {
        let (sender, messages) = mpsc::channel();
        let mut pair = Self {
            folder: folder.to_owned(),
            ledger: Ledger::open(&folder.join("ledger")),
            stores: Vec::new(),
            etcd: Etcd::open(folder.join("etcd")),
            started: Instant::now(),
            messages,
            sender,
            wires: VecDeque::new(),
            replies: Vec::new(),
            transfers: Vec::new(),
            installed: 0,
            dropped: 0,
        };
        for index in 0..2 {
            let store = pair.boot(index);
            pair.stores.push(store);
        }
        pair.connect();
        pair.promote();
        pair
    }

    pub(crate) fn store_folder(&self, index: usize) -> PathBuf {
        self.folder.join(format!("store-{index}"))
    }

    fn boot(&mut self, index: usize) -> Store {
        let (events, failures) = (self.sender.clone(), self.sender.clone());
        let (mut disk, opened) = Disk::open(
            settings(&self.store_folder(index)),
            move |event| drop(events.send(Message::Disk(index, event))),
            move |error| drop(failures.send(Message::Failed(index, error))),
        )
        .unwrap();
        let suspect = |replica: &&RecoveredReplica| {
            replica.content.as_ref().is_some_and(|content| content.suspect)
        };
        let suspects: Vec<_> =
            opened.replicas.iter().filter(suspect).map(|replica| replica.shard).collect();
        assert!(!opened.is_suspect(), "store {index}: {suspects:?} {:?}", opened.damage);
        let identity = next_identity(&opened, store_id(index));
        let me = StoreBoot { store: identity.store, boot: identity.boot };
        disk.write(LogRecord::Identity(identity));
        disk.sync(opened.next_group);
        loop {
            match self.messages.recv_timeout(TIMEOUT).unwrap() {
                Message::Disk(from, event) if from == index => match disk.accept(event) {
                    Event::Durable { group } if group == opened.next_group => {
                        self.ledger.durable(index, group);
                        break;
                    }
                    Event::DiskFull(_) | Event::Room { .. } => {}
                    other => panic!("{other:?} before the first group is durable"),
                },
                Message::Disk(_, event) => {
                    let event = self.stores[0].disk.accept(event);
                    assert!(matches!(event, Event::DiskFull(_) | Event::Room { .. }));
                }
                Message::Failed(_, error) => panic!("{error}"),
                Message::Staged { .. } | Message::SnapshotFailed { .. } => {
                    unreachable!("nothing is sent")
                }
            }
        }
        let settings = Settings {
            min_in_sync: 1,
            silent_after_ms: 600_000,
            read_give_up_ms: 600_000,
            flush_after_ms: 300,
            log_memory_bytes: 4 << 10,
            collect_every_ms: u64::MAX,
            ..Settings::default()
        };
        let next = opened.next_group + 1;
        let node = Node::new(settings, me, self.now(), next, opened.replicas);
        Store { me, node, disk }
    }

    fn connect(&mut self) {
        let peers: Vec<_> = self.stores.iter().map(|store| (store.me, store.me.boot.0)).collect();
        for index in 0..2 {
            self.handle(index, Event::WallClock(TimeMs(1)));
            self.handle(index, Event::PeersRegistered(peers.clone()));
            self.handle(index, Event::GatewayConnected { conn: GATEWAY });
        }
        for index in 0..2 {
            let (conn, peer) = (Conn(10 + index as u64), self.stores[1 - index].me);
            self.handle(1 - index, Event::Accepted { conn });
            self.handle(index, Event::Dialled { conn, peer });
        }
    }

    fn promote(&mut self) {
        for (index, slots) in SHARDS.into_iter().enumerate() {
            let both = vec![store_id(0), store_id(1)];
            let record = match self.etcd.shards.get(index) {
                None => {
                    self.etcd.shards.push((ShardRecord::default(), 0));
                    ShardRecord {
                        slots,
                        epoch: Epoch(1),
                        version: Version(1),
                        primary: self.stores[index].me,
                        isr: both.clone(),
                        target: both,
                        ..ShardRecord::default()
                    }
                }
                Some((record, _)) => ShardRecord {
                    epoch: Epoch(record.epoch.0 + 1),
                    version: Version(record.version.0 + 1),
                    primary: self.best(record, index),
                    ..record.clone()
                },
            };
            self.publish(index, record);
        }
    }

    /// Returns the member with the longest log, and alternates between equal ones.
    fn best(&self, record: &ShardRecord, index: usize) -> StoreBoot {
        let members = self.stores.iter().filter(|store| record.isr.contains(&store.me.store));
        let end = |store: &&Store| {
            let view = store.node.replicas().find(|view| view.shard == record.shard());
            let view = view.expect("a member has a copy");
            assert!(view.exists && !view.unfit, "a member's copy is whole: {view:?}");
            let turn = store.me.boot.0 + store.me.store.0 as u64 + index as u64;
            (view.last.epoch, view.last.seq, turn % 2)
        };
        members.max_by_key(end).expect("the set is never empty").me
    }

    /// Publishes a record like a read of etcd, so that both stores know that etcd answers.
    fn publish(&mut self, index: usize, record: ShardRecord) {
        let mod_revision = self.etcd.write(index, record.clone());
        for store in 0..2 {
            let record = record.clone();
            self.handle(store, Event::ShardRecord { record, mod_revision, read: Some(0) });
        }
    }

    // ---- what a test asks ----------------------------------------------------------------------

    pub(crate) fn record(&self, shard: usize) -> &ShardRecord {
        &self.etcd.shards[shard].0
    }

    pub(crate) fn primary(&self, shard: usize) -> usize {
        let primary = self.record(shard).primary;
        self.stores.iter().position(|store| store.me == primary).unwrap()
    }

    pub(crate) fn view(&self, store: usize, shard: usize) -> Option<ReplicaView<'_>> {
        self.stores[store].node.replicas().find(|view| view.shard == SHARDS[shard].shard())
    }

    /// Returns whether the shard's primary has committed its barrier, and applied it.
    pub(crate) fn is_active(&self, shard: usize) -> bool {
        let Some(view) = self.view(self.primary(shard), shard) else { return false };
        let open = |primary: &Primary| primary.active && view.state.applied.seq >= primary.barrier;
        view.primary.is_some_and(open)
    }

    pub(crate) fn digest_mismatches(&self) -> u64 {
        self.stores.iter().map(|store| store.node.digest_mismatches()).sum()
    }

    pub(crate) fn durability_violations(&self) -> u64 {
        self.stores.iter().map(|store| store.node.durability_violations()).sum()
    }

    /// Returns the number of the oldest segment of this store's log.
    pub(crate) fn oldest_segment(&self, store: usize) -> u64 {
        let names = fs::read_dir(self.store_folder(store).join("log")).unwrap();
        let number = |name: String| name.strip_suffix(".log")?.parse().ok();
        let numbers = names
            .filter_map(|entry| number(entry.unwrap().file_name().to_string_lossy().into_owned()));
        numbers.min().expect("a log has a segment")
    }

    pub(crate) fn ask(&mut self, shard: usize, message: GatewayMessage) {
        let primary = self.primary(shard);
        self.handle(primary, Event::Gateway { conn: GATEWAY, message });
    }

    /// Removes the other store from the shard, as a coordinator does.
    pub(crate) fn remove_follower(&mut self, shard: usize) {
        let primary = self.record(shard).primary.store;
        let record = ShardRecord {
            version: Version(self.record(shard).version.0 + 1),
            isr: vec![primary],
            learners: vec![],
            target: vec![primary],
            ..self.record(shard).clone()
        };
        self.publish(shard, record);
    }

    /// Recruits the other store as a learner, as a coordinator does.
    pub(crate) fn add_learner(&mut self, shard: usize) {
        let learner = store_id(1 - self.primary(shard));
        let record = ShardRecord {
            version: Version(self.record(shard).version.0 + 1),
            learners: vec![learner],
            target: vec![store_id(0), store_id(1)],
            ..self.record(shard).clone()
        };
        self.publish(shard, record);
    }

    /// Checks the shard's snapshot out of this store's state: every row, and the digest of all of
    /// them against the shard's record. Returns `false` if there is no record yet.
    pub(crate) fn check_rows(&mut self, store: usize, shard: usize) -> bool {
        let disk = &self.stores[store].disk;
        let reader = disk.snapshot_reader(SHARDS[shard]);
        let Some(reader) = reader.blocking_recv().unwrap() else { return false };
        let (conn, transfer) = (Conn(0), 0);
        copy(reader, &disk.staging(), conn, transfer, SHARDS[shard]).unwrap();
        disk.discard_snapshot(conn, transfer);
        true
    }

    // ---- the loop ------------------------------------------------------------------------------

    #[track_caller]
    pub(crate) fn until(&mut self, what: &str, mut done: impl FnMut(&Self) -> bool) {
        let began = Instant::now();
        while !done(self) {
            assert!(began.elapsed() < TIMEOUT, "waited for {what}, got {:?}", self.replies);
            self.turn();
        }
    }

    /// Handles all pending events, or waits a moment for one.
    pub(crate) fn turn(&mut self) {
        while let Some((store, event)) = self.wires.pop_front() {
            self.handle(store, event);
        }
        let mut next = self.messages.recv_timeout(Duration::from_micros(200)).ok();
        while let Some(message) = next {
            self.on_message(message);
            next = self.messages.try_recv().ok();
        }
        for store in 0..2 {
            if self.stores[store].node.next_deadline().is_some_and(|at| at <= self.now()) {
                let wall = TimeMs(self.now().0 / 1_000);
                self.handle(store, Event::WallClock(wall));
            }
        }
    }

    fn now(&self) -> Now {
        Now(self.started.elapsed().as_micros() as u64 * FASTER)
    }

    fn on_message(&mut self, message: Message) {
        match message {
            Message::Disk(store, event) => {
                let event = self.stores[store].disk.accept(event);
                match &event {
                    // The ledger notes it first: the effects of the event may reach others.
                    Event::Durable { group } => self.ledger.durable(store, *group),
                    Event::SnapshotInstalled { .. } => self.installed += 1,
                    Event::RowsDropped { .. } => self.dropped += 1,
                    _ => {}
                }
                self.handle(store, event);
            }
            Message::Failed(store, error) => panic!("the disk of store {store} failed: {error}"),
            Message::Staged { store, conn, transfer, state } => {
                self.handle(store, Event::SnapshotStaged { conn, transfer, state });
            }
            Message::SnapshotFailed { store, transfer } => {
                self.handle(store, Event::SnapshotFailed { transfer });
            }
        }
    }

    fn handle(&mut self, store: usize, event: Event) {
        let mut effects = Vec::new();
        let now = self.now();
        for event in [event, Event::TurnEnded] {
            self.stores[store].node.handle(now, event, &mut effects);
            self.stores[store].node.check_invariants();
        }
        for effect in effects {
            self.perform(store, effect);
        }
    }

    fn perform(&mut self, store: usize, effect: Effect) {
        let disk = &mut self.stores[store].disk;
        match effect {
            Effect::Write(record) => disk.write(record),
            Effect::Sync { group } => disk.sync(group),
            Effect::Load { load, needs } => disk.load(load, needs),
            Effect::CountRows { count, slots, at } => disk.count_rows(count, slots, at),
            Effect::ReadLog { wanted, from, bytes_max } => disk.read_log(wanted, from, bytes_max),
            Effect::Flush { flush, table, shards } => disk.flush(flush, table, shards),
            Effect::Trim { shards } => disk.trim(shards),
            Effect::DropRows { shard, slots } => disk.drop_rows(shard, slots),
            Effect::Scrub { scrub, shards, bytes_per_s } => disk.scrub(scrub, shards, bytes_per_s),
            Effect::Audit(_) => {}
            Effect::InstallSnapshot { conn, transfer, copy, replaces, state } => {
                disk.install_snapshot((conn, transfer), copy, replaces, state);
            }
            Effect::DiscardSnapshot { conn, transfer } => disk.discard_snapshot(conn, transfer),
            Effect::MeasureSnapshot { transfer, slots } => {
                disk.measure(transfer, slots);
            }
            Effect::SendSnapshot { conn, transfer, slots, .. } => {
                self.transfer(store, conn, transfer, slots);
            }

            Effect::ToFollower { conn, message } => {
                self.wires.push_back((1 - store, Event::FromPrimary { conn, message }));
            }
            Effect::ToPrimary { conn, message } => {
                self.wires.push_back((1 - store, Event::FromFollower { conn, message }));
            }
            Effect::Gateway { reply, .. } => self.replies.push(reply),
            Effect::Close { conn } => panic!("store {store} closes {conn:?}"),
            Effect::Report(_) | Effect::QueryReply { .. } => {}

            Effect::ReadRecord { read, shard } => {
                let (record, mod_revision) = self.etcd.shards[index_of(shard)].clone();
                let event = Event::ShardRecord { record, mod_revision, read: Some(read) };
                self.wires.push_back((store, event));
            }
            Effect::Propose { proposal, expect, record, .. } => {
                self.propose(store, proposal, expect, record);
            }
            Effect::ProposeSplit { .. } => panic!("store {store} splits a shard"),
            Effect::CheckEtcd { check, shards } => {
                let record = |shard: ShardId| self.etcd.shards[index_of(shard)].0.clone();
                let records = Some(shards.into_iter().map(record).collect());
                self.wires.push_back((store, Event::EtcdChecked { check, records }));
            }
            Effect::ListSessions | Effect::Left => unreachable!("not within a test"),
            Effect::Exit(reason) => panic!("store {store} exits: {reason:?}"),
        }
    }

    fn propose(&mut self, store: usize, proposal: u64, expect: u64, record: ShardRecord) {
        let index = index_of(record.shard());
        let outcome = match self.etcd.shards[index].1 == expect {
            true => CasOutcome::Done { mod_revision: self.etcd.write(index, record.clone()) },
            false => CasOutcome::Failed,
        };
        if let CasOutcome::Done { mod_revision } = outcome {
            let event = Event::ShardRecord { record, mod_revision, read: None };
            self.wires.push_back((1 - store, event));
        }
        self.wires.push_back((store, Event::Proposed { proposal, outcome }));
    }

    /// Carries a snapshot from one disk to the other, as its own stream would.
    fn transfer(&mut self, store: usize, conn: Conn, transfer: u64, slots: Slots) {
        let reader = self.stores[store].disk.snapshot_reader(slots);
        let staging = self.stores[1 - store].disk.staging();
        let sender = self.sender.clone();
        self.transfers.push(thread::spawn(move || {
            let copied = match reader.blocking_recv() {
                Ok(Some(reader)) => copy(reader, &staging, conn, transfer, slots).ok(),
                _ => None,
            };
            let message = match copied {
                Some(state) => Message::Staged { store: 1 - store, conn, transfer, state },
                None => Message::SnapshotFailed { store, transfer },
            };
            drop(sender.send(message));
        }));
    }
}

impl Drop for Pair {
    /// All threads end, so that the folder is free for the next start.
    fn drop(&mut self) {
        for transfer in self.transfers.drain(..) {
            let _ = transfer.join();
        }
    }
}

/// Reads a snapshot and stages it, through the same messages that cross the wire.
fn copy(
    reader: SnapshotReader,
    staging: &Staging,
    conn: Conn,
    transfer: u64,
    slots: Slots,
) -> Result<Box<ShardState>, NotStaged> {
    let mut rows = proto::SnapshotDecoder::default();
    let boot = StoreBoot { store: store_id(0), boot: Boot(1) };
    let header = wire::SnapshotHeader {
        open: Some(wire::Open::new(CLUSTER, 1)),
        from: Some(boot.into()),
        to: Some(boot.into()),
        transfer,
        slots: Some(slots.into()),
        shard_record: reader.shard_record(),
    };
    let kind = wire::snapshot_part::Kind::Header(header);
    rows.take(wire::SnapshotPart { kind: Some(kind) }).unwrap();
    let mut stager = staging.begin(conn, transfer, slots, &reader.shard_record())?;
    let mut result = Ok(());
    let sent = reader.send(|part| {
        match rows.take(part).unwrap() {
            proto::SnapshotEvent::Rows(rows) => result = stager.rows(&rows),
            proto::SnapshotEvent::End => {}
            proto::SnapshotEvent::Header { .. } => unreachable!("there is one"),
        }
        result.is_ok()
    });
    result?;
    assert_eq!(sent, SnapshotReadEnd::Whole);
    stager.finish()
}
