//! The answers of nodes to batches.
//!
//! An answer settles one send. Only an answer from apply decides the batch. After any other, the
//! question is whether all sends were rejected (see [`in_flight`](super::in_flight)). If so the
//! batch is taken back at once: its number is free, and its operations wait again at the place that
//! they had before it was sealed, or fail; that is the only difference between the refusals.

use super::in_flight::{BatchSend, InFlightBatch};
use super::outcome::Failure;
use super::{Batcher, Effect};
use crate::idempotency::TokenOutcome;
use crate::ids::{BatchSeq, Conn, SessionId, ShardId, Slots};
use crate::message::{BatchReply, NodeReply, Refusal, ShardAvailability};
use crate::planted::Planted;

/// The action for the operations of a batch whose sends were all rejected.
enum AfterReject {
    /// The operations wait again, for another primary or another session.
    Wait,
    /// The operations fail.
    Fail(Failure),
}

impl Batcher {
    pub(super) fn on_reply(&mut self, conn: Conn, reply: NodeReply, effects: &mut Vec<Effect>) {
        // Nothing from a closed connection is handled.
        if self.router.connection(conn).is_none() {
            return;
        }
        match reply {
            NodeReply::Answer { message, slots, session, batch_seq, answer } => {
                let send = self.settled(conn, message, slots, (session, batch_seq));
                if let Some(send) = send {
                    self.on_answer(slots.shard(), send, answer, effects);
                }
            }
            NodeReply::ShardState { slots, state } => {
                self.note_state(conn, slots.shard(), state);
            }
            NodeReply::Read { id, result } => {
                if let Some(record) = self.reads.answered(self.now, conn, id, result, effects) {
                    self.learn(record);
                }
            }
        }
    }

    /// The send that the answer names, if it is an open one of the batch in flight.
    fn settled(
        &mut self,
        conn: Conn,
        message: u64,
        slots: Slots,
        number: (SessionId, BatchSeq),
    ) -> Option<BatchSend> {
        let connection = self.router.connection_mut(conn)?;
        connection.answered(message);
        self.touched.insert(conn);
        let in_flight = self.queues.get_mut(&slots.shard())?.in_flight.as_mut()?;
        let batch = &in_flight.batch;
        if batch.slots != slots || (batch.session, batch.batch_seq) != number {
            return None;
        }
        let send = in_flight.answered(conn, message)?;
        connection.bytes -= in_flight.batch.payload.len();
        self.due.insert(slots.shard());
        Some(send)
    }

    fn on_answer(
        &mut self,
        shard: ShardId,
        send: BatchSend,
        answer: BatchReply,
        effects: &mut Vec<Effect>,
    ) {
        match answer {
            BatchReply::Applied { values, tokens, time } => {
                if let Some(connection) = self.router.connection_mut(send.conn) {
                    connection.expire_frozen(shard, self.now);
                }
                if self.shard_time(self.now).is_none_or(|newest| newest <= time) {
                    self.newest = Some((time, self.now));
                }
                if let Some(queue) = self.queues.get_mut(&shard) {
                    queue.note_time(self.now, time);
                }
                self.applied(shard, &values, &tokens, effects);
            }
            BatchReply::Malformed => self.decided(shard, Failure::Malformed, effects),
            BatchReply::AnsweredBefore => self.decided(shard, Failure::ResultGone, effects),
            BatchReply::NoEffect => self.out_of_order(shard, effects),
            BatchReply::Expired => self.expired(shard, effects),
            BatchReply::Refused(refusal) => self.refused(shard, send, refusal, effects),
        }
    }

    // ---- decided -------------------------------------------------------------------------------

    fn applied(
        &mut self,
        shard: ShardId,
        values: &[i128],
        tokens: &[TokenOutcome],
        effects: &mut Vec<Effect>,
    ) {
        let Some(in_flight) = self.take_decided(shard) else { return };
        let results = in_flight.outcomes(tokens).and_then(|outcomes| {
            let answers = in_flight.values(values, &outcomes)?;
            Some((outcomes, answers))
        });
        let Some((outcomes, answers)) = results else {
            // The batch was applied, but the values are malformed: no client gets a wrong number.
            return self.fail_all(&in_flight, Failure::ResultGone, effects);
        };
        for (request, index, value) in answers {
            self.requests.value(request, index, value);
        }
        for (part, outcome) in in_flight.parts.iter().zip(outcomes) {
            if part.token.is_some() && outcome.is_applied() {
                self.send_held(part.request, effects);
            }
            let failure = match outcome {
                TokenOutcome::Applied => {
                    self.requests.applied(part, effects);
                    continue;
                }
                TokenOutcome::Replayed => {
                    self.requests.replayed(part, effects);
                    continue;
                }
                TokenOutcome::Reused => Failure::TokenReused,
                TokenOutcome::TooOld => Failure::TokenTooOld,
                TokenOutcome::Quota => Failure::TokenQuota,
            };
            self.requests.part_failed(part, failure, effects);
        }
    }

    fn decided(&mut self, shard: ShardId, failure: Failure, effects: &mut Vec<Effect>) {
        if let Some(in_flight) = self.take_decided(shard) {
            self.fail_all(&in_flight, failure, effects);
        }
    }

    /// Takes the batch, which apply has decided: its number is used up.
    fn take_decided(&mut self, shard: ShardId) -> Option<InFlightBatch> {
        let in_flight = self.take_in_flight(shard)?;
        let queue = self.queues.get_mut(&shard)?;
        queue.decided(&in_flight.batch);
        queue.refusals = 0;
        queue.overloaded = false;
        Some(in_flight)
    }

    // ---- this send had no effect ---------------------------------------------------------------

    /// Handles "out of order", which is a bug: with one batch in flight at a time, its number
    /// always follows. The whole session is inconsistent with the state of some shard, so nothing
    /// new is sent in it to any shard.
    fn out_of_order(&mut self, shard: ShardId, effects: &mut Vec<Effect>) {
        let Some(in_flight) = self.end_session(shard, "order", effects) else { return };
        if self.present == Some(in_flight.batch.session) {
            self.present = None;
        }
        self.fail_all(&in_flight, Failure::SessionAbandoned, effects);
    }

    /// Handles an expired session, whose key was gone for long. Other shards may still know the
    /// session: they go on with it until there is another.
    fn expired(&mut self, shard: ShardId, effects: &mut Vec<Effect>) {
        let Some(in_flight) = self.end_session(shard, "expired", effects) else { return };
        let planted = self.settings.planted;
        if in_flight.all_sends_rejected(planted) || Planted::ExpiredIsDefinite.is_in(planted) {
            self.requeue_or_fail(shard, in_flight, AfterReject::Wait, effects);
        } else {
            self.fail_all(&in_flight, Failure::SessionExpired, effects);
        }
    }

    /// Sends nothing more to the shard in the session of the batch in flight. Takes the batch, and
    /// requests another session if it was the present one.
    fn end_session(
        &mut self,
        shard: ShardId,
        reason: &'static str,
        effects: &mut Vec<Effect>,
    ) -> Option<InFlightBatch> {
        self.counts.refused(reason);
        let in_flight = self.take_in_flight(shard)?;
        let session = Some(in_flight.batch.session);
        self.queues.get_mut(&shard)?.ended = session;
        if self.present == session && self.abandoned != session {
            self.abandoned = session;
            effects.push(Effect::AbandonSession(in_flight.batch.session));
        }
        Some(in_flight)
    }

    fn refused(
        &mut self,
        shard: ShardId,
        send: BatchSend,
        refusal: Refusal,
        effects: &mut Vec<Effect>,
    ) {
        self.counts.refused(refusal.label());
        let then = match &refusal {
            Refusal::NotPrimary(_) | Refusal::NoSuchShard | Refusal::Damaged | Refusal::Stale => {
                AfterReject::Wait
            }
            // The overload is mostly a flush, which takes less than the deadlines of most clients,
            // and the queue here is bounded.
            Refusal::Overloaded => AfterReject::Wait,
            Refusal::Frozen => AfterReject::Fail(Failure::Frozen),
            Refusal::NoSpace => AfterReject::Fail(Failure::NoSpace),
            Refusal::TooLarge => AfterReject::Fail(Failure::TooLarge),
        };
        self.hold_back(shard, send, &refusal);
        let queue = self.queues.get_mut(&shard);
        let in_flight = queue.and_then(|queue| queue.in_flight.as_ref());
        let rejected = in_flight.is_some_and(|out| out.all_sends_rejected(self.settings.planted));
        if rejected && let Some(in_flight) = self.take_in_flight(shard) {
            self.requeue_or_fail(shard, in_flight, then, effects);
        }
        if let Refusal::NotPrimary(Some(record)) = refusal {
            self.learn(*record);
        }
    }

    /// Sets the time of the next attempt. An answer to an earlier send, from a former primary,
    /// delays nothing.
    fn hold_back(&mut self, shard: ShardId, send: BatchSend, refusal: &Refusal) {
        let Some(queue) = self.queues.get_mut(&shard) else { return };
        if !queue.in_flight.as_ref().is_some_and(|in_flight| in_flight.is_last(send)) {
            return;
        }
        queue.overloaded = matches!(refusal, Refusal::Overloaded);
        let after_ms = match refusal {
            Refusal::NotPrimary(_) | Refusal::NoSuchShard | Refusal::Damaged | Refusal::Stale => {
                queue.refusals += 1;
                self.settings.timing.backoff_ms(queue.refusals)
            }
            Refusal::Overloaded | Refusal::NoSpace | Refusal::TooLarge => {
                self.settings.timing.overloaded_ms
            }
            Refusal::Frozen => 0,
        };
        queue.retry_at = self.now.plus_ms(after_ms);
        let state = match refusal {
            Refusal::Frozen => ShardAvailability::Frozen,
            _ => ShardAvailability::Open,
        };
        self.note_state(send.conn, shard, state);
    }

    /// Puts the operations of a rejected batch back to where they were before it was sealed, or
    /// fails them. Operations of requests that were answered already are not sent again.
    fn requeue_or_fail(
        &mut self,
        shard: ShardId,
        in_flight: InFlightBatch,
        then: AfterReject,
        effects: &mut Vec<Effect>,
    ) {
        match then {
            // The batch was empty, to get the time for operations that wait: they can't be sent
            // either.
            AfterReject::Fail(failure) if in_flight.parts.is_empty() => {
                self.fail_waiting(shard, failure, effects);
            }
            AfterReject::Fail(failure) => self.fail_all(&in_flight, failure, effects),
            AfterReject::Wait => {
                let mut parts = in_flight.parts;
                parts.retain(|part| self.requests.is_open(part.request));
                self.bytes += parts.iter().map(|part| part.bytes).sum::<usize>();
                if let Some(queue) = self.queues.get_mut(&shard) {
                    queue.push_front(parts);
                }
            }
        }
    }

    // ---- helpers -------------------------------------------------------------------------------

    /// Takes the batch away from its shard: it is not sent any more.
    fn take_in_flight(&mut self, shard: ShardId) -> Option<InFlightBatch> {
        let in_flight = self.queues.get_mut(&shard)?.in_flight.take()?;
        self.in_flight -= 1;
        self.bytes -= in_flight.bytes();
        for conn in in_flight.open_on() {
            if let Some(connection) = self.router.connection_mut(conn) {
                connection.bytes -= in_flight.batch.payload.len();
                self.touched.insert(conn);
            }
        }
        Some(in_flight)
    }

    pub(super) fn fail_all(
        &mut self,
        in_flight: &InFlightBatch,
        failure: Failure,
        effects: &mut Vec<Effect>,
    ) {
        for part in &in_flight.parts {
            self.requests.part_failed(part, failure, effects);
        }
    }

    fn note_state(&mut self, conn: Conn, shard: ShardId, state: ShardAvailability) {
        let Some(connection) = self.router.connection_mut(conn) else { return };
        let frozen_ms = self.settings.timing.frozen_ms;
        match state {
            ShardAvailability::Frozen => connection.note_frozen(shard, self.now.plus_ms(frozen_ms)),
            ShardAvailability::Open => connection.clear_frozen(shard),
        }
        self.due.insert(shard);
    }
}
