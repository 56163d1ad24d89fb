//! Time that passes while nothing is in flight: an hour, a night, a few days, in one step.
//!
//! The clocks of all machines leap together, the monotonic ones and the wall clocks: long waits are
//! due now, and long leases of the state machines are over. The rest of the world does not move
//! meanwhile: leases in etcd, connections and disks are as they were, as if they had been kept
//! alive all the while.
//!
//! Clients pause before it. A run that can't be brought to rest does not leap.

use std::collections::BTreeMap;

use engine::ids::{ShardId, StoreId};

use super::cluster::SimCluster;
use super::coverage::Path;
use super::event::SimEvent;

/// The interval at which the run is checked for being at rest.
const LOOK: u64 = 2_000;
/// The time limit for coming to rest. Clients give up before.
const PATIENCE: u64 = 2_000_000;
/// The length of one leap of a healed cluster that only waits.
const HEALING_LEAP: u64 = 60_000_000;
/// The interval between these leaps.
const HEALING_EVERY: u64 = 3_000_000;

impl SimCluster {
    /// Pauses the clients, and lets the clocks leap when all is at rest.
    pub fn leap(&mut self, far: u64, since: u64) {
        let at_rest = self.clients.in_flight() == 0 && self.tokens.is_idle();
        self.core.at_rest = true;
        if at_rest {
            self.core.leap(far);
            self.core.oracle.coverage.reached(Path::Leapt);
        }
        if at_rest || self.core.now > since + PATIENCE {
            self.core.at_rest = false;
            return;
        }
        self.core.after(LOOK, SimEvent::Leap { far, since });
    }

    /// The number of entries of its primary's log that each learner still lacks.
    pub fn lags(&self) -> BTreeMap<(ShardId, StoreId), u64> {
        let last = |store, shard| {
            let running = self.nodes.iter().find(|node| node.store == store)?.node()?;
            let view = running.replicas().find(|view| view.shard == shard)?;
            Some(view.last.seq.0)
        };
        let mut lags = BTreeMap::new();
        for (config, _) in self.core.etcd.shards() {
            let shard = config.shard();
            for &store in &config.learners {
                if let (Some(led), Some(got)) =
                    (last(config.primary.store, shard), last(store, shard))
                {
                    lags.insert((shard, store), led.saturating_sub(got));
                }
            }
        }
        lags
    }
}

/// The leaps that help a healed cluster over its waits.
#[derive(Default)]
pub struct HealingLeaps {
    /// The earliest time of the next one.
    pub next: u64,
    /// The number of entries that each learner lacked at the last one.
    lags: BTreeMap<(ShardId, StoreId), u64>,
}

impl HealingLeaps {
    /// Leaps over waits that are minutes long as shipped, while nothing happens.
    ///
    /// While a learner is being filled something does happen. For all processes a leap is a minute
    /// without a heartbeat: the learner's store counts as lost, and its place goes to another one,
    /// which begins from nothing. Where the log is read one entry at a time, filling takes longer
    /// than the interval between two leaps, and never ended.
    pub fn leap_to_heal(&mut self, cluster: &mut SimCluster) {
        if cluster.core.now >= self.next && cluster.clients.is_idle() && cluster.tokens.is_idle() {
            self.next = cluster.core.now + HEALING_EVERY;
            let lags = cluster.lags();
            let before = std::mem::replace(&mut self.lags, lags);
            let is_filled = |(learner, lag): (&(ShardId, StoreId), &u64)| {
                *lag > 0 && before.get(learner).is_none_or(|before| lag < before)
            };
            if !self.lags.iter().any(is_filled) {
                cluster.core.leap(HEALING_LEAP);
            }
        }
    }
}
