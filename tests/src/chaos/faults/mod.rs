//! The faults: one small type per fault, in files by the affected component.
//!
//! A fault draws its victims when it begins, takes effect, and is undone in `heal`. `tick` is for
//! faults that act repeatedly. Faults overlap freely, except those that are *alone*: these cost a
//! replica its data, and the promises hold only while one in-sync copy survives. Such a fault
//! begins only when every replica is in sync, and the next fault only when that is so again.

pub mod clock;
pub mod disk;
pub mod etcd;
pub mod files;
pub mod folder;
pub mod kill;
pub mod partition;
pub mod pause;
pub mod slow;

use super::fleet::{Fleet, Role};
use super::network::BridgedNetwork;
use super::sandbox::Sandbox;
use crate::sim::rng::Rng;

/// The cluster as a fault may change it.
pub struct Environment {
    pub fleet: Fleet,
    pub network: BridgedNetwork,
    pub rng: Rng,
    /// The violations that only a fault can detect, such as a node that runs on a cloned folder.
    pub broken: Vec<String>,
}

impl Environment {
    pub fn any(&mut self, roles: &[Role]) -> String {
        let of = |one: &&super::fleet::Member| roles.contains(&one.role);
        let names: Vec<_> = self.fleet.members.iter().filter(of).map(|one| &one.name).collect();
        names[self.rng.index(names.len())].clone()
    }

    /// Draws `count` different members of a role.
    pub fn some(&mut self, role: Role, count: usize) -> Vec<String> {
        let mut names = self.fleet.names(role);
        self.rng.shuffle(&mut names);
        names.truncate(count);
        names
    }
}

pub trait Fault {
    /// Begins the fault. Returns a description with its victims. After an error nothing has
    /// changed.
    fn begin(&mut self, env: &mut Environment) -> Result<String, String>;

    /// Acts again; called about twenty times a second between `begin` and `heal`.
    fn tick(&mut self, _env: &mut Environment) {}

    fn heal(&mut self, env: &mut Environment);
}

pub struct FaultSpec {
    pub name: &'static str,
    /// The minimum and maximum duration in milliseconds.
    pub lasts: (u64, u64),
    /// True if it may cost a replica its data, and so occurs alone.
    pub alone: bool,
    pub make: fn() -> Box<dyn Fault>,
    pub is_possible: fn(&Sandbox) -> bool,
}

const fn kind(name: &'static str, lasts: (u64, u64), make: fn() -> Box<dyn Fault>) -> FaultSpec {
    FaultSpec { name, lasts, alone: false, make, is_possible: |_| true }
}

const fn alone(name: &'static str, lasts: (u64, u64), make: fn() -> Box<dyn Fault>) -> FaultSpec {
    FaultSpec { alone: true, ..kind(name, lasts, make) }
}

const fn filtered(
    name: &'static str,
    lasts: (u64, u64),
    make: fn() -> Box<dyn Fault>,
) -> FaultSpec {
    FaultSpec { is_possible: |sandbox| sandbox.filters, ..kind(name, lasts, make) }
}

/// The faults that need a record of the synced writes of each node.
pub const OF_SYNCS: &[&str] = &["power", "slow-disk", "failing-disk"];

/// All faults.
pub const KINDS: &[FaultSpec] = &[
    kind("kill", (500, 5_000), || Box::new(kill::Kill::default())),
    kind("kill-loop", (4_000, 10_000), || Box::new(kill::KillLoop::default())),
    kind("kill-all", (1, 3_000), || Box::new(kill::KillAll)),
    kind("restart", (4_000, 12_000), || Box::new(kill::RollingRestart::default())),
    kind("stop-loop", (4_000, 10_000), || Box::new(kill::StopLoop::default())),
    kind("power", (1, 3_000), || Box::new(kill::PowerCut::default())),
    kind("move", (500, 3_000), || Box::new(kill::PortMove::default())),
    kind("big-lag", (6_000, 15_000), || Box::new(folder::BigLag::default())),
    kind("slow-disk", (3_000, 10_000), || Box::new(disk::SlowSyncs::default())),
    FaultSpec {
        is_possible: |sandbox| sandbox.small_disks,
        ..kind("no-inodes", (3_000, 12_000), || Box::new(disk::NoInodes::default()))
    },
    kind("few-files", (3_000, 12_000), || Box::new(files::FewFileDescriptors::default())),
    kind("pause", (1_000, 30_000), || Box::new(pause::Pause::default())),
    filtered("cut-nodes", (2_000, 12_000), || Box::new(partition::NetworkPartition::nodes())),
    filtered("cut-one-way", (2_000, 12_000), || Box::new(partition::NetworkPartition::one_way())),
    filtered("cut-halves", (2_000, 12_000), || Box::new(partition::NetworkPartition::halves())),
    filtered("cut-etcd", (2_000, 12_000), || Box::new(partition::NetworkPartition::from_etcd())),
    filtered("cut-gateway", (2_000, 12_000), || Box::new(partition::NetworkPartition::gateway())),
    filtered("cut-coordinator", (2_000, 12_000), || {
        Box::new(partition::NetworkPartition::coordinator())
    }),
    filtered("flap", (3_000, 8_000), || Box::new(partition::Flap::default())),
    filtered("loss", (3_000, 10_000), || Box::new(slow::Loss::default())),
    FaultSpec {
        is_possible: |sandbox| sandbox.netem || sandbox.slow_links,
        ..kind("delay", (3_000, 10_000), || Box::new(slow::Delay::default()))
    },
    kind("etcd-leader", (1_000, 5_000), || Box::new(etcd::KillLeader::default())),
    kind("etcd-quorum", (3_000, 15_000), || Box::new(etcd::LoseQuorum::default())),
    kind("etcd-leases", (1, 2_000), || Box::new(etcd::RevokeLeases)),
    kind("etcd-compact", (1, 1_000), || Box::new(etcd::Compact)),
    FaultSpec {
        is_possible: |sandbox| sandbox.small_disks,
        ..kind("full-disk", (3_000, 12_000), || Box::new(disk::FilledDisk::default()))
    },
    kind("clock", (2_000, 10_000), || Box::new(clock::WallClockJump::default())),
    alone("flip-log", (1, 1_000), || Box::new(disk::BitFlip::log())),
    alone("flip-table", (1, 1_000), || Box::new(disk::BitFlip::table())),
    alone("flip-manifest", (1, 1_000), || Box::new(disk::BitFlip::manifest())),
    alone("failing-disk", (1_000, 3_000), || Box::new(disk::FailedSync::default())),
    alone("rollback", (1_000, 4_000), || Box::new(folder::Rollback::default())),
    alone("unmount", (8_000, 15_000), || Box::new(folder::Unmount::default())),
    alone("clone", (1_000, 2_000), || Box::new(folder::ClonedFolder::default())),
];
