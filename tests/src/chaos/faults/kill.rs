//! `kill -9`: one process, one again and again, all of them; and the polite kind, one after the other.

use std::time::{Duration, Instant};

use super::{Fault, Field};
use crate::chaos::fleet::Role;

const OURS: &[Role] = &[Role::Node, Role::Node, Role::Node, Role::Gateway, Role::Coordinator];

/// One or two processes of the service die at the same moment and stay dead for a while.
#[derive(Default)]
pub struct Kill {
    victims: Vec<String>,
}

impl Fault for Kill {
    fn begin(&mut self, field: &mut Field) -> Result<String, String> {
        self.victims = vec![field.any(OURS)];
        if field.rng.percent(40) {
            self.victims.push(field.any(OURS));
        }
        self.victims.dedup();
        for victim in &self.victims {
            field.fleet.hold(victim);
        }
        Ok(self.victims.join(", "))
    }

    fn heal(&mut self, field: &mut Field) {
        for victim in &self.victims {
            field.fleet.release(victim);
        }
    }
}

/// Started and killed again: before it has found its lock, while it recovers, just after.
#[derive(Default)]
pub struct Loop {
    victim: String,
    next: Option<Instant>,
}

impl Fault for Loop {
    fn begin(&mut self, field: &mut Field) -> Result<String, String> {
        self.victim = field.any(OURS);
        self.next = Some(Instant::now());
        Ok(self.victim.clone())
    }

    fn tick(&mut self, field: &mut Field) {
        if self.next.is_some_and(|next| next <= Instant::now()) {
            field.fleet.hold(&self.victim);
            field.fleet.release(&self.victim);
            self.next = Some(Instant::now() + Duration::from_millis(field.rng.between(10, 5_000)));
        }
    }

    fn heal(&mut self, _field: &mut Field) {}
}

/// Asked to stop again and again, also while it starts: it must end as one that was asked to.
#[derive(Default)]
pub struct StopLoop {
    victim: String,
    runs_for: Duration,
}

/// A start takes some fifty milliseconds; the news of it and of its end take longer.
const RUNS_FOR_MS: &[u64] = &[0, 0, 50, 200, 1_000, 3_000];

impl Fault for StopLoop {
    fn begin(&mut self, field: &mut Field) -> Result<String, String> {
        self.victim = field.any(OURS);
        Ok(self.victim.clone())
    }

    fn tick(&mut self, field: &mut Field) {
        if field.fleet.member(&self.victim).has_run_for(self.runs_for) {
            field.fleet.ask_to_stop(&self.victim);
            let millis = field.rng.pick(RUNS_FOR_MS).unwrap_or(0);
            self.runs_for = Duration::from_millis(millis);
        }
    }

    fn heal(&mut self, _field: &mut Field) {}
}

/// Nodes, gateways and coordinators, and sometimes etcd: the power is gone.
pub struct All;

impl Fault for All {
    fn begin(&mut self, field: &mut Field) -> Result<String, String> {
        let with_etcd = field.rng.percent(50);
        let names = field.fleet.members.iter().filter(|one| with_etcd || one.role != Role::Etcd);
        for name in names.map(|one| one.name.clone()).collect::<Vec<_>>() {
            field.fleet.hold(&name);
        }
        Ok(if with_etcd { "everything" } else { "everything but etcd" }.to_owned())
    }

    fn heal(&mut self, field: &mut Field) {
        let down: Vec<_> = field.fleet.members.iter().map(|one| one.name.clone()).collect();
        for name in down {
            // What another fault holds down as well stays down: holds are counted.
            if !field.fleet.member(&name).runs() {
                field.fleet.release(&name);
            }
        }
    }
}

/// SIGTERM to every node, one after the other, as for a new version.
#[derive(Default)]
pub struct Rolling {
    left: Vec<String>,
    last: Option<String>,
}

/// Before the next one is asked the last one has run again for so long: it takes a node a second and its
/// recovery to be back, as it has given its lease back.
const RUNS_AGAIN: Duration = Duration::from_millis(2_500);

impl Fault for Rolling {
    fn begin(&mut self, field: &mut Field) -> Result<String, String> {
        self.left = field.some(Role::Node, 5);
        Ok(format!("asked to stop in turn: {}", self.left.join(", ")))
    }

    fn tick(&mut self, field: &mut Field) {
        let is_back = |last: &String| field.fleet.member(last).has_run_for(RUNS_AGAIN);
        if self.last.as_ref().is_none_or(is_back)
            && let Some(name) = self.left.pop()
        {
            field.fleet.ask_to_stop(&name);
            self.last = Some(name);
        }
    }

    fn heal(&mut self, _field: &mut Field) {}
}

/// All nodes lose their power at the same moment: with the processes goes whatever no sync has covered.
#[derive(Default)]
pub struct Power {
    victims: Vec<String>,
}

impl Fault for Power {
    fn begin(&mut self, field: &mut Field) -> Result<String, String> {
        if !field.fleet.has_disks() {
            return Err("no way to know what was synced".to_owned());
        }
        self.victims = field.fleet.names(Role::Node);
        for victim in &self.victims {
            field.fleet.hold(victim);
        }
        let (mut files, mut names) = (0, 0);
        for victim in &self.victims {
            match field.fleet.cut_power(victim) {
                Ok(lost) => (files, names) = (files + lost.files, names + lost.names),
                Err(why) => field.broken.push(why),
            }
        }
        Ok(format!("all nodes: bytes of {files} files and {names} names were not synced"))
    }

    fn heal(&mut self, field: &mut Field) {
        for victim in &self.victims {
            field.fleet.release(victim);
        }
    }
}

/// One process dies and is started again at another port: whoever keeps its address has an old one.
#[derive(Default)]
pub struct Move {
    victim: String,
}

impl Fault for Move {
    fn begin(&mut self, field: &mut Field) -> Result<String, String> {
        self.victim = field.any(&[Role::Node, Role::Node, Role::Node, Role::Coordinator]);
        field.fleet.hold(&self.victim);
        let port = field.fleet.move_port(&self.victim);
        Ok(format!("{} to port {port}", self.victim))
    }

    fn heal(&mut self, field: &mut Field) {
        field.fleet.release(&self.victim);
    }
}
