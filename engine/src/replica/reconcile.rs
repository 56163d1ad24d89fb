//! Where a primary's log and a follower's part.
//!
//! Within one epoch there is one primary, and its log only grows: two logs that hold entries of
//! the same epoch agree up to the end of the shorter one. So the point is, in the newest epoch
//! that both hold, the lower of the two ends. Both histories are needed: with only one, a fast
//! double failover hides a divergence (KIP-279). The follower then checks the chain at that point;
//! should it differ all the same, what it has applied is the last resort, as applied entries are
//! committed and every later primary holds them.

use crate::entry::Position;
use crate::ids::{Epoch, Seq};
use crate::replica::log::ReplicaLog;

/// The last seq at which both logs agree, judged by epochs. `ends` are the follower's, newest
/// first, down to what it has applied.
pub fn join_point(own: &ReplicaLog, ends: &[(Epoch, Seq)], applied: Position) -> Seq {
    for &(epoch, end) in ends {
        if let Some(own_end) = own.end_of(epoch) {
            return end.min(own_end).max(applied.seq);
        }
    }
    applied.seq
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::apply::Decoded;
    use crate::entry::{Body, Entry};
    use crate::ids::TimeMs;

    fn log(epochs: &[u64]) -> ReplicaLog {
        let mut log = ReplicaLog::from(Position::default());
        for &epoch in epochs {
            let entry = Entry::after(log.last(), Epoch(epoch), TimeMs(0), Body::Barrier);
            log.append(entry, Decoded::NoOps);
        }
        log
    }

    #[track_caller]
    fn check(primary: &[u64], follower: &[u64], applied: u64, want: u64) {
        let follower = log(follower);
        let applied = follower.position(Seq(applied)).unwrap();
        let ends = follower.ends_above(applied.seq);
        assert_eq!(join_point(&log(primary), &ends, applied), Seq(want));
    }

    #[test]
    fn a_follower_that_is_behind_joins_at_its_end() {
        check(&[1, 1, 1, 2], &[1, 1], 0, 2);
    }

    #[test]
    fn a_tail_that_the_primary_lacks_is_left_out() {
        check(&[1, 1, 3], &[1, 1, 1, 1], 1, 2);
        check(&[1, 1, 3], &[1, 1, 2, 2], 1, 2);
    }

    /// The follower never heard of epoch 2, the primary never of 3: the point lies in 1.
    #[test]
    fn double_failover() {
        check(&[1, 2, 2, 4], &[1, 1, 3], 0, 1);
    }

    #[test]
    fn nothing_in_common_but_what_is_applied() {
        check(&[1, 2], &[1, 3, 3], 1, 1);
    }
}
