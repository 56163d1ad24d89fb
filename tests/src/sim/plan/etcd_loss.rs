//! The moment at which a run loses all of etcd.

use engine::ids::StoreId;

use super::super::rng::Rng;
use super::OperatorPlan;
use super::disks::DiskPlan;

/// The loss of etcd, if a run has one. It has its own random stream: a seed without it is the same
/// run as ever.
#[derive(Clone, Debug)]
pub struct EtcdLossPlan {
    pub at: Option<u64>,
    /// The store whose disk is lost with it.
    pub given_up: Option<StoreId>,
    pub rng: Rng,
}

impl EtcdLossPlan {
    /// Nothing is promised if a disk is harmed that has to answer, or if an older image of it does.
    /// An operator of shards would have decided on records that are gone.
    pub fn from_seed(
        seed: u64,
        faults_until: u64,
        disks: &DiskPlan,
        operator: &OperatorPlan,
    ) -> Self {
        let mut rng = Rng::new(seed.rotate_left(13) ^ 0x0E7C_D105_75ED);
        let at = rng.between(600_000, faults_until);
        let disks_stay = disks.faults.iter().all(|fault| fault.leaves_disks_alone());
        let is_lost = rng.percent(25) && disks_stay && operator.every.is_none();
        Self { at: is_lost.then_some(at), given_up: None, rng }
    }
}
