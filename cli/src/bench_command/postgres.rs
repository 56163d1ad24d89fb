//! PostgreSQL as a system under load: upserts by its own `pgbench`.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::Context;
use bench::cpu::{RoleTimes, spent_by_tree, spent_by_waited_for};
use bench::histogram::Histogram;
use bench::load::Measured;

use super::children::Children;
use super::peers::{PeerMissing, of_peer, peer, program, until};
use super::report::{BenchReport, Spent};
use super::subject::{LoadShape, Subject};

const PROGRAMS: &[&str] = &["usr/lib/postgresql/*/bin"];
const USER: &str = "bench";
const CREATE: &str = "CREATE TABLE counters (key text PRIMARY KEY, value bigint NOT NULL);\n";

/// A server that is ready.
pub(crate) struct PostgresServer {
    /// The folder with its data, its socket, and the scripts.
    folder: PathBuf,
    pgbench: PathBuf,
    subject: Subject,
    pid: u32,
}

impl PostgresServer {
    /// Creates a database in `folder` and starts a server for it.
    pub(crate) fn start(folder: &Path, children: &mut Children) -> anyhow::Result<Self> {
        let found = |name| program(name, PROGRAMS).ok_or(PeerMissing("postgresql"));
        let (initdb, postgres, pgbench) = (found("initdb")?, found("postgres")?, found("pgbench")?);
        let data = folder.join("postgres");
        let mut create = as_user(&initdb);
        create.args(["--auth", "trust", "--username", USER, "--no-sync", "--pgdata"]).arg(&data);
        let output = create.output().context("initdb")?;
        let errors = String::from_utf8_lossy(&output.stderr);
        anyhow::ensure!(output.status.success(), "initdb: {errors}");
        let mut serve = as_user(&postgres);
        serve.arg("-D").arg(&data).arg("-k").arg(folder).args(["-h", ""]);
        serve.args(["-c", "synchronous_commit=on", "-c", "max_connections=1100"]);
        serve.stderr(fs::File::create(folder.join("postgres.log"))?);
        let pid = children.start(&mut serve)?;
        let fsync = "of its log, before the answer (synchronous_commit)";
        let subject = peer("PostgreSQL", Vec::new(), 1, fsync, "one node");
        let server = Self { folder: folder.to_owned(), pgbench, subject, pid };
        let script = server.script("create", CREATE)?;
        until(|| {
            let mut once = server.command(&script);
            Ok(once.args(["--transactions", "1"]).output()?.status.success())
        })
        .context("PostgreSQL")?;
        Ok(server)
    }

    /// Runs upserts with `pgbench`, which knows uniform keys and a closed loop.
    pub(crate) fn measure(&self, shape: &LoadShape) -> anyhow::Result<BenchReport> {
        let last = shape.keys - 1;
        let upsert = format!(
            "\\set number random(0, {last})\nINSERT INTO counters VALUES ('k' || :number, 1) \
             ON CONFLICT (key) DO UPDATE SET value = counters.value + 1;\n"
        );
        let script = self.script("upsert", &upsert)?;
        if !shape.warm_up.is_zero() {
            self.run(&script, shape.clients, shape.warm_up, None)?;
        }
        let prefix = self.folder.join("transactions");
        // `pgbench` is the child that is waited for meanwhile. The server has one process for each
        // connection.
        let read =
            || anyhow::Ok((spent_by_tree(self.pid)?, spent_by_waited_for(std::process::id())?));
        let (server_before, generator_before) = read()?;
        let printed = self.run(&script, shape.clients, shape.measured, Some(&prefix))?;
        let (server, generator) = read()?;
        let mut measured = Measured::default();
        for entry in fs::read_dir(&self.folder)?.flatten() {
            if entry.file_name().to_string_lossy().starts_with("transactions.") {
                add_latencies(&fs::read_to_string(entry.path())?, &mut measured.writes);
                fs::remove_file(entry.path())?;
            }
        }
        measured.requests = measured.writes.count();
        measured.increments = measured.requests;
        measured.seconds = match per_second(&printed) {
            Some(rate) if rate > 0.0 => measured.requests as f64 / rate,
            _ => shape.measured.as_secs_f64(),
        };
        let role = |now: Duration, before| {
            let all = now.saturating_sub(before);
            Some(RoleTimes { all, ..RoleTimes::default() })
        };
        let cpu = BTreeMap::from([
            ("postgres".to_owned(), role(server, server_before)),
            ("generator".to_owned(), role(generator, generator_before)),
        ]);
        let spent = Spent { cpu, ..Spent::default() };
        Ok(BenchReport::new(&self.subject, shape, measured, &spent))
    }

    fn run(
        &self,
        script: &Path,
        clients: usize,
        time: Duration,
        log: Option<&Path>,
    ) -> anyhow::Result<String> {
        let mut command = self.command(script);
        command.args(["--client", &clients.to_string(), "--protocol", "prepared"]);
        command.args(["--time", &time.as_secs().max(1).to_string()]);
        if let Some(prefix) = log {
            command.arg("--log").arg("--log-prefix").arg(prefix);
        }
        let output = command.output().context("pgbench")?;
        let errors = String::from_utf8_lossy(&output.stderr);
        anyhow::ensure!(output.status.success(), "pgbench: {errors}");
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    fn command(&self, script: &Path) -> Command {
        let mut command = of_peer(&self.pgbench);
        command.arg("--no-vacuum").arg("--file").arg(script);
        command.args(["--username", USER]).arg("--host").arg(&self.folder).arg("postgres");
        command
    }

    fn script(&self, name: &str, text: &str) -> anyhow::Result<PathBuf> {
        let path = self.folder.join(format!("{name}.sql"));
        fs::write(&path, text)?;
        Ok(path)
    }
}

/// Returns the rate that `pgbench` prints, which leaves out the time of connecting.
fn per_second(printed: &str) -> Option<f64> {
    let line = printed.lines().find_map(|line| line.strip_prefix("tps = "))?;
    line.split_ascii_whitespace().next()?.parse().ok()
}

/// Adds the latencies of a log of `pgbench`: the third word of each line, in microseconds.
fn add_latencies(log: &str, into: &mut Histogram) {
    let micros = |line: &str| line.split_ascii_whitespace().nth(2)?.parse().ok();
    log.lines().filter_map(micros).for_each(|micros| into.record(Duration::from_micros(micros)));
}

/// Returns a command of PostgreSQL, which refuses to run as root: then in a namespace where it has
/// the same rights and another number.
fn as_user(program: &Path) -> Command {
    if !rustix::process::geteuid().is_root() {
        return of_peer(program);
    }
    let mut command = of_peer(program);
    let mut wrapped = Command::new("unshare");
    wrapped.args(["--user", "--map-user=1000", "--map-group=1000"]).arg(program);
    for (name, value) in command.envs(std::iter::empty::<(&str, &str)>()).get_envs() {
        value.map(|value| wrapped.env(name, value));
    }
    wrapped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_of_pgbench() {
        let printed = "latency average = 1 ms\ntps = 3531.25 (without initial connection time)\n";
        assert_eq!(per_second(printed), Some(3531.25));
        assert_eq!(per_second("pgbench (15.18)\n"), None);
    }

    #[test]
    fn logs_of_pgbench() {
        let mut latencies = Histogram::default();
        add_latencies("0 1 250 0 1499 4\n1 1 750 0 1499 9\nnonsense\n\n", &mut latencies);
        assert_eq!(latencies.count(), 2);
        assert_eq!(latencies.quantile(0.5), Some(Duration::from_micros(250)));
    }
}
