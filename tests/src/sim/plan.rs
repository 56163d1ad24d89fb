//! What a seed decides before its run begins: sizes, speeds, and which faults it may suffer.
//!
//! Swarm testing: every seed draws a subset of the faults and its own tuning, because a run with
//! everything at once rarely gets deep into any one of them.

use engine::batcher;
use engine::coordinator::Flags;
use engine::ids::{Slot, Slots};
use engine::node::Settings;
use engine::planted::Planted;

use super::disk_faults::DiskPlan;
use super::faults::Kind;
use super::rng::Rng;
use super::token_clients::TokenPlan;

/// Times are in virtual microseconds.
#[derive(Clone, Debug)]
pub struct Plan {
    pub seed: u64,
    pub planted: Option<Planted>,
    pub nodes: u8,
    pub gateways: u8,
    pub coordinators: u8,
    pub shards: u16,
    pub replicas: usize,
    pub min_in_sync: usize,

    pub clients: usize,
    pub think: u64,
    pub digit_counters: usize,
    pub mixed_counters: usize,
    pub reads_percent: u64,
    /// Of the reads, how many are content with a stale value; and the stream that decides which. It is
    /// apart from the others, so that seeds without any keep their runs.
    pub bounded_percent: u64,
    pub staleness: Rng,
    pub tokens: TokenPlan,

    pub network_delay: u64,
    pub jitter: bool,
    pub fsync: u64,
    pub slow_etcd: bool,
    pub lease_ttl: u64,

    pub faults: Vec<Kind>,
    pub fault_every: u64,
    pub disks: DiskPlan,
    /// Chaos promotes for no reason, one time in so many thousand looks.
    pub spurious_permille: u64,
    /// A second coordinator acts at random.
    pub chaos: bool,
    /// The coordinator places the shards; else they are there, anywhere, to begin with.
    pub bootstraps: bool,
    pub faults_until: u64,
    pub load_until: u64,
    /// By then everything must be answered.
    pub heals_by: u64,

    pub node: Settings,
    /// Every other node flushes only when it must: what a copy has applied is still in its table when it is replaced.
    pub lazy_flushes: bool,
    pub gateway: batcher::Settings,
    /// A gateway's turn takes up to so long: what comes meanwhile travels together.
    pub turn: u64,
    /// Of the operations that a gateway takes in one turn, how many join the request before them.
    pub joined_percent: u64,
    pub coordinator: engine::coordinator::Settings,
}

impl Plan {
    pub fn from_seed(seed: u64, planted: Option<Planted>, rng: &mut Rng) -> Self {
        let mut faults: Vec<Kind> = Kind::ALL.to_vec();
        rng.shuffle(&mut faults);
        faults.truncate(rng.between(2, 6) as usize);
        if rng.percent(25) {
            faults.truncate(1);
            faults.extend(Kind::DEPOSE);
        }
        let faults_until = rng.between(2_500_000, 5_000_000);
        let silent_after_ms = rng.between(200, 1_000);
        let shards = rng.between(1, 3) as u16;
        let lease_ttl = rng.between(500_000, 2_000_000);
        let mut staleness = Rng::new(seed.rotate_left(32) ^ 0x57A1_E0F5_EED5);
        let bounded_percent = if staleness.percent(50) { staleness.between(10, 90) } else { 0 };
        let tokens = TokenPlan::from_seed(seed);
        let lazy_flushes = staleness.percent(20);
        let disks = DiskPlan::from_seed(seed);
        Self {
            seed,
            planted,
            nodes: 5,
            gateways: rng.between(1, 3) as u8,
            coordinators: rng.between(1, 2) as u8,
            shards,
            replicas: 3,
            min_in_sync: 2,

            clients: rng.between(6, 16) as usize,
            think: rng.between(2_000, 20_000),
            digit_counters: rng.between(2, 8) as usize,
            mixed_counters: rng.between(1, 3) as usize,
            reads_percent: rng.between(10, 60),
            bounded_percent,
            lazy_flushes,
            staleness,
            tokens: tokens.clone(),

            network_delay: rng.between(100, 1_000),
            jitter: rng.percent(50),
            fsync: rng.between(100, 3_000),
            slow_etcd: rng.percent(40),
            lease_ttl,

            faults,
            fault_every: rng.between(100_000, 800_000),
            disks,
            chaos: rng.percent(50),
            bootstraps: rng.percent(30),
            spurious_permille: if rng.percent(50) { rng.between(1, 40) } else { 0 },
            faults_until,
            load_until: faults_until + 500_000,
            // A peer that was ejected again and again waits for a minute before it is added.
            heals_by: faults_until + 130_000_000,

            node: Settings {
                min_in_sync: 2,
                silent_after_ms,
                heartbeat_ms: (silent_after_ms / 10).max(20),
                // As shipped, well below it: an idle disk that is looked at less often passes for a bad one now and then.
                disk_probe_every_ms: silent_after_ms / 5,
                frozen_after_ms: rng.between(200, 1_000),
                // Long rounds outlive a partition, and with it the promises that their answers speak of.
                read_index_ms: if rng.percent(40) { rng.between(100, 4_000) } else { 30 },
                log_memory_bytes: rng.between(1, 64) as usize * 1024,
                table_bytes_max: if rng.percent(50) { 512 } else { 64 << 20 },
                flush_after_ms: rng.between(50, 2_000),
                // At once: collections of lists that overtake each other.
                collect_every_ms: match rng.percent(25) {
                    true => rng.between(20, 100),
                    false => rng.between(300, 3_000),
                },
                pending_bytes_max: if rng.percent(10) { 2_000 } else { 256 << 20 },
                idempotency_window_ms: tokens.window_ms,
                idempotency_records_max: tokens.records_max,
                planted,
                ..Settings::default()
            },
            gateway: batcher::Settings {
                linger_us: if rng.percent(30) { rng.between(1, 5_000) } else { 0 },
                window: rng.between(1, 3) as usize,
                // Room for a handful of operations, or for all.
                queue_bytes_max: if rng.percent(20) { 400 } else { 16 << 20 },
                worker_bytes_max: if rng.percent(20) { 1_000 } else { 128 << 20 },
                lane_bytes_max: if rng.percent(20) { 20 } else { 16 << 20 },
                heard_for_ms: tokens.heard_for_ms(),
                planted,
                ..batcher::Settings::default()
            },
            turn: rng.between(1, 2_000),
            joined_percent: rng.below(80),
            coordinator: engine::coordinator::Settings {
                flags: Flags {
                    shards: Some(shards.into()),
                    replicas: Some(3),
                    min_in_sync: Some(2),
                    idempotency_window_ms: Some(tokens.window_ms),
                },
                expect_nodes: if rng.percent(50) { Some(5) } else { None },
                newcomer_wait_ms: rng.between(0, 300),
                rebuild_delay_ms: rng.between(100, 5_000),
                lease_ttl_ms: lease_ttl / 1_000,
                lone_wait_ms: rng.between(100, 3_000),
                guard_ms: rng.between(100, 5_000),
                balance_after_ms: rng.between(50, 1_000),
                relist_every_ms: rng.between(300, 3_000),
                planted,
                ..engine::coordinator::Settings::default()
            },
        }
    }

    /// A well-run cluster under load, with the settings that are shipped: for measuring.
    pub fn quiet(seed: u64, rng: &mut Rng) -> Self {
        let plan = Self::from_seed(seed, None, rng);
        let shards = 12;
        let flags = Flags { shards: Some(shards.into()), ..plan.coordinator.flags };
        Self {
            gateways: 2,
            coordinators: 2,
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
            chaos: false,
            bootstraps: true,
            faults_until: u64::MAX,
            load_until: u64::MAX,
            heals_by: u64::MAX,
            node: Settings::default(),
            coordinator: engine::coordinator::Settings {
                flags,
                expect_nodes: Some(plan.nodes.into()),
                ..engine::coordinator::Settings::default()
            },
            ..plan
        }
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
