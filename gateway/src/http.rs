//! Sockets → requests → answers: hyper at the edge of one worker.
//!
//! Settings that a newcomer would change:
//!
//! - `half_close` is on: whoever closes their sending side after the request, as `nc` does, still gets the answer. It
//!   also saves a read per request, since hyper need not look for the end of the connection while it waits.
//! - `pipeline_flush` is off: while anything unread is in its buffer it flushes nothing, so what is no HTTP would be met
//!   with silence instead of a 400.
//! - `writev` is off: nearly every answer is one small piece, cheaper copied behind its head than gathered by the kernel.
//! - A refused request's body is read and dropped, within bounds, before the answer is given: a socket that is closed
//!   with bytes unread is reset, and the client would never see why it was refused.

use std::cell::{Cell, RefCell};
use std::convert::Infallible;
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use engine::batcher::{ReadValues, WriteResult};
use engine::idempotency::{Scope, Token};
use engine::ids::Now;
use engine::key::CounterKey;
use engine::ops::{Op, OpKind};
use http_body_util::BodyExt;
use hyper::body::{Body, Incoming};
use hyper::header::EXPECT;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use slab::Slab;
use telemetry::{Health, Metrics};
use tokio::net::TcpStream;
use tracing::debug;

use crate::failure;
use crate::held::{Counted, Held};
use crate::lanes::Lanes;
use crate::linger::Gentle;
use crate::metrics::{Counters, Operation};
use crate::openapi;
use crate::problem::{Kind, Problem};
use crate::refusals::Refusals;
use crate::request::{self, BODY_BYTES_MAX, Batch, BodyType, FailedItem, Head, Page, Route};
use crate::response::{self, About, Response};
use crate::status;

/// The largest head of a request, and what is read from a socket at once. Whoever sends half a head makes us hold it, on
/// each of ten thousand connections.
const READ_BYTES_MAX: usize = 32 * 1024;
const HEADERS_MAX: usize = 64;
/// So much of a refused body is still read, to be able to say why.
const DRAIN_BYTES_MAX: usize = 32 << 20;
const DRAIN_WITHIN: Duration = Duration::from_secs(2);
/// Where clients wait for a place: a connection is closed for them once it has been idle for so long, of as many one.
const SHED_IDLE: Duration = Duration::from_millis(500);
const SHED_SHARE: usize = 8;
/// So much is set aside for a body that is only announced; it grows as it comes.
const ANNOUNCED_BYTES_MAX: usize = 64 * 1024;

/// What the requests of one worker need.
pub(crate) struct Front {
    pub(crate) lanes: Rc<Lanes>,
    pub(crate) health: Health,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) counters: Arc<Counters>,
    pub(crate) board: status::Board,
    /// How long a connection may say nothing, take for a request's head, or not take anything of an answer.
    idle: Duration,
    /// Connections that are open, each with its task, and whether they are to end.
    connections: RefCell<Connections>,
    held: Held,
}

#[derive(Default)]
struct Connections {
    open: Slab<Seat>,
    stopping: bool,
    /// Waits until all are closed.
    closed: Option<Waker>,
}

/// One connection that is open.
struct Seat {
    task: Option<Waker>,
    /// Since when no request of it is under way; none while one is.
    idle_since: Option<Instant>,
    /// It closes as soon as nothing of it is under way.
    ends: bool,
}

impl Front {
    pub(crate) fn new(
        lanes: Rc<Lanes>,
        health: Health,
        metrics: Arc<Metrics>,
        counters: Arc<Counters>,
        board: status::Board,
        idle: Duration,
    ) -> Rc<Self> {
        let (connections, held) = Default::default();
        Rc::new(Self { lanes, health, metrics, counters, board, idle, connections, held })
    }

    /// Serves one connection to its end.
    pub(crate) async fn serve(self: Rc<Self>, stream: TcpStream) {
        let open = Open::new(self.clone());
        let line_ended = Rc::new(Cell::new(false));
        let service = service_fn(|request| {
            let (front, line_ended, place) = (self.clone(), line_ended.clone(), open.place);
            async move {
                front.is_idle_since(place, None);
                let answer = front.answer(request).await;
                front.is_idle_since(place, Some(Instant::now()));
                // What comes from here on belongs to the next head, but for what has been read already.
                line_ended.set(false);
                Ok::<_, Infallible>(answer)
            }
        });
        let stream = Gentle::new(stream, self.idle);
        let stream = Refusals::new(stream, line_ended.clone(), self.counters.clone());
        let connection = http1::Builder::new()
            .half_close(true)
            .writev(false)
            .max_buf_size(READ_BYTES_MAX)
            .max_headers(HEADERS_MAX)
            .timer(TokioTimer::new())
            .header_read_timeout(self.idle)
            .serve_connection(TokioIo::new(stream), service);
        let mut connection = pin!(connection);
        let mut told = false;
        let served = poll_fn(|cx| {
            if !told && open.is_to_end(cx.waker()) {
                told = true;
                connection.as_mut().graceful_shutdown();
            }
            connection.as_mut().poll(cx)
        });
        if let Err(error) = served.await {
            debug!(%error, "connection ended");
        }
    }

    /// Every connection ends after the request that it has under way.
    pub(crate) fn stop(&self) {
        let mut connections = self.connections.borrow_mut();
        connections.stopping = true;
        connections.open.iter_mut().for_each(|(_, seat)| seat.wake());
    }

    /// Ends the connections that have been idle for longest, an eighth of all and at least one, so that others find a
    /// place. What has just been used is kept: its client may be about to send.
    pub(crate) fn shed(&self) {
        let mut connections = self.connections.borrow_mut();
        let open = &mut connections.open;
        let ending = open.iter().filter(|(_, seat)| seat.ends).count();
        let many = open.len().div_ceil(SHED_SHARE).saturating_sub(ending);
        let mut idle: Vec<&mut Seat> = open
            .iter_mut()
            .map(|(_, seat)| seat)
            .filter(|seat| {
                !seat.ends && seat.idle_since.is_some_and(|it| it.elapsed() >= SHED_IDLE)
            })
            .collect();
        idle.sort_by_key(|seat| seat.idle_since);
        for seat in idle.into_iter().take(many) {
            seat.ends = true;
            seat.wake();
            self.counters.shed.inc();
        }
    }

    fn is_idle_since(&self, place: usize, since: Option<Instant>) {
        self.connections.borrow_mut().open[place].idle_since = since;
    }

    /// Waits until no connection is open.
    pub(crate) async fn closed(&self) {
        poll_fn(|cx| {
            let mut connections = self.connections.borrow_mut();
            if connections.open.is_empty() {
                return Poll::Ready(());
            }
            connections.closed = Some(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }

    async fn answer(&self, request: Request<Incoming>) -> Response {
        let (parts, mut body) = request.into_parts();
        let head = request::head(&parts).and_then(|head| head.at(self.lanes.clock()));
        let operation = head.as_ref().map_or(Operation::None, |head| Operation::of(&head.route));
        let timeout = head.as_ref().map_or(DRAIN_WITHIN, |head| head.timeout);
        let deadline = Deadline::after(&self.lanes, timeout);
        let mut counted = self.held.nothing();
        let answered = match head {
            Ok(head) => self.respond(head, &mut body, &mut counted, &deadline).await,
            Err(problem) => Err(problem),
        };
        let mut response = match answered {
            Ok(response) => response,
            Err(problem) => {
                // What came of the body is dropped already, and so is what still comes.
                counted.set(0);
                // Who waits to be told to go on has not sent it yet.
                if !body.is_end_stream() && !parts.headers.contains_key(EXPECT) {
                    drain(&mut body, deadline.instant).await;
                }
                response::problem(&problem)
            }
        };
        counted.set(response.body().bytes());
        response.body_mut().count(counted);
        self.counters.request(operation, response.status().as_u16());
        response
    }

    async fn respond(
        &self,
        head: Head,
        body: &mut Incoming,
        counted: &mut Counted,
        deadline: &Deadline,
    ) -> Result<Response, Problem> {
        let Head { route, body: body_type, token, plain, .. } = head;
        let token_of = |scope, also| {
            token.map(|token| Token { scope, token: token.key, issued: token.issued, also })
        };
        if !matches!(route, Route::Page(_)) && self.lanes.is_full() {
            let detail = "too much waits in this gateway already";
            let status = match route.writes() {
                true => Kind::Overloaded.status(),
                false => StatusCode::SERVICE_UNAVAILABLE,
            };
            return Err(Problem { status, ..Problem::new(Kind::Overloaded, detail) });
        }
        match route {
            Route::Increment { counter, query } => {
                let body = read(body, counted, deadline).await?;
                let asked = request::increment(body_type, &body, query)?;
                let about = About::new(&counter, plain);
                let delta = i128::from(asked.delta);
                let kind = match asked.returning {
                    true => OpKind::AddReturning { delta },
                    false => OpKind::Add { delta },
                };
                let op = Op { counter, kind };
                let done = self.write_one(op, token_of(Scope::Counter, 0), deadline).await?;
                if asked.returning && done.value.is_none() {
                    return Err(no_value());
                }
                Ok(done.marked(about.incremented(asked.delta, done.value)))
            }
            Route::Delete { counter } => {
                let about = About::deleted(&counter, plain);
                let op = Op { counter, kind: OpKind::Delete };
                let done = self.write_one(op, token_of(Scope::Counter, 0), deadline).await?;
                Ok(done.marked(about.value(done.value.ok_or_else(no_value)?, None)))
            }
            Route::Get { counter, bounded_ms } => {
                let about = About::new(&counter, plain);
                let found = self.read_values(vec![counter], bounded_ms, deadline).await?;
                let &value = found.values.first().ok_or_else(no_value)?;
                Ok(about.value(value, bounded_ms.map(|_| found.staleness_ms)))
            }
            Route::GetMany { namespace, bounded_ms } => {
                let body = read(body, counted, deadline).await?;
                let keys = request::keys(&namespace, &body)?;
                if keys.is_empty() {
                    return Ok(response::values(&[], &[], bounded_ms.map(|_| 0)));
                }
                let found = self.read_values(keys.clone(), bounded_ms, deadline).await?;
                if found.values.len() != keys.len() {
                    return Err(no_value());
                }
                let staleness_ms = bounded_ms.map(|_| found.staleness_ms);
                refusable(response::values(&keys, &found.values, staleness_ms), counted)
            }
            Route::IncrementMany { namespace } => {
                let body = read(body, counted, deadline).await?;
                let batch = request::increments(&namespace, body_type, &body)?;
                counted.add(batch.failed_bytes())?;
                let token = token_of(Scope::Batch, batch.also());
                let written = Written { namespace: &namespace, body_type, body: &body };
                Ok(self.write_many(batch, token, written, deadline).await)
            }
            Route::Page(page) => refusable(self.page(page).await, counted),
        }
    }

    async fn read_values(
        &self,
        keys: Vec<CounterKey>,
        bounded_ms: Option<u64>,
        deadline: &Deadline,
    ) -> Result<ReadValues, Problem> {
        let found = self.lanes.read(keys, bounded_ms, deadline.at).await;
        found.map_err(match bounded_ms {
            Some(_) => failure::of_bounded_read,
            None => failure::of_read,
        })
    }

    async fn write_one(
        &self,
        op: Op,
        token: Option<Token>,
        deadline: &Deadline,
    ) -> Result<Done, Problem> {
        let result = self.lanes.write(vec![op], token, deadline.at).await;
        let WriteResult { values, replayed, failed } = result;
        self.counters.replays.inc_by(replayed as u64);
        match failed.first() {
            Some(&(_, failure)) => Err(failure::of_write(failure)),
            None => {
                let value = values.first().map(|&(_, value)| value);
                Ok(Done { value, replayed: replayed > 0 })
            }
        }
    }

    async fn write_many(
        &self,
        Batch { ops, indexes, mut failed }: Batch,
        token: Option<Token>,
        written: Written<'_>,
        deadline: &Deadline,
    ) -> Response {
        let items = ops.len() + failed.len();
        if ops.is_empty() {
            return response::batch(items, &failed);
        }
        let result = self.lanes.write(ops, token, deadline.at).await;
        self.counters.replays.inc_by(result.replayed as u64);
        let not_done = result.failed.into_iter().map(|(op, failure)| FailedItem {
            index: indexes[op as usize],
            key: None,
            problem: failure::of_write(failure),
        });
        let understood = failed.len();
        failed.extend(not_done);
        if failed.len() > understood {
            failed.sort_by_key(|item| item.index);
            if response::only_reason(items, &failed).is_none() {
                written.name(&mut failed);
            }
        }
        // All that was applied was applied before: nothing has happened now.
        let done = Done {
            value: None,
            replayed: result.replayed > 0 && result.replayed == items - failed.len(),
        };
        done.marked(response::batch(items, &failed))
    }

    async fn page(&self, page: Page) -> Response {
        let path = match page {
            Page::Livez => "/livez",
            Page::Readyz => "/readyz",
            Page::Metrics => "/metrics",
            Page::Cluster => {
                let body = self.board.cluster().await;
                return response::page(StatusCode::OK, "application/json", body);
            }
            Page::OpenApi => {
                let body = openapi::text().to_vec();
                return response::page(StatusCode::OK, "application/json", body);
            }
        };
        match telemetry::page(path, &self.health, &self.metrics) {
            Some(page) => response::page(page.status, page.content_type, page.body.into_bytes()),
            None => response::problem(&Problem::new(Kind::Internal, "a page of ours is missing")),
        }
    }
}

/// The machine answered with fewer values than were asked for.
fn no_value() -> Problem {
    Problem::unknown(Kind::Internal, "an answer without the value that was asked for: a bug")
}

/// What became of one operation that was applied.
struct Done {
    /// If one was asked for.
    value: Option<i128>,
    /// It was applied before, under the same token.
    replayed: bool,
}

impl Done {
    fn marked(&self, response: Response) -> Response {
        if self.replayed { response::replayed(response) } else { response }
    }
}

/// A body of many items, as it came.
struct Written<'a> {
    namespace: &'a str,
    body_type: BodyType,
    body: &'a [u8],
}

impl Written<'_> {
    /// Gives failed items their keys. The operations have gone to the machine, and failing is rare: the body is read
    /// again.
    fn name(&self, failed: &mut [FailedItem]) {
        let Ok(again) = request::increments(self.namespace, self.body_type, self.body) else {
            return;
        };
        for item in failed.iter_mut().filter(|item| item.key.is_none()) {
            if let Ok(op) = again.indexes.binary_search(&item.index) {
                item.key = Some(again.ops[op].counter.key().to_vec());
            }
        }
    }
}

/// When a request is over, on both clocks.
struct Deadline {
    at: Now,
    instant: Instant,
}

impl Deadline {
    fn after(lanes: &Lanes, timeout: Duration) -> Self {
        let at = Now(lanes.now().0 + timeout.as_micros() as u64);
        Self { at, instant: Instant::now() + timeout }
    }
}

/// Nothing was changed, so it may be refused if too much is held already.
fn refusable(response: Response, counted: &mut Counted) -> Result<Response, Problem> {
    let status = StatusCode::SERVICE_UNAVAILABLE;
    let refused = |problem| Problem { status, ..problem };
    counted.answer(response.body().bytes()).map_err(refused)?;
    Ok(response)
}

/// The whole body. What comes too late or is too large had no effect.
async fn read(
    body: &mut Incoming,
    counted: &mut Counted,
    deadline: &Deadline,
) -> Result<Bytes, Problem> {
    if body.is_end_stream() {
        return Ok(Bytes::new());
    }
    if body.size_hint().lower() > BODY_BYTES_MAX as u64 {
        return Err(request::body_too_large());
    }
    let collected = collect(body, counted);
    tokio::time::timeout_at(deadline.instant.into(), collected).await.unwrap_or_else(|_| {
        Err(Problem::bad_input("body", "the body did not come in whole before the deadline"))
    })
}

async fn collect(body: &mut Incoming, counted: &mut Counted) -> Result<Bytes, Problem> {
    let Some(first) = data(body).await? else {
        return Ok(Bytes::new());
    };
    count(&first, counted)?;
    // Most bodies come in one piece, which is taken as it is.
    let Some(second) = data(body).await? else {
        return Ok(first);
    };
    let expected = first.len() + second.len() + body.size_hint().lower() as usize;
    let mut all = BytesMut::with_capacity(expected.min(ANNOUNCED_BYTES_MAX));
    all.extend_from_slice(&first);
    let mut next = Some(second);
    while let Some(piece) = next {
        count(&piece, counted)?;
        all.extend_from_slice(&piece);
        next = data(body).await?;
    }
    Ok(all.freeze())
}

fn count(piece: &Bytes, counted: &mut Counted) -> Result<(), Problem> {
    if counted.bytes() + piece.len() > BODY_BYTES_MAX {
        return Err(request::body_too_large());
    }
    counted.add(piece.len())
}

/// The next piece of a body.
async fn data(body: &mut Incoming) -> Result<Option<Bytes>, Problem> {
    loop {
        match body.frame().await {
            None => return Ok(None),
            // What is no data is trailers, which say nothing that we know.
            Some(Ok(frame)) => {
                if let Ok(data) = frame.into_data() {
                    return Ok(Some(data));
                }
            }
            Some(Err(error)) => {
                return Err(Problem::bad_input("body", format!("can't be read: {error}")));
            }
        }
    }
}

/// Reads the rest of a body and drops it, within bounds of size and time.
async fn drain(body: &mut Incoming, until: Instant) {
    let rest = async {
        let mut bytes = 0;
        while bytes < DRAIN_BYTES_MAX {
            match data(body).await {
                Ok(Some(piece)) => bytes += piece.len(),
                Ok(None) | Err(_) => break,
            }
        }
    };
    let until = until.min(Instant::now() + DRAIN_WITHIN);
    let _cut = tokio::time::timeout_at(until.into(), rest).await;
}

impl Seat {
    fn wake(&mut self) {
        if let Some(task) = self.task.take() {
            task.wake();
        }
    }
}

/// A connection's place in the list of open ones.
struct Open {
    front: Rc<Front>,
    place: usize,
}

impl Open {
    fn new(front: Rc<Front>) -> Self {
        let seat = Seat { task: None, idle_since: Some(Instant::now()), ends: false };
        let place = front.connections.borrow_mut().open.insert(seat);
        front.counters.connections.inc();
        Self { front, place }
    }

    /// Whether the connection is to end. If not, the task is woken when it is.
    fn is_to_end(&self, waker: &Waker) -> bool {
        let mut connections = self.front.connections.borrow_mut();
        let stopping = connections.stopping;
        let seat = &mut connections.open[self.place];
        if !seat.task.as_ref().is_some_and(|kept| kept.will_wake(waker)) {
            seat.task = Some(waker.clone());
        }
        stopping || seat.ends
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        let mut connections = self.front.connections.borrow_mut();
        connections.open.remove(self.place);
        self.front.counters.connections.dec();
        if connections.open.is_empty()
            && let Some(waker) = connections.closed.take()
        {
            waker.wake();
        }
    }
}
