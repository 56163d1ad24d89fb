//! The faults of disks: they fail, lie, fill up, and are mixed up by their operators.
//!
//! The promises hold while one in-sync copy of each shard survives and one disk at a time is bad:
//! so no disk is harmed before the last harmed one is whole again, that is, before no shard counts
//! on what it may have lost. A failed fsync is harm, too: it may have lost nothing, but its copies
//! are not trusted any more. A full disk harms nothing, nor does a copy.
//!
//! These faults have their own random stream and their own clock: a seed without them is the same
//! run as ever.

use std::collections::BTreeSet;

use engine::ids::StoreId;
use engine::records::StoreStatus;

use super::cluster::SimCluster;
use super::etcd::{EtcdKey, EtcdValue};
use super::event::SimEvent;
use super::nodes::NodeHost;
use super::plan::disks::DiskFault;

/// The interval at which a cluster with full disks is checked.
const ROOM_LOOK: u64 = 100_000;
/// The number of checks in a row at which the cluster has to serve before the operator makes room.
const SERVES_LOOKS: u32 = 30;

impl SimCluster {
    pub fn disk_fault(&mut self) {
        if self.core.now >= self.core.plan.faults_until {
            return;
        }
        let disks = &mut self.core.plan.disks;
        let next = disks.rng.between(disks.every / 2, disks.every * 3 / 2);
        let kinds = disks.faults.clone();
        let fault = disks.rng.pick(&kinds);
        let mut at = disks.rng.index(self.nodes.len());
        let of_the_filled = disks.rng.percent(50).then(|| disks.rng.word());
        let back_after = disks.rng.between(1_000, 1_500_000);
        self.core.after(next, SimEvent::DiskFault);
        let Some(fault) = fault else { return };
        if let (DiskFault::Full, Some(word)) = (fault, of_the_filled) {
            at = self.being_filled(word).unwrap_or(at);
        }
        if fault == DiskFault::StaysFull && self.core.plan.disks.one_leader_full {
            let Some(leader) = self.first_to_be_full() else { return };
            at = leader;
        }
        let nodes = 0..self.nodes.len();
        if fault.harms() && !(nodes.into_iter().all(|at| self.is_whole(at)) && self.is_spare(at)) {
            return;
        }
        self.core.trace.note(self.core.now, || format!("fault: {fault:?} of node {at}"));
        let dies = fault == DiskFault::Cloned && self.core.plan.disks.rng.percent(60);
        let (core, node) = (&mut self.core, &mut self.nodes[at]);
        let struck = match fault {
            DiskFault::Cloned => {
                let twin = node.twin(self.twin.as_ref().map_or(0, |twin| twin.incarnation));
                let starts = twin.is_some();
                if let Some(twin) = twin {
                    self.twin.insert(twin).start(core);
                }
                if dies {
                    node.crash(core, false);
                }
                starts
            }
            DiskFault::FsyncFails => node.fsync_fails(core),
            DiskFault::Full => node.is_full_for(core, back_after / 2),
            DiskFault::StaysFull => node.stays_full(),
            DiskFault::RowLost => node.loses_a_row(),
            DiskFault::Rot | DiskFault::LeftAlone => {
                node.crash(core, false);
                node.rots()
            }
            DiskFault::RolledBack => {
                node.crash(core, true);
                node.is_rolled_back()
            }
            DiskFault::Emptied => {
                node.crash(core, true);
                node.is_emptied();
                // The new disk is smaller, until the operator makes room.
                let rng = &mut core.plan.disks.rng;
                let (room, until) = (rng.below(400), core.now + rng.between(1_000_000, 4_000_000));
                node.disk.small = rng.percent(60).then_some((room, until));
                true
            }
            DiskFault::Unmounted => {
                self.unmount(at, back_after);
                true
            }
        };
        let (core, node) = (&mut self.core, &mut self.nodes[at]);
        if struck {
            let kind = format!("{fault:?}");
            *self.faults.disks.entry(kind).or_default() += 1;
        }
        // A coordinator that acts at random knows nothing of logs, and would promote the copy that
        // is there.
        let alone = struck && fault == DiskFault::LeftAlone && !core.plan.chaos;
        if let Some(harmed) = node.harmed.filter(|_| struck && fault.harms()) {
            core.oracle.harmed(harmed);
        }
        let place = self.nodes[at].place;
        let back_after = if alone { back_after / 8 } else { back_after };
        self.core.after(back_after, SimEvent::Restart { place });
        if alone {
            self.others_go(at);
        }
    }

    /// One of the nodes that are to be sent a snapshot, or the entries that they lack: there the
    /// room counts most.
    fn being_filled(&self, word: u64) -> Option<usize> {
        let records: Vec<_> = self.core.etcd.shards().map(|(config, _)| config).collect();
        let is_filled = |node: &NodeHost| {
            let named = |stores: &[StoreId]| stores.contains(&node.store);
            records.iter().any(|config| named(&config.learners) || named(&config.tainted))
        };
        let filled: Vec<_> =
            (0..self.nodes.len()).filter(|&at| is_filled(&self.nodes[at])).collect();
        filled.get(word as usize % filled.len().max(1)).copied()
    }

    /// A node that leads, while no disk stays full yet.
    fn first_to_be_full(&mut self) -> Option<usize> {
        let mut shards = self.core.etcd.shards().map(|(config, _)| config.primary.store);
        let leads: Vec<_> = shards.by_ref().collect();
        let store = self.core.plan.disks.rng.pick(&leads)?;
        let any = self.nodes.iter().any(|node| node.disk.stays_full);
        self.nodes.iter().position(|node| node.store == store).filter(|_| !any)
    }

    /// All nodes but this one are away, for longer than it takes to come back and to be waited for.
    fn others_go(&mut self, but: usize) {
        for other in (0..self.nodes.len()).filter(|&other| other != but) {
            let rng = &mut self.core.plan.disks.rng;
            let (power_lost, back) = (rng.percent(50), rng.between(4_000_000, 7_000_000));
            self.nodes[other].crash(&mut self.core, power_lost);
            self.goes_away(other, back);
        }
        self.core.plan.last_until(self.core.now + 7_000_000);
    }

    /// A disk that the operator takes for lost is lost, as far as the others know; while all are
    /// away no other takes its place.
    fn unmount(&mut self, at: usize, back_after: u64) {
        let rng = &mut self.core.plan.disks.rng;
        let (all, replaces) = (rng.percent(40), rng.percent(60));
        let placed = self.core.etcd.shards().count() >= usize::from(self.core.plan.shards);
        let nodes = if all && placed { 0..self.nodes.len() } else { at..at + 1 };
        for node in nodes {
            self.nodes[node].crash(&mut self.core, true);
            self.nodes[node].is_unmounted(&self.core, replaces);
            let place = self.nodes[node].place;
            self.core.after(back_after / 2 + 1_000, SimEvent::Restart { place });
            self.core.after(2 * back_after + 500_000, SimEvent::PutBack { place });
        }
    }

    /// A shard that does not serve although nothing else is wrong than that these disks are full.
    pub fn waits_beside_room(&self, full: &BTreeSet<StoreId>) -> Option<String> {
        let running = |store: StoreId| self.nodes.iter().find(|node| node.store == store)?.node();
        self.core.etcd.shards().find_map(|(config, _)| {
            let (shard, store) = (config.shard(), config.primary.store);
            let mut views = running(store).into_iter().flat_map(|node| node.replicas());
            let view = views.find(|view| view.shard == shard);
            let led = view.and_then(|view| view.primary);
            let led = led.filter(|primary| primary.epoch == config.epoch);
            // A harmed copy, or a missing one, is replaced by a snapshot, for which there is no
            // room.
            let is_harmed = |store: &StoreId| {
                let node = self.nodes.iter().find(|node| node.store == *store);
                node.is_none_or(|node| node.node().is_some() && !has_good(node, shard))
            };
            if config.isr.iter().any(is_harmed) {
                return None;
            }
            if !led.is_some_and(|primary| primary.active) {
                return Some(format!("shard {shard}: no member answers reads, with {full:?} full"));
            }
            let able = |store: &&StoreId| !full.contains(store) && running(**store).is_some();
            let able = config.isr.iter().filter(able).count();
            (full.contains(&store) && able >= self.core.plan.min_in_sync).then(|| {
                format!("shard {shard}: led by {store:?}, whose disk is full, {able} are not")
            })
        })
    }

    /// Each shard has a good in-sync copy without this disk, and no member that has been in sync
    /// since the shard was empty, and has made no copy: if all others left the set before that
    /// member learned of its shard, no store could ever lead it.
    fn is_spare(&self, at: usize) -> bool {
        let store = self.nodes[at].store;
        let mut relying = self.core.etcd.shards().filter(|(config, _)| config.isr.contains(&store));
        relying.all(|(config, _)| {
            let members = || {
                let counts = |node: &&NodeHost| {
                    node.store != store
                        && config.isr.contains(&node.store)
                        && !config.tainted.contains(&node.store)
                };
                self.nodes.iter().filter(counts)
            };
            members().any(|node| has_good(node, config.shard()))
                && !members().any(|node| has_none(node, config.shard()))
        })
    }

    /// No shard counts on anything that this disk may have lost, nor on a disk that is not mounted.
    fn is_whole(&self, at: usize) -> bool {
        let node = &self.nodes[at];
        let counted_on =
            |store| self.core.etcd.shards().any(|(config, _)| config.isr.contains(&store));
        if node.away().is_some_and(counted_on) {
            return false;
        }
        let Some(harmed) = node.harmed else { return true };
        // Etcd keeps the store as suspect until all its copies are replaced: a restart before that
        // would trust none of them.
        let suspect = self.core.etcd.get(EtcdKey::Store(harmed)).is_some_and(|kept| {
            matches!(kept.value, EtcdValue::Store { status: StoreStatus::Suspect, .. })
        });
        // Harm that is not found yet may come back into the in-sync set with its copy.
        if node.store == harmed && (suspect || node.hides_harm()) {
            return false;
        }
        let mut relying =
            self.core.etcd.shards().filter(|(config, _)| config.isr.contains(&harmed));
        relying.all(|(config, _)| {
            let trusted = node.store == harmed && !config.tainted.contains(&harmed);
            trusted && has_new_copy(node, config.shard())
        })
    }
}

/// The operator of a healed cluster, who waits before making room on the disks that stay full.
#[derive(Default)]
pub struct RoomWatch {
    /// The time of the next check.
    pub next: u64,
    /// The number of checks in a row at which every shard served that could.
    serves: u32,
}

impl RoomWatch {
    /// The operator makes room on the disks that stay full, as late as possible: first every shard
    /// answers reads, and takes writes wherever enough members could. So a cluster that waits for
    /// room unnecessarily never heals.
    pub fn make_room(&mut self, cluster: &mut SimCluster) {
        if cluster.core.now < self.next {
            return;
        }
        self.next = cluster.core.now + ROOM_LOOK;
        let full: BTreeSet<StoreId> = cluster
            .nodes
            .iter()
            .filter(|node| node.disk.stays_full)
            .map(|node| node.store)
            .collect();
        // For a moment a shard may have too few other members, while one of them is being replaced.
        let waits = !full.is_empty() && cluster.waits_beside_room(&full).is_some();
        self.serves = if waits { 0 } else { self.serves + 1 };
        if full.is_empty() || self.serves < SERVES_LOOKS {
            return;
        }
        for node in cluster.nodes.iter_mut().filter(|node| node.disk.stays_full) {
            node.has_room_again(&mut cluster.core);
        }
    }
}

/// The copy was replaced since the disk was harmed; a copy that was not replaced is stopped.
fn has_new_copy(node: &NodeHost, shard: engine::ids::ShardId) -> bool {
    node.read_since_harmed() && !node.hides_harm() && has_good(node, shard)
}

/// A process holds a copy with no known defect.
fn has_good(node: &NodeHost, shard: engine::ids::ShardId) -> bool {
    let Some(running) = node.node() else { return false };
    let view = running.replicas().find(|view| view.shard == shard);
    view.is_some_and(|view| view.exists && !view.unfit && view.stopped.is_none())
}

/// A process holds no copy, or not yet.
fn has_none(node: &NodeHost, shard: engine::ids::ShardId) -> bool {
    node.node()
        .is_some_and(|running| !running.replicas().any(|view| view.shard == shard && view.exists))
}
