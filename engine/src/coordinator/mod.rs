//! One coordinator process: places shards, notices dead primaries, promotes, and keeps replicas
//! where the planner wants them.
//!
//! ```text
//!   driver                                        coordinator machine
//!   ──────                                        ───────────────────
//!   etcd    ── Elected, Listed, Changed ───────▶  what is
//!           ◀── List, Propose ─────────────────   what should be, by compare-and-set
//!           ── Proposed ───────────────────────▶
//!   nodes   ◀── Probe, Gather, StepDown ───────
//!           ── Probed, Gathered, SteppedDown, Reported ──▶
//!   log     ◀── Story ─────────────────────────
//! ```
//!
//! **Level-triggered**: it compares what etcd and the nodes say with what should be, and asks for
//! the difference; nothing that matters is kept only here, so a newly elected process begins with a
//! `List` and needs no more. What a newcomer would get wrong:
//!
//! * **It guards no data.** Epochs and in-sync sets do (DESIGN §6); a wrong suspicion, two leading
//!   coordinators or a proposal that takes effect an hour late cost milliseconds, never counts.
//! * **A vanished lease is not death, and a report is not death.** Both are reasons to believe the
//!   coordinator's own probe (`health`).
//! * **A failed or unknown proposal is settled by reading**, never by trying it again blindly. Its
//!   shards rest until a `List` begun afterwards has come back.
//!
//! The rooms: `records` keeps what etcd says; `health` probes; `promotion` finds new primaries, and `accepted`
//! those that an operator names;
//! `upkeep` places, recruits and releases with the help of [`crate::planner`]; [`story`] tells it.
//!
//! **What the driver promises.** Every `Propose` is answered by exactly one `Proposed`, never
//! retried. Every `List` by one `Listed`, from linearizable reads begun after the effect. Probes and
//! gathers may stay unanswered: this machine has time-outs of its own. All effects may be performed
//! in any order and side by side.

pub mod story;

mod accepted;
mod choice;
mod health;
mod office;
mod promotion;
mod records;
mod reports;
mod upkeep;

#[cfg(test)]
mod tests;

use crate::config::ShardConfig;
use crate::idempotency;
use crate::ids::{Epoch, Now, Seq, ShardId, StoreBoot, StoreId};
use crate::message::{Report, ShardEnd};
use crate::node::CasOutcome;
use crate::planner;
use crate::planted::Planted;
use crate::records::{LossRecord, Meta, NameRecord, NodeRecord, PromoteIntent, StoreRecord};

use office::Office;

pub use story::{Story, Waits};

/// A value with its place in etcd's history.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Kept<V> {
    pub value: V,
    /// Where its key was made.
    pub created: u64,
    /// Its last change: what a compare-and-set compares.
    pub modified: u64,
}

/// Everything there is. May be put together from several linearizable reads.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Listing {
    /// The lowest revision among the reads.
    pub revision: u64,
    pub meta: Option<Kept<Meta>>,
    pub stores: Vec<(StoreId, Kept<StoreRecord>)>,
    pub names: Vec<(String, Kept<NameRecord>)>,
    pub nodes: Vec<(StoreId, Kept<NodeRecord>)>,
    pub shards: Vec<Kept<ShardConfig>>,
    /// Stores that an operator wants emptied.
    pub drains: Vec<(StoreId, Kept<()>)>,
    /// Shards that an operator wants led, whatever is lost.
    pub promotes: Vec<(ShardId, Kept<PromoteIntent>)>,
}

/// One record changed, as a watch says it. `None`: its key is gone.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Change {
    Meta(Kept<Meta>),
    Store(StoreId, Option<Kept<StoreRecord>>),
    Name(String, Option<Kept<NameRecord>>),
    Node(StoreId, Option<Kept<NodeRecord>>),
    Shard(ShardId, Option<Kept<ShardConfig>>),
    Drain(StoreId, Option<Kept<()>>),
    Promote(ShardId, Option<Kept<PromoteIntent>>),
}

/// Everything that can happen to a coordinator.
#[derive(Clone, Debug)]
pub enum Event {
    /// The time given by `next_deadline` has come.
    Tick,

    // -- etcd
    /// This process made the `coordinator` key: its create_revision is the term. Until then the
    /// machine does nothing at all (a standby).
    Elected { term: u64 },
    /// The key is gone, or nobody can say that it stands. (Hearing it late is harmless.)
    Deposed,
    /// Answers `List`; none if etcd did not answer, and the machine asks again a little later.
    Listed { list: u64, listing: Option<Listing> },
    /// At `revision` one record changed. Hints: they may come late, twice, or not at all.
    Changed { revision: u64, change: Change },
    /// Changes may have been missed: the watch began anew.
    WatchBroke,
    /// Answers `Propose`.
    Proposed { proposal: u64, outcome: CasOutcome },

    // -- nodes
    /// Answers `Probe`.
    Probed { probe: u64, result: ProbeResult },
    /// Answers `Gather`; none if that very process did not answer.
    Gathered { gather: u64, store: StoreId, ends: Option<Vec<ShardEnd>> },
    /// Answers `StepDown`: where the log ends that orders no more; none if the node does not lead
    /// the shard, or did not answer.
    SteppedDown { shard: ShardId, epoch: Epoch, end: Option<(Epoch, Seq)> },
    /// What a node says unasked, of itself and of its peers.
    Reported { from: StoreBoot, report: Report },
    /// Stores that refused or reset a gateway's connection.
    GatewayReported { suspects: Vec<StoreId> },
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum ProbeResult {
    /// Somebody answered, and says who it is and when its disk last answered.
    Alive { from: StoreBoot, fsync_age_ms: u64 },
    /// Nothing listens there.
    Refused,
    /// The driver has given up. (The machine does so by itself after `probe_timeout_ms`.)
    Silent,
}

/// Everything a coordinator can ask of its driver.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Effect {
    /// Read everything, linearizably, beginning now.
    List { list: u64 },
    /// Write in one transaction, if every record is still where it is said to be and the
    /// `coordinator` key still has `term` as its create_revision.
    Propose { proposal: u64, term: u64, writes: Writes },
    /// Ask the process that was registered last for this store (`NodeQuery::Probe`).
    Probe { probe: u64, to: StoreBoot },
    /// Ask where the logs of these shards end (`NodeQuery::Gather`).
    Gather { gather: u64, to: StoreBoot, shards: Vec<ShardId> },
    /// Ask the primary to order no more (`NodeQuery::StepDown`).
    StepDown { to: StoreBoot, shard: ShardId, epoch: Epoch },
    /// For the log.
    Story(Story),
    /// The cluster was made with other settings than this process was given: say so, exit code 2.
    Exit { difference: String },
}

/// What one transaction writes. `expect` is the mod_revision to compare, 0 for "no such key".
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Writes {
    /// The cluster's settings, if there are none.
    Meta(Meta),
    Store {
        store: StoreId,
        expect: u64,
        record: StoreRecord,
    },
    /// At most [`Settings::shards_per_txn`]: (expect, config).
    Shards(Vec<(u64, ShardConfig)>),
    Accepted(Box<Accepted>),
}

/// One shard's record, with a loss that stays on record for good.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Accepted {
    pub expect: u64,
    pub config: ShardConfig,
    pub loss: LossRecord,
    /// The revision of the operator's intent that this obeys and ends. None: no operator was asked.
    pub intent: Option<u64>,
}

impl Writes {
    /// The shard records among them, each with what is compared.
    fn shards(&self) -> Vec<(u64, &ShardConfig)> {
        match self {
            Self::Meta(_) | Self::Store { .. } => vec![],
            Self::Shards(shards) => shards.iter().map(|(at, config)| (*at, config)).collect(),
            Self::Accepted(accepted) => vec![(accepted.expect, &accepted.config)],
        }
    }
}

/// etcd takes 128 operations per transaction; one compares the term.
pub const SHARDS_PER_TXN: usize = 127;

// ---- settings ----------------------------------------------------------------------------------

/// What the cluster is asked to be. The first leading coordinator writes it into `meta`; afterwards
/// what is given must agree.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Flags {
    pub shards: Option<u32>,
    pub replicas: Option<u8>,
    pub min_in_sync: Option<u8>,
    pub idempotency_window_ms: Option<u64>,
    pub idempotency_bytes: Option<u64>,
}

/// What is tuned, and what a test makes small.
#[derive(Clone, Debug)]
pub struct Settings {
    pub flags: Flags,
    /// The uuid of the cluster, should this process be the one that makes it.
    pub new_cluster: u128,
    /// How a new cluster keeps idempotency records, but for what the flags say.
    pub idempotency: idempotency::Settings,
    /// Shards are placed once so many nodes are registered …
    pub expect_nodes: Option<u32>,
    /// … or, if that was not said, enough are and none came for this long.
    pub newcomer_wait_ms: u64,
    /// A node that is away for longer is replaced.
    pub rebuild_delay_ms: u64,
    /// The time to live of the nodes' leases.
    pub lease_ttl_ms: u64,
    pub probe_every_ms: u64,
    pub probe_timeout_ms: u64,
    /// A disk that has not answered for this long is as bad as silence.
    pub fsync_age_max_ms: u64,
    /// How long a gather waits for the last node.
    pub gather_ms: u64,
    /// How long a shard waits for other members than a lone survivor that was restarted, from its
    /// answer on.
    pub lone_wait_ms: u64,
    /// How long a mass failure holds back new copies.
    pub guard_ms: u64,
    /// Everything must have been quiet for this long before primaries are moved for balance.
    pub balance_after_ms: u64,
    pub relist_every_ms: u64,
    /// Shards in one transaction: at most [`SHARDS_PER_TXN`].
    pub shards_per_txn: usize,
    pub planner: planner::Limits,
    pub timing: Timing,
    pub planted: Option<Planted>,
}

/// Waits and intervals, in milliseconds.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// A shard that could not be given a primary is looked at again after this.
    pub retry_ms: u64,
    /// It is told that a shard has no primary once it has had none for so long: less is an ordinary failover.
    pub leaderless_ms: u64,
    /// A hand-over that has not come about by then is given up.
    pub hand_over_ms: u64,
    /// A node whose disk has been full for so long is given nothing, and leads nothing that others can.
    pub full_after_ms: u64,
    /// A primary whose shard has been frozen for this long is replaced, if another member hears more of the cluster.
    pub cut_off_after_ms: u64,
    /// A shard is taken from a living primary that is cut off or resigns no more often than this …
    pub pace_ms: u64,
    /// … twice as seldom each time, up to this. It is forgotten after twice that.
    pub pace_ms_max: u64,
    /// Everything is looked at this often, and on every change.
    pub look_every_ms: u64,
    /// A list without an answer is asked for again after this …
    pub list_timeout_ms: u64,
    /// … and one that failed after this.
    pub list_retry_ms: u64,
    /// Nothing is proposed for this long after a proposal that failed for no reason that a list shows.
    pub pause_ms: u64,
    /// Plans are made no more often than this after news …
    pub plan_every_ms: u64,
    /// … and this often without.
    pub plan_idle_ms: u64,
    /// Suspect stores are asked this often whether all that they hold is filled anew.
    pub ask_suspect_every_ms: u64,
    /// After a first refusal the second probe follows this soon.
    pub refused_again_ms: u64,
    /// A complaint counts for so long: nodes repeat theirs every second.
    pub complaint_ms: u64,
    /// A coordinator that stood still for this long heard no answers in the meantime.
    pub away_ms: u64,
    /// A report counts for so long: nodes report every second, and one that missed two has perhaps nothing to say.
    pub report_ms: u64,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            retry_ms: 100,
            leaderless_ms: 1_000,
            hand_over_ms: 1_000,
            full_after_ms: 1_000,
            cut_off_after_ms: 2_000,
            pace_ms: 1_000,
            pace_ms_max: 60_000,
            look_every_ms: 100,
            list_timeout_ms: 5_000,
            list_retry_ms: 100,
            pause_ms: 200,
            plan_every_ms: 100,
            plan_idle_ms: 1_000,
            ask_suspect_every_ms: 1_000,
            refused_again_ms: 50,
            complaint_ms: 3_000,
            away_ms: 500,
            report_ms: 3_000,
        }
    }
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            flags: Flags::default(),
            new_cluster: 0,
            idempotency: idempotency::Settings::default(),
            expect_nodes: None,
            newcomer_wait_ms: 3_000,
            rebuild_delay_ms: 600_000,
            lease_ttl_ms: 2_000,
            probe_every_ms: 200,
            probe_timeout_ms: 150,
            fsync_age_max_ms: 1_000,
            gather_ms: 50,
            lone_wait_ms: 60_000,
            guard_ms: 600_000,
            balance_after_ms: 5_000,
            relist_every_ms: 180_000,
            shards_per_txn: SHARDS_PER_TXN,
            planner: planner::Limits::default(),
            timing: Timing::default(),
            planted: None,
        }
    }
}

/// How a cluster is made where nothing is said.
const SHARDS: u32 = 24;
const REPLICAS: u8 = 3;
const MIN_IN_SYNC: u8 = 2;

impl Flags {
    /// Whether a cluster can be like this; if not, why.
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

    /// In what the cluster differs from what is asked for, if it does.
    pub fn difference(&self, meta: &Meta) -> Option<String> {
        let says = |flag: &str, asked: Option<u64>, is: u64| {
            let differs = asked.filter(|&asked| asked != is)?;
            Some(format!("{flag} is {differs}, but this cluster was made with {is}"))
        };
        says("--shards", self.shards.map(u64::from), meta.shards.into())
            .or_else(|| says("--replicas", self.replicas.map(u64::from), meta.replicas.into()))
            .or_else(|| {
                says("--min-in-sync", self.min_in_sync.map(u64::from), meta.min_in_sync.into())
            })
            .or_else(|| {
                let asked = self.idempotency_window_ms.map(|ms| ms / 1_000);
                says("--idempotency-window", asked, meta.idempotency.window_ms / 1_000)
            })
            .or_else(|| {
                let is = meta.idempotency.bytes_max;
                says("--idempotency-bytes", self.idempotency_bytes, is)
            })
    }
}

impl Settings {
    /// The record of a cluster that is made now.
    fn meta(&self) -> Meta {
        let replicas = self.flags.replicas.unwrap_or(REPLICAS);
        Meta {
            cluster: self.new_cluster,
            shards: self.flags.shards.unwrap_or(SHARDS),
            replicas,
            min_in_sync: self.flags.min_in_sync.unwrap_or(MIN_IN_SYNC.min(replicas)),
            hash: 1,
            incarnation: 1,
            idempotency: idempotency::Settings {
                window_ms: self.flags.idempotency_window_ms.unwrap_or(self.idempotency.window_ms),
                bytes_max: self.flags.idempotency_bytes.unwrap_or(self.idempotency.bytes_max),
                ..self.idempotency
            },
        }
    }
}

// ---- the machine -------------------------------------------------------------------------------

/// The machine. See the module.
#[derive(Debug)]
pub struct Coordinator {
    settings: Settings,
    now: Now,
    /// Numbers of probes, lists, gathers and proposals: never used twice, whatever the term, so an
    /// answer from a former one is nobody's.
    next_id: u64,
    /// What this process does while it leads.
    office: Option<Office>,
}

/// What one call of `handle` works with.
struct Turn<'a> {
    now: Now,
    settings: &'a Settings,
    next_id: &'a mut u64,
    effects: &'a mut Vec<Effect>,
}

impl Turn<'_> {
    fn fresh_id(&mut self) -> u64 {
        *self.next_id += 1;
        *self.next_id
    }

    fn tell(&mut self, story: Story) {
        self.effects.push(Effect::Story(story));
    }
}

impl Coordinator {
    pub fn new(settings: Settings) -> Self {
        Self { settings, now: Now(0), next_id: 0, office: None }
    }

    pub fn handle(&mut self, now: Now, event: Event, effects: &mut Vec<Effect>) {
        self.now = self.now.max(now);
        let mut turn =
            Turn { now: self.now, settings: &self.settings, next_id: &mut self.next_id, effects };
        match event {
            Event::Elected { term } => {
                if self.office.as_ref().is_none_or(|office| office.term() != term) {
                    self.office = Some(Office::new(term, &mut turn));
                }
            }
            Event::Deposed => self.office = None,
            event => {
                if let Some(office) = &mut self.office {
                    office.on(&mut turn, event);
                }
            }
        }
        if let Some(office) = &mut self.office {
            office.review(&mut turn);
        }
    }

    /// When to call again with `Tick`, if nothing happens before.
    pub fn next_deadline(&self) -> Option<Now> {
        Some(self.office.as_ref()?.next_deadline(&self.settings))
    }

    /// Whether this process leads and has read everything.
    pub fn is_leading(&self) -> bool {
        self.office.as_ref().is_some_and(Office::is_listed)
    }

    /// What the first placing waits for, if it does: for `/readyz` and `dkc status`.
    pub fn waits_for(&self) -> Option<Waits> {
        self.office.as_ref()?.waits_for()
    }
}
