//! Parts of reads that wait to be sent, by the node that is to be asked.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::RangeInclusive;

use crate::batcher::window::SendWindow;
use crate::ids::{Conn, Now, ShardId, Slots, StoreId};
use crate::key::CounterKey;

/// The node that is asked for a shard's values: its primary, or a follower.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(super) struct ReadTarget {
    pub shard: ShardId,
    /// `None` is the primary.
    pub follower: Option<StoreId>,
}

impl ReadTarget {
    pub(super) fn primary(shard: ShardId) -> Self {
        Self { shard, follower: None }
    }

    /// The range of all nodes that may be asked for a shard.
    pub(super) fn all(shard: ShardId) -> RangeInclusive<Self> {
        Self::primary(shard)..=Self { shard, follower: Some(StoreId(u128::MAX)) }
    }
}

/// The age that a part accepts, and the followers that could not satisfy it.
#[derive(Clone, Debug)]
pub(super) struct StalenessBound {
    pub max_staleness_ms: u64,
    pub tried: Vec<StoreId>,
}

/// The keys of one request in one shard.
#[derive(Clone, Debug, Default)]
pub(super) struct ReadPart {
    pub indexes: Vec<u32>,
    pub keys: Vec<CounterKey>,
    /// The age that the client accepts; `None` for a linearizable read.
    pub bound: Option<StalenessBound>,
}

/// The parts that one node is to be asked for, of one shard.
#[derive(Clone, Debug, Default)]
pub(super) struct ReadQueue {
    /// The parts that wait, by request.
    pub waiting: BTreeMap<u64, ReadPart>,
    /// The slots of the shard, and whether it was ever split.
    pub slots: Option<Slots>,
    pub was_split: bool,
    pub retry_at: Now,
    pub refusals: u32,
    /// Other followers are asked before this one until then, since it could not answer.
    pub avoided_until: Now,
}

/// The connection and the kind of a round: bounded-stale reads, which need no proof of the node, do
/// not wait for linearizable ones.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(super) struct RoundKind {
    pub conn: Conn,
    pub of_follower: bool,
}

impl RoundKind {
    pub(super) fn of(conn: Conn, target: ReadTarget) -> Self {
        Self { conn, of_follower: target.follower.is_some() }
    }
}

/// The rounds of reads of one kind. A round is a message for each shard that has parts then,
/// so that one proof of the node covers them all.
#[derive(Clone, Debug, Default)]
pub(super) struct ReadRounds {
    pub window: SendWindow,
    /// The shards that have parts for the next round.
    pub due: BTreeSet<ReadTarget>,
    /// The time at which the window lets the next round go without an answer.
    pub opens_at: Option<Now>,
}

impl ReadQueue {
    /// Takes the parts of one message, closed at this many bytes of names, and the age that all of
    /// them accept.
    pub(super) fn take(&mut self, bytes_max: usize) -> (Vec<(u64, ReadPart)>, Option<u64>) {
        let max_staleness_ms =
            |part: &ReadPart| part.bound.as_ref().map(|bound| bound.max_staleness_ms);
        let bound = self.waiting.first_key_value().and_then(|(_, part)| max_staleness_ms(part));
        let mut bytes = 0;
        let fits = |_: &u64, part: &mut ReadPart| {
            let fits = bytes < bytes_max && max_staleness_ms(part) == bound;
            if fits {
                bytes += part.keys.iter().map(|key| key.name().len()).sum::<usize>();
            }
            fits
        };
        (self.waiting.extract_if(.., fits).collect(), bound)
    }
}
