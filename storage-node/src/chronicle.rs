//! Tells in the log who leads, who is in sync and what is frozen, as it changes.
//!
//! The engine does not log. So this looks at the replicas now and then and compares with what it saw before; what came
//! and went between two looks is not told.

use std::collections::BTreeMap;

use engine::ids::{CopyNo, Epoch, ShardId, StoreId};
use engine::message::DigestPoint;
use engine::node::{Finding, ReplicaView};
use tracing::{error, info, warn};

use crate::names::Names;

#[derive(Debug)]
pub struct Chronicle {
    names: Names,
    seen: BTreeMap<ShardId, Seen>,
}

/// What is told about when it changes.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
struct Seen {
    copy: Option<CopyNo>,
    promised: Epoch,
    leads: Option<Leads>,
    stopped: Option<&'static str>,
}

#[derive(Clone, Debug, Default, Eq, PartialEq)]
struct Leads {
    epoch: Epoch,
    serves: bool,
    frozen: bool,
    isr: Vec<StoreId>,
}

impl Chronicle {
    pub fn new(names: Names) -> Self {
        Self { names, seen: BTreeMap::new() }
    }

    pub fn look<'a>(&mut self, replicas: impl Iterator<Item = ReplicaView<'a>>) {
        for view in replicas {
            let now = Seen::from(&view);
            let before = self.seen.entry(view.shard).or_default();
            if *before != now {
                tell(&self.names, view.shard, before, &now);
                *before = now;
            }
        }
    }
}

impl Chronicle {
    /// Tells what an audit has found.
    pub fn found(&self, finding: &Finding) {
        match finding {
            Finding::DigestsDiffer { own, store, theirs, believed } => {
                let (node, at) = (self.names.of(*store), own.seq.0);
                error!(shard = %own.shard, at, own = digits(own), node, theirs_at = theirs.seq.0, theirs = digits(theirs),
                    believed, "two copies of a shard differ");
            }
            Finding::Scrubbed { shards, damaged } if damaged.is_empty() => {
                info!(shards, "scrubbed: everything is what was written");
            }
            Finding::Scrubbed { shards, damaged } => {
                let damaged = damaged.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
                error!(shards, damaged, "scrubbed: copies are not what was written");
            }
        }
    }
}

/// Counters, then sessions.
fn digits(point: &DigestPoint) -> String {
    format!("{:032x} {:032x}", point.counters, point.sessions)
}

impl From<&ReplicaView<'_>> for Seen {
    fn from(view: &ReplicaView<'_>) -> Self {
        let leads = view.primary.map(|primary| Leads {
            epoch: primary.epoch,
            serves: primary.active,
            frozen: primary.frozen,
            isr: primary.record.isr.clone(),
        });
        let copy = view.exists.then_some(view.copy);
        Self { copy, promised: view.promised, leads, stopped: view.stopped }
    }
}

fn tell(names: &Names, shard: ShardId, before: &Seen, now: &Seen) {
    if now.copy != before.copy {
        match now.copy {
            Some(copy) => info!(%shard, copy = copy.0, "holds a copy"),
            None => info!(%shard, "copy dropped"),
        }
    }
    if now.stopped != before.stopped
        && let Some(why) = now.stopped
    {
        error!(%shard, why, "stopped: this copy takes nothing more and is to be filled anew");
    }
    let nobody = Leads::default();
    let (was, is) = (before.leads.as_ref(), now.leads.as_ref());
    match (was, is) {
        (Some(was), None) => {
            info!(%shard, epoch = was.epoch.0, promised = now.promised.0, "leads no longer");
        }
        (None, None) if now.promised != before.promised => {
            info!(%shard, epoch = now.promised.0, "follows");
        }
        (_, None) => {}
        (_, Some(is)) => {
            let was = was.filter(|was| was.epoch == is.epoch);
            let isr = names.of_all(&is.isr);
            if was.is_none() {
                info!(%shard, epoch = is.epoch.0, isr, "leads, not serving yet");
            } else if was.is_some_and(|was| was.isr != is.isr) {
                info!(%shard, epoch = is.epoch.0, isr, "in-sync set changed");
            }
            let was = was.unwrap_or(&nobody);
            if is.serves && !was.serves {
                info!(%shard, epoch = is.epoch.0, "serves");
            }
            if is.frozen && !was.frozen {
                warn!(%shard, epoch = is.epoch.0, isr, "frozen: writes are refused until a member answers or is replaced");
            }
            if was.frozen && !is.frozen {
                info!(%shard, epoch = is.epoch.0, "open again");
            }
        }
    }
}
