//! `dkc scrub NODE`: makes a node verify all data on its disk, and reports the result.
//!
//! A node scrubs its disk once a day anyway; this command is for a disk that is suspected to be
//! faulty. The scrub runs in the node and continues when this command ends.

use std::time::Duration;

use engine::ids::{ShardId, StoreBoot};
use engine::message::{NodeQuery, NodeQueryReply, ScrubStatus};
use engine::records::{NodeRecord, StoreRecord};
use metastore::Metastore;
use process::ClusterOptions;
use serde::Serialize;

use crate::etcd::{cluster, connect, is_denoted_by};
use crate::exit::CommandExit;
use crate::output;

/// The pause between two queries for the state of a scrub.
const POLL_INTERVAL: Duration = Duration::from_millis(300);
/// The number of failed queries in a row after which a node counts as ended, less one.
const QUERY_FAILURES_MAX: u32 = 2;
/// A node that does not answer for this long counts as ended.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);

/// Options of `dkc scrub`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Name of the node, or uuid of its store
    #[arg(required_unless_present = "all")]
    node: Option<String>,
    /// Scrub every running node
    #[arg(long, conflicts_with = "node")]
    all: bool,
    /// Verify the counters of these shards only (ids as in `dkc status --all`)
    #[arg(long, value_name = "ID[,…]", value_delimiter = ',')]
    shard: Vec<u16>,
    /// Maximum rate in MB/s [default: the node's --scrub-rate]
    #[arg(long, value_name = "MB/S", value_parser = clap::value_parser!(u64).range(1..=10_000))]
    rate: Option<u64>,
    /// Return without waiting for the result
    #[arg(long)]
    detach: bool,
    #[command(flatten)]
    etcd: ClusterOptions<true>,
    /// Print the result of each node as one line of JSON
    #[arg(long)]
    json: bool,
}

/// The result of the scrub of one node.
#[derive(Debug, Serialize)]
struct ScrubReport {
    node: String,
    result: ScrubResult,
    copies: u64,
    damaged: Vec<u16>,
}

/// The result of the scrub of one node, as in the JSON output.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum ScrubResult {
    /// The scrub was started and not waited for.
    Begun,
    /// No damage was found.
    Clean,
    /// At least one copy is damaged.
    Damaged,
    /// The process of the node ended before its scrub did.
    Ended,
}

/// Starts scrubs and prints their results.
pub(crate) async fn run(args: Args) -> anyhow::Result<CommandExit> {
    let metastore = connect(&args.etcd).await?;
    let meta = cluster(&metastore, &args.etcd).await?;
    let nodes = nodes(&metastore, meta.cluster, &args).await?;
    if nodes.is_empty() {
        let wanted = args.node.as_deref().unwrap_or("all nodes");
        return CommandExit::usage(format!("not running: {wanted}"));
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
    let mut all_clean = true;
    for (node, before) in asked {
        let report = match args.detach {
            true => node.report(ScrubResult::Begun, 0, &[]),
            false => node.outcome(before).await,
        };
        all_clean &= matches!(report.result, ScrubResult::Begun | ScrubResult::Clean);
        output::report(args.json, &report, ScrubReport::sentence)?;
    }
    Ok(if all_clean { CommandExit::Done } else { CommandExit::Failed })
}

impl ScrubReport {
    fn sentence(&self) -> String {
        let Self { node, result, copies, damaged } = self;
        match result {
            ScrubResult::Begun => format!("{node}: scrub started; `dkc status` shows its result"),
            ScrubResult::Clean => format!("{node}: no damage found in {copies} copies"),
            ScrubResult::Damaged => {
                let damaged = damaged.iter().map(u16::to_string).collect::<Vec<_>>().join(", ");
                format!(
                    "{node}: DAMAGED copies of shards {damaged}; they are rebuilt from the other \
                     copies"
                )
            }
            ScrubResult::Ended => format!(
                "{node}: process ended during the scrub; see its log. After a restart it is \
                 rebuilt from the other copies"
            ),
        }
    }
}

/// A node to scrub.
struct ScrubTarget {
    name: String,
    cluster: u128,
    address: String,
    process: StoreBoot,
}

async fn nodes(
    metastore: &Metastore,
    cluster: u128,
    args: &Args,
) -> anyhow::Result<Vec<ScrubTarget>> {
    let stores = metastore.list::<StoreRecord>().await?.all;
    let running = metastore.list::<NodeRecord>().await?.all;
    let mut nodes = Vec::new();
    for kept in stores {
        let is_active = !kept.record.status.is_gone();
        let Some(runs) = running.iter().find(|runs| runs.id == kept.id) else { continue };
        if args.node.as_ref().map_or(is_active, |node| is_denoted_by(&kept, node)) {
            let process = StoreBoot { store: kept.id, boot: runs.record.boot };
            let address = runs.record.address.clone();
            nodes.push(ScrubTarget { name: kept.record.name, cluster, address, process });
        }
    }
    nodes.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(nodes)
}

impl ScrubTarget {
    async fn ask(&self, query: NodeQuery) -> Result<NodeQueryReply, String> {
        let asked = storage_node::ask(self.cluster, &self.address, query);
        let answer = tokio::time::timeout(ANSWER_WITHIN, asked).await;
        answer.unwrap_or_else(|_| Err("no answer in time".to_owned()))
    }

    async fn status(&self) -> Result<(ScrubStatus, StoreBoot), String> {
        match self.ask(NodeQuery::Status).await? {
            NodeQueryReply::Status { from, scrub, .. } => Ok((scrub, from)),
            _ => Err("unexpected reply".to_owned()),
        }
    }

    fn report(&self, result: ScrubResult, copies: u64, damaged: &[ShardId]) -> ScrubReport {
        let damaged = damaged.iter().map(|shard| shard.0).collect();
        ScrubReport { node: self.name.clone(), result, copies, damaged }
    }

    async fn outcome(&self, before: ScrubStatus) -> ScrubReport {
        let mut failures = 0;
        loop {
            match self.status().await {
                Ok((_, from)) if from != self.process => break,
                // One query without an answer may mean a slow node.
                Err(_) if failures == QUERY_FAILURES_MAX => break,
                Err(_) => failures += 1,
                Ok((now, _)) if now.ended != before.ended && !now.running => {
                    let clean = now.damaged.is_empty();
                    let result = if clean { ScrubResult::Clean } else { ScrubResult::Damaged };
                    return self.report(result, now.shards, &now.damaged);
                }
                Ok(_) => failures = 0,
            }
            tokio::time::sleep(POLL_INTERVAL).await;
        }
        self.report(ScrubResult::Ended, 0, &[])
    }
}
