//! `dkc doctor`: checks whether a machine, its disk and its etcd meet the needs of a role, and
//! advises what to do if not.
//!
//! Each check measures or reads one thing and returns a [`CheckResult`]. Measuring and judging are
//! separate functions, so that every verdict has a test. The exit code is 1 if a result is bad, and
//! otherwise 0: warnings are left to the operator.

pub(crate) mod disk;
mod machine;

use std::path::PathBuf;
use std::time::Duration;

use metastore::{Error, EtcdInspection, Metastore, Settings, failover_bound};
use serde::Serialize;
use serde_json::json;

use crate::exit::CommandExit;
use crate::output;

/// A longer round trip to etcd slows down every change of the cluster.
const ROUND_TRIP_MAX: Duration = Duration::from_millis(50);

/// Options of `dkc doctor`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Directory on the disk to check; a small temporary file is written there
    #[arg(long, env = "DKC_DATA", value_name = "DIR", default_value = ".")]
    data: PathBuf,
    /// Endpoints of etcd; without any, etcd is not checked
    #[arg(
        long,
        env = "DKC_ETCD",
        value_name = "HOST:PORT[,…]",
        value_delimiter = ',',
        value_parser = metastore::endpoint
    )]
    etcd: Vec<String>,
    /// Lease TTL to request from etcd, to check which TTL it grants
    #[arg(
        long,
        env = "DKC_LEASE_TTL",
        value_name = "SECONDS",
        default_value_t = 2,
        value_parser = clap::value_parser!(u32).range(1..=3600)
    )]
    lease_ttl: u32,
    /// Memory budget of a storage node on this machine
    #[arg(long, env = "DKC_MEMORY_BYTES", value_name = "BYTES", default_value_t = 512 << 20)]
    memory_bytes: u64,
    /// Print the result as one line of JSON
    #[arg(long)]
    json: bool,
}

/// The verdict of a check.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
enum CheckVerdict {
    /// Nothing to do.
    Ok,
    /// A role works, but not well.
    Warn,
    /// A role would fail or be unsafe.
    Bad,
}

/// The result of one check.
#[derive(Debug, Serialize)]
struct CheckResult {
    check: &'static str,
    verdict: CheckVerdict,
    found: String,
    /// The advice what to do; `None` if there is nothing to do.
    #[serde(skip_serializing_if = "Option::is_none")]
    advice: Option<String>,
}

impl CheckResult {
    /// `judged` is a verdict other than ok, with advice.
    fn new(check: &'static str, found: String, judged: Option<(CheckVerdict, String)>) -> Self {
        let (verdict, advice) = match judged {
            None => (CheckVerdict::Ok, None),
            Some((verdict, advice)) => (verdict, Some(advice)),
        };
        Self { check, verdict, found, advice }
    }

    fn failed(check: &'static str, why: &dyn std::fmt::Display, advice: &str) -> Self {
        Self::new(check, why.to_string(), Some((CheckVerdict::Bad, advice.to_owned())))
    }
}

fn warn(advice: impl Into<String>) -> Option<(CheckVerdict, String)> {
    Some((CheckVerdict::Warn, advice.into()))
}

fn bad(advice: impl Into<String>) -> Option<(CheckVerdict, String)> {
    Some((CheckVerdict::Bad, advice.into()))
}

/// Runs all checks and prints their results.
pub(crate) async fn run(args: Args) -> anyhow::Result<CommandExit> {
    let mut results = vec![disk::fsync(&args.data), disk::headroom(&args.data)];
    if !args.etcd.is_empty() {
        results.push(etcd(args.etcd, args.lease_ttl).await);
    }
    results.push(machine::clock(&args.data).await);
    results.push(machine::open_files());
    results.push(machine::memory(args.memory_bytes));
    results.push(machine::proc());
    results.push(machine::cpu());
    let count = |verdict| results.iter().filter(|result| result.verdict == verdict).count();
    let (warnings, bad) = (count(CheckVerdict::Warn), count(CheckVerdict::Bad));
    if args.json {
        output::json(&json!({ "checks": results, "warnings": warnings, "bad": bad }))?;
    } else {
        output::result(text(&results).trim_end())?;
    }
    Ok(if bad == 0 { CommandExit::Done } else { CommandExit::Failed })
}

fn text(results: &[CheckResult]) -> String {
    let mut text = String::new();
    for CheckResult { check, verdict, found, advice } in results {
        let verdict = match verdict {
            CheckVerdict::Ok => "ok",
            CheckVerdict::Warn => "warn",
            CheckVerdict::Bad => "BAD",
        };
        text += &format!("{verdict:<5} {check:<11} {found}\n");
        if let Some(advice) = advice {
            text += &format!("{:<17} -> {advice}\n", "");
        }
    }
    text
}

async fn etcd(endpoints: Vec<String>, ttl_s: u32) -> CheckResult {
    let named = endpoints.join(",");
    // No data of a cluster is read, so any name will do.
    match Metastore::inspect(&Settings::new(endpoints, "doctor"), ttl_s).await {
        Ok(inspection) => judge_etcd(&named, &inspection, ttl_s),
        Err(error) => CheckResult::failed("etcd", &format!("{named}: {error}"), advice_for(&error)),
    }
}

/// Returns the advice for an etcd that cannot be used.
fn advice_for(error: &Error) -> &'static str {
    match error {
        Error::TooOld(_) => "update etcd to 3.5.6 or newer",
        Error::Full(_) => {
            "make room: `etcdctl compact REVISION`, `etcdctl defrag` on each member, then \
             `etcdctl alarm disarm`; running processes continue, others wait"
        }
        Error::RequiresTls(_) | Error::RequiresAuth(..) => {
            "use an etcd without TLS and without authentication; no process starts with this one"
        }
        Error::Slow(..) => {
            "check etcd's log (\"slow fdatasync\", \"took too long\", \"no leader\") and its \
             disk; processes wait for it"
        }
        Error::Refused(..) => {
            "check that etcd answers at this address, and not a proxy or another service"
        }
        _ => "check that etcd is running and that this machine can reach it; processes wait for it",
    }
}

fn judge_etcd(named: &str, inspection: &EtcdInspection, ttl_s: u32) -> CheckResult {
    let EtcdInspection { version, warning, round_trip, granted_s } = inspection;
    let ms = round_trip.as_secs_f64() * 1e3;
    let found = format!(
        "{named}: version {version}, round trip {ms:.1} ms, grants a lease of {granted_s} s"
    );
    let within = failover_bound(*granted_s).as_secs();
    let judged = match warning {
        Some(warning) => warn(format!("{warning}: update it")),
        None if *granted_s > ttl_s => warn(format!(
            "{ttl_s} s were requested: a process that fails silently is replaced within \
             {within} s; lower etcd's --election-timeout if that is too late (etcd grants at \
             least 1.5 times as much)"
        )),
        None if *round_trip > ROUND_TRIP_MAX => warn(
            "elections and changes take several round trips: move etcd closer, or give it a \
             faster disk",
        ),
        None => None,
    };
    CheckResult::new("etcd", found, judged)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_etcd_is_judged_by_version_leases_and_speed() {
        #[track_caller]
        fn check(warning: Option<&'static str>, round_trip_ms: u64, granted_s: u32, want: &str) {
            let round_trip = Duration::from_millis(round_trip_ms);
            let inspection =
                EtcdInspection { version: "3.5.9".to_owned(), warning, round_trip, granted_s };
            let text = text(&[judge_etcd("a:1", &inspection, 2)]);
            assert!(text.contains(want), "{text}");
        }
        check(
            None,
            1,
            2,
            "ok    etcd        a:1: version 3.5.9, round trip 1.0 ms, grants a lease of 2 s\n",
        );
        check(None, 60, 2, "warn  etcd");
        check(None, 1, 5, "replaced within 6 s");
        check(Some("old"), 1, 2, "-> old: update it");
    }

    #[test]
    fn each_error_of_etcd_has_its_advice() {
        let (what, why) = ("txn", String::new());
        assert!(advice_for(&Error::Full(what)).contains("alarm disarm"));
        assert!(advice_for(&Error::RequiresTls(why.clone())).contains("without TLS"));
        assert!(
            advice_for(&Error::RequiresAuth(what, why.clone())).contains("without authentication")
        );
        assert!(advice_for(&Error::Slow(what, why.clone())).contains("its disk"));
        assert!(advice_for(&Error::NoAnswer(what, why)).contains("can reach it"));
    }

    #[test]
    fn results_are_printed_with_advice() {
        let results = [
            CheckResult::new("a", "fine".to_owned(), None),
            CheckResult::new("b", "low".to_owned(), bad("raise it")),
        ];
        let want = "ok    a           fine\nBAD   b           low\n                  -> raise it\n";
        assert_eq!(text(&results), want);
        let json = serde_json::to_value(&results[1]).expect("plain values");
        let want = json!({"check": "b", "verdict": "bad", "found": "low", "advice": "raise it"});
        assert_eq!(json, want);
    }
}
