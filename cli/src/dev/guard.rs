//! `dkc guard`: ends a local cluster whose `dkc dev` died without ending it.
//!
//! `kill -9` of `dkc dev` would leave its processes running, holding ports and data. The usual
//! remedy, `PR_SET_PDEATHSIG`, needs unsafe code, can't be told to etcd, and would also end the
//! processes that a test started again. So a child does it: it reads lines from the supervisor,
//! each the whole list of processes as `PID:STARTED …`, and when the pipe closes it ends what the
//! last line names. An orderly stop sends an empty list first.

use std::io::{self, BufRead, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use super::process::Process;
use crate::exit::Exit;

/// How long processes get to end by themselves.
const PATIENCE: Duration = Duration::from_secs(8);

/// The supervisor's end.
pub(crate) struct Guard {
    child: Child,
    pipe: ChildStdin,
}

impl Guard {
    pub(crate) fn start() -> io::Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        // A group of its own: Ctrl-C is the supervisor's to handle.
        command.arg("guard").stdin(Stdio::piped()).stdout(Stdio::null()).process_group(0);
        let mut child = command.spawn()?;
        let pipe = child.stdin.take().expect("it was asked to be a pipe");
        Ok(Self { child, pipe })
    }

    /// Says which processes there are now.
    pub(crate) fn tell(&mut self, processes: &[Process]) -> io::Result<()> {
        let words: Vec<_> = processes
            .iter()
            .map(|process| format!("{}:{}", process.pid, process.started))
            .collect();
        writeln!(self.pipe, "{}", words.join(" "))
    }

    /// Nothing is left to guard.
    pub(crate) fn dismiss(mut self) -> io::Result<()> {
        self.tell(&[])?;
        drop(self.pipe);
        self.child.wait().map(drop)
    }
}

/// The guard's end.
pub(crate) fn run() -> anyhow::Result<Exit> {
    let mut last = String::new();
    for line in io::stdin().lock().lines() {
        last = line?;
    }
    end(&parse(&last));
    Ok(Exit::Done)
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
        // Half a line, from a supervisor that died in the middle.
        assert_eq!(parse("12:345 6"), [process(12, 345)]);
    }
}
