//! One store's disk: the log, the state, and how long each takes.
//!
//! The log is written in groups and made durable by one fsync after another; a crash keeps what was
//! durable and, of the rest, whatever chance leaves. The state changes by ingests alone, each all or
//! nothing: a crash comes before it or after it. A load reads the state as it is when it is asked
//! for, and answers later.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use engine::apply::{Needs, ShardState};
use engine::entry::Entry;
use engine::idempotency::Record;
use engine::ids::{Conn, CopyNo, Seq, ShardId, Slots};
use engine::key::CounterKey;
use engine::node::RecoveredReplica;
use engine::store::log::Record as LogRecord;
use engine::store::log::index::Needed;
use engine::store::table::Frozen;

use super::core::{Core, Process, Told};
use super::log::Log;
use super::token_rows::TokenRows;

/// What a shard has in the state.
#[derive(Clone, Debug, Default)]
pub struct Rows {
    /// By name, with their values.
    counters: Vec<(Vec<u8>, i128)>,
    tokens: TokenRows,
}

/// A disk tells its process that something is done.
#[derive(Debug)]
pub enum DiskDone {
    Recovered,
    Synced {
        group: u64,
    },
    Loaded {
        load: u64,
        values: Vec<Option<i128>>,
        records: Vec<Option<Record>>,
    },
    LogRead {
        shard: ShardId,
        from: Seq,
        entries: Vec<Entry>,
    },
    /// An ingest is to be performed now.
    Ingest {
        id: u64,
    },
}

/// What an ingest will do to the state.
pub enum Ingest {
    Flush {
        flush: u64,
        table: Arc<Frozen>,
        shards: Vec<(CopyNo, ShardState)>,
    },
    Install {
        conn: Conn,
        transfer: u64,
        copy: CopyNo,
        rows: Rows,
        state: Box<ShardState>,
    },
    Drop {
        shard: ShardId,
        slots: Slots,
    },
    /// Not a change, but it reads the state in its turn.
    Snapshot {
        conn: Conn,
        transfer: u64,
        shard: ShardId,
        slots: Slots,
    },
}

#[derive(Default)]
pub struct Disk {
    log: Log,
    /// Counter rows by (slot, name).
    rows: BTreeMap<(u16, Vec<u8>), i128>,
    tokens: TokenRows,
    /// Shard records.
    records: BTreeMap<ShardId, (CopyNo, ShardState)>,
    /// Groups whose fsync has been asked for; the first one is under way.
    syncing: VecDeque<u64>,
    ingests: BTreeMap<u64, Ingest>,
    next: u64,
    /// No fsync ends before this.
    pub stalled_until: u64,
    /// Each fsync takes so many times longer.
    pub slowness: u64,
    pub last_synced_at: u64,
}

impl Disk {
    // ---- the log -------------------------------------------------------------------------------

    pub fn write(&mut self, core: &mut Core, record: LogRecord) {
        self.log.write(&mut core.journal, record);
    }

    pub fn sync(&mut self, core: &mut Core, me: Process, group: u64) {
        self.log.seal(group);
        self.syncing.push_back(group);
        if self.syncing.len() == 1 {
            self.begin_sync(core, me, group);
        }
    }

    fn begin_sync(&mut self, core: &mut Core, me: Process, group: u64) {
        let base = core.plan.fsync;
        let took = core.rng.between(base / 2, base * 2) * self.slowness.max(1);
        let ends = (core.now + took).max(self.stalled_until);
        core.tell_after(ends - core.now, me, Told::Disk(DiskDone::Synced { group }));
    }

    pub fn synced(&mut self, core: &mut Core, me: Process, group: u64) {
        assert_eq!(self.syncing.pop_front(), Some(group), "fsyncs end in order");
        self.log.durable(group);
        self.last_synced_at = core.now;
        if let Some(&next) = self.syncing.front() {
            self.begin_sync(core, me, next);
        }
    }

    pub fn read_log(
        &mut self,
        core: &mut Core,
        me: Process,
        shard: ShardId,
        from: Seq,
        bytes_max: usize,
    ) {
        let entries = self.log.read(shard, from, bytes_max);
        let took = core.rng.between(50, 2_000);
        core.tell_after(took, me, Told::Disk(DiskDone::LogRead { shard, from, entries }));
    }

    pub fn trim(&mut self, marks: &[Needed]) {
        self.log.trim(marks);
    }

    // ---- the state -----------------------------------------------------------------------------

    pub fn load(&mut self, core: &mut Core, me: Process, load: u64, needs: &Needs) {
        let row = |key: &CounterKey| self.rows.get(&(key.slot().0, key.name().to_vec())).copied();
        let values = needs.counters.iter().map(row).collect();
        let records = self.tokens.load(&needs.records);
        let took = core.rng.between(20, if core.plan.jitter { 5_000 } else { 200 });
        core.tell_after(took, me, Told::Disk(DiskDone::Loaded { load, values, records }));
    }

    pub fn begin_ingest(&mut self, core: &mut Core, me: Process, ingest: Ingest) {
        self.next += 1;
        self.ingests.insert(self.next, ingest);
        if self.ingests.len() == 1 {
            let took = core.rng.between(500, 20_000);
            core.tell_after(took, me, Told::Disk(DiskDone::Ingest { id: self.next }));
        }
    }

    /// Performs an ingest, in one step.
    pub fn ingest(&mut self, core: &mut Core, me: Process, id: u64) -> Option<Ingest> {
        let ingest = self.ingests.remove(&id)?;
        // They happen in the order in which they were asked for.
        if let Some(&id) = self.ingests.keys().next() {
            let took = core.rng.between(500, 20_000);
            core.tell_after(took, me, Told::Disk(DiskDone::Ingest { id }));
        }
        match &ingest {
            Ingest::Flush { table, shards, .. } => {
                super::log::flush(&mut self.rows, table);
                self.tokens.flush(table, shards);
                for (copy, state) in shards {
                    self.records.insert(state.slots.shard(), (*copy, state.clone()));
                }
            }
            Ingest::Install { copy, rows, state, .. } => {
                self.drop_rows(state.slots);
                for (name, value) in &rows.counters {
                    self.put_row(name, *value);
                }
                self.tokens.install(&rows.tokens);
                self.records.insert(state.slots.shard(), (*copy, (**state).clone()));
            }
            Ingest::Drop { shard, slots } => {
                self.drop_rows(*slots);
                self.records.remove(shard);
            }
            Ingest::Snapshot { .. } => {}
        }
        Some(ingest)
    }

    fn put_row(&mut self, name: &[u8], value: i128) {
        let slot = engine::key::slot_of(engine::key::hash(name));
        self.rows.insert((slot.0, name.to_vec()), value);
    }

    fn drop_rows(&mut self, slots: Slots) {
        self.rows.retain(|&(slot, _), _| slot < slots.lo || slots.hi < slot);
        self.tokens.drop(slots);
    }

    /// The rows of a shard and its record, as they stand.
    pub fn snapshot(&self, shard: ShardId, slots: Slots) -> Option<(Rows, ShardState)> {
        let (_, state) = self.records.get(&shard)?;
        let rows = self.rows.range((slots.lo, Vec::new())..);
        let rows = rows.take_while(|((slot, _), _)| *slot <= slots.hi);
        let counters = rows.map(|((_, name), &value)| (name.clone(), value)).collect();
        let rows = Rows { counters, tokens: self.tokens.copy_of(slots) };
        Some((rows, state.clone()))
    }

    // ---- the end and the beginning of a process ------------------------------------------------

    /// The process is gone. If the machine is too, what was not durable is cut at random.
    pub fn crash(&mut self, core: &mut Core, power_lost: bool) {
        self.syncing.clear();
        self.ingests.clear();
        self.log.crash(&mut core.rng, power_lost);
    }

    /// The number of the first group that a starting process writes.
    pub fn next_group(&self) -> u64 {
        self.log.next_group()
    }

    /// What a starting process finds.
    pub fn recover(&mut self) -> Vec<RecoveredReplica> {
        self.log.recover(&self.records)
    }
}
