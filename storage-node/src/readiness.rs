//! Whether this node is ready: it is registered, and once since this start all its copies have been in sync.
//!
//! Whoever takes nodes away one after the other (a rollout, a PodDisruptionBudget) waits for the last one to be ready, so
//! "ready" must mean that the next may go. What happens later does not count: a node that lags for a while still serves, and
//! a service that left it out would help nobody.
//!
//! That a copy stands in the in-sync set is not enough: after a restart its primary may not have noticed that it was away. So
//! the primary must have sent something in this run, and the copy must hold all that it said to be committed.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use engine::config::ShardConfig;
use engine::ids::{CopyNo, Epoch, Seq, ShardId, StoreId, Version};
use engine::message::{Slice, ToFollower};
use engine::node::{Event, ReplicaView};
use telemetry::Health;

/// What the node waits for. Cheap to clone; clones share it.
#[derive(Clone, Debug)]
pub struct Readiness {
    health: Health,
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    is_registered: bool,
    copies: Copies,
    /// It will not be ready any more.
    is_over: bool,
}

#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
enum Copies {
    /// etcd has not yet said which there are.
    #[default]
    Unknown,
    /// So many of so many are not in sync.
    Behind(usize, usize),
    InSync,
}

impl Readiness {
    pub fn new(health: Health) -> Self {
        Self { health, state: Arc::default() }
    }

    pub fn registered(&self) {
        self.change(|state| state.is_registered = true);
    }

    /// Never ready again, for this reason.
    pub fn over(&self, reason: &'static str) {
        self.change(|state| state.is_over = true);
        self.health.not_ready(reason);
    }

    fn copies(&self, copies: Copies) {
        self.change(|state| state.copies = copies);
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        // Held until the health is set, so that the newest state is what stays.
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut state);
        match state.reason() {
            _ if state.is_over => {}
            None => self.health.ready(),
            Some(reason) => self.health.not_ready(reason),
        }
    }
}

impl State {
    fn reason(&self) -> Option<String> {
        match self.copies {
            _ if !self.is_registered => Some("registration".to_owned()),
            Copies::Unknown => Some("shards".to_owned()),
            Copies::Behind(behind, of) => Some(format!("catching up: {behind} of {of} copies")),
            Copies::InSync => None,
        }
    }
}

/// Looks at what the loop is told until all copies have been in sync once.
#[derive(Debug)]
pub struct CatchingUp {
    me: StoreId,
    readiness: Readiness,
    is_listed: bool,
    shards: BTreeMap<ShardId, Placed>,
    /// The last that a primary has sent of each.
    heard: BTreeMap<ShardId, Heard>,
    is_done: bool,
}

/// What a shard's record says of this node.
#[derive(Clone, Copy, Debug)]
struct Placed {
    version: Version,
    epoch: Epoch,
    has_copy: bool,
    is_in_sync: bool,
}

#[derive(Clone, Copy, Debug)]
struct Heard {
    epoch: Epoch,
    copy: CopyNo,
    commit: Seq,
}

impl CatchingUp {
    pub fn new(me: StoreId, readiness: Readiness) -> Self {
        let (shards, heard) = Default::default();
        Self { me, readiness, is_listed: false, shards, heard, is_done: false }
    }

    /// All shards that there are have been told of.
    pub fn listed(&mut self) {
        self.is_listed = true;
    }

    /// The loop was told this.
    pub fn note(&mut self, event: &Event) {
        match event {
            _ if self.is_done => {}
            Event::Config { config, .. } => self.placed(config),
            Event::ToFollower { message: ToFollower::Append { slices, .. }, .. } => {
                slices.iter().for_each(|slice| self.heard(slice));
            }
            _ => {}
        }
    }

    fn placed(&mut self, config: &ShardConfig) {
        let known = self.shards.get(&config.shard());
        if known.is_some_and(|known| known.version > config.version) {
            return;
        }
        let is_in_sync = config.isr.contains(&self.me);
        // One that has left the in-sync set while it was away is a target only.
        let others = [&config.learners, &config.target];
        let has_copy = is_in_sync || others.into_iter().any(|stores| stores.contains(&self.me));
        let placed = Placed { version: config.version, epoch: config.epoch, has_copy, is_in_sync };
        self.shards.insert(config.shard(), placed);
    }

    fn heard(&mut self, slice: &Slice) {
        let heard = Heard { epoch: slice.epoch, copy: slice.copy, commit: slice.commit };
        self.heard.insert(slice.shard, heard);
    }

    /// Looks whether all copies are in sync now.
    pub fn look<'a>(&mut self, replicas: impl Iterator<Item = ReplicaView<'a>>) {
        if self.is_done || !self.is_listed {
            return;
        }
        let in_sync = replicas.filter(|view| self.is_in_sync(view)).count();
        let copies = self.shards.values().filter(|placed| placed.has_copy).count();
        if in_sync >= copies {
            self.is_done = true;
            return self.readiness.copies(Copies::InSync);
        }
        self.readiness.copies(Copies::Behind(copies - in_sync, copies));
    }

    fn is_in_sync(&self, view: &ReplicaView<'_>) -> bool {
        let Some(placed) = self.shards.get(&view.shard) else { return false };
        let is_good = view.exists && !view.unfit && view.stopped.is_none();
        let is_fed = || {
            self.heard.get(&view.shard).is_some_and(|heard| {
                heard.epoch == placed.epoch
                    && heard.copy == view.copy
                    && view.commit >= heard.commit
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

    fn record(version: u64, isr: &[StoreBoot], target: &[StoreBoot]) -> ShardConfig {
        let stores = |of: &[StoreBoot]| of.iter().map(|one| one.store).collect();
        ShardConfig {
            slots: Slots::ALL,
            epoch: Epoch(1),
            version: Version(version),
            primary: OTHER,
            isr: stores(isr),
            target: stores(target),
            ..ShardConfig::default()
        }
    }

    fn told(config: ShardConfig) -> Event {
        Event::Config { mod_revision: config.version.0, config, read: None }
    }

    struct Bench {
        health: Health,
        readiness: Readiness,
        catching_up: CatchingUp,
        node: Node,
    }

    impl Bench {
        fn new() -> Self {
            let health = Health::new("identity");
            let readiness = Readiness::new(health.clone());
            let catching_up = CatchingUp::new(ME.store, readiness.clone());
            let node = Node::new(Settings::default(), ME, Now(0), 1, Vec::new());
            Self { health, readiness, catching_up, node }
        }

        fn on(&mut self, event: Event) {
            self.catching_up.note(&event);
            let mut effects = Vec::<Effect>::new();
            self.node.handle(Now(0), event, &mut effects);
        }

        #[track_caller]
        fn is(&mut self, want: Option<&str>) {
            self.catching_up.look(self.node.replicas());
            assert_eq!(self.health.reason().as_deref(), want);
        }
    }

    #[test]
    fn a_node_without_copies_is_ready_once_it_knows_that_it_has_none() {
        let mut bench = Bench::new();
        bench.is(Some("identity"));
        bench.readiness.registered();
        bench.is(Some("shards"));
        bench.on(told(record(1, &[OTHER], &[OTHER])));
        bench.catching_up.listed();
        bench.is(None);
        bench.on(told(record(2, &[OTHER], &[OTHER, ME])));
        bench.is(None);
        bench.readiness.over("stopping");
        bench.is(Some("stopping"));
        bench.readiness.registered();
        bench.is(Some("stopping"));
    }

    #[test]
    fn a_copy_counts_when_its_primary_has_fed_it_in_this_run() {
        let mut bench = Bench::new();
        bench.catching_up.listed();
        bench.on(told(record(2, &[OTHER], &[OTHER, ME])));
        bench.is(Some("registration"));
        bench.readiness.registered();
        bench.is(Some("catching up: 1 of 1 copies"));
        // An older record that comes late is no news.
        bench.on(told(record(1, &[OTHER], &[OTHER])));
        bench.is(Some("catching up: 1 of 1 copies"));
        // Nor does it count to be in the set, as long as nothing has come from the primary.
        bench.on(told(record(3, &[ME, OTHER], &[ME, OTHER])));
        bench.is(Some("catching up: 1 of 1 copies"));
    }
}
