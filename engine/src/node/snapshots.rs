//! Whole copies, for followers that the log no longer reaches.
//!
//! A snapshot is the shard's rows in the state, as of the `applied` of the shard record among
//! them: one flush wrote both in one step, so no table content is needed. The receiver stages it
//! all, then one ingest puts it in place of what was there, with its shard record under a new copy
//! number: all or nothing. From there the log goes on.
//!
//! The tables hold changes of all shards together, so before rows of a shard are replaced or
//! removed, everything in the tables is flushed first: else a later flush would add the old copy's
//! changes to the new one's rows.

use std::collections::BTreeMap;

use crate::apply::ShardState;
use crate::ids::{Conn, Seq, ShardId, StoreId};
use crate::message::{FromFollower, ToFollower};
use crate::node::{Effect, Node, turn_of};
use crate::planted::Planted;
use crate::replica::primary::Feed;
use crate::replica::trust::Trust;

#[derive(Clone, Debug, Default)]
pub(super) struct Transfers {
    outgoing: BTreeMap<u64, Outgoing>,
    /// Staged copies that wait for a flush, or are being ingested.
    incoming: BTreeMap<(Conn, u64), Incoming>,
    /// Deleted copies whose rows go after this flush; none: they are going.
    dropping: BTreeMap<ShardId, Option<u64>>,
}

#[derive(Clone, Debug)]
struct Outgoing {
    conn: Conn,
    store: StoreId,
    shard: ShardId,
    /// The follower will need the log above it.
    pin: Seq,
}

#[derive(Clone, Debug)]
struct Incoming {
    shard: ShardId,
    state: ShardState,
    /// None: being ingested.
    after_flush: Option<u64>,
}

impl Transfers {
    /// Above it the log is needed by a copy on its way.
    pub(super) fn pin(&self, shard: ShardId) -> Option<Seq> {
        self.outgoing.values().filter(|out| out.shard == shard).map(|out| out.pin).min()
    }
}

// ---- the sending end -----------------------------------------------------------------------------

impl Node {
    pub(super) fn begin_snapshot(
        &mut self,
        store: StoreId,
        shard: ShardId,
        effects: &mut Vec<Effect>,
    ) {
        let Some(&conn) = self.dialled_to.get(&store) else { return };
        let transfer = self.fresh_id();
        let Some(replica) = self.replicas.get_mut(&shard) else { return };
        if !replica.trust.is_working() {
            return; // What is wrong here would be wrong there.
        }
        let (slots, pin) = (replica.slots, replica.flushed.seq);
        let Some(primary) = replica.primary_mut() else { return };
        // A member of M is never handed a copy that may lack what it has acknowledged, unless it
        // is known to have lost that already.
        let counted =
            primary.members(None).contains(&store) && !primary.record.tainted.contains(&store);
        let epoch = primary.epoch;
        let Some(follower) = primary.followers.get_mut(&store) else { return };
        if counted {
            return;
        }
        if pin == Seq(0) {
            self.want_flush(); // There is no shard record to send yet.
            return;
        }
        follower.feed = Feed::Snapshot { transfer };
        let copy = follower.copy;
        self.transfers.outgoing.insert(transfer, Outgoing { conn, store, shard, pin });
        let message = ToFollower::Snapshot { transfer, shard, epoch, copy };
        effects.push(Effect::ToFollower { conn, message });
        effects.push(Effect::SendSnapshot { conn, transfer, shard, slots });
    }

    pub(super) fn on_snapshot_answer(&mut self, transfer: u64, installed: bool) {
        let Some(done) = self.transfers.outgoing.remove(&transfer) else { return };
        if !installed {
            self.snapshot_again(transfer, &done);
        }
        // Installed: the announcement of the new copy has opened the feed already.
    }

    pub(super) fn on_snapshot_failed(&mut self, transfer: u64) {
        if let Some(failed) = self.transfers.outgoing.remove(&transfer) {
            self.snapshot_again(transfer, &failed);
        }
    }

    fn snapshot_again(&mut self, transfer: u64, failed: &Outgoing) {
        if let Some(follower) = self.follower_mut(failed.store, failed.shard)
            && follower.feed == (Feed::Snapshot { transfer })
        {
            follower.feed = Feed::NeedsSnapshot; // Begun again at the next review.
        }
    }

    /// Followers that wait for a snapshot are looked at again: the flush or the change of the
    /// in-sync set that they waited for may have come.
    pub(super) fn retry_snapshots(&mut self) {
        for (&shard, replica) in &self.replicas {
            let Some(primary) = replica.primary() else { continue };
            for (&store, follower) in &primary.followers {
                if follower.feed == Feed::NeedsSnapshot {
                    self.to_send.insert((store, shard));
                }
            }
        }
    }

    /// The connection is gone, and what was on its way with it.
    pub(super) fn drop_transfers(&mut self, conn: Conn) {
        self.transfers.outgoing.retain(|_, out| out.conn != conn);
    }
}

// ---- the receiving end ---------------------------------------------------------------------------

impl Node {
    pub(super) fn on_snapshot_staged(
        &mut self,
        conn: Conn,
        transfer: u64,
        state: ShardState,
        effects: &mut Vec<Effect>,
    ) {
        let announced =
            self.accepted.get_mut(&conn).and_then(|link| link.announced.remove(&transfer));
        let wanted = announced.and_then(|(shard, epoch, copy)| {
            let replica = self.replicas.get_mut(&shard)?;
            // Of the promised epoch, and in place of the copy that the sender meant: a snapshot
            // that comes late must not replace a copy that has acknowledged since.
            let replaceable =
                !matches!(replica.trust, Trust::Absent { .. } | Trust::Replacing { .. });
            let fits = replaceable
                && replica.promised == epoch
                && replica.primary().is_none()
                && replica.copy == copy
                && replica.slots == state.slots;
            fits.then_some((shard, replica))
        });
        let Some((shard, replica)) = wanted else {
            effects.push(Effect::DiscardSnapshot { conn, transfer });
            if let Some((shard, ..)) = announced {
                let message = FromFollower::Snapshot { transfer, shard, installed: false };
                effects.push(Effect::FromFollower { conn, message });
            }
            return;
        };
        replica.trust.replace();
        let mut after_flush = self.want_flush();
        if Planted::InstallOverTables.is_in(self.settings.planted) {
            after_flush = None;
        }
        self.transfers.incoming.insert((conn, transfer), Incoming { shard, state, after_flush });
        match after_flush {
            None => self.install(conn, transfer, effects),
            Some(_) => self.flush_if_due(effects),
        }
    }

    fn install(&mut self, conn: Conn, transfer: u64, effects: &mut Vec<Effect>) {
        let Some(incoming) = self.transfers.incoming.get_mut(&(conn, transfer)) else { return };
        incoming.after_flush = None;
        let Some(replica) = self.replicas.get(&incoming.shard) else { return };
        let copy = crate::ids::CopyNo(replica.copy.0 + 1);
        let state = Box::new(incoming.state.clone());
        effects.push(Effect::InstallSnapshot { conn, transfer, copy, state });
    }

    pub(super) fn on_snapshot_installed(
        &mut self,
        conn: Conn,
        transfer: u64,
        effects: &mut Vec<Effect>,
    ) {
        let Some(incoming) = self.transfers.incoming.remove(&(conn, transfer)) else { return };
        let shard = incoming.shard;
        let Some(replica) = self.replicas.get_mut(&shard) else { return };
        replica.install(&mut turn_of!(self, effects), incoming.state);
        self.snapshot += 1;
        self.announce_copy(shard, effects);
        if self.accepted.contains_key(&conn) {
            let message = FromFollower::Snapshot { transfer, shard, installed: true };
            effects.push(Effect::FromFollower { conn, message });
        }
        self.dirty.insert(shard);
    }

    /// Deletes a copy that etcd, read linearizably, no longer wants here.
    pub(super) fn drop_copy(&mut self, shard: ShardId, effects: &mut Vec<Effect>) {
        let after_flush = self.want_flush();
        let Some(replica) = self.replicas.get_mut(&shard) else { return };
        if matches!(replica.trust, Trust::Absent { .. } | Trust::Replacing { .. }) {
            return; // Being replaced right now: the next look will find it.
        }
        replica.drop_copy(&mut turn_of!(self, effects));
        self.announce_copy(shard, effects);
        match after_flush {
            None => self.drop_rows(shard, effects),
            Some(flush) => {
                self.transfers.dropping.insert(shard, Some(flush));
            }
        }
    }

    /// Removes what a former copy has left in the state, unless that is under way.
    pub(super) fn drop_rows(&mut self, shard: ShardId, effects: &mut Vec<Effect>) {
        let Some(slots) = self.replicas.get(&shard).map(|replica| replica.slots) else { return };
        if let std::collections::btree_map::Entry::Vacant(place) =
            self.transfers.dropping.entry(shard)
        {
            place.insert(None);
            effects.push(Effect::DropRows { shard, slots });
        }
    }

    /// The shard's place is clean: if etcd wants a copy here again meanwhile, it is made now.
    pub(super) fn on_rows_dropped(&mut self, shard: ShardId, effects: &mut Vec<Effect>) {
        self.transfers.dropping.remove(&shard);
        if let Some(replica) = self.replicas.get_mut(&shard) {
            replica.trust.clean();
        }
        if let Some((record, _)) = self.records.get(&shard).cloned() {
            self.hold_what_is_asked(&record, false, effects);
        }
    }

    /// The tables hold nothing older than this flush any more.
    pub(super) fn after_flush(&mut self, flush: u64, effects: &mut Vec<Effect>) {
        let due = |after: Option<u64>| after.is_some_and(|after| after <= flush);
        let installs: Vec<_> = self
            .transfers
            .incoming
            .iter()
            .filter(|(_, incoming)| due(incoming.after_flush))
            .map(|(&key, _)| key)
            .collect();
        installs.into_iter().for_each(|(conn, transfer)| self.install(conn, transfer, effects));
        let dropped: Vec<_> = self
            .transfers
            .dropping
            .iter()
            .filter(|&(_, &after)| due(after))
            .map(|(&shard, _)| shard)
            .collect();
        for shard in dropped {
            self.transfers.dropping.remove(&shard);
            self.drop_rows(shard, effects);
        }
    }
}
