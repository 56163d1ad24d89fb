//! Kills or stops one node under steady load, and measures the time without an answer of each
//! shard.
//!
//! Each shard has a prober (see [`Probe::gap`](super::load::Probe::gap)), whether the node led it
//! or followed. Every run begins and ends with full in-sync sets. At its end every count is within
//! its bounds and all copies are equal, since a fast failover that loses something is worthless.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

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
const DAY_US: u64 = 86_400_000_000;

/// The result of one run.
pub struct FailoverRun {
    pub victim: String,
    /// The longest gap of each shard, longest first.
    pub gaps: Vec<Gap>,
    /// The number of requests not answered with 200. They do not end a gap.
    pub failed: usize,
    /// The steps of the coordinator; `None` if it did not take the node for dead.
    pub steps: Option<Steps>,
}

/// The steps of the coordinator, by its log, as times since the signal.
#[derive(Debug)]
pub struct Steps {
    /// The node was found to be dead.
    pub dead: Duration,
    /// The last of its shards had another primary in etcd.
    pub promoted: Duration,
}

impl Steps {
    /// Finds the steps in the log of a coordinator. `at` is when the node got the signal.
    fn find(log: &str, victim: &str, at: SystemTime) -> Option<Self> {
        let since = |line: &str| {
            let (time, _) = line.split_once(' ')?;
            let at = at.duration_since(UNIX_EPOCH).ok()?.as_micros() as u64 % DAY_US;
            Some(Duration::from_micros((time_of_day_us(time)? + DAY_US - at) % DAY_US))
        };
        let (dead, from) =
            (format!(" node is dead node=\"{victim} ("), format!(" promoted from=\"{victim} ("));
        let lines = log.lines().map(|line| (since(line), line));
        // A line from before the signal is nearly a day younger.
        let is_new = |since: &Duration| *since < RECOVERS_WITHIN;
        let times = |text: &str| {
            let found = lines.clone().filter(|(_, line)| line.contains(text));
            found.filter_map(|(since, _)| since.filter(is_new)).collect::<Vec<_>>()
        };
        Some(Self { dead: *times(&dead).first()?, promoted: *times(&from).last()? })
    }
}

/// The microseconds since midnight of a time such as `2026-11-30T22:35:48.341376Z`.
fn time_of_day_us(time: &str) -> Option<u64> {
    let (_, of_day) = time.strip_suffix('Z')?.split_once('T')?;
    let mut parts = of_day.split([':', '.']).map(str::parse::<u64>);
    let mut part = || parts.next()?.ok();
    let (hours, minutes, seconds, micros) = (part()?, part()?, part()?, part()?);
    Some(((hours * 60 + minutes) * 60 + seconds) * 1_000_000 + micros)
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

    let (at, wall) = (Instant::now(), SystemTime::now());
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
    let coordinators = cluster.names("coordinator");
    let mut logs = coordinators.iter().map(|name| cluster.log(name));
    let steps = logs.find_map(|log| Steps::find(&log, victim, wall));
    FailoverRun { victim: victim.to_owned(), gaps, failed, steps }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The node died once before; its log lines of that time do not count.
    #[test]
    fn steps_are_found_in_the_log_of_a_coordinator() {
        let log = "\
2026-11-30T23:58:00.000000Z  WARN node is dead node=\"node-2 (boot 1)\" why=\"its lease ended\"
2026-11-30T23:59:59.999000Z  WARN node is dead node=\"node-3 (boot 1)\" why=\"its lease ended\"
2026-12-01T00:00:00.014000Z  WARN node is dead node=\"node-2 (boot 2)\" why=\"its lease ended\"
2026-12-01T00:00:00.019000Z  INFO promoted from=\"node-2 (boot 2)\" to=\"node-3 (boot 1)\" count=4
2026-12-01T00:00:00.020500Z  INFO promoted from=\"node-2 (boot 2)\" to=\"node-1 (boot 1)\" count=4
";
        // The first moment of 2026-12-01.
        let at = UNIX_EPOCH + Duration::from_secs(20_788 * 86_400);
        let steps = Steps::find(log, "node-2", at).expect("both steps are there");
        assert_eq!(steps.dead, Duration::from_millis(14));
        assert_eq!(steps.promoted, Duration::from_micros(20_500));
        assert!(Steps::find(log, "node-1", at).is_none());
    }
}
