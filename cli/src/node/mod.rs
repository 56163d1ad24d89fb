//! `dkc node list|drain|undrain|remove`: the storage nodes of a cluster, and how they leave it.
//!
//! The commands work on the records in etcd. What an operator wants is written as an intent, and
//! the leading coordinator carries it out: nothing is moved by a command itself.

pub(crate) mod drain;
mod list;
pub(crate) mod remove;

use std::collections::BTreeSet;

use engine::coordinator::planner::{Store, StoreState};
use engine::ids::StoreId;
use engine::records::{Meta, NodeRecord, StoreRecord, StoreStatus};
use engine::shard_record::ShardRecord;
use metastore::{DrainIntent, Metastore, Revisioned};

use crate::etcd::store_named;
use crate::exit::{CommandExit, UsageError};

/// Options of `dkc node`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: NodeCommand,
}

#[derive(Debug, clap::Subcommand)]
enum NodeCommand {
    /// List the storage nodes, with their states and what they hold
    List(list::Args),
    /// Move all shards off a node, so that it can be shut down
    Drain(drain::Args),
    /// Cancel the drain of a node: it may hold shards again
    Undrain(drain::UndrainArgs),
    /// Take a node that was drained and stopped out of the cluster
    Remove(remove::Args),
}

/// Runs one of the commands.
pub(crate) async fn run(args: Args) -> anyhow::Result<CommandExit> {
    match args.command {
        NodeCommand::List(args) => list::run(args).await,
        NodeCommand::Drain(args) => drain::run(args).await,
        NodeCommand::Undrain(args) => drain::undo(args).await,
        NodeCommand::Remove(args) => remove::run(args).await,
    }
}

/// The records of etcd that concern nodes, each kind as it was read.
pub(crate) struct NodeRecords {
    pub(crate) stores: Vec<Revisioned<StoreRecord>>,
    nodes: Vec<Revisioned<NodeRecord>>,
    drains: BTreeSet<StoreId>,
    shards: Vec<ShardRecord>,
}

/// The numbers of shards that a store leads, and of which it has a copy.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) struct StoreHoldings {
    leads: usize,
    /// The copies that the store has or is to have, in sync or not.
    pub(crate) copies: usize,
    in_sync: usize,
}

impl NodeRecords {
    pub(crate) async fn read(metastore: &Metastore) -> Result<Self, metastore::Error> {
        let drains = metastore.list::<DrainIntent>().await?.all;
        let shards = metastore.list::<ShardRecord>().await?.all;
        Ok(Self {
            stores: metastore.list::<StoreRecord>().await?.all,
            nodes: metastore.list::<NodeRecord>().await?.all,
            drains: drains.into_iter().map(|kept| kept.id).collect(),
            shards: shards.into_iter().map(|kept| kept.record).collect(),
        })
    }

    /// Returns the one store that `node`, a name or a uuid, denotes.
    fn named(&self, node: &str) -> Result<&Revisioned<StoreRecord>, UsageError> {
        store_named(&self.stores, node)
    }

    pub(crate) fn runs(&self, store: StoreId) -> bool {
        self.nodes.iter().any(|kept| kept.id == store)
    }

    pub(crate) fn holds(&self, store: StoreId) -> StoreHoldings {
        holdings(&self.shards, store)
    }

    /// The stores as the planner sees them, as far as etcd shows it.
    fn planner_stores(&self) -> Vec<Store> {
        let state = |kept: &Revisioned<StoreRecord>| match kept.record.status {
            status if status.is_gone() => StoreState::Gone,
            _ if self.drains.contains(&kept.id) => StoreState::Draining,
            _ if !self.runs(kept.id) => StoreState::Away,
            StoreStatus::Suspect => StoreState::Suspect,
            StoreStatus::Draining => StoreState::Draining,
            _ => StoreState::Ready,
        };
        let store = |kept: &Revisioned<StoreRecord>| Store {
            id: kept.id,
            zone: kept.record.zone.clone(),
            host: kept.record.host.clone(),
            capacity: 0,
            state: state(kept),
        };
        self.stores.iter().map(store).collect()
    }
}

/// Counts the shards that a store leads, and those of which it holds a copy or is to hold one.
fn holdings(shards: &[ShardRecord], store: StoreId) -> StoreHoldings {
    let count = |holds: &dyn Fn(&&ShardRecord) -> bool| shards.iter().filter(holds).count();
    StoreHoldings {
        leads: count(&|shard| shard.primary.store == store),
        copies: count(&|shard| shard.mentions(store)),
        in_sync: count(&|shard| shard.isr.contains(&store)),
    }
}

/// Reads the number of copies of each shard; `None` before the cluster is made.
async fn replicas(metastore: &Metastore) -> Result<Option<usize>, metastore::Error> {
    let meta = metastore.get::<Meta>(&()).await?;
    Ok(meta.map(|kept| usize::from(kept.record.replicas)))
}

#[cfg(test)]
mod tests {
    use engine::ids::{Boot, Slots, StoreBoot};
    use engine::shard_record;

    use super::*;

    pub(super) fn store(id: u128, name: &str, status: StoreStatus) -> Revisioned<StoreRecord> {
        let record = StoreRecord {
            name: name.into(),
            address: "127.0.0.1:1".into(),
            zone: String::new(),
            host: String::new(),
            boot: Boot(1),
            nonce: 1,
            status,
        };
        Revisioned { id: StoreId(id), record, created: 1, modified: 1, lease: 0 }
    }

    pub(super) fn records(stores: &[Revisioned<StoreRecord>]) -> NodeRecords {
        let (drains, stores) = (BTreeSet::new(), stores.to_vec());
        NodeRecords { stores, nodes: vec![], drains, shards: vec![] }
    }

    /// Checks which of these stores a name or uuid denotes; 0 for none or several.
    #[track_caller]
    fn check(stores: &[Revisioned<StoreRecord>], word: &str, want: u128) {
        let records = records(stores);
        let found = records.named(word).map_or(0, |kept| kept.id.0);
        assert_eq!(found, want, "{word}");
    }

    /// A lost store holds nothing. If it were taken for the running store of the same name, the
    /// drain would appear complete at once, and the machine with the data would be shut down.
    #[test]
    fn a_name_means_the_store_that_is_not_gone() {
        let uuid = |number: u128| format!("{number:032x}");
        for gone in [StoreStatus::Lost, StoreStatus::LostSuspect, StoreStatus::Retired] {
            for running in [StoreStatus::Active, StoreStatus::Draining, StoreStatus::Suspect] {
                let both = [store(1, "node-2", gone), store(2, "node-2", running)];
                check(&both, "node-2", 2);
                let both = [store(1, "node-2", running), store(2, "node-2", gone)];
                check(&both, "node-2", 1);
                check(&both, &uuid(1), 1);
                check(&both, &uuid(2), 0);
            }
            check(&[store(1, "node-2", gone)], "node-2", 0);
        }
        check(&[store(1, "node-2", StoreStatus::Active)], "node-3", 0);
        // One store is down but still needed, and a new store has its name.
        let both = [1, 2].map(|id| store(id, "node-2", StoreStatus::Active));
        check(&both, "node-2", 0);
        check(&both, &uuid(2), 2);
    }

    #[test]
    fn a_copy_counts_from_the_plan_to_the_release() {
        let shard = |isr: &[u128], learners: &[u128], target: &[u128]| {
            let ids = |all: &[u128]| all.iter().copied().map(StoreId).collect::<Vec<_>>();
            ShardRecord {
                slots: Slots { lo: 0, hi: 9 },
                primary: StoreBoot { store: StoreId(isr[0]), boot: Boot(1) },
                isr: ids(isr),
                learners: ids(learners),
                target: ids(target),
                ..ShardRecord::default()
            }
        };
        let shards =
            [shard(&[1, 2], &[3], &[1, 3]), shard(&[2, 1], &[], &[2, 3]), shard(&[4], &[], &[4])];
        let check = |store: u128, leads, copies, in_sync, peers| {
            let want = StoreHoldings { leads, copies, in_sync };
            assert_eq!(holdings(&shards, StoreId(store)), want, "store {store}");
            let found = shard_record::peers(&shards).get(&StoreId(store)).map_or(0, BTreeSet::len);
            assert_eq!(found, peers, "store {store}");
        };
        check(1, 1, 2, 2, 2);
        check(2, 1, 2, 2, 2);
        check(3, 0, 2, 0, 2);
        check(4, 1, 1, 1, 0);
        check(9, 0, 0, 0, 0);
    }
}
