//! Measures the planner: milliseconds for a plan of a large cluster, in each of several situations.
//!
//! `cargo run --profile ci -p tests --bin planner-speed`

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::time::Instant;

use engine::batcher::shard_map::ranges;
use engine::coordinator::planner::{
    PlannedChange, PlannerInput, PlannerLimits, ShardView, Store, StoreState, changes, place,
};
use engine::ids::{Boot, Epoch, StoreBoot, StoreId, Version};
use engine::shard_record::{ShardRecord, peers};

const NODES: u128 = 200;
const SHARDS: u32 = 4_096;
const REPLICAS: usize = 3;
/// Plans are made and carried out until nothing is left to do, at most so many.
const PLANS_MAX: usize = 2_000;

fn main() -> std::io::Result<()> {
    let mut out = std::io::stdout();
    for zones in [1, 3, 5] {
        let nodes = |count| (1..=count).map(|number| node(number, zones)).collect::<Vec<_>>();
        let begun = Instant::now();
        let mut cluster = PlannedCluster::new(nodes(NODES));
        let first = begun.elapsed();
        writeln!(out, "{NODES} nodes in {zones} zones, {SHARDS} shards: first map {first:.0?}")?;
        writeln!(out, "  at rest: {}", cluster.settle(PLANS_MAX))?;
        cluster.stores = nodes(NODES + 20);
        writeln!(out, "  20 nodes join: {}", cluster.settle(PLANS_MAX))?;
        cluster.stores.iter_mut().take(20).for_each(|store| store.state = StoreState::Draining);
        writeln!(out, "  20 nodes drain: {}", cluster.settle(PLANS_MAX))?;
        let zone = cluster.stores[30].zone.clone();
        let gone = cluster.stores.iter_mut().filter(|store| store.zone == zone).take(60);
        gone.for_each(|store| store.state = StoreState::Gone);
        writeln!(
            out,
            "  60 nodes, of one zone if there are several, are lost: {}",
            cluster.settle(PLANS_MAX)
        )?;
    }
    Ok(())
}

fn node(number: u128, zones: u128) -> Store {
    Store {
        id: StoreId(number),
        zone: format!("zone-{}", number % zones),
        host: format!("host-{number}"),
        capacity: 1 << 40,
        state: StoreState::Ready,
    }
}

/// A cluster in which a plan is carried out at once: learners join, and lost members leave.
struct PlannedCluster {
    stores: Vec<Store>,
    shards: Vec<ShardRecord>,
}

/// The plans that were made until there was nothing left to do.
struct Settled {
    plans: usize,
    changes: usize,
    slowest_ms: f64,
    mean_ms: f64,
    loads: (usize, usize),
    /// The most other nodes that a node shares shards with.
    peers: usize,
    /// The different sets of nodes that hold a shard: when all nodes of one fail, it is lost.
    sets: usize,
    is_at_rest: bool,
}

impl std::fmt::Display for Settled {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { plans, changes, slowest_ms, mean_ms, loads, peers, sets, is_at_rest } = self;
        let (least, most) = loads;
        let rest = if *is_at_rest { "" } else { ", and not at rest yet" };
        write!(
            out,
            "{plans} plans of {mean_ms:.1} ms, slowest {slowest_ms:.1} ms; {changes} changes; \
             {least} to {most} replicas and at most {peers} peers per node, {sets} different \
             sets{rest}"
        )
    }
}

impl PlannedCluster {
    fn new(stores: Vec<Store>) -> Self {
        let placed = place(&stores, &[], SHARDS as usize, REPLICAS, &PlannerLimits::default());
        let placed = placed.expect("there are many nodes");
        let record =
            |(slots, placement): (_, engine::coordinator::planner::Placement)| ShardRecord {
                slots,
                epoch: Epoch(1),
                version: Version(1),
                primary: StoreBoot { store: placement.primary, boot: Boot(1) },
                isr: placement.replicas.clone(),
                target: placement.replicas,
                ..ShardRecord::default()
            };
        Self { shards: ranges(SHARDS).zip(placed).map(record).collect(), stores }
    }

    /// Makes plans and carries them out until nothing is left to do, at most `plans_max`.
    fn settle(&mut self, plans_max: usize) -> Settled {
        let (mut plans, mut count, mut slowest, mut sum) = (0, 0, 0.0_f64, 0.0);
        let mut is_at_rest = false;
        while plans < plans_max && !is_at_rest {
            let begun = Instant::now();
            let changes = self.plan();
            let ms = begun.elapsed().as_secs_f64() * 1e3;
            (plans, slowest, sum) = (plans + 1, slowest.max(ms), sum + ms);
            count += changes.len();
            is_at_rest = changes.is_empty();
            self.carry_out(&changes);
        }
        let loads = self.loads();
        Settled {
            plans,
            changes: count,
            slowest_ms: slowest,
            mean_ms: sum / plans as f64,
            loads: (
                loads.values().min().copied().unwrap_or(0),
                loads.values().max().copied().unwrap_or(0),
            ),
            peers: self.peers_max(),
            sets: self.shards.iter().map(|record| &record.target).collect::<BTreeSet<_>>().len(),
            is_at_rest,
        }
    }

    fn peers_max(&self) -> usize {
        peers(&self.shards).values().map(BTreeSet::len).max().unwrap_or(0)
    }

    fn plan(&self) -> Vec<PlannedChange> {
        let shard = |record| ShardView { record, free: true, unable: Vec::new() };
        let shards: Vec<ShardView<'_>> = self.shards.iter().map(shard).collect();
        changes(&PlannerInput {
            stores: &self.stores,
            shards: &shards,
            replicas: REPLICAS,
            min_in_sync: 2,
            limits: PlannerLimits::default(),
            hold: false,
            paused: false,
            quiet: true,
        })
    }

    fn carry_out(&mut self, changes: &[PlannedChange]) {
        let states: BTreeMap<_, _> = self.stores.iter().map(|it| (it.id, it.state)).collect();
        let is_gone = |store: &StoreId| states.get(store) == Some(&StoreState::Gone);
        let changes: BTreeMap<_, _> =
            changes.iter().map(|change| (change.shard(), change)).collect();
        for record in &mut self.shards {
            if let Some(change) = changes.get(&record.shard()) {
                *record = change.apply(record, 2);
                if let PlannedChange::HandOver { to, .. } = change {
                    record.primary.store = *to;
                }
            }
            record.isr.append(&mut record.learners);
            record.isr.sort();
            if is_gone(&record.primary.store)
                && let Some(&successor) = record.isr.iter().find(|store| !is_gone(store))
            {
                record.primary.store = successor;
            }
            if record.isr.len() > 2 {
                record.isr.retain(|store| !is_gone(store));
            }
        }
    }

    /// The replicas of each node that may have some.
    fn loads(&self) -> BTreeMap<StoreId, usize> {
        let ready = self.stores.iter().filter(|store| store.state == StoreState::Ready);
        let held = |id| self.shards.iter().filter(|record| record.target.contains(&id)).count();
        ready.map(|store| (store.id, held(store.id))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A plan takes some 30 ms, in the thread that promotes. A search that begins anew for each
    /// move, or looks through all shards for each pair of nodes, takes seconds.
    #[test]
    fn a_plan_for_hundreds_of_nodes_takes_a_fraction_of_a_second() {
        let nodes = |count| (1..=count).map(|number| node(number, 3)).collect::<Vec<_>>();
        let mut cluster = PlannedCluster::new(nodes(NODES));
        assert_eq!(cluster.settle(1).changes, 0);
        cluster.stores = nodes(NODES + 20);
        let joining = cluster.settle(3);
        assert!(joining.changes >= 100, "{joining}");
        assert!(joining.mean_ms < 500.0, "{joining}");
    }
}
