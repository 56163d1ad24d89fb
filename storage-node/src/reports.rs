//! Tells the leading coordinator what it can't see from etcd: who is silent, what is frozen.
//!
//! Best effort: only the newest report counts, and one that does not get through is replaced by the next within a second.
//! So nothing is queued and nothing is tried again. Only of a node that leaves the machine is told so: there is no use in
//! waiting then.

use std::time::Duration;

use engine::ids::StoreBoot;
use engine::message::Report;
use engine::node::Event;
use metastore::{Candidate, Metastore, WatchEvent, WatchSettings};
use proto::wire;
use proto::wire::reports_client::ReportsClient;
use tokio::sync::watch;
use tokio::time::timeout;
use tonic::transport::Channel;
use tracing::{debug, info};

use crate::inbox::Inbox;
use crate::peers::{self, Limits};

/// A report is of use for a second.
const SEND_TIMEOUT: Duration = Duration::from_millis(500);

/// Sends every report that is the newest when its turn comes, until the loop ends.
pub async fn send_all(
    metastore: Metastore,
    cluster: u128,
    me: StoreBoot,
    mut reports: watch::Receiver<Report>,
    inbox: Inbox,
) {
    let mut leader = metastore.watch::<Candidate>(WatchSettings::default());
    let mut address: Option<String> = None;
    let mut client = None;
    loop {
        tokio::select! {
            event = leader.next() => {
                let now = match event {
                    Some(WatchEvent::All(listed)) => listed.all.into_iter().next().map(|kept| kept.record.address),
                    Some(WatchEvent::Changed(kept)) => Some(kept.record.address),
                    // Its lease may have vanished while it goes on: it is told until another leads.
                    Some(WatchEvent::Deleted { .. }) => continue,
                    Some(WatchEvent::WentBack { .. }) | None => return,
                };
                if now.is_some() && now != address {
                    info!(address = now, "coordinator");
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
                        inbox.event(Event::LeaveUnheard);
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
            let endpoint = peers::endpoint(address, Limits::default());
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
