//! The readiness of this node: it is registered, and all its copies have been in sync once since
//! this start.
//!
//! A tool that takes nodes away one after the other (a rollout, a PodDisruptionBudget) waits until
//! the last one is ready, so "ready" must mean that the next may go. Later changes do not count: a
//! node that lags for a while still serves, and leaving it out of a service would help no client.
//!
//! Membership in the in-sync set is not enough: after a restart the primary may not have noticed
//! the absence. So the primary must have sent something in this boot, and the copy must hold
//! everything that it announced as committed.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use engine::ids::{CopyNo, Epoch, Seq, ShardId, StoreId, Version};
use engine::message::{Slice, ToFollower};
use engine::node::{Event, ReplicaView};
use engine::shard_record::ShardRecord;
use telemetry::Health;

/// The conditions of readiness. Clones are cheap and share them.
#[derive(Clone, Debug)]
pub struct NodeReadiness {
    health: Health,
    state: Arc<Mutex<NodeReadinessState>>,
}

#[derive(Debug, Default)]
struct NodeReadinessState {
    is_registered: bool,
    copies: CopyProgress,
    /// Set once the node will not be ready again.
    is_over: bool,
}

#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
enum CopyProgress {
    /// etcd has not listed the shards yet.
    #[default]
    Unknown,
    /// The number of copies that are not in sync, and of all copies.
    Behind(usize, usize),
    InSync,
}

impl NodeReadiness {
    /// Creates the conditions, none of them met.
    pub fn new(health: Health) -> Self {
        Self { health, state: Arc::default() }
    }

    /// Notes that the node is registered in etcd.
    pub fn registered(&self) {
        self.change(|state| state.is_registered = true);
    }

    /// Makes the node unready for the rest of the process, for this reason.
    pub fn not_ready_again(&self, reason: &'static str) {
        self.change(|state| state.is_over = true);
        self.health.not_ready(reason);
    }

    fn copies(&self, copies: CopyProgress) {
        self.change(|state| state.copies = copies);
    }

    fn change(&self, change: impl FnOnce(&mut NodeReadinessState)) {
        // The lock is held until the health is set, so that the newest state prevails.
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut state);
        match state.reason() {
            _ if state.is_over => {}
            None => self.health.ready(),
            Some(reason) => self.health.not_ready(reason),
        }
    }
}

impl NodeReadinessState {
    fn reason(&self) -> Option<String> {
        match self.copies {
            _ if !self.is_registered => Some("registration".to_owned()),
            CopyProgress::Unknown => Some("shards".to_owned()),
            CopyProgress::Behind(behind, of) => {
                Some(format!("catching up: {behind} of {of} copies"))
            }
            CopyProgress::InSync => None,
        }
    }
}

/// Follows the loop's events until all copies have been in sync once.
#[derive(Debug)]
pub struct CatchUpTracker {
    me: StoreId,
    readiness: NodeReadiness,
    is_listed: bool,
    shards: BTreeMap<ShardId, ShardPlacement>,
    /// The last slice that a primary has sent, by shard.
    last_slices: BTreeMap<ShardId, LastSlice>,
    is_done: bool,
}

/// The place of this node in a shard's record.
#[derive(Clone, Copy, Debug)]
struct ShardPlacement {
    version: Version,
    epoch: Epoch,
    has_copy: bool,
    is_in_sync: bool,
}

#[derive(Clone, Copy, Debug)]
struct LastSlice {
    epoch: Epoch,
    copy: CopyNo,
    commit: Seq,
}

impl CatchUpTracker {
    /// Creates a tracker of the copies of store `me`.
    pub fn new(me: StoreId, readiness: NodeReadiness) -> Self {
        let (shards, last_slices) = Default::default();
        Self { me, readiness, is_listed: false, shards, last_slices, is_done: false }
    }

    /// Notes that all shard records have been received.
    pub fn note_listed(&mut self) {
        self.is_listed = true;
    }

    /// Notes an event of the loop.
    pub fn note(&mut self, event: &Event) {
        match event {
            _ if self.is_done => {}
            Event::ShardRecord { record, .. } => self.placed(record),
            Event::FromPrimary { message: ToFollower::Append { slices, .. }, .. } => {
                slices.iter().for_each(|slice| self.note_slice(slice));
            }
            _ => {}
        }
    }

    fn placed(&mut self, record: &ShardRecord) {
        let known = self.shards.get(&record.shard());
        if known.is_some_and(|known| known.version > record.version) {
            return;
        }
        let is_in_sync = record.isr.contains(&self.me);
        // A store that has left the in-sync set while it was away is only in the target.
        let others = [&record.learners, &record.target];
        let has_copy = is_in_sync || others.into_iter().any(|stores| stores.contains(&self.me));
        let placed =
            ShardPlacement { version: record.version, epoch: record.epoch, has_copy, is_in_sync };
        self.shards.insert(record.shard(), placed);
    }

    fn note_slice(&mut self, slice: &Slice) {
        let last = LastSlice { epoch: slice.epoch, copy: slice.copy, commit: slice.commit };
        self.last_slices.insert(slice.shard, last);
    }

    /// Checks whether all copies are in sync now.
    pub fn update<'a>(&mut self, replicas: impl Iterator<Item = ReplicaView<'a>>) {
        if self.is_done || !self.is_listed {
            return;
        }
        let in_sync = replicas.filter(|view| self.is_in_sync(view)).count();
        let copies = self.shards.values().filter(|placed| placed.has_copy).count();
        if in_sync >= copies {
            self.is_done = true;
            return self.readiness.copies(CopyProgress::InSync);
        }
        self.readiness.copies(CopyProgress::Behind(copies - in_sync, copies));
    }

    fn is_in_sync(&self, view: &ReplicaView<'_>) -> bool {
        let Some(placed) = self.shards.get(&view.shard) else { return false };
        let is_good = view.exists && !view.unfit && view.stopped.is_none();
        let is_fed = || {
            self.last_slices.get(&view.shard).is_some_and(|last| {
                last.epoch == placed.epoch && last.copy == view.copy && view.commit >= last.commit
            })
        };
        let leads = view.primary.map(|primary| primary.epoch == placed.epoch && primary.active);
        placed.is_in_sync && is_good && leads.unwrap_or_else(is_fed)
    }
}

#[cfg(test)]
mod tests {
    use engine::ids::{Boot, Now, Slots, StoreBoot};
    use engine::node::{Effect, Node, Settings};

    use super::*;

    const ME: StoreBoot = StoreBoot { store: StoreId(1), boot: Boot(1) };
    const OTHER: StoreBoot = StoreBoot { store: StoreId(2), boot: Boot(1) };

    fn record(version: u64, isr: &[StoreBoot], target: &[StoreBoot]) -> ShardRecord {
        let stores = |of: &[StoreBoot]| of.iter().map(|one| one.store).collect();
        ShardRecord {
            slots: Slots::ALL,
            epoch: Epoch(1),
            version: Version(version),
            primary: OTHER,
            isr: stores(isr),
            target: stores(target),
            ..ShardRecord::default()
        }
    }

    fn event_of(record: ShardRecord) -> Event {
        Event::ShardRecord { mod_revision: record.version.0, record, read: None }
    }

    struct Bench {
        health: Health,
        readiness: NodeReadiness,
        catch_up: CatchUpTracker,
        node: Node,
    }

    impl Bench {
        fn new() -> Self {
            let health = Health::new("identity");
            let readiness = NodeReadiness::new(health.clone());
            let catch_up = CatchUpTracker::new(ME.store, readiness.clone());
            let node = Node::new(Settings::default(), ME, Now(0), 1, Vec::new());
            Self { health, readiness, catch_up, node }
        }

        fn on(&mut self, event: Event) {
            self.catch_up.note(&event);
            let mut effects = Vec::<Effect>::new();
            self.node.handle(Now(0), event, &mut effects);
        }

        #[track_caller]
        fn is(&mut self, want: Option<&str>) {
            self.catch_up.update(self.node.replicas());
            assert_eq!(self.health.reason().as_deref(), want);
        }
    }

    #[test]
    fn a_node_without_copies_is_ready_once_it_knows_that_it_has_none() {
        let mut bench = Bench::new();
        bench.is(Some("identity"));
        bench.readiness.registered();
        bench.is(Some("shards"));
        bench.on(event_of(record(1, &[OTHER], &[OTHER])));
        bench.catch_up.note_listed();
        bench.is(None);
        bench.on(event_of(record(2, &[OTHER], &[OTHER, ME])));
        bench.is(None);
        bench.readiness.not_ready_again("stopping");
        bench.is(Some("stopping"));
        bench.readiness.registered();
        bench.is(Some("stopping"));
    }

    #[test]
    fn a_copy_counts_when_its_primary_has_fed_it_in_this_run() {
        let mut bench = Bench::new();
        bench.catch_up.note_listed();
        bench.on(event_of(record(2, &[OTHER], &[OTHER, ME])));
        bench.is(Some("registration"));
        bench.readiness.registered();
        bench.is(Some("catching up: 1 of 1 copies"));
        // An older record that arrives late is ignored.
        bench.on(event_of(record(1, &[OTHER], &[OTHER])));
        bench.is(Some("catching up: 1 of 1 copies"));
        // Membership in the set does not count either, as long as nothing has come from the
        // primary.
        bench.on(event_of(record(3, &[ME, OTHER], &[ME, OTHER])));
        bench.is(Some("catching up: 1 of 1 copies"));
    }
}
