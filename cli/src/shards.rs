//! `dkc shards promote SHARD NODE --accept-loss`: has a shard led by a copy that may lack what was acknowledged.
//!
//! For a shard whose good copies are gone for good. The coordinator waits for them without end, since only a person can
//! know that they will not return. The command says what is given up, asks, and writes an intent into etcd that is good for
//! the record it was decided on and no other. The leading coordinator obeys it, if no copy may lead by itself, and leaves a
//! record of the loss for good. An intent that is not obeyed in time is withdrawn: it must not be obeyed hours later.

use std::io::{self, BufRead, IsTerminal};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::bail;
use engine::config::ShardConfig;
use engine::ids::{Epoch, Seq, ShardId, StoreId, TimeMs};
use engine::message::{NodeQuery, NodeQueryReply, ReplicaStatus, RoleStatus};
use engine::records::{LossRecord, Meta, NodeRecord, Operator, PromoteIntent, StoreRecord};
use metastore::{Candidate, Kept, Metastore, Outcome};
use serde::Serialize;

use crate::etcd::EtcdArgs;
use crate::exit::Exit;
use crate::output;

const LOOK_EVERY: Duration = Duration::from_millis(200);
/// A node that says nothing for so long does not answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);

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
    /// Seconds to wait for the coordinator; then the wish is withdrawn
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
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
    let wish = Wish { metastore, config: view.record.record.clone(), store };
    match wish.fulfilled(Duration::from_secs(args.wait)).await? {
        Ended::Accepted(loss) => {
            let report = Report { epoch: loss.epoch.0, last: loss.last.1.0, ..report };
            match args.json {
                true => output::json(&report)?,
                false => output::result(&report.sentence())?,
            }
            Ok(Exit::Done)
        }
        Ended::Refused(why) => {
            output::note(&format!("error: {why}. Nothing was given up"));
            Ok(Exit::Failed)
        }
        Ended::Unknown => {
            output::note(
                "unknown: etcd's answer was lost. `dkc status` shows under \"led with a loss\" what came of it",
            );
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
        let means = |kept: &&Kept<StoreRecord>| {
            let runs = self.nodes.iter().any(|node| node.id == kept.id);
            let named = kept.record.name == node || kept.id.to_string() == node;
            runs && named && !kept.record.status.is_gone()
        };
        self.stores.iter().find(means).map(|kept| kept.id)
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
        let Self { shard, epoch, primary, last, given_up, .. } = self;
        let names: Vec<&str> = given_up.iter().map(|one| one.node.as_str()).collect();
        format!(
            "shard {shard} is led by {primary} in epoch {epoch}, from position {last} on; given up: {}",
            names.join(", ")
        )
    }
}

/// A wish on its way.
struct Wish {
    metastore: Metastore,
    config: ShardConfig,
    store: StoreId,
}

enum Ended {
    Accepted(LossRecord),
    Refused(&'static str),
    Unknown,
}

impl Wish {
    async fn fulfilled(&self, wait: Duration) -> anyhow::Result<Ended> {
        let shard = self.config.shard();
        let at = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let intent = PromoteIntent {
            store: self.store,
            version: self.config.version,
            from: Operator {
                at: TimeMs(u64::try_from(at.as_millis()).unwrap_or(u64::MAX)),
                name: operator(),
            },
        };
        let before = self.metastore.get::<PromoteIntent>(&shard).await?;
        let written = match &before {
            Some(kept) => self.metastore.replace(&shard, &intent, kept.modified).await?,
            None => self.metastore.create(&shard, &intent).await?,
        };
        let modified = match written {
            Outcome::Done { revision } => revision,
            Outcome::Failed => {
                return Ok(Ended::Refused("another such wish came at the same time"));
            }
            Outcome::Unknown => return Ok(Ended::Unknown),
        };
        let until = tokio::time::Instant::now() + wait;
        loop {
            if let Some(ended) = self.look().await? {
                // Obeyed, or decided on a record that stands no more.
                if matches!(ended, Ended::Refused(_)) {
                    let _without_effect = self.withdraw(modified).await?;
                }
                return Ok(ended);
            }
            if tokio::time::Instant::now() >= until {
                return self.withdraw(modified).await;
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    async fn look(&self) -> anyhow::Result<Option<Ended>> {
        let shard = self.config.shard();
        let epoch = Epoch(self.config.epoch.0 + 1);
        if let Some(loss) = self.metastore.get::<LossRecord>(&(shard, epoch)).await? {
            return Ok(Some(Ended::Accepted(loss.record)));
        }
        let stands = self.metastore.get::<ShardConfig>(&shard).await?;
        let moved = stands.is_none_or(|kept| kept.record.version != self.config.version);
        // The record of a loss is written with the shard's: it would be there by now.
        Ok(match moved {
            true => match self.metastore.get::<LossRecord>(&(shard, epoch)).await? {
                Some(loss) => Some(Ended::Accepted(loss.record)),
                None => Some(Ended::Refused(
                    "the shard's record changed meanwhile: look at `dkc status`",
                )),
            },
            false => None,
        })
    }

    async fn withdraw(&self, modified: u64) -> anyhow::Result<Ended> {
        let shard = self.config.shard();
        match self.metastore.delete::<PromoteIntent>(&shard, modified).await? {
            Outcome::Done { .. } => Ok(Ended::Refused(
                "the coordinator did not do it in time, and its log says why; the wish is withdrawn",
            )),
            Outcome::Failed => Ok(self.look().await?.unwrap_or(Ended::Unknown)),
            Outcome::Unknown => Ok(Ended::Unknown),
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
    use engine::ids::{Boot, Slots, StoreBoot, Version};
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
