//! `dkc shards promote SHARD NODE --accept-loss`: makes a copy the primary of its shard although it
//! may lack acknowledged increments.
//!
//! The command is for a shard whose complete copies are lost for good. The coordinator waits for
//! them without limit, since only a person can know that they will not return. The command shows
//! what is lost, asks for confirmation, and writes a promote intent to etcd that is valid for one
//! version of the shard's record only. The leading coordinator carries it out if no copy may lead
//! by itself, and keeps a permanent record of the loss. An intent that is not carried out is
//! withdrawn, however the wait ends: it must not be carried out hours later.

use std::io::{self, BufRead, IsTerminal};
use std::time::Duration;

use anyhow::Context;
use engine::ids::{Epoch, Seq, ShardId, StoreId, Version};
use engine::message::{NodeQuery, NodeQueryReply, ReplicaStatus, RoleStatus};
use engine::records::{LossRecord, NodeRecord, PromoteIntent, StoreRecord};
use engine::shard_record::ShardRecord;
use metastore::{CasOutcome, CoordinatorRecord, Metastore, Revisioned};
use process::ClusterOptions;
use serde::Serialize;
use tokio::time::Instant;

use crate::etcd::{cluster, connect, is_denoted_by, operator};
use crate::exit::CommandExit;
use crate::output::{self, note};
use crate::signals::Signals;
use crate::split;

/// The pause between two reads of etcd.
const POLL_INTERVAL: Duration = Duration::from_millis(200);
/// The time-out of a query to a node.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);
/// The time limit for withdrawing an intent: enough for a few attempts that all time out.
const WITHDRAW_WITHIN: Duration = Duration::from_secs(10);
/// No shard record has this version (the first has 1), so an intent with it has no effect.
const NO_RECORD_VERSION: Version = Version(0);

/// Options of `dkc shards`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: ShardsCommand,
}

#[derive(Debug, clap::Subcommand)]
enum ShardsCommand {
    /// Make a node's copy the primary although it may lack acknowledged increments
    Promote(Promote),
    /// Split a shard into two or more, while it serves
    Split(split::Split),
}

/// Options of `dkc shards promote`.
#[derive(Debug, clap::Args)]
struct Promote {
    /// Id of the shard, as in `dkc status`
    shard: u16,
    /// Name of the node, or uuid of its store
    node: String,
    /// Accept that increments which only the other copies hold are lost for good
    #[arg(long, required = true)]
    accept_loss: bool,
    /// Do not ask for confirmation
    #[arg(long)]
    yes: bool,
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

/// The loss that a promotion causes, or has caused.
#[derive(Debug, Serialize)]
struct PromoteReport {
    shard: u16,
    epoch: u64,
    primary: String,
    uuid: String,
    /// The last position in the log of the new primary's copy.
    last: u64,
    given_up: Vec<GivenUpCopy>,
    /// The operator in the loss record. `None` if the record is not written yet, or if no operator
    /// was needed because all copies were damaged.
    by: Option<String>,
}

/// A copy whose additional entries are lost.
#[derive(Debug, Serialize)]
struct GivenUpCopy {
    node: String,
    uuid: String,
    answers: bool,
    /// The highest position that the copy is known to hold; `None` if nothing is known.
    last: Option<u64>,
}

/// Runs a command on shards.
pub(crate) async fn run(args: Args) -> anyhow::Result<CommandExit> {
    match args.command {
        ShardsCommand::Promote(args) => promote(args).await,
        ShardsCommand::Split(args) => split::run(args).await,
    }
}

/// Promotes a copy after confirmation.
async fn promote(args: Promote) -> anyhow::Result<CommandExit> {
    if !args.yes && !io::stdin().is_terminal() {
        return CommandExit::usage(
            "stdin is not a terminal, so the command cannot ask for confirmation: add --yes",
        );
    }
    let metastore = connect(&args.etcd).await?;
    let meta = cluster(&metastore, &args.etcd).await?;
    let shard = ShardId(args.shard);
    let Some(record) = metastore.get::<ShardRecord>(&shard).await? else {
        let why = format!("no shard {shard}: `dkc status --all` lists the shards");
        return CommandExit::usage(why);
    };
    let view = ShardContext::read(&metastore, meta.cluster, record).await?;
    let Some(store) = view.running(&args.node) else {
        return CommandExit::usage(format!("node {:?} is not running", args.node));
    };
    if metastore.get::<CoordinatorRecord>(&()).await?.is_none() {
        note!(
            "error: no coordinator is leader, and the leader carries out a promotion: start a \
             coordinator. Nothing was written",
        );
        return Ok(CommandExit::Failed);
    }
    let copies = view.copies(store).await;
    if let Some(leader) = view.leader(&copies) {
        note!("error: shard {shard} already has primary {leader}: no promotion is needed");
        return Ok(CommandExit::Failed);
    }
    let report = view.report(store, &copies);
    report.warn();
    if !args.yes && !report.is_confirmed(&mut io::stdin().lock())? {
        note!("not confirmed: nothing was written");
        return Ok(CommandExit::Failed);
    }
    let config = view.record.record.clone();
    let request = PromoteRequest::new(metastore, config, store);
    match request.carried_out(Duration::from_secs(args.wait)).await? {
        PromoteResult::Recorded(loss) => {
            let report = view.recorded(&loss, &report);
            output::report(args.json, &report, PromoteReport::sentence)?;
            let (exit, remark) = verdict(&request.intent, &loss, &report, &view.name(store));
            if let Some(remark) = remark {
                note!("{remark}");
            }
            Ok(exit)
        }
        PromoteResult::Refused(why) => {
            note!("error: {why}. Nothing was changed");
            Ok(CommandExit::Failed)
        }
        PromoteResult::Unknown(why) => {
            note!(
                "unknown: {why}. `dkc status` lists the promotion under \"promoted with data \
                 loss\" if it was carried out"
            );
            Ok(CommandExit::Unknown)
        }
    }
}

/// The shard's record and the stores and nodes of the cluster, as read from etcd.
struct ShardContext {
    cluster: u128,
    record: Revisioned<ShardRecord>,
    stores: Vec<Revisioned<StoreRecord>>,
    nodes: Vec<Revisioned<NodeRecord>>,
}

/// Each store with whether it answers, and with the status of its copy. `None` if it does not
/// answer or holds no copy.
type CopyStatuses = Vec<(StoreId, bool, Option<ReplicaStatus>)>;

impl ShardContext {
    async fn read(
        metastore: &Metastore,
        cluster: u128,
        record: Revisioned<ShardRecord>,
    ) -> anyhow::Result<Self> {
        let stores = metastore.list::<StoreRecord>().await?.all;
        let nodes = metastore.list::<NodeRecord>().await?.all;
        Ok(Self { cluster, record, stores, nodes })
    }

    /// Returns the running store with this name or uuid.
    fn running(&self, node: &str) -> Option<StoreId> {
        let runs = |store| self.nodes.iter().any(|node| node.id == store);
        let found = self.stores.iter().find(|kept| runs(kept.id) && is_denoted_by(kept, node));
        found.map(|kept| kept.id)
    }

    fn name(&self, store: StoreId) -> String {
        let kept = self.stores.iter().find(|kept| kept.id == store);
        kept.map_or_else(|| store.to_string(), |kept| kept.record.name.clone())
    }

    /// Queries the members of the in-sync set and the store that is to be primary.
    async fn copies(&self, to: StoreId) -> CopyStatuses {
        let isr = &self.record.record.isr;
        let mut copies = Vec::new();
        for &store in isr.iter().chain([&to].into_iter().filter(|to| !isr.contains(to))) {
            let reply = self.ask(store).await;
            copies.push((store, reply.is_some(), reply.flatten()));
        }
        copies
    }

    /// Queries a store for the status of its copy. The outer `Option` is `None` if the store does
    /// not answer, the inner one if it holds no copy of the shard.
    async fn ask(&self, store: StoreId) -> Option<Option<ReplicaStatus>> {
        let node = self.nodes.iter().find(|node| node.id == store)?;
        let asked = storage_node::ask(self.cluster, &node.record.address, NodeQuery::Status);
        match tokio::time::timeout(ANSWER_WITHIN, asked).await {
            Ok(Ok(NodeQueryReply::Status { from, replicas, .. })) if from.store == store => {
                let shard = self.record.record.shard();
                Some(replicas.into_iter().find(|replica| replica.shard == shard))
            }
            _ => None,
        }
    }

    /// Returns the name of the node that leads the shard in its current epoch, if there is one.
    fn leader(&self, copies: &CopyStatuses) -> Option<String> {
        let config = &self.record.record;
        let leads = |copy: &ReplicaStatus| match copy.role {
            RoleStatus::Primary { epoch, .. } => epoch == config.epoch,
            _ => false,
        };
        let leader = copies.iter().find(|(_, _, copy)| copy.as_ref().is_some_and(leads))?;
        Some(self.name(leader.0))
    }

    fn report(&self, to: StoreId, copies: &CopyStatuses) -> PromoteReport {
        let config = &self.record.record;
        let last = |store: StoreId| {
            let copy = copies.iter().find(|(other, ..)| *other == store)?.2.as_ref()?;
            Some(copy.last)
        };
        // An applied entry is committed, and every trusted member holds all committed entries.
        let committed = copies.iter().filter_map(|(_, _, copy)| Some(copy.as_ref()?.applied)).max();
        let given_up = |&store: &StoreId| {
            let trusted = !config.tainted.contains(&store);
            let known = last(store).max(committed.filter(|_| trusted));
            GivenUpCopy {
                node: self.name(store),
                uuid: store.to_string(),
                answers: copies.iter().any(|(other, answers, _)| *other == store && *answers),
                last: known.filter(|&seq| seq > Seq(0)).map(|seq| seq.0),
            }
        };
        PromoteReport {
            shard: config.shard().0,
            epoch: config.epoch.0 + 1,
            primary: self.name(to),
            uuid: to.to_string(),
            last: last(to).unwrap_or_default().0,
            given_up: config.isr.iter().filter(|&&store| store != to).map(given_up).collect(),
            by: None,
        }
    }

    /// Builds the report from the loss record; whether a node answers is taken from `before`.
    fn recorded(&self, loss: &LossRecord, before: &PromoteReport) -> PromoteReport {
        let given_up = |&(store, last): &(StoreId, Option<Seq>)| {
            let uuid = store.to_string();
            let answers = before.given_up.iter().any(|one| one.uuid == uuid && one.answers);
            GivenUpCopy { node: self.name(store), uuid, answers, last: last.map(|seq| seq.0) }
        };
        PromoteReport {
            shard: loss.shard.0,
            epoch: loss.epoch.0,
            primary: self.name(loss.primary.store),
            uuid: loss.primary.store.to_string(),
            last: loss.last.1.0,
            given_up: loss.given_up.iter().map(given_up).collect(),
            by: loss.accepted_by.as_ref().map(|operator| operator.name.clone()),
        }
    }
}

impl PromoteReport {
    /// Prints the consequences before the confirmation.
    fn warn(&self) {
        let Self { shard, primary, uuid, last, given_up, .. } = self;
        note!(
            "{primary} (store {uuid}) becomes primary of shard {shard}. The log of its copy ends \
             at position {last}."
        );
        note!(
            "Entries of these copies after that position are lost, and are overwritten if the \
             copies return:",
        );
        for GivenUpCopy { node, uuid, answers, last } in given_up {
            let answers = if *answers { "answers" } else { "does not answer" };
            let last = last.map_or("position unknown".to_owned(), |last| {
                format!("known to hold entries up to {last}")
            });
            note!("  {node} (store {uuid}): {answers}, {last}");
        }
    }

    /// Asks for confirmation; returns whether the user typed the shard and the node on one line.
    fn is_confirmed(&self, from: &mut impl BufRead) -> io::Result<bool> {
        let wanted = format!("{} {}", self.shard, self.primary);
        note!("To confirm, type the shard and the node: {wanted}");
        let mut line = String::new();
        from.read_line(&mut line)?;
        Ok(line.trim() == wanted)
    }

    fn sentence(&self) -> String {
        let Self { shard, epoch, primary, last, given_up, by, .. } = self;
        let names: Vec<&str> = given_up.iter().map(|one| one.node.as_str()).collect();
        let by = match by {
            Some(by) => format!("accepted by {by}"),
            None => "all copies were damaged".to_owned(),
        };
        format!(
            "{primary} is primary of shard {shard} in epoch {epoch}, from position {last} on; \
             lost copies: {}; {by}",
            names.join(", ")
        )
    }
}

/// A promote intent and the record that it refers to.
struct PromoteRequest {
    metastore: Metastore,
    config: ShardRecord,
    intent: PromoteIntent,
}

/// The result of a request for a promotion.
#[derive(Debug)]
enum PromoteResult {
    /// The shard's next epoch began with a loss: by this request or by another one.
    Recorded(LossRecord),
    /// The request was not carried out, and cannot be carried out any more.
    Refused(String),
    /// The request may still be carried out.
    Unknown(String),
}

/// The change of the shard's record since the request.
enum ShardChange {
    /// The record still has the version that the intent refers to.
    Same,
    /// There is a newer record without a loss: the intent is void.
    Changed,
    /// The next epoch began with this loss.
    Loss(LossRecord),
}

impl PromoteRequest {
    fn new(metastore: Metastore, config: ShardRecord, store: StoreId) -> Self {
        let intent = PromoteIntent { store, version: config.version, from: operator() };
        Self { metastore, config, intent }
    }

    /// Writes the intent and waits until it is carried out, for at most `wait`. An error means that
    /// the intent was not written.
    async fn carried_out(&self, wait: Duration) -> anyhow::Result<PromoteResult> {
        let until = Instant::now().checked_add(wait).context("--wait is too long")?;
        let mut signals = Signals::catch()?;
        let Some(slot) = self.slot().await? else {
            let why = "another request was made concurrently, or the answer of etcd was lost";
            return Ok(PromoteResult::Refused(why.to_owned()));
        };
        let shard = self.config.shard();
        // From here on the intent is withdrawn however the wait ends.
        let ended = match self.metastore.replace(&shard, &self.intent, slot).await {
            Ok(CasOutcome::Done { .. }) => self.wait_until_carried_out(until, &mut signals).await,
            Ok(CasOutcome::Failed) => Err("another request was made concurrently".to_owned()),
            Ok(CasOutcome::Unknown) => Err("the answer of etcd to the request was lost".to_owned()),
            Err(error) => Err(error.to_string()),
        };
        let withdrawn = self.withdraw(slot).await;
        Ok(match ended {
            Ok(loss) => PromoteResult::Recorded(loss),
            Err(why) if !withdrawn => PromoteResult::Unknown(format!(
                "{why}, and etcd did not confirm that the request is withdrawn: \
                 it may still be carried out"
            )),
            // The intent may have been carried out just before it was withdrawn.
            Err(why) => match self.read_change().await {
                Ok(ShardChange::Loss(loss)) => PromoteResult::Recorded(loss),
                Ok(ShardChange::Same | ShardChange::Changed) => {
                    PromoteResult::Refused(format!("{why}; the request is withdrawn"))
                }
                Err(error) => PromoteResult::Unknown(format!(
                    "{why}; the request is withdrawn, but it may have been carried out before: \
                     {error}"
                )),
            },
        })
    }

    /// Returns the revision of the shard's key for intents, which is created if it is missing. The
    /// intent then replaces the value of this revision. If etcd's answer to that is lost, deleting
    /// the key at the same revision rules out that the intent is written later.
    async fn slot(&self) -> Result<Option<u64>, metastore::Error> {
        let shard = self.config.shard();
        if let Some(kept) = self.metastore.get::<PromoteIntent>(&shard).await? {
            return Ok(Some(kept.modified));
        }
        let void_intent = PromoteIntent { version: NO_RECORD_VERSION, ..self.intent.clone() };
        Ok(match self.metastore.create(&shard, &void_intent).await? {
            CasOutcome::Done { mod_revision: revision } => Some(revision),
            CasOutcome::Failed | CasOutcome::Unknown => None,
        })
    }

    /// Waits for the loss that the shard's next epoch begins with. The error is the reason why the
    /// wait ended without one.
    async fn wait_until_carried_out(
        &self,
        until: Instant,
        signals: &mut Signals,
    ) -> Result<LossRecord, String> {
        tokio::select! {
            loss = self.loss() => loss,
            () = signals.next() => {
                note!("stopping: withdrawing the request");
                Err("interrupted".to_owned())
            }
            () = tokio::time::sleep_until(until) => {
                Err("the coordinator did not carry it out in time; see its log".to_owned())
            }
        }
    }

    async fn loss(&self) -> Result<LossRecord, String> {
        loop {
            match self.read_change().await {
                Ok(ShardChange::Loss(loss)) => return Ok(loss),
                Ok(ShardChange::Changed) => {
                    let why = "the shard's record was changed concurrently: check `dkc status`";
                    return Err(why.to_owned());
                }
                // etcd may answer again before the time limit.
                Ok(ShardChange::Same) | Err(metastore::Error::NoAnswer(..)) => {}
                Err(error) => return Err(error.to_string()),
            }
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }

    async fn read_change(&self) -> Result<ShardChange, metastore::Error> {
        let shard = self.config.shard();
        let current = self.metastore.get::<ShardRecord>(&shard).await?;
        if current.is_some_and(|kept| kept.record.version == self.config.version) {
            return Ok(ShardChange::Same);
        }
        // A loss record is written in one transaction with the shard's record, so it exists by now.
        let epoch = Epoch(self.config.epoch.0 + 1);
        let loss = self.metastore.get::<LossRecord>(&(shard, epoch)).await?;
        Ok(loss.map_or(ShardChange::Changed, |kept| ShardChange::Loss(kept.record)))
    }

    /// Withdraws the intent, so that it cannot be carried out any more. Returns false if etcd did
    /// not confirm that in time.
    async fn withdraw(&self, slot: u64) -> bool {
        let withdrawn = async {
            while !self.is_withdrawn(slot).await.unwrap_or(false) {
                tokio::time::sleep(POLL_INTERVAL).await;
            }
        };
        tokio::time::timeout(WITHDRAW_WITHIN, withdrawn).await.is_ok()
    }

    /// Deletes the intent, or the value that it was to replace. Returns true if the intent does not
    /// exist and never will, since the value of revision `slot` is gone, too.
    async fn is_withdrawn(&self, slot: u64) -> Result<bool, metastore::Error> {
        let shard = self.config.shard();
        let Some(kept) = self.metastore.get::<PromoteIntent>(&shard).await? else {
            return Ok(true);
        };
        if kept.record != self.intent && kept.modified != slot {
            // Another request replaced it.
            return Ok(true);
        }
        let deleted = self.metastore.delete::<PromoteIntent>(&shard, kept.modified).await?;
        Ok(matches!(deleted, CasOutcome::Done { .. }))
    }
}

/// Returns the exit code for this loss record, and a remark if the record is not that of this
/// request.
fn verdict(
    intent: &PromoteIntent,
    loss: &LossRecord,
    recorded: &PromoteReport,
    wanted: &str,
) -> (CommandExit, Option<String>) {
    let PromoteReport { epoch, primary, by, .. } = recorded;
    if loss.primary.store != intent.store {
        let remark = format!(
            "error: epoch {epoch} began with the copy of {primary}, not of {wanted}: \
             this request was not carried out"
        );
        return (CommandExit::Failed, Some(remark));
    }
    let remark = match by {
        _ if loss.accepted_by.as_ref() == Some(&intent.from) => return (CommandExit::Done, None),
        Some(by) => format!("a request of {by} was carried out: this one was not needed"),
        None => {
            "the coordinator promoted the copy by itself: this request was not needed".to_owned()
        }
    };
    (CommandExit::Done, Some(remark))
}

#[cfg(test)]
mod tests {
    use engine::ids::{Boot, Slots, StoreBoot, TimeMs};
    use engine::message::DigestPoint;
    use engine::records::{Operator, StoreStatus};

    use super::*;

    fn kept<I, R>(id: I, record: R) -> Revisioned<R>
    where
        R: metastore::EtcdRecord<Id = I>,
    {
        Revisioned { id, record, created: 1, modified: 1, lease: 0 }
    }

    fn view() -> ShardContext {
        let store = |id: u128, name: &str, status| {
            let record = StoreRecord {
                name: name.into(),
                address: "a:1".into(),
                zone: String::new(),
                host: String::new(),
                boot: Boot(1),
                nonce: 1,
                status,
            };
            kept(StoreId(id), record)
        };
        let node = |id: u128| {
            let record =
                NodeRecord { boot: Boot(1), address: "a:1".into(), capacity: 1, versions: (1, 1) };
            kept(StoreId(id), record)
        };
        let config = ShardRecord {
            slots: Slots { lo: 5, hi: 9 },
            epoch: Epoch(4),
            version: Version(9),
            primary: StoreBoot { store: StoreId(1), boot: Boot(1) },
            isr: vec![StoreId(1), StoreId(2), StoreId(3)],
            tainted: vec![StoreId(3)],
            ..ShardRecord::default()
        };
        ShardContext {
            cluster: 1,
            record: kept(ShardId(5), config),
            stores: vec![
                store(1, "a", StoreStatus::Active),
                store(2, "b", StoreStatus::Active),
                store(3, "c", StoreStatus::Active),
                store(9, "b", StoreStatus::Lost),
            ],
            nodes: vec![node(2), node(9)],
        }
    }

    fn copy(last: u64, applied: u64, role: RoleStatus) -> ReplicaStatus {
        ReplicaStatus {
            shard: ShardId(5),
            promised: Epoch(4),
            last: Seq(last),
            applied: Seq(applied),
            digest: DigestPoint::default(),
            role,
            stopped: None,
        }
    }

    #[test]
    fn a_loss_is_shown_and_must_be_confirmed() {
        let copies = vec![
            (StoreId(1), false, None),
            (StoreId(2), true, Some(copy(20, 18, RoleStatus::Follower))),
            (StoreId(3), false, None),
        ];
        let report = view().report(StoreId(2), &copies);
        assert_eq!((report.last, report.epoch, report.primary.as_str()), (20, 5, "b"));
        let known: Vec<_> =
            report.given_up.iter().map(|one| (one.node.as_str(), one.last)).collect();
        // The position of a tainted copy is not known.
        assert_eq!(known, [("a", Some(18)), ("c", None)]);
        for (typed, confirmed) in [("5 b\n", true), ("yes\n", false), ("5\n", false), ("", false)] {
            let answer = report.is_confirmed(&mut typed.as_bytes());
            assert_eq!(answer.ok(), Some(confirmed), "{typed:?}");
        }
    }

    #[test]
    fn a_name_denotes_the_running_store_that_is_not_gone() {
        assert_eq!(view().running("b"), Some(StoreId(2)));
        assert_eq!(view().running("a"), None);
        assert_eq!(view().running(&StoreId(2).to_string()), Some(StoreId(2)));
    }

    fn request() -> PromoteIntent {
        let from = Operator { at: TimeMs(7), name: "me@here".into() };
        PromoteIntent { store: StoreId(2), version: Version(9), from }
    }

    #[track_caller]
    fn check_verdict(store: u128, by: Option<Operator>, exit: CommandExit, remark: Option<&str>) {
        let before = view().report(StoreId(2), &vec![(StoreId(3), true, None)]);
        let loss = LossRecord {
            shard: ShardId(5),
            epoch: Epoch(5),
            primary: StoreBoot { store: StoreId(store), boot: Boot(1) },
            last: (Epoch(4), Seq(20)),
            given_up: vec![(StoreId(1), Some(Seq(18))), (StoreId(3), None)],
            accepted_by: by,
        };
        let report = view().recorded(&loss, &before);
        let given_up: Vec<_> =
            report.given_up.iter().map(|it| (it.node.as_str(), it.answers, it.last)).collect();
        assert_eq!(given_up, [("a", false, Some(18)), ("c", true, None)]);
        assert_eq!((report.epoch, report.last), (5, 20));
        let (got, printed) = verdict(&request(), &loss, &report, "b");
        assert_eq!(got, exit);
        assert_eq!(printed.is_some(), remark.is_some(), "{printed:?}");
        let printed = printed.unwrap_or_default();
        assert!(printed.contains(remark.unwrap_or_default()), "{printed}");
    }

    #[test]
    fn only_the_loss_that_was_asked_for_is_a_success() {
        let mine = request().from;
        let other = Operator { name: "other@there".into(), ..mine.clone() };
        check_verdict(2, Some(mine.clone()), CommandExit::Done, None);
        check_verdict(2, Some(other.clone()), CommandExit::Done, Some("other@there"));
        check_verdict(2, None, CommandExit::Done, Some("by itself"));
        for by in [Some(mine), Some(other), None] {
            check_verdict(1, by, CommandExit::Failed, Some("copy of a, not of b"));
        }
    }

    #[test]
    fn the_wait_is_limited() {
        let parses = |wait: &str| {
            let command = <Promote as clap::Args>::augment_args(clap::Command::new("promote"));
            let given = ["promote", "5", "b", "--accept-loss", "--wait", wait];
            command.try_get_matches_from(given).is_ok()
        };
        assert!(parses("1") && parses("86400"));
        for wrong in ["0", "86401", "18446744073709551615"] {
            assert!(!parses(wrong), "{wrong}");
        }
    }

    #[test]
    fn a_shard_with_a_primary_needs_no_promotion() {
        let role = |epoch| RoleStatus::Primary {
            epoch: Epoch(epoch),
            open: false,
            hindered_by: vec![],
            records: Default::default(),
        };
        let led = |epoch| vec![(StoreId(2), true, Some(copy(1, 1, role(epoch))))];
        assert_eq!(view().leader(&led(4)), Some("b".to_owned()));
        assert_eq!(view().leader(&led(3)), None);
    }
}
