//! Bad networks: late packets and lost packets.

use super::{Environment, Fault};
use crate::chaos::fleet::Role;
use crate::chaos::network::{RuleEffect, RuleOwner};

/// The packets that some processes send arrive late.
#[derive(Default)]
pub struct Delay {
    victims: Vec<String>,
}

impl Fault for Delay {
    fn begin(&mut self, env: &mut Environment) -> Result<String, String> {
        let count = env.rng.between(1, 3) as usize;
        self.victims = env.some(Role::Node, count);
        if env.rng.percent(30) {
            self.victims.push(env.any(&[Role::Gateway, Role::Coordinator, Role::Etcd]));
        }
        let millis = env.rng.between(5, 300);
        for at in 0..self.victims.len() {
            if let Err(why) = env.network.slow(&self.victims[at], millis) {
                self.victims.truncate(at);
                self.heal(env);
                return Err(why);
            }
        }
        let how = if env.network.sandbox().netem {
            format!("{millis} ms")
        } else {
            "1 Mbit/s".to_owned()
        };
        Ok(format!("{}: {how}", self.victims.join(", ")))
    }

    fn heal(&mut self, env: &mut Environment) {
        for victim in &self.victims {
            if let Err(why) = env.network.fast_again(victim) {
                crate::note(&format!("the delay of {victim} could not be removed: {why}"));
            }
        }
    }
}

/// A part of the packets that some processes should receive is lost.
#[derive(Default)]
pub struct Loss {
    owner: RuleOwner,
}

impl Fault for Loss {
    fn begin(&mut self, env: &mut Environment) -> Result<String, String> {
        let count = env.rng.between(1, 3) as usize;
        let mut victims = env.some(Role::Node, count);
        if env.rng.percent(30) {
            victims.push(env.any(&[Role::Gateway, Role::Coordinator, Role::Etcd]));
        }
        let percent = env.rng.between(2, 30) as u32;
        self.owner = env.network.owner();
        let all: Vec<_> = env.fleet.members.iter().map(|one| one.address).collect();
        let routes = victims.iter().flat_map(|to| all.iter().map(|&from| (from, to.clone())));
        let routes: Vec<_> = routes.collect();
        env.network.add(self.owner, routes, RuleEffect::Lossy(percent))?;
        Ok(format!("{}: {percent} %", victims.join(", ")))
    }

    fn heal(&mut self, env: &mut Environment) {
        if let Err(why) = env.network.remove(self.owner) {
            env.broken.push(format!("a lossy network could not be healed: {why}"));
        }
    }
}
