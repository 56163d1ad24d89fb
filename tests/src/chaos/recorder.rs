//! The history: what every client asked and was told, in memory for the checkers, on disk as JSON
//! lines for people.
//!
//! One lock gives each question and each answer its step, so steps order them as they happened: the
//! question's before it leaves, the answer's after it has come. That can only make an operation
//! longer than it was, which no checker minds.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::sync::{Mutex, MutexGuard};
use std::time::Instant;

use serde_json::{Value, json};

use crate::sim::history::{Ask, History, Outcome, Use};

pub struct Recorder {
    begun: Instant,
    inner: Mutex<Inner>,
}

struct Inner {
    history: History,
    step: u64,
    lines: BufWriter<File>,
}

impl Recorder {
    pub fn new(path: &Path) -> std::io::Result<Self> {
        let lines = BufWriter::new(File::create(path)?);
        let inner = Mutex::new(Inner { history: History::default(), step: 0, lines });
        Ok(Self { begun: Instant::now(), inner })
    }

    /// Microseconds since the run began: the clock of the history.
    pub fn now(&self) -> u64 {
        self.begun.elapsed().as_micros() as u64
    }

    pub fn new_counter(&self, used: Use) -> usize {
        self.lock().history.new_counter(used)
    }

    /// How many there are; the n-th has the key `c{n}`.
    pub fn counters(&self) -> usize {
        self.lock().history.counters.len()
    }

    pub fn ask(&self, counter: usize, ask: Ask) -> usize {
        let mut inner = self.lock();
        inner.step += 1;
        let step = inner.step;
        inner.history.ask(step, counter, ask)
    }

    /// `sends`: what each of its requests came to, for whoever reads the file.
    pub fn answer(&self, id: usize, outcome: Outcome, sends: &Value) {
        let now = self.now();
        let mut inner = self.lock();
        inner.step += 1;
        let step = inner.step;
        inner.history.answer(step, now, id, outcome);
        let op = &inner.history.ops[id];
        let key =
            String::from_utf8_lossy(inner.history.counters[op.counter].key.key()).into_owned();
        let line = json!({
            "op": id, "key": key, "ask": format!("{:?}", op.ask), "asked": op.asked, "answered": step,
            "us": now, "outcome": format!("{outcome:?}"), "sends": sends,
        });
        write_line(&mut inner.lines, &line);
    }

    /// Something else that happened: a fault, a surprise.
    pub fn note(&self, what: &Value) {
        let now = self.now();
        write_line(&mut self.lock().lines, &json!({"us": now, "note": what}));
    }

    /// All of it, once nobody asks any more.
    pub fn finish(&self) -> History {
        let mut inner = self.lock();
        if let Err(error) = inner.lines.flush() {
            crate::note(&format!("the history's file is not whole: {error}"));
        }
        std::mem::take(&mut inner.history)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(|failed| failed.into_inner())
    }
}

fn write_line(lines: &mut BufWriter<File>, line: &Value) {
    // What the checkers read is in memory; a full disk of this machine must not end the run.
    let _seen_by_finish = writeln!(lines, "{line}");
}
