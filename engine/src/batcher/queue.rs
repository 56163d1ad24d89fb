//! The operations of one shard: those that wait, and the batch in flight.
//!
//! The operations of one request in one shard are one *part*. Parts wait in the order of their
//! requests, and a batch takes them from the front. A part that was held comes later than its
//! request, and may stand behind a batch of later ones; so a rejected batch puts each part back at
//! the place of its request.

use std::collections::VecDeque;

use super::BatchSizes;
use super::in_flight::InFlightBatch;
use super::seal::Sealer;
use crate::batch::{Batch, Codec};
use crate::idempotency::{IssueTime, Tag};
use crate::ids::{BatchSeq, Conn, Now, SessionId, Slots, TimeMs};
use crate::memory;
use crate::ops::Op;

/// An operation of a request that has not been answered.
#[derive(Clone, Debug)]
pub(super) struct QueuedOp {
    pub op: Op,
    /// The upper half of the counter's hash; its top bits are the slot.
    pub hash: u64,
    /// The index in the request, or [`HOME`].
    pub index: u32,
    /// The index in the batch, which is that of the op that the operation was merged into.
    pub entry: u32,
}

/// The index of an operation that adds nothing and carries a token to its home. It is not one of
/// the client's.
pub(super) const HOME: u32 = u32::MAX;

impl QueuedOp {
    /// The memory that the operation takes, in bytes.
    pub(super) fn bytes(&self) -> usize {
        size_of::<Self>() + memory::of_bytes(self.op.counter.name().len())
    }
}

/// The operations of one request in one shard, or a rest of them. A part with a token has no rest:
/// it goes into one batch as a whole.
#[derive(Clone, Debug)]
pub(super) struct RequestPart {
    pub request: u64,
    pub ops: Vec<QueuedOp>,
    pub bytes: usize,
    pub token: Option<PartToken>,
}

/// The token of a part.
#[derive(Clone, Copy, Debug)]
pub(super) struct PartToken {
    pub tag: Tag,
    pub issued: Issued,
}

/// The issue time of an operation with a token. It must not be later than the actual one, in the
/// shard's own time; an earlier one only makes the operation too old sooner.
#[derive(Clone, Copy, Debug)]
pub(super) enum Issued {
    /// The issue time is known.
    At(IssueTime),
    /// The operation arrived at this moment, and no recent time of the shard is known.
    Arrived(Now),
}

impl Issued {
    /// The shard's time was known at `at`: an operation that arrived before that was issued before
    /// it.
    fn resolve(self, time: TimeMs, at: Now) -> Self {
        match self {
            Self::Arrived(came) if came <= at => {
                let then = TimeMs(time.0.saturating_sub(at.ms_since(came)));
                Self::At(IssueTime::Arrived(then))
            }
            issued => issued,
        }
    }
}

impl RequestPart {
    pub(super) fn new(request: u64, ops: Vec<QueuedOp>, token: Option<PartToken>) -> Self {
        let bytes = ops.iter().map(QueuedOp::bytes).sum();
        Self { request, ops, bytes, token }
    }

    /// The number of its operations that are the client's.
    pub(super) fn asked(&self) -> usize {
        self.ops.iter().filter(|queued| queued.index != HOME).count()
    }

    /// Returns whether the part can't be sent before the shard's time is known.
    pub(super) fn lacks_time(&self) -> bool {
        matches!(self.token, Some(PartToken { issued: Issued::Arrived(_), .. }))
    }

    /// Keeps the first `len` operations and returns the rest.
    pub(super) fn split_off(&mut self, len: usize) -> Self {
        assert!(self.token.is_none(), "a part with a token is never split");
        let rest = Self::new(self.request, self.ops.split_off(len), None);
        self.bytes -= rest.bytes;
        rest
    }
}

/// The parts of a request in a list that is in the order of the requests.
pub(super) fn range_of(parts: &VecDeque<RequestPart>, request: u64) -> std::ops::Range<usize> {
    let first = parts.partition_point(|part| part.request < request);
    let count = parts.iter().skip(first).take_while(|part| part.request == request).count();
    first..first + count
}

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
