//! `dkc incr` and `dkc get`: single counters from a shell.
//!
//! `incr` has a token of its own for each invocation: an answer that does not come, or says unknown, is asked for again
//! until it is known, for `--give-up`. What was refused is left to whoever called it: that may be repeated at will.

use std::ffi::OsString;
use std::time::Duration;

use anyhow::Context;
use bench::http::{Token, percent_encode};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::answer::{Counter, KeyField, Refusal, parse};
use crate::client::{self, DEADLINE, GRACE, Gateways, ServerArgs, shown};
use crate::exit::Exit;
use crate::output;

#[derive(Debug, clap::Args)]
pub(crate) struct IncrArgs {
    /// Namespace of the counter
    #[arg(value_name = "NS", value_parser = client::namespace)]
    namespace: String,
    /// The counter's key, any bytes
    key: OsString,
    /// The key is in percent form, as `dkc get` prints it: `caf%E9`
    #[arg(long)]
    percent: bool,
    /// What to add; may be negative
    #[arg(default_value_t = 1, allow_negative_numbers = true)]
    delta: i64,
    /// Seconds after which an outcome that is unknown stays so
    #[arg(long, value_name = "SECONDS", default_value_t = 20)]
    give_up: u64,
    #[command(flatten)]
    server: ServerArgs,
}

#[derive(Debug, clap::Args)]
pub(crate) struct GetArgs {
    /// Namespace of the counters
    #[arg(value_name = "NS", value_parser = client::namespace)]
    namespace: String,
    /// The counters' keys, any bytes
    #[arg(required = true, value_name = "KEY")]
    keys: Vec<OsString>,
    /// Keys are in percent form, as they are printed: `caf%E9`
    #[arg(long)]
    percent: bool,
    #[command(flatten)]
    server: ServerArgs,
}

#[derive(Deserialize)]
struct Counters {
    counters: Vec<Counter>,
}

/// What `dkc get --json` prints. A struct, since `json!` takes no value beyond 64 bits.
#[derive(Serialize)]
struct Got<'a> {
    namespace: &'a str,
    counters: &'a [Counter],
}

/// `dkc incr NS KEY [DELTA]`: prints the new value.
pub(crate) async fn incr(args: IncrArgs) -> anyhow::Result<Exit> {
    let key = match client::key(args.key, args.percent) {
        Ok(key) => key,
        Err(why) => return usage(&why),
    };
    let path = format!("/v1/counters/{}/{}/increment", args.namespace, percent_encode(&key));
    let body = json!({ "delta": args.delta, "return": "value" }).to_string();
    let mut gateways = Gateways::new(&args.server.urls);
    // Seconds only, and within them the service's clock will do: this machine's may be wrong.
    let token = Token { key: client::fresh_id().context("/dev/urandom")?, issued_at_ms: None };
    let give_up = Duration::from_secs(args.give_up);
    let until = format!("up to {} s (--give-up)", args.give_up);
    let work = gateways.write(&path, &token, body.as_bytes(), give_up);
    let answer = client::told(&args.server.urls, &until, work).await;
    match answer.and_then(|response| parse::<Counter>(&response)) {
        Ok(counter) if args.server.json => {
            let key = KeyField::new(&key);
            let (namespace, delta) = (&args.namespace, args.delta);
            let outcome = Applied { namespace, key, applied: delta, value: counter.value };
            output::json(&outcome)?;
            Ok(Exit::Done)
        }
        Ok(counter) => output::result(&counter.value.to_string()).map(|()| Exit::Done),
        Err(refusal) => refused(&refusal, args.server.json),
    }
}

#[derive(Serialize)]
struct Applied<'a> {
    namespace: &'a str,
    #[serde(flatten)]
    key: KeyField,
    applied: i64,
    value: i128,
}

/// `dkc get NS KEY…`: prints the value, or a line `key<TAB>value` for each of several, the key in percent form.
pub(crate) async fn get(args: GetArgs) -> anyhow::Result<Exit> {
    let keys = args.keys.into_iter().map(|key| client::key(key, args.percent));
    let keys = match keys.collect::<Result<Vec<_>, _>>() {
        Ok(keys) => keys,
        Err(why) => return usage(&why),
    };
    // Plain strings where possible: the form the contract shows.
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
    let answer = client::told(urls, &until, work).await;
    let counters = match answer.and_then(|response| parse::<Counters>(&response)) {
        Ok(answer) if answer.counters.len() == keys.len() => answer.counters,
        Ok(_) => return unread("an answer with another number of counters", args.server.json),
        Err(refusal) => return unread(refusal.why(), args.server.json),
    };
    if args.server.json {
        output::json(&Got { namespace: &args.namespace, counters: &counters })?;
    } else if let [counter] = &counters[..] {
        output::result(&counter.value.to_string())?;
    } else {
        for (key, counter) in keys.iter().zip(&counters) {
            output::result(&format!("{}\t{}", shown(key), counter.value))?;
        }
    }
    Ok(Exit::Done)
}

/// A read that fails has changed nothing, whatever the answer looked like.
fn unread(why: &str, as_json: bool) -> anyhow::Result<Exit> {
    if as_json {
        output::json(&json!({ "outcome": "not-applied", "detail": why }))?;
    } else {
        output::note(&format!("not read: {why}"));
    }
    Ok(Exit::Failed)
}

fn usage(why: &str) -> anyhow::Result<Exit> {
    output::note(&format!("error: {why}"));
    Ok(Exit::Usage)
}

/// Says why it was not done, or that nobody knows.
fn refused(refusal: &Refusal, as_json: bool) -> anyhow::Result<Exit> {
    let (outcome, exit) = match refusal {
        Refusal::Unknown(_) => ("unknown", Exit::Unknown),
        // Nothing is in doubt, so no earlier send had an effect either.
        _ => ("not-applied", Exit::Failed),
    };
    if as_json {
        output::json(&json!({ "outcome": outcome, "detail": refusal.why() }))?;
    } else {
        output::note(&format!("{outcome}: {}", refusal.why()));
    }
    Ok(exit)
}
