//! No limit is exceeded: groups, messages, windows, reads of the log, batches, frames and queues
//! stay as small as the settings require. An exceeded limit is memory that is not counted, or a
//! message that the receiver refuses; the state machines continue as if nothing were wrong, so only
//! a check from outside detects it.
//!
//! Causes of false alarms: each limit gives way for one item that is larger than the
//! limit, an entry, an operation, a request with a token.

use std::collections::BTreeMap;

use engine::batch::Batch;
use engine::batcher;
use engine::entry::{Body, Entry};
use engine::ids::{Conn, StoreBoot};
use engine::message::{FromFollower, GatewayMessage, Slice, ToFollower};
use engine::node::{Effect, Event, Node, NodeSizes};
use engine::ops;
use engine::store::log::LogRecord;

use super::Violation;

const PROMISE: &str = "limits";

#[derive(Default)]
pub struct LimitsChecker {
    gathered: BTreeMap<StoreBoot, usize>,
    /// Messages on their way to followers: number and bytes of entries.
    sent: BTreeMap<(StoreBoot, Conn), Vec<(u64, usize)>>,
    wrong: Option<String>,
}

impl LimitsChecker {
    pub fn event(&mut self, me: StoreBoot, event: &Event, sizes: &NodeSizes) {
        match event {
            Event::FromFollower { conn, message: FromFollower::Ack { n } } => {
                if let Some(sent) = self.sent.get_mut(&(me, *conn)) {
                    sent.retain(|(number, _)| number > n);
                }
            }
            Event::Closed { conn } => drop(self.sent.remove(&(me, *conn))),
            Event::LogRead { parts, .. } => {
                let entries = || parts.iter().flat_map(|part| &part.entries);
                let bytes: usize = entries().map(Entry::size).sum();
                self.expect(entries().count() < 2 || bytes <= sizes.read_log_bytes, || {
                    format!("{bytes} bytes were read from the log at once")
                });
            }
            _ => {}
        }
    }

    pub fn effect(&mut self, me: StoreBoot, effect: &Effect, sizes: &NodeSizes) {
        match effect {
            Effect::Write(record) => self.written(me, record, sizes),
            Effect::Sync { .. } => drop(self.gathered.remove(&me)),
            Effect::Close { conn } => drop(self.sent.remove(&(me, *conn))),
            Effect::ToFollower { conn, message: ToFollower::Append { n, slices } } => {
                self.fed(me, *conn, *n, slices, sizes);
            }
            Effect::ToPrimary { message: FromFollower::Alive { digests, .. }, .. } => {
                let mut counts: BTreeMap<_, usize> = BTreeMap::new();
                digests.iter().for_each(|point| *counts.entry(point.shard).or_default() += 1);
                // A shard at rest reports its position once more.
                let most = counts.values().copied().max().unwrap_or(0);
                self.expect(most <= sizes.points_sent_max + 1, || {
                    format!("{me:?} sends {most} digests of one shard at once")
                });
            }
            _ => {}
        }
    }

    fn written(&mut self, me: StoreBoot, record: &LogRecord, sizes: &NodeSizes) {
        let gathered = self.gathered.entry(me).or_default();
        let before = *gathered;
        *gathered += 32;
        if let LogRecord::Append { entry, .. } = record {
            *gathered += entry.size();
            if let Body::Ops(batch) = &entry.body {
                let bytes = batch.payload.len();
                self.expect(bytes <= sizes.batch_bytes_limit, || {
                    format!("{me:?} orders a batch of {bytes} bytes")
                });
            }
        }
        self.expect(before < sizes.group_bytes_max, || {
            format!("{me:?} adds to a group of {before} bytes")
        });
    }

    fn fed(&mut self, me: StoreBoot, conn: Conn, n: u64, slices: &[Slice], sizes: &NodeSizes) {
        let of = |slice: &Slice| slice.entries.iter().map(Entry::size).sum::<usize>();
        let bytes: usize = slices.iter().map(of).sum();
        let (last, rest) = slices.split_last().map_or((0, slices), |(last, rest)| {
            (if last.entries.len() > 1 { of(last) } else { 0 }, rest)
        });
        let before: usize = rest.iter().map(of).sum();
        let fits = before + last <= sizes.message_bytes;
        self.expect(fits, || format!("{me:?} sends {bytes} bytes of entries in one message"));
        let sent = self.sent.entry((me, conn)).or_default();
        let under_way: usize = sent.iter().map(|(_, bytes)| bytes).sum();
        sent.push((n, bytes));
        let fits = bytes == 0 || under_way < sizes.window_bytes;
        self.expect(fits, || {
            format!("{me:?} sends {bytes} bytes more while {under_way} are under way")
        });
    }

    /// Checks a node after every event.
    pub fn look(&mut self, me: StoreBoot, node: &Node, sizes: &NodeSizes) {
        let waiting = node.waiting_reads();
        self.expect(waiting <= 2 * sizes.waiting_reads_max, || {
            format!("{waiting} reads wait on {me:?}")
        });
    }

    /// Checks a message from a gateway to a node.
    pub fn asked(&mut self, message: &GatewayMessage, sizes: &batcher::BatchSizes) {
        let GatewayMessage::Frame { batches, .. } = message else { return };
        let last = batches.last().map_or(0, |batch| batch.payload.len());
        let bytes: usize = batches.iter().map(|batch| batch.payload.len()).sum();
        self.expect(batches.len() < 2 || bytes - last < sizes.message_bytes, || {
            format!("a frame of {bytes} bytes")
        });
        batches.iter().for_each(|batch| self.sealed(batch, sizes));
    }

    fn sealed(&mut self, batch: &Batch, sizes: &batcher::BatchSizes) {
        let bytes = batch.payload.len();
        self.expect(bytes <= sizes.batch_bytes_limit, || format!("a batch of {bytes} bytes"));
        let Ok(ops) = ops::decode(batch.payload.clone()) else { return };
        let count = ops.iter().count();
        let values = ops.iter().filter(|op| op.kind.returns_value()).count();
        // One request with a token may exceed the limit if it travels alone.
        let alone = !ops.tokened.is_empty();
        self.expect(alone || count <= sizes.batch_ops_max, || format!("a batch of {count} ops"));
        self.expect(alone || values <= sizes.batch_values_max, || {
            format!("a batch that asks for {values} values")
        });
        self.expect(alone || count < 2 || bytes <= sizes.batch_bytes_max, || {
            format!("a batch of {bytes} bytes, closed too late")
        });
    }

    fn expect(&mut self, fits: bool, wrong: impl FnOnce() -> String) {
        if !fits && self.wrong.is_none() {
            self.wrong = Some(wrong());
        }
    }

    pub fn report(&mut self, violations: &mut Vec<Violation>) {
        if let Some(detail) = self.wrong.take() {
            violations.push(Violation { promise: PROMISE, detail });
        }
    }
}
