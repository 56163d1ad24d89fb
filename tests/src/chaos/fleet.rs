//! The processes: 3 etcd, 2 coordinators, 5 storage nodes, 2 gateways, and their supervisor.
//!
//! Like systemd, [`Fleet::watch`] restarts a process one second after its end, unless a fault keeps
//! it down. It also detects violations: a process that ends by itself, and whose exit code no
//! current fault explains, breaks a promise (*ends*).
//!
//! All processes end with this program, even if it is killed (`setpriv --pdeathsig`). The kernel
//! sends that signal when the *thread* that started a process ends. Therefore only the main thread
//! of the program starts processes.

use std::collections::BTreeSet;
use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, kill_process};

use super::power::{self, LostWrites, ShadowedDisk};
use super::sandbox::{Sandbox, run};
use crate::cluster::Signal;
use crate::sim::rng::Rng;

/// The delay of a restart, as with `RestartSec=1` of systemd.
const RESTART_AFTER: Duration = Duration::from_secs(1);
/// The limit of a graceful stop, which takes up to ten seconds; the rest is for a busy machine.
const STOP_WITHIN: Duration = Duration::from_secs(30);
/// After so many disk errors the operator gives the node an empty folder, as described in
/// docs/runbooks.md, "A disk is damaged".
const DISK_ERRORS_MAX: u32 = 3;
const DISK_ERROR: i32 = 5;
const REFUSED: i32 = 4;
/// A size that holds the writes of a run, and is small enough to be filled quickly.
const DISK_SIZE: &str = "size=640m,nr_inodes=8192";

pub const SHARDS: &str = "12";
pub const REPLICAS: usize = 3;

#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Role {
    Etcd,
    Coordinator,
    Node,
    Gateway,
}

/// Role, name, number of processes, and the last byte of the address of the first one.
const ROLES: &[(Role, &str, u8, u8)] = &[
    (Role::Etcd, "etcd", 3, 11),
    (Role::Coordinator, "coordinator", 2, 21),
    (Role::Node, "node", 5, 31),
    (Role::Gateway, "gateway", 2, 41),
];

#[derive(Debug)]
pub struct Member {
    pub name: String,
    pub role: Role,
    pub address: Ipv4Addr,
    child: Option<Child>,
    /// A process that was killed and may not have ended yet.
    dying: Option<Child>,
    /// The number of faults that keep it down.
    holds: u32,
    /// The number of faults that have stopped it by SIGSTOP.
    pauses: u32,
    started: Instant,
    start_at: Option<Instant>,
    /// The exit codes that a fault explains.
    explained: BTreeSet<i32>,
    /// The offset of its gRPC port from the usual one.
    moved: u16,
    /// True if its folder is one on which it must not run.
    must_refuse: bool,
    /// The number of times that it refused the empty folder that replaces its data; `None` if its
    /// data are in place.
    unmounted: Option<u32>,
    disk_errors: u32,
    stop_request: Option<StopRequest>,
}

/// A SIGTERM that a member has received.
#[derive(Clone, Copy, Debug)]
struct StopRequest {
    at: Instant,
    /// True if its signal handler was installed. Without a handler the signal ends any program.
    handles_signal: bool,
}

impl StopRequest {
    fn is_answered_by(self, status: ExitStatus) -> bool {
        status.success() || !self.handles_signal && status.signal() == Some(Signal::TERM.as_raw())
    }
}

impl Member {
    pub fn at(&self, port: u16) -> String {
        SocketAddr::from((self.address, port)).to_string()
    }

    pub fn runs(&self) -> bool {
        self.child.is_some()
    }

    /// Returns whether it runs and no fault has stopped it.
    pub fn can_answer(&self) -> bool {
        self.runs() && self.pauses == 0
    }

    /// Returns whether it has run for longer than `length` and was not asked to stop.
    pub fn has_run_for(&self, length: Duration) -> bool {
        self.runs() && self.stop_request.is_none() && self.started.elapsed() > length
    }
}

/// A process that ended by itself.
#[derive(Clone, Debug)]
pub struct ProcessEnd {
    pub name: String,
    pub how: String,
    pub explained: bool,
}

#[derive(Debug)]
pub struct Fleet {
    folder: PathBuf,
    dkc: PathBuf,
    etcd: PathBuf,
    sandbox: Sandbox,
    pub members: Vec<Member>,
    /// The library that shifts the wall clock of each process, if it could be built.
    shim: Option<PathBuf>,
    /// The library that records the synced writes of each node, and makes its syncs slow or fail,
    /// if it could be built.
    disk_shim: Option<PathBuf>,
    /// The node whose disk was damaged last.
    damaged: Option<String>,
    /// The nodes that got an empty folder.
    pub replaced: Vec<String>,
    ends: Vec<ProcessEnd>,
    mounted: Vec<PathBuf>,
}

pub const ETCD_PORT: u16 = 2379;
const ETCD_PEER_PORT: u16 = 2380;
pub const HTTP_PORT: u16 = 8080;
const GRPC_PORT: u16 = 7000;
const METRICS_PORT: u16 = 9000;

impl Fleet {
    /// Creates the folders and disks of all members. With `tracks_syncs` the synced writes of each
    /// node are recorded, which costs a copy per sync.
    pub fn new(
        folder: &Path,
        (dkc, etcd): (PathBuf, PathBuf),
        sandbox: Sandbox,
        tracks_syncs: bool,
    ) -> Result<Self, String> {
        // On loopback all of 127/8 is available; concurrent runs use different parts of it.
        let second = if sandbox.namespaces {
            [10, 77, 0]
        } else {
            [127, 77, (std::process::id() % 250) as u8]
        };
        let mut members = Vec::new();
        for &(role, name, count, first) in ROLES {
            for number in 0..count {
                members.push(Member {
                    name: format!("{name}-{}", number + 1),
                    role,
                    address: Ipv4Addr::new(second[0], second[1], second[2], first + number),
                    child: None,
                    dying: None,
                    holds: 0,
                    pauses: 0,
                    started: Instant::now(),
                    start_at: None,
                    explained: BTreeSet::new(),
                    moved: 0,
                    must_refuse: false,
                    unmounted: None,
                    disk_errors: 0,
                    stop_request: None,
                });
            }
        }
        let made = |path: &Path| {
            std::fs::create_dir_all(path).map_err(|error| format!("{path:?}: {error}"))
        };
        made(&folder.join("logs"))?;
        made(&folder.join("clocks"))?;
        made(&folder.join("disks"))?;
        made(&folder.join("shadows"))?;
        let mut mounted = Vec::new();
        for member in &members {
            let data = folder.join(&member.name);
            made(&data)?;
            std::fs::write(folder.join("clocks").join(&member.name), 0_i64.to_le_bytes())
                .map_err(|error| error.to_string())?;
            std::fs::write(folder.join("disks").join(&member.name), [0; 12])
                .map_err(|error| error.to_string())?;
            if sandbox.small_disks && matches!(member.role, Role::Node | Role::Etcd) {
                run(
                    "mount",
                    &["-t", "tmpfs", "-o", DISK_SIZE, "dkc-chaos", &data.display().to_string()],
                )?;
                mounted.push(data);
            }
        }
        let shim = build_shim(folder);
        if let Err(why) = &shim {
            crate::note(&format!("not available here: wall-clock jumps ({why})"));
        }
        let disk_shim = tracks_syncs.then(|| power::build_shim(folder));
        if let Some(Err(why)) = &disk_shim {
            crate::note(&format!("not available here: power cuts, slow and failing disks ({why})"));
        }
        let disk_shim = disk_shim.and_then(Result::ok);
        let (folder, shim) = (folder.to_owned(), shim.ok());
        Ok(Self {
            folder,
            dkc,
            etcd,
            sandbox,
            members,
            shim,
            disk_shim,
            damaged: None,
            replaced: Vec::new(),
            ends: Vec::new(),
            mounted,
        })
    }

    pub fn names(&self, role: Role) -> Vec<String> {
        self.members.iter().filter(|one| one.role == role).map(|one| one.name.clone()).collect()
    }

    pub fn member(&self, name: &str) -> &Member {
        self.members.iter().find(|one| one.name == name).expect("names come from this list")
    }

    fn member_mut(&mut self, name: &str) -> &mut Member {
        self.members.iter_mut().find(|one| one.name == name).expect("names come from this list")
    }

    pub fn gateways(&self) -> Vec<String> {
        let gateways = self.members.iter().filter(|one| one.role == Role::Gateway);
        gateways.map(|one| one.at(HTTP_PORT)).collect()
    }

    /// Returns the data folder of a node.
    pub fn data(&self, name: &str) -> PathBuf {
        self.folder.join(name).join("data")
    }

    pub fn can_shift_clocks(&self) -> bool {
        self.shim.is_some()
    }

    pub fn can_control_disks(&self) -> bool {
        self.disk_shim.is_some()
    }

    /// Returns the places where the synced writes of a node are recorded.
    fn disk(&self, name: &str) -> ShadowedDisk {
        ShadowedDisk {
            root: self.data(name).display().to_string(),
            shadow: self.folder.join("shadows").join(name),
            kept: self.folder.join(name).join("kept"),
        }
    }

    /// Undoes the writes of a node that is down and that no sync covered.
    pub fn cut_power(&mut self, name: &str) -> Result<LostWrites, String> {
        self.wait_until_dead(name);
        self.disk(name).cut().map_err(|error| format!("disk of {name}: {error}"))
    }

    /// Declares all writes of a node that is down synced.
    pub fn settle_disk(&self, name: &str) -> std::io::Result<()> {
        self.disk(name).settle()
    }

    /// Makes each sync of a node take between these times in milliseconds, and the next `fails`
    /// ones fail.
    pub fn set_disk(&self, name: &str, sync_ms: (u32, u32), fails: u32) -> Result<(), String> {
        use std::os::unix::fs::FileExt;
        let words = [sync_ms.0, sync_ms.1, fails];
        let bytes: Vec<u8> = words.into_iter().flat_map(u32::to_le_bytes).collect();
        // In place: the process has this very file mapped.
        let file = File::options().write(true).open(self.folder.join("disks").join(name));
        let written = file.and_then(|file| file.write_all_at(&bytes, 0));
        written.map_err(|error| format!("disk of {name}: {error}"))
    }

    /// Makes a member listen at another port from its next start on. Returns the port.
    pub fn move_port(&mut self, name: &str) -> u16 {
        let member = self.member_mut(name);
        // A clone of another node may listen at the port after the usual one.
        member.moved = if member.moved == 0 { 100 } else { member.moved + 1 };
        GRPC_PORT + member.moved
    }

    /// Returns the process id of a member, if it runs.
    pub fn process(&self, name: &str) -> Option<Pid> {
        let child = self.member(name).child.as_ref()?;
        i32::try_from(child.id()).ok().and_then(Pid::from_raw)
    }

    /// Sets the offset of the wall clock of a process from that of the machine.
    pub fn set_clock(&self, name: &str, nanos: i64) -> Result<(), String> {
        use std::os::unix::fs::FileExt;
        // In place: the process has this very file mapped.
        let file = File::options().write(true).open(self.folder.join("clocks").join(name));
        let written = file.and_then(|file| file.write_all_at(&nanos.to_le_bytes(), 0));
        written.map_err(|error| format!("clock of {name}: {error}"))
    }

    #[track_caller]
    pub fn start(&mut self, name: &str) {
        let argv = self.argv(name);
        let member = self.member_mut(name);
        let is_dead = |child: &mut Child| !matches!(child.try_wait(), Ok(None));
        let _reaped = member.dying.take_if(is_dead);
        if member.dying.is_some() {
            // The lock and the ports of the previous process are not free yet.
            member.start_at = Some(Instant::now());
            return;
        }
        member.start_at = None;
        if !self.member(name).runs() {
            let child = self.spawn(name, name, &argv);
            let member = self.member_mut(name);
            (member.child, member.started, member.stop_request) =
                (Some(child), Instant::now(), None);
        }
    }

    /// Starts a program as this member would be started, with a log of its own.
    #[track_caller]
    pub fn spawn(&self, member: &str, log: &str, argv: &[String]) -> Child {
        let path = self.folder.join("logs").join(format!("{log}.log"));
        let log = File::options().create(true).append(true).open(path).expect("a log");
        let again = log.try_clone().expect("a second handle");
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--"]);
        if self.sandbox.namespaces {
            command.args(["nsenter", &format!("--net=/run/netns/{member}"), "--"]);
        }
        // The operator permits the replacement of a store whose folder was emptied.
        if self.replaced.iter().any(|name| name == member) {
            command.env("DKC_REPLACE", member);
        }
        command.args(argv).stdin(Stdio::null()).stdout(again).stderr(log);
        let mut preload = Vec::new();
        if let Some(shim) = &self.shim {
            preload.push(shim.display().to_string());
            command.env("DKC_CLOCK_OFFSET", self.folder.join("clocks").join(member));
        }
        if let Some(shim) = &self.disk_shim
            && self.member(member).role == Role::Node
        {
            preload.push(shim.display().to_string());
            command.env("DKC_DISK_FAULTS", self.folder.join("disks").join(member));
            command.envs(self.disk(member).environment());
        }
        if !preload.is_empty() {
            command.env("LD_PRELOAD", preload.join(":"));
        }
        command.spawn().unwrap_or_else(|error| panic!("{argv:?}: {error}"))
    }

    /// Kills a member by `kill -9`. It is restarted unless a fault keeps it down ([`Self::hold`]).
    ///
    /// This does not wait for the end of the process: on a busy machine a thread of low priority
    /// may be scheduled only after seconds, and a fault that kills all processes must kill them at
    /// once.
    pub fn kill(&mut self, name: &str) {
        let member = self.member_mut(name);
        member.start_at = Some(Instant::now() + RESTART_AFTER);
        if let Some(mut child) = member.child.take() {
            member.pauses = 0;
            let _was_ended = child.kill();
            member.dying = Some(child);
        }
    }

    /// Waits for the end of a killed process, before a fault changes files that it has open.
    pub fn wait_until_dead(&mut self, name: &str) {
        if let Some(mut child) = self.member_mut(name).dying.take() {
            let _reaped = child.wait();
        }
    }

    /// Kills a member and keeps it down until [`Self::release`].
    pub fn hold(&mut self, name: &str) {
        self.kill(name);
        self.member_mut(name).holds += 1;
    }

    pub fn release(&mut self, name: &str) {
        let member = self.member_mut(name);
        member.holds = member.holds.saturating_sub(1);
        member.start_at = Some(Instant::now());
        self.start_those_due();
    }

    /// Sends SIGTERM. [`Self::watch`] checks the exit and restarts the member.
    pub fn ask_to_stop(&mut self, name: &str) {
        let member = self.member_mut(name);
        let Some(child) = &member.child else { return };
        // A stopped process handles no signal until it is resumed.
        if member.pauses == 0 && member.stop_request.is_none() {
            member.stop_request =
                Some(StopRequest { at: Instant::now(), handles_signal: handles_sigterm(child) });
            send(child, Signal::TERM);
        }
    }

    pub fn pause(&mut self, name: &str) {
        let member = self.member_mut(name);
        if let Some(child) = &member.child {
            member.pauses += 1;
            send(child, Signal::STOP);
        }
    }

    pub fn resume(&mut self, name: &str) {
        let member = self.member_mut(name);
        member.pauses = member.pauses.saturating_sub(1);
        if let Some(stop_request) = &mut member.stop_request {
            stop_request.at = Instant::now();
        }
        if let (0, Some(child)) = (member.pauses, &member.child) {
            send(child, Signal::CONT);
        }
    }

    /// Permits these exit codes of a node until it gets an empty folder.
    pub fn allow_exit_codes(&mut self, name: &str, codes: &[i32]) {
        self.member_mut(name).explained.extend(codes);
    }

    /// Expects that a node with an old folder refuses it at its next end. An operator then empties
    /// the folder.
    pub fn must_refuse(&mut self, name: &str) {
        self.member_mut(name).must_refuse = true;
        self.allow_exit_codes(name, &[REFUSED]);
    }

    /// Returns an error text if a node should have refused its folder and has not.
    pub fn unrefused(&self) -> Option<String> {
        let who = self.members.iter().find(|one| one.must_refuse)?;
        Some(format!("{} runs on a folder from before its last start", who.name))
    }

    /// Returns the node whose disk may be damaged next.
    ///
    /// At most one copy of a shard may be bad, and a bad one stays bad until its node gets an empty
    /// folder: damage in a block that is never read may stay undetected for long.
    pub fn victim(&mut self, rng: &mut Rng) -> String {
        let names = self.names(Role::Node);
        let victim = self.damaged.get_or_insert_with(|| names[rng.index(names.len())].clone());
        victim.clone()
    }

    /// Records the processes that ended, and starts those that should run.
    pub fn watch(&mut self) {
        for at in 0..self.members.len() {
            let member = &mut self.members[at];
            let Some(child) = &mut member.child else { continue };
            let Ok(Some(status)) = child.try_wait() else {
                let late = |stop_request: StopRequest| {
                    member.pauses == 0 && stop_request.at.elapsed() > STOP_WITHIN
                };
                if member.stop_request.is_some_and(late) {
                    let name = member.name.clone();
                    let how = format!("still ran {STOP_WITHIN:?} after it was asked to stop");
                    self.kill(&name);
                    self.ends.push(ProcessEnd { name, how, explained: false });
                }
                continue;
            };
            member.child = None;
            member.pauses = 0;
            member.start_at = Some(Instant::now() + RESTART_AFTER);
            if member.stop_request.is_some_and(|stop_request| stop_request.is_answered_by(status)) {
                continue;
            }
            let code = status.code();
            let explained = code.is_some_and(|code| member.explained.contains(&code));
            let end =
                ProcessEnd { name: member.name.clone(), how: describe_end(status), explained };
            member.disk_errors += u32::from(code == Some(DISK_ERROR));
            let name = member.name.clone();
            // The node cannot run on this folder any more, so an operator has to act.
            let spent = member.disk_errors >= DISK_ERRORS_MAX || code == Some(REFUSED);
            member.must_refuse &= code != Some(REFUSED);
            if let Some(refusals) = &mut member.unmounted {
                // The fault puts the folder back, so the node gets no empty one.
                *refusals += u32::from(code == Some(REFUSED));
                let explained = explained || code == Some(REFUSED);
                self.ends.push(ProcessEnd { explained, ..end });
                continue;
            }
            if member.role == Role::Node && explained && spent {
                self.replace_folder(&name);
            }
            self.ends.push(end);
        }
        self.start_those_due();
    }

    fn start_those_due(&mut self) {
        let now = Instant::now();
        let due = |one: &&Member| one.holds == 0 && one.start_at.is_some_and(|at| at <= now);
        let due: Vec<_> = self.members.iter().filter(due).map(|one| one.name.clone()).collect();
        for name in due {
            self.start(&name);
        }
    }

    /// Replaces the folder of a node that is down by an empty one, as when a volume is not mounted.
    pub fn unmount_data(&mut self, name: &str) -> std::io::Result<()> {
        let data = self.data(name);
        self.disk(name).settle()?;
        std::fs::rename(&data, data.with_extension("away"))?;
        std::fs::create_dir(&data)?;
        self.member_mut(name).unmounted = Some(0);
        Ok(())
    }

    /// Puts the folder of a node that is down back. Returns how often the node has refused the
    /// empty one meanwhile. It is an error if the node has become a new store in it.
    pub fn mount_data(&mut self, name: &str) -> Result<u32, String> {
        let data = self.data(name);
        let made = std::fs::read_dir(&data).is_ok_and(|mut entries| entries.next().is_some());
        let refusals = self.member_mut(name).unmounted.take().unwrap_or(0);
        let swapped = self
            .disk(name)
            .settle()
            .and_then(|()| std::fs::remove_dir_all(&data))
            .and_then(|()| std::fs::rename(data.with_extension("away"), &data));
        swapped.map_err(|error| format!("the folder of {name} can't be put back: {error}"))?;
        match made {
            true if refusals == 0 => Err(format!("{name} became a new store in an empty folder")),
            _ => Ok(refusals),
        }
    }

    /// Gives a node an empty folder: a new store under the same name, which the coordinator fills.
    pub fn replace_folder(&mut self, name: &str) {
        let data = self.data(name);
        if let Err(error) = std::fs::remove_dir_all(&data) {
            crate::note(&format!("{data:?} can't be emptied: {error}"));
        }
        if let Err(error) = self.disk(name).settle() {
            crate::note(&format!("the synced writes of {name} can't be removed: {error}"));
        }
        let member = self.member_mut(name);
        member.disk_errors = 0;
        member.explained.clear();
        self.damaged.take_if(|damaged| damaged == name);
        self.replaced.push(name.to_owned());
    }

    /// Returns the processes that ended by themselves since the last call.
    pub fn ends(&mut self) -> Vec<ProcessEnd> {
        std::mem::take(&mut self.ends)
    }

    /// Kills all processes.
    pub fn end(&mut self) {
        for at in 0..self.members.len() {
            let name = self.members[at].name.clone();
            self.hold(&name);
        }
        for at in 0..self.members.len() {
            let name = self.members[at].name.clone();
            self.wait_until_dead(&name);
        }
    }

    /// Unmounts the disks, which otherwise cannot be removed before this program ends.
    fn unmount(&mut self) {
        for disk in std::mem::take(&mut self.mounted) {
            if let Err(why) = run("umount", &[&disk.display().to_string()]) {
                crate::note(&why);
            }
        }
    }

    /// Returns the command line of a member.
    pub fn argv(&self, name: &str) -> Vec<String> {
        let member = self.member(name);
        let at = |port| member.at(port);
        let grpc = member.at(GRPC_PORT + member.moved);
        let data = self.data(name).display().to_string();
        let of = |role| self.members.iter().filter(move |one| one.role == role);
        let endpoints = of(Role::Etcd).map(|one| one.at(ETCD_PORT)).collect::<Vec<_>>().join(",");
        let (program, words) = match member.role {
            Role::Etcd => {
                let peer = |one: &Member| format!("{}=http://{}", one.name, one.at(ETCD_PEER_PORT));
                let peers = of(Role::Etcd).map(peer).collect::<Vec<_>>().join(",");
                let (client, peer) = (at(ETCD_PORT), at(ETCD_PEER_PORT));
                let words = format!(
                    "--name {name} --data-dir {data} --listen-client-urls http://{client} \
                     --advertise-client-urls http://{client} --listen-peer-urls http://{peer} \
                     --initial-advertise-peer-urls http://{peer} \
                     --initial-cluster {peers} --initial-cluster-state new --log-level warn"
                );
                (&self.etcd, words)
            }
            Role::Coordinator => (
                &self.dkc,
                format!(
                    "coordinator --name {name} --etcd {endpoints} --listen {} --metrics {} \
                     --shards {SHARDS} --replicas {REPLICAS} --min-in-sync 2 \
                     --expect-nodes 5 --rebuild-delay 600",
                    grpc,
                    at(METRICS_PORT)
                ),
            ),
            // All sizes are small, so that logs are trimmed, tables flushed and snapshots sent
            // often.
            Role::Node => (
                &self.dkc,
                format!(
                    "storage-node --name {name} --host {name} --etcd {endpoints} --data {data} \
                     --listen {} --metrics {} --segment-bytes 1048576 --log-keep-bytes 4194304 \
                     --flush-after-ms 2000 --memory-bytes 134217728",
                    grpc,
                    at(METRICS_PORT)
                ),
            ),
            Role::Gateway => (
                &self.dkc,
                format!(
                    "gateway --name {name} --etcd {endpoints} --http {} --grpc {} --metrics {} \
                     --workers 2",
                    at(HTTP_PORT),
                    at(GRPC_PORT),
                    at(METRICS_PORT)
                ),
            ),
        };
        let program = program.display().to_string();
        std::iter::once(program).chain(words.split_whitespace().map(str::to_owned)).collect()
    }

    /// Returns the name and the whole log of each node.
    pub fn node_logs(&self) -> Vec<(String, String)> {
        let log = |name: String| {
            let path = self.folder.join("logs").join(format!("{name}.log"));
            let text = std::fs::read(path).unwrap_or_default();
            (name, String::from_utf8_lossy(&text).into_owned())
        };
        self.names(Role::Node).into_iter().map(log).collect()
    }

    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Copies the data from the mounts, which disappear with this program, to a folder beside the
    /// logs.
    pub fn keep_data(&self) -> Result<PathBuf, String> {
        let kept = self.folder.join("kept");
        std::fs::create_dir_all(&kept).map_err(|error| error.to_string())?;
        for role in [Role::Node, Role::Etcd] {
            for name in self.names(role) {
                let from = self.folder.join(&name).display().to_string();
                run("cp", &["-a", &from, &kept.display().to_string()])?;
            }
        }
        Ok(kept)
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        self.end();
        self.unmount();
    }
}

/// Describes the end of a process for people.
fn describe_end(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => status.to_string(),
    }
}

/// Returns whether a process has a handler for SIGTERM: bit 14 of its mask of caught signals.
fn handles_sigterm(child: &Child) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{}/status", child.id()));
    let caught = |status: String| {
        let mask = status.lines().find_map(|line| line.strip_prefix("SigCgt:"))?.trim().to_owned();
        u64::from_str_radix(&mask, 16).ok()
    };
    status.ok().and_then(caught).is_some_and(|mask| mask & (1 << 14) != 0)
}

fn send(child: &Child, signal: Signal) {
    // The process is not reaped yet, so its id is not reused.
    if let Some(pid) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) {
        let _is_ended = kill_process(pid, signal);
    }
}

fn build_shim(folder: &Path) -> Result<PathBuf, String> {
    let (source, shim) = (folder.join("clock_shim.c"), folder.join("clock_shim.so"));
    std::fs::write(&source, include_str!("clock_shim.c")).map_err(|error| error.to_string())?;
    let (from, to) = (source.display().to_string(), shim.display().to_string());
    run("cc", &["-O2", "-shared", "-fPIC", "-o", &to, &from])?;
    Ok(shim)
}
