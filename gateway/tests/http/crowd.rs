//! More clients than the limit of connections: idle connections are closed.

use std::process::Command;
use std::time::{Duration, Instant};

use crate::client::Client;
use crate::cluster::Cluster;

/// The open files of the child: 40 of them are for clients, 128 and an eighth for everything else,
/// including the sockets of this test.
const FILES: u64 = 192;
const IDLE: usize = 44;

/// The limit of open files is per process, so this test runs in a child process.
#[test]
fn a_new_client_is_served_although_as_many_are_idle_as_may_be_open() {
    let limited = format!("ulimit -n {FILES} && exec \"$@\"");
    let name = "crowd::among_idle_clients";
    let mut child = Command::new("sh");
    child.args(["-c", &limited, "sh"]).arg(std::env::current_exe().unwrap());
    let ran = child.args(["--exact", name, "--ignored", "--nocapture"]).output().unwrap();
    let output = String::from_utf8_lossy(&ran.stdout);
    assert!(ran.status.success() && output.contains("1 passed"), "{ran:?}");
}

#[test]
#[ignore = "run by `a_new_client_is_served_although_as_many_are_idle_as_may_be_open`"]
fn among_idle_clients() {
    let cluster = Cluster::start(1);
    // Some clients send nothing at all, others keep their connections after a request.
    let mut idle = Vec::new();
    for n in 0..IDLE {
        let mut client = cluster.client();
        // The last few are beyond the limit.
        if n % 2 == 0 && n < IDLE / 2 {
            assert_eq!(client.get("/livez").status, 200);
        }
        idle.push(client);
    }
    for _ in 0..5 {
        let began = Instant::now();
        let mut client = cluster.client();
        let answer = client.call("POST /v1/counters/ns/k/increment", &[], b"");
        assert_eq!(answer.status, 200);
        let took = began.elapsed();
        // About a second, or more on a busy machine. Without shedding it would be the idle timeout,
        // 75 s.
        assert!(took < Duration::from_secs(5), "it waited for {took:?}");
        idle.push(client);
    }
    let metrics = cluster.client().get("/metrics").body;
    let shed = metrics.lines().find_map(|line| line.strip_prefix("dkc_connections_shed_total "));
    assert!(shed.is_some_and(|shed| shed.parse::<u64>().is_ok_and(|n| n > 0)), "{shed:?}");
    drop::<Vec<Client>>(idle);
}
