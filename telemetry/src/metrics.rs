//! The metrics of a process, as Prometheus reads them.

use prometheus_client::encoding::text::encode;
use prometheus_client::registry::Registry;

/// Everything registered, under the prefix `dkc_`. Filled once at the start; the handles that were registered are then
/// changed without a lock.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
}

impl Metrics {
    /// `fill` registers what the process has to show, by names without the prefix. Counters get `_total` appended when
    /// they are written out.
    pub fn new(fill: impl FnOnce(&mut Registry)) -> Self {
        let mut registry = Registry::with_prefix("dkc");
        fill(&mut registry);
        Self { registry }
    }

    /// In Prometheus' (OpenMetrics) text format.
    pub fn text(&self) -> String {
        let mut text = String::new();
        match encode(&mut text, &self.registry) {
            Ok(()) => text,
            Err(error) => format!("# metrics could not be written: {error}\n"),
        }
    }
}
