//! The last events, in a limited number of bytes.

use std::collections::VecDeque;

use crate::coordinator::events::{ClusterEvent, EventFacts};
use crate::ids::TimeMs;

/// The last events of one coordinator, oldest first.
#[derive(Debug)]
pub struct EventHistory {
    events: VecDeque<ClusterEvent>,
    bytes: usize,
    bytes_max: usize,
    /// The number of the last event.
    last: u64,
}

impl EventHistory {
    /// An empty history that takes at most `bytes_max` bytes.
    pub fn new(bytes_max: usize) -> Self {
        Self { events: VecDeque::new(), bytes: 0, bytes_max, last: 0 }
    }

    /// Adds an event, at the expense of the oldest ones.
    pub fn push(&mut self, at: TimeMs, revision: u64, what: EventFacts) {
        self.last += 1;
        let event = ClusterEvent { number: self.last, at, revision, what };
        self.bytes += event.bytes();
        self.events.push_back(event);
        while self.bytes > self.bytes_max {
            let Some(oldest) = self.events.pop_front() else { break };
            self.bytes -= oldest.bytes();
        }
    }

    /// The events with a number above `number`, oldest first.
    pub fn after(&self, number: u64) -> impl Iterator<Item = &ClusterEvent> {
        let from = self.events.partition_point(|event| event.number <= number);
        self.events.range(from..)
    }

    /// Returns whether older events were dropped.
    pub fn is_cut(&self) -> bool {
        self.events.len() as u64 != self.last
    }

    /// The newest event that `is_it` accepts.
    pub(super) fn newest(
        &mut self,
        is_it: impl Fn(&EventFacts) -> bool,
    ) -> Option<&mut EventFacts> {
        self.events.iter_mut().rev().map(|event| &mut event.what).find(|what| is_it(what))
    }

    /// The last event, if it has this revision.
    pub(super) fn last_at(&mut self, revision: u64) -> Option<&mut EventFacts> {
        let last = self.events.back_mut().filter(|event| event.revision == revision);
        last.map(|event| &mut event.what)
    }
}
