//! `dkc drain NODE`: moves all shards off a node, so that it can be shut down.
//!
//! The command writes a drain intent to etcd and waits until the node is empty: the leading
//! coordinator moves the node's primaries and then its copies, each only once its replacement is in
//! sync. The intent stays in etcd when this command ends, until `--undo` removes it.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::bail;
use engine::ids::StoreId;
use engine::records::{Meta, NodeRecord, StoreRecord, StoreStatus};
use engine::shard_record::ShardRecord;
use metastore::{CasOutcome, DrainIntent, Metastore, Revisioned};
use process::ClusterOptions;
use serde::Serialize;

use crate::etcd::{connect, is_denoted_by};
use crate::exit::CommandExit;
use crate::output::{self, note};

/// The pause between two reads of the shards' records.
const POLL_INTERVAL: Duration = Duration::from_millis(500);

/// Options of `dkc drain`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Name of the node, or uuid of its store
    node: String,
    /// Cancel the drain: the node may hold shards again
    #[arg(long)]
    undo: bool,
    /// Drain although too few nodes are left, so that copies without a place move once a node
    /// joins, or too few zones, so that two copies of a shard share one
    #[arg(long, conflicts_with = "undo")]
    wait: bool,
    /// Return at once instead of when the node is empty
    #[arg(long, conflicts_with = "undo")]
    detach: bool,
    #[command(flatten)]
    etcd: ClusterOptions<true>,
    /// Print the result as one line of JSON
    #[arg(long)]
    json: bool,
}

/// The result of the command.
#[derive(Debug, Serialize)]
struct DrainReport {
    node: String,
    uuid: String,
    draining: bool,
    /// The number of shards that the node leads.
    leads: usize,
    /// The number of copies that the node holds.
    copies: usize,
}

/// Starts or cancels a drain, and prints the state of the node.
pub(crate) async fn run(args: Args) -> anyhow::Result<CommandExit> {
    let metastore = connect(&args.etcd).await?;
    let stores = metastore.list::<StoreRecord>().await?.all;
    let store = match named(&stores, &args.node)[..] {
        [store] => store,
        [] => {
            let known: Vec<&str> = stores.iter().map(|kept| kept.record.name.as_str()).collect();
            let (name, known) = (&args.node, known.join(" "));
            return CommandExit::usage(format!("no node {name:?}; known nodes: {known}"));
        }
        ref several => {
            let uuids: Vec<String> = several.iter().map(|kept| kept.id.to_string()).collect();
            let (name, uuids) = (&args.node, uuids.join(", "));
            return CommandExit::usage(format!(
                "{name:?} denotes several stores: use the uuid of one of them: {uuids}"
            ));
        }
    };
    let node = DrainTarget { metastore, store: store.id, name: store.record.name.clone() };
    if args.undo {
        node.undo().await?;
    } else {
        if !args.wait
            && let Some(why) = node.obstacle().await?
        {
            note!("error: {why}. Nothing was changed: --wait drains {} all the same", node.name);
            return Ok(CommandExit::Failed);
        }
        node.drain().await?;
        if !args.detach {
            node.until_empty().await?;
        }
    }
    let (leads, copies) = node.holds().await?;
    let uuid = node.store.to_string();
    let report = DrainReport { node: node.name, uuid, draining: !args.undo, leads, copies };
    output::report(args.json, &report, DrainReport::sentence)?;
    Ok(CommandExit::Done)
}

/// Returns the stores that `node`, a name or a uuid, denotes.
fn named<'a>(
    stores: &'a [Revisioned<StoreRecord>],
    node: &str,
) -> Vec<&'a Revisioned<StoreRecord>> {
    stores.iter().filter(|kept| is_denoted_by(kept, node)).collect()
}

impl DrainReport {
    fn sentence(&self) -> String {
        let Self { node, leads, copies, .. } = self;
        match (self.draining, copies) {
            (false, _) => format!("{node} is no longer draining: it may hold shards again"),
            (true, 0) => format!("{node} is empty: it can be shut down"),
            (true, _) => {
                format!("{node} is draining: it leads {leads} shards and holds {copies} copies")
            }
        }
    }
}

/// The node to drain.
struct DrainTarget {
    metastore: Metastore,
    store: StoreId,
    name: String,
}

impl DrainTarget {
    /// Writes the intent. An intent that exists already stays as it is.
    async fn drain(&self) -> anyhow::Result<()> {
        match self.metastore.create(&self.store, &DrainIntent).await? {
            CasOutcome::Done { .. } | CasOutcome::Failed => Ok(()),
            CasOutcome::Unknown => bail!(
                "the answer of etcd was lost and the outcome is unknown: run the command again"
            ),
        }
    }

    async fn undo(&self) -> anyhow::Result<()> {
        let Some(intent) = self.metastore.get::<DrainIntent>(&self.store).await? else {
            return Ok(());
        };
        let gone = self.metastore.delete::<DrainIntent>(&self.store, intent.modified).await?;
        match gone {
            CasOutcome::Done { .. } => Ok(()),
            CasOutcome::Failed | CasOutcome::Unknown => {
                bail!(
                    "the intent was changed concurrently, or the outcome is unknown: run the \
                     command again"
                )
            }
        }
    }

    async fn until_empty(&self) -> anyhow::Result<()> {
        let mut reported = (usize::MAX, usize::MAX);
        loop {
            let (leads, copies) = self.holds().await?;
            if copies == 0 {
                return Ok(());
            }
            if (leads, copies) != reported {
                reported = (leads, copies);
                note!("{}: leads {leads}, holds {copies}", self.name);
            }
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }

    /// Counts the shards that the node leads, and the shards of which it holds a copy or is to hold
    /// one, in sync or not.
    async fn holds(&self) -> anyhow::Result<(usize, usize)> {
        let shards = self.metastore.list::<ShardRecord>().await?.all;
        let leads = shards.iter().filter(|kept| kept.record.primary.store == self.store).count();
        let holds = |kept: &&Revisioned<ShardRecord>| {
            let shard = &kept.record;
            [&shard.isr, &shard.learners, &shard.target].iter().any(|all| all.contains(&self.store))
        };
        Ok((leads, shards.iter().filter(holds).count()))
    }

    /// Returns why the node can't be emptied with the nodes that there are now, or only at the cost
    /// of a zone. A node that drains already is not in question.
    async fn obstacle(&self) -> anyhow::Result<Option<String>> {
        let Some(meta) = self.metastore.get::<Meta>(&()).await? else { return Ok(None) };
        let drains = self.metastore.list::<DrainIntent>().await?.all;
        let drains: BTreeSet<StoreId> = drains.iter().map(|kept| kept.id).collect();
        if drains.contains(&self.store) || self.holds().await?.1 == 0 {
            return Ok(None);
        }
        let running = self.metastore.list::<NodeRecord>().await?.all;
        let running: BTreeSet<StoreId> = running.iter().map(|kept| kept.id).collect();
        let stores = self.metastore.list::<StoreRecord>().await?.all;
        let takes = |kept: &&Revisioned<StoreRecord>| {
            kept.record.status == StoreStatus::Active
                && running.contains(&kept.id)
                && !drains.contains(&kept.id)
                && kept.id != self.store
        };
        let others: Vec<&str> =
            stores.iter().filter(takes).map(|kept| kept.record.zone.as_str()).collect();
        let own = stores.iter().find(|kept| kept.id == self.store);
        let own = own.map_or("", |kept| kept.record.zone.as_str());
        Ok(obstacle(&self.name, own, &others, usize::from(meta.record.replicas)))
    }
}

/// Returns why a node of the zone `own` should not be emptied, if `others` are the zones of the
/// nodes that may take its copies.
fn obstacle(name: &str, own: &str, others: &[&str], replicas: usize) -> Option<String> {
    if others.len() < replicas {
        return Some(format!(
            "{name} cannot be emptied: --replicas is {replicas}, and the number of other nodes \
             that can hold copies is {}: start another node first",
            others.len()
        ));
    }
    let zones: BTreeSet<&str> = others.iter().copied().collect();
    (zones.len() + 1 == replicas && !zones.contains(own)).then(|| {
        format!(
            "no other running node is in zone {own:?}: without {name} two copies of each shard \
             would be in one zone; start a node there, or in a new zone, first"
        )
    })
}

#[cfg(test)]
mod tests {
    use engine::ids::Boot;

    use super::*;

    fn store(id: u128, name: &str, status: StoreStatus) -> Revisioned<StoreRecord> {
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

    /// Checks which of these stores a name or uuid denotes.
    #[track_caller]
    fn check(stores: &[Revisioned<StoreRecord>], word: &str, want: &[u128]) {
        let meant: Vec<u128> = named(stores, word).iter().map(|kept| kept.id.0).collect();
        assert_eq!(meant, want, "{word}");
    }

    /// A lost store holds nothing. If it were taken for the running store of the same name, the
    /// drain would appear complete at once, and the machine with the data would be shut down.
    #[test]
    fn a_name_means_the_store_that_is_not_gone() {
        let uuid = |number: u128| format!("{number:032x}");
        for gone in [StoreStatus::Lost, StoreStatus::LostSuspect, StoreStatus::Retired] {
            for running in [StoreStatus::Active, StoreStatus::Draining, StoreStatus::Suspect] {
                let both = [store(1, "node-2", gone), store(2, "node-2", running)];
                check(&both, "node-2", &[2]);
                let both = [store(1, "node-2", running), store(2, "node-2", gone)];
                check(&both, "node-2", &[1]);
                check(&both, &uuid(1), &[1]);
                check(&both, &uuid(2), &[]);
            }
            check(&[store(1, "node-2", gone)], "node-2", &[]);
        }
        check(&[store(1, "node-2", StoreStatus::Active)], "node-3", &[]);
        // One store is down but still needed, and a new store has its name.
        let both = [1, 2].map(|id| store(id, "node-2", StoreStatus::Active));
        check(&both, "node-2", &[1, 2]);
        check(&both, &uuid(2), &[2]);
    }

    #[track_caller]
    fn check_obstacle(own: &str, others: &[&str], want: Option<&str>) {
        let found = obstacle("node-2", own, others, 3);
        match want {
            None => assert_eq!(found, None),
            Some(want) => {
                assert!(found.as_ref().is_some_and(|why| why.contains(want)), "{found:?}")
            }
        }
    }

    #[test]
    fn a_drain_needs_a_node_for_each_copy_and_a_zone_if_there_are_enough() {
        check_obstacle(
            "",
            &["", ""],
            Some("--replicas is 3, and the number of other nodes that can hold copies is 2"),
        );
        check_obstacle("a", &["b"], Some("can hold copies is 1"));
        check_obstacle("", &["", "", ""], None);
        check_obstacle("c", &["a", "a", "b"], Some("no other running node is in zone \"c\""));
        check_obstacle("c", &["a", "b", "c"], None);
        // Copies share a zone already, or there are zones to spare.
        check_obstacle("b", &["a", "a", "a"], None);
        check_obstacle("d", &["a", "b", "c"], None);
    }
}
