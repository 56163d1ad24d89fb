//! What stands in etcd about a shard: who leads it, who is in sync.
//!
//! Only the coordinator sets `primary`, `epoch`, `learners` and `target`; only the current primary
//! adds to `isr`; both may remove from it, never below `min_in_sync`. Every write compares the
//! key's `mod_revision` and sets version + 1 (DESIGN §5).

use crate::codec::{Malformed, Reader};
use crate::ids::{Boot, Epoch, ShardId, Slots, StoreBoot, StoreId, Version};

const FORMAT: u8 = 1;

#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct ShardConfig {
    pub slots: Slots,
    pub epoch: Epoch,
    pub version: Version,
    pub primary: StoreBoot,
    /// Stores whose fsync every commit waits for. Sorted.
    pub isr: Vec<StoreId>,
    /// Stores that are being filled. Sorted.
    pub learners: Vec<StoreId>,
    /// Where the planner wants the replicas. Sorted.
    pub target: Vec<StoreId>,
    /// Members of `isr` that were found short of acknowledged data: not promotable. Sorted.
    pub tainted: Vec<StoreId>,
}

impl ShardConfig {
    pub fn shard(&self) -> ShardId {
        self.slots.shard()
    }

    pub fn encode(&self) -> Vec<u8> {
        let mut out = vec![FORMAT];
        out.extend_from_slice(&self.slots.lo.to_be_bytes());
        out.extend_from_slice(&self.slots.hi.to_be_bytes());
        out.extend_from_slice(&self.epoch.0.to_le_bytes());
        out.extend_from_slice(&self.version.0.to_le_bytes());
        out.extend_from_slice(&self.primary.store.0.to_le_bytes());
        out.extend_from_slice(&self.primary.boot.0.to_le_bytes());
        for stores in [&self.isr, &self.learners, &self.target, &self.tainted] {
            crate::codec::put_varint(&mut out, stores.len() as u64);
            for store in stores {
                out.extend_from_slice(&store.0.to_le_bytes());
            }
        }
        out
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut from = Reader::new(bytes::Bytes::copy_from_slice(bytes));
        if from.u8("shard record format")? != FORMAT {
            return Err(Malformed("shard record format: a newer build wrote it"));
        }
        let slots = Slots { lo: from.u16_be("slots")?, hi: from.u16_be("slots")? };
        let epoch = Epoch(from.u64_le("epoch")?);
        let version = Version(from.u64_le("version")?);
        let primary = StoreBoot {
            store: StoreId(from.u128_le("primary")?),
            boot: Boot(from.u64_le("primary boot")?),
        };
        let config = Self {
            slots,
            epoch,
            version,
            primary,
            isr: stores(&mut from)?,
            learners: stores(&mut from)?,
            target: stores(&mut from)?,
            tainted: stores(&mut from)?,
        };
        from.finish("shard record")?;
        Ok(config)
    }
}

fn stores(from: &mut Reader) -> Result<Vec<StoreId>, Malformed> {
    let count = from.count("stores")?;
    (0..count).map(|_| Ok(StoreId(from.u128_le("store")?))).collect()
}

/// Inserts into a sorted list, once.
pub fn insert(list: &mut Vec<StoreId>, store: StoreId) {
    if let Err(at) = list.binary_search(&store) {
        list.insert(at, store);
    }
}

/// Removes from a list.
pub fn remove(list: &mut Vec<StoreId>, store: StoreId) {
    list.retain(|&other| other != store);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> ShardConfig {
        ShardConfig {
            slots: Slots { lo: 0, hi: 2729 },
            epoch: Epoch(3),
            version: Version(9),
            primary: StoreBoot { store: StoreId(1), boot: Boot(2) },
            isr: vec![StoreId(1), StoreId(2)],
            learners: vec![StoreId(3)],
            target: vec![],
            tainted: vec![StoreId(2)],
        }
    }

    #[test]
    fn round_trips() {
        assert_eq!(ShardConfig::decode(&config().encode()), Ok(config()));
    }

    #[test]
    fn a_cut_record_is_refused() {
        let bytes = config().encode();
        for len in 0..bytes.len() {
            assert!(ShardConfig::decode(&bytes[..len]).is_err(), "{len} bytes");
        }
    }
}
