//! The wait of a start for an etcd that it may follow, and its answer meanwhile to a recovery of
//! etcd ([`engine::recovery_plan`]).
//!
//! After a loss of everything no process runs as a node: all of them wait here, and what the stores
//! know is in their logs. So a start that waits listens and answers this one question.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use engine::etcd_memory::EtcdMemory;
use engine::ids::{Boot, Epoch, ShardId, StoreBoot};
use engine::message::{NodeQuery, NodeQueryReply, StoreKnowledge};
use engine::node::RecoveredReplica;
use engine::records::{Meta, StoreRecord, StoreStatus};
use engine::recovery_plan::newer_than_etcd;
use engine::shard_record::ShardRecord;
use metastore::{Error, Metastore};
use process::ProcessExit;
use proto::wire;
use proto::wire::control_server::{Control, ControlServer};
use telemetry::Health;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep, timeout};
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status};
use tracing::{info, warn};

use crate::disk::DiskContents;
use crate::options::NodeSettings;
use crate::start::open::OpenDisk;

/// The time after which a start that still waits answers a recovery of etcd.
const ANSWER_AFTER: Duration = Duration::from_secs(1);
/// The pause between two attempts.
const TRY_EVERY: Duration = Duration::from_millis(100);
/// The pause between two reads of all records of an etcd that is older than the store.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// The longest wait for the connections of such a start to close.
const CLOSE_WITHIN: Duration = Duration::from_secs(1);
/// The interval of log lines about an etcd that is older than the store.
const LOG_EVERY: Duration = Duration::from_secs(60);

/// Waits for the settings of the cluster, in an etcd that the store may follow.
pub(super) async fn await_cluster(
    disk: &mut OpenDisk,
    settings: &NodeSettings,
    metastore: &Metastore,
    health: &Health,
) -> Result<Meta, ProcessExit> {
    let known = disk.contents.etcd.as_ref();
    let newest = AtomicU32::new(known.map_or(0, |memory| memory.promised));
    let shards = disk.contents.replicas.iter();
    let shards = shards.map(|it| (it.shard, it.promised, it.acted_on.clone())).collect();
    let cluster = disk.contents.identity.as_ref().map(|identity| identity.cluster);
    let known = KnownEtcd { cluster, shards };
    let mut reading = std::pin::pin!(read_cluster(metastore, &newest, &known, health));
    if let Ok(meta) = timeout(ANSWER_AFTER, &mut reading).await {
        return meta;
    }
    let (listener, address) = settings.options.listen.bind().await?;
    info!(address, "waiting for an etcd to follow, and answering `dkc recover-etcd`");
    let (questions, mut asked) = mpsc::channel(1);
    let (stop, stopped) = oneshot::channel::<()>();
    let desk = ControlServer::new(RecoveryDesk { questions });
    let server = Server::builder().add_service(proto::limited!(desk));
    let stopped = async { stopped.await.unwrap_or_default() };
    let serving = server.serve_with_incoming_shutdown(TcpIncoming::from(listener), stopped);
    let serving = tokio::spawn(serving);
    let met = loop {
        tokio::select! {
            meta = &mut reading => break meta,
            Some(Question { promise, answer }) = asked.recv() => {
                let before = disk.contents.etcd.clone();
                if let Some(memory) = before.filter(|it| it.promised < promise) {
                    disk.remember(EtcdMemory { promised: promise, ..*memory }).await?;
                    newest.store(promise, Ordering::Relaxed);
                    info!(incarnation = promise, "promised to follow no older etcd");
                }
                // A client that is gone needs no answer.
                let _unheard = answer.send(knowledge(&disk.contents));
            }
        }
    };
    // The node listens there next: a client that is connected must connect again to reach it.
    drop(stop);
    let closing = serving.abort_handle();
    if timeout(CLOSE_WITHIN, serving).await.is_err() {
        closing.abort();
    }
    met
}

/// The part of etcd that the store's log has.
struct KnownEtcd {
    /// The cluster; `None` before the first start.
    cluster: Option<u128>,
    /// The promised epoch of each shard, and the newest record that the store has acted on.
    shards: Vec<(ShardId, Epoch, Option<Box<ShardRecord>>)>,
}

/// Reads the settings until they are those of an etcd that the store may follow: of no lower
/// incarnation than it has promised, and with all that it knows.
async fn read_cluster(
    metastore: &Metastore,
    promised: &AtomicU32,
    known: &KnownEtcd,
    health: &Health,
) -> Result<Meta, ProcessExit> {
    let mut log_at = Instant::now();
    loop {
        let meta = metastore.cluster(|reason| health.not_ready(reason)).await?;
        if known.cluster.is_some_and(|cluster| cluster != meta.cluster) {
            return Ok(meta); // The store does not start there.
        }
        let lacks = match meta.incarnation < promised.load(Ordering::Relaxed) {
            true => Some("the incarnation that this store has promised to follow".to_owned()),
            false => match lacking(metastore, known).await {
                Ok(lacks) => lacks,
                Err(error) if error.is_transient() => {
                    health.not_ready(error.reason());
                    sleep(TRY_EVERY).await;
                    continue;
                }
                Err(error) => return Err(ProcessExit::Failed(format!("etcd: {error}"))),
            },
        };
        let Some(lacks) = lacks else {
            // A promise may have been asked for during the read.
            match meta.incarnation < promised.load(Ordering::Relaxed) {
                true => continue,
                false => return Ok(meta),
            }
        };
        health.not_ready("etcd-is-older");
        if Instant::now() >= log_at {
            log_at = Instant::now() + LOG_EVERY;
            warn!(
                lacks,
                "etcd is older than this store, waiting: it was restored from a snapshot, or its \
                 recovery has not ended. Read \"etcd has lost its majority or its data\" in \
                 docs/runbooks.md"
            );
        }
        sleep(LOOK_EVERY).await;
    }
}

/// Returns what etcd lacks of what the store knows from it, in words.
async fn lacking(metastore: &Metastore, known: &KnownEtcd) -> Result<Option<String>, Error> {
    let listed = metastore.list::<ShardRecord>().await?.all;
    let listed: BTreeMap<_, _> = listed.into_iter().map(|kept| (kept.id, kept.record)).collect();
    let known = known.shards.iter();
    let known = known.map(|(shard, promised, record)| (*shard, *promised, record.as_deref()));
    let newer = newer_than_etcd(known, &listed);
    let first = newer.first();
    Ok(first.map(|first| format!("records of {} shards, the first is {first}", newer.len())))
}

/// Returns what the disk knows of etcd.
fn knowledge(contents: &DiskContents) -> StoreKnowledge {
    let identity = contents.identity.as_ref();
    let from = identity.map_or(StoreBoot::default(), |identity| StoreBoot {
        store: identity.store,
        boot: identity.boot,
    });
    let etcd = contents.etcd.clone().zip(identity).map(|(memory, identity)| {
        // A start that ended early has claimed another boot than it remembers; its disk knows this
        // one for sure.
        let (boot, nonce) = (identity.boot, identity.nonce());
        let status = match contents.is_suspect() {
            true => StoreStatus::Suspect,
            false => memory.store.status,
        };
        let store = StoreRecord { boot: boot.max(Boot(1)), nonce, status, ..memory.store.clone() };
        Box::new(EtcdMemory { store, ..*memory })
    });
    let shards = contents.replicas.iter().map(RecoveredReplica::knowledge);
    // Damage that an earlier start has found may have taken records, too, as long as no other
    // primary has filled the copies since.
    let damaged = contents.is_suspect();
    StoreKnowledge { from, etcd, durable: true, damaged, shards: shards.collect() }
}

/// A question to a start that waits.
struct Question {
    promise: u32,
    answer: oneshot::Sender<StoreKnowledge>,
}

/// The service of a start that waits.
struct RecoveryDesk {
    questions: mpsc::Sender<Question>,
}

#[tonic::async_trait]
impl Control for RecoveryDesk {
    async fn query(
        &self,
        request: Request<wire::NodeQuery>,
    ) -> Result<Response<wire::NodeQueryReply>, Status> {
        let waits = || Status::unavailable("this node is starting, and waits for etcd");
        let NodeQuery::Recover { promise } = proto::query_of(request.into_inner())? else {
            return Err(waits());
        };
        let (answer, answered) = oneshot::channel();
        self.questions.send(Question { promise, answer }).await.map_err(|_| waits())?;
        let knowledge = answered.await.map_err(|_| waits())?;
        Ok(Response::new(NodeQueryReply::Recover(Box::new(knowledge)).into()))
    }
}
