//! What the coordinator did and why, for people: the driver logs each as it comes.

use std::fmt;

use crate::ids::{Epoch, Seq, ShardId, StoreBoot, StoreId};
use crate::records::LossRecord;

/// One sentence of the story.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Story {
    /// This process leads from here on, and has read everything.
    TookOffice {
        term: u64,
        stores: usize,
        shards: usize,
    },
    /// Nothing is placed yet.
    Waits(Waits),
    Placed {
        shards: usize,
    },
    Died {
        process: StoreBoot,
        why: Cause,
    },
    Returned {
        process: StoreBoot,
    },
    /// A shard has a new primary. `took_ms`: since its need was seen.
    Promoted {
        shard: ShardId,
        epoch: Epoch,
        from: StoreBoot,
        to: StoreBoot,
        why: Need,
        last: (Epoch, Seq),
        took_ms: u64,
    },
    /// A shard is led with a loss, by the copy that an operator named, or by the one with the longest
    /// log where all are damaged. What the other copies hold is given up.
    LossAccepted(Box<LossRecord>),
    /// Nobody can be promoted for now.
    Leaderless {
        shard: ShardId,
        why: &'static str,
    },
    /// Dead members left in-sync sets.
    Removed {
        store: StoreId,
        shards: usize,
    },
    Recruited {
        shard: ShardId,
        store: StoreId,
        instead: Option<StoreId>,
    },
    Released {
        shard: ShardId,
        store: StoreId,
    },
    /// Another store registered under its name.
    Lost {
        store: StoreId,
        to: StoreId,
    },
    /// An operator wants it emptied.
    Draining {
        store: StoreId,
    },
    /// The operator wants it no more.
    Undrained {
        store: StoreId,
    },
    /// None of its former copies is left: it counts as new.
    Cleared {
        store: StoreId,
    },
    /// Many nodes vanished at once: no new copies are made for now.
    Guarded {
        away: usize,
        of: usize,
    },
    Unguarded,
}

/// What the first placing waits for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Waits {
    pub nodes: usize,
    pub of: usize,
}

impl fmt::Display for Waits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {} nodes", self.nodes, self.of)
    }
}

/// What a probe found.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Cause {
    /// Nothing listens at its address.
    Refused,
    /// Another process answers there.
    Replaced,
    /// No answer in time.
    Silent,
    /// It answers, but its disk has not for too long.
    DiskStalled,
    /// It says that it is about to end.
    Leaving,
}

impl Cause {
    pub const ALL: [Self; 5] =
        [Self::Refused, Self::Replaced, Self::Silent, Self::DiskStalled, Self::Leaving];
}

/// Why a shard needs another primary.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Need {
    Dead(Cause),
    /// A newer process of the same store runs: a process leads only the epochs that name it.
    Restarted,
    /// Lost or retired, by its status.
    Gone,
    /// It asked to be replaced: it hears neither peers nor etcd.
    Resigned,
    /// Frozen, while another member hears more of the cluster.
    CutOff,
    /// It has stepped down for another.
    HandedOver,
}
