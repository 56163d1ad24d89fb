//! `dkc doctor`: whether a machine, its disk and its etcd are fit for a role, and what to do if not.
//!
//! Each check measures or reads one thing and gives a [`Finding`]; judging is apart from measuring, so that every verdict
//! has a test. Ends with 1 when something is bad, else 0: a warning is for a person to weigh.

mod disk;
mod machine;

use std::path::PathBuf;
use std::time::Duration;

use metastore::{Error, Metastore, Probe, Settings, failover_bound};
use serde::Serialize;
use serde_json::json;

use crate::exit::Exit;
use crate::output;

/// Slower than this, every change of the cluster is slow.
const ROUND_TRIP_MAX: Duration = Duration::from_millis(50);

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Folder whose disk is tried; a small file is written there for a moment
    #[arg(long, env = "DKC_DATA", value_name = "DIR", default_value = ".")]
    data: PathBuf,
    /// etcd's members; not asked if none is named
    #[arg(long, env = "DKC_ETCD", value_name = "HOST:PORT[,…]", value_delimiter = ',', value_parser = metastore::endpoint)]
    etcd: Vec<String>,
    /// Lease that is asked of etcd, to see what it grants
    #[arg(long, env = "DKC_LEASE_TTL", value_name = "SECONDS", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=3600))]
    lease_ttl: u32,
    /// Memory that a storage node here is to use
    #[arg(long, env = "DKC_MEMORY_BYTES", value_name = "BYTES", default_value_t = 512 << 20)]
    memory_bytes: u64,
    /// Print the findings as one line of JSON
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    Ok,
    Warn,
    Bad,
}

/// What one check has found.
#[derive(Debug, Serialize)]
struct Finding {
    check: &'static str,
    verdict: Verdict,
    found: String,
    /// What to do about it; none when there is nothing to do.
    #[serde(skip_serializing_if = "Option::is_none")]
    advice: Option<String>,
}

impl Finding {
    /// `judged` is a verdict that needs something done, and what.
    fn new(check: &'static str, found: String, judged: Option<(Verdict, String)>) -> Self {
        let (verdict, advice) = match judged {
            None => (Verdict::Ok, None),
            Some((verdict, advice)) => (verdict, Some(advice)),
        };
        Self { check, verdict, found, advice }
    }

    fn failed(check: &'static str, why: &dyn std::fmt::Display, advice: &str) -> Self {
        Self::new(check, why.to_string(), Some((Verdict::Bad, advice.to_owned())))
    }
}

fn warn(advice: impl Into<String>) -> Option<(Verdict, String)> {
    Some((Verdict::Warn, advice.into()))
}

fn bad(advice: impl Into<String>) -> Option<(Verdict, String)> {
    Some((Verdict::Bad, advice.into()))
}

pub(crate) async fn run(args: Args) -> anyhow::Result<Exit> {
    let mut findings = vec![disk::fsync(&args.data), disk::headroom(&args.data)];
    if !args.etcd.is_empty() {
        findings.push(etcd(args.etcd, args.lease_ttl).await);
    }
    findings.push(machine::clock(&args.data).await);
    findings.push(machine::open_files());
    findings.push(machine::memory(args.memory_bytes));
    findings.push(machine::proc());
    findings.push(machine::cpu());
    let count = |verdict| findings.iter().filter(|finding| finding.verdict == verdict).count();
    let (warnings, bad) = (count(Verdict::Warn), count(Verdict::Bad));
    if args.json {
        output::json(&json!({ "checks": findings, "warnings": warnings, "bad": bad }))?;
    } else {
        output::result(text(&findings).trim_end())?;
    }
    Ok(if bad == 0 { Exit::Done } else { Exit::Failed })
}

fn text(findings: &[Finding]) -> String {
    let mut text = String::new();
    for Finding { check, verdict, found, advice } in findings {
        let verdict = match verdict {
            Verdict::Ok => "ok",
            Verdict::Warn => "warn",
            Verdict::Bad => "BAD",
        };
        text += &format!("{verdict:<5} {check:<11} {found}\n");
        if let Some(advice) = advice {
            text += &format!("{:<17} -> {advice}\n", "");
        }
    }
    text
}

async fn etcd(endpoints: Vec<String>, ttl_s: u32) -> Finding {
    let named = endpoints.join(",");
    // Nothing of a cluster's own is read; any name will do.
    match Metastore::probe(&Settings::new(endpoints, "doctor"), ttl_s).await {
        Ok(probe) => judge_etcd(&named, &probe, ttl_s),
        Err(error) => Finding::failed("etcd", &format!("{named}: {error}"), cure(&error)),
    }
}

/// What to do about an etcd that is of no use.
fn cure(error: &Error) -> &'static str {
    match error {
        Error::TooOld { .. } => "update etcd to 3.5.6 or newer",
        Error::Full { .. } => {
            "make room: `etcdctl compact REVISION`, `etcdctl defrag` on each member, then `etcdctl alarm disarm`; processes \
             that run go on, others wait"
        }
        Error::SpeaksTls { .. } | Error::WantsUser { .. } => {
            "give dkc an etcd without TLS and without users; no process starts with this one"
        }
        Error::Slow { .. } => {
            "look at etcd's log (\"slow fdatasync\", \"took too long\", \"no leader\") and at its disk; processes wait for it"
        }
        Error::Refused { .. } => {
            "see that what answers there is etcd, and not a proxy or something else"
        }
        _ => "see that etcd runs there and that this machine can reach it; processes wait for it",
    }
}

fn judge_etcd(named: &str, probe: &Probe, ttl_s: u32) -> Finding {
    let Probe { version, warning, round_trip, granted_s } = probe;
    let ms = round_trip.as_secs_f64() * 1e3;
    let found = format!(
        "{named}: version {version}, round trip {ms:.1} ms, grants a lease of {granted_s} s"
    );
    let within = failover_bound(*granted_s).as_secs();
    let judged = match warning {
        Some(warning) => warn(format!("{warning}: update it")),
        None if *granted_s > ttl_s => warn(format!(
            "{ttl_s} s were asked for: a process that stops without a word is replaced within {within} s; lower etcd's \
             --election-timeout if that is too late (it grants at least 1.5 times as much)"
        )),
        None if *round_trip > ROUND_TRIP_MAX => warn(
            "elections and changes take several round trips: move etcd nearer, or give it a faster disk",
        ),
        None => None,
    };
    Finding::new("etcd", found, judged)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_etcd_is_judged_by_version_leases_and_speed() {
        #[track_caller]
        fn check(warning: Option<&'static str>, round_trip_ms: u64, granted_s: u32, want: &str) {
            let round_trip = Duration::from_millis(round_trip_ms);
            let probe = Probe { version: "3.5.9".to_owned(), warning, round_trip, granted_s };
            let text = text(&[judge_etcd("a:1", &probe, 2)]);
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
    fn each_etcd_that_is_of_no_use_has_its_cure() {
        let (what, why) = ("txn", String::new());
        assert!(cure(&Error::Full { what }).contains("alarm disarm"));
        assert!(cure(&Error::SpeaksTls { endpoint: why.clone() }).contains("without TLS"));
        assert!(cure(&Error::WantsUser { what, why: why.clone() }).contains("without users"));
        assert!(cure(&Error::Slow { what, why: why.clone() }).contains("its disk"));
        assert!(cure(&Error::NoAnswer { what, why }).contains("can reach it"));
    }

    #[test]
    fn findings_are_told_with_what_to_do() {
        let findings = [
            Finding::new("a", "fine".to_owned(), None),
            Finding::new("b", "low".to_owned(), bad("raise it")),
        ];
        let want = "ok    a           fine\nBAD   b           low\n                  -> raise it\n";
        assert_eq!(text(&findings), want);
        let told = serde_json::to_value(&findings[1]).expect("plain values");
        let want = json!({"check": "b", "verdict": "bad", "found": "low", "advice": "raise it"});
        assert_eq!(told, want);
    }
}
