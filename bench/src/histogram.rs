//! The latencies of a run: an HDR histogram of microseconds, from 1 µs to an hour.
//!
//! A value is off by less than 0.1 % (three significant digits). A longer latency counts as an
//! hour.

use std::time::Duration;

use hdrhistogram::Histogram as HdrHistogram;

const MICROS_MAX: u64 = 3_600_000_000;
const SIGNIFICANT_DIGITS: u8 = 3;

/// The latencies of a run.
#[derive(Clone, Debug)]
pub struct Histogram(HdrHistogram<u64>);

impl Default for Histogram {
    fn default() -> Self {
        let empty = HdrHistogram::new_with_bounds(1, MICROS_MAX, SIGNIFICANT_DIGITS);
        Self(empty.expect("the bounds are valid"))
    }
}

impl Histogram {
    /// Adds one latency.
    pub fn record(&mut self, latency: Duration) {
        self.0.saturating_record(u64::try_from(latency.as_micros()).unwrap_or(MICROS_MAX));
    }

    /// Adds all latencies of another histogram.
    pub fn merge(&mut self, other: &Self) {
        self.0.add(&other.0).expect("both have the same bounds");
    }

    /// Returns the number of latencies.
    pub fn count(&self) -> u64 {
        self.0.len()
    }

    /// Returns the latency that a `share` (0 to 1) of all latencies does not exceed; `None` if the
    /// histogram is empty.
    pub fn quantile(&self, share: f64) -> Option<Duration> {
        let micros = self.0.value_at_quantile(share);
        (self.count() > 0).then(|| Duration::from_micros(micros))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(latencies: impl IntoIterator<Item = u64>) -> Histogram {
        let mut histogram = Histogram::default();
        latencies.into_iter().for_each(|micros| histogram.record(Duration::from_micros(micros)));
        histogram
    }

    #[test]
    fn a_latency_is_off_by_less_than_a_thousandth() {
        let hour = MICROS_MAX;
        for micros in (0..5_000).chain([65_535, 65_536, 1_000_000, 60_000_000, hour]) {
            let got = of([micros]).quantile(0.5).unwrap().as_micros() as u64;
            assert!(got >= micros && got - micros <= micros / 1000, "{got} for {micros}");
        }
        let longest = of([hour * 9]).quantile(0.5).unwrap().as_micros() as u64;
        assert!(longest >= hour && longest - hour <= hour / 1000, "{longest}");
    }

    #[track_caller]
    fn check(latencies: &[u64], share: f64, want: Option<u64>) {
        let (left, right) = latencies.split_at(latencies.len() / 2);
        let mut all = of(left.iter().copied());
        all.merge(&of(right.iter().copied()));
        assert_eq!(all.quantile(share), want.map(Duration::from_micros));
        assert_eq!(all.count(), latencies.len() as u64);
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
