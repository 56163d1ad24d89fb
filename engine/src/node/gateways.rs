//! Batches from gateways: checked, then ordered, or refused before ordering.
//!
//! A refusal means "not applied" for its own send only. Once a batch is ordered it is answered from
//! apply or not at all: a primary that steps down does not answer what it has ordered, since that
//! may still be committed.

use std::collections::{BTreeMap, BTreeSet};

use crate::batch::Batch;
use crate::entry::Body;
use crate::ids::{Conn, ShardId};
use crate::message::{BatchReply, NodeReply, Refusal, ShardAvailability};
use crate::node::event::Effect;
use crate::node::peers::health::PeerHealth;
use crate::node::shared::NodeTurn;
use crate::replica::Replica;

#[derive(Clone, Debug, Default)]
pub(super) struct Gateways {
    /// The number of the last message on each connection.
    connections: BTreeMap<Conn, u64>,
    /// Shards that were announced to the gateways as frozen.
    frozen_announced: BTreeSet<ShardId>,
}

impl Gateways {
    pub(super) fn on_connected(&mut self, turn: &mut NodeTurn<'_>, conn: Conn) {
        self.connections.insert(conn, 0);
        for replica in turn.shards.iter() {
            if is_announced_frozen(turn, replica) {
                let state = ShardAvailability::Frozen;
                let reply = NodeReply::ShardState { slots: replica.slots, state };
                turn.effects.push(Effect::Gateway { conn, reply });
            }
        }
    }

    pub(super) fn on_gone(&mut self, turn: &mut NodeTurn<'_>, conn: Conn) {
        self.connections.remove(&conn);
        for primary in turn.shards.iter_mut().filter_map(Replica::primary_mut) {
            primary.waiting.retain(|(_, (waiting, _))| *waiting != conn);
        }
    }

    /// Returns whether the connection is open: nothing from a closed one is handled.
    pub(super) fn is_connected(&self, conn: Conn) -> bool {
        self.connections.contains_key(&conn)
    }

    /// Takes the number of a message. Returns whether it is to be handled: each is at most once,
    /// even if the transport repeats it.
    fn is_next(&mut self, conn: Conn, message: u64) -> bool {
        let last = self.connections.get_mut(&conn).filter(|last| message > **last);
        last.map(|last| *last = message).is_some()
    }

    /// Orders or refuses the batches of a message.
    pub(super) fn on_frame(
        &mut self,
        turn: &mut NodeTurn<'_>,
        peers: &PeerHealth,
        conn: Conn,
        message: u64,
        batches: Vec<Batch>,
    ) {
        if !self.is_next(conn, message) {
            return;
        }
        let overloaded = is_overloaded(turn);
        for batch in batches {
            let shard = batch.slots.shard();
            on_batch(turn, peers, (conn, message), (shard, batch), overloaded);
        }
    }

    /// Orders or refuses a batch that was sealed for a shard that has been split since, for this
    /// child of it.
    pub(super) fn on_resend(
        &mut self,
        turn: &mut NodeTurn<'_>,
        peers: &PeerHealth,
        (conn, message): (Conn, u64),
        shard: ShardId,
        batch: Batch,
    ) {
        if !self.is_next(conn, message) {
            return;
        }
        let overloaded = is_overloaded(turn);
        on_batch(turn, peers, (conn, message), (shard, batch), overloaded);
    }

    /// Announces to every gateway that the shard takes no writes here, and that it does again, also
    /// because this node no longer leads it.
    pub(super) fn announce_availability(&mut self, turn: &mut NodeTurn<'_>, shard: ShardId) {
        let Some(replica) = turn.shards.get(shard) else { return };
        let slots = replica.slots;
        let state = match is_announced_frozen(turn, replica) {
            true if self.frozen_announced.insert(shard) => ShardAvailability::Frozen,
            false if self.frozen_announced.remove(&shard) => ShardAvailability::Open,
            _ => return,
        };
        turn.shards.to_report = true;
        for &conn in self.connections.keys() {
            let reply = NodeReply::ShardState { slots, state };
            turn.effects.push(Effect::Gateway { conn, reply });
        }
    }
}

/// Returns whether gateways are informed that the shard is frozen. With a full disk they are not:
/// each write is refused for that reason, and no other one is announced.
fn is_announced_frozen(turn: &NodeTurn<'_>, replica: &Replica) -> bool {
    !turn.storage.is_disk_full() && replica.primary().is_some_and(|primary| primary.frozen)
}

/// Returns whether more entries wait than this node may keep. If only the tables are full, it
/// orders batches and answers later, which slows gateways down without a refusal.
fn is_overloaded(turn: &NodeTurn<'_>) -> bool {
    turn.storage.pending_bytes() >= turn.settings.pending_bytes_max
}

/// Orders the batch, or refuses it. `from` is the connection and the message to answer on.
fn on_batch(
    turn: &mut NodeTurn<'_>,
    peers: &PeerHealth,
    from: (Conn, u64),
    (shard, batch): (ShardId, Batch),
    overloaded: bool,
) {
    if let Err(refusal) = may_order(turn, shard, &batch, overloaded) {
        let (conn, message) = from;
        let (slots, session, batch_seq) = (batch.slots, batch.session, batch.batch_seq);
        let answer = BatchReply::Refused(refusal);
        let reply = NodeReply::Answer { message, slots, session, batch_seq, answer };
        turn.effects.push(Effect::Gateway { conn, reply });
        return;
    }
    let seq = turn.order(peers, shard, Body::Ops(batch));
    if let Some((primary, seq)) = turn.shards.primary_mut(shard).zip(seq) {
        primary.waiting.push_back((seq, from));
    }
}

/// Checks everything that can be checked before ordering.
fn may_order(
    turn: &NodeTurn<'_>,
    shard: ShardId,
    batch: &Batch,
    overloaded: bool,
) -> Result<(), Refusal> {
    let redirect = || turn.shards.redirect(shard);
    let Some(replica) = turn.shards.get(shard) else {
        return Err(redirect().unwrap_or(Refusal::NoSuchShard));
    };
    let Some(primary) = replica.primary() else {
        return Err(redirect().unwrap_or(Refusal::NotPrimary(None)));
    };
    // A batch of a shard that was split since has a part for this one. One of fewer slots was
    // sealed after a split that is not applied here yet.
    let (own, sealed) = (replica.slots, batch.slots);
    if sealed.lo > own.lo || own.hi > sealed.hi {
        return Err(Refusal::NoSuchShard);
    }
    if batch.payload.len() > turn.settings.sizes.batch_bytes_limit {
        return Err(Refusal::TooLarge);
    }
    if !batch.is_intact() {
        return Err(Refusal::Damaged);
    }
    if primary.stepping_down.is_some() || !replica.trust.is_working() {
        return Err(Refusal::NotPrimary(None));
    }
    // A primary with a full disk answers so even if its shard is frozen: where all disks are full,
    // that is the cause.
    if turn.storage.is_disk_full() {
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
