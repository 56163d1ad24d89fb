//! The processes of a local cluster: started, watched, stopped.
//!
//! A process that dies stays dead unless respawning was asked for. It may also be started again by
//! somebody else with the same argv, as tests do; such a process is *adopted*: listed, watched and
//! stopped like our own. So `cluster.json` is true whoever started what, and nothing survives a
//! stop.
//!
//! Nothing here waits: the caller calls [`Supervisor::look`] several times a second.

use std::fs::{self, File};
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use super::cluster_file::{self, ClusterFile, Dead, Role, Spec};
use super::guard::Guard;
use super::process::Process;
use crate::output;

/// Reading every command line of the machine costs milliseconds.
const SEARCH_EVERY: Duration = Duration::from_millis(500);
const RESPAWN_AFTER: Duration = Duration::from_secs(2);
/// Until when, counted from the begin, each part of the cluster may stop by itself; below the 15 s
/// that are promised. Gateways go first, so that clients get answers to what they sent; then
/// coordinators, so that no node hands its shards to another one that is about to end; etcd last.
const STAGES: [(&[Role], Duration); 4] = [
    (&[Role::Gateway], Duration::from_secs(4)),
    (&[Role::Coordinator], Duration::from_secs(6)),
    (&[Role::StorageNode], Duration::from_secs(11)),
    (&[Role::Etcd], Duration::from_secs(13)),
];

pub(crate) struct Supervisor {
    folder: PathBuf,
    respawn: bool,
    /// Nodes that take the name of another store.
    replace: Option<String>,
    guard: Guard,
    members: Vec<Member>,
    written: Option<ClusterFile>,
    searched: Option<Instant>,
}

struct Member {
    spec: Spec,
    state: State,
}

enum State {
    Ours { child: Child, process: Process },
    Adopted(Process),
    Dead { since: Instant },
}

/// A process of ours that ended.
pub(crate) struct Ended {
    pub(crate) name: String,
    pub(crate) role: Role,
    pub(crate) status: ExitStatus,
}

impl Supervisor {
    pub(crate) fn new(folder: &Path, respawn: bool, replace: Option<String>) -> io::Result<Self> {
        fs::create_dir_all(folder.join("logs"))?;
        let guard = Guard::start()?;
        let folder = folder.to_owned();
        let members = Vec::new();
        let mut supervisor =
            Self { folder, respawn, replace, guard, members, written: None, searched: None };
        // What the last run left there is not true any more.
        supervisor.publish()?;
        Ok(supervisor)
    }

    pub(crate) fn start(&mut self, spec: Spec) -> io::Result<()> {
        let state = self.spawn(&spec)?;
        self.members.push(Member { spec, state });
        self.publish()
    }

    /// Where a process writes what it says.
    pub(crate) fn log_file(&self, name: &str) -> PathBuf {
        self.folder.join("logs").join(format!("{name}.log"))
    }

    fn spawn(&self, spec: &Spec) -> io::Result<State> {
        let log = File::options().create(true).append(true).open(self.log_file(&spec.name))?;
        let mut command = Command::new(&spec.argv[0]);
        command.args(&spec.argv[1..]).stdin(Stdio::null());
        command.stdout(log.try_clone()?).stderr(log);
        // etcd takes every flag from the environment too, and would mix them with ours.
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("ETCD") {
                command.env_remove(name);
            }
        }
        // Not as a flag: it is for this start, and the argv is what the process is known by.
        if let Some(names) = &self.replace {
            command.env("DKC_REPLACE", names);
        }
        // A group of its own: Ctrl-C at the terminal is for this process, which stops the others
        // in order.
        let child = command.process_group(0).spawn()?;
        // It may have ended by now; the next look tells.
        let process = Process::child(child.id())?;
        Ok(State::Ours { child, process })
    }

    /// Notices what ended or came back, and brings `cluster.json` up to date.
    pub(crate) fn look(&mut self) -> io::Result<Vec<Ended>> {
        let mut ended = Vec::new();
        let now = Instant::now();
        for member in &mut self.members {
            match &mut member.state {
                State::Ours { child, .. } => {
                    if let Some(status) = child.try_wait()? {
                        member.state = State::Dead { since: now };
                        let (name, role) = (member.spec.name.clone(), member.spec.role);
                        ended.push(Ended { name, role, status });
                    }
                }
                State::Adopted(process) if !process.is_alive() => {
                    output::note(&format!("{} ended", member.spec.name));
                    member.state = State::Dead { since: now };
                }
                State::Adopted(_) | State::Dead { .. } => {}
            }
        }
        if self.searched.is_none_or(|at| at.elapsed() >= SEARCH_EVERY) {
            self.searched = Some(now);
            self.bring_back()?;
        }
        self.publish()?;
        Ok(ended)
    }

    /// Adopts what somebody started again, and respawns if that was asked for.
    fn bring_back(&mut self) -> io::Result<()> {
        for index in 0..self.members.len() {
            let member = &self.members[index];
            let State::Dead { since } = member.state else { continue };
            if let Some(process) = Process::with_argv(&member.spec.argv) {
                output::note(&format!("{} runs again (pid {})", member.spec.name, process.pid));
                self.members[index].state = State::Adopted(process);
            } else if self.respawn && since.elapsed() >= RESPAWN_AFTER {
                output::note(&format!("starting {} again", member.spec.name));
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
                    file.processes.push(cluster_file::Process { pid: process.pid, spec });
                }
                None => file.dead.push(Dead { spec }),
            }
        }
        if self.written.as_ref() != Some(&file) {
            let running: Vec<_> = self.members.iter().filter_map(Member::process).collect();
            self.guard.tell(&running)?;
            cluster_file::replace(&self.folder.join("cluster.json"), &file)?;
            self.written = Some(file);
        }
        Ok(())
    }

    /// Stops everything, whoever started it.
    pub(crate) fn stop(mut self) -> io::Result<()> {
        // What somebody started a moment ago is ours to stop too.
        self.respawn = false;
        self.searched = None;
        drop(self.look()?);
        let begun = Instant::now();
        for (roles, patience) in STAGES {
            self.stop_roles(roles, begun + patience)?;
        }
        drop(self.look()?);
        self.guard.dismiss()
    }

    fn stop_roles(&mut self, roles: &[Role], until: Instant) -> io::Result<()> {
        let those = |member: &Member| roles.contains(&member.spec.role);
        let running = |members: &[Member]| -> Vec<Process> {
            members.iter().filter(|member| those(member)).filter_map(Member::process).collect()
        };
        // Nobody is left who would have to see first that a gateway goes.
        let ask = match roles.contains(&Role::Gateway) {
            true => Process::terminate_at_once,
            false => Process::terminate,
        };
        running(&self.members).into_iter().for_each(ask);
        while !running(&self.members).is_empty() {
            if Instant::now() > until {
                for member in self.members.iter().filter(|member| those(member)) {
                    if let Some(process) = member.process() {
                        output::note(&format!("{} does not stop: killing it", member.spec.name));
                        process.kill();
                    }
                }
                // A killed process ends, unless the kernel itself hangs; the guard's turn then.
                std::thread::sleep(Duration::from_millis(100));
                drop(self.look()?);
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(20));
            drop(self.look()?);
        }
        Ok(())
    }
}

impl Member {
    fn process(&self) -> Option<Process> {
        match &self.state {
            State::Ours { process, .. } | State::Adopted(process) => Some(*process),
            State::Dead { .. } => None,
        }
    }
}
