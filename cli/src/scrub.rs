//! `dkc scrub NODE`: has a node read everything on its disk, and tells what came of it.
//!
//! The node does it by itself once a day; this is for a disk that one has doubts about. It is asked, not helped: the scrub
//! goes on whether this command watches or not.

use std::time::Duration;

use anyhow::bail;
use engine::ids::{ShardId, StoreBoot};
use engine::message::{NodeQuery, NodeQueryReply, ScrubStatus};
use engine::records::{Meta, NodeRecord, StoreRecord};
use metastore::Metastore;
use serde::Serialize;

use crate::etcd::{EtcdArgs, is_meant};
use crate::exit::Exit;
use crate::output;

const LOOK_EVERY: Duration = Duration::from_millis(300);
/// A node that says nothing for so long is taken for ended.
const SILENT_MAX: Duration = Duration::from_secs(5);

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The node's name, or its store's uuid
    #[arg(required_unless_present = "all")]
    node: Option<String>,
    /// Every node that runs
    #[arg(long, conflicts_with = "node")]
    all: bool,
    /// Of the counters only those of these shards (their ids in `dkc status --all`)
    #[arg(long, value_name = "ID[,…]", value_delimiter = ',')]
    shard: Vec<u16>,
    /// Megabytes per second, at most; else the node's own --scrub-rate
    #[arg(long, value_name = "MB/S", value_parser = clap::value_parser!(u64).range(1..=10_000))]
    rate: Option<u64>,
    /// Don't wait for what comes of it
    #[arg(long)]
    no_wait: bool,
    #[command(flatten)]
    etcd: EtcdArgs,
    /// Print the result of each node as a line of JSON
    #[arg(long)]
    json: bool,
}

/// What came of it on one node.
#[derive(Debug, Serialize)]
struct Report {
    node: String,
    result: Outcome,
    copies: u64,
    damaged: Vec<u16>,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Outcome {
    Begun,
    Clean,
    Damaged,
    Ended,
}

pub(crate) async fn run(args: Args) -> anyhow::Result<Exit> {
    let metastore = args.etcd.connect().await?;
    let Some(meta) = metastore.get::<Meta>(&()).await? else {
        bail!("no cluster {:?}", args.etcd.cluster)
    };
    let nodes = nodes(&metastore, meta.record.cluster, &args).await?;
    if nodes.is_empty() {
        output::note(&format!(
            "error: {} does not run",
            args.node.as_deref().unwrap_or("any node")
        ));
        return Ok(Exit::Usage);
    }
    let shards: Vec<ShardId> = args.shard.iter().copied().map(ShardId).collect();
    let mut asked = Vec::new();
    for node in nodes {
        let (before, _) =
            node.status().await.map_err(|why| anyhow::anyhow!("{}: {why}", node.name))?;
        let bytes_per_s = args.rate.unwrap_or(0) * 1_000_000;
        let query = NodeQuery::Scrub { shards: shards.clone(), bytes_per_s };
        node.ask(query).await.map_err(|why| anyhow::anyhow!("{}: {why}", node.name))?;
        asked.push((node, before));
    }
    let mut well = true;
    for (node, before) in asked {
        let report = match args.no_wait {
            true => {
                Report { node: node.name, result: Outcome::Begun, copies: 0, damaged: Vec::new() }
            }
            false => node.outcome(before).await,
        };
        well &= matches!(report.result, Outcome::Begun | Outcome::Clean);
        if args.json {
            output::json(&report)?;
        } else {
            output::result(&report.sentence())?;
        }
    }
    Ok(if well { Exit::Done } else { Exit::Failed })
}

impl Report {
    fn sentence(&self) -> String {
        let Self { node, result, copies, damaged } = self;
        match result {
            Outcome::Begun => format!("{node} reads its disk: `dkc status` tells what comes of it"),
            Outcome::Clean => format!("{node} is clean: {copies} copies are what was written"),
            Outcome::Damaged => {
                let damaged = damaged.iter().map(u16::to_string).collect::<Vec<_>>().join(", ");
                format!(
                    "{node} is DAMAGED: its copies of shards {damaged} are not what was written, and are filled anew"
                )
            }
            Outcome::Ended => format!(
                "{node} has ended: its log says what it found. Started again, it is filled anew by the others"
            ),
        }
    }
}

struct Node {
    name: String,
    cluster: u128,
    address: String,
    process: StoreBoot,
}

async fn nodes(metastore: &Metastore, cluster: u128, args: &Args) -> anyhow::Result<Vec<Node>> {
    let stores = metastore.list::<StoreRecord>().await?.all;
    let running = metastore.list::<NodeRecord>().await?.all;
    let mut nodes = Vec::new();
    for kept in stores {
        let stands = !kept.record.status.is_gone();
        let Some(runs) = running.iter().find(|runs| runs.id == kept.id) else { continue };
        if args.node.as_ref().map_or(stands, |node| is_meant(&kept, node)) {
            let process = StoreBoot { store: kept.id, boot: runs.record.boot };
            let address = runs.record.address.clone();
            nodes.push(Node { name: kept.record.name, cluster, address, process });
        }
    }
    nodes.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(nodes)
}

impl Node {
    async fn ask(&self, query: NodeQuery) -> Result<NodeQueryReply, String> {
        let asked = storage_node::ask(self.cluster, &self.address, query);
        let answer = tokio::time::timeout(SILENT_MAX, asked).await;
        answer.unwrap_or_else(|_| Err("it does not answer".to_owned()))
    }

    async fn status(&self) -> Result<(ScrubStatus, StoreBoot), String> {
        match self.ask(NodeQuery::Status).await? {
            NodeQueryReply::Status { from, scrub, .. } => Ok((scrub, from)),
            _ => Err("it answered another question".to_owned()),
        }
    }

    async fn outcome(self, before: ScrubStatus) -> Report {
        loop {
            let report = |result, copies, damaged: &[ShardId]| Report {
                node: self.name.clone(),
                result,
                copies,
                damaged: damaged.iter().map(|shard| shard.0).collect(),
            };
            match self.status().await {
                Ok((_, from)) if from != self.process => return report(Outcome::Ended, 0, &[]),
                Err(_) => return report(Outcome::Ended, 0, &[]),
                Ok((now, _)) if now.ended != before.ended && !now.running => {
                    let clean = now.damaged.is_empty();
                    let result = if clean { Outcome::Clean } else { Outcome::Damaged };
                    return report(result, now.shards, &now.damaged);
                }
                Ok(_) => tokio::time::sleep(LOOK_EVERY).await,
            }
        }
    }
}
