//! The metrics of a coordinator.

use engine::coordinator::MovesStatus;
use engine::coordinator::decision::Cause;
use engine::node::CasOutcome;
use telemetry::metrics;
use telemetry::prometheus_client::metrics::counter::Counter;
use telemetry::prometheus_client::metrics::family::Family;
use telemetry::prometheus_client::metrics::gauge::Gauge;
use telemetry::prometheus_client::metrics::histogram::Histogram;
use telemetry::prometheus_client::registry::Registry;

/// One label and its value.
type Label = [(&'static str, &'static str); 1];

metrics! {
    /// Handles of the registered metrics. They are changed without a lock; clones share them.
    #[derive(Clone, Debug)]
    pub(crate) struct Gauges in r {
        pub(crate) promotions: Counter as "promotions", "Shards that got a new primary";
        pub(crate) losses: Counter
            as "losses", "Shards that began an epoch with a recorded data loss";
        pub(crate) elections: Counter as "elections", "Elections that this process has won";
        pub(crate) leading: Gauge as "leading", "1 while this process is the leader";
        moves_wanted: Gauge as "moves_wanted", "Shards that the planner wants to move a copy of";
        moves_stalled: Gauge
            as "moves_stalled", "1 while moves are wanted and none has made progress for long";
        deaths: Family<Label, Counter> as "node_deaths", "Nodes found dead by a probe";
        proposals: Family<Label, Counter> as "proposals", "Transactions sent to etcd";
        pub(crate) promotion_seconds: Histogram =
            Histogram::new([0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3.0, 6.0, 15.0, 60.0]);
    }
}

impl Gauges {
    pub(crate) fn new(registry: &mut Registry) -> Self {
        let gauges = Self::register(registry);
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

    pub(crate) fn moves(&self, moves: &MovesStatus) {
        self.moves_wanted.set(i64::try_from(moves.wanted).unwrap_or(i64::MAX));
        self.moves_stalled.set(i64::from(moves.stalled));
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
