//! Conversion of ids, slot ranges, positions and digests.

use engine::entry::Position;
use engine::ids::{
    Boot, Chain, Epoch, Revision, Seq, SessionId, ShardId, Slots, StoreBoot, StoreId, TimeMs,
};
use engine::message::DigestPoint;

use crate::Invalid;
use crate::wire;

/// Converts a shard's name: 16 bits in a 32-bit field.
pub fn shard_of(shard: u32) -> Result<ShardId, Invalid> {
    u16::try_from(shard).map(ShardId).map_err(|_| Invalid::Range("shard"))
}

/// Converts shards' names.
pub(crate) fn shards_of(shards: Vec<u32>) -> Result<Vec<ShardId>, Invalid> {
    shards.into_iter().map(shard_of).collect()
}

/// Converts a required slot range.
pub fn slots_of(slots: Option<wire::Slots>) -> Result<Slots, Invalid> {
    slots.ok_or(Invalid::Missing("slots"))?.try_into()
}

pub(crate) fn store_of(id: wire::StoreId) -> StoreId {
    StoreId(joined(id.high, id.low))
}

/// Converts a required store and boot.
pub(crate) fn boot_of(
    field: &'static str,
    boot: Option<wire::StoreBoot>,
) -> Result<StoreBoot, Invalid> {
    boot.map(StoreBoot::from).ok_or(Invalid::Missing(field))
}

/// Converts a required position.
pub(crate) fn position_of(
    field: &'static str,
    position: Option<wire::Position>,
) -> Result<Position, Invalid> {
    position.map(Position::from).ok_or(Invalid::Missing(field))
}

fn joined(high: u64, low: u64) -> u128 {
    u128::from(high) << 64 | u128::from(low)
}

impl From<StoreBoot> for wire::StoreBoot {
    fn from(from: StoreBoot) -> Self {
        Self {
            store_high: (from.store.0 >> 64) as u64,
            store_low: from.store.0 as u64,
            boot: from.boot.0,
        }
    }
}

impl From<wire::StoreBoot> for StoreBoot {
    fn from(from: wire::StoreBoot) -> Self {
        Self { store: StoreId(joined(from.store_high, from.store_low)), boot: Boot(from.boot) }
    }
}

impl From<StoreId> for wire::StoreId {
    fn from(from: StoreId) -> Self {
        Self { high: (from.0 >> 64) as u64, low: from.0 as u64 }
    }
}

impl From<Slots> for wire::Slots {
    fn from(from: Slots) -> Self {
        Self { lo: u32::from(from.lo), hi: u32::from(from.hi) }
    }
}

impl TryFrom<wire::Slots> for Slots {
    type Error = Invalid;

    fn try_from(from: wire::Slots) -> Result<Self, Invalid> {
        let narrow = |end: u32| u16::try_from(end).map_err(|_| Invalid::Range("slots"));
        let slots = Self { lo: narrow(from.lo)?, hi: narrow(from.hi)? };
        if slots.lo > slots.hi {
            return Err(Invalid::Range("slots"));
        }
        Ok(slots)
    }
}

impl From<SessionId> for wire::SessionId {
    fn from(from: SessionId) -> Self {
        Self { incarnation: from.0.incarnation, revision: from.0.revision }
    }
}

impl From<wire::SessionId> for SessionId {
    fn from(from: wire::SessionId) -> Self {
        Self(Revision { incarnation: from.incarnation, revision: from.revision })
    }
}

impl From<Position> for wire::Position {
    fn from(from: Position) -> Self {
        Self { epoch: from.epoch.0, seq: from.seq.0, chain: from.chain.0, time_ms: from.time.0 }
    }
}

impl From<wire::Position> for Position {
    fn from(from: wire::Position) -> Self {
        Self {
            epoch: Epoch(from.epoch),
            seq: Seq(from.seq),
            chain: Chain(from.chain),
            time: TimeMs(from.time_ms),
        }
    }
}

impl From<(ShardId, Epoch)> for wire::ShardEpoch {
    fn from((shard, epoch): (ShardId, Epoch)) -> Self {
        Self { shard: u32::from(shard.0), epoch: epoch.0 }
    }
}

impl TryFrom<wire::ShardEpoch> for (ShardId, Epoch) {
    type Error = Invalid;

    fn try_from(from: wire::ShardEpoch) -> Result<Self, Invalid> {
        Ok((shard_of(from.shard)?, Epoch(from.epoch)))
    }
}

impl From<DigestPoint> for wire::DigestPoint {
    fn from(from: DigestPoint) -> Self {
        Self {
            shard: u32::from(from.shard.0),
            seq: from.seq.0,
            counters_high: (from.counters >> 64) as u64,
            counters_low: from.counters as u64,
            sessions_high: (from.sessions >> 64) as u64,
            sessions_low: from.sessions as u64,
            tokens_high: (from.tokens >> 64) as u64,
            tokens_low: from.tokens as u64,
        }
    }
}

impl TryFrom<wire::DigestPoint> for DigestPoint {
    type Error = Invalid;

    fn try_from(from: wire::DigestPoint) -> Result<Self, Invalid> {
        Ok(Self {
            shard: shard_of(from.shard)?,
            seq: Seq(from.seq),
            counters: joined(from.counters_high, from.counters_low),
            sessions: joined(from.sessions_high, from.sessions_low),
            tokens: joined(from.tokens_high, from.tokens_low),
        })
    }
}

/// Converts each received element, up to the first that is invalid.
pub(crate) fn all<T, U: TryFrom<T, Error = Invalid>>(list: Vec<T>) -> Result<Vec<U>, Invalid> {
    list.into_iter().map(U::try_from).collect()
}

/// Converts each element to send.
pub(crate) fn each<T, U: From<T>>(list: Vec<T>) -> Vec<U> {
    list.into_iter().map(U::from).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(lo: u32, hi: u32, want: Result<Slots, Invalid>) {
        assert_eq!(slots_of(Some(wire::Slots { lo, hi })), want);
    }

    #[test]
    fn a_slot_range_is_checked() {
        check(0, 65_535, Ok(Slots::ALL));
        check(7, 7, Ok(Slots { lo: 7, hi: 7 }));
        check(8, 7, Err(Invalid::Range("slots")));
        check(0, 65_536, Err(Invalid::Range("slots")));
        check(u32::MAX, u32::MAX, Err(Invalid::Range("slots")));
        assert_eq!(slots_of(None), Err(Invalid::Missing("slots")));
    }

    #[test]
    fn a_shard_is_sixteen_bits() {
        assert_eq!(shard_of(65_535), Ok(ShardId(65_535)));
        assert_eq!(shard_of(65_536), Err(Invalid::Range("shard")));
    }

    #[test]
    fn both_halves_of_a_store_id_cross() {
        let id = StoreId(0x0123_4567_89ab_cdef_0011_2233_4455_6677);
        assert_eq!(store_of(id.into()), id);
        let boot = StoreBoot { store: id, boot: Boot(3) };
        assert_eq!(StoreBoot::from(wire::StoreBoot::from(boot)), boot);
    }
}
