//! The accepting end of a connection: this node follows the primary that feeds it.

use crate::ids::{Conn, CopyNo, Epoch, Seq, ShardId, StoreBoot};
use crate::message::{FromFollower, Reject, Slice, ToFollower};
use crate::node::audit;
use crate::node::context::Context;
use crate::node::event::Effect;
use crate::node::peers::Peers;
use crate::node::peers::connections::AcceptedConnection;
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
        ctx: &mut Context<'_>,
        conn: Conn,
        message: ToFollower,
    ) -> Option<(StoreBoot, ToFollower)> {
        let connection = self.accepted.get_mut(&conn)?;
        if let ToFollower::Hello { from, to } = message {
            let registered = self.registered.get(&from.store);
            let outdated = registered.is_some_and(|&(boot, _)| from.boot < boot);
            if to != ctx.me || connection.peer.is_some() || outdated {
                self.close(ctx, conn);
                return None;
            }
            connection.peer = Some(from);
            self.health.note_alive(from.store, ctx.now);
            let held = ctx.shards.iter().filter(|replica| replica.trust.exists());
            let copies = held.map(|replica| (replica.shard, replica.copy)).collect();
            let message = FromFollower::Welcome { from: ctx.me, copies };
            ctx.effects.push(Effect::FromFollower { conn, message });
            return None;
        }
        let Some(peer) = connection.peer else {
            self.close(ctx, conn);
            return None;
        };
        self.health.note_alive(peer.store, ctx.now);
        Some((peer, message))
    }

    /// Learns the commits of a heartbeat, and answers with this node's health and digests.
    pub(in crate::node) fn on_heartbeat(
        &mut self,
        ctx: &mut Context<'_>,
        snapshots: &Snapshots,
        conn: Conn,
        sent: u64,
        commits: Vec<(ShardId, Epoch, Seq)>,
    ) {
        for (shard, epoch, commit) in commits {
            let replica = ctx.shards.get_mut(shard);
            if let Some(replica) = replica.filter(|replica| replica.promised == epoch) {
                replica.learn_commit(commit);
                ctx.shards.dirty.insert(shard);
            }
        }
        let Some(connection) = self.accepted.get_mut(&conn) else { return };
        let message = FromFollower::Alive {
            sent,
            fsync_age_ms: ctx.storage.groups().fsync_age_ms(ctx.now),
            full: ctx.storage.is_disk_full(),
            room_bytes: snapshots.room(ctx),
            wall: ctx.wall,
            digests: audit::unsent_digests(ctx, &mut connection.digests_sent),
        };
        ctx.effects.push(Effect::FromFollower { conn, message });
    }

    /// Takes slices of any number of shards; they are acknowledged once they are durable.
    pub(in crate::node) fn on_append(
        &mut self,
        ctx: &mut Context<'_>,
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
            match take_slice(ctx, &slice) {
                Ok(()) => {}
                Err(SliceRefusal::Reject(reason)) => {
                    connection.skipping.insert(shard);
                    let message = FromFollower::Reject { n, shard, reason };
                    ctx.effects.push(Effect::FromFollower { conn, message });
                }
                Err(SliceRefusal::Damaged) => return self.close(ctx, conn),
            }
            ctx.shards.dirty.insert(shard);
        }
        let mut group = ctx.storage.groups().covering().unwrap_or(0);
        if ctx.planted(Planted::AckBeforeBackupFsync) {
            group = 0;
        }
        connection.defer_ack(n, group);
    }

    /// Acknowledges every message whose group is durable.
    pub(in crate::node) fn send_due_acks(&mut self, ctx: &mut Context<'_>) {
        let is_behind = ctx.storage.is_behind(ctx.settings.pending_bytes_max);
        if is_behind && !ctx.planted(Planted::AckWithoutRoom) {
            return;
        }
        let durable = ctx.storage.groups().durable();
        for (&conn, connection) in &mut self.accepted {
            if let Some(n) = connection.next_ack(durable) {
                let message = FromFollower::Ack { n };
                ctx.effects.push(Effect::FromFollower { conn, message });
            }
        }
    }

    /// Announces the copy again after this store has learned that it is in sync. Before that, with
    /// a full disk, it refused what a member takes: the barrier of a new epoch, and what lies below
    /// it. A primary sends nothing to a disk that reports full; the announcement opens its feed
    /// again.
    pub(in crate::node) fn reannounce_refused_copy(&self, ctx: &mut Context<'_>, shard: ShardId) {
        let Some(replica) = ctx.shards.get(shard) else { return };
        if !ctx.storage.is_disk_full() || !replica.trust.is_working() {
            return;
        }
        let copy = replica.copy;
        let skips =
            |(_, connection): &(_, &AcceptedConnection)| connection.skipping.contains(&shard);
        for (&conn, _) in self.accepted.iter().filter(skips) {
            let message = FromFollower::Copy { shard, copy };
            ctx.effects.push(Effect::FromFollower { conn, message });
        }
    }
}

fn take_slice(ctx: &mut Context<'_>, slice: &Slice) -> Result<(), SliceRefusal> {
    let shard = slice.shard;
    let in_sync = ctx.shards.is_in_sync(shard, ctx.me.store);
    let Some((replica, mut turn)) = ctx.in_turn(shard) else {
        return Err(Reject::WrongCopy { copy: CopyNo(0) }.into());
    };
    let last = replica.log.last().seq;
    replica.accept(&mut turn, slice, in_sync)?;
    let new = replica.log.last().seq;
    if new > last {
        ctx.prefetch(shard, last.next());
    }
    Ok(())
}
