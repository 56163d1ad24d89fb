//! Dropping the rows of sessions that are gone.
//!
//! A session is gone when its `gateway/` key is gone, but a key may vanish while its worker lives,
//! so a row is kept until this process has seen its session absent for a while. No clock decides
//! correctness: dropping too early costs the worker an "expired", never a double count.

use std::collections::{BTreeMap, BTreeSet};

use crate::entry::Body;
use crate::ids::{Now, Revision, SessionId, ShardId};
use crate::node::event::Effect;
use crate::node::peers::health::PeerHealth;
use crate::node::retention::Retention;
use crate::node::shared::NodeTurn;
use crate::planted::Planted;
use crate::replica::Replica;

#[derive(Clone, Debug)]
pub(super) struct SessionCollection {
    next: Now,
    /// Since when this process has seen a session absent.
    absent_since: BTreeMap<SessionId, Now>,
    /// The last shard of the previous turn; the next turn begins after it.
    last: Option<ShardId>,
}

impl SessionCollection {
    pub(in crate::node) fn new(now: Now, every_ms: u64) -> Self {
        Self { next: now.plus_ms(every_ms), absent_since: BTreeMap::new(), last: None }
    }
}

impl Retention {
    pub(in crate::node) fn collect_if_due(&mut self, turn: &mut NodeTurn<'_>) {
        if turn.now >= self.sessions.next {
            self.sessions.next = turn.now.plus_ms(turn.settings.collect_every_ms);
            turn.effects.push(Effect::ListSessions);
        }
    }

    /// `at` and `alive` come from one linearizable read: ids above `at` are unknown to it, hence
    /// alive.
    pub(in crate::node) fn on_sessions_listed(
        &mut self,
        turn: &mut NodeTurn<'_>,
        peers: &PeerHealth,
        at: Revision,
        alive: Vec<SessionId>,
    ) {
        let now = turn.now;
        // A set, since every row of every shard is looked up in it, and a cluster has as many of
        // both as it has gateway workers.
        let alive: BTreeSet<_> = alive.into_iter().collect();
        let active = turn.shards.led().filter(|(_, primary)| primary.active);
        let active: Vec<&Replica> = active.map(|(replica, _)| replica).collect();
        let rows = active.iter().flat_map(|replica| replica.state.sessions.rows.keys());
        let absent: BTreeMap<_, _> = rows
            .filter(|id| id.0 <= at && !alive.contains(id))
            .map(|&id| (id, *self.sessions.absent_since.get(&id).unwrap_or(&now)))
            .collect();
        self.sessions.absent_since = absent;
        let mut led: Vec<ShardId> = active.iter().map(|replica| replica.shard).collect();
        // Every entry contains all live sessions: with thousands of them not every shard is
        // collected in one turn.
        let mut room = turn.settings.sizes.message_bytes;
        let begin = led.partition_point(|&shard| Some(shard) <= self.sessions.last);
        led.rotate_left(begin);
        for shard in led {
            let Some(body) = self.collection(turn, shard, at, &alive) else { continue };
            let Some(seq) = turn.order(peers, shard, body) else { continue };
            let entry = turn.shards.get(shard).and_then(|replica| replica.log.get(seq));
            room = room.saturating_sub(entry.map_or(0, |held| held.entry.size()));
            if room == 0 {
                self.sessions.last = Some(shard);
                break;
            }
        }
    }

    /// Returns the body of an entry that drops the shard's rows of sessions that are gone; `None`
    /// if it has no such rows.
    fn collection(
        &self,
        turn: &NodeTurn<'_>,
        shard: ShardId,
        at: Revision,
        alive: &BTreeSet<SessionId>,
    ) -> Option<Body> {
        let grace = turn.settings.collect_every_ms;
        let rows = &turn.shards.get(shard)?.state.sessions.rows;
        let is_gone = |id: &SessionId| {
            let absent = self.sessions.absent_since.get(id);
            absent.is_some_and(|&since| turn.now.ms_since(since) >= grace)
        };
        if turn.planted(Planted::CollectWithoutL) {
            return (!rows.is_empty())
                .then(|| Body::ExpireSessions { up_to: at, survivors: vec![] });
        }
        if !rows.keys().any(is_gone) {
            return None;
        }
        let kept = |id: &&SessionId| id.0 <= at && !is_gone(id) && !alive.contains(id);
        let mut survivors: Vec<_> = alive.iter().chain(rows.keys().filter(kept)).copied().collect();
        survivors.sort();
        Some(Body::ExpireSessions { up_to: at, survivors })
    }
}
