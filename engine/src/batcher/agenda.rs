//! The agenda of a turn: the shards and connections to review when it ends, and the timers that put
//! others on it.

use std::collections::{BTreeMap, BTreeSet};

use crate::ids::{Conn, Now, ShardId};

/// The reviews that parts have requested, for now or later. See the module.
#[derive(Clone, Debug, Default)]
pub(super) struct TurnAgenda {
    /// Shards that something has happened to since the last turn ended.
    pub shards: Reviews<ShardId>,
    /// Connections that something has happened to since the last turn ended.
    pub connections: Reviews<Conn>,
    /// The times at which to review shards. A superfluous one does no harm.
    pub timers: BTreeSet<(Now, ShardId)>,
    /// The times at which to review connections whose window allows nothing to be sent now.
    pub windows: BTreeMap<Conn, Now>,
}

/// The objects to review, in the order in which they were added.
#[derive(Clone, Debug)]
pub(super) struct Reviews<T>(Vec<T>);

impl<T> Default for Reviews<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T: Copy + Ord> Reviews<T> {
    /// Adds one, which may be here already.
    pub(super) fn add(&mut self, one: T) {
        if self.0.last() != Some(&one) {
            self.0.push(one);
        }
    }

    /// Adds many.
    pub(super) fn extend(&mut self, many: impl IntoIterator<Item = T>) {
        self.0.extend(many);
    }

    /// Takes all, each once, in ascending order.
    pub(super) fn take(&mut self) -> Vec<T> {
        let mut all = std::mem::take(&mut self.0);
        all.sort_unstable();
        all.dedup();
        all
    }
}

impl TurnAgenda {
    pub(super) fn deadline(&self) -> Option<Now> {
        let timer = self.timers.first().map(|&(at, _)| at);
        timer.into_iter().chain(self.windows.values().copied()).min()
    }

    /// Adds the shards and connections whose time has come.
    pub(super) fn fire_timers(&mut self, now: Now) {
        while let Some(&(at, shard)) = self.timers.first()
            && at <= now
        {
            self.timers.pop_first();
            self.shards.add(shard);
        }
        let open = self.windows.iter().filter(|&(_, &at)| at <= now);
        self.connections.extend(open.map(|(&conn, _)| conn));
    }
}
