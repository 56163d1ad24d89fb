//! A cache of state machines: stores each state and each transition once.
//!
//! The state machines of the engine are pure, so a transition depends on the state and the input
//! alone. It is computed once and then looked up. A state of the whole world is therefore a few
//! numbers, and a search visits millions of them although a machine has some kilobytes of maps and
//! lists.
//!
//! Two states are equal when their *projections* are equal. The projection is the `Debug` text of
//! the machine, which `derive` makes exhaustive: a new field is included automatically. Two kinds
//! of values need care:
//!
//! * **Times** are relative to the current time of the machine. The machines use only differences
//!   of times, so two states that differ by a shift of all times behave in the same way.
//! * **Chains** are unchanged: the chain of an entry *is* its identity, a hash of all entries
//!   before it, and two logs hold the same entry exactly if the chains there are equal.
//!
//! A memtable prints only the number of its counters. Their values are in the text as the digest of
//! the shard, which is exact for the single counter of the worlds here.
//!
//! [`Machines::check_alike`] verifies this during a search: when a state is reached again by
//! another path, the second machine is kept, gets the same inputs as the first, and must do the
//! same.

use std::collections::HashMap;
use std::fmt::{Debug, Write};
use std::hash::Hash;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;

use engine::ids::Now;

use super::frontier::fingerprint;

/// A state machine of the engine with its own clock and disk.
pub trait Machine: Clone + Debug {
    /// An input, as a small value.
    type Input: Copy + Debug + Eq + Hash;
    /// An output that the world handles.
    type Output: Clone + Debug;
    /// The properties of a state that the world needs.
    type Summary: Default;
    /// The settings and values that inputs refer to.
    type Context;

    fn on(&mut self, input: Self::Input, context: &mut Self::Context, out: &mut Vec<Self::Output>);

    fn now(&self) -> Now;

    fn summary(&self) -> Self::Summary;
}

/// The result of one input.
#[derive(Clone, Debug)]
pub struct Transition<O> {
    pub to: u32,
    pub out: Vec<O>,
    /// The text of the failed assertion, if the machine panicked.
    pub panicked: Option<String>,
}

type SharedTransition<M> = Rc<Transition<<M as Machine>::Output>>;

struct KnownState<M: Machine> {
    machine: M,
    summary: M::Summary,
    /// The same state, reached by another path.
    twin: Option<M>,
}

/// Every state of every machine of one kind.
pub struct Machines<M: Machine> {
    known: Vec<KnownState<M>>,
    by_projection: HashMap<u128, u32>,
    done: HashMap<(u32, M::Input), SharedTransition<M>>,
    pub context: M::Context,
    text: String,
    /// The number of transitions that were compared with those of twins; `None` to compare none.
    pub alike: Option<u64>,
}

impl<M: Machine> Machines<M> {
    pub fn new(context: M::Context) -> Self {
        Self {
            known: Vec::new(),
            by_projection: HashMap::new(),
            done: HashMap::new(),
            context,
            text: String::new(),
            alike: None,
        }
    }

    pub fn len(&self) -> usize {
        self.known.len()
    }

    pub fn is_empty(&self) -> bool {
        self.known.is_empty()
    }

    /// Returns the number of this state.
    pub fn number(&mut self, machine: M) -> u32 {
        let projection = self.project(&machine);
        if let Some(&number) = self.by_projection.get(&projection) {
            if self.alike.is_some() {
                self.known[number as usize].twin.get_or_insert(machine);
            }
            return number;
        }
        let number = self.known.len() as u32;
        let summary = machine.summary();
        self.known.push(KnownState { machine, summary, twin: None });
        self.by_projection.insert(projection, number);
        number
    }

    pub fn machine(&self, number: u32) -> &M {
        &self.known[number as usize].machine
    }

    pub fn summary(&self, number: u32) -> &M::Summary {
        &self.known[number as usize].summary
    }

    /// Returns the transition of the machine in this state for this input.
    pub fn on(&mut self, number: u32, input: M::Input) -> SharedTransition<M> {
        if let Some(transition) = self.done.get(&(number, input)) {
            return transition.clone();
        }
        let transition = self.work_out(self.known[number as usize].machine.clone(), input, number);
        if self.alike.is_some() {
            self.check_alike(number, input, &transition);
        }
        let transition = Rc::new(transition);
        self.done.insert((number, input), transition.clone());
        transition
    }

    fn work_out(&mut self, mut machine: M, input: M::Input, number: u32) -> Transition<M::Output> {
        let mut out = Vec::new();
        let handled =
            catch_unwind(AssertUnwindSafe(|| machine.on(input, &mut self.context, &mut out)));
        match handled {
            Ok(()) => Transition { to: self.number(machine), out, panicked: None },
            Err(panic) => {
                let text = panic.downcast_ref::<String>().cloned();
                let text = text.or_else(|| panic.downcast_ref::<&str>().map(|&text| text.into()));
                Transition { to: number, out, panicked: Some(text.unwrap_or_default()) }
            }
        }
    }

    /// Checks that the twin does the same. Otherwise the projection lacks something that matters,
    /// and this panics.
    fn check_alike(&mut self, number: u32, input: M::Input, transition: &Transition<M::Output>) {
        let Some(twin) = self.known[number as usize].twin.clone() else { return };
        let again = self.work_out(twin, input, number);
        assert_eq!(again.to, transition.to, "equal projections, other states after {input:?}");
        let (one, other) = (format!("{:?}", transition.out), format!("{:?}", again.out));
        assert_eq!(one, other, "equal projections, other effects of {input:?}");
        self.alike = self.alike.map(|alike| alike + 1);
    }

    fn project(&mut self, machine: &M) -> u128 {
        self.text.clear();
        write!(self.text, "{machine:?}").expect("a string takes everything");
        fingerprint(&shifted(&self.text, machine.now()))
    }
}

/// Returns the text with every `Now(t)` relative to `now`.
fn shifted(text: &str, now: Now) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find("Now(") {
        let (before, after) = rest.split_at(at + 4);
        let digits = after.bytes().take_while(u8::is_ascii_digit).count();
        let time: i128 = after[..digits].parse().expect("a time is a number");
        out.push_str(before);
        write!(out, "{}", time - i128::from(now.0)).expect("a string takes everything");
        rest = &after[digits..];
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_relative_to_now() {
        assert_eq!(
            shifted("{ a: Now(7), b: Some(Now(12)) }", Now(10)),
            "{ a: Now(-3), b: Some(Now(2)) }"
        );
        assert_eq!(shifted("nothing", Now(10)), "nothing");
    }
}
