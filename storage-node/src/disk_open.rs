//! Opening of a store's folder: everything that happens before the first event.
//!
//! ```text
//!   lock ▶ state ▶ log, oldest segment first ▶ damage mark
//!     ▶ rewrite the last segment ▶ cut ▶ drop stale rows
//! ```
//!
//! The last segment is rewritten at every start, not only after a crash: the page cache may show
//! data that the disk does not hold, and a failed fsync leaves no other trace. Only then may any of
//! it be reported to anyone.
//!
//! **The damage mark.** Cutting the end of a damaged log may cut away the proof of the damage. So
//! the mark, a file that lists the damage, is durable before anything is cut, and stays until etcd
//! records the store as suspect. While it exists, every copy is suspect. A running process that
//! finds damage writes it too: the next start need not come across the same place again, nor must
//! etcd have been in reach.
//!
//! **A state that can't be read is set aside**, as a whole, and an empty one begins: its copies
//! must be filled again anyway, and RocksDB would fail at the bad place again at every compaction.
//! Promises and copy numbers are in the log. The remains of the old state are in `state.damaged`,
//! for people, until the store is no longer suspect at a start.

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
use engine::store::recovery::{Recovery, RecoveryPlan};

use crate::disk_settings::DiskSettings;
use crate::error::{self, DiskError, context};
use crate::folders::{make_durably, sync as sync_folder};
use crate::kill;
use crate::log_files::LogFolder;
use crate::space::Space;
use crate::state::{StateSettings, StateStore};

/// The locked folder, opened and recovered.
pub(crate) struct OpenedFolder {
    pub(crate) lock: File,
    pub(crate) log: LogFolder,
    pub(crate) state: StateStore,
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

pub(crate) fn open(settings: &DiskSettings) -> Result<OpenedFolder, DiskError> {
    let folder = &settings.folder;
    make_durably(folder)?;
    let lock = lock(folder)?;
    let damage_mark = DamageMark::new(folder);
    let state = open_state(&folder.join("state"), settings.state, &damage_mark)?;
    let log = LogFolder::open(&folder.join("log"))?;
    // The folder's entries must be as durable as their content.
    sync_folder(folder)?;
    let recovered = recover(&log, &state, &damage_mark, settings.block_bytes)?;
    Ok(OpenedFolder { lock, log, state, recovered, damage_mark, space: Space::of(folder)? })
}

/// Locks the folder for this process, for as long as the file is open.
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

/// Opens the state, or an empty one in place of a damaged one.
fn open_state(
    path: &Path,
    settings: StateSettings,
    mark: &DamageMark,
) -> Result<StateStore, DiskError> {
    if !mark.read()?.iter().any(|line| line.starts_with(error::STATE)) {
        let opened = StateStore::open(path, settings);
        let read = opened.and_then(|state| state.view().shards().map(|_| state));
        match read {
            Err(why) if why.is_damage() => mark.add(&[why.to_string()])?,
            state => return state,
        }
    }
    let aside = set_aside_path(path);
    if aside.exists() {
        // A start ended between here and the removal of the mark. The present state was never
        // filled.
        fs::remove_dir_all(path).map_err(|why| context("remove", path, why))?;
    } else if path.exists() {
        fs::rename(path, &aside).map_err(|why| context("set aside", path, why))?;
    }
    StateStore::open(path, settings)
}

fn set_aside_path(state: &Path) -> PathBuf {
    state.with_extension("damaged")
}

/// Removes a state that was set aside, once the store's copies are intact again.
pub(crate) fn remove_set_aside_state(folder: &Path) -> Result<(), DiskError> {
    let aside = set_aside_path(&folder.join("state"));
    match fs::remove_dir_all(&aside) {
        Err(why) if why.kind() != io::ErrorKind::NotFound => Err(context("remove", &aside, why)),
        _ => Ok(()),
    }
}

/// Returns whether the folder is still the one whose lock is held. It is not if its volume was
/// unmounted, or if another folder is in its place.
pub(crate) fn is_still_there(folder: &Path, lock: &File) -> bool {
    use std::os::unix::fs::MetadataExt;
    let same = |(there, held): (fs::Metadata, fs::Metadata)| {
        (there.dev(), there.ino()) == (held.dev(), held.ino())
    };
    match fs::metadata(folder.join("lock")) {
        Ok(there) => lock.metadata().is_ok_and(|held| same((there, held))),
        // A failing device is still there.
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
    state: &StateStore,
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
        // The log has at most a first group that never became durable: the store was never
        // announced.
        delete(log, segments.iter().rev())?;
        let resume = Resume::empty(block_bytes);
        return Ok(Recovered { replicas: Vec::new(), resume, damage, newer: BTreeSet::new() });
    }
    let newer = plan.stopped();
    for shard in &newer {
        tracing::error!(%shard, "log record of a newer build, copy stopped");
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
    state: &StateStore,
    segments: &[u64],
    block_bytes: usize,
) -> Result<(RecoveryPlan, Scanned), DiskError> {
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

/// Returns the owner of the log, by the first segment with a readable header.
fn owner(log: &LogFolder, segments: &[u64]) -> Result<Option<Owner>, DiskError> {
    for &segment in segments {
        let head = log.read_at(segment, 0, SEGMENT_HEADER_BYTES)?.unwrap_or_default();
        if let Ok(header) = SegmentHeader::decode(&Bytes::from(head)) {
            return Ok(Some(header.owner));
        }
    }
    Ok(None)
}

/// Reduces the log to exactly the groups that were read as good, all of them on the disk.
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

fn findings(plan: &RecoveryPlan) -> Vec<String> {
    let damage = plan.damage.iter().map(|damage| {
        format!("segment {} at byte {}: {}", damage.segment, damage.offset, damage.why)
    });
    let unreadable = plan.unreadable.iter().map(|record| match record.shard {
        Some(shard) => format!("a record of shard {shard}: {}", record.why),
        None => format!("a record: {}", record.why),
    });
    damage.chain(unreadable).collect()
}

fn suspect_all(plan: &mut RecoveryPlan) {
    for replica in &mut plan.replicas {
        if let Some(content) = &mut replica.content {
            content.suspect = true;
        }
    }
    for checkpoint in plan.resume.shards.values_mut() {
        checkpoint.suspect |= checkpoint.extent.is_some();
    }
}

// ---- the damage mark ---------------------------------------------------------------------------

/// A file that lists the damage found, line by line.
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
                // An empty mark still marks damage.
                Ok(if lines.is_empty() { vec!["found earlier".to_owned()] } else { lines })
            }
            Err(none) if none.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(why) => Err(context("read", &path, why)),
        }
    }

    /// Adds findings, durably.
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
            // The file may have been removed by an earlier attempt whose fsync failed.
            Err(why) if why.kind() != io::ErrorKind::NotFound => Err(context("remove", &path, why)),
            _ => sync_folder(&self.folder),
        }
    }
}
