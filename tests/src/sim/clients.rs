//! The workload: clients that count, read and wait, each with one operation in flight.

use super::core::Core;
use super::event::SimEvent;
use super::history::{Ask, ClientHistory, CounterUse, DIGITS_MAX, MIXED_MAX, OpOutcome};
use super::place::Place;
use super::request::{ClientReply, ClientRequest};
use super::rng::Rng;

pub struct Clients {
    pub history: ClientHistory,
    /// The counters in use.
    digits: Vec<usize>,
    mixed: Vec<usize>,
    /// The client that waits for each operation, by operation.
    waiting: std::collections::BTreeMap<usize, usize>,
    finals: Finals,
    /// The stream that decides which reads may be stale.
    staleness: Rng,
}

/// The reads at the end: each counter is read until it answers.
#[derive(Default)]
struct Finals {
    begun: bool,
    left: std::collections::BTreeSet<usize>,
}

const FINAL: usize = usize::MAX;
/// A pause between final reads: one that is refused at once would otherwise repeat forever at one
/// moment.
const FINAL_PAUSE: u64 = 20_000;
/// The interval at which a client retries while the workload pauses.
pub const REST: u64 = 5_000;

impl Clients {
    pub fn new(core: &mut Core) -> Self {
        let mut history = ClientHistory::with_names(core.plan.name_bytes);
        let digits = (0..core.plan.digit_counters)
            .map(|_| history.new_counter(CounterUse::Digits))
            .collect();
        let mixed =
            (0..core.plan.mixed_counters).map(|_| history.new_counter(CounterUse::Mixed)).collect();
        for client in 0..core.plan.clients {
            let first = core.rng.between(200_000, 400_000);
            core.after(first, SimEvent::Client { client });
        }
        let waiting = std::collections::BTreeMap::new();
        let staleness = core.plan.staleness.clone();
        Self { history, digits, mixed, waiting, finals: Finals::default(), staleness }
    }

    pub fn in_flight(&self) -> usize {
        self.waiting.len()
    }

    /// A client begins its next operation.
    pub fn ask(&mut self, core: &mut Core, client: usize) {
        if client == FINAL || core.now >= core.plan.load_until {
            return;
        }
        if core.at_rest {
            return core.after(REST, SimEvent::Client { client });
        }
        let (counter, ask) = self.choose(core);
        let patience = core.rng.between(100_000, 1_500_000);
        self.send(core, client, counter, ask, patience);
    }

    fn choose(&mut self, core: &mut Core) -> (usize, Ask) {
        if !self.mixed.is_empty() && core.rng.percent(12) {
            let at = core.rng.index(self.mixed.len());
            if self.worn(self.mixed[at]) {
                self.mixed[at] = self.history.new_counter(CounterUse::Mixed);
            }
            let delta = 1 << core.rng.below(12);
            let ask = match core.rng.below(10) {
                0..3 => Ask::Add { delta },
                3..6 => Ask::AddReturning { delta: -delta },
                6..8 => Ask::Delete,
                _ => Ask::Read,
            };
            return (self.mixed[at], ask);
        }
        // One counter is hot, the others are equal.
        let hot = core.rng.percent(30);
        let at = if hot { 0 } else { core.rng.index(self.digits.len()) };
        if self.history.counters[self.digits[at]].adds >= DIGITS_MAX {
            self.digits[at] = self.history.new_counter(CounterUse::Digits);
        }
        let counter = self.digits[at];
        if core.rng.percent(core.plan.reads_percent) {
            return (counter, Ask::Read);
        }
        let adds = &mut self.history.counters[counter].adds;
        let delta = 1i64 << (2 * *adds);
        *adds += 1;
        let returning = core.rng.percent(15);
        (counter, if returning { Ask::AddReturning { delta } } else { Ask::Add { delta } })
    }

    /// Returns whether the counter has enough operations for the search, or too many of unknown
    /// outcome.
    fn worn(&self, counter: usize) -> bool {
        let ops = &self.history.counters[counter].ops;
        let unknown = ops.iter().filter(|&&id| self.history.ops[id].applied().is_none()).count();
        ops.len() >= MIXED_MAX || unknown >= 7
    }

    fn send(&mut self, core: &mut Core, client: usize, counter: usize, ask: Ask, patience: u64) {
        let id = self.history.ask(core.step, counter, ask);
        self.waiting.insert(id, client);
        let delay = core.delay();
        // The reads at the end show the final state, and the search for an order can't model stale
        // ones.
        let by_digits = self.history.counters[counter].used == CounterUse::Digits;
        let may_be_stale = ask == Ask::Read && client != FINAL && by_digits;
        let bounded = may_be_stale && self.staleness.percent(core.plan.bounded_percent);
        let request = ClientRequest {
            id,
            counter: self.history.counters[counter].key.clone(),
            ask,
            max_staleness_ms: bounded.then(|| self.staleness.between(1, 2_000)),
            deadline: core.now + delay + patience,
        };
        let to = Place::Gateway(core.rng.below(u64::from(core.plan.gateways)) as u8);
        core.after(delay, SimEvent::Request { to, request });
        // If a gateway forgets a client, this is its answer: no client waits forever.
        let answered = ClientReply { id, outcome: OpOutcome::Unknown };
        core.after(patience + 2_000_000, SimEvent::Answered(answered));
    }

    pub fn answered(&mut self, core: &mut Core, answered: ClientReply) {
        let Some(client) = self.waiting.remove(&answered.id) else { return };
        core.trace.note(core.now, || {
            let op = &self.history.ops[answered.id];
            let key = &self.history.counters[op.counter].key;
            format!("client: {:?} of {key:?}: {:?}", op.ask, answered.outcome)
        });
        self.history.answer(core.step, core.now, answered.id, answered.outcome);
        if client != FINAL {
            let think = core.rng.between(0, core.plan.think * 2);
            core.after(think, SimEvent::Client { client });
            return;
        }
        let counter = self.history.ops[answered.id].counter;
        if matches!(answered.outcome, OpOutcome::Applied(_)) {
            self.finals.left.remove(&counter);
        } else {
            core.after(FINAL_PAUSE, SimEvent::FinalRead { counter });
        }
    }

    /// Reads one counter at the end, and repeats until it answers.
    pub fn read_finally(&mut self, core: &mut Core, counter: usize) {
        self.send(core, FINAL, counter, Ask::Read, 1_000_000);
    }

    /// Reads every counter, each until it answers.
    pub fn read_all(&mut self, core: &mut Core) {
        self.finals.begun = true;
        for counter in 0..self.history.counters.len() {
            self.finals.left.insert(counter);
            self.read_finally(core, counter);
        }
    }

    /// Returns whether all operations are answered and all final reads done.
    pub fn is_done(&self) -> bool {
        self.finals.begun && self.waiting.is_empty() && self.finals.left.is_empty()
    }

    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty()
    }

    pub fn left(&self) -> usize {
        self.finals.left.len() + self.waiting.len()
    }
}
