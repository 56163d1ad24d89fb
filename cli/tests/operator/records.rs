//! Commands that ask etcd itself and write there: on a cluster that is made of records, none of whose processes runs.

use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use engine::config::ShardConfig;
use engine::ids::{Boot, Epoch, ShardId, Slots, StoreBoot, StoreId, Version};
use engine::records::{Meta, NodeRecord, PromoteIntent, StoreRecord, StoreStatus};
use engine::store::log::group::{Owner, SegmentHeader};
use metastore::{Candidate, DrainIntent, Metastore, Outcome, Record, Settings};
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
    /// Not through the relay.
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

    /// One node, registered; one shard, which it is to lead; a coordinator that does nothing.
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
                idempotency: engine::idempotency::Settings::default(),
            },
        );
        records.add_store(NODE_1, "node-1");
        let address = "127.0.0.1:1".to_owned();
        let key = NodeRecord { boot: Boot(1), address, capacity: 1, versions: (1, 1) };
        records.create(&NODE_1, &key);
        records.create(&SHARD, &shard(1));
        records.create(&(), &Candidate { address: "127.0.0.1:1".to_owned() });
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
    fn create<R: Record>(&self, id: &R::Id, record: &R) {
        let made = self.runtime.block_on(self.store.create(id, record));
        assert!(matches!(made, Ok(Outcome::Done { .. })), "{made:?}");
    }

    fn get<R: Record>(&self, id: &R::Id) -> Option<R> {
        let kept = self.runtime.block_on(self.store.get::<R>(id)).unwrap();
        kept.map(|kept| kept.record)
    }

    fn delete<R: Record>(&self, id: &R::Id) {
        let kept = self.runtime.block_on(self.store.get::<R>(id)).unwrap().unwrap();
        let gone = self.runtime.block_on(self.store.delete::<R>(id, kept.modified));
        assert!(matches!(gone, Ok(Outcome::Done { .. })), "{gone:?}");
    }

    fn start(&self, args: &[&str]) -> Child {
        let mut command = Command::new(env!("CARGO_BIN_EXE_dkc"));
        command.args(args).args(["--etcd", &self.calls.endpoint(), "--cluster", "test"]);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().unwrap()
    }

    #[track_caller]
    fn check(&self, args: &[&str], want_code: i32, want_said: &str) {
        ends(self.start(args), want_code, want_said);
    }

    /// What becomes of the next transactions of the process under test.
    fn txns(&self, fates: &[Fate]) {
        fates.iter().for_each(|&fate| self.calls.next("Txn", fate));
    }

    /// No request stands that anybody could obey.
    #[track_caller]
    fn nothing_is_asked_for(&self) {
        let intent = self.get::<PromoteIntent>(&SHARD);
        let current = |intent: &PromoteIntent| intent.version == Version(1);
        assert!(!intent.as_ref().is_some_and(current), "{intent:?}");
    }
}

#[track_caller]
fn ends(child: Child, want_code: i32, want_said: &str) {
    let Output { status, stdout, stderr } = child.wait_with_output().unwrap();
    let said = String::from_utf8([stderr, stdout].concat()).unwrap();
    assert_eq!(status.code(), Some(want_code), "{said}");
    assert!(said.contains(want_said), "{want_said:?} is not in {said}");
}

fn shard(version: u64) -> ShardConfig {
    ShardConfig {
        slots: Slots::ALL,
        epoch: Epoch(1),
        version: Version(version),
        primary: StoreBoot { store: NODE_1, boot: Boot(1) },
        isr: vec![NODE_1],
        target: vec![NODE_1],
        ..ShardConfig::default()
    }
}

const PROMOTE: [&str; 6] = ["shards", "promote", "0", "node-1", "--accept-loss", "--yes"];

/// A word that means no node, or more than one, is never guessed at.
#[test]
fn words_that_mean_nothing_here_are_refused() {
    let records = Records::none();
    records.check(&["drain", "node-1"], 2, "no node \"node-1\"");
    records.check(&["scrub", "--all"], 1, "no cluster \"test\"");
    records.check(&PROMOTE, 1, "no cluster \"test\"");

    let records = Records::of_one_shard();
    records.check(&["drain", "node-9"], 2, "there are: node-1");
    records.check(&["scrub", "node-9"], 2, "node-9 does not run");
    let promote = |shard, node| ["shards", "promote", shard, node, "--accept-loss", "--yes"];
    records.check(&promote("7", "node-1"), 2, "no shard 7");
    records.check(&promote("0", "node-9"), 2, "no node \"node-9\" runs");
    records.check(&PROMOTE[..5], 2, "add --yes");
    records.add_store(StoreId(2), "node-1");
    records.check(&["drain", "node-1"], 2, "more than one store");
    assert_eq!(records.get::<DrainIntent>(&NODE_1), None);
    records.nothing_is_asked_for();
}

/// It is in etcd, and answers nobody: its disk was not read.
#[test]
fn a_scrub_of_a_node_that_does_not_answer_fails() {
    Records::of_one_shard().check(&["scrub", "--all"], 1, "node-1: ");
}

#[test]
fn a_drain_whose_answer_was_lost_is_not_claimed() {
    let records = Records::of_one_shard();
    let (drain, undo) = (["drain", "node-1", "--no-wait"], ["drain", "node-1", "--undo"]);
    records.txns(&[Fate::LoseCall]);
    records.check(&drain, 1, "say it again");
    records.check(&undo, 0, "drains no more");
    records.check(&drain, 0, "drains");
    records.txns(&[Fate::LoseCall]);
    records.check(&undo, 1, "say it again");
    assert_eq!(records.get::<DrainIntent>(&NODE_1), Some(DrainIntent));
}

/// However the waiting ends, the request is withdrawn: obeyed tomorrow, it would give up what has come back by then.
#[test]
fn a_request_to_lead_with_a_loss_does_not_stay_behind() {
    use Fate::{LoseAnswer, LoseCall, Pass, Refuse};
    // First a place for the request is made, then the request takes it.
    for (fates, why) in [
        (&[LoseAnswer][..], "or etcd's answer was lost. Nothing was given up"),
        (&[Pass, LoseAnswer], "answer to the request was lost; the request is withdrawn"),
        (&[Pass, LoseCall], "answer to the request was lost; the request is withdrawn"),
        (&[Pass, Refuse], "etcd refused"),
    ] {
        let records = Records::of_one_shard();
        records.txns(fates);
        records.check(&PROMOTE, 1, why);
        records.nothing_is_asked_for();
    }
    let records = Records::of_one_shard();
    records.check(&[&PROMOTE[..], &["--wait", "1"]].concat(), 1, "did not do it in time");
    records.nothing_is_asked_for();
    records.delete::<Candidate>(&());
    records.check(&PROMOTE, 1, "no coordinator leads");
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
    let kept = records.runtime.block_on(records.store.get::<ShardConfig>(&SHARD)).unwrap().unwrap();
    let newer = shard(2);
    let changed = records.store.replace(&SHARD, &newer, kept.modified);
    assert!(matches!(records.runtime.block_on(changed), Ok(Outcome::Done { .. })));
    ends(overtaken, 1, "changed meanwhile");
    records.nothing_is_asked_for();
}

/// Then it may be obeyed yet, and nobody is told otherwise.
#[test]
fn a_request_that_can_not_be_withdrawn_is_unknown() {
    let records = Records::of_one_shard();
    records.txns(&[Fate::Pass, Fate::Pass]);
    records.txns(&[Fate::LoseCall; 200]);
    let line = [&PROMOTE[..], &["--wait", "1"]].concat();
    records.check(&line, 3, "did not confirm that the request is withdrawn");
    let intent = records.get::<PromoteIntent>(&SHARD).expect("it stands");
    assert_eq!(intent.version, Version(1));
}

impl Records {
    /// A process whose request stands.
    fn asking(&self) -> Child {
        let child = self.start(&PROMOTE);
        let began = Instant::now();
        let asked = |intent: PromoteIntent| intent.version == Version(1);
        while !self.get::<PromoteIntent>(&SHARD).is_some_and(asked) {
            assert!(began.elapsed() < Duration::from_secs(20), "it asks for nothing");
        }
        child
    }
}

/// What a start would be refused for, before it is tried.
#[test]
fn what_etcd_says_against_a_start_is_told_before() {
    let records = Records::of_one_shard();
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().to_str().unwrap();
    let node = ["storage-node", "--check-config", "--name", "n", "--listen", "127.0.0.1:0"];
    let line = [&node[..], &["--data", data]].concat();
    records.check(&line, 0, "answers");
    records.calls.next("Status", Fate::SayVersion("3.4.27"));
    records.check(&line, 2, "3.4.27 is too old");
    records.calls.next("Status", Fate::SayVersion("3.5.2"));
    records.check(&line, 0, "warning: --etcd");
    let owner = Owner { cluster: CLUSTER + 1, store: StoreId(7) };
    let header = SegmentHeader { owner, segment: 1, first_group: 1 };
    std::fs::create_dir(folder.path().join("log")).unwrap();
    std::fs::write(folder.path().join("log/1.log"), header.encode()).unwrap();
    records.check(&line, 2, "holds data of another cluster");
}
