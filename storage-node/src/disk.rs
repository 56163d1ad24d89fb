//! One store's disk, for the loop that owns the store's node machine.
//!
//! ```text
//!   loop ──write, sync──▶ log thread ── one write, one fdatasync per group ──▶ Durable
//!        ──read_log─────▶    └─▶ beside it: reads and deletes segments ──────▶ LogRead
//!        ──flush, drop_rows, install_snapshot, snapshot_reader─▶ state thread ▶ Ingested, …
//!        ──load─────────▶ readers ───────────────────────────────────────────▶ Loaded
//! ```
//!
//! Nothing here blocks but [`Disk::open`] and dropping it. What is asked for is answered by a
//! [`DiskEvent`], which the loop turns into the machine's event by [`Disk::accept`] *right before it
//! handles that event*: this is the moment at which later loads begin to see what the event tells of
//! (see [`crate::state::View`]). There is no other way to get at the event, so it can't be forgotten.
//!
//! Any failure of any thread is told once through `failed`; nothing can be relied upon after it,
//! and the process ends with [`DiskError::exit_code`].

use std::collections::BTreeSet;
use std::fmt;
use std::fs::File;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use engine::apply::{Needs, ShardState};
use engine::idempotency::Limits;
use engine::ids::{Conn, CopyNo, ShardId, Slots};
use engine::node::{Event, RecoveredReplica};
use engine::store::log::catch_up::Wanted;
use engine::store::log::index::Needed;
use engine::store::log::scan::Place;
use engine::store::log::{Identity, Record};
use engine::store::table::Frozen;
use tokio::sync::oneshot;

use crate::disk_open;
use crate::error::{DiskError, context};
use crate::kill;
use crate::log_thread::{LogJob, LogThread};
use crate::patience::Patience;
use crate::scrub::{self, Pace};
use crate::snapshot_files::{SnapshotReader, Staging};
use crate::space::{SpaceMin, SpaceWatch};
use crate::state::{State, StateSettings, View, open_checkpoint};
use crate::workers::{Alarm, Workers};

/// Where a store lies and what it may use.
#[derive(Clone, Debug)]
pub struct DiskSettings {
    /// The store's own folder; made if it is not there.
    pub folder: PathBuf,
    /// A segment of the log is full at this size (or after one group).
    pub segment_bytes: usize,
    /// What is read of the log at least, and all at once.
    pub block_bytes: usize,
    /// Up to here the log is kept for followers that lack it; beyond, only for this store itself.
    pub log_keep_bytes: usize,
    /// What must be kept for this store itself may make the log so much longer; then it refuses.
    pub log_slack_bytes: usize,
    /// Refuses when fewer bytes are free on the file system …
    pub free_bytes_min: u64,
    /// … or fewer files can be made there.
    pub free_inodes_min: u64,
    pub state: StateSettings,
    /// Threads that load counters.
    pub readers: usize,
}

impl DiskSettings {
    /// What suits a store in this folder that may use this much memory.
    pub fn new(folder: PathBuf, memory: &MemoryPlan) -> Self {
        let segment_bytes = engine::store::log::group::SEGMENT_BYTES;
        let cores = std::thread::available_parallelism().map_or(2, |cores| cores.get());
        Self {
            folder,
            segment_bytes,
            block_bytes: engine::store::log::index::BLOCK_BYTES,
            log_keep_bytes: 1 << 30,
            log_slack_bytes: 1 << 30,
            // Room for the segments being made, a flush of both tables, and one compaction of them.
            free_bytes_min: 4 * (segment_bytes + memory.table_bytes_max) as u64,
            // A flush, a compaction and a copy make some dozens of files, and old ones go only afterwards.
            free_inodes_min: 64,
            state: StateSettings {
                cache_bytes: memory.cache_bytes,
                open_files_max: memory.open_files_max,
                ..StateSettings::default()
            },
            readers: cores.clamp(2, 8),
        }
    }
}

/// How a storage node's memory is shared out: the one place that says so. The disk is given its part,
/// and the machine the rest by its settings (`Options::node_settings`).
///
/// First comes what the process takes whatever it is given: code, threads, socket buffers, what RocksDB
/// needs beside its cache. The rest is divided in eighteenths. Each part is a limit of what is *held*, as
/// the allocator gives it, not of what a message says that it holds:
///
/// | part | eighteenths | beyond it |
/// |---|---|---|
/// | RocksDB's blocks, indexes and filters | 4 | the oldest go |
/// | counter tables: active, frozen, and half of one while it grows | 5 | flush; nothing more is applied until it is done |
/// | ordered and not applied yet, with decoded operations | 2 | batches are refused; a follower acknowledges nothing more |
/// | received and not handled yet: gateways, peers | 2 | nothing more is read from those sockets |
/// | applied log for followers that lag | 1 | the oldest go; such followers are fed from the disk |
/// | reads under way, reads that wait for a proof | 1 | reads are refused |
/// | session rows, copies on their way, log entries read for followers, messages being sent | 1 | limits of their own |
/// | the allocator's: pages that were freed a moment ago or are used in part; RocksDB's table readers | 2 | |
///
/// What is received may take one message of the largest size on each side, however little memory there is: then the other
/// parts are smaller.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct MemoryPlan {
    /// RocksDB's blocks, indexes and filters.
    pub cache_bytes: usize,
    /// RocksDB's table readers, some kilobytes each, lie outside the cache.
    pub open_files_max: i32,
    /// One counter table.
    pub table_bytes_max: usize,
    /// Ordered and not yet applied, of all shards.
    pub pending_bytes_max: usize,
    /// Applied log entries, of all shards.
    pub log_memory_bytes: usize,
    /// Of gateways, and as much again of peers.
    pub intake_bytes: usize,
    /// Of reads under way, and as much again of those that wait for a proof.
    pub waiting_read_bytes_max: usize,
}

/// What the process takes beside what is divided.
const OWN_BYTES: usize = 48 << 20;
/// Less than this is not divided.
const DIVIDED_BYTES_MIN: usize = 64 << 20;
const PARTS: usize = 18;

impl MemoryPlan {
    pub fn of(memory_bytes: usize) -> Self {
        let divided = memory_bytes.saturating_sub(OWN_BYTES).max(DIVIDED_BYTES_MIN);
        // One message of the largest size on each side, lest it wait for space that never comes.
        let intake_bytes = (divided / PARTS).max(proto::MESSAGE_BYTES_MAX);
        let part = (divided - 2 * intake_bytes) / (PARTS - 2);
        Self {
            cache_bytes: 4 * part,
            open_files_max: i32::try_from((divided >> 20) * 4).unwrap_or(i32::MAX).min(4_000),
            table_bytes_max: 2 * part,
            pending_bytes_max: 2 * part,
            log_memory_bytes: part,
            intake_bytes,
            waiting_read_bytes_max: part / 2,
        }
    }
}

/// What was found on the disk.
#[derive(Debug)]
pub struct Opened {
    /// Who this store is; none on a new disk. Then a new identity is to be made, written as the
    /// first record and synced, before anything else is written.
    pub identity: Option<Identity>,
    pub replicas: Vec<RecoveredReplica>,
    /// The number of the first group. The identity of this boot goes into it, so that the node
    /// machine begins with the one after it.
    pub next_group: u64,
    /// What is wrong, for people; none if nothing is. The store is to be noted as suspect in etcd,
    /// and then [`Disk::suspicion_noted`] called.
    pub damage: Vec<String>,
    /// Shards of which there is a record that this build can't read, though it is as it was written.
    pub newer: BTreeSet<ShardId>,
    /// Bytes that the file system holds.
    pub capacity: u64,
}

impl Opened {
    /// Something durable could not be read, now or at an earlier start. A copy that is stopped by what a newer build wrote
    /// says nothing of the others.
    pub fn is_suspect(&self) -> bool {
        let suspect = |replica: &RecoveredReplica| {
            let content = replica.content.as_ref();
            content.is_some_and(|content| content.suspect) && !self.newer.contains(&replica.shard)
        };
        !self.damage.is_empty() || self.replicas.iter().any(suspect)
    }
}

/// Something that the disk has to say. [`Disk::accept`] opens it.
#[derive(Debug)]
pub struct DiskEvent {
    event: Event,
    /// The state as the machine knows it once it has handled the event.
    view: Option<View>,
}

/// Where disk events go.
#[derive(Clone)]
pub(crate) struct Tell(Arc<dyn Fn(DiskEvent) + Send + Sync>);

impl Tell {
    pub(crate) fn event(&self, event: Event) {
        (self.0)(DiskEvent { event, view: None });
    }

    fn with_view(&self, event: Event, view: View) {
        (self.0)(DiskEvent { event, view: Some(view) });
    }

    #[cfg(test)]
    pub(crate) fn to_channel() -> (Self, mpsc::Receiver<Event>) {
        let (send, events) = mpsc::channel();
        let tell = move |told: DiskEvent| send.send(told.event).expect("the test listens");
        (Self(Arc::new(tell)), events)
    }
}

/// The disk of one store. Dropping it lets begun jobs end and closes all files; what was asked for
/// and not begun is dropped.
pub struct Disk {
    /// Of the group being gathered.
    records: Vec<Record>,
    /// Who waits for that group to be durable.
    waiting: Vec<mpsc::Sender<()>>,
    view: Arc<View>,
    tell: Tell,
    alarm: Alarm,
    patience: Patience,
    staging: Staging,
    damage_mark: disk_open::DamageMark,
    folder: PathBuf,
    /// A scrub under way is to give up.
    stopping: Arc<AtomicBool>,
    log: LogThread,
    state_jobs: Workers,
    scrubbers: Arc<Workers>,
    readers: Workers,
    space: SpaceWatch,
    state: Arc<State>,
    /// Held until all threads have ended.
    _lock: Arc<File>,
}

impl fmt::Debug for Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Disk({:?}, {:?})", self.state, self.view)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        self.stopping.store(true, Ordering::Release);
    }
}

impl Disk {
    /// Takes the folder for this process alone, recovers what is in it, and starts the threads.
    ///
    /// `events` is called from those threads and must not block. `failed` is called at most once.
    pub fn open(
        settings: DiskSettings,
        events: impl Fn(DiskEvent) + Send + Sync + 'static,
        failed: impl Fn(DiskError) + Send + Sync + 'static,
    ) -> Result<(Self, Opened), DiskError> {
        let found = disk_open::open(&settings)?;
        let tell = Tell(Arc::new(events));
        let mark = found.damage_mark.clone();
        let lock = Arc::new(found.lock);
        let (folder, held) = (settings.folder.clone(), Arc::downgrade(&lock));
        let alarm = Alarm::new(move |error: DiskError| {
            // Nothing that is missed proves anything about a disk that is not there.
            let is_away = |lock: Arc<File>| !disk_open::is_still_there(&folder, &lock);
            let error = match held.upgrade().is_some_and(is_away) {
                true => DiskError::Away(folder.clone(), error.to_string()),
                false => error,
            };
            if error.is_damage()
                && let Err(why) = mark.add(&[error.to_string()])
            {
                tracing::error!(%why, "what was found could not be noted for the next start");
            }
            failed(error);
        });
        let opened = Opened {
            identity: found.recovered.resume.identity.clone(),
            replicas: found.recovered.replicas,
            next_group: found.recovered.resume.next_group.max(1),
            damage: found.recovered.damage,
            newer: found.recovered.newer,
            capacity: found.space.total,
        };
        let fullness = Arc::new(crate::space::Fullness::new(tell.clone()));
        let min = SpaceMin { bytes: settings.free_bytes_min, inodes: settings.free_inodes_min };
        let stopping: Arc<AtomicBool> = Arc::default();
        let patience =
            Patience::new(settings.folder.clone(), min, fullness.clone(), stopping.clone());
        let space = SpaceWatch::start(
            settings.folder.clone(),
            found.space,
            min,
            fullness.clone(),
            alarm.clone(),
        );
        let log = LogThread::start(
            found.log.patient(patience.clone()),
            found.recovered.resume,
            &settings,
            tell.clone(),
            fullness,
            alarm.clone(),
        );
        let state = Arc::new(found.state);
        let disk = Self {
            records: Vec::new(),
            waiting: Vec::new(),
            view: Arc::new(state.view()),
            tell,
            staging: Staging::new(state.clone(), alarm.clone()),
            damage_mark: found.damage_mark,
            folder: settings.folder,
            log,
            stopping,
            state_jobs: Workers::start_low("dkc-state", 1, &alarm),
            scrubbers: Arc::new(Workers::start_low("dkc-scrub", 1, &alarm)),
            readers: Workers::start("dkc-reader", settings.readers.max(1), &alarm),
            space,
            state,
            alarm,
            patience,
            _lock: lock,
        };
        Ok((disk, opened))
    }

    /// Opens what the disk told. To be called right before the machine handles the event.
    pub fn accept(&mut self, told: DiskEvent) -> Event {
        if let Some(view) = told.view {
            self.view = Arc::new(view);
        }
        told.event
    }

    // ---- the log -------------------------------------------------------------------------------

    /// Adds a record to the group being gathered. The first one on a new disk is its identity.
    pub fn write(&mut self, record: Record) {
        self.records.push(record);
    }

    /// What was written since the last sync is group `group`: [`Event::Durable`] follows.
    pub fn sync(&mut self, group: u64) {
        let records = std::mem::take(&mut self.records);
        self.log.run(LogJob::Group { number: group, records });
        for waiting in self.waiting.drain(..) {
            self.log.run(LogJob::Tell(waiting));
        }
    }

    /// Comes to an answer once everything written so far is durable; to an error if that never will.
    fn durable_to_here(&mut self) -> mpsc::Receiver<()> {
        let (reached, answer) = mpsc::channel();
        match self.records.is_empty() {
            true => self.log.run(LogJob::Tell(reached)),
            false => self.waiting.push(reached),
        }
        answer
    }

    /// [`Event::LogRead`] follows, with one block's part of what is wanted, as of the groups synced so far.
    pub fn read_log(&self, wanted: Vec<Wanted>, from: Place, bytes_max: usize) {
        self.log.run(LogJob::Read { wanted, from, bytes_max });
    }

    /// Deletes the segments that nobody needs.
    pub fn trim(&self, needed: Vec<Needed>) {
        self.log.run(LogJob::Trim(needed));
    }

    /// How long ago an fsync of the log last came back.
    pub fn fsync_age(&self) -> Duration {
        self.log.fsync_age()
    }

    /// Bytes of the log in use.
    pub fn log_bytes(&self) -> u64 {
        self.log.bytes()
    }

    // ---- the state -----------------------------------------------------------------------------

    /// [`Event::Loaded`] follows, with the values as they are now.
    pub fn load(&self, load: u64, needs: Needs) {
        let (view, tell) = (self.view.clone(), self.tell.clone());
        let patience = self.patience.clone();
        self.readers.run(move || {
            let (values, records) = patience.run("read of counters", || {
                Ok((view.values(&needs.counters)?, view.records(&needs.records)?))
            })?;
            drop(view);
            tell.event(Event::Loaded { load, values, records });
            Ok(())
        });
    }

    /// [`Event::Ingested`] follows.
    pub fn flush(&self, flush: u64, table: Arc<Frozen>, shards: Vec<(CopyNo, ShardState)>) {
        self.change("flush", Event::Ingested { flush }, move |state| {
            kill::point("flush.begun");
            state.flush(&table, &shards)
        });
    }

    /// Removes a shard's rows. [`Event::RowsDropped`] follows.
    ///
    /// The log says first, durably, that their copy is gone. A crash between the two would else
    /// look as if the state had lost a copy that the log still knows: a suspect store, for nothing.
    pub fn drop_rows(&mut self, shard: ShardId, slots: Slots) {
        let done = Event::RowsDropped { shard };
        self.change_once_durable("removal of a copy's rows", done, move |state| {
            kill::point("drop.begun");
            state.drop_rows(slots)
        });
    }

    /// [`Event::SnapshotInstalled`] follows.
    ///
    /// The log says first, durably, what it was told of the shard before. After a crash between the
    /// two it would else know nothing of a copy that the state has, as if it had lost it: a suspect
    /// store, for nothing.
    pub fn install_snapshot(
        &mut self,
        conn: Conn,
        transfer: u64,
        copy: CopyNo,
        shard: Box<ShardState>,
    ) {
        let staging = self.staging.clone();
        let done = Event::SnapshotInstalled { conn, transfer };
        let mut staged = None;
        self.change_once_durable("install of a copy", done, move |state| {
            kill::point("install.begun");
            let take =
                || staging.take(conn, transfer).expect("a copy is staged before its install");
            let files: &mut Vec<PathBuf> = staged.get_or_insert_with(take);
            state.install(files, copy, &shard)
        });
    }

    /// Forgets what was staged.
    pub fn discard_snapshot(&self, conn: Conn, transfer: u64) {
        let staging = self.staging.clone();
        self.state_jobs.run(move || staging.discard(conn, transfer));
    }

    /// The shard as it stands in the state, after all changes asked for before. None if the state
    /// has no record of it; an error if the disk has failed.
    pub fn snapshot_reader(&self, slots: Slots) -> oneshot::Receiver<Option<SnapshotReader>> {
        let (send, reader) = oneshot::channel();
        let (state, alarm) = (self.state.clone(), self.alarm.clone());
        let patience = self.patience.clone();
        self.state_jobs.run(move || {
            let open = || SnapshotReader::open(state.view(), slots, alarm.clone());
            let reader = patience.run("begin of a copy's reading", open)?;
            // Nobody may be waiting any more.
            let _ = send.send(reader);
            Ok(())
        });
        reader
    }

    /// [`Event::SnapshotMeasured`] follows.
    pub fn measure(&self, transfer: u64, slots: Slots) {
        let (state, tell) = (self.state.clone(), self.tell.clone());
        self.readers.run(move || {
            let bytes = state.view().size_of(slots);
            tell.event(Event::SnapshotMeasured { transfer, bytes });
            Ok(())
        });
    }

    /// Reads all that is on the disk, or of the state these shards alone. [`Event::Scrubbed`] follows, unless the process
    /// ends before.
    pub fn scrub(&self, scrub: u64, only: Vec<Slots>, bytes_per_s: u64) {
        let (blocks, log_blocks) = mpsc::channel();
        self.log.run(LogJob::Blocks(blocks));
        let (state, tell, log) = (self.state.clone(), self.tell.clone(), self.log.folder().clone());
        let (scrubbers, stopping) = (self.scrubbers.clone(), self.stopping.clone());
        let patience = self.patience.clone();
        self.state_jobs.run(move || {
            // A checkpoint that can't be made leaves nothing behind.
            let folder = patience.run("begin of a scrub", || {
                let folder = state.fresh_folder();
                state.checkpoint(&folder)?;
                Ok(folder)
            })?;
            scrubbers.run(move || {
                let mut pace = Pace::new(bytes_per_s, stopping);
                let found = patience.run("scrub", || {
                    scrub::check_current(state.path())?;
                    scrub::read_state(&open_checkpoint(&folder)?, &only, &mut pace)
                })?;
                std::fs::remove_dir_all(&folder).map_err(|why| context("remove", &folder, why))?;
                // No blocks: nothing was written yet, or the log has failed.
                let (owner, blocks) = log_blocks.recv().unwrap_or_default();
                let read = scrub::read_log(&log, owner, &blocks, &mut pace)?;
                if let (Ok(found), Ok(())) = (found, read) {
                    tell.event(Event::Scrubbed { scrub, found });
                }
                Ok(())
            });
            Ok(())
        });
    }

    /// From now on idempotency records that are over are removed from the state. `limits`: the cluster's.
    pub fn remove_expired(&self, limits: Limits) {
        let (state, patience) = (self.state.clone(), self.patience.clone());
        let job = "reading what has expired";
        self.state_jobs.run(move || patience.run(job, || state.remove_expired(limits)));
    }

    /// Where copies that arrive are staged, for whoever receives them.
    pub fn staging(&self) -> Staging {
        self.staging.clone()
    }

    /// Bytes that were free on the file system when last looked at.
    pub fn free_bytes(&self) -> u64 {
        self.space.free()
    }

    /// Files that could be made on the file system when last looked at; `u64::MAX` where they are not counted.
    pub fn free_inodes(&self) -> u64 {
        self.space.inodes()
    }

    /// Etcd says now that this store is suspect: a later start need not find the damage again.
    pub fn suspicion_noted(&self) {
        let (mark, patience) = (self.damage_mark.clone(), self.patience.clone());
        let job = "removal of the damage mark";
        self.state_jobs.run(move || patience.run(job, || mark.remove()));
    }

    /// Etcd says that this store is not suspect.
    pub fn trusted(&self) {
        let (folder, patience) = (self.folder.clone(), self.patience.clone());
        let job = "removal of what was set aside";
        self.state_jobs
            .run(move || patience.run(job, || disk_open::forget_what_was_set_aside(&folder)));
    }

    /// Queues a change of the state that waits until everything written so far is durable.
    fn change_once_durable(
        &mut self,
        job: &'static str,
        done: Event,
        mut change: impl FnMut(&State) -> Result<(), DiskError> + Send + 'static,
    ) {
        let durable = self.durable_to_here();
        let (state, tell) = (self.state.clone(), self.tell.clone());
        let patience = self.patience.clone();
        self.state_jobs.run(move || {
            // No answer: the log has failed, or all of this ends.
            if durable.recv().is_err() {
                return Ok(());
            }
            patience.run(job, || change(&state))?;
            changed(&state, &tell, done);
            Ok(())
        });
    }

    /// Queues a change of the state; the event goes out with the view of after it.
    fn change(
        &self,
        job: &'static str,
        done: Event,
        mut change: impl FnMut(&State) -> Result<(), DiskError> + Send + 'static,
    ) {
        let (state, tell) = (self.state.clone(), self.tell.clone());
        let patience = self.patience.clone();
        self.state_jobs.run(move || {
            patience.run(job, || change(&state))?;
            changed(&state, &tell, done);
            Ok(())
        });
    }
}

fn changed(state: &State, tell: &Tell, done: Event) {
    kill::point("state.changed");
    tell.with_view(done, state.view());
}
