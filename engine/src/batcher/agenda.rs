//! The agenda of a turn: the shards and connections to review when it ends, and the timers that put
//! others on it.

use std::collections::BTreeSet;

use crate::ids::{Conn, Now, ShardId};

/// The reviews that parts have requested, for now or later. See the module.
#[derive(Clone, Debug, Default)]
pub(super) struct TurnAgenda {
    /// Shards that something has happened to since the last turn ended.
    pub shards: BTreeSet<ShardId>,
    /// Connections that something has happened to since the last turn ended.
    pub connections: BTreeSet<Conn>,
    pub timers: BTreeSet<(Now, BatcherTimer)>,
}

/// The object to review when a timer fires. A superfluous timer does no harm.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(super) enum BatcherTimer {
    Shard(ShardId),
    Connection(Conn),
}

impl TurnAgenda {
    /// Adds the shards and connections whose timers have fired.
    pub(super) fn fire_timers(&mut self, now: Now) {
        while let Some(&(at, timer)) = self.timers.first()
            && at <= now
        {
            self.timers.pop_first();
            match timer {
                BatcherTimer::Shard(shard) => self.shards.insert(shard),
                BatcherTimer::Connection(conn) => self.connections.insert(conn),
            };
        }
    }
}
