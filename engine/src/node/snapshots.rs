//! Whole copies, for followers that the log no longer reaches.
//!
//! A snapshot is the shard's rows in the state, as of the `applied` of the shard record among
//! them: one flush wrote both in one step, so no table content is needed. The receiver stages it
//! all, then one ingest puts it in place of what was there, with its shard record under a new copy
//! number: all or nothing. From there the log goes on.
//!
//! ```text
//!   primary: MeasureSnapshot ──▶ notice with its size ──▶ follower: has it room?
//!            SendSnapshot    ◀── accepted ──────────────┘      └── no: NoSpace, and the feed is full
//! ```
//!
//! A copy that has no room is not begun: half of it would take the room that what is there needs, and nodes whose disks
//! are equally full would copy for ever.
//!
//! Of a shard of which nothing was applied yet the copy is empty, and the whole log follows it. At a floor of all its
//! members nothing may ever be applied before one that lost its copy has another.
//!
//! The tables hold changes of all shards together, so before rows of a shard are replaced or
//! removed, everything in the tables is flushed first: else a later flush would add the old copy's
//! changes to the new one's rows.

use std::collections::BTreeMap;

use crate::apply::ShardState;
use crate::ids::{Conn, CopyNo, Epoch, Now, Seq, ShardId, Slots, StoreId};
use crate::message::{FromFollower, SnapshotOutcome, ToFollower};
use crate::node::links::Announced;
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
    /// No copy is begun before this moment: one has just failed, for a reason that this node does not know.
    resting: BTreeMap<(StoreId, ShardId), Now>,
}

#[derive(Clone, Debug)]
struct Outgoing {
    conn: Conn,
    store: StoreId,
    shard: ShardId,
    slots: Slots,
    /// The follower will need the log above it.
    pin: Seq,
    /// About how large it is, once that is known.
    bytes: u64,
}

#[derive(Clone, Debug)]
struct Incoming {
    shard: ShardId,
    state: ShardState,
    bytes: u64,
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
        if self.transfers.resting.get(&(store, shard)).is_some_and(|&until| self.now < until) {
            return;
        }
        self.transfers.resting.remove(&(store, shard));
        let transfer = self.fresh_id();
        let Some(replica) = self.replicas.get_mut(&shard) else { return };
        if !replica.trust.is_working() {
            return; // What is wrong here would be wrong there.
        }
        let (slots, pin, recorded) = (replica.slots, replica.flushed.seq, replica.recorded);
        let Some(primary) = replica.primary_mut() else { return };
        // A member of M is never handed a copy that may lack what it has acknowledged, unless it
        // is known to have lost that already.
        let counted =
            primary.members(None).contains(&store) && !primary.record.tainted.contains(&store);
        let Some(follower) = primary.followers.get_mut(&store) else { return };
        if counted {
            return;
        }
        if !recorded {
            self.want_record(shard);
            return;
        }
        follower.feed = Feed::Snapshot { transfer };
        let outgoing = Outgoing { conn, store, shard, slots, pin, bytes: 0 };
        self.transfers.outgoing.insert(transfer, outgoing);
        effects.push(Effect::MeasureSnapshot { transfer, slots });
    }

    /// Asks the follower whether it has room.
    pub(super) fn on_snapshot_measured(
        &mut self,
        transfer: u64,
        bytes: u64,
        effects: &mut Vec<Effect>,
    ) {
        let Some(outgoing) = self.transfers.outgoing.get_mut(&transfer) else { return };
        outgoing.bytes = bytes;
        let (conn, store, shard) = (outgoing.conn, outgoing.store, outgoing.shard);
        let Some((epoch, copy)) = self.awaits(store, shard, transfer) else {
            self.transfers.outgoing.remove(&transfer);
            return;
        };
        let message = ToFollower::Snapshot { transfer, shard, epoch, copy, bytes };
        effects.push(Effect::ToFollower { conn, message });
    }

    /// The epoch and the follower's copy that the transfer is for, while it is still wanted.
    fn awaits(&mut self, store: StoreId, shard: ShardId, transfer: u64) -> Option<(Epoch, CopyNo)> {
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
        let Outgoing { conn, store, shard, slots, bytes, .. } = outgoing;
        let awaited = self.awaits(store, shard, transfer).is_some();
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
            // Installed: the announcement of the new copy has opened the feed already.
            _ => {}
        }
    }

    pub(super) fn on_snapshot_failed(&mut self, transfer: u64) {
        if let Some(failed) = self.transfers.outgoing.remove(&transfer) {
            self.snapshot_failed(transfer, &failed);
        }
    }

    /// Another one is begun after a while: what hindered this one may last, and whole copies are dear.
    fn snapshot_failed(&mut self, transfer: u64, failed: &Outgoing) {
        let until = self.now.plus_ms(self.settings.timing.copy_again_ms);
        self.transfers.resting.insert((failed.store, failed.shard), until);
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
    /// Bytes of whole copies that have room here, beside those that were accepted and are not installed yet. What of them
    /// is staged already counts twice, which errs on the safe side. A log that is too long takes none of that room: what it
    /// holds of the shard goes with the copy, and may be the very reason why it is too long.
    pub(super) fn room_for_copies(&self) -> u64 {
        let coming = self.accepted.values().flat_map(|link| link.announced.values());
        let coming = coming.filter(|announced| self.expects(announced));
        let coming = coming.map(|announced| announced.bytes);
        let incoming = self.transfers.incoming.values().map(|incoming| incoming.bytes);
        if self.disk_full && Planted::FullLogTakesNoCopy.is_in(self.settings.planted) {
            return 0;
        }
        coming.chain(incoming).fold(self.room_bytes, u64::saturating_sub)
    }

    /// A copy that its primary still means to send, and that would still be taken.
    fn expects(&self, announced: &Announced) -> bool {
        self.replicas.get(&announced.shard).is_some_and(|replica| {
            replica.trust.exists()
                && (replica.promised, replica.copy) == (announced.epoch, announced.copy)
        })
    }

    /// Says whether a copy of this size is to be sent.
    pub(super) fn on_snapshot_announced(
        &mut self,
        conn: Conn,
        transfer: u64,
        announced: Announced,
        effects: &mut Vec<Effect>,
    ) {
        let shard = announced.shard;
        let Some(link) = self.accepted.get_mut(&conn) else { return };
        // Its primary begins again: the one before will not come.
        link.announced.retain(|_, before| before.shard != shard);
        self.promise_for_copy(&announced, effects);
        let planted = self.settings.planted;
        if !self.is_replaceable(shard) && !Planted::CopyOverCopy.is_in(planted) {
            let outcome = SnapshotOutcome::NotInstalled;
            let message = FromFollower::Snapshot { transfer, shard, outcome };
            effects.push(Effect::FromFollower { conn, message });
            return;
        }
        let fits = announced.bytes <= self.room_for_copies();
        let fits = fits || Planted::CopyWithoutRoom.is_in(planted);
        if fits && let Some(link) = self.accepted.get_mut(&conn) {
            link.announced.insert(transfer, announced);
        }
        let outcome = if fits { SnapshotOutcome::Accepted } else { SnapshotOutcome::NoSpace };
        let message = FromFollower::Snapshot { transfer, shard, outcome };
        effects.push(Effect::FromFollower { conn, message });
    }

    /// A whole copy may take the place of what this node has of the shard: there is something, and no copy is being installed
    /// already. That may last, where the disk lacks room or open files.
    fn is_replaceable(&self, shard: ShardId) -> bool {
        let trust = self.replicas.get(&shard).map(|replica| &replica.trust);
        !matches!(trust, None | Some(Trust::Absent { .. } | Trust::Replacing { .. }))
    }

    /// The notice may be the first that this node hears of its primary's epoch: no slice was sent while the window had no
    /// room, and by then the log no longer reached back. It obliges as a slice does, else no copy would ever be installed.
    fn promise_for_copy(&mut self, announced: &Announced, effects: &mut Vec<Effect>) {
        let &Announced { shard, epoch, copy, .. } = announced;
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
        let announced =
            self.accepted.get_mut(&conn).and_then(|link| link.announced.remove(&transfer));
        let wanted = announced.and_then(|Announced { shard, epoch, copy, bytes }| {
            let replaceable = self.is_replaceable(shard);
            let replica = self.replicas.get_mut(&shard)?;
            // Of the promised epoch, and in place of the copy that the sender meant: a snapshot
            // that comes late must not replace a copy that has acknowledged since.
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
        self.dirty.insert(shard); // Nothing more of it waits to be applied.
        let mut after_flush = self.want_flush();
        if Planted::InstallOverTables.is_in(self.settings.planted) {
            after_flush = None;
        }
        let incoming = Incoming { shard, state, bytes, after_flush };
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
        self.next_trim = self.now; // The former copy keeps nothing of the log any more.
        self.snapshot += 1;
        self.announce_copy(shard, effects);
        if self.accepted.contains_key(&conn) {
            let outcome = SnapshotOutcome::Installed;
            let message = FromFollower::Snapshot { transfer, shard, outcome };
            effects.push(Effect::FromFollower { conn, message });
        }
        self.dirty.insert(shard);
    }

    /// Deletes a copy that etcd, read linearizably, no longer wants here.
    pub(super) fn drop_copy(&mut self, shard: ShardId, effects: &mut Vec<Effect>) {
        let after_flush = self.want_flush();
        let Some(replica) = self.replicas.get_mut(&shard) else { return };
        if matches!(replica.trust, Trust::Absent { .. } | Trust::Replacing { .. }) {
            return; // Being replaced right now: etcd is asked again once it is installed.
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
            self.hold_what_is_asked(&record, None, effects);
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
