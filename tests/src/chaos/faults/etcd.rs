//! Faults of etcd. The data path does not need etcd: running gateways and nodes continue.

use super::{Environment, Fault};
use crate::chaos::etcd;
use crate::chaos::fleet::Role;

#[derive(Default)]
pub struct KillLeader {
    victim: String,
}

impl Fault for KillLeader {
    fn begin(&mut self, env: &mut Environment) -> Result<String, String> {
        self.victim = etcd::leader(&env.fleet)?;
        env.fleet.hold(&self.victim);
        Ok(self.victim.clone())
    }

    fn heal(&mut self, env: &mut Environment) {
        env.fleet.release(&self.victim);
    }
}

/// Two members or all three are killed, or stopped; stopped ones find every lease expired when they
/// are resumed.
#[derive(Default)]
pub struct LoseQuorum {
    victims: Vec<String>,
    are_stopped: bool,
}

impl Fault for LoseQuorum {
    fn begin(&mut self, env: &mut Environment) -> Result<String, String> {
        let count = env.rng.between(2, 3) as usize;
        self.victims = env.some(Role::Etcd, count);
        self.are_stopped = env.rng.percent(50);
        for victim in &self.victims {
            if self.are_stopped { env.fleet.pause(victim) } else { env.fleet.hold(victim) }
        }
        let how = if self.are_stopped { "stopped" } else { "killed" };
        Ok(format!("{}: {how}", self.victims.join(", ")))
    }

    fn heal(&mut self, env: &mut Environment) {
        for victim in &self.victims {
            if self.are_stopped { env.fleet.resume(victim) } else { env.fleet.release(victim) }
        }
    }
}

/// Every lease is revoked although every process works.
pub struct RevokeLeases;

impl Fault for RevokeLeases {
    fn begin(&mut self, env: &mut Environment) -> Result<String, String> {
        match etcd::revoke_all(&env.fleet)? {
            0 => Err("etcd revoked no lease".to_owned()),
            count => Ok(format!("{count} leases")),
        }
    }

    fn heal(&mut self, _env: &mut Environment) {}
}

/// The history is compacted, so a watch from an older revision gets an error.
pub struct Compact;

impl Fault for Compact {
    fn begin(&mut self, env: &mut Environment) -> Result<String, String> {
        etcd::compact(&env.fleet).map(|revision| format!("up to revision {revision}"))
    }

    fn heal(&mut self, _env: &mut Environment) {}
}
