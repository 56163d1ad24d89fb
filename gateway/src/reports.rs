//! Hints to the leading coordinator: a node that refuses connections is probably gone.
//!
//! Best effort. The coordinator asks the node itself before it does anything, so a lost hint costs time and a wrong one
//! nothing. All workers notice the same thing at once; it is said once.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use engine::ids::StoreId;
use engine::message::Report;
use proto::wire;
use proto::wire::reports_client::ReportsClient;
use tokio::sync::watch;
use tracing::debug;

use crate::directory::Directory;
use crate::links::endpoint;

/// The same store is not reported again before.
const AGAIN_AFTER: Duration = Duration::from_millis(100);
const ANSWER_WITHIN: Duration = Duration::from_millis(500);

pub(crate) struct Reporter {
    directory: watch::Receiver<Directory>,
    said: BTreeMap<StoreId, Instant>,
}

impl Reporter {
    pub(crate) fn new(directory: watch::Receiver<Directory>) -> Self {
        Self { directory, said: BTreeMap::new() }
    }

    /// Says what has not just been said. Does not wait for an answer.
    pub(crate) fn report(&mut self, mut report: Report, now: Instant) {
        self.said.retain(|_, said| now.duration_since(*said) < AGAIN_AFTER);
        report.silent.retain(|store| !self.said.contains_key(store));
        if report == Report::default() {
            return;
        }
        self.said.extend(report.silent.iter().map(|&store| (store, now)));
        let known = self.directory.borrow();
        let cluster = known.meta.as_ref().map(|meta| meta.cluster);
        let (Some(cluster), Some(address)) = (cluster, known.coordinator.clone()) else {
            return;
        };
        tokio::spawn(async move {
            let said = tokio::time::timeout(ANSWER_WITHIN, say(cluster, &address, report)).await;
            if let Ok(Err(why)) = said {
                debug!(address, why, "report not taken");
            }
        });
    }
}

async fn say(cluster: u128, address: &str, report: Report) -> Result<(), String> {
    let endpoint = endpoint(address).map_err(|error| error.to_string())?;
    let channel = endpoint.connect().await.map_err(|error| error.to_string())?;
    let report = wire::NodeReport::new(cluster, None, report);
    let said = ReportsClient::new(channel).report(report).await;
    said.map(|_| ()).map_err(|status| status.message().to_owned())
}
