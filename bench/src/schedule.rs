//! The schedule of an open loop: the time at which each request is meant to be sent.
//!
//! Users do not wait for each other's answers. So request `n` is due at `n / rate`, whether the
//! answers before it have come or not, and its latency counts from then: a server that stalls for
//! a second has `rate` slow requests, not one per connection (coordinated omission).

use std::time::Duration;

/// Requests at a fixed rate, numbered from 0.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    per_second: f64,
}

impl Schedule {
    /// Returns a schedule of this many requests per second; there must be more than 0.
    pub fn new(per_second: f64) -> Self {
        Self { per_second: per_second.max(f64::MIN_POSITIVE) }
    }

    /// Returns the time from the start at which request `number` is due.
    pub fn due_at(self, number: u64) -> Duration {
        Duration::try_from_secs_f64(number as f64 / self.per_second).unwrap_or(Duration::MAX)
    }

    /// Returns how many requests are due `elapsed` after the start.
    pub fn due_by(self, elapsed: Duration) -> u64 {
        let guess = (elapsed.as_secs_f64() * self.per_second) as u64;
        // The division of `due_at` may round to the other side of `elapsed`.
        let is_due = |number: &u64| self.due_at(*number) <= elapsed;
        let first = guess.saturating_sub(1);
        first + (first..guess + 2).take_while(is_due).count() as u64
    }

    /// Returns the time at which to look for due requests again, `elapsed` after the start, when
    /// `released` were due: with the next request, but not before `pause` has passed.
    pub fn next_look(self, released: u64, elapsed: Duration, pause: Duration) -> Duration {
        self.due_at(released).max(elapsed + pause)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_due_at_the_rate() {
        let schedule = Schedule::new(4.0);
        let millis = Duration::from_millis;
        assert_eq!(schedule.due_at(0), Duration::ZERO);
        assert_eq!(schedule.due_at(3), millis(750));
        assert_eq!(schedule.due_by(Duration::ZERO), 1);
        assert_eq!(schedule.due_by(millis(249)), 1);
        assert_eq!(schedule.due_by(millis(250)), 2);
        assert_eq!(schedule.due_by(millis(10_000)), 41);
    }

    #[test]
    fn a_request_is_due_exactly_from_its_time_on() {
        for rate in [0.3, 7.0, 333.3, 99_999.0] {
            let schedule = Schedule::new(rate);
            for number in (0..100).chain([12_345, 1_000_000]) {
                let due = schedule.due_at(number);
                assert_eq!(schedule.due_by(due), number + 1, "rate {rate}");
                let before = due.saturating_sub(Duration::from_nanos(1));
                assert_eq!(schedule.due_by(before), number.max(u64::from(number == 0)), "{rate}");
            }
        }
    }

    #[test]
    fn looks_are_not_closer_than_the_pause() {
        let (slow, fast) = (Schedule::new(10.0), Schedule::new(1e6));
        let (elapsed, pause) = (Duration::from_millis(5), Duration::from_micros(100));
        assert_eq!(slow.next_look(1, elapsed, pause), Duration::from_millis(100));
        assert_eq!(fast.next_look(5_001, elapsed, pause), elapsed + pause);
    }
}
