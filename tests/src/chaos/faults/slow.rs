//! Networks that work badly: late packets, lost packets.

use super::{Fault, Field};
use crate::chaos::fleet::Role;
use crate::chaos::network::{Owner, Way};

/// What some processes send comes late.
#[derive(Default)]
pub struct Delay {
    victims: Vec<String>,
}

impl Fault for Delay {
    fn begin(&mut self, field: &mut Field) -> Result<String, String> {
        let count = field.rng.between(1, 3) as usize;
        self.victims = field.some(Role::Node, count);
        if field.rng.percent(30) {
            self.victims.push(field.any(&[Role::Gateway, Role::Coordinator, Role::Etcd]));
        }
        let millis = field.rng.between(5, 300);
        for at in 0..self.victims.len() {
            if let Err(why) = field.network.slow(&self.victims[at], millis) {
                self.victims.truncate(at);
                self.heal(field);
                return Err(why);
            }
        }
        let how = if field.network.sandbox().netem {
            format!("{millis} ms")
        } else {
            "1 Mbit/s".to_owned()
        };
        Ok(format!("{}: {how}", self.victims.join(", ")))
    }

    fn heal(&mut self, field: &mut Field) {
        for victim in &self.victims {
            if let Err(why) = field.network.fast_again(victim) {
                crate::note(&format!("{victim} is no faster again: {why}"));
            }
        }
    }
}

/// Of the packets that some processes get, some are lost.
#[derive(Default)]
pub struct Loss {
    owner: Owner,
}

impl Fault for Loss {
    fn begin(&mut self, field: &mut Field) -> Result<String, String> {
        let count = field.rng.between(1, 3) as usize;
        let mut victims = field.some(Role::Node, count);
        if field.rng.percent(30) {
            victims.push(field.any(&[Role::Gateway, Role::Coordinator, Role::Etcd]));
        }
        let percent = field.rng.between(2, 30) as u32;
        self.owner = field.network.owner();
        let all: Vec<_> = field.fleet.members.iter().map(|one| one.address).collect();
        let ways = victims.iter().flat_map(|to| all.iter().map(|&from| (from, to.clone())));
        let ways: Vec<_> = ways.collect();
        field.network.add(self.owner, ways, Way::Lossy(percent))?;
        Ok(format!("{}: {percent} %", victims.join(", ")))
    }

    fn heal(&mut self, field: &mut Field) {
        if let Err(why) = field.network.remove(self.owner) {
            field.broken.push(format!("a lossy network could not be healed: {why}"));
        }
    }
}
