//! The accepting end of a connection: this node follows the primary that feeds it.

use crate::ids::{Conn, CopyNo, Epoch, Seq, ShardId, StoreBoot};
use crate::message::{FromFollower, Reject, Slice, ToFollower};
use crate::node::audit;
use crate::node::event::Effect;
use crate::node::peers::Peers;
use crate::node::peers::connections::AcceptedConnection;
use crate::node::shared::NodeTurn;
use crate::node::snapshots::Snapshots;
use crate::planted::Planted;
use crate::replica::follower::SliceRefusal;

impl Peers {
    pub(in crate::node) fn on_accepted(&mut self, conn: Conn) {
        self.accepted.insert(conn, AcceptedConnection::default());
    }

    /// Takes a message of a primary. Returns it with its sender, once that has identified itself.
    pub(in crate::node) fn admit_to_follower(
        &mut self,
        turn: &mut NodeTurn<'_>,
        conn: Conn,
        message: ToFollower,
    ) -> Option<(StoreBoot, ToFollower)> {
        let connection = self.accepted.get_mut(&conn)?;
        if let ToFollower::Hello { from, to } = message {
            let registered = self.registered.get(&from.store);
            let outdated = registered.is_some_and(|&(boot, _)| from.boot < boot);
            if to != turn.me || connection.peer.is_some() || outdated {
                self.close(turn, conn);
                return None;
            }
            connection.peer = Some(from);
            self.health.note_alive(from.store, turn.now);
            let held = turn.shards.iter().filter(|replica| replica.trust.exists());
            let copies = held.map(|replica| (replica.shard, replica.copy)).collect();
            let message = FromFollower::Welcome { from: turn.me, copies };
            turn.effects.push(Effect::ToPrimary { conn, message });
            return None;
        }
        let Some(peer) = connection.peer else {
            self.close(turn, conn);
            return None;
        };
        self.health.note_alive(peer.store, turn.now);
        Some((peer, message))
    }

    /// Learns the commits of a heartbeat, and answers with this node's health and digests.
    pub(in crate::node) fn on_heartbeat(
        &mut self,
        turn: &mut NodeTurn<'_>,
        snapshots: &Snapshots,
        conn: Conn,
        sent: u64,
        commits: Vec<(ShardId, Epoch, Seq)>,
    ) {
        for (shard, epoch, commit) in commits {
            let replica = turn.shards.get_mut(shard);
            if let Some(replica) = replica.filter(|replica| replica.promised == epoch) {
                replica.learn_commit(commit);
                turn.shards.to_advance.insert(shard);
            }
        }
        let Some(connection) = self.accepted.get_mut(&conn) else { return };
        let message = FromFollower::Alive {
            sent,
            fsync_age_ms: turn.storage.groups().fsync_age_ms(turn.now),
            full: turn.storage.is_disk_full(),
            room_bytes: snapshots.room(turn),
            wall: turn.wall,
            digests: audit::unsent_digests(turn, &mut connection.digests_sent),
        };
        turn.effects.push(Effect::ToPrimary { conn, message });
    }

    /// Takes slices of any number of shards; they are acknowledged once they are durable.
    pub(in crate::node) fn on_append(
        &mut self,
        turn: &mut NodeTurn<'_>,
        conn: Conn,
        n: u64,
        slices: Vec<Slice>,
    ) {
        let Some(connection) = self.accepted.get_mut(&conn) else { return };
        if !connection.is_new(n) {
            return;
        }
        for slice in slices {
            let shard = slice.shard;
            if slice.resume {
                connection.skipping.remove(&shard);
            } else if connection.skipping.contains(&shard) {
                continue;
            }
            match take_slice(turn, &slice) {
                Ok(()) => {
                    turn.mark_if_it_advances(shard);
                }
                Err(SliceRefusal::Reject(reason)) => {
                    connection.skipping.insert(shard);
                    let message = FromFollower::Reject { n, shard, reason };
                    turn.effects.push(Effect::ToPrimary { conn, message });
                    turn.shards.to_advance.insert(shard);
                }
                Err(SliceRefusal::Damaged) => return self.close(turn, conn),
            }
        }
        let mut group = turn.storage.groups().covering().unwrap_or(0);
        if turn.planted(Planted::AckBeforeBackupFsync) {
            group = 0;
        }
        connection.defer_ack(n, group);
    }

    /// Acknowledges every message whose group is durable.
    pub(in crate::node) fn send_due_acks(&mut self, turn: &mut NodeTurn<'_>) {
        let is_behind = turn.storage.is_behind(turn.settings.pending_bytes_max);
        if is_behind && !turn.planted(Planted::AckWithoutRoom) {
            return;
        }
        let durable = turn.storage.groups().durable();
        for (&conn, connection) in &mut self.accepted {
            if let Some(n) = connection.next_ack(durable) {
                let message = FromFollower::Ack { n };
                turn.effects.push(Effect::ToPrimary { conn, message });
            }
        }
    }

    /// Announces the copy again after this store has learned that it is in sync. Before that, with
    /// a full disk, it refused what a member takes: the barrier of a new epoch, and what lies below
    /// it. A primary sends nothing to a disk that reports full; the announcement opens its feed
    /// again.
    pub(in crate::node) fn reannounce_refused_copy(&self, turn: &mut NodeTurn<'_>, shard: ShardId) {
        let Some(replica) = turn.shards.get(shard) else { return };
        if !turn.storage.is_disk_full() || !replica.trust.is_working() {
            return;
        }
        let copy = replica.copy;
        let skips =
            |(_, connection): &(_, &AcceptedConnection)| connection.skipping.contains(&shard);
        for (&conn, _) in self.accepted.iter().filter(skips) {
            let message = FromFollower::Copy { shard, copy };
            turn.effects.push(Effect::ToPrimary { conn, message });
        }
    }
}

fn take_slice(turn: &mut NodeTurn<'_>, slice: &Slice) -> Result<(), SliceRefusal> {
    let shard = slice.shard;
    let (disk_full, store) = (turn.storage.is_disk_full(), turn.me.store);
    let in_sync = disk_full && turn.shards.is_in_sync(shard, store);
    let Some((replica, mut replica_turn)) = turn.replica_in_turn(shard) else {
        return Err(Reject::WrongCopy { copy: CopyNo(0) }.into());
    };
    let (last, led) = (replica.log.last().seq, replica.primary().is_some());
    let accepted = replica.accept(&mut replica_turn, slice, in_sync);
    let (new, leads) = (replica.log.last().seq, replica.primary().is_some());
    turn.count_log(shard);
    if led && !leads {
        turn.shards.to_advance.insert(shard); // Gateways are to know that it is not frozen.
    }
    accepted?;
    if new > last {
        turn.prefetch(shard, last.next());
    }
    Ok(())
}
