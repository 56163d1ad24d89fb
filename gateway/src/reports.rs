//! Hints to the leading coordinator: a node that refuses connections is probably gone.
//!
//! Reports are best effort. The coordinator probes the node itself before it acts, so a lost hint
//! only costs time, and a wrong one nothing. All workers notice the same failure at once; it is
//! reported once.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use engine::ids::StoreId;
use engine::message::HealthReport;
use proto::wire;
use proto::wire::reports_client::ReportsClient;
use tokio::sync::watch;
use tracing::debug;

use crate::directory::Directory;
use crate::node_connections::PINGS;

/// The shortest interval between two reports about one store.
const AGAIN_AFTER: Duration = Duration::from_millis(100);
const ANSWER_WITHIN: Duration = Duration::from_millis(500);

/// Sends the reports of all workers to the coordinator.
pub(crate) struct Reporter {
    directory: watch::Receiver<Directory>,
    /// The stores that were reported within [`AGAIN_AFTER`], with the moment.
    reported: BTreeMap<StoreId, Instant>,
}

impl Reporter {
    pub(crate) fn new(directory: watch::Receiver<Directory>) -> Self {
        Self { directory, reported: BTreeMap::new() }
    }

    /// Sends the part of a report that was not sent just now. Does not wait for the answer.
    pub(crate) fn report(&mut self, mut report: HealthReport, now: Instant) {
        self.reported.retain(|_, at| now.duration_since(*at) < AGAIN_AFTER);
        report.silent.retain(|store| !self.reported.contains_key(store));
        if report == HealthReport::default() {
            return;
        }
        self.reported.extend(report.silent.iter().map(|&store| (store, now)));
        let known = self.directory.borrow();
        let cluster = known.meta.as_ref().map(|meta| meta.cluster);
        let (Some(cluster), Some(address)) = (cluster, known.coordinator.clone()) else {
            return;
        };
        tokio::spawn(async move {
            let sent = tokio::time::timeout(ANSWER_WITHIN, send(cluster, &address, report)).await;
            if let Ok(Err(why)) = sent {
                debug!(address, why, "coordinator did not accept a report");
            }
        });
    }
}

async fn send(cluster: u128, address: &str, report: HealthReport) -> Result<(), String> {
    let endpoint = process::endpoint(address, PINGS).map_err(|error| error.to_string())?;
    let channel = endpoint.connect().await.map_err(|error| error.to_string())?;
    let report = wire::NodeReport::new(cluster, None, report);
    let reply = ReportsClient::new(channel).report(report).await;
    reply.map(|_| ()).map_err(|status| status.message().to_owned())
}
