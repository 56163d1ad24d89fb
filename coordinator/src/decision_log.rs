//! Logs the decisions of the state machine, with their nodes, shards, reasons and durations.
//!
//! A failover is one line per node and successor, not one per shard: an operator reads it at night.

use std::time::Duration;

use engine::coordinator::Decision;
use engine::coordinator::decision::{Cause, PromotionReason};
use engine::ids::{Seq, ShardId, StoreBoot, StoreId};
use engine::records::LossRecord;
use tracing::{debug, error, info, warn};

use crate::metrics::Gauges;
use crate::node_directory::NodeDirectory;

/// Promotions that are logged in one line.
struct Failover {
    from: StoreBoot,
    to: StoreBoot,
    why: PromotionReason,
    shards: Vec<ShardId>,
    took_ms: u64,
}

/// Logs and counts the decisions of one turn.
pub(crate) fn log_decisions(decisions: Vec<Decision>, directory: &NodeDirectory, gauges: &Gauges) {
    let mut failovers: Vec<Failover> = Vec::new();
    for decision in decisions {
        match decision {
            Decision::Promoted { shard, epoch, from, to, why, last, took_ms } => {
                gauges.promotions.inc();
                gauges.promotion_seconds.observe(Duration::from_millis(took_ms).as_secs_f64());
                debug!(
                    %shard,
                    epoch = epoch.0,
                    last_epoch = last.0.0,
                    last_seq = last.1.0,
                    took_ms,
                    "promoted"
                );
                let alike = |one: &&mut Failover| (one.from, one.to, one.why) == (from, to, why);
                match failovers.iter_mut().find(alike) {
                    Some(failover) => {
                        failover.shards.push(shard);
                        failover.took_ms = failover.took_ms.max(took_ms);
                    }
                    None => {
                        failovers.push(Failover { from, to, why, shards: vec![shard], took_ms })
                    }
                }
            }
            other => log_decision(&other, directory, gauges),
        }
    }
    for failover in failovers {
        let Failover { from, to, why, shards, took_ms } = failover;
        let (from, to) = (process(directory, from), process(directory, to));
        let why = reason_text(why);
        info!(
            from,
            to,
            why,
            shards = shard_list(&shards),
            count = shards.len(),
            took_ms,
            "promoted"
        );
    }
}

fn log_decision(decision: &Decision, directory: &NodeDirectory, gauges: &Gauges) {
    let name = |store: &StoreId| directory.name(*store);
    match decision {
        Decision::BecameLeader { term, stores, shards } => {
            info!(term, stores, shards, "became leader, state loaded");
        }
        Decision::PlacementWaits(wait) => {
            info!(nodes = wait.nodes, needed = wait.of, "shard placement waits for nodes");
        }
        Decision::Placed { shards } => info!(shards, "placed new shards"),
        Decision::Died { process: who, why } if *why == Cause::Leaving => {
            gauges.died(*why);
            info!(node = process(directory, *who), "node shutting down, moving its shards");
        }
        Decision::Died { process: who, why } => {
            gauges.died(*why);
            warn!(node = process(directory, *who), why = cause_text(*why), "node is dead");
        }
        Decision::Returned(who) => {
            info!(node = process(directory, *who), "node is alive again");
        }
        Decision::Leaderless { shard, why } => {
            warn!(%shard, why, "no member can be promoted for now");
        }
        Decision::LossAccepted(loss) => {
            gauges.promotions.inc();
            gauges.losses.inc();
            log_loss(loss, directory);
        }
        Decision::Removed { store, shards } => {
            info!(node = name(store), shards, "node removed from in-sync sets");
        }
        Decision::Recruited { shard, store, instead: None } => {
            info!(%shard, node = name(store), "added a learner");
        }
        Decision::Recruited { shard, store, instead: Some(instead) } => {
            info!(%shard, node = name(store), instead = name(instead), "added a learner");
        }
        Decision::Released { shard, store } => {
            info!(%shard, node = name(store), "removed a copy");
        }
        Decision::Lost { store, to } => {
            let node = name(store);
            warn!(node, %store, %to, "store lost: another store has its name, and gets its shards");
        }
        Decision::Retired { store } => {
            info!(node = name(store), %store, "node removed from the cluster");
        }
        Decision::Draining(store) => {
            info!(node = name(store), "draining node: its shards and copies move to other nodes");
        }
        Decision::Undrained(store) => info!(node = name(store), "drain of node canceled"),
        Decision::Cleared(store) => {
            info!(node = name(store), "store no longer suspect: all its copies are new")
        }
        Decision::Paused(true) => info!("an operator paused moves for balance alone"),
        Decision::Paused(false) => info!("an operator resumed moves for balance alone"),
        Decision::Guarded { away, of } => {
            warn!(away, of, "many nodes lost at once, creation of new copies paused");
        }
        Decision::Unguarded => info!("creation of new copies resumed"),
        // The caller logs promotions together.
        Decision::Promoted { .. } => {}
    }
}

fn process(directory: &NodeDirectory, process: StoreBoot) -> String {
    format!("{} (boot {})", directory.name(process.store), process.boot.0)
}

fn reason_text(reason: PromotionReason) -> &'static str {
    match reason {
        PromotionReason::Dead(why) => cause_text(why),
        PromotionReason::Restarted => "its process was started again",
        PromotionReason::Gone => "its store is lost or retired",
        PromotionReason::Resigned => "it resigned: it reaches neither peers nor etcd",
        PromotionReason::CutOff => "it is frozen, and another member reaches more of the cluster",
        PromotionReason::HandedOver => "it has stepped down for another member",
    }
}

/// Logs a data loss with all fields of its record in etcd: an operator looks for these copies.
fn log_loss(loss: &LossRecord, directory: &NodeDirectory) {
    let given_up = |(store, last): &(StoreId, Option<Seq>)| {
        let known = match last {
            Some(seq) => format!("known to have all entries up to {}", seq.0),
            None => "state unknown".to_owned(),
        };
        format!("{} (store {store}, {known})", directory.name(*store))
    };
    let given_up: Vec<String> = loss.given_up.iter().map(given_up).collect();
    let by = loss.accepted_by.as_ref().map(|operator| operator.name.as_str());
    error!(
        shard = %loss.shard,
        epoch = loss.epoch.0,
        primary = process(directory, loss.primary),
        log_ends_at = loss.last.1.0,
        given_up = given_up.join(", "),
        accepted_by = by.unwrap_or("no operator: all trusted members replied, all are damaged"),
        "a shard is led with a loss: entries that this copy lacks are given up"
    );
}

/// Returns the result of a failed probe, as a text for the log.
fn cause_text(cause: Cause) -> &'static str {
    match cause {
        Cause::Refused => "its address refuses connections",
        Cause::Replaced => "another process answers at its address",
        Cause::Silent => "it does not reply",
        Cause::DiskStalled => "its disk has stalled",
        Cause::Leaving => "it is shutting down",
    }
}

/// Returns the first few shards, and the number of the others.
fn shard_list(shards: &[ShardId]) -> String {
    const MOST: usize = 12;
    let named: Vec<String> = shards.iter().take(MOST).map(ShardId::to_string).collect();
    match shards.len().saturating_sub(MOST) {
        0 => named.join(","),
        more => format!("{} and {more} more", named.join(",")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_list_is_truncated_with_a_count() {
        let shards: Vec<ShardId> = (0..14).map(ShardId).collect();
        assert_eq!(shard_list(&shards[..2]), "0,1");
        assert_eq!(shard_list(&shards), "0,1,2,3,4,5,6,7,8,9,10,11 and 2 more");
    }
}
