//! Memory: a node holds what it has counted, and a full count stops it.
//!
//! Three rules, checked after every event:
//!
//! - held ≤ counted × 1.2 (the held bytes are found by walking through all of it);
//! - a full table does not grow while another one is being flushed;
//! - a node that has more to apply than it may hold acknowledges nothing.

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};

use engine::ids::StoreBoot;
use engine::message::FromFollower;
use engine::node::{Effect, Node};
use engine::store::table::SealedTable;

use super::Violation;

/// The bytes that small items may take beside what is counted.
const SLACK_BYTES: usize = 2 << 10;

#[derive(Default)]
pub struct MemoryChecker {
    last: BTreeMap<StoreBoot, Last>,
}

/// The state after the last event.
#[derive(Clone, Default)]
struct Last {
    /// The table was full, with this size, while this one was being flushed.
    full: Option<(usize, Weak<SealedTable>)>,
    behind: bool,
    /// An acknowledgement was sent since.
    acked: bool,
}

impl MemoryChecker {
    pub fn effect(&mut self, me: StoreBoot, effect: &Effect) {
        if let Effect::ToPrimary { message: FromFollower::Ack { .. }, .. } = effect {
            self.last.entry(me).or_default().acked = true;
        }
    }

    pub fn look(&mut self, me: StoreBoot, node: &Node, violations: &mut Vec<Violation>) {
        let mut violated = |detail| violations.push(Violation { promise: "memory", detail });
        let (held, counted) = (node.held_bytes(), node.counted_bytes());
        if held > counted + counted / 5 + SLACK_BYTES {
            violated(format!("{me:?} holds {held} bytes and has counted {counted}"));
        }
        let active = node.tables().active.bytes();
        // No other table has the place of one that is known here, even if it was flushed long ago.
        let frozen = node.tables().sealed.as_ref().map(Arc::downgrade);
        let last = self.last.remove(&me).unwrap_or_default();
        if let Some((bytes, flushing)) = &last.full
            && frozen.as_ref().is_some_and(|frozen| frozen.ptr_eq(flushing))
            && active > *bytes
        {
            violated(format!("{me:?}: a full table grew from {bytes} to {active} bytes"));
        }
        let behind = node.is_behind();
        if last.behind && behind && last.acked {
            violated(format!("{me:?} acknowledges more than it may hold"));
        }
        let full = frozen.filter(|_| node.has_full_table()).map(|frozen| (active, frozen));
        self.last.insert(me, Last { full, behind, acked: false });
    }
}
