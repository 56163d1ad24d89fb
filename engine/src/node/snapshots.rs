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

use crate::ids::{Conn, CopyNo, Epoch, Now, Seq, ShardId, Slots, StoreId};
use crate::message::{FromFollower, SnapshotOutcome, ToFollower};
use crate::node::event::Effect;
use crate::node::peers::Peers;
use crate::node::shared::NodeTurn;
use crate::planted::Planted;
use crate::replica::Replica;
use crate::replica::primary::Feed;
use crate::replica::trust::Trust;
use crate::shard::state::ShardState;
use crate::shard_record::ShardRecord;

#[derive(Clone, Debug, Default)]
pub(super) struct Snapshots {
    outgoing: BTreeMap<u64, SendingSnapshot>,
    /// Snapshots that primaries have announced and this node has accepted.
    announced: BTreeMap<(Conn, u64), AnnouncedSnapshot>,
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

/// A snapshot that a primary has announced.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct AnnouncedSnapshot {
    pub shard: ShardId,
    /// The epoch of the primary.
    pub epoch: Epoch,
    /// The copy that the snapshot is to replace.
    pub copy: CopyNo,
    /// The estimated size of the snapshot.
    pub bytes: u64,
}

#[derive(Clone, Debug)]
struct ReceivingSnapshot {
    shard: ShardId,
    state: ShardState,
    bytes: u64,
    /// The flush that it waits for; `None`: it is being ingested.
    after_flush: Option<u64>,
}

impl Snapshots {
    /// Returns the seq above which the log is needed by snapshots in transfer.
    pub(super) fn pin(&self, shard: ShardId) -> Option<Seq> {
        self.outgoing.values().filter(|out| out.shard == shard).map(|out| out.pin).min()
    }

    /// Discards the snapshots in transfer on a closed connection.
    pub(super) fn on_closed(&mut self, conn: Conn) {
        self.outgoing.retain(|_, out| out.conn != conn);
        self.announced.retain(|&(announced_on, _), _| announced_on != conn);
    }
}

// ---- the sending end ---------------------------------------------------------------------------

impl Snapshots {
    /// Begins a snapshot for a follower that the log does not reach, if one may begin now.
    pub(super) fn begin(
        &mut self,
        turn: &mut NodeTurn<'_>,
        conn: Conn,
        store: StoreId,
        shard: ShardId,
    ) {
        if self.retry_after.get(&(store, shard)).is_some_and(|&until| turn.now < until) {
            return;
        }
        self.retry_after.remove(&(store, shard));
        let transfer = turn.fresh_id();
        let Some(replica) = turn.shards.get_mut(shard) else { return };
        if !replica.trust.is_working() {
            return; // A wrong copy must not spread.
        }
        let (slots, pin, recorded) = (replica.slots, replica.flushed.seq, replica.recorded);
        let is_dividing = replica.child.is_some();
        let Some(primary) = replica.primary_mut() else { return };
        // A member filled with the left child alone would be named as a member of the right one.
        if is_dividing || primary.record.slots != slots {
            return;
        }
        // A member of M never gets a snapshot that may lack what it has acknowledged, unless it is
        // known to have lost that already.
        let counted =
            primary.members(None).contains(&store) && !primary.record.tainted.contains(&store);
        let Some(follower) = primary.followers.get_mut(&store) else { return };
        if counted {
            return;
        }
        if !recorded {
            turn.request_record(shard);
            return;
        }
        follower.feed = Feed::Snapshot { transfer };
        let outgoing = SendingSnapshot { conn, store, shard, slots, pin, bytes: 0 };
        self.outgoing.insert(transfer, outgoing);
        turn.effects.push(Effect::MeasureSnapshot { transfer, slots });
    }

    /// Announces the snapshot to the follower, which checks whether it has room.
    pub(super) fn on_measured(&mut self, turn: &mut NodeTurn<'_>, transfer: u64, bytes: u64) {
        let Some(outgoing) = self.outgoing.get_mut(&transfer) else { return };
        outgoing.bytes = bytes;
        let (conn, store, shard) = (outgoing.conn, outgoing.store, outgoing.shard);
        let Some((epoch, copy)) = expected_by(turn, store, shard, transfer) else {
            self.outgoing.remove(&transfer);
            return;
        };
        let message = ToFollower::Snapshot { transfer, shard, epoch, copy, bytes };
        turn.effects.push(Effect::ToFollower { conn, message });
    }

    /// Handles the answer of a follower to an announcement, or after the transfer.
    pub(super) fn on_answer(
        &mut self,
        turn: &mut NodeTurn<'_>,
        transfer: u64,
        outcome: SnapshotOutcome,
    ) {
        let Some(outgoing) = self.outgoing.get(&transfer).cloned() else { return };
        let SendingSnapshot { conn, store, shard, slots, bytes, .. } = outgoing;
        let awaited = expected_by(turn, store, shard, transfer).is_some();
        // If the shard was split since, its rows and its record are of other slots.
        let is_whole = turn.shards.get(shard).is_some_and(|it| it.slots == slots);
        if outcome == SnapshotOutcome::Accepted && awaited && !is_whole {
            self.outgoing.remove(&transfer);
            return self.retry_later(turn, transfer, &outgoing);
        }
        if outcome == SnapshotOutcome::Accepted && awaited {
            turn.effects.push(Effect::SendSnapshot { conn, transfer, shard, slots });
            return;
        }
        self.outgoing.remove(&transfer);
        match outcome {
            SnapshotOutcome::NotInstalled => self.retry_later(turn, transfer, &outgoing),
            SnapshotOutcome::NoSpace if awaited => {
                let Some(follower) = turn.shards.follower_mut(store, shard) else { return };
                follower.feed = Feed::Full;
                follower.copy_bytes = bytes;
                turn.shards.to_review.insert(shard);
            }
            // Installed: the announcement of the new copy has already opened the feed.
            _ => {}
        }
    }

    pub(super) fn on_failed(&mut self, turn: &mut NodeTurn<'_>, transfer: u64) {
        if let Some(failed) = self.outgoing.remove(&transfer) {
            self.retry_later(turn, transfer, &failed);
        }
    }

    /// Handles a failed snapshot. The next one begins after a while: the cause may last, and
    /// snapshots are expensive.
    fn retry_later(&mut self, turn: &mut NodeTurn<'_>, transfer: u64, failed: &SendingSnapshot) {
        let until = turn.now.plus_ms(turn.settings.timing.copy_again_ms);
        self.retry_after.insert((failed.store, failed.shard), until);
        if let Some(follower) = turn.shards.follower_mut(failed.store, failed.shard)
            && follower.feed == (Feed::Snapshot { transfer })
        {
            follower.feed = Feed::NeedsSnapshot; // `retry` begins it again.
        }
    }
}

/// Returns the epoch and the follower's copy that the snapshot is for, while it is still wanted.
fn expected_by(
    turn: &mut NodeTurn<'_>,
    store: StoreId,
    shard: ShardId,
    transfer: u64,
) -> Option<(Epoch, CopyNo)> {
    let epoch = turn.shards.epoch_led(shard)?;
    let follower = turn.shards.follower_mut(store, shard)?;
    (follower.feed == Feed::Snapshot { transfer }).then_some((epoch, follower.copy))
}

/// Tries again the followers that wait for a snapshot: the flush or the change of the in-sync set
/// that they waited for may have come.
pub(super) fn retry(turn: &mut NodeTurn<'_>) {
    let mut waiting = Vec::new();
    for (replica, primary) in turn.shards.led() {
        let followers = primary.followers.iter();
        let needy = followers.filter(|(_, follower)| follower.feed == Feed::NeedsSnapshot);
        waiting.extend(needy.map(|(&store, _)| (store, replica.shard)));
    }
    for (store, shard) in waiting {
        turn.shards.mark_follower(store, shard);
    }
}

// ---- the receiving end -------------------------------------------------------------------------

impl Snapshots {
    /// Returns the bytes of snapshots that have room here, beside those that were accepted and are
    /// not installed yet. The staged part of them counts twice, which errs on the safe side. A log
    /// that is too long reduces the room by nothing: what it contains of the shard is deleted with
    /// the old copy, and may be the very reason why it is too long.
    pub(super) fn room(&self, turn: &NodeTurn<'_>) -> u64 {
        if turn.storage.is_disk_full() && turn.planted(Planted::FullLogTakesNoCopy) {
            return 0;
        }
        let coming = self.announced.values().filter(|announced| {
            let replica = turn.shards.get(announced.shard);
            replica.is_some_and(|replica| is_awaited(announced, replica))
        });
        let coming = coming.map(|announced| announced.bytes);
        let incoming = self.incoming.values().map(|incoming| incoming.bytes);
        coming.chain(incoming).fold(turn.storage.room_bytes(), u64::saturating_sub)
    }

    /// Answers whether a snapshot of this size is to be sent.
    pub(super) fn on_announced(
        &mut self,
        turn: &mut NodeTurn<'_>,
        conn: Conn,
        transfer: u64,
        announced: AnnouncedSnapshot,
    ) {
        let shard = announced.shard;
        // The primary begins again: the snapshot before will not come.
        self.announced.retain(|&(on, _), before| on != conn || before.shard != shard);
        promise_for_snapshot(turn, &announced);
        let outcome = match is_replaceable(turn, shard) || turn.planted(Planted::CopyOverCopy) {
            false => SnapshotOutcome::NotInstalled,
            true if announced.bytes <= self.room(turn)
                || turn.planted(Planted::CopyWithoutRoom) =>
            {
                self.announced.insert((conn, transfer), announced);
                SnapshotOutcome::Accepted
            }
            true => SnapshotOutcome::NoSpace,
        };
        let message = FromFollower::Snapshot { transfer, shard, outcome };
        turn.effects.push(Effect::ToPrimary { conn, message });
    }

    /// Handles a snapshot of which all is staged: it replaces this node's copy, unless that has
    /// changed since the announcement.
    pub(super) fn on_staged(
        &mut self,
        turn: &mut NodeTurn<'_>,
        peers: &Peers,
        conn: Conn,
        transfer: u64,
        state: ShardState,
    ) {
        let announced = self.announced.remove(&(conn, transfer));
        let Some(announced) = announced.filter(|announced| is_wanted(turn, announced, &state))
        else {
            turn.effects.push(Effect::DiscardSnapshot { conn, transfer });
            if peers.is_accepted(conn) {
                let (shard, outcome) = (state.slots.shard(), SnapshotOutcome::NotInstalled);
                let message = FromFollower::Snapshot { transfer, shard, outcome };
                turn.effects.push(Effect::ToPrimary { conn, message });
            }
            return;
        };
        let AnnouncedSnapshot { shard, bytes, .. } = announced;
        if let Some(replica) = turn.shards.get_mut(shard) {
            replica.trust.replace();
        }
        turn.shards.to_advance.insert(shard); // No entry of it waits to be applied any more.
        let mut after_flush = turn.request_flush();
        if turn.planted(Planted::InstallOverTables) {
            after_flush = None;
        }
        let incoming = ReceivingSnapshot { shard, state, bytes, after_flush };
        self.incoming.insert((conn, transfer), incoming);
        match after_flush {
            None => self.install(turn, conn, transfer),
            Some(_) => turn.flush_if_due(),
        }
    }

    fn install(&mut self, turn: &mut NodeTurn<'_>, conn: Conn, transfer: u64) {
        let Some(incoming) = self.incoming.get_mut(&(conn, transfer)) else { return };
        incoming.after_flush = None;
        let Some(replica) = turn.shards.get(incoming.shard) else { return };
        let copy = CopyNo(replica.copy.0 + 1);
        let replaces = replica.slots;
        let state = Box::new(incoming.state.clone());
        turn.effects.push(Effect::InstallSnapshot { conn, transfer, copy, replaces, state });
    }

    /// Handles the end of an ingest: the snapshot is this node's copy now. Returns the slots of the
    /// copy that it replaced, if they were more.
    pub(super) fn on_installed(
        &mut self,
        turn: &mut NodeTurn<'_>,
        peers: &mut Peers,
        conn: Conn,
        transfer: u64,
    ) -> Option<Slots> {
        let incoming = self.incoming.remove(&(conn, transfer))?;
        let shard = incoming.shard;
        let (replica, mut replica_turn) = turn.replica_in_turn(shard)?;
        let replaced = replica.slots;
        replica.install(&mut replica_turn, incoming.state);
        turn.storage.trim_soon(turn.now); // The former copy no longer needs the log.
        turn.note_ingest();
        peers.announce_copy(turn, shard);
        if peers.is_accepted(conn) {
            let outcome = SnapshotOutcome::Installed;
            let message = FromFollower::Snapshot { transfer, shard, outcome };
            turn.effects.push(Effect::ToPrimary { conn, message });
        }
        turn.shards.to_advance.insert(shard);
        // If the shard was split since, the snapshot is of the left child.
        let is_narrower = turn.shards.get(shard).is_some_and(|it| it.slots != replaced);
        is_narrower.then_some(replaced)
    }

    /// Begins the installs and removals that waited for this flush.
    pub(super) fn after_flush(&mut self, turn: &mut NodeTurn<'_>, flush: u64) {
        let due = |after: Option<u64>| after.is_some_and(|after| after <= flush);
        let incoming = self.incoming.iter().filter(|(_, incoming)| due(incoming.after_flush));
        let installs: Vec<_> = incoming.map(|(&key, _)| key).collect();
        installs.into_iter().for_each(|(conn, transfer)| self.install(turn, conn, transfer));
        let dropped = self.dropping.extract_if(.., |_, after| due(*after));
        let dropped: Vec<ShardId> = dropped.map(|(shard, _)| shard).collect();
        dropped.into_iter().for_each(|shard| self.drop_rows(turn, shard));
    }
}

// ---- copies that come and go -------------------------------------------------------------------

impl Snapshots {
    /// Creates an empty copy of a shard that etcd assigns to this store. `fit`: the shard is new,
    /// so an empty copy is complete.
    pub(super) fn create_copy(
        &mut self,
        turn: &mut NodeTurn<'_>,
        peers: &mut Peers,
        shard: ShardId,
        slots: Slots,
        fit: bool,
    ) {
        // If a copy of the parent has the slots, the split is still to come: it makes the copy.
        let is_occupied = turn.shards.is_occupied(shard, slots);
        if is_occupied && !turn.planted(Planted::CopyOverParent) {
            return;
        }
        let replica = turn.shards.get_or_insert(shard, || Replica::empty(shard, slots));
        if replica.trust.exists() {
            return;
        }
        if replica.trust == (Trust::Absent { clean: false }) {
            // After a start that found the number of a dropped copy, its slots are not known.
            replica.slots = slots;
            self.drop_rows(turn, shard); // The copy is created once they are gone.
            return;
        }
        let Some((replica, mut replica_turn)) = turn.replica_in_turn(shard) else { return };
        replica.create(&mut replica_turn, slots, fit);
        peers.announce_copy(turn, shard);
    }

    /// Deletes a copy that a linearizable read of etcd no longer assigns to this store.
    pub(super) fn drop_copy(
        &mut self,
        turn: &mut NodeTurn<'_>,
        peers: &mut Peers,
        record: &ShardRecord,
    ) {
        let shard = record.shard();
        let after_flush = turn.request_flush();
        let Some((replica, mut replica_turn)) = turn.replica_in_turn(shard) else { return };
        if matches!(replica.trust, Trust::Absent { .. } | Trust::Replacing { .. }) {
            return; // Being replaced now: the record is read again once that is done.
        }
        replica.act_on(&mut replica_turn, record);
        replica.drop_copy(&mut replica_turn);
        turn.storage.trim_soon(turn.now);
        peers.announce_copy(turn, shard);
        match after_flush {
            None => self.drop_rows(turn, shard),
            Some(flush) => {
                self.dropping.insert(shard, Some(flush));
            }
        }
    }

    /// Removes the rows of a former copy from the state, unless that is in progress.
    pub(super) fn drop_rows(&mut self, turn: &mut NodeTurn<'_>, shard: ShardId) {
        let Some(slots) = turn.shards.get(shard).map(|replica| replica.slots) else { return };
        if let std::collections::btree_map::Entry::Vacant(place) = self.dropping.entry(shard) {
            place.insert(None);
            turn.effects.push(Effect::DropRows { shard, slots });
        }
    }

    /// Handles the end of a removal of rows: there may be a copy again.
    pub(super) fn on_rows_dropped(&mut self, turn: &mut NodeTurn<'_>, shard: ShardId) {
        self.dropping.remove(&shard);
        if let Some(replica) = turn.shards.get_mut(shard) {
            replica.trust.mark_clean();
        }
    }
}

/// Returns whether the announced snapshot may still come, and would be taken.
fn is_awaited(announced: &AnnouncedSnapshot, replica: &Replica) -> bool {
    replica.trust.exists() && (replica.promised, replica.copy) == (announced.epoch, announced.copy)
}

/// Returns whether a snapshot may replace this node's copy of the shard: there is a copy, and no
/// snapshot is being installed already. The latter may take long, where the disk lacks room or open
/// files.
fn is_replaceable(turn: &NodeTurn<'_>, shard: ShardId) -> bool {
    let trust = turn.shards.get(shard).map(|replica| &replica.trust);
    !matches!(trust, None | Some(Trust::Absent { .. } | Trust::Replacing { .. }))
}

/// Returns whether the snapshot is of the promised epoch, and replaces the copy that the sender
/// meant: a snapshot that comes late must not replace a copy that has acknowledged since.
fn is_wanted(turn: &NodeTurn<'_>, announced: &AnnouncedSnapshot, state: &ShardState) -> bool {
    let &AnnouncedSnapshot { shard, epoch, copy, .. } = announced;
    let fits = |replica: &Replica| {
        replica.promised == epoch
            && replica.primary().is_none()
            && replica.copy == copy
            && replica.slots.lo == state.slots.lo
            && replica.slots.hi >= state.slots.hi
    };
    is_replaceable(turn, shard) && turn.shards.get(shard).is_some_and(fits)
}

/// Promises the epoch of the announcement, which may be the first message of this epoch: no slice
/// was sent while the window had no room, and by then the log no longer reached back. It obliges as
/// a slice does; without that no snapshot would ever be installed.
fn promise_for_snapshot(turn: &mut NodeTurn<'_>, announced: &AnnouncedSnapshot) {
    let &AnnouncedSnapshot { shard, epoch, copy, .. } = announced;
    let Some((replica, mut replica_turn)) = turn.replica_in_turn(shard) else { return };
    if replica.trust.exists() && replica.copy == copy && replica.promised < epoch {
        replica.promise(&mut replica_turn, epoch);
        turn.shards.to_advance.insert(shard);
    }
}
