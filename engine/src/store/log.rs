//! The log: framing of groups, segments, and what recovery makes of them.

use crate::entry::{Entry, Position};
use crate::ids::{Boot, CopyNo, Epoch, Seq, ShardId, Slots, StoreId};

/// One thing a group makes durable. Written in the order in which the node machine emits them.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Record {
    Append {
        shard: ShardId,
        entry: Entry,
    },
    /// Entries above `after` are void. Always in the same group as what replaces them.
    Truncate {
        shard: ShardId,
        after: Seq,
    },
    /// The shard obeys no epoch below this one, for as long as the store lives.
    Promise {
        shard: ShardId,
        epoch: Epoch,
    },
    /// A copy begins at `base`; entries of former copies are void.
    Copy {
        shard: ShardId,
        slots: Slots,
        copy: CopyNo,
        base: Position,
    },
    /// The copy is gone; its number and the promise stay.
    Drop {
        shard: ShardId,
        copy: CopyNo,
    },
    /// Who this store is: written at its first start and at each boot.
    Identity(Identity),
}

/// A store's identity, as its own disk knows it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Identity {
    pub cluster: u128,
    pub store: StoreId,
    pub boot: Boot,
    pub nonce: u128,
    /// The nonce before it: the CAS in etcd may not have happened yet.
    pub previous_nonce: u128,
    /// The kernel's boot id: tells a restarted process from a restarted machine.
    pub kernel_boot: u128,
}
