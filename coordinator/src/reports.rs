//! Receives the reports of nodes and gateways. A standby refuses them.
//!
//! Reports are hints: the state machine probes before it acts on one. So a report that arrives
//! while the driver is busy is dropped; the next one comes within a second.

use engine::coordinator::Event;
use engine::message::HealthReport;
use proto::wire;
use proto::wire::reports_server::Reports;
use tokio::sync::{mpsc, watch};
use tonic::{Request, Response, Status};
use tracing::debug;

use crate::etcd::DriverMessage;

/// The gRPC service `Reports`.
pub(crate) struct ReportService {
    messages: mpsc::Sender<DriverMessage>,
    /// The cluster that this process leads; `None` while it is a standby.
    led_cluster: watch::Receiver<Option<u128>>,
}

impl ReportService {
    pub(crate) fn new(
        messages: mpsc::Sender<DriverMessage>,
        led_cluster: watch::Receiver<Option<u128>>,
    ) -> Self {
        Self { messages, led_cluster }
    }
}

#[tonic::async_trait]
impl Reports for ReportService {
    async fn report(
        &self,
        request: Request<wire::NodeReport>,
    ) -> Result<Response<wire::Empty>, Status> {
        let led_cluster = *self.led_cluster.borrow();
        let Some(cluster) = led_cluster else {
            return Err(Status::unavailable("this coordinator is a standby: report to the leader"));
        };
        let report = request.into_inner();
        wire::Open::accept_required(report.open.as_ref(), cluster)?;
        let from = report.from.map(Into::into);
        let report = HealthReport::try_from(report)?;
        let event = match from {
            Some(from) => Event::Reported { from, report },
            None => Event::GatewayReported(report.silent),
        };
        if self.messages.try_send(DriverMessage::Event(event)).is_err() {
            debug!("driver busy, report dropped");
        }
        Ok(Response::new(wire::Empty {}))
    }
}

#[cfg(test)]
mod tests {
    use engine::ids::{Boot, StoreBoot, StoreId};

    use super::*;

    const CLUSTER: u128 = 7;

    /// Sends a report that names `cluster` to a process that leads `led_cluster`.
    async fn report(
        led_cluster: Option<u128>,
        cluster: u128,
        from_node: bool,
    ) -> Result<Event, Status> {
        let (messages, mut inbox) = mpsc::channel(1);
        let service = ReportService::new(messages, watch::channel(led_cluster).1);
        let from = from_node.then_some(StoreBoot { store: StoreId(2), boot: Boot(1) });
        let report = HealthReport { silent: vec![StoreId(1)], ..HealthReport::default() };
        let reported = service.report(Request::new(wire::NodeReport::new(cluster, from, report)));
        let refused = reported.await.err();
        match (inbox.try_recv(), refused) {
            (Ok(DriverMessage::Event(event)), None) => Ok(event),
            (Err(_), Some(status)) => Err(status),
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn only_the_leader_takes_reports_and_only_of_its_own_cluster() {
        let taken = report(Some(CLUSTER), CLUSTER, true).await;
        assert!(matches!(taken, Ok(Event::Reported { .. })), "{taken:?}");
        let taken = report(Some(CLUSTER), CLUSTER, false).await;
        assert!(matches!(taken, Ok(Event::GatewayReported(_))), "{taken:?}");
        for from_node in [true, false] {
            let other = report(Some(CLUSTER), CLUSTER + 1, from_node).await;
            let status = other.expect_err("another cluster's");
            assert_eq!(status.code(), tonic::Code::FailedPrecondition);
            assert!(status.message().contains("cluster"), "{status}");
            let standby = report(None, CLUSTER, from_node).await.expect_err("a standby");
            assert_eq!(standby.code(), tonic::Code::Unavailable);
        }
    }
}
