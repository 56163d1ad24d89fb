//! The settings of the state machines as a seed draws them.

use engine::batcher::window::WindowSettings;
use engine::coordinator::Flags;
use engine::coordinator::planner;
use engine::node::{self, Settings};
use engine::planted::Planted;
use engine::{batcher, coordinator};

use super::super::draws::Draws;
use super::tokens::TokenPlan;

/// The number of nodes, of copies and of required members.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    pub(super) nodes: u8,
    pub(super) replicas: u8,
    pub(super) min_in_sync: u8,
}

impl Shape {
    /// As shipped in four of ten; otherwise any shape that is legal.
    pub(super) fn draw(draws: &mut Draws) -> Self {
        let rng = &mut draws.rng;
        let (replicas, min_in_sync) = match rng.percent(40) {
            true => (3, 2),
            false => {
                let replicas = rng.between(1, 5);
                (replicas, rng.between(1, replicas))
            }
        };
        let nodes = match rng.below(20) {
            0..10 => replicas.max(5),
            // A node was taken away for good, and there is no other in its place.
            10..12 => rng.between(min_in_sync, replicas),
            _ => rng.between(replicas, 7),
        };
        draws.note("nodes", nodes, 5);
        draws.note("replicas", replicas, 3);
        draws.note("min_in_sync", min_in_sync, 2);
        let [nodes, replicas, min_in_sync] = [nodes, replicas, min_in_sync].map(|n| n as u8);
        Self { nodes, replicas, min_in_sync }
    }
}

pub(super) fn node_settings(
    draws: &mut Draws,
    tokens: &TokenPlan,
    shape: Shape,
    planted: Option<Planted>,
) -> Settings {
    let shipped = Settings::default();
    let silent_after_ms = draws.wait("silent_after_ms", 200, 1_000, shipped.silent_after_ms);
    let flush_after_ms = draws.wait("flush_after_ms", 50, 2_000, shipped.flush_after_ms);
    // Short intervals: lists of collections overtake each other.
    let (least, most) = if draws.rng.percent(25) { (20, 100) } else { (300, 3_000) };
    let collect_every_ms = draws.wait("collect_every_ms", least, most, shipped.collect_every_ms);
    // Long rounds outlive a partition, and with it the promises that their answers contain.
    let (least, most) = if draws.rng.percent(40) { (100, 4_000) } else { (30, 30) };
    Settings {
        min_in_sync: shape.min_in_sync.into(),
        silent_after_ms,
        heartbeat_ms: (silent_after_ms / 10).max(20),
        // As shipped, well below it: an idle disk that is probed less often is taken for a bad one
        // now and then.
        disk_probe_every_ms: silent_after_ms / 5,
        frozen_after_ms: draws.wait("frozen_after_ms", 200, 1_000, shipped.frozen_after_ms),
        read_index_ms: draws.wait("read_index_ms", least, most, shipped.read_index_ms),
        etcd_check_every_ms: draws.wait("etcd_check_every_ms", 5, 100, shipped.etcd_check_every_ms),
        read_give_up_ms: draws.wait("read_give_up_ms", 300, 5_000, shipped.read_give_up_ms),
        proof_wait_ms: draws.wait("proof_wait_ms", 10, 300, shipped.proof_wait_ms),
        log_memory_bytes: draws.size("log_memory_bytes", 1, shipped.log_memory_bytes),
        table_bytes_max: draws.size("table_bytes_max", 512, shipped.table_bytes_max),
        flush_after_ms,
        collect_every_ms,
        pending_bytes_max: draws.size("pending_bytes_max", 2_000, shipped.pending_bytes_max),
        idempotency: tokens.settings,
        sizes: node_sizes(draws, tokens.counters as usize),
        timing: node_timing(draws),
        planted,
        ..shipped
    }
}

fn node_sizes(draws: &mut Draws, counters: usize) -> node::NodeSizes {
    let shipped = node::NodeSizes::default();
    let mut size = |name, least, shipped| draws.size(name, least, shipped);
    node::NodeSizes {
        group_bytes_max: size("group_bytes_max", 1, shipped.group_bytes_max),
        window_bytes: size("window_bytes", 1, shipped.window_bytes),
        message_bytes: size("message_bytes", 1, shipped.message_bytes),
        read_log_bytes: size("read_log_bytes", 1, shipped.read_log_bytes),
        // A request with a token on all of its counters, on one of them twice, each with the
        // longest name.
        batch_bytes_limit: size(
            "batch_bytes_limit",
            1_200 * (counters + 1),
            shipped.batch_bytes_limit,
        ),
        waiting_reads_max: size("waiting_reads_max", 1, shipped.waiting_reads_max),
        waiting_read_bytes_max: size("read_bytes_max", 1, shipped.waiting_read_bytes_max),
        digest_every: size("digest_every", 1, shipped.digest_every as usize) as u64,
        points_max: size("points_max", 1, shipped.points_max),
        points_sent_max: size("points_told_max", 1, shipped.points_sent_max),
        votes_max: size("votes_max", 1, shipped.votes_max),
    }
}

fn node_timing(draws: &mut Draws) -> node::NodeTiming {
    let shipped = node::NodeTiming::default();
    let ejected_ms = draws.wait("ejected_ms", 50, 1_000, shipped.ejected_ms);
    node::NodeTiming {
        gap_ms: draws.wait("gap_ms", 100, 500, shipped.gap_ms),
        review_every_ms: draws.wait("review_every_ms", 10, 50, shipped.review_every_ms),
        ejected_ms,
        ejected_ms_max: draws.wait("ejected_ms_max", ejected_ms, 60_000, shipped.ejected_ms_max),
        leave_within_ms: draws.wait("leave_within_ms", 50, 4_000, shipped.leave_within_ms),
        step_down_ms: draws.wait("step_down_ms", 50, 2_000, shipped.step_down_ms),
        // A shard whose commit can't move is reported within two seconds: the first two are part of
        // that promise.
        blocked_ms: draws.wait("blocked_ms", 50, 500, shipped.blocked_ms),
        stalled_ms: draws.wait("stalled_ms", 200, 1_500, shipped.stalled_ms),
        near_ms: draws.wait("near_ms", 20, 250, shipped.near_ms),
        join_again_ms: draws.wait("join_again_ms", 50, 5_000, shipped.join_again_ms),
        etcd_fresh_ms: draws.wait("etcd_fresh_ms", 600, 3_000, shipped.etcd_fresh_ms),
        copy_again_ms: draws.wait("copy_again_ms", 20, 1_000, shipped.copy_again_ms),
        trim_every_ms: draws.wait("trim_every_ms", 10, 1_000, shipped.trim_every_ms),
        propose_again_ms: draws.wait("propose_again_ms", 5, 100, shipped.propose_again_ms),
        // Often shorter than a call of etcd takes: then several reads of one record are in flight.
        copy_recheck_ms: draws.wait("ask_again_ms", 20, 5_000, shipped.copy_recheck_ms),
        report_every_ms: draws.wait("report_every_ms", 100, 1_000, shipped.report_every_ms),
    }
}

pub(super) fn gateway_settings(
    draws: &mut Draws,
    tokens: &TokenPlan,
    node: &Settings,
    planted: Option<Planted>,
) -> batcher::Settings {
    let shipped = batcher::Settings::default();
    let limit = node.sizes.batch_bytes_limit;
    let values = tokens.counters as usize + 2;
    let mut size = |name, least, shipped| draws.size(name, least, shipped);
    let sizes = batcher::BatchSizes {
        batch_ops_max: size("batch_ops_max", 1, shipped.sizes.batch_ops_max),
        batch_bytes_max: size("batch_bytes_max", 1, shipped.sizes.batch_bytes_max).min(limit),
        // An outcome of each operation of a request with a token, and one more.
        batch_values_max: size("batch_values_max", values, shipped.sizes.batch_values_max),
        batch_bytes_limit: limit,
        message_bytes: size("frame_bytes", 1, shipped.sizes.message_bytes),
        read_message_bytes: size("read_message_bytes", 1, shipped.sizes.read_message_bytes),
    };
    let timing = batcher::BatcherTiming {
        refused_ms: draws.wait("refused_ms", 1, 10, shipped.timing.refused_ms),
        refused_ms_max: draws.wait("refused_ms_max", 10, 200, shipped.timing.refused_ms_max),
        overloaded_ms: draws.wait("overloaded_ms", 5, 50, shipped.timing.overloaded_ms),
        frozen_ms: draws.wait("frozen_ms", 100, 1_000, shipped.timing.frozen_ms),
        avoid_ms: draws.wait("avoid_ms", 10, 1_000, shipped.timing.avoid_ms),
    };
    let window = WindowSettings {
        messages: draws.rng.between(1, 3) as usize,
        load_percent: draws.rng.between(0, 200) as usize,
        late_percent: draws.rng.between(0, 300),
        lapse_percent: draws.rng.between(100, 800),
        lapse_us_min: 1_000 * draws.wait("lapse_ms_min", 1, 5, shipped.window.lapse_us_min / 1_000),
        lapse_us_max: 1_000
            * draws.wait("lapse_ms_max", 5, 100, shipped.window.lapse_us_max / 1_000),
    };
    batcher::Settings {
        linger_us: if draws.rng.percent(30) { draws.rng.between(1, 5_000) } else { 0 },
        window,
        // Room for a handful of operations, or for all.
        queue_bytes_max: draws.size("queue_bytes_max", 400, shipped.queue_bytes_max),
        total_bytes_max: draws.size("total_bytes_max", 1_000, shipped.total_bytes_max),
        connection_bytes_max: draws.size("connection_bytes_max", 20, shipped.connection_bytes_max),
        read_keys_max: draws.size("read_keys_max", 4, shipped.read_keys_max),
        shard_time_valid_ms: tokens.time_valid_ms(),
        sizes,
        timing,
        planted,
        ..shipped
    }
}

pub(super) fn coordinator_settings(
    draws: &mut Draws,
    tokens: &TokenPlan,
    shape: Shape,
    (shards, lease_ttl): (u16, u64),
    planted: Option<Planted>,
) -> coordinator::Settings {
    let shipped = coordinator::Settings::default();
    let timing = coordinator_timing(draws);
    let expects = draws.rng.percent(50);
    coordinator::Settings {
        flags: Flags {
            shards: Some(shards.into()),
            replicas: Some(shape.replicas),
            min_in_sync: Some(shape.min_in_sync),
            idempotency_window_ms: Some(tokens.settings.window_ms),
            idempotency_bytes: Some(tokens.settings.bytes_max),
        },
        expect_nodes: expects.then_some(shape.nodes.into()),
        join_wait_ms: draws.wait("join_wait_ms", 0, 300, shipped.join_wait_ms),
        rebuild_delay_ms: draws.wait("rebuild_delay_ms", 100, 5_000, shipped.rebuild_delay_ms),
        lease_ttl_ms: lease_ttl / 1_000,
        probe_every_ms: draws.wait("probe_every_ms", 50, 400, shipped.probe_every_ms),
        probe_timeout_ms: draws.wait("probe_timeout_ms", 50, 300, shipped.probe_timeout_ms),
        fsync_age_max_ms: draws.wait("fsync_age_max_ms", 800, 2_000, shipped.fsync_age_max_ms),
        gather_ms: draws.wait("gather_ms", 10, 200, shipped.gather_ms),
        lone_wait_ms: draws.wait("lone_wait_ms", 100, 3_000, shipped.lone_wait_ms),
        guard_ms: draws.wait("guard_ms", 100, 5_000, shipped.guard_ms),
        balance_after_ms: draws.wait("balance_after_ms", 50, 1_000, shipped.balance_after_ms),
        relist_every_ms: draws.wait("relist_every_ms", 300, 3_000, shipped.relist_every_ms),
        shards_per_txn: draws.size("shards_per_txn", 1, shipped.shards_per_txn),
        planner: planner::PlannerLimits {
            moves_max: draws.size("moves_max", 1, shipped.planner.moves_max),
            guard_nodes_min: draws.size("guard_nodes_min", 1, shipped.planner.guard_nodes_min),
            guard_percent_max: draws.size(
                "guard_percent_max",
                1,
                shipped.planner.guard_percent_max,
            ),
            copyset_nodes_min: draws.later_size(
                "copyset_nodes_min",
                1,
                shipped.planner.copyset_nodes_min,
            ),
            copyset_peers: draws.later_size("copyset_peers", 1, shipped.planner.copyset_peers),
        },
        timing,
        planted,
        ..shipped
    }
}

fn coordinator_timing(draws: &mut Draws) -> coordinator::CoordinatorTiming {
    let shipped = coordinator::CoordinatorTiming::default();
    let pace_ms = draws.wait("pace_ms", 100, 1_000, shipped.pace_ms);
    let mut wait = |name, least, most, shipped| draws.wait(name, least, most, shipped);
    coordinator::CoordinatorTiming {
        retry_ms: wait("retry_ms", 10, 100, shipped.retry_ms),
        hand_over_ms: wait("hand_over_ms", 50, 1_000, shipped.hand_over_ms),
        cut_off_after_ms: wait("cut_off_after_ms", 200, 2_000, shipped.cut_off_after_ms),
        pace_ms,
        pace_ms_max: wait("pace_ms_max", pace_ms, 60_000, shipped.pace_ms_max),
        review_every_ms: wait("review_every_ms", 20, 100, shipped.review_every_ms),
        list_timeout_ms: wait("list_timeout_ms", 500, 5_000, shipped.list_timeout_ms),
        list_retry_ms: wait("list_retry_ms", 10, 100, shipped.list_retry_ms),
        pause_ms: wait("pause_ms", 20, 200, shipped.pause_ms),
        plan_every_ms: wait("plan_every_ms", 20, 100, shipped.plan_every_ms),
        plan_idle_ms: wait("plan_idle_ms", 200, 1_000, shipped.plan_idle_ms),
        ask_suspect_every_ms: wait("ask_suspect_ms", 20, 1_000, shipped.ask_suspect_every_ms),
        refused_again_ms: wait("refused_again_ms", 5, 200, shipped.refused_again_ms),
        // Longer than the interval between two reports of a node.
        complaint_ms: wait("complaint_ms", 1_100, 3_000, shipped.complaint_ms),
        own_pause_ms: wait("own_pause_ms", 200, 1_000, shipped.own_pause_ms),
        report_ms: wait("report_ms", 1_100, 3_000, shipped.report_ms),
        full_after_ms: wait("full_after_ms", 100, shipped.full_after_ms, shipped.full_after_ms),
        leaderless_ms: wait("leaderless_ms", 10, 1_000, shipped.leaderless_ms),
    }
}
