//! CPU seconds a process has spent, from `/proc/PID/stat`.
//!
//! The command's name in that file may hold spaces and parentheses, so fields are counted from its
//! last `)`. Ticks are hundredths of a second on every Linux that Rust supports (`USER_HZ`): take
//! the difference over seconds, not milliseconds.

use std::collections::BTreeMap;
use std::io;
use std::time::Duration;

const TICK: Duration = Duration::from_millis(10);

/// A process to watch, and under which name its cost is added up.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Watched {
    pub role: String,
    pub pid: u32,
}

/// What the watched processes had spent at one moment.
#[derive(Clone, Debug, Default)]
pub struct Sample {
    spent: Vec<Option<Duration>>,
}

impl Sample {
    /// A process that is gone has no figure.
    pub fn take(watched: &[Watched]) -> Self {
        Self { spent: watched.iter().map(|one| spent(one.pid).ok()).collect() }
    }

    /// CPU spent per role since `earlier`. A role of which a process is gone, or was not there
    /// before, is `None`: half a figure would read like a whole one.
    pub fn since(&self, earlier: &Self, watched: &[Watched]) -> BTreeMap<String, Option<Duration>> {
        let mut roles = BTreeMap::new();
        let pairs = self.spent.iter().zip(&earlier.spent);
        for (one, (now, then)) in watched.iter().zip(pairs) {
            let cost = now.zip(*then).and_then(|(now, then)| now.checked_sub(then));
            let sum = roles.entry(one.role.clone()).or_insert(Some(Duration::ZERO));
            *sum = sum.zip(cost).map(|(sum, cost)| sum + cost);
        }
        roles
    }
}

/// User and system time of all threads of a process, dead ones included.
pub fn spent(pid: u32) -> io::Result<Duration> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    parse_stat(&stat).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

fn parse_stat(stat: &str) -> Option<Duration> {
    let (_, fields) = stat.rsplit_once(')')?;
    // Field 3, the state, is the first here; utime is field 14 and stime field 15.
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
    fn a_role_with_a_dead_process_has_no_figure() {
        let watched = |role: &str| Watched { role: role.to_owned(), pid: 0 };
        let all = [watched("node"), watched("node"), watched("gateway")];
        let second = Duration::from_secs(1);
        let earlier = Sample { spent: vec![Some(second), Some(second), Some(second)] };
        let later = Sample { spent: vec![Some(second * 2), None, Some(second * 4)] };
        let want = BTreeMap::from([("node".into(), None), ("gateway".into(), Some(second * 3))]);
        assert_eq!(later.since(&earlier, &all), want);
    }

    #[test]
    fn this_process_has_one() {
        assert!(spent(std::process::id()).is_ok());
    }
}
