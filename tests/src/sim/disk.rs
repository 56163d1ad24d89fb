//! One store's disk: the log, the state, and how long each takes.
//!
//! Requests to the log are performed in order, and a group holds up what comes after it until its
//! fsync has returned, as in production's log thread: so a crash loses the groups that wait, may
//! tear the one that is being written ([`log`](super::log)), and keeps all before it. The state
//! changes by ingests alone, each all or nothing: a crash comes before it or after it. A load reads
//! the state at the time of the request, and answers later.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use engine::ids::{Conn, CopyNo, ShardId, Slot, Slots, StoreId};
use engine::key::CounterKey;
use engine::node::RecoveredReplica;
use engine::shard::apply::Needs;
use engine::shard::division::RowCounts;
use engine::shard::idempotency::RecordId;
use engine::shard::state::ShardState;
use engine::store::layout::{self, RowChange, RowKey};
use engine::store::log::catch_up::WantedEntries;
use engine::store::log::index::Needed;
use engine::store::log::scan::LogLocation;
use engine::store::log::writer::Resume;
use engine::store::log::{Identity, LogRecord};
use engine::store::recovery::RecoveryPlan;
use engine::store::table::SealedTable;

use super::checker::durable::{Durable, RecoveryFindings};
use super::core::Core;
use super::coverage::Path;
use super::draws::are_images_of_a_run_drawn;
use super::event::{DiskDone, ProcessInput};
use super::log::{DamagedLog, GroupAfterCrash, Log, OpenLog};
use super::place::ProcessId;
use super::plan::log::LogSizes;
use super::rng::Rng;
use super::rows::{Rows, TokenRows};

/// The change that an ingest makes to the state.
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
        replaces: Slots,
        rows: Rows,
        state: Box<ShardState>,
    },
    Drop {
        shard: ShardId,
        slots: Slots,
    },
    /// No change, but a read of the state in the order of the ingests.
    Snapshot {
        conn: Conn,
        transfer: u64,
        shard: ShardId,
        slots: Slots,
    },
}

impl Ingest {
    /// A snapshot may be so large that much else happens while it is read.
    fn takes(&self, core: &mut Core) -> u64 {
        let is_copy = matches!(self, Self::Snapshot { .. });
        core.rng.between(500, if is_copy && core.plan.jitter { 400_000 } else { 20_000 })
    }
}

/// The disk space that a state machine is notified of.
#[derive(Clone, Copy, Debug)]
pub struct DiskSpace {
    pub full: bool,
    pub room: u64,
}

/// The result of opening the disk at a start.
pub struct Opened {
    pub identity: Option<Identity>,
    pub replicas: Vec<RecoveredReplica>,
    pub next_group: u64,
    /// Something durable could not be read, now or at an earlier start.
    pub suspect: bool,
    /// The loss is so large that the store of this disk can't be identified.
    pub nameless: bool,
}

/// The requests to the log, in order.
enum LogRequest {
    Group { number: u64, records: Vec<LogRecord> },
    Read { wanted: Vec<WantedEntries>, from: LogLocation, bytes_max: usize },
    Trim(Vec<Needed>),
}

/// The rows that loads see.
#[derive(Clone, Default)]
struct VisibleRows {
    /// Counter rows by (slot, name).
    counters: BTreeMap<(u16, Vec<u8>), i128>,
    tokens: TokenRows,
}

/// The part of a disk that outlives every process and every crash.
#[derive(Clone, Default)]
struct StoredState {
    log: Log,
    rows: VisibleRows,
    /// Shard records.
    records: BTreeMap<ShardId, (CopyNo, ShardState)>,
    durable: Durable,
    /// A counter that can't be read.
    lost_row: Option<(u16, Vec<u8>)>,
    /// Some bit was changed, and no process has noticed yet.
    rotten: bool,
    /// Some bit was changed: its segment stays as it is until it is trimmed, and is found damaged
    /// at every start.
    was_rotten: bool,
    /// Damage was found. The mark stays until etcd records that the store is suspect.
    mark: bool,
    /// The number of processes that have served from this disk.
    served: u64,
    /// The disk is an image from before the last time that it served.
    outdated: bool,
}

pub struct SimDisk {
    stored: StoredState,
    /// An image of an earlier start.
    image: Option<Box<StoredState>>,
    /// `None` until a process has opened the disk.
    open: Option<DiskInUse>,
    /// The pending ingests, each with the group that must be durable before it.
    ingests: BTreeMap<u64, (u64, Ingest)>,
    next: u64,
    /// The rows that loads see while the process has not handled every answer to a change; `None`:
    /// what is stored.
    visible: Option<VisibleRows>,
    /// The rows after each change whose answer is still to be handled.
    unhandled: VecDeque<VisibleRows>,
    /// The stream that decides what a crash leaves, separate so that no other choice moves with it.
    rng: Rng,
    sizes: LogSizes,
    /// No fsync ends before this.
    pub stalled_until: u64,
    /// Until then there is no room: file writes wait, and an incoming snapshot can't be staged.
    pub no_room_until: u64,
    /// The disk is full, but for its reserve, until the operator makes room: also after a restart.
    pub stays_full: bool,
    /// The disk is small: until the given time this many bytes may be written.
    pub small: Option<(u64, u64)>,
    /// The room that the state machine was last notified of.
    pub room_reported: u64,
    /// Each fsync takes this many times longer for now.
    pub slowness: u64,
    /// Each fsync takes this many times longer, always.
    slowness_for_good: u64,
    /// The folder is copied now and then while a process runs, not only before a start.
    images_of_a_run: bool,
    pub last_synced_at: u64,
}

/// The disk while a process has it open.
struct DiskInUse {
    store: StoreId,
    log: OpenLog,
    jobs: VecDeque<LogRequest>,
    /// The records of the group that is being gathered.
    records: Vec<LogRecord>,
    /// The last requested group, and the last one whose fsync has returned.
    asked: u64,
    synced: u64,
    /// `true` if the log was too long at the last check.
    full: bool,
}

impl SimDisk {
    pub fn new(rng: Rng, sizes: LogSizes, slowness_for_good: u64) -> Self {
        Self {
            stored: StoredState::default(),
            image: None,
            open: None,
            ingests: BTreeMap::new(),
            next: 0,
            visible: None,
            unhandled: VecDeque::new(),
            rng,
            sizes,
            slowness_for_good,
            images_of_a_run: are_images_of_a_run_drawn(),
            stalled_until: 0,
            no_room_until: 0,
            stays_full: false,
            small: None,
            room_reported: u64::MAX,
            slowness: 1,
            last_synced_at: 0,
        }
    }

    fn running(&mut self) -> &mut DiskInUse {
        self.open.as_mut().expect("only a process that has the disk open uses it")
    }

    // ---- the log -------------------------------------------------------------------------------

    pub fn write(&mut self, record: LogRecord) {
        self.running().records.push(record);
    }

    pub fn sync(&mut self, core: &mut Core, me: ProcessId, number: u64) {
        let records = std::mem::take(&mut self.running().records);
        self.stored.durable.written(number, &records);
        self.running().asked = number;
        self.log_job(core, me, LogRequest::Group { number, records });
    }

    pub fn read_log(
        &mut self,
        core: &mut Core,
        me: ProcessId,
        wanted: Vec<WantedEntries>,
        from: LogLocation,
        bytes_max: usize,
    ) {
        self.log_job(core, me, LogRequest::Read { wanted, from, bytes_max });
    }

    pub fn trim(&mut self, core: &mut Core, me: ProcessId, needed: Vec<Needed>) {
        self.log_job(core, me, LogRequest::Trim(needed));
    }

    fn log_job(&mut self, core: &mut Core, me: ProcessId, job: LogRequest) {
        let open = self.running();
        open.jobs.push_back(job);
        // A group that is being written stays in front until it is fsynced.
        if open.jobs.len() == 1 {
            self.log_jobs(core, me);
        }
    }

    /// Begins the next requests, up to a group that must be waited for.
    fn log_jobs(&mut self, core: &mut Core, me: ProcessId) {
        let Some(open) = &mut self.open else { return };
        let log = &mut self.stored.log;
        while let Some(job) = open.jobs.front_mut() {
            match job {
                LogRequest::Group { number, records } => {
                    core.trace.mix(open.log.write(log, *number, std::mem::take(records)));
                    let base = core.plan.fsync;
                    let took = core.rng.between(base / 2, base * 2)
                        * self.slowness.max(1)
                        * self.slowness_for_good;
                    let ends = (core.now + took).max(self.stalled_until);
                    let done = DiskDone::Synced { group: *number };
                    return core.input_after(ends - core.now, me, ProcessInput::Disk(done));
                }
                LogRequest::Read { wanted, from, bytes_max } => {
                    // A busy disk: by the time that the log has been read, it may have been
                    // truncated and another primary may lead.
                    let slow = core.plan.jitter && core.rng.percent(10);
                    let took = core.rng.between(50, if slow { 400_000 } else { 2_000 });
                    let done = match open.log.read(log, std::mem::take(wanted), *from, *bytes_max) {
                        Ok((at, parts)) => DiskDone::LogRead { at, parts },
                        Err(DamagedLog) => DiskDone::Damaged,
                    };
                    core.input_after(took, me, ProcessInput::Disk(done));
                }
                LogRequest::Trim(needed) => {
                    if open.log.trim(log, needed).is_err() {
                        core.input_after(0, me, ProcessInput::Disk(DiskDone::Damaged));
                    }
                    if open.log.is_carrying() {
                        core.oracle.coverage.reached(Path::EntriesCarried);
                    }
                    if std::mem::replace(&mut open.full, open.log.is_full()) != open.full {
                        core.input_after(0, me, ProcessInput::Disk(DiskDone::LogFull(open.full)));
                    }
                }
            }
            open.jobs.pop_front();
        }
    }

    /// An fsync has returned.
    pub fn synced(&mut self, core: &mut Core, me: ProcessId, group: u64) {
        let Some(open) = &mut self.open else { return };
        let first = open.jobs.pop_front();
        let is_it = matches!(first, Some(LogRequest::Group { number, .. }) if number == group);
        assert!(is_it, "fsyncs end in order");
        open.synced = group;
        open.log.synced(&mut self.stored.log, group);
        self.stored.durable.synced(group);
        self.report_durable(core);
        self.last_synced_at = core.now;
        if self.images_of_a_run && self.rng.below(300) == 0 {
            self.image = Some(Box::new(self.stored.clone()));
        }
        self.log_jobs(core, me);
    }

    /// Reports what has become durable. A disk that is an older image of one that has served since
    /// is not the store's.
    fn report_durable(&mut self, core: &mut Core) {
        let changed = self.stored.durable.take_changed(&self.stored.records);
        let Some(store) = self.open.as_ref().map(|open| open.store) else { return };
        for found in changed.into_iter().filter(|_| !self.stored.outdated) {
            core.oracle.durable(store, found);
        }
    }

    /// The group that makes everything durable that was written so far.
    fn durable_to_here(&self) -> u64 {
        let open = self.open.as_ref().expect("requested by a process that has the disk open");
        open.asked + u64::from(!open.records.is_empty())
    }

    // ---- the state -----------------------------------------------------------------------------

    pub fn load(&mut self, core: &mut Core, me: ProcessId, load: u64, needs: &Needs) {
        let stored = &self.stored;
        let name = |key: &CounterKey| (key.slot().0, key.name().to_vec());
        let lost = |key: &CounterKey| stored.lost_row.as_ref() == Some(&name(key));
        if needs.counters.iter().any(lost) {
            return core.input_after(20, me, ProcessInput::Disk(DiskDone::Damaged));
        }
        let visible = self.visible.as_ref().unwrap_or(&stored.rows);
        let row = |key: &CounterKey| visible.counters.get(&name(key)).copied();
        let values = needs.counters.iter().map(row).collect();
        let records = visible.tokens.load(&needs.records);
        let took = core.rng.between(20, if core.plan.jitter { 5_000 } else { 200 });
        core.input_after(took, me, ProcessInput::Disk(DiskDone::Loaded { load, values, records }));
    }

    /// Counts the rows of a shard that is split.
    pub fn count_rows(
        &mut self,
        core: &mut Core,
        me: ProcessId,
        count: u64,
        (slots, at): (Slots, u16),
    ) {
        let stored = &self.stored;
        let lost = |row: &(u16, Vec<u8>)| (slots.lo..=slots.hi).contains(&row.0);
        if stored.lost_row.as_ref().is_some_and(lost) {
            return core.input_after(20, me, ProcessInput::Disk(DiskDone::Damaged));
        }
        let visible = self.visible.as_ref().unwrap_or(&stored.rows);
        let mut counts = RowCounts::new(slots, at);
        let rows = visible.counters.range((slots.lo, Vec::new())..);
        for ((slot, name), &value) in rows.take_while(|((slot, _), _)| *slot <= slots.hi) {
            counts.counter(Slot(*slot), name, value);
        }
        visible.tokens.each(slots, |id, record| counts.record(id, record.clone()));
        let took = core.rng.between(20, if core.plan.jitter { 50_000 } else { 2_000 });
        let done = DiskDone::RowsCounted { count, counts: Box::new(counts) };
        core.input_after(took, me, ProcessInput::Disk(done));
    }

    /// `issued`: the last group that contains anything that the process wanted to have written.
    pub fn begin_ingest(&mut self, core: &mut Core, me: ProcessId, issued: u64, ingest: Ingest) {
        let after = match ingest {
            // The log first records, durably, the operation on the shard.
            Ingest::Drop { .. } | Ingest::Install { .. } => self.durable_to_here().max(issued),
            Ingest::Flush { .. } | Ingest::Snapshot { .. } => 0,
        };
        self.next += 1;
        let took = ingest.takes(core);
        self.ingests.insert(self.next, (after, ingest));
        if self.ingests.len() == 1 {
            core.input_after(took, me, ProcessInput::Disk(DiskDone::Ingest { id: self.next }));
        }
    }

    /// Performs an ingest, in one step.
    pub fn ingest(&mut self, core: &mut Core, me: ProcessId, id: u64) -> Option<Ingest> {
        let (after, ingest) = self.ingests.get(&id)?;
        if !matches!(ingest, Ingest::Snapshot { .. }) && core.now < self.no_room_until {
            let wait = self.no_room_until - core.now;
            if matches!(ingest, Ingest::Flush { .. }) {
                core.oracle.coverage.reached(Path::FlushWithoutRoom);
            }
            core.input_after(wait, me, ProcessInput::Disk(DiskDone::Ingest { id }));
            return None;
        }
        if self.open.as_ref()?.synced < *after {
            core.input_after(500, me, ProcessInput::Disk(DiskDone::Ingest { id }));
            return None;
        }
        let (_, ingest) = self.ingests.remove(&id)?;
        // Ingests are performed in the order of their requests.
        if let Some((&id, (_, next))) = self.ingests.first_key_value() {
            let took = next.takes(core);
            core.input_after(took, me, ProcessInput::Disk(DiskDone::Ingest { id }));
        }
        let is_change = !matches!(ingest, Ingest::Snapshot { .. });
        let before = (core.plan.reorder.on && is_change).then(|| self.stored.rows.clone());
        self.change(&ingest);
        if let Some(before) = before {
            self.visible.get_or_insert(before);
            self.unhandled.push_back(self.stored.rows.clone());
        }
        Some(ingest)
    }

    /// The process handles the answer to the next change: from here on loads see it.
    pub fn change_is_handled(&mut self) {
        let rows = self.unhandled.pop_front();
        self.visible = rows.filter(|_| !self.unhandled.is_empty());
    }

    fn change(&mut self, ingest: &Ingest) {
        match ingest {
            Ingest::Flush { table, shards, .. } => {
                let written = layout::rows(table, shards, |key, change| {
                    self.stored.write_row(key, change);
                    Ok::<(), std::convert::Infallible>(())
                });
                written.unwrap_or_else(|never| match never {});
            }
            Ingest::Install { copy, replaces, rows, state, .. } => {
                self.stored.remove(*replaces);
                for (name, value) in &rows.counters {
                    self.put_row(name, *value);
                }
                self.stored.rows.tokens.install(&rows.tokens);
                self.stored.records.insert(state.slots.shard(), (*copy, (**state).clone()));
            }
            Ingest::Drop { slots, .. } => self.stored.remove(*slots),
            Ingest::Snapshot { .. } => {}
        }
    }

    fn put_row(&mut self, name: &[u8], value: i128) {
        let slot = engine::key::slot_of(engine::key::hash(name));
        self.stored.rows.counters.insert((slot.0, name.to_vec()), value);
    }

    /// There is no room for a while. Returns the notification for the state machine.
    pub fn fills_up(&mut self, now: u64, micros: u64) -> DiskSpace {
        let fullness = match self.rng.below(3) {
            // The log is too long: the state may be written.
            0 => DiskSpace { full: true, room: u64::MAX },
            1 => DiskSpace { full: true, room: 0 },
            _ => DiskSpace { full: false, room: self.rng.below(600) },
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

    /// The bytes that a copy of the shard takes.
    pub fn size_of(&self, shard: ShardId, slots: Slots) -> u64 {
        let rows = self.snapshot(shard, slots).map_or(0, |(rows, _)| rows.counters.len());
        100 + 50 * rows as u64
    }

    /// The current rows of a shard and its record.
    pub fn snapshot(&self, shard: ShardId, slots: Slots) -> Option<(Rows, ShardState)> {
        let (_, state) = self.stored.records.get(&shard)?;
        let rows = self.stored.rows.counters.range((slots.lo, Vec::new())..);
        let rows = rows.take_while(|((slot, _), _)| *slot <= slots.hi);
        let counters = rows.map(|((_, name), &value)| (name.clone(), value)).collect();
        let rows = Rows { counters, tokens: self.stored.rows.tokens.copy_of(slots) };
        Some((rows, state.clone()))
    }

    // ---- the end and the beginning of a process ------------------------------------------------

    /// The process is gone; with `power_lost` the machine is too, whether a process was running or
    /// not.
    pub fn crash(&mut self, core: &mut Core, power_lost: bool) {
        self.open = None;
        self.ingests.clear();
        self.visible = None;
        self.unhandled.clear();
        self.room_reported = u64::MAX;
        self.stored.log.process_died(&mut self.rng);
        if power_lost && self.stored.log.power_lost(&mut self.rng) == GroupAfterCrash::Torn {
            core.oracle.coverage.reached(Path::GroupTorn);
        }
    }

    /// A process reads everything. No request comes before it.
    pub fn open(&mut self, core: &mut Core, me: ProcessId, store: StoreId) -> Opened {
        if self.rng.percent(30) {
            self.image = Some(Box::new(self.stored.clone()));
        }
        let stored = &mut self.stored;
        if stored.mark && stored.lost_row.take().is_some() {
            // A state that can't be read is set aside, and an empty one begins.
            stored.remove(Slots::ALL);
        }
        let (mut plan, scanned) = stored.log.open(&stored.records, self.sizes);
        if scanned.torn {
            core.oracle.coverage.reached(Path::TornGroupCut);
        }
        if plan.is_damaged() {
            core.oracle.coverage.reached(Path::DamageTold);
        }
        let (rotten, marked) = (stored.rotten, stored.mark);
        stored.was_rotten |= std::mem::take(&mut stored.rotten);
        stored.was_rotten &= plan.is_damaged();
        stored.mark |= plan.is_damaged();
        if stored.mark {
            suspect_all(&mut plan);
        }
        let found = RecoveryFindings {
            store,
            group: scanned.next_group - 1,
            damaged: stored.mark,
            must_be_damaged: rotten || marked,
            may_be_damaged: stored.was_rotten || marked,
            identity: plan.identity.as_ref(),
            replicas: &plan.replicas,
            state: &stored.records,
        };
        stored.durable.recovered(&found, &mut core.oracle.violations);
        plan.stale_rows.iter().for_each(|&slots| stored.remove(slots));
        core.trace.note(core.now, || format!("{me:?} finds {plan:?}"));
        let contents = plan.replicas.iter().filter_map(|replica| replica.content.as_ref());
        let suspect = stored.mark || contents.into_iter().any(|content| content.suspect);
        if stored.mark {
            let held = plan.replicas.iter().filter(|replica| replica.content.is_some());
            core.oracle.damaged.found(store, held.map(|replica| (replica.shard, replica.copy)));
        }
        let nameless = plan.identity.is_none() && (stored.mark || !plan.replicas.is_empty());
        // A first group that never became durable: no other process knows of this store.
        let resume = match plan.identity {
            None => Resume::empty(self.sizes.block_bytes),
            Some(_) => plan.resume,
        };
        let next_group = resume.next_group.max(1);
        self.open = Some(DiskInUse {
            store,
            log: OpenLog::new(resume, self.sizes),
            jobs: VecDeque::new(),
            records: Vec::new(),
            asked: next_group - 1,
            synced: next_group - 1,
            full: false,
        });
        self.report_durable(core);
        let (identity, replicas) = (plan.identity, plan.replicas);
        Opened { identity, replicas, next_group, suspect, nameless }
    }

    /// A process begins to serve from this disk, and etcd has recorded what is wrong with it.
    pub fn serves(&mut self) {
        self.stored.served += 1;
        self.stored.mark = false;
    }

    /// Serving from this disk would revoke what has been acknowledged since.
    pub fn is_outdated(&self) -> bool {
        self.stored.outdated
    }

    // ---- what can be done to it ----------------------------------------------------------------

    /// A running process found damage: the next start must know.
    pub fn mark_damage(&mut self) {
        self.stored.mark = true;
    }

    pub fn rot(&mut self) -> bool {
        // One bit at a time: a second change of the same one would restore it.
        self.stored.rotten = self.stored.rotten || self.stored.log.rot(&mut self.rng);
        self.stored.rotten
    }

    pub fn lose_row(&mut self) -> bool {
        let rows: Vec<_> = self.stored.rows.counters.keys().collect();
        if rows.is_empty() {
            return false;
        }
        self.stored.lost_row = Some(rows[self.rng.index(rows.len())].clone());
        true
    }

    /// Returns whether there is harm that no process has found yet, or that will be found once
    /// more.
    pub fn hides_harm(&self) -> bool {
        self.stored.rotten || self.stored.was_rotten || self.stored.lost_row.is_some()
    }

    /// A disk with the content of an image that was copied before the last start that served.
    pub fn older_copy(&self) -> Option<Self> {
        let image = self.image.as_ref().filter(|image| image.served < self.stored.served)?;
        let stored = StoredState { outdated: true, ..StoredState::clone(image) };
        Some(Self { stored, ..Self::new(self.rng.clone(), self.sizes, self.slowness_for_good) })
    }

    pub fn roll_back(&mut self) -> bool {
        let Some(image) = self.image.take() else { return false };
        let served = self.stored.served;
        self.stored = *image;
        self.stored.outdated = self.stored.served < served;
        true
    }

    pub fn wipe(&mut self) {
        self.stored = StoredState::default();
        self.image = None;
        self.open = None;
    }
}

/// Marks every copy as suspect, because of damage.
fn suspect_all(plan: &mut RecoveryPlan) {
    for content in plan.replicas.iter_mut().filter_map(|replica| replica.content.as_mut()) {
        content.suspect = true;
    }
    for checkpoint in plan.resume.shards.values_mut() {
        checkpoint.suspect |= checkpoint.extent.is_some();
    }
}

impl StoredState {
    /// Removes a shard's rows and its record.
    fn remove(&mut self, slots: Slots) {
        let removed = |(slot, _): &(u16, Vec<u8>)| (slots.lo..=slots.hi).contains(slot);
        if self.lost_row.as_ref().is_some_and(removed) {
            self.lost_row = None;
        }
        self.rows.counters.retain(|&(slot, _), _| slot < slots.lo || slots.hi < slot);
        self.rows.tokens.drop(slots);
        self.records.retain(|_, (_, state)| state.slots.hi < slots.lo || slots.hi < state.slots.lo);
    }

    /// Writes one row of a flush: the bytes that production hands to RocksDB, and reads again.
    fn write_row(&mut self, key: &[u8], change: RowChange<'_>) {
        match RowKey::decode(key).expect("just encoded") {
            RowKey::Counter { slot, counter } => {
                let name = (slot.0, counter.name().to_vec());
                let value = match change {
                    RowChange::Put(value) => value.to_vec(),
                    RowChange::Merge(operand) => {
                        let below = self
                            .rows
                            .counters
                            .get(&name)
                            .map(|&value| layout::counter_value(value));
                        layout::merge(below.as_deref(), [operand]).expect("just encoded")
                    }
                    RowChange::Delete => {
                        self.rows.counters.remove(&name);
                        return;
                    }
                };
                self.rows
                    .counters
                    .insert(name, layout::decode_counter(&value).expect("just encoded"));
            }
            RowKey::Idempotency { slot, hash } => {
                self.rows.tokens.write(RecordId { slot, hash }, row_of(change));
            }
            RowKey::Shard(shard) => {
                let record = layout::decode_shard(row_of(change)).expect("just encoded");
                self.records.insert(shard, record);
            }
        }
    }
}

/// Rows of other kinds than counters are always written in full.
fn row_of(change: RowChange<'_>) -> &[u8] {
    match change {
        RowChange::Put(row) => row,
        other => unreachable!("{other:?} of a row that is no counter"),
    }
}
