//! What a node says of a batch, row by row of the table in DESIGN §11.
//!
//! An answer settles one send. Only an answer from apply decides the batch. After any other, the
//! question is whether the batch is definite (see [`undecided`](super::undecided)): a definite batch
//! is dissolved at once, so its number is free and its operations are back where they were before it
//! was sealed; what the table says of *them* is all that the rows differ in.

use super::outcome::Failure;
use super::undecided::{Send, Undecided};
use super::{Effect, Worker};
use crate::idempotency::TokenOutcome;
use crate::ids::{Bseq, Conn, SessionId, ShardId, Slots};
use crate::message::{Answer, NodeReply, Refusal, ShardAvailability};
use crate::planted::Planted;

/// What a definite batch means for its operations.
enum Then {
    /// They wait: to be sent to another primary, or under another session.
    Wait,
    Fail(Failure),
}

impl Worker {
    pub(super) fn on_reply(&mut self, conn: Conn, reply: NodeReply, effects: &mut Vec<Effect>) {
        // Nothing from a closed connection is handled.
        if self.router.lane(conn).is_none() {
            return;
        }
        match reply {
            NodeReply::Answer { message, slots, session, bseq, answer } => {
                let send = self.settled(conn, message, slots, (session, bseq));
                if let Some(send) = send {
                    self.on_answer(slots.shard(), send, answer, effects);
                }
            }
            NodeReply::ShardState { slots, state } => {
                self.note_state(conn, slots.shard(), state);
            }
            NodeReply::Read { id, result } => {
                if let Some(config) = self.reads.answered(self.now, conn, id, result, effects) {
                    self.learn(config);
                }
            }
        }
    }

    /// The send that the answer names, if it is one of the undecided batch and was open.
    fn settled(
        &mut self,
        conn: Conn,
        message: u64,
        slots: Slots,
        number: (SessionId, Bseq),
    ) -> Option<Send> {
        let lane = self.router.lane_mut(conn)?;
        lane.answered(message);
        self.touched.insert(conn);
        let undecided = self.queues.get_mut(&slots.shard())?.undecided.as_mut()?;
        let batch = &undecided.batch;
        if batch.slots != slots || (batch.session, batch.bseq) != number {
            return None;
        }
        let send = undecided.answered(conn, message)?;
        lane.bytes -= undecided.batch.payload.len();
        self.due.insert(slots.shard());
        Some(send)
    }

    fn on_answer(&mut self, shard: ShardId, send: Send, answer: Answer, effects: &mut Vec<Effect>) {
        match answer {
            Answer::Applied { values, tokens, time } => {
                if let Some(lane) = self.router.lane_mut(send.conn) {
                    lane.forget_frozen(shard, self.now);
                }
                if self.shard_time(self.now).is_none_or(|newest| newest <= time) {
                    self.newest = Some((time, self.now));
                }
                if let Some(queue) = self.queues.get_mut(&shard) {
                    queue.hear(self.now, time);
                }
                self.applied(shard, &values, &tokens, effects);
            }
            Answer::Malformed => self.decided(shard, Failure::Malformed, effects),
            Answer::AnsweredBefore => self.decided(shard, Failure::ResultGone, effects),
            Answer::NoEffect => self.out_of_order(shard, effects),
            Answer::Expired => self.expired(shard, effects),
            Answer::Refused(refusal) => self.refused(shard, send, refusal, effects),
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
        let Some(undecided) = self.take_decided(shard) else { return };
        let told = undecided.outcomes(tokens).and_then(|outcomes| {
            let answers = undecided.values(values, &outcomes)?;
            Some((outcomes, answers))
        });
        let Some((outcomes, answers)) = told else {
            // Applied, but the values are nonsense: nobody is told a wrong number.
            return self.fail_all(&undecided, Failure::ResultGone, effects);
        };
        for (request, index, value) in answers {
            self.requests.value(request, index, value);
        }
        for (part, outcome) in undecided.parts.iter().zip(outcomes) {
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
        if let Some(undecided) = self.take_decided(shard) {
            self.fail_all(&undecided, failure, effects);
        }
    }

    /// Its number is used up.
    fn take_decided(&mut self, shard: ShardId) -> Option<Undecided> {
        let undecided = self.take_undecided(shard)?;
        let queue = self.queues.get_mut(&shard)?;
        queue.decided(&undecided.batch);
        queue.refusals = 0;
        queue.overloaded = false;
        Some(undecided)
    }

    // ---- this send had no effect ---------------------------------------------------------------

    /// A bug: with one batch out at a time, its number always follows. The whole session is at odds
    /// with what some shard knows of it, so no shard is sent anything new in it.
    fn out_of_order(&mut self, shard: ShardId, effects: &mut Vec<Effect>) {
        let Some(undecided) = self.end_session(shard, "order", effects) else { return };
        if self.present == Some(undecided.batch.session) {
            self.present = None;
        }
        self.fail_all(&undecided, Failure::SessionAbandoned, effects);
    }

    /// The key was gone for long. Other shards may still know the session: they go on with it until
    /// there is another.
    fn expired(&mut self, shard: ShardId, effects: &mut Vec<Effect>) {
        let Some(undecided) = self.end_session(shard, "expired", effects) else { return };
        let planted = self.settings.planted;
        if undecided.is_definite(planted) || Planted::ExpiredIsDefinite.is_in(planted) {
            self.dissolve(shard, undecided, Then::Wait, effects);
        } else {
            self.fail_all(&undecided, Failure::SessionExpired, effects);
        }
    }

    /// Nothing more is sent to the shard in the session of the batch that is out. Takes the batch,
    /// and asks for another session if it was the present one.
    fn end_session(
        &mut self,
        shard: ShardId,
        reason: &'static str,
        effects: &mut Vec<Effect>,
    ) -> Option<Undecided> {
        self.counts.refused(reason);
        let undecided = self.take_undecided(shard)?;
        let session = Some(undecided.batch.session);
        self.queues.get_mut(&shard)?.ended = session;
        if self.present == session && self.abandoned != session {
            self.abandoned = session;
            effects.push(Effect::AbandonSession(undecided.batch.session));
        }
        Some(undecided)
    }

    fn refused(&mut self, shard: ShardId, send: Send, refusal: Refusal, effects: &mut Vec<Effect>) {
        self.counts.refused(reason(&refusal));
        let then = match &refusal {
            Refusal::NotPrimary(_) | Refusal::NoSuchShard | Refusal::Damaged | Refusal::Stale => {
                Then::Wait
            }
            // A table is being flushed: that takes less than most clients' patience, and the queue here is bounded.
            Refusal::Overloaded => Then::Wait,
            Refusal::Frozen => Then::Fail(Failure::Frozen),
            Refusal::NoSpace => Then::Fail(Failure::NoSpace),
            Refusal::TooLarge => Then::Fail(Failure::TooLarge),
        };
        self.hold_back(shard, send, &refusal);
        let queue = self.queues.get_mut(&shard);
        let undecided = queue.and_then(|queue| queue.undecided.as_ref());
        let definite = undecided.is_some_and(|out| out.is_definite(self.settings.planted));
        if definite && let Some(undecided) = self.take_undecided(shard) {
            self.dissolve(shard, undecided, then, effects);
        }
        if let Refusal::NotPrimary(Some(config)) = refusal {
            self.learn(*config);
        }
    }

    /// When the shard is to be tried again. An answer to an earlier send, from a node that was
    /// primary once, holds nothing back.
    fn hold_back(&mut self, shard: ShardId, send: Send, refusal: &Refusal) {
        let Some(queue) = self.queues.get_mut(&shard) else { return };
        if !queue.undecided.as_ref().is_some_and(|undecided| undecided.is_last(send)) {
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

    /// Back to where it was before it was sealed. Operations whose client has been told something
    /// already are not sent again.
    fn dissolve(
        &mut self,
        shard: ShardId,
        undecided: Undecided,
        then: Then,
        effects: &mut Vec<Effect>,
    ) {
        match then {
            // It was to tell the time to those that wait: they can't be sent either.
            Then::Fail(failure) if undecided.parts.is_empty() => {
                self.fail_waiting(shard, failure, effects);
            }
            Then::Fail(failure) => self.fail_all(&undecided, failure, effects),
            Then::Wait => {
                let mut parts = undecided.parts;
                parts.retain(|part| self.requests.is_open(part.request));
                self.bytes += parts.iter().map(|part| part.bytes).sum::<usize>();
                if let Some(queue) = self.queues.get_mut(&shard) {
                    queue.push_front(parts);
                }
            }
        }
    }

    // ---- helpers -------------------------------------------------------------------------------

    /// Takes the batch away from its shard: nothing of it is sent any more.
    fn take_undecided(&mut self, shard: ShardId) -> Option<Undecided> {
        let undecided = self.queues.get_mut(&shard)?.undecided.take()?;
        self.undecided -= 1;
        self.bytes -= undecided.bytes();
        for conn in undecided.open_on() {
            if let Some(lane) = self.router.lane_mut(conn) {
                lane.bytes -= undecided.batch.payload.len();
                self.touched.insert(conn);
            }
        }
        Some(undecided)
    }

    pub(super) fn fail_all(
        &mut self,
        undecided: &Undecided,
        failure: Failure,
        effects: &mut Vec<Effect>,
    ) {
        for part in &undecided.parts {
            self.requests.part_failed(part, failure, effects);
        }
    }

    fn note_state(&mut self, conn: Conn, shard: ShardId, state: ShardAvailability) {
        let Some(lane) = self.router.lane_mut(conn) else { return };
        let frozen_ms = self.settings.timing.frozen_ms;
        match state {
            ShardAvailability::Frozen => lane.froze(shard, self.now.plus_ms(frozen_ms)),
            ShardAvailability::Open => lane.opened(shard),
        }
        self.due.insert(shard);
    }
}

fn reason(refusal: &Refusal) -> &'static str {
    match refusal {
        Refusal::NotPrimary(_) => "not-primary",
        Refusal::NoSuchShard => "no-such-shard",
        Refusal::Frozen => "frozen",
        Refusal::Overloaded => "overloaded",
        Refusal::NoSpace => "no-space",
        Refusal::TooLarge => "too-large",
        Refusal::Damaged => "damaged",
        Refusal::Stale => "stale",
    }
}
