//! SIGSTOP: a process that is there and says nothing, and then goes on as if nothing had been.

use super::{Fault, Field};
use crate::chaos::fleet::Role;

const ANY: &[Role] =
    &[Role::Node, Role::Node, Role::Node, Role::Gateway, Role::Coordinator, Role::Etcd];

#[derive(Default)]
pub struct Pause {
    victim: String,
}

impl Fault for Pause {
    fn begin(&mut self, field: &mut Field) -> Result<String, String> {
        self.victim = field.any(ANY);
        field.fleet.pause(&self.victim);
        Ok(self.victim.clone())
    }

    fn heal(&mut self, field: &mut Field) {
        field.fleet.resume(&self.victim);
    }
}
