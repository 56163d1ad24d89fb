//! Wall clocks that jump: safety uses none, and time in the log moves at most twice as fast as real
//! time does.

use super::{Fault, Field};
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

/// Of some processes, each its own way; back again in the end.
#[derive(Default)]
pub struct Jump {
    victims: Vec<String>,
}

impl Fault for Jump {
    fn begin(&mut self, field: &mut Field) -> Result<String, String> {
        if !field.fleet.has_clocks() {
            return Err("no way to move a process's clock".to_owned());
        }
        let count = field.rng.between(1, 3) as usize;
        self.victims = field.some(Role::Node, count);
        self.victims.push(field.any(&[Role::Gateway, Role::Coordinator, Role::Node]));
        self.victims.dedup();
        let mut told = Vec::new();
        for victim in &self.victims {
            let jump = field.rng.pick(JUMPS).unwrap_or(SECOND);
            field.fleet.set_clock(victim, jump)?;
            told.push(format!("{victim} by {} s", jump / SECOND));
        }
        Ok(told.join(", "))
    }

    fn heal(&mut self, field: &mut Field) {
        for victim in &self.victims {
            if let Err(why) = field.fleet.set_clock(victim, 0) {
                field.broken.push(why);
            }
        }
    }
}
