//! What nodes and gateways say unasked. Only the leader listens.
//!
//! Reports are hints: the machine looks for itself before it acts on one. So one that finds the driver busy is dropped;
//! the next comes within a second.

use engine::coordinator::Event;
use engine::message::Report;
use proto::wire;
use proto::wire::reports_server::Reports;
use tokio::sync::{mpsc, watch};
use tonic::{Request, Response, Status};
use tracing::debug;

use crate::etcd::Told;

pub(crate) struct Desk {
    told: mpsc::Sender<Told>,
    /// The cluster that this process leads; none while it is a standby.
    leads: watch::Receiver<Option<u128>>,
}

impl Desk {
    pub(crate) fn new(told: mpsc::Sender<Told>, leads: watch::Receiver<Option<u128>>) -> Self {
        Self { told, leads }
    }
}

#[tonic::async_trait]
impl Reports for Desk {
    async fn report(
        &self,
        request: Request<wire::NodeReport>,
    ) -> Result<Response<wire::Empty>, Status> {
        let leads = *self.leads.borrow();
        let Some(cluster) = leads else {
            return Err(Status::unavailable("a standby: report to the leader"));
        };
        let report = request.into_inner();
        wire::Open::accept_required(report.open.as_ref(), cluster)?;
        let from = report.from.map(Into::into);
        let report = Report::try_from(report)?;
        let event = match from {
            Some(from) => Event::Reported { from, report },
            None => Event::GatewayReported { suspects: report.silent },
        };
        if self.told.try_send(Told::Event(event)).is_err() {
            debug!("too busy for a report");
        }
        Ok(Response::new(wire::Empty {}))
    }
}

#[cfg(test)]
mod tests {
    use engine::ids::{Boot, StoreBoot, StoreId};

    use super::*;

    const CLUSTER: u128 = 7;

    /// What becomes of a report that names `cluster`, at a process that leads `leads`.
    async fn report(leads: Option<u128>, cluster: u128, from_node: bool) -> Result<Event, Status> {
        let (told, mut inbox) = mpsc::channel(1);
        let desk = Desk::new(told, watch::channel(leads).1);
        let from = from_node.then_some(StoreBoot { store: StoreId(2), boot: Boot(1) });
        let report = Report { silent: vec![StoreId(1)], ..Report::default() };
        let reported = desk.report(Request::new(wire::NodeReport::new(cluster, from, report)));
        let refused = reported.await.err();
        match (inbox.try_recv(), refused) {
            (Ok(Told::Event(event)), None) => Ok(event),
            (Err(_), Some(status)) => Err(status),
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn only_the_leader_takes_reports_and_only_of_its_own_cluster() {
        let taken = report(Some(CLUSTER), CLUSTER, true).await;
        assert!(matches!(taken, Ok(Event::Reported { .. })), "{taken:?}");
        let taken = report(Some(CLUSTER), CLUSTER, false).await;
        assert!(matches!(taken, Ok(Event::GatewayReported { .. })), "{taken:?}");
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
