//! The context in which a part of the node handles an event: what the node lends to it.
//!
//! Every part owns its state, and no other part can reach it. All of them work on the shards and
//! write through the storage, so these two are lent to each, with the time, the settings and the
//! effects of the event. A verb of one part that needs another one takes it as a parameter.
//!
//! [`shards`] holds the replicas and what is to be done for them, [`storage`] the log, the tables
//! and the state; [`order`] gives an entry its place in a log.

mod order;
mod shards;
mod storage;

use crate::ids::{Now, ShardId, StoreBoot, TimeMs};
use crate::node::event::Effect;
use crate::node::settings::Settings;
use crate::planted::Planted;
use crate::replica::Replica;
use crate::replica::group_commit::TurnContext;

pub(super) use shards::Shards;
pub(super) use storage::Storage;
pub use storage::TokenCounts;

/// The state that is lent to every part.
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
    pub(super) fn lend<'a>(&'a mut self, effects: &'a mut Vec<Effect>) -> Context<'a> {
        Context {
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

/// The context of one event.
pub(super) struct Context<'a> {
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

impl Context<'_> {
    /// Returns a number that this process has not used before.
    pub(super) fn fresh_id(&mut self) -> u64 {
        *self.last_id += 1;
        *self.last_id
    }

    /// Returns whether this bug is planted.
    pub(super) fn planted(&self, bug: Planted) -> bool {
        bug.is_in(self.settings.planted)
    }

    /// Returns the shard's replica, and the context in which it writes to the log.
    pub(super) fn in_turn(&mut self, shard: ShardId) -> Option<(&mut Replica, TurnContext<'_>)> {
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
