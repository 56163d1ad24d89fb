//! `dkc node remove NODE`: takes a node out of the cluster for good.
//!
//! The command checks by the records in etcd whether the node may leave, and refuses with the
//! reason otherwise. Then it writes a remove intent for the boot that it has seen, and the leading
//! coordinator, which also probes, carries it out or not. An intent that was not carried out in
//! time is withdrawn: the node may be needed by the time that it could be. So is that of a command
//! that was killed: it is bound to a lease.

use std::time::{Duration, Instant};

use anyhow::bail;
use engine::coordinator::removal::{Removal, RemovalRefusal};
use engine::ids::StoreId;
use engine::records::{RemoveIntent, StoreRecord};
use metastore::{CasOutcome, CoordinatorRecord, Metastore, Revisioned};
use process::ClusterOptions;
use serde::Serialize;

use super::NodeRecords;
use crate::etcd::{connect, operator};
use crate::exit::{CommandExit, UnknownOutcome};
use crate::output::{self, note};

/// The pause between two reads of the store's record.
const POLL_INTERVAL: Duration = Duration::from_millis(200);

/// The time in seconds for which a request outlasts the command that waits for it.
const OUTLASTS_S: u32 = 5;

/// Options of `dkc node remove`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Name of the node, or uuid of its store
    node: String,
    /// Seconds to wait for the coordinator before the request is withdrawn
    #[arg(
        long,
        value_name = "SECONDS",
        default_value_t = 30,
        value_parser = clap::value_parser!(u64).range(1..=86_400)
    )]
    wait: u64,
    #[command(flatten)]
    etcd: ClusterOptions<true>,
    /// Print the result as one line of JSON
    #[arg(long)]
    json: bool,
}

/// The result of the command.
#[derive(Debug, Serialize)]
struct RemoveReport {
    node: String,
    uuid: String,
    state: &'static str,
}

/// Removes a node, and prints its last state.
pub(super) async fn run(args: Args) -> anyhow::Result<CommandExit> {
    let metastore = connect(&args.etcd).await?;
    let records = NodeRecords::read(&metastore).await?;
    let store = records.named(&args.node)?;
    let name = &store.record.name;
    let end = retire(metastore, &records, store, Duration::from_secs(args.wait)).await?;
    if end == RemovalEnd::Retired {
        let uuid = store.id.to_string();
        let report = RemoveReport { node: name.clone(), uuid, state: "retired" };
        output::report(args.json, &report, RemoveReport::sentence)?;
    }
    Ok(end.print(name))
}

/// The end of a removal.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum RemovalEnd {
    /// The node has left the cluster.
    Retired,
    /// The node may not leave, for this reason.
    Refused(String),
    /// The coordinator did not carry the request out, which is withdrawn.
    Withdrawn,
    /// The coordinator may still carry the request out.
    Open,
}

impl RemovalEnd {
    /// Prints the reason if the node was not removed. Returns the exit code.
    pub(crate) fn print(&self, name: &str) -> CommandExit {
        match self {
            Self::Retired => CommandExit::Done,
            Self::Refused(why) => {
                note!("error: {name} cannot be removed: {why}. Nothing was changed");
                CommandExit::Failed
            }
            Self::Withdrawn => {
                note!(
                    "error: the coordinator did not remove {name} in time, so the request is \
                     withdrawn: the node may still answer, or a shard has no primary; `dkc status` \
                     shows it"
                );
                CommandExit::Failed
            }
            Self::Open => {
                note!("unknown: the coordinator did not remove {name} in time, and it still may");
                CommandExit::Unknown
            }
        }
    }
}

/// Takes a node that is empty and stopped out of the cluster.
pub(crate) async fn retire(
    metastore: Metastore,
    records: &NodeRecords,
    store: &Revisioned<StoreRecord>,
    wait: Duration,
) -> anyhow::Result<RemovalEnd> {
    if let Err(why) = verdict(records, store) {
        return Ok(RemovalEnd::Refused(why.to_string()));
    }
    if metastore.get::<CoordinatorRecord>(&()).await?.is_none() {
        let why = "no coordinator is leader, and the leader carries out a removal: start one";
        return Ok(RemovalEnd::Refused(why.to_owned()));
    }
    let request = RemoveRequest { metastore, store: store.id };
    let intent = RemoveIntent { boot: store.record.boot, from: operator() };
    let written = request.write(&intent, wait).await?;
    let done = request.carried_out(wait).await?;
    let withdrawn = !done && request.withdraw(written).await?;
    // The coordinator may have been faster than the withdrawal.
    Ok(if done || !withdrawn && request.carried_out(Duration::ZERO).await? {
        RemovalEnd::Retired
    } else if withdrawn {
        RemovalEnd::Withdrawn
    } else {
        RemovalEnd::Open
    })
}

/// Returns whether the node may leave by the records in etcd, or the reason why it may not.
fn verdict(records: &NodeRecords, store: &Revisioned<StoreRecord>) -> Result<(), RemovalRefusal> {
    let removal = Removal { store: store.id, runs: records.runs(store.id) };
    removal.check(records.shards.iter(), None)
}

impl RemoveReport {
    fn sentence(&self) -> String {
        format!("{} is removed: its name is free, its data can be deleted", self.node)
    }
}

/// A request to remove a store.
struct RemoveRequest {
    metastore: Metastore,
    store: StoreId,
}

impl RemoveRequest {
    /// Writes the intent in place of any former one. Returns the revision of the intent.
    ///
    /// etcd deletes it some time after `wait`: a command that was killed can't withdraw it, and it
    /// would remove the node at some later stop.
    async fn write(&self, intent: &RemoveIntent, wait: Duration) -> anyhow::Result<u64> {
        if let Some(former) = self.metastore.get::<RemoveIntent>(&self.store).await? {
            // If it is gone already, or another request came first, the creation shows it.
            self.metastore.delete::<RemoveIntent>(&self.store, former.modified).await?;
        }
        let ttl_s = u32::try_from(wait.as_secs()).unwrap_or(u32::MAX).saturating_add(OUTLASTS_S);
        match self.metastore.create_for(&self.store, intent, ttl_s).await? {
            CasOutcome::Done { mod_revision } => Ok(mod_revision),
            CasOutcome::Failed => {
                bail!("another request was made concurrently. Nothing was changed")
            }
            CasOutcome::Unknown => Err(UnknownOutcome.into()),
        }
    }

    /// Waits until the store is gone, for at most `wait`. Returns whether it is.
    async fn carried_out(&self, wait: Duration) -> anyhow::Result<bool> {
        let began = Instant::now();
        loop {
            let kept = self.metastore.get::<StoreRecord>(&self.store).await?;
            if kept.is_none_or(|kept| kept.record.status.is_gone()) {
                return Ok(true);
            }
            if began.elapsed() >= wait {
                return Ok(false);
            }
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }

    /// Withdraws the intent. Returns false if it may still be carried out.
    async fn withdraw(&self, written: u64) -> anyhow::Result<bool> {
        let gone = self.metastore.delete::<RemoveIntent>(&self.store, written).await?;
        Ok(matches!(gone, CasOutcome::Done { .. }))
    }
}
