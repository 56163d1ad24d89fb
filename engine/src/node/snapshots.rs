//! Snapshots of shards, for followers that the log no longer reaches.
//!
//! A snapshot is the shard's rows in the state, as of the `applied` of the shard record among them:
//! one flush wrote both in one step, so no table content is needed. The receiver stages all of it,
//! then one ingest puts it in place of what was there, with its shard record under a new copy
//! number: all or nothing. From there the log continues.
//!
//! ```text
//!   primary: MeasureSnapshot ──▶ announcement, its size ─▶ follower: is there room?
//!            SendSnapshot    ◀── accepted ───────────────┘      └── no: NoSpace, the feed is full
//! ```
//!
//! A snapshot without room is not begun: half of it would take the room that the data there needs,
//! and nodes whose disks are equally full would send snapshots for ever.
//!
//! The snapshot of a shard of which nothing was applied yet is empty, and the whole log follows it.
//! If the in-sync set needs all its members, nothing may ever be applied before a member that lost
//! its copy has another.
//!
//! The tables contain changes of all shards together, so before rows of a shard are replaced or
//! removed, everything in the tables is flushed first: otherwise a later flush would add the old
//! copy's changes to the new one's rows.

use std::collections::BTreeMap;

use crate::apply::ShardState;
use crate::ids::{Conn, CopyNo, Epoch, Now, Seq, ShardId, Slots, StoreId};
use crate::message::{FromFollower, SnapshotOutcome, ToFollower};
use crate::node::connections::AnnouncedSnapshot;
use crate::node::{Effect, Node, turn_of};
use crate::planted::Planted;
use crate::replica::primary::Feed;
use crate::replica::trust::Trust;

#[derive(Clone, Debug, Default)]
pub(super) struct SnapshotTransfers {
    outgoing: BTreeMap<u64, SendingSnapshot>,
    /// Staged snapshots that wait for a flush, or are being ingested.
    incoming: BTreeMap<(Conn, u64), ReceivingSnapshot>,
    /// Deleted copies whose rows are removed after this flush; `None`: they are being removed.
    dropping: BTreeMap<ShardId, Option<u64>>,
    /// When the next snapshot may begin: the last one failed, for a reason that this node does not
    /// know.
    retry_after: BTreeMap<(StoreId, ShardId), Now>,
}

#[derive(Clone, Debug)]
struct SendingSnapshot {
    conn: Conn,
    store: StoreId,
    shard: ShardId,
    slots: Slots,
    /// The follower will need the log above this seq.
    pin: Seq,
    /// The estimated size, once it is known.
    bytes: u64,
}

#[derive(Clone, Debug)]
struct ReceivingSnapshot {
    shard: ShardId,
    state: ShardState,
    bytes: u64,
    /// The flush that it waits for; `None`: it is being ingested.
    after_flush: Option<u64>,
}

impl SnapshotTransfers {
    /// Returns the seq above which the log is needed by snapshots in transfer.
    pub(super) fn pin(&self, shard: ShardId) -> Option<Seq> {
        self.outgoing.values().filter(|out| out.shard == shard).map(|out| out.pin).min()
    }
}

// ---- the sending end ---------------------------------------------------------------------------

impl Node {
    pub(super) fn begin_snapshot(
        &mut self,
        store: StoreId,
        shard: ShardId,
        effects: &mut Vec<Effect>,
    ) {
        let Some(&conn) = self.dialled_to.get(&store) else { return };
        if self.transfers.retry_after.get(&(store, shard)).is_some_and(|&until| self.now < until) {
            return;
        }
        self.transfers.retry_after.remove(&(store, shard));
        let transfer = self.fresh_id();
        let Some(replica) = self.replicas.get_mut(&shard) else { return };
        if !replica.trust.is_working() {
            return; // A wrong copy must not spread.
        }
        let (slots, pin, recorded) = (replica.slots, replica.flushed.seq, replica.recorded);
        let Some(primary) = replica.primary_mut() else { return };
        // A member of M never gets a snapshot that may lack what it has acknowledged, unless it is
        // known to have lost that already.
        let counted =
            primary.members(None).contains(&store) && !primary.record.tainted.contains(&store);
        let Some(follower) = primary.followers.get_mut(&store) else { return };
        if counted {
            return;
        }
        if !recorded {
            self.request_record(shard);
            return;
        }
        follower.feed = Feed::Snapshot { transfer };
        let outgoing = SendingSnapshot { conn, store, shard, slots, pin, bytes: 0 };
        self.transfers.outgoing.insert(transfer, outgoing);
        effects.push(Effect::MeasureSnapshot { transfer, slots });
    }

    /// Announces the snapshot to the follower, which checks whether it has room.
    pub(super) fn on_snapshot_measured(
        &mut self,
        transfer: u64,
        bytes: u64,
        effects: &mut Vec<Effect>,
    ) {
        let Some(outgoing) = self.transfers.outgoing.get_mut(&transfer) else { return };
        outgoing.bytes = bytes;
        let (conn, store, shard) = (outgoing.conn, outgoing.store, outgoing.shard);
        let Some((epoch, copy)) = self.expected_by(store, shard, transfer) else {
            self.transfers.outgoing.remove(&transfer);
            return;
        };
        let message = ToFollower::Snapshot { transfer, shard, epoch, copy, bytes };
        effects.push(Effect::ToFollower { conn, message });
    }

    /// Returns the epoch and the follower's copy that the snapshot is for, while it is still
    /// wanted.
    fn expected_by(
        &mut self,
        store: StoreId,
        shard: ShardId,
        transfer: u64,
    ) -> Option<(Epoch, CopyNo)> {
        let epoch = self.replicas.get(&shard)?.primary()?.epoch;
        let follower = self.follower_mut(store, shard)?;
        (follower.feed == Feed::Snapshot { transfer }).then_some((epoch, follower.copy))
    }

    pub(super) fn on_snapshot_answer(
        &mut self,
        transfer: u64,
        outcome: SnapshotOutcome,
        effects: &mut Vec<Effect>,
    ) {
        let Some(outgoing) = self.transfers.outgoing.get(&transfer).cloned() else { return };
        let SendingSnapshot { conn, store, shard, slots, bytes, .. } = outgoing;
        let awaited = self.expected_by(store, shard, transfer).is_some();
        if outcome == SnapshotOutcome::Accepted && awaited {
            effects.push(Effect::SendSnapshot { conn, transfer, shard, slots });
            return;
        }
        self.transfers.outgoing.remove(&transfer);
        match outcome {
            SnapshotOutcome::NotInstalled => self.snapshot_failed(transfer, &outgoing),
            SnapshotOutcome::NoSpace if awaited => {
                let Some(follower) = self.follower_mut(store, shard) else { return };
                follower.feed = Feed::Full;
                follower.copy_bytes = bytes;
                self.to_review.insert(shard);
            }
            // Installed: the announcement of the new copy has already opened the feed.
            _ => {}
        }
    }

    pub(super) fn on_snapshot_failed(&mut self, transfer: u64) {
        if let Some(failed) = self.transfers.outgoing.remove(&transfer) {
            self.snapshot_failed(transfer, &failed);
        }
    }

    /// Handles a failed snapshot. The next one begins after a while: the cause may last, and
    /// snapshots are expensive.
    fn snapshot_failed(&mut self, transfer: u64, failed: &SendingSnapshot) {
        let until = self.now.plus_ms(self.settings.timing.copy_again_ms);
        self.transfers.retry_after.insert((failed.store, failed.shard), until);
        if let Some(follower) = self.follower_mut(failed.store, failed.shard)
            && follower.feed == (Feed::Snapshot { transfer })
        {
            follower.feed = Feed::NeedsSnapshot; // The next review begins it again.
        }
    }

    /// Tries again the followers that wait for a snapshot: the flush or the change of the in-sync
    /// set that they waited for may have come.
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

    /// Discards the snapshots in transfer on a closed connection.
    pub(super) fn drop_transfers(&mut self, conn: Conn) {
        self.transfers.outgoing.retain(|_, out| out.conn != conn);
    }
}

// ---- the receiving end -------------------------------------------------------------------------

impl Node {
    /// Returns the bytes of snapshots that have room here, beside those that were accepted and are
    /// not installed yet. The staged part of them counts twice, which errs on the safe side. A log
    /// that is too long reduces the room by nothing: what it contains of the shard is deleted with
    /// the old copy, and may be the very reason why it is too long.
    pub(super) fn room_for_snapshots(&self) -> u64 {
        let coming = self.accepted.values().flat_map(|connection| connection.announced.values());
        let coming = coming.filter(|announced| self.is_awaited(announced));
        let coming = coming.map(|announced| announced.bytes);
        let incoming = self.transfers.incoming.values().map(|incoming| incoming.bytes);
        if self.disk_full && Planted::FullLogTakesNoCopy.is_in(self.settings.planted) {
            return 0;
        }
        coming.chain(incoming).fold(self.room_bytes, u64::saturating_sub)
    }

    /// Returns whether the announced snapshot may still come, and would be taken.
    fn is_awaited(&self, announced: &AnnouncedSnapshot) -> bool {
        self.replicas.get(&announced.shard).is_some_and(|replica| {
            replica.trust.exists()
                && (replica.promised, replica.copy) == (announced.epoch, announced.copy)
        })
    }

    /// Answers whether a snapshot of this size is to be sent.
    pub(super) fn on_snapshot_announced(
        &mut self,
        conn: Conn,
        transfer: u64,
        announced: AnnouncedSnapshot,
        effects: &mut Vec<Effect>,
    ) {
        let shard = announced.shard;
        let Some(connection) = self.accepted.get_mut(&conn) else { return };
        // The primary begins again: the snapshot before will not come.
        connection.announced.retain(|_, before| before.shard != shard);
        self.promise_for_snapshot(&announced, effects);
        let planted = self.settings.planted;
        if !self.is_replaceable(shard) && !Planted::CopyOverCopy.is_in(planted) {
            let outcome = SnapshotOutcome::NotInstalled;
            let message = FromFollower::Snapshot { transfer, shard, outcome };
            effects.push(Effect::FromFollower { conn, message });
            return;
        }
        let fits = announced.bytes <= self.room_for_snapshots();
        let fits = fits || Planted::CopyWithoutRoom.is_in(planted);
        if fits && let Some(connection) = self.accepted.get_mut(&conn) {
            connection.announced.insert(transfer, announced);
        }
        let outcome = if fits { SnapshotOutcome::Accepted } else { SnapshotOutcome::NoSpace };
        let message = FromFollower::Snapshot { transfer, shard, outcome };
        effects.push(Effect::FromFollower { conn, message });
    }

    /// Returns whether a snapshot may replace this node's copy of the shard: there is a copy, and
    /// no snapshot is being installed already. The latter may take long, where the disk lacks room
    /// or open files.
    fn is_replaceable(&self, shard: ShardId) -> bool {
        let trust = self.replicas.get(&shard).map(|replica| &replica.trust);
        !matches!(trust, None | Some(Trust::Absent { .. } | Trust::Replacing { .. }))
    }

    /// Promises the epoch of the announcement, which may be the first message of this epoch: no
    /// slice was sent while the window had no room, and by then the log no longer reached back. It
    /// obliges as a slice does; without that no snapshot would ever be installed.
    fn promise_for_snapshot(&mut self, announced: &AnnouncedSnapshot, effects: &mut Vec<Effect>) {
        let &AnnouncedSnapshot { shard, epoch, copy, .. } = announced;
        let Some(replica) = self.replicas.get_mut(&shard) else { return };
        if replica.trust.exists() && replica.copy == copy && replica.promised < epoch {
            replica.promise(&mut turn_of!(self, effects), epoch);
            self.dirty.insert(shard);
        }
    }

    pub(super) fn on_snapshot_staged(
        &mut self,
        conn: Conn,
        transfer: u64,
        state: ShardState,
        effects: &mut Vec<Effect>,
    ) {
        let announced = self
            .accepted
            .get_mut(&conn)
            .and_then(|connection| connection.announced.remove(&transfer));
        let wanted = announced.and_then(|AnnouncedSnapshot { shard, epoch, copy, bytes }| {
            let replaceable = self.is_replaceable(shard);
            let replica = self.replicas.get_mut(&shard)?;
            // The snapshot must be of the promised epoch, and replace the copy that the sender
            // meant: a snapshot that comes late must not replace a copy that has acknowledged
            // since.
            let fits = replaceable
                && replica.promised == epoch
                && replica.primary().is_none()
                && replica.copy == copy
                && replica.slots == state.slots;
            fits.then_some((shard, bytes, replica))
        });
        let Some((shard, bytes, replica)) = wanted else {
            effects.push(Effect::DiscardSnapshot { conn, transfer });
            if self.accepted.contains_key(&conn) {
                let (shard, outcome) = (state.slots.shard(), SnapshotOutcome::NotInstalled);
                let message = FromFollower::Snapshot { transfer, shard, outcome };
                effects.push(Effect::FromFollower { conn, message });
            }
            return;
        };
        replica.trust.replace();
        self.dirty.insert(shard); // No entry of it waits to be applied any more.
        let mut after_flush = self.request_flush();
        if Planted::InstallOverTables.is_in(self.settings.planted) {
            after_flush = None;
        }
        let incoming = ReceivingSnapshot { shard, state, bytes, after_flush };
        self.transfers.incoming.insert((conn, transfer), incoming);
        match after_flush {
            None => self.install(conn, transfer, effects),
            Some(_) => self.flush_if_due(effects),
        }
    }

    fn install(&mut self, conn: Conn, transfer: u64, effects: &mut Vec<Effect>) {
        let Some(incoming) = self.transfers.incoming.get_mut(&(conn, transfer)) else { return };
        incoming.after_flush = None;
        let Some(replica) = self.replicas.get(&incoming.shard) else { return };
        let copy = CopyNo(replica.copy.0 + 1);
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
        self.next_trim = self.now; // The former copy no longer needs the log.
        self.ingests += 1;
        self.announce_copy(shard, effects);
        if self.accepted.contains_key(&conn) {
            let outcome = SnapshotOutcome::Installed;
            let message = FromFollower::Snapshot { transfer, shard, outcome };
            effects.push(Effect::FromFollower { conn, message });
        }
        self.dirty.insert(shard);
    }

    /// Deletes a copy that a linearizable read of etcd no longer assigns to this store.
    pub(super) fn drop_copy(&mut self, shard: ShardId, effects: &mut Vec<Effect>) {
        let after_flush = self.request_flush();
        let Some(replica) = self.replicas.get_mut(&shard) else { return };
        if matches!(replica.trust, Trust::Absent { .. } | Trust::Replacing { .. }) {
            return; // Being replaced now: the record is read again once that is done.
        }
        replica.drop_copy(&mut turn_of!(self, effects));
        self.next_trim = self.now;
        self.announce_copy(shard, effects);
        match after_flush {
            None => self.drop_rows(shard, effects),
            Some(flush) => {
                self.transfers.dropping.insert(shard, Some(flush));
            }
        }
    }

    /// Removes the rows of a former copy from the state, unless that is in progress.
    pub(super) fn drop_rows(&mut self, shard: ShardId, effects: &mut Vec<Effect>) {
        let Some(slots) = self.replicas.get(&shard).map(|replica| replica.slots) else { return };
        if let std::collections::btree_map::Entry::Vacant(place) =
            self.transfers.dropping.entry(shard)
        {
            place.insert(None);
            effects.push(Effect::DropRows { shard, slots });
        }
    }

    /// Handles the end of a removal of rows: if etcd assigns a copy to this store again meanwhile,
    /// it is created now.
    pub(super) fn on_rows_dropped(&mut self, shard: ShardId, effects: &mut Vec<Effect>) {
        self.transfers.dropping.remove(&shard);
        if let Some(replica) = self.replicas.get_mut(&shard) {
            replica.trust.mark_clean();
        }
        if let Some((record, _)) = self.records.get(&shard).cloned() {
            self.follow_assignment(&record, None, effects);
        }
    }

    /// Begins the installs and removals that waited for this flush.
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
