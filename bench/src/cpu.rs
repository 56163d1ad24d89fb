//! The CPU time of processes and of their threads, from `/proc/PID/task/*/stat`.
//!
//! The name in such a file may contain spaces and parentheses, so fields are counted from its last
//! `)`. Ticks are hundredths of a second on every Linux that Rust supports (`USER_HZ`): take the
//! difference over seconds, not milliseconds.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io;
use std::time::Duration;

const TICK: Duration = Duration::from_millis(10);

/// A process that is measured.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct MeasuredProcess {
    /// The name under which figures are added up.
    pub role: String,
    /// The process id.
    pub pid: u32,
    /// The `host:port` that serves its metrics, if it has some.
    pub metrics: Option<String>,
}

/// The CPU times of some processes at one moment.
#[derive(Clone, Debug, Default)]
pub struct Sample {
    processes: Vec<Option<ProcessTimes>>,
}

#[derive(Clone, Debug, Default)]
struct ProcessTimes {
    /// The time of all threads, including those that have ended.
    all: Duration,
    threads: HashMap<u32, ThreadTime>,
}

#[derive(Clone, Debug, Eq, PartialEq)]
struct ThreadTime {
    group: String,
    spent: Duration,
}

/// The CPU time of a role.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct RoleTimes {
    /// The time of all threads, including those that have ended.
    pub all: Duration,
    /// The time by group of threads: their names without a number at the end.
    pub threads: BTreeMap<String, Duration>,
}

impl Sample {
    /// Reads the CPU times of these processes. A process that is gone has no value.
    pub fn take(processes: &[MeasuredProcess]) -> Self {
        Self { processes: processes.iter().map(|process| times(process.pid).ok()).collect() }
    }

    /// Returns the CPU time per role since `earlier`, for the same processes in the same order. The
    /// value of a role is `None` if one of its processes is gone or is new, since a partial sum
    /// would look like a complete one.
    pub fn since(
        &self,
        earlier: &Self,
        processes: &[MeasuredProcess],
    ) -> BTreeMap<String, Option<RoleTimes>> {
        let mut roles = BTreeMap::new();
        let pairs = self.processes.iter().zip(&earlier.processes);
        for (process, (now, then)) in processes.iter().zip(pairs) {
            let cost = now.as_ref().zip(then.as_ref()).and_then(|(now, then)| now.since(then));
            let sum = roles.entry(process.role.clone()).or_insert(Some(RoleTimes::default()));
            *sum = sum.take().zip(cost).map(|(sum, cost)| sum.plus(cost));
        }
        roles
    }
}

impl ProcessTimes {
    fn since(&self, earlier: &Self) -> Option<RoleTimes> {
        let mut threads = BTreeMap::new();
        for (tid, thread) in &self.threads {
            let before = earlier.threads.get(tid).filter(|before| before.group == thread.group);
            let before = before.map_or(Duration::ZERO, |before| before.spent);
            *threads.entry(thread.group.clone()).or_default() +=
                thread.spent.saturating_sub(before);
        }
        Some(RoleTimes { all: self.all.checked_sub(earlier.all)?, threads })
    }
}

impl RoleTimes {
    fn plus(mut self, other: Self) -> Self {
        self.all += other.all;
        for (group, spent) in other.threads {
            *self.threads.entry(group).or_default() += spent;
        }
        self
    }
}

/// Reads the CPU times of a process. Fails if the process does not exist.
fn times(pid: u32) -> io::Result<ProcessTimes> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let all = parse_stat(&stat).ok_or(io::ErrorKind::InvalidData)?.own;
    let mut threads = HashMap::new();
    for entry in fs::read_dir(format!("/proc/{pid}/task"))?.flatten() {
        let tid = entry.file_name().to_str().and_then(|name| name.parse().ok());
        // A thread may end while the list is read.
        let stat = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        if let Some((tid, fields)) = tid.zip(parse_stat(&stat)) {
            let group = group_of(fields.name);
            threads.insert(tid, ThreadTime { group, spent: fields.own });
        }
    }
    Ok(ProcessTimes { all, threads })
}

/// Returns the name of a thread without its number: `load-3` and `load-4` are `load`.
fn group_of(name: &str) -> String {
    let without = name.trim_end_matches(|letter: char| letter.is_ascii_digit());
    let group = if without == name { name } else { without.trim_end_matches(['-', '_', ':', '#']) };
    if group.is_empty() { name.to_owned() } else { group.to_owned() }
}

/// Returns the CPU time of a process, of its descendants that run, and of those that have ended and
/// were waited for. Fails if the process does not exist.
pub fn spent_by_tree(pid: u32) -> io::Result<Duration> {
    let of_process = |pid: u32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        parse_stat(&stat)
            .map(|stat| (stat.parent, stat.own + stat.waited_for))
            .ok_or(io::Error::from(io::ErrorKind::InvalidData))
    };
    let (_, mut spent) = of_process(pid)?;
    let pids = fs::read_dir("/proc")?.flatten().filter_map(|entry| {
        let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
        // A process may end while the list is read.
        Some((pid, of_process(pid).ok()?))
    });
    let processes: HashMap<u32, (u32, Duration)> = pids.collect();
    for (&descendant, &(_, its)) in &processes {
        let parent = |pid: &u32| processes.get(pid).map(|(parent, _)| *parent);
        // The process itself is no descendant.
        if std::iter::successors(parent(&descendant), parent).any(|ancestor| ancestor == pid) {
            spent += its;
        }
    }
    Ok(spent)
}

/// Returns the CPU time of the children that a process has waited for. Fails if the process does
/// not exist.
pub fn spent_by_waited_for(pid: u32) -> io::Result<Duration> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    Ok(parse_stat(&stat).ok_or(io::ErrorKind::InvalidData)?.waited_for)
}

/// The parts of a `stat` file that are of interest.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct StatFields<'a> {
    name: &'a str,
    parent: u32,
    /// The user and system time.
    own: Duration,
    /// The same of children that were waited for, and of theirs.
    waited_for: Duration,
}

fn parse_stat(stat: &str) -> Option<StatFields<'_>> {
    let (before, fields) = stat.rsplit_once(')')?;
    let (_, name) = before.split_once('(')?;
    // The first field after the name is field 3, the state; the parent is field 4, the times are
    // fields 14 to 17.
    let mut fields = fields.split_ascii_whitespace().skip(1);
    let parent = fields.next()?.parse().ok()?;
    let mut ticks = fields.skip(9).map(|field| field.parse::<u32>().ok());
    let mut two = || Some(TICK * ticks.next()?? + TICK * ticks.next()??);
    Some(StatFields { name, parent, own: two()?, waited_for: two()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(stat: &str, want: Option<(&str, u32, u64, u64)>) {
        let millis = Duration::from_millis;
        let want = want.map(|(name, parent, own, waited_for)| StatFields {
            name,
            parent,
            own: millis(own),
            waited_for: millis(waited_for),
        });
        assert_eq!(parse_stat(stat), want);
    }

    #[test]
    fn stat_lines() {
        check("1 (dkc) S 7 1 1 0 -1 4 5 6 7 8 100 23 1 2 20 0", Some(("dkc", 7, 1230, 30)));
        check("1 (a) b) (c) S 0 1 1 0 -1 4 5 6 7 8 1 0 0 0 20 0", Some(("a) b) (c", 0, 10, 0)));
        check("9 (rocksdb:low) S 0 1 1 0 -1 4 5 6 7 8 0 7 0 0", Some(("rocksdb:low", 0, 70, 0)));
        check("1 (dkc) S 0 1", None);
        check("", None);
    }

    #[test]
    fn children_count_while_they_run_and_after_they_were_waited_for() {
        let me = std::process::id();
        let before = spent_by_tree(me).unwrap();
        let mut child =
            std::process::Command::new("sh").args(["-c", "while :; do :; done"]).spawn().unwrap();
        let half = Duration::from_millis(50);
        while spent_by_tree(child.id()).unwrap() < half {
            std::thread::yield_now();
        }
        assert!(spent_by_tree(me).unwrap() >= before + half);
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(spent_by_waited_for(me).unwrap() >= half);
    }

    #[test]
    fn threads_are_grouped_by_name() {
        let groups = ["worker-12", "load-0", "dkc-loop", "rocksdb:low", "tokio-rt_3", "7"];
        let want = ["worker", "load", "dkc-loop", "rocksdb:low", "tokio-rt", "7"];
        assert_eq!(groups.map(group_of), want);
    }

    fn times_of(all: u64, threads: &[(u32, &str, u64)]) -> Option<ProcessTimes> {
        let second = Duration::from_secs;
        let threads = threads.iter().map(|&(tid, group, spent)| {
            (tid, ThreadTime { group: group.to_owned(), spent: second(spent) })
        });
        Some(ProcessTimes { all: second(all), threads: threads.collect() })
    }

    fn process(role: &str) -> MeasuredProcess {
        MeasuredProcess { role: role.to_owned(), pid: 0, metrics: None }
    }

    #[test]
    fn a_role_with_a_dead_process_has_no_value() {
        let all = [process("node"), process("node"), process("gateway")];
        let earlier =
            Sample { processes: vec![times_of(1, &[]), times_of(1, &[]), times_of(1, &[])] };
        let later = Sample { processes: vec![times_of(2, &[]), None, times_of(4, &[])] };
        let three = RoleTimes { all: Duration::from_secs(3), threads: BTreeMap::new() };
        let want = BTreeMap::from([("node".into(), None), ("gateway".into(), Some(three))]);
        assert_eq!(later.since(&earlier, &all), want);
    }

    #[test]
    fn groups_of_threads_are_added_up_over_the_processes_of_a_role() {
        let all = [process("node"), process("node")];
        let earlier = times_of(5, &[(1, "net", 1), (2, "net", 1), (3, "log", 3)]);
        // Thread 2 has ended, thread 4 is new, and the kernel gave the id 3 to another thread.
        let later = times_of(11, &[(1, "net", 4), (3, "net", 2), (4, "log", 1)]);
        let earlier = Sample { processes: vec![earlier, times_of(0, &[(9, "log", 0)])] };
        let later = Sample { processes: vec![later, times_of(1, &[(9, "log", 1)])] };
        let roles = later.since(&earlier, &all);
        let node = roles["node"].as_ref().unwrap();
        let seconds = |group: &str| node.threads[group].as_secs();
        assert_eq!((node.all.as_secs(), seconds("net"), seconds("log")), (7, 5, 2));
    }

    #[test]
    fn this_process_has_threads() {
        let times = times(std::process::id()).unwrap();
        assert!(!times.threads.is_empty());
    }
}
