//! The numbers and names that the other modules use, each with a type of its own, so that two of
//! them can't be swapped. A bare `u64` is never passed where that could happen.

use std::fmt;

/// Microseconds since the driver started. Monotonic; the engine never looks at a clock itself.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Now(pub u64);

impl Now {
    /// The moment `ms` milliseconds later.
    pub fn plus_ms(self, ms: u64) -> Self {
        Self(self.0.saturating_add(ms.saturating_mul(1_000)))
    }

    /// Whole milliseconds that have passed since `earlier` (0 if it is not earlier).
    pub fn ms_since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0) / 1_000
    }
}

/// Milliseconds since 1970: a wall clock's reading, or a shard's own log time.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct TimeMs(pub u64);

/// The identity of one node's disk: a random uuid made when its data folder is made.
#[derive(Clone, Copy, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct StoreId(pub u128);

impl fmt::Display for StoreId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl fmt::Debug for StoreId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "store-{:x}", self.0)
    }
}

/// The number of times that a store has been started. Raised and fsynced at each start, so a
/// restarted process is never taken for the one before it.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Boot(pub u64);

/// One boot of one store, which identifies a process everywhere. (A node's name is for people
/// only.)
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct StoreBoot {
    /// The store.
    pub store: StoreId,
    /// The number of this start of the store.
    pub boot: Boot,
}

/// The number of a shard's current primary, like a term in Raft. Rises only when a primary is
/// assigned; fences the old one.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Epoch(pub u64);

/// The version of a shard's record: rises by one with every change.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Version(pub u64);

/// A position in a shard's log. The first entry has 1; 0 is "before the first".
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Seq(pub u64);

impl Seq {
    /// The seq after this one.
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }

    /// The seq before this one; 0 stays 0.
    pub fn prev(self) -> Self {
        Self(self.0.saturating_sub(1))
    }
}

/// A running hash over a log: equal chains at one seq mean equal logs up to it.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Chain(pub u64);

/// The number of a store's copy of one shard. Raised when a copy is created or replaced, and kept
/// when one is dropped, so an acknowledgement is never counted for a copy that is gone.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct CopyNo(pub u64);

/// A position in etcd's history. `incarnation` rises when etcd was restored from a backup, so pairs
/// compare correctly although plain revisions went back.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Revision {
    /// The number of times etcd was restored from a backup, starting at 1.
    pub incarnation: u32,
    /// Etcd's revision.
    pub revision: u64,
}

/// The identity of one gateway worker: the revision at which its `gateway/` key was created. Never
/// reused.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct SessionId(pub Revision);

/// The number of a batch within (session, shard): 1, 2, 3 …
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct BatchSeq(pub u64);

impl BatchSeq {
    /// The number after this one.
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

/// The top 16 bits of a counter's hash.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Slot(pub u16);

/// A contiguous range of slots, both ends included: what a shard covers.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Slots {
    /// The first slot.
    pub lo: u16,
    /// The last slot.
    pub hi: u16,
}

impl Slots {
    /// Every slot there is.
    pub const ALL: Self = Self { lo: 0, hi: u16::MAX };

    /// Returns whether the range contains the slot.
    pub fn contains(self, slot: Slot) -> bool {
        self.lo <= slot.0 && slot.0 <= self.hi
    }

    /// The shard that covers this range.
    pub fn shard(self) -> ShardId {
        ShardId(self.lo)
    }
}

/// A shard, named by its first slot (as its key in etcd is).
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct ShardId(pub u16);

impl fmt::Display for ShardId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// The number that the driver gives to one connection: never reused within a process. What arrives
/// on one connection arrives in order, at most once, and nothing arrives after it is closed.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Conn(pub u64);
