//! Clock, limits, memory and processor of this machine.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use super::{Finding, Verdict, bad, warn};
use crate::output::grouped;

/// How long the clock is watched.
const WATCH: Duration = Duration::from_millis(300);
/// Slewing is at most 0.5 ms a second; this is a step.
const STEP_MAX_S: f64 = 0.01;
/// Reading two clocks one after the other takes less.
const APART_MAX_S: f64 = 2.0;
/// 2025-01-01: a clock before this software was written was never set.
const SET_AFTER_S: f64 = 1_735_689_600.0;
/// A storage node holds 4,000 files at most, a gateway a connection per client.
const FILES_MIN: u64 = 4_096;
const FILES_GOOD: u64 = 16_384;

/// Safety needs no clock. But times in the log come from it, and with them how long an idempotency token counts.
pub(super) async fn clock(data: &Path) -> Finding {
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
    // /proc/uptime is CLOCK_BOOTTIME, which nobody can set.
    let boot_apart = first("/proc/stat", "btime ")
        .zip(first("/proc/uptime", ""))
        .map_or(0.0, |(booted, up)| now_s - up - booted);
    let ahead_s = newest(data).map_or(0.0, |newest| newest - now_s);
    let found = format!(
        "moved {:+.1} ms against the steady clock in {} ms, {boot_apart:+.1} s since boot",
        step_s * 1e3,
        WATCH.as_millis()
    );
    Finding::new("clock", found, judge_clock(now_s, step_s, boot_apart, ahead_s))
}

fn unix(time: SystemTime) -> f64 {
    time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

/// When something in the folder was last written.
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
) -> Option<(Verdict, String)> {
    if now_s < SET_AFTER_S {
        return bad("the clock was never set: run an NTP client (chrony, systemd-timesyncd)");
    }
    if step_s.abs() > STEP_MAX_S {
        return warn("something sets the clock in steps: let an NTP client slew it instead");
    }
    if boot_apart_s.abs() > APART_MAX_S {
        return warn(
            "the clock has jumped since this machine started: run an NTP client, and see who else sets it",
        );
    }
    if ahead_s > APART_MAX_S {
        return warn(format!(
            "files in the data folder are {ahead_s:.0} s in the future: the clock was set back since they were written"
        ));
    }
    None
}

pub(super) fn open_files() -> Finding {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    // Roles raise what is current to the maximum when they start.
    let most = limit.maximum.unwrap_or(u64::MAX);
    let found = match limit.maximum {
        Some(most) => format!("up to {} may be open", grouped(most)),
        None => "no limit".to_owned(),
    };
    Finding::new("open files", found, judge_files(most))
}

fn judge_files(most: u64) -> Option<(Verdict, String)> {
    let advice = "raise it (LimitNOFILE=65536 in a systemd unit, `ulimit -Hn`): a node has thousands of files, a gateway \
                  one per connection";
    match most {
        _ if most < FILES_MIN => bad(advice),
        _ if most < FILES_GOOD => warn(advice),
        _ => None,
    }
}

pub(super) fn memory(budget: u64) -> Finding {
    // Of the kernel itself where /proc is hidden.
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
    let found = format!("a budget of {} MiB, {whose} has {} MiB", mib(budget), mib(limit));
    Finding::new("memory", found, judge_memory(budget, limit))
}

/// What the other checks read, and a role does without.
const PROC: [&str; 4] = ["/proc/meminfo", "/proc/stat", "/proc/uptime", "/proc/self/cgroup"];

pub(super) fn proc() -> Finding {
    let hidden = PROC.into_iter().filter(|path| fs::File::open(path).is_err());
    judge_proc(&hidden.collect::<Vec<_>>())
}

fn judge_proc(hidden: &[&str]) -> Finding {
    match hidden {
        [] => Finding::new("/proc", "can be read".to_owned(), None),
        _ => Finding::new(
            "/proc",
            format!("{} can't be read", hidden.join(", ")),
            warn(
                "hidden (ProcSubset=pid) or not mounted: every role runs without it, but a memory limit of its control \
                 group and jumps of the clock are not seen by these checks",
            ),
        ),
    }
}

fn mem_total(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    Some(line.trim().strip_suffix(" kB")?.parse::<u64>().ok()? << 10)
}

/// The smallest limit of the control groups that this process is in.
fn cgroup_limit() -> Option<u64> {
    let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
    let mut limits = Vec::new();
    for (root, file, group) in groups.lines().filter_map(limit_file) {
        for folder in Path::new(group).ancestors() {
            let folder = folder.strip_prefix("/").unwrap_or(folder);
            let text = fs::read_to_string(Path::new(root).join(folder).join(file));
            // "max" is no number and no limit.
            limits.extend(text.ok().and_then(|text| text.trim().parse::<u64>().ok()));
        }
    }
    limits.into_iter().min()
}

/// Where the memory limit of a line of /proc/self/cgroup stands: mount, file, group.
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

fn judge_memory(budget: u64, limit: u64) -> Option<(Verdict, String)> {
    // A node stays within 1.1 times its budget.
    if budget.saturating_add(budget / 10) > limit {
        return bad("the node would be killed: lower --memory-bytes, or give it more memory");
    }
    if budget > limit / 4 * 3 {
        return warn(
            "reads are served from the page cache too: leave a quarter of the memory to it",
        );
    }
    None
}

pub(super) fn cpu() -> Finding {
    let features = features();
    let has =
        |wanted| features.iter().filter(move |(_, has)| *has == wanted).map(|(name, _)| *name);
    let listed = has(true).collect::<Vec<_>>().join(", ");
    let missing: Vec<_> = has(false).collect();
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let found = format!("{} with {cores} cores: {listed}", std::env::consts::ARCH);
    let judged = match missing.is_empty() {
        true => None,
        false => warn(format!("without {}: checksums and hashes cost more", missing.join(", "))),
    };
    Finding::new("processor", found, judged)
}

/// What xxh3 (keys, chains, frames) and RocksDB's crc32c use.
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
    fn is(judged: Option<(Verdict, String)>, want: Option<Verdict>) {
        assert_eq!(judged.map(|(verdict, _)| verdict), want);
    }

    #[test]
    fn a_clock_is_judged_by_its_jumps() {
        let now = SET_AFTER_S + 1e6;
        is(judge_clock(now, 0.001, 0.3, -5.0), None);
        is(judge_clock(1e6, 0.0, 0.0, 0.0), Some(Verdict::Bad));
        is(judge_clock(now, -0.5, 0.0, 0.0), Some(Verdict::Warn));
        is(judge_clock(now, 0.0, -3_600.0, 0.0), Some(Verdict::Warn));
        is(judge_clock(now, 0.0, 0.0, 60.0), Some(Verdict::Warn));
    }

    #[test]
    fn limits_are_judged() {
        is(judge_files(1_024), Some(Verdict::Bad));
        is(judge_files(10_000), Some(Verdict::Warn));
        is(judge_files(65_536), None);
        is(judge_memory(512 << 20, 8 << 30), None);
        is(judge_memory(7 << 30, 8 << 30), Some(Verdict::Warn));
        is(judge_memory(8 << 30, 8 << 30), Some(Verdict::Bad));
    }

    #[test]
    fn what_is_hidden_of_proc_is_named() {
        assert_eq!(judge_proc(&[]).verdict, Verdict::Ok);
        let hidden = judge_proc(&["/proc/meminfo", "/proc/stat"]);
        assert_eq!(hidden.verdict, Verdict::Warn);
        assert_eq!(hidden.found, "/proc/meminfo, /proc/stat can't be read");
    }

    #[test]
    fn the_kernel_is_read_rightly() {
        assert_eq!(mem_total("MemFree: 1 kB\nMemTotal:       2048 kB\n"), Some(2 << 20));
        let v2 = ("/sys/fs/cgroup", "memory.max", "/system.slice/dkc:1.service");
        assert_eq!(limit_file("0::/system.slice/dkc:1.service"), Some(v2));
        let v1 = ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "/a");
        assert_eq!(limit_file("4:cpu,memory:/a"), Some(v1));
        assert_eq!(limit_file("4:cpu:/a"), None);
    }
}
