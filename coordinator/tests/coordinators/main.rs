//! Coordinators against a real etcd and fake nodes that only reply: placement, promotion, takeover,
//! start without etcd.

#[path = "../../../metastore/tests/contract/calls.rs"]
mod calls;
#[path = "../../../metastore/tests/contract/etcd.rs"]
mod etcd;
#[path = "../../../telemetry/src/exposition.rs"]
mod exposition;
mod node;
mod process;

use std::collections::BTreeMap;
use std::future::Future;
use std::time::{Duration, Instant};

use engine::ids::{Boot, Epoch, ShardId, StoreBoot, StoreId, TimeMs, Version};
use engine::records::{
    Meta, NodeRecord, Operator, PauseIntent, RemoveIntent, StoreRecord, StoreStatus,
};
use engine::shard_record::ShardRecord;
use metastore::{CasOutcome, CoordinatorRecord, DrainIntent, Metastore, Settings};

use self::process::{Process, flags, flags_with_ttl};
use calls::{Calls, Fate};
use coordinator::Options;
use etcd::{Etcd, Relay};
use node::Node;
use proto::wire;
use proto::wire::operator_client::OperatorClient;

const CLUSTER: &str = "test";
/// The time to live of the nodes' leases; that of a coordinator is 1 s.
const TTL_S: u32 = 2;
const TTL: Duration = Duration::from_secs(TTL_S as u64);
/// The time that a busy machine, which builds and tests meanwhile, may add to a promised time.
const BUSY: Duration = Duration::from_secs(2);

/// Waits, but fails instead of hanging.
#[track_caller]
fn within<T>(seconds: u64, what: impl Future<Output = T>) -> impl Future<Output = T> {
    let caller = std::panic::Location::caller();
    async move {
        let waited = tokio::time::timeout(Duration::from_secs(seconds), what).await;
        waited.unwrap_or_else(|_| panic!("{caller}: nothing for {seconds} s"))
    }
}

struct Cluster {
    etcd: Etcd,
    store: Metastore,
    nodes: BTreeMap<u128, Node>,
    coordinator: Process,
}

impl Cluster {
    /// Three nodes, twelve shards, one coordinator, everything placed.
    async fn placed() -> Self {
        Self::placed_on_leases_of(TTL_S).await
    }

    async fn placed_on_leases_of(ttl_s: u32) -> Self {
        let etcd = Etcd::start().await;
        let options = flags(&etcd.endpoint(), 1);
        Self::placed_by(etcd, options, ttl_s).await
    }

    async fn placed_by(etcd: Etcd, options: Options, ttl_s: u32) -> Self {
        let settings = Settings::new(vec![etcd.endpoint()], CLUSTER);
        let store = Metastore::connect(&settings).await.expect("etcd answers");
        let coordinator = Process::start(options);
        let mut cluster = Self { etcd, store, nodes: BTreeMap::new(), coordinator };
        for number in 1..=3 {
            let node = Node::start(cluster.etcd.endpoint(), number, ttl_s).await;
            cluster.nodes.insert(number, node);
        }
        cluster.shards_are(|shards| shards.len() == 12).await;
        cluster.coordinator.readyz_is((200, "ok")).await;
        cluster
    }

    /// Like [`placed`](Self::placed), but the coordinator, whose lease has a time to live of
    /// `lease_ttl` seconds, reaches etcd through a relay.
    async fn placed_behind_a_relay(lease_ttl: u32) -> (Self, Relay) {
        let etcd = Etcd::start().await;
        let relay = Relay::start(etcd.endpoint()).await;
        let options = flags_with_ttl(&relay.endpoint(), 1, lease_ttl);
        let cluster = Self::placed_by(etcd, options, 60).await;
        (cluster, relay)
    }

    async fn add(&mut self, number: u128) {
        let node = Node::start(self.etcd.endpoint(), number, TTL_S).await;
        self.nodes.insert(number, node);
    }

    async fn shards(&self) -> Vec<ShardRecord> {
        let listed = self.store.list::<ShardRecord>().await.expect("a list");
        let mut shards: Vec<_> = listed.all.into_iter().map(|stored| stored.record).collect();
        shards.sort_by_key(|record| record.slots.lo);
        shards
    }

    /// Waits until the records are like this.
    async fn shards_are(&self, like: impl Fn(&[ShardRecord]) -> bool) -> Vec<ShardRecord> {
        let began = Instant::now();
        loop {
            let shards = self.shards().await;
            if like(&shards) {
                return shards;
            }
            assert!(began.elapsed() < Duration::from_secs(15), "they are {shards:#?}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Writes records as the primaries do once all members have caught up. A record that the
    /// coordinator changes at the same time, such as by adding a learner, is read again.
    async fn put_all_in_sync(&self) {
        let all: Vec<_> = self.nodes.keys().copied().map(StoreId).collect();
        let written = async {
            let mut last = false;
            while !last {
                last = true;
                for stored in self.store.list::<ShardRecord>().await.expect("a list").all {
                    if stored.record.isr == all && stored.record.learners.is_empty() {
                        continue;
                    }
                    let version = Version(stored.record.version.0 + 1);
                    let (isr, learners) = (all.clone(), Vec::new());
                    let record = ShardRecord { version, isr, learners, ..stored.record };
                    let written = self.store.cas_shard(&record, stored.modified, None).await;
                    last &= matches!(written, Ok(CasOutcome::Done { .. }));
                }
            }
        };
        within(10, written).await;
    }

    async fn cluster_id(&self) -> u128 {
        let meta = self.store.get::<Meta>(&()).await.expect("a read");
        meta.expect("the cluster is made").record.cluster
    }

    /// Gives node 2 the longer log of every other shard, and node 3 that of the others.
    fn fill_logs(&self, shards: &[ShardRecord]) -> BTreeMap<ShardId, StoreId> {
        let mut longest = BTreeMap::new();
        for (index, record) in shards.iter().enumerate() {
            let shard = record.shard();
            let (longer, shorter) = if index % 2 == 0 { (2, 3) } else { (3, 2) };
            // A later epoch precedes a higher seq.
            self.nodes[&longer].log_ends(shard, 1, 50);
            self.nodes[&shorter].log_ends(
                shard,
                if index % 3 == 0 { 0 } else { 1 },
                if index % 3 == 0 { 99 } else { 49 },
            );
            longest.insert(shard, StoreId(longer));
        }
        longest
    }

    /// Waits until node 1 leads no shard, and checks the shards that it led.
    async fn fails_over_from_1(
        &self,
        before: &[ShardRecord],
        longest: &BTreeMap<ShardId, StoreId>,
    ) {
        let led = |shards: &[ShardRecord]| shards.iter().any(|one| one.primary.store == StoreId(1));
        assert!(led(before), "it led some");
        let after = self.shards_are(|shards| !led(shards)).await;
        for (old, new) in before.iter().zip(&after) {
            if old.primary.store == StoreId(1) {
                assert_eq!(new.epoch, Epoch(old.epoch.0 + 1));
                assert_eq!(new.primary.store, longest[&new.shard()], "the longest log of {old:?}");
                assert_eq!(new.isr, [StoreId(2), StoreId(3)], "the dead one left");
            } else {
                assert_eq!((new.epoch, new.primary), (old.epoch, old.primary), "left alone");
            }
        }
    }
}

#[tokio::test]
async fn shards_are_placed_once_the_expected_nodes_are_there() {
    let etcd = Etcd::start().await;
    let settings = Settings::new(vec![etcd.endpoint()], CLUSTER);
    let store = Metastore::connect(&settings).await.expect("etcd answers");
    let coordinator = Process::start(flags(&etcd.endpoint(), 1));
    let mut cluster = Cluster { etcd, store, nodes: BTreeMap::new(), coordinator };
    cluster.coordinator.readyz_is((503, "0 of 3 nodes")).await;
    cluster.add(1).await;
    cluster.add(2).await;
    cluster.coordinator.readyz_is((503, "2 of 3 nodes")).await;
    assert_eq!(cluster.shards().await, []);
    cluster.add(3).await;
    let shards = cluster.shards_are(|shards| shards.len() == 12).await;
    cluster.coordinator.readyz_is((200, "ok")).await;

    let all: Vec<StoreId> = (1..=3).map(StoreId).collect();
    let mut led = BTreeMap::<StoreBoot, u32>::new();
    for (index, record) in (0_u32..).zip(&shards) {
        let edges = (index * 65_536 / 12, (index + 1) * 65_536 / 12 - 1);
        assert_eq!((u32::from(record.slots.lo), u32::from(record.slots.hi)), edges);
        assert_eq!((record.epoch, record.version), (Epoch(1), Version(1)));
        assert_eq!((&record.isr, &record.learners), (&all, &vec![]));
        *led.entry(record.primary).or_default() += 1;
    }
    let each = |store: &StoreId| (StoreBoot { store: *store, boot: Boot(1) }, 4);
    assert_eq!(led, all.iter().map(each).collect());
    let meta = cluster.store.get::<Meta>(&()).await.expect("a read").expect("it was made");
    assert_eq!((meta.record.shards, meta.record.replicas, meta.record.min_in_sync), (12, 3, 2));
}

/// A process that is gone is detected by refused connections, long before its lease expires.
#[tokio::test]
async fn the_shards_of_a_killed_node_go_to_the_longest_logs() {
    let mut cluster = Cluster::placed_on_leases_of(60).await;
    let before = cluster.shards().await;
    let longest = cluster.fill_logs(&before);
    let killed = Instant::now();
    cluster.nodes.get_mut(&1).expect("node 1").kill();
    cluster.fails_over_from_1(&before, &longest).await;
    let took = killed.elapsed();
    assert!(took < Duration::from_millis(500) + BUSY, "took {took:?}");
    let (_, metrics) = cluster.coordinator.page("/metrics").await.expect("it listens");
    assert!(metrics.contains("dkc_promotions_total 4"), "{metrics}");
    assert!(metrics.contains("dkc_node_deaths_total{cause=\"refused\"} 1"), "{metrics}");
    let families = exposition::parse(&metrics).expect("a page that Prometheus takes");
    assert_eq!(families["dkc_promotions_total"].kind, "counter");
    assert_eq!(families["dkc_promotion_seconds"].kind, "histogram");
    assert_eq!(families["dkc_proposals_total"].samples.len(), 3);
}

/// No connection to the former boot's address is used: the next failover queries node 1 at its new
/// address.
#[tokio::test]
async fn a_node_that_came_back_at_another_port_takes_over() {
    let mut cluster = Cluster::placed_on_leases_of(60).await;
    for record in cluster.shards().await {
        cluster.nodes[&1].log_ends(record.shard(), 1, 50);
        cluster.nodes[&2].log_ends(record.shard(), 1, 40);
        cluster.nodes[&3].log_ends(record.shard(), 1, 40);
    }
    // The coordinator has a connection to the former address of node 1.
    let (id, to) = (cluster.cluster_id().await, cluster.coordinator.address());
    cluster.nodes[&2].reports_silent(&to, id, StoreId(1)).await.expect("the leader listens");
    let asked = async {
        while cluster.nodes[&1].asked() == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    within(5, asked).await;
    let endpoint = cluster.etcd.endpoint();
    cluster.nodes.get_mut(&1).expect("node 1").restart_elsewhere(endpoint, TTL_S).await;
    let again = cluster.nodes[&1].me;
    cluster
        .shards_are(|shards| {
            shards.iter().all(|one| one.primary.store != StoreId(1) || one.primary == again)
        })
        .await;
    cluster.put_all_in_sync().await;
    let before = cluster.shards().await;
    cluster.nodes.get_mut(&2).expect("node 2").kill();
    let led_by_2 = |one: &ShardRecord| one.primary.store == StoreId(2);
    let after = cluster.shards_are(|shards| !shards.iter().any(led_by_2)).await;
    let mut moved = before.iter().zip(&after).filter(|(old, _)| led_by_2(old)).peekable();
    assert!(moved.peek().is_some(), "node 2 led some");
    for (old, new) in moved {
        assert_eq!(new.primary, again, "the longest log of {old:?}");
    }
}

/// No watch reports the deletion of the node's key, since none was open at that time. The list that
/// is read after it lacks the node.
#[tokio::test]
async fn a_node_whose_key_went_while_no_watch_was_open_is_missed() {
    let (mut cluster, relay) = Cluster::placed_behind_a_relay(60).await;
    let before = cluster.shards().await;
    let longest = cluster.fill_logs(&before);
    relay.close();
    let node = cluster.nodes.get_mut(&1).expect("node 1");
    node.fall_silent();
    node.lose_lease();
    let key = cluster.store.get::<NodeRecord>(&StoreId(1)).await.expect("a read");
    let modified = key.expect("it is registered").modified;
    let gone = cluster.store.delete::<NodeRecord>(&StoreId(1), modified).await;
    assert!(matches!(gone.expect("an answer"), CasOutcome::Done { .. }));
    relay.mend();
    cluster.fails_over_from_1(&before, &longest).await;
    let (_, metrics) = cluster.coordinator.page("/metrics").await.expect("it listens");
    assert!(metrics.contains("dkc_elections_total 1"), "it led all the time: {metrics}");
}

/// A promotion whose reply was lost took effect or not: etcd's records decide, and it is never made
/// twice. One that etcd refused had no effect, and is made again.
#[tokio::test]
async fn a_promotion_that_is_lost_or_refused_happens_once() {
    for (fate, outcome) in
        [(Fate::LoseAnswer, "unknown"), (Fate::LoseCall, "unknown"), (Fate::Refuse, "failed")]
    {
        let etcd = Etcd::start().await;
        let calls = Calls::start(etcd.endpoint()).await;
        let options = flags_with_ttl(&calls.endpoint(), 1, 60);
        let mut cluster = Cluster::placed_by(etcd, options, 60).await;
        let before = cluster.shards().await;
        let longest = cluster.fill_logs(&before);
        calls.next("Txn", fate);
        cluster.nodes.get_mut(&1).expect("node 1").kill();
        cluster.fails_over_from_1(&before, &longest).await;
        calls.happened().await;
        let line = format!("dkc_proposals_total{{outcome=\"{outcome}\"}} 1");
        let counted = async {
            let page = async || cluster.coordinator.page("/metrics").await;
            while !page().await.is_some_and(|(_, page)| page.contains(&line)) {}
        };
        within(10, counted).await;
    }
}

/// The transactions of a deposed leader fail, since each compares the term; queries compare
/// nothing, so they must not be sent.
#[tokio::test]
async fn a_leader_that_was_deposed_sends_no_more_queries() {
    let (mut cluster, relay) = Cluster::placed_behind_a_relay(1).await;
    // Node 1 replies, but its key is gone, so it is probed again and again.
    cluster.nodes.get_mut(&1).expect("node 1").lose_lease();
    let key = cluster.store.get::<NodeRecord>(&StoreId(1)).await.expect("a read");
    let modified = key.expect("it is registered").modified;
    let gone = cluster.store.delete::<NodeRecord>(&StoreId(1), modified).await;
    assert!(matches!(gone.expect("an answer"), CasOutcome::Done { .. }));
    let asked = || cluster.nodes[&1].asked();
    let until_asked = async |more: u64| {
        let want = asked() + more;
        while asked() < want {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    within(10, until_asked(3)).await;
    // The lease is not renewed, another process becomes leader, and then the coordinator learns it.
    relay.lose_answers();
    let usurper = CoordinatorRecord { address: "127.0.0.1:1".into() };
    let usurped = async {
        while !matches!(cluster.store.create(&(), &usurper).await, Ok(CasOutcome::Done { .. })) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    within(10, usurped).await;
    relay.mend();
    let deposed = async {
        while !cluster
            .coordinator
            .page("/metrics")
            .await
            .is_some_and(|(_, page)| page.lines().any(|line| line == "dkc_leading 0"))
        {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    within(10, deposed).await;
    // Queries that were in flight arrive.
    tokio::time::sleep(Duration::from_millis(300)).await;
    let before = asked();
    let more = tokio::time::timeout(Duration::from_secs(3), until_asked(1)).await;
    assert!(more.is_err(), "asked {} times after it was deposed", asked() - before);
}

/// SIGSTOP, or a cut cable: connections stay open without replies, and the lease is not renewed.
#[tokio::test]
async fn the_shards_of_a_silent_node_go_when_its_lease_is_gone() {
    let mut cluster = Cluster::placed().await;
    let before = cluster.shards().await;
    let longest = cluster.fill_logs(&before);
    let silent = Instant::now();
    let node = cluster.nodes.get_mut(&1).expect("node 1");
    node.fall_silent();
    node.lose_lease();
    cluster.fails_over_from_1(&before, &longest).await;
    let took = silent.elapsed();
    assert!(took < TTL + Duration::from_secs(1) + BUSY, "took {took:?}");
}

/// The lease is alive, but a peer reports the node as silent.
#[tokio::test]
async fn the_shards_of_a_silent_node_go_when_a_peer_reports_it() {
    let cluster = Cluster::placed_on_leases_of(60).await;
    let before = cluster.shards().await;
    let longest = cluster.fill_logs(&before);
    cluster.nodes[&1].fall_silent();
    let id = cluster.cluster_id().await;
    let to = cluster.coordinator.address();
    cluster.nodes[&2].reports_silent(&to, id, StoreId(1)).await.expect("the leader listens");
    cluster.fails_over_from_1(&before, &longest).await;
}

/// A node with a stalled disk replies, but can't acknowledge anything.
#[tokio::test]
async fn the_shards_of_a_node_with_a_stalled_disk_go_when_its_lease_is_gone() {
    let mut cluster = Cluster::placed().await;
    let before = cluster.shards().await;
    let longest = cluster.fill_logs(&before);
    let node = cluster.nodes.get_mut(&1).expect("node 1");
    node.stall_disk();
    node.lose_lease();
    cluster.fails_over_from_1(&before, &longest).await;
}

/// Neither a lease that vanished nor the report of a peer proves a death.
#[tokio::test]
async fn a_node_that_replies_keeps_its_shards_despite_reports() {
    let mut cluster = Cluster::placed().await;
    let before = cluster.shards().await;
    let longest = cluster.fill_logs(&before);
    let id = cluster.cluster_id().await;
    cluster.nodes.get_mut(&1).expect("node 1").lose_lease();
    let gone = async {
        let node = StoreId(1);
        while cluster.store.get::<NodeRecord>(&node).await.expect("a read").is_some() {}
    };
    within(5, gone).await;
    let until = Instant::now() + 2 * TTL;
    while Instant::now() < until {
        let to = cluster.coordinator.address();
        cluster.nodes[&2].reports_silent(&to, id, StoreId(1)).await.expect("the leader listens");
        assert_eq!(cluster.shards().await, before);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    // The coordinator was able to act all the time.
    cluster.nodes.get_mut(&1).expect("node 1").kill();
    cluster.fails_over_from_1(&before, &longest).await;
}

#[tokio::test]
async fn a_standby_takes_over_when_the_leader_dies_and_finishes_its_work() {
    let mut cluster = Cluster::placed().await;
    let before = cluster.shards().await;
    let longest = cluster.fill_logs(&before);
    let id = cluster.cluster_id().await;
    let standby = Process::start(flags(&cluster.etcd.endpoint(), 2));
    standby.readyz_is((200, "ok")).await;
    let refused = cluster.nodes[&2].reports_silent(&standby.address(), id, StoreId(1)).await;
    assert_eq!(refused.expect_err("a standby").code(), tonic::Code::Unavailable);

    let died = Instant::now();
    cluster.coordinator.kill();
    cluster.nodes.get_mut(&1).expect("node 1").kill();
    cluster.coordinator = standby;
    cluster.fails_over_from_1(&before, &longest).await;
    let took = died.elapsed();
    // The limit is the coordinator's own time to live, plus the time of an election and a
    // promotion.
    assert!(took < Duration::from_millis(1_000 + 1_000 + 500) + BUSY, "took {took:?}");
    let leader =
        cluster.store.get::<CoordinatorRecord>(&()).await.expect("a read").expect("one leads");
    assert_eq!(leader.record.address, cluster.coordinator.address());
}

/// The deposed leader does not know yet that another one leads; its transactions compare its own
/// term.
#[tokio::test]
async fn a_leader_that_was_deposed_without_knowing_changes_nothing() {
    let mut cluster = Cluster::placed().await;
    let before = cluster.shards().await;
    let longest = cluster.fill_logs(&before);
    let old =
        cluster.store.get::<CoordinatorRecord>(&()).await.expect("a read").expect("one leads");
    let gone = cluster.store.delete::<CoordinatorRecord>(&(), old.modified).await;
    assert!(matches!(gone.expect("an answer"), CasOutcome::Done { .. }));
    let usurper = CoordinatorRecord { address: "127.0.0.1:1".into() };
    let made = cluster.store.create(&(), &usurper).await.expect("an answer");
    let CasOutcome::Done { mod_revision: revision } = made else { panic!("{made:?}") };

    cluster.nodes.get_mut(&1).expect("node 1").kill();
    let tries = async {
        loop {
            let (_, metrics) = cluster.coordinator.page("/metrics").await.expect("it listens");
            if metrics.contains("dkc_proposals_total{outcome=\"failed\"}") {
                return;
            }
        }
    };
    within(10, tries).await;
    assert_eq!(cluster.shards().await, before);
    let gone = cluster.store.delete::<CoordinatorRecord>(&(), revision).await;
    assert!(matches!(gone.expect("an answer"), CasOutcome::Done { .. }));
    // The coordinator reads its own key every 10 s, finds it gone, and leads under a new term.
    cluster.fails_over_from_1(&before, &longest).await;
}

#[tokio::test]
async fn a_leader_that_is_asked_to_stop_is_followed_at_once() {
    let etcd = Etcd::start().await;
    let settings = Settings::new(vec![etcd.endpoint()], CLUSTER);
    let store = Metastore::connect(&settings).await.expect("etcd answers");
    // A lease that is not revoked would be alive for long.
    let leader = Process::start(flags_with_ttl(&etcd.endpoint(), 1, 60));
    leader.readyz_is((503, "0 of 3 nodes")).await;
    let standby = Process::start(flags(&etcd.endpoint(), 2));
    standby.readyz_is((200, "ok")).await;
    let address = standby.address();
    let asked = Instant::now();
    within(5, leader.stop()).await.expect("exit code 0");
    let follows = async {
        loop {
            let leader = store.get::<CoordinatorRecord>(&()).await.expect("a read");
            if leader.is_some_and(|leader| leader.record.address == address) {
                return;
            }
        }
    };
    within(5, follows).await;
    assert!(asked.elapsed() < BUSY, "{:?}", asked.elapsed());
    standby.readyz_is((503, "0 of 3 nodes")).await;
}

#[tokio::test]
async fn a_draining_node_hands_its_shards_over() {
    let mut cluster = Cluster::placed().await;
    cluster.add(4).await;
    let made = cluster.store.create(&StoreId(1), &DrainIntent).await;
    assert!(matches!(made.expect("an answer"), CasOutcome::Done { .. }));
    let led = |shards: &[ShardRecord]| shards.iter().any(|one| one.primary.store == StoreId(1));
    let after = cluster.shards_are(|shards| !led(shards)).await;
    let handed = cluster.nodes[&1].stepped_down();
    assert!(handed.len() >= 4, "{handed:?}");
    for (shard, epoch) in handed {
        let record = after.iter().find(|record| record.shard() == shard).expect("it is there");
        assert!(record.epoch > epoch, "promoted after it had stepped down: {record:?}");
    }
}

/// While moves for balance are paused, a node that joins gets nothing. Once it has stopped, it is
/// removed as an operator wants it.
#[tokio::test]
async fn a_node_that_holds_nothing_and_has_stopped_is_removed() {
    let mut cluster = Cluster::placed().await;
    let from = Operator { at: TimeMs(1), name: "me@here".into() };
    let made = cluster.store.create(&(), &PauseIntent { from: from.clone() }).await;
    assert!(matches!(made.expect("an answer"), CasOutcome::Done { .. }));
    cluster.add(4).await;
    let (fourth, boot) = (StoreId(4), Boot(1));
    let made = cluster.store.create(&fourth, &RemoveIntent { boot, from }).await;
    assert!(matches!(made.expect("an answer"), CasOutcome::Done { .. }));
    let status = async || {
        let kept = cluster.store.get::<StoreRecord>(&fourth).await.expect("a read");
        kept.expect("it was registered").record.status
    };
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(status().await, StoreStatus::Active, "it runs");
    cluster.nodes.remove(&4);
    let removed = async {
        while status().await != StoreStatus::Retired {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    within(15, removed).await;
    assert_eq!(cluster.store.get::<RemoveIntent>(&fourth).await.expect("a read"), None);
    assert!(cluster.shards().await.iter().all(|one| !one.target.contains(&fourth)));
}

#[tokio::test]
async fn the_leader_shows_its_plan_and_a_standby_does_not() {
    let cluster = Cluster::placed().await;
    let id = cluster.cluster_id().await;
    let plan = async |address: String, id, drain| {
        let client = OperatorClient::connect(format!("http://{address}")).await;
        let answer = client.expect("it listens").plan(wire::PlanQuery::new(id, drain)).await;
        answer.map(tonic::Response::into_inner)
    };
    let leader = cluster.coordinator.address();
    let level = plan(leader.clone(), id, None).await.expect("a plan");
    assert_eq!((level.moves.len(), level.stalled, level.obstacle), (0, false, None));
    let drained = plan(leader.clone(), id, Some(StoreId(1))).await.expect("a plan");
    let obstacle = drained.obstacle.expect("there are three nodes for three copies");
    assert!(obstacle.contains("can hold copies is 2"), "{obstacle}");
    let stuck = drained.moves.iter().filter(|it| it.reason.as_deref() == Some("no-target"));
    assert_eq!(stuck.count(), 12);
    let other = plan(leader, id + 1, None).await.expect_err("another cluster's");
    assert_eq!(other.code(), tonic::Code::FailedPrecondition);

    let standby = Process::start(flags(&cluster.etcd.endpoint(), 2));
    standby.readyz_is((200, "ok")).await;
    let refused = plan(standby.address(), id, None).await.expect_err("a standby");
    assert_eq!(refused.code(), tonic::Code::Unavailable);
    let (_, metrics) = cluster.coordinator.page("/metrics").await.expect("it listens");
    assert!(metrics.contains("dkc_moves_wanted 0"), "{metrics}");
    assert!(metrics.contains("dkc_moves_stalled 0"), "{metrics}");
}

/// The events of a coordinator as words: kind, node, reason.
async fn events(
    address: String,
    cluster: u128,
    seen: Option<(u64, u64)>,
) -> Result<(wire::EventsReply, Vec<String>), tonic::Status> {
    let client = OperatorClient::connect(format!("http://{address}")).await;
    let query = wire::EventsQuery::new(cluster, seen);
    let reply = client.expect("it listens").events(query).await?.into_inner();
    let line = |event: &wire::ClusterEvent| {
        let node = event.node.map_or(0, |node| StoreId::from(node).0);
        format!("{} {node} {}", event.kind, event.reason.as_deref().unwrap_or("-"))
    };
    let lines = reply.events.iter().map(line).collect();
    Ok((reply, lines))
}

#[tokio::test]
async fn a_standby_has_the_events_too_and_keeps_them_when_it_leads() {
    let mut cluster = Cluster::placed().await;
    let before = cluster.shards().await;
    let longest = cluster.fill_logs(&before);
    let id = cluster.cluster_id().await;
    let leader = cluster.coordinator.address();
    let has = |lines: &[String], word: &str| lines.iter().any(|line| line == word);
    let all_placed = async || loop {
        let (reply, lines) = events(leader.clone(), id, None).await.expect("events");
        let placed = reply.events.iter().filter(|event| event.kind == "shards-placed");
        if placed.filter_map(|event| event.count).sum::<u64>() >= 12 {
            return (reply, lines);
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    let (first, lines) = within(15, all_placed()).await;
    assert!(has(&lines, "leader-elected 0 -") && has(&lines, "node-came 1 new"), "{lines:?}");
    assert_eq!((first.coordinator.as_str(), first.cut), ("coordinator-1", false));
    let refused = events(leader.clone(), id + 1, None).await.expect_err("another cluster's");
    assert_eq!(refused.code(), tonic::Code::FailedPrecondition);

    let standby = Process::start(flags(&cluster.etcd.endpoint(), 2));
    standby.readyz_is((200, "ok")).await;
    cluster.nodes.get_mut(&1).expect("node 1").kill();
    cluster.fails_over_from_1(&before, &longest).await;
    let gone = async |address: &str, seen| loop {
        let (reply, lines) = events(address.to_owned(), id, seen).await.expect("events");
        let promoted = lines.iter().filter(|line| line.starts_with("primary ")).count();
        if has(&lines, "node-left 1 -") && promoted >= 4 {
            return (reply, lines);
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    let last = first.events.last().map(|event| (first.instance, event.number));
    let (of_leader, lines) = within(15, gone(&leader, last)).await;
    assert!(!has(&lines, "leader-elected 0 -"), "only what is new: {lines:?}");
    assert!(has(&lines, "node-dead 1 refused"), "{lines:?}");
    let (of_standby, lines) = within(15, gone(&standby.address(), None)).await;
    assert!(
        !lines.iter().any(|line| line.starts_with("node-dead")),
        "it probes nothing: {lines:?}"
    );
    // The promotions of both have one identity.
    let promoted = |reply: &wire::EventsReply| {
        let events = reply.events.iter().filter(|event| event.kind == "primary");
        events.map(|event| (event.revision, event.shard, event.node)).collect::<Vec<_>>()
    };
    let (of_leader, of_standby) = (promoted(&of_leader), promoted(&of_standby));
    assert!(of_standby.iter().all(|one| of_leader.contains(one)), "{of_leader:?} {of_standby:?}");
}

#[tokio::test]
async fn flags_that_differ_from_the_cluster_end_the_process() {
    let cluster = Cluster::placed().await;
    let mut options = flags(&cluster.etcd.endpoint(), 2);
    options.min_in_sync = Some(1);
    let exit = Process::start(options).end().await.expect_err("the cluster has 2");
    assert_eq!(exit.code(), 2);
    assert!(exit.to_string().contains("--min-in-sync is 1"), "{exit}");
    // Absent flags accept what the cluster has.
    let mut options = flags(&cluster.etcd.endpoint(), 3);
    (options.shards, options.replicas, options.min_in_sync) = (None, None, None);
    let standby = Process::start(options);
    standby.readyz_is((200, "ok")).await;
    within(5, standby.stop()).await.expect("exit code 0");
    // Invalid flags are refused without a call to etcd.
    let mut options = flags("127.0.0.1:1", 4);
    (options.replicas, options.min_in_sync) = (Some(2), Some(3));
    let exit = Process::start(options).end().await.expect_err("invalid flags");
    assert_eq!(exit.code(), 2);
}

#[tokio::test]
async fn a_coordinator_waits_for_an_etcd_that_is_down_and_reports_it() {
    let mut etcd = Etcd::start().await;
    etcd.kill();
    let coordinator = Process::start(flags(&etcd.endpoint(), 1));
    coordinator.readyz_is((503, "etcd")).await;
    etcd.run().await;
    coordinator.readyz_is((503, "0 of 3 nodes")).await;
    etcd.kill();
    coordinator.readyz_is((503, "etcd")).await;
    // The process can be stopped meanwhile, in less than the 10 s that it has.
    within(10, coordinator.stop()).await.expect("exit code 0");
}

/// Waiting does not help, so the process ends with an exit code for its supervisor.
#[tokio::test]
async fn an_etcd_that_is_too_old_ends_the_process() {
    let etcd = Etcd::start().await;
    let calls = Calls::start(etcd.endpoint()).await;
    calls.next("Status", Fate::ReplyVersion("3.4.27"));
    let exit = within(10, Process::start(flags(&calls.endpoint(), 1)).end()).await;
    let exit = exit.expect_err("it is too old");
    assert_eq!(exit.code(), 2);
    assert!(exit.to_string().contains("3.4.27 is too old"), "{exit}");
}

#[tokio::test]
async fn a_port_that_is_taken_is_a_setting_to_be_changed() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = taken.local_addr().expect("it is bound");
    let mut listens = flags("127.0.0.1:1", 1);
    listens.listen.listen = address;
    let mut shows = flags("127.0.0.1:1", 1);
    shows.process.metrics = Some(address);
    for options in [listens, shows] {
        let exit = within(10, Process::start(options).end()).await.expect_err("it is taken");
        assert_eq!(exit.code(), 2);
        assert!(exit.to_string().contains(&address.to_string()), "{exit}");
    }
}

/// Every third read is lost, also those of the first listing: the coordinator reads again until it
/// has all records.
#[tokio::test]
async fn a_coordinator_begins_though_reads_are_lost() {
    let etcd = Etcd::start().await;
    let calls = Calls::start(etcd.endpoint()).await;
    for _ in 0..14 {
        for fate in [Fate::Pass, Fate::Pass, Fate::LoseAnswer] {
            calls.next("Range", fate);
        }
    }
    Cluster::placed_by(etcd, flags(&calls.endpoint(), 1), 60).await;
}

/// All leases have expired when etcd resumes, but no node is dead.
#[tokio::test]
async fn an_etcd_that_was_paused_causes_no_failover() {
    let mut cluster = Cluster::placed().await;
    let before = cluster.shards().await;
    let longest = cluster.fill_logs(&before);
    cluster.etcd.freeze();
    tokio::time::sleep(TTL * 5 / 2).await;
    cluster.etcd.thaw();
    cluster.coordinator.readyz_is((200, "ok")).await;
    let registered = async {
        loop {
            let listed = cluster.store.list::<NodeRecord>().await;
            if listed.is_ok_and(|listed| listed.all.len() == 3) {
                return;
            }
        }
    };
    within(10, registered).await;
    assert_eq!(cluster.shards().await, before);
    // The coordinator leads again, under a new term.
    cluster.nodes.get_mut(&1).expect("node 1").kill();
    cluster.fails_over_from_1(&before, &longest).await;
}

/// No process may follow an etcd whose history went back before an operator has decided so.
#[tokio::test]
async fn no_coordinator_leads_with_an_etcd_whose_history_went_back() {
    let mut cluster = Cluster::placed().await;
    cluster.nodes.clear();
    cluster.etcd.replace_by_empty().await;
    cluster.coordinator.readyz_is((503, "etcd-went-back")).await;
    // The test's own metastore does not follow it, either.
    let settings = Settings::new(vec![cluster.etcd.endpoint()], CLUSTER);
    cluster.store = Metastore::connect(&settings).await.expect("etcd answers");
    let leader = cluster.store.get::<CoordinatorRecord>(&()).await.expect("a read");
    assert_eq!(leader, None);
    assert_eq!(cluster.shards().await, []);
    let coordinator = cluster.coordinator;
    within(5, coordinator.stop()).await.expect("exit code 0");
}
