//! Processes by number, without trusting the number.
//!
//! A pid is given to somebody else after its process is gone, so a process here is a pid *and* the
//! moment it started, and is looked up again before it is signalled. What is left is the time
//! between the look and the signal: no pid comes round again that fast.

use std::fs;
use std::io;

use rustix::process::{Pid, Signal, kill_process};

/// A process that was there when this was made.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Process {
    pub(crate) pid: u32,
    /// Clock ticks from boot to its start.
    pub(crate) started: u64,
}

impl Process {
    /// The process with this number, if it runs. One that ended and was not waited for doesn't.
    pub(crate) fn find(pid: u32) -> Option<Self> {
        let (process, runs) = Self::read(pid)?;
        runs.then_some(process)
    }

    /// A child of ours that was not waited for, whether it still runs or not: its number is its own
    /// until then.
    pub(crate) fn child(pid: u32) -> io::Result<Self> {
        let (process, _) = Self::read(pid).ok_or(io::ErrorKind::NotFound)?;
        Ok(process)
    }

    fn read(pid: u32) -> Option<(Self, bool)> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name between the parentheses may hold anything. Field 3, the state, comes after it,
        // and field 22 is the start.
        let (_, fields) = stat.rsplit_once(')')?;
        let mut fields = fields.split_ascii_whitespace();
        let state = fields.next()?;
        let started = fields.nth(18)?.parse().ok()?;
        Some((Self { pid, started }, !matches!(state, "Z" | "X")))
    }

    /// The process of exactly this command line, if there is one.
    pub(crate) fn with_argv(argv: &[String]) -> Option<Self> {
        let mut line = argv.join("\0").into_bytes();
        line.push(0);
        for entry in fs::read_dir("/proc").ok()?.flatten() {
            let pid = entry.file_name().to_str().and_then(|name| name.parse().ok());
            let Some(pid) = pid else { continue };
            if fs::read(entry.path().join("cmdline")).is_ok_and(|other| other == line) {
                return Self::find(pid);
            }
        }
        None
    }

    pub(crate) fn is_alive(self) -> bool {
        Self::find(self.pid) == Some(self)
    }

    /// Asks it to end, also when it was stopped.
    pub(crate) fn terminate(self) {
        self.signal(Signal::TERM);
        self.signal(Signal::CONT);
    }

    /// The same, and to be quick about it: after the second signal a gateway does not drain.
    pub(crate) fn terminate_at_once(self) {
        self.signal(Signal::INT);
        self.terminate();
    }

    pub(crate) fn kill(self) {
        self.signal(Signal::KILL);
    }

    fn signal(self, signal: Signal) {
        let pid = i32::try_from(self.pid).ok().and_then(Pid::from_raw);
        if let Some(pid) = pid.filter(|_| self.is_alive()) {
            // It may have ended since: then there is nobody to signal, which is what was wanted.
            let _ = kill_process(pid, signal);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    #[test]
    fn processes_are_found_and_ended() {
        let argv = ["sleep".to_owned(), format!("{}", 1_000_000 + std::process::id())];
        let mut child = Command::new(&argv[0]).arg(&argv[1]).stdin(Stdio::null()).spawn().unwrap();
        // Until exec the child still has our command line.
        let found = loop {
            if let Some(found) = Process::with_argv(&argv) {
                break found;
            }
            std::thread::yield_now();
        };
        assert_eq!(found.pid, child.id());
        assert!(found.is_alive());
        let namesake = Process { started: found.started + 1, ..found };
        assert!(!namesake.is_alive());
        namesake.kill();
        assert!(child.try_wait().unwrap().is_none(), "another process was killed in its place");
        found.terminate();
        // Ended, not waited for: still ours by number, but nobody to signal.
        while found.is_alive() {
            std::thread::yield_now();
        }
        assert_eq!(Process::child(found.pid).unwrap(), found);
        child.wait().unwrap();
        assert!(!found.is_alive());
    }
}
