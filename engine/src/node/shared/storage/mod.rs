//! The node's own storage: the log that is being written, the tables, and the state below them.
//!
//! ```text
//!   Durable ──▶ commit moves ──▶ apply ──▶ active table ───seal───▶ Flush ──▶ Ingested
//!                                  ▲
//!                     Load ──▶ Loaded (ops that ask for a value)
//! ```
//!
//! [`apply`] moves commits into the table, [`division`] applies a split, [`loads`] reads what
//! applying needs, [`flush`] writes the table to the state and trims the log, and [`memory`] counts
//! and bounds all of it.

mod apply;
mod division;
mod flush;
mod loads;
mod memory;

use std::collections::BTreeMap;

use crate::ids::{Now, StoreBoot};
use crate::key::{self, CounterKey};
use crate::node::event::Effect;
use crate::node::settings::Settings;
use crate::node::shared::NodeTurn;
use crate::planted::Planted;
use crate::replica::Replica;
use crate::replica::group_commit::{GroupCommit, ReplicaTurn};
use crate::shard::idempotency::TokenOutcome;
use crate::shard_record::ShardRecord;
use crate::store::table::{Cell, Tables};

#[derive(Clone, Debug)]
pub(in crate::node) struct Storage {
    groups: GroupCommit,
    memory: memory::Memory,
    tables: Tables,
    /// The number of ingests so far: a value loaded before an ingest is not added to the tables of
    /// after it.
    ingests: u64,
    flushing: flush::Flushing,
    divisions: division::Divisions,
    loads: BTreeMap<u64, loads::PendingLoad>,
    disk_full: bool,
    room_bytes: u64,
    next_trim: Now,
    token_counts: TokenCounts,
}

/// Counts of requests with a token in the shards that this node led, since it started.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct TokenCounts {
    /// Requests for which a record was made.
    pub recorded: u64,
    /// Requests refused since there was no room for a record.
    pub refused: u64,
}

impl TokenCounts {
    fn count(&mut self, tokens: &[TokenOutcome]) {
        let of = |wanted| tokens.iter().filter(|&&token| token == wanted).count() as u64;
        self.recorded += of(TokenOutcome::Applied);
        self.refused += of(TokenOutcome::Quota);
    }
}

impl Storage {
    /// Creates the storage of a node at its start: the tables are empty, and `replicas` are what
    /// the log and the state contain.
    pub(in crate::node) fn new<'a>(
        settings: &Settings,
        now: Now,
        next_group: u64,
        replicas: impl Iterator<Item = &'a mut Replica>,
    ) -> Self {
        Self {
            groups: GroupCommit::new(next_group, now),
            memory: memory::Memory::of(replicas),
            tables: Tables::default(),
            ingests: 0,
            flushing: flush::Flushing::default(),
            divisions: division::Divisions::default(),
            loads: BTreeMap::new(),
            disk_full: false,
            room_bytes: u64::MAX,
            next_trim: now.plus_ms(settings.timing.trim_every_ms),
            token_counts: TokenCounts::default(),
        }
    }

    /// Lends what a replica may touch while it handles an event.
    pub(in crate::node) fn turn<'a>(
        &'a mut self,
        now: Now,
        me: StoreBoot,
        settings: &'a Settings,
        effects: &'a mut Vec<Effect>,
    ) -> ReplicaTurn<'a> {
        let disk_full = self.disk_full;
        ReplicaTurn { now, me, settings, disk_full, groups: &mut self.groups, effects }
    }

    /// Returns the groups of the log.
    pub(in crate::node) fn groups(&self) -> &GroupCommit {
        &self.groups
    }

    /// Returns the tables, as reads see them now.
    pub(in crate::node) fn tables(&self) -> &Tables {
        &self.tables
    }

    /// Returns what the tables contain of a counter.
    pub(in crate::node) fn cell(&self, key: &CounterKey) -> Option<Cell> {
        self.tables.cell(key.name(), key::hash(key.name()))
    }

    /// Returns whether the disk is full: writes are refused, reads are served.
    pub(in crate::node) fn is_disk_full(&self) -> bool {
        self.disk_full
    }

    /// Returns how many bytes may be written to the state before the disk is nearly full.
    pub(in crate::node) fn room_bytes(&self) -> u64 {
        self.room_bytes
    }

    pub(in crate::node) fn set_room(&mut self, bytes: u64) {
        self.room_bytes = bytes;
    }

    pub(in crate::node) fn token_counts(&self) -> TokenCounts {
        self.token_counts
    }

    /// Makes the next trim due: less of the log may be needed.
    pub(in crate::node) fn trim_soon(&mut self, now: Now) {
        self.next_trim = now;
    }
}

impl NodeTurn<'_> {
    /// Handles the end of an fsync: what is durable may be committed and applied.
    pub(in crate::node) fn on_durable(&mut self, group: u64) {
        self.shards.to_advance.extend(self.storage.divisions.shards());
        for (shard, seq) in self.storage.groups.on_durable(group, self.now) {
            if let Some(replica) = self.shards.get_mut(shard) {
                replica.on_durable(seq);
                // A log that advances is counted after that.
                if !self.mark_if_it_advances(shard) {
                    self.count_log(shard);
                }
            }
        }
        if !self.shards.recording.is_empty() {
            self.on_recorded(group);
        }
    }

    /// Notes for all primaries that the records up to this group are durable.
    fn on_recorded(&mut self, group: u64) {
        for shard in std::mem::take(&mut self.shards.recording) {
            let Some(primary) = self.shards.primary_mut(shard) else { continue };
            match primary.recording {
                Some(last) if last > group => self.shards.recording.insert(shard),
                Some(_) => {
                    primary.on_recorded();
                    self.shards.to_advance.insert(shard);
                    self.shards.to_review.insert(shard);
                }
                None => {}
            }
        }
    }

    /// Notes in the log that the primary acts on the record that it has adopted. Those that left
    /// the in-sync set by it count until it is durable.
    pub(in crate::node) fn act_on(&mut self, record: &ShardRecord) {
        let shard = record.shard();
        if let Some((replica, mut turn)) = self.replica_in_turn(shard) {
            replica.act_on(&mut turn, record);
        }
        let forgotten = self.planted(Planted::LeavingForgotten);
        let group = self.storage.groups.covering();
        let Some(primary) = self.shards.primary_mut(shard) else { return };
        primary.recording = group;
        match group {
            Some(_) if !forgotten => self.shards.recording.insert(shard),
            _ => primary.on_recorded(),
        }
    }

    /// Begins the next fsync if there is something to write and none is in flight.
    pub(in crate::node) fn sync_if_idle(&mut self) {
        self.storage.groups.sync_if_idle(self.now, self.effects);
    }

    /// Probes an idle disk with an fsync.
    pub(in crate::node) fn probe_disk_if_due(&mut self) {
        if self.storage.groups.fsync_age_ms(self.now) >= self.settings.disk_probe_every_ms {
            self.storage.groups.probe(self.now, self.effects);
        }
    }
}
