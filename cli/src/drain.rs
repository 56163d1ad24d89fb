//! `dkc drain NODE`: empties a node, so that its machine may be switched off.
//!
//! It writes an operator's intent into etcd and watches what comes of it: the leading coordinator hands the node's shards
//! over and moves its copies, each only once its replacement is in sync. The intent stands whether this command goes on
//! watching or not, until `--undo` takes it back.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::bail;
use engine::config::ShardConfig;
use engine::ids::StoreId;
use engine::records::{Meta, NodeRecord, StoreRecord, StoreStatus};
use metastore::{DrainIntent, Kept, Metastore, Outcome};
use serde::Serialize;

use crate::etcd::{EtcdArgs, is_meant};
use crate::exit::Exit;
use crate::output;

const LOOK_EVERY: Duration = Duration::from_millis(500);

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The node's name, or its store's uuid
    node: String,
    /// Take it back: the node is given shards again
    #[arg(long)]
    undo: bool,
    /// Don't wait until the node is empty
    #[arg(long, conflicts_with = "undo")]
    no_wait: bool,
    #[command(flatten)]
    etcd: EtcdArgs,
    /// Print the result as one line of JSON
    #[arg(long)]
    json: bool,
}

/// What stands at the end of the command.
#[derive(Debug, Serialize)]
struct Report {
    node: String,
    uuid: String,
    draining: bool,
    /// Shards that it leads, and copies that it holds.
    leads: usize,
    copies: usize,
}

pub(crate) async fn run(args: Args) -> anyhow::Result<Exit> {
    let metastore = args.etcd.connect().await?;
    let stores = metastore.list::<StoreRecord>().await?.all;
    let store = match named(&stores, &args.node)[..] {
        [store] => store,
        [] => {
            let known: Vec<&str> = stores.iter().map(|kept| kept.record.name.as_str()).collect();
            let known = known.join(" ");
            output::note(&format!("error: no node {:?}; there are: {known}", args.node));
            return Ok(Exit::Usage);
        }
        ref several => {
            let uuids: Vec<String> = several.iter().map(|kept| kept.id.to_string()).collect();
            let (name, uuids) = (&args.node, uuids.join(", "));
            output::note(&format!(
                "error: {name:?} is more than one store: name it by its uuid, {uuids}"
            ));
            return Ok(Exit::Usage);
        }
    };
    let node = Node { metastore, store: store.id, name: store.record.name.clone() };
    if args.undo {
        node.undo().await?;
    } else {
        node.drain().await?;
        if !args.no_wait {
            node.until_empty().await?;
        }
    }
    let (leads, copies) = node.holds().await?;
    let uuid = node.store.to_string();
    let report = Report { node: node.name, uuid, draining: !args.undo, leads, copies };
    if args.json {
        output::json(&report)?
    } else {
        output::result(&report.sentence())?
    }
    Ok(Exit::Done)
}

/// The stores that this word means.
fn named<'a>(stores: &'a [Kept<StoreRecord>], node: &str) -> Vec<&'a Kept<StoreRecord>> {
    stores.iter().filter(|kept| is_meant(kept, node)).collect()
}

impl Report {
    fn sentence(&self) -> String {
        let Self { node, leads, copies, .. } = self;
        match (self.draining, copies) {
            (false, _) => format!("{node} drains no more: it is given shards again"),
            (true, 0) => format!("{node} is empty: its machine may be switched off"),
            (true, _) => {
                format!("{node} drains: it leads {leads} shards and holds {copies} copies")
            }
        }
    }
}

struct Node {
    metastore: Metastore,
    store: StoreId,
    name: String,
}

impl Node {
    /// Said again it changes nothing.
    async fn drain(&self) -> anyhow::Result<()> {
        match self.metastore.create(&self.store, &DrainIntent).await? {
            Outcome::Done { .. } | Outcome::Failed => Ok(()),
            Outcome::Unknown => bail!("etcd's answer was lost: say it again"),
        }
    }

    async fn undo(&self) -> anyhow::Result<()> {
        let Some(intent) = self.metastore.get::<DrainIntent>(&self.store).await? else {
            return Ok(());
        };
        let gone = self.metastore.delete::<DrainIntent>(&self.store, intent.modified).await?;
        match gone {
            Outcome::Done { .. } => Ok(()),
            Outcome::Failed | Outcome::Unknown => {
                bail!("the intent has changed meanwhile: say it again")
            }
        }
    }

    async fn until_empty(&self) -> anyhow::Result<()> {
        let mut said = (usize::MAX, usize::MAX);
        let mut warned = false;
        loop {
            let (leads, copies) = self.holds().await?;
            if copies == 0 {
                return Ok(());
            }
            if (leads, copies) != said {
                said = (leads, copies);
                output::note(&format!("{}: leads {leads}, holds {copies}", self.name));
            }
            if !std::mem::replace(&mut warned, true) {
                self.warn_if_there_is_no_room().await?;
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// Shards that it leads, and those that it is to hold a copy of, in sync or not.
    async fn holds(&self) -> anyhow::Result<(usize, usize)> {
        let shards = self.metastore.list::<ShardConfig>().await?.all;
        let leads = shards.iter().filter(|kept| kept.record.primary.store == self.store).count();
        let holds = |kept: &&Kept<ShardConfig>| {
            let shard = &kept.record;
            [&shard.isr, &shard.learners, &shard.target].iter().any(|all| all.contains(&self.store))
        };
        Ok((leads, shards.iter().filter(holds).count()))
    }

    /// Each copy needs a node that has none of the same shard.
    async fn warn_if_there_is_no_room(&self) -> anyhow::Result<()> {
        let Some(meta) = self.metastore.get::<Meta>(&()).await? else { return Ok(()) };
        let stores = self.metastore.list::<StoreRecord>().await?.all;
        let drains = self.metastore.list::<DrainIntent>().await?.all;
        let drains: BTreeSet<StoreId> = drains.iter().map(|kept| kept.id).collect();
        let running = self.metastore.list::<NodeRecord>().await?.all;
        let running: BTreeSet<StoreId> = running.iter().map(|kept| kept.id).collect();
        let takes = |kept: &&Kept<StoreRecord>| {
            kept.record.status == StoreStatus::Active
                && running.contains(&kept.id)
                && !drains.contains(&kept.id)
        };
        let others = stores.iter().filter(takes).count();
        if others < usize::from(meta.record.replicas) {
            output::note(&format!(
                "{others} other nodes can't hold {} copies of each shard: the rest moves once another node joins",
                meta.record.replicas
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use engine::ids::Boot;

    use super::*;

    fn store(id: u128, name: &str, status: StoreStatus) -> Kept<StoreRecord> {
        let record = StoreRecord {
            name: name.into(),
            address: "127.0.0.1:1".into(),
            zone: String::new(),
            host: String::new(),
            boot: Boot(1),
            nonce: 1,
            status,
        };
        Kept { id: StoreId(id), record, created: 1, modified: 1, lease: 0 }
    }

    /// Which of these stores a word means, by number.
    #[track_caller]
    fn check(stores: &[Kept<StoreRecord>], word: &str, want: &[u128]) {
        let meant: Vec<u128> = named(stores, word).iter().map(|kept| kept.id.0).collect();
        assert_eq!(meant, want, "{word}");
    }

    /// A lost store holds nothing. Taken for the one that runs under its name it would look empty at once, and the
    /// machine of the running one would be switched off.
    #[test]
    fn a_name_means_the_store_that_is_not_gone() {
        let uuid = |number: u128| format!("{number:032x}");
        for gone in [StoreStatus::Lost, StoreStatus::LostSuspect, StoreStatus::Retired] {
            for running in [StoreStatus::Active, StoreStatus::Draining, StoreStatus::Suspect] {
                let both = [store(1, "node-2", gone), store(2, "node-2", running)];
                check(&both, "node-2", &[2]);
                let both = [store(1, "node-2", running), store(2, "node-2", gone)];
                check(&both, "node-2", &[1]);
                check(&both, &uuid(1), &[1]);
                check(&both, &uuid(2), &[]);
            }
            check(&[store(1, "node-2", gone)], "node-2", &[]);
        }
        check(&[store(1, "node-2", StoreStatus::Active)], "node-3", &[]);
        // One is away and needed, and another has its name.
        let both = [1, 2].map(|id| store(id, "node-2", StoreStatus::Active));
        check(&both, "node-2", &[1, 2]);
        check(&both, &uuid(2), &[2]);
    }
}
