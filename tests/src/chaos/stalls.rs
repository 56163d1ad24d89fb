//! Detects pauses of this machine: a thread sleeps for 50 ms at a time and records by how much it
//! wakes up late.
//!
//! On a shared machine a whole cluster may stand still for half a minute, and no fault explains
//! that silence. This program stands still at the same time, so it can measure the pause.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const EVERY: Duration = Duration::from_millis(50);
/// A smaller delay is usual on a machine with two cores and some twenty processes.
const LATE: Duration = Duration::from_millis(200);

/// The moment of a late wake-up, and by how much it was late.
type Stall = (Instant, Duration);

#[derive(Clone, Default)]
pub struct Stalls {
    stalls: Arc<Mutex<Vec<Stall>>>,
    stop: Arc<AtomicBool>,
}

impl Stalls {
    pub fn watch(&self) -> JoinHandle<()> {
        let here = self.clone();
        std::thread::spawn(move || {
            while !here.stop.load(Ordering::Relaxed) {
                let slept = Instant::now();
                std::thread::sleep(EVERY);
                let late = slept.elapsed().saturating_sub(EVERY);
                if late > LATE {
                    here.lock().push((Instant::now(), late));
                }
            }
        })
    }

    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// Returns the total length of the stalls since `begun`.
    pub fn since(&self, begun: Instant) -> Duration {
        let now = Instant::now();
        sum(&self.lock(), begun, now)
    }

    /// Returns the total length of the stalls between two moments.
    pub fn between(&self, begun: Instant, ended: Instant) -> Duration {
        sum(&self.lock(), begun, ended)
    }

    /// Returns the total length of all stalls.
    pub fn total(&self) -> Duration {
        self.lock().iter().map(|(_, late)| late).sum()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Stall>> {
        self.stalls.lock().unwrap_or_else(|failed| failed.into_inner())
    }
}

/// Sums the parts of the stalls that lie between two moments.
fn sum(stalls: &[Stall], begun: Instant, ended: Instant) -> Duration {
    let within = |&(woken, late): &Stall| {
        let from = (woken - late).max(begun);
        woken.min(ended).saturating_duration_since(from)
    };
    stalls.iter().map(within).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The only stall lasts from 10 s to 13 s.
    #[track_caller]
    fn check(begun: u64, ended: u64, want: u64) {
        let zero = Instant::now();
        let at = |second| zero + Duration::from_secs(second);
        let stalls = [(at(13), Duration::from_secs(3))];
        assert_eq!(sum(&stalls, at(begun), at(ended)), Duration::from_secs(want));
    }

    #[test]
    fn only_what_lies_between_the_two_moments_counts() {
        check(0, 20, 3);
        check(11, 20, 2);
        check(0, 12, 2);
        check(13, 20, 0);
        check(0, 10, 0);
    }
}
