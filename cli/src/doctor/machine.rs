//! Checks of this machine: clock, limits, memory and processor.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use super::{CheckResult, CheckVerdict, bad, warn};
use crate::output::grouped;

/// The duration for which the clock is observed.
const WATCH: Duration = Duration::from_millis(300);
/// A larger deviation in that time is a step: NTP slews by at most 0.5 ms per second.
const STEP_MAX_S: f64 = 0.01;
/// A larger difference between two clocks is a jump, not the time between two readings.
const APART_MAX_S: f64 = 2.0;
/// 2025-01-01: an earlier time, before this software was written, means that the clock was never
/// set.
const SET_AFTER_S: f64 = 1_735_689_600.0;
/// The limit of open files below which a role may fail: a storage node opens at most 4,000 files, a
/// gateway one connection per client.
const FILES_MIN: u64 = 4_096;
/// The limit of open files below which a warning is given.
const FILES_GOOD: u64 = 16_384;

/// Checks the clock. Safety does not depend on clocks, but the times in the log do, and with them
/// the validity of idempotency tokens.
pub(super) async fn clock(data: &Path) -> CheckResult {
    let (wall, steady) = (SystemTime::now(), Instant::now());
    tokio::time::sleep(WATCH).await;
    let passed =
        wall.elapsed().map_or_else(|back| -back.duration().as_secs_f64(), |t| t.as_secs_f64());
    let step_s = passed - steady.elapsed().as_secs_f64();
    let now_s = unix(SystemTime::now());
    let first = |path: &str, key: &str| {
        let text = fs::read_to_string(path).ok()?;
        let line = text.lines().find_map(|line| line.strip_prefix(key))?.to_owned();
        line.split_whitespace().next()?.parse::<f64>().ok()
    };
    // /proc/uptime is CLOCK_BOOTTIME, which cannot be set.
    let boot_apart = first("/proc/stat", "btime ")
        .zip(first("/proc/uptime", ""))
        .map_or(0.0, |(booted, up)| now_s - up - booted);
    let ahead_s = newest(data).map_or(0.0, |newest| newest - now_s);
    let found = format!(
        "drift {:+.1} ms against the monotonic clock in {} ms, {boot_apart:+.1} s since boot",
        step_s * 1e3,
        WATCH.as_millis()
    );
    CheckResult::new("clock", found, judge_clock(now_s, step_s, boot_apart, ahead_s))
}

fn unix(time: SystemTime) -> f64 {
    time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

/// The time of the last write in the folder.
fn newest(folder: &Path) -> Option<f64> {
    let written = |entry: fs::DirEntry| Some(unix(entry.metadata().ok()?.modified().ok()?));
    let entries = fs::read_dir(folder).ok()?.flatten();
    entries.filter_map(written).max_by(f64::total_cmp)
}

fn judge_clock(
    now_s: f64,
    step_s: f64,
    boot_apart_s: f64,
    ahead_s: f64,
) -> Option<(CheckVerdict, String)> {
    if now_s < SET_AFTER_S {
        return bad("the clock was never set: run an NTP client (chrony, systemd-timesyncd)");
    }
    if step_s.abs() > STEP_MAX_S {
        return warn("the clock is set in steps: let an NTP client slew it instead");
    }
    if boot_apart_s.abs() > APART_MAX_S {
        return warn(
            "the clock has jumped since boot: run an NTP client, and check what else sets the \
             clock",
        );
    }
    if ahead_s > APART_MAX_S {
        return warn(format!(
            "files in the data directory are {ahead_s:.0} s in the future: the clock was set back \
             after they were written"
        ));
    }
    None
}

/// Checks the limit of open files.
pub(super) fn open_files() -> CheckResult {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    // Roles raise the soft limit to the hard limit when they start.
    let most = limit.maximum.unwrap_or(u64::MAX);
    let found = match limit.maximum {
        Some(most) => format!("limit of {}", grouped(most)),
        None => "no limit".to_owned(),
    };
    CheckResult::new("open files", found, judge_files(most))
}

fn judge_files(most: u64) -> Option<(CheckVerdict, String)> {
    let advice = "raise the limit (LimitNOFILE=65536 in a systemd unit, `ulimit -Hn`): a node \
                  opens thousands of files, a gateway one per connection";
    match most {
        _ if most < FILES_MIN => bad(advice),
        _ if most < FILES_GOOD => warn(advice),
        _ => None,
    }
}

/// Compares a storage node's memory budget with the memory of this machine or control group.
pub(super) fn memory(budget: u64) -> CheckResult {
    // The kernel's sysinfo is used if /proc is hidden.
    let machine = fs::read_to_string("/proc/meminfo").ok().and_then(|text| mem_total(&text));
    let machine = machine.unwrap_or_else(|| {
        let known = rustix::system::sysinfo();
        (known.totalram as u64).saturating_mul(known.mem_unit.into())
    });
    let mib = |bytes: u64| grouped(bytes >> 20);
    let (limit, whose) = match cgroup_limit() {
        Some(limit) if limit < machine => (limit, "this control group"),
        _ => (machine, "this machine"),
    };
    let found = format!("budget {} MiB, {whose} has {} MiB", mib(budget), mib(limit));
    CheckResult::new("memory", found, judge_memory(budget, limit))
}

/// The files that the other checks read; a role works without them.
const PROC: [&str; 4] = ["/proc/meminfo", "/proc/stat", "/proc/uptime", "/proc/self/cgroup"];

/// Checks that the files of [`PROC`] can be read.
pub(super) fn proc() -> CheckResult {
    let hidden = PROC.into_iter().filter(|path| fs::File::open(path).is_err());
    judge_proc(&hidden.collect::<Vec<_>>())
}

fn judge_proc(hidden: &[&str]) -> CheckResult {
    match hidden {
        [] => CheckResult::new("/proc", "readable".to_owned(), None),
        _ => CheckResult::new(
            "/proc",
            format!("{} cannot be read", hidden.join(", ")),
            warn(
                "hidden (ProcSubset=pid) or not mounted: roles work without it, but these checks \
                 do not see the memory limit of the control group and jumps of the clock",
            ),
        ),
    }
}

fn mem_total(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    Some(line.trim().strip_suffix(" kB")?.parse::<u64>().ok()? << 10)
}

/// The smallest memory limit of the control groups of this process.
fn cgroup_limit() -> Option<u64> {
    let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
    let mut limits = Vec::new();
    for (root, file, group) in groups.lines().filter_map(limit_file) {
        for folder in Path::new(group).ancestors() {
            let folder = folder.strip_prefix("/").unwrap_or(folder);
            let text = fs::read_to_string(Path::new(root).join(folder).join(file));
            // "max" is not a number and means no limit.
            limits.extend(text.ok().and_then(|text| text.trim().parse::<u64>().ok()));
        }
    }
    limits.into_iter().min()
}

/// Returns mount, file and group of the memory limit for a line of /proc/self/cgroup.
fn limit_file(line: &str) -> Option<(&'static str, &'static str, &str)> {
    let mut parts = line.splitn(3, ':').skip(1);
    let (controllers, group) = (parts.next()?, parts.next()?);
    match controllers {
        "" => Some(("/sys/fs/cgroup", "memory.max", group)),
        _ if controllers.split(',').any(|name| name == "memory") => {
            Some(("/sys/fs/cgroup/memory", "memory.limit_in_bytes", group))
        }
        _ => None,
    }
}

fn judge_memory(budget: u64, limit: u64) -> Option<(CheckVerdict, String)> {
    // A node stays within 1.1 times its budget.
    if budget.saturating_add(budget / 10) > limit {
        return bad(
            "the node would be killed for lack of memory: lower --memory-bytes, or add memory",
        );
    }
    if budget > limit / 4 * 3 {
        return warn("reads use the page cache, too: leave a quarter of the memory to it");
    }
    None
}

/// Checks the features of the processor.
pub(super) fn cpu() -> CheckResult {
    let features = features();
    let has =
        |wanted| features.iter().filter(move |(_, has)| *has == wanted).map(|(name, _)| *name);
    let listed = has(true).collect::<Vec<_>>().join(", ");
    let missing: Vec<_> = has(false).collect();
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let found = format!("{} with {cores} cores: {listed}", std::env::consts::ARCH);
    let judged = match missing.is_empty() {
        true => None,
        false => {
            warn(format!("without {}: checksums and hashes cost more CPU", missing.join(", ")))
        }
    };
    CheckResult::new("processor", found, judged)
}

/// The processor features that xxh3 (keys, chains, frames) and RocksDB's crc32c use.
#[cfg(target_arch = "x86_64")]
fn features() -> Vec<(&'static str, bool)> {
    vec![
        ("sse4.2", std::arch::is_x86_feature_detected!("sse4.2")),
        ("pclmulqdq", std::arch::is_x86_feature_detected!("pclmulqdq")),
        ("avx2", std::arch::is_x86_feature_detected!("avx2")),
    ]
}

#[cfg(target_arch = "aarch64")]
fn features() -> Vec<(&'static str, bool)> {
    vec![
        ("neon", std::arch::is_aarch64_feature_detected!("neon")),
        ("crc", std::arch::is_aarch64_feature_detected!("crc")),
    ]
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn features() -> Vec<(&'static str, bool)> {
    Vec::new()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn is(judged: Option<(CheckVerdict, String)>, want: Option<CheckVerdict>) {
        assert_eq!(judged.map(|(verdict, _)| verdict), want);
    }

    #[test]
    fn a_clock_is_judged_by_its_jumps() {
        let now = SET_AFTER_S + 1e6;
        is(judge_clock(now, 0.001, 0.3, -5.0), None);
        is(judge_clock(1e6, 0.0, 0.0, 0.0), Some(CheckVerdict::Bad));
        is(judge_clock(now, -0.5, 0.0, 0.0), Some(CheckVerdict::Warn));
        is(judge_clock(now, 0.0, -3_600.0, 0.0), Some(CheckVerdict::Warn));
        is(judge_clock(now, 0.0, 0.0, 60.0), Some(CheckVerdict::Warn));
    }

    #[test]
    fn limits_are_judged() {
        is(judge_files(1_024), Some(CheckVerdict::Bad));
        is(judge_files(10_000), Some(CheckVerdict::Warn));
        is(judge_files(65_536), None);
        is(judge_memory(512 << 20, 8 << 30), None);
        is(judge_memory(7 << 30, 8 << 30), Some(CheckVerdict::Warn));
        is(judge_memory(8 << 30, 8 << 30), Some(CheckVerdict::Bad));
    }

    #[test]
    fn hidden_files_of_proc_are_listed() {
        assert_eq!(judge_proc(&[]).verdict, CheckVerdict::Ok);
        let hidden = judge_proc(&["/proc/meminfo", "/proc/stat"]);
        assert_eq!(hidden.verdict, CheckVerdict::Warn);
        assert_eq!(hidden.found, "/proc/meminfo, /proc/stat cannot be read");
    }

    #[test]
    fn files_of_proc_are_parsed() {
        assert_eq!(mem_total("MemFree: 1 kB\nMemTotal:       2048 kB\n"), Some(2 << 20));
        let v2 = ("/sys/fs/cgroup", "memory.max", "/system.slice/dkc:1.service");
        assert_eq!(limit_file("0::/system.slice/dkc:1.service"), Some(v2));
        let v1 = ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "/a");
        assert_eq!(limit_file("4:cpu,memory:/a"), Some(v1));
        assert_eq!(limit_file("4:cpu:/a"), None);
    }
}
