//! The thread that writes the log: one group after the other, each durable before the next begins.
//!
//! The engine's writer and its index live here, not on the loop, for two reasons. A group's header
//! names the position up to which the log was durable *when the group was written*, which only this
//! thread knows. And requests to read are queued behind writes, so a reader only sees bytes that
//! have been written.
//!
//! A second thread beside it reads and deletes segments, so that neither delays an fsync. Its jobs
//! are queued too, so that no read sees a segment being deleted. Entries to be carried out of an
//! old segment are also read there, and come back as a job.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak, mpsc};
use std::time::{Duration, Instant};

use engine::entry::Entry;
use engine::ids::ShardId;
use engine::node::Event;
use engine::store::log::LogRecord;
use engine::store::log::block::Block;
use engine::store::log::catch_up::{Carry, WantedEntries};
use engine::store::log::group::Owner;
use engine::store::log::index::Needed;
use engine::store::log::scan::LogLocation;
use engine::store::log::writer::{LogEncoder, Resume};

use crate::disk_event::EventSink;
use crate::disk_settings::DiskSettings;
use crate::error::DiskError;
use crate::kill;
use crate::log_files::{LogFolder, LogWriter};
use crate::space::Fullness;
use crate::workers::{DiskWorkers, FailureReporter, JoinedThread, spawn};

pub(crate) enum LogJob {
    Group {
        number: u64,
        records: Vec<LogRecord>,
    },
    Read {
        wanted: Vec<WantedEntries>,
        from: LogLocation,
        bytes_max: usize,
    },
    Trim(Vec<Needed>),
    /// Entries of an old block, to be written with the next group.
    Carry(Block, Vec<(ShardId, Entry)>),
    /// Sends the owner of the log and its blocks of groups; nothing if nothing was written yet.
    Blocks(mpsc::Sender<(Owner, Vec<(LogLocation, usize)>)>),
    /// Signals that all groups before it are durable.
    NotifyDurable(mpsc::Sender<()>),
}

/// The loop's handle of the thread.
pub(crate) struct LogThread {
    jobs: Arc<mpsc::Sender<LogJob>>,
    _thread: JoinedThread,
    stats: Arc<LogStats>,
    folder: LogFolder,
}

/// The numbers that other threads may read.
struct LogStats {
    opened: Instant,
    /// The time of the last successful fsync, in microseconds since `opened`.
    fsynced: AtomicU64,
    bytes: AtomicU64,
}

impl LogStats {
    fn micros(&self) -> u64 {
        u64::try_from(self.opened.elapsed().as_micros()).unwrap_or(u64::MAX)
    }
}

impl LogThread {
    pub(crate) fn start(
        folder: LogFolder,
        resume: Resume,
        settings: &DiskSettings,
        sink: EventSink,
        fullness: Arc<Fullness>,
        reporter: FailureReporter,
    ) -> Self {
        const NAME: &str = "dkc-log";
        let (jobs, queue) = mpsc::channel();
        let jobs = Arc::new(jobs);
        let bytes = AtomicU64::new(resume.index.bytes() as u64);
        let stats =
            Arc::new(LogStats { opened: Instant::now(), fsynced: AtomicU64::new(0), bytes });
        let log = LogLoop {
            writer: None,
            resume: Some(resume),
            files: LogWriter::new(folder.clone(), settings.segment_bytes),
            folder: folder.clone(),
            segment_bytes: settings.segment_bytes,
            keep_bytes: settings.log_keep_bytes,
            bytes_max: settings.log_keep_bytes.saturating_add(settings.log_slack_bytes),
            carrying: VecDeque::new(),
            is_carried: false,
            jobs: Arc::downgrade(&jobs),
            beside: DiskWorkers::start("dkc-log-beside", 1, &reporter),
            sink,
            fullness,
            stats: stats.clone(),
        };
        let _thread = spawn(NAME, move || reporter.guard(NAME, || log.run(&queue)));
        Self { jobs, _thread, stats, folder }
    }

    /// Queues a job. If the thread has failed, that has been reported, and the process is about to
    /// end.
    pub(crate) fn run(&self, job: LogJob) {
        let _ = self.jobs.send(job);
    }

    pub(crate) fn fsync_age(&self) -> Duration {
        let last = self.stats.fsynced.load(Ordering::Relaxed);
        Duration::from_micros(self.stats.micros().saturating_sub(last))
    }

    pub(crate) fn folder(&self) -> &LogFolder {
        &self.folder
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.stats.bytes.load(Ordering::Relaxed)
    }
}

struct LogLoop {
    /// The writer, made with the first group, which on a new disk contains the owner of the log.
    writer: Option<LogEncoder>,
    resume: Option<Resume>,
    files: LogWriter,
    folder: LogFolder,
    segment_bytes: usize,
    keep_bytes: usize,
    bytes_max: usize,
    /// The blocks whose entries are written again …
    carrying: VecDeque<Carry>,
    /// … of which the first is in the group being gathered.
    is_carried: bool,
    /// This thread's own queue.
    jobs: Weak<mpsc::Sender<LogJob>>,
    beside: DiskWorkers,
    sink: EventSink,
    fullness: Arc<Fullness>,
    stats: Arc<LogStats>,
}

impl LogLoop {
    /// Runs until all handles are dropped.
    fn run(mut self, queue: &mpsc::Receiver<LogJob>) -> Result<(), DiskError> {
        for job in queue {
            match job {
                LogJob::Group { number, records } => self.group(number, records)?,
                LogJob::Read { wanted, from, bytes_max } => self.read(wanted, from, bytes_max),
                LogJob::Trim(needed) => self.trim(&needed),
                LogJob::Carry(block, entries) => {
                    if let Some(writer) = &mut self.writer {
                        writer.carry(block, entries);
                        self.is_carried = true;
                    }
                }
                LogJob::Blocks(asker) => {
                    if let Some(writer) = &self.writer {
                        drop(asker.send((writer.owner(), writer.index().blocks())));
                    }
                }
                // The waiter is gone if the disk is being dropped.
                LogJob::NotifyDurable(waiting) => drop(waiting.send(())),
            }
        }
        Ok(())
    }

    fn group(&mut self, number: u64, records: Vec<LogRecord>) -> Result<(), DiskError> {
        let writer = match &mut self.writer {
            Some(writer) => writer,
            None => {
                let resume = self.resume.take().expect("taken only here");
                self.writer.insert(LogEncoder::new(resume.owned(&records), self.segment_bytes))
            }
        };
        for record in records {
            writer.write(record);
        }
        let output = writer.sync(number);
        let rolled = output.new_segment.is_some();
        self.files.write(&output)?;
        writer.durable(number);
        self.stats.fsynced.store(self.stats.micros(), Ordering::Relaxed);
        if rolled {
            self.measure();
        }
        kill::point("group.synced");
        self.sink.send(Event::Durable { group: number });
        if std::mem::take(&mut self.is_carried) {
            self.carrying.pop_front();
            self.read_what_is_carried();
        }
        Ok(())
    }

    fn read(&mut self, wanted: Vec<WantedEntries>, from: LogLocation, bytes_max: usize) {
        let known = match (&self.writer, &self.resume) {
            (Some(writer), _) => Some((writer.owner(), writer.index())),
            (None, resume) => resume.as_ref().map(|resume| (resume.owner, &resume.index)),
        };
        let Some((owner, index)) = known else { return };
        let Some(read) = index.next_read(wanted, from) else { return };
        let (folder, sink) = (self.folder.clone(), self.sink.clone());
        self.beside.run(move || {
            let at = read.at();
            let bytes = match read.block {
                Some(block) => folder.read_at(block.segment, block.offset, block.len)?,
                None => None,
            };
            let parts = read.parts(owner, bytes.as_deref(), bytes_max)?;
            sink.send(Event::LogRead { at, parts });
            Ok(())
        });
    }

    fn trim(&mut self, needed: &[Needed]) {
        // Before its first group this process has applied nothing, so nothing more can go.
        let Some(writer) = &mut self.writer else { return };
        let durable = writer.synced_through();
        let segments = writer.index().trimmable(needed, self.keep_bytes, durable);
        for segment in segments {
            writer.index_mut().deleted(segment);
            let folder = self.folder.clone();
            self.beside.run(move || {
                kill::point("trim.begun");
                folder.delete(segment)?;
                kill::point("trim.deleted");
                Ok(())
            });
        }
        if self.carrying.is_empty() {
            self.carrying = writer.index().to_carry(needed, self.keep_bytes).into();
            self.read_what_is_carried();
        }
        self.measure();
    }

    /// Reads the next block to be carried, to be written with the group that follows.
    fn read_what_is_carried(&mut self) {
        let (Some(writer), Some(carry)) = (&self.writer, self.carrying.front()) else { return };
        let (owner, carry) = (writer.owner(), carry.clone());
        let (folder, jobs) = (self.folder.clone(), self.jobs.clone());
        self.beside.run(move || {
            let block = carry.block;
            let bytes = folder.read_at(block.segment, block.offset, block.len)?;
            let entries = match bytes {
                Some(bytes) => carry.entries(owner, &bytes)?,
                None => Vec::new(), // The segment was deleted after all.
            };
            // The queue is gone if the disk is being dropped.
            drop(jobs.upgrade().map(|jobs| jobs.send(LogJob::Carry(block, entries))));
            Ok(())
        });
    }

    fn measure(&self) {
        let index = self.writer.as_ref().map(|writer| writer.index());
        let bytes = index.map_or(0, |index| index.bytes());
        self.stats.bytes.store(bytes as u64, Ordering::Relaxed);
        self.fullness.log(index.is_some_and(|index| index.exceeds(self.bytes_max)));
    }
}
