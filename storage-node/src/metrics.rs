//! The metrics of a storage node.

use std::collections::BTreeSet;

use engine::ids::Now;
use engine::message::{NodeReply, REFUSAL_LABELS};
use engine::node::{Node, TokenCounts};
use telemetry::prometheus_client::metrics::counter::Counter;
use telemetry::prometheus_client::metrics::family::Family;
use telemetry::prometheus_client::metrics::gauge::Gauge;
use telemetry::prometheus_client::metrics::histogram::Histogram;
use telemetry::prometheus_client::registry::Registry;

use crate::disk::Disk;
use crate::names::StoreNames;

type NodeLabels = Vec<(&'static str, String)>;

/// The handles of the metrics; clones share them.
#[derive(Clone, Debug)]
pub struct NodeMetrics {
    commit_seconds: Histogram,
    fsync_seconds: Histogram,
    frames: Counter,
    batches: Counter,
    refusals: Family<NodeLabels, Counter>,
    in_sync_replicas: Family<NodeLabels, Gauge>,
    lag_entries: Family<NodeLabels, Gauge>,
    epoch: Family<NodeLabels, Gauge>,
    idempotency_records: Family<NodeLabels, Gauge>,
    idempotency_bytes: Family<NodeLabels, Gauge>,
    idempotency_bytes_max: Family<NodeLabels, Gauge>,
    idempotency_recorded: Counter,
    idempotency_refused: Counter,
    frozen_shards: Gauge,
    digest_mismatches: Counter,
    durability_violations: Counter,
    scrubs: Counter,
    scrub_damages: Counter,
    scrub_ended: Gauge,
    damaged_copies: Gauge,
    connections_closed_full: Counter,
    disk_full: Gauge,
    disk_free: Gauge,
    disk_reserve: Gauge,
    disk_free_inodes: Gauge,
    log_size: Gauge,
    /// The labels set at the last update, so that those of a shard that moved away are removed.
    shown: BTreeSet<NodeLabels>,
    shown_lags: BTreeSet<NodeLabels>,
    mismatches_seen: u64,
    violations_seen: u64,
    scrubs_seen: (u64, u64),
    tokens_seen: TokenCounts,
}

/// A histogram with buckets from 50 µs, doubling, to 1.6 s.
fn times() -> Histogram {
    Histogram::new((0..16).map(|power| 0.000_05 * f64::from(1u32 << power)))
}

impl Default for NodeMetrics {
    fn default() -> Self {
        let refusals = Family::<NodeLabels, Counter>::default();
        // All are shown from the start, so that the first refusal is visible as a rise.
        for reason in REFUSAL_LABELS {
            drop(refusals.get_or_create(&labels_of_refusal(reason)));
        }
        Self {
            commit_seconds: times(),
            fsync_seconds: times(),
            frames: Counter::default(),
            batches: Counter::default(),
            refusals,
            in_sync_replicas: Family::default(),
            lag_entries: Family::default(),
            epoch: Family::default(),
            idempotency_records: Family::default(),
            idempotency_bytes: Family::default(),
            idempotency_bytes_max: Family::default(),
            idempotency_recorded: Counter::default(),
            idempotency_refused: Counter::default(),
            frozen_shards: Gauge::default(),
            digest_mismatches: Counter::default(),
            durability_violations: Counter::default(),
            scrubs: Counter::default(),
            scrub_damages: Counter::default(),
            scrub_ended: Gauge::default(),
            damaged_copies: Gauge::default(),
            connections_closed_full: Counter::default(),
            disk_full: Gauge::default(),
            disk_free: Gauge::default(),
            disk_reserve: Gauge::default(),
            disk_free_inodes: Gauge::default(),
            log_size: Gauge::default(),
            shown: BTreeSet::new(),
            shown_lags: BTreeSet::new(),
            mismatches_seen: 0,
            violations_seen: 0,
            scrubs_seen: (0, 0),
            tokens_seen: TokenCounts::default(),
        }
    }
}

impl NodeMetrics {
    /// Registers all metrics.
    pub fn register(&self, registry: &mut Registry) {
        self.register_shards(registry);
        self.register_store(registry);
    }

    fn register_shards(&self, r: &mut Registry) {
        r.register(
            "commit_seconds",
            "Seconds from a batch's arrival to its acknowledgement",
            self.commit_seconds.clone(),
        );
        r.register(
            "fsync_seconds",
            "Seconds to write and fsync one group",
            self.fsync_seconds.clone(),
        );
        r.register("frames", "Frames received from gateways", self.frames.clone());
        r.register("batches", "Batches received from gateways", self.batches.clone());
        r.register("refusals", "Batches and reads refused, by reason", self.refusals.clone());
        r.register(
            "in_sync_replicas",
            "Size of the in-sync set, by shard led here",
            self.in_sync_replicas.clone(),
        );
        r.register(
            "lag_entries",
            "Entries not acknowledged by a follower, by shard led here and node",
            self.lag_entries.clone(),
        );
        r.register("epoch", "Epoch, by shard led here", self.epoch.clone());
        r.register(
            "idempotency_records",
            "Idempotency tokens recorded, by shard led here",
            self.idempotency_records.clone(),
        );
        r.register(
            "idempotency_bytes",
            "Bytes of token records, by shard led here",
            self.idempotency_bytes.clone(),
        );
        r.register(
            "idempotency_bytes_max",
            "Limit of the bytes of token records, by shard led here",
            self.idempotency_bytes_max.clone(),
        );
        r.register(
            "idempotency_recorded",
            "Requests whose token was recorded, in shards led here",
            self.idempotency_recorded.clone(),
        );
        r.register(
            "idempotency_refused",
            "Requests refused because there was no room for a token record, in shards led here",
            self.idempotency_refused.clone(),
        );
        r.register("frozen_shards", "Frozen shards led here", self.frozen_shards.clone());
    }

    fn register_store(&self, r: &mut Registry) {
        r.register(
            "digest_mismatches",
            "Followers whose digest differed at the same position",
            self.digest_mismatches.clone(),
        );
        r.register(
            "durability_violations",
            "In-sync members that had lost acknowledged entries",
            self.durability_violations.clone(),
        );
        r.register("scrubs", "Scrubs completed", self.scrubs.clone());
        r.register("scrub_damages", "Damaged copies found by scrubs", self.scrub_damages.clone());
        r.register(
            "scrub_ended_seconds",
            "Unix time at which the last scrub ended, 0 if none since the start",
            self.scrub_ended.clone(),
        );
        r.register(
            "damaged_copies",
            "Stopped copies that wait to be filled again",
            self.damaged_copies.clone(),
        );
        r.register(
            "connections_closed_full",
            "Connections closed because the other end did not read",
            self.connections_closed_full.clone(),
        );
        r.register(
            "disk_full",
            "1 while the disk is full: writes are refused, reads are served",
            self.disk_full.clone(),
        );
        r.register(
            "disk_free_bytes",
            "Bytes free on the file system of the data folder",
            self.disk_free.clone(),
        );
        r.register(
            "disk_reserve_bytes",
            "The node refuses writes when fewer bytes than this are free",
            self.disk_reserve.clone(),
        );
        r.register(
            "disk_free_inodes",
            "Inodes free on the file system of the data folder",
            self.disk_free_inodes.clone(),
        );
        r.register("log_bytes", "Bytes of log segments in use", self.log_size.clone());
    }

    /// Observes the duration of writing and syncing one group.
    pub fn observe_fsync(&self, began: Now, now: Now) {
        self.fsync_seconds.observe(seconds(began, now));
    }

    /// Counts a frame received from a gateway, and its batches.
    pub fn count_frame(&self, batches: usize) {
        self.frames.inc();
        self.batches.inc_by(batches as u64);
    }

    /// Observes the time from a batch's arrival to its commit.
    pub fn observe_commit(&self, arrived: Now, now: Now) {
        self.commit_seconds.observe(seconds(arrived, now));
    }

    /// Counts a connection that was closed since its queue was full.
    pub fn count_closed_full(&self) {
        self.connections_closed_full.inc();
    }

    /// Counts a reply if it is a refusal.
    pub fn count_reply(&self, reply: &NodeReply) {
        let label = match reply {
            NodeReply::Answer { answer, .. } => answer.refusal_label(),
            NodeReply::Read { result: Err(refusal), .. } => Some(refusal.label()),
            _ => None,
        };
        if let Some(label) = label {
            self.refusals.get_or_create(&labels_of_refusal(label)).inc();
        }
    }

    /// Updates the gauges and counters from the state machine and its disk.
    pub fn update(&mut self, node: &Node, names: &StoreNames, disk: &Disk) {
        self.disk_full.set(node.is_disk_full().into());
        self.disk_free.set(i64_of(disk.free_bytes()));
        self.disk_reserve.set(i64_of(disk.reserve_bytes()));
        self.disk_free_inodes.set(i64_of(disk.free_inodes()));
        self.log_size.set(i64_of(disk.log_bytes()));
        let (mut frozen, mut damaged) = (0, 0);
        let (mut shown, mut shown_lags) = (BTreeSet::new(), BTreeSet::new());
        for view in node.replicas() {
            damaged += i64::from(view.exists && view.stopped.is_some());
            let Some(primary) = view.primary else { continue };
            let shard = ("shard", view.shard.to_string());
            let labels = vec![shard.clone()];
            self.in_sync_replicas.get_or_create(&labels).set(primary.record.isr.len() as i64);
            self.epoch.get_or_create(&labels).set(i64_of(primary.epoch.0));
            let records = view.state.tokens.records();
            self.idempotency_records.get_or_create(&labels).set(i64_of(records));
            let bytes = view.state.tokens.bytes();
            self.idempotency_bytes.get_or_create(&labels).set(i64_of(bytes));
            let bytes_max = node.limits().settings.bytes_max_of(view.state.slots);
            self.idempotency_bytes_max.get_or_create(&labels).set(i64_of(bytes_max));
            for (&store, follower) in &primary.followers {
                let labels = vec![shard.clone(), ("node", names.of(store))];
                let lag = view.last.seq.0.saturating_sub(follower.acked.0);
                self.lag_entries.get_or_create(&labels).set(i64_of(lag));
                shown_lags.insert(labels);
            }
            frozen += i64::from(primary.frozen);
            shown.insert(labels);
        }
        for gone in self.shown.difference(&shown) {
            self.in_sync_replicas.remove(gone);
            self.epoch.remove(gone);
            self.idempotency_records.remove(gone);
            self.idempotency_bytes.remove(gone);
            self.idempotency_bytes_max.remove(gone);
        }
        for gone in self.shown_lags.difference(&shown_lags) {
            self.lag_entries.remove(gone);
        }
        (self.shown, self.shown_lags) = (shown, shown_lags);
        self.frozen_shards.set(frozen);
        raise(&self.digest_mismatches, &mut self.mismatches_seen, node.digest_mismatches());
        self.damaged_copies.set(damaged);
        self.scrub_ended.set(i64_of(node.last_scrub().ended.0 / 1_000));
        let (scrubs, damages) = node.scrubs();
        raise(&self.scrubs, &mut self.scrubs_seen.0, scrubs);
        raise(&self.scrub_damages, &mut self.scrubs_seen.1, damages);
        let TokenCounts { recorded, refused } = node.token_counts();
        raise(&self.idempotency_recorded, &mut self.tokens_seen.recorded, recorded);
        raise(&self.idempotency_refused, &mut self.tokens_seen.refused, refused);
        raise(&self.durability_violations, &mut self.violations_seen, node.durability_violations());
    }
}

fn labels_of_refusal(reason: &'static str) -> NodeLabels {
    vec![("reason", reason.to_owned())]
}

/// Raises a counter to a total that the state machine counts.
fn raise(counter: &Counter, seen: &mut u64, now: u64) {
    counter.inc_by(now.saturating_sub(*seen));
    *seen = now;
}

fn i64_of(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

fn seconds(from: Now, to: Now) -> f64 {
    to.0.saturating_sub(from.0) as f64 / 1e6
}
