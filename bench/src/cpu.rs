//! The CPU time of processes, from `/proc/PID/stat`.
//!
//! The command's name in that file may contain spaces and parentheses, so fields are counted from
//! its last `)`. Ticks are hundredths of a second on every Linux that Rust supports (`USER_HZ`):
//! take the difference over seconds, not milliseconds.

use std::collections::BTreeMap;
use std::io;
use std::time::Duration;

const TICK: Duration = Duration::from_millis(10);

/// A process whose CPU time is measured.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct MeasuredProcess {
    /// The name under which CPU times are added up.
    pub role: String,
    /// The process id.
    pub pid: u32,
}

/// The CPU times of some processes at one moment.
#[derive(Clone, Debug, Default)]
pub struct Sample {
    spent: Vec<Option<Duration>>,
}

impl Sample {
    /// Reads the CPU times of these processes. A process that is gone has no value.
    pub fn take(processes: &[MeasuredProcess]) -> Self {
        Self { spent: processes.iter().map(|process| spent(process.pid).ok()).collect() }
    }

    /// Returns the CPU time per role since `earlier`, for the same processes in the same order. The
    /// value of a role is `None` if one of its processes is gone or is new, since a partial sum
    /// would look like a complete one.
    pub fn since(
        &self,
        earlier: &Self,
        processes: &[MeasuredProcess],
    ) -> BTreeMap<String, Option<Duration>> {
        let mut roles = BTreeMap::new();
        let pairs = self.spent.iter().zip(&earlier.spent);
        for (process, (now, then)) in processes.iter().zip(pairs) {
            let cost = now.zip(*then).and_then(|(now, then)| now.checked_sub(then));
            let sum = roles.entry(process.role.clone()).or_insert(Some(Duration::ZERO));
            *sum = sum.zip(cost).map(|(sum, cost)| sum + cost);
        }
        roles
    }
}

/// Returns the user and system time of all threads of a process, including those that have ended.
///
/// Fails if the process does not exist.
pub fn spent(pid: u32) -> io::Result<Duration> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    parse_stat(&stat).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

fn parse_stat(stat: &str) -> Option<Duration> {
    let (_, fields) = stat.rsplit_once(')')?;
    // The first field after the name is field 3, the state; utime is field 14, stime field 15.
    let mut fields = fields.split_ascii_whitespace().skip(11);
    let user: u32 = fields.next()?.parse().ok()?;
    let system: u32 = fields.next()?.parse().ok()?;
    Some(TICK * user + TICK * system)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(stat: &str, want: Option<u64>) {
        assert_eq!(parse_stat(stat), want.map(Duration::from_millis));
    }

    #[test]
    fn stat_lines() {
        check("1 (dkc) S 0 1 1 0 -1 4 5 6 7 8 100 23 0 0 20 0", Some(1230));
        check("1 (a) b) (c) S 0 1 1 0 -1 4 5 6 7 8 1 0 0 0 20 0", Some(10));
        check("1 (dkc) S 0 1", None);
        check("", None);
    }

    #[test]
    fn a_role_with_a_dead_process_has_no_value() {
        let process = |role: &str| MeasuredProcess { role: role.to_owned(), pid: 0 };
        let all = [process("node"), process("node"), process("gateway")];
        let second = Duration::from_secs(1);
        let earlier = Sample { spent: vec![Some(second), Some(second), Some(second)] };
        let later = Sample { spent: vec![Some(second * 2), None, Some(second * 4)] };
        let want = BTreeMap::from([("node".into(), None), ("gateway".into(), Some(second * 3))]);
        assert_eq!(later.since(&earlier, &all), want);
    }

    #[test]
    fn this_process_has_a_value() {
        assert!(spent(std::process::id()).is_ok());
    }
}
