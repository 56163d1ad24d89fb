//! Wall clocks that jump: safety does not depend on wall clocks, and time in the log moves at most
//! twice as fast as real time.

use super::{Environment, Fault};
use crate::chaos::fleet::Role;

const SECOND: i64 = 1_000_000_000;
const JUMPS: &[i64] = &[
    -365 * 24 * 3_600 * SECOND,
    -3_600 * SECOND,
    -2 * SECOND,
    2 * SECOND,
    3_600 * SECOND,
    365 * 24 * 3_600 * SECOND,
];

/// The clocks of some processes jump, each by an amount of its own, and are set right in the end.
#[derive(Default)]
pub struct WallClockJump {
    victims: Vec<String>,
}

impl Fault for WallClockJump {
    fn begin(&mut self, env: &mut Environment) -> Result<String, String> {
        if !env.fleet.can_shift_clocks() {
            return Err("the clock of a process cannot be changed here".to_owned());
        }
        let count = env.rng.between(1, 3) as usize;
        self.victims = env.some(Role::Node, count);
        self.victims.push(env.any(&[Role::Gateway, Role::Coordinator, Role::Node]));
        self.victims.dedup();
        let mut jumps = Vec::new();
        for victim in &self.victims {
            let jump = env.rng.pick(JUMPS).unwrap_or(SECOND);
            env.fleet.set_clock(victim, jump)?;
            jumps.push(format!("{victim} by {} s", jump / SECOND));
        }
        Ok(jumps.join(", "))
    }

    fn heal(&mut self, env: &mut Environment) {
        for victim in &self.victims {
            if let Err(why) = env.fleet.set_clock(victim, 0) {
                env.broken.push(why);
            }
        }
    }
}
