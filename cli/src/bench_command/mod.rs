//! `dkc bench`: a load on a running cluster, or a profile on private ones, with the CPU that it
//! costs each role.
//!
//! Every result includes its conditions. Fsync cannot be switched off in this service, so its mode
//! is stated, not configured: an answer comes after fsync on every in-sync replica.

mod children;
mod cluster;
mod goals;
mod measuring;
mod page;
mod peers;
mod postgres;
mod profile;
mod report;
mod rounds;
mod subject;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use bench::keys::KeyDistribution;
use client::Media;

use self::children::Children;
use self::page::ProfilePage;
use self::profile::{BenchProfile, ProfileLimits, ProfileRow};
use self::rounds::{ProfileResults, RowSetting};
use self::subject::LoadShape;
use crate::args::{self, ServerArgs};
use crate::doctor::disk::in_memory;
use crate::exit::CommandExit;
use crate::output::{self, note};

/// Options of `dkc bench`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Number of clients, each with one connection and one request at a time
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    clients: u32,
    /// Requests per second in all, sent when they are due (open loop) [default: as many as are
    /// answered]
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    rate: Option<u64>,
    /// Increments per request; 1 uses the endpoint for single increments
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    batch: u32,
    /// Format of a batch
    #[arg(long, value_enum, default_value_t = BatchFormat::Text)]
    format: BatchFormat,
    /// Send each request with its own Idempotency-Key
    #[arg(long)]
    keyed: bool,
    /// Share of requests that read one counter
    #[arg(
        long,
        value_name = "PERCENT",
        default_value_t = 0,
        value_parser = clap::value_parser!(u32).range(0..=100)
    )]
    reads: u32,
    /// Let reads be this old, from a follower [default: linearizable]
    #[arg(long, value_name = "MS")]
    max_staleness: Option<u64>,
    /// Threads of the load generator
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=256))]
    threads: u32,
    /// Number of distinct keys [default: 1000000, or those of the profile's row; there it is a
    /// limit]
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    keys: Option<u64>,
    /// Distribution of increments over the keys: uniform, zipf[:EXPONENT], one, or each (every key
    /// once)
    #[arg(long, default_value = "uniform")]
    distribution: KeyDistribution,
    /// Duration of the measurement in seconds [default: 10, or that of the profile's row]
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    seconds: Option<u64>,
    /// Duration of the warm-up before the measurement in seconds [default: 2, or that of the
    /// profile's row]
    #[arg(long)]
    warm_up: Option<u64>,
    /// Namespace of the counters
    #[arg(long, default_value = "bench", value_parser = args::namespace)]
    namespace: String,
    /// The `cluster.json` of a local cluster, to measure what its processes use
    #[arg(long, value_name = "FILE")]
    cluster_json: Option<PathBuf>,
    /// Run this list of measurements on private clusters instead, beside other systems
    #[arg(long, value_enum)]
    profile: Option<BenchProfile>,
    /// Run the rows of the profile whose names contain one of these texts
    #[arg(long, value_name = "TEXT[,…]", value_delimiter = ',', requires = "profile")]
    rows: Vec<String>,
    /// Number of runs of the profile, whose medians are reported [default: 5 of headline, else 1]
    #[arg(long, requires = "profile", value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: Option<u32>,
    /// Directory for the data of private clusters, on the disk to measure [default: that for
    /// temporary files]
    #[arg(long, value_name = "DIR", requires = "profile")]
    data: Option<PathBuf>,
    /// The dkc to measure [default: this one]
    #[arg(long, value_name = "FILE", requires = "profile")]
    program: Option<PathBuf>,
    /// Write the results to this page, with figures and charts in the folder of its name
    #[arg(long, value_name = "FILE.md", requires = "profile")]
    write: Option<PathBuf>,
    #[command(flatten)]
    server: ServerArgs,
}

/// The format of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum BatchFormat {
    /// `text/plain`, one key per line
    Text,
    /// `application/json`
    Json,
}

/// Runs the load or the profile, and prints the result.
pub(crate) fn run(args: Args) -> anyhow::Result<CommandExit> {
    match args.profile {
        Some(profile) => run_profile(profile, &args),
        None => run_once(&args),
    }
}

/// Serves the same answer to everything, until the process is killed.
pub(crate) fn serve_hello() -> anyhow::Result<CommandExit> {
    let address = bench::hello::start()?;
    output::result(&format!("http://{address}"))?;
    loop {
        std::thread::park();
    }
}

fn run_once(args: &Args) -> anyhow::Result<CommandExit> {
    let processes = match &args.cluster_json {
        Some(path) => cluster::processes(path)?,
        None => Vec::new(),
    };
    let first = args.server.urls.first().context("a gateway")?;
    let subject = cluster::subject(first, processes)?;
    let shape = shape(args);
    let requests = cluster::requests(&args.server.urls, &args.namespace, &shape);
    let report = measuring::measure(&subject, &shape, |number| requests.client(number))?;
    if args.server.json {
        output::json(&report)?;
    } else {
        report::print(&report)?;
    }
    let failed = report.measured.errors + report.measured.refused > 0;
    Ok(if failed { CommandExit::Failed } else { CommandExit::Done })
}

fn shape(args: &Args) -> LoadShape {
    let usual = LoadShape::default();
    LoadShape {
        clients: args.clients as usize,
        threads: args.threads as usize,
        rate: args.rate.map(|rate| rate as f64),
        batch: args.batch as usize,
        media: match args.format {
            BatchFormat::Text => Media::Text,
            BatchFormat::Json => Media::Json,
        },
        keyed: args.keyed,
        keys: args.keys.unwrap_or(usual.keys),
        distribution: args.distribution,
        reads_percent: args.reads,
        staleness_ms: args.max_staleness,
        warm_up: args.warm_up.map_or(usual.warm_up, Duration::from_secs),
        measured: args.seconds.map_or(usual.measured, Duration::from_secs),
    }
}

fn run_profile(profile: BenchProfile, args: &Args) -> anyhow::Result<CommandExit> {
    let rows = chosen_rows(profile, args);
    if rows.is_empty() {
        note!("error: no row of this profile has such a name");
        return Ok(CommandExit::Usage);
    }
    let base = args.data.clone().unwrap_or_else(std::env::temp_dir);
    std::fs::create_dir_all(&base).with_context(|| base.display().to_string())?;
    if in_memory(&base) {
        let base = base.display();
        note!("{base} is in memory: choose a disk with --data");
    }
    let folder = tempfile::Builder::new().prefix("dkc-bench-").tempdir_in(&base)?;
    let mut children = Children::new()?;
    let mut results = ProfileResults::default();
    let rounds = args.rounds.unwrap_or(profile.usual_rounds());
    let is_smoke = profile == BenchProfile::Smoke;
    let setting = RowSetting {
        folder: folder.path().join("run"),
        program: match &args.program {
            Some(program) => program.clone(),
            None => std::env::current_exe().context("this executable")?,
        },
        is_verified: is_smoke,
    };
    for round in 1..=rounds {
        note!("round {round} of {rounds}");
        results.run_round(&rows, &setting, &mut children)?;
    }
    drop(children);
    let mut page = ProfilePage::new(profile, rounds, &rows, results);
    if is_smoke {
        page.check_fields();
    }
    if let Some(path) = &args.write {
        page.write(path)?;
    }
    if args.server.json {
        output::json(&page)?;
    } else {
        output::result(&page.table())?;
    }
    page.wrong.iter().for_each(|problem| note!("wrong: {problem}"));
    Ok(if page.wrong.is_empty() { CommandExit::Done } else { CommandExit::Failed })
}

/// Returns the rows with the wanted names, and the rows that those depend on.
fn chosen_rows(profile: BenchProfile, args: &Args) -> Vec<ProfileRow> {
    let rows = profile.rows(ProfileLimits {
        measured: args.seconds.map(Duration::from_secs),
        warm_up: args.warm_up.map(Duration::from_secs),
        keys_max: args.keys,
    });
    let is_named = |row: &ProfileRow| {
        let name = row.name.to_lowercase();
        args.rows.iter().any(|text| name.contains(&text.to_lowercase()))
    };
    let named: Vec<_> =
        rows.iter().filter(|row| args.rows.is_empty() || is_named(row)).cloned().collect();
    let is_needed = |row: &ProfileRow| {
        let names = |other: &ProfileRow| other.depends_on().any(|name| name == row.name);
        named.iter().any(|other| other.name == row.name || names(other))
    };
    rows.into_iter().filter(is_needed).collect()
}
