//! The operations of one shard: those that wait, and the batch that is out.
//!
//! What one request asks of one shard is one *part*. Parts wait in the order of their requests, and
//! a batch takes them from the front. A part that was held comes later than its request, and may stand behind a batch
//! of later ones; so a dissolved batch puts each part back at the place of its request.

use std::collections::VecDeque;

use super::Sizes;
use super::seal::Sealer;
use super::undecided::Undecided;
use crate::batch::{Batch, Codec};
use crate::idempotency::{IssueTime, Tag};
use crate::ids::{Bseq, Conn, Now, SessionId, Slots, TimeMs};
use crate::memory;
use crate::ops::Op;

/// An operation on its way.
#[derive(Clone, Debug)]
pub(super) struct QueuedOp {
    pub op: Op,
    /// The upper half of the counter's hash: its top bits are the slot.
    pub hash: u64,
    /// Its place in the request, or [`HOME`].
    pub index: u32,
    /// Its place in the batch: that of the op that it was merged into.
    pub entry: u32,
}

/// In the place of an index: the operation adds nothing, and brings a token to its home. The client did not ask for it.
pub(super) const HOME: u32 = u32::MAX;

impl QueuedOp {
    /// What it costs to keep.
    pub(super) fn bytes(&self) -> usize {
        size_of::<Self>() + memory::of_bytes(self.op.counter.name().len())
    }
}

/// What one request asks of one shard, or the rest of it. With a token there is no rest: all of it
/// is in one batch.
#[derive(Clone, Debug)]
pub(super) struct Part {
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

/// When an operation with a token was issued. It must not be later than that was, in the shard's own
/// time; earlier does no harm but that it is too old sooner.
#[derive(Clone, Copy, Debug)]
pub(super) enum Issued {
    At(IssueTime),
    /// It came at this moment, and nothing was heard of the shard's time lately.
    Came(Now),
}

impl Issued {
    /// The shard's time was told at this moment: an operation that came before it was issued before it.
    fn heard(self, time: TimeMs, at: Now) -> Self {
        match self {
            Self::Came(came) if came <= at => {
                let then = TimeMs(time.0.saturating_sub(at.ms_since(came)));
                Self::At(IssueTime::Heard(then))
            }
            issued => issued,
        }
    }
}

impl Part {
    pub(super) fn new(request: u64, ops: Vec<QueuedOp>, token: Option<PartToken>) -> Self {
        let bytes = ops.iter().map(QueuedOp::bytes).sum();
        Self { request, ops, bytes, token }
    }

    /// How many of its operations are the client's.
    pub(super) fn asked(&self) -> usize {
        self.ops.iter().filter(|queued| queued.index != HOME).count()
    }

    /// It can't be sent before the shard's time is known.
    pub(super) fn lacks_time(&self) -> bool {
        matches!(self.token, Some(PartToken { issued: Issued::Came(_), .. }))
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
pub(super) fn range_of(parts: &VecDeque<Part>, request: u64) -> std::ops::Range<usize> {
    let first = parts.partition_point(|part| part.request < request);
    let count = parts.iter().skip(first).take_while(|part| part.request == request).count();
    first..first + count
}

/// See the module.
#[derive(Clone, Debug)]
pub(super) struct Queue {
    /// The range that the shard had when the queue was made: batches are sealed for it.
    pub slots: Slots,
    pub waiting: VecDeque<Part>,
    pub waiting_ops: usize,
    pub waiting_bytes: usize,
    /// When the first of those that wait came.
    pub since: Now,
    pub undecided: Option<Undecided>,
    /// The shard's time as an answer told it, and when.
    heard: Option<(TimeMs, Now)>,
    /// The session of the last batch, and its last number that was decided.
    numbering: (SessionId, Bseq),
    /// A session that the shard has collected, or that was given up: no new batch is made in it.
    pub ended: Option<SessionId>,
    /// Nothing is sent before.
    pub retry_at: Now,
    /// Refusals in a row under one and the same config.
    pub refusals: u32,
    /// The last send was refused since the primary had too much to do.
    pub overloaded: bool,
    /// The lane in whose line the shard stands.
    pub in_line: Option<Conn>,
}

impl Queue {
    pub(super) fn new(slots: Slots) -> Self {
        Self {
            slots,
            waiting: VecDeque::new(),
            waiting_ops: 0,
            waiting_bytes: 0,
            since: Now(0),
            undecided: None,
            heard: None,
            numbering: (SessionId::default(), Bseq(0)),
            ended: None,
            retry_at: Now(0),
            refusals: 0,
            overloaded: false,
            in_line: None,
        }
    }

    /// Adds a part behind those of its request and of earlier ones. One that was held may find later requests here.
    pub(super) fn push(&mut self, now: Now, mut part: Part) {
        if let (Some(token), Some((time, at))) = (&mut part.token, self.heard) {
            token.issued = token.issued.heard(time, at);
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

    fn put(&mut self, at: usize, part: Part) {
        self.waiting_ops += part.ops.len();
        self.waiting_bytes += part.bytes;
        self.waiting.insert(at, part);
    }

    /// Adds one operation where the parts of its request are, or would be.
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
            self.waiting.insert(range.start, Part::new(request, vec![queued], token));
            return;
        }
        let part = &mut self.waiting[range.end - 1];
        part.bytes += queued.bytes();
        part.ops.push(queued);
    }

    /// Puts the parts of a dissolved batch back where they came from. Parts of earlier requests may have come behind it.
    pub(super) fn push_front(&mut self, parts: VecDeque<Part>) {
        for part in parts.into_iter().rev() {
            let at = range_of(&self.waiting, part.request).start;
            self.put(at, part);
        }
        self.since = Now(0);
    }

    /// Takes out everything that waits.
    pub(super) fn take_waiting(&mut self) -> VecDeque<Part> {
        self.waiting_ops = 0;
        self.waiting_bytes = 0;
        std::mem::take(&mut self.waiting)
    }

    /// Takes out what waits of one request.
    pub(super) fn take_request(&mut self, request: u64) -> Vec<Part> {
        let range = range_of(&self.waiting, request);
        let parts: Vec<Part> = self.waiting.drain(range).collect();
        for part in &parts {
            self.waiting_ops -= part.ops.len();
            self.waiting_bytes -= part.bytes;
        }
        parts
    }

    /// The shard's own time, as heard in the last `ms` milliseconds.
    pub(super) fn heard(&self, now: Now, ms: u64) -> Option<TimeMs> {
        self.heard.filter(|(_, at)| now.ms_since(*at) <= ms).map(|(time, _)| time)
    }

    /// An answer from apply has told the shard's time: whoever waited for it was issued before.
    pub(super) fn hear(&mut self, now: Now, time: TimeMs) {
        self.heard = Some((time, now));
        for token in self.waiting.iter_mut().filter_map(|part| part.token.as_mut()) {
            token.issued = token.issued.heard(time, now);
        }
    }

    /// Enough for a batch that nobody need wait for.
    pub(super) fn fills_a_batch(&self, sizes: &Sizes) -> bool {
        self.waiting_ops >= sizes.batch_ops_max || self.waiting_bytes >= sizes.batch_bytes_max
    }

    /// Makes a batch of what waits. Its number follows the last one that was decided: a number that
    /// a refusal has freed is used again.
    pub(super) fn seal(&mut self, session: SessionId, sealer: &mut Sealer) -> &Undecided {
        assert!(self.undecided.is_none(), "one batch is undecided at a time");
        let sealed = sealer.seal(&mut self.waiting, self.waiting_ops);
        for part in &sealed.parts {
            self.waiting_ops -= part.ops.len();
            self.waiting_bytes -= part.bytes;
        }
        if self.numbering.0 != session {
            self.numbering = (session, Bseq(0));
        }
        let bseq = self.numbering.1.next();
        // All numbers below were answered by apply: one batch is undecided at a time.
        let (slots, below) = (self.slots, bseq);
        let batch = Batch::seal(slots, session, bseq, below, Codec::Raw, sealed.payload);
        self.undecided.insert(Undecided::new(batch, sealed.parts, sealed.entries, sealed.values))
    }

    /// The batch that was out has been decided by apply.
    pub(super) fn decided(&mut self, batch: &Batch) {
        assert_eq!(self.numbering.0, batch.session, "the batch was sealed under it");
        assert_eq!(self.numbering.1.next(), batch.bseq, "its number follows the last");
        self.numbering = (batch.session, batch.bseq);
    }
}
