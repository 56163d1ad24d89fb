//! The state that the threads and tasks of one count share.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize};
use std::sync::{Arc, atomic::AtomicBool};
use std::time::{Duration, Instant};

use client::Url;
use tokio::sync::watch;

use super::journal::JournalWriter;

/// The stages in which a count stops.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(super) enum Stop {
    Not,
    /// No batch is sent or sent again; answers to requests in flight are awaited.
    Sending,
    /// Answers are not awaited either: requests in flight may have been applied or not.
    Waiting,
}

/// The shared state of a count.
pub(super) struct CountContext {
    pub(super) path: String,
    pub(super) urls: Vec<Url>,
    /// The maximum time for which a batch is sent again.
    pub(super) give_up: Duration,
    /// The prefix of the tokens.
    pub(super) series: String,
    /// The journal for splits of batches, if there is one.
    pub(super) splits: Option<Mutex<JournalWriter>>,
    /// The maximum number of lines in a batch, which is reduced when a batch was too large.
    pub(super) lines_max: Arc<AtomicUsize>,
    /// Set when nothing more is to be read; lines that were read are still counted.
    pub(super) closed: Arc<AtomicBool>,
    pub(super) stop: watch::Sender<Stop>,
    /// Bytes of the input that were read.
    pub(super) bytes_read: AtomicU64,
    /// Requests that were sent again.
    pub(super) retries: AtomicU64,
    /// Requests that were rejected and wait to be sent again.
    pub(super) waiting: AtomicUsize,
    /// The reason of the last rejection.
    pub(super) reason: Mutex<String>,
    /// Since when no batch was decided.
    pub(super) stall: Mutex<StallTimer>,
}

impl CountContext {
    /// Stops the count so far, or further if it is stopping already.
    pub(super) fn stop(&self, how: Stop) {
        self.stop.send_if_modified(|stop| {
            let is_more = how > *stop;
            *stop = how.max(*stop);
            is_more
        });
    }

    /// Returns whether nothing more may be sent.
    pub(super) fn is_stopped(&self) -> bool {
        *self.stop.borrow() >= Stop::Sending
    }

    /// Waits until the count stops so far.
    pub(super) async fn stopped(&self, how: Stop) {
        // The only error is that the sender was dropped, but `self` owns it.
        let _ = self.stop.subscribe().wait_for(|&stop| stop >= how).await;
    }
}

/// Measures for how long no batch was decided while batches are in flight.
pub(super) struct StallTimer {
    /// Batches in flight.
    batches: usize,
    since: Instant,
}

impl StallTimer {
    /// A timer without batches.
    pub(super) fn new() -> Self {
        Self { batches: 0, since: Instant::now() }
    }

    /// Registers a batch.
    pub(super) fn begin(&mut self) {
        if self.batches == 0 {
            self.since = Instant::now();
        }
        self.batches += 1;
    }

    /// Registers that a batch was decided.
    pub(super) fn end(&mut self) {
        self.batches -= 1;
        self.since = Instant::now();
    }

    /// Returns the time without a decided batch, or `None` if no batch is in flight.
    pub(super) fn stalled_for(&self) -> Option<Duration> {
        (self.batches > 0).then(|| self.since.elapsed())
    }
}
