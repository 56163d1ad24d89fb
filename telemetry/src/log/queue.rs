//! A queue of lines to be written: bounded in bytes, and pushing never waits for room.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::ThreadId;
use std::time::{Duration, Instant};

use prometheus_client::metrics::counter::Counter;
use tracing::callsite::Identifier;
use tracing::{Level, Metadata};
use tracing_subscriber::fmt::MakeWriter;

use super::repeats::{RepeatFilter, RepeatLimits, SuppressedLines};

/// The limits of a log: memory, and the rate of repeated lines.
#[derive(Clone, Copy, Debug)]
pub(crate) struct QueueLimits {
    /// The most bytes of lines that wait to be written.
    pub(crate) bytes_max: usize,
    /// The interval in which writing is retried after a line could not be written.
    pub(crate) again_after: Duration,
    pub(crate) repeat: RepeatLimits,
}

impl Default for QueueLimits {
    fn default() -> Self {
        let again_after = Duration::from_secs(1);
        Self { bytes_max: 1 << 20, again_after, repeat: RepeatLimits::default() }
    }
}

/// The queue between logging threads and the writer. Clones are cheap and share the lines.
#[derive(Clone, Debug)]
pub(crate) struct LineQueue(Arc<SharedQueue>);

#[derive(Debug)]
struct SharedQueue {
    limits: QueueLimits,
    dropped: Counter,
    state: Mutex<QueueState>,
    /// Signals that there is work for the writer.
    work: Condvar,
    /// Signals that all waiting lines have been written.
    flushed: Condvar,
}

#[derive(Debug)]
struct QueueState {
    lines: VecDeque<Vec<u8>>,
    bytes: usize,
    /// The number of lost lines that the log has not reported yet.
    lost: u64,
    repeats: RepeatFilter,
    /// The lines that the writer itself has logged; it writes them at once.
    own: Vec<Vec<u8>>,
    writer: Option<ThreadId>,
    /// Set while a thread waits in [`LineQueue::flush`].
    flushing: bool,
}

/// The next step of the writer.
#[derive(Debug)]
pub(crate) enum WriterWork {
    Write(Vec<u8>),
    ReportSuppressed(Vec<SuppressedLines>),
    ReportLost(u64),
}

impl LineQueue {
    pub(crate) fn new(limits: QueueLimits, dropped: Counter) -> Self {
        let state = QueueState {
            lines: VecDeque::new(),
            bytes: 0,
            lost: 0,
            repeats: RepeatFilter::new(limits.repeat),
            own: Vec::new(),
            writer: None,
            flushing: false,
        };
        let (work, flushed) = Default::default();
        Self(Arc::new(SharedQueue { limits, dropped, state: Mutex::new(state), work, flushed }))
    }

    /// Queues a line, unless it repeats too often or there is no room.
    fn push(&self, level: Level, place: Identifier, line: &[u8]) {
        let mut state = self.lock();
        if state.writer == Some(std::thread::current().id()) {
            state.own.push(line.to_vec());
            return;
        }
        let was_due = state.repeats.due();
        // Debug lines are never suppressed: at that level all of them are wanted.
        if level <= Level::INFO && !state.repeats.admits(Instant::now(), level, place, line) {
            if was_due.is_none() {
                self.0.work.notify_one();
            }
            return;
        }
        if state.bytes + line.len() > self.0.limits.bytes_max {
            state.lost += 1;
            self.0.dropped.inc();
            return;
        }
        state.bytes += line.len();
        state.lines.push_back(line.to_vec());
        self.0.work.notify_one();
    }

    /// Marks the calling thread as the writer.
    pub(crate) fn begin(&self) {
        self.lock().writer = Some(std::thread::current().id());
    }

    /// Waits for the next step. `works` states whether the last line could be written.
    pub(crate) fn next(&self, works: bool) -> WriterWork {
        let mut state = self.lock();
        let again_at = Instant::now() + self.0.limits.again_after;
        loop {
            let now = Instant::now();
            let repeated = match state.flushing {
                true => state.repeats.take_all(),
                false => state.repeats.take(now),
            };
            if !repeated.is_empty() {
                return WriterWork::ReportSuppressed(repeated);
            }
            if state.lost > 0 && (works || now >= again_at) {
                return WriterWork::ReportLost(state.lost);
            }
            if let Some(line) = state.lines.pop_front() {
                state.bytes -= line.len();
                return WriterWork::Write(line);
            }
            if std::mem::take(&mut state.flushing) {
                self.0.flushed.notify_all();
            }
            let again_at = (state.lost > 0).then_some(again_at);
            let until = [state.repeats.due(), again_at].into_iter().flatten().min();
            state = self.wait(state, until);
        }
    }

    fn wait<'a>(
        &'a self,
        state: MutexGuard<'a, QueueState>,
        until: Option<Instant>,
    ) -> MutexGuard<'a, QueueState> {
        let work = &self.0.work;
        match until {
            None => work.wait(state).unwrap_or_else(PoisonError::into_inner),
            Some(until) => {
                let limit = until.saturating_duration_since(Instant::now());
                work.wait_timeout(state, limit).unwrap_or_else(PoisonError::into_inner).0
            }
        }
    }

    /// Counts lines that could not be written.
    pub(crate) fn lose(&self, lines: u64) {
        self.lock().lost += lines;
        self.0.dropped.inc_by(lines);
    }

    /// Notes that the log has reported so many lost lines.
    pub(crate) fn reported_lost(&self, lines: u64) {
        self.lock().lost -= lines;
    }

    /// Takes the lines that the writer itself has logged since the last call.
    pub(crate) fn take_own(&self) -> Vec<Vec<u8>> {
        std::mem::take(&mut self.lock().own)
    }

    /// Waits until all waiting lines are written and suppressed ones reported, at most for `limit`.
    pub(crate) fn flush(&self, limit: Duration) {
        let mut state = self.lock();
        state.flushing = true;
        self.0.work.notify_one();
        let goes_on = |state: &mut QueueState| state.flushing;
        drop(self.0.flushed.wait_timeout_while(state, limit, goes_on));
    }

    fn lock(&self) -> MutexGuard<'_, QueueState> {
        // Nothing panics while the lock is held.
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A sink for one line; the subscriber writes each line with one call.
#[derive(Debug)]
pub(crate) struct LineSink<'a> {
    queue: &'a LineQueue,
    level: Level,
    place: Identifier,
}

impl io::Write for LineSink<'_> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.queue.push(self.level, self.place.clone(), line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for LineQueue {
    type Writer = LineSink<'a>;

    fn make_writer(&'a self) -> LineSink<'a> {
        unreachable!("the subscriber passes the event's metadata")
    }

    fn make_writer_for(&'a self, event: &Metadata<'_>) -> LineSink<'a> {
        LineSink { queue: self, level: *event.level(), place: event.callsite() }
    }
}
