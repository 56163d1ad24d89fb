//! The coordinator's decisions and their reasons, for people: the driver logs each as it is made.

use std::fmt;

use crate::ids::{Epoch, Seq, ShardId, StoreBoot, StoreId};
use crate::records::LossRecord;

/// One decision, or one observation that decisions are based on.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Decision {
    /// This process became leader, and has loaded all records.
    BecameLeader {
        /// The term of this leader.
        term: u64,
        /// The number of stores in etcd.
        stores: usize,
        /// The number of shards in etcd.
        shards: usize,
    },
    /// Shards are not placed yet.
    PlacementWaits(PlacementWait),
    /// Shards were placed for the first time.
    Placed {
        /// The number of those shards.
        shards: usize,
    },
    /// A process counts as dead.
    Died {
        /// The process.
        process: StoreBoot,
        /// The finding of the last probe.
        why: Cause,
    },
    /// A process that counted as dead answers again, or this newer one of its store does.
    Returned(StoreBoot),
    /// A shard has a new primary.
    Promoted {
        /// The shard.
        shard: ShardId,
        /// The epoch that begins.
        epoch: Epoch,
        /// The primary of the epoch before.
        from: StoreBoot,
        /// The new primary.
        to: StoreBoot,
        /// The reason for the promotion.
        why: PromotionReason,
        /// The last entry in the new primary's log.
        last: (Epoch, Seq),
        /// The time since the need was detected.
        took_ms: u64,
    },
    /// A shard is led with a loss, by the copy that an operator named, or by the one with the
    /// longest log where all are damaged. Entries that only other copies hold are given up.
    LossAccepted(Box<LossRecord>),
    /// No member of a shard can be promoted for now.
    Leaderless {
        /// The shard.
        shard: ShardId,
        /// The reason.
        why: &'static str,
    },
    /// Dead members left in-sync sets.
    Removed {
        /// One of the stores that left.
        store: StoreId,
        /// The number of in-sync sets that it left.
        shards: usize,
    },
    /// A store gets a copy of a shard, as a learner.
    Recruited {
        /// The shard.
        shard: ShardId,
        /// The store.
        store: StoreId,
        /// The store whose place in the target it takes.
        instead: Option<StoreId>,
    },
    /// A store gives up its copy of a shard.
    Released {
        /// The shard.
        shard: ShardId,
        /// The store.
        store: StoreId,
    },
    /// A store is given up: another one registered under its name.
    Lost {
        /// The store that is given up.
        store: StoreId,
        /// The store that has its name now.
        to: StoreId,
    },
    /// An operator has taken the store out of the cluster.
    Retired {
        /// The store.
        store: StoreId,
    },
    /// An operator wants the store emptied.
    Draining(StoreId),
    /// The operator has withdrawn the drain of the store.
    Undrained(StoreId),
    /// A suspect store is trusted again: none of its former copies is left.
    Cleared(StoreId),
    /// An operator has paused, or resumed, the moves for balance alone.
    Paused(bool),
    /// Many nodes vanished at once: no new copies are made for now.
    Guarded {
        /// The number of nodes that are away.
        away: usize,
        /// The number of nodes that hold shards.
        of: usize,
    },
    /// The hold on new copies has ended.
    Unguarded,
}

/// The nodes that the first placement waits for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct PlacementWait {
    /// The number of nodes that are ready.
    pub nodes: usize,
    /// The number of nodes that are needed.
    pub of: usize,
}

impl fmt::Display for PlacementWait {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {} nodes", self.nodes, self.of)
    }
}

/// The finding of a probe that failed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Cause {
    /// Nothing listens at the address.
    Refused,
    /// Another process answers at the address.
    Replaced,
    /// There was no answer in time.
    Silent,
    /// The process answers, but its disk has not completed an fsync for too long.
    DiskStalled,
    /// The process has announced its shutdown.
    Leaving,
}

impl Cause {
    /// All causes, for metrics.
    pub const ALL: [Self; 5] =
        [Self::Refused, Self::Replaced, Self::Silent, Self::DiskStalled, Self::Leaving];
}

/// The reason for which a shard needs another primary.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum PromotionReason {
    /// The primary is dead.
    Dead(Cause),
    /// A newer process of the same store runs: a process leads only the epochs that name it.
    Restarted,
    /// The primary's store is lost or retired, by its status.
    Gone,
    /// The primary asked to be replaced: it reaches neither peers nor etcd.
    Resigned,
    /// The shard is frozen, while another member reaches more of the cluster.
    CutOff,
    /// The primary has stepped down for another member.
    HandedOver,
}
