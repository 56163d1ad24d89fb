//! SIGSTOP: a process that exists and does not respond, and later continues where it was.

use super::{Environment, Fault};
use crate::chaos::fleet::Role;

const ANY: &[Role] =
    &[Role::Node, Role::Node, Role::Node, Role::Gateway, Role::Coordinator, Role::Etcd];

#[derive(Default)]
pub struct Pause {
    victim: String,
}

impl Fault for Pause {
    fn begin(&mut self, env: &mut Environment) -> Result<String, String> {
        self.victim = env.any(ANY);
        env.fleet.pause(&self.victim);
        Ok(self.victim.clone())
    }

    fn heal(&mut self, env: &mut Environment) {
        env.fleet.resume(&self.victim);
    }
}
