//! Machines, each state of each kept once, and what each does kept too.
//!
//! The machines of the engine are pure, so what one does depends on its state and the event alone: it is
//! worked out once and looked up ever after. A state of the whole world is then a handful of numbers, and
//! a search goes through millions of them although a machine is some kilobytes of maps and lists.
//!
//! Two states are taken for one when their *projection* is the same. That is the machine's own `Debug`
//! text, which `derive` makes exhaustive: a field added tomorrow is in it. Two things are made alike in it:
//!
//! * **Times** are told from the machine's own now. The machines only ever look at how far apart two
//!   moments are, so two states that differ by a shift of all times act alike.
//! * **Chains** stay what they are: the chain of an entry *is* its identity, a hash of all before it, and
//!   two logs hold the same entry exactly if the chains there are the same.
//!
//! A table prints the number of its counters only; what they hold stands in the text as the shard's
//! digest, which is exact for the one counter that a world here has.
//!
//! [`Machines::check_alike`] is the proof on the way: whenever a state is reached again by another way,
//! the newcomer is kept for a while, does what the first one did, and must do the same.

use std::collections::HashMap;
use std::fmt::{Debug, Write};
use std::hash::Hash;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;

use engine::ids::Now;

use super::frontier::fingerprint;

/// A machine with what belongs to it alone: its clock, its disk.
pub trait Machine: Clone + Debug {
    /// What can happen to it, small.
    type Cause: Copy + Debug + Eq + Hash;
    /// What the world sees of it.
    type Out: Clone + Debug;
    /// What the world wants to know of a state.
    type Face: Default;
    /// What causes refer to.
    type Table;

    fn on(&mut self, cause: Self::Cause, table: &mut Self::Table, out: &mut Vec<Self::Out>);

    fn now(&self) -> Now;

    fn face(&self) -> Self::Face;
}

/// What became of a machine.
#[derive(Clone, Debug)]
pub struct Did<O> {
    pub to: u32,
    pub out: Vec<O>,
    /// It broke an assertion of its own.
    pub panicked: Option<String>,
}

type Outcome<M> = Rc<Did<<M as Machine>::Out>>;

struct Known<M: Machine> {
    machine: M,
    face: M::Face,
    /// The same state by another way.
    twin: Option<M>,
}

/// Every state of every machine of one kind.
pub struct Machines<M: Machine> {
    known: Vec<Known<M>>,
    by_projection: HashMap<u128, u32>,
    done: HashMap<(u32, M::Cause), Outcome<M>>,
    pub table: M::Table,
    text: String,
    /// Look at twins: how many steps were compared.
    pub alike: Option<u64>,
}

impl<M: Machine> Machines<M> {
    pub fn new(table: M::Table) -> Self {
        Self {
            known: Vec::new(),
            by_projection: HashMap::new(),
            done: HashMap::new(),
            table,
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

    /// The number of this state.
    pub fn number(&mut self, machine: M) -> u32 {
        let projection = self.project(&machine);
        if let Some(&number) = self.by_projection.get(&projection) {
            if self.alike.is_some() {
                self.known[number as usize].twin.get_or_insert(machine);
            }
            return number;
        }
        let number = self.known.len() as u32;
        let face = machine.face();
        self.known.push(Known { machine, face, twin: None });
        self.by_projection.insert(projection, number);
        number
    }

    pub fn machine(&self, number: u32) -> &M {
        &self.known[number as usize].machine
    }

    pub fn face(&self, number: u32) -> &M::Face {
        &self.known[number as usize].face
    }

    /// What the machine in this state does.
    pub fn on(&mut self, number: u32, cause: M::Cause) -> Outcome<M> {
        if let Some(did) = self.done.get(&(number, cause)) {
            return did.clone();
        }
        let did = self.work_out(self.known[number as usize].machine.clone(), cause, number);
        if self.alike.is_some() {
            self.check_alike(number, cause, &did);
        }
        let did = Rc::new(did);
        self.done.insert((number, cause), did.clone());
        did
    }

    fn work_out(&mut self, mut machine: M, cause: M::Cause, number: u32) -> Did<M::Out> {
        let mut out = Vec::new();
        let handled =
            catch_unwind(AssertUnwindSafe(|| machine.on(cause, &mut self.table, &mut out)));
        match handled {
            Ok(()) => Did { to: self.number(machine), out, panicked: None },
            Err(panic) => {
                let text = panic.downcast_ref::<String>().cloned();
                let text = text.or_else(|| panic.downcast_ref::<&str>().map(|&text| text.into()));
                Did { to: number, out, panicked: Some(text.unwrap_or_default()) }
            }
        }
    }

    /// Its twin does the same. Panics if it does not: the projection leaves out something that matters.
    fn check_alike(&mut self, number: u32, cause: M::Cause, did: &Did<M::Out>) {
        let Some(twin) = self.known[number as usize].twin.clone() else { return };
        let again = self.work_out(twin, cause, number);
        assert_eq!(again.to, did.to, "equal projections, other states after {cause:?}");
        let (one, other) = (format!("{:?}", did.out), format!("{:?}", again.out));
        assert_eq!(one, other, "equal projections, other effects of {cause:?}");
        self.alike = self.alike.map(|alike| alike + 1);
    }

    fn project(&mut self, machine: &M) -> u128 {
        self.text.clear();
        write!(self.text, "{machine:?}").expect("a string takes everything");
        fingerprint(&shifted(&self.text, machine.now()))
    }
}

/// The text with every `Now(t)` told from `now`.
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
    fn times_are_told_from_now() {
        assert_eq!(
            shifted("{ a: Now(7), b: Some(Now(12)) }", Now(10)),
            "{ a: Now(-3), b: Some(Now(2)) }"
        );
        assert_eq!(shifted("nothing", Now(10)), "nothing");
    }
}
