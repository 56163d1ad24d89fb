//! `dkc incr` and `dkc get`: single counters from a shell.
//!
//! `incr` uses a new token for each invocation: if no answer comes, or the outcome is unknown, the
//! request is sent again until the outcome is known, for at most `--give-up`. A rejected increment
//! is not retried: the caller may safely run the command again.

use std::ffi::OsString;
use std::time::Duration;

use anyhow::Context;
use client::{
    CallFailure, Counter, DEADLINE, GRACE, Gateways, IdempotencyHeaders, KeyField, parse,
    percent_encode,
};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::args::{self, ServerArgs, shown};
use crate::exit::{CommandExit, UsageError};
use crate::output::{self, note};

/// Options of `dkc incr`.
#[derive(Debug, clap::Args)]
pub(crate) struct IncrArgs {
    /// Namespace of the counter
    #[arg(value_name = "NS", value_parser = args::namespace)]
    namespace: String,
    /// Key of the counter; may be any bytes
    key: OsString,
    /// The key is percent-encoded, as `dkc get` prints it: `caf%E9`
    #[arg(long)]
    percent: bool,
    /// Amount to add; may be negative
    #[arg(default_value_t = 1, allow_negative_numbers = true)]
    delta: i64,
    /// Seconds to retry while the outcome is unknown
    #[arg(long, value_name = "SECONDS", default_value_t = 20)]
    give_up: u64,
    #[command(flatten)]
    server: ServerArgs,
}

/// Options of `dkc get`.
#[derive(Debug, clap::Args)]
pub(crate) struct GetArgs {
    /// Namespace of the counters
    #[arg(value_name = "NS", value_parser = args::namespace)]
    namespace: String,
    /// Keys of the counters; may be any bytes
    #[arg(required = true, value_name = "KEY")]
    keys: Vec<OsString>,
    /// The keys are percent-encoded, as this command prints them: `caf%E9`
    #[arg(long)]
    percent: bool,
    #[command(flatten)]
    server: ServerArgs,
}

/// The body of a gateway's answer to a read.
#[derive(Deserialize)]
struct GetAnswer {
    counters: Vec<Counter>,
}

/// The JSON that `dkc get --json` prints. This is a struct because `json!` takes no value beyond 64
/// bits.
#[derive(Serialize)]
struct GetOutput<'a> {
    namespace: &'a str,
    counters: &'a [Counter],
}

/// `dkc incr NS KEY [DELTA]`: prints the new value.
pub(crate) async fn incr(args: IncrArgs) -> anyhow::Result<CommandExit> {
    let key = args::key(args.key, args.percent).map_err(UsageError)?;
    let path = format!("/v1/counters/{}/{}/increment", args.namespace, percent_encode(&key));
    let body = json!({ "delta": args.delta, "return": "value" }).to_string();
    let mut gateways = Gateways::new(&args.server.urls);
    // The service's clock is used as issue time: the retries take seconds, and the clock of this
    // machine may be wrong.
    let token =
        IdempotencyHeaders { key: client::fresh_id().context("/dev/urandom")?, issued_at_ms: None };
    let give_up = Duration::from_secs(args.give_up);
    let until = format!("up to {} s (--give-up)", args.give_up);
    let work = gateways.write(&path, &token, body.as_bytes(), give_up);
    let answer = args::with_notice(&args.server.urls, &until, work).await;
    match answer.and_then(|response| parse::<Counter>(&response)) {
        Ok(counter) if args.server.json => {
            let key = KeyField::new(&key);
            let (namespace, delta) = (&args.namespace, args.delta);
            let outcome = IncrOutput { namespace, key, applied: delta, value: counter.value };
            output::json(&outcome)?;
            Ok(CommandExit::Done)
        }
        Ok(counter) => output::result(&counter.value.to_string()).map(|()| CommandExit::Done),
        Err(failure) => report_failure(&failure, args.server.json),
    }
}

/// The JSON that `dkc incr --json` prints.
#[derive(Serialize)]
struct IncrOutput<'a> {
    namespace: &'a str,
    #[serde(flatten)]
    key: KeyField,
    applied: i64,
    value: i128,
}

/// `dkc get NS KEY…`: prints the value of one counter, or a line `key<TAB>value` for each of
/// several counters, with percent-encoded keys.
pub(crate) async fn get(args: GetArgs) -> anyhow::Result<CommandExit> {
    let keys = args.keys.into_iter().map(|key| args::key(key, args.percent));
    let keys = keys.collect::<Result<Vec<_>, _>>().map_err(UsageError)?;
    // Plain strings where possible, as in docs/http.md.
    let names: Vec<_> = keys
        .iter()
        .map(|key| match KeyField::new(key) {
            KeyField::Text(text) => json!(text),
            base64 => json!(base64),
        })
        .collect();
    let path = format!("/v1/counters/{}/get", args.namespace);
    let body = json!({ "keys": names }).to_string();
    let urls = &args.server.urls;
    let mut gateways = Gateways::new(urls);
    let until = format!("up to {} s each", (DEADLINE + GRACE).as_secs());
    let work = gateways.read(&path, Some(body.as_bytes()), DEADLINE);
    let answer = args::with_notice(urls, &until, work).await;
    let counters = match answer.and_then(|response| parse::<GetAnswer>(&response)) {
        Ok(answer) if answer.counters.len() == keys.len() => answer.counters,
        Ok(_) => {
            return report_unread(
                "the answer has another number of counters than requested",
                args.server.json,
            );
        }
        Err(failure) => return report_unread(failure.why(), args.server.json),
    };
    if args.server.json {
        output::json(&GetOutput { namespace: &args.namespace, counters: &counters })?;
    } else if let [counter] = &counters[..] {
        output::result(&counter.value.to_string())?;
    } else {
        for (key, counter) in keys.iter().zip(&counters) {
            output::result(&format!("{}\t{}", shown(key), counter.value))?;
        }
    }
    Ok(CommandExit::Done)
}

/// Reports a read that failed. A read changes nothing, so its outcome is never unknown.
fn report_unread(why: &str, as_json: bool) -> anyhow::Result<CommandExit> {
    report("not-applied", "read failed", why, as_json)?;
    Ok(CommandExit::Failed)
}

/// Reports an increment that was not applied, or whose outcome is unknown.
fn report_failure(failure: &CallFailure, as_json: bool) -> anyhow::Result<CommandExit> {
    let (outcome, exit) = match failure {
        CallFailure::Unknown(_) => ("unknown", CommandExit::Unknown),
        // No send is in doubt, so no earlier send was applied either.
        _ => ("not-applied", CommandExit::Failed),
    };
    report(outcome, outcome, failure.why(), as_json)?;
    Ok(exit)
}

fn report(outcome: &str, title: &str, why: &str, as_json: bool) -> anyhow::Result<()> {
    if as_json {
        return output::json(&json!({ "outcome": outcome, "detail": why }));
    }
    note!("{title}: {why}");
    Ok(())
}
