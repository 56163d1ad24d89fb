//! Checks of a disk: the latency of fsync, and the free space.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::{CheckResult, CheckVerdict, bad, warn};
use crate::output::grouped;

/// The size of one append, that of a small group of a storage node's log.
const APPEND_BYTES: usize = 512;
/// The number of appends that are measured.
const APPENDS: usize = 200;
/// The p99 above which a warning is given: every acknowledged increment waits for an fsync.
const P99_GOOD: Duration = Duration::from_millis(20);
/// The p99 above which the disk is bad: a node whose fsync takes 1 s is considered dead.
const P99_MAX: Duration = Duration::from_millis(250);
/// The p50 below which the disk is suspicious: no disk that survives a power failure is that fast.
const P50_MIN: Duration = Duration::from_micros(8);
const GIB: u64 = 1 << 30;
/// The file system type of tmpfs, as statfs reports it.
const TMPFS: i64 = 0x0102_1994;

/// Measures appends with fdatasync in the folder.
pub(super) fn fsync(folder: &Path) -> CheckResult {
    let folder = existing(folder);
    match appends(&folder) {
        Ok(mut took) => {
            took.sort();
            let (p50, p99) = (took[APPENDS / 2], took[APPENDS * 99 / 100]);
            let ms = |time: Duration| time.as_secs_f64() * 1e3;
            let (p50_ms, p99_ms) = (ms(p50), ms(p99));
            let found = format!(
                "p50 {p50_ms:.2} ms, p99 {p99_ms:.2} ms of {APPENDS} appends with fdatasync in {}",
                folder.display()
            );
            CheckResult::new("fsync", found, judge_fsync(p50, p99, in_memory(&folder)))
        }
        Err(error) => {
            let what = format!("{}: {error}", folder.display());
            CheckResult::failed("fsync", &what, "set --data to a writable directory")
        }
    }
}

/// Returns the closest existing ancestor: a node creates its folder at its first start.
fn existing(folder: &Path) -> PathBuf {
    let there = folder.ancestors().find(|path| path.is_dir());
    there.unwrap_or(Path::new(".")).to_path_buf()
}

fn appends(folder: &Path) -> io::Result<Vec<Duration>> {
    let path = folder.join(format!(".dkc-doctor-{}", std::process::id()));
    let mut file = File::create_new(&path)?;
    // The file is removed at once and stays usable while it is open.
    fs::remove_file(&path)?;
    let bytes = [0x5a; APPEND_BYTES];
    (0..APPENDS)
        .map(|_| {
            let began = Instant::now();
            file.write_all(&bytes)?;
            file.sync_data()?;
            Ok(began.elapsed())
        })
        .collect()
}

/// Returns whether a folder is in memory, where fsync does nothing.
pub(crate) fn in_memory(folder: &Path) -> bool {
    rustix::fs::statfs(folder).is_ok_and(|found| found.f_type == TMPFS)
}

fn judge_fsync(p50: Duration, p99: Duration, in_memory: bool) -> Option<(CheckVerdict, String)> {
    if in_memory {
        return bad(
            "this is memory (tmpfs), which loses all data in a power failure: choose a directory \
             on a disk",
        );
    }
    if p99 > P99_MAX {
        return bad("a node whose fsync takes 1 s is replaced: use a dedicated disk, an SSD with \
             power-loss protection");
    }
    if p99 > P99_GOOD {
        return warn(
            "every acknowledged increment waits for an fsync: use a faster or less busy disk",
        );
    }
    if p50 < P50_MIN {
        return warn(
            "too fast for a disk: check that its cache survives a power failure and that fsync is \
             not disabled",
        );
    }
    None
}

/// Checks the free space and the free inodes of the folder's file system.
pub(super) fn headroom(folder: &Path) -> CheckResult {
    let folder = existing(folder);
    match rustix::fs::statvfs(&folder) {
        Ok(found) => {
            let bytes = |blocks: u64| blocks.saturating_mul(found.f_frsize);
            let (free, total) = (bytes(found.f_bavail), bytes(found.f_blocks));
            let mib = |bytes: u64| grouped(bytes >> 20);
            // Some file systems create inodes on demand and report none.
            let inodes = (found.f_files > 0).then_some(found.f_favail);
            let files = inodes.map(|free| format!("; {} free inodes", grouped(free)));
            let found = format!(
                "{} MiB of {} MiB free{}",
                mib(free),
                mib(total),
                files.unwrap_or_default()
            );
            let judged = judge_inodes(inodes).or_else(|| judge_headroom(free, total));
            CheckResult::new("disk space", found, judged)
        }
        Err(error) => CheckResult::failed("disk space", &error, "set --data to a directory"),
    }
}

fn judge_inodes(free: Option<u64>) -> Option<(CheckVerdict, String)> {
    match free? {
        // A node rejects writes below 64 free inodes.
        0..128 => {
            bad("almost no inodes are left (df -i): remove small files, or create the file system \
             with more inodes")
        }
        128..10_000 => warn("few inodes are left (df -i): a node has several thousand files"),
        _ => None,
    }
}

fn judge_headroom(free: u64, total: u64) -> Option<(CheckVerdict, String)> {
    // A node rejects writes when the free space might not suffice for the work it has begun.
    if free < GIB {
        return bad(
            "below about half a GiB a node rejects writes (no-space): free space, or use a larger \
             disk",
        );
    }
    // Space is needed for the log that is kept for lagging replicas, and for new copies that are
    // made while the old ones still exist.
    if free < 10 * GIB && free < total / 5 {
        return warn(
            "plan for 1 GiB of log and 20 bytes per counter, or 40 bytes while a copy is rebuilt",
        );
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_judged_by_its_fsync() {
        #[track_caller]
        fn check(p50_us: u64, p99_us: u64, in_memory: bool, want: Option<CheckVerdict>) {
            let us = Duration::from_micros;
            let judged = judge_fsync(us(p50_us), us(p99_us), in_memory);
            assert_eq!(judged.map(|(verdict, _)| verdict), want);
        }
        check(150, 900, false, None);
        check(8_000, 21_000, false, Some(CheckVerdict::Warn));
        check(8_000, 300_000, false, Some(CheckVerdict::Bad));
        check(1, 900, false, Some(CheckVerdict::Warn));
        check(150, 900, true, Some(CheckVerdict::Bad));
    }

    #[test]
    fn a_disk_is_judged_by_its_inodes() {
        let verdict = |free| judge_inodes(free).map(|(verdict, _)| verdict);
        assert_eq!(verdict(None), None);
        assert_eq!(verdict(Some(100)), Some(CheckVerdict::Bad));
        assert_eq!(verdict(Some(200)), Some(CheckVerdict::Warn));
        assert_eq!(verdict(Some(1_000_000)), None);
    }

    #[test]
    fn a_disk_is_judged_by_its_room() {
        #[track_caller]
        fn check(free_gib: u64, total_gib: u64, want: Option<CheckVerdict>) {
            let judged = judge_headroom(free_gib * GIB, total_gib * GIB);
            assert_eq!(judged.map(|(verdict, _)| verdict), want);
        }
        check(0, 100, Some(CheckVerdict::Bad));
        check(5, 100, Some(CheckVerdict::Warn));
        check(5, 10, None);
        check(50, 1_000, None);
    }

    #[test]
    fn a_missing_folder_is_checked_where_it_will_be() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        assert_eq!(existing(&folder.path().join("a/b")), folder.path());
        assert_eq!(appends(folder.path()).expect("it can be written to").len(), APPENDS);
        assert_eq!(fs::read_dir(folder.path()).expect("a folder").count(), 0);
    }
}
