//! The connections of a gateway worker to nodes: which one leads to a primary, and how much is in
//! flight on it.
//!
//! A [`NodeConnection`] knows of batches only how many of each message are unanswered: it counts
//! messages, keeps the [window](super::window), and holds the queue of shards that want to send. It
//! also keeps which shards the node has reported as *frozen*, since such a notice is valid only on
//! the connection that it came by.
//!
//! A connection names the process at its other end. A primary is (store, boot): a connection to an
//! earlier or later boot of that store does not lead to it.

use std::collections::{BTreeMap, VecDeque};

use super::window::SendWindow;
use crate::ids::{Conn, Now, ShardId, StoreBoot, StoreId};

/// All connections of one worker.
#[derive(Clone, Debug, Default)]
pub struct Router {
    connections: BTreeMap<Conn, NodeConnection>,
    /// The newest connection to each store.
    newest: BTreeMap<StoreId, Conn>,
}

impl Router {
    /// A connection to this process is open.
    pub fn connected(&mut self, conn: Conn, node: StoreBoot) {
        self.connections.insert(conn, NodeConnection::new(node));
        self.newest.insert(node.store, conn);
    }

    /// Removes a connection that was closed, and returns its state.
    pub fn closed(&mut self, conn: Conn) -> Option<NodeConnection> {
        self.newest.retain(|_, newest| *newest != conn);
        self.connections.remove(&conn)
    }

    /// The connection to exactly this process, if there is one.
    pub fn to(&self, node: StoreBoot) -> Option<Conn> {
        let conn = *self.newest.get(&node.store)?;
        (self.connections.get(&conn)?.node == node).then_some(conn)
    }

    /// The newest connection to any process of this store.
    pub fn to_store(&self, store: StoreId) -> Option<Conn> {
        self.newest.get(&store).copied()
    }

    /// Returns whether any node has reported any shard as frozen, for a quick answer.
    pub fn has_frozen(&self) -> bool {
        self.connections.values().any(|connection| !connection.frozen.is_empty())
    }

    /// The state of a connection.
    pub fn connection(&self, conn: Conn) -> Option<&NodeConnection> {
        self.connections.get(&conn)
    }

    /// The state of a connection, to be changed.
    pub fn connection_mut(&mut self, conn: Conn) -> Option<&mut NodeConnection> {
        self.connections.get_mut(&conn)
    }
}

/// The state of one connection.
#[derive(Clone, Debug)]
pub struct NodeConnection {
    /// The process at the other end.
    pub node: StoreBoot,
    /// Shards that have something to send, in the order in which they were queued.
    pub send_queue: VecDeque<ShardId>,
    /// The bytes of payloads of sends without an answer.
    pub bytes: usize,
    /// The window of frames.
    pub frames: SendWindow,
    frozen: BTreeMap<ShardId, Now>,
}

impl NodeConnection {
    fn new(node: StoreBoot) -> Self {
        Self {
            node,
            send_queue: VecDeque::new(),
            bytes: 0,
            frames: SendWindow::default(),
            frozen: BTreeMap::new(),
        }
    }

    /// Notes that the node takes no writes for the shard. The notice is valid only until `until`,
    /// so that a lost message can't keep the shard closed.
    pub fn note_frozen(&mut self, shard: ShardId, until: Now) {
        self.frozen.insert(shard, until);
    }

    /// Notes that the node takes writes for the shard, or does not lead it.
    pub fn clear_frozen(&mut self, shard: ShardId) {
        self.frozen.remove(&shard);
    }

    /// Notes that the shard has applied a batch, which ends a notice that is no longer valid.
    pub fn expire_frozen(&mut self, shard: ShardId, now: Now) {
        if self.frozen_until(shard).is_some_and(|until| until <= now) {
            self.frozen.remove(&shard);
        }
    }

    /// The time until which a notice that the shard is frozen is valid.
    pub fn frozen_until(&self, shard: ShardId) -> Option<Now> {
        self.frozen.get(&shard).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::Boot;

    fn node(store: u128, boot: u64) -> StoreBoot {
        StoreBoot { store: StoreId(store), boot: Boot(boot) }
    }

    #[test]
    fn a_connection_leads_to_one_boot_only() {
        let mut router = Router::default();
        router.connected(Conn(1), node(1, 1));
        assert_eq!(router.to(node(1, 1)), Some(Conn(1)));
        assert_eq!(router.to(node(1, 2)), None);
        router.connected(Conn(2), node(1, 2));
        assert_eq!(router.to(node(1, 2)), Some(Conn(2)));
        // Closing the old connection takes nothing from the new one.
        router.closed(Conn(1));
        assert_eq!(router.to(node(1, 2)), Some(Conn(2)));
        router.closed(Conn(2));
        assert_eq!(router.to(node(1, 2)), None);
    }
}
