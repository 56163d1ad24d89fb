//! The operations of one shard: those that wait, and the batch in flight.
//!
//! The operations of one request in one shard are one *part*. Parts wait in the order of their
//! requests, and a batch takes them from the front. A part that was held comes later than its
//! request, and may stand behind a batch of later ones; so a rejected batch puts each part back at
//! the place of its request.

use std::collections::VecDeque;

use super::in_flight::{BatchSend, InFlightBatch};
use super::part::{PartToken, QueuedOp, RequestPart, range_of};
use super::seal::Sealer;
use super::{BatcherTiming, Settings};
use crate::batch::{Batch, Codec};
use crate::ids::{BatchSeq, Conn, Epoch, Now, SessionId, Slots, TimeMs};
use crate::message::Refusal;
use crate::planted::Planted;

/// The queue of one shard. See the module.
#[derive(Clone, Debug)]
pub(super) struct ShardQueue {
    /// The slots that the shard had when the queue was made: batches are sealed for them.
    slots: Slots,
    waiting: VecDeque<RequestPart>,
    waiting_ops: usize,
    waiting_bytes: usize,
    /// The arrival of the first part that waits.
    since: Now,
    in_flight: Option<InFlightBatch>,
    /// The shard's time from an answer, and when the answer came.
    known_time: Option<(TimeMs, Now)>,
    /// The session of the last batch, and its last number that was decided.
    numbering: (SessionId, BatchSeq),
    /// A session that has expired in the shard, or was given up: no new batch is made in it.
    ended: Option<SessionId>,
    /// Nothing is sent before this time.
    retry_at: Now,
    /// The number of consecutive refusals under the same record.
    refusals: u32,
    /// The last send was refused because the primary was overloaded.
    overloaded: bool,
    /// The connection in whose send queue the shard is.
    queued_on: Option<Conn>,
}

impl ShardQueue {
    pub(super) fn new(slots: Slots) -> Self {
        Self {
            slots,
            waiting: VecDeque::new(),
            waiting_ops: 0,
            waiting_bytes: 0,
            since: Now(0),
            in_flight: None,
            known_time: None,
            numbering: (SessionId::default(), BatchSeq(0)),
            ended: None,
            retry_at: Now(0),
            refusals: 0,
            overloaded: false,
            queued_on: None,
        }
    }

    /// A queue for a new child of the shard, with its share of the batch in flight. Its numbers go
    /// on from those of the parent, whose session rows it inherits. What waits is sorted again
    /// later ([`ShardQueue::take_misplaced`]).
    pub(super) fn carve(&mut self, slots: Slots, planted: Option<Planted>) -> Self {
        let mut child = Self::new(slots);
        child.known_time = self.known_time;
        child.ended = self.ended;
        child.in_flight = self.in_flight.as_mut().map(|out| out.carve(slots, planted));
        if !Planted::ChildNumberedAnew.is_in(planted) || child.in_flight.is_some() {
            child.numbering = self.numbering;
        }
        child
    }

    /// The slots that batches are sealed for.
    pub(super) fn slots(&self) -> Slots {
        self.slots
    }

    pub(super) fn waiting_bytes(&self) -> usize {
        self.waiting_bytes
    }

    /// The memory of all operations that wait or are in flight.
    pub(super) fn bytes(&self) -> usize {
        self.waiting_bytes + self.in_flight.as_ref().map_or(0, InFlightBatch::bytes)
    }

    /// The number of operations in the batch in flight, or else of those that wait.
    pub(super) fn next_ops(&self) -> usize {
        self.in_flight.as_ref().map_or(self.waiting_ops, InFlightBatch::ops)
    }

    pub(super) fn in_flight(&self) -> Option<&InFlightBatch> {
        self.in_flight.as_ref()
    }

    /// A session that has expired in the shard, or was given up.
    pub(super) fn ended(&self) -> Option<SessionId> {
        self.ended
    }

    /// Returns whether the present primary has refused the last batch.
    pub(super) fn is_refused(&self) -> bool {
        self.refusals > 0
    }

    /// Returns whether the last send was refused because the primary was overloaded.
    pub(super) fn is_overloaded(&self) -> bool {
        self.overloaded
    }

    // ---- waiting operations --------------------------------------------------------------------

    /// Adds a part behind those of its own and of earlier requests. A part that was held may find
    /// later requests here.
    pub(super) fn push(&mut self, now: Now, mut part: RequestPart) {
        if let (Some(token), Some((time, at))) = (&mut part.token, self.known_time) {
            token.issued = token.issued.resolve(time, at);
        }
        if self.waiting.is_empty() {
            self.since = now;
        }
        let is_last = self.waiting.back().is_none_or(|last| last.request <= part.request);
        let at = match is_last {
            true => self.waiting.len(),
            false => range_of(&self.waiting, part.request).end,
        };
        self.put(at, part);
    }

    fn put(&mut self, at: usize, part: RequestPart) {
        self.waiting_ops += part.ops.len();
        self.waiting_bytes += part.bytes;
        self.waiting.insert(at, part);
    }

    /// Adds one operation at the place of its request.
    pub(super) fn insert(
        &mut self,
        now: Now,
        request: u64,
        queued: QueuedOp,
        token: Option<PartToken>,
    ) {
        if self.waiting.is_empty() {
            self.since = now;
        }
        self.waiting_ops += 1;
        self.waiting_bytes += queued.bytes();
        let range = range_of(&self.waiting, request);
        if range.is_empty() {
            self.waiting.insert(range.start, RequestPart::new(request, vec![queued], token));
            return;
        }
        let part = &mut self.waiting[range.end - 1];
        part.bytes += queued.bytes();
        part.ops.push(queued);
    }

    /// Puts the parts of a rejected batch back at the places of their requests. Parts of earlier
    /// requests may have been queued in the meantime.
    pub(super) fn push_front(&mut self, parts: VecDeque<RequestPart>) {
        for part in parts.into_iter().rev() {
            let at = range_of(&self.waiting, part.request).start;
            self.put(at, part);
        }
        self.since = Now(0);
    }

    /// Takes out everything that waits.
    pub(super) fn take_waiting(&mut self) -> VecDeque<RequestPart> {
        self.waiting_ops = 0;
        self.waiting_bytes = 0;
        std::mem::take(&mut self.waiting)
    }

    /// Takes out everything that waits if the shard has other slots by now, which later batches are
    /// sealed for. The batch in flight stays as it is, and is settled under its old slots.
    pub(super) fn take_misplaced(&mut self, slots: Slots) -> VecDeque<RequestPart> {
        if self.slots == slots || self.in_flight.is_some() {
            return VecDeque::new();
        }
        self.slots = slots;
        self.take_waiting()
    }

    /// Takes out the waiting parts of one request.
    pub(super) fn take_request(&mut self, request: u64) -> Vec<RequestPart> {
        let range = range_of(&self.waiting, request);
        let parts: Vec<RequestPart> = self.waiting.drain(range).collect();
        for part in &parts {
            self.waiting_ops -= part.ops.len();
            self.waiting_bytes -= part.bytes;
        }
        parts
    }

    /// The shard's own time, if an answer in the last `ms` milliseconds contained it.
    pub(super) fn fresh_time(&self, now: Now, ms: u64) -> Option<TimeMs> {
        self.known_time.filter(|(_, at)| now.ms_since(*at) <= ms).map(|(time, _)| time)
    }

    /// Notes the shard's time from an answer of apply. Operations that waited for it were issued
    /// before.
    pub(super) fn note_time(&mut self, now: Now, time: TimeMs) {
        self.known_time = Some((time, now));
        for token in self.waiting.iter_mut().filter_map(|part| part.token.as_mut()) {
            token.issued = token.issued.resolve(time, now);
        }
    }

    // ---- sending -------------------------------------------------------------------------------

    /// The time from which the shard may send to this primary; `None` if it has nothing to send.
    /// `session`: the one for a new batch.
    pub(super) fn sends_at(
        &self,
        (conn, epoch): (Conn, Epoch),
        session: Option<SessionId>,
        settings: &Settings,
    ) -> Option<Now> {
        if let Some(in_flight) = &self.in_flight {
            return in_flight.is_due(conn, epoch).then_some(self.retry_at);
        }
        if self.waiting.is_empty() || session.is_none() {
            return None;
        }
        // More waiting gains nothing once a full batch waits.
        let full = self.waiting_ops >= settings.sizes.batch_ops_max
            || self.waiting_bytes >= settings.sizes.batch_bytes_max;
        let lingers = Now(self.since.0.saturating_add(settings.linger_us));
        Some(if full { self.retry_at } else { self.retry_at.max(lingers) })
    }

    /// Notes that the shard is in the send queue of this connection. Returns whether it was not.
    pub(super) fn queue_on(&mut self, conn: Conn) -> bool {
        self.queued_on.replace(conn) != Some(conn)
    }

    /// Notes that the shard has left the send queue of a connection. Returns whether it was there:
    /// since then it may have joined another.
    pub(super) fn unqueue(&mut self, conn: Conn) -> bool {
        self.queued_on.take_if(|at| *at == conn).is_some()
    }

    /// Makes a batch of the operations that wait. Its number follows the last one that was decided:
    /// a number that a refusal has freed is used again.
    pub(super) fn seal(&mut self, session: SessionId, sealer: &mut Sealer) -> &InFlightBatch {
        assert!(self.in_flight.is_none(), "one batch is in flight at a time");
        let sealed = sealer.seal(&mut self.waiting, self.waiting_ops);
        for part in &sealed.parts {
            self.waiting_ops -= part.ops.len();
            self.waiting_bytes -= part.bytes;
        }
        if self.numbering.0 != session {
            self.numbering = (session, BatchSeq(0));
        }
        let batch_seq = self.numbering.1.next();
        // All numbers below were answered by apply, since one batch is in flight at a time.
        let (slots, below) = (self.slots, batch_seq);
        let batch = Batch::seal(slots, session, batch_seq, below, Codec::Raw, sealed.payload);
        self.in_flight.insert(InFlightBatch::new(
            batch,
            sealed.parts,
            sealed.entries,
            sealed.values,
        ))
    }

    /// Notes that the batch in flight is sent, and returns it.
    pub(super) fn send(&mut self, send: BatchSend) -> Option<Batch> {
        if !self.waiting.is_empty() {
            // The rest is sent when this batch is decided.
            self.since = Now(0);
        }
        let in_flight = self.in_flight.as_mut()?;
        in_flight.sent(send);
        Some(in_flight.batch.clone())
    }

    // ---- answers -------------------------------------------------------------------------------

    /// Notes that a send of batch `number` was answered. Returns it, if it is an open one of the
    /// batch in flight, and the bytes that it took on its connection.
    pub(super) fn answered(
        &mut self,
        (conn, message): (Conn, u64),
        slots: Slots,
        number: (SessionId, BatchSeq),
    ) -> Option<(BatchSend, usize)> {
        let in_flight = self.in_flight.as_mut()?;
        let batch = &in_flight.batch;
        let inside = batch.slots.lo <= slots.lo && slots.hi <= batch.slots.hi;
        if !inside || (batch.session, batch.batch_seq) != number {
            return None;
        }
        let bytes = batch.payload.len();
        Some((in_flight.answered(conn, message)?, bytes))
    }

    /// Notes that a send was answered for a part of the batch only, before the map has the shard
    /// that answered: it is sent again soon.
    pub(super) fn answered_in_part(&mut self, now: Now, timing: &BatcherTiming) {
        self.refusals += 1;
        self.retry_at = now.plus_ms(timing.backoff_ms(self.refusals));
        if let Some(in_flight) = &mut self.in_flight {
            in_flight.answered_in_part();
        }
    }

    /// Notes that a connection is gone. Returns whether that changes what the shard may send.
    pub(super) fn closed(&mut self, conn: Conn) -> bool {
        let cut = self.in_flight.as_mut().is_some_and(|in_flight| in_flight.closed(conn));
        let was_queued = self.unqueue(conn);
        cut || was_queued
    }

    /// Notes that the shard's record is new: refusals under the former one delay nothing.
    pub(super) fn moved(&mut self) {
        self.retry_at = Now(0);
        self.refusals = 0;
    }

    /// Sets the time of the next attempt after a refusal. Returns whether the refusal counts: an
    /// answer to an earlier send, from a former primary, delays nothing.
    pub(super) fn hold_back(
        &mut self,
        now: Now,
        send: BatchSend,
        refusal: &Refusal,
        timing: &BatcherTiming,
    ) -> bool {
        if !self.in_flight.as_ref().is_some_and(|in_flight| in_flight.is_last(send)) {
            return false;
        }
        self.overloaded = matches!(refusal, Refusal::Overloaded);
        let after_ms = match refusal {
            Refusal::NotPrimary(_) | Refusal::NoSuchShard | Refusal::Damaged | Refusal::Stale => {
                self.refusals += 1;
                timing.backoff_ms(self.refusals)
            }
            Refusal::Overloaded | Refusal::NoSpace | Refusal::TooLarge => timing.overloaded_ms,
            Refusal::Frozen => 0,
        };
        self.retry_at = now.plus_ms(after_ms);
        true
    }

    /// Takes the batch away: it is not sent any more.
    pub(super) fn take_in_flight(&mut self) -> Option<InFlightBatch> {
        self.in_flight.take()
    }

    /// Takes the batch, and makes no new one in its session.
    pub(super) fn end_session(&mut self) -> Option<InFlightBatch> {
        let in_flight = self.in_flight.take()?;
        self.ended = Some(in_flight.batch.session);
        Some(in_flight)
    }

    /// Takes the batch, which apply has decided: its number is used up.
    pub(super) fn take_decided(&mut self) -> Option<InFlightBatch> {
        let in_flight = self.in_flight.take()?;
        let batch = &in_flight.batch;
        assert_eq!(self.numbering.0, batch.session, "the batch was sealed under it");
        assert_eq!(self.numbering.1.next(), batch.batch_seq, "its number follows the last");
        self.numbering = (batch.session, batch.batch_seq);
        self.refusals = 0;
        self.overloaded = false;
        Some(in_flight)
    }
}
