//! Redis, etcd and a bare HTTP server as systems under load, which others would use instead.
//!
//! `scripts/setup --bench` unpacks those that a machine lacks.

use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::Context;
use bench::cpu::MeasuredProcess;
use client::Url;

use super::children::Children;
use super::subject::Subject;
use crate::dev::{etcd, ready};

/// The time limit of a peer's start.
const START_WITHIN: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(50);

/// The peer is not on this machine, so its rows are left out.
#[derive(Debug, thiserror::Error)]
#[error("{0} is not installed: scripts/setup --bench")]
pub(crate) struct PeerMissing(pub(crate) &'static str);

/// Starts the server that only answers, and returns its address.
pub(crate) fn start_hello(children: &mut Children) -> anyhow::Result<(Url, Subject)> {
    let program = std::env::current_exe().context("this executable")?;
    let (pid, line) = children.start_until_line(Command::new(program).arg("hello"))?;
    let url = Url::parse(&line).map_err(anyhow::Error::msg)?;
    Ok((url, peer("hello", vec![process("hello", pid)], 1, "nothing is stored", "nothing")))
}

/// Starts a primary of Redis and two replicas that append every command to a file and fsync it.
/// Returns the address of the primary.
pub(crate) fn start_redis(
    folder: &Path,
    children: &mut Children,
) -> anyhow::Result<(SocketAddr, Subject)> {
    let program = program("redis-server", &["usr/bin"]).ok_or(PeerMissing("redis-server"))?;
    let addresses = free_addresses(3)?;
    let mut processes = Vec::new();
    for (number, address) in addresses.iter().enumerate() {
        let data = folder.join(format!("redis-{number}"));
        fs::create_dir_all(&data)?;
        let mut command = of_peer(&program);
        command.args(["--bind", "127.0.0.1", "--port", &address.port().to_string()]);
        command.args(["--appendonly", "yes", "--appendfsync", "always", "--save", ""]);
        command.arg("--dir").arg(&data);
        command.arg("--logfile").arg(data.join("log"));
        if number > 0 {
            command.args(["--replicaof", "127.0.0.1", &addresses[0].port().to_string()]);
        }
        let pid = children.start(&mut command)?;
        processes.push(process(if number == 0 { "primary" } else { "replica" }, pid));
    }
    until(|| Ok(replicas_online(addresses[0])? == addresses.len() - 1))
        .context("Redis' replicas")?;
    let fsync = "of the primary before the answer (AOF always), of replicas at some time";
    let subject = peer("Redis", processes, 3, fsync, "the primary");
    Ok((addresses[0], subject))
}

/// Returns how many replicas follow the primary.
fn replicas_online(address: SocketAddr) -> std::io::Result<usize> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(START_WITHIN))?;
    stream.write_all(b"INFO replication\r\nQUIT\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text.matches("state=online").count())
}

/// Starts three members of etcd, and returns their addresses.
pub(crate) fn start_etcd(
    folder: &Path,
    children: &mut Children,
) -> anyhow::Result<(Vec<Url>, Subject)> {
    let program = etcd::find().map_err(anyhow::Error::msg)?;
    let addresses = free_addresses(6)?;
    let (clients, peers) = addresses.split_at(3);
    let members: Vec<_> =
        peers.iter().enumerate().map(|(at, peer)| format!("m{at}=http://{peer}")).collect();
    let mut processes = Vec::new();
    for (number, (client, peer)) in clients.iter().zip(peers).enumerate() {
        let (client, peer) = (format!("http://{client}"), format!("http://{peer}"));
        let mut command = Command::new(&program);
        command.args(["--name", &format!("m{number}"), "--log-level", "error"]);
        command.arg("--data-dir").arg(folder.join(format!("etcd-{number}")));
        command.args(["--listen-client-urls", &client, "--advertise-client-urls", &client]);
        command.args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer]);
        command.args(["--initial-cluster", &members.join(",")]);
        command.stderr(fs::File::create(folder.join(format!("etcd-{number}.log")))?);
        processes.push(process("etcd", children.start(&mut command)?));
    }
    let urls: Result<Vec<Url>, String> =
        clients.iter().map(|client| Url::parse(&format!("http://{client}"))).collect();
    let urls = urls.map_err(anyhow::Error::msg)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let all = async {
        for url in &urls {
            ready::etcd(url.clone()).await;
        }
    };
    let in_time = runtime.block_on(async { tokio::time::timeout(START_WITHIN, all).await });
    in_time.context("etcd has no leader")?;
    let fsync = "of a majority, before the answer";
    Ok((urls, peer("etcd", processes, 3, fsync, "a majority")))
}

/// Returns a peer as the system under load.
pub(crate) fn peer(
    system: &str,
    processes: Vec<MeasuredProcess>,
    nodes: usize,
    fsync: &str,
    acknowledgement: &str,
) -> Subject {
    Subject {
        system: system.to_owned(),
        processes,
        folder: None,
        nodes,
        shards: 1,
        replicas: [nodes; 2],
        fsync: fsync.to_owned(),
        acknowledgement: acknowledgement.to_owned(),
    }
}

fn process(role: &str, pid: u32) -> MeasuredProcess {
    MeasuredProcess { role: role.to_owned(), pid, metrics: None }
}

/// Finds a program of a peer: in one of the `folders` of what `scripts/setup --bench` unpacked,
/// else in the same folders of the machine. A `*` in a folder stands for a version.
pub(crate) fn program(name: &str, folders: &[&str]) -> Option<PathBuf> {
    let roots = [peers_folder(), Some(PathBuf::from("/"))];
    let candidates = roots.into_iter().flatten().flat_map(|root| {
        folders.iter().flat_map(move |folder| versions(&root, folder)).collect::<Vec<_>>()
    });
    candidates.map(|folder| folder.join(name)).find(|path| path.is_file())
}

fn versions(root: &Path, folder: &str) -> Vec<PathBuf> {
    let Some((before, after)) = folder.split_once("/*/") else { return vec![root.join(folder)] };
    let entries = fs::read_dir(root.join(before)).into_iter().flatten().flatten();
    entries.map(|entry| entry.path().join(after)).collect()
}

fn peers_folder() -> Option<PathBuf> {
    etcd::cache_folder().map(|cache| cache.join("peers"))
}

/// Returns a command of a peer, with the libraries that were unpacked beside it.
pub(crate) fn of_peer(program: &Path) -> Command {
    let mut command = Command::new(program);
    if let Some(folder) = peers_folder().filter(|folder| program.starts_with(folder)) {
        let libraries = format!("usr/lib/{}-linux-gnu", std::env::consts::ARCH);
        command.env("LD_LIBRARY_PATH", folder.join(libraries));
    }
    command
}

fn free_addresses(count: usize) -> std::io::Result<Vec<SocketAddr>> {
    // All listeners are kept until every address is known, so that none is chosen twice.
    let bind = |_| TcpListener::bind((Ipv4Addr::LOCALHOST, 0));
    let listeners = (0..count).map(bind).collect::<std::io::Result<Vec<_>>>()?;
    listeners.iter().map(TcpListener::local_addr).collect()
}

/// Repeats a check until it is true.
pub(crate) fn until(mut check: impl FnMut() -> std::io::Result<bool>) -> anyhow::Result<()> {
    let begun = Instant::now();
    loop {
        match check() {
            Ok(true) => return Ok(()),
            Ok(false) if begun.elapsed() > START_WITHIN => anyhow::bail!("not ready in time"),
            Err(error) if begun.elapsed() > START_WITHIN => return Err(error.into()),
            _ => std::thread::sleep(POLL),
        }
    }
}
