//! The operations of one shard: those that wait, and the batch in flight.
//!
//! The operations of one request in one shard are one *part*. Parts wait in the order of their
//! requests, and a batch takes them from the front. A part that was held comes later than its
//! request, and may stand behind a batch of later ones; so a rejected batch puts each part back at
//! the place of its request.

use std::collections::VecDeque;

use super::BatchSizes;
use super::in_flight::InFlightBatch;
use super::part::{PartToken, QueuedOp, RequestPart, range_of};
use super::seal::Sealer;
use crate::batch::{Batch, Codec};
use crate::ids::{BatchSeq, Conn, Now, SessionId, Slots, TimeMs};

/// The queue of one shard. See the module.
#[derive(Clone, Debug)]
pub(super) struct ShardQueue {
    /// The slots that the shard had when the queue was made: batches are sealed for them.
    pub slots: Slots,
    pub waiting: VecDeque<RequestPart>,
    pub waiting_ops: usize,
    pub waiting_bytes: usize,
    /// The arrival of the first part that waits.
    pub since: Now,
    pub in_flight: Option<InFlightBatch>,
    /// The shard's time from an answer, and when the answer came.
    known_time: Option<(TimeMs, Now)>,
    /// The session of the last batch, and its last number that was decided.
    numbering: (SessionId, BatchSeq),
    /// A session that has expired in the shard, or was given up: no new batch is made in it.
    pub ended: Option<SessionId>,
    /// Nothing is sent before this time.
    pub retry_at: Now,
    /// The number of consecutive refusals under the same record.
    pub refusals: u32,
    /// The last send was refused because the primary was overloaded.
    pub overloaded: bool,
    /// The connection in whose send queue the shard is.
    pub queued_on: Option<Conn>,
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

    /// Returns whether a full batch waits, so that more waiting gains nothing.
    pub(super) fn fills_a_batch(&self, sizes: &BatchSizes) -> bool {
        self.waiting_ops >= sizes.batch_ops_max || self.waiting_bytes >= sizes.batch_bytes_max
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

    /// Notes that apply has decided the batch that was in flight.
    pub(super) fn decided(&mut self, batch: &Batch) {
        assert_eq!(self.numbering.0, batch.session, "the batch was sealed under it");
        assert_eq!(self.numbering.1.next(), batch.batch_seq, "its number follows the last");
        self.numbering = (batch.session, batch.batch_seq);
    }
}
