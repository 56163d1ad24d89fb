//! The last position at which a primary's log and a follower's agree.
//!
//! Within one epoch there is one primary, and its log only grows: two logs that contain entries of
//! the same epoch agree up to the end of the shorter one. So the position is, in the newest epoch
//! that both contain, the lower of the two ends. The epochs of both logs are needed: with those of
//! one only, a fast double failover hides a divergence (Kafka's KIP-279). The follower then checks
//! the chain at that position; should it differ all the same, the position that the follower has
//! applied is used, since applied entries are committed and every later primary has them.

use crate::entry::Position;
use crate::replica::log::ReplicaLog;

/// The last position at which both logs agree, judged by epochs. `ends` are the follower's, newest
/// first, down to what it has applied. Below what `own` has in memory the result is the position
/// that the follower reported; the entries that follow it are compared when they are read from the
/// disk.
pub fn join_point(own: &ReplicaLog, ends: &[Position], applied: Position) -> Position {
    for end in ends {
        if let Some(own_end) = own.end_of(end.epoch) {
            let seq = end.seq.min(own_end).max(applied.seq);
            let reported = (seq == end.seq).then_some(*end);
            return own.position(seq).or(reported).unwrap_or(applied);
        }
    }
    own.position(applied.seq).unwrap_or(applied)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::entry::{Body, Entry};
    use crate::ids::{Epoch, Seq, TimeMs};
    use crate::shard::apply::Decoded;

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
        let mut primary = log(primary);
        let joined = join_point(&primary, &ends, applied);
        assert_eq!(Some(joined), primary.position(Seq(want)));
        // With no part of the primary's log in memory: the point is at an end of the follower's
        // log, or at the position that it has applied.
        let last = primary.last().seq;
        (1..=last.0).for_each(|seq| primary.on_applied(Seq(seq)));
        primary.shrink(last, usize::MAX);
        let end = ends.iter().find(|end| end.seq == Seq(want)).copied().unwrap_or(applied);
        assert_eq!(join_point(&primary, &ends, applied), end);
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

    /// The follower has no entry of epoch 2, the primary none of 3: the point lies in 1.
    #[test]
    fn double_failover() {
        check(&[1, 2, 2, 4], &[1, 1, 3], 0, 1);
    }

    #[test]
    fn nothing_in_common_but_what_is_applied() {
        check(&[1, 2], &[1, 3, 3], 1, 1);
    }
}
