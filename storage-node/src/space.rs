//! Free space: the node refuses work early, so that accepted work can be finished.
//!
//! There are three causes: the log, when most of it is entries that can't be flushed (the tails of
//! frozen shards; a few are carried to newer segments); the file system, which others may fill too,
//! with bytes or with names (inodes); and a job that waits for room ([`crate::shortage_retry`]),
//! whatever the file system reports: it does not show a quota. Each makes the node refuse with "no
//! space, not applied".
//!
//! The state machine also gets the number of bytes above the reserve: a snapshot that needs more is
//! refused before it begins.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::Duration;

use engine::node::Event;
use rustix::fs::StatVfs;

use crate::disk_event::EventSink;
use crate::error::{DiskError, context};
use crate::workers::{FailureReporter, JoinedThread, spawn};

const LOOK_EVERY: Duration = Duration::from_millis(500);

/// The causes of a full disk.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
struct Causes {
    log: bool,
    space: bool,
    /// The number of jobs that wait for room.
    jobs: usize,
}

impl Causes {
    fn any(self) -> bool {
        self.log || self.space || self.jobs > 0
    }
}

/// Collects the causes, and informs the state machine when the first appears and when the last is
/// gone.
pub(crate) struct Fullness {
    state: Mutex<FullnessState>,
    sink: EventSink,
}

#[derive(Debug)]
struct FullnessState {
    causes: Causes,
    /// The bytes above the reserve, by the file system; and the number that the state machine
    /// knows.
    room: u64,
    room_sent: u64,
}

impl Default for FullnessState {
    fn default() -> Self {
        Self { causes: Causes::default(), room: u64::MAX, room_sent: u64::MAX }
    }
}

impl Fullness {
    pub(crate) fn new(sink: EventSink) -> Self {
        Self { state: Mutex::default(), sink }
    }

    pub(crate) fn log(&self, full: bool) {
        self.change(|state| state.causes.log = full);
    }

    fn space(&self, full: bool) {
        self.change(|state| state.causes.space = full);
    }

    pub(crate) fn job_waits(&self) {
        self.change(|state| state.causes.jobs += 1);
    }

    pub(crate) fn job_goes_on(&self) {
        self.change(|state| state.causes.jobs = state.causes.jobs.saturating_sub(1));
    }

    fn room(&self, bytes: u64) {
        self.change(|state| state.room = bytes);
    }

    fn change(&self, change: impl FnOnce(&mut FullnessState)) {
        // Events are sent under the lock, so that the last event is the present state.
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let before = state.causes;
        change(&mut state);
        let causes = state.causes;
        if causes != before {
            let Causes { log, space, jobs } = causes;
            match causes.any() {
                true => {
                    tracing::warn!(log, space, jobs_waiting = jobs, "writes are refused: disk full")
                }
                false => tracing::info!("disk has room, writes are accepted"),
            }
        }
        // A quota that stops a job may be invisible in the file system's numbers.
        let room = if causes.jobs > 0 { 0 } else { state.room };
        if std::mem::replace(&mut state.room_sent, room) != room {
            self.sink.send(Event::Room { bytes: room });
        }
        if causes.any() != before.any() {
            self.sink.send(Event::DiskFull(causes.any()));
        }
    }
}

/// The size of a file system, and what is free on it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Space {
    /// The size in bytes.
    pub(crate) total: u64,
    /// The bytes that this process may use, without those reserved for root.
    pub(crate) free: u64,
    /// The number of files that can be created; `u64::MAX` if the file system does not limit them.
    pub(crate) inodes: u64,
}

/// The reserve: the node refuses work when less is free.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct SpaceMin {
    pub(crate) bytes: u64,
    pub(crate) inodes: u64,
}

impl Space {
    pub(crate) fn of(folder: &Path) -> Result<Self, DiskError> {
        rustix::fs::statvfs(folder)
            .map(|found| Self::from(&found))
            .map_err(|why| context("ask for the free space of", folder, why.into()))
    }

    /// Returns whether the disk is full: below the reserve, and then until a quarter more than the
    /// reserve is free, so that the state does not change with every flush.
    pub(crate) fn is_full(self, min: SpaceMin, was_full: bool) -> bool {
        let edge = |min: u64| if was_full { min.saturating_add(min / 4) } else { min };
        self.free < edge(min.bytes) || self.inodes < edge(min.inodes)
    }
}

impl From<&StatVfs> for Space {
    fn from(found: &StatVfs) -> Self {
        let bytes = |blocks: u64| blocks.saturating_mul(found.f_frsize);
        // btrfs makes inodes as needed, and reports that it has none.
        let inodes = if found.f_files == 0 { u64::MAX } else { found.f_favail };
        Self { total: bytes(found.f_blocks), free: bytes(found.f_bavail), inodes }
    }
}

/// Checks the free space at regular intervals.
#[derive(Debug)]
pub(crate) struct SpaceWatch {
    _stop: mpsc::Sender<()>,
    _thread: JoinedThread,
    min: SpaceMin,
    free: Arc<AtomicU64>,
    inodes: Arc<AtomicU64>,
}

impl SpaceWatch {
    /// Starts the thread. `space` is the free space found at the start of the process.
    pub(crate) fn start(
        folder: PathBuf,
        space: Space,
        min: SpaceMin,
        fullness: Arc<Fullness>,
        reporter: FailureReporter,
    ) -> Self {
        const NAME: &str = "dkc-space";
        let (_stop, stopped) = mpsc::channel();
        let free = Arc::new(AtomicU64::new(space.free));
        let inodes = Arc::new(AtomicU64::new(space.inodes));
        let seen = (free.clone(), inodes.clone());
        let watch = move || {
            let mut full = false;
            let mut space = space;
            loop {
                full = space.is_full(min, full);
                fullness.space(full);
                fullness.room(space.free.saturating_sub(min.bytes));
                if stopped.recv_timeout(LOOK_EVERY) != Err(mpsc::RecvTimeoutError::Timeout) {
                    return Ok(());
                }
                space = Space::of(&folder)?;
                seen.0.store(space.free, Ordering::Relaxed);
                seen.1.store(space.inodes, Ordering::Relaxed);
            }
        };
        let _thread = spawn(NAME, move || reporter.guard(NAME, watch));
        Self { _stop, _thread, min, free, inodes }
    }

    /// Returns the reserve in bytes: the node refuses work when fewer are free.
    pub(crate) fn reserve(&self) -> u64 {
        self.min.bytes
    }

    /// Returns the bytes that were free at the last check.
    pub(crate) fn free(&self) -> u64 {
        self.free.load(Ordering::Relaxed)
    }

    /// Returns how many files could be created at the last check; `u64::MAX` if they are not
    /// limited.
    pub(crate) fn inodes(&self) -> u64 {
        self.inodes.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(free: u64, inodes: u64, was_full: bool, want: bool) {
        let min = SpaceMin { bytes: 100, inodes: 8 };
        assert_eq!(Space { total: 1_000, free, inodes }.is_full(min, was_full), want);
    }

    #[test]
    fn the_edge_lies_higher_on_the_way_back() {
        check(100, 8, false, false);
        check(99, 8, false, true);
        check(124, 99, true, true);
        check(125, 99, true, false);
        check(1_000, 7, false, true);
        check(1_000, 9, true, true);
        check(1_000, 10, true, false);
    }

    /// Blocks are counted in fragments, not in the larger unit of I/O; and part of the free space
    /// is reserved for root.
    #[test]
    fn free_is_what_this_process_may_use() {
        let found = StatVfs {
            f_bsize: 1 << 20,
            f_frsize: 4_096,
            f_blocks: 1_000,
            f_bfree: 300,
            f_bavail: 100,
            f_files: 90,
            f_ffree: 80,
            f_favail: 70,
            f_fsid: 0,
            f_flag: rustix::fs::StatVfsMountFlags::empty(),
            f_namemax: 255,
        };
        let want = Space { total: 4_096_000, free: 409_600, inodes: 70 };
        assert_eq!(Space::from(&found), want);
        let uncounted = StatVfs { f_files: 0, f_ffree: 0, f_favail: 0, ..found };
        assert_eq!(Space::from(&uncounted).inodes, u64::MAX);
    }

    #[test]
    fn notifies_when_the_first_cause_comes_and_the_last_one_goes() {
        let (sink, events) = EventSink::to_channel();
        let fullness = Fullness::new(sink);
        fullness.log(false);
        fullness.log(true);
        fullness.space(true);
        fullness.log(false);
        fullness.job_waits();
        fullness.space(false);
        fullness.job_goes_on();
        drop(fullness);
        let sent: Vec<_> = events.iter().map(|event| format!("{event:?}")).collect();
        let room = |bytes: u64| format!("Room {{ bytes: {bytes} }}");
        let want = ["DiskFull(true)".into(), room(0), room(u64::MAX), "DiskFull(false)".into()];
        assert_eq!(sent, want);
    }
}
