//! How fast a disk makes things durable, and how much room it has.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::{Finding, Verdict, bad, warn};
use crate::output::grouped;

/// What a small group of a log looks like.
const APPEND_BYTES: usize = 512;
const APPENDS: usize = 200;
/// Every acknowledged increment waits for one of these; beyond it people notice.
const P99_GOOD: Duration = Duration::from_millis(20);
/// A node whose fsync takes 1 s is taken for dead.
const P99_MAX: Duration = Duration::from_millis(250);
/// No disk that keeps data without power is as fast as this.
const P50_MIN: Duration = Duration::from_micros(8);
const GIB: u64 = 1 << 30;
const TMPFS: i64 = 0x0102_1994;

pub(super) fn fsync(folder: &Path) -> Finding {
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
            Finding::new("fsync", found, judge_fsync(p50, p99, in_memory(&folder)))
        }
        Err(error) => {
            let what = format!("{}: {error}", folder.display());
            Finding::failed("fsync", &what, "name a folder that can be written to with --data")
        }
    }
}

/// The folder is made by a node's first start; until then, what it will lie in.
fn existing(folder: &Path) -> PathBuf {
    let there = folder.ancestors().find(|path| path.is_dir());
    there.unwrap_or(Path::new(".")).to_path_buf()
}

fn appends(folder: &Path) -> io::Result<Vec<Duration>> {
    let path = folder.join(format!(".dkc-doctor-{}", std::process::id()));
    let mut file = File::create_new(&path)?;
    // Whatever comes, the file goes; it is open still.
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

fn in_memory(folder: &Path) -> bool {
    rustix::fs::statfs(folder).is_ok_and(|found| found.f_type == TMPFS)
}

fn judge_fsync(p50: Duration, p99: Duration, in_memory: bool) -> Option<(Verdict, String)> {
    if in_memory {
        return bad(
            "this is memory (tmpfs): a power cut takes everything; choose a folder on a disk",
        );
    }
    if p99 > P99_MAX {
        return bad(
            "a node that does not fsync for 1 s is replaced: give it a disk of its own, an SSD with power-loss protection",
        );
    }
    if p99 > P99_GOOD {
        return warn(
            "every acknowledged increment waits for an fsync: a faster disk, or one that others use less",
        );
    }
    if p50 < P50_MIN {
        return warn(
            "too fast for a disk: see that its cache survives a power cut, or that fsync is not switched off",
        );
    }
    None
}

pub(super) fn headroom(folder: &Path) -> Finding {
    let folder = existing(folder);
    match rustix::fs::statvfs(&folder) {
        Ok(found) => {
            let bytes = |blocks: u64| blocks.saturating_mul(found.f_frsize);
            let (free, total) = (bytes(found.f_bavail), bytes(found.f_blocks));
            let mib = |bytes: u64| grouped(bytes >> 20);
            // Some file systems make inodes as they are needed, and count none.
            let inodes = (found.f_files > 0).then_some(found.f_favail);
            let files = inodes.map(|free| format!(", {} files can be made", grouped(free)));
            let found = format!(
                "{} MiB of {} MiB free{}",
                mib(free),
                mib(total),
                files.unwrap_or_default()
            );
            let judged = judge_inodes(inodes).or_else(|| judge_headroom(free, total));
            Finding::new("disk space", found, judged)
        }
        Err(error) => Finding::failed("disk space", &error, "name a folder with --data"),
    }
}

fn judge_inodes(free: Option<u64>) -> Option<(Verdict, String)> {
    match free? {
        // A node refuses writes below 64.
        0..128 => bad(
            "there are hardly any inodes left (df -i): remove small files, or make the file system with more",
        ),
        128..10_000 => warn("few inodes are left (df -i): a node has some thousands of files"),
        _ => None,
    }
}

fn judge_headroom(free: u64, total: u64) -> Option<(Verdict, String)> {
    // A node refuses writes when less is free than what it has begun may need.
    if free < GIB {
        return bad(
            "below about half a GiB a node refuses writes (no-space): make room, or a larger disk",
        );
    }
    // The log that is kept for replicas that lag, and copies that are made while old ones are still there.
    if free < 10 * GIB && free < total / 5 {
        return warn("plan 1 GiB of log and 20 bytes per counter, twice while a copy is made");
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_judged_by_its_fsync() {
        #[track_caller]
        fn check(p50_us: u64, p99_us: u64, in_memory: bool, want: Option<Verdict>) {
            let us = Duration::from_micros;
            let judged = judge_fsync(us(p50_us), us(p99_us), in_memory);
            assert_eq!(judged.map(|(verdict, _)| verdict), want);
        }
        check(150, 900, false, None);
        check(8_000, 21_000, false, Some(Verdict::Warn));
        check(8_000, 300_000, false, Some(Verdict::Bad));
        check(1, 900, false, Some(Verdict::Warn));
        check(150, 900, true, Some(Verdict::Bad));
    }

    #[test]
    fn a_disk_is_judged_by_its_inodes() {
        let verdict = |free| judge_inodes(free).map(|(verdict, _)| verdict);
        assert_eq!(verdict(None), None);
        assert_eq!(verdict(Some(100)), Some(Verdict::Bad));
        assert_eq!(verdict(Some(200)), Some(Verdict::Warn));
        assert_eq!(verdict(Some(1_000_000)), None);
    }

    #[test]
    fn a_disk_is_judged_by_its_room() {
        #[track_caller]
        fn check(free_gib: u64, total_gib: u64, want: Option<Verdict>) {
            let judged = judge_headroom(free_gib * GIB, total_gib * GIB);
            assert_eq!(judged.map(|(verdict, _)| verdict), want);
        }
        check(0, 100, Some(Verdict::Bad));
        check(5, 100, Some(Verdict::Warn));
        check(5, 10, None);
        check(50, 1_000, None);
    }

    #[test]
    fn a_folder_that_is_not_there_yet_is_tried_where_it_will_be() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        assert_eq!(existing(&folder.path().join("a/b")), folder.path());
        assert_eq!(appends(folder.path()).expect("it can be written to").len(), APPENDS);
        assert_eq!(fs::read_dir(folder.path()).expect("a folder").count(), 0);
    }
}
