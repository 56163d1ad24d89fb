//! The processes that a profile starts. None outlives the command, not even after `kill -9`.

use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context;

use crate::dev::guard::ProcessGuard;
use crate::dev::process::Process;

/// The time that a process gets to stop before it is killed.
const PATIENCE: Duration = Duration::from_secs(20);
const POLL: Duration = Duration::from_millis(20);

/// Processes that end with this value.
pub(crate) struct Children {
    guard: ProcessGuard,
    running: Vec<(Child, Process)>,
}

impl Children {
    /// Returns an empty set.
    pub(crate) fn new() -> anyhow::Result<Self> {
        Ok(Self { guard: ProcessGuard::start().context("the guard")?, running: Vec::new() })
    }

    /// Starts a process in a process group of its own, and returns its pid.
    pub(crate) fn start(&mut self, command: &mut Command) -> anyhow::Result<u32> {
        command.stdin(Stdio::null()).process_group(0);
        let program = command.get_program().to_string_lossy().into_owned();
        let child = command.spawn().with_context(|| format!("starting {program}"))?;
        let pid = child.id();
        self.running.push((child, Process::child(pid)?));
        self.update_guard()?;
        Ok(pid)
    }

    /// Starts a process and waits for its first line on stdout. Fails if it ends before that.
    pub(crate) fn start_until_line(
        &mut self,
        command: &mut Command,
    ) -> anyhow::Result<(u32, String)> {
        let pid = self.start(command.stdout(Stdio::piped()))?;
        let child = self.running.last_mut().map(|(child, _)| child);
        let stdout = child.and_then(|child| child.stdout.take()).context("its stdout")?;
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line).context("its first line")?;
        let program = command.get_program().to_string_lossy();
        anyhow::ensure!(!line.is_empty(), "{program} ended before it was ready");
        Ok((pid, line.trim_end().to_owned()))
    }

    /// Stops a process, and returns after it has ended.
    pub(crate) fn stop(&mut self, pid: u32) -> anyhow::Result<()> {
        if let Some(at) = self.running.iter().position(|(child, _)| child.id() == pid) {
            let (mut child, process) = self.running.remove(at);
            end(&mut child, process)?;
        }
        self.update_guard()
    }

    /// Stops all processes, the last one first.
    pub(crate) fn stop_all(&mut self) -> anyhow::Result<()> {
        while let Some((mut child, process)) = self.running.pop() {
            end(&mut child, process)?;
        }
        self.update_guard()
    }

    fn update_guard(&mut self) -> anyhow::Result<()> {
        let processes: Vec<_> = self.running.iter().map(|(_, process)| *process).collect();
        self.guard.update(&processes).context("the guard")
    }
}

impl Drop for Children {
    fn drop(&mut self) {
        // The guard ends what could not be ended here.
        let _ = self.stop_all();
    }
}

fn end(child: &mut Child, process: Process) -> std::io::Result<()> {
    process.terminate();
    let begun = Instant::now();
    while child.try_wait()?.is_none() {
        if begun.elapsed() > PATIENCE {
            process.kill();
        }
        std::thread::sleep(POLL);
    }
    Ok(())
}
