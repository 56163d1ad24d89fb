//! `dkc guard`: stops the processes of a local cluster whose `dkc dev` died.
//!
//! `kill -9` of `dkc dev` would leave its processes running, holding ports and data. The usual
//! remedy, `PR_SET_PDEATHSIG`, needs unsafe code, cannot be set for etcd, and would also end
//! processes that a test started again. So a child process does it: it reads lines from the
//! supervisor, each the whole list of processes as `PID:STARTED …`, and when the pipe closes it
//! stops the processes of the last line. An orderly stop sends an empty list first.

use std::io::{self, BufRead, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use super::process::Process;
use crate::exit::CommandExit;

/// The time that processes get to stop before they are killed.
const PATIENCE: Duration = Duration::from_secs(8);

/// The supervisor's side of the guard.
pub(crate) struct ProcessGuard {
    child: Child,
    pipe: ChildStdin,
}

impl ProcessGuard {
    /// Starts the guard process.
    pub(crate) fn start() -> io::Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        // A process group of its own: only the supervisor handles Ctrl-C.
        command.arg("guard").stdin(Stdio::piped()).stdout(Stdio::null()).process_group(0);
        let mut child = command.spawn()?;
        let pipe = child.stdin.take().expect("it was asked to be a pipe");
        Ok(Self { child, pipe })
    }

    /// Sends the list of running processes.
    pub(crate) fn update(&mut self, processes: &[Process]) -> io::Result<()> {
        let words: Vec<_> = processes
            .iter()
            .map(|process| format!("{}:{}", process.pid, process.started))
            .collect();
        writeln!(self.pipe, "{}", words.join(" "))
    }

    /// Ends the guard; no process is left running.
    pub(crate) fn dismiss(mut self) -> io::Result<()> {
        self.update(&[])?;
        drop(self.pipe);
        self.child.wait().map(drop)
    }
}

/// The guard process.
pub(crate) fn run() -> anyhow::Result<CommandExit> {
    let mut last = String::new();
    for line in io::stdin().lock().lines() {
        last = line?;
    }
    end(&parse(&last));
    Ok(CommandExit::Done)
}

fn parse(line: &str) -> Vec<Process> {
    let one = |word: &str| {
        let (pid, started) = word.split_once(':')?;
        Some(Process { pid: pid.parse().ok()?, started: started.parse().ok()? })
    };
    line.split_whitespace().filter_map(one).collect()
}

fn end(processes: &[Process]) {
    processes.iter().for_each(|process| process.terminate());
    let begun = Instant::now();
    while begun.elapsed() < PATIENCE && processes.iter().any(|process| process.is_alive()) {
        std::thread::sleep(Duration::from_millis(20));
    }
    processes.iter().for_each(|process| process.kill());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists() {
        let process = |pid, started| Process { pid, started };
        assert_eq!(parse("12:345 6:7"), [process(12, 345), process(6, 7)]);
        assert_eq!(parse(""), []);
        // An incomplete line of a supervisor that died while writing.
        assert_eq!(parse("12:345 6"), [process(12, 345)]);
    }
}
