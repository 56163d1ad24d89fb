//! The parts that all processes of a run share: virtual time, the queue of future events, the
//! random stream, and the models of network and etcd.

use std::collections::{BTreeMap, BTreeSet};

use engine::ids::Now;

use super::etcd::Etcd;
use super::event::{ProcessInput, SimEvent};
use super::late::{LateItems, Stream};
use super::network::SimNetwork;
use super::oracle::Oracle;
use super::pauses::Pauses;
use super::place::ProcessId;
use super::plan::Plan;
use super::queue::EventQueue;
use super::rng::Rng;
use super::trace::Trace;

/// The shared parts of a run, see the module.
pub struct Core {
    pub now: u64,
    /// The sum of leaps of the processes' clocks beyond `now`.
    pub leapt: u64,
    /// The clients are paused.
    pub at_rest: bool,
    pub step: u64,
    pub rng: Rng,
    pub plan: Plan,
    pub trace: Trace,
    pub net: SimNetwork,
    pub etcd: Etcd,
    pub pauses: Pauses,
    pub oracle: Oracle,
    /// The decisions of coordinators, by kind.
    pub decisions: BTreeMap<&'static str, u64>,
    /// The nodes whose wall clocks were set.
    pub clocks_set: BTreeSet<usize>,
    queue: EventQueue<SimEvent>,
}

impl Core {
    pub fn new(plan: Plan, rng: Rng, trace: Trace) -> Self {
        Self {
            now: 0,
            leapt: 0,
            at_rest: false,
            step: 0,
            rng,
            trace,
            net: SimNetwork::default(),
            etcd: Etcd::default(),
            pauses: Pauses::default(),
            oracle: Oracle::new(&plan),
            decisions: BTreeMap::new(),
            clocks_set: BTreeSet::new(),
            plan,
            queue: EventQueue::default(),
        }
    }

    pub fn at(&mut self, at: u64, event: SimEvent) {
        self.queue.push(at.max(self.now), event);
    }

    pub fn after(&mut self, micros: u64, event: SimEvent) {
        self.at(self.now + micros, event);
    }

    pub fn input_after(&mut self, micros: u64, to: ProcessId, input: ProcessInput) {
        self.after(micros, SimEvent::Input(to, input));
    }

    /// The next event, with the clock moved to it.
    pub fn pop(&mut self) -> Option<SimEvent> {
        let (at, number, event) = self.queue.pop()?;
        self.now = at;
        self.step += 1;
        self.trace.mix(at);
        self.trace.mix(number);
        Some(event)
    }

    /// The time that a message takes on the way. Mostly short, now and then long: reordering
    /// between connections comes from the long ones.
    pub fn delay(&mut self) -> u64 {
        let base = self.plan.network_delay;
        match self.rng.below(1000) {
            0..900 => self.rng.between(base / 2, base * 2),
            900..1000 if !self.plan.jitter => self.rng.between(base, base * 4),
            900..990 => self.rng.between(base, base * 20),
            _ => self.rng.between(base, base * 300),
        }
    }

    /// The lateness of an effect or an answer, if its driver uses its freedom and it is late. What
    /// waits for something before it in its stream is late, too.
    pub fn lateness<T>(&mut self, late: &LateItems<T>, stream: Option<Stream>) -> Option<u64> {
        let waits = late.waits(stream).then_some(0);
        self.plan.reorder.lateness(stream.is_none()).or(waits)
    }

    /// Keeps something that is late for its process.
    pub fn keep<T>(
        &mut self,
        late: &mut LateItems<T>,
        process: ProcessId,
        stream: Option<Stream>,
        (lag, item): (u64, T),
    ) {
        let (number, at) = late.keep(stream, self.now + lag, item);
        self.at(at, SimEvent::Input(process, ProcessInput::Late { number }));
    }

    /// Returns whether faults still strike.
    pub fn is_faulty(&self) -> bool {
        self.now < self.plan.faults_until
    }

    // ---- leaps of time --------------------------------------------------------------------------

    /// The time from which all clocks of processes count.
    pub fn clock(&self) -> u64 {
        self.now + self.leapt
    }

    /// The virtual time at which the clocks of processes show `at`: now, if they do already.
    pub fn when(&self, at: u64) -> u64 {
        at.saturating_sub(self.leapt)
    }

    pub fn leap(&mut self, far: u64) {
        self.trace.note(self.now, || format!("all clocks leap by {far} us"));
        self.leapt += far;
        self.trace.mix(far);
    }

    // ---- pauses ---------------------------------------------------------------------------------

    pub fn is_paused(&self, process: ProcessId) -> bool {
        self.pauses.inboxes.contains_key(&process)
    }

    /// Pauses a process now, or before a coming output.
    pub fn pause(&mut self, process: ProcessId, outputs: u64, lasts: u64) {
        if outputs == 0 {
            self.stop(process, lasts);
        } else {
            self.pauses.armed = Some((process, outputs, lasts));
        }
    }

    fn stop(&mut self, process: ProcessId, lasts: u64) {
        self.trace.note(self.now, || format!("{process:?} pauses"));
        self.pauses.inboxes.entry(process).or_default();
        self.after(lasts, SimEvent::Resume { process });
    }

    /// A process is about to do something that others can see: returns whether it must wait.
    pub fn holds_back(&mut self, process: ProcessId) -> bool {
        if let Some((armed, outputs, lasts)) = &mut self.pauses.armed
            && *armed == process
        {
            *outputs -= 1;
            if *outputs == 0 {
                let lasts = *lasts;
                self.pauses.armed = None;
                self.stop(process, lasts);
            }
        }
        self.is_paused(process)
    }

    /// Returns `None` if the input waits for a paused process. A timer need not wait: the process
    /// checks its timers when it continues.
    pub fn waits_for(&mut self, process: ProcessId, input: ProcessInput) -> Option<ProcessInput> {
        let Some(inbox) = self.pauses.inboxes.get_mut(&process) else { return Some(input) };
        if !matches!(input, ProcessInput::Wake) {
            inbox.push(input);
        }
        None
    }

    /// The process continues: with the effects that it was about to perform, then with the inputs
    /// that have arrived.
    pub fn resume(&mut self, process: ProcessId) -> Vec<ProcessInput> {
        let Some(mut inbox) = self.pauses.inboxes.remove(&process) else { return Vec::new() };
        self.trace.note(self.now, || format!("{process:?} resumes"));
        inbox.insert(0, ProcessInput::Resumed);
        inbox
    }

    /// All paused processes continue now.
    pub fn resume_all(&mut self) {
        self.pauses.armed = None;
        for process in self.pauses.inboxes.keys().copied().collect::<Vec<_>>() {
            self.after(0, SimEvent::Resume { process });
        }
    }
}

/// A state machine's clock starts with its driver.
pub fn since(started: u64, now: u64) -> Now {
    Now(now - started)
}
