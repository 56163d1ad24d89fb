//! The metrics of a process, as Prometheus reads them.

use std::collections::BTreeSet;

use prometheus_client::encoding::text::encode;
use prometheus_client::registry::{Metric, Registry};

use crate::log::DROPPED;

/// All metrics of the process, under the prefix `dkc_`. The registry is filled once at the start;
/// the registered handles are then changed without a lock.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
}

impl Metrics {
    /// Creates the registry. `fill` registers the role's metrics, by names without the prefix, and
    /// returns their handles. Counters get `_total` appended when they are written out.
    pub fn new<T>(fill: impl FnOnce(&mut Registry) -> T) -> (Self, T) {
        let mut registry = Registry::with_prefix("dkc");
        registry.register(
            "log_lines_dropped",
            "Lines of the log that could not be written",
            DROPPED.clone(),
        );
        let handles = fill(&mut registry);
        (Self { registry }, handles)
    }

    /// Returns the metrics in Prometheus' text format, version 0.0.4, which every scraper reads.
    pub fn text(&self) -> String {
        let mut text = String::new();
        match encode(&mut text, &self.registry) {
            Ok(()) => classic(&text),
            Err(error) => format!("# metrics could not be written: {error}\n"),
        }
    }
}

/// Registers a metric and returns its handle. Clones of it share the value.
pub fn metric<M: Metric + Clone + Default>(registry: &mut Registry, name: &str, help: &str) -> M {
    let metric = M::default();
    registry.register(name, help, metric.clone());
    metric
}

/// Declares the struct of a role's metrics, each field with what it begins with: `as` the name and
/// the help of a [`metric`], or `=` another value, made with `$registry`. Its `register` makes the
/// struct.
#[macro_export]
macro_rules! metrics {
    (
        $(#[$attribute:meta])*
        $visible:vis struct $name:ident in $registry:ident {
            $(
                $(#[$doc:meta])*
                $field_visible:vis $field:ident: $type:ty
                    $(as $metric:literal, $help:literal)? $(= $value:expr)?;
            )*
        }
    ) => {
        $(#[$attribute])*
        $visible struct $name {
            $($(#[$doc])* $field_visible $field: $type,)*
        }

        impl $name {
            /// Registers the metrics.
            $visible fn register(
                $registry: &mut $crate::prometheus_client::registry::Registry,
            ) -> Self {
                Self { $($field: $($crate::metric($registry, $metric, $help))? $($value)?,)* }
            }
        }
    };
}

/// Converts from OpenMetrics, which the library writes. There a counter `x` has samples `x_total`;
/// in the classic format the counter has the name of its samples.
fn classic(open: &str) -> String {
    let counter =
        |line: &'_ str| Some(line.strip_prefix("# TYPE ")?.strip_suffix(" counter")?.to_owned());
    let counters: BTreeSet<String> = open.lines().filter_map(counter).collect();
    let mut text = String::with_capacity(open.len());
    for line in open.lines().filter(|line| *line != "# EOF") {
        let named = ["# HELP ", "# TYPE "].into_iter().find_map(|what| {
            let (name, rest) = line.strip_prefix(what)?.split_once(' ')?;
            counters.contains(name).then(|| format!("{what}{name}_total {rest}"))
        });
        text += named.as_deref().unwrap_or(line);
        text.push('\n');
    }
    text
}
