//! The batch in flight: its bytes, the requests that wait for it, and the state of each of its
//! sends.
//!
//! The essential question is whether all sends were *rejected*: only then may its clients be
//! answered "not applied", and its number be given to other bytes. That takes an answer to every
//! send, and none with an effect. A send whose connection was closed is never answered, so a batch
//! with such a send stays in flight until apply answers some send, however many refusals come in
//! the meantime.

use std::collections::VecDeque;

use super::part::{QueuedOp, RequestPart, range_of, slot_of};
use crate::batch::Batch;
use crate::ids::{Conn, Epoch, Slots};
use crate::ops::OpKind;
use crate::planted::Planted;
use crate::shard::idempotency::TokenOutcome;

/// One send of a batch.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct BatchSend {
    /// The connection.
    pub conn: Conn,
    /// The number of the message.
    pub message: u64,
    /// The epoch of the record under which it was sent.
    pub epoch: Epoch,
}

/// The batch of a shard that was sent and is not decided. See the module.
#[derive(Clone, Debug)]
pub(super) struct InFlightBatch {
    pub batch: Batch,
    pub parts: VecDeque<RequestPart>,
    bytes: usize,
    /// The number of operations, before adds of one counter were merged.
    ops: usize,
    /// The number of ops in the payload.
    entries: usize,
    /// The number of ops that ask for a value.
    values: usize,
    /// The sends without an answer, on connections that are open.
    open: Vec<BatchSend>,
    /// A send was lost with its connection, and will never be answered.
    cut: bool,
    /// The last send.
    last: Option<BatchSend>,
    /// The slots whose operations are the parts: all of the batch, until its shard is split.
    own: Slots,
    /// The shape of the whole batch, of which the parts are a child's share.
    whole: Option<Box<WholeBatch>>,
}

/// The shape of a batch whose shard was split while it was in flight. Each child answers with the
/// results of the whole batch, in which those of the other child are 0.
#[derive(Clone, Debug)]
struct WholeBatch {
    /// Per op of the payload: whether it asks for a value.
    asks: Vec<bool>,
    /// The number of parts with a token.
    tokens: usize,
    /// Per own part: the index of its token among those.
    token_at: Vec<Option<usize>>,
}

impl InFlightBatch {
    pub(super) fn new(
        batch: Batch,
        parts: VecDeque<RequestPart>,
        entries: usize,
        values: usize,
    ) -> Self {
        let bytes = parts.iter().map(|part| part.bytes).sum();
        let ops = parts.iter().map(|part| part.ops.len()).sum();
        let (open, own) = (Vec::new(), batch.slots);
        let (cut, last, whole) = (false, None, None);
        Self { batch, parts, bytes, ops, entries, values, open, cut, last, own, whole }
    }

    /// Takes out the share of a new child of the shard. Every send to the parent counts as one to
    /// the child, too.
    pub(super) fn carve(&mut self, slots: Slots, planted: Option<Planted>) -> Self {
        let whole = self.whole.take().unwrap_or_else(|| Box::new(self.shape()));
        let mut left = WholeBatch { token_at: Vec::new(), ..(*whole).clone() };
        let mut right = left.clone();
        let (mut kept, mut carved) = (VecDeque::new(), VecDeque::new());
        for (part, token_at) in std::mem::take(&mut self.parts).into_iter().zip(whole.token_at) {
            let RequestPart { request, ops, token, .. } = part;
            let inside = |queued: &QueuedOp| slots.contains(slot_of(queued.hash));
            let (of_child, rest): (Vec<_>, Vec<_>) = ops.into_iter().partition(inside);
            if !of_child.is_empty() {
                carved.push_back(RequestPart::new(request, of_child, token));
                right.token_at.push(token_at);
            }
            if !rest.is_empty() {
                kept.push_back(RequestPart::new(request, rest, token));
                left.token_at.push(token_at);
            }
        }
        let forgets = Planted::SendsToParentForgotten.is_in(planted);
        let (batch, open) = (self.batch.clone(), self.open.clone());
        let mut child = Self::new(batch, carved, self.entries, self.values);
        child.open = if forgets { Vec::new() } else { open };
        child.cut = self.cut && !forgets;
        (child.own, child.whole) = (slots, Some(Box::new(right)));
        self.parts = kept;
        self.bytes = self.parts.iter().map(|part| part.bytes).sum();
        self.ops = self.parts.iter().map(|part| part.ops.len()).sum();
        (self.own.hi, self.whole) = (slots.lo - 1, Some(Box::new(left)));
        child
    }

    fn shape(&self) -> WholeBatch {
        let mut tokens = 0;
        let mut next = |part: &RequestPart| {
            part.token.as_ref()?;
            tokens += 1;
            Some(tokens - 1)
        };
        let token_at = self.parts.iter().map(&mut next).collect();
        WholeBatch { asks: self.asks(), tokens, token_at }
    }

    /// Returns whether the parts are only a child's share of the batch.
    pub(super) fn is_divided(&self) -> bool {
        self.whole.is_some()
    }

    /// The slots whose operations are the parts.
    pub(super) fn own(&self) -> Slots {
        self.own
    }

    /// Notes that a send was answered for some of the operations only: what became of the others is
    /// not known.
    pub(super) fn answered_in_part(&mut self) {
        self.cut = true;
    }

    /// Returns whether the batch should be sent to this primary: it was not yet sent under this
    /// epoch, or that send was refused. The same process may come to lead again; it has then
    /// forgotten what it received when it led before, and would never answer that.
    pub(super) fn is_due(&self, conn: Conn, epoch: Epoch) -> bool {
        let here = |last: BatchSend| last.conn == conn && last.epoch == epoch;
        !self.last.is_some_and(|last| here(last) && self.open.contains(&last))
    }

    pub(super) fn sent(&mut self, send: BatchSend) {
        self.open.push(send);
        self.last = Some(send);
    }

    /// Notes that a send was answered. Returns `None` if it was not open.
    pub(super) fn answered(&mut self, conn: Conn, message: u64) -> Option<BatchSend> {
        let at = self.open.iter().position(|send| (send.conn, send.message) == (conn, message))?;
        Some(self.open.swap_remove(at))
    }

    pub(super) fn is_last(&self, send: BatchSend) -> bool {
        self.last == Some(send)
    }

    /// Notes that a connection is gone. Returns whether a send was lost with it.
    pub(super) fn closed(&mut self, conn: Conn) -> bool {
        let before = self.open.len();
        self.open.retain(|send| send.conn != conn);
        let cut = self.open.len() < before;
        self.cut |= cut;
        cut
    }

    /// Returns whether every send was answered. If none of them had an effect, none ever will.
    pub(super) fn all_sends_rejected(&self, planted: Option<Planted>) -> bool {
        let cut = self.cut && !Planted::ClosedIsRefused.is_in(planted);
        (self.open.is_empty() || Planted::OneRefusalDecides.is_in(planted)) && !cut
    }

    /// The connections with an open send.
    pub(super) fn open_on(&self) -> impl Iterator<Item = Conn> + '_ {
        self.open.iter().map(|send| send.conn)
    }

    /// The parts of one request. No part is ever taken out, since the values of others depend on
    /// it.
    pub(super) fn parts_of(&self, request: u64) -> impl Iterator<Item = &RequestPart> {
        self.parts.range(range_of(&self.parts, request))
    }

    /// The number of operations, before adds of one counter were merged.
    pub(super) fn ops(&self) -> usize {
        self.ops
    }

    /// The number of ops in the payload.
    pub(super) fn entries(&self) -> usize {
        self.entries
    }

    /// The memory of its operations, in bytes.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// The outcome of each part, given the outcomes of those with a token. Returns `None` if there
    /// are too few or too many of them.
    pub(super) fn outcomes(&self, tokens: &[TokenOutcome]) -> Option<Vec<TokenOutcome>> {
        if let Some(whole) = &self.whole {
            let outcome = |at: &Option<usize>| match at {
                Some(at) => tokens.get(*at).copied(),
                None => Some(TokenOutcome::Applied),
            };
            let outcomes = whole.token_at.iter().map(outcome).collect::<Option<_>>();
            return outcomes.filter(|_| tokens.len() == whole.tokens);
        }
        let mut tokens = tokens.iter().copied();
        let outcome = |part: &RequestPart| match part.token {
            None => Some(TokenOutcome::Applied),
            Some(_) => tokens.next(),
        };
        let outcomes = self.parts.iter().map(outcome).collect::<Option<_>>();
        outcomes.filter(|_| tokens.next().is_none())
    }

    /// The answer to each operation that asks for a value, as (request, index, value), given the
    /// values of the batch and the outcome of each part. Returns `None` if there are too few or too
    /// many values.
    pub(super) fn values(
        &self,
        values: &[i128],
        outcomes: &[TokenOutcome],
    ) -> Option<Vec<(u64, u32, i128)>> {
        if values.len() != self.values {
            return None;
        }
        if values.is_empty() {
            return Some(Vec::new());
        }
        let mut rest = self.final_values(values);
        let mut answers = Vec::new();
        // The order is from the last to the first: each subtracts its delta, for those before it.
        for (part, outcome) in self.parts.iter().zip(outcomes).rev() {
            if !outcome.is_applied() {
                continue;
            }
            for queued in part.ops.iter().rev() {
                let rest = &mut rest[queued.entry as usize];
                if queued.op.kind.returns_value() {
                    answers.push((part.request, queued.index, *rest));
                }
                match queued.op.kind {
                    // Values come from a socket: a wrong one must not end the process.
                    OpKind::Add { delta } | OpKind::AddReturning { delta } => {
                        *rest = rest.wrapping_sub(delta);
                    }
                    // Nothing is merged with a delete.
                    OpKind::Delete => {}
                }
            }
        }
        Some(answers)
    }

    /// Per op of the payload: whether it asks for a value.
    fn asks(&self) -> Vec<bool> {
        let mut asks = vec![false; self.entries];
        for queued in self.parts.iter().flat_map(|part| &part.ops) {
            asks[queued.entry as usize] |= queued.op.kind.returns_value();
        }
        asks
    }

    /// The value of each op of the payload, 0 for those that ask for none.
    fn final_values(&self, values: &[i128]) -> Vec<i128> {
        let asks = self.whole.as_ref().map_or_else(|| self.asks(), |whole| whole.asks.clone());
        let mut values = values.iter().copied();
        let value = |asks: bool| if asks { values.next().unwrap_or_default() } else { 0 };
        asks.into_iter().map(value).collect()
    }
}
