//! etcd's own troubles. The data path needs none of it: running gateways and nodes go on.

use super::{Fault, Field};
use crate::chaos::etcd;
use crate::chaos::fleet::Role;

#[derive(Default)]
pub struct KillLeader {
    victim: String,
}

impl Fault for KillLeader {
    fn begin(&mut self, field: &mut Field) -> Result<String, String> {
        self.victim = etcd::leader(&field.fleet)?;
        field.fleet.hold(&self.victim);
        Ok(self.victim.clone())
    }

    fn heal(&mut self, field: &mut Field) {
        field.fleet.release(&self.victim);
    }
}

/// Two members or all three are down, or stopped: the latter lose every lease as they wake up.
#[derive(Default)]
pub struct LoseQuorum {
    victims: Vec<String>,
    are_stopped: bool,
}

impl Fault for LoseQuorum {
    fn begin(&mut self, field: &mut Field) -> Result<String, String> {
        let count = field.rng.between(2, 3) as usize;
        self.victims = field.some(Role::Etcd, count);
        self.are_stopped = field.rng.percent(50);
        for victim in &self.victims {
            if self.are_stopped { field.fleet.pause(victim) } else { field.fleet.hold(victim) }
        }
        let how = if self.are_stopped { "stopped" } else { "killed" };
        Ok(format!("{}: {how}", self.victims.join(", ")))
    }

    fn heal(&mut self, field: &mut Field) {
        for victim in &self.victims {
            if self.are_stopped { field.fleet.resume(victim) } else { field.fleet.release(victim) }
        }
    }
}

/// Every lease is gone though every process is well.
pub struct RevokeLeases;

impl Fault for RevokeLeases {
    fn begin(&mut self, field: &mut Field) -> Result<String, String> {
        match etcd::revoke_all(&field.fleet)? {
            0 => Err("etcd revokes none now".to_owned()),
            count => Ok(format!("{count} leases")),
        }
    }

    fn heal(&mut self, _field: &mut Field) {}
}

/// Whoever watches from an older revision is told that it is gone.
pub struct Compact;

impl Fault for Compact {
    fn begin(&mut self, field: &mut Field) -> Result<String, String> {
        etcd::compact(&field.fleet).map(|revision| format!("up to revision {revision}"))
    }

    fn heal(&mut self, _field: &mut Field) {}
}
