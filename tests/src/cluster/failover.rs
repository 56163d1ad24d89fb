//! Kills or stops one node under steady load, and measures the time without an answer of each
//! shard.
//!
//! Each shard has a prober (see [`Probe::gap`](super::load::Probe::gap)), whether the node led it
//! or followed. Every run begins and ends with full in-sync sets. At its end every count is within
//! its bounds and all copies are equal, since a fast failover that loses something is worthless.

use std::time::{Duration, Instant};

use super::load::Load;
use super::{Cluster, Signal};
use crate::cluster::http::HttpOutcome;

/// The default lease TTL of `dkc dev`.
pub const LEASE_TTL: Duration = Duration::from_secs(2);
/// The number of increments of each prober before the signal.
const WARM_UP: u64 = 50;
/// The time for which a node stays killed or stopped, which is longer than any permitted gap.
const AWAY: Duration = Duration::from_secs(5);
const RECOVERS_WITHIN: Duration = Duration::from_secs(60);

/// The result of one run.
pub struct FailoverRun {
    pub victim: String,
    /// The longest gap of each shard, longest first.
    pub gaps: Vec<Gap>,
    /// The number of requests not answered with 200. They do not end a gap.
    pub failed: usize,
}

#[derive(Debug)]
pub struct Gap {
    pub shard: u64,
    pub led: bool,
    pub gap: Duration,
}

impl FailoverRun {
    pub fn worst(&self) -> &Gap {
        &self.gaps[0]
    }

    pub fn median(&self) -> Duration {
        self.gaps[self.gaps.len() / 2].gap
    }
}

/// Runs once. `signal` is KILL, STOP or TERM, `replicas` is that of the cluster, and `namespace` is
/// new for each run.
#[track_caller]
pub fn run(
    cluster: &Cluster,
    namespace: &str,
    victim: &str,
    signal: Signal,
    replicas: usize,
) -> FailoverRun {
    cluster.wait_until_full(replicas);
    let shards = cluster.shards().expect("a full cluster");
    let keys = cluster.key_per_shard(namespace);
    let load = Load::start(&cluster.gateways(), namespace, &keys);
    load.wait_for_all(WARM_UP, RECOVERS_WITHIN);

    let at = Instant::now();
    let process = cluster.signal(victim, signal);
    std::thread::sleep(AWAY);
    if signal == Signal::STOP {
        // The node resumes as the primary that it was, and must change nothing.
        cluster.signal(victim, Signal::CONT);
    } else {
        cluster.wait_until_gone(victim);
        cluster.start_again(&process);
    }
    load.wait_for_all(WARM_UP, RECOVERS_WITHIN);
    cluster.wait_until_full(replicas);
    let probes = load.stop();

    let led = |shard: &super::ClusterShard| shard.primary.as_deref() == Some(victim);
    let gap = |(shard, probe): (&super::ClusterShard, &super::load::Probe)| {
        let gap = probe.gap(at).expect("every prober was answered before");
        Gap { shard: shard.id, led: led(shard), gap }
    };
    let mut gaps: Vec<_> = shards.iter().zip(&probes.all).map(gap).collect();
    gaps.sort_by_key(|gap| std::cmp::Reverse(gap.gap));
    let failed = probes.ops().filter(|(_, op)| op.outcome != HttpOutcome::Applied).count();
    probes.check(&cluster.gateway);
    cluster.wait_until_copies_agree(replicas);
    FailoverRun { victim: victim.to_owned(), gaps, failed }
}
