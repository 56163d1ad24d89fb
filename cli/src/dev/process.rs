//! Processes, identified by pid and start time.
//!
//! The kernel reuses the pid of a process that is gone, so a process here is a pid *and* its start
//! time, which is checked before each signal. A race remains between the check and the signal, but
//! no pid is reused that fast.

use std::fs;
use std::io;

use rustix::process::{Pid, Signal, kill_process};

/// A process that existed when this value was created.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Process {
    pub(crate) pid: u32,
    /// The start time in clock ticks since boot.
    pub(crate) started: u64,
}

impl Process {
    /// Returns the process with this pid, if it runs. A zombie does not run.
    pub(crate) fn find(pid: u32) -> Option<Self> {
        let (process, runs) = Self::read(pid)?;
        runs.then_some(process)
    }

    /// Returns a child of this process that was not waited for, whether it still runs or not: its
    /// pid is not reused until then.
    pub(crate) fn child(pid: u32) -> io::Result<Self> {
        let (process, _) = Self::read(pid).ok_or(io::ErrorKind::NotFound)?;
        Ok(process)
    }

    fn read(pid: u32) -> Option<(Self, bool)> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name in parentheses may contain any character. Field 3, the state, comes after it,
        // field 20 is the number of threads, and field 22 the start. The first thread of a killed
        // process may be a zombie while others still have its ports open.
        let (_, fields) = stat.rsplit_once(')')?;
        let mut fields = fields.split_ascii_whitespace();
        let state = fields.next()?;
        let threads: u32 = fields.nth(16)?.parse().ok()?;
        let started = fields.nth(1)?.parse().ok()?;
        Some((Self { pid, started }, threads > 1 || !matches!(state, "Z" | "X")))
    }

    /// Returns the process with exactly this command line, if there is one.
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

    /// Returns whether the process still runs.
    pub(crate) fn is_alive(self) -> bool {
        Self::find(self.pid) == Some(self)
    }

    /// Sends SIGTERM, and SIGCONT in case the process is stopped.
    pub(crate) fn terminate(self) {
        self.signal(Signal::TERM);
        self.signal(Signal::CONT);
    }

    /// Terminates the process without a graceful shutdown: after a second signal a gateway does not
    /// drain.
    pub(crate) fn terminate_at_once(self) {
        self.signal(Signal::INT);
        self.terminate();
    }

    /// Sends SIGKILL.
    pub(crate) fn kill(self) {
        self.signal(Signal::KILL);
    }

    fn signal(self, signal: Signal) {
        let pid = i32::try_from(self.pid).ok().and_then(Pid::from_raw);
        if let Some(pid) = pid.filter(|_| self.is_alive()) {
            // An error means that the process has ended since, which is the goal.
            let _ = kill_process(pid, signal);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    /// Only the first thread ends; the other one sleeps on.
    #[test]
    #[cfg(target_arch = "x86_64")]
    fn a_process_runs_as_long_as_one_of_its_threads() {
        let code = "import ctypes, threading, time\n\
                    threading.Thread(target=time.sleep, args=(60,)).start()\n\
                    ctypes.CDLL(None).syscall(60, 0)";
        let mut child = Command::new("python3").args(["-c", code]).spawn().unwrap();
        let stat = || fs::read_to_string(format!("/proc/{}/stat", child.id())).unwrap();
        while !stat().contains(") Z") {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        let process = Process::find(child.id());
        process.unwrap().kill();
        child.wait().unwrap();
        assert!(!process.unwrap().is_alive());
    }

    #[test]
    fn processes_are_found_and_ended() {
        let argv = ["sleep".to_owned(), format!("{}", 1_000_000 + std::process::id())];
        let mut child = Command::new(&argv[0]).arg(&argv[1]).stdin(Stdio::null()).spawn().unwrap();
        // Until exec the child still has the parent's command line.
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
        // The child is a zombie: its pid is not reused, but it cannot be signalled.
        while found.is_alive() {
            std::thread::yield_now();
        }
        assert_eq!(Process::child(found.pid).unwrap(), found);
        child.wait().unwrap();
        assert!(!found.is_alive());
    }
}
