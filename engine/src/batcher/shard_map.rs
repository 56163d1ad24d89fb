//! The shard of each slot and its primary: a gateway's view of etcd's `shard/` keys.
//!
//! The map is fed by the watch and by the hints in refusals, in any order: the newest version of a
//! key wins. Shards are only ever split, so where two keys claim one slot the narrower range is the
//! newer one.
//!
//! Invariant: the ranges are sorted and do not overlap.

use crate::ids::{ShardId, Slot, Slots, StoreBoot, Version};
use crate::shard_record::ShardRecord;

/// The ranges that `count` shards are made with: shard i covers ⌊i·65536/count⌋ up to the next.
pub fn ranges(count: u32) -> impl Iterator<Item = Slots> {
    let edge = move |index: u32| (u64::from(index) * 65_536 / u64::from(count)) as u32;
    (0..count).map(move |index| {
        let (lo, next) = (edge(index), edge(index + 1));
        Slots { lo: lo as u16, hi: (next - 1) as u16 }
    })
}

/// The newest record known of each shard.
#[derive(Clone, Debug, Default)]
pub struct ShardMap {
    shards: Vec<ShardRecord>,
    /// The last slot of each shard, for a search that touches few cache lines.
    ends: Vec<u16>,
}

impl ShardMap {
    /// Takes a record. Returns whether it was newer than what was known.
    pub fn learn(&mut self, record: ShardRecord) -> bool {
        let slots = record.slots;
        if slots.lo > slots.hi {
            return false;
        }
        // Ranges that overlap are neighbours, since the ranges are sorted.
        let first = self.ends.partition_point(|&end| end < slots.lo);
        let end = self.shards.partition_point(|known| known.slots.lo <= slots.hi);
        let width = |slots: Slots| slots.hi - slots.lo;
        let is_newer = |known: &ShardRecord| {
            if known.slots.lo == slots.lo {
                known.version < record.version
            } else {
                width(known.slots) > width(slots)
            }
        };
        let overlapping = first..end.max(first);
        if !self.shards[overlapping.clone()].iter().all(is_newer) {
            return false;
        }
        // After a split one of the two records comes first. Until the other one is here, the rest
        // of the parent is taken for a shard that its primary leads.
        let known = &self.shards[overlapping.clone()];
        let left = known.first().filter(|known| known.slots.lo < slots.lo).map(|known| {
            let slots = Slots { hi: slots.lo - 1, ..known.slots };
            ShardRecord { slots, ..known.clone() }
        });
        let right = known.last().filter(|known| known.slots.hi > slots.hi).map(|known| {
            let slots = Slots { lo: slots.hi + 1, ..known.slots };
            ShardRecord { slots, version: Version(0), ..known.clone() }
        });
        let records: Vec<_> = left.into_iter().chain([record]).chain(right).collect();
        self.ends.splice(overlapping.clone(), records.iter().map(|record| record.slots.hi));
        self.shards.splice(overlapping, records);
        true
    }

    /// The shard of a slot, if it is known.
    pub fn of_slot(&self, slot: Slot) -> Option<&ShardRecord> {
        Some(&self.shards[self.index_of(slot)?])
    }

    /// The index of that shard in [`ShardMap::iter`], as the map is now.
    pub fn index_of(&self, slot: Slot) -> Option<usize> {
        let index = self.ends.partition_point(|&end| end < slot.0);
        self.shards.get(index).filter(|known| known.slots.contains(slot)).map(|_| index)
    }

    /// The shard at an index that [`ShardMap::index_of`] returned.
    pub fn at(&self, index: usize) -> &ShardRecord {
        &self.shards[index]
    }

    /// The shard with this name, if it is known.
    pub fn get(&self, shard: ShardId) -> Option<&ShardRecord> {
        self.of_slot(Slot(shard.0)).filter(|known| known.shard() == shard)
    }

    /// Returns whether every slot belongs to a known shard.
    pub fn is_complete(&self) -> bool {
        let covered: u32 = self.iter().map(|s| u32::from(s.slots.hi - s.slots.lo) + 1).sum();
        covered == 1 << 16
    }

    /// The slots of the known shards that begin in these slots.
    pub fn within(&self, slots: Slots) -> Vec<Slots> {
        let begins = |known: &&ShardRecord| slots.contains(Slot(known.slots.lo));
        self.iter().filter(begins).map(|known| known.slots).collect()
    }

    /// All known shards, by their slots.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &ShardRecord> {
        self.shards.iter()
    }

    /// The primaries of all shards, each once, sorted.
    pub fn primaries(&self) -> Vec<StoreBoot> {
        let mut primaries: Vec<_> = self.iter().map(|shard| shard.primary).collect();
        primaries.sort();
        primaries.dedup();
        primaries
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(lo: u16, hi: u16, version: u64) -> ShardRecord {
        let slots = Slots { lo, hi };
        ShardRecord { slots, version: Version(version), ..ShardRecord::default() }
    }

    /// The map after these records, as (lo, hi, version).
    #[track_caller]
    fn check(learnt: &[(u16, u16, u64)], want: &[(u16, u16, u64)]) {
        let mut map = ShardMap::default();
        for &(lo, hi, version) in learnt {
            map.learn(record(lo, hi, version));
        }
        let known: Vec<_> = map.iter().map(|s| (s.slots.lo, s.slots.hi, s.version.0)).collect();
        assert_eq!(known, want);
    }

    #[test]
    fn the_newest_version_wins() {
        check(&[(0, 9, 2), (0, 9, 3), (0, 9, 1)], &[(0, 9, 3)]);
        check(&[(10, 19, 1), (0, 9, 1)], &[(0, 9, 1), (10, 19, 1)]);
    }

    /// The order in which the three records of a split arrive does not matter.
    #[test]
    fn a_split_replaces_the_parent() {
        let want = [(0, 4, 8), (5, 9, 1)];
        check(&[(0, 9, 7), (0, 4, 8), (5, 9, 1)], &want);
        check(&[(0, 9, 7), (5, 9, 1), (0, 4, 8)], &want);
        check(&[(5, 9, 1), (0, 9, 7), (0, 4, 8)], &want);
        check(&[(0, 4, 8), (5, 9, 1), (0, 9, 7)], &want);
    }

    /// Until the other record comes, the rest of the parent has a place.
    #[test]
    fn one_record_of_a_split_leaves_no_gap() {
        check(&[(0, 9, 7), (5, 9, 1)], &[(0, 4, 7), (5, 9, 1)]);
        check(&[(0, 9, 7), (0, 4, 8)], &[(0, 4, 8), (5, 9, 0)]);
        check(&[(0, 9, 7), (5, 7, 2)], &[(0, 4, 7), (5, 7, 2), (8, 9, 0)]);
        check(&[(0, 9, 7), (0, 4, 8), (5, 7, 2), (8, 9, 1)], &[(0, 4, 8), (5, 7, 2), (8, 9, 1)]);
    }

    #[test]
    fn a_range_upside_down_is_no_shard() {
        check(&[(9, 0, 1)], &[]);
    }

    #[test]
    fn ranges_cover_every_slot_once() {
        for count in [1, 3, 24, 100, 4096, 65_536] {
            let mut map = ShardMap::default();
            assert!(!map.is_complete());
            for slots in ranges(count) {
                assert!(map.learn(record(slots.lo, slots.hi, 1)));
            }
            assert!(map.is_complete());
            assert_eq!(map.iter().len(), count as usize);
        }
    }

    #[test]
    fn slots_find_their_shard() {
        let mut map = ShardMap::default();
        map.learn(record(10, 19, 1));
        map.learn(record(30, 39, 1));
        let shard = |slot| map.of_slot(Slot(slot)).map(|known| known.slots.lo);
        assert_eq!(
            [9, 10, 19, 20, 30, 40].map(shard),
            [None, Some(10), Some(10), None, Some(30), None]
        );
        assert_eq!(map.get(ShardId(10)).map(|known| known.slots.hi), Some(19));
        assert_eq!(map.get(ShardId(11)), None);
    }
}
