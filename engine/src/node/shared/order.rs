//! Ordering: a primary gives an entry its place in the shard's log, and its time.

use crate::entry::{Body, Entry};
use crate::ids::{Seq, ShardId, StoreId, TimeMs};
use crate::node::peers::health::PeerHealth;
use crate::node::shared::NodeTurn;
use crate::planted::Planted;
use crate::replica::clock;

impl NodeTurn<'_> {
    /// Orders `body`: gives it the next seq of a shard that this node leads, and returns the seq.
    pub(in crate::node) fn order(
        &mut self,
        peers: &PeerHealth,
        shard: ShardId,
        body: Body,
    ) -> Option<Seq> {
        let (now, leap_ms) = (self.now, self.settings.limits().leap_ms());
        let wall = self.agreed_wall(peers, shard);
        let (replica, mut replica_turn) = self.replica_in_turn(shard)?;
        let previous = replica.log.last();
        let primary = replica.primary_mut()?;
        let time = primary.clock.next(previous.time, wall, now, leap_ms);
        let entry = Entry::after(previous, primary.epoch, time, body);
        let seq = entry.seq;
        replica.append(&mut replica_turn, entry);
        self.count_log(shard);
        self.shards.mark_followers(shard);
        self.mark_if_it_advances(shard);
        self.prefetch(shard, seq);
        Some(seq)
    }

    /// Returns the time on which the wall clocks of a shard's members agree; `None` while one of
    /// them is not known.
    fn agreed_wall(&self, peers: &PeerHealth, shard: ShardId) -> Option<TimeMs> {
        let primary = self.shards.primary(shard)?;
        if self.planted(Planted::OwnClockTrusted) {
            return Some(self.wall);
        }
        let clock = |store: &StoreId| match *store == self.me.store {
            true => Some(self.wall),
            false => peers.wall(*store, self.now),
        };
        let members = primary.members(self.settings.planted);
        clock::agreed(members.iter().map(clock).collect::<Option<_>>()?)
    }
}
