//! What a gateway counts (DESIGN §12). Names of metrics are contract: dashboards are built on them.

use std::sync::OnceLock;
use std::sync::atomic::AtomicU64;

use engine::batcher::{Counts, REFUSAL_REASONS};
use telemetry::prometheus_client::metrics::counter::Counter;
use telemetry::prometheus_client::metrics::family::Family;
use telemetry::prometheus_client::metrics::gauge::Gauge;
use telemetry::prometheus_client::registry::Registry;

use crate::request::Route;

/// What a request was about, as far as it was understood.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Operation {
    Increment,
    IncrementMany,
    Get,
    GetMany,
    Delete,
    Page,
    /// Refused before anybody could tell.
    None,
}

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

type Labels<const N: usize> = [(&'static str, String); N];

/// Shared by all workers.
pub(crate) struct Counters {
    requests: Family<Labels<2>, Counter>,
    /// By operation and status; looked up once, since the family itself is locked.
    known: [[OnceLock<Counter>; STATUSES]; OPERATIONS.len()],
    refusals: [Counter; REFUSAL_REASONS.len()],
    batches: Counter,
    sends: Counter,
    ops: Counter,
    ops_sent: Counter,
    pub(crate) replays: Counter,
    pub(crate) connections: Gauge<i64>,
    pub(crate) shed: Counter,
    pub(crate) without_primary: Gauge<i64>,
}

/// From 100 up: every status there is.
const STATUSES: usize = 500;

impl Counters {
    pub(crate) fn new(registry: &mut Registry) -> Self {
        let requests = Family::<Labels<2>, Counter>::default();
        registry.register(
            "requests",
            "Requests answered, by operation and status",
            requests.clone(),
        );
        let refused = Family::<Labels<1>, Counter>::default();
        registry.register("refusals", "What nodes refused, by reason", refused.clone());
        let counter = |registry: &mut Registry, name, help| {
            let counter = Counter::<u64, AtomicU64>::default();
            registry.register(name, help, counter.clone());
            counter
        };
        let connections = Gauge::<i64>::default();
        registry.register("connections", "Client connections that are open", connections.clone());
        let without_primary = Gauge::<i64>::default();
        registry.register(
            "gateway_shards_without_primary",
            "Shards whose primary this gateway has no connection to",
            without_primary.clone(),
        );
        let refusals = REFUSAL_REASONS
            .map(|reason| refused.get_or_create(&[("reason", reason.to_owned())]).clone());
        Self {
            requests,
            known: std::array::from_fn(|_| std::array::from_fn(|_| OnceLock::new())),
            refusals,
            batches: counter(registry, "batches", "Batches sealed"),
            sends: counter(registry, "batch_sends", "Sends of batches, the first of each included"),
            ops: counter(registry, "batched_ops", "Operations put into batches"),
            ops_sent: counter(
                registry,
                "batched_ops_sent",
                "The same, after adds of one key became one",
            ),
            replays: counter(
                registry,
                "idempotent_replays",
                "Operations that were answered as they had been applied before, under the same token",
            ),
            connections,
            without_primary,
            shed: counter(
                registry,
                "connections_shed",
                "Idle client connections that were closed because others waited for a place",
            ),
        }
    }

    /// A request was answered.
    pub(crate) fn request(&self, operation: Operation, status: u16) {
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

    /// A worker's counts have gone from `before` to `now`.
    pub(crate) fn worker(&self, before: &Counts, now: &Counts) {
        self.batches.inc_by(now.batches - before.batches);
        self.sends.inc_by(now.sends - before.sends);
        self.ops.inc_by(now.ops - before.ops);
        self.ops_sent.inc_by(now.ops_sent - before.ops_sent);
        for (at, counter) in self.refusals.iter().enumerate() {
            counter.inc_by(now.refusals[at] - before.refusals[at]);
        }
    }
}
