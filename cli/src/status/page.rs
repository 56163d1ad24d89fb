//! The body of `GET /v1/cluster`, and what can be derived from it.
//!
//! The reason why a shard is not open is derived from the same answer, so it is as old as the
//! answer.

use serde::{Deserialize, Serialize};

/// The cluster.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct ClusterInfo {
    /// The name of the cluster.
    pub(crate) cluster: String,
    pub(crate) nodes: Vec<NodeInfo>,
    pub(crate) shards: Vec<ShardInfo>,
    /// The epochs that began with a loss.
    pub(crate) losses: Vec<LossInfo>,
    /// The reason why no shard is placed yet, for example "2 of 3 nodes".
    pub(crate) waiting_for: Option<String>,
}

/// A storage node.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct NodeInfo {
    pub(crate) name: String,
    /// The gRPC address.
    pub(crate) address: String,
    /// The zone; empty if the node has none.
    pub(crate) zone: String,
    pub(crate) boot: u64,
    /// The state: `up`, `down` or another one.
    pub(crate) state: String,
    /// True if the node rejects writes because its disk is full.
    pub(crate) disk_full: bool,
    /// The last scrub; `None` if the node has not scrubbed its disk since it started.
    pub(crate) last_scrub: Option<ScrubInfo>,
}

/// The last scrub of a node.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct ScrubInfo {
    /// The end of the scrub, in milliseconds since 1970.
    pub(crate) ended_ms: u64,
    /// The number of copies that were read.
    pub(crate) copies: u64,
    /// The shards whose copies are damaged.
    pub(crate) damaged: Vec<u64>,
}

/// An epoch that began with a copy that may lack acknowledged increments.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct LossInfo {
    pub(crate) shard: u64,
    pub(crate) epoch: u64,
    /// The node whose copy became primary.
    pub(crate) primary: String,
    /// The last position of that copy.
    pub(crate) last: u64,
    /// The other copies, which may have held more.
    pub(crate) given_up: Vec<GivenUpInfo>,
    /// The operator that accepted the loss; `None` if all copies were damaged, so that no operator
    /// was needed.
    pub(crate) by: Option<String>,
    /// The time of the request, in milliseconds since 1970 by the operator's clock.
    pub(crate) at_ms: Option<u64>,
}

/// A copy whose additional entries were lost.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct GivenUpInfo {
    pub(crate) node: String,
    /// The highest position that the copy is known to have held.
    pub(crate) last: Option<u64>,
}

/// A shard.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct ShardInfo {
    pub(crate) id: u64,
    pub(crate) epoch: u64,
    /// The state: `open`, `frozen`, `no-primary` or another one.
    pub(crate) state: String,
    pub(crate) primary: Option<String>,
    /// The nodes of the in-sync set.
    pub(crate) isr: Vec<String>,
    /// The nodes that are catching up.
    pub(crate) learners: Vec<String>,
    /// The replicas that keep a frozen shard from committing.
    pub(crate) hindered_by: Vec<BlockerInfo>,
    pub(crate) records: IdempotencyInfo,
    /// The replicas that report their state.
    pub(crate) replicas: Vec<ReplicaInfo>,
    /// False if the replicas' counters differ at the same position; `None` if unknown.
    pub(crate) digests_agree: Option<bool>,
}

/// The idempotency records of a shard.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct IdempotencyInfo {
    pub(crate) count: u64,
    pub(crate) bytes: u64,
    /// The quota of the shard in bytes.
    pub(crate) bytes_max: u64,
}

/// A member or learner that does not acknowledge, so that the shard cannot commit.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct BlockerInfo {
    pub(crate) node: String,
    /// The reason, as in "Frozen shards" of docs/runbooks.md.
    pub(crate) standing: String,
}

impl BlockerInfo {
    /// The reason as part of a sentence.
    fn in_words(&self) -> String {
        let node = &self.node;
        match self.standing.as_str() {
            "silent" => format!("{node} does not answer"),
            "disk-full" => format!("the disk of {node} is full"),
            "no-copy" => format!("{node} has no copy yet"),
            "lost-data" => format!("{node} lost data and waits for a snapshot"),
            "copying" => format!("{node} is receiving a snapshot"),
            "behind" => format!("{node} acknowledges too slowly"),
            other => format!("{node} is {other:?}"),
        }
    }
}

/// A replica of a shard.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct ReplicaInfo {
    pub(crate) node: String,
    /// The last position of its log.
    pub(crate) last: Option<u64>,
    /// The last applied position.
    pub(crate) applied: Option<u64>,
    /// The reason why it applies nothing more, if it has stopped.
    pub(crate) stopped: Option<String>,
}

/// The summary that `--json` adds under `summary`.
#[derive(Debug, Eq, PartialEq, Serialize)]
pub(super) struct Summary {
    pub(super) nodes: usize,
    pub(super) nodes_up: usize,
    pub(super) shards: usize,
    /// The number of shards that accept writes.
    pub(super) shards_open: usize,
    /// The size of the smallest in-sync set. If it is the number of replicas, every set is
    /// complete.
    pub(super) in_sync_min: usize,
    /// The size of the largest in-sync set.
    pub(super) in_sync_max: usize,
    /// The largest lag of a replica behind the longest log of its shard, in entries.
    pub(super) lag_max: u64,
    pub(super) records: u64,
    /// The used part of the quota for these records in the fullest shard.
    pub(super) records_used_percent: u64,
    /// The nodes that reject writes because their disks are full.
    pub(super) disk_full: Vec<String>,
    /// The shards whose replicas have different counters.
    pub(super) digests_disagree: Vec<u64>,
    pub(super) damaged: Vec<DamagedCopy>,
    pub(super) not_open: Vec<NotOpen>,
    /// The number of epochs that ever began with a loss.
    pub(super) losses: usize,
}

/// A shard that is not open, with the reason.
#[derive(Debug, Eq, PartialEq, Serialize)]
pub(super) struct NotOpen {
    pub(super) id: u64,
    pub(super) state: String,
    pub(super) why: String,
}

/// A damaged copy, which waits to be rebuilt.
#[derive(Debug, Eq, PartialEq, Serialize)]
pub(super) struct DamagedCopy {
    pub(super) id: u64,
    pub(super) node: String,
    pub(super) why: String,
}

impl ShardInfo {
    fn damaged(&self) -> impl Iterator<Item = DamagedCopy> {
        self.replicas.iter().filter_map(|replica| {
            let why = replica.stopped.clone()?;
            Some(DamagedCopy { id: self.id, node: replica.node.clone(), why })
        })
    }

    /// Returns whether the shard accepts writes.
    pub(crate) fn is_open(&self) -> bool {
        self.state == "open"
    }

    fn longest(&self) -> u64 {
        self.replicas.iter().filter_map(|replica| replica.last).max().unwrap_or(0)
    }

    /// The lag of its slowest replica, in entries.
    pub(super) fn lag(&self) -> u64 {
        let shortest = self.replicas.iter().filter_map(|replica| replica.last).min();
        self.longest() - shortest.unwrap_or_else(|| self.longest())
    }

    /// The used part of its quota for idempotency records, in percent.
    fn used_percent(&self) -> u64 {
        let IdempotencyInfo { bytes, bytes_max, .. } = self.records;
        (100 * bytes).div_ceil(bytes_max.max(1))
    }

    /// The reason why the shard is not open.
    pub(super) fn why(&self, cluster: &ClusterInfo) -> String {
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
        if self.state == "frozen" && !self.hindered_by.is_empty() {
            let members = self.hindered_by.iter().filter(|it| !self.learners.contains(&it.node));
            let learners = self.hindered_by.iter().filter(|it| self.learners.contains(&it.node));
            let why: Vec<_> = members.chain(learners).map(BlockerInfo::in_words).collect();
            return format!("its in-sync set ({isr}) cannot commit: {}", why.join(", "));
        }
        match (self.state.as_str(), away.as_str()) {
            ("frozen", "") => format!("its in-sync set ({isr}) is too small or commits too slowly"),
            ("frozen", away) => {
                format!("its in-sync set ({isr}) is at min_in_sync, and {away}")
            }
            ("no-primary", "") => format!("waiting for a primary out of {isr}"),
            ("no-primary", away) => format!("waiting for a primary out of {isr}: {away}"),
            (other, "") => format!("state {other:?}, in-sync set {isr}"),
            (other, away) => format!("state {other:?}, in-sync set {isr}: {away}"),
        }
    }
}

impl ClusterInfo {
    /// The state of the cluster in one line.
    pub(super) fn headline(&self) -> String {
        let Summary { nodes, nodes_up, shards, shards_open, .. } = self.summary();
        let mut line = format!(
            "cluster {}: {nodes_up} of {nodes} nodes up, {shards_open} of {shards} shards open",
            self.cluster
        );
        if let Some(what) = &self.waiting_for {
            line += &format!(", waiting for {what}");
        }
        line
    }

    fn full(&self) -> impl Iterator<Item = &NodeInfo> {
        self.nodes.iter().filter(|node| node.disk_full)
    }

    /// Summarizes the cluster.
    pub(super) fn summary(&self) -> Summary {
        let sizes = || self.shards.iter().map(|shard| shard.isr.len());
        let closed = self.shards.iter().filter(|shard| !shard.is_open());
        let disagree = |shard: &&ShardInfo| shard.digests_agree == Some(false);
        Summary {
            nodes: self.nodes.len(),
            nodes_up: self.nodes.iter().filter(|node| node.state == "up").count(),
            shards: self.shards.len(),
            shards_open: self.shards.iter().filter(|shard| shard.is_open()).count(),
            in_sync_min: sizes().min().unwrap_or(0),
            in_sync_max: sizes().max().unwrap_or(0),
            lag_max: self.shards.iter().map(ShardInfo::lag).max().unwrap_or(0),
            records: self.shards.iter().map(|shard| shard.records.count).sum(),
            records_used_percent: self
                .shards
                .iter()
                .map(ShardInfo::used_percent)
                .max()
                .unwrap_or(0),
            disk_full: self.full().map(|node| node.name.clone()).collect(),
            digests_disagree: self.shards.iter().filter(disagree).map(|shard| shard.id).collect(),
            damaged: self.shards.iter().flat_map(ShardInfo::damaged).collect(),
            losses: self.losses.len(),
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

#[cfg(test)]
pub(super) mod tests {
    use serde_json::json;

    use super::*;

    /// Two nodes of which one is down, two shards of which one is frozen.
    pub(in super::super) fn cluster() -> ClusterInfo {
        serde_json::from_value(json!({
            "cluster": "dkc", "incarnation": 1,
            "nodes": [
                {"name": "node-1", "state": "up", "boot": 1, "address": "127.0.0.1:1",
                 "zone": "", "disk_full": true},
                {"name": "node-2", "state": "down", "boot": 3, "address": "127.0.0.1:2",
                 "zone": ""}],
            "shards": [
                {"id": 0, "slots": [0, 32767], "epoch": 1, "version": 2, "state": "open",
                 "primary": "node-1", "isr": ["node-1"], "learners": [],
                 "records": {"count": 700, "bytes": 301, "bytes_max": 1000},
                 "digests_agree": true, "replicas": [
                    {"node": "node-1", "last": 9, "applied": 9, "digest": "00", "digest_at": 9},
                    {"node": "node-2", "last": 4, "applied": 4,
                     "stopped": "damage found at start"}]},
                {"id": 1, "slots": [32768, 65535], "epoch": 2, "version": 4, "state": "frozen",
                 "primary": null, "isr": ["node-1", "node-2"], "learners": ["node-3"],
                 "replicas": [], "digests_agree": false}],
            "losses": [
                {"shard": 1, "epoch": 2, "primary": "node-1", "last": 20, "by": null,
                 "at_ms": null, "given_up": [{"node": "node-2", "uuid": "02", "last": null}]},
                {"shard": 0, "epoch": 1, "primary": "node-1", "last": 7, "by": "me@here",
                 "at_ms": 9000, "given_up": [{"node": "node-2", "uuid": "02", "last": 9}]}]
        }))
        .unwrap()
    }

    #[test]
    fn the_summary_lists_problems_with_reasons() {
        let why =
            "its in-sync set (node-1, node-2) is at min_in_sync, and node-2 is down".to_owned();
        let want = Summary {
            nodes: 2,
            nodes_up: 1,
            shards: 2,
            shards_open: 1,
            in_sync_min: 1,
            in_sync_max: 2,
            lag_max: 5,
            records: 700,
            records_used_percent: 31,
            disk_full: vec!["node-1".to_owned()],
            digests_disagree: vec![1],
            damaged: vec![DamagedCopy {
                id: 0,
                node: "node-2".to_owned(),
                why: "damage found at start".to_owned(),
            }],
            not_open: vec![NotOpen { id: 1, state: "frozen".to_owned(), why }],
            losses: 2,
        };
        assert_eq!(cluster().summary(), want);
    }

    #[test]
    fn a_frozen_shard_lists_the_members_that_do_not_acknowledge() {
        let mut cluster = cluster();
        let blocker = |node: &str, standing: &str| BlockerInfo {
            node: node.to_owned(),
            standing: standing.to_owned(),
        };
        cluster.shards[1].hindered_by =
            vec![blocker("node-3", "copying"), blocker("node-2", "disk-full")];
        assert_eq!(
            cluster.shards[1].why(&cluster),
            "its in-sync set (node-1, node-2) cannot commit: the disk of node-2 is full, node-3 \
             is receiving a snapshot"
        );
    }
}
