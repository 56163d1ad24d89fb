//! The thread that writes the log: one group after the other, each durable before the next begins.
//!
//! The engine's writer and its index live here, not on the loop, for two reasons. A group's header
//! says up to where the log was durable *when the group was written*, which only this thread knows.
//! And a reader is sent to bytes that have been written, since it is sent in turn.
//!
//! Reading and deleting of segments happens on a thread beside it, so that neither holds up an
//! fsync; in turn again, so that nobody reads what is being deleted. What is to be carried out of an old
//! segment is read there, too, and comes back as a job.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use engine::entry::Entry;
use engine::ids::ShardId;
use engine::node::Event;
use engine::store::log::Record;
use engine::store::log::catch_up::{Carry, Wanted};
use engine::store::log::group::Owner;
use engine::store::log::index::{Block, Needed};
use engine::store::log::scan::Place;
use engine::store::log::writer::{Resume, Writer};

use crate::disk::{DiskSettings, Tell};
use crate::error::DiskError;
use crate::kill;
use crate::log_files::{LogFolder, LogWriter};
use crate::space::Fullness;
use crate::workers::{Alarm, Workers, join, spawn};

pub(crate) enum LogJob {
    Group {
        number: u64,
        records: Vec<Record>,
    },
    Read {
        wanted: Vec<Wanted>,
        from: Place,
        bytes_max: usize,
    },
    Trim(Vec<Needed>),
    /// Entries of an old block, to go into the next group.
    Carry(Block, Vec<(ShardId, Entry)>),
    /// Whose log it is and which blocks of groups it has; no answer if nothing was written yet.
    Blocks(mpsc::Sender<(Owner, Vec<(Place, usize)>)>),
    /// All groups before it are durable: says so.
    Tell(mpsc::Sender<()>),
}

/// The loop's end of it.
pub(crate) struct LogThread {
    jobs: Option<Arc<mpsc::Sender<LogJob>>>,
    thread: Option<JoinHandle<()>>,
    seen: Arc<Seen>,
    folder: LogFolder,
}

/// What others may look at.
struct Seen {
    opened: Instant,
    /// When an fsync last came back, in microseconds since then.
    fsynced: AtomicU64,
    bytes: AtomicU64,
}

impl Seen {
    fn micros(&self) -> u64 {
        u64::try_from(self.opened.elapsed().as_micros()).unwrap_or(u64::MAX)
    }
}

impl LogThread {
    pub(crate) fn start(
        folder: LogFolder,
        resume: Resume,
        settings: &DiskSettings,
        tell: Tell,
        fullness: Arc<Fullness>,
        alarm: Alarm,
    ) -> Self {
        const NAME: &str = "dkc-log";
        let (jobs, queue) = mpsc::channel();
        let jobs = Arc::new(jobs);
        let bytes = AtomicU64::new(resume.index.bytes() as u64);
        let seen = Arc::new(Seen { opened: Instant::now(), fsynced: AtomicU64::new(0), bytes });
        let log = Log {
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
            beside: Workers::start("dkc-log-beside", 1, &alarm),
            tell,
            fullness,
            seen: seen.clone(),
        };
        let thread = spawn(NAME, move || alarm.guard(NAME, || log.run(&queue)));
        Self { jobs: Some(jobs), thread: Some(thread), seen, folder }
    }

    /// Queues a job. If the thread has failed, that has been told, and the process is about to end.
    pub(crate) fn run(&self, job: LogJob) {
        if let Some(jobs) = &self.jobs {
            let _ = jobs.send(job);
        }
    }

    pub(crate) fn fsync_age(&self) -> Duration {
        let last = self.seen.fsynced.load(Ordering::Relaxed);
        Duration::from_micros(self.seen.micros().saturating_sub(last))
    }

    pub(crate) fn folder(&self) -> &LogFolder {
        &self.folder
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.seen.bytes.load(Ordering::Relaxed)
    }
}

impl Drop for LogThread {
    fn drop(&mut self) {
        self.jobs = None;
        join(self.thread.take());
    }
}

struct Log {
    /// Made with the first group, which on a new disk says whose log it is.
    writer: Option<Writer>,
    resume: Option<Resume>,
    files: LogWriter,
    folder: LogFolder,
    segment_bytes: usize,
    keep_bytes: usize,
    bytes_max: usize,
    /// What is written again, block by block …
    carrying: VecDeque<Carry>,
    /// … the first of them in the group being gathered.
    is_carried: bool,
    /// This thread's own queue.
    jobs: Weak<mpsc::Sender<LogJob>>,
    beside: Workers,
    tell: Tell,
    fullness: Arc<Fullness>,
    seen: Arc<Seen>,
}

impl Log {
    /// Until nobody is left who could ask for anything.
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
                // Nobody waits any more if all of this ends.
                LogJob::Tell(waiting) => drop(waiting.send(())),
            }
        }
        Ok(())
    }

    fn group(&mut self, number: u64, records: Vec<Record>) -> Result<(), DiskError> {
        let writer = match &mut self.writer {
            Some(writer) => writer,
            None => {
                let resume = self.resume.take().expect("taken only here");
                self.writer.insert(Writer::new(resume.owned(&records), self.segment_bytes))
            }
        };
        for record in records {
            writer.write(record);
        }
        let output = writer.sync(number);
        let rolled = output.new_segment.is_some();
        self.files.write(&output)?;
        writer.durable(number);
        self.seen.fsynced.store(self.seen.micros(), Ordering::Relaxed);
        if rolled {
            self.measure();
        }
        kill::point("group.synced");
        self.tell.event(Event::Durable { group: number });
        if std::mem::take(&mut self.is_carried) {
            self.carrying.pop_front();
            self.read_what_is_carried();
        }
        Ok(())
    }

    fn read(&mut self, wanted: Vec<Wanted>, from: Place, bytes_max: usize) {
        let known = match (&self.writer, &self.resume) {
            (Some(writer), _) => Some((writer.owner(), writer.index())),
            (None, resume) => resume.as_ref().map(|resume| (resume.owner, &resume.index)),
        };
        let Some((owner, index)) = known else { return };
        let Some(read) = index.next_read(wanted, from) else { return };
        let (folder, tell) = (self.folder.clone(), self.tell.clone());
        self.beside.run(move || {
            let at = read.at();
            let bytes = match read.block {
                Some(block) => folder.read_at(block.segment, block.offset, block.len)?,
                None => None,
            };
            let parts = read.parts(owner, bytes.as_deref(), bytes_max)?;
            tell.event(Event::LogRead { at, parts });
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

    /// Has the next block of what is carried read, to be written with the group that follows.
    fn read_what_is_carried(&mut self) {
        let (Some(writer), Some(carry)) = (&self.writer, self.carrying.front()) else { return };
        let (owner, carry) = (writer.owner(), carry.clone());
        let (folder, jobs) = (self.folder.clone(), self.jobs.clone());
        self.beside.run(move || {
            let block = carry.block;
            let bytes = folder.read_at(block.segment, block.offset, block.len)?;
            let entries = match bytes {
                Some(bytes) => carry.entries(owner, &bytes)?,
                None => Vec::new(), // Its segment went after all.
            };
            // Nothing is carried any more if all of this ends.
            drop(jobs.upgrade().map(|jobs| jobs.send(LogJob::Carry(block, entries))));
            Ok(())
        });
    }

    fn measure(&self) {
        let index = self.writer.as_ref().map(|writer| writer.index());
        let bytes = index.map_or(0, |index| index.bytes());
        self.seen.bytes.store(bytes as u64, Ordering::Relaxed);
        self.fullness.log(index.is_some_and(|index| index.exceeds(self.bytes_max)));
    }
}
