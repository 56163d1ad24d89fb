//! What goes wrong: one small type per fault, in files by what they hurt.
//!
//! A fault draws its victims when it begins, does its harm, and undoes it in `heal`. `tick` is for
//! those that go on doing harm. Faults overlap freely, except those that are *alone*: they cost a
//! replica its data, and the promises hold for as long as one in-sync copy survives. So they begin
//! only when every copy is whole, and the next fault only when that is so again.

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
use super::network::Network;
use super::sandbox::Sandbox;
use crate::sim::rng::Rng;

/// All that a fault may touch.
pub struct Field {
    pub fleet: Fleet,
    pub network: Network,
    pub rng: Rng,
    /// What only a fault can see broken, such as a cloned folder that was taken for its original.
    pub broken: Vec<String>,
}

impl Field {
    pub fn any(&mut self, roles: &[Role]) -> String {
        let of = |one: &&super::fleet::Member| roles.contains(&one.role);
        let names: Vec<_> = self.fleet.members.iter().filter(of).map(|one| &one.name).collect();
        names[self.rng.index(names.len())].clone()
    }

    /// So many of them, all different.
    pub fn some(&mut self, role: Role, count: usize) -> Vec<String> {
        let mut names = self.fleet.names(role);
        self.rng.shuffle(&mut names);
        names.truncate(count);
        names
    }
}

pub trait Fault {
    /// Does it, and says what and to whom. An error: it can't be done now, and nothing was.
    fn begin(&mut self, field: &mut Field) -> Result<String, String>;

    /// Called some twenty times a second in between.
    fn tick(&mut self, _field: &mut Field) {}

    fn heal(&mut self, field: &mut Field);
}

pub struct Kind {
    pub name: &'static str,
    /// How long it lasts, in milliseconds: at least, at most.
    pub lasts: (u64, u64),
    /// It may cost a replica its data.
    pub alone: bool,
    pub make: fn() -> Box<dyn Fault>,
    pub is_possible: fn(&Sandbox) -> bool,
}

const fn kind(name: &'static str, lasts: (u64, u64), make: fn() -> Box<dyn Fault>) -> Kind {
    Kind { name, lasts, alone: false, make, is_possible: |_| true }
}

const fn alone(name: &'static str, lasts: (u64, u64), make: fn() -> Box<dyn Fault>) -> Kind {
    Kind { alone: true, ..kind(name, lasts, make) }
}

const fn filtered(name: &'static str, lasts: (u64, u64), make: fn() -> Box<dyn Fault>) -> Kind {
    Kind { is_possible: |sandbox| sandbox.filters, ..kind(name, lasts, make) }
}

/// Those that have to do with what was synced, for which each node's syncs are watched.
pub const OF_SYNCS: &[&str] = &["power", "slow-disk", "failing-disk"];

/// Every fault there is.
pub const KINDS: &[Kind] = &[
    kind("kill", (500, 5_000), || Box::new(kill::Kill::default())),
    kind("kill-loop", (4_000, 10_000), || Box::new(kill::Loop::default())),
    kind("kill-all", (1, 3_000), || Box::new(kill::All)),
    kind("restart", (4_000, 12_000), || Box::new(kill::Rolling::default())),
    kind("stop-loop", (4_000, 10_000), || Box::new(kill::StopLoop::default())),
    kind("power", (1, 3_000), || Box::new(kill::Power::default())),
    kind("move", (500, 3_000), || Box::new(kill::Move::default())),
    kind("big-lag", (6_000, 15_000), || Box::new(folder::BigLag::default())),
    kind("slow-disk", (3_000, 10_000), || Box::new(disk::Slow::default())),
    Kind {
        is_possible: |sandbox| sandbox.small_disks,
        ..kind("no-inodes", (3_000, 12_000), || Box::new(disk::NoInodes::default()))
    },
    kind("few-files", (3_000, 12_000), || Box::new(files::Few::default())),
    kind("pause", (1_000, 30_000), || Box::new(pause::Pause::default())),
    filtered("cut-nodes", (2_000, 12_000), || Box::new(partition::Cut::nodes())),
    filtered("cut-one-way", (2_000, 12_000), || Box::new(partition::Cut::one_way())),
    filtered("cut-halves", (2_000, 12_000), || Box::new(partition::Cut::halves())),
    filtered("cut-etcd", (2_000, 12_000), || Box::new(partition::Cut::from_etcd())),
    filtered("cut-gateway", (2_000, 12_000), || Box::new(partition::Cut::gateway())),
    filtered("cut-coordinator", (2_000, 12_000), || Box::new(partition::Cut::coordinator())),
    filtered("flap", (3_000, 8_000), || Box::new(partition::Flap::default())),
    filtered("loss", (3_000, 10_000), || Box::new(slow::Loss::default())),
    Kind {
        is_possible: |sandbox| sandbox.netem || sandbox.slow_links,
        ..kind("delay", (3_000, 10_000), || Box::new(slow::Delay::default()))
    },
    kind("etcd-leader", (1_000, 5_000), || Box::new(etcd::KillLeader::default())),
    kind("etcd-quorum", (3_000, 15_000), || Box::new(etcd::LoseQuorum::default())),
    kind("etcd-leases", (1, 2_000), || Box::new(etcd::RevokeLeases)),
    kind("etcd-compact", (1, 1_000), || Box::new(etcd::Compact)),
    Kind {
        is_possible: |sandbox| sandbox.small_disks,
        ..kind("full-disk", (3_000, 12_000), || Box::new(disk::Full::default()))
    },
    kind("clock", (2_000, 10_000), || Box::new(clock::Jump::default())),
    alone("flip-log", (1, 1_000), || Box::new(disk::Flip::log())),
    alone("flip-table", (1, 1_000), || Box::new(disk::Flip::table())),
    alone("flip-manifest", (1, 1_000), || Box::new(disk::Flip::manifest())),
    alone("failing-disk", (1_000, 3_000), || Box::new(disk::Failing::default())),
    alone("rollback", (1_000, 4_000), || Box::new(folder::Rollback::default())),
    alone("unmount", (8_000, 15_000), || Box::new(folder::Unmount::default())),
    alone("clone", (1_000, 2_000), || Box::new(folder::Clone::default())),
];
