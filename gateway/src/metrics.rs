//! The metrics of a gateway. Their names are a contract: dashboards are built on them.

use std::sync::OnceLock;

use engine::batcher::Counts;
use engine::message::REFUSAL_LABELS;
use telemetry::prometheus_client::metrics::counter::Counter;
use telemetry::prometheus_client::metrics::family::Family;
use telemetry::prometheus_client::metrics::gauge::Gauge;
use telemetry::{metric, metrics};

use crate::request::Route;

/// The operation of a request, as far as the request was understood.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Operation {
    Increment,
    IncrementMany,
    Get,
    GetMany,
    Delete,
    Page,
    /// The request was refused before its operation was known.
    None,
}

/// The label of each [`Operation`], in the order of the variants.
const OPERATIONS: [&str; 7] =
    ["increment", "increment_batch", "get", "get_batch", "delete", "page", "none"];

impl Operation {
    pub(crate) fn of(route: &Route) -> Self {
        match route {
            Route::Increment { .. } => Self::Increment,
            Route::IncrementMany { .. } => Self::IncrementMany,
            Route::Get { .. } => Self::Get,
            Route::GetMany { .. } => Self::GetMany,
            Route::Delete { .. } => Self::Delete,
            Route::Page(_) => Self::Page,
        }
    }
}

type LabelPairs<const N: usize> = [(&'static str, String); N];

/// Statuses from 100 to 599.
const STATUSES: usize = 500;

metrics! {
    /// The metrics of all workers together.
    pub(crate) struct GatewayMetrics in r {
        requests: Family<LabelPairs<2>, Counter>
            as "requests", "Answered requests, by operation and status";
        /// The counters of `requests` by operation and status, each looked up once: a look-up in
        /// the family takes a lock.
        known: [[OnceLock<Counter>; STATUSES]; OPERATIONS.len()] =
            std::array::from_fn(|_| std::array::from_fn(|_| OnceLock::new()));
        refusals: [Counter; REFUSAL_LABELS.len()] =
            by_reason(metric(r, "refusals", "Batches that nodes refused, by reason"));
        pub(crate) connections: Gauge<i64> as "connections", "Open client connections";
        pub(crate) without_primary: Gauge<i64>
            as "gateway_shards_without_primary",
            "Shards to whose primary this gateway has no connection";
        batches: Counter as "batches", "Batches sealed";
        sends: Counter as "batch_sends", "Sends of batches, including the first send of each";
        ops: Counter as "batched_ops", "Operations put into batches";
        ops_sent: Counter
            as "batched_ops_sent", "Operations sent in batches, after adds to one key were merged";
        pub(crate) replays: Counter
            as "idempotent_replays",
            "Operations answered with the result of an earlier one with the same token";
        pub(crate) shed: Counter
            as "connections_shed", "Idle client connections closed to make room for new ones";
    }
}

/// Returns the counter of each reason.
fn by_reason(refused: Family<LabelPairs<1>, Counter>) -> [Counter; REFUSAL_LABELS.len()] {
    REFUSAL_LABELS.map(|reason| refused.get_or_create(&[("reason", reason.to_owned())]).clone())
}

impl GatewayMetrics {
    /// Counts an answered request.
    pub(crate) fn count_request(&self, operation: Operation, status: u16) {
        let row = &self.known[operation as usize];
        let Some(known) = row.get(usize::from(status).wrapping_sub(100)) else {
            return;
        };
        let counter = known.get_or_init(|| {
            let operation = OPERATIONS[operation as usize].to_owned();
            let labels = [("op", operation), ("code", status.to_string())];
            self.requests.get_or_create(&labels).clone()
        });
        counter.inc();
    }

    /// Adds the difference between two states of a worker's counts.
    pub(crate) fn add_worker_counts(&self, before: &Counts, now: &Counts) {
        self.batches.inc_by(now.batches - before.batches);
        self.sends.inc_by(now.sends - before.sends);
        self.ops.inc_by(now.ops - before.ops);
        self.ops_sent.inc_by(now.ops_sent - before.ops_sent);
        for (at, counter) in self.refusals.iter().enumerate() {
            counter.inc_by(now.refusals[at] - before.refusals[at]);
        }
    }
}
