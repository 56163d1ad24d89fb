//! The cluster as text tables: all nodes, and the shards that have a problem.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::page::{ClusterInfo, DamagedCopy, LossInfo, NodeInfo, NotOpen, ShardInfo, Summary};
use crate::output::{grouped, table};

/// The maximum number of rows without `--all`.
const ROWS_MAX: usize = 20;
/// A smaller lag is normal under load and no problem.
const LAG_MIN: u64 = 1_000;
/// The maximum number of losses without `--all`, since losses are listed for ever.
const LOSSES_MAX: usize = 3;

/// Formats the cluster; `all`: with every shard and every loss.
pub(super) fn text(cluster: &ClusterInfo, all: bool) -> String {
    let summary = cluster.summary();
    let mut text = format!("{}\n\n", cluster.headline());
    text += &nodes(cluster);
    let has_problem = |shard: &&ShardInfo| {
        let short = shard.isr.len() < summary.in_sync_max || !shard.learners.is_empty();
        all || short || !shard.is_open() || shard.lag() >= LAG_MIN
    };
    if !cluster.shards.is_empty() {
        let Summary { shards, shards_open, in_sync_min, in_sync_max, lag_max, .. } = summary;
        let members = match in_sync_min == in_sync_max {
            true => in_sync_max.to_string(),
            false => format!("{in_sync_min} to {in_sync_max}"),
        };
        let lag = grouped(lag_max);
        text += &format!(
            "\n{shards_open} of {shards} shards open, in-sync sets of {members} replicas, largest \
             lag {lag} entries\n"
        );
        if summary.records > 0 {
            let (records, percent) = (grouped(summary.records), summary.records_used_percent);
            text += &format!(
                "{records} idempotency records, at most {percent} % of a shard's quota for them \
                 used\n"
            );
        }
    }
    let shown: Vec<_> = cluster.shards.iter().filter(has_problem).collect();
    let most = if all { shown.len() } else { shown.len().min(ROWS_MAX) };
    if most > 0 {
        text.push('\n');
        text += &shards(&shown[..most]);
    }
    if shown.len() > most {
        text += &format!("… and {} more (--all)\n", shown.len() - most);
    }
    if !summary.disk_full.is_empty() {
        text += &format!("\ndisk full, rejecting writes: {}\n", summary.disk_full.join(", "));
    }
    let mut reasons = BTreeMap::<_, Vec<u64>>::new();
    for NotOpen { id, state, why } in &summary.not_open {
        reasons.entry((state, why)).or_default().push(*id);
    }
    if !reasons.is_empty() {
        text += "\nnot open:\n";
    }
    for ((state, why), ids) in reasons {
        text += &format!("  {} {state}: {why}\n", named(&ids));
    }
    if !summary.damaged.is_empty() {
        text += "\ndamaged copies, being rebuilt and not read:\n";
    }
    for DamagedCopy { id, node, why } in &summary.damaged {
        text += &format!("  shard {id} on {node}: {why}\n");
    }
    text += &losses(cluster, all, SystemTime::now());
    text += &scrubs(cluster, SystemTime::now());
    for id in &summary.digests_disagree {
        text += &format!("\nshard {id}: REPLICAS HAVE DIFFERENT COUNTERS\n");
    }
    text
}

/// Formats shards as a subject with verb: "shard 7 is", "3 shards (0,1,2) are".
fn named(ids: &[u64]) -> String {
    match ids {
        [id] => format!("shard {id} is"),
        _ => format!("{} shards ({}) are", ids.len(), listed(ids)),
    }
}

/// Lists the first ids, with an ellipsis if there are more.
pub(super) fn listed(ids: &[u64]) -> String {
    const MOST: usize = 8;
    let mut text = ids.iter().take(MOST).map(u64::to_string).collect::<Vec<_>>().join(",");
    if ids.len() > MOST {
        text += ",…";
    }
    text
}

fn nodes(cluster: &ClusterInfo) -> String {
    let row = |node: &NodeInfo| {
        let NodeInfo { name, state, zone, address, .. } = node;
        let count =
            |holds: &dyn Fn(&&ShardInfo) -> bool| cluster.shards.iter().filter(holds).count();
        let primaries = count(&|shard| shard.primary.as_ref() == Some(name));
        let replicas = count(&|shard| shard.isr.contains(name) || shard.learners.contains(name));
        let in_sync = count(&|shard| shard.isr.contains(name));
        let numbers = [primaries, replicas, in_sync].map(|number| number.to_string());
        let zone = if zone.is_empty() { "-" } else { zone };
        let words = [name.as_str(), state, zone, address].map(str::to_owned);
        words.into_iter().chain(numbers).collect()
    };
    let columns = ["<NODE", "<STATE", "<ZONE", "<ADDRESS", ">PRIMARIES", ">REPLICAS", ">IN SYNC"];
    let mut nodes: Vec<_> = cluster.nodes.iter().collect();
    nodes.sort_by(|a, b| a.name.cmp(&b.name));
    table(&columns, nodes.into_iter().map(row).collect())
}

/// Lists the losses. Those without an operator come first: they have no time, so each of them may
/// be the newest. The others follow, the latest first according to the operators' clocks.
fn losses(cluster: &ClusterInfo, all: bool, now: SystemTime) -> String {
    let mut losses: Vec<&LossInfo> = cluster.losses.iter().collect();
    losses
        .sort_by_key(|loss| (loss.at_ms.is_some(), Reverse((loss.at_ms, loss.epoch, loss.shard))));
    let most = if all { losses.len() } else { losses.len().min(LOSSES_MAX) };
    let mut text = String::new();
    if most > 0 {
        text += "\npromoted with data loss (permanent):\n";
    }
    for loss in &losses[..most] {
        let LossInfo { shard, epoch, primary, last, given_up, .. } = loss;
        let given_up: Vec<_> = given_up.iter().map(|it| it.node.as_str()).collect();
        let given_up = if given_up.is_empty() { "none".to_owned() } else { given_up.join(", ") };
        let by = match (&loss.by, loss.at_ms) {
            (Some(by), Some(at_ms)) => format!("accepted by {by} {}", ago(at_ms, now)),
            _ => "all copies were damaged".to_owned(),
        };
        text += &format!(
            "  shard {shard} from epoch {epoch}: copy of {primary}, last position {last}; lost \
             copies: {given_up}; {by}\n"
        );
    }
    if losses.len() > most {
        text += &format!("  … and {} more (--all)\n", losses.len() - most);
    }
    text
}

fn ago(at_ms: u64, now: SystemTime) -> String {
    let at = UNIX_EPOCH + Duration::from_millis(at_ms);
    match now.duration_since(at).unwrap_or_default().as_secs() {
        0..60 => "just now".to_owned(),
        seconds @ 60..7_200 => format!("{} min ago", seconds / 60),
        seconds => format!("{} h ago", seconds / 3_600),
    }
}

/// Lists the last scrub of each node; empty if no node has scrubbed since it started.
fn scrubs(cluster: &ClusterInfo, now: SystemTime) -> String {
    let scrubbed = cluster.nodes.iter().filter_map(|node| {
        let scrub = node.last_scrub.as_ref()?;
        let ago = ago(scrub.ended_ms, now);
        let found = match &scrub.damaged[..] {
            [] => format!("{} copies, no damage", scrub.copies),
            damaged => format!(
                "DAMAGED: {} {}",
                if damaged.len() == 1 { "shard" } else { "shards" },
                listed(damaged)
            ),
        };
        Some(format!("  {} {ago}: {found}\n", node.name))
    });
    let lines: String = scrubbed.collect();
    if lines.is_empty() { lines } else { format!("\nlast scrubs:\n{lines}") }
}

fn shards(shards: &[&ShardInfo]) -> String {
    let row = |shard: &&ShardInfo| {
        let ShardInfo { id, epoch, state, primary, isr, learners, .. } = shard;
        vec![
            id.to_string(),
            state.clone(),
            epoch.to_string(),
            primary.clone().unwrap_or_else(|| "-".to_owned()),
            shard.lag().to_string(),
            isr.join(","),
            learners.join(","),
        ]
    };
    let columns = [">SHARD", "<STATE", ">EPOCH", "<PRIMARY", ">LAG", "<IN SYNC", "<LEARNERS"];
    table(&columns, shards.iter().map(row).collect())
}

#[cfg(test)]
mod tests {
    use super::super::page::ScrubInfo;
    use super::super::page::tests::cluster;
    use super::*;

    #[test]
    fn problems_are_shown_with_reasons() {
        let want = "\
cluster dkc: 1 of 2 nodes up, 1 of 2 shards open

NODE    STATE  ZONE  ADDRESS      PRIMARIES  REPLICAS  IN SYNC
node-1  up     -     127.0.0.1:1          1         2        2
node-2  down   -     127.0.0.1:2          0         1        1

1 of 2 shards open, in-sync sets of 1 to 2 replicas, largest lag 5 entries
700 idempotency records, at most 31 % of a shard's quota for them used

SHARD  STATE   EPOCH  PRIMARY  LAG  IN SYNC        LEARNERS
    0  open        1  node-1     5  node-1
    1  frozen      2  -          0  node-1,node-2  node-3

disk full, rejecting writes: node-1

not open:
  shard 1 is frozen: its in-sync set (node-1, node-2) is at min_in_sync, and node-2 is down

damaged copies, being rebuilt and not read:
  shard 0 on node-2: damage found at start

shard 1: REPLICAS HAVE DIFFERENT COUNTERS
";
        let cluster = ClusterInfo { losses: vec![], ..cluster() };
        assert_eq!(text(&cluster, false), want);
    }

    #[test]
    fn losses_without_a_time_are_shown_first_and_then_the_latest() {
        let mut cluster = cluster();
        let now = UNIX_EPOCH + Duration::from_secs(609);
        let accepted = "  shard 0 from epoch 1: copy of node-1, last position 7; lost copies: \
                        node-2; accepted by me@here 10 min ago\n";
        let damaged = "  shard 1 from epoch 2: copy of node-1, last position 20; lost copies: \
                       node-2; all copies were damaged\n";
        let want = format!("\npromoted with data loss (permanent):\n{damaged}{accepted}");
        assert_eq!(losses(&cluster, false, now), want);
        // The loss without an operator stays first, however many an operator accepted since.
        let by_operator = cluster.losses[1].clone();
        let later =
            (10..15).map(|at_s| LossInfo { at_ms: Some(at_s * 1_000), ..by_operator.clone() });
        cluster.losses.extend(later);
        let text = losses(&cluster, false, now);
        assert!(text.contains(damaged) && text.ends_with("  … and 4 more (--all)\n"), "{text}");
        assert_eq!(text.lines().nth(3), Some(accepted.replace("10 min", "9 min").trim_end()));
        cluster.losses = vec![cluster.losses[0].clone(); 5];
        assert!(losses(&cluster, false, now).ends_with("  … and 2 more (--all)\n"));
        assert_eq!(losses(&cluster, true, now).lines().count(), 7);
    }

    #[test]
    fn scrubs_are_listed_with_their_age() {
        let mut cluster = cluster();
        let now = UNIX_EPOCH + Duration::from_secs(100_000);
        assert_eq!(scrubs(&cluster, now), "");
        let scrub = |ended_ms, damaged| Some(ScrubInfo { ended_ms, copies: 24, damaged });
        cluster.nodes[0].last_scrub = scrub(99_400_000, vec![]);
        cluster.nodes[1].last_scrub = scrub(1_000_000, vec![3, 5]);
        let want = "\nlast scrubs:\n  node-1 10 min ago: 24 copies, no damage\n  node-2 27 h ago: \
                    DAMAGED: shards 3,5\n";
        assert_eq!(scrubs(&cluster, now), want);
    }

    #[test]
    fn healthy_shards_are_only_counted() {
        let mut cluster = cluster();
        cluster.shards.truncate(1);
        cluster.shards[0].replicas[1].stopped = None;
        assert!(!text(&cluster, false).contains("SHARD"));
        assert!(text(&cluster, true).contains("SHARD"));
        // Many shards that are not open for the same reason.
        let mut away = cluster.shards[0].clone();
        away.state = "no-primary".to_owned();
        cluster.shards = (0..30).map(|id| ShardInfo { id, ..away.clone() }).collect();
        let text = text(&cluster, false);
        assert!(text.contains("… and 10 more (--all)"), "{text}");
        assert!(text.contains("  30 shards (0,1,2,3,4,5,6,7,…) are no-primary: waiting"), "{text}");
    }
}
