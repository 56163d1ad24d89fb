//! `dkc status`: the cluster as one gateway sees it, and its problems.
//!
//! The command reads `GET /v1/cluster` and adds the reason for each shard that is not open. The
//! exit code is 0 if a gateway answered, whatever the state of the cluster: scripts should read
//! `summary`.

mod changes;
mod page;
mod table;
mod watch;

use client::{DEADLINE, Gateways, parse};
use serde::Deserialize;
use serde_json::{Value, json};

pub(crate) use self::page::ClusterInfo;
use crate::args::ServerArgs;
use crate::exit::CommandExit;
use crate::output::{self, note};

/// Options of `dkc status`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    server: ServerArgs,
    /// Show every shard, not only those with a problem
    #[arg(long)]
    all: bool,
    /// Refresh every second: a terminal is redrawn; otherwise, and with --json, each change is
    /// printed as a line. Times are in UTC, as in the logs
    #[arg(long)]
    watch: bool,
}

/// Prints the status, once or with `--watch` until interrupted.
pub(crate) async fn run(args: Args) -> anyhow::Result<CommandExit> {
    let mut gateways = Gateways::new(&args.server.urls);
    if args.watch {
        return watch::run(gateways, args.all, args.server.json).await;
    }
    let answer = match ask(&mut gateways).await {
        Ok(answer) => answer,
        Err(why) if args.server.json => {
            output::json(&json!({ "detail": why }))?;
            return Ok(CommandExit::Failed);
        }
        Err(why) => {
            note!("{why}");
            return Ok(CommandExit::Failed);
        }
    };
    if args.server.json {
        output::json(&answer.document()?)?;
    } else {
        output::result(table::text(&answer.cluster, args.all).trim_end())?;
    }
    Ok(CommandExit::Done)
}

/// A gateway's answer, as JSON and parsed.
struct StatusAnswer {
    page: Value,
    cluster: ClusterInfo,
}

impl StatusAnswer {
    /// The JSON that `--json` prints: the page with a summary.
    fn document(&self) -> serde_json::Result<Value> {
        let mut document = self.page.clone();
        document["summary"] = serde_json::to_value(self.cluster.summary())?;
        Ok(document)
    }
}

async fn ask(gateways: &mut Gateways) -> Result<StatusAnswer, String> {
    let answer = gateways.read("/v1/cluster", None, DEADLINE).await;
    let page = answer.and_then(|response| parse::<Value>(&response));
    let page = page.map_err(|failure| format!("no gateway answers: {}", failure.why()))?;
    let cluster = ClusterInfo::deserialize(&page)
        .map_err(|error| format!("no gateway answers: invalid body of /v1/cluster: {error}"))?;
    Ok(StatusAnswer { page, cluster })
}
