//! Latencies, kept in buckets at most 1/64 wide of what they hold.
//!
//! A list of every latency would grow with the run and cost the generator cache misses it then
//! charges to the server. The buckets are exact up to 127 µs; above, a quantile is the upper edge
//! of its bucket, so it errs by under 1.6 % and never flatters.

use std::time::Duration;

/// Buckets of a doubling.
const STEPS: u64 = 64;
const STEP_BITS: u32 = STEPS.ilog2();

/// Counts of latencies in microseconds.
#[derive(Clone, Debug, Default)]
pub struct Histogram {
    buckets: Vec<u64>,
    count: u64,
}

impl Histogram {
    pub fn record(&mut self, latency: Duration) {
        let micros = u64::try_from(latency.as_micros()).unwrap_or(u64::MAX);
        let bucket = bucket_of(micros);
        if bucket >= self.buckets.len() {
            self.buckets.resize(bucket + 1, 0);
        }
        self.buckets[bucket] += 1;
        self.count += 1;
    }

    pub fn merge(&mut self, other: &Self) {
        if other.buckets.len() > self.buckets.len() {
            self.buckets.resize(other.buckets.len(), 0);
        }
        for (mine, theirs) in self.buckets.iter_mut().zip(&other.buckets) {
            *mine += theirs;
        }
        self.count += other.count;
    }

    pub fn count(&self) -> u64 {
        self.count
    }

    /// The latency that `share` (0 to 1) of all did not exceed; `None` when there are none.
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

/// 0, 1 … 127 each on its own, then 64 to each doubling.
fn bucket_of(micros: u64) -> usize {
    let doubling = micros.checked_ilog2().unwrap_or(0).saturating_sub(STEP_BITS);
    (u64::from(doubling) * STEPS + (micros >> doubling)) as usize
}

/// The largest number of microseconds in a bucket.
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
    fn every_latency_is_in_the_bucket_that_says_so() {
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
