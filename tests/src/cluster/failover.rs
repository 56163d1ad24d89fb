//! One node is killed or stopped under steady load: how long does each shard go without an answer?
//!
//! Measured for every shard, those that the node led and those it backed, by a prober each (see
//! [`Probe::gap`](super::load::Probe::gap)). Every run begins with full in-sync sets and ends with
//! them, every count within its bounds and all copies equal: a failover that loses something is no
//! fast failover.

use std::time::{Duration, Instant};

use super::load::Load;
use super::{Cluster, Signal};
use crate::cluster::http::Outcome;

/// `dkc dev`'s default lease TTL.
pub const LEASE_TTL: Duration = Duration::from_secs(2);
/// Increments that each prober gets through before the signal.
const WARM_UP: u64 = 50;
/// How long a killed node stays dead, or a stopped one stopped: longer than any gap that is allowed.
const AWAY: Duration = Duration::from_secs(5);
const RECOVERS_WITHIN: Duration = Duration::from_secs(60);

/// What one run showed.
pub struct Run {
    pub victim: String,
    /// The longest gap of each shard, longest first.
    pub gaps: Vec<Gap>,
    /// Requests not answered with 200. They are not counted as gaps, but show in them.
    pub failed: usize,
}

#[derive(Debug)]
pub struct Gap {
    pub shard: u64,
    pub led: bool,
    pub gap: Duration,
}

impl Run {
    pub fn worst(&self) -> &Gap {
        &self.gaps[0]
    }

    pub fn median(&self) -> Duration {
        self.gaps[self.gaps.len() / 2].gap
    }
}

/// `signal` is KILL or STOP; `replicas` is that of the cluster. `namespace` is new for each run.
#[track_caller]
pub fn run(
    cluster: &Cluster,
    namespace: &str,
    victim: &str,
    signal: Signal,
    replicas: usize,
) -> Run {
    cluster.wait_until_full(replicas);
    let shards = cluster.shards().expect("a full cluster");
    let keys = cluster.key_per_shard(namespace);
    let load = Load::start(&cluster.gateways(), namespace, &keys);
    load.wait_for_all(WARM_UP, RECOVERS_WITHIN);

    let at = Instant::now();
    let process = cluster.signal(victim, signal);
    std::thread::sleep(AWAY);
    if signal == Signal::STOP {
        // It wakes up as the primary it was, and must change nothing.
        cluster.signal(victim, Signal::CONT);
    } else {
        cluster.wait_until_gone(victim);
        cluster.start_again(&process);
    }
    load.wait_for_all(WARM_UP, RECOVERS_WITHIN);
    cluster.wait_until_full(replicas);
    let probes = load.stop();

    let led = |shard: &super::Shard| shard.primary.as_deref() == Some(victim);
    let gap = |(shard, probe): (&super::Shard, &super::load::Probe)| {
        let gap = probe.gap(at).expect("every prober was answered before");
        Gap { shard: shard.id, led: led(shard), gap }
    };
    let mut gaps: Vec<_> = shards.iter().zip(&probes.all).map(gap).collect();
    gaps.sort_by_key(|gap| std::cmp::Reverse(gap.gap));
    let failed = probes.ops().filter(|(_, op)| op.outcome != Outcome::Applied).count();
    probes.check(&cluster.gateway);
    cluster.wait_until_copies_agree(replicas);
    Run { victim: victim.to_owned(), gaps, failed }
}
