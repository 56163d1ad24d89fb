//! Runs the rows of a profile in rounds.
//!
//! Every round starts each system from nothing, one after the other, so that all rows of a round
//! share the state of the machine: a ratio of two rows is that of neighbours in time.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use bench::etcd::transaction_client;
use bench::fsync;
use bench::keys::KeySpace;
use bench::load::{Interval, LoadLimits};
use bench::redis::PipelinePlan;
use client::{HttpConnection, HttpRequest, Media, Url};
use serde::Deserialize;

use super::children::Children;
use super::cluster::{ClusterShape, PrivateCluster, requests};
use super::goals::{RowGoal, RowMedians, median};
use super::measuring::measure;
use super::peers::{self, PeerMissing};
use super::postgres::PostgresServer;
use super::profile::{ProfileRow, RowAction, RowSystem};
use super::report::{BenchReport, LatencyQuantiles, quantiles};
use super::subject::{LoadShape, Subject};
use crate::output::note;

/// The namespace of the counters of all rows, so that they add up.
const NAMESPACE: &str = "bench";
/// The time limit of reading all counters.
const READ_WITHIN: Duration = Duration::from_secs(30);
/// Answers are as fast as those of another row if none takes longer than this many times its 99th
/// percentile, or than [`ALWAYS_NORMAL_MS`].
const NORMAL_TIMES: f64 = 4.0;
const ALWAYS_NORMAL_MS: f64 = 50.0;

/// All results of a profile.
#[derive(Debug, Default)]
pub(crate) struct ProfileResults {
    /// The figures of each row by name, one element for each round.
    pub(crate) figures: BTreeMap<String, Vec<RowMedians>>,
    /// The reports of each row by name, one element for each round.
    pub(crate) reports: BTreeMap<String, Vec<BenchReport>>,
    /// The peers that are not on this machine.
    pub(crate) missing: BTreeSet<&'static str>,
    /// The differences between counters and acknowledgements after the rows of a cluster.
    pub(crate) wrong: Vec<String>,
}

/// The surroundings of all rows.
#[derive(Clone, Debug)]
pub(crate) struct RowSetting {
    /// The folder with the data of each system while it runs.
    pub(crate) folder: PathBuf,
    /// The `dkc` that is measured.
    pub(crate) program: PathBuf,
    /// True if the counters of each cluster are compared with what was acknowledged.
    pub(crate) is_verified: bool,
}

/// A system that is ready.
enum RunningSystem {
    Dkc(Box<PrivateCluster>),
    Hello(Url, Subject),
    Redis(std::net::SocketAddr, Subject),
    Postgres(Box<PostgresServer>),
    Etcd(Vec<Url>, Subject),
    Disk,
}

impl ProfileResults {
    /// Runs each row once.
    pub(crate) fn run_round(
        &mut self,
        rows: &[ProfileRow],
        setting: &RowSetting,
        children: &mut Children,
    ) -> anyhow::Result<()> {
        for group in rows.chunk_by(|one, other| one.system == other.system) {
            std::fs::create_dir_all(&setting.folder)?;
            let result = self.run_group(group, setting, children);
            children.stop_all()?;
            std::fs::remove_dir_all(&setting.folder)?;
            match result {
                Err(error) if error.is::<PeerMissing>() => {
                    note!("{error}");
                    self.missing.extend(error.downcast_ref().map(|PeerMissing(name)| *name));
                }
                result => result?,
            }
        }
        Ok(())
    }

    fn run_group(
        &mut self,
        group: &[ProfileRow],
        setting: &RowSetting,
        children: &mut Children,
    ) -> anyhow::Result<()> {
        let mut system = RunningSystem::start(group[0].system, setting, children)?;
        let (mut acknowledged, mut keys) = (0, 0);
        for row in group {
            let (figures, report) = self
                .run_row(row, &mut system, setting, children)
                .with_context(|| row.name.clone())?;
            note!("{}", progress(row, &figures));
            self.figures.entry(row.name.clone()).or_default().push(figures);
            if let Some(report) = report {
                acknowledged += report.measured.acknowledged;
                keys = keys.max(report.conditions.keys);
                self.reports.entry(row.name.clone()).or_default().push(report);
            }
        }
        if let RunningSystem::Dkc(cluster) = &system
            && setting.is_verified
        {
            let counted = sum_of_counters(&cluster.url, keys)?;
            if counted != i128::from(acknowledged) {
                self.wrong.push(format!("{acknowledged} acknowledged, but {counted} counted"));
            }
        }
        Ok(())
    }

    fn run_row(
        &self,
        row: &ProfileRow,
        system: &mut RunningSystem,
        setting: &RowSetting,
        children: &mut Children,
    ) -> anyhow::Result<(RowMedians, Option<BenchReport>)> {
        let shape = match &row.action {
            RowAction::Fsync(plan) => {
                let latency = quantiles(&fsync::measure(*plan, &setting.folder)?);
                return Ok((RowMedians { latency, ..RowMedians::default() }, None));
            }
            RowAction::Restart => {
                let RunningSystem::Dkc(cluster) = system else { anyhow::bail!("no cluster") };
                let RowSystem::Dkc(shape) = row.system else { anyhow::bail!("no cluster") };
                children.stop(cluster.supervisor)?;
                **cluster = start_cluster(shape, setting, children)?;
                let ready_after_seconds = Some(cluster.ready_after.as_secs_f64());
                return Ok((RowMedians { ready_after_seconds, ..RowMedians::default() }, None));
            }
            RowAction::Load(shape) | RowAction::KillNode(shape) => self.with_rate(shape, row),
        };
        let report = match (&row.action, &*system) {
            (RowAction::KillNode(_), RunningSystem::Dkc(cluster)) => {
                with_a_kill(cluster, &shape, || system.measure(&shape, row.wait_for))?
            }
            _ => system.measure(&shape, row.wait_for)?,
        };
        let mut figures = RowMedians::of_report(&report);
        let normal = row.goals.iter().find_map(|goal| match goal {
            RowGoal::NormalWithin(other, _) => Some(*other),
            _ => None,
        });
        if let Some(usual) = normal.and_then(|other| self.last(other)?.latency.p99_ms) {
            let limit = (usual * NORMAL_TIMES).max(ALWAYS_NORMAL_MS);
            figures.normal_after_seconds = Some(normal_after(&report.measured.timeline, limit));
        }
        Ok((figures, Some(report)))
    }

    fn with_rate(&self, shape: &LoadShape, row: &ProfileRow) -> LoadShape {
        let of_row = row
            .rate_of
            .and_then(|(other, share)| Some(self.last(other)?.rate? * share / shape.batch as f64));
        LoadShape { rate: of_row.or(shape.rate), ..shape.clone() }
    }

    fn last(&self, row: &str) -> Option<&RowMedians> {
        self.figures.get(row)?.last()
    }
}

impl RunningSystem {
    fn start(
        system: RowSystem,
        setting: &RowSetting,
        children: &mut Children,
    ) -> anyhow::Result<Self> {
        let folder = &setting.folder;
        Ok(match system {
            RowSystem::Dkc(shape) => {
                let cluster = start_cluster(shape, setting, children)?;
                Self::Dkc(Box::new(cluster))
            }
            RowSystem::Hello => {
                let (url, subject) = peers::start_hello(children)?;
                Self::Hello(url, subject)
            }
            RowSystem::Redis => {
                let (address, subject) = peers::start_redis(folder, children)?;
                Self::Redis(address, subject)
            }
            RowSystem::Postgres => {
                Self::Postgres(Box::new(PostgresServer::start(folder, children)?))
            }
            RowSystem::Etcd => {
                let (urls, subject) = peers::start_etcd(folder, children)?;
                Self::Etcd(urls, subject)
            }
            RowSystem::Disk => Self::Disk,
        })
    }

    fn measure(&self, shape: &LoadShape, wait_for: Option<u64>) -> anyhow::Result<BenchReport> {
        let keys = KeySpace::new(shape.keys, shape.distribution);
        let over_http = |url: &Url, subject: &Subject| {
            let plan = requests(std::slice::from_ref(url), NAMESPACE, shape);
            measure(subject, shape, |number| plan.client(number))
        };
        match self {
            Self::Dkc(cluster) => over_http(&cluster.url, &cluster.subject),
            Self::Hello(url, subject) => over_http(url, subject),
            Self::Redis(address, subject) => {
                let plan = PipelinePlan { address: *address, depth: shape.batch, wait_for, keys };
                let acknowledgement = match wait_for {
                    None => subject.acknowledgement.clone(),
                    Some(replicas) => format!("the primary, and {replicas} replicas in memory"),
                };
                let subject = Subject { acknowledgement, ..subject.clone() };
                measure(&subject, shape, |number| plan.client(number))
            }
            Self::Postgres(server) => server.measure(shape),
            Self::Etcd(urls, subject) => {
                measure(subject, shape, |number| transaction_client(urls, &keys, number))
            }
            Self::Disk => anyhow::bail!("a disk has no clients"),
        }
    }
}

fn start_cluster(
    shape: ClusterShape,
    setting: &RowSetting,
    children: &mut Children,
) -> anyhow::Result<PrivateCluster> {
    let folder = setting.folder.join("cluster");
    PrivateCluster::start(shape, &setting.program, &folder, children)
}

/// Kills a node a third into the load.
fn with_a_kill(
    cluster: &PrivateCluster,
    shape: &LoadShape,
    load: impl FnOnce() -> anyhow::Result<BenchReport>,
) -> anyhow::Result<BenchReport> {
    std::thread::scope(|scope| {
        let killer = scope.spawn(|| {
            std::thread::sleep(shape.warm_up + shape.measured / 3);
            cluster.kill_node()
        });
        let report = load()?;
        killer.join().map_err(|_| anyhow::anyhow!("the killer panicked"))??;
        Ok(report)
    })
}

/// Returns the sum of the counters `k0` to `k{keys-1}`.
fn sum_of_counters(url: &Url, keys: u64) -> anyhow::Result<i128> {
    #[derive(Deserialize)]
    struct ValueOfKey {
        value: i128,
    }
    #[derive(Deserialize)]
    struct ValuesBody {
        counters: Vec<ValueOfKey>,
    }
    let names: Vec<_> = (0..keys).map(|key| format!("k{key}")).collect();
    let body = serde_json::json!({ "keys": names }).to_string();
    let path = format!("/v1/counters/{NAMESPACE}/get");
    let request = HttpRequest::post(url, &path, READ_WITHIN, None, Media::Json, body.as_bytes());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let answer = runtime.block_on(HttpConnection::new(url.clone()).call(&request, READ_WITHIN))?;
    let text = String::from_utf8_lossy(&answer.body);
    let values: ValuesBody = serde_json::from_slice(&answer.body)
        .with_context(|| format!("the counters: {} {text:.200}", answer.status))?;
    Ok(values.counters.iter().map(|counter| counter.value).sum())
}

/// Returns the time in seconds after which no answer took longer than `limit_ms`, and nothing was
/// refused or failed.
fn normal_after(timeline: &[Interval], limit_ms: f64) -> f64 {
    let is_slow = |interval: &Interval| {
        interval.refused + interval.errors > 0 || interval.slowest_micros as f64 / 1e3 > limit_ms
    };
    let slow = timeline.iter().rposition(is_slow).map_or(0, |last| last + 1);
    slow as f64 * LoadLimits::default().interval.as_secs_f64()
}

fn progress(row: &ProfileRow, figures: &RowMedians) -> String {
    let number = |value: Option<f64>, unit: &str| {
        value.map(|value| format!("{}{unit}", bench::chart::short(value)))
    };
    let parts = [
        number(figures.rate, "/s"),
        number(figures.latency.p50_ms, " ms p50"),
        number(figures.latency.p99_ms, " ms p99"),
        number(figures.server_micros, " µs of CPU"),
        number(figures.generator_micros, " µs of the generator"),
        number(figures.refused.filter(|&count| count > 0.0), " refused"),
        number(figures.errors.filter(|&count| count > 0.0), " errors"),
        number(figures.normal_after_seconds, " s until normal"),
        number(figures.ready_after_seconds, " s until ready"),
    ];
    format!("{}: {}", row.name, parts.into_iter().flatten().collect::<Vec<_>>().join(", "))
}

impl RowMedians {
    fn of_report(report: &BenchReport) -> Self {
        let node = report.memory_bytes.get("storage-node").copied().flatten();
        let nodes = report.conditions.nodes.max(1) as f64;
        // A cluster has keys of other rows, too: only a row that fills it knows their number.
        let is_fill = report.conditions.distribution == "each";
        let keys = report.measured.acknowledged as f64;
        let copies = keys * report.conditions.replicas[0] as f64;
        let files = report.state_bytes.filter(|_| is_fill && copies > 0.0);
        Self {
            rate: Some(report.rate()),
            latency: report.latency.clone(),
            refusal_p99_ms: report.refusal_latency.p99_ms,
            server_micros: report.server_micros(),
            generator_micros: report.generator_micros(),
            refused: Some(report.measured.refused as f64),
            errors: Some(report.measured.errors as f64),
            node_memory_bytes: node.map(|bytes| bytes as f64 / nodes),
            disk_bytes_per_copy: files.map(|bytes| bytes as f64 / copies),
            ..Self::default()
        }
    }

    /// Returns the medians of some rounds.
    pub(crate) fn of_rounds(rounds: &[Self]) -> Self {
        let of = |value: fn(&Self) -> Option<f64>| median(rounds.iter().map(value));
        Self {
            rate: of(|round| round.rate),
            latency: LatencyQuantiles {
                p50_ms: of(|round| round.latency.p50_ms),
                p90_ms: of(|round| round.latency.p90_ms),
                p99_ms: of(|round| round.latency.p99_ms),
                p999_ms: of(|round| round.latency.p999_ms),
                max_ms: of(|round| round.latency.max_ms),
            },
            refusal_p99_ms: of(|round| round.refusal_p99_ms),
            server_micros: of(|round| round.server_micros),
            generator_micros: of(|round| round.generator_micros),
            refused: of(|round| round.refused),
            errors: of(|round| round.errors),
            normal_after_seconds: of(|round| round.normal_after_seconds),
            ready_after_seconds: of(|round| round.ready_after_seconds),
            node_memory_bytes: of(|round| round.node_memory_bytes),
            disk_bytes_per_copy: of(|round| round.disk_bytes_per_copy),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_load_is_normal_after_its_last_slow_interval() {
        let quick = Interval { done: 5, slowest_micros: 900, ..Interval::default() };
        let slow = Interval { slowest_micros: 60_000, ..quick };
        let refused = Interval { refused: 1, ..quick };
        assert_eq!(normal_after(&[quick, quick], 50.0), 0.0);
        let after = normal_after(&[slow, quick, refused, quick], 50.0);
        assert!((after - 0.3).abs() < 1e-9, "{after}");
        assert_eq!(normal_after(&[slow, slow], 70.0), 0.0);
    }
}
