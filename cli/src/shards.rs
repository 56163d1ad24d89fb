//! `dkc shards promote SHARD NODE --accept-loss`: has a shard led by a copy that may lack what was acknowledged.
//!
//! For a shard whose good copies are gone for good. The coordinator waits for them without end, since only a person can
//! know that they will not return. The command says what is given up, asks, and writes an intent into etcd that is good for
//! the record it was decided on and no other. The leading coordinator obeys it, if no copy may lead by itself, and leaves a
//! record of the loss for good. An intent that is not obeyed is withdrawn, however the waiting ends: it must not be
//! obeyed hours later.

use std::io::{self, BufRead, IsTerminal};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, bail};
use engine::config::ShardConfig;
use engine::ids::{Epoch, Seq, ShardId, StoreId, TimeMs, Version};
use engine::message::{NodeQuery, NodeQueryReply, ReplicaStatus, RoleStatus};
use engine::records::{LossRecord, Meta, NodeRecord, Operator, PromoteIntent, StoreRecord};
use metastore::{Candidate, Kept, Metastore, Outcome};
use serde::Serialize;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::Instant;

use crate::etcd::{EtcdArgs, is_meant};
use crate::exit::Exit;
use crate::output;

const LOOK_EVERY: Duration = Duration::from_millis(200);
/// A node that says nothing for so long does not answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);
/// How long etcd is asked to end an intent: a few tries, if each call runs into its time limit.
const WITHDRAW_WITHIN: Duration = Duration::from_secs(10);
/// No shard's record has this version (the first has 1), so an intent with it means nothing.
const OF_NO_RECORD: Version = Version(0);

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Have a shard led by the copy of this node, although acknowledged increments may be missing in it
    Promote(Promote),
}

#[derive(Debug, clap::Args)]
struct Promote {
    /// The shard's id, as in `dkc status`
    shard: u16,
    /// The node's name, or its store's uuid
    node: String,
    /// What the other copies hold and this one does not is given up, for good
    #[arg(long, required = true)]
    accept_loss: bool,
    /// Don't ask
    #[arg(long)]
    yes: bool,
    /// Seconds to wait for the coordinator; then the request is withdrawn
    #[arg(
        long,
        value_name = "SECONDS",
        default_value_t = 30,
        value_parser = clap::value_parser!(u64).range(1..=86_400)
    )]
    wait: u64,
    #[command(flatten)]
    etcd: EtcdArgs,
    /// Print the result as one line of JSON
    #[arg(long)]
    json: bool,
}

/// What was given up, or would be.
#[derive(Debug, Serialize)]
struct Report {
    shard: u16,
    epoch: u64,
    primary: String,
    uuid: String,
    /// Where the log of its copy ends.
    last: u64,
    given_up: Vec<GivenUp>,
    /// The operator whom the record names. None: it is not written yet, or it needed none since all
    /// copies were damaged.
    by: Option<String>,
}

#[derive(Debug, Serialize)]
struct GivenUp {
    node: String,
    uuid: String,
    answers: bool,
    /// The highest position that it is known to hold. None: nothing is known of it.
    last: Option<u64>,
}

pub(crate) async fn run(args: Args) -> anyhow::Result<Exit> {
    let Command::Promote(args) = args.command;
    if !args.yes && !io::stdin().is_terminal() {
        output::note(
            "error: the input is no terminal, so there is nothing to confirm on: add --yes",
        );
        return Ok(Exit::Usage);
    }
    let metastore = args.etcd.connect().await?;
    let Some(meta) = metastore.get::<Meta>(&()).await? else {
        bail!("no cluster {:?}", args.etcd.cluster)
    };
    let shard = ShardId(args.shard);
    let Some(record) = metastore.get::<ShardConfig>(&shard).await? else {
        output::note(&format!("error: no shard {shard}: `dkc status --all` names them"));
        return Ok(Exit::Usage);
    };
    let view = View::read(&metastore, meta.record.cluster, record).await?;
    let Some(store) = view.running(&args.node) else {
        output::note(&format!("error: no node {:?} runs", args.node));
        return Ok(Exit::Usage);
    };
    if metastore.get::<Candidate>(&()).await?.is_none() {
        output::note(
            "error: no coordinator leads, and only one can do it: start one. Nothing was written",
        );
        return Ok(Exit::Failed);
    }
    let copies = view.copies(store).await;
    if let Some(leader) = view.leader(&copies) {
        output::note(&format!(
            "error: shard {shard} is led by {leader}: nothing needs to be given up"
        ));
        return Ok(Exit::Failed);
    }
    let report = view.report(store, &copies);
    report.warn();
    if !args.yes && !report.is_confirmed(&mut io::stdin().lock())? {
        output::note("not confirmed: nothing was written");
        return Ok(Exit::Failed);
    }
    let config = view.record.record.clone();
    let request = Request::new(metastore, config, store);
    match request.carried_out(Duration::from_secs(args.wait)).await? {
        Ended::Recorded(loss) => {
            let report = view.recorded(&loss, &report);
            match args.json {
                true => output::json(&report)?,
                false => output::result(&report.sentence())?,
            }
            let (exit, remark) = verdict(&request.intent, &loss, &report, &view.name(store));
            if let Some(remark) = remark {
                output::note(&remark);
            }
            Ok(exit)
        }
        Ended::Refused(why) => {
            output::note(&format!("error: {why}. Nothing was given up"));
            Ok(Exit::Failed)
        }
        Ended::Unknown(why) => {
            output::note(&format!(
                "unknown: {why}. `dkc status` shows under \"led with a loss\" what came of it"
            ));
            Ok(Exit::Unknown)
        }
    }
}

/// The shard and its surroundings, as etcd has them.
struct View {
    cluster: u128,
    record: Kept<ShardConfig>,
    stores: Vec<Kept<StoreRecord>>,
    nodes: Vec<Kept<NodeRecord>>,
}

/// What a store says of its copy. None: it does not answer, or holds none.
type Copies = Vec<(StoreId, bool, Option<ReplicaStatus>)>;

impl View {
    async fn read(
        metastore: &Metastore,
        cluster: u128,
        record: Kept<ShardConfig>,
    ) -> anyhow::Result<Self> {
        let stores = metastore.list::<StoreRecord>().await?.all;
        let nodes = metastore.list::<NodeRecord>().await?.all;
        Ok(Self { cluster, record, stores, nodes })
    }

    /// The store of this name or uuid that runs.
    fn running(&self, node: &str) -> Option<StoreId> {
        let runs = |store| self.nodes.iter().any(|node| node.id == store);
        let found = self.stores.iter().find(|kept| runs(kept.id) && is_meant(kept, node));
        found.map(|kept| kept.id)
    }

    fn name(&self, store: StoreId) -> String {
        let kept = self.stores.iter().find(|kept| kept.id == store);
        kept.map_or_else(|| store.to_string(), |kept| kept.record.name.clone())
    }

    /// Asks the members of the in-sync set and the one that is to lead.
    async fn copies(&self, to: StoreId) -> Copies {
        let isr = &self.record.record.isr;
        let mut copies = Vec::new();
        for &store in isr.iter().chain([&to].into_iter().filter(|to| !isr.contains(to))) {
            let said = self.ask(store).await;
            copies.push((store, said.is_some(), said.flatten()));
        }
        copies
    }

    /// None: it does not answer. Then: what it holds of the shard.
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

    /// Who leads the shard, if that is so.
    fn leader(&self, copies: &Copies) -> Option<String> {
        let config = &self.record.record;
        let leads = |copy: &ReplicaStatus| matches!(copy.role, RoleStatus::Primary { epoch, .. } if epoch == config.epoch);
        let leader = copies.iter().find(|(_, _, copy)| copy.as_ref().is_some_and(leads))?;
        Some(self.name(leader.0))
    }

    fn report(&self, to: StoreId, copies: &Copies) -> Report {
        let config = &self.record.record;
        let last = |store: StoreId| {
            let copy = copies.iter().find(|(other, ..)| *other == store)?.2.as_ref()?;
            Some(copy.last)
        };
        // What is applied anywhere is committed, and every member that is trusted holds all that is.
        let committed = copies.iter().filter_map(|(_, _, copy)| Some(copy.as_ref()?.applied)).max();
        let given_up = |&store: &StoreId| {
            let trusted = !config.tainted.contains(&store);
            let known = last(store).max(committed.filter(|_| trusted));
            GivenUp {
                node: self.name(store),
                uuid: store.to_string(),
                answers: copies.iter().any(|(other, answers, _)| *other == store && *answers),
                last: known.filter(|&seq| seq > Seq(0)).map(|seq| seq.0),
            }
        };
        Report {
            shard: config.shard().0,
            epoch: config.epoch.0 + 1,
            primary: self.name(to),
            uuid: to.to_string(),
            last: last(to).unwrap_or_default().0,
            given_up: config.isr.iter().filter(|&&store| store != to).map(given_up).collect(),
            by: None,
        }
    }

    /// What the record says. Whether a node answers is as it was `before`.
    fn recorded(&self, loss: &LossRecord, before: &Report) -> Report {
        let given_up = |&(store, last): &(StoreId, Option<Seq>)| {
            let uuid = store.to_string();
            let answers = before.given_up.iter().any(|one| one.uuid == uuid && one.answers);
            GivenUp { node: self.name(store), uuid, answers, last: last.map(|seq| seq.0) }
        };
        Report {
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

impl Report {
    /// What is about to be done, before it is.
    fn warn(&self) {
        let Self { shard, primary, uuid, last, given_up, .. } = self;
        output::note(&format!(
            "shard {shard} is to be led by {primary} (store {uuid}), whose log of it ends at {last}."
        ));
        output::note(
            "What these copies hold beyond that is given up, and is overwritten if they return:",
        );
        for GivenUp { node, uuid, answers, last } in given_up {
            let answers = if *answers { "answers" } else { "does not answer" };
            let last = last.map_or("nothing is known of it".to_owned(), |last| {
                format!("known to hold all up to {last}")
            });
            output::note(&format!("  {node} (store {uuid}): {answers}, {last}"));
        }
    }

    /// The shard and the node were typed, in one line.
    fn is_confirmed(&self, from: &mut impl BufRead) -> io::Result<bool> {
        let wanted = format!("{} {}", self.shard, self.primary);
        output::note(&format!("To go on, type the shard and the node: {wanted}"));
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
            "shard {shard} is led by {primary} in epoch {epoch}, from position {last} on; \
             given up: {}; {by}",
            names.join(", ")
        )
    }
}

/// An intent on its way through etcd.
struct Request {
    metastore: Metastore,
    config: ShardConfig,
    intent: PromoteIntent,
}

#[derive(Debug)]
enum Ended {
    /// The shard's next epoch began with a loss: with this one's or with another.
    Recorded(LossRecord),
    /// It was not obeyed, and can't be any more.
    Refused(String),
    /// It may be obeyed yet.
    Unknown(String),
}

/// What etcd holds of the shard.
enum Seen {
    /// The record that the intent was decided on.
    Same,
    /// Another record, which did not begin with a loss: the intent means nothing any more.
    Changed,
    Loss(LossRecord),
}

impl Request {
    fn new(metastore: Metastore, config: ShardConfig, store: StoreId) -> Self {
        let at = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let at = TimeMs(u64::try_from(at.as_millis()).unwrap_or(u64::MAX));
        let from = Operator { at, name: operator() };
        let intent = PromoteIntent { store, version: config.version, from };
        Self { metastore, config, intent }
    }

    /// Writes the intent and waits until it is obeyed, for so long at most. An error means that it
    /// was not written.
    async fn carried_out(&self, wait: Duration) -> anyhow::Result<Ended> {
        let until = Instant::now().checked_add(wait).context("--wait is too long")?;
        let mut signals = Signals::catch()?;
        let Some(slot) = self.slot().await? else {
            let why = "another request came at the same time, or etcd's answer was lost";
            return Ok(Ended::Refused(why.to_owned()));
        };
        let shard = self.config.shard();
        // Whatever comes from here on, the intent does not stay behind.
        let ended = match self.metastore.replace(&shard, &self.intent, slot).await {
            Ok(Outcome::Done { .. }) => self.obeyed(until, &mut signals).await,
            Ok(Outcome::Failed) => Err("another request came at the same time".to_owned()),
            Ok(Outcome::Unknown) => Err("etcd's answer to the request was lost".to_owned()),
            Err(error) => Err(error.to_string()),
        };
        let withdrawn = self.withdraw(slot).await;
        Ok(match ended {
            Ok(loss) => Ended::Recorded(loss),
            Err(why) if !withdrawn => Ended::Unknown(format!(
                "{why}, and etcd did not confirm that the request is withdrawn: \
                 it may be obeyed yet"
            )),
            // It may have been obeyed just before it was to be withdrawn.
            Err(why) => match self.look().await {
                Ok(Seen::Loss(loss)) => Ended::Recorded(loss),
                Ok(Seen::Same | Seen::Changed) => {
                    Ended::Refused(format!("{why}; the request is withdrawn"))
                }
                Err(error) => Ended::Unknown(format!(
                    "{why}; the request stands no more, but it may have been obeyed: {error}"
                )),
            },
        })
    }

    /// The revision of the shard's key for intents, which is made if there is none. The intent then
    /// replaces what has this revision. If etcd's answer to that is lost, deleting the key at the
    /// same revision rules out that the intent is written later.
    async fn slot(&self) -> Result<Option<u64>, metastore::Error> {
        let shard = self.config.shard();
        if let Some(kept) = self.metastore.get::<PromoteIntent>(&shard).await? {
            return Ok(Some(kept.modified));
        }
        let without_meaning = PromoteIntent { version: OF_NO_RECORD, ..self.intent.clone() };
        Ok(match self.metastore.create(&shard, &without_meaning).await? {
            Outcome::Done { revision } => Some(revision),
            Outcome::Failed | Outcome::Unknown => None,
        })
    }

    /// The loss that the shard's next epoch begins with, or why it is not waited for any more.
    async fn obeyed(&self, until: Instant, signals: &mut Signals) -> Result<LossRecord, String> {
        tokio::select! {
            loss = self.loss() => loss,
            () = signals.next() => {
                output::note("stopping: the request is being withdrawn");
                Err("interrupted".to_owned())
            }
            () = tokio::time::sleep_until(until) => {
                Err("the coordinator did not do it in time, and its log says why".to_owned())
            }
        }
    }

    async fn loss(&self) -> Result<LossRecord, String> {
        loop {
            match self.look().await {
                Ok(Seen::Loss(loss)) => return Ok(loss),
                Ok(Seen::Changed) => {
                    let why = "the shard's record changed meanwhile: look at `dkc status`";
                    return Err(why.to_owned());
                }
                // etcd may answer again in time.
                Ok(Seen::Same) | Err(metastore::Error::NoAnswer { .. }) => {}
                Err(error) => return Err(error.to_string()),
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    async fn look(&self) -> Result<Seen, metastore::Error> {
        let shard = self.config.shard();
        let stands = self.metastore.get::<ShardConfig>(&shard).await?;
        if stands.is_some_and(|kept| kept.record.version == self.config.version) {
            return Ok(Seen::Same);
        }
        // The record of a loss is written in one transaction with the shard's: it is there by now.
        let epoch = Epoch(self.config.epoch.0 + 1);
        let loss = self.metastore.get::<LossRecord>(&(shard, epoch)).await?;
        Ok(loss.map_or(Seen::Changed, |kept| Seen::Loss(kept.record)))
    }

    /// Ends the intent, so that it can't be obeyed any more. False: etcd did not confirm that in
    /// time.
    async fn withdraw(&self, slot: u64) -> bool {
        let withdrawn = async {
            while !self.is_withdrawn(slot).await.unwrap_or(false) {
                tokio::time::sleep(LOOK_EVERY).await;
            }
        };
        tokio::time::timeout(WITHDRAW_WITHIN, withdrawn).await.is_ok()
    }

    /// Deletes the intent, or what it was to replace. True: it does not stand and never will, since
    /// `slot` is gone too.
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
        Ok(matches!(deleted, Outcome::Done { .. }))
    }
}

/// How the command ends with this loss on record, and what its operator must know about that.
fn verdict(
    intent: &PromoteIntent,
    loss: &LossRecord,
    recorded: &Report,
    wanted: &str,
) -> (Exit, Option<String>) {
    let Report { epoch, primary, by, .. } = recorded;
    if loss.primary.store != intent.store {
        let remark = format!(
            "error: epoch {epoch} began with the copy of {primary}, not of {wanted}: \
             this request was not obeyed"
        );
        return (Exit::Failed, Some(remark));
    }
    let remark = match by {
        _ if loss.accepted_by.as_ref() == Some(&intent.from) => return (Exit::Done, None),
        Some(by) => format!("it was done for another request, of {by}: this one was not needed"),
        None => "the coordinator did it by itself: this request was not needed".to_owned(),
    };
    (Exit::Done, Some(remark))
}

/// What ends a process that waits. Once they are caught, none of them ends it by itself.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
    hangup: Signal,
}

impl Signals {
    fn catch() -> io::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            hangup: signal(SignalKind::hangup())?,
        })
    }

    /// Waits for one of them.
    async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
            _ = self.hangup.recv() => {}
        }
    }
}

/// Who gives this command, for people to read later.
fn operator() -> String {
    let user = ["USER", "LOGNAME"].iter().find_map(|name| std::env::var(name).ok());
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    format!("{}@{}", user.unwrap_or_else(|| "unknown".to_owned()), host.trim())
}

#[cfg(test)]
mod tests {
    use engine::ids::{Boot, Slots, StoreBoot};
    use engine::message::DigestPoint;
    use engine::records::StoreStatus;

    use super::*;

    fn kept<I, R>(id: I, record: R) -> Kept<R>
    where
        R: metastore::Record<Id = I>,
    {
        Kept { id, record, created: 1, modified: 1, lease: 0 }
    }

    fn view() -> View {
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
        let config = ShardConfig {
            slots: Slots { lo: 5, hi: 9 },
            epoch: Epoch(4),
            version: Version(9),
            primary: StoreBoot { store: StoreId(1), boot: Boot(1) },
            isr: vec![StoreId(1), StoreId(2), StoreId(3)],
            tainted: vec![StoreId(3)],
            ..ShardConfig::default()
        };
        View {
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
    fn what_is_given_up_is_said_and_must_be_confirmed() {
        let copies = vec![
            (StoreId(1), false, None),
            (StoreId(2), true, Some(copy(20, 18, RoleStatus::Follower))),
            (StoreId(3), false, None),
        ];
        let report = view().report(StoreId(2), &copies);
        assert_eq!((report.last, report.epoch, report.primary.as_str()), (20, 5, "b"));
        let known: Vec<_> =
            report.given_up.iter().map(|one| (one.node.as_str(), one.last)).collect();
        // What a tainted one holds is not known.
        assert_eq!(known, [("a", Some(18)), ("c", None)]);
        for (typed, confirmed) in [("5 b\n", true), ("yes\n", false), ("5\n", false), ("", false)] {
            let said = report.is_confirmed(&mut typed.as_bytes());
            assert_eq!(said.ok(), Some(confirmed), "{typed:?}");
        }
    }

    #[test]
    fn a_name_means_the_store_that_runs_and_stands() {
        assert_eq!(view().running("b"), Some(StoreId(2)));
        assert_eq!(view().running("a"), None);
        assert_eq!(view().running(&StoreId(2).to_string()), Some(StoreId(2)));
    }

    fn request() -> PromoteIntent {
        let from = Operator { at: TimeMs(7), name: "me@here".into() };
        PromoteIntent { store: StoreId(2), version: Version(9), from }
    }

    #[track_caller]
    fn check_verdict(store: u128, by: Option<Operator>, exit: Exit, remark: Option<&str>) {
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
        let (got, said) = verdict(&request(), &loss, &report, "b");
        assert_eq!(got, exit);
        assert_eq!(said.is_some(), remark.is_some(), "{said:?}");
        let said = said.unwrap_or_default();
        assert!(said.contains(remark.unwrap_or_default()), "{said}");
    }

    #[test]
    fn only_the_loss_that_was_asked_for_is_a_success() {
        let mine = request().from;
        let other = Operator { name: "other@there".into(), ..mine.clone() };
        check_verdict(2, Some(mine.clone()), Exit::Done, None);
        check_verdict(2, Some(other.clone()), Exit::Done, Some("other@there"));
        check_verdict(2, None, Exit::Done, Some("by itself"));
        for by in [Some(mine), Some(other), None] {
            check_verdict(1, by, Exit::Failed, Some("copy of a, not of b"));
        }
    }

    #[test]
    fn the_waiting_has_an_end() {
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
    fn a_shard_that_is_led_needs_nothing_given_up() {
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
