//! The profiles: lists of rows, each a load on a system that is started for it, with its goals.

use std::time::Duration;

use bench::fsync::FsyncPlan;
use bench::keys::KeyDistribution;
use client::Media;

use super::cluster::{ClusterShape, USUAL};
use super::goals::RowGoal;
use super::subject::LoadShape;

/// A list of rows.
#[derive(Clone, Copy, Debug, Eq, PartialEq, clap::ValueEnum)]
pub(crate) enum BenchProfile {
    /// Every kind of row once, for a second each: whether the benchmark itself is right
    Smoke,
    /// The figures that dkc is judged by, beside what others would use instead
    Headline,
    /// Three times too much load, a killed node, half load
    Stress,
    /// One axis at a time: batch, keys, distribution, connections, nodes, shards, formats, reads
    Sweep,
    /// A hundred million keys with little memory
    Big,
}

/// The user's changes to a profile.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ProfileLimits {
    /// The time of each measured part; `None` for the row's own.
    pub(crate) measured: Option<Duration>,
    /// The time before each measured part; `None` for the row's own.
    pub(crate) warm_up: Option<Duration>,
    /// The most keys of a row; `None` for the row's own.
    pub(crate) keys_max: Option<u64>,
}

/// The system that is started for a row.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum RowSystem {
    /// A cluster of dkc.
    Dkc(ClusterShape),
    /// The server that only answers.
    Hello,
    /// A primary and two replicas of Redis.
    Redis,
    /// One server of PostgreSQL.
    Postgres,
    /// Three members of etcd.
    Etcd,
    /// Nothing but the disk.
    Disk,
}

/// The action of a row.
#[derive(Clone, Debug)]
pub(crate) enum RowAction {
    /// The row generates a load.
    Load(LoadShape),
    /// The row kills a node a third into the load.
    KillNode(LoadShape),
    /// The row restarts the cluster, and measures the time until every shard is open.
    Restart,
    /// The row writes to the disk.
    Fsync(FsyncPlan),
}

/// A row of a profile.
#[derive(Clone, Debug)]
pub(crate) struct ProfileRow {
    /// The name, which is unique in the profile.
    pub(crate) name: String,
    /// The system. Neighbouring rows with equal systems share one.
    pub(crate) system: RowSystem,
    /// The action.
    pub(crate) action: RowAction,
    /// The replicas of Redis that a request waits for.
    pub(crate) wait_for: Option<u64>,
    /// The row whose rate, times a share, is the rate of this row's open loop.
    pub(crate) rate_of: Option<(&'static str, f64)>,
    /// The goals.
    pub(crate) goals: Vec<RowGoal>,
    /// The axis of a sweep, and the position on it if it is a number.
    pub(crate) axis: Option<(&'static str, Option<f64>)>,
}

impl BenchProfile {
    /// Returns the rows, changed as the user wants.
    pub(crate) fn rows(self, limits: ProfileLimits) -> Vec<ProfileRow> {
        let mut rows = match self {
            Self::Smoke => smoke(),
            Self::Headline => headline(),
            Self::Stress => stress(),
            Self::Sweep => sweep(),
            Self::Big => big(),
        };
        rows.iter_mut().for_each(|row| row.limit(limits));
        rows
    }

    /// The name, which is also that of its files.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Smoke => "smoke",
            Self::Headline => "headline",
            Self::Stress => "stress",
            Self::Sweep => "sweep",
            Self::Big => "big",
        }
    }

    /// The number of rounds if none is given.
    pub(crate) fn usual_rounds(self) -> u32 {
        if self == Self::Headline { 5 } else { 1 }
    }
}

impl ProfileRow {
    fn new(name: impl Into<String>, system: RowSystem, action: RowAction) -> Self {
        Self {
            name: name.into(),
            system,
            action,
            wait_for: None,
            rate_of: None,
            goals: Vec::new(),
            axis: None,
        }
    }

    /// Returns the names of the rows without which this one means nothing.
    pub(crate) fn depends_on(&self) -> impl Iterator<Item = &'static str> {
        let goals = self.goals.iter().filter_map(RowGoal::compared_to);
        goals.chain(self.rate_of.map(|(name, _)| name))
    }

    fn limit(&mut self, limits: ProfileLimits) {
        match &mut self.action {
            RowAction::Load(shape) | RowAction::KillNode(shape) => {
                shape.measured = limits.measured.unwrap_or(shape.measured);
                shape.warm_up = limits.warm_up.unwrap_or(shape.warm_up);
                shape.keys = limits.keys_max.map_or(shape.keys, |max| shape.keys.min(max));
            }
            RowAction::Fsync(plan) => plan.measured = limits.measured.unwrap_or(plan.measured),
            RowAction::Restart => {}
        }
    }

    fn goal(mut self, goal: RowGoal) -> Self {
        self.goals.push(goal);
        self
    }

    fn waiting_for(mut self, replicas: u64) -> Self {
        self.wait_for = Some(replicas);
        self
    }

    fn at_rate_of(mut self, row: &'static str, share: f64) -> Self {
        self.rate_of = Some((row, share));
        self
    }
}

const OURS: RowSystem = RowSystem::Dkc(USUAL);
const MILLION: u64 = 1_000_000;

/// Single increments, or batches from this many clients over a million uniform keys.
fn load(clients: usize, batch: usize) -> LoadShape {
    LoadShape { clients, batch, ..LoadShape::default() }
}

fn row(name: impl Into<String>, system: RowSystem, shape: LoadShape) -> ProfileRow {
    ProfileRow::new(name, system, RowAction::Load(shape))
}

/// Three writers, as many as there are replicas: the F of the goals.
fn fsync_row(measured: Duration) -> ProfileRow {
    let plan = FsyncPlan { writers: 3, bytes: 100, measured };
    ProfileRow::new(F, RowSystem::Disk, RowAction::Fsync(plan))
}

const HELLO: &str = "bare hyper, 256 connections";
const F: &str = "F: three writers, fdatasync at once";
const REDIS: &str = "Redis INCR, 256 connections";
const REDIS_64: &str = "Redis INCR, 64 connections";
const SINGLES: &str = "one increment per request, 256 connections";
const BATCHES: &str = "batches of 1,000, 16 clients, 1 M keys";
const MANY_SHARDS: &str = "batches of 1,000, 16 clients, 1 M keys, 1,024 shards";

fn headline() -> Vec<ProfileRow> {
    let reads = LoadShape { reads_percent: 100, ..load(256, 1) };
    let small = LoadShape { keys: 180_000, ..load(8, 1000) };
    let large = LoadShape { keys: 10 * MILLION, ..load(16, 1000) };
    let one = LoadShape { distribution: KeyDistribution::One, ..load(16, 1000) };
    let many_shards = RowSystem::Dkc(ClusterShape { shards: 1024, ..USUAL });
    vec![
        row(HELLO, RowSystem::Hello, load(256, 1)),
        fsync_row(Duration::from_secs(10)),
        row(SINGLES, OURS, load(256, 1))
            .goal(RowGoal::RateOf(HELLO, 0.7))
            .goal(RowGoal::RateOf(REDIS, 1.0))
            .goal(RowGoal::MicrosAtMost(17.0)),
        row("one increment per request, 64 connections", OURS, load(64, 1))
            .goal(RowGoal::RateOf(REDIS_64, 1.0))
            .goal(RowGoal::P50AtMost(1.2)),
        row("one increment per request, 1 connection", OURS, load(1, 1))
            .goal(RowGoal::P50Above(F, 0.2))
            .goal(RowGoal::P99Above(F, 1.0)),
        row("linearizable get, 256 connections", OURS, reads).goal(RowGoal::RateOf(HELLO, 0.7)),
        row("one increment per request at half load", OURS, load(256, 1))
            .at_rate_of(SINGLES, 0.5)
            .goal(RowGoal::P99Above(F, 3.0)),
        row("batches of 1,000, 8 clients, 0.18 M keys", OURS, small)
            .goal(RowGoal::RateAtLeast(2e6))
            .goal(RowGoal::MicrosAtMost(1.0)),
        row("batches of 1,000, 16 clients, one key", OURS, one).goal(RowGoal::RateAtLeast(3e6)),
        row(BATCHES, OURS, load(16, 1000))
            .goal(RowGoal::RateAtLeast(1.5e6))
            .goal(RowGoal::MicrosAtMost(1.2))
            .goal(RowGoal::NoRefusals),
        row("batches of 1,000, 16 clients, 10 M keys", OURS, large)
            .goal(RowGoal::RateAtLeast(6e5))
            .goal(RowGoal::P99AtMost(100.0))
            .goal(RowGoal::NoRefusals),
        row(MANY_SHARDS, many_shards, load(16, 1000)).goal(RowGoal::RateOf(BATCHES, 0.8)),
        row(REDIS, RowSystem::Redis, load(256, 1)),
        row(REDIS_64, RowSystem::Redis, load(64, 1)),
        row("Redis INCR and WAIT 2, 256 connections", RowSystem::Redis, load(256, 1))
            .waiting_for(2),
        row("Redis pipelines of 16, 64 connections", RowSystem::Redis, load(64, 16)),
        row("Redis pipelines of 1,000, 16 connections", RowSystem::Redis, load(16, 1000)),
        row("PostgreSQL upserts, 64 connections", RowSystem::Postgres, load(64, 1)),
        row("etcd transactions, 256 connections", RowSystem::Etcd, load(256, 1)),
    ]
}

fn smoke() -> Vec<ProfileRow> {
    let small = |clients, batch| LoadShape {
        keys: 1000,
        warm_up: Duration::from_millis(200),
        measured: Duration::from_secs(1),
        ..load(clients, batch)
    };
    let json = LoadShape { media: Media::Json, ..small(4, 100) };
    let zipf = LoadShape { distribution: KeyDistribution::Zipf(0.99), ..small(4, 100) };
    let one = LoadShape { distribution: KeyDistribution::One, ..small(4, 100) };
    // Single increments take long enough for the figures to be read before the last key is sent.
    let each =
        LoadShape { distribution: KeyDistribution::Each, warm_up: Duration::ZERO, ..small(4, 1) };
    let mixed = LoadShape { reads_percent: 50, ..small(8, 1) };
    let bounded = LoadShape { reads_percent: 50, staleness_ms: Some(1000), ..small(8, 1) };
    let open = LoadShape { rate: Some(200.0), ..small(64, 1) };
    let keyed = LoadShape { keyed: true, ..small(8, 1) };
    vec![
        row(HELLO, RowSystem::Hello, small(8, 1)),
        fsync_row(Duration::from_secs(1)),
        row("singles", OURS, small(8, 1)),
        row("keyed singles", OURS, keyed),
        row("gets between increments", OURS, mixed),
        row("bounded gets between increments", OURS, bounded),
        row("text", OURS, small(4, 100)),
        row("JSON", OURS, json),
        row("Zipf", OURS, zipf),
        row("one key", OURS, one),
        row("each key once", OURS, each),
        row("open loop", OURS, open),
        row("etcd", RowSystem::Etcd, small(8, 1)),
    ]
}

const CAPACITY: &str = "batches of 1,000, 64 clients: capacity";
const HALF_BEFORE: &str = "half of it";
const HALF_AFTER: &str = "half of it, right after the overload";
const CAPACITY_SINGLES: &str = "one increment per request, 256 clients: capacity";
const HALF_SINGLES: &str = "half of these";
const KILL: &str = "half of these, while a node is killed";

fn stress() -> Vec<ProfileRow> {
    let system = RowSystem::Dkc(ClusterShape { respawn: true, ..USUAL });
    let seconds = Duration::from_secs;
    let crowd = LoadShape { measured: seconds(120), ..load(1024, 1000) };
    let half = LoadShape { measured: seconds(10), ..load(256, 1000) };
    let at_once = LoadShape { warm_up: Duration::ZERO, ..half.clone() };
    let singles = LoadShape { measured: seconds(30), ..load(512, 1) };
    vec![
        row(CAPACITY, system, load(64, 1000)),
        row(HALF_BEFORE, system, half).at_rate_of(CAPACITY, 0.5),
        row("three times as much, 1,024 connections", system, crowd)
            .at_rate_of(CAPACITY, 3.0)
            .goal(RowGoal::RateOf(CAPACITY, 0.8))
            .goal(RowGoal::RefusalsWithin(1000.0))
            .goal(RowGoal::NoErrors),
        row(HALF_AFTER, system, at_once)
            .at_rate_of(CAPACITY, 0.5)
            .goal(RowGoal::NormalWithin(HALF_BEFORE, 10.0)),
        row(CAPACITY_SINGLES, system, load(256, 1)),
        row(HALF_SINGLES, system, load(512, 1)).at_rate_of(CAPACITY_SINGLES, 0.5),
        ProfileRow::new(KILL, system, RowAction::KillNode(singles))
            .at_rate_of(CAPACITY_SINGLES, 0.5)
            .goal(RowGoal::SlowestWithin(500.0))
            .goal(RowGoal::NoErrors),
    ]
}

fn sweep() -> Vec<ProfileRow> {
    let base = || load(16, 1000);
    let mut rows = Vec::new();
    let mut add = |axis: &'static str, x: Option<f64>, text: String, system, shape| {
        let name = format!("{axis}: {text}");
        rows.push(ProfileRow { axis: Some((axis, x)), ..row(name, system, shape) });
    };
    for batch in [1, 10, 100, 1000, 10_000] {
        add("batch", Some(batch as f64), batch.to_string(), OURS, load(16, batch));
    }
    for distribution in
        [KeyDistribution::Uniform, KeyDistribution::Zipf(0.99), KeyDistribution::One]
    {
        let shape = LoadShape { distribution, ..base() };
        add("distribution", None, distribution.to_string(), OURS, shape);
    }
    for clients in [1, 4, 16, 64, 256, 1024] {
        add("connections", Some(clients as f64), clients.to_string(), OURS, load(clients, 1));
    }
    for (name, media) in [("text", Media::Text), ("json", Media::Json)] {
        add("format", None, name.to_owned(), OURS, LoadShape { media, ..base() });
    }
    for percent in [1, 10, 50, 90, 100] {
        let shape = LoadShape { reads_percent: percent, ..load(256, 1) };
        add("reads", Some(f64::from(percent)), format!("{percent} %"), OURS, shape);
    }
    let bounded = LoadShape { reads_percent: 100, staleness_ms: Some(1000), ..load(256, 1) };
    add("bounded reads", None, "100 %".to_owned(), OURS, bounded);
    for nodes in [3, 5, 7, 9] {
        let system = RowSystem::Dkc(ClusterShape { nodes, ..USUAL });
        add("nodes", Some(f64::from(nodes)), nodes.to_string(), system, base());
    }
    for shards in [3, 24, 96, 384, 1024] {
        let system = RowSystem::Dkc(ClusterShape { shards, ..USUAL });
        add("shards", Some(f64::from(shards)), shards.to_string(), system, base());
    }
    // The keys come last: a large key space would burden the rows that share its cluster.
    for keys in [1000, 10_000, 100_000, MILLION, 10 * MILLION, 100 * MILLION] {
        let shape = LoadShape { keys, ..base() };
        add("keys", Some(keys as f64), keys.to_string(), OURS, shape);
    }
    rows
}

/// The row of `big` whose rate another row refers to.
const GETS: &str = "linearizable get after the restart";

fn big() -> Vec<ProfileRow> {
    let (keys, memory_bytes) = (100 * MILLION, 256 << 20);
    let system = RowSystem::Dkc(ClusterShape { memory_bytes: Some(memory_bytes), ..USUAL });
    let fill = LoadShape {
        keys,
        distribution: KeyDistribution::Each,
        warm_up: Duration::ZERO,
        // The load ends when every key has its increment.
        measured: Duration::from_secs(3600),
        ..load(8, 10_000)
    };
    let writes = LoadShape { keys, ..load(16, 1000) };
    let reads = LoadShape { keys, reads_percent: 100, ..load(64, 1) };
    vec![
        row("every key once", system, fill)
            .goal(RowGoal::DiskAtMost(20.0))
            .goal(RowGoal::MemoryAtMost(memory_bytes as f64 * 1.1)),
        row("batches of 1,000, 16 clients", system, writes),
        row("linearizable get, 64 connections", system, reads.clone())
            .goal(RowGoal::MemoryAtMost(memory_bytes as f64 * 1.1)),
        ProfileRow::new("restart of the cluster", system, RowAction::Restart),
        row(GETS, system, reads.clone()),
        row("a third as many gets, at this rate", system, reads)
            .at_rate_of(GETS, 1.0 / 3.0)
            .goal(RowGoal::P99AtMost(5.0)),
    ]
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    const ALL: [BenchProfile; 5] = [
        BenchProfile::Smoke,
        BenchProfile::Headline,
        BenchProfile::Stress,
        BenchProfile::Sweep,
        BenchProfile::Big,
    ];
    const NONE: ProfileLimits = ProfileLimits { measured: None, warm_up: None, keys_max: None };

    #[test]
    fn names_are_unique_and_references_exist() {
        for profile in ALL {
            let rows = profile.rows(NONE);
            let names: BTreeSet<_> = rows.iter().map(|row| row.name.as_str()).collect();
            assert_eq!(names.len(), rows.len(), "{profile:?}");
            for (at, row) in rows.iter().enumerate() {
                row.depends_on().for_each(|other| assert!(names.contains(other), "{other}"));
                let earlier =
                    |(other, _): (&str, f64)| rows[..at].iter().any(|one| one.name == other);
                assert!(row.rate_of.is_none_or(earlier), "{}: its rate must be known", row.name);
            }
        }
    }

    #[test]
    fn sizes_and_times_can_be_made_tiny() {
        let second = Duration::from_secs(1);
        let limits = ProfileLimits {
            measured: Some(second),
            warm_up: Some(Duration::ZERO),
            keys_max: Some(5),
        };
        for profile in ALL {
            for row in profile.rows(limits) {
                match row.action {
                    RowAction::Load(shape) | RowAction::KillNode(shape) => {
                        assert_eq!((shape.measured, shape.warm_up), (second, Duration::ZERO));
                        assert!(shape.keys <= 5);
                    }
                    RowAction::Fsync(plan) => assert_eq!(plan.measured, second),
                    RowAction::Restart => {}
                }
            }
        }
    }

    #[test]
    fn a_round_of_headline_takes_less_than_six_minutes() {
        let rows = BenchProfile::Headline.rows(NONE);
        let times = rows.iter().map(|row| match &row.action {
            RowAction::Load(shape) => shape.measured + shape.warm_up,
            RowAction::Fsync(plan) => plan.measured,
            other => panic!("{other:?}"),
        });
        assert!(times.sum::<Duration>() < Duration::from_secs(300));
    }
}
