//! What the node shows of itself at `/metrics` (DESIGN §12).

use std::collections::BTreeSet;

use engine::ids::Now;
use engine::message::{Answer, NodeReply, Refusal};
use engine::node::{Node, TokensTold};
use telemetry::prometheus_client::metrics::counter::Counter;
use telemetry::prometheus_client::metrics::family::Family;
use telemetry::prometheus_client::metrics::gauge::Gauge;
use telemetry::prometheus_client::metrics::histogram::Histogram;
use telemetry::prometheus_client::registry::Registry;

use crate::disk::Disk;
use crate::names::Names;

type Labels = Vec<(&'static str, String)>;

/// The handles; clones share them.
#[derive(Clone, Debug)]
pub struct NodeMetrics {
    commit_seconds: Histogram,
    fsync_seconds: Histogram,
    batches: Counter,
    refusals: Family<Labels, Counter>,
    in_sync_replicas: Family<Labels, Gauge>,
    lag_entries: Family<Labels, Gauge>,
    epoch: Family<Labels, Gauge>,
    idempotency_records: Family<Labels, Gauge>,
    idempotency_bytes: Family<Labels, Gauge>,
    idempotency_bytes_max: Family<Labels, Gauge>,
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
    disk_free_inodes: Gauge,
    log_size: Gauge,
    /// Labels that were set last time, so that those of a shard that moved away go.
    shown: BTreeSet<Labels>,
    shown_lags: BTreeSet<Labels>,
    mismatches_seen: u64,
    violations_seen: u64,
    scrubs_seen: (u64, u64),
    tokens_seen: TokensTold,
}

/// Shown from the start, so that the first refusal is seen as a rise.
const REASONS: [&str; 10] = [
    "not-primary",
    "no-such-shard",
    "frozen",
    "overloaded",
    "no-space",
    "too-large",
    "damaged",
    "stale",
    "order",
    "expired",
];

/// From 50 µs, doubling, to 1.6 s.
fn times() -> Histogram {
    Histogram::new((0..16).map(|power| 0.000_05 * f64::from(1u32 << power)))
}

impl Default for NodeMetrics {
    fn default() -> Self {
        let refusals = Family::<Labels, Counter>::default();
        for reason in REASONS {
            drop(refusals.get_or_create(&labels_of_refusal(reason)));
        }
        Self {
            commit_seconds: times(),
            fsync_seconds: times(),
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
            disk_free_inodes: Gauge::default(),
            log_size: Gauge::default(),
            shown: BTreeSet::new(),
            shown_lags: BTreeSet::new(),
            mismatches_seen: 0,
            violations_seen: 0,
            scrubs_seen: (0, 0),
            tokens_seen: TokensTold::default(),
        }
    }
}

impl NodeMetrics {
    pub fn register(&self, registry: &mut Registry) {
        let r = registry;
        r.register(
            "commit_seconds",
            "From a batch's arrival to the answer that it is applied",
            self.commit_seconds.clone(),
        );
        r.register("fsync_seconds", "Writing and fsyncing one group", self.fsync_seconds.clone());
        r.register("batches", "Batches that came from gateways", self.batches.clone());
        r.register("refusals", "Batches and reads refused, by reason", self.refusals.clone());
        r.register(
            "in_sync_replicas",
            "Members of the in-sync set of each shard led here",
            self.in_sync_replicas.clone(),
        );
        r.register(
            "lag_entries",
            "Entries that a follower of a shard led here has not acknowledged",
            self.lag_entries.clone(),
        );
        r.register("epoch", "Epoch of each shard led here", self.epoch.clone());
        r.register(
            "idempotency_records",
            "Clients' tokens that each shard led here remembers",
            self.idempotency_records.clone(),
        );
        r.register(
            "idempotency_bytes",
            "What the records of tokens take in each shard led here",
            self.idempotency_bytes.clone(),
        );
        r.register(
            "idempotency_bytes_max",
            "What they may take in each shard led here",
            self.idempotency_bytes_max.clone(),
        );
        r.register(
            "idempotency_recorded",
            "Requests with a token that a record was made of, in shards led here",
            self.idempotency_recorded.clone(),
        );
        r.register(
            "idempotency_refused",
            "Requests with a token refused for want of room for a record, in shards led here",
            self.idempotency_refused.clone(),
        );
        r.register("frozen_shards", "Frozen shards led here", self.frozen_shards.clone());
        r.register(
            "digest_mismatches",
            "Followers whose state differed at the same position",
            self.digest_mismatches.clone(),
        );
        r.register(
            "durability_violations",
            "Members that had lost what they had acknowledged",
            self.durability_violations.clone(),
        );
        r.register("scrubs", "Scrubs that came to their end", self.scrubs.clone());
        r.register(
            "scrub_damages",
            "Copies that a scrub found not to be what was written",
            self.scrub_damages.clone(),
        );
        r.register(
            "scrub_ended_seconds",
            "When the last scrub ended, as a unix time; 0: none since the start",
            self.scrub_ended.clone(),
        );
        r.register(
            "damaged_copies",
            "Copies here that take nothing more and wait to be filled anew",
            self.damaged_copies.clone(),
        );
        r.register(
            "connections_closed_full",
            "Connections closed because the other end did not read",
            self.connections_closed_full.clone(),
        );
        r.register(
            "disk_full",
            "1 while the disk has no room: writes are refused, reads are served",
            self.disk_full.clone(),
        );
        r.register(
            "disk_free_bytes",
            "Free on the file system of the data folder, looked at twice a second",
            self.disk_free.clone(),
        );
        r.register(
            "disk_free_inodes",
            "Files that can still be made on the file system of the data folder",
            self.disk_free_inodes.clone(),
        );
        r.register("log_bytes", "Segments of the log that are in use", self.log_size.clone());
    }

    pub fn synced(&self, began: Now, now: Now) {
        self.fsync_seconds.observe(seconds(began, now));
    }

    pub fn batches_came(&self, count: usize) {
        self.batches.inc_by(count as u64);
    }

    pub fn committed(&self, arrived: Now, now: Now) {
        self.commit_seconds.observe(seconds(arrived, now));
    }

    pub fn closed_full(&self) {
        self.connections_closed_full.inc();
    }

    /// Counts a reply that is a refusal.
    pub fn replied(&self, reply: &NodeReply) {
        let refusal = match reply {
            NodeReply::Answer { answer: Answer::Refused(refusal), .. } => refusal,
            NodeReply::Read { result: Err(refusal), .. } => refusal,
            NodeReply::Answer { answer: Answer::NoEffect, .. } => return self.refused("order"),
            NodeReply::Answer { answer: Answer::Expired, .. } => return self.refused("expired"),
            _ => return,
        };
        self.refused(match refusal {
            Refusal::NotPrimary(_) => "not-primary",
            Refusal::NoSuchShard => "no-such-shard",
            Refusal::Frozen => "frozen",
            Refusal::Overloaded => "overloaded",
            Refusal::NoSpace => "no-space",
            Refusal::TooLarge => "too-large",
            Refusal::Damaged => "damaged",
            Refusal::Stale => "stale",
        });
    }

    fn refused(&self, reason: &'static str) {
        self.refusals.get_or_create(&labels_of_refusal(reason)).inc();
    }

    /// What is to be seen of the machine and its disk right now.
    pub fn look(&mut self, node: &Node, names: &Names, disk: &Disk) {
        self.disk_full.set(node.is_disk_full().into());
        self.disk_free.set(i64_of(disk.free_bytes()));
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
        let TokensTold { recorded, refused } = node.tokens_told();
        raise(&self.idempotency_recorded, &mut self.tokens_seen.recorded, recorded);
        raise(&self.idempotency_refused, &mut self.tokens_seen.refused, refused);
        raise(&self.durability_violations, &mut self.violations_seen, node.durability_violations());
    }
}

fn labels_of_refusal(reason: &'static str) -> Labels {
    debug_assert!(REASONS.contains(&reason), "{reason} is shown from the start");
    vec![("reason", reason.to_owned())]
}

/// The machine counts by itself.
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
