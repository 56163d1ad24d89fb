//! Real processes under real faults: etcd, coordinators, nodes and gateways, each in a network of
//! its own, under load and under attack; then the history is judged.
//!
//! ```text
//!   sandbox    features of this machine       fleet          the processes
//!   workload   clients                        network, etcd  their environment
//!   probes     one prober per shard           nemesis        the schedule of faults
//!   stalls     pauses of this machine         faults/        one file per group of faults
//!   recorder   the history of operations      verdict        the table of broken promises
//! ```
//!
//! Results that depend on time are reported and hardly judged: a machine may be slow, but the
//! service must not lose or double anything. The few bounds (for healing, for silence that no fault
//! explains, for repeated snapshots) are ten times the usual values.

pub mod etcd;
pub mod faults;
pub mod fleet;
pub mod nemesis;
pub mod network;
pub mod power;
pub mod probes;
pub mod recorder;
pub mod sandbox;
pub mod stalls;
pub mod verdict;
pub mod workload;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use serde_json::json;

use self::faults::{Environment, FaultSpec, KINDS};
use self::fleet::{Fleet, REPLICAS, Role};
use self::nemesis::Nemesis;
use self::network::BridgedNetwork;
use self::probes::Probers;
use self::recorder::Recorder;
use self::sandbox::Sandbox;
use self::stalls::Stalls;
use self::verdict::{broken, judge, judge_copies, judge_silence};
use self::workload::{Surprises, Workload};
use crate::cluster;
use crate::cluster::http::{Client, DEADLINE};
use crate::sim::checker::Violation;
use crate::sim::history::{Ask, OpOutcome};
use crate::sim::rng::Rng;

const READY_WITHIN: Duration = Duration::from_secs(120);
/// The time from the end of the last fault until every shard is open with all replicas in sync. A
/// restart takes seconds; the rest is for a machine with other load.
const HEALS_WITHIN: Duration = Duration::from_secs(180);
const AGREES_WITHIN: Duration = Duration::from_secs(120);
const READ_WITHIN: Duration = Duration::from_secs(60);
/// The number of counters in one request of the final reading.
const READ_AT_ONCE: usize = 500;

pub struct ChaosSettings {
    pub length: Duration,
    pub seed: u64,
    /// Names of faults; empty for all.
    pub faults: Vec<String>,
    pub dkc: PathBuf,
    pub etcd: PathBuf,
    /// True to use network namespaces if possible; otherwise processes run on loopback.
    pub namespaces: bool,
    /// True to keep history and logs even if every promise held.
    pub keep: bool,
}

impl ChaosSettings {
    /// Returns the requested faults that are possible here.
    fn kinds(&self, sandbox: &Sandbox) -> Result<Vec<&'static FaultSpec>, String> {
        if let Some(odd) =
            self.faults.iter().find(|name| KINDS.iter().all(|kind| kind.name != **name))
        {
            let all: Vec<_> = KINDS.iter().map(|kind| kind.name).collect();
            return Err(format!("unknown fault {odd:?}; known faults: {}", all.join(", ")));
        }
        let named = |kind: &&FaultSpec| self.faults.iter().any(|name| name == kind.name);
        let wanted = |kind: &&FaultSpec| self.faults.is_empty() || named(kind);
        Ok(KINDS.iter().filter(wanted).filter(|kind| (kind.is_possible)(sandbox)).collect())
    }
}

/// Runs the whole test. Returns the table, and whether every promise held.
pub fn run(settings: &ChaosSettings, sandbox: Sandbox) -> Result<(String, bool), String> {
    let kinds = settings.kinds(&sandbox)?;
    runs(&settings.etcd, "scripts/setup installs one; source scripts/env then names it in $ETCD")?;
    runs(
        &settings.dkc,
        "build it (cargo build --workspace --locked --profile ci) or name it with --dkc",
    )?;
    let folder =
        std::env::temp_dir().join(format!("dkc-chaos-{}-{}", settings.seed, std::process::id()));
    std::fs::create_dir_all(&folder).map_err(|error| format!("{folder:?}: {error}"))?;
    let outcome = run_in(&folder, settings, sandbox, kinds);
    match &outcome {
        Ok((_, true)) if !settings.keep => {
            if let Err(error) = std::fs::remove_dir_all(&folder) {
                crate::note(&format!("{} can't be removed: {error}", folder.display()));
            }
        }
        _ => crate::note(&format!("history, logs and data are kept in {}", folder.display())),
    }
    outcome
}

/// Checks that a program can be started; the error states what to do otherwise.
fn runs(program: &Path, otherwise: &str) -> Result<(), String> {
    let run = sandbox::run(&program.display().to_string(), &["--version"]);
    run.map_err(|why| format!("{why}; {otherwise}"))
}

fn run_in(
    folder: &Path,
    settings: &ChaosSettings,
    sandbox: Sandbox,
    kinds: Vec<&'static FaultSpec>,
) -> Result<(String, bool), String> {
    let mut rng = Rng::new(settings.seed);
    let tracks_syncs = kinds.iter().any(|kind| faults::OF_SYNCS.contains(&kind.name));
    let programs = (settings.dkc.clone(), settings.etcd.clone());
    let fleet = Fleet::new(folder, programs, sandbox, tracks_syncs)?;
    let addresses: Vec<_> =
        fleet.members.iter().map(|one| (one.name.clone(), one.address)).collect();
    let network = BridgedNetwork::new(sandbox, &addresses)?;
    let recorder =
        Arc::new(Recorder::new(&folder.join("history.jsonl")).map_err(|error| error.to_string())?);
    let env = Environment { fleet, network, rng: rng.fork(), broken: Vec::new() };
    let mut nemesis = Nemesis::new(env, kinds, settings.length, &recorder, rng.fork());

    let gateways = start(&mut nemesis)?;
    let surprises = Surprises::default();
    let workload =
        Workload::start(recorder.clone(), gateways.clone(), surprises.clone(), &mut rng.fork());
    let shards = cluster::shards(&gateways)?;
    let keys = cluster::key_per_shard(&shards, probes::NAMESPACE);
    let keys = shards.into_iter().map(|shard| shard.id.to_string()).zip(keys);
    let stalls = Stalls::default();
    let watching = stalls.watch();
    let probers = Probers::start(&gateways, keys, &recorder, &stalls);

    nemesis.run(Instant::now() + settings.length);
    let mut violations = Vec::new();
    let healing = Instant::now();
    // The load still runs: a cluster that heals only without load is not healed.
    if let Err(why) = nemesis.wait_until_whole(HEALS_WITHIN) {
        violations.push(broken("heals", &format!("after {HEALS_WITHIN:?}: {why}")));
    }
    let healed = healing.elapsed();
    if let Some(who) = nemesis.env.fleet.unrefused() {
        violations.push(broken("ends", &who));
    }
    let counts = workload.stop();
    let mut probes = probers.stop();
    stalls.stop();
    if let Err(panic) = watching.join() {
        std::panic::resume_unwind(panic);
    }
    if let Err(why) = read_everything(&recorder, &gateways, &mut probes) {
        violations.push(broken("heals", &why));
    }
    agree(&gateways, &mut violations);
    nemesis.env.fleet.watch();
    nemesis.ends.extend(nemesis.env.fleet.ends());
    nemesis.env.fleet.end();

    let history = recorder.finish();
    violations.extend(judge(&history, &probes));
    let stalled = |begun, ended| stalls.between(begun, ended);
    violations.extend(judge_silence(&probes, &nemesis.spans, stalled));
    violations.extend(judge_copies(&nemesis.env.fleet.node_logs(), nemesis.spans.len()));
    let surprises =
        std::mem::take(&mut *surprises.lock().unwrap_or_else(|failed| failed.into_inner()));
    violations.extend(surprises.iter().map(|what| broken("answers", what)));
    violations.extend(nemesis.env.broken.iter().map(|what| broken("ends", what)));
    let unexplained = nemesis.ends.iter().filter(|end| !end.explained);
    violations.extend(unexplained.map(|end| broken("ends", &format!("{}: {}", end.name, end.how))));

    let count = |one: &std::sync::atomic::AtomicU64| one.load(Ordering::Relaxed).to_string();
    let disk_errors = nemesis.ends.iter().filter(|end| end.explained).count();
    let run = verdict::RunSummary {
        history: &history,
        probes: &probes,
        spans: &nemesis.spans,
        violations: &violations,
        facts: &[
            ("requests, those of probes not among them", count(&counts.requests)),
            ("batches, with a token or without", count(&counts.batches)),
            ("adds in them", count(&counts.items)),
            ("sends of requests with a token", count(&counts.sends_with_token)),
            ("answers that were replayed", count(&counts.replays)),
            ("tokens refused for another request (422)", count(&counts.reused)),
            ("bounded reads", count(&counts.bounded)),
            (
                "nodes that ended on a bad or foreign folder, as they should",
                disk_errors.to_string(),
            ),
            (
                "nodes given an empty folder after that",
                nemesis.env.fleet.replaced.len().to_string(),
            ),
            (
                "this machine did not run the program, in all, for",
                format!("{:.1} s", stalls.total().as_secs_f32()),
            ),
            ("faults that could not begin", nemesis.skipped.len().to_string()),
            (
                "all replicas in sync after the last fault within",
                format!("{:.1} s", healed.as_secs_f32()),
            ),
        ],
    };
    let table = run.table();
    if violations.is_empty() {
        return Ok((table, true));
    }
    print_violations(folder, &violations, &nemesis.env.fleet);
    Ok((table, false))
}

/// Starts all processes in the order of their dependencies. Returns the addresses of the gateways.
fn start(nemesis: &mut Nemesis<'_>) -> Result<Vec<String>, String> {
    for role in [Role::Etcd, Role::Coordinator, Role::Node, Role::Gateway] {
        for name in nemesis.env.fleet.names(role) {
            nemesis.env.fleet.start(&name);
        }
    }
    let gateways = nemesis.env.fleet.gateways();
    let ready = || -> Result<(), String> {
        for gateway in &gateways {
            match Client::new(gateway).get("/readyz?all") {
                Ok(answer) if answer.status == 200 => {}
                other => return Err(format!("{gateway} is not ready: {other:?}")),
            }
        }
        Ok(())
    };
    let whole = nemesis.wait_until_whole(READY_WITHIN);
    // No process may have ended during its start.
    if let Some(end) = nemesis.ends.first() {
        return Err(format!("{} ended at once: {}", end.name, end.how));
    }
    whole?;
    let begun = Instant::now();
    while let Err(why) = ready() {
        if begun.elapsed() > READY_WITHIN {
            return Err(why);
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(gateways)
}

/// Reads every counter of the run once more, many per request.
fn read_everything(
    recorder: &Recorder,
    gateways: &[String],
    probes: &mut [cluster::load::Probe],
) -> Result<(), String> {
    let mut client = Client::new(&gateways[0]);
    let mut read = |namespace: &str, keys: &[String]| -> Result<Vec<i128>, String> {
        let path = format!("/v1/counters/{namespace}/get");
        let body = json!({"keys": keys}).to_string();
        let begun = Instant::now();
        loop {
            let answer = client.call("POST", &path, &[], body.as_bytes(), DEADLINE);
            if let Ok(answer) = &answer
                && answer.status == 200
            {
                let counters = answer.body["counters"].as_array().into_iter().flatten();
                let values: Vec<_> =
                    counters.filter_map(|one| workload::number(&one["value"])).collect();
                return if values.len() == keys.len() {
                    Ok(values)
                } else {
                    Err(format!("{answer:?}"))
                };
            }
            if begun.elapsed() > READ_WITHIN {
                return Err(format!("the final reading of the counters failed: {answer:?}"));
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    };
    let counters: Vec<usize> = (0..recorder.counters()).collect();
    for some in counters.chunks(READ_AT_ONCE) {
        let keys: Vec<_> = some.iter().map(|counter| format!("c{counter}")).collect();
        let ids: Vec<_> = some.iter().map(|&counter| recorder.ask(counter, Ask::Read)).collect();
        let values = read(workload::NAMESPACE, &keys)?;
        for (id, value) in ids.into_iter().zip(values) {
            recorder.answer(id, OpOutcome::Applied(Some(value)), &json!("last reading"));
        }
    }
    for probe in probes {
        let values = read(probes::NAMESPACE, std::slice::from_ref(&probe.key))?;
        probe.check(u64::try_from(values[0]).unwrap_or(u64::MAX));
    }
    Ok(())
}

/// Checks that every copy of every shard holds the same counters.
fn agree(gateways: &[String], violations: &mut Vec<Violation>) {
    let begun = Instant::now();
    loop {
        let agree = cluster::shards(gateways).and_then(|shards| {
            shards.iter().try_for_each(|shard| shard.has_a_common_digest(REPLICAS))
        });
        match agree {
            Ok(()) => return,
            Err(why) if begun.elapsed() > AGREES_WITHIN => {
                violations.push(broken("heals", &why));
                return;
            }
            Err(_) => std::thread::sleep(Duration::from_millis(200)),
        }
    }
}

/// Prints the violations and saves them together with the data of all nodes.
fn print_violations(folder: &Path, violations: &[Violation], fleet: &Fleet) {
    let lines: Vec<_> =
        violations.iter().map(|one| format!("{}: {}", one.promise, one.detail)).collect();
    let path = folder.join("violations.txt");
    if let Err(error) = std::fs::write(&path, lines.join("\n")) {
        crate::note(&format!("{path:?}: {error}"));
    }
    for line in lines.iter().take(20) {
        crate::note(&format!("BROKEN {line}"));
    }
    if let Err(error) = fleet.keep_data() {
        crate::note(&format!("the data could not be kept: {error}"));
    }
}
