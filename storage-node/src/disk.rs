//! The disk of one store, for the loop that owns the store's state machine.
//!
//! ```text
//!   loop ──write, sync──▶ log thread ── one write, one fdatasync per group ──▶ Durable
//!        ──read_log─────▶    └─▶ beside it: reads and deletes segments ──────▶ LogRead
//!        ──flush, drop_rows, install_snapshot, snapshot_reader─▶ state thread ▶ Ingested, …
//!        ──load─────────▶ readers ───────────────────────────────────────────▶ Loaded
//! ```
//!
//! Nothing here blocks except [`Disk::open`] and dropping the disk. Every request is answered by a
//! [`DiskEvent`], which the loop turns into the state machine's event by [`Disk::accept`] *right
//! before it handles that event*: this is the moment from which later loads see the change that the
//! event reports (see [`crate::state::StateView`]). There is no other way to get at the event, so
//! this step can't be forgotten.
//!
//! Any failure of any thread is reported once through `failed`; nothing can be relied upon after
//! it, and the process ends with [`DiskError::exit_code`].

use std::collections::BTreeSet;
use std::fs::File;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use engine::etcd_memory::EtcdMemory;
use engine::ids::{Conn, CopyNo, ShardId, Slots};
use engine::node::{Event, RecoveredReplica};
use engine::shard::apply::Needs;
use engine::shard::division::RowCounts;
use engine::shard::idempotency::TokenLimits;
use engine::shard::state::ShardState;
use engine::store::log::catch_up::WantedEntries;
use engine::store::log::index::Needed;
use engine::store::log::scan::LogLocation;
use engine::store::log::{Identity, LogRecord};
use engine::store::table::SealedTable;
use tokio::sync::oneshot;

use crate::disk_event::{DiskEvent, EventSink};
use crate::disk_open;
use crate::disk_settings::DiskSettings;
use crate::error::{DiskError, context};
use crate::kill;
use crate::log_thread::{LogJob, LogThread};
use crate::scrub::{self, ScrubPacer};
use crate::shortage_retry::ShortageRetry;
use crate::snapshot_files::{SnapshotReader, Staging};
use crate::space::{SpaceMin, SpaceWatch};
use crate::state::{StateStore, StateView, open_checkpoint};
use crate::workers::{DiskWorkers, FailureReporter};

/// The content of a disk, as recovery found it.
#[derive(Debug)]
pub struct DiskContents {
    /// The identity of this store; `None` on a new disk. Then a new identity must be made, written
    /// as the first record and synced, before anything else is written.
    pub identity: Option<Identity>,
    /// The store's memory of etcd.
    pub etcd: Option<Box<EtcdMemory>>,
    /// The replicas that the log and the state contain.
    pub replicas: Vec<RecoveredReplica>,
    /// The number of the first group. The identity of this boot goes into it, so the state machine
    /// begins with the group after it.
    pub next_group: u64,
    /// Descriptions of damage, for people; empty without damage. Otherwise the store must be
    /// recorded as suspect in etcd, and then [`Disk::suspicion_noted`] called.
    pub damage: Vec<String>,
    /// Shards with an intact record that this build can't decode, since a newer build wrote it.
    pub newer: BTreeSet<ShardId>,
    /// The size of the file system in bytes.
    pub capacity: u64,
}

impl DiskContents {
    /// Returns whether something durable could not be read, now or at an earlier start. A copy that
    /// is stopped by a newer build's record proves nothing about the others.
    pub fn is_suspect(&self) -> bool {
        let suspect = |replica: &RecoveredReplica| {
            let content = replica.content.as_ref();
            content.is_some_and(|content| content.suspect) && !self.newer.contains(&replica.shard)
        };
        !self.damage.is_empty() || self.replicas.iter().any(suspect)
    }
}

/// The disk of one store. Dropping it lets running jobs end and closes all files; queued requests
/// are dropped.
pub struct Disk {
    /// The records of the group being gathered.
    records: Vec<LogRecord>,
    /// The waiters for that group to be durable.
    waiting: Vec<mpsc::Sender<()>>,
    view: Arc<StateView>,
    /// The table of the flush in flight, and one that was flushed and is not freed yet.
    flushing: Option<Arc<SealedTable>>,
    flushed: Option<Arc<SealedTable>>,
    sink: EventSink,
    reporter: FailureReporter,
    retry: ShortageRetry,
    staging: Staging,
    damage_mark: disk_open::DamageMark,
    folder: PathBuf,
    /// Makes a running scrub give up.
    stopping: Arc<AtomicBool>,
    log: LogThread,
    state_jobs: DiskWorkers,
    scrubbers: Arc<DiskWorkers>,
    readers: DiskWorkers,
    space: SpaceWatch,
    state: Arc<StateStore>,
    /// The lock is held until all threads have ended.
    _lock: Arc<File>,
}

impl Drop for Disk {
    fn drop(&mut self) {
        self.stopping.store(true, Ordering::Release);
    }
}

impl Disk {
    /// Locks the folder for this process, recovers its content, and starts the threads.
    ///
    /// `events` is called from those threads and must not block. `failed` is called at most once.
    pub fn open(
        settings: DiskSettings,
        events: impl Fn(DiskEvent) + Send + Sync + 'static,
        failed: impl Fn(DiskError) + Send + Sync + 'static,
    ) -> Result<(Self, DiskContents), DiskError> {
        let found = disk_open::open(&settings)?;
        let sink = EventSink::new(events);
        let mark = found.damage_mark.clone();
        let lock = Arc::new(found.lock);
        let (folder, held) = (settings.folder.clone(), Arc::downgrade(&lock));
        let reporter = FailureReporter::new(move |error: DiskError| {
            // Missing files prove nothing about a disk that is not there.
            let is_away = |lock: Arc<File>| !disk_open::is_still_there(&folder, &lock);
            let error = match held.upgrade().is_some_and(is_away) {
                true => DiskError::Away(folder.clone(), error.to_string()),
                false => error,
            };
            if error.is_damage()
                && let Err(why) = mark.add(&[error.to_string()])
            {
                tracing::error!(%why, "could not write the damage mark for the next start");
            }
            failed(error);
        });
        let opened = DiskContents {
            identity: found.recovered.resume.identity.clone(),
            etcd: found.recovered.resume.etcd.clone(),
            replicas: found.recovered.replicas,
            next_group: found.recovered.resume.next_group.max(1),
            damage: found.recovered.damage,
            newer: found.recovered.newer,
            capacity: found.space.total,
        };
        let fullness = Arc::new(crate::space::Fullness::new(sink.clone()));
        let min = SpaceMin { bytes: settings.free_bytes_min, inodes: settings.free_inodes_min };
        let stopping: Arc<AtomicBool> = Arc::default();
        let retry =
            ShortageRetry::new(settings.folder.clone(), min, fullness.clone(), stopping.clone());
        let space = SpaceWatch::start(
            settings.folder.clone(),
            found.space,
            min,
            fullness.clone(),
            reporter.clone(),
        );
        let log = LogThread::start(
            found.log.with_retry(retry.clone()),
            found.recovered.resume,
            &settings,
            sink.clone(),
            fullness,
            reporter.clone(),
        );
        let state = Arc::new(found.state);
        let disk = Self {
            records: Vec::new(),
            waiting: Vec::new(),
            view: Arc::new(state.view()),
            flushing: None,
            flushed: None,
            sink,
            staging: Staging::new(state.clone(), reporter.clone()),
            damage_mark: found.damage_mark,
            folder: settings.folder,
            log,
            stopping,
            state_jobs: DiskWorkers::start_low_priority("dkc-state", 1, &reporter),
            scrubbers: Arc::new(DiskWorkers::start_low_priority("dkc-scrub", 1, &reporter)),
            readers: DiskWorkers::start("dkc-reader", settings.readers.max(1), &reporter),
            space,
            state,
            reporter,
            retry,
            _lock: lock,
        };
        Ok((disk, opened))
    }

    /// Opens an event of the disk. The loop calls this right before the state machine handles the
    /// event.
    pub fn accept(&mut self, event: DiskEvent) -> Event {
        if let Some(view) = event.view {
            self.view = Arc::new(view);
        }
        if matches!(event.event, Event::Ingested { .. }) {
            self.flushed = self.flushing.take();
        }
        event.event
    }

    /// Frees the table of a finished flush on a thread of readers: a million records take some
    /// dozens of milliseconds. Until then the table takes memory that the state machine no longer
    /// counts. The loop calls this after the state machine has handled the end of the flush.
    pub fn free_flushed_table(&mut self) {
        if let Some(table) = self.flushed.take() {
            self.readers.run(move || {
                drop(table);
                Ok(())
            });
        }
    }

    // ---- the log -------------------------------------------------------------------------------

    /// Adds a record to the group being gathered. The first one on a new disk is its identity.
    pub fn write(&mut self, record: LogRecord) {
        self.records.push(record);
    }

    /// Closes the records written since the last sync as group `group`: [`Event::Durable`] follows.
    pub fn sync(&mut self, group: u64) {
        let records = std::mem::take(&mut self.records);
        self.log.run(LogJob::Group { number: group, records });
        for waiting in self.waiting.drain(..) {
            self.log.run(LogJob::NotifyDurable(waiting));
        }
    }

    /// Returns a channel that is signalled once everything written so far is durable, and closed if
    /// that will never happen.
    fn durable_to_here(&mut self) -> mpsc::Receiver<()> {
        let (reached, answer) = mpsc::channel();
        match self.records.is_empty() {
            true => self.log.run(LogJob::NotifyDurable(reached)),
            false => self.waiting.push(reached),
        }
        answer
    }

    /// Reads one block's part of the wanted entries, as of the groups synced so far:
    /// [`Event::LogRead`] follows.
    pub fn read_log(&self, wanted: Vec<WantedEntries>, from: LogLocation, bytes_max: usize) {
        self.log.run(LogJob::Read { wanted, from, bytes_max });
    }

    /// Deletes the segments that are not needed any more.
    pub fn trim(&self, needed: Vec<Needed>) {
        self.log.run(LogJob::Trim(needed));
    }

    /// Returns the time since the last fsync of the log succeeded.
    pub fn fsync_age(&self) -> Duration {
        self.log.fsync_age()
    }

    /// Returns the bytes of the log in use.
    pub fn log_bytes(&self) -> u64 {
        self.log.bytes()
    }

    // ---- the state -----------------------------------------------------------------------------

    /// Loads values as of the last accepted event: [`Event::Loaded`] follows.
    pub fn load(&self, load: u64, needs: Needs) {
        let (view, sink) = (self.view.clone(), self.sink.clone());
        let retry = self.retry.clone();
        self.readers.run(move || {
            let (values, records) = retry.run("read of counters", || {
                Ok((view.values(&needs.counters)?, view.records(&needs.records)?))
            })?;
            drop(view);
            sink.send(Event::Loaded { load, values, records });
            Ok(())
        });
    }

    /// Counts all rows of a shard that is split, as of the last accepted event:
    /// [`Event::RowsCounted`] follows.
    pub fn count_rows(&self, count: u64, slots: Slots, at: u16) {
        let (view, sink) = (self.view.clone(), self.sink.clone());
        let retry = self.retry.clone();
        self.readers.run(move || {
            let counts = retry.run("count of a shard's rows", || {
                let mut counts = RowCounts::new(slots, at);
                view.rows(slots, |key, value| {
                    let counted = counts.row(key, value);
                    counted.map_err(|why| crate::state::row_error(key, why))?;
                    Ok(true)
                })?;
                Ok(counts)
            })?;
            drop(view);
            sink.send(Event::RowsCounted { count, counts: Box::new(counts) });
            Ok(())
        });
    }

    /// Writes a sealed table as sorted files: [`Event::FlushAdvanced`] and [`Event::Ingested`]
    /// follow.
    pub fn flush(
        &mut self,
        flush: u64,
        table: Arc<SealedTable>,
        shards: Vec<(CopyNo, ShardState)>,
    ) {
        self.flushing = Some(table.clone());
        let sink = self.sink.clone();
        self.change(None, "flush", Event::Ingested { flush }, move |state| {
            kill::point("flush.begun");
            let advanced = |counters| sink.send(Event::FlushAdvanced { flush, counters });
            state.flush(&table, &shards, advanced)
        });
    }

    /// Removes a shard's rows: [`Event::RowsDropped`] follows.
    ///
    /// The log first records, durably, that their copy is gone. Otherwise a crash between the two
    /// would look as if the state had lost a copy that the log still knows, and the store would be
    /// suspect for nothing.
    pub fn drop_rows(&mut self, shard: ShardId, slots: Slots) {
        let done = Event::RowsDropped { shard };
        let durable = Some(self.durable_to_here());
        self.change(durable, "removal of a copy's rows", done, move |state| {
            kill::point("drop.begun");
            state.drop_rows(slots)
        });
    }

    /// Installs a staged snapshot as the shard's copy: [`Event::SnapshotInstalled`] follows.
    ///
    /// The log first records, durably, what precedes the copy. Otherwise, after a crash between the
    /// two, it would know nothing of a copy that the state has, as if it had lost it, and the store
    /// would be suspect for nothing.
    pub fn install_snapshot(
        &mut self,
        (conn, transfer): (Conn, u64),
        copy: CopyNo,
        replaces: Slots,
        shard: Box<ShardState>,
    ) {
        let staging = self.staging.clone();
        let done = Event::SnapshotInstalled { conn, transfer };
        let mut staged = None;
        let durable = Some(self.durable_to_here());
        self.change(durable, "install of a snapshot", done, move |state| {
            kill::point("install.begun");
            let take =
                || staging.take(conn, transfer).expect("a snapshot is staged before its install");
            let files: &mut Vec<PathBuf> = staged.get_or_insert_with(take);
            state.install(files, copy, replaces, &shard)
        });
    }

    /// Removes a staged snapshot.
    pub fn discard_snapshot(&self, conn: Conn, transfer: u64) {
        let staging = self.staging.clone();
        self.state_jobs.run(move || staging.discard(conn, transfer));
    }

    /// Returns a reader of the shard as it is after all changes requested before. `None` if the
    /// state has no record of the shard; the channel is closed if the disk has failed.
    pub fn snapshot_reader(&self, slots: Slots) -> oneshot::Receiver<Option<SnapshotReader>> {
        let (send, reader) = oneshot::channel();
        let (state, reporter) = (self.state.clone(), self.reporter.clone());
        let retry = self.retry.clone();
        self.state_jobs.run(move || {
            let open = || SnapshotReader::open(state.view(), slots, reporter.clone());
            let reader = retry.run("begin of a snapshot", open)?;
            // The caller may have gone.
            let _ = send.send(reader);
            Ok(())
        });
        reader
    }

    /// Estimates the size of a shard's snapshot: [`Event::SnapshotMeasured`] follows.
    pub fn measure(&self, transfer: u64, slots: Slots) {
        let (state, sink) = (self.state.clone(), self.sink.clone());
        self.readers.run(move || {
            let bytes = state.view().size_of(slots);
            sink.send(Event::SnapshotMeasured { transfer, bytes });
            Ok(())
        });
    }

    /// Reads and checks the whole disk, or of the state only these shards: [`Event::Scrubbed`]
    /// follows, unless the process ends before.
    pub fn scrub(&self, scrub: u64, only: Vec<Slots>, bytes_per_s: u64) {
        let (blocks, log_blocks) = mpsc::channel();
        self.log.run(LogJob::Blocks(blocks));
        let (state, sink, log) = (self.state.clone(), self.sink.clone(), self.log.folder().clone());
        let (scrubbers, stopping) = (self.scrubbers.clone(), self.stopping.clone());
        let retry = self.retry.clone();
        self.state_jobs.run(move || {
            // A checkpoint that can't be made leaves nothing behind.
            let folder = retry.run("begin of a scrub", || {
                let folder = state.fresh_folder();
                state.checkpoint(&folder)?;
                Ok(folder)
            })?;
            scrubbers.run(move || {
                let mut pacer = ScrubPacer::new(bytes_per_s, stopping);
                let found = retry.run("scrub", || {
                    scrub::check_current(state.path())?;
                    scrub::read_state(&open_checkpoint(&folder)?, &only, &mut pacer)
                })?;
                std::fs::remove_dir_all(&folder).map_err(|why| context("remove", &folder, why))?;
                // There are no blocks if nothing was written yet, or if the log has failed.
                let (owner, blocks) = log_blocks.recv().unwrap_or_default();
                let read = scrub::read_log(&log, owner, &blocks, &mut pacer)?;
                if let (Ok(found), Ok(())) = (found, read) {
                    sink.send(Event::Scrubbed { scrub, found });
                }
                Ok(())
            });
            Ok(())
        });
    }

    /// Lets compactions remove expired idempotency records from now on. `limits` are the cluster's.
    pub fn remove_expired(&self, limits: TokenLimits) {
        let (state, retry) = (self.state.clone(), self.retry.clone());
        let job = "read of expired buckets";
        self.state_jobs.run(move || retry.run(job, || state.remove_expired(limits)));
    }

    /// Returns the place where incoming snapshots are staged.
    pub fn staging(&self) -> Staging {
        self.staging.clone()
    }

    /// Returns the free space of the file system.
    pub(crate) fn space(&self) -> &SpaceWatch {
        &self.space
    }

    /// Notes that etcd records this store as suspect: a later start need not find the damage again.
    pub fn suspicion_noted(&self) {
        let (mark, retry) = (self.damage_mark.clone(), self.retry.clone());
        let job = "removal of the damage mark";
        self.state_jobs.run(move || retry.run(job, || mark.remove()));
    }

    /// Notes that etcd does not record this store as suspect: a state that was set aside is
    /// removed.
    pub fn trusted(&self) {
        let (folder, retry) = (self.folder.clone(), self.retry.clone());
        let job = "removal of what was set aside";
        self.state_jobs.run(move || retry.run(job, || disk_open::remove_set_aside_state(&folder)));
    }

    /// Queues a change of the state, to be made once `durable` is signalled. The event is sent with
    /// the view of the state after it.
    fn change(
        &self,
        durable: Option<mpsc::Receiver<()>>,
        job: &'static str,
        done: Event,
        mut change: impl FnMut(&StateStore) -> Result<(), DiskError> + Send + 'static,
    ) {
        let (state, sink) = (self.state.clone(), self.sink.clone());
        let retry = self.retry.clone();
        self.state_jobs.run(move || {
            // The channel is closed if the log has failed or the disk is being dropped.
            if durable.is_some_and(|durable| durable.recv().is_err()) {
                return Ok(());
            }
            retry.run(job, || change(&state))?;
            kill::point("state.changed");
            sink.send_with_view(done, state.view());
            Ok(())
        });
    }
}
