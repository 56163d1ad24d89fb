//! Waits for what has run out: a job that can't have a byte, an inode or an open file is begun again until it can.
//!
//! Only a job that leaves nothing behind when it fails, or nothing that it minds when it begins again, may be run so. An
//! append to the log may not: after a failed fdatasync it is not known what the page cache holds. It ends the process,
//! and the next start waits.
//!
//! Waiting has an end where it can't help: RocksDB, once it has failed to write its MANIFEST, refuses every change until
//! it is opened again, whatever there is by then. So a job that still fails a while after there is room is given up, and
//! the process ends with the error's own code.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use tracing::{info, warn};

use crate::error::{DiskError, Lack};
use crate::space::{Fullness, Space, SpaceMin};

/// Between two attempts.
const AGAIN_EVERY: Duration = Duration::from_millis(200);
/// A job that fails for so long although there seems to be room is given up.
const USELESS_AFTER: Duration = Duration::from_secs(60);
/// What is waited for is said again this often.
const SAY_EVERY: Duration = Duration::from_secs(60);

/// Cheap to clone: every thread that touches the disk has one.
#[derive(Clone)]
pub(crate) struct Patience {
    folder: PathBuf,
    min: SpaceMin,
    fullness: Arc<Fullness>,
    stopping: Arc<AtomicBool>,
}

impl std::fmt::Debug for Patience {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Patience({:?})", self.folder)
    }
}

impl Patience {
    /// `stopping`: nobody waits for the job any more.
    pub(crate) fn new(
        folder: PathBuf,
        min: SpaceMin,
        fullness: Arc<Fullness>,
        stopping: Arc<AtomicBool>,
    ) -> Self {
        Self { folder, min, fullness, stopping }
    }

    /// Runs `attempt` until it succeeds or fails for another reason than a lack.
    pub(crate) fn run<T>(
        &self,
        job: &'static str,
        mut attempt: impl FnMut() -> Result<T, DiskError>,
    ) -> Result<T, DiskError> {
        let mut waiting: Option<Waiting> = None;
        loop {
            let error = match attempt() {
                Ok(done) => {
                    if let Some(waiting) = waiting {
                        info!(job, waited_s = waiting.since.elapsed().as_secs(), "goes on");
                    }
                    return Ok(done);
                }
                Err(error) => error,
            };
            let Some(lack) = error.lack() else { return Err(error) };
            let waits = waiting.get_or_insert_with(|| Waiting::begin(self.fullness.clone(), lack));
            if self.stopping.load(Ordering::Acquire) || !waits.may_help(self.has_room(lack)) {
                return Err(error);
            }
            waits.say(job, &error);
            thread::sleep(AGAIN_EVERY);
        }
    }

    /// As far as can be seen: a quota can't, nor how many files others have open.
    fn has_room(&self, lack: Lack) -> bool {
        match (lack, Space::of(&self.folder)) {
            (Lack::Space, Ok(space)) => !space.is_full(self.min, false),
            _ => true,
        }
    }
}

/// A job that waits. While it lives the node refuses what needs room.
struct Waiting {
    fullness: Option<Arc<Fullness>>,
    since: Instant,
    /// Since when there has been room, and the job has failed all the same.
    useless_since: Option<Instant>,
    said: Option<Instant>,
}

impl Waiting {
    fn begin(fullness: Arc<Fullness>, lack: Lack) -> Self {
        // A node without open files has room for what it takes.
        let fullness = (lack == Lack::Space).then_some(fullness);
        if let Some(fullness) = &fullness {
            fullness.job_waits();
        }
        Self { fullness, since: Instant::now(), useless_since: None, said: None }
    }

    fn may_help(&mut self, has_room: bool) -> bool {
        if !has_room {
            self.useless_since = None;
            return true;
        }
        self.useless_since.get_or_insert_with(Instant::now).elapsed() < USELESS_AFTER
    }

    fn say(&mut self, job: &'static str, error: &DiskError) {
        if self.said.is_none_or(|said| said.elapsed() >= SAY_EVERY) {
            self.said = Some(Instant::now());
            warn!(job, why = error.with_advice(), "waits");
        }
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        if let Some(fullness) = &self.fullness {
            fullness.job_goes_on();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::path::Path;
    use std::sync::mpsc;

    use engine::node::Event;

    use super::*;
    use crate::disk::Tell;
    use crate::error::context;

    fn patience() -> (Patience, mpsc::Receiver<Event>, Arc<AtomicBool>) {
        let (tell, events) = Tell::to_channel();
        let stopping = Arc::new(AtomicBool::new(false));
        let fullness = Arc::new(Fullness::new(tell));
        let min = SpaceMin { bytes: 0, inodes: 0 };
        let patience = Patience::new(std::env::temp_dir(), min, fullness, stopping.clone());
        (patience, events, stopping)
    }

    fn error(errno: i32) -> DiskError {
        context("write", Path::new("a"), io::Error::from_raw_os_error(errno))
    }

    fn fullness(events: mpsc::Receiver<Event>) -> Vec<bool> {
        let full = |event| match event {
            Event::DiskFull(full) => Some(full),
            _ => None,
        };
        events.iter().filter_map(full).collect()
    }

    #[test]
    fn a_job_is_begun_again_until_there_is_room_and_the_node_is_full_meanwhile() {
        let (patience, events, _) = patience();
        let mut failures = vec![28, 28];
        let done = patience.run("test", || match failures.pop() {
            Some(errno) => Err(error(errno)),
            None => Ok(7),
        });
        assert_eq!(done.unwrap(), 7);
        drop(patience);
        assert_eq!(fullness(events), [true, false]);
    }

    #[test]
    fn what_is_no_lack_is_not_waited_for() {
        let (patience, events, _) = patience();
        let mut attempts = 0;
        let failed = patience.run("test", || {
            attempts += 1;
            Err::<(), _>(error(5))
        });
        assert_eq!((attempts, failed.unwrap_err().exit_code()), (1, 5));
        drop(patience);
        assert!(fullness(events).is_empty());
    }

    #[test]
    fn the_end_of_the_process_is_not_held_up() {
        let (patience, events, stopping) = patience();
        stopping.store(true, Ordering::Release);
        assert_eq!(patience.run("test", || Err::<(), _>(error(24))).unwrap_err().exit_code(), 1);
        drop(patience);
        assert!(fullness(events).is_empty(), "open files are no room");
    }

    #[test]
    fn waiting_ends_when_room_does_not_help() {
        let (tell, _events) = Tell::to_channel();
        let mut waiting = Waiting::begin(Arc::new(Fullness::new(tell)), Lack::Space);
        assert!(waiting.may_help(true));
        waiting.useless_since = Instant::now().checked_sub(USELESS_AFTER);
        assert!(!waiting.may_help(true));
        assert!(waiting.may_help(false), "there is no room: it may help yet");
        assert!(waiting.may_help(true), "counted from when there is room");
    }
}
