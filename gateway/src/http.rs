//! The HTTP server of one worker: hyper, from socket to request to answer.
//!
//! Reasons for the settings of hyper and for the end of a connection:
//!
//! - `half_close` is on: a client that closes its sending side after the request, as `nc` does,
//!   still gets the answer. It also saves a read per request, since hyper need not look for the end
//!   of the connection while it waits.
//! - `pipeline_flush` is off: with it, hyper flushes nothing while its buffer has unread input, so
//!   input that is not HTTP would get no answer instead of a 400.
//! - `writev` is off: nearly every answer is one small piece, which is cheaper to copy behind its
//!   head than to gather in the kernel.
//! - hyper has no timer: its timer for heads would be made and dropped with every request. One
//!   timer of the worker ends all connections that are idle, or whose head is not complete, for too
//!   long.
//! - A connection ends by an answer with `Connection: close`, or when it has no request in flight
//!   and nothing in the socket: hyper's own graceful shutdown would drop a request that was sent
//!   and not read yet (see `lingering_close.rs`).
//! - The body of a refused request is read and dropped, within limits, before the answer is given:
//!   the kernel resets a socket that is closed with bytes unread, and the client would never see
//!   the reason.

use std::cell::{Cell, RefCell};
use std::convert::Infallible;
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use engine::batcher::{Failure, ReadValues, WriteResult};
use engine::ids::Now;
use engine::key::CounterKey;
use engine::ops::{Op, OpKind};
use engine::shard::idempotency::{ClientToken, Scope};
use http_body_util::BodyExt;
use hyper::body::{Body, Incoming};
use hyper::header::{CACHE_CONTROL, CONNECTION, EXPECT, HeaderName, HeaderValue, VARY};
use hyper::http::request::Parts;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{HeaderMap, Method, Request, StatusCode, Version};
use hyper_util::rt::TokioIo;
use slab::Slab;
use telemetry::{Health, Metrics};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::{Instant as TokioInstant, MissedTickBehavior};
use tracing::debug;

use crate::admission::AdmittedRequest;
use crate::browser::{self, Allowed, Origins};
use crate::failure;
use crate::lingering_close::LingeringStream;
use crate::mailbox::Mailbox;
use crate::malformed_heads::MalformedHeadStream;
use crate::memory_budget::{AnswerBody, MemoryBudget, Reservation};
use crate::metrics::{GatewayMetrics, Operation};
use crate::openapi;
use crate::problem::{Kind, Problem};
use crate::request::{
    self, BODY_BYTES_MAX, BodyType, FailedItem, IncrementBatch, InfoPage, ReadQuery, RequestHead,
    Route,
};
use crate::response::{self, CounterAnswer, Response, ValueForm};
use crate::status;

/// The largest head of a request, and the most that is read from a socket at once. A client that
/// sends half a head makes the gateway hold it, on each of perhaps ten thousand connections.
const READ_BYTES_MAX: usize = 32 * 1024;
const HEADERS_MAX: usize = 64;
/// The most that is still read of a refused body, so that the client gets the answer.
const DRAIN_BYTES_MAX: usize = 32 << 20;
const DRAIN_WITHIN: Duration = Duration::from_secs(2);
/// A connection must have been idle for this long to be closed in favour of a waiting client.
const SHED_IDLE: Duration = Duration::from_millis(500);
/// One of this many connections is closed at a time.
const SHED_SHARE: usize = 8;
/// Idle connections are looked for this often within the time that they may be idle.
const IDLE_CHECKS: u32 = 8;
/// The most memory that is allocated in advance for a body of an announced length.
const ANNOUNCED_BYTES_MAX: usize = 64 * 1024;
/// A large request waits for room in the batcher for no longer than this, nor beyond its deadline.
const ADMISSION_MS_MAX: u64 = 500;
/// The memory that operations take once they are parsed, for each byte of a body: about 150 bytes
/// for an increment of a line of 15.
const PARSED_BYTES: usize = 10;

static KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
/// Answers must not be cached: their content may change at any time.
const NO_STORE: HeaderValue = HeaderValue::from_static("no-store");
const CLOSE: HeaderValue = HeaderValue::from_static("close");

/// The sources of the pages about the gateway and the cluster.
#[derive(Clone)]
pub(crate) struct Pages {
    /// The health of the gateway itself.
    pub(crate) health: Health,
    /// The health of the gateway and of all shards.
    pub(crate) all: Health,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) status_page: status::StatusPage,
}

/// The limits that clients are subject to.
#[derive(Clone)]
pub(crate) struct ClientPolicy {
    /// The time for which a connection may be idle, take to send the head of a request, or read
    /// nothing of an answer.
    pub(crate) idle: Duration,
    /// Bytes of bodies and answers that a worker may hold.
    pub(crate) body_bytes_max: usize,
    pub(crate) origins: Origins,
}

/// The HTTP server of one worker: its open connections, and everything that its requests need.
pub(crate) struct HttpServer {
    mailbox: Rc<Mailbox>,
    pages: Pages,
    counters: Arc<GatewayMetrics>,
    policy: ClientPolicy,
    /// The value of `Keep-Alive` in every answer that does not close its connection.
    keep_alive: HeaderValue,
    connections: RefCell<OpenConnections>,
    budget: MemoryBudget,
    /// The process is ending: the server no longer waits for the rest of any body.
    ending: watch::Sender<bool>,
}

#[derive(Default)]
struct OpenConnections {
    open: Slab<ConnectionState>,
    /// Every answer closes its connection.
    closing: bool,
    /// Each connection ends as soon as it has no request in flight.
    stopping: bool,
    /// The task that waits until all connections are closed.
    all_closed: Option<Waker>,
}

/// The state of an open connection.
struct ConnectionState {
    task: Option<Waker>,
    /// The moment since which no request is in flight. `None` while one is.
    idle_since: Option<Instant>,
    /// The connection ends as soon as no request is in flight.
    ends: bool,
}

impl HttpServer {
    pub(crate) fn new(
        mailbox: Rc<Mailbox>,
        pages: Pages,
        counters: Arc<GatewayMetrics>,
        policy: ClientPolicy,
    ) -> Rc<Self> {
        let timeout = format!("timeout={}", policy.idle.as_secs());
        let keep_alive = HeaderValue::from_str(&timeout).expect("digits can stand in a header");
        let budget = MemoryBudget::new(policy.body_bytes_max);
        let (connections, ending) = Default::default();
        Rc::new(Self { mailbox, pages, counters, policy, keep_alive, connections, budget, ending })
    }

    /// Serves one connection to its end.
    pub(crate) async fn serve(self: Rc<Self>, stream: TcpStream) {
        let guard = ConnectionGuard::new(self.clone());
        let (line_ended, ends) = (Rc::new(Cell::new(false)), Rc::new(Cell::new(false)));
        let service = service_fn(|request| {
            let (server, id) = (self.clone(), guard.id);
            let (line_ended, ends) = (line_ended.clone(), ends.clone());
            async move {
                // The body of this request may still be on its way.
                ends.set(false);
                server.set_idle_since(id, None);
                let answer = server.answer(request, id).await;
                server.set_idle_since(id, Some(Instant::now()));
                // Input from here on belongs to the next head, except for what has been read
                // already.
                line_ended.set(false);
                Ok::<_, Infallible>(answer)
            }
        });
        let stream = LingeringStream::new(stream, self.policy.idle, ends.clone());
        let stream = MalformedHeadStream::new(stream, line_ended.clone(), self.counters.clone());
        let connection = http1::Builder::new()
            .half_close(true)
            .writev(false)
            .max_buf_size(READ_BYTES_MAX)
            .max_headers(HEADERS_MAX)
            .serve_connection(TokioIo::new(stream), service);
        let mut connection = pin!(connection);
        let served = poll_fn(|cx| {
            ends.set(guard.is_to_end(cx.waker()));
            connection.as_mut().poll(cx)
        });
        if let Err(error) = served.await {
            debug!(%error, "client connection failed");
        }
    }

    /// Lets every answer from now on close its connection.
    pub(crate) fn close_after_answers(&self) {
        self.connections.borrow_mut().closing = true;
    }

    /// Stops waiting for the rest of bodies: their requests are answered now.
    pub(crate) fn stop_waiting(&self) {
        self.ending.send_replace(true);
    }

    /// Lets every connection end after the requests that it has in flight.
    pub(crate) fn stop(&self) {
        let mut connections = self.connections.borrow_mut();
        (connections.closing, connections.stopping) = (true, true);
        connections.open.iter_mut().for_each(|(_, connection)| connection.wake());
    }

    /// Ends the connections that have been idle for longest, an eighth of all and at least one, so
    /// that new clients can connect. Connections that were used just now are kept: their clients
    /// may be about to send.
    pub(crate) fn shed_idle(&self) {
        let mut connections = self.connections.borrow_mut();
        let open = &mut connections.open;
        let ending = open.iter().filter(|(_, connection)| connection.ends).count();
        let count = open.len().div_ceil(SHED_SHARE).saturating_sub(ending);
        let is_long_idle = |since: Instant| since.elapsed() >= SHED_IDLE;
        let mut idle: Vec<&mut ConnectionState> = open
            .iter_mut()
            .map(|(_, connection)| connection)
            .filter(|connection| {
                !connection.ends && connection.idle_since.is_some_and(is_long_idle)
            })
            .collect();
        idle.sort_by_key(|connection| connection.idle_since);
        for connection in idle.into_iter().take(count) {
            connection.ends = true;
            connection.wake();
            self.counters.shed.inc();
        }
    }

    /// Ends connections that have had no request in flight for as long as they may be idle, until
    /// dropped. This includes those that are sending the head of one.
    pub(crate) async fn end_idle(self: Rc<Self>) {
        let mut checks = tokio::time::interval(self.policy.idle / IDLE_CHECKS);
        checks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            checks.tick().await;
            let now = Instant::now();
            let is_late = |since: Instant| now.duration_since(since) >= self.policy.idle;
            for (_, connection) in &mut self.connections.borrow_mut().open {
                if !connection.ends && connection.idle_since.is_some_and(is_late) {
                    connection.ends = true;
                    connection.wake();
                }
            }
        }
    }

    fn set_idle_since(&self, id: usize, since: Option<Instant>) {
        self.connections.borrow_mut().open[id].idle_since = since;
    }

    /// Waits until no connection is open.
    pub(crate) async fn all_closed(&self) {
        poll_fn(|cx| {
            let mut connections = self.connections.borrow_mut();
            if connections.open.is_empty() {
                return Poll::Ready(());
            }
            connections.all_closed = Some(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }

    /// Returns whether the answer that is given now closes its connection.
    fn closes(&self, id: usize) -> bool {
        let connections = self.connections.borrow();
        connections.closing || connections.open[id].ends
    }

    async fn answer(&self, request: Request<Incoming>, id: usize) -> Response {
        let (parts, mut body) = request.into_parts();
        let checked = self.policy.origins.check(&parts.headers);
        let head = match &checked {
            Ok(_) => request::head(&parts)
                .and_then(|head| head.check_issue_time(|| self.mailbox.clock())),
            Err(problem) => Err(problem.clone()),
        };
        let allowed = checked.unwrap_or_default();
        let operation = head.as_ref().map_or(Operation::None, |head| Operation::of(&head.route));
        let timeout = head.as_ref().map_or(DRAIN_WITHIN, |head| head.timeout);
        let traits = AnswerTraits {
            has_forms: head.as_ref().is_ok_and(|head| head.route.has_forms()),
            is_static: head.as_ref().is_ok_and(|head| head.route == Route::Page(InfoPage::OpenApi)),
        };
        let deadline = Now(self.mailbox.now().0 + timeout.as_micros() as u64);
        let mut reservation = self.budget.reserve();
        let answered = match head {
            _ if allowed.is_preflight(&parts) => Ok(preflight()),
            Ok(head) => self.respond(head, &mut body, &mut reservation, deadline).await,
            Err(problem) => Err(problem),
        };
        let mut response = match answered {
            // A health check with OPTIONS wants the status only.
            Ok(response) if parts.method == Method::OPTIONS => {
                response.map(|_| AnswerBody::new(""))
            }
            Ok(response) => response,
            Err(problem) => {
                // The received part of the body is dropped already, and the rest is dropped below.
                reservation.set(0);
                // A client that waits for `100 Continue` has not sent the body yet.
                if !body.is_end_stream() && !parts.headers.contains_key(EXPECT) {
                    let mut ending = self.ending.subscribe();
                    tokio::select! {
                        () = drain(&mut body, self.mailbox.timer_at(deadline)) => {}
                        _ = ending.wait_for(|&ending| ending) => {}
                    }
                }
                response::problem(&problem)
            }
        };
        reservation.set(response.body().bytes());
        response.body_mut().limit(reservation, self.policy.idle);
        self.counters.count_request(operation, response.status().as_u16());
        self.add_headers(response.headers_mut(), traits, &allowed);
        if self.closes(id) {
            response.headers_mut().insert(CONNECTION, CLOSE);
        } else if is_kept(&parts) {
            response.headers_mut().insert(&KEEP_ALIVE, self.keep_alive.clone());
        }
        response
    }

    /// Adds the headers for caches and browsers.
    fn add_headers(&self, headers: &mut HeaderMap, traits: AnswerTraits, allowed: &Allowed) {
        if !traits.is_static {
            headers.insert(CACHE_CONTROL, NO_STORE);
        }
        let vary = match (traits.has_forms, self.policy.origins.vary()) {
            (true, true) => Some("Accept, Origin"),
            (true, false) => Some("Accept"),
            (false, true) => Some("Origin"),
            (false, false) => None,
        };
        if let Some(vary) = vary {
            headers.insert(VARY, HeaderValue::from_static(vary));
        }
        allowed.add_headers(headers);
    }

    async fn respond(
        &self,
        head: RequestHead,
        body: &mut Incoming,
        reservation: &mut Reservation,
        deadline: Now,
    ) -> Result<Response, Problem> {
        let RequestHead { route, body: body_type, token, plain, .. } = head;
        if !route.has_body() && !body.is_end_stream() {
            return Err(request::body_not_wanted());
        }
        let token_of = |scope, extra| {
            token.map(|token| ClientToken { scope, token: token.key, issued: token.issued, extra })
        };
        if !matches!(route, Route::Page(_)) && self.mailbox.is_full() {
            return Err(self.queue_full(&route));
        }
        match route {
            Route::Increment { counter, query } => {
                let body = self.read_body(body, reservation, deadline).await?;
                let increment = request::increment(body_type, &body, query)?;
                let form = ValueForm { plain, exact: increment.exact };
                let answer = CounterAnswer::new(&counter, form);
                let delta = i128::from(increment.delta);
                let kind = match increment.returning {
                    true => OpKind::AddReturning { delta },
                    false => OpKind::Add { delta },
                };
                let op = Op { counter, kind };
                let applied = self.write_one(op, token_of(Scope::Counter, 0), deadline).await?;
                if increment.returning && applied.value.is_none() {
                    return Err(no_value());
                }
                Ok(applied.mark(answer.incremented(increment.delta, applied.value)))
            }
            Route::Delete { counter, exact } => {
                let answer = CounterAnswer::deleted(&counter, ValueForm { plain, exact });
                let op = Op { counter, kind: OpKind::Delete };
                let applied = self.write_one(op, token_of(Scope::Counter, 0), deadline).await?;
                Ok(applied.mark(answer.value(applied.value.ok_or_else(no_value)?, None)))
            }
            Route::Get { counter, query: ReadQuery { bounded_ms, exact } } => {
                let answer = CounterAnswer::new(&counter, ValueForm { plain, exact });
                let found = self.read_values(vec![counter], bounded_ms, deadline).await?;
                let &value = found.values.first().ok_or_else(no_value)?;
                Ok(answer.value(value, bounded_ms.map(|_| found.staleness_ms)))
            }
            Route::GetMany { namespace, query: ReadQuery { bounded_ms, exact } } => {
                let body = self.read_body(body, reservation, deadline).await?;
                let keys = request::keys(&namespace, &body)?;
                if keys.is_empty() {
                    return Ok(response::values(&[], &[], exact, bounded_ms.map(|_| 0)));
                }
                let found = self.read_values(keys.clone(), bounded_ms, deadline).await?;
                if found.values.len() != keys.len() {
                    return Err(no_value());
                }
                let staleness_ms = bounded_ms.map(|_| found.staleness_ms);
                let values = response::values(&keys, &found.values, exact, staleness_ms);
                refusable(values, reservation)
            }
            Route::IncrementMany { namespace } => {
                let body = self.read_body(body, reservation, deadline).await?;
                let admitted = self.admit(body.len(), deadline).await?;
                let body = BatchBody { namespace: &namespace, body_type, body: &body };
                let batch = body.parse(|bytes| reservation.add(bytes))?;
                if !batch.ops.is_empty() {
                    admitted.submitted();
                }
                let token = token_of(Scope::Batch, batch.rejected_hash());
                Ok(self.write_many(batch, token, body, deadline).await)
            }
            Route::Page(page) => refusable(self.page(page).await, reservation),
        }
    }

    /// Waits until there is room for the operations in a body of this size.
    async fn admit(
        &self,
        body_bytes: usize,
        deadline: Now,
    ) -> Result<AdmittedRequest<'_>, Problem> {
        let until = deadline.min(self.mailbox.now().plus_ms(ADMISSION_MS_MAX));
        let (bytes, until) = (body_bytes * PARSED_BYTES, self.mailbox.timer_at(until));
        let mut ending = self.ending.subscribe();
        let failure = tokio::select! {
            biased;
            admitted = self.mailbox.admission.admit(bytes, until) => match admitted {
                Some(admitted) => return Ok(admitted),
                None => Failure::QueueFull,
            },
            _ = ending.wait_for(|&ending| ending) => Failure::Stopping,
        };
        Err(failure::of_write(failure))
    }

    /// The problem of a request that is refused because the queue is full. All other reasons come
    /// from the batcher, which does not see these requests.
    fn queue_full(&self, route: &Route) -> Problem {
        let slot = match route {
            Route::Increment { counter, .. }
            | Route::Get { counter, .. }
            | Route::Delete { counter, .. } => Some(counter.slot()),
            _ => None,
        };
        let failure = match slot {
            Some(slot) if self.mailbox.is_without_primary(slot) => Failure::NoPrimary,
            _ => Failure::QueueFull,
        };
        match route.writes() {
            true => failure::of_write(failure),
            false => failure::of_read(failure),
        }
    }

    async fn read_values(
        &self,
        keys: Vec<CounterKey>,
        bounded_ms: Option<u64>,
        deadline: Now,
    ) -> Result<ReadValues, Problem> {
        let found = self.mailbox.read(keys, bounded_ms, deadline).await;
        found.map_err(match bounded_ms {
            Some(_) => failure::of_bounded_read,
            None => failure::of_read,
        })
    }

    async fn write_one(
        &self,
        op: Op,
        token: Option<ClientToken>,
        deadline: Now,
    ) -> Result<AppliedWrite, Problem> {
        let result = self.mailbox.write(vec![op], token, deadline).await;
        let WriteResult { values, replayed, failed } = result;
        self.counters.replays.inc_by(replayed as u64);
        match failed.first() {
            Some(&(_, failure)) => Err(failure::of_write(failure)),
            None => {
                let value = values.first().map(|&(_, value)| value);
                Ok(AppliedWrite { value, replayed: replayed > 0 })
            }
        }
    }

    async fn write_many(
        &self,
        IncrementBatch { ops, indexes, mut failed }: IncrementBatch,
        token: Option<ClientToken>,
        body: BatchBody<'_>,
        deadline: Now,
    ) -> Response {
        let items = ops.len() + failed.len();
        if ops.is_empty() {
            return response::batch(items, &failed);
        }
        let result = self.mailbox.write(ops, token, deadline).await;
        self.counters.replays.inc_by(result.replayed as u64);
        let not_applied = result.failed.into_iter().map(|(op, failure)| FailedItem {
            index: indexes[op as usize],
            key: None,
            problem: failure::of_write(failure),
        });
        let malformed = failed.len();
        failed.extend(not_applied);
        if failed.len() > malformed {
            failed.sort_by_key(|item| item.index);
            if response::only_reason(items, &failed).is_none() {
                body.add_keys(&mut failed);
            }
        }
        // Every item that was applied was applied before: this request changed nothing.
        let applied = AppliedWrite {
            value: None,
            replayed: result.replayed > 0 && result.replayed == items - failed.len(),
        };
        applied.mark(response::batch(items, &failed))
    }

    async fn page(&self, page: InfoPage) -> Response {
        let Pages { health, all, metrics, status_page } = &self.pages;
        let (path, health) = match page {
            InfoPage::Livez => ("/livez", health),
            InfoPage::Readyz => ("/readyz", health),
            InfoPage::ReadyzAll => ("/readyz", all),
            InfoPage::Metrics => ("/metrics", health),
            InfoPage::Cluster => {
                let body = status_page.cluster().await;
                return response::page(StatusCode::OK, "application/json", body);
            }
            InfoPage::OpenApi => {
                return response::page(StatusCode::OK, "application/json", openapi::text());
            }
        };
        match telemetry::page(path, health, metrics) {
            Some(page) => response::page(page.status, page.content_type, page.body),
            None => response::problem(&Problem::new(Kind::Internal, "the page is missing: a bug")),
        }
    }

    /// Receives the whole body. A request whose body comes too late or is too large has no effect.
    async fn read_body(
        &self,
        body: &mut Incoming,
        reservation: &mut Reservation,
        deadline: Now,
    ) -> Result<Bytes, Problem> {
        if body.is_end_stream() {
            return Ok(Bytes::new());
        }
        if body.size_hint().lower() > BODY_BYTES_MAX as u64 {
            return Err(request::body_too_large());
        }
        let mut ending = self.ending.subscribe();
        let until = self.mailbox.timer_at(deadline);
        let collected = tokio::time::timeout_at(until, collect(body, reservation));
        tokio::select! {
            biased;
            collected = collected => collected.unwrap_or_else(|_| {
                let detail = "the body did not come in whole before the deadline";
                Err(Problem::bad_input("body", detail))
            }),
            _ = ending.wait_for(|&ending| ending) => Err(failure::of_write(Failure::Stopping)),
        }
    }
}

/// The properties of an answer that follow from its request.
struct AnswerTraits {
    /// `Accept` chooses its form.
    has_forms: bool,
    /// A cache may keep it.
    is_static: bool,
}

/// Returns whether the client wants to keep the connection.
fn is_kept(parts: &Parts) -> bool {
    let lines = parts.headers.get_all(CONNECTION).iter().filter_map(|line| line.to_str().ok());
    let mut words = lines.flat_map(|line| line.split(',')).map(str::trim);
    match parts.version {
        Version::HTTP_10 => words.any(|word| word.eq_ignore_ascii_case("keep-alive")),
        _ => !words.any(|word| word.eq_ignore_ascii_case("close")),
    }
}

/// The answer to the request that a browser sends before it lets a script send another one.
fn preflight() -> Response {
    let mut response = Response::new(AnswerBody::new(""));
    *response.status_mut() = StatusCode::NO_CONTENT;
    browser::add_preflight_headers(response.headers_mut());
    response
}

/// The batcher returned fewer values than were requested.
fn no_value() -> Problem {
    Problem::unknown(Kind::Internal, "an answer without the requested value: a bug")
}

/// The result of a write that was applied.
struct AppliedWrite {
    /// The value, if the operation returns one.
    value: Option<i128>,
    /// The write was applied before, under the same token.
    replayed: bool,
}

impl AppliedWrite {
    /// Marks the answer if the write was replayed.
    fn mark(&self, response: Response) -> Response {
        if self.replayed { response::replayed(response) } else { response }
    }
}

/// The unparsed body of a request with many items.
struct BatchBody<'a> {
    namespace: &'a str,
    body_type: BodyType,
    body: &'a [u8],
}

impl BatchBody<'_> {
    fn parse(
        &self,
        room: impl FnMut(usize) -> Result<(), Problem>,
    ) -> Result<IncrementBatch, Problem> {
        request::increments(self.namespace, self.body_type, self.body, room)
    }

    /// Adds the keys of failed items. The batcher took the operations, and failures are rare, so
    /// the body is parsed again.
    fn add_keys(&self, failed: &mut [FailedItem]) {
        let Ok(again) = self.parse(|_| Ok(())) else { return };
        for item in failed.iter_mut().filter(|item| item.key.is_none()) {
            if let Ok(op) = again.indexes.binary_search(&item.index) {
                item.key = Some(again.ops[op].counter.key().to_vec());
            }
        }
    }
}

/// Refuses the answer to a request without effect if the memory budget is exhausted.
fn refusable(response: Response, reservation: &mut Reservation) -> Result<Response, Problem> {
    let status = StatusCode::SERVICE_UNAVAILABLE;
    let refused = |problem| Problem { status, ..problem };
    reservation.replace(response.body().bytes()).map_err(refused)?;
    Ok(response)
}

async fn collect(body: &mut Incoming, reservation: &mut Reservation) -> Result<Bytes, Problem> {
    let Some(first) = data(body).await? else {
        return Ok(Bytes::new());
    };
    reserve(&first, reservation)?;
    // Most bodies come in one piece, which needs no copy.
    let Some(second) = data(body).await? else {
        return Ok(first);
    };
    let expected = first.len() + second.len() + body.size_hint().lower() as usize;
    let mut all = BytesMut::with_capacity(expected.min(ANNOUNCED_BYTES_MAX));
    all.extend_from_slice(&first);
    let mut next = Some(second);
    while let Some(piece) = next {
        reserve(&piece, reservation)?;
        all.extend_from_slice(&piece);
        next = data(body).await?;
    }
    Ok(all.freeze())
}

fn reserve(piece: &Bytes, reservation: &mut Reservation) -> Result<(), Problem> {
    if reservation.bytes() + piece.len() > BODY_BYTES_MAX {
        return Err(request::body_too_large());
    }
    reservation.add(piece.len())
}

/// The next piece of a body. `None` at its end.
async fn data(body: &mut Incoming) -> Result<Option<Bytes>, Problem> {
    loop {
        match body.frame().await {
            None => return Ok(None),
            // Frames without data are trailers, none of which has a meaning here.
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
async fn drain(body: &mut Incoming, until: TokioInstant) {
    let rest = async {
        let mut bytes = 0;
        while bytes < DRAIN_BYTES_MAX {
            match data(body).await {
                Ok(Some(piece)) => bytes += piece.len(),
                Ok(None) | Err(_) => break,
            }
        }
    };
    let until = until.min(TokioInstant::now() + DRAIN_WITHIN);
    let _timed_out = tokio::time::timeout_at(until, rest).await;
}

impl ConnectionState {
    fn wake(&mut self) {
        if let Some(task) = self.task.take() {
            task.wake();
        }
    }
}

/// Keeps a connection in the list of open ones, until dropped.
struct ConnectionGuard {
    server: Rc<HttpServer>,
    id: usize,
}

impl ConnectionGuard {
    fn new(server: Rc<HttpServer>) -> Self {
        let connection =
            ConnectionState { task: None, idle_since: Some(Instant::now()), ends: false };
        let id = server.connections.borrow_mut().open.insert(connection);
        server.counters.connections.inc();
        Self { server, id }
    }

    /// Returns whether the connection is to end and has no request in flight. If not, `waker` is
    /// woken once the connection is to end.
    fn is_to_end(&self, waker: &Waker) -> bool {
        let mut connections = self.server.connections.borrow_mut();
        let stopping = connections.stopping;
        let connection = &mut connections.open[self.id];
        if !connection.task.as_ref().is_some_and(|task| task.will_wake(waker)) {
            connection.task = Some(waker.clone());
        }
        (stopping || connection.ends) && connection.idle_since.is_some()
    }
}

impl Drop for ConnectionGuard {
    fn drop(&mut self) {
        let mut connections = self.server.connections.borrow_mut();
        connections.open.remove(self.id);
        self.server.counters.connections.dec();
        if connections.open.is_empty()
            && let Some(waker) = connections.all_closed.take()
        {
            waker.wake();
        }
    }
}
