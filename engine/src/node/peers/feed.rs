//! The dialling end of a connection: this node feeds a follower.

use crate::entry::Entry;
use crate::ids::{Conn, CopyNo, Seq, ShardId, StoreBoot, StoreId};
use crate::message::{FromFollower, Reject, Slice, ToFollower};
use crate::node::event::Effect;
use crate::node::peers::Peers;
use crate::node::peers::connections::{DialledConnection, SentSlice};
use crate::node::shared::{NodeTurn, ShardSet};
use crate::node::snapshots::Snapshots;
use crate::planted::Planted;
use crate::replica::primary::{Feed, Follower, Primary};
use crate::replica::reconcile::join_point;
use crate::replica::{Replica, ReplicaRole};

impl Peers {
    pub(in crate::node) fn on_dialled(
        &mut self,
        turn: &mut NodeTurn<'_>,
        conn: Conn,
        peer: StoreBoot,
    ) {
        self.dialled.insert(conn, DialledConnection::new(peer));
        let message = ToFollower::Hello { from: turn.me, to: peer };
        turn.effects.push(Effect::ToFollower { conn, message });
    }

    /// Takes a message of a follower. Returns it with its sender, once that has identified itself.
    pub(in crate::node) fn admit_from_follower(
        &mut self,
        turn: &mut NodeTurn<'_>,
        conn: Conn,
        message: FromFollower,
    ) -> Option<(StoreBoot, FromFollower)> {
        let connection = self.dialled.get_mut(&conn)?;
        let peer = connection.peer;
        if let FromFollower::Welcome { from, copies } = message {
            if from != peer || connection.welcome {
                self.close(turn, conn);
                return None;
            }
            connection.welcome = true;
            connection.copies = copies.into_iter().collect();
            self.on_welcome(turn, conn, peer);
            return None;
        }
        if !connection.welcome {
            self.close(turn, conn);
            return None;
        }
        self.health.note_alive(peer.store, turn.now);
        Some((peer, message))
    }

    pub(in crate::node) fn on_copy(
        &mut self,
        turn: &mut NodeTurn<'_>,
        conn: Conn,
        shard: ShardId,
        copy: CopyNo,
    ) {
        let Some(connection) = self.dialled.get_mut(&conn) else { return };
        let peer = connection.peer;
        connection.forget(shard);
        connection.copies.remove(&shard);
        if copy != CopyNo(0) {
            connection.copies.insert(shard, copy);
            self.open_feed(turn, peer, shard, copy);
        } else if let Some(follower) = turn.shards.follower_mut(peer.store, shard) {
            follower.feed = Feed::Cut;
        }
    }

    pub(in crate::node) fn on_ack(&mut self, turn: &mut NodeTurn<'_>, conn: Conn, n: u64) {
        let Some(connection) = self.dialled.get_mut(&conn) else { return };
        let (peer, slices) = (connection.peer, connection.acked(n));
        self.health.note_unacked(peer.store, connection.unacked_since());
        slices.into_iter().for_each(|slice| on_acked(turn, peer, slice));
    }

    pub(in crate::node) fn on_rejected(
        &mut self,
        turn: &mut NodeTurn<'_>,
        conn: Conn,
        n: u64,
        shard: ShardId,
        reason: Reject,
    ) {
        let Some(connection) = self.dialled.get_mut(&conn) else { return };
        let peer = connection.peer;
        if connection.rejected(n, shard) {
            self.on_reject(turn, peer, shard, reason);
        }
    }

    fn on_welcome(&mut self, turn: &mut NodeTurn<'_>, conn: Conn, peer: StoreBoot) {
        if let Some(older) = self.dialled_to.insert(peer.store, conn)
            && older != conn
        {
            self.close(turn, older);
            self.dialled_to.insert(peer.store, conn);
        }
        self.health.note_alive(peer.store, turn.now);
        self.health.note_unacked(peer.store, None);
        self.health.note_connected(peer.store);
        self.cut_feeds(turn, peer.store);
        let Some(connection) = self.dialled.get(&conn) else { return };
        for (shard, copy) in connection.copies.clone() {
            self.open_feed(turn, peer, shard, copy);
        }
    }

    pub(super) fn cut_feeds(&self, turn: &mut NodeTurn<'_>, store: StoreId) {
        let mut cut = Vec::new();
        for replica in turn.shards.iter_mut() {
            let follower = replica.primary_mut().and_then(|p| p.followers.get_mut(&store));
            if let Some(follower) = follower {
                follower.feed = Feed::Cut;
                cut.push(replica.shard);
            }
        }
        turn.shards.to_review.extend(cut);
    }

    /// Feeds this follower on its present connection, from the end of this node's log: the follower
    /// rejects if that does not fit its own log. Acknowledgements of another process or copy no
    /// longer count.
    fn open_feed(&self, turn: &mut NodeTurn<'_>, peer: StoreBoot, shard: ShardId, copy: CopyNo) {
        let keeps_acks = turn.planted(Planted::KeepAcksOfOldCopy);
        let Some(replica) = turn.shards.get_mut(shard) else { return };
        let last = replica.log.last();
        let Some(primary) = replica.primary_mut() else { return };
        let Some(follower) = primary.followers.get_mut(&peer.store) else { return };
        if (follower.boot, follower.copy) != (peer.boot, copy) {
            (follower.boot, follower.copy) = (peer.boot, copy);
            if !keeps_acks {
                follower.acked = Seq(0);
            }
        }
        follower.sent = last;
        follower.proven = false;
        follower.tried = None;
        follower.feed = Feed::Streaming { opening: true };
        turn.shards.mark_follower(peer.store, shard);
        turn.shards.to_review.insert(shard);
    }

    /// Opens the feeds of a shard that this node has begun to lead, or that has new followers.
    pub(in crate::node) fn open_feeds(&mut self, turn: &mut NodeTurn<'_>, shard: ShardId) {
        let Some(primary) = turn.shards.primary(shard) else { return };
        let cut = |store: &&StoreId| primary.followers[store].feed == Feed::Cut;
        let stores: Vec<_> = primary.followers.keys().filter(cut).copied().collect();
        for store in stores {
            self.health.expect(store, turn.now);
            if !self.dialled_to.contains_key(&store) {
                self.health.note_disconnected(store, turn.now);
            }
            self.reopen_feed(turn, store, shard);
        }
    }

    /// Feeds the follower again if it is connected and has a copy of the shard.
    fn reopen_feed(&self, turn: &mut NodeTurn<'_>, store: StoreId, shard: ShardId) {
        let conn = self.dialled_to.get(&store);
        let Some(connection) = conn.and_then(|conn| self.dialled.get(conn)) else { return };
        if let Some(&copy) = connection.copies.get(&shard) {
            self.open_feed(turn, connection.peer, shard, copy);
        }
    }

    /// Discards what was sent of the shard to a store of which nothing is known any more.
    pub(in crate::node) fn forget_sent(&mut self, store: StoreId, shard: ShardId) {
        let conn = self.dialled_to.get(&store);
        if let Some(connection) = conn.and_then(|conn| self.dialled.get_mut(conn)) {
            connection.forget(shard);
        }
    }

    fn on_reject(
        &mut self,
        turn: &mut NodeTurn<'_>,
        peer: StoreBoot,
        shard: ShardId,
        reason: Reject,
    ) {
        let Some(replica) = turn.shards.get_mut(shard) else { return };
        if let Reject::StaleEpoch { promised } = reason {
            if turn.shards.step_down_below(shard, promised) {
                turn.read_record(shard);
            }
            return;
        }
        let (commit, planted) = (replica.commit, turn.settings.planted);
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
            Reject::WrongCopy { copy } => self.open_feed(turn, peer, shard, copy),
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
            self.on_lost(turn, peer.store, shard);
        }
        turn.shards.to_review.insert(shard);
        turn.shards.mark_follower(peer.store, shard);
    }

    /// Handles an in-sync member that lacks what it has acknowledged: its disk lost it. It leaves
    /// the in-sync set (or is marked in it, at `min_in_sync`) and needs a snapshot.
    fn on_lost(&mut self, turn: &mut NodeTurn<'_>, store: StoreId, shard: ShardId) {
        let Some(follower) = turn.shards.follower_mut(store, shard) else { return };
        if !follower.lost_acked_data {
            follower.lost_acked_data = true;
            follower.acked = Seq(0);
            self.durability_violations += 1;
        }
    }

    /// Sends what there is to send: all shards of one follower in one message. A follower that the
    /// log does not reach gets a snapshot.
    pub(in crate::node) fn send_slices(
        &mut self,
        turn: &mut NodeTurn<'_>,
        snapshots: &mut Snapshots,
    ) {
        for (store, shards) in std::mem::take(&mut turn.shards.to_send) {
            self.send_to(turn, snapshots, store, shards);
        }
    }

    fn send_to(
        &mut self,
        turn: &mut NodeTurn<'_>,
        snapshots: &mut Snapshots,
        store: StoreId,
        shards: ShardSet,
    ) {
        let Some(&conn) = self.dialled_to.get(&store) else { return };
        let Some(connection) = self.dialled.get(&conn) else { return };
        let sizes = turn.settings.sizes;
        let limit = |bug: Planted, bytes| if turn.planted(bug) { usize::MAX } else { bytes };
        let kept_free = self.catch_up.reserved(store, sizes.window_bytes);
        let room = connection
            .room(limit(Planted::WindowIgnored, sizes.window_bytes - kept_free))
            .min(limit(Planted::MessageUnlimited, sizes.message_bytes));
        let (mut slices, mut bytes) = (Vec::new(), 0);
        for shard in shards {
            if bytes >= room {
                turn.shards.mark_follower(store, shard); // The next ack makes room.
                continue;
            }
            match self.next_slice(turn, store, shard, room - bytes) {
                NextSlice::Send(slice) => {
                    bytes += slice.size();
                    slices.push(slice);
                }
                NextSlice::NeedsSnapshot => snapshots.begin(turn, conn, store, shard),
                NextSlice::None => {}
            }
        }
        self.send_append(turn, store, slices);
    }

    /// Sends these slices in one message, and counts them until they are acknowledged.
    pub(super) fn send_append(
        &mut self,
        turn: &mut NodeTurn<'_>,
        store: StoreId,
        slices: Vec<Slice>,
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
        let n = connection.sent(turn.now, bytes, sent);
        let message = ToFollower::Append { n, slices };
        turn.effects.push(Effect::ToFollower { conn, message });
    }

    /// Returns the next slice for the follower, and marks it as sent.
    fn next_slice(
        &mut self,
        turn: &mut NodeTurn<'_>,
        store: StoreId,
        shard: ShardId,
        bytes_max: usize,
    ) -> NextSlice {
        let Some(replica) = turn.shards.get_mut(shard) else { return NextSlice::None };
        let (slots, commit) = (replica.slots, replica.commit);
        let divided = replica.state.divided;
        let (base, last) = (replica.log.base().seq, replica.log.last().seq);
        let ReplicaRole::Primary(primary) = &mut replica.role else { return NextSlice::None };
        let (epoch, commit) = (primary.epoch, primary.announced(commit));
        let (barrier, active) = (primary.barrier, primary.active);
        let Some(follower) = primary.followers.get_mut(&store) else { return NextSlice::None };
        let opening = match follower.feed {
            Feed::Streaming { opening } => opening,
            Feed::NeedsSnapshot => return NextSlice::NeedsSnapshot,
            _ => return NextSlice::None,
        };
        if !opening && follower.sent.seq >= last {
            return NextSlice::None;
        }
        let prev = follower.sent;
        if prev.seq == Seq(0) && divided > Seq(0) {
            // An empty copy has the slots of today, the first entries those of before the split.
            follower.feed = Feed::NeedsSnapshot;
            turn.shards.mark_follower(store, shard);
            return NextSlice::None;
        }
        if prev.seq < base {
            follower.feed = Feed::FromLog { opening };
            self.catch_up.begin(store, shard);
            return NextSlice::None;
        }
        if replica.log.position(prev.seq) != Some(prev) {
            // The follower has applied entries that are not in this log.
            follower.feed = Feed::NeedsSnapshot;
            turn.shards.mark_follower(store, shard);
            return NextSlice::None;
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
        let (copy, has_more) = (follower.copy, follower.sent.seq < last);
        if has_more {
            turn.shards.mark_follower(store, shard);
        }
        let slice = Slice { shard, slots, epoch, copy, prev, commit, resume: opening, entries };
        NextSlice::Send(slice)
    }

    // ---- by the clock --------------------------------------------------------------------------

    /// Sends a heartbeat to every follower, if it is due, with the commits that have moved.
    pub(in crate::node) fn send_heartbeats_if_due(&mut self, turn: &mut NodeTurn<'_>) {
        if turn.now < self.next_heartbeat {
            return;
        }
        self.next_heartbeat = turn.now.plus_ms(turn.settings.heartbeat_ms);
        self.retry_full_followers(turn);
        let welcome = |(_, connection): &(_, &mut DialledConnection)| connection.welcome;
        for (&conn, connection) in self.dialled.iter_mut().filter(welcome) {
            let mut commits = Vec::new();
            for (replica, primary) in turn.shards.led().filter(|(_, primary)| primary.active) {
                let (shard, sent) = (replica.shard, (primary.epoch, replica.commit));
                let follows = primary.followers.contains_key(&connection.peer.store);
                if follows && connection.commits_sent.insert(shard, sent) != Some(sent) {
                    commits.push((shard, primary.epoch, replica.commit));
                }
            }
            let message = ToFollower::Heartbeat { sent: turn.now.0, commits };
            turn.effects.push(Effect::ToFollower { conn, message });
        }
    }

    /// Tries again the followers that refused for lack of space, once they no longer report it:
    /// those that lacked it for a snapshot once they report enough of it.
    fn retry_full_followers(&self, turn: &mut NodeTurn<'_>) {
        let is_full = |(store, follower): &(&StoreId, &Follower)| {
            // Room for a snapshot is a stronger condition than a log that is not too long.
            let has_room = match follower.copy_bytes {
                0 => !self.health.is_full(**store),
                bytes => self.health.room(**store) >= bytes,
            };
            follower.feed == Feed::Full && has_room
        };
        let full = |(replica, primary): (&Replica, &Primary)| {
            let full = primary.followers.iter().filter(is_full);
            full.map(|(&store, _)| (store, replica.shard)).collect::<Vec<_>>()
        };
        let full: Vec<_> = turn.shards.led().flat_map(full).collect();
        full.into_iter().for_each(|(store, shard)| self.reopen_feed(turn, store, shard));
    }

    /// Records since when each follower has not acknowledged a message.
    pub(in crate::node) fn note_unacked(&mut self) {
        for connection in self.dialled.values().filter(|connection| connection.welcome) {
            self.health.note_unacked(connection.peer.store, connection.unacked_since());
        }
    }
}

/// The next message to a follower about one shard.
enum NextSlice {
    Send(Slice),
    NeedsSnapshot,
    None,
}

fn on_acked(turn: &mut NodeTurn<'_>, peer: StoreBoot, slice: SentSlice) {
    let shard = slice.shard;
    let Some(replica) = turn.shards.get_mut(shard) else { return };
    let (commit, last) = (replica.commit, replica.log.last().seq);
    let Some(primary) = replica.primary_mut() else { return };
    let Some(follower) = primary.followers.get_mut(&peer.store) else { return };
    let counts =
        primary.epoch == slice.epoch && (follower.boot, follower.copy) == (peer.boot, slice.copy);
    if !counts {
        return;
    }
    follower.acked = follower.acked.max(slice.upto);
    follower.proven |= slice.resume;
    let counted =
        primary.record.isr.contains(&peer.store) && !primary.record.tainted.contains(&peer.store);
    if follower.lost_acked_data && !counted && follower.acked >= commit.max(primary.barrier) {
        follower.lost_acked_data = false;
    }
    let streams = matches!(follower.feed, Feed::Streaming { opening: false });
    // A feed that does not stream may begin to, or needs a snapshot.
    let is_waiting = !streams || follower.sent.seq < last;
    let is_reviewed = primary.record.learners.contains(&peer.store) || primary.frozen;
    turn.mark_if_it_advances(shard);
    if is_reviewed {
        turn.shards.to_review.insert(shard);
    }
    if is_waiting {
        turn.shards.mark_follower(peer.store, shard);
    }
}
