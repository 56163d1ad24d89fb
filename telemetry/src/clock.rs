//! Time that also passes while the machine sleeps, and the time of day.
//!
//! [`std::time::Instant`] is CLOCK_MONOTONIC: for a laptop that was suspended for an hour, or a
//! machine that was hibernated, no time has passed. A proof that a value was current would look as
//! young as before the pause. CLOCK_BOOTTIME counts the suspension. Neither clock counts a pause of
//! a virtual machine that its hypervisor hides.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::time::{ClockId, clock_gettime};

/// A stopwatch that counts from its start, suspension included. Copies of it agree.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    start: Duration,
}

impl Clock {
    /// Starts a stopwatch now.
    pub fn start() -> Self {
        Self { start: since_boot() }
    }

    /// Returns the time since the start.
    pub fn elapsed(self) -> Duration {
        since_boot().saturating_sub(self.start)
    }
}

/// Returns the time of the wall clock in ms since 1970; 0 if the clock is before that.
pub fn wall_clock_ms() -> u64 {
    let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since_1970.as_millis()).unwrap_or(u64::MAX)
}

fn since_boot() -> Duration {
    let time = clock_gettime(ClockId::Boottime);
    let (seconds, nanos) = (u64::try_from(time.tv_sec), u32::try_from(time.tv_nsec));
    Duration::new(seconds.unwrap_or(0), nanos.unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_counts_from_the_start_and_never_back() {
        let clock = Clock::start();
        let mut last = Duration::ZERO;
        for _ in 0..1_000 {
            let now = clock.elapsed();
            assert!(now >= last && now < Duration::from_secs(60), "{now:?} after {last:?}");
            last = now;
        }
    }
}
