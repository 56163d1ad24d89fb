//! Data folders that are not what they were: put back to an older state, or there twice.

use std::process::Child;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::{Fault, Field};
use crate::chaos::fleet::Role;
use crate::chaos::sandbox::run;
use crate::cluster::http::{Client, DEADLINE};

const REFUSED: i32 = 4;

/// A copy of the folder is put back after the node has run on: a snapshot of a virtual machine.
///
/// One from before its last start does not know the nonce that etcd knows: it must refuse (exit code
/// 4), and an operator gives it an empty folder. One of the same run looks like its present self; its
/// primaries find it short of what it acknowledged, and it is filled anew.
#[derive(Default)]
pub struct Rollback {
    victim: String,
}

/// Long enough for a start: TTL + 1 s, and its recovery.
const RUNS: Duration = Duration::from_secs(6);

impl Fault for Rollback {
    fn begin(&mut self, field: &mut Field) -> Result<String, String> {
        self.victim = field.fleet.victim(&mut field.rng);
        let data = field.fleet.data(&self.victim);
        let image = data.with_file_name("image");
        let within_one_run = field.rng.percent(50);
        if within_one_run {
            field.fleet.pause(&self.victim);
        } else {
            field.fleet.hold(&self.victim);
            field.fleet.wait_until_dead(&self.victim);
        }
        let _was_none = std::fs::remove_dir_all(&image);
        let copied = run("cp", &["-a", &data.display().to_string(), &image.display().to_string()]);
        if within_one_run {
            field.fleet.resume(&self.victim);
        } else {
            field.fleet.release(&self.victim);
        }
        // It runs on, under load.
        std::thread::sleep(RUNS);
        field.fleet.watch();
        field.fleet.hold(&self.victim);
        field.fleet.wait_until_dead(&self.victim);
        let put_back = copied.and_then(|()| {
            let swapped = std::fs::remove_dir_all(&data)
                .and_then(|()| field.fleet.settle_disk(&self.victim))
                .and_then(|()| std::fs::rename(&image, &data));
            swapped.map_err(|error| error.to_string())
        });
        if let Err(why) = put_back {
            field.fleet.release(&self.victim);
            return Err(why);
        }
        if within_one_run {
            return Ok(format!("{}, within one run", self.victim));
        }
        field.fleet.must_refuse(&self.victim);
        Ok(format!("{}, to before its last start", self.victim))
    }

    fn heal(&mut self, field: &mut Field) {
        field.fleet.release(&self.victim);
    }
}

/// A second process on a copy of a running node's folder, under its name, at another's address.
///
/// It must refuse with exit code 4, and the original must not notice.
#[derive(Default)]
pub struct Clone {
    victim: String,
    copy: Option<Child>,
    begun: Option<Instant>,
}

const REFUSES_WITHIN: Duration = Duration::from_secs(30);

impl Fault for Clone {
    fn begin(&mut self, field: &mut Field) -> Result<String, String> {
        let nodes = field.some(Role::Node, 2);
        let [victim, host] = nodes.as_slice() else { return Err("no nodes".to_owned()) };
        self.victim = victim.clone();
        let data = field.fleet.data(victim);
        let copy = data.with_file_name("copy").display().to_string();
        let _was_none = std::fs::remove_dir_all(&copy);
        // Still, while it is copied: as a snapshot of the disk would be.
        field.fleet.pause(victim);
        let copied = run("cp", &["-a", &data.display().to_string(), &copy]);
        field.fleet.resume(victim);
        copied?;
        let there = field.fleet.member(host).address;
        let mut argv = field.fleet.argv(victim);
        for at in 1..argv.len() {
            match argv[at - 1].as_str() {
                "--data" => argv[at] = copy.clone(),
                "--listen" => argv[at] = format!("{there}:7001"),
                "--metrics" => argv[at] = format!("{there}:9001"),
                _ => {}
            }
        }
        self.copy = Some(field.fleet.spawn(host, &format!("{victim}-copy"), &argv));
        self.begun = Some(Instant::now());
        Ok(format!("{victim}, started again on {host}"))
    }

    fn heal(&mut self, field: &mut Field) {
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
            field
                .broken
                .push(format!("a copy of {victim}'s folder ended with {code:?}, not with 4"));
        }
        let copy = field.fleet.data(&self.victim).with_file_name("copy");
        let _was_removed = std::fs::remove_dir_all(copy);
    }
}

/// The folders of one node, or of all, are replaced by empty ones, as when volumes are not mounted at a boot, and put back.
///
/// A node must not start as a new store there: it refuses with exit code 4, its store is not given
/// up, and it goes on when its folder is back.
#[derive(Default)]
pub struct Unmount {
    victims: Vec<String>,
}

impl Fault for Unmount {
    fn begin(&mut self, field: &mut Field) -> Result<String, String> {
        let all = field.rng.percent(40);
        // Those whose folder was emptied on purpose are started as new stores, with `--replace`.
        let replaced = field.fleet.replaced.clone();
        let names = field.some(Role::Node, if all { 5 } else { 1 });
        let names: Vec<_> = names.into_iter().filter(|name| !replaced.contains(name)).collect();
        if names.is_empty() {
            return Err("all nodes were replaced before".to_owned());
        }
        names.iter().for_each(|name| field.fleet.hold(name));
        for name in &names {
            field.fleet.wait_until_dead(name);
            match field.fleet.unmount_data(name) {
                Ok(()) => self.victims.push(name.clone()),
                Err(why) => field.broken.push(format!("{name}: {why}")),
            }
        }
        names.iter().for_each(|name| field.fleet.release(name));
        Ok(names.join(", "))
    }

    fn heal(&mut self, field: &mut Field) {
        self.victims.iter().for_each(|name| field.fleet.hold(name));
        for name in &self.victims {
            field.fleet.wait_until_dead(name);
            match field.fleet.mount_data(name) {
                Ok(0) => field.broken.push(format!("{name} has not refused an empty folder")),
                Ok(_) => {}
                Err(why) => field.broken.push(why),
            }
        }
        self.victims.iter().for_each(|name| field.fleet.release(name));
    }
}

/// A node is away while more comes in than its peers keep of their logs: only a whole copy can fill it then.
#[derive(Default)]
pub struct BigLag {
    victim: String,
    stop: Arc<AtomicBool>,
    writer: Option<JoinHandle<u64>>,
}

/// Nobody counts there: these counters are only to fill logs.
const BALLAST: &str = "ballast";

impl Fault for BigLag {
    fn begin(&mut self, field: &mut Field) -> Result<String, String> {
        self.victim = field.any(&[Role::Node]);
        field.fleet.hold(&self.victim);
        let (gateways, stop) = (field.fleet.gateways(), self.stop.clone());
        self.writer = Some(std::thread::spawn(move || fill_logs(&gateways, &stop)));
        Ok(self.victim.clone())
    }

    fn heal(&mut self, field: &mut Field) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(Ok(bytes)) = self.writer.take().map(JoinHandle::join) {
            crate::note(&format!("{:>15}  {} MiB of keys came in meanwhile", "", bytes >> 20));
        }
        field.fleet.release(&self.victim);
    }
}

/// Adds to new counters of long names until it is to stop. Returns how many bytes of names were taken.
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
