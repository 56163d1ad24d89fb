//! Replication: feeding followers, and following primaries.
//!
//! A node dials every peer to feed it, and is dialled by every peer to be fed: two connections for
//! each pair of nodes. The first message on each identifies the sender; nothing else counts before
//! it.

use crate::entry::Entry;
use crate::ids::{Conn, CopyNo, Epoch, Seq, ShardId, StoreBoot, StoreId};
use crate::message::{FromFollower, Reject, Slice, ToFollower};
use crate::node::connections::{AnnouncedSnapshot, DialledConnection, SentSlice};
use crate::node::{Effect, Node, turn_of};
use crate::planted::Planted;
use crate::replica::Replica;
use crate::replica::follower::SliceRefusal;
use crate::replica::primary::{Feed, Follower};
use crate::replica::reconcile::join_point;

// ---- the dialling end: this node feeds ---------------------------------------------------------

impl Node {
    pub(super) fn on_dialled(&mut self, conn: Conn, peer: StoreBoot, effects: &mut Vec<Effect>) {
        self.dialled.insert(conn, DialledConnection::new(peer));
        let message = ToFollower::Hello { from: self.me, to: peer };
        effects.push(Effect::ToFollower { conn, message });
    }

    pub(super) fn on_from_follower(
        &mut self,
        conn: Conn,
        message: FromFollower,
        effects: &mut Vec<Effect>,
    ) {
        let Some(connection) = self.dialled.get_mut(&conn) else { return };
        let peer = connection.peer;
        if let FromFollower::Welcome { from, copies } = message {
            if from != peer || connection.welcome {
                self.close(conn, effects);
                return;
            }
            connection.welcome = true;
            connection.copies = copies.into_iter().collect();
            self.on_welcome(conn, peer, effects);
            return;
        }
        if !connection.welcome {
            self.close(conn, effects);
            return;
        }
        self.health.note_alive(peer.store, self.now);
        match message {
            FromFollower::Welcome { .. } => {}
            FromFollower::Copy { shard, copy } => {
                connection.forget(shard);
                connection.copies.remove(&shard);
                if copy == CopyNo(0) {
                    self.cut_feed(peer.store, shard);
                } else {
                    connection.copies.insert(shard, copy);
                    self.open_feed(peer, shard, copy);
                }
            }
            FromFollower::Ack { n } => {
                let slices = connection.acked(n);
                let since = connection.unacked_since();
                self.health.note_unacked(peer.store, since);
                slices.into_iter().for_each(|slice| self.on_acked(peer, slice));
            }
            FromFollower::Reject { n, shard, reason } => {
                if connection.rejected(n, shard) {
                    self.on_reject(peer, shard, reason, effects);
                }
            }
            FromFollower::Alive { sent: _, fsync_age_ms, full, room_bytes, wall, digests } => {
                self.health.note_wall(peer.store, wall, self.now);
                self.health.note_fsync_age(peer.store, fsync_age_ms);
                self.health.note_full(peer.store, full);
                self.health.note_room(peer.store, room_bytes);
                digests.into_iter().for_each(|point| self.on_digest(peer.store, point, effects));
            }
            FromFollower::ReadIndex { round, newer } => {
                for &(shard, epoch) in &newer {
                    self.step_down_below(shard, epoch);
                }
                self.on_read_index_answer(peer.store, round, &newer, effects);
            }
            FromFollower::ProofRequest { request, shards } => {
                self.on_proof_request(conn, request, shards);
            }
            FromFollower::Snapshot { transfer, shard: _, outcome } => {
                self.on_snapshot_answer(transfer, outcome, effects);
            }
        }
    }

    fn on_welcome(&mut self, conn: Conn, peer: StoreBoot, effects: &mut Vec<Effect>) {
        if let Some(older) = self.dialled_to.insert(peer.store, conn)
            && older != conn
        {
            self.close(older, effects);
            self.dialled_to.insert(peer.store, conn);
        }
        self.health.note_alive(peer.store, self.now);
        self.health.note_unacked(peer.store, None);
        self.health.note_connected(peer.store);
        self.cut_feeds(peer.store);
        let Some(connection) = self.dialled.get(&conn) else { return };
        for (shard, copy) in connection.copies.clone() {
            self.open_feed(peer, shard, copy);
        }
    }

    fn cut_feeds(&mut self, store: StoreId) {
        for (&shard, replica) in &mut self.replicas {
            let follower = replica.primary_mut().and_then(|p| p.followers.get_mut(&store));
            if let Some(follower) = follower {
                follower.feed = Feed::Cut;
                self.to_review.insert(shard);
            }
        }
    }

    /// Feeds this follower on its present connection, from the end of this node's log: the follower
    /// rejects if that does not fit its own log. Acknowledgements of another process or copy no
    /// longer count.
    fn open_feed(&mut self, peer: StoreBoot, shard: ShardId, copy: CopyNo) {
        let Some(replica) = self.replicas.get_mut(&shard) else { return };
        let last = replica.log.last();
        let Some(primary) = replica.primary_mut() else { return };
        let Some(follower) = primary.followers.get_mut(&peer.store) else { return };
        if (follower.boot, follower.copy) != (peer.boot, copy) {
            (follower.boot, follower.copy) = (peer.boot, copy);
            if !Planted::KeepAcksOfOldCopy.is_in(self.settings.planted) {
                follower.acked = Seq(0);
            }
        }
        follower.sent = last;
        follower.proven = false;
        follower.tried = None;
        follower.feed = Feed::Streaming { opening: true };
        self.to_send.insert((peer.store, shard));
        self.to_review.insert(shard);
    }

    fn cut_feed(&mut self, store: StoreId, shard: ShardId) {
        if let Some(follower) = self.follower_mut(store, shard) {
            follower.feed = Feed::Cut;
        }
    }

    /// Opens the feeds of a shard that this node has begun to lead, or that has new followers.
    pub(super) fn open_feeds(&mut self, shard: ShardId) {
        let Some(primary) = self.replicas.get(&shard).and_then(Replica::primary) else { return };
        let cut = |store: &&StoreId| primary.followers[store].feed == Feed::Cut;
        let stores: Vec<_> = primary.followers.keys().filter(cut).copied().collect();
        for store in stores {
            self.health.expect(store, self.now);
            let conn = self.dialled_to.get(&store);
            if conn.is_none() {
                self.health.note_disconnected(store, self.now);
            }
            let Some(connection) = conn.and_then(|conn| self.dialled.get(conn)) else { continue };
            let peer = connection.peer;
            if let Some(&copy) = connection.copies.get(&shard) {
                self.open_feed(peer, shard, copy);
            }
        }
    }

    fn on_acked(&mut self, peer: StoreBoot, slice: SentSlice) {
        let shard = slice.shard;
        let Some(replica) = self.replicas.get_mut(&shard) else { return };
        let commit = replica.commit;
        let Some(primary) = replica.primary_mut() else { return };
        let Some(follower) = primary.followers.get_mut(&peer.store) else { return };
        let counts = primary.epoch == slice.epoch
            && (follower.boot, follower.copy) == (peer.boot, slice.copy);
        if !counts {
            return;
        }
        follower.acked = follower.acked.max(slice.upto);
        follower.proven |= slice.resume;
        let counted = primary.record.isr.contains(&peer.store)
            && !primary.record.tainted.contains(&peer.store);
        if follower.lost_acked_data && !counted && follower.acked >= commit.max(primary.barrier) {
            follower.lost_acked_data = false;
        }
        self.dirty.insert(shard);
        if primary.record.learners.contains(&peer.store) || primary.frozen {
            self.to_review.insert(shard);
        }
        self.to_send.insert((peer.store, shard));
    }

    fn on_reject(
        &mut self,
        peer: StoreBoot,
        shard: ShardId,
        reason: Reject,
        effects: &mut Vec<Effect>,
    ) {
        let Some(replica) = self.replicas.get_mut(&shard) else { return };
        if let Reject::StaleEpoch { promised } = reason {
            if self.step_down_below(shard, promised) {
                self.read_record(shard, effects);
            }
            return;
        }
        let (commit, planted) = (replica.commit, self.settings.planted);
        let (joined, applied) = match &reason {
            Reject::Mismatch { ends, applied } => {
                let own = replica.log.position(applied.seq);
                (join_point(&replica.log, ends, *applied), own.unwrap_or(*applied))
            }
            _ => Default::default(),
        };
        let Some(primary) = replica.primary_mut() else { return };
        let counted = primary.record.isr.contains(&peer.store)
            && !primary.record.tainted.contains(&peer.store);
        let Some(follower) = primary.followers.get_mut(&peer.store) else { return };
        let mut lost = false;
        match reason {
            Reject::Mismatch { .. } => {
                // This position was tried before: the epochs agree, the chain does not. What the
                // follower has applied is the last resort.
                let again = follower.tried == Some(joined.seq);
                follower.tried = Some(joined.seq);
                follower.sent = if again { applied } else { joined };
                follower.proven = false;
                follower.feed = Feed::Streaming { opening: true };
                lost = counted && joined.seq < commit;
            }
            Reject::WrongCopy { copy: CopyNo(0) } => follower.feed = Feed::Cut,
            Reject::WrongCopy { copy } => self.open_feed(peer, shard, copy),
            // The answer to a slice that was sent before the snapshot began.
            Reject::Stopped if matches!(follower.feed, Feed::Snapshot { .. }) => {}
            Reject::Stopped => {
                follower.feed = Feed::NeedsSnapshot;
                lost = counted;
            }
            Reject::NoSpace if Planted::FullIsForgotten.is_in(planted) => follower.feed = Feed::Cut,
            Reject::NoSpace => {
                follower.feed = Feed::Full;
                follower.copy_bytes = 0;
            }
            Reject::StaleEpoch { .. } => {}
        }
        if lost {
            self.on_lost(peer.store, shard);
        }
        self.to_review.insert(shard);
        self.to_send.insert((peer.store, shard));
    }

    /// Handles an in-sync member that lacks what it has acknowledged: its disk lost it. It leaves
    /// the in-sync set (or is marked in it, at `min_in_sync`) and needs a snapshot.
    fn on_lost(&mut self, store: StoreId, shard: ShardId) {
        let Some(follower) = self.follower_mut(store, shard) else { return };
        if !follower.lost_acked_data {
            follower.lost_acked_data = true;
            follower.acked = Seq(0);
            self.durability_violations += 1;
        }
    }

    pub(super) fn follower_mut(&mut self, store: StoreId, shard: ShardId) -> Option<&mut Follower> {
        self.replicas.get_mut(&shard)?.primary_mut()?.followers.get_mut(&store)
    }

    /// Steps down if this node leads the shard in an epoch below `epoch`. Returns whether it did.
    pub(super) fn step_down_below(&mut self, shard: ShardId, epoch: Epoch) -> bool {
        let Some(replica) = self.replicas.get_mut(&shard) else { return false };
        let deposed = replica.primary().is_some_and(|primary| primary.epoch < epoch);
        if deposed {
            replica.role = crate::replica::ReplicaRole::Follower;
            self.dirty.insert(shard);
        }
        deposed
    }

    /// Sends what there is to send: all shards of one follower in one message.
    pub(super) fn send_slices(&mut self, effects: &mut Vec<Effect>) {
        let mut todo = std::mem::take(&mut self.to_send);
        while let Some(&(store, _)) = todo.first() {
            let rest = todo.split_off(&(StoreId(store.0.saturating_add(1)), ShardId(0)));
            let shards = todo.into_iter().map(|(_, shard)| shard).collect();
            todo = rest;
            self.send_to(store, shards, effects);
        }
    }

    fn send_to(&mut self, store: StoreId, shards: Vec<ShardId>, effects: &mut Vec<Effect>) {
        let Some(&conn) = self.dialled_to.get(&store) else { return };
        let sizes = self.settings.sizes;
        let Some(connection) = self.dialled.get(&conn) else { return };
        let limit = |bug: Planted, bytes| match bug.is_in(self.settings.planted) {
            true => usize::MAX,
            false => bytes,
        };
        let kept_free = self.catch_up.reserved(store, sizes.window_bytes);
        let room = connection
            .room(limit(Planted::WindowIgnored, sizes.window_bytes - kept_free))
            .min(limit(Planted::MessageUnlimited, sizes.message_bytes));
        let (mut slices, mut bytes) = (Vec::new(), 0);
        for shard in shards {
            if bytes >= room {
                self.to_send.insert((store, shard)); // The next ack makes room.
                continue;
            }
            let Some(slice) = self.next_slice(store, shard, room - bytes, effects) else {
                continue;
            };
            bytes += slice.size();
            slices.push(slice);
        }
        self.send_append(store, slices, effects);
    }

    /// Sends these slices in one message, and counts them until they are acknowledged.
    pub(super) fn send_append(
        &mut self,
        store: StoreId,
        slices: Vec<Slice>,
        effects: &mut Vec<Effect>,
    ) {
        let Some(&conn) = self.dialled_to.get(&store) else { return };
        let Some(connection) = self.dialled.get_mut(&conn).filter(|_| !slices.is_empty()) else {
            return;
        };
        for slice in &slices {
            connection.commits_sent.insert(slice.shard, (slice.epoch, slice.commit));
        }
        let bytes = slices.iter().map(Slice::size).sum();
        let sent = slices.iter().map(SentSlice::of).collect();
        let n = connection.sent(self.now, bytes, sent);
        let message = ToFollower::Append { n, slices };
        effects.push(Effect::ToFollower { conn, message });
    }

    fn next_slice(
        &mut self,
        store: StoreId,
        shard: ShardId,
        bytes_max: usize,
        effects: &mut Vec<Effect>,
    ) -> Option<Slice> {
        let replica = self.replicas.get_mut(&shard)?;
        let (slots, commit) = (replica.slots, replica.commit);
        let (base, last) = (replica.log.base().seq, replica.log.last().seq);
        let crate::replica::ReplicaRole::Primary(primary) = &mut replica.role else { return None };
        let (epoch, commit) = (primary.epoch, primary.announced(commit));
        let (barrier, active) = (primary.barrier, primary.active);
        let follower = primary.followers.get_mut(&store)?;
        let opening = match follower.feed {
            Feed::Streaming { opening } => opening,
            Feed::NeedsSnapshot => {
                self.begin_snapshot(store, shard, effects);
                return None;
            }
            _ => return None,
        };
        if !opening && follower.sent.seq >= last {
            return None;
        }
        let prev = follower.sent;
        if prev.seq < base {
            follower.feed = Feed::FromLog { opening };
            self.catch_up.begin(store, shard);
            return None;
        }
        if replica.log.position(prev.seq) != Some(prev) {
            // The follower has applied entries that are not in this log.
            follower.feed = Feed::NeedsSnapshot;
            self.to_send.insert((store, shard));
            return None;
        }
        // A follower whose disk is full refuses what is above the barrier, and all that comes in
        // one message with it. So until the barrier is committed it ends a message, and a follower
        // that has the barrier acknowledges it first.
        let ends_at = match prev.seq < barrier {
            _ if active => None,
            true => Some(barrier),
            false => opening.then_some(prev.seq),
        };
        let mut entries = replica.log.slice(prev.seq.next(), bytes_max);
        if let Some(end) = ends_at {
            entries.retain(|entry| entry.seq <= end);
        }
        follower.sent = entries.last().map_or(prev, Entry::position);
        follower.feed = Feed::Streaming { opening: false };
        if follower.sent.seq < last {
            self.to_send.insert((store, shard));
        }
        let copy = follower.copy;
        Some(Slice { shard, slots, epoch, copy, prev, commit, resume: opening, entries })
    }

    /// Sends a heartbeat to every follower, with the commits that have moved.
    pub(super) fn send_heartbeats(&mut self, effects: &mut Vec<Effect>) {
        self.retry_full_followers();
        for (&conn, connection) in
            self.dialled.iter_mut().filter(|(_, connection)| connection.welcome)
        {
            let mut commits = Vec::new();
            for (&shard, replica) in &self.replicas {
                let Some(primary) = replica.primary().filter(|primary| primary.active) else {
                    continue;
                };
                let sent = (primary.epoch, replica.commit);
                let follows = primary.followers.contains_key(&connection.peer.store);
                if follows && connection.commits_sent.insert(shard, sent) != Some(sent) {
                    commits.push((shard, primary.epoch, replica.commit));
                }
            }
            let message = ToFollower::Heartbeat { sent: self.now.0, commits };
            effects.push(Effect::ToFollower { conn, message });
        }
    }

    /// Tries again the followers that refused for lack of space, once they no longer report it:
    /// those that lacked it for a snapshot once they report enough of it.
    fn retry_full_followers(&mut self) {
        let full = |replica: &Replica| {
            let primary = replica.primary()?;
            let is_full = |(store, follower): &(&StoreId, &Follower)| {
                // Room for a snapshot is a stronger condition than a log that is not too long.
                let has_room = match follower.copy_bytes {
                    0 => !self.health.is_full(**store),
                    bytes => self.health.room(**store) >= bytes,
                };
                follower.feed == Feed::Full && has_room
            };
            let full: Vec<_> =
                primary.followers.iter().filter(is_full).map(|(&store, _)| store).collect();
            Some((replica.shard, full))
        };
        let full: Vec<_> = self.replicas.values().filter_map(full).collect();
        for (shard, stores) in full {
            for store in stores {
                let conn = self.dialled_to.get(&store);
                let Some(connection) = conn.and_then(|conn| self.dialled.get(conn)) else {
                    continue;
                };
                let peer = connection.peer;
                if let Some(&copy) = connection.copies.get(&shard) {
                    self.open_feed(peer, shard, copy);
                }
            }
        }
    }

    /// Records since when each follower has not acknowledged a message.
    pub(super) fn note_unacked(&mut self) {
        for connection in self.dialled.values().filter(|connection| connection.welcome) {
            self.health.note_unacked(connection.peer.store, connection.unacked_since());
        }
    }
}

// ---- the accepting end: this node follows ------------------------------------------------------

impl Node {
    pub(super) fn on_to_follower(
        &mut self,
        conn: Conn,
        message: ToFollower,
        effects: &mut Vec<Effect>,
    ) {
        let Some(connection) = self.accepted.get_mut(&conn) else { return };
        if let ToFollower::Hello { from, to } = message {
            let outdated = self.peers.get(&from.store).is_some_and(|&(boot, _)| from.boot < boot);
            if to != self.me || connection.peer.is_some() || outdated {
                self.close(conn, effects);
                return;
            }
            connection.peer = Some(from);
            self.health.note_alive(from.store, self.now);
            let held = self.replicas.iter().filter(|(_, replica)| replica.trust.exists());
            let copies = held.map(|(&shard, replica)| (shard, replica.copy)).collect();
            let message = FromFollower::Welcome { from: self.me, copies };
            effects.push(Effect::FromFollower { conn, message });
            return;
        }
        let Some(peer) = connection.peer else {
            self.close(conn, effects);
            return;
        };
        self.health.note_alive(peer.store, self.now);
        match message {
            ToFollower::Hello { .. } => {}
            ToFollower::Append { n, slices } => self.on_append(conn, n, slices, effects),
            ToFollower::Heartbeat { sent, commits } => {
                for (shard, epoch, commit) in commits {
                    let replica = self.replicas.get_mut(&shard);
                    if let Some(replica) = replica.filter(|replica| replica.promised == epoch) {
                        replica.learn_commit(commit);
                        self.dirty.insert(shard);
                    }
                }
                let fsync_age_ms = self.groups.fsync_age_ms(self.now);
                let digests = self.unsent_digests(conn);
                let (full, wall) = (self.disk_full, self.wall);
                let room_bytes = self.room_for_snapshots();
                let message =
                    FromFollower::Alive { sent, fsync_age_ms, full, room_bytes, wall, digests };
                effects.push(Effect::FromFollower { conn, message });
            }
            ToFollower::ReadIndex { round, shards } => {
                let promised = |shard| self.replicas.get(shard).map(|replica| replica.promised);
                let newer = shards
                    .iter()
                    .filter_map(|(shard, epoch)| {
                        Some((*shard, promised(shard)?)).filter(|p| p.1 > *epoch)
                    })
                    .collect();
                let message = FromFollower::ReadIndex { round, newer };
                effects.push(Effect::FromFollower { conn, message });
            }
            ToFollower::Proof { request, proven, refused } => {
                self.on_proof(conn, request, proven, refused, effects);
            }
            ToFollower::Damaged { epoch, copy, point } => {
                self.on_marked_corrupt(peer.store, epoch, copy, point, effects);
            }
            ToFollower::Snapshot { transfer, shard, epoch, copy, bytes } => {
                let announced = AnnouncedSnapshot { shard, epoch, copy, bytes };
                self.on_snapshot_announced(conn, transfer, announced, effects);
            }
        }
    }

    fn on_append(&mut self, conn: Conn, n: u64, slices: Vec<Slice>, effects: &mut Vec<Effect>) {
        let Some(connection) = self.accepted.get_mut(&conn) else { return };
        if !connection.is_new(n) {
            return;
        }
        for slice in slices {
            let shard = slice.shard;
            let Some(connection) = self.accepted.get_mut(&conn) else { return };
            if slice.resume {
                connection.skipping.remove(&shard);
            } else if connection.skipping.contains(&shard) {
                continue;
            }
            match self.take_slice(&slice, effects) {
                Ok(()) => {}
                Err(SliceRefusal::Reject(reason)) => {
                    let Some(connection) = self.accepted.get_mut(&conn) else { return };
                    connection.skipping.insert(shard);
                    let message = FromFollower::Reject { n, shard, reason };
                    effects.push(Effect::FromFollower { conn, message });
                }
                Err(SliceRefusal::Damaged) => {
                    self.close(conn, effects);
                    return;
                }
            }
            self.dirty.insert(shard);
        }
        let mut group = self.groups.covering().unwrap_or(0);
        if Planted::AckBeforeBackupFsync.is_in(self.settings.planted) {
            group = 0;
        }
        let Some(connection) = self.accepted.get_mut(&conn) else { return };
        connection.defer_ack(n, group);
    }

    fn take_slice(&mut self, slice: &Slice, effects: &mut Vec<Effect>) -> Result<(), SliceRefusal> {
        let in_sync = self.is_in_sync(slice.shard);
        let Some(replica) = self.replicas.get_mut(&slice.shard) else {
            return Err(Reject::WrongCopy { copy: CopyNo(0) }.into());
        };
        let last = replica.log.last().seq;
        replica.accept(&mut turn_of!(self, effects), slice, in_sync)?;
        let new = replica.log.last().seq;
        if new > last {
            self.prefetch(slice.shard, last.next(), effects);
        }
        Ok(())
    }

    /// Acknowledges every message whose group is durable.
    pub(super) fn send_due_acks(&mut self, effects: &mut Vec<Effect>) {
        if self.is_behind() && !Planted::AckWithoutRoom.is_in(self.settings.planted) {
            return;
        }
        let durable = self.groups.durable();
        for (&conn, connection) in &mut self.accepted {
            if let Some(n) = connection.next_ack(durable) {
                let message = FromFollower::Ack { n };
                effects.push(Effect::FromFollower { conn, message });
            }
        }
    }

    /// Announces the copy again after this store has learned that it is in sync. Before that, with
    /// a full disk, it refused what a member takes: the barrier of a new epoch, and what lies below
    /// it. A primary sends nothing to a disk that reports full; the announcement opens its feed
    /// again.
    pub(super) fn reannounce_refused_copy(&mut self, shard: ShardId, effects: &mut Vec<Effect>) {
        let Some(replica) = self.replicas.get(&shard) else { return };
        if !self.disk_full || !replica.trust.is_working() {
            return;
        }
        let copy = replica.copy;
        let refused =
            self.accepted.iter().filter(|(_, connection)| connection.skipping.contains(&shard));
        for (&conn, _) in refused {
            effects
                .push(Effect::FromFollower { conn, message: FromFollower::Copy { shard, copy } });
        }
    }

    /// Announces to every primary that a copy has come, gone or been replaced, before anything else
    /// about the shard.
    pub(super) fn announce_copy(&mut self, shard: ShardId, effects: &mut Vec<Effect>) {
        let Some(replica) = self.replicas.get(&shard) else { return };
        let copy = if replica.trust.exists() { replica.copy } else { CopyNo(0) };
        for (&conn, connection) in
            self.accepted.iter_mut().filter(|(_, connection)| connection.peer.is_some())
        {
            connection.skipping.remove(&shard);
            effects
                .push(Effect::FromFollower { conn, message: FromFollower::Copy { shard, copy } });
        }
    }
}

// ---- both ends ---------------------------------------------------------------------------------

impl Node {
    pub(super) fn close(&mut self, conn: Conn, effects: &mut Vec<Effect>) {
        effects.push(Effect::Close { conn });
        self.on_closed(conn);
    }

    /// Discards a connection that is closed. What was sent on it may have arrived or not.
    pub(super) fn on_closed(&mut self, conn: Conn) {
        self.accepted.remove(&conn);
        self.forget_proof_request(conn);
        self.forget_captured_commits(conn);
        let Some(connection) = self.dialled.remove(&conn) else { return };
        let store = connection.peer.store;
        self.health.note_unacked(store, None);
        self.drop_transfers(conn);
        if self.dialled_to.get(&store) != Some(&conn) {
            return;
        }
        self.dialled_to.remove(&store);
        self.health.note_disconnected(store, self.now);
        self.cut_feeds(store);
    }

    pub(super) fn on_peer_refused(&mut self, store: StoreId) {
        self.health.note_refused(store);
        let led = self.replicas.iter().filter(|(_, replica)| replica.primary().is_some());
        self.to_review.extend(led.map(|(&shard, _)| shard));
    }
}
