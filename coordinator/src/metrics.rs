//! The metrics of a coordinator.

use engine::coordinator::decision::Cause;
use engine::node::CasOutcome;
use telemetry::metric;
use telemetry::prometheus_client::metrics::counter::Counter;
use telemetry::prometheus_client::metrics::family::Family;
use telemetry::prometheus_client::metrics::gauge::Gauge;
use telemetry::prometheus_client::metrics::histogram::Histogram;
use telemetry::prometheus_client::registry::Registry;

/// One label and its value.
type Label = [(&'static str, &'static str); 1];

/// Handles of the registered metrics. They are changed without a lock; clones share them.
#[derive(Clone, Debug)]
pub(crate) struct Gauges {
    pub(crate) promotions: Counter,
    pub(crate) losses: Counter,
    pub(crate) promotion_seconds: Histogram,
    pub(crate) elections: Counter,
    pub(crate) leading: Gauge,
    deaths: Family<Label, Counter>,
    proposals: Family<Label, Counter>,
}

impl Gauges {
    pub(crate) fn new(registry: &mut Registry) -> Self {
        let seconds = [0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3.0, 6.0, 15.0, 60.0];
        let gauges = Self {
            promotions: metric(registry, "promotions", "Shards that got a new primary"),
            losses: metric(
                registry,
                "losses",
                "Shards that began an epoch with a recorded data loss",
            ),
            promotion_seconds: Histogram::new(seconds),
            elections: metric(registry, "elections", "Elections that this process has won"),
            leading: metric(registry, "leading", "1 while this process is the leader"),
            deaths: metric(registry, "node_deaths", "Nodes found dead by a probe"),
            proposals: metric(registry, "proposals", "Transactions sent to etcd"),
        };
        registry.register(
            "promotion_seconds",
            "Time from the detection that a shard needs a new primary until it was written to etcd",
            gauges.promotion_seconds.clone(),
        );
        // All labels exist from the start, so that the first event of each shows as an increase.
        for why in Cause::ALL {
            drop(gauges.deaths.get_or_create(&[("cause", cause(why))]));
        }
        for outcome in ["done", "failed", "unknown"] {
            drop(gauges.proposals.get_or_create(&[("outcome", outcome)]));
        }
        gauges
    }

    pub(crate) fn died(&self, why: Cause) {
        self.deaths.get_or_create(&[("cause", cause(why))]).inc();
    }

    pub(crate) fn proposed(&self, outcome: CasOutcome) {
        let outcome = match outcome {
            CasOutcome::Done { .. } => "done",
            CasOutcome::Failed => "failed",
            CasOutcome::Unknown => "unknown",
        };
        self.proposals.get_or_create(&[("outcome", outcome)]).inc();
    }
}

/// Returns the result of a failed probe, as a label.
fn cause(cause: Cause) -> &'static str {
    match cause {
        Cause::Refused => "refused",
        Cause::Replaced => "replaced",
        Cause::Silent => "silent",
        Cause::DiskStalled => "disk-stalled",
        Cause::Leaving => "leaving",
    }
}
