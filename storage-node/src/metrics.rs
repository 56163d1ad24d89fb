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
use telemetry::{metric, metrics};

use crate::disk::Disk;
use crate::names::StoreNames;

type NodeLabels = Vec<(&'static str, String)>;

/// The names and texts of the gauges that each shard led here has.
const OF_SHARD: [(&str, &str); 5] = [
    ("in_sync_replicas", "Size of the in-sync set, by shard led here"),
    ("epoch", "Epoch, by shard led here"),
    ("idempotency_records", "Idempotency tokens recorded, by shard led here"),
    ("idempotency_bytes", "Bytes of token records, by shard led here"),
    ("idempotency_bytes_max", "Limit of the bytes of token records, by shard led here"),
];

metrics! {
    /// The handles of the metrics; clones share them.
    #[derive(Clone, Debug)]
    pub struct NodeMetrics in r {
        commit_seconds: Histogram =
            times(r, "commit_seconds", "Seconds from a batch's arrival to its acknowledgement");
        fsync_seconds: Histogram =
            times(r, "fsync_seconds", "Seconds to write and fsync one group");
        frames: Counter as "frames", "Frames received from gateways";
        batches: Counter as "batches", "Batches received from gateways";
        refusals: Family<NodeLabels, Counter> as "refusals", "Batches and reads refused, by reason";
        /// The gauges by shard, in the order of [`OF_SHARD`].
        of_shard: [Family<NodeLabels, Gauge>; OF_SHARD.len()] =
            OF_SHARD.map(|(name, help)| metric(r, name, help));
        lag_entries: Family<NodeLabels, Gauge>
            as "lag_entries", "Entries not acknowledged by a follower, by shard led here and node";
        idempotency_recorded: Counter
            as "idempotency_recorded", "Requests whose token was recorded, in shards led here";
        idempotency_refused: Counter
            as "idempotency_refused",
            "Requests refused because there was no room for a token record, in shards led here";
        frozen_shards: Gauge as "frozen_shards", "Frozen shards led here";
        digest_mismatches: Counter
            as "digest_mismatches", "Followers whose digest differed at the same position";
        durability_violations: Counter
            as "durability_violations", "In-sync members that had lost acknowledged entries";
        scrubs: Counter as "scrubs", "Scrubs completed";
        scrub_damages: Counter as "scrub_damages", "Damaged copies found by scrubs";
        scrub_ended: Gauge
            as "scrub_ended_seconds",
            "Unix time at which the last scrub ended, 0 if none since the start";
        damaged_copies: Gauge as "damaged_copies", "Stopped copies that wait to be filled again";
        connections_closed_full: Counter
            as "connections_closed_full", "Connections closed because the other end did not read";
        disk_full: Gauge
            as "disk_full", "1 while the disk is full: writes are refused, reads are served";
        disk_free: Gauge as "disk_free_bytes", "Bytes free on the file system of the data folder";
        disk_reserve: Gauge
            as "disk_reserve_bytes", "The node refuses writes when fewer bytes than this are free";
        disk_free_inodes: Gauge
            as "disk_free_inodes", "Inodes free on the file system of the data folder";
        log_size: Gauge as "log_bytes", "Bytes of log segments in use";
        /// The labels set at the last update, so that those of a shard that moved away are removed.
        shown: BTreeSet<NodeLabels> = BTreeSet::new();
        shown_lags: BTreeSet<NodeLabels> = BTreeSet::new();
        mismatches_seen: u64 = 0;
        violations_seen: u64 = 0;
        scrubs_seen: (u64, u64) = (0, 0);
        tokens_seen: TokenCounts = TokenCounts::default();
    }
}

impl NodeMetrics {
    /// Registers all metrics.
    pub fn new(registry: &mut Registry) -> Self {
        let metrics = Self::register(registry);
        // All are shown from the start, so that the first refusal is visible as a rise.
        for reason in REFUSAL_LABELS {
            drop(metrics.refusals.get_or_create(&labels_of_refusal(reason)));
        }
        metrics
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
        self.disk_free.set(i64_of(disk.space().free()));
        self.disk_reserve.set(i64_of(disk.space().reserve()));
        self.disk_free_inodes.set(i64_of(disk.space().inodes()));
        self.log_size.set(i64_of(disk.log_bytes()));
        let (mut frozen, mut damaged) = (0, 0);
        let (mut shown, mut shown_lags) = (BTreeSet::new(), BTreeSet::new());
        for view in node.replicas() {
            damaged += i64::from(view.exists && view.stopped.is_some());
            let Some(primary) = view.primary else { continue };
            let shard = ("shard", view.shard.to_string());
            let labels = vec![shard.clone()];
            let (isr, tokens) = (primary.record.isr.len() as u64, &view.state.tokens);
            let bytes_max = node.limits().settings.bytes_max_of(view.state.slots);
            let values = [isr, primary.epoch.0, tokens.records(), tokens.bytes(), bytes_max];
            for (gauge, value) in self.of_shard.iter().zip(values) {
                gauge.get_or_create(&labels).set(i64_of(value));
            }
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
            self.of_shard.iter().for_each(|gauge| _ = gauge.remove(gone));
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

/// Registers a histogram with buckets from 50 µs, doubling, to 1.6 s.
fn times(registry: &mut Registry, name: &str, help: &str) -> Histogram {
    let histogram = Histogram::new((0..16).map(|power| 0.000_05 * f64::from(1u32 << power)));
    registry.register(name, help, histogram.clone());
    histogram
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
