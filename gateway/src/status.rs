//! `GET /v1/cluster`: the records in etcd, and the status of the replicas as the nodes report it.
//!
//! A node is *up* if it answers, not if its key exists in etcd: a key outlives its process by the
//! lease, and an outage of etcd can remove the key of a live process. A node is *down* if it
//! refuses the connection or does not answer, and *unknown* if it could not be asked: a failure on
//! the side of this gateway is no information about the node.
//!
//! One task makes the page for all requests that wait at that moment. Every request gets a page
//! that was begun after it came, and a thousand concurrent requests cost one page. Two pages are
//! begun at least [`PAGE_INTERVAL`] apart, over connections that are kept, so that a client that
//! polls in a loop costs the nodes little, and this gateway no ports.

use std::collections::BTreeMap;
use std::io;
use std::time::Duration;

use bytes::Bytes;
use engine::ids::{Seq, ShardId, StoreBoot, StoreId};
use engine::message::{
    NodeQuery, NodeQueryReply, ReplicaHealth, ReplicaStatus, RoleStatus, ScrubStatus,
};
use engine::records::{LossRecord, StoreRecord, StoreStatus};
use engine::shard_record::ShardRecord;
use proto::wire;
use proto::wire::control_client::ControlClient;
use serde::Serialize;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};
use tonic::transport::Channel;
use tracing::debug;

use crate::directory::Directory;
use crate::node_connections::PINGS;

/// The time within which a node must answer.
const ANSWER_WITHIN: Duration = Duration::from_millis(500);

/// The shortest interval between two pages.
const PAGE_INTERVAL: Duration = Duration::from_millis(200);

/// Requests the page from the task that makes it.
#[derive(Clone)]
pub(crate) struct StatusPage(mpsc::UnboundedSender<oneshot::Sender<Bytes>>);

impl StatusPage {
    /// Returns the page, and the task that makes it, which runs until all clones are dropped.
    pub(crate) fn new(
        cluster: String,
        directory: watch::Receiver<Directory>,
    ) -> (Self, impl Future<Output = ()>) {
        let (sender, mut waiting) = mpsc::unbounded_channel::<oneshot::Sender<Bytes>>();
        let task = async move {
            let mut clients = ControlClients::default();
            let mut next_at = Instant::now();
            while let Some(first) = waiting.recv().await {
                sleep_until(next_at).await;
                next_at = Instant::now() + PAGE_INTERVAL;
                let mut requests = vec![first];
                while let Ok(next) = waiting.try_recv() {
                    requests.push(next);
                }
                let directory = directory.borrow().clone();
                let answers = clients.query_all(&directory).await;
                let page = page(&cluster, &directory, &answers);
                let body: Bytes = serde_json::to_vec(&page).expect("a page of plain values").into();
                for request in requests {
                    // A client that has gone meanwhile needs no page.
                    let _gone = request.send(body.clone());
                }
            }
        };
        (Self(sender), task)
    }

    /// The page, as JSON.
    pub(crate) async fn cluster(&self) -> Bytes {
        let (sender, page) = oneshot::channel();
        let requested = self.0.send(sender);
        match (requested, page.await) {
            (Ok(()), Ok(page)) => page,
            // The process is ending.
            _ => Bytes::from_static(b"{}"),
        }
    }
}

/// The result of querying each node.
#[derive(Clone, Debug, Default)]
struct NodeAnswers(BTreeMap<StoreId, NodeAnswer>);

#[derive(Clone, Debug)]
enum NodeAnswer {
    Up(NodeStatus),
    /// The node refuses the connection, does not answer, or is another store by now.
    Down,
    /// The node could not be queried.
    NotQueried,
}

impl NodeAnswers {
    fn status(&self, store: StoreId) -> Option<&NodeStatus> {
        match self.0.get(&store)? {
            NodeAnswer::Up(status) => Some(status),
            NodeAnswer::Down | NodeAnswer::NotQueried => None,
        }
    }
}

/// The status that a process reports of its replicas and its disk.
#[derive(Clone, Debug)]
struct NodeStatus {
    from: StoreBoot,
    replicas: BTreeMap<ShardId, ReplicaStatus>,
    scrub: ScrubStatus,
    full: bool,
}

/// The connections to the nodes for these queries, by address.
#[derive(Default)]
struct ControlClients(BTreeMap<String, ControlClient<Channel>>);

impl ControlClients {
    async fn query_all(&mut self, directory: &Directory) -> NodeAnswers {
        let Some(cluster) = directory.meta.as_ref().map(|meta| meta.cluster) else {
            return NodeAnswers::default();
        };
        let mut queries = JoinSet::new();
        let mut kept = std::mem::take(&mut self.0);
        for (store, record) in directory.members() {
            let node = directory.nodes.get(&store).map(|node| &node.address);
            let address = node.unwrap_or(&record.address).clone();
            let client = kept.remove(&address);
            queries.spawn(async move {
                let (answer, client) = answer(cluster, store, &address, client).await;
                (store, address, answer, client)
            });
        }
        let mut answers = NodeAnswers::default();
        while let Some(answered) = queries.join_next().await {
            let (store, address, answer, client) =
                answered.expect("a query neither panics nor is cancelled");
            answers.0.insert(store, answer);
            self.0.extend(client.map(|client| (address, client)));
        }
        answers
    }
}

/// Queries a node. Returns the connection, too, if it can be kept.
async fn answer(
    cluster: u128,
    store: StoreId,
    address: &str,
    client: Option<ControlClient<Channel>>,
) -> (NodeAnswer, Option<ControlClient<Channel>>) {
    let querying = async {
        if let Some(mut client) = client
            && let Ok(status) = query(cluster, &mut client).await
        {
            return Ok((status, client));
        }
        // The kept connection may lead to a process that has ended.
        let mut client = connect(address).await?;
        let status = query(cluster, &mut client).await.map_err(|why| (NodeAnswer::Down, why))?;
        Ok((status, client))
    };
    let (answer, why) = match tokio::time::timeout(ANSWER_WITHIN, querying).await {
        Ok(Ok((status, client))) if status.from.store == store => {
            return (NodeAnswer::Up(status), Some(client));
        }
        Ok(Ok(_)) => (NodeAnswer::Down, "another store answered".to_owned()),
        Ok(Err((answer, why))) => (answer, why),
        Err(_) => (NodeAnswer::Down, "no answer in time".to_owned()),
    };
    debug!(%store, address, why, "node status not available");
    (answer, None)
}

async fn connect(address: &str) -> Result<ControlClient<Channel>, (NodeAnswer, String)> {
    let endpoint = process::endpoint(address, PINGS)
        .map_err(|error| (NodeAnswer::NotQueried, error.to_string()))?;
    let channel = endpoint.connect().await.map_err(|error| {
        let answer = match is_remote_failure(&error) {
            true => NodeAnswer::Down,
            false => NodeAnswer::NotQueried,
        };
        (answer, error.to_string())
    })?;
    Ok(proto::limited!(ControlClient::new(channel)))
}

/// Returns whether a connection failed at its other end, and not because this side lacked a port,
/// an open file or the address of a name.
fn is_remote_failure(error: &(dyn std::error::Error + 'static)) -> bool {
    use io::ErrorKind::{
        ConnectionAborted, ConnectionRefused, ConnectionReset, HostUnreachable, TimedOut,
    };
    let failed = process::causes(error).find_map(|error| error.downcast_ref::<io::Error>());
    failed.is_some_and(|failed| {
        matches!(
            failed.kind(),
            ConnectionRefused | ConnectionReset | ConnectionAborted | HostUnreachable | TimedOut
        )
    })
}

async fn query(cluster: u128, client: &mut ControlClient<Channel>) -> Result<NodeStatus, String> {
    let query = wire::NodeQuery::new(cluster, NodeQuery::Status);
    let reply = client.query(query).await.map_err(|status| status.message().to_owned())?;
    match NodeQueryReply::try_from(reply.into_inner()) {
        Ok(NodeQueryReply::Status { from, replicas, scrub, full }) => {
            let replicas = replicas.into_iter().map(|replica| (replica.shard, replica)).collect();
            Ok(NodeStatus { from, replicas, scrub, full })
        }
        Ok(_) => Err("the answer is for another query".to_owned()),
        Err(invalid) => Err(invalid.to_string()),
    }
}

/// The page `/v1/cluster`. The structs with the suffix `Json` define its format, which `dkc status`
/// reads.
#[derive(Serialize)]
struct ClusterJson<'a> {
    cluster: &'a str,
    incarnation: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    idempotency: Option<IdempotencyJson>,
    nodes: Vec<NodeJson<'a>>,
    shards: Vec<ShardJson>,
    /// The accepted losses of data: by an operator with `dkc shards promote … --accept-loss`, or
    /// because all copies of a shard were damaged.
    losses: Vec<LossJson>,
    /// The reason why no shard is placed yet.
    #[serde(skip_serializing_if = "Option::is_none")]
    waiting_for: Option<String>,
}

/// The limits of the records of requests with an idempotency key.
#[derive(Serialize)]
struct IdempotencyJson {
    window_ms: u64,
    /// The limit of all shards together, in one copy.
    bytes_max: u64,
}

#[derive(Serialize)]
struct NodeJson<'a> {
    name: String,
    uuid: String,
    boot: u64,
    zone: &'a str,
    address: &'a str,
    state: &'static str,
    /// The node refuses writes because its disk is nearly full, and serves reads.
    disk_full: bool,
    /// `None` if there was no scrub since the process started, or the node does not answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    last_scrub: Option<ScrubJson>,
}

#[derive(Serialize)]
struct LossJson {
    shard: u16,
    /// The epoch that began with the loss.
    epoch: u64,
    /// The store whose copy was promoted.
    primary: String,
    /// The last position in the log of that copy.
    last: u64,
    given_up: Vec<GivenUpJson>,
    /// The operator who accepted the loss. `None` if the copies of all trusted members were
    /// damaged, and the best of them was promoted.
    by: Option<String>,
    /// The moment at which the operator accepted it, in ms since 1970.
    at_ms: Option<u64>,
}

#[derive(Serialize)]
struct GivenUpJson {
    node: String,
    uuid: String,
    /// The highest position that the copy was known to have.
    last: Option<u64>,
}

#[derive(Serialize)]
struct ScrubJson {
    ended_ms: u64,
    copies: u64,
    /// The shards whose copies were found damaged.
    damaged: Vec<u16>,
}

#[derive(Serialize)]
struct ShardJson {
    id: u16,
    slots: [u16; 2],
    epoch: u64,
    version: u64,
    state: &'static str,
    primary: String,
    isr: Vec<String>,
    learners: Vec<String>,
    /// Members and learners that do not acknowledge what the primary sends, as the primary reports.
    hindered_by: Vec<HindranceJson>,
    /// The records of requests with an idempotency key, as the primary reports.
    #[serde(skip_serializing_if = "Option::is_none")]
    records: Option<RecordsJson>,
    replicas: Vec<ReplicaJson>,
    digests_agree: bool,
}

#[derive(Serialize)]
struct RecordsJson {
    count: u64,
    bytes: u64,
    /// The limit beyond which the shard refuses new keys.
    bytes_max: u64,
}

#[derive(Serialize)]
struct HindranceJson {
    node: String,
    standing: &'static str,
}

#[derive(Serialize)]
struct ReplicaJson {
    node: String,
    last: u64,
    applied: u64,
    /// The digest of the counters, 32 hexadecimal digits.
    digest: String,
    /// The position at which both digests were computed.
    digest_at: u64,
    /// The digest of the sessions and of their expiry.
    sessions_digest: String,
    /// The reason why the copy applies nothing more and must be replaced. `None` if it is healthy.
    #[serde(skip_serializing_if = "Option::is_none")]
    stopped: Option<String>,
}

fn page<'a>(cluster: &'a str, directory: &'a Directory, answers: &NodeAnswers) -> ClusterJson<'a> {
    let nodes = directory.members().map(|(store, record)| node(directory, answers, store, record));
    ClusterJson {
        cluster,
        incarnation: directory.meta.as_ref().map(|meta| meta.incarnation),
        idempotency: directory.meta.as_ref().map(|meta| IdempotencyJson {
            window_ms: meta.idempotency.window_ms,
            bytes_max: meta.idempotency.bytes_max,
        }),
        nodes: nodes.collect(),
        shards: directory.shards.values().map(|record| shard(directory, answers, record)).collect(),
        losses: directory.losses.iter().map(|record| loss(directory, record)).collect(),
        waiting_for: directory.waiting_for(),
    }
}

fn loss(directory: &Directory, record: &LossRecord) -> LossJson {
    let given_up = |&(store, last): &(StoreId, Option<Seq>)| GivenUpJson {
        node: directory.name(store),
        uuid: store.to_string(),
        last: last.map(|seq| seq.0),
    };
    let operator = record.accepted_by.as_ref();
    LossJson {
        shard: record.shard.0,
        epoch: record.epoch.0,
        primary: directory.name(record.primary.store),
        last: record.last.1.0,
        given_up: record.given_up.iter().map(given_up).collect(),
        by: operator.map(|operator| operator.name.clone()),
        at_ms: operator.map(|operator| operator.at.0),
    }
}

fn node<'a>(
    directory: &'a Directory,
    answers: &NodeAnswers,
    store: StoreId,
    record: &'a StoreRecord,
) -> NodeJson<'a> {
    let state = match (answers.0.get(&store), record.status) {
        (None | Some(NodeAnswer::NotQueried), _) => "unknown",
        (Some(NodeAnswer::Down), _) => "down",
        (_, StoreStatus::Suspect) => "suspect",
        (_, StoreStatus::Draining) => "draining",
        _ if directory.draining.contains(&store) => "draining",
        _ => "up",
    };
    let address = directory.nodes.get(&store).map_or(&record.address, |node| &node.address);
    let (name, zone) = (directory.name(store), &record.zone);
    let status = answers.status(store);
    let scrub = status.map(|status| &status.scrub).filter(|scrub| scrub.has_ended());
    let last_scrub = scrub.map(|scrub| ScrubJson {
        ended_ms: scrub.ended.0,
        copies: scrub.shards,
        damaged: scrub.damaged.iter().map(|shard| shard.0).collect(),
    });
    let disk_full = status.is_some_and(|status| status.full);
    let (uuid, boot) = (store.to_string(), record.boot.0);
    NodeJson { name, uuid, boot, zone, address, state, disk_full, last_scrub }
}

fn shard(directory: &Directory, answers: &NodeAnswers, record: &ShardRecord) -> ShardJson {
    let names = |stores: &[StoreId]| stores.iter().map(|&store| directory.name(store)).collect();
    let of = |store: StoreId| answers.status(store)?.replicas.get(&record.shard());
    let members = record.isr.iter().chain(&record.learners);
    let statuses: Vec<_> =
        members.filter_map(|&store| Some((directory.name(store), of(store)?))).collect();
    // A node counts as primary only if it has the boot of the record and leads in its epoch.
    let primary = answers.status(record.primary.store);
    let primary = primary.filter(|status| status.from == record.primary);
    let leads = primary.and_then(|status| match &status.replicas.get(&record.shard())?.role {
        RoleStatus::Primary { epoch, open, hindered_by, records } if *epoch == record.epoch => {
            Some((*open, hindered_by, *records))
        }
        _ => None,
    });
    let state = match leads {
        Some((true, ..)) => "open",
        Some((false, ..)) => "frozen",
        None => "no-primary",
    };
    let hindrance = |&(store, standing): &(StoreId, ReplicaHealth)| HindranceJson {
        node: directory.name(store),
        standing: standing.name(),
    };
    let hindered_by = leads.map_or(&[][..], |(_, hindered_by, _)| hindered_by);
    ShardJson {
        id: record.shard().0,
        slots: [record.slots.lo, record.slots.hi],
        epoch: record.epoch.0,
        version: record.version.0,
        state,
        primary: directory.name(record.primary.store),
        isr: names(&record.isr),
        learners: names(&record.learners),
        hindered_by: hindered_by.iter().map(hindrance).collect(),
        records: leads.zip(directory.meta.as_ref()).map(|((.., kept), meta)| RecordsJson {
            count: kept.count,
            bytes: kept.bytes,
            bytes_max: meta.idempotency.bytes_max_of(record.slots),
        }),
        digests_agree: digests_agree(statuses.iter().map(|(_, status)| *status)),
        replicas: statuses.into_iter().map(|(node, status)| replica(node, status)).collect(),
    }
}

fn replica(node: String, status: &ReplicaStatus) -> ReplicaJson {
    ReplicaJson {
        node,
        last: status.last.0,
        applied: status.applied.0,
        digest: format!("{:032x}", status.digest.counters),
        digest_at: status.digest.seq.0,
        sessions_digest: format!("{:032x}", status.digest.sessions),
        stopped: status.stopped.clone(),
    }
}

/// Returns false if two digests at the same position differ. Digests at different positions can't
/// be compared.
fn digests_agree<'a>(replicas: impl Iterator<Item = &'a ReplicaStatus>) -> bool {
    let mut at = BTreeMap::new();
    replicas.fold(true, |agree, replica| {
        let digest = replica.digest;
        let first = *at.entry(digest.seq).or_insert(digest);
        agree && first == digest
    })
}

#[cfg(test)]
mod tests {
    use engine::ids::{Boot, Epoch, Slots, TimeMs, Version};
    use engine::message::{DigestPoint, RecordsKept};
    use engine::records::{Meta, NodeRecord, Operator};
    use serde_json::{Value, json};

    use super::*;

    fn store(name: &str, boot: u64, status: StoreStatus) -> StoreRecord {
        let (address, zone) = (format!("{name}:1"), "a".to_owned());
        let boot = Boot(boot);
        StoreRecord { name: name.into(), address, zone, host: "h".into(), boot, nonce: 1, status }
    }

    /// Three nodes and one shard, led by node-1 in epoch 3.
    fn directory() -> Directory {
        let boot = StoreBoot { store: StoreId(1), boot: Boot(2) };
        let record = ShardRecord {
            slots: Slots { lo: 0, hi: 65_535 },
            epoch: Epoch(3),
            version: Version(9),
            primary: boot,
            isr: vec![StoreId(1), StoreId(2)],
            learners: vec![StoreId(3)],
            ..ShardRecord::default()
        };
        let node = NodeRecord {
            boot: Boot(2),
            address: "elsewhere:1".into(),
            capacity: 1,
            versions: (1, 1),
        };
        Directory {
            meta: Some(Meta {
                cluster: 7,
                shards: 1,
                replicas: 3,
                min_in_sync: 2,
                hash: 1,
                incarnation: 4,
                idempotency: engine::shard::idempotency::TokenSettings::default(),
            }),
            stores: BTreeMap::from([
                (StoreId(1), store("node-1", 2, StoreStatus::Active)),
                (StoreId(2), store("node-2", 1, StoreStatus::Active)),
                (StoreId(3), store("node-3", 1, StoreStatus::Suspect)),
                (StoreId(4), store("node-4", 1, StoreStatus::Lost)),
            ]),
            nodes: BTreeMap::from([(StoreId(1), node)]),
            shards: BTreeMap::from([(ShardId(0), record)]),
            coordinator: None,
            draining: [StoreId(2)].into(),
            losses: vec![],
        }
    }

    fn status(seq: u64, counters: u128, role: RoleStatus) -> ReplicaStatus {
        ReplicaStatus {
            shard: ShardId(0),
            promised: Epoch(3),
            last: Seq(seq + 1),
            applied: Seq(seq),
            digest: DigestPoint {
                shard: ShardId(0),
                seq: Seq(seq),
                counters,
                sessions: 0,
                tokens: 0,
            },
            role,
            stopped: None,
        }
    }

    fn answers(replicas: Vec<(u128, u64, ReplicaStatus)>) -> NodeAnswers {
        let one = |(store, boot, status): (u128, u64, ReplicaStatus)| {
            let store = StoreId(store);
            let from = StoreBoot { store, boot: Boot(boot) };
            let replicas = BTreeMap::from([(ShardId(0), status)]);
            let scrub = ScrubStatus::default();
            (store, NodeAnswer::Up(NodeStatus { from, replicas, scrub, full: store.0 == 3 }))
        };
        NodeAnswers(replicas.into_iter().map(one).collect())
    }

    fn leads(epoch: u64, open: bool) -> RoleStatus {
        let hindered_by = vec![(StoreId(3), ReplicaHealth::Full)];
        let records = RecordsKept { count: 5, bytes: 400 };
        RoleStatus::Primary { epoch: Epoch(epoch), open, hindered_by, records }
    }

    fn json_of(answers: &NodeAnswers) -> Value {
        serde_json::to_value(page("dkc", &directory(), answers)).unwrap()
    }

    #[test]
    fn the_page_has_the_contracted_format() {
        let answers = answers(vec![
            (1, 2, status(9, 0xab, leads(3, true))),
            (2, 1, status(9, 0xab, RoleStatus::Follower)),
            (3, 1, status(5, 1, RoleStatus::Follower)),
        ]);
        let digest = |digits: &str| format!("{digits:0>32}");
        let settings = engine::shard::idempotency::TokenSettings::default();
        let want = json!({
            "cluster": "dkc", "incarnation": 4,
            "idempotency": {"window_ms": settings.window_ms, "bytes_max": settings.bytes_max},
            "nodes": [
                {"name": "node-1", "uuid": digest("1"), "boot": 2, "zone": "a",
                 "address": "elsewhere:1", "state": "up", "disk_full": false},
                {"name": "node-2", "uuid": digest("2"), "boot": 1, "zone": "a",
                 "address": "node-2:1", "state": "draining", "disk_full": false},
                {"name": "node-3", "uuid": digest("3"), "boot": 1, "zone": "a",
                 "address": "node-3:1", "state": "suspect", "disk_full": true}],
            "shards": [{"id": 0, "slots": [0, 65535], "epoch": 3, "version": 9,
                "state": "open", "primary": "node-1", "isr": ["node-1", "node-2"],
                "learners": ["node-3"],
                "hindered_by": [{"node": "node-3", "standing": "disk-full"}],
                "records": {"count": 5, "bytes": 400, "bytes_max": settings.bytes_max},
                "digests_agree": true, "replicas": [
                    {"node": "node-1", "last": 10, "applied": 9, "digest": digest("ab"),
                     "digest_at": 9, "sessions_digest": digest("0")},
                    {"node": "node-2", "last": 10, "applied": 9, "digest": digest("ab"),
                     "digest_at": 9, "sessions_digest": digest("0")},
                    {"node": "node-3", "last": 6, "applied": 5, "digest": digest("1"),
                     "digest_at": 5, "sessions_digest": digest("0")}]}],
            "losses": [],
        });
        assert_eq!(json_of(&answers), want);
    }

    #[test]
    fn accepted_losses_stay_on_the_page() {
        let loss = LossRecord {
            shard: ShardId(0),
            epoch: Epoch(4),
            primary: StoreBoot { store: StoreId(2), boot: Boot(1) },
            last: (Epoch(3), Seq(20)),
            given_up: vec![(StoreId(1), Some(Seq(25))), (StoreId(4), None)],
            accepted_by: Some(Operator { at: TimeMs(7), name: "me@here".into() }),
        };
        let by_itself =
            LossRecord { epoch: Epoch(6), given_up: vec![], accepted_by: None, ..loss.clone() };
        let directory = Directory { losses: vec![loss, by_itself], ..directory() };
        let page = serde_json::to_value(page("dkc", &directory, &NodeAnswers::default())).unwrap();
        let uuid = |digit: &str| format!("{digit:0>32}");
        let want = json!([{"shard": 0, "epoch": 4, "primary": "node-2", "last": 20, "at_ms": 7,
            "by": "me@here", "given_up": [{"node": "node-1", "uuid": uuid("1"), "last": 25},
                {"node": "node-4", "uuid": uuid("4"), "last": null}]},
            {"shard": 0, "epoch": 6, "primary": "node-2", "last": 20, "at_ms": null, "by": null,
             "given_up": []}]);
        assert_eq!(page["losses"], want);
    }

    /// An empty store runs under the name of another one, which is down and which shards wait for:
    /// the page must not show that one as up.
    #[test]
    fn of_two_stores_with_one_name_the_one_that_is_down_gets_its_uuid_added() {
        let mut directory = directory();
        let namesake = store("node-2", 1, StoreStatus::Active);
        directory.stores.insert(StoreId(9), namesake);
        directory.nodes.insert(StoreId(9), directory.nodes[&StoreId(1)].clone());
        let page = serde_json::to_value(page("dkc", &directory, &NodeAnswers::default())).unwrap();
        assert_eq!(page["shards"][0]["isr"], json!(["node-1", "node-2@00000000"]));
        let names: Vec<_> =
            page["nodes"].as_array().unwrap().iter().map(|node| &node["name"]).collect();
        assert_eq!(names, ["node-1", "node-2@00000000", "node-3", "node-2"]);
    }

    #[test]
    fn only_the_primary_of_this_epoch_and_boot_opens_a_shard() {
        #[track_caller]
        fn check(answers: &NodeAnswers, want: &str) {
            assert_eq!(json_of(answers)["shards"][0]["state"], want);
        }
        let one = |boot, role| answers(vec![(1, boot, status(9, 1, role))]);
        check(&one(2, leads(3, true)), "open");
        check(&one(2, leads(3, false)), "frozen");
        check(&one(2, leads(2, true)), "no-primary");
        check(&one(2, RoleStatus::Follower), "no-primary");
        check(&one(3, leads(3, true)), "no-primary");
        check(&NodeAnswers::default(), "no-primary");
    }

    /// A node that could not be queried is unknown, not down.
    #[test]
    fn only_a_node_that_refuses_or_is_silent_is_down() {
        let answers = NodeAnswers(BTreeMap::from([
            (StoreId(1), NodeAnswer::Down),
            (StoreId(2), NodeAnswer::NotQueried),
        ]));
        let page = json_of(&answers);
        let states: Vec<_> =
            page["nodes"].as_array().unwrap().iter().map(|it| &it["state"]).collect();
        assert_eq!(states, ["down", "unknown", "unknown"]);
        let failed = |kind: io::ErrorKind| is_remote_failure(&io::Error::from(kind));
        assert!(failed(io::ErrorKind::ConnectionRefused) && failed(io::ErrorKind::TimedOut));
        assert!(!failed(io::ErrorKind::AddrNotAvailable) && !failed(io::ErrorKind::AddrInUse));
        // The process has too many open files.
        assert!(!is_remote_failure(&io::Error::from_raw_os_error(24)));
    }

    #[test]
    fn digests_of_one_moment_are_compared() {
        #[track_caller]
        fn check(replicas: &[(u64, u128)], want: bool) {
            let replicas = (1..).zip(replicas);
            let replicas = replicas.map(|(store, &(seq, digest))| {
                (store, 1, status(seq, digest, RoleStatus::Follower))
            });
            assert_eq!(json_of(&answers(replicas.collect()))["shards"][0]["digests_agree"], want);
        }
        check(&[(9, 1), (9, 1), (9, 1)], true);
        check(&[(9, 1), (8, 2), (9, 1)], true);
        check(&[(9, 1), (8, 2), (9, 3)], false);
        check(&[(9, 1), (8, 2), (8, 3)], false);
        check(&[], true);
    }

    #[test]
    fn before_shards_are_placed_the_page_has_the_reason() {
        let directory = Directory { shards: BTreeMap::new(), ..directory() };
        let page = serde_json::to_value(page("dkc", &directory, &NodeAnswers::default())).unwrap();
        assert_eq!(page["waiting_for"], "1 of 3 nodes");
        assert_eq!(page["shards"], json!([]));
        let unmade = Directory::default();
        let page =
            serde_json::to_value(super::page("dkc", &unmade, &NodeAnswers::default())).unwrap();
        assert_eq!(page["waiting_for"], "etcd, and a coordinator that makes the cluster");
    }
}
