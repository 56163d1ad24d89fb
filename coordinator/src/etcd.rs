//! The driver's calls to etcd, and the watches of its records.
//!
//! The effects of the state machine are calls that are tried once: a transaction whose reply was
//! lost is reported as unknown and never sent again. All kinds of records that the state machine
//! uses are followed from the start, also by a standby, so that there is no gap between a list that
//! is read after an election and the changes that follow.

use std::time::Duration;

use engine::coordinator::events::RecordList;
use engine::coordinator::planner::PlanView;
use engine::coordinator::{
    self, AcceptedLoss, Event, Listing, MovesStatus, RecordChange, StoreRemoval, Writes,
};
use engine::node::CasOutcome;
use engine::records::{
    Meta, NameRecord, NodeRecord, PauseIntent, PromoteIntent, RemoveIntent, StoreRecord,
};
use engine::shard_record::ShardRecord;
use metastore::{
    CoordinatorRecord, DrainIntent, Error, EtcdRecord, Followed, Listed, Metastore, Txn, Watch,
    WatchChange, WatchEvent, WatchSettings,
};
use proto::wire;
use tokio::sync::{mpsc, oneshot};
use tracing::{error, info, warn};

/// A message to the driver's loop.
#[derive(Debug)]
#[expect(
    clippy::large_enum_variant,
    reason = "nearly every message is an event, and a queue of a thousand is 224 KiB at most"
)]
pub(crate) enum DriverMessage {
    /// An event for the state machine.
    Event(Event),
    /// The reason why etcd can't be used now, as a word for `/readyz`; `None` if it can. Sent when
    /// it changes.
    EtcdProblem(Option<&'static str>),
    /// A request for the planner's inputs and the progress of moves, and where to send them: `None`
    /// from a standby.
    Plan(oneshot::Sender<Option<(PlanView, MovesStatus)>>),
    /// All records of one kind, for the events: a watch begins, or begins again.
    Records(RecordList),
    /// A request for the latest events, and where to send them.
    Events(EventsRequest),
    /// etcd's history is shorter than it was.
    WentBack,
}

/// A request for the latest events.
#[derive(Debug)]
pub(crate) struct EventsRequest {
    /// The instance and the last number that the client has seen.
    pub(crate) seen: (u64, u64),
    /// The receiver of the cluster and the reply: `None` while no cluster is known.
    pub(crate) reply: oneshot::Sender<Option<(u128, wire::EventsReply)>>,
}

/// The interval of the checks whether etcd replies and accepts writes.
const CHECK_EVERY: Duration = Duration::from_secs(1);

/// Calls etcd, and sends the results to the driver. Cheap to clone.
#[derive(Clone)]
pub(crate) struct EtcdHandle {
    metastore: Metastore,
    messages: mpsc::Sender<DriverMessage>,
}

impl EtcdHandle {
    pub(crate) fn new(metastore: Metastore, messages: mpsc::Sender<DriverMessage>) -> Self {
        Self { metastore, messages }
    }

    /// Reads all records, and sends them to the driver.
    pub(crate) async fn list(self, list: u64) {
        let listing = match self.read_all().await {
            Ok(listing) => Some(listing),
            Err(error) if error.is_transient() => {
                warn!(%error, "records not read");
                None
            }
            Err(error) => {
                error!(%error, "records can't be read: no change is made until they can");
                None
            }
        };
        self.send(Event::Listed { list, listing }).await;
    }

    async fn read_all(&self) -> Result<Listing, Error> {
        let lists = tokio::try_join!(
            self.metastore.list::<Meta>(),
            self.metastore.list::<StoreRecord>(),
            self.metastore.list::<NameRecord>(),
            self.metastore.list::<NodeRecord>(),
            self.metastore.list::<ShardRecord>(),
            self.metastore.list::<DrainIntent>(),
            self.metastore.list::<PromoteIntent>(),
            self.metastore.list::<RemoveIntent>(),
            self.metastore.list::<PauseIntent>(),
        )?;
        Ok(listing(lists))
    }

    /// Sends one transaction once, which also compares the term, and sends its outcome to the
    /// driver.
    pub(crate) async fn propose(self, proposal: u64, term: u64, writes: Writes) -> CasOutcome {
        let txn = self.metastore.txn().if_created_at::<CoordinatorRecord>(&(), term);
        let txn = match &writes {
            Writes::Meta(meta) => txn.create(&(), meta),
            Writes::Store { store, expect, record } => write(txn, store, record, *expect),
            Writes::Removal(removal) => {
                let StoreRemoval { store, expect, record, intent, drain } = &**removal;
                let txn = write(txn, store, record, *expect);
                // A process that has registered meanwhile runs.
                let txn = txn.if_absent::<NodeRecord>(store).delete::<RemoveIntent>(store, *intent);
                match drain {
                    Some(at) => txn.delete::<DrainIntent>(store, *at),
                    None => txn,
                }
            }
            Writes::Shards(shards) => shards
                .iter()
                .fold(txn, |txn, (expect, record)| write(txn, &record.shard(), record, *expect)),
            Writes::AcceptedLoss(accepted) => {
                let AcceptedLoss { expect, record, loss, intent } = &**accepted;
                let txn = write(txn, &record.shard(), record, *expect)
                    .create(&(loss.shard, loss.epoch), loss);
                match intent {
                    Some(at) => txn.delete::<PromoteIntent>(&record.shard(), *at),
                    None => txn,
                }
            }
        };
        // A transaction that was refused had no effect.
        let outcome = txn.commit().await.unwrap_or_else(|error| {
            error!(%error, "etcd refused a transaction");
            CasOutcome::Failed
        });
        self.send(Event::Proposed { proposal, outcome }).await;
        outcome
    }

    /// Follows all records. Never returns: once the driver is gone or etcd's history went back, it
    /// only waits.
    pub(crate) async fn follow(self) {
        let settings = WatchSettings::default;
        let mut metas = self.metastore.follow::<Meta>();
        let mut stores = self.metastore.watch::<StoreRecord>(settings());
        let mut names = self.metastore.watch::<NameRecord>(settings());
        let mut nodes = self.metastore.watch::<NodeRecord>(settings());
        let mut shards = self.metastore.watch::<ShardRecord>(settings());
        let mut drains = self.metastore.watch::<DrainIntent>(settings());
        let mut promotes = self.metastore.watch::<PromoteIntent>(settings());
        let mut removes = self.metastore.watch::<RemoveIntent>(settings());
        let mut pauses = self.metastore.watch::<PauseIntent>(settings());
        let pause = |(), one| RecordChange::Pause(one);
        let drain = |store, one: Option<_>| RecordChange::Drain(store, one.map(without_value));
        // The event log needs lists of these kinds, too; the state machine only changes.
        let of_shards = |all: Vec<(_, _)>| all.into_iter().map(|(_, one)| one).collect();
        let shard_list = |all| Some(RecordList::Shards(of_shards(all)));
        let pause_list =
            |all: Vec<(_, _)>| Some(RecordList::Pause(all.into_iter().next().map(|(_, one)| one)));
        let store_list = |all| Some(RecordList::Stores(all));
        let node_list = |all| Some(RecordList::Nodes(all));
        let promote_list = |all| Some(RecordList::Promotes(all));
        let remove_list = |all| Some(RecordList::Removes(all));
        loop {
            let messages = tokio::select! {
                message = next_meta(&mut metas) => vec![message],
                all = next(&mut stores, RecordChange::Store, store_list) => all,
                all = next(&mut names, RecordChange::Name, |_| None) => all,
                all = next(&mut nodes, RecordChange::Node, node_list) => all,
                all = next(&mut shards, RecordChange::Shard, shard_list) => all,
                all = next(&mut drains, drain, |_| None) => all,
                all = next(&mut promotes, RecordChange::Promote, promote_list) => all,
                all = next(&mut removes, RecordChange::Remove, remove_list) => all,
                all = next(&mut pauses, pause, pause_list) => all,
            };
            for message in messages {
                let ends = matches!(message, DriverMessage::WentBack);
                if self.messages.send(message).await.is_err() || ends {
                    return std::future::pending().await;
                }
            }
        }
    }

    /// Checks at intervals whether etcd can be used, and sends each change to the driver. Never
    /// returns.
    pub(crate) async fn watch_health(self) {
        let mut known = None;
        let mut turns = tokio::time::interval(CHECK_EVERY);
        loop {
            turns.tick().await;
            let problem = self.problem().await;
            let now = problem.as_ref().map(Error::reason);
            if now == known {
                continue;
            }
            match problem {
                Some(error) => warn!(%error, "etcd accepts no writes, so no change can be made"),
                None => info!("etcd accepts writes again"),
            }
            known = now;
            if self.messages.send(DriverMessage::EtcdProblem(now)).await.is_err() {
                return std::future::pending().await;
            }
        }
    }

    /// Returns the reason why etcd accepts no writes; `None` if it does.
    async fn problem(&self) -> Option<Error> {
        match self.metastore.get::<Meta>(&()).await {
            // A record that can't be decoded is a reply, too; the list that needs it logs the
            // error.
            Ok(_) | Err(Error::Malformed { .. }) => {}
            Err(error) => return Some(error),
        }
        match self.metastore.is_full().await {
            Ok(true) => Some(Error::Full("change")),
            Ok(false) => None,
            Err(error) => Some(error),
        }
    }

    async fn send(&self, event: Event) {
        // Once the driver is gone, the event is not needed.
        let _driver_gone = self.messages.send(DriverMessage::Event(event)).await;
    }
}

type RecordLists = (
    Listed<Meta>,
    Listed<StoreRecord>,
    Listed<NameRecord>,
    Listed<NodeRecord>,
    Listed<ShardRecord>,
    Listed<DrainIntent>,
    Listed<PromoteIntent>,
    Listed<RemoveIntent>,
    Listed<PauseIntent>,
);

/// Combines lists of several revisions into one listing, which has the oldest of their revisions.
/// With a later one it would claim to contain changes that the oldest list lacks, and the state
/// machine ignores a change that a listing contains already.
fn listing(lists: RecordLists) -> Listing {
    let (meta, stores, names, nodes, shards, drains, promotes, removes, pause) = lists;
    let revisions = [
        meta.revision,
        stores.revision,
        names.revision,
        nodes.revision,
        shards.revision,
        drains.revision,
        promotes.revision,
        removes.revision,
        pause.revision,
    ];
    Listing {
        revision: revisions.into_iter().min().unwrap_or(0),
        meta: meta.all.into_iter().next().map(at_revision),
        stores: by_id(stores),
        names: by_id(names),
        nodes: by_id(nodes),
        shards: shards.all.into_iter().map(at_revision).collect(),
        drains: by_id(drains).into_iter().map(|(id, one)| (id, without_value(one))).collect(),
        promotes: by_id(promotes),
        removes: by_id(removes),
        pause: pause.all.into_iter().next().map(at_revision),
    }
}

fn by_id<R: EtcdRecord>(listed: Listed<R>) -> Vec<(R::Id, coordinator::AtRevision<R>)> {
    listed.all.into_iter().map(|one| (one.id.clone(), at_revision(one))).collect()
}

/// Waits for the next event of one watch, and converts it for the state machine. A list is also
/// converted for the event log, if `list` does so.
async fn next<R: EtcdRecord>(
    watch: &mut Watch<R>,
    change: impl Fn(R::Id, Option<coordinator::AtRevision<R>>) -> RecordChange,
    list: impl Fn(Vec<(R::Id, coordinator::AtRevision<R>)>) -> Option<RecordList>,
) -> Vec<DriverMessage> {
    let (revision, change) = match watch.next().await {
        // A record may have been deleted meanwhile, which no list shows: the state machine has all
        // records read again.
        Some(WatchEvent::All(listed)) => {
            let all = list(by_id(listed)).map(DriverMessage::Records);
            return all.into_iter().chain([DriverMessage::Event(Event::WatchBroke)]).collect();
        }
        Some(WatchEvent::Change(WatchChange::Changed(one))) => {
            (one.modified, change(one.id.clone(), Some(at_revision(one))))
        }
        Some(WatchEvent::Change(WatchChange::Deleted { id, revision })) => {
            (revision, change(id, None))
        }
        Some(WatchEvent::WentBack(_)) | None => return vec![DriverMessage::WentBack],
    };
    vec![DriverMessage::Event(Event::Changed { revision, change })]
}

/// Waits for the next event of the watch of the cluster's settings. They are never deleted, so a
/// list of them equals a change. A standby, whose state machine reads nothing, learns from it
/// whether its flags match the cluster.
async fn next_meta(metas: &mut Followed<Meta>) -> DriverMessage {
    if !metas.next().await {
        return DriverMessage::WentBack;
    }
    DriverMessage::Event(match metas.all().next() {
        Some(one) => Event::Changed {
            revision: one.modified,
            change: RecordChange::Meta(at_revision(one.clone())),
        },
        None => Event::WatchBroke,
    })
}

fn at_revision<R: EtcdRecord>(one: metastore::Revisioned<R>) -> coordinator::AtRevision<R> {
    coordinator::AtRevision { value: one.record, created: one.created, modified: one.modified }
}

/// Drops the value of a drain intent: its key is the whole request.
fn without_value(one: coordinator::AtRevision<DrainIntent>) -> coordinator::AtRevision<()> {
    coordinator::AtRevision { value: (), created: one.created, modified: one.modified }
}

/// Adds a write to a transaction. If `expect` is 0, the record must not exist; otherwise it must
/// still be at that mod_revision.
fn write<R: EtcdRecord>(txn: Txn, id: &R::Id, record: &R, expect: u64) -> Txn {
    match expect {
        0 => txn.create(id, record),
        modified => txn.replace(id, record, modified),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn none_at<R: EtcdRecord>(revision: u64) -> Listed<R> {
        Listed { all: Vec::new(), revision }
    }

    #[test]
    fn a_listing_has_the_revision_of_its_oldest_list() {
        for oldest in 0..9_u64 {
            let at = |list: u64| if list == oldest { 4 } else { 5 + list };
            let lists = (
                none_at(at(0)),
                none_at(at(1)),
                none_at(at(2)),
                none_at(at(3)),
                none_at(at(4)),
                none_at(at(5)),
                none_at(at(6)),
                none_at(at(7)),
                none_at(at(8)),
            );
            assert_eq!(listing(lists).revision, 4, "list {oldest}");
        }
    }
}
