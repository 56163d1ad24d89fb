//! The sealing of batches: waiting operations become the bytes of one batch, and adds of one
//! counter become one op.
//!
//! Merging is invisible to clients. All adds that became one op are applied at one moment, as if in
//! the order of their requests; a client that asked for a value gets the final one minus what was
//! added after its own. An add is merged only into the *last* op of its counter in the batch, so
//! never across a delete.
//!
//! Operations with a token are merged only with those of their own request, and are contiguous: a
//! part with a token goes into one batch as a whole, however large it is.

use std::collections::VecDeque;

use bytes::Bytes;

use super::BatchSizes;
use super::part::{Issued, PartToken, RequestPart};
use crate::ops::{self, OpKind};

/// The most bytes of an op besides its name: its kind, the length of its name, and the longest
/// delta.
const OP_BYTES_MAX: usize = 1 + 2 + 19;
/// The bytes of the payload's own head, and of a token's: kind, scope, hash, fingerprint, issue
/// time, count.
pub(super) const HEAD_BYTES_MAX: usize = 1 + 2 + 16 + 16 + 10 + 3;

/// The contents of a batch.
pub(super) struct Sealed {
    pub payload: Bytes,
    pub parts: VecDeque<RequestPart>,
    /// The number of ops in the payload.
    pub entries: usize,
    /// The number of ops that ask for a value.
    pub values: usize,
}

/// Buffers that are reused for every batch: an index by hash, with open addressing.
#[derive(Clone, Debug)]
pub(super) struct Sealer {
    sizes: BatchSizes,
    /// One more than the index in `entries` of a counter's last op, or 0. The length is a power of
    /// two, and at least twice the number of entries.
    index: Vec<u32>,
    entries: Vec<PayloadOp>,
}

/// One op of the payload. `part` and `op` are the indexes of the first operation that it is made
/// of.
#[derive(Clone, Copy, Debug)]
struct PayloadOp {
    part: usize,
    op: usize,
    hash: u64,
    kind: OpKind,
    /// The op belongs to a part with a token, and to that alone.
    token: bool,
}

/// The size of a batch so far.
#[derive(Clone, Copy, Debug, Default)]
struct Size {
    bytes: usize,
    /// The number of values asked for, and of tokens.
    results: usize,
}

impl Sealer {
    pub(super) fn new(sizes: BatchSizes) -> Self {
        Self { sizes, index: Vec::new(), entries: Vec::new() }
    }

    /// Takes as many operations from the front as fit into one batch: at least one, if there is
    /// one, since no single operation is too large, and a part with a token is never too large for
    /// an empty batch. If the first part lacks the shard's time, it takes none: the batch is then
    /// empty, and its answer contains the time. `ops`: the number of waiting operations.
    pub(super) fn seal(&mut self, waiting: &mut VecDeque<RequestPart>, ops: usize) -> Sealed {
        let first = waiting.front().filter(|part| part.token.is_some());
        let whole = first.map_or(0, |part| part.ops.len());
        let places = (ops.min(self.sizes.batch_ops_max).max(whole).max(8) * 2).next_power_of_two();
        self.index.clear();
        self.index.resize(places, 0);
        self.entries.clear();
        let mut parts = VecDeque::new();
        let mut size = Size::default();
        while let Some(part) = waiting.pop_front_if(|part| !part.lacks_time()) {
            if part.token.is_some() && !self.has_room(&part, size) {
                waiting.push_front(part);
                break;
            }
            parts.push_back(part);
            let taken = self.take(&mut parts, &mut size);
            let part = parts.back_mut().expect("pushed above");
            if taken < part.ops.len() {
                let rest = part.split_off(taken);
                if taken == 0 {
                    parts.pop_back();
                }
                waiting.push_front(rest);
                break;
            }
        }
        let payload = self.encode(&parts, size.bytes);
        let values = self.entries.iter().filter(|entry| entry.kind.returns_value()).count();
        Sealed { payload, parts, entries: self.entries.len(), values }
    }

    /// Returns whether the part, which has a token, fits as a whole; an empty batch has room for
    /// any.
    fn has_room(&self, part: &RequestPart, size: Size) -> bool {
        let names: usize = part.ops.iter().map(|queued| queued.op.counter.name().len()).sum();
        let bytes = size.bytes + HEAD_BYTES_MAX + part.ops.len() * OP_BYTES_MAX + names;
        let asks = part.ops.iter().filter(|queued| queued.op.kind.returns_value()).count();
        let fits = self.entries.len() + part.ops.len() <= self.sizes.batch_ops_max
            && bytes <= self.sizes.batch_bytes_max
            && size.results + 1 + asks <= self.sizes.batch_values_max;
        fits || self.entries.is_empty()
    }

    /// Takes the operations of the last part, as far as they fit. Returns their number.
    fn take(&mut self, parts: &mut VecDeque<RequestPart>, size: &mut Size) -> usize {
        let part = parts.len() - 1;
        if parts[part].token.is_some() {
            size.bytes += HEAD_BYTES_MAX;
            size.results += 1;
        }
        for op in 0..parts[part].ops.len() {
            match self.place(parts, part, op, size) {
                Some(entry) => parts[part].ops[op].entry = entry as u32,
                None => return op,
            }
        }
        parts[part].ops.len()
    }

    /// The index of the op in the batch that the operation becomes part of; `None` if it does not
    /// fit.
    fn place(
        &mut self,
        parts: &VecDeque<RequestPart>,
        part: usize,
        op: usize,
        size: &mut Size,
    ) -> Option<usize> {
        let queued = &parts[part].ops[op];
        let kind = queued.op.kind;
        let token = parts[part].token.is_some();
        let mask = self.index.len() - 1;
        let mut at = queued.hash as usize & mask;
        while let Some(last) = (self.index[at] as usize).checked_sub(1) {
            let entry = &mut self.entries[last];
            let same = entry.hash == queued.hash
                && parts[entry.part].ops[entry.op].op.counter == queued.op.counter;
            if same {
                // An operation with a token merges only with those of its own part, one without
                // only with others without.
                let together = if token { entry.part == part } else { !entry.token };
                let Some(merged) = merge(entry.kind, kind).filter(|_| together) else { break };
                let asks_now = merged.returns_value() && !entry.kind.returns_value();
                if asks_now && !token && size.results >= self.sizes.batch_values_max {
                    return None;
                }
                size.results += usize::from(asks_now);
                entry.kind = merged;
                return Some(last);
            }
            at = (at + 1) & mask;
        }
        let grown = Size {
            bytes: size.bytes + OP_BYTES_MAX + queued.op.counter.name().len(),
            results: size.results + usize::from(kind.returns_value()),
        };
        let full = self.entries.len() >= self.sizes.batch_ops_max
            || grown.bytes > self.sizes.batch_bytes_max
            || grown.results > self.sizes.batch_values_max;
        // An empty batch has room for any operation.
        if full && !token && !self.entries.is_empty() {
            return None;
        }
        *size = grown;
        self.entries.push(PayloadOp { part, op, hash: queued.hash, kind, token });
        self.index[at] = self.entries.len() as u32;
        Some(self.entries.len() - 1)
    }

    fn encode(&self, parts: &VecDeque<RequestPart>, bytes_max: usize) -> Bytes {
        let mut payload = ops::begin();
        payload.reserve(bytes_max);
        let mut headed = None;
        for (at, entry) in self.entries.iter().enumerate() {
            if entry.token && headed != Some(entry.part) {
                headed = Some(entry.part);
                let own = self.entries[at..].iter().take_while(|other| other.part == entry.part);
                if let Some(PartToken { tag, issued: Issued::At(issued) }) =
                    &parts[entry.part].token
                {
                    ops::put_token(&mut payload, tag, *issued, own.count());
                }
            }
            let counter = &parts[entry.part].ops[entry.op].op.counter;
            ops::put_named(&mut payload, counter, entry.kind);
        }
        payload.into()
    }
}

/// Merges two ops of one counter into one, if that is possible.
fn merge(first: OpKind, second: OpKind) -> Option<OpKind> {
    use OpKind::{Add, AddReturning, Delete};
    let (a, b) = match (first, second) {
        (Delete, _) | (_, Delete) => return None,
        (Add { delta: a } | AddReturning { delta: a }, Add { delta: b })
        | (Add { delta: a } | AddReturning { delta: a }, AddReturning { delta: b }) => (a, b),
    };
    let delta = a.checked_add(b)?;
    let returning = first.returns_value() || second.returns_value();
    Some(if returning { AddReturning { delta } } else { Add { delta } })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::{BATCH_BYTES_MAX, BATCH_OPS_MAX, Batch};
    use crate::key::{self, CounterKey};
    use crate::ops::Op;

    use super::super::part::QueuedOp;

    fn counter(name: &str) -> CounterKey {
        CounterKey::new(b"n", name.as_bytes()).expect("a short plain name")
    }

    fn part(request: u64, ops: &[(&str, OpKind)]) -> RequestPart {
        let queued = |(index, &(name, kind)): (usize, &(&str, OpKind))| QueuedOp {
            op: Op { counter: counter(name), kind },
            hash: (key::hash(counter(name).name()) >> 64) as u64,
            index: index as u32,
            entry: 0,
        };
        RequestPart::new(request, ops.iter().enumerate().map(queued).collect(), None)
    }

    fn add(delta: i128) -> OpKind {
        OpKind::Add { delta }
    }

    fn returning(delta: i128) -> OpKind {
        OpKind::AddReturning { delta }
    }

    fn seal(waiting: &mut VecDeque<RequestPart>) -> Sealed {
        let ops = waiting.iter().map(|part| part.ops.len()).sum();
        Sealer::new(BatchSizes::default()).seal(waiting, ops)
    }

    fn decoded(payload: Bytes) -> Vec<Op> {
        let ops = ops::decode(payload).expect("it was just encoded");
        ops.iter().map(|op| ops.to_op(op)).collect()
    }

    /// These parts become these ops.
    #[track_caller]
    fn check(parts: &[&[(&str, OpKind)]], want: &[(&str, OpKind)]) {
        let mut waiting = parts.iter().zip(1..).map(|(ops, at)| part(at, ops)).collect();
        let sealed = seal(&mut waiting);
        let want: Vec<Op> =
            want.iter().map(|&(name, kind)| Op { counter: counter(name), kind }).collect();
        assert_eq!(sealed.entries, want.len());
        assert_eq!(sealed.values, want.iter().filter(|op| op.kind.returns_value()).count());
        assert_eq!(decoded(sealed.payload), want);
        assert!(waiting.is_empty());
    }

    #[test]
    fn adds_of_one_counter_become_one() {
        check(&[&[("a", add(1)), ("b", add(2)), ("a", add(3))]], &[("a", add(4)), ("b", add(2))]);
        check(&[&[("a", add(1))], &[("a", add(-3))]], &[("a", add(-2))]);
    }

    #[test]
    fn one_that_asks_for_a_value_makes_all_ask() {
        check(&[&[("a", add(1)), ("a", returning(2)), ("a", add(4))]], &[("a", returning(7))]);
    }

    #[test]
    fn nothing_is_merged_across_a_delete() {
        check(
            &[&[("a", add(1)), ("a", OpKind::Delete), ("a", add(2)), ("a", add(3))]],
            &[("a", add(1)), ("a", OpKind::Delete), ("a", add(5))],
        );
        check(
            &[&[("a", OpKind::Delete), ("a", OpKind::Delete)]],
            &[("a", OpKind::Delete), ("a", OpKind::Delete)],
        );
    }

    #[test]
    fn a_sum_that_would_overflow_is_left_in_two() {
        check(&[&[("a", add(i128::MAX)), ("a", add(1))]], &[("a", add(i128::MAX)), ("a", add(1))]);
    }

    /// Operations that do not fit stay in front, in order, and the batch is at most what a node
    /// accepts.
    #[test]
    fn a_batch_is_closed_at_its_limits() {
        let names: Vec<String> = (0..BATCH_OPS_MAX + 10).map(|n| n.to_string()).collect();
        let ops: Vec<_> = names.iter().map(|name| (name.as_str(), add(1))).collect();
        let mut waiting = VecDeque::from([part(1, &ops[..100]), part(2, &ops[100..])]);
        let sealed = seal(&mut waiting);
        assert_eq!((sealed.entries, sealed.parts.len()), (BATCH_OPS_MAX, 2));
        assert_eq!(waiting.len(), 1);
        assert_eq!((waiting[0].request, waiting[0].ops.len()), (2, 10));
        assert_eq!(waiting[0].ops[0].op.counter, counter(&names[BATCH_OPS_MAX]));
        let bytes: usize = waiting[0].ops.iter().map(QueuedOp::bytes).sum();
        assert_eq!(waiting[0].bytes, bytes);

        let long = "k".repeat(1_000);
        let names: Vec<String> = (0..400).map(|n| format!("{long}{n}")).collect();
        let ops: Vec<_> = names.iter().map(|name| (name.as_str(), add(1))).collect();
        let mut waiting = VecDeque::from([part(1, &ops)]);
        let sealed = seal(&mut waiting);
        assert!(sealed.payload.len() <= BATCH_BYTES_MAX);
        assert!(sealed.payload.len() > BATCH_BYTES_MAX * 9 / 10);
        assert_eq!(sealed.entries + waiting[0].ops.len(), 400);
    }

    /// A part that begins where a batch ends leaves no empty part behind in it.
    #[test]
    fn values_are_limited_too() {
        let values_max = BatchSizes::default().batch_values_max;
        let names: Vec<String> = (0..values_max).map(|n| n.to_string()).collect();
        let ops: Vec<_> = names.iter().map(|name| (name.as_str(), returning(1))).collect();
        let mut waiting = VecDeque::from([part(1, &ops), part(2, &[("more", returning(1))])]);
        let sealed = seal(&mut waiting);
        assert_eq!((sealed.values, sealed.parts.len()), (values_max, 1));
        assert_eq!(waiting.len(), 1);
    }

    /// The counters' hashes collide: names decide.
    #[test]
    fn equal_hashes_are_not_equal_counters() {
        let mut ops = part(1, &[("a", add(1)), ("b", add(2)), ("a", add(4))]);
        ops.ops.iter_mut().for_each(|op| op.hash = 7);
        let sealed = seal(&mut VecDeque::from([ops]));
        let want = [("a", add(5)), ("b", add(2))];
        let want: Vec<Op> = want.map(|(name, kind)| Op { counter: counter(name), kind }).into();
        assert_eq!(decoded(sealed.payload), want);
    }

    /// A batch as large as its limits allow goes into one message with room to spare.
    const _: () = assert!(BATCH_BYTES_MAX + size_of::<Batch>() < 16 << 20);
}
