//! Commands that read and write etcd directly, on a cluster that consists of records only, without
//! running processes.

use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use engine::ids::{Boot, Epoch, ShardId, Slots, StoreBoot, StoreId, Version};
use engine::records::{
    Meta, NodeRecord, PauseIntent, PromoteIntent, RemoveIntent, StoreRecord, StoreStatus,
};
use engine::shard_record::ShardRecord;
use engine::store::log::group::{Owner, SegmentHeader};
use metastore::{CasOutcome, CoordinatorRecord, DrainIntent, EtcdRecord, Metastore, Settings};
use rustix::process::{Pid, Signal, kill_process};
use tokio::runtime::Runtime;

use crate::calls::{Calls, Fate};
use crate::etcd::Etcd;

const CLUSTER: u128 = 0xc0ffee;
const NODE_1: StoreId = StoreId(1);
const SHARD: ShardId = ShardId(0);

struct Records {
    runtime: Runtime,
    _etcd: Etcd,
    calls: Calls,
    /// A connection that bypasses the relay.
    store: Metastore,
}

impl Records {
    fn none() -> Self {
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        let runtime = builder.worker_threads(1).enable_all().build().unwrap();
        let etcd = runtime.block_on(Etcd::start());
        let calls = runtime.block_on(Calls::start(etcd.endpoint()));
        let settings = Settings::new(vec![etcd.endpoint()], "test");
        let store = runtime.block_on(Metastore::connect(&settings)).unwrap();
        Self { runtime, _etcd: etcd, calls, store }
    }

    /// The records of one node, one shard that the node is to lead, and a coordinator that does
    /// nothing.
    fn of_one_shard() -> Self {
        let records = Self::none();
        records.create(
            &(),
            &Meta {
                cluster: CLUSTER,
                shards: 1,
                replicas: 1,
                min_in_sync: 1,
                hash: 1,
                incarnation: 1,
                idempotency: engine::shard::idempotency::TokenSettings::default(),
            },
        );
        records.add_store(NODE_1, "node-1");
        let address = "127.0.0.1:1".to_owned();
        let key = NodeRecord { boot: Boot(1), address, capacity: 1, versions: (1, 1) };
        records.create(&NODE_1, &key);
        records.create(&SHARD, &shard(1));
        records.create(&(), &CoordinatorRecord { address: "127.0.0.1:1".to_owned() });
        records
    }

    fn add_store(&self, id: StoreId, name: &str) {
        let record = StoreRecord {
            name: name.to_owned(),
            address: "127.0.0.1:1".to_owned(),
            zone: String::new(),
            host: String::new(),
            boot: Boot(1),
            nonce: 1,
            status: StoreStatus::Active,
        };
        self.create(&id, &record);
    }

    #[track_caller]
    fn create<R: EtcdRecord>(&self, id: &R::Id, record: &R) {
        let made = self.runtime.block_on(self.store.create(id, record));
        assert!(matches!(made, Ok(CasOutcome::Done { .. })), "{made:?}");
    }

    fn get<R: EtcdRecord>(&self, id: &R::Id) -> Option<R> {
        let kept = self.runtime.block_on(self.store.get::<R>(id)).unwrap();
        kept.map(|kept| kept.record)
    }

    fn delete<R: EtcdRecord>(&self, id: &R::Id) {
        let kept = self.runtime.block_on(self.store.get::<R>(id)).unwrap().unwrap();
        let gone = self.runtime.block_on(self.store.delete::<R>(id, kept.modified));
        assert!(matches!(gone, Ok(CasOutcome::Done { .. })), "{gone:?}");
    }

    fn start(&self, args: &[&str]) -> Child {
        let mut command = Command::new(env!("CARGO_BIN_EXE_dkc"));
        command.args(args).args(["--etcd", &self.calls.endpoint(), "--cluster", "test"]);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().unwrap()
    }

    #[track_caller]
    fn check(&self, args: &[&str], want_code: i32, want: &str) {
        ends(self.start(args), want_code, want);
    }

    /// Sets the fates of the next transactions of the process under test.
    fn txns(&self, fates: &[Fate]) {
        fates.iter().for_each(|&fate| self.calls.next("Txn", fate));
    }

    /// Checks that there is no request that a coordinator could carry out.
    #[track_caller]
    fn nothing_is_asked_for(&self) {
        let intent = self.get::<PromoteIntent>(&SHARD);
        let current = |intent: &PromoteIntent| intent.version == Version(1);
        assert!(!intent.as_ref().is_some_and(current), "{intent:?}");
    }
}

#[track_caller]
fn ends(child: Child, want_code: i32, want: &str) {
    let Output { status, stdout, stderr } = child.wait_with_output().unwrap();
    let printed = String::from_utf8([stderr, stdout].concat()).unwrap();
    assert_eq!(status.code(), Some(want_code), "{printed}");
    assert!(printed.contains(want), "{want:?} is not in {printed}");
}

fn shard(version: u64) -> ShardRecord {
    ShardRecord {
        slots: Slots::ALL,
        epoch: Epoch(1),
        version: Version(version),
        primary: StoreBoot { store: NODE_1, boot: Boot(1) },
        isr: vec![NODE_1],
        target: vec![NODE_1],
        ..ShardRecord::default()
    }
}

const PROMOTE: [&str; 6] = ["shards", "promote", "0", "node-1", "--accept-loss", "--yes"];

/// A name that denotes no node, or more than one, is an error.
#[test]
fn unknown_and_ambiguous_names_are_rejected() {
    let records = Records::none();
    records.check(&["node", "drain", "node-1"], 2, "no node \"node-1\"");
    records.check(&["scrub", "--all"], 1, "no cluster \"test\"");
    records.check(&PROMOTE, 1, "no cluster \"test\"");

    let records = Records::of_one_shard();
    records.check(&["node", "drain", "node-9"], 2, "known nodes: node-1");
    records.check(&["scrub", "node-9"], 2, "not running: node-9");
    let promote = |shard, node| ["shards", "promote", shard, node, "--accept-loss", "--yes"];
    records.check(&promote("7", "node-1"), 2, "no shard 7");
    records.check(&promote("0", "node-9"), 2, "node \"node-9\" is not running");
    records.check(&PROMOTE[..5], 2, "add --yes");
    records.add_store(StoreId(2), "node-1");
    records.check(&["node", "drain", "node-1"], 2, "denotes several stores");
    assert_eq!(records.get::<DrainIntent>(&NODE_1), None);
    records.nothing_is_asked_for();
}

/// The node is in etcd but does not answer: its disk was not read.
#[test]
fn a_scrub_of_a_node_that_does_not_answer_fails() {
    Records::of_one_shard().check(&["scrub", "--all"], 1, "node-1: ");
}

/// A drain that could never end is refused before anything is written. One that has begun goes on.
#[test]
fn a_drain_without_a_node_for_the_copies_is_refused() {
    let records = Records::of_one_shard();
    let drain = ["node", "drain", "node-1", "--detach"];
    records.check(&drain, 1, "can hold copies is 0");
    assert_eq!(records.get::<DrainIntent>(&NODE_1), None);
    records.check(&[&drain[..], &["--wait"]].concat(), 0, "is draining");
    records.check(&drain, 0, "is draining");
    records.check(&["node", "undrain", "node-1"], 0, "no longer draining");
    // A node that does not run can't take the copies either.
    records.add_store(StoreId(2), "node-2");
    records.check(&drain, 1, "can hold copies is 0");
    records.check(&["node", "drain", "node-2", "--detach"], 0, "node-2 is empty");
}

/// No coordinator carries the drain out here, so nothing moves.
#[test]
fn a_drain_that_does_not_move_ends_as_stalled_and_stays() {
    let records = Records::of_one_shard();
    records.check(&["node", "drain", "node-1", "--wait", "--detach"], 0, "is draining");
    let drain = ["node", "drain", "node-1", "--stalled-after", "1"];
    records.check(&drain, 3, "node-1: the drain has stalled");
    assert_eq!(records.get::<DrainIntent>(&NODE_1), Some(DrainIntent));
}

#[test]
fn a_drain_whose_answer_was_lost_is_not_claimed() {
    let records = Records::of_one_shard();
    let drain = ["node", "drain", "node-1", "--wait", "--detach"];
    let undo = ["node", "undrain", "node-1"];
    records.txns(&[Fate::LoseCall]);
    records.check(&drain, 3, "run the command again");
    records.check(&undo, 0, "no longer draining");
    records.check(&drain, 0, "is draining");
    records.txns(&[Fate::LoseCall]);
    records.check(&undo, 3, "run the command again");
    assert_eq!(records.get::<DrainIntent>(&NODE_1), Some(DrainIntent));
}

#[test]
fn nodes_are_listed_with_what_they_hold() {
    let records = Records::of_one_shard();
    records.add_store(StoreId(2), "node-2");
    records.check(
        &["node", "list"],
        0,
        "node-1  up     -     -         1       1        1      0\n",
    );
    records.check(
        &["node", "list"],
        0,
        "node-2  away   -     -         0       0        0      0\n",
    );
    let json =
        "\"state\":\"up\",\"running\":true,\"leads\":1,\"copies\":1,\"in_sync\":1,\"peers\":0}";
    records.check(&["node", "list", "--json"], 0, json);
}

#[test]
fn moves_for_balance_are_paused_and_resumed() {
    let records = Records::none();
    records.check(&["rebalance", "--pause"], 1, "no cluster \"test\"");
    let records = Records::of_one_shard();
    let go_on = "moves for balance go on";
    records.check(&["rebalance"], 0, go_on);
    records.check(&["rebalance", "--pause"], 0, "are paused by ");
    records.check(&["rebalance", "--pause"], 0, "are paused by ");
    records.check(&["rebalance", "--json"], 0, "{\"paused\":true,\"by\":\"");
    assert!(records.get::<PauseIntent>(&()).is_some());
    records.txns(&[Fate::LoseCall]);
    records.check(&["rebalance", "--resume"], 3, "run the command again");
    records.check(&["rebalance", "--resume"], 0, go_on);
    records.check(&["rebalance", "--resume"], 0, go_on);
    assert_eq!(records.get::<PauseIntent>(&()), None);
}

/// A node that may not leave is refused before anything is asked for. Here no coordinator carries
/// out the removal of the one that may, so the request is withdrawn.
#[test]
fn a_node_is_removed_only_once_it_is_empty_and_stopped() {
    let records = Records::of_one_shard();
    records.add_store(StoreId(2), "node-2");
    let remove = |node, more: &[&'static str]| [&["node", "remove", node][..], more].concat();
    records.check(&remove("node-9", &[]), 2, "known nodes: node-1 node-2");
    records.check(&remove("node-1", &[]), 1, "node-1 cannot be removed: its process runs");
    records.delete::<NodeRecord>(&NODE_1);
    records.check(&remove("node-1", &[]), 1, "1 shards have copies there");
    assert_eq!(records.get::<RemoveIntent>(&NODE_1), None);
    let waits = ["--wait", "1"];
    records.check(&remove("node-2", &waits), 1, "the request is withdrawn");
    assert_eq!(records.get::<RemoveIntent>(&StoreId(2)), None);
    records.txns(&[Fate::LoseCall]);
    records.check(&remove("node-2", &waits), 3, "the outcome is unknown");

    let child = records.start(&remove("node-2", &["--json"]));
    records.retire(StoreId(2));
    ends(child, 0, "\"state\":\"retired\"}");
    records.check(&["node", "list"], 0, "node-1  away");
    records.check(&["node", "list", "--all"], 0, "node-2  retired");
    records.delete::<CoordinatorRecord>(&());
    records.add_store(StoreId(3), "node-3");
    records.check(&remove("node-3", &[]), 1, "no coordinator is leader");
}

impl Records {
    /// Acts as the coordinator, once there is an intent to remove this store.
    fn retire(&self, id: StoreId) {
        let began = Instant::now();
        while self.get::<RemoveIntent>(&id).is_none() {
            assert!(began.elapsed() < Duration::from_secs(20), "there is no request");
        }
        let intent = self.runtime.block_on(self.store.get::<RemoveIntent>(&id)).unwrap().unwrap();
        assert_ne!(intent.lease, 0, "it would outlast a command that is killed");
        let kept = self.runtime.block_on(self.store.get::<StoreRecord>(&id)).unwrap().unwrap();
        let record = StoreRecord { status: StoreStatus::Retired, ..kept.record };
        let changed = self.runtime.block_on(self.store.replace(&id, &record, kept.modified));
        assert!(matches!(changed, Ok(CasOutcome::Done { .. })), "{changed:?}");
    }
}

/// The coordinator of these records does not listen.
#[test]
fn events_need_a_coordinator() {
    let records = Records::of_one_shard();
    records.check(&["events"], 1, "coordinator 127.0.0.1:1");
    records.check(&["events", "--since", "10"], 2, "30s, 10m, 2h or 1d");
    records.delete::<CoordinatorRecord>(&());
    records.check(&["events"], 1, "no coordinator is leader");
    records.check(&["events", "--coordinators", "127.0.0.1:2"], 1, "coordinator 127.0.0.1:2");
}

/// However the wait ends, the request is withdrawn: carried out a day later, it would discard
/// copies that have returned by then.
#[test]
fn a_request_to_lead_with_a_loss_does_not_stay_behind() {
    use Fate::{LoseAnswer, LoseCall, Pass, Refuse};
    // The first transaction creates a key for the request, the second one writes the request.
    for (fates, why) in [
        (&[LoseAnswer][..], "or the answer of etcd was lost. Nothing was changed"),
        (
            &[Pass, LoseAnswer],
            "the answer of etcd to the request was lost; the request is withdrawn",
        ),
        (&[Pass, LoseCall], "the answer of etcd to the request was lost; the request is withdrawn"),
        (&[Pass, Refuse], "etcd refused"),
    ] {
        let records = Records::of_one_shard();
        records.txns(fates);
        records.check(&PROMOTE, 1, why);
        records.nothing_is_asked_for();
    }
    let records = Records::of_one_shard();
    records.check(&[&PROMOTE[..], &["--wait", "1"]].concat(), 1, "did not carry it out in time");
    records.nothing_is_asked_for();
    records.delete::<CoordinatorRecord>(&());
    records.check(&PROMOTE, 1, "no coordinator is leader");
}

#[test]
fn a_request_that_is_interrupted_or_overtaken_is_withdrawn() {
    let records = Records::of_one_shard();
    let interrupted = records.asking();
    let pid = Pid::from_raw(i32::try_from(interrupted.id()).unwrap()).unwrap();
    kill_process(pid, Signal::TERM).unwrap();
    ends(interrupted, 1, "interrupted; the request is withdrawn");
    records.nothing_is_asked_for();

    let overtaken = records.asking();
    let kept = records.runtime.block_on(records.store.get::<ShardRecord>(&SHARD)).unwrap().unwrap();
    let newer = shard(2);
    let changed = records.store.replace(&SHARD, &newer, kept.modified);
    assert!(matches!(records.runtime.block_on(changed), Ok(CasOutcome::Done { .. })));
    ends(overtaken, 1, "changed concurrently");
    records.nothing_is_asked_for();
}

/// Such a request may still be carried out, and is reported as unknown.
#[test]
fn a_request_that_can_not_be_withdrawn_is_unknown() {
    let records = Records::of_one_shard();
    records.txns(&[Fate::Pass, Fate::Pass]);
    records.txns(&[Fate::LoseCall; 200]);
    let line = [&PROMOTE[..], &["--wait", "1"]].concat();
    records.check(&line, 3, "did not confirm that the request is withdrawn");
    let intent = records.get::<PromoteIntent>(&SHARD).expect("the intent");
    assert_eq!(intent.version, Version(1));
}

impl Records {
    /// Starts a process and waits until its request is in etcd.
    fn asking(&self) -> Child {
        let child = self.start(&PROMOTE);
        let began = Instant::now();
        let asked = |intent: PromoteIntent| intent.version == Version(1);
        while !self.get::<PromoteIntent>(&SHARD).is_some_and(asked) {
            assert!(began.elapsed() < Duration::from_secs(20), "there is no request");
        }
        child
    }
}

/// Errors that would prevent a start are found before it.
#[test]
fn errors_of_etcd_are_found_before_a_start() {
    let records = Records::of_one_shard();
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().to_str().unwrap();
    let node = ["storage-node", "--check-config", "--name", "n", "--listen", "127.0.0.1:0"];
    let line = [&node[..], &["--data", data]].concat();
    records.check(&line, 0, "answers");
    records.calls.next("Status", Fate::ReplyVersion("3.4.27"));
    records.check(&line, 2, "3.4.27 is too old");
    records.calls.next("Status", Fate::ReplyVersion("3.5.2"));
    records.check(&line, 0, "warning: --etcd");
    let owner = Owner { cluster: CLUSTER + 1, store: StoreId(7) };
    let header = SegmentHeader { owner, segment: 1, first_group: 1 };
    std::fs::create_dir(folder.path().join("log")).unwrap();
    std::fs::write(folder.path().join("log/1.log"), header.encode()).unwrap();
    records.check(&line, 2, "holds data of another cluster");
}
