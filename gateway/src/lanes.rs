//! One worker's machine and its turns.
//!
//! Everything of a worker lives on one thread, so nothing here is locked. Connections, node links and etcd's news put
//! events in; one task, [`turns`], gives them to the machine. It is woken by the first event of a turn and, since tasks
//! run in the order in which they were woken, runs after everything that was ready then: what many connections asked
//! for at once travels in one frame.
//!
//! A newcomer would flush per request, or wait a little for more. The first loses the batch, the second its latency.

use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use engine::batcher::{
    Effect, Event, Failure, ReadValues, Settings, Worker as Machine, WriteResult,
};
use engine::idempotency::Token;
use engine::ids::{Now, Slot, Slots, TimeMs};
use engine::key::CounterKey;
use engine::message::{Answer, NodeReply};
use engine::ops::Op;
use slab::Slab;
use telemetry::Clock;
use tokio::time::{Instant as TokioInstant, Sleep, sleep_until};

use crate::request;

/// The machine's number of a request is `count << SLOT_BITS | slot`: it counts up, as the machine wants it, and says
/// where its waiting future is.
const SLOT_BITS: u32 = 20;
/// No request waits for longer.
const LONGEST: Duration = Duration::from_millis(request::TIMEOUT_MS_MAX as u64 + 1_000);

/// What the worker's tasks share.
pub(crate) struct Lanes {
    /// Proofs age by it, so it counts while the machine sleeps; timers count from `started`.
    clock: Clock,
    started: Instant,
    /// What has happened since the last turn.
    events: RefCell<Vec<Event>>,
    /// The task of the turns.
    turn: RefCell<Option<Waker>>,
    slots: RefCell<Places>,
    /// So much is held that nothing more is to be read from clients.
    full: Cell<bool>,
    /// The newest time of any shard, and when it was that.
    shard_time: Cell<Option<(TimeMs, Now)>>,
    /// Slots of shards without a primary that this worker could send anything to.
    unled: RefCell<Vec<Slots>>,
    /// The process ends: the time of every request is over.
    over: Cell<bool>,
}

#[derive(Default)]
struct Places {
    slots: Slab<Place>,
    count: u64,
}

struct Place {
    request: u64,
    state: State,
}

enum State {
    Waiting(Option<Waker>),
    Done(Done),
    /// Its client has gone; the machine does not know.
    Unheard,
}

enum Done {
    Wrote(WriteResult),
    Read(Result<ReadValues, Failure>),
}

impl Lanes {
    pub(crate) fn new() -> Rc<Self> {
        Rc::new(Self {
            clock: Clock::start(),
            started: Instant::now(),
            events: RefCell::default(),
            turn: RefCell::default(),
            slots: RefCell::default(),
            full: Cell::new(false),
            shard_time: Cell::new(None),
            unled: RefCell::default(),
            over: Cell::new(false),
        })
    }

    pub(crate) fn now(&self) -> Now {
        Now(self.clock.elapsed().as_micros() as u64)
    }

    /// When a timer is to fire. To the millisecond, the clocks differ by what the machine has slept.
    fn at(&self, deadline: Now) -> TokioInstant {
        let slept = self.clock.elapsed().saturating_sub(self.started.elapsed());
        let slept_us = slept.as_millis() as u64 * 1_000;
        (self.started + Duration::from_micros(deadline.0.saturating_sub(slept_us))).into()
    }

    /// What time it is, in ms since 1970 (see [`request::clock`]).
    pub(crate) fn clock(&self) -> TimeMs {
        let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let wall = TimeMs(u64::try_from(since_1970.as_millis()).unwrap_or(u64::MAX));
        let shards = self
            .shard_time
            .get()
            .map(|(time, then)| TimeMs(time.0.saturating_add(self.now().ms_since(then))));
        request::clock(wall, shards)
    }

    /// Too much is held already: whoever asks for more is sent away before the body is read.
    pub(crate) fn is_full(&self) -> bool {
        self.full.get()
    }

    /// Nobody who could be reached leads the slot's shard.
    pub(crate) fn is_unled(&self, slot: Slot) -> bool {
        self.unled.borrow().iter().any(|slots| slots.contains(slot))
    }

    /// The process ends: every request that is open is answered now, by what is known of it.
    pub(crate) fn end(&self) {
        self.over.set(true);
        self.push(Event::TurnEnded);
    }

    fn is_over(&self) -> bool {
        self.over.get()
    }

    /// What the machine takes for now.
    fn turn_time(&self) -> Now {
        let ahead = if self.is_over() { LONGEST } else { Duration::ZERO };
        Now(self.now().0 + ahead.as_micros() as u64)
    }

    /// Gives the machine an event, in the next turn.
    pub(crate) fn push(&self, event: Event) {
        let mut events = self.events.borrow_mut();
        events.push(event);
        // The first one wakes the task for all.
        if events.len() == 1
            && let Some(turn) = &*self.turn.borrow()
        {
            turn.wake_by_ref();
        }
    }

    pub(crate) async fn write(
        self: &Rc<Self>,
        ops: Vec<Op>,
        token: Option<Token>,
        deadline: Now,
    ) -> WriteResult {
        let refused = ops.len();
        let asked = self.ask(|request| Event::Write { request, ops, token, deadline });
        let Some(asked) = asked else {
            let failed = (0..refused as u32).map(|index| (index, Failure::QueueFull)).collect();
            return WriteResult { failed, ..WriteResult::default() };
        };
        match asked.await {
            Done::Wrote(result) => result,
            Done::Read(_) => unreachable!("the machine answers a write with what it wrote"),
        }
    }

    pub(crate) async fn read(
        self: &Rc<Self>,
        keys: Vec<CounterKey>,
        max_staleness_ms: Option<u64>,
        deadline: Now,
    ) -> Result<ReadValues, Failure> {
        let asked = self.ask(|request| Event::Read { request, keys, max_staleness_ms, deadline });
        match asked.ok_or(Failure::QueueFull)?.await {
            Done::Read(result) => result,
            Done::Wrote(_) => unreachable!("the machine answers a read with what it read"),
        }
    }

    /// None: there are as many requests as there are slots.
    fn ask(self: &Rc<Self>, event: impl FnOnce(u64) -> Event) -> Option<Asked> {
        let slots = &mut *self.slots.borrow_mut();
        let entry = slots.slots.vacant_entry();
        let slot = entry.key();
        if slot >> SLOT_BITS != 0 {
            return None;
        }
        slots.count += 1;
        let request = slots.count << SLOT_BITS | slot as u64;
        entry.insert(Place { request, state: State::Waiting(None) });
        self.push(event(request));
        Some(Asked { lanes: self.clone(), slot: Some(slot) })
    }

    /// Why something was not done. What only waited for its time is told that this process ends, once it does.
    fn reason(&self, failure: Failure) -> Failure {
        let waited = matches!(
            failure,
            Failure::Slow
                | Failure::NoPrimary
                | Failure::NoSession
                | Failure::NoShard
                | Failure::QueueFull
        );
        if waited && self.is_over() { Failure::Stopping } else { failure }
    }

    fn done(&self, request: u64, done: Done) {
        let mut slots = self.slots.borrow_mut();
        let at = (request & ((1 << SLOT_BITS) - 1)) as usize;
        let slot = slots.slots.get_mut(at).filter(|slot| slot.request == request);
        let slot = slot.expect("the machine answers each request once");
        match std::mem::replace(&mut slot.state, State::Done(done)) {
            State::Waiting(waker) => {
                if let Some(waker) = waker {
                    waker.wake();
                }
            }
            State::Unheard => {
                slots.slots.remove(at);
            }
            State::Done(_) => unreachable!("the machine answers each request once"),
        }
    }

    /// An event is there, or the machine's deadline has come.
    fn poll_turn(&self, cx: &mut Context<'_>, timer: Pin<&mut Timer>) -> Poll<()> {
        if !self.events.borrow().is_empty() {
            return Poll::Ready(());
        }
        let mut turn = self.turn.borrow_mut();
        if !turn.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
            *turn = Some(cx.waker().clone());
        }
        timer.poll_due(cx)
    }
}

/// Waits for the machine's answer to one request.
struct Asked {
    lanes: Rc<Lanes>,
    /// None: answered, and given back.
    slot: Option<usize>,
}

impl Future for Asked {
    type Output = Done;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Done> {
        let slot = self.slot.expect("not polled after it was answered");
        let lanes = self.lanes.clone();
        let slots = &mut lanes.slots.borrow_mut().slots;
        match &mut slots[slot].state {
            State::Waiting(Some(waker)) if waker.will_wake(cx.waker()) => Poll::Pending,
            State::Waiting(waker) => {
                *waker = Some(cx.waker().clone());
                Poll::Pending
            }
            State::Done(_) => {
                self.slot = None;
                match slots.remove(slot).state {
                    State::Done(done) => Poll::Ready(done),
                    State::Waiting(_) | State::Unheard => unreachable!("it was just looked at"),
                }
            }
            State::Unheard => unreachable!("only a dropped future leaves that behind"),
        }
    }
}

impl Drop for Asked {
    fn drop(&mut self) {
        let Some(slot) = self.slot else {
            return;
        };
        let slots = &mut self.lanes.slots.borrow_mut().slots;
        match slots[slot].state {
            State::Done(_) => {
                slots.remove(slot);
            }
            State::Waiting(_) | State::Unheard => slots[slot].state = State::Unheard,
        }
    }
}

/// Fires not later than it is told to, and perhaps earlier: setting it costs something, and a turn too many nothing.
struct Timer {
    sleep: Pin<Box<Sleep>>,
    armed: Option<TokioInstant>,
}

impl Timer {
    fn new() -> Self {
        Self { sleep: Box::pin(sleep_until(TokioInstant::now())), armed: None }
    }

    fn arm(&mut self, at: TokioInstant) {
        if self.armed.is_none_or(|armed| at < armed) {
            self.armed = Some(at);
            self.sleep.as_mut().reset(at);
        }
    }

    fn poll_due(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if self.armed.is_none() || self.sleep.as_mut().poll(cx).is_pending() {
            return Poll::Pending;
        }
        self.armed = None;
        Poll::Ready(())
    }
}

/// What the turns do to the world.
pub(crate) trait World {
    /// Anything but an answer to a request.
    fn perform(&self, effect: Effect);
    /// A turn has ended. `surroundings_changed`: it was not only about requests and their answers.
    fn look(&self, machine: &Machine, surroundings_changed: bool);
}

/// Gives the machine its turns, until dropped.
pub(crate) async fn turns(
    lanes: Rc<Lanes>,
    mut machine: Machine,
    settings: Settings,
    world: impl World,
) {
    let mut timer = pin!(Timer::new());
    let (mut events, mut effects) = (Vec::new(), Vec::new());
    loop {
        if let Some(deadline) = machine.next_deadline() {
            timer.arm(lanes.at(deadline));
        }
        poll_fn(|cx| lanes.poll_turn(cx, timer.as_mut())).await;
        std::mem::swap(&mut events, &mut *lanes.events.borrow_mut());
        let now = lanes.turn_time();
        let mut surroundings_changed = false;
        for event in events.drain(..) {
            surroundings_changed |= is_of_the_surroundings(&event);
            machine.handle(now, event, &mut effects);
        }
        // The age of a bounded read is of this moment, not of the turn's beginning.
        machine.handle(lanes.turn_time(), Event::TurnEnded, &mut effects);
        for effect in effects.drain(..) {
            match effect {
                Effect::Wrote { request, mut result } => {
                    let reasons = result.failed.iter_mut().map(|(_, failure)| failure);
                    reasons.for_each(|failure| *failure = lanes.reason(*failure));
                    lanes.done(request, Done::Wrote(result));
                }
                Effect::ReadDone { request, result } => {
                    let result = result.map_err(|failure| lanes.reason(failure));
                    lanes.done(request, Done::Read(result));
                }
                other => world.perform(other),
            }
        }
        if surroundings_changed {
            lanes.unled.replace(unled(&machine));
        }
        // From half of it on the machine chooses who may still come.
        lanes.full.set(machine.bytes() >= 2 * settings.worker_bytes_max);
        lanes.shard_time.set(machine.shard_time(now).map(|time| (time, now)));
        world.look(&machine, surroundings_changed);
    }
}

/// Slots of the shards whose primary no connection leads to.
fn unled(machine: &Machine) -> Vec<Slots> {
    let away = machine.unconnected();
    if away.is_empty() {
        return Vec::new();
    }
    let shards = machine.map().iter().filter(|shard| away.contains(&shard.primary));
    shards.map(|shard| shard.slots).collect()
}

fn is_of_the_surroundings(event: &Event) -> bool {
    match event {
        Event::Write { .. } | Event::Read { .. } | Event::TurnEnded => false,
        // A refusal may carry a newer record of the shard.
        Event::Reply { reply, .. } => matches!(
            reply,
            NodeReply::Answer { answer: Answer::Refused(_), .. }
                | NodeReply::Read { result: Err(_), .. }
        ),
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A client that has gone is not told what became of its request: whichever comes first, the answer or the end of the
    /// wait, the second gives the slot back. There are only so many.
    #[test]
    fn a_request_that_nobody_waits_for_gives_its_slot_back() {
        let lanes = Lanes::new();
        let number = Cell::new(0);
        let ask = || {
            let asked = lanes.ask(|request| {
                number.set(request);
                let (ops, token, deadline) = (Vec::new(), None, Now(0));
                Event::Write { request, ops, token, deadline }
            });
            asked.expect("a slot is free")
        };
        let left = || lanes.slots.borrow().slots.len();
        let done = || lanes.done(number.get(), Done::Wrote(WriteResult::default()));
        let asked = ask();
        done();
        drop(asked);
        assert_eq!(left(), 0, "answered, and not looked at");
        drop(ask());
        assert_eq!(left(), 1, "the machine will still answer");
        done();
        assert_eq!(left(), 0);
        assert_eq!(ask().slot, Some(0), "it is used again");
    }

    #[test]
    fn what_waits_at_the_end_is_told_so() {
        let lanes = Lanes::new();
        let waited = [Failure::Slow, Failure::NoPrimary, Failure::NoSession, Failure::QueueFull];
        for failure in waited {
            assert_eq!(lanes.reason(failure), failure);
        }
        let before = lanes.turn_time();
        lanes.end();
        assert!(lanes.turn_time().0 - before.0 >= LONGEST.as_micros() as u64);
        for failure in waited {
            assert_eq!(lanes.reason(failure), Failure::Stopping);
        }
        // What may have been done, or has a reason of its own, is not renamed.
        for failure in [Failure::Deadline, Failure::TokenReused, Failure::Frozen] {
            assert_eq!(lanes.reason(failure), failure);
        }
    }
}
