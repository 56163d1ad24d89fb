//! From a folder to what the store holds: everything that happens before the first event.
//!
//! ```text
//!   lock ▶ state ▶ log, oldest segment first ▶ damage mark ▶ rewrite the last segment ▶ cut ▶ stale rows
//! ```
//!
//! The last segment is rewritten at every start, not only after a crash: the page cache may show
//! what the disk does not hold, and a failed fsync leaves no other trace. Only then may anything of
//! it be told to anyone.
//!
//! **The damage mark.** Cutting the end of a damaged log may cut away what proves the damage. So
//! the mark, a file that says what was found, is durable before anything is cut, and stays until
//! etcd says that the store is suspect. While it is there, every copy is suspect. A running process
//! that finds damage leaves it too: the next start need not come across the same place again, nor
//! etcd have been in reach.
//!
//! **A state that can't be read is set aside**, as a whole, and an empty one begins: its copies are
//! to be filled anew anyway, and RocksDB would stumble over the bad place again at every compaction.
//! Promises and copy numbers are in the log. What could be read of the old one is in
//! `state.damaged`, for people, until the store is no longer suspect at a start.

use std::collections::BTreeSet;
use std::fs::{self, File, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use engine::ids::ShardId;
use engine::node::RecoveredReplica;
use engine::store::log::group::{Owner, SEGMENT_HEADER_BYTES, SegmentHeader};
use engine::store::log::scan::{Clean, Scanned, Scanner};
use engine::store::log::writer::Resume;
use engine::store::recovery::{Plan, Recovery};

use crate::disk::DiskSettings;
use crate::error::{self, DiskError, context};
use crate::folders::{make_durably, sync as sync_folder};
use crate::kill;
use crate::log_files::LogFolder;
use crate::space::Space;
use crate::state::{State, StateSettings};

/// A folder that is ours, in order, and read.
pub(crate) struct Found {
    pub(crate) lock: File,
    pub(crate) log: LogFolder,
    pub(crate) state: State,
    pub(crate) recovered: Recovered,
    pub(crate) damage_mark: DamageMark,
    pub(crate) space: Space,
}

pub(crate) struct Recovered {
    pub(crate) replicas: Vec<RecoveredReplica>,
    pub(crate) resume: Resume,
    pub(crate) damage: Vec<String>,
    pub(crate) newer: BTreeSet<ShardId>,
}

pub(crate) fn open(settings: &DiskSettings) -> Result<Found, DiskError> {
    let folder = &settings.folder;
    make_durably(folder)?;
    let lock = lock(folder)?;
    let damage_mark = DamageMark::new(folder);
    let state = open_state(&folder.join("state"), settings.state, &damage_mark)?;
    let log = LogFolder::open(&folder.join("log"))?;
    // The names in it are as good as what they lead to.
    sync_folder(folder)?;
    let recovered = recover(&log, &state, &damage_mark, settings.block_bytes)?;
    Ok(Found { lock, log, state, recovered, damage_mark, space: Space::of(folder)? })
}

/// The folder is this process's alone, for as long as the file is open.
fn lock(folder: &Path) -> Result<File, DiskError> {
    let path = folder.join("lock");
    let open = File::options().create(true).truncate(false).write(true).open(&path);
    let file = open.map_err(|why| context("open", &path, why))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(DiskError::Locked(folder.to_owned())),
        Err(TryLockError::Error(why)) => Err(context("lock", &path, why)),
    }
}

/// The state, or an empty one in the place of what is known or found to be damaged.
fn open_state(path: &Path, settings: StateSettings, mark: &DamageMark) -> Result<State, DiskError> {
    if !mark.read()?.iter().any(|line| line.starts_with(error::STATE)) {
        let opened = State::open(path, settings);
        let read = opened.and_then(|state| state.view().shards().map(|_| state));
        match read {
            Err(why) if why.is_damage() => mark.add(&[why.to_string()])?,
            state => return state,
        }
    }
    let aside = set_aside_path(path);
    if aside.exists() {
        // A start ended between here and the removal of the mark. What is there now was never full.
        fs::remove_dir_all(path).map_err(|why| context("remove", path, why))?;
    } else if path.exists() {
        fs::rename(path, &aside).map_err(|why| context("set aside", path, why))?;
    }
    State::open(path, settings)
}

fn set_aside_path(state: &Path) -> PathBuf {
    state.with_extension("damaged")
}

/// The store's copies are good again: nobody needs what was set aside.
pub(crate) fn forget_what_was_set_aside(folder: &Path) -> Result<(), DiskError> {
    let aside = set_aside_path(&folder.join("state"));
    match fs::remove_dir_all(&aside) {
        Err(why) if why.kind() != io::ErrorKind::NotFound => Err(context("remove", &aside, why)),
        _ => Ok(()),
    }
}

/// Is the folder still the one whose lock is held? Not if its volume was unmounted, or another folder is in its place.
pub(crate) fn is_still_there(folder: &Path, lock: &File) -> bool {
    use std::os::unix::fs::MetadataExt;
    let same = |(there, held): (fs::Metadata, fs::Metadata)| {
        (there.dev(), there.ino()) == (held.dev(), held.ino())
    };
    match fs::metadata(folder.join("lock")) {
        Ok(there) => lock.metadata().is_ok_and(|held| same((there, held))),
        // A device that fails is still there.
        Err(error) => !matches!(
            error.kind(),
            io::ErrorKind::NotFound
                | io::ErrorKind::NotADirectory
                | io::ErrorKind::StaleNetworkFileHandle
        ),
    }
}

// ---- recovery ----------------------------------------------------------------------------------

fn recover(
    log: &LogFolder,
    state: &State,
    mark: &DamageMark,
    block_bytes: usize,
) -> Result<Recovered, DiskError> {
    let segments = log.segments()?;
    let (mut plan, scanned) = read(log, state, &segments, block_bytes)?;
    let mut damage = mark.read()?;
    if plan.is_damaged() {
        let found = findings(&plan);
        mark.add(&found)?;
        damage.extend(found);
    }
    if !damage.is_empty() {
        suspect_all(&mut plan);
    }
    if plan.identity.is_none() {
        if !plan.replicas.is_empty() || !damage.is_empty() {
            return Err(DiskError::Nameless(log.path().to_owned()));
        }
        // At most a first group that never became durable: nobody has heard of this store.
        delete(log, segments.iter().rev())?;
        let resume = Resume::empty(block_bytes);
        return Ok(Recovered { replicas: Vec::new(), resume, damage, newer: BTreeSet::new() });
    }
    let newer = plan.stopped();
    for shard in &newer {
        tracing::error!(%shard, "the log has a record of a newer build: this copy stops");
    }
    clean(log, &segments, &scanned)?;
    for slots in &plan.stale_rows {
        state.drop_rows(*slots)?;
        kill::point("open.dropped-stale");
    }
    Ok(Recovered { replicas: plan.replicas, resume: plan.resume, damage, newer })
}

/// Reads the state's shard records and the whole log, one segment in memory at a time.
fn read(
    log: &LogFolder,
    state: &State,
    segments: &[u64],
    block_bytes: usize,
) -> Result<(Plan, Scanned), DiskError> {
    let mut recovery = Recovery::new(state.view().shards()?).with_block_bytes(block_bytes);
    let mut scanner = Scanner::new(owner(log, segments)?);
    for &segment in segments {
        for group in scanner.segment(segment, &log.read(segment)?) {
            recovery.group(group);
        }
    }
    let scanned = scanner.finish();
    Ok((recovery.finish(scanned.clone()), scanned))
}

/// Whose log it is, by the first segment that says so.
fn owner(log: &LogFolder, segments: &[u64]) -> Result<Option<Owner>, DiskError> {
    for &segment in segments {
        let head = log.read_at(segment, 0, SEGMENT_HEADER_BYTES)?.unwrap_or_default();
        if let Ok(header) = SegmentHeader::decode(&Bytes::from(head)) {
            return Ok(Some(header.owner));
        }
    }
    Ok(None)
}

/// Leaves of the log exactly what was read as good, all of it on the disk.
fn clean(log: &LogFolder, segments: &[u64], scanned: &Scanned) -> Result<(), DiskError> {
    let mut needless = Vec::new();
    for &segment in segments.iter().filter(|&&one| scanned.end.is_none_or(|end| one >= end.segment))
    {
        match scanned.clean(segment, &log.read(segment)?) {
            Clean::Keep => {}
            Clean::Rewrite(bytes) => log.rewrite(segment, &bytes)?,
            Clean::Delete => needless.push(segment),
        }
    }
    kill::point("open.rewritten");
    delete(log, needless.iter().rev())?;
    kill::point("open.cleaned");
    Ok(())
}

fn delete<'a>(log: &LogFolder, segments: impl Iterator<Item = &'a u64>) -> Result<(), DiskError> {
    segments.into_iter().try_for_each(|&segment| log.delete(segment))
}

fn findings(plan: &Plan) -> Vec<String> {
    let damage = plan.damage.iter().map(|damage| {
        format!("segment {} at byte {}: {}", damage.segment, damage.offset, damage.why)
    });
    let unreadable = plan.unreadable.iter().map(|record| match record.shard {
        Some(shard) => format!("a record of shard {shard}: {}", record.why),
        None => format!("a record: {}", record.why),
    });
    damage.chain(unreadable).collect()
}

fn suspect_all(plan: &mut Plan) {
    for replica in &mut plan.replicas {
        if let Some(content) = &mut replica.content {
            content.suspect = true;
        }
    }
    for small in plan.resume.shards.values_mut() {
        small.suspect |= small.held.is_some();
    }
}

// ---- the damage mark ---------------------------------------------------------------------------

/// A file that says what was found to be damaged, line by line.
#[derive(Clone, Debug)]
pub(crate) struct DamageMark {
    folder: PathBuf,
}

impl DamageMark {
    fn new(folder: &Path) -> Self {
        Self { folder: folder.to_owned() }
    }

    fn path(&self) -> PathBuf {
        self.folder.join("damage")
    }

    fn read(&self) -> Result<Vec<String>, DiskError> {
        let path = self.path();
        match fs::read(&path) {
            Ok(bytes) => {
                let text = String::from_utf8_lossy(&bytes);
                let lines: Vec<_> = text.lines().map(str::to_owned).collect();
                // An empty mark is a mark.
                Ok(if lines.is_empty() { vec!["found earlier".to_owned()] } else { lines })
            }
            Err(none) if none.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(why) => Err(context("read", &path, why)),
        }
    }

    /// Adds what was found, durably.
    pub(crate) fn add(&self, found: &[String]) -> Result<(), DiskError> {
        let mut lines = self.read()?;
        lines.extend_from_slice(found);
        lines.sort();
        lines.dedup();
        let new = self.folder.join("damage.new");
        let write = || -> io::Result<()> {
            let mut file = File::create(&new)?;
            writeln!(file, "{}", lines.join("\n"))?;
            file.sync_all()?;
            fs::rename(&new, self.path())
        };
        write().map_err(|why| context("write", &new, why))?;
        sync_folder(&self.folder)
    }

    pub(crate) fn remove(&self) -> Result<(), DiskError> {
        let path = self.path();
        match fs::remove_file(&path) {
            // Not there: removed by an attempt whose fsync failed, perhaps.
            Err(why) if why.kind() != io::ErrorKind::NotFound => Err(context("remove", &path, why)),
            _ => sync_folder(&self.folder),
        }
    }
}
