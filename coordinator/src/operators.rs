//! Answers operators: `dkc plan` (the moves that the planner makes, and why they wait) and
//! `dkc events`.
//!
//! The driver's loop only copies the planner's inputs. The forecast is computed in a thread of its
//! own, one at a time, since that of a large cluster takes seconds.

use std::sync::Arc;

use engine::coordinator::MovesStatus;
use engine::coordinator::planner::PlanView;
use engine::ids::StoreId;
use proto::wire;
use proto::wire::operator_server::Operator;
use tokio::sync::{Mutex, mpsc, oneshot, watch};
use tonic::{Request, Response, Status};

use crate::etcd::{DriverMessage, EventsRequest};

/// More rounds than an operator waits for.
const ROUNDS_MAX: usize = 500;

/// The gRPC service `Operator`.
pub(crate) struct OperatorService {
    messages: mpsc::Sender<DriverMessage>,
    /// The cluster that this process leads; `None` while it is a standby.
    led_cluster: watch::Receiver<Option<u128>>,
    /// Held by the forecast that is being computed.
    computing: Arc<Mutex<()>>,
}

impl OperatorService {
    pub(crate) fn new(
        messages: mpsc::Sender<DriverMessage>,
        led_cluster: watch::Receiver<Option<u128>>,
    ) -> Self {
        Self { messages, led_cluster, computing: Arc::default() }
    }

    /// Asks the driver for the planner's inputs.
    async fn view(&self) -> Result<(PlanView, MovesStatus), Status> {
        let (reply, answer) = oneshot::channel();
        let asked = self.messages.send(DriverMessage::Plan(reply)).await;
        let answer = if asked.is_ok() { answer.await.ok().flatten() } else { None };
        answer.ok_or_else(|| {
            Status::unavailable("this coordinator does not lead, or has not probed all nodes yet")
        })
    }
}

#[tonic::async_trait]
impl Operator for OperatorService {
    async fn plan(
        &self,
        request: Request<wire::PlanQuery>,
    ) -> Result<Response<wire::PlanReply>, Status> {
        let led_cluster = *self.led_cluster.borrow();
        let Some(cluster) = led_cluster else {
            return Err(Status::unavailable("this coordinator is a standby: ask the leader"));
        };
        let query = request.into_inner();
        wire::Open::accept_required(query.open.as_ref(), cluster)?;
        let drain = query.drain.map(StoreId::from);
        // The thread holds it: it goes on if the client does not wait.
        let one_at_a_time = self.computing.clone().lock_owned().await;
        let (view, moves) = self.view().await?;
        let computed = tokio::task::spawn_blocking(move || {
            let _one_at_a_time = one_at_a_time;
            reply(view, &moves, drain)
        });
        let computed = computed.await;
        let reply = computed.map_err(|_| Status::internal("the forecast failed: see the log"))?;
        Ok(Response::new(reply))
    }

    async fn events(
        &self,
        request: Request<wire::EventsQuery>,
    ) -> Result<Response<wire::EventsReply>, Status> {
        let query = request.into_inner();
        let (reply, answer) = oneshot::channel();
        let request = EventsRequest { seen: (query.instance, query.after), reply };
        let asked = self.messages.send(DriverMessage::Events(request)).await;
        let answer = if asked.is_ok() { answer.await.ok().flatten() } else { None };
        let Some((cluster, reply)) = answer else {
            return Err(Status::unavailable("this coordinator knows no cluster yet"));
        };
        wire::Open::accept_required(query.open.as_ref(), cluster)?;
        Ok(Response::new(reply))
    }
}

fn reply(view: PlanView, moves: &MovesStatus, drain: Option<StoreId>) -> wire::PlanReply {
    let obstacle = drain.and_then(|store| view.drain_obstacle(store));
    let (paused, guard) = (view.paused, view.hold);
    let view = match drain {
        Some(store) => view.drained(store),
        None => view,
    };
    let forecast = view.forecast(ROUNDS_MAX);
    wire::PlanReply { paused, guard, ..wire::PlanReply::new(&forecast, moves, obstacle) }
}
