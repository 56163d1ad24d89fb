//! Backoff between retries: the delay doubles up to a limit, with jitter so that processes don't
//! retry in step.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// The delays between the retries of one operation.
#[derive(Debug)]
pub struct RetryBackoff {
    first: Duration,
    next: Duration,
    longest: Duration,
}

impl RetryBackoff {
    /// Returns a backoff whose delays double from `first` to `longest`. Each is shortened at random
    /// by up to a half.
    pub fn new(first: Duration, longest: Duration) -> Self {
        Self { first, next: first, longest }
    }

    /// Waits for the next delay.
    pub async fn wait(&mut self) {
        tokio::time::sleep(with_jitter(self.next)).await;
        self.next = (self.next * 2).min(self.longest);
    }

    /// Starts again with the first delay, after a success.
    pub fn reset(&mut self) {
        self.next = self.first;
    }
}

/// Delays the failure of a call, for longer the more calls have failed in a row, so that a caller
/// that retries at once does no harm: an etcd that is full replies within a millisecond.
///
/// Failures of calls that were in flight together count as one: the death of a member ends many
/// calls, and the next member may reply.
#[derive(Debug, Default)]
pub(crate) struct CallBackoff {
    failures: AtomicU32,
    /// The reason of the last call's failure; `None` if it succeeded.
    why: Mutex<Option<&'static str>>,
}

/// The first delay.
const FIRST: Duration = Duration::from_millis(10);
/// The longest delay, so that an etcd that has recovered is used again within a second.
const LONGEST: Duration = Duration::from_secs(1);

impl CallBackoff {
    /// Begins a call, and returns the number that [`failed`](Self::failed) expects.
    pub(crate) fn begin(&self) -> u32 {
        self.failures.load(Ordering::Relaxed)
    }

    /// Records a call that succeeded.
    pub(crate) fn succeeded(&self) {
        self.failures.store(0, Ordering::Relaxed);
        self.note(None);
    }

    /// Records that the call which began at `began` has failed, and waits. The first failures, one
    /// for each member, are not delayed.
    pub(crate) async fn failed(&self, began: u32, members: usize, why: &'static str) {
        self.note(Some(why));
        let next = began.saturating_add(1);
        // If the number has changed, another call that was in flight at the same time was counted.
        let _counted =
            self.failures.compare_exchange(began, next, Ordering::Relaxed, Ordering::Relaxed);
        let delay = delay_after(next, members);
        if !delay.is_zero() {
            tokio::time::sleep(with_jitter(delay)).await;
        }
    }

    /// Returns why the last call failed, or `None` if it succeeded.
    pub(crate) fn last_failure(&self) -> Option<&'static str> {
        *self.why.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self, why: Option<&'static str>) {
        *self.why.lock().unwrap_or_else(PoisonError::into_inner) = why;
    }
}

fn delay_after(failures: u32, members: usize) -> Duration {
    match failures.checked_sub(u32::try_from(members).unwrap_or(u32::MAX)) {
        None | Some(0) => Duration::ZERO,
        Some(more) => (FIRST * (1 << (more - 1).min(10))).min(LONGEST),
    }
}

/// Returns a random duration between half of `delay` and `delay`.
fn with_jitter(delay: Duration) -> Duration {
    delay.mul_f64(0.5 + fastrand::f64() / 2.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_member_is_tried_at_once_and_then_ever_more_rarely() {
        let ms = |failures, members| delay_after(failures, members).as_millis();
        assert_eq!(
            [1, 2, 3, 4, 8, 9, u32::MAX].map(|n| ms(n, 1)),
            [0, 10, 20, 40, 640, 1_000, 1_000]
        );
        assert_eq!([1, 3, 4, 5].map(|n| ms(n, 3)), [0, 0, 10, 20]);
    }

    #[tokio::test]
    async fn calls_that_fail_together_count_as_one() {
        let backoff = CallBackoff::default();
        let began = backoff.begin();
        for _ in 0..100 {
            backoff.failed(began, 1, "etcd").await;
        }
        assert_eq!((backoff.begin(), backoff.last_failure()), (1, Some("etcd")));
        let began = tokio::time::Instant::now();
        backoff.failed(1, 1, "etcd-full").await;
        let waited = began.elapsed();
        assert!(waited >= FIRST / 2, "{waited:?}");
        backoff.succeeded();
        assert_eq!((backoff.begin(), backoff.last_failure()), (0, None));
    }
}
