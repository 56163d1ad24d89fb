//! Waiting between tries: longer each time up to a limit, and never in step with others.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// The pauses of one who tries something again and again.
#[derive(Debug)]
pub struct Pause {
    first: Duration,
    next: Duration,
    longest: Duration,
}

impl Pause {
    pub fn new(first: Duration, longest: Duration) -> Self {
        Self { first, next: first, longest }
    }

    pub async fn wait(&mut self) {
        tokio::time::sleep(by_chance(self.next)).await;
        self.next = (self.next * 2).min(self.longest);
    }

    /// What was waited for happened.
    pub fn reset(&mut self) {
        self.next = self.first;
    }
}

/// Holds up the news that a call has failed, for longer the more have failed in a row, so that whoever tries again at once
/// does no harm: an etcd that is full answers within a millisecond.
///
/// Calls that were under way together count as one: a member's death ends many, and the next member may answer.
#[derive(Debug, Default)]
pub(crate) struct Pace {
    failures: AtomicU32,
    /// Why the last one failed. None: it was answered.
    why: Mutex<Option<&'static str>>,
}

/// The first pause …
const FIRST: Duration = Duration::from_millis(10);
/// … and the longest: nobody waits longer than that for an etcd that is well again.
const LONGEST: Duration = Duration::from_secs(1);

impl Pace {
    /// A call begins; the answer is for [`failed`](Self::failed).
    pub(crate) fn begins(&self) -> u32 {
        self.failures.load(Ordering::Relaxed)
    }

    pub(crate) fn answered(&self) {
        self.failures.store(0, Ordering::Relaxed);
        self.note(None);
    }

    /// A call that began then has failed. The first failures, one for each member, are told at once.
    pub(crate) async fn failed(&self, began: u32, members: usize, why: &'static str) {
        self.note(Some(why));
        let next = began.saturating_add(1);
        // If it does not stand there any more, another call of the same time was counted.
        let _counted =
            self.failures.compare_exchange(began, next, Ordering::Relaxed, Ordering::Relaxed);
        let pause = pause_after(next, members);
        if !pause.is_zero() {
            tokio::time::sleep(by_chance(pause)).await;
        }
    }

    /// Why the last call failed, if it did.
    pub(crate) fn why(&self) -> Option<&'static str> {
        *self.why.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self, why: Option<&'static str>) {
        *self.why.lock().unwrap_or_else(PoisonError::into_inner) = why;
    }
}

fn pause_after(failures: u32, members: usize) -> Duration {
    match failures.checked_sub(u32::try_from(members).unwrap_or(u32::MAX)) {
        None | Some(0) => Duration::ZERO,
        Some(more) => (FIRST * (1 << (more - 1).min(10))).min(LONGEST),
    }
}

/// Between half of it and all.
fn by_chance(pause: Duration) -> Duration {
    pause.mul_f64(0.5 + fastrand::f64() / 2.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_member_is_tried_at_once_and_then_ever_more_rarely() {
        let ms = |failures, members| pause_after(failures, members).as_millis();
        assert_eq!(
            [1, 2, 3, 4, 8, 9, u32::MAX].map(|n| ms(n, 1)),
            [0, 10, 20, 40, 640, 1_000, 1_000]
        );
        assert_eq!([1, 3, 4, 5].map(|n| ms(n, 3)), [0, 0, 10, 20]);
    }

    #[tokio::test]
    async fn calls_that_fail_together_count_as_one() {
        let pace = Pace::default();
        let began = pace.begins();
        for _ in 0..100 {
            pace.failed(began, 1, "etcd").await;
        }
        assert_eq!((pace.begins(), pace.why()), (1, Some("etcd")));
        let began = tokio::time::Instant::now();
        pace.failed(1, 1, "etcd-full").await;
        let paused = began.elapsed();
        assert!(paused >= FIRST / 2, "{paused:?}");
        pace.answered();
        assert_eq!((pace.begins(), pace.why()), (0, None));
    }
}
