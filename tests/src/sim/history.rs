//! The requests of clients and their answers: all that a checker of promises needs.

use engine::key::CounterKey;

/// A request of a client about one counter.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Ask {
    Add { delta: i64 },
    AddReturning { delta: i64 },
    Delete,
    Read,
}

/// The answer to a request.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum OpOutcome {
    /// The operation was applied; with the value, for all but plain adds.
    Applied(Option<i128>),
    /// A read returned a value that contains all that was acknowledged by this virtual time.
    Stale {
        value: i128,
        as_of: u64,
    },
    /// The operation had no effect and never will.
    NotApplied,
    Unknown,
}

/// One operation. The steps of the run order the actions of clients: finer than time, and never
/// equal.
#[derive(Clone, Debug)]
pub struct ClientOp {
    pub counter: usize,
    pub ask: Ask,
    pub asked: u64,
    /// The step and the answer; `None`: never answered.
    pub answer: Option<(u64, OpOutcome)>,
    /// The virtual time of the answer.
    pub answered_at: u64,
}

impl ClientOp {
    /// The outcome and when it came, if it is known.
    pub fn applied(&self) -> Option<(u64, Option<i128>)> {
        match self.answer {
            Some((at, OpOutcome::Applied(value))) => Some((at, value)),
            _ => None,
        }
    }

    pub fn is_refused(&self) -> bool {
        matches!(self.answer, Some((_, OpOutcome::NotApplied)))
    }
}

/// The way in which a counter is used, and so how it is checked.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum CounterUse {
    /// The i-th add has delta 4^i: a value names the set of adds it contains.
    Digits,
    /// As `Digits`, by requests with a token: see `checker/tokens.rs`.
    Tokens,
    /// Few operations of every kind, for an exhaustive search.
    Mixed,
}

/// Deltas are `i64`, so from 4^0 to 4^30.
pub const DIGITS_MAX: u32 = 31;
pub const MIXED_MAX: usize = 18;

#[derive(Clone, Debug)]
pub struct TrackedCounter {
    pub key: CounterKey,
    pub used: CounterUse,
    /// Number of adds so far.
    pub adds: u32,
    pub ops: Vec<usize>,
}

#[derive(Clone, Debug, Default)]
pub struct ClientHistory {
    pub ops: Vec<ClientOp>,
    pub counters: Vec<TrackedCounter>,
    name_bytes: usize,
}

impl ClientHistory {
    /// Names are filled up to this many bytes.
    pub fn with_names(name_bytes: usize) -> Self {
        Self { name_bytes, ..Self::default() }
    }

    pub fn new_counter(&mut self, used: CounterUse) -> usize {
        self.new_counter_in(b"sim", used)
    }

    pub fn new_counter_in(&mut self, namespace: &[u8], used: CounterUse) -> usize {
        let name = format!("{:-<1$}", format!("c{}", self.counters.len()), self.name_bytes);
        let key = CounterKey::new(namespace, name.as_bytes()).expect("a short plain name");
        self.counters.push(TrackedCounter { key, used, adds: 0, ops: Vec::new() });
        self.counters.len() - 1
    }

    pub fn ask(&mut self, step: u64, counter: usize, ask: Ask) -> usize {
        let id = self.ops.len();
        self.ops.push(ClientOp { counter, ask, asked: step, answer: None, answered_at: 0 });
        self.counters[counter].ops.push(id);
        id
    }

    /// Records an answer; only the first one counts.
    pub fn answer(&mut self, step: u64, now: u64, id: usize, outcome: OpOutcome) {
        let op = &mut self.ops[id];
        if op.answer.is_none() {
            op.answered_at = now;
            op.answer = Some((step, outcome));
        }
    }

    pub fn of(&self, counter: usize) -> impl Iterator<Item = &ClientOp> {
        self.counters[counter].ops.iter().map(|&id| &self.ops[id])
    }
}
