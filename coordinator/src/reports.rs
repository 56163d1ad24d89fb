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
