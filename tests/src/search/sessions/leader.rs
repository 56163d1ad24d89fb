//! The primary of one epoch: the node machine that production runs, alone in its in-sync set.
//!
//! The [replication](super::super::replication) world covers the conditions of a commit. Here a
//! commit is one step: the oldest group of the log becomes durable, and so committed. The world
//! also chooses the entries that a deposed primary may still commit, and those with which a new one
//! starts.
//!
//! Nothing is flushed: a new primary applies the log from its first entry on.

use std::collections::{BTreeSet, VecDeque};

use engine::entry::{Body, Entry};
use engine::ids::{
    Boot, Conn, CopyNo, Epoch, Now, Revision, SessionId, ShardId, Slots, StoreBoot, StoreId,
    TimeMs, Version,
};
use engine::key;
use engine::message::{BatchReply, NodeReply};
use engine::node::{Effect, Event, Node, RecoveredContent, RecoveredReplica, Settings};
use engine::shard::state::ShardState;
use engine::shard_record::ShardRecord;
use engine::store::log::LogRecord;

use super::super::machines::Machine;
use super::{GatewayWireMessage, Wires, counter};

/// The time of the shard at the start.
pub const BEGAN_MS: u64 = 1_000_000_000;

pub struct LeaderContext {
    pub settings: Settings,
    pub tick_ms: u64,
    pub wires: Wires,
}

#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum LeaderInput {
    Record {
        epoch: u8,
    },
    Accepted {
        conn: u64,
    },
    Received {
        conn: u64,
        wire: u32,
    },
    /// The oldest group is committed.
    Committed,
    /// A list of sessions. Bit n of `alive` is the session created at revision n.
    Listed {
        at: u8,
        alive: u32,
    },
    Tick,
    /// The disk is full, or has room again.
    Full(bool),
}

#[derive(Clone, Debug)]
pub enum LeaderOutput {
    Reply { conn: u64, wire: u32 },
    Noted(&'static str),
}

/// The visible state of a primary.
#[derive(Clone, Debug, Default)]
pub struct LeaderSummary {
    pub leads: bool,
    pub active: bool,
    /// The chain of each entry. Two logs are equal up to a position if their chains there are
    /// equal.
    pub log: Vec<u64>,
    pub commit: usize,
    pub applied: u64,
    /// The length of the log up to the end of the oldest group that is not committed.
    pub next: Option<usize>,
    pub value: i128,
    /// The revision of the newest collection, and the expired sessions up to it as a bit mask.
    pub collected: u64,
    pub expired: u32,
    pub rows: usize,
    pub full: bool,
    pub stopped: Option<&'static str>,
}

#[derive(Clone, Debug)]
pub struct Leader {
    node: Node,
    entries: Vec<Entry>,
    /// The groups whose fsync was requested: number, and length of the log at the end of the group.
    groups: VecDeque<(u64, usize)>,
    full: bool,
    now: Now,
}

/// Returns the process that leads in this epoch.
pub fn primary_of(epoch: u8) -> StoreBoot {
    StoreBoot { store: StoreId(epoch.into()), boot: Boot(1) }
}

/// Returns the record of the shard in this epoch. Primaries of earlier epochs are learners.
pub fn record(epoch: u8) -> ShardRecord {
    ShardRecord {
        slots: Slots::ALL,
        epoch: Epoch(epoch.into()),
        version: Version(epoch.into()),
        primary: primary_of(epoch),
        isr: [primary_of(epoch).store].into_iter().collect(),
        learners: (1..epoch).map(|earlier| primary_of(earlier).store).collect(),
        target: (1..=epoch).map(|earlier| primary_of(earlier).store).collect(),
        tainted: vec![],
    }
}

pub fn session(revision: u8) -> SessionId {
    SessionId(Revision { incarnation: 1, revision: revision.into() })
}

impl Leader {
    /// Creates a process with these durable entries.
    pub fn new(context: &LeaderContext, epoch: u8, entries: Vec<Entry>) -> Self {
        let state = ShardState { slots: Slots::ALL, ..ShardState::default() };
        let promised = entries.last().map_or(Epoch(0), |entry| entry.epoch);
        let content = RecoveredContent { state, entries: entries.clone(), suspect: false };
        let found = RecoveredReplica {
            shard: ShardId(0),
            slots: Slots::ALL,
            promised,
            copy: CopyNo(1),
            acted_on: None,
            content: Some(content),
        };
        let now = Now(0);
        let mut node = Node::new(context.settings.clone(), primary_of(epoch), now, 1, vec![found]);
        let peers = Event::PeersRegistered(vec![(primary_of(epoch), epoch.into())]);
        for event in [Event::WallClock(TimeMs(BEGAN_MS)), Event::LeaseConfirmed, peers] {
            node.handle(now, event, &mut Vec::new());
        }
        node.handle(now, Event::TurnEnded, &mut Vec::new());
        Self { node, entries, groups: VecDeque::new(), full: false, now }
    }

    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    fn event(&mut self, input: LeaderInput, context: &LeaderContext) -> Option<Event> {
        Some(match input {
            LeaderInput::Record { epoch } => {
                Event::ShardRecord { record: record(epoch), mod_revision: epoch.into(), read: None }
            }
            LeaderInput::Accepted { conn } => Event::GatewayConnected { conn: Conn(conn) },
            LeaderInput::Received { conn, wire } => match context.wires.borrow().get(wire) {
                GatewayWireMessage::To(message) => {
                    Event::Gateway { conn: Conn(conn), message: message.clone() }
                }
                GatewayWireMessage::From(_) => return None,
            },
            LeaderInput::Committed => Event::Durable { group: self.groups.pop_front()?.0 },
            LeaderInput::Listed { at, alive } => Event::SessionsListed {
                at: session(at).0,
                alive: (1..=at).filter(|id| alive >> id & 1 == 1).map(session).collect(),
            },
            LeaderInput::Tick => {
                self.now = self.now.plus_ms(context.tick_ms);
                Event::WallClock(TimeMs(BEGAN_MS + self.now.0 / 1_000))
            }
            LeaderInput::Full(full) => {
                self.full = full;
                Event::DiskFull(full)
            }
        })
    }

    fn perform(
        &mut self,
        effect: Effect,
        context: &LeaderContext,
        out: &mut Vec<LeaderOutput>,
    ) -> Option<Event> {
        match effect {
            Effect::Write(LogRecord::Append { entry, .. }) => self.note(entry, out),
            Effect::Write(LogRecord::Promise { .. } | LogRecord::ActedOn(_)) => {}
            Effect::Sync { group } => self.groups.push_back((group, self.entries.len())),
            Effect::Load { load, needs } => {
                return Some(Event::Loaded {
                    load,
                    values: vec![None; needs.counters.len()],
                    records: vec![None; needs.records.len()],
                });
            }
            Effect::Gateway { conn, reply } => {
                // Shard states are ignored, since nothing here freezes a shard.
                let NodeReply::Answer { answer, .. } = &reply else { return None };
                match answer {
                    BatchReply::Expired => {
                        out.push(LeaderOutput::Noted("a batch of a collected session comes"))
                    }
                    BatchReply::Refused(_) => {
                        out.push(LeaderOutput::Noted("a primary refuses a batch"))
                    }
                    _ => {}
                }
                let wire = context.wires.borrow_mut().number(GatewayWireMessage::From(reply));
                out.push(LeaderOutput::Reply { conn: conn.0, wire });
            }
            // The world delivers records and lists of sessions by itself, and no flush completes.
            Effect::ReadRecord { .. }
            | Effect::Report(_)
            | Effect::ListSessions
            | Effect::Flush { .. }
            | Effect::Trim { .. } => {}
            other => panic!("unexpected effect {other:?}"),
        }
        None
    }

    fn note(&mut self, entry: Entry, out: &mut Vec<LeaderOutput>) {
        assert_eq!(entry.seq.0, self.entries.len() as u64 + 1, "a primary only appends");
        let collections = self.entries.iter().filter_map(|earlier| match &earlier.body {
            Body::ExpireSessions { up_to, .. } => Some(*up_to),
            _ => None,
        });
        match &entry.body {
            Body::ExpireSessions { up_to, .. }
                if collections.max().is_some_and(|newest| newest > *up_to) =>
            {
                out.push(LeaderOutput::Noted("a collection older than the newest is ordered"));
            }
            Body::ExpireSessions { .. } => out.push(LeaderOutput::Noted("a collection is ordered")),
            Body::ExpireTokens { .. } => out.push(LeaderOutput::Noted("an expiry is ordered")),
            _ => {}
        }
        self.entries.push(entry);
    }
}

impl Machine for Leader {
    type Input = LeaderInput;
    type Output = LeaderOutput;
    type Summary = LeaderSummary;
    type Context = LeaderContext;

    fn on(&mut self, input: LeaderInput, context: &mut LeaderContext, out: &mut Vec<LeaderOutput>) {
        let mut events: VecDeque<Event> = self.event(input, context).into_iter().collect();
        while let Some(event) = events.pop_front() {
            let mut effects = Vec::new();
            for event in [event, Event::TurnEnded] {
                self.node.handle(self.now, event, &mut effects);
                self.node.check_invariants();
            }
            for effect in effects {
                events.extend(self.perform(effect, context, out));
            }
        }
    }

    fn now(&self) -> Now {
        self.now
    }

    fn summary(&self) -> LeaderSummary {
        let name = counter();
        let value = self.node.tables().value(None, name.name(), key::hash(name.name()));
        let view = self.node.replicas().next().expect("a copy is never given up here");
        let sessions = &view.state.sessions;
        let born: BTreeSet<u64> = (1..=sessions.expiry.up_to.revision).collect();
        let expired = born
            .into_iter()
            .filter(|&id| sessions.expiry.has_expired(session(id as u8)))
            .fold(0, |mask, id| mask | 1 << id);
        LeaderSummary {
            leads: view.primary.is_some(),
            active: view.primary.is_some_and(|primary| primary.active),
            log: self.entries.iter().map(|entry| entry.chain.0).collect(),
            commit: view.commit.0 as usize,
            applied: view.state.applied.seq.0,
            next: self.groups.front().map(|(_, end)| *end),
            value,
            collected: sessions.expiry.up_to.revision,
            expired,
            rows: sessions.rows.len(),
            full: self.full,
            stopped: view.stopped,
        }
    }
}
