//! The event log of this process, with the wall clock and the name that the engine does not know.

use engine::coordinator::events::{EventLog, RecordList};
use engine::coordinator::{Decision, RecordChange};
use engine::ids::TimeMs;
use metastore::LeadershipChange;
use proto::wire;

use crate::Options;

/// The event log, and what its replies contain besides events.
pub(crate) struct EventPublisher {
    log: EventLog,
    name: String,
    instance: u64,
}

impl EventPublisher {
    pub(crate) fn new(options: &Options) -> Self {
        let bytes_max = usize::try_from(options.event_bytes).unwrap_or(usize::MAX);
        Self {
            log: EventLog::new(wall_clock(), bytes_max),
            name: options.name.clone(),
            instance: fastrand::u64(1..),
        }
    }

    pub(crate) fn on_list(&mut self, list: RecordList) {
        self.log.on_list(wall_clock(), list);
    }

    pub(crate) fn on_change(&mut self, revision: u64, change: &RecordChange) {
        self.log.on_change(wall_clock(), revision, change);
    }

    pub(crate) fn on_decisions(&mut self, decisions: &[Decision]) {
        decisions.iter().for_each(|decision| self.log.on_decision(wall_clock(), decision));
    }

    pub(crate) fn on_election(&mut self, change: &LeadershipChange) {
        let term = match change {
            LeadershipChange::Leading { term } => Some(*term),
            LeadershipChange::Standby => None,
        };
        self.log.on_election(wall_clock(), term, &self.name);
    }

    /// The events that a client lacks which has seen those of an instance up to a number.
    pub(crate) fn reply(&self, (instance, after): (u64, u64)) -> wire::EventsReply {
        let after = if instance == self.instance { after } else { 0 };
        wire::EventsReply {
            coordinator: self.name.clone(),
            instance: self.instance,
            since_ms: self.log.since().0,
            cut: self.log.history().is_cut(),
            events: self.log.history().after(after).map(wire::ClusterEvent::from).collect(),
        }
    }
}

fn wall_clock() -> TimeMs {
    TimeMs(telemetry::wall_clock_ms())
}
