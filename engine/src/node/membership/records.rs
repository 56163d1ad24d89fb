//! Following the shard records in etcd: which process leads, which stores are in sync, which copies
//! this store has to have.
//!
//! A record from a watch may be outdated, and that is harmless: a primary that begins late can't
//! fill its in-sync set, and every process that reads a higher version follows it. Only the
//! deletion of a copy waits for a linearizable read.

use crate::entry::Body;
use crate::ids::{Epoch, Seq, ShardId, Slots};
use crate::node::gateways::refuse_ordered;
use crate::node::peers::Peers;
use crate::node::shared::NodeTurn;
use crate::node::snapshots::Snapshots;
use crate::planted::Planted;
use crate::replica::ReplicaRole;
use crate::replica::primary::Primary;
use crate::replica::trust::Trust;
use crate::shard_record::ShardRecord;

/// Handles a shard's record, from a watch or from the read with this number.
pub(in crate::node) fn on_record(
    turn: &mut NodeTurn<'_>,
    peers: &mut Peers,
    snapshots: &mut Snapshots,
    record: ShardRecord,
    mod_revision: u64,
    read: Option<u64>,
) {
    let shard = record.shard();
    let known = turn.shards.records.get(&shard).map(|known| known.0.order());
    let acted_on =
        turn.shards.get(shard).and_then(|replica| Some(replica.acted_on.as_ref()?.order()));
    let was_in_sync = turn.shards.is_in_sync(shard, turn.me.store);
    if turn.shards.fence.is_some() || Some(record.order()) < known.max(acted_on) {
        return;
    }
    let is_new = known != Some(record.order());
    turn.shards.records.insert(shard, Box::new((record.clone(), mod_revision)));
    if is_new {
        follow_record(turn, peers, &record, mod_revision);
    }
    if !was_in_sync && turn.shards.is_in_sync(shard, turn.me.store) {
        peers.reannounce_refused_copy(turn, shard);
    }
    follow_assignment(turn, peers, snapshots, &record, read);
    learn_split(turn, &record);
    turn.shards.to_review.insert(shard);
    turn.shards.to_advance.insert(shard);
}

fn follow_record(
    turn: &mut NodeTurn<'_>,
    peers: &mut Peers,
    record: &ShardRecord,
    mod_revision: u64,
) {
    let (shard, now, planted) = (record.shard(), turn.now, turn.settings.planted);
    let Some(replica) = turn.shards.get_mut(shard) else { return };
    let Some(primary) = replica.primary_mut() else { return };
    if Planted::KeepAfterDemotion.is_in(planted) {
        let record = ShardRecord { epoch: primary.epoch, ..record.clone() };
        let _kept = primary.adopt_record(record, mod_revision, now);
    } else if record.epoch != primary.epoch || record.primary != turn.me {
        if Planted::RefuseOrdered.is_in(planted) {
            refuse_ordered(replica, turn.effects);
        }
        // A primary never adopts the record of a newer epoch, even if that names this store
        // again.
        replica.role = ReplicaRole::Follower;
    } else {
        let unproven = primary.adopt_record(record.clone(), mod_revision, now);
        turn.act_on(record);
        for store in unproven {
            peers.forget_sent(store, shard);
        }
        peers.open_feeds(turn, shard);
    }
}

/// A record with fewer slots proves that the split is committed, in any epoch. A new primary
/// applies it at once: a store that is to complete its in-sync set has the slots of the record, and
/// could not follow a log of before the split.
fn learn_split(turn: &mut NodeTurn<'_>, record: &ShardRecord) {
    let Some(replica) = turn.shards.get_mut(record.shard()) else { return };
    if replica.primary().is_none() || record.slots.hi >= replica.slots.hi {
        return;
    }
    let committed = replica.unapplied_split(record.slots.hi + 1);
    replica.commit = replica.commit.max(committed.unwrap_or_default());
}

/// Follows the assignment of copies: creates a copy that the record assigns to this store,
/// deletes one that it does not, and begins to lead if it names this process.
fn follow_assignment(
    turn: &mut NodeTurn<'_>,
    peers: &mut Peers,
    snapshots: &mut Snapshots,
    record: &ShardRecord,
    read: Option<u64>,
) {
    let (shard, store) = (record.shard(), turn.me.store);
    let exists = turn.shards.get(shard).is_some_and(|replica| replica.trust.exists());
    let in_sync = record.isr.contains(&store);
    let wanted = in_sync || record.learners.contains(&store);
    if wanted && !exists {
        // At epoch 1 the shard is new, and an empty copy has all its content.
        let new = record.epoch == Epoch(1) && in_sync && !turn.settings.suspect;
        snapshots.create_copy(turn, peers, shard, record.slots, new);
    }
    if exists && !record.mentions(store) {
        // An entry that was acknowledged after the read began may count for a record after this
        // one.
        let leaving = turn.shards.get(shard).and_then(|replica| replica.removal_read);
        let is_proof = match turn.planted(Planted::AnyReadDeletes) {
            true => read.is_some() && leaving.is_some(),
            false => leaving.is_some_and(|asked| read.is_some_and(|read| read >= asked)),
        };
        match leaving {
            Some(_) if is_proof => snapshots.drop_copy(turn, peers, record),
            // The answer will come, or the record is read again.
            Some(_) => {}
            None => {
                let asked = turn.read_record(shard);
                if let Some(replica) = turn.shards.get_mut(shard) {
                    replica.removal_read = Some(asked);
                }
            }
        }
    }
    let any_boot = turn.planted(Planted::LeadAfterRestart);
    if record.primary == turn.me || any_boot && record.primary.store == store {
        begin_leading(turn, peers, shard);
    }
}

/// Follows the newest record that is known again: what hindered it is gone.
pub(in crate::node) fn follow_known_record(
    turn: &mut NodeTurn<'_>,
    peers: &mut Peers,
    snapshots: &mut Snapshots,
    shard: ShardId,
) {
    if let Some((record, _)) = turn.shards.records.get(&shard).map(|known| *known.clone()) {
        follow_assignment(turn, peers, snapshots, &record, None);
    }
}

/// Follows the newest records again of all shards that begin in these slots: a copy that had the
/// slots is gone, or has fewer.
pub(in crate::node) fn follow_records_in(
    turn: &mut NodeTurn<'_>,
    peers: &mut Peers,
    snapshots: &mut Snapshots,
    slots: Slots,
) {
    let within = turn.shards.records.range(ShardId(slots.lo)..=ShardId(slots.hi));
    let shards: Vec<ShardId> = within.map(|(&shard, _)| shard).collect();
    for shard in shards {
        follow_known_record(turn, peers, snapshots, shard);
    }
}

/// Begins to lead: a promise, then a barrier on top of the whole log. Both are in the log
/// before anything is counted, and nothing is served before the barrier is committed.
fn begin_leading(turn: &mut NodeTurn<'_>, peers: &mut Peers, shard: ShardId) {
    let known = turn.shards.records.get(&shard).cloned();
    let Some((record, mod_revision)) = known.map(|known| *known) else { return };
    let (now, skip) = (turn.now, turn.planted(Planted::SkipBarrier));
    let Some((replica, mut replica_turn)) = turn.replica_in_turn(shard) else { return };
    let epoch = record.epoch;
    let held = !matches!(replica.trust, Trust::Absent { .. } | Trust::Replacing { .. });
    let may_begin = held && replica.begun < epoch && replica.promised <= epoch;
    if !may_begin {
        return;
    }
    // The barrier, which every commit of this epoch waits for, comes after it in the log.
    replica.act_on(&mut replica_turn, &record);
    if replica.promised < epoch {
        replica.promise(&mut replica_turn, epoch);
    }
    replica.begun = epoch;
    replica.trust.on_named_primary();
    let mut barrier = replica.log.last().seq.next();
    if skip {
        barrier = Seq(0);
    }
    let mut primary = Primary::new(record, mod_revision, barrier, now);
    primary.active = skip;
    replica.role = ReplicaRole::Primary(Box::new(primary));
    if !skip {
        turn.order(peers.health(), shard, Body::Barrier);
    }
    peers.open_feeds(turn, shard);
    turn.shards.to_advance.insert(shard);
    turn.shards.to_review.insert(shard);
}
