//! The goals of rows, judged by the medians of all rounds.

use std::collections::BTreeMap;

use bench::chart::short;
use serde::Serialize;

use super::report::LatencyQuantiles;

/// A goal of a row. Rows are compared within one run, since machines differ.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum RowGoal {
    /// At least this many increments or reads per second.
    RateAtLeast(f64),
    /// At least this share of another row's rate.
    RateOf(&'static str, f64),
    /// At most this many microseconds of CPU per increment, of everything but the generator.
    MicrosAtMost(f64),
    /// A median of at most this many milliseconds.
    P50AtMost(f64),
    /// A 99th percentile of at most this many milliseconds.
    P99AtMost(f64),
    /// A median at most this many milliseconds above that of another row.
    P50Above(&'static str, f64),
    /// A 99th percentile at most this many milliseconds above that of another row.
    P99Above(&'static str, f64),
    /// The slowest answer comes within this many milliseconds.
    SlowestWithin(f64),
    /// The 99th percentile of refusals is at most this many milliseconds.
    RefusalsWithin(f64),
    /// At most this many bytes of sorted files per counter and copy.
    DiskAtMost(f64),
    /// At most this many bytes of memory per node.
    MemoryAtMost(f64),
    /// Answers are as fast as those of another row within this many seconds.
    NormalWithin(&'static str, f64),
    /// Every request has a definite outcome.
    NoErrors,
    /// Every request is accepted.
    NoRefusals,
}

/// The medians of a row over all rounds; `null` for what was not measured.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct RowMedians {
    pub(crate) rate: Option<f64>,
    #[serde(flatten)]
    pub(crate) latency: LatencyQuantiles,
    pub(crate) refusal_p99_ms: Option<f64>,
    /// CPU per increment or read of everything but the generator.
    pub(crate) server_micros: Option<f64>,
    pub(crate) generator_micros: Option<f64>,
    pub(crate) refused: Option<f64>,
    pub(crate) errors: Option<f64>,
    /// The time until answers were as fast as those of the row of the goal.
    pub(crate) normal_after_seconds: Option<f64>,
    /// The time from the start of a cluster until every shard was open.
    pub(crate) ready_after_seconds: Option<f64>,
    pub(crate) node_memory_bytes: Option<f64>,
    /// Disk space of sorted files per counter and copy, of a row that fills a cluster.
    pub(crate) disk_bytes_per_copy: Option<f64>,
}

/// A goal and what was reached.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub(crate) struct JudgedGoal {
    /// The goal in words.
    pub(crate) goal: String,
    /// The value that was reached, in the same unit.
    pub(crate) reached: String,
    /// True if the goal is reached; `null` if it has no limit or is unknown.
    pub(crate) is_met: Option<bool>,
}

impl RowGoal {
    /// Returns the name of the row that this goal compares with.
    pub(crate) fn compared_to(&self) -> Option<&'static str> {
        match self {
            Self::RateOf(row, _)
            | Self::P50Above(row, _)
            | Self::P99Above(row, _)
            | Self::NormalWithin(row, _) => Some(row),
            _ => None,
        }
    }

    /// Judges this goal of a row with these medians. `all` are the medians of all rows by name.
    pub(crate) fn judge(&self, row: &RowMedians, all: &BTreeMap<String, RowMedians>) -> JudgedGoal {
        let other = self.compared_to().and_then(|name| all.get(name));
        let other = |value: fn(&RowMedians) -> Option<f64>| other.and_then(value);
        let ratio = row.rate.zip(other(|row| row.rate)).map(|(one, other)| one / other);
        match *self {
            Self::RateAtLeast(limit) => at_least(row.rate, limit, "/s"),
            Self::RateOf(name, share) => {
                let mut judged = at_least(ratio, share, "");
                judged.goal += &format!(" × {name}");
                judged.reached += " ×";
                judged
            }
            Self::MicrosAtMost(limit) => at_most(row.server_micros, limit, " µs of CPU"),
            Self::P50AtMost(limit) => at_most(row.latency.p50_ms, limit, " ms for 50 %"),
            Self::P99AtMost(limit) => at_most(row.latency.p99_ms, limit, " ms for 99 %"),
            Self::P50Above(name, limit) => {
                above("p50", row.latency.p50_ms, other(|row| row.latency.p50_ms), name, limit)
            }
            Self::P99Above(name, limit) => {
                above("p99", row.latency.p99_ms, other(|row| row.latency.p99_ms), name, limit)
            }
            Self::SlowestWithin(limit) => at_most(row.latency.max_ms, limit, " ms for the slowest"),
            Self::RefusalsWithin(limit) => {
                at_most(row.refusal_p99_ms, limit, " ms for 99 % of refusals")
            }
            Self::DiskAtMost(limit) => {
                at_most(row.disk_bytes_per_copy, limit, " B of disk per counter and copy")
            }
            Self::MemoryAtMost(limit) => at_most(row.node_memory_bytes, limit, "B per node"),
            Self::NormalWithin(_, limit) => {
                at_most(row.normal_after_seconds, limit, " s until it is normal again")
            }
            Self::NoErrors => at_most(row.errors, 0.0, " requests with an unknown outcome"),
            Self::NoRefusals => at_most(row.refused, 0.0, " refused requests"),
        }
    }
}

fn at_least(value: Option<f64>, limit: f64, unit: &str) -> JudgedGoal {
    JudgedGoal {
        goal: format!("≥ {}{unit}", short(limit)),
        reached: value.map_or("-".to_owned(), |value| format!("{}{unit}", short(value))),
        is_met: value.map(|value| value >= limit),
    }
}

fn at_most(value: Option<f64>, limit: f64, unit: &str) -> JudgedGoal {
    JudgedGoal {
        goal: format!("≤ {}{unit}", short(limit)),
        reached: value.map_or("-".to_owned(), |value| format!("{}{unit}", short(value))),
        is_met: value.map(|value| value <= limit),
    }
}

fn above(what: &str, value: Option<f64>, other: Option<f64>, name: &str, limit: f64) -> JudgedGoal {
    let difference = value.zip(other).map(|(value, other)| value - other);
    // `F: …` is F in a sentence.
    let name = name.split(':').next().unwrap_or(name);
    let shown = |value: f64| format!("{what} of {name} {value:+.2} ms");
    JudgedGoal {
        goal: format!("≤ {what} of {name} + {limit} ms"),
        reached: difference.map_or("-".to_owned(), shown),
        is_met: difference.map(|difference| difference <= limit),
    }
}

/// Returns the median; the mean of the two in the middle if there are two. Unknown values are left
/// out.
pub(crate) fn median(values: impl IntoIterator<Item = Option<f64>>) -> Option<f64> {
    let mut known: Vec<f64> = values.into_iter().flatten().collect();
    known.sort_by(f64::total_cmp);
    let middle = known.len() / 2;
    match known.len() {
        0 => None,
        odd if odd % 2 == 1 => Some(known[middle]),
        _ => Some(f64::midpoint(known[middle - 1], known[middle])),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median([]), None);
        assert_eq!(median([None, Some(3.0)]), Some(3.0));
        assert_eq!(median([Some(9.0), Some(1.0), Some(2.0)]), Some(2.0));
        assert_eq!(median([Some(9.0), Some(1.0), Some(2.0), Some(4.0)]), Some(3.0));
    }

    #[track_caller]
    fn check(goal: RowGoal, goal_text: &str, reached: &str, is_met: Option<bool>) {
        let row = RowMedians {
            rate: Some(60_000.0),
            latency: LatencyQuantiles {
                p50_ms: Some(0.6),
                p99_ms: Some(5.0),
                max_ms: Some(200.0),
                ..LatencyQuantiles::default()
            },
            server_micros: Some(1.5),
            errors: Some(0.0),
            ..RowMedians::default()
        };
        let other = RowMedians {
            rate: Some(100_000.0),
            latency: LatencyQuantiles {
                p50_ms: Some(0.25),
                p99_ms: Some(1.0),
                ..LatencyQuantiles::default()
            },
            ..RowMedians::default()
        };
        let judged = goal.judge(&row, &BTreeMap::from([("F: writers".to_owned(), other)]));
        let want = JudgedGoal { goal: goal_text.to_owned(), reached: reached.to_owned(), is_met };
        assert_eq!(judged, want);
    }

    #[test]
    fn goals_are_judged() {
        const OTHER: &str = "F: writers";
        check(RowGoal::RateAtLeast(5e4), "≥ 50 k/s", "60 k/s", Some(true));
        check(RowGoal::RateOf(OTHER, 0.7), "≥ 0.7 × F: writers", "0.6 ×", Some(false));
        check(RowGoal::MicrosAtMost(1.2), "≤ 1.2 µs of CPU", "1.5 µs of CPU", Some(false));
        let reached = "p50 of F +0.35 ms";
        check(RowGoal::P50Above(OTHER, 0.4), "≤ p50 of F + 0.4 ms", reached, Some(true));
        check(RowGoal::P99Above(OTHER, 3.0), "≤ p99 of F + 3 ms", "p99 of F +4.00 ms", Some(false));
        check(RowGoal::P99Above("gone", 3.0), "≤ p99 of gone + 3 ms", "-", None);
        let slowest = "200 ms for the slowest";
        check(RowGoal::SlowestWithin(500.0), "≤ 500 ms for the slowest", slowest, Some(true));
        check(RowGoal::P99AtMost(4.0), "≤ 4 ms for 99 %", "5 ms for 99 %", Some(false));
        check(RowGoal::NoRefusals, "≤ 0 refused requests", "-", None);
        let unknown = "0 requests with an unknown outcome";
        check(RowGoal::NoErrors, &format!("≤ {unknown}"), unknown, Some(true));
    }
}
