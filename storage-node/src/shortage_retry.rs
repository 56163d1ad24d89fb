//! Retries of jobs that failed for want of bytes, inodes or open files, until they succeed.
//!
//! A job may be retried only if a failure leaves nothing behind, or nothing that disturbs its next
//! attempt. An append to the log may not: after a failed fdatasync the content of the page cache is
//! unknown. Its failure ends the process, and the next start waits.
//!
//! Retrying ends where it can't help: RocksDB, once it has failed to write its MANIFEST, refuses
//! every change until it is reopened, however much room there is by then. So a job that still fails
//! a while after there is room is given up, and the process ends with the error's own code.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use tracing::{info, warn};

use crate::error::{DiskError, Shortage};
use crate::space::{Fullness, Space, SpaceMin};

/// The pause between two attempts.
const AGAIN_EVERY: Duration = Duration::from_millis(200);
/// The time after which a job is given up that fails although there seems to be room.
const USELESS_AFTER: Duration = Duration::from_secs(60);
/// The interval of log lines about a waiting job.
const LOG_EVERY: Duration = Duration::from_secs(60);

/// The retry policy of disk jobs. Clones are cheap: every thread that touches the disk has one.
#[derive(Clone)]
pub(crate) struct ShortageRetry {
    folder: PathBuf,
    min: SpaceMin,
    fullness: Arc<Fullness>,
    stopping: Arc<AtomicBool>,
}

impl ShortageRetry {
    /// Creates a policy. `stopping` is set when the results of jobs are not needed any more.
    pub(crate) fn new(
        folder: PathBuf,
        min: SpaceMin,
        fullness: Arc<Fullness>,
        stopping: Arc<AtomicBool>,
    ) -> Self {
        Self { folder, min, fullness, stopping }
    }

    /// Runs `attempt` until it succeeds or fails for another reason than a shortage.
    pub(crate) fn run<T>(
        &self,
        job: &'static str,
        mut attempt: impl FnMut() -> Result<T, DiskError>,
    ) -> Result<T, DiskError> {
        let mut waiting: Option<WaitingJob> = None;
        loop {
            let error = match attempt() {
                Ok(done) => {
                    if let Some(waiting) = waiting {
                        info!(
                            job,
                            waited_s = waiting.since.elapsed().as_secs(),
                            "job succeeded after waiting"
                        );
                    }
                    return Ok(done);
                }
                Err(error) => error,
            };
            let Some(shortage) = error.shortage() else { return Err(error) };
            let waits =
                waiting.get_or_insert_with(|| WaitingJob::begin(self.fullness.clone(), shortage));
            if self.stopping.load(Ordering::Acquire) || !waits.may_help(self.has_room(shortage)) {
                return Err(error);
            }
            waits.log(job, &error);
            thread::sleep(AGAIN_EVERY);
        }
    }

    /// Returns whether there seems to be room: a quota can't be seen, nor how many files others
    /// have open.
    fn has_room(&self, shortage: Shortage) -> bool {
        match (shortage, Space::of(&self.folder)) {
            (Shortage::Space, Ok(space)) => !space.is_full(self.min, false),
            _ => true,
        }
    }
}

/// A job that waits. While it exists, the node refuses requests that need room.
struct WaitingJob {
    fullness: Option<Arc<Fullness>>,
    since: Instant,
    /// The time since when there has been room and the job has failed all the same.
    useless_since: Option<Instant>,
    last_logged: Option<Instant>,
}

impl WaitingJob {
    fn begin(fullness: Arc<Fullness>, shortage: Shortage) -> Self {
        // A node without open files has room for the data of its clients.
        let fullness = (shortage == Shortage::Space).then_some(fullness);
        if let Some(fullness) = &fullness {
            fullness.job_waits();
        }
        Self { fullness, since: Instant::now(), useless_since: None, last_logged: None }
    }

    fn may_help(&mut self, has_room: bool) -> bool {
        if !has_room {
            self.useless_since = None;
            return true;
        }
        self.useless_since.get_or_insert_with(Instant::now).elapsed() < USELESS_AFTER
    }

    fn log(&mut self, job: &'static str, error: &DiskError) {
        if self.last_logged.is_none_or(|at| at.elapsed() >= LOG_EVERY) {
            self.last_logged = Some(Instant::now());
            warn!(job, why = error.with_advice(), "job waits for resources");
        }
    }
}

impl Drop for WaitingJob {
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
    use crate::disk_event::EventSink;
    use crate::error::context;

    fn shortage_retry() -> (ShortageRetry, mpsc::Receiver<Event>, Arc<AtomicBool>) {
        let (sink, events) = EventSink::to_channel();
        let stopping = Arc::new(AtomicBool::new(false));
        let fullness = Arc::new(Fullness::new(sink));
        let min = SpaceMin { bytes: 0, inodes: 0 };
        let retry = ShortageRetry::new(std::env::temp_dir(), min, fullness, stopping.clone());
        (retry, events, stopping)
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
        let (retry, events, _) = shortage_retry();
        let mut failures = vec![28, 28];
        let done = retry.run("test", || match failures.pop() {
            Some(errno) => Err(error(errno)),
            None => Ok(7),
        });
        assert_eq!(done.unwrap(), 7);
        drop(retry);
        assert_eq!(fullness(events), [true, false]);
    }

    #[test]
    fn what_is_no_lack_is_not_waited_for() {
        let (retry, events, _) = shortage_retry();
        let mut attempts = 0;
        let failed = retry.run("test", || {
            attempts += 1;
            Err::<(), _>(error(5))
        });
        assert_eq!((attempts, failed.unwrap_err().exit_code()), (1, 5));
        drop(retry);
        assert!(fullness(events).is_empty());
    }

    #[test]
    fn the_end_of_the_process_is_not_held_up() {
        let (retry, events, stopping) = shortage_retry();
        stopping.store(true, Ordering::Release);
        assert_eq!(retry.run("test", || Err::<(), _>(error(24))).unwrap_err().exit_code(), 1);
        drop(retry);
        assert!(fullness(events).is_empty(), "open files are no room");
    }

    #[test]
    fn waiting_ends_when_room_does_not_help() {
        let (sink, _events) = EventSink::to_channel();
        let mut waiting = WaitingJob::begin(Arc::new(Fullness::new(sink)), Shortage::Space);
        assert!(waiting.may_help(true));
        waiting.useless_since = Instant::now().checked_sub(USELESS_AFTER);
        assert!(!waiting.may_help(true));
        assert!(waiting.may_help(false), "there is no room: it may help yet");
        assert!(waiting.may_help(true), "counted from when there is room");
    }
}
