//! Breadth-first search, level by level, over every state that a world can reach.
//!
//! This is not stateright: a state of the worlds here is a few numbers (the states of the machines
//! are in tables beside it, see [`machines`](super::machines)), so the search needs only a set of
//! fingerprints and a queue. A state is represented by 128 bits: among a billion states the
//! probability that any two share a fingerprint is below 10⁻²⁰.
//!
//! Each fingerprint is stored with the number of the preceding state and of the step that led to
//! it, so a counterexample is replayed from the start.

use std::collections::{BTreeMap, HashMap};
use std::hash::{Hash, Hasher};
use std::time::{Duration, Instant};

/// A world that can be searched.
pub trait SearchWorld {
    type State: Clone + Hash;

    fn initial(&mut self) -> Self::State;

    /// Adds every step that can happen next, always in the same order.
    fn steps(&mut self, from: &Self::State, out: &mut Vec<Step<Self::State>>);

    /// Describes a state for the reader of a trace.
    fn show(&self, state: &Self::State) -> String;
}

/// One step of a world.
pub struct Step<S> {
    pub what: String,
    pub to: S,
    /// The rare situations in this step, which show that the bounds reach them.
    pub sometimes: Vec<&'static str>,
    /// The promise that is broken, if any.
    pub broken: Option<String>,
}

/// The notes about one step while it is taken: rare situations and a broken promise.
#[derive(Default)]
pub(super) struct StepNotes {
    pub(super) sometimes: Vec<&'static str>,
    pub(super) broken: Option<String>,
}

impl StepNotes {
    /// Records a broken promise, unless an earlier one is recorded.
    pub(super) fn broken(&mut self, why: impl Into<String>) {
        self.broken.get_or_insert(why.into());
    }
}

/// The limits of a search.
#[derive(Clone, Copy, Debug)]
pub struct SearchLimits {
    pub time: Duration,
    pub states: usize,
}

/// The result of a search.
#[derive(Debug)]
pub struct SearchResult {
    pub states: usize,
    pub steps: u64,
    /// All states at most so many steps from the start were expanded.
    pub depth: usize,
    /// The number of states that were not expanded. At 0 the whole bounded space was visited.
    pub frontier: usize,
    pub sometimes: BTreeMap<&'static str, u64>,
    pub broken: Option<Counterexample>,
}

#[derive(Debug)]
pub struct Counterexample {
    pub promise: String,
    /// The steps, each with the state after it.
    pub trace: Vec<(String, String)>,
}

/// The origin of a state: the number of the preceding state, and the number of the step.
type StepOrigin = (u32, u32);

pub fn search<W: SearchWorld>(world: &mut W, limits: SearchLimits) -> SearchResult {
    let began = Instant::now();
    let initial = world.initial();
    let mut seen = HashMap::<u128, (), PlainBuildHasher>::default();
    seen.insert(fingerprint(&initial), ());
    let mut came: Vec<StepOrigin> = vec![(0, 0)];
    let mut level = vec![(0u32, initial)];
    let mut found = SearchResult {
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

fn walk<W: SearchWorld>(
    world: &mut W,
    came: &[StepOrigin],
    last: StepOrigin,
) -> Vec<(String, String)> {
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

/// Returns a fingerprint of 128 bits.
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

pub type PlainBuildHasher = std::hash::BuildHasherDefault<PlainHasher>;

#[cfg(test)]
mod tests {
    use super::*;

    /// Counts to `top` by ones and twos; `bad` must never be reached.
    struct Stairs {
        top: u32,
        bad: u32,
    }

    impl SearchWorld for Stairs {
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

    const ENDLESS: SearchLimits =
        SearchLimits { time: Duration::from_secs(60), states: usize::MAX };

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
    fn a_limit_reports_the_rest() {
        let found = search(&mut Stairs { top: 10, bad: 99 }, SearchLimits { states: 5, ..ENDLESS });
        assert!(found.frontier > 0);
        assert!(found.states >= 5);
    }

    #[test]
    fn fingerprints_tell_lists_apart() {
        assert_ne!(fingerprint(&vec![1u8, 2]), fingerprint(&vec![1u8, 2, 0]));
        assert_ne!(fingerprint(&"ab"), fingerprint(&"ba"));
    }
}
