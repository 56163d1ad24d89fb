//! Measures how long a shard is without an open primary when its node dies, in virtual time.
//!
//! A quiet cluster under load loses one node, for good; nothing else goes wrong. The gap of a shard
//! ends when the process that its record names serves it: elected, its barrier committed, not
//! frozen.

use super::cluster::SimCluster;
use super::place::Place;
use super::plan::Plan;
use super::rng::Rng;
use super::trace::Trace;
use super::world::SimWorld;

/// The way in which the node dies.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Death {
    /// `kill -9`: its connections are reset, and new ones refused.
    Killed,
    /// The process is paused, or the network loses everything: nothing comes back, not even a
    /// refusal.
    Silent,
}

const DIES_AT: u64 = 3_000_000;
const GIVE_UP_AFTER: u64 = 30_000_000;

/// The longest gap of any shard that the node led or followed, in milliseconds; `None` if a shard
/// has not opened again.
pub fn worst_gap_ms(seed: u64, death: Death) -> Option<u64> {
    let mut rng = Rng::new(seed);
    let plan = Plan::quiet(seed, &mut rng);
    let mut world = SimWorld::new(plan, rng, Trace::new(None));
    // The phase of the other processes' clocks varies from seed to seed.
    let at = DIES_AT + world.cluster.core.rng.below(1_000_000);
    while world.cluster.core.now < at {
        world.step()?;
    }
    let shards = world.cluster.core.etcd.shards().count() as u64;
    assert_eq!(
        shards,
        u64::from(world.cluster.core.plan.shards),
        "placed and led before it begins"
    );
    let node = world.cluster.core.rng.index(world.cluster.nodes.len());
    kill(&mut world.cluster, node, death);
    let killed_at = world.cluster.core.now;
    let mut worst = 0;
    while world.cluster.core.now < killed_at + GIVE_UP_AFTER {
        match closed_shards(&world.cluster, node) {
            0 if world.cluster.core.now > killed_at + 5_000_000 => return Some(worst / 1_000),
            0 => {}
            _ => worst = world.cluster.core.now - killed_at,
        }
        world.step()?;
    }
    None
}

fn kill(cluster: &mut SimCluster, node: usize, death: Death) {
    if death == Death::Killed {
        cluster.nodes[node].crash(&mut cluster.core, false);
        return;
    }
    let dead = cluster.nodes[node].place;
    let nodes = cluster.nodes.iter().map(|node| node.place);
    let gateways = cluster.gateways.iter().map(|gateway| gateway.place);
    let coordinators = cluster.coordinators.iter().map(|coordinator| coordinator.place);
    let others = nodes.chain(gateways).chain(coordinators).chain([Place::Etcd]);
    for other in others.filter(|other| *other != dead).collect::<Vec<_>>() {
        cluster.core.block(dead, other);
        cluster.core.block(other, dead);
    }
}

/// The shards that take no writes now: no live process leads them, or a member that is silent holds
/// up their commits.
fn closed_shards(cluster: &SimCluster, dead: usize) -> usize {
    let dead = cluster.nodes[dead].store;
    let records = cluster.core.etcd.shards();
    let open = |config: &engine::shard_record::ShardRecord| {
        let node = cluster.nodes.iter().find(|node| node.store == config.primary.store);
        let running = node.filter(|node| node.store != dead).and_then(|node| node.node());
        let mut views = running.into_iter().flat_map(|running| running.replicas());
        !config.isr.contains(&dead)
            && views.any(|view| {
                view.shard == config.shard()
                    && view.primary.is_some_and(|primary| {
                        primary.epoch == config.epoch && primary.active && !primary.frozen
                    })
            })
    };
    records.filter(|(config, _)| !open(config)).count()
}
