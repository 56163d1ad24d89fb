//! One store's disk: the log, the state, and how long each takes.
//!
//! Jobs of the log are done in the order in which they were asked for, and a group holds up what comes after it until
//! its fsync has come back, as in production's log thread: so a crash loses the groups that wait, may tear the one
//! that is being written ([`log`](super::log)), and keeps all before it. The state changes by ingests alone, each all
//! or nothing: a crash comes before it or after it. A load reads the state as it is when it is asked for, and answers
//! later.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use engine::apply::{Needs, ShardState};
use engine::idempotency::{RecordId, TokenRecord};
use engine::ids::{Conn, CopyNo, ShardId, Slots, StoreId};
use engine::key::CounterKey;
use engine::node::RecoveredReplica;
use engine::store::layout::{self, RowChange, RowKey};
use engine::store::log::catch_up::{LogPart, WantedEntries};
use engine::store::log::index::Needed;
use engine::store::log::scan::LogLocation;
use engine::store::log::writer::Resume;
use engine::store::log::{Identity, LogRecord};
use engine::store::recovery::RecoveryPlan;
use engine::store::table::SealedTable;

use super::checker::durable::{Durable, Found};
use super::core::{Core, Process, Told};
use super::coverage::Path;
use super::draws::are_images_of_a_run_drawn;
use super::log::{Damaged, Left, Log, LogSizes, OpenLog};
use super::rng::Rng;
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
        records: Vec<Option<TokenRecord>>,
    },
    LogRead {
        at: LogLocation,
        parts: Vec<LogPart>,
    },
    /// An ingest is to be performed now.
    Ingest {
        id: u64,
    },
    Full(bool),
    /// So many bytes may be written before it is full.
    Room(u64),
    Measured {
        transfer: u64,
        bytes: u64,
    },
    /// The log is too long, or no longer.
    LogFull(bool),
    /// What was written can't be read any more: nothing can be relied upon.
    Damaged,
}

/// What an ingest will do to the state.
pub enum Ingest {
    Flush {
        flush: u64,
        table: Arc<SealedTable>,
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

impl Ingest {
    /// A whole copy may be so large that much else happens while it is read.
    fn takes(&self, core: &mut Core) -> u64 {
        let is_copy = matches!(self, Self::Snapshot { .. });
        core.rng.between(500, if is_copy && core.plan.jitter { 400_000 } else { 20_000 })
    }
}

/// What a machine is told of its disk.
#[derive(Clone, Copy, Debug)]
pub struct Fullness {
    pub full: bool,
    pub room: u64,
}

/// What a starting process finds.
pub struct Opened {
    pub identity: Option<Identity>,
    pub replicas: Vec<RecoveredReplica>,
    pub next_group: u64,
    /// Something durable could not be read, now or at an earlier start.
    pub suspect: bool,
    /// So much is gone that nobody can say whose disk it is.
    pub nameless: bool,
}

/// What the log is asked to do, one after the other.
enum LogJob {
    Group { number: u64, records: Vec<LogRecord> },
    Read { wanted: Vec<WantedEntries>, from: LogLocation, bytes_max: usize },
    Trim(Vec<Needed>),
}

/// What outlives every process and every crash.
#[derive(Clone, Default)]
struct Platter {
    log: Log,
    /// Counter rows by (slot, name).
    rows: BTreeMap<(u16, Vec<u8>), i128>,
    tokens: TokenRows,
    /// Shard records.
    records: BTreeMap<ShardId, (CopyNo, ShardState)>,
    durable: Durable,
    /// A counter that can't be read.
    lost_row: Option<(u16, Vec<u8>)>,
    /// Some bit is not what was written, and nobody knows yet.
    rotten: bool,
    /// Some bit was: its segment stays as it is until it is trimmed, and is found damaged at every start.
    was_rotten: bool,
    /// Damage was found. Stays until etcd says that the store is suspect.
    mark: bool,
    /// How often a process has begun to serve from it.
    served: u64,
    /// An image from before the last time that it served.
    outdated: bool,
}

pub struct Disk {
    platter: Platter,
    /// What it was at an earlier start.
    image: Option<Box<Platter>>,
    /// None until a process has read what is there.
    open: Option<Open>,
    /// Each with the group that must be durable before it.
    ingests: BTreeMap<u64, (u64, Ingest)>,
    next: u64,
    /// What a crash leaves is its own matter: nothing else moves with it.
    rng: Rng,
    sizes: LogSizes,
    /// No fsync ends before this.
    pub stalled_until: u64,
    /// Until then there is no room: what writes files waits, and a copy that comes can't be staged.
    pub no_room_until: u64,
    /// It is full, but for its reserve, until the operator makes room: also after a restart.
    pub stays_full: bool,
    /// The disk is small: so many bytes may be written until then.
    pub small: Option<(u64, u64)>,
    /// What the machine was told of its room.
    pub room_told: u64,
    /// Each fsync takes so many times longer …
    pub slowness: u64,
    /// … and so many times more, always.
    slowness_for_good: u64,
    /// Its folder is copied now and then while a process runs, not only before.
    images_of_a_run: bool,
    pub last_synced_at: u64,
}

/// A process has the disk open.
struct Open {
    log: OpenLog,
    jobs: VecDeque<LogJob>,
    /// Records of the group that is being gathered.
    records: Vec<LogRecord>,
    /// The group that was asked for last, and the last one whose fsync came back.
    asked: u64,
    synced: u64,
    /// The log was too long when last looked at.
    full: bool,
}

impl Disk {
    pub fn new(rng: Rng, sizes: LogSizes, slowness_for_good: u64) -> Self {
        Self {
            platter: Platter::default(),
            image: None,
            open: None,
            ingests: BTreeMap::new(),
            next: 0,
            rng,
            sizes,
            slowness_for_good,
            images_of_a_run: are_images_of_a_run_drawn(),
            stalled_until: 0,
            no_room_until: 0,
            stays_full: false,
            small: None,
            room_told: u64::MAX,
            slowness: 1,
            last_synced_at: 0,
        }
    }

    fn running(&mut self) -> &mut Open {
        self.open.as_mut().expect("only a process that has it open asks for anything")
    }

    // ---- the log -------------------------------------------------------------------------------

    pub fn write(&mut self, record: LogRecord) {
        self.running().records.push(record);
    }

    pub fn sync(&mut self, core: &mut Core, me: Process, number: u64) {
        let records = std::mem::take(&mut self.running().records);
        self.platter.durable.written(number, &records);
        self.running().asked = number;
        self.log_job(core, me, LogJob::Group { number, records });
    }

    pub fn read_log(
        &mut self,
        core: &mut Core,
        me: Process,
        wanted: Vec<WantedEntries>,
        from: LogLocation,
        bytes_max: usize,
    ) {
        self.log_job(core, me, LogJob::Read { wanted, from, bytes_max });
    }

    pub fn trim(&mut self, core: &mut Core, me: Process, needed: Vec<Needed>) {
        self.log_job(core, me, LogJob::Trim(needed));
    }

    fn log_job(&mut self, core: &mut Core, me: Process, job: LogJob) {
        let open = self.running();
        open.jobs.push_back(job);
        // A group that is being written stays in front until it is fsynced.
        if open.jobs.len() == 1 {
            self.log_jobs(core, me);
        }
    }

    /// Begins what comes next, up to a group that is to be waited for.
    fn log_jobs(&mut self, core: &mut Core, me: Process) {
        let Some(open) = &mut self.open else { return };
        let log = &mut self.platter.log;
        while let Some(job) = open.jobs.front_mut() {
            match job {
                LogJob::Group { number, records } => {
                    core.journal.mix(open.log.write(log, *number, std::mem::take(records)));
                    let base = core.plan.fsync;
                    let took = core.rng.between(base / 2, base * 2)
                        * self.slowness.max(1)
                        * self.slowness_for_good;
                    let ends = (core.now + took).max(self.stalled_until);
                    let done = DiskDone::Synced { group: *number };
                    return core.tell_after(ends - core.now, me, Told::Disk(done));
                }
                LogJob::Read { wanted, from, bytes_max } => {
                    // A busy disk: by the time that it has been read, the log may have been cut and led anew.
                    let slow = core.plan.jitter && core.rng.percent(10);
                    let took = core.rng.between(50, if slow { 400_000 } else { 2_000 });
                    let done = match open.log.read(log, std::mem::take(wanted), *from, *bytes_max) {
                        Ok((at, parts)) => DiskDone::LogRead { at, parts },
                        Err(Damaged) => DiskDone::Damaged,
                    };
                    core.tell_after(took, me, Told::Disk(done));
                }
                LogJob::Trim(needed) => {
                    if open.log.trim(log, needed).is_err() {
                        core.tell_after(0, me, Told::Disk(DiskDone::Damaged));
                    }
                    if open.log.is_carrying() {
                        core.oracle.coverage.reached(Path::EntriesCarried);
                    }
                    if std::mem::replace(&mut open.full, open.log.is_full()) != open.full {
                        core.tell_after(0, me, Told::Disk(DiskDone::LogFull(open.full)));
                    }
                }
            }
            open.jobs.pop_front();
        }
    }

    /// An fsync came back.
    pub fn synced(&mut self, core: &mut Core, me: Process, group: u64) {
        let Some(open) = &mut self.open else { return };
        let first = open.jobs.pop_front();
        let is_it = matches!(first, Some(LogJob::Group { number, .. }) if number == group);
        assert!(is_it, "fsyncs end in order");
        open.synced = group;
        open.log.synced(&mut self.platter.log, group);
        self.platter.durable.synced(group);
        self.last_synced_at = core.now;
        if self.images_of_a_run && self.rng.below(300) == 0 {
            self.image = Some(Box::new(self.platter.clone()));
        }
        self.log_jobs(core, me);
    }

    /// The group that makes durable what was written so far.
    fn durable_to_here(&self) -> u64 {
        let open = self.open.as_ref().expect("asked for by a process that has it open");
        open.asked + u64::from(!open.records.is_empty())
    }

    // ---- the state -----------------------------------------------------------------------------

    pub fn load(&mut self, core: &mut Core, me: Process, load: u64, needs: &Needs) {
        let platter = &self.platter;
        let name = |key: &CounterKey| (key.slot().0, key.name().to_vec());
        let lost = |key: &CounterKey| platter.lost_row.as_ref() == Some(&name(key));
        if needs.counters.iter().any(lost) {
            return core.tell_after(20, me, Told::Disk(DiskDone::Damaged));
        }
        let row = |key: &CounterKey| platter.rows.get(&name(key)).copied();
        let values = needs.counters.iter().map(row).collect();
        let records = self.platter.tokens.load(&needs.records);
        let took = core.rng.between(20, if core.plan.jitter { 5_000 } else { 200 });
        core.tell_after(took, me, Told::Disk(DiskDone::Loaded { load, values, records }));
    }

    pub fn begin_ingest(&mut self, core: &mut Core, me: Process, ingest: Ingest) {
        let after = match ingest {
            // The log says first, durably, what it was told of the shard.
            Ingest::Drop { .. } | Ingest::Install { .. } => self.durable_to_here(),
            Ingest::Flush { .. } | Ingest::Snapshot { .. } => 0,
        };
        self.next += 1;
        let took = ingest.takes(core);
        self.ingests.insert(self.next, (after, ingest));
        if self.ingests.len() == 1 {
            core.tell_after(took, me, Told::Disk(DiskDone::Ingest { id: self.next }));
        }
    }

    /// Performs an ingest, in one step.
    pub fn ingest(&mut self, core: &mut Core, me: Process, id: u64) -> Option<Ingest> {
        let (after, ingest) = self.ingests.get(&id)?;
        if !matches!(ingest, Ingest::Snapshot { .. }) && core.now < self.no_room_until {
            let wait = self.no_room_until - core.now;
            if matches!(ingest, Ingest::Flush { .. }) {
                core.oracle.coverage.reached(Path::FlushWithoutRoom);
            }
            core.tell_after(wait, me, Told::Disk(DiskDone::Ingest { id }));
            return None;
        }
        if self.open.as_ref()?.synced < *after {
            core.tell_after(500, me, Told::Disk(DiskDone::Ingest { id }));
            return None;
        }
        let (_, ingest) = self.ingests.remove(&id)?;
        // They happen in the order in which they were asked for.
        if let Some((&id, (_, next))) = self.ingests.first_key_value() {
            let took = next.takes(core);
            core.tell_after(took, me, Told::Disk(DiskDone::Ingest { id }));
        }
        match &ingest {
            Ingest::Flush { table, shards, .. } => {
                for (key, change) in layout::rows(table, shards) {
                    self.platter.write_row(&key, change);
                }
            }
            Ingest::Install { copy, rows, state, .. } => {
                self.platter.remove(state.slots);
                for (name, value) in &rows.counters {
                    self.put_row(name, *value);
                }
                self.platter.tokens.install(&rows.tokens);
                self.platter.records.insert(state.slots.shard(), (*copy, (**state).clone()));
            }
            Ingest::Drop { slots, .. } => self.platter.remove(*slots),
            Ingest::Snapshot { .. } => {}
        }
        Some(ingest)
    }

    fn put_row(&mut self, name: &[u8], value: i128) {
        let slot = engine::key::slot_of(engine::key::hash(name));
        self.platter.rows.insert((slot.0, name.to_vec()), value);
    }

    /// There is no room for a while. Returns what the machine is told of it.
    pub fn fills_up(&mut self, now: u64, micros: u64) -> Fullness {
        let fullness = match self.rng.below(3) {
            // The log is too long: the state may be written.
            0 => Fullness { full: true, room: u64::MAX },
            1 => Fullness { full: true, room: 0 },
            _ => Fullness { full: false, room: self.rng.below(600) },
        };
        if fullness.room == 0 {
            self.no_room_until = now + micros;
            if self.rng.percent(30) {
                // The next segment has no room either.
                self.stalled_until = self.stalled_until.max(now + micros);
            }
        }
        fullness
    }

    /// Bytes that a copy of the shard takes.
    pub fn size_of(&self, shard: ShardId, slots: Slots) -> u64 {
        let rows = self.snapshot(shard, slots).map_or(0, |(rows, _)| rows.counters.len());
        100 + 50 * rows as u64
    }

    /// The rows of a shard and its record, as they stand.
    pub fn snapshot(&self, shard: ShardId, slots: Slots) -> Option<(Rows, ShardState)> {
        let (_, state) = self.platter.records.get(&shard)?;
        let rows = self.platter.rows.range((slots.lo, Vec::new())..);
        let rows = rows.take_while(|((slot, _), _)| *slot <= slots.hi);
        let counters = rows.map(|((_, name), &value)| (name.clone(), value)).collect();
        let rows = Rows { counters, tokens: self.platter.tokens.copy_of(slots) };
        Some((rows, state.clone()))
    }

    // ---- the end and the beginning of a process ------------------------------------------------

    /// The process is gone; with `power_lost` the machine is too, be there a process or not.
    pub fn crash(&mut self, core: &mut Core, power_lost: bool) {
        self.open = None;
        self.ingests.clear();
        self.room_told = u64::MAX;
        self.platter.log.process_died(&mut self.rng);
        if power_lost && self.platter.log.power_lost(&mut self.rng) == Left::Torn {
            core.oracle.coverage.reached(Path::GroupTorn);
        }
    }

    /// A process reads everything. Nothing is asked for before.
    pub fn open(&mut self, core: &mut Core, me: Process, store: StoreId) -> Opened {
        if self.rng.percent(30) {
            self.image = Some(Box::new(self.platter.clone()));
        }
        let platter = &mut self.platter;
        if platter.mark && platter.lost_row.take().is_some() {
            // A state that can't be read is set aside, and an empty one begins.
            platter.remove(Slots::ALL);
        }
        let (mut plan, scanned) = platter.log.open(&platter.records, self.sizes);
        if scanned.torn {
            core.oracle.coverage.reached(Path::TornGroupCut);
        }
        if plan.is_damaged() {
            core.oracle.coverage.reached(Path::DamageTold);
        }
        let (rotten, marked) = (platter.rotten, platter.mark);
        platter.was_rotten |= std::mem::take(&mut platter.rotten);
        platter.was_rotten &= plan.is_damaged();
        platter.mark |= plan.is_damaged();
        if platter.mark {
            suspect_all(&mut plan);
        }
        let found = Found {
            store,
            group: scanned.next_group - 1,
            damaged: platter.mark,
            must_be_damaged: rotten || marked,
            may_be_damaged: platter.was_rotten || marked,
            identity: plan.identity.as_ref(),
            replicas: &plan.replicas,
            state: &platter.records,
        };
        platter.durable.recovered(&found, &mut core.oracle.violations);
        plan.stale_rows.iter().for_each(|&slots| platter.remove(slots));
        core.journal.note(core.now, || format!("{me:?} finds {plan:?}"));
        let contents = plan.replicas.iter().filter_map(|replica| replica.content.as_ref());
        let suspect = platter.mark || contents.into_iter().any(|content| content.suspect);
        if platter.mark {
            let held = plan.replicas.iter().filter(|replica| replica.content.is_some());
            core.oracle.damaged.found(store, held.map(|replica| (replica.shard, replica.copy)));
        }
        let nameless = plan.identity.is_none() && (platter.mark || !plan.replicas.is_empty());
        // A first group that never became durable: nobody has heard of this store.
        let resume = match plan.identity {
            None => Resume::empty(self.sizes.block_bytes),
            Some(_) => plan.resume,
        };
        let next_group = resume.next_group.max(1);
        self.open = Some(Open {
            log: OpenLog::new(resume, self.sizes),
            jobs: VecDeque::new(),
            records: Vec::new(),
            asked: next_group - 1,
            synced: next_group - 1,
            full: false,
        });
        let (identity, replicas) = (plan.identity, plan.replicas);
        Opened { identity, replicas, next_group, suspect, nameless }
    }

    /// A process begins to serve from it, and etcd has noted what is wrong with it.
    pub fn serves(&mut self) {
        self.platter.served += 1;
        self.platter.mark = false;
    }

    /// Serving from it would take back what it has said since.
    pub fn is_outdated(&self) -> bool {
        self.platter.outdated
    }

    // ---- what can be done to it ----------------------------------------------------------------

    /// A running process came upon damage: the next start must know.
    pub fn mark_damage(&mut self) {
        self.platter.mark = true;
    }

    pub fn rot(&mut self) -> bool {
        // One bit at a time: a second harm to the same one would heal it.
        self.platter.rotten = self.platter.rotten || self.platter.log.rot(&mut self.rng);
        self.platter.rotten
    }

    pub fn lose_row(&mut self) -> bool {
        let rows: Vec<_> = self.platter.rows.keys().collect();
        if rows.is_empty() {
            return false;
        }
        self.platter.lost_row = Some(rows[self.rng.index(rows.len())].clone());
        true
    }

    /// Harm was done that nobody has come upon yet, or that will be come upon once more.
    pub fn hides_harm(&self) -> bool {
        self.platter.rotten || self.platter.was_rotten || self.platter.lost_row.is_some()
    }

    /// What lies on it was copied before it was served from last.
    pub fn older_copy(&self) -> Option<Self> {
        let image = self.image.as_ref().filter(|image| image.served < self.platter.served)?;
        let platter = Platter { outdated: true, ..Platter::clone(image) };
        Some(Self { platter, ..Self::new(self.rng.clone(), self.sizes, self.slowness_for_good) })
    }

    pub fn roll_back(&mut self) -> bool {
        let Some(image) = self.image.take() else { return false };
        let served = self.platter.served;
        self.platter = *image;
        self.platter.outdated = self.platter.served < served;
        true
    }

    pub fn wipe(&mut self) {
        self.platter = Platter::default();
        self.image = None;
        self.open = None;
    }
}

/// What damage makes of every copy.
fn suspect_all(plan: &mut RecoveryPlan) {
    for content in plan.replicas.iter_mut().filter_map(|replica| replica.content.as_mut()) {
        content.suspect = true;
    }
    for checkpoint in plan.resume.shards.values_mut() {
        checkpoint.suspect |= checkpoint.extent.is_some();
    }
}

impl Platter {
    /// A shard's rows and its record.
    fn remove(&mut self, slots: Slots) {
        let removed = |(slot, _): &(u16, Vec<u8>)| (slots.lo..=slots.hi).contains(slot);
        if self.lost_row.as_ref().is_some_and(removed) {
            self.lost_row = None;
        }
        self.rows.retain(|&(slot, _), _| slot < slots.lo || slots.hi < slot);
        self.tokens.drop(slots);
        self.records.retain(|_, (_, state)| state.slots.hi < slots.lo || slots.hi < state.slots.lo);
    }

    /// One row of a flush: the bytes that production hands to RocksDB, and reads again.
    fn write_row(&mut self, key: &[u8], change: RowChange) {
        match RowKey::decode(key).expect("just encoded") {
            RowKey::Counter { slot, counter } => {
                let name = (slot.0, counter.name().to_vec());
                let value = match change {
                    RowChange::Put(value) => value,
                    RowChange::Merge(operand) => {
                        let below = self.rows.get(&name).map(|&value| layout::counter_value(value));
                        layout::merge(below.as_deref(), [&operand[..]]).expect("just encoded")
                    }
                    RowChange::Delete => {
                        self.rows.remove(&name);
                        return;
                    }
                };
                self.rows.insert(name, layout::decode_counter(&value).expect("just encoded"));
            }
            RowKey::Idempotency { slot, hash } => {
                self.tokens.write(RecordId { slot, hash }, &row_of(change));
            }
            RowKey::Shard(shard) => {
                let record = layout::decode_shard(&row_of(change)).expect("just encoded");
                self.records.insert(shard, record);
            }
        }
    }
}

/// What is not a counter is only ever written anew.
fn row_of(change: RowChange) -> Vec<u8> {
    match change {
        RowChange::Put(row) => row,
        other => unreachable!("{other:?} of a row that is no counter"),
    }
}
