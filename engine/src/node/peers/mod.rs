//! The peers of a node: the connections to and from them, and their health.
//!
//! A node dials every peer to feed it, and is dialled by every peer to be fed: two connections for
//! each pair of nodes. The first message on each identifies the sender; nothing else counts before
//! it. [`feed`] is the dialling end, [`follow`] the accepting one; [`catch_up`] feeds lagging
//! followers from the log on disk.

pub(super) mod connections;
pub(super) mod health;

mod catch_up;
mod feed;
mod follow;

use std::collections::BTreeMap;

use crate::ids::{Boot, Conn, CopyNo, Now, ShardId, StoreBoot, StoreId};
use crate::message::FromFollower;
use crate::node::event::{Effect, ExitReason};
use crate::node::peers::connections::{AcceptedConnection, DialledConnection};
use crate::node::peers::health::PeerHealth;
use crate::node::settings::Settings;
use crate::node::shared::NodeTurn;

#[derive(Clone, Debug, Default)]
pub(super) struct Peers {
    dialled: BTreeMap<Conn, DialledConnection>,
    dialled_to: BTreeMap<StoreId, Conn>,
    accepted: BTreeMap<Conn, AcceptedConnection>,
    health: PeerHealth,
    /// The `node/` keys: boot and create_revision.
    registered: BTreeMap<StoreId, (Boot, u64)>,
    catch_up: catch_up::CatchUp,
    next_heartbeat: Now,
    /// Connections that were closed in this event.
    closed: Vec<Conn>,
    durability_violations: u64,
}

impl Peers {
    /// Creates the peers of a node that has no connection yet.
    pub(in crate::node) fn new(now: Now) -> Self {
        Self { next_heartbeat: now, ..Self::default() }
    }

    pub(in crate::node) fn health(&self) -> &PeerHealth {
        &self.health
    }

    pub(in crate::node) fn health_mut(&mut self) -> &mut PeerHealth {
        &mut self.health
    }

    /// Returns whether the peer is silent: it can't be counted on.
    pub(in crate::node) fn is_silent(&self, store: StoreId, now: Now, settings: &Settings) -> bool {
        self.health.is_silent(store, now, settings.silent_after_ms)
    }

    /// Returns the boot and the create_revision of the store's `node/` key.
    pub(in crate::node) fn registered(&self, store: StoreId) -> Option<(Boot, u64)> {
        self.registered.get(&store).copied()
    }

    /// Returns the connection on which this node feeds the store.
    pub(in crate::node) fn connection_to(&self, store: StoreId) -> Option<Conn> {
        self.dialled_to.get(&store).copied()
    }

    /// Returns the newest connection on which this process feeds this node.
    pub(in crate::node) fn connection_from(&self, peer: StoreBoot) -> Option<Conn> {
        let mut newest_first = self.accepted.iter().rev();
        let of_it = |(_, connection): &(_, &AcceptedConnection)| connection.peer == Some(peer);
        newest_first.find(of_it).map(|(&conn, _)| conn)
    }

    /// Returns whether the connection is open and was dialled by a peer.
    pub(in crate::node) fn is_accepted(&self, conn: Conn) -> bool {
        self.accepted.contains_key(&conn)
    }

    /// Returns the number of in-sync members that were found to have lost acknowledged entries.
    pub(in crate::node) fn durability_violations(&self) -> u64 {
        self.durability_violations
    }

    /// Handles a change of the `node/` keys.
    pub(in crate::node) fn on_registered(
        &mut self,
        turn: &mut NodeTurn<'_>,
        peers: &[(StoreBoot, u64)],
    ) {
        let key = |&(peer, revision): &(StoreBoot, u64)| (peer.store, (peer.boot, revision));
        self.registered = peers.iter().map(key).collect();
        let me = turn.me;
        if let Some((newest, _)) = self.registered(me.store)
            && newest > me.boot
        {
            let newer = StoreBoot { store: me.store, boot: newest };
            turn.effects.push(Effect::Exit(ExitReason::NewerBoot(newer)));
        }
    }

    pub(in crate::node) fn on_refused(&mut self, turn: &mut NodeTurn<'_>, store: StoreId) {
        self.health.note_refused(store);
        turn.shards.review_led();
    }

    /// Announces to every primary that a copy has come, gone or been replaced, before anything else
    /// about the shard.
    pub(in crate::node) fn announce_copy(&mut self, turn: &mut NodeTurn<'_>, shard: ShardId) {
        let Some(replica) = turn.shards.get(shard) else { return };
        let copy = if replica.trust.exists() { replica.copy } else { CopyNo(0) };
        let named = |connection: &&mut AcceptedConnection| connection.peer.is_some();
        for (&conn, connection) in &mut self.accepted {
            if let Some(connection) = Some(connection).filter(named) {
                connection.skipping.remove(&shard);
                let message = FromFollower::Copy { shard, copy };
                turn.effects.push(Effect::ToPrimary { conn, message });
            }
        }
    }

    // ---- the end of a connection ---------------------------------------------------------------

    fn close(&mut self, turn: &mut NodeTurn<'_>, conn: Conn) {
        turn.effects.push(Effect::Close { conn });
        self.on_closed(turn, conn);
    }

    /// Discards a connection that is closed. What was sent on it may have arrived or not.
    pub(in crate::node) fn on_closed(&mut self, turn: &mut NodeTurn<'_>, conn: Conn) {
        self.closed.push(conn);
        self.accepted.remove(&conn);
        let Some(connection) = self.dialled.remove(&conn) else { return };
        let store = connection.peer.store;
        self.health.note_unacked(store, None);
        if self.dialled_to.get(&store) != Some(&conn) {
            return;
        }
        self.dialled_to.remove(&store);
        self.health.note_disconnected(store, turn.now);
        self.cut_feeds(turn, store);
    }

    /// Returns the connections that were closed in this event: other parts have to forget them.
    pub(in crate::node) fn take_closed(&mut self) -> Vec<Conn> {
        std::mem::take(&mut self.closed)
    }
}
