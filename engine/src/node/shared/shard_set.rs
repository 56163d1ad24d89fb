//! A set of shards that is filled and emptied in order, many times a turn.

use std::collections::VecDeque;
use std::ops::Bound;

use crate::ids::ShardId;

/// A set of shards, sorted. Shards that come in order are added at the end, without a search, so
/// the thousand shards of a message take a few microseconds.
#[derive(Clone, Debug, Default)]
pub(in crate::node) struct ShardSet(VecDeque<ShardId>);

impl ShardSet {
    /// Adds the shard, if it is not in the set.
    pub(in crate::node) fn insert(&mut self, shard: ShardId) {
        if self.0.back().is_none_or(|&last| last < shard) {
            self.0.push_back(shard);
        } else if let Err(at) = self.0.binary_search(&shard) {
            self.0.insert(at, shard);
        }
    }

    /// Takes the first shard.
    pub(in crate::node) fn pop_first(&mut self) -> Option<ShardId> {
        self.0.pop_front()
    }

    /// Takes the first shard from the bound on; without such a shard, the first of all.
    pub(in crate::node) fn pop_from(&mut self, first: Bound<ShardId>) -> Option<ShardId> {
        let at = match first {
            Bound::Unbounded => 0,
            Bound::Included(first) => self.0.partition_point(|&shard| shard < first),
            Bound::Excluded(last) => self.0.partition_point(|&shard| shard <= last),
        };
        self.0.remove(at).or_else(|| self.pop_first())
    }

    /// Returns whether the set is empty.
    pub(in crate::node) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl Extend<ShardId> for ShardSet {
    fn extend<T: IntoIterator<Item = ShardId>>(&mut self, shards: T) {
        shards.into_iter().for_each(|shard| self.insert(shard));
    }
}

impl IntoIterator for ShardSet {
    type Item = ShardId;
    type IntoIter = std::collections::vec_deque::IntoIter<ShardId>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(shards: &[u16]) -> ShardSet {
        let mut set = ShardSet::default();
        set.extend(shards.iter().copied().map(ShardId));
        set
    }

    #[test]
    fn it_is_sorted_and_has_each_shard_once() {
        let shards = set(&[3, 7, 5, 3, 7, 9, 1]);
        assert_eq!(shards.into_iter().map(|shard| shard.0).collect::<Vec<_>>(), [1, 3, 5, 7, 9]);
    }

    #[test]
    fn it_is_emptied_from_a_bound_on_and_around() {
        let mut shards = set(&[1, 3, 5]);
        assert_eq!(shards.pop_from(Bound::Excluded(ShardId(3))), Some(ShardId(5)));
        assert_eq!(shards.pop_from(Bound::Excluded(ShardId(3))), Some(ShardId(1)));
        assert_eq!(shards.pop_from(Bound::Included(ShardId(3))), Some(ShardId(3)));
        assert_eq!(shards.pop_from(Bound::Unbounded), None);
    }
}
