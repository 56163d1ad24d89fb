//! Which connection leads to a primary, and how much is on its way there.
//!
//! A *lane* is one connection of one worker to one node. It knows nothing of batches but how many
//! of each message are unanswered: it counts messages, keeps the window, and holds the line of
//! shards that want to send. It also remembers what the node has said of its shards (*frozen*),
//! since such a word is worth something only on the connection that it came by.
//!
//! A connection names the process at its other end. A primary is (store, boot): a connection to an
//! earlier or later boot of that store does not lead to it.

use std::collections::{BTreeMap, VecDeque};

use crate::ids::{Conn, Now, ShardId, StoreBoot, StoreId};

/// All connections of one worker.
#[derive(Clone, Debug, Default)]
pub struct Router {
    lanes: BTreeMap<Conn, Lane>,
    /// The newest connection to each store.
    newest: BTreeMap<StoreId, Conn>,
}

impl Router {
    pub fn connected(&mut self, conn: Conn, node: StoreBoot) {
        self.lanes.insert(conn, Lane::new(node));
        self.newest.insert(node.store, conn);
    }

    /// What was known of the connection, if it stood.
    pub fn closed(&mut self, conn: Conn) -> Option<Lane> {
        self.newest.retain(|_, newest| *newest != conn);
        self.lanes.remove(&conn)
    }

    /// The connection to this very process.
    pub fn to(&self, node: StoreBoot) -> Option<Conn> {
        let conn = *self.newest.get(&node.store)?;
        (self.lanes.get(&conn)?.node == node).then_some(conn)
    }

    /// The newest connection to any process of this store.
    pub fn to_store(&self, store: StoreId) -> Option<Conn> {
        self.newest.get(&store).copied()
    }

    pub fn lane(&self, conn: Conn) -> Option<&Lane> {
        self.lanes.get(&conn)
    }

    pub fn lane_mut(&mut self, conn: Conn) -> Option<&mut Lane> {
        self.lanes.get_mut(&conn)
    }
}

/// One connection.
#[derive(Clone, Debug)]
pub struct Lane {
    pub node: StoreBoot,
    /// Shards that have something to send, in the order in which they lined up.
    pub line: VecDeque<ShardId>,
    /// Payloads of sends without an answer.
    pub bytes: usize,
    messages: u64,
    unanswered: VecDeque<Message>,
    frozen: BTreeMap<ShardId, Now>,
}

/// A message that takes a place in the window.
#[derive(Clone, Debug)]
struct Message {
    number: u64,
    sent: Now,
    batches: usize,
}

/// How many messages may be without an answer, and for how long one counts.
#[derive(Clone, Copy, Debug)]
pub struct Window {
    pub messages: usize,
    pub us: u64,
}

impl Lane {
    fn new(node: StoreBoot) -> Self {
        Self {
            node,
            line: VecDeque::new(),
            bytes: 0,
            messages: 0,
            unanswered: VecDeque::new(),
            frozen: BTreeMap::new(),
        }
    }

    /// The number of the message to be sent next.
    pub fn next_message(&self) -> u64 {
        self.messages + 1
    }

    /// That message was sent, with so many batches.
    pub fn sent(&mut self, now: Now, batches: usize) {
        self.messages += 1;
        self.unanswered.push_back(Message { number: self.messages, sent: now, batches });
    }

    /// One batch of a message was answered.
    pub fn answered(&mut self, number: u64) {
        let Ok(at) = self.unanswered.binary_search_by_key(&number, |message| message.number) else {
            return;
        };
        self.unanswered[at].batches -= 1;
        if self.unanswered[at].batches == 0 {
            self.unanswered.remove(at);
        }
    }

    /// When the next message may go: none for at once.
    pub fn blocked_until(&mut self, now: Now, window: Window) -> Option<Now> {
        let ends = |message: &Message| Now(message.sent.0.saturating_add(window.us));
        while self.unanswered.front().is_some_and(|oldest| ends(oldest) <= now) {
            self.unanswered.pop_front();
        }
        let oldest = self.unanswered.front().map(ends);
        oldest.filter(|_| self.unanswered.len() >= window.messages)
    }

    /// The node says that it takes no writes for the shard. The word is believed for a while only,
    /// so that nothing stays shut for want of a message.
    pub fn froze(&mut self, shard: ShardId, until: Now) {
        self.frozen.insert(shard, until);
    }

    /// … that it takes them, or that it has no say.
    pub fn opened(&mut self, shard: ShardId) {
        self.frozen.remove(&shard);
    }

    /// The shard has applied something: an old word that it is frozen is worth nothing any more.
    pub fn forget_frozen(&mut self, shard: ShardId, now: Now) {
        if self.frozen_until(shard).is_some_and(|until| until <= now) {
            self.frozen.remove(&shard);
        }
    }

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
        // The end of the old one takes nothing from the new one.
        router.closed(Conn(1));
        assert_eq!(router.to(node(1, 2)), Some(Conn(2)));
        router.closed(Conn(2));
        assert_eq!(router.to(node(1, 2)), None);
    }

    #[test]
    fn a_place_in_the_window_is_free_when_answered_or_after_a_while() {
        let window = Window { messages: 2, us: 5_000 };
        let mut lane = Lane::new(node(1, 1));
        lane.sent(Now(0), 2);
        assert_eq!(lane.blocked_until(Now(10), window), None);
        lane.sent(Now(10), 1);
        assert_eq!(lane.blocked_until(Now(10), window), Some(Now(5_000)));
        lane.answered(1);
        assert_eq!(lane.blocked_until(Now(10), window), Some(Now(5_000)));
        lane.answered(1);
        assert_eq!(lane.blocked_until(Now(10), window), None);
        lane.sent(Now(20), 1);
        assert_eq!(lane.blocked_until(Now(5_009), window), Some(Now(5_010)));
        assert_eq!(lane.blocked_until(Now(5_010), window), None);
        // Late answers, and answers to what was never sent, change nothing.
        lane.answered(2);
        lane.answered(99);
        assert_eq!(lane.next_message(), 4);
    }
}
