//! The times at which an operator acts who does not wait.

use super::super::rng::Rng;
use super::disks::DiskPlan;

/// The times at which an operator looks, if a run has one.
#[derive(Clone, Debug)]
pub struct OperatorPlan {
    pub every: Option<u64>,
    pub rng: Rng,
}

impl OperatorPlan {
    pub fn from_seed(seed: u64, disks: &DiskPlan) -> Self {
        let mut rng = Rng::new(seed.rotate_left(53) ^ 0x09E2_A702_5EED);
        let every = rng.between(30_000, 500_000);
        let acts = rng.percent(30) && disks.faults.iter().all(|fault| fault.keeps_all());
        Self { every: acts.then_some(every), rng }
    }
}
