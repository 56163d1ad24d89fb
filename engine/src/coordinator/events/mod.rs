//! The latest events of a cluster, for people: what a coordinator can derive from the records that
//! it follows anyway.
//!
//! Nothing is stored for this in etcd, and nothing is decided by it. Every coordinator, leading or
//! not, keeps its own [`EventLog`]: `differences` derives events from two states of one record,
//! and `kept` holds the last ones in a limited number of bytes. The leader also knows the causes
//! of deaths and promotions by its [`Decision`](super::Decision)s; the others derive reasons from
//! the records alone.
//!
//! An event that comes from a record has the revision of that change in etcd, so the same event of
//! two coordinators can be recognised ([`ClusterEvent::identity`]).

mod differences;
mod kept;
mod log;

#[cfg(test)]
mod tests;

use crate::coordinator::words::words;
use crate::ids::{Epoch, ShardId, StoreId, TimeMs};

pub use kept::EventHistory;
pub use log::{EventLog, RecordList};

/// One event.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ClusterEvent {
    /// The number of the event in the log of its coordinator: 1, 2, 3 …
    pub number: u64,
    /// The time at which the coordinator learned of it, by its clock.
    pub at: TimeMs,
    /// The revision in etcd that identifies it; 0 if it comes from no record.
    pub revision: u64,
    /// The content: what happened, and to what.
    pub what: EventFacts,
}

/// The content of an event.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct EventFacts {
    /// The kind of event.
    pub kind: EventKind,
    /// The shard to which it happened.
    pub shard: Option<ShardId>,
    /// The node to which it happened: of a change of primary the new one, of a planned copy the
    /// node that gets it.
    pub node: Option<StoreId>,
    /// The other node: the former primary, or the node whose place a planned copy takes.
    pub other: Option<StoreId>,
    /// The reason, if one is known.
    pub reason: Option<EventReason>,
    /// The epoch that began.
    pub epoch: Option<Epoch>,
    /// The number of shards that were placed, or of nodes that are away.
    pub count: Option<u64>,
    /// The operator, or the coordinator that was elected.
    pub by: Option<String>,
}

impl EventFacts {
    fn new(kind: EventKind) -> Self {
        Self {
            kind,
            shard: None,
            node: None,
            other: None,
            reason: None,
            epoch: None,
            count: None,
            by: None,
        }
    }

    fn of_node(kind: EventKind, node: StoreId, reason: Option<EventReason>) -> Self {
        Self { node: Some(node), reason, ..Self::new(kind) }
    }

    fn of_copy(
        kind: EventKind,
        shard: ShardId,
        node: StoreId,
        reason: Option<EventReason>,
    ) -> Self {
        Self { shard: Some(shard), ..Self::of_node(kind, node, reason) }
    }
}

impl ClusterEvent {
    /// The identity of the event, by which the same event of two coordinators is recognised. `None`
    /// if it comes from no record: then each coordinator that saw it has its own.
    pub fn identity(&self) -> Option<(u64, EventKind, Option<ShardId>, Option<StoreId>)> {
        (self.revision > 0).then_some((
            self.revision,
            self.what.kind,
            self.what.shard,
            self.what.node,
        ))
    }

    /// The memory that the event takes.
    fn bytes(&self) -> usize {
        size_of::<Self>() + self.what.by.as_ref().map_or(0, String::capacity)
    }
}

words! {
    /// The kind of an event.
    EventKind {
        /// A coordinator was elected leader.
        LeaderElected = "leader-elected",
        /// Shards were placed for the first time.
        ShardsPlaced = "shards-placed",
        /// A shard was split. Each half has the event.
        ShardSplit = "shard-split",
        /// A node's process registered.
        NodeCame = "node-came",
        /// The registration of a node's process is gone: it stopped, or its lease ended.
        NodeLeft = "node-left",
        /// A node has announced its stop.
        NodeStopping = "node-stopping",
        /// The leader found a node dead.
        NodeDead = "node-dead",
        /// A node that counted as dead answers again.
        NodeAlive = "node-alive",
        /// A node's shards are moved to other nodes.
        NodeDraining = "node-draining",
        /// The drain of a node was cancelled.
        NodeUndrained = "node-undrained",
        /// A node's disk lost or changed something: its copies are filled again.
        NodeSuspect = "node-suspect",
        /// A suspect node's copies are all new.
        NodeTrusted = "node-trusted",
        /// A node was given up.
        NodeLost = "node-lost",
        /// An operator asked for the removal of a node.
        RemovalRequested = "removal-requested",
        /// A node left the cluster for good.
        NodeRemoved = "node-removed",
        /// A shard has a new primary.
        PrimaryChanged = "primary",
        /// A shard has had no primary for a second.
        NoPrimary = "no-primary",
        /// A shard is led by a copy that may lack acknowledged increments.
        LossAccepted = "loss-accepted",
        /// The planner chose a node for a copy.
        CopyPlanned = "copy-planned",
        /// A copy is being filled.
        LearnerAdded = "learner-added",
        /// A copy has joined the in-sync set.
        InSync = "in-sync",
        /// A copy has left the in-sync set, and is still wanted.
        OutOfSync = "out-of-sync",
        /// A member of the in-sync set lost data and can't be spared.
        Tainted = "tainted",
        /// A copy is wanted no longer.
        CopyRemoved = "copy-removed",
        /// An operator paused the moves for balance.
        MovesPaused = "moves-paused",
        /// An operator resumed the moves for balance.
        MovesResumed = "moves-resumed",
        /// Many nodes vanished at once: no new copies are made.
        GuardHeld = "guard-held",
        /// New copies are made again.
        GuardEnded = "guard-ended",
    }
}

words! {
    /// The reason of an event.
    EventReason {
        /// The node started for the first time.
        New = "new",
        /// The node was started again.
        Restarted = "restarted",
        /// The same process registered again: its lease had ended.
        LeaseLost = "lease-lost",
        /// The node's address refuses connections.
        Refused = "refused",
        /// Another process answers at the node's address.
        Replaced = "replaced",
        /// The node does not answer.
        Silent = "silent",
        /// The node's disk does not answer.
        DiskStalled = "disk-stalled",
        /// The node is being stopped.
        Leaving = "leaving",
        /// The node is dead, or not registered; which, only the leader of that time knew.
        Dead = "dead",
        /// The node was given up or removed.
        Gone = "gone",
        /// The node drains.
        Draining = "draining",
        /// The node is suspect.
        Suspect = "suspect",
        /// The primary asked to be replaced.
        Resigned = "resigned",
        /// The shard was frozen, and another member reaches more of the cluster.
        CutOff = "cut-off",
        /// The primary stepped down for another member.
        HandOver = "hand-over",
        /// A loss was accepted.
        Loss = "loss-accepted",
        /// A copy is missing.
        Missing = "missing",
        /// The copy does not acknowledge what the primary sends.
        NotAcknowledging = "not-acknowledging",
        /// The copy was in the in-sync set before.
        Returned = "returned",
        /// A move for balance, or for more distant copies.
        Balance = "balance",
        /// Another copy has taken its place.
        Moved = "moved",
        /// The copy was not in sync, and is not needed.
        NotNeeded = "not-needed",
        /// A tainted copy was filled again.
        Refilled = "filled-again",
        /// Another node has the name.
        NameTaken = "name-taken",
        /// An operator wanted it.
        Operator = "operator",
    }
}
