//! A graceful stop: other nodes take over what this node leads, and it leaves the in-sync sets.
//!
//! The node requests this by its reports. The coordinator handles a process that leaves like a dead
//! one, at once and without a probe, so everything goes the way that it goes after a death, without
//! the time to detect it. Nothing here is needed for safety: the node leads and acknowledges until
//! it receives a higher epoch, as always; and what it has ordered by then and not committed is sent
//! again by the gateways, the same bytes, to the new primary.

use crate::ids::Now;
use crate::node::{Effect, Node};
use crate::shard_record::ShardRecord;

#[derive(Clone, Debug, Default)]
pub(super) enum Leaving {
    #[default]
    No,
    /// The process leaves, and waits until then at the latest.
    Until(Now),
    Left,
}

impl Node {
    pub(super) fn leave(&mut self, effects: &mut Vec<Effect>) {
        if matches!(self.leaving, Leaving::No) {
            self.leaving = Leaving::Until(self.now.plus_ms(self.settings.timing.leave_within_ms));
            self.report(effects);
        }
    }

    /// Stops waiting: there is no leading coordinator that could name other primaries.
    pub(super) fn on_leave_not_reported(&mut self) {
        if matches!(self.leaving, Leaving::Until(_)) {
            self.leaving = Leaving::Until(self.now);
        }
    }

    pub(super) fn is_leaving(&self) -> bool {
        !matches!(self.leaving, Leaving::No)
    }

    pub(super) fn finish_leaving(&mut self, effects: &mut Vec<Effect>) {
        let Leaving::Until(until) = self.leaving else { return };
        let mut records = self.records.values().map(|(record, _)| record);
        if self.now >= until || !records.any(|record| self.is_still_needed(record)) {
            self.leaving = Leaving::Left;
            effects.push(Effect::Left);
        }
    }

    /// Returns whether this node has yet to hand over the shard: it leads the shard or is in its
    /// in-sync set, and the other members could do without it.
    fn is_still_needed(&self, record: &ShardRecord) -> bool {
        let me = self.me.store;
        let reachable = |&&store: &&_| store != me && !self.is_silent(store);
        let others = record.isr.iter().filter(reachable).count();
        let leads = record.primary == self.me && others > 0;
        // At `min_in_sync` no member may leave.
        let follows = record.isr.contains(&me) && record.room(self.min_in_sync()) > 0;
        leads || follows && others > 0
    }
}
