//! What the threads and tasks of one count share.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize};
use std::sync::{Arc, atomic::AtomicBool};
use std::time::{Duration, Instant};

use bench::http::Url;
use tokio::sync::watch;

use super::journal::Notes;

/// How far a count has been told to stop.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(super) enum Stop {
    Not,
    /// Nothing more is taken up or sent, and nothing refused is sent again. What was sent is waited for.
    Sending,
    /// Nor is that: it may have been applied or not.
    Waiting,
}

pub(super) struct Shared {
    pub(super) path: String,
    pub(super) urls: Vec<Url>,
    pub(super) give_up: Duration,
    /// What the tokens begin with.
    pub(super) series: String,
    /// Where is noted that a batch was split, if anywhere.
    pub(super) splits: Option<Mutex<Notes>>,
    /// Lines in a batch; fewer once one was too large.
    pub(super) lines_max: Arc<AtomicUsize>,
    /// Nothing more is read; what was read is still counted.
    pub(super) closed: Arc<AtomicBool>,
    pub(super) stop: watch::Sender<Stop>,
    pub(super) bytes_read: AtomicU64,
    pub(super) retries: AtomicU64,
    /// Requests that were refused and wait to be sent again …
    pub(super) waiting: AtomicUsize,
    /// … and why the last of them was.
    pub(super) reason: Mutex<String>,
    pub(super) busy: Mutex<Busy>,
}

impl Shared {
    pub(super) fn stop(&self, how: Stop) {
        self.stop.send_if_modified(|stop| {
            let is_more = how > *stop;
            *stop = how.max(*stop);
            is_more
        });
    }

    pub(super) fn is_stopped(&self) -> bool {
        *self.stop.borrow() >= Stop::Sending
    }

    pub(super) async fn stopped(&self, how: Stop) {
        // An error would mean that the sender is gone, and it is right here.
        let _ = self.stop.subscribe().wait_for(|&stop| stop >= how).await;
    }
}

/// Since when nothing was decided although something is to be.
pub(super) struct Busy {
    /// Batches that are under way.
    batches: usize,
    since: Instant,
}

impl Busy {
    pub(super) fn new() -> Self {
        Self { batches: 0, since: Instant::now() }
    }

    pub(super) fn begin(&mut self) {
        if self.batches == 0 {
            self.since = Instant::now();
        }
        self.batches += 1;
    }

    pub(super) fn end(&mut self) {
        self.batches -= 1;
        self.since = Instant::now();
    }

    pub(super) fn waits(&self) -> Option<Duration> {
        (self.batches > 0).then(|| self.since.elapsed())
    }
}
