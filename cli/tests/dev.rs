//! `dkc dev` with fake roles.
//!
//! This program is also the fake etcd, coordinator, storage node and gateway: `dkc dev --program`
//! starts it again for each role, and so does `$ETCD`. So everything about the supervisor is real
//! (processes, signals, ports, files) and nothing about the cluster is. The program has its own
//! `main` because the standard one would parse the roles' flags.

#[path = "fake/http.rs"]
mod http;

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use serde_json::Value;

const REFUSING: &str = "PRETEND_BAD_SETTINGS";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().collect();
    let flag = |name: &str| args.iter().position(|arg| arg == name).map(|at| args[at + 1].as_str());
    // Set for a cluster whose coordinator refuses its settings, so that it is never ready.
    let refusing = std::env::var_os(REFUSING).is_some();
    match args.get(1).map(String::as_str) {
        Some("--version") => {
            let mut stdout = std::io::stdout();
            writeln!(stdout, "etcd Version: 3.5.16").expect("a pipe to the supervisor");
            ExitCode::SUCCESS
        }
        Some("--name") => serve(
            flag("--listen-client-urls").expect("etcd has it").trim_start_matches("http://"),
            200,
            r#"{"health":"true"}"#,
        ),
        Some("gateway") => serve(
            flag("--http").expect("a gateway has it"),
            if refusing { 503 } else { 200 },
            r#"{"cluster":"dkc","shards":[{"id":0,"state":"open"}]}"#,
        ),
        Some("coordinator") if refusing => ExitCode::from(2),
        Some("coordinator" | "storage-node") => {
            serve(flag("--listen").expect("it listens"), 200, "{}")
        }
        // The arguments of `cargo test`: a filter, or flags for the standard main.
        filter => run_tests(filter.unwrap_or_default()),
    }
}

/// Answers the same to everything, until it is killed.
fn serve(address: &str, status: u16, body: &str) -> ExitCode {
    let listener = TcpListener::bind(address).expect("the supervisor chose a free port");
    for stream in listener.incoming().flatten() {
        let Ok(clone) = stream.try_clone() else { continue };
        let mut reader = BufReader::new(clone);
        while http::read_request(&mut reader).is_some() {
            if (&stream).write_all(&http::answer(status, body)).is_err() {
                break;
            }
        }
    }
    ExitCode::SUCCESS
}

fn run_tests(filter: &str) -> ExitCode {
    let tests: [(&str, fn()); 8] = [
        ("starts_prints_ready_and_stops", starts_prints_ready_and_stops),
        (
            "the_dead_stay_dead_and_the_restarted_are_adopted",
            the_dead_stay_dead_and_the_restarted_are_adopted,
        ),
        ("respawns_when_asked", respawns_when_asked),
        ("resumes_as_the_same_cluster", resumes_as_the_same_cluster),
        ("nothing_outlives_a_killed_supervisor", nothing_outlives_a_killed_supervisor),
        ("rejects_invalid_settings", rejects_invalid_settings),
        ("nodes_are_added_and_removed_for_good", nodes_are_added_and_removed_for_good),
        ("commands_without_a_cluster_say_what_to_do", commands_without_a_cluster_say_what_to_do),
    ];
    let mut stdout = std::io::stdout();
    let mut passed = 0;
    for (name, test) in tests.into_iter().filter(|(name, _)| name.contains(filter)) {
        writeln!(stdout, "test {name}").expect("stdout");
        // A panic ends the program with 101, which is what a failed test is.
        test();
        passed += 1;
    }
    // The line of the standard main, for scripts that add up results.
    writeln!(stdout, "test result: ok. {passed} passed; 0 failed").expect("stdout");
    ExitCode::SUCCESS
}

/// A supervisor under test; killed if the test ends early.
struct Dev {
    child: Child,
    folder: PathBuf,
    lines: mpsc::Receiver<String>,
}

impl Dev {
    fn start(folder: &Path, flags: &[&str]) -> Self {
        Self::start_with(folder, flags, &[])
    }

    fn start_with(folder: &Path, flags: &[&str], environment: &[(&str, &str)]) -> Self {
        let this = std::env::current_exe().unwrap();
        let mut child = Command::new(env!("CARGO_BIN_EXE_dkc"))
            .args(["dev", "--data"])
            .arg(folder)
            .arg("--program")
            .arg(&this)
            .args(flags)
            .env("ETCD", &this)
            .envs(environment.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let (send, lines) = mpsc::channel();
        std::thread::spawn(move || {
            stdout.lines().map_while(Result::ok).for_each(|line| drop(send.send(line)));
        });
        Self { child, folder: folder.to_owned(), lines }
    }

    /// The next line on stdout; empty if the process ended without one.
    fn ready(&mut self) -> String {
        match self.lines.recv_timeout(READY_WITHIN) {
            Err(mpsc::RecvTimeoutError::Timeout) => panic!("it neither gets ready nor ends"),
            line => line.unwrap_or_default(),
        }
    }

    fn file(&self) -> Value {
        serde_json::from_slice(&fs::read(self.folder.join("cluster.json")).unwrap()).unwrap()
    }

    fn pid(&self, name: &str) -> Option<u64> {
        let file = self.file();
        let mut processes = file["processes"].as_array().unwrap().iter();
        processes
            .find(|process| process["name"] == name)
            .map(|found| found["pid"].as_u64().unwrap())
    }

    /// All running processes as (name, pid).
    fn pids(&self) -> Vec<(String, u64)> {
        let file = self.file();
        let processes = file["processes"].as_array().unwrap().iter();
        let pair =
            |one: &Value| (one["name"].as_str().unwrap().into(), one["pid"].as_u64().unwrap());
        processes.map(pair).collect()
    }

    /// Ends the process with a signal; returns the exit code and the duration.
    fn stop(mut self, signal: &str) -> (Option<i32>, Duration) {
        let begun = Instant::now();
        kill(signal, u64::from(self.child.id()));
        let code = self.child.wait().unwrap().code();
        (code, begun.elapsed())
    }
}

impl Drop for Dev {
    fn drop(&mut self) {
        // The guard ends the other processes. An error means that it was stopped already.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

fn kill(signal: &str, pid: u64) {
    let status = Command::new("kill").args([signal, &pid.to_string()]).status().unwrap();
    assert!(status.success(), "kill {signal} {pid}");
}

fn is_alive(pid: u64) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.starts_with(" Z"))
}

#[track_caller]
fn within(limit: Duration, what: &str, mut is_so: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < limit, "{what}: not within {limit:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The delay that `cluster.json` promises, with reserve for a busy machine.
const SOON: Duration = Duration::from_secs(5);
const READY_WITHIN: Duration = Duration::from_secs(60);
const STOP_WITHIN: Duration = Duration::from_secs(15);

fn folder(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    drop(fs::remove_dir_all(&folder));
    folder
}

fn starts_prints_ready_and_stops() {
    let folder = folder("starts");
    let flags = [
        "--http",
        "127.0.0.1:0",
        "--gateways",
        "2",
        "--",
        "--segment-bytes",
        "7",
        "--rebuild-delay",
        "9",
    ];
    let mut dev = Dev::start(&folder, &flags);
    let ready = dev.ready();
    assert!(ready.starts_with("ready http://127.0.0.1:"), "{ready}");
    let names: Vec<_> = dev.pids().into_iter().map(|(name, _)| name).collect();
    let want = ["etcd", "coordinator-1", "node-1", "node-2", "node-3", "gateway-1", "gateway-2"];
    assert_eq!(names, want);
    let pids = dev.pids();
    assert!(pids.iter().all(|(_, pid)| is_alive(*pid)), "{pids:?}");
    let file = dev.file();
    let process = |name: &str| {
        let mut all = file["processes"].as_array().unwrap().iter();
        all.find(|process| process["name"] == name).unwrap().clone()
    };
    let node = process("node-2");
    assert_eq!(node["role"], "storage-node");
    let argv: Vec<_> =
        node["argv"].as_array().unwrap().iter().map(|word| word.as_str().unwrap()).collect();
    assert_eq!(argv[1..4], ["storage-node", "--name", "node-2"]);
    assert_eq!(argv[argv.len() - 2..], ["--segment-bytes", "7"]);
    assert!(process("coordinator-1")["argv"].to_string().ends_with(r#""--rebuild-delay","9"]"#));
    let first = process("gateway-1")["addresses"]["http"].as_str().unwrap().to_owned();
    assert_eq!(ready, format!("ready http://{first}"));

    // A process that is stopped by a signal cannot end by itself, and must not delay the others.
    kill("-STOP", dev.pid("node-1").unwrap());
    let (code, took) = dev.stop("-TERM");
    assert_eq!(code, Some(0));
    assert!(took < STOP_WITHIN, "{took:?}");
    assert!(pids.iter().all(|(_, pid)| !is_alive(*pid)), "{pids:?}");
}

fn the_dead_stay_dead_and_the_restarted_are_adopted() {
    let mut dev = Dev::start(&folder("dead"), &["--http", "127.0.0.1:0", "--nodes", "1"]);
    dev.ready();
    kill("-KILL", dev.pid("node-1").unwrap());
    within(SOON, "the dead process is gone from the file", || dev.pid("node-1").is_none());
    let file = dev.file();
    let argv: Vec<_> = file["dead"][0]["argv"]
        .as_array()
        .unwrap()
        .iter()
        .map(|word| word.as_str().unwrap())
        .collect();
    let mut again = Command::new(argv[0]).args(&argv[1..]).spawn().unwrap();
    let pid = u64::from(again.id());
    within(SOON, "the new process is in the file", || dev.pid("node-1") == Some(pid));
    let (code, _) = dev.stop("-INT");
    assert_eq!(code, Some(0));
    within(SOON, "the adopted process ends too", || again.try_wait().unwrap().is_some());
}

fn respawns_when_asked() {
    let mut dev = Dev::start(&folder("respawns"), &["--http", "127.0.0.1:0", "--respawn"]);
    dev.ready();
    let before = dev.pid("node-3").unwrap();
    kill("-KILL", before);
    within(SOON * 2, "another process has its place", || {
        dev.pid("node-3").is_some_and(|pid| pid != before)
    });
    assert_eq!(dev.stop("-TERM").0, Some(0));
}

fn resumes_as_the_same_cluster() {
    let folder = folder("resumes");
    let argvs = |dev: &Dev| -> Vec<Value> {
        let file = dev.file();
        file["processes"].as_array().unwrap().iter().map(|one| one["argv"].clone()).collect()
    };
    let mut dev = Dev::start(&folder, &["--http", "127.0.0.1:0", "--nodes", "2", "--shards", "5"]);
    let ready = dev.ready();
    let before = argvs(&dev);
    assert_eq!(dev.stop("-TERM").0, Some(0));

    let mut dev = Dev::start(&folder, &[]);
    assert_eq!(dev.ready(), ready);
    assert_eq!(argvs(&dev), before);
    // Only one supervisor per folder.
    let mut second = Dev::start(&folder, &[]);
    assert_eq!(second.ready(), "");
    assert_eq!(second.child.wait().unwrap().code(), Some(2));
    assert_eq!(dev.stop("-TERM").0, Some(0));

    let mut other = Dev::start(&folder, &["--shards", "6"]);
    assert_eq!(other.ready(), "");
    assert_eq!(other.child.wait().unwrap().code(), Some(2));
}

fn nothing_outlives_a_killed_supervisor() {
    let mut dev = Dev::start(&folder("killed"), &["--http", "127.0.0.1:0"]);
    dev.ready();
    let pids = dev.pids();
    assert_eq!(pids.len(), 6);
    kill("-KILL", u64::from(dev.child.id()));
    within(STOP_WITHIN, "all processes end", || pids.iter().all(|(_, pid)| !is_alive(*pid)));
}

/// The part of `dkc dev add-node` and `remove-node` that the running `dkc dev` does. (The rest needs
/// a real cluster.)
fn nodes_are_added_and_removed_for_good() {
    let folder = folder("nodes");
    let flags = ["--http", "127.0.0.1:0", "--nodes", "2", "--respawn"];
    let mut dev = Dev::start(&folder, &flags);
    let ready = dev.ready();
    let ask = |request: &str| -> Value {
        let mut stream = UnixStream::connect(folder.join("dev.sock")).unwrap();
        stream.write_all(format!("{request}\n").as_bytes()).unwrap();
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    };
    let added = ask(r#"{"add": {"count": 2}}"#);
    let nodes = added["nodes"]["nodes"].as_array().unwrap();
    assert_eq!((&nodes[0]["name"], &nodes[1]["name"]), (&"node-3".into(), &"node-4".into()));
    assert_eq!(nodes[0]["pid"].as_u64(), dev.pid("node-3"));
    assert_eq!(added["nodes"]["cluster"]["nodes"], 4);
    assert!(
        ask(r#"{"stop": {"name": "node-9"}}"#)["refused"]["why"]
            .as_str()
            .is_some_and(|why| why.contains("it has node-1 node-2 node-3 node-4"))
    );
    assert!(ask("nonsense")["refused"]["why"].as_str().is_some());

    let forget = r#"{"forget": {"name": "node-3"}}"#;
    assert!(ask(forget)["refused"]["why"].as_str().is_some_and(|why| why.contains("still runs")));
    ask(r#"{"stop": {"name": "node-3"}}"#);
    within(SOON, "the node stops", || dev.pid("node-3").is_none());
    // The others are started again, and this one is not.
    let before = dev.pid("node-4").unwrap();
    kill("-KILL", before);
    within(SOON * 2, "another process has its place", || {
        dev.pid("node-4").is_some_and(|pid| pid != before)
    });
    assert_eq!(dev.pid("node-3"), None);
    assert_eq!(ask(forget)["nodes"]["cluster"]["nodes"], 3);
    assert!(!dev.file().to_string().contains("node-3"), "{}", dev.file());
    assert_eq!(dev.stop("-TERM").0, Some(0));
    assert!(!folder.join("dev.sock").exists());

    let mut dev = Dev::start(&folder, &[]);
    assert_eq!(dev.ready(), ready);
    let names: Vec<_> = dev.pids().into_iter().map(|(name, _)| name).collect();
    let want = ["etcd", "coordinator-1", "node-1", "node-2", "node-4", "gateway-1"];
    assert_eq!(names, want);
    assert_eq!(dev.stop("-TERM").0, Some(0));
}

fn commands_without_a_cluster_say_what_to_do() {
    #[track_caller]
    fn check(args: &[&str], folder: &Path, want: &str) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_dkc"));
        let output = command.arg("dev").args(args).arg("--data").arg(folder).output().unwrap();
        let printed = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {printed}");
        assert!(printed.contains(want), "{args:?}: {want:?} is not in {printed}");
    }
    let none = folder("none");
    check(&["add-node"], &none, "name the folder of a running dkc dev");
    fs::create_dir_all(&none).unwrap();
    check(&["add-node", "--count", "2"], &none, "start it with `dkc dev --data");
    check(&["remove-node", "node-1"], &none, "start it with `dkc dev --data");
    check(&["remove-node"], &none, "<NAME>");
    check(&["add-node", "--count", "0"], &none, "1..=99");

    let mut dev = Dev::start(&folder("some"), &["--http", "127.0.0.1:0", "--nodes", "1"]);
    dev.ready();
    check(&["remove-node", "node-2"], &dev.folder, "it has node-1");
    assert_eq!(dev.stop("-TERM").0, Some(0));
}

fn rejects_invalid_settings() {
    #[track_caller]
    fn check(name: &str, flags: &[&str], want: i32) {
        let mut dev = Dev::start(&folder(name), flags);
        assert_eq!(dev.ready(), "", "{flags:?}");
        assert_eq!(dev.child.wait().unwrap().code(), Some(want), "{flags:?}");
    }
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = taken.local_addr().map(|address| (address.to_string(), taken)).unwrap();
    check("taken", &["--http", &taken.0], 2);
    check("replicas", &["--http", "127.0.0.1:0", "--nodes", "2", "--replicas", "3"], 2);
    check("nodes", &["--nodes", "0"], 2);

    // A coordinator that rejects its settings; a program that is not etcd.
    for environment in [(REFUSING, "1"), ("ETCD", "/bin/echo")] {
        let flags = ["--http", "127.0.0.1:0"];
        let mut dev = Dev::start_with(&folder("config"), &flags, &[environment]);
        assert_eq!(dev.ready(), "", "{environment:?}");
        assert_eq!(dev.child.wait().unwrap().code(), Some(2), "{environment:?}");
        assert_eq!(dev.pids(), []);
    }
}
