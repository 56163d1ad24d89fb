//! `dkc node list`: the storage nodes by their records in etcd.

use std::collections::BTreeSet;

use engine::records::StoreStatus;
use engine::shard_record::peers;
use process::ClusterOptions;
use serde::Serialize;

use super::{NodeRecords, StoreHoldings};
use crate::etcd::{cluster, connect};
use crate::exit::CommandExit;
use crate::output;

/// Options of `dkc node list`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// List also the nodes that have left the cluster: lost and retired ones
    #[arg(long)]
    all: bool,
    #[command(flatten)]
    etcd: ClusterOptions<true>,
    /// Print the result as one line of JSON
    #[arg(long)]
    json: bool,
}

/// All nodes, as in the JSON output.
#[derive(Debug, Serialize)]
struct NodeTable {
    nodes: Vec<NodeRow>,
}

/// One node.
#[derive(Debug, Serialize)]
struct NodeRow {
    node: String,
    uuid: String,
    zone: String,
    host: String,
    state: &'static str,
    /// A process of the node is registered in etcd.
    running: bool,
    /// The number of shards that the node leads.
    leads: usize,
    /// The number of shards of which the node has a copy, or is to have one.
    copies: usize,
    /// The number of those copies that are in sync.
    in_sync: usize,
    /// The number of other nodes that have copies of the same shards.
    peers: usize,
}

/// Prints the nodes.
pub(super) async fn run(args: Args) -> anyhow::Result<CommandExit> {
    let metastore = connect(&args.etcd).await?;
    cluster(&metastore, &args.etcd).await?;
    let records = NodeRecords::read(&metastore).await?;
    output::report(args.json, &NodeTable::new(&records, args.all), NodeTable::text)?;
    Ok(CommandExit::Done)
}

/// Returns the state of a node as one word.
fn state(status: StoreStatus, running: bool, drains: bool, copies: usize) -> &'static str {
    match status {
        StoreStatus::Lost | StoreStatus::LostSuspect => "lost",
        StoreStatus::Retired => "retired",
        StoreStatus::Suspect => "suspect",
        StoreStatus::Active if !drains && running => "up",
        StoreStatus::Active if !drains => "away",
        StoreStatus::Active | StoreStatus::Draining if copies == 0 => "empty",
        StoreStatus::Active | StoreStatus::Draining => "draining",
    }
}

impl NodeTable {
    fn new(records: &NodeRecords, all: bool) -> Self {
        let present = records.stores.iter().filter(|kept| all || !kept.record.status.is_gone());
        let peers = peers(&records.shards);
        let row = |kept: &metastore::Revisioned<engine::records::StoreRecord>| {
            let StoreHoldings { leads, copies, in_sync } = records.holds(kept.id);
            let (store, running) = (&kept.record, records.runs(kept.id));
            let drains = records.drains.contains(&kept.id);
            NodeRow {
                node: store.name.clone(),
                uuid: kept.id.to_string(),
                zone: store.zone.clone(),
                host: store.host.clone(),
                state: state(store.status, running, drains, copies),
                running,
                leads,
                copies,
                in_sync,
                peers: peers.get(&kept.id).map_or(0, BTreeSet::len),
            }
        };
        let mut nodes: Vec<NodeRow> = present.map(row).collect();
        nodes.sort_by(|a, b| (&a.node, &a.uuid).cmp(&(&b.node, &b.uuid)));
        Self { nodes }
    }

    fn text(&self) -> String {
        let columns =
            ["<NODE", "<STATE", "<ZONE", "<HOST", ">LEADS", ">COPIES", ">IN SYNC", ">PEERS"];
        let row = |row: &NodeRow| {
            let shown = |word: &str| if word.is_empty() { "-" } else { word }.to_owned();
            // The word of a node that drains does not show whether it runs.
            let stopped = !row.running && matches!(row.state, "draining" | "empty" | "suspect");
            let state = format!("{}{}", row.state, if stopped { ", away" } else { "" });
            let words = [row.node.clone(), state, shown(&row.zone), shown(&row.host)];
            let numbers =
                [row.leads, row.copies, row.in_sync, row.peers].map(|number| number.to_string());
            words.into_iter().chain(numbers).collect()
        };
        let text = output::table(&columns, self.nodes.iter().map(row).collect());
        text.trim_end().to_owned()
    }
}

#[cfg(test)]
mod tests {
    use engine::ids::{Boot, StoreId};
    use engine::records::NodeRecord;
    use metastore::Revisioned;

    use super::super::tests::{records, store};
    use super::*;

    #[test]
    fn each_state_has_its_word() {
        use StoreStatus::{Active, Draining, Lost, LostSuspect, Retired, Suspect};
        let check = |status, running, drains, copies, want| {
            assert_eq!(state(status, running, drains, copies), want);
        };
        check(Active, true, false, 3, "up");
        check(Active, true, false, 0, "up");
        check(Active, false, false, 3, "away");
        check(Active, true, true, 3, "draining");
        check(Draining, false, true, 3, "draining");
        check(Draining, true, true, 0, "empty");
        check(Suspect, true, true, 3, "suspect");
        check(Lost, false, false, 0, "lost");
        check(LostSuspect, false, false, 0, "lost");
        check(Retired, false, false, 0, "retired");
    }

    #[test]
    fn nodes_that_have_left_are_listed_on_request() {
        let stores = [
            store(1, "node-1", StoreStatus::Active),
            store(2, "node-2", StoreStatus::Draining),
            store(3, "node-2", StoreStatus::Lost),
        ];
        let mut records = records(&stores);
        let address = "127.0.0.1:1".to_owned();
        let record = NodeRecord { boot: Boot(1), address, capacity: 1, versions: (1, 1) };
        let node = Revisioned { id: StoreId(1), record, created: 1, modified: 1, lease: 1 };
        records.nodes.push(node);
        let want = "\
NODE    STATE        ZONE  HOST  LEADS  COPIES  IN SYNC  PEERS
node-1  up           -     -         0       0        0      0
node-2  empty, away  -     -         0       0        0      0";
        assert_eq!(NodeTable::new(&records, false).text(), want);
        let all = NodeTable::new(&records, true);
        assert_eq!(
            all.nodes.iter().map(|row| row.state).collect::<Vec<_>>(),
            ["up", "empty", "lost"]
        );
    }
}
