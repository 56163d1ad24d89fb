//! `dkc status`: the cluster as one gateway sees it, and what is wrong with it.
//!
//! It asks `GET /v1/cluster` and adds the one thing a person looks for: for each shard that is not
//! open, why. The reason is worked out from the same answer, so it can be as old as that.
//! Ends with 0 when a gateway answered, however the cluster is: scripts look at `summary`.

use std::fmt::Write;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::answer::{Refusal, parse};
use crate::client::{DEADLINE, Gateways, ServerArgs};
use crate::exit::Exit;
use crate::output;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    server: ServerArgs,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Cluster {
    pub(crate) cluster: String,
    pub(crate) nodes: Vec<Node>,
    pub(crate) shards: Vec<Shard>,
    /// Why nothing is placed yet, when the gateway says so ("2 of 3 nodes").
    pub(crate) waiting_for: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Node {
    pub(crate) name: String,
    pub(crate) address: String,
    pub(crate) zone: String,
    pub(crate) boot: u64,
    pub(crate) state: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Shard {
    pub(crate) id: u64,
    pub(crate) epoch: u64,
    pub(crate) state: String,
    pub(crate) primary: Option<String>,
    pub(crate) isr: Vec<String>,
    pub(crate) learners: Vec<String>,
    pub(crate) replicas: Vec<Replica>,
    pub(crate) digests_agree: Option<bool>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Replica {
    pub(crate) node: String,
    pub(crate) last: Option<u64>,
    pub(crate) applied: Option<u64>,
}

/// What `--json` adds under `summary`.
#[derive(Debug, Eq, PartialEq, Serialize)]
struct Summary {
    nodes: usize,
    nodes_up: usize,
    shards: usize,
    shards_open: usize,
    /// The smallest and largest in-sync set. Every set is full when the smallest is the number of replicas.
    in_sync_min: usize,
    in_sync_max: usize,
    /// The most log entries any replica is behind the longest log of its shard.
    lag_max: u64,
    digests_disagree: Vec<u64>,
    not_open: Vec<NotOpen>,
}

#[derive(Debug, Eq, PartialEq, Serialize)]
struct NotOpen {
    id: u64,
    state: String,
    why: String,
}

impl Shard {
    pub(crate) fn is_open(&self) -> bool {
        self.state == "open"
    }

    fn longest(&self) -> u64 {
        self.replicas.iter().filter_map(|replica| replica.last).max().unwrap_or(0)
    }

    /// How many entries its slowest replica is behind.
    fn lag(&self) -> u64 {
        let shortest = self.replicas.iter().filter_map(|replica| replica.last).min();
        self.longest() - shortest.unwrap_or_else(|| self.longest())
    }

    fn why(&self, cluster: &Cluster) -> String {
        let state = |name: &String| {
            let node = cluster.nodes.iter().find(|node| node.name == *name);
            node.map_or("not registered", |node| node.state.as_str())
        };
        let away: Vec<_> = self
            .isr
            .iter()
            .filter(|name| state(name) != "up")
            .map(|name| format!("{name} is {}", state(name)))
            .collect();
        let isr = self.isr.join(", ");
        let away = away.join(", ");
        match (self.state.as_str(), away.as_str()) {
            ("frozen", "") => format!("a member of its in-sync set ({isr}) does not answer"),
            ("frozen", away) => {
                format!("its in-sync set ({isr}) can't get smaller, and {away}")
            }
            ("no-primary", "") => format!("waits for a primary out of {isr}"),
            ("no-primary", away) => format!("waits for a primary out of {isr}: {away}"),
            (other, "") => format!("state {other:?}, in-sync set {isr}"),
            (other, away) => format!("state {other:?}, in-sync set {isr}: {away}"),
        }
    }
}

impl Cluster {
    fn summary(&self) -> Summary {
        let sizes = || self.shards.iter().map(|shard| shard.isr.len());
        let closed = self.shards.iter().filter(|shard| !shard.is_open());
        let disagree = |shard: &&Shard| shard.digests_agree == Some(false);
        Summary {
            nodes: self.nodes.len(),
            nodes_up: self.nodes.iter().filter(|node| node.state == "up").count(),
            shards: self.shards.len(),
            shards_open: self.shards.iter().filter(|shard| shard.is_open()).count(),
            in_sync_min: sizes().min().unwrap_or(0),
            in_sync_max: sizes().max().unwrap_or(0),
            lag_max: self.shards.iter().map(Shard::lag).max().unwrap_or(0),
            digests_disagree: self.shards.iter().filter(disagree).map(|shard| shard.id).collect(),
            not_open: closed
                .map(|shard| NotOpen {
                    id: shard.id,
                    state: shard.state.clone(),
                    why: shard.why(self),
                })
                .collect(),
        }
    }
}

pub(crate) async fn run(args: Args) -> anyhow::Result<Exit> {
    let answer = Gateways::new(&args.server.urls).read("/v1/cluster", None, DEADLINE).await;
    let told: Result<Value, Refusal> = answer.and_then(|response| parse(&response));
    let mut told = match told {
        Ok(told) => told,
        Err(refusal) => {
            if args.server.json {
                output::json(&json!({ "detail": refusal.why() }))?;
            } else {
                output::note(&format!("no gateway answers: {}", refusal.why()));
            }
            return Ok(Exit::Failed);
        }
    };
    let cluster = Cluster::deserialize(&told)?;
    if args.server.json {
        told["summary"] = serde_json::to_value(cluster.summary())?;
        output::json(&told)?;
    } else {
        output::result(text(&cluster)?.trim_end())?;
    }
    Ok(Exit::Done)
}

fn text(cluster: &Cluster) -> Result<String, std::fmt::Error> {
    let summary = cluster.summary();
    let mut out = String::new();
    writeln!(
        out,
        "cluster {}: {} of {} nodes up, {} of {} shards open",
        cluster.cluster, summary.nodes_up, summary.nodes, summary.shards_open, summary.shards
    )?;
    if let Some(what) = &cluster.waiting_for {
        writeln!(out, "waiting for {what}")?;
    }
    writeln!(
        out,
        "\n{:<16} {:<9} {:>5} {:>9} {:>7}  {:<22} zone",
        "node", "state", "boot", "primaries", "in sync", "address"
    )?;
    for node in &cluster.nodes {
        let leads = |shard: &&Shard| shard.primary.as_ref() == Some(&node.name);
        let primaries = cluster.shards.iter().filter(leads).count();
        let in_sync = cluster.shards.iter().filter(|shard| shard.isr.contains(&node.name)).count();
        let Node { name, state, boot, address, zone } = node;
        writeln!(
            out,
            "{name:<16} {state:<9} {boot:>5} {primaries:>9} {in_sync:>7}  {address:<22} {zone}"
        )?;
    }
    writeln!(
        out,
        "\n{:>5} {:<10} {:>6} {:<12} {:>6}  {:<30} learners",
        "shard", "state", "epoch", "primary", "lag", "in sync"
    )?;
    for shard in &cluster.shards {
        let primary = shard.primary.as_deref().unwrap_or("-");
        let (isr, learners) = (shard.isr.join(","), shard.learners.join(","));
        let Shard { id, state, epoch, .. } = shard;
        let lag = shard.lag();
        writeln!(
            out,
            "{id:>5} {state:<10} {epoch:>6} {primary:<12} {lag:>6}  {isr:<30} {learners}"
        )?;
    }
    if !summary.not_open.is_empty() {
        writeln!(out, "\nnot open:")?;
        for NotOpen { id, state, why } in &summary.not_open {
            writeln!(out, "  shard {id} is {state}: {why}")?;
        }
    }
    for id in &summary.digests_disagree {
        writeln!(out, "\nshard {id}: ITS REPLICAS HOLD DIFFERENT COUNTERS")?;
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cluster() -> Cluster {
        serde_json::from_value(json!({
            "cluster": "dkc", "incarnation": 1,
            "nodes": [
                {"name": "node-1", "state": "up", "boot": 1, "address": "127.0.0.1:1", "zone": ""},
                {"name": "node-2", "state": "down", "boot": 3, "address": "127.0.0.1:2", "zone": ""}],
            "shards": [
                {"id": 0, "slots": [0, 32767], "epoch": 1, "version": 2, "state": "open", "primary": "node-1",
                 "isr": ["node-1"], "learners": [], "digests_agree": true, "replicas": [
                    {"node": "node-1", "last": 9, "applied": 9, "digest": "00", "digest_at": 9},
                    {"node": "node-2", "last": 4, "applied": 4}]},
                {"id": 1, "slots": [32768, 65535], "epoch": 2, "version": 4, "state": "frozen", "primary": null,
                 "isr": ["node-1", "node-2"], "learners": ["node-3"], "replicas": [], "digests_agree": false}]
        }))
        .unwrap()
    }

    #[test]
    fn the_summary_says_what_is_wrong_and_why() {
        let why =
            "its in-sync set (node-1, node-2) can't get smaller, and node-2 is down".to_owned();
        let want = Summary {
            nodes: 2,
            nodes_up: 1,
            shards: 2,
            shards_open: 1,
            in_sync_min: 1,
            in_sync_max: 2,
            lag_max: 5,
            digests_disagree: vec![1],
            not_open: vec![NotOpen { id: 1, state: "frozen".to_owned(), why }],
        };
        assert_eq!(cluster().summary(), want);
    }

    #[test]
    fn the_text_names_each_shard_that_is_not_open() {
        let text = text(&cluster()).unwrap();
        assert!(text.starts_with("cluster dkc: 1 of 2 nodes up, 1 of 2 shards open\n"), "{text}");
        assert!(text.contains("  shard 1 is frozen: its in-sync set"), "{text}");
        assert!(text.contains("shard 1: ITS REPLICAS HOLD DIFFERENT COUNTERS"), "{text}");
    }
}
