//! The plan of a large cluster: the shipped settings, at the size of a promise.

use engine::coordinator::{self, Flags};

use super::{NodeClock, Plan};
use crate::sim::rng::Rng;

/// The size of a cluster, and of what happens to it.
#[derive(Clone, Copy, Debug)]
pub struct ClusterSize {
    /// The nodes at the start.
    pub nodes: u16,
    pub shards: u16,
    pub gateways: u8,
    pub coordinators: u8,
    /// The nodes are dealt out to so many zones.
    pub zones: u16,
    pub clients: usize,
    /// Nodes that join.
    pub joining: u16,
    /// Nodes that are drained.
    pub drained: u16,
}

/// As shipped a node that is away is replaced after ten minutes; here a run need not last so long.
const REBUILD_DELAY_MS: u64 = 10_000;

impl Plan {
    /// A healthy cluster of this size under load, with the settings that are shipped.
    pub fn large(seed: u64, size: ClusterSize, rng: &mut Rng) -> Self {
        let nodes = size.nodes + size.joining;
        let plan = Self::quiet(seed, rng);
        let flags = Flags { shards: Some(size.shards.into()), ..plan.coordinator.flags.clone() };
        Self {
            nodes,
            first_nodes: size.nodes,
            zones: size.zones,
            shards: size.shards,
            gateways: size.gateways,
            coordinators: size.coordinators,
            clients: size.clients,
            // The traffic proves the promises; the changes of the map are what is measured.
            think: 200_000,
            digit_counters: 4 * size.clients,
            slowness: vec![1; nodes.into()],
            clocks: vec![NodeClock::default(); nodes.into()],
            coordinator: coordinator::Settings {
                flags,
                expect_nodes: Some(size.nodes.into()),
                rebuild_delay_ms: REBUILD_DELAY_MS,
                ..coordinator::Settings::default()
            },
            ..plan
        }
    }
}
