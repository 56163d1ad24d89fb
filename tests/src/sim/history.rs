//! What clients asked and were told: all that a checker of promises needs to see.

use engine::key::CounterKey;

/// What a client asks of one counter.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Ask {
    Add { delta: i64 },
    AddReturning { delta: i64 },
    Delete,
    Read,
}

/// What it was told.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Outcome {
    /// Done; with the value, for all but plain adds.
    Applied(Option<i128>),
    /// A read was told a value that holds all that was acknowledged by this virtual time.
    Stale {
        value: i128,
        as_of: u64,
    },
    /// It had no effect and never will.
    NotApplied,
    Unknown,
}

/// Steps of the run order what clients do: finer than time, and never equal.
#[derive(Clone, Debug)]
pub struct Op {
    pub counter: usize,
    pub ask: Ask,
    pub asked: u64,
    /// None: never answered.
    pub answer: Option<(u64, Outcome)>,
    /// The virtual time of the answer.
    pub told_at: u64,
}

impl Op {
    /// The outcome and when it came, if it is not "unknown".
    pub fn applied(&self) -> Option<(u64, Option<i128>)> {
        match self.answer {
            Some((at, Outcome::Applied(value))) => Some((at, value)),
            _ => None,
        }
    }

    pub fn is_refused(&self) -> bool {
        matches!(self.answer, Some((_, Outcome::NotApplied)))
    }
}

/// How a counter is used, and so how it is checked.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Use {
    /// The i-th add has delta 4^i: a value names the set of adds it contains.
    Digits,
    /// As `Digits`, by requests with a token: see `checker/tokens.rs`.
    Tokens,
    /// Few operations of every kind, for an exhaustive search.
    Mixed,
}

/// i64 deltas, so 4^0 to 4^30.
pub const DIGITS_MAX: u32 = 31;
pub const MIXED_MAX: usize = 18;

#[derive(Clone, Debug)]
pub struct Counter {
    pub key: CounterKey,
    pub used: Use,
    /// Number of adds so far.
    pub adds: u32,
    pub ops: Vec<usize>,
}

#[derive(Clone, Debug, Default)]
pub struct History {
    pub ops: Vec<Op>,
    pub counters: Vec<Counter>,
    name_bytes: usize,
}

impl History {
    /// Names are filled up to this many bytes.
    pub fn with_names(name_bytes: usize) -> Self {
        Self { name_bytes, ..Self::default() }
    }

    pub fn new_counter(&mut self, used: Use) -> usize {
        self.new_counter_in(b"sim", used)
    }

    pub fn new_counter_in(&mut self, namespace: &[u8], used: Use) -> usize {
        let name = format!("{:-<1$}", format!("c{}", self.counters.len()), self.name_bytes);
        let key = CounterKey::new(namespace, name.as_bytes()).expect("a short plain name");
        self.counters.push(Counter { key, used, adds: 0, ops: Vec::new() });
        self.counters.len() - 1
    }

    pub fn ask(&mut self, step: u64, counter: usize, ask: Ask) -> usize {
        let id = self.ops.len();
        self.ops.push(Op { counter, ask, asked: step, answer: None, told_at: 0 });
        self.counters[counter].ops.push(id);
        id
    }

    /// The first answer counts.
    pub fn answer(&mut self, step: u64, now: u64, id: usize, outcome: Outcome) {
        let op = &mut self.ops[id];
        if op.answer.is_none() {
            op.told_at = now;
            op.answer = Some((step, outcome));
        }
    }

    pub fn of(&self, counter: usize) -> impl Iterator<Item = &Op> {
        self.counters[counter].ops.iter().map(|&id| &self.ops[id])
    }
}
