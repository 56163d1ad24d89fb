//! Logs changes of role, in-sync set, readiness and damage of this node's replicas.
//!
//! The engine does not log. So the logger compares the replicas with its last look at them, at
//! regular intervals; a change that was reverted between two looks is not logged.

use std::collections::BTreeMap;

use engine::ids::{CopyNo, Epoch, ShardId, StoreId};
use engine::message::DigestPoint;
use engine::node::{AuditFinding, ReplicaView};
use tracing::{error, info, warn};

use crate::names::StoreNames;

/// Logs changes of replicas.
#[derive(Debug)]
pub struct ReplicaLogger {
    names: StoreNames,
    logged: BTreeMap<ShardId, LoggedReplica>,
}

/// The state of a replica whose changes are logged.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
struct LoggedReplica {
    copy: Option<CopyNo>,
    promised: Epoch,
    leads: Option<LoggedPrimary>,
    stopped: Option<&'static str>,
}

#[derive(Clone, Debug, Default, Eq, PartialEq)]
struct LoggedPrimary {
    epoch: Epoch,
    serves: bool,
    frozen: bool,
    isr: Vec<StoreId>,
}

impl ReplicaLogger {
    /// Creates a logger that has not seen any replica.
    pub fn new(names: StoreNames) -> Self {
        Self { names, logged: BTreeMap::new() }
    }

    /// Logs the changes since the last call.
    pub fn log_changes<'a>(&mut self, replicas: impl Iterator<Item = ReplicaView<'a>>) {
        for view in replicas {
            let before = self.logged.entry(view.shard).or_default();
            if !before.shows(&view) {
                let now = LoggedReplica::from(&view);
                log_change(&self.names, view.shard, before, &now);
                *before = now;
            }
        }
    }
}

impl ReplicaLogger {
    /// Logs a finding of a digest comparison or a scrub.
    pub fn log_finding(&self, finding: &AuditFinding) {
        match finding {
            AuditFinding::DigestsDiffer { own, store, theirs, decision } => {
                let (node, at) = (self.names.of(*store), own.seq.0);
                error!(
                    shard = %own.shard,
                    at,
                    own = digits(own),
                    node,
                    theirs_at = theirs.seq.0,
                    theirs = digits(theirs),
                    decision,
                    "copies of a shard differ"
                );
            }
            AuditFinding::Scrubbed { shards, damaged } if damaged.is_empty() => {
                info!(shards, "scrub found no damage");
            }
            AuditFinding::Scrubbed { shards, damaged } => {
                let damaged = damaged.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
                error!(shards, damaged, "scrub found damaged copies");
            }
        }
    }
}

/// Formats the digests of counters and sessions.
fn digits(point: &DigestPoint) -> String {
    format!("{:032x} {:032x}", point.counters, point.sessions)
}

impl LoggedReplica {
    /// Returns whether this is what the view shows. Called for every shard several times a second,
    /// so nothing is copied.
    fn shows(&self, view: &ReplicaView<'_>) -> bool {
        let leads = match (&self.leads, view.primary) {
            (Some(was), Some(is)) => {
                (was.epoch, was.serves, was.frozen) == (is.epoch, is.active, is.frozen)
                    && was.isr == is.record.isr
            }
            (None, None) => true,
            _ => false,
        };
        leads
            && self.copy == view.exists.then_some(view.copy)
            && self.promised == view.promised
            && self.stopped == view.stopped
    }
}

impl From<&ReplicaView<'_>> for LoggedReplica {
    fn from(view: &ReplicaView<'_>) -> Self {
        let leads = view.primary.map(|primary| LoggedPrimary {
            epoch: primary.epoch,
            serves: primary.active,
            frozen: primary.frozen,
            isr: primary.record.isr.clone(),
        });
        let copy = view.exists.then_some(view.copy);
        Self { copy, promised: view.promised, leads, stopped: view.stopped }
    }
}

fn log_change(names: &StoreNames, shard: ShardId, before: &LoggedReplica, now: &LoggedReplica) {
    if now.copy != before.copy {
        match now.copy {
            Some(copy) => info!(%shard, copy = copy.0, "copy present"),
            None => info!(%shard, "copy dropped"),
        }
    }
    if now.stopped != before.stopped
        && let Some(why) = now.stopped
    {
        error!(%shard, why, "copy stopped, it must be filled again");
    }
    let follower = LoggedPrimary::default();
    let (was, is) = (before.leads.as_ref(), now.leads.as_ref());
    match (was, is) {
        (Some(was), None) => {
            info!(%shard, epoch = was.epoch.0, promised = now.promised.0, "stepped down");
        }
        (None, None) if now.promised != before.promised => {
            info!(%shard, epoch = now.promised.0, "became follower");
        }
        (_, None) => {}
        (_, Some(is)) => {
            let was = was.filter(|was| was.epoch == is.epoch);
            let isr = names.of_all(&is.isr);
            if was.is_none() {
                info!(%shard, epoch = is.epoch.0, isr, "became primary, not serving yet");
            } else if was.is_some_and(|was| was.isr != is.isr) {
                info!(%shard, epoch = is.epoch.0, isr, "in-sync set changed");
            }
            let was = was.unwrap_or(&follower);
            if is.serves && !was.serves {
                info!(%shard, epoch = is.epoch.0, "serving writes");
            }
            if is.frozen && !was.frozen {
                warn!(
                    %shard,
                    epoch = is.epoch.0,
                    isr,
                    "shard frozen: writes are refused until a member answers or is replaced"
                );
            }
            if was.frozen && !is.frozen {
                info!(%shard, epoch = is.epoch.0, "shard open again");
            }
        }
    }
}
