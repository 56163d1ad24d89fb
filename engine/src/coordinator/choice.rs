//! The choice of a new primary, and of the members that leave the in-sync set with the promotion.
//! Pure functions.
//!
//! Any in-sync member holds everything acknowledged, so each of them is safe; the longest log keeps
//! most of what is still in flight. A copy that may have lost something is *not* as safe: a damaged
//! or empty one, or one on a suspect disk. Such copies come last. A tainted one is never chosen.

use crate::ids::{Epoch, Seq, StoreBoot, StoreId};
use crate::shard_record::ShardRecord;

/// An in-sync member that answered.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct PromotionCandidate {
    pub(super) process: StoreBoot,
    /// The last entry in its log.
    pub(super) last: (Epoch, Seq),
    pub(super) rank: Rank,
    /// The number of shards that it leads already.
    pub(super) led: usize,
}

/// The quality of a copy: a worse one is chosen only where there is no better.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(super) enum Rank {
    /// The copy is good.
    Good,
    /// The copy is good, but the store drains, or has handed the shard over.
    Leaving,
    /// The copy is good, but the disk is full: it would serve reads only.
    Full,
    /// The copy is good, but it is the primary that asked to be replaced, or was cut off.
    Replaced,
    /// The store is suspect: its disk reported or showed an error.
    Suspect,
    /// The copy is damaged.
    Unfit,
}

/// The best candidate: by rank, then the preferred store, then the longest log, then the fewest
/// shards led.
pub(super) fn choose(
    candidates: &[PromotionCandidate],
    preferred: Option<StoreId>,
) -> Option<PromotionCandidate> {
    let best = |candidate: &&PromotionCandidate| {
        let wanted = preferred == Some(candidate.process.store);
        let (last, led) = (std::cmp::Reverse(candidate.last), candidate.led);
        (candidate.rank, !wanted, last, led, candidate.process)
    };
    candidates.iter().min_by_key(best).copied()
}

/// The record after a promotion. `out`: members that should leave, the first most of all; they do
/// so as far as `min_in_sync` allows.
pub(super) fn promoted(
    record: &ShardRecord,
    primary: StoreBoot,
    out: &[StoreId],
    min_in_sync: usize,
) -> ShardRecord {
    let named = ShardRecord { epoch: Epoch(record.epoch.0 + 1), primary, ..record.clone() };
    named.changed(&[], out, &[], min_in_sync)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{Boot, Version};

    fn candidate(store: u128, last: (u64, u64), rank: Rank, led: usize) -> PromotionCandidate {
        let process = StoreBoot { store: StoreId(store), boot: Boot(1) };
        PromotionCandidate { process, last: (Epoch(last.0), Seq(last.1)), rank, led }
    }

    #[track_caller]
    fn check(candidates: &[PromotionCandidate], preferred: Option<u128>, want: Option<u128>) {
        let chosen = choose(candidates, preferred.map(StoreId));
        assert_eq!(chosen.map(|candidate| candidate.process.store.0), want);
    }

    #[test]
    fn the_longest_log_of_the_latest_epoch_wins() {
        let (a, b) = (candidate(1, (3, 9), Rank::Good, 0), candidate(2, (4, 5), Rank::Good, 0));
        check(&[a, b], None, Some(2));
        check(&[a, candidate(3, (3, 10), Rank::Good, 0)], None, Some(3));
        check(&[], None, None);
    }

    #[test]
    fn among_equals_the_one_that_leads_least() {
        let all = [candidate(1, (1, 5), Rank::Good, 2), candidate(2, (1, 5), Rank::Good, 1)];
        check(&all, None, Some(2));
    }

    #[test]
    fn the_preferred_wins_among_good_copies_only() {
        let all = [candidate(1, (1, 9), Rank::Good, 0), candidate(2, (1, 5), Rank::Good, 0)];
        check(&all, Some(2), Some(2));
        check(&[all[0], candidate(2, (1, 9), Rank::Unfit, 0)], Some(2), Some(1));
    }

    #[test]
    fn a_damaged_copy_only_where_there_is_no_other() {
        let all = [candidate(1, (9, 9), Rank::Unfit, 0), candidate(2, (1, 1), Rank::Good, 0)];
        check(&all, None, Some(2));
        check(&[all[0], candidate(2, (1, 1), Rank::Suspect, 0)], None, Some(2));
        check(&[all[0]], None, Some(1));
    }

    #[test]
    fn members_leave_down_to_the_floor_and_the_primary_stays() {
        let record = ShardRecord {
            epoch: Epoch(4),
            version: Version(7),
            isr: [1, 2, 3].map(StoreId).to_vec(),
            tainted: vec![StoreId(2)],
            ..ShardRecord::default()
        };
        let primary = StoreBoot { store: StoreId(3), boot: Boot(5) };
        let next = promoted(&record, primary, &[2, 3, 1].map(StoreId), 2);
        assert_eq!((next.epoch, next.version, next.primary), (Epoch(5), Version(8), primary));
        assert_eq!((next.isr, next.tainted), ([1, 3].map(StoreId).to_vec(), vec![]));
        let alone = promoted(&record, primary, &[2, 3, 1].map(StoreId), 1);
        assert_eq!(alone.isr, [StoreId(3)]);
    }
}
