//! The operations of one request in one shard, as they wait and travel together.

use std::collections::VecDeque;

use crate::ids::{Now, Slot, TimeMs};
use crate::memory;
use crate::ops::Op;
use crate::shard::idempotency::{IssueTime, Tag};

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

/// The slot, from the upper half of a counter's hash.
pub(super) fn slot_of(hash: u64) -> Slot {
    Slot((hash >> 48) as u16)
}

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
    pub(super) fn resolve(self, time: TimeMs, at: Now) -> Self {
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
