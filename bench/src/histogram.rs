//! A histogram of latencies, whose buckets are at most 1/64 as wide as the latencies in them.
//!
//! A list of every latency would grow with the run, and its cache misses in the generator would add
//! to the measured latency of the server. The buckets are exact up to 127 µs; above, a quantile is
//! the upper edge of its bucket, so it is too high by less than 1.6 % and never too low.

use std::time::Duration;

/// The number of buckets per power of two.
const STEPS: u64 = 64;
const STEP_BITS: u32 = STEPS.ilog2();

/// The counts of latencies, in buckets of microseconds.
#[derive(Clone, Debug, Default)]
pub struct Histogram {
    buckets: Vec<u64>,
    count: u64,
}

impl Histogram {
    /// Adds one latency.
    pub fn record(&mut self, latency: Duration) {
        let micros = u64::try_from(latency.as_micros()).unwrap_or(u64::MAX);
        let bucket = bucket_of(micros);
        if bucket >= self.buckets.len() {
            self.buckets.resize(bucket + 1, 0);
        }
        self.buckets[bucket] += 1;
        self.count += 1;
    }

    /// Adds all latencies of another histogram.
    pub fn merge(&mut self, other: &Self) {
        if other.buckets.len() > self.buckets.len() {
            self.buckets.resize(other.buckets.len(), 0);
        }
        for (mine, theirs) in self.buckets.iter_mut().zip(&other.buckets) {
            *mine += theirs;
        }
        self.count += other.count;
    }

    /// Returns the number of latencies.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Returns the latency that a `share` (0 to 1) of all latencies does not exceed; `None` if the
    /// histogram is empty.
    pub fn quantile(&self, share: f64) -> Option<Duration> {
        if self.count == 0 {
            return None;
        }
        let rank = ((share * self.count as f64).ceil() as u64).clamp(1, self.count);
        let mut seen = 0;
        let bucket = self.buckets.iter().position(|&count| {
            seen += count;
            seen >= rank
        });
        bucket.map(|bucket| Duration::from_micros(upper_edge(bucket)))
    }
}

/// Returns the bucket of a latency: 0 to 127 µs have one bucket each, then each power of two has
/// 64.
fn bucket_of(micros: u64) -> usize {
    let doubling = micros.checked_ilog2().unwrap_or(0).saturating_sub(STEP_BITS);
    (u64::from(doubling) * STEPS + (micros >> doubling)) as usize
}

/// Returns the largest number of microseconds in a bucket.
fn upper_edge(bucket: usize) -> u64 {
    let bucket = bucket as u64;
    let doubling = (bucket / STEPS).saturating_sub(1);
    let low = (bucket - doubling * STEPS) << doubling;
    low + ((1 << doubling) - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_latency_is_at_or_just_below_the_edge_of_its_bucket() {
        let mut last = 0;
        for micros in (0..5_000).chain([65_535, 65_536, 1_000_000, 60_000_000, u64::MAX / 2]) {
            let bucket = bucket_of(micros);
            let edge = upper_edge(bucket);
            assert!(edge >= micros, "{micros} is above the edge {edge} of its bucket");
            assert!(edge - micros <= micros / STEPS, "{edge} is far above {micros}");
            assert!(bucket >= last, "buckets go up with the latency at {micros}");
            last = bucket;
        }
    }

    #[track_caller]
    fn check(latencies: &[u64], share: f64, want: Option<u64>) {
        let (mut left, mut right) = (Histogram::default(), Histogram::default());
        for (index, &micros) in latencies.iter().enumerate() {
            let half = if index % 2 == 0 { &mut left } else { &mut right };
            half.record(Duration::from_micros(micros));
        }
        left.merge(&right);
        assert_eq!(left.quantile(share), want.map(Duration::from_micros));
        assert_eq!(left.count(), latencies.len() as u64);
    }

    #[test]
    fn quantiles() {
        let hundred: Vec<u64> = (1..=100).collect();
        check(&[], 0.5, None);
        check(&[7], 0.5, Some(7));
        check(&[7], 0.99, Some(7));
        check(&hundred, 0.5, Some(50));
        check(&hundred, 0.99, Some(99));
        check(&hundred, 1.0, Some(100));
        check(&[1, 1, 1, 100], 0.75, Some(1));
        check(&[1, 1, 1, 100], 0.76, Some(100));
    }
}
