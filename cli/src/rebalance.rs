//! `dkc rebalance --pause|--resume`: whether copies and primaries are moved for balance alone.
//!
//! The pause is an intent in etcd, which the leading coordinator obeys until it is removed. Lost
//! copies are replaced and nodes are drained meanwhile, and moves that have begun are ended.

use engine::records::PauseIntent;
use metastore::{CasOutcome, Metastore};
use process::ClusterOptions;
use serde::Serialize;

use crate::etcd::{cluster, connect, operator};
use crate::exit::{CommandExit, UnknownOutcome};
use crate::output;

/// Options of `dkc rebalance`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Move nothing for balance alone until --resume
    #[arg(long)]
    pause: bool,
    /// Move copies and primaries for balance again
    #[arg(long, conflicts_with = "pause")]
    resume: bool,
    #[command(flatten)]
    etcd: ClusterOptions<true>,
    /// Print the result as one line of JSON
    #[arg(long)]
    json: bool,
}

/// The result of the command.
#[derive(Debug, Serialize)]
struct RebalanceReport {
    paused: bool,
    /// The operator who paused the moves, if they are paused.
    by: Option<String>,
    /// The time of the pause by that operator's clock, in ms since 1970.
    since_ms: Option<u64>,
}

/// Pauses or resumes the moves, and prints whether they are paused.
pub(crate) async fn run(args: Args) -> anyhow::Result<CommandExit> {
    let metastore = connect(&args.etcd).await?;
    cluster(&metastore, &args.etcd).await?;
    if args.pause {
        settled(metastore.create(&(), &PauseIntent { from: operator() }).await?)?;
    }
    if args.resume {
        resume(&metastore).await?;
    }
    let paused = metastore.get::<PauseIntent>(&()).await?.map(|kept| kept.record.from);
    let report = RebalanceReport {
        paused: paused.is_some(),
        since_ms: paused.as_ref().map(|from| from.at.0),
        by: paused.map(|from| from.name),
    };
    output::report(args.json, &report, RebalanceReport::sentence)?;
    Ok(CommandExit::Done)
}

async fn resume(metastore: &Metastore) -> anyhow::Result<()> {
    let Some(intent) = metastore.get::<PauseIntent>(&()).await? else { return Ok(()) };
    settled(metastore.delete::<PauseIntent>(&(), intent.modified).await?)
}

/// Fails if the outcome is unknown. A comparison that failed means that another command was first,
/// and what is printed shows its result.
fn settled(outcome: CasOutcome) -> anyhow::Result<()> {
    match outcome {
        CasOutcome::Done { .. } | CasOutcome::Failed => Ok(()),
        CasOutcome::Unknown => Err(UnknownOutcome.into()),
    }
}

impl RebalanceReport {
    fn sentence(&self) -> String {
        match &self.by {
            Some(by) => format!(
                "moves for balance alone are paused by {by}; lost copies are replaced and nodes \
                 are drained"
            ),
            None => "moves for balance go on".to_owned(),
        }
    }
}
