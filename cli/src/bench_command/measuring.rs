//! One measurement: a load on a system, and everything that is read before and after it.

use std::collections::BTreeMap;
use std::sync::Mutex;

use anyhow::Context;
use bench::cpu::{MeasuredProcess, Sample};
use bench::load::{self, LoadClient, LoadLimits, LoadPlan};
use bench::metrics::{self, MetricSums};
use bench::{disk, memory};

use super::report::{BenchReport, Spent};
use super::subject::{LoadShape, Subject};

/// The CPU times and metrics of a system at one moment.
#[derive(Debug, Default)]
struct Reading {
    cpu: Sample,
    metrics: BTreeMap<String, MetricSums>,
}

/// Generates the load, and reports what came of it and what it cost.
pub(crate) fn measure<C: LoadClient>(
    subject: &Subject,
    shape: &LoadShape,
    client: impl Fn(usize) -> C,
) -> anyhow::Result<BenchReport> {
    let generator =
        MeasuredProcess { role: "generator".to_owned(), pid: std::process::id(), metrics: None };
    let processes: Vec<_> =
        subject.processes.iter().cloned().chain(std::iter::once(generator)).collect();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let metrics = || runtime.block_on(metrics::read(&processes));
    let readings = Mutex::new(Vec::new());
    let push = |reading| readings.lock().expect("no panic holds it").push(reading);
    // CPU times are read at the edges of the measured part, metrics milliseconds outside of it: the
    // threads of the load end soon after it.
    let at_start = || {
        let metrics = metrics();
        push(Reading { cpu: Sample::take(&processes), metrics });
    };
    let at_end = || {
        let cpu = Sample::take(&processes);
        push(Reading { cpu, metrics: metrics() });
    };
    let plan = LoadPlan {
        clients: shape.clients,
        threads: shape.threads.min(shape.clients),
        rate: shape.rate,
        warm_up: shape.warm_up,
        measured: shape.measured,
        limits: LoadLimits::default(),
    };
    let measured = load::run(&plan, client, at_start, at_end).context("the load")?;
    let readings = readings.into_inner().expect("no panic holds it");
    let spent = Spent {
        cpu: readings[1].cpu.since(&readings[0].cpu, &processes),
        metrics_before: readings[0].metrics.clone(),
        metrics_after: readings[1].metrics.clone(),
        memory: memory::resident(&processes),
        state_bytes: subject
            .folder
            .as_deref()
            .and_then(|folder| disk::occupied_by("state", folder).ok()),
        disk_bytes: subject.folder.as_deref().and_then(|folder| disk::occupied(folder).ok()),
    };
    Ok(BenchReport::new(subject, shape, measured, &spent))
}
