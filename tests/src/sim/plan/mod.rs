//! The choices of a seed before its run begins: sizes, speeds, and which faults it may suffer.
//!
//! Swarm testing: every seed draws a subset of the faults and its own tuning, because a run with
//! everything at once rarely gets deep into any one of them.

pub mod disks;
pub mod etcd_loss;
pub mod faults;
pub mod large;
pub mod leaps;
pub mod log;
pub mod operator;
pub mod reorder;
mod settings;
pub mod splits;
pub mod tokens;

use engine::coordinator::Flags;
use engine::ids::{Slot, Slots};
use engine::key::KEY_BYTES_MAX;
use engine::node::{Settings, pending_beside_log};
use engine::planted::Planted;
use engine::{batcher, coordinator};

use super::draws::{Drawings, Draws};
use super::rng::Rng;
use disks::DiskPlan;
use etcd_loss::EtcdLossPlan;
use faults::FaultKind;
use leaps::LeapPlan;
use log::LogSizes;
use operator::OperatorPlan;
use reorder::ReorderPlan;
use settings::{Shape, coordinator_settings, gateway_settings, node_settings};
use splits::SplitPlan;
use tokens::TokenPlan;

/// The plan of a run. Times are in virtual microseconds.
#[derive(Clone, Debug)]
pub struct Plan {
    pub seed: u64,
    pub planted: Option<Planted>,
    pub nodes: u16,
    /// The nodes that start with the run; the others join later.
    pub first_nodes: u16,
    /// The number of zones; the nodes are dealt out to them.
    pub zones: u16,
    pub gateways: u8,
    pub coordinators: u8,
    pub shards: u16,
    pub replicas: usize,
    pub min_in_sync: usize,

    pub clients: usize,
    pub think: u64,
    pub digit_counters: usize,
    pub mixed_counters: usize,
    /// Names of counters are padded to this many bytes.
    pub name_bytes: usize,
    pub reads_percent: u64,
    /// The percentage of reads that accept a stale value; and the stream that decides which. The
    /// stream is separate from the others, so that seeds without stale reads keep their runs.
    pub bounded_percent: u64,
    pub staleness: Rng,
    pub tokens: TokenPlan,

    pub network_delay: u64,
    pub jitter: bool,
    pub fsync: u64,
    pub log: LogSizes,
    /// The factor by which each node's fsyncs are slower, for good.
    pub slowness: Vec<u64>,
    pub clocks: Vec<NodeClock>,
    pub leaps: LeapPlan,
    /// Every message is passed as the bytes that production sends.
    pub codec: bool,
    pub reorder: ReorderPlan,
    pub slow_etcd: bool,
    pub lease_ttl: u64,

    pub faults: Vec<FaultKind>,
    pub fault_every: u64,
    pub disks: DiskPlan,
    pub operator: OperatorPlan,
    pub etcd_loss: EtcdLossPlan,
    pub splits: SplitPlan,
    /// The random coordinator promotes for no reason, one time in so many thousand looks.
    pub spurious_permille: u64,
    /// A second coordinator acts at random.
    pub chaos: bool,
    /// The coordinator places the shards; `false`: they exist at the start, at random places.
    pub bootstraps: bool,
    pub faults_until: u64,
    pub load_until: u64,
    /// The time by which everything must be answered.
    pub heals_by: u64,

    pub node: Settings,
    /// Every other node flushes only when it must: entries that a copy has applied are still in its
    /// table when it is replaced.
    pub lazy_flushes: bool,
    pub gateway: batcher::Settings,
    /// The longest turn of a gateway: requests of one turn are sent together.
    pub turn: u64,
    /// The longest turn of a node: what its events lead to, is done together. 0: each event is a
    /// turn.
    pub node_turn: u64,
    /// The percentage of the operations of one turn that join the request before them.
    pub joined_percent: u64,
    pub coordinator: coordinator::Settings,
    /// The draws of the limits and waits above.
    pub drawings: Drawings,
}

/// A node's wall clock.
#[derive(Clone, Copy, Debug, Default)]
pub struct NodeClock {
    /// The offset of the clock, in milliseconds.
    pub skew_ms: i64,
    /// The rate by which the clock is faster than time, in millionths.
    pub drift_ppm: i64,
}

impl Plan {
    pub fn from_seed(seed: u64, planted: Option<Planted>, rng: &mut Rng) -> Self {
        let mut faults: Vec<FaultKind> = FaultKind::ALL.to_vec();
        rng.shuffle(&mut faults);
        faults.truncate(rng.between(2, 6) as usize);
        if rng.percent(25) {
            faults.truncate(1);
            faults.extend(FaultKind::DEPOSE);
        }
        let faults_until = rng.between(2_500_000, 5_000_000);
        let shards = rng.between(1, 3) as u16;
        let mut staleness = Rng::new(seed.rotate_left(32) ^ 0x57A1_E0F5_EED5);
        let bounded_percent = if staleness.percent(50) { staleness.between(10, 90) } else { 0 };
        let lazy_flushes = staleness.percent(20);
        let mut draws = Draws::from_seed(seed);
        let shape = Shape::draw(&mut draws);
        let tokens = TokenPlan::from_seed(seed);
        let lease_ttl = 1_000 * draws.wait("lease_ttl_ms", 500, 2_000, 2_000);
        let log = LogSizes::draw(&mut draws);
        let mut node = node_settings(&mut draws, &tokens, shape, planted);
        let log_bytes = log.keep_bytes.saturating_add(log.spare_bytes());
        node.pending_bytes_max = pending_beside_log(node.pending_bytes_max, log_bytes);
        let gateway = gateway_settings(&mut draws, &tokens, &node, planted);
        let disks = DiskPlan::from_seed(seed, shape.min_in_sync.into());
        let operator = OperatorPlan::from_seed(seed, &disks);
        let etcd_loss = EtcdLossPlan::from_seed(seed, faults_until, &disks, &operator);
        let coordinator =
            coordinator_settings(&mut draws, &tokens, shape, (shards, lease_ttl), planted);
        let leaps = LeapPlan::draw(&mut draws, faults_until);
        let node_turn = if draws.rng.percent(30) { 0 } else { draws.log_uniform(10, 5_000) };
        let mut plan = Self {
            seed,
            planted,
            nodes: shape.nodes.into(),
            first_nodes: shape.nodes.into(),
            // Two, so that spreading over zones and balancing conflict.
            zones: 2,
            gateways: rng.between(1, 3) as u8,
            coordinators: rng.between(1, 2) as u8,
            shards,
            replicas: shape.replicas.into(),
            min_in_sync: shape.min_in_sync.into(),

            clients: rng.between(6, 16) as usize,
            think: rng.between(2_000, 20_000),
            digit_counters: rng.between(2, 8) as usize,
            mixed_counters: rng.between(1, 3) as usize,
            name_bytes: name_bytes(&mut draws),
            reads_percent: rng.between(10, 60),
            bounded_percent,
            lazy_flushes,
            staleness,
            tokens,

            network_delay: rng.between(100, 1_000),
            jitter: rng.percent(50),
            fsync: rng.between(100, 3_000),
            log,
            slowness: slowness(&mut draws, shape.nodes),
            clocks: clocks(&mut draws, shape.nodes),
            leaps,
            codec: draws.rng.percent(20),
            reorder: ReorderPlan::from_seed(seed, &mut draws),
            slow_etcd: rng.percent(40),
            lease_ttl,

            faults,
            fault_every: rng.between(100_000, 800_000),
            disks,
            operator,
            etcd_loss,
            splits: SplitPlan::from_seed(seed),
            chaos: rng.percent(50),
            bootstraps: rng.percent(30) && shape.nodes >= shape.replicas,
            spurious_permille: if rng.percent(50) { rng.between(1, 40) } else { 0 },
            faults_until,
            load_until: faults_until + 500_000,
            // A peer that was ejected again and again waits for a minute before it is added; and a
            // lone survivor waits for the others.
            heals_by: faults_until + 130_000_000 + 1_000 * coordinator.lone_wait_ms,

            node,
            gateway,
            turn: rng.between(1, 2_000),
            node_turn,
            joined_percent: rng.below(80),
            coordinator,
            drawings: draws.drawings,
        };
        plan.heals_by += plan.backlog();
        plan
    }

    /// With groups of one record each record takes an fsync. As shipped all records
    /// that arrive during an fsync are one group, however slow the disk; here a disk that is slow
    /// for good has minutes of work left when the load ends.
    fn backlog(&self) -> u64 {
        let slowest = self.slowness.iter().copied().max().unwrap_or(1);
        let is_small = self.node.sizes.group_bytes_max < 1_024;
        if is_small { BACKLOG_GROUPS * self.fsync * slowest } else { 0 }
    }

    /// A healthy cluster under load, with the settings that are shipped: for measuring.
    pub fn quiet(seed: u64, rng: &mut Rng) -> Self {
        let plan = Self::from_seed(seed, None, rng);
        let (nodes, shards) = (5, 12);
        let flags = Flags { shards: Some(shards.into()), ..Flags::default() };
        Self {
            nodes,
            first_nodes: nodes,
            replicas: 3,
            min_in_sync: 2,
            gateways: 2,
            coordinators: 2,
            name_bytes: 0,
            log: LogSizes::default(),
            slowness: vec![1; nodes.into()],
            clocks: vec![NodeClock::default(); nodes.into()],
            leaps: LeapPlan::default(),
            codec: false,
            reorder: ReorderPlan { on: false, ..plan.reorder },
            gateway: batcher::Settings::default(),
            shards,
            bounded_percent: 0,
            tokens: TokenPlan { clients: 0, ..plan.tokens },
            network_delay: 300,
            jitter: false,
            fsync: 500,
            slow_etcd: false,
            lease_ttl: 2_000_000,
            faults: vec![],
            disks: DiskPlan { faults: vec![], ..plan.disks },
            operator: OperatorPlan { every: None, ..plan.operator },
            etcd_loss: EtcdLossPlan { at: None, ..plan.etcd_loss },
            splits: SplitPlan { every: None, ..plan.splits },
            chaos: false,
            bootstraps: true,
            faults_until: u64::MAX,
            load_until: u64::MAX,
            heals_by: u64::MAX,
            node: Settings::default(),
            coordinator: coordinator::Settings {
                flags,
                expect_nodes: Some(nodes.into()),
                ..coordinator::Settings::default()
            },
            ..plan
        }
    }

    /// Extends the faults, so that they last until this time at least.
    pub fn last_until(&mut self, until: u64) {
        let more = until.saturating_sub(self.faults_until);
        self.faults_until += more;
        self.load_until += more;
        self.heals_by += more;
    }

    pub fn node(&self, index: usize) -> Settings {
        let mut settings = self.node.clone();
        if self.lazy_flushes && index % 2 == 1 {
            settings.flush_after_ms = 60_000;
            settings.table_bytes_max = 64 << 20;
        }
        settings
    }

    pub fn slots(&self, index: u16) -> Slots {
        let edge = |index: u32| index * 65_536 / u32::from(self.shards);
        let (lo, hi) = (edge(u32::from(index)), edge(u32::from(index) + 1) - 1);
        Slots { lo: lo as u16, hi: hi as u16 }
    }

    pub fn shard_of(&self, slot: Slot) -> Slots {
        (0..self.shards)
            .map(|index| self.slots(index))
            .find(|slots| slots.contains(slot))
            .expect("the shards cover every slot")
    }
}

/// More than the most that were seen waiting on a node when the load ended: 1,200.
const BACKLOG_GROUPS: u64 = 2_000;

/// Mostly the shortest; otherwise up to what is legal.
fn name_bytes(draws: &mut Draws) -> usize {
    let long = draws.rng.percent(if draws.has_tight_log() { 75 } else { 25 });
    let bytes = if long { draws.log_uniform(8, KEY_BYTES_MAX as u64) } else { 0 };
    draws.note("name_bytes", bytes, 0);
    bytes as usize
}

/// Mostly all alike; otherwise one disk is slow for good.
fn slowness(draws: &mut Draws, nodes: u8) -> Vec<u64> {
    let mut all = vec![1; nodes.into()];
    if draws.rng.percent(15) {
        let at = draws.rng.index(all.len());
        all[at] = draws.log_uniform(4, 64);
    }
    draws.note("slowest_disk", all.iter().copied().max().unwrap_or(1), 1);
    all
}

/// Mostly right to the second; otherwise hours or days off, and drifting.
fn clocks(draws: &mut Draws, nodes: u8) -> Vec<NodeClock> {
    let far = draws.rng.percent(20);
    // A single clock that is wrong is outvoted; with several the shard's time may be anything.
    let alone = draws.rng.percent(50).then(|| draws.rng.below(nodes.into()));
    let clock = |at: u8| {
        let mut clock = NodeClock { skew_ms: draws.rng.below(2_000) as i64, drift_ppm: 0 };
        if far && alone.map_or_else(|| draws.rng.percent(50), |alone| alone == u64::from(at)) {
            // A clock that is ahead does harm: requests are too old for it.
            let least = if alone.is_some() { DAY_MS / 24 } else { 10_000 };
            let off = draws.log_uniform(least, 3 * DAY_MS) as i64;
            let ahead = if alone.is_some() { 80 } else { 50 };
            clock.skew_ms = if draws.rng.percent(ahead) { off } else { -off };
            clock.drift_ppm = draws.rng.between(0, 400_000) as i64 - 200_000;
        }
        clock
    };
    let clocks: Vec<NodeClock> = (0..nodes).map(clock).collect();
    let farthest = clocks.iter().map(|clock| clock.skew_ms.unsigned_abs()).max().unwrap_or(0);
    draws.note("clock_off_ms", if far { farthest } else { 0 }, 0);
    clocks
}

const DAY_MS: u64 = 24 * 3_600_000;
