//! The batch that is out: its bytes, who waits for it, and what has become of each of its sends.
//!
//! *Definite* is the one question that matters: may its clients be told "not applied", and its
//! number be given to other bytes? Only if every send was answered and none had an effect. A send
//! whose connection was closed is never answered, so a batch with such a send is undecided until
//! some send is answered from apply, however many refusals come meanwhile.

use std::collections::VecDeque;

use super::queue::{Part, range_of};
use crate::batch::Batch;
use crate::idempotency::TokenOutcome;
use crate::ids::{Conn, Epoch};
use crate::ops::OpKind;
use crate::planted::Planted;

/// One send of a batch.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Send {
    pub conn: Conn,
    pub message: u64,
    /// Of the config under which it was sent.
    pub epoch: Epoch,
}

/// See the module.
#[derive(Clone, Debug)]
pub(super) struct Undecided {
    pub batch: Batch,
    pub parts: VecDeque<Part>,
    entries: usize,
    values: usize,
    /// Sends without an answer, on connections that stand.
    open: Vec<Send>,
    /// Some send will never be answered.
    cut: bool,
    last: Option<Send>,
}

impl Undecided {
    pub(super) fn new(batch: Batch, parts: VecDeque<Part>, entries: usize, values: usize) -> Self {
        Self { batch, parts, entries, values, open: Vec::new(), cut: false, last: None }
    }

    /// It is to be sent to this primary: it has not been under this epoch, or that send was
    /// refused. The same process may come to lead again; it then knows nothing of what it was sent
    /// when it led before, and would never answer that.
    pub(super) fn is_due(&self, conn: Conn, epoch: Epoch) -> bool {
        let here = |last: Send| last.conn == conn && last.epoch == epoch;
        !self.last.is_some_and(|last| here(last) && self.open.contains(&last))
    }

    pub(super) fn sent(&mut self, send: Send) {
        self.open.push(send);
        self.last = Some(send);
    }

    /// Takes note that a send was answered. None: it was not open.
    pub(super) fn answered(&mut self, conn: Conn, message: u64) -> Option<Send> {
        let at = self.open.iter().position(|send| (send.conn, send.message) == (conn, message))?;
        Some(self.open.swap_remove(at))
    }

    pub(super) fn is_last(&self, send: Send) -> bool {
        self.last == Some(send)
    }

    /// Takes note that a connection is gone. Was some send on it?
    pub(super) fn closed(&mut self, conn: Conn) -> bool {
        let before = self.open.len();
        self.open.retain(|send| send.conn != conn);
        let cut = self.open.len() < before;
        self.cut |= cut;
        cut
    }

    /// Every send was answered. If none of them had an effect, none ever will.
    pub(super) fn is_definite(&self, planted: Option<Planted>) -> bool {
        let cut = self.cut && !Planted::ClosedIsRefused.is_in(planted);
        (self.open.is_empty() || Planted::OneRefusalDecides.is_in(planted)) && !cut
    }

    /// Connections with a send that is open.
    pub(super) fn open_on(&self) -> impl Iterator<Item = Conn> + '_ {
        self.open.iter().map(|send| send.conn)
    }

    /// What one request asks of it. Nothing is ever taken out: others' values depend on it.
    pub(super) fn parts_of(&self, request: u64) -> impl Iterator<Item = &Part> {
        self.parts.range(range_of(&self.parts, request))
    }

    /// Ops in the payload.
    pub(super) fn entries(&self) -> usize {
        self.entries
    }

    pub(super) fn bytes(&self) -> usize {
        self.parts.iter().map(|part| part.bytes).sum()
    }

    /// What became of each part, given what became of those with a token. None: they are not as many
    /// as there are.
    pub(super) fn outcomes(&self, tokens: &[TokenOutcome]) -> Option<Vec<TokenOutcome>> {
        let mut tokens = tokens.iter().copied();
        let outcome = |part: &Part| match part.token {
            None => Some(TokenOutcome::Applied),
            Some(_) => tokens.next(),
        };
        let outcomes = self.parts.iter().map(outcome).collect::<Option<_>>();
        outcomes.filter(|_| tokens.next().is_none())
    }

    /// The answer to each operation that asks for a value, as (request, index, value), given the
    /// values of the batch and what became of each part. None: they are not as many as were asked for.
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
        // From the last to the first: each takes off what it added, for those before it.
        for (part, outcome) in self.parts.iter().zip(outcomes).rev() {
            if !outcome.is_applied() {
                continue;
            }
            for queued in part.ops.iter().rev() {
                let rest = &mut rest[queued.entry as usize];
                if queued.op.kind.needs_value() {
                    answers.push((part.request, queued.index, *rest));
                }
                if let OpKind::Add { delta } | OpKind::AddReturning { delta } = queued.op.kind {
                    // Values come from a socket: nonsense must not end the process.
                    *rest = rest.wrapping_sub(delta);
                }
            }
        }
        Some(answers)
    }

    /// Per op of the payload its value, and 0 for those that ask for none.
    fn final_values(&self, values: &[i128]) -> Vec<i128> {
        let mut asks = vec![false; self.entries];
        for queued in self.parts.iter().flat_map(|part| &part.ops) {
            asks[queued.entry as usize] |= queued.op.kind.needs_value();
        }
        let mut values = values.iter().copied();
        let value = |asks: bool| if asks { values.next().unwrap_or_default() } else { 0 };
        asks.into_iter().map(value).collect()
    }
}
