//! `dkc status`: the cluster as one gateway sees it, and what is wrong with it.
//!
//! It asks `GET /v1/cluster` and adds the one thing a person looks for: for each shard that is not open, why. Ends with 0
//! when a gateway answered, however the cluster is: scripts look at `summary`.

mod changes;
mod page;
mod table;
mod watch;

use serde::Deserialize;
use serde_json::{Value, json};

pub(crate) use self::page::Cluster;
use crate::answer::parse;
use crate::client::{DEADLINE, Gateways, ServerArgs};
use crate::exit::Exit;
use crate::output;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    server: ServerArgs,
    /// Show every shard, not only those that are not as they should be
    #[arg(long)]
    all: bool,
    /// Look every second: a terminal is redrawn; elsewhere, and with --json, there is a line for every change. Times are
    /// UTC, as in the logs
    #[arg(long)]
    watch: bool,
}

pub(crate) async fn run(args: Args) -> anyhow::Result<Exit> {
    let mut gateways = Gateways::new(&args.server.urls);
    if args.watch {
        return watch::run(gateways, args.all, args.server.json).await;
    }
    let told = match ask(&mut gateways).await {
        Ok(told) => told,
        Err(why) if args.server.json => {
            output::json(&json!({ "detail": why }))?;
            return Ok(Exit::Failed);
        }
        Err(why) => {
            output::note(&why);
            return Ok(Exit::Failed);
        }
    };
    if args.server.json {
        output::json(&told.document()?)?;
    } else {
        output::result(table::text(&told.cluster, args.all).trim_end())?;
    }
    Ok(Exit::Done)
}

/// The page as it came, and as it is understood.
struct Told {
    page: Value,
    cluster: Cluster,
}

impl Told {
    /// What `--json` prints: the page, and a summary.
    fn document(&self) -> serde_json::Result<Value> {
        let mut document = self.page.clone();
        document["summary"] = serde_json::to_value(self.cluster.summary())?;
        Ok(document)
    }
}

async fn ask(gateways: &mut Gateways) -> Result<Told, String> {
    let answer = gateways.read("/v1/cluster", None, DEADLINE).await;
    let page = answer.and_then(|response| parse::<Value>(&response));
    let page = page.map_err(|refusal| format!("no gateway answers: {}", refusal.why()))?;
    let cluster = Cluster::deserialize(&page)
        .map_err(|error| format!("no gateway answers: not a cluster's page: {error}"))?;
    Ok(Told { page, cluster })
}
