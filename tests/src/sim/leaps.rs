//! Time that passes while nothing is in flight: an hour, a night, a few days, in one step.
//!
//! The clocks of all machines leap together, the monotonic ones and those on the wall: what had to wait for so long is
//! due now, and what was to be over is over. The rest of the world stands still meanwhile: leases, connections and
//! disks are as they were, as if they had been looked after all the while.
//!
//! Clients pause before it. A run that can't be brought to rest does not leap.

use std::collections::BTreeMap;

use engine::ids::{ShardId, StoreId};

use super::core::{Core, Happening};
use super::coverage::Path;
use super::draws::Draws;
use super::world::World;

/// How often it is looked whether everything is at rest.
const LOOK: u64 = 2_000;
/// For so long. Clients give up before.
const PATIENCE: u64 = 2_000_000;
/// A healed cluster that only waits is helped over it: by so much at a time …
const HEALING_LEAP: u64 = 60_000_000;
/// … and so often.
const HEALING_EVERY: u64 = 3_000_000;

/// When, and how far.
#[derive(Clone, Debug, Default)]
pub struct LeapPlan {
    pub all: Vec<(u64, u64)>,
}

impl LeapPlan {
    pub fn draw(draws: &mut Draws, until: u64) -> Self {
        let count = if draws.rng.percent(20) { draws.rng.between(1, 2) } else { 0 };
        let leap = |_| {
            let at = draws.rng.between(500_000, until);
            (at, draws.log_uniform(1_000_000, 3 * 24 * 3_600_000_000))
        };
        let all: Vec<_> = (0..count).map(leap).collect();
        let far = all.iter().map(|(_, far)| far / 1_000).max().unwrap_or(0);
        draws.note("leap_ms", far, 0);
        Self { all }
    }
}

impl Core {
    /// What all clocks of machines count on from.
    pub fn clock(&self) -> u64 {
        self.now + self.leapt
    }

    /// When a machine's clock shows `at`: at once, if it does already.
    pub fn when(&self, at: u64) -> u64 {
        at.saturating_sub(self.leapt)
    }

    fn leap(&mut self, far: u64) {
        self.journal.note(self.now, || format!("all clocks leap by {far} us"));
        self.leapt += far;
        self.journal.mix(far);
    }
}

impl World {
    /// Clients pause from now on, and when all is at rest the clocks leap.
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
        self.core.after(LOOK, Happening::Leap { far, since });
    }

    /// Waits as shipped are minutes long, and nothing happens meanwhile.
    ///
    /// While a learner is being filled something does happen. To everybody a leap is a minute without a heartbeat: the
    /// learner's store counts as lost, and its place goes to another one, which begins from nothing. Where the log is read
    /// one entry at a time, filling takes longer than there is between two leaps, and never ended.
    pub fn leap_to_heal(&mut self) {
        if self.core.now >= self.next_leap && self.clients.is_idle() && self.tokens.is_idle() {
            self.next_leap = self.core.now + HEALING_EVERY;
            let lags = self.lags();
            let before = std::mem::replace(&mut self.lags, lags);
            let is_filled = |(learner, lag): (&(ShardId, StoreId), &u64)| {
                *lag > 0 && before.get(learner).is_none_or(|before| lag < before)
            };
            if !self.lags.iter().any(is_filled) {
                self.core.leap(HEALING_LEAP);
            }
        }
    }

    /// How many entries of its primary's log each learner has not got yet.
    fn lags(&self) -> BTreeMap<(ShardId, StoreId), u64> {
        let last = |store, shard| {
            let machine = self.nodes.iter().find(|node| node.store == store)?.machine()?;
            let view = machine.replicas().find(|view| view.shard == shard)?;
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
