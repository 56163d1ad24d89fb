//! The changes between two states of a cluster, as sentences.

use std::collections::BTreeMap;

use super::page::{ClusterInfo, NodeInfo, ShardInfo};
use super::table::listed;

/// Lists the changes in a causal order: nodes that failed, shards that closed, and repairs.
pub(super) fn changes_between(before: &ClusterInfo, now: &ClusterInfo) -> Vec<String> {
    let mut changes = Vec::new();
    if now.waiting_for != before.waiting_for
        && let Some(what) = &now.waiting_for
    {
        changes.push(format!("waiting for {what}"));
    }
    nodes(before, now, &mut changes);
    let was: BTreeMap<u64, &ShardInfo> =
        before.shards.iter().map(|shard| (shard.id, shard)).collect();
    let both = || now.shards.iter().filter_map(|shard| Some((*was.get(&shard.id)?, shard)));
    let placed = now.shards.len() - both().count();
    if placed > 0 {
        changes.push(format!("{placed} shards placed"));
    }
    states(now, both(), &mut changes);
    primaries(both(), &mut changes);
    opened(now, both(), &mut changes);
    members(both(), &mut changes);
    for (was, shard) in both() {
        if shard.digests_agree == Some(false) && was.digests_agree != Some(false) {
            changes.push(format!("shard {}: REPLICAS HAVE DIFFERENT COUNTERS", shard.id));
        }
    }
    changes
}

fn nodes(before: &ClusterInfo, now: &ClusterInfo, changes: &mut Vec<String>) {
    let of = |cluster: &ClusterInfo, name: &str| {
        cluster
            .nodes
            .iter()
            .find(|node| node.name == name)
            .map(|node| (node.boot, node.state.clone()))
    };
    for NodeInfo { name, state, boot, .. } in &now.nodes {
        match of(before, name) {
            None => changes.push(format!("{name} joined, {state}")),
            Some((was, _)) if was != *boot => changes.push(format!("{name} restarted, {state}")),
            Some((_, was)) if was != *state => changes.push(format!("{name} {state}")),
            Some(_) => {}
        }
    }
    for node in before.nodes.iter().filter(|node| of(now, &node.name).is_none()) {
        changes.push(format!("{} left the cluster", node.name));
    }
}

/// The same shard in both states.
type ShardPair<'a> = (&'a ShardInfo, &'a ShardInfo);

fn states<'a>(
    now: &ClusterInfo,
    both: impl Iterator<Item = ShardPair<'a>>,
    changes: &mut Vec<String>,
) {
    let mut closed = BTreeMap::<(&str, String), Vec<u64>>::new();
    for (_, shard) in both.filter(|(was, shard)| was.state != shard.state && !shard.is_open()) {
        closed.entry((&shard.state, shard.why(now))).or_default().push(shard.id);
    }
    for ((state, why), ids) in closed {
        changes.push(format!("{} {state}: {} ({why})", shards(ids.len()), listed(&ids)));
    }
}

fn primaries<'a>(both: impl Iterator<Item = ShardPair<'a>>, changes: &mut Vec<String>) {
    let mut moved = BTreeMap::<(&str, &str), usize>::new();
    let mut reelected = BTreeMap::<&str, usize>::new();
    for (was, shard) in both.filter(|(was, shard)| was.epoch != shard.epoch) {
        let name = |shard: &'a ShardInfo| shard.primary.as_deref().unwrap_or("none");
        match (name(was), name(shard)) {
            (from, to) if from == to => *reelected.entry(to).or_default() += 1,
            pair => *moved.entry(pair).or_default() += 1,
        }
    }
    if !moved.is_empty() {
        let each = moved.iter().map(|((from, to), count)| format!("{count} {from} → {to}"));
        let all = moved.values().sum();
        changes.push(format!("{} moved: {}", shards(all), each.collect::<Vec<_>>().join(", ")));
    }
    for (node, count) in reelected {
        changes.push(format!("{} still led by {node}, in a new epoch", shards(count)));
    }
}

fn opened<'a>(
    now: &ClusterInfo,
    both: impl Iterator<Item = ShardPair<'a>>,
    changes: &mut Vec<String>,
) {
    let count = both.filter(|(was, shard)| !was.is_open() && shard.is_open()).count();
    if count > 0 {
        let open = now.shards.iter().filter(|shard| shard.is_open()).count();
        changes.push(format!("{} open again, {open} of {} open", shards(count), now.shards.len()));
    }
}

fn members<'a>(both: impl Iterator<Item = ShardPair<'a>>, changes: &mut Vec<String>) {
    let (mut left, mut joined) = (BTreeMap::<&str, usize>::new(), BTreeMap::<&str, usize>::new());
    let mut learns = BTreeMap::<&str, usize>::new();
    for (was, shard) in both {
        let lacks = |names: &'a [String], others: &'a [String]| {
            names.iter().filter(|name| !others.contains(name)).map(String::as_str)
        };
        lacks(&was.isr, &shard.isr).for_each(|name| *left.entry(name).or_default() += 1);
        lacks(&shard.isr, &was.isr).for_each(|name| *joined.entry(name).or_default() += 1);
        lacks(&shard.learners, &was.learners)
            .for_each(|name| *learns.entry(name).or_default() += 1);
    }
    for (what, names) in
        [("out of sync in", left), ("catching up in", learns), ("in sync again in", joined)]
    {
        for (name, count) in names {
            changes.push(format!("{name} {what} {}", shards(count)));
        }
    }
}

fn shards(count: usize) -> String {
    if count == 1 { "1 shard".to_owned() } else { format!("{count} shards") }
}

#[cfg(test)]
mod tests {
    use super::super::page::tests::cluster;
    use super::*;

    /// Three shards of two nodes, all open, led by node-2.
    fn well() -> ClusterInfo {
        let mut well = cluster();
        well.nodes[1].state = "up".to_owned();
        let shard = ShardInfo {
            epoch: 1,
            primary: Some("node-2".to_owned()),
            isr: vec!["node-1".to_owned(), "node-2".to_owned()],
            ..well.shards[0].clone()
        };
        well.shards = (0..3).map(|id| ShardInfo { id, ..shard.clone() }).collect();
        well
    }

    fn changed(change: impl Fn(&mut ClusterInfo)) -> Vec<String> {
        let mut now = well();
        change(&mut now);
        changes_between(&well(), &now)
    }

    #[test]
    fn a_failover_is_listed_in_order() {
        let mut down = well();
        down.nodes[1].state = "down".to_owned();
        for shard in &mut down.shards[..2] {
            shard.state = "no-primary".to_owned();
        }
        let want = [
            "node-2 down",
            "2 shards no-primary: 0,1 (waiting for a primary out of node-1, node-2: node-2 is \
             down)",
        ];
        assert_eq!(changes_between(&well(), &down), want);
        let mut moved = down.clone();
        for shard in &mut moved.shards {
            shard.state = "open".to_owned();
            (shard.epoch, shard.primary) = (2, Some("node-1".to_owned()));
            shard.isr = vec!["node-1".to_owned()];
        }
        let want = [
            "3 shards moved: 3 node-2 → node-1",
            "2 shards open again, 3 of 3 open",
            "node-2 out of sync in 3 shards",
        ];
        assert_eq!(changes_between(&down, &moved), want);
        let mut back = moved.clone();
        (back.nodes[1].state, back.nodes[1].boot) = ("up".to_owned(), 4);
        back.shards[0].learners = vec!["node-2".to_owned()];
        back.shards[1].isr = well().shards[1].isr.clone();
        let want = [
            "node-2 restarted, up",
            "node-2 catching up in 1 shard",
            "node-2 in sync again in 1 shard",
        ];
        assert_eq!(changes_between(&moved, &back), want);
    }

    #[test]
    fn each_change_has_its_sentence() {
        assert_eq!(changed(|_| {}), Vec::<String>::new());
        assert_eq!(
            changed(|now| now.nodes[0].name = "node-3".to_owned()),
            ["node-3 joined, up", "node-1 left the cluster"]
        );
        assert_eq!(
            changed(|now| now.shards[2].epoch = 5),
            ["1 shard still led by node-2, in a new epoch"]
        );
        assert_eq!(
            changed(|now| now.waiting_for = Some("2 of 3 nodes".to_owned())),
            ["waiting for 2 of 3 nodes"]
        );
        assert_eq!(
            changed(|now| now.shards[0].digests_agree = Some(false)),
            ["shard 0: REPLICAS HAVE DIFFERENT COUNTERS"]
        );
        let none = ClusterInfo { shards: Vec::new(), ..well() };
        assert_eq!(changes_between(&none, &well()), ["3 shards placed"]);
    }
}
