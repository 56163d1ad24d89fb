//! Reports to the leading coordinator: silent peers, frozen shards, and what else etcd can't show.
//!
//! Reports are best effort: only the newest one counts, and one that does not get through is
//! replaced by the next within a second. So nothing is queued and nothing is retried. The state
//! machine is informed of a lost report only while the node leaves: there is no use in waiting
//! then.

use std::time::Duration;

use engine::ids::StoreBoot;
use engine::message::HealthReport;
use engine::node::Event;
use metastore::{CoordinatorRecord, Metastore};
use proto::wire;
use proto::wire::reports_client::ReportsClient;
use tokio::sync::watch;
use tokio::time::timeout;
use tonic::transport::Channel;
use tracing::{debug, info};

use crate::inbox::Inbox;
use crate::peers::{self, PeerLimits};

/// The time-out of a report, which is outdated after a second.
const SEND_TIMEOUT: Duration = Duration::from_millis(500);

/// Sends the newest report whenever there is one, until the loop ends.
pub async fn send_all(
    metastore: Metastore,
    cluster: u128,
    me: StoreBoot,
    mut reports: watch::Receiver<HealthReport>,
    inbox: Inbox,
) {
    let mut leader = metastore.follow::<CoordinatorRecord>();
    let mut address: Option<String> = None;
    let mut client = None;
    loop {
        tokio::select! {
            goes_on = leader.next() => {
                if !goes_on {
                    return;
                }
                // The coordinator's lease may have vanished while it goes on: it gets reports until
                // another one leads.
                let now = leader.only().map(|leader| leader.address.clone());
                if now.is_some() && now != address {
                    info!(address = now, "coordinator changed");
                    (address, client) = (now, None);
                }
            }
            changed = reports.changed() => {
                if changed.is_err() {
                    return;
                }
                let report = reports.borrow_and_update().clone();
                let leaving = report.leaving;
                let message = wire::NodeReport::new(cluster, Some(me), report);
                let sent = match &address {
                    Some(address) => send(&mut client, address, message).await,
                    None => Err("no coordinator leads".to_owned()),
                };
                if let Err(why) = sent {
                    debug!(address, why, "report not delivered");
                    client = None;
                    if leaving {
                        inbox.send_event(Event::LeaveNotReported);
                    }
                }
            }
        }
    }
}

async fn send(
    client: &mut Option<ReportsClient<Channel>>,
    address: &str,
    message: wire::NodeReport,
) -> Result<(), String> {
    let client = match client {
        Some(client) => client,
        None => {
            let endpoint = peers::endpoint(address, PeerLimits::default());
            let endpoint = endpoint.map_err(|error| error.to_string())?;
            client.insert(proto::limited!(ReportsClient::new(endpoint.connect_lazy())))
        }
    };
    match timeout(SEND_TIMEOUT, client.report(message)).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(status)) => Err(status.message().to_owned()),
        Err(_) => Err("no answer".into()),
    }
}
