//! Dropping the rows of sessions that are gone.
//!
//! A session is gone when its `gateway/` key is gone, but a key may vanish while its worker lives,
//! so a row is kept until this process has seen its session absent for a while. No clock decides
//! correctness: dropping too early costs the worker an "expired", never a double count.

use std::collections::{BTreeMap, BTreeSet};

use crate::entry::Body;
use crate::ids::{Now, Revision, SessionId, ShardId};
use crate::node::{Effect, Node};
use crate::planted::Planted;

#[derive(Clone, Debug)]
pub(super) struct SessionCollection {
    next: Now,
    /// Since when this process has seen a session absent.
    absent_since: BTreeMap<SessionId, Now>,
    /// The last shard of the previous turn; the next turn begins after it.
    last: Option<ShardId>,
}

impl SessionCollection {
    pub(super) fn new(now: Now, every_ms: u64) -> Self {
        Self { next: now.plus_ms(every_ms), absent_since: BTreeMap::new(), last: None }
    }
}

impl Node {
    pub(super) fn collect_if_due(&mut self, effects: &mut Vec<Effect>) {
        if self.now >= self.collecting.next {
            self.collecting.next = self.now.plus_ms(self.settings.collect_every_ms);
            effects.push(Effect::ListSessions);
        }
    }

    /// `at` and `alive` come from one linearizable read: ids above `at` are unknown to it, hence
    /// alive.
    pub(super) fn on_sessions_listed(
        &mut self,
        at: Revision,
        alive: Vec<SessionId>,
        effects: &mut Vec<Effect>,
    ) {
        let now = self.now;
        // A set, since every row of every shard is looked up in it, and a cluster has as many of
        // both as it has gateway workers.
        let alive: BTreeSet<_> = alive.into_iter().collect();
        let mut led: Vec<_> = self
            .replicas
            .values()
            .filter(|replica| replica.primary().is_some_and(|primary| primary.active))
            .map(|replica| replica.shard)
            .collect();
        let rows = led.iter().flat_map(|shard| self.replicas[shard].state.sessions.rows.keys());
        let absent: BTreeMap<_, _> = rows
            .filter(|id| id.0 <= at && !alive.contains(id))
            .map(|&id| (id, *self.collecting.absent_since.get(&id).unwrap_or(&now)))
            .collect();
        self.collecting.absent_since = absent;
        // Every entry contains all live sessions: with thousands of them not every shard is
        // collected in one turn.
        let mut room = self.settings.sizes.message_bytes;
        let begin = led.partition_point(|&shard| Some(shard) <= self.collecting.last);
        led.rotate_left(begin);
        for shard in led {
            let Some(body) = self.collection(shard, at, &alive) else { continue };
            let Some(seq) = self.order(shard, body, effects) else { continue };
            let entry = self.replicas[&shard].log.get(seq);
            room = room.saturating_sub(entry.map_or(0, |held| held.entry.size()));
            if room == 0 {
                self.collecting.last = Some(shard);
                break;
            }
        }
    }

    /// Returns the body of an entry that drops the shard's rows of sessions that are gone; `None`
    /// if it has no such rows.
    fn collection(
        &self,
        shard: ShardId,
        at: Revision,
        alive: &BTreeSet<SessionId>,
    ) -> Option<Body> {
        let grace = self.settings.collect_every_ms;
        let rows = &self.replicas[&shard].state.sessions.rows;
        let is_gone = |id: &SessionId| {
            let absent = self.collecting.absent_since.get(id);
            absent.is_some_and(|&since| self.now.ms_since(since) >= grace)
        };
        if Planted::CollectWithoutL.is_in(self.settings.planted) {
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
