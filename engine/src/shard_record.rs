//! The record of a shard in etcd: its primary and its in-sync set.
//!
//! `primary`, `epoch`, `learners` and `target` are set by the coordinator alone; only the current
//! primary adds to `isr`; both may remove from it, never below `min_in_sync`:
//! [`ShardRecord::changed`] makes every next record and keeps that floor. Every write compares the
//! key's `mod_revision` and sets version + 1.

use std::collections::{BTreeMap, BTreeSet};

use crate::codec::{Malformed, Reader};
use crate::ids::{Boot, Epoch, ShardId, Slots, StoreBoot, StoreId, Version};

const FORMAT: u8 = 1;

/// `shard/{slot}`: one per shard.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct ShardRecord {
    /// The shard's slots.
    pub slots: Slots,
    /// The number of the present primary.
    pub epoch: Epoch,
    /// Rises by one with every change of the record.
    pub version: Version,
    /// The process that leads the shard.
    pub primary: StoreBoot,
    /// The in-sync set: stores whose fsync every commit waits for. Sorted.
    pub isr: Vec<StoreId>,
    /// Stores that are being filled. Sorted.
    pub learners: Vec<StoreId>,
    /// The stores on which the planner wants the replicas. Sorted.
    pub target: Vec<StoreId>,
    /// Members of `isr` that were found to lack acknowledged data: not promotable. Sorted.
    pub tainted: Vec<StoreId>,
}

impl ShardRecord {
    /// The shard that the record is about.
    pub fn shard(&self) -> ShardId {
        self.slots.shard()
    }

    /// Returns whether the store has a copy of the shard, in sync or not, or a place in its target.
    pub fn mentions(&self, store: StoreId) -> bool {
        [&self.isr, &self.learners, &self.target].iter().any(|all| all.contains(&store))
    }

    /// The place of the record among all records of its shard.
    pub fn order(&self) -> (Epoch, Version) {
        (self.epoch, self.version)
    }

    /// The stores that have a copy of the shard, or a place in its target; each once, in order.
    pub fn mentioned(&self) -> BTreeSet<StoreId> {
        [&self.isr, &self.learners, &self.target].into_iter().flatten().copied().collect()
    }

    /// The number of members that may leave the in-sync set: a set below `min_in_sync` commits
    /// nothing, and the primary stays in any case.
    pub fn room(&self, min_in_sync: usize) -> usize {
        self.isr.len().saturating_sub(min_in_sync.max(1))
    }

    /// The next version of the record: with `add` in sync and trusted; then without as many of
    /// `remove`, the first ones first, as `min_in_sync` permits; and with those of `taint` that
    /// stay marked as not promotable.
    ///
    /// The room is counted in the set itself: a tainted member that is trusted again is in it
    /// already and does not make it larger. The primary never leaves.
    pub fn changed(
        &self,
        add: &[StoreId],
        remove: &[StoreId],
        taint: &[StoreId],
        min_in_sync: usize,
    ) -> Self {
        let mut next = self.clone();
        next.version = Version(next.version.0 + 1);
        for &store in add {
            insert(&mut next.isr, store);
            self::remove(&mut next.learners, store);
            self::remove(&mut next.tainted, store);
        }
        for &store in remove {
            if store != next.primary.store && next.room(min_in_sync) > 0 {
                self::remove(&mut next.isr, store);
                self::remove(&mut next.tainted, store);
            }
        }
        for &store in taint.iter().filter(|store| next.isr.contains(store)) {
            insert(&mut next.tainted, store);
        }
        next
    }

    /// Encodes the record.
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

    /// Decodes the record. The error names the field that can't be read, or the format of a newer
    /// build.
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
        let record = Self {
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
        Ok(record)
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

/// The peers of each store that a record mentions: the other stores that have copies of the same
/// shards.
pub fn peers<'a>(
    records: impl IntoIterator<Item = &'a ShardRecord>,
) -> BTreeMap<StoreId, BTreeSet<StoreId>> {
    let mut peers: BTreeMap<StoreId, BTreeSet<StoreId>> = BTreeMap::new();
    for record in records {
        for one in record.mentioned() {
            let holders = record.isr.iter().chain(&record.learners);
            peers.entry(one).or_default().extend(holders.filter(|&&other| other != one));
        }
    }
    peers
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> ShardRecord {
        ShardRecord {
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
    fn a_change_adds_trusts_and_removes_down_to_the_floor() {
        let [a, b, c, d] = [1, 2, 3, 4].map(StoreId);
        let record = ShardRecord { isr: vec![a, b, d], ..record() };
        let next = record.changed(&[c], &[b, d, a], &[d], 2);
        assert_eq!((next.isr, next.learners, next.tainted), (vec![a, c], vec![], vec![]));
        assert_eq!(next.version, Version(10));
        let next = record.changed(&[b], &[d], &[d], 3);
        assert_eq!((next.isr, next.tainted), (vec![a, b, d], vec![d]));
        // A change of nothing but the version settles a proposal without an answer.
        assert_eq!(
            record.changed(&[], &[], &[], 2),
            ShardRecord { version: Version(10), ..record }
        );
    }

    /// Covers every set of up to five stores with every subset tainted, any of the others and of
    /// the tainted added, any of the rest removed, at every floor.
    #[test]
    fn no_change_goes_below_the_floor_and_all_that_it_can_spare_leave() {
        let stores = |bits: u32| -> Vec<StoreId> {
            (0..5).filter(|at| bits & 1 << at != 0).map(|at| StoreId(at + 1)).collect()
        };
        let subsets = |of: u32| (0..32).filter(move |bits| bits & !of == 0);
        let sets = (1..32).step_by(2).flat_map(|isr| subsets(isr & !1).map(move |it| (isr, it)));
        let changes = sets.flat_map(|(isr, tainted)| {
            let adds = subsets(!isr & 31 | tainted);
            adds.flat_map(move |add| subsets(isr & !add).map(move |it| (isr, tainted, add, it)))
        });
        for (isr, tainted, add, remove) in changes {
            let (isr, tainted) = (stores(isr), stores(tainted));
            let record = ShardRecord { isr, tainted, learners: vec![], ..record() };
            let (add, remove) = (stores(add), stores(remove));
            for floor in 1..=5 {
                let next = record.changed(&add, &remove, &remove, floor);
                let least = floor.min(record.isr.len());
                assert!(next.isr.len() >= least, "{record:?} +{add:?} -{remove:?} at {floor}");
                assert!(next.isr.contains(&record.primary.store));
                assert!(next.tainted.iter().all(|store| next.isr.contains(store)));
                let mut stay = remove.iter().filter(|&&store| store != record.primary.store);
                assert!(next.room(floor) == 0 || !stay.any(|store| next.isr.contains(store)));
            }
        }
    }

    #[test]
    fn round_trips() {
        assert_eq!(ShardRecord::decode(&record().encode()), Ok(record()));
    }

    #[test]
    fn a_cut_record_is_refused() {
        let bytes = record().encode();
        for len in 0..bytes.len() {
            assert!(ShardRecord::decode(&bytes[..len]).is_err(), "{len} bytes");
        }
    }
}
