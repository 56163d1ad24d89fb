//! One coordinator process: places shards, detects dead primaries, promotes, and keeps replicas
//! where the planner wants them.
//!
//! ```text
//!   driver                                        coordinator
//!   ──────                                        ───────────
//!   etcd    ── Elected, Listed, Changed ───────▶  observed state
//!           ◀── List, Propose ─────────────────   desired state, by compare-and-set
//!           ── Proposed ───────────────────────▶
//!   nodes   ◀── Probe, Gather, StepDown ───────
//!           ── Probed, Gathered, SteppedDown, Reported ──▶
//!   log     ◀── Decision ──────────────────────
//! ```
//!
//! **Level-triggered**: the coordinator compares the observed state (etcd and the nodes) with the
//! desired state, and proposes the difference. It keeps nothing that matters in memory only, so a
//! newly elected process begins with a `List` and needs no more. Easy to get wrong:
//!
//! * **The coordinator guards no data.** Epochs and in-sync sets do. A wrong suspicion, two leading
//!   coordinators or a proposal that takes effect an hour late cost milliseconds, never counts.
//! * **A vanished lease is not death, and a report is not death.** Both are only reasons to trust a
//!   failed probe of the coordinator's own (`health`).
//! * **A failed or unknown proposal is settled by reading**, never by a blind retry. Its shards
//!   rest until a `List` that began afterwards has come back.
//!
//! The modules: `leader_state` gives each event to a part, and orders the reviews; a part owns its
//! state, and borrows the rest by a `ReviewTurn`.
//!
//! | part | what it owns |
//! |---|---|
//! | `observed` | the cluster as it is known: `records`, probes (`health`), `reports` of nodes |
//! | `lists` | the list in flight |
//! | `proposals` | proposals without an answer, and shards that rest after one that failed |
//! | `promotion` | shards that need a primary, their `gather` rounds, and `hand_over`s |
//! | `bootstrap` | the creation of the cluster |
//! | `store_status` | suspect stores, [`removal`]s, and the statuses of all others |
//! | `planning` | the plans of the [`planner`], their `progress`, the guard after a mass failure |
//! | `leader_state` | the time of the next review |
//!
//! `candidates` and `choice` find the member to promote, or the loss to be `accepted`;
//! `dead_members` leave in-sync sets; [`decision`] is the log of what was done and why;
//! [`events`] are for people, and are derived from records by standbys, too.
//!
//! **The driver's obligations.** Every `Propose` is answered by exactly one `Proposed`, and is not
//! retried. Every `List` is answered by one `Listed`, from linearizable reads that began after the
//! effect. Probes and gathers may stay unanswered: the coordinator has its own time-outs. All
//! effects may be performed in any order and concurrently.

pub mod decision;
pub mod events;
pub mod planner;
pub mod removal;

mod accepted;
mod bootstrap;
mod candidates;
mod choice;
mod dead_members;
mod gather;
mod hand_over;
mod health;
mod leader_state;
mod lists;
mod observed;
mod planning;
mod progress;
mod promotion;
mod proposals;
mod records;
mod reports;
mod review;
mod store_status;
mod words;

#[cfg(test)]
mod tests;

use crate::ids::{Epoch, Now, Seq, ShardId, StoreBoot, StoreId};
use crate::message::{HealthReport, ShardEnd};
use crate::node::CasOutcome;
use crate::planted::Planted;
use crate::records::{
    LossRecord, Meta, NameRecord, NodeRecord, PauseIntent, PromoteIntent, RemoveIntent, StoreRecord,
};
use crate::shard::idempotency;
use crate::shard_record::ShardRecord;

use leader_state::LeaderState;

pub use decision::{Decision, PlacementWait};
pub use progress::MovesStatus;

/// A value with its place in etcd's history.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct AtRevision<V> {
    /// The record itself.
    pub value: V,
    /// The create_revision of its key.
    pub created: u64,
    /// The mod_revision of its key, which a compare-and-set compares.
    pub modified: u64,
}

/// All records of the cluster. A listing may be put together from several linearizable reads.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Listing {
    /// The lowest revision among the reads.
    pub revision: u64,
    /// The cluster's settings; `None` before the first coordinator has written them.
    pub meta: Option<AtRevision<Meta>>,
    /// The record of every store that was ever registered.
    pub stores: Vec<(StoreId, AtRevision<StoreRecord>)>,
    /// The store that owns each name.
    pub names: Vec<(String, AtRevision<NameRecord>)>,
    /// The lease-bound registrations of running processes.
    pub nodes: Vec<(StoreId, AtRevision<NodeRecord>)>,
    /// The record of every shard.
    pub shards: Vec<AtRevision<ShardRecord>>,
    /// Stores that an operator wants emptied.
    pub drains: Vec<(StoreId, AtRevision<()>)>,
    /// Shards that an operator wants led, whatever is lost.
    pub promotes: Vec<(ShardId, AtRevision<PromoteIntent>)>,
    /// Stores that an operator wants out of the cluster.
    pub removes: Vec<(StoreId, AtRevision<RemoveIntent>)>,
    /// An operator wants no moves for balance alone.
    pub pause: Option<AtRevision<PauseIntent>>,
}

/// The change of one record, as a watch delivers it. `None` means that its key was deleted.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum RecordChange {
    /// The cluster's settings, which are never deleted.
    Meta(AtRevision<Meta>),
    /// A store's record.
    Store(StoreId, Option<AtRevision<StoreRecord>>),
    /// The owner of a name.
    Name(String, Option<AtRevision<NameRecord>>),
    /// A process's registration, which its lease keeps alive.
    Node(StoreId, Option<AtRevision<NodeRecord>>),
    /// A shard's record.
    Shard(ShardId, Option<AtRevision<ShardRecord>>),
    /// An operator's intent to empty a store.
    Drain(StoreId, Option<AtRevision<()>>),
    /// An operator's intent to have a shard led with a loss.
    Promote(ShardId, Option<AtRevision<PromoteIntent>>),
    /// An operator's intent to take a store out of the cluster.
    Remove(StoreId, Option<AtRevision<RemoveIntent>>),
    /// An operator's intent that there are no moves for balance alone.
    Pause(Option<AtRevision<PauseIntent>>),
}

/// Everything that can happen to a coordinator.
#[derive(Clone, Debug)]
pub enum Event {
    /// The time given by `next_deadline` has come.
    Tick,

    // -- etcd
    /// This process created the `coordinator` key. Until then the coordinator does nothing at all
    /// (a standby).
    Elected {
        /// The create_revision of the key.
        term: u64,
    },
    /// The key is gone, or its lease can't be confirmed. (A late `Deposed` is harmless.)
    Deposed,
    /// Answers `List`.
    Listed {
        /// The number of the `List` effect.
        list: u64,
        /// `None` if etcd did not answer; the coordinator then asks again a little later.
        listing: Option<Listing>,
    },
    /// One record changed. Changes are hints: they may come late, twice, or not at all.
    Changed {
        /// The revision of the change.
        revision: u64,
        /// The record's new state.
        change: RecordChange,
    },
    /// Changes may have been missed: the watch was restarted.
    WatchBroke,
    /// Answers `Propose`.
    Proposed {
        /// The number of the `Propose` effect.
        proposal: u64,
        /// The outcome of the transaction.
        outcome: CasOutcome,
    },

    // -- nodes
    /// Answers `Probe`.
    Probed {
        /// The number of the `Probe` effect.
        probe: u64,
        /// The result of the probe.
        result: ProbeResult,
    },
    /// Answers `Gather`.
    Gathered {
        /// The number of the `Gather` effect.
        gather: u64,
        /// The store that was asked.
        store: StoreId,
        /// The log ends of the copies it holds; `None` if that very process did not answer.
        ends: Option<Vec<ShardEnd>>,
    },
    /// Answers `StepDown`.
    SteppedDown {
        /// The shard that was to be handed over.
        shard: ShardId,
        /// The epoch in which the node was primary.
        epoch: Epoch,
        /// The last entry of the log, which grows no more; `None` if the node is not primary of the
        /// shard, or did not answer.
        end: Option<(Epoch, Seq)>,
    },
    /// A node's unsolicited report on itself and its peers.
    Reported {
        /// The process that reports.
        from: StoreBoot,
        /// The report.
        report: HealthReport,
    },
    /// A gateway reports stores that refused or reset its connection.
    GatewayReported(Vec<StoreId>),
}

/// The result of one probe.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum ProbeResult {
    /// A process answered.
    Alive {
        /// The process that answered, which may be another than the one asked for.
        from: StoreBoot,
        /// The time since its disk last completed an fsync.
        fsync_age_ms: u64,
    },
    /// Nothing listens at the address.
    Refused,
    /// The driver gave up waiting. (The coordinator does so by itself after `probe_timeout_ms`.)
    Silent,
}

/// Everything a coordinator can ask of its driver.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Effect {
    /// Read all records by linearizable reads that begin now.
    List {
        /// The number to answer with.
        list: u64,
    },
    /// Write in one transaction, on condition that every record still has the expected mod_revision
    /// and the `coordinator` key still has `term` as its create_revision.
    Propose {
        /// The number to answer with.
        proposal: u64,
        /// The term of this leader.
        term: u64,
        /// The records to write.
        writes: Writes,
    },
    /// Send `NodeQuery::Probe` to the process that was registered last for this store.
    Probe {
        /// The number to answer with.
        probe: u64,
        /// The process to ask.
        to: StoreBoot,
    },
    /// Ask where the logs of these shards end (`NodeQuery::Gather`).
    Gather {
        /// The number to answer with; several stores are asked under one.
        gather: u64,
        /// The process to ask.
        to: StoreBoot,
        /// The shards to ask for.
        shards: Vec<ShardId>,
    },
    /// Ask the primary to append no more (`NodeQuery::StepDown`).
    StepDown {
        /// The primary.
        to: StoreBoot,
        /// The shard to be handed over.
        shard: ShardId,
        /// The epoch in which the process is primary.
        epoch: Epoch,
    },
    /// Log this decision.
    Decision(Decision),
    /// Exit with code 2: the cluster was created with other settings than this process was given.
    /// The text is the difference, for the error message.
    Exit(String),
}

/// The writes of one transaction. `expect` is the mod_revision to compare, 0 for "no such key".
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Writes {
    /// The cluster's settings, if the key does not exist.
    Meta(Meta),
    /// A store's new status.
    Store {
        /// The store.
        store: StoreId,
        /// The mod_revision of its record.
        expect: u64,
        /// The new record.
        record: StoreRecord,
    },
    /// A store's last status: it leaves the cluster.
    Removal(Box<StoreRemoval>),
    /// At most [`Settings::shards_per_txn`] pairs of (expect, new record).
    Shards(Vec<(u64, ShardRecord)>),
    /// A promotion with a loss.
    AcceptedLoss(Box<AcceptedLoss>),
}

/// A shard's new record, together with the record of a loss that is kept for good.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct AcceptedLoss {
    /// The mod_revision of the shard's record.
    pub expect: u64,
    /// The shard's new record.
    pub record: ShardRecord,
    /// The loss.
    pub loss: LossRecord,
    /// The mod_revision of the operator's intent that this transaction carries out and deletes;
    /// `None` if no operator was asked.
    pub intent: Option<u64>,
}

/// A store's new record, together with the end of the intents about the store.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct StoreRemoval {
    /// The store.
    pub store: StoreId,
    /// The mod_revision of its record.
    pub expect: u64,
    /// The new record.
    pub record: StoreRecord,
    /// The mod_revision of the operator's intent that this transaction carries out and deletes.
    pub intent: u64,
    /// The mod_revision of the drain intent that is deleted with it, if there is one.
    pub drain: Option<u64>,
}

impl Writes {
    /// The shard records among the writes, each with the mod_revision to compare.
    fn shards(&self) -> Vec<(u64, &ShardRecord)> {
        match self {
            Self::Meta(_) | Self::Store { .. } | Self::Removal(_) => vec![],
            Self::Shards(shards) => shards.iter().map(|(at, record)| (*at, record)).collect(),
            Self::AcceptedLoss(accepted) => vec![(accepted.expect, &accepted.record)],
        }
    }
}

/// etcd accepts 128 operations per transaction; one of them compares the term.
pub const SHARDS_PER_TXN: usize = 127;

// ---- settings ----------------------------------------------------------------------------------

/// The settings of the cluster that the flags ask for. The first leading coordinator writes them
/// into `meta`; from then on the flags must agree with `meta`.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Flags {
    /// The number of shards.
    pub shards: Option<u32>,
    /// The number of copies of each shard.
    pub replicas: Option<u8>,
    /// The number of in-sync members that a write needs.
    pub min_in_sync: Option<u8>,
    /// The time for which idempotency records are kept.
    pub idempotency_window_ms: Option<u64>,
    /// The most bytes of idempotency records that a shard keeps.
    pub idempotency_bytes: Option<u64>,
}

/// The settings of one coordinator.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The cluster that the flags ask for.
    pub flags: Flags,
    /// The uuid of the cluster, should this process be the one that creates it.
    pub new_cluster: u128,
    /// The settings of idempotency records of a new cluster, unless a flag overrides them.
    pub idempotency: idempotency::TokenSettings,
    /// Shards are placed as soon as this many nodes are registered. If it is `None`, they are
    /// placed when enough nodes are registered and none has joined for `join_wait_ms`.
    pub expect_nodes: Option<u32>,
    /// The time without a new node before shards are placed.
    pub join_wait_ms: u64,
    /// A node that is away for longer is replaced.
    pub rebuild_delay_ms: u64,
    /// The time to live of the nodes' leases.
    pub lease_ttl_ms: u64,
    /// The interval of probes of one process.
    pub probe_every_ms: u64,
    /// A probe without an answer fails after this.
    pub probe_timeout_ms: u64,
    /// A disk without a completed fsync for this long is treated like silence.
    pub fsync_age_max_ms: u64,
    /// The time that a gather waits for the last node.
    pub gather_ms: u64,
    /// The time that a shard waits for other members than a lone survivor that was restarted,
    /// counted from the survivor's answer.
    pub lone_wait_ms: u64,
    /// The time for which a mass failure holds back new copies.
    pub guard_ms: u64,
    /// The time without a disruption before primaries are moved for balance.
    pub balance_after_ms: u64,
    /// Moves that are wanted have stalled if the map has not changed for this long.
    pub stalled_after_ms: u64,
    /// The interval of lists while no other reason asks for one.
    pub relist_every_ms: u64,
    /// Shards in one transaction: at most [`SHARDS_PER_TXN`].
    pub shards_per_txn: usize,
    /// The limits of the planner.
    pub planner: planner::PlannerLimits,
    /// Further waits and intervals.
    pub timing: CoordinatorTiming,
    /// A planted bug, in tests only.
    pub planted: Option<Planted>,
}

/// Waits and intervals of a coordinator, in milliseconds.
#[derive(Clone, Copy, Debug)]
pub struct CoordinatorTiming {
    /// A shard for which no primary was found is reviewed again after this.
    pub retry_ms: u64,
    /// A shard that has had no primary for this long is logged as leaderless: a shorter time is an
    /// ordinary failover.
    pub leaderless_ms: u64,
    /// A hand-over that is not complete after this is cancelled.
    pub hand_over_ms: u64,
    /// A node whose disk has been full for this long gets no copies, and leads no shard that others
    /// can lead.
    pub full_after_ms: u64,
    /// A primary whose shard has been frozen for this long is replaced, if another member reaches
    /// more of the cluster.
    pub cut_off_after_ms: u64,
    /// The least interval at which a shard is taken from a living primary that is cut off or
    /// resigns. It doubles each time up to `pace_ms_max`, and is reset after twice that.
    pub pace_ms: u64,
    /// The most that `pace_ms` grows to.
    pub pace_ms_max: u64,
    /// The interval of full reviews; every change causes one, too.
    pub review_every_ms: u64,
    /// A list without an answer is repeated after this.
    pub list_timeout_ms: u64,
    /// A list that failed is repeated after this.
    pub list_retry_ms: u64,
    /// The pause in proposals after one that failed for no reason that a list shows.
    pub pause_ms: u64,
    /// The least interval of plans while there are changes.
    pub plan_every_ms: u64,
    /// The interval of plans without changes.
    pub plan_idle_ms: u64,
    /// The interval at which suspect stores are asked whether all their copies have been replaced.
    pub ask_suspect_every_ms: u64,
    /// The second probe follows this soon after a first refusal.
    pub refused_again_ms: u64,
    /// The time for which a complaint about a store counts: nodes repeat theirs every second.
    pub complaint_ms: u64,
    /// After a pause this long of the coordinator's own process, open probes are reset, not counted
    /// against the nodes: their answers may be queued behind this event.
    pub own_pause_ms: u64,
    /// The time for which a report counts: nodes report every second, so an older report is
    /// outdated.
    pub report_ms: u64,
}

impl Default for CoordinatorTiming {
    fn default() -> Self {
        Self {
            retry_ms: 100,
            leaderless_ms: 1_000,
            hand_over_ms: 1_000,
            full_after_ms: 1_000,
            cut_off_after_ms: 2_000,
            pace_ms: 1_000,
            pace_ms_max: 60_000,
            review_every_ms: 100,
            list_timeout_ms: 5_000,
            list_retry_ms: 100,
            pause_ms: 200,
            plan_every_ms: 100,
            plan_idle_ms: 1_000,
            ask_suspect_every_ms: 1_000,
            refused_again_ms: 50,
            complaint_ms: 3_000,
            own_pause_ms: 500,
            report_ms: 3_000,
        }
    }
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            flags: Flags::default(),
            new_cluster: 0,
            idempotency: idempotency::TokenSettings::default(),
            expect_nodes: None,
            join_wait_ms: 3_000,
            rebuild_delay_ms: 600_000,
            lease_ttl_ms: 2_000,
            probe_every_ms: 200,
            probe_timeout_ms: 150,
            fsync_age_max_ms: 1_000,
            gather_ms: 50,
            lone_wait_ms: 60_000,
            guard_ms: 600_000,
            balance_after_ms: 5_000,
            stalled_after_ms: 60_000,
            relist_every_ms: 180_000,
            shards_per_txn: SHARDS_PER_TXN,
            planner: planner::PlannerLimits::default(),
            timing: CoordinatorTiming::default(),
            planted: None,
        }
    }
}

/// The settings of a new cluster without flags.
const SHARDS: u32 = 24;
const REPLICAS: u8 = 3;
const MIN_IN_SYNC: u8 = 2;

impl Flags {
    /// Checks that a cluster can have these settings. The error names the flag that is out of
    /// range, and its range.
    pub fn check(&self) -> Result<(), String> {
        let shards = self.shards.unwrap_or(SHARDS);
        let replicas = self.replicas.unwrap_or(REPLICAS);
        let min_in_sync = self.min_in_sync.unwrap_or(MIN_IN_SYNC.min(replicas));
        if !(1..=1 << 16).contains(&shards) {
            return Err(format!("--shards {shards}: give 1 to 65536"));
        }
        if replicas == 0 {
            return Err("--replicas 0: give at least 1".into());
        }
        if !(1..=replicas).contains(&min_in_sync) {
            return Err(format!("--min-in-sync {min_in_sync}: give 1 to --replicas ({replicas})"));
        }
        Ok(())
    }

    /// The difference between the cluster's settings and what the flags ask for, if there is one.
    pub fn difference(&self, meta: &Meta) -> Option<String> {
        let differs = |flag: &str, asked: Option<u64>, is: u64| {
            let wanted = asked.filter(|&asked| asked != is)?;
            Some(format!("{flag} is {wanted}, but this cluster was made with {is}"))
        };
        differs("--shards", self.shards.map(u64::from), meta.shards.into())
            .or_else(|| differs("--replicas", self.replicas.map(u64::from), meta.replicas.into()))
            .or_else(|| {
                differs("--min-in-sync", self.min_in_sync.map(u64::from), meta.min_in_sync.into())
            })
            .or_else(|| {
                let asked = self.idempotency_window_ms.map(|ms| ms / 1_000);
                differs("--idempotency-window", asked, meta.idempotency.window_ms / 1_000)
            })
            .or_else(|| {
                let is = meta.idempotency.bytes_max;
                differs("--idempotency-bytes", self.idempotency_bytes, is)
            })
    }
}

impl Settings {
    /// The `meta` record of a cluster that is created now.
    fn meta(&self) -> Meta {
        let replicas = self.flags.replicas.unwrap_or(REPLICAS);
        Meta {
            cluster: self.new_cluster,
            shards: self.flags.shards.unwrap_or(SHARDS),
            replicas,
            min_in_sync: self.flags.min_in_sync.unwrap_or(MIN_IN_SYNC.min(replicas)),
            hash: 1,
            incarnation: 1,
            idempotency: idempotency::TokenSettings {
                window_ms: self.flags.idempotency_window_ms.unwrap_or(self.idempotency.window_ms),
                bytes_max: self.flags.idempotency_bytes.unwrap_or(self.idempotency.bytes_max),
                ..self.idempotency
            },
        }
    }
}

// ---- the state machine -------------------------------------------------------------------------

/// The state machine of one coordinator process. See the module.
#[derive(Debug)]
pub struct Coordinator {
    settings: Settings,
    now: Now,
    /// The last number given to a probe, list, gather or proposal. No number is used twice,
    /// whatever the term, so an answer to a former leader matches nothing.
    next_id: u64,
    /// The state of a leader; `None` in a standby.
    leader: Option<LeaderState>,
}

/// The inputs and outputs of one call of `handle`.
struct CoordinatorTurn<'a> {
    now: Now,
    settings: &'a Settings,
    next_id: &'a mut u64,
    effects: &'a mut Vec<Effect>,
}

impl CoordinatorTurn<'_> {
    fn reborrow(&mut self) -> CoordinatorTurn<'_> {
        CoordinatorTurn { next_id: self.next_id, effects: self.effects, ..*self }
    }

    fn fresh_id(&mut self) -> u64 {
        *self.next_id += 1;
        *self.next_id
    }

    fn log(&mut self, decision: Decision) {
        self.effects.push(Effect::Decision(decision));
    }
}

impl Coordinator {
    /// A standby.
    pub fn new(settings: Settings) -> Self {
        Self { settings, now: Now(0), next_id: 0, leader: None }
    }

    /// Handles one event, and appends the effects that follow from it.
    pub fn handle(&mut self, now: Now, event: Event, effects: &mut Vec<Effect>) {
        self.now = self.now.max(now);
        let mut turn = CoordinatorTurn {
            now: self.now,
            settings: &self.settings,
            next_id: &mut self.next_id,
            effects,
        };
        match event {
            Event::Elected { term } => {
                if self.leader.as_ref().is_none_or(|leader| leader.term() != term) {
                    self.leader = Some(LeaderState::new(term, &mut turn));
                }
            }
            Event::Deposed => self.leader = None,
            event => {
                if let Some(leader) = &mut self.leader {
                    leader.on(&mut turn, event);
                }
            }
        }
        if let Some(leader) = &mut self.leader {
            leader.review(&mut turn);
        }
    }

    /// The time at which to call `handle` with `Tick`, if no other event comes before. `None` in a
    /// standby.
    pub fn next_deadline(&self) -> Option<Now> {
        Some(self.leader.as_ref()?.next_deadline(&self.settings))
    }

    /// Returns whether this process leads and has loaded all records.
    pub fn is_leading(&self) -> bool {
        self.leader.as_ref().is_some_and(LeaderState::is_listed)
    }

    /// The nodes that the first placement still waits for, if it does: for `/readyz` and `dkc
    /// status`.
    pub fn waits_for(&self) -> Option<PlacementWait> {
        self.leader.as_ref()?.waits_for()
    }

    /// The progress of moves, as of the last event; `None` in a standby.
    pub fn moves(&self) -> Option<MovesStatus> {
        Some(self.leader.as_ref()?.moves(self.now, &self.settings))
    }

    /// The inputs of the planner, for a forecast; `None` unless this process leads and has probed
    /// all nodes.
    pub fn plan_view(&mut self) -> Option<planner::PlanView> {
        // Nothing is decided, so there are no effects.
        let mut turn = CoordinatorTurn {
            now: self.now,
            settings: &self.settings,
            next_id: &mut self.next_id,
            effects: &mut Vec::new(),
        };
        self.leader.as_mut()?.plan_view(&mut turn)
    }
}
