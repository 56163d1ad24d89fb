//! Observes everything while a run goes on, and calls the checkers that watch the cluster from
//! inside.

use std::collections::BTreeMap;

use engine::batcher;
use engine::ids::{Boot, CopyNo, Epoch, Seq, ShardId, StoreBoot, StoreId};
use engine::message::{GatewayMessage, ToFollower};
use engine::node::{self, Effect, Event, Node};
use engine::replica::view::ReplicaView;
use engine::shard_record::ShardRecord;
use engine::store::log::LogRecord;

use super::checker::Violation;
use super::checker::damage::DamagedCopies;
use super::checker::digests::Digests;
use super::checker::identity::Identities;
use super::checker::in_sync_set::InSyncSet;
use super::checker::limits::LimitsChecker;
use super::checker::logged_records::{DurableShard, LoggedRecords};
use super::checker::logs_match::LogsMatch;
use super::checker::memory::MemoryChecker;
use super::checker::moves::Moves;
use super::checker::never_back::NeverBack;
use super::checker::one_primary::OnePrimary;
use super::checker::session_rows::SessionRows;
use super::checker::{floor, status};
use super::coverage::{Coverage, Path};
use super::plan::Plan;

/// A status is made for every this many events of nodes: it costs as much as some of them.
const STATUS_EVERY: u64 = 16;
/// In a cluster of more nodes a replica is checked only after it has changed, and what a node
/// counts over all its replicas only after every so many events: a hundred replicas on each of a
/// hundred nodes would be most of the run.
const SMALL_CLUSTER: u16 = 16;
const COUNTED_EVERY: u64 = 64;

#[derive(Default)]
pub struct Oracle {
    pub violations: Vec<Violation>,
    pub coverage: Coverage,
    pub damaged: DamagedCopies,
    identities: Identities,
    one_primary: OnePrimary,
    logs: LogsMatch,
    memory: MemoryChecker,
    in_sync: InSyncSet,
    logged: LoggedRecords,
    never_back: NeverBack,
    digests: Digests,
    sessions: SessionRows,
    limits: LimitsChecker,
    moves: Moves,
    sizes: node::NodeSizes,
    batches: batcher::BatchSizes,
    min_in_sync: usize,
    /// The number of checks of nodes.
    looks: u64,
    /// The replicas of each node as they were checked last, in a large cluster.
    checked: Option<BTreeMap<StoreId, Vec<CheckedReplica>>>,
    /// The last position checked, so that nothing is checked twice.
    seen: BTreeMap<(StoreId, ShardId), (u64, u64)>,
}

impl Oracle {
    /// The oracle for a run with this plan.
    pub fn new(plan: &Plan) -> Self {
        Self {
            sizes: plan.node.sizes,
            batches: plan.gateway.sizes,
            min_in_sync: plan.min_in_sync,
            coverage: Coverage::new(plan.node.limits().leap_ms()),
            checked: (plan.nodes > SMALL_CLUSTER).then(BTreeMap::new),
            ..Self::default()
        }
    }

    pub fn event(&mut self, me: StoreBoot, event: &Event) {
        self.limits.event(me, event, &self.sizes);
        self.coverage.event(me, event);
        self.never_back.event(me, event);
    }

    pub fn effect(&mut self, now: u64, me: StoreBoot, effect: &Effect) {
        self.coverage.effect(me, effect);
        self.never_back.effect(me, effect);
        self.memory.effect(me, effect);
        self.limits.effect(me, effect, &self.sizes);
        match effect {
            Effect::Write(LogRecord::Append { shard, entry }) => {
                self.logs.written(*shard, entry, &mut self.violations);
            }
            Effect::ToFollower { message: ToFollower::Append { slices, .. }, .. } => {
                for slice in slices {
                    let claim = (slice.shard, slice.epoch);
                    self.one_primary.leads(claim, me, &mut self.violations);
                }
            }
            Effect::Exit(reason) => {
                let detail = format!("{me:?} ended itself at {now}: {reason:?}");
                self.violations.push(Violation { promise: "heals", detail });
            }
            _ => {}
        }
    }

    /// Checks a node after each of its events. `now`: by the clocks of processes.
    pub fn look(&mut self, now: u64, me: StoreBoot, node: &Node) {
        self.looks += 1;
        if self.checked.is_none() || self.looks.is_multiple_of(COUNTED_EVERY) {
            self.memory.look(me, node, &mut self.violations);
            self.limits.look(me, node, &self.sizes);
            self.limits.report(&mut self.violations);
        }
        if self.looks.is_multiple_of(STATUS_EVERY) {
            status::check(me, node, &mut self.violations);
        }
        for (at, view) in node.replicas().enumerate() {
            if self.is_checked(me, at, &view) {
                // One that waits for acknowledgements is checked as time passes.
                if view.primary.is_some() && view.last.seq > view.commit {
                    self.moves.look(now, me, &view, &mut self.violations);
                }
                continue;
            }
            self.never_back.look(me, &view, &mut self.violations);
            self.in_sync.look(me, &view, &mut self.violations);
            self.logged.look(&view, &mut self.violations);
            self.moves.look(now, me, &view, &mut self.violations);
            let applied = view.state.applied;
            let primary = view.primary.map_or(0, |primary| primary.epoch.0);
            let mark = (applied.seq.0, primary);
            let seen = self.seen.insert((me.store, view.shard), mark);
            if seen == Some(mark) || !view.exists {
                continue;
            }
            if let Some(primary) = view.primary {
                let claim = (view.shard, primary.epoch);
                self.one_primary.leads(claim, me, &mut self.violations);
            }
            self.coverage.applied(&view, seen.map_or(Seq(0), |(seq, _)| Seq(seq)));
            self.logs.applied(view.shard, applied, &mut self.violations);
            let added_up = self.digests.added_up;
            self.digests.applied(view.shard, view.state, &mut self.violations);
            if self.digests.added_up > added_up {
                self.coverage.reached(Path::ShardSplit);
            }
            self.sessions.applied(view.shard, view.state, &mut self.violations);
            self.damaged.look(me, &view, &mut self.violations);
            if let Some(why) = view.stopped.filter(|_| !view.unfit) {
                let detail = format!("{me:?} stopped shard {}: {why}", view.shard);
                self.violations.push(Violation { promise: "heals", detail });
            }
        }
    }

    /// Returns whether the replica, the node's so-manieth, was checked as it is.
    fn is_checked(&mut self, me: StoreBoot, at: usize, view: &ReplicaView<'_>) -> bool {
        let Some(checked) = &mut self.checked else { return false };
        let now = CheckedReplica::of(me, view);
        let of_node = checked.entry(me.store).or_default();
        match of_node.get_mut(at) {
            Some(before) if *before == now => true,
            Some(before) => {
                *before = now;
                false
            }
            None => {
                of_node.push(now);
                false
            }
        }
    }

    /// Checks a message from a gateway to a node.
    pub fn asked(&mut self, message: &GatewayMessage) {
        self.limits.asked(message, &self.batches);
    }

    /// A process has become its store. `outdated`: its disk is an older image of what has served
    /// since.
    pub fn serves(&mut self, me: StoreBoot, outdated: bool) {
        self.identities.serves(me, outdated, &mut self.violations);
    }

    /// The store's disk was harmed: what was durable may be gone.
    pub fn harmed(&mut self, store: StoreId) {
        self.never_back.harmed(store);
        self.in_sync.harmed(store);
        self.logged.harmed(store);
    }

    /// Returns whether the records in the logs of the stores, but for one, are of all shards.
    pub fn logs_cover_all(&self, without: Option<StoreId>) -> bool {
        self.logged.cover_all(without)
    }

    /// All of etcd is lost: records that no store has acted on are as if they had never been.
    pub fn etcd_lost(&mut self) {
        self.never_back.etcd_lost();
        self.in_sync.etcd_lost();
        self.logged.etcd_lost();
    }

    /// This is durable on the store's disk from now on.
    pub fn durable(&mut self, store: StoreId, found: DurableShard) {
        self.logged.durable(store, found, &mut self.violations);
    }

    pub fn record_written(&mut self, config: &ShardRecord) {
        self.coverage.record_written(config);
        floor::check(config, self.min_in_sync, &mut self.violations);
        self.never_back.record_written(config, &mut self.violations);
        self.in_sync.record_written(config, &mut self.violations);
        self.logged.record_written(config);
        self.one_primary.assigned(config, &mut self.violations);
    }
}

/// The numbers and marks of a replica that its steps change. They do not show that a log or a state
/// was replaced by another one of equal length within one event.
#[derive(Clone, Copy, Eq, PartialEq)]
struct CheckedReplica {
    shard: ShardId,
    boot: Boot,
    copy: CopyNo,
    exists: bool,
    promised: Epoch,
    seqs: [Seq; 4],
    unfit: bool,
    stopped: bool,
    leads: Option<(Epoch, bool, bool)>,
}

impl CheckedReplica {
    fn of(me: StoreBoot, view: &ReplicaView<'_>) -> Self {
        let leads = view.primary.map(|primary| (primary.epoch, primary.active, primary.frozen));
        Self {
            shard: view.shard,
            boot: me.boot,
            copy: view.copy,
            exists: view.exists,
            promised: view.promised,
            seqs: [view.last.seq, view.durable, view.commit, view.state.applied.seq],
            unfit: view.unfit,
            stopped: view.stopped.is_some(),
            leads,
        }
    }
}
