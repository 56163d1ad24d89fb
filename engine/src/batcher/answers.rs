//! The answers of nodes to batches.
//!
//! An answer settles one send. Only an answer from apply decides the batch. After any other, the
//! question is whether all sends were rejected (see [`in_flight`](super::in_flight)). If so the
//! batch is taken back at once: its number is free, and its operations wait again at the place that
//! they had before it was sealed, or fail; that is the only difference between the refusals.

use super::in_flight::{BatchSend, InFlightBatch};
use super::outcome::Failure;
use super::pending_writes::PendingWrites;
use super::queue::ShardQueue;
use super::queueing::Queueing;
use super::routes::Routes;
use super::session::BatchSessions;
use super::shard_queues::ShardQueues;
use super::{BatcherTurn, Effect};
use crate::ids::{BatchSeq, Conn, SessionId, ShardId, Slots};
use crate::message::{BatchReply, Refusal, ShardAvailability};
use crate::planted::Planted;
use crate::shard::idempotency::TokenOutcome;
use crate::shard_record::ShardRecord;

/// The action for the operations of a batch whose sends were all rejected.
enum AfterReject {
    /// The operations wait again, for another primary or another session.
    Wait,
    /// The operations fail.
    Fail(Failure),
}

/// The parts of a worker that an answer may change.
pub(super) struct Answering<'a> {
    pub(super) turn: BatcherTurn<'a>,
    pub(super) sessions: &'a mut BatchSessions,
    pub(super) routes: &'a mut Routes,
    pub(super) queues: &'a mut ShardQueues,
    pub(super) writes: &'a mut PendingWrites,
}

impl Answering<'_> {
    /// Takes the answer to a batch. Returns the shard's record, if the answer contains it.
    pub(super) fn on_answer(
        &mut self,
        (conn, message): (Conn, u64),
        slots: Slots,
        number: (SessionId, BatchSeq),
        answer: BatchReply,
    ) -> Option<ShardRecord> {
        let connection = self.routes.router.connection_mut(conn)?;
        connection.frames.answered(self.turn.now, message);
        self.turn.agenda.connections.add(conn);
        let mut record = None;
        // Without a shard that was just split the list is empty, and nothing is copied.
        let others = self.queues.divided_beside(slots.shard());
        let others: Vec<_> = others.map(|shard| (shard, answer.clone())).collect();
        for (shard, answer) in std::iter::once((slots.shard(), answer)).chain(others) {
            let Some(send) = self.settled((conn, message), shard, slots, number) else { continue };
            let found = self.settle(shard, send, slots, answer);
            record = record.or(found);
        }
        record
    }

    /// Handles the answer to a send for one shard. After a split there may be two that the send
    /// counts for.
    fn settle(
        &mut self,
        shard: ShardId,
        send: BatchSend,
        slots: Slots,
        answer: BatchReply,
    ) -> Option<ShardRecord> {
        let own = self.queues.in_flight(shard)?.own();
        let is_of_all = slots.lo <= own.lo && own.hi <= slots.hi;
        let is_of_others = slots.hi < own.lo || own.hi < slots.lo;
        let planted = self.turn.settings.planted;
        match answer {
            BatchReply::Refused(refusal) => return self.refused(shard, send, refusal),
            // Another child alone has ordered it.
            _ if is_of_others => return self.refused(shard, send, Refusal::NoSuchShard),
            _ if !is_of_all && !Planted::PartAnswersForAll.is_in(planted) => {
                let (now, timing) = (self.turn.now, self.turn.settings.timing);
                self.queues.change(shard, |queue| queue.answered_in_part(now, &timing));
            }
            BatchReply::Applied { values, tokens, time } => {
                if let Some(connection) = self.routes.router.connection_mut(send.conn) {
                    connection.expire_frozen(shard, self.turn.now);
                }
                self.queues.note_time(self.turn.now, shard, time);
                self.applied(shard, &values, &tokens);
            }
            BatchReply::Malformed => self.decided(shard, Failure::Malformed),
            BatchReply::AnsweredBefore => self.decided(shard, Failure::ResultGone),
            BatchReply::NoEffect => self.out_of_order(shard),
            BatchReply::Expired => self.expired(shard),
        }
        None
    }

    /// Takes a node's notice that a shard is frozen, or open again.
    pub(super) fn note_state(&mut self, conn: Conn, shard: ShardId, state: ShardAvailability) {
        let Some(connection) = self.routes.router.connection_mut(conn) else { return };
        let frozen_ms = self.turn.settings.timing.frozen_ms;
        match state {
            ShardAvailability::Frozen => {
                connection.note_frozen(shard, self.turn.now.plus_ms(frozen_ms));
            }
            ShardAvailability::Open => connection.clear_frozen(shard),
        }
        self.turn.agenda.shards.add(shard);
    }

    /// The send that the answer names, if it is an open one of the shard's batch in flight.
    fn settled(
        &mut self,
        (conn, message): (Conn, u64),
        shard: ShardId,
        slots: Slots,
        number: (SessionId, BatchSeq),
    ) -> Option<BatchSend> {
        let answered = |queue: &mut ShardQueue| queue.answered((conn, message), slots, number);
        let (send, bytes) = self.queues.change(shard, answered).flatten()?;
        if let Some(connection) = self.routes.router.connection_mut(conn) {
            connection.bytes -= bytes;
        }
        self.turn.agenda.shards.add(shard);
        Some(send)
    }

    // ---- decided -------------------------------------------------------------------------------

    fn applied(&mut self, shard: ShardId, values: &[i128], tokens: &[TokenOutcome]) {
        let Some(in_flight) = self.take(shard, ShardQueue::take_decided) else { return };
        let results = in_flight.outcomes(tokens).and_then(|outcomes| {
            let answers = in_flight.values(values, &outcomes)?;
            Some((outcomes, answers))
        });
        let Some((outcomes, answers)) = results else {
            // The batch was applied, but the values are malformed: no client gets a wrong number.
            return self.fail_all(&in_flight, Failure::ResultGone);
        };
        for (request, index, value) in answers {
            self.writes.value(request, index, value);
        }
        for (part, outcome) in in_flight.parts.iter().zip(outcomes) {
            if part.token.is_some() && outcome.is_applied() {
                self.queueing().send_held(part.request);
            }
            let failure = match outcome {
                TokenOutcome::Applied => {
                    self.writes.applied(part, self.turn.effects);
                    continue;
                }
                TokenOutcome::Replayed => {
                    self.writes.replayed(part, self.turn.effects);
                    continue;
                }
                TokenOutcome::Reused => Failure::TokenReused,
                TokenOutcome::TooOld => Failure::TokenTooOld,
                // The home of the token is the other child: this one has done nothing.
                TokenOutcome::Quota if in_flight.is_divided() => Failure::Frozen,
                TokenOutcome::Quota => Failure::TokenQuota,
            };
            self.writes.part_failed(part, failure, self.turn.effects);
        }
    }

    fn decided(&mut self, shard: ShardId, failure: Failure) {
        if let Some(in_flight) = self.take(shard, ShardQueue::take_decided) {
            self.fail_all(&in_flight, failure);
        }
    }

    // ---- this send had no effect ---------------------------------------------------------------

    /// Handles "out of order", which is a bug: with one batch in flight at a time, its number
    /// always follows. The whole session is inconsistent with the state of some shard, so nothing
    /// new is sent in it to any shard.
    fn out_of_order(&mut self, shard: ShardId) {
        let Some(in_flight) = self.end_session(shard, "order") else { return };
        self.sessions.give_up(in_flight.batch.session);
        self.fail_all(&in_flight, Failure::SessionAbandoned);
    }

    /// Handles an expired session, whose key was gone for long. Other shards may still know the
    /// session: they go on with it until there is another.
    fn expired(&mut self, shard: ShardId) {
        let Some(in_flight) = self.end_session(shard, "expired") else { return };
        let planted = self.turn.settings.planted;
        if in_flight.all_sends_rejected(planted) || Planted::ExpiredIsDefinite.is_in(planted) {
            self.requeue_or_fail(shard, in_flight, AfterReject::Wait);
        } else {
            self.fail_all(&in_flight, Failure::SessionExpired);
        }
    }

    /// Sends nothing more to the shard in the session of the batch in flight. Takes the batch, and
    /// requests another session if it was the present one.
    fn end_session(&mut self, shard: ShardId, reason: &'static str) -> Option<InFlightBatch> {
        self.turn.counts.refused(reason);
        let in_flight = self.take(shard, ShardQueue::end_session)?;
        if self.sessions.abandon(in_flight.batch.session) {
            self.turn.effects.push(Effect::AbandonSession(in_flight.batch.session));
        }
        Some(in_flight)
    }

    fn refused(
        &mut self,
        shard: ShardId,
        send: BatchSend,
        refusal: Refusal,
    ) -> Option<ShardRecord> {
        self.turn.counts.refused(refusal.label());
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
        let planted = self.turn.settings.planted;
        let in_flight = self.queues.in_flight(shard);
        if in_flight.is_some_and(|out| out.all_sends_rejected(planted))
            && let Some(in_flight) = self.take(shard, ShardQueue::take_in_flight)
        {
            self.requeue_or_fail(shard, in_flight, then);
        }
        match refusal {
            Refusal::NotPrimary(hint) => hint.map(|record| *record),
            _ => None,
        }
    }

    fn hold_back(&mut self, shard: ShardId, send: BatchSend, refusal: &Refusal) {
        let (now, timing) = (self.turn.now, &self.turn.settings.timing);
        let held = self.queues.change(shard, |queue| queue.hold_back(now, send, refusal, timing));
        if held == Some(true) {
            let state = match refusal {
                Refusal::Frozen => ShardAvailability::Frozen,
                _ => ShardAvailability::Open,
            };
            self.note_state(send.conn, shard, state);
        }
    }

    /// Puts the operations of a rejected batch back to where they were before it was sealed, or
    /// fails them. Operations of requests that were answered already are not sent again.
    fn requeue_or_fail(&mut self, shard: ShardId, in_flight: InFlightBatch, then: AfterReject) {
        match then {
            // The batch was empty, to get the time for operations that wait: they can't be sent
            // either.
            AfterReject::Fail(failure) if in_flight.parts.is_empty() => {
                self.queueing().fail_waiting(shard, failure);
            }
            AfterReject::Fail(failure) => self.fail_all(&in_flight, failure),
            AfterReject::Wait if in_flight.is_divided() => {
                for part in in_flight.parts {
                    if self.writes.is_open(part.request) {
                        self.queueing().route_again(part);
                    }
                }
            }
            AfterReject::Wait => {
                let mut parts = in_flight.parts;
                parts.retain(|part| self.writes.is_open(part.request));
                self.queues.change(shard, |queue| queue.push_front(parts));
            }
        }
    }

    // ---- helpers -------------------------------------------------------------------------------

    /// Takes the batch in flight away from its shard, and gives back the room that its open sends
    /// took on their connections.
    fn take(
        &mut self,
        shard: ShardId,
        take: fn(&mut ShardQueue) -> Option<InFlightBatch>,
    ) -> Option<InFlightBatch> {
        let in_flight = self.queues.change(shard, take).flatten()?;
        for conn in in_flight.open_on() {
            if let Some(connection) = self.routes.router.connection_mut(conn) {
                connection.bytes -= in_flight.batch.payload.len();
                self.turn.agenda.connections.add(conn);
            }
        }
        Some(in_flight)
    }

    fn fail_all(&mut self, in_flight: &InFlightBatch, failure: Failure) {
        for part in &in_flight.parts {
            self.writes.part_failed(part, failure, self.turn.effects);
        }
    }

    fn queueing(&mut self) -> Queueing<'_> {
        Queueing {
            turn: self.turn.reborrow(),
            sessions: self.sessions,
            routes: self.routes,
            queues: self.queues,
            writes: self.writes,
        }
    }
}
