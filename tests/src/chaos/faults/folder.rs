//! Faults of data folders: an older state is put back, a copy is started, a folder is empty, or a
//! node lags far behind.

use std::process::Child;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::{Environment, Fault};
use crate::chaos::fleet::Role;
use crate::chaos::sandbox::run;
use crate::cluster::http::{Client, DEADLINE};

const REFUSED: i32 = 4;

/// A copy of the folder is put back after the node has continued to run, like a snapshot of a
/// virtual machine.
///
/// A copy from before the last start lacks the nonce that etcd holds: the node must refuse it (exit
/// code 4), and an operator gives it an empty folder. A copy from the same boot looks valid to the
/// node; its primaries find that it lacks entries that it acknowledged, and fill it again.
#[derive(Default)]
pub struct Rollback {
    victim: String,
}

/// A time that is long enough for a start (TTL + 1 s) and the recovery.
const RUNS: Duration = Duration::from_secs(6);

impl Fault for Rollback {
    fn begin(&mut self, env: &mut Environment) -> Result<String, String> {
        self.victim = env.fleet.victim(&mut env.rng);
        let data = env.fleet.data(&self.victim);
        let image = data.with_file_name("image");
        let within_one_run = env.rng.percent(50);
        if within_one_run {
            env.fleet.pause(&self.victim);
        } else {
            env.fleet.hold(&self.victim);
            env.fleet.wait_until_dead(&self.victim);
        }
        let _was_none = std::fs::remove_dir_all(&image);
        let copied = run("cp", &["-a", &data.display().to_string(), &image.display().to_string()]);
        if within_one_run {
            env.fleet.resume(&self.victim);
        } else {
            env.fleet.release(&self.victim);
        }
        // The node continues to run under load.
        std::thread::sleep(RUNS);
        env.fleet.watch();
        env.fleet.hold(&self.victim);
        env.fleet.wait_until_dead(&self.victim);
        let put_back = copied.and_then(|()| {
            let swapped = std::fs::remove_dir_all(&data)
                .and_then(|()| env.fleet.settle_disk(&self.victim))
                .and_then(|()| std::fs::rename(&image, &data));
            swapped.map_err(|error| error.to_string())
        });
        if let Err(why) = put_back {
            env.fleet.release(&self.victim);
            return Err(why);
        }
        if within_one_run {
            return Ok(format!("{}, within one run", self.victim));
        }
        env.fleet.must_refuse(&self.victim);
        Ok(format!("{}, to before its last start", self.victim))
    }

    fn heal(&mut self, env: &mut Environment) {
        env.fleet.release(&self.victim);
    }
}

/// A second process is started on a copy of the folder of a running node, with its name and the
/// address of another node.
///
/// The second process must refuse with exit code 4, and the original must not be disturbed.
#[derive(Default)]
pub struct ClonedFolder {
    victim: String,
    copy: Option<Child>,
    begun: Option<Instant>,
}

const REFUSES_WITHIN: Duration = Duration::from_secs(30);

impl Fault for ClonedFolder {
    fn begin(&mut self, env: &mut Environment) -> Result<String, String> {
        let nodes = env.some(Role::Node, 2);
        let [victim, host] = nodes.as_slice() else { return Err("no nodes".to_owned()) };
        self.victim = victim.clone();
        let data = env.fleet.data(victim);
        let copy = data.with_file_name("copy").display().to_string();
        let _was_none = std::fs::remove_dir_all(&copy);
        // The node is paused during the copy, which is then consistent like a snapshot of the disk.
        env.fleet.pause(victim);
        let copied = run("cp", &["-a", &data.display().to_string(), &copy]);
        env.fleet.resume(victim);
        copied?;
        let there = env.fleet.member(host).address;
        let mut argv = env.fleet.argv(victim);
        for at in 1..argv.len() {
            match argv[at - 1].as_str() {
                "--data" => argv[at] = copy.clone(),
                "--listen" => argv[at] = format!("{there}:7001"),
                "--metrics" => argv[at] = format!("{there}:9001"),
                _ => {}
            }
        }
        self.copy = Some(env.fleet.spawn(host, &format!("{victim}-copy"), &argv));
        self.begun = Some(Instant::now());
        Ok(format!("{victim}, started again on {host}"))
    }

    fn heal(&mut self, env: &mut Environment) {
        let Some(mut copy) = self.copy.take() else { return };
        let limit = self.begun.unwrap_or_else(Instant::now) + REFUSES_WITHIN;
        let code = loop {
            match copy.try_wait() {
                Ok(Some(status)) => break status.code(),
                _ if Instant::now() > limit => {
                    let _was_ended = copy.kill();
                    let _reaped = copy.wait();
                    break None;
                }
                _ => std::thread::sleep(Duration::from_millis(50)),
            }
        };
        if code != Some(REFUSED) {
            let victim = &self.victim;
            env.broken.push(format!("a copy of {victim}'s folder ended with {code:?}, not with 4"));
        }
        let copy = env.fleet.data(&self.victim).with_file_name("copy");
        let _was_removed = std::fs::remove_dir_all(copy);
    }
}

/// The folders of one node, or of all, are replaced by empty ones, as when volumes are not mounted
/// at a boot, and later put back.
///
/// A node must not start as a new store there: it refuses with exit code 4, its store is not given
/// up, and it continues when its folder is back.
#[derive(Default)]
pub struct Unmount {
    victims: Vec<String>,
}

impl Fault for Unmount {
    fn begin(&mut self, env: &mut Environment) -> Result<String, String> {
        let all = env.rng.percent(40);
        // A node whose folder was emptied on purpose is left out, since it starts with `--replace`.
        let replaced = env.fleet.replaced.clone();
        let names = env.some(Role::Node, if all { 5 } else { 1 });
        let names: Vec<_> = names.into_iter().filter(|name| !replaced.contains(name)).collect();
        if names.is_empty() {
            return Err("all nodes were replaced before".to_owned());
        }
        names.iter().for_each(|name| env.fleet.hold(name));
        for name in &names {
            env.fleet.wait_until_dead(name);
            match env.fleet.unmount_data(name) {
                Ok(()) => self.victims.push(name.clone()),
                Err(why) => env.broken.push(format!("{name}: {why}")),
            }
        }
        names.iter().for_each(|name| env.fleet.release(name));
        Ok(names.join(", "))
    }

    fn heal(&mut self, env: &mut Environment) {
        self.victims.iter().for_each(|name| env.fleet.hold(name));
        for name in &self.victims {
            env.fleet.wait_until_dead(name);
            match env.fleet.mount_data(name) {
                Ok(0) => env.broken.push(format!("{name} has not refused an empty folder")),
                Ok(_) => {}
                Err(why) => env.broken.push(why),
            }
        }
        self.victims.iter().for_each(|name| env.fleet.release(name));
    }
}

/// A node is down while its peers write more than they keep of their logs, so only a snapshot can
/// fill it.
#[derive(Default)]
pub struct BigLag {
    victim: String,
    stop: Arc<AtomicBool>,
    writer: Option<JoinHandle<u64>>,
}

/// The namespace of counters that only fill the logs and are never checked.
const BALLAST: &str = "ballast";

impl Fault for BigLag {
    fn begin(&mut self, env: &mut Environment) -> Result<String, String> {
        self.victim = env.any(&[Role::Node]);
        env.fleet.hold(&self.victim);
        let (gateways, stop) = (env.fleet.gateways(), self.stop.clone());
        self.writer = Some(std::thread::spawn(move || fill_logs(&gateways, &stop)));
        Ok(self.victim.clone())
    }

    fn heal(&mut self, env: &mut Environment) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(Ok(bytes)) = self.writer.take().map(JoinHandle::join) {
            crate::note(&format!("{:>15}  {} MiB of keys written meanwhile", "", bytes >> 20));
        }
        env.fleet.release(&self.victim);
    }
}

/// Adds to new counters with long names until `stop` is set. Returns the bytes of accepted names.
fn fill_logs(gateways: &[String], stop: &AtomicBool) -> u64 {
    const NAME_BYTES: usize = 800;
    const AT_ONCE: usize = 100;
    let mut clients: Vec<_> = gateways.iter().map(|gateway| Client::new(gateway)).collect();
    let (mut bytes, mut next) = (0, 0_u64);
    while !stop.load(Ordering::Relaxed) {
        let at = next as usize % clients.len();
        let names = (0..AT_ONCE).map(|item| format!("{}-{next}-{item}\n", "x".repeat(NAME_BYTES)));
        let body: String = names.collect();
        let path = format!("/v1/counters/{BALLAST}/increment");
        let headers = [("Content-Type", "text/plain")];
        let answer = clients[at].call("POST", &path, &headers, body.as_bytes(), DEADLINE);
        if answer.is_ok_and(|answer| answer.status == 200) {
            bytes += body.len() as u64;
        }
        next += 1;
        std::thread::sleep(Duration::from_millis(20));
    }
    bytes
}
