//! What this node asks of etcd and hears from it.
//!
//! Two directions. The machine's wishes ([`Etcd::perform`]) are calls of one try each: a transaction whose answer was
//! lost is told as unknown, never sent again, and it is the machine that settles it. And three kinds of records are
//! followed: shards for the machine, `node/` and `store/` for whoever dials peers. All of it may come late; whoever acts
//! on it compares.
//!
//! An etcd whose history went back is not followed any more by a running process (DESIGN §5): the metastore gives no
//! answers then, and the node goes on with what it knew until it is restarted.

use std::collections::BTreeMap;

use engine::config::ShardConfig;
use engine::ids::{Boot, Revision, SessionId, ShardId, StoreBoot, StoreId};
use engine::node::{CasOutcome, Event};
use engine::records::{GatewayRecord, NodeRecord, StoreRecord};
use metastore::{Kept, Metastore, Outcome, Record, Watch, WatchEvent, WatchSettings};
use telemetry::Vital;
use tokio::runtime::Handle;
use tracing::{debug, error, warn};

use crate::exit::Exit;
use crate::inbox::{Inbox, Told};
use crate::names::Names;
use crate::peers::{Peers, Target};
use crate::readiness::Readiness;

/// What the machine can ask of etcd.
#[derive(Debug)]
pub enum Wish {
    ReadConfig { read: u64, shard: ShardId },
    Propose { proposal: u64, expect: u64, config: ShardConfig, candidate: Option<(StoreId, u64)> },
    CheckEtcd { check: u64, shards: Vec<ShardId> },
    ListSessions,
}

/// The calls that this node makes. Cheap to clone.
#[derive(Clone)]
pub struct Etcd {
    metastore: Metastore,
    inbox: Inbox,
    vital: Vital,
    runtime: Handle,
    /// Of the etcd that this process began with.
    incarnation: u32,
}

impl std::fmt::Debug for Etcd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Etcd(incarnation {})", self.incarnation)
    }
}

impl Etcd {
    /// Within a runtime.
    pub fn new(metastore: Metastore, inbox: Inbox, vital: Vital, incarnation: u32) -> Self {
        let runtime = Handle::current();
        Self { metastore, inbox, vital, runtime, incarnation }
    }

    /// Asks, and tells the loop what came of it. Never waits.
    pub fn perform(&self, wish: Wish) {
        let etcd = self.clone();
        self.runtime.spawn(self.vital.job("a question to etcd", etcd.ask(wish)));
    }

    async fn ask(self, wish: Wish) {
        let event = match wish {
            Wish::ReadConfig { read, shard } => self.read_config(read, shard).await,
            Wish::Propose { proposal, expect, config, candidate } => {
                let outcome = self.propose(expect, &config, candidate).await;
                Some(Event::Proposed { proposal, outcome })
            }
            Wish::CheckEtcd { check, shards } => {
                Some(Event::EtcdChecked { check, configs: self.check(&shards).await })
            }
            Wish::ListSessions => self.list_sessions().await,
        };
        if let Some(event) = event {
            self.inbox.event(event);
        }
    }

    /// None: the machine asks again when it still wants to know.
    async fn read_config(&self, read: u64, shard: ShardId) -> Option<Event> {
        match self.metastore.get::<ShardConfig>(&shard).await {
            Ok(kept) => kept.map(|kept| config_event(kept, Some(read))),
            Err(error) => {
                debug!(%shard, %error, "shard record not read");
                None
            }
        }
    }

    async fn propose(
        &self,
        expect: u64,
        config: &ShardConfig,
        candidate: Option<(StoreId, u64)>,
    ) -> CasOutcome {
        // Revisions begin at 1: these name a record, or a key, that was never read.
        let names_nothing = expect == 0 || candidate.is_some_and(|(_, created)| created == 0);
        if names_nothing || !self.metastore.is_followed() {
            return CasOutcome::Failed;
        }
        let outcome = self.metastore.cas_shard(config, expect, candidate).await;
        match outcome {
            Ok(Outcome::Done { revision }) => CasOutcome::Done { mod_revision: revision },
            Ok(Outcome::Failed) => CasOutcome::Failed,
            Ok(Outcome::Unknown) => CasOutcome::Unknown,
            // It surely had no effect.
            Err(error) => {
                warn!(shard = %config.shard(), %error, "change of a shard refused by etcd");
                CasOutcome::Failed
            }
        }
    }

    async fn check(&self, shards: &[ShardId]) -> Option<Vec<ShardConfig>> {
        // One read for all of them: linearizable as a whole, and etcd orders it once.
        let listed = self.metastore.list::<ShardConfig>().await;
        match listed {
            Ok(listed) => {
                let asked = listed.all.into_iter().filter(|kept| shards.contains(&kept.id));
                Some(asked.map(|kept| kept.record).collect())
            }
            Err(error) => {
                debug!(%error, "etcd was asked to prove a read and did not answer");
                None
            }
        }
    }

    async fn list_sessions(&self) -> Option<Event> {
        let listed = match self.metastore.list::<GatewayRecord>().await {
            Ok(listed) => listed,
            Err(error) => {
                debug!(%error, "sessions not listed");
                return None;
            }
        };
        let incarnation = self.incarnation;
        let at = |revision| Revision { incarnation, revision };
        let alive = listed.all.iter().map(|kept| SessionId(at(kept.created))).collect();
        Some(Event::SessionsListed { at: at(listed.revision), alive })
    }
}

fn config_event(kept: Kept<ShardConfig>, read: Option<u64>) -> Event {
    Event::Config { config: kept.record, mod_revision: kept.modified, read }
}

/// Everything that is followed.
pub struct Followed {
    pub etcd: Etcd,
    pub me: StoreBoot,
    pub peers: Peers,
    pub names: Names,
    pub readiness: Readiness,
}

/// What was heard, whichever record it was about.
enum Heard {
    Shard(WatchEvent<ShardConfig>),
    Node(WatchEvent<NodeRecord>),
    Store(WatchEvent<StoreRecord>),
    /// A watch has ended by itself, which it does only after etcd's history went back.
    Ended,
}

impl Followed {
    /// Follows the records for as long as etcd's history goes on; never returns.
    pub async fn run(mut self) {
        let metastore = self.etcd.metastore.clone();
        let mut shards = metastore.watch::<ShardConfig>(WatchSettings::default());
        let mut nodes = metastore.watch::<NodeRecord>(WatchSettings::default());
        let mut stores = metastore.watch::<StoreRecord>(WatchSettings::default());
        let mut keys = BTreeMap::new();
        loop {
            let heard = tokio::select! {
                event = next(&mut shards, Heard::Shard) => event,
                event = next(&mut nodes, Heard::Node) => event,
                event = next(&mut stores, Heard::Store) => event,
            };
            match heard {
                Heard::Shard(event) => self.shard(event),
                Heard::Node(event) => self.node(event, &mut keys),
                Heard::Store(event) => self.store(event),
                Heard::Ended => return std::future::pending().await,
            }
        }
    }

    fn shard(&self, event: WatchEvent<ShardConfig>) {
        match event {
            WatchEvent::All(listed) => {
                for kept in listed.all {
                    self.etcd.inbox.event(config_event(kept, None));
                }
                self.etcd.inbox.tell(Told::ShardsListed);
            }
            WatchEvent::Changed(kept) => {
                self.etcd.inbox.event(config_event(kept, None));
            }
            WatchEvent::Deleted { id, .. } => error!(shard = %id, "a shard's record was deleted"),
            WatchEvent::WentBack { was, now } => self.went_back(was, now),
        }
    }

    fn node(
        &mut self,
        event: WatchEvent<NodeRecord>,
        keys: &mut BTreeMap<StoreId, (StoreBoot, u64)>,
    ) {
        match event {
            WatchEvent::All(listed) => {
                keys.clear();
                listed.all.into_iter().for_each(|kept| self.registered(kept, keys));
            }
            WatchEvent::Changed(kept) => self.registered(kept, keys),
            WatchEvent::Deleted { id, .. } => {
                keys.remove(&id);
            }
            WatchEvent::WentBack { was, now } => return self.went_back(was, now),
        }
        self.etcd.inbox.event(Event::Peers(keys.values().copied().collect()));
    }

    fn registered(
        &mut self,
        kept: Kept<NodeRecord>,
        keys: &mut BTreeMap<StoreId, (StoreBoot, u64)>,
    ) {
        let peer = StoreBoot { store: kept.id, boot: kept.record.boot };
        keys.insert(kept.id, (peer, kept.created));
        self.peers.meet(Target { peer, address: kept.record.address });
    }

    fn store(&mut self, event: WatchEvent<StoreRecord>) {
        match event {
            WatchEvent::All(listed) => listed.all.into_iter().for_each(|kept| self.stored(kept)),
            WatchEvent::Changed(kept) => self.stored(kept),
            WatchEvent::Deleted { id, .. } => warn!(store = %id, "a store's record was deleted"),
            WatchEvent::WentBack { was, now } => self.went_back(was, now),
        }
    }

    fn stored(&mut self, kept: Kept<StoreRecord>) {
        let record = kept.record;
        let peer = StoreBoot { store: kept.id, boot: record.boot };
        self.names.note(kept.id, &record.name);
        if kept.id == self.me.store {
            if record.boot > self.me.boot {
                self.etcd.inbox.tell(Told::Exit(Exit::NewerBoot(peer)));
            }
            return;
        }
        match record.status {
            status if status.is_gone() => self.peers.forget(kept.id),
            // A store that never ran has no address worth dialling.
            _ if record.boot == Boot(0) => {}
            _ => self.peers.meet(Target { peer, address: record.address }),
        }
    }

    fn went_back(&self, was: u64, now: u64) {
        error!(
            was,
            now,
            "etcd's history went back, so it is not followed any more: read \"Back up etcd\" in docs/operations.md"
        );
        self.readiness.over("etcd-went-back");
    }
}

async fn next<R: Record>(watch: &mut Watch<R>, heard: impl Fn(WatchEvent<R>) -> Heard) -> Heard {
    watch.next().await.map_or(Heard::Ended, heard)
}
