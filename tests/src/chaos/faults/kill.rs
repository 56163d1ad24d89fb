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
    next: Option<Instant>,
}

/// Before the next one is asked: it takes a node TTL + 1 s to come back at worst.
const BETWEEN: Duration = Duration::from_millis(3_500);
/// Graceful stops take up to ten seconds; the rest is for a busy machine.
const STOP_WITHIN: Duration = Duration::from_secs(30);

impl Fault for Rolling {
    fn begin(&mut self, field: &mut Field) -> Result<String, String> {
        self.left = field.some(Role::Node, 5);
        self.next = Some(Instant::now());
        Ok(format!("asked to stop in turn: {}", self.left.join(", ")))
    }

    fn tick(&mut self, field: &mut Field) {
        if self.next.is_some_and(|next| next <= Instant::now())
            && let Some(name) = self.left.pop()
        {
            if let Err(why) = field.fleet.stop(&name, STOP_WITHIN) {
                field.broken.push(why);
            }
            self.next = Some(Instant::now() + BETWEEN);
        }
    }

    fn heal(&mut self, _field: &mut Field) {}
}
