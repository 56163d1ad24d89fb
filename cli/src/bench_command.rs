//! `dkc bench`: a closed-loop load on a running cluster, with the CPU that it costs each role.
//!
//! Every result includes its conditions: batch size, clients, keys and replicas, and the CPU of the
//! load generator, which shares the machine with the cluster under test. Fsync cannot be switched
//! off in this service, so its mode is stated, not configured: an answer comes after fsync on every
//! in-sync replica.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::Duration;

use anyhow::Context;
use bench::cpu::{MeasuredProcess, Sample};
use bench::load::{self, LoadPlan, Measured};
use client::{DEADLINE, Gateways, Media, parse};
use serde::Serialize;

use crate::args::{self, ServerArgs};
use crate::dev::cluster_file;
use crate::exit::CommandExit;
use crate::output;
use crate::status::ClusterInfo;

/// Options of `dkc bench`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Number of clients, each with one connection and one request at a time
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    clients: u32,
    /// Increments per request; 1 uses the endpoint for single increments
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    batch: u32,
    /// Format of a batch
    #[arg(long, value_enum, default_value_t = BatchFormat::Text)]
    format: BatchFormat,
    /// Send each request with its own Idempotency-Key
    #[arg(long)]
    keyed: bool,
    /// Threads of the load generator
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=256))]
    threads: u32,
    /// Number of distinct keys
    #[arg(long, default_value_t = 1_000_000, value_parser = clap::value_parser!(u64).range(1..))]
    keys: u64,
    /// Duration of the measurement in seconds
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..))]
    seconds: u64,
    /// Duration of the warm-up before the measurement in seconds
    #[arg(long, default_value_t = 2)]
    warm_up: u64,
    /// Namespace of the counters
    #[arg(long, default_value = "bench", value_parser = args::namespace)]
    namespace: String,
    /// The `cluster.json` of a local cluster, to measure the CPU of its roles
    #[arg(long, value_name = "FILE")]
    cluster_json: Option<PathBuf>,
    #[command(flatten)]
    server: ServerArgs,
}

/// The format of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
enum BatchFormat {
    /// `text/plain`, one key per line
    Text,
    /// `application/json`
    Json,
}

/// The result of a measurement, and its conditions.
#[derive(Debug, Serialize)]
struct BenchReport {
    increments_per_second: f64,
    requests_per_second: f64,
    p50_ms: Option<f64>,
    p99_ms: Option<f64>,
    clients: u32,
    threads: u32,
    batch: u32,
    format: BatchFormat,
    keys: u64,
    /// The sizes of the smallest and the largest in-sync set when the measurement began.
    replicas: [usize; 2],
    nodes: usize,
    fsync: &'static str,
    loop_kind: &'static str,
    #[serde(flatten)]
    measured: Measured,
    /// CPU microseconds per increment; `null` for a role whose processes changed during the
    /// measurement.
    cpu_micros_per_increment: BTreeMap<String, Option<f64>>,
    /// The number of CPUs that each role kept busy.
    cpus_busy: BTreeMap<String, Option<f64>>,
}

/// Runs the load and prints the result.
pub(crate) fn run(args: Args) -> anyhow::Result<CommandExit> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let mut gateways = Gateways::new(&args.server.urls);
    let answer = runtime.block_on(gateways.read("/v1/cluster", None, DEADLINE));
    let cluster: ClusterInfo = match answer.and_then(|response| parse(&response)) {
        Ok(cluster) => cluster,
        Err(failure) => {
            output::note(&format!("no gateway answers: {}", failure.why()));
            return Ok(CommandExit::Failed);
        }
    };
    let watched = watched(&args)?;
    let load = LoadPlan {
        urls: args.server.urls.clone(),
        namespace: args.namespace.clone(),
        clients: args.clients as usize,
        threads: args.threads as usize,
        batch: args.batch as usize,
        media: match args.format {
            BatchFormat::Text => Media::Text,
            BatchFormat::Json => Media::Json,
        },
        keyed: args.keyed,
        keys: args.keys,
        warm_up: Duration::from_secs(args.warm_up),
        measured: Duration::from_secs(args.seconds),
    };
    let samples = Mutex::new(Vec::new());
    let sample = || samples.lock().expect("no panic holds it").push(Sample::take(&watched));
    let measured = load::run(&load, sample, sample)?;
    let samples = samples.into_inner().expect("no panic holds it");
    let cpu = samples[1].since(&samples[0], &watched);
    let report = report(&args, &cluster, measured, &cpu);
    if args.server.json {
        output::json(&report)?;
    } else {
        print(&report)?;
    }
    Ok(if report.measured.errors > 0 { CommandExit::Failed } else { CommandExit::Done })
}

fn watched(args: &Args) -> anyhow::Result<Vec<MeasuredProcess>> {
    let mut watched =
        vec![MeasuredProcess { role: "generator".to_owned(), pid: std::process::id() }];
    if let Some(path) = &args.cluster_json {
        let cluster = cluster_file::read(path).with_context(|| path.display().to_string())?;
        for process in cluster.processes {
            watched.push(MeasuredProcess {
                role: process.spec.role.name().to_owned(),
                pid: process.pid,
            });
        }
    }
    Ok(watched)
}

fn report(
    args: &Args,
    cluster: &ClusterInfo,
    measured: Measured,
    cpu: &BTreeMap<String, Option<Duration>>,
) -> BenchReport {
    let sizes = || cluster.shards.iter().map(|shard| shard.isr.len());
    let millis =
        |share| measured.latencies.quantile(share).map(|latency| latency.as_secs_f64() * 1e3);
    let per = |divisor: f64, scale: f64| {
        cpu.iter()
            .map(|(role, cost)| {
                let share = cost.filter(|_| divisor > 0.0);
                (role.clone(), share.map(|cost| cost.as_secs_f64() * scale / divisor))
            })
            .collect()
    };
    BenchReport {
        increments_per_second: measured.increments as f64 / measured.seconds,
        requests_per_second: measured.requests as f64 / measured.seconds,
        p50_ms: millis(0.5),
        p99_ms: millis(0.99),
        clients: args.clients,
        threads: args.threads,
        batch: args.batch,
        format: args.format,
        keys: args.keys,
        replicas: [sizes().min().unwrap_or(0), sizes().max().unwrap_or(0)],
        nodes: cluster.nodes.len(),
        fsync: "on every in-sync replica, before the answer",
        loop_kind: "closed",
        cpu_micros_per_increment: per(measured.increments as f64, 1e6),
        cpus_busy: per(measured.seconds, 1.0),
        measured,
    }
}

fn print(report: &BenchReport) -> anyhow::Result<()> {
    let BenchReport { clients, batch, keys, replicas: [least, most], nodes, fsync, .. } = report;
    let replicas = if least == most { least.to_string() } else { format!("{least} to {most}") };
    let format = match report.format {
        _ if *batch == 1 => "single increments",
        BatchFormat::Text => "text",
        BatchFormat::Json => "JSON",
    };
    let millis =
        |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{value:.2} ms"));
    output::result(&format!(
        "{:.0} increments/s ({:.0} requests/s), p50 {}, p99 {}",
        report.increments_per_second,
        report.requests_per_second,
        millis(report.p50_ms),
        millis(report.p99_ms)
    ))?;
    output::result(&format!(
        "batch {batch} ({format}), {clients} clients (closed loop), {keys} keys, {nodes} nodes, \
         {replicas} in-sync replicas, fsync {fsync}, {:.1} s",
        report.measured.seconds
    ))?;
    for (role, busy) in &report.cpus_busy {
        let each = report.cpu_micros_per_increment.get(role).copied().flatten();
        let figures = match (busy, each) {
            (Some(busy), Some(each)) => format!("{busy:.2} CPUs, {each:.2} µs per increment"),
            (Some(busy), None) => format!("{busy:.2} CPUs"),
            (None, _) => "unknown: a process started or ended".to_owned(),
        };
        output::result(&format!("cpu {role}: {figures}"))?;
    }
    if report.measured.errors > 0 {
        let example = report.measured.error.as_deref().unwrap_or_default();
        output::note(&format!(
            "{} requests failed, for example: {example}",
            report.measured.errors
        ));
    }
    Ok(())
}
