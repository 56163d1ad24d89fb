//! This node's requests to etcd and its watches.
//!
//! The state machine's requests ([`EtcdClient::perform`]) are calls of one attempt each: a
//! transaction whose answer was lost is reported as unknown and never sent again, and the state
//! machine settles it. Three kinds of records are watched: shards for the state machine, `node/`
//! and `store/` for dialling peers. Everything may arrive late, so its users compare versions.
//!
//! A running process stops following an etcd whose history went back: the metastore gives no
//! answers then, and the node goes on with its last knowledge until it is restarted.

use engine::ids::{Boot, Revision, SessionId, ShardId, StoreBoot, StoreId};
use engine::node::{CasOutcome, Event};
use engine::records::{GatewayRecord, NodeRecord, StoreRecord};
use engine::shard_record::ShardRecord;
use metastore::{Followed, Metastore, Revisioned, WatchChange, WatchEvent, WatchSettings};
use process::ProcessExit;
use telemetry::CriticalTasks;
use tokio::runtime::Handle;
use tracing::{debug, error, warn};

use crate::inbox::{Inbox, LoopMessage};
use crate::names::StoreNames;
use crate::peers::{PeerAddress, Peers};
use crate::readiness::NodeReadiness;

/// The client of this node. Clones are cheap.
#[derive(Clone)]
pub struct EtcdClient {
    metastore: Metastore,
    inbox: Inbox,
    tasks: CriticalTasks,
    runtime: Handle,
    /// The incarnation of the etcd that this process began with.
    incarnation: u32,
}

impl EtcdClient {
    /// Creates a client. Must be called within a runtime.
    pub fn new(metastore: Metastore, inbox: Inbox, tasks: CriticalTasks, incarnation: u32) -> Self {
        let runtime = Handle::current();
        Self { metastore, inbox, tasks, runtime, incarnation }
    }

    /// Performs a call of this client in a task and sends its event, if there is one, to the loop.
    /// Never waits.
    pub fn perform<F>(&self, call: impl FnOnce(Self) -> F)
    where
        F: Future<Output = Option<Event>> + Send + 'static,
    {
        let (inbox, call) = (self.inbox.clone(), call(self.clone()));
        self.runtime.spawn(self.tasks.job("a request to etcd", async move {
            if let Some(event) = call.await {
                inbox.send_event(event);
            }
        }));
    }

    /// Performs `Effect::ReadRecord`. Returns `None` if the read failed: the state machine reads
    /// again if it still needs the record.
    pub async fn read_record(self, read: u64, shard: ShardId) -> Option<Event> {
        match self.metastore.get::<ShardRecord>(&shard).await {
            Ok(kept) => kept.map(|kept| record_event(kept, Some(read))),
            Err(error) => {
                debug!(%shard, %error, "could not read shard record");
                None
            }
        }
    }

    /// Performs `Effect::Propose`: replaces a shard's record by compare-and-set.
    pub async fn propose(
        self,
        proposal: u64,
        expect: u64,
        record: ShardRecord,
        candidate: Option<(StoreId, u64)>,
    ) -> Option<Event> {
        let outcome = self.replace(expect, &record, candidate).await;
        Some(Event::Proposed { proposal, outcome })
    }

    /// Performs `Effect::ProposeSplit`: writes the records of both children of a split.
    pub async fn propose_split(
        self,
        proposal: u64,
        expect: u64,
        left: ShardRecord,
        right: ShardRecord,
    ) -> Option<Event> {
        let outcome = if expect == 0 || !self.metastore.is_followed() {
            CasOutcome::Failed
        } else {
            let written = self.metastore.split_shard(&left, expect, &right).await;
            written.unwrap_or_else(|error| {
                warn!(shard = %left.shard(), %error, "etcd refused the split of a shard");
                CasOutcome::Failed
            })
        };
        Some(Event::Proposed { proposal, outcome })
    }

    async fn replace(
        &self,
        expect: u64,
        record: &ShardRecord,
        candidate: Option<(StoreId, u64)>,
    ) -> CasOutcome {
        // Revisions begin at 1: a 0 stands for a record, or a key, that was never read.
        let names_nothing = expect == 0 || candidate.is_some_and(|(_, created)| created == 0);
        if names_nothing || !self.metastore.is_followed() {
            return CasOutcome::Failed;
        }
        // An error means that the transaction was not applied.
        self.metastore.cas_shard(record, expect, candidate).await.unwrap_or_else(|error| {
            warn!(shard = %record.shard(), %error, "etcd refused a shard record change");
            CasOutcome::Failed
        })
    }

    /// Performs `Effect::CheckEtcd`: reads shard records to prove that etcd still confirms this
    /// node's leadership.
    pub async fn check(self, check: u64, shards: Vec<ShardId>) -> Option<Event> {
        // One read covers all shards: it is linearizable as a whole, and etcd orders it once.
        let records = match self.metastore.list::<ShardRecord>().await {
            Ok(listed) => {
                let asked = listed.all.into_iter().filter(|kept| shards.contains(&kept.id));
                Some(asked.map(|kept| kept.record).collect())
            }
            Err(error) => {
                debug!(%error, "etcd did not answer a read proof");
                None
            }
        };
        Some(Event::EtcdChecked { check, records })
    }

    /// Performs `Effect::ListSessions`.
    pub async fn list_sessions(self) -> Option<Event> {
        let listed = match self.metastore.list::<GatewayRecord>().await {
            Ok(listed) => listed,
            Err(error) => {
                debug!(%error, "could not list sessions");
                return None;
            }
        };
        let incarnation = self.incarnation;
        let at = |revision| Revision { incarnation, revision };
        let alive = listed.all.iter().map(|kept| SessionId(at(kept.created))).collect();
        Some(Event::SessionsListed { at: at(listed.revision), alive })
    }
}

fn record_event(kept: Revisioned<ShardRecord>, read: Option<u64>) -> Event {
    Event::ShardRecord { record: kept.record, mod_revision: kept.modified, read }
}

/// The watches of this node and their consumers.
pub struct EtcdFollower {
    /// The client, whose loop gets the events.
    pub etcd: EtcdClient,
    /// The store and the boot of this process.
    pub me: StoreBoot,
    /// The peers to be dialled.
    pub peers: Peers,
    /// The names of stores.
    pub names: StoreNames,
    /// The readiness of this node.
    pub readiness: NodeReadiness,
}

impl EtcdFollower {
    /// Follows the records for as long as etcd's history goes on; never returns.
    pub async fn run(mut self) {
        let metastore = self.etcd.metastore.clone();
        let mut shards = metastore.watch::<ShardRecord>(WatchSettings::default());
        let mut nodes = metastore.follow::<NodeRecord>();
        let mut stores = metastore.follow::<StoreRecord>();
        loop {
            let goes_on = tokio::select! {
                event = shards.next() => self.shards(event),
                goes_on = nodes.next() => {
                    self.nodes(&mut nodes);
                    goes_on
                }
                goes_on = stores.next() => {
                    self.stores(&mut stores);
                    goes_on
                }
            };
            if !goes_on {
                self.readiness.not_ready_again("etcd-went-back");
                return std::future::pending().await;
            }
        }
    }

    /// Passes on an event of the shard records, of which no copy is kept. Returns false if etcd's
    /// history went back.
    fn shards(&self, event: Option<WatchEvent<ShardRecord>>) -> bool {
        match event {
            Some(WatchEvent::All(listed)) => {
                for kept in listed.all {
                    self.etcd.inbox.send_event(record_event(kept, None));
                }
                self.etcd.inbox.send(LoopMessage::ShardsListed);
            }
            Some(WatchEvent::Change(WatchChange::Changed(kept))) => {
                self.etcd.inbox.send_event(record_event(kept, None));
            }
            Some(WatchEvent::Change(WatchChange::Deleted { id, .. })) => {
                error!(shard = %id, "shard record deleted");
            }
            Some(WatchEvent::WentBack(_)) | None => return false,
        }
        true
    }

    fn nodes(&mut self, nodes: &mut Followed<NodeRecord>) {
        let peer =
            |kept: &Revisioned<NodeRecord>| StoreBoot { store: kept.id, boot: kept.record.boot };
        for kept in nodes.take_changed().filter_map(|(_, kept)| kept) {
            let address = kept.record.address.clone();
            self.peers.note(PeerAddress { peer: peer(kept), address });
        }
        let keys = nodes.all().map(|kept| (peer(kept), kept.created)).collect();
        self.etcd.inbox.send_event(Event::PeersRegistered(keys));
    }

    fn stores(&mut self, stores: &mut Followed<StoreRecord>) {
        for (id, kept) in stores.take_changed() {
            match kept {
                Some(kept) => self.stored(kept),
                None => warn!(store = %id, "store record deleted"),
            }
        }
    }

    fn stored(&mut self, kept: &Revisioned<StoreRecord>) {
        let record = &kept.record;
        let peer = StoreBoot { store: kept.id, boot: record.boot };
        self.names.note(kept.id, &record.name);
        if kept.id == self.me.store {
            if record.boot > self.me.boot {
                self.etcd.inbox.send(LoopMessage::Exit(newer_boot(peer)));
            }
            return;
        }
        match record.status {
            status if status.is_gone() => self.peers.forget(kept.id),
            // A store that never ran has no address worth dialling.
            _ if record.boot == Boot(0) => {}
            _ => self.peers.note(PeerAddress { peer, address: record.address.clone() }),
        }
    }
}

/// Returns the reason for the end of a process whose store has begun a newer boot.
pub(crate) fn newer_boot(newer: StoreBoot) -> ProcessExit {
    let StoreBoot { store, boot } = newer;
    ProcessExit::Refused(format!("boot {} of store {store} has begun elsewhere", boot.0))
}
