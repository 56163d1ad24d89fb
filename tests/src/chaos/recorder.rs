//! The history: every request of every client and its outcome, in memory for the checkers and on
//! disk as JSON lines for people.
//!
//! One lock assigns each request and each answer a step, so the steps are ordered as the events
//! were: a request gets its step before it is sent, an answer after it has arrived. An operation
//! can only look longer than it was, which is safe for every checker.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::sync::{Mutex, MutexGuard};
use std::time::Instant;

use serde_json::{Value, json};

use crate::sim::history::{Ask, ClientHistory, CounterUse, OpOutcome};

pub struct Recorder {
    begun: Instant,
    inner: Mutex<RecorderState>,
}

struct RecorderState {
    history: ClientHistory,
    step: u64,
    lines: BufWriter<File>,
}

impl Recorder {
    pub fn new(path: &Path) -> std::io::Result<Self> {
        let lines = BufWriter::new(File::create(path)?);
        let inner = Mutex::new(RecorderState { history: ClientHistory::default(), step: 0, lines });
        Ok(Self { begun: Instant::now(), inner })
    }

    /// Microseconds since the run began: the clock of the history.
    pub fn now(&self) -> u64 {
        self.begun.elapsed().as_micros() as u64
    }

    pub fn new_counter(&self, used: CounterUse) -> usize {
        self.lock().history.new_counter(used)
    }

    /// Returns the number of counters; the n-th has the key `c{n}`.
    pub fn counters(&self) -> usize {
        self.lock().history.counters.len()
    }

    pub fn ask(&self, counter: usize, ask: Ask) -> usize {
        let mut inner = self.lock();
        inner.step += 1;
        let step = inner.step;
        inner.history.ask(step, counter, ask)
    }

    /// Records the outcome of an operation. `sends` lists the outcome of each of its requests, for
    /// readers of the file only.
    pub fn answer(&self, id: usize, outcome: OpOutcome, sends: &Value) {
        let now = self.now();
        let mut inner = self.lock();
        inner.step += 1;
        let step = inner.step;
        inner.history.answer(step, now, id, outcome);
        let op = &inner.history.ops[id];
        let key =
            String::from_utf8_lossy(inner.history.counters[op.counter].key.key()).into_owned();
        let line = json!({
            "op": id, "key": key, "ask": format!("{:?}", op.ask), "asked": op.asked,
            "answered": step,
            "us": now, "outcome": format!("{outcome:?}"), "sends": sends,
        });
        write_line(&mut inner.lines, &line);
    }

    /// Records another event, such as a fault or an answer that violates the contract.
    pub fn note(&self, what: &Value) {
        let now = self.now();
        write_line(&mut self.lock().lines, &json!({"us": now, "note": what}));
    }

    /// Flushes the file and returns the whole history. The clients must have stopped.
    pub fn finish(&self) -> ClientHistory {
        let mut inner = self.lock();
        if let Err(error) = inner.lines.flush() {
            crate::note(&format!("the history file is incomplete: {error}"));
        }
        std::mem::take(&mut inner.history)
    }

    fn lock(&self) -> MutexGuard<'_, RecorderState> {
        self.inner.lock().unwrap_or_else(|failed| failed.into_inner())
    }
}

fn write_line(lines: &mut BufWriter<File>, line: &Value) {
    // The checkers read from memory; a full disk of this machine must not end the run.
    let _seen_by_finish = writeln!(lines, "{line}");
}
