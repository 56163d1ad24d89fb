//! Decide at apply: the pure function every replica runs over the committed log (DESIGN §6.5).

use crate::entry::Position;
use crate::ids::Slots;
use crate::sessions::Sessions;

/// Everything a shard's log has built, but for the counters themselves (those are in the table and
/// in `state`). Written to disk whole with every flush.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct ShardState {
    pub slots: Slots,
    /// The last entry applied.
    pub applied: Position,
    /// Σ H(key) · value mod 2^128 over all counters, H odd.
    pub counter_digest: u128,
    pub sessions: Sessions,
}
