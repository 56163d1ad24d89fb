//! One worker's event queue, and the turns in which its batcher handles the events.
//!
//! A worker lives on one thread, so nothing here is locked. Client connections, node connections
//! and the etcd watch push events; one task, [`run_turns`], gives them to the batcher. The task is
//! woken by the first event of a turn and, since tasks run in the order in which they were woken,
//! runs after everything that was ready then: the requests of many connections travel in one frame.
//!
//! The alternatives are worse: a flush per request loses the batching, and a short wait for more
//! requests adds latency.

use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use engine::batcher::{Batcher, Effect, Event, Failure, ReadValues, Settings, WriteResult};
use engine::ids::{Now, Slot, Slots, TimeMs};
use engine::key::CounterKey;
use engine::message::{BatchReply, NodeReply};
use engine::ops::Op;
use engine::shard::idempotency::ClientToken;
use slab::Slab;
use telemetry::Clock;
use tokio::time::{Instant as TokioInstant, Sleep, sleep_until};

use crate::admission::Admission;
use crate::request;

/// The batcher's number of a request is `count << SLOT_BITS | slot`: it ascends, as the batcher
/// requires, and its low bits are the index of the waiting future.
const SLOT_BITS: u32 = 20;
/// No request waits for longer.
const REQUEST_TIME_MAX: Duration = Duration::from_millis(request::TIMEOUT_MS_MAX as u64 + 1_000);

/// The state that the tasks of a worker share.
pub(crate) struct Mailbox {
    /// The clock of the batcher. The age of read proofs is measured with it, so it goes on while
    /// the computer is suspended; timers count from `started`, which does not.
    clock: Clock,
    started: Instant,
    /// The events since the last turn.
    events: RefCell<Vec<Event>>,
    /// Wakes the task of the turns.
    turn: RefCell<Option<Waker>>,
    requests: RefCell<RequestSlots>,
    /// The batcher holds so many bytes that no more requests are to be read from clients.
    full: Cell<bool>,
    /// The room in the batcher for large requests.
    pub(crate) admission: Admission,
    /// The newest time of any shard, and the moment at which it was received.
    shard_time: Cell<Option<(TimeMs, Now)>>,
    /// The slots of shards whose primary this worker has no connection to.
    without_primary: RefCell<Vec<Slots>>,
    /// The process is ending: every deadline counts as passed.
    expired: Cell<bool>,
}

/// The requests that wait for the batcher, or for their future to take the result.
#[derive(Default)]
struct RequestSlots {
    slots: Slab<RequestSlot>,
    /// The number of requests so far.
    count: u64,
}

struct RequestSlot {
    request: u64,
    state: SlotState,
}

enum SlotState {
    Waiting(Option<Waker>),
    Done(Completion),
    /// The client has gone; the batcher will still complete the request.
    Abandoned,
}

/// The batcher's result of one request.
enum Completion {
    Wrote(WriteResult),
    Read(Result<ReadValues, Failure>),
}

impl Mailbox {
    pub(crate) fn new() -> Rc<Self> {
        Rc::new(Self {
            clock: Clock::start(),
            started: Instant::now(),
            events: RefCell::default(),
            turn: RefCell::default(),
            requests: RefCell::default(),
            full: Cell::new(false),
            admission: Admission::default(),
            shard_time: Cell::new(None),
            without_primary: RefCell::default(),
            expired: Cell::new(false),
        })
    }

    /// The time on the batcher's clock.
    pub(crate) fn now(&self) -> Now {
        Now(self.clock.elapsed().as_micros() as u64)
    }

    /// The instant at which a timer for `deadline` fires. Up to a millisecond, the two clocks
    /// differ by the time for which the computer was suspended.
    pub(crate) fn timer_at(&self, deadline: Now) -> TokioInstant {
        let slept = self.clock.elapsed().saturating_sub(self.started.elapsed());
        let slept_us = slept.as_millis() as u64 * 1_000;
        (self.started + Duration::from_micros(deadline.0.saturating_sub(slept_us))).into()
    }

    /// The time of day (see [`request::clock`]).
    pub(crate) fn clock(&self) -> TimeMs {
        let wall = TimeMs(telemetry::wall_clock_ms());
        let shards = self
            .shard_time
            .get()
            .map(|(time, then)| TimeMs(time.0.saturating_add(self.now().ms_since(then))));
        request::clock(wall, shards)
    }

    /// Returns whether the batcher is full. Then requests are refused before their bodies are read.
    pub(crate) fn is_full(&self) -> bool {
        self.full.get()
    }

    /// Returns whether this worker has no connection to the primary of the slot's shard.
    pub(crate) fn is_without_primary(&self, slot: Slot) -> bool {
        self.without_primary.borrow().iter().any(|slots| slots.contains(slot))
    }

    /// Lets every open request reach its deadline now, since the process is ending: each is
    /// answered by what is known of it.
    pub(crate) fn expire_all(&self) {
        self.expired.set(true);
        self.push(Event::TurnEnded);
    }

    fn is_expired(&self) -> bool {
        self.expired.get()
    }

    /// The time that the batcher is given: beyond every deadline once the process is ending.
    fn turn_time(&self) -> Now {
        let ahead = if self.is_expired() { REQUEST_TIME_MAX } else { Duration::ZERO };
        Now(self.now().0 + ahead.as_micros() as u64)
    }

    /// Queues an event for the next turn.
    pub(crate) fn push(&self, event: Event) {
        let mut events = self.events.borrow_mut();
        events.push(event);
        // The first event wakes the task for all of the turn.
        if events.len() == 1
            && let Some(turn) = &*self.turn.borrow()
        {
            turn.wake_by_ref();
        }
    }

    /// Lets the batcher apply operations. Failures are in the result, by index.
    pub(crate) async fn write(
        self: &Rc<Self>,
        ops: Vec<Op>,
        token: Option<ClientToken>,
        deadline: Now,
    ) -> WriteResult {
        let count = ops.len();
        let pending = self.submit(|request| Event::Write { request, ops, token, deadline });
        let Some(pending) = pending else {
            let failed = (0..count as u32).map(|index| (index, Failure::QueueFull)).collect();
            return WriteResult { failed, ..WriteResult::default() };
        };
        match pending.await {
            Completion::Wrote(result) => result,
            Completion::Read(_) => unreachable!("the batcher completes a write with `Wrote`"),
        }
    }

    /// Lets the batcher read counters.
    pub(crate) async fn read(
        self: &Rc<Self>,
        keys: Vec<CounterKey>,
        max_staleness_ms: Option<u64>,
        deadline: Now,
    ) -> Result<ReadValues, Failure> {
        let pending =
            self.submit(|request| Event::Read { request, keys, max_staleness_ms, deadline });
        match pending.ok_or(Failure::QueueFull)?.await {
            Completion::Read(result) => result,
            Completion::Wrote(_) => unreachable!("the batcher completes a read with `ReadDone`"),
        }
    }

    /// Returns `None` if all slots are taken.
    fn submit(self: &Rc<Self>, event: impl FnOnce(u64) -> Event) -> Option<PendingRequest> {
        let requests = &mut *self.requests.borrow_mut();
        let entry = requests.slots.vacant_entry();
        let slot = entry.key();
        if slot >> SLOT_BITS != 0 {
            return None;
        }
        requests.count += 1;
        let request = requests.count << SLOT_BITS | slot as u64;
        entry.insert(RequestSlot { request, state: SlotState::Waiting(None) });
        self.push(event(request));
        Some(PendingRequest { mailbox: self.clone(), slot: Some(slot) })
    }

    /// The failure that a client gets. Once the process is ending, a request that only waited until
    /// its deadline fails with [`Failure::Stopping`].
    fn client_failure(&self, failure: Failure) -> Failure {
        let waited = matches!(
            failure,
            Failure::Slow
                | Failure::NoPrimary
                | Failure::NoSession
                | Failure::NoShard
                | Failure::QueueFull
        );
        if waited && self.is_expired() { Failure::Stopping } else { failure }
    }

    fn complete(&self, request: u64, completion: Completion) {
        let mut requests = self.requests.borrow_mut();
        let at = (request & ((1 << SLOT_BITS) - 1)) as usize;
        let slot = requests.slots.get_mut(at).filter(|slot| slot.request == request);
        let slot = slot.expect("the batcher completes each request once");
        match std::mem::replace(&mut slot.state, SlotState::Done(completion)) {
            SlotState::Waiting(waker) => {
                if let Some(waker) = waker {
                    waker.wake();
                }
            }
            SlotState::Abandoned => {
                requests.slots.remove(at);
            }
            SlotState::Done(_) => unreachable!("the batcher completes each request once"),
        }
    }

    /// Is ready once there is an event, or the batcher's deadline has come.
    fn poll_turn(&self, cx: &mut Context<'_>, timer: Pin<&mut TurnTimer>) -> Poll<()> {
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

/// Resolves to the batcher's result of one request. Its slot is freed by the later of two events:
/// the completion, and the drop of this future.
struct PendingRequest {
    mailbox: Rc<Mailbox>,
    /// `None` once the result was taken and the slot freed.
    slot: Option<usize>,
}

impl Future for PendingRequest {
    type Output = Completion;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Completion> {
        let slot = self.slot.expect("not polled after it was ready");
        let mailbox = self.mailbox.clone();
        let slots = &mut mailbox.requests.borrow_mut().slots;
        match &mut slots[slot].state {
            SlotState::Waiting(Some(waker)) if waker.will_wake(cx.waker()) => Poll::Pending,
            SlotState::Waiting(waker) => {
                *waker = Some(cx.waker().clone());
                Poll::Pending
            }
            SlotState::Done(_) => {
                self.slot = None;
                match slots.remove(slot).state {
                    SlotState::Done(completion) => Poll::Ready(completion),
                    SlotState::Waiting(_) | SlotState::Abandoned => {
                        unreachable!("the state was just matched")
                    }
                }
            }
            SlotState::Abandoned => unreachable!("only a dropped future leaves that behind"),
        }
    }
}

impl Drop for PendingRequest {
    fn drop(&mut self) {
        let Some(slot) = self.slot else {
            return;
        };
        let slots = &mut self.mailbox.requests.borrow_mut().slots;
        match slots[slot].state {
            SlotState::Done(_) => {
                slots.remove(slot);
            }
            SlotState::Waiting(_) | SlotState::Abandoned => {
                slots[slot].state = SlotState::Abandoned;
            }
        }
    }
}

/// Fires no later than the instant for which it was armed, and perhaps earlier: it is not set to a
/// later instant, since that costs time, and an extra turn costs nearly nothing.
struct TurnTimer {
    sleep: Pin<Box<Sleep>>,
    armed: Option<TokioInstant>,
}

impl TurnTimer {
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

/// The part of a worker that acts on the effects of a turn. It is a trait so that this module does
/// not depend on the worker.
pub(crate) trait TurnDriver {
    /// Performs an effect other than the completion of a request.
    fn perform(&self, effect: Effect);
    /// Is called at the end of each turn. `cluster_changed` is true if the turn had events other
    /// than requests and their answers.
    fn turn_ended(&self, batcher: &Batcher, cluster_changed: bool);
}

/// Lets the batcher handle events turn by turn, until dropped.
pub(crate) async fn run_turns(
    mailbox: Rc<Mailbox>,
    mut batcher: Batcher,
    settings: Settings,
    driver: impl TurnDriver,
) {
    let mut timer = pin!(TurnTimer::new());
    mailbox.admission.set_room(batcher.room());
    let (mut events, mut effects) = (Vec::new(), Vec::new());
    loop {
        if let Some(deadline) = batcher.next_deadline() {
            timer.arm(mailbox.timer_at(deadline));
        }
        poll_fn(|cx| mailbox.poll_turn(cx, timer.as_mut())).await;
        std::mem::swap(&mut events, &mut *mailbox.events.borrow_mut());
        let now = mailbox.turn_time();
        let mut cluster_changed = false;
        for event in events.drain(..) {
            cluster_changed |= concerns_cluster(&event);
            batcher.handle(now, event, &mut effects);
        }
        // The age of a bounded read is measured now, not at the beginning of the turn.
        batcher.handle(mailbox.turn_time(), Event::TurnEnded, &mut effects);
        for effect in effects.drain(..) {
            match effect {
                Effect::Wrote { request, mut result } => {
                    let reasons = result.failed.iter_mut().map(|(_, failure)| failure);
                    reasons.for_each(|failure| *failure = mailbox.client_failure(*failure));
                    mailbox.complete(request, Completion::Wrote(result));
                }
                Effect::ReadDone { request, result } => {
                    let result = result.map_err(|failure| mailbox.client_failure(failure));
                    mailbox.complete(request, Completion::Read(result));
                }
                other => driver.perform(other),
            }
        }
        if cluster_changed {
            mailbox.without_primary.replace(slots_without_primary(&batcher));
        }
        // From half of this limit on, the batcher itself refuses the requests of some shards.
        mailbox.full.set(batcher.bytes() >= 2 * settings.total_bytes_max);
        mailbox.admission.set_room(batcher.room());
        mailbox.shard_time.set(batcher.shard_time(now).map(|time| (time, now)));
        driver.turn_ended(&batcher, cluster_changed);
    }
}

/// The slots of the shards whose primary this worker has no connection to.
fn slots_without_primary(batcher: &Batcher) -> Vec<Slots> {
    let unconnected = batcher.unconnected();
    if unconnected.is_empty() {
        return Vec::new();
    }
    let shards = batcher.map().iter().filter(|shard| unconnected.contains(&shard.primary));
    shards.map(|shard| shard.slots).collect()
}

fn concerns_cluster(event: &Event) -> bool {
    match event {
        Event::Write { .. } | Event::Read { .. } | Event::TurnEnded => false,
        // A refusal may carry a newer record of the shard.
        Event::Reply { reply, .. } => matches!(
            reply,
            NodeReply::Answer { answer: BatchReply::Refused(_), .. }
                | NodeReply::Read { result: Err(_), .. }
        ),
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Slots are limited, so a client that has gone must not keep one. The completion and the end
    /// of the wait come in either order: the second of them frees the slot.
    #[test]
    fn an_abandoned_request_frees_its_slot() {
        let mailbox = Mailbox::new();
        let number = Cell::new(0);
        let submit = || {
            let pending = mailbox.submit(|request| {
                number.set(request);
                let (ops, token, deadline) = (Vec::new(), None, Now(0));
                Event::Write { request, ops, token, deadline }
            });
            pending.expect("a slot is free")
        };
        let left = || mailbox.requests.borrow().slots.len();
        let complete = || mailbox.complete(number.get(), Completion::Wrote(WriteResult::default()));
        let pending = submit();
        complete();
        drop(pending);
        assert_eq!(left(), 0, "completed, and the result not taken");
        drop(submit());
        assert_eq!(left(), 1, "the batcher will still complete it");
        complete();
        assert_eq!(left(), 0);
        assert_eq!(submit().slot, Some(0), "the slot is used again");
    }

    #[test]
    fn a_request_that_waits_when_the_process_ends_fails_with_stopping() {
        let mailbox = Mailbox::new();
        let waited = [Failure::Slow, Failure::NoPrimary, Failure::NoSession, Failure::QueueFull];
        for failure in waited {
            assert_eq!(mailbox.client_failure(failure), failure);
        }
        let before = mailbox.turn_time();
        mailbox.expire_all();
        assert!(mailbox.turn_time().0 - before.0 >= REQUEST_TIME_MAX.as_micros() as u64);
        for failure in waited {
            assert_eq!(mailbox.client_failure(failure), Failure::Stopping);
        }
        // A failure that may have had an effect, or has a reason of its own, stays as it is.
        for failure in [Failure::Deadline, Failure::TokenReused, Failure::Frozen] {
            assert_eq!(mailbox.client_failure(failure), failure);
        }
    }
}
