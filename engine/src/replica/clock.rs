//! A shard's own time, by which the age of clients' tokens is measured: moved by its primary with
//! each entry, and judged by every replica from the log alone.
//!
//! No single wall clock determines it. The primary takes the *lower median* of the clocks of all
//! members of M, which come with their heartbeats: among three a clock in 1970 or in 2099 is
//! outvoted, and of two the earlier one counts, since a shard whose time is ahead refuses requests
//! as too old, while one whose time is behind only keeps records for longer. As long as the clock
//! of a member is not known, time passes as it does on the monotonic clock. So does the time of a
//! new shard, which begins at 0.
//!
//! ```text
//!   behind by more than `leap_ms`   at once, in one leap: no record ages by it
//!                                   (`Buckets::advance_time`)
//!   behind by less                  9/8 of the time that passes, until it has caught up
//!   ahead                           half of the time that passes: it never stands still, or
//!                                   records would stay for ever
//! ```
//!
//! A leap must be recognised at apply, where only the log is known. It is recognised by its size,
//! so a slew must stay below that size.

use crate::ids::{Now, TimeMs};

/// The clock of a primary: what it keeps between two entries.
#[derive(Clone, Debug)]
pub struct ShardClock {
    /// The moment at which shard time last moved.
    moved: Now,
}

impl ShardClock {
    /// A clock that begins now.
    pub fn new(now: Now) -> Self {
        Self { moved: now }
    }

    /// The time of the next entry. `wall`: the agreed time of the members' clocks, if all are
    /// known.
    pub fn next(
        &mut self,
        previous: TimeMs,
        wall: Option<TimeMs>,
        now: Now,
        leap_ms: u64,
    ) -> TimeMs {
        let passed = now.ms_since(self.moved);
        let step = match wall.map(|wall| wall.0.saturating_sub(previous.0)) {
            None => passed,
            Some(behind) if behind > leap_ms => behind,
            Some(behind) => behind.clamp(passed / 2, passed + passed / 8),
        };
        if step > 0 {
            self.moved = now;
        }
        TimeMs(previous.0.saturating_add(step))
    }
}

/// The time that these clocks agree on: their lower median. `None` without clocks.
pub fn agreed(mut clocks: Vec<TimeMs>) -> Option<TimeMs> {
    clocks.sort();
    clocks.get(clocks.len().checked_sub(1)? / 2).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEAP_MS: u64 = 60_000;

    #[track_caller]
    fn check(previous: u64, wall: Option<u64>, passed_ms: u64, want: u64) {
        let mut clock = ShardClock::new(Now(0));
        let wall = wall.map(TimeMs);
        let next = clock.next(TimeMs(previous), wall, Now(passed_ms * 1_000), LEAP_MS);
        assert_eq!(next, TimeMs(want));
    }

    #[test]
    fn it_follows_the_clocks_at_nine_eighths_of_real_time_at_most() {
        check(1_000, Some(1_080), 80, 1_080);
        check(1_000, Some(1_090), 80, 1_090);
        check(1_000, Some(9_000), 80, 1_090);
    }

    #[test]
    fn ahead_of_the_clocks_it_runs_at_half_the_speed() {
        check(1_000, Some(1_000), 80, 1_040);
        check(1_000, Some(0), 80, 1_040);
    }

    #[test]
    fn far_behind_it_leaps_and_a_new_shard_is_far_behind() {
        check(1_000, Some(61_000), 8, 1_009);
        check(1_000, Some(61_001), 8, 61_001);
        check(0, Some(1_700_000_000_000), 0, 1_700_000_000_000);
    }

    #[test]
    fn while_a_members_clock_is_not_known_time_passes_as_it_does() {
        check(0, None, 80, 80);
        check(1_000, None, 80, 1_080);
    }

    /// Time that is too short for a step is not lost.
    #[test]
    fn short_times_add_up() {
        let mut clock = ShardClock::new(Now(0));
        let mut time = TimeMs(1_000);
        for n in 1..=8_000 {
            time = clock.next(time, Some(TimeMs(2_000)), Now(n * 100), LEAP_MS);
        }
        assert!((1_790..=1_900).contains(&time.0), "{time:?}");
    }

    #[test]
    fn one_wrong_clock_is_outvoted_and_of_two_the_earlier_one_counts() {
        let check = |clocks: &[u64], want: Option<u64>| {
            let clocks = clocks.iter().copied().map(TimeMs).collect();
            assert_eq!(agreed(clocks), want.map(TimeMs));
        };
        check(&[], None);
        check(&[7], Some(7));
        check(&[0, 7], Some(0));
        check(&[0, 7, 8], Some(7));
        check(&[7, 8, 99_999], Some(8));
        check(&[0, 7, 8, 99_999], Some(7));
    }
}
