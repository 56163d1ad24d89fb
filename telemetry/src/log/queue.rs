//! Lines that wait to be written: bounded in bytes, and nobody waits for room.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::ThreadId;
use std::time::{Duration, Instant};

use prometheus_client::metrics::counter::Counter;
use tracing::callsite::Identifier;
use tracing::{Level, Metadata};
use tracing_subscriber::fmt::MakeWriter;

use super::repeats::{Often, Repeated, Repeats};

/// What of a log is kept in memory, and how often a line may be said.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Of lines that wait.
    pub(crate) bytes_max: usize,
    /// After a line could not be written, whether lines can be is tried again this often.
    pub(crate) again_after: Duration,
    pub(crate) often: Often,
}

impl Default for Limits {
    fn default() -> Self {
        let again_after = Duration::from_secs(1);
        Self { bytes_max: 1 << 20, again_after, often: Often::default() }
    }
}

/// Cheap to clone; clones share the lines.
#[derive(Clone, Debug)]
pub(crate) struct Queue(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    limits: Limits,
    dropped: Counter,
    state: Mutex<State>,
    /// There is work for the writer.
    work: Condvar,
    /// All that was waiting has been written.
    flushed: Condvar,
}

#[derive(Debug)]
struct State {
    lines: VecDeque<Vec<u8>>,
    bytes: usize,
    /// Lines lost of which the log does not tell yet.
    lost: u64,
    repeats: Repeats,
    /// What the writer itself says goes here: it writes that at once.
    own: Vec<Vec<u8>>,
    writer: Option<ThreadId>,
    /// Somebody waits until nothing waits any more.
    flushing: bool,
}

/// What the writer is to do next.
#[derive(Debug)]
pub(crate) enum Work {
    Write(Vec<u8>),
    TellRepeated(Vec<Repeated>),
    TellLost(u64),
}

impl Queue {
    pub(crate) fn new(limits: Limits, dropped: Counter) -> Self {
        let state = State {
            lines: VecDeque::new(),
            bytes: 0,
            lost: 0,
            repeats: Repeats::new(limits.often),
            own: Vec::new(),
            writer: None,
            flushing: false,
        };
        let (work, flushed) = Default::default();
        Self(Arc::new(Shared { limits, dropped, state: Mutex::new(state), work, flushed }))
    }

    /// A line to be written, unless it is said too often or there is no room.
    fn push(&self, level: Level, place: Identifier, line: &[u8]) {
        let mut state = self.lock();
        if state.writer == Some(std::thread::current().id()) {
            state.own.push(line.to_vec());
            return;
        }
        let was_due = state.repeats.due();
        // Whoever wants debugging wants all of it.
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

    /// The calling thread is the writer.
    pub(crate) fn begin(&self) {
        self.lock().writer = Some(std::thread::current().id());
    }

    /// Waits for the next thing to do. `works`: the last line could be written.
    pub(crate) fn next(&self, works: bool) -> Work {
        let mut state = self.lock();
        let again_at = Instant::now() + self.0.limits.again_after;
        loop {
            let now = Instant::now();
            let repeated = match state.flushing {
                true => state.repeats.take_all(),
                false => state.repeats.take(now),
            };
            if !repeated.is_empty() {
                return Work::TellRepeated(repeated);
            }
            if state.lost > 0 && (works || now >= again_at) {
                return Work::TellLost(state.lost);
            }
            if let Some(line) = state.lines.pop_front() {
                state.bytes -= line.len();
                return Work::Write(line);
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
        state: MutexGuard<'a, State>,
        until: Option<Instant>,
    ) -> MutexGuard<'a, State> {
        let work = &self.0.work;
        match until {
            None => work.wait(state).unwrap_or_else(PoisonError::into_inner),
            Some(until) => {
                let limit = until.saturating_duration_since(Instant::now());
                work.wait_timeout(state, limit).unwrap_or_else(PoisonError::into_inner).0
            }
        }
    }

    /// Lines that could not be written.
    pub(crate) fn lose(&self, lines: u64) {
        self.lock().lost += lines;
        self.0.dropped.inc_by(lines);
    }

    /// The log has told that so many lines were lost.
    pub(crate) fn told_lost(&self, lines: u64) {
        self.lock().lost -= lines;
    }

    /// What the writer has said since.
    pub(crate) fn take_own(&self) -> Vec<Vec<u8>> {
        std::mem::take(&mut self.lock().own)
    }

    /// Waits until what waits is written, repetitions told; not longer than `limit`.
    pub(crate) fn flush(&self, limit: Duration) {
        let mut state = self.lock();
        state.flushing = true;
        self.0.work.notify_one();
        let goes_on = |state: &mut State| state.flushing;
        drop(self.0.flushed.wait_timeout_while(state, limit, goes_on));
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics while it is held.
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Takes one line; the subscriber writes each with one call.
#[derive(Debug)]
pub(crate) struct Line<'a> {
    queue: &'a Queue,
    level: Level,
    place: Identifier,
}

impl io::Write for Line<'_> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.queue.push(self.level, self.place.clone(), line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Queue {
    type Writer = Line<'a>;

    fn make_writer(&'a self) -> Line<'a> {
        unreachable!("the subscriber says for which event it wants a writer")
    }

    fn make_writer_for(&'a self, event: &Metadata<'_>) -> Line<'a> {
        Line { queue: self, level: *event.level(), place: event.callsite() }
    }
}
