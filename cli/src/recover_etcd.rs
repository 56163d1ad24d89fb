//! `dkc recover-etcd NODE-ADDRESS…`: rebuilds a lost etcd from the knowledge of the stores.
//!
//! `engine::recovery_plan` decides what is written, and why that is safe. This command asks the
//! stores twice: first whether a plan is possible, then for the promise to follow no etcd but the
//! new one. Between promise and records nothing may be lost, so what was interrupted can be
//! repeated.
//!
//! A store whose disk is lost for good is given up with `--without`. What that may cost is decided
//! in `engine::recovery_plan::given_up`; a loss has to be accepted.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, bail};
use engine::ids::StoreId;
use engine::message::{NodeQuery, NodeQueryReply, StoreKnowledge};
use engine::records::Meta;
use engine::recovery_plan::{
    RecoveredRecords, RecoveryRefusal, RecoveryTerms, UNUSED_EPOCHS, newer_than_etcd,
    next_incarnation, plan,
};
use engine::shard_record::ShardRecord;
use metastore::{
    CoordinatorRecord, Election, LeadershipChange, LeaseSettings, Metastore, Revisioned,
};
use process::ClusterOptions;
use serde::Serialize;
use tokio::time::{Instant, sleep, timeout};

use crate::etcd::{connect, operator};
use crate::exit::CommandExit;
use crate::output::{self, note};

/// The time-out of one question to a store.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);
/// The time limit for a promise to become durable.
const DURABLE_WITHIN: Duration = Duration::from_secs(30);
/// The pause between two questions.
const ASK_EVERY: Duration = Duration::from_millis(100);
/// The time limit for becoming the only one who writes: the lease of a coordinator that was killed
/// has to expire.
const ELECTED_WITHIN: Duration = Duration::from_secs(15);
/// The number of attempts to write the records.
const WRITE_ATTEMPTS: u32 = 5;
/// The cluster that a question names: its sender does not know the cluster.
const ANY_CLUSTER: u128 = 0;

/// Options of `dkc recover-etcd`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Addresses of all storage nodes, running or waiting for etcd (their --listen or --advertise)
    #[arg(required = true, value_name = "NODE-ADDRESS")]
    nodes: Vec<String>,
    /// Give up a store whose disk is lost for good, by the uuid in the refusal without it. No
    /// process of it may run. All other nodes have to be named. May be repeated
    #[arg(long, value_name = "UUID", value_parser = store_id)]
    without: Vec<StoreId>,
    /// Accept that increments which only the stores given up have are lost for good
    #[arg(long, requires = "without")]
    accept_loss: bool,
    /// Ask the nodes and show whether etcd can be recovered; change nothing
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    etcd: ClusterOptions<true>,
    /// Print the result as one line of JSON
    #[arg(long)]
    json: bool,
}

/// The result of a recovery.
#[derive(Debug, Serialize)]
struct RecoveryReport {
    cluster: String,
    incarnation: u32,
    stores: Vec<String>,
    shards: usize,
    /// The shards that may lack acknowledged increments.
    lossy: Vec<u16>,
    written: bool,
}

impl RecoveryReport {
    fn new(recovered: &RecoveredRecords, written: bool) -> Self {
        let names = recovered.stores.iter().map(|(_, record)| record.name.clone());
        Self {
            cluster: format!("{:032x}", recovered.meta.cluster),
            incarnation: recovered.meta.incarnation,
            stores: names.collect(),
            shards: recovered.shards.len(),
            lossy: recovered.losses.iter().map(|loss| loss.shard.0).collect(),
            written,
        }
    }

    fn sentence(&self) -> String {
        let Self { cluster, incarnation, stores, shards, lossy, written } = self;
        let stores = stores.join(", ");
        let lossy = match lossy.len() {
            0 => String::new(),
            lossy => format!(", of which {lossy} may lack acknowledged increments"),
        };
        match written {
            true => format!(
                "etcd is written: cluster {cluster}, incarnation {incarnation}, stores {stores}, \
                 {shards} shards{lossy}. Start the coordinators, and restart the storage nodes, \
                 then the gateways"
            ),
            false => format!(
                "etcd can be recovered: cluster {cluster}, stores {stores}, {shards} \
                 shards{lossy}. Nothing was changed"
            ),
        }
    }
}

/// Recovers etcd.
pub(crate) async fn run(args: Args) -> anyhow::Result<CommandExit> {
    let metastore = connect(&args.etcd).await?;
    let answers = ask_all(&args.nodes, 0).await?;
    let mut terms = RecoveryTerms {
        incarnation: next_incarnation(&answers),
        promised: false,
        without: args.without.iter().copied().collect::<BTreeSet<_>>(),
        from: operator(),
        unused_epochs: UNUSED_EPOCHS,
        planted: None,
    };
    let first = match plan(&answers, &terms) {
        Ok(first) => first,
        Err(refusals) => return Ok(refused(&refusals)),
    };
    if !(first.losses.is_empty() || args.accept_loss || args.dry_run) {
        return Ok(loss_not_accepted(&first));
    }
    if let Some(obstacle) = obstacle(&metastore, &first.meta, &answers).await? {
        note!("error: {obstacle}. Nothing was changed");
        return Ok(CommandExit::Failed);
    }
    if args.dry_run {
        let report = RecoveryReport::new(&first, false);
        output::report(args.json, &report, RecoveryReport::sentence)?;
        return Ok(CommandExit::Done);
    }
    let candidate = CoordinatorRecord { address: "127.0.0.1:1".into() };
    let mut election = metastore.stand_for_election(&candidate, LeaseSettings::default());
    let Some(term) = lead(&mut election).await else {
        election.resign().await;
        note!(
            "error: a coordinator is running on this etcd, or its lease has not expired: stop all \
             coordinators and run the command again. Nothing was changed"
        );
        return Ok(CommandExit::Failed);
    };
    terms.promised = true;
    note!(
        "note: the nodes are asked to follow no etcd below incarnation {}. If this run ends early, \
         run the command again, also if the old etcd is found: they do not follow it any more",
        terms.incarnation
    );
    let recovered = recover(&args, &metastore, term, &terms).await;
    election.resign().await;
    let recovered = match recovered? {
        Ok(recovered) => recovered,
        Err(refusals) => return Ok(refused(&refusals)),
    };
    let report = RecoveryReport::new(&recovered, true);
    output::report(args.json, &report, RecoveryReport::sentence)?;
    Ok(CommandExit::Done)
}

fn refused(refusals: &[RecoveryRefusal]) -> CommandExit {
    note!("error: etcd cannot be recovered from these nodes:");
    refusals.iter().for_each(|refusal| note!("- {refusal}"));
    note!(
        "Nothing was written to etcd. Start the nodes that are missing, and name all of them; give \
         up a store whose disk is lost for good with --without UUID, and do not name its address"
    );
    CommandExit::Failed
}

fn loss_not_accepted(planned: &RecoveredRecords) -> CommandExit {
    let shards: Vec<_> = planned.losses.iter().map(|loss| loss.shard.to_string()).collect();
    note!(
        "error: without these stores {} shards may lack acknowledged increments: {}. If the stores \
         are lost for good, run the command again with --accept-loss. Nothing was changed",
        shards.len(),
        shards.join(", ")
    );
    CommandExit::Failed
}

/// Parses a uuid as `StoreId` prints it.
fn store_id(text: &str) -> Result<StoreId, String> {
    let store = u128::from_str_radix(text, 16).map(StoreId).map_err(|error| error.to_string())?;
    let is_uuid = store.to_string() == text;
    is_uuid.then_some(store).ok_or_else(|| "a uuid has 32 hex digits in lower case".to_owned())
}

/// Becomes the only one who writes as a coordinator. Returns the term.
async fn lead(election: &mut Election) -> Option<u64> {
    let elected = async {
        loop {
            if let LeadershipChange::Leading { term } = election.next().await? {
                return Some(term);
            }
        }
    };
    timeout(ELECTED_WITHIN, elected).await.ok().flatten()
}

/// Asks for the promise of the new incarnation, and writes the records.
async fn recover(
    args: &Args,
    metastore: &Metastore,
    term: u64,
    terms: &RecoveryTerms,
) -> anyhow::Result<Result<RecoveredRecords, Vec<RecoveryRefusal>>> {
    let answers = promise_all(&args.nodes, terms.incarnation).await?;
    let recovered = match plan(&answers, terms) {
        Ok(recovered) => recovered,
        Err(refusals) => return Ok(Err(refusals)),
    };
    if !recovered.losses.is_empty() && !args.accept_loss {
        bail!("what the nodes know has changed meanwhile: run the command again");
    }
    for _ in 0..WRITE_ATTEMPTS {
        if metastore.write_recovered(term, &recovered).await? {
            return Ok(Ok(recovered));
        }
        sleep(ASK_EVERY).await;
    }
    bail!(
        "etcd was not written as a whole: something else writes to it, or its answers were lost. \
         Nothing follows it as it is. Run the command again"
    );
}

/// Returns why this etcd must not be written, if so: it is not older than what the stores know, or
/// belongs to a cluster that is in use.
async fn obstacle(
    metastore: &Metastore,
    meta: &Meta,
    answers: &[StoreKnowledge],
) -> anyhow::Result<Option<String>> {
    let Some(found) = metastore.get::<Meta>(&()).await? else {
        let others = metastore.other_names(meta.cluster).await?;
        return Ok(others.first().map(|name| {
            format!("etcd holds this cluster under another name: give `--cluster {name}`")
        }));
    };
    let listed = metastore.list::<ShardRecord>().await?.all;
    if found.record.cluster != meta.cluster {
        // A coordinator that has started on an empty etcd makes a new cluster at once. Without
        // shards nothing was ever counted there.
        let used = !listed.is_empty();
        return Ok(used.then(|| {
            format!(
                "etcd holds another cluster, {:032x}, with {} shards: check --etcd and --cluster, \
                 or start etcd on an empty folder",
                found.record.cluster,
                listed.len()
            )
        }));
    }
    let of = |kept: Revisioned<ShardRecord>| (kept.id, kept.record);
    let listed = listed.into_iter().map(of).collect();
    let known = answers.iter().flat_map(|answer| &answer.shards);
    let known = known.map(|known| (known.shard, known.promised, known.record.as_ref()));
    let is_older = !newer_than_etcd(known, &listed).is_empty();
    let promised = answers.iter().filter_map(|answer| answer.etcd.as_ref());
    let promised = promised.map(|etcd| etcd.promised).max().unwrap_or(0);
    let current = !is_older && found.record.incarnation >= promised;
    Ok(current.then(|| "etcd is not older than what the stores know: nothing is lost".to_owned()))
}

/// Asks all nodes. Those that do not answer are an error: every store must.
async fn ask_all(nodes: &[String], promise: u32) -> anyhow::Result<Vec<StoreKnowledge>> {
    let (mut answers, mut failed) = (Vec::new(), Vec::new());
    for node in nodes {
        match ask(node, promise).await {
            Ok(answer) => answers.push(answer),
            Err(why) => failed.push(format!("node {node}: {why:#}")),
        }
    }
    anyhow::ensure!(failed.is_empty(), "{}. Start what does not run", failed.join("; "));
    Ok(answers)
}

/// Asks all nodes for the promise until it is durable on all of them.
async fn promise_all(nodes: &[String], promise: u32) -> anyhow::Result<Vec<StoreKnowledge>> {
    let until = Instant::now() + DURABLE_WITHIN;
    loop {
        let answers = ask_all(nodes, promise).await?;
        if answers.iter().all(|answer| answer.durable) || Instant::now() >= until {
            return Ok(answers);
        }
        sleep(ASK_EVERY).await;
    }
}

async fn ask(node: &str, promise: u32) -> anyhow::Result<StoreKnowledge> {
    let query = NodeQuery::Recover { promise };
    let asked = timeout(ANSWER_WITHIN, storage_node::ask(ANY_CLUSTER, node, query)).await;
    match asked.context("it does not answer")?.map_err(anyhow::Error::msg)? {
        NodeQueryReply::Recover(known) => Ok(*known),
        other => bail!("an answer to another question: {other:?}"),
    }
}
