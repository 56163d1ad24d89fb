//! Moving the commit of a shard, and applying what is committed to the table.

use crate::entry::Body;
use crate::ids::{Seq, ShardId};
use crate::message::{BatchReply, NodeReply};
use crate::node::event::Effect;
use crate::node::shared::NodeTurn;
use crate::planted::Planted;
use crate::replica::Replica;
use crate::replica::log::Loading;
use crate::shard::apply::{self, Loaded};
use crate::shard::division;

impl NodeTurn<'_> {
    /// Moves a shard's commit, then applies what is committed. Returns the last seq that was
    /// applied before.
    pub(in crate::node) fn advance(&mut self, shard: ShardId) -> Seq {
        let Some(replica) = self.shards.get_mut(shard) else { return Seq(0) };
        let before = replica.state.applied.seq;
        if let Some(seq) = replica.committable(self.me.store, self.settings) {
            replica.commit = replica.commit.max(seq);
            let primary = replica.primary_mut();
            if primary.is_some_and(|primary| !std::mem::replace(&mut primary.active, true)) {
                self.shards.to_review.insert(shard);
            }
        }
        while let Some(seq) = self.shards.get(shard).and_then(Replica::next_to_apply)
            && self.make_room(shard, seq > before.next())
            && self.apply_entry(shard, seq)
        {}
        before
    }

    /// Applies the entry. Returns `false` if it waits for a load.
    fn apply_entry(&mut self, shard: ShardId, seq: Seq) -> bool {
        let uses_stale = self.planted(Planted::UseStaleLoad);
        let Some(replica) = self.shards.get_mut(shard) else { return false };
        let Some(held) = replica.log.get(seq) else { return false };
        if let Body::Split { at } = held.entry.body
            && division::slots_of(replica.slots, at).is_some()
        {
            self.advance_division(shard, seq);
            return false;
        }
        let Some(work) = &held.work else { return false };
        let none = Loaded::default();
        let loaded = match &work.loading {
            Loading::Ready { loaded, ingests }
                if *ingests == self.storage.ingests || uses_stale =>
            {
                loaded
            }
            Loading::Asked { .. } => return false,
            Loading::NotNeeded => &none,
            _ => {
                self.load_for_entry(shard, seq);
                return false;
            }
        };
        let (entry, decoded) = (&held.entry, &work.decoded);
        let (state, limits) = (&mut replica.state, self.settings.limits());
        let tables = &mut self.storage.tables;
        let answer = apply::apply(state, tables, entry, decoded, loaded, &limits);
        let batch = match &entry.body {
            // After a split the answer is that of a child, for its part of the batch.
            Body::Ops(batch) => Some((replica.slots, batch.session, batch.batch_seq)),
            _ => None,
        };
        replica.on_applied(seq, &self.settings.sizes);
        self.storage.memory.on_applied(shard, seq);
        if let Some(BatchReply::Applied { tokens, .. }) = &answer
            && replica.primary().is_some()
        {
            self.storage.token_counts.count(tokens);
        }
        self.storage.flushing.note_change(self.now);
        let waiting = replica.primary_mut().and_then(|primary| primary.take_waiting(seq));
        if let Some((((conn, message), answer), (slots, session, batch_seq))) =
            waiting.zip(answer).zip(batch)
        {
            let reply = NodeReply::Answer { message, slots, session, batch_seq, answer };
            self.effects.push(Effect::Gateway { conn, reply });
        }
        true
    }
}
