//! The state that the parts of a node share, and the turn in which they get it for one event.
//!
//! The fields of a part are private to it. The replicas are not: nearly every event is about one of
//! them, and all parts write through the storage. So both are lent to every part, with the time,
//! the settings and the effects of the event; any other part is a parameter. [`shards`] holds the
//! replicas and what is to be done for them, [`storage`] the log in memory, the tables and what is
//! in flight to the disk; [`order`] gives an entry its place. These parts change a replica, its
//! primary and its followers (a field that is not named here keeps its value):
//!
//! | field | part |
//! |---|---|
//! | `log`, `state`, `commit`, `clock` | [`storage`], [`order`]; `peers`, `reads` learn commits |
//! | `counted` | [`storage`] |
//! | `flushed`, `flushed_point`, `recorded`, `points`, `active` | [`storage`] |
//! | `role`, `promised`, `begun` | `membership`; on a higher epoch the others, too |
//! | `trust`, `copy`, `slots` | `snapshots`; `audit` stops a wrong copy, `membership` may need it |
//! | `record`, `mod_revision`, `proposals`, `joining`, `frozen`, `progress` | `membership` |
//! | `followers`, `propose_after`, `join_after` | `membership` |
//! | `matched`, `removal_read` | `peers`; `membership` and `snapshots`, the latter |
//! | `feed`, `sent`, `copy_bytes` of a follower | `peers`; `snapshots`, `audit`, `membership` |
//! | `boot`, `copy`, `proven`, `tried` of a follower | `peers` |
//! | `acked`, `lost_acked_data` of a follower | `peers`; `audit` of a wrong copy, `membership` |
//! | `waiting` | `gateways`; [`storage`] answers |
//! | `votes`, `disputed` | `audit` |
//! | `stepping_down` | `queries`; `membership` ends it |
//! | `expiry` | `retention` |

mod order;
mod shard_set;
mod shards;
mod storage;

use crate::ids::{Now, ShardId, StoreBoot, TimeMs};
use crate::node::event::Effect;
use crate::node::settings::Settings;
use crate::planted::Planted;
use crate::replica::Replica;
use crate::replica::group_commit::ReplicaTurn;

pub(super) use shard_set::ShardSet;
pub(super) use shards::Shards;
pub(super) use storage::Storage;
pub use storage::TokenCounts;

/// The state that is lent to every part, between two events.
#[derive(Clone, Debug)]
pub(super) struct Shared {
    pub settings: Settings,
    pub me: StoreBoot,
    pub now: Now,
    pub wall: TimeMs,
    pub shards: Shards,
    pub storage: Storage,
    /// The last number that was given to a load, a read, a round, a transfer or a proposal.
    pub last_id: u64,
}

impl Shared {
    /// Lends the state for one event.
    pub(super) fn lend<'a>(&'a mut self, effects: &'a mut Vec<Effect>) -> NodeTurn<'a> {
        NodeTurn {
            now: self.now,
            wall: self.wall,
            me: self.me,
            settings: &self.settings,
            shards: &mut self.shards,
            storage: &mut self.storage,
            effects,
            last_id: &mut self.last_id,
        }
    }
}

/// The turn: what a part may use while it handles one event.
pub(super) struct NodeTurn<'a> {
    /// The time of the event.
    pub now: Now,
    /// The wall clock, as last reported.
    pub wall: TimeMs,
    /// The store and the boot that this node is.
    pub me: StoreBoot,
    pub settings: &'a Settings,
    pub shards: &'a mut Shards,
    pub storage: &'a mut Storage,
    /// The effects of the event.
    pub effects: &'a mut Vec<Effect>,
    last_id: &'a mut u64,
}

impl NodeTurn<'_> {
    /// Returns a number that this process has not used before.
    pub(super) fn fresh_id(&mut self) -> u64 {
        *self.last_id += 1;
        *self.last_id
    }

    /// Returns whether this bug is planted.
    pub(super) fn planted(&self, bug: Planted) -> bool {
        bug.is_in(self.settings.planted)
    }

    /// Marks the shard to be advanced, if its commit would move or there is an entry to apply.
    /// Returns whether it does.
    pub(super) fn mark_if_it_advances(&mut self, shard: ShardId) -> bool {
        let replica = self.shards.get(shard);
        let advances = replica.is_some_and(|it| it.advances(self.me.store, self.settings));
        if advances {
            self.shards.to_advance.insert(shard);
        }
        advances
    }

    /// Returns the shard's replica, and what it may use while it writes to the log.
    pub(super) fn replica_in_turn(
        &mut self,
        shard: ShardId,
    ) -> Option<(&mut Replica, ReplicaTurn<'_>)> {
        let replica = self.shards.get_mut(shard)?;
        let turn = self.storage.turn(self.now, self.me, self.settings, self.effects);
        Some((replica, turn))
    }

    /// Reads the shard's record from etcd. Returns the number of the read.
    pub(super) fn read_record(&mut self, shard: ShardId) -> u64 {
        let read = self.fresh_id();
        self.effects.push(Effect::ReadRecord { read, shard });
        read
    }
}
