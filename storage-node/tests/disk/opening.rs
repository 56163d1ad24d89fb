//! Starts: on nothing, on everything, on a torn tail, on damage, on a foreign folder.

use std::fs;
use std::path::Path;
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

use engine::entry::{Body, Entry, Position};
use engine::ids::{CopyNo, Epoch, ShardId, Slots, TimeMs};
use engine::node::Event;
use engine::store::log::LogRecord;
use storage_node::disk::{Disk, DiskContents};
use storage_node::disk_event::DiskEvent;
use storage_node::disk_settings::DiskSettings;
use storage_node::error::DiskError;

use crate::pair::{next_identity, settings, store_id};
use crate::torn;

pub(crate) const SHARD: ShardId = ShardId(0);
/// The time after which a locked folder is in use.
const LOCKED_FOR_MAX: Duration = Duration::from_secs(2);

/// A disk whose identity is written, and its events.
pub(crate) struct Bench {
    pub(crate) disk: Disk,
    pub(crate) opened: DiskContents,
    pub(crate) events: Receiver<Result<DiskEvent, DiskError>>,
    /// Each change of fullness that was reported.
    pub(crate) full: Vec<bool>,
    /// The progress that flushes have reported.
    pub(crate) advanced: Vec<usize>,
    next_group: u64,
    pub(crate) last: Position,
}

impl Bench {
    pub(crate) fn open(folder: &Path) -> Result<Self, DiskError> {
        Self::with(settings(folder))
    }

    pub(crate) fn with(settings: DiskSettings) -> Result<Self, DiskError> {
        let (sender, events) = mpsc::channel();
        let open = || {
            let (events, failures) = (sender.clone(), sender.clone());
            Disk::open(
                settings.clone(),
                move |event| drop(events.send(Ok(event))),
                move |error| drop(failures.send(Err(error))),
            )
        };
        // A child that the kill loop has just forked holds all locks of this process until it calls
        // exec.
        let began = Instant::now();
        let (disk, opened) = loop {
            match open() {
                Err(DiskError::Locked(_)) if began.elapsed() < LOCKED_FOR_MAX => {}
                other => break other?,
            }
            std::thread::yield_now();
        };
        let next_group = opened.next_group;
        let (full, advanced, last) = (Vec::new(), Vec::new(), Position::default());
        let mut bench = Self { disk, opened, events, full, advanced, next_group, last };
        let identity = next_identity(&bench.opened, store_id(0));
        bench.group(vec![LogRecord::Identity(identity)]);
        Ok(bench)
    }

    /// Returns the disk's next event, not accepted yet.
    pub(crate) fn next_unaccepted(&mut self) -> Result<DiskEvent, DiskError> {
        self.events.recv_timeout(Duration::from_secs(30)).expect("in time")
    }

    /// Returns the next event, accepted; changes of fullness and progress are noted.
    pub(crate) fn event(&mut self) -> Event {
        loop {
            let event = self.next_unaccepted().expect("no failure");
            match self.disk.accept(event) {
                Event::DiskFull(full) => self.full.push(full),
                Event::Room { .. } => {}
                Event::FlushAdvanced { counters, .. } => self.advanced.push(counters),
                event => return event,
            }
        }
    }

    /// Writes a group and waits until it is durable.
    pub(crate) fn group(&mut self, records: Vec<LogRecord>) {
        let group = self.next_group;
        self.next_group += 1;
        for record in records {
            self.disk.write(record);
        }
        self.disk.sync(group);
        assert!(matches!(self.event(), Event::Durable { group: durable } if durable == group));
    }

    /// Waits until the state's jobs are done: queued jobs are dropped with the disk.
    pub(crate) fn state_is_done(&self) {
        self.disk.snapshot_reader(Slots::ALL).blocking_recv().expect("no failure");
    }

    pub(crate) fn begin_copy(&mut self) {
        let base = Position::default();
        self.group(vec![
            LogRecord::Promise { shard: SHARD, epoch: Epoch(1) },
            LogRecord::Copy { shard: SHARD, slots: Slots::ALL, copy: CopyNo(1), base },
        ]);
    }

    /// Entries in a group each; `bytes` of each are padding.
    pub(crate) fn append(&mut self, count: u64, bytes: usize) {
        for _ in 0..count {
            let record = self.next_entry(bytes);
            self.group(vec![record]);
        }
    }

    pub(crate) fn next_entry(&mut self, bytes: usize) -> LogRecord {
        let body = match bytes {
            0 => Body::Barrier,
            _ => Body::Ops(engine::batch::Batch::seal(
                Slots::ALL,
                engine::ids::SessionId::default(),
                engine::ids::BatchSeq(1),
                engine::ids::BatchSeq(1),
                engine::batch::Codec::Raw,
                vec![7; bytes].into(),
            )),
        };
        let entry = Entry::after(self.last, Epoch(1), TimeMs(0), body);
        self.last = entry.position();
        LogRecord::Append { shard: SHARD, entry }
    }
}

/// Seqs of the entries found, and whether they are suspect.
fn found(opened: &DiskContents) -> (Vec<u64>, bool) {
    let [replica] = &opened.replicas[..] else { panic!("{opened:?}") };
    let content = replica.content.as_ref().expect("a copy");
    (content.entries.iter().map(|entry| entry.seq.0).collect(), content.suspect)
}

#[test]
fn a_new_folder_is_a_new_store() {
    let folder = tempfile::tempdir().unwrap();
    let bench = Bench::open(&folder.path().join("deep/below")).unwrap();
    assert!(bench.opened.identity.is_none());
    assert_eq!(bench.opened.next_group, 1);
    assert!(bench.opened.replicas.is_empty());
    assert!(!bench.opened.is_suspect());
}

#[test]
fn what_was_durable_is_there_again() {
    let folder = tempfile::tempdir().unwrap();
    let mut bench = Bench::open(folder.path()).unwrap();
    bench.begin_copy();
    // The entries fill several segments.
    bench.append(30, 2_000);
    drop(bench);
    assert!(torn::segments(folder.path()).len() > 3);
    let bench = Bench::open(folder.path()).unwrap();
    assert_eq!(found(&bench.opened), ((1..=30).collect(), false));
    assert_eq!(bench.opened.replicas[0].promised, Epoch(1));
    assert_eq!(bench.opened.identity.as_ref().map(|identity| identity.boot.0), Some(1));
}

/// A start that died before its first group was durable has announced no identity: the next one is
/// free to be another store.
#[test]
fn a_store_without_a_durable_identity_was_never_there() {
    let folder = tempfile::tempdir().unwrap();
    drop(Bench::open(folder.path()).unwrap());
    let [(_, segment)] = &torn::segments(folder.path())[..] else { panic!("one segment") };
    let mut bytes = fs::read(segment).unwrap();
    bytes[80..].fill(0);
    fs::write(segment, bytes).unwrap();
    let bench = Bench::open(folder.path()).unwrap();
    assert!(bench.opened.identity.is_none());
    assert_eq!(bench.opened.next_group, 1);
    drop(bench);
    let again = Bench::open(folder.path()).unwrap();
    assert_eq!(again.opened.identity.as_ref().map(|identity| identity.boot.0), Some(1));
}

#[test]
fn a_torn_tail_is_cut_and_what_is_before_it_stays() {
    let folder = tempfile::tempdir().unwrap();
    let mut bench = Bench::open(folder.path()).unwrap();
    bench.begin_copy();
    bench.append(5, 100);
    drop(bench);
    let end = torn::groups(folder.path()).pop().unwrap();
    let (_, segment) = torn::segments(folder.path()).pop().unwrap();
    let intact = fs::read(&segment).unwrap();
    for at in [end.offset, end.offset + 1, end.offset + 50, end.offset + end.len - 1] {
        let mut torn = intact.clone();
        torn[at..].fill(0);
        // Stale bytes follow, as a disk may show them.
        torn[end.offset + end.len + 10..][..20].fill(0xee);
        fs::write(&segment, &torn).unwrap();
        let bench = Bench::open(folder.path()).unwrap();
        // The last byte of the group may be a zero by itself.
        let (seqs, suspect) = found(&bench.opened);
        assert!(seqs == [1, 2, 3, 4] || seqs == [1, 2, 3, 4, 5], "cut at {at}: {seqs:?}");
        assert!(!suspect);
        drop(bench);
        // The start has made a segment of its own.
        let (_, own) = torn::segments(folder.path()).pop().unwrap();
        fs::remove_file(own).unwrap();
    }
}

#[test]
fn a_folder_in_use_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let bench = Bench::open(folder.path()).unwrap();
    let refused = Bench::open(folder.path()).err().expect("refused");
    assert!(matches!(refused, DiskError::Locked(_)), "{refused}");
    assert_eq!(refused.exit_code(), 4);
    drop(bench);
    Bench::open(folder.path()).unwrap();
}

#[test]
fn a_file_that_is_no_segment_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    drop(Bench::open(folder.path()).unwrap());
    fs::write(folder.path().join("log/notes.txt"), "mine").unwrap();
    let refused = Bench::open(folder.path()).err().expect("refused");
    assert!(matches!(refused, DiskError::Foreign(..)), "{refused}");
    assert_eq!(refused.exit_code(), 4);
}

/// A store with five entries, of which the bytes of one in the middle are changed.
fn damaged(folder: &Path) {
    let mut bench = Bench::open(folder).unwrap();
    bench.begin_copy();
    bench.append(5, 100);
    drop(bench);
    let groups = torn::groups(folder);
    let third = &groups[groups.len() - 3];
    flip(folder, third.segment, third.offset + third.len - 1);
}

fn flip(folder: &Path, segment: u64, at: usize) {
    let (_, path) = torn::segments(folder).into_iter().find(|(one, _)| *one == segment).unwrap();
    let mut bytes = fs::read(&path).unwrap();
    bytes[at] ^= 1;
    fs::write(path, bytes).unwrap();
}

#[test]
fn a_durable_group_that_is_bad_makes_the_store_suspect() {
    let folder = tempfile::tempdir().unwrap();
    damaged(folder.path());
    let bench = Bench::open(folder.path()).unwrap();
    assert_eq!(found(&bench.opened), (vec![1, 2], true));
    assert!(bench.opened.is_suspect());
    assert_eq!(bench.opened.damage.len(), 1, "{:?}", bench.opened.damage);
}

/// The proof of the damage may be cut, even by the very start that has found it. The mark remains
/// until etcd records the suspicion; and the copy stays suspect even then.
#[test]
fn suspicion_outlives_its_proof() {
    let folder = tempfile::tempdir().unwrap();
    damaged(folder.path());
    drop(Bench::open(folder.path()).unwrap());
    // The state is as after a power cut right after the cutting: nothing after the bad group is
    // left.
    let groups = torn::groups(folder.path());
    let bad_at = groups.windows(2).find(|two| two[1].number != two[0].number + 1).unwrap();
    let (segment, end) = (bad_at[0].segment, bad_at[0].offset + bad_at[0].len);
    for (number, path) in torn::segments(folder.path()) {
        if number > segment {
            fs::remove_file(path).unwrap();
        } else if number == segment {
            fs::write(&path, &fs::read(&path).unwrap()[..end]).unwrap();
        }
    }
    let bench = Bench::open(folder.path()).unwrap();
    assert!(found(&bench.opened).1);
    assert_eq!(bench.opened.damage.len(), 1, "{:?}", bench.opened.damage);
    bench.disk.suspicion_noted();
    bench.state_is_done();
    drop(bench);
    let bench = Bench::open(folder.path()).unwrap();
    assert!(bench.opened.damage.is_empty(), "{:?}", bench.opened.damage);
    assert!(bench.opened.is_suspect(), "the restatement says so");
}

#[test]
fn a_store_that_forgot_its_name_does_not_start() {
    let folder = tempfile::tempdir().unwrap();
    let mut bench = Bench::open(folder.path()).unwrap();
    bench.begin_copy();
    let state = engine::shard::state::ShardState { slots: Slots::ALL, ..Default::default() };
    bench.disk.flush(1, Default::default(), vec![(CopyNo(1), state)]);
    assert!(matches!(bench.event(), Event::Ingested { flush: 1 }));
    drop(bench);
    fs::remove_dir_all(folder.path().join("log")).unwrap();
    let refused = Bench::open(folder.path()).err().expect("refused");
    assert!(matches!(refused, DiskError::Nameless(_)), "{refused}");
    assert_eq!(refused.exit_code(), 5);
}

/// Makes a copy with rows in the state, and a log that no longer holds the entries that made them.
fn flushed(folder: &Path) {
    let mut bench = Bench::open(folder).unwrap();
    bench.begin_copy();
    bench.append(30, 2_000);
    let state = engine::shard::state::ShardState {
        slots: Slots::ALL,
        applied: bench.last,
        ..Default::default()
    };
    bench.disk.flush(1, Default::default(), vec![(CopyNo(1), state)]);
    assert!(matches!(bench.event(), Event::Ingested { flush: 1 }));
    let everything = engine::ids::Seq(30);
    let needed = engine::store::log::index::Needed {
        shard: SHARD,
        flushed: everything,
        applied: everything,
        members: everything,
    };
    bench.disk.trim(vec![needed]);
    // This read is queued behind the trimming.
    bench.disk.read_log(crate::running::wanted(30), Default::default(), 1);
    assert!(matches!(bench.event(), Event::LogRead { .. }));
}

/// Returns the state's file whose name has this beginning and end.
pub(crate) fn state_file(folder: &Path, begin: &str, end: &str) -> std::path::PathBuf {
    let files = fs::read_dir(folder.join("state")).unwrap().map(|file| file.unwrap().path());
    let named = |path: &std::path::PathBuf| {
        let name = path.file_name().unwrap().to_string_lossy();
        name.starts_with(begin) && name.ends_with(end)
    };
    files.filter(named).max().expect("such a file")
}

/// Such a start failed with exit code 5 for ever, and etcd did not learn that the store is suspect:
/// one byte in MANIFEST took a node away until its folder was emptied by hand. Now its copies are
/// suspect, with nothing in them that could be mistaken for the counters, and are filled again.
#[test]
fn a_state_that_can_not_be_read_is_set_aside() {
    #[track_caller]
    fn check(begin: &str, end: &str, spoil: impl Fn(&mut Vec<u8>)) {
        let folder = tempfile::tempdir().unwrap();
        flushed(folder.path());
        let path = state_file(folder.path(), begin, end);
        let mut bytes = fs::read(&path).unwrap();
        spoil(&mut bytes);
        fs::write(&path, bytes).unwrap();

        let aside = folder.path().join("state.damaged");
        for _ in 0..2 {
            let bench = Bench::open(folder.path()).unwrap();
            assert!(bench.opened.damage[0].starts_with("state: "), "{:?}", bench.opened.damage);
            let [replica] = &bench.opened.replicas[..] else { panic!("{:?}", bench.opened) };
            let content = replica.content.as_ref().expect("a copy");
            assert!(content.suspect);
            assert_eq!((replica.promised, replica.copy), (Epoch(1), CopyNo(1)));
            assert_eq!((content.state.applied, content.entries.len()), (Position::default(), 0));
            assert!(aside.exists());
        }
        let bench = Bench::open(folder.path()).unwrap();
        bench.disk.suspicion_noted();
        bench.state_is_done();
        drop(bench);
        let bench = Bench::open(folder.path()).unwrap();
        assert!(bench.opened.damage.is_empty());
        assert!(bench.opened.is_suspect(), "until the copy is another");
        assert!(aside.exists());
        bench.disk.trusted();
        bench.state_is_done();
        drop(bench);
        assert!(!aside.exists());
    }
    check("CURRENT", "", |bytes| *bytes = b"nonsense".to_vec());
    check("CURRENT", "", |bytes| bytes[10] ^= 1);
    check("MANIFEST", "", |bytes| bytes[10] ^= 1);
    check("", ".sst", |bytes| {
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
    });
    check("", ".sst", |bytes| bytes[20] ^= 1);
}

/// RocksDB's diagnostics alone read these files: their content does not matter.
#[test]
fn files_that_the_state_does_not_need_may_contain_anything() {
    let folder = tempfile::tempdir().unwrap();
    flushed(folder.path());
    for begin in ["OPTIONS", "IDENTITY"] {
        fs::write(state_file(folder.path(), begin, ""), "nonsense").unwrap();
    }
    let bench = Bench::open(folder.path()).unwrap();
    assert!(!bench.opened.is_suspect());
    assert_eq!(bench.opened.replicas[0].content.as_ref().unwrap().state.applied.seq.0, 30);
}

#[test]
fn unused_files_go_at_a_start() {
    let folder = tempfile::tempdir().unwrap();
    drop(Bench::open(folder.path()).unwrap());
    let stray = [folder.path().join("state.files/7.sst"), folder.path().join("log/spare-1.new")];
    for path in &stray {
        fs::write(path, "never used").unwrap();
    }
    let bench = Bench::open(folder.path()).unwrap();
    assert!(!stray[0].exists());
    drop(bench);
    let left = fs::read(&stray[1]).unwrap_or_default();
    assert_ne!(left, b"never used");
}
