//! A graceful stop: what this node leads goes to others first, and it leaves the in-sync sets.
//!
//! The node asks for it by its reports. To the coordinator a process that leaves is as good as dead,
//! at once and without a probe; so everything goes the way that it goes after a death, only that
//! nobody has to find out first. Nothing here is needed for safety: the node leads and acknowledges
//! until it hears of a higher epoch, as always, and what it has ordered by then and not committed is
//! sent again by the gateways, the same bytes, to the new primary.

use crate::config::ShardConfig;
use crate::ids::Now;
use crate::node::{Effect, Node};

#[derive(Clone, Debug, Default)]
pub(super) enum Leaving {
    #[default]
    No,
    /// Until then at the latest.
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

    /// No coordinator leads that could name others.
    pub(super) fn on_leave_unheard(&mut self) {
        if matches!(self.leaving, Leaving::Until(_)) {
            self.leaving = Leaving::Until(self.now);
        }
    }

    pub(super) fn is_leaving(&self) -> bool {
        !matches!(self.leaving, Leaving::No)
    }

    pub(super) fn leave_if_free(&mut self, effects: &mut Vec<Effect>) {
        let Leaving::Until(until) = self.leaving else { return };
        let mut records = self.records.values().map(|(record, _)| record);
        if self.now >= until || !records.any(|record| self.is_awaited(record)) {
            self.leaving = Leaving::Left;
            effects.push(Effect::Left);
        }
    }

    /// Others can do without this node in this shard, and have not been told to yet.
    fn is_awaited(&self, record: &ShardConfig) -> bool {
        let me = self.me.store;
        let heard = |&&store: &&_| store != me && !self.is_silent(store);
        let others = record.isr.iter().filter(heard).count();
        let leads = record.primary == self.me && others > 0;
        // At the floor nobody may leave.
        let follows = record.isr.contains(&me) && record.room(self.min_in_sync()) > 0;
        leads || follows && others > 0
    }
}
