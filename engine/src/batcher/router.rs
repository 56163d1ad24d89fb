//! The connections of a gateway worker to nodes: which one leads to a primary, and how much is in
//! flight on it.
//!
//! A [`NodeConnection`] knows of batches only how many of each message are unanswered: it counts
//! messages, keeps the window, and holds the queue of shards that want to send. It also keeps which
//! shards the node has reported as *frozen*, since such a notice is valid only on the connection
//! that it came by.
//!
//! A connection names the process at its other end. A primary is (store, boot): a connection to an
//! earlier or later boot of that store does not lead to it.

use std::collections::{BTreeMap, VecDeque};

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
    messages: u64,
    unanswered: VecDeque<Message>,
    frozen: BTreeMap<ShardId, Now>,
}

/// A message that counts towards the window.
#[derive(Clone, Debug)]
struct Message {
    number: u64,
    sent: Now,
    batches: usize,
}

/// The limit of messages without an answer.
#[derive(Clone, Copy, Debug)]
pub struct Window {
    /// The number of messages that may be without an answer.
    pub messages: usize,
    /// The time in µs after which a message no longer counts.
    pub us: u64,
}

impl NodeConnection {
    fn new(node: StoreBoot) -> Self {
        Self {
            node,
            send_queue: VecDeque::new(),
            bytes: 0,
            messages: 0,
            unanswered: VecDeque::new(),
            frozen: BTreeMap::new(),
        }
    }

    /// The number of the next message.
    pub fn next_message(&self) -> u64 {
        self.messages + 1
    }

    /// Notes that the next message was sent, with so many batches.
    pub fn sent(&mut self, now: Now, batches: usize) {
        self.messages += 1;
        self.unanswered.push_back(Message { number: self.messages, sent: now, batches });
    }

    /// Notes that one batch of a message was answered.
    pub fn answered(&mut self, number: u64) {
        let Ok(at) = self.unanswered.binary_search_by_key(&number, |message| message.number) else {
            return;
        };
        self.unanswered[at].batches -= 1;
        if self.unanswered[at].batches == 0 {
            self.unanswered.remove(at);
        }
    }

    /// The time at which the next message may be sent; `None` for at once.
    pub fn blocked_until(&mut self, now: Now, window: Window) -> Option<Now> {
        let ends = |message: &Message| Now(message.sent.0.saturating_add(window.us));
        while self.unanswered.front().is_some_and(|oldest| ends(oldest) <= now) {
            self.unanswered.pop_front();
        }
        let oldest = self.unanswered.front().map(ends);
        oldest.filter(|_| self.unanswered.len() >= window.messages)
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

    #[test]
    fn a_place_in_the_window_is_free_when_answered_or_after_a_while() {
        let window = Window { messages: 2, us: 5_000 };
        let mut connection = NodeConnection::new(node(1, 1));
        connection.sent(Now(0), 2);
        assert_eq!(connection.blocked_until(Now(10), window), None);
        connection.sent(Now(10), 1);
        assert_eq!(connection.blocked_until(Now(10), window), Some(Now(5_000)));
        connection.answered(1);
        assert_eq!(connection.blocked_until(Now(10), window), Some(Now(5_000)));
        connection.answered(1);
        assert_eq!(connection.blocked_until(Now(10), window), None);
        connection.sent(Now(20), 1);
        assert_eq!(connection.blocked_until(Now(5_009), window), Some(Now(5_010)));
        assert_eq!(connection.blocked_until(Now(5_010), window), None);
        // Late answers, and answers to messages that were never sent, change nothing.
        connection.answered(2);
        connection.answered(99);
        assert_eq!(connection.next_message(), 4);
    }
}
