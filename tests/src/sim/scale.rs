//! Runs the engine at the size of large clusters: everything that changes a map strikes at once,
//! under traffic, and the run measures how the cluster comes to rest again.
//!
//! ```text
//!   place ──▶ join, drain, a node dies for good, a coordinator dies, a zone dies and comes back
//!         ──▶ level: every copy where it belongs, in sync, one zone each ──▶ read every counter
//! ```
//!
//! The oracle watches every step as in any other run, and what clients have observed is judged at
//! the end. Nothing is random but the run itself: the script is fixed, its victims follow from the
//! seed.

use std::collections::{BTreeMap, BTreeSet};

use engine::ids::StoreId;
use engine::shard_record::{ShardRecord, peers};

use super::checker::{self, RunFacts, Violation};
use super::cluster::SimCluster;
use super::etcd::{EtcdKey, EtcdValue, Write};
use super::history::OpOutcome;
use super::place::{index_of, store_id};
use super::plan::Plan;
use super::plan::large::ClusterSize;
use super::rng::Rng;
use super::trace::Trace;
use super::world::SimWorld;

/// The results of a run. Times are virtual, in milliseconds.
#[derive(Debug, Default)]
pub struct ScaleReport {
    pub violations: Vec<Violation>,
    /// The time until every shard was placed and led.
    pub placed_ms: u64,
    /// The time from the first change until the map was level again; `None`: it never was.
    pub level_ms: Option<u64>,
    /// The copies that are where none was before, and the fewest that the changes of the nodes ask
    /// for. A copy that was made and moved on again is not counted.
    pub moves: usize,
    pub moves_min: usize,
    /// Transactions of etcd that took effect while the map changed, and the most in one second.
    pub etcd_writes: u64,
    pub etcd_writes_per_second_max: u64,
    /// The other nodes that a node shares shards with.
    pub peers_max: usize,
    /// Copies on a node, and shards that it leads: the least and the most.
    pub copies: (usize, usize),
    pub leads: (usize, usize),
    pub acknowledged: usize,
    pub unknown: usize,
    pub steps: u64,
}

/// The first change happens this long after the shards were placed.
const LOAD_BEFORE: u64 = 1_000_000;
/// The zone dies this long after the first change, and comes back after it has been away for long
/// enough to be found dead.
const ZONE_DIES_AFTER: u64 = 1_500_000;
const ZONE_AWAY: u64 = 3_000_000;
/// A map that is not level by then never will be.
const GIVE_UP_AFTER: u64 = 600_000_000;
/// The interval at which the map is reviewed.
const REVIEW_EVERY: u64 = 100_000;

/// Runs one seed.
pub fn run_scale(seed: u64, size: ClusterSize) -> ScaleReport {
    let mut rng = Rng::new(seed);
    let plan = Plan::large(seed, size, &mut rng);
    let world = SimWorld::new(plan, rng, Trace::new(None));
    let mut run = ScaleRun { world, size, dead: BTreeSet::new(), report: ScaleReport::default() };
    run.script();
    run.finish();
    let core = &run.world.cluster.core;
    run.report.steps = core.step;
    run.report
}

struct ScaleRun {
    world: SimWorld,
    size: ClusterSize,
    /// The stores that hold nothing at the end: dead for good, or drained.
    dead: BTreeSet<StoreId>,
    report: ScaleReport,
}

impl ScaleRun {
    fn script(&mut self) {
        let size = self.size;
        if self.until(GIVE_UP_AFTER, |run| run.is_led()).is_none() {
            return self.broken("not every shard was placed and led");
        }
        self.report.placed_ms = self.now() / 1_000;
        self.run_for(LOAD_BEFORE);
        let (began, before) = (self.now(), self.records());
        self.change_nodes();
        self.run_for(ZONE_DIES_AFTER);
        let zone = self.world.cluster.core.rng.below(size.zones.into()) as u16;
        let fallen = self.zone_dies(zone);
        self.run_for(ZONE_AWAY);
        for &at in &fallen {
            self.world.cluster.nodes[at].start(&mut self.world.cluster.core);
        }
        let level = self.until(GIVE_UP_AFTER, |run| run.unlevel().is_none());
        self.report.level_ms = level.map(|at| (at - began) / 1_000);
        if level.is_none() {
            let why = self.unlevel().unwrap_or_default();
            self.broken(&format!("the map is not level after ten minutes: {why}"));
        }
        self.count_moves(&before);
        self.measure_balance();
    }

    /// Nodes join, others are drained, one dies for good, and with it the leading coordinator.
    fn change_nodes(&mut self) {
        let ClusterSize { nodes, joining, drained, .. } = self.size;
        let SimCluster { core, nodes: hosts, coordinators, .. } = &mut self.world.cluster;
        for joins in nodes..nodes + joining {
            hosts[usize::from(joins)].start(core);
        }
        let mut old: Vec<u16> = (0..nodes).collect();
        core.rng.shuffle(&mut old);
        let dies = usize::from(old[0]);
        hosts[dies].crash(core, true);
        self.dead.insert(hosts[dies].store);
        for &drains in &old[1..=usize::from(drained)] {
            let store = hosts[usize::from(drains)].store;
            self.dead.insert(store);
            core.etcd_write(Write::Put(EtcdKey::Drain(store), EtcdValue::Drain, None));
        }
        if let Some(leading) = coordinators.iter_mut().find(|host| host.is_leading()) {
            leading.crash(core);
        }
    }

    /// All running nodes of the zone lose power. Returns their numbers.
    fn zone_dies(&mut self, zone: u16) -> Vec<usize> {
        let SimCluster { core, nodes, .. } = &mut self.world.cluster;
        let mut fallen = Vec::new();
        for (at, node) in nodes.iter_mut().enumerate() {
            if at % usize::from(core.plan.zones) == usize::from(zone) && !node.is_down() {
                node.crash(core, true);
                fallen.push(at);
            }
        }
        fallen
    }

    // ---- stepping ------------------------------------------------------------------------------

    fn now(&self) -> u64 {
        self.world.cluster.core.now
    }

    fn run_for(&mut self, time: u64) {
        let end = self.now() + time;
        self.until(time, |run| run.now() >= end);
    }

    /// Runs until `done`, which is asked now and then. Returns the time, or `None` if it was not
    /// done in time or a promise was broken.
    fn until(&mut self, time: u64, done: impl Fn(&Self) -> bool) -> Option<u64> {
        let (end, mut second, mut writes) = (self.now() + time, self.now(), self.revision());
        let first = writes;
        let mut found = None;
        while found.is_none() && self.now() <= end {
            let review = self.now() + REVIEW_EVERY;
            while self.now() < review {
                self.world.step()?;
            }
            if !self.world.cluster.core.oracle.violations.is_empty() {
                break;
            }
            if self.now() >= second + 1_000_000 {
                let most = &mut self.report.etcd_writes_per_second_max;
                *most = (*most).max(self.world.cluster.core.etcd.revision() - writes);
                (second, writes) = (self.now(), self.revision());
            }
            found = done(self).then(|| self.now());
        }
        self.report.etcd_writes += self.revision() - first;
        found
    }

    fn revision(&self) -> u64 {
        self.world.cluster.core.etcd.revision()
    }

    fn broken(&mut self, detail: &str) {
        let detail = format!("{detail} at {}", self.now());
        self.report.violations.push(Violation { promise: "heals", detail });
    }

    // ---- the state of the map ------------------------------------------------------------------

    fn records(&self) -> Vec<ShardRecord> {
        self.world.cluster.core.etcd.shards().map(|(record, _)| record.clone()).collect()
    }

    fn is_led(&self) -> bool {
        let core = &self.world.cluster.core;
        core.etcd.shards().count() == usize::from(self.size.shards)
            && core.etcd.shards().all(|(record, _)| self.leads(record))
    }

    /// Returns whether the process that the record names serves the shard.
    fn leads(&self, record: &ShardRecord) -> bool {
        let host = &self.world.cluster.nodes[usize::from(index_of(record.primary.store))];
        host.me() == Some(record.primary)
            && host.node().is_some_and(|node| {
                let view = node.replicas().find(|view| view.shard == record.shard());
                let view = view.and_then(|view| view.primary);
                view.is_some_and(|primary| primary.epoch == record.epoch && primary.active)
            })
    }

    /// The reason why the map is not level, if it is not.
    fn unlevel(&self) -> Option<String> {
        let zones = self.world.cluster.core.plan.zones;
        for (record, _) in self.world.cluster.core.etcd.shards() {
            let shard = record.shard();
            if record.isr != record.target || !record.learners.is_empty() {
                return Some(format!("shard {shard} moves: {record:?}"));
            }
            let homes: BTreeSet<u16> = record.isr.iter().map(|&s| index_of(s) % zones).collect();
            if record.isr.len() != 3 || homes.len() != 3.min(usize::from(zones)) {
                return Some(format!("shard {shard} is not in three zones: {record:?}"));
            }
            if record.isr.iter().any(|store| self.dead.contains(store)) {
                return Some(format!("shard {shard} is on a node that is dead or drained"));
            }
            if !self.leads(record) {
                return Some(format!("shard {shard} is not led"));
            }
        }
        let (least, most) = self.spread(|record| record.isr.clone());
        let (leads_least, leads_most) = self.spread(|record| vec![record.primary.store]);
        let uneven = most > least + self.uneven() || leads_most > leads_least + 1;
        uneven.then(|| format!("copies {least}..{most}, leads {leads_least}..{leads_most}"))
    }

    /// The difference in copies between two nodes: zones of different sizes hold equally many.
    fn uneven(&self) -> usize {
        let zones = usize::from(self.world.cluster.core.plan.zones);
        let mut sizes = vec![0; zones];
        for store in self.living() {
            sizes[usize::from(index_of(store)) % zones] += 1;
        }
        let per_zone = usize::from(self.size.shards) * 3 / zones;
        let loads = sizes.iter().map(|&nodes| per_zone / nodes.max(1));
        let (least, most) = (loads.clone().min().unwrap_or(0), loads.max().unwrap_or(0));
        most - least + 2
    }

    fn living(&self) -> impl Iterator<Item = StoreId> {
        let all = self.size.nodes + self.size.joining;
        (0..all).map(store_id).filter(|store| !self.dead.contains(store))
    }

    fn spread(&self, of: impl Fn(&ShardRecord) -> Vec<StoreId>) -> (usize, usize) {
        let mut counts: BTreeMap<StoreId, usize> = self.living().map(|store| (store, 0)).collect();
        for (record, _) in self.world.cluster.core.etcd.shards() {
            for store in of(record) {
                *counts.entry(store).or_default() += 1;
            }
        }
        let least = counts.values().min().copied().unwrap_or(0);
        (least, counts.values().max().copied().unwrap_or(0))
    }

    // ---- the report ----------------------------------------------------------------------------

    /// Counts the stores that are in sync and were not before.
    fn count_moves(&mut self, before: &[ShardRecord]) {
        let after = self.records();
        let made = |(old, new): (&ShardRecord, &ShardRecord)| {
            new.isr.iter().filter(|store| !old.isr.contains(store)).count()
        };
        self.report.moves = before.iter().zip(&after).map(made).sum();
        let lost = before.iter().flat_map(|record| &record.isr);
        let lost = lost.filter(|store| self.dead.contains(store)).count();
        let share = 3 * usize::from(self.size.shards) / self.living().count().max(1);
        self.report.moves_min = lost.max(share * usize::from(self.size.joining));
    }

    fn measure_balance(&mut self) {
        let peers = peers(&self.records());
        self.report.peers_max = peers.values().map(BTreeSet::len).max().unwrap_or(0);
        self.report.copies = self.spread(|record| record.isr.clone());
        self.report.leads = self.spread(|record| vec![record.primary.store]);
    }

    /// Ends the load, reads every counter, and judges what clients have observed.
    fn finish(&mut self) {
        self.world.cluster.core.plan.load_until = self.now();
        let idle = self.until(60_000_000, |run| run.world.cluster.clients.is_idle());
        let SimCluster { core, clients, .. } = &mut self.world.cluster;
        clients.read_all(core);
        let read = self.until(60_000_000, |run| run.world.cluster.clients.is_done());
        if idle.is_none() || read.is_none() {
            self.broken("clients were not answered");
        }
        let SimCluster { core, clients, tokens, .. } = &mut self.world.cluster;
        self.report.violations.append(&mut core.oracle.violations);
        self.report.violations.extend(checker::judge(&RunFacts {
            history: &clients.history,
            tokens: &tokens.cases,
            plan: &core.plan,
            clocks_set: &core.clocks_set,
            leapt: false,
        }));
        let answers = clients.history.ops.iter().filter_map(|op| op.answer);
        for (_, outcome) in answers {
            match outcome {
                OpOutcome::Unknown => self.report.unknown += 1,
                OpOutcome::NotApplied => {}
                OpOutcome::Applied(_) | OpOutcome::Stale { .. } => self.report.acknowledged += 1,
            }
        }
    }
}
