//! `dkc node remove NODE`: takes a node out of the cluster for good.
//!
//! The command checks by the records in etcd whether the node may leave, and refuses with the
//! reason otherwise. Then it writes a remove intent for the boot that it has seen, and the leading
//! coordinator, which also probes, carries it out or not. An intent that was not carried out in
//! time is withdrawn: the node may be needed by the time that it could be.

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
use crate::exit::CommandExit;
use crate::output::{self, note};

/// The pause between two reads of the store's record.
const POLL_INTERVAL: Duration = Duration::from_millis(200);

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
    let store = match records.named(&args.node) {
        Ok(store) => store,
        Err(why) => return CommandExit::usage(why),
    };
    let name = &store.record.name;
    if let Err(why) = verdict(&records, store) {
        note!("error: {name} cannot be removed: {why}. Nothing was changed");
        return Ok(CommandExit::Failed);
    }
    if metastore.get::<CoordinatorRecord>(&()).await?.is_none() {
        note!(
            "error: no coordinator is leader, and the leader carries out a removal: start a \
             coordinator. Nothing was changed"
        );
        return Ok(CommandExit::Failed);
    }
    let request = RemoveRequest { metastore, store: store.id };
    let intent = RemoveIntent { boot: store.record.boot, from: operator() };
    let written = request.write(&intent).await?;
    let wait = Duration::from_secs(args.wait);
    let done = request.carried_out(wait).await?;
    let withdrawn = !done && request.withdraw(written).await?;
    // The coordinator may have been faster than the withdrawal.
    if done || !withdrawn && request.carried_out(Duration::ZERO).await? {
        let uuid = store.id.to_string();
        let report = RemoveReport { node: name.clone(), uuid, state: "retired" };
        output::report(args.json, &report, RemoveReport::sentence)?;
        return Ok(CommandExit::Done);
    }
    if !withdrawn {
        note!("unknown: the coordinator did not remove {name} in time, and it still may");
        return Ok(CommandExit::Unknown);
    }
    note!(
        "error: the coordinator did not remove {name} in time, so the request is withdrawn: the \
         node may still answer, or a shard has no primary; `dkc status` shows it"
    );
    Ok(CommandExit::Failed)
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
    async fn write(&self, intent: &RemoveIntent) -> anyhow::Result<u64> {
        let former = self.metastore.get::<RemoveIntent>(&self.store).await?;
        let written = match former {
            None => self.metastore.create(&self.store, intent).await?,
            Some(former) => self.metastore.replace(&self.store, intent, former.modified).await?,
        };
        match written {
            CasOutcome::Done { mod_revision } => Ok(mod_revision),
            CasOutcome::Failed => {
                bail!("another request was made concurrently. Nothing was changed")
            }
            CasOutcome::Unknown => bail!(
                "the answer of etcd was lost and the outcome is unknown: run the command again"
            ),
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
