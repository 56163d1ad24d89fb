//! What `GET /v1/cluster` says, and what follows from it.
//!
//! The reason why a shard is not open is worked out from the same answer, so it can be as old as that.

use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Cluster {
    pub(crate) cluster: String,
    pub(crate) nodes: Vec<Node>,
    pub(crate) shards: Vec<Shard>,
    pub(crate) losses: Vec<Loss>,
    /// Why nothing is placed yet, when the gateway says so ("2 of 3 nodes").
    pub(crate) waiting_for: Option<String>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Node {
    pub(crate) name: String,
    pub(crate) address: String,
    pub(crate) zone: String,
    pub(crate) boot: u64,
    pub(crate) state: String,
    /// It refuses writes for want of room.
    pub(crate) disk_full: bool,
    /// None: it has not scrubbed its disk since it started.
    pub(crate) last_scrub: Option<Scrub>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Scrub {
    pub(crate) ended_ms: u64,
    pub(crate) copies: u64,
    pub(crate) damaged: Vec<u64>,
}

/// An epoch that began with a copy which may lack what was acknowledged.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Loss {
    pub(crate) shard: u64,
    pub(crate) epoch: u64,
    pub(crate) primary: String,
    pub(crate) last: u64,
    pub(crate) given_up: Vec<GivenUp>,
    /// None: no operator was asked, since all copies were damaged.
    pub(crate) by: Option<String>,
    pub(crate) at_ms: Option<u64>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct GivenUp {
    pub(crate) node: String,
    pub(crate) last: Option<u64>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Shard {
    pub(crate) id: u64,
    pub(crate) epoch: u64,
    pub(crate) state: String,
    pub(crate) primary: Option<String>,
    pub(crate) isr: Vec<String>,
    pub(crate) learners: Vec<String>,
    pub(crate) hindered_by: Vec<Hindrance>,
    pub(crate) records: Records,
    pub(crate) replicas: Vec<Replica>,
    pub(crate) digests_agree: Option<bool>,
}

/// Of requests with a key.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Records {
    pub(crate) count: u64,
    pub(crate) bytes: u64,
    pub(crate) bytes_max: u64,
}

/// A member or learner that does not acknowledge.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Hindrance {
    pub(crate) node: String,
    pub(crate) standing: String,
}

impl Hindrance {
    fn in_words(&self) -> String {
        let node = &self.node;
        match self.standing.as_str() {
            "silent" => format!("{node} does not answer"),
            "disk-full" => format!("the disk of {node} is full"),
            "no-copy" => format!("{node} has no copy yet"),
            "lost-data" => format!("{node} lost data and is to be copied to"),
            "copying" => format!("{node} is being copied to"),
            "behind" => format!("{node} acknowledges too slowly"),
            other => format!("{node} is {other:?}"),
        }
    }
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Replica {
    pub(crate) node: String,
    pub(crate) last: Option<u64>,
    pub(crate) applied: Option<u64>,
    /// Why it takes nothing more.
    pub(crate) stopped: Option<String>,
}

/// What `--json` adds under `summary`.
#[derive(Debug, Eq, PartialEq, Serialize)]
pub(super) struct Summary {
    pub(super) nodes: usize,
    pub(super) nodes_up: usize,
    pub(super) shards: usize,
    pub(super) shards_open: usize,
    /// The smallest and largest in-sync set. Every set is full when the smallest is the number of replicas.
    pub(super) in_sync_min: usize,
    pub(super) in_sync_max: usize,
    /// The most log entries any replica is behind the longest log of its shard.
    pub(super) lag_max: u64,
    /// Records of requests with a key, and how much the fullest shard has used of its room for them.
    pub(super) records: u64,
    pub(super) records_used_percent: u64,
    /// Nodes that refuse writes for want of room.
    pub(super) disk_full: Vec<String>,
    pub(super) digests_disagree: Vec<u64>,
    pub(super) damaged: Vec<Damaged>,
    pub(super) not_open: Vec<NotOpen>,
    /// How many epochs began with a loss, ever.
    pub(super) losses: usize,
}

#[derive(Debug, Eq, PartialEq, Serialize)]
pub(super) struct NotOpen {
    pub(super) id: u64,
    pub(super) state: String,
    pub(super) why: String,
}

/// A copy that waits to be filled anew.
#[derive(Debug, Eq, PartialEq, Serialize)]
pub(super) struct Damaged {
    pub(super) id: u64,
    pub(super) node: String,
    pub(super) why: String,
}

impl Shard {
    fn damaged(&self) -> impl Iterator<Item = Damaged> {
        self.replicas.iter().filter_map(|replica| {
            let why = replica.stopped.clone()?;
            Some(Damaged { id: self.id, node: replica.node.clone(), why })
        })
    }

    pub(crate) fn is_open(&self) -> bool {
        self.state == "open"
    }

    fn longest(&self) -> u64 {
        self.replicas.iter().filter_map(|replica| replica.last).max().unwrap_or(0)
    }

    /// How many entries its slowest replica is behind.
    pub(super) fn lag(&self) -> u64 {
        let shortest = self.replicas.iter().filter_map(|replica| replica.last).min();
        self.longest() - shortest.unwrap_or_else(|| self.longest())
    }

    /// What its records of requests with a key take of the room that there is for them.
    fn used_percent(&self) -> u64 {
        let Records { bytes, bytes_max, .. } = self.records;
        (100 * bytes).div_ceil(bytes_max.max(1))
    }

    pub(super) fn why(&self, cluster: &Cluster) -> String {
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
            let why: Vec<_> = members.chain(learners).map(Hindrance::in_words).collect();
            return format!("its in-sync set ({isr}) can't commit: {}", why.join(", "));
        }
        match (self.state.as_str(), away.as_str()) {
            ("frozen", "") => format!("its in-sync set ({isr}) is too small or commits too slowly"),
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
    /// The cluster in a line.
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

    fn full(&self) -> impl Iterator<Item = &Node> {
        self.nodes.iter().filter(|node| node.disk_full)
    }

    pub(super) fn summary(&self) -> Summary {
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
            records: self.shards.iter().map(|shard| shard.records.count).sum(),
            records_used_percent: self.shards.iter().map(Shard::used_percent).max().unwrap_or(0),
            disk_full: self.full().map(|node| node.name.clone()).collect(),
            digests_disagree: self.shards.iter().filter(disagree).map(|shard| shard.id).collect(),
            damaged: self.shards.iter().flat_map(Shard::damaged).collect(),
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
    pub(in super::super) fn cluster() -> Cluster {
        serde_json::from_value(json!({
            "cluster": "dkc", "incarnation": 1,
            "nodes": [
                {"name": "node-1", "state": "up", "boot": 1, "address": "127.0.0.1:1", "zone": "", "disk_full": true},
                {"name": "node-2", "state": "down", "boot": 3, "address": "127.0.0.1:2", "zone": ""}],
            "shards": [
                {"id": 0, "slots": [0, 32767], "epoch": 1, "version": 2, "state": "open", "primary": "node-1",
                 "isr": ["node-1"], "learners": [], "records": {"count": 700, "bytes": 301, "bytes_max": 1000},
                 "digests_agree": true, "replicas": [
                    {"node": "node-1", "last": 9, "applied": 9, "digest": "00", "digest_at": 9},
                    {"node": "node-2", "last": 4, "applied": 4, "stopped": "damage found at start"}]},
                {"id": 1, "slots": [32768, 65535], "epoch": 2, "version": 4, "state": "frozen", "primary": null,
                 "isr": ["node-1", "node-2"], "learners": ["node-3"], "replicas": [], "digests_agree": false}],
            "losses": [
                {"shard": 1, "epoch": 2, "primary": "node-1", "last": 20, "by": null, "at_ms": null,
                 "given_up": [{"node": "node-2", "uuid": "02", "last": null}]},
                {"shard": 0, "epoch": 1, "primary": "node-1", "last": 7, "by": "me@here", "at_ms": 9000,
                 "given_up": [{"node": "node-2", "uuid": "02", "last": 9}]}]
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
            records: 700,
            records_used_percent: 31,
            disk_full: vec!["node-1".to_owned()],
            digests_disagree: vec![1],
            damaged: vec![Damaged {
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
    fn a_frozen_shard_names_who_does_not_acknowledge_and_why() {
        let mut cluster = cluster();
        let hindrance = |node: &str, standing: &str| Hindrance {
            node: node.to_owned(),
            standing: standing.to_owned(),
        };
        cluster.shards[1].hindered_by =
            vec![hindrance("node-3", "copying"), hindrance("node-2", "disk-full")];
        assert_eq!(
            cluster.shards[1].why(&cluster),
            "its in-sync set (node-1, node-2) can't commit: the disk of node-2 is full, node-3 is being copied to"
        );
    }
}
