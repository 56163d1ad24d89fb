//! Breadth first, level by level, over every state that a world can reach.
//!
//! Our own and not stateright's: the worlds here give out states that are a few numbers (what a machine
//! is in stands in a table beside them, see [`machines`](super::machines)), and a search over those needs
//! a set of fingerprints and a queue, no more. A state is remembered by 128 bits, so with a billion of
//! them the chance that any two share a fingerprint is below 10⁻²⁰.
//!
//! Beside each fingerprint stand the number of the state before it and which of its steps led here: a
//! counterexample is walked again from the start.

use std::collections::{BTreeMap, HashMap};
use std::hash::{Hash, Hasher};
use std::time::{Duration, Instant};

/// What can be searched.
pub trait World {
    type State: Clone + Hash;

    fn initial(&mut self) -> Self::State;

    /// Everything that can happen next, always in the same order.
    fn steps(&mut self, from: &Self::State, out: &mut Vec<Step<Self::State>>);

    /// A state, for a reader of a trace.
    fn show(&self, state: &Self::State) -> String;
}

/// One thing that happens.
pub struct Step<S> {
    pub what: String,
    pub to: S,
    /// What is worth knowing to be reachable.
    pub sometimes: Vec<&'static str>,
    /// What must hold and does not.
    pub broken: Option<String>,
}

/// How far a search goes.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub time: Duration,
    pub states: usize,
}

/// What a search has found.
#[derive(Debug)]
pub struct Found {
    pub states: usize,
    pub steps: u64,
    /// All states that are so many steps away, or fewer, were looked at.
    pub depth: usize,
    /// States that nothing has been tried from yet. None: all of the bounded space was visited.
    pub frontier: usize,
    pub sometimes: BTreeMap<&'static str, u64>,
    pub broken: Option<Counterexample>,
}

#[derive(Debug)]
pub struct Counterexample {
    pub promise: String,
    /// What happened, and the state after it.
    pub trace: Vec<(String, String)>,
}

/// How a state was first reached: the number of the state before it, and the number of the step.
type From = (u32, u32);

pub fn search<W: World>(world: &mut W, limits: Limits) -> Found {
    let began = Instant::now();
    let initial = world.initial();
    let mut seen = HashMap::<u128, (), Plain>::default();
    seen.insert(fingerprint(&initial), ());
    let mut came: Vec<From> = vec![(0, 0)];
    let mut level = vec![(0u32, initial)];
    let mut found = Found {
        states: 1,
        steps: 0,
        depth: 0,
        frontier: 0,
        sometimes: BTreeMap::new(),
        broken: None,
    };
    let mut out = Vec::new();
    while !level.is_empty() {
        let mut next = Vec::new();
        for (at, (number, state)) in level.iter().enumerate() {
            if came.len() >= limits.states || (at % 256 == 0 && began.elapsed() >= limits.time) {
                found.frontier = level.len() - at + next.len();
                found.states = came.len();
                return found;
            }
            out.clear();
            world.steps(state, &mut out);
            for (choice, step) in out.drain(..).enumerate() {
                found.steps += 1;
                for what in &step.sometimes {
                    *found.sometimes.entry(what).or_default() += 1;
                }
                let came_from = (*number, choice as u32);
                if let Some(promise) = step.broken {
                    found.states = came.len();
                    found.frontier = level.len() - at + next.len();
                    let trace = walk(world, &came, came_from);
                    found.broken = Some(Counterexample { promise, trace });
                    return found;
                }
                if seen.insert(fingerprint(&step.to), ()).is_none() {
                    next.push((came.len() as u32, step.to));
                    came.push(came_from);
                }
            }
        }
        level = next;
        found.depth += 1;
    }
    found.states = came.len();
    found
}

fn walk<W: World>(world: &mut W, came: &[From], last: From) -> Vec<(String, String)> {
    let mut choices = vec![last.1];
    let mut at = last.0;
    while at != 0 {
        let (before, choice) = came[at as usize];
        choices.push(choice);
        at = before;
    }
    let mut state = world.initial();
    let mut trace = Vec::new();
    for &choice in choices.iter().rev() {
        let mut out = Vec::new();
        world.steps(&state, &mut out);
        let step = out.swap_remove(choice as usize);
        trace.push((step.what, world.show(&step.to)));
        state = step.to;
    }
    trace
}

/// 128 bits of anything.
pub fn fingerprint(of: &impl Hash) -> u128 {
    let mut hasher = Wide::default();
    of.hash(&mut hasher);
    hasher.sum()
}

/// Two running sums of 64 bits each, mixed differently.
#[derive(Default)]
struct Wide {
    a: u64,
    b: u64,
}

impl Wide {
    fn sum(&self) -> u128 {
        let finish = |x: u64| (x ^ x >> 32).wrapping_mul(0xD6E8_FEB8_6659_FD93);
        let (a, b) = (finish(finish(self.a)), finish(finish(self.b)));
        u128::from(a) << 64 | u128::from(b)
    }

    fn word(&mut self, word: u64) {
        let folded = |sum: u64, by: u64| {
            let mixed = (sum.rotate_left(23) ^ word).wrapping_add(by);
            let wide = u128::from(mixed) * 0xD6E8_FEB8_6659_FD93;
            (wide >> 64) as u64 ^ wide as u64
        };
        (self.a, self.b) =
            (folded(self.a, 0x9E37_79B9_7F4A_7C15), folded(self.b, 0x2545_F491_4F6C_DD1D));
    }
}

impl Hasher for Wide {
    fn finish(&self) -> u64 {
        self.a
    }

    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.word(u64::from_le_bytes(word) ^ (chunk.len() as u64) << 56);
        }
    }

    fn write_u8(&mut self, n: u8) {
        self.word(n.into());
    }

    fn write_u16(&mut self, n: u16) {
        self.word(n.into());
    }

    fn write_u32(&mut self, n: u32) {
        self.word(n.into());
    }

    fn write_u64(&mut self, n: u64) {
        self.word(n);
    }

    fn write_usize(&mut self, n: usize) {
        self.word(n as u64);
    }
}

/// A fingerprint is its own hash.
#[derive(Default)]
pub struct PlainHasher(u64);

impl Hasher for PlainHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.0 = self.0 << 8 | u64::from(byte);
        }
    }

    fn write_u128(&mut self, n: u128) {
        self.0 = n as u64;
    }
}

pub type Plain = std::hash::BuildHasherDefault<PlainHasher>;

#[cfg(test)]
mod tests {
    use super::*;

    /// Counts to `top` by ones and twos; `bad` must never be reached.
    struct Stairs {
        top: u32,
        bad: u32,
    }

    impl World for Stairs {
        type State = u32;

        fn initial(&mut self) -> u32 {
            0
        }

        fn steps(&mut self, &from: &u32, out: &mut Vec<Step<u32>>) {
            for to in (from + 1..=from + 2).filter(|&to| to <= self.top) {
                let broken = (to == self.bad).then(|| format!("{to} is reached"));
                let sometimes = if to == self.top { vec!["top"] } else { vec![] };
                out.push(Step { what: format!("+{}", to - from), to, sometimes, broken });
            }
        }

        fn show(&self, state: &u32) -> String {
            state.to_string()
        }
    }

    const ENDLESS: Limits = Limits { time: Duration::from_secs(60), states: usize::MAX };

    #[test]
    fn every_state_is_visited_once() {
        let found = search(&mut Stairs { top: 10, bad: 99 }, ENDLESS);
        assert_eq!((found.states, found.steps, found.frontier), (11, 19, 0));
        assert_eq!((found.depth, found.sometimes["top"]), (6, 2));
        assert!(found.broken.is_none());
    }

    #[test]
    fn a_counterexample_is_the_shortest_way_there() {
        let found = search(&mut Stairs { top: 10, bad: 5 }, ENDLESS);
        let trace = found.broken.unwrap().trace;
        assert_eq!(trace.len(), 3);
        assert_eq!(trace.last().unwrap().1, "5");
    }

    #[test]
    fn a_limit_says_what_is_left() {
        let found = search(&mut Stairs { top: 10, bad: 99 }, Limits { states: 5, ..ENDLESS });
        assert!(found.frontier > 0);
        assert!(found.states >= 5);
    }

    #[test]
    fn fingerprints_tell_lists_apart() {
        assert_ne!(fingerprint(&vec![1u8, 2]), fingerprint(&vec![1u8, 2, 0]));
        assert_ne!(fingerprint(&"ab"), fingerprint(&"ba"));
    }
}
