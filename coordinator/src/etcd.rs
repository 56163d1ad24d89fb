//! What the driver asks of etcd and hears from it.
//!
//! The machine's wishes are calls of one try each: a transaction whose answer was lost is told as unknown and never sent
//! again. The kinds of records that the machine knows are followed from the start, also by a standby, so that a list made after an election
//! and the changes that are heard leave no gap.

use std::time::Duration;

use engine::config::ShardConfig;
use engine::coordinator::{self, Accepted, Change, Event, Listing, Writes};
use engine::node::CasOutcome;
use engine::records::{Meta, NameRecord, NodeRecord, PromoteIntent, StoreRecord};
use metastore::{
    Candidate, DrainIntent, Error, Listed, Metastore, Outcome, Record, Txn, Watch, WatchEvent,
    WatchSettings,
};
use tokio::sync::mpsc;
use tracing::{error, info, warn};

/// What reaches the driver, whoever says it.
#[derive(Debug)]
#[expect(
    clippy::large_enum_variant,
    reason = "nearly every message is an event, and a queue of a thousand is 224 KiB at most"
)]
pub(crate) enum Told {
    Event(Event),
    /// Why etcd is of no use now, in a word; none: it is. Said when it changes.
    Etcd(Option<&'static str>),
    /// etcd's history is shorter than it was.
    WentBack {
        was: u64,
        now: u64,
    },
}

/// How often etcd is asked whether it answers.
const ASK_EVERY: Duration = Duration::from_secs(1);

#[derive(Clone)]
pub(crate) struct Etcd {
    metastore: Metastore,
    told: mpsc::Sender<Told>,
}

impl Etcd {
    pub(crate) fn new(metastore: Metastore, told: mpsc::Sender<Told>) -> Self {
        Self { metastore, told }
    }

    /// Reads everything, beginning now.
    pub(crate) async fn list(self, list: u64) {
        let listing = match self.read_all().await {
            Ok(listing) => Some(listing),
            Err(error) if error.is_transient() => {
                warn!(%error, "records not read");
                None
            }
            Err(error) => {
                error!(%error, "records can't be read: nothing is changed until they can");
                None
            }
        };
        self.tell(Event::Listed { list, listing }).await;
    }

    async fn read_all(&self) -> Result<Listing, Error> {
        let lists = tokio::try_join!(
            self.metastore.list::<Meta>(),
            self.metastore.list::<StoreRecord>(),
            self.metastore.list::<NameRecord>(),
            self.metastore.list::<NodeRecord>(),
            self.metastore.list::<ShardConfig>(),
            self.metastore.list::<DrainIntent>(),
            self.metastore.list::<PromoteIntent>(),
        )?;
        Ok(listing(lists))
    }

    /// One transaction, which compares the term too. Sent once.
    pub(crate) async fn propose(self, proposal: u64, term: u64, writes: Writes) -> CasOutcome {
        let txn = self.metastore.txn().if_created_at::<Candidate>(&(), term);
        let txn = match &writes {
            Writes::Meta(meta) => txn.create(&(), meta),
            Writes::Store { store, expect, record } => write(txn, store, record, *expect),
            Writes::Shards(shards) => shards
                .iter()
                .fold(txn, |txn, (expect, config)| write(txn, &config.shard(), config, *expect)),
            Writes::Accepted(accepted) => {
                let Accepted { expect, config, loss, intent } = &**accepted;
                let txn = write(txn, &config.shard(), config, *expect)
                    .create(&(loss.shard, loss.epoch), loss);
                match intent {
                    Some(at) => txn.delete::<PromoteIntent>(&config.shard(), *at),
                    None => txn,
                }
            }
        };
        let outcome = match txn.commit().await {
            Ok(Outcome::Done { revision }) => CasOutcome::Done { mod_revision: revision },
            Ok(Outcome::Failed) => CasOutcome::Failed,
            Ok(Outcome::Unknown) => CasOutcome::Unknown,
            // It surely had no effect.
            Err(error) => {
                error!(%error, "etcd refused a change");
                CasOutcome::Failed
            }
        };
        self.tell(Event::Proposed { proposal, outcome }).await;
        outcome
    }

    /// Follows all records. Waits for ever once the driver has gone, or etcd's history went back.
    pub(crate) async fn follow(self) {
        let settings = WatchSettings::default;
        let mut metas = self.metastore.watch::<Meta>(settings());
        let mut stores = self.metastore.watch::<StoreRecord>(settings());
        let mut names = self.metastore.watch::<NameRecord>(settings());
        let mut nodes = self.metastore.watch::<NodeRecord>(settings());
        let mut shards = self.metastore.watch::<ShardConfig>(settings());
        let mut drains = self.metastore.watch::<DrainIntent>(settings());
        let mut promotes = self.metastore.watch::<PromoteIntent>(settings());
        loop {
            let told = tokio::select! {
                told = next_meta(&mut metas) => told,
                told = next(&mut stores, Change::Store) => told,
                told = next(&mut names, Change::Name) => told,
                told = next(&mut nodes, Change::Node) => told,
                told = next(&mut shards, Change::Shard) => told,
                told = next(&mut drains, |store, one| Change::Drain(store, one.map(wanted))) => told,
                told = next(&mut promotes, Change::Promote) => told,
            };
            let ends = matches!(told, None | Some(Told::WentBack { .. }));
            let is_heard = match told {
                Some(told) => self.told.send(told).await.is_ok(),
                None => true,
            };
            if ends || !is_heard {
                return std::future::pending().await;
            }
        }
    }

    /// Says whenever etcd ceases to be of use, or is again.
    pub(crate) async fn ask_for_ever(self) {
        let mut known = None;
        let mut turns = tokio::time::interval(ASK_EVERY);
        loop {
            turns.tick().await;
            let trouble = self.trouble().await;
            let now = trouble.as_ref().map(Error::reason);
            if now == known {
                continue;
            }
            match trouble {
                Some(error) => warn!(%error, "no change can be made: nodes and gateways go on"),
                None => info!("etcd takes changes again"),
            }
            known = now;
            if self.told.send(Told::Etcd(now)).await.is_err() {
                return std::future::pending().await;
            }
        }
    }

    /// Why no change can be made, if that is so.
    async fn trouble(&self) -> Option<Error> {
        match self.metastore.get::<Meta>(&()).await {
            // A record that can't be read is an answer; whoever needs it says that it can't be read.
            Ok(_) | Err(Error::Malformed { .. }) => {}
            Err(error) => return Some(error),
        }
        match self.metastore.is_full().await {
            Ok(true) => Some(Error::Full { what: "change" }),
            Ok(false) => None,
            Err(error) => Some(error),
        }
    }

    async fn tell(&self, event: Event) {
        // When the driver has gone nobody needs to know.
        let _nobody_listens = self.told.send(Told::Event(event)).await;
    }
}

type Lists = (
    Listed<Meta>,
    Listed<StoreRecord>,
    Listed<NameRecord>,
    Listed<NodeRecord>,
    Listed<ShardConfig>,
    Listed<DrainIntent>,
    Listed<PromoteIntent>,
);

/// Lists of several moments as one. It is of the oldest moment: of a later one it would claim to hold changes that the
/// oldest list lacks, and the machine passes over a change that a listing holds already.
fn listing((meta, stores, names, nodes, shards, drains, promotes): Lists) -> Listing {
    let revisions = [
        meta.revision,
        stores.revision,
        names.revision,
        nodes.revision,
        shards.revision,
        drains.revision,
        promotes.revision,
    ];
    Listing {
        revision: revisions.into_iter().min().unwrap_or(0),
        meta: meta.all.into_iter().next().map(kept),
        stores: stores.all.into_iter().map(|one| (one.id, kept(one))).collect(),
        names: names.all.into_iter().map(|one| (one.id.clone(), kept(one))).collect(),
        nodes: nodes.all.into_iter().map(|one| (one.id, kept(one))).collect(),
        shards: shards.all.into_iter().map(kept).collect(),
        drains: drains.all.into_iter().map(|one| (one.id, wanted(kept(one)))).collect(),
        promotes: promotes.all.into_iter().map(|one| (one.id, kept(one))).collect(),
    }
}

/// The next event of one watch, in the machine's words. None: the watch has ended.
async fn next<R: Record>(
    watch: &mut Watch<R>,
    change: impl Fn(R::Id, Option<coordinator::Kept<R>>) -> Change,
) -> Option<Told> {
    let (revision, change) = match watch.next().await? {
        // Somebody may have gone in the meantime, which no list says: the machine reads everything itself.
        WatchEvent::All(_) => return Some(Told::Event(Event::WatchBroke)),
        WatchEvent::Changed(one) => (one.modified, change(one.id.clone(), Some(kept(one)))),
        WatchEvent::Deleted { id, revision } => (revision, change(id, None)),
        WatchEvent::WentBack { was, now } => return Some(Told::WentBack { was, now }),
    };
    Some(Told::Event(Event::Changed { revision, change }))
}

/// The cluster's settings are never deleted, so a list of them is as good as a change. A standby, whose machine reads
/// nothing, learns from it whether it agrees with the cluster.
async fn next_meta(watch: &mut Watch<Meta>) -> Option<Told> {
    match watch.next().await? {
        WatchEvent::All(listed) => Some(match listed.all.into_iter().next() {
            Some(one) => meta_changed(one),
            None => Told::Event(Event::WatchBroke),
        }),
        WatchEvent::Changed(one) => Some(meta_changed(one)),
        WatchEvent::Deleted { .. } => Some(Told::Event(Event::WatchBroke)),
        WatchEvent::WentBack { was, now } => Some(Told::WentBack { was, now }),
    }
}

fn meta_changed(one: metastore::Kept<Meta>) -> Told {
    Told::Event(Event::Changed { revision: one.modified, change: Change::Meta(kept(one)) })
}

fn kept<R: Record>(one: metastore::Kept<R>) -> coordinator::Kept<R> {
    coordinator::Kept { value: one.record, created: one.created, modified: one.modified }
}

/// That it is there says all.
fn wanted(one: coordinator::Kept<DrainIntent>) -> coordinator::Kept<()> {
    coordinator::Kept { value: (), created: one.created, modified: one.modified }
}

/// `expect` 0: there must be no such record.
fn write<R: Record>(txn: Txn, id: &R::Id, record: &R, expect: u64) -> Txn {
    match expect {
        0 => txn.create(id, record),
        modified => txn.replace(id, record, modified),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn none_at<R: Record>(revision: u64) -> Listed<R> {
        Listed { all: Vec::new(), revision }
    }

    #[test]
    fn a_listing_is_of_the_moment_of_its_oldest_list() {
        for oldest in 0..7_u64 {
            let at = |list: u64| if list == oldest { 4 } else { 5 + list };
            let lists = (
                none_at(at(0)),
                none_at(at(1)),
                none_at(at(2)),
                none_at(at(3)),
                none_at(at(4)),
                none_at(at(5)),
                none_at(at(6)),
            );
            assert_eq!(listing(lists).revision, 4, "list {oldest}");
        }
    }
}
