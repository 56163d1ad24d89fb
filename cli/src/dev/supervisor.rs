//! The processes of a local cluster: started, watched, stopped.
//!
//! A process that dies is started again only with `--respawn`. A test may also start it again with
//! the same argv; such a process is *adopted*: listed, watched and stopped like a child process. So
//! `cluster.json` is correct for processes of any origin, and no process survives a stop.
//!
//! No method waits, except [`Supervisor::stop`]: the caller calls [`Supervisor::poll`] several
//! times a second.

use std::fs::{self, File};
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use super::cluster_file::{self, ClusterFile, ProcessRole, ProcessSpec};
use super::guard::ProcessGuard;
use super::process::Process;
use crate::output::note;

/// The interval of searches for dead processes that were started again: reading all command lines
/// of the machine takes milliseconds.
const SEARCH_EVERY: Duration = Duration::from_millis(500);
/// A dead process is started again after this time.
const RESPAWN_AFTER: Duration = Duration::from_secs(2);
/// The roles in the order in which they stop, each with the time since the beginning of the stop
/// after which it is killed; all are below the 15 s that are promised. Gateways stop first, so that
/// clients get answers to their requests; then coordinators, so that no node hands its shards to
/// another node that is about to stop; etcd stops last.
const STAGES: [(&[ProcessRole], Duration); 4] = [
    (&[ProcessRole::Gateway], Duration::from_secs(4)),
    (&[ProcessRole::Coordinator], Duration::from_secs(6)),
    (&[ProcessRole::StorageNode], Duration::from_secs(11)),
    (&[ProcessRole::Etcd], Duration::from_secs(13)),
];

/// The supervisor of all processes.
pub(crate) struct Supervisor {
    folder: PathBuf,
    respawn: bool,
    /// The names of nodes that replace a lost store.
    replace: Option<String>,
    guard: ProcessGuard,
    members: Vec<SupervisedProcess>,
    written: Option<ClusterFile>,
    searched: Option<Instant>,
}

/// A process with its state.
struct SupervisedProcess {
    spec: ProcessSpec,
    state: ProcessState,
    /// A command has asked for its stop, so it is not started again.
    is_stopped: bool,
}

/// The state of a process.
enum ProcessState {
    /// A running child process.
    Child { child: Child, process: Process },
    /// A running process that was started by another process.
    Adopted(Process),
    /// The process has ended.
    Dead { since: Instant },
}

/// A child process that ended.
pub(crate) struct ExitedProcess {
    pub(crate) name: String,
    pub(crate) role: ProcessRole,
    pub(crate) status: ExitStatus,
    /// A command has asked for it.
    pub(crate) is_stopped: bool,
}

impl Supervisor {
    /// Starts the guard, and clears `cluster.json`.
    pub(crate) fn new(folder: &Path, respawn: bool, replace: Option<String>) -> io::Result<Self> {
        fs::create_dir_all(folder.join("logs"))?;
        let guard = ProcessGuard::start()?;
        let folder = folder.to_owned();
        let members = Vec::new();
        let mut supervisor =
            Self { folder, respawn, replace, guard, members, written: None, searched: None };
        // The content of the previous run is out of date.
        supervisor.publish()?;
        Ok(supervisor)
    }

    /// Starts a process and supervises it from now on.
    pub(crate) fn start(&mut self, spec: ProcessSpec) -> io::Result<()> {
        let state = self.spawn(&spec)?;
        self.members.push(SupervisedProcess { spec, state, is_stopped: false });
        self.publish()
    }

    /// The file with the output of a process.
    pub(crate) fn log_file(&self, name: &str) -> PathBuf {
        self.folder.join("logs").join(format!("{name}.log"))
    }

    fn spawn(&self, spec: &ProcessSpec) -> io::Result<ProcessState> {
        let log = File::options().create(true).append(true).open(self.log_file(&spec.name))?;
        let mut command = Command::new(&spec.argv[0]);
        command.args(&spec.argv[1..]).stdin(Stdio::null());
        command.stdout(log.try_clone()?).stderr(log);
        // etcd reads every flag from the environment, too, which would override the command line.
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("ETCD") {
                command.env_remove(name);
            }
        }
        // As a variable and not as a flag: the argv identifies the process and must not change.
        if let Some(names) = &self.replace {
            command.env("DKC_REPLACE", names);
        }
        // A process group of its own: Ctrl-C at the terminal goes to this process only, which stops
        // the others in order.
        let child = command.process_group(0).spawn()?;
        // The child may have ended by now, which the next poll detects.
        let process = Process::child(child.id())?;
        Ok(ProcessState::Child { child, process })
    }

    /// Detects processes that ended or were started again, and updates `cluster.json`. Returns the
    /// children that ended.
    pub(crate) fn poll(&mut self) -> io::Result<Vec<ExitedProcess>> {
        let mut ended = Vec::new();
        let now = Instant::now();
        for member in &mut self.members {
            match &mut member.state {
                ProcessState::Child { child, .. } => {
                    if let Some(status) = child.try_wait()? {
                        member.state = ProcessState::Dead { since: now };
                        let (name, role) = (member.spec.name.clone(), member.spec.role);
                        let is_stopped = member.is_stopped;
                        ended.push(ExitedProcess { name, role, status, is_stopped });
                    }
                }
                ProcessState::Adopted(process) if !process.is_alive() => {
                    note!("{} ended", member.spec.name);
                    member.state = ProcessState::Dead { since: now };
                }
                ProcessState::Adopted(_) | ProcessState::Dead { .. } => {}
            }
        }
        if self.searched.is_none_or(|at| at.elapsed() >= SEARCH_EVERY) {
            self.searched = Some(now);
            self.adopt_or_respawn()?;
        }
        self.publish()?;
        Ok(ended)
    }

    /// Adopts dead processes that were started again, and respawns the others if configured.
    fn adopt_or_respawn(&mut self) -> io::Result<()> {
        for index in 0..self.members.len() {
            let member = &self.members[index];
            let ProcessState::Dead { since } = member.state else { continue };
            if let Some(process) = Process::with_argv(&member.spec.argv) {
                note!("{} is running again (pid {})", member.spec.name, process.pid);
                self.members[index].state = ProcessState::Adopted(process);
                self.members[index].is_stopped = false;
            } else if self.respawn && !member.is_stopped && since.elapsed() >= RESPAWN_AFTER {
                note!("restarting {}", member.spec.name);
                self.members[index].state = self.spawn(&member.spec)?;
            }
        }
        Ok(())
    }

    fn publish(&mut self) -> io::Result<()> {
        let mut file = ClusterFile::default();
        for member in &self.members {
            let spec = member.spec.clone();
            match member.process() {
                Some(process) => {
                    file.processes.push(cluster_file::ListedProcess { pid: process.pid, spec });
                }
                None => file.dead.push(spec),
            }
        }
        if self.written.as_ref() != Some(&file) {
            let running: Vec<_> =
                self.members.iter().filter_map(SupervisedProcess::process).collect();
            self.guard.update(&running)?;
            cluster_file::replace(&self.folder.join("cluster.json"), &file)?;
            self.written = Some(file);
        }
        Ok(())
    }

    /// The pid of a process, if it runs.
    pub(crate) fn pid(&self, name: &str) -> Option<u32> {
        let member = self.members.iter().find(|member| member.spec.name == name)?;
        member.process().map(|process| process.pid)
    }

    /// Asks one process to stop, and starts it no more.
    pub(crate) fn stop_one(&mut self, name: &str) {
        for member in self.members.iter_mut().filter(|member| member.spec.name == name) {
            member.is_stopped = true;
            if let Some(process) = member.process() {
                process.terminate();
            }
        }
    }

    /// Removes a process that does not run from the list.
    pub(crate) fn forget(&mut self, name: &str) -> io::Result<()> {
        self.members.retain(|member| member.spec.name != name || member.process().is_some());
        self.publish()
    }

    /// Stops all processes, adopted ones included.
    pub(crate) fn stop(mut self) -> io::Result<()> {
        // A process that was started a moment ago must be stopped, too.
        self.respawn = false;
        self.searched = None;
        drop(self.poll()?);
        let begun = Instant::now();
        for (roles, patience) in STAGES {
            self.stop_roles(roles, begun + patience)?;
        }
        drop(self.poll()?);
        self.guard.dismiss()
    }

    fn stop_roles(&mut self, roles: &[ProcessRole], until: Instant) -> io::Result<()> {
        let those = |member: &SupervisedProcess| roles.contains(&member.spec.role);
        let running = |members: &[SupervisedProcess]| -> Vec<Process> {
            members
                .iter()
                .filter(|member| those(member))
                .filter_map(SupervisedProcess::process)
                .collect()
        };
        // A gateway need not drain: no load balancer has to notice first that it stops.
        let ask = match roles.contains(&ProcessRole::Gateway) {
            true => Process::terminate_at_once,
            false => Process::terminate,
        };
        running(&self.members).into_iter().for_each(ask);
        while !running(&self.members).is_empty() {
            if Instant::now() > until {
                for member in self.members.iter().filter(|member| those(member)) {
                    if let Some(process) = member.process() {
                        note!("{} does not stop: killing it", member.spec.name);
                        process.kill();
                    }
                }
                // A killed process ends, unless the kernel hangs; then the guard tries again.
                std::thread::sleep(Duration::from_millis(100));
                drop(self.poll()?);
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(20));
            drop(self.poll()?);
        }
        Ok(())
    }
}

impl SupervisedProcess {
    fn process(&self) -> Option<Process> {
        match &self.state {
            ProcessState::Child { process, .. } | ProcessState::Adopted(process) => Some(*process),
            ProcessState::Dead { .. } => None,
        }
    }
}
