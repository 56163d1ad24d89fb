//! Whether there is room: refuse early, so that what was begun can be finished.
//!
//! Two things can be too much: the log, when entries that are not flushed alone keep it long (the
//! tail of a frozen shard; carrying them to newer segments comes later), and the file system, which
//! others may fill too. Either makes the node refuse with "no space, not applied".

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use engine::node::Event;

use crate::disk::Tell;
use crate::error::{DiskError, context};
use crate::workers::{Alarm, join, spawn};

const LOOK_EVERY: Duration = Duration::from_millis(500);

/// What is in the way.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
struct Causes {
    log: bool,
    space: bool,
}

impl Causes {
    fn any(self) -> bool {
        self.log || self.space
    }
}

/// Knows the causes, and tells the machine when the first comes and when the last goes.
pub(crate) struct Fullness {
    causes: Mutex<Causes>,
    tell: Tell,
}

impl Fullness {
    pub(crate) fn new(tell: Tell) -> Self {
        Self { causes: Mutex::default(), tell }
    }

    pub(crate) fn log(&self, full: bool) {
        self.change(|causes| causes.log = full);
    }

    fn space(&self, full: bool) {
        self.change(|causes| causes.space = full);
    }

    fn change(&self, change: impl FnOnce(&mut Causes)) {
        // Told under the lock, so that the last that is told is what holds.
        let mut causes = self.causes.lock().unwrap_or_else(PoisonError::into_inner);
        let before = *causes;
        change(&mut causes);
        if *causes != before {
            tracing::warn!(log = causes.log, space = causes.space, "disk full or no longer");
        }
        if causes.any() != before.any() {
            self.tell.event(Event::DiskFull(causes.any()));
        }
    }
}

/// What a file system holds.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Space {
    pub(crate) total: u64,
    pub(crate) free: u64,
}

impl Space {
    pub(crate) fn of(folder: &Path) -> Result<Self, DiskError> {
        let found = rustix::fs::statvfs(folder)
            .map_err(|why| context("ask for the free space of", folder, why.into()))?;
        let bytes = |blocks: u64| blocks.saturating_mul(found.f_frsize);
        Ok(Self { total: bytes(found.f_blocks), free: bytes(found.f_bavail) })
    }

    /// Full below `min`; no longer full only above a quarter more, so that the edge is not crossed
    /// with every flush.
    fn is_full(self, min: u64, was_full: bool) -> bool {
        let edge = if was_full { min.saturating_add(min / 4) } else { min };
        self.free < edge
    }
}

/// Looks at the free space now and then.
#[derive(Debug)]
pub(crate) struct SpaceWatch {
    stop: Option<mpsc::Sender<()>>,
    thread: Option<JoinHandle<()>>,
    free: Arc<AtomicU64>,
}

impl SpaceWatch {
    /// `space`: as it was found at the start.
    pub(crate) fn start(
        folder: PathBuf,
        space: Space,
        min: u64,
        fullness: Arc<Fullness>,
        alarm: Alarm,
    ) -> Self {
        const NAME: &str = "dkc-space";
        let (stop, stopped) = mpsc::channel();
        let free = Arc::new(AtomicU64::new(space.free));
        let seen = free.clone();
        let watch = move || {
            let mut full = false;
            let mut space = space;
            loop {
                full = space.is_full(min, full);
                fullness.space(full);
                if stopped.recv_timeout(LOOK_EVERY) != Err(mpsc::RecvTimeoutError::Timeout) {
                    return Ok(());
                }
                space = Space::of(&folder)?;
                seen.store(space.free, Ordering::Relaxed);
            }
        };
        let thread = spawn(NAME, move || alarm.guard(NAME, watch));
        Self { stop: Some(stop), thread: Some(thread), free }
    }

    /// Bytes that were free when last looked at.
    pub(crate) fn free(&self) -> u64 {
        self.free.load(Ordering::Relaxed)
    }
}

impl Drop for SpaceWatch {
    fn drop(&mut self) {
        self.stop = None;
        join(self.thread.take());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(free: u64, was_full: bool, want: bool) {
        assert_eq!(Space { total: 1_000, free }.is_full(100, was_full), want);
    }

    #[test]
    fn the_edge_lies_higher_on_the_way_back() {
        check(100, false, false);
        check(99, false, true);
        check(124, true, true);
        check(125, true, false);
    }

    #[test]
    fn told_when_the_first_cause_comes_and_the_last_one_goes() {
        let (tell, told) = Tell::to_channel();
        let fullness = Fullness::new(tell);
        fullness.log(false);
        fullness.log(true);
        fullness.space(true);
        fullness.log(false);
        fullness.space(false);
        drop(fullness);
        let told: Vec<_> = told.iter().map(|event| format!("{event:?}")).collect();
        assert_eq!(told, ["DiskFull(true)", "DiskFull(false)"]);
    }
}
