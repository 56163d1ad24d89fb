//! Killed processes: one, one repeatedly, or all; and graceful stops, one after the other.

use std::time::{Duration, Instant};

use super::{Environment, Fault};
use crate::chaos::fleet::Role;

const OURS: &[Role] = &[Role::Node, Role::Node, Role::Node, Role::Gateway, Role::Coordinator];

/// One or two processes of the service are killed at the same moment and stay down for a while.
#[derive(Default)]
pub struct Kill {
    victims: Vec<String>,
}

impl Fault for Kill {
    fn begin(&mut self, env: &mut Environment) -> Result<String, String> {
        self.victims = vec![env.any(OURS)];
        if env.rng.percent(40) {
            self.victims.push(env.any(OURS));
        }
        self.victims.dedup();
        for victim in &self.victims {
            env.fleet.hold(victim);
        }
        Ok(self.victims.join(", "))
    }

    fn heal(&mut self, env: &mut Environment) {
        for victim in &self.victims {
            env.fleet.release(victim);
        }
    }
}

/// A process is killed and restarted repeatedly: before it has its lock, during recovery, or just
/// after.
#[derive(Default)]
pub struct KillLoop {
    victim: String,
    next: Option<Instant>,
}

impl Fault for KillLoop {
    fn begin(&mut self, env: &mut Environment) -> Result<String, String> {
        self.victim = env.any(OURS);
        self.next = Some(Instant::now());
        Ok(self.victim.clone())
    }

    fn tick(&mut self, env: &mut Environment) {
        if self.next.is_some_and(|next| next <= Instant::now()) {
            env.fleet.hold(&self.victim);
            env.fleet.release(&self.victim);
            self.next = Some(Instant::now() + Duration::from_millis(env.rng.between(10, 5_000)));
        }
    }

    fn heal(&mut self, _env: &mut Environment) {}
}

/// A process gets SIGTERM repeatedly, also during its start, and must always stop gracefully.
#[derive(Default)]
pub struct StopLoop {
    victim: String,
    runs_for: Duration,
}

/// The time before the next signal: a start takes some fifty milliseconds, the notification of
/// other processes takes longer.
const RUNS_FOR_MS: &[u64] = &[0, 0, 50, 200, 1_000, 3_000];

impl Fault for StopLoop {
    fn begin(&mut self, env: &mut Environment) -> Result<String, String> {
        self.victim = env.any(OURS);
        Ok(self.victim.clone())
    }

    fn tick(&mut self, env: &mut Environment) {
        if env.fleet.member(&self.victim).has_run_for(self.runs_for) {
            env.fleet.ask_to_stop(&self.victim);
            let millis = env.rng.pick(RUNS_FOR_MS).unwrap_or(0);
            self.runs_for = Duration::from_millis(millis);
        }
    }

    fn heal(&mut self, _env: &mut Environment) {}
}

/// All nodes, gateways and coordinators, and sometimes etcd, are killed at once.
pub struct KillAll;

impl Fault for KillAll {
    fn begin(&mut self, env: &mut Environment) -> Result<String, String> {
        let with_etcd = env.rng.percent(50);
        let names = env.fleet.members.iter().filter(|one| with_etcd || one.role != Role::Etcd);
        for name in names.map(|one| one.name.clone()).collect::<Vec<_>>() {
            env.fleet.hold(&name);
        }
        Ok(if with_etcd { "everything" } else { "everything but etcd" }.to_owned())
    }

    fn heal(&mut self, env: &mut Environment) {
        let down: Vec<_> = env.fleet.members.iter().map(|one| one.name.clone()).collect();
        for name in down {
            // A process that another fault keeps down stays down: holds are counted.
            if !env.fleet.member(&name).runs() {
                env.fleet.release(&name);
            }
        }
    }
}

/// Every node gets SIGTERM, one after the other, as in an upgrade.
#[derive(Default)]
pub struct RollingRestart {
    left: Vec<String>,
    last: Option<String>,
}

/// The time that a node has run again before the next one is stopped. A node is back after a second
/// and its recovery, since it gives up its lease when it stops.
const RUNS_AGAIN: Duration = Duration::from_millis(2_500);

impl Fault for RollingRestart {
    fn begin(&mut self, env: &mut Environment) -> Result<String, String> {
        self.left = env.some(Role::Node, 5);
        Ok(format!("asked to stop in turn: {}", self.left.join(", ")))
    }

    fn tick(&mut self, env: &mut Environment) {
        let is_back = |last: &String| env.fleet.member(last).has_run_for(RUNS_AGAIN);
        if self.last.as_ref().is_none_or(is_back)
            && let Some(name) = self.left.pop()
        {
            env.fleet.ask_to_stop(&name);
            self.last = Some(name);
        }
    }

    fn heal(&mut self, _env: &mut Environment) {}
}

/// All nodes lose power at the same moment, and with it all writes that no sync covered.
#[derive(Default)]
pub struct PowerCut {
    victims: Vec<String>,
}

impl Fault for PowerCut {
    fn begin(&mut self, env: &mut Environment) -> Result<String, String> {
        if !env.fleet.can_control_disks() {
            return Err("synced writes are not recorded here".to_owned());
        }
        self.victims = env.fleet.names(Role::Node);
        for victim in &self.victims {
            env.fleet.hold(victim);
        }
        let (mut files, mut names) = (0, 0);
        for victim in &self.victims {
            match env.fleet.cut_power(victim) {
                Ok(lost) => (files, names) = (files + lost.files, names + lost.names),
                Err(why) => env.broken.push(why),
            }
        }
        Ok(format!("all nodes: bytes of {files} files and {names} names were not synced"))
    }

    fn heal(&mut self, env: &mut Environment) {
        for victim in &self.victims {
            env.fleet.release(victim);
        }
    }
}

/// A process is killed and restarted at another port, so its old address is no longer valid.
#[derive(Default)]
pub struct PortMove {
    victim: String,
}

impl Fault for PortMove {
    fn begin(&mut self, env: &mut Environment) -> Result<String, String> {
        self.victim = env.any(&[Role::Node, Role::Node, Role::Node, Role::Coordinator]);
        env.fleet.hold(&self.victim);
        let port = env.fleet.move_port(&self.victim);
        Ok(format!("{} to port {port}", self.victim))
    }

    fn heal(&mut self, env: &mut Environment) {
        env.fleet.release(&self.victim);
    }
}
