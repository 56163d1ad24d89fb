//! A cluster of real processes, for tests that kill them.
//!
//! [`Cluster`] starts the binary `dkc dev` in a folder of its own and finds the processes in
//! `cluster.json`: it kills by pid and restarts by argv, as an operator would. The tests link
//! nothing of the product except the hash of a key, and [`http`] is a separate client on purpose: a
//! bug in the client of the product must not hide a bug in the product.
//!
//! The clusters of one test program run one after the other, whatever the number of test threads:
//! each has a dozen processes, and the tests measure time. A cluster ends with its test (`Drop`),
//! and its folder is kept when the test failed.

pub mod failover;
pub mod http;
pub mod load;

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, mpsc};
use std::time::{Duration, Instant};

use engine::key::CounterKey;
pub use rustix::process::Signal;
use rustix::process::{Pid, kill_process};
use serde_json::Value;

use self::http::Client;

/// The limit of a start, which takes a second or two on an idle machine.
const READY_WITHIN: Duration = Duration::from_secs(90);
/// The time within which `dkc dev` stops all processes.
pub const STOP_WITHIN: Duration = Duration::from_secs(15);
/// The limit of a catch-up. Gigabytes of lag take a minute on an idle machine.
const FULL_WITHIN: Duration = Duration::from_secs(300);
/// The limit for a change of `cluster.json`, which is up to date within 1 s on an idle machine.
const NOTICED_WITHIN: Duration = Duration::from_secs(5);

static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// One entry of `cluster.json`.
#[derive(Clone, Debug)]
pub struct ClusterProcess {
    pub role: String,
    pub name: String,
    pub pid: u32,
    pub argv: Vec<String>,
    addresses: Value,
}

impl ClusterProcess {
    /// Returns its address for `http`, `grpc` or `metrics`.
    #[track_caller]
    pub fn address(&self, kind: &str) -> &str {
        self.addresses[kind].as_str().unwrap_or_else(|| panic!("{} has no {kind}", self.name))
    }

    /// Returns the value of this flag in its argv.
    #[track_caller]
    pub fn value_of(&self, flag: &str) -> &str {
        let at = self.argv.iter().position(|word| word == flag).expect("a flag of dkc dev");
        &self.argv[at + 1]
    }

    /// Returns the folder given with `--data`.
    #[track_caller]
    pub fn data(&self) -> PathBuf {
        self.value_of("--data").into()
    }
}

/// A running `dkc dev`.
pub struct Cluster {
    dev: Child,
    folder: PathBuf,
    /// The first gateway, `host:port`.
    pub gateway: String,
    _turn: MutexGuard<'static, ()>,
}

impl Cluster {
    /// Starts a new cluster with these flags of `dkc dev`, except `--data` and `--http`.
    #[track_caller]
    pub fn start(flags: &[&str]) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let turn = ONE_AT_A_TIME.lock().unwrap_or_else(|failed| failed.into_inner());
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let folder = std::env::temp_dir().join(format!("dkc-{}-{number}", std::process::id()));
        let (dev, gateway) = start_dev(&folder, flags);
        Self { dev, folder, gateway, _turn: turn }
    }

    /// Stops the cluster as Ctrl-C does and starts it again on the same folder.
    #[track_caller]
    pub fn stop_and_resume(&mut self) {
        self.stop();
        (self.dev, self.gateway) = start_dev(&self.folder, &[]);
    }

    /// Stops the cluster as Ctrl-C does, and checks that it stops in time, with exit code 0, and
    /// leaves no process behind.
    #[track_caller]
    pub fn stop(&mut self) {
        let pids: Vec<_> = self.processes().iter().map(|process| process.pid).collect();
        send(self.dev.id(), Signal::TERM);
        let status = ended_within(&mut self.dev, STOP_WITHIN).expect("dkc dev stops within 15 s");
        assert_eq!(status.code(), Some(0), "dkc dev: {status}");
        let left: Vec<_> = pids.into_iter().filter(|&pid| is_alive(pid)).collect();
        assert_eq!(left, [0; 0], "processes outlive dkc dev");
    }

    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Returns the running processes.
    pub fn processes(&self) -> Vec<ClusterProcess> {
        self.listed("processes")
    }

    fn listed(&self, list: &str) -> Vec<ClusterProcess> {
        let path = self.folder.join("cluster.json");
        let text = std::fs::read(&path).unwrap_or_else(|error| panic!("{path:?}: {error}"));
        let file: Value = serde_json::from_slice(&text).expect("cluster.json is whole");
        let text = |value: &Value| value.as_str().expect("text").to_owned();
        let read = |one: &Value| ClusterProcess {
            role: text(&one["role"]),
            name: text(&one["name"]),
            pid: one["pid"].as_u64().unwrap_or(0) as u32,
            argv: one["argv"].as_array().expect("a list").iter().map(text).collect(),
            addresses: one["addresses"].clone(),
        };
        file[list].as_array().into_iter().flatten().map(read).collect()
    }

    /// Returns the running process of that name.
    #[track_caller]
    pub fn process(&self, name: &str) -> ClusterProcess {
        let found = self.processes().into_iter().find(|process| process.name == name);
        found.unwrap_or_else(|| panic!("{name} does not run"))
    }

    /// Returns the names of all processes of a role.
    pub fn names(&self, role: &str) -> Vec<String> {
        let of_role = self.processes().into_iter().filter(|process| process.role == role);
        of_role.map(|process| process.name).collect()
    }

    /// Returns the HTTP addresses of all gateways.
    pub fn gateways(&self) -> Vec<String> {
        let gateways = self.processes().into_iter().filter(|process| process.role == "gateway");
        gateways.map(|process| process.address("http").to_owned()).collect()
    }

    /// Sends a signal without waiting for its effect, which the caller may measure.
    #[track_caller]
    pub fn signal(&self, name: &str, signal: Signal) -> ClusterProcess {
        let process = self.process(name);
        send(process.pid, signal);
        process
    }

    /// Kills a process by `kill -9` and waits until `cluster.json` no longer lists it.
    #[track_caller]
    pub fn kill(&self, name: &str) -> ClusterProcess {
        let process = self.signal(name, Signal::KILL);
        self.wait_until_gone(name);
        process
    }

    #[track_caller]
    pub fn wait_until_gone(&self, name: &str) {
        until(NOTICED_WITHIN, || {
            let runs = self.processes().iter().any(|process| process.name == name);
            if runs { Err(format!("cluster.json lists {name} as running")) } else { Ok(()) }
        });
    }

    /// Restarts a process by its argv, and waits until `dkc dev` lists it.
    #[track_caller]
    pub fn start_again(&self, process: &ClusterProcess) {
        self.start_with(process, &[]);
    }

    /// Restarts a node whose data are lost: it replaces the store of its name. The permission is an
    /// environment variable, since `dkc dev` identifies a process by its argv.
    #[track_caller]
    pub fn start_replacing(&self, process: &ClusterProcess) {
        self.start_with(process, &[("DKC_REPLACE", &process.name)]);
    }

    #[track_caller]
    fn start_with(&self, process: &ClusterProcess, variables: &[(&str, &str)]) {
        let mut child = self.spawn(&process.name, &process.argv, variables);
        let pid = child.id();
        // This thread reaps the process, which would otherwise become a zombie.
        std::thread::spawn(move || child.wait());
        until(NOTICED_WITHIN, || match self.listed("processes") {
            now if now.iter().any(|one| one.pid == pid) => Ok(()),
            _ => Err(format!("cluster.json does not list {} with pid {pid}", process.name)),
        });
    }

    /// Runs a command line that is expected to end by itself, and returns its exit code.
    #[track_caller]
    pub fn exit_code_of(&self, log: &str, argv: &[String], within: Duration) -> i32 {
        let mut child = self.spawn(log, argv, &[]);
        let Some(status) = ended_within(&mut child, within) else {
            send(child.id(), Signal::KILL);
            drop(child.wait());
            panic!("{argv:?} still runs after {within:?}: {}", self.log_tail(log));
        };
        status.code().unwrap_or_else(|| panic!("{argv:?} ended by a signal: {status}"))
    }

    fn spawn(&self, log: &str, argv: &[String], variables: &[(&str, &str)]) -> Child {
        let path = self.log_path(log);
        let log = std::fs::File::options().create(true).append(true).open(path).expect("a log");
        let again = log.try_clone().expect("a second handle");
        let mut command = Command::new(&argv[0]);
        command.args(&argv[1..]).stdin(Stdio::null()).stdout(again).stderr(log);
        command.envs(variables.iter().copied());
        command.spawn().unwrap_or_else(|error| panic!("{argv:?}: {error}"))
    }

    fn log_path(&self, name: &str) -> PathBuf {
        self.folder.join("logs").join(format!("{name}.log"))
    }

    /// Returns the log of a process so far.
    pub fn log(&self, name: &str) -> String {
        let text = std::fs::read(self.log_path(name)).unwrap_or_default();
        String::from_utf8_lossy(&text).into_owned()
    }

    fn log_tail(&self, name: &str) -> String {
        let log = self.log(name);
        let lines: Vec<_> = log.lines().collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }

    /// Returns `dkc` with a client command and the URLs of the gateways.
    pub fn dkc(&self, args: &[&str]) -> Command {
        let urls: Vec<_> = self.gateways().iter().map(|one| format!("http://{one}")).collect();
        let mut command = Command::new(dkc_binary());
        command.args(args).args(["--url", &urls.join(",")]);
        command
    }

    /// Returns all shards as a gateway reports them.
    pub fn shards(&self) -> Result<Vec<ClusterShard>, String> {
        shards(&self.gateways())
    }

    /// Waits until every shard is open with `replicas` members in sync and all of them agree.
    #[track_caller]
    pub fn wait_until_full(&self, replicas: usize) {
        until(FULL_WITHIN, || {
            self.shards()?.iter().try_for_each(|shard| {
                shard.assert_no_copy_differs();
                shard.is_full(replicas)
            })
        });
    }

    /// Waits until every replica has reported a digest at the same position, and all digests are
    /// equal.
    ///
    /// The digest covers all counters of the shard, so this compares every copy with every other.
    /// There must be no load, since the positions have to be equal.
    #[track_caller]
    pub fn wait_until_copies_agree(&self, replicas: usize) {
        until(Duration::from_secs(60), || {
            self.shards()?.iter().try_for_each(|shard| {
                shard.assert_no_copy_differs();
                shard.has_a_common_digest(replicas)
            })
        });
    }

    /// Returns a key of each shard in `namespace`, in the order of [`Self::shards`].
    #[track_caller]
    pub fn key_per_shard(&self, namespace: &str) -> Vec<String> {
        key_per_shard(&self.shards().expect("a cluster that is ready"), namespace)
    }
}

/// Returns the answer to `GET /v1/cluster` of the first gateway that answers.
pub fn status(gateways: &[String]) -> Result<Value, String> {
    let mut why = "no gateway runs".to_owned();
    for gateway in gateways {
        match Client::new(gateway).get("/v1/cluster") {
            Ok(answer) if answer.status == 200 => return Ok(answer.body),
            Ok(answer) => why = format!("{gateway}: {} {}", answer.status, answer.body),
            Err(error) => why = format!("{gateway}: {error:?}"),
        }
    }
    Err(why)
}

/// Returns all shards as the first gateway that answers reports them.
pub fn shards(gateways: &[String]) -> Result<Vec<ClusterShard>, String> {
    let status = status(gateways)?;
    let list = status["shards"].as_array().ok_or("no shards in /v1/cluster")?;
    list.iter().map(ClusterShard::read).collect()
}

/// Returns a key of each of these shards in `namespace`.
#[track_caller]
pub fn key_per_shard(shards: &[ClusterShard], namespace: &str) -> Vec<String> {
    let mut keys: Vec<Option<String>> = vec![None; shards.len()];
    for number in 0_u64.. {
        if keys.iter().all(Option::is_some) {
            break;
        }
        let key = format!("k{number}");
        let name = CounterKey::new(namespace.as_bytes(), key.as_bytes()).expect("a name");
        let slot = name.slot().0;
        let at = shards.iter().position(|shard| (shard.lo..=shard.hi).contains(&slot));
        keys[at.expect("the shards cover every slot")].get_or_insert(key);
    }
    keys.into_iter().flatten().collect()
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if matches!(self.dev.try_wait(), Ok(None)) {
            send(self.dev.id(), Signal::TERM);
            if ended_within(&mut self.dev, STOP_WITHIN * 2).is_none() {
                // The guard process of `dkc dev` ends the remaining processes.
                send(self.dev.id(), Signal::KILL);
                drop(self.dev.wait());
            }
        }
        if std::thread::panicking() {
            crate::note(&format!("the cluster's logs are in {}", self.folder.display()));
        } else {
            drop(std::fs::remove_dir_all(&self.folder));
        }
    }
}

/// A shard as `/v1/cluster` reports it.
#[derive(Clone, Debug)]
pub struct ClusterShard {
    pub id: u64,
    pub lo: u16,
    pub hi: u16,
    pub epoch: u64,
    pub state: String,
    pub primary: Option<String>,
    pub isr: Vec<String>,
    pub digests_agree: bool,
    /// The replicas that reported a digest, each with (digest, its position).
    digests: Vec<(String, (String, u64))>,
}

impl ClusterShard {
    /// Checks that the shard is open with so many members in sync.
    pub fn is_full(&self, replicas: usize) -> Result<(), String> {
        let Self { id, state, isr, .. } = self;
        if state != "open" || isr.len() != replicas {
            return Err(format!("shard {id} is {state}, in sync: {isr:?}"));
        }
        Ok(())
    }

    /// Checks that every replica has reported the same digest at the same position.
    pub fn has_a_common_digest(&self, replicas: usize) -> Result<(), String> {
        let Self { id, digests, .. } = self;
        let first = digests.first().map(|(_, digest)| digest);
        let same = digests.iter().filter(|(_, digest)| Some(digest) == first).count();
        if same != replicas {
            return Err(format!("shard {id} has no common digest: {digests:?}"));
        }
        Ok(())
    }

    #[track_caller]
    fn assert_no_copy_differs(&self) {
        let Self { id, digests_agree, .. } = self;
        assert!(digests_agree, "the replicas of shard {id} hold different counters");
    }

    fn read(value: &Value) -> Result<Self, String> {
        let odd = || format!("a shard that can't be read: {value}");
        let text = |value: &Value| value.as_str().map(str::to_owned);
        let slot = |at: usize| value["slots"][at].as_u64().and_then(|slot| slot.try_into().ok());
        let digest = |replica: &Value| {
            let digest = (text(&replica["digest"])?, replica["digest_at"].as_u64()?);
            Some((text(&replica["node"])?, digest))
        };
        Ok(Self {
            id: value["id"].as_u64().ok_or_else(odd)?,
            lo: slot(0).ok_or_else(odd)?,
            hi: slot(1).ok_or_else(odd)?,
            epoch: value["epoch"].as_u64().ok_or_else(odd)?,
            state: text(&value["state"]).ok_or_else(odd)?,
            primary: text(&value["primary"]),
            isr: value["isr"].as_array().ok_or_else(odd)?.iter().filter_map(text).collect(),
            digests_agree: value["digests_agree"].as_bool().unwrap_or(true),
            digests: value["replicas"]
                .as_array()
                .into_iter()
                .flatten()
                .filter_map(digest)
                .collect(),
        })
    }
}

/// Returns the path of the binary `dkc`: `$DKC_BIN`, or otherwise the one beside this test program.
pub fn dkc_binary() -> PathBuf {
    if let Some(named) = std::env::var_os("DKC_BIN") {
        return named.into();
    }
    let this = std::env::current_exe().expect("a program knows where it is");
    // target/ci/deps/cluster-… or target/ci/failover
    let mut folders = this.ancestors().skip(1).take(2).map(|folder| folder.join("dkc"));
    folders
        .find(|path| path.exists())
        .expect("no dkc beside this program: cargo build --profile ci -p cli, or set DKC_BIN")
}

fn start_dev(folder: &Path, flags: &[&str]) -> (Child, String) {
    let mut command = Command::new(dkc_binary());
    command.args(["dev", "--data"]).arg(folder);
    if !folder.join("dev.json").exists() {
        command.args(["--http", "127.0.0.1:0"]);
    }
    command.args(flags).stdin(Stdio::null()).stdout(Stdio::piped());
    let mut dev = command.spawn().expect("dkc dev starts");
    let stdout = BufReader::new(dev.stdout.take().expect("a pipe"));
    let (sender, lines) = mpsc::channel();
    std::thread::spawn(move || {
        stdout.lines().map_while(Result::ok).for_each(|line| drop(sender.send(line)));
    });
    let line = lines.recv_timeout(READY_WITHIN).unwrap_or_default();
    match line.strip_prefix("ready http://") {
        Some(gateway) => (dev, gateway.to_owned()),
        None => {
            send(dev.id(), Signal::TERM);
            let _killed_later = ended_within(&mut dev, STOP_WITHIN);
            panic!("dkc dev {flags:?} is not ready: {line:?}, logs in {}", folder.display());
        }
    }
}

#[track_caller]
fn send(pid: u32, signal: Signal) {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).expect("a pid");
    kill_process(pid, signal).unwrap_or_else(|error| panic!("signal to {pid:?}: {error}"));
}

fn is_alive(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.starts_with(" Z"))
}

fn ended_within(child: &mut Child, limit: Duration) -> Option<ExitStatus> {
    let begun = Instant::now();
    loop {
        if let Some(status) = child.try_wait().expect("our own child") {
            return Some(status);
        }
        if begun.elapsed() > limit {
            return None;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Repeats a check until it succeeds. Panics with its last error after `limit`.
#[track_caller]
pub fn until(limit: Duration, mut check: impl FnMut() -> Result<(), String>) {
    let begun = Instant::now();
    while let Err(why) = check() {
        assert!(begun.elapsed() < limit, "not within {limit:?}: {why}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
