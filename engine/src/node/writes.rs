//! Batches from gateways: checked, then ordered, or refused before ordering.
//!
//! A refusal means "not applied" for its own send only. Once a batch is ordered it is answered from
//! apply or not at all: a primary that steps down does not answer what it has ordered, since that
//! may still be committed.

use crate::batch::Batch;
use crate::entry::{Body, Entry};
use crate::ids::{Conn, ShardId, StoreId, TimeMs};
use crate::message::{BatchReply, GatewayMessage, NodeReply, Refusal, ShardAvailability};
use crate::node::reads::ReadRequest;
use crate::node::{Effect, Node, turn_of};
use crate::planted::Planted;
use crate::replica::{Replica, clock};

impl Node {
    pub(super) fn on_gateway_connected(&mut self, conn: Conn, effects: &mut Vec<Effect>) {
        self.gateways.insert(conn, 0);
        for replica in self.replicas.values() {
            if self.is_announced_frozen(replica) {
                let state = ShardAvailability::Frozen;
                let reply = NodeReply::ShardState { slots: replica.slots, state };
                effects.push(Effect::Gateway { conn, reply });
            }
        }
    }

    pub(super) fn on_gateway_gone(&mut self, conn: Conn) {
        self.gateways.remove(&conn);
        self.forget_reads(conn);
        self.forget_bounded_reads(conn);
        for primary in self.replicas.values_mut().filter_map(Replica::primary_mut) {
            primary.waiting.retain(|_, (waiting, _)| *waiting != conn);
        }
    }

    pub(super) fn on_gateway(
        &mut self,
        conn: Conn,
        message: GatewayMessage,
        effects: &mut Vec<Effect>,
    ) {
        // Nothing from a closed connection is handled.
        let Some(last) = self.gateways.get_mut(&conn) else { return };
        match message {
            GatewayMessage::Frame { message, batches } => {
                // Each message is handled at most once, even if the transport repeats it.
                if message <= *last {
                    return;
                }
                *last = message;
                let overloaded = self.is_overloaded();
                for batch in batches {
                    self.on_batch(conn, message, batch, overloaded, effects);
                }
            }
            GatewayMessage::Read { id, slots, keys, max_staleness_ms } => {
                let request = ReadRequest { conn, id, slots, keys };
                match max_staleness_ms {
                    None => self.on_read(request, effects),
                    Some(ms) => self.on_bounded_read(request, ms, effects),
                }
            }
        }
    }

    fn on_batch(
        &mut self,
        conn: Conn,
        message: u64,
        batch: Batch,
        overloaded: bool,
        effects: &mut Vec<Effect>,
    ) {
        if let Err(refusal) = self.may_order(&batch, overloaded) {
            let (slots, session, batch_seq) = (batch.slots, batch.session, batch.batch_seq);
            let answer = BatchReply::Refused(refusal);
            let reply = NodeReply::Answer { message, slots, session, batch_seq, answer };
            effects.push(Effect::Gateway { conn, reply });
            return;
        }
        let shard = batch.slots.shard();
        let seq = self.order(shard, Body::Ops(batch), effects);
        let primary = self.replicas.get_mut(&shard).and_then(Replica::primary_mut);
        if let Some((primary, seq)) = primary.zip(seq) {
            primary.waiting.insert(seq, (conn, message));
        }
    }

    /// Checks everything that can be checked before ordering.
    fn may_order(&self, batch: &Batch, overloaded: bool) -> Result<(), Refusal> {
        let shard = batch.slots.shard();
        let Some(replica) = self.replicas.get(&shard) else {
            return Err(self.redirect(shard).unwrap_or(Refusal::NoSuchShard));
        };
        let Some(primary) = replica.primary() else {
            return Err(self.redirect(shard).unwrap_or(Refusal::NotPrimary(None)));
        };
        if replica.slots != batch.slots {
            return Err(Refusal::NoSuchShard);
        }
        if batch.payload.len() > self.settings.sizes.batch_bytes_limit {
            return Err(Refusal::TooLarge);
        }
        if !batch.is_intact() {
            return Err(Refusal::Damaged);
        }
        if primary.stepping_down.is_some() || !replica.trust.is_working() {
            return Err(Refusal::NotPrimary(None));
        }
        // A primary with a full disk answers so even if its shard is frozen: where all disks are
        // full, that is the cause.
        if self.disk_full {
            return Err(Refusal::NoSpace);
        }
        if primary.frozen {
            return Err(Refusal::Frozen);
        }
        if overloaded {
            return Err(Refusal::Overloaded);
        }
        Ok(())
    }

    fn is_overloaded(&self) -> bool {
        let tables_full = self.is_flushing() && self.is_table_full();
        tables_full || self.memory.pending_bytes() >= self.settings.pending_bytes_max
    }

    /// Returns a refusal with the shard's record, so that the gateway finds the primary; `None` if
    /// this node has no record.
    pub(super) fn redirect(&self, shard: ShardId) -> Option<Refusal> {
        let (record, _) = self.records.get(&shard)?;
        Some(Refusal::NotPrimary(Some(Box::new(record.clone()))))
    }

    /// Orders `body`: gives it the next seq of a shard that this node leads, and returns the seq.
    pub(super) fn order(
        &mut self,
        shard: ShardId,
        body: Body,
        effects: &mut Vec<Effect>,
    ) -> Option<crate::ids::Seq> {
        let (now, leap_ms) = (self.now, self.settings.limits().leap_ms());
        let wall = self.agreed_wall(shard);
        let replica = self.replicas.get_mut(&shard)?;
        let previous = replica.log.last();
        let primary = replica.primary_mut()?;
        let time = primary.clock.next(previous.time, wall, now, leap_ms);
        let entry = Entry::after(previous, primary.epoch, time, body);
        let seq = entry.seq;
        self.to_send.extend(primary.followers.keys().map(|&store| (store, shard)));
        replica.append(&mut turn_of!(self, effects), entry);
        self.dirty.insert(shard);
        self.prefetch(shard, seq, effects);
        Some(seq)
    }
}

impl Node {
    /// Returns the time on which the wall clocks of a shard's members agree; `None` while one of
    /// them is not known.
    fn agreed_wall(&self, shard: ShardId) -> Option<TimeMs> {
        let primary = self.replicas.get(&shard)?.primary()?;
        if Planted::OwnClockTrusted.is_in(self.settings.planted) {
            return Some(self.wall);
        }
        let clock = |store: &StoreId| match *store == self.me.store {
            true => Some(self.wall),
            false => self.health.wall(*store, self.now),
        };
        let members = primary.members(self.settings.planted);
        clock::agreed(members.iter().map(clock).collect::<Option<_>>()?)
    }
}

/// A planted bug: refuses ordered batches, which may still be committed.
pub(super) fn refuse_ordered(replica: &mut Replica, effects: &mut Vec<Effect>) {
    let waiting = replica.primary_mut().map(|primary| std::mem::take(&mut primary.waiting));
    for (seq, (conn, message)) in waiting.unwrap_or_default() {
        let Some(Body::Ops(batch)) = replica.log.get(seq).map(|held| &held.entry.body) else {
            continue;
        };
        let (slots, session, batch_seq) = (batch.slots, batch.session, batch.batch_seq);
        let answer = BatchReply::Refused(Refusal::NotPrimary(None));
        let reply = NodeReply::Answer { message, slots, session, batch_seq, answer };
        effects.push(Effect::Gateway { conn, reply });
    }
}
