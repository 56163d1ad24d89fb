//! `GET /v1/cluster`: what etcd says, and what the nodes themselves say of their replicas.
//!
//! A node is *up* when it answers, not when its key stands in etcd: a key outlives its process by the lease, and a
//! process its key by any outage of etcd. It is *down* when it refuses or does not answer, and *unknown* when it could not
//! even be asked: that is no news of the node.
//!
//! The page is put together by one task, for everybody who waits for it at once: whoever asks gets a page that was begun
//! after they asked, and a thousand who ask cost one. Two are begun [`EVERY`] apart at least, over connections that are
//! kept: who asks in a loop costs the nodes little, and this gateway no ports.

use std::collections::BTreeMap;
use std::io;
use std::time::Duration;

use bytes::Bytes;
use engine::config::ShardConfig;
use engine::ids::{Seq, ShardId, StoreBoot, StoreId};
use engine::message::{
    NodeQuery, NodeQueryReply, ReplicaStatus, RoleStatus, ScrubStatus, Standing,
};
use engine::records::{LossRecord, StoreRecord, StoreStatus};
use proto::wire;
use proto::wire::control_client::ControlClient;
use serde::Serialize;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};
use tonic::transport::Channel;
use tracing::debug;

use crate::directory::Directory;
use crate::links::endpoint;

/// How long a node may take to tell how it is.
const ASK_WITHIN: Duration = Duration::from_millis(500);

/// The page is made no more often.
const EVERY: Duration = Duration::from_millis(200);

/// Where the page is asked for.
#[derive(Clone)]
pub(crate) struct Board(mpsc::UnboundedSender<oneshot::Sender<Bytes>>);

impl Board {
    /// The board, and the task that fills it.
    pub(crate) fn new(
        cluster: String,
        directory: watch::Receiver<Directory>,
    ) -> (Self, impl Future<Output = ()>) {
        let (sender, mut waiting) = mpsc::unbounded_channel::<oneshot::Sender<Bytes>>();
        let task = async move {
            let mut lines = Lines::default();
            let mut next_at = Instant::now();
            while let Some(first) = waiting.recv().await {
                sleep_until(next_at).await;
                next_at = Instant::now() + EVERY;
                let mut askers = vec![first];
                while let Ok(next) = waiting.try_recv() {
                    askers.push(next);
                }
                let known = directory.borrow().clone();
                let told = lines.ask_all(&known).await;
                let page = page(&cluster, &known, &told);
                let body: Bytes = serde_json::to_vec(&page).expect("a page of plain values").into();
                for asker in askers {
                    // One who has gone meanwhile needs no page.
                    let _gone = asker.send(body.clone());
                }
            }
        };
        (Self(sender), task)
    }

    pub(crate) async fn cluster(&self) -> Bytes {
        let (sender, page) = oneshot::channel();
        let asked = self.0.send(sender);
        match (asked, page.await) {
            (Ok(()), Ok(page)) => page,
            // The process is ending.
            _ => Bytes::from_static(b"{}"),
        }
    }
}

/// What came of asking each node.
#[derive(Clone, Debug, Default)]
struct Told(BTreeMap<StoreId, Answer>);

#[derive(Clone, Debug)]
enum Answer {
    Said(Said),
    /// It refuses, does not answer, or is another store by now.
    Down,
    /// It could not be asked.
    Unasked,
}

impl Told {
    fn said(&self, store: StoreId) -> Option<&Said> {
        match self.0.get(&store)? {
            Answer::Said(said) => Some(said),
            Answer::Down | Answer::Unasked => None,
        }
    }
}

/// What a node said of its replicas, and which run of its store it is.
#[derive(Clone, Debug)]
struct Said {
    from: StoreBoot,
    replicas: BTreeMap<ShardId, ReplicaStatus>,
    scrub: ScrubStatus,
    full: bool,
}

/// The connections to the nodes for these questions, by address.
#[derive(Default)]
struct Lines(BTreeMap<String, ControlClient<Channel>>);

impl Lines {
    async fn ask_all(&mut self, known: &Directory) -> Told {
        let Some(cluster) = known.meta.as_ref().map(|meta| meta.cluster) else {
            return Told::default();
        };
        let mut asking = JoinSet::new();
        let mut kept = std::mem::take(&mut self.0);
        for (store, record) in known.members() {
            let node = known.nodes.get(&store).map(|node| &node.address);
            let address = node.unwrap_or(&record.address).clone();
            let line = kept.remove(&address);
            asking.spawn(async move {
                let (answer, line) = answer(cluster, store, &address, line).await;
                (store, address, answer, line)
            });
        }
        let mut told = Told::default();
        while let Some(answered) = asking.join_next().await {
            let (store, address, answer, line) =
                answered.expect("asking neither panics nor is cancelled");
            told.0.insert(store, answer);
            self.0.extend(line.map(|line| (address, line)));
        }
        told
    }
}

/// What a node says, and the connection to it if it is one to keep.
async fn answer(
    cluster: u128,
    store: StoreId,
    address: &str,
    line: Option<ControlClient<Channel>>,
) -> (Answer, Option<ControlClient<Channel>>) {
    let asking = async {
        if let Some(mut line) = line
            && let Ok(said) = ask(cluster, &mut line).await
        {
            return Ok((said, line));
        }
        // The one that was kept may lead to a process that is no more.
        let mut line = connect(address).await?;
        let said = ask(cluster, &mut line).await.map_err(|why| (Answer::Down, why))?;
        Ok((said, line))
    };
    let (answer, why) = match tokio::time::timeout(ASK_WITHIN, asking).await {
        Ok(Ok((said, line))) if said.from.store == store => {
            return (Answer::Said(said), Some(line));
        }
        Ok(Ok(_)) => (Answer::Down, "another store answered".to_owned()),
        Ok(Err((answer, why))) => (answer, why),
        Err(_) => (Answer::Down, "it did not answer in time".to_owned()),
    };
    debug!(%store, address, why, "no status");
    (answer, None)
}

async fn connect(address: &str) -> Result<ControlClient<Channel>, (Answer, String)> {
    let endpoint = endpoint(address).map_err(|error| (Answer::Unasked, error.to_string()))?;
    let channel = endpoint.connect().await.map_err(|error| {
        let answer = if tells_of_the_node(&error) { Answer::Down } else { Answer::Unasked };
        (answer, error.to_string())
    })?;
    Ok(proto::limited!(ControlClient::new(channel)))
}

/// A connection failed at its other end: not for want of a port, an open file or a name's address here.
fn tells_of_the_node(error: &(dyn std::error::Error + 'static)) -> bool {
    use io::ErrorKind::{
        ConnectionAborted, ConnectionRefused, ConnectionReset, HostUnreachable, TimedOut,
    };
    let failed = std::iter::successors(Some(error), |error| error.source())
        .find_map(|error| error.downcast_ref::<io::Error>());
    failed.is_some_and(|failed| {
        matches!(
            failed.kind(),
            ConnectionRefused | ConnectionReset | ConnectionAborted | HostUnreachable | TimedOut
        )
    })
}

async fn ask(cluster: u128, line: &mut ControlClient<Channel>) -> Result<Said, String> {
    let query = wire::NodeQuery::new(cluster, NodeQuery::Status);
    let reply = line.query(query).await.map_err(|status| status.message().to_owned())?;
    match NodeQueryReply::try_from(reply.into_inner()) {
        Ok(NodeQueryReply::Status { from, replicas, scrub, full }) => {
            let replicas = replicas.into_iter().map(|replica| (replica.shard, replica)).collect();
            Ok(Said { from, replicas, scrub, full })
        }
        Ok(_) => Err("it answered another question".to_owned()),
        Err(invalid) => Err(invalid.to_string()),
    }
}

#[derive(Serialize)]
struct Page<'a> {
    cluster: &'a str,
    incarnation: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    idempotency: Option<Idempotency>,
    nodes: Vec<Node<'a>>,
    shards: Vec<Shard>,
    /// What was given up for good: by an operator with `dkc shards promote … --accept-loss`, or
    /// because all copies of a shard were damaged.
    losses: Vec<Loss>,
    /// Why nothing is placed yet.
    #[serde(skip_serializing_if = "Option::is_none")]
    waiting_for: Option<String>,
}

/// What limits the records of requests with a key.
#[derive(Serialize)]
struct Idempotency {
    window_ms: u64,
    /// Of all shards together, in one copy.
    bytes_max: u64,
}

#[derive(Serialize)]
struct Node<'a> {
    name: String,
    uuid: String,
    boot: u64,
    zone: &'a str,
    address: &'a str,
    state: &'static str,
    /// It refuses writes for want of room, and serves reads.
    disk_full: bool,
    /// None: there was no scrub since it started, or it does not answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    last_scrub: Option<Scrub>,
}

#[derive(Serialize)]
struct Loss {
    shard: u16,
    /// The epoch that began with it.
    epoch: u64,
    /// The copy that leads since, and where its log ended.
    primary: String,
    last: u64,
    given_up: Vec<GivenUp>,
    /// The operator who accepted it, and when. None: all copies of trusted members were damaged, and the best leads.
    by: Option<String>,
    at_ms: Option<u64>,
}

#[derive(Serialize)]
struct GivenUp {
    node: String,
    uuid: String,
    /// The highest position that it was known to hold.
    last: Option<u64>,
}

#[derive(Serialize)]
struct Scrub {
    ended_ms: u64,
    copies: u64,
    /// Shards whose copies were not what had been written.
    damaged: Vec<u16>,
}

#[derive(Serialize)]
struct Shard {
    id: u16,
    slots: [u16; 2],
    epoch: u64,
    version: u64,
    state: &'static str,
    primary: String,
    isr: Vec<String>,
    learners: Vec<String>,
    /// Members and learners that do not acknowledge what the primary sends them, as it says.
    hindered_by: Vec<Hindrance>,
    /// Of requests with a key, as its primary keeps them.
    #[serde(skip_serializing_if = "Option::is_none")]
    records: Option<Records>,
    replicas: Vec<Replica>,
    digests_agree: bool,
}

#[derive(Serialize)]
struct Records {
    count: u64,
    bytes: u64,
    /// Beyond it the shard refuses new keys.
    bytes_max: u64,
}

#[derive(Serialize)]
struct Hindrance {
    node: String,
    standing: &'static str,
}

#[derive(Serialize)]
struct Replica {
    node: String,
    last: u64,
    applied: u64,
    /// Over the counters, 32 hexadecimal digits.
    digest: String,
    digest_at: u64,
    /// The same over sessions and their collection.
    sessions_digest: String,
    /// Why the copy takes nothing more, if so: it is to be filled anew.
    #[serde(skip_serializing_if = "Option::is_none")]
    stopped: Option<String>,
}

fn page<'a>(cluster: &'a str, known: &'a Directory, told: &Told) -> Page<'a> {
    let nodes = known.members().map(|(store, kept)| node(known, told, store, kept)).collect();
    Page {
        cluster,
        incarnation: known.meta.as_ref().map(|meta| meta.incarnation),
        idempotency: known.meta.as_ref().map(|meta| Idempotency {
            window_ms: meta.idempotency.window_ms,
            bytes_max: meta.idempotency.bytes_max,
        }),
        nodes,
        shards: known.shards.values().map(|config| shard(known, told, config)).collect(),
        losses: known.losses.iter().map(|record| loss(known, record)).collect(),
        waiting_for: known.waiting_for(),
    }
}

fn loss(known: &Directory, record: &LossRecord) -> Loss {
    let given_up = |&(store, last): &(StoreId, Option<Seq>)| GivenUp {
        node: known.name(store),
        uuid: store.to_string(),
        last: last.map(|seq| seq.0),
    };
    let operator = record.accepted_by.as_ref();
    Loss {
        shard: record.shard.0,
        epoch: record.epoch.0,
        primary: known.name(record.primary.store),
        last: record.last.1.0,
        given_up: record.given_up.iter().map(given_up).collect(),
        by: operator.map(|operator| operator.name.clone()),
        at_ms: operator.map(|operator| operator.at.0),
    }
}

fn node<'a>(known: &'a Directory, told: &Told, store: StoreId, kept: &'a StoreRecord) -> Node<'a> {
    let state = match (told.0.get(&store), kept.status) {
        (None | Some(Answer::Unasked), _) => "unknown",
        (Some(Answer::Down), _) => "down",
        (_, StoreStatus::Suspect) => "suspect",
        (_, StoreStatus::Draining) => "draining",
        _ if known.draining.contains(&store) => "draining",
        _ => "up",
    };
    let address = known.nodes.get(&store).map_or(&kept.address, |node| &node.address);
    let (name, zone) = (known.name(store), &kept.zone);
    let scrub = told.said(store).map(|said| &said.scrub).filter(|scrub| scrub.has_ended());
    let last_scrub = scrub.map(|scrub| Scrub {
        ended_ms: scrub.ended.0,
        copies: scrub.shards,
        damaged: scrub.damaged.iter().map(|shard| shard.0).collect(),
    });
    let disk_full = told.said(store).is_some_and(|said| said.full);
    let (uuid, boot) = (store.to_string(), kept.boot.0);
    Node { name, uuid, boot, zone, address, state, disk_full, last_scrub }
}

fn shard(known: &Directory, told: &Told, config: &ShardConfig) -> Shard {
    let names = |stores: &[StoreId]| stores.iter().map(|&store| known.name(store)).collect();
    let of = |store: StoreId| told.said(store)?.replicas.get(&config.shard());
    let members = config.isr.iter().chain(&config.learners);
    let statuses: Vec<_> =
        members.filter_map(|&store| Some((known.name(store), of(store)?))).collect();
    // Only what that very run of the store says of that very epoch counts as leading.
    let primary = told.said(config.primary.store).filter(|said| said.from == config.primary);
    let leads = primary.and_then(|said| match &said.replicas.get(&config.shard())?.role {
        RoleStatus::Primary { epoch, open, hindered_by, records } if *epoch == config.epoch => {
            Some((*open, hindered_by, *records))
        }
        _ => None,
    });
    let state = match leads {
        Some((true, ..)) => "open",
        Some((false, ..)) => "frozen",
        None => "no-primary",
    };
    let hindrance = |&(store, standing): &(StoreId, Standing)| Hindrance {
        node: known.name(store),
        standing: standing.name(),
    };
    let hindered_by = leads.map_or(&[][..], |(_, hindered_by, _)| hindered_by);
    Shard {
        id: config.shard().0,
        slots: [config.slots.lo, config.slots.hi],
        epoch: config.epoch.0,
        version: config.version.0,
        state,
        primary: known.name(config.primary.store),
        isr: names(&config.isr),
        learners: names(&config.learners),
        hindered_by: hindered_by.iter().map(hindrance).collect(),
        records: leads.zip(known.meta.as_ref()).map(|((.., kept), meta)| Records {
            count: kept.count,
            bytes: kept.bytes,
            bytes_max: meta.idempotency.bytes_max_of(config.slots),
        }),
        digests_agree: digests_agree(statuses.iter().map(|(_, status)| *status)),
        replicas: statuses.into_iter().map(|(node, status)| replica(node, status)).collect(),
    }
}

fn replica(node: String, status: &ReplicaStatus) -> Replica {
    Replica {
        node,
        last: status.last.0,
        applied: status.applied.0,
        digest: format!("{:032x}", status.digest.counters),
        digest_at: status.digest.seq.0,
        sessions_digest: format!("{:032x}", status.digest.sessions),
        stopped: status.stopped.clone(),
    }
}

/// Digests of different moments can't be compared, so those say nothing.
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
    fn known() -> Directory {
        let boot = StoreBoot { store: StoreId(1), boot: Boot(2) };
        let config = ShardConfig {
            slots: Slots { lo: 0, hi: 65_535 },
            epoch: Epoch(3),
            version: Version(9),
            primary: boot,
            isr: vec![StoreId(1), StoreId(2)],
            learners: vec![StoreId(3)],
            ..ShardConfig::default()
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
                idempotency: engine::idempotency::Settings::default(),
            }),
            stores: BTreeMap::from([
                (StoreId(1), store("node-1", 2, StoreStatus::Active)),
                (StoreId(2), store("node-2", 1, StoreStatus::Active)),
                (StoreId(3), store("node-3", 1, StoreStatus::Suspect)),
                (StoreId(4), store("node-4", 1, StoreStatus::Lost)),
            ]),
            nodes: BTreeMap::from([(StoreId(1), node)]),
            shards: BTreeMap::from([(ShardId(0), config)]),
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

    fn told(replicas: Vec<(u128, u64, ReplicaStatus)>) -> Told {
        let one = |(store, boot, status): (u128, u64, ReplicaStatus)| {
            let store = StoreId(store);
            let from = StoreBoot { store, boot: Boot(boot) };
            let replicas = BTreeMap::from([(ShardId(0), status)]);
            let scrub = ScrubStatus::default();
            (store, Answer::Said(Said { from, replicas, scrub, full: store.0 == 3 }))
        };
        Told(replicas.into_iter().map(one).collect())
    }

    fn leads(epoch: u64, open: bool) -> RoleStatus {
        let hindered_by = vec![(StoreId(3), Standing::Full)];
        let records = RecordsKept { count: 5, bytes: 400 };
        RoleStatus::Primary { epoch: Epoch(epoch), open, hindered_by, records }
    }

    fn json_of(told: &Told) -> Value {
        serde_json::to_value(page("dkc", &known(), told)).unwrap()
    }

    #[test]
    fn the_page_is_as_the_contract_says() {
        let told = told(vec![
            (1, 2, status(9, 0xab, leads(3, true))),
            (2, 1, status(9, 0xab, RoleStatus::Follower)),
            (3, 1, status(5, 1, RoleStatus::Follower)),
        ]);
        let digest = |digits: &str| format!("{digits:0>32}");
        let settings = engine::idempotency::Settings::default();
        let want = json!({
            "cluster": "dkc", "incarnation": 4,
            "idempotency": {"window_ms": settings.window_ms, "bytes_max": settings.bytes_max},
            "nodes": [
                {"name": "node-1", "uuid": digest("1"), "boot": 2, "zone": "a", "address": "elsewhere:1", "state": "up",
                 "disk_full": false},
                {"name": "node-2", "uuid": digest("2"), "boot": 1, "zone": "a", "address": "node-2:1", "state": "draining",
                 "disk_full": false},
                {"name": "node-3", "uuid": digest("3"), "boot": 1, "zone": "a", "address": "node-3:1", "state": "suspect",
                 "disk_full": true}],
            "shards": [{"id": 0, "slots": [0, 65535], "epoch": 3, "version": 9, "state": "open", "primary": "node-1",
                "isr": ["node-1", "node-2"], "learners": ["node-3"],
                "hindered_by": [{"node": "node-3", "standing": "disk-full"}], "records": {"count": 5, "bytes": 400, "bytes_max": settings.bytes_max},
                "digests_agree": true, "replicas": [
                    {"node": "node-1", "last": 10, "applied": 9, "digest": digest("ab"), "digest_at": 9,
                     "sessions_digest": digest("0")},
                    {"node": "node-2", "last": 10, "applied": 9, "digest": digest("ab"), "digest_at": 9,
                     "sessions_digest": digest("0")},
                    {"node": "node-3", "last": 6, "applied": 5, "digest": digest("1"), "digest_at": 5,
                     "sessions_digest": digest("0")}]}],
            "losses": [],
        });
        assert_eq!(json_of(&told), want);
    }

    #[test]
    fn what_operators_gave_up_stays_on_the_page() {
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
        let known = Directory { losses: vec![loss, by_itself], ..known() };
        let page = serde_json::to_value(page("dkc", &known, &Told::default())).unwrap();
        let uuid = |digit: &str| format!("{digit:0>32}");
        let want = json!([{"shard": 0, "epoch": 4, "primary": "node-2", "last": 20, "at_ms": 7, "by": "me@here",
            "given_up": [{"node": "node-1", "uuid": uuid("1"), "last": 25},
                {"node": "node-4", "uuid": uuid("4"), "last": null}]},
            {"shard": 0, "epoch": 6, "primary": "node-2", "last": 20, "at_ms": null, "by": null, "given_up": []}]);
        assert_eq!(page["losses"], want);
    }

    /// An empty store has the name of one that is away, and that shards wait for: it must not look as if that were up.
    #[test]
    fn of_two_stores_with_one_name_the_one_that_is_away_bears_its_number() {
        let mut known = known();
        let namesake = store("node-2", 1, StoreStatus::Active);
        known.stores.insert(StoreId(9), namesake);
        known.nodes.insert(StoreId(9), known.nodes[&StoreId(1)].clone());
        let told = Told::default();
        let page = serde_json::to_value(page("dkc", &known, &told)).unwrap();
        assert_eq!(page["shards"][0]["isr"], json!(["node-1", "node-2@00000000"]));
        let names: Vec<_> =
            page["nodes"].as_array().unwrap().iter().map(|node| &node["name"]).collect();
        assert_eq!(names, ["node-1", "node-2@00000000", "node-3", "node-2"]);
    }

    #[test]
    fn only_the_primary_of_this_epoch_and_boot_opens_a_shard() {
        #[track_caller]
        fn check(told: &Told, want: &str) {
            assert_eq!(json_of(told)["shards"][0]["state"], want);
        }
        let one = |boot, role| told(vec![(1, boot, status(9, 1, role))]);
        check(&one(2, leads(3, true)), "open");
        check(&one(2, leads(3, false)), "frozen");
        check(&one(2, leads(2, true)), "no-primary");
        check(&one(2, RoleStatus::Follower), "no-primary");
        check(&one(3, leads(3, true)), "no-primary");
        check(&Told::default(), "no-primary");
    }

    /// That a node could not be asked is no news of it.
    #[test]
    fn a_node_is_down_by_its_own_word_or_silence_alone() {
        let told =
            Told(BTreeMap::from([(StoreId(1), Answer::Down), (StoreId(2), Answer::Unasked)]));
        let page = json_of(&told);
        let states: Vec<_> =
            page["nodes"].as_array().unwrap().iter().map(|it| &it["state"]).collect();
        assert_eq!(states, ["down", "unknown", "unknown"]);
        let failed = |kind: io::ErrorKind| tells_of_the_node(&io::Error::from(kind));
        assert!(failed(io::ErrorKind::ConnectionRefused) && failed(io::ErrorKind::TimedOut));
        assert!(!failed(io::ErrorKind::AddrNotAvailable) && !failed(io::ErrorKind::AddrInUse));
        // As for want of open files.
        assert!(!tells_of_the_node(&io::Error::from_raw_os_error(24)));
    }

    #[test]
    fn digests_of_one_moment_are_compared() {
        #[track_caller]
        fn check(replicas: &[(u64, u128)], want: bool) {
            let replicas = (1..).zip(replicas);
            let replicas = replicas.map(|(store, &(seq, digest))| {
                (store, 1, status(seq, digest, RoleStatus::Follower))
            });
            assert_eq!(json_of(&told(replicas.collect()))["shards"][0]["digests_agree"], want);
        }
        check(&[(9, 1), (9, 1), (9, 1)], true);
        check(&[(9, 1), (8, 2), (9, 1)], true);
        check(&[(9, 1), (8, 2), (9, 3)], false);
        check(&[(9, 1), (8, 2), (8, 3)], false);
        check(&[], true);
    }

    #[test]
    fn before_anything_is_placed_it_says_what_it_waits_for() {
        let known = Directory { shards: BTreeMap::new(), ..known() };
        let page = serde_json::to_value(page("dkc", &known, &Told::default())).unwrap();
        assert_eq!(page["waiting_for"], "1 of 3 nodes");
        assert_eq!(page["shards"], json!([]));
        let unmade = Directory::default();
        let page = serde_json::to_value(super::page("dkc", &unmade, &Told::default())).unwrap();
        assert_eq!(page["waiting_for"], "etcd, and a coordinator that makes the cluster");
    }
}
