//! The resident memory of processes, from `/proc/PID/status`.

use std::collections::BTreeMap;
use std::fs;

use crate::cpu::MeasuredProcess;

/// Returns the resident memory per role in bytes. The value of a role is `None` if one of its
/// processes is gone.
pub fn resident(processes: &[MeasuredProcess]) -> BTreeMap<String, Option<u64>> {
    let mut roles = BTreeMap::new();
    for process in processes {
        let status = fs::read_to_string(format!("/proc/{}/status", process.pid));
        let bytes = status.ok().and_then(|status| parse_status(&status));
        let sum = roles.entry(process.role.clone()).or_insert(Some(0));
        *sum = sum.zip(bytes).map(|(sum, bytes)| sum + bytes);
    }
    roles
}

fn parse_status(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kibibytes << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_files() {
        assert_eq!(parse_status("Name:\tdkc\nVmHWM:\t  9 kB\nVmRSS:\t  4 kB\n"), Some(4096));
        assert_eq!(parse_status("Name:\tkthreadd\n"), None);
    }

    #[test]
    fn a_role_with_a_dead_process_has_no_value() {
        let process =
            |role: &str, pid| MeasuredProcess { role: role.to_owned(), pid, metrics: None };
        let me = std::process::id();
        let roles = resident(&[process("a", me), process("a", u32::MAX), process("b", me)]);
        assert_eq!(roles["a"], None);
        assert!(roles["b"].is_some_and(|bytes| bytes > 0));
    }
}
