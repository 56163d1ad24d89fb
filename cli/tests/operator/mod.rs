//! The commands of operators: `--check-config`, `dkc ready`, `dkc doctor` and `dkc status`.

mod records;

use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::process::{Command, Output, Stdio};

use engine::ids::StoreId;
use engine::store::log::group::{Owner, SegmentHeader};
use serde_json::{Value, json};

use crate::fake::{FakeGateway, Fate};
use crate::{code, dkc};

/// An address at which nothing listens.
const UNREACHABLE: &str = "127.0.0.1:1";

fn role(args: &[&str], environment: &[(&str, &str)]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dkc"));
    command.args(args).envs(environment.iter().copied()).output().unwrap()
}

#[track_caller]
fn check(args: &[&str], want_code: i32, want: &str) {
    let output = role(args, &[]);
    let printed = String::from_utf8_lossy(&output.stderr);
    assert_eq!(code(&output), want_code, "{args:?}: {printed}");
    assert!(printed.contains(want), "{args:?}: {printed}");
}

#[test]
fn the_configuration_is_printed_with_its_origins() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("dkc.toml");
    std::fs::write(&file, "workers = 2\nlease-ttl = 3\nlinger-us = 7\n").unwrap();
    let file = file.to_str().unwrap();
    let args = [
        "gateway",
        "--check-config",
        "--config",
        file,
        "--http",
        "127.0.0.1:0",
        "--linger-us",
        "9",
    ];
    let output =
        role(&args, &[("DKC_ETCD", UNREACHABLE), ("DKC_LEASE_TTL", "4"), ("DKC_LINGER_US", "8")]);
    let printed = String::from_utf8_lossy(&output.stderr);
    assert_eq!(code(&output), 0, "{printed}");
    assert!(
        printed.contains("warning: --etcd 127.0.0.1:1"),
        "a start would wait, and this is reported: {printed}"
    );
    let text = String::from_utf8(output.stdout).unwrap();
    let settings: toml::Table = text.parse().unwrap();
    assert_eq!(
        (&settings["workers"], &settings["lease-ttl"], &settings["linger-us"]),
        (&2.into(), &4.into(), &9.into())
    );
    let origin = |key: &str| {
        let line = text.lines().find(|line| line.starts_with(&format!("{key} ="))).unwrap();
        line.split_once("  # ").unwrap().1
    };
    assert_eq!(origin("linger-us"), "flag");
    assert_eq!(origin("lease-ttl"), "env DKC_LEASE_TTL");
    assert_eq!(origin("workers"), format!("file {file}"));
    assert_eq!(origin("cluster"), "default");
    assert_eq!(origin("log"), "default");
}

#[test]
fn nonsense_is_refused_before_a_start() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let gateway = ["gateway", "--check-config", "--etcd", UNREACHABLE, "--http"];
    check(
        &[&gateway[..], &[&address]].concat(),
        2,
        &format!("--http {address}: cannot listen on this address"),
    );
    let twice = ["127.0.0.1:30999", "--metrics", "127.0.0.1:30999"];
    check(&[&gateway[..], &twice].concat(), 2, "--metrics 127.0.0.1:30999");
    let little = ["127.0.0.1:0", "--memory-bytes", "67108864"];
    check(&[&gateway[..], &little].concat(), 2, "--memory-bytes 67108864 is too little");
    check(&["gateway", "--lease-ttl", "0"], 2, "1..=3600");
    check(&["gateway", "--etcd", "nowhere"], 2, "host:port");
    check(&["gateway", "--cluster", "a/b"], 2, "'a/b'");
    check(&["gateway", "--config", "/no/such/file"], 2, "/no/such/file");
    let coordinator = [
        "coordinator",
        "--check-config",
        "--name",
        "c",
        "--etcd",
        UNREACHABLE,
        "--listen",
        "127.0.0.1:0",
    ];
    check(
        &[&coordinator[..], &["--replicas", "3", "--min-in-sync", "4"]].concat(),
        2,
        "--min-in-sync 4",
    );
    check(&coordinator, 0, "warning: --etcd");
    let node = [
        "storage-node",
        "--check-config",
        "--name",
        "n",
        "--etcd",
        UNREACHABLE,
        "--listen",
        "127.0.0.1:0",
    ];
    check(&[&node[..], &["--data", "/dev/null"]].concat(), 2, "--data /dev/null: not a directory");
    check(&[&node[..], &["--data", "/tmp", "--memory-bytes", "7"]].concat(), 2, "--memory-bytes 7");
    check(&node, 2, "--data");
}

/// Addresses that other processes could not dial, and suspicious ones; `tests/processes.py` tests
/// many more.
#[test]
fn an_address_is_looked_at_by_every_role() {
    let roles = [
        &["coordinator", "--check-config", "--name", "c", "--listen", "127.0.0.1:0"][..],
        &[
            "storage-node",
            "--check-config",
            "--name",
            "n",
            "--data",
            "/tmp/none",
            "--listen",
            "127.0.0.1:0",
        ][..],
    ];
    for role in roles {
        let with = |etcd, address| [role, &["--etcd", etcd, "--advertise", address]].concat();
        check(&with(UNREACHABLE, "node-9"), 2, "--advertise");
        check(&with(UNREACHABLE, "0.0.0.0:7019"), 2, "--advertise");
        check(&with("https://etcd:2379", "node-9:7019"), 2, "can't use TLS");
        check(&with(UNREACHABLE, "node-9:7019"), 0, "warning: --etcd");
        check(
            &with("etcd.invalid:2379", "127.0.0.1:7019"),
            0,
            "only processes of this machine can dial 127.0.0.1:7019",
        );
    }
    check(&["gateway", "--check-config", "--http", "localhost:8080"], 2, "\"localhost\" is a name");
    check(&["dev", "--http", "8080"], 2, "no port");
}

#[test]
fn an_unknown_variable_is_reported() {
    let args = ["gateway", "--check-config", "--etcd", UNREACHABLE, "--http", "127.0.0.1:0"];
    let output = role(&args, &[("DKC_WORKRES", "2")]);
    let printed = String::from_utf8_lossy(&output.stderr);
    assert_eq!(code(&output), 0, "{printed}");
    assert!(
        printed.contains("warning: unknown environment variable DKC_WORKRES")
            && printed.contains("DKC_WORKERS"),
        "{printed}"
    );
}

/// The address of a server that answers one request.
fn serving(status: &'static str, body: &'static str) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let head = BufReader::new(&stream)
            .lines()
            .map_while(Result::ok)
            .take_while(|line| !line.is_empty());
        let head: Vec<_> = head.collect();
        assert!(head[0].starts_with("GET /readyz HTTP/1.1"), "{head:?}");
        let length = body.len();
        write!(stream, "HTTP/1.1 {status}\r\nContent-Length: {length}\r\n\r\n{body}").unwrap();
    });
    address
}

/// For health checks in images without curl.
#[test]
fn whether_a_process_is_ready_is_an_exit_code() {
    let ready = serving("200 OK", "ok\n");
    check(&["ready", &ready], 0, "");
    let waits = serving("503 Service Unavailable", "etcd\n");
    check(&["ready", &format!("http://{waits}")], 1, "");
    check(&["ready", UNREACHABLE], 1, UNREACHABLE);
    check(&["ready"], 2, "HOST:PORT");
}

/// A port that is in use is a wrong setting.
#[test]
fn a_role_that_can_not_listen_ends_with_2() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = &taken.local_addr().unwrap().to_string();
    check(&["gateway", "--etcd", UNREACHABLE, "--http", address], 2, address);
    let coordinator = ["coordinator", "--name", "c", "--etcd", UNREACHABLE, "--listen", address];
    check(&coordinator, 2, address);
}

/// Without etcd the owner of the data cannot be compared, but it is printed.
#[test]
fn the_owner_of_the_data_is_printed() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().to_str().unwrap();
    let node = ["storage-node", "--check-config", "--name", "n", "--etcd", UNREACHABLE];
    let args = [&node[..], &["--listen", "127.0.0.1:0", "--data", data]].concat();
    let printed = |args: &[&str]| String::from_utf8(role(args, &[]).stderr).unwrap();
    assert!(!printed(&args).contains("holds store"), "an empty folder has no owner");
    let owner = Owner { cluster: 0xc0ffee, store: StoreId(7) };
    let header = SegmentHeader { owner, segment: 1, first_group: 1 };
    std::fs::create_dir(folder.path().join("log")).unwrap();
    std::fs::write(folder.path().join("log/1.log"), header.encode()).unwrap();
    let printed = printed(&args);
    assert!(printed.contains(&format!("--data {data}: holds store {}", StoreId(7))), "{printed}");
    assert!(printed.contains(&format!("of cluster {:032x}", 0xc0ffee)), "{printed}");
}

#[test]
fn doctor_prints_its_results() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().to_str().unwrap();
    let output = role(&["doctor", "--json", "--data", data], &[]);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let checks: Vec<_> =
        report["checks"].as_array().unwrap().iter().map(|one| &one["check"]).collect();
    assert_eq!(
        checks,
        ["fsync", "disk space", "clock", "open files", "memory", "/proc", "processor"]
    );
    // The test does not depend on this machine, but the exit code must match the results.
    assert_eq!(code(&output) == 0, report["bad"] == 0, "{report}");
    for one in report["checks"].as_array().unwrap() {
        assert_eq!(one["verdict"] == "ok", one.get("advice").is_none(), "{one}");
    }
    let output = role(&["doctor", "--data", data, "--etcd", UNREACHABLE], &[]);
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(code(&output), 1);
    assert!(text.contains("BAD   etcd        127.0.0.1:1"), "{text}");
    let output = role(&["doctor", "--data", data, "--memory-bytes", "999999999999999"], &[]);
    assert_eq!(code(&output), 1, "a budget beyond the machine's memory");
}

/// One shard of two nodes.
fn cluster(node_2: &str, primary: &str, epoch: u32) -> Value {
    json!({
        "cluster": "dkc",
        "nodes": [{"name": "node-1", "state": "up", "boot": 1, "address": "a:1", "zone": "z1"},
                  {"name": "node-2", "state": node_2, "boot": 1, "address": "b:1", "zone": ""}],
        "shards": [{"id": 0, "state": "open", "epoch": epoch, "primary": primary, "isr": ["node-1", "node-2"],
                    "learners": [], "digests_agree": true, "replicas": []}]
    })
}

#[test]
fn a_watch_prints_changes() {
    for as_json in [false, true] {
        let gateway = FakeGateway::start(|_| Fate::Apply);
        let set = |cluster| gateway.state.lock().unwrap().cluster = Some(cluster);
        set(cluster("up", "node-2", 1));
        let mut child = Command::new(env!("CARGO_BIN_EXE_dkc"))
            .args(["status", "--watch", "--url", &gateway.url()])
            .args(as_json.then_some("--json"))
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut next = || lines.next().unwrap().unwrap();
        let first = next();
        set(cluster("down", "node-1", 2));
        let second = next();
        if as_json {
            let (first, second): (Value, Value) =
                (serde_json::from_str(&first).unwrap(), serde_json::from_str(&second).unwrap());
            assert_eq!(
                (&first["cluster"], &first["summary"]["nodes_up"]),
                (&json!("dkc"), &json!(2))
            );
            assert_eq!(
                second["changes"],
                json!(["node-2 down", "1 shard moved: 1 node-2 → node-1"])
            );
            assert!(second["time_ms"].as_u64() >= first["time_ms"].as_u64());
        } else {
            assert!(
                first.ends_with(" cluster dkc: 2 of 2 nodes up, 1 of 1 shards open"),
                "{first}"
            );
            assert!(second.ends_with(" node-2 down") && second.as_bytes()[2] == b':', "{second}");
            assert!(next().ends_with(" 1 shard moved: 1 node-2 → node-1"));
        }
        child.kill().unwrap();
        child.wait().unwrap();
    }
}

#[test]
fn a_status_is_short_unless_all_is_asked_for() {
    let gateway = FakeGateway::start(|_| Fate::Apply);
    gateway.state.lock().unwrap().cluster = Some(cluster("up", "node-2", 1));
    let printed = |args: &[&str]| String::from_utf8(dkc(args, &gateway.url(), b"").stdout).unwrap();
    let text = printed(&["status"]);
    assert!(text.contains("node-1  up     z1"), "{text}");
    assert!(!text.contains("SHARD "), "{text}");
    assert!(printed(&["status", "--all"]).contains("SHARD  STATE"), "{text}");
}
