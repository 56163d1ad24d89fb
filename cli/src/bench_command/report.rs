//! The report of one measurement. Every report includes its conditions: a rate without durability,
//! replicas, batch size and the CPU of the generator beside it can be compared with nothing.

use std::collections::BTreeMap;

use bench::cpu::RoleTimes;
use bench::histogram::Histogram;
use bench::load::Measured;
use bench::metrics::{MetricSums, growth};
use client::Media;
use serde::Serialize;

use super::subject::{LoadShape, Subject};
use crate::output::{self, note};

/// The use of resources by the processes of a system during a measurement.
#[derive(Debug, Default)]
pub(crate) struct Spent {
    /// CPU time by role; `None` for a role whose processes changed.
    pub(crate) cpu: BTreeMap<String, Option<RoleTimes>>,
    /// The metrics by role before and after.
    pub(crate) metrics_before: BTreeMap<String, MetricSums>,
    /// The metrics after the measurement.
    pub(crate) metrics_after: BTreeMap<String, MetricSums>,
    /// Resident bytes by role at the end; `None` for a role whose processes changed.
    pub(crate) memory: BTreeMap<String, Option<u64>>,
    /// Bytes of sorted files at the end, if the folder is known.
    pub(crate) state_bytes: Option<u64>,
    /// Bytes on disk at the end, if the folder is known.
    pub(crate) disk_bytes: Option<u64>,
}

/// The conditions of a measurement.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct LoadConditions {
    pub(crate) system: String,
    pub(crate) loop_kind: &'static str,
    /// Requests per second of an open loop.
    pub(crate) rate: Option<f64>,
    pub(crate) clients: usize,
    pub(crate) threads: usize,
    pub(crate) batch: usize,
    pub(crate) format: &'static str,
    pub(crate) keyed: bool,
    pub(crate) keys: u64,
    pub(crate) distribution: String,
    pub(crate) reads_percent: u32,
    /// The largest permitted age of a read; `null` if reads are linearizable.
    pub(crate) staleness_ms: Option<u64>,
    pub(crate) nodes: usize,
    pub(crate) shards: usize,
    /// The fewest and the most replicas of a shard when the measurement began.
    pub(crate) replicas: [usize; 2],
    pub(crate) fsync: String,
    pub(crate) acknowledgement: String,
}

/// The latencies of one kind of request in milliseconds; `null` if there was none.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct LatencyQuantiles {
    pub(crate) p50_ms: Option<f64>,
    pub(crate) p90_ms: Option<f64>,
    pub(crate) p99_ms: Option<f64>,
    pub(crate) p999_ms: Option<f64>,
    pub(crate) max_ms: Option<f64>,
}

/// The amount of work done at once: by the gateways' batches and frames, and the nodes' groups.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct WorkPerRound {
    pub(crate) ops_per_batch: Option<f64>,
    pub(crate) ops_per_frame: Option<f64>,
    pub(crate) batches_per_second: Option<f64>,
    pub(crate) frames_per_second: Option<f64>,
    /// The fsyncs of all nodes together; a group is one write and one fsync.
    pub(crate) fsyncs_per_second: Option<f64>,
    pub(crate) fsync_mean_ms: Option<f64>,
}

/// The result of a measurement, and its conditions.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct BenchReport {
    pub(crate) increments_per_second: f64,
    pub(crate) reads_per_second: f64,
    pub(crate) requests_per_second: f64,
    /// Latencies of writes, or of reads if there were no writes.
    #[serde(flatten)]
    pub(crate) latency: LatencyQuantiles,
    /// Latencies of reads beside writes.
    pub(crate) read_latency: LatencyQuantiles,
    pub(crate) refusal_latency: LatencyQuantiles,
    #[serde(flatten)]
    pub(crate) conditions: LoadConditions,
    #[serde(flatten)]
    pub(crate) measured: Measured,
    /// CPU microseconds per increment or read; `null` for a role whose processes changed during
    /// the measurement.
    pub(crate) cpu_micros_per_increment: BTreeMap<String, Option<f64>>,
    /// The same by role and group of threads.
    pub(crate) cpu_micros_by_thread: BTreeMap<String, BTreeMap<String, f64>>,
    /// The number of CPUs that each role kept busy.
    pub(crate) cpus_busy: BTreeMap<String, Option<f64>>,
    pub(crate) work: WorkPerRound,
    /// Resident memory by role at the end.
    pub(crate) memory_bytes: BTreeMap<String, Option<u64>>,
    /// Disk space of the nodes' sorted files at the end.
    pub(crate) state_bytes: Option<u64>,
    /// Disk space of everything, logs included, at the end.
    pub(crate) disk_bytes: Option<u64>,
}

impl BenchReport {
    /// Reports a measurement.
    pub(crate) fn new(
        subject: &Subject,
        shape: &LoadShape,
        measured: Measured,
        spent: &Spent,
    ) -> Self {
        let done = (measured.increments + measured.reads) as f64;
        let seconds = measured.seconds;
        let writes = quantiles(&measured.writes);
        let reads = quantiles(&measured.gets);
        let has_writes = measured.writes.count() > 0;
        let (latency, read_latency) =
            if has_writes { (writes, reads) } else { (reads, LatencyQuantiles::default()) };
        Self {
            increments_per_second: per(measured.increments as f64, seconds).unwrap_or(0.0),
            reads_per_second: per(measured.reads as f64, seconds).unwrap_or(0.0),
            requests_per_second: per(measured.requests as f64, seconds).unwrap_or(0.0),
            latency,
            read_latency,
            refusal_latency: quantiles(&measured.refusals),
            conditions: conditions(subject, shape),
            cpu_micros_per_increment: spent.cpu_per(done, 1e6),
            cpu_micros_by_thread: spent.cpu_by_thread(done),
            cpus_busy: spent.cpu_per(seconds, 1.0),
            work: spent.work(seconds),
            memory_bytes: spent.memory.clone(),
            state_bytes: spent.state_bytes,
            disk_bytes: spent.disk_bytes,
            measured,
        }
    }

    /// Increments and reads per second.
    pub(crate) fn rate(&self) -> f64 {
        self.increments_per_second + self.reads_per_second
    }

    /// CPU microseconds per increment or read of everything but the generator; `None` if a part of
    /// it is unknown.
    pub(crate) fn server_micros(&self) -> Option<f64> {
        let roles = self.cpu_micros_per_increment.iter().filter(|(role, _)| *role != "generator");
        let micros: Vec<Option<f64>> = roles.map(|(_, micros)| *micros).collect();
        if micros.is_empty() { None } else { micros.into_iter().sum() }
    }

    /// CPU microseconds of the generator per increment or read.
    pub(crate) fn generator_micros(&self) -> Option<f64> {
        self.cpu_micros_per_increment.get("generator").copied().flatten()
    }
}

impl Spent {
    fn cpu_per(&self, divisor: f64, scale: f64) -> BTreeMap<String, Option<f64>> {
        let each = |times: &Option<RoleTimes>| {
            let times = times.as_ref()?;
            per(times.all.as_secs_f64() * scale, divisor)
        };
        self.cpu.iter().map(|(role, times)| (role.clone(), each(times))).collect()
    }

    fn cpu_by_thread(&self, done: f64) -> BTreeMap<String, BTreeMap<String, f64>> {
        let known = self.cpu.iter().filter_map(|(role, times)| Some((role, times.as_ref()?)));
        known
            .map(|(role, times)| {
                let threads = times.threads.iter().filter(|(_, spent)| !spent.is_zero());
                let micros = threads.filter_map(|(group, spent)| {
                    Some((group.clone(), per(spent.as_secs_f64() * 1e6, done)?))
                });
                (role.clone(), micros.collect())
            })
            .collect()
    }

    fn work(&self, seconds: f64) -> WorkPerRound {
        let grown = |role, name| growth(role, name, &self.metrics_before, &self.metrics_after);
        let gateway = |name| grown("gateway", name);
        let node = |name| grown("storage-node", name);
        let (ops, batches) = (gateway("dkc_batched_ops_total"), gateway("dkc_batches_total"));
        let (frames, fsyncs) = (node("dkc_frames_total"), node("dkc_fsync_seconds_count"));
        let ratio = |one: Option<f64>, other: Option<f64>| per(one?, other?);
        WorkPerRound {
            ops_per_batch: ratio(ops, batches),
            ops_per_frame: ratio(ops, frames),
            batches_per_second: ratio(batches, Some(seconds)),
            frames_per_second: ratio(frames, Some(seconds)),
            fsyncs_per_second: ratio(fsyncs, Some(seconds)),
            fsync_mean_ms: ratio(node("dkc_fsync_seconds_sum"), fsyncs).map(|mean| mean * 1e3),
        }
    }
}

fn per(value: f64, divisor: f64) -> Option<f64> {
    (divisor > 0.0).then(|| value / divisor)
}

/// Returns the quantiles of some latencies.
pub(crate) fn quantiles(latencies: &Histogram) -> LatencyQuantiles {
    let millis = |share| latencies.quantile(share).map(|latency| latency.as_secs_f64() * 1e3);
    LatencyQuantiles {
        p50_ms: millis(0.5),
        p90_ms: millis(0.9),
        p99_ms: millis(0.99),
        p999_ms: millis(0.999),
        max_ms: millis(1.0),
    }
}

fn conditions(subject: &Subject, shape: &LoadShape) -> LoadConditions {
    LoadConditions {
        system: subject.system.clone(),
        loop_kind: if shape.rate.is_some() { "open" } else { "closed" },
        rate: shape.rate,
        clients: shape.clients,
        threads: shape.threads,
        batch: shape.batch,
        format: match shape.media {
            Media::Text => "text",
            Media::Json => "json",
        },
        keyed: shape.keyed,
        keys: shape.keys,
        distribution: shape.distribution.to_string(),
        reads_percent: shape.reads_percent,
        staleness_ms: shape.staleness_ms,
        nodes: subject.nodes,
        shards: subject.shards,
        replicas: subject.replicas,
        fsync: subject.fsync.clone(),
        acknowledgement: subject.acknowledgement.clone(),
    }
}

/// Prints a report for people.
pub(crate) fn print(report: &BenchReport) -> anyhow::Result<()> {
    output::result(&rates(report))?;
    output::result(&described(report))?;
    for (role, busy) in &report.cpus_busy {
        output::result(&format!("cpu {role}: {}", cpu_of(report, role, *busy)))?;
    }
    let work = &report.work;
    if let (Some(ops), Some(fsyncs)) = (work.ops_per_batch, work.fsyncs_per_second) {
        let frames =
            work.ops_per_frame.map_or(String::new(), |ops| format!(", {ops:.1} per frame"));
        output::result(&format!(
            "work: {ops:.1} increments per batch{frames}, {fsyncs:.0} fsyncs/s"
        ))?;
    }
    let memory = report.memory_bytes.iter().filter_map(|(role, bytes)| Some((role, (*bytes)?)));
    let memory: Vec<_> =
        memory.map(|(role, bytes)| format!("{role} {} MiB", bytes >> 20)).collect();
    output::result(&format!("memory: {}", memory.join(", ")))?;
    if let Some(bytes) = report.disk_bytes {
        output::result(&format!("disk: {} MiB, logs included", bytes >> 20))?;
    }
    notes(report);
    Ok(())
}

fn rates(report: &BenchReport) -> String {
    let requests = report.requests_per_second;
    let what = match (report.measured.increments, report.measured.reads) {
        (_, 0) => format!("{:.0} increments/s", report.increments_per_second),
        (0, _) => format!("{:.0} reads/s", report.reads_per_second),
        _ => format!(
            "{:.0} increments/s and {:.0} reads/s",
            report.increments_per_second, report.reads_per_second
        ),
    };
    let reads = match &report.read_latency {
        reads if reads.p50_ms.is_some() => format!("; reads: {}", latencies(reads)),
        _ => String::new(),
    };
    format!("{what} ({requests:.0} requests/s), {}{reads}", latencies(&report.latency))
}

fn latencies(quantiles: &LatencyQuantiles) -> String {
    let LatencyQuantiles { p50_ms, p90_ms, p99_ms, p999_ms, max_ms } = quantiles;
    format!(
        "p50 {}, p90 {}, p99 {}, p99.9 {}, max {}",
        millis(*p50_ms),
        millis(*p90_ms),
        millis(*p99_ms),
        millis(*p999_ms),
        millis(*max_ms)
    )
}

/// Formats milliseconds.
pub(crate) fn millis(value: Option<f64>) -> String {
    value.map_or("-".to_owned(), |value| format!("{value:.2} ms"))
}

fn described(report: &BenchReport) -> String {
    let LoadConditions { clients, batch, keys, distribution, nodes, shards, fsync, .. } =
        &report.conditions;
    let [least, most] = report.conditions.replicas;
    let replicas = if least == most { least.to_string() } else { format!("{least} to {most}") };
    let format = if *batch == 1 { "single increments" } else { report.conditions.format };
    let load = match report.conditions.rate {
        None => "closed loop".to_owned(),
        Some(rate) => format!("open loop, {rate:.0} requests/s"),
    };
    let reads = match (report.conditions.reads_percent, report.conditions.staleness_ms) {
        (0, _) => String::new(),
        (percent, None) => format!(", {percent} % linearizable reads"),
        (percent, Some(age)) => format!(", {percent} % reads up to {age} ms old"),
    };
    format!(
        "batch {batch} ({format}), {clients} clients ({load}), {keys} keys \
         ({distribution}){reads}, {nodes} nodes, {shards} shards, {replicas} in-sync replicas, \
         fsync {fsync}, {:.1} s",
        report.measured.seconds
    )
}

fn cpu_of(report: &BenchReport, role: &str, busy: Option<f64>) -> String {
    let Some(busy) = busy else { return "unknown: a process started or ended".to_owned() };
    let each = report.cpu_micros_per_increment.get(role).copied().flatten();
    let Some(each) = each else { return format!("{busy:.2} CPUs") };
    let threads = report.cpu_micros_by_thread.get(role).into_iter().flatten();
    let threads: Vec<_> = threads.map(|(group, micros)| format!("{group} {micros:.2}")).collect();
    format!("{busy:.2} CPUs, {each:.2} µs per increment ({})", threads.join(", "))
}

fn notes(report: &BenchReport) {
    let measured = &report.measured;
    let example = |example: &Option<String>| example.clone().unwrap_or_default();
    if measured.refused > 0 {
        let example = example(&measured.refusal);
        note!("{} requests refused, for example: {example}", measured.refused);
    }
    if measured.errors > 0 {
        let example = example(&measured.error);
        note!("{} requests failed, for example: {example}", measured.errors);
    }
    if measured.late + measured.unsent > 0 {
        note!(
            "{} requests were sent late, {} not at all: all clients were busy, or the generator \
             was",
            measured.late,
            measured.unsent
        );
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn sums(values: &[(&str, f64)]) -> MetricSums {
        values.iter().map(|&(name, value)| (name.to_owned(), value)).collect()
    }

    fn spent() -> Spent {
        let second = Duration::from_secs(1);
        let threads =
            BTreeMap::from([("dkc-loop".to_owned(), second), ("x".into(), Duration::ZERO)]);
        let cpu = BTreeMap::from([
            ("storage-node".to_owned(), Some(RoleTimes { all: second * 2, threads })),
            ("gateway".to_owned(), None),
        ]);
        let gateway = [("dkc_batched_ops_total", 5.0), ("dkc_batches_total", 1.0)];
        let later = [("dkc_batched_ops_total", 2005.0), ("dkc_batches_total", 101.0)];
        let node = [("dkc_fsync_seconds_count", 0.0), ("dkc_fsync_seconds_sum", 0.0)];
        let node_later = [("dkc_fsync_seconds_count", 400.0), ("dkc_fsync_seconds_sum", 0.8)];
        let of = |gateway, node| {
            BTreeMap::from([
                ("gateway".to_owned(), sums(gateway)),
                ("storage-node".to_owned(), sums(node)),
            ])
        };
        Spent {
            cpu,
            metrics_before: of(&gateway, &node),
            metrics_after: of(&later, &node_later),
            ..Spent::default()
        }
    }

    #[test]
    fn cpu_is_divided_by_what_was_done() {
        let spent = spent();
        let cpu = spent.cpu_per(1000.0, 1e6);
        assert_eq!((cpu["storage-node"], cpu["gateway"]), (Some(2000.0), None));
        assert_eq!(spent.cpu_per(0.0, 1e6)["storage-node"], None);
        let threads = spent.cpu_by_thread(1000.0);
        assert_eq!(threads["storage-node"], BTreeMap::from([("dkc-loop".to_owned(), 1000.0)]));
        assert!(!threads.contains_key("gateway"));
    }

    #[test]
    fn work_comes_from_the_growth_of_metrics() {
        let work = spent().work(4.0);
        assert_eq!((work.ops_per_batch, work.batches_per_second), (Some(20.0), Some(25.0)));
        assert_eq!((work.fsyncs_per_second, work.fsync_mean_ms), (Some(100.0), Some(2.0)));
        assert_eq!(work.ops_per_frame, None, "a node without this metric");
    }
}
